"""Does a pretrained encoder help? The same budget of patches from pretrained and from random weights, whole held-out scans scored on the way

    COVID3D_TEST_DATA=folder python benchmarks/transfer.py FILE [--alike] [--folds 3] [--seeds 0 1 2] [--patches 480] [--points 4] [--phantoms] [--out CSV]

FILE is what `covid3d pretrain` writes. Both arms see the same patches in the same order and start from the same decoder, with one cycle up to the same highest rate. As in `covid3d train`, the stem and the first layer of the
pretrained encoder stay frozen and its rates rise to the decoder, so a lead is one of weights, frozen stages and rates together; with `--alike` both arms are trained alike and only the first weights differ. Each run adds a row
for each evaluation point (`moment`) to benchmarks/transfer.csv, and a run that has its rows is not repeated. Seconds are user + system time of the process without the scoring. `--phantoms` takes four phantoms, small patches and
the lung in place of the seven real scans: the smallest form, to see that it runs.
"""
import argparse, tempfile, time
from pathlib import Path

import torch
from fastai.callback.core import Callback
from fastai.torch_core import set_seed

from budget import add_row, done, here, seven_scans
from covid3d.augment import light_aug_transforms
from covid3d.data import CTDataLoaders
from covid3d.encoder import encoder_info
from covid3d.learner import ScanDice, unfreeze_for, unet_learner_3d
from covid3d.phantom import write_phantoms
from covid3d.transforms import CTSpec

class Curve(Callback):
    "Whole-scan Dice after each epoch, against patches seen and seconds of training"
    order = 62
    def before_fit(self): self.rows, self.seconds, self.seen = [], 0., 0
    def before_train(self): self.start = time.process_time()
    def after_batch(self): self.seen += len(self.xb[0])*self.training
    def after_train(self): self.seconds += time.process_time()-self.start
    def after_epoch(self):
        self.rows.append(dict(moment=self.epoch+1, patches=self.seen, seconds=round(self.seconds, 2), dice=self.recorder.values[-1][-1]))

def run(table, weights, fold, seed, patches, points, alike=False, spec=None, lr=2e-3, bs=2, **net) -> list:
    "A row for each evaluation point of one training; random weights where `weights` is None"
    loaders = lambda n: CTDataLoaders.from_table(table, spec, bs=bs, patches=n, aug=light_aug_transforms(), fold=fold, device='cpu')
    steps = len(loaders(bs).train_ds)//bs
    set_seed(seed, reproducible=True)
    learn = unet_learner_3d(loaders(max(bs, round(patches/points/steps))), pretrained=weights or False, metrics=[ScanDice()], **net)
    learn.model.to(memory_format=torch.channels_last_3d)
    curve = Curve()
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(points, unfreeze_for(learn, weights, lr, *((0, 1.) if alike else (2, 3.))), cbs=[curve])
    return curve.rows

def main():
    p = argparse.ArgumentParser()
    p.add_argument('weights', type=Path); p.add_argument('--alike', action='store_true'); p.add_argument('--phantoms', action='store_true')
    for k,v in dict(folds=3, patches=480, points=4).items(): p.add_argument(f'--{k}', type=int, default=v)
    p.add_argument('--seeds', type=int, nargs='+', default=[0]); p.add_argument('--out', type=Path, default=here/'transfer.csv')
    a = p.parse_args()
    info,tmp,spec = encoder_info(a.weights),Path(tempfile.mkdtemp()),None
    net = {k:info[k] for k in ('width','norm') if info.get(k)}|dict(arch=info.get('encoder', 'r3d_18'))
    if a.phantoms: spec = CTSpec((9,7,7), patch=(16,32,32), classes=('lung',))
    table = write_phantoms(tmp/'scans', n=4, seed=1, shape=(32,96,96), spacing=(9,3.7,3.7)) if a.phantoms else seven_scans(tmp)
    for seed in a.seeds:
        for i in range(a.folds):
            for label,file in (('random',None), ('alike' if a.alike else 'pretrained',a.weights)):
                key = dict(weights=label, fold=f'{i}/{a.folds}', seed=seed, budget=a.patches)
                if done(a.out, **key): continue
                for row in run(table, file, (i,a.folds), seed, a.patches, a.points, a.alike, spec, lr=.02 if a.phantoms else 2e-3, **net): add_row(a.out, key|row)

if __name__=='__main__': main()
