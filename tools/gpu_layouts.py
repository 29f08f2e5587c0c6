"""Measure layouts on GPUs, for a file that the chapters show: `python tools/gpu_layouts.py`

Two ranks use NCCL, on one GPU each or, with NCCL 2.30 or newer, on one GPU together: their results
against one process, the peak of memory against the planner's formula, what `eva_train --check`
says, and how long training waits for a checkpoint.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import numpy as np  # noqa: E402
from test_cuda_ranks import MODEL, TRAIN, equality, memory  # noqa: E402

from eva.config import Config  # noqa: E402
from eva.data.text import TokenStream, _write  # noqa: E402
from eva.fileio.atomic import atomic_write  # noqa: E402
from eva.model.transformer import DeepSeekV3  # noqa: E402
from eva.training.config import TrainConfig  # noqa: E402
from eva.training.trainer import Trainer  # noqa: E402


def check(folder):
    "Lines that `eva_train --check` prints for two ranks"
    command = 'import sys; from eva.cli.train import eva_train; sys.exit(eva_train())'
    script = folder / 'check.py'
    script.write_text(command)
    done = subprocess.run(
        [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
        + [str(script), '--check', '--device', 'cuda', '--out', str(folder / 'run')],
        env=os.environ | dict(PYTHONPATH=f'{ROOT}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'),
        capture_output=True,
        text=True,
        timeout=200,
    )
    return dict(code=done.returncode, said=(done.stdout + done.stderr[-2000:]).splitlines())


def saves(folder, times=5):
    "Seconds that training waits for a checkpoint, beside the writing and in it, and bytes"
    cfg = Config.from_preset('mini', **MODEL)
    tokens = np.random.default_rng(0).integers(2, cfg.vocab_size, 40000).astype(np.uint16)
    path = folder / 'saves.npy'
    _write(path, tokens, bytes=len(tokens), documents=1, vocab_size=cfg.vocab_size)
    stream = TokenStream(path)
    out: dict = {}
    for name, beside in (('waiting', False), ('beside', True)):
        settings = TrainConfig(steps=20, precision='bf16', async_save=beside, **TRAIN)
        t = Trainer(DeepSeekV3(cfg).cuda(), stream, stream, settings, folder / name)
        pauses = []
        steps = []
        for _ in range(times):
            start = time.perf_counter()
            t.train_step()
            torch.cuda.synchronize()
            steps.append(time.perf_counter() - start)
            start = time.perf_counter()
            t.save()
            torch.cuda.synchronize()
            pauses.append(time.perf_counter() - start)
            t.background.wait()
        out[name] = statistics.median(pauses[1:])
        out['step'] = statistics.median(steps[1:])
        files = (folder / name / 'checkpoints').rglob('*')
        out['bytes'] = max(o.stat().st_size for o in files if o.is_file())
    return out


PARTS = dict(equality=equality, memory=memory, check=check, saves=saves)


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--only', nargs='+', choices=PARTS, default=list(PARTS), help='what to measure')
    p.add_argument(
        '--out',
        type=Path,
        default=ROOT / 'eva' / 'results' / 'gpu_layouts.json',
        help='file to write, or to add to',
    )
    a = p.parse_args(argv)
    if not torch.cuda.is_available():
        sys.exit('PyTorch sees no GPU here; the CPU tests are in tests/test_features_by_layout.py')
    known = json.loads(a.out.read_text()) if a.out.is_file() else {}
    known |= dict(
        machine=torch.cuda.get_device_name(),
        gpus=torch.cuda.device_count(),
        torch=torch.__version__,
        date=time.strftime('%Y-%m-%d'),
    )
    for name in a.only:
        with tempfile.TemporaryDirectory() as tmp:
            known[name] = PARTS[name](Path(tmp))
        with atomic_write(a.out) as t:
            t.write_text(json.dumps(known, indent=1) + '\n')


if __name__ == '__main__':
    main()
