"Pictures of notebooks for light and dark pages"
from io import BytesIO
import numpy as np
from PIL import Image
from scipy import ndimage as ndi

page = np.array([0x13, 0x14, 0x16], np.int16)  # what is white on a light page is this on a dark one, as in furo

def on_white(im):
    "RGB, over white where it is transparent"
    im = im.convert('RGBA')
    return Image.alpha_composite(Image.new('RGBA', im.size, 'white'), im).convert('RGB')

def grown(lo, hi, full):
    "The interval from `lo` to `hi`, out to near what is beside it: the white edge of a CT looks like the page"
    lo,hi = max(0, lo-3),hi+3  # the filter took two
    below,above = np.flatnonzero(full[:lo]),np.flatnonzero(full[hi:])
    a = below[-1] if len(below) else 0
    b = hi+(above[0] if len(above) else len(full)-hi)
    return lo-int(.7*(lo-a)),hi+max(0, int(.7*(b-hi)))

def photographs(low, high):
    "The rectangle with all CT in it, from the darkest and the brightest channel of each pixel: it keeps its levels"
    part,_ = ndi.label(ndi.minimum_filter(low<250, 5))  # thicker than a line
    found = []
    for i,at in enumerate(ndi.find_objects(part), 1):
        inside = part[at]==i
        if inside.size<.01*part.size: continue
        usual = np.sort(np.bincount(low[at][inside], minlength=256))[-12:].sum()/inside.sum()
        gray,filled,large = (high-low)[at][inside].mean()<10,inside.mean(),inside.size>.03*part.size
        if usual<.7 and filled>.3 or large and (gray and filled>.6 or filled>.97 and high[at].mean()<128): found.append(at)  # texture, or a map of few levels
    if not found: return np.s_[0:0,0:0]
    (y0,y1),(x0,x1) = ((min(o[k].start for o in found), max(o[k].stop for o in found)) for k in (0,1))
    y0,y1 = grown(y0, y1, (low<250).any(1)); x0,x1 = grown(x0, x1, (low<250)[y0:y1].any(0))
    return np.s_[y0:y1,x0:x1]

def dark(im):
    "The picture with the lightness of lines, text and background turned round, hues kept; and whether there is a CT in it"
    rgb = np.asarray(im).astype(np.int16); r,g,b = np.moveaxis(rgb, 2, 0)
    low,high = np.minimum(np.minimum(r, g), b),np.maximum(np.maximum(r, g), b)
    res = (page+(rgb+(255-high-low)[...,None])*((255-page)/255)).astype(np.uint8)
    at = photographs(low, high); res[at] = rgb[at]
    return Image.fromarray(res),low[at].size>0

def save_pair(png, folder, name):
    "Write `name`.webp and `name`-dark.webp; the width in CSS pixels, two of the picture's to one"
    im = on_white(Image.open(BytesIO(png))); night,photo = dark(im); folder.mkdir(exist_ok=True)
    how = dict(quality=88, method=3) if photo else dict(lossless=True, method=2)
    for o,k in ((im,''),(night,'-dark')): o.save(folder/f'{name}{k}.webp', **how)
    return im.width//2
