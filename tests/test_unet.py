"DynamicUnet3d at any size, for every encoder"
import math, pickle, pytest, torch
from copy import deepcopy
from functools import cache
from hypothesis import given, settings, strategies as st
from torch import nn
from covid3d.encoder import encoder3d, group_norm
from covid3d.unet import (Attention3d, DynamicUnet3d, _check_classes, _DecoderLevel, _Head, _init_he, _level_widths, _logit_conv, _pieces, _Pointwise3d, _resize, _shuffle3d, _size_levels, _Stage, _Upsample,
    checkpointed, keep_bn_stats, param_groups, stage_sizes)
from covid3d.volume import CTError

names = ('r3d_18', 'mc3_18', 'r2plus1d_18')
archs = pytest.mark.parametrize('arch', names)

def unet(arch='r3d_18', classes=('lesion',), seed=0, **kwargs):
    torch.manual_seed(seed)
    return DynamicUnet3d(encoder3d(arch, pretrained=False, width=8), list(classes), **kwargs)

settled = cache(lambda arch, stem_skip, input_skip: unet(arch, stem_skip=stem_skip, input_skip=input_skip).eval())


@settings(max_examples=40, deadline=None)
@given(arch=st.sampled_from(names), stem_skip=st.booleans(), input_skip=st.booleans(), size=st.tuples(*[st.integers(1, 40)] * 3), batch=st.integers(1, 2))
def test_output_has_the_size_of_the_input(arch, stem_skip, input_skip, size, batch):
    with torch.no_grad(): logits = settled(arch, stem_skip, input_skip)(torch.rand(batch, 1, *size))
    assert logits.shape == (batch, 1, *size)
    assert logits.isfinite().all()

@archs
@pytest.mark.parametrize('size', [(16, 16, 16), (17, 33, 29), (31, 16, 47)])
def test_trains_on_a_batch_of_one(arch, size):
    net = unet(arch, input_skip=True).train()
    out = net(torch.rand(1, 1, *size))
    out.square().mean().backward()
    assert out.shape == (1, 1, *size) and out.isfinite().all()
    assert all(p.grad.isfinite().all() for p in net.parameters())

@settings(max_examples=30, deadline=None)
@given(arch=st.sampled_from(names), size=st.tuples(*[st.integers(16, 50)] * 3))
def test_probed_sizes_are_the_computed_ones(arch, size):
    x, body = torch.rand(1, 1, *size), settled(arch, True, False).encoder
    with torch.no_grad(): computed = [_Stage(name, (x := stage(x)).shape[1], tuple(x.shape[2:])) for name, stage in body.named_children()]
    assert stage_sizes(body, size) == computed

@archs
def test_the_size_probed_with_does_not_matter(arch):
    x, made = torch.rand(1, 1, 19, 30, 41), []
    for size in ((16, 16, 16), (64, 64, 64), (33, 100, 47)):
        net = unet(arch, size=size).eval()
        with torch.no_grad(): made.append(net(x))
    assert torch.equal(made[0], made[1]) and torch.equal(made[0], made[2])

@archs
def test_levels_and_skips(arch):
    assert [m.weight.shape[1] for m in unet(arch).decoder['layer1'].laterals] == [8, 8]
    assert [m.weight.shape[1] for m in unet(arch, stem_skip=False).decoder['layer1'].laterals] == [8]
    assert list(unet(arch).decoder) == ['layer3', 'layer2', 'layer1']
    assert unet(arch).skips == [['layer3'], ['layer2'], ['stem', 'layer1']]

def test_mc3_never_halves_the_slices():
    assert {stage.size[0] for stage in stage_sizes(unet('mc3_18').encoder, (21, 64, 64))} == {21}
    assert [stage.size[0] for stage in stage_sizes(unet('r3d_18').encoder, (21, 64, 64))] == [21, 21, 11, 6, 3]

@pytest.mark.parametrize('axis', range(3))
def test_a_change_along_any_one_axis_counts(axis):
    "Encoders that halve one axis only, and twice"
    stride = tuple(2 if i == axis else 1 for i in range(3))
    body = nn.Sequential()
    for name, ni, nf, s in (('a', 1, 4, 1), ('b', 4, 8, stride), ('c', 8, 8, 1), ('d', 8, 12, stride)):
        body.add_module(name, nn.Conv3d(ni, nf, 3, s, padding=1))
    assert [[s.name for s in level] for level in _size_levels(stage_sizes(body))] == [['a'], ['b', 'c'], ['d']]
    for size in ((16, 17, 18), (5, 6, 7)): assert DynamicUnet3d(body, ['x', 'y'])(torch.rand(1, 1, *size)).shape == (1, 2, *size)

@archs
def test_shifted_input_shifts_the_logits(arch):
    "16 voxels along an axis that is halved four times move the output by as much, beyond the border's reach: skips and features meet in place"
    net, x = deepcopy(settled(arch, True, False)), torch.zeros(1, 1, 16, 16, 400)
    x[..., 180:200] = torch.rand(16, 16, 20)
    for m in net.modules():
        if isinstance(m, nn.GroupNorm): m.forward = lambda x: x # its statistics see the border
    with torch.no_grad(): a, b = net(x).roll(16, -1)[..., 184:216], net(x.roll(16, -1))[..., 184:216]
    assert (a - b).abs().max() < 1e-4 * a.std()


def test_probing_leaves_the_encoder_alone():
    body = encoder3d('r3d_18', pretrained=False, width=8).train()
    before, state = deepcopy(body.state_dict()), torch.get_rng_state()
    stage_sizes(body, (17, 32, 33))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(v, before[k]) for k, v in body.state_dict().items())
    assert body.training and {p.device.type for p in body.parameters()} == {'cpu'}
    net = DynamicUnet3d(body, ['lesion'])
    assert net.encoder is body and all(torch.equal(v, before[k]) for k, v in body.state_dict().items())


@archs
@pytest.mark.parametrize('input_skip', [False, True])
def test_samples_do_not_see_each_other(arch, input_skip):
    "With the encoder's BatchNorm frozen: a batch of two equals each alone, training equals evaluation"
    net, x = unet(arch, input_skip=input_skip).train(), torch.rand(2, 1, 17, 32, 29)
    net.encoder.eval()
    with torch.no_grad(): both, alone, evaluated = net(x), torch.cat([net(o[None]) for o in x]), net.eval()(x)
    assert torch.allclose(both, alone, atol=1e-5)
    assert torch.allclose(both, evaluated, atol=1e-5)

@archs
def test_decoder_and_head_hold_no_batch_statistics(arch):
    net = unet(arch, input_skip=True)
    outside = [m for k, m in net.named_modules() if not k.startswith('encoder')]
    assert not any(isinstance(m, nn.modules.batchnorm._BatchNorm) for m in outside)
    assert not any(True for k, _ in net.named_buffers() if not k.startswith('encoder'))

@archs
@pytest.mark.parametrize('kwargs', [{}, dict(stem_skip=False), dict(input_skip=True)], ids=str)
def test_gradient_reaches_every_parameter(arch, kwargs):
    net = unet(arch, ('lesion', 'lung'), **kwargs).train()
    net(torch.rand(1, 1, 16, 32, 32)).square().mean().backward()
    assert [k for k, p in net.named_parameters() if p.grad is None or not p.grad.abs().max() > 0] == []

def test_it_learns_one_patch():
    "A bright ball is found within a few steps, each of them a batch of one"
    net, grid = unet().train(), torch.stack(torch.meshgrid(*[torch.arange(16.)] * 3, indexing='ij'))
    ball = ((grid - 7.5).square().sum(0).sqrt() < 5).float()[None, None]
    x, opt = .2 + .6 * ball + .05 * torch.rand(1, 1, 16, 16, 16), torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(40):
        loss = nn.functional.binary_cross_entropy_with_logits(net(x), ball)
        opt.zero_grad()
        loss.backward()
        opt.step()
    found = (net(x) > 0).float()
    assert 2 * (found * ball).sum() / (found.sum() + ball.sum()) > .8


@pytest.mark.parametrize('classes', [['lesion'], ['lesion', 'lung'], ('left lung', 'right lung', 'lesion')])
def test_a_channel_for_each_class(classes):
    net = unet(classes=classes).eval()
    assert net.classes == list(classes)
    with torch.no_grad(): assert net(torch.rand(1, 1, 8, 16, 16)).shape == (1, len(classes), 8, 16, 16)

@pytest.mark.parametrize('classes', ['lesion', [], ['a', 'a'], [1, 2], 2, None])
def test_classes_are_names(classes):
    with pytest.raises((CTError, TypeError)): DynamicUnet3d(encoder3d('r3d_18', False, 8), classes)

@pytest.mark.parametrize('prior', [.01, .05, .5])
def test_the_first_logits_are_around_that_of_the_prior(prior):
    net, want = unet(prior=prior).eval(), math.log(prior / (1 - prior))
    with torch.no_grad(): logits = net(torch.rand(1, 1, 16, 32, 32))
    assert abs(net.head.logits.bias.item() - want) < 1e-6
    assert abs(logits.mean() - want) < 1.5 and .1 < logits.std() < 1.5

def test_logits_are_not_normalised():
    "Doubling the head's weights doubles what they add to the bias; a normalisation would undo it"
    net, x = unet().eval(), torch.rand(1, 1, 16, 32, 32)
    with torch.no_grad():
        first = net(x) - net.head.logits.bias
        net.head.logits.weight *= 2
        assert torch.allclose(net(x) - net.head.logits.bias, 2 * first, atol=1e-5)

@pytest.mark.parametrize('shape', [(16, 16, 16), (1, 16, 16, 16), (1, 3, 16, 16, 16), (1, 1, 0, 16, 16), (0, 1, 16, 16, 16)])
def test_unreadable_input(shape):
    with pytest.raises(CTError, match='input: has shape') as e: settled('r3d_18', True, False)(torch.zeros(shape))
    assert str(shape) in str(e.value) and '\n' not in str(e.value)


@archs
@pytest.mark.parametrize('kwargs', [{}, dict(input_skip=True)], ids=str)
def test_every_parameter_in_one_group(arch, kwargs):
    net = unet(arch, **kwargs)
    groups = param_groups(net)
    ids = [id(p) for group in groups for p in group]
    assert len(groups) == 6 and all(groups)
    assert len(ids) == len(set(ids)) and set(ids) == {id(p) for p in net.parameters()}
    for group, name in zip(groups, ('stem', 'layer1', 'layer2', 'layer3', 'layer4')):
        assert {id(p) for p in group} == {id(p) for p in net.encoder.get_submodule(name).parameters()}

def test_decoder_widths():
    assert [level.join[0].out_channels for level in unet().decoder.values()] == [16, 8, 4]
    assert [level.join[0].out_channels for level in unet(decoder=12).decoder.values()] == [48, 24, 12]
    assert [level.join[0].out_channels for level in unet(decoder=(7, 9, 11)).decoder.values()] == [7, 9, 11]
    for wrong in ((8, 8), (8, 8, 8, 8), 0, (8, 8, 0), (8, 8, 1.5)):
        with pytest.raises(CTError, match='Give 3 numbers'): unet(decoder=wrong)

@given(st.integers(1, 300))
def test_group_norm_divides(n):
    norm = group_norm(n)
    assert n % norm.num_groups == 0 and norm.num_groups <= 8
    assert norm.num_groups == 1 or n // norm.num_groups >= 4

@settings(max_examples=30, deadline=None)
@given(*[st.integers(1, 9)] * 6)
def test_resize_keeps_linear_ramps_and_constants(a, b, c, d, e, f):
    x = torch.full((1, 2, a, b, c), 3.)
    assert _resize(x, (d, e, f)).shape == (1, 2, d, e, f)
    assert torch.allclose(_resize(x, (d, e, f)), torch.tensor(3.))

def test_copies_agree():
    net, x = unet(input_skip=True).eval(), torch.rand(1, 1, 9, 17, 18)
    with torch.no_grad():
        want = net(x)
        for same in (deepcopy(net), pickle.loads(pickle.dumps(net)), net.to(memory_format=torch.channels_last_3d)):
            assert torch.allclose(same(x), want, atol=1e-5)
        other = unet(input_skip=True, seed=1).eval()
        other.load_state_dict(net.state_dict())
        assert torch.allclose(other(x), want, atol=1e-5)

def test_a_traced_network_reads_other_sizes():
    net, x = unet().eval(), torch.rand(1, 1, 9, 35, 30)
    with torch.no_grad(): assert torch.allclose(torch.jit.trace(net, torch.rand(1, 1, 16, 32, 32), check_trace=False)(x), net(x), atol=1e-5)

# Recomputing instead of keeping

@archs
@pytest.mark.parametrize('norm', ['batch', 'frozen', 'group', 'instance'])
@pytest.mark.parametrize('kwargs', [{}, dict(input_skip=True, decoder_norm='batch'), dict(up='shuffle', attention=True)], ids=str)
def test_recompute_changes_no_bit(arch, norm, kwargs):
    "Logits, gradients, BatchNorm statistics and their count, names, random state"
    torch.manual_seed(0)
    net = DynamicUnet3d(encoder3d(arch, False, 8, norm), **kwargs).train()
    twin, x, ends = deepcopy(net), torch.rand(2, 1, 17, 24, 31), []
    twin.recompute = True
    for o in (net, twin):
        torch.manual_seed(1)
        for _ in range(2): o(x).square().mean().backward()
        ends.append(torch.get_rng_state())
    assert torch.equal(*ends)
    assert list(net.state_dict()) == list(twin.state_dict())
    assert all(torch.equal(v, w) for v, w in zip(net.state_dict().values(), twin.state_dict().values()))
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(net.parameters(), twin.parameters()))
    assert {int(b) for k, b in twin.named_buffers() if k.endswith('num_batches_tracked')} <= {0 if norm == 'frozen' else 2, 2}

def test_recompute_with_dropout():
    "The same voxels are dropped the second time, and the random numbers that follow are the same"
    net = unet()
    net.encoder.layer2.append(nn.Sequential(nn.Dropout(.5)))
    net.encoder.layer2 = nn.Sequential(*net.encoder.layer2)
    twin, x, seen = deepcopy(net), torch.rand(1, 1, 16, 24, 24), []
    twin.recompute = True
    for o in (net, twin):
        torch.manual_seed(1)
        o.train()(x).square().mean().backward()
        seen.append(torch.rand(3))
    assert torch.equal(*seen) and all(torch.equal(p.grad, q.grad) for p, q in zip(net.parameters(), twin.parameters()))

def test_statistics_stay_after_an_error():
    "A BatchNorm has its own buffers back whatever happens while they are set aside"
    norm = nn.BatchNorm3d(2)
    own = dict(norm.named_buffers())
    with pytest.raises(ZeroDivisionError):
        with keep_bn_stats(norm):
            norm(torch.rand(1, 2, 3, 3, 3))
            assert norm.num_batches_tracked == 1
            1 / 0
    assert all(b is own[k] for k, b in norm.named_buffers()) and norm.num_batches_tracked == 0

def test_recompute_without_gradients_and_in_copies():
    net, x = unet(recompute=True), torch.rand(1, 1, 16, 24, 24)
    calls = []
    for m in net.encoder.layer1.modules(): m.register_forward_hook(lambda *o: calls.append(1))
    with torch.no_grad(): net.eval()(x)
    once = len(calls)
    net.train()(x).sum().backward()
    assert len(calls) > 2 * once
    assert deepcopy(net).recompute and pickle.loads(pickle.dumps(unet(recompute=True))).recompute
    assert deepcopy(unet(recompute=True)).to('meta')(x.to('meta')).shape == x.shape
    with torch.inference_mode(): assert torch.equal(net.eval()(x), net(x))

def test_pieces_are_blocks():
    body = encoder3d('r3d_18', False, 8)
    assert [len(_pieces(stage)) for stage in body] == [1, 2, 2, 2, 2]
    assert _pieces(body.stem) == [body.stem] and _pieces(body.layer1) == list(body.layer1)

@pytest.mark.parametrize('recompute', [False, True])
def test_a_frozen_stage_keeps_its_statistics(recompute):
    net, x = unet(recompute=recompute), torch.rand(1, 1, 16, 24, 24)
    for name in ('stem', 'layer1'): net.encoder.get_submodule(name).requires_grad_(False)
    before = deepcopy(net.encoder.state_dict())
    net.train()(x).square().mean().backward()
    same = {k.split('.')[0] for k, v in net.encoder.state_dict().items() if 'running' in k and torch.equal(v, before[k])}
    assert same == {'stem', 'layer1'}
    net.encoder.requires_grad_(True)
    assert all(stage.training for stage in net.train().encoder) and not any(stage.training for stage in net.eval().encoder)


# Parts of the decoder

def test_channels_and_sizes_of_each_encoder():
    bodies = {name: encoder3d(name, pretrained=False) for name in names}
    for body in bodies.values(): assert [s.channels for s in stage_sizes(body)] == [64, 64, 128, 256, 512]
    assert [s.size for s in stage_sizes(bodies['mc3_18'])] == [(64, n, n) for n in (32, 32, 16, 8, 4)]
    with pytest.raises(CTError, match='at least 16 voxels'): stage_sizes(bodies['r3d_18'], (8, 64, 64))

def test_levels_of_stages():
    grouped = lambda stages, **kwargs: [[s.name for s in level] for level in _size_levels(stages, **kwargs)]
    for name in names: assert grouped(stage_sizes(unet(name).encoder)) == [['stem', 'layer1'], ['layer2'], ['layer3'], ['layer4']]
    assert grouped(stage_sizes(unet().encoder), stem_skip=False) == [['layer1'], ['layer2'], ['layer3'], ['layer4']]
    only_depth = [_Stage('a', 4, (16, 8, 8)), _Stage('b', 4, (8, 8, 8)), _Stage('c', 4, (8, 8, 8))]
    assert grouped(only_depth) == [['a'], ['b', 'c']] and _level_widths(_size_levels(only_depth)) == [4]
    with pytest.raises(CTError, match='encoder: never changes size'): _size_levels([_Stage('a', 4, (16, 8, 8))])

def test_widths_of_levels():
    levels = _size_levels(stage_sizes(encoder3d('r3d_18', pretrained=False)))
    assert _level_widths(levels) == [128, 64, 32] and _level_widths(levels, 24) == [96, 48, 24] and _level_widths(levels, (96, 64, 16)) == [96, 64, 16]
    with pytest.raises(CTError, match='Give 3 numbers of channels'): _level_widths(levels, (64, 32))
    with pytest.raises(CTError, match='decoder=0'): _level_widths(levels, 0)

def test_he_weights_keep_the_mean_square():
    torch.manual_seed(0)
    conv = nn.Conv3d(32, 64, 3, padding=1, bias=False).apply(_init_he)
    assert conv.weight.var().item() * 32 * 27 == pytest.approx(2, abs=.05)
    assert conv(torch.randn(1, 32, 9, 9, 9))[..., 1:-1, 1:-1, 1:-1].relu().square().mean().item() == pytest.approx(1, abs=.1)

def test_a_pointwise_convolution_in_both_layouts():
    "The product of matrices gives PyTorch's numbers and gradients, in the layout of its input"
    torch.manual_seed(0)
    mix, x = _Pointwise3d(6, 3, bias=True), torch.randn(2, 6, 4, 5, 7)
    last = x.to(memory_format=torch.channels_last_3d)
    want = nn.functional.conv3d(x, mix.weight, mix.bias)
    for o in (x, last): assert torch.allclose(mix(o), want, atol=1e-6)
    assert mix(last).is_contiguous(memory_format=torch.channels_last_3d) and mix(x).is_contiguous()
    for a, b in zip(*(torch.autograd.grad(mix(o).square().sum(), mix.parameters()) for o in (x, last))): assert torch.allclose(a, b, atol=1e-3)

def test_resize_to_a_size():
    ramp = torch.arange(4.).view(1, 1, 1, 1, 4).expand(1, 1, 2, 3, 4)
    assert torch.allclose(_resize(ramp, (2, 3, 8))[0, 0, 0, 0], torch.tensor([0, .25, .75, 1.25, 1.75, 2.25, 2.75, 3]), atol=1e-6)
    assert torch.equal(_resize(ramp, (5, 3, 4)), ramp[:, :, :1].expand(1, 1, 5, 3, 4))
    assert _resize(ramp, (2, 3, 4)) is ramp

def test_pixel_shuffle():
    x = torch.rand(2, 12, 5, 4, 3)
    assert torch.equal(_shuffle3d(x, (1, 2, 2))[:, :, 3], nn.functional.pixel_shuffle(x[:, :, 3], 2))
    assert _shuffle3d(x, (3, 1, 2)).shape == (2, 2, 15, 4, 6)

@pytest.mark.parametrize('up', ['transposed', 'shuffle'])
def test_upsampling_starts_as_nearest_neighbor(up):
    torch.manual_seed(0)
    with torch.no_grad(): y = _Upsample(8, 4, (2, 2, 2), up)(torch.rand(1, 8, 2, 3, 3), (4, 6, 6))
    assert torch.allclose(y, nn.functional.interpolate(y[..., ::2, ::2, ::2], scale_factor=2), atol=1e-6) and y.std() > .1

def test_upsampling_to_odd_sizes_and_by_name():
    for up in ('trilinear', 'transposed', 'shuffle'): assert _Upsample(8, 4, (2, 2, 2), up)(torch.rand(1, 8, 2, 3, 3), (3, 6, 5)).shape == (1, 4, 3, 6, 5)
    with pytest.raises(CTError, match='Give trilinear, transposed or shuffle'): _Upsample(8, 4, up='bilinear')

def test_features_and_skips_meet_in_place():
    "What the joining convolution reads: features reduced and then enlarged, each skip reduced"
    torch.manual_seed(0)
    level, seen, deep, skip = _DecoderLevel(16, [8, 6], 4, up='trilinear'), [], torch.rand(1, 16, 2, 3, 3), torch.rand(1, 8, 4, 6, 6)
    level.join.register_forward_pre_hook(lambda m, args: seen.append(args[0]))
    with torch.no_grad():
        level(deep, [skip, torch.rand(1, 6, 4, 6, 6)])
        reduced = nn.functional.interpolate(nn.functional.conv3d(deep, level.reduce.conv.weight), size=(4, 6, 6), mode='trilinear')
        lateral = torch.einsum('oi,bizyx->bozyx', next(iter(level.laterals)).weight.flatten(1), skip)
    assert torch.allclose(seen[0][:, :4], reduced, atol=1e-5) and torch.allclose(seen[0][:, 4:8], lateral, atol=1e-5)
    with pytest.raises(ValueError, match='shorter'): level(deep, [skip])

def test_the_last_convolution_says_the_prior():
    assert torch.allclose(_logit_conv(4, 3)(torch.zeros(1, 4, 1, 1, 1)).sigmoid().flatten(), torch.full((3,), .05), atol=1e-6)
    with pytest.raises(CTError, match='prior=1'): _logit_conv(4, 1, prior=1)

@pytest.mark.parametrize('bad', ['lesion', [], ['lesion', 'lesion'], [2], [None, None]], ids=str)
def test_classes_that_are_no_names(bad):
    with pytest.raises(CTError) as e: _check_classes(bad)
    assert "e.g. ['lesion']" in str(e.value) and _check_classes(('lesion', 'lung')) == ['lesion', 'lung']

def test_interpolating_logits_is_interpolating_features():
    "Both are linear, and the logits have fewer channels"
    torch.manual_seed(0)
    head, x, volume = _Head(8, 2, False, .05), torch.rand(1, 8, 5, 5, 6), torch.rand(1, 1, 5, 9, 11)
    assert torch.allclose(head(x, volume), head.logits(_resize(x, (5, 9, 11))), atol=1e-5)

def test_attention_by_hand():
    torch.manual_seed(0)
    attend, x = Attention3d(16), torch.randn(2, 16, 2, 3, 4)
    with torch.no_grad():
        assert torch.equal(attend(x), x) # its factor starts at 0
        attend.share.fill_(1)
        q, k, v = attend.qk(x)[0, :2].flatten(1), attend.qk(x)[0, 2:].flatten(1), attend.v(x)[0].flatten(1)
        want = x[0].flatten(1)[:, 5] + v @ (q[:, 5] @ k / math.sqrt(2)).softmax(0)
        assert torch.allclose(attend(x)[0].flatten(1)[:, 5], want, atol=1e-5)

@archs
@pytest.mark.parametrize('kwargs', [dict(stem_skip=False), dict(input_skip=True), dict(up='shuffle', attention=True), dict(up='transposed', decoder_norm='instance')], ids=str)
def test_every_option_keeps_the_size(arch, kwargs):
    net = unet(arch, **kwargs).eval()
    for size in ((16, 32, 32), (19, 37, 23), (1, 50, 3)):
        with torch.no_grad(): logits = net(torch.rand(1, 1, *size))
        assert logits.shape == (1, 1, *size) and logits.isfinite().all()

def test_a_checkpointed_block_is_the_block():
    "Gradients, dropout included, statistics, their count and the random state"
    torch.manual_seed(0)
    block = nn.Sequential(nn.Conv3d(1, 4, 3), nn.BatchNorm3d(4), nn.ReLU(inplace=True), nn.Dropout(.5))
    other, x, state, after = deepcopy(block), torch.rand(2, 1, 5, 5, 5), torch.get_rng_state(), []
    for run in (lambda: block(x), lambda: checkpointed(other, x)):
        torch.set_rng_state(state)
        run().square().sum().backward()
        after.append(torch.rand(1).item())
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(block.parameters(), other.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(block.buffers(), other.buffers()))
    assert other[1].num_batches_tracked == 1 and len(set(after)) == 1

def test_pieces_of_something_else():
    conv = nn.Conv3d(1, 1, 1)
    assert _pieces(conv) == [conv]
    for name in names: assert [len(_pieces(stage)) for stage in unet(name).encoder] == [1, 2, 2, 2, 2]
