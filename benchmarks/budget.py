"""What benchmarks/peers.py and benchmarks/recipe.py share: seven real scans in three folds by patient, a training that ends when its budget is spent, a table that says what is done already

A budget is a number of patches seen, or CPU-seconds: user + system time of the process, all its threads, drawing and augmenting patches included. Learning rate and momentum follow one cycle over the budget, so that every
network ends its schedule exactly when the budget ends, however long its steps take. The weights of the last step are scored: nothing is chosen on the scans that are scored.
"""
import csv, fcntl, os, time
from pathlib import Path

import numpy as np, torch
from fastai.callback.core import Callback, CancelFitException
from fastai.callback.schedule import combined_cos

from covid3d.cases import write_cases
from covid3d.datasets import folder

here = Path(__file__).parent

def seven_scans(out)->Path:
    "The case table of coronacases_7"
    if 'COVID3D_TEST_DATA' not in os.environ: raise SystemExit('COVID3D_TEST_DATA: not set. Let it name the folder that holds coronacases_7')
    out.mkdir(parents=True, exist_ok=True)
    if not (out/'seven.csv').exists(): write_cases(folder(Path(os.environ['COVID3D_TEST_DATA'])/'coronacases_7', already_windowed='-1000:20'), out/'seven.csv')
    return out/'seven.csv'

class Budget(Callback):
    "One cycle of learning rate and momentum over a budget; ends the fit when it is spent"
    order = 60
    def __init__(self,
        lr,          # Highest learning rate, or a slice for discriminative ones
        patches=None,# Patches to see, or
        seconds=None # CPU-seconds to spend
    ): self.lr,self.patches,self.seconds,self.seen,self.spent = lr,patches,seconds,0,0.
    def before_fit(self):
        self.opt.set_hyper('lr', self.lr)
        top = np.array([h['lr'] for h in self.opt.hypers])
        self.lrs,self.moms,self.start = combined_cos(.25, top/25, top, top/1e5),combined_cos(.25, .95, .85, .95),time.process_time()-self.spent
    @property
    def share(self): return self.seen/self.patches if self.patches else self.spent/self.seconds
    def before_batch(self):
        if not self.training: return
        self.opt.set_hyper('lr', self.lrs(min(1, self.share))); self.opt.set_hyper('mom', self.moms(min(1, self.share)))
    def after_batch(self):
        if not self.training: return
        self.seen += len(self.x); self.spent = time.process_time()-self.start
        if self.share>=1: raise CancelFitException

def budget_name(budget)->str: return '{1:g} {0}'.format(*next(iter(budget.items())))

def reset_peak(): Path('/proc/self/clear_refs').write_text('5')

def peak_mb()->float:
    "The process's greatest resident memory since `reset_peak`, in megabytes"
    return int(next(o for o in Path('/proc/self/status').read_text().splitlines() if o.startswith('VmHWM')).split()[1])/1e3

def rows(path)->list: return list(csv.DictReader(path.open())) if path.exists() else []

def done(path, **key)->bool: return any(all(r[k]==str(v) for k,v in key.items()) for r in rows(path))

def add_row(path, row):
    "Append a row, also where two processes do"
    with path.open('a') as f:
        fcntl.flock(f, fcntl.LOCK_EX)
        w = csv.DictWriter(f, row, lineterminator='\n')
        if not f.tell(): w.writeheader()
        w.writerow(row)
    print(row, flush=True)

def versions()->dict: return dict(torch=torch.__version__.split('+')[0], threads=torch.get_num_threads())
