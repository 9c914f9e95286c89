"Sphinx reads this; build.py puts the pages beside it"
import covid3d
from docutils import nodes
from latex2mathml.converter import convert

project = html_title = 'covid3d'
author,version = 'covid3d authors',covid3d.__version__
extensions = ['myst_nb', 'sphinx_copybutton']
exclude_patterns = ['raw']
suppress_warnings = ['mystnb.unknown_mime_type', 'myst.header']
nb_execution_mode = 'off'
nb_merge_streams = True
myst_enable_extensions = ['dollarmath', 'amsmath', 'colon_fence']
copybutton_exclude = '.linenos, .gp, .go'

html_theme = 'furo'
html_theme_options = dict(navigation_with_keys=True,
    light_css_variables={'color-brand-primary':'#0b5d7a', 'color-brand-content':'#0b5d7a'},
    dark_css_variables={'color-brand-primary':'#6fc3dd', 'color-brand-content':'#6fc3dd'})
html_static_path,html_css_files = ['_static'],['nb.css']
html_extra_path = ['raw']
html_show_sphinx = html_copy_source = html_show_copyright = False
html_math_renderer = 'mathml'

def mathml(display):
    "Visitor that writes a formula as MathML, so that a page needs no script from elsewhere"
    def visit(self, node): self.body.append(convert(node.astext(), display=display)); raise nodes.SkipNode
    return visit,None

def setup(app): app.add_html_math_renderer('mathml', mathml('inline'), mathml('block'))
