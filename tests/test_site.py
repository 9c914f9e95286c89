"""The built site, in a browser: links, names, pictures, widths, accessibility, search, and that two builds are equal

The site is built here, unless COVID3D_BUILT names the folder of one that is; COVID3D_SITE does so too, and asks for the browser and a second build. Chromium and Playwright open it; axe-core (package axe-playwright-python, or COVID3D_AXE, its file) judges."""
import functools,http.server,importlib.util,json,os,re,shutil,subprocess,sys,threading,zlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from html import unescape
from pathlib import Path
from urllib.parse import unquote,urldefrag,urljoin

import pytest
from test_project import build,cfg,read,root

base = '/covid3d/'
widths = 390,1010,1024,1280,1366,1440

# The source

def test_every_notebook_has_its_place():
    found = [build.Page(p) for p in (root/'nbs').glob('*.ipynb')]
    assert build.unplaced(found)==[], 'add it to `parts` in nbs/_site/build.py'
    placed = ' '.join([*build.parts.values(), *build.others.values()]).split()
    assert not [k for k,n in Counter(placed).items() if n>1]
    assert {*placed}<={p.name for p in found}, 'listed in nbs/_site/build.py, and not there'

def test_citation(): assert re.search(r'^version: (.*)$', read('CITATION.cff'), re.M)[1]==cfg['version']

def test_a_dark_picture_keeps_the_ct():
    import numpy as np
    from PIL import Image
    sys.path.insert(0, str(root/'nbs/_site'))
    from figures import dark,page
    im = np.full((80,120,3), 255, np.uint8); im[20:60,10:60] = np.arange(50)[:,None]*3; im[30:50,20:40] = 255; im[40,80:110] = 0
    got = np.asarray(dark(Image.fromarray(im))[0])
    assert (got[0,0]==page).all() and (got[40,90]>240).all()  # background and line are exchanged
    assert (got[20:60,10:60]==im[20:60,10:60]).all()          # the picture in it is not
    assert (np.asarray(dark(Image.fromarray(np.full((80,120,3), 255, np.uint8)))[0])==page).all()

def test_the_page_is_dark_between_pictures():
    import numpy as np
    from PIL import Image
    sys.path.insert(0, str(root/'nbs/_site'))
    from figures import dark,page
    im = np.full((150,320,3), 255, np.uint8)
    for x in 20,120,220: im[40:120,x:x+80] = np.random.default_rng(x).integers(0, 240, (80,80,1))  # three panels, gaps of 20
    im[20:30,40:44] = 0                                            # a stroke of a title
    got = np.asarray(dark(Image.fromarray(im))[0])
    assert (got[40:120,102:118]==page).all() and (got[:38]==page).all(2).mean()>.95 and (got[22:28,41:43]>240).all()
    for x in 20,120,220: assert (got[42:118,x+2:x+78]==im[42:118,x+2:x+78]).all()
    boxes = np.full((80,200,3), 255, np.uint8); boxes[10:70,10:90] = 220
    assert not dark(Image.fromarray(boxes))[1]                     # the gray box of a drawing is no CT

# The build

def make(out):
    return subprocess.Popen([sys.executable, 'nbs/_site/build.py', str(out)], cwd=root, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | dict(OMP_NUM_THREADS='1', PYTHONWARNINGS='ignore'))

@pytest.fixture(scope='module')
def site(tmp_path_factory):
    if given := os.environ.get('COVID3D_SITE') or os.environ.get('COVID3D_BUILT'): return Path(given).resolve()
    d = tmp_path_factory.mktemp('site'); p = make(d/'covid3d'); said = p.communicate()[0]
    assert p.returncode==0, said
    return d/'covid3d'

@pytest.mark.skipif(not os.environ.get('COVID3D_SITE'), reason='compares the site in COVID3D_SITE with one built anew')
def test_two_builds_are_equal(site, tmp_path):
    p = make(tmp_path/'covid3d'); said = p.communicate()[0]
    assert p.returncode==0, said
    files = lambda d: {o.relative_to(d).as_posix():o.read_bytes() for o in d.rglob('*') if o.is_file()}
    a,b = files(site),files(tmp_path/'covid3d')
    assert sorted(k for k in a.keys()|b.keys() if a.get(k)!=b.get(k))==[]

class Html:
    "The text of a page, and its tags"
    def __init__(self, p): self.html = p.read_text(encoding='utf-8'); self.ids = re.findall(r'<[a-z][^>]*?\sid="([^"]*)"', self.html)
    def tags(self, *names):
        "Attributes of each tag of these names"
        return [dict(re.findall(r'([\w:-]+)="([^"]*)"', m[1])) for m in re.finditer(rf'<(?:{"|".join(names)})\b([^>]*)>', self.html)]
    @staticmethod
    def plain(s): return unescape(re.sub('<[^>]*>', '', s)).strip()
    @property
    def text(self): return self.plain(self.html)

@pytest.fixture(scope='module')
def pages(site): return {p.name:Html(p) for p in sorted(site.glob('*.html'))}

no_pages = {'genindex.html','search.html'}

def test_no_link_is_broken(site, pages):
    home,bad = cfg['doc_host']+cfg['doc_baseurl']+'/',[]
    for k,s in pages.items():
        for o in s.tags('a', 'link', 'img', 'script'):
            a = unescape(o.get('href') or o.get('src') or '')
            if a.startswith(home): a = a[len(home):] or 'index.html'
            if re.match(r'[a-z]+:', a) or not a or k=='404.html' and a.startswith('/'): continue
            to,frag = urldefrag(urljoin(k, a)); to = unquote(to.partition('?')[0]) or k
            if not (site/to).exists() or frag and to in pages and unquote(frag) not in pages[to].ids: bad.append((k, a))
    assert bad==[]

def test_links_into_the_repository(pages):
    "What a page says is in the repository is there"
    at = re.compile(rf'href="{cfg["git_url"]}/(?:blob|tree)/{cfg["branch"]}/([^"#?]*)')
    assert {(k, o) for k,s in pages.items() for o in at.findall(s.html) if not (root/unquote(o)).exists()}==set()

def test_no_id_is_there_twice(pages): assert {k:d for k,s in pages.items() if (d := [i for i,n in Counter(s.ids).items() if n>1])}=={}

def test_pictures_are_told_in_words(pages):
    alts = [(k, o.get('alt', '')) for k,s in pages.items() for o in s.tags('img')]
    assert len(alts)>60 and [o for o in alts if len(o[1])<12 or re.search(r'[0-9a-f]{16}|\.png|\.webp', o[1])]==[]

def test_notebook_names_are_links(pages):
    stems = '|'.join(p.stem for p in (root/'nbs').glob('*.ipynb') if p.stem!='index')
    bare = re.compile(rf'(?<!internal">)<code class="docutils literal notranslate"><span class="pre">({stems})</span></code>')
    assert [(k, o) for k,s in pages.items() for o in bare.findall(s.html)]==[]

def test_heads(pages):
    "Each page has a description, a card, an icon and one heading"
    for k,s in pages.items():
        told = {o.get('name') or o.get('property'):o.get('content') for o in s.tags('meta')}
        assert s.html.count('<h1')<=1 and 'favicon.svg' in s.html and told['og:image'].endswith('card.jpg'), k
        assert f'<link rel="canonical" href="{cfg["doc_host"]}{cfg["doc_baseurl"]}/' in s.html, k
        if k not in no_pages: assert len(told['description'])>10 and told['og:title'] and '<h1' in s.html, k

def test_files_beside_the_pages(site, pages):
    for p in (root/'covid3d').glob('*.py'):
        if m := re.search(r'^Docs: \S+/(\S+?)"*$', p.read_text(encoding='utf-8'), re.M):
            s = (site/m[1]).read_text(encoding='utf-8'); assert s.startswith('# ') and '```python' in s
    for p in (root/'covid3d/templates').glob('*.json'): assert (site/p.name).read_bytes()==p.read_bytes()
    at = re.findall(r'<loc>(.*?)</loc>', (site/'sitemap.xml').read_text())
    assert {o.rsplit('/', 1)[1] or 'index.html' for o in at}=={*pages}-{'404.html'}-no_pages
    for o in re.findall(r'\]\((.*?)\)', (site/'llms.txt').read_text(encoding='utf-8')): assert (site/o.rsplit('/', 1)[1]).exists()
    for p in (root/'nbs').glob('*.ipynb'): assert (site/'notebooks'/p.name).read_bytes()==p.read_bytes()

no_code = re.compile(r'^[ ]*(`{3,}).*?^[ ]*\1[ ]*$|`[^`\n]+`|^    .*$', re.M|re.S)
def test_pages_for_programs(site, pages):
    "Each page has a twin in markdown, whole tables in it, and every link an address"
    home,bad = cfg['doc_host']+cfg['doc_baseurl']+'/',[]
    twins = {k:(site/f'{k}.md').read_text(encoding='utf-8') for k in pages.keys()-no_pages-{'404.html'}}
    for k,s in twins.items():
        assert k=='index.html' or f'rel="alternate" type="text/markdown" href="{k}.md"' in pages[k].html, k
        for a in re.findall(r'\]\(([^)\s]*)', no_code.sub('', s)):
            to = a.removeprefix(home).partition('#')[0]
            if not a.startswith(('http','#','mailto:')) or a.startswith(home) and not (site/(to or 'index.html')).exists(): bad.append((k, a))
        bad += [(k, o) for o in re.findall(r'<pandas.*>|^    .* \.\.\. .*$|\{py:\w+\}|^:::.*', s, re.M)]
    assert bad==[]
    told = (site/'llms.txt').read_text(encoding='utf-8')
    assert {f'{k}.md' for k in twins if not k.startswith(('part-','index'))}<={o.rsplit('/', 1)[1] for o in re.findall(r'\]\((.*?)\)', told)}

def test_a_table_as_markdown():
    sys.path.insert(0, str(root/'nbs/_site'))
    import pandas as pd
    from twins import table
    df = pd.DataFrame(range(4), pd.MultiIndex.from_product([['a','b'],[1,2]], names=['x','y']), ['v|w'])
    assert table(df.to_html())=='| x | y | v\\|w |\n| --- | --- | --- |\n| a | 1 | 0 |\n| a | 2 | 1 |\n| b | 1 | 2 |\n| b | 2 | 3 |'
    assert table(df.unstack().to_html()).startswith('| y / x | v\\|w / 1 | v\\|w / 2 |\n')

def test_every_parameter_has_a_meaning(pages):
    bad = [(k, *cells) for k,s in pages.items() if k.startswith('api-') for t in re.findall(r'<table.*?</table>', s.html, re.S) if '<p>meaning</p>' in t
           for r in re.findall(r'<tr.*?</tr>', t, re.S) for cells in [[Html.plain(c) for c in re.findall(r'<td.*?</td>', r, re.S)]] if cells and not cells[-1]]
    assert bad==[], 'give each parameter a docment'

def test_reference(site, pages):
    import covid3d.unet,covid3d.metrics
    data = zlib.decompress((site/'objects.inv').read_bytes().split(b'\n', 4)[4]).decode()
    names = {o.split()[0] for o in data.splitlines() if ' py:' in o}
    assert {f'{m.__name__}.{k}' for m in (covid3d.unet, covid3d.metrics) for k in m.__all__}<=names and len(names)>250
    assert pages['genindex.html'].html.count('<li>')>300
    api = ' '.join(s.text for k,s in pages.items() if k.startswith('api'))
    for o in '__main__.','NoneType','object at 0x','<factory>': assert o not in api
    row = re.search(r'<tr[^>]*>(?:(?!</tr>).)*>decoder<.*?</tr>', pages['api-unet.html'].html, re.S)[0]
    assert re.findall(r'<td>(.*?)</td>', re.sub(r'<(?!/?td>)[^>]*>|\n', '', row))[1:3]==['int | tuple | None', 'None']

def test_commands(pages):
    import typer.main
    from covid3d.cli import app
    s = pages['commands.html'].html
    assert '$ covid3d --help' in re.search('<pre>(.*?)</pre>', s, re.S)[1]
    assert re.findall(r'<h2>(.*?)<', s)==[f'covid3d {k}' for k in typer.main.get_command(app).commands]

# In a browser

class Quiet(http.server.SimpleHTTPRequestHandler):
    "Serves the site at the address that it has, with its page for what is not there"
    def log_message(self, *args): pass
    def send_error(self, code, *args, **kwargs):
        body = (Path(self.directory)/'covid3d/404.html').read_bytes()
        self.send_response(code); self.send_header('Content-Type', 'text/html'); self.end_headers(); self.wfile.write(body)

@pytest.fixture(scope='module')
def address(site, tmp_path_factory):
    d = tmp_path_factory.mktemp('www'); (d/'covid3d').symlink_to(site)
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), functools.partial(Quiet, directory=str(d)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f'http://127.0.0.1:{server.server_port}{base}'
    server.shutdown()

@pytest.fixture(scope='module')
def browser():
    if not os.environ.get('COVID3D_SITE'): pytest.skip('drives a built site: `make test-site`')
    exe = next((shutil.which(p) for p in ('chromium','chromium-browser','google-chrome') if shutil.which(p)), None)
    if not exe or not importlib.util.find_spec('playwright'): pytest.skip('needs Chromium and Playwright')
    return exe

@pytest.fixture(scope='module')
def chrome(browser):
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        chrome = p.chromium.launch(executable_path=browser, args=['--no-sandbox'])
        yield chrome
        chrome.close()

def axe_file():
    if o := os.environ.get('COVID3D_AXE'): return Path(o)
    if o := importlib.util.find_spec('axe_playwright_python'): return Path(o.origin).parent/'axe.min.js'

# what ends beyond the window, or is cut off by a box that does not scroll
cut = '''() => { const W = document.documentElement.clientWidth, bad = []
  const walk = e => { const s = getComputedStyle(e), r = e.getBoundingClientRect()
    if (s.display === 'none' || s.visibility === 'hidden' || s.position === 'fixed' || !r.width || e.matches('.visually-hidden, .skip-to-content, .sidebar-drawer, .toc-drawer, svg, input, .compare')) return
    if (r.right > W + 1 || r.left < -1) { bad.push(e.localName + '.' + e.className + ': ' + e.textContent.trim().slice(0, 50)); return }
    if (s.overflowX === 'auto' || s.overflowX === 'scroll') return
    if (s.overflowX === 'hidden' && e.scrollWidth > e.clientWidth + 1 && e.textContent.trim()) bad.push('hidden in ' + e.localName + '.' + e.className)
    for (const c of e.children) walk(c) }
  for (const e of document.querySelectorAll('.mobile-header, .main')) walk(e)
  return bad.slice(0, 5) }'''

class Tab:
    "A page of a browser that keeps what went wrong and what was loaded"
    def __init__(self, chrome, address, **how):
        self.page,self.address,self.faults = chrome.new_context(**how).new_page(),address,[]
        self.page.on('console', lambda m: m.type in ('error','warning') and self.faults.append(m.text))
        self.page.on('pageerror', lambda e: self.faults.append(str(e)))
        self.page.on('requestfailed', lambda r: self.faults.append(f'failed: {r.url}'))
        self.page.on('response', self.count)
    def count(self, r):
        if not r.url.startswith((self.address, 'data:')): self.faults.append(f'outside: {r.url}')
        if r.status>=400: self.faults.append(f'{r.status}: {r.url}')
    def open(self, name): self.page.goto(self.address+name, wait_until='load')
    def see_all(self):
        "Load what a reader sees who scrolls to the end; bytes in all"
        return self.page.evaluate('''async () => { const seen = [...document.images].filter(e => e.checkVisibility())
          for (const e of seen) e.loading = 'eager'
          await Promise.allSettled(seen.map(e => e.decode()))
          return performance.getEntries().reduce((n, e) => n + (e.encodedBodySize || 0), 0) }''')

@pytest.fixture(scope='module')
def tab(chrome, address): return Tab(chrome, address, viewport=dict(width=1366, height=900))

# Of thousands of words of code, one of each color on each background is enough: the others take minutes
thin = '''() => { const seen = new Set(), at = (e, s) => e.closest(s)?.className
  for (const e of document.querySelectorAll('.highlight pre span:not([id])')) {
    const k = [e.className, e.parentElement.className, at(e, '[class*=highlight-]'), at(e, '.cell_output, .cell_input'), at(e, 'details, aside, .card')].join('|')
    if (seen.has(k)) e.replaceWith(...e.childNodes); else seen.add(k) }
  for (const e of document.querySelectorAll('.highlight pre')) e.normalize() }'''

def judged(page, axe):
    "Rules of axe-core that a page breaks, critical and serious"
    page.evaluate(thin); page.add_script_tag(path=axe)
    found = page.evaluate('axe.run(document, {resultTypes: ["violations"], runOnly: ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "best-practice"]})')
    return [(o['id'], o['nodes'][0]['html'][:150]) for o in found['violations'] if o['impact'] in ('critical','serious')]

def faults(tab, name, axe):
    "What is wrong with a page: a fault, an outside request, 1 MB or more, text cut at any width, what axe calls serious"
    tab.faults = []; tab.open(name)
    size,found = tab.see_all(),[]
    if size>1e6: found.append(f'{size/1e6:.2f} MB')
    for w in widths:
        tab.page.set_viewport_size(dict(width=w, height=900))
        if o := tab.page.evaluate(cut): found.append((w, o))
    tab.page.set_viewport_size(dict(width=1366, height=900))
    return tab.faults+found+(judged(tab.page, axe) if axe else [])

def drive(exe, address, names):
    "Name → faults of pages, in a browser of their own"
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        chrome = p.chromium.launch(executable_path=exe, args=['--no-sandbox'])
        tab,axe = Tab(chrome, address, viewport=dict(width=1366, height=900)),axe_file()
        found = {n:faults(tab, n, axe) for n in names}
        chrome.close()
    return found

def test_every_page(browser, address, pages):
    "No page has a fault; two browsers share the work, the longest pages first"
    names,n = sorted(pages, key=lambda k: -len(pages[k].html)),min(2, os.cpu_count())
    with ThreadPoolExecutor(n) as pool: found = [o for f in [pool.submit(drive, browser, address, names[i::n]) for i in range(n)] for o in f.result().items()]
    bad = {k:v for k,v in found if v}
    assert bad=={}, json.dumps(bad, indent=1, ensure_ascii=False)

def test_dark(chrome, address):
    "Dark pages have dark figures and enough contrast"
    tab,axe = Tab(chrome, address, viewport=dict(width=1366, height=900), color_scheme='dark'),axe_file()
    for name in 'index','metrics','api-unet','commands','gallery','search':
        tab.open(f'{name}.html')
        if axe: assert judged(tab.page, axe)==[], name
    tab.open('metrics.html')
    shown = tab.page.evaluate('[...document.querySelectorAll("article img")].filter(e => getComputedStyle(e).display !== "none").map(e => e.src)')
    assert shown and all(o.endswith('-dark.webp') for o in shown if '-dark' in o or '_images' in o)

@pytest.mark.parametrize('words,name', [('Hounsfield','volume'), ('Dice','metrics'), ('DynamicUnet3d','api-unet'), ('sliding window','inference'), ('lr_find','learner'),
                                        ('DICOM SEG','dicom_seg'), ('install','install'), ('license','license'), ('nnU-Net','benchmarks')])
def test_search(tab, words, name):
    tab.open(f'search.html?q={words}')
    first = tab.page.wait_for_selector('#search-results li a')
    assert first.get_attribute('href').split('.html')[0]==name
    tab.page.wait_for_selector('#search-results li p')

def test_slider(tab):
    tab.open('index.html'); tab.page.locator('.compare input').press('ArrowLeft')
    assert '49%' in tab.page.locator('.compare').get_attribute('style')

def test_first_column_stays(tab):
    tab.page.set_viewport_size(dict(width=390, height=800)); tab.open('api-unet.html')
    moved = tab.page.evaluate('() => { const w = document.querySelector(".table-wrapper"), c = w.querySelector("tbody td"), x = c.getBoundingClientRect().left; w.scrollLeft = 120; return [w.scrollLeft, c.getBoundingClientRect().left-x] }')
    tab.page.set_viewport_size(dict(width=1366, height=900))
    assert moved[0]>0 and moved[1]>-20

def test_page_that_is_not_there(chrome, address):
    page = chrome.new_page(); page.goto(address+'no/such/page.html')
    assert page.title().startswith('Page not found') and page.locator('link[rel=stylesheet]').first.get_attribute('href')
    page.get_by_role('link', name='Python API').last.click(); page.wait_for_url('**/covid3d/api.html')
