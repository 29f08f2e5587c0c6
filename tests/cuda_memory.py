"What each rank of tests/test_cuda_ranks.py runs to measure memory: `cuda_memory.py FOLDER CASES`"

import gc
import json
import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from eva.config import Config
from eva.data.text import TokenStream, _write
from eva.distributed.expert_parallel import shutdown
from eva.distributed.mesh import connect
from eva.distributed.parallel import Parallel
from eva.model.transformer import DeepSeekV3
from eva.training.config import TrainConfig
from eva.training.trainer import Trainer


def peak_bytes(folder, case):
    "Most bytes of tensors during the second step, beyond what there was before the model"
    cfg = Config.from_preset('mini', **case['model'])
    tokens = np.random.default_rng(0).integers(2, cfg.vocab_size, 40000).astype(np.uint16)
    folder = folder / f'{dist.get_rank()}'
    folder.mkdir(exist_ok=True)
    path = folder / 'tokens.npy'
    _write(path, tokens, bytes=len(tokens), documents=1, vocab_size=cfg.vocab_size)
    stream = TokenStream(path)
    settings = TrainConfig(steps=10, eval_every=100, save_every=100, **case['train'])
    before = torch.cuda.memory_allocated()
    parallel = None
    if dist.get_world_size() > 1:
        parallel = Parallel(device='cuda', **case['parallel'])
    model = DeepSeekV3(cfg).cuda()
    t = Trainer(model, stream, stream, settings, folder / 'run', parallel)
    t.train_step()
    torch.cuda.reset_peak_memory_stats()
    t.train_step()
    if getattr(t.parallel, 'stragglers', None) is not None:
        t.parallel.stragglers.stop()
    return torch.cuda.max_memory_allocated() - before


def warm_up():
    "Products of each kind, so that workspaces of libraries exist before anything is measured"
    for dtype in (torch.float32, torch.bfloat16):
        a = torch.ones(512, 512, device='cuda', dtype=dtype)
        (a @ a).sum().item()
        torch.addmm(a, a, a).sum().item()


def main():
    folder, cases = Path(sys.argv[1]), json.loads(sys.argv[2])
    os.environ.setdefault('TOKENIZERS_PARALLELISM', 'false')
    connect('cuda')
    warm_up()
    table = []
    for case in cases:
        mine = peak_bytes(folder, case)
        gc.collect()  # a trainer refers to itself
        every = [None] * dist.get_world_size()
        dist.all_gather_object(every, mine)
        table.append(every)
    if dist.get_rank() == 0:
        print(json.dumps(table))
    shutdown()
    os._exit(0)


if __name__ == '__main__':
    main()
