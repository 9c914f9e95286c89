"The notebooks keep to the words and the shape of style.md, as far as figures can tell; `python tests/prose.py` prints them"
import pytest

import prose

chapters = sorted((prose.root/'nbs').glob('*.ipynb')); tutorials = sorted((prose.root/'nbs/tutorials').glob('*.ipynb'))

@pytest.mark.parametrize('path', [*chapters, *tutorials], ids=lambda p: p.stem)
def test_words(path):
    "No word for which the field has its own, no command that does not exist, no name that a reader cannot see defined"
    f = prose.figures(path); assert f['wrong']==f['unseen']==[]

@pytest.mark.parametrize('path', tutorials, ids=lambda p: p.stem)
def test_tutorials(path):
    "At most 40 cells, pictures, 'you', and no assertion in sight"
    f = prose.figures(path)
    assert f['cells']<=40 and f['pics'] and f['we_you']>15 and f['asserts']==f['mixed']==0

def test_the_counters_count(tmp_path):
    "A notebook of three cells, counted by hand"
    import json
    cell = lambda kind, s: dict(cell_type=kind, source=s, metadata={}, **(dict(outputs=[]) if kind=='code' else {}))
    (tmp_path/'x.ipynb').write_text(json.dumps(dict(cells=[cell('markdown', 'You see peers; run `covid3d fly`.'), cell('code', '#| export\ndef f(x):\n    return x\n\ndef g(): pass'),
        cell('code', '%time f(1)\nh(1)'), cell('code', 'assert f(1)'), cell('code', 'show(f(2))\nassert f(2)')])))
    f = prose.figures(tmp_path/'x.ipynb')
    assert (f['cells'], f['words'], f['bare'], f['asserts'], f['mixed'], f['wrong'], f['unseen'], f['longest'])==(5, 4, ['g'], 33, 1, ['peers','covid3d fly'], ['h','show'], 3)
