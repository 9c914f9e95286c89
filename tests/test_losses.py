"Losses: MONAI's as the oracle, Lovász by its definition, gradients by finite differences, any logit, any precision"
import copy
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st
from monai import losses as monai
from covid3d.losses import CalibratedLoss, DiceCELoss, DiceFocalLoss, LovaszHingeLoss, SampleLoss, TverskyLoss, soft_dice
from covid3d.volume import CTError

makers = dict(dice_ce=DiceCELoss, calibrated=CalibratedLoss, dice_focal=DiceFocalLoss, focal_below_1=lambda **k: DiceFocalLoss(gamma=.5, alpha=.8, **k), tversky=TverskyLoss, focal_tversky=lambda **k: TverskyLoss(gamma=4/3, **k),
    lovasz=LovaszHingeLoss, lovasz_ce=lambda **k: LovaszHingeLoss(ce=1, **k))
each = pytest.mark.parametrize('make', makers.values(), ids=list(makers))

def sample(seed=0, shape=(3,2,3,6,5), share=.2):
    g = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=g)*2,(torch.rand(shape, generator=g)<share).float()

@settings(max_examples=25)
@given(st.integers(0,10**6), st.floats(0,1), st.floats(.5,5), st.floats(.05,.95), st.floats(.1,10))
def test_monai_gives_the_same(seed, share, gamma, alpha, smooth):
    x,y = sample(seed, share=share); kw = dict(sigmoid=True, smooth_nr=smooth, smooth_dr=smooth)
    torch.testing.assert_close(DiceCELoss(smooth=smooth)(x[:,:1],y[:,:1]), monai.DiceCELoss(**kw)(x[:,:1],y[:,:1]), rtol=1e-5, atol=1e-6)  # of more channels MONAI takes a softmax
    for ours,theirs in ((DiceFocalLoss(2,3,gamma,alpha,smooth), monai.DiceFocalLoss(**kw, lambda_dice=2, lambda_focal=3, gamma=gamma, alpha=alpha)),
        (DiceFocalLoss(0,1,gamma), monai.FocalLoss(gamma=gamma)), (TverskyLoss(alpha,1-alpha,smooth=smooth), monai.TverskyLoss(**kw, alpha=alpha, beta=1-alpha)), (DiceCELoss(ce=0,smooth=smooth), monai.DiceLoss(**kw))):
        torch.testing.assert_close(ours(x,y), theirs(x,y), rtol=1e-5, atol=1e-6)

def test_focal_tversky_is_the_root_of_tversky():
    x,y = sample(); one = TverskyLoss(reduction='none')
    torch.testing.assert_close(TverskyLoss(gamma=2)(x[:,:1],y[:,:1]), one(x[:,:1],y[:,:1]).sqrt().mean())

def lovasz_by_definition(x, y):
    "The extension of the Jaccard loss, each step from sets counted anew"
    m = np.maximum(0, 1-x*(2*y-1)); order = np.argsort(-m, kind='stable'); truth = set(np.flatnonzero(y))
    def delta(wrong): guess = truth^set(wrong); return 1-len(truth&guess)/len(truth|guess) if truth|guess else 0.
    return sum(m[i]*(delta(order[:k+1])-delta(order[:k])) for k,i in enumerate(order))

@settings(max_examples=40)
@given(st.integers(0,10**6), st.floats(0,1))
def test_lovasz_by_its_definition(seed, share):
    x,y = sample(seed, (2,2,1,3,7), share)
    want = [np.mean([lovasz_by_definition(x[b,c].flatten().double().numpy(), y[b,c].flatten().numpy().astype(int)) for c in range(2)]) for b in range(2)]
    np.testing.assert_allclose(LovaszHingeLoss(reduction='none')(x,y), want, rtol=1e-4, atol=1e-5)

@each
def test_a_sample_does_not_depend_on_its_neighbours(make):
    x,y = sample(); none = make(reduction='none')(x,y)
    assert none.shape==(3,)
    torch.testing.assert_close(none, torch.stack([make()(x[i:i+1],y[i:i+1]) for i in range(3)])); torch.testing.assert_close(none.mean(), make()(x,y)); torch.testing.assert_close(none, make()(x,y,reduction='none'))

@each
def test_gradient_by_finite_differences(make):
    x,y = sample(1, (1,1,2,3,4)); x.requires_grad_(); f = make(); f(x,y).backward(); eps = 1e-2
    num = torch.stack([(f(x.detach()+d,y)-f(x.detach()-d,y))/(2*eps) for d in (torch.eye(24)*eps).view(24,*x.shape)]).view(x.shape)
    assert x.grad.abs().max()>1e-3
    torch.testing.assert_close(x.grad, num, rtol=2e-2, atol=1e-3)

@each
def test_right_is_best_and_wrong_is_worst(make):
    x,y = sample(); f = make(); right,wrong = f(20*(2*y-1),y),f(-20*(2*y-1),y)
    assert 0<=right<1e-2 and right<f(x,y)<wrong and f(torch.full_like(y,-20),y*0)<1e-2

@each
@pytest.mark.parametrize('dtype', (torch.float32,torch.float16,torch.bfloat16))
@pytest.mark.parametrize('big', (0.,20.,6e4,float(torch.finfo(torch.float16).max)))
def test_finite_at_any_logit(make, dtype, big):
    for share in (0,.3,1):
        _,y = sample(2, share=share)
        for sign in (2*y-1, 1-2*y, torch.ones_like(y), -torch.ones_like(y)):
            x = (big*sign).clamp(-6.5e4,6.5e4).to(dtype).requires_grad_(); l = make()(x,y); l.backward()
            assert l.dtype==torch.float32 and torch.isfinite(l) and torch.isfinite(x.grad).all()

@each
def test_float32_whatever_the_precision_around(make):
    _,y = sample(3, (1,1,32,64,64)); x = torch.full_like(y, 3.)
    want = make()(x,y)
    for dtype in (torch.float16,torch.bfloat16):
        torch.testing.assert_close(make()(x.to(dtype),y.to(dtype)), want, rtol=1e-5, atol=1e-6)
    with torch.autocast('cpu', dtype=torch.bfloat16): torch.testing.assert_close(make()(x,y), want, rtol=1e-5, atol=1e-6)

@each
def test_a_misfit_is_named(make):
    x,y = sample()
    with pytest.raises(CTError, match='one channel for each class'): make()(x,y[:,:1])
    f = copy.deepcopy(make()); assert isinstance(f,SampleLoss) and f.decodes(f.activation(x)).dtype==torch.uint8 and ((x>=0)==(f.decodes(f.activation(x))==1)).all()

@each
def test_descent_finds_the_lesion(make):
    "300 steps on free logits end at the reference"
    _,y = sample(4, (1,1,4,8,8), .05); x = torch.zeros_like(y, requires_grad=True); opt,f = torch.optim.Adam([x], .1),make()
    for _ in range(300): opt.zero_grad(); f(x,y).backward(); opt.step()
    assert ((x>0)==(y>0)).all()

# By hand: two voxels with the logits 0 and ln 3, so probabilities of 1/2 and 3/4, of which the second is lesion
logits,mask = torch.tensor([0.,np.log(3)], dtype=torch.float32).reshape(1,1,1,1,2),torch.tensor([0,1]).reshape(1,1,1,1,2)
dice_by_hand,ce_by_hand = 1-2.5/3.25,(np.log(2)+np.log(4/3))/2

def test_soft_dice_by_hand():
    p,m = torch.tensor([.5,.5,0,1]).reshape(1,1,1,2,2),torch.tensor([1,0,0,1]).reshape(1,1,1,2,2)
    assert [soft_dice(*o).item() for o in ((p,m,0), (p,m), (p,m*0), (p*0,m*0))]==pytest.approx([3/4,4/5,1/3,1])

def test_losses_by_hand():
    for loss,want in ((DiceCELoss(), dice_by_hand+ce_by_hand), (DiceCELoss(dice=0), ce_by_hand), (DiceCELoss(ce=0, dice=2), 2*dice_by_hand),
        (DiceFocalLoss(), dice_by_hand+(np.log(2)/4+np.log(4/3)/16)/2), (DiceFocalLoss(dice=0, alpha=.25), (.75*np.log(2)/4+.25*np.log(4/3)/16)/2),
        (TverskyLoss(), 1-1.75/(.75+.3*.5+.7*.25+1)), (TverskyLoss(gamma=4/3), (1-1.75/(.75+.3*.5+.7*.25+1))**.75)):
        assert loss(logits, mask).item()==pytest.approx(want, abs=1e-5)
    assert DiceCELoss().decodes(DiceCELoss().activation(logits)).flatten().tolist()==[1,1]

def test_losses_that_are_others():
    "Focal loss of γ 0 is cross-entropy, Tversky of two halves is Dice, the calibrated loss is Dice and cross-entropy"
    x,y = sample()
    for a,b in ((DiceFocalLoss(dice=0, gamma=0), DiceCELoss(dice=0)), (TverskyLoss(.5, .5, smooth=.5), DiceCELoss(ce=0)), (CalibratedLoss(), DiceCELoss(1, 50, 1000))):
        torch.testing.assert_close(a(x,y), b(x,y), rtol=1e-5, atol=1e-5)

def test_a_gradient_where_nothing_is_found():
    "Also a finite loss of a patch whose sum would overflow in half precision"
    y = (torch.rand(1,1,4,8,8)>.9).float(); z = torch.full((1,1,4,8,8), -20., requires_grad=True); DiceCELoss()(z,y).backward()
    assert z.grad.abs().max()>1e-4 and torch.isfinite(DiceCELoss()(torch.full((1,1,32,64,64), 5.).half(), torch.ones(1,1,32,64,64)))

def test_lovasz_is_convex_between_random_logits():
    torch.manual_seed(0)
    lov,(u,v),w = LovaszHingeLoss(reduction='none'),torch.randn(2,50,1,2,3,4),(torch.rand(50,1,2,3,4)>.7).float()
    assert (lov((u+v)/2,w)<=(lov(u,w)+lov(v,w))/2+1e-6).all()

@pytest.mark.parametrize('wrong', (lambda e: e.mean(), lambda e: e.flatten(2).mean(2), lambda e: e.flatten(2).mean(2)[:,:1], lambda e: e.flatten(1).mean(1)[:1], lambda e: 0.), ids=('scalar','class','column','short','number'))
def test_one_value_for_each_sample(wrong):
    "A loss of one's own of another shape is refused in either reduction; its name is in the message"
    class Own(SampleLoss):
        def per_sample(self, logits, mask): return wrong((logits.sigmoid()-mask).abs())
    for x,y in (sample(),sample(shape=(2,1,3,6,5))):
        for reduction in ('mean','none'):
            with pytest.raises(CTError, match=r'Own\.per_sample: shape .*, expected .*one value for each sample'): Own()(x, y, reduction)

def test_lovasz_is_the_jaccard_loss():
    "By each error of 0 or 1 over six voxels; by logits of ±1, where a wrong voxel has an error of 2, it is twice the Jaccard loss"
    m = torch.tensor([1.,1,0,1,0,0]); there = {0,1,3}
    for n in range(64):
        wrong = torch.tensor([float(n>>i&1) for i in range(6)]); found = there^{i for i in range(6) if wrong[i]}
        jaccard = 1-len(there&found)/len(there|found)
        for z,times in ((1-wrong, 1), (1-2*wrong, 2)):
            assert LovaszHingeLoss()(((2*m-1)*z).view(1,1,1,1,6), m.view(1,1,1,1,6)).item()==pytest.approx(times*jaccard, abs=1e-5)

def test_price_of_a_false_alarm_and_of_a_miss():
    "60 voxels, in a patch without another lesion or beside one of 1,000: the calibrated loss gives them about the same weight"
    lesions = lambda *sizes: (torch.arange(147456)<sum(sizes)).float().view(1,1,16,96,96); sure = lambda m: 14*(2*m-1)
    def price(loss): return [float(loss(sure(found), there)-loss(sure(there), there)) for found,there in ((lesions(60),lesions()),(lesions(1000),lesions(1060)))]
    alarm,miss = price(DiceFocalLoss()); assert 24<alarm/miss<26
    alarm,miss = price(CalibratedLoss()); assert miss<alarm<1.2*miss
