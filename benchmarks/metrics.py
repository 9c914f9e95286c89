"""Scores of a mask of 300 slices of 512×512: this library, MONAI and surface-distance side by side, in one run, and the parts they rest on

    python benchmarks/metrics.py [--times 7] [--slow 3] [--out benchmarks/metrics.csv]

The pair is made up: smooth blobs inside two thirds of the scan, 1.0 and 0.8 million voxels of about 20 lesions, Dice 0.74, voxels of 1×0.7×0.7 mm. Every library gets the masks in the type it takes fastest (MONAI: the quicker of
bool and float32, tried once), already in memory. What takes more than 5 s is timed `slow` times and the rest `times` times, in turns; the table gives median, least and greatest on the clock, the median of processor seconds (all threads), and how many times longer than this library. MONAI's scores are not those of this library (other
definitions of a surface); surface-distance's are the same, and the script checks it. "All" is every score of the row's library: MONAI's has no lesion-wise detection and computes its distances once for each score.
"""
import argparse, csv, os, platform, statistics, time, warnings
from importlib.metadata import version
from pathlib import Path

import cc3d, edt, monai.metrics as mm, numpy as np, surface_distance as sd, torch
from scipy import ndimage
from covid3d import metrics as cm

warnings.filterwarnings('ignore')
shape,spacing,tol = (300,512,512),(1.,.7,.7),3.

def field(seed):
    coarse = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal([s//16 for s in shape]).astype('f4'), 1)
    return torch.nn.functional.interpolate(torch.tensor(coarse)[None,None], size=shape, mode='trilinear')[0,0].numpy()

def lesions()->tuple: # prediction, reference
    "Two masks of blobs that differ as a prediction and its reference may"
    f,g = field(0),field(1); z,y,x = np.ogrid[:300,:512,:512]
    body = ((z-150)/130)**2+((y-256)/150)**2+((x-256)/200)**2<1
    h = f+.35*g
    return (f>np.quantile(f,.93))&body,(h>np.quantile(h,.93))&body

def clocked(f):
    "Seconds on the clock, seconds of processor, and the result"
    t,c = time.perf_counter(),time.process_time(); r = f(); return time.perf_counter()-t,time.process_time()-c,r

def timed(ways, times, slow):
    "Each way in turn; clock and processor seconds of each round"
    out = {k:[clocked(f)[:2]] for k,f in ways.items()}  # the first round tells which are slow, and is not kept for the quick ones
    quick = [k for k,v in out.items() if v[0][0]<5]
    for k in quick: out[k] = []
    for i in range(times):
        for k,f in ways.items():
            if len(out[k])<(times if k in quick else slow): out[k].append(clocked(f)[:2])
    return out

def main():
    p = argparse.ArgumentParser(); p.add_argument('--times', type=int, default=7); p.add_argument('--slow', type=int, default=3); p.add_argument('--out', default=Path(__file__).with_suffix('.csv')); a = p.parse_args()
    pred,mask = lesions()
    print(f'prediction {pred.sum():,} voxels, reference {mask.sum():,}, Dice {cm.dice(pred,mask):.3f}, box {[s.stop-s.start for s in cm.joint_box(pred,mask)]}, load {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores')
    cm.surfel_normals(); kw = dict(include_background=True)
    kinds = [[torch.tensor(m)[None,None].to(d) for m in (pred,mask)] for d in (torch.bool,torch.float32)]
    def rates(t, *names):
        c = mm.get_confusion_matrix(*t, **kw); return [mm.compute_confusion_matrix_metric(n,c) for n in names]
    monai = {'Dice': lambda t: mm.compute_dice(*t, **kw), 'Jaccard': lambda t: mm.compute_iou(*t, **kw), 'precision': lambda t: rates(t,'precision'), 'recall': lambda t: rates(t,'recall'), 'specificity': lambda t: rates(t,'specificity'),
        'HD95': lambda t: mm.compute_hausdorff_distance(*t, percentile=95, spacing=spacing, **kw), 'ASSD': lambda t: mm.compute_average_surface_distance(*t, symmetric=True, spacing=spacing, **kw),
        'surface Dice': lambda t: mm.compute_surface_dice(*t, [tol], spacing=spacing, **kw)}
    best = {k:min(kinds, key=lambda t: clocked(lambda: f(t))[0]) for k,f in monai.items()}
    monai = {k:(lambda f=f,t=best[k]: f(t)) for k,f in monai.items()}
    def monai_all():
        t = kinds[1]; rates(t,'precision','recall','specificity')
        for k in ('Dice','Jaccard','HD95','ASSD','surface Dice'): monai[k]()
    monai['all'] = monai_all
    def oracle(*fs): d = sd.compute_surface_distances(mask, pred, spacing); return [f(d) for f in fs]
    hd,surf = lambda d: sd.compute_robust_hausdorff(d,95),lambda d: sd.compute_surface_dice_at_tolerance(d,tol)
    deepmind = {'Dice': lambda: sd.compute_dice_coefficient(mask,pred), 'HD95': lambda: oracle(hd), 'ASSD': lambda: oracle(sd.compute_average_surface_distance), 'surface Dice': lambda: oracle(surf),
        'all': lambda: (sd.compute_dice_coefficient(mask,pred),oracle(hd,sd.compute_average_surface_distance,surf))}
    ours = {'Dice': lambda: cm.dice(pred,mask), 'Jaccard': lambda: cm.overlap(pred,mask).jaccard, 'precision': lambda: cm.overlap(pred,mask).precision, 'recall': lambda: cm.overlap(pred,mask).recall, 'specificity': lambda: cm.overlap(pred,mask).specificity,
        'volume error': lambda: cm.volume_error(pred,mask,spacing), 'HD95': lambda: cm.hd95(pred,mask,spacing), 'ASSD': lambda: cm.assd(pred,mask,spacing), 'surface Dice': lambda: cm.nsd(pred,mask,spacing),
        'lesion-wise': lambda: cm.lesion_detection(pred,mask), 'all': lambda: cm.scores(pred,mask,spacing)}
    row,(h,_,n) = cm.scores(pred,mask,spacing),oracle(hd,sd.compute_average_surface_distance,surf)
    np.testing.assert_allclose([row['hd95'],row['nsd']], [h,n], rtol=1e-5); print('HD95 and surface Dice equal surface-distance: ', h, n)

    box = cm.joint_box(pred,mask); (i,_),(j,_) = (cm.surface_points(o[box]) for o in (pred,mask)); grid = [o.stop-o.start+1 for o in box]; on_m = np.zeros(grid,bool); on_m.ravel()[j] = True
    s,near = np.array(spacing),ndimage.generate_binary_structure(3,3)
    parts = {('nearest surface point','k-d tree, both directions'): lambda: (cm.nearest_mm(i,j,grid,s,False),cm.nearest_mm(j,i,grid,s,False)), ('nearest surface point','edt, both directions'): lambda: (cm.nearest_mm(i,j,grid,s,True),cm.nearest_mm(j,i,grid,s,True)),
        ('distance transform of the box','edt, 1 thread'): lambda: edt.edt(~on_m, anisotropy=spacing, parallel=1), ('distance transform of the box','edt, all threads'): lambda: edt.edt(~on_m, anisotropy=spacing, parallel=0),
        ('distance transform of the box','SciPy'): lambda: ndimage.distance_transform_edt(~on_m, sampling=spacing),
        ('components of the scan','cc3d'): lambda: cc3d.connected_components(mask, connectivity=26), ('components of the scan','SciPy'): lambda: ndimage.label(mask, near)}
    ways = {(k,lib):f for lib,fs in (('covid3d',ours),('MONAI',monai),('surface-distance',deepmind)) for k,f in fs.items()} | parts
    secs = timed(ways, a.times, a.slow)
    cpu,secs = ({k:[o[i] for o in v] for k,v in secs.items()} for i in (1,0))
    med,cpu = ({k:statistics.median(v) for k,v in o.items()} for o in (secs,cpu))
    order = sorted(secs, key=lambda k: [w for w,_ in ways].index(k[0]))
    versions = [version(o) for o in ('monai','surface-distance','edt','connected-components-3d','scipy','torch')]
    with open(a.out,'w',newline='') as f:
        w = csv.writer(f); w.writerow('score library median_s least_s greatest_s cpu_s times times_covid3d monai surface_distance edt cc3d scipy torch cores machine load'.split())
        for k in order:
            ratio = med[k]/med[k[0],'covid3d'] if (k[0],'covid3d') in med else float('nan')
            w.writerow([*k,*(f'{o:.4f}' for o in (med[k],min(secs[k]),max(secs[k]),cpu[k])),len(secs[k]),f'{ratio:.1f}' if ratio==ratio else '',*versions,os.cpu_count(),platform.machine(),f'{os.getloadavg()[0]:.1f}'])
    print(Path(a.out).read_text())

if __name__=='__main__': main()
