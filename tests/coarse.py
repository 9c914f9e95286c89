"""Small phantoms, each made once in a session: a helper of the tests, not a test.

A phantom of `grid` takes about a second, and many files of tests want the same few. Of the seeds 0 to 25 the patients 5, 11, 15, 21 and 22 are healthy."""
from functools import cache

import pytest

import covid3d.phantom as module

grid = dict(shape=(32,96,96), spacing=(9.,3.7,3.7))
_real = module.phantom

@cache
def _made(seed, shape, spacing, centre, healthy):
    ph = _real(seed, shape, spacing, centre, healthy)
    for o in ph: o.data.flags.writeable = False  # shared by all that ask for it
    return ph

def cached(seed, shape=grid['shape'], spacing=grid['spacing'], centre=(0.,0.,0.), healthy=None):
    "`phantom`, on `grid` unless another is given"
    return _made(seed, tuple(shape), tuple(map(float, spacing)), tuple(map(float, centre)), healthy)

def small(seed, *_, **__):
    "In place of `phantom` where a command would make large ones: on `grid`, whatever is asked for"
    return cached(seed)

def write_coarse(out, n=4, seed=0, shape=grid['shape'], spacing=grid['spacing'], **kwargs):
    "`write_phantoms`, on `grid`, with phantoms that were made before"
    with pytest.MonkeyPatch.context() as m:
        m.setattr(module, 'phantom', cached)
        return module.write_phantoms(out, n=n, seed=seed, shape=shape, spacing=spacing, **kwargs)
