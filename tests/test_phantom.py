"Synthetic patients: hard enough, right enough, the same every time"
import json, os, signal

import numpy as np, pandas as pd, pytest
from scipy.ndimage import gaussian_filter

import covid3d.phantom as module
from covid3d.cases import read_cases
from covid3d.phantom import best_band, best_band_dice, phantom, write_phantoms
from covid3d.volume import CTError
from coarse import cached, grid, small as small_phantom

tiny = dict(shape=(32,50,50), spacing=(9,7,7))
seeds = range(25)

@pytest.fixture(scope='module')
def cohort(): return [cached(i) for i in seeds]

@pytest.fixture(scope='module')
def ill(cohort): return [ph for ph in cohort if ph.lesion.data.any()]

@pytest.fixture(scope='module', params=[9,12])
def ph(request):
    "At full size: a large lesion burden, and a middling one"
    return phantom(request.param)

def ml(mask, *labels): return np.isin(mask.data, labels or (1,)).sum()*mask.ml_per_voxel

# Hard enough

@pytest.mark.parametrize('sigma', [0,1,2])
def test_no_hu_band_finds_the_lesions(ill, sigma):
    "The best band that could be chosen for each patient, with the answer at hand: a Dice below 0.6 in the median, above 0.75 in three of twenty at most"
    dice = [best_band_dice(p.ct, p.lung, p.lesion, sigma) for p in ill]
    assert np.median(dice)<.6 and np.mean(np.array(dice)>.75)<=.15

def test_no_band_at_full_size(ph): assert best_band_dice(ph.ct, ph.lung, ph.lesion)<.7

def test_one_band_for_all_is_worse(ill):
    "A threshold must be chosen without the answer: no band of HU serves all patients"
    bands = [best_band(p.ct, p.lung, p.lesion)[1:] for p in ill[:10]]
    def dice(p, low, high):
        hit = (p.ct.data>=low)&(p.ct.data<high)&(p.lung.data>0)
        return 2*(hit&(p.lesion.data>0)).sum()/(hit.sum()+p.lesion.data.sum())
    assert max(np.mean([dice(p, *b) for p in ill]) for b in bands)<.45

def test_easy_masks_score_high():
    ct = np.full((4,8,8), -850); ct[1,2:5,2:5] = -300
    assert best_band(ct, ct<0, ct==-300)[0]==1
    assert best_band_dice(ct, ct<0, np.zeros_like(ct))==0

# Right enough

def require_nested(ph):
    lung,ill,lobes = ph.lung.data,ph.lesion.data,ph.lobes.data
    assert ph.ct.data.dtype==np.int16 and lung.dtype==ill.dtype==lobes.dtype==np.uint8
    assert (*np.unique(lung),)==(0,1,2) and {*np.unique(ill)}<={0,1} and (*np.unique(lobes),)==(0,1,2,3,4,5)
    assert (lung[ill>0]>0).all() and ((lobes>0)==(lung>0)).all()
    assert (lung[np.isin(lobes, (1,2,3))]==1).all() and (lung[lobes>3]==2).all()

def test_masks_are_nested(cohort):
    "Lesions in the lungs, three lobes in the right one and two in the left, each of them there, in every patient"
    for p in cohort: require_nested(p)

def test_masks_at_full_size(ph):
    require_nested(ph)
    lung = ph.lung.data
    x = [np.flatnonzero((lung==i).any((0,1))).mean() for i in (1,2)]
    assert x[0]<x[1]  # the patient's right is at the left of a slice, as radiologists look at it
    upper,lower = (np.nonzero(np.isin(ph.lobes.data, o))[0].mean() for o in ((1,4),(3,5)))
    assert upper>lower

def test_right_lung_is_larger(cohort):
    ratio = [ml(p.lung, 1)/ml(p.lung, 2) for p in cohort]
    assert 1<np.mean(ratio)<1.25 and np.mean(np.array(ratio)>1)>.7

def test_lung_volumes_are_those_of_a_ct(cohort):
    "In litres, at inspiration or less"
    l = np.array([ml(p.lung, 1, 2)/1000 for p in cohort])
    assert l.min()>2 and l.max()<9 and 4<np.median(l)<6.5 and l.std()>.5

def test_lesion_burden_is_that_of_mosmed(ill):
    "Quartiles 26, 66 and 109 ml, to a factor of 1.6; from less than 15 ml to more than 200"
    got = [ml(p.lesion) for p in ill]
    ratio = np.percentile(got, (25,50,75))/(26,66,109)
    assert (1/1.6<ratio).all() and (ratio<1.6).all() and min(got)<15 and max(got)>200

def test_lesions_lie_as_they_should(ill):
    "Low and at the back on the whole, in both lungs of most patients"
    def middle(m): return np.array(np.nonzero(m)).mean(1)
    off = np.mean([middle(p.lesion.data)-middle(p.lung.data) for p in ill], 0)
    both = np.mean([all((p.lesion.data[p.lung.data==i]>0).any() for i in (1,2)) for p in ill])
    assert off[0]<0<off[1] and both>.5

def test_tissues(ph):
    ct,lung,ill = ph.ct.data,ph.lung.data,ph.lesion.data>0
    low,mid,high = np.percentile(ct[ill], (5,50,95))
    assert low<-450 and -600<mid<-100 and mid+100<high<250
    assert -940<np.median(ct[(lung>0)&~ill])<-660
    assert (ct>250).sum()>10_000 and abs(np.median(ct[:,:8])+1000)<30 and -1024<=ct.min()

def test_soft_edges(ph):
    "The lung just outside a lesion's mask is denser than the lung further away"
    ill,lung = ph.lesion.data>0,ph.lung.data>0
    near = gaussian_filter(ill.astype(np.float32), 2)
    assert np.median(ph.ct.data[(near>.2)&~ill&lung])>np.median(ph.ct.data[lung&(near<.01)])

def test_one_of_five_is_healthy(cohort):
    assert .1<np.mean([not p.lesion.data.any() for p in cohort])<.3

def test_healthy_or_ill_as_you_wish():
    "The same patient, with lesions and without"
    assert not cached(5).lesion.data.any()
    a,b = phantom(5, **tiny, healthy=False),phantom(5, **tiny, healthy=True)
    assert a.lesion.data.any() and not b.lesion.data.any()
    assert (a.lung.data==b.lung.data).mean()>.999 and (a.ct.data!=b.ct.data).any()

# The same every time

@pytest.mark.parametrize('kw', [tiny, dict(shape=(73,101,90), spacing=(4,3.6,4))])
def test_deterministic_on_any_grid(kw):
    np.random.seed(1); a = phantom(7, **kw)
    np.random.seed(2); b = phantom(7, **kw)
    for u,v in zip(a,b): assert (u.data==v.data).all() and u.shape==kw['shape'] and np.allclose(u.spacing, kw['spacing'])
    assert (a.ct.data!=phantom(8, **kw).ct.data).any()

def test_the_same_patient_on_another_grid():
    "Volumes of lungs, lobes and lesions agree within 10 %, and so do their places in mm"
    a,b = cached(6),cached(6, (48,128,128), (6,2.8,2.8))
    for u,v,labels in ((a.lung,b.lung,(1,2)), (a.lesion,b.lesion,(1,)), (a.lobes,b.lobes,(1,2,3,4,5))):
        for k in labels:
            assert abs(ml(u, k)/ml(v, k)-1)<.1, k
            at = [(o.affine@[*np.array(np.nonzero(o.data==k)).mean(1),1])[:3] for o in (u,v)]
            assert np.linalg.norm(at[0]-at[1])<2, (k, at)

@pytest.mark.parametrize('kw', [dict(shape=(32,96,96), spacing=(3,1,1)), dict(shape=(96,96,96), spacing=(9,3.7,3.7)), dict(shape=(96,256), spacing=(3,1.4))])
def test_a_field_that_does_not_fit_is_refused(kw, tmp_path):
    with pytest.raises(CTError, match='Choose about'): phantom(0, **kw)
    with pytest.raises(CTError, match='Choose about'): write_phantoms(tmp_path/'out', 1, **kw)
    assert not (tmp_path/'out').exists()

# Written

def test_written_masks(tmp_path):
    "Each patient in a field of view of its own; each lung beside both; the table names every file"
    cases = read_cases(write_phantoms(tmp_path, 2, shape=None, spacing=(9,7,7)), masks=('lung','right_lung','left_lung'))
    cts = [c.open_ct() for c in cases]
    assert cts[0].shape!=cts[1].shape and not np.allclose(cts[0].affine[:3,3], cts[1].affine[:3,3])
    for ct,c in zip(cts, cases):
        lung,right,left = (c.open_mask(k, ct).data>0 for k in ('lung','right_lung','left_lung'))
        assert lung.shape==ct.shape and not (right&left).any() and ((right|left)==lung).all() and right.any() and left.any()
    assert (pd.read_csv(tmp_path/'cases.csv').lobes==['lobes_mask/phantom_000.nii.gz','lobes_mask/phantom_001.nii.gz']).all()
    assert json.loads((tmp_path/'phantoms.json').read_text())==dict(n=2, seed=0, shape=None, spacing=[9,7,7])

class Cut(Exception): pass

@pytest.mark.parametrize('file', ['phantom','left_lung_mask','lobes_mask'])
def test_an_interrupted_write_resumes(tmp_path, monkeypatch, file):
    "Stopped at the third patient, before it is made or while its masks are written: no table and no draft; resumed, the two before it are kept, and all is as without a break"
    monkeypatch.setattr(module, 'phantom', small_phantom)
    write_phantoms(tmp_path/'whole', 4, **grid)
    with monkeypatch.context() as m:
        def fails(seed, *_): raise Cut
        def save(v, path): return module_save(v, path) if not ('phantom_002' in path.name and file in path.parts) else fails(0)
        module_save = module.save_volume
        m.setattr(module, 'save_volume', save)
        if file=='phantom': m.setattr(module, 'phantom', lambda seed, *_: small_phantom(seed) if seed<2 else fails(seed))
        with pytest.raises(Cut): write_phantoms(tmp_path/'cut', 4, **grid)
    assert not (tmp_path/'cut'/'cases.csv').exists() and not list(tmp_path.rglob('*.tmp'))
    made = []
    monkeypatch.setattr(module, 'phantom', lambda seed, *_: (made.append(seed), small_phantom(seed))[1])
    df = pd.read_csv(write_phantoms(tmp_path/'cut', 4, resume=True, **grid))
    assert made==[2,3] and df['split'].tolist()==['train','train','valid','test'] and df['already_windowed'].isna().all()
    files = lambda d: {p.relative_to(d).as_posix():p.read_bytes() for p in d.rglob('*') if p.is_file()}
    assert files(tmp_path/'cut')==files(tmp_path/'whole')

@pytest.mark.promise('lost')
def test_a_killed_process_is_told(tmp_path, monkeypatch):
    "The kernel kills a process for its memory: one line with the remedy, and a resumed call keeps what was made"
    def dies(seed, *_): return small_phantom(seed) if seed<3 else os.kill(os.getpid(), signal.SIGKILL)
    monkeypatch.setattr(module, 'phantom', dies)
    with pytest.raises(CTError, match='was killed. Free memory and resume'): write_phantoms(tmp_path, 4, workers=2, **grid)
    assert not (tmp_path/'cases.csv').exists()
    monkeypatch.setattr(module, 'phantom', small_phantom)
    assert len(pd.read_csv(write_phantoms(tmp_path, 4, resume=True, workers=2, **grid)))==4

def test_other_phantoms_are_not_resumed(tmp_path, monkeypatch):
    "Phantoms of other arguments in the folder are refused without overwrite=True, and none of them is mixed in with it"
    monkeypatch.setattr(module, 'phantom', small_phantom)
    write_phantoms(tmp_path, 3, **grid); before = (tmp_path/'ct'/'phantom_000.nii.gz').read_bytes()
    for kw in (dict(n=3, seed=1), dict(n=2), dict(n=3, spacing=(9,3.8,3.8))):
        with pytest.raises(CTError, match='overwrite=True'): write_phantoms(tmp_path, resume=True, **grid|kw)
        assert (tmp_path/'ct'/'phantom_000.nii.gz').read_bytes()==before
    write_phantoms(tmp_path, 2, seed=1, overwrite=True, resume=True, **grid)
    assert sorted(p.name for p in (tmp_path/'ct').iterdir())==['phantom_000.nii.gz','phantom_001.nii.gz']
    assert (tmp_path/'ct'/'phantom_000.nii.gz').read_bytes()!=before

def test_no_bar_in_a_pipe(tmp_path, capfd, monkeypatch):
    monkeypatch.setattr(module, 'phantom', small_phantom)
    write_phantoms(tmp_path, 2, **grid)
    assert '\r' not in capfd.readouterr().out
