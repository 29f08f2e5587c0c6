"""The site from the stored notebooks, without running them

`python tools/docs_site.py [OUT]` writes `_site`.
"""

import argparse
import base64
import json
import os
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from configparser import ConfigParser
from html import escape
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from xml.etree import ElementTree

from site_reference import COMMANDS, Reference
from site_symbols import private_errors, symbols

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


def guide_paths():
    "The how-to guides, in the order of the page that lists them"
    listed = re.findall(
        r'\]\(\.\./nbs/guides/(\w+)\.ipynb\)',
        (root / 'docs' / 'guides.md').read_text(encoding='utf-8'),
    )
    there = {p.stem for p in (NBS / 'guides').glob('*.ipynb')}
    if set(listed) != there:
        sys.exit(f'docs/guides.md and nbs/guides differ: {sorted(set(listed) ^ there)}')
    return [NBS / 'guides' / f'{name}.ipynb' for name in dict.fromkeys(listed)]


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
        self.private_errors = private_errors(c.code for c in self.cells if c.exported)
        code = '\n'.join(c.code for c in self.cells)
        self.uses = {
            n.split(' as ')[0].strip()
            for m in re.findall(rf'from {cfg["lib_path"]}\.[\w.]+ import ([^\n#]+)', code)
            for n in m.split(',')
        }


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
        self.root = root
        paths = [*chapter_paths(), *part_paths(), *guide_paths(), NBS / 'index.ipynb']
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
                root / 'CHANGELOG.md',
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
        self.reference = Reference(self, cfg)

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
            heading = re.match(r'\s*#+\s+(.*)\n', m[4])
            if 'minimal' in m[3]:
                title = 'Task' if m[4].lstrip().startswith('**Task**') else 'In this chapter'
                return f'{m[1]}{{admonition}} {title}\n:class: opening\n\n{m[4]}\n{m[1]}'
            return (
                f'{m[1]}{{admonition}} {heading[1] if heading else m[2].capitalize()}\n:class: '
                f'{m[2]}\n\n{m[4][heading.end() :] if heading else m[4]}\n{m[1]}'
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

    def source(self, code):
        "The code of a cell: Python, or a shell's"
        magic, _, rest = code.partition('\n')
        if magic == '%%bash':
            return self.fence(rest, 'sh')
        shell = re.search(r'^\s*[!%]', code, flags=re.M)
        return self.fence(code, 'text' if shell else 'python')

    def texts(self, cell):
        "What a cell printed"
        for o in cell.outputs:
            text = ''.join(o['text']) if o.get('name') == 'stdout' else ''
            text = text or ''.join(o.get('data', {}).get('text/plain', ''))
            if text.strip() and 'image/png' not in o.get('data', {}):
                yield self.fence(text.rstrip(), 'text', 'output')

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

    def anchors(self, chapter, i):
        "Places of a cell and of the names that it exports"
        names = [o.name for s in chapter.symbols if s.cell == i for o in (s, *s.members)]
        ids = [f'cell-{i}', *(name.lower() for name in names)]
        return ''.join(f'<span id="{o}"></span>' for o in ids)

    def code(self, chapter, cell, i):
        flags = cell.flags
        yield self.anchors(chapter, i)
        outs = [] if cell.flags.get('output') == 'false' else list(self.outputs(chapter, cell))
        if (
            not cell.code
            and not outs
            or flags.keys() & {'hide', 'export', 'default_exp'}
            or flags.get('include') == 'false'
        ):
            return
        summary = flags.get('code-summary', 'Code')
        shown = [] if flags.get('echo') == 'false' else [self.source(cell.code)]
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
            page = self.reference.page_of(chapter)
            parts.append(f'Reference: [`{chapter.module}`](/{page}.md)')
        return parts

    # the contents

    def heading(self, chapter):
        "Title and subtitle of a notebook, from its first cell"
        first = next(c.source for c in chapter.cells if c.markdown)
        title, subtitle = re.match(r'# ([^\n]+)\s*(?:> ([^\n]+))?', first).groups()
        return title, subtitle or ''

    def contents(self):
        "Groups of the sidebar: caption, and entries (title, page, pages below it)"

        def entry(chapter, below=()):
            return self.heading(chapter)[0], chapter.page, list(below)

        def document(name, below=()):
            text = (root / f'{name}.md').read_text(encoding='utf-8')
            return re.match(r'# (.*)', text)[1], Path(name).name.lower(), list(below)

        folders = defaultdict(list)
        for c in self.chapters:
            folders[c.path.parent.name].append(c)
        guides = [entry(c) for c in folders.pop('guides')]
        folders.pop('nbs')
        parts = []
        for folder, chapters in folders.items():
            opening = next(c for c in chapters if c.path.stem == 'index')
            title, page, _ = entry(opening)
            name = f'{int(folder.split("_")[0])} {title.split(":")[0]}'
            parts.append((name, page, [entry(c) for c in chapters if c is not opening]))
        reference = ('Commands and modules', 'api', self.reference.entries())
        return {
            'Learn': [document('docs/course')],
            'Do': [document('docs/guides', guides)],
            'Look up': [reference, document('docs/glossary'), ('Every name', 'genindex', [])],
            'Understand': [document('docs/handbook', parts), document('docs/decisions')],
            'The project': [document(o) for o in ('CHANGELOG', 'CONTRIBUTING', 'AGENTS')],
        }

    def doors(self):
        "The four doors of the front page"
        doors = (
            ('course', 'Learn', 'Sixteen chapters in four hours: DeepSeek-V3, built and trained'),
            ('guides', 'Do', 'How-to guides: train, fine-tune, load, convert, plan, extend'),
            ('api', 'Look up', 'Every command and every name of the package'),
            ('handbook', 'Understand', 'The handbook: each subject in depth, decisions, findings'),
        )
        cards = (
            f'<a class="door" href="{page}.html"><b>{name}</b><span>{says}</span></a>'
            for page, name, says in doors
        )
        return f'<nav class="doors" aria-label="Sections">{"".join(cards)}</nav>'

    def terms(self):
        "Terms of the glossary by the page that explains them, for the search and the index"
        text = (root / 'docs' / 'glossary.md').read_text(encoding='utf-8')
        found = defaultdict(list)
        entry = r'^\*\*([^*]+)\*\* – .*?\]\(\.\./nbs/([\w/]+)\.ipynb\)'
        for names, path in re.findall(entry, text, flags=re.M):
            found[self.pages[path]] += names.split(', ')
        return found

    def write(self):
        (self.src / 'pictures').mkdir(parents=True)
        terms = self.terms()
        groups = self.contents()
        below = dict(pages_below(entry for entries in groups.values() for entry in entries))
        for c in self.chapters:
            text = self.chapter(c)
            text[1:1] = [f'```{{index}} ! {term}\n```' for term in terms[c.page]]
            if c.page == 'index':
                text.insert(1, self.doors())
                text += [toctree(entries, caption) for caption, entries in groups.items()]
            self.page(c.page, text, below.get(c.page), c.path)
        self.page('api', self.reference.overview(), below['api'])
        for package in self.reference.packages:
            page = self.reference.package_page_of(package)
            self.page(page, self.reference.package_page(package), below[page])
        for c in self.reference.chapters:
            self.page(self.reference.page_of(c), self.reference.module_page(c))
        for name in COMMANDS:
            self.page(f'reference/{name}', self.reference.command_page(name))
        for p in self.project:
            name = p.stem.lower()
            text = self.text(p.read_text(encoding='utf-8'))
            self.page(name, [text], below.get(name), p)
        for p in (
            *root.glob('docs/*.svg'),
            *root.glob('docs/*.css'),
            root / 'docs' / 'conf.py',
            *root.glob('nbs/*.svg'),
        ):
            shutil.copy(p, self.src)
        mathjax(self.src / 'mathjax')

    def llms(self):
        "The pages of the site with a sentence each, for language models (llmstxt.org)"
        address = f'{cfg["doc_host"]}{cfg["doc_baseurl"]}'
        lines = [f'# {cfg["title"]}', '', f'> {cfg["description"]}']
        subtitles = {c.page: self.heading(c)[1] for c in self.chapters}
        subtitles |= {
            self.reference.page_of(c): self.heading(c)[1] for c in self.reference.chapters
        }

        def line(entry):
            title, page, below = entry
            says = f': {subtitles[page]}' if subtitles.get(page) else ''
            yield f'- [{title}]({address}/{page}.html){says}'
            for o in below:
                yield from line(o)

        for caption, entries in self.contents().items():
            lines += ['', f'## {caption}', '']
            lines += [o for entry in entries for o in line(entry)]
        return '\n'.join(lines) + '\n'

    def page(self, name, parts, below=None, source=None):
        "Write a page, with the pages below it in the sidebar and links to its source"
        parts = list(parts)
        if below:
            parts.append(toctree(below))
        if source:
            where = source.relative_to(root).as_posix()
            at = f'{cfg["git_url"]}/{{}}/{cfg["branch"]}/{where}'
            parts.append(
                f'<p class="where"><a href="{at.format("blob")}">Source of this page</a> · '
                f'<a href="{at.format("edit")}">edit it</a> · '
                f'{cfg["title"]} {cfg["version"]}</p>'
            )
        path = self.src / f'{name}.md'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text('\n\n'.join(p.strip('\n') for p in parts) + '\n', encoding='utf-8')


def pages_below(entries):
    "(page, entries below it) of all entries that have any, at every depth"
    for _, page, below in entries:
        if below:
            yield page, below
            yield from pages_below(below)


def toctree(entries, caption=''):
    "Entries of the sidebar: (title, page, …)"
    return (
        '```{toctree}\n:hidden:\n'
        + (f':caption: {caption}\n\n' if caption else '\n')
        + '\n'.join(f'{entry[0].replace("`", "")} </{entry[1]}>' for entry in entries)
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


def with_labels(html):
    "A page of the theme with what screen readers need and the theme lacks"
    for bare, labelled in (
        ('<p class="caption" role="heading">', '<p class="caption" role="heading" aria-level="2">'),
        ('<aside class="sidebar-drawer">', '<aside class="sidebar-drawer" aria-label="Pages">'),
        ('<aside class="toc-drawer">', '<aside class="toc-drawer" aria-label="On this page">'),
    ):
        html = html.replace(bare, labelled)
    return html


def build(out, src):
    "Sources into `src`, pages into `out`; a broken link or an unknown symbol is an error"
    for p in (src, out):
        shutil.rmtree(p, ignore_errors=True)
    site = Site(src)
    site.write()
    returned = subprocess.run(
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
    for page in out.rglob('*.html'):
        page.write_text(with_labels(page.read_text(encoding='utf-8')), encoding='utf-8')
    if not returned:
        (out / 'llms.txt').write_text(site.llms(), encoding='utf-8')
    return returned


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
