"Real CT: the seven COVID-19 scans of COVID3D_TEST_DATA, which are never copied into the repository"
import os
from pathlib import Path

import nibabel as nib, numpy as np, pandas as pd, pytest
from scipy.stats import mannwhitneyu

from covid3d.cli import main
from covid3d.cases import read_cases, write_cases
from covid3d.data import CTDataLoaders
from covid3d.datasets import folder
from covid3d.inference import Segmenter
from covid3d.learner import train, unet_learner_3d
from covid3d.metrics import dice
from covid3d.quantify import quantify
from covid3d.transforms import CTSpec
from covid3d.volume import from_canonical, open_ct, save_mask

data = os.environ.get('COVID3D_TEST_DATA')
pytestmark = pytest.mark.skipif(not data, reason='COVID3D_TEST_DATA is not set: the folder of real CTs is not part of the repository')

spec = CTSpec(spacing=(6,4,4), patch=(16,64,64))

@pytest.fixture(scope='module')
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp('real')/'cases.csv'
    write_cases(folder(Path(data)/'coronacases_7', valid=['coronacases_005'], test=['coronacases_006','coronacases_007'], already_windowed='-1000:20'), path)
    return path

def scan_dice(model, case):
    seg = Segmenter(model, spec)(case)
    return dice(seg.masks['lesion'], case.open_mask('lesion', seg.ct).data)

def test_learns_lesions_of_real_scans(table, tmp_path):
    "A minute of training on four patients lifts the whole-scan Dice on two others far above the untrained network's; the masks lie on the scans' grids"
    six,seven = read_cases(table, 'test')
    before = unet_learner_3d(CTDataLoaders.from_table(table, spec), pretrained=False, width=16).model
    learn = train(table, tmp_path/'run', spec=spec, init='random', width=16, epochs=8, patches=12, score_every=8, keep='last', device='cpu')  # the end of the cycle: weights from its middle may fail on another scan
    trained = {c.name:scan_dice(learn.model, c) for c in (six,seven)}
    untrained = {c.name:scan_dice(before, c) for c in (six,seven)}
    print(f'untrained {untrained}, trained {trained}')
    assert trained[six.name]>untrained[six.name]+.2
    assert main(['predict',str(six.ct),str(seven.ct),'--weights',str(tmp_path/'run'/'model.safetensors'),'--out',str(tmp_path/'masks'),'--already-windowed','-1000:20','--device','cpu'])==0
    for c in (six,seven):
        out,src,ref = nib.load(tmp_path/'masks'/f'{c.name}_lesion.nii.gz'),nib.load(c.ct),nib.load(c.masks['lesion'])
        assert out.shape==src.shape and np.array_equal(out.affine, src.affine)
        assert dice(out.get_fdata(), ref.get_fdata())==pytest.approx(trained[c.name], abs=1e-6)

@pytest.mark.parametrize('path', ['cip_ct64/ct.nii.gz','totalseg_chest/ct.nii.gz'])
def test_hu_scans_of_other_scanners(path, tmp_path):
    "Two CTs in true HU: values as nibabel reads them, and the way back to the file's grid"
    ct,src = open_ct(Path(data)/path),nib.load(Path(data)/path)
    hu = src.get_fdata()
    assert np.array_equal(from_canonical(ct.data, ct.source.back), np.maximum(hu, -1024))
    lung = ((ct.data>-950)&(ct.data<-700)).astype(np.uint8)
    save_mask(lung, ct, tmp_path/'lung.nii.gz')
    out = nib.load(tmp_path/'lung.nii.gz')
    assert np.array_equal(out.get_fdata()==1, (hu>-950)&(hu<-700)) and np.array_equal(out.affine, src.affine)

def test_lung_masks_hold_most_of_the_lesions(table):
    "Both masks of a case meet on one grid: nine tenths of each lesion lie in the lung"
    for c in read_cases(table):
        ct = c.open_ct()
        lesion,lung = (c.open_mask(k, ct).data>0 for k in ('lesion','lung'))
        assert (lesion&lung).sum()/lesion.sum()>.9, c.name

def test_figures_of_P001_agree_with_its_readers():
    "Three radiologists named the lobes with infection on each slice of P001: slices of a lung that they call healthy hold less lesion than diseased ones, and hardly any"
    seg = Segmenter.load('covid3d', 'cpu')(Path(data)/'covid_ct_md'/'P001'); found = quantify(seg)
    said = pd.read_csv(Path(data)/'covid_ct_md'/'labels.csv'); z = len(seg.ct.data)-1-said.slice_from_top
    share,seen = {},{}
    def longest(missed, z): return max(map(len, ''.join('x' if o else ' ' for o in missed[np.argsort(z)]).split()), default=0)
    for side,cols,least in (('right_lung',['RLL','RML','RUL'],.9), ('left_lung',['LLL','LUL'],.7)):
        mm3,ill = ((seg.masks['lesion']>0)&(seg.masks[side]>0)).sum((1,2))[z],said[cols].max(axis=1)>0
        p = mannwhitneyu(mm3[ill], mm3[~ill]); assert p.statistic/ill.sum()/(~ill).sum()>least
        share[side] = mm3[~ill].sum()/mm3.sum()
        seen[side] = int(ill.sum()),int((ill&(mm3>0)).sum()),longest(ill&(mm3==0), z)
    assert seen['right_lung'][0]==54 and abs(seen['right_lung'][1]-52)<3 and seen['left_lung'][0]==39 and abs(seen['left_lung'][1]-23)<3
    assert max(o[2] for o in seen.values())<=9  # what is missed is at most 9 slices high, 18 mm
    assert max(share.values())<.1 and found.regions.lesion_ml['right_lung']>found.regions.lesion_ml['left_lung']
    assert found.regions.lesion_ml['dorsal half']>.9*found.regions.lesion_ml['lungs']  # lower lobes lie behind
