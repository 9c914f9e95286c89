"Prepared cases: never stale, never half, whoever kills what; and DataLoaders on top of them with fork and spawn"
import json, os, random, shutil, signal, stat, subprocess, sys, time, zlib
from dataclasses import replace
from pathlib import Path

import cc3d, nibabel as nib, numpy as np, pandas as pd, pytest, torch
from fastai.data.all import DataBlock, RandomSplitter

from covid3d.augment import ct_aug_transforms
from covid3d.cases import read_cases
from covid3d.cli import main
from covid3d.data import CTBlock, CTDataLoaders, LesionBlock, prepare_table, stratified_folds
from covid3d.dicom import write_series
from covid3d.prepare import (Prepared, PreparedCase, _arrays, _body, _content, _digest, _files, _map, _positions, _put, _sealed, _stat, _write, find_prepared, fingerprint, open_prepared,
                             prepare_case, prepare_cases, tidy)
from covid3d.patches import RandomPatch, TensorCT
from covid3d.phantom import phantom, write_phantoms
from covid3d.transforms import CTSpec, ResizeSpec, apply_window, body_ml, crop, resample_image, resample_mask, resize, size_at
from covid3d.volume import CTError, Volume, canonical_affine, open_mask, save_volume, scan_digest
from coarse import cached, write_coarse

each,fault,promise = pytest.mark.parametrize,pytest.mark.fault,pytest.mark.promise
spec = CTSpec(spacing=(9,5,5), patch=(16,48,48))

@pytest.fixture(scope='module')
def source(tmp_path_factory):
    root = tmp_path_factory.mktemp('source')
    write_coarse(root, n=4, seed=0)
    return root

@pytest.fixture
def root(source, tmp_path): return shutil.copytree(source, tmp_path/'data')

def folders(p): return sorted(o.name for o in p.iterdir() if not o.name.startswith('.'))

# Never stale

def rewrite(p, f):
    img = nib.load(p); nib.save(nib.Nifti1Image(f(np.asarray(img.dataobj)), img.affine), p)

@fault('K13')
@promise('silent')
@each('kind', ['ct','infection_mask','lung_mask'])
def test_changed_source_is_prepared_anew(root, tmp_path, kind):
    "A prepared case whose scan or mask has changed is prepared anew"
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
    ph = cached(0)
    write_series(ph.ct, tmp_path/'ct'/'a'); save_volume(ph.lesion, tmp_path/'infection_mask'/'a.nii.gz')
    from covid3d.datasets import folder
    case, = read_cases(folder(tmp_path, layout='plain'))
    a = fingerprint(case, spec)
    write_series(ph.ct, tmp_path/'ct'/'a', series=2); assert fingerprint(case, spec)!=a

# Never half

@fault('K13')
@promise('silent')
@each('name', ['ct.npy','masks.npy','lesion.npy','body.npy','info.json'])
@each('damage', ['gone','empty','cut','noise','bit','longer','pipe'])
def test_K13_damaged_case_is_made_again(root, tmp_path, name, damage, capfd):
    "A prepared case in which one bit is damaged is made again, with a note"
    case = read_cases(root/'cases.csv')[0]
    p = prepare_case(case, spec, tmp_path/'p'); want = Prepared(p.ct.clone(), p.masks.clone(), p.at, p.info); del p  # a mapped file must not shrink
    f = tmp_path/'p'/folders(tmp_path/'p')[0]/name; raw = f.read_bytes()
    if damage in ('gone','pipe'): f.unlink()
    if damage=='pipe': os.mkfifo(f)
    bit = bytearray(raw); bit[len(raw)*9//10] ^= 1
    if damage not in ('gone','pipe'): f.write_bytes(dict(empty=b'', cut=raw[:len(raw)//2], noise=bytes(len(raw)), bit=bytes(bit), longer=raw+b'\0')[damage])
    if name=='info.json' and damage in ('bit','longer'): return  # JSON; its fields are tried below
    assert open_prepared(f.parent) is None and find_prepared(case, spec, tmp_path/'p') is None
    got = prepare_case(case, spec, tmp_path/'p')
    assert torch.equal(got.ct, want.ct) and torch.equal(got.masks, want.masks) and all(np.array_equal(got.at[k], want.at[k]) for k in want.at)
    assert f'note: {case.name}: {name}' in capfd.readouterr().err and folders(tmp_path/'p')==[f.parent.name] and not [*(tmp_path/'p').glob('.*')]

def put(root, tmp_path):
    case = read_cases(root/'cases.csv')[0]
    prepare_case(case, spec, tmp_path/'p')
    return case,tmp_path/'p'/folders(tmp_path/'p')[0]

odd = ['x', None, -1, 2**70, [], {}, True, '../x', float('inf')]
@fault('K13')
@each('key', ['covid3d','version','case','shape','spacing','window','classes','lesion_ml','body_ml','digest','stamp','at','crc'])
def test_every_field_of_info_is_checked(root, tmp_path, key):
    case,f = put(root, tmp_path)
    good = json.loads((f/'info.json').read_text()); assert {*good}>={key}
    ok = dict(case=['x','../x'], version=[], lesion_ml=[2**70], body_ml=[2**70], spacing=[None])
    for v in (o for o in odd if not any(o is k or o==k and type(o) is type(k) for k in ok.get(key, []))):
        (f/'info.json').write_text(json.dumps(good|{key:v})); assert open_prepared(f) is None, v
    (f/'info.json').write_text(json.dumps({k:v for k,v in good.items() if k!=key})); assert open_prepared(f) is None
    for k in (good[key] if isinstance(good[key], dict) else ()):
        for v in odd:
            (f/'info.json').write_text(json.dumps(good|{key:good[key]|{k:v}})); assert open_prepared(f) is None
    if key in ('shape','spacing'):
        for v in (o for o in odd if o is not True):
            (f/'info.json').write_text(json.dumps(good|{key:[v,*good[key][1:]]})); assert open_prepared(f) is None
    (f/'info.json').write_text(json.dumps(good)); assert open_prepared(f)

def forge(f, name, a):
    "Another array in a prepared case, with the right checksum"
    import zlib
    np.save(f/name, a); info = json.loads((f/'info.json').read_text()); info['crc'][name[:-4]] = zlib.crc32(np.ascontiguousarray(a).tobytes())
    (f/'info.json').write_text(json.dumps(info))

@fault('K13')
@promise('executed')
@each('name,change', [('masks.npy',lambda a: a*2), ('masks.npy',lambda a: a.astype(bool)), ('ct.npy',lambda a: a.astype(np.int16)), ('ct.npy',lambda a: a[0]), ('ct.npy',lambda a: np.asfortranarray(a)),
    ('ct.npy',lambda a: a.astype(object)), ('lesion.npy',lambda a: a-10**6), ('lesion.npy',lambda a: a+10**8), ('lesion.npy',lambda a: a.astype(float)), ('body.npy',lambda a: a.astype(np.int64))])
def test_arrays_of_a_stranger_are_checked(root, tmp_path, name, change):
    "Prepared cases from somebody else can run nothing, and hold only types, shapes and values that fit"
    case,f = put(root, tmp_path); forge(f, name, np.load(f/name)); assert open_prepared(f)
    forge(f, name, change(np.load(f/name))) if change(np.zeros(1)).dtype!=object else np.save(f/name, np.array([print], object))
    assert open_prepared(f) is None

@each('header', ["{'descr': '|u1', 'fortran_order': False, 'shape': (1, 99999999, 99999, 9999)}", "__import__('os').abort()", '('*900, "{'descr': [('a','O')], 'fortran_order': False, 'shape': ()}", "{'shape': 5}", '\0'*200])
def test_headers_of_a_stranger_are_checked(root, tmp_path, header):
    case,f = put(root, tmp_path); raw = header.encode().ljust(246)+b'\n'
    (f/'masks.npy').write_bytes(b'\x93NUMPY\x01\x00'+len(raw).to_bytes(2, 'little')+raw+bytes(5000)); assert open_prepared(f) is None

# Known by content

@promise('works')
def test_moved_data_set_is_not_prepared_again(root, tmp_path, monkeypatch):
    "A data set that was moved or copied is known by its content"
    case,f = put(root, tmp_path); before = (f/'ct.npy').stat().st_mtime_ns
    shutil.copytree(root, tmp_path/'elsewhere', copy_function=shutil.copyfile); shutil.rmtree(root)
    there = read_cases(tmp_path/'elsewhere'/'cases.csv')[0]
    import covid3d.prepare as module
    reads,real = [],module._content
    monkeypatch.setattr(module, '_content', lambda p: (reads.append(p), real(p))[1])
    for _ in range(2): prepare_case(there, spec, tmp_path/'p')
    assert len(reads)==3 and folders(tmp_path/'p')==[f.name] and (f/'ct.npy').stat().st_mtime_ns==before  # read once: then the new paths and times are known
    monkeypatch.setattr(module, '_content', real); assert fingerprint(there, spec)==f.name[-16:]

def test_any_file_of_a_series_stands_for_all_of_it(tmp_path):
    from covid3d.cases import Case
    ph = cached(0)
    write_series(ph.ct, tmp_path/'a'); save_volume(ph.lesion, tmp_path/'m.nii.gz')
    one = sorted((tmp_path/'a').iterdir()); case = Case('a', one[3], dict(lesion=tmp_path/'m.nii.gz'))
    was = fingerprint(case, spec); one[7].unlink(); assert fingerprint(case, spec)!=was

def test_info_knows_the_scan(root, tmp_path):
    case = read_cases(root/'cases.csv')[0]; ct,info = case.open_ct(),prepare_case(case, spec, tmp_path/'p').info
    assert info['digest']==scan_digest(ct) and info['body_ml']==body_ml(ct)>info['lesion_ml']>0

@pytest.mark.skipif(os.name=='nt', reason='Windows has no such modes')
def test_others_may_read_what_the_umask_lets_them(root, tmp_path):
    old = os.umask(0o027)
    try: _,f = put(root, tmp_path)
    finally: os.umask(old)
    assert stat.S_IMODE(f.stat().st_mode)==0o750 and stat.S_IMODE((f/'ct.npy').stat().st_mode)==0o640

# Nothing of others

@promise('lost')
def test_nothing_of_others_is_removed(root, tmp_path):
    "Tidying prepared cases removes only what covid3d wrote"
    case,f = put(root, tmp_path); p = tmp_path/'p'
    lung = (root/'lung_mask'/'phantom_000.nii.gz').read_bytes()
    theirs = [p/f'{case.name}-{"a"*16}'/'thesis.tex', p/f'{case.name}-notes'/'info.json', f/'notes.txt', p/'.making-mine'/'x', p/'x.tmp']
    for o in theirs: o.parent.mkdir(exist_ok=True); o.write_text('years of work')
    (p/f'{case.name}-{"b"*16}').symlink_to(root)
    rewrite(root/'lung_mask'/'phantom_000.nii.gz', lambda x: x[::-1].copy())
    prepare_case(case, spec, p); tidy(p, [case], spec)
    assert all(o.read_text()=='years of work' for o in theirs) and (root/'cases.csv').exists()
    (root/'lung_mask'/'phantom_000.nii.gz').write_bytes(lung)  # as it was: its folder is needed again, and whole
    prepare_case(case, spec, p); assert (f/'ct.npy').exists() and (f/'notes.txt').exists()

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

@fault('X5')
def test_killed_and_continued(root, tmp_path):
    "SIGKILL in the middle of writing, several times: no half case is ever read, and the next run makes what is missing"
    rng,out = random.Random(0),tmp_path/'p'
    for _ in range(4):
        p = start(root/'cases.csv', out, .1); p.stdout.readline(); time.sleep(rng.uniform(0, .5)); p.send_signal(signal.SIGKILL); p.wait()
        assert all(isinstance(open_prepared(out/o), Prepared) for o in folders(out))
    done = prepare_cases(read_cases(root/'cases.csv'), spec, out)
    assert all(isinstance(o, Prepared) for o in done) and len(folders(out))==4
    assert not [*out.glob('.*')] and len(folders(out))==4

def test_two_processes_at_once(root, tmp_path):
    "Both finish, one result each, nothing left behind"
    ps = [start(root/'cases.csv', tmp_path/'p', .02) for _ in range(2)]
    assert [p.communicate()[0].split()[-1] for p in ps]==['4','4'] and [p.returncode for p in ps]==[0,0]
    assert len(folders(tmp_path/'p'))==4 and not list((tmp_path/'p').glob('.*'))
    assert all(isinstance(open_prepared(tmp_path/'p'/o), Prepared) for o in folders(tmp_path/'p'))

@fault('X6')
def test_disk_full(root, tmp_path, monkeypatch):
    "One line, nothing half, and the next try works"
    case = read_cases(root/'cases.csv')[0]
    real = np.save
    def full(f, a, **kwargs): raise OSError(28, 'No space left on device')
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
    before = {o:(tmp_path/'p'/o).stat().st_mtime_ns for o in folders(tmp_path/'p') if '-' in o}; assert len(before)==4
    assert run('train', tmp_path/'p', '--out', tmp_path/'run', '--init','random','--width','4','--epochs','1','--patches','2','--device','cpu')==0
    assert {o:(tmp_path/'p'/o).stat().st_mtime_ns for o in before}==before
    from covid3d.weights import load_model
    assert load_model(tmp_path/'run'/'model.safetensors')[1]==spec
    assert not (root/'cases_prepared').exists()

@fault('X14')
def test_X14_bad_scan_costs_only_itself(root, tmp_path, capfd):
    (root/'ct'/'phantom_001.nii.gz').write_bytes(b'\x1f\x8b broken')
    assert main(['prepare', str(root/'cases.csv'), '--out', str(tmp_path/'p'), '--spacing','9,5,5'])==1
    out = capfd.readouterr(); assert '3 of 4 cases' in out.out and out.err.count('\n')==1 and 'phantom_001' in out.err and 'the gzip stream is damaged' in out.err
    df = pd.read_csv(tmp_path/'p'/'cases.csv', dtype=str).fillna('')
    assert [*df.case]==[f'phantom_00{i}' for i in range(4)] and [*df.not_prepared]==['','failed','','']

@promise('silent')
@each('error', [MemoryError(), RuntimeError("[enforce fail at alloc_cpu.cpp:119] DefaultCPUAllocator: can't allocate memory"), OSError(5, 'Input/output error'), CTError('x', 'is odd', 'Look')], ids=lambda e: type(e).__name__)
def test_a_scan_too_large_costs_only_itself(root, tmp_path, capfd, monkeypatch, error):
    "A scan that is too large for the memory is named, and the others are prepared"
    import covid3d.prepare as module
    real = module._arrays
    def fails(case, spec):
        if case.name=='phantom_002': raise error
        return real(case, spec)
    monkeypatch.setattr(module, '_arrays', fails)
    assert main(['prepare', str(root/'cases.csv'), '--out', str(tmp_path/'p'), '--spacing','9,5,5'])==1
    out = capfd.readouterr(); assert '3 of 4 cases' in out.out and out.err.count('\n')==1 and out.err.startswith('phantom_002' if not isinstance(error, CTError) else 'x') and str(root) not in out.err

@fault('X1')
@promise('lost')
def test_the_table_that_is_read_is_never_replaced(root, tmp_path, capfd):
    "`prepare proj/cases.csv --out proj` is refused: the table stays as it was"
    raw = (root/'cases.csv').read_bytes(); shutil.copy(root/'cases.csv', root/'other.csv')
    for table in (root/'cases.csv', root/'other.csv', root/'..'/root.name/'cases.csv'):
        assert main(['prepare', str(table), '--out', str(root), '--spacing','9,5,5'])==2
        assert (root/'cases.csv').read_bytes()==raw and 'cases.csv' in capfd.readouterr().err
    (tmp_path/'p').mkdir(); (tmp_path/'p'/'spec.json').write_text('mine')
    assert main(['prepare', str(root/'cases.csv'), '--out', str(tmp_path/'p'), '--spacing','9,5,5'])==2 and 'not written by covid3d' in capfd.readouterr().err
    assert [o.name for o in (tmp_path/'p').iterdir()]==['spec.json'] and (tmp_path/'p'/'spec.json').read_text()=='mine'

@promise('lost')
def test_all_rows_and_columns_are_kept(root, tmp_path):
    "The table of a prepared folder has all rows and columns of its source"
    df = pd.read_csv(root/'cases.csv', dtype=str).fillna('').assign(age=['61','','n/a','007'], note=['=1+1','a,b','"x"',''], outline=['ct/phantom_000.nii.gz','','/home/ann/x.json',''])
    df.loc[1,'lesion'] = ''; df.to_csv(root/'wide.csv', index=False)
    (root/'ct'/'phantom_002.nii.gz').write_bytes(b'')
    prepare_table(root/'wide.csv', tmp_path/'p', spec)
    got = pd.read_csv(tmp_path/'p'/'cases.csv', dtype=str, keep_default_na=False)
    kept = ['case','patient','dataset','split','already_windowed','age']
    assert got[kept].equals(df[kept]) and [*got.not_prepared]==['','without a mask of lesion','failed',''] and [*got.note]==["'=1+1",'a,b','"x"',''] and not any(got.outline)

@fault('X12')
@promise('lost')
def test_X12_two_at_once_in_one_folder(root, tmp_path):
    "The second of two `prepare` in one folder is refused"
    from covid3d.files import locked
    with locked(tmp_path/'p'):
        second = subprocess.run([sys.executable, '-m', 'covid3d.cli', 'prepare', str(root/'cases.csv'), '--out', str(tmp_path/'p')], capture_output=True, text=True)
    assert second.returncode==2 and 'another process is writing there' in second.stderr and not (tmp_path/'p'/'cases.csv').exists()

@promise('works')
def test_a_prepared_folder_trains_without_the_scans(root, tmp_path, capfd):
    "A prepared folder trains after it was moved and the scans were deleted, to the same weights"
    run = lambda *a: main([str(o) for o in a])
    train = lambda p, out: run('train', p, '--out', out, '--init','random','--width','4','--epochs','1','--patches','2','--device','cpu','--examples','0')
    assert run('prepare', root/'cases.csv', '--out', tmp_path/'p', '--spacing','9,5,5','--patch','16,48,48')==0 and train(tmp_path/'p', tmp_path/'first')==0
    shutil.move(tmp_path/'p', tmp_path/'q'); shutil.rmtree(root); (tmp_path/'q'/'sources.json').unlink()
    capfd.readouterr(); assert train(tmp_path/'q', tmp_path/'second')==0, capfd.readouterr().err
    assert 'scans are not at hand' in capfd.readouterr().err and not [o for o in (tmp_path/'q').rglob('.*')]
    from covid3d.weights import load_model
    a,b = (load_model(tmp_path/o/'model.safetensors')[0].state_dict() for o in ('first','second'))
    assert all(torch.equal(a[k], b[k]) for k in a)  # on one machine, with one setting

@promise('works')
def test_damaged_without_the_scans_is_refused(root, tmp_path, capfd):
    "A damaged prepared case whose scan is gone is refused, in one line"
    prepare_table(root/'cases.csv', tmp_path/'p', spec); shutil.rmtree(root)
    for f in (tmp_path/'p').glob('*/masks.npy'): raw = bytearray(f.read_bytes()); raw[-99] ^= 1; f.write_bytes(raw)
    assert main(['train', str(tmp_path/'p'), '--out', str(tmp_path/'run'), '--init','random','--width','4','--epochs','1','--device','cpu'])==2
    err = capfd.readouterr().err; assert 'masks.npy' in err and 'damaged' in err and 'Traceback' not in err

@promise('named')
def test_no_path_of_a_scan_in_the_prepared_table(root, tmp_path, capfd):
    "No name of a folder or file of the scans stands in a prepared folder, but for `sources.json`"
    shutil.move(root/'ct', root/'Mueller_Anna'); shutil.move(root/'Mueller_Anna'/'phantom_001.nii.gz', root/'Mueller_Anna'/'Schmidt.nii.gz')
    df = pd.read_csv(root/'cases.csv', dtype=str).fillna(''); df['ct'] = df.ct.str.replace('ct/','Mueller_Anna/').str.replace('phantom_001.nii','Schmidt.nii'); df.to_csv(root/'cases.csv', index=False)
    (root/'Mueller_Anna'/'phantom_003.nii.gz').write_bytes(b'')
    assert main(['prepare', str(root/'cases.csv'), '--out', str(tmp_path/'p'), '--spacing','9,5,5'])==1
    texts = [o.read_bytes() for o in (tmp_path/'p').rglob('*') if o.is_file() and o.name!='sources.json']+[''.join(capfd.readouterr()).replace(str(tmp_path), '').encode()]
    assert len(texts)>15 and not any(k in o for o in texts for k in (b'Mueller',b'Schmidt',str(root).encode()))
    if os.name!='nt': assert stat.S_IMODE((tmp_path/'p'/'sources.json').stat().st_mode)==0o600

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
    cases = {c.name:c for c in read_cases(root/'cases.csv')}
    for kw in (dict(item_tfms=RandomPatch(spec.patch)), dict(item_tfms=[RandomPatch(spec.patch), ct_aug_transforms(spec.spacing)]), dict(item_tfms=RandomPatch(spec.patch), batch_tfms=ct_aug_transforms(spec.spacing))):
        block = DataBlock((CTBlock(spec, root/'p'), LesionBlock(spec)), get_items=lambda o: list(o.case), get_x=lambda o: cases[o], get_y=lambda o: cases[o], splitter=RandomSplitter(.25, seed=0), **kw)
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

def test_images_and_bodies_by_hand():
    "A ramp, a cube of 12 ml and a phantom"
    ramp = Volume((np.indices((10,40,40)).sum(0)*20-1000).astype(np.int16), canonical_affine((5,1,1)))
    assert size_at(ramp, (2,2,2))==(25,20,20)
    small = resample_image(ramp, size_at(ramp, (5,2,2)))
    assert small.shape==(10,20,20) and abs(small[3,4,5]-ramp.data[3,8:10,10:12].mean())<1e-2
    assert torch.allclose(apply_window([-2000,-1000,-300,400,3000], -1000, 400), torch.tensor([0,0,.5,1,1]))
    cube = np.full((10,20,20), -1000, np.int16); cube[2:8,5:15,5:15] = 40
    assert abs(body_ml(Volume(cube, canonical_affine((5,2,2))))-12)<1e-9
    ct = phantom(3, (48,128,128), (6,2.8,2.8)).ct; x = CTSpec(spacing=(6,4,4)).prepare(ct)
    assert 5000<body_ml(ct)<60_000 and x.shape==(1,*size_at(ct, (6,4,4))) and 0<=x.min()<x.max()<=1
    assert ResizeSpec().size(ct)==(20,224,224) and ResizeSpec().prepare(ct).shape==(1,20,224,224)

def test_a_crop_is_padded_wherever_it_leaves_the_scan():
    "Against a scan that was padded on all sides before it was cut"
    x,rng = torch.arange(1., 241.).reshape(2,4,5,6),np.random.default_rng(0)
    wide = torch.nn.functional.pad(x, [20]*6)
    for _ in range(300):
        start,size = rng.integers(-9, 10, 3).tolist(),rng.integers(1, 10, 3).tolist()
        assert torch.equal(crop(x, start, size), wide[(slice(None), *(slice(20+s,20+s+p) for s,p in zip(start, size)))])

def ceiling(mask, spec, shrink=resample_mask):
    "Dice of a perfect mask on the network's grid, brought back to the scan's"
    back = (resize(torch.as_tensor(shrink(mask.data, spec.size(mask))).float(), mask.shape)>=.5).numpy()
    return 2*(back&(mask.data>0)).sum()/(back.sum()+mask.data.sum())

def truncated(mask, size): return resize(torch.from_numpy(mask), size).int()

def test_the_most_that_a_grid_can_score():
    "A perfect network on phantoms: 0.93 or more at the default spacing, below 0.88 for whole scans in one patch, and below 0.7 with masks truncated to int"
    masks = [phantom(i).lesion for i in (3,6,8)]
    score = lambda spec, *shrink: np.mean([ceiling(m, spec, *shrink) for m in masks])
    assert score(ResizeSpec())<.88<.93<score(CTSpec()) and max(score(s, truncated) for s in (ResizeSpec(), CTSpec()))<.7
    assert ceiling(masks[0], ResizeSpec(patch=masks[0].shape))==1

@pytest.mark.skipif(not os.environ.get('COVID3D_TEST_DATA'), reason='COVID3D_TEST_DATA is not set: the folder of real CTs is not part of the repository')
def test_human_masks_keep_their_lesions():
    "Of the pieces of 0.02 to 1 ml in seven human masks none is lost at the default spacing, and a perfect mask scores 0.85 to 0.92 on average"
    paths,left = sorted((Path(os.environ['COVID3D_TEST_DATA'])/'coronacases_7'/'infection_mask').glob('*.nii.gz')),[]
    masks = [open_mask(p) for p in paths]
    for m in masks:
        labels,size = cc3d.connected_components(m.data, connectivity=26),size_at(m, (4,2.8,2.8))
        ml = np.bincount(labels.ravel())*m.ml_per_voxel
        for i in np.flatnonzero((ml>.02)&(ml<1)):
            left.append(float(resample_mask((labels==i).astype(np.uint8), size).sum()/(labels==i).sum())*np.prod(m.shape)/np.prod(size))
    assert len(left)==102 and min(left)>0 and abs(np.mean(left)-1)<.1
    assert all(.85<np.mean([ceiling(m, s) for m in masks])<.92 for s in (CTSpec(), ResizeSpec()))

@pytest.mark.promise('lost')
def test_a_foreign_file_in_a_damaged_case(tmp_path):
    "A prepared case that is damaged, and in which somebody put a file, loses nothing: it is refused as it is"
    table = write_coarse(tmp_path/'data', n=1)
    case,small = read_cases(table)[0],CTSpec(spacing=(9,5,5), patch=(16,48,48))
    prepare_case(case, small, tmp_path/'p')
    home = next((tmp_path/'p').iterdir())
    (home/'ct.npy').write_bytes(b'x'); (home/'notes.txt').write_bytes(b'mine')
    before = {p.name:p.read_bytes() for p in home.iterdir()}
    with pytest.raises(CTError, match='notes.txt: was not written by covid3d'): prepare_case(case, small, tmp_path/'p')
    assert {p.name:p.read_bytes() for p in home.iterdir()}==before

# By hand

def refused(message, f, *args, **kwargs):
    with pytest.raises(CTError) as e: f(*args, **kwargs)
    assert message in str(e.value)

def test_what_stands_for_a_file(tmp_path):
    (tmp_path/'series').mkdir(); a = tmp_path/'series'/'a'
    for k in 'ab': (tmp_path/'series'/k).write_bytes(b'12345')
    assert [o.name for o in _files(tmp_path/'series')]==['a','b'] and [o.name for o in _files(tmp_path/'series'/'b')]==['b','a','b']
    assert _content(a)==[5, zlib.crc32(b'12345'), zlib.adler32(b'12345')]
    was = _stat(a); a.write_bytes(b'123456'); assert _stat(a)!=was
    for odd in ('none.nii','none'): refused('no such file', _files, tmp_path/odd)
    if os.name!='nt': os.mkfifo(tmp_path/'pipe.nii'); refused('no such file', _files, tmp_path/'pipe.nii')

def test_what_a_fingerprint_depends_on(root, tmp_path):
    "Spacing, window, classes and content; not the patch, unless the whole scan is one, nor the place and time of the files"
    case = read_cases(root/'cases.csv')[0]
    specs = [spec, replace(spec, spacing=(9,6,6)), replace(spec, window=(-1000,300)), replace(spec, classes=('lesion','lung')), ResizeSpec(patch=spec.patch), ResizeSpec(patch=(20,48,48))]
    assert len({fingerprint(case, s) for s in specs})==6 and fingerprint(case, replace(spec, patch=(8,32,32)))==fingerprint(case, spec)
    refused("no mask of class 'heart'", fingerprint, case, replace(spec, classes=('heart',)))
    elsewhere = read_cases(Path(shutil.copytree(root, tmp_path/'elsewhere', copy_function=shutil.copyfile))/'cases.csv')[0]
    assert fingerprint(elsewhere, spec)==fingerprint(case, spec) and _digest(elsewhere, spec, _stat)!=_digest(case, spec, _stat)==_digest(case, spec, _stat)

def test_only_the_expected_array_is_mapped(tmp_path):
    np.save(tmp_path/'a.npy', np.arange(6).reshape(2,3)); np.save(tmp_path/'b.npy', np.array([{}], object))  # a pickle inside
    assert _map(tmp_path/'a.npy', np.int64, (2,3)).tolist()==[[0,1,2],[3,4,5]]
    for name,dtype,shape in (('a',np.int64,(3,2)), ('a',np.int32,(2,3)), ('a',np.int64,(2,4)), ('b',np.int64,(1,))): refused('another array', _map, tmp_path/f'{name}.npy', dtype, shape)

def test_positions_by_hand(root):
    "Of 100,000 odd indices 65,536 are kept, spread over all; without a lung mask the brighter half is the body"
    many,case = _positions(np.arange(200_000)%2),read_cases(root/'cases.csv')[0]
    assert _positions(np.array([[0,1,0],[1,0,1]])).tolist()==[1,3,5] and len(many)==65_536 and (many%2==1).all() and (np.diff(many)>0).all() and abs(many.mean()/1e5-1)<.01
    assert _body(replace(case, masks={}), None, None, np.array([0,0,0,200,100])).tolist()==[False,False,False,True,True]

def test_the_arrays_of_a_case(root, tmp_path):
    "Intensities to half a step of a byte, the resampled mask, all of its positions, the volume of the original; also where the whole scan is one patch"
    case = read_cases(write_phantoms(tmp_path/'data6', n=1, seed=6, shape=(32,96,96), spacing=(9,3.7,3.7)))[0]; ct = case.open_ct(); mask = case.open_mask('lesion', ct).data
    for s in (spec, ResizeSpec(patch=(8,40,40))):
        p = prepare_case(case, s, tmp_path/'p')
        assert (p.ct.dtype,p.masks.dtype,p.at['lesion'].dtype,p.at['body'].dtype)==(torch.uint8,torch.uint8,np.int32,np.int32) and tuple(p.ct.shape[1:])==s.size(ct)
        assert (p.ct/255-s.prepare(ct)).abs().max()<=.5/255+1e-6 and torch.equal(p.masks[0], resample_mask(mask, p.ct.shape[1:])) and np.array_equal(p.at['lesion'], np.flatnonzero(p.masks[0]))
        assert (s is not spec or np.isin(p.at['lesion'], p.at['body']).mean()>.98) and abs(p.info['lesion_ml']-mask.sum()*ct.ml_per_voxel)<1e-6  # lesions lie in the lung, but for rounding at its edge
        assert (p.info['digest'],p.info['body_ml'])==(scan_digest(ct),body_ml(ct)) and (p.info['spacing'],p.info.get('patch'))==((list(s.spacing),None) if s is spec else (None,[8,40,40]))
    patch = RandomPatch(spec.patch)((TensorCT(prepare_case(case, spec, tmp_path/'p').ct), prepare_case(case, spec, tmp_path/'p')), split_idx=0)[0]
    assert patch.dtype==torch.uint8 and patch.shape[1:]==spec.patch

def test_the_first_complete_folder_stays(root, tmp_path):
    "A second one is thrown away, a damaged one is replaced, a folder of somebody else is refused"
    arrays,info = _arrays(read_cases(root/'cases.csv')[0], spec); info = _sealed(arrays, info, '0'*16)
    def half_made(name): o = tmp_path/name; o.mkdir(); _write(o, arrays, info); return o
    done = tmp_path/'done'; _put(half_made('a'), done); was = done.stat().st_ino
    _put(half_made('b'), done); assert done.stat().st_ino==was
    (done/'ct.npy').unlink(); _put(tmp_path/'b', done); assert done.stat().st_ino!=was
    assert open_prepared(done).info==info and torch.equal(open_prepared(done).ct, torch.from_numpy(arrays['ct']))
    (tmp_path/'mine').mkdir(); (tmp_path/'mine'/'thesis.tex').touch()
    refused('not written by covid3d', _put, half_made('c'), tmp_path/'mine'); assert (tmp_path/'mine'/'thesis.tex').exists()

def test_a_flipped_bit_is_noticed(root, tmp_path, capfd):
    case = read_cases(root/'cases.csv')[0]; masks = prepare_case(case, spec, tmp_path/'p').masks.clone()
    f = next((tmp_path/'p').iterdir())/'masks.npy'; raw = bytearray(f.read_bytes()); raw[-1000] ^= 1; f.write_bytes(raw)
    assert open_prepared(f.parent) is None and torch.equal(prepare_case(case, spec, tmp_path/'p').masks, masks)
    assert 'masks.npy is damaged: its checksum is not the one noted when it was written; it is prepared again' in capfd.readouterr().err
    broken = Path(shutil.copytree(f.parent, tmp_path/'broken')); (broken/'ct.npy').write_bytes((broken/'ct.npy').read_bytes()[:1000])
    assert (open_prepared(broken),open_prepared(tmp_path))==(None,None)
    refused('Run `covid3d prepare` again', prepare_case, PreparedCase('alone', broken, {'lesion':broken/'masks.npy'}), spec, tmp_path/'none')

def test_the_prepared_form_stands_for_the_scan(root, tmp_path):
    "Prepared once more, it is itself"
    case = read_cases(root/'cases.csv')[0]
    for s in (spec, ResizeSpec(patch=(8,40,40))):
        p = prepare_case(case, s, tmp_path/str(s.patch)); f = next((tmp_path/str(s.patch)).iterdir()); alone = PreparedCase('alone', f, {'lesion':f/'masks.npy'})
        assert ((s.prepare(alone.open_ct())*255).round()-p.ct).abs().max()<1e-3 and np.array_equal(alone.open_mask('lesion', alone.open_ct()).data, p.masks[0].numpy())
        assert torch.equal(prepare_case(alone, s, tmp_path/'none').masks, p.masks)
    f = next((tmp_path/str(spec.patch)).iterdir())
    refused('another spacing, and the scan is not at hand', prepare_case, PreparedCase('alone', f, {'lesion':f/'masks.npy'}), replace(spec, spacing=(9,6,6)), tmp_path/'none')

def test_a_bad_scan_takes_its_place_in_the_list(root, tmp_path):
    cases = read_cases(root/'cases.csv'); prepare_cases(cases, spec, tmp_path/'p')
    made = lambda: {o.name:o.stat().st_mtime_ns for o in (tmp_path/'p').iterdir()}
    first = made(); prepare_cases(cases, spec, tmp_path/'p'); assert made()==first  # nothing is done twice
    bad = replace(cases[3], name='bad', ct=tmp_path/'bad.nii.gz'); bad.ct.write_bytes(b'\x1f\x8b')
    found = prepare_cases([*cases[:2],bad], spec, tmp_path/'p')
    assert [type(o).__name__ for o in found]==['Prepared','Prepared','CTError'] and 'bad' in str(found[2]) and str(tmp_path) not in str(found[2])

def test_what_is_tidied_away(root, tmp_path):
    "A former form goes; another spacing stays, and so does a folder that only looks like one of ours; a file whose time alone has changed is the same"
    cases,p = read_cases(root/'cases.csv'),tmp_path/'p'; prepare_cases(cases, spec, p)
    made = lambda at=p: len([*at.iterdir()]); counts = [made()]
    os.utime(cases[0].ct); prepare_case(cases[0], spec, p); counts.append(made())
    shutil.copyfile(cases[1].masks['lung'], cases[0].masks['lung']); prepare_case(cases[0], spec, p); counts.append(made())
    prepare_case(cases[0], replace(spec, spacing=(9,7,7)), p); counts.append(made())
    (p/f'{cases[0].name}-{"0"*16}').mkdir(); tidy(p, cases, spec); counts.append(made()-1)
    assert counts==[4,4,5,6,5] and (p/f'{cases[0].name}-{"0"*16}').exists()
    whole,w = ResizeSpec(patch=(8,40,40)),tmp_path/'w'; prepare_case(cases[0], whole, w)
    shutil.copyfile(cases[2].masks['lung'], cases[0].masks['lung'])
    for o in (whole, replace(whole, patch=(8,48,48))): prepare_case(cases[0], o, w)
    n = made(w); tidy(w, cases[:1], whole); assert (n,made(w))==(3,2)  # another size of whole scans stays, as another spacing does
