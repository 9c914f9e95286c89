"A Segmenter gives the same masks whatever stands for the scan, and a Segmentation holds what follows from them"
import json
from dataclasses import replace
from types import SimpleNamespace

import matplotlib; matplotlib.use('Agg')
import numpy as np, pytest, torch
from torch import nn

from covid3d.cases import Case
from covid3d.cli import main
from covid3d.dicom import write_series
from covid3d.inference import (Segmentation, Segmenter, as_volume, _at_once, blend_weights, _cut, _fill, lungs, name_lungs, out_of_memory, segment, _slabs, sliding_window,
    window_bytes, window_starts)
from covid3d.weights import Ensemble, NetSpec, Seen, save_model
from covid3d.transforms import CTSpec, resize
from covid3d.volume import CTError, Volume, open_ct, open_mask, save_mask, save_volume
from coarse import cached

spec = CTSpec(spacing=(9,5,5), patch=(16,48,48), classes=('lesion','lung'))

class Two(nn.Module):
    "Calls two bands of grey levels lesion and lung, and counts how many windows it was asked about"
    def __init__(self):
        super().__init__()
        self.low,self.asked = nn.Parameter(torch.tensor([.2,.05]).reshape(2,1,1,1)),0
    def forward(self, x):
        self.asked += len(x)
        return 20*torch.minimum(x-self.low, self.low+.2-x)

@pytest.fixture(scope='module')
def scans(tmp_path_factory):
    "One scan as a NIfTI file, a DICOM folder and, with its rows reversed, a second NIfTI file"
    root = tmp_path_factory.mktemp('scans')
    ct = cached(1).ct
    save_volume(ct, root/'ct.nii.gz'); write_series(ct, root/'series')
    save_volume(ct.new(np.ascontiguousarray(ct.data[:,::-1])), root/'flipped.nii.gz')
    return root

@pytest.fixture(scope='module')
def weights(tmp_path_factory):
    "A folder of two folds; the first one's training held a scan"
    root,net = tmp_path_factory.mktemp('cv'),NetSpec(width=4)
    for i,seen in enumerate((Seen(1, 12., .01, ('a'*32,)), None)):
        torch.manual_seed(i)
        model = net.build(spec.classes)
        with torch.no_grad(): model.head.logits.bias.zero_()
        (root/f'fold_{i}').mkdir(); (root/f'fold_{i}'/'scores.csv').touch()
        save_model(model, root/f'fold_{i}'/'model.safetensors', spec, net, seen)
    (root/'folds.json').write_text(json.dumps(dict(k=2)))
    return root

def same(a, b): return a.keys()==b.keys() and all((a[k]==b[k]).all() for k in a)

def test_the_same_masks_whatever_stands_for_the_scan(scans):
    "A path, a DICOM folder, one of its files, a volume and a case give the same masks."
    nii,series = scans/'ct.nii.gz',scans/'series'
    segmenter = Segmenter(Two(), spec)
    want = segmenter(open_ct(nii)).masks
    assert want['lesion'].any() and want['lung'].any() and want['lesion'].dtype==np.uint8
    own = SimpleNamespace(open_ct=lambda: open_ct(nii))
    for o in (nii, str(nii), series, next(series.iterdir()), Case('a', nii), Case('b', series), own):
        assert same(segmenter(o).masks, want), o

def test_a_case_knows_more_than_its_path(scans):
    "The flipped axes of a case reach the network, which a path alone cannot do."
    case = Case('a', scans/'flipped.nii.gz', flip=('front-back',))
    segmenter = Segmenter(Two(), spec)
    assert same(segmenter(case).masks, segmenter(scans/'ct.nii.gz').masks)
    assert not same(segmenter(case.ct).masks, segmenter(case).masks)

@pytest.mark.parametrize('what', [None, 3, b'ct.nii', np.zeros((8,8,8)), ['ct.nii.gz'], dict()], ids=lambda o: type(o).__name__)
def test_what_is_no_scan_is_refused_in_one_line(what):
    "An object that is neither a volume, a case nor a path is refused in one line that says what to give."
    for f in (as_volume, Segmenter(Two(), spec), Segmenter(Two(), spec).probabilities):
        with pytest.raises(CTError) as e: f(what)
        assert str(e.value)==(f'scan: an object of type {type(what).__name__} is not a scan. '
                              'Give a Volume, a Case, or the path of a NIfTI file or a DICOM folder.')

def test_a_path_that_holds_no_scan_is_named(scans, tmp_path):
    "A path without a scan is an error of the reader, with the path in it."
    for o in (tmp_path/'none.nii.gz', tmp_path):
        with pytest.raises(CTError, match=str(o)): Segmenter(Two(), spec)(o)

@pytest.mark.parametrize('keep', [False,True])
def test_probabilities_give_the_masks(scans, keep):
    "Probabilities that are cut at the threshold are the masks, whether they were kept or are computed when asked for."
    net = Two()
    seg = Segmenter(net, spec, threshold=.6, keep=keep)(scans/'ct.nii.gz')
    once = net.asked
    prob = seg.probabilities()
    assert once and net.asked==once*(1 if keep else 2)
    for k,m in seg.masks.items():
        assert prob[k].dtype==np.float32 and prob[k].shape==seg.ct.shape and ((prob[k]>=np.float32(.6))==m).all() and 0<m.mean()<1

def test_keeping_changes_no_mask(scans):
    "A segmenter that keeps the probabilities gives the masks of one that does not."
    one,other = (Segmenter(Two(), spec, keep=k)(scans/'ct.nii.gz') for k in (False,True))
    assert same(one.masks, other.masks) and one.kept is None and same(one.probabilities(), other.kept)

def test_load_of_one_a_list_and_folds(scans, weights):
    "One file, a list and a folder of folds load; several answer with the mean of their probabilities."
    files = [weights/f'fold_{i}'/'model.safetensors' for i in range(2)]
    one,two = (Segmenter.load(p, 'cpu') for p in files)
    pair,folds = Segmenter.load(files, 'cpu'),Segmenter.load(weights, 'cpu', overlap=.25, threshold=.4)
    assert isinstance(pair.model, Ensemble) and not isinstance(one.model, Ensemble) and one.digest==Segmenter.load([files[0]], 'cpu').digest
    assert len({one.digest, two.digest, pair.digest})==3 and pair.digest==folds.digest
    assert (folds.overlap,folds.threshold)==(.25,.4) and (pair.spec,pair.classes,str(pair.device))==(spec,spec.classes,'cpu')
    assert not pair.model.training and one.seen[0].scans==('a'*32,) and two.seen==(None,) and len(pair.seen)==2
    x = torch.rand(1, 1, *spec.patch)
    with torch.no_grad(): mean,got = (one.model(x).sigmoid()+two.model(x).sigmoid())/2,pair.model(x).sigmoid()
    assert torch.allclose(got, mean, atol=1e-5)
    assert same(pair(scans/'ct.nii.gz').masks, Segmenter.load(str(weights), 'cpu')(scans/'ct.nii.gz').masks)

@pytest.mark.parametrize('k,v', [('threshold',0), ('threshold',1), ('threshold',float('nan')), ('overlap',1), ('overlap',-.1), ('overlap',float('nan'))])
def test_settings_are_checked_before_a_scan_is_opened(weights, k, v):
    "An overlap or threshold out of range is refused when the segmenter is made."
    for make in (lambda **o: Segmenter(Two(), spec, **o), lambda **o: Segmenter.load(weights, 'cpu', **o)):
        with pytest.raises(CTError, match=f'{k}: {v} is not between 0 and 1. Give 0.5'): make(**{k:v})

def test_what_follows_from_the_masks(scans):
    "Volumes, notes and the representation are those of the scan and its masks, and nothing can be replaced."
    ct = open_ct(scans/'ct.nii.gz')
    lesion = np.zeros(ct.shape, np.uint8); lesion[4:8,10:20,10:30] = 1
    for dtype in (np.uint8, bool):
        seg = Segmentation(ct, dict(lesion=lesion.astype(dtype), lung=lesion.astype(dtype)*0))
        assert seg.ml==pytest.approx(dict(lesion=800*9*3.7*3.7/1000, lung=0), rel=1e-4) and seg.notes==ct.notes
        assert repr(seg)=='lesion 98.6 ml, lung 0.0 ml of a 32×96×96 scan'
    with pytest.raises(AttributeError): seg.masks = {}
    assert repr(Segmenter(Two(), spec))=='Segmenter of lesion, lung (overlap 0.5, threshold 0.5, cpu)'

def test_save_writes_the_file_that_the_command_writes(scans, weights, tmp_path):
    "The mask that `save` writes is, byte for byte, the one of covid3d predict."
    assert main(['predict', str(scans/'ct.nii.gz'), '--weights', str(weights), '--out', str(tmp_path/'m'), '--device', 'cpu'])==0
    seg = Segmenter.load(weights, 'cpu')(scans/'ct.nii.gz')
    for k in spec.classes:
        seg.save(tmp_path/f'{k}.nii.gz', k)
        assert (tmp_path/f'{k}.nii.gz').read_bytes()==(tmp_path/'m'/f'ct_{k}.nii.gz').read_bytes()
        assert (open_mask(tmp_path/f'{k}.nii.gz', like=seg.ct).data==seg.masks[k]).all()
    seg.save(tmp_path/'first.nii.gz')
    assert (tmp_path/'first.nii.gz').read_bytes()==(tmp_path/'lesion.nii.gz').read_bytes()
    with pytest.raises(CTError, match="no mask of class 'liver'. Give lesion or lung"): seg.save(tmp_path/'x.nii.gz', 'liver')
    assert not (tmp_path/'x.nii.gz').exists()

def test_show_draws_slices_of_the_scan(scans):
    "`show` hands its arguments to `show_slices`."
    fig = Segmenter(Two(), spec)(scans/'ct.nii.gz').show(n=2, title='chest')
    assert len(fig.axes)==2 and fig.get_suptitle()=='chest'

def test_a_segmenter_leaves_the_network_as_it_was(scans):
    "A network in training mode is in training mode afterwards, and a later change of its weights changes masks and digest."
    net = Two().train()
    segmenter = Segmenter(net, spec)
    before,digest = segmenter(scans/'ct.nii.gz').masks,segmenter.digest
    assert net.training and not any(p.grad is not None for p in net.parameters())
    with torch.no_grad(): net.low += .1
    assert not same(segmenter(scans/'ct.nii.gz').masks, before) and segmenter.digest!=digest

# ---- the sliding window

def test_windows_cover_an_axis():
    "The first starts at 0, the last ends at the end, and none leaves a gap; a scan smaller than the window is centered."
    assert window_starts(100, 40)==[0,20,40,60] and window_starts(50, 40, .25)==[0,10] and window_starts(30, 40)==[-5]
    for n in range(1,80):
        seen = np.zeros(n, int)
        for s in window_starts(n, 16): seen[max(0,s):s+16] += 1
        assert seen.min()>0
    with pytest.raises(CTError, match='overlap: 1 is not in 0…1'): window_starts(50, 40, 1)

def test_weights_of_a_window():
    w = blend_weights((1,1,9)).ravel()
    assert torch.allclose(w, torch.tensor([.002,.029,.206,.674,1,.674,.206,.029,.002]), atol=6e-4) and blend_weights((8,64,64)).min()>0

@pytest.mark.parametrize('n', [1,4,7])
def test_windows_of_a_pointwise_network_are_the_whole_scan(n):
    torch.manual_seed(0)
    net = nn.Conv3d(1, 2, 1)
    for size in ((20,30,41),(5,30,9),(8,16,16)):
        x = torch.rand(1, *size)
        with torch.no_grad(): assert torch.allclose(sliding_window(net, x, (8,16,16), windows=n), net(x[None])[0].sigmoid(), atol=1e-5)

def test_answers_that_are_no_numbers_and_too_many_windows():
    x = torch.rand(1, 8, 16, 16)
    with pytest.raises(CTError, match='NaN or infinite logits'): sliding_window(lambda x: x*float('nan'), x, (8,16,16))
    with pytest.raises(CTError, match='windows would have to be computed'): sliding_window(nn.Identity(), torch.empty(1, 2000, 2000, 2000, device='meta'), (8,8,8), .5)

def test_which_errors_mean_that_memory_ran_out():
    assert out_of_memory(RuntimeError('CUDA out of memory. Tried to allocate')) and out_of_memory(MemoryError())
    assert not out_of_memory(RuntimeError('size mismatch')) and not out_of_memory(ValueError('out of memory'))

# ---- back to the grid of the scan

def test_the_way_back_in_parts_is_the_way_back():
    "Slabs and boxes give what resampling all at once gives, up to rounding at the threshold."
    torch.manual_seed(0)
    coarse,spot = torch.rand(5, 20, 30),torch.zeros(5, 20, 30); spot[2,5:9,4] = .8
    whole = resize(coarse, (23,61,47))
    assert torch.allclose(torch.cat([*_slabs(coarse, (23,61,47))]), whole, atol=1e-5) and np.allclose(_fill(coarse, (23,61,47)), whole.numpy(), atol=1e-5)
    for p in (coarse,spot):
        for size in ((23,61,47),(5,20,30),(3,11,40)):
            for t in (.1,.5,.9):
                full = _fill(p, size); differ = _cut(p, size, t)!=(full>=t)
                assert (abs(full[differ]-t)<1e-5).all()
    assert not _cut(spot, (23,61,47), .9).any()

def test_segment_leaves_the_network_in_its_mode_and_its_mask_can_be_written(scans, tmp_path):
    net,ct = Two().train(),open_ct(scans/'ct.nii.gz')
    mask = segment(net, spec, ct)['lesion']
    assert mask.shape==ct.shape and net.training
    save_mask(mask, ct, tmp_path/'mask.nii.gz')
    assert (open_mask(tmp_path/'mask.nii.gz', like=ct).data==mask).all()
    with pytest.raises(CTError, match='threshold: 1 is not between 0 and 1'): segment(net, spec, ct, threshold=1)

def test_the_memory_of_windows():
    "More windows need more, but a part does not grow with their number; large windows go through one at a time."
    net = NetSpec(width=8).build(('lesion',)).eval()
    assert 3<window_bytes(net, (16,96,96), 4)/window_bytes(net, (16,96,96))<=4
    assert [_at_once(o) for o in ((16,96,96),(128,128,128),(256,256,256))]==[4,2,1]

# ---- what speaks against a mask

def test_what_speaks_against_a_mask():
    "Each doubt has one warning, and an ordinary chest has none."
    ct = cached(1).ct
    def told(right, left, ct=ct, **kw):
        masks = {k:np.zeros(ct.shape, np.uint8) for k in ('lesion','right_lung','left_lung')}
        for k,v in dict(lesion=1, right_lung=right, left_lung=left).items(): masks[k].flat[:int(v/ct.ml_per_voxel)] = 1
        return Segmentation(ct, masks, **kw).notes[len(ct.notes):]
    a,b = np.zeros((2,1,1,9), np.uint8); a[...,:4] = b[...,3:7] = 1  # they share one of four voxels
    apart = ({},dict(lesion=a),dict(lesion=b))
    assert Segmentation(ct, {}, answers=apart).disagreement==pytest.approx(1-2/8)
    for o in ((), ({},*[dict(lesion=0*a)]*2)): assert np.isnan(Segmentation(ct, {}, answers=o).disagreement)
    turned = Volume(np.ascontiguousarray(ct.data[:,::-1]), ct.affine)
    assert told(2000, 1500)==()
    for got,words in ((told(9000, 8000), 'lungs of 17,000 ml'), (told(2000, 20), 'left lung of 20 ml'), (told(2000, 2000, distance=2.), 'distance of 2.0'),
                      (told(2000, 2000, answers=apart), 'differ by 75%'), (told(2000, 2000, ct=turned), 'spine is in front of the lungs')):
        assert len(got)==1 and words in got[0] and got[0].startswith('warning: ')

def test_lungs_get_their_names_back():
    "A corner with the other lung's name is renamed; a bridge is divided; a lung alone and two halves are left."
    right = torch.zeros(8, 40, 60); left = right.clone()
    right[:,5:35,5:29] = left[:,5:35,31:55] = .9; right[2:4,6:8,29:31] = .6  # a bridge
    right[:,5:10,24:29],left[:,5:10,24:29] = .2,.7
    assert (left>right)[:,:,:29].sum()==200
    name_lungs(right, left)
    assert (left>right)[:,:,:29].sum()==0==(right>left)[:,:,31:].sum() and (right>left).sum()==8*30*24+4  # half of the bridge
    one = right.clone(); none = torch.zeros_like(one); name_lungs(one, none)
    assert torch.equal(one, right) and not none.any(); name_lungs(none, none.clone())
    a = torch.zeros(4, 20, 20); b = a.clone(); a[:,2:8] = .9; b[:,12:18,:10] = a[:,12:18,10:] = .9
    c,d = a.clone(),b.clone(); name_lungs(c, d)  # half of a piece bears each name: which is it?
    assert torch.equal(c, a) and torch.equal(d, b)

class Chest(nn.Module):
    "Two lungs in fixed places, and lesions where it is bright"
    def __init__(self, least=.1):
        super().__init__()
        self.w,self.least = nn.Parameter(torch.zeros(1)),least
    def forward(self, x):
        y = torch.full((len(x),3,*x.shape[2:]), -9.)
        y[:,0][x[:,0]>.9] = 9; y[:,1,:,:,:30] = 9 if self.least<1 else -9; y[:,2,:,:,60:] = 9
        return y

def test_lesions_lie_in_lungs_and_have_a_size():
    sides = CTSpec(spacing=(4,4,4), patch=(16,90,90), classes=('lesion','right_lung','left_lung'))
    bright = np.full((30,90,90), -900, np.int16); bright[5:8,5:8,5:8] = bright[20:22,20:22,40:42] = bright[25,25,70] = 500
    vol = Volume(bright, np.diag([-4.,-4.,4.,1.]))
    def count(least=.1, **kw): return [int(round(v/.064)) for v in Segmenter(Chest(least), sides, 0., **kw)(vol).ml.values()]
    assert count(within_lungs=False)[0]==36 and count()[0]==28  # one is in no lung
    assert count(min_ml=.1)[0]==27 and count(least=2)[0]==36  # the right lung is not found
    assert count(mirror=True)[1:]==[81000,81000]
    with pytest.raises(CTError, match='min_ml: nan is not a volume'): Segmenter(Chest(), sides, min_ml=float('nan'))

def test_a_segmenter_says_how_another_process_opens_it(weights):
    one = Segmenter.load(weights/'fold_0'/'model.safetensors', 'cpu', overlap=.25)
    paths,how = one.origin
    assert Segmenter.load(paths, **how).overlap==.25 and Segmenter(Two(), spec).origin is None

def test_what_is_no_single_model(weights, tmp_path):
    "Models trained differently, the folder of one fold, no file, and folds that are not scored yet."
    net = NetSpec(width=4); save_model(net.build(spec.classes), tmp_path/'wider.safetensors', replace(spec, window=(-1000,1000)), net)
    for o,words in (([weights/'fold_0'/'model.safetensors', tmp_path/'wider.safetensors'], 'Average models that were trained alike'),
                    (weights/'fold_0', 'not a file of weights nor a cross-validation'), ([], 'no file was given')):
        with pytest.raises(CTError, match=words): Segmenter.load(o, 'cpu')
    (tmp_path/'fold_0').mkdir(); (tmp_path/'fold_0'/'scores.csv').touch(); (tmp_path/'folds.json').write_text('{"k":2}')
    with pytest.raises(CTError, match='fold 1 of 2 is not trained and scored yet'): Segmenter.load(tmp_path, 'cpu')

def test_lungs_alone(scans):
    seg = lungs(scans/'ct.nii.gz', device='cpu')
    assert list(seg.masks)==['right_lung','left_lung'] and all(v>300 for v in seg.ml.values()) and seg.kept is None
