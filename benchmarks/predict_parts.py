"""Where the time of `covid3d predict` on one DICOM series goes

    python benchmarks/predict_parts.py SERIES [--rounds 5]

Each round is a process of its own. A row for each part in benchmarks/predict_parts.csv: median, least and greatest seconds.
"""
import argparse, json, os, subprocess, sys, tempfile, time
from functools import wraps
from pathlib import Path

here = Path(__file__).parent

def once(series, out) -> dict: # Part → seconds
    secs,start = {},time.perf_counter()
    def timed(what, f):
        @wraps(f)
        def g(*args, **kwargs):
            t = time.perf_counter()
            try: return f(*args, **kwargs)
            finally: secs[what] = secs.get(what, 0)+time.perf_counter()-t
        return g
    timed('import PyTorch and torchvision', lambda: __import__('torchvision'))()
    import covid3d.predict as p
    from covid3d.cli import main
    from covid3d.inference import Segmenter
    secs['import the rest'] = time.perf_counter()-start-sum(secs.values())
    Segmenter.__call__ = timed('network', Segmenter.__call__)
    for what,name in (('read and check the series','_open'), ('figures','_measure'), ('page','report')): setattr(p, name, timed(what, getattr(p, name)))
    writers = p._mask_writers
    p._mask_writers = lambda *args: {k:timed('write the masks', w) for k,w in writers(*args).items()}
    if main(['predict',series,'-o',out,'--quiet']): raise SystemExit(1)
    secs['rest'] = (whole := time.perf_counter()-start)-sum(secs.values())
    return secs|{'all':whole}

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('series'); p.add_argument('--rounds', type=int, default=5); p.add_argument('--one', help=argparse.SUPPRESS)
    a = p.parse_args()
    if a.one: print(json.dumps(once(a.series, a.one))); raise SystemExit
    import pandas as pd  # not at the top: a round starts without the packages
    from budget import versions
    rows = []
    for i in range(a.rounds):
        with tempfile.TemporaryDirectory() as d:
            out = subprocess.run([sys.executable, __file__, a.series, '--one', d], capture_output=True, text=True, env=os.environ|dict(PYTHONWARNINGS='ignore'))
            if out.returncode: raise SystemExit(out.stderr[-2000:])
            rows.append(json.loads(out.stdout.splitlines()[-1])); print(rows[-1], flush=True)
    df = pd.DataFrame(rows).agg(['median','min','max']).T.round(2).rename_axis('part').set_axis(['seconds','least','greatest'], axis=1)
    df.assign(rounds=a.rounds, **versions()).to_csv(here/'predict_parts.csv')
