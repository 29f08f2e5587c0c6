"""Measure what sparse attention costs a model that eva_train left

python tools/sparse_attention.py runs/mini eva/results/sparse_attention.json [SEEDS]

For each seed, indexers for an eighth of a window are put into the model and warmed up, the model is
trained on with them, and for comparison without them on the same windows.
"""

import copy
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from eva.checkpoints.pretrained import load_pretrained
from eva.cli.run_folder import streams_of
from eva.fileio.atomic import atomic_write
from eva.training.config import TrainConfig
from eva.training.evaluation import Span, span_loss
from eva.training.sparse import judge_indexers, make_sparse, sparse_config, warm_up
from eva.training.trainer import Trainer

SEQ = 512
TOPK = SEQ // 8
WINDOWS = 48  # held-out windows that are evaluated
STEPS = 30  # of sparse training
WARM_UP = 50  # steps of the warm-up, of 4 windows each
RATES = dict(lr=0.002, muon_lr=0.002)


@torch.no_grad()
def loss_of(model, held):
    "Mean loss of the first held-out windows, nats per token"
    model.eval()
    spans = [Span(i * SEQ, i * SEQ, (i + 1) * SEQ) for i in range(WINDOWS)]
    total = sum(span_loss(model, held, spans[i : i + 8], False) for i in range(0, WINDOWS, 8))
    return total / (WINDOWS * SEQ)


def train_on(model, streams, seed):
    cfg = TrainConfig(steps=STEPS, batch_size=8, seq_len=SEQ, seed=seed + 1, **RATES)
    start = time.time()
    with tempfile.TemporaryDirectory() as folder:
        Trainer(model, *streams, cfg, folder).fit()
    return time.time() - start


def measure(base, streams, seed):
    "Figures of one seed"
    train, held = streams
    rows = [held.tokens[i * SEQ : (i + 1) * SEQ] for i in range(WINDOWS, WINDOWS + 4)]
    windows = torch.from_numpy(np.stack(rows).astype(np.int64))
    torch.manual_seed(seed)
    model = make_sparse(base, sparse_config(base.cfg, TOPK))
    found = dict(seed=seed)
    found['fresh'] = judge_indexers(model, windows, dense=True) | dict(nats=loss_of(model, held))
    start = time.time()
    warm_up(model, train, WARM_UP, 4, SEQ, 0.01, seed)
    found['warm_seconds'] = time.time() - start
    found['warm'] = judge_indexers(model, windows, dense=True) | dict(nats=loss_of(model, held))
    found['sparse_seconds'] = train_on(model, streams, seed)
    found['sparse'] = judge_indexers(model, windows) | dict(nats=loss_of(model, held))
    dense = copy.deepcopy(base)
    found['dense_seconds'] = train_on(dense, streams, seed)
    return found | dict(dense=dict(nats=loss_of(dense, held)))


def main():
    folder, to = Path(sys.argv[1]), Path(sys.argv[2])
    seeds = range(int(sys.argv[3]) if len(sys.argv) > 3 else 3)
    base = load_pretrained(folder).float()
    streams = streams_of(folder)
    result = dict(window=SEQ, topk=TOPK, before=loss_of(base, streams[1]), runs=[])
    for seed in seeds:
        result['runs'].append(measure(base, streams, seed))
        with atomic_write(to) as path:
            path.write_text(json.dumps(result, indent=1) + '\n')


if __name__ == '__main__':
    main()
