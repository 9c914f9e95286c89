"""What ten thousand scans and more cost besides segmenting them: synthetic tasks through the scheduler, and the table and pages at the end of a run

    python benchmarks/cohort.py [--scans 1000,10000] [--tasks 1000,10000] [--out _bench]

`scheduler`: tasks that return the row of a scan at once, on two local workers; `seconds` is what handing out and collecting takes, `peak_mb` the most resident memory of the process that hands them out.
`pages`: the figures and the thumbnail of one phantom under n names, and what `write_cohort` makes of them. A row each in benchmarks/cohort.csv; one run.
"""
import argparse, ast, os, resource, shutil, subprocess, sys, tempfile, time
from pathlib import Path

import pandas as pd

here = Path(__file__).parent

def row(i, wait, threads): return dict(scan=f's{i:07}', state='written', written='0'*16, masks='a / b / c', lesion_ml='1.0')

def scheduler(n):
    from covid3d.workers import run_tasks
    import cohort  # a worker imports this file under its name
    t = time.perf_counter(); k = sum(1 for _ in run_tasks(cohort.row, ((i,) for i in range(n)), (0,), workers=2)); assert k==n
    return time.perf_counter()-t,dict()

def pages(n):
    import numpy as np
    from covid3d.cohort import write_cohort
    from covid3d.inference import Segmentation
    from covid3d.phantom import phantom
    from covid3d.quantify import quantify
    from covid3d.report import report
    ph = phantom(23, (40,110,110), (8.,3.4,3.4))
    seg = Segmentation(ph.ct, dict(lesion=ph.lesion.data, right_lung=(ph.lung.data==1).astype(np.uint8), left_lung=(ph.lung.data==2).astype(np.uint8)))
    with tempfile.TemporaryDirectory(dir=os.environ['COHORT_OUT']) as d:
        d = Path(d); found = quantify(seg); found.save(d/'x.json', name='x'); report(seg, d/'x.html', 'x', found, d/'x.png'); (d/'x.html').unlink()
        for i in range(n): shutil.copy(d/'x.json', d/f's{i:07}.json'); shutil.copy(d/'x.png', d/f's{i:07}.png')
        t = time.perf_counter(); made = write_cohort(d, [f's{i:07}' for i in range(n)])
        return time.perf_counter()-t,dict(pages=len(made)-1, csv_mb=round((d/'measurements.csv').stat().st_size/1e6, 1), page_mb=round((d/'index.html').stat().st_size/1e6, 1))

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for k,v in dict(scans='1000,10000', tasks='1000,10000', out='_bench', one='').items(): p.add_argument(f'--{k}', default=v)
    a = p.parse_args()
    if a.one:
        what,n = a.one.split(':'); secs,more = dict(scheduler=scheduler, pages=pages)[what](int(n))
        print(f'\nROW {dict(what=what, scans=int(n), seconds=round(secs, 1), peak_mb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss//1000)|more}'); return
    Path(a.out).mkdir(exist_ok=True); rows = []
    env = os.environ|dict(OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore', COHORT_OUT=str(Path(a.out).resolve()), PYTHONPATH=f'{here.resolve()}:{os.environ.get("PYTHONPATH", "")}')
    for what,ns in (('scheduler',a.tasks), ('pages',a.scans)):
        for n in ns.split(','):  # each in a process of its own
            out = subprocess.run([sys.executable, __file__, '--one', f'{what}:{n}'], env=env, capture_output=True, text=True)
            line = next((o for o in out.stdout.splitlines() if o.startswith('ROW ')), None)
            if not line: raise SystemExit(out.stderr[-2000:])
            rows.append(ast.literal_eval(line[4:])); print(rows[-1], flush=True)
            pd.DataFrame(rows).to_csv(here/'cohort.csv', index=False)

if __name__=='__main__': main()
