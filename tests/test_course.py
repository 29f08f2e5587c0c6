"Every chapter has what a reader is promised: an opening, exercises with checkers that bite, an ending, and links that lead somewhere"
import json, re
from pathlib import Path
import pytest

nbs = Path(__file__).parents[1]/'nbs'
chapters = sorted(nbs.glob('[0-9]*.ipynb'))

def cells(path, kind=None):
    found = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [''.join(c['source']) for c in found if kind in (None, c['cell_type'])]

@pytest.mark.parametrize('path', chapters, ids=lambda p: p.stem)
def test_opening(path):
    title, callout, fetch = cells(path)[:3]
    assert re.fullmatch(r'# [^\n]+\n\n> [^\n]+[^.\n]', title.strip()), title
    assert '**You will be able to**' in callout and '**Time**' in callout and 'CPU' in callout
    assert f'](hosted.svg)](https://colab.research.google.com/github/eva-project/eva/blob/main/nbs/{path.name})' in callout
    assert fetch.startswith('#| eval: false') and "find_spec('eva')" in fetch

@pytest.mark.parametrize('path', chapters, ids=lambda p: p.stem)
def test_exercises(path):
    text = '\n'.join(cells(path, 'markdown'))
    code = '\n'.join(cells(path, 'code'))
    asked = re.search(r'^## Exercises\n(.*?)(?=^## |\Z)', text, flags=re.M | re.S)
    assert asked, 'no exercises'
    number = len(re.findall(r'^\d+\. ', asked[1], flags=re.M))
    assert 2 <= number <= 6, number
    checkers = set(re.findall(r'^def (check_\w+)', code, flags=re.M))
    solved = '\n'.join(c for c in cells(path, 'code') if 'code-fold: true' in c and 'Solution' in c)
    for c in checkers: assert c in solved or not re.search(rf'`{c}`', asked[1]), f'{c} has no solution'
    assert len(re.findall(r'test_fail\(', code)) >= number, 'checkers that accept anything?'

@pytest.mark.parametrize('path', chapters, ids=lambda p: p.stem)
def test_ending(path):
    text = cells(path, 'markdown')
    assert any('## What was proved' in c for c in text)
    assert any(re.search(r'^Next: ', c, flags=re.M) for c in text[-2:]) or path == chapters[-1]
    assert 'nbdev.nbdev_export()' in cells(path)[-1]
    assert len(cells(path)) <= 100

def test_links_lead_somewhere():
    there = {p.name for p in nbs.glob('*.ipynb')}
    for path in nbs.glob('*.ipynb'):
        for to in re.findall(r'\]\((\w+\.ipynb)(?:#[^)]*)?\)', '\n'.join(cells(path, 'markdown'))): assert to in there, (path.name, to)

def test_the_index_lists_every_chapter():
    listed = re.findall(r'^\|[^|]*\| \[[^]]*\]\((\d\w+\.ipynb)\)', '\n'.join(cells(nbs/'index.ipynb', 'markdown')), flags=re.M)
    assert sorted(listed) == [p.name for p in chapters] and len(set(listed)) == len(listed)
