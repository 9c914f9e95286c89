"""The site: `python nbs/_site/build.py` writes README.md and the site in _docs/; with a folder, the site there; with `--readme`, README.md alone

A notebook becomes a page. Pictures get a dark twin, `#| hide` cells are left out, cells that only test are folded.
The pages in pages/ and some files of the repository join them, reference.py writes those of the reference, and Sphinx does the rest."""
import ast,base64,csv,json,os,re,shutil,subprocess,sys,zlib
from html import escape
from pathlib import Path
from nbdev.config import get_config,nbpath2html

site = Path(__file__).resolve().parent
root = site.parents[1]
sys.path.insert(0, str(site))
import twins

# The reading order. Each notebook stands in one place; those in tutorials/ and results/ are found by themselves.
parts = {
    'Scans':'volume nifti hu show dicom_slice dicom phantom',
    'Patches':'transforms patches augment augment_intensity augment_sets',
    'Network, losses, metrics':'encoder unet losses metrics',
    'Data':'cases check archive datasets own_folder data prepare prepared_folder',
    'Training':'learner callbacks recipe pretrain',
    'Inference':'weights ensemble inference segmenter domain quantify report scans output predict',
    'Evaluation':'evaluate statistics score_page cohort folds paper_table reproduce',
    'Engineering':'dicom_file dicom_pixels dicom_series dicom_seg dicom_sr itk export outlines layouts download shapes anatomy lung_tissue opacities '
                  'memory distributed workers checkpoint signals checkpoint_check files errors pages command train_commands use_commands cli main'}
about = {
    'Scans':'From a file on disk to a volume that knows where it lies in the patient.',
    'Patches':'What the network sees: resampled, windowed, cut out and changed at random.',
    'Network, losses, metrics':'A 3D U-Net, what it is asked to get right, and how we measure whether it did.',
    'Data':'From a folder of scans to batches.',
    'Training':'Data, network and loss together.',
    'Inference':'From a scan to masks, figures and a page.',
    'Evaluation':'How good is it, and how sure can we be?',
    'Engineering':'Encodings, data sets and download, synthetic bodies, memory, several processes, checkpoints, the command line.'}
others = dict(tutorials='fastai', results='benchmarks', project='promises')  # notebooks of the other sections
# Files of the repository that are pages, too
files = {'CHANGELOG.md':'changelog', 'CONTRIBUTING.md':'contributing', 'THIRD_PARTY.md':'third-party',
         'covid3d/model/README.md':'model-card', 'tests/faults/catalogue.md':'bad-inputs'}
files_about = {'changelog':'What changed, release by release', 'contributing':'How to set up a clone, change a notebook, and run the tests',
    'third-party':'The packages that an installation brings, and the license of each', 'bad-inputs':'Every kind of bad input, what covid3d answers, and the test that proves it',
    'model-card':'The network that comes with covid3d: how it was trained, what it scores, and what it cannot do'}
theirs = {'LICENSE':'license', 'CITATION.cff':'citation', 'nbs/tutorials':'tutorials'}  # and pages that stand for one
no_twin = {'404', 'genindex', 'search'}  # pages that only lead to others
renamed = {'model-card':'Model card', 'changelog':'Changelog', 'bad-inputs':'Bad inputs', 'third-party':'Licenses of third parties'}
# What a reader looks up, and the page that the search shows first
index = dict(volume='Hounsfield; Hounsfield units; HU; NIfTI; affine; orientation', show='lung window; window', dicom='DICOM', dicom_seg='DICOM SEG; DICOM Segmentation',
    dicom_sr='DICOM SR; Structured Report', itk='NRRD; MetaImage', metrics='Dice; Hausdorff distance; HD95; surface Dice; NSD', losses='loss; cross-entropy; focal loss',
    unet='U-Net', encoder='r3d_18; Kinetics', inference='sliding window', learner='lr_find; learning rate; fine_tune; mixed precision', memory='out of memory; GPU memory; memory',
    checkpoint='resume', benchmarks='nnU-Net; MONAI; baselines', domain='out of distribution', weights='safetensors; weights', ensemble='ensemble', export='ONNX', folds='cross-validation',
    transforms='patch; resampling; spacing', augment='augmentation', phantom='phantom; synthetic CT', fastai='fastai')

# Text

link_re = re.compile(r'(\]\(|<img\b[^>]*?\bsrc=")(?![a-z]+:|[#/])([^)\s"]+)')
def relink(s, f):
    "Markdown `s` with each relative link and picture address replaced by `f` of it"
    return link_re.sub(lambda m: m[1]+f(m[2]), s)

def markdown_cell(s): return dict(cell_type='markdown', id=f'{zlib.crc32(s.encode()):08x}', metadata={}, source=s)
def source(c): return ''.join(c['source']).strip()
def code(c): return re.sub(r'^#\|.*\n?', '', source(c), flags=re.M).strip()
def is_left_out(c):
    s = source(c)
    return not s or s.startswith(('#| hide', '#|hide', '<!-- WARNING')) or c['cell_type']!='markdown' and not code(c)

def results(c):
    "The outputs of cell `c` as markdown, pictures apart"
    for o in c.get('outputs', []):
        d = o.get('data', {})
        if o.get('name')=='stderr' or any(k.startswith('image/') for k in d): continue
        if twins.is_table(h := ''.join(d.get('text/html', ''))): yield twins.table(h)
        elif 'text/markdown' in d: yield ''.join(d['text/markdown']).strip()
        elif t := ''.join(d.get('text/plain') or o.get('text', '')).rstrip(): yield '\n'.join(('    '+l).rstrip() for l in t.splitlines())

def text(nb, prose=str, pictures=lambda cs, i: []):
    "Notebook `nb` as markdown: prose, code, written results, and what `pictures` gives for a cell"
    res,cs = [],[c for c in nb['cells'] if not is_left_out(c)]
    for i,c in enumerate(cs):
        if c['cell_type']!='code': res.append(prose(source(c))); continue
        if 'echo: false' not in source(c): res.append(f'```python\n{code(c)}\n```')
        res += [*results(c), *pictures(cs, i)]
    return '\n\n'.join(res)+'\n'

def readme(nb, nbs='nbs'):
    "README.md from index notebook `nb` in folder `nbs`: links from there become links from the repository's root"
    for c in nb['cells']:
        if any(k.startswith('image/') for o in c.get('outputs', []) for k in o.get('data', {})):
            raise SystemExit(f'index.ipynb, cell {c["id"]}: README.md cannot show a picture output; save it in {nbs}/images and show it from a markdown cell')
    return relink(text(nb), lambda a: os.path.normpath(f'{nbs}/{a}'))

def read_notebook(p): return json.loads(p.read_text(encoding='utf-8'))
def write_readme(root):
    "Write README.md of the project in `root`"
    (root/'README.md').write_text(readme(read_notebook(root/'nbs/index.ipynb')), encoding='utf-8')

# Pages

class Page:
    "A notebook and where it stands on the site"
    def __init__(self, path):
        self.path,self.nb = path,read_notebook(path)
        stem,folder = nbpath2html(path.name).stem,path.parent.name
        self.name = {'index':'overview'}.get(stem, stem) if folder=='nbs' else f'{folder.removesuffix("s")}-{stem}'
        head = next(source(c) for c in self.nb['cells'] if c['cell_type']=='markdown')
        self.title,_,rest = head.removeprefix('# ').partition('\n')
        if self.name=='overview': self.title = 'Overview'
        said,_,self.rest = rest.strip().partition('\n\n') if rest.strip().startswith('>') else ('', '', rest.strip())
        self.summary = plain(re.sub('^> ?', '', said, flags=re.M))
        self.folder = 'tutorials' if folder=='tutorials' else 'results' if folder=='results' else ''

def plain(s): return re.sub(r'\[([^\]]*)\]\([^)]*\)|[`*]', r'\1', ' '.join(s.split()))

def sections(pages):
    "Section → part → names of pages, in the reading order"
    found = {k:[p.name for p in pages if p.folder==k] for k in ('tutorials','results')}
    lib = {k:v.split() for k,v in parts.items()}
    lib['Engineering'] += unplaced(pages)  # a new notebook, until it gets a place of its own
    first = {'Start':['install','overview'], 'Tutorials':['tutorials']+found['tutorials']+others['tutorials'].split()}
    last = {'Benchmarks':others['results'].split()+found['results'], 'Reference':['commands','api'],
            'Project':['gallery','model-card','data-sets','promises','bad-inputs','changelog','contributing','citation','license','third-party']}
    return first | dict(Library=lib) | last

def unplaced(pages):
    "Names of notebooks that the lists above do not have"
    placed = {'overview', *' '.join([*parts.values(), *others.values()]).split()}
    return [p.name for p in pages if not p.folder and p.name not in placed]

def part_page(k): return 'part-'+re.sub(r'\W+', '-', k.lower())
def toctree(names, caption=''):
    return '```{toctree}\n:hidden:\n'+(f':caption: {caption}\n' if caption else '')+'\n'+'\n'.join(names)+'\n```'

class Site:
    "Everything that makes a page of a notebook or a file: its links, its cells, its pictures"
    def __init__(self, src, cfg):
        self.src,self.cfg = src,cfg
        nbs = cfg.nbs_path
        found = [*sorted(nbs.glob('*.ipynb')), *(p for d in ('tutorials','results') for p in sorted((nbs/d).glob('*.ipynb'), key=lambda p: [int(o) if o.isdigit() else o for o in re.split(r'(\d+)', p.name)]))]
        self.pages = [Page(p) for p in found]
        self.at = {p.path.relative_to(root).as_posix():p.name for p in self.pages}
        self.by_stem = {p.path.stem:p for p in self.pages}
        self.names,self.commands = {},()

    def address(self, a, folder):
        "Where the relative link `a` of a file in `folder` of the repository leads to on the site"
        to,_,frag = a.partition('#')
        p = os.path.normpath(os.path.join(folder, to))
        if p in self.at: return f'{self.at[p]}.ipynb'+(frag and '#'+frag)
        if p in files or p in theirs: return f'{(files|theirs)[p]}.md'+(frag and '#'+frag)
        if p.startswith('nbs/images/'): return p[4:]
        return f'{self.cfg.git_url}/{"tree" if (root/p).is_dir() else "blob"}/{self.cfg.branch}/{p}'+(frag and '#'+frag)

    def span(self, s):
        "Inline code, with a link if it names a notebook, an object, a module or a command"
        if p := self.by_stem.get(s.removesuffix('.ipynb')): return f'[{p.title}]({p.name}.ipynb)' if p.path.stem[:1].isdigit() else f'`{s}`'
        if s in self.names: return f'{{py:obj}}`~{self.names[s]}`'
        if s.startswith('covid3d.') and any(p.name==s[8:] for p in self.pages): return f'[`{s}`]({s[8:]}.ipynb)'
        if s.startswith('covid3d ') and s[8:] in self.commands: return f'[`{s}`](commands.md#{s.replace(" ", "-")})'
        return f'`{s}`'

    # fences, links, headings and HTML are left alone
    span_re = re.compile(r'(^[ ]*(`{3,}|:{3,}).*?^[ ]*\2|!?\[[^\]]*\]\([^)]*\)|^#+ .*?$|<a .*?</a>|\{[\w:]+\}`[^`]*`|``+.*?``+)|`([^`\n]+)`', re.M|re.S)
    def myst(self, s, folder='nbs'):
        "Markdown `s` of a file in `folder` as MyST; what the site itself writes has no folder, and its links are names of pages"
        host,branch = self.cfg.git_url.split('//')[1],self.cfg.branch
        ours = rf'https://(?:{host}/(?:blob|tree)|{host.replace("github", "raw.githubusercontent", 1)})/{branch}/'
        if folder is not None: s = relink(re.sub(ours, os.path.relpath('.', folder or '.')+'/', s), lambda a: self.address(a, folder))
        s = re.sub(r'\]\('+re.escape(address(self.cfg))+r'([\w-]+)\.html([#)])', lambda m: f']({m[1]}.{"ipynb" if m[1] in self.at.values() else "md"}{m[2]}', s)
        s = self.span_re.sub(lambda m: m[1] or self.span(m[3]), s)
        return re.sub(r'^!\[([^\]]*)\]\((images/([\w-]+)\.\w+)\)$', lambda m: figure(self.src, (self.cfg.nbs_path/m[2]).read_bytes(), m[3], m[1]), s, flags=re.M)

    def head(self, p):
        "Title, summary and tools of the page of notebook `p`"
        nb = p.path.relative_to(root).as_posix()
        keys = ''.join(f'\n```{{index}} ! {o.strip()}\n```\n' for o in index.get(p.name, '').split(';') if o)
        ref = f'<a href="api-{p.name}.html">Reference</a>' if p.name in self.documented else ''
        links = [f'<a href="notebooks/{p.path.name}" download>Download notebook</a>',
                 f'<a href="https://colab.research.google.com/github/{self.cfg.git_url.split("/", 3)[3]}/blob/{self.cfg.branch}/{nb}">Open in Colab</a>',
                 f'<a href="{self.cfg.git_url}/blob/{self.cfg.branch}/{nb}">On GitHub</a>', ref]
        return f'{keys}\n# {p.title}\n\n<p class="lead">{escape(p.summary)}</p>\n\n<p class="tools">{" ".join(filter(None, links))}</p>'

    def cells(self, p):
        "The cells of notebook `p` as Sphinx wants them"
        cs = [c for c in p.nb['cells'] if not is_left_out(c)]
        first = next(i for i,c in enumerate(cs) if c['cell_type']=='markdown')
        folder,n = p.path.parent.relative_to(root).as_posix(),0
        slugs = {re.sub(r'[^\w -]', '', m).lower().replace(' ', '-') for c in cs if c['cell_type']=='markdown' for m in re.findall(r'^#+ (.*)', source(c), re.M)}
        yield markdown_cell(self.head(p))
        if p.rest: yield markdown_cell(self.myst(p.rest, folder))
        for i,c in enumerate(cs):
            if i==first: continue
            if c['cell_type']=='markdown': yield {**c, 'source':self.myst(source(c), folder)}; continue
            if names := [o for o in exported(c) if o in self.names]: yield markdown_cell(self.reference_to(names, slugs))
            yield {**c, 'metadata':how(c), 'source':code(c), 'outputs':[o for o in c['outputs'] if not picture(o) and o.get('name')!='stderr']}
            for o in c['outputs']:
                if b := picture(o): n += 1; yield markdown_cell(figure(self.src, b, f'{p.name}-{n}', *words(cs, i, p), '#| dark: same' in source(c)))

    def twin(self, p):
        "Notebook `p` as markdown for programs that read, each link an address"
        folder,n = p.path.parent.relative_to(root).as_posix(),0
        def pictures(cs, i):
            nonlocal n
            for o in cs[i]['outputs']:
                if picture(o): n += 1; yield f'![{" ".join(words(cs, i, p)[0].split())}]({address(self.cfg)}_images/{p.name}-{n}.webp)'
        return text(p.nb, lambda s: twins.links(relink(s, lambda a: self.address(a, folder)), self.twin_address), pictures)

    def twin_address(self, a):
        "The address of what link `a` of a page leads to: the markdown of it, if it is a page"
        url = address(self.cfg); a = a.removeprefix(url)
        m = re.fullmatch(r'([\w-]+)(?:\.(?:ipynb|md|html))?(#.*)?', a)
        return a if re.match('[a-z]+:|#', a) else f'{url}{m[1]}.html{".md" if m[1] not in no_twin else ""}{m[2] or ""}' if m else url+a

    def reference_to(self, names, slugs):
        "The line above an exported cell: an anchor for whoever knows the address, and the way to the tables"
        anchors = ''.join(f'<span id="{o.lower()}"></span>' for o in names if o.lower() not in slugs)
        return f'<div class="exported">{anchors}\n\n'+', '.join(f'{{py:obj}}`{o} <{self.names[o]}>`' for o in names)+'\n\n</div>'

def exported(c):
    "Names that an exported cell defines"
    if not re.match(r'#\| ?exports?\b', source(c)): return []
    try: return [o.name for o in ast.parse(code(c)).body if isinstance(o, (ast.FunctionDef, ast.ClassDef))]
    except SyntaxError: return []

def is_test(o):
    "Whether a statement only guards"
    called = o.value.func if isinstance(o, ast.Expr) and isinstance(o.value, ast.Call) else None
    if isinstance(o, (ast.For, ast.With)):
        guard = isinstance(o, ast.With) and 'fail' in ast.unparse(o.items[0])
        return guard or all(map(is_test, o.body))
    return isinstance(o, ast.Assert) or getattr(called, 'id', '').startswith('test_')

def how(c):
    "Metadata of a code cell: what of it is folded, and under which words"
    s = code(c)
    if 'echo: false' in source(c): return dict(tags=['remove-input'])
    try: body = ast.parse(s).body
    except SyntaxError: return {}  # a magic
    if s.startswith('_all_'): return dict(tags=['remove-cell'])
    imports = any(isinstance(o, (ast.Import, ast.ImportFrom)) for o in body) and all(isinstance(o, (ast.Import, ast.ImportFrom, ast.Assign)) for o in body) and not c['outputs']
    fold = 'Helpers' if '#| code-fold: true' in source(c) else ('Module imports' if '#| export' in source(c) else 'Imports') if imports and s.count('\n')>2 else \
        'Tests' if not c['outputs'] and is_test(body[-1]) and s.count('\n')>3 else \
        'Source' if '#| export' in source(c) and s.count('\n')>40 else ''
    return dict(tags=['hide-input'], mystnb=dict(code_prompt_show=fold, code_prompt_hide=fold)) if fold else {}

def picture(o):
    d = o.get('data', {})
    if k := next((k for k in ('image/png','image/jpeg') if k in d), None): return base64.b64decode(''.join(d[k]))

def words(cs, i, p):
    "Alternative text and caption of the picture of cell `i`: its own, or the sentence that speaks of it"
    own = dict(re.findall(r'^#\| ?fig-(alt|cap): *"?(.*?)"?$', source(cs[i]), re.M))
    later = next((source(c) for c in cs[i+1:] if not (c['cell_type']=='code' and how(c))), '')
    before = next((source(c) for c in reversed(cs[:i]) if c['cell_type']=='markdown'), '')
    sentence = lambda s, k: re.split(r'(?<=[.:!?])\s+(?=[A-Z`*])', s.strip())[k]
    near = sentence(later.split('\n\n')[0], 0) if later and not later.startswith('#') and cs[i+1:] and later!=code(cs[i]) and not later.startswith(('#|','```')) else ''
    is_prose = near and any(c['cell_type']=='markdown' and source(c)==later for c in cs)
    told = plain(near) if is_prose else plain(sentence(before.split('\n\n')[-1], -1)).rstrip(':')
    return own.get('alt') or told or f'{p.title}: a figure', own.get('cap', '')

def figure(src, png, name, alt, caption='', same=False):
    "A picture as MyST, twice: for light and for dark pages"
    from figures import save_pair
    width = save_pair(png, src/'figures', name, same)
    one = lambda f, k: f'```{{image}} figures/{f}.webp\n:alt: {" ".join(alt.split())}\n:width: {width}px\n:class: {k}\n:loading: lazy\n```'
    return '\n\n'.join(['<div class="figure">', one(name, 'only-light'), one(name+'-dark', 'only-dark'), *([f'<p class="caption">{escape(caption)}</p>'] if caption else []), '</div>'])

# The site

def fill(p, what, with_): write(p, p.read_text(encoding='utf-8').replace(what, with_))
def listed(names, titles): return '\n'.join(f'- [{titles[o].title}]({o}.ipynb): {titles[o].summary}' for o in names)
def write(p, s): p.parent.mkdir(parents=True, exist_ok=True); p.write_text(s, encoding='utf-8')

def write_sources(src, cfg):
    "All that Sphinx reads"
    import reference
    shutil.copytree(site, src, ignore=shutil.ignore_patterns('__pycache__', 'build.py', 'pages', 'pictures.py', 'third_party.py', 'twins.py'))
    for o in (site/'pages').glob('*'): shutil.copy(o, src)
    s,raw = Site(src, cfg),src/'raw'
    for o in (root/cfg.lib_path.name/'templates').glob('*.json'): raw.mkdir(exist_ok=True); shutil.copy(o, raw)  # schemas, at the addresses that they name
    for o in src,raw: shutil.copytree(cfg.nbs_path/'images', o/'images')
    s.names,s.commands,s.documented = reference.names(),reference.commands(),reference.documented()
    told = {o.stem:front(o) for o in src.glob('*.md')}
    for a,p in files.items():
        body = re.sub(r'^# .*', lambda m: f'# {renamed.get(p, m[0][2:])}', (root/a).read_text(encoding='utf-8'))
        write(src/f'{p}.md', s.myst(body, os.path.dirname(a)))
        told[p] = files_about[p]
    for p in s.pages:
        write(raw/f'{p.name}.html.md', s.twin(p))   # the address in each module's docstring
        (raw/'notebooks').mkdir(exist_ok=True); shutil.copy(p.path, raw/'notebooks')
        told[p.name] = p.summary
        write(src/f'{p.name}.ipynb', json.dumps({**p.nb, 'cells':list(s.cells(p))}))
    shutil.copy(raw/'overview.html.md', raw/'index.html.md')
    write(src/'api.md', s.myst(reference.overview(), None)); write(src/'commands.md', reference.command_page())
    order,titles = sections(s.pages),{p.name:p for p in s.pages}
    for m in s.documented: write(src/f'api-{m}.md', s.myst(reference.page(m, titles[m].title), None))
    for k,v in order['Library'].items():
        v = [o for o in v if o in titles]
        write(src/f'{part_page(k)}.md', f'# {k}\n\n{about[k]}\n\n{listed(v, titles)}\n\n{toctree(v)}\n'); told[part_page(k)] = about[k]
    there = lambda ns: [o for o in ns if list(src.glob(f'{o}.*'))]
    trees = [toctree(map(part_page, v) if k=='Library' else there(v), k) for k,v in order.items() if v]
    fill(src/'index.md', 'RESULT', result()+'\n\n'+'\n\n'.join(trees)); fill(src/'citation.md', 'VERSION', cfg.version)
    fill(src/'tutorials.md', 'TUTORIALS', listed([o for o in order['Tutorials'] if o in titles], titles))
    told |= dict(api='Every public object of covid3d with its parameters, module by module', commands='Every command of covid3d and its options')
    told |= {f'api-{m}':f'Reference of covid3d.{m}: every object with a table of its parameters' for m in s.documented}
    for o in sorted(src.glob('*.md')):
        if o.stem not in no_twin|{'index'}: write(raw/f'{o.stem}.html.md', twins.page(o.read_text(encoding='utf-8'), address(cfg), s.twin_address))
    write(src/'_static/descriptions.json', json.dumps(told))
    write(src/'build.json', json.dumps(dict(address=address(cfg), sources=reference.source_urls(cfg))))
    write(raw/'llms.txt', llms(cfg, order, {o.name.removesuffix('.html.md'):title(o) for o in raw.glob('*.html.md')}, told)); write(raw/'sitemap.xml', sitemap(cfg, sorted(told.keys()-{'404'})))

def result():
    "The landing page's one result, from benchmarks/peers.csv: Dice of each scan, the mean of its seeds, then the mean of the scans"
    found,shown = {},{'covid3d':'covid3d', 'covid3d scratch':'the same network from random weights', 'MONAI UNet':'MONAI’s UNet'}
    with open(root/'benchmarks/peers.csv', encoding='utf-8') as f:
        for r in csv.DictReader(f):
            if r['budget']!='200 seconds' or r['network'] not in shown or r['lr']!=('0.0005' if r['network']=='covid3d' else '0.002'): continue
            for case,d in (o.split(':') for o in r['cases'].split()): found.setdefault(r['network'], {}).setdefault(case, []).append(float(d))
    mean = lambda x: sum(x)/len(x)
    dice = {k:mean([mean(v) for v in found[k].values()]) for k in shown}
    bars = '\n'.join(f'<li class="{k.replace(" ", "-")}"><b>{shown[k]}</b><span><i style="--w:{90*d:.0f}%"></i>{d:.2f}</span></li>' for k,d in dice.items())
    return f'''Mean Dice of whole CTs of seven COVID-19 patients, each network trained for 200 CPU-seconds on the other patients (three folds, three seeds):

<ul class="bars">
{bars}
</ul>

The first starts from the weights that come with the library, trained on synthetic patients alone. No budget counts the hours which that took, and we looked at these scans while we made the synthetic patients. [The benchmark](benchmarks.ipynb) says what such figures can bear, and [successes beside failures](gallery.md) show what they look like.'''

def front(p):
    "The description in the front matter of a page"
    m = re.search(r'^description: (.*)$', p.read_text(encoding='utf-8'), re.M)
    return m[1] if m else ''

def address(cfg): return cfg.doc_host+cfg.doc_baseurl.rstrip('/')+'/'

def title(p):
    "The heading of a page in markdown"
    return plain(re.search('^# (.*)', p.read_text(encoding='utf-8'), re.M)[1])

def llms(cfg, order, titles, told):
    "llms.txt: the pages as markdown, for programs that read"
    url,rows = address(cfg),[]
    for k,v in order.items():
        names = [o for part in v.values() for o in part] if isinstance(v, dict) else v
        if k=='Reference': names = names+[o for o in sorted(titles) if o.startswith('api-')]
        rows.append(f'## {k}\n\n'+'\n'.join(f'- [{titles[o]}]({url}{o}.html.md): {told[o]}' for o in names if o in titles))
    return '\n\n'.join(['# covid3d', f'> {told["overview"]}', *rows])+'\n'

def sitemap(cfg, names):
    url = address(cfg)
    rows = ''.join(f'<url><loc>{url}{"" if o=="index" else o+".html"}</loc></url>\n' for o in names)
    return f'<?xml version="1.0" encoding="UTF-8"?>\n<urlset xmlns="http://www.sitemaps.org/schemas/sitemap/0.9">\n{rows}</urlset>\n'

def main(out=None):
    os.chdir(root); sys.path.insert(0, str(root))
    cfg = get_config(); out = Path(out or cfg.doc_path).resolve()
    tmp = root/'_stage' if out==Path(cfg.doc_path).resolve() else out.with_name(out.name+'_stage')
    shutil.rmtree(tmp, ignore_errors=True); tmp.mkdir(parents=True)
    write_sources(tmp/'src', cfg)
    env = os.environ | dict(PYTHONHASHSEED='0', PYTHONPATH=str(root))
    subprocess.run([sys.executable, '-m', 'sphinx', '-q', '-W', '--keep-going', '-j', '2', '-b', 'html', '-d', tmp/'doctrees', tmp/'src', tmp/'html'], check=True, env=env)
    for o in '.buildinfo','_sources': shutil.rmtree(p) if (p := tmp/'html'/o).is_dir() else p.unlink(missing_ok=True)
    shutil.rmtree(out, ignore_errors=True); shutil.move(tmp/'html', out); shutil.rmtree(tmp)

if __name__=='__main__':
    args = sys.argv[1:]
    if not args or args==['--readme']: write_readme(root)
    if args!=['--readme']: main(*args)
