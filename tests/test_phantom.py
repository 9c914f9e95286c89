"The made-up chests: hard enough, right enough, the same every time"
import numpy as np, pandas as pd, pytest
from scipy.ndimage import gaussian_filter

import covid3d.phantom as module
from covid3d.phantom import best_band, best_band_dice, phantom, write_phantoms
from covid3d.volume import CTError

small = dict(shape=(32,96,96), spacing=(9,3.7,3.7))

@pytest.fixture(scope='module', params=[3,12,16,29,59,96])
def ph(request): return phantom(request.param)

@pytest.mark.parametrize('sigma', [0,1,2,3])
def test_no_hu_band_finds_the_lesions(ph, sigma):
    assert best_band_dice(ph.ct, ph.lung, ph.lesion, sigma)<.6

def test_masks(ph):
    lung,ill = ph.lung.data,ph.lesion.data
    assert ph.ct.data.dtype==np.int16 and lung.dtype==ill.dtype==np.uint8
    assert set(np.unique(lung))=={0,1,2} and set(np.unique(ill))=={0,1}
    assert (lung[ill>0]>0).all()
    right,left = (lung==1).sum(),(lung==2).sum()
    assert left<right
    heights = [np.flatnonzero((lung==i).any((1,2)))[0] for i in (1,2)]
    domes = [np.flatnonzero((lung==i).sum((1,2))>.5*(lung==i).sum((1,2)).max())[0] for i in (1,2)]
    assert heights[0]>=heights[1]-1 and domes[0]>=domes[1]

def test_lesions_lie_as_they_should(ph):
    lung,ill = ph.lung.data,ph.lesion.data>0
    assert ill[lung==1].any() and ill[lung==2].any()
    assert .02<ill.sum()/(lung>0).sum()<.25
    (z,y,_),(Z,Y,_) = (np.array(np.nonzero(m)).mean(1) for m in (ill,lung>0))
    assert z<Z and y>Y

def test_tissues(ph):
    ct,lung,ill = ph.ct.data,ph.lung.data,ph.lesion.data>0
    low,mid,high = np.percentile(ct[ill], (5,50,95))
    assert -780<low<-500 and -650<mid<-200 and high<150
    assert -900<np.median(ct[(lung>0)&~ill])<-700
    assert (ct>400).sum()>10_000 and abs(np.median(ct[:,:8])+1000)<15
    rear,front = (np.median(ct[:,y][(lung>0)[:,y]]) for y in (slice(160,256),slice(0,110)))
    assert rear>front+40

def test_soft_edges(ph):
    "A quarter of the voxels just outside the mask are denser than the lung further away"
    ill,lung = ph.lesion.data>0,ph.lung.data>0
    near = gaussian_filter(ill.astype(np.float32), 2)
    rim = (near>.2)&~ill&lung
    assert np.median(ph.ct.data[rim])>np.median(ph.ct.data[lung&(near<.01)])

@pytest.mark.parametrize('kw', [small, dict(shape=(48,128,128), spacing=(6,2.8,2.8)), dict(shape=(73,101,90), spacing=(4,3.6,4))])
def test_deterministic_on_any_grid(kw):
    a,b = phantom(7, **kw),phantom(7, **kw)
    for u,v in zip(a,b): assert (u.data==v.data).all() and u.shape==kw['shape'] and np.allclose(u.spacing, kw['spacing'])
    assert (a.ct.data!=phantom(8, **kw).ct.data).any()

def test_the_same_patient_on_another_grid():
    a,b = phantom(7, **small),phantom(7, (48,128,128), (6,2.8,2.8))
    for u,v in zip(a[1:],b[1:]): assert abs((u.data>0).sum()*u.ml_per_voxel/((v.data>0).sum()*v.ml_per_voxel)-1)<.1

@pytest.mark.parametrize('kw', [dict(shape=(32,96,96), spacing=(3,1,1)), dict(shape=(96,96,96), spacing=(9,3.7,3.7)), dict(shape=(96,256), spacing=(3,1.4))])
def test_a_field_that_does_not_fit_is_refused(kw):
    with pytest.raises(CTError, match='Choose about'): phantom(0, **kw)

def test_loads_vary():
    loads = [(p.lesion.data>0).sum()/(p.lung.data>0).sum() for p in (phantom(i, **small) for i in range(12))]
    assert max(loads)>2*min(loads) and .02<min(loads) and max(loads)<.25

def test_easy_masks_score_high():
    ct = np.full((4,8,8), -850); ct[1,2:5,2:5] = -300
    assert best_band(ct, ct<0, ct==-300)[0]==1
    assert best_band_dice(ct, ct<0, np.zeros_like(ct))==0

def test_an_interrupted_write_leaves_no_table(tmp_path, monkeypatch):
    real,calls = module.phantom,[]
    def fails(*a): calls.append(a); return real(*a) if len(calls)<3 else 1/0
    monkeypatch.setattr(module, 'phantom', fails)
    with pytest.raises(ZeroDivisionError): write_phantoms(tmp_path, 3, **small)
    assert not (tmp_path/'cases.csv').exists() and not list(tmp_path.rglob('*.tmp'))
    monkeypatch.undo()
    df = pd.read_csv(write_phantoms(tmp_path, 3, **small))
    assert df['split'].tolist()==['train','valid','test'] and df['already_windowed'].isna().all()
    for c in ('ct','lesion','lung'): assert all((tmp_path/p).exists() for p in df[c])

def test_no_bar_in_a_pipe(tmp_path, capfd):
    write_phantoms(tmp_path, 2, **small)
    assert '\r' not in capfd.readouterr().out
