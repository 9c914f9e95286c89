"""How much augmentation helps a short training: none, light (mirror, contrast, brightness) and the full set, on seven real scans

    COVID3D_TEST_DATA=folder python benchmarks/augment.py [--epochs 16] [--seeds 0,1,2] [--out _bench]

Three folds by patient, balanced by lesion load; a slim network (r3d_18 of width 16, random weights) on a coarse grid (6×4×4 mm), so that a run takes about two CPU-minutes. Whole-scan Dice on each scan's own grid, mean over the
scans of the fold, with the weights of the last epoch: nothing is chosen on the scans that are scored. Each run adds a row to benchmarks/augment.csv; a run that has its row already is not done again.
"""
import argparse, csv, itertools, os, time
from pathlib import Path

import torch

from covid3d.augment import Augment3d, Brightness3d, Contrast3d, Flip3d, ct_aug_transforms
from covid3d.cases import write_cases
from covid3d.datasets import folder
from covid3d.learner import CTDataLoaders, CTSpec, ScanDice, r3d_18, set_seed, unet_learner_3d

here,spec = Path(__file__).parent,CTSpec(spacing=(6,4,4), patch=(16,64,64))
table_path,names = here/'augment.csv',('augmentation','epochs','fold','seed','dice','cpu_seconds','torch')
augs = dict(none=lambda: False, light=lambda: Augment3d([Flip3d(), Contrast3d(.1, p=1), Brightness3d(p=1)], spec.spacing), full=lambda: ct_aug_transforms(spec.spacing))

def rows()->list: return list(csv.DictReader(table_path.open())) if table_path.exists() else []

def run(table, name, epochs, fold, seed)->dict:
    "Train on two folds, score the third"
    set_seed(seed, reproducible=True)
    start = time.process_time()
    dls = CTDataLoaders.from_table(table, spec, patches=10, aug=augs[name](), fold=(fold,3), device='cpu')
    learn = unet_learner_3d(dls, r3d_18, pretrained=False, width=16, metrics=[])
    with learn.no_logging(): learn.fit_one_cycle(epochs, 4e-3)
    scan = ScanDice(); scan.accumulate(learn)
    return dict(augmentation=name, epochs=epochs, fold=fold, seed=seed, dice=f'{scan.value:.3f}', cpu_seconds=f'{time.process_time()-start:.0f}', torch=torch.__version__.split('+')[0])

def main(epochs, seeds, out):
    out.mkdir(parents=True, exist_ok=True)
    write_cases(folder(Path(os.environ['COVID3D_TEST_DATA'])/'coronacases_7', already_windowed='-1000:20'), out/'augment.csv')
    for seed,fold,name in itertools.product(seeds, range(3), augs):
        if any((r['augmentation'],int(r['epochs']),int(r['fold']),int(r['seed']))==(name,epochs,fold,seed) for r in rows()): continue
        row,new = run(out/'augment.csv', name, epochs, fold, seed),not table_path.exists()
        with table_path.open('a') as f:
            w = csv.DictWriter(f, names, lineterminator='\n')
            if new: w.writeheader()
            w.writerow(row)
        print(row, flush=True)

if __name__=='__main__':
    p = argparse.ArgumentParser(); p.add_argument('--epochs', type=int, default=16); p.add_argument('--seeds', default='0,1,2'); p.add_argument('--out', type=Path, default=here.parent/'_bench')
    a = p.parse_args(); main(a.epochs, [int(o) for o in a.seeds.split(',')], a.out)
