"Licences of what an installation brings: `python nbs/_site/third_party.py` writes THIRD_PARTY.md from what is installed"
import importlib.metadata as md, re
from configparser import ConfigParser
from pathlib import Path
from packaging.requirements import Requirement

root = Path(__file__).resolve().parents[2]

def key(name): return re.sub(r'[-_.]+', '-', name).lower()

def declared(which='requirements'):
    "Names of the packages that settings.ini asks for"
    ini = ConfigParser(delimiters='='); ini.read(root/'settings.ini', encoding='utf-8')
    return [key(Requirement(o).name) for o in ini['DEFAULT'][which].split()]

def brought(names):
    "All that `names` need, themselves included: name → distribution"
    out, todo = {}, list(names)
    while todo:
        k = key(todo.pop())
        if k in out: continue
        try: out[k] = d = md.distribution(k)
        except md.PackageNotFoundError: continue  # for another platform
        todo += [q.name for q in map(Requirement, d.requires or []) if not q.marker or q.marker.evaluate(dict(extra=''))]
    return out

def licence(d):
    "What a distribution says of its licence"
    m = d.metadata
    named = [o.split(' :: ')[-1] for o in m.get_all('Classifier') or [] if o.startswith('License ::')]
    said = m.get('License-Expression') or '; '.join(named) or (m.get('License') or '').strip().split('\n')[0][:60]
    return said.replace('|', '/') or 'not stated'

def copyleft(d): return bool(re.search(r'\bL?A?GPL|MPL|Mozilla|Lesser', licence(d)))

def table(names, found): return '\n'.join(['| package | licence |', '|---|---|', *(f'| {k} | {licence(found[k])} |' for k in sorted(names) if k in found)])

def page():
    "THIRD_PARTY.md"
    direct = declared(); dicom, onnx, cluster, itk = (declared(f'{k}_requirements') for k in ('dicom','onnx','cluster','itk'))
    extra = dicom+onnx+cluster+itk; found = brought(direct); more = brought(extra)
    lgpl = ', '.join(k for k in sorted(direct) if copyleft(found[k]))
    return f'''# Licences of third parties

covid3d itself is under the Apache licence 2.0. It contains no code of others, and one file of data: the sample scan, under the same licence (`covid3d/sample/README.md`). An installation brings the packages below, each under its own licence, as its metadata state it.

**Under the LGPL: {lgpl}.** covid3d imports them unchanged, and you can put another version in their place. If you pass them on, in a container for example, read what their licence asks of you.
PyTorch's builds for NVIDIA GPUs bring NVIDIA's libraries, under NVIDIA's own terms.

## What covid3d imports

{table(direct, found)}

## What `covid3d[dicom]` adds

{table(dicom, more)}

## What `covid3d[onnx]` adds

{table(onnx, more)}

## What `covid3d[cluster]` adds

{table(cluster, more)}

## What `covid3d[itk]` adds

{table(itk, more)}

## What these bring with them

{table({*found, *more}-{*direct, *extra}, found | more)}
'''

if __name__ == '__main__': (root/'THIRD_PARTY.md').write_text(page(), encoding='utf-8')
