"""This library's network beside MONAI's UNet, SegResNet and DynUNet and the whole-volume-resize recipe: seven real scans, three folds by patient, whole-scan Dice on each scan's own grid

    COVID3D_TEST_DATA=folder python benchmarks/peers.py [--seconds 300 | --patches 300] [--networks …] [--folds 0,1,2] [--seeds 0] [--encoder FILE] [--out _bench]

All get the same cases, grid (4×2.8×2.8 mm), patches (16×96×96), batch size, augmentation, loss, optimiser, schedule and sliding window; only the network differs. The resize recipe squeezes each scan to 20×224×224 instead.
Each run adds a row to benchmarks/peers.csv; a run that has its row is not repeated. `--table` prints the means.
"""
import argparse, itertools
from pathlib import Path

import numpy as np, pandas as pd, torch
from fastai.data.core import DataLoaders
from fastai.learner import Learner
from torch.nn import functional as F

from budget import Budget, add_row, done, here, seven_scans, versions
from covid3d.evaluate import score_cases
from covid3d.learner import CTDataLoaders, CTSpec, DiceCELoss, dice, light_aug_transforms, set_seed, unet_learner_3d

spec = CTSpec()
path = here/'peers.csv'

def monai_unet():
    from monai.networks.nets import UNet
    return UNet(3, 1, 1, channels=(16,32,64,128,256), strides=(2,2,2,2), num_res_units=2, norm='instance')

def segresnet():
    from monai.networks.nets import SegResNet
    return SegResNet(3, init_filters=16, in_channels=1, out_channels=1)

def dynunet():
    "nnU-Net's rule for a patch of 16×96×96: halved while an axis keeps 4 voxels"
    from monai.networks.nets import DynUNet
    strides = [1,2,2,(1,2,2),(1,2,2)]
    return DynUNet(3, 1, 1, kernel_size=[3]*5, strides=strides, upsample_kernel_size=strides[1:], filters=[32,64,128,256,320])

peers = {'MONAI UNet':monai_unet, 'MONAI SegResNet':segresnet, 'MONAI DynUNet':dynunet}

class WholeVolumes:
    "Scans squeezed to 20×224×224, for the recipe that resizes whole volumes; its idea, not its code"
    size = 20,224,224
    def __init__(self, dls):
        at = lambda c: (F.interpolate(torch.from_numpy(np.array(dls.reader(c).ct))[None].float()/255, self.size, mode='trilinear')[0],
                        (F.interpolate(torch.from_numpy(np.array(dls.reader(c).masks))[None].float(), self.size, mode='trilinear')[0]>=.5).float())
        self.dls = DataLoaders.from_dsets([at(c) for c in dict.fromkeys(dls.train_ds.items)], [at(c) for c in dls.valid_cases[:1]], bs=1, shuffle=True, num_workers=0, device='cpu')
    def dice(self, model, case)->float:
        ct = case.open_ct()
        with torch.inference_mode():
            x = F.interpolate(spec.prepare(ct)[None], self.size, mode='trilinear')
            p = F.interpolate(model.eval()(x).sigmoid(), ct.shape, mode='trilinear')[0,0]
        return dice(p.numpy()>=.5, case.open_mask('lesion', ct).data)

def run(table, name, fold, seed, budget, lr, encoder):
    "Train and score one network"
    set_seed(seed, reproducible=True)
    bs = 1 if name=='whole-volume resize' else 2
    dls = CTDataLoaders.from_table(table, spec, bs=bs, fold=(fold,3), patches=6, device='cpu', aug=light_aug_transforms())
    if name in peers:
        learn = Learner(dls, peers[name](), loss_func=DiceCELoss(), metrics=[]); learn.spec = spec
    elif name=='whole-volume resize':
        whole = WholeVolumes(dls)
        learn = unet_learner_3d(whole.dls, pretrained=False, spec=spec, metrics=[])
    else: learn = ours(dls, encoder if name.endswith('pretrained') else False)
    learn.model.to(memory_format=torch.channels_last_3d)
    b = Budget(slice(lr/10, lr) if name=='covid3d pretrained' else lr, **budget)
    with learn.no_bar(), learn.no_logging(): learn.fit(10**6, cbs=b)
    if name=='whole-volume resize': d = {c.name:whole.dice(learn.model, c) for c in dls.valid_cases}
    else: d = {s.case:s.dice for s in score_cases(learn.model.eval(), spec, dls.valid_cases, .25)}
    return dict(network=name, budget='{1:g} {0}'.format(*next(iter(budget.items()))), lr=lr, fold=fold, seed=seed, dice=f'{np.mean([*d.values()]):.3f}', cases=' '.join(f'{k[-3:]}:{v:.3f}' for k,v in d.items()),
        patches=b.seen, cpu_seconds=f'{b.spent:.0f}', parameters=sum(p.numel() for p in learn.model.parameters()), **versions())

def ours(dls, encoder):
    "As `covid3d train` builds it: r3d_18 of width 16 from random weights, or whatever the encoder file holds (then with rates that rise from the stem to the decoder)"
    learn = unet_learner_3d(dls, pretrained=encoder or False, width=None if encoder else 16, metrics=[])
    learn.unfreeze()
    return learn

def table()->pd.DataFrame:
    "Mean Dice, and from the least to the greatest mean of a fold"
    df = pd.read_csv(path)
    g = df.groupby(['budget','network'], sort=False)
    return g.agg(runs=('dice','size'), dice=('dice','mean'), least=('dice','min'), greatest=('dice','max'), patches=('patches','mean'), cpu_seconds=('cpu_seconds','mean'), parameters=('parameters','first')).round(3)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seconds', type=float); p.add_argument('--patches', type=int); p.add_argument('--networks', default=','.join([*peers,'whole-volume resize','covid3d','covid3d pretrained']))
    p.add_argument('--folds', default='0,1,2'); p.add_argument('--seeds', default='0'); p.add_argument('--encoder'); p.add_argument('--lr', type=float, default=2e-3)
    p.add_argument('--out', type=Path, default=here.parent/'_bench'); p.add_argument('--table', action='store_true')
    a = p.parse_args()
    if a.table: print(table().to_string()); raise SystemExit
    budget = dict(patches=a.patches) if a.patches else dict(seconds=a.seconds or 300)
    for seed,fold,name in itertools.product(map(int, a.seeds.split(',')), map(int, a.folds.split(',')), a.networks.split(',')):
        if name.endswith('pretrained') and not a.encoder: continue
        key = dict(network=name, budget='{1:g} {0}'.format(*next(iter(budget.items()))), lr=a.lr, fold=fold, seed=seed)
        if not done(path, **key): add_row(path, run(seven_scans(a.out), name, fold, seed, budget, a.lr, a.encoder))
