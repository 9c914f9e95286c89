"The pages of the reference, made from the objects themselves: a table of the parameters of each, from their docments"
import ast,importlib,inspect,io,pkgutil,re,textwrap,tokenize
from types import SimpleNamespace
from typing import Literal,get_args,get_origin
import covid3d
from fastcore.docments import docments

empty = inspect.Parameter.empty

def modules():
    return [o.name for o in pkgutil.iter_modules(covid3d.__path__) if o.name not in ('all','_modidx','__main__')]

def module(m): return importlib.import_module(f'covid3d.{m}')

def offered(m):
    "Name → object of what module `m` offers and defines itself"
    mod,here = module(m),f'covid3d.{m}'
    defined = lambda o: getattr(o, '__module__', here)==here or not callable(o)
    reexported = lambda k: m=='learner' and not hasattr(vars(mod)[k], '__module__')
    return {k:vars(mod)[k] for k in mod.__all__ if defined(vars(mod)[k]) and not reexported(k)}

def documented(): return [m for m in modules() if offered(m)]

common = {'main','app','train','folder','report','compare','publish','headline','scores','phantom','overlap','dice','segment','start','bands','recipes','published','joined','histogram'}
def names():
    "Name → full name of each object that inline code is linked to; words that mean something else as well are not"
    return {k:f'covid3d.{m}.{k}' for m in documented() for k in offered(m) if k not in common}

# Signatures and tables

class Written:
    "A default as it is written"
    def __init__(self, v): self.v = v
    def __repr__(self):
        if repr(self.v)=='<factory>': return '…'
        if callable(self.v): return getattr(self.v, '__name__', type(self.v).__name__)
        s = repr(self.v)
        return type(self.v).__name__ if ' at 0x' in s else re.sub(r'\b(Posix|Windows)Path', 'Path', s)

def type_text(a):
    if a in (empty, None, type(None)): return ''
    s = a if isinstance(a, str) else inspect.formatannotation(a)
    s = re.sub(r'\b(?:[A-Za-z_]\w*\.)+(?=\w)', '', s).replace('NoneType', 'None')
    return re.sub(r'\bUnion\[([^\[\]]*)\]', lambda m: m[1].replace(', ', ' | '), s)

def parameters(o, method=False):
    try: ps = [*inspect.signature(o).parameters.values()]
    except (ValueError, TypeError): return []
    return ps[1:] if (method or inspect.isclass(o)) and ps and ps[0].name in ('self','cls') else ps

def signature(ps):
    bare = [p.replace(annotation=empty, default=p.default if p.default is empty else Written(p.default)) for p in ps]
    return str(inspect.Signature(bare))

def cell(s): return re.sub(r'([|*<$\\])', r'\\\1', ' '.join(s.split()))
def code(s): return '`'+s.replace('|', r'\|')+'`' if s else ''

def returned(o):
    try: return inspect.signature(o).return_annotation
    except (ValueError, TypeError): return empty

def comments(o):
    "Name → comment of each parameter of a function or field of a class, as its source has them; several on one line share it"
    try: src = textwrap.dedent(inspect.getsource(o)); top = ast.parse(src).body[0]
    except (OSError, TypeError, SyntaxError): return {}
    lines,told = src.splitlines(),{t.start[0]:t.string.lstrip('# ') for t in tokenize.generate_tokens(io.StringIO(src).readline) if t.type==tokenize.COMMENT}
    above = lambda n: n>0 and lines[n-1].strip().startswith('#')
    def of(n):
        if n in told: return told[n]
        found = []
        while above(n := n-1): found.insert(0, told[n])
        return ' '.join(found)
    if isinstance(top, ast.ClassDef): return {f.target.id:of(f.lineno) for f in top.body if isinstance(f, ast.AnnAssign)}
    if not isinstance(top, ast.FunctionDef): return {}
    a,last = top.args,max([o.end_lineno for o in (*top.args.args, *top.args.kwonlyargs, *top.args.defaults) if o], default=0)
    if last==top.lineno: return {}  # what follows a signature of one line is told of its result
    return {o.arg:of(o.lineno) for o in (*a.posonlyargs, *a.args, a.vararg, *a.kwonlyargs, a.kwarg) if o}

def delegate(o):
    "What `o` passes its keywords to: a function, or the class whose `__init__` that is"
    to = getattr(o, '__delwrap__', None)
    return getattr(inspect.getmodule(to), to.__qualname__.split('.')[0], to) if to else None

def meanings(o, seen=()):
    "Name → meaning of each parameter: what its comment says, or that of the class above, or that of the function it is passed to"
    own = comments(o); res = {k:v for k,v in own.items() if v}
    above = [*o.__mro__[1:-1]] if inspect.isclass(o) else []
    for other in (*above, delegate(o)):
        if other is not None and other not in seen: res = meanings(other, (*seen, o))|res
    try: docs = docments(o, full=True, args_kwargs=True)
    except Exception: docs = {}  # a class made by a factory has no source
    return res|{k:v.docment for k,v in docs.items() if getattr(v, 'docment', None)}

def looked_up(name, said):
    "A meaning that only refers to another object, `See \`train\``, is that object's"
    m = re.fullmatch(r'(?:See|As) `(\w+)`', said or '')
    other = next((offered(k)[m[1]] for k in documented() if m[1] in offered(k)), None) if m else None
    return meanings(other).get(name) or said if other is not None else said

def table(o, ps):
    "Name, type, default and meaning of each parameter, and what comes back"
    try: docs = docments(o, full=True, args_kwargs=True)
    except Exception: docs = {}
    told,foreign = meanings(o),inspect.isclass(o) and not any('__init__' in vars(c) or '__new__' in vars(c) for c in o.__mro__ if c.__module__.startswith('covid3d.'))
    ps = [p for p in ps if p.name in told or not foreign]  # a constructor of another library has its own documentation
    rows = ['| name | type | default | meaning |', '|---|---|---|---|']
    for p in ps:
        default = '' if p.default is empty else repr(Written(p.default))
        star = {p.VAR_POSITIONAL:'*', p.VAR_KEYWORD:'**'}.get(p.kind, '')
        anno = p.annotation if p.annotation is not empty or p.default in (empty, None) or callable(p.default) else type(p.default)
        rows.append(f'| {code(star+p.name)} | {code(type_text(anno))} | {code(default)} | {cell(looked_up(p.name, told.get(p.name)) or "")} |')
    back,res = docs.get('return') or SimpleNamespace(anno=returned(o), docment=None),'\n'.join(rows) if ps else ''
    kind = '' if inspect.isclass(o) else type_text(back.anno)
    if kind or back.docment and not inspect.isclass(o): res += f'\n\n**Returns** {"`"+kind+"`" if kind else ""}'+(f': {cell(back.docment)}' if back.docment else '')
    return res

def doc(o):
    s = inspect.getdoc(o) or ''
    return '' if s.startswith(('Initialize self', f'{getattr(o, "__name__", "")}(')) else s

def directive(kind, head, body, mod='', depth=3):
    fence,where = ':'*depth,f':module: covid3d.{mod}\n' if mod else ''
    return f'{fence}{{py:{kind}}} {head}\n{where}\n{body}\n{fence}'

def members(cls):
    "Methods and properties that a class defines and explains"
    for k,v in vars(cls).items():
        f = v.__func__ if isinstance(v, (classmethod, staticmethod)) else v.fget if isinstance(v, property) else v
        if k.startswith('_') or not inspect.isfunction(f) or not f.__doc__: continue
        if isinstance(v, property): yield directive('property', k, doc(f)); continue
        ps = parameters(f, not isinstance(v, staticmethod))
        kind = {classmethod:'classmethod', staticmethod:'staticmethod'}.get(type(v), 'method')
        yield directive(kind, k+signature(ps), f'{doc(f)}\n\n{table(f, ps)}')

def entry(name, o, m):
    if inspect.isclass(o):
        ps = parameters(o)
        return directive('class', name+signature(ps), '\n\n'.join([doc(o), table(o, ps), *members(o)]), m, 4)
    if callable(o):
        ps = parameters(o)
        return directive('function', name+signature(ps), f'{doc(o)}\n\n{table(o, ps)}', m)
    shown = repr(o)
    return directive('data', name, f'A `{type(o).__name__}`'+(f': `{shown}`' if len(shown)<300 and '`' not in shown else '.'), m)

def summary(m): return (module(m).__doc__ or '').strip().split('\n')[0]

def page(m, title):
    "The page of module `m`, whose chapter has this title"
    body = '\n\n'.join(entry(k, o, m) for k,o in offered(m).items())
    return f'# covid3d.{m}\n\n{summary(m)}. The chapter [{title}]({m}.ipynb) shows how it works.\n\n```{{py:module}} covid3d.{m}\n```\n\n{body}\n'

def overview():
    "The page of all modules"
    rows = '\n'.join(f'| [covid3d.{m}](api-{m}.md) | {cell(summary(m))} | '+' '.join(f'{{py:obj}}`~covid3d.{m}.{k}`' for k in offered(m))+' |' for m in documented())
    tree = '\n'.join(f'api-{m}' for m in documented())
    return f'''# Python API

Every public object with its parameters, module by module. `from covid3d.all import *` gives a notebook nearly all of them, with fastai's names beside them; the [index](genindex) has them by letter.

| module | what it is for | objects |
|---|---|---|
{rows}

```{{toctree}}
:hidden:

{tree}
```
'''

def source_urls(cfg):
    "Full name → where the object is written"
    urls = {}
    for m in documented():
        for k,o in offered(m).items():
            inner = {f'{k}.{n}':f for n,f in vars(o).items()} if inspect.isclass(o) else {}
            for name,f in ({k:o}|inner).items():
                f = f.fget if isinstance(f, property) else getattr(f, '__func__', f)
                try: lines,start = inspect.getsourcelines(inspect.unwrap(f))
                except (TypeError, OSError): continue
                urls[f'covid3d.{m}.{name}'] = f'{cfg.git_url}/blob/{cfg.branch}/covid3d/{m}.py#L{start}-L{start+len(lines)-1}'
    return urls

# The command line

def group():
    import typer.main
    from covid3d.cli import app
    return typer.main.get_command(app)

def commands(): return [*group().commands]

def option_row(p):
    opts = ', '.join(code(o) for o in sorted(p.opts+p.secondary_opts, key=lambda o: (o.startswith('--'), o))) if p.param_type_name=='option' else code(p.metavar or p.name.upper())
    anno = p.type_descriptor.annotation
    takes = '' if getattr(p, 'is_flag', False) else '|'.join(get_args(anno)) if get_origin(anno) is Literal else p.metavar if p.param_type_name=='option' else ''
    default = p.default if isinstance(p.default, (int,float,str)) and not isinstance(p.default, bool) and p.default!='' else None
    said = (p.help or '')+(f' ({default})' if default is not None and '(' not in (p.help or '') else '')+(' *required*' if p.required else '')
    return f'| {opts} | {code(takes)} | {cell(said).replace(chr(92)+"*required"+chr(92)+"*", "**required**")} |'

def command_section(name, c):
    "A section: usage, arguments and options by panel"
    shown = [p for p in c.params if not getattr(p, 'hidden', False) and p.name not in ('help','install_completion','show_completion')]
    panels = {}
    for p in shown: panels.setdefault(getattr(p, 'rich_help_panel', None) or '', []).append(p)
    args = ' '.join(p.metavar or p.name.upper() for p in shown if p.param_type_name!='option')
    must = ' '.join(f'{max(p.opts, key=len)} {p.metavar or ""}'.strip() for p in shown if p.param_type_name=='option' and p.required)
    tables = [(f'**{k}**\n\n' if k else '')+'| option | takes | meaning |\n|---|---|---|\n'+'\n'.join(map(option_row, v)) for k,v in panels.items()]
    usage = ' '.join(filter(None, [f'covid3d {name}', args, must, '[OPTIONS]']))
    return '\n\n'.join([f'```{{index}} covid3d {name}\n```\n\n(covid3d-{name})=\n## covid3d {name}', (c.help or '').strip(), f'```text\n{usage}\n```', *tables])

def command_page():
    import os,subprocess,sys
    env = os.environ | dict(COLUMNS='80', TERMINAL_WIDTH='80', NO_COLOR='1', TERM='dumb', PYTHONIOENCODING='utf8')
    said = subprocess.run([sys.executable, '-m', 'covid3d', '--help'], env=env, capture_output=True, text=True, encoding='utf8', check=True).stdout
    said = '\n'.join(l.rstrip() for l in said.strip('\n').splitlines())
    sections = '\n\n'.join(command_section(k, c) for k,c in group().commands.items())
    return f'# Command line\n\n```text\n$ covid3d --help\n{said}\n```\n\nEach command tells its options with `--help`, and all of them with `--help-all`. They stand below, command by command. [Building a command](command.ipynb) shows how a command is made of a function, and [Command line](cli.ipynb) how all of them become one program.\n\n{sections}\n'
