"Sphinx reads this; build.py puts the pages beside it"
import json
from pathlib import Path
import covid3d
from docutils import nodes
from latex2mathml.converter import convert

here = Path(__file__).resolve().parent
told,build = (json.loads((here/o).read_text(encoding='utf-8')) for o in ('_static/descriptions.json','build.json'))
project = html_title = 'covid3d'
author,version = 'covid3d authors',covid3d.__version__
extensions = ['myst_nb', 'sphinx_copybutton', 'sphinx.ext.linkcode']
exclude_patterns = ['raw']
suppress_warnings = ['mystnb.unknown_mime_type', 'myst.header']
nb_execution_mode,nb_merge_streams = 'off',True
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence']
myst_heading_anchors = 4
copybutton_exclude = '.linenos, .gp, .go'
toc_object_entries_show_parents = 'hide'
add_module_names = False

html_theme = 'furo'
html_baseurl = build['address']
html_theme_options = dict(navigation_with_keys=True,
    light_css_variables={'color-brand-primary':'#0b5d7a', 'color-brand-content':'#0b5d7a', 'color-brand-visited':'#5b3f8c', 'color-foreground-muted':'#595f66', 'color-api-name':'#0b5d7a', 'color-api-pre-name':'#595f66'},
    dark_css_variables={'color-brand-primary':'#6fc3dd', 'color-brand-content':'#6fc3dd', 'color-brand-visited':'#b9a2e8', 'color-foreground-muted':'#9ba1a8', 'color-api-name':'#6fc3dd', 'color-api-pre-name':'#9ba1a8'})
templates_path,html_static_path = ['_templates'],['_static']
html_css_files,html_js_files,html_favicon = ['site.css'],['site.js'],'_static/favicon.svg'
html_extra_path = ['raw']
html_show_search_summary = False  # site.js shows descriptions instead, without fetching every page
html_show_sphinx = html_copy_source = html_show_copyright = html_show_sourcelink = False
html_domain_indices = False
html_math_renderer = 'mathml'

def linkcode_resolve(domain, info):
    return build['sources'].get(f"{info['module']}.{info['fullname']}") if domain=='py' else None

def mathml(display):
    "Visitor that writes a formula as MathML, so that a page needs no script from elsewhere"
    def visit(self, node): self.body.append(convert(node.astext(), display=display)); raise nodes.SkipNode
    return visit,None

def describe(app, page, template, context, doctree):
    "What the templates say of a page in its head"
    context['description'] = told.get(page) or told['index']
    context['twin'] = f'{page}.html.md' if (here/f'raw/{page}.html.md').exists() else ''
    context['site_root'] = html_baseurl.split('/', 3)[3]
    if tree := context.get('furo_navigation_tree'): context['furo_navigation_tree'] = tree.replace('role="heading"', 'role="heading" aria-level="2"')

def setup(app):
    app.add_html_math_renderer('mathml', mathml('inline'), mathml('block'))
    app.connect('html-page-context', describe, priority=900)  # after furo
