"Every chapter has an opening, exercises with checkers that bite, an ending, and sound links"

import ast
import json
import re
import shlex
import sys
from configparser import ConfigParser
from importlib.metadata import distribution, packages_distributions
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

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


def test_the_index_lists_every_chapter():
    listed = re.findall(
        r'^\|[^|]*\| \[[^]]*\]\((\d[\w/]+\.ipynb)\)',
        '\n'.join(cells(nbs / 'index.ipynb', 'markdown')),
        flags=re.M,
    )
    assert sorted(listed) == list(map(name_of, chapters)) and len(set(listed)) == len(listed)


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
OPTIONAL = {'datasets', 'pyarrow', 'tensorboard', 'zstandard'}


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
ABOUT_THE_REPOSITORY = {'criteria', 'index', 'production', 'testing'}


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
