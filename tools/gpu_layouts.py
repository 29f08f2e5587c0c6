"""Measure layouts on GPUs, for a file that the chapters show: `python tools/gpu_layouts.py`

Two ranks use NCCL, on one GPU each or, with NCCL 2.30 or newer, on one GPU together: their results
against one process, the peak of memory against the planner's formula, what `eva_train --check`
says, how long training waits for a checkpoint, the loss by length of its slices, and the default
run.
"""

import argparse
import itertools
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch import nn

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'tests')]

import numpy as np  # noqa: E402
from test_cuda_ranks import MODEL, TRAIN, equality, memory  # noqa: E402

from eva.benchmarks.roofline import peak_bytes  # noqa: E402
from eva.benchmarks.timing import interleaved_timing, median  # noqa: E402
from eva.config import Config  # noqa: E402
from eva.data.text import TokenStream, _write  # noqa: E402
from eva.fileio.atomic import atomic_write  # noqa: E402
from eva.kernels.linear_cross_entropy import (  # noqa: E402
    linear_cross_entropy,
    plain_linear_cross_entropy,
)
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
    said = (done.stdout + done.stderr[-2000:]).splitlines()
    return dict(
        code=done.returncode, said=[line for line in said if line and 'NCCL WARN' not in line]
    )


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


def loss_of(length, states, head, targets):
    "Forward and backward pass of the loss with slices of a length; None: by its definition"
    if length is None:
        loss = plain_linear_cross_entropy(states, head.weight, targets)
    else:
        loss = linear_cross_entropy(states, head, targets, chunk=length)
    loss.backward()
    states.grad = head.weight.grad = None


def loss_slices(folder, device='cuda', vocab_size=129280, shapes=((512, 4096), (2048, 8192))):
    "Milliseconds and megabytes of the loss by tokens in a slice; None: its definition"
    rows = []
    for (hidden, tokens), dtype in itertools.product(shapes, (torch.bfloat16, torch.float32)):
        head = nn.Linear(hidden, vocab_size, bias=False, device=device, dtype=dtype)
        states = torch.randn(tokens, hidden, device=device, dtype=dtype, requires_grad=True)
        targets = torch.randint(vocab_size, (tokens,), device=device)
        for length in (None, 128, 512, 1024, 2048, 4096):
            work = partial(loss_of, length, states, head, targets)
            about = dict(vocab_size=vocab_size, hidden_size=hidden, tokens=tokens)
            about |= dict(dtype=str(dtype)[6:], slice=length)
            times = interleaved_timing({'loss': work}, 7, device)['loss']
            rows.append(about | dict(ms=1e3 * median(times), MB=peak_bytes(work, device) / 1e6))
    return rows


def default_run(folder):
    "What `eva_train --device cuda` reports of the default run"
    command = 'import sys; from eva.cli.train import eva_train; sys.exit(eva_train())'
    options = ['--device', 'cuda', '--out', str(folder / 'mini')]
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, '-c', command, *options],
        env=os.environ | dict(PYTHONPATH=f'{ROOT}{os.pathsep}{os.environ.get("PYTHONPATH", "")}'),
        capture_output=True,
        text=True,
    )
    found = re.search(r'Eva, computed in \S+ +([\d.]+)', done.stdout)
    speed = re.search(r'in (\d+) s of training, ([\d,]+) per second', done.stdout)
    if not found or not speed:
        raise RuntimeError(done.stderr[-2000:])
    return dict(
        command='eva_train --device cuda',
        seconds=round(time.perf_counter() - start),
        seconds_of_training=int(speed[1]),
        tokens_per_second=int(speed[2].replace(',', '')),
        bits_per_byte=float(found[1]),
    )


PARTS = dict(
    equality=equality,
    memory=memory,
    check=check,
    saves=saves,
    loss_slices=loss_slices,
    default_run=default_run,
)


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
        nccl='.'.join(map(str, torch.cuda.nccl.version())),
        date=time.strftime('%Y-%m-%d'),
    )
    for name in a.only:
        with tempfile.TemporaryDirectory() as tmp:
            known[name] = PARTS[name](Path(tmp))
        with atomic_write(a.out) as t:
            t.write_text(json.dumps(known, indent=1) + '\n')


if __name__ == '__main__':
    main()
