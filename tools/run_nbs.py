"""Run chapters from top to bottom and store their outputs

`python tools/run_nbs.py [NAME…] [--flags 'slow cuda']`
"""

import argparse
import os
import subprocess
import sys
import time

from execnb.nbio import read_nb, write_nb
from execnb.shell import CaptureShell
from nbdev.clean import clean_nb
from nbdev.config import get_config
from nbdev.process import extract_directives


def skipped(cell, off):
    "Is this a cell that keeps the outputs it has?"
    if cell.cell_type != 'code':
        return True
    d = extract_directives(cell, remove=False)
    return d.get('eval:', [''])[0].lower() == 'false' or bool(off & d.keys())


def run(path, off):
    nb = read_nb(path)
    shell = CaptureShell(path)
    os.chdir(path.parent)
    for cell in nb.cells:
        if skipped(cell, off):
            continue
        cell.outputs = shell.run(cell.source, stdout=True, stderr=True)
        if shell.exc:
            sys.exit(
                f'{path.name}: {type(shell.exc).__name__}: '
                f'{shell.exc}\n  in the cell\n{cell.source}'
            )
        cell.outputs = [
            o for o in cell.outputs if o.get('name') != 'stderr'
        ]  # progress bars and warnings name this machine
    clean_nb(nb, clean_ids=get_config().clean_ids)
    write_nb(nb, path)


if __name__ == '__main__':
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('names', nargs='*', help='chapters such as 04_mla; all by default')
    p.add_argument('--flags', default='', help='flagged cells to run as well')
    p.add_argument('--here', action='store_true', help=argparse.SUPPRESS)
    a = p.parse_args()
    cfg = get_config()
    os.environ['IN_TEST'] = '1'
    found = [f for f in sorted(cfg.nbs_path.glob('*.ipynb')) if not a.names or f.stem in a.names]
    if a.here:
        run(found[0], set(cfg.tst_flags.split()) - set(a.flags.split()))
        sys.exit()
    for f in found:  # a fresh process each, as for a reader who opens one chapter
        t = time.time()
        if subprocess.run(
            [sys.executable, __file__, f.stem, '--flags', a.flags, '--here']
        ).returncode:
            sys.exit(1)
        print(f'{f.stem}: {time.time() - t:.0f} s', flush=True)
