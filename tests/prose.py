"""How each notebook reads, in figures: `python tests/prose.py [NAME …]`

words/line: words of prose for each exported line. we/you: these words in 1,000. cell: lines of the median and of the longest exported cell. bare: public definitions that no later cell uses. asserts: percentage of visible example cells that only assert. mixed: visible cells that show and assert. pics: pictures. wrong: words of `wrong_words`, and `covid3d X` that is no command. unseen: names that visible cells use and none of them defines, so that whoever copies them gets a NameError."""
import ast, builtins, importlib, json, re, statistics, sys
from pathlib import Path

root = Path(__file__).resolve().parent.parent
# where the field has a word of its own: what not to write, and what to write
wrong_words = {r'made-up (chest|scan)':'phantom', r'ways? up\b':'upsampling', r'(slim|whole) network':'reduced-width, full-width network', r'\bgreys\b|grey values':'intensities, grey levels',
    r'\bbent\b|\bredrawn\b':'deformed, resampled', r'\bshare of\b':'fraction of', r'\ba draw\b':'sampled parameters', r'\bthaw':'unfreeze', r'known loss':'masked loss', r'\bpeers\b':'baselines', r'\btwins?\b':'duplicates',
    r'\bcure[sd]?\b':'fix, remedy', r'\b(goes|went|go) on\b':'continue, resume', r'computed again':'activation checkpointing', r'is no number\b':'is NaN or infinite', r'(one|public) door':'entry point',
    r'map of the house':'repository layout', r'squeezed volume':'volume resized to a fixed shape', r'\bill lung':'diseased lung', r'cannot be had':'is not available'}

def commands() -> set:
    "The commands of `covid3d`"
    code = '\n'.join(p.read_text(encoding='utf-8') for p in (root/'covid3d').glob('*_commands.py'))
    return set(re.findall(r"@_command\([^)]*\)\s*def _?(\w+)\(", code))|{'all'}

def lines(s): return [o for o in s.splitlines() if o.strip() and not o.startswith('#|')]
def is_guard(node):
    "Whether a statement only checks"
    if isinstance(node, ast.Assert): return True
    if isinstance(node, ast.With): return 'expect_fail' in ast.dump(node.items[0]) or all(map(is_guard, node.body))
    if isinstance(node, ast.For): return all(map(is_guard, node.body))
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Call) and isinstance(node.value.func, ast.Name) and node.value.func.id.startswith('test_')

def shows(s, outputs): return bool(outputs) or s.rstrip().endswith(';') or 'show' in s

def unseen(code) -> list:
    "Names that cells `code` use and do not define"
    used,bound = set(),{*dir(builtins), '__file__'}
    for c in code:
        if c.startswith('%%'): continue
        for n in ast.walk(ast.parse(re.sub(r'^[%!].*$', '', c, flags=re.M))):
            if isinstance(n, ast.Name): (used if isinstance(n.ctx, ast.Load) else bound).add(n.id)
            elif isinstance(n, (ast.FunctionDef, ast.ClassDef, ast.ExceptHandler)): bound.add(n.name)
            elif isinstance(n, ast.arg): bound.add(n.arg)
            elif isinstance(n, (ast.Import, ast.ImportFrom)):
                try: bound |= {k for o in n.names for k in ([*vars(importlib.import_module(n.module))] if o.name=='*' else [(o.asname or o.name).split('.')[0]])}
                except ImportError: return []  # what the star stands for is unknown where the library is not installed
    return sorted(used-bound)

def figures(path) -> dict:
    "What is counted in a notebook"
    cells = json.loads(Path(path).read_text(encoding='utf-8'))['cells']; text = lambda c: ''.join(c['source'])
    prose = '\n'.join(re.sub(r'```.*?```', '', text(c), flags=re.S) for c in cells if c['cell_type']=='markdown')
    words = re.findall(r"[A-Za-zÀ-ÿ’'-]+", re.sub(r'\]\([^)]*\)|`[^`]*`|<[^>]+>', ' ', prose)); n = max(1, len(words))
    code = [c for c in cells if c['cell_type']=='code']; exported = [c for c in code if text(c).startswith(('#| export','#|export'))]
    shown = [c for c in code if c not in exported and not text(c).startswith(('#| hide','#| default_exp','#|hide'))]
    sizes = [len(lines(text(c))) for c in exported]; total = sum(sizes)
    bare = []
    for i,c in enumerate(code):
        if c not in exported: continue
        for node in ast.parse(re.sub(r'^[%!].*$', '', text(c), flags=re.M)).body:
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith('_') and not any(re.search(rf'\b{node.name}\b', text(o)) for o in code[i+1:] if o not in exported): bare.append(node.name)
    guards = mixed = 0
    for c in shown:
        try: body = ast.parse(re.sub(r'^[%!].*$', '', text(c), flags=re.M)).body
        except SyntaxError: continue
        k = sum(map(is_guard, body)); guards += bool(body) and k==len(body); mixed += 0<k<len(body) and shows(text(c), c.get('outputs'))
    pics = sum(any(k.startswith('image/') for k in o.get('data', {})) for c in code for o in c.get('outputs', []))+len(re.findall(r'!\[|<img|<svg', prose))
    pics += sum('<svg' in ''.join(o.get('data', {}).get('text/html', '')) or '<img' in ''.join(o.get('data', {}).get('text/html', '')) for c in code for o in c.get('outputs', []))
    wrong = [m[0] for k in wrong_words for m in re.finditer(k, prose, re.I)]
    wrong += [f'covid3d {o}' for o in re.findall(r'`covid3d (\w+)', prose) if o not in commands()]
    return dict(cells=len(cells), words=len(words), words_per_line=round(len(words)/max(1, total), 1), we_you=round(1000*sum(w.lower() in ('we','us','our','you','your','yours') for w in words)/n, 1),
        median=statistics.median(sizes) if sizes else 0, longest=max(sizes, default=0), bare=bare, asserts=round(100*guards/max(1, len(shown))), mixed=mixed, pics=pics, wrong=wrong,
        unseen=unseen(text(c) for c in code if not text(c).startswith(('#| hide','#|hide'))))

def main():
    paths = [p for p in sorted([*(root/'nbs').glob('*.ipynb'), *(root/'nbs/tutorials').glob('*.ipynb')]) if not sys.argv[1:] or any(o in p.stem for o in sys.argv[1:])]
    print(f'{"notebook":24}{"cells":>6}{"words":>7}{"words/line":>11}{"we/you":>8}{"cell":>9}{"bare":>6}{"asserts":>9}{"mixed":>7}{"pics":>6}  wrong, unseen')
    for p in paths:
        f = figures(p)
        print(f'{p.stem:24}{f["cells"]:>6}{f["words"]:>7}{f["words_per_line"]:>11}{f["we_you"]:>8}{f["median"]:>5g}/{f["longest"]:<3}{len(f["bare"]):>6}{f["asserts"]:>8}%{f["mixed"]:>7}{f["pics"]:>6}  {", ".join(f["wrong"]+f["unseen"])}')
        if sys.argv[1:] and f['bare']: print('   bare:', ', '.join(f['bare']))

if __name__=='__main__': main()
