"The four data sets in their true layouts, from phantoms through the command line: cases → check → train → evaluate; and DICOM in, masks out"
import csv, json, os
from pathlib import Path

import nibabel as nib, numpy as np, pydicom, pytest

from covid3d import datasets
from covid3d.cases import read_cases
from covid3d.cli import main
from covid3d.dicom import ct_datasets, open_series, save_dicom, write_series
from covid3d.metrics import dice
from covid3d.phantom import phantom
from covid3d.volume import save_volume

each = pytest.mark.parametrize
data = os.environ.get('COVID3D_TEST_DATA')
small = ['--weights','random','--width','4','--spacing','9,5,5','--patch','16,48,48','--epochs','1','--patches','2','--device','cpu']
sets = ('coronacases','mosmed','covid1920','ricord')

@pytest.fixture(scope='module')
def phantoms(): return [phantom(i, shape=(32,96,96), spacing=(9,3.7,3.7)) for i in range(5)]

@pytest.fixture(scope='module')
def root(phantoms, tmp_path_factory):
    "All four data sets, each in a folder of its name"
    root = tmp_path_factory.mktemp('sets')
    for k in sets: getattr(datasets, f'write_{k}')(phantoms, root/k)
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
    assert run('cases', name, root/name, '--valid','0.25','--test','0.25','-o',table)==0
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
    assert run('cases', name, root/name, '-o', tmp_path/'c.csv')==0
    got = [r['split'] for r in rows(tmp_path/'c.csv')]
    assert got==want if name!='ricord' else sorted(got)==want

def test_kaggle(phantoms, tmp_path):
    datasets.write_coronacases(phantoms, tmp_path/'k', 'kaggle')
    assert run('cases','coronacases', tmp_path/'k', '-o', tmp_path/'c.csv')==0
    same_lesions('coronacases', tmp_path/'c.csv', phantoms)

def test_windowed_radiopaedia(root, phantoms, tmp_path):
    "Grey values come back as the HU they stood for, within half a grey step inside the window"
    assert run('cases','coronacases', root/'coronacases', '-o', tmp_path/'c.csv')==0
    ct = read_cases(tmp_path/'c.csv')[-1].open_ct()
    assert abs(ct.data-phantoms[-1].ct.data.clip(-1250,250)).max()<=1500/255/2+.01 and -1250<=ct.data.min() and ct.data.max()<=250

def test_ricord_table_can_be_moved_with_its_masks(root, tmp_path):
    assert run('cases','ricord', root/'ricord', '-o', tmp_path/'a'/'cases.csv')==0
    (tmp_path/'a').rename(tmp_path/'b')
    mask = next(r['lesion'] for r in rows(tmp_path/'b'/'cases.csv') if r['lesion'])
    assert mask.startswith('cases_masks/') and (tmp_path/'b'/mask).is_file()

@each('name', sets)
def test_phantom_layout(name, tmp_path, monkeypatch, capfd):
    "`covid3d phantom --layout` writes what `covid3d cases` reads, and says so"
    real = phantom
    monkeypatch.setattr('covid3d.phantom.phantom', lambda seed, **k: real(seed, shape=(32,96,96), spacing=(9,3.7,3.7)))
    assert run('phantom', tmp_path/'d', '--n','3','--layout',name)==0
    assert f'covid3d cases {name} {tmp_path/"d"}' in capfd.readouterr().out
    assert run('cases', name, tmp_path/'d', '-o', tmp_path/'c.csv')==0 and len(rows(tmp_path/'c.csv'))==3
    assert run('phantom', tmp_path/'d', '--n','3','--layout',name)==2

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
    from covid3d.inference import NetSpec, save_model
    from covid3d.transforms import CTSpec
    path,net = tmp_path_factory.mktemp('w')/'model.safetensors',NetSpec(width=4)
    save_model(net.build(('lesion',)), path, CTSpec(spacing=(9,5,5), patch=(16,48,48)), net)
    return path

def test_archive(archive, weights, tmp_path, capfd):
    "A tree of DICOM becomes a table without a name in it, is checked, and segmented; the broken series stops nothing"
    table,masks = tmp_path/'cases.csv',tmp_path/'masks'
    assert run('cases','folder', archive, '-o', table)==0
    r = rows(table)
    assert [o['case'] for o in r]==[f'case_{i:03d}' for i in range(1,5)] and [o['patient'] for o in r]==['case_001','case_001','case_003','case_004']
    assert run('check', table)==1
    assert run('predict', table, '--weights', weights, '--out', masks, '--device','cpu')==1
    out = capfd.readouterr()
    assert '1 slice missing' in out.out and '1 of 4 scans failed' in out.err
    assert sorted(o.name for o in masks.iterdir())==[f'case_{i:03d}_lesion.nii.gz' for i in (1,2,3)]
    text = out.out+out.err+table.read_text()+' '.join(map(str, tmp_path.rglob('*')))
    assert not any(o in text for o in ('DOE','ROE','POE','JANE','JIM'))

def test_predict_dicom_segmentation(archive, weights, tmp_path, capfd, monkeypatch):
    "`--format seg` writes one object a scan that refers to its slices; a NIfTI cannot have one"
    import highdicom as hd
    monkeypatch.setattr('covid3d.predict.segment', lambda model, spec, ct, *a, **k: dict(lesion=((ct.data>-800)&(ct.data<-300)).astype(np.uint8)))
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
    assert run('cases','folder', tmp_path, '--layout','plain','-o', tmp_path/'c.csv')==0
    assert run('check', tmp_path/'c.csv')==0
    same_lesions('folder', tmp_path/'c.csv', phantoms[:3])

@pytest.mark.skipif(not data, reason='COVID3D_TEST_DATA is not set: the folder of real CTs is not part of the repository')
def test_real_scans(tmp_path, capfd):
    "Seven CoronaCases scans, saved as grey values, and a DICOM series of a GE scanner"
    assert run('cases','coronacases', Path(data)/'coronacases_7', '--already-windowed','-1000:20','-o', tmp_path/'c.csv')==0
    assert [r['split'] for r in rows(tmp_path/'c.csv')]==['test']*7
    assert run('check', tmp_path/'c.csv', '--json')==0
    found = json.loads(capfd.readouterr().out.split('\n', 1)[1])
    assert found['ok'] and min(r['inside'] for r in found['reports'])>.9
    assert run('cases','folder', Path(data)/'cip_ct64', '-o', tmp_path/'d.csv')==0 and run('check', tmp_path/'d.csv')==0
    assert 'case_001' in capfd.readouterr().out
