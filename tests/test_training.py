"Kinds of model that no preset has, through training, saving and loading"

import copy
import math
import pickle
import platform
import shutil
import subprocess
import sys

import pytest
import torch
from sizes import TINY

from eva.checkpoints.pretrained import load_pretrained, save_pretrained
from eva.config import Config
from eva.data.decode import Document
from eva.data.text import write_tokens
from eva.data.tokenizer import train_tokenizer
from eva.fp8.recipes import RECIPES
from eva.model.transformer import DeepSeekV3
from eva.training.checkpointing import read_metrics
from eva.training.config import TrainConfig
from eva.training.evaluation import bits_per_byte
from eva.training.monitoring import GradientMonitor
from eva.training.state import COUNTERS
from eva.training.trainer import Trainer

KINDS = dict(
    tied=dict(tie_word_embeddings=True),
    all_dense=dict(first_k_dense_replace=2),
    no_mtp=dict(num_nextn_predict_layers=0),
    two_mtp=dict(num_nextn_predict_layers=2),
    no_shared=dict(n_shared_experts=0),
    no_dense=dict(first_k_dense_replace=0),
    plain_query=dict(q_lora_rank=None),
    odd=dict(moe_intermediate_size=7, hidden_size=31),
    v2=dict(
        model_type='deepseek_v2',
        topk_method='group_limited_greedy',
        scoring_func='softmax',
        norm_topk_prob=False,
        n_group=4,
        topk_group=2,
    ),
)


@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp8'])
def test_trains_saves_and_loads(tmp_path, kind, precision):
    text = 'if x == 1: y = 2\nelse: y = 3\n' * 30
    tok = train_tokenizer([text], 270)
    train, held = (
        write_tokens(tmp_path / f'{n}.npy', [Document(n, t)], tok)
        for n, t in [('train', text * 3), ('held', text)]
    )
    cfg = Config.from_preset(
        'mini',
        **(
            dict(
                vocab_size=tok.get_vocab_size(),
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=2,
                intermediate_size=48,
                moe_intermediate_size=16,
            )
            | KINDS[kind]
        ),
    )
    torch.manual_seed(0)
    t = Trainer(
        DeepSeekV3(cfg),
        train,
        held,
        TrainConfig(
            steps=25, batch_size=4, micro_batch=3, seq_len=16, precision=precision, lr=3e-3
        ),
        tmp_path / 'run',
    )
    before = bits_per_byte(t.model, held, 16)
    t.fit()
    rows = read_metrics(tmp_path / 'run' / 'metrics.jsonl')
    assert (
        not any(r.get('skipped') for r in rows) and bits_per_byte(t.model, held, 16) < 0.8 * before
    )
    save_pretrained(t.model, tmp_path / 'saved', tok)
    back = load_pretrained(tmp_path / 'saved')
    ids = torch.randint(cfg.vocab_size, (1, 9))
    with torch.no_grad():
        assert torch.equal(back(ids), t.model(ids))
    if kind == 'tied':
        assert back.lm_head.weight is back.model['embed_tokens'].weight
    again = Trainer(DeepSeekV3(cfg), train, held, t.cfg, tmp_path / 'run')
    again.resume()
    for a, b in zip(again.opt.masters.values(), t.opt.masters.values()):
        assert torch.equal(a, b)


# Going back: a process that takes up one of its own checkpoints is as one that begins there


PRECISIONS = [('fp32', 'block_pow2'), ('bf16', 'block_pow2'), ('fp16', 'block_pow2')]
PRECISIONS += [('fp8', recipe) for recipe in RECIPES]
OPTIMIZERS = [(muon_lr, moments) for muon_lr in (0.02, 0.0) for moments in ('fp32', 'bf16')]
STEPS_SAVED = (0, 2, 4)


@pytest.fixture(scope='module')
def streams(tmp_path_factory):
    root = tmp_path_factory.mktemp('streams')
    text = 'for i in range(10):\n    print(i, i*i)\n' * 40
    tokenizer = train_tokenizer([text], 270)
    train = write_tokens(root / 'train.npy', [Document('train', text * 3)], tokenizer)
    held_out = write_tokens(root / 'held.npy', [Document('held', text[:900])], tokenizer)
    return train, held_out, tokenizer.get_vocab_size()


def tiny_trainer(streams, out, **settings):
    "A trainer of a model of a few thousand weights, watched layer by layer"
    train, held_out, vocab_size = streams
    torch.manual_seed(0)
    model = DeepSeekV3(Config.from_preset('mini', vocab_size=vocab_size, **TINY))
    base = dict(steps=12, batch_size=2, micro_batch=1, seq_len=16, eval_every=3, lr=3e-3)
    trainer = Trainer(model, train, held_out, TrainConfig(**base | settings), out)
    trainer.monitor = GradientMonitor(model, window=6, factor=1.01, quiet=2)
    return trainer


def everything(trainer):
    "All that decides how a run goes on, by name"
    masters = trainer.opt.state_dict()
    tensors = {**masters, **dict(trainer.model.named_buffers()), **trainer.recipe_state()}
    tensors['random'] = torch.get_rng_state()
    rest = dict(
        watch=trainer.guard.state_dict(),
        monitor=trainer.monitor.state_dict(),
        scaler=trainer.scaler and trainer.scaler.state_dict(),
        load=[{n: load.tolist() for n, load in step.items()} for step in trainer.meter.history],
        counters={n: getattr(trainer, n) for n in COUNTERS if n != 'seconds'},
        precision=trainer.precision,
    )
    return {n: t.clone() for n, t in tensors.items()}, rest


def assert_same(a, b):
    "The same names, the same bits, the same figures"
    (tensors, rest), (other_tensors, other_rest) = a, b
    assert tensors.keys() == other_tensors.keys()
    different = [n for n, t in tensors.items() if not t.equal(other_tensors[n])]
    assert not different
    assert rest == other_rest


def trained(trainer, steps):
    "Some steps as `fit` does them, with an evaluation, a loss of nan, and a number drawn"
    trainer.model.train()
    trainer.monitor.attach()
    for _ in range(steps):
        trainer.train_step()
        torch.rand(())
    trainer.quick_eval()
    trainer.monitor.detach()


# Every precision and recipe, every optimizer with the first and the one that remembers most.
SHORT_GRID = [(*p, *OPTIMIZERS[i % 4]) for i, p in enumerate(PRECISIONS)]
SHORT_GRID += [('fp32', 'block_pow2', *o) for o in OPTIMIZERS[1:]]
SHORT_GRID += [('fp8', 'delayed', *OPTIMIZERS[3])]
WHOLE_GRID = [(*p, *o) for p in PRECISIONS for o in OPTIMIZERS]


def go_back(streams, folder, settings, steps_saved, steps_after):
    "Go back to each checkpoint; a fresh trainer that begins there is the same, at once and later"
    here = tiny_trainer(streams, folder, keep_checkpoints=9, **settings)
    saved = {}
    for step in steps_saved:
        trained(here, step - here.step)
        here.save()
        saved[step] = everything(here)
    trained(here, steps_after)
    for step in steps_saved:
        out = folder / f'back-to-{step}'
        name = f'step-{step:06d}'
        shutil.copytree(folder / 'checkpoints' / name, out / 'checkpoints' / name)
        here.out = out
        here.rewinds = 0
        here.rewind()
        fresh = tiny_trainer(streams, out, keep_checkpoints=9, **settings)
        fresh.resume()
        tensors, rest = everything(fresh)
        assert_same(
            (tensors, rest | dict(load=[])), (saved[step][0], saved[step][1] | dict(load=[]))
        )
        # Only the place in the data differs: what was read is not read again.
        fresh.skipped_windows = here.skipped_windows
        fresh.rewound = here.rewound
        assert_same(everything(here), everything(fresh))
        random_state = torch.get_rng_state()
        trained(here, steps_after)
        torch.set_rng_state(random_state)
        trained(fresh, steps_after)
        assert fresh.step == step + steps_after
        assert_same(everything(here), everything(fresh))


def settings_of(precision, recipe, muon_lr, moments):
    return dict(precision=precision, recipe=recipe, muon_lr=muon_lr, optimizer_state_dtype=moments)


@pytest.mark.parametrize('case', SHORT_GRID, ids=str)
def test_going_back_is_beginning_there(streams, tmp_path, case):
    go_back(streams, tmp_path, settings_of(*case), steps_saved=(0, 3), steps_after=2)


@pytest.mark.slow
@pytest.mark.parametrize('case', WHOLE_GRID, ids=str)
def test_going_back_to_more_steps(streams, tmp_path, case):
    go_back(streams, tmp_path, settings_of(*case), steps_saved=(0, 2, 4), steps_after=3)


@pytest.mark.parametrize(
    'precision, recipe', [('fp32', 'block'), ('fp16', 'block'), ('fp8', 'delayed')]
)
def test_fit_goes_back_to_step_0(streams, tmp_path, precision, recipe):
    "The same by the way a user takes: a loss that is no number sends the run back to its beginning"
    settings = dict(
        precision=precision, recipe=recipe, on_spike='rewind', max_skipped_steps=1, steps=7
    )
    here = tiny_trainer(streams, tmp_path / 'here', **settings)
    losses = here.model.losses

    def broken_once(*args, **kwargs):
        broken = here.step == 4 and not here.rewound
        return [loss * (math.nan if broken else 1) for loss in losses(*args, **kwargs)]

    def keep_first(row):
        if row['step'] == 1 and not here.rewound:
            shutil.copytree(tmp_path / 'here' / 'checkpoints', tmp_path / 'there' / 'checkpoints')

    here.model.losses = broken_once
    here.fit(keep_first)
    assert (here.step, here.rewound, here.skipped_windows) == (7, 1, 10)
    there = tiny_trainer(streams, tmp_path / 'there', **settings)
    assert there.resume().endswith('going on from step 0 of 7')
    there.skipped_windows = here.skipped_windows
    there.rewound = here.rewound
    there.fit()
    assert_same(everything(here), everything(there))


@pytest.mark.parametrize('stop', [3, 4])
def test_delayed_scales_survive_a_stop(streams, tmp_path, stop):
    "Stopped, judged in another precision, saved and resumed: the run that was not stopped"
    settings = dict(precision='fp8', recipe='delayed', steps=7)
    whole = tiny_trainer(streams, tmp_path / 'whole', **settings)
    whole.fit()
    cut = tiny_trainer(streams, tmp_path / 'cut', **settings)
    cut.fit(lambda row: setattr(cut, 'stop', 'SIGINT' if row['step'] == stop else None))
    cut.compute_in('fp8')
    cut.quick_eval()
    cut.compute_in('fp32')
    random_state = torch.get_rng_state()
    shutil.copytree(tmp_path / 'cut', tmp_path / 'resumed')
    resumed = tiny_trainer(streams, tmp_path / 'resumed', **settings)
    resumed.resume()
    resumed.fit()
    torch.set_rng_state(random_state)
    cut.fit()  # goes on in the same process, from where it stopped
    for trainer in (resumed, cut):
        tensors, rest = everything(trainer)
        wanted_tensors, wanted = everything(whole)
        assert_same((tensors, rest['monitor']), (wanted_tensors, wanted['monitor']))


def hooks_of(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def test_no_hook_stays_on_a_model(streams, tmp_path):
    "Before, between and after steps, and where a step fails"
    trainer = tiny_trainer(streams, tmp_path / 'run', steps=4)
    trainer.monitor.detach()
    trainer.monitor = None
    tokens = trainer.train.batch(0, 2, 16, 2, 0)
    seen = []

    def look(row=None):
        for copied in (copy.deepcopy(trainer.model), pickle.loads(pickle.dumps(trainer.model))):
            copied.losses(tokens)[0].backward()
            seen.append(hooks_of(copied))
        trainer.model.losses(tokens)[0].backward()
        trainer.model.zero_grad()
        seen.append(
            hooks_of(trainer.model) + len(trainer.meter.routings) + len(trainer.meter.count)
        )

    look()
    trainer.fit(look)
    look()
    trainer.monitor = GradientMonitor(trainer.model)
    trainer.model.losses = lambda *args, **kwargs: 1 / 0
    with pytest.raises(ZeroDivisionError):
        trainer.train_step()
    trainer.cfg.steps = 5
    with pytest.raises(ZeroDivisionError):
        trainer.fit()
    del trainer.model.losses
    trainer.monitor = None
    look()
    assert set(seen) == {0}


MEMORY = """
import resource, torch
from eva.kernels.memory import freed_memory_kept
def resident():
    with open('/proc/self/statm') as f: return int(f.read().split()[1])
def held():
    block = torch.ones(25_000_000)
    del block
    return resident() - start
torch.ones(10) + 1
start = resident()
pages = [held()]
with freed_memory_kept():
    pages.append(held())
pages += [resident() - start, held()]
print(*(p * resource.getpagesize() // 10**6 for p in pages))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='only glibc has these thresholds')
def test_kept_memory_is_a_matter_of_a_block():
    "100 MB that were freed: returned, kept, returned"
    command = [sys.executable, '-c', MEMORY]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    before, inside, left, after = map(int, done.stdout.split())
    assert before < 20 and inside > 80 and left < 20 and after < 20
