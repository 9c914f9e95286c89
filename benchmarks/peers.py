"""This library's network beside its peers: seven real scans, three folds by patient, Dice and surface Dice of whole scans on their own grids

    COVID3D_TEST_DATA=folder python benchmarks/peers.py [--seconds 200 | --patches 68] [--networks …] [--folds 0,1,2] [--seeds 0] [--lr 2e-3] [--weights covid3d] [--out _bench]

Peers: MONAI's UNet, SegResNet and DynUNet, nnU-Net's default plain and residual networks, and the recipe that resizes whole volumes to 20×224×224 (the whole r3d_18, batch 1, rate 1e-3, weight decay 1e-4).
All but the last get the same cases, grid (4×2.8×2.8 mm), patches (16×96×96), batch size, augmentation, optimiser, schedule and sliding window. The peers train with Dice + cross-entropy, the default of nnU-Net and the usual choice with
MONAI; ours with its own default, Dice + focal loss, all of it trained at one rate, as `train` does. `covid3d` starts from the weights that come with the library, or from a file (`--weights`), and ends half-way between these and the trained ones, as `train` does by default; `covid3d scratch` is
the same network from random weights. That is not what nnU-Net's own program would do: its
planner would choose near 0.7 mm and patches of millions of voxels, of which these budgets pay for none.
`cpu_seconds` is training alone, `step` one batch of it, `inference` one scan, `peak_mb` the process's resident memory in training, PyTorch and data included. Each run adds a row to benchmarks/peers.csv; a run that has its row
is not repeated; `weights` is the digest of the file of the start. `--table` prints the means, with the 95 % bootstrap interval over patients; nbs/50_benchmarks.ipynb draws them.
"""
import argparse, hashlib, itertools, time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pandas as pd, torch
from fastai.learner import Learner

from budget import Budget, add_row, budget_name, done, here, peak_mb, reset_peak, seven_scans, versions
from covid3d.evaluate import score_cases
from covid3d.inference import Segmenter
from covid3d.learner import CTDataLoaders, CTSpec, DiceCELoss, EMA, light_aug_transforms, set_seed, unet_learner_3d
from covid3d.statistics import compare, mean_interval, score_table
from covid3d.transforms import ResizeSpec
from covid3d.weights import load_model, weights_file
from memory import nnunet

path,spec,whole = here/'peers.csv',CTSpec(),ResizeSpec()

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

def plain(deep=False, **kwargs): return nnunet(spec.patch, deep=deep, **kwargs)  # without deep supervision, as DynUNet here: one loss for all

peers = {'MONAI UNet':monai_unet, 'MONAI SegResNet':segresnet, 'MONAI DynUNet':dynunet, 'nnU-Net plain':plain, 'nnU-Net residual':lambda: plain(residual=True)}

def learner(name, dls, weights):
    "The learner; ours as `covid3d train` builds it from these weights, and its twin from scratch"
    if name in peers: learn = Learner(dls, peers[name](), loss_func=DiceCELoss(), metrics=[])
    elif name=='whole-volume resize': learn = unet_learner_3d(dls, pretrained=False, loss_func=DiceCELoss(), metrics=[], wd=1e-4)
    else:
        learn = unet_learner_3d(dls, load_model(weights_file(weights))[2], pretrained=False if name.endswith('scratch') else weights, metrics=[])
        learn.unfreeze()
    learn.model.to(memory_format=torch.channels_last_3d)
    return learn

def run(table, name, fold, seed, budget, lr, weights):
    "Train and score one network"
    set_seed(seed, reproducible=True)
    resize = name=='whole-volume resize'
    s,bs = (whole,1) if resize else (spec,2)
    dls = CTDataLoaders.from_table(table, s, bs=bs, fold=(fold,3), patches=6, device='cpu', aug=light_aug_transforms())
    learn = learner(name, dls, weights)
    b,half = Budget(lr, **budget),EMA(0, learn.model) if name=='covid3d' else None
    reset_peak()
    with learn.no_bar(), learn.no_logging(): learn.fit(10**6, cbs=b)
    if half: half.learn = learn; learn.model.load_state_dict(half.averaged())
    peak,model = peak_mb(),learn.model.eval()
    segmenter = Segmenter(model, s, .25)
    t = time.process_time(); segmenter(dls.valid_cases[0]); t = time.process_time()-t
    df = score_cases(segmenter, dls.valid_cases)
    each = lambda k: ' '.join(f'{c[-3:]}:{v:.3f}' for c,v in zip(df.case, df[k]))
    return dict(network=name, budget=budget_name(budget), lr=lr, fold=fold, seed=seed, dice=f'{df.dice.mean():.3f}', nsd=f'{df.nsd.mean():.3f}', cases=each('dice'), nsd_cases=each('nsd'), patches=b.seen, cpu_seconds=f'{b.spent:.0f}',
        step=f'{b.spent*bs/b.seen:.3f}', inference=f'{t:.1f}', peak_mb=f'{peak:.0f}', parameters=sum(p.numel() for p in model.parameters()), **versions(), weights=digest(name, weights))

def digest(name, weights)->str: return hashlib.blake2b(Path(weights_file(weights)).read_bytes(), digest_size=4).hexdigest() if name=='covid3d' else ''

def default_lr(name)->float: return {'whole-volume resize':1e-3, 'covid3d':5e-4}.get(name, 2e-3)

def by_case(collapsed=True)->tuple:
    "Dice of each scan, the mean of its seeds; and the rows of the file, with or without runs that scored 0 on every scan"
    df = pd.read_csv(path)
    if not collapsed: df = df[df.dice>0].copy()
    df['network'] = df.network+[f', rate {r.lr:g}'*(r.lr!=default_lr(r.network)) for r in df.itertuples()]
    rows = [dict(budget=r.budget, network=r.network, case=c, dice=float(d), nsd=float(n)) for r in df.itertuples() for (c,d),(_,n) in zip(*([o.split(':') for o in k.split()] for k in (r.cases,r.nsd_cases)))]
    return pd.DataFrame(rows).groupby(['budget','network','case'], sort=False).mean().reset_index(),df

def table(**kwargs)->pd.DataFrame:
    "Means over the scans, with the 95 % bootstrap-t interval over patients, best first in each budget"
    each,df = by_case(**kwargs); key = ['budget','network']
    def line(d): return pd.Series(dict(scans=len(d), dice=d.dice.mean(), **dict(zip(('low','high'), mean_interval(d.dice.to_numpy(), d.case, (0,1)))), nsd=d.nsd.mean()))
    res = each.groupby(key, sort=False)[['case','dice','nsd']].apply(line)
    g = df.groupby(key, sort=False)
    res = res.join(g.agg(runs=('dice','size'), seeds=('seed','nunique'), patches=('patches','mean'), cpu_seconds=('cpu_seconds','mean'), step=('step','median'), inference=('inference','median'), peak_mb=('peak_mb','median'), parameters=('parameters','first')))
    return res.sort_values(['budget','dice'], ascending=[True,False])

def paired(name='covid3d', **kwargs)->pd.DataFrame:
    "Difference to each other network on the same scans (above 0: `name` is ahead), its 95 % interval over patients, and p of the sign-flip test, at least 2/128 with seven patients"
    each,rows = by_case(**kwargs)[0],[]
    for (budget,k),d in each.groupby(['budget','network'], sort=False):
        mine = each[(each.budget==budget)&(each.network==name)&each.case.isin(d.case)]
        if k!=name and len(mine):
            c = compare(score_table(mine), score_table(d))
            rows.append(dict(budget=budget, network=k, scans=c['n'], difference=c['difference'], low=c['low'], high=c['high'], p=c['p']))
    return pd.DataFrame(rows)

def plot():
    "A panel a budget: scans as dots, mean and interval"
    import matplotlib.pyplot as plt
    t,each = table(),by_case()[0]
    budgets = list(dict.fromkeys(b for b,_ in t.index))
    fig,axs = plt.subplots(1, len(budgets), figsize=(10,3.4), layout='constrained', squeeze=False)
    for ax,b in zip(axs[0], budgets):
        rows = t.loc[b][::-1]
        for i,(name,r) in enumerate(rows.iterrows()):
            own = '#D55E00' if name.startswith('covid3d') else '#555555'
            d = each[(each.budget==b)&(each.network==name)].dice
            ax.plot(d, [i]*len(d), 'o', ms=4, color=own, alpha=.35, mew=0)
            ax.plot([r.low,r.high], [i,i], color=own, lw=2); ax.plot(r.dice, i, 'D', ms=6, color=own)
        ax.set(yticks=range(len(rows)), yticklabels=[k+f' ({r.patches:,.0f} patches)'*('seconds' in b) for k,r in rows.iterrows()], ylim=(-.6,len(rows)-.4), xlim=(-.02,1), xlabel='Dice of a whole scan', title=b.replace('seconds','CPU-seconds'))
        ax.grid(axis='x', alpha=.3); ax.spines[['top','right']].set_visible(False)
    return fig

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--seconds', type=float); p.add_argument('--patches', type=int); p.add_argument('--networks', default=','.join([*peers,'whole-volume resize','covid3d scratch','covid3d']))
    p.add_argument('--folds', default='0,1,2'); p.add_argument('--seeds', default='0'); p.add_argument('--weights', default='covid3d'); p.add_argument('--lr', type=float)
    p.add_argument('--out', type=Path, default=here.parent/'_bench'); p.add_argument('--table', action='store_true')
    a = p.parse_args()
    if a.table: print(table().round(3).to_string(), paired().round(3).to_string(), sep='\n\n'); raise SystemExit
    budget = dict(patches=a.patches) if a.patches else dict(seconds=a.seconds or 200)
    for seed,fold,name in itertools.product(map(int, a.seeds.split(',')), map(int, a.folds.split(',')), a.networks.split(',')):
        lr = a.lr or default_lr(name)
        key = dict(network=name, budget=budget_name(budget), lr=lr, fold=fold, seed=seed, weights=digest(name, a.weights))
        if done(path, **key): continue
        with ProcessPoolExecutor(1, get_context('spawn')) as pool:  # its own process, so that its memory is its own
            add_row(path, pool.submit(run, seven_scans(a.out), name, fold, seed, budget, lr, a.weights).result())
