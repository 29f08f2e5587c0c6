"""Run chapters and tests in a copy of the repository, each in a process forked from this one

`tools/mutants.py` uses it. The parent has imported what a chapter imports, except for Eva: a run
begins after some hundredths of a second. Limits are seconds of the processor.
"""

import contextlib
import importlib
import json
import linecache
import math
import multiprocessing
import os
import re
import resource
import signal
import sys
import time
import types
from pathlib import Path

MARK = re.compile(r'(?m)^# %% (?:\.\./)+(nbs/\S+\.ipynb) #(\w+)$')  # nbdev's, above a cell
FLAGGED = re.compile(r'(?m)^#\| *(slow|cuda|eval: *false)')
EXPORTED = re.compile(r'(?m)^#\| *exports?\b')
MEMORY = 12 * 2**30  # bytes of address space for a process: a mutant may ask for any amount


def run_chapter(path: Path, root: Path, left_out: set[str], heavy: float) -> None:
    "Run a chapter's cells; given a limit, add to `left_out` those that fail or take longer"
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    module = sys.modules['__main__'] = types.ModuleType('__main__')
    exported: dict[str, str] = {}
    if name := re.search(r'#\| default_exp ([\w.]+)', path.read_text(encoding='utf-8')):
        file = root.joinpath('eva', *name[1].split('.')).with_suffix('.py')
        parts = MARK.split(file.read_text(encoding='utf-8'))
        exported = dict(zip(parts[2::3], parts[3::3]))
        module.__package__ = f'eva.{name[1]}'.rpartition('.')[0]
        importlib.import_module(module.__package__)
    os.chdir(path.parent)
    signal.signal(signal.SIGPROF, signal.default_int_handler)
    for cell in cells:
        text = ''.join(cell['source'])
        if cell['cell_type'] != 'code' or cell['id'] in left_out or FLAGGED.search(text):
            continue
        if EXPORTED.search(text):
            text = exported[cell['id']]
        file_name = f'<cell {cell["id"]}>'
        linecache.cache[file_name] = (len(text), None, text.splitlines(True), file_name)
        try:
            signal.setitimer(signal.ITIMER_PROF, heavy)
            exec(compile(text, file_name, 'exec'), module.__dict__)
            signal.setitimer(signal.ITIMER_PROF, 0)
        except (Exception, KeyboardInterrupt) as error:
            # What fails before any cell was left out is an error of the chapter.
            if not heavy or isinstance(error, Exception) and not left_out:
                raise
            left_out.add(cell['id'])


def child(path: Path, root: Path, left_out: set[str], heavy: float, seconds: float) -> None:
    "Run a chapter or a file of tests against the copy; write down what was left out and loaded"
    os.setsid()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(time.process_time() + seconds),) * 2)
    with open(root / 'log.txt', 'w') as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.path.insert(0, str(root))
    os.environ.update(PYTHONPATH=str(root), PYTHONDONTWRITEBYTECODE='1', IN_TEST='1')
    sys.dont_write_bytecode = True
    if path.suffix == '.ipynb':
        run_chapter(path, root, left_out, heavy)
        report = dict(left_out=sorted(left_out), loaded=sorted(sys.modules))
        (root / 'report.json').write_text(json.dumps(report))
        os._exit(0)
    os.chdir(root)
    options = ('-x', '-q', '-p', 'no:cacheprovider', '-p', 'no:xdist')
    os._exit(importlib.import_module('pytest').main([*options, str(path)]))


class Runner:
    "Runs chapters and tests in a copy of the repository"

    def __init__(self, root: Path, heavy: float):
        self.root = root
        self.heavy = heavy  # processor seconds of the longest cell that is run
        self.cells: dict[Path, set[str] | None] = {}  # what is left out; None: fails or is slow

    def run(self, path: Path, seconds: float, heavy: float = 0) -> bool | None:
        "Does it pass? None: it took too long"
        (self.root / 'report.json').unlink(missing_ok=True)
        arguments = (path, self.root, self.cells.get(path) or set(), heavy, seconds)
        process = multiprocessing.get_context('fork').Process(target=child, args=arguments)
        process.start()
        process.join(20 * seconds)
        late = process.is_alive() or process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
        process.kill()
        process.join()
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # type: ignore[arg-type]
        return None if late else process.exitcode == 0

    def prepare(self, path: Path, seconds: float) -> bool:
        "Find the cells to leave out, load what the chapter loads, and see whether it passes"
        if path in self.cells:
            return self.cells[path] is not None
        self.cells[path] = set()
        if path.suffix != '.ipynb':
            if not self.run(path, seconds):
                self.cells[path] = None
            return self.prepare(path, seconds)
        # The first run leaves out long cells, the others what fails without these, up to a run
        # in which nothing else fails.
        for limit in (self.heavy, *[seconds] * 6):
            if not self.run(path, 5 * seconds, limit):
                break
            report = json.loads((self.root / 'report.json').read_text())
            if set(report['left_out']) == self.cells[path]:
                return True
            self.cells[path] = set(report['left_out'])
            for name in set(report['loaded']) - set(sys.modules):
                if name.split('.')[0] != 'eva':
                    with contextlib.suppress(Exception):
                        importlib.import_module(name)
        self.cells[path] = None
        return False
