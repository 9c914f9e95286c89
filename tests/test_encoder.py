"The encoders against torchvision's own networks, and every way weights can be wrong"
import io, pickle, pytest, torch
from contextlib import redirect_stderr
from copy import deepcopy
from email.message import Message
from hypothesis import given, settings, strategies as st
from pathlib import Path
from safetensors.torch import save_file
from torch import nn
from torchvision.models.video import mc3_18, r2plus1d_18, r3d_18
from torchvision.transforms._presets import VideoClassification
from urllib.error import URLError
import covid3d.encoder
from covid3d.encoder import (GreyConv3d, build_of, _change_norm, encoder3d, encoder_info, _encoder_state, _find_arch, _grey_trunk, group_norm, _kinetics, _load_weights, _narrow_resnet, _narrowed,
    norm_layer, open_tensors, read_weights, _trunk, _video_net, _weights_width)
from covid3d.volume import CTError

archs = pytest.mark.parametrize('arch', [r3d_18, mc3_18, r2plus1d_18], ids=lambda arch: arch.__name__)


def unsettled(net):
    "Evaluation mode, with random BatchNorm statistics and affine parameters"
    for m in net.modules():
        if not isinstance(m, nn.BatchNorm3d): continue
        for o in (m.running_mean, m.bias.data): o.uniform_(-.5, .5)
        for o in (m.running_var, m.weight.data): o.uniform_(.5, 1.5)
    return net.eval()

def as_video(x, arch):
    "What torchvision's own preprocessing makes of the grey frames `x`, no resizing or cropping"
    preset = _kinetics(arch).transforms()
    frames = x.expand(-1, 3, -1, -1, -1).transpose(1, 2)
    same = VideoClassification(crop_size=x.shape[-2:], resize_size=x.shape[-2:], mean=preset.mean, std=preset.std)
    return same(frames)

def stages(body, x): return [x := stage(x) for stage in body]

@pytest.fixture(autouse=True)
def seed(): torch.manual_seed(0)


@archs
@pytest.mark.parametrize('size', [(9, 21, 17), (16, 32, 32), (5, 18, 31), (1, 7, 9)])
def test_five_stages_equal_torchvision(arch, size):
    net, x = unsettled(arch(weights=None)), torch.rand(2, 1, *size)
    with torch.no_grad(): want, got = stages(_trunk(net), as_video(x, arch)), stages(_grey_trunk(net, _kinetics(arch)).eval(), x)
    for a, b in zip(want, got, strict=True):
        assert a.std() > .1
        assert (a - b).abs().max() < 1e-4

@archs
def test_equal_to_the_last_digits_in_double_precision(arch):
    net, x = unsettled(arch(weights=None)).double(), torch.rand(1, 1, 9, 19, 20, dtype=torch.double)
    mean, std = (x.new_tensor(o).view(1, 3, 1, 1, 1) for o in (_kinetics(arch).transforms().mean, _kinetics(arch).transforms().std))
    with torch.no_grad(): want, got = stages(_trunk(net), (x - mean) / std), stages(_grey_trunk(net, _kinetics(arch)).eval(), x)
    for a, b in zip(want, got, strict=True): assert (a - b).abs().max() < 1e-11

@archs
def test_a_constant_bias_is_wrong_at_the_border_only(arch):
    conv, norm, x = next(arch(weights=None).stem.children()), _kinetics(arch).transforms(), torch.rand(1, 1, 9, 25, 27)
    grey = GreyConv3d(conv, norm.mean, norm.std)
    with torch.no_grad():
        error = (grey(x) - grey.bias(x.shape[2:], x.dtype) + grey.shift.sum((2, 3, 4)).view(1, -1, 1, 1, 1) - conv(as_video(x, arch))).abs()
    assert error[:, :, 1:-1, 2:-2, 2:-2].max() < 1e-5
    assert error.max() > .7

triples = lambda low, high: st.tuples(*[st.integers(low, high)] * 3)

@settings(max_examples=40, deadline=None)
@given(kernel=triples(1, 4), stride=triples(1, 3), padding=triples(0, 3), size=triples(4, 9), out=st.integers(1, 3), seed=st.integers(0, 99))
def test_any_convolution_any_size(kernel, stride, padding, size, out, seed):
    torch.manual_seed(seed)
    conv = nn.Conv3d(3, out, kernel, stride, padding, bias=False).double()
    mean, std, x = torch.rand(3).double(), .1 + torch.rand(3).double(), torch.rand(2, 1, *size).double()
    video = (x.expand(-1, 3, -1, -1, -1) - mean.view(1, 3, 1, 1, 1)) / std.view(1, 3, 1, 1, 1)
    with torch.no_grad(): assert torch.allclose(GreyConv3d(conv, mean, std)(x), conv(video), atol=1e-11)


def stem(seed=0):
    torch.manual_seed(seed)
    return GreyConv3d(nn.Conv3d(3, 4, 3, padding=1, bias=False), [.4, .4, .4], [.2, .2, .2])

def test_bias_is_kept_for_the_last_size_only():
    conv = stem()
    for n in (4, 6, 5): conv(torch.rand(1, 1, n, n, n))
    (size, *_), kept = conv.kept
    conv(torch.rand(3, 1, 5, 5, 5))
    assert tuple(size) == (5, 5, 5) and kept is conv.kept[1]

def test_bias_follows_a_loaded_state_and_a_move():
    conv, other, x = stem(0), stem(1), torch.rand(1, 1, 5, 6, 7)
    conv(x)
    conv.load_state_dict(other.state_dict())
    assert torch.equal(conv(x), other(x))
    assert torch.allclose(conv.double()(x.double()), other(x).double(), atol=1e-5)
    assert conv.kept[1].dtype == torch.float64
    assert conv.to('meta')(x.to('meta')).device.type == 'meta'

def test_copies_start_without_biases_and_agree():
    conv, x = stem(), torch.rand(1, 1, 5, 6, 7)
    want = conv(x)
    for same in (deepcopy(conv), pickle.loads(pickle.dumps(conv))):
        assert same.kept == (None, None)
        assert torch.equal(same(x), want)
    assert set(conv.state_dict()) == {'weight', 'shift'}

def test_training_after_inference_mode_and_autocast():
    conv, x = stem(), torch.rand(1, 1, 5, 6, 7, requires_grad=True)
    with torch.inference_mode(): conv(x)
    conv(x).sum().backward()
    assert x.grad.isfinite().all() and conv.weight.grad.abs().max() > 0 and not conv.shift.requires_grad
    want = conv(x)
    with torch.autocast('cpu', dtype=torch.bfloat16): low = conv(x)
    assert low.dtype == torch.bfloat16
    assert (low.float() - want).abs().max() < .05
    assert torch.equal(conv(x), want)

def test_a_traced_encoder_reads_other_sizes():
    body, x = encoder3d(r3d_18, pretrained=False, width=8).eval(), torch.rand(1, 1, 9, 17, 19)
    with torch.no_grad():
        traced = torch.jit.trace(body, torch.rand(1, 1, 8, 16, 16), check_trace=False)
        assert torch.allclose(traced(x), body(x), atol=1e-5)

@pytest.mark.parametrize('conv', [nn.Conv3d(3, 4, 3), nn.Conv3d(1, 4, 3, bias=False), nn.Conv3d(3, 3, 3, bias=False, groups=3),
                                  nn.Conv3d(3, 4, 3, padding=1, bias=False, padding_mode='replicate')])
def test_not_a_stem(conv):
    with pytest.raises(CTError, match='not the stem for 3 colors'): GreyConv3d(conv, [.4] * 3, [.2] * 3)


@archs
def test_width_64_is_torchvision(arch):
    slim, full = _video_net(arch, 63), arch(weights=None)
    assert [type(m) for m in _trunk(slim).modules() if not list(m.children())] == [type(m) for m in _trunk(full).modules() if not list(m.children())]
    assert type(_video_net(arch, 64)) is type(full)

@archs
@pytest.mark.parametrize('width', [4, 8, 24])
def test_narrow_encoders_run(arch, width):
    with torch.no_grad(): out = stages(encoder3d(arch, False, width).eval(), torch.rand(1, 1, 9, 33, 32))
    assert [o.shape[1] for o in out] == [width, width, 2 * width, 4 * width, 8 * width]
    assert all(o.isfinite().all() for o in out)

@pytest.mark.parametrize('arch', ['resnet18', 'r3d', 'swin3d_t', print, nn.Linear, 3])
def test_unknown_architecture(arch):
    with pytest.raises(CTError, match='not a video ResNet of torchvision. Give r3d_18, mc3_18 or r2plus1d_18'): encoder3d(arch, pretrained=False)

@archs
def test_random_weights_are_he_scaled(arch):
    "Random initialization goes through the color stem, so its statistics are torchvision's"
    weight = next(_video_net(arch, 64).stem.children()).weight
    fan_out = weight[:, 0].numel()
    assert abs(weight.var().item() * fan_out / 2 - 1) < .1


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "torchvision's cache folder, empty, and no network"
    def offline(*args, **kwargs): raise URLError('no network')
    monkeypatch.setattr('torch.hub._hub_dir', str(tmp_path))
    monkeypatch.setattr('torch.hub.urlopen', offline)
    (tmp_path/'checkpoints').mkdir()
    return tmp_path/'checkpoints'

@archs
def test_without_network_and_file_the_error_names_the_way_out(arch, cache):
    with pytest.raises(CTError) as e, redirect_stderr(io.StringIO()): encoder3d(arch)
    for part in (_kinetics(arch).url, str(cache), 'pretrained=False', 'no network'): assert part in str(e.value)
    assert '\n' not in str(e.value)

def test_the_download_leaves_standard_output_alone(cache, capsys):
    with pytest.raises(CTError): encoder3d(r3d_18)
    out, err = capsys.readouterr()
    assert out == '' and 'Downloading' in err

@archs
def test_a_copy_in_the_cache_needs_no_network(arch, cache):
    net, x = unsettled(arch(weights=None)), torch.rand(1, 1, 5, 18, 18)
    torch.save(net.state_dict(), cache/Path(_kinetics(arch).url).name)
    with torch.no_grad(): assert torch.equal(encoder3d(arch).eval()(x), _grey_trunk(net, _kinetics(arch)).eval()(x))

def test_a_damaged_copy_in_the_cache(cache):
    file = cache/Path(_kinetics(mc3_18).url).name
    torch.save(mc3_18().state_dict(), file)
    file.write_bytes(file.read_bytes()[:100_000])
    with pytest.raises(CTError, match='not read') as e: encoder3d(mc3_18)
    assert str(cache) in str(e.value) and '\n' not in str(e.value)

def test_a_download_with_a_wrong_hash_is_refused_and_not_kept(cache, monkeypatch):
    "What arrives is not what the name's hash promises"
    class Wrong(io.BytesIO):
        def info(self): return Message()
    monkeypatch.setattr('torch.hub.urlopen', lambda *args, **kwargs: Wrong(b'not the weights'))
    with pytest.raises(CTError, match='invalid hash value.*Put a good copy'), redirect_stderr(io.StringIO()): encoder3d(r3d_18)
    assert not list(cache.iterdir())

def test_download_is_checked_and_runs_no_code(monkeypatch):
    asked = {}
    monkeypatch.setattr('torchvision.models._api.load_state_dict_from_url', lambda url, **kwargs: asked.update(kwargs) or mc3_18().state_dict())
    encoder3d(mc3_18)
    assert asked['weights_only'] is True and asked['check_hash'] is True


class Payload:
    "Pickled, it writes a file when read"
    def __init__(self, path): self.path = path
    def __reduce__(self): return open, (str(self.path), 'w')

def test_a_payload_is_refused_before_it_runs(tmp_path):
    for name, save in (('zip.pth', torch.save), ('plain.pth', lambda o, p: p.write_bytes(pickle.dumps(o)))):
        save({'stem.0.weight': Payload(tmp_path/'ran')}, tmp_path/name)
        with pytest.raises(CTError, match=name) as e: encoder3d(r3d_18, tmp_path/name)
        assert '\n' not in str(e.value)
    assert not (tmp_path/'ran').exists()

@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
@pytest.mark.parametrize('damage', [lambda b: b[:-20], lambda b: b[:len(b) // 2], lambda b: b'', lambda b: b'<html>not found</html>', lambda b: bytes(len(b))])
def test_damaged_files(tmp_path, suffix, damage):
    path = tmp_path/f'weights{suffix}'
    (save_file if suffix == '.safetensors' else torch.save)({'a': torch.rand(1000)}, path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(CTError, match=f'weights{suffix}: ') as e: read_weights(path)
    assert '\n' not in str(e.value)

def test_missing_file_and_folder(tmp_path):
    for path in (tmp_path/'none.pth', tmp_path):
        with pytest.raises(CTError, match='no such file'): encoder3d(r3d_18, path)

@pytest.mark.parametrize('content', [[torch.zeros(2)], {'state_dict': {'a': torch.zeros(2)}}, torch.zeros(2), {'epoch': 3}])
def test_files_without_tensors_by_name(tmp_path, content):
    torch.save(content, tmp_path/'w.pth')
    with pytest.raises(CTError, match='not tensors by name'): encoder3d(r3d_18, tmp_path/'w.pth')

@pytest.mark.parametrize('given,wanted', [(r3d_18, mc3_18), (mc3_18, r3d_18), (r2plus1d_18, r3d_18), (r3d_18, r2plus1d_18)])
def test_weights_of_another_encoder(tmp_path, given, wanted):
    torch.save(_video_net(given, 8).state_dict(), tmp_path/'w.pth')
    with pytest.raises(CTError, match='weights of another encoder') as e: encoder3d(wanted, tmp_path/'w.pth', width=8)
    assert wanted.__name__ in str(e.value) and 'w.pth' in str(e.value) and '\n' not in str(e.value)

def test_weights_of_another_width(tmp_path):
    torch.save(_video_net(r3d_18, 8).state_dict(), tmp_path/'w.pth')
    with pytest.raises(CTError, match=r'stem.0.weight is \(8, 3, 3, 7, 7\), r3d_18 of width 16 needs \(16, 3, 3, 7, 7\)'):
        encoder3d(r3d_18, tmp_path/'w.pth', width=16)
    with pytest.raises(CTError, match='width=8: pretrained weights have width 64'): encoder3d(r3d_18, width=8)
    with pytest.raises(CTError, match='width=0'): encoder3d(r3d_18, False, width=0)

@archs
def test_round_trip_of_both_layouts(arch, tmp_path):
    net, x = unsettled(_video_net(arch, 8)), torch.rand(1, 1, 9, 20, 21)
    want = _grey_trunk(net, _kinetics(arch)).eval()
    save_file(net.state_dict(), tmp_path/'colour.safetensors')
    torch.save(net.state_dict(), tmp_path/'colour.pth')
    save_file(want.state_dict(), tmp_path/'grey.safetensors')
    torch.save(want.state_dict(), tmp_path/'grey.pt')
    for path in tmp_path.iterdir():
        with torch.no_grad(): assert torch.equal(encoder3d(arch.__name__, str(path), width=8).eval()(x), want(x))

def test_old_files_without_counters_and_with_a_classifier(tmp_path):
    net = unsettled(_video_net(r3d_18, 8))
    state = {k: v for k, v in net.state_dict().items() if not k.endswith('num_batches_tracked')}
    assert 'fc.weight' in state
    save_file(state, tmp_path/'w.safetensors')
    got = encoder3d(r3d_18, tmp_path/'w.safetensors', width=8).state_dict()
    for k, v in _trunk(net).state_dict().items():
        if not k.startswith('stem.0'): assert torch.equal(got[k], v)


def test_the_address_of_the_weights():
    assert _kinetics(r3d_18).url == 'https://download.pytorch.org/models/r3d_18-b3b3357e.pth'

def test_architectures_by_name_and_function():
    assert _find_arch('mc3_18') is mc3_18
    for o in (covid3d.encoder.r2plus1d_18, r2plus1d_18): assert _find_arch(o) is r2plus1d_18
    for bad in ('resnet18', 'r3d18'):
        with pytest.raises(CTError, match=f'arch={bad}: not a video ResNet of torchvision. Give r3d_18, mc3_18 or r2plus1d_18'): _find_arch(bad)

@archs
def test_a_narrow_network_of_width_64_has_the_shapes_of_torchvision(arch):
    shapes = lambda net: {k: tuple(v.shape) for k, v in _trunk(net).state_dict().items()}
    with torch.device('meta'):
        assert shapes(_narrow_resnet()(arch(), 64)) == shapes(arch())
        assert [name for name, _ in _trunk(arch()).named_children()] == ['stem', 'layer1', 'layer2', 'layer3', 'layer4']
    assert _narrowed(nn.BatchNorm3d(45), 1/8).num_features == 5


# Normalization

def test_group_norm_by_hand():
    "Up to 8 groups of 4 channels or more; each group of a sample has mean 0 and variance 1"
    assert [group_norm(n).num_groups for n in (4, 8, 9, 12, 24, 32, 128)] == [1, 2, 1, 1, 2, 8, 8]
    x, norm = torch.randn(2, 32, 4, 5, 6), group_norm(32).requires_grad_(False)
    per_group = norm(x).view(2, 8, -1)
    assert torch.allclose(norm(x)[:1], norm(x[:1]), atol=1e-5)
    assert per_group.mean(2).abs().max() < 1e-5 and (per_group.var(2, unbiased=False) - 1).abs().max() < 1e-3

def test_instance_norm_is_that_of_pytorch_and_takes_a_single_voxel():
    x = torch.randn(2, 32, 4, 5, 6)
    assert torch.allclose(norm_layer('instance', 32)(x), nn.InstanceNorm3d(32)(x), atol=1e-5)
    assert norm_layer('instance', 4)(torch.rand(1, 4, 1, 1, 1)).abs().max() < 1e-4
    with pytest.raises(CTError, match='Give batch, frozen, group, instance'): norm_layer('layer', 4)

@pytest.mark.parametrize('kind', ['frozen', 'group', 'instance'])
def test_a_changed_norm_keeps_samples_apart(kind):
    "No neighbor changes a sample; frozen statistics train as they evaluate; the scale is taken along"
    x, want = torch.rand(2, 3, 8, 16, 16), unsettled(_trunk(_video_net(r3d_18, 8)))
    body = _change_norm(deepcopy(want), kind).train()
    with torch.no_grad():
        assert torch.allclose(body(x), torch.cat([body(x[:1]), body(x[1:])]), atol=1e-4)
        if kind == 'frozen': assert torch.allclose(body(x), want.eval()(x), atol=1e-4)
    assert torch.equal(body.layer1[0].conv1[1].weight, want.layer1[0].conv1[1].weight)

@archs
@pytest.mark.parametrize('norm', ['batch', 'frozen', 'group', 'instance'])
def test_build_of_tells_how_it_was_built(arch, norm): assert build_of(encoder3d(arch, False, 8, norm)) == dict(width=8, norm=norm)


# What a file holds

def test_older_formats_of_torch_are_refused(tmp_path):
    torch.save({'a': torch.zeros(3)}, tmp_path/'w.pth', _use_new_zipfile_serialization=False)
    with pytest.raises(CTError, match='not a file that torch.save writes'): read_weights(tmp_path/'w.pth')
    torch.save({'a': print}, tmp_path/'w.pth')
    with pytest.raises(CTError, match='w.pth: holds Python objects, which are never run'): read_weights(tmp_path/'w.pth')

def test_tensors_too_many_and_too_few_are_named():
    small = _trunk(_video_net(r3d_18, 8))
    state = {k: torch.rand_like(v) for k, v in small.state_dict().items() if v.is_floating_point()}
    _load_weights(small, {**state, 'fc.bias': torch.zeros(5)}, 'own.pth', 'r3d_18')
    assert all(torch.equal(small.state_dict()[k], v) for k, v in state.items())
    for bad, words in (({**state, 'more': torch.zeros(2)}, r'more is \(2,\), r3d_18 needs none'), ({}, 'stem.0.weight is missing')):
        with pytest.raises(CTError, match=words): _load_weights(small, bad, 'own.pth', 'r3d_18')

@archs
def test_the_width_is_read_from_the_weights(arch):
    assert _weights_width(_video_net(arch, 24).state_dict()) == 24
    assert _encoder_state({'encoder.stem': 1, 'head': 2}) == {'stem': 1}

def test_what_is_written_beside_an_encoder(tmp_path):
    def save(about): save_file(dict(x=torch.ones(1)), tmp_path/'u.safetensors', about)
    save(dict(covid3d='{"net": {"norm": "instance"}}'))
    assert encoder_info(tmp_path/'u.safetensors') == dict(norm='instance')
    save(None)
    assert encoder_info(tmp_path/'u.safetensors') == {}
    for odd in ('{"net": {"norm": ["x"]}}', '{"net": {"width": 1e9}}', '[]', '[' * 10**5):
        save(dict(covid3d=odd))
        with pytest.raises(CTError, match='cannot be read'): encoder_info(tmp_path/'u.safetensors')

def test_weights_with_another_norm(tmp_path):
    "Frozen statistics come from the file; an encoder without BatchNorm needs group or instance"
    net, x = unsettled(_video_net(r3d_18, 8)), torch.rand(1, 1, 16, 20, 20)
    torch.save(net.state_dict(), tmp_path/'color.pth')
    with torch.no_grad(): assert torch.equal(encoder3d('r3d_18', tmp_path/'color.pth', norm='frozen').train()(x), _grey_trunk(net, _kinetics(r3d_18)).eval()(x))
    narrow = encoder3d(r3d_18, False, 8, 'instance')
    save_file({f'encoder.{k}': v for k, v in narrow.state_dict().items()}, tmp_path/'unet.safetensors')
    with torch.no_grad(): assert torch.equal(encoder3d(r3d_18, tmp_path/'unet.safetensors', norm='instance')(x), narrow(x))
    with pytest.raises(CTError, match='Use norm=group or norm=instance'): encoder3d(r3d_18, tmp_path/'unet.safetensors')

def test_open_tensors_reads_the_header_alone(tmp_path):
    save_file({'a': torch.arange(3.)}, tmp_path/'w.safetensors')
    with open_tensors(tmp_path/'w.safetensors', 'Copy it again') as f: assert (f.keys(), f.get_slice('a').get_shape(), f.get_slice('a').get_dtype()) == (['a'], [3], 'F32')
