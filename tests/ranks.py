"What each rank of a test runs: `torchrun … tests/ranks.py OUT LAYOUT…`, a layout being JSON; rank 0 leaves OUT/NAME.json"
import json, os, sys
from pathlib import Path
import numpy as np
import torch
import torch.distributed as dist
from eva.config import Config
from eva.data import _write
from eva.model import DeepSeekV3
from eva.train import TrainConfig, Trainer

SIZES = dict(vocab_size=67, hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=40, moe_intermediate_size=12, n_routed_experts=8,
             num_experts_per_tok=3, n_group=4, topk_group=2, q_lora_rank=12, kv_lora_rank=8, num_nextn_predict_layers=1)

def stream(path):
    "A row of tokens that is not quite random, the same for every caller"
    if not path.exists():
        rng = np.random.default_rng(0)
        steps = rng.integers(1, 4, 4000)
        tokens = (np.cumsum(steps) % 66 + 1).astype(np.uint16)
        tokens[::37] = 0
        _write(path, tokens, bytes=len(tokens), documents=1, vocab_size=67)
    from eva.data import TokenStream
    return TokenStream(path)

def trainer(out, dtype='float64', steps=20, parallel=None, model=(), **kw):
    cfg = Config.preset('mini', **(SIZES | dict(model)))
    torch.manual_seed(0)
    kw = dict(batch_size=8, micro_batch=2, seq_len=16, mtp_share=.5, eval_every=10, save_every=1000, lr=.01, muon_lr=.01, balance_weight=1e-2, bias_speed=.01) | kw
    return Trainer(DeepSeekV3(cfg).to(getattr(torch, dtype)), stream(out.parent/'train.npy'), stream(out.parent/'held.npy'), TrainConfig(steps=steps, **kw), out, parallel)

def curve(t):
    "Losses, gradient norms, loads and evaluations of a run, from its first step to its last"
    rows, first = [], {}
    step = t.opt.step
    def watched(*args):
        if not first: first.update(gradients(t))
        return step(*args)
    t.opt.step = watched
    t.fit(rows.append)
    return rows, first

def gradients(t):
    "Whole gradients of the first step, by name; ranks put their parts together"
    if hasattr(t.opt, 'reduce'):
        t.opt.reduce()
        t.opt.reduce = lambda: delattr(t.opt, 'reduce')  # once is enough
    return {f'grad.{n}': w.grad.clone() for n, w in t.opt.masters.items()}

if __name__ == '__main__':
    from eva.distributed import Parallel
    from eva.shards import divided_like, write_together
    torch.set_num_threads(1)
    dist.init_process_group('gloo')
    out = Path(sys.argv[1])
    for raw in sys.argv[2:]:
        case = json.loads(raw)
        t = trainer(out/case['name'], parallel=Parallel(**case['parallel']), **case.get('run', {}))
        rows, first = curve(t)
        write_together(out/f'{case["name"]}.safetensors', {n: divided_like(g, t.parallel._like(n)) for n, g in first.items()})
        if dist.get_rank() == 0:
            (out/f'{case["name"]}.json').write_text(json.dumps(rows))
        dist.barrier()
    dist.destroy_process_group()
