"Made-up volumes on any grid; a pretraining and a study that are cut off anywhere"
import os, random, signal, subprocess, sys, time

import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from scipy.spatial.transform import Rotation

import covid3d.pretrain as module
from covid3d.encoder import encoder3d
from covid3d.pretrain import (KnownLoss, MixedPatches, branches, classes, encoder_info, grey_curve, inner_grid, kinds, phantom_scan, pretrain_encoder,
    pretrain_learner, pretrain_loaders, random_frame, read_study, save_encoder, segment_mask, set_seed, shapes, transfer_study, unknown)
from covid3d.transforms import CTSpec
from covid3d.volume import CTError

spec,grid = CTSpec(spacing=(9,7,7), patch=(16,32,32)),dict(shape=(32,96,96), spacing=(9,3.7,3.7))
tiny = dict(arch='r3d_18', width=4, spec=spec, phantoms=1, grid=grid, device='cpu')
sides,mms = st.tuples(*[st.integers(4,24)]*3),st.tuples(*[st.floats(.4,9)]*3)
vectors = st.tuples(*[st.floats(-60,60)]*3).map(np.array)

@pytest.fixture(scope='module')
def scan(): return phantom_scan(0, spec, **grid)

@given(st.integers(0,2**64-1), sides, mms)
@settings(max_examples=60)
def test_any_grid(seed, shape, spacing):
    x,y = shapes(seed, shape, spacing)
    assert x.shape==(1,*shape) and y.shape==(len(kinds),*shape) and x.dtype==np.float32 and y.dtype==np.uint8
    assert np.isfinite(x).all() and 0<=x.min()<=x.max()<=1 and y.sum(0).max()<=1
    assert all((a==b).all() for a,b in zip((x,y), shapes(seed, shape, spacing)))

def test_global_seeds_play_no_part():
    a = shapes(7)[0]; np.random.seed(3); random.seed(3); torch.manual_seed(3)
    assert (a==shapes(7)[0]).all()

def test_a_volume_costs_little():
    "Of a training step, a hundredth or so: the fastest of twenty, so that a busy machine does not matter"
    shapes(0); cost = []
    for seed in range(20): start = time.process_time(); shapes(seed); cost.append(time.process_time()-start)
    assert min(cost)<.015

@given(vectors, vectors, st.floats(2,30))
@settings(max_examples=60)
def test_segment_is_all_that_is_near(start, end, radius):
    "Against 400 points between the ends"
    if np.linalg.norm(end-start)<1: return
    axes = [np.arange(-50,50,5.)+.3,np.arange(-60,60,7.)+.2,np.arange(-40,40,6.)+.1]
    box,hit = segment_mask([a.astype(np.float32) for a in axes], start, end, radius)
    out = np.zeros([len(a) for a in axes], bool); out[box] = hit
    p = np.stack(np.meshgrid(*axes, indexing='ij'), -1); line = start+np.linspace(0,1,400)[:,None]*(end-start)
    near = np.min([np.linalg.norm(p-o, axis=-1) for o in line], 0)
    sure = np.abs(near-radius)>.2
    assert (out==(near<radius))[sure].all()

@given(vectors, st.tuples(*[st.floats(3,60)]*3).map(np.array), st.integers(0,1000))
@settings(max_examples=60)
def test_frame_against_scipy(centre, axes, seed):
    "Coordinates in the frame are those of SciPy's rotation, and nothing of the solid lies outside its box"
    turn = Rotation.random(random_state=seed)
    g = [np.arange(-50,50,5.),np.arange(-60,60,7.),np.arange(-40,40,6.)]
    box,u = inner_grid([a.astype(np.float32) for a in g], centre, axes, turn.inv().as_matrix())
    p = np.stack(np.meshgrid(*g, indexing='ij'), -1)
    want = np.moveaxis(turn.inv().apply((p-centre).reshape(-1,3)).reshape(p.shape)/axes, -1, 0)
    np.testing.assert_allclose(np.stack(u), want[(slice(None),*box)], atol=2e-5)
    inside = (np.abs(want).max(0)<.999); inside[box] = False
    assert not inside.any()

@given(st.integers(0,1000))
@settings(max_examples=30)
def test_frames_are_orthogonal(seed):
    f = random_frame(np.random.default_rng(seed))
    np.testing.assert_allclose(f@f.T, np.eye(3), atol=1e-12)

def test_trees_end():
    assert all(1<=len(branches(np.random.default_rng(s), np.zeros(3), np.ones(3), 4., 8))<200 for s in range(200))

@given(st.integers(0,10_000), st.sampled_from(['black','white','two','noise']))
@settings(max_examples=60)
def test_curves_never_fall(seed, what):
    "Flat and two-valued patches too, where a histogram has one bin"
    rng = np.random.default_rng(seed)
    x = dict(black=np.zeros(999), white=np.ones(999), two=rng.integers(0,2,999)*1., noise=rng.random(999))[what].astype(np.float32)
    c = grey_curve(x, rng)
    assert (np.diff(c)>=-1e-12).all() and abs(c[0])<1e-9 and abs(c[-1]-1)<1e-9

@pytest.mark.parametrize('share', [0,.25,1/3,.5,1])
def test_each_domain_marks_what_it_does_not_know(scan, share):
    m = MixedPatches(spec, [scan], 12, share)
    made_up = [bool((y[:2]==unknown).all()) for _,y in m]
    assert sum(made_up)==int(12*share)
    for (x,y),of_shapes in zip(m, made_up):
        known = y[2:] if of_shapes else y[:2]
        assert x.dtype==torch.float32 and x.shape==(1,*spec.patch) and 0<=x.min() and x.max()<=1
        assert known.max()<=1 and (y==unknown).sum()==y[0].numel()*(len(classes)-len(known))
        if of_shapes: assert torch.equal(y[2], y[3:].amax(0))

@pytest.mark.parametrize('fill', [0,1])
def test_loss_of_empty_and_full_masks(fill):
    "Finite, with finite gradients, and small where the answer is right"
    mask = torch.full((2,len(classes),4,8,8), fill, dtype=torch.uint8)
    right,wrong = (torch.full(mask.shape, 20.*s*(2*fill-1)).requires_grad_() for s in (1,-1))
    for l in (right,wrong): KnownLoss()(l, mask).backward()
    assert KnownLoss()(right, mask)<1e-3<KnownLoss()(wrong, mask) and torch.isfinite(right.grad).all() and torch.isfinite(wrong.grad).all()

def test_it_learns(scan):
    "A hundred steps on one phantom's patches: lungs are found in others of its patches"
    set_seed(0, reproducible=True)
    learn = pretrain_learner(pretrain_loaders(spec, [scan], [scan], 100, share=0, score=8, device='cpu'), width=8)
    start = float(learn.validate()[0]); learn.fit_one_cycle(1, 1e-2)
    end,_,lung,*_ = learn.validate()
    assert end<.85*start and lung>.3

def encoder_file(path, **kwargs):
    save_encoder(encoder3d('r3d_18', False, 4, **kwargs), path, dict(encoder='r3d_18', width=4, norm=kwargs.get('norm','batch')))
    return path

@pytest.mark.parametrize('norm', ['batch','group','instance'])
def test_norms_pass_through(tmp_path, norm):
    file = pretrain_encoder(tmp_path, steps=2, norm=norm, **tiny)
    assert encoder_info(file)['norm']==norm and list(encoder3d('r3d_18', file, norm=norm)(torch.rand(1,1,16,32,32)).shape)==[1,32,2,2,2]

def test_ctrl_c_keeps_the_last_epoch(tmp_path, monkeypatch, capsys):
    n,plain = 0,module.shapes
    def interrupted(*args):
        nonlocal n; n += 1
        if n==16+2+1: raise KeyboardInterrupt  # 16 shapes are drawn to score with, two in the first epoch; then comes the second
        return plain(*args)
    monkeypatch.setattr(module, 'shapes', interrupted)
    file = pretrain_encoder(tmp_path, steps=6, every=2, **tiny)
    assert 'stopped after 2 steps' in capsys.readouterr().out and encoder_info(file)['step']==2 and len(pd.read_csv(tmp_path/'history.csv'))==1

def test_ctrl_c_before_the_first_epoch(tmp_path, monkeypatch):
    "Nothing is there, and nothing says that it is"
    def interrupted(*_): raise KeyboardInterrupt
    monkeypatch.setattr(module.PretrainLog, 'before_fit', interrupted)
    with pytest.raises(KeyboardInterrupt): pretrain_encoder(tmp_path, steps=2, **tiny)
    assert not (tmp_path/'encoder.safetensors').exists()

def test_nan_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(module.KnownLoss, 'forward', lambda self, logits, mask: logits.sum()*float('nan'))
    with pytest.raises(CTError, match='not a number after step 0. Use a lower learning rate'): pretrain_encoder(tmp_path, steps=4, every=2, **tiny)

script = '''
import sys
from covid3d.pretrain import pretrain_encoder
from covid3d.transforms import CTSpec
pretrain_encoder(sys.argv[1], width=4, steps=100000, every=1, spec=CTSpec(spacing=(9,7,7), patch=(16,32,32)), phantoms=1,
    grid=dict(shape=(32,96,96), spacing=(9,3.7,3.7)), device='cpu')
'''

def test_killed_anywhere_the_file_opens(tmp_path):
    "SIGKILL at a random moment after the first epoch: weights and history are those of some epoch"
    p = subprocess.Popen([sys.executable,'-W','ignore','-c',script,str(tmp_path)], stdout=subprocess.DEVNULL, env=os.environ|dict(OMP_NUM_THREADS='1'))
    try:
        limit = time.monotonic()+240
        while not (tmp_path/'encoder.safetensors').exists() and time.monotonic()<limit and p.poll() is None: time.sleep(.1)
        time.sleep(random.Random(0).uniform(1,3))
    finally: p.send_signal(signal.SIGKILL); p.wait()
    rows = pd.read_csv(tmp_path/'history.csv')
    assert encoder_info(tmp_path/'encoder.safetensors')['step'] in (len(rows)-1,len(rows)) and len(rows)>0
    encoder3d('r3d_18', tmp_path/'encoder.safetensors')

# The study, with a stand-in for its runs

class StandIn:
    "Takes the place of `transfer_run`: remembers what was asked for, and is interrupted before run number `stop`"
    def __init__(self): self.done,self.stop = [],None
    def __call__(self, table, weights, fold, seed, patches, **kwargs):
        if len(self.done)==self.stop: raise KeyboardInterrupt
        self.done.append((weights is not None, fold, seed, patches, kwargs))
        return [dict(moment=m, patches=patches*m//2, seconds=10.*m, dice=.1*m+.01*fold[0]+.2*(weights is not None)) for m in (1,2)]

@pytest.fixture
def runs(monkeypatch):
    o = StandIn(); monkeypatch.setattr(module, 'transfer_run', o)
    return o

def test_a_study_goes_on_where_it_was_cut_off(tmp_path, runs):
    file = encoder_file(tmp_path/'e.safetensors')
    runs.stop = 3
    with pytest.raises(KeyboardInterrupt): transfer_study('t.csv', file, tmp_path/'s', folds=2, seeds=(0,1), patches=100)
    assert len(read_study(tmp_path/'s/transfer.csv'))==6
    runs.stop = None
    df = transfer_study('t.csv', file, tmp_path/'s', folds=2, seeds=(0,1), patches=100)
    keys = [o[:4] for o in runs.done]
    assert len(keys)==len(set(keys))==8 and len(df)==16 and not df.duplicated(['weights','fold','seed','moment']).any()
    assert {str(o[4]) for o in runs.done}=={str(dict(arch='r3d_18', width=4))}
    n = len(runs.done); transfer_study('t.csv', file, tmp_path/'s', folds=2, seeds=(0,1), patches=100)
    assert len(runs.done)==n

def test_more_seeds_and_another_budget_are_added(tmp_path, runs):
    file = encoder_file(tmp_path/'e.safetensors')
    study = lambda **kw: transfer_study('t.csv', file, tmp_path/'s', folds=2, **kw)
    assert len(study(patches=100))==8
    assert len(study(patches=100, seeds=(0,1)))==16 and len(runs.done)==8
    assert len(study(patches=200))==8 and len(runs.done)==12 and set(read_study(tmp_path/'s/transfer.csv').budget)=={100,200}

def test_several_files(tmp_path, runs):
    files = {k:encoder_file(tmp_path/f'{k}.safetensors', norm='group') for k in 'ab'}
    df = transfer_study('t.csv', files, tmp_path/'s', folds=1, patches=10)
    assert list(df.weights.unique())==['random','a','b'] and all(o[4]['norm']=='group' for o in runs.done)
    with pytest.raises(CTError, match='different build'): transfer_study('t.csv', files|dict(c=encoder_file(tmp_path/'c.safetensors')), tmp_path/'s')

def test_weights_are_looked_at_before_any_run(tmp_path, runs):
    "Not after the hours of the first random run"
    for file,fault in (('none.safetensors','no such file'),('bad.safetensors','damaged')):
        if fault=='damaged': (tmp_path/file).write_bytes(b'\x08\0\0\0\0\0\0\0{}')
        with pytest.raises(CTError, match=fault): transfer_study('t.csv', tmp_path/file, tmp_path/'s')
    assert runs.done==[] and not (tmp_path/'s').exists()

def test_from_made_up_shapes_to_a_study(tmp_path, capsys):
    "The commands, one after the other: pretrain, train from it, and the study"
    from covid3d.cli import main
    from covid3d.phantom import write_phantoms
    table,file = write_phantoms(tmp_path/'data', n=4, seed=1, shape=(32,96,96), spacing=(9,3.7,3.7)),tmp_path/'enc'/'encoder.safetensors'
    grid = ['--spacing','9,7,7','--patch','16,32,32']
    assert main(['pretrain','--out',str(tmp_path/'enc'),'--width','8','--steps','2','--phantoms','1','--device','cpu',*grid])==0
    assert f'covid3d train cases.csv --weights {file}' in capsys.readouterr().out
    assert main(['pretrain','--out',str(tmp_path/'enc'),'--device','cpu'])==2 and 'exists already' in capsys.readouterr().err
    assert main(['train',str(table),'--out',str(tmp_path/'run'),'--weights',str(file),'--epochs','1','--patches','2','--device','cpu',*grid])==0
    assert (tmp_path/'run'/'model.safetensors').is_file() and list((tmp_path/'run'/'examples').glob('*.png'))
    assert main(['prepare',str(table),'--out',str(tmp_path/'prepared'),*grid])==0
    study = ['transfer-study',str(tmp_path/'prepared'),'--weights',str(file),'--out',str(tmp_path/'study'),'--folds','2','--patches','4','--moments','1','--device','cpu']
    capsys.readouterr()
    assert main(study)==0 and capsys.readouterr().out.count('fold')==4
    rows = pd.read_csv(tmp_path/'study'/'transfer.csv')
    assert main(study)==0 and 'fold' not in capsys.readouterr().out  # nothing is repeated
    assert len(rows)==4 and set(rows.weights)=={'random','pretrained'} and (tmp_path/'study'/'transfer.png').is_file()
    assert main([*study[:2],*study[4:]])==2 and 'Add --weights FILE' in capsys.readouterr().err
