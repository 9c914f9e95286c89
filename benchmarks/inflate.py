"""Inflating a .nii.gz of 300 slices of 512×512: zlib, zlib-ng and ISA-L, in turns

    python benchmarks/inflate.py [--times 20] [--out _bench]

The scan is a phantom. nibabel reads the voxels alone; the others inflate all bytes and check the checksum, and write nothing. Writes benchmarks/inflate.csv.
"""
import argparse, csv, statistics, time, zlib
from importlib.metadata import version
from pathlib import Path

import nibabel as nib, numpy as np
from isal import igzip
from zlib_ng import gzip_ng

from covid3d.phantom import phantom
from covid3d.volume import open_ct, save_volume

here = Path(__file__).parent

def main(times, out):
    path = out/'big'/'ct.nii.gz'
    if not path.exists(): save_volume(phantom(0, shape=(300,512,512), spacing=(1,.7,.7)).ct, path)
    raw = path.read_bytes()
    ways = {'nibabel':lambda: np.asanyarray(nib.load(path).dataobj), 'zlib':lambda: zlib.decompress(raw, 31), 'zlib-ng':lambda: gzip_ng.decompress(raw), 'ISA-L':lambda: igzip.decompress(raw), 'covid3d, whole volume':lambda: open_ct(path)}
    got = {k:[] for k in ways}
    for _ in range(times):
        for k,f in ways.items():
            t = time.perf_counter(); f(); got[k].append(time.perf_counter()-t)
    rows = [dict(way=k, median=f'{statistics.median(v):.3f}', least=f'{min(v):.3f}', greatest=f'{max(v):.3f}', times=times, isal=version('isal'), zlib_ng=version('zlib-ng'), nibabel=version('nibabel')) for k,v in got.items()]
    with (here/'inflate.csv').open('w') as f: w = csv.DictWriter(f, rows[0], lineterminator='\n'); w.writeheader(); w.writerows(rows)
    for r in rows: print(f'{r["way"]:<24}{r["median"]} s   ({r["least"]} … {r["greatest"]})')

if __name__=='__main__':
    p = argparse.ArgumentParser(); p.add_argument('--times', type=int, default=20); p.add_argument('--out', type=Path, default=here.parent/'_bench')
    a = p.parse_args(); main(a.times, a.out)
