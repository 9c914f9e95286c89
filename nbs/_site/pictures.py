"Pictures of the landing page and of the gallery: `python nbs/_site/pictures.py` writes them to nbs/_site/_static; some minutes"
import textwrap
from pathlib import Path
import numpy as np
from matplotlib import font_manager
from PIL import Image,ImageDraw,ImageFont
from scipy import ndimage as ndi
from covid3d import sample
from covid3d.dicom_seg import seg_colors
from covid3d.inference import Segmenter
from covid3d.metrics import dice
from covid3d.phantom import phantom
from covid3d.volume import Volume,canonical_affine

static = Path(__file__).resolve().parent/'_static'
orange,blue,purple = (tuple(bytes.fromhex(seg_colors[k][1:])) for k in ('lesion','right_lung','left_lung'))

def gray(ct, window=(-1000,400)):
    "Levels of a slice in a window of HU, as RGB"
    lo,hi = window
    return np.repeat((np.clip((ct-lo)/(hi-lo), 0, 1)*255)[...,None], 3, 2)

def filled(rgb, masks):
    "Masks as veils of color"
    for m,c,a in masks: rgb = np.where(m[...,None]>0, (1-a)*rgb+a*np.array(c), rgb)
    return rgb

def outlined(rgb, masks):
    "Masks as outlines of three pixels, on a dark halo that shows on any background"
    for m,c in masks:
        edge = (m>0)&~ndi.binary_erosion(m>0, iterations=3)
        rgb = np.where(ndi.binary_dilation(edge)[...,None], .4*rgb, rgb); rgb = np.where(edge[...,None], c, rgb)
    return rgb

def enlarge(a, k, order=1): return ndi.zoom(a.astype(float), k, order=order)
def save(rgb, name, quality=88): Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8)).save(static/f'{name}.webp', quality=quality, method=6)
def side(im):
    "An R at the patient's right"
    d,f = ImageDraw.Draw(im),font(26)
    d.text((14,8), 'R', font=f, fill='white', stroke_width=2, stroke_fill='black')
    return im
def font(size, bold=False): return ImageFont.truetype(font_manager.findfont(font_manager.FontProperties(family='DejaVu Sans', weight='bold' if bold else 'normal')), size)

def hero(segmenter):
    "A slice of phantom 309, which the network has not seen, plain and with what it found; and the card for links"
    ph = phantom(309, shape=(96,480,480), spacing=(3,.75,.75)); seg = segmenter(ph.ct)
    z,at = int(seg.masks['lesion'].sum((1,2)).argmax()),np.s_[40:415,:]
    ct = gray(enlarge(ph.ct.data[z][at], 4/3, 3))
    mask = lambda k: enlarge(seg.masks[k][z][at], 4/3)>.5
    veils = [(mask('right_lung'), blue, .28), (mask('left_lung'), purple, .28), (mask('lesion'), orange, .36)]
    found = outlined(filled(ct, veils), [(mask('lesion'), orange)])
    for im,name in ((ct,'hero-ct'),(found,'hero-mask')): save(np.asarray(side(Image.fromarray(np.clip(im, 0, 255).astype(np.uint8)))), name)
    card = Image.new('RGB', (1200,630), '#0b1f29')
    card.paste(Image.fromarray(found.astype(np.uint8)).crop((20,0,620,500)).resize((756,630), Image.Resampling.LANCZOS), (444,0))
    d = ImageDraw.Draw(card); d.rectangle((0,0,470,630), fill='#0b1f29')
    d.text((60,170), 'covid3d', font=font(72, True), fill='white')
    d.multiline_text((62,285), textwrap.fill('3D segmentation of chest CT, from the first slice to a trained network', 20), font=font(30), fill='#b9d6e2', spacing=12)
    card.save(static/'card.jpg', quality=85, optimize=True)

def panel(name, ct, z, masks, at=np.s_[:,:]):
    "A slice with outlines, 560 pixels wide"
    k = 560/ct[z][at].shape[1]
    rgb = outlined(gray(enlarge(ct[z][at], k, 3)), [(enlarge(m[z][at], k)>.5, c) for m,c in masks])
    save(np.asarray(side(Image.fromarray(np.clip(rgb, 0, 255).astype(np.uint8)))), name, 80)

def of_phantom(name, segmenter, seed, z=None, spacing=None):
    "Reference (blue) and answer (orange) on one slice of a phantom"
    ph = phantom(seed); ct = ph.ct if spacing is None else Volume(ph.ct.data, canonical_affine(spacing))
    seg = segmenter(ct); ref,got = ph.lesion.data,seg.masks['lesion']
    ml = lambda m: np.count_nonzero(m)*ct.ml_per_voxel
    print(f'{name}: seed {seed}, Dice {dice(got, ref):.2f}, lesion {ml(ref):.0f} ml, found {ml(got):.0f} ml; {seg.notes}', flush=True)
    z = int(ref.sum((1,2)).argmax()) if z is None else z
    panel(name, ph.ct.data, z, [(ref, blue), (got, orange)], np.s_[20:230,8:248])

def of_sample(segmenter):
    "The lungs of the sample scan, and what the network calls a lesion there"
    seg = segmenter(sample()); ct,m = seg.ct.data,seg.masks
    print('sample:', seg, seg.notes)
    panel('sample-lungs', ct, 90, [(m['right_lung'], blue), (m['left_lung'], purple)])
    panel('sample-lesion', ct, int(m['lesion'].sum((1,2)).argmax()), [(m['lesion'], orange)])

if __name__=='__main__':
    s = Segmenter.load('covid3d')
    hero(s); of_sample(s)
    of_phantom('diffuse-good', s, 302); of_phantom('diffuse-bad', s, 304)
    of_phantom('small-good', s, 300, 47); of_phantom('small-bad', s, 311, 38)
    of_phantom('spacing-good', s, 300, 55); of_phantom('spacing-bad', s, 300, 55, (1,.47,.47))
