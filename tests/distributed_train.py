"""A training on the processes that torchrun starts, or on one: not a test, started by those of distributed training.

distributed_train.py FOLDER BATCH: patches drawn beforehand, from FOLDER/patches.safetensors; weights and scores to FOLDER."""
import json, sys
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.data.core import DataLoaders
from fastai.data.load import DataLoader
from fastai.optimizer import SGD
from fastai.torch_core import rank_distrib, set_seed
from safetensors.torch import load_file, save_file
from torch import nn

from covid3d.distributed import joined, split_training
from covid3d.learner import CTSpec, r3d_18, unet_learner_3d

class FrozenNorms(Callback):
    "All BatchNorm as in evaluation: else the samples of a batch are mixed"
    def before_train(self):
        for m in self.model.modules():
            if isinstance(m, nn.modules.batchnorm._BatchNorm): m.eval()

def data(folder, bs):
    t = load_file(folder/'patches.safetensors')
    both = list(zip(t['x'], t['y']))
    return DataLoaders(DataLoader(both[:11], bs=bs, shuffle=True, drop_last=True), DataLoader(both[11:], bs=bs), device=torch.device('cpu'))

def run(folder, bs):
    set_seed(0)
    dls = data(folder, bs)
    learn = unet_learner_3d(dls, r3d_18, pretrained=False, spec=CTSpec(spacing=(9,7,7), patch=(16,32,32)), width=4, opt_func=SGD, cbs=FrozenNorms())
    start = torch.cat([p.detach().flatten() for p in learn.model.parameters()])
    with split_training(learn), learn.no_bar(): learn.fit_one_cycle(3, 1.5)
    name = f'{folder}/batch{bs}-rank{rank_distrib()}'
    save_file({k:v.contiguous() for k,v in learn.model.state_dict().items()}, f'{name}.safetensors')
    moved = (torch.cat([p.detach().flatten() for p in learn.model.parameters()])-start).abs().max()
    Path(f'{name}.json').write_text(json.dumps(dict(values=[[float(o) for o in v] for v in learn.recorder.values], moved=float(moved))))

if __name__=='__main__':
    torch.set_num_threads(1)
    with joined('cpu'): run(Path(sys.argv[1]), int(sys.argv[2]))
