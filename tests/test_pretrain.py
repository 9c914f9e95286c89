"Synthetic volumes on any grid; a pretraining that is cut off anywhere"
import os, random, signal, subprocess, sys
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file
from scipy.spatial.transform import Rotation

import covid3d.pretrain as module
from covid3d.checkpoint import read_checkpoint, write_checkpoint
from covid3d.encoder import encoder3d, encoder_info, unfinished
from covid3d.files import Outputs
from covid3d.phantom import write_phantoms
from covid3d.pretrain import (MaskedLoss, MixedPatches, _branches, _classes, _inner_grid, _intensity_curve, _kinds, _learner, _loaders, _masked, _phantom_scan, _random_frame, _segment_mask,
    pretrain_encoder, save_encoder, set_seed, shapes)
from covid3d.transforms import CTSpec
from covid3d.volume import CTError

spec,grid = CTSpec(spacing=(9,7,7), patch=(16,32,32)),dict(shape=(32,96,96), spacing=(9,3.7,3.7))
tiny = dict(arch='r3d_18', width=4, spec=spec, phantoms=1, grid=grid, device='cpu')
sides,mms = st.tuples(*[st.integers(4,24)]*3),st.tuples(*[st.floats(.4,9)]*3)
vectors = st.tuples(*[st.floats(-60,60)]*3).map(np.array)

@pytest.fixture(scope='module')
def scan(): return _phantom_scan(0, spec, **grid)

@given(st.integers(0,2**64-1), sides, mms)
@settings(max_examples=60)
def test_any_grid(seed, shape, spacing):
    x,y = shapes(seed, shape, spacing)
    assert x.shape==(1,*shape) and y.shape==(len(_kinds),*shape) and x.dtype==np.float32 and y.dtype==np.uint8
    assert np.isfinite(x).all() and 0<=x.min()<=x.max()<=1 and y.sum(0).max()<=1
    assert all((a==b).all() for a,b in zip((x,y), shapes(seed, shape, spacing)))

def test_global_seeds_play_no_part():
    a = shapes(7)[0]; np.random.seed(3); random.seed(3); torch.manual_seed(3)
    assert (a==shapes(7)[0]).all()

@given(vectors, vectors, st.floats(2,30))
@settings(max_examples=60)
def test_segment_is_all_that_is_near(start, end, radius):
    "Against 400 points between the ends"
    if np.linalg.norm(end-start)<1: return
    axes = [np.arange(-50,50,5.)+.3,np.arange(-60,60,7.)+.2,np.arange(-40,40,6.)+.1]
    box,hit = _segment_mask([a.astype(np.float32) for a in axes], start, end, radius)
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
    box,u = _inner_grid([a.astype(np.float32) for a in g], centre, axes, turn.inv().as_matrix())
    p = np.stack(np.meshgrid(*g, indexing='ij'), -1)
    want = np.moveaxis(turn.inv().apply((p-centre).reshape(-1,3)).reshape(p.shape)/axes, -1, 0)
    np.testing.assert_allclose(np.stack(u), want[(slice(None),*box)], atol=2e-5)
    inside = (np.abs(want).max(0)<.999); inside[box] = False
    assert not inside.any()

@given(st.integers(0,1000))
@settings(max_examples=30)
def test_frames_are_orthogonal(seed):
    f = _random_frame(np.random.default_rng(seed))
    np.testing.assert_allclose(f@f.T, np.eye(3), atol=1e-12)

def test_trees_end():
    assert all(1<=len(_branches(np.random.default_rng(s), np.zeros(3), np.ones(3), 4., 8))<200 for s in range(200))

@given(st.integers(0,10_000), st.sampled_from(['black','white','two','noise']))
@settings(max_examples=60)
def test_curves_never_fall(seed, what):
    "Flat and two-valued patches too, where a histogram has one bin"
    rng = np.random.default_rng(seed)
    x = dict(black=np.zeros(999), white=np.ones(999), two=rng.integers(0,2,999)*1., noise=rng.random(999))[what].astype(np.float32)
    c = _intensity_curve(x, rng)
    assert (np.diff(c)>=-1e-12).all() and abs(c[0])<1e-9 and abs(c[-1]-1)<1e-9

@pytest.mark.parametrize('share', [0,.25,1/3,.5,1])
def test_each_domain_marks_what_it_does_not_know(scan, share):
    m = MixedPatches(spec, [scan], 12, share)
    synthetic = [bool((y[:2]==_masked).all()) for _,y in m]
    assert sum(synthetic)==int(12*share)
    for (x,y),of_shapes in zip(m, synthetic):
        known = y[2:] if of_shapes else y[:2]
        assert x.dtype==torch.float32 and x.shape==(1,*spec.patch) and 0<=x.min() and x.max()<=1
        assert known.max()<=1 and (y==_masked).sum()==y[0].numel()*(len(_classes)-len(known))
        if of_shapes: assert torch.equal(y[2], y[3:].amax(0))

@pytest.mark.parametrize('fill', [0,1])
def test_loss_of_empty_and_full_masks(fill):
    "Finite, with finite gradients, and small where the answer is right"
    mask = torch.full((2,len(_classes),4,8,8), fill, dtype=torch.uint8)
    right,wrong = (torch.full(mask.shape, 20.*s*(2*fill-1)).requires_grad_() for s in (1,-1))
    for l in (right,wrong): MaskedLoss()(l, mask).backward()
    assert MaskedLoss()(right, mask)<1e-3<MaskedLoss()(wrong, mask) and torch.isfinite(right.grad).all() and torch.isfinite(wrong.grad).all()

def test_it_learns(scan):
    "A hundred steps on one phantom's patches: lungs are found in others of its patches"
    set_seed(0, reproducible=True)
    learn = _learner(_loaders(spec, [scan], [scan], 100, share=0, score=8, device='cpu'), width=8)
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
    info = encoder_info(file)
    assert 'stopped after 2 of 6 steps' in capsys.readouterr().out and (info['step'],info['steps'])==(2,6) and len(pd.read_csv(tmp_path/'history.csv'))==1
    assert 'left at step 2 of 6' in unfinished(file)

def test_ctrl_c_before_the_first_epoch(tmp_path, monkeypatch):
    "Nothing is there, and nothing says that it is"
    def interrupted(*_): raise KeyboardInterrupt
    monkeypatch.setattr(module._Log, 'before_fit', interrupted)
    encoder_file(tmp_path/'encoder.safetensors'); (tmp_path/'history.csv').write_text('of a former one')
    Outputs(tmp_path, 'pretrain', '*').add('encoder.safetensors', 'history.csv')
    with pytest.raises(KeyboardInterrupt): pretrain_encoder(tmp_path, steps=2, **tiny)
    assert sorted(o.name for o in tmp_path.iterdir())==['checkpoint.safetensors','covid3d.json']

def test_nan_is_an_error(tmp_path, monkeypatch):
    "The message names the step, counted from the first one after a resumption too; what was saved is finite"
    plain,bad,n = module.MaskedLoss.forward,3,0
    def spoiled(self, logits, mask):
        nonlocal n; n += torch.is_grad_enabled()
        return plain(self, logits, mask)*(float('nan') if n==bad and torch.is_grad_enabled() else 1)
    monkeypatch.setattr(module.MaskedLoss, 'forward', spoiled)
    run = lambda **kw: pretrain_encoder(tmp_path, steps=6, every=2, **tiny, **kw)
    with pytest.raises(CTError, match='loss: the loss became NaN or infinite at step 3. Start anew with a lower learning rate'): run()
    assert all(torch.isfinite(v).all() for v in load_file(tmp_path/'encoder.safetensors').values()) and encoder_info(tmp_path/'encoder.safetensors')['step']==2
    bad,n = 2,0
    with pytest.raises(CTError, match='infinite at step 4. '): run(resume=True)

def test_weights_without_a_number_are_not_saved(tmp_path, monkeypatch):
    "The loss was one, the last step of an epoch spoils the weights"
    step = module.Learner._step
    def spoiled(self):
        step(self)
        if self.epoch==1 and self.iter==1:
            with torch.no_grad(): next(self.model.parameters()).fill_(float('nan'))
    monkeypatch.setattr(module.Learner, '_step', spoiled)
    with pytest.raises(CTError, match='a weight became NaN or infinite at step 4. '): pretrain_encoder(tmp_path, steps=6, every=2, **tiny)
    assert encoder_info(tmp_path/'encoder.safetensors')['step']==2

def test_passed_epochs_write_nothing(tmp_path, monkeypatch):
    "While a resumed run passes over what is done, the encoder on disk stays: cut off there it was once that of untrained weights"
    stop = lambda *_: (_ for _ in ()).throw(KeyboardInterrupt)
    with monkeypatch.context() as m:
        plain = module._Log.after_epoch
        m.setattr(module._Log, 'after_epoch', lambda self: stop() if self.trains and self.epoch==2 else plain(self))
        pretrain_encoder(tmp_path, steps=6, every=2, **tiny)
    before = [(tmp_path/o).read_bytes() for o in ('encoder.safetensors','history.csv')]
    assert encoder_info(tmp_path/'encoder.safetensors')['step']==4
    monkeypatch.setattr(module._Log, 'before_train', stop)
    pretrain_encoder(tmp_path, steps=6, every=2, resume=True, **tiny)
    assert before==[(tmp_path/o).read_bytes() for o in ('encoder.safetensors','history.csv')]

@pytest.mark.promise('silent')
def test_a_forged_checkpoint_gives_no_encoder(tmp_path):
    "A pretraining whose checkpoint tells of more epochs, or of an encoder that is not there, is refused"
    def finish(): raise KeyboardInterrupt
    ck,file = tmp_path/'checkpoint.safetensors',pretrain_encoder(tmp_path, steps=4, every=2, **tiny)
    file.rename(tmp_path/'gone')
    with pytest.raises(CTError, match='encoder.safetensors: no such file'): pretrain_encoder(tmp_path, steps=4, every=2, resume=True, **tiny)
    (tmp_path/'gone').rename(file); ck.unlink()
    with pytest.MonkeyPatch.context() as m:
        m.setattr(module.Checkpoint, 'after_fit', lambda *_: finish())
        pretrain_encoder(tmp_path, steps=4, every=2, **tiny)
    good,tensors = read_checkpoint(ck)
    assert (good['epoch'],len(good['callbacks']['pretrain_log']['rows']))==(1,1)
    first, = good['callbacks']['pretrain_log']['rows']
    for log in (dict(rows=[]), dict(rows=[first]*2), dict(rows=[first|dict(step=4)]), dict(rows=[{'step':2}]), dict(rows=[first|dict(kinds='00:01')]), dict(rows=[[1.,2.]]), dict(minutes=float('nan')), dict(minutes=-1.)):
        write_checkpoint(ck, good|dict(callbacks=good['callbacks']|dict(pretrain_log=good['callbacks']['pretrain_log']|log)), tensors)
        with pytest.raises(CTError, match='callback pretrain_log does not fit'): pretrain_encoder(tmp_path, steps=4, every=2, resume=True, **tiny)
    write_checkpoint(ck, good, tensors)
    assert pretrain_encoder(tmp_path, steps=4, every=2, resume=True, **tiny)==file and len(pd.read_csv(tmp_path/'history.csv'))==2

def test_one_process_alone(tmp_path, monkeypatch):
    for k,v in dict(RANK='0', WORLD_SIZE='2', MASTER_ADDR='127.0.0.1', MASTER_PORT='29500').items(): monkeypatch.setenv(k, v)
    with pytest.raises(CTError, match='pretraining: is work for one process, and 2 were started'): pretrain_encoder(tmp_path/'a', steps=2, **tiny)
    assert not (tmp_path/'a').exists()

worker = """
import os, signal, sys, time
import torch, covid3d.checkpoint, covid3d.pretrain
from functools import partial
from pathlib import Path
from covid3d.pretrain import pretrain_encoder
from covid3d.transforms import CTSpec
covid3d.pretrain._loaders = partial(covid3d.pretrain._loaders, score=4)
plain = covid3d.checkpoint.write_checkpoint
def marked(path, state, tensors):
    writing.touch(); plain(path, state, tensors); time.sleep(.005); writing.unlink()
print('ready', flush=True)
for line in sys.stdin:
    out,how,at = line.split(); start,writing,seen,was = time.monotonic(),Path(out+'.writing'),0,False
    writing.unlink(missing_ok=True)
    pid = os.fork()
    if not pid:
        covid3d.checkpoint.write_checkpoint = marked
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1); torch.set_num_threads(1)
        pretrain_encoder(out, width=4, steps=12, every=2, spec=CTSpec(spacing=(9,7,7), patch=(16,32,32)), phantoms=1, lr=1e-2,
            grid=dict(shape=(32,96,96), spacing=(9,3.7,3.7)), device='cpu', resume=True)
        os._exit(0)
    while True:
        done,status = os.waitpid(pid, os.WNOHANG)
        if done: break
        now = writing.exists(); seen,was = seen+(now and not was),now
        if how=='after' and time.monotonic()-start>float(at) or how=='writing' and now and seen==int(at): os.kill(pid, signal.SIGKILL)
        time.sleep(.0005)
    print(os.waitstatus_to_exitcode(status), time.monotonic()-start, flush=True)
"""

@pytest.mark.fault('X5')
@pytest.mark.promise('lost')
def test_killed_anywhere_it_ends_with_the_same_weights(tmp_path):
    "SIGKILL at random moments and while a checkpoint is written: after each one encoder and history are those of some epoch, and resumed the pretraining ends as one without a break"
    rng,kills,moved,n = random.Random(int(os.environ.get('COVID3D_SEED', 0))),0,0,0
    with subprocess.Popen([sys.executable,'-W','ignore','-c',worker], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=os.environ|dict(OMP_NUM_THREADS='1')) as p:
        assert p.stdout.readline()=='ready\n'
        def run(out, how='after', at=1e9):
            p.stdin.write(f'{out} {how} {at}\n'); p.stdin.flush()
            return [float(o) for o in p.stdout.readline().split()]
        status,secs = run(tmp_path/'whole'); assert status==0
        while kills<6:
            out = tmp_path/str(n); n += 1
            while True:
                how = ('writing',rng.randint(1,3)) if kills%3==1 else ('after',rng.uniform(.1,.7)*secs)
                status,_ = run(out, *how) if kills<6 else run(out)
                if status==0: break
                assert status==-signal.SIGKILL; kills += 1
                if (out/'encoder.safetensors').exists():
                    rows,info = pd.read_csv(out/'history.csv'),encoder_info(out/'encoder.safetensors')
                    assert info['step']//2 in (len(rows)-1,len(rows)) and len(rows)>0 and info['steps']==12
                    encoder3d('r3d_18', out/'encoder.safetensors'); moved += info['step']<12
            same_run(tmp_path/'whole', out)
        p.stdin.close()
    print(f'{kills} kills in {n} runs, {moved} with an unfinished encoder')
    assert moved>0

def same_run(a, b):
    "Tensors bit by bit, and all that is told but the time"
    x,y = (load_file(o/'encoder.safetensors') for o in (a,b))
    assert x.keys()==y.keys() and all(torch.equal(x[k], y[k]) for k in x)
    told = [{k:v for k,v in encoder_info(o/'encoder.safetensors').items() if k!='minutes'} for o in (a,b)]
    rows = [pd.read_csv(o/'history.csv').drop(columns='minutes') for o in (a,b)]
    assert told[0]==told[1] and told[0]['step']==told[0]['steps']==12 and rows[0].equals(rows[1]) and len(rows[0])==6
    assert rows[0].valid_loss.is_unique and not list(b.glob('.*'))

def test_from_synthetic_shapes_to_a_training(tmp_path, capsys):
    "The commands, one after the other: pretrain, and train from it"
    from covid3d.cli import main
    table,file = write_phantoms(tmp_path/'data', n=4, seed=1, shape=(32,96,96), spacing=(9,3.7,3.7)),tmp_path/'enc'/'encoder.safetensors'
    grid = ['--spacing','9,7,7','--patch','16,32,32']
    assert main(['pretrain','--out',str(tmp_path/'enc'),'--width','8','--steps','2','--phantoms','1','--device','cpu',*grid])==0
    assert f'covid3d train cases.csv --init {file}' in capsys.readouterr().out
    assert main(['pretrain','--out',str(tmp_path/'enc'),'--device','cpu'])==2 and 'exists already' in capsys.readouterr().err
    assert main(['train',str(table),'--out',str(tmp_path/'run'),'--init',str(file),'--epochs','1','--patches','2','--device','cpu',*grid])==0
    assert (tmp_path/'run'/'model.safetensors').is_file() and list((tmp_path/'run'/'examples').glob('*.png'))

def test_only_the_encoders_differ(tmp_path, monkeypatch):
    "benchmarks/transfer.py: from the very weights with which the random arm starts, trained alike, the other arm scores the same: decoder, patches, their order and augmentation are the same. By the recipe it does not"
    monkeypatch.syspath_prepend(Path(__file__).parents[1]/'benchmarks')
    import transfer
    plain,file = transfer.unet_learner_3d,tmp_path/'e.safetensors'
    def keep(*args, **kwargs):
        learn = plain(*args, **kwargs)
        if not kwargs['pretrained']: save_encoder(learn.model.encoder, file, dict(encoder='r3d_18', width=8, norm='batch'))
        return learn
    monkeypatch.setattr(transfer, 'unet_learner_3d', keep)
    table = write_phantoms(tmp_path/'scans', n=2, seed=1, **grid)
    how = dict(lr=.02, spec=CTSpec(spec.spacing, patch=spec.patch, classes=('lung',)), width=8)
    run = lambda weights, **kw: [r['dice'] for r in transfer.run(table, weights, (0,2), 0, 160, 2, **how, **kw)]
    random_weights = run(None)
    assert random_weights[-1]>.1 and run(file, alike=True)==random_weights and run(file)!=random_weights
