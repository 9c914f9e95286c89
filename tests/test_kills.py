"""Each command is killed at random moments and run again as its documentation says: equal results, nothing hidden left.

COVID3D_KILLS=N kills each command N times (`make kill`); without it, once. Two of a command in one folder: the second is told."""
import hashlib, json, os, shutil, subprocess, sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np, pandas as pd, pytest
from isal import igzip

kills = int(os.environ.get('COVID3D_KILLS', 1))
small = ['--spacing','9,5,5','--patch','16,48,48']

@dataclass
class Job:
    "A command that writes into OUT"
    argv: list       # `OUT` stands for its folder
    again: list      # What is added to the second run
    facts: tuple     # Files of OUT that must be the same as after an uninterrupted run
    lock: str = '.covid3d.lock' # In OUT

def jobs(d) -> dict:
    "All commands that write, on the data in `d`"
    w = ['--weights',f'{d}/w/model.safetensors','--device','cpu']
    train = ['train',f'{d}/data/cases.csv','--out','OUT','--init','random','--width','4',*small,'--epochs','2','--patches','2','--device','cpu','--examples','0']
    return dict(
        phantom=Job(['phantom','-o','OUT','--n','1'], ['--overwrite'], ('cases.csv','ct/*','infection_mask/*')),
        cases=Job(['table',f'{d}/data','-o','OUT/cases.csv'], ['--overwrite'], ('cases.csv',), '.cases.csv.covid3d.lock'),
        prepare=Job(['prepare',f'{d}/data/cases.csv','--out','OUT',*small], [], ('cases.csv','spec.json','*/ct.npy','*/masks.npy')),
        train=Job(train, ['--resume'], ('model.safetensors','history.csv')),
        folds=Job([*train,'--folds','2'], ['--resume'], ('fold_*/model.safetensors','fold_*/scores.csv')),
        pretrain=Job(['pretrain','--out','OUT','--patients','3','--width','4',*small,'--epochs','2','--device','cpu'], ['--resume'],
                     ('model.safetensors','history.csv','patients/cases.csv','patients/ct/*','patients/lobes_mask/*')),
        evaluate=Job(['evaluate',f'{d}/data/cases.csv',*w,'--split','train','--out','OUT','--pictures','1'], [], ('scores.csv','summary.csv')),
        predict=Job(['predict',f'{d}/dicom',f'{d}/data/ct',*w,'--out','OUT'], [], ('*_lesion.nii.gz','scans.csv')),
        pages=Job(['predict',f'{d}/data/ct','--device','cpu','--out','OUT'], [], ('*.nii.gz','*.json','*.html','*.png','measurements.csv','scans.csv')),
        reproduce=Job(['reproduce','--coronacases',f'{d}/corona',*w,'--out','OUT'], [], ('table.csv','coronacases/scores.csv')),
        demo=Job(['demo','--out','OUT','--n','3'], ['--overwrite'], ()))

names = [k for k in jobs('') if k!='demo']  # minutes long: its parts are `phantom`, `train`, `evaluate` and `predict`
if 'COVID3D_KILLS' not in os.environ: names = [k for k in names if k not in ('pretrain','reproduce')]

class Server:
    "kills.py in a process of its own"
    def __init__(self):
        self.p = subprocess.Popen([sys.executable, str(Path(__file__).with_name('kills.py'))], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
                                  env=os.environ|dict(OMP_NUM_THREADS='1'))
        assert self.p.stdout.readline()=='ready\n'
    def __call__(self, argv, **kwargs) -> dict:
        self.p.stdin.write(json.dumps(dict(argv=[str(o) for o in argv], **kwargs))+'\n'); self.p.stdin.flush()
        return json.loads(self.p.stdout.readline())
    def close(self): self.p.stdin.close(); self.p.wait()

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "Data, weights, and the server"
    from covid3d.layouts import write_layout
    from covid3d.dicom import write_series
    from covid3d.weights import NetSpec, save_model
    from coarse import cached, write_coarse
    from covid3d.transforms import CTSpec
    d,spec,net = tmp_path_factory.mktemp('kills'),CTSpec(spacing=(9,5,5), patch=(16,48,48)),NetSpec(width=4)
    write_coarse(d/'data', n=4, seed=0)
    for i in range(2): write_series(cached(10+i).ct, d/'dicom'/f'DOE^JOHN_{i}', patient=f'DOE{i}', seed=f'{i}')
    write_layout([cached(i) for i in (6,7,8)], d/'corona', 'coronacases')
    (d/'w').mkdir(); save_model(net.build(spec.classes), d/'w'/'model.safetensors', spec, net)
    s = Server()
    yield d,s
    s.close()

def command(job, out, again=False): return [o.replace('OUT', str(out)) for o in [*job.argv, *(job.again if again else [])]]

def content(p) -> str:
    "What must be the same in two runs: of a table all but times, dates and paths"
    raw = p.read_bytes()
    if p.name.endswith('.gz'): raw = igzip.decompress(raw)
    if p.suffix=='.csv':
        df = pd.read_csv(p, dtype=str, keep_default_na=False)
        raw = df[[c for c in df if c not in ('time','seconds','date','source','ct','lesion','lung')]].to_csv().encode()
    return hashlib.sha256(raw).hexdigest()

def facts(job, out) -> dict:
    "What a run must have given, by name; the names of prepared cases end in a digest of their source"
    return {p.relative_to(out).as_posix():content(p) for o in job.facts for p in sorted(Path(out).glob(o))}

def hidden(out) -> list:
    "Hidden files and drafts below a folder and beside it"
    return sorted(str(p) for q in (Path(out),) for p in [*q.rglob('.*'), *q.parent.glob('.*')] if p.name!='.covid3d-demo')

@pytest.fixture(scope='module')
def whole(world):
    "An uninterrupted run of each command, made once: its answer and its facts"
    d,s = world; done = {}
    def get(name):
        if name not in done:
            job,out = jobs(d)[name],d/'whole'/name
            if name=='cases': out.mkdir(parents=True)
            res = s(command(job, out)); assert res['status']==0, res
            done[name] = res['secs'],facts(job, out)
            assert done[name][1] and hidden(out)==[]
        return done[name]
    return get

@pytest.mark.fault('X5')
@pytest.mark.promise('lost')
@pytest.mark.parametrize('name', names)
def test_a_kill_loses_nothing(world, whole, name, tmp_path):
    "A command killed at a random moment and run again ends with the results of an uninterrupted run, and leaves no hidden file"
    (_d,s),job,rng = world,jobs(world[0])[name],np.random.default_rng(int.from_bytes(name.encode(), 'big')%2**32)
    secs,want = whole(name)
    for i in range(kills):
        out = tmp_path/str(i)/'run'
        out.parent.mkdir()
        if name=='cases': out.mkdir()
        res = s(command(job, out), after=float(rng.uniform(0, secs)))
        assert res['status'] in (0,-9), res
        if res['status']==-9 or job.again!=['--resume']: res = s(command(job, out, again=True)); assert res['status']==0, (i, res)
        assert facts(job, out)==want, i
        assert hidden(out)==[], i
        shutil.rmtree(out)

@pytest.mark.fault('X12')
@pytest.mark.promise('lost')
@pytest.mark.parametrize('name', names)
def test_two_at_once(world, whole, name, tmp_path):
    "Of two commands started in one folder the second is told, and the first ends as if it had been alone"
    (_d,s),job,out = world,jobs(world[0])[name],tmp_path/'run'
    _,want = whole(name)
    if name=='cases': out.mkdir()
    res = s(command(job, out), beside=command(job, out, again=True), lock=str(out/job.lock))
    assert res['status']==0, res
    assert res['second'] and res['second']['status']==2 and 'another process' in res['second']['err'], res['second']
    assert facts(job, out)==want and hidden(out)==[]
