"Every bad input of the catalogue has a test, every promise a proof, and the pages that say so are current"
import json

import catalogue as cat

def test_every_row_has_a_test():
    marked = {c for o in cat.proofs() for c in o.faults}
    assert [r['code'] for r in cat.rows() if r['code'] not in marked]==[]

def test_no_mark_without_a_row():
    codes = {r['code'] for r in cat.rows()}
    assert [(o.name,c) for o in cat.proofs() for c in o.faults if c not in codes]==[]

def test_the_catalogue_is_current():
    page = cat.tests/'faults/catalogue.md'
    assert page.read_text(encoding='utf-8')==cat.catalogue(), 'run `python tests/catalogue.py`'

def test_every_promise_is_a_sentence():
    made = [o for o in cat.proofs() if o.promises]
    assert {k for o in made for k in o.promises}=={*cat.kinds}
    assert [o.name for o in made if not o.says or o.says[-1:]=='.' or len(o.says)<20]==[], 'a promise reads as a sentence: give the test such a docstring'

def test_the_promises_page_is_current():
    cells = json.loads((cat.tests.parent/'nbs/40_promises.ipynb').read_text(encoding='utf-8'))['cells']
    shown = ''.join(''.join(o['data'].get('text/markdown', '')) for c in cells for o in c.get('outputs', []) if 'data' in o)
    made = [o for o in cat.proofs() if o.promises]
    assert [o.says for o in made if f'- {o.says} · [{o.name}](' not in shown]==[], 'run `nbdev-test nbs/40_promises.ipynb --save`'
    assert shown.count('\n- ')+shown.startswith('- ')==sum(len(o.promises) for o in made)

def test_marks_are_found(tmp_path, monkeypatch):
    (tmp_path/'test_x.py').write_text('bad = [pytest.param(1, marks=pytest.mark.fault("D6"))]\n'
        '@pytest.mark.promise("lost")\n@pytest.mark.parametrize("o", bad)\n@pytest.mark.fault("D1", "D2")\ndef test_a(o):\n    "It holds"\n')
    monkeypatch.setattr(cat, 'tests', tmp_path)
    o, = cat.proofs()
    assert {*o.faults}=={'D1','D2','D6'} and o.promises==('lost',) and o.says=='It holds'
