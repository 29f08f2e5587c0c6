"""Activations that are stored in formats of their own: each field alone and both, on every recipe

The forward pass is that of the recipe without them, only the gradients that read a stored tensor
change, and recomputation, compilation and hooks give the same gradients.
"""

import copy

import pytest
import torch
from sizes import TINY
from torch.testing import assert_close

from eva.config import Config
from eva.distributed.fsdp import blocks_of, checkpoint_activations
from eva.fp8.linear import convert
from eva.fp8.recipes import RECIPES
from eva.model.transformer import DeepSeekV3
from eva.training.config import TrainConfig

FIELDS = dict(
    attention=dict(attention_output='e5m6'),
    swiglu=dict(swiglu_inputs='e4m3'),
    both=dict(attention_output='e5m6', swiglu_inputs='e4m3'),
    others=dict(attention_output='e5m2', swiglu_inputs='e5m6'),
)
BASES = ['block', 'block_pow2', 'tensor', 'delayed', 'mx']
DTYPES = [torch.float32, torch.bfloat16]


def recipe_of(base, fields):
    return RECIPES[base]._replace(**(FIELDS[fields] if fields else {}))


def make_model(recipe, dtype=torch.float32):
    "A dense layer, one with experts, and an MTP module"
    torch.manual_seed(0)
    model = DeepSeekV3(Config.from_preset('mini', vocab_size=64, initializer_range=0.1, **TINY))
    return convert(model.to(dtype), recipe, 'emulate')


def step(model):
    "The losses of a step, MTP included, and all gradients"
    torch.manual_seed(1)
    model.zero_grad()
    losses = model.losses(torch.randint(2, 64, (2, 14)))
    sum(losses).backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return torch.stack(losses).detach(), grads


def different(a, b):
    assert a.keys() == b.keys()
    return {name for name in a if not a[name].equal(b[name])}


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('base', BASES)
def test_what_changes(base, dtype):
    "The input of `o_proj` reaches one gradient; the inputs of SwiGLU those of experts and below"
    plain, wanted = step(make_model(recipe_of(base, None), dtype))
    for fields in FIELDS:
        losses, grads = step(make_model(recipe_of(base, fields), dtype))
        assert losses.equal(plain), fields
        changed = different(grads, wanted)
        after_attention = {name for name in grads if name.endswith('o_proj.weight')}
        down = {name for name in grads if 'experts' in name and 'down_proj' in name}
        assert len(after_attention) == 3 and len(down) == 4
        if fields == 'attention':
            assert changed == after_attention
        else:
            assert changed >= down
        for name in changed:
            off = (grads[name] - wanted[name]).float().norm() / wanted[name].float().norm()
            assert off < 0.3, (fields, name)


@pytest.mark.parametrize('dtype', DTYPES, ids=str)
@pytest.mark.parametrize('fields', FIELDS)
@pytest.mark.parametrize('base', [base for base in BASES if base != 'delayed'])
def test_recomputed(base, fields, dtype):
    "Recomputed in the backward pass, as the trainer does it: the same bits"
    model = make_model(recipe_of(base, fields), dtype)
    losses, grads = step(model)
    again = make_model(recipe_of(base, fields), dtype)
    checkpoint_activations(blocks_of(again))
    losses_again, grads_again = step(again)
    assert losses_again.equal(losses) and not different(grads_again, grads)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('part, fields', [('experts', 'swiglu'), ('attention', 'attention')])
def test_compiled(part, fields):
    "With the same gradients; `tests/test_composition.py` compiles the recipe `deepseek_v3`"
    torch._dynamo.reset()
    block = make_model(recipe_of('block_pow2', fields)).blocks[1]
    layer = block.mlp if part == 'experts' else block.self_attn.o_proj
    width = TINY['hidden_size'] if part == 'experts' else layer.in_features
    torch.manual_seed(2)
    x = torch.randn(2, 7, width)
    found = []
    for run in (copy.deepcopy(layer), torch.compile(copy.deepcopy(layer), backend='aot_eager')):
        leaf = x.clone().requires_grad_()
        out = run(leaf)
        out.square().mean().backward()
        grads = [p.grad for p in run.parameters() if p.grad is not None]
        found.append([out.detach(), leaf.grad, *grads])
    assert len(found[0]) == len(found[1]) > 2
    for eager, compiled in zip(*found):
        assert_close(compiled, eager, rtol=1e-4, atol=1e-6)


def test_hooks_see_and_change_nothing():
    "A monitor on every layer leaves the gradients as they are"
    model = make_model('deepseek_v3')
    losses, grads = step(model)
    watched = make_model('deepseek_v3')
    seen = []
    for name, module in watched.named_modules():
        if name.endswith(('down_proj', 'o_proj')):
            module.register_forward_hook(lambda m, args, out: seen.append(args[0].shape))
    losses_again, grads_again = step(watched)
    assert len(seen) == 6 and losses_again.equal(losses) and not different(grads_again, grads)


def test_earlier_runs_keep_their_recipe():
    "The default is what runs of before had, and the older recipes store nothing of their own"
    assert TrainConfig().recipe == 'block_pow2'
    older = [recipe for name, recipe in RECIPES.items() if name != 'deepseek_v3']
    assert {(r.attention_output, r.swiglu_inputs) for r in older} == {(None, None)}
    both = FIELDS['both']
    assert RECIPES['deepseek_v3'] == RECIPES['block']._replace(**both)
