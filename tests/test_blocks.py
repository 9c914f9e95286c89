"What a fastai user tries with the blocks: many scans of one name, masks in every form, callbacks, several classes, and what `covid3d.all` gives"
import importlib, json, pickle, random, shutil
from dataclasses import asdict
from inspect import signature
from pathlib import Path

import numpy as np, pandas as pd, pytest, torch
from fastai.callback.progress import ProgressCallback, ShowGraphCallback
from fastai.data.all import DataBlock, FuncSplitter, IndexSplitter
from fastai.interpret import Interpretation

import covid3d
from covid3d.augment import Augment3d, Rotate3d
from covid3d.cases import Case, read_cases
from covid3d.data import (CaseReader, CTBlock, CTDataLoaders, LesionBlock, RepeatSplitter, _case, _cut_and_aug, _joined, _mask_files, _masks, _prepared_table, _to_float, _train_valid,
                          cases_in, prepare_table, prepared_folder, stratified_folds)
from covid3d.dicom import write_series
from covid3d.learner import ScanDice, unet_learner_3d
from covid3d.patches import TensorCT, TensorMask3d
from covid3d.prepare import PreparedCase
from covid3d.transforms import CTSpec, ResizeSpec, _class_names, _finite_numbers, spec_class
from covid3d.volume import CTError
from coarse import write_coarse

spec = CTSpec((9,5,5), patch=(16,32,32), classes=('lesion','lung'))

@pytest.fixture(scope='module')
def root(tmp_path_factory):
    d = tmp_path_factory.mktemp('scans')
    write_coarse(d, n=4, seed=0)
    return d

two_meanings = {'splits'}  # of `covid3d.cases` and of another module

def both(p): return [p.parent.parent/k/p.name for k in ('infection_mask','lung_mask')]
def paths(root): return sorted((root/'ct').iterdir())
def loaders(items, get_y=both, spec=spec, **kwargs):
    block = DataBlock((CTBlock(spec), LesionBlock(spec)), get_y=get_y, splitter=RepeatSplitter(IndexSplitter([len(items)-1]), 2))
    return block.dataloaders(items, bs=2, **dict(num_workers=0)|kwargs)

def test_blocks_without_arguments(root):
    dls = DataBlock((CTBlock, LesionBlock), get_y=lambda p: both(p)[0], splitter=IndexSplitter([3])).dataloaders(paths(root), bs=2, num_workers=0)
    assert dls.spec==CTSpec() and dls.vocab==['lesion'] and dls.one_batch()[0].shape==(2,1,16,96,96)

def test_scans_of_one_name_are_not_mixed_up(root, tmp_path):
    "Every patient's folder holds ct.nii.gz and masks of one name: each scan keeps its own"
    for i,p in enumerate(paths(root)):
        (tmp_path/str(i)).mkdir(); shutil.copy(p, tmp_path/str(i)/'ct.nii.gz')
        for k,m in zip(spec.classes, both(p)): shutil.copy(m, tmp_path/str(i)/f'{k}.nii.gz')
    own = loaders([tmp_path/str(i)/'ct.nii.gz' for i in range(4)], lambda p: {k:p.parent/f'{k}.nii.gz' for k in spec.classes})
    plain = loaders(paths(root))
    whole = lambda dls: [dls.reader(c) for c in cases_in(dls.train_ds)]
    assert len(cases_in(own.train_ds))==3
    for a,b in zip(whole(own), whole(plain)): assert torch.equal(a.ct, b.ct) and torch.equal(a.masks, b.masks)

def test_dicom_folders(root, tmp_path):
    from covid3d.volume import open_ct
    for p in paths(root)[:2]: write_series(open_ct(p), tmp_path/p.name[:11])
    folders = sorted(tmp_path.iterdir())
    dls = loaders(paths(root)); ct = [o[0] for o in dls.test_dl(folders, bs=1)]
    assert len(ct)==2 and ct[0].shape==(1,1,16,32,32)
    assert (ct[0]-dls.test_dl(paths(root)[:1], bs=1).one_batch()[0]).abs().max()<.02  # DICOM rounds HU and positions
    names = [c.name for c in cases_in(dls.test_dl(folders).dataset)]
    assert all(n.startswith('scan_') for n in names) and len({*names})==2

def test_a_missing_mask_is_named(root):
    with pytest.raises(CTError, match="the case has no mask of class 'lung'"): loaders(paths(root), lambda p: both(p)[0]).one_batch()

@pytest.mark.parametrize('how', ['fork','spawn'])
def test_workers_open_paths(root, how):
    dls = loaders(paths(root), num_workers=2, multiprocessing_context=how) if how=='fork' else loaders(read_cases(root/'cases.csv'), None, num_workers=2, multiprocessing_context=how)
    assert sum(len(x) for x,_ in dls.train)==6 and not any(vars(y) for _,y in dls.train)

def test_nothing_is_hidden_on_a_tensor(root):
    dls = loaders(paths(root)); x,y = dls.one_batch(); p = dls.reader(cases_in(dls.valid_ds)[0])
    assert not vars(x) and not vars(y) and not vars(p.masks) and type(y) is TensorMask3d

def test_scan_dice_and_interpretation_on_any_datablock(root, tmp_path):
    dls = loaders(paths(root)); learn = unet_learner_3d(dls, pretrained=False, width=4, metrics=ScanDice(), path=tmp_path)
    learn.fit(1, 1e-3)
    table = CTDataLoaders.from_table(root/'cases.csv', spec, aug=False); metric = ScanDice(cases=read_cases(root/'cases.csv')[3:]); metric.accumulate(learn)
    assert learn.recorder.values[-1][-1]==pytest.approx(metric.value, abs=1e-9)
    i = Interpretation.from_learner(learn, ds_idx=0); i.plot_top_losses(2); i.show_results([0])
    assert len(i.losses)==6 and learn.dls.spec==spec==table.spec
    learn.show_results(); assert learn.dls.test_dl(paths(root)).spec==spec

def test_show_graph_beside_a_bar(root, tmp_path):
    learn = unet_learner_3d(loaders(paths(root)), pretrained=False, width=4, path=tmp_path)
    learn.remove_cbs(learn.cbs.filter(lambda c: isinstance(c, ProgressCallback)))
    learn.add_cbs([ProgressCallback(), ShowGraphCallback()]); learn.fit(1)

def test_resized_scans_by_blocks(root):
    r = ResizeSpec(patch=(8,32,32), classes=spec.classes); dls = loaders(paths(root), spec=r)
    assert dls.spec==r and dls.valid.one_batch()[1].shape==(1,2,8,32,32)
    assert pickle.loads(pickle.dumps(r))==r and hash(r)!=hash(CTSpec()) and r!=CTSpec(patch=r.patch, classes=r.classes)

def test_all_gives_what_modules_offer():
    "Every name of `covid3d.all` is public; the library's are those in `__all__`, and no name means two things"
    ns = {}; exec('from covid3d.all import *', ns)
    text = (Path(covid3d.__file__).parent/'all.py').read_text(encoding='utf-8')
    mods = [importlib.import_module(f'covid3d.{l.split()[1][1:]}') for l in text.splitlines() if l.startswith('from .')]
    assert all(l.endswith('import *') for l in text.splitlines() if l.startswith('from .'))
    for m in mods:
        for k in m.__all__: assert k in ns and not k.startswith('_')
        hidden = {k for k in m.__all__ if ns[k] is not getattr(m, k)}-two_meanings
        assert not hidden, f'{m.__name__} has names that another module hides: {", ".join(sorted(hidden))}'
    for k in 'DataBlock RandomSplitter get_files Interpretation MixUp Path CTBlock LesionBlock CTDataLoaders Segmenter train'.split(): assert k in ns
    assert 'AUTOGENERATED' not in text

# The specification: read from files, so a field may hold anything

def refused(message, f, *args, **kwargs):
    with pytest.raises(CTError) as e: f(*args, **kwargs)
    assert message in str(e.value)

@pytest.mark.parametrize('field,value,message', [('spacing',(1e-300,1,1),'0.05 to 100'), ('spacing',(4,2,1e4),'0.05 to 100'), ('spacing',(.5,.5,.5),'314 million voxels'), ('spacing','none','is not 3 numbers'),
    ('spacing',None,'is not 3 numbers'), ('patch',(4,4,1025),'1024 along'), ('patch',(1e5,1e5,1e5),'more than 16,777,216'), ('patch',(4,4,1e300),'more than'), ('patch',(4,4,4.5),'whole sizes'),
    ('patch',(16,float('nan'),96),'is not 3 numbers'), ('window',(0,1e-300),'Give the lower'), ('window',(-1e300,400),'Give the lower'), ('window',(400,-1000),'Give the lower first'), ('classes','lesion','is one name'), ('classes',['../lesion'],'is not a plain name')])
def test_a_spec_refuses_what_is_none(field, value, message): refused(message, CTSpec, **{field:value})

def test_numbers_of_a_spec():
    for odd in ('321', 5, None, [1,2,10**400], [1,2,float('inf')], [1,2,'x'], [[1],2,3]): refused('is not 3 numbers', _finite_numbers, 'spacing', odd, 3)
    refused('is not 3 numbers. Give 3', _finite_numbers, 'spacing', (3,2), 3)
    assert _finite_numbers('spacing', ['3',2,2], 3)==(3,2,2)

def test_names_of_classes():
    for odd in ((), ['lesion','lesion'], ['lesion','Lesion'], 5, {}, [f'c{i}' for i in range(65)]): refused('not a list of 1 to 64', _class_names, odd)
    for odd in ('../lesion', '', 'lésion', 'a b', '-a', '1', 'a'*65, 5, None, {}): refused('is not a plain name', _class_names, ['lung',odd])
    refused('another column', _class_names, ['split'])
    assert _class_names(['lesion','lung-left_2'])==('lesion','lung-left_2')

def test_a_spec_comes_back_from_json():
    whole,plain = ResizeSpec(),CTSpec(spacing=(6,4,4), patch=[16,64,64], classes=('lesion','right_lung','left_lung'))
    for s in (whole, plain):
        d = json.loads(json.dumps(asdict(s)))
        assert type(s) is spec_class(d) and spec_class(d)(**d)==s
    assert spec_class([]) is CTSpec and asdict(whole)['spacing'] is None
    assert (plain.mm,whole.mm)==(plain.spacing,(16.,1.5625,1.5625)) and plain.mirrored==(0,2,1) and {*whole.form}-{*plain.form}=={'patch'}
    refused('has none of its own', ResizeSpec, spacing=(4,2,2))

# The parts that DataLoaders are made of

def test_where_prepared_cases_lie(root, tmp_path):
    assert prepared_folder(pd.DataFrame()) is None and prepared_folder(tmp_path)==tmp_path
    assert prepared_folder(tmp_path/'none'/'cases.csv') is None and prepared_folder(root/'cases.csv')==root/'cases_prepared'

def test_a_reader_prepares_once_and_travels(root, tmp_path):
    cases,reader = read_cases(root/'cases.csv'),CaseReader(spec)
    p = reader(cases[0])
    assert p.ct.shape[1:]==spec.size(cases[0].open_ct()) and p.masks.shape==(2,*p.ct.shape[1:]) and reader(cases[0]) is p
    assert [reader.ready(c) for c in cases[:2]]==[True,False] and torch.equal(reader.read(Case('alone', cases[0].ct)), p.ct)
    there = pickle.loads(pickle.dumps(reader))
    assert torch.equal(there(cases[0]).ct, p.ct) and len(pickle.dumps(reader))<2000

def test_names_of_scans_and_masks(root, tmp_path):
    case = read_cases(root/'cases.csv')[0]
    assert _case(case)==case and _case('a/b.c.NII.gz')==Case('b.c', Path('a/b.c.NII.gz'))
    assert _case(tmp_path/'Jane').name!=_case(tmp_path/'John').name and 'Jane' not in _case(tmp_path/'Jane').name
    assert _mask_files('m.nii', ('lesion','lung'))==dict(lesion=Path('m.nii')) and _mask_files(['a','b'], ('lesion','lung'))==dict(lesion=Path('a'), lung=Path('b'))
    assert _mask_files(dict(lung='b'), ('lesion',))==dict(lung=Path('b')) and _mask_files(case, ('lesion',))==case.masks
    refused('get_y: 2 masks for the classes lesion', _mask_files, ['a','b'], ('lesion',))
    assert _joined(case)==case and _joined(case, dict(lesion=Path('x'))).masks==dict(lesion=Path('x')) and _masks(CTSpec())==('lesion','lung')

def same(a, b): return all(torch.equal(o.as_subclass(torch.Tensor), p.as_subclass(torch.Tensor)) for o,p in zip(a, b)) and len(a)==len(b)

def test_a_case_and_its_paths_give_the_same_patch(root):
    files,cases = paths(root),read_cases(root/'cases.csv')
    dls,by_case = loaders(files),loaders(cases, None); x,y = dls.one_batch()
    assert (x.shape,y.shape,type(x),x.dtype,type(y))==((2,1,16,32,32),(2,2,16,32,32),TensorCT,torch.float32,TensorMask3d) and 0<=x.min()<x.max()<=1
    assert torch.allclose(_to_float(TensorCT(torch.tensor([0,51,255], dtype=torch.uint8))).as_subclass(torch.Tensor), torch.tensor([0,.2,1]))
    assert same(by_case.valid.one_batch(), dls.valid.one_batch()) and same(dls.valid.one_batch(), dls.valid.one_batch())
    for d in (dls, dls.new_empty(), by_case): assert (d.spec,d.vocab)==(spec,['lesion','lung'])
    for d in (dls.train.new(bs=1), dls.test_dl(files), dls.test_dl(files, with_labels=True)): assert d.spec==spec
    assert dls.test_dl(files[3:]).one_batch()[0].shape==(1,1,16,32,32) and same(dls.test_dl([str(files[3])]).one_batch(), dls.test_dl(cases[3:]).one_batch())
    assert same(dls.test_dl(files[3:], with_labels=True).one_batch(), dls.valid.one_batch())
    assert [c.name for c in cases_in(dls.valid_ds)]==[cases[3].name] and cases_in(by_case.valid_ds)==cases[3:] and cases_in(dls.test_dl(files).dataset)[0].masks=={}
    assert RepeatSplitter(FuncSplitter(lambda o: o>1), 3)([0,1,2])==([0,1]*3,[2])

def test_a_mask_of_another_scan_is_noticed(root, tmp_path):
    from covid3d.phantom import write_phantoms
    write_phantoms(tmp_path/'other', n=1, seed=12, shape=(30,90,90), spacing=(9.6,4,4))
    other = Path(shutil.copy(next((tmp_path/'other'/'infection_mask').iterdir()), tmp_path/'other.nii.gz'))
    with pytest.raises(CTError, match='other.nii.gz'): loaders(paths(root), lambda p: [other]*2).one_batch()

def test_folds_by_hand():
    "Six patients and three folds: the small lesions fall into three folds, and so do the large ones. Twenty patients with two scans each stay together"
    six = [Case(f'scan{i}', 'x') for i in range(6)]; volumes = [5,300,8,250,2,400]
    fold = stratified_folds(six, volumes, 3)
    assert sorted(fold[i] for i in (0,2,4))==[0,1,2]==sorted(fold[i] for i in (1,3,5))
    assert len({tuple(stratified_folds(six, volumes, 3, seed=s)) for s in range(20)})>5
    many = [Case(f'scan{i}', 'x', patient=f'p{i//2}') for i in range(40)]; volumes = [(i//2)**2 for i in range(40)]
    fold = stratified_folds(many, volumes, 4); per = pd.Series(volumes).groupby(fold)
    assert all(fold[i]==fold[i+1] for i in range(0, 40, 2)) and per.size().tolist()==[10]*4 and per.sum().max()<1.5*per.sum().min()
    assert pd.Series([c.patient for c in many]).groupby(fold).nunique().tolist()==[5]*4
    assert stratified_folds(many, volumes, 4)==fold!=stratified_folds(many, volumes, 4, seed=1)
    refused('20 patients cannot make 21 folds', stratified_folds, many, volumes, 21)

def test_a_prepared_folder_from_a_stranger(root, tmp_path):
    table = root/'cases.csv'
    assert _prepared_table(table, None)==(table,CTSpec()) and _prepared_table(table, spec)==(table,spec)
    refused('holds no prepared cases', _prepared_table, tmp_path, None); refused('is not a CTSpec', _prepared_table, table, dict(spacing=5))
    half = tmp_path/'half'; half.mkdir()
    (half/'cases.csv').write_text('case,ct,not_prepared\na,a-0123456789abcdef,failed\n')
    good = asdict(spec)
    for text,message in (('', 'is not JSON'), ('[]', 'holds a list'), ('{}', 'is not a specification'), (json.dumps(good|dict(more=1)), 'is not a specification'),
                         (json.dumps(good|dict(spacing=[1e-300,1,1])), 'spacing: '), (json.dumps(good|dict(classes=['../a'])), 'classes: '), (json.dumps(good|dict(patch={})), 'patch: ')):
        (half/'spec.json').write_text(text); refused(message, _prepared_table, half, None)
    refused('no case of it could be prepared', _prepared_table, half, spec); refused('not written by covid3d', prepare_table, table, half, spec)

def test_train_and_valid_of_a_table(root):
    table,cases,reader = root/'cases.csv',read_cases(root/'cases.csv'),CaseReader(spec, root/'cases_prepared')
    of = lambda s: [c.name for c in cases if c.split==s]
    names = lambda o: [[c.name for c in v] for v in o]
    assert names(_train_valid(table, spec, None, reader))==[of('train'),of('valid')]
    valid = [names(_train_valid(table, spec, (i,3), reader))[1] for i in range(3)]
    assert sorted(sum(valid, []))==sorted(of('train')+of('valid'))
    for bad in ((3,3), (-1,3), (0,0), (0,-2)): refused(f'{bad[0]} is not one of {bad[1]} folds', _train_valid, table, spec, bad, reader)
    for bad in (3, 'ab', (1,), (1,2,3), (0.,3), (True,3), (None,3), [[0],[3]]): refused('is not a pair (i, k)', _train_valid, table, spec, bad, reader)

def test_what_is_cut_and_where_it_is_augmented(root):
    "The corner of a square of 32 voxels, 15.5 steps from its middle, lies √2 times as far out: 21.9 steps, so 6 voxels more on either side"
    turn = Augment3d([Rotate3d(45, p=1)], spec.spacing)
    kinds = [_cut_and_aug(spec, .7, *o) for o in ((False,False), (turn,False), (turn,True))]
    assert [o.sizes[True] for o,_ in kinds]==[(16,32,32),(16,32,32),(16,44,44)] and {o.sizes[False] for o,_ in kinds}=={(16,32,32)}
    assert [(o.aug is not None, b is not None) for o,b in kinds]==[(False,False),(True,False),(False,True)]
    make = lambda on_batch: CTDataLoaders.from_table(root/'cases.csv', spec, bs=2, aug=turn, on_batch=on_batch, num_workers=0)
    for on_batch in (False, True):
        dls = make(on_batch); x,y = dls.train.one_batch()
        assert (x.shape[2:],y.shape[2:],x.dtype,y.dtype)==((16,32,32),(16,32,32),torch.float32,torch.uint8) and dls.valid.one_batch()[0].shape[2:]==(16,32,32)
        assert ('Augment3d' in [type(t).__name__ for t in dls.train.after_batch.fs])==on_batch
    new,labelled = dls.test_dl(paths(root)[:3], bs=1),dls.test_dl(read_cases(root/'cases.csv')[:3], bs=1, with_labels=True)
    assert [[tuple(o.shape) for o in b] for b in new]==[[(1,1,16,32,32)]]*3 and len(labelled.one_batch())==2 and dls.train.new(bs=1).one_batch()[0].shape[0]==1

def test_dataloaders_of_a_table(root):
    table,cases = root/'cases.csv',read_cases(root/'cases.csv'); n = {s:sum(c.split==s for c in cases) for s in ('train','valid')}
    dls = CTDataLoaders.from_table(table, spec, bs=2, patches=4)
    assert (len(dls.train_ds),len(dls.valid_ds),len(dls.valid_cases))==(4*n['train'],n['valid'],n['valid']) and len(CTDataLoaders.from_table(table, spec, fold=(1,3)).valid_cases)==1
    def hits(p):
        random.seed(0); torch.manual_seed(0)
        dls = CTDataLoaders.from_table(table, CTSpec(spec.spacing, patch=(4,12,12)), bs=2, patches=60, oversample_foreground=p, aug=False)
        return float(torch.cat([y[:,0].flatten(1).any(1) for _,y in dls.train]).float().mean())
    none,half,all_ = map(hits, (0,.5,1)); assert all_==1 and abs(half-(1+none)/2)<.12
    refused('a batch of 99 is more than', CTDataLoaders.from_table, table, spec, bs=99)
    frame = pd.read_csv(table).assign(split='train', ct=[c.ct for c in cases], lesion=[c.masks['lesion'] for c in cases])
    refused("no case has the split 'valid'", CTDataLoaders.from_table, frame, CTSpec())

def test_dataloaders_by_other_names(root, tmp_path):
    table,bare = root/'cases.csv',pd.read_csv(root/'cases.csv').drop(columns=['split','patient'])
    made = [CTDataLoaders.from_csv(root, 'cases.csv', spec=spec), CTDataLoaders.from_df(bare, root, valid_pct=.5, spec=spec), CTDataLoaders.from_folder(root, spec=spec, num_workers=0)]
    assert [len(d.valid_cases) for d in made]==[sum(c.split=='valid' for c in read_cases(table)),2,1] and {tuple(d.vocab) for d in made}=={('lesion','lung')}
    assert made[0].reader.folder==prepared_folder(table) and made[1].one_batch()[0].shape==(2,1,16,32,32) and {type(d) for d in made}=={CTDataLoaders}
    assert {'spec','patches','valid_pct','device','val_bs'}<={*signature(CTDataLoaders.from_csv).parameters} and {'spec','patches','valid_pct','device'}<={*signature(CTDataLoaders.from_folder).parameters}
    refused('no such case table', CTDataLoaders.from_csv, tmp_path/'none.csv')

@pytest.mark.parametrize('workers', [0,2])
def test_a_seed_repeats_an_epoch(root, workers):
    "With worker processes too; augmentation is on in training, off in validation, and on again after it"
    def seeded():
        random.seed(3); torch.manual_seed(3); np.random.seed(3)
        dls = CTDataLoaders.from_table(root/'cases.csv', spec, bs=2, patches=4, num_workers=workers); dls.train.rng.seed(3)
        return dls
    epoch = lambda dl: torch.cat([torch.cat([x.as_subclass(torch.Tensor),y.as_subclass(torch.Tensor).float()], 1) for x,y in dl])
    assert torch.equal(epoch(seeded().train), epoch(seeded().train))
    dls = seeded(); first,valid,second,once_more = epoch(dls.train),epoch(dls.valid),epoch(dls.train),epoch(dls.valid)
    assert not torch.equal(first, second) and torch.equal(valid, once_more)

def test_a_whole_scan_is_one_patch(root):
    "Nothing is cut, so in validation it comes as it was prepared; it can be rotated and mirrored all the same"
    whole,cases = ResizeSpec(patch=(8,40,40), classes=spec.classes),read_cases(root/'cases.csv')
    plain,turned = (CTDataLoaders.from_table(root/'cases.csv', whole, bs=1, patches=1, aug=a) for a in (False,None))
    p = plain.reader(plain.valid_cases[0]); x,y = plain.valid.one_batch()
    assert (x[0].as_subclass(torch.Tensor)-p.ct/255).abs().max()<1e-6 and torch.equal(y[0].as_subclass(torch.Tensor), p.masks)
    assert len(plain.train)==sum(c.split=='train' for c in cases) and turned.train.one_batch()[0].shape[2:]==(8,40,40) and turned.train.after_item[-1].aug.spacing==whole.mm

def test_a_prepared_folder_and_its_copy(root, tmp_path, capfd):
    "All rows and columns, nothing made twice, no path of a scan; a copy without the scans trains, and tells so"
    cases,lesions,out = read_cases(root/'cases.csv'),CTSpec(spec.spacing, patch=spec.patch),tmp_path/'ready'
    wide = pd.read_csv(root/'cases.csv', dtype=str).fillna('').assign(reader=['ann','bob','','ann'], second=['/home/mueller/x.nii']*4)
    for k in ('ct','lesion','lung'): wide[k] = [str((root/o).absolute()) if o else '' for o in wide[k]]
    wide.loc[0,['lesion','split']] = '',''
    assert len(prepare_table(wide, out, lesions))==3
    got = pd.read_csv(out/'cases.csv', dtype=str).fillna('')
    assert [*got]==[*wide,'not_prepared'] and all(got[k].equals(wide[k]) for k in ('case','reader','split')) and [*got.not_prepared]==['without a mask of lesion','','',''] and {*got.second}=={''}
    assert str(root) not in (out/'cases.csv').read_text()
    times = lambda: {o:o.stat().st_mtime_ns for o in out.glob('*/*')}
    before = times(); prepare_table(wide, out, lesions); assert times()==before
    refused('is read, so it is not replaced', prepare_table, out/'cases.csv', out); refused('is that of a prepared folder', prepare_table, out/'cases.csv', tmp_path/'other')
    refused('no case has a mask of heart', prepare_table, wide.assign(heart=''), tmp_path/'none', CTSpec(classes=('heart',))); assert not (tmp_path/'none').exists()
    moved,frame = Path(shutil.copytree(out, tmp_path/'moved')),got.assign(split=['','train','train','valid']); (moved/'sources.json').unlink()
    for at in (moved, out): frame.to_csv(at/'cases.csv', index=False)
    capfd.readouterr(); dls = CTDataLoaders.from_table(moved, patches=2)
    assert '1 of 1 scans are not at hand' in capfd.readouterr().err and dls.spec==lesions and dls.reader.folder==moved and type(dls.valid_cases[0]) is PreparedCase and dls.one_batch()[0].shape==(2,1,16,32,32)
    here = CTDataLoaders.from_table(out, patches=2)
    assert type(here.valid_cases[0]) is Case and here.valid_cases[0].ct==cases[3].ct.absolute() and torch.equal(here.reader(here.valid_cases[0]).masks, dls.reader(dls.valid_cases[0]).masks)
    for text in ('[]', '{}', '{"cases": [1]}', '{"cases": {"a": {"ct": 5}}}', '{"cases": {"a": {}}}'):
        (moved/'sources.json').write_text(text); refused('sources.json', CTDataLoaders.from_table, moved)
    (moved/'sources.json').unlink()
    with pytest.raises(CTError, match='was prepared with another spacing'): CTDataLoaders.from_table(moved, CTSpec((9,6,6))).one_batch()
