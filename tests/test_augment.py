"Augmentation: CT and mask stay together, draws are spread as they say, and SciPy bends a patch alike"
import copy, math, pickle, random

import numpy as np, pytest, torch
from scipy import ndimage, stats

from covid3d.augment import (Augment3d, Blur3d, Brightness3d, Contrast3d, CutOut3d, Draw, Elastic3d, Flip3d, Gamma3d, Noise3d, Perspective3d, Rotate3d, Sharpen3d, Shear3d, Shift3d,
    Streaks3d, ThickSlices3d, Window3d, Zoom3d, ct_aug_transforms, spline_weights, warp)
from covid3d.transforms import RandomPatch, TensorCT, TensorMask3d
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
