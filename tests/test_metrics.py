"Every score against an independent implementation on 200 pairs of masks, and properties that any definition must have"
import itertools, math, warnings
import numpy as np, pytest, SimpleITK as sitk, surface_distance, torch
from hypothesis import given, settings, strategies as st
from monai import metrics as monai_metrics
from scipy import ndimage
from scipy.spatial.distance import dice as scipy_dice
from sklearn import metrics as skm
from surface_distance import lookup_tables
from types import SimpleNamespace
from covid3d.metrics import (assd, cube_polygons, dice, hd95, inside, lesion_detection, nearest_mm, nsd, overlap as voxels, PatchDice, score_names, scores, surface_distances, surface_points,
    surfel_areas, volume_error)
from covid3d.volume import CTError

spacings = (1.,1.,1.),(5.,.7,.7),(8.,.6,.6),(.31,2.7,1.13),(1.25,.78,.81),(3.,1.,1.)
shapes = (9,14,17),(1,16,16),(6,1,9),(5,20,3),(12,12,12)

def blob(rng, shape): return ndimage.gaussian_filter(rng.standard_normal(shape), rng.uniform(.5,2))>rng.uniform(-.02,.15)
def noise(rng, shape): return rng.random(shape)<rng.choice([.02,.3,.9])
def full(rng, shape): return np.ones(shape, bool)
def empty(rng, shape): return np.zeros(shape, bool)
def single(rng, shape): m = np.zeros(shape, bool); m[tuple(rng.integers(shape))] = True; return m
def corner(rng, shape): m = np.zeros(shape, bool); m[tuple(-1 if o else 0 for o in rng.integers(0,2,3))] = True; return m
def border(rng, shape):
    m,axis = np.zeros(shape, bool),rng.integers(3)
    np.moveaxis(m, axis, 0)[:rng.integers(1,shape[axis]+1)] = True
    return m if rng.random()<.5 else np.flip(m, axis)
def box(rng, shape):
    m = np.zeros(shape, bool); lo = rng.integers(shape); m[tuple(slice(i,rng.integers(i,n)+1) for i,n in zip(lo,shape))] = True
    return m
kinds = blob,blob,noise,full,empty,single,corner,border,box

def pair(seed):
    rng = np.random.default_rng(seed)
    shape,f,g = shapes[rng.integers(len(shapes))],*(kinds[i] for i in rng.integers(len(kinds),size=2))
    return f(rng,shape),g(rng,shape),spacings[rng.integers(len(spacings))]

def oracle_surface(a, b, spacing, tolerance):
    "HD95, average symmetric surface distance and surface Dice by DeepMind's surface-distance"
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        d = surface_distance.compute_surface_distances(b, a, spacing)
    (ba,ab),sb,sa = surface_distance.compute_average_surface_distance(d),d['surfel_areas_gt'].sum(),d['surfel_areas_pred'].sum()
    return surface_distance.compute_robust_hausdorff(d, 95),(ba*sb+ab*sa)/(sa+sb),surface_distance.compute_surface_dice_at_tolerance(d, tolerance)

def oracle_overlap(a, b):
    a,b,kw = a.ravel(),b.ravel(),dict(zero_division=0)
    return skm.f1_score(b,a,**kw),skm.jaccard_score(b,a,**kw),skm.precision_score(b,a,**kw),skm.recall_score(b,a,**kw),skm.recall_score(b,a,pos_label=0,zero_division=np.nan)

def oracle_lesions(a, b, connectivity, overlap):
    "Recall, precision and F1 of lesions, one at a time"
    near = ndimage.generate_binary_structure(3, {6:1,18:2,26:3}[connectivity])
    def rate(x, y):
        labels,n = ndimage.label(x, near)
        hits = [np.logical_and(labels==k,y).sum() for k in range(1,n+1)]
        return n,sum(h>0 and h/(labels==k).sum()>=overlap for k,h in enumerate(hits,1))
    (nb,found),(na,right) = rate(b,a),rate(a,b)
    r,p = found/nb if nb else 0,right/na if na else 0
    return p,r,2*found*right/(found*na+right*nb) if found*right else 0.

def ml(m, spacing):
    f = sitk.LabelShapeStatisticsImageFilter(); f.ComputeOrientedBoundingBoxOff(); f.ComputePerimeterOff()
    img = sitk.GetImageFromArray(m.astype('u1')); img.SetSpacing(spacing[::-1]); f.Execute(img)
    return f.GetPhysicalSize(1)/1000 if f.HasLabel(1) else 0.

def close(got, want): np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)

def test_the_pairs_hold_every_kind():
    pairs = [pair(i) for i in range(200)]
    assert sum(a.any() and b.any() for a,b,_ in pairs)>120
    for what in (lambda a,b: not a.any() and not b.any(), lambda a,b: not a.any() and b.any(), lambda a,b: a.any() and not b.any(), lambda a,b: a.all() and b.all(), lambda a,b: a.all() and not b.all(),
        lambda a,b: a.sum()==1 and b.sum()==1, lambda a,b: a.sum()==1 and b.sum()>1, lambda a,b: a[0].any() and a[-1].any() and b.any() and not a.all()):
        assert any(what(a,b) for a,b,_ in pairs)

@pytest.mark.parametrize('seed', range(0,200,20))
def test_every_score_equals_its_oracle(seed):
    for i in range(seed,seed+20):
        (a,b,s),tol = pair(i),(3.,1.,.5)[i%3]
        row = scores(a, b, s, tolerance=tol)
        if not a.any() and not b.any():  # no oracle has this convention
            assert row['empty']=='both' and all(np.isnan(row[n]) for n in score_names)
            continue
        assert row['empty']==('pred' if not a.any() else 'mask' if not b.any() else '')
        close([row[n] for n in score_names[:5]], oracle_overlap(a,b))
        err = ml(a,s)-ml(b,s)
        close([row['volume_error_ml'],row['volume_error_pct']], [err,100*err/ml(b,s) if b.any() else math.inf])
        close([row[n] for n in ('hd95','assd','nsd')], oracle_surface(a,b,s,tol) if a.any() and b.any() else (math.inf,math.inf,0))
        close([row[n] for n in ('lesion_precision','lesion_recall','lesion_f1')], oracle_lesions(a,b,26,0))

@pytest.mark.parametrize('connectivity', (6,18,26))
def test_lesions_of_any_connectivity_and_overlap(connectivity):
    for i in range(30):
        a,b,_ = pair(i)
        for overlap in (0,.25,.5,1):
            d = lesion_detection(a, b, connectivity, overlap)
            if a.any() or b.any(): close([d.precision,d.recall,d.f1], oracle_lesions(a,b,connectivity,overlap))
            else: assert np.isnan([d.precision,d.recall,d.f1]).all()

def test_single_functions_give_what_scores_gives():
    for i in range(40):
        a,b,s = pair(i); row,d = scores(a,b,s),lesion_detection(a,b)
        np.testing.assert_array_equal([row[n] for n in score_names], [dice(a,b),*(getattr(voxels(a,b), n) for n in score_names[1:5]),*volume_error(a,b,s),hd95(a,b,s),assd(a,b,s),nsd(a,b,s),d.precision,d.recall,d.f1])

def test_tree_and_distance_transform_agree():
    rng = np.random.default_rng(0)
    for s in spacings:
        p,q = rng.random((2,7,30,31))>.95
        want = ndimage.distance_transform_edt(~q, sampling=s)[p]
        for dense in (True,False,None): close(nearest_mm(np.flatnonzero(p), np.flatnonzero(q), p.shape, np.array(s), dense), want)

# ---- properties

seeds = st.integers(0, 10_000)

@settings(max_examples=40)
@given(seeds)
def test_symmetric(seed):
    a,b,s = pair(seed); x,y = scores(a,b,s),scores(b,a,s)
    for n in ('dice','jaccard','hd95','assd','nsd','lesion_f1'): np.testing.assert_allclose(x[n], y[n], rtol=1e-6)
    for p,q in (('precision','recall'),('lesion_precision','lesion_recall')): np.testing.assert_allclose(x[p], y[q], rtol=1e-6)
    np.testing.assert_allclose(x['volume_error_ml'], -y['volume_error_ml'])

@settings(max_examples=40)
@given(seeds, st.tuples(*[st.integers(0,4)]*6), st.booleans())
def test_where_it_lies_does_not_matter(seed, pad, mirror):
    "Moved in a larger scan, or mirrored: off the border too, so a mask that touches it is closed there"
    a,b,s = pair(seed); width = tuple(zip(pad[:3],pad[3:]))
    x = scores(a,b,s); a,b = (np.pad(o,width)[::-1] if mirror else np.pad(o,width) for o in (a,b)); y = scores(a,b,s)
    for n in score_names:
        if n!='specificity': np.testing.assert_allclose(x[n], y[n], rtol=1e-6, atol=1e-6, err_msg=n)

@settings(max_examples=30)
@given(seeds, st.sampled_from((.1,.5,2.,10.)))
def test_larger_voxels(seed, k):
    a,b,s = pair(seed); x,y = scores(a,b,s,tolerance=2.13),scores(a,b,tuple(k*o for o in s),tolerance=2.13*k)
    for n in score_names:
        scale = {'hd95':k,'assd':k,'volume_error_ml':k**3}.get(n,1)
        np.testing.assert_allclose(y[n], x[n]*scale, rtol=1e-5, atol=1e-9, err_msg=n)

@settings(max_examples=30)
@given(seeds)
def test_order_of_the_axes_does_not_matter(seed):
    a,b,s = pair(seed); x = scores(a,b,s)
    for order in itertools.permutations(range(3)):
        y = scores(a.transpose(order), b.transpose(order), [s[i] for i in order])
        for n in score_names: np.testing.assert_allclose(y[n], x[n], rtol=1e-6, atol=1e-6, err_msg=n)

@settings(max_examples=30)
@given(seeds)
def test_a_mask_agrees_with_itself(seed):
    a,_,s = pair(seed)
    if not a.any(): return
    x = scores(a,a,s,tolerance=0)
    assert all(x[n]==1 for n in ('dice','jaccard','precision','recall','nsd','lesion_precision','lesion_recall','lesion_f1'))
    assert x['hd95']==x['assd']==x['volume_error_ml']==x['volume_error_pct']==0

@settings(max_examples=30)
@given(seeds, st.floats(0,20))
def test_a_larger_tolerance_never_lowers_surface_dice(seed, t):
    a,b,s = pair(seed)
    if a.any() or b.any(): assert 0<=nsd(a,b,s,t)<=nsd(a,b,s,t+1)<=1

def test_a_distance_equal_to_the_tolerance_is_within():
    "Whatever the rounding of 5 × 0.6 or 3 × 0.7"
    for step,n in ((.6,5),(.7,3),(.1,3),(.3,10),(.75,4),(1.1,3)):
        a,b = np.zeros((2,1,1,30),bool); a[0,0,:2] = b[0,0,:2+n] = True
        for x,y in ((a,b),(b,a)): assert nsd(x, y, (1,1,step), step*n)==nsd(x, y, (1,1,step), step*n+1e-3)==1>nsd(x, y, (1,1,step), step*n-1e-3)

def test_masks_of_other_kinds():
    a,b,s = pair(1); want = scores(a,b,s)
    for f in (np.asfortranarray, lambda o: o.astype('f4'), lambda o: o.astype('i2')*3, lambda o: torch.tensor(o), lambda o: torch.tensor(o).to(torch.bfloat16), lambda o: np.repeat(o,2,0)[::2]):
        np.testing.assert_equal(scores(f(a),f(b),s), want)
    before = a.copy(); scores(a,b,s); assert (a==before).all()

@pytest.mark.parametrize('call,words', [
    (lambda a: dice(a, a[:-1]), 'pred: shape .* is not that of the mask'), (lambda a: hd95(a, a[:-1], (1,1,1)), 'Compare them on one grid'),
    (lambda a: hd95(a, a, (1,1)), 'spacing: .* three sizes'), (lambda a: nsd(a, a, (1,1,float('nan'))), 'spacing'), (lambda a: assd(a, a, (1,-1,1)), 'spacing'),
    (lambda a: volume_error(a, a, (1,0,1)), 'in mm'), (lambda a: surface_distances(a[0], a[0], (1,1,1)), '2 axes instead of 3'), (lambda a: scores(a[0], a[0], (1,1,1)), 'axes')])
def test_faults_are_named(call, words):
    with pytest.raises(CTError, match=words): call(pair(1)[0])

# ---- parts, by hand and against tables

def test_voxels_by_hand():
    o = voxels([1,1,1,0,0,0,0,0], [1,1,0,1,1,0,0,0])
    assert (o.tp,o.fp,o.fn,o.tn)==(2,1,2,3)
    close([o.dice,o.jaccard,o.precision,o.recall,o.specificity], [4/7,2/5,2/3,2/4,3/4])

def test_overlap_equals_scikit_learn_and_scipy():
    "From nearly empty to nearly full masks"
    rng = np.random.default_rng(0)
    for p in np.linspace(.02,.98,20):
        a,b = rng.random((2,300))<p; a[0],b[1],a[2:4],b[2:4] = True,True,(True,False),(True,False); o = voxels(a,b)
        close([o.dice,o.jaccard,o.precision,o.recall,o.specificity], oracle_overlap(a,b)); close(dice(a,b), 1-scipy_dice(a,b))

def test_empty_and_full_masks():
    full,none = np.ones((2,3,4),bool),np.zeros((2,3,4),bool)
    share = lambda a,b: [getattr(voxels(a,b), k) for k in score_names[:5]]
    assert np.isnan(share(none,none)).all() and share(full,none)==[0]*5 and share(none,full)[:4]==[0]*4
    assert share(full,full)[:4]==[1]*4 and np.isnan(share(full,full)[4])

def test_volume_error_by_hand():
    a,b = np.zeros((2,10,10,10),bool); a[:4],b[:5] = True,True
    close(volume_error(a, b, (5,.8,.8)), (-.32,-20)); assert volume_error(a, b&False, (1,1,1))==(.4,math.inf) and volume_error(a&False, b, (1,1,1))==(-.5,-100)
    assert np.isnan(volume_error(a&False, b&False, (1,1,1))).all()

def test_polygons_cut_the_edges_between_inside_and_outside():
    assert [len(cube_polygons(c)) for c in (0,255)]==[0,0]
    assert [[len(o) for o in cube_polygons(c)] for c in (1,0b11110000,0b10000001)]==[[3],[4],[3,3]]
    corners = list(itertools.product((0,1), repeat=3))
    edges = [(p,q) for p,q in itertools.combinations(corners, 2) if sum(map(abs, np.subtract(p,q)))==1]
    for c in range(256): assert sum(map(len, cube_polygons(c)))==sum(inside(c,p)!=inside(c,q) for p,q in edges)

def test_areas_are_those_of_surface_distance():
    close(surfel_areas((1,1,1))[128], math.sqrt(3)/8); close(surfel_areas((5,.7,.8))[[0b11110000,0b11001100,0b10101010]], [.7*.8,5*.8,5*.7])
    for s in ((1,1,1),(5,.7,.8),(.31,2.7,1.1),(8,.6,.6)): np.testing.assert_allclose(surfel_areas(s), lookup_tables.create_table_neighbour_code_to_surface_area(s), atol=1e-9)

def test_codes_of_corner_points_one_by_one():
    rng = np.random.default_rng(0)
    for m in (rng.random((4,5,16))>.5, rng.random((3,2,7))>.8, np.ones((3,3,3),bool), np.zeros((2,2,2),bool)):
        pad,(i,c) = np.pad(m,1),surface_points(m)
        want = [int(''.join(map(str, pad[tuple(slice(k,k+2) for k in at)].ravel().astype(int))),2) for at in np.ndindex(*(n+1 for n in m.shape))]
        assert i.tolist()==[k for k,o in enumerate(want) if 0<o<255] and c.tolist()==[want[k] for k in i]

def test_nearest_points_within_a_distance():
    rng,s = np.random.default_rng(0),np.array((5,.7,.8)); p,q = rng.random((2,9,20,20))>.97; i,j = map(np.flatnonzero,(p,q))
    want = ndimage.distance_transform_edt(~q, sampling=s)[p]; near,cut = want<2,nearest_mm(i,j,p.shape,s,False,within=2)
    close(cut[near], want[near]); assert (np.isinf(cut)==~near).all() and (nearest_mm(j,j,p.shape,s)==0).all() and np.isinf(nearest_mm(i,j[:0],p.shape,s)).all()

def test_surface_scores_of_two_voxels_by_hand():
    p,q = np.zeros((2,9,9,9),bool); p[0,0,0],q[4,0,0] = True,True; s,none = (3,1,1),p&False
    close([hd95(p,q,s), hd95(p,q,s,50), assd(p,q,s)], [12,9,10.5]); assert [nsd(p,q,s,t) for t in (8.99,9,11.99,12)]==[0,.5,.5,1]
    assert hd95(p,p,s)==assd(p,p,s)==0 and nsd(p,p,s,0)==1
    assert hd95(p,none,s)==hd95(none,p,s)==assd(p,none,s)==math.inf and nsd(p,none,s)==0 and np.isnan([hd95(none,none,s),assd(none,none,s),nsd(none,none,s)]).all()
    for call,words in ((lambda: hd95(p,q,s,150), 'percent: 150 is not in 0…100. Give 95'), (lambda: nsd(p,q,s,math.nan), 'tolerance: nan is not in 0')):
        with pytest.raises(CTError, match=words): call()

def test_a_shifted_ball():
    z,r,c = np.ogrid[:16,:40,:44]; ball = lambda x: (2*z-15)**2+(r-20)**2+(c-x)**2<=100; a,b,s = ball(23),ball(20),(2,1,1); d = surface_distances(a,b,s)
    assert d.mask_mm2.sum()/(4*math.pi*100)==pytest.approx(1.13, abs=.01) and d.pred_mm2.sum()==d.mask_mm2.sum() and hd95(a,b,s)==3
    close(assd(a,b,s), assd(b,a,s)); assert (np.diff([nsd(a,b,s,t) for t in np.linspace(0,4,41)])>=0).all()

def medpy_hd95(p, m, spacing):
    "One percentile over both directions, of the centers of border voxels"
    a,b = (o&~ndimage.binary_erosion(o) for o in (p,m)); d = [ndimage.distance_transform_edt(~y, sampling=spacing)[x] for x,y in ((a,b),(b,a))]
    return float(np.percentile(np.concatenate(d), 95))

def test_three_definitions_of_hd95_on_tiny_masks():
    "A voxel beside a plate decides one and not the others; pairs of three dots mostly agree, and some are millimeters apart"
    def three(x, y, s):
        t = [torch.tensor(m)[None,None].float() for m in (x,y)]
        return hd95(x,y,s),monai_metrics.compute_hausdorff_distance(*t, spacing=s, include_background=True, percentile=95).item(),medpy_hd95(x,y,s)
    plate = np.zeros((3,9,24),bool); plate[1,2:7,2:7] = True; extra = plate.copy(); extra[1,4,16] = True
    here,*others = three(extra, plate, (8.,.8,.8)); assert here>6 and max(others)<1
    rng = np.random.default_rng(0)
    def dots():
        m = np.zeros((6,16,16), bool)
        for z,r,c in rng.integers(0, [6,15,15], (3,3)): m[z,r:r+2,c:c+2] = True
        return m
    rows = np.array([three(dots(), dots(), (8.,.8,.8)) for _ in range(40)]); apart = abs(rows[:,1:]-rows[:,:1])
    assert 1<apart.max()<10 and np.median(apart, axis=0).max()<1

def test_lesions_by_hand():
    m = np.zeros((4,8,8),bool); m[0,:2,:2] = m[1,2:4,2:4] = m[3,6:,:2] = True
    p = np.zeros_like(m); p[0,0,0] = p[2,0,7] = True; count = lambda *o: tuple(vars(lesion_detection(*o)).values())
    assert count(p,m)==(2,1,2,1) and count(p,m,18)==(3,1,2,1) and [count(p,m,18,o)[1] for o in (.25,.26)]==[1,0]
    assert [lesion_detection(*o).f1 for o in ((m,m),(m,m&False),(m&False,m))]==[1,0,0] and np.isnan(lesion_detection(m&False,m&False).f1)
    for kw,fault in ((dict(connectivity=5),'Give 6, 18 or 26'),(dict(overlap=1.5),'1.5 is not in 0…1')):
        with pytest.raises(CTError, match=fault): lesion_detection(p, m, **kw)

def test_patch_dice_pools_batches():
    metric,logits,y = PatchDice(),torch.randn(4,2,3,8,8),torch.randint(0,2,(4,2,3,8,8)); metric.reset()
    for s in (slice(0,1),slice(1,4)): metric.accumulate(SimpleNamespace(pred=logits[s], y=y[s]))
    assert metric.value==pytest.approx(dice(logits[:,0]>0, y[:,0])); metric.reset(); assert np.isnan(metric.value)
