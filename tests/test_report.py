"The page of a scan and of a cohort, in a browser and out of it"
import csv, json, shutil

import numpy as np
import pytest

from covid3d.cli import main
from covid3d.inference import Segmentation
from covid3d.phantom import phantom, write_phantoms
from covid3d.quantify import quantify, schema
from covid3d.report import report
from covid3d.volume import Volume, canonical_affine, open_ct, open_mask, save_mask, save_volume

def segmented(seed=23, shape=(40,110,110), spacing=(8.,3.4,3.4)):
    ph = phantom(seed, shape, spacing)
    return Segmentation(ph.ct, dict(lesion=ph.lesion.data, right_lung=(ph.lung.data==1).astype(np.uint8), left_lung=(ph.lung.data==2).astype(np.uint8)))

@pytest.fixture(scope='module')
def chest(): return segmented()

@pytest.mark.parametrize('order', [(0,1,2),(1,0,2),(2,1,0),(0,2,1),(1,2,0),(2,0,1)])
@pytest.mark.parametrize('flips', [(),(0,),(1,2),(0,1,2)])
def test_figures_do_not_depend_on_the_files_axes(chest, order, flips, tmp_path):
    "A scan whose file has its axes permuted and flipped has the same figures as the scan itself."
    import nibabel as nib
    from covid3d.volume import open_ct, open_mask
    def save(x, name):
        save_volume(Volume(x, chest.ct.affine), tmp_path/'a.nii')
        img = nib.load(tmp_path/'a.nii'); ornt = nib.orientations.io_orientation(np.eye(4))[[*order]]
        for a in flips: ornt[a,1] = -1
        nib.save(img.as_reoriented(ornt), tmp_path/name)
    save(chest.ct.data, 'ct.nii.gz'); ct = open_ct(tmp_path/'ct.nii.gz')
    masks = {}
    for k,m in chest.masks.items(): save(m, f'{k}.nii.gz'); masks[k] = open_mask(tmp_path/f'{k}.nii.gz', like=ct).data
    a,b = quantify(chest),quantify(Segmentation(ct, masks))
    np.testing.assert_allclose(a.regions, b.regions, rtol=1e-4)
    assert [*a.lesions.lung]==[*b.lesions.lung] and np.allclose(a.lesions.ml, b.lesions.ml)
    for k in ('first_slice','slice','last_slice'): assert [*a.lesions[k]]==[*b.lesions[k]]
    assert np.allclose(a.lesions.consolidation_percent, b.lesions.consolidation_percent)

def test_a_row_for_each_lesion_by_hand():
    "Two lesions whose slices and kind can be counted: 2+12+2 voxels in slices 3 to 5, largest in 4, a quarter of them consolidation; and 8 voxels of ground glass in slice 1."
    x = np.full((8,12,24), -850., np.float32); masks = {k:np.zeros(x.shape, np.uint8) for k in ('lesion','right_lung','left_lung')}
    masks['right_lung'][1:7,1:11,1:11] = masks['left_lung'][1:7,1:11,13:23] = 1
    m = masks['lesion']; m[3,5,4:6] = m[4,4:7,3:7] = m[5,5,4:6] = 1; m[1,2:4,14:18] = 1
    x[m>0] = -600; x[4,4,3:7] = -300  # HU from −300 on is consolidation, −300 itself included
    found = quantify(Segmentation(Volume(x, canonical_affine((5,2,2))), masks), least_ml=.1)
    a,b = found.lesions.to_dict('records')
    assert (a['lung'],a['first_slice'],a['slice'],a['last_slice'],a['consolidation_percent'])==('right_lung',3,4,5,25) and a['ml']==pytest.approx(16*.02)
    assert (b['lung'],b['first_slice'],b['slice'],b['last_slice'],b['consolidation_percent'])==('left_lung',1,1,1,0) and b['ml']==pytest.approx(8*.02)
    assert quantify(Segmentation(Volume(x, np.eye(4)), masks), consolidation=-299, least_ml=0).lesions.consolidation_percent.tolist()==[0,0]
    import jsonschema
    given = found.to_dict(); jsonschema.validate(given, schema())
    for o in given['lesions']:  # files without the optional columns stay valid
        for k in ('first_slice','last_slice','consolidation_percent'): del o[k]
    jsonschema.validate(given, schema())

@pytest.mark.parametrize('seed', range(6))
def test_parts_add_up(seed):
    "Volumes of both lungs, of the thirds and of the halves add up to the whole, in any patient."
    found = quantify(segmented(100+seed, (30,90,90), (10.,4.,4.)))
    for parts in (['right_lung','left_lung'],['upper third','middle third','lower third'],['ventral half','dorsal half']):
        for k in ('lung_ml','lesion_ml','ground_glass_ml','consolidation_ml'):
            assert found.regions[k][parts].sum()==pytest.approx(found.regions[k]['lungs'], rel=1e-9)

@pytest.fixture(scope='module')
def night(tmp_path_factory):
    "A folder of three scans, one of them damaged, and what `covid3d predict` makes of it"
    d = tmp_path_factory.mktemp('night')
    for i in range(3): save_volume(phantom(60+i, (40,110,110), (8.,3.4,3.4)).ct, d/f'in{i}.nii.gz')
    raw = (d/'in1.nii.gz').read_bytes(); (d/'in1.nii.gz').write_bytes(raw[:len(raw)//2])
    assert main(['predict', *(str(d/f'in{i}.nii.gz') for i in range(3)), '-o', str(d/'m'), '--device', 'cpu'])==1
    return d

def test_what_predict_writes(night, capfd):
    "`predict` writes masks, figures and a page for each scan, and a page and a table for all; a damaged scan is named on it, and a second run keeps everything."
    import jsonschema
    m = night/'m'
    made = {f'in{i}{k}' for i in (0,2) for k in ('_lesion.nii.gz','_lungs.nii.gz','.json','.html','.png')}
    assert {o.name for o in m.iterdir()}==made|{'index.html','measurements.csv','scans.csv','covid3d.json'}
    for i in (0,2): jsonschema.validate(json.loads((m/f'in{i}.json').read_text()), schema())
    rows = [*csv.DictReader((m/'measurements.csv').open())]
    assert [r['scan'] for r in rows]==['in0','in2'] and 'in1' in (m/'index.html').read_text()
    before = {o.name:o.read_bytes() for o in m.iterdir()}
    assert main(['predict', str(night/'in0.nii.gz'), str(night/'in2.nii.gz'), '-o', str(m), '--device', 'cpu'])==0
    assert capfd.readouterr().out.count('already done')==2
    assert {k:v for k,v in before.items() if k not in ('scans.csv','index.html')}=={o.name:o.read_bytes() for o in m.iterdir() if o.name not in ('scans.csv','index.html')}

def test_a_page_of_somebody_else_stays(night, tmp_path, capfd):
    "A page, a table or figures that covid3d predict did not write are not replaced, with --overwrite neither."
    for k in ('index.html','measurements.csv','in0.html','in0.json'):
        out = tmp_path/k; out.mkdir(); (out/k).write_text('mine')
        assert main(['predict', str(night/'in0.nii.gz'), '-o', str(out), '--device', 'cpu', '--overwrite'])==2
        assert (out/k).read_text()=='mine' and k in capfd.readouterr().err and len([*out.iterdir()])<=2

def test_other_formats(night, tmp_path):
    "One file with all labels; probabilities on the scan's grid; no page where none is wanted."
    import nibabel as nib
    assert main(['predict', str(night/'in0.nii.gz'), '-o', str(tmp_path), '--device', 'cpu', '--format', 'multilabel', '--no-page', '--probabilities'])==0
    labels,lungs,lesion = (np.asarray(nib.load(p).dataobj) for p in (tmp_path/'in0_labels.nii.gz', night/'m'/'in0_lungs.nii.gz', night/'m'/'in0_lesion.nii.gz'))
    assert (tmp_path/'labels.ctbl').read_text().splitlines()[3]=='3 lesion 240 160 16 255' and '3 240 160 16 1 1 1 "lesion"' in (tmp_path/'labels.txt').read_text()
    assert ((labels==3)==(lesion>0)).all() and (labels[lesion==0]==lungs[lesion==0]).all()
    p = nib.load(tmp_path/'in0_lesion_probability.nii.gz'); x = p.get_fdata()
    assert np.allclose(p.affine, nib.load(night/'in0.nii.gz').affine) and 0<=x.min() and x.max()<=1+1e-6
    assert ((x>=.51)<=(lesion>0)).all() and not [*tmp_path.glob('in0.html')] and (tmp_path/'in0.json').exists()

def test_formats_of_itk(night, tmp_path):
    "A scan in NRRD or MetaImage is segmented as the same scan in NIfTI is, and its labels can be written as a .seg.nrrd of 3D Slicer or as MetaImage."
    sitk,nib = pytest.importorskip('SimpleITK'),pytest.importorskip('nibabel')
    save_volume(open_ct(night/'in0.nii.gz'), tmp_path/'in0.nrrd'); save_volume(open_ct(night/'in2.nii.gz'), tmp_path/'in2.mha')
    for kind in ('nrrd','mha','nifti'): assert main(['predict', str(tmp_path), '-o', str(tmp_path/kind), '--device', 'cpu', '--format', kind, '--no-page'])==0
    for k in ('in0','in2'):
        lesion,lungs = (np.asarray(nib.load(night/'m'/f'{k}_{o}.nii.gz').dataobj) for o in ('lesion','lungs'))
        assert (np.asarray(nib.load(tmp_path/'nifti'/f'{k}_lesion.nii.gz').dataobj)==lesion).all()
        for p in (tmp_path/'nrrd'/f'{k}.seg.nrrd', tmp_path/'mha'/f'{k}_labels.mha'):
            img = sitk.ReadImage(p); x = sitk.GetArrayFromImage(img).transpose(2,1,0)
            assert (x==np.where(lesion>0, 3, lungs)).all() and np.allclose(img.GetOrigin(), nib.load(night/f'{k}.nii.gz').affine[:3,3]*[-1,-1,1], atol=1e-3)
        names = {sitk.ReadImage(tmp_path/'nrrd'/f'{k}.seg.nrrd').GetMetaData(f'Segment{i}_{o}') for i in range(3) for o in ('Name','LabelValue')}
        assert names=={'right lung','left lung','lesion','1','2','3'}
    assert sorted(o.name for o in (tmp_path/'mha').glob('labels.*'))==['labels.ctbl','labels.txt'] and not [*(tmp_path/'nrrd').glob('labels.*')]

def test_lobes_and_lungs_of_a_case_table(tmp_path, capfd):
    "The lobes that a table names are graded; its lungs are measured in where that is asked for, and a changed mask has the scan measured again."
    table = write_phantoms(tmp_path/'ph', n=1, seed=60, shape=(40,110,110), spacing=(8.,3.4,3.4)); row = next(csv.DictReader(table.open()))
    name,lung = row['case'],tmp_path/'ph'/row['lung']
    def figures(*more):
        assert main(['predict', str(table), '-o', str(tmp_path/'m'), '--device', 'cpu', '--no-page', *more])==0
        return json.loads((tmp_path/'m'/f'{name}.json').read_text()), 'already done' in capfd.readouterr().out
    own,_ = figures()
    assert 0<=own['severity_score']<=25 and set(own['lobes'])=={'right upper','right middle','right lower','left upper','left lower'}
    assert figures()[1]
    assert main(['predict', str(table), '-o', str(tmp_path/'m'), '--device', 'cpu', '--no-page', '--given-lungs'])==2  # other settings
    given,_ = figures('--given-lungs', '--overwrite')
    ct = open_ct(tmp_path/'ph'/row['ct']); m = open_mask(lung, ct, (0,1,2))
    assert given['regions']['left_lung']['lung_ml']==pytest.approx((m.data==2).sum()*ct.ml_per_voxel, rel=1e-6)!=own['regions']['left_lung']['lung_ml']
    assert figures('--given-lungs')[1]
    x = m.data.copy(); x[:20] = 0; save_mask(x, ct, lung)
    less,kept = figures('--given-lungs')
    assert not kept and less['regions']['lungs']['lung_ml']<given['regions']['lungs']['lung_ml']

def test_no_patient_data(tmp_path):
    "No page, table of figures or file name holds a patient's name or an identifier of the header."
    from covid3d.dicom import write_series
    import pydicom
    write_series(phantom(60, (40,110,110), (8.,3.4,3.4)).ct, tmp_path/'DOE^JANE')
    ids = set()
    for p in (tmp_path/'DOE^JANE').iterdir():
        d = pydicom.dcmread(p); d.PatientName,d.PatientID = 'ROE^JOHANNA','PID00417'
        ids |= {str(d.StudyInstanceUID),str(d.SeriesInstanceUID)}; d.save_as(p)
    assert main(['predict', str(tmp_path/'DOE^JANE'), '-o', str(tmp_path/'m'), '--device', 'cpu'])==0
    for o in (tmp_path/'m').iterdir():
        if o.name=='scans.csv': continue
        raw = o.read_bytes()
        assert not any(k.encode() in raw or k in o.name for k in ('DOE^JANE','ROE^JOHANNA','PID00417',*ids)), o.name

def browser():
    exe = next((p for p in ('chromium','chromium-browser','google-chrome') if shutil.which(p)), None)
    try: from playwright.sync_api import sync_playwright
    except ImportError: return None
    return exe and (sync_playwright, shutil.which(exe))

@pytest.fixture(scope='module')
def chrome():
    if not browser(): pytest.skip('needs Chromium and Playwright')
    start,exe = browser()
    with start() as p:
        chrome = p.chromium.launch(executable_path=exe, args=['--no-sandbox'])
        yield chrome
        chrome.close()

@pytest.fixture(scope='module')
def tab(chrome, chest, tmp_path_factory):
    "Opens the page of a phantom offline"
    d = tmp_path_factory.mktemp('page'); report(chest, d/'p.html', 'phantom 23')
    def opened(width=1400, height=1000, **how):
        page = chrome.new_context(viewport=dict(width=width, height=height), offline=True, **how).new_page()
        page.faults = []
        page.on('console', lambda m: page.faults.append(m.text)); page.on('pageerror', lambda e: page.faults.append(str(e)))
        page.goto(f'file://{d}/p.html'); page.wait_for_selector('#viewer[data-ready=yes]', timeout=60_000)
        return page
    return opened

def picture(page, name): return page.evaluate(f'document.getElementById("{name}").toDataURL()')

def test_every_control_of_the_page(tab, chest):
    "Sliders, wheel, keys, clicks, windows, overlay and the list of lesions all change what is shown, and the planes stay linked."
    page = tab(); where = lambda k: page.text_content(f'#{k}-where')
    found = quantify(chest).lesions.iloc[0]
    assert where('axial').startswith(f'lesion 1, slice {int(found.slice)} of 0–')
    for k in ('ArrowUp','ArrowDown','w','o'):
        before = picture(page, 'axial'); page.keyboard.press(k); assert picture(page, 'axial')!=before, k
    page.keyboard.press('o'); page.click('#window-lung')
    before = picture(page, 'coronal'); page.click('#window-mediastinum'); assert picture(page, 'coronal')!=before
    assert page.get_attribute('#window-mediastinum', 'aria-pressed')=='true'
    before = picture(page, 'sagittal'); page.fill('#overlay', '0'); assert picture(page, 'sagittal')!=before
    page.fill('#axial-at', '3'); assert where('axial').startswith('slice 3 ')
    page.hover('#axial'); page.mouse.wheel(0, -200); page.wait_for_timeout(50); assert not where('axial').startswith('slice 3 ')
    a,b = where('coronal'),where('sagittal')
    page.locator('#axial').click(position=dict(x=40, y=60)); assert where('coronal')!=a and where('sagittal')!=b
    page.click('[data-lesion="0"]'); assert where('axial').startswith(f'lesion 1, slice {int(found.slice)} of 0–')
    page.keyboard.press('n'); assert page.get_attribute('[data-lesion="1"]', 'aria-pressed')=='true'
    assert not page.faults

@pytest.mark.parametrize('scheme', ['light','dark'])
def test_the_page_on_a_telephone(tab, scheme):
    "At 390 pixels nothing is cut off, and a finger scrolls slices sideways."
    page = tab(390, 844, color_scheme=scheme, has_touch=True)
    assert page.evaluate('document.documentElement.scrollWidth')<=390
    before = page.text_content('#axial-where')
    page.evaluate('''() => { const c = document.getElementById('axial'), f = (t, x) => c.dispatchEvent(new PointerEvent(t, {pointerId: 1, pointerType: 'touch', clientX: x, clientY: 200, bubbles: true}))
        c.setPointerCapture = () => {}; f('pointerdown', 100); f('pointermove', 160); f('pointerup', 160) }''')
    assert page.text_content('#axial-where')!=before and not page.faults

def test_the_page_prints_on_one_sheet(tab):
    "The printed page is one A4 sheet."
    assert tab().pdf(format='A4').count(b'/Type /Page\n')==1

def test_a_cohort_is_sorted_in_the_browser(chrome, night):
    "A click on a heading sorts the table of a cohort."
    page = chrome.new_page(); page.goto(f'file://{night}/m/index.html')
    ml = lambda: [float(o) for o in page.eval_on_selector_all('tbody td:nth-child(3)', 'a => a.map(o => o.dataset.value)') if o]
    page.click('th:nth-child(3) button'); down = ml(); page.click('th:nth-child(3) button')
    assert down==sorted(down, reverse=True) and ml()==down[::-1] and len(down)==2
