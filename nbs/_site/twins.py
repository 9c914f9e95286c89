"The pages as markdown, for programs that read: tables from the HTML of the outputs, and plain markdown from that of Sphinx"
import re
from html.parser import HTMLParser

class Rows(HTMLParser):
    "The rows of an HTML table; a cell over several columns or rows is there in each"
    def __init__(self, html):
        super().__init__()
        self.head,self.rows,self.caption,self.at,self.down,self.in_head,self.skip = 0,[],'',None,{},False,False
        self.feed(html); self.close()
    def handle_starttag(self, tag, attrs):
        a = dict(attrs)
        if tag=='thead': self.in_head = True
        elif tag=='tr': self.rows.append([]); self.head += self.in_head; self.held()
        elif tag in ('td','th'): self.at,self.span = '',(int(a.get('colspan') or 1), int(a.get('rowspan') or 1))
        elif tag=='caption': self.at = ''
        elif tag=='style': self.skip = True
        elif tag=='br': self.handle_data(' ')
    def held(self):
        "Fill in the cells that come down from the rows above"
        row = self.rows[-1]
        while (n := len(row)) in self.down:
            s,k = self.down[n]; row.append(s)
            if k>1: self.down[n] = s,k-1
            else: del self.down[n]
    def handle_data(self, s):
        if self.at is not None and not self.skip: self.at += s
    def handle_endtag(self, tag):
        if tag=='thead': self.in_head = False
        elif tag=='style': self.skip = False
        elif tag=='caption': self.caption,self.at = self.at.strip(),None
        elif tag in ('td','th') and self.at is not None:
            for _ in range(self.span[0]):
                if self.span[1]>1: self.down[len(self.rows[-1])] = self.at,self.span[1]-1
                self.rows[-1].append(self.at)
            self.at = None; self.held()

def is_table(html): return '<table' in html and html.count('<table')==1 and 'class="dataframe"' in html or '<table id="T_' in html

def table(html):
    "An HTML table as markdown; the rows of its head become one"
    t = Rows(html)
    width = max(map(len, t.rows), default=0)
    rows = [[re.sub(r'([|*<\\])', r'\\\1', ' '.join(s.split())) for s in r]+['']*(width-len(r)) for r in t.rows]
    n = t.head or 1
    head = [' / '.join(dict.fromkeys(filter(None, col))) for col in zip(*rows[:n])]
    lines = ['| '+' | '.join(r)+' |' for r in (head, ['---']*width, *rows[n:])]
    return '\n'.join(([t.caption+'\n'] if t.caption else [])+lines)

def unhtml(s, url):
    "Markdown without HTML: pictures and links as markdown, the text of what else there is"
    of = lambda tag, k: (re.findall(rf'\b{k}="([^"]*)"', tag) or [''])[0]
    pic = lambda m: f'\n\n![{of(m[0], "alt")}]({url}{of(m[0], "src")})\n\n'
    s = re.sub(r'<img\b[^>]*>', pic, s)
    s = re.sub(r'<a\b[^>]*href="([^"]*)"[^>]*>(.*?)</a>', lambda m: f'[{" ".join(re.sub("<[^>]*>", " ", m[2]).split())}]({m[1]})', s, flags=re.S)
    s = re.sub(r'</?(?:b|strong)>', '**', s)
    return re.sub(r'\n{3,}', '\n\n', re.sub(r'</?[a-z][^<>]*>', '', s))

fence_re = re.compile(r'(^[ ]*(`{3,}).*?^[ ]*\2[ ]*$|``+.*?``+|`[^`\n]+`)', re.M|re.S)
def page(s, url, to):
    "MyST `s` as plain markdown; `to` gives the address of a link"
    s = re.sub(r'\A---\n.*?\n---\n', '', s, flags=re.S)
    s = re.sub(r'^```\{(?:index|toctree|py:module)\}.*?^```\n', '', s, flags=re.M|re.S)
    def image(m):
        got = dict(re.findall(r'^:(\w+): (.*)$', m[2], re.M))
        return '' if got.get('class')=='only-dark' else f'![{got.get("alt", "")}]({url}_images/{m[1].rsplit("/", 1)[-1]})'
    s = re.sub(r'^```\{image\} (\S+)\n(.*?)^```$', image, s, flags=re.M|re.S)
    s = re.sub(r'^(:{3,})\{py:(\w+)\} (.*)\n(?::module: .*\n)?', lambda m: f'{"##" if m[2] in ("class","function","data") else "###"} `{m[3]}`\n', s, flags=re.M)
    s = re.sub(r'^:{3,}$\n?|^\([\w-]+\)=\n', '', s, flags=re.M)
    s = re.sub(r'\{py:obj\}`~?(?:[^`<>]*\.)?([^`<>.]+)`', r'`\1`', s)
    parts = fence_re.split(s)  # text, fence, its ticks, text …
    res = ''.join(o if i%3==1 else '' if i%3==2 else links(unhtml(o or '', url), to) for i,o in enumerate(parts))
    return re.sub(r'\n{3,}', '\n\n', res).strip()+'\n'

def links(s, to): return re.sub(r'(\]\()([^)\s]+)', lambda m: m[1]+to(m[2]), s)
