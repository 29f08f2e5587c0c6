"""Training with compiled kernels and with PyTorch's operations is one function

In every type of weights, under autocast and in every recipe of FP8, with recomputation and without.
"""

import contextlib

import pytest
import torch
from sizes import TINY

import eva.kernels.fused_swiglu
import eva.kernels.rms_norm
from eva.config import Config
from eva.distributed.fsdp import blocks_of, checkpoint_activations
from eva.fp8.linear import convert
from eva.fp8.recipes import RECIPES
from eva.kernels.compiled import find_compiler, plain_products
from eva.model.transformer import DeepSeekV3

WEIGHTS = dict(
    float32=torch.float32,
    bfloat16=torch.bfloat16,
    autocast=torch.float32,
    **{f'{recipe}, float32': torch.float32 for recipe in RECIPES},
    **{f'{recipe}, bfloat16': torch.bfloat16 for recipe in RECIPES},
)
# Every expert is chosen: a choice that turns over is no rounding of a number.
SIZES = TINY | dict(num_experts_per_tok=TINY['n_routed_experts'], n_group=1, topk_group=1)

pytestmark = pytest.mark.skipif(find_compiler() is None, reason='needs a C compiler')


@pytest.fixture
def calls(monkeypatch):
    "How often each kernel computes"
    found = dict(run_norm=0, run_gated=0)
    for module, name in (
        (eva.kernels.rms_norm, 'run_norm'),
        (eva.kernels.fused_swiglu, 'run_gated'),
    ):
        real = getattr(module, name)

        def counted(*args, real=real, name=name):
            found[name] += 1
            return real(*args)

        monkeypatch.setattr(module, name, counted)
    monkeypatch.setenv('EVA_COMPILE', '1')
    return found


def make_model(precision):
    "A dense layer, one with experts, and an MTP module, with weights that bfloat16 can hold"
    torch.manual_seed(0)
    model = DeepSeekV3(Config.from_preset('mini', vocab_size=64, initializer_range=0.1, **SIZES))
    model = model.bfloat16().to(WEIGHTS[precision])
    recipe = RECIPES.get(precision.partition(',')[0])
    return convert(model, recipe, 'emulate') if recipe else model


def gradients(model, autocast=False):
    "All gradients of the losses of a step, one after the other, and the losses"
    torch.manual_seed(1)
    with torch.autocast('cpu', torch.bfloat16, enabled=autocast):
        losses = model.losses(torch.randint(2, 64, (2, 14)))
    sum(losses).backward()
    found = [p.grad.double().flatten() for p in model.parameters() if p.grad is not None]
    return torch.cat([*found, torch.stack(losses).detach().double()])


def distance(a, b):
    return ((a - b).norm() / b.norm()).item()


@pytest.mark.parametrize('recompute', [False, True])
@pytest.mark.parametrize('precision', WEIGHTS)
def test_one_function(precision, recompute, calls):
    "As far from float64 as PyTorch's operations are"
    found = {}
    for way in ('kernels', 'operations'):
        model = make_model(precision)
        if recompute:
            checkpoint_activations(blocks_of(model))
        with plain_products() if way == 'operations' else contextlib.nullcontext():
            found[way] = gradients(model, precision == 'autocast')
        if way == 'kernels':
            used = dict(calls)
    exact = gradients(make_model('float32').double())
    assert calls == used and used['run_norm'], calls
    # experts in FP8 have an activation of their own; autocast widens the factor of each row
    assert used['run_gated'] or precision not in ('float32', 'bfloat16'), calls
    off = {way: distance(grads, exact) for way, grads in found.items()}
    if precision == 'float32':
        assert off['kernels'] < 1e-5, off
    else:
        assert off['kernels'] < 1.2 * off['operations'], off
    assert found['kernels'].isfinite().all()
