"""What each rank of a construction test runs: `torchrun … tests/construct.py OUT CASE…`

A case is JSON. Ranks leave OUT/NAME.json, and OUT/NAME.safetensors with all weights.
"""

import ctypes
import gc
import hashlib
import json
import os
import re
import resource
import sys
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from ranks import high_water, stream

from eva.cli.train_init import start_model
from eva.config import Config
from eva.distributed.checkpoint import save_safetensors
from eva.distributed.construction import local_part
from eva.distributed.expert_parallel import shutdown
from eva.distributed.parallel import Parallel
from eva.model.initialization import Part, init_weights, materialize, meta_model
from eva.training.config import TrainConfig
from eva.training.trainer import Trainer

SEED = 5
SIZES = dict(
    vocab_size=67,
    hidden_size=128,
    num_hidden_layers=8,
    num_attention_heads=4,
    intermediate_size=256,
    moe_intermediate_size=128,
    n_routed_experts=16,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    q_lora_rank=64,
    kv_lora_rank=32,
)
SETTINGS = dict(steps=2, batch_size=8, micro_batch=1, seq_len=16, mtp_batch_ratio=1.0, seed=SEED)


def config(changes):
    return Config.from_preset('mini', **(SIZES | changes))


def measured():
    "Give freed memory back to the system, so that it hides no growth, and return the high water"
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    high_water()
    return high_water()


def wrong_offsets(t):
    "The part of a tensor, as if it were its beginning"
    part = local_part(t)
    return Part(part.values, part.shape, (0,) * len(part.shape))


def built(case, out):
    "Build a model as `eva_train` does it on several ranks, or with a fault"
    cfg = config(case['model'])
    parallel = Parallel(**case['parallel'])
    init = case.get('source')
    about = dict(init=str(out / init), model=cfg.to_dict()) if init else {}
    if case.get('allowance'):  # groups have threads, whose stacks count too: not before
        limited(case['allowance'])
    model = start_model(cfg, about, SEED, parallel=parallel)
    if case.get('fault') == 'whole':
        materialize(model)
        init_weights(model, SEED)
    if case.get('fault') == 'offsets':
        parallel.weights = partial(init_weights, seed=SEED, part_of=wrong_offsets)
    if case.get('fault') == 'seed':  # another on each rank
        seed = SEED + dist.get_rank()
        parallel.weights = partial(init_weights, seed=seed, part_of=local_part)
    parallel.wrap(model, TrainConfig(**SETTINGS))
    return model


def limited(allowance):
    "Allow this process so many bytes of memory beyond what it has"
    status = Path('/proc/self/status').read_text()
    has = int(re.search(r'VmData:\s+(\d+)', status)[1]) * 1024
    resource.setrlimit(resource.RLIMIT_DATA, (has + allowance, resource.RLIM_INFINITY))


def described(model):
    "Each part: where it lies, and a hash of its values"
    found = []
    for name, t in [*model.named_parameters(), *model.named_buffers()]:
        part = local_part(t)
        raw = part.values.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        place = [name, *part.offsets, *part.values.shape]
        found.append([place, hashlib.sha256(raw).hexdigest()])
    return found


def resumed(case, out):
    "Train a step and save; then resume in a new trainer, and measure that"

    def trainer():
        text = stream(out / 'train.npy')
        return Trainer(
            meta_model(config(case['model'])),
            text,
            text,
            TrainConfig(**SETTINGS),
            out / case['name'],
            Parallel(**case['parallel']),
        )

    first = trainer()
    first.train_step()
    first.save()
    before = {n: t.clone() for n, t in first.opt.state_dict().items()}
    del first
    again = trainer()
    start = measured()
    again.resume()
    grew = high_water() - start
    after = again.opt.state_dict()
    same = before.keys() == after.keys() and all(torch.equal(before[n], after[n]) for n in after)
    moments = sum(t.nbytes for n, t in after.items() if not n.startswith('master.'))
    largest = max(t.nbytes for t in after.values())
    return dict(grew=grew, moments=moments, largest=largest, same=same, step=again.step)


def run(out, case):
    about = {}
    if case.get('resume'):
        about = resumed(case, out)
    else:
        before = measured()
        try:
            model = built(case, out)
        except (RuntimeError, MemoryError) as e:
            about['error'] = str(e)
        resource.setrlimit(resource.RLIMIT_DATA, (resource.RLIM_INFINITY,) * 2)
        if 'error' not in about:
            about['grew'] = high_water() - before
            sizes = [4 * local_part(p).values.numel() for p in model.parameters()]
            about |= dict(part=sum(sizes), largest=max(sizes), parts=described(model))
            tensors = dict(model.named_parameters()) | dict(model.named_buffers())
            save_safetensors(
                out / f'{case["name"]}.safetensors', {n: t.detach() for n, t in tensors.items()}
            )
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, about)
    if dist.get_rank() == 0:
        (out / f'{case["name"]}.json').write_text(json.dumps(everyone))


if __name__ == '__main__':
    torch.set_num_threads(1)
    dist.init_process_group('gloo')
    built(dict(parallel={}, model=dict(num_hidden_layers=2)), None)  # what is loaded on the way
    for raw in sys.argv[2:]:
        run(Path(sys.argv[1]), json.loads(raw))
    shutdown()
    os._exit(0)
