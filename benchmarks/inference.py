"""From a scan on the disk to masks on the disk, whole commands, each in a process of its own: this library, MONAI's transforms and sliding window, and plain PyTorch, with the same weights

    COVID3D_TEST_DATA=folder python benchmarks/inference.py [--slices 148,300] [--rounds 3] [--threads 2] [--ways covid3d,…] [--out _bench]

`covid3d` is `covid3d predict`: masks, figures and the page of the scan; `covid3d masks` leaves out the page. `MONAI` loads, orients, resamples, windows, slides (overlap 0.5, Gaussian weights, four windows at a time), inverts the resampling for the probabilities of all classes, as its bundles do, cuts and writes.
`PyTorch` is what one writes without a library for it: this library's reader, one `interpolate` of the scan, one window at a time, one `interpolate` of all classes back to the scan's grid.
All get the weights of the package, the same grid (4×2.8×2.8 mm), windows (16×96×96), overlap and threshold, and write one mask for each of the three classes but for `covid3d`, which writes both lungs as one.
The scan is P001 of COVID-CT-MD as hospital DICOM (512×512×148, JPEG Lossless); other numbers of slices are the same chest resampled along its axis, as plain DICOM. `seconds` is the clock's, start of Python and imports included, `cpu_seconds` user + system, `peak_mb` the most resident memory; `dice` compares the lesion masks with those of `covid3d`.
`--dice` compares both with a reference instead: the seven scans of coronacases_7 (spacing nominal, window −1000:20), same weights and threshold, whole-scan Dice of MONAI's way and of `Segmenter` with and without its rule that lesions lie in lungs; benchmarks/inference_dice.csv.
A row a way and scan in benchmarks/inference.csv: median, least and greatest of the rounds, in which all take turns.
"""
import argparse, os, statistics, subprocess, sys, tempfile, time
from pathlib import Path

import numpy as np, pandas as pd

here = Path(__file__).parent

def monai(scan, out):
    "MONAI's own loading, resampling, sliding window and way back"
    import torch
    from monai.inferers import sliding_window_inference
    from monai.transforms import Compose, EnsureChannelFirstd, Invertd, LoadImaged, Orientationd, SaveImage, ScaleIntensityRanged, Spacingd
    from covid3d.weights import load_all, weights_in
    net,spec = load_all(weights_in('covid3d'), 'cpu')
    before = Compose([LoadImaged('image', reader='PydicomReader'), EnsureChannelFirstd('image'), Orientationd('image', axcodes='LPS'),
        Spacingd('image', pixdim=spec.spacing[::-1], mode='bilinear'), ScaleIntensityRanged('image', *spec.window, 0, 1, clip=True)])
    data = before(dict(image=scan))
    ask = lambda x: net(x.permute(0,1,4,3,2)).permute(0,1,4,3,2)  # MONAI's axes are x, y, z
    with torch.inference_mode():
        data['pred'] = sliding_window_inference(data['image'][None], spec.patch[::-1], 4, ask, .5, mode='gaussian')[0].sigmoid()
    back = Invertd('pred', before, orig_keys='image', nearest_interp=False, to_tensor=True)
    masks = (back(data)['pred']>=.5).to(torch.uint8)
    for k,m in zip(spec.classes, masks):
        m = m[None]; m.meta['filename_or_obj'] = f'{k}.nii.gz'
        SaveImage(out, output_postfix='', output_dtype='uint8', separate_folder=False, resample=False, print_log=False)(m)

def pytorch(scan, out):
    "The plain way"
    import torch
    from torch.nn import functional as F
    from covid3d.dicom import open_scan
    from covid3d.inference import window_starts
    from covid3d.transforms import size_at
    from covid3d.volume import save_mask
    from covid3d.weights import load_all, weights_in
    net,spec = load_all(weights_in('covid3d'), 'cpu'); ct = open_scan(scan)
    x = F.interpolate(torch.from_numpy(ct.data)[None,None].float(), size_at(ct, spec.spacing), mode='trilinear', antialias=False)
    x = ((x-spec.window[0])/(spec.window[1]-spec.window[0])).clamp(0, 1)
    total,n = torch.zeros(3, *x.shape[2:]),torch.zeros(x.shape[2:])
    with torch.inference_mode():
        for z in window_starts(x.shape[2], spec.patch[0]):
            for r in window_starts(x.shape[3], spec.patch[1]):
                for c in window_starts(x.shape[4], spec.patch[2]):
                    at = tuple(slice(s, s+p) for s,p in zip((z,r,c), spec.patch))
                    total[(slice(None),*at)] += net(x[(slice(None),slice(None),*at)])[0].sigmoid(); n[at] += 1
        p = F.interpolate((total/n)[None], ct.shape, mode='trilinear')[0]
    for k,m in zip(spec.classes, p>=.5): save_mask(m.numpy().astype(np.uint8), ct, Path(out)/f'{k}.nii.gz')

def command(way, scan, out):
    if way.startswith('covid3d'):
        return [sys.executable, '-m', 'covid3d', 'predict', scan, '-o', out, '--device', 'cpu', *(['--no-page'] if 'masks' in way else [])]
    return [sys.executable, __file__, '--way', way, '--scan', scan, '--to', out]

def measured(way, scan, out, threads):
    "Seconds of the clock, of the processor, and most memory of a command"
    env = os.environ|dict(OMP_NUM_THREADS=str(threads), MKL_NUM_THREADS=str(threads), PYTHONWARNINGS='ignore')
    t = time.perf_counter(); p = subprocess.Popen([*map(str, command(way, scan, out))], env=env, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    err = p.stderr.read(); _,status,used = os.wait4(p.pid, 0)
    if status: raise SystemExit(f'{way}: {err.decode()[-2000:]}')
    return time.perf_counter()-t,used.ru_utime+used.ru_stime,used.ru_maxrss/1e3

def series(n, out):
    "P001 with `n` slices"
    own = Path(os.environ['COVID3D_TEST_DATA'])/'covid_ct_md'/'P001'
    if n==148: return own
    from covid3d.dicom import open_scan, write_series
    from covid3d.volume import Volume
    at = out/f'P001_{n}'
    if not at.exists():
        ct = open_scan(own); z = np.linspace(0, len(ct.data)-1, n)
        x = np.stack([np.rint((1-w)*ct.data[i]+w*ct.data[min(i+1, len(ct.data)-1)]).astype(np.int16) for i,w in zip(z.astype(int), z%1)])
        affine = ct.affine.copy(); affine[:,0] *= (len(ct.data)-1)/(n-1)
        write_series(Volume(x, affine), at)
    return at

def lesion(out): # the mask of the lesion that a way wrote
    import nibabel as nib
    img = nib.as_closest_canonical(nib.load(next(o for o in sorted(Path(out).glob('*lesion.nii.gz')))))
    return np.asarray(img.dataobj)>0

def agreement():
    import torch
    from monai.data import MetaTensor
    from monai.inferers import sliding_window_inference
    from monai.transforms import Compose, EnsureChannelFirstd, Invertd, Orientationd, ScaleIntensityRanged, Spacingd
    from covid3d.cases import read_cases
    from covid3d.datasets import folder
    from covid3d.inference import Segmenter
    from covid3d.metrics import dice
    rows = []
    for case in read_cases(folder(Path(os.environ['COVID3D_TEST_DATA'])/'coronacases_7', already_windowed='-1000:20')):
        ct = case.open_ct(); ref = case.open_mask('lesion', ct).data; row = dict(case=case.name)
        for k,within in (('covid3d',True), ('covid3d, no lung rule',False)): row[k] = dice(Segmenter.load('covid3d', 'cpu', within_lungs=within)(ct).masks['lesion'], ref)
        s = Segmenter.load('covid3d', 'cpu'); spec = s.spec
        before = Compose([EnsureChannelFirstd('image', channel_dim='no_channel'), Orientationd('image', axcodes='LPS'), Spacingd('image', pixdim=spec.spacing[::-1], mode='bilinear'),
                          ScaleIntensityRanged('image', *spec.window, 0, 1, clip=True)])
        x = MetaTensor(np.ascontiguousarray(ct.data.transpose(2,1,0)).astype(np.float32), affine=ct.affine[:,[2,1,0,3]])
        with torch.inference_mode():
            data = before(dict(image=x))
            data['pred'] = sliding_window_inference(data['image'][None], spec.patch[::-1], 4, lambda x: s.model(x.permute(0,1,4,3,2)).permute(0,1,4,3,2), s.overlap, mode='gaussian')[0].sigmoid()
            back = Invertd('pred', before, orig_keys='image', nearest_interp=False, to_tensor=True)(data)['pred']
        row['MONAI'] = dice((back[spec.classes.index('lesion')]>=s.threshold).numpy().astype(np.uint8).transpose(2,1,0), ref)
        rows.append(row); print({k:v if isinstance(v, str) else round(float(v), 4) for k,v in row.items()}, flush=True)
    df = pd.DataFrame(rows); df.loc[len(df)] = dict(case='mean', **df.drop(columns='case').mean()); df.round(4).to_csv(here/'inference_dice.csv', index=False)

def main():
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for k,v in dict(slices='148,300', rounds=3, threads=2, ways='covid3d,covid3d masks,MONAI,PyTorch', out='_bench', way='', scan='', to='').items(): p.add_argument(f'--{k}', default=v, type=type(v))
    p.add_argument('--dice', action='store_true'); a = p.parse_args()
    if a.dice: return agreement()
    if a.way: return dict(MONAI=monai, PyTorch=pytorch)[a.way](a.scan, a.to)
    work,rows = Path(a.out)/'inference',[]; work.mkdir(parents=True, exist_ok=True)
    for n in map(int, a.slices.split(',')):
        scan,times,ways = series(n, work),{},a.ways.split(',')
        for i in range(a.rounds):
            for way in ways:
                with tempfile.TemporaryDirectory(dir=work) as out:
                    times.setdefault(way, []).append(measured(way, scan, out, a.threads)); print(n, way, *(f'{o:.1f}' for o in times[way][-1]), flush=True)
                    if i==0: times[way,'mask'] = lesion(out)
        for way in ways:
            t = np.array(times[way]); x,y = times[way,'mask'],times[ways[0],'mask']
            rows.append(dict(way=way, slices=n, seconds=round(statistics.median(t[:,0]), 1), least=round(t[:,0].min(), 1), greatest=round(t[:,0].max(), 1), cpu_seconds=round(statistics.median(t[:,1]), 1),
                             peak_mb=round(t[:,2].max()), dice=round(float(2*(x&y).sum()/(x.sum()+y.sum())), 4), rounds=a.rounds, threads=a.threads))
        old = pd.read_csv(here/'inference.csv') if (here/'inference.csv').exists() else pd.DataFrame()
        if len(old): old = old[~(old.slices.isin([n])&old.way.isin(ways))]
        pd.concat([old, pd.DataFrame(rows)]).drop_duplicates(['way','slices'], keep='last').to_csv(here/'inference.csv', index=False)
    print(pd.DataFrame(rows).to_string())

if __name__=='__main__': main()
