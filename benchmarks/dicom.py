"""Seconds to open a CT series of 300 slices of 512×512: this library and SimpleITK in turn

    python benchmarks/dicom.py [--times 20] [--kinds little,jpegls] [--slices 300]

The chest is smooth tissue with the noise of a scanner, so that it compresses as real ones do.
SimpleITK sorts with `GetGDCMSeriesFileNames` and reads with `ReadImage`; `open_series` sorts, checks and reads. Both end with a volume in HU in memory, files in the cache of the system. The voxels of both are compared first. Each run adds its rows to benchmarks/dicom.csv.
"""
import argparse, csv, gc, os, platform, statistics, tempfile, time
from pathlib import Path

import numpy as np, pydicom, SimpleITK as sitk
from pydicom.dataset import FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, JPEGLSLossless, RLELossless

from covid3d.dicom import ct_datasets, open_series
from covid3d.volume import Volume, canonical_affine

here = Path(__file__).parent
syntaxes = dict(little=None, jpegls=JPEGLSLossless, rle=RLELossless)

def chest(n, seed=0)->Volume:
    "An ellipse of tissue with two lungs, a spine and vessels, 12 HU of noise; 0.7×0.7×1 mm"
    rng = np.random.default_rng(seed)
    z,y,x = np.ogrid[-1:1:n*1j,-1:1:512j,-1:1:512j]
    hu = np.where((x/.85)**2+(y/.65)**2<1, 40., -1000.)+0*z
    lung = ((abs(x)-.38)/.28)**2+(y/.45)**2<1-.5*z**2
    hu = np.where(lung, -850+120*np.sin(9*x)*np.cos(11*y)*np.cos(5*z), hu)
    hu = np.where((x/.09)**2+((y-.48)/.09)**2<1, 400, hu)
    return Volume((hu+rng.normal(0, 12, hu.shape)).clip(-1024, 3000).astype(np.int16), canonical_affine((1,.7,.7)))

def write(kind, vol, folder):
    "The series in an encoding, 12 bits stored as scanners do"
    for i,ds in enumerate(ct_datasets(vol), 1):
        ds.BitsStored,ds.HighBit = 12,11
        ds.PixelData = np.minimum(np.frombuffer(ds.PixelData, '<u2'), 4095).tobytes()
        ds.file_meta = FileMetaDataset(); ds.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
        if syntaxes[kind]: ds.compress(syntaxes[kind], generate_instance_uid=False)
        pydicom.dcmwrite(folder/f'IM{i:04d}.dcm', ds, enforce_file_format=True)

def ours(folder): return open_series(folder).data
def simpleitk(folder): return sitk.GetArrayFromImage(sitk.ReadImage(sitk.ImageSeriesReader.GetGDCMSeriesFileNames(str(folder))))

def measure(folder, times)->dict:
    "Seconds of each reader, in turn"
    assert np.array_equal(ours(folder), np.maximum(simpleitk(folder), -1024))
    res = {f:[] for f in (ours,simpleitk)}
    for i in range(times):
        for f in (ours,simpleitk) if i%2 else (simpleitk,ours):
            gc.collect(); start = time.perf_counter(); x = f(folder); res[f].append(time.perf_counter()-start); del x
    return res

def add_rows(kind, slices, mb, res):
    "Print and append"
    path = here/'dicom.csv'; new = not path.exists()
    with path.open('a') as out:
        for f,t in res.items():
            reader = dict(ours='covid3d', simpleitk=f'SimpleITK {sitk.Version_VersionString()}')[f.__name__]
            row = dict(encoding=kind, reader=reader, slices=slices, megabytes=f'{mb:.0f}', repetitions=len(t), median=f'{statistics.median(t):.3f}',
                       min=f'{min(t):.3f}', max=f'{max(t):.3f}', cores=os.cpu_count(), python=platform.python_version(), pydicom=pydicom.__version__)
            w = csv.DictWriter(out, row, lineterminator='\n')
            if new: w.writeheader(); print(*row, sep='\t'); new = False
            w.writerow(row); print(*row.values(), sep='\t', flush=True)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--times', type=int, default=20); p.add_argument('--kinds', default='little,jpegls'); p.add_argument('--slices', type=int, default=300)
    a = p.parse_args()
    vol = chest(a.slices)
    for kind in a.kinds.split(','):
        with tempfile.TemporaryDirectory() as d:
            write(kind, vol, Path(d)); add_rows(kind, a.slices, sum(o.stat().st_size for o in Path(d).iterdir())/1e6, measure(Path(d), a.times))
