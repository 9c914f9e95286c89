"A Segmenter gives the same masks whatever stands for the scan, and a Segmentation holds what follows from them"
import json
from types import SimpleNamespace

import matplotlib; matplotlib.use('Agg')
import numpy as np, pytest, torch
from torch import nn

from covid3d.cases import Case
from covid3d.cli import main
from covid3d.dicom import write_series
from covid3d.inference import Segmentation, Segmenter, as_volume
from covid3d.weights import Ensemble, NetSpec, Seen, save_model
from covid3d.transforms import CTSpec
from covid3d.volume import CTError, open_ct, open_mask, save_volume
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
        assert str(e.value)==(f'scan: an object of type {type(what).__name__} is no scan. '
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
