"The four data sets in their true layouts, from phantoms through the command line: cases → check → train → evaluate; and DICOM in, masks out"
import csv, json, os, stat
from pathlib import Path

import nibabel as nib, numpy as np, pydicom, pytest

from covid3d import datasets
from covid3d.cases import check_table, read_cases, sources_path
from covid3d.cli import main
from covid3d.datasets import case_table, recognise
from covid3d.dicom import ct_datasets, find_series, open_series, pseudonym, save_dicom, write_series
from covid3d.inference import Segmentation, Segmenter
from covid3d.layouts import windowed, write_layout
from covid3d.metrics import dice
from covid3d.outlines import read_outlines
from covid3d.volume import CTError, save_volume
from coarse import cached, small as small_phantom

each = pytest.mark.parametrize
data = os.environ.get('COVID3D_TEST_DATA')
small = ['--init','random','--width','4','--spacing','9,5,5','--patch','16,48,48','--epochs','1','--patches','2','--device','cpu']
sets = ('coronacases','mosmed','covid1920','ricord')

@pytest.fixture(scope='module')
def phantoms(): return [cached(i) for i in range(5)]

@pytest.fixture(scope='module')
def root(phantoms, tmp_path_factory):
    "All four data sets, each in a folder of its name"
    root = tmp_path_factory.mktemp('sets')
    for k in sets: write_layout(phantoms, root/k, k)
    return root

def run(*argv): return main([str(o) for o in argv])

def rows(path): return list(csv.DictReader(path.open()))

def order(name, found, phantoms):
    "The phantoms in the order of the table: MosMed's and COVID-19-20's unlabelled one carries another number"
    return [phantoms[-1],*phantoms[:-1]] if name=='mosmed' else phantoms

def same_lesions(name, table, phantoms):
    "Each mask is the phantom's own; RICORD's, which was drawn as outlines, but for the boundary"
    cases = read_cases(table)
    assert len(cases)==len(phantoms)
    for c,ph in zip(cases, order(name, cases, phantoms)):
        ct = c.open_ct()
        if not c.already_windowed: assert np.array_equal(ct.data, ph.ct.data), c.name
        if 'lesion' not in c.masks: continue
        mask = c.open_mask('lesion', ct).data
        if name!='ricord': assert np.array_equal(mask, ph.lesion.data), c.name
        else:
            assert dice(mask, ph.lesion.data)>=.97
            off = mask!=ph.lesion.data
            assert not (off & (mask==0)).any()  # an outline goes around, so nothing is lost; what is added are the airways inside it
    return cases

@each('name', sets)
def test_whole_way(name, root, phantoms, tmp_path, capfd):
    table,run_dir,scores = tmp_path/'cases.csv',tmp_path/'run',tmp_path/'scores'
    assert run('table', root/name, '--layout',name, '--valid','0.25','--test','0.25','-o',table)==0
    cases = same_lesions(name, table, phantoms)
    labelled = [c for c in cases if 'lesion' in c.masks]
    assert len(labelled)==(5 if name=='coronacases' else 4) and all(bool(c.split)==('lesion' in c.masks) for c in cases)
    assert {c.split for c in labelled}=={'train','valid','test'}
    capfd.readouterr()
    assert run('check', table, '--json')==0
    found = json.loads(capfd.readouterr().out)
    assert found['ok'] and found['cases']==5
    for r,c,ph in zip(found['reports'], cases, order(name, cases, phantoms)):
        ml = ph.lesion.data.sum()*9*3.7*3.7/1000
        assert r['lesion_ml']==(None if 'lesion' not in c.masks else pytest.approx(ml, rel=.03 if name=='ricord' else 1e-3))
    assert run('train', table, '--out', run_dir, *small)==0
    assert run('evaluate', table, '--weights', run_dir/'model.safetensors', '--out', scores, '--device','cpu')==0
    tested = rows(scores/'scores.csv')
    assert [r['case'] for r in tested]==[c.name for c in cases if c.split=='test'] and all(0<=float(r['dice'])<=1 and not r['error'] for r in tested)

@each('name,want', [('coronacases',['test']*4+['']), ('mosmed',['']+['test']*4), ('ricord',['','train','train','train','valid'])])
def test_part_in_the_paper(name, want, root, tmp_path):
    "RICORD trains and tunes, CoronaCases without Radiopaedia and the labelled MosMed scans are tests"
    assert run('table', root/name, '--layout',name, '-o', tmp_path/'c.csv')==0
    got = [r['split'] for r in rows(tmp_path/'c.csv')]
    assert got==want if name!='ricord' else sorted(got)==want

def test_kaggle(phantoms, tmp_path):
    write_layout(phantoms, tmp_path/'k', 'kaggle')
    assert run('table', tmp_path/'k', '--layout','coronacases', '-o', tmp_path/'c.csv')==0
    same_lesions('coronacases', tmp_path/'c.csv', phantoms)

def test_windowed_radiopaedia(root, phantoms, tmp_path):
    "Grey values come back as the HU they stood for, within half a grey step inside the window"
    assert run('table', root/'coronacases', '--layout','coronacases', '-o', tmp_path/'c.csv')==0
    ct = read_cases(tmp_path/'c.csv')[-1].open_ct()
    assert abs(ct.data-phantoms[-1].ct.data.clip(-1250,250)).max()<=1500/255/2+.01 and -1250<=ct.data.min() and ct.data.max()<=250

def test_ricord_table_can_be_moved_with_its_masks(root, tmp_path):
    assert run('table', root/'ricord', '--layout','ricord', '-o', tmp_path/'a'/'cases.csv')==0
    (tmp_path/'a').rename(tmp_path/'b')
    mask = next(r['lesion'] for r in rows(tmp_path/'b'/'cases.csv') if r['lesion'])
    assert mask.startswith('cases_masks/') and (tmp_path/'b'/mask).is_file()

@each('name', sets)
def test_phantom_layout(name, tmp_path, monkeypatch, capfd):
    "`covid3d phantom --layout` writes what `covid3d table` reads, and says so"
    monkeypatch.setattr('covid3d.phantom.phantom', small_phantom)
    assert run('phantom', '-o', tmp_path/'d', '--n','3','--layout',name)==0
    assert f'covid3d table {tmp_path/"d"}' in capfd.readouterr().out
    assert run('table', tmp_path/'d', '--layout',name, '-o', tmp_path/'c.csv')==0 and len(rows(tmp_path/'c.csv'))==3
    assert run('phantom', '-o', tmp_path/'d', '--n','3','--layout',name)==2

@each('name', [*sets,'kaggle','plain','nnunet'])
def test_layout_is_recognised(name, root, phantoms, tmp_path):
    "By itself, one folder up too where the reader of the layout looks there; and the table is that of the layout's own function"
    if name not in sets: write_layout(phantoms[:2], root/name, name)
    layout = dict(kaggle='coronacases').get(name, name)
    assert recognise(root/name)==layout
    df = case_table(root/name, seed=3)
    own = datasets.folder if layout in ('plain','nnunet') else getattr(datasets, layout)
    assert df.equals(own(root/name, seed=3))
    if layout in ('coronacases','mosmed'):
        (tmp_path/'up').mkdir(); os.symlink(root/name, tmp_path/'up'/'set'); assert recognise(tmp_path/'up')==layout

@each('names', [[], ['a.nii.gz'], ['a/notes.txt','b.json'], ['ct/.DS_Store'], ['Train/x.nii.gz'], ['studies/CT-9/a.nii.gz']], ids=str)
def test_layout_that_is_none(names, tmp_path):
    "One line that names the choices"
    for o in names: (tmp_path/o).parent.mkdir(parents=True, exist_ok=True); (tmp_path/o).write_bytes(b'x'*200)
    with pytest.raises(CTError, match='none that is known. Name one of coronacases, mosmed, covid1920, ricord, plain, nnunet, dicom') as e:
        case_table(tmp_path)
    assert '\n' not in str(e.value) and str(e.value).endswith(', or write the table by hand (columns case, ct, lesion, split).')

def test_layout_that_could_be_two(phantoms, tmp_path):
    write_layout(phantoms[:2], tmp_path/'d', 'mosmed'); write_layout(phantoms[:2], tmp_path/'d', 'nnunet')
    with pytest.raises(CTError, match='two layouts, mosmed and nnunet'): recognise(tmp_path/'d')
    write_layout(phantoms[:2], tmp_path/'e', 'plain'); write_series(phantoms[2].ct, tmp_path/'e'/'more')
    with pytest.raises(CTError, match='two layouts, plain and dicom'): recognise(tmp_path/'e')

def test_dicom_is_recognised_without_an_extension(phantoms, tmp_path):
    for j,ds in enumerate(ct_datasets(phantoms[0].ct)): save_dicom(ds, tmp_path/'a'/'b'/f'{j:04d}')
    assert recognise(tmp_path)=='dicom'

# A hospital's archive

@pytest.fixture(scope='module')
def archive(phantoms, tmp_path_factory):
    "Two patients, one of them scanned twice; a scout, a dose report and a broken series among them; names everywhere"
    root = tmp_path_factory.mktemp('archive')
    for i,(who,ph) in enumerate([('DOE^JANE',phantoms[0]), ('DOE^JANE',phantoms[1]), ('ROE^JIM',phantoms[2])]):
        for j,ds in enumerate(ct_datasets(ph.ct, patient=who, series=i)):
            ds.PatientName = who; save_dicom(ds, root/f'S{i}'/f'{j:04d}')
    scout = ct_datasets(phantoms[0].ct, patient='DOE^JANE', series=9)[0]
    scout.ImageType = ['ORIGINAL','PRIMARY','LOCALIZER']; save_dicom(scout, root/'S0'/'scout')
    for j,ds in enumerate(ct_datasets(phantoms[3].ct, patient='POE^JO', series=4)):
        if j!=7: ds.PatientName = 'POE^JO'; save_dicom(ds, root/'S9'/f'{j:04d}')
    return root

@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    from covid3d.weights import NetSpec, save_model
    from covid3d.transforms import CTSpec
    path,net = tmp_path_factory.mktemp('w')/'model.safetensors',NetSpec(width=4)
    save_model(net.build(('lesion',)), path, CTSpec(spacing=(9,5,5), patch=(16,48,48)), net)
    return path

def test_archive(archive, weights, tmp_path, capfd):
    "A tree of DICOM becomes a table without a name in it, is checked, and segmented; the broken series stops nothing"
    table,masks = tmp_path/'cases.csv',tmp_path/'masks'
    assert run('table', archive, '-o', table)==0
    r = rows(table)
    uid = {f:pseudonym(find_series(archive/f)[0].uid) for f in ('S0','S1','S2','S9')}
    assert [o['case'] for o in r]==list(uid.values()) and [o['ct'] for o in r]==list(uid.values())
    who = [pseudonym(o, 'patient') for o in ('DOE^JANE','DOE^JANE','ROE^JIM','POE^JO')]
    assert [o['patient'] for o in r]==who
    assert run('check', table)==1
    assert run('predict', table, '--weights', weights, '--out', masks, '--device','cpu')==1
    out = capfd.readouterr()
    assert '1 slice missing' in out.out and '1 of 4 scans failed' in out.err
    assert {f'{uid[f]}_lesion.nii.gz' for f in ('S0','S1','S2')}=={o.name for o in masks.glob('*.nii.gz')}
    text = out.out+out.err+table.read_text()+' '.join(map(str, tmp_path.rglob('*')))
    assert not any(o in text for o in ('DOE','ROE','POE','JANE','JIM'))

hospital = 'DOE^JANE 1950-01-01','Roe, Jim','Größe 7'

@pytest.fixture
def export(phantoms, tmp_path):
    "An export whose folders and files are called after patients; the second lacks a slice, the third holds a file that is cut short"
    for i,who in enumerate(hospital):
        home = tmp_path/'export'/who/'CHEST of JANE'
        for j,ds in enumerate(ct_datasets(phantoms[i].ct, patient=f'ID{i}')):
            if (i,j)!=(1,7): save_dicom(ds, home/f'{who} {j:03d}.dcm')
    p = next(home.iterdir()); p.write_bytes(p.read_bytes()[:300])
    return tmp_path/'export'

@pytest.mark.promise('named')
def test_no_name_of_a_folder_or_file_comes_out(export, tmp_path, capfd):
    """No name of a folder, file or patient of a DICOM export reaches a case table, a message or a report; one file of sources, which says so, holds the way back"""
    out = tmp_path/'out'; table = out/'cases.csv'
    assert run('table', export, '-o', table)==0
    assert run('check', table)==1 and run('check', table, '--json')==1
    said = capfd.readouterr()
    assert '1 slice missing' in said.out and 'folder_' in said.out
    text = said.out+said.err+table.read_text()+' '.join(o.name for o in out.iterdir())
    assert not any(o in text for o in ('DOE','JANE','Jane','Roe','Jim','Größe','1950','ID0'))
    sources = (out/'cases_sources.csv').read_text()
    assert sources.startswith('scan,source (may name patients: keep this file with the data),left out\n')
    assert all(o in sources for o in ('DOE^JANE','Roe, Jim','Größe 7')) and sources.count('\n')==4
    if os.name!='nt': assert stat.S_IMODE((out/'cases_sources.csv').stat().st_mode)==0o600
    assert [c.ct.parts[-2] for c in read_cases(table)]==list(hospital[:2])

def test_a_series_has_one_name_everywhere(archive, tmp_path):
    "Alone, in the tree, after more folders came, whatever the folder is called"
    def names(root): return {r['ct'].split('/')[-1]:r for r in datasets.folder(root, layout='dicom').to_dict('records')}
    tree = names(archive)
    alone = datasets.folder(archive/'S2').case[0]
    write_series(cached(9).ct, tmp_path/'t'/'A0', patient='NEW')
    os.symlink(archive/'S2'/'0000', tmp_path/'x')
    import shutil; shutil.copytree(archive, tmp_path/'t'/'B')
    assert alone==tree['S2']['case']==names(tmp_path/'t')['S2']['case'] and tree['S2']['patient']==names(tmp_path/'t')['S2']['patient']

def test_table_and_its_sources_move_with_the_data(archive, tmp_path):
    import shutil
    shutil.copytree(archive, tmp_path/'a'/'data')
    assert run('table', tmp_path/'a'/'data', '-o', tmp_path/'a'/'t.csv')==0
    (tmp_path/'a').rename(tmp_path/'b')
    assert read_cases(tmp_path/'b'/'t.csv')[0].ct.is_dir()

@pytest.mark.parametrize('harm', ['gone','empty','no line','foreign'])
def test_sources_that_are_lost_are_told_in_one_line(archive, tmp_path, capfd, harm):
    table = tmp_path/'t.csv'; p = sources_path(table)
    assert run('table', archive, '-o', table)==0
    capfd.readouterr()
    if harm=='gone': p.unlink()
    elif harm=='empty': p.write_text('')
    elif harm=='no line': p.write_text('\n'.join(p.read_text().splitlines()[:2])+'\n')
    else: p.write_text('a,b\n1,2\n')
    assert run('check', table)==2
    err = capfd.readouterr().err
    assert err.count('\n')==1 and 't_sources.csv' in err and 'covid3d table' in err

def test_patients_without_an_id_are_not_one_person(phantoms, tmp_path):
    for i in range(3):
        for j,ds in enumerate(ct_datasets(phantoms[i].ct, patient='', seed=i)): save_dicom(ds, tmp_path/f'S{i}'/f'{j:03d}')
    df = datasets.folder(tmp_path)
    assert df.patient.nunique()==3 and any('without a PatientID' in o for o in df.attrs['notes'])

@pytest.mark.promise('silent')
def test_what_is_left_out_is_counted(phantoms, tmp_path, capfd):
    """Series that are copies, too short, of another kind or unreadable are left out of a table, counted by kind, and stop nothing"""
    def put(name, n=None, kind=None, broken=False, seed=0):
        for j,ds in enumerate(ct_datasets(phantoms[seed].ct, patient='A', seed=seed)[:n]):
            if kind: ds.SOPClassUID = kind
            save_dicom(ds, tmp_path/'d'/name/f'{j:03d}.dcm')
        if broken: (tmp_path/'d'/name/'000.dcm').write_bytes(b'x'*50)
    put('one'); put('two', n=20); put('three', seed=1); put('short', n=3, seed=2); put('mr', n=5, kind='1.2.840.10008.5.1.4.1.1.4', seed=3)
    put('bad', broken=True, seed=4)
    assert run('table', tmp_path/'d', '-o', tmp_path/'t.csv')==0
    out = capfd.readouterr().out
    assert len(rows(tmp_path/'t.csv'))==2 and read_cases(tmp_path/'t.csv')[0].ct.name=='one'
    for o in ('1 series left out: a copy','5 MR Image Storage','1 series of fewer than four slices','1 folder with files that could not be read:\nnote: folder_'):
        assert o in out, (o,out)
    assert '/bad' not in out and 'a copy of the series' in sources_path(tmp_path/'t.csv').read_text()

def test_halves_of_a_series_in_two_folders_are_told(phantoms, tmp_path):
    for j,ds in enumerate(ct_datasets(phantoms[0].ct)): save_dicom(ds, tmp_path/('a' if j<20 else 'b')/f'{j:03d}')
    df = datasets.folder(tmp_path)
    assert len(df)==1 and any(o.startswith('12 slices only in a copy') for o in df.attrs['notes'])

def test_nothing_readable_is_one_line(phantoms, tmp_path, capfd):
    (tmp_path/'d'/'DOE').mkdir(parents=True); (tmp_path/'d'/'DOE'/'a.dcm').write_bytes(b'x'*200)
    assert run('table', tmp_path/'d', '-o', tmp_path/'t.csv')==2
    err = capfd.readouterr().err
    assert err.count('\n')==1 and 'folder_' in err and 'DOE' not in err and not (tmp_path/'t.csv').exists()

def test_a_link_to_itself_and_a_closed_folder_stop_nothing(phantoms, tmp_path, monkeypatch):
    write_series(phantoms[0].ct, tmp_path/'d'/'one'); (tmp_path/'d'/'one'/'loop').symlink_to('loop'); (tmp_path/'d'/'loop').symlink_to('loop')
    (tmp_path/'d'/'shut').mkdir()
    real = os.scandir
    def scandir(p='.'):
        if str(p).endswith('shut'): raise PermissionError(13, 'Permission denied', str(p))
        return real(p)
    monkeypatch.setattr(os, 'scandir', scandir)
    df = datasets.folder(tmp_path/'d')
    assert len(df)==1 and df.attrs['notes'][:2]==['1 folder could not be read (Permission denied)','no CT series: 2 broken link']

@each('kind', ['folder','coronacases','mosmed','covid1920','ricord'])
def test_root_that_may_not_be_read(kind, tmp_path, capfd, monkeypatch):
    (tmp_path/'d'/'ct').mkdir(parents=True); (tmp_path/'d'/'ct'/'a.nii').write_bytes(b'x')
    def shut(self): raise PermissionError(13, 'Permission denied', str(self))
    monkeypatch.setattr(Path, 'iterdir', shut)
    assert run('table', tmp_path/'d', '--layout',kind, '-o', tmp_path/'t.csv')==2
    assert capfd.readouterr().err.count('\n')==1

# RICORD

def small_ricord(root, phantoms):
    write_layout(phantoms[:2], root, 'ricord')
    return next(root.glob('*.json'))

@pytest.mark.fault('C2')
@pytest.mark.promise('lost')
def test_outline_on_a_repeated_slice_is_drawn(phantoms, tmp_path):
    """Outlines on a slice that is stored again under another identifier are drawn: not a voxel is lost"""
    json_file = small_ricord(tmp_path/'r', phantoms)
    want = read_cases(datasets.ricord(tmp_path/'r', masks=tmp_path/'m1'))[0]
    n = int(want.open_mask('lesion', want.open_ct()).data.sum())
    text = json_file.read_text(); d = json.loads(text)
    slices = find_series(want.ct)[0].slices
    s = next(s for s in slices if s.uid in text)
    ds = pydicom.dcmread(s.path); ds.SOPInstanceUID = s.uid+'.1'; save_dicom(ds, s.path.with_name('zz.dcm'))
    for a in d['datasets'][0]['annotations']:
        if a.get('SOPInstanceUID')==s.uid: a['SOPInstanceUID'] += '.1'; break
    json_file.write_text(json.dumps(d))
    got = read_cases(datasets.ricord(tmp_path/'r', masks=tmp_path/'m2'))[0]
    assert int(got.open_mask('lesion', got.open_ct()).data.sum())==n

def test_several_readers_are_told(phantoms, tmp_path):
    p = small_ricord(tmp_path/'r', phantoms); d = json.loads(p.read_text())
    a = next(o for o in d['datasets'][0]['annotations'] if o.get('SOPInstanceUID'))
    d['datasets'][0]['annotations'].append(a|dict(createdById='U_2')); p.write_text(json.dumps(d))
    note = '1 slice outlined by several readers, whose union is larger than what each drew'
    assert note in datasets.ricord(tmp_path/'r', masks=tmp_path/'m').attrs['notes']
    assert note not in datasets.ricord(tmp_path/'r', masks=tmp_path/'m', agree=2).attrs['notes']

@pytest.mark.promise('lost')
def test_a_mask_that_is_not_ours_is_never_replaced(phantoms, tmp_path):
    """Masks drawn from outlines replace only masks that covid3d wrote"""
    small_ricord(tmp_path/'r', phantoms)
    datasets.ricord(tmp_path/'r'); datasets.ricord(tmp_path/'r')  # ours may be written anew
    other = tmp_path/'r'/'lesion_masks'/'mine_lesion.nii.gz'; other.write_bytes(b'mine')
    with pytest.raises(CTError, match='was not written by covid3d'): datasets.ricord(tmp_path/'r')
    assert other.read_bytes()==b'mine'

def replaced(o, at, new):
    "A copy of nested lists and dicts with the node `at` (a number in order of visit) replaced"
    count = [0]
    def walk(o):
        count[0] += 1
        if count[0]-1==at: return new
        if isinstance(o, dict): return {k:walk(v) for k,v in o.items()}
        return [walk(v) for v in o] if isinstance(o, list) else o
    return walk(o),count[0]

def test_mdai_of_wrong_types(tmp_path):
    "Any node of the export replaced by anything: refused in one line, or read"
    a = dict(id='A', labelId='L', StudyInstanceUID='1', SOPInstanceUID='1.2', createdById='U', data=dict(vertices=[[0,0],[4,0],[4,3]]))
    d = dict(labelGroups=[dict(id='G', labels=[dict(id='L', name='Infectious opacity', scope='INSTANCE')])],
             datasets=[dict(id='D', studies=[dict(StudyInstanceUID='1', number=1)], annotations=[a, a|dict(data=None)])])
    n,p,read = replaced(d, -1, 0)[1],tmp_path/'a.json',0
    for at in range(n):
        for new in (7, 1e400, 10**400, 'x', None, [], {}, [[]], {'vertices':3}, True, [1,2,3]):
            try: p.write_text(json.dumps(replaced(d, at, new)[0]))
            except ValueError: continue
            try: read_outlines(p, ['Infectious opacity']); read += 1
            except CTError as e: assert '\n' not in str(e)
    assert read>n

@each('text', [b'['*200000, b'{"a":'*100000, b'\xff\xfe', b'', b'null', b'"x"', b'{"datasets":1e999,"labelGroups":[]}', b'\0'*99], ids=range(8))
def test_mdai_that_is_no_export(tmp_path, text, capfd):
    (tmp_path/'d').mkdir(); (tmp_path/'d'/'annotations.json').write_bytes(text)
    assert run('table', tmp_path/'d', '--layout','ricord', '-o', tmp_path/'t.csv')==2 and capfd.readouterr().err.count('\n')==1

@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs named pipes')
def test_annotations_that_are_a_pipe(tmp_path, capfd):
    os.mkfifo(tmp_path/'pipe')
    (tmp_path/'d').mkdir()
    assert run('table', tmp_path/'d', '--layout','ricord', '--annotations', tmp_path/'pipe', '-o', tmp_path/'t.csv')==2
    assert 'is not a regular file' in capfd.readouterr().err

# Radiopaedia

def turn(root, pattern):
    "Exchange front and back in the affines of files"
    for p in root.rglob(pattern):
        img = nib.load(p); nib.save(nib.Nifti1Image(np.asanyarray(img.dataobj), np.diag([1,-1,1,1])@img.affine), p)

def test_radiopaedia_is_turned_by_what_the_scan_shows(phantoms, tmp_path):
    "Front and back exchanged: noticed, repaired in scan and masks, and a mask is written on the file's own voxels; a right file is left alone"
    from covid3d.volume import save_mask
    write_layout(phantoms[:3], tmp_path/'d', 'coronacases'); turn(tmp_path/'d', 'radiopaedia*')
    assert run('table', tmp_path/'d', '--layout','coronacases', '-o', tmp_path/'t.csv')==0
    assert [r['flip'] for r in rows(tmp_path/'t.csv')]==['','','front-back']
    case = read_cases(tmp_path/'t.csv')[-1]; ct = case.open_ct(); mask = case.open_mask('lesion', ct)
    assert np.array_equal(mask.data, phantoms[2].lesion.data)
    assert all(f.level=='note' or 'the lung is cut off' in f.fault for r in check_table(tmp_path/'t.csv') for f in r.findings)
    save_mask(mask.data, ct, tmp_path/'m.nii.gz')
    a,b = nib.load(tmp_path/'m.nii.gz'),nib.load(case.masks['lesion'])
    assert np.array_equal(np.asanyarray(a.dataobj), np.asanyarray(b.dataobj)) and np.allclose(a.affine, b.affine)

def test_radiopaedia_patients(phantoms, tmp_path):
    "Two studies of one person never part"
    for n in ('radiopaedia_29_86490_1','radiopaedia_29_86491_1','radiopaedia_7_85703_0','coronacases_001'):
        for k,d in dict(ct='ct', lesion='infection_mask', lung='lung_mask').items():
            v = getattr(phantoms[0], k); save_volume(windowed(v) if k=='ct' and n[0]=='r' else v, tmp_path/d/f'{n}.nii.gz')
    for seed in range(4):
        df = datasets.coronacases(tmp_path, valid=.4, seed=seed).set_index('case')
        assert df.patient['radiopaedia_29_86490_1']==df.patient['radiopaedia_29_86491_1']=='radiopaedia_29'
        assert df.split['radiopaedia_29_86490_1']==df.split['radiopaedia_29_86491_1']
    assert df.flip['radiopaedia_7_85703_0']=='head-foot' and any('reverse order' in o for o in df.attrs['notes'])
    assert any(o.startswith('3 Radiopaedia scans windowed to -1250:250 HU') for o in df.attrs['notes'])

def test_the_check_warns_of_a_spine_in_front(phantoms, tmp_path):
    for k,d in dict(ct='ct', lesion='infection_mask', lung='lung_mask').items(): save_volume(getattr(phantoms[0], k), tmp_path/d/'a.nii.gz')
    turn(tmp_path, 'a.nii.gz')
    df = datasets.folder(tmp_path)
    f, = check_table(df)[0].findings
    assert f.level=='warning' and 'the spine is in front' in f.fault
    f, = check_table(df.assign(flip='front-back'))[0].findings
    assert f.level=='note' and 'front-back wrong: reversed' in f.fault

# The table that is written

@pytest.mark.promise('lost')
@each('name,text', [('letter.csv','name,street\nJane,Elm\n'), ('cases_sources.csv','mine\n1\n'), ('ct.nii.gz','x')])
def test_cases_never_replaces_another_file(root, tmp_path, capfd, name, text):
    """`cases --overwrite` replaces a case table and its sources, and no other file"""
    (tmp_path/name).write_text(text)
    out = tmp_path/(name if name!='cases_sources.csv' else 'cases.csv')
    assert run('table', root/'mosmed', '--layout','mosmed', '-o', out, '--overwrite')==2
    assert capfd.readouterr().err.count('\n')==1 and (tmp_path/name).read_text()==text and len(list(tmp_path.iterdir()))==1

def test_cases_is_written_by_one_process(root, tmp_path, capfd):
    import subprocess, sys
    code = 'import sys,time\nfrom covid3d.files import locked\nwith locked(sys.argv[1]): print("in", flush=True); time.sleep(60)'
    p = subprocess.Popen([sys.executable,'-c',code,str(tmp_path/'t.csv')], stdout=subprocess.PIPE)
    try:
        p.stdout.readline()
        assert run('table', root/'mosmed', '--layout','mosmed', '-o', tmp_path/'t.csv')==2 and 'another process' in capfd.readouterr().err
    finally: p.kill(); p.wait()
    assert run('table', root/'mosmed', '--layout','mosmed', '-o', tmp_path/'t.csv')==0
    assert [o.name for o in tmp_path.iterdir()]==['t.csv']

@each('seed', ['0','-1','1'+'0'*20])
def test_any_seed(root, tmp_path, seed, capfd):
    assert len(datasets.covid1920(root/'covid1920', seed=int(seed)))
    assert run('table', root/'covid1920', '--layout','covid1920', '-o', tmp_path/'t.csv', f'--seed={seed}')==(0 if seed=='0' else 2)
    assert seed=='0' or '--seed: is too' in capfd.readouterr().err

def test_predict_dicom_segmentation(archive, weights, tmp_path, capfd, monkeypatch):
    "`--format seg` writes one object a scan that refers to its slices; a NIfTI cannot have one"
    import highdicom as hd
    monkeypatch.setattr(Segmenter, '__call__', lambda self, ct, bar=False: Segmentation(ct, dict(lesion=((ct.data>-800)&(ct.data<-300)).astype(np.uint8)), self))
    argv = ['predict', archive/'S0', '--weights', weights, '--device','cpu']
    assert run(*argv, '--out', tmp_path/'nii')==0 and run(*argv, '--out', tmp_path/'seg', '--format','seg')==0
    ct = open_series(archive/'S0')
    name = pseudonym(ct.source.slices[0].series)
    seg = hd.seg.segread(tmp_path/'seg'/f'{name}_seg.dcm')
    nii = np.asarray(nib.load(tmp_path/'nii'/f'{name}_lesion.nii.gz').dataobj).transpose(2,1,0)
    assert np.array_equal(seg.pixel_array, nii) and nii.any()
    assert {o.ReferencedSOPInstanceUID for o in seg.ReferencedSeriesSequence[0].ReferencedInstanceSequence}=={s.uid for s in ct.source.slices}
    capfd.readouterr()
    save_volume(ct, tmp_path/'one.nii.gz')
    assert run('predict', tmp_path/'one.nii.gz', '--weights', weights, '--out', tmp_path/'x', '--format','seg', '--device','cpu')==2
    assert 'was not read from DICOM' in capfd.readouterr().err and not list((tmp_path/'x').glob('*')) 

def test_plain_layout_with_dicom_scans(phantoms, tmp_path):
    "ct/NAME/ with slices beside infection_mask/NAME.nii.gz"
    for i in range(3):
        write_series(phantoms[i].ct, tmp_path/'ct'/f'chest.{i}', series=i); save_volume(phantoms[i].lesion, tmp_path/'infection_mask'/f'chest.{i}.nii.gz')
    assert run('table', tmp_path, '--layout','plain','-o', tmp_path/'c.csv')==0
    assert run('check', tmp_path/'c.csv')==0
    same_lesions('folder', tmp_path/'c.csv', phantoms[:3])

@pytest.mark.skipif(not data, reason='COVID3D_TEST_DATA is not set: the folder of real CTs is not part of the repository')
def test_real_scans(tmp_path, capfd):
    "Seven CoronaCases scans, saved as grey values, and a DICOM series of a GE scanner"
    assert [recognise(Path(data)/o) for o in ('coronacases_7','cip_ct64','covid_ct_md')]==['coronacases','dicom','dicom']
    with pytest.raises(CTError, match='none that is known'): recognise(Path(data)/'totalseg_chest')
    assert run('table', Path(data)/'coronacases_7', '--layout','coronacases', '--already-windowed','-1000:20','-o', tmp_path/'c.csv')==0
    assert [r['split'] for r in rows(tmp_path/'c.csv')]==['test']*7
    assert run('check', tmp_path/'c.csv', '--json')==0
    found = json.loads(capfd.readouterr().out.split('\n', 1)[1])
    assert found['ok'] and min(r['inside'] for r in found['reports'])>.9
    assert run('table', Path(data)/'cip_ct64', '-o', tmp_path/'d.csv')==0 and run('check', tmp_path/'d.csv')==0
    assert len(rows(tmp_path/'d.csv'))==1 and rows(tmp_path/'d.csv')[0]['case'] in capfd.readouterr().out
    assert run('table', Path(data)/'covid_ct_md', '-o', tmp_path/'e.csv')==0 and len(rows(tmp_path/'e.csv'))==2
    assert run('check', tmp_path/'e.csv')==0 and 'P001' not in capfd.readouterr().out+(tmp_path/'e.csv').read_text()
