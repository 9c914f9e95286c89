"What the packages say: every import is declared with a lower bound, the source distribution builds, licences are listed"
import ast, importlib.util, re, shutil, subprocess, sys, zipfile
from configparser import ConfigParser
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

root = Path(__file__).resolve().parent.parent
ini = ConfigParser(delimiters='='); ini.read(root/'settings.ini', encoding='utf-8')
cfg = ini['DEFAULT']
spec = importlib.util.spec_from_file_location('third_party', root/'nbs/_site/third_party.py')
third_party = importlib.util.module_from_spec(spec); spec.loader.exec_module(third_party)

module_of = {'connected-components-3d':'cc3d', 'plum-dispatch':'plum', 'python-gdcm':'gdcm', 'pillow':'PIL', 'dask-jobqueue':'dask_jobqueue'}  # where the names differ
optional = set()  # imported only on request, with an error that says how to install it

def imported(path) -> set:
    "Top-level names of other packages that a module imports"
    names = set()
    for n in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
        if isinstance(n, ast.Import): names |= {a.name.split('.')[0] for a in n.names}
        elif isinstance(n, ast.ImportFrom) and not n.level: names.add(n.module.split('.')[0])
    return names-{*sys.stdlib_module_names, 'covid3d'}

@pytest.mark.promise('works')
def test_every_import_is_declared():
    "Every package that covid3d imports is declared, so that a plain installation is complete"
    asked = ' '.join(cfg[k] for k in ('requirements','dicom_requirements','onnx_requirements','cluster_requirements','itk_requirements')).split()
    declared = {module_of.get(n, n) for n in (Requirement(r).name for r in asked)}
    used = set().union(*map(imported, (root/'covid3d').glob('*.py')))
    assert used-declared-optional==set()

def test_nothing_is_declared_that_is_not_used():
    used = set().union(*map(imported, (root/'covid3d').glob('*.py')))
    asked = {module_of.get(n, n) for n in (Requirement(r).name for r in cfg['requirements'].split())}
    assert asked-used-{'accelerate'}==set()  # fastai's distributed training imports accelerate

@pytest.mark.parametrize('req', cfg['requirements'].split()+cfg['dicom_requirements'].split())
def test_every_requirement_has_a_lower_bound(req): assert any(s.operator in ('>=','==') for s in Requirement(req).specifier)

def test_the_oldest_set_is_the_lower_bounds():
    pins = dict(l.strip().split('==') for l in (root/'tests/oldest.txt').read_text().splitlines() if '==' in l)
    asked = {r.name:r for r in map(Requirement, cfg['requirements'].split()+cfg['dicom_requirements'].split())}
    assert {*pins}=={*asked}
    for k,v in pins.items():
        assert asked[k].specifier.contains(v), (k, v)
        low = min(Version(s.version) for s in asked[k].specifier if s.operator in ('>=','=='))
        assert Version(v).release[:2]==(*low.release, 0)[:2], f'{k}: tested with {v}, declared from {low}'

def build(what, at, to):
    "Build a distribution of the project in `at` without a network"
    code = f'from setuptools import build_meta; print(build_meta.build_{what}({str(to)!r}))'
    res = subprocess.run([sys.executable, '-c', code], cwd=at, capture_output=True, text=True)
    assert res.returncode==0, res.stderr
    return to/res.stdout.split()[-1]

@pytest.mark.promise('works')
def test_the_source_distribution_builds(tmp_path):
    "The source distribution builds, and a wheel can be built from it"
    ours = tmp_path/'ours'; ours.mkdir()
    for o in ('settings.ini','setup.py','pyproject.toml','MANIFEST.in','README.md','LICENSE','CHANGELOG.md','CONTRIBUTING.md','THIRD_PARTY.md','Makefile'): shutil.copy(root/o, ours)
    for o in ('covid3d','nbs','tests'): shutil.copytree(root/o, ours/o, ignore=shutil.ignore_patterns('__pycache__'))
    (tmp_path/'dist').mkdir()
    sdist = build('sdist', ours, tmp_path/'dist')
    shutil.unpack_archive(sdist, tmp_path/'there')
    there, = (tmp_path/'there').iterdir()
    for o in ('settings.ini','nbs/00_volume.ipynb','tests/test_packaging.py','THIRD_PARTY.md'): assert (there/o).is_file(), o
    with zipfile.ZipFile(build('wheel', there, tmp_path/'dist')) as z: inside = z.namelist()
    assert {f'covid3d/{p.name}' for p in (root/'covid3d').glob('*.py')}<={*inside}
    assert {f'covid3d/templates/{p.name}' for p in (root/'covid3d/templates').iterdir()}<={*inside}

def test_licences_are_listed():
    page = (root/'THIRD_PARTY.md').read_text(encoding='utf-8')
    names = [k for o in ('','dicom_','onnx_','cluster_','itk_') for k in third_party.declared(o+'requirements')]
    listed = dict(re.findall(r'^\| ([\w.-]+) \| (.+?) \|$', page, flags=re.M))
    assert [k for k in names if k not in listed]==[], 'run `python nbs/_site/third_party.py`'
    lgpl = re.search(r'Under the LGPL: (.+?)\.\*\*', page)[1].split(', ')
    assert all('LGPL' in listed[k] for k in lgpl)
    assert sorted(lgpl)==sorted(k for k in third_party.declared() if 'GPL' in listed[k])
