"What a fastai user tries with the blocks: many scans of one name, masks in every form, callbacks, several classes, and what `covid3d.all` gives"
import importlib, pickle, shutil
from pathlib import Path

import pytest, torch
from fastai.callback.progress import ProgressCallback, ShowGraphCallback
from fastai.data.all import DataBlock, IndexSplitter
from fastai.interpret import Interpretation

import covid3d
from covid3d.cases import read_cases
from covid3d.data import CTBlock, CTDataLoaders, LesionBlock, RepeatSplitter, cases_in
from covid3d.dicom import write_series
from covid3d.learner import ScanDice, unet_learner_3d
from covid3d.transforms import CTSpec, ResizeSpec, TensorMask3d
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
