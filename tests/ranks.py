"""What each rank of a test runs: `torchrun … tests/ranks.py OUT CASE…`, a case being JSON

Ranks leave OUT/NAME.json and OUT/NAME.safetensors.
"""

import json
import os
import re
import sys
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist

from eva.config import Config
from eva.data.text import TokenStream, _write
from eva.distributed.expert_parallel import shutdown
from eva.distributed.mesh import local_gpu
from eva.distributed.private import forget_divisions
from eva.model.transformer import DeepSeekV3
from eva.training.config import TrainConfig
from eva.training.trainer import Trainer

DEVICE = os.environ.get('EVA_TEST_DEVICE', 'cpu')
SIZES = dict(
    vocab_size=67,
    hidden_size=24,
    num_hidden_layers=4,
    num_attention_heads=2,
    intermediate_size=40,
    moe_intermediate_size=12,
    n_routed_experts=8,
    num_experts_per_tok=3,
    n_group=4,
    topk_group=2,
    q_lora_rank=12,
    kv_lora_rank=8,
    num_nextn_predict_layers=1,
)
SETTINGS = dict(
    batch_size=8,
    micro_batch=2,
    seq_len=16,
    mtp_batch_ratio=0.5,
    eval_every=20,
    save_every=1000,
    lr=3e-3,
    muon_lr=3e-3,
    balance_weight=1e-2,
    bias_update_rate=1e-3,
)


def stream(path):
    "A row of tokens that is not quite random, the same for every caller"
    if not path.exists():
        tokens = (np.cumsum(np.random.default_rng(0).integers(1, 4, 4000)) % 66 + 1).astype(
            np.uint16
        )
        tokens[::37] = 0
        _write(path, tokens, bytes=len(tokens), documents=1, vocab_size=67)
    return TokenStream(path)


def spoilt(s, bad=range(140, 144)):
    "A stream of which some windows are far from anything that was learned"
    right = s.batch
    strange = torch.randint(1, 67, (200, 64), generator=torch.Generator().manual_seed(1))
    s.batch = lambda first, count, *args: torch.stack(
        [
            strange[g][: len(w)] if g in bad else w
            for g, w in zip(range(first, first + count), right(first, count, *args))
        ]
    )
    return s


def trainer(
    out, dtype='float64', steps=20, parallel=None, model=None, loss_mask=False, spoil=False, **kw
):
    torch.manual_seed(0)
    net = DeepSeekV3(Config.from_preset('mini', **(SIZES | (model or {}))))
    net.to(DEVICE, getattr(torch, dtype))
    train = stream(out.parent / 'train.npy')
    held = stream(out.parent / 'held.npy')
    if spoil:
        spoilt(train)
    if loss_mask:  # a third of the tokens, as if they were answers
        for s in (train, held):
            s.loss_mask = np.random.default_rng(2).random(len(s)) < 0.3
    return Trainer(net, train, held, TrainConfig(steps=steps, **(SETTINGS | kw)), out, parallel)


def curve(t):
    "The metrics of a run and the gradients of its first step, of what this rank holds"
    rows = []
    first = {}
    step = t.opt.step

    def watched(*args):
        if not first:
            if hasattr(t.opt, 'reduce'):
                t.opt.reduce()
                t.opt.reduce = lambda: delattr(t.opt, 'reduce')  # once is enough
            first.update({f'grad.{n}': w.grad.clone() for n, w in t.opt.masters.items()})
        return step(*args)

    t.opt.step = watched
    t.fit(rows.append)
    return rows, first


def high_water():
    "The most memory this process has held since the last call, in bytes"
    peak = int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1]) * 1024
    Path('/proc/self/clear_refs').write_text('5')
    return peak


def run(out, case):
    from eva.distributed.checkpoint import dtensor_like, save_safetensors
    from eva.distributed.parallel import Parallel

    t = trainer(
        out / case.get('folder', case['name']),
        parallel=Parallel(device=DEVICE, **case['parallel']),
        **case.get('run', {}),
    )
    about = {}
    if case.get('resume'):
        about['said'] = t.resume()
    if case['do'] == 'train':
        about['rows'], first = curve(t)
        save_safetensors(
            out / f'{case["name"]}.safetensors',
            {n: dtensor_like(g, t.parallel._like(n)) for n, g in first.items()},
        )
    if case['do'] == 'stop':  # one rank is asked, all stop
        t.fit(
            lambda row: (
                setattr(t, 'stop', 'SIGTERM') if row['step'] == 3 and dist.get_rank() == 1 else None
            )
        )
        about |= dict(
            step=t.step, why=t.stop, saved=(t.out / 'checkpoints' / 'step-000003').exists()
        )
    if case['do'] == 'save':  # elsewhere, what was just read
        t.out = out / case['name']
        t.save()
    if case['do'] == 'export':
        model = sum(
            p.numel() * 4
            for p in DeepSeekV3(
                Config.from_preset('mini', **(SIZES | case['run']['model']))
            ).parameters()
        )
        high_water()
        before = high_water()
        t.parallel.export(t, out / case['name'])
        about |= dict(model=model, grew=high_water() - before)
    if case['do'] == 'refuse':
        try:
            t.resume()
        except ValueError as e:
            about['said'] = str(e)
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, about)
    if dist.get_rank() == 0:
        (out / f'{case["name"]}.json').write_text(json.dumps(everyone))


def run_cases(run_one):
    """Run the cases of the command line, each with a process group of its own

    A run makes about ten groups, each with threads that wake up again and again.
    """
    torch.set_num_threads(1)
    out, *cases = sys.argv[1:]
    backend = 'gloo'
    if DEVICE == 'cuda':
        torch.cuda.set_device(local_gpu(torch.cuda.device_count()))
        backend = 'cpu:gloo,cuda:nccl'
    store, rank, world = next(dist.rendezvous('env://'))
    for number, raw in enumerate(cases):
        own = dist.PrefixStore(f'case {number}', store)
        dist.init_process_group(backend, store=own, rank=rank, world_size=world)
        run_one(Path(out), json.loads(raw))
        shutdown()
        forget_divisions()
    # a rank has been seen to die after its work was done, while process and interpreter were taken
    # down
    os._exit(0)


if __name__ == '__main__':
    run_cases(run)
