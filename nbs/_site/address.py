"""The repository's address: `python nbs/_site/address.py` makes every file that repeats `git_url` of settings.ini agree with it

Documentation is looked for at the host's pages address (`https://USER.github.io/REPO`); for a host that has none here, in the notebooks' folder."""
import re,subprocess,sys
from configparser import ConfigParser
from pathlib import Path
from urllib.parse import urlsplit
import tomllib

pages = {'github.com':'github.io', 'gitlab.com':'gitlab.io', 'codeberg.org':'codeberg.page'}
spelled_in = '*.md', 'pyproject.toml', '.github/**/*.y*ml', 'nbs/*.ipynb', 'nbs/llms.txt', 'covid3d/*.py', 'benchmarks/*.md'

def derive(git_url, branch='main'):
    "`user`, `doc_host` and `doc_baseurl` that follow from repository address `git_url`"
    u = urlsplit(git_url)
    parts = u.path.strip('/').split('/')
    if u.scheme not in ('http', 'https') or not u.netloc or len(parts)<2 or git_url.endswith(('/', '.git')):
        raise SystemExit(f'settings.ini: git_url is {git_url!r}; write it as https://HOST/USER/REPO')
    user,repo = parts[0],'/'.join(parts[1:])
    if u.netloc not in pages: return dict(user=user, doc_host=f'{u.scheme}://{u.netloc}', doc_baseurl=f'{u.path}/tree/{branch}/nbs')
    return dict(user=user, doc_host=f'https://{user}.{pages[u.netloc]}', doc_baseurl='/'+repo)

def settings(root):
    "The facts in settings.ini"
    ini = ConfigParser(delimiters='='); ini.read(root/'settings.ini', encoding='utf-8')
    return ini['DEFAULT']

def urls(root):
    "Repository and documentation address, as pyproject.toml has them"
    u = tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))['project']['urls']
    return u['Repository'],u['Documentation']

def texts(root):
    "Every file that may spell the address"
    return sorted({p for g in spelled_in for p in root.glob(g) if p.is_file()})

def bare(url): return url.split('://', 1)[1]

def finder(addresses):
    "A pattern that finds each of `addresses`, the longest first, and not as the beginning of a longer name"
    return re.compile('(?:'+'|'.join(map(re.escape, sorted(addresses, key=len, reverse=True)))+r')(?![\w-])')

def rewrite(root):
    "Give every file in `root` the address that settings.ini names"
    cfg = settings(root)
    new = derive(cfg['git_url'], cfg['branch'])
    now = cfg['git_url'],new['doc_host']+new['doc_baseurl']
    swap = dict(zip(urls(root), now))
    swap.update({bare(k):bare(v) for k,v in swap.items()})
    found = finder(swap)
    edits = {p: found.sub(lambda m: swap[m[0]], p.read_text(encoding='utf-8')) for p in texts(root)}
    ini = root/'settings.ini'
    edits[ini] = re.sub(r'^(user|doc_host|doc_baseurl) *=.*$', lambda m: f'{m[1]} = {new[m[1]]}', ini.read_text(encoding='utf-8'), flags=re.M)
    for p,s in edits.items():
        if s!=p.read_text(encoding='utf-8'): p.write_text(s, encoding='utf-8'); print('changed', p.relative_to(root))
    subprocess.run([Path(sys.executable).parent/'nbdev-export'], cwd=root, check=True)

if __name__=='__main__': rewrite(Path(__file__).resolve().parents[2])
