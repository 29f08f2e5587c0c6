"""The site from the stored notebooks, without running them

`python tools/docs_site.py [OUT]` writes `_site`.
"""

import argparse
import ast
import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tokenize
from collections import defaultdict
from configparser import ConfigParser
from html import escape
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from xml.etree import ElementTree

root = Path(__file__).resolve().parents[1]
parser = ConfigParser(delimiters=['='])
parser.read(root / 'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']

# --- notebooks


NBS = root / 'nbs'


def chapter_paths():
    "The numbered notebooks in reading order: part by part, chapter by chapter"
    return sorted(p for p in NBS.rglob('[0-9]*.ipynb') if '.ipynb_checkpoints' not in p.parts)


def part_paths():
    "The opening pages of the parts, one in each folder of chapters"
    folders = sorted({p.parent for p in chapter_paths()})
    missing = [f.name for f in folders if not (f / 'index.ipynb').is_file()]
    if missing:
        sys.exit(f'{", ".join(missing)}: no index.ipynb; every part needs an opening page')
    return [f / 'index.ipynb' for f in folders]


def page_of(path):
    "The page of a notebook as nbdev names it: its folder, and its name without the number"
    folder = path.parent.relative_to(NBS)
    return (folder / re.sub(r'^\d+[a-z]*_', '', path.stem)).as_posix()


def directives(source):
    "The `#| key: value` lines that lead a cell, and what follows them"
    found = {}
    lines = source.splitlines(True)
    while lines and (m := re.match(r'\s*#\s*\|\s*([\w-]+)\s*:?\s*(.*)', lines[0])):
        found[m[1]] = m[2].strip().strip('"\'')
        lines.pop(0)
    return found, ''.join(lines).strip('\n')


class Cell:
    "One cell: markdown, or code with its directives and stored outputs"

    def __init__(self, raw):
        self.markdown = raw['cell_type'] == 'markdown'
        self.source = ''.join(raw['source'])
        self.outputs = raw.get('outputs', [])
        self.flags, self.code = ({}, '') if self.markdown else directives(self.source)
        self.exported = not self.flags.keys().isdisjoint(('export', 'exports'))


class Chapter:
    "A notebook and the module that it exports"

    def __init__(self, path):
        self.path = path
        self.page = page_of(path)
        self.cells = [
            Cell(c)
            for c in json.loads(path.read_text(encoding='utf-8'))['cells']
            if c['cell_type'] in ('markdown', 'code')
        ]
        self.module = next(
            (
                f'{cfg["lib_path"]}.{c.flags["default_exp"]}'
                for c in self.cells
                if 'default_exp' in c.flags
            ),
            None,
        )
        self.symbols = [
            s for i, c in enumerate(self.cells) if c.exported for s in symbols(c.code, self, i)
        ]
        code = '\n'.join(c.code for c in self.cells)
        self.uses = {
            n.split(' as ')[0].strip()
            for m in re.findall(rf'from {cfg["lib_path"]}\.[\w.]+ import ([^\n#]+)', code)
            for n in m.split(',')
        }


# --- symbols: signatures and what docments say, read from the source


class Symbol:
    "A public name: what it is called, takes, gives and says"

    def __init__(self, chapter, cell, name, kind, node=None, comments=None, bases=(), value=''):
        self.chapter = chapter
        self.cell = cell
        self.name = name
        self.kind = kind
        self.members = []
        self.value = value
        self.doc = ''
        self.args = []
        self.gives = None
        self.note = ''
        if isinstance(node, ast.ClassDef):
            self.read_class(node, comments)
        elif node is not None:
            self.doc = ast.get_docstring(node) or ''
            self.read_args(node, comments)

    @property
    def full(self):
        return f'{self.chapter.module}.{self.name}'

    def read_args(self, node, comments):
        a = node.args
        said = {}
        plain = a.posonlyargs + a.args
        defaults = [None] * (len(plain) - len(a.defaults)) + a.defaults
        rows = [('', o, d) for o, d in zip(plain, defaults)]
        if a.vararg:
            rows.append(('*', a.vararg, None))
        elif a.kwonlyargs:
            rows.append(('*', None, None))
        rows += [('', o, d) for o, d in zip(a.kwonlyargs, a.kw_defaults)] + (
            [('**', a.kwarg, None)] if a.kwarg else []
        )
        for _, o, d in rows:
            if o:
                said[(d or o).end_lineno] = (
                    o.arg
                )  # a comment belongs to the last argument on its line
        spread = any(o and o.lineno > node.lineno for _, o, _ in rows)
        for star, o, d in rows:
            if o is None:
                self.args.append(('*', '', '', ''))
                continue
            last = (d or o).end_lineno
            says = comments.get(last, '') if spread and said[last] == o.arg else ''
            says = says or comment_above(o.lineno, comments)
            self.args.append(
                (
                    star + o.arg,
                    ast.unparse(o.annotation) if o.annotation else '',
                    ast.unparse(d) if d else '',
                    says,
                )
            )
        if self.kind != 'function' and self.args and self.args[0][0] in ('self', 'cls', 'ctx'):
            self.args.pop(0)
        end = node.returns.end_lineno if node.returns else node.lineno
        if node.returns:
            self.gives = (
                ast.unparse(node.returns),
                comments.get(end, '') if spread or end < node.body[0].lineno else '',
            )
        elif not spread and node.body[0].lineno > node.lineno:
            self.note = comments.get(node.lineno, '')

    def read_class(self, node, comments):
        self.doc = ast.get_docstring(node) or ''
        fields = [
            o for o in node.body if isinstance(o, ast.AnnAssign) and isinstance(o.target, ast.Name)
        ]
        if any('dataclass' in ast.unparse(d) for d in node.decorator_list):
            self.args = [
                (
                    o.target.id,
                    ast.unparse(o.annotation),
                    ast.unparse(o.value) if o.value else '',
                    comments.get(o.end_lineno, ''),
                )
                for o in fields
            ]
        for o in node.body:
            if not isinstance(o, ast.FunctionDef):
                continue
            m = method(o, comments, self.chapter, self.cell, self.name)
            if o.name == '__init__':
                self.args = m.args
            elif not o.name.startswith('_') and (m.doc or any(a[3] for a in m.args)):
                self.members.append(m)


def method(node, comments, chapter, cell, owner):
    "A method of a class, defined in it or patched on"
    marks = ' '.join(ast.unparse(d) for d in node.decorator_list)
    kind = (
        'property'
        if 'property' in marks or 'as_prop' in marks
        else 'classmethod'
        if 'classmethod' in marks or 'cls_method' in marks
        else 'staticmethod'
        if 'staticmethod' in marks
        else 'method'
    )
    return Symbol(chapter, cell, f'{owner}.{node.name}', kind, node, comments)


def comments_of(code):
    "Comments by line; one that has a line of its own stands under the negative number"
    found = {}
    for t in tokenize.generate_tokens(io.StringIO(code + '\n').readline):
        if t.type == tokenize.COMMENT:
            alone = t.line.strip().startswith('#')
            found[-t.start[0] if alone else t.start[0]] = t.string.lstrip('# ').strip()
    return found


def comment_above(line, comments):
    "What the comment lines right above a line say: a long docment stands there"
    said = []
    while -(line - 1) in comments:
        line -= 1
        said.insert(0, comments[-line])
    return ' '.join(said)


def symbols(code, chapter, cell):
    "Public names that an exported cell defines"
    comments = comments_of(code)
    for node in ast.parse(code).body:
        name = getattr(node, 'name', '')
        if isinstance(node, ast.FunctionDef) and any(
            'patch' in ast.unparse(d) for d in node.decorator_list
        ):
            owner = ast.unparse(node.args.args[0].annotation)
            if not name.startswith('_'):
                yield method(node, comments, chapter, cell, owner)
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not name.startswith('_'):
            yield Symbol(
                chapter,
                cell,
                name,
                'class' if isinstance(node, ast.ClassDef) else 'function',
                node,
                comments,
            )
        elif isinstance(node, ast.Assign):
            names = node.targets[0].elts if isinstance(node.targets[0], ast.Tuple) else node.targets
            values = (
                node.value.elts
                if isinstance(node.value, ast.Tuple) and len(node.value.elts) == len(names) > 1
                else [node.value] * len(names)
            )
            for n, v in zip(names, values):
                if not isinstance(n, ast.Name) or not n.id.isupper() or n.id.startswith('_'):
                    continue
                s = Symbol(
                    chapter,
                    cell,
                    n.id,
                    'data',
                    value=ast.unparse(v)
                    if len(names) == len(values) and len(ast.unparse(v)) < 60
                    else '',
                )
                s.doc = comments.get(node.end_lineno, '')
                yield s


# --- pages

FENCES = re.compile(r'^(`{3,})[^\n]*\n.*?^\1`*\s*$', flags=re.M | re.S)
SPANS = re.compile(
    r'\$\$.*?\$\$|\$[^$\n]+\$|!?\[(?:[^\[\]]|\[[^\]]*\])*\]\([^)]*\)|(`+)(.+?)\1|^#+ .*$',
    flags=re.M | re.S,
)


class Site:
    "Chapters and other pages as MyST markdown for Sphinx"

    def __init__(self, src):
        self.src = src
        paths = [*chapter_paths(), *part_paths(), NBS / 'index.ipynb']
        self.chapters = [Chapter(p) for p in paths]
        self.pages = {
            c.path.relative_to(NBS).with_suffix('').as_posix(): c.page for c in self.chapters
        }
        if len(set(self.pages.values())) < len(self.pages):
            sys.exit('two notebooks differ only in their number: their pages would have one name')
        self.project = [
            p
            for p in (
                *sorted((root / 'docs').glob('*.md')),
                root / 'CONTRIBUTING.md',
                root / 'AGENTS.md',
            )
            if p.exists()
        ]
        self.adopt_patches()
        self.known = {}
        self.called = defaultdict(set)  # full name -> symbol; a name as it is said -> full names
        for c in self.chapters:
            for s in c.symbols:
                for o in (s, *s.members):
                    self.known[o.full] = o
                    for said in (o.name, o.full):
                        self.called[said].add(o.full)

    def adopt_patches(self):
        "Methods that were patched on a class stand with it where the class is of the same chapter"
        for c in self.chapters:
            own = {s.name: s for s in c.symbols if s.kind == 'class'}
            for s in list(c.symbols):
                owner = own.get(s.name.rpartition('.')[0])
                if owner:
                    owner.members.append(s)
                    c.symbols.remove(s)

    # links

    def symbol(self, said, chapter):
        "The full name of what a text calls `said`, if there is no doubt"
        m = re.match(r'([A-Za-z_][\w.]*)(\(.*\))?$', said)
        if not m:
            return None
        full = self.called.get(m[1], set())
        here = {f for f in full if chapter and self.known[f].chapter is chapter}
        if here:
            full = here
        plain = (
            re.fullmatch(r'[a-z]+', m[1]) and not here and not (chapter and m[1] in chapter.uses)
        )  # `run` may be anyone's
        return next(iter(full)) if len(full) == 1 and not plain else None

    def text(self, s, chapter=None):
        "Markdown of a notebook or page as MyST: links between pages, symbols, callouts"
        done = []
        at = 0
        for m in FENCES.finditer(s):
            done += [self.prose(s[at : m.start()], chapter), m[0]]
            at = m.end()
        return self.callouts(''.join(done) + self.prose(s[at:], chapter))

    def prose(self, s, chapter):
        def span(m):
            if m[2] and len(m[1]) == 1 and '<' not in m[2] and (full := self.symbol(m[2], chapter)):
                return f'{{py:obj}}`{m[2]} <{full}>`'
            return m[0]

        s = SPANS.sub(span, s)

        def to_chapter(m):
            here = chapter.path.parent if chapter else NBS
            plain = re.sub(r'^(\.\./)*(nbs/)?', '', m[1])
            candidates = (os.path.relpath(here / m[1], NBS), plain)
            page = next((self.pages[c] for c in candidates if c in self.pages), plain)
            return f'](/{page}.md{m[2] or ""})'

        s = re.sub(r'\]\(((?:\.\./)*(?:\w+/)*\w+)\.ipynb(#[^)]*)?\)', to_chapter, s)
        s = re.sub(
            r'\]\((?:\.\./|docs/|\./)*(\w+)\.md(#[^)]*)?\)',
            lambda m: f'](/{"index" if m[1] == "README" else m[1].lower()}.md{m[2] or ""})',
            s,
        )
        return re.sub(
            r'\]\((?:\.\./)*((?:\.?\w[\w-]*/)*(?:LICENSE|[\w-]+\.(?:py|ini|json|txt|yml)))\)',
            rf']({cfg["git_url"]}/blob/{cfg["branch"]}/\1)',
            s,
        )

    def callouts(self, s):
        def f(m):
            title = re.match(r'\s*#+\s+(.*)\n', m[4])
            if 'minimal' in m[3]:
                return f'{m[1]}{{admonition}} In this chapter\n:class: opening\n\n{m[4]}\n{m[1]}'
            return (
                f'{m[1]}{{admonition}} {title[1] if title else m[2].capitalize()}\n:class: '
                f'{m[2]}\n\n{m[4][title.end() :] if title else m[4]}\n{m[1]}'
            )

        return re.sub(
            r'^(:{3,}) ?\{\.callout-(\w+)([^}]*)\}\n(.*?)\n\1[ ]*$', f, s, flags=re.M | re.S
        )

    # chapters

    def fence(self, code, language='python', kind=''):
        ticks = '`' * max(3, 1 + max(map(len, re.findall(r'`{3,}', code)), default=0))
        return (
            f'{ticks}{{code-block}} {language}\n'
            + (f':class: {kind}\n' if kind else '')
            + f'\n{code}\n{ticks}'
        )

    def outputs(self, chapter, cell):
        for o in cell.outputs:
            data = o.get('data', {})
            text = ''.join(o['text']) if o.get('name') == 'stdout' else ''
            if 'image/svg+xml' in data:
                yield self.drawing(chapter, ''.join(data['image/svg+xml']))
                text = ''
            elif 'image/png' in data:
                self.pictures += 1
                name = f'{chapter.page.replace("/", "_")}_{self.pictures}.png'
                png = base64.b64decode(''.join(data['image/png']))
                (self.src / 'pictures' / name).write_bytes(png)
                width = (
                    int.from_bytes(png[16:20], 'big') // 2
                )  # stored with twice the pixels, for fine screens
                title = re.findall(r"""title(?:=|\()f?(['"])(.*?)(?<!\\)\1""", cell.code)
                alt = (
                    '; '.join(re.sub(r'[\[\]{}\\`$*]', ' ', t) for _, t in title)
                    or f'Picture {self.pictures} of this chapter'
                )
                yield (
                    f'```{{image}} /pictures/{name}\n:class: '
                    f'picture\n:width: {width}px\n:alt: {alt}\n```'
                )
            elif 'text/markdown' in data:
                yield self.text(''.join(data['text/markdown']), chapter)
            else:
                text = text or ''.join(data.get('text/plain', ''))
            if text.strip():
                yield self.fence(
                    re.sub(r'\x1b\[[\d;]*m', '', text).rstrip().replace('\t', '    '),
                    'text',
                    'output',
                )

    def drawing(self, chapter, svg):
        "A diagram as a file of its own, with its own words as alternative text"
        self.pictures += 1
        name = f'{chapter.page.replace("/", "_")}_{self.pictures}.svg'
        (self.src / 'pictures' / name).write_text(svg, encoding='utf-8')
        root_element = ElementTree.fromstring(svg)
        return (
            f'```{{image}} /pictures/{name}\n:class: diagram\n'
            f':width: {root_element.get("width")}px\n:alt: {root_element.get("aria-label")}\n```'
        )

    def code(self, chapter, cell, i):
        flags = cell.flags
        outs = [] if cell.flags.get('output') == 'false' else list(self.outputs(chapter, cell))
        if (
            not cell.code
            and not outs
            or flags.keys() & {'hide', 'export', 'default_exp'}
            or flags.get('include') == 'false'
        ):
            return
        summary = flags.get('code-summary', 'Code')
        shown = (
            []
            if flags.get('echo') == 'false'
            else [
                self.fence(
                    cell.code, 'text' if re.search(r'^\s*[!%]', cell.code, flags=re.M) else 'python'
                )
            ]
        )
        if 'exports' in flags:
            yield f'<span id="cell-{i}"></span>'
        for f in flags.keys() & set(cfg['tst_flags'].split()):
            yield f'<p class="flag">{f}: shown as stored by a run that asked for it</p>'
        if flags.get('code-fold', 'false') == 'false' or not shown:
            yield from (*shown, *outs)
            return
        inside, after = (shown + outs, []) if summary.startswith('Solution') else (shown, outs)
        yield from (
            f'<details class="fold"><summary>{escape(summary)}</summary>',
            *inside,
            '</details>',
            *after,
        )

    def chapter(self, chapter):
        self.pictures = 0
        parts = []
        for i, c in enumerate(chapter.cells):
            parts += [self.text(c.source, chapter)] if c.markdown else self.code(chapter, c, i)
        if chapter.symbols:
            parts += [
                f'## API of `{chapter.module}`',
                f'```{{py:module}} {chapter.module}\n```',
                *(self.entry(s) for s in chapter.symbols),
            ]
        return parts

    # entries of the API

    def entry(self, s, ticks=7):
        "Signature, sentence and table of one symbol"
        name = s.name
        sig = ', '.join(n + ('=' + d if d else '') for n, _, d, _ in s.args)
        head = name if s.kind in ('property', 'data') else f'{name}({sig})'
        option = f':{s.kind}:\n' if s.kind in ('classmethod', 'staticmethod') else ''
        option += f':value: {s.value}\n' if s.value else ''
        fence = '`' * ticks
        body = [f'<span id="{name.lower()}"></span>', self.text(s.doc, s.chapter)]
        if s.note:
            body.append(
                f'*{escape(s.note)}*' if '`' not in s.note and '*' not in s.note else s.note
            )
        body += self.table(s)
        if 'exports' in s.chapter.cells[s.cell].flags:
            body.append(f'<p class="where"><a href="#cell-{s.cell}">source, in the chapter</a></p>')
        else:
            file = f'{s.chapter.module.replace(".", "/")}.py'
            address = f'{cfg["git_url"]}/blob/{cfg["branch"]}/{file}'
            body.append(f'<p class="where"><a href="{address}">source</a></p>')
        body += [self.entry(m, ticks - 1) for m in s.members]
        return (
            f'{fence}{{py:{"method" if s.kind.endswith("method") else s.kind}}} {head}\n{option}\n'
            + '\n\n'.join(filter(None, body))
            + f'\n{fence}'
        )

    def table(self, s):
        rows = [(f'`{n}`', t, d, says) for n, t, d, says in s.args if n != '*']
        if s.gives and (s.gives[1] or s.gives[0] != 'None'):
            rows.append(('gives', s.gives[0], '', s.gives[1]))
        if not any(t or says for _, t, _, says in rows):
            return

        def cut(o):
            return o.replace('|', '\\|')

        def code(o):
            return f'`{o}`' if o else ''

        def kind(t):
            return self.prose(code(t), s.chapter)

        lines = [
            (
                f'| {n} | {cut(kind(t))} | {cut(code(d))} | '
                f'{cut(self.prose(says.replace("<", "&lt;"), s.chapter))} |'
            )
            for n, t, d, says in rows
        ]
        yield (
            (
                '```{table}\n:class: parameters\n\n| name | type '
                '| default | what it is |\n|---|---|---|---|\n'
            )
            + '\n'.join(lines)
            + '\n```'
        )

    def api(self):
        parts = [
            '# API',
            (
                'Every public name by the chapter that makes it, and '
                '[all of them by letter](genindex). Entries stand at '
                'the end of each chapter, with what every argument is.'
            ),
        ]
        for c in self.chapters:
            if not c.symbols:
                continue
            lines = [
                f'- {{py:obj}}`{s.name} <{s.full}>`'
                + (f': {self.text(s.doc.splitlines()[0], c)}' if s.doc else '')
                for s in c.symbols
            ]
            parts += [
                f'## `{c.module}`',
                f'from [{self.titles.get(c.page, c.page)}]({c.page}.md)',
                '\n'.join(lines),
            ]
        return parts

    # the contents

    def contents(self):
        "Opening pages of the parts, and their chapters, as the table of the index has them"
        parts = {}
        table = '\n'.join(c.source for c in self.chapters[-1].cells if c.markdown)
        row = (
            r'^\| *(?:\[([^\]]*)\]\((\d\w+/index)\.ipynb\) )?'
            r'\| \[([^\]]*)\]\((\d[\w/]+)\.ipynb\)'
        )
        for part, opening, title, stem in re.findall(row, table, flags=re.M):
            page = page_of(NBS / f'{stem}.ipynb')
            if part:
                parts[opening] = (part, here := [])
            here.append((title[0].upper() + title[1:], page))
        listed = {p for _, o in parts.values() for _, p in o} | parts.keys() | {'index'}
        missing = {c.page for c in self.chapters} - listed
        if missing:
            sys.exit(
                f"not in the index's table: {', '.join(sorted(missing))}; "
                f'every chapter needs a row there, and every part a link to its opening page'
            )
        return parts

    def write(self):
        (self.src / 'pictures').mkdir(parents=True)
        parts = self.contents()
        self.titles = {p: t for _, o in parts.values() for t, p in o}
        for c in self.chapters:
            text = self.chapter(c)
            if c.page == 'index':
                more = [
                    ('API', 'api'),
                    ('Every name', 'genindex'),
                    *(
                        (re.match(r'# (.*)', p.read_text(encoding='utf-8'))[1], p.stem.lower())
                        for p in self.project
                    ),
                ]
                book = [(name, opening) for opening, (name, _) in parts.items()]
                text += [toctree(book, 'Course and handbook'), toctree(more, 'The project')]
            elif c.page in parts:
                text.append(toctree(parts[c.page][1]))
            self.page(c.page, text)
        self.page('api', self.api())
        for p in self.project:
            self.page(p.stem.lower(), [self.text(p.read_text(encoding='utf-8'))])
        for p in (
            *root.glob('docs/*.svg'),
            *root.glob('docs/*.css'),
            root / 'docs' / 'conf.py',
            *root.glob('nbs/*.svg'),
        ):
            shutil.copy(p, self.src)
        mathjax(self.src / 'mathjax')

    def page(self, name, parts):
        path = self.src / f'{name}.md'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('\n\n'.join(p.strip('\n') for p in parts) + '\n', encoding='utf-8')


def toctree(entries, caption=''):
    "Entries of the sidebar; those of an opening page stand below it"
    return (
        '```{toctree}\n:hidden:\n'
        + (f':caption: {caption}\n\n' if caption else '\n')
        + '\n'.join(f'{title.replace("`", "")} </{page}>' for title, page in entries)
        + '\n```'
    )


def mathjax(to):
    "MathJax and its fonts, from a package that bundles them"
    try:
        have = Path(
            distribution('sphinx-mathjax-offline').locate_file(
                'sphinx-mathjax-offline/static/mathjax'
            )
        )
    except PackageNotFoundError:
        sys.exit("sphinx-mathjax-offline is not installed: pip install -e '.[docs]'")
    fonts = 'output/chtml/fonts/woff-v2'
    shutil.copytree(have / fonts, to / fonts)
    shutil.copy(have / 'tex-chtml.js', to)


def build(out, src):
    "Sources into `src`, pages into `out`; a broken link or an unknown symbol is an error"
    for p in (src, out):
        shutil.rmtree(p, ignore_errors=True)
    Site(src).write()
    return subprocess.run(
        [
            sys.executable,
            '-m',
            'sphinx',
            '-q',
            '-W',
            '--keep-going',
            '-j',
            '2',
            '-b',
            'html',
            '-d',
            src / '.doctrees',
            src,
            out,
        ],
        env={**os.environ, 'EVA_SETTINGS': json.dumps(dict(cfg))},
    ).returncode


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('out', nargs='?', type=Path, default=root / '_site', help='where the pages go')
    p.add_argument(
        '--src', type=Path, default=root / 'build' / 'site', help='where the sources for Sphinx go'
    )
    a = p.parse_args()
    code = build(a.out.resolve(), a.src.resolve())
    print(
        f'{len(list(a.out.rglob("*.html")))} pages in {a.out}'
        if not code
        else 'the site has errors',
        flush=True,
    )
    sys.exit(code)
