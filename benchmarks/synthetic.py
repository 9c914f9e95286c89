"""What weights that saw no patient find in real CT

    COVID3D_TEST_DATA=folder python benchmarks/synthetic.py [--weights covid3d] [--mirror] [--stress] [--name NAME]

Seven CoronaCases scans with lesion and lung masks (grey levels, read as −1000…20 HU), two hospital scans as DICOM (P001 with COVID-19 and a label per slice from three radiologists, normal001 healthy), a coarse scan with
a lung mask, and a crop of a chest without COVID-19. `--stress` adds changed copies of the CoronaCases scans: another window, gamma, noise, blur, thick slices, crops, a wrong spacing. A row per
scan and change is written to benchmarks/synthetic.csv (rows of the same name are replaced); `--table` prints the means. All of these scans were looked at while the synthetic patients were made and the weights chosen.
"""
import argparse, os, time
from pathlib import Path

import numpy as np, pandas as pd, torch
from scipy.ndimage import gaussian_filter

from covid3d.dicom import open_scan
from covid3d.inference import Segmenter, _pieces
from covid3d.metrics import dice
from covid3d.volume import Volume, open_ct, open_mask

here,data = Path(__file__).parent,Path(os.environ.get('COVID3D_TEST_DATA', 'data'))

def auc(score, ill):
    "Area under the ROC curve"
    score,ill = np.asarray(score, float),np.asarray(ill)>0
    a,b = score[ill][:,None],score[~ill]
    return float(((a>b)+.5*(a==b)).mean())

def sides(seg, lung=None):
    "Fraction of the lungs' voxels that have the right name: by the two pieces of a reader's mask of both lungs; where there is none, by the middle between both lungs, which a lung may cross in front of the heart"
    right,left = (seg.masks[k]>0 for k in ('right_lung','left_lung'))
    if lung is not None:
        r,l = sorted(_pieces(lung>0), key=lambda m: np.nonzero(m)[2].mean())
        ok,all_ = (right&r).sum()+(left&l).sum(),((right|left)&(r|l)).sum()
    else:
        x = np.arange(left.shape[2]); n = [m.sum((0,1)) for m in (right,left)]; middle = sum(m@x/max(m.sum(), 1) for m in n)/2
        ok,all_ = n[0][x<middle].sum()+n[1][x>middle].sum(),n[0].sum()+n[1].sum()
    return float(ok/max(all_, 1))

def measure(seg, lesion=None, lung=None):
    "What one scan says"
    found = (seg.masks['left_lung']+seg.masks['right_lung'])>0
    row = {f'{k}_ml':v for k,v in seg.ml.items()}|dict(sides=sides(seg, lung), distance=seg.distance, disagreement=seg.disagreement, warnings=sum(o.startswith('warning: ') for o in seg.notes))
    if lesion is not None: row |= dict(dice=dice(seg.masks['lesion'], lesion), inside=float(found[lesion>0].mean()))
    if lung is not None: row['lung_dice'] = dice(found, lung>0)
    return row

def thick(vol, n=3):
    "The mean of n slices in place of each n"
    d = vol.data[:len(vol.data)//n*n]; d = d.reshape(-1, n, *d.shape[1:]).mean(1)
    a = vol.affine.copy(); a[:3,0] *= n
    return Volume(d.astype(np.float32), a)

def stress(ct, lesion):
    "name → (scan, mask)"
    rng,hu,new = np.random.default_rng(0),ct.data.astype(np.float32),lambda d: Volume(d.astype(np.float32), ct.affine)
    grey = ((hu+1000)/1020).clip(0, 1)
    yield 'window -1350…150', new(grey*1500-1350),lesion
    yield 'window -1000…400', new(grey*1400-1000),lesion
    yield 'window -900…-200', new(grey*700-900),lesion
    yield 'gamma 0.7', new(grey**.7*1020-1000),lesion
    yield 'gamma 1.4', new(grey**1.4*1020-1000),lesion
    yield 'noise 60 HU', new(hu+60*rng.standard_normal(hu.shape, np.float32)),lesion
    yield 'blur 1.5 voxels', new(gaussian_filter(hu, (0,1.5,1.5))),lesion
    yield 'sharp', new(hu+1.5*(hu-gaussian_filter(hu, (0,1,1)))),lesion
    yield 'slices of 3 mm', thick(new(hu)),(thick(new(lesion)).data>.5)
    at = tuple(slice(n//8, n-n//8) for n in hu.shape[1:])
    yield 'crop', Volume(np.ascontiguousarray(hu[:,at[0],at[1]]), ct.affine),lesion[:,at[0],at[1]]
    yield 'middle third', Volume(np.ascontiguousarray(hu[len(hu)//3:2*len(hu)//3]), ct.affine),lesion[len(hu)//3:2*len(hu)//3]
    yield 'spacing 5 mm', Volume(hu, ct.affine@np.diag([5,1,1,1.])),lesion
    yield 'spacing 0.5 mm in slice', Volume(hu, ct.affine@np.diag([1,.36,.36,1.])),lesion

def scans(with_stress):
    "name, change, scan, lesion, lung"
    for f in sorted((data/'coronacases_7'/'ct').iterdir()):
        ct = open_ct(f, already_windowed=(-1000,20)); mask = lambda k,**kw: open_mask(f.parents[1]/k/f.name, like=ct, **kw).data
        lesion = mask('infection_mask')
        yield f.name[:15],'',ct,lesion,mask('lung_mask', labels=range(256))
        if with_stress: yield from ((f.name[:15],k,v,m,None) for k,v,m in stress(ct, lesion))
    for n in ('P001','normal001'): yield n,'',open_scan(data/'covid_ct_md'/n),None,None
    ct = open_scan(data/'cip_ct64'/'ct.nii.gz')
    yield 'cip_ct64','',ct,None,open_mask(data/'cip_ct64'/'lung_mask.nii.gz', like=ct, labels=range(256)).data
    yield 'totalseg_chest','',open_scan(data/'totalseg_chest'/'ct.nii.gz'),None,None

def run(a):
    segmenter,rows = Segmenter.load(a.weights, mirror=a.mirror, keep=True),[]
    for name,change,ct,lesion,lung in scans(a.stress):
        start = time.process_time(); seg = segmenter(ct)
        row = dict(name=a.name, scan=name, change=change, cpu_seconds=time.process_time()-start)|measure(seg, lesion, lung)
        if name=='P001':
            ill = pd.read_csv(data/'covid_ct_md'/'labels.csv').infected.to_numpy()[::-1]
            p = seg.kept['lesion']
            row |= dict(auc=auc(seg.masks['lesion'].sum((1,2)), ill), auc_largest=auc(p.max((1,2)), ill))
        rows.append(row)
        print({k:round(v, 3) if isinstance(v, float) else v for k,v in row.items()}, flush=True)
    path = here/'synthetic.csv'; new = pd.DataFrame(rows)
    old = pd.read_csv(path, keep_default_na=False, na_values=['']).pipe(lambda d: d[d.name!=a.name]) if path.exists() else None
    pd.concat([o for o in (old,new) if o is not None]).to_csv(path, index=False, float_format='%.4g', lineterminator='\n')

def table(path=here/'synthetic.csv'):
    "A row for each name"
    df = pd.read_csv(path); df['change'] = df.change.fillna('')
    def one(d):
        plain = d[d.change=='']; at = plain.set_index('scan'); cc = plain[plain.scan.str.startswith('corona')]
        return pd.Series({'P001, AUC':at.auc['P001'], 'P001, AUC of the largest probability':at.auc_largest['P001'], 'P001, ml':at.lesion_ml['P001'], 'normal001, ml':at.lesion_ml['normal001'], 'coronacases_7, Dice':cc.dice.mean(), 'lungs, Dice':cc.lung_dice.mean(),
            'lesion inside':cc.inside.mean(), 'cip_ct64, lungs':at.lung_dice['cip_ct64'], 'sides':plain.sides.min(), 'totalseg_chest, ml':at.lesion_ml['totalseg_chest'], 'stress, Dice':d[d.change!=''].dice.mean(), 'stress without warning, Dice':d[(d.change!='')&(d.warnings==0)].dice.mean()})
    return df.groupby('name', sort=False)[df.columns.drop('name')].apply(one)

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--weights', default='covid3d'); p.add_argument('--name', default='covid3d'); p.add_argument('--mirror', action='store_true'); p.add_argument('--stress', action='store_true'); p.add_argument('--table', action='store_true')
    a = p.parse_args(); torch.manual_seed(0)
    if not a.table: run(a)
    print(table().round(3).T.to_string())
