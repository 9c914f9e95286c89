"""What `make demo` scores: twelve synthetic patients, a short training from the weights that come with covid3d, three patients that it has not seen

    python benchmarks/demo.py [--out _bench/demo]

Runs `covid3d demo` and writes the scores of its unseen scans to benchmarks/demo.csv; takes some minutes.
"""
import argparse
from pathlib import Path

from budget import here, versions
from covid3d.cli import main
from covid3d.statistics import read_scores

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--out', type=Path, default=here.parent/'_bench'/'demo')
    a = p.parse_args()
    a.out.parent.mkdir(parents=True, exist_ok=True)
    main(['demo','--overwrite','--out',str(a.out)])
    df = read_scores(a.out/'scores')[['case','dice','nsd','reference_ml','predicted_ml']].round(3)
    df.assign(**versions()).to_csv(here/'demo.csv', index=False)
