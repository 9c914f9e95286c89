"Bytes counted by hand, without numbers and with them; plans that keep their word; a step measured in a process of its own"
import json, math, os, subprocess, sys, weakref
from copy import deepcopy
from pathlib import Path
import pytest, torch
from fastai.callback.core import Callback
from fastai.callback.fp16 import MixedPrecision
from fastai.callback.training import GradientAccumulation
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from fastai.optimizer import SGD
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.checkpoint import checkpoint
from covid3d.encoder import encoder3d
from covid3d.losses import DiceCELoss, soft_dice
from covid3d.memory import Accumulate, LiveBytes, MemoryPlan, apply_plan, _as_trained, _largest_patch, _like_autocast, live_step, on_meta, _options, _parse_bytes, plan_memory, saved_bytes, show_bytes, step_bytes, step_loss, _try_bytes
from covid3d.unet import DynamicUnet3d
from covid3d.volume import CTError

stages = ('stem', 'layer1', 'layer2', 'layer3', 'layer4')

def unet(norm='batch', arch='r3d_18', width=8, **kwargs):
    torch.manual_seed(0)
    return DynamicUnet3d(encoder3d(arch, False, width, norm), **kwargs)

def freeze(net, names):
    for name in names: net.encoder.get_submodule(name).requires_grad_(False)
    return net


@pytest.mark.parametrize('arch', ['r3d_18', 'mc3_18', 'r2plus1d_18'])
@pytest.mark.parametrize('norm', ['batch', 'group', 'instance'])
@pytest.mark.parametrize('recompute', [False, True])
def test_meta_counts_what_a_real_pass_keeps(arch, norm, recompute):
    net = unet(norm, arch, input_skip=True, recompute=recompute)
    for bs, size in ((1, (16, 24, 33)), (2, (19, 16, 16))): assert saved_bytes(net, size, bs) == saved_bytes(net, size, bs, 'cpu') > 0

def test_frozen_norm_is_counted_to_a_thousandth():
    "In evaluation the CPU's kernel returns no mean and deviation, the meta device's does"
    net, size = unet('frozen', width=16), (16, 48, 48)
    meta, cpu = saved_bytes(net, size), saved_bytes(net, size, device='cpu')
    assert cpu <= meta < cpu * 1.003

@pytest.mark.parametrize('norm', ['batch', 'frozen', 'group', 'instance'])
@pytest.mark.parametrize('recompute', [False, True])
def test_what_is_frozen_keeps_nothing(norm, recompute):
    net, size = unet(norm, recompute=recompute), (16, 32, 32)
    counts = [saved_bytes(freeze(net, stages[:n]), size) for n in range(len(stages) + 1)]
    assert counts == sorted(counts, reverse=True)
    assert counts[-1] < counts[0] * (.75 if recompute else .5)
    assert saved_bytes(net.encoder, size) == 0

def hook_sees(model, size):
    "The storages that PyTorch's hook for saved tensors hands over and autograd still holds when the forward pass has ended"
    class Held:
        def __init__(self, t): self.t = t
    model, x, held = on_meta(model), torch.zeros(1, 1, *size, device='meta'), weakref.WeakSet()
    def pack(t):
        held.add(o := Held(t))
        return o
    there = {t.untyped_storage()._cdata for t in [x, *model.parameters(), *model.buffers()]}
    with saved_tensors_hooks(pack, lambda o: o.t): out = model(x)  # noqa: F841 held while it is counted
    storages = {o.t.untyped_storage()._cdata: o.t.untyped_storage().nbytes() for o in held}
    return sum(n for k, n in storages.items() if k not in there)

@pytest.mark.parametrize('n', [0, 1, 2, 4, 5])
@pytest.mark.parametrize('recompute', [False, True])
def test_frozen_stages_beside_what_the_hook_sees(n, recompute):
    "Where activations are recomputed, the hook misses the skips, which checkpoints hold in lists: those that no trained stage reads too"
    net, size = freeze(unet(width=16, recompute=recompute), stages[:n]), (16, 96, 96)
    voxels = dict(zip(stages, (16 * 48 * 48, 16 * 48 * 48, 8 * 24 * 24, 4 * 12 * 12)))
    channels = dict(stem=16, layer1=16, layer2=32, layer3=64)
    blocks_read = {stages[i] for i in range(4) if i + 1 >= n} # a stage that trains keeps what it reads
    missed = sum(4 * channels[k] * voxels[k] for k in channels if k not in blocks_read) if recompute else 0
    assert saved_bytes(net, size) == hook_sees(net, size) + missed

def test_frozen_and_computed_again_by_hand():
    "Two convolutions of one channel: the first is frozen, so of its checkpoint nothing is kept; of the second what it reads"
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = (nn.Sequential(nn.Conv3d(1, 1, 1, bias=False), nn.Softplus(), nn.Softplus()) for _ in range(2))
        def forward(self, x): return checkpoint(self.second, checkpoint(self.first, x, use_reentrant=False), use_reentrant=False)
    net, n = Net(), 4 * 4 * 6 * 8
    assert saved_bytes(net, (4, 6, 8)) == saved_bytes(net, (4, 6, 8), device='cpu') == n
    net.first.requires_grad_(False)
    assert saved_bytes(net, (4, 6, 8)) == saved_bytes(net, (4, 6, 8), device='cpu') == n
    net.second.requires_grad_(False)
    assert saved_bytes(net, (4, 6, 8)) == saved_bytes(net, (4, 6, 8), device='cpu') == 0

def test_recompute_keeps_less_and_needs_less_at_the_peak():
    for norm in ('batch', 'group'):
        kept, again = unet(norm), unet(norm, recompute=True)
        assert saved_bytes(again, (16, 64, 64)) < saved_bytes(kept, (16, 64, 64)) / 3
        assert live_step(again, (16, 64, 64))[1] < live_step(kept, (16, 64, 64))[1]

def test_the_count_leaves_the_model_alone():
    net = unet()
    before, state, mode = {k: v.clone() for k, v in net.state_dict().items()}, torch.get_rng_state(), net.eval().training
    saved_bytes(net, (16, 16, 16))
    step_bytes(net, (16, 16, 16))
    plan_memory(net, (16, 16, 16), '9GB', device='cpu')
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items()) and torch.equal(torch.get_rng_state(), state)
    assert net.training == mode and not net.recompute and all(p.grad is None and p.device.type == 'cpu' for p in net.parameters())
    assert {p.device.type for p in on_meta(net).parameters()} == {'meta'}

def test_more_patches_need_more():
    net = unet(width=16)
    one, two, four = (step_bytes(net, (16, 32, 32), n)['forward'] for n in (1, 2, 4))
    assert one < two < four and four == pytest.approx(2 * two, rel=.2)

@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(1, 50), min_size=1, max_size=8), st.data())
def test_live_bytes_of_any_order_of_coming_and_going(sizes, data):
    live, held, now, peak = LiveBytes(), [], 0, 0
    with live:
        for n in sizes:
            held.append(torch.zeros(n))
            now += 4 * n
            peak = max(peak, now)
            if data.draw(st.booleans()): now -= held.pop(data.draw(st.integers(0, len(held) - 1))).nbytes
            assert (live.now, live.peak) == (now, peak)


@given(st.integers(1, 10**13))
def test_a_number_of_bytes_is_itself(n): assert _parse_bytes(n) == _parse_bytes(str(n)) == _parse_bytes(f'{n} B') == n

@pytest.mark.parametrize('text, n', [('6GB', 6e9), ('6 gb', 6e9), ('6GiB', 6 * 2**30), ('1.5 G', 1.5e9), ('24 GIB', 24 * 2**30), (8e9, 8e9), ('2e9', 2e9), ('512MiB', 2**29)])
def test_ways_to_write_a_budget(text, n): assert _parse_bytes(text) == n

@pytest.mark.parametrize('bad', ['', 'GB', '6 cards', '6..5GB', '-1', 'nan', 'inf', None, 0, [], True, '0.1 B'])
def test_no_budget(bad):
    with pytest.raises(CTError, match='not an amount of memory') as e: _parse_bytes(bad)
    assert '\n' not in str(e.value)

def test_sizes_for_people(): assert [show_bytes(n) for n in (4.1e9, 999e6, 1e9, 12.34e9)] == ['4.1 GB', '999 MB', '1 GB', '12.3 GB']

@settings(max_examples=5, deadline=None)
@given(bs=st.sampled_from([1, 2]), norm=st.sampled_from(['batch', 'group']), share=st.floats(0, 1), device=st.sampled_from(['cpu', 'cuda']))
def test_a_plan_is_the_first_option_that_fits(bs, norm, share, device):
    net, size = unet(norm), (16, 32, 32)
    ways = _options(net, bs, device)
    needs = [_try_bytes(net, size, *way, device) for way in ways]
    budget = int(min(needs) + share * (max(needs) - min(needs)))
    plan = plan_memory(net, size, budget, bs, device)
    assert (plan.bs, plan.recompute, plan.fp16) == next(way for way, need in zip(ways, needs) if need <= budget)
    assert plan.bs * plan.accumulate == bs and plan.bytes <= budget and plan.fp16 == (device == 'cuda')

def test_a_plan_counts_what_will_train():
    "Frozen now or not: the plan says what the training will need"
    net, size = unet('frozen'), (16, 32, 32)
    need = lambda net, **kwargs: plan_memory(net, size, '99GB', 2, 'cpu', **kwargs).bytes
    whole, steady = need(net), [need(net, frozen_stages=n) for n in range(6)]
    assert steady == sorted(steady, reverse=True) and steady[0] == whole > steady[5]
    assert need(freeze(unet('frozen'), stages)) == whole
    for n in range(6): assert steady[n] == sum(step_bytes(freeze(unet('frozen'), stages[:n]), size, 2).values())
    weights = sum(t.nbytes for t in [*net.parameters(), *net.buffers()])
    assert need(net, average=True) == whole + 2 * weights and need(net, average=True, frozen_stages=5) == steady[5] + 2 * weights

def test_frozen_statistics_are_not_lost_by_splitting():
    "One patch at a time comes early where every BatchNorm is frozen"
    ways = lambda n: [way[0] for way in _options(_as_trained(unet('batch'), n), 2, 'cuda')]
    assert ways(0) == ways(4) == [2, 2, 1, 1] and ways(5) == [2, 1, 2, 1]

def test_a_budget_for_frozen_stages_is_too_small_for_all():
    net, size = unet(), (16, 64, 64)
    budget = max(_try_bytes(_as_trained(net, 5), size, *way, 'cpu') for way in _options(_as_trained(net, 5), 1, 'cpu'))
    assert not plan_memory(net, size, budget, 1, 'cpu', frozen_stages=5).recompute
    with pytest.raises(CTError, match='at the least'): plan_memory(net, size, _try_bytes(_as_trained(net, 5), size, 1, True, False, 'cpu'), 1, 'cpu')

def test_a_cpu_never_trains_in_half_precision(): assert not any(fp16 for *_, fp16 in _options(unet(), 4, 'cpu'))

def test_nothing_fits():
    net = unet()
    with pytest.raises(CTError, match='memory=0.9GB: one patch of 32×64×64 needs .* at the least. Give a narrower network'): plan_memory(net, (32, 64, 64), '0.9GB', device='cpu')
    budget = _try_bytes(net, (16, 48, 48), 1, True, False, 'cpu')
    smaller = _largest_patch(net, (24, 80, 80), budget, True, False, 'cpu')
    assert smaller and plan_memory(net, smaller, budget, 1, 'cpu').bytes <= budget
    with pytest.raises(CTError, match='Give a patch of ' + '×'.join(map(str, smaller))): plan_memory(net, (24, 80, 80), budget, 1, 'cpu')

def test_a_network_that_cannot_compute_again():
    assert _options(nn.Sequential(nn.Conv3d(1, 1, 3)), 2, 'cpu') == [(2, False, False), (1, False, False)]

@pytest.mark.parametrize('norm', ['batch', 'frozen'])
def test_a_single_patch_comes_last_on_a_cpu(norm):
    assert [n == 1 for n, *_ in _options(unet(norm), 6, 'cpu')] == [False] * 6 + [True] * 2
    assert _options(unet('frozen'), 6, 'cuda')[3][:2] == (1, False)

def test_plan_is_told():
    assert str(MemoryPlan(4, 1, True, False, 10**9, 2 * 10**9)) == '2 GB: 4 patches at a time, fp32, activations recomputed; about 1 GB'


@pytest.mark.skipif(not Path('/proc/self/clear_refs').exists(), reason='resident memory is read from /proc, which is not here')
@pytest.mark.parametrize('recompute', [False, True])
def test_resident_memory_grows_as_predicted(recompute):
    "A process of its own; forward, backward and workspace explain the growth within 35 %"
    script = Path(__file__).parent.parent / 'benchmarks/memory.py'
    env = dict(os.environ, MALLOC_MMAP_THRESHOLD_='65536', MALLOC_TRIM_THRESHOLD_='65536', OMP_NUM_THREADS='1')
    res = subprocess.run([sys.executable, '-W', 'ignore', script, '--one', json.dumps([16, 'group', recompute, 1, [32, 128, 128]])], env=env, capture_output=True, text=True)
    assert res.returncode == 0, res.stderr
    grown, predicted = json.loads(res.stdout.splitlines()[-1])
    assert predicted / grown == pytest.approx(1, abs=.35), f'{grown:.0f} MB measured, {predicted:.0f} MB predicted'


def learner(norm='group', n=4, bs=2):
    net, size = unet(norm), (1, 16, 32, 32)
    samples = [(torch.rand(size), (torch.rand(size) > .7).float()) for _ in range(n)]
    dls = DataLoaders.from_dsets(samples, samples[:1], bs=bs, shuffle=False, num_workers=0, device='cpu')
    return Learner(dls, net, loss_func=DiceCELoss(), opt_func=SGD, lr=.1, train_bn=False)

def weights(learn): return torch.cat([p.detach().flatten() for p in learn.model.parameters()])

@pytest.fixture
def float64():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)

@pytest.mark.parametrize('norm', ['frozen', 'group', 'instance'])
@pytest.mark.parametrize('bs, recompute', [(1, False), (1, True), (2, True), (4, True)])
def test_every_plan_for_a_batch_of_four_trains_alike(norm, bs, recompute, float64):
    "One step in float64: normalising the few voxels at the bottom would blow float32's rounding up"
    ends = []
    for plan in (MemoryPlan(4, 1, False, False, 0, 0), MemoryPlan(bs, 4 // bs, recompute, False, 0, 0)):
        learn = apply_plan(learner(norm, n=5), plan)
        start = weights(learn)
        with learn.no_bar(), learn.no_logging(): learn.fit(1)
        ends.append(weights(learn))
    assert (ends[0] - start).abs().max() > 1e-3
    assert torch.allclose(*ends, rtol=0, atol=1e-9)

def test_a_later_plan_replaces_the_earlier():
    learn = apply_plan(learner(), MemoryPlan(1, 4, True, True, 0, 0))
    assert learn.model.recompute and learn.dls.train.bs == learn.dls.valid.bs == 1 and learn.accumulate.n_acc == 4 and isinstance(learn.mixed_precision, MixedPrecision)
    apply_plan(learn, MemoryPlan(2, 2, False, False, 0, 0))
    assert not learn.model.recompute and learn.dls.train.bs == learn.dls.valid.bs == 2 and learn.accumulate.n_acc == 4 and not hasattr(learn, 'mixed_precision')
    assert sum(isinstance(cb, Accumulate) for cb in learn.cbs) == 1
    apply_plan(learn, MemoryPlan(4, 1, False, False, 0, 0))
    assert not any(isinstance(cb, Accumulate) for cb in learn.cbs)


# Parts, by hand

def test_a_copy_on_meta_leaves_the_network_alone():
    net = unet()
    meta = on_meta(net)
    assert {p.device.type for p in [*meta.parameters(), *meta.buffers()]} == {'meta'} and {p.device.type for p in [*net.parameters(), *net.buffers()]} == {'cpu'}
    net.encoder.requires_grad_(False)
    assert [p.requires_grad for p in on_meta(net).parameters()] == [p.requires_grad for p in net.parameters()]

def test_live_bytes_by_hand():
    "Twice 400 bytes and a third that is freed at once; a view counts for nothing"
    with LiveBytes() as live:
        a = torch.zeros(100)
        b = 2 * a
        b += a.exp()
        c = b.view(10, 10) # noqa: F841
    assert (live.now, live.peak) == (800, 1200)
    del a, b
    assert live.now == 400

def test_saved_bytes_by_hand():
    "Of a normalization its input, mean and deviation, of a ReLU in place its output"
    tiny = nn.Sequential(nn.Conv3d(1, 4, 3, padding=1), nn.GroupNorm(1, 4), nn.ReLU(inplace=True))
    assert saved_bytes(tiny, (4, 6, 8), 2) == 4 * (2 * 4 * 4 * 6 * 8 * 2 + 2 + 2)
    assert saved_bytes(tiny.requires_grad_(False), (4, 6, 8)) == 0

def test_a_frozen_encoder_with_a_recomputed_decoder_by_hand():
    "The features of the five stages, and what enters the next decoder level or the head"
    voxels = [math.prod(-(-n // 2**i) for n in (16, 48, 48)) for i in range(4)]
    encoder = 2 * 16 * voxels[0] + 32 * voxels[1] + 64 * voxels[2] + 128 * voxels[3]
    decoder = 8 * voxels[0] + 16 * voxels[1] + 32 * voxels[2]
    assert saved_bytes(freeze(unet(width=16, recompute=True), stages), (16, 96, 96)) == 4 * (encoder + decoder)

@pytest.mark.parametrize('n', [0, 2, 5])
@pytest.mark.parametrize('recompute', [False, True])
def test_frozen_stages_on_meta_and_in_a_real_pass(n, recompute):
    net = freeze(unet(recompute=recompute), stages[:n])
    assert saved_bytes(net, (16, 33, 29)) == saved_bytes(net, (16, 33, 29), device='cpu')

def test_a_frozen_encoder_gets_no_gradient_and_keeps_its_statistics():
    net = freeze(unet(), stages)
    net.train()(torch.rand(1, 1, 16, 32, 32)).sum().backward()
    assert [k for k, p in net.named_parameters() if p.grad is not None] == [k for k, _ in net.named_parameters() if not k.startswith('encoder')]
    assert {int(b) for k, b in net.named_buffers() if k.endswith('num_batches_tracked')} == {0}
    assert net.training and net.decoder.training and not any(stage.training for stage in net.encoder)
    net.encoder.layer4.requires_grad_(True)
    assert [stage.training for stage in net.train().encoder] == [False] * 4 + [True]

@pytest.mark.parametrize('norm, want', [(nn.GroupNorm(1, 1), 2 + 4 + 4 + 2), (nn.BatchNorm3d(1), 2 + 2 + 2)])
def test_bytes_kept_in_mixed_precision(norm, want, n=8):
    "Per voxel, between two convolutions: group normalization keeps its input and its output in float32, BatchNorm takes float16 as it comes"
    layers = nn.Sequential(nn.Conv3d(1, 1, 1, bias=False), norm, nn.ReLU(inplace=True), nn.Conv3d(1, 1, 1, bias=False))
    kept, x, meta = {}, torch.zeros(1, 1, n, n, n, device='meta'), _like_autocast(on_meta(layers))
    with saved_tensors_hooks(lambda t: kept.setdefault(t.untyped_storage()._cdata, t), lambda t: t): held = meta(x) # noqa: F841
    assert sum(t.nbytes for t in kept.values() if t.numel() == n**3) / n**3 == want

def test_the_loss_of_a_step_is_dice_and_cross_entropy_at_each_size():
    torch.manual_seed(0)
    y, mask = torch.randn(2, 1, 8, 8, 8), (torch.rand(2, 1, 8, 8, 8) > .7).float()
    half = y[..., ::2, ::2, ::2]
    whole, small = step_loss(y, mask), step_loss(half, mask)
    assert step_loss([y, half], mask).item() == pytest.approx((whole + small).item(), abs=1e-5)
    assert small.item() == pytest.approx(step_loss(half, mask[..., ::2, ::2, ::2]).item(), abs=1e-5) # the nearest voxel of the mask
    by_hand = 1 - soft_dice(y.sigmoid(), mask).mean() + nn.functional.binary_cross_entropy_with_logits(y, mask)
    assert whole.item() == pytest.approx(by_hand.item(), abs=1e-5)

def test_peaks_of_a_step():
    "Mixed precision helps BatchNorm and hurts group normalization; recomputing helps both"
    peak = lambda norm, recompute, fp16: live_step(unet(norm, width=16, recompute=recompute), (16, 96, 96), 2, fp16)[1]
    assert peak('batch', False, True) < .75 * peak('batch', False, False)
    assert peak('group', False, True) > peak('group', False, False)
    assert peak('batch', True, False) < .75 * peak('batch', False, False)

@pytest.mark.parametrize('recompute', [False, True])
def test_the_peak_on_meta_is_that_of_a_real_step(recompute):
    "Within the small tensors that the CPU's kernels make"
    net, size = unet(recompute=recompute), (16, 48, 40)
    model = deepcopy(net).train()
    params = list(model.parameters())
    for p in params: p.grad = torch.zeros_like(p)
    with LiveBytes(*params, *model.buffers(), *(p.grad for p in params)) as live:
        out = model(torch.rand(2, 1, *size))
        torch.autograd.backward(step_loss(out, torch.zeros_like(out)))
    assert live_step(net, size, 2)[1] / live.peak == pytest.approx(1, abs=.02)

def test_parts_of_a_step():
    net, size = unet(width=16), (16, 96, 96)
    parts, averaged = step_bytes(net, size, 2), step_bytes(net, size, 2, average=True)
    assert parts['gradients'] == 4 * sum(p.numel() for p in net.parameters()) and parts['adam'] == 2 * parts['gradients']
    assert parts['forward'] / saved_bytes(net, size, 2) == pytest.approx(1, abs=.1)
    assert {k: v - parts[k] for k, v in averaged.items() if v != parts[k]} == {'average': 2 * parts['weights']}
    still = step_bytes(freeze(unet(width=16), stages), size, 2)
    assert still['adam'] == 8 * sum(p.numel() for k, p in net.named_parameters() if not k.startswith('encoder'))
    assert still['forward'] < parts['forward'] / 2

def test_the_order_of_options():
    assert _options(unet('group'), 4, 'cuda') == [(n, r, True) for r in (False, True) for n in (4, 2, 1)]
    assert _options(unet('group'), 4, 'cpu') == [(n, r, False) for n, r in ((4, False), (2, False), (4, True), (2, True), (1, False), (1, True))]
    for norm in ('batch', 'frozen'): assert _options(unet(norm), 2, 'cpu') == [(2, False, False), (2, True, False), (1, False, False), (1, True, False)]
    assert _options(nn.Conv3d(1, 1, 1), 1, 'cpu') == [(1, False, False)]
    assert str(MemoryPlan(1, 2, False, True, int(4.1e9), 6 * 10**9)) == '6 GB: 1 patch at a time, 2 accumulated, fp16, activations kept; about 4.1 GB'

def test_what_will_train():
    size, net = (16, 96, 96), unet()
    meta = _as_trained(freeze(unet(), stages), 2)
    assert [k for k, p in meta.named_parameters() if not p.requires_grad] == [k for k, _ in net.named_parameters() if k.startswith(('encoder.stem', 'encoder.layer1'))]
    assert [stage.training for stage in meta.encoder] == [False, False, True, True, True]
    assert saved_bytes(_as_trained(freeze(unet(), stages)), size) == saved_bytes(unet(), size)
    assert saved_bytes(_as_trained(unet(), 2), size) == saved_bytes(freeze(unet(), stages[:2]), size)
    assert all(p.requires_grad for p in _as_trained(nn.Conv3d(1, 1, 1).requires_grad_(False)).parameters())

def test_the_largest_patch_that_fits():
    net = unet('frozen')
    assert _largest_patch(net, (32, 96, 96), 900 * 10**6, True, False, 'cpu') is None # the program alone takes that
    for budget in (940 * 10**6, 920 * 10**6):
        patch = _largest_patch(net, (32, 96, 96), budget, True, False, 'cpu')
        assert _try_bytes(net, patch, 1, True, False, 'cpu') <= budget and all(n % 16 == 0 for n in patch)
    needed = _try_bytes(net, (48, 48, 48), 1, True, False, 'cpu')
    with pytest.raises(CTError, match='at the least. Give a patch of 48×48×48'): plan_memory(net, (64, 64, 64), needed, 1, 'cpu')
    plan_memory(net, (48, 48, 48), needed, 1, 'cpu')

def test_an_epoch_leaves_no_part_of_a_batch_behind():
    "Five samples, two to a step, two epochs: two steps in each"
    class Steps(Callback):
        n = 0
        def after_step(self): self.n += 1
    def steps(kind):
        learn = learner(n=5, bs=1)
        learn.model = nn.Conv3d(1, 1, 1)
        learn.add_cbs([Steps(), kind(2)])
        with learn.no_bar(), learn.no_logging(): learn.fit(2)
        return learn.steps.n
    assert [steps(kind) for kind in (Accumulate, GradientAccumulation)] == [4, 5]

def test_validation_needs_less_than_a_step_of_as_many_patches():
    "But four patches in validation need more than one that is recomputed in training"
    net, again, size = unet(width=16), unet(width=16, recompute=True), (16, 96, 96)
    def validation(bs):
        model = on_meta(net).eval()
        with torch.no_grad(), LiveBytes(*model.parameters(), *model.buffers()) as live: model(torch.empty(bs, 1, *size, device='meta'))
        return live.peak
    assert all(validation(n) < live_step(again, size, n)[1] for n in (1, 4)) and validation(4) > live_step(again, size, 1)[1]

def test_plans_differ_by_rounding_alone():
    "After two epochs of five samples the weights agree, as a fraction of the largest change; half as many steps do not"
    def trained(plan, norm='group', n=5):
        learn = apply_plan(learner(norm, n), MemoryPlan(*plan, False, 0, 0))
        start = weights(learn)
        with learn.no_bar(), learn.no_logging(): learn.fit(2)
        return weights(learn), start
    def difference(a, b): return float((a[0] - b[0]).abs().max() / (b[0] - b[1]).abs().max())
    together = trained((2, 1, False))
    assert max(difference(trained(o), together) for o in ((1, 2, False), (1, 2, True), (2, 1, True))) < 1e-3
    assert difference(trained((1, 2, False), n=5), trained((1, 2, False), n=4)) < 1e-3
    assert difference(trained((1, 4, False), n=4), trained((1, 2, False), n=4)) > .01
