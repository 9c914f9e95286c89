"Nothing is lost: trainings killed at random moments, while they write, and on a full disk go on and end bit-equal"
import csv, json, math, os, random, shutil, signal, subprocess, sys
from multiprocessing import active_children
from pathlib import Path

import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.schedule import *
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from safetensors.torch import load_file, save_file

from covid3d.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from covid3d.encoder import encoder3d
from coarse import write_coarse

rng = random.Random(int(os.environ.get('COVID3D_SEED', 0)))
small = ['--width','8','--spacing','9,7,7','--patch','16,32,32','--patches','12','--frozen-epochs','1','--frozen-stages','2','--lr-ratio','3','--epochs','3','--lr','1e-1','--score-every','1','--augment','full','--ema','.9','--device','cpu']

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "Phantoms, a table, and an encoder to start from"
    root = tmp_path_factory.mktemp('data')
    table = write_coarse(root, n=5, seed=31)  # large lesions, so that there is something to learn
    torch.manual_seed(2)
    save_file({k:v.contiguous() for k,v in encoder3d('r3d_18', False, 8).state_dict().items()}, root/'encoder.safetensors')
    return table,root/'encoder.safetensors'

@pytest.fixture(scope='module')
def worker():
    "Runs commands in forked children, see killed.py"
    env = os.environ|dict(OMP_NUM_THREADS='1')
    with subprocess.Popen([sys.executable, Path(__file__).with_name('killed.py')], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env) as p:
        assert p.stdout.readline()=='ready\n'
        def run(argv, **kwargs):
            p.stdin.write(json.dumps(dict(argv=[str(o) for o in argv])|kwargs)+'\n'); p.stdin.flush()
            return json.loads(p.stdout.readline())
        yield run
        p.stdin.close()

def words(data, out, *more): return ['train',data[0],'--init',data[1],'--out',out,*small,*more]

@pytest.fixture(scope='module')
def straight(data, worker, tmp_path_factory):
    "The same training without a break"
    return whole(data, worker, tmp_path_factory.mktemp('straight'))

@pytest.fixture(scope='module')
def scored(data, worker, tmp_path_factory):
    "With a score that rises and falls"
    return whole(data, worker, tmp_path_factory.mktemp('scored'), score=True)

def whole(data, worker, out, **kwargs):
    res = worker(words(data, out/'run'), keep=str(out/'kept'), **kwargs)
    assert res['status']==0, res
    return out,res['secs']

def history(run):
    "The table of epochs but for the time it took"
    return [{k:v for k,v in r.items() if k!='time'} for r in csv.DictReader((run/'history.csv').open())]

def content(path):
    "A checkpoint, all of it but for the time that epochs took"
    state,tensors = read_checkpoint(path)
    state['callbacks']['history']['rows'] = [r[:-1] for r in state['callbacks']['history']['rows']]
    return state,tensors

def require_equal(a, b):
    "Two runs with the same weights, table and checkpoints (those that were linked before a kill)"
    assert (a/'run'/'model.safetensors').read_bytes()==(b/'run'/'model.safetensors').read_bytes()
    assert history(a/'run')==history(b/'run')
    both = sorted({o.name for o in (a/'kept').iterdir()} & {o.name for o in (b/'kept').iterdir()})
    assert '1-3.safetensors' in both and len(both)>=3
    for o in both:
        (s,t),(s2,t2) = content(a/'kept'/o),content(b/'kept'/o)
        assert s==s2 and t.keys()==t2.keys() and all(torch.equal(t[k], t2[k]) for k in t), o

def test_the_training_learns(data, scored):
    "Else equal weights would say little: every epoch other weights, and neither the first nor the last the best"
    out,_ = scored
    h = history(out/'run')
    assert len(h)==4 and len({r['valid_loss'] for r in h})==4 and float(h[-1]['train_loss'])<.98*float(h[0]['train_loss'])
    dice = [float(r['scan_dice']) for r in h]
    assert dice.index(max(dice))==2
    kept = [read_checkpoint(out/'kept'/f'{o}.safetensors')[1] for o in ('0-1','1-1','1-2','1-3')]
    w,mean = ([o[f'{k}.encoder.layer2.0.conv1.0.weight'] for o in kept] for k in ('model','ema'))
    start = load_file(data[1])['layer2.0.conv1.0.weight']
    assert torch.equal(w[0], start) and not torch.equal(w[1], start) and not torch.equal(w[2], w[1]) and not torch.equal(mean[2], w[2]) and torch.equal(w[3], mean[2])

@pytest.mark.fault('X5')
@pytest.mark.promise('lost')
def test_killed_at_random(data, worker, scored, tmp_path):
    "A training killed twenty times at random moments, every third while it writes a checkpoint, ends bit-equal to one without a break"
    (ref,secs),kills,writing,resumed = scored,0,0,0
    while kills<20:
        out = tmp_path/f'{kills}'
        for i in range(100):
            how = dict(writing=rng.randint(1,3)) if i%3==1 else dict(after=rng.uniform(0, .4*secs)) if kills<20 else {}
            res = worker(words(data, out/'run', *(['--resume'] if i else [])), keep=str(out/'kept'), score=True, **how)
            assert res['status'] in (0,-signal.SIGKILL), res
            assert 'Traceback' not in res['err']
            resumed += 'are done' in res['out']
            if res['status']==0: break
            kills += 1; writing += 'writing' in how
        assert not list((out/'run').glob('.*')), 'what was half written is removed'
        require_equal(ref, out)
    print(f'{kills} kills, {writing} of them while writing, {resumed} times resumed')
    assert writing>1 and resumed>5

@pytest.mark.fault('X13')
@pytest.mark.promise('lost')
def test_sigterm_loses_no_step(data, worker, scored, tmp_path):
    "SIGTERM ends a training within a step or a scan with a checkpoint and status 143, and the resumed training ends bit-equal"
    ref,secs = scored
    for i in range(8):
        how = dict(term=True) if i==0 else dict(after=rng.uniform(.15, .5)*secs, signal='SIGTERM') if i<7 else {}  # the first in the middle of an epoch, six at random
        res = worker(words(data, tmp_path/'run', *(['--resume'] if i else [])), keep=str(tmp_path/'kept'), score=True, **how)
        assert res['status'] in (0,143,-signal.SIGTERM) and 'Traceback' not in res['err'], res
        if i==0: assert res['status']==143 and read_checkpoint(tmp_path/'run'/'checkpoint.safetensors')[0]['within']['step']==3, res
        if res['status']==0: break
    assert res['status']==0 and not list((tmp_path/'run').glob('.*'))
    assert (ref/'run'/'model.safetensors').read_bytes()==(tmp_path/'run'/'model.safetensors').read_bytes()
    assert history(ref/'run')==history(tmp_path/'run')

def test_real_command(data, straight, tmp_path):
    "The command itself, killed when it has written a checkpoint"
    cmd = [Path(sys.executable).parent/'covid3d',*words(data, tmp_path/'run')]
    env = os.environ|dict(OMP_NUM_THREADS='1')
    with subprocess.Popen(cmd, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=env, text=True) as p:
        while 'epoch 1 ' not in p.stdout.readline(): assert p.poll() is None
        p.kill()
    res = subprocess.run([*cmd,'--resume'], capture_output=True, text=True, env=env)
    assert res.returncode==0, res.stderr
    assert 'of its epochs are done' in res.stdout and 1<=res.stdout.count('train_loss')<=2
    assert (tmp_path/'run'/'model.safetensors').read_bytes()==(straight[0]/'run'/'model.safetensors').read_bytes()
    assert history(tmp_path/'run')==history(straight[0]/'run')

def test_full_disk_elsewhere(data, worker, scored, tmp_path):
    "No room for the weights, which are written before the checkpoint: the message says how to go on too"
    res = worker(words(data, tmp_path/'run', '--patches', '4'), score=True, room=2, limit=int(.5*(scored[0]/'run'/'model.safetensors').stat().st_size))
    assert res['status']==2 and res['err'].count('\n')==1 and 'model.safetensors: cannot be written' in res['err'] and '--resume' in res['err'], res
    assert [read_checkpoint(tmp_path/'run'/'checkpoint.safetensors')[0][k] for k in ('phase','epoch')]==[1,1] and not list((tmp_path/'run').glob('.*'))

@pytest.mark.fault('X6')
@pytest.mark.promise('lost')
def test_full_disk(data, worker, straight, tmp_path):
    "On a full disk the last checkpoint stays, one line says so, and the training resumes when there is room"
    out = tmp_path
    res = worker(words(data, out/'run'), keep=str(out/'kept'), limit=int(1.5*(straight[0]/'run'/'model.safetensors').stat().st_size))
    assert res['status']==2 and res['err'].count('\n')==1 and 'cannot be written' in res['err'] and '--resume' in res['err'], res
    assert read_checkpoint(out/'run'/'checkpoint.safetensors')[0]['epoch']==1 and not list((out/'run').glob('.*'))
    assert worker(words(data, out/'run', '--resume'), keep=str(out/'kept'))['status']==0
    require_equal(straight[0], out)

def refused(worker, argv, *said):
    res = worker(argv)
    assert res['status']==2 and res['err'].count('\n')==1 and all(o in res['err'] for o in said), res

@pytest.fixture(scope='module')
def broken(data, worker, tmp_path_factory):
    "A run that was killed while it wrote its third checkpoint"
    out = tmp_path_factory.mktemp('broken')/'run'
    assert worker(words(data, out), writing=3)['status']==-signal.SIGKILL
    return out

@pytest.mark.parametrize('more,said', [(['--lr','2e-3'], 'lr 0.1 then, 0.002 now'), (['--seed','1'], 'seed 0 then, 1 now'), (['--epochs','4'], 'epochs 3 then, 4 now'), (['--bs','3'], 'bs 2 then'),
    (['--patch','16,32,48'], 'spec patch [16, 32, 32] then'), (['--augment','none'], 'augment full then'), (['--frozen-epochs','2'], 'frozen_epochs 1 then'), (['--decoder','32,16,8'], 'net decoder')])
def test_other_arguments(data, worker, broken, more, said): refused(worker, words(data, broken, '--resume', *more), 'of another training', said)

def test_another_table(data, worker, broken, tmp_path):
    "A table that leaves a case out, and one with other scans of the same names"
    lines = data[0].read_text().splitlines()
    less = data[0].with_name('less.csv'); less.write_text('\n'.join(lines[:1]+lines[2:]))
    refused(worker, ['train',less,*words(data, broken, '--resume')[2:]], 'of another training', 'train ', 'absent now')
    other = write_coarse(tmp_path, n=5, seed=6)
    refused(worker, ['train',other,*words(data, broken, '--resume')[2:]], 'of another training', 'train phantom_000')

@pytest.mark.parametrize('harm', [lambda b: b[:-100], lambda b: b[:-1]+bytes([b[-1]^1]), lambda b: b''], ids=['cut','flipped','empty'])
def test_damaged(data, worker, broken, tmp_path, harm):
    shutil.copytree(broken, tmp_path/'run')
    ck = tmp_path/'run'/'checkpoint.safetensors'
    ck.write_bytes(harm(ck.read_bytes()))
    refused(worker, words(data, tmp_path/'run', '--resume'), 'damaged', str(ck))

def test_what_is_there_already(data, worker, broken, straight, tmp_path):
    "Without --resume a run is not touched; a model without a checkpoint is no run to go on with; a finished run says so; nothing there is a beginning"
    refused(worker, words(data, broken), 'exists already', '--resume')
    (tmp_path/'run').mkdir(); (tmp_path/'run'/'model.safetensors').write_bytes(b'dear')
    refused(worker, words(data, tmp_path/'run', '--resume'), 'was not written by covid3d')
    refused(worker, words(data, broken, '--resume', '--overwrite'), 'contradicts')
    before = (straight[0]/'run'/'model.safetensors').read_bytes()
    res = worker(words(data, straight[0]/'run', '--resume'))
    assert res['status']==0 and 'it had finished' in res['out'] and (straight[0]/'run'/'model.safetensors').read_bytes()==before
    assert 'begins anew' in worker(words(data, tmp_path/'new', '--resume'), writing=2)['out']

def at_the_end(s):
    "Make a state say that all epochs are done, with tables to match, though no weights were kept"
    rows,r = s['callbacks']['history']['rows'],s['recorder']
    rows += [[i,*rows[0][1:]] for i in range(len(rows), 4)]
    r.update(iters=[r['count']]*3, values=r['values'][:1]*3)
    s['callbacks']['keep_best'].update(best=-math.inf, best_epoch=None)
    s.update(phase=1, epoch=3)

@pytest.mark.promise('silent')
@pytest.mark.parametrize('forge,gone,said', [(at_the_end, True, 'no weights were kept'), (at_the_end, False, 'no weights were kept'), (lambda s: s.update(epoch=3, phase=1), False, 'does not fit'), (lambda s: s.update(phase=7), False, 'does not fit'),
    (lambda s: None, True, 'no such file')], ids=['end','end_with_file','epoch','phase','gone'])
def test_no_file_is_reported_that_was_not_written(data, worker, broken, tmp_path, forge, gone, said):
    "A forged checkpoint does not make a training end with success and name weights that were never kept"
    shutil.copytree(broken, tmp_path/'run')
    ck = tmp_path/'run'/'checkpoint.safetensors'
    state,tensors = read_checkpoint(ck)
    forge(state); write_checkpoint(ck, state, tensors)
    if gone: (tmp_path/'run'/'model.safetensors').unlink()
    refused(worker, words(data, tmp_path/'run', '--resume'), said)
    assert not read_checkpoint(ck)[0]['finished'] and (tmp_path/'run'/'model.safetensors').exists()!=gone

@pytest.mark.promise('silent')
def test_a_training_is_not_finished_because_its_checkpoint_says_so(data, worker, broken, tmp_path):
    "A checkpoint that says the training had finished, after one epoch of four, is refused"
    shutil.copytree(broken, tmp_path/'run')
    ck = tmp_path/'run'/'checkpoint.safetensors'
    state,_ = read_checkpoint(ck)
    for k in ('opt','hypers','scaler','recorder','random'): del state[k]
    write_checkpoint(ck, state|dict(finished=True, phase=0, epoch=0), {})
    refused(worker, words(data, tmp_path/'run', '--resume'), 'callback history does not fit')

def test_nan(data, worker, tmp_path):
    "The loss is NaN: one line with step and cases; no checkpoint with NaN"
    res = worker(words(data, tmp_path/'run', '--lr', '1e25'))
    assert res['status']==2 and res['err'].count('\n')==1 and 'at step' in res['err'] and 'phantom_00' in res['err'] and 'lower lr' in res['err'], res
    _,t = read_checkpoint(tmp_path/'run'/'checkpoint.safetensors')
    assert all(torch.isfinite(v).all() for v in t.values())

def test_nan_resumed(data, worker, tmp_path):
    "Step and epoch are those of the whole training, straight and resumed"
    straight,resumed = (worker(words(data, tmp_path/'run', '--patches', '4', *more), nan=True) for more in ([], ['--resume']))
    assert straight['status']==resumed['status']==2 and 'phase 2, 1 of its epochs are done' in resumed['out']
    assert straight['err']==resumed['err'] and 'at step 15, batch 3 of epoch 2 ' in straight['err'] and '--overwrite' in straight['err'], straight
    assert len(history(tmp_path/'run'))==2

def test_worker_processes(data, worker, tmp_path):
    "Patches drawn by two processes, other ones than without, are the same after a kill"
    def run(name, n, *more, **how): return worker(words(data, tmp_path/name, '--patches', '4', '--frozen-epochs', '0', '--epochs', '2', '--score-every', '2', '--workers', n, *more), **how)['status']
    assert run('straight', 2)==0 and run('killed', 2, writing=3)==run('none', 0, writing=2)==-signal.SIGKILL and run('killed', 2, '--resume')==0
    straight,killed,none = (history(tmp_path/o) for o in ('straight','killed','none'))
    assert len(straight)==2 and killed==straight and none[0]!=straight[0]
    assert (tmp_path/'killed'/'model.safetensors').read_bytes()==(tmp_path/'straight'/'model.safetensors').read_bytes()

def test_weights_by_content(data, worker, broken, tmp_path):
    "The file of weights may lie elsewhere or be named by another path; another file of its name is refused"
    shutil.copytree(broken, tmp_path/'run'); shutil.copy(data[1], tmp_path/'moved.safetensors')
    def resume(weights): return ['train',data[0],'--init',weights,'--out',tmp_path/'run',*small,'--resume']
    assert 'of its epochs are done' in worker(resume(os.path.relpath(tmp_path/'moved.safetensors')), writing=2)['out']
    save_file({k:v+1e-3 for k,v in load_file(data[1]).items()}, tmp_path/'moved.safetensors')
    refused(worker, resume(tmp_path/'moved.safetensors'), 'of another training', 'init file ')

def test_workers_are_named(data, worker, broken):
    "The number of processes that draw decides what is drawn"
    refused(worker, words(data, broken, '--resume', '--workers', '2'), 'of another training', 'workers 0 then, 2 now')

class Samples:
    def __len__(self): return 9
    def __getitem__(self, i): return torch.full((2,), float(i)), torch.zeros(1)

def small_fit(path, *cbs, workers=0):
    "A learner after two epochs of 4 steps, under a checkpoint"
    dls = DataLoaders(*[DataLoader(Samples(), bs=2, drop_last=True, num_workers=workers) for _ in range(2)], device=torch.device('cpu'))
    learn = Learner(dls, torch.nn.Linear(2, 1), loss_func=torch.nn.MSELoss())
    ck = Checkpoint(path/'checkpoint.safetensors', {}, 2, 8, learn.model)
    ck.begin()
    with learn.no_bar(), learn.no_logging(): ck.fit(learn, 2, .01, cbs=cbs)
    return learn

class Gone:
    def __del__(self):
        signal.raise_signal(signal.SIGINT)
        sum(range(10))  # Python calls the handler here, and drops what it raises

class LoseCtrlC(Callback):
    steps = 0
    def after_batch(self):
        self.steps += self.training
        if self.steps==2: Gone()

@pytest.mark.filterwarnings('ignore::pytest.PytestUnraisableExceptionWarning')
@pytest.mark.promise('lost')
def test_ctrl_c_is_not_swallowed(tmp_path):
    "Ctrl-C ends a training even where Python drops the exception, as in the destructor that waits for worker processes"
    was = signal.signal(signal.SIGINT, signal.default_int_handler)  # a test in the background may ignore it
    try:
        with pytest.raises(KeyboardInterrupt): small_fit(tmp_path, lose := LoseCtrlC())
        assert lose.steps==2 and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally: signal.signal(signal.SIGINT, was)

class TermWorkers(Callback):
    told = 0
    def before_batch(self):
        if self.training and self.iter>1:  # each has given a batch, so each has begun
            for p in active_children(): p.terminate(); self.told += 1

@pytest.mark.promise('lost')
def test_sigterm_to_the_workers_too(tmp_path):
    "A cluster that sends SIGTERM to every process does not take the worker processes from a training that is writing its checkpoint"
    learn = small_fit(tmp_path, term := TermWorkers(), workers=2)
    assert term.told and len(learn.recorder.losses)==8
