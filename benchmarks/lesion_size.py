"""Which lesions of real CT do the shipped weights find? Volume found in each scan, and lesions touched by size

    COVID3D_TEST_DATA=folder python benchmarks/lesion_size.py [--weights covid3d]

Seven CoronaCases scans with readers' masks (gray levels, read as −1000…20 HU). All of them were looked at while the synthetic patients were made and the weights chosen, so the figures are optimistic. A lesion is a connected component
(26 neighbors) of a reader's mask. It is touched if the network marks one of its voxels. Its extent is the longest side of its bounding box, along the axes of the scan. Spacing is nominal (1.4×1.4×1.0 mm), and so are volumes and extents. Slices are
missing in these files, so one lesion may be several components. A row for each scan (`found_ml`: the volume the network marked, `overlap_ml`: the part of it inside the reader's mask, `found`: `found_ml` over `reference_ml`) and for each class of size in
benchmarks/lesion_size.csv; a class reaches from its lower bound up to, and without, its upper bound.
"""
import argparse

import cc3d, numpy as np, pandas as pd, torch

from covid3d.inference import Segmenter
from synthetic import here, scans

classes = dict(ml=(0,1,5,20,np.inf), mm=(0,10,20,30,50,np.inf))

def lesions(reference, found, spacing):
    "A row for each component of the reader's mask: ml, mm, touched"
    labels,n = cc3d.connected_components(np.ascontiguousarray(reference>0), connectivity=26, return_N=True)
    s = cc3d.statistics(labels)
    mm = [max((o.stop-o.start)*d for o,d in zip(box, spacing)) for box in s['bounding_boxes'][1:]]
    return pd.DataFrame(dict(ml=s['voxel_counts'][1:]*np.prod(spacing)/1000, mm=mm, touched=np.isin(np.arange(1, n+1), labels[found>0])))

def run(weights):
    segmenter,rows,all_ = Segmenter.load(weights),[],[]
    for name,_,ct,reference,_ in scans(False):
        if reference is None: continue
        found,spacing = segmenter(ct).masks['lesion'],np.linalg.norm(ct.affine[:3,:3], axis=0)
        ml = np.prod(spacing)/1000; mine,theirs = (found>0).sum()*ml,(reference>0).sum()*ml
        t = lesions(reference, found, spacing); all_.append(t)
        rows.append(dict(kind='scan', name=name, components=len(t), touched=t.touched.sum(), reference_ml=theirs, found_ml=mine, overlap_ml=((found>0)&(reference>0)).sum()*ml, found=mine/theirs))
        print({k:round(float(v), 3) if k not in ('kind','name') else v for k,v in rows[-1].items()}, flush=True)
    t = pd.concat(all_)
    for unit,bounds in classes.items():
        for low,high in zip(bounds, bounds[1:]):
            d = t[(t[unit]>=low)&(t[unit]<high)]
            rows.append(dict(kind=unit, name=f'{low}–{high}' if high<np.inf else f'{low} or more', components=len(d), touched=d.touched.sum(), reference_ml=d.ml.sum()))
    df = pd.DataFrame(rows); df.to_csv(here/'lesion_size.csv', index=False, float_format='%.4g', lineterminator='\n')
    print(df.round(2).to_string(index=False))

if __name__=='__main__':
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument('--weights', default='covid3d')
    a = p.parse_args(); torch.manual_seed(0)
    run(a.weights)
