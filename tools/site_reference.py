"""The reference of the site: a page for each module, and a page for each command"""

import argparse
import ast
import re
import sys
from collections import defaultdict
from html import escape
from importlib import import_module

COMMANDS = dict(
    eva_train=('eva.cli.train_arguments', 'train_parser'),
    eva_generate=('eva.cli.generate', 'generate_parser'),
    eva_convert=('eva.cli.convert', 'convert_parser'),
    eva_bench=('eva.cli.bench', 'bench_parser'),
    eva_plan=('eva.cli.plan', 'plan_parser'),
    eva_serve=('eva.cli.serve', 'serve_parser'),
)  # command -> module and function of its parser
EXAMPLE_LINES = 14  # an example is a shown cell of at most so many lines


def cell_text(text):
    "Text inside a table"
    return text.replace('|', '\\|').replace('\n', ' ').replace('<', '&lt;')


class Reference:
    "Pages of modules and commands, made from what `Site` has read"

    def __init__(self, site, settings):
        self.site = site
        self.settings = settings
        self.chapters = [c for c in site.chapters if c.symbols]
        self.errors = defaultdict(list)  # name of a function -> errors that it raises
        for c in self.chapters:
            for s in c.symbols:
                self.errors[s.name] += s.raises
            self.errors.update(c.private_errors)

        self.packages = defaultdict(list)  # 'attention' -> its chapters; 'eva': modules of no part
        for c in self.chapters:
            parts = c.module.split('.')
            self.packages[parts[1] if len(parts) > 2 else 'eva'].append(c)

    def page_of(self, chapter):
        return f'reference/{chapter.module}'

    def package_page_of(self, package):
        return f'reference/packages/{package}'

    def entries(self):
        "Commands, and packages with their modules: (title, page, pages below)"
        commands = [(name, f'reference/{name}', []) for name in COMMANDS]
        packages = [
            (
                package if package == 'eva' else f'eva.{package}',
                self.package_page_of(package),
                [(c.module.rpartition('.')[2], self.page_of(c), []) for c in chapters],
            )
            for package, chapters in self.packages.items()
        ]
        return commands + packages

    def package_page(self, package):
        name = package if package == 'eva' else f'eva.{package}'
        return [f'# `{name}`', self.modules(self.packages[package])]

    def modules(self, chapters):
        return '\n'.join(
            f'- [`{c.module}`](/{self.page_of(c)}.md): {self.site.heading(c)[1]}' for c in chapters
        )

    def link(self, chapter, place, words):
        "A link to a place inside a chapter's page"
        return f'<a href="../{chapter.page}.html#{place}">{words}</a>'

    # modules

    def module_page(self, chapter):
        site = self.site
        title, subtitle = site.heading(chapter)
        file = f'{chapter.module.replace(".", "/")}.py'
        source = f'{self.settings["git_url"]}/blob/{self.settings["branch"]}/{file}'
        contents = [
            f'- {{py:obj}}`{s.name} <{s.full}>`' + (f': {self.sentence(s)}' if s.doc else '')
            for s in chapter.symbols
        ]
        parts = [
            f'# `{chapter.module}`',
            f'> {subtitle}',
            f'Explained in [{title}](/{chapter.page}.md). [Source]({source}).',
            f'```{{py:module}} {chapter.module}\n```',
            '\n'.join(contents),
            '## Names',
            *(self.entry(s) for s in chapter.symbols),
        ]
        example = self.example(chapter)
        return parts + (['## Example', example] if example else [])

    def sentence(self, s):
        return self.site.text(s.doc.splitlines()[0], s.chapter)

    def example(self, chapter):
        "The first shown cell of the chapter that calls one of its names"
        names = {s.name for s in chapter.symbols if s.kind in ('class', 'function')}
        for i, cell in enumerate(chapter.cells):
            if cell.markdown or cell.exported or cell.flags.keys() & {'hide', 'eval'}:
                continue
            if not 0 < len(cell.code.splitlines()) <= EXAMPLE_LINES or cell.code[0] in '%!':
                continue
            if called(cell.code) & names:
                site = self.site
                shown = [site.fence(cell.code), *site.texts(cell)]
                here = f'<p class="where">{self.link(chapter, f"cell-{i}", "From the chapter")}</p>'
                return '\n\n'.join([*shown, here])
        return ''

    def entry(self, s, ticks=7):
        "Signature, sentence, table and errors of one name"
        site = self.site
        sig = ', '.join(n + ('=' + d if d else '') for n, _, d, _ in s.args)
        head = s.name if s.kind in ('property', 'data') else f'{s.name}({sig})'
        option = f':{s.kind}:\n' if s.kind in ('classmethod', 'staticmethod') else ''
        option += f':value: {s.value}\n' if s.value else ''
        fence = '`' * ticks
        body = [site.text(s.doc, s.chapter)]
        if s.bases:
            body.insert(0, 'Bases: ' + ', '.join(site.prose(f'`{b}`', s.chapter) for b in s.bases))
        if s.note:
            body.append(f'*{escape(s.note)}*' if not set('`*') & set(s.note) else s.note)
        body += self.table(s)
        body += self.raises(s)
        if 'exports' in s.chapter.cells[s.cell].flags and '.' not in s.name:
            link = self.link(s.chapter, s.name.lower(), 'Source, in the chapter')
            body.append(f'<p class="where">{link}</p>')
        body += [self.entry(m, ticks - 1) for m in s.members]
        kind = 'method' if s.kind.endswith('method') else s.kind
        text = '\n\n'.join(filter(None, body))
        return f'{fence}{{py:{kind}}} {head}\n{option}\n{text}\n{fence}'

    def table(self, s):
        rows = [(f'`{n}`', t, d, says) for n, t, d, says in s.args if n != '*']
        if s.gives and (s.gives[1] or s.gives[0] != 'None'):
            rows.append(('returns', s.gives[0], '', s.gives[1]))
        if not any(t or says for _, t, _, says in rows):
            return

        def code(text):
            return f'`{text}`'.replace('|', '\\|') if text else ''

        def words(text):
            return self.site.prose(text, s.chapter)

        lines = [
            f'| {n} | {words(code(t))} | {code(d)} | {words(cell_text(says))} |'
            for n, t, d, says in rows
        ]
        yield table('parameters', ('name', 'type', 'default', 'what it is'), lines)

    def raises(self, s):
        "Errors of the function, and of the checks that it calls"
        found = list(s.raises)
        for check in s.checks:
            found += [o for o in self.errors.get(check, []) if o not in found]
        if found:
            lines = [f'| `{error}` | {says(text)} |' for error, text in found]
            yield table('raises', ('raises', 'message'), lines)

    def overview(self):
        "Every module by part, with its subtitle"
        parts = [
            '# Reference',
            'One page for each module and each command. '
            '<a href="genindex.html">Every name by letter</a>.',
            '## Commands',
            '\n'.join(f'- [`{name}`](/reference/{name}.md)' for name in COMMANDS),
        ]
        for package, chapters in self.packages.items():
            name = package if package == 'eva' else f'eva.{package}'
            parts += [f'## `{name}`', self.modules(chapters)]
        return parts

    # commands

    def command_page(self, name):
        module, function = COMMANDS[name]
        sys.path.insert(0, str(self.site.root))
        try:
            parser = getattr(import_module(module), function)()
        finally:
            sys.path.pop(0)
        parser.prog = name
        usage = parser.format_usage().replace('usage: ', '')
        parts = [
            f'# `{name}`',
            parser.description or '',
            self.site.fence(usage.rstrip(), 'text'),
            f'`python -m eva {name.removeprefix("eva_")}` is the same command.',
        ]
        for group in parser._action_groups:
            rows = [row for action in group._group_actions if (row := option_row(action))]
            if rows:
                parts.append(f'## {str(group.title).capitalize()}')
                if group.description:
                    parts.append(self.site.fence(str(group.description), 'text'))
                parts.append(table('options', ('option', 'values', 'what it does'), rows))
        return parts


def called(code):
    "Names that code calls"
    try:
        tree = ast.parse(code)
    except SyntaxError:
        return set()
    calls = (o.func for o in ast.walk(tree) if isinstance(o, ast.Call))
    return {o.id if isinstance(o, ast.Name) else getattr(o, 'attr', '') for o in calls}


def says(text):
    "The message of an error inside a table"
    text = ' '.join(text.split())
    return f'`` {text} ``'.replace('|', '\\|') if text else ''


def table(kind, head, lines):
    rule = '|' + '---|' * len(head)
    rows = '\n'.join(lines)
    return f'```{{table}}\n:class: {kind}\n\n| {" | ".join(head)} |\n{rule}\n{rows}\n```'


def option_row(action):
    "One option of a command: how it is written, its values, its help"
    if action.help == argparse.SUPPRESS:
        return ''
    names = (
        ', '.join(f'`{o}`' for o in action.option_strings) or f'`{action.metavar or action.dest}`'
    )
    if action.choices:
        values = ', '.join(f'`{o}`' for o in action.choices)
    elif action.nargs == 0:
        values = ''
    else:
        shown = action.metavar or action.dest.upper()
        values = f'`{shown if isinstance(shown, str) else " ".join(shown)}`'
    text = (action.help or '') % dict(vars(action), prog='')
    said = re.sub(r'(?<![\w`-])--\w+|\{"[^}]*\}', r'`\g<0>`', cell_text(text))
    return f'| {names} | {values} | {said} |'
