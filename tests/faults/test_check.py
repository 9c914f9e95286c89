"What `covid3d check` finds in cases, P1 to P10 and D12, and what it does with files that do not open: one bad case, and the others go on"
import json, shutil
from pathlib import Path

import nibabel as nib, numpy as np, pandas as pd, pytest

from covid3d.cases import check_cases, check_table, columns, levels, read_cases, require_ok
from covid3d.cli import main
from covid3d.datasets import mosmed
from covid3d.dicom import write_series
from covid3d.weights import NetSpec, save_model
from covid3d.transforms import CTSpec
from covid3d.volume import CTError, Volume, canonical_affine, save_volume
from coarse import cached

each = pytest.mark.parametrize
shape,affine = (10,16,18),canonical_affine((5,3,2),(90,110,-240))

def box(*ranges):
    "A mask of a box"
    m = np.zeros(shape, np.uint8); m[tuple(slice(*o) for o in ranges)] = 1
    return m

lung,lesion = box((2,8),(3,13),(2,16)),box((3,6),(4,8),(4,9))  # neither touches an edge of the scan

def ct(seed): return np.random.default_rng(seed).integers(-1000, 400, shape).astype(np.int16)
def save(path, data, aff=affine): save_volume(Volume(data, aff), path); return path

@pytest.fixture
def cohort(tmp_path):
    "Four good cases and their table; `change` breaks one and checks"
    for i in range(4): save(tmp_path/f'{i}.nii', ct(i)); save(tmp_path/f'{i}_lesion.nii', lesion); save(tmp_path/f'{i}_lung.nii', lung)
    df = pd.DataFrame([dict.fromkeys(columns, '')|dict(case=f'c{i}', patient=f'p{i}', ct=f'{i}.nii', lesion=f'{i}_lesion.nii', lung=f'{i}_lung.nii',
        split=s) for i,s in enumerate(['train','train','valid','test'])])
    return Cohort(tmp_path, df)

class Cohort:
    def __init__(self, root, df): self.root,self.df,self.table = root,df,root/'cases.csv'
    def __truediv__(self, name): return self.root/name
    def write(self, row=1, **change):
        for k,v in change.items(): self.df.loc[row,k] = str(v)
        self.df.to_csv(self.table, index=False); return self
    def check(self, **change): return check_table(self.write(**change).table)
    def found(self, **change): return [f for r in self.check(**change) for f in r.findings]

def one_line(f):
    "A finding names the file, the fault and the remedy, in one line"
    assert '\n' not in str(f) and f.what and len(f.fault)>5 and len(f.remedy)>5 and f.level in levels
    return f

def only(cohort, level, what, *words, case='c1', **change):
    "One finding, on one case; the others were measured all the same, and the command line says and returns what follows"
    reports = cohort.check(**change)
    f, = [o for r in reports for o in r.findings]
    assert (one_line(f).level,f.case)==(level,case) and f.what.endswith(str(what)) and all(o in f.fault for o in words), str(f)
    assert all(r.ok and r.lesion_ml>0 and r.lesion_share>0 for r in reports if r.case!=case)
    return reports

def said(capfd, cohort, f, status):
    assert main(['check',str(cohort.table)])==status
    out = capfd.readouterr()
    assert str(f) in out.out.splitlines() and out.err=='' and out.out.splitlines()[-1].startswith('4 cases')

def broken(capfd, cohort, what, *words, **change):
    "An error: exit status 1, the rest goes on, and `train` refuses before it starts"
    reports = only(cohort, 'error', what, *words, **change)
    f, = reports[1].findings
    assert not reports[1].ok
    said(capfd, cohort, f, 1)
    with pytest.raises(CTError) as e: require_ok(reports, cohort.table)
    assert str(e.value)==f'{f.what}: {f.fault}. {f.remedy}.'

def odd(capfd, cohort, level, what, *words, **change):
    "A warning or a note: exit status 0"
    reports = only(cohort, level, what, *words, **change)
    assert reports[1].ok; require_ok(reports, cohort.table)
    said(capfd, cohort, reports[1].findings[0], 0)
    return reports[1]

def test_all_in_order(capfd, cohort):
    "No finding; every number is what it is by hand"
    reports = cohort.check()
    ml = 5*3*2/1000
    assert [len(r.findings) for r in reports]==[0]*4
    for i,r in enumerate(reports):
        assert (r.case,r.shape,r.spacing,r.inside)==(f'c{i}',shape,(5,3,2),1) and (r.hu[0],r.hu[2])==(ct(i).min(),ct(i).max())
        assert np.allclose((r.lesion_ml,r.lung_ml,r.lesion_share), (lesion.sum()*ml,lung.sum()*ml,lesion.sum()/lung.sum()))
    assert main(['check',str(cohort.table)])==0 and capfd.readouterr().out.endswith('4 cases · 0 errors, 0 warnings, 0 notes\n')

# P1 to P8, through the check

@each('kind', ['lesion','lung'])
@each('data,aff,words', [(lesion[:-1],affine,['its shape',"that of 1.nii"]), (lesion.transpose(1,0,2).copy(),affine,['its shape']),
    (lesion,affine@np.diag([1,1,1.02,1]),['its affine differs']),
    (lesion,canonical_affine((5,3,2),(91,110,-240)),['its affine differs']), (lesion*2,affine,['labels 0, 2','expected only 0, 1']),
    (lesion*255,affine,['divide by 255']), (ct(1),affine,['is it a CT?']),
    ((lesion*.5).astype(np.float32),affine,['fractions, not labels']), (np.where(lesion, np.nan, 0).astype(np.float32),affine,['NaN'])],
    ids=['P1','P1-turned','P2','P3','P5','P5-255','P7','P8','P8-nan'])
def test_P1_to_P8_mask(capfd, cohort, kind, data, aff, words):
    if kind=='lung' and 'labels 0, 2' in words: data,words = data*3,['labels 0, 6','expected only 0, 1, 2']
    save(cohort/'bad.nii', data, aff)
    broken(capfd, cohort, 'bad.nii', *words, **{kind:'bad.nii'})

@each('kind', ['lesion','lung'])
def test_P3_float_noise_is_a_note(capfd, cohort, kind):
    save(cohort/'noisy.nii', dict(lesion=lesion, lung=lung)[kind], canonical_affine((5,3,2),(90.0004,110,-240)))
    odd(capfd, cohort, 'note', 'noisy.nii', 'float noise', **{kind:'noisy.nii'})

def test_P6_empty_is_counted(capfd, cohort):
    "An empty lesion mask is a scan without a lesion: 0 ml, a share of 0, a note, and in the sum of notes"
    save(cohort/'none.nii', lesion*0)
    r = odd(capfd, cohort, 'note', 'none.nii', 'the mask is empty', lesion='none.nii')
    assert (r.lesion_ml,r.lesion_share,r.inside)==(0,0,None)
    assert main(['check',str(cohort.table),'--json'])==0 and json.loads(capfd.readouterr().out)['notes']==1

# P9: the mask of somebody else

@pytest.fixture(scope='module')
def phantoms(): return [cached(i) for i in (0,8)]  # their fields of view hold the whole lungs

@pytest.mark.fault('P9')
def test_P9_mask_of_another_patient(tmp_path, phantoms):
    "Of equal shape, so it opens: a warning, because its lesions lie outside this patient's lung; each on its own is silent"
    df = pd.DataFrame([dict(case=f'c{i}', ct=f'{i}.nii', lesion=f'{i}_lesion.nii', lung=f'{i}_lung.nii', split='train') for i in range(2)])
    for i,ph in enumerate(phantoms):
        for k,v in dict(ct='', lung='_lung', lesion='_lesion').items(): save_volume(getattr(ph, k), tmp_path/f'{i}{v}.nii')
    df.to_csv(tmp_path/'t.csv', index=False)
    assert not any(r.findings for r in check_table(tmp_path/'t.csv'))
    moved = phantoms[1].lesion
    save_volume(moved.new(np.roll(moved.data, 24, 1)), tmp_path/'0_lesion.nii')  # as the lesions of a patient who lay elsewhere
    a,b = check_table(tmp_path/'t.csv')
    f, = a.findings
    assert one_line(f).level=='warning' and f.what.endswith('0_lesion.nii') and 'is in the lung mask' in f.fault and a.inside<.8 and a.ok and not b.findings

@pytest.mark.fault('P9')
@each('inside,warned', [(12,False),(10,False),(9,True),(1,True),(0,True)])
def test_P9_line(cohort, inside, warned):
    "The line is 80 %: a lesion of 12 voxels, some of them beside the lung"
    m = box((3,4),(4,5),(2,2+inside)); m[0,0,:12-inside] = 1
    cohort.write(lesion=save(cohort/'m.nii', m).name)
    r = check_table(cohort.table)[1]
    assert r.inside==pytest.approx(inside/12) and [f.level for f in r.findings]==['warning']*warned

@pytest.mark.fault('P9')
def test_P9_share_never_above_one(cohort):
    "A lung mask smaller than the lesion: the share stays a share, or is left out"
    r = cohort.check(lung=save(cohort/'small.nii', box((3,4),(4,5),(4,6))).name)[1]
    assert [f.level for f in r.findings]==['warning'] and (r.lesion_share is None or 0<=r.lesion_share<=1)

# P10: unlabelled is not negative

@pytest.fixture
def unlabelled(tmp_path):
    "MosMed with a scan without a mask"
    for i in range(3): save(tmp_path/'d'/'studies'/'CT-1'/f'study_{i}.nii', ct(i))
    for i in range(2): save(tmp_path/'d'/'masks'/f'study_{i}_mask.nii', lesion)
    return tmp_path/'d'

@pytest.mark.fault('P10')
def test_P10_no_split(capfd, unlabelled, tmp_path):
    "It stays in the table, without a split whatever is asked for; the check has nothing to say, and no volume, least of all 0"
    for kw in ({}, dict(valid=.3), dict(test=.3, valid=.3)): assert mosmed(unlabelled, **kw).split.iloc[-1]==''
    assert main(['table',str(unlabelled),'-o',str(tmp_path/'t.csv')])==0 and 'without a split' in capfd.readouterr().out
    r = check_table(tmp_path/'t.csv')[-1]
    assert r.lesion_ml is None and r.lesion_share is None and not r.findings

@pytest.mark.fault('P10')
def test_P10_named_for_a_split(capfd, unlabelled, tmp_path):
    "A scan without a mask cannot be scored, so naming it is refused, not passed over"
    with pytest.raises(CTError, match='study_2'): mosmed(unlabelled, test=['study_2'])
    assert main(['table',str(unlabelled),'--test','study_1','--test','study_2','-o',str(tmp_path/'t.csv')])==2 and 'study_2' in capfd.readouterr().err

@pytest.mark.fault('P10')
@each('split', ['train','valid','test'])
def test_P10_split_without_mask(capfd, cohort, split):
    cohort.write(split='train'); cohort.write(row=0, split=split, lesion=''); cohort.write(row=1, split='valid'); cohort.write(row=2, split='train')
    cohort.write(row=3, split='test')
    f, = cohort.found()
    assert (one_line(f).level,f.case,f.what)==('error','c0','lesion') and 'an unlabeled scan is not a negative one' in f.fault
    assert main(['check',str(cohort.table)])==1; capfd.readouterr()
    with pytest.raises(CTError, match='not a negative one'): read_cases(cohort.table, split, need=('lesion',))
    more = ['train','--init','random','--width','4']
    if split=='test':
        net = NetSpec(width=4); save_model(net.build(('lesion',)), cohort/'w.safetensors', CTSpec(spacing=(9,5,5), patch=(16,48,48)), net)
        more = ['evaluate','--weights',str(cohort/'w.safetensors')]
    assert main([more[0],str(cohort.table),*more[1:],'--out',str(cohort/'run'),'--device','cpu'])==2
    err = capfd.readouterr().err
    assert err.count('\n')==1 and "case 'c0' has no lesion mask" in err and not (cohort/'run').exists()

@each('old,new', [('split','Split'), ('lesion','mask')])
def test_check_refuses_the_columns_that_train_refuses(capfd, cohort, old, new):
    "`check` names the missing column, as `train` does, and not a fault for each case"
    cohort.df = cohort.df.rename(columns={old:new})
    cohort.df.to_csv(cohort.table, index=False)
    for argv in (['check'], ['train','--init','random','--width','4','--device','cpu','--out',str(cohort/'run')]):
        assert main([argv[0],str(cohort.table),*argv[1:]])==2
        err = capfd.readouterr().err
        assert err.count('\n')==1 and f'the column {old} is missing' in err and f'{new}' in err and not (cohort/'run').exists()

def test_a_folder_in_place_of_a_table(capfd, cohort):
    "A folder is no case table: `check` and `train` say how to write one"
    cohort.write()
    for argv in (['check'], ['train','--init','random','--width','4','--device','cpu','--out',str(cohort.root.parent/'run')]):
        assert main([argv[0],str(cohort.root/'none'),*argv[1:]])==2; capfd.readouterr()
        (cohort/'study').mkdir(exist_ok=True)
        assert main([argv[0],str(cohort/'study'),*argv[1:]])==2
        err = capfd.readouterr().err
        assert 'folder' in err and 'Write a table with `covid3d table`, or by hand (columns case, ct, lesion, split)' in err and 'Save the sheet' not in err

# D12: lungs that are not there

@pytest.mark.fault('D12')
def test_D12_no_lung(capfd, cohort):
    "No lung in the field of view: no fraction, and the reason, never 0"
    r = odd(capfd, cohort, 'warning', 'none.nii', 'there is no lung', 'no fraction', lung=save(cohort/'none.nii', lung*0).name)
    assert r.lesion_share is None and r.lung_ml==0 and r.lesion_ml>0

@pytest.mark.fault('D12')
@each('sides,ranges', [('lower',((0,8),(3,13),(2,16))),('upper',((2,10),(3,13),(2,16))),('front',((2,8),(0,13),(2,16))),('back',((2,8),(3,16),(2,16))),
    ('right',((2,8),(3,13),(0,16))),
    ('left',((2,8),(3,13),(2,18))),('lower and upper',((0,10),(3,13),(2,16)))], ids=lambda o: o if isinstance(o, str) else '')
def test_D12_lung_cut_off(capfd, cohort, sides, ranges):
    "The lung runs out of the scan: no fraction of it, and the reason"
    r = odd(capfd, cohort, 'warning', 'cut.nii', f'cut off at the {sides} edge', 'so no percentage is given', lung=save(cohort/'cut.nii', box(*ranges)).name)
    assert r.lesion_share is None and r.lesion_ml>0
    line = pd.DataFrame(json.loads(json_of(capfd, cohort))['reports']).set_index('case').loc['c1']
    assert line.lesion_share is None or np.isnan(line.lesion_share)

@pytest.mark.fault('D12')
def test_D12_tip_at_the_edge(cohort):
    "A voxel or two in the last slice cut nothing off"
    m = lung.copy(); m[0,5,5:7] = 1
    assert not cohort.found(lung=save(cohort/'tip.nii', m).name)

@pytest.mark.fault('D12')
def test_D12_two_lungs(cohort):
    "A lung mask that tells left from right counts both, once"
    r = cohort.check(lung=save(cohort/'lr.nii', lung*np.where(np.arange(shape[2])<9, 1, 2).astype(np.uint8)).name)[1]
    assert not r.findings and np.isclose(r.lung_ml, lung.sum()*.03) and np.isclose(r.lesion_share, lesion.sum()/lung.sum())

@pytest.mark.fault('D12')
def test_D12_no_lung_mask(cohort):
    r = cohort.check(lung='')[1]
    assert not r.findings and r.lesion_share is None and r.lung_ml is None and r.lesion_ml>0

# Twice, and leaks

@each('splits,level', [(('train','test'),'error'),(('valid','train'),'error'),(('train','train'),'warning'),(('','test'),'warning'),(('',''),'warning')],
    ids='-'.join)
@each('way', ['copy','gzip','flipped'])
def test_same_scan_under_two_names(capfd, cohort, splits, level, way):
    "The same voxels, packed or stored otherwise: an error where they are in two splits"
    img = nib.load(cohort/'0.nii')
    if way=='copy': shutil.copy(cohort/'0.nii', cohort/'x.nii')
    elif way=='gzip': nib.save(img, cohort/'x.nii.gz')
    else: nib.save(img.as_reoriented(nib.orientations.ornt_transform(nib.io_orientation(img.affine), nib.orientations.axcodes2ornt('RAS'))), cohort/'x.nii')
    cohort.write(row=0, split=splits[0]); cohort.write(row=1, split=splits[1], ct='x.nii.gz' if way=='gzip' else 'x.nii')
    f, = cohort.found()
    assert one_line(f).level==level and f.case=='c1' and "the same voxels as case 'c0'" in f.fault and ('in another split' in f.fault)==(level=='error')
    assert main(['check',str(cohort.table)])==int(level=='error')

def test_patient_leak_and_scan(capfd, cohort):
    "The fault of the table comes first, the cases are checked all the same"
    cohort.write(row=3, patient='p0')
    reports = cohort.check()
    f, = reports[0].findings
    assert reports[0].case=='the table' and "'c0', 'c3' are of one patient but in test and train" in one_line(f).fault
    assert [r.case for r in reports[1:]]==['c0','c1','c2','c3']
    assert main(['check',str(cohort.table)])==1
    assert capfd.readouterr().out.splitlines()[-1]=='4 cases · 1 error, 0 warnings, 0 notes'

# Files that do not open

def test_missing_file(capfd, cohort): broken(capfd, cohort, 'nowhere.nii', 'no such file', ct='nowhere.nii')
def test_missing_mask(capfd, cohort): broken(capfd, cohort, 'nowhere.nii', 'no such file', lesion='nowhere.nii')
@each('name', ['x'*300+'.nii','d/'*40+'x.nii','x'*300])
def test_impossible_path(capfd, cohort, name): broken(capfd, cohort, name.split('/')[-1] if name.endswith('.nii') else 'c1 (scan)', ct=name)
def test_folder_for_a_file(capfd, cohort): (cohort/'d.nii').mkdir(); broken(capfd, cohort, 'd.nii', 'this is a folder', ct='d.nii')
def test_empty_folder_for_a_series(capfd, cohort): (cohort/'d').mkdir(); broken(capfd, cohort, 'c1 (scan)', ct='d')
def test_text_for_a_scan(capfd, cohort): (cohort/'a.txt').write_text('hello'); broken(capfd, cohort, 'c1 (scan)', ct='a.txt')
def test_loop(capfd, cohort): (cohort/'l.nii').symlink_to('l.nii'); broken(capfd, cohort, 'l.nii', ct='l.nii')

@each('kind', ['ct','lesion','lung'])
@each('left', [0,.1,.5,.9,.999])
@each('ext', ['.nii','.nii.gz'])
def test_truncated(capfd, cohort, kind, left, ext):
    p = cohort/('cut'+ext)
    save(p, dict(ct=ct(1), lesion=lesion, lung=lung)[kind]); raw = p.read_bytes(); p.write_bytes(raw[:int(len(raw)*left)])
    broken(capfd, cohort, p.name, **{kind:p.name})

@each('call,error', [('open',PermissionError(13,'Permission denied')),('is_dir',PermissionError(13,'Permission denied')),
    ('stat',OSError(5,'Input/output error')),('open',MemoryError())], ids=['file','folder','disk','memory'])
def test_unreadable(capfd, cohort, monkeypatch, call, error):
    "No right to the file or to its folder, a dying disk, too little memory; by a double, since root may read everything"
    real = getattr(Path, call)
    def fail(self, *a, **k):
        if self.name=='1.nii': raise error
        return real(self, *a, **k)
    monkeypatch.setattr(Path, call, fail)
    broken(capfd, cohort, '1.nii', *[getattr(error,'strerror','') or 'memory'])

# Grey values, DICOM

def grey(cohort): return save(cohort/'grey.nii', np.random.default_rng(0).integers(0, 256, shape).astype(np.uint8)).name

def test_already_windowed(cohort):
    r = cohort.check(ct=grey(cohort), already_windowed='-1250:250')[1]
    assert not r.findings and (r.hu[0],r.hu[2])==(-1250,250)
def test_grey_without_window(capfd, cohort): broken(capfd, cohort, 'grey.nii', 'are gray levels, not HU', ct=grey(cohort))
def test_window_for_hu(capfd, cohort): broken(capfd, cohort, '1.nii', 'are not gray levels 0…255', already_windowed='-1250:250')

@each('window', ['20','250:-1250','a:b','1:2:3','nan:5','-inf:250','0:inf',':'])
def test_wrong_window(capfd, cohort, window):
    "The fault of one case: it is named, the others go on"
    cohort.write(ct=grey(cohort), already_windowed=window)
    reports = check_table(cohort.table)
    assert main(['check',str(cohort.table)])==1
    bad = [f for r in reports for f in r.findings]
    assert len(bad)==1 and one_line(bad[0]).level=='error' and repr(window) in bad[0].fault and "c1" in str(bad[0]) and 'low:high' in bad[0].fault
    assert [r.case for r in reports if r.lesion_ml]==['c0','c2','c3']

def test_dicom_case(cohort):
    "A folder, or a file of it, with masks that lie on its grid"
    write_series(Volume(ct(1), affine), cohort/'series')
    want = cohort.check()[1]
    for p in ('series',sorted((cohort/'series').iterdir())[3]):
        r = cohort.check(ct=p)[1]
        assert not r.findings and (r.shape,r.lesion_share,r.hu,r.digest)==(want.shape,want.lesion_share,want.hu,want.digest)

def test_dicom_faults(capfd, cohort):
    write_series(Volume(ct(1), affine), cohort/'series')
    broken(capfd, cohort, 'c1 (scan)', 'already_windowed was given for a DICOM series', ct='series', already_windowed='-1000:20')
    cohort.write(already_windowed='')
    sorted((cohort/'series').iterdir())[4].unlink()
    broken(capfd, cohort, 'c1 (scan)', ct='series')

def test_dicom_twin(cohort):
    "A series and its NIfTI are the same scan"
    write_series(Volume(ct(0), affine), cohort/'series')
    f, = cohort.found(ct='series')
    assert f.level=='warning' and "the same voxels as case 'c0'" in f.fault

# The report

def json_of(capfd, cohort, *more):
    capfd.readouterr(); main(['check',str(cohort.table),'--json',*more]); return capfd.readouterr().out

def strict(s):
    "JSON as the standard has it: no NaN, no Infinity"
    def no(o): raise AssertionError(o)
    return json.loads(s, parse_constant=no)

def test_json(capfd, cohort):
    "The documented keys, and `ok` says what the exit status says"
    d = strict(json_of(capfd, cohort.write()))
    assert {*d}=={'ok','cases','errors','warnings','notes','reports'} and (d['ok'],d['cases'],d['errors'])==(True,4,0)
    assert {*d['reports'][0]}=={'case','split','shape','spacing','hu','lesion_ml','lung_ml','lesion_share','inside','digest','findings'}
    cohort.write(row=0, ct='nowhere.nii'); cohort.write(row=1, lesion=save(cohort/'none.nii', lesion*0).name)
    cohort.write(row=2, lung=save(cohort/'nl.nii', lung*0).name); cohort.write(row=3, patient='p0')
    d = strict(json_of(capfd, cohort))
    assert (d['ok'],d['cases'],d['errors'],d['warnings'],d['notes'])==(False,4,2,1,1) and d['reports'][1]['shape'] is None
    assert all({*f}=={'level','case','what','fault','remedy'} for r in d['reports'] for f in r['findings'])

def test_json_of_infinite_values(capfd, cohort):
    x = ct(1).astype(np.float32); x[0,0,0] = np.nan; x[1,1,1] = np.inf
    d = strict(json_of(capfd, cohort.write(ct=save(cohort/'nan.nii', x).name)))
    assert d['ok'] and d['notes']==1

@each('argv,word', [(['--split','tests'],'tests'),(['--workers','0'],'workers'),(['--workers','x'],'workers')])
def test_wrong_options(capfd, cohort, argv, word):
    assert main(['check',str(cohort.write().table),*argv])==2
    out = capfd.readouterr()
    assert out.err.count('\n')==1 and word in out.err and out.out==''

def test_split(capfd, cohort):
    d = strict(json_of(capfd, cohort.write(row=0, ct='nowhere.nii'), '--split','test'))
    assert d['ok'] and [r['case'] for r in d['reports']]==['c3']

def test_split_that_is_empty(capfd, cohort):
    "Nothing was checked, which is no success"
    assert main(['check',str(cohort.write(row=2, split='train').table),'--split','valid'])==2
    assert "no case has the split 'valid'" in capfd.readouterr().err

def test_every_case_bad_in_its_own_way(capfd, cohort):
    "None stops the check, each is told once, and the exit status is 1"
    (cohort/'2.nii').write_bytes(b'x'*400); (cohort/'0.nii').unlink(); save(cohort/'1_lesion.nii', lesion*7); save(cohort/'3_lung.nii', ct(3))
    found = cohort.found()
    assert all(one_line(f).level=='error' for f in found)
    assert [(f.case,Path(f.what).name) for f in found]==[('c0','0.nii'),('c1','1_lesion.nii'),('c2','2.nii'),('c3','3_lung.nii')]
    with pytest.raises(CTError, match='3 more: `covid3d check'): require_ok(check_cases(read_cases(cohort.table)), cohort.table)

@each('error', [MemoryError(), OSError(5, 'Input/output error'), RuntimeError('cannot allocate'), RecursionError('deep')], ids=lambda o: type(o).__name__)
def test_whatever_a_case_raises_is_its_own_fault(cohort, monkeypatch, error):
    "Memory, the disk, a library: the case is named, the others are checked"
    from covid3d import cases
    real = cases.open_mask
    def fail(path, **k):
        if Path(path).name=='2_lung.nii': raise error
        return real(path, **k)
    monkeypatch.setattr(cases, 'open_mask', fail)
    reports = cohort.check()
    f, = [o for r in reports for o in r.findings]
    assert f.case=='c2' and f.level=='error' and one_line(f) and sum(r.lesion_ml is not None and r.ok for r in reports)==3
