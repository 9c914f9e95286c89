"""The commands as a user types them, on seven real scans: a table of cases, `covid3d train` with its defaults but for the weights, scores and a picture of unseen scans

    COVID3D_TEST_DATA=folder python benchmarks/coronacases.py [--weights random] [--seed 0] [--out _bench]

`folder/coronacases_7` holds `ct/`, `lung_mask/` and `infection_mask/`. Trained on 001-004, weights chosen on 005, scored on 006 and 007, whole scans on their own grids.
Each run adds a row to benchmarks/coronacases.csv. CPU-seconds are user + system time of all processes, reading, validation and choosing of weights included. (The MONAI row is of an earlier version of this script; benchmarks/peers.py compares now.)
"""
import argparse, csv, os, resource, subprocess, sys
from pathlib import Path

import matplotlib.pyplot as plt, torch

from covid3d.evaluate import score_cases
from covid3d.inference import Segmenter
from covid3d.learner import CTDataLoaders, dice, read_cases
from covid3d.weights import load_model
from covid3d.show import outline_colors, pick_slices, show_slice

here = Path(__file__).parent

def cpu(who):
    r = resource.getrusage(who)
    return r.ru_utime+r.ru_stime

def covid3d(*argv): subprocess.run([Path(sys.executable).with_name('covid3d'), *map(str, argv)], check=True)

def add_row(network, model, seed, spent, steps, scores):
    "Append a row to the table"
    path,d = here/'coronacases.csv',{f'dice_{s.case[-3:]}':f'{s.dice:.3f}' for s in scores.itertuples()}
    row = dict(network=network, parameters=sum(p.numel() for p in model.parameters()), torch=torch.__version__.split('+')[0], threads=torch.get_num_threads(), seed=seed,
               cpu_seconds=f'{spent:.0f}', steps=steps, **d, mean_dice=f'{scores.dice.mean():.3f}')
    new = not path.exists()
    with path.open('a') as f:
        w = csv.DictWriter(f, row, lineterminator='\n')
        if new: w.writeheader()
        w.writerow(row)
    print(row, flush=True)

def steps_an_epoch(out): return len(CTDataLoaders.from_table(out/'cases.csv', patches=24).train)

def ours(out, weights, seed):
    "The commands as a user types them, with their defaults"
    start = cpu(resource.RUSAGE_CHILDREN)
    covid3d('train',out/'cases.csv','--out',out/'run','--init',weights,'--seed',seed,'--device','cpu','--overwrite')
    spent = cpu(resource.RUSAGE_CHILDREN)-start
    model,spec,net = load_model(out/'run'/'model.safetensors')
    epochs = len((out/'run'/'history.csv').read_text().splitlines())-1
    segmenter,cases = Segmenter(model, spec),read_cases(out/'cases.csv', 'test')
    add_row(f'covid3d {net.encoder} of width {net.width}'+', pretrained'*(weights!='random'), model, seed, spent, epochs*steps_an_epoch(out), score_cases(segmenter, cases))
    if seed==0: picture(segmenter, cases)

def picture(segmenter, cases):
    "CT, human mask and prediction of the test scans"
    fig,axs = plt.subplots(len(cases), 4, figsize=(11,6.1), layout='constrained')
    for row,case in zip(axs, cases):
        seg = segmenter(case)
        ct,pred = seg.ct,seg.masks['lesion']
        human = case.open_mask('lesion', ct).data
        for ax,i in zip(row, pick_slices(human, 4)): show_slice(ct.data[i], [human[i],pred[i]], ax, (-1000,20), title=f'{case.name}, axial {i}')
        row[0].text(.03, .97, 'R', color='white', fontsize=9, transform=row[0].transAxes, va='top')
        row[-1].text(1.02, .5, f'Dice {dice(pred,human):.2f}', rotation=90, va='center', transform=row[-1].transAxes)
    fig.legend([plt.Line2D([],[],color=c) for c in outline_colors], ['human readers','covid3d'], loc='outside lower center', ncols=2, frameon=False)
    fig.savefig(here.parent/'nbs'/'images'/'coronacases.jpg', dpi=80, facecolor='white', pil_kwargs=dict(quality=80))

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, default=Path('_bench')); p.add_argument('--seed', type=int, default=0); p.add_argument('--weights', default='random', help='random, or a file such as covid3d pretrain writes')
    a = p.parse_args()
    if 'COVID3D_TEST_DATA' not in os.environ: sys.exit('COVID3D_TEST_DATA: not set. Let it name the folder that holds coronacases_7')
    covid3d('table',Path(os.environ['COVID3D_TEST_DATA'])/'coronacases_7','--valid','coronacases_005','--test','coronacases_006','--test','coronacases_007',
            '--already-windowed','-1000:20','-o',a.out/'cases.csv','--overwrite')
    ours(a.out, a.weights, a.seed)
