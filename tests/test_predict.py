"`covid3d predict`: scans keep their names and their masks, whatever is given, whatever goes wrong, and whenever it is stopped"
import csv, os, re, shutil, signal, subprocess, sys, threading
from pathlib import Path

import nibabel as nib, numpy as np, pydicom, pytest, torch
from isal import igzip

import covid3d.cases, covid3d.inference, covid3d.predict
from covid3d.cli import main
from covid3d.dicom import open_scan, pseudonym, write_series
from covid3d.files import locked
from covid3d.inference import Segmentation, Segmenter
from covid3d.weights import NetSpec, Seen, save_model
from covid3d.predict import find_scans, predict_scans
from covid3d.transforms import CTSpec
from covid3d.volume import CTError, open_mask, save_volume
from coarse import cached

@pytest.fixture(scope='module')
def cts(): return [cached(i).ct for i in range(3)]

def untrained(path, classes=('lesion',), seed=0, seen=None):
    "Weights that call about half of a scan lesion"
    torch.manual_seed(seed)
    net = NetSpec(width=4)
    model = net.build(classes)
    with torch.no_grad(): model.head.logits.bias.zero_()
    save_model(model, path, CTSpec(spacing=(9,5,5), patch=(16,48,48), classes=classes), net, seen)
    return path

@pytest.fixture(scope='module')
def weights(tmp_path_factory): return untrained(tmp_path_factory.mktemp('w')/'model.safetensors')

@pytest.fixture(scope='module')
def world(tmp_path_factory, cts):
    "The same name in two folders, and two DICOM series in folders that are called after patients"
    d = tmp_path_factory.mktemp('world')
    for i,name in enumerate(('A','B')): save_volume(cts[i], d/name/'CT.nii.gz')
    for i,name in enumerate(('DOE^JANE','DOE^JOHN')): write_series(cts[i], d/'tree'/name, patient=name, seed=name)
    return d

def run(*argv): return main(['predict', *map(str, argv), '--device','cpu'])
def rows(out): return list(csv.DictReader((Path(out)/'scans.csv').open()))
def masks(out): return {p.name:p.read_bytes() for p in Path(out).iterdir() if p.name.endswith(('.nii.gz','.dcm'))}
def hidden(out): return [p.name for p in Path(out).iterdir() if p.name.startswith('.')]

# names

@pytest.mark.promise('named')
def test_a_series_has_one_name(world, weights, tmp_path):
    "A DICOM series has the same pseudonym alone, in a tree, as one of its files, and after other scans are added."
    jane = world/'tree'/'DOE^JANE'
    name = find_scans([jane])[0].name
    assert name==pseudonym(open_scan(jane).source.slices[0].series) and re.fullmatch('scan_[0-9a-f]{10}', name)
    assert find_scans([next(jane.iterdir())])[0].name==name
    both = {c.name:c.ct for c in find_scans([world/'tree'])}
    assert len(both)==2 and both[name]==jane
    assert name in [c.name for c in find_scans([world/'A'/'CT.nii.gz', world/'tree'])]
    assert len(find_scans([jane, world/'tree'])[:])==2

@pytest.mark.fault('C1', 'C15')
def test_a_damaged_series_keeps_its_name(world, tmp_path, cts):
    write_series(cts[0], tmp_path/'t'/'x', seed='DOE^JANE', patient='DOE^JANE')
    name = find_scans([tmp_path/'t'])[0].name
    (tmp_path/'t'/'x'/'IM0003.dcm').write_bytes(b'not DICOM')
    assert [c.name for c in find_scans([tmp_path/'t'])]==[name]==[c.name for c in find_scans([tmp_path/'t'/'x'])]

def test_a_series_that_lies_in_two_folders_is_taken_once(tmp_path, cts):
    for k in 'ab': write_series(cts[0], tmp_path/'t'/k, seed='one')
    for i in range(1, 4): (tmp_path/'t'/'a'/f'IM{i:04d}.dcm').unlink()
    notes = []
    c, = find_scans([tmp_path/'t'], notes)
    assert c.ct.name=='b' and notes==[f'{c.name}: its series is in 2 folders; the one with the most slices is taken']

@pytest.mark.fault('C7')
def test_the_largest_of_several_series_is_taken_and_named(tmp_path, weights, cts, capfd):
    write_series(cts[0], tmp_path/'d'/'x', seed='a', series=1)
    for i,p in enumerate(sorted((tmp_path/'d'/'x').iterdir())): p.rename(p.with_name(f'a{i}'))
    write_series(cts[1].new(cts[1].data[:10]), tmp_path/'d'/'x', seed='a', series=2)
    assert run(tmp_path/'d', '--weights', weights, '--out', tmp_path/'m')==0
    assert 'note: 2 series in the folder: number 1, with the most slices (32), was taken' in capfd.readouterr().out
    row, = rows(tmp_path/'m')
    assert row['scan']==find_scans([tmp_path/'d'])[0].name and nib.load(tmp_path/'m'/row['masks']).shape[2]==32

@pytest.mark.fault('C25')
def test_two_patients_in_a_folder_are_refused(tmp_path, weights, world, cts, capfd):
    for k in ('DOE^JANE','DOE^JOHN'):
        write_series(cts[0], tmp_path/'d'/'x', seed=k, patient=k)
        for i,p in enumerate(sorted((tmp_path/'d'/'x').glob('IM*'))): p.rename(p.with_name(f'{k[-2:]}{i}'))
    assert run(tmp_path/'d', world/'A', '--weights', weights, '--out', tmp_path/'m')==1
    out = capfd.readouterr()
    assert 'its 2 CT series belong to more than one patient' in out.err and 'DOE' not in out.out+out.err and list(masks(tmp_path/'m'))==['CT_lesion.nii.gz']

@pytest.mark.fault('X15', 'C25')
@pytest.mark.promise('named')
def test_no_name_of_a_patient_leaves(world, weights, tmp_path, capfd):
    "No mask, file name or line on the screen names a patient, whatever folders and headers hold; only scans.csv has the sources, and says so."
    shutil.copytree(world/'tree', tmp_path/'tree')
    bad = sorted((tmp_path/'tree'/'DOE^JOHN').iterdir())[4]
    bad.write_bytes(bad.read_bytes()[:-400])
    assert run(tmp_path/'tree', '--weights', weights, '--out', tmp_path/'m')==1
    out = capfd.readouterr()
    assert 'the file ends too early' in out.err and 'DOE' not in out.out+out.err
    for k,raw in masks(tmp_path/'m').items():
        assert 'DOE' not in k and raw[3]&8==0 and raw[4:8]==bytes(4) and b'DOE' not in igzip.decompress(raw)  # no FNAME, no time
    table = (tmp_path/'m'/'scans.csv').read_text()
    assert 'DOE^JANE' in table and 'sources may name patients: keep this table with the scans' in table.splitlines()[0]
    assert 'DOE' not in (tmp_path/'m'/'covid3d.json').read_text()
    if os.name!='nt': assert (tmp_path/'m'/'scans.csv').stat().st_mode&0o777==0o600

# nothing lost

@pytest.mark.fault('X1')
@pytest.mark.promise('lost')
def test_an_input_is_never_replaced(tmp_path, weights, cts, capfd):
    "A mask that would be written over a scan or a reference mask is refused before anything is read, with --overwrite too."
    for i,k in enumerate(('x','x_lesion')): save_volume(cts[i], tmp_path/'d'/f'{k}.nii.gz')
    (tmp_path/'d'/'t.csv').write_text('case,ct,lesion,split\nx,x.nii.gz,x_lesion.nii.gz,test\n')
    before = masks(tmp_path/'d')
    for given in (tmp_path/'d', tmp_path/'d'/'t.csv'):
        for more in ([], ['--overwrite']):
            assert run(given, '--weights', weights, '--out', tmp_path/'d', *more)==2
            assert 'is one of the inputs' in capfd.readouterr().err and masks(tmp_path/'d')==before
    os.symlink(tmp_path/'d', tmp_path/'link')
    assert run(tmp_path/'d', '--weights', weights, '--out', tmp_path/'link', '--overwrite')==2 and masks(tmp_path/'d')==before

@pytest.mark.promise('lost')
def test_masks_of_other_scans_stay(world, weights, tmp_path, capfd):
    "The mask of another scan is never replaced: DICOM series get names of their own, and a NIfTI of the same name is refused, with --overwrite too."
    w = ['--weights', weights, '--out', tmp_path/'m']
    assert run(world/'tree'/'DOE^JANE', *w)==0 and run(world/'tree'/'DOE^JOHN', *w, '--overwrite')==0 and len(masks(tmp_path/'m'))==2
    assert run(world/'A', *w)==0
    before = masks(tmp_path/'m')
    capfd.readouterr()
    for more in ([], ['--overwrite']):
        assert run(world/'B', *w, *more)==1
        assert re.search(r'CT: .*belongs to another scan of this name\. Choose another --out', capfd.readouterr().err)
        assert masks(tmp_path/'m')==before
    assert rows(tmp_path/'m')[-1]['source'].endswith('A/CT.nii.gz') and 'another scan' in rows(tmp_path/'m')[-1]['error']
    assert run(world/'A', *w)==0 and 'already done' in capfd.readouterr().out and rows(tmp_path/'m')[-1]['error']==''

def test_the_same_voxels_with_another_spacing_are_another_scan(world, weights, tmp_path, cts):
    a = cts[0]
    wider = a.__class__(a.data, a.affine@np.diag([1.1,1,1,1]))
    save_volume(wider, tmp_path/'w'/'CT.nii.gz')
    assert run(world/'A', '--weights', weights, '--out', tmp_path/'m')==0 and run(tmp_path/'w', '--weights', weights, '--out', tmp_path/'m', '--overwrite')==1

@pytest.mark.promise('lost')
def test_a_mask_that_was_corrected_by_hand_stays(world, weights, tmp_path, capfd):
    "A mask that somebody changed is replaced only with --overwrite."
    w = [world/'A', '--weights', weights, '--out', tmp_path/'m']
    assert run(*w)==0
    made = masks(tmp_path/'m')
    (tmp_path/'m'/'CT_lesion.nii.gz').write_bytes(b'an afternoon of work')
    assert run(*w)==1 and 'was changed since it was written' in capfd.readouterr().err
    assert (tmp_path/'m'/'CT_lesion.nii.gz').read_bytes()==b'an afternoon of work'
    assert run(*w, '--overwrite')==0 and masks(tmp_path/'m')==made

@pytest.mark.fault('X1')
@pytest.mark.promise('lost')
def test_files_of_others_stay(world, weights, tmp_path, capfd):
    "A file that covid3d did not write, or of which nobody knows the scan, is never replaced."
    for k in ('CT_lesion.nii.gz','scans.csv'):
        out = tmp_path/f'out_{k[:2]}'; out.mkdir(); (out/k).write_bytes(b'mine')
        for more in ([], ['--overwrite']):
            assert run(world/'A', '--weights', weights, '--out', out, *more)==2
            assert 'was not written by covid3d' in capfd.readouterr().err and [(p.name, p.read_bytes()) for p in out.iterdir()]==[(k, b'mine')]
    assert run(world/'A', '--weights', weights, '--out', tmp_path/'m')==0
    (tmp_path/'m'/'scans.csv').unlink(); before = masks(tmp_path/'m')
    assert run(world/'B', '--weights', weights, '--out', tmp_path/'m', '--overwrite')==2 and 'does not say whose it is' in capfd.readouterr().err
    assert masks(tmp_path/'m')==before

def test_two_masks_never_share_a_file(tmp_path, cts, capfd):
    w = untrained(tmp_path/'w.safetensors', ('b','lesion_b'))
    for k in ('a','a_lesion'): save_volume(cts[0], tmp_path/'d'/f'{k}.nii.gz')
    assert run(tmp_path/'d', '--weights', w, '--out', tmp_path/'m')==2
    assert 'would be the same' in capfd.readouterr().err and not (tmp_path/'m').exists()
    save_volume(cts[1], tmp_path/'e'/'A.nii.gz')
    assert run(tmp_path/'d'/'a.nii.gz', tmp_path/'e', '--weights', w, '--out', tmp_path/'m')==2

@pytest.mark.fault('X1')
def test_other_weights_and_settings_need_overwrite(world, weights, tmp_path, capfd):
    w,other = [world/'A', '--out', tmp_path/'m', '--weights'],untrained(tmp_path/'o.safetensors', seed=1)
    assert run(*w, weights)==0
    before = masks(tmp_path/'m'); capfd.readouterr()
    for more in ([other], [weights, '--overlap','.25']):
        assert run(*w, *more)==2 and 'exists already, made with other weights or settings' in capfd.readouterr().err and masks(tmp_path/'m')==before
    assert run(*w, other, '--overwrite')==0 and masks(tmp_path/'m')!=before
    assert run(*w, other)==0 and 'already done' in capfd.readouterr().out

# resuming

points = ['open', 'segment', 'about', 'first', 'second', 'row', 'table']

def dying(at, scan):
    "Replace the step `at` of the scan number `scan` by a kill in its place, or just after it for `about` and `row`"
    p,i,c = covid3d.predict,covid3d.inference,covid3d.cases
    n = dict.fromkeys(('open_scan','segment','save_mask','add','rewrite'), -1)
    kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
    def step(name, f, when, after=False):
        def g(*args, **kwargs):
            n[name] += 1
            hit = n[name]==when
            if hit and not after: kill()
            res = f(*args, **kwargs)
            if hit: kill()
            return res
        return g
    if at=='open': c.open_scan = step('open_scan', c.open_scan, scan)
    if at=='segment': i._on_grid = step('segment', i._on_grid, scan)
    if at in ('first','second'): i.save_mask = step('save_mask', i.save_mask, 2*scan+(at=='second'))
    if at in ('about','row'): p._Record.add = step('add', p._Record.add, 2*scan+(at=='row'), True)
    if at=='table': p._Record.rewrite = step('rewrite', p._Record.rewrite, 1)

@pytest.mark.fault('X5')
@pytest.mark.promise('lost')
@pytest.mark.parametrize('at', points)
def test_a_kill_at_any_step_loses_nothing(tmp_path, world, at, two, capfd):
    "A prediction that was killed at any step resumes with the same command, keeps what is done, and ends with the masks of an uninterrupted one."
    weights,whole = two
    argv = [world/'A', world/'tree', '--weights', weights, '--out', tmp_path/'m']
    if not (pid := os.fork()):
        try: torch.set_num_threads(1); dying(at, 1); main(['predict', *map(str, argv), '--device','cpu'])
        finally: os._exit(7)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])==-signal.SIGKILL
    capfd.readouterr()
    assert run(*argv)==0
    out = capfd.readouterr().out
    # a scan is read while the one before it is segmented
    assert out.count('already done') in dict(row=[2], table=[3], open=[0,1]).get(at, [1])
    assert masks(tmp_path/'m')==whole[0] and hidden(tmp_path/'m')==[]
    assert [{k:v for k,v in r.items() if k!='source'} for r in rows(tmp_path/'m')]==whole[1]

@pytest.fixture(scope='module')
def two(tmp_path_factory, world):
    "Weights of two classes, the masks and the table that they give"
    d = tmp_path_factory.mktemp('two')
    w = untrained(d/'w.safetensors', ('lesion','lung'))
    assert run(world/'A', world/'tree', '--weights', w, '--out', d/'m')==0
    return w,(masks(d/'m'),[{k:v for k,v in r.items() if k!='source'} for r in rows(d/'m')])

def test_both_classes_are_written(two, world):
    found,table = two[1]
    assert len(found)==6 and 'CT_lung.nii.gz' in found and all(float(r['lesion_ml'])>0 and r['lung_ml'] for r in table)

def test_a_mask_that_is_gone_is_made_again(two, world, tmp_path):
    argv = [world/'A', '--weights', two[0], '--out', tmp_path/'m']
    assert run(*argv)==0; before = masks(tmp_path/'m')
    (tmp_path/'m'/'CT_lung.nii.gz').unlink()
    assert run(*argv)==0 and masks(tmp_path/'m')==before

def test_a_row_that_was_cut_off_is_dropped(world, weights, tmp_path):
    argv = [world/'tree', '--weights', weights, '--out', tmp_path/'m']
    assert run(*argv)==0; whole = (tmp_path/'m'/'scans.csv').read_bytes(); before = masks(tmp_path/'m')
    (tmp_path/'m'/'scans.csv').write_bytes(whole[:-30])
    assert run(*argv)==2  # whose mask the second is, is not known any more
    for p in (tmp_path/'m').glob('*.nii.gz'):
        if p.name not in whole[:-400].decode(): p.unlink()
    assert run(*argv)==0 and masks(tmp_path/'m')==before and (tmp_path/'m'/'scans.csv').read_bytes()==whole

def test_the_table_is_written_twice_not_once_a_scan(tmp_path, weights, cts, monkeypatch):
    "10,000 scans must not mean 10,000 tables of 10,000 rows: rows are appended"
    written = []
    write = covid3d.predict.write_atomic
    monkeypatch.setattr('covid3d.predict.write_atomic', lambda p, b: (written.append(p.name), write(p, b)))
    monkeypatch.setattr(Segmenter, '__call__', lambda self, ct, bar=False: Segmentation(ct, dict(lesion=(ct.data>0).astype(np.uint8)), self))
    for i in range(12): save_volume(cts[i%3], tmp_path/'d'/f'{i}.nii.gz')
    df = predict_scans(find_scans([tmp_path/'d']), Segmenter.load(weights, 'cpu'), tmp_path/'m')
    assert written==['scans.csv']*2 and [*df.state]==['written']*12 and len(rows(tmp_path/'m'))==12

def test_masks_beside_the_scans(tmp_path, weights, cts, capfd):
    "With --out in the folder of the scans, the second run does not take the masks for scans"
    save_volume(cts[0], tmp_path/'x.nii.gz')
    for i in range(2): assert run(tmp_path, '--weights', weights, '--out', tmp_path)==0
    assert 'already done' in capfd.readouterr().out and sorted(masks(tmp_path))==['x.nii.gz','x_lesion.nii.gz']

def nifti(x, path, ct):
    "Voxels of any type on the grid of a scan"
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(x.transpose(2,1,0), ct.affine[:,[2,1,0,3]]), path); return path

def test_masks_that_lie_beside_scans_are_left_out(tmp_path, weights, cts, capfd):
    "Labels of any type, and what is named like a mask; scans of any type stay, and so does what cannot be read"
    ct,d = cts[0],tmp_path/'d'; lesion = (ct.data>100).astype(np.uint8)
    save_volume(ct, d/'x.nii.gz')
    nifti(ct.data.astype(np.float32)+.25, d/'y_seg.nii.gz', ct)  # a scan, whatever its name is
    found = {'x.nii.gz','y_seg.nii.gz'}
    for k,x in dict(x_lesion=lesion, x_mask=lesion*.3, lungs=lesion.astype(np.int16)*2, float=lesion.astype(np.float64), none=lesion*0).items(): nifti(x, d/f'{k}.nii.gz', ct)
    nifti(lesion, d/'plain.nii', ct); save_volume(ct.new(lesion), d/'z.nii.gz')
    (d/'x.seg.nrrd').write_bytes(b'NRRD0004')
    (d/'cut.nii.gz').write_bytes((d/'x.nii.gz').read_bytes()[:1000]); found.add('cut.nii.gz')
    nifti(np.clip((ct.data+1000)/8, 0, 255).astype(np.uint8), d/'grey.nii.gz', ct); found.add('grey.nii.gz')
    notes = []
    assert {c.ct.name for c in find_scans([d], notes)}==found and len(notes)==1 and 'and 7 more look like masks' in notes[0] and 'covid3d table' in notes[0]
    assert {c.ct.name for c in find_scans(sorted(d.iterdir()), notes)}==found
    for k in ('cut','grey','y_seg'): (d/f'{k}.nii.gz').unlink()
    assert run(d, '--weights', weights, '--out', tmp_path/'m')==0
    assert 'look like masks' in capfd.readouterr().err and list(masks(tmp_path/'m'))==['x_lesion.nii.gz']
    for k in ('x','x_mask'): (d/f'{k}.nii.gz').unlink()
    assert run(d, '--weights', weights, '--out', tmp_path/'n')==2
    assert 'looks like a mask. Leave masks out, or give a case table (covid3d table, or by hand).' in capfd.readouterr().err

@pytest.mark.fault('X12')
def test_one_prediction_at_a_time_in_a_folder(tmp_path, weights, world, capfd):
    inside,leave = threading.Event(),threading.Event()
    def hold():
        with locked(tmp_path/'m'): inside.set(); leave.wait()
    t = threading.Thread(target=hold); t.start(); inside.wait()
    try: assert run(world/'A', '--weights', weights, '--out', tmp_path/'m')==2 and 'another process is writing there' in capfd.readouterr().err
    finally: leave.set(); t.join()

# one bad scan

@pytest.mark.fault('X14')
@pytest.mark.promise('works')
@pytest.mark.parametrize('error,words', [
    (CTError('x', 'is odd', 'Mend it'), 'is odd. Mend it.'), (MemoryError(), 'more memory than there is'), (RuntimeError('[enforce fail] DefaultCPUAllocator: can\'t allocate memory'), 'more memory'),
    (OSError(5, 'Input/output error', 'x.nii'), 'Input/output error'), (RuntimeError('odd\nlines'), 'RuntimeError: odd lines')], ids=lambda o: type(o).__name__)
def test_a_bad_scan_costs_only_itself(world, weights, tmp_path, capfd, monkeypatch, error, words):
    "A scan that cannot be read, is too large for the memory, or fails in any foreseen way is named and counted; the others are segmented and the exit status is 1."
    real = covid3d.inference._whole_scan
    def segment(model, spec, ct, *args):
        if 'JANE' in str(ct.source.path): raise error
        return real(model, spec, ct, *args)
    monkeypatch.setattr('covid3d.inference._whole_scan', segment)
    jane = find_scans([world/'tree'/'DOE^JANE'])[0].name
    assert run(world/'tree', world/'A', '--weights', weights, '--out', tmp_path/'m')==1
    err = [o for o in capfd.readouterr().err.splitlines() if 'segmenting' not in o]
    line = next(o for o in err if words in o)
    assert line.startswith(f'{jane}: ') and '--patch' not in line and '--bs' not in line and '1 of 3 scans failed' in err[-1]
    assert all('JANE' not in r['error'] for r in rows(tmp_path/'m'))  # only the column `source` may name a patient
    assert len(masks(tmp_path/'m'))==2 and [bool(r['error']) for r in rows(tmp_path/'m')]==[r['scan']==jane for r in rows(tmp_path/'m')]
    monkeypatch.undo()
    assert run(world/'tree', world/'A', '--weights', weights, '--out', tmp_path/'m')==0 and len(masks(tmp_path/'m'))==3 and not any(r['error'] for r in rows(tmp_path/'m'))

@pytest.mark.fault('X6')
def test_a_full_disk_is_told_and_leaves_no_half_mask(world, weights, tmp_path, capfd, monkeypatch):
    write = os.fsync
    def full(fd):
        if os.fstat(fd).st_size>2000: raise OSError(28, 'No space left on device')
        write(fd)
    monkeypatch.setattr(os, 'fsync', full)
    assert run(world/'A', '--weights', weights, '--out', tmp_path/'m')==1
    assert 'No space left' in capfd.readouterr().err and masks(tmp_path/'m')=={} and hidden(tmp_path/'m')==[]
    monkeypatch.undo()
    assert run(world/'A', '--weights', weights, '--out', tmp_path/'m')==0

# formats and odd paths

def test_seg_of_nifti_is_refused_before_anything_is_segmented(world, weights, tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(Segmenter, '__call__', lambda *a, **k: pytest.fail('it was segmented'))
    assert run(world/'tree', world/'A', '--weights', weights, '--out', tmp_path/'m', '--format','seg')==2
    assert 'CT: was not read from DICOM' in capfd.readouterr().err and not (tmp_path/'m').exists()
    monkeypatch.setitem(sys.modules, 'highdicom', None)
    assert run(world/'tree', '--weights', weights, '--out', tmp_path/'m', '--format','seg')==2
    assert "pip install 'covid3d[dicom]'" in capfd.readouterr().err and not (tmp_path/'m').exists()

three = 'lesion','right_lung','left_lung'
deleted = 'PatientName PatientID PatientBirthDate PatientSex StudyDate StudyTime StudyID AccessionNumber ReferringPhysicianName SliceThickness'.split()

def stripped(ct, folder, edit, **kwargs):
    "A series whose headers were changed after it was written"
    write_series(ct, folder, **kwargs)
    for p in folder.iterdir():
        ds = pydicom.dcmread(p); edit(ds); ds.save_as(p)
    return folder

def without(*names):
    def edit(ds):
        for k in names: del ds[k]
    return edit

def complaints(p):
    "Errors that dciodvfy, a validator of the standard's own, finds in a file"
    r = subprocess.run(['dciodvfy', str(p)], capture_output=True, text=True)
    return [o for o in (r.stdout+r.stderr).splitlines() if o.startswith('Error')]

@pytest.mark.parametrize('names', [[k] for k in deleted]+[deleted], ids=lambda o: o[0] if len(o)==1 else 'all')
def test_seg_of_a_series_without_type_2(tmp_path, cts, names, capfd):
    "Elements that may be empty and were deleted by whoever de-identified the series are written empty, in the Segmentation and in the report"
    stripped(cts[0], tmp_path/'in', without(*names))
    assert run(tmp_path/'in', '--weights', untrained(tmp_path/'w.safetensors', three), '--out', tmp_path/'m', '--format','seg', '--no-page')==0
    row, = rows(tmp_path/'m')
    for end in ('seg','sr'):
        p = tmp_path/'m'/f'{row["scan"]}_{end}.dcm'; ds = pydicom.dcmread(p)
        for k in names:
            if k!='SliceThickness': assert k in ds and not ds[k].value, k
        if shutil.which('dciodvfy'): assert [o for o in complaints(p) if 'SliceThickness' not in o.replace(' ', '')]==[]
    assert f'{row["scan"]}_sr.dcm' in row['masks']

def test_a_series_without_its_name_replaces_the_named_one(tmp_path, cts, capfd):
    "The files of a named series are written again after the name is taken from the headers, and kept if nothing has changed"
    for folder,name in (('named','DOE^JANE'),('bare','')): stripped(cts[0], tmp_path/folder, lambda ds: setattr(ds, 'PatientName', name), seed='one')
    w = untrained(tmp_path/'w.safetensors', three)
    predict = lambda d: run(tmp_path/d, '--weights', w, '--out', tmp_path/'m', '--format','seg', '--no-page')
    names = lambda: {str(pydicom.dcmread(p).PatientName) for p in (tmp_path/'m').glob('*.dcm')}
    assert predict('named')==0 and names()=={'DOE^JANE'} and len(masks(tmp_path/'m'))==2
    capfd.readouterr()
    assert predict('bare')==0 and names()=={''} and len(masks(tmp_path/'m'))==2
    assert 'already done' not in capfd.readouterr().out
    assert predict('bare')==0 and 'already done' in capfd.readouterr().out
    row, = rows(tmp_path/'m'); assert Path(row['source']).name=='bare'

@pytest.mark.parametrize('edit,words', [(without('StudyInstanceUID'),'StudyInstanceUID is missing'), (without('FrameOfReferenceUID'),'FrameOfReferenceUID is missing'),
    (without('SOPInstanceUID'),'SOPInstanceUID is missing'), (lambda ds: setattr(ds, 'PatientSex', 'DOE'),'hold a malformed PatientSex'),
    (lambda ds: setattr(ds, 'PatientBirthDate', 'DOE'),'hold a malformed PatientBirthDate')], ids=['study','frame','instance','sex','birth'])
def test_what_forbids_a_seg_is_told_before_the_scan_is_segmented(tmp_path, world, weights, cts, capfd, monkeypatch, edit, words):
    "One line, nothing written of that scan, and the others are done"
    stripped(cts[0], tmp_path/'in'/'odd', edit, seed='a', patient='DOE^JOHN')
    write_series(cts[1], tmp_path/'in'/'good', seed='b')
    real,seen = Segmenter.__call__,[]
    monkeypatch.setattr(Segmenter, '__call__', lambda self, ct, bar=False: (seen.append(str(ct.source.path)), real(self, ct, bar))[1])
    assert run(tmp_path/'in', '--weights', weights, '--out', tmp_path/'m', '--format','seg')==1
    err = capfd.readouterr().err
    assert [Path(o).name for o in seen]==['good'] and len(masks(tmp_path/'m'))==1 and 'DOE' not in err
    line, = [o for o in err.splitlines() if words in o]
    assert line.startswith('scan_') and '--format' in line

def test_weights_without_lungs_say_what_is_missing(tmp_path, world, weights, capfd, monkeypatch):
    "Before anything is segmented, and with --quiet on standard error; weights with lungs say nothing"
    monkeypatch.setattr(Segmenter, '__call__', lambda *a, **k: pytest.fail('it was segmented'))
    monkeypatch.setattr('covid3d.predict.predict_scans', lambda *a: (_ for _ in ()).throw(CTError('x', 'stop', 'Stop')))
    for more in ([], ['-q'], ['--format','seg']):
        assert run(world/'tree', '--weights', weights, '--out', tmp_path/'m', *more)==2
        out = capfd.readouterr()
        note, = [o for o in (out.err if '-q' in more else out.out).splitlines() if 'no figures' in o]
        for k in three: assert f'--classes {k}' in note
        assert ('NAME_seg.dcm' if 'seg' in more else 'NAME_lesion.nii.gz') in note
    assert run(world/'tree', '--weights', untrained(tmp_path/'w.safetensors', three), '--out', tmp_path/'m')==2
    out = capfd.readouterr()
    assert 'no page' not in out.out+out.err

def test_seg_resumes(world, weights, tmp_path, capfd):
    argv = [world/'tree', '--weights', weights, '--out', tmp_path/'m', '--format','seg']
    assert run(*argv)==0; before = masks(tmp_path/'m'); assert len(before)==2
    assert run(*argv)==0 and masks(tmp_path/'m')==before and capfd.readouterr().out.count('already done')==2

@pytest.mark.fault('X3')
@pytest.mark.parametrize('path,words', [('nowhere.nii.gz','no such file'), ('/dev/null','neither a file nor a folder'), ('x'*300,'File name too long'), ('a\0b','zero byte'),
                                        ('*.nii.gz','no such file'), ('\udcff.nii.gz','no such file'), ('\x1b[31mred\nline','no such file')], ids=ascii)
def test_paths_that_are_no_scans(path, words, weights, tmp_path, capfd):
    assert run(path, '--weights', weights, '--out', tmp_path/'m')==2
    err = capfd.readouterr().err
    assert words in err and err.count('\n')==1 and '\x1b' not in err and not (tmp_path/'m').exists()

@pytest.mark.fault('S6', 'F7')
def test_odd_names_of_scans(tmp_path, weights, cts, capfd):
    "Formulas, control characters, dots, spaces and bytes that are no text in a name reach neither the terminal nor a spreadsheet"
    names = ['=1+1', 'a.b c', 'Müller', '\x1b[31mred\nline', '\udcff']
    for k in names: save_volume(cts[0], tmp_path/'d'/f'{k}.nii.gz')
    for i in range(2): assert run(tmp_path/'d', '--weights', weights, '--out', tmp_path/'m')==0
    out = capfd.readouterr()
    assert '\x1b' not in out.out and out.out.count('already done')==5
    table = (tmp_path/'m'/'scans.csv').read_text(encoding='utf8')
    assert len(table.splitlines())==6 and '\n=1' not in table and "'=1+1" in table and '\x1b' not in table
    assert len(masks(tmp_path/'m'))==5

@pytest.mark.fault('X4')
def test_settings_out_of_range(world, weights, tmp_path):
    for k,v in [('threshold',float('nan')), ('threshold',0), ('threshold',1), ('overlap',1), ('overlap',-.1), ('overlap',float('nan'))]:
        with pytest.raises(CTError, match=f'{k}: .* is not between'): Segmenter.load(weights, 'cpu', **{k:v})
    with pytest.raises(CTError, match='format'): predict_scans(find_scans([world/'A']), Segmenter.load(weights, 'cpu'), tmp_path/'m', format='png')
    assert not (tmp_path/'m').exists()

def test_the_library_call_gives_what_the_table_holds(world, weights, tmp_path):
    df = predict_scans(find_scans([world/'A']), Segmenter.load(weights, 'cpu'), tmp_path/'m')
    ct = open_scan(world/'A'/'CT.nii.gz')
    m = open_mask(tmp_path/'m'/df.masks[0], like=ct)
    assert float(df.lesion_ml[0])==pytest.approx(m.data.sum()*ct.ml_per_voxel, abs=1e-4) and m.data.any()
    assert rows(tmp_path/'m')[0]['lesion_ml']==df.lesion_ml[0]

# a scan like nothing that training held

@pytest.mark.promise('silent')
def test_far_more_lesion_than_training_held_is_told(world, tmp_path, capfd):
    "A scan with more than 1.5 times the largest lesion that training held, in ml or as a fraction of the body, gets a warning on stderr and in scans.csv."
    w = untrained(tmp_path/'w.safetensors', seen=Seen(12, 551., .06))
    for i in range(2):  # a scan that is kept warns again
        assert run(world/'A', '--weights', w, '--out', tmp_path/'m')==0
        assert re.search(r'CT: the lesion is [\d,]+ ml, where training held 551 at most; \d+% of the body, where training held 6% at most', capfd.readouterr().err)
    assert 'warning: ' in rows(tmp_path/'m')[0]['notes']
    ml = float(rows(tmp_path/'m')[0]['lesion_ml'])
    for k,seen in enumerate((Seen(12, ml/1.4, 0.), Seen(3, 0., 0.), None)):
        assert run(world/'A', '--weights', untrained(tmp_path/'v.safetensors', seen=seen), '--out', tmp_path/f'm{k}')==0
        assert 'training held' not in capfd.readouterr().err
    assert run(world/'A', '--weights', w, '--weights', tmp_path/'v.safetensors', '--out', tmp_path/'both')==0 and 'held 551' in capfd.readouterr().err

@pytest.mark.promise('named')
def test_a_table_and_a_tree_give_the_same_names(world, weights, tmp_path):
    "A series has the same name in a tree as in the case table that was made from the tree."
    assert main(['table',str(world/'tree'),'-o',str(tmp_path/'t.csv')])==0
    assert {c.name for c in find_scans([tmp_path/'t.csv'])}=={c.name for c in find_scans([world/'tree'])}
