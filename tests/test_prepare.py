"Prepared cases: never stale, never half, whoever kills what; and DataLoaders on top of them with fork and spawn"
import json, os, random, shutil, signal, subprocess, sys, time

import nibabel as nib, numpy as np, pandas as pd, pytest, torch
from fastai.data.all import DataBlock, IndexSplitter, RandomSplitter

from covid3d.augment import ct_aug_transforms
from covid3d.cases import read_cases
from covid3d.cli import main
from covid3d.data import CaseReader, CTBlock, CTDataLoaders, LesionBlock, prepare_table, stratified_folds
from covid3d.dicom import write_series
from covid3d.phantom import phantom, write_phantoms
from covid3d.prepare import Prepared, fingerprint, open_prepared, prepare_case, prepare_cases, tidy
from covid3d.transforms import CTSpec, RandomPatch, resample_mask, size_at
from covid3d.volume import CTError, save_volume

each = pytest.mark.parametrize
spec = CTSpec(spacing=(9,5,5), patch=(16,48,48))

@pytest.fixture(scope='module')
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp('source')
    write_phantoms(root, n=4, seed=0, shape=(32,96,96), spacing=(9,3.7,3.7))
    return root

@pytest.fixture
def root(source, tmp_path): return shutil.copytree(source, tmp_path/'data')

def folders(p): return sorted(o.name for o in p.iterdir() if not o.name.startswith('.'))

# Never stale

def rewrite(p, f):
    img = nib.load(p); nib.save(nib.Nifti1Image(f(np.asarray(img.dataobj)), img.affine), p)

@each('kind', ['ct','infection_mask','lung_mask'])
def test_changed_source_is_prepared_anew(root, tmp_path, kind):
    case = read_cases(root/'cases.csv')[0]
    a = prepare_case(case, spec, tmp_path/'p')
    rewrite(root/kind/'phantom_000.nii.gz', lambda x: x[::-1].copy())
    b = prepare_case(case, spec, tmp_path/'p')
    assert len(folders(tmp_path/'p'))==2
    same = dict(ct=torch.equal(a.ct, b.ct), infection_mask=torch.equal(a.masks, b.masks), lung_mask=np.array_equal(a.at['body'], b.at['body']))
    assert [k for k,v in same.items() if not v]==[kind]
    tidy(tmp_path/'p', [case], spec); assert len(folders(tmp_path/'p'))==1

@each('change', [dict(spacing=(9,6,6)), dict(window=(-1000,300)), dict(classes=('lesion','lung'))], ids=lambda o: [*o][0])
def test_changed_spec_is_prepared_beside(root, tmp_path, change):
    case,other = read_cases(root/'cases.csv')[0],CTSpec(**{**dict(spacing=(9,5,5), patch=(16,48,48)), **change})
    a,b = (prepare_case(case, s, tmp_path/'p') for s in (spec,other))
    assert len(folders(tmp_path/'p'))==2 and (a.ct.shape!=b.ct.shape or not torch.equal(a.ct, b.ct) or a.masks.shape!=b.masks.shape)
    tidy(tmp_path/'p', [case], spec); assert len(folders(tmp_path/'p'))==2  # the other spec's stays

def test_patch_size_is_no_reason_to_prepare_anew(root):
    case = read_cases(root/'cases.csv')[0]
    assert fingerprint(case, spec)==fingerprint(case, CTSpec(spacing=(9,5,5), patch=(8,32,32)))

def test_dicom_series_that_grew(tmp_path):
    ph = phantom(0, (32,96,96), (9,3.7,3.7))
    write_series(ph.ct, tmp_path/'ct'/'a'); save_volume(ph.lesion, tmp_path/'infection_mask'/'a.nii.gz')
    from covid3d.datasets import folder
    case, = read_cases(folder(tmp_path, layout='plain'))
    a = fingerprint(case, spec)
    write_series(ph.ct, tmp_path/'ct'/'a', series=2); assert fingerprint(case, spec)!=a

# Never half

@each('name', ['ct.npy','masks.npy','lesion.npy','body.npy','info.json'])
@each('damage', ['gone','empty','cut','noise'])
def test_damaged_case_is_replaced(root, tmp_path, name, damage):
    case = read_cases(root/'cases.csv')[0]
    p = prepare_case(case, spec, tmp_path/'p'); want = Prepared(p.ct.clone(), p.masks.clone(), p.at, p.info); del p  # a mapped file must not shrink
    f = tmp_path/'p'/folders(tmp_path/'p')[0]/name; raw = f.read_bytes()
    if damage=='gone': f.unlink()
    else: f.write_bytes(dict(empty=b'', cut=raw[:len(raw)//2], noise=bytes(len(raw)))[damage])
    assert open_prepared(f.parent) is None
    got = prepare_case(case, spec, tmp_path/'p')
    assert torch.equal(got.ct, want.ct) and torch.equal(got.masks, want.masks) and all(np.array_equal(got.at[k], want.at[k]) for k in want.at)

prepare = '''
import sys, covid3d.prepare as p, time
from covid3d.cases import read_cases
from covid3d.transforms import CTSpec
real = p._write
def slow(folder, arrays, info):
    print('writing', flush=True)
    for k,a in arrays.items():
        real(folder, {k:a}, info); (folder/'info.json').unlink(); time.sleep(float(sys.argv[3]))
    real(folder, {}, info)
p._write = slow
print(sum(isinstance(o, p.Prepared) for o in p.prepare_cases(read_cases(sys.argv[1]), CTSpec(spacing=(9,5,5), patch=(16,48,48)), sys.argv[2], 1)))'''

def start(table, out, pause): return subprocess.Popen([sys.executable, '-c', prepare, str(table), str(out), str(pause)], stdout=subprocess.PIPE, text=True)

def test_killed_and_continued(root, tmp_path):
    "SIGKILL in the middle of writing, several times: no half case is ever read, and the next run makes what is missing"
    rng,out = random.Random(0),tmp_path/'p'
    for _ in range(4):
        p = start(root/'cases.csv', out, .1); p.stdout.readline(); time.sleep(rng.uniform(0, .5)); p.send_signal(signal.SIGKILL); p.wait()
        assert all(isinstance(open_prepared(out/o), Prepared) for o in folders(out))
    done = prepare_cases(read_cases(root/'cases.csv'), spec, out)
    assert all(isinstance(o, Prepared) for o in done) and len(folders(out))==4
    left = list(out.glob('.making-*')); assert left
    for o in left: os.utime(o, (0,0))
    tidy(out); assert not list(out.glob('.making-*')) and len(folders(out))==4

def test_two_processes_at_once(root, tmp_path):
    "Both finish, one result each, nothing left behind"
    ps = [start(root/'cases.csv', tmp_path/'p', .02) for _ in range(2)]
    assert [p.communicate()[0].split()[-1] for p in ps]==['4','4'] and [p.returncode for p in ps]==[0,0]
    assert len(folders(tmp_path/'p'))==4 and not list((tmp_path/'p').glob('.making-*'))
    assert all(isinstance(open_prepared(tmp_path/'p'/o), Prepared) for o in folders(tmp_path/'p'))

def test_disk_full(root, tmp_path, monkeypatch):
    "One line, nothing half, and the next try works"
    case = read_cases(root/'cases.csv')[0]
    real = np.save
    def full(f, a): raise OSError(28, 'No space left on device')
    monkeypatch.setattr(np, 'save', full)
    with pytest.raises(CTError, match='cannot be written \\(No space left'): prepare_case(case, spec, tmp_path/'p')
    assert not list((tmp_path/'p').iterdir())
    monkeypatch.setattr(np, 'save', real); assert isinstance(prepare_case(case, spec, tmp_path/'p'), Prepared)

def test_source_is_never_touched(root, tmp_path):
    "Writing to a patch does not change the files (copy on write)"
    case = read_cases(root/'cases.csv')[0]
    p = prepare_case(case, spec, tmp_path/'p'); f = tmp_path/'p'/folders(tmp_path/'p')[0]/'ct.npy'; raw = f.read_bytes()
    p.ct.fill_(7); p.masks.fill_(1)
    assert f.read_bytes()==raw and not (open_prepared(f.parent).ct==7).all()

# On the command line

def test_prepare_then_train(root, tmp_path, capfd):
    run = lambda *a: main([str(o) for o in a])
    assert run('prepare', root/'cases.csv', '--out', tmp_path/'p', '--spacing','9,5,5','--patch','16,48,48')==0
    out = capfd.readouterr().out; assert '4 of 4 cases' in out and f'covid3d train {tmp_path/"p"}' in out
    before = {o:(tmp_path/'p'/o).stat().st_mtime_ns for o in folders(tmp_path/'p') if '-' in o}
    assert run('train', tmp_path/'p', '--out', tmp_path/'run', '--weights','random','--width','4','--epochs','1','--patches','2','--device','cpu')==0
    assert {o:(tmp_path/'p'/o).stat().st_mtime_ns for o in before}==before
    from covid3d.inference import load_model
    assert load_model(tmp_path/'run'/'model.safetensors')[1]==spec
    assert not (root/'cases_prepared').exists()

def test_bad_scan_costs_only_itself(root, tmp_path, capfd):
    (root/'ct'/'phantom_001.nii.gz').write_bytes(b'\x1f\x8b broken')
    assert main(['prepare', str(root/'cases.csv'), '--out', str(tmp_path/'p'), '--spacing','9,5,5'])==1
    out = capfd.readouterr(); assert '3 of 4 cases' in out.out and out.err.count('\n')==1 and 'phantom_001.nii.gz: the gzip stream is damaged' in out.err
    assert [c.name for c in read_cases(tmp_path/'p'/'cases.csv')]==['phantom_000','phantom_002','phantom_003']

def test_wrong_use(root, tmp_path, capfd):
    for argv,word in ((['prepare',root/'cases.csv'],'--out'), (['prepare',root/'cases.csv','--out',tmp_path/'p','--classes','liver'],'liver'), (['prepare',root/'cases.csv','--out',tmp_path/'p','--workers','0'],'workers'),
                      (['prepare',root/'none.csv','--out',tmp_path/'p'],'no such case table'), (['prepare',root/'cases.csv','--out',tmp_path/'p','--spacing','.001,.001,.001'],'spacing')):
        assert main([str(o) for o in argv]) in (1,2)
        err = capfd.readouterr().err; assert word in err and 'Traceback' not in err

# DataLoaders

@each('how', ['fork','spawn'])
def test_workers(root, how):
    dls = CTDataLoaders.from_table(root/'cases.csv', spec, bs=2, patches=3, num_workers=2, multiprocessing_context=how) if how=='spawn' else CTDataLoaders.from_table(root/'cases.csv', spec, bs=2, patches=3, num_workers=2)
    assert sum(len(x) for x,_ in dls.train)==len(dls.train_ds)//2*2
    x,y = dls.valid.one_batch(); assert x.dtype==torch.float32 and x.max()<=1 and set(y.unique().tolist())<={0,1}

def test_prepared_beside_the_table_and_used_again(root):
    CTDataLoaders.from_table(root/'cases.csv', spec).one_batch()
    first = {o:(root/'cases_prepared'/o).stat().st_mtime_ns for o in folders(root/'cases_prepared')}
    CTDataLoaders.from_table(root/'cases.csv', spec).one_batch()
    assert {o:(root/'cases_prepared'/o).stat().st_mtime_ns for o in folders(root/'cases_prepared')}.items()>=first.items() and first

def test_own_getters_splitters_and_transforms(root):
    "The pieces compose as in fastai: any items, any splitter, augmentation as item or batch transform"
    df = pd.read_csv(root/'cases.csv').fillna('')
    cases,reader = {c.name:c for c in read_cases(root/'cases.csv')},CaseReader(spec, root/'p')
    for kw in (dict(item_tfms=RandomPatch(spec.patch)), dict(item_tfms=[RandomPatch(spec.patch), ct_aug_transforms(spec.spacing)]), dict(item_tfms=RandomPatch(spec.patch), batch_tfms=ct_aug_transforms(spec.spacing))):
        block = DataBlock((CTBlock(reader), LesionBlock(reader)), get_items=lambda o: list(o.case), get_x=lambda o: cases[o], get_y=lambda o: cases[o], splitter=RandomSplitter(.25, seed=0), **kw)
        dls = block.dataloaders(df, bs=2)
        x,y = dls.one_batch(); assert x.shape==(2,1,16,48,48) and y.shape==(2,1,16,48,48) and x.dtype==torch.float32 and 0<=x.min()<=x.max()<=1
        assert dls.train.new(bs=1).one_batch()[0].shape[0]==1 and dls.test_dl(['phantom_001'], with_labels=True).one_batch()[0].shape[0]==1
        dls.show_batch(max_n=2)

@each('n,k', [(20,5), (21,5), (7,2), (5,5), (40,3)])
def test_folds(n, k):
    "Every patient in one fold, fold sizes differ by one at most, loads are spread more evenly than by chance"
    from covid3d.cases import Case
    rng = np.random.default_rng(n)
    cases = [Case(f's{i}', 'x', patient=f'p{i//2}') for i in range(2*n)]
    loads = np.repeat(rng.lognormal(3, 1.5, n), 2)
    fold = stratified_folds(cases, loads, k)
    assert all(fold[2*i]==fold[2*i+1] for i in range(n))
    size = np.bincount(fold, minlength=k)/2; assert size.max()-size.min()<=1
    spread = lambda f: np.std([np.log(loads[np.array(f)==j]).mean() for j in range(k)])
    chance = [spread(np.repeat(rng.permutation(np.arange(n)%k), 2)) for _ in range(200)]
    if n//k>1: assert spread(fold)<np.median(chance)

# Volumes

@each('spacing', [(4,2.8,2.8), (6,4,4)])
def test_small_lesions_keep_their_volume_at_the_training_spacing(spacing):
    "Ellipsoids of 0.1 to 2 ml put anywhere on a grid of 3×1.4×1.4 mm: within 10 % on average, and none is lost"
    rng,ratio = np.random.default_rng(0),[]
    for _ in range(60):
        mm = rng.uniform(3, 8, 3); at = rng.uniform(15, 25, 3)*(1,2,2)
        fine = (sum(((g-c)*s/r)**2 for g,c,s,r in zip(np.indices((40,80,80)), at, (3,1.4,1.4), mm))<1).astype(np.uint8)
        size = [round(n*s/t) for n,s,t in zip(fine.shape, (3,1.4,1.4), spacing)]
        ratio.append(float(resample_mask(fine, size).sum())*np.prod([a/b for a,b in zip(fine.shape, size)])/fine.sum())
    assert abs(np.mean(ratio)-1)<.1 and min(ratio)>.3
