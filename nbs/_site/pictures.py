"""The pictures of pages in nbs/images that the chapters show: `scan_page.png` and `cohort_page.png`, of synthetic patients

    python nbs/_site/pictures.py

Needs Chromium and Playwright; takes some minutes. The figures in them follow from the weights that come with covid3d, so take them again when those change."""
import io, shutil, tempfile
from pathlib import Path

import numpy as np
from PIL import Image
from playwright.sync_api import sync_playwright

from covid3d.cli import main
from covid3d.inference import Segmenter
from covid3d.phantom import phantom, write_phantoms
from covid3d.quantify import quantify
from covid3d.report import report
from covid3d.weights import own_weights

images = Path(__file__).parent.parent/'images'

def few_colors(png) -> Image.Image:
    "`png` in 32 grays, and the 64 colors that cover what is not gray"
    x = np.asarray(png)
    bright = x[np.ptp(x.astype(int), axis=2)>12].reshape(1, -1, 3)
    colors = np.reshape(Image.fromarray(bright).quantize(64, Image.Quantize.MAXCOVERAGE).getpalette(), (-1,3))
    palette = Image.new('P', (1,1)); palette.putpalette([*np.repeat(np.linspace(0, 255, 32).astype(int), 3), *colors.ravel()])
    few = png.quantize(palette=palette, dither=Image.Dither.NONE)
    few.paste(31, mask=Image.fromarray(x.min(axis=2)==255))  # Pillow's search is not exact, and the page around is white
    return few

def shoot(chrome, page, to, width, height=None, scale=1, click=()):
    "A screenshot of `page`, the whole of it if no height is given, in few colors"
    tab = chrome.new_page(viewport=dict(width=width, height=height or 800), device_scale_factor=scale)
    tab.goto(page.as_uri()); tab.wait_for_timeout(3000)
    for text in click: tab.get_by_text(text).first.click()
    few_colors(Image.open(io.BytesIO(tab.screenshot(full_page=height is None))).convert('RGB')).save(images/to, optimize=True)

if __name__=='__main__':
    with tempfile.TemporaryDirectory() as d, sync_playwright() as p:
        d = Path(d)
        seg = Segmenter.load(own_weights(), mirror=True)(phantom(23).ct)
        report(seg, d/'scan.html', 'phantom 23', quantify(seg))
        write_phantoms(d/'phantoms', n=6, seed=20)
        main(['predict',str(d/'phantoms'/'ct'),'-o',str(d/'out'),'--quiet'])
        chrome = p.chromium.launch(executable_path=shutil.which('chromium'), args=['--no-sandbox'])
        shoot(chrome, d/'scan.html', 'scan_page.png', 1150, 980, .87)
        shoot(chrome, d/'out'/'index.html', 'cohort_page.png', 1100, click=['Lesion (ml)'])
        chrome.close()
