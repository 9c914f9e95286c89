"Whole scans as patches; the paper's three data sets from folders to the table, killed and gone on with"
import json, os, random, shutil, signal, subprocess, sys, time
from dataclasses import asdict
from pathlib import Path

import nibabel as nib, numpy as np, pandas as pd, pytest, torch
from safetensors import safe_open

from covid3d.cases import read_cases
from covid3d.data import CTDataLoaders, prepare_table
from covid3d.layouts import write_layout
from covid3d.evaluate import score_case
from covid3d.statistics import read_scores
from covid3d.inference import Segmenter
from covid3d.weights import NetSpec, load_model, save_model
from covid3d.files import locked
from covid3d.reproduce import reproduce
from covid3d.transforms import CTSpec, ResizeSpec, resize
from covid3d.volume import CTError
from coarse import cached, write_coarse

each = pytest.mark.parametrize

# The whole scan as one patch

class Grey(torch.nn.Module):
    "Says yes where the input is above .4, and counts how often it was asked"
    def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.tensor(20.)); self.seen = []
    def forward(self, x): self.seen.append(tuple(x.shape)); return self.w*(x-.4)

@each('patch', [(12,40,44), (48,128,100)])
def test_whole_scan_is_one_window_and_comes_back_to_its_own_grid(patch):
    ph,spec,net = cached(2),ResizeSpec(patch=patch),Grey()
    mask = Segmenter(net, spec)(ph.ct).masks['lesion']
    assert net.seen==[(1,1,*patch)] and mask.shape==ph.ct.shape and mask.dtype==np.uint8
    want = resize((20*(spec.prepare(ph.ct)-.4)).sigmoid(), ph.ct.shape)[0]>=.5
    assert (mask!=want.numpy()).mean()<1e-4 and 0<mask.mean()<1
    with pytest.raises(CTError, match='threshold'): Segmenter(net, spec, threshold=1)

def test_weights_carry_that_there_is_no_spacing(tmp_path):
    "and files from before, with a spacing, still open"
    net = NetSpec(width=4); model = net.build(('lesion',))
    for spec in (ResizeSpec(patch=(8,32,32)), CTSpec()):
        save_model(model, tmp_path/'m.safetensors', spec, net); back = load_model(tmp_path/'m.safetensors')[1]
        assert back==spec and isinstance(back, ResizeSpec)==(spec.spacing is None)
    with safe_open(tmp_path/'m.safetensors', 'pt') as f: assert json.loads(f.metadata()['covid3d'])['ct']==dict(spacing=[4,2.8,2.8], window=[-1000,400], patch=[16,96,96], classes=['lesion'])

def test_prepared_folder_of_whole_scans(tmp_path):
    table = write_coarse(tmp_path/'data', n=3, seed=0); spec = ResizeSpec(patch=(8,32,32))
    prepare_table(table, tmp_path/'p', spec); before = sorted(tmp_path.glob('p/*'))
    dls = CTDataLoaders.from_table(tmp_path/'p', bs=1, patches=1, aug=None)
    assert dls.spec==spec and dls.train.one_batch()[0].shape==(1,1,8,32,32) and sorted(tmp_path.glob('p/*'))==before
    assert [o.shape[1:] for o in (dls.reader(c).ct for c in read_cases(table))]==[(8,32,32)]*3
    dls = CTDataLoaders.from_table(tmp_path/'p', bs=1, patches=1, aug=None, on_batch=True)   # cut larger than the scan, turned, and cut to it
    assert dls.train.one_batch()[0].shape==(1,1,8,32,32)

# The paper's table, from folders

small = dict(init='random', device='cpu', spec=CTSpec((9,7,7), patch=(16,32,32)), width=4, epochs=3, patches=6, lr=5e-2, score_every=1)

@pytest.fixture(scope='module')
def data(tmp_path_factory):
    "All three data sets; one scan of each is damaged: a slice that is cut short, a mask of another size, a file that is no gzip"
    root = tmp_path_factory.mktemp('sets')
    ph = [cached(i) for i in range(14)]
    write_layout(ph[:6], root/'ricord', 'ricord'); write_layout([*ph[6:9], ph[0]], root/'corona', 'coronacases')
    write_layout([*ph[9:11], ph[12], ph[0]], root/'mosmed', 'mosmed')  # 11 is healthy, and has no Dice
    dcm = sorted((root/'ricord').rglob('1-009.dcm'))[1]; dcm.write_bytes(dcm.read_bytes()[:700])
    nii = root/'corona'/'Infection_Mask'/'coronacases_002.nii.gz'; nib.save(nib.Nifti1Image(np.zeros((5,5,5), np.uint8), np.eye(4)), nii)
    gz = root/'mosmed'/'studies'/'CT-1'/'study_0256.nii.gz'; gz.write_bytes(gz.read_bytes()[:5000])
    return dict(ricord=root/'ricord', coronacases=root/'corona', mosmed=root/'mosmed')

worker = '''
import json, os, re, signal, sys, traceback
import torch
from covid3d.reproduce import reproduce
from covid3d.transforms import spec_class
from covid3d.volume import CTError
def dying(real, at):
    "`os.replace` that is killed before the first file whose path matches"
    def f(a, b, **k):
        if re.search(at, str(b)): os.kill(os.getpid(), signal.SIGKILL)
        return real(a, b, **k)
    return f
print('ready', flush=True)
for line in sys.stdin:
    o = json.loads(line); log,at = o.pop('log'),o.pop('at'); pid = os.fork()
    if not pid:
        f = os.open(log, os.O_WRONLY|os.O_CREAT|os.O_APPEND)
        for fd in (1,2): os.dup2(f, fd)
        torch.set_num_threads(1)
        if at: os.replace,os.rename = dying(os.replace, at),dying(os.rename, at)
        try: reproduce(**o|dict(spec=spec_class(o['spec'])(**o['spec']))); code = 0
        except CTError as e: print(e, flush=True); code = 2
        except BaseException: traceback.print_exc(); code = 3
        os._exit(code)
    print(pid, flush=True)
    _,status = os.waitpid(pid, 0)
    print(os.waitstatus_to_exitcode(status), flush=True)'''

@pytest.fixture(scope='module')
def start():
    "Runs `reproduce` in a process of its own, killed before it gives a file that matches `at` its name, or after so many seconds"
    env = os.environ|dict(OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore')
    with subprocess.Popen([sys.executable, '-c', worker], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env) as p:
        assert p.stdout.readline()=='ready\n'
        def run(out, data, at=None, after=None, **kwargs):
            o = dict(out=str(out), log=f'{out}.log', at=at)|{k:str(v) for k,v in data.items()}|small|kwargs|dict(spec=asdict(kwargs.get('spec', small['spec'])))
            p.stdin.write(json.dumps(o)+'\n'); p.stdin.flush(); pid = int(p.stdout.readline())
            if after is not None: time.sleep(after); os.kill(pid, signal.SIGKILL)
            status = int(p.stdout.readline())
            return status,Path(o['log']).read_text()
        yield run
        p.stdin.close()

@pytest.fixture(scope='module')
def straight(start, data, tmp_path_factory):
    "A run without a break, its folders given as seen from here"
    out = tmp_path_factory.mktemp('straight')/'run'
    status,text = start(out, {k:os.path.relpath(o) for k,o in data.items()})
    assert status==0, text
    return out,text

final = ('table.csv','table.json','table.md','index.html','check.csv','cases.csv','train/model.safetensors')

@pytest.mark.fault('X14')
def test_the_table(straight, data):
    "Measured and published side by side, the damaged scans counted and named, nothing stopped by them"
    out,text = straight
    df = pd.read_csv(out/'table.csv', keep_default_na=False); mine = df[df.what=='measured here'].set_index('data')
    assert [*mine.index]==['ricord','coronacases','mosmed'] and mine.n.astype(int).to_dict()==dict(ricord=1, coronacases=2, mosmed=2)
    assert mine.left_out.astype(int).to_dict()==dict(ricord=1, coronacases=1, mosmed=1) and 'flatters' in mine.differs['ricord']
    pub = df[df.what=='published']; assert pub[pub.source.str.startswith('Bressem')].dice.astype(float).tolist()==[.679,.648,.405] and (pub.source!='').all() and (pub.differs!='').all()
    js = json.loads((out/'table.json').read_text()); lost = {o['data']:o for o in js['left_out']}
    assert {k:o['stage'] for k,o in lost.items()}==dict(ricord='tables', coronacases='check', mosmed='check') and lost['coronacases']['case']=='coronacases_002' and all('\n' not in o['error'] and str(data['ricord'].parent) not in o['error']+o['case'] for o in lost.values()) and lost['ricord']['case'].startswith(('folder_','scan_'))
    for k,names in dict(ricord=None, coronacases=['coronacases_001','coronacases_003'], mosmed=['study_0255','study_0257']).items():
        s = read_scores(out/k); assert (s.error=='').all() and abs(s.dice.mean()-float(mine.dice[k]))<1e-5 and (names is None or s.case.tolist()==names)
        row = score_case(Segmenter.load(out/'train'/'model.safetensors', 'cpu'), next(c for c in read_cases(out/'cases.csv') if c.name==s.case[0])); assert abs(row['dice']-s.dice[0])<1e-5 and row['tp']==s.tp[0]
        assert 'data:image/png' in (out/k/'index.html').read_text()
    for where in (text, (out/'table.md').read_text(), (out/'index.html').read_text()): assert 'measured here' in where and 'published' in where and 'not the paper’s' in where
    assert 'about' in text and 'disk' in text
    cases = pd.read_csv(out/'training.csv', dtype=str); assert set(cases.split)=={'train','valid'} and set(cases.dataset)=={'ricord'} and cases.groupby('patient').split.nunique().max()==1

def test_what_was_expected(straight):
    "The disk that was asked for holds the run"
    out,text = straight
    def number(s): return float(s.split()[0])*{'MB':1e6,'GB':1e9}[s.split()[1]]
    asked = number(text.split('disk: about ')[1]); used = sum(o.stat().st_size for o in out.rglob('*') if o.is_file())
    assert used<asked<20*used+3e7

moments = ('run.json$','ricord_masks/scan_','/cases.csv$','check.csv$','stages/check','prepared/.*scan_','training.csv$','model.safetensors$','history.csv$','checkpoint.safetensors$','stages/train','ricord/scores.jsonl$',
    'ricord/scores.csv$','coronacases/scores.jsonl$','coronacases/summary.csv$','coronacases/scores.png$','mosmed/index.html$','table.json$','run/index.html$')  # the page of RICORD is there by then, and is replaced

def require_same_end(out, straight, data):
    for f in final: assert (out/f).read_bytes()==(straight[0]/f).read_bytes(), f
    for k in data: pd.testing.assert_frame_equal(read_scores(out/k), read_scores(straight[0]/k))
    assert not [*out.rglob('.covid3d*')]

@pytest.mark.fault('X5')
@pytest.mark.promise('lost')
def test_killed_in_every_stage(start, straight, data, tmp_path):
    "SIGKILL in each stage, one after the other: the run goes on each time, and ends with the same table and weights, bit for bit"
    out = tmp_path/'run'
    for at in moments: status,text = start(out, data, at=at); assert status==-9, (at,text)
    scored = {o:o.read_bytes() for o in out.glob('*/scores.jsonl')}; assert len(scored)==3
    status,text = start(out, data); assert status==0, text
    assert scored=={o:o.read_bytes() for o in scored}   # nothing that was scored is scored again
    assert text.count('tables: done')==text.count('train: done')==1 and 'resumes; done: tables' in text
    require_same_end(out, straight, data)

@pytest.mark.fault('X5')
@pytest.mark.promise('lost')
def test_killed_at_random(start, straight, data, tmp_path):
    "SIGKILL at random moments, early and late"
    out,rng,kills = tmp_path/'run',random.Random(0),0
    for longest in (.3,.6,1,2,4):
        status,text = start(out, data, after=rng.uniform(.02, longest)); assert status in (-9,0), text
        kills += status==-9
    status,text = start(out, data); assert status==0, text
    assert kills>=2
    require_same_end(out, straight, data)

@pytest.mark.fault('X12','X1')
@pytest.mark.promise('lost')
def test_finished_again_and_refused(start, straight, data, tmp_path):
    "A finished run is read, not made again; other arguments, other data, a second process and a foreign folder are refused in one line"
    out = tmp_path/'run'; shutil.copytree(straight[0], out); before = {f:(out/f).stat().st_mtime_ns for f in ('train/model.safetensors','stages/check.json')}
    assert start(out, data)[0]==0 and {f:(out/f).stat().st_mtime_ns for f in before}==before
    def refused(word, **kwargs):
        status,text = start(out, kwargs.pop('data', data), **kwargs); last = text.strip().splitlines()[-1]; assert status==2 and word in last, text
    refused('seed 0 then, 3 now', seed=3); refused('recipe frozen_epochs 1 then, 3 now', recipe='resize'); refused('recipe epochs 3 then, 4 now', epochs=4)
    refused('data mosmed', data={k:v for k,v in data.items() if k!='mosmed'})
    f = next(data['mosmed'].rglob('study_0257_mask.nii.gz')); raw = f.read_bytes(); f.write_bytes(raw[:-8]+bytes([raw[-8]^1])+raw[-7:]); refused('data mosmed digest '); f.write_bytes(raw)
    assert start(out, data)[0]==0     # the same content at another time is the same data
    with locked(out): refused('another process is writing there')
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'thesis.doc').touch()
    with pytest.raises(CTError, match='is not empty'): reproduce(tmp_path/'mine', **data, **small)

@pytest.mark.fault('X6')
def test_disk_too_small(data, tmp_path, monkeypatch):
    monkeypatch.setattr('covid3d.reproduce._free_disk', lambda out: 10**6)
    with pytest.raises(CTError, match='about .* are needed, 1 MB are free. Make room'): reproduce(tmp_path/'run', **data, **small)
    assert not (tmp_path/'run').exists()

def test_encoder_weights_that_are_not_there(data, tmp_path, monkeypatch):
    "Told before anything is written, not after the scans are prepared"
    def offline(weights): raise CTError('weights', 'cannot be downloaded', 'Go online')
    monkeypatch.setattr('covid3d.encoder._download', offline)
    for o,word in (('kinetics','cannot be downloaded'), (tmp_path/'none.safetensors','no such file')):
        with pytest.raises(CTError, match=word): reproduce(tmp_path/'run', **data, **small|dict(init=o, width=None))
        assert not (tmp_path/'run').exists()

def test_given_weights_may_know_the_scans_of_ricord(data, straight, tmp_path):
    "said in the table and on the page; the scans that only test carry no such mark"
    mark = 'may have been used to train or choose these weights'
    df = reproduce(tmp_path/'run', data['ricord'], weights=straight[0]/'train'/'model.safetensors', device='cpu'); mine = df[df.what=='measured here']
    assert mine.data.tolist()==['ricord'] and mark in mine.differs.iloc[0] and all(mark in (tmp_path/'run'/f).read_text() for f in ('table.md','index.html','ricord/index.html'))
    assert not any(mark in (straight[0]/k/'index.html').read_text() for k in data) and 'chose the weights' in (straight[0]/'ricord'/'index.html').read_text()

def test_unknown_keyword(data, tmp_path):
    with pytest.raises(CTError, match="recipe: has no setting 'epoch'"): reproduce(tmp_path/'run', **data, **small, epoch=2)
    assert not (tmp_path/'run').exists()

def test_given_weights_and_one_data_set(start, data, straight, tmp_path, capfd):
    "MosMed alone can be scored with weights that are there; without any it is refused"
    weights = straight[0]/'train'/'model.safetensors'
    df = reproduce(tmp_path/'run', mosmed=data['mosmed'], weights=weights, device='cpu')
    mine = df[df.what=='measured here']; assert mine.data.tolist()==['mosmed'] and mine.method.tolist()==['weights model.safetensors'] and not (tmp_path/'run'/'train').exists()
    assert read_scores(tmp_path/'run'/'mosmed').dice.tolist()==read_scores(straight[0]/'mosmed').dice.tolist() and 'trains nothing' in capfd.readouterr().out
    with pytest.raises(CTError, match='nothing to train on. Add --ricord'): reproduce(tmp_path/'no', mosmed=data['mosmed'])

def test_whole_scans_beside_patches(start, data, straight, tmp_path):
    "The second recipe, without RICORD, beside the first run"
    out = tmp_path/'run'; status,text = start(out, {k:v for k,v in data.items() if k!='ricord'}, recipe='resize', against=str(straight[0]), spec=ResizeSpec(patch=(8,32,32)))
    assert status==0 and 'has no RICORD' in text, text
    df = pd.read_csv(out/'table.csv', keep_default_na=False); mine = df[df.what!='published']
    assert mine.what.tolist()==['measured here','another run']*2 and mine.data.tolist()==['coronacases','coronacases','mosmed','mosmed'] and mine.method.str.startswith('whole scans resized to 8×32×32, after the authors’ later example').tolist()==[True,False]*2
    assert load_model(out/'train'/'model.safetensors')[1]==ResizeSpec(patch=(8,32,32)) and 'the other run' in json.loads((out/'mosmed'/'report.json').read_text())['compare'] and 'the other run was not compared' in (out/'index.html').read_text()

@pytest.mark.promise('silent')
def test_data_sets_of_the_same_phantoms_say_so(tmp_path):
    "Three layouts of the same phantoms (`covid3d phantom --layout …` with one seed) share every scan: nothing is left to train on, and that is the reason given"
    ph = [cached(i) for i in range(4)]
    write_layout(ph, tmp_path/'r', 'ricord'); write_layout(ph, tmp_path/'c', 'coronacases'); write_layout(ph, tmp_path/'m', 'mosmed')
    with pytest.raises(CTError, match=r'no scan for training is left: \d scans of \d scans left out hold the same voxels as scans that test. Give data sets that share no scan \(phantoms: another --seed for each\)'):
        reproduce(tmp_path/'run', tmp_path/'r', tmp_path/'c', tmp_path/'m', **small)

@pytest.mark.promise('silent')
def test_phantom_layouts_of_the_default_seed_share_no_scan(tmp_path, monkeypatch, capsys):
    "`covid3d phantom` without --seed draws other phantoms for each layout, so that together they make a run"
    from covid3d import cli, layouts
    seeds = {}
    monkeypatch.setattr('covid3d.phantom.phantom', lambda seed: seed)
    monkeypatch.setattr(layouts, 'write_layout', lambda phantoms, root, layout: seeds.update({layout:phantoms[0]}))
    for k in ('ricord','coronacases','mosmed','covid1920'): assert cli.main(['phantom','-o',str(tmp_path/k),'--n','4','--layout',k])==0
    first = sorted(seeds.values()); assert len(seeds)==4 and min(b-a for a,b in zip(first, first[1:]))>=10_000
    assert cli.main(['phantom','-o',str(tmp_path/'x'),'--layout','mosmed','--seed','5'])==0 and seeds['mosmed']==5

@pytest.mark.fault('X15')
@pytest.mark.promise('named')
def test_X15_no_folder_is_named_in_a_run(straight, data):
    "What a run keeps about its scans (run.json, the check, stages, tables, pages) holds no path and no folder's name"
    out,text = straight
    secret = {str(data['ricord'].parent), *(o.name for o in data['ricord'].rglob('*') if o.is_dir() and len(o.name)>8)}
    for f in [out/'run.json', out/'check.csv', out/'table.json', out/'table.md', out/'index.html', *out.glob('stages/*.json'), *out.glob('*/scores.jsonl'), *out.glob('*/report.json'), *out.glob('*/index.html')]:
        assert not [o for o in secret if o in f.read_text()], f
    assert not [o for o in secret if o in text and not text.split(o)[0].endswith('wrote ')]

@pytest.mark.promise('executed')
@pytest.mark.parametrize('name', ['run.json','stages/tables.json','stages/check.json','coronacases/scores.jsonl'])
def test_a_run_from_a_stranger_is_refused(straight, data, tmp_path, name):
    "A pipe, deep JSON or other types in the place of a run's own files end in one line"
    out = tmp_path/'run'; shutil.copytree(straight[0], out); f = out/name; whole = f.read_bytes()
    for text in (b'[]', b'['*10**5, b'{"left_out": 5}', b'{"left_out": [{"case": "../x"}]}', b'\xff', b'{"a": NaN}'):
        f.write_bytes(text)
        with pytest.raises(CTError) as e: reproduce(out, **data, **small)
        assert '\n' not in str(e.value), e.value
    f.unlink(); os.mkfifo(f)
    with pytest.raises(CTError, match='is not a regular file'): reproduce(out, **data, **small)
    f.unlink(); f.write_bytes(whole)

@pytest.mark.fault('X1')
def test_X1_a_file_of_somebody_else_in_a_run_is_kept(straight, data, tmp_path):
    "A table.csv that covid3d did not write is refused, not replaced"
    out = tmp_path/'run'; shutil.copytree(straight[0], out); (out/'covid3d.json').unlink()
    with pytest.raises(CTError, match='was not written by covid3d'): reproduce(out, **data, **small)
