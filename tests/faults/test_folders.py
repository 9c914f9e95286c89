"Folder layouts and case tables, F1 to F9 and S1 to S6: each bad folder or table is made here, and met through Python and the command line"
import csv, json, os, re
from pathlib import Path

import numpy as np, pandas as pd, pytest

from covid3d import datasets
from covid3d.cases import check_table, columns, read_cases, safe_cell, write_cases
from covid3d.cli import main
from covid3d.predict import find_scans
from covid3d.dicom import write_series
from covid3d.statistics import score_table, scores_csv
from covid3d.volume import CTError, Volume, canonical_affine, save_volume

each = pytest.mark.parametrize
kinds = 'coronacases','mosmed','covid1920','folder','ricord'

def scan(seed=0, shape=(6,8,7)):
    "A tiny scan in HU, another one for each seed"
    return Volume(np.random.default_rng(seed).integers(-1000, 400, shape).astype(np.int16), canonical_affine((5,3,3)))

blob = np.zeros((6,8,7), np.uint8); blob[2:4,3:6,2:5] = 1

def put(path, seed=None):
    "A scan at `path`, or a mask where there is no seed"
    save_volume(scan().new(blob) if seed is None else scan(seed), path)
    return Path(path)

layouts = dict(  # kind of table, file of case i, file of its mask
    plain=('folder', 'ct/p{}.nii.gz', 'infection_mask/p{}.nii.gz'), nnunet=('folder', 'imagesTr/p{}_0000.nii.gz', 'labelsTr/p{}.nii.gz'),
    zenodo=('coronacases', 'COVID-19-CT-Seg_20cases/coronacases_00{}.nii.gz', 'Infection_Mask/coronacases_00{}.nii.gz'),
    kaggle=('coronacases', 'ct_scans/coronacases_org_00{}.nii', 'infection_mask/coronacases_00{}.nii'),
    covid1920=('covid1920', 'Train/v-{}_ct.nii.gz', 'Train/v-{}_seg.nii.gz'), mosmed=('mosmed', 'studies/CT-1/study_{}.nii.gz', 'masks/study_{}_mask.nii.gz'))

def make(root, layout, n=3, masks=True):
    "`n` tiny cases; the kind of table that they make"
    kind,ct,lesion = layouts[layout]
    for i in range(n):
        put(root/ct.format(i), i)
        if masks: put(root/lesion.format(i))
    return kind

def table(kind, root, **kw): return getattr(datasets, kind)(root, **kw)

def refused(capfd, tmp_path, kind, root, *words, argv=(), **kw):
    "No table: a `CTError` in Python; exit status 2 and the same one line on the command line, and nothing written"
    with pytest.raises(CTError) as e: table(kind, root, **kw)
    out = tmp_path/'refused.csv'
    assert main(['table',str(root),'--layout',kind,'-o',str(out),*argv])==2
    err = capfd.readouterr().err
    assert err==f'covid3d table: {e.value}\n' and str(e.value).endswith(f'. {e.value.remedy}.') and len(e.value.remedy)>5
    assert all(str(w) in err for w in words), err
    assert not out.exists()

# F1, F2: what is missing

@pytest.mark.fault('F1')
@each('layout', ['plain','nnunet','zenodo','kaggle','covid1920'])
def test_F1_missing_label(capfd, tmp_path, layout):
    "All scans without a mask are named, no table is written"
    root = tmp_path/'data'; kind = make(root, layout)
    lost = [root/layouts[layout][2].format(i) for i in (0,2)]
    for o in lost: o.unlink()
    refused(capfd, tmp_path, kind, root, lost[0].parent, 'no mask for', *(o.name.split('.')[0].removesuffix('_seg') for o in lost), 'Add the masks')

@pytest.mark.fault('F1')
def test_F1_many_missing_labels(capfd, tmp_path):
    "Five names are enough for one line"
    kind = make(tmp_path/'data', 'plain', 7); [o.unlink() for o in (tmp_path/'data'/'infection_mask').iterdir()]
    refused(capfd, tmp_path, kind, tmp_path/'data', 'no mask for p0, p1, p2, p3, p4, …')

@pytest.mark.fault('F1')
def test_F1_mosmed_is_unlabelled(tmp_path):
    "Differs deliberately: in MosMed a scan without a mask is the rule, so it stays, without a split (P10)"
    make(tmp_path, 'mosmed'); (tmp_path/'masks'/'study_1_mask.nii.gz').unlink()
    df = table('mosmed', tmp_path)
    assert list(df.lesion!='')==[True,False,True] and list(df.split)==['test','','test']

@pytest.mark.fault('F1')
def test_F1_mask_without_scan(capfd, tmp_path):
    make(tmp_path/'data', 'mosmed'); (tmp_path/'data'/'studies'/'CT-1'/'study_1.nii.gz').unlink()
    refused(capfd, tmp_path, 'mosmed', tmp_path/'data', 'masks without a scan: study_1')

@pytest.mark.fault('F1')
@each('layout', ['plain','nnunet','zenodo'])
def test_F1_no_masks_at_all(capfd, tmp_path, layout):
    "The folder of the masks is not even there"
    refused(capfd, tmp_path, make(tmp_path/'data', layout, masks=False), tmp_path/'data', 'data')

@pytest.mark.fault('F2')
@each('text,words', [('{"numTraining": 4}', ['numTraining is 4','holds 3']), ('{"numTraining": "no"}', ['gives no numTraining']),
    ('{}', ['gives no numTraining']), ('[3]', ['holds a list']), ('null', ['holds a NoneType']), ('{"numTraining":', ['is not JSON']),
    ('{"numTraining": Infinity}', ['is not JSON']), ('['*100000, ['is not JSON']), ('{"numTraining": 3, "channel_names": {"0":"CT","1":"PET"}}', ['CT, PET','not CT']),
    ('{"numTraining": 3, "modality": {"0":"MRI"}}', ['MRI','not CT']), ('{"numTraining": 3, "channel_names": {"0":"FLAIR"}}', ['FLAIR'])])
def test_F2_num_training(capfd, tmp_path, text, words):
    make(tmp_path/'data', 'nnunet'); (tmp_path/'data'/'dataset.json').write_text(text)
    refused(capfd, tmp_path, 'folder', tmp_path/'data', tmp_path/'data'/'dataset.json', *words)
    (tmp_path/'data'/'dataset.json').write_text('{"numTraining": 3}')
    assert len(table('folder', tmp_path/'data'))==3

# F3, F4: what is too many

@pytest.mark.fault('F3')
@each('layout', layouts)
def test_F3_hidden_files(tmp_path, layout):
    "A Mac's ._ twins, .DS_Store, and what is no NIfTI at all"
    kind = make(tmp_path, layout)
    want = table(kind, tmp_path)
    for d in {(tmp_path/o.format(0)).parent for o in layouts[layout][1:]}:
        for p in list(d.iterdir()): (d/f'._{p.name}').write_bytes(b'Mac OS X')
        for o in ('.DS_Store','Thumbs.db','readme.txt','.hidden.nii.gz'): (d/o).write_bytes(b'x')
    (tmp_path/'.DS_Store').write_bytes(b'x'); (tmp_path/'__MACOSX').mkdir(); (tmp_path/'__MACOSX'/'._x').write_bytes(b'x')
    pd.testing.assert_frame_equal(table(kind, tmp_path), want)

@pytest.mark.fault('F3')
def test_F3_file_named_like_a_class(tmp_path):
    make(tmp_path, 'mosmed'); (tmp_path/'studies'/'CT-0.txt').write_text('healthy')
    assert len(table('mosmed', tmp_path))==3

@pytest.mark.fault('F4')
@each('layout,twin', [('plain','ct/p1.nii'), ('plain','infection_mask/p1.nii'), ('plain','ct/p1.NII.GZ'), ('nnunet','imagesTr/p1_0000.nii'),
    ('zenodo','Infection_Mask/coronacases_001.nii'),
    ('covid1920','Train/v-1_ct.nii'), ('covid1920','Validation/v-1_ct.nii.gz'), ('mosmed','studies/CT-1/study_1.nii'),
    ('mosmed','studies/CT-4/study_1.nii.gz'), ('kaggle','ct_scans/coronacases_001.nii')])
def test_F4_same_case_twice(capfd, tmp_path, layout, twin):
    kind = make(tmp_path/'data', layout); put(tmp_path/'data'/twin, 9)
    refused(capfd, tmp_path, kind, tmp_path/'data', tmp_path/'data', 'Remove')

@pytest.mark.fault('F4')
def test_F4_folder_of_slices_and_file(capfd, tmp_path):
    make(tmp_path/'data', 'plain'); (tmp_path/'data'/'ct'/'p1').mkdir()
    refused(capfd, tmp_path, 'folder', tmp_path/'data', 'p1.nii.gz has the same case name')

@pytest.mark.fault('F2')
@each('extra,note', [({'channel_names':{'0':'CT'}, 'labels':{'background':0,'lesion':1}},''), ({'modality':{'0':'CT'}, 'labels':{'0':'background','1':'a','2':'b'}},'(a, b)'),
    ({'labels':{'background':0,'ggo':1,'cons':[1,2]}},'(ggo, cons)'), ({'labels':7, 'channel_names':[]},'')])
def test_nnunet_classes_are_told(tmp_path, extra, note):
    make(tmp_path, 'nnunet'); (tmp_path/'dataset.json').write_text(json.dumps(dict(numTraining=3)|extra))
    notes = table('folder', tmp_path).attrs['notes']
    assert (note in ' '.join(notes)) and bool(notes)==bool(note)

@pytest.mark.fault('F2')
def test_nnunet_second_channel(capfd, tmp_path):
    make(tmp_path/'d', 'nnunet'); put(tmp_path/'d'/'imagesTr'/'p1_0001.nii.gz', 5)
    refused(capfd, tmp_path, 'folder', tmp_path/'d', 'p1_0001 is a second channel')
    (tmp_path/'d'/'imagesTr'/'p1_0001.nii.gz').rename(tmp_path/'d'/'imagesTr'/'other.nii.gz')
    assert table('folder', tmp_path/'d').attrs['notes']==['1 file of imagesTr/ without _0000 at the end of the name left aside']

@pytest.mark.fault('F4')
def test_F4_series_in_two_folders(tmp_path):
    "A copy of a DICOM series would make two cases of one scan: one is taken, the other counted"
    for d in 'ab': write_series(scan(), tmp_path/'data'/d, patient='P')
    for a,b in zip(sorted((tmp_path/'data'/'a').iterdir()), sorted((tmp_path/'data'/'b').iterdir())): b.write_bytes(a.read_bytes())
    df = table('folder', tmp_path/'data')
    assert len(df)==1 and df.attrs['notes']==['1 series left out: a copy in another folder was taken']

# F5: leaks

@pytest.mark.fault('F5')
def test_F5_named_into_two_splits(capfd, tmp_path):
    "Two scans of one Radiopaedia patient: naming one of them for test would train on the other"
    for i in (1,2,3): put(tmp_path/'d'/'ct'/f'radiopaedia_10_85902_{i}.nii.gz', i); put(tmp_path/'d'/'infection_mask'/f'radiopaedia_10_85902_{i}.nii.gz')
    put(tmp_path/'d'/'ct'/'coronacases_001.nii.gz', 0); put(tmp_path/'d'/'infection_mask'/'coronacases_001.nii.gz')
    refused(capfd, tmp_path, 'coronacases', tmp_path/'d', 'are of one patient but in test and', 'Put all scans of a patient into one split',
            argv=['--test','radiopaedia_10_85902_1'], test=['radiopaedia_10_85902_1'])
    for seed in range(5):
        by_split = table('coronacases', tmp_path/'d', valid=.3, test=.3, seed=seed).groupby('patient').split.nunique()
        assert (by_split==1).all()

@pytest.mark.fault('F5')
def test_F5_named_for_valid_and_test(capfd, tmp_path):
    make(tmp_path/'d', 'plain')
    refused(capfd, tmp_path, 'folder', tmp_path/'d', 'p1', 'in valid and in test', argv=['--valid','p1','--test','p1','--test','p2'], valid=['p1'], test=['p1','p2'])

def rows(n=4, **change):
    "A table of `n` cases that need not exist; a change is a list, a value a case"
    df = pd.DataFrame([dict.fromkeys(columns, '')|dict(case=f'c{i}', ct=f'ct/{i}.nii.gz', lesion=f'm/{i}.nii.gz', split='train') for i in range(n)])
    return df.assign(**change)

def bad(capfd, path, *words, df=None, text=None, status=2):
    "A table that `train` and `read_cases` refuse, and in which `check` finds the same"
    if df is not None: df.to_csv(path, index=False)
    if text is not None: path.write_bytes(text)
    with pytest.raises(CTError) as e: read_cases(path)
    assert main(['train',str(path),'--init','random','--out',str(path.parent/'run'),'--device','cpu'])==2
    err = capfd.readouterr().err
    assert err.startswith('covid3d train: ') and err.count('\n')==1 and len(err)<600 and all(str(w) in o for w in (path,*words) for o in (err,
        str(e.value))), err
    assert not (path.parent/'run').exists()
    assert main(['check',str(path)])==status
    said = capfd.readouterr()
    assert all(str(w) in (said.err if status==2 else said.out) for w in words) and 'Traceback' not in said.err
    if status==2: assert said.err.count('\n')==1 and said.out==''

@pytest.mark.fault('F5')
@each('pair', [('train','test'),('valid','train'),('test','valid')], ids='-'.join)
def test_F5_patient_in_two_splits(capfd, tmp_path, pair):
    bad(capfd, tmp_path/'t.csv', "'c1', 'c2' are of one patient but in "+' and '.join(sorted(pair)),
        df=rows(patient=['a','b','b',''], split=['train',*pair,'test']), status=1)

@pytest.mark.fault('F5')
def test_F5_unused_scans_do_not_leak(tmp_path):
    rows(patient=['a','a','a','b'], split=['train','','train','test']).to_csv(tmp_path/'t.csv', index=False)
    assert len(read_cases(tmp_path/'t.csv'))==4

# F6: links

needs_links = pytest.mark.skipif(os.name=='nt', reason='needs symbolic links')

@pytest.mark.fault('F6')
@needs_links
@each('layout', layouts)
def test_F6_link_out_of_the_root(tmp_path, capfd, layout):
    "Passed over with a note, also on the command line; a link that stays inside is followed"
    root,(kind,ct,lesion) = tmp_path/'data',layouts[layout]
    make(root, layout)
    away = put(tmp_path/'away'/Path(ct).name.format(8), 8)
    (root/ct.format(8)).symlink_to(away); put(root/lesion.format(8))
    inside = put(root/'more'/Path(ct).name.format(9), 9)
    (root/ct.format(9)).symlink_to(inside); put(root/lesion.format(9))
    if layout=='mosmed': (root/lesion.format(8)).unlink()
    df = table(kind, root)
    assert len(df)==4 and any('leads out of' in o and '\n' not in o for o in df.attrs['notes'])
    assert main(['table',str(root),'--layout',kind,'-o',str(tmp_path/'t.csv')])==0
    assert 'note: '+away.name in capfd.readouterr().out and len(read_cases(tmp_path/'t.csv'))==4

@pytest.mark.fault('F6')
@needs_links
def test_F6_mask_out_of_the_root(capfd, tmp_path):
    "Its mask is passed over, so the scan has none"
    make(tmp_path/'d', 'plain'); p = tmp_path/'d'/'infection_mask'/'p1.nii.gz'
    p.rename(tmp_path/'away.nii.gz'); p.symlink_to(tmp_path/'away.nii.gz')
    refused(capfd, tmp_path, 'folder', tmp_path/'d', 'no mask for p1')

@pytest.mark.fault('F6')
@needs_links
@each('aim', ['..','.','../../d','../../away'])
def test_F6_folders_that_loop(tmp_path, aim):
    "In a tree of DICOM: no link to a folder is followed, each is told"
    write_series(scan(), tmp_path/'d'/'one'); (tmp_path/'away').mkdir(); write_series(scan(1), tmp_path/'away')
    (tmp_path/'d'/'one'/'loop').symlink_to(aim)
    df = table('folder', tmp_path/'d')
    assert len(df)==1 and any('1 link to a folder' in o for o in df.attrs['notes'])

@pytest.mark.fault('F6')
@needs_links
@each('aim', ['..','.','../..','../../away'])
def test_F6_link_among_the_scans(tmp_path, aim):
    "In ct/, where a folder may be a case: a link to a folder is none, and is told"
    make(tmp_path/'d', 'plain'); write_series(scan(1), tmp_path/'away')
    (tmp_path/'d'/'ct'/'loop').symlink_to(aim)
    df = table('folder', tmp_path/'d')
    assert len(df)==3 and any('loop' in o for o in df.attrs['notes'])

@pytest.mark.fault('F6')
@needs_links
def test_F6_link_to_itself(tmp_path):
    make(tmp_path/'d', 'plain'); (tmp_path/'d'/'ct'/'x.nii.gz').symlink_to('x.nii.gz')
    df = table('folder', tmp_path/'d')
    assert len(df)==3 and any('x.nii.gz' in o for o in df.attrs['notes'])

# F7: names

odd = ['a.b.c','v1.2 final (2)','Größe','患者 7','Ωmega','ПАЦИЕНТ','-x','+1','=1+1','@x','#1','007','1e5','0.5','nan','NULL','None','True','a,b','a;b',
    '"quoted"',"it's",'a&b','%s','{0}','.nii'[1:]]

@pytest.mark.fault('F7')
def test_F7_names(tmp_path, capfd):
    "Dots, spaces, any script, and what a CSV or pandas would rather read otherwise: folder → cases → check, every name as it was"
    for i,o in enumerate(odd): put(tmp_path/'d x.y'/'ct'/f'{o}.nii.gz', i); put(tmp_path/'d x.y'/'infection_mask'/f'{o}.nii.gz')
    out = tmp_path/'of me.csv'
    assert main(['table',str(tmp_path/'d x.y'),'-o',str(out)])==0
    assert {c.name for c in read_cases(out)}=={*odd} and all(c.ct.is_file() and c.ct.name==f'{c.name}.nii.gz' for c in read_cases(out))
    capfd.readouterr()
    assert main(['check',str(out),'--json'])==0
    assert {o['case'] for o in json.loads(capfd.readouterr().out)['reports']}=={*odd}

@pytest.mark.fault('F7')
def test_F7_case_by_name(tmp_path, capfd):
    "A case named on the command line is a case, also one whose name could be a number"
    for i,o in enumerate(('007','12','1e5','nan','x.y')): put(tmp_path/'d'/'ct'/f'{o}.nii.gz', i); put(tmp_path/'d'/'infection_mask'/f'{o}.nii.gz')
    for o in ('007','12','1e5','nan','x.y'):
        assert main(['table',str(tmp_path/'d'),'-o',str(tmp_path/'t.csv'),'--test',o,'--overwrite'])==0, o
        assert [c.name for c in read_cases(tmp_path/'t.csv', 'test')]==[o]

@pytest.mark.fault('F7')
@each('ext', ['.nii','.nii.gz','.NII','.Nii.GZ'])
def test_F7_endings(tmp_path, ext):
    "The ending is what .nii or .nii.gz is, in any case; the rest is the name"
    for d,s in (('ct',0),('infection_mask',None)): put(tmp_path/d/('x'+ext.lower()), s).rename(tmp_path/d/('a.nii.b'+ext))
    df = table('folder', tmp_path)
    assert list(df.case)==['a.nii.b'] and all(r.ok for r in check_table(df))

@pytest.mark.fault('F7')
@pytest.mark.skipif(os.name=='nt' or os.uname().sysname=='Darwin', reason='needs a file system that takes any bytes')
@each('name', [b'/Gr\xf6\xdfe.nii.gz', b'/a\nb.nii.gz', b'/a\x1b[31mb.nii.gz', b'/a\xe2\x80\xaeb.nii.gz'])
def test_F7_name_that_is_no_text(capfd, tmp_path, name):
    "Latin-1 bytes from an old archive, or a line end: refused by name, since no line of a CSV in UTF-8 can hold them"
    for d,s in (('ct',0),('infection_mask',None)): os.rename(put(tmp_path/'d'/d/'x.nii.gz', s), os.fsencode(tmp_path/'d'/d)+name)
    assert main(['table',str(tmp_path/'d'),'-o',str(tmp_path/'t.csv')])==2
    err = capfd.readouterr().err
    assert err.count('\n')==1 and 'Rename' in err and not (tmp_path/'t.csv').exists() and '\x1b' not in err

# F8, F9: which layout, and none

@pytest.mark.fault('F8')
@each('one,two', [('plain','nnunet'),('zenodo','kaggle'),('zenodo','plain'),('plain','dicom'),('nnunet','dicom')], ids='-'.join)
def test_F8_two_layouts(capfd, tmp_path, one, two):
    "Refused, with the option that settles it; which then does"
    root = tmp_path/'d'; kind = make(root, one)
    if two=='dicom': write_series(scan(5), root/'archive'/'one')
    else: make(root, two)
    refused(capfd, tmp_path, kind, root, 'holds two layouts', f'--layout {one}')
    for layout,n in ((one,3),(two,1 if two=='dicom' else 3)): assert len(table(kind, root, layout=layout))==n
    assert main(['table',str(root),'--layout',one,'-o',str(tmp_path/'t.csv')])==0 and len(read_cases(tmp_path/'t.csv'))==3

@pytest.mark.fault('F8')
def test_F8_two_copies(capfd, tmp_path):
    for o in 'ab': make(tmp_path/'d'/o, 'zenodo')
    refused(capfd, tmp_path, 'coronacases', tmp_path/'d', 'a and b both look like the data set', 'Name one of them')
    assert len(table('coronacases', tmp_path/'d'/'a'))==3

@pytest.mark.fault('F8')
@each('kind,layout', [('folder','zenodo'),('coronacases','nnunet'),('folder','x')])
def test_F8_unknown_layout(capfd, tmp_path, kind, layout):
    make(tmp_path/'d', 'plain')
    with pytest.raises(CTError, match=f"{layout!r} is unknown"): table(kind, tmp_path/'d', layout=layout)
    assert main(['table',str(tmp_path/'d'),'--layout',layout,'-o',str(tmp_path/'t.csv')])==2
    err = capfd.readouterr().err
    assert err.count('\n')==1 and ('holds no folder' in err or "'x' is not one of 'folder', 'plain'" in err) and not (tmp_path/'t.csv').exists()

@pytest.mark.fault('F9')
@each('kind', kinds)
def test_F9_empty_root(capfd, tmp_path, kind):
    (tmp_path/'d').mkdir()
    refused(capfd, tmp_path, kind, tmp_path/'d', tmp_path/'d')
    refused(capfd, tmp_path, kind, tmp_path/'nowhere', tmp_path/'nowhere', 'no such folder')
    (tmp_path/'f').write_bytes(b'x')
    refused(capfd, tmp_path, kind, tmp_path/'f', tmp_path/'f')

@pytest.mark.fault('F9')
@each('kind,dirs', [('folder','ct'),('folder','ct infection_mask'),('folder','imagesTr labelsTr'),('folder','imagesTr'),
    ('coronacases','COVID-19-CT-Seg_20cases Infection_Mask Lung_Mask'),('coronacases','ct_scans'),
    ('mosmed','studies'),('mosmed','studies/CT-0 masks'),('covid1920','Train'),('covid1920','Train Validation'),('ricord','MIDRC-RICORD-1A')])
def test_F9_empty_folders(capfd, tmp_path, kind, dirs):
    "The layout is there, the scans are not"
    for o in dirs.split(): (tmp_path/'d'/o).mkdir(parents=True)
    refused(capfd, tmp_path, kind, tmp_path/'d', tmp_path/'d')

# S1 to S6: the table

@pytest.mark.fault('S2')
@pytest.mark.skipif(not hasattr(os, 'mkfifo'), reason='needs named pipes')
def test_S2_a_pipe(capfd, tmp_path):
    "A pipe that nobody writes to is refused, not waited for"
    os.mkfifo(tmp_path/'t.csv')
    assert main(['check',str(tmp_path/'t.csv')])==2 and 'not a regular file' in capfd.readouterr().err

def test_names_with_escape_codes_reach_no_terminal(capfd, tmp_path):
    "A table from somewhere else: what would colour or clear a terminal is told without it"
    evil = 'a\x1b[2Jb'; put(tmp_path/'a.nii', 0)
    rows(2, case=[evil,'c1'], ct=['a.nii',f'x{evil}.nii'], split=['train',evil], lesion='').to_csv(tmp_path/'t.csv', index=False)
    assert main(['check',str(tmp_path/'t.csv')])==1
    said = capfd.readouterr()
    assert '\x1b' not in said.out+said.err and 'cannot be the name of a file' in said.out

@each('flip', ['P','front-back front-back','left-right','front-back,head-foot'])
def test_unknown_flip(capfd, tmp_path, flip):
    put(tmp_path/'a.nii', 0)
    rows(1, ct='a.nii', lesion='', split='', flip=flip).to_csv(tmp_path/'t.csv', index=False)
    assert main(['check',str(tmp_path/'t.csv')])==1 and 'front-back' in capfd.readouterr().out
    with pytest.raises(CTError, match='case c0, flip'): read_cases(tmp_path/'t.csv')

@pytest.mark.fault('S1')
def test_S1_leading_zeros(tmp_path):
    "Text stays text: 007, 1e5, nan, NULL and True are names"
    names = ['007','7','1e5','nan','NULL','True','0.10','']
    rows(7, case=names[:7], patient=names[::-1][:7]).to_csv(tmp_path/'t.csv', index=False)
    found = read_cases(tmp_path/'t.csv')
    assert [c.name for c in found]==names[:7] and [c.patient for c in found]==names[::-1][:7]
    write_cases(pd.read_csv(tmp_path/'t.csv', dtype=str, keep_default_na=False), tmp_path/'u.csv')
    assert [c.name for c in read_cases(tmp_path/'u.csv')]==names[:7]

@pytest.mark.fault('S2')
@each('bom', [b'',b'\xef\xbb\xbf'], ids=['plain','bom'])
@each('sep', [',',';','\t'])
@each('end', ['\n','\r\n'], ids=['lf','crlf'])
@each('few', [False,True], ids=['all','few'])
def test_S2_ways_to_write_a_csv(tmp_path, bom, sep, end, few):
    "What Excel and its neighbours save; with every column or the least of them"
    df = rows(case=['a b','c;d,e','"f"','g'])
    df[['case','ct'] if few else list(columns)].to_csv(tmp_path/'t.csv', index=False, sep=sep, lineterminator=end)
    (tmp_path/'t.csv').write_bytes(bom+(tmp_path/'t.csv').read_bytes())
    assert [c.name for c in read_cases(tmp_path/'t.csv')]==['a b','c;d,e','"f"','g']

@pytest.mark.fault('S2')
@each('text', [b'', b'\n\n', b'\0'*100, b'\x1f\x8b'+bytes(50), 'case,ct\nä,b.nii'.encode('utf-16'), 'case,ct\nä,b.nii'.encode('latin-1'),
    b'case,ct\na,b.nii\n"c,d.nii\n', b'case,ct\na,b,c,d\n', b'PK\3\4'+bytes(60)+b'\n'*9, b'case,ct,lesion,lung,split\n', b'case,ct\n'+b'a'*10**6, b'case,ct\na,b\n'+b'x,y\n'*2000+b'\0', b'case,ct\n'+b'abc,def\n'*2200000],
    ids=['empty','blank','zeros','gzip','utf16','latin1','quote','long','xlsx','header','one-line','nul','big'])
def test_S2_no_csv(capfd, tmp_path, text): bad(capfd, tmp_path/'t.csv', text=text)

@pytest.mark.fault('S2')
def test_S2_trailing_separator(tmp_path):
    "A separator too many at the end of every line does not push the columns along"
    (tmp_path/'t.csv').write_text('case,ct,lesion\na,a.nii,am.nii,\nb,b.nii,bm.nii,\n')
    try: found = [(c.name,c.ct.name) for c in read_cases(tmp_path/'t.csv')]
    except CTError: return  # refused is right too
    assert found==[('a','a.nii'),('b','b.nii')]

@pytest.mark.fault('S3')
@each('lost', ['case','ct'])
def test_S3_missing_column(capfd, tmp_path, lost):
    bad(capfd, tmp_path/'t.csv', f'the column {lost} is missing', 'found', 'lesion', 'Wanted: case, ct', df=rows().drop(columns=lost))

@pytest.mark.fault('S3')
def test_S3_columns_that_a_command_needs(tmp_path):
    rows().drop(columns=['lesion','split']).to_csv(tmp_path/'t.csv', index=False)
    assert len(read_cases(tmp_path/'t.csv'))==4
    with pytest.raises(CTError, match='the column lesion, split is missing.*Wanted: case, ct, lesion, split'):
        read_cases(tmp_path/'t.csv', 'train', need=('lesion',))

@pytest.mark.fault('S3')
@each('change,words', [(dict(case=['a','','c','d']),'line 3 has no case name'), (dict(ct=['a.nii','b.nii','','d.nii']),"case 'c2' has no ct")])
def test_S3_empty_cell(capfd, tmp_path, change, words): bad(capfd, tmp_path/'t.csv', words, df=rows(**change))

@pytest.mark.fault('S4')
def test_S4_paths(tmp_path, monkeypatch):
    """Differs deliberately: absolute paths and .. are allowed, since a table lies where the user wants it and names scans elsewhere; only what it names
    is read, and relative paths start at the table, wherever the command was called"""
    ct,mask = put(tmp_path/'data'/'a.nii.gz', 0),put(tmp_path/'data'/'am.nii.gz'); (tmp_path/'tables').mkdir()
    monkeypatch.chdir('/')
    for p,m in ((str(ct),str(mask)), ('../data/a.nii.gz','../data/./am.nii.gz'), ('../data/a.nii.gz',str(mask))):
        rows(1, ct=p, lesion=m).to_csv(tmp_path/'tables'/'t.csv', index=False)
        r, = check_table(tmp_path/'tables'/'t.csv')
        assert r.ok and r.lesion_ml>0

@pytest.mark.fault('S4')
def test_S4_written_relative(tmp_path):
    "What `cases` writes can be moved with its data"
    make(tmp_path/'a'/'d', 'plain')
    assert main(['table',str(tmp_path/'a'/'d'),'-o',str(tmp_path/'a'/'tables'/'t.csv')])==0
    assert {r['ct'].split('/p')[0] for r in csv.DictReader((tmp_path/'a'/'tables'/'t.csv').open())}=={'../d/ct'}
    (tmp_path/'a').rename(tmp_path/'b')
    assert all(r.ok for r in check_table(tmp_path/'b'/'tables'/'t.csv'))

@pytest.mark.fault('S4')
@each('name', ['../evil','/tmp/evil','a/b','..','a\\b','.'])
def test_S4_case_name_that_leads_out(tmp_path, name):
    "A name becomes the name of the mask that `predict` writes, so it must not lead out of --out"
    rows(2, case=['fine',name]).to_csv(tmp_path/'t.csv', index=False)
    with pytest.raises(CTError, match='t.csv: case .* cannot be the name of a file'): find_scans([tmp_path/'t.csv'])

@pytest.mark.fault('S5')
def test_S5_duplicate_rows(capfd, tmp_path):
    df = rows()
    bad(capfd, tmp_path/'t.csv', "case 'c1' is there twice", df=pd.concat([df, df[1:2]]), status=1)
    bad(capfd, tmp_path/'t.csv', "cases 'c0' and 'c1' are the same scan", df=rows(ct=['x/1.nii.gz','x/../x/1.nii.gz','2.nii.gz','3.nii.gz'],
        split=['train','test','','']), status=1)

@pytest.mark.fault('S5')
@each('split', ['nan','NaN','Train','train ','tain','0','validation'])
def test_S5_unknown_split(capfd, tmp_path, split):
    bad(capfd, tmp_path/'t.csv', f'split {split!r} is unknown', 'train, valid, test', df=rows(split=['train','test',split,'']), status=1)

@pytest.mark.fault('S5')
def test_S5_empty_split(tmp_path):
    "Differs deliberately: an empty split, also NaN in a DataFrame, means that the case is not used"
    df = rows(split=['train',float('nan'),None,''])
    assert [c.split for c in read_cases(df)]==['train','','',''] and [c.name for c in read_cases(df, 'train')]==['c0']
    with pytest.raises(CTError, match="no case has the split 'test'"): read_cases(df, 'test')

@pytest.mark.fault('S6')
@each('cell', ['=1+1','+1','-cmd','@SUM(A1)','\t=1','\r=1','=HYPERLINK("x";"y")','-1+1'])
def test_S6_formulas(tmp_path, cell):
    "No cell of ours starts a formula, and the table reads back as it was"
    assert safe_cell(cell)[0] in "' "
    if cell[0] not in '\t\r':
        write_cases(rows(1, case=cell, patient=cell, ct=str(tmp_path/'a.nii')), tmp_path/'t.csv')
        assert not re.search(r'(^|,)"?[=+@-]', (tmp_path/'t.csv').read_text(), re.M)
        c, = read_cases(tmp_path/'t.csv')
        assert (c.name,c.patient)==(cell,cell)
    (tmp_path/'scores.csv').write_bytes(scores_csv(score_table([dict(case=cell, dice=.5, error=cell)])))
    line = next(csv.DictReader((tmp_path/'scores.csv').open(newline='')))
    assert {line['case'][0],line['error'][0]}<={"'",' '} and line['dice']=='0.5'

@pytest.mark.fault('S6')
@each('cell', ['-1000','-3.5','-1000:20','a-b','0.5','x=1'])
def test_S6_numbers_stay(cell): assert safe_cell(cell)==cell
