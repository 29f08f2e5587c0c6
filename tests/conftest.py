"Tests bear the flags of settings.ini as marks: skipped unless named, `pytest --flags 'slow cuda'`"

from configparser import ConfigParser
from pathlib import Path

import pytest

parser = ConfigParser(delimiters=['='])
parser.read(Path(__file__).parents[1] / 'settings.ini', encoding='utf-8')
# minutes each: one of them must not be what the last process begins when all others are done
LONG = (
    'test_distributed.py',
    'test_composition.py',
    'test_families.py',
    'test_survival.py',
    'test_training.py',
)
FLAGS = set(parser['DEFAULT']['tst_flags'].split())


def pytest_addoption(parser):
    parser.addoption('--flags', default='', help='flagged tests to run as well')


def pytest_configure(config):
    # pytest-xdist would begin with the files of most tests; those of few and long tests go first
    config.option.loadscopereorder = False
    for f in FLAGS:
        config.addinivalue_line('markers', f'{f}: runs only when named in --flags')


def pytest_collection_modifyitems(config, items):
    items.sort(key=lambda item: item.path.name not in LONG)
    off = FLAGS - set(config.getoption('--flags').split())
    for item in items:
        for f in off & {m.name for m in item.iter_markers()}:
            item.add_marker(pytest.mark.skip(reason=f'needs --flags {f}'))
