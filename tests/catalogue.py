"""Which test proves what: reads the markers `fault` and `promise` from the tests, without running them.

`python tests/catalogue.py` writes tests/faults/catalogue.md; nbs/40_promises.ipynb shows the promises."""
import ast, csv
from dataclasses import dataclass
from pathlib import Path

tests = Path(__file__).resolve().parent
kinds = dict(lost='Nothing is lost', silent='Nothing is silent', executed='Nothing is executed', named='Nobody is named', works='It works on your machine')

@dataclass(frozen=True)
class Proof:
    "A test and what it is marked with"
    file: str      # Relative to tests/
    name: str      # Of the function
    line: int
    says: str      # First line of its docstring
    faults: tuple  # Rows of faults/rows.csv
    promises: tuple# Keys of `kinds`

def marks(node, kind) -> tuple:
    "Arguments of all `pytest.mark.KIND(...)`, or `KIND(...)`, below a node"
    calls = [c for c in ast.walk(node) if isinstance(c, ast.Call) and kind in (getattr(c.func, 'attr', ''), getattr(c.func, 'id', ''))]
    return tuple(dict.fromkeys(a.value for c in calls for a in c.args if isinstance(a, ast.Constant)))

def proofs() -> list:
    "All tests, in the order of their files"
    out = []
    for p in sorted(tests.rglob('test_*.py')):
        tree = ast.parse(p.read_text(encoding='utf-8'))
        # a parametrised list that is built above the test, marks and all, belongs to the test that names it
        named = {t.id: n.value for n in tree.body if isinstance(n, ast.Assign) for t in n.targets if isinstance(t, ast.Name)}
        for f in (n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef) and n.name.startswith('test_')):
            nodes = [*f.decorator_list, *(named[n.id] for d in f.decorator_list for n in ast.walk(d) if isinstance(n, ast.Name) and n.id in named)]
            nodes += [named[k] for k in ('pytestmark',) if k in named]
            got = {k: tuple(dict.fromkeys(m for n in nodes for m in marks(n, k))) for k in ('fault', 'promise')}
            says = (ast.get_docstring(f) or '').split('\n')[0].rstrip('.')
            out.append(Proof(p.relative_to(tests).as_posix(), f.name, f.lineno, says, got['fault'], got['promise']))
    return out

def rows() -> list:
    "The rows of the catalogue: dicts with `code`, `fault`, `behaviour`"
    return list(csv.DictReader((tests/'faults/rows.csv').open(encoding='utf-8')))

def catalogue() -> str:
    "tests/faults/catalogue.md"
    by = {}
    for o in proofs():
        for c in o.faults: by.setdefault(c, []).append(o)
    link = lambda o: f'[`{o.name}`](../{o.file})'
    lines = ['# Bad inputs, what happens, and the tests that show it', '',
             'Written by `python tests/catalogue.py` from the markers of the tests; do not edit.', '',
             '| row | fault | what happens | tests |', '|---|---|---|---|']
    lines += [f'| {r["code"]} | {r["fault"]} | {r["behaviour"]} | {", ".join(map(link, by.get(r["code"], []))) or "**none**"} |' for r in rows()]
    return '\n'.join(lines)+'\n'

if __name__ == '__main__': (tests/'faults/catalogue.md').write_text(catalogue(), encoding='utf-8')
