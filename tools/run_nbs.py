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
    p.add_argument('names', nargs='*', help='chapters such as 02_attention/03_mla; all by default')
    p.add_argument('--flags', default='', help='flagged cells to run as well')
    p.add_argument('--here', action='store_true', help=argparse.SUPPRESS)
    a = p.parse_args()
    cfg = get_config()
    os.environ['IN_TEST'] = '1'
    notebooks = {
        f.relative_to(cfg.nbs_path).with_suffix('').as_posix(): f
        for f in sorted(cfg.nbs_path.rglob('*.ipynb'))
        if '.ipynb_checkpoints' not in f.parts
    }
    unknown = set(a.names) - notebooks.keys()
    if unknown:
        p.error(
            f'no notebook {", ".join(sorted(unknown))}; give names such as {next(iter(notebooks))}'
        )
    found = {name: f for name, f in notebooks.items() if not a.names or name in a.names}
    if a.here:
        run(next(iter(found.values())), set(cfg.tst_flags.split()) - set(a.flags.split()))
        sys.exit()
    for name in found:  # a fresh process each, as for a reader who opens one chapter
        t = time.time()
        if subprocess.run(
            [sys.executable, __file__, name, '--flags', a.flags, '--here']
        ).returncode:
            sys.exit(1)
        print(f'{name}: {time.time() - t:.0f} s', flush=True)
