"Every chapter has an opening, exercises with checkers that bite, an ending, and sound links"

import ast
import json
import re
import shlex
import subprocess
import sys
from configparser import ConfigParser
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from eva.cli.bench import bench_parser
from eva.cli.convert import convert_parser
from eva.cli.generate import generate_parser
from eva.cli.plan import plan_parser
from eva.cli.serve import serve_parser
from eva.cli.train_arguments import train_parser

nbs = Path(__file__).parents[1] / 'nbs'
chapters = sorted(p for p in nbs.rglob('[0-9]*.ipynb') if '.ipynb_checkpoints' not in p.parts)


def name_of(path):
    "A notebook as a reader finds it: its folder in nbs and its name"
    return path.relative_to(nbs).as_posix()


def cells(path, kind=None):
    found = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [''.join(c['source']) for c in found if kind in (None, c['cell_type'])]


@pytest.mark.parametrize('path', chapters, ids=name_of)
def test_opening(path):
    title, callout, fetch = cells(path)[:3]
    assert re.fullmatch(r'# [^\n]+\n\n> [^\n]+[^.\n]', title.strip()), title
    assert '**You will be able to**' in callout and '**Time**' in callout and 'CPU' in callout
    up = '../' * len(path.relative_to(nbs).parts[:-1])
    hosted = 'https://colab.research.google.com/github/eva-project/eva/blob/main/nbs'
    assert f']({up}hosted.svg)]({hosted}/{name_of(path)})' in callout
    assert (
        fetch.startswith('#| eval: false')
        and "find_spec('eva')" in fetch
        and "'./eva[course]'" in fetch
    )


@pytest.mark.parametrize('path', chapters, ids=name_of)
def test_exercises(path):
    text = '\n'.join(cells(path, 'markdown'))
    code = '\n'.join(cells(path, 'code'))
    asked = re.search(r'^## Exercises\n(.*?)(?=^## |\Z)', text, flags=re.M | re.S)
    assert asked, 'no exercises'
    number = len(re.findall(r'^\d+\. ', asked[1], flags=re.M))
    assert 2 <= number <= 6, number
    checkers = set(re.findall(r'^def (check_\w+)', code, flags=re.M))
    solved = '\n'.join(c for c in cells(path, 'code') if 'code-fold: true' in c and 'Solution' in c)
    for c in checkers:
        assert c in solved or not re.search(rf'`{c}`', asked[1]), f'{c} has no solution'
    assert len(re.findall(r'test_fail\(', code)) >= number, 'checkers that accept anything?'


@pytest.mark.parametrize('path', chapters, ids=name_of)
def test_ending(path):
    text = cells(path, 'markdown')
    assert any('## What we tested' in c for c in text)
    assert any(re.search(r'^Next: ', c, flags=re.M) for c in text[-2:]) or path == chapters[-1]
    assert len(cells(path)) <= 100


def test_links_lead_somewhere():
    links = 0
    for path in nbs.rglob('*.ipynb'):
        text = '\n'.join(cells(path, 'markdown'))
        for to in re.findall(r'\]\(([\w./]+\.(?:ipynb|svg|md|py|ini))(?:#[^)]*)?\)', text):
            assert (path.parent / to).is_file(), (name_of(path), to)
            links += 1
    assert links > 5 * len(chapters), 'does this test still read links?'


def code_of(path: Path) -> str:
    "A chapter's code without the lines that are the shell's or IPython's"
    runs = (c for c in cells(path, 'code') if "find_spec('eva')" not in c)
    return '\n'.join(re.sub(r'^\s*[!%].*$', '', c, flags=re.M) for c in runs)


def imported(code: str) -> set[str]:
    "Names of the packages that code imports"
    names = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split('.')[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and not node.level:
            names.add(node.module.split('.')[0])
    return names


def promised(*lists: str) -> set[str]:
    "Distributions that an installation of the package and of these extras brings"
    parser = ConfigParser(delimiters=['='])
    parser.read(nbs.parent / 'settings.ini', encoding='utf-8')
    open_ = [r for name in lists for r in map(Requirement, shlex.split(parser['DEFAULT'][name]))]
    found = set()
    while open_:
        name = canonicalize_name(open_.pop().name)
        if name in found:
            continue
        found.add(name)
        for r in map(Requirement, distribution(name).requires or ()):
            if r.marker is None or r.marker.evaluate({'extra': ''}):
                open_.append(r)
    return found


# Asked for by name in cells that do without them where they are not installed
OPTIONAL = {'datasets', 'mlflow', 'pyarrow', 'tensorboard', 'wandb', 'zstandard'}


def test_chapters_need_only_the_extra_course():
    "A chapter imports only what `eva-deepseek[course]` installs, and no tool of developers"
    there = promised('requirements', 'course_requirements')
    brought_by = packages_distributions()
    for path in chapters:
        for name in imported(code_of(path)) - sys.stdlib_module_names - OPTIONAL - {'eva'}:
            providers = {canonicalize_name(d) for d in brought_by[name]}
            assert providers & there, (
                f'{path.name} imports {name}, which the extra course does not bring'
            )


def test_exporting_is_no_part_of_a_chapter():
    for path in nbs.rglob('*.ipynb'):
        assert 'nbdev_export' not in '\n'.join(cells(path, 'code')), path.name


# These two describe the repository itself, and say so where it is not around them.
ABOUT_THE_REPOSITORY = {'criteria', 'production', 'testing'}


def test_chapters_run_from_any_folder():
    "No chapter reads a file that only a clone has; what long cells leave is below runs"
    outside = re.compile(
        r'((\.\./)+(?!\.\./|runs/)|(results|docs|nbs|tests|tools)/)\S*\.(json|md|py|ipynb|png|ini)$'
    )
    for path in (*chapters, nbs / 'index.ipynb'):
        code = code_of(path)
        read = [
            node.value
            for node in ast.walk(ast.parse(code))
            if isinstance(node, ast.Constant) and isinstance(node.value, str)
        ]
        in_package = re.findall(r"files\('eva'\) ?/ ?'([^']+)'", code)
        only_there = [s for s in read if outside.match(s) and s not in in_package]
        if path.stem.lstrip('0123456789_') in ABOUT_THE_REPOSITORY:
            assert 'of a clone of the repository' in code
        else:
            assert not only_there, (path.name, only_there)


# The core course: its sections, their minutes and chapters
CORE_COURSE = {
    'Mathematical foundations': (
        30,
        ['01_foundations/01_attention', '01_foundations/02_deepseek_v3'],
    ),
    'Multi-head latent attention': (
        60,
        ['02_attention/01_rope', '02_attention/02_kv_cache', '02_attention/03_mla'],
    ),
    'Mixture of experts': (
        45,
        ['03_moe/01_router', '03_moe/02_experts', '03_moe/03_load_balancing'],
    ),
    'FP8': (30, ['04_fp8/01_formats', '04_fp8/02_linear']),
    'Integration': (
        45,
        [
            '05_model/01_transformer',
            '05_model/02_mtp',
            '07_training/01_first_run',
            '08_generation/01_generate',
        ],
    ),
    'Production': (30, ['09_checkpoints/01_pretrained', '14_findings/01_production']),
}
CORE = [nbs / f'{name}.ipynb' for _, names in CORE_COURSE.values() for name in names]


def marks_of(cell: str) -> set[str]:
    "The directives of a code cell"
    return set(re.findall(r'^\s*#\s*\|\s*([\w-]+)', cell, flags=re.M))


def minutes_of(path: Path) -> float:
    "Reading and running: 200 words or 15 lines of visible code a minute, half a minute a picture"
    found = json.loads(path.read_text(encoding='utf-8'))['cells']
    words = sum(len(text.split()) for text in cells(path, 'markdown'))
    lines = 0
    for cell in cells(path, 'code'):
        if not marks_of(cell) & {'hide', 'export', 'default_exp', 'code-fold'}:
            lines += sum(
                bool(o.strip()) and not o.strip().startswith('#|') for o in cell.split('\n')
            )
    pictures = sum(
        bool({'image/png', 'image/svg+xml'} & set(output.get('data', {})))
        for cell in found
        for output in cell.get('outputs', [])
    )
    return words / 200 + lines / 15 + pictures / 2


@pytest.mark.parametrize('path', chapters, ids=name_of)
def test_stated_minutes_are_true(path):
    stated = int(re.search(r'\*\*Time\*\* (\d+) min', '\n'.join(cells(path, 'markdown')))[1])
    assert abs(stated - minutes_of(path)) <= 0.2 * minutes_of(path) + 1


@pytest.mark.parametrize('section', CORE_COURSE)
def test_the_course_keeps_to_its_minutes(section):
    budget, names = CORE_COURSE[section]
    assert sum(minutes_of(nbs / f'{name}.ipynb') for name in names) <= budget + 0.5


@pytest.mark.parametrize('path', CORE, ids=name_of)
def test_core_chapters_are_short_and_drawn(path):
    "Most cells fit on a screen, a diagram opens the chapter, checks stand folded at the end"
    code = [c for c in cells(path, 'code') if not marks_of(c) & {'hide', 'export', 'code-fold'}]
    sizes = sorted(len([o for o in c.split('\n') if o.strip()]) for c in code)
    assert sizes[int(0.9 * (len(sizes) - 1))] <= 25
    stored = json.loads(path.read_text(encoding='utf-8'))['cells']
    drawings = [
        o for c in stored for o in c.get('outputs', []) if 'image/svg+xml' in o.get('data', {})
    ]
    assert drawings and '## More tests' in '\n'.join(cells(path, 'markdown'))


def test_the_model_of_150_lines():
    "DeepSeek-V3 in 150 lines has no more"
    code = cells(nbs / '01_foundations/02_deepseek_v3.ipynb', 'code')
    parts = [
        c for c in code if re.match(r'(def rotate|def cross_entropy|class \w+\((nn\.|Block))', c)
    ]
    lines = sum(bool(line.strip()) for c in parts for line in c.split('\n'))
    assert len(parts) == 9 and 100 < lines <= 150, (len(parts), lines)


NUMBER = re.compile(r'(?<![\w.^_{/§-])\d[\d,]*(?:\.\d+)?(?!\w)')


def numbers_in_prose(path: Path) -> list[str]:
    "Numbers of the text, without formulas, code, links, lists and headings"
    found = []
    for text in cells(path, 'markdown')[2:]:
        text = re.sub(r'^## Exercises\n.*', '', text, flags=re.M | re.S)
        for pattern in (
            r'```.*?```',
            r'\$\$.*?\$\$',
            r'\$[^$]+\$',
            r'`[^`]*`',
            r'\[[^\]]*\]\([^)]*\)',
            r'https?://\S+',
            r'(?i)(eq\.|equations?|sections?|tables?|figures?|chapters?|§) '
            r'[\d.]+(( and | to |–|, )[\d.]+)*',
        ):
            text = re.sub(pattern, ' ', text, flags=re.S)
        text = re.sub(r'^(\s*\d+\. |#+ .*$)', '', text, flags=re.M)
        found += [m[0].replace(',', '') for m in NUMBER.finditer(text)]
    return found


def numbers_beside(path: Path) -> list[float]:
    "Numbers of the code, of stored outputs and of formulas"
    prose = '\n'.join(cells(path, 'markdown'))
    beside = re.findall(r'\$\$.*?\$\$', prose, flags=re.S)
    beside += re.findall(r'\$[^$]+\$', re.sub(r'\$\$.*?\$\$', '', prose, flags=re.S))
    for cell in json.loads(path.read_text(encoding='utf-8'))['cells']:
        if cell['cell_type'] == 'code':
            beside.append(''.join(cell['source']))
            for output in cell['outputs']:
                beside.append(''.join(output.get('text', [])))
                shown = output.get('data', {})
                beside += [''.join(v) for k, v in shown.items() if k[:4] == 'text']
                # Of a drawing the words count, and not the coordinates.
                beside.append(re.sub(r'<[^>]*>', ' ', ''.join(shown.get('image/svg+xml', ''))))
    text = re.sub(r'(?<=\d)(,|_|\{,\})(?=\d)', '', '\n'.join(beside))
    return [float(o) for o in re.findall(r'\d+(?:\.\d+)?(?:e[-+]?\d+)?', text)]


def published_numbers() -> set[str]:
    "Constants that reports and manuals publish, from the table beside this file"
    table = (Path(__file__).parent / 'published_numbers.tsv').read_text(encoding='utf-8')
    return {line.split('\t')[0] for line in table.splitlines()[1:]}


@pytest.mark.parametrize('path', chapters, ids=name_of)
def test_numbers_in_prose_are_printed_or_published(path):
    "A number of the text is one that the chapter computes or prints, rounded, or a published one"
    beside = numbers_beside(path)
    published = published_numbers()
    for number in set(numbers_in_prose(path)) - published:
        decimals = len(number.partition('.')[2])
        if not decimals and (int(number) <= 12 or re.fullmatch('(19|20)[0-9]{2}', number)):
            continue  # small counts and years
        known = any(abs(o - float(number)) <= 0.5001 * 10**-decimals for o in beside)
        assert known, f'{number}: neither printed by a cell of this chapter nor a published number'


# The opening pages of the parts
parts = sorted({p.parent / 'index.ipynb' for p in chapters})


def links_of(path: Path) -> list[str]:
    "Notebooks that a page links to, as paths inside of nbs"
    text = '\n'.join(cells(path, 'markdown'))
    found = re.findall(r'\]\(([\w./]+\.ipynb)(?:#[^)]*)?\)', text)
    return [(path.parent / to).resolve().relative_to(nbs.resolve()).as_posix() for to in found]


def test_every_part_has_an_opening_page_and_no_other_page():
    assert [p for p in parts if not p.is_file()] == [] and len(parts) == 16
    there = {p for p in nbs.rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts}
    modules = {nbs / 'main.ipynb', nbs / '15_cli/main.ipynb'}
    guides = set((nbs / 'guides').glob('*.ipynb'))
    assert there == {*chapters, *parts, *guides, nbs / 'index.ipynb', *modules}


def test_the_readme_is_short_and_leads_everywhere():
    "At most 120 lines; the course, the guides, the handbook and the glossary are one click away"
    text = (nbs.parent / 'README.md').read_text(encoding='utf-8')
    assert len(text.splitlines()) <= 120
    for page in ('course', 'guides', 'handbook', 'decisions'):
        assert f'](docs/{page}.md)' in text
    sample = re.search(r'```text\n(.*?)```', text, flags=re.S)[1]
    run = json.loads((nbs / '15_cli/09_train.ipynb').read_text(encoding='utf-8'))['cells']
    printed = ''.join(''.join(o.get('text', [])) for c in run for o in c.get('outputs', []))
    assert sample.strip() in printed, 'a sample that no run wrote'


def listed(page):
    "Notebooks that a page of docs/ links, in order"
    text = (nbs.parent / 'docs' / page).read_text(encoding='utf-8')
    return re.findall(r'\]\(\.\./nbs/([\w/]+\.ipynb)\)', text)


def test_pages_of_docs_list_what_there_is():
    "The course has its sixteen chapters, the handbook every part, the guides every guide"
    core = [name_of(path) for path in CORE]
    assert [o for o in listed('course.md') if o in core] == core
    assert listed('handbook.md') == [name_of(page) for page in parts]
    assert sorted(listed('guides.md')) == sorted(map(name_of, (nbs / 'guides').glob('*.ipynb')))
    for page in (nbs.parent / 'docs').glob('*.md'):
        for to in re.findall(r'\]\(([\w./]+\.(?:ipynb|md))(?:#[^)]*)?\)', page.read_text()):
            assert (page.parent / to).is_file(), (page.name, to)


GUIDES = sorted((nbs / 'guides').glob('*.ipynb'))


@pytest.mark.parametrize('path', GUIDES, ids=name_of)
def test_guides_do_one_task(path):
    "Title, task and needs first; every step was run, and leaves nothing behind"
    title, callout, fetch = cells(path)[:3]
    assert re.fullmatch(r'# [^\n]+\n\n> [^\n]+[^.\n]', title.strip()), title
    assert all(f'**{word}**' in callout for word in ('Task', 'You need', 'Time'))
    assert f'/nbs/{name_of(path)})' in callout and "find_spec('eva')" in fetch
    assert sum(len(c.split()) for c in cells(path, 'markdown')) <= 900
    stored = json.loads(path.read_text(encoding='utf-8'))['cells']
    assert sum(bool(c.get('outputs')) for c in stored) >= 2, 'guides show what their steps print'
    assert 'work.cleanup()' in cells(path)[-1]


def undefined(source):
    "Names that code uses and nothing in it defines, as the linter finds them"
    command = [
        Path(sys.executable).with_name('ruff'),
        'check',
        '--isolated',
        '--select',
        'F821',
        '-',
    ]
    done = subprocess.run(command, input=source, capture_output=True, text=True)
    return re.findall(r'Undefined name `(\w+)`', done.stdout)


@pytest.mark.parametrize('path', GUIDES, ids=name_of)
def test_guides_can_be_copied(path):
    "What a reader sees defines every name that it uses"
    shown = [
        c
        for c in cells(path, 'code')
        if not c.startswith('%%') and not marks_of(c) & {'hide', 'eval'}
    ]
    assert undefined('\n'.join(shown)) == []
    assert undefined('print(nobody)') == ['nobody']


@pytest.mark.parametrize('path', parts, ids=name_of)
def test_opening_page_of_a_part(path):
    "Title, badge and fetch cell as in chapters, three sections, at most 500 words, no exercises"
    title, badge, fetch = cells(path)[:3]
    assert re.fullmatch(r'# [^\n]+\n\n> [^\n]+[^.\n]', title.strip()), title
    hosted = 'https://colab.research.google.com/github/eva-project/eva/blob/main/nbs'
    assert badge == f'[![Open in a hosted notebook](../hosted.svg)]({hosted}/{name_of(path)})'
    of_chapter = next(cells(p)[2] for p in chapters if p.parent == path.parent)
    assert fetch == of_chapter
    text = '\n'.join(cells(path, 'markdown'))
    headings = re.findall(r'^#+ (.*)', text, flags=re.M)[1:]
    assert headings == ['Reading order', 'Tasks', 'The package in use']
    assert 200 <= len(text.split()) <= 500
    assert not any(marks_of(c) & {'export', 'exports', 'default_exp'} for c in cells(path, 'code'))


@pytest.mark.parametrize('path', parts, ids=name_of)
def test_opening_page_names_every_chapter(path):
    "Each chapter is linked under Reading order, in the course's order, beside its module"
    text = '\n'.join(cells(path, 'markdown'))
    section = re.search(r'^## Reading order\n(.*?)^## ', text, flags=re.M | re.S)[1]
    own = [p for p in chapters if p.parent == path.parent]
    linked = re.findall(r'\]\((\d\w+\.ipynb)\)', section)
    assert {p.name for p in own} == set(linked)
    core = [p.name for p in CORE if p.parent == path.parent]
    assert linked[: len(core)] == core
    assert ('**Core course.**' in section) == bool(core)
    for chapter in own:
        exported = re.search(r'^#\| default_exp (\S+)', '\n'.join(cells(chapter, 'code')), re.M)
        if exported:
            module = f'eva.{exported[1]}'.removesuffix('.__init__')
            assert f'`{module}`' in section, f'{chapter.name} exports {module}'
    assert {name_of(p) for p in own} <= set(links_of(path))


PARSERS = dict(
    train=train_parser,
    generate=generate_parser,
    convert=convert_parser,
    bench=bench_parser,
    plan=plan_parser,
    serve=serve_parser,
)
TORCHRUN = {'--standalone', '--nproc-per-node', '--max-restarts', '--no-python'}


def test_modules_and_commands_of_opening_pages_exist():
    "A module that a page names can be imported, and an option that it names is a command's"
    said = '\n'.join('\n'.join(cells(p, 'markdown')) for p in parts)
    named = set(re.findall(r'`(eva(?:\.\w+)+)`', said))
    package = nbs.parent / 'eva'
    for name in named:
        at = package.joinpath(*name.split('.')[1:])
        owner = at.parent / '__init__.py'
        lazy = owner.is_file() and re.search(rf'^    {at.name}=', owner.read_text(), flags=re.M)
        assert at.with_suffix('.py').is_file() or (at / '__init__.py').is_file() or lazy, name
    assert len(named) > 80
    options = {name: set(of()._option_string_actions) for name, of in PARSERS.items()}
    of_any = set.union(*options.values()) | TORCHRUN
    checked = 0
    for span in re.findall(r'`([^`\n]*--[^`\n]*)`', said):
        before, command, after = re.split(r'(eva_\w+|\Z)', span, maxsplit=1)
        allowed = options[command.removeprefix('eva_')] if command else of_any
        assert set(re.findall(r'--[\w-]+', before)) <= of_any, span
        assert set(re.findall(r'--[\w-]+', after)) <= allowed, span
        checked += 1
    assert checked > 30


@pytest.mark.parametrize('path', parts, ids=name_of)
def test_numbers_of_opening_pages_are_printed_or_published(path):
    test_numbers_in_prose_are_printed_or_published(path)


RUN_PAGES = """
import contextlib, io, json, sys
for name, code in json.load(sys.stdin):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(code, {'__name__': '__main__'})
    sys.__stdout__.write(json.dumps([name, shown.getvalue()]) + '\\n')
"""


def stored_text(path: Path) -> str:
    "What the cells of a notebook printed when they were last run"
    found = json.loads(path.read_text(encoding='utf-8'))['cells']
    outputs = [o for c in found for o in c.get('outputs', []) if o.get('name') == 'stdout']
    return ''.join(''.join(o['text']) for o in outputs)


def test_opening_pages_run_in_an_empty_folder(tmp_path):
    "The code of each page runs away from the repository, and prints what the page shows"
    code = [(name_of(p), code_of(p)) for p in parts]
    done = subprocess.run(
        [sys.executable, '-c', RUN_PAGES],
        input=json.dumps(code),
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    printed = dict(map(json.loads, done.stdout.splitlines()))
    assert printed == {name_of(p): stored_text(p) for p in parts}
    assert all(printed.values()) and not any(tmp_path.iterdir())


# The table of symbols
def tokens_of(formula: str) -> list[str]:
    "Letters, commands and words of a formula, without spaces and braces around one token"
    formula = re.sub(r'\\[,;:! ]|\\(Big|big)[lrg]?|~', ' ', formula)
    found = re.findall(r'\\(?:text|operatorname|mathrm)\{[^}]*\}|\\[A-Za-z]+|\S', formula)
    joined = ' '.join(found)
    return re.sub(r'\{ (\S+) \}', r'\1', joined).split()


def occurs(symbol: list[str], formula: list[str]) -> bool:
    "Is the symbol in the formula, as itself and not as an index or with other indices?"
    after = {"'"} if {'_', '^'} & set(symbol) else {"'", '_', '^'}
    padded = ['', *formula, '']
    size = len(symbol)
    return any(
        padded[at : at + size] == symbol
        and padded[at - 1] not in {'_', '^'}
        and padded[at + size] not in after
        for at in range(1, len(formula) - size + 2)
    )


def formulas_of(path: Path) -> list[list[str]]:
    "The formulas of a chapter's text, as tokens"
    text = '\n'.join(cells(path, 'markdown'))
    shown = re.findall(r'\$\$(.*?)\$\$', text, flags=re.S)
    inline = re.findall(r'\$([^$]+)\$', re.sub(r'\$\$.*?\$\$', '', text, flags=re.S))
    return [tokens_of(formula) for formula in shown + inline]


def symbol_rows() -> list[tuple[str, Path]]:
    "Each symbol of the tables, and the chapter that its row names"
    path = nbs / '01_foundations/10_symbols.ipynb'
    found = {}
    for node in ast.parse(code_of(path)).body:
        if isinstance(node, ast.Assign) and isinstance(node.value, (ast.Constant, ast.Dict)):
            found[node.targets[0].id] = ast.literal_eval(node.value)
    tables = [found[name] for name in ('SIZES', 'WEIGHTS', 'VALUES', 'OTHERS')]
    rows = [line.split('|') for line in '\n'.join(tables).splitlines() if '|' in line]
    home = {o: (path.parent / f'{to}.ipynb').resolve() for o, to in found['CHAPTERS'].items()}
    return [
        (symbol, home[row[-1].strip()])
        for row in rows
        for symbol in re.split(r', (?![^{]*\})', row[0].strip().strip('$'))
        if '$' in row[0]
    ]


def test_symbols_are_in_the_chapters_that_their_rows_name():
    rows = symbol_rows()
    formulas = {path: formulas_of(path) for _, path in rows}
    missing = [
        (symbol, path.stem)
        for symbol, path in rows
        if not any(occurs(tokens_of(symbol), formula) for formula in formulas[path])
    ]
    assert not missing and len(rows) > 80, missing
    assert not any(occurs(['d'], tokens_of(formula)) for formula in (r'd_c', r'W^d', r'\text{d}'))
    assert occurs(['d'], tokens_of('2d')) and occurs(
        tokens_of(r'\mathcal C'), tokens_of(r'\mathcal{C}=1')
    )
