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

def is_photograph(color, filled, most, usual, mean, size):
    "Texture, a map of few levels, or what is dark; boxes and bands of a drawing are light and of one level"
    gray = color<10
    if filled<.3 or color>100 and filled<.9: return False
    if gray and size>.03 and (mean<150 or most<.6 and mean<200): return True
    return usual<.7 and (gray or mean<215) or filled>.97 and size>.03 and mean<128

def runs(full, gap=3):
    "(start, stop) of each stretch of lines with something in it; fewer empty lines than `gap` do not part them"
    full = ndi.binary_closing(np.pad(full, gap), np.ones(gap))[gap:-gap]
    edges = np.flatnonzero(np.diff(np.r_[0,full.astype(int),0]))
    return list(zip(edges[::2], edges[1::2]))

def joined(cols, found, x0):
    "Columns of a row of panels, with both lungs on white in one: a gap far narrower than the widest is none, if what is beside it is mostly white"
    widest,res = max((b[0]-a[1] for a,b in zip(cols, cols[1:])), default=0),cols[:1]
    light = lambda c: all(o[2]<.6 for o in found if o[1].start<x0+c[1] and o[1].stop>x0+c[0])
    for c in cols[1:]:
        if 3*(c[0]-res[-1][1])<widest and light(c) and light(res[-1]): res[-1] = res[-1][0],c[1]
        else: res.append(c)
    return res

def border(mean):
    "How many of the outermost lines are page: they are lighter than what follows, but for an outline that reaches over the edge or a half-white pixel"
    drops = np.flatnonzero((mean[:-1]-mean[1:]>15) & (np.minimum.accumulate(mean)[:-1]>mean[1:]+15))
    return drops[-1]+1 if len(drops) else 0

def trimmed(low, y0, y1, x0, x1):
    "A rectangle without the page at its border"
    rows,cols = low[y0:y1,x0:x1].mean(1),low[y0:y1,x0:x1].mean(0)
    return np.s_[y0+border(rows[:9]):y1-border(rows[:-10:-1]),x0+border(cols[:9]):x1-border(cols[:-10:-1])]

def panels(low, color, y0, y1, x0, x1, found, white):
    "The rectangles of a grid of pictures, cut apart where the page is seen between them: those with a photograph, and gray ones as wide beside these"
    full,meet = low<white,lambda o, a, b: o.start<b and o.stop>a
    for a,b in runs(full[y0:y1,x0:x1].any(1)):
        row,others,done = [o for o in found if meet(o[0], y0+a, y0+b)],[],[]
        for c,d in joined(runs(full[y0+a:y0+b,x0:x1].any(0)), row, x0) if row else ():
            here = [o for o in row if meet(o[1], x0+c, x0+d)]
            if not here: others = others[:-1]+[(others[-1][0],x0+d)] if others and others[-1] else others+[(x0+c,x0+d)]; continue
            rows = [(y0+a+e,y0+a+f) for e,f in runs(full[y0+a:y0+b,x0+c:x0+d].any(1), 2)]
            rows = [(e,f) for e,f in rows if any(meet(o[0], e, f) for o in here)]
            done.append((rows[0][0],rows[-1][1],x0+c,x0+d)); others.append(None)
        beside = [(q[0],q[1],*o) for o in filter(None, others) for q in done[:1] if abs(o[1]-o[0]-q[3]+q[2])<12 and color[q[0]:q[1],o[0]:o[1]].mean()<6]
        yield from (trimmed(low, *p) for p in done+beside)

def photographs(low, high, white):
    "The rectangles of all CT, from the darkest and the brightest channel of each pixel: they keep their levels"
    part,_ = ndi.label(ndi.minimum_filter(low<250, 5))  # thicker than a line
    found = []
    for i,at in enumerate(ndi.find_objects(part), 1):
        inside = part[at]==i
        if inside.size<.01*part.size: continue
        levels = np.sort(np.bincount(low[at][inside], minlength=256)/inside.sum())
        if is_photograph((high-low)[at][inside].mean(), inside.mean(), levels[-1], levels[-12:].sum(), high[at][inside].mean(), inside.size/part.size): found.append((*at,inside.mean()))
    if not found: return []
    (y0,y1),(x0,x1) = ((min(o[k].start for o in found), max(o[k].stop for o in found)) for k in (0,1))
    y0,y1 = grown(y0, y1, (low<250).any(1)); x0,x1 = grown(x0, x1, (low<250)[y0:y1].any(0))
    return list(panels(low, high-low, y0, y1, x0, x1, found, white))

def dark(im, white=250):
    "The picture with the lightness of lines, text and background turned round, hues kept; and whether there is a CT in it"
    rgb = np.asarray(im).astype(np.int16); r,g,b = np.moveaxis(rgb, 2, 0)
    low,high = np.minimum(np.minimum(r, g), b),np.maximum(np.maximum(r, g), b)
    res = (page+(rgb+(255-high-low)[...,None])*((255-page)/255)).astype(np.uint8)
    found = photographs(low, high, white)
    for at in found: res[at] = rgb[at]
    return Image.fromarray(res),bool(found)

def save_pair(png, folder, name, same=False):
    "Write `name`.webp and `name`-dark.webp, which is the `same` if it cannot be told what is a CT; the width in CSS pixels, two of the picture's to one"
    im = Image.open(BytesIO(png)); white = 225 if im.format=='JPEG' else 250  # of a JPEG the page beside an edge is not quite white
    im = on_white(im); night,photo = (im,True) if same else dark(im, white); folder.mkdir(exist_ok=True)
    lossy = photo and im.getcolors(256) is None  # a picture of few colors is smaller without loss
    how = dict(quality=80, method=4) if lossy else dict(lossless=True, method=2)
    for o,k in ((im,''),(night,'-dark')): o.save(folder/f'{name}{k}.webp', **how)
    return im.width//2
