"Packaging: every fact comes from settings.ini"
from configparser import ConfigParser
from pathlib import Path
from setuptools import setup, find_packages

ini = ConfigParser(delimiters='='); ini.read('settings.ini', encoding='utf-8'); cfg = ini['DEFAULT']
lib = cfg['lib_path']
classifiers = ['Development Status :: 3 - Alpha', 'Intended Audience :: Science/Research', 'Operating System :: OS Independent',
    'Topic :: Scientific/Engineering :: Medical Science Apps.', 'Programming Language :: Python :: 3',
    *(f'Programming Language :: Python :: {v}' for v in cfg['pythons'].split())]

setup(**{k:cfg[k] for k in 'version description keywords author author_email license'.split()}, classifiers=classifiers,
    python_requires='>='+cfg['min_python'], packages=find_packages(include=[lib,lib+'.*']), package_data={lib:['templates/*','model/*','sample/*']},
    long_description=Path('README.md').read_text(encoding='utf-8'), long_description_content_type='text/markdown',
    install_requires=cfg['requirements'].split(), extras_require={k:cfg[k+'_requirements'].split() for k in ('dev','dicom','onnx','cluster','itk','bench')},
    entry_points=dict(nbdev=[f'{lib}={lib}._modidx:d'], console_scripts=[cfg['console_scripts']]), zip_safe=False)
