"Weights, encoders and checkpoints from anybody: rows K1 to K7, K10 to K12 and K14. Nothing is executed, nothing is written, no memory is taken for what does not fit"
import io, json, math, os, pickle, struct, subprocess, sys, zipfile
from contextlib import redirect_stdout
from dataclasses import asdict, replace

import numpy as np, pytest, torch
from fastai.callback.core import Callback
from fastai.callback.schedule import *
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.learner import Learner
from safetensors import safe_open
from safetensors.torch import load_file, save, save_file
from torch import nn

import covid3d.encoder, covid3d.inference, covid3d.weights
from covid3d.checkpoint import Checkpoint, read_checkpoint, write_checkpoint
from covid3d.cli import _one_line as one_line, main
from covid3d.encoder import encoder3d, encoder_info, read_weights
from covid3d.files import locked
from covid3d.inference import Segmenter
from covid3d.weights import NetSpec, Seen, load_model, read_seen, save_model
from covid3d.learner import History, KeepBest, EMA
from covid3d.transforms import CTSpec
from covid3d.volume import CTError, save_volume
from coarse import cached

each = pytest.mark.parametrize
spec,net = CTSpec(spacing=(9,5,5), patch=(16,48,48)),NetSpec(width=4)

@pytest.fixture(scope='module')
def good(tmp_path_factory):
    "A file of weights"
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp('good')/'model.safetensors'
    save_model(net.build(spec.classes), path, spec, net, Seen(2, 31.5, .02, ('0'*32,)))
    return path

def forged(good, path, state=None, **about):
    "A copy with another specification or other tensors, and a digest that fits"
    with safe_open(good, 'pt') as f: text = f.metadata()['covid3d']
    state,about = load_file(good) if state is None else state,{k:v for k,v in json.loads(text).items() if k!='digest'}|about
    path.write_bytes(save(state, dict(covid3d=json.dumps(about|dict(digest=covid3d.weights._digest(about, state))))))
    return path

def refused(f, *words):
    "`f` ends in one line with these words"
    with pytest.raises(CTError) as e: f()
    line = one_line(e.value)
    assert '\n' not in line and len(line)<1000 and all(w in line for w in words), line

class Payload:
    "Pickled, it writes a file when it is read"
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), 'w')

def poisoned(tmp_path, kind, suffix):
    "A file that would write `ran`"
    path,o = tmp_path/f'weights{suffix}',{'stem.0.weight':Payload(tmp_path/'ran')}
    if kind=='pickle': path.write_bytes(pickle.dumps(o))
    else: torch.save(o, path, _use_new_zipfile_serialization=kind=='zip')
    return path

# Nothing is executed

@pytest.mark.fault('K1','K3','K4')
@pytest.mark.promise('executed')
@each('kind', ['pickle','zip','legacy'])
@each('suffix', ['.pth','.pkl','.safetensors'])
def test_K1_K3_K4_a_pickle_never_runs(tmp_path, kind, suffix, capfd):
    "A pickle given as weights, as an encoder, or as a checkpoint is refused before anything in it runs"
    path = poisoned(tmp_path, kind, suffix)
    for f in (load_model, Segmenter.load, read_seen, read_checkpoint, read_weights, lambda p: encoder3d('r3d_18', p)): refused(lambda: f(path))
    scan = tmp_path/'ct.nii.gz'; save_volume(cached(0, (32,48,48), (9,7,7)).ct, scan)
    assert main(['predict',str(scan),'--weights',str(path),'--out',str(tmp_path/'out'),'--device','cpu'])==2
    assert not (tmp_path/'ran').exists()

@pytest.mark.fault('K2','K3')
@pytest.mark.promise('executed')
def test_K2_K3_weights_only_and_no_second_try(tmp_path, monkeypatch):
    "PyTorch reads a file of weights with weights_only; when that fails there is no other way in"
    from importlib.metadata import requires
    floor = next(o for o in requires('covid3d') if o.split('>')[0].strip()=='torch')
    assert tuple(map(int, floor.split('>=')[1].split(',')[0].split('.')))>=(2,10)
    torch.save({'a':torch.zeros(2)}, tmp_path/'w.pth')
    calls = []
    def load(*args, **kwargs): calls.append(kwargs); raise pickle.UnpicklingError('Weights only load failed. Unsupported')
    monkeypatch.setattr(torch, 'load', load); monkeypatch.setattr(pickle, 'load', lambda *_: 1/0); monkeypatch.setattr(pickle, 'loads', lambda *_: 1/0)
    refused(lambda: read_weights(tmp_path/'w.pth'), 'w.pth')
    assert [c['weights_only'] for c in calls]==[True]

@pytest.mark.fault('K4')
@pytest.mark.promise('executed')
def test_K4_an_exported_learner_is_refused(tmp_path):
    "A learner that fastai exported is never opened"
    torch.save(Learner(DataLoaders(), nn.Linear(2, 1), loss_func=nn.MSELoss()), tmp_path/'learner.pkl')  # as `Learner.export` does
    refused(lambda: load_model(tmp_path/'learner.pkl'), 'never opened'); refused(lambda: encoder3d('r3d_18', tmp_path/'learner.pkl'), 'never run')

@pytest.mark.fault('K10')
@pytest.mark.promise('executed')
@each('change', [dict(net=dict(encoder='os.system')), dict(net=dict(_target_='os.system')), dict(net=dict(norm='__import__')), dict(ct=dict(classes=['../../x'])), dict(ct=dict(classes=['__class__'])),
    dict(ct=dict(classes=['lésion'])), dict(ct=dict(classes={'lesion':1})), dict(ct=dict(spacing='123')), dict(_target_='os.system'), dict(seen=dict(scans=['/etc/passwd']))], ids=str)
def test_K10_a_specification_is_plain_data(good, tmp_path, change):
    "A specification that names code, a path or a field of its own is refused"
    with safe_open(good, 'pt') as f: about = json.loads(f.metadata()['covid3d'])
    refused(lambda: load_model(forged(good, tmp_path/'m.safetensors', **{k:about[k]|v if isinstance(v, dict) else v for k,v in change.items()})), 'm.safetensors', 'specification')

# Nothing is silent

@pytest.mark.fault('K5')
@each('harm', [lambda b: b[:-20], lambda b: b[:len(b)//2], lambda b: b'', lambda b: b[:4], lambda b: bytes(len(b)), lambda b: b'<html>not found</html>', lambda b: b+b'x'],
    ids=['end','half','empty','length','zeros','html','longer'])
def test_K5_cut_short(good, tmp_path, harm):
    "Weights, encoders and checkpoints that are cut short, empty or something else are refused"
    (tmp_path/'m.safetensors').write_bytes(harm(good.read_bytes()))
    for f in (load_model, read_weights, read_checkpoint): refused(lambda: f(tmp_path/'m.safetensors'), 'm.safetensors', 'damaged')

@pytest.mark.fault('K5')
@pytest.mark.promise('lost')
def test_K5_the_last_checkpoint_stays(tmp_path, monkeypatch):
    "When a checkpoint cannot be written, the last one is intact, and the message says so"
    path = tmp_path/'checkpoint.safetensors'
    write_checkpoint(path, dict(a=1), dict(w=torch.zeros(3)))
    before = path.read_bytes()
    def full(*_, **__): raise OSError(28, 'No space left on device')
    monkeypatch.setattr('covid3d.errors.os.fsync', full)
    refused(lambda: write_checkpoint(path, dict(a=2), {}), 'the last one is intact')
    assert path.read_bytes()==before and [o.name for o in tmp_path.iterdir()]==[path.name]

@pytest.mark.promise('silent')
def test_one_flipped_bit_is_noticed(good, tmp_path):
    "A single flipped bit anywhere in a file of weights is noticed"
    raw = good.read_bytes()
    for at in np.random.default_rng(0).integers(8, len(raw), 60):
        (tmp_path/'m.safetensors').write_bytes(raw[:at]+bytes([raw[at]^(1<<int(at)%8)])+raw[at+1:])
        refused(lambda: load_model(tmp_path/'m.safetensors'), 'm.safetensors')

def states(good):
    w = load_file(good); k = next(k for k in w if w[k].ndim>1)
    return dict(missing={n:v for n,v in w.items() if n!=k}, more=w|{'extra':torch.zeros(1)}, renamed={n.replace('layer1','layer9'):v for n,v in w.items()},
        shape=w|{k:w[k][:1].clone()}, double={n:v.double() if v.is_floating_point() else v for n,v in w.items()}, whole=w|{k:w[k].long()})

@pytest.mark.fault('K6')
@pytest.mark.promise('silent')
@each('kind', ['missing','more','renamed','shape','double','whole'])
def test_K6_weights_of_another_network(good, tmp_path, kind):
    "Tensors of another name, shape or type are refused, not cast or left out"
    refused(lambda: load_model(forged(good, tmp_path/'m.safetensors', states(good)[kind])), 'weights of another network')

@pytest.mark.fault('K6')
@each('classes', [['lesion','lung'], ['lesion','a','b']])
def test_K6_another_number_of_classes(good, tmp_path, classes):
    refused(lambda: load_model(forged(good, tmp_path/'m.safetensors', ct=json.loads(json.dumps(asdict(spec)))|dict(classes=classes))), 'head.logits', 'weights of another network')

def raw_file(header, data=b''):
    header = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack('<Q', len(header))+header+data

one = dict(dtype='F32', shape=[1], data_offsets=[0,4])
@pytest.mark.fault('K7')
@each('raw', [struct.pack('<Q', 2**63)+b'{}', struct.pack('<Q', 10**9)+b'{}', raw_file(b' '*5_000_000, b'x'*10), raw_file(dict(a=one, b=one), b'0000'),
    raw_file(b'{"a":%b,"a":%b}'%((json.dumps(one).encode(),)*2), b'0000'), raw_file(dict(a=one|dict(shape=[2**40])), b'0000'), raw_file(dict(a=one|dict(shape=[2**62,4])), b'0000'),
    raw_file(dict(a=one|dict(data_offsets=[0,2**40])), b'0000'), raw_file(dict(a=one|dict(dtype='F4096')), b'0000'), raw_file(b'['*100_000), raw_file(b'\xff\xfe{}')],
    ids=['length','longer','large','overlap','twice','shape','overflow','offset','type','deep','text'])
def test_K7_hostile_headers(tmp_path, raw):
    "A safetensors header that lies is refused"
    (tmp_path/'m.safetensors').write_bytes(raw)
    readers = [load_model, read_seen, read_checkpoint, lambda p: encoder3d('r3d_18', p)]
    if raw.count(b'"a"')<2: readers.append(read_weights)  # a name that is there twice is a tensor to it, and no encoder's
    for f in readers: refused(lambda: f(tmp_path/'m.safetensors'), 'm.safetensors')

@pytest.mark.fault('K11')
@pytest.mark.promise('silent')
@each('other', [replace(spec, spacing=(9,5,6)), replace(spec, window=(-1000,500)), replace(spec, classes=('lung',)), replace(spec, patch=(16,48,64))], ids=str)
def test_K11_networks_of_different_preparation_are_not_averaged(good, tmp_path, other):
    "Networks trained for another spacing, window, patch or class are not averaged"
    save_model(net.build(other.classes), tmp_path/'m.safetensors', other, net)
    refused(lambda: Segmenter.load([good, tmp_path/'m.safetensors']), 'was trained with another spacing, window, patch or classes')

@pytest.mark.fault('K11')
@pytest.mark.promise('silent')
@each('change,said', [(dict(format=2), 'newer format'), (dict(format=None), 'no known format'), (dict(surprise=1), 'unknown field'), (dict(ct={}), 'lacks'), (dict(net=None), 'missing')])
def test_K11_a_newer_or_unknown_description_is_refused(good, tmp_path, change, said):
    "Weights of a newer format, or with a field that is not known, are refused and not half understood"
    for f in (load_model, read_seen): refused(lambda: f(forged(good, tmp_path/'m.safetensors', **change)), said)

@pytest.mark.fault('K12')
@pytest.mark.promise('silent')
@each('value', [math.nan, math.inf, -math.inf])
def test_K12_weights_that_are_not_finite(good, tmp_path, value):
    "Weights that hold NaN or infinity are refused and named"
    w = load_file(good); k = next(k for k in w if w[k].ndim>1); w[k][0] = value
    refused(lambda: load_model(forged(good, tmp_path/'m.safetensors', w)), k, 'NaN or infinite')

class Broken(nn.Module):
    def __init__(self, value): super().__init__(); self.value = nn.Parameter(torch.tensor(value))
    def forward(self, x): return x*0+self.value

@pytest.mark.fault('K12')
@pytest.mark.promise('silent')
@each('value', [math.nan, math.inf])
def test_K12_an_answer_that_is_not_finite_names_the_scan(tmp_path, value):
    "An answer that is NaN or infinite is an error that names the scan, not an empty mask"
    from covid3d.volume import open_ct
    save_volume(cached(0, (32,48,48), (9,7,7)).ct, tmp_path/'ct.nii.gz')
    refused(lambda: Segmenter(Broken(value), spec)(open_ct(tmp_path/'ct.nii.gz')), 'ct.nii.gz', 'NaN or infinite')

@pytest.mark.fault('K14')
def test_K14_what_is_saved_is_what_is_read(tmp_path):
    "Weights, specifications and what the training held come back bit for bit"
    two,full = replace(spec, classes=('lesion','lung')),NetSpec('r2plus1d_18', 4, (16,8,4), False, True, 'instance', 'shuffle', 'instance', True)
    torch.manual_seed(1)
    seen,model = Seen(3, 12.25, .125, ('a'*32,'b'*32)),full.build(two.classes)
    save_model(model, tmp_path/'m.safetensors', two, full, seen)
    again,ct,n = load_model(tmp_path/'m.safetensors')
    assert (ct,n,read_seen(tmp_path/'m.safetensors'))==(two,full,seen) and encoder_info(tmp_path/'m.safetensors')['norm']=='instance'
    assert all(torch.equal(v, again.state_dict()[k]) for k,v in model.state_dict().items()) and not again.training
    save_model(again, tmp_path/'n.safetensors', ct, n, seen)
    assert (tmp_path/'m.safetensors').read_bytes()==(tmp_path/'n.safetensors').read_bytes()
    assert set(Segmenter.load([tmp_path/'m.safetensors']*2)(cached(0, (32,48,48), (9,7,7)).ct).masks)=={'lesion','lung'}

# No memory, no hanging

def cost(code, *args):
    "Megabytes by which the peak memory of a process grows, and its seconds of CPU, for some lines of Python"
    lines = f'''
import json, resource, sys, time, torch
from pathlib import Path
from covid3d.weights import load_model
from covid3d.encoder import encoder3d, read_weights
from covid3d.checkpoint import read_checkpoint
from covid3d.volume import CTError
torch.set_num_threads(1)
good,root = map(Path, sys.argv[1:3])
load_model(good)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1024
def told(f):
    try: f()
    except CTError: return
    raise AssertionError('not refused')
before,start = peak(),time.process_time()
{code}
print(json.dumps([peak()-before, time.process_time()-start]))
'''
    return json.loads(subprocess.run([sys.executable,'-c',lines,*map(str, args)], capture_output=True, text=True, check=True).stdout)

@pytest.mark.promise('executed')
def test_a_hostile_specification_takes_no_memory(good, tmp_path):
    "A network of a width of a million or a patch of 100,000 voxels is refused for less than 200 MB and within seconds"
    ct,n = json.loads(json.dumps(asdict(spec))),json.loads(json.dumps(asdict(net)))
    odd = [dict(net=n|dict(width=w)) for w in (10**6,512,-1,4.5,10**400)]+[dict(net=n|dict(decoder=d)) for d in ([10**9]*3,[4]*10**5,[2048]*3)]+[dict(ct=ct|dict(patch=[p]*3)) for p in (10**5,10**18,1024)]
    odd += [dict(ct=ct|dict(spacing=[1e-300]*3)), dict(ct=ct|dict(classes=[f'c{i}' for i in range(10**5)]))]
    for i,o in enumerate(odd): forged(good, tmp_path/f'{i}.safetensors', **o)
    mb,secs = cost("for p in root.glob('*.safetensors'): told(lambda: load_model(p))", good, tmp_path)
    assert mb<200 and secs<2*len(odd), (mb,secs)

@pytest.mark.promise('executed')
def test_an_encoder_that_unpacks_to_gigabytes_is_refused_first(good, tmp_path):
    "A small .pth that would unpack to gigabytes, or claims tensors larger than itself, takes no memory"
    torch.save({'stem.0.weight':torch.zeros(10)}, tmp_path/'plain.pth')
    with zipfile.ZipFile(tmp_path/'plain.pth') as z, zipfile.ZipFile(tmp_path/'bomb.pth', 'w', zipfile.ZIP_DEFLATED) as out:
        for i in z.infolist(): out.writestr(i.filename, bytes(2**29) if i.filename.endswith('/data/0') else z.read(i))
    torch.save({'layer1.0.conv1.0.weight':torch.zeros(1).expand(10**4,10**5,3,3,3)}, tmp_path/'wide.pth')
    torch.save({'stem.0.weight':torch.zeros(1).expand(10**9)}, tmp_path/'claims.pth')
    (tmp_path/'plain.pth').unlink()
    assert all(p.stat().st_size<2**20 for p in tmp_path.iterdir())
    mb,secs = cost("for p in root.glob('*.pth'): told(lambda: encoder3d('r3d_18', p))", good, tmp_path)
    assert mb<200 and secs<20, (mb,secs)

@pytest.mark.promise('executed')
@each('name', ['builtins bytearray','torch Tensor','torch.nn.parameter Parameter','_codecs encode'])
def test_names_that_weights_only_allows_are_not_needed(tmp_path, name):
    "Of the names that PyTorch allows in weights, only those that a state dict needs may occur"
    path = tmp_path/'w.pth'
    with zipfile.ZipFile(path, 'w') as z: z.writestr('w/data.pkl', f'c{name.replace(" ", chr(10))}\n.'.encode()); z.writestr('w/version', '3\n')
    refused(lambda: read_weights(path), 'never run')

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='no pipes with a name on this system')
def test_a_pipe_is_no_file(good, tmp_path):
    "A pipe in the place of a file is refused and not waited for"
    for o in ('folds.json','m.safetensors','checkpoint.safetensors','w.pth'): os.mkfifo(tmp_path/o)
    refused(lambda: Segmenter.load(tmp_path), 'folds.json', 'regular file')
    for f,o in ((load_model,'m.safetensors'), (read_seen,'m.safetensors'), (read_checkpoint,'checkpoint.safetensors'), (read_weights,'w.pth'), (read_weights,'m.safetensors')): refused(lambda: f(tmp_path/o), o)

@each('text', ['{"k":"2"}','{"k":1e9}','{"k":1000000000}','[2]','{}','nonsense','{"k":NaN}','['*10**5])
def test_malformed_folds(tmp_path, text):
    (tmp_path/'folds.json').write_text(text)
    refused(lambda: Segmenter.load(tmp_path), 'folds.json')

def test_a_scan_too_large_is_named(monkeypatch):
    "A scan for which memory does not suffice is named, whether the computer or a bound says so"
    ct = cached(0, (32,48,48), (9,7,7)).ct
    wide = replace(ct, affine=ct.affine@np.diag([1,3,3,1]))
    refused(lambda: Segmenter(Broken(0.), replace(spec, spacing=(.6,.6,.6)))(wide), '0.6×0.6×0.6 mm would make 480×1680×1680 voxels')
    refused(lambda: Segmenter(Broken(0.), replace(spec, spacing=(1,1,1), patch=(4,4,4)), overlap=.9)(ct), 'windows would have to be computed')

# Checkpoints

class Data:
    def __len__(self): return 6
    def __getitem__(self, i): return torch.full((2,), float(i)), torch.zeros(1)

class Stop(Callback):
    order = 110
    def after_epoch(self): raise KeyboardInterrupt

def run(folder, resume=False, *more):
    "A training of two epochs with all that `train` keeps of callbacks"
    torch.manual_seed(0)
    dls = DataLoaders(*[DataLoader(Data(), bs=2) for _ in range(2)], device=torch.device('cpu'))
    learn = Learner(dls, nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3), nn.Linear(3, 1)), loss_func=nn.MSELoss())
    keep = KeepBest(folder/'model.safetensors', last=True)
    keep.after_epoch = keep.after_fit = keep.before_train = lambda: None
    ck,cbs = Checkpoint(folder/'checkpoint.safetensors', dict(lr=.1), 2, 6, learn.model),[History(folder/'history.csv'), EMA(.9), keep, *more]
    with redirect_stdout(io.StringIO()): finished = ck.begin(resume)
    if finished: ck.restore(learn, cbs); return learn
    with learn.no_bar(), learn.no_logging(): ck.fit(learn, 2, .01, cbs=cbs)
    ck.finish(cbs)
    return learn

@pytest.fixture
def stopped(tmp_path):
    "The folder of a training that was stopped after its first epoch"
    (tmp_path/'run').mkdir()
    with pytest.raises(KeyboardInterrupt): run(tmp_path/'run', False, Stop())
    return tmp_path/'run'

def put(o, path, value):
    "Set what is at 'a.0.b' within `o`"
    *way,last = path.split('.')
    for k in way: o = o[int(k) if isinstance(o, list) else k]
    o[int(last) if isinstance(o, list) else last] = value

def test_a_good_checkpoint_resumes(stopped, tmp_path):
    (tmp_path/'whole').mkdir()
    a,b = run(stopped, True),run(tmp_path/'whole')
    assert all(torch.equal(v, b.model.state_dict()[k]) for k,v in a.model.state_dict().items())

@pytest.mark.promise('executed')
def test_a_checkpoint_cannot_choose_where_to_write(stopped, tmp_path):
    "A checkpoint restores only the declared attributes of callbacks: it cannot choose the file that is written"
    path,victim = stopped/'checkpoint.safetensors',tmp_path/'victim'
    victim.write_text('dear')
    state,tensors = read_checkpoint(path)
    for kept in (dict(file=str(victim)), dict(file=str(victim), rows=[]), dict(rows=state['callbacks']['history']['rows'], file=str(victim))):
        state['callbacks']['history'] = kept
        write_checkpoint(path, state, tensors)
        refused(lambda: run(stopped, True), 'checkpoint.safetensors', 'is not a checkpoint of this training', 'history')
    assert victim.read_text()=='dear'

odd_numbers = ['x', {}, [1], None, True]
misfits = [(k,v) for k,vs in {'callbacks':['x', [], None, 1], 'callbacks.history':['x', [], {}, None], 'callbacks.history.rows':['x', {}, 1, None, [['/etc/passwd']], [{'a b':1}], [[1],[1,2]], [[[1]]]],
    'callbacks.history.learn':[1], 'callbacks.history.__class__':['x'], 'callbacks.keep_best.best':['x', None, [], {}, True], 'callbacks.keep_best.best_epoch':['x', []], 'callbacks.keep_best.file':['/tmp/x'],
    'callbacks.ema.n':['x', -1, 1.5, None, 10**40], 'phase':[-1, 10**30, *odd_numbers], 'epoch':[-1, 3, 10**30, *odd_numbers], 'threads':[0, -1, 10**6, *odd_numbers], 'finished':[1, 'x', None],
    'made_by':[1, 'x\x1b[31m', 'y\nz', 'x'*10**4], 'about':[1, [], None, {}, {'lr':'x'*10**6}], 'hypers':['x', [], [{}]], 'hypers.0.lr':['x', None, []], 'hypers.0.surprise':[1], 'opt':['x', [], [{}]*99],
    'opt.0':['x', None], 'opt.0.step':['x', [], {}], 'opt.0.a.b':[1], 'opt.0.__class__':[1], 'recorder':['x', {}, None], 'recorder.losses':['x', [None], [[1]], ['1']], 'recorder.lrs':[{}], 'recorder.values':[1, [['/x/y']]],
    'recorder.count':['x', -1, 1.5], 'recorder.smooth':['x', None], 'random':['x', [], [{}], [1], {}], 'random.0.torch':['x', 'zz'*5056, 1, '00'], 'random.0.numpy':[[], ['PCG64', [0]*624, 0, 0, 0.]],
    'random.0.numpy.1':[[0]*3, [-1]*624, [2**32]*624], 'random.0.python':[[], [3, [0]*3, None], [3, [0]*624+[10**9], None]], 'random.0.loaders':[[], [[]], 'x'], 'scaler':['x', [], {'scale':'x'}], 'within':['x', [], {}, {'step':1}]}.items() for v in vs]

@pytest.mark.promise('executed')
def test_a_misfit_in_any_part_of_a_checkpoint_is_one_line(stopped, tmp_path):
    "Whatever part of a checkpoint does not fit, the training ends with one line, and nothing is written"
    path = stopped/'checkpoint.safetensors'
    raw,(good,tensors) = path.read_bytes(),read_checkpoint(path)
    kept,random,wrong = {o.name:o.read_bytes() for o in stopped.iterdir()},torch.get_num_threads(),[]
    for at,value in misfits:
        state = json.loads(json.dumps(good))
        if at.startswith('opt.0.a.b'): state['opt'][0]['a.b'] = value
        else: put(state, at, value)
        write_checkpoint(path, state, tensors)
        try: run(stopped, True); line = 'accepted'
        except CTError as e: line = one_line(e)
        except Exception as e: line = repr(e)
        if '\n' in line or '\x1b' in line or len(line)>1000 or 'checkpoint.safetensors' not in line: wrong.append((at, str(value)[:60], line[:200]))
        path.write_bytes(raw)
        if {o.name:o.read_bytes() for o in stopped.iterdir()}!=kept: wrong.append((at, str(value)[:60], 'files changed'))
    assert wrong==[]
    assert torch.get_num_threads()==random

@pytest.mark.fault('K6')
@pytest.mark.promise('executed')
@each('change', [lambda t: t.pop('model.0.weight'), lambda t: t.update({'model.extra':torch.zeros(1)}), lambda t: t.update({'model.0.weight':torch.zeros(9,9)}), lambda t: t.update({'model.0.weight':torch.zeros(3,2).half()}),
    lambda t: t.update({'opt.0.grad_avg':torch.zeros(7)}), lambda t: t.update({'opt.0.a.b':torch.zeros(3,2)}), lambda t: t.update({'opt.0.grad_avg':torch.zeros(3,2).long()}), lambda t: t.update({'opt.99.grad_avg':torch.zeros(3,2)}),
    lambda t: t.update({'ema.0.weight':torch.zeros(1)}), lambda t: t.update({'ema.more':torch.zeros(1)}), lambda t: t.update({'history.file':torch.zeros(1)}), lambda t: t.update({'model.0.weight':torch.zeros(3,2).bool()})])
def test_K6_tensors_of_another_training(stopped, change):
    "A checkpoint whose tensors have other names, shapes or types than network, optimiser and average is refused"
    path = stopped/'checkpoint.safetensors'
    state,tensors = read_checkpoint(path)
    tensors = {k:v.clone() for k,v in tensors.items()}
    change(tensors)
    write_checkpoint(path, state, tensors)
    refused(lambda: run(stopped, True), 'checkpoint.safetensors')

def torch_state(**fields):
    "torch's random state with other numbers at some places, by their offset"
    raw = bytearray(torch.get_rng_state().numpy().tobytes())
    for at,(form,v) in fields.items(): struct.pack_into(form, raw, int(at[1:]), v)
    return raw.hex()

def at(path, value):
    "A change that sets what is at 'a.0.b' within the state of a checkpoint"
    return lambda s, t: put(s, path, value)

def each_forgery(**changes):
    return each('change', changes.values(), ids=list(changes))

def forgery_is_refused(stopped, change, *said):
    "A resumed training ends in one line after `change` of state and tensors, and no file is touched"
    path = stopped/'checkpoint.safetensors'
    state,tensors = read_checkpoint(path)
    state,tensors = json.loads(json.dumps(state)),{k:v.clone() for k,v in tensors.items()}
    change(state, tensors)
    write_checkpoint(path, state, tensors)
    before = {o.name:o.read_bytes() for o in stopped.iterdir()}
    refused(lambda: run(stopped, True), '.safetensors', *said)
    assert {o.name:o.read_bytes() for o in stopped.iterdir()}==before

@pytest.mark.promise('executed')
@each_forgery(ones=at('random.0.torch', 'ff'*5056), past_the_end=at('random.0.torch', torch_state(_8=('<i', 624), _16=('<Q', 600))), zeros=at('random.0.torch', torch_state(_8=('<i', 1), _16=('<Q', 0))[:48]+'00'*5032),
    nan=at('random.0.torch', torch_state(_5024=('<d', math.nan))), numpy_zeros=at('random.0.numpy.1', [0]*624), numpy_nan=at('random.0.numpy.4', math.nan), numpy_gauss=at('random.0.numpy.3', 1.),
    python_zeros=at('random.0.python.1', [0]*624+[624]), python_normal=at('random.0.python.2', 1e308), numpy_normal=at('random.0.numpy.4', -1e9), normal=at('random.0.torch', torch_state(_5024=('<d', 1e30))),
    python_nan=at('random.0.python.2', math.nan), loader_zeros=at('random.0.loaders.0.1', [0]*624+[624]), more=at('random.0.surprise', 1))
def test_a_forged_random_state_is_one_line(stopped, change):
    "A random state that a generator refuses, that makes torch read past its end, or that gives only zeros or NaN is refused"
    forgery_is_refused(stopped, change, 'part random does not fit')

def scalar(v): return lambda s, t: t.update({'opt.0.grad_avg':torch.tensor(v)})
def nan_at(k, v=math.nan): return lambda s, t: t[k].view(-1)[:1].fill_(v)
def without(*starts):
    def change(s, t):
        for k in [k for k in t if k.startswith(starts)]: del t[k]
    return change

@pytest.mark.fault('K6')
@pytest.mark.promise('silent')
@each_forgery(scalar=scalar(.5), one=lambda s, t: t.update({'opt.0.grad_avg':torch.zeros(1)}), double=lambda s, t: t.update({'opt.0.grad_avg':torch.zeros(3,2).double()}), more=lambda s, t: t.update({'opt.0.more':torch.zeros(3,2)}),
    twice=lambda s, t: t.update({'opt.0.step':torch.tensor(1.)}), missing=lambda s, t: t.pop('opt.0.grad_avg'), flag=lambda s, t: t.update({'opt.1.do_wd':torch.zeros(3)}), step_gone=lambda s, t: s['opt'][0].pop('step'),
    step_zero=at('opt.0.step', 0), step_back=at('opt.0.step', -1), step_float=at('opt.0.step', 1.5), step_nan=at('opt.0.step', math.nan), step_huge=at('opt.0.step', 2**63), key=at('opt.0.surprise', 1.), wd=at('opt.2.do_wd', True))
def test_K6_what_the_optimiser_keeps_has_the_form_of_a_step(stopped, change):
    "The optimiser's averages and counts have the names, shapes and types that a step gives them, and counts begin at 1"
    forgery_is_refused(stopped, change, 'part opt')

@pytest.mark.fault('K12')
@pytest.mark.promise('silent')
@each_forgery(weight=nan_at('model.0.weight'), infinite=nan_at('model.0.weight', math.inf), average=nan_at('ema.0.weight'), moment=nan_at('opt.0.grad_avg'), negative=nan_at('opt.0.sqr_avg', -1.),
    variance=nan_at('model.1.running_var', -1.), count=nan_at('model.1.num_batches_tracked', -1))
def test_K12_tensors_of_a_checkpoint_are_finite(stopped, change):
    "NaN and infinity in a checkpoint, and variances and counts below 0, are refused before they spoil a training"
    forgery_is_refused(stopped, change, 'part tensors does not fit')

def no_optimiser(s, t): without('opt.')(s, t); s['opt'] = [{k:v for k,v in o.items() if k=='do_wd'} for o in s['opt']]

@pytest.mark.fault('K6')
@pytest.mark.promise('lost','silent')
@each_forgery(all=without(''), weights=without('model.'), optimiser=no_optimiser, average=without('ema.'))
def test_K6_a_checkpoint_without_its_tensors_is_refused(stopped, change):
    "A training that has begun does not begin anew, or with a fresh optimiser or average, when its checkpoint has lost the tensors"
    forgery_is_refused(stopped, change, 'does not fit')

@pytest.mark.promise('silent')
@each_forgery(epoch=at('epoch', 2), epoch_zero=at('epoch', 0), phase=at('phase', 1), last_phase=at('phase', 99), finished=at('finished', True),
    finished_alone=lambda s, t: (t.clear(), s.update(finished=True, epoch=0), [s.pop(k) for k in ('opt','hypers','scaler','recorder','random')]))
def test_a_forged_place_is_refused(stopped, change):
    "An epoch, a phase or an end that the checkpoint's own tables do not bear out is refused"
    forgery_is_refused(stopped, change, 'does not fit')

def row(change): return lambda s, t: s['callbacks']['history'].update(rows=change(s['callbacks']['history']['rows']))

@pytest.mark.promise('silent')
@each_forgery(long=row(lambda r: [r[0]+[1.]]), short=row(lambda r: [r[0][:-1]]), empty=row(lambda r: [[]]), none=row(lambda r: []), two=row(lambda r: r*2), number=row(lambda r: [[7,*r[0][1:]]]),
    half=row(lambda r: [[0.,*r[0][1:]]]), time=row(lambda r: [[0,'00:01',*r[0][2:]]]), named=row(lambda r: [dict(zip('abcde', r[0]))]), flat=row(lambda r: [1.]))
def test_a_row_of_history_fits_the_table(stopped, change):
    "History has one row for each epoch, numbered from 0 and as long as the rows to come"
    forgery_is_refused(stopped, change, 'callback history does not fit')

@pytest.mark.promise('silent')
@each_forgery(evil=at('callbacks.evil', {}), named=at('callbacks.evil', dict(rows=[])), gone=lambda s, t: s['callbacks'].pop('ema'), part=at('evil', 1), shapes=at('shapes', {}), part_gone=lambda s, t: s.pop('scaler'),
    recorder=at('recorder.evil', []), within=at('within', None))
def test_unknown_and_missing_parts_are_refused(stopped, change):
    "A checkpoint has the parts that this training writes, no more and no fewer"
    forgery_is_refused(stopped, change, 'does not fit')

wrong = dict(count=at('recorder.count', 10**18), count_zero=at('recorder.count', 0), losses=at('recorder.losses', [1.]), loss_nan=at('recorder.losses', [math.nan]*3), loss_whole=at('recorder.losses', [1,1,1]),
    loss_huge=at('recorder.losses', [1e300]*3), loss_overflow=at('recorder.losses', [2**63]*3), smooth_whole=at('recorder.smooth', 1), smooth_nan=at('recorder.smooth', math.nan), smooth_overflow=at('recorder.smooth', 2**63),
    lrs=at('recorder.lrs', [math.inf]*3), lr_below=at('recorder.lrs', [-.1]*3), iters=at('recorder.iters', [99]), iters_float=at('recorder.iters', [1.5]), values=at('recorder.values', []), values_two=at('recorder.values', [[1.],[1.]]),
    values_text=at('recorder.values', [['00:01']]), values_named=at('recorder.values', [{'a':1.}])) | {f'hypers_{k}_{v}':at(f'hypers.0.{k}', v) for k,vs in dict(lr=[math.nan,math.inf,-1.], mom=[1.5,-.1,math.nan],
    sqr_mom=[1.5,.5], wd=[-1.,math.inf], eps=[math.nan,0.,1e30,-1e-5]).items() for v in vs} | {f'best_{a}_{b}':lambda s, t, a=a, b=b: s['callbacks']['keep_best'].update(best=a, best_epoch=b)
    for a,b in ((.5,None), (math.inf,0), (math.nan,None), (.5,7), (.5,.5), (.5,-1))} | dict(average=at('callbacks.ema.n', 0), average_steps=at('callbacks.ema.n', 10**18), scaler=at('scaler', {}), scale=at('scaler', dict(scale=-1.)))

@pytest.mark.promise('silent')
@each_forgery(**wrong)
def test_numbers_that_no_training_has_are_refused(stopped, change):
    "Losses, counts, hyper-parameters and scores that are NaN, infinite, negative, of another type, or not those of this training are refused"
    forgery_is_refused(stopped, change, 'does not fit')

def within(**kwargs):
    def change(s, t): s['within'] = dict(step=1, pct_train=.5+1/6, train_iter=4, began=json.loads(json.dumps(s['random'][0]))) | kwargs
    return change

@pytest.mark.promise('silent')
@each_forgery(step=within(step=4), zero=within(step=0), pct=within(pct_train=.9), nan=within(pct_train=math.nan), more=within(train_iter=10**11), fewer=within(train_iter=0), began=within(began={}), key=within(more=1),
    random=lambda s, t: (within()(s, t), put(s, 'within.began.torch', 'ff'*5056)), done=lambda s, t: (within()(s, t), s.update(epoch=2)))
def test_a_forged_place_within_an_epoch_is_refused(stopped, change):
    "A place within an epoch that is not one of its steps, or whose random state is none, is refused before anything is trained"
    forgery_is_refused(stopped, change, 'does not fit')

def test_a_good_place_within_an_epoch_resumes(stopped):
    path = stopped/'checkpoint.safetensors'
    state,tensors = read_checkpoint(path)
    within()(state, tensors); write_checkpoint(path, state, tensors)
    run(stopped, True)
    assert read_checkpoint(path)[0]['finished']

@pytest.mark.promise('silent')
@each('harm', ['missing','cut','other'])
def test_weights_that_were_kept_are_there(stopped, good, harm):
    "A checkpoint that tells of weights that were kept is refused unless they are there, whole, and of this network"
    if harm!='missing': (stopped/'model.safetensors').write_bytes(good.read_bytes()[:None if harm=='other' else -9])
    forgery_is_refused(stopped, lambda s, t: s['callbacks']['keep_best'].update(best=.5, best_epoch=0), 'model.safetensors')

def nested(n):
    o = {}
    for _ in range(n): o = {'a':o}
    return o

@pytest.mark.promise('executed')
@each('n', [300, 480, 900])
def test_arguments_nested_too_deep_are_refused(stopped, n):
    "Arguments nested hundreds of levels deep are refused in one line"
    text = json.dumps(read_checkpoint(stopped/'checkpoint.safetensors')[0]|dict(about='HERE')).replace('"HERE"', '{"a":'*n+'1'+'}'*n)
    save_file({}, stopped/'checkpoint.safetensors', dict(covid3d_run=text, crc=covid3d.checkpoint._crc(text, {})))
    refused(lambda: run(stopped, True), 'checkpoint.safetensors')

def raw_checkpoint(path, tensors, text='{}'):
    entries = ','.join(f'"{i}":{{"dtype":"F32","shape":[0],"data_offsets":[0,0]}}' for i in range(tensors))
    head = f'{{"__metadata__":{json.dumps(dict(covid3d_run=text, crc="0"))}{","*bool(tensors)}{entries}}}'.encode()
    path.write_bytes(struct.pack('<Q', len(head))+head)

@pytest.mark.fault('K7')
@pytest.mark.promise('executed')
def test_K7_a_header_of_a_million_tensors_takes_no_memory(good, tmp_path):
    "A checkpoint whose header names a million tensors, or whose text holds millions of lists, is refused within seconds and for less than 100 MB"
    for name,args in dict(million=(10**6,), many=(40_000,), lists=(0, '['+'[],'*10**6+'0]'), long=(0, '['+'0,'*10**7+'0]')).items(): raw_checkpoint(tmp_path/f'{name}.safetensors', *args)
    mb,secs = cost("for p in root.glob('*.safetensors'): told(lambda: read_checkpoint(p))", good, tmp_path)
    assert mb<100 and secs<4, (mb,secs)

@pytest.mark.promise('executed')
def test_a_checkpoint_that_claims_gigabytes_takes_no_memory(good, tmp_path):
    "A checkpoint that claims gigabytes of tensors, though it takes no room on the disk, is refused before they are read"
    n,path = 2**31,tmp_path/'checkpoint.safetensors'
    head = json.dumps(dict(a=dict(dtype='F32', shape=[n//4], data_offsets=[0,n]))).encode()
    with path.open('wb') as f: f.write(struct.pack('<Q', len(head))+head); f.truncate(8+len(head)+n)
    mb,secs = cost("from covid3d.checkpoint import Checkpoint\nck = Checkpoint(root/'checkpoint.safetensors', {}, 1, 1, torch.nn.Linear(2, 1)); told(lambda: ck.begin(True))", good, tmp_path)
    assert mb<100 and secs<4, (mb,secs)

@pytest.mark.promise('lost')
def test_a_training_longer_than_its_checkpoint_is_read_of_does_not_begin(tmp_path):
    "A training whose checkpoint would be too long to be read again is refused before it starts"
    dls = DataLoaders(*[DataLoader(Data(), bs=2) for _ in range(2)], device=torch.device('cpu'))
    learn = Learner(dls, nn.Linear(2, 1), loss_func=nn.MSELoss())
    for limits in (dict(epochs=1), dict(steps=5)):
        ck = Checkpoint(tmp_path/'checkpoint.safetensors', {}, **dict(epochs=2, steps=6, model=learn.model)|limits); ck.begin()
        refused(lambda: ck.fit(learn, 2, .01), '2 epochs of 6 steps', 'epochs, steps')

# One process of several

@pytest.mark.promise('silent')
@each('env', [dict(RANK='1'), dict(RANK='1', WORLD_SIZE='1'), dict(RANK='x', WORLD_SIZE='2')])
def test_a_leftover_RANK_swallows_no_error(good, tmp_path, monkeypatch, capfd, env):
    "A variable that is left over in the environment does not make errors silent"
    for k,v in env.items(): monkeypatch.setenv(k, v)
    assert main(['train',str(tmp_path/'none.csv'),'--out',str(tmp_path/'run'),'--init','random'])==2
    assert 'none.csv' in capfd.readouterr().err

@pytest.mark.promise('lost')
@pytest.mark.skipif(not hasattr(os, 'fork'), reason='needs fork')
def test_a_kill_within_the_writer_leaves_nothing(tmp_path, monkeypatch):
    "The draft of a checkpoint goes too, once a process that was killed before it took its name is gone"
    monkeypatch.setattr('covid3d.errors.os.replace', lambda *_: os.kill(os.getpid(), 9))
    if not (pid := os.fork()):
        try: write_checkpoint(tmp_path/'checkpoint.safetensors', {}, {})
        finally: os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])==-9 and [*tmp_path.iterdir()]
    with locked(tmp_path): pass
    assert [*tmp_path.iterdir()]==[]
