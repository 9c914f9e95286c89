"Whole scans as patches; the paper's three data sets from folders to the table, killed and gone on with"
import json

import numpy as np, pytest, torch
from safetensors import safe_open

from covid3d.cases import read_cases
from covid3d.data import CTDataLoaders, prepare_table
from covid3d.inference import NetSpec, load_model, save_model, segment
from covid3d.phantom import phantom, write_phantoms
from covid3d.transforms import CTSpec, resize
from covid3d.volume import CTError

each = pytest.mark.parametrize

# The whole scan as one patch

class Grey(torch.nn.Module):
    "Says yes where the input is above .4, and counts how often it was asked"
    def __init__(self): super().__init__(); self.w = torch.nn.Parameter(torch.tensor(20.)); self.seen = []
    def forward(self, x): self.seen.append(tuple(x.shape)); return self.w*(x-.4)

@each('patch', [(12,40,44), (48,128,100)])
def test_whole_scan_is_one_window_and_comes_back_to_its_own_grid(patch):
    ph,spec,net = phantom(2, shape=(32,96,96), spacing=(9,3.7,3.7)),CTSpec(None, patch=patch),Grey()
    mask = segment(net, spec, ph.ct)['lesion']
    assert net.seen==[(1,1,*patch)] and mask.shape==ph.ct.shape and mask.dtype==np.uint8
    want = resize((20*(spec.prepare(ph.ct)-.4)).sigmoid(), ph.ct.shape)[0]>=.5
    assert (mask!=want.numpy()).mean()<1e-4 and 0<mask.mean()<1
    with pytest.raises(CTError, match='threshold'): segment(net, spec, ph.ct, threshold=1)

def test_weights_carry_that_there_is_no_spacing(tmp_path):
    "and files from before, with a spacing, still open"
    net = NetSpec(width=4); model = net.build(('lesion',))
    for spec in (CTSpec(None, patch=(8,32,32)), CTSpec()):
        save_model(model, tmp_path/'m.safetensors', spec, net); back = load_model(tmp_path/'m.safetensors')[1]
        assert back==spec and back.whole==(spec.spacing is None)
    with safe_open(tmp_path/'m.safetensors', 'pt') as f: assert json.loads(f.metadata()['covid3d'])['ct']==dict(spacing=[4,2.8,2.8], window=[-1000,400], patch=[16,96,96], classes=['lesion'])

def test_prepared_folder_of_whole_scans(tmp_path):
    table = write_phantoms(tmp_path/'data', n=3, seed=0, shape=(32,96,96), spacing=(9,3.7,3.7)); spec = CTSpec(None, patch=(8,32,32))
    prepare_table(table, tmp_path/'p', spec); before = sorted(tmp_path.glob('p/*'))
    dls = CTDataLoaders.from_table(tmp_path/'p', bs=1, patches=1, aug=None)
    assert dls.spec==spec and dls.train.one_batch()[0].shape==(1,1,8,32,32) and sorted(tmp_path.glob('p/*'))==before
    assert [o.shape[1:] for o in (dls.reader(c).ct for c in read_cases(table))]==[(8,32,32)]*3
    dls = CTDataLoaders.from_table(tmp_path/'p', bs=1, patches=1, aug=None, on_batch=True)   # cut larger than the scan, turned, and cut to it
    assert dls.train.one_batch()[0].shape==(1,1,8,32,32)
