"""From a scan on disk to augmented patches: this library, MONAI and TorchIO side by side, in one run, on two threads or two workers

    COVID3D_TEST_DATA=folder python benchmarks/data.py [--times 20] [--out _bench]

Scans: the seven of `folder/coronacases_7`, and a phantom of 300 slices of 512×512. Patches of 32×128×128. The libraries take turns, `times` rounds; the table gives the median, the least and the greatest.
Every library has each way of loading tried (no worker, two workers) and is given the quicker one. Patches that workers made ahead are thrown away before the clock starts. TorchIO's queue is timed over whole fillings of 240 patches, MONAI's positions of lesions are cached. MONAI and TorchIO augment the cut patch, which is the cheapest way they have, and not the whole scan; every change has probability 1, a mirror image 1/2.
"""
import argparse, csv, itertools, os, platform, shutil, statistics, subprocess, sys, time, warnings
from pathlib import Path

import monai, monai.transforms as mt, nibabel as nib, numpy as np, torch, torchio as tio
from monai.data import CacheDataset, DataLoader as MonaiLoader, Dataset, list_data_collate

from covid3d.augment import Augment3d, Contrast3d, Elastic3d, Flip3d, Gamma3d, Noise3d, Rotate3d, Shear3d, Zoom3d
from covid3d.cases import read_cases, write_cases
from covid3d.data import CTDataLoaders
from covid3d.datasets import folder
from covid3d.phantom import phantom
from covid3d.prepare import prepare_case
from covid3d.transforms import CTSpec
from covid3d.volume import open_ct, save_volume

warnings.filterwarnings('ignore')
here,patch,keys,ahead = Path(__file__).parent,(32,128,128),('ct','lesion'),8  # batches that two workers may have made ahead, and more
spec = CTSpec(spacing=(1,1.4,1.4), window=(-1000,20), patch=patch)
deg = np.pi/180

# ---- scans

def scans(out)->tuple:
    "Case tables of the real scans and of the large phantom"
    df = folder(Path(os.environ['COVID3D_TEST_DATA'])/'coronacases_7', valid=['coronacases_007'], already_windowed='-1000:20')
    write_cases(df, out/'real.csv')
    big = out/'big'
    if not (big/'ct.nii.gz').exists():
        ph = phantom(0, shape=(300,512,512), spacing=(1,.7,.7))
        save_volume(ph.ct, big/'ct.nii.gz'); save_volume(ph.lesion, big/'lesion.nii.gz')
    return read_cases(out/'real.csv', 'train', ('lesion',)),out/'real.csv',big

# ---- patches

def endless(make):
    "Patch after patch, epoch after epoch"
    while True:
        for n in make(): yield n

def ours(table, aug, workers):
    dls = CTDataLoaders.from_table(table, spec, bs=2, patches=400, aug=aug or False, num_workers=workers, device='cpu', prepared=here.parent/'_bench'/'prepared')
    return endless(lambda: (len(x) for x,_ in dls.train))

def our_aug(full):
    turn = Rotate3d(15, tilt=15 if full else 0, p=1)
    return Augment3d([Flip3d(), turn, Zoom3d(slices=full, p=1), Shear3d(p=1), *([Elastic3d(through=4, p=1)] if full else []), Contrast3d(p=1), Gamma3d(p=1), Noise3d(p=1)], spec.spacing)

def files(cases): return [dict(ct=str(c.ct), lesion=str(c.masks['lesion'])) for c in cases]

def monai_load(): return [mt.LoadImaged(keys), mt.EnsureChannelFirstd(keys), mt.ScaleIntensityRanged('ct', 0, 255, 0, 1, clip=True), mt.EnsureTyped(keys), mt.FgBgToIndicesd('lesion')]
def monai_crop(): return [mt.RandCropByPosNegLabeld(keys, 'lesion', (128,128,32), pos=.7, neg=.3, num_samples=1, fg_indices_key='lesion_fg_indices', bg_indices_key='lesion_bg_indices')]
def monai_aug(full):
    space = dict(rotate_range=(15*deg,)*3 if full else (0,0,15*deg), scale_range=[(-.15,.2)]*3 if full else [(-.15,.2)]*2+[(0,0)], shear_range=(.09,)*2+(0,)*4, mode=('bilinear','nearest'), padding_mode='zeros')
    move = mt.Rand3DElasticd(keys, sigma_range=(8,12), magnitude_range=(50,150), prob=1, **space) if full else mt.RandAffined(keys, prob=1, cache_grid=True, spatial_size=(128,128,32), **space)
    return [mt.RandFlipd(keys, .5, 0), move, mt.RandScaleIntensityd('ct', .15, prob=1), mt.RandAdjustContrastd('ct', prob=1, gamma=(.8,1.25)), mt.RandGaussianNoised('ct', prob=1, std=.04)]

def by_monai(cases, aug, workers, cached=True):
    tfms = monai_load()+monai_crop()+(monai_aug(aug=='3d') if aug else [])
    data = CacheDataset(files(cases), mt.Compose(tfms), progress=False, num_workers=2, copy_cache=False) if cached else Dataset(files(cases), mt.Compose(tfms))
    loader = MonaiLoader(data, batch_size=2 if cached else 1, num_workers=workers, shuffle=True, collate_fn=list_data_collate, persistent_workers=workers>0)
    return endless(lambda: (len(b['ct']) for b in loader))

def tio_aug(full):
    space = tio.RandomAffine(scales=(.85,1.2,.85,1.2,.85,1.2) if full else (.85,1.2,.85,1.2,1,1), degrees=(15,15,15) if full else (0,0,15))
    return tio.Compose([tio.RandomFlip(0), space, *([tio.RandomElasticDeformation(5, 6)] if full else []), tio.RandomGamma(.22), tio.RandomNoise(0, (0,.04))])

def by_torchio(cases, aug, workers, cached=True):
    subjects = [tio.Subject(ct=tio.ScalarImage(f['ct']), lesion=tio.LabelMap(f['lesion'])) for f in files(cases)]
    data = tio.SubjectsDataset(subjects, transform=tio.RescaleIntensity((0,1), in_min_max=(0,255)))
    queue = tio.Queue(data, max_length=40*len(cases) if cached else 1, samples_per_volume=40 if cached else 1, sampler=tio.LabelSampler((128,128,32), 'lesion', {0:.3,1:.7}), num_workers=workers, start_background=False)
    tfm = tio_aug(aug=='3d') if aug else None
    def epoch():
        for i in range(len(queue)):
            s = queue[i]
            if tfm: tfm(s)
            yield 1
    return endless(epoch)

# ---- whole scans

def prepare_ours(big, out):
    from covid3d.cases import Case
    shutil.rmtree(out/'prep', ignore_errors=True)
    prepare_case(Case('big', big/'ct.nii.gz', dict(lesion=big/'lesion.nii.gz')), CTSpec(), out/'prep')

def prepare_monai(big, out):
    mt.Compose([mt.LoadImaged(keys), mt.EnsureChannelFirstd(keys), mt.Orientationd(keys, axcodes='LPS'), mt.Spacingd(keys, pixdim=(2.8,2.8,4), mode=('bilinear','nearest')),
        mt.ScaleIntensityRanged('ct', -1000, 400, 0, 1, clip=True)])(dict(ct=str(big/'ct.nii.gz'), lesion=str(big/'lesion.nii.gz')))

def prepare_torchio(big, out):
    s = tio.Subject(ct=tio.ScalarImage(big/'ct.nii.gz'), lesion=tio.LabelMap(big/'lesion.nii.gz'))
    tio.Compose([tio.ToCanonical(), tio.Resample((2.8,2.8,4)), tio.Clamp(-1000, 400), tio.RescaleIntensity((0,1))])(s)

def read_nibabel(big, out): np.asanyarray(nib.load(big/'ct.nii.gz').dataobj)
def read_ours(big, out): open_ct(big/'ct.nii.gz')

# ---- timing

def rate(make, n):
    "A function that gives patches a second, over `n` patches, and closes nothing in between"
    it = make()
    def measure():
        for _ in range(ahead): next(it)
        t,k = time.perf_counter(),0
        while k<n: k += next(it)
        return k/(time.perf_counter()-t)
    return measure

def quicker(name, make, n):
    "The way of loading that is quicker"
    found = {}
    for w in (0,2):
        try: m = rate(lambda: make(w), n); found[w] = (max(m() for _ in range(2)),m)
        except Exception as e: print(f'   {name}, {w} workers: {type(e).__name__} {str(e)[:80]}', flush=True)
    w = max(found, key=lambda k: found[k][0])
    return w,found[w][1]

def turns(rows, times):
    "Let measurements take turns; name → list"
    got = {k:[] for k in rows}
    for _ in range(times):
        for k,f in rows.items(): got[k].append(f())
    return got

def seconds(f):
    def measure(): t = time.perf_counter(); f(); return time.perf_counter()-t
    return measure

def peak(code)->float:
    "Peak memory of a process, less what importing takes, MB"
    script = 'import numpy as np, nibabel as nib\nfrom covid3d.volume import open_ct\n{}\nprint(next(l.split()[1] for l in open("/proc/self/status") if l.startswith("VmHWM")))'
    run = lambda c: int(subprocess.run([sys.executable, '-c', script.format(c)], capture_output=True, text=True, check=True).stdout)
    return (run(code)-run(''))/1024

def main(times, out):
    out.mkdir(parents=True, exist_ok=True)
    cases,table,big = scans(out)
    torch.set_num_threads(2)
    result = []
    def section(title, unit, makes, n=None):
        print(f'== {title}', flush=True)
        rows = {}
        for name,make in makes.items():
            w,rows[name] = ('',seconds(make)) if n is None else quicker(name, make, 240 if 'TorchIO' in name and title=='plain patches' else n)
            print(f'   {name}{f": {w} workers" if w!="" else ""}', flush=True)
        for name,v in turns(rows, times).items():
            result.append(dict(what=title, library=name, unit=unit, median=f'{statistics.median(v):.3g}', least=f'{min(v):.3g}', greatest=f'{max(v):.3g}', times=len(v)))
            print('  ', result[-1], flush=True)
    section('plain patches', 'patches/s', {'covid3d, prepared':lambda w: ours(table, None, w), 'MONAI, CacheDataset':lambda w: by_monai(cases, None, w), 'TorchIO, Queue':lambda w: by_torchio(cases, None, w)}, 120)
    section('plain patches from .nii.gz', 'patches/s', {'MONAI, Dataset':lambda w: by_monai(cases, None, w, cached=False), 'TorchIO, one patch a volume':lambda w: by_torchio(cases, None, w, cached=False)}, 8)
    section('default augmentation (slices stay slices)', 'patches/s', {'covid3d':lambda w: ours(table, our_aug(False), w), 'MONAI':lambda w: by_monai(cases, '2d', w), 'TorchIO':lambda w: by_torchio(cases, '2d', w)}, 64)
    section('3D affine and elastic', 'patches/s', {'covid3d':lambda w: ours(table, our_aug(True), w), 'MONAI':lambda w: by_monai(cases, '3d', w), 'TorchIO':lambda w: by_torchio(cases, '3d', w)}, 16)
    section('prepare 512×512×300', 's', {'covid3d':lambda: prepare_ours(big, out), 'MONAI':lambda: prepare_monai(big, out), 'TorchIO':lambda: prepare_torchio(big, out)})
    section('read 512×512×300 .nii.gz', 's', {'covid3d':lambda: read_ours(big, out), 'nibabel':lambda: read_nibabel(big, out)})
    f,mb = big/'ct.nii.gz',300*512*512*2/2**20
    for name,code in (('covid3d',f'open_ct({str(f)!r})'),('nibabel',f'x = np.asanyarray(nib.load({str(f)!r}).dataobj)')):
        result.append(dict(what='peak memory of reading it', library=name, unit='times its int16 size', median=f'{peak(code)/mb:.2f}', least='', greatest='', times=1))
    facts = dict(torch=torch.__version__.split('+')[0], monai=monai.__version__, torchio=tio.__version__, cores=os.cpu_count(), machine=platform.machine())
    with (here/'data.csv').open('w') as f:
        w = csv.DictWriter(f, [*result[0],*facts], lineterminator='\n'); w.writeheader(); w.writerows(r|facts for r in result)
    for title,rows in itertools.groupby(result, lambda r: r['what']):
        print(f'\n{title}')
        for r in rows: print(f'  {r["library"]:<28}{r["median"]:>8} {r["unit"]}   ({r["least"]} … {r["greatest"]})')

if __name__=='__main__':
    p = argparse.ArgumentParser(); p.add_argument('--times', type=int, default=20); p.add_argument('--out', type=Path, default=here.parent/'_bench')
    a = p.parse_args(); main(a.times, a.out)
