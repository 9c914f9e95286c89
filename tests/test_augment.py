"Augmentation: CT and mask stay together, draws are spread as they say, and SciPy bends a patch alike"
import copy, math, pickle, random
from unittest.mock import patch as spy_on

import numpy as np, pytest, torch
from scipy import interpolate, ndimage, stats

from covid3d.augment import (Aug3d, Augment3d, Blur3d, Brightness3d, Contrast3d, CutOut3d, Draw, Elastic3d, Flip3d, Gamma3d, Noise3d, Perspective3d, Rotate3d, Sharpen3d, Shear3d, Shift3d,
    SliceGap3d, Spatial3d, Streaks3d, Then3d, ThickSlices3d, Window3d, Zoom3d, _noise, _rotation, _slices, _smooth, _tone, _uniform, _weighted, ct_aug_transforms, equalize,
    grey_aug_transforms, light_aug_transforms, spline_weights, warp)
from covid3d.patches import RandomPatch, TensorCT, TensorMask3d
from covid3d.volume import CTError

each = pytest.mark.parametrize
spacing = (4.,2.,2.)
space = dict(flip=lambda: Flip3d(1), flip_slices=lambda: Flip3d(1, axis=0), rotate=lambda: Rotate3d(25, p=1), tilt=lambda: Rotate3d(25, tilt=20, p=1), zoom=lambda: Zoom3d(p=1), zoom_all=lambda: Zoom3d(slices=True, p=1),
    shear=lambda: Shear3d(10, p=1), shift=lambda: Shift3d((6,6,6), p=1), perspective=lambda: Perspective3d(.3, p=1), elastic=lambda: Elastic3d(6, p=1), elastic3d=lambda: Elastic3d(6, through=3, p=1))
grey = dict(brightness=Brightness3d, contrast=Contrast3d, gamma=Gamma3d, window=Window3d, noise=Noise3d, streaks=Streaks3d, blur=Blur3d, sharpen=Sharpen3d, thick=ThickSlices3d, cutout=CutOut3d)

def draw(*tfms, n=1):
    d = Draw(n, torch.eye(4).repeat(n,1,1))
    for t in tfms: t.add(d)
    return d

def blobs(shape=(15,41,45), seed=0): return ndimage.gaussian_filter(np.random.default_rng(seed).normal(size=shape), 1.5).astype(np.float32)

def coordinates(d, shape, size):
    "Where each voxel comes from, worked out in float64 without any of the library's shortcuts"
    u = np.stack(np.meshgrid(*((np.arange(n)-(n-1)/2)*s for n,s in zip(size, spacing)), indexing='ij'), -1)
    v = np.concatenate([u, np.ones((*size,1))], -1)@d.matrix[0].double().numpy().T
    v = v[...,:3]/v[...,3:]
    if d.field is not None:
        w = [spline_weights(n, k).double().numpy() for n,k in zip(size, d.field.shape[2:])]
        v = v+np.einsum('azkl,sz,rk,cl->srca', d.field[0].double().numpy(), *w)
    return (v/spacing+(np.array(shape)-1)/2).transpose(3,0,1,2)

@each('name', space)
@each('seed', range(3))
def test_each_in_space_against_scipy(name, seed):
    "One change alone, and with a rotation and a zoom before it: SciPy's map_coordinates at coordinates worked out apart from the library"
    for before in ([], [Rotate3d(10, p=1), Zoom3d(p=1)]):
        torch.manual_seed(seed)
        x,d,size = blobs(seed=seed),draw(*before, space[name]()),(9,25,27)
        got,mask = warp(torch.from_numpy(x)[None,None], torch.from_numpy(x>0)[None,None].byte(), d, size, spacing)
        at = coordinates(d, x.shape, size)
        inner = np.all([(a>0)&(a<n-1) for a,n in zip(at, x.shape)], 0)  # SciPy and PyTorch fade out differently over the last half voxel
        assert inner.mean()>.2 and np.allclose(got[0,0].numpy()[inner], ndimage.map_coordinates(x, at, order=1)[inner], atol=2e-4)
        near = np.abs(at-np.floor(at)-.5).min(0)>1e-3  # half-way between two voxels either is right
        assert (mask[0,0].numpy()==ndimage.map_coordinates((x>0).astype(np.uint8), at, order=0))[inner&near].all()

@each('name', [k for k in space if k not in ('tilt','perspective','elastic3d')])
def test_flat_and_full_agree(name, monkeypatch):
    "What is done slice by slice is what full 3D interpolation gives"
    torch.manual_seed(1)
    x,d = torch.from_numpy(blobs())[None,None],draw(Rotate3d(10, p=1), space[name]())
    assert d.flat
    flat = warp(x, (x>0).byte(), d, (9,25,27), spacing)
    monkeypatch.setattr(Draw, 'flat', False)
    full = warp(x, (x>0).byte(), d, (9,25,27), spacing)
    assert torch.allclose(flat[0], full[0], atol=1e-4) and (flat[1]==full[1]).float().mean()>.999

def compositions(n, rng):
    "Random choices of up to seven changes"
    kinds = {**space,**{k:(lambda c=c: c(p=1)) for k,c in grey.items() if k not in ('noise','streaks','cutout')}}
    for _ in range(n):
        names = rng.choice(list(kinds), rng.integers(1, 8), replace=False).tolist()
        if {'elastic','elastic3d'}<=set(names): names.remove('elastic3d')
        yield names,[kinds[k]() for k in names]

def test_500_compositions_keep_ct_and_mask_together():
    "A bright ball is its own mask: after any composition the CT is brighter inside the mask than outside, and the centres agree to the half voxel by which the nearest voxel may be off"
    torch.manual_seed(0)
    ball = sum((g-c)**2*s**2 for g,c,s in zip(np.indices((21,41,41)), (10,20,20), spacing))<14**2
    x,y = TensorCT(torch.from_numpy(ball*200+20).byte()[None]),TensorMask3d(torch.from_numpy(ball).byte()[None])
    seen = 0
    for names,tfms in compositions(500, np.random.default_rng(0)):
        a,b = Augment3d(tfms, spacing).cut(x, y, [5,8,8], (11,25,25), voxel=(10,20,20))
        a,b = (o[0].as_subclass(torch.Tensor) for o in (a,b))
        assert b.unique().tolist() in ([0,1],[1]), names
        if b.all(): continue
        inside,outside = a[b==1].mean(),a[(b==0)].mean()
        assert inside>outside+.25, (names,inside,outside)
        bright = a>(inside+a[b==0].median())/2
        centre = lambda m: np.array(ndimage.center_of_mass(m.numpy()))
        assert np.abs(centre(bright)-centre(b)).max()<.65, names
        seen += 1
    assert seen>450

@each('name', grey)
def test_greys_leave_masks_alone(name):
    torch.manual_seed(0)
    x,y = TensorCT(torch.randint(0, 256, (1,9,20,20), dtype=torch.uint8)),TensorMask3d(torch.randint(0, 2, (2,9,20,20), dtype=torch.uint8))
    a,b = Augment3d([grey[name](p=1)], spacing).cut(x, y, [1,2,3], (6,12,12))
    assert torch.equal(b, y[:,1:7,2:14,3:15]) and not torch.equal(a.as_subclass(torch.Tensor), x[:,1:7,2:14,3:15].float()/255) and 0<=a.min()<=a.max()<=1

def angle(m): return torch.rad2deg(torch.atan2(m[:,2,1], m[:,1,1]))

@each('values,law', [
    (lambda n: angle(draw(Rotate3d(15, p=1), n=n).matrix), stats.uniform(-15, 30)),
    (lambda n: (1/draw(Zoom3d(.8, 1.25, p=1), n=n).matrix[:,1,1]).log(), stats.uniform(math.log(.8), math.log(1.25)-math.log(.8))),
    (lambda n: torch.rad2deg(draw(Shear3d(5, p=1), n=n).matrix[:,1,2].atan()), stats.uniform(-5, 10)),
    (lambda n: draw(Shift3d((0,10,6), p=1), n=n).matrix[:,2,3], stats.uniform(-6, 12)),
    (lambda n: draw(Brightness3d(.1, p=1), n=n).shift, stats.uniform(-.1, .2)),
    (lambda n: draw(Contrast3d(.2, p=1), n=n).gain, stats.uniform(.8, .4)),
    (lambda n: draw(Gamma3d(.8, 1.25, p=1), n=n).gamma.log(), stats.uniform(math.log(.8), 2*math.log(1.25))),
    (lambda n: draw(Elastic3d(6, knots=4, p=1), n=n).field[:,1,0,2,2], stats.norm(0, 6)),
    (lambda n: torch.tensor([o for _,s in draw(Noise3d(.04, p=1), n=n).then for o in s]), stats.uniform(0, .04)),
    (lambda n: torch.tensor([o for _,s in draw(Blur3d(1, p=1), n=n).then for o in s]), stats.uniform(.3, .7))], ids='rotate zoom shear shift brightness contrast gamma elastic noise blur'.split())
def test_draws_are_spread_as_they_say(values, law):
    "Each sample of a batch has its own value, and the values follow their law (Kolmogorov–Smirnov)"
    torch.manual_seed(0)
    v = values(3000).numpy()
    assert len(np.unique(v))>2900 and stats.kstest(v, law.cdf).pvalue>1e-3

@each('p', [0,.3,1])
@each('make', [lambda p: Flip3d(p), lambda p: Rotate3d(p=p), lambda p: Zoom3d(p=p), lambda p: Shear3d(p=p), lambda p: Perspective3d(p=p)], ids='flip rotate zoom shear perspective'.split())
def test_probability_in_space(make, p):
    torch.manual_seed(0)
    moved = (draw(make(p), n=2000).matrix!=torch.eye(4)).flatten(1).any(1).float().mean()
    assert abs(moved-p)<.04

@each('p', [0,.3,1])
@each('name', grey)
def test_probability_of_greys(name, p):
    torch.manual_seed(0)
    d = draw(grey[name](p=p), n=2000)
    hit = torch.tensor([o is not None for o in d.then[0][1]]).float() if d.then else ((d.gain!=1)|(d.shift!=0)|(d.gamma!=1)).float()
    assert abs(hit.mean()-p)<.04

def test_noise_of_samples_is_unlike():
    "The pool is read from random places: two samples, and two patches in a row, do not share their noise"
    torch.manual_seed(0)
    aug,x = Augment3d([Noise3d(.1, p=1)], spacing),torch.full((4,1,8,32,32), .5)
    a,b = (aug((TensorCT(x), TensorMask3d(x.byte())), split_idx=0)[0].flatten(1)-.5 for _ in range(2))
    c = np.corrcoef(torch.cat([a,b]).numpy())
    assert abs(c-np.eye(8)).max()<.1

def test_off_in_validation_and_on_again():
    aug,x,y = ct_aug_transforms(spacing, p=2),TensorCT(torch.rand(1,9,20,20)),TensorMask3d(torch.ones(1,9,20,20, dtype=torch.uint8))
    run = lambda split: aug((x,y), split_idx=split)[0]
    torch.manual_seed(0)
    first,valid,second = run(0),run(1),run(0)
    assert torch.equal(valid, x) and not torch.equal(first, x) and not torch.equal(second, x) and not torch.equal(first, second)

def test_seed_repeats():
    patch = RandomPatch((6,12,12), aug=ct_aug_transforms(spacing, tilt=10, through=3, cutout=.3, p=2))
    x,y = TensorCT(torch.randint(0, 256, (1,20,40,40), dtype=torch.uint8)),TensorMask3d((torch.rand(1,20,40,40)>.9).byte())
    def run():
        torch.manual_seed(5); random.seed(5)
        return [patch((x,y), split_idx=0) for _ in range(5)]
    assert all(torch.equal(a[0], b[0]) and torch.equal(a[1], b[1]) for a,b in zip(run(), run()))

def test_pickles_small_and_copies():
    aug = ct_aug_transforms(spacing); aug((TensorCT(torch.rand(1,9,20,20)), TensorMask3d(torch.ones(1,9,20,20, dtype=torch.uint8))), split_idx=0)
    for _ in range(20): aug((TensorCT(torch.rand(1,9,20,20)), TensorMask3d(torch.ones(1,9,20,20, dtype=torch.uint8))), split_idx=0)
    assert len(pickle.dumps(aug))<20_000 and isinstance(copy.deepcopy(aug), Augment3d)

def test_small_lesion_survives_on_average():
    "Turned and zoomed, a lesion of 2×3×3 voxels keeps its volume times the change of scale, to 10 % on average, by either way of resampling masks"
    y = TensorMask3d(torch.zeros(1,21,41,41, dtype=torch.uint8)); y[0,10:12,19:22,19:22] = 1
    x = TensorCT(y*255)
    for linear,bound in ((False,.1),(True,.25)):
        torch.manual_seed(0)
        kept = []
        for _ in range(400):
            aug = Augment3d([Rotate3d(15, p=1), Zoom3d(.85, 1.2, p=1), Shear3d(p=1)], (1,1,1), linear_masks=linear)
            d = aug.draw()
            box = aug.apply(x[None].as_subclass(torch.Tensor), y[None].as_subclass(torch.Tensor), d, (21,41,41))
            kept.append(float(box[1].sum())/18*float(torch.det(d.matrix[0,:3,:3])))
        assert abs(np.mean(kept)-1)<bound, (linear, np.mean(kept))

def test_batch_on_a_gpu():
    "Where there is a GPU, a batch there gives what the CPU gives"
    if not torch.cuda.is_available(): pytest.skip('no GPU')
    torch.manual_seed(0)
    aug = Augment3d([Rotate3d(p=1), Zoom3d(p=1), Gamma3d(p=1)], spacing); d = aug.draw(2)
    x,y = torch.rand(2,1,9,32,32),(torch.rand(2,1,9,32,32)>.5).byte()
    a,b = aug.apply(x, y, d, (9,24,24)),aug.apply(x.cuda(), y.cuda(), d, (9,24,24))
    assert torch.allclose(a[0], b[0].cpu(), atol=1e-3) and (a[1]==b[1].cpu()).float().mean()>.99


def test_an_augmentation_in_mm_needs_the_size_of_a_voxel():
    "Rotations, shears, shifts, bending and perspective do not guess; mirror images, zooms and greys do not need it"
    x = torch.rand(1,6,12,12),torch.ones(1,6,12,12, dtype=torch.uint8)
    for t in (Rotate3d(p=1), Shear3d(p=1), Elastic3d(p=1), Shift3d(p=1), Perspective3d(p=1)):
        for use in (lambda a: a(x, split_idx=0), lambda a: a.cut(*x, [0,0,0], (6,8,8)), lambda a: a.room((6,8,8))):
            with pytest.raises(CTError, match='size of a voxel is not known'): use(Augment3d([t]))
            use(Augment3d([t], (4,2,2)))
    for t in (Flip3d(1), Zoom3d(slices=True, p=1), Contrast3d(p=1), Noise3d(p=1)): Augment3d([t])(x, split_idx=0); t(x, split_idx=0)

# By hand, and against other implementations

def read_at(m, *point):
    "Where the voxel at `point` (slice, row, column in mm) is read, for the first matrix of `m`"
    *v,w = (m[0]@torch.tensor([*point,1.])).tolist()
    return [round(o/w, 4)+0 for o in v]

def turn(degrees): return _rotation(torch.deg2rad(torch.tensor([float(degrees)])), 1, 2)
def close(a, b, eps): return bool((torch.as_tensor(a)-torch.as_tensor(b)).abs().max()<=eps)

def test_each_sample_is_hit_on_its_own():
    torch.manual_seed(0)
    none,some,all_ = (float(Aug3d(p).hit(10_000).float().mean()) for p in (0,.3,1))
    assert (none,all_)==(0,1) and abs(some-.3)<.015 and abs(_uniform(10_000, 2, 6).mean()-4)<.05
    with pytest.raises(CTError, match='1.5 is not a probability'): Aug3d(1.5)

def test_points_by_hand():
    "Mirrored, turned by 90°, zoomed, sheared, moved, in perspective: where a point is read"
    assert read_at(Flip3d().matrices(1), 4, 20, 40)==[4,20,-40] and read_at(turn(90), 4, 10, 0)==[4,0,10]
    torch.manual_seed(0); m = Rotate3d(30).matrices(500)
    assert close((m[:,:3,:3]@torch.tensor([0,3.,4])).norm(dim=1), torch.full((500,), 5.), 1e-4) and 29<angle(m).abs().max()<=30
    assert torch.equal(Rotate3d(30).matrices(9)[:,0], torch.eye(4)[0].repeat(9,1))  # without tilt no slice is left
    assert read_at(Zoom3d(2, 2).matrices(1), 8, 20, 40)==[8,10,20] and read_at(Zoom3d(2, 2, slices=True).matrices(1), 8, 20, 40)==[4,10,20]
    assert read_at(SliceGap3d(.5, .5).matrices(1), 8, 20, 40)==[16,20,40]  # half as tall
    assert read_at(torch.eye(4)[None]@Zoom3d(2, 2).matrices(1)@Flip3d().matrices(1), 4, 20, 40)==[4,10,-20]
    torch.manual_seed(0); by = 1/Zoom3d(.5, 2).matrices(4000)[:,1,1]
    assert abs((by>1).float().mean()-.5)<.03 and .5<=by.min()<.51 and 1.98<by.max()<=2
    z,r,c = read_at(Shear3d(45).matrices(1), 0, 10, 0); assert (z,r)==(0,10) and abs(c)<=10
    m = Shift3d((0,10,4)).matrices(2000)[:,:3,3].abs().amax(0); assert m[0]==0 and close(m[1:], [10,4.], .05)
    m = torch.eye(4)[None].clone(); m[0,3,1] = .1/100  # 10 % at 100 mm down
    assert np.allclose(read_at(m, 0, 100, 50), [0,100/1.1,50/1.1], atol=1e-3) and np.allclose(read_at(m, 0, -100, 50), [0,-100/.9,50/.9], atol=1e-3)
    m = Perspective3d(.1).matrices(2000)[:,3]; assert abs(m[:,1:3].abs().max()-.001)<1e-5 and not m[:,0].any()

def test_splines_by_hand_and_by_scipy():
    "On a knot 1/6, 2/3, 1/6; half-way between two 1/48, 23/48, 23/48, 1/48"
    w = spline_weights(9, 5)
    assert close(w[4], torch.tensor([0,1/6,2/3,1/6,0]), 1e-6) and close(w[3], torch.tensor([1,23,23,1,0])/48, 1e-6)
    spline = interpolate.BSpline.basis_element(np.arange(-2,3), extrapolate=False)
    assert close(w[:,2], np.nan_to_num(spline(np.linspace(0, 4, 9)-2)), 1e-6) and close(spline_weights(50, 5).sum(1), torch.ones(50), 1e-5) and (w>=0).all()

def test_how_much_of_a_deformation_arrives():
    "A half of 6 mm on the middle knot; in the corner the knots beyond count too"
    torch.manual_seed(0); d = draw(Elastic3d(6, p=1), n=2000); w = spline_weights(9, 5)
    assert d.field.shape==(2000,3,1,5,5) and not d.field[:,0].any()
    arrives = torch.einsum('nkl,rk,cl->nrc', d.field[:,1,0], w, w).std(0)
    assert abs(arrives[4,4]-3)<.15 and abs(arrives[0,0]-6*((5/6)**2+(1/6)**2))<.2
    with pytest.raises(CTError, match='it was given twice'): Elastic3d(p=1).add(d)

def test_which_slices_stay_slices():
    flat = {k:draw(make()).flat for k,make in space.items()}
    assert [k for k,v in flat.items() if not v]==['tilt','perspective','elastic3d']
    assert draw(Rotate3d(p=0)).still and not draw(Elastic3d(p=1)).still

def test_slices_by_hand():
    "Five slices with the intensities 0 to 4: mirrored; zoomed to twice the size; moved by half a slice; moved out of the scan"
    x = torch.arange(5.).view(1,1,5,1,1)
    def through(scale, mm):
        m = torch.eye(4)[None].clone(); m[0,0,0],m[0,0,3] = scale,mm
        return _slices(x, Draw(1, m), (5,1,1), spacing, torch.tensor([[2.,0,0]])).flatten().tolist()
    assert through(-1, 0)==[4,3,2,1,0] and through(.5, 0)==[1,1.5,2,2.5,3] and through(1, 2)==[.5,1.5,2.5,3.5,2] and through(1, 16)==[4,0,0,0,0]

def test_a_quarter_turn_by_hand():
    "What was the first row is the last column; and 10 mm are 5 rows or 10 columns, where a voxel is 4×2×1 mm"
    got,_ = warp(torch.arange(9.).view(1,1,1,3,3), None, Draw(1, turn(90)), (1,3,3), (1,1,1))
    assert close(got[0,0,0], torch.tensor([[6,3,0],[7,4,1],[8,5,2.]]), 1e-4)
    dots = torch.zeros(1,1,1,21,41); dots[...,15,20] = 1
    at = [np.argwhere(warp(dots, None, Draw(1, turn(90)), (1,21,41), mm)[0][0,0,0].numpy()>.5)[0] for mm in ((4,2,1), (1,1,1))]
    assert at[0][0]==10 and abs(at[0][1]-20)==10 and abs(at[1][1]-20)==5

def test_affine_transform_of_scipy():
    "The same matrix, in voxels, gives the same patch in the plane and in 3D"
    size,x = (9,25,27),torch.from_numpy(blobs())[None,None]
    def by_scipy(x, d, order):
        s = np.diag([*spacing,1]); m = np.linalg.inv(s)@d.matrix[0].double().numpy()@s
        center,half = (np.array(x.shape)-1)/2,(np.array(size)-1)/2
        return ndimage.affine_transform(x, m[:3,:3], center+m[:3,3]-m[:3,:3]@half, size, order=order)
    for tfms in ([Rotate3d(20, p=1), Zoom3d(p=1), Shear3d(p=1)], [Flip3d(1), Zoom3d(slices=True, p=1)], [Rotate3d(20, tilt=15, p=1), Zoom3d(slices=True, p=1), Shift3d((3,3,3), p=1)]):
        torch.manual_seed(0); d = draw(*tfms); got,mask = warp(x, (x>0).byte(), d, size, spacing)
        assert np.allclose(got[0,0], by_scipy(x[0,0].numpy(), d, 1), atol=3e-4)
        assert (mask[0,0].numpy()==by_scipy((x[0,0]>0).numpy().astype(np.uint8), d, 0)).mean()>.998  # a voxel half-way between two may fall to either side

def test_one_resampling_keeps_two_thirds_of_the_noise():
    torch.manual_seed(0); noise = torch.randn(1,1,1,256,256)
    turned = lambda x, degrees: warp(x, None, Draw(1, turn(degrees)), (1,256,256), (1,1,1))[0]
    left = [float(o[...,60:196,60:196].std()) for o in (turned(noise, 30), turned(turned(turned(noise, 10), 10), 10))]
    assert abs(left[0]-2/3)<.02 and left[1]<left[0]-.1

def test_intensities_by_hand():
    "0, 0.2 and 1 with a gain of 1.2 and a shift of −0.1 are 0 (clipped), 0.14 and 1 (clipped); a gamma of 2 makes 0.0196 of 0.14"
    d = Draw(2, torch.eye(4).repeat(2,1,1), gain=torch.tensor([1.,1.2]), shift=torch.tensor([0.,-.1]), gamma=torch.tensor([1.,2.]))
    x = torch.tensor([[0,51,255],[0,51,255]], dtype=torch.uint8)
    assert close(_tone(x, d), torch.tensor([[0,.2,1],[0,.0196,1]]), 1e-6) and close(_tone(x, d), _tone(x.float()/255, d), 1e-6)

def test_each_intensity_against_its_formula():
    torch.manual_seed(0); n = 2000; x = torch.full((n,1), .3)
    def result(*tfms): d = draw(*tfms, n=n); return d,_tone(x, d)[:,0]
    d,y = result(Brightness3d(.1, p=1)); assert close(y, .3+d.shift, 1e-6) and .098<d.shift.abs().max()<=.1
    d,y = result(Contrast3d(.2, p=1)); assert close(y, .5+d.gain*(.3-.5), 1e-6) and .8<=d.gain.min()<.802
    d,y = result(Gamma3d(.5, 2, p=1)); assert close(y, .3**d.gamma, 1e-6) and .5<=d.gamma.min()<.51
    d,y = result(Window3d(.05, p=1)); low,high = -d.shift/d.gain,(1-d.shift)/d.gain
    assert close(y, (.3-low)/(high-low), 1e-5) and low.abs().max()<=.0501 and (high-1).abs().max()<=.0501
    b = draw(Brightness3d(.1, p=1), n=n); shift = b.shift; Contrast3d(.2, p=1).add(b)
    assert close(_tone(torch.full((n,1), .5), b)[:,0], .5+b.gain*shift, 1e-6)

def test_a_change_of_your_own():
    class Negative3d(Then3d):
        def change(self, x, by): return 1-x
    class Prone3d(Spatial3d):
        def matrices(self, n): return _rotation(torch.full((n,), math.pi), 1, 2)
    torch.manual_seed(0); d = draw(Negative3d(.5), n=6); (change,strengths), = d.then
    x = torch.full((6,1,1,1,1), .25); change.apply(x, strengths)
    assert x.flatten().tolist()==[.25 if s is None else .75 for s in strengths] and {*x.flatten().tolist()}=={.25,.75}
    a,b = TensorCT(torch.rand(1,8,32,32)),TensorMask3d((torch.rand(1,8,32,32)>.9).byte())
    x,y = Augment3d([Prone3d(1)])((a,b), split_idx=0)
    assert close(x.as_subclass(torch.Tensor), a.as_subclass(torch.Tensor).flip(2,3), 1e-4) and torch.equal(y.as_subclass(torch.Tensor), b.as_subclass(torch.Tensor).flip(2,3))

def test_noise_and_streaks():
    torch.manual_seed(0); a,b = (_noise(torch.zeros(1,8,64,64)) for _ in range(2))
    assert abs(a.mean())<.02 and abs(a.std()-1)<.02 and abs(np.corrcoef(a.flatten(), b.flatten())[0,1])<.02
    even = torch.full((1,16,64,64), .5); n,s = Noise3d().change(even, .03)-.5,(Streaks3d().change(even, .03)-.5)[0]
    assert abs(n.mean())<.001 and abs(n.std()-.03)<.001 and abs(s.std()-.03*(2/3)**.5)<.002
    assert (s[...,1:]-s[...,:-1]).abs().mean()<(s[:,1:]-s[:,:-1]).abs().mean()/5

def test_kernels_by_hand_and_by_scipy():
    assert close(_weighted(torch.tensor([0,0,3.,0,6]).view(1,5,1,1), [1/3]*3, 1).flatten(), torch.tensor([0,1,1,3,4.]), 1e-5)
    dot,even = torch.zeros(1,9,21,21),torch.full((1,16,64,64), .5); dot[0,4,10,10] = 1
    soft = _smooth(dot, 1.)
    assert close(soft, ndimage.gaussian_filter(dot.numpy(), (0,0,1,1), mode='nearest', radius=3), 1e-6) and abs(soft.sum()-1)<1e-5 and not soft[0,3].any()
    assert close(Sharpen3d().change(even, .8), even, 1e-6)  # without detail there is nothing to sharpen
    assert abs(Sharpen3d().change(dot, .5)[0,4,10,10]-(1+.5*(1-soft[0,4,10,10])))<1e-6 and torch.equal(Blur3d().change(dot, 1.), soft)
    for by,want in {1:[0,0,1,0,0], 2:[0,.25,.5,.25,0], 3:[0,1/3,1/3,1/3,0], 4:[.125,.25,.25,.25,.125], 5:[.2]*5}.items():
        assert close(ThickSlices3d().change(dot, by)[0,2:7,10,10], torch.tensor(want), 1e-6)
    assert (CutOut3d().change(even, .25)==0).sum()==4*16*16  # a quarter of 16, of 64 and of 64

def test_equalized_by_hand():
    x = torch.rand(2,32,32); rank = x.flatten(1).argsort(1).argsort(1).view_as(x)/1023
    assert close(equalize(x, 1, 1e9, 1024), rank, .02)  # of a single tile, without a limit
    assert close(equalize(x, 4, 1e-6, 64), x, .03)      # clipped to nothing: as it was
    assert equalize(torch.full((1,40,30), .5), 8, 2.).unique().numel()==1

def test_the_size_of_a_voxel_where_it_matters():
    turning,easy = Augment3d([Rotate3d(p=1)]),Augment3d([Flip3d(1), Zoom3d(slices=True, p=1), Noise3d(p=1)])
    with pytest.raises(CTError, match='the size of a voxel is not known'): turning.mm(turning.draw())
    assert Augment3d(turning.tfms, (4,2.8,2.8)).mm(turning.draw())==(4,2.8,2.8) and easy.mm(easy.draw())==(1,1,1)

def test_samples_of_a_batch_are_sampled_apart():
    "And a batch gives for each sample what that sample alone would have given"
    torch.manual_seed(0); d = Augment3d([Flip3d(), Rotate3d(p=1), Contrast3d(p=1), Gamma3d()], (4,2,2)).draw(4)
    assert len(angle(d.matrix).abs().unique())==len(d.gain.unique())==4
    aug = Augment3d([Flip3d(1), Rotate3d(p=1), Zoom3d(p=1), Shear3d(p=1), Elastic3d(p=1), Contrast3d(p=1), Gamma3d(p=1), Blur3d(p=.5)], (4,2,2))
    x,y = torch.rand(2,1,9,32,32),(torch.rand(2,1,9,32,32)>.8).byte(); d = aug.draw(2); both = aug.apply(x, y, d, (9,32,32))
    for i in (0,1):
        one = Draw(1, *(o[i:i+1] for o in (d.matrix, d.field, d.gain, d.shift, d.gamma)), tuple((t,s[i:i+1]) for t,s in d.then))
        for a,b in zip(both, aug.apply(x[i:i+1], y[i:i+1], one, (9,32,32))): assert close(a[i].float(), b[0].float(), 1e-5)

def test_right_and_left_change_places_in_a_mirror_image():
    both = torch.zeros(1,2,4,4,8, dtype=torch.uint8); both[:,0,...,:4] = 1; both[:,1,...,4:] = 1
    assert torch.equal(Augment3d([Flip3d(1)], (1,1,1), mirrored=(1,0))((torch.rand(1,1,4,4,8),both), split_idx=0)[1], both)

def test_everything_is_resampled_once():
    "Five changes of space and two of intensity: `grid_sample` runs once for the CT and once for the mask; for intensities alone it does not run"
    x,y = torch.rand(2,1,9,32,32),(torch.rand(2,1,9,32,32)>.8).byte()
    def resamplings(*tfms):
        with spy_on('torch.nn.functional.grid_sample', wraps=torch.nn.functional.grid_sample) as spy: Augment3d(tfms, (4,2,2))((x,y), split_idx=0)
        return spy.call_count
    assert resamplings(Flip3d(1), Rotate3d(p=1), Zoom3d(p=1), Shear3d(p=1), Elastic3d(p=1), Contrast3d(p=1), Noise3d(p=1))==2 and resamplings(Contrast3d(p=1), Noise3d(p=1))==0

def test_what_is_cut_by_hand():
    "A quarter turn of 5×21×11 reads 5×11×21; a lesion of one voxel in the corner of a patch is there after any turn and zoom; where nothing changes it is a crop"
    low,high = Augment3d([]).reach(Draw(1, turn(90)), torch.tensor([2.,10,5])); assert close(high-low+1, torch.tensor([5.,11,21]), 1e-4)
    scan,voxel,start = TensorCT(torch.rand(1,20,60,60)),(7,22,48),[6,20,30]
    lesion = TensorMask3d(torch.zeros(1,20,60,60, dtype=torch.uint8)); lesion[(0,*voxel)] = 1
    aug = Augment3d([Rotate3d(180, tilt=20, p=1), Zoom3d(p=1), Shear3d(p=1)], (4,2,2)); torch.manual_seed(0)
    for _ in range(20): assert aug.cut(scan, lesion, start, (8,20,20), voxel)[1][0,1,2,18]==1  # voxel - start
    for a,want in zip(Augment3d([Rotate3d(p=0)]).cut(scan, lesion, start, (8,20,20), voxel), (scan,lesion)): assert torch.equal(a.as_subclass(torch.Tensor), want[:,6:14,20:40,30:50].as_subclass(torch.Tensor))

def test_room_by_hand():
    "To shrink to a half 21 voxels read 41; at 45° the corner lies 10·√2 = 14.1 voxels out; a mirror image needs nothing, and the random numbers of others stay as they are"
    needs = [Augment3d([Flip3d(1)]), Augment3d([Zoom3d(.5, .5, p=1)]), Augment3d([Rotate3d(45, p=1)], (4,2,2))]
    assert [a.room((5,21,21)) for a in needs]==[(5,21,21),(5,41,41),(5,29,29)]
    torch.manual_seed(1); a = torch.rand(1); torch.manual_seed(1); needs[2].room((5,21,21)); assert torch.equal(torch.rand(1), a)

def test_the_sets():
    torch.manual_seed(0); aug,light = ct_aug_transforms(),light_aug_transforms()
    assert all(aug.draw(8).flat for _ in range(20)) and not ct_aug_transforms(tilt=10, p=2).draw(8).flat and ct_aug_transforms(p=0, flip=0).draw(8).still
    assert all(light.draw().flat for _ in range(20)) and {tuple(light.draw().matrix[0].diag().tolist()) for _ in range(50)}=={(1,1,1,1),(1,1,-1,1)}
    names = [type(t).__name__ for t in grey_aug_transforms().tfms]
    assert [n for n in names if n not in [type(t).__name__ for t in aug.tfms]]==['SliceGap3d','GreyLevels3d'] and names.index('GreyLevels3d')<names.index('Noise3d')
    assert [(type(t).__name__, t.p) for t in ct_aug_transforms(cutout=.3).tfms]==[('Flip3d',.5),('Rotate3d',.5),('Zoom3d',.5),('Shear3d',.3),('Elastic3d',.3),('Brightness3d',.5),('Contrast3d',.5),('Gamma3d',.3),
        ('Noise3d',.3),('Streaks3d',.1),('Blur3d',.1),('Sharpen3d',.1),('ThickSlices3d',.1),('CutOut3d',.2)]

def test_as_a_fastai_transform():
    "On in training, off in validation; types stay, batches are taken, and it is small when it is sent to a process"
    pair = TensorCT(torch.rand(1,8,32,32)),TensorMask3d((torch.rand(1,8,32,32)>.9).byte()); strong = ct_aug_transforms((4,2.8,2.8), p=2)
    got = strong(pair, split_idx=0)
    assert [type(o) for o in got]==[TensorCT,TensorMask3d] and not torch.equal(got[0], pair[0]) and 0<=got[0].min()<got[0].max()<=1
    for a,b in zip(strong(pair, split_idx=1), pair): assert torch.equal(a, b)
    assert strong(tuple(type(o)(torch.stack([o]*3)) for o in pair), split_idx=0)[1].shape==(3,1,8,32,32)
