"""What composes with PyTorch on a GPU, compared with plain eager there: `pytest --flags cuda`

The CPU's tests of the same stand in test_composition.py.
"""

import copy
import warnings

import pytest
import torch
from test_composition import (
    BOUNDS,
    CFG,
    COPIES,
    MAIN,
    SEQ,
    add_adapter,
    add_hook,
    gradients,
    make_ids,
    make_model,
    prefill,
    token_by_token,
    training_step,
)
from torch._dynamo.utils import counters
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.func import functional_call
from torch.testing import assert_close

from eva.attention.kv_cache import LatentCache
from eva.attention.rope import rope_cos_sin
from eva.model.block import TransformerBlock

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device'),
]
TYPES = [torch.float32, torch.bfloat16]


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('layer', ['dense', 'experts'])
@pytest.mark.parametrize('dtype', TYPES, ids=str)
def test_a_block_is_one_graph(dtype, layer):
    torch._dynamo.reset()
    block = make_model(dtype).blocks[['dense', 'experts'].index(layer)].cuda()
    states = torch.randn(2, SEQ, CFG.hidden_size, dtype=dtype, device='cuda', requires_grad=True)
    rope = rope_cos_sin(CFG, torch.arange(SEQ, device='cuda')[None], dtype)
    found = []
    for run in (block, torch.compile(block, fullgraph=True)):
        out = run(states, rope)
        block.zero_grad()
        out.square().mean().backward()
        found.append((out.detach(), states.grad.clone(), *gradients(block).values()))
        states.grad = None
    assert_close(found[1], found[0], **BOUNDS[dtype])


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('dtype', TYPES, ids=str)
def test_the_whole_model_compiled(dtype):
    model = make_model(dtype).cuda()
    ids = make_ids().cuda()
    torch._dynamo.reset()
    counters.clear()
    want, wanted = training_step(model, ids)
    got = torch.compile(model)(ids, labels=ids, mtp_weight=0.3)
    assert counters['stats']['unique_graphs'] == 1
    assert not counters['graph_break']
    model.zero_grad()
    got.backward()
    assert_close(got.detach(), want, **BOUNDS[dtype])
    assert_close(gradients(model), wanted, **BOUNDS[dtype])


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('dtype', TYPES, ids=str)
def test_decoding_is_compiled_once(dtype):
    torch._dynamo.reset()
    counters.clear()
    model = make_model(dtype).cuda().eval()
    ids = make_ids().cuda()
    run = torch.compile(model)
    graphs = []
    with torch.no_grad():
        cache = LatentCache(model.cfg, 2, SEQ + 1, dtype, 'cuda')
        out = [run(ids[:, :4], cache)]
        # As many positions as a position has numbers (12) would be a graph of its own.
        for one in ids[:, 4:-1].split(1, 1):
            out.append(run(one, cache))
            graphs.append(counters['stats']['unique_graphs'])
        assert_close(torch.cat(out, 1), model(ids)[:, :-1], **BOUNDS[dtype])
    assert graphs == [2] * (SEQ - 5)


def test_autocast_trains():
    model = make_model().cuda()
    ids = make_ids().cuda()
    exact, wanted = training_step(model, ids)
    model.zero_grad()
    with torch.autocast('cuda', torch.bfloat16):
        loss = model(ids, labels=ids, mtp_weight=0.3)
    loss.backward()
    assert_close(loss.detach(), exact, atol=0, rtol=2**-6)
    assert {g.dtype for g in gradients(model).values()} == {torch.float32}


@pytest.mark.parametrize('change', [add_adapter, add_hook])
def test_every_linear_layer_is_called(change):
    ids = make_ids().cuda()
    for name in MAIN:
        model = make_model(torch.float64).eval()
        merged = copy.deepcopy(model).cuda()
        weight = change(model, name)
        model.cuda()
        with torch.no_grad():
            merged.get_submodule(name).weight.copy_(weight)
            want = merged(ids)
            cache = LatentCache(CFG, 2, SEQ, torch.float64, 'cuda')
            assert_close(model(ids, cache), want, **BOUNDS[torch.float64])
            cache = LatentCache(CFG, 2, SEQ, torch.float64, 'cuda')
            parts = torch.cat([model(one, cache) for one in ids.split(1, 1)], 1)
            assert_close(parts, want, **BOUNDS[torch.float64])


@pytest.mark.parametrize('make', COPIES)
def test_a_copy_is_the_same(make):
    model = make_model().cuda().eval()
    ids = make_ids().cuda()
    with torch.no_grad():
        assert torch.equal(COPIES[make](model)(ids), model(ids))


def test_functional_gradients():
    model = make_model().cuda()
    ids = make_ids().cuda()
    weights = dict(model.named_parameters())
    options = dict(labels=ids, mtp_weight=0.3)
    found = torch.func.grad(lambda w: functional_call(model, w, (ids,), options))(weights)
    _, wanted = training_step(model, ids)
    assert_close({n: found[n] for n in wanted}, wanted, **BOUNDS[torch.float32])


def test_checkpointed_blocks_have_the_same_gradients():
    model = make_model().cuda()
    ids = make_ids().cuda()
    _, wanted = training_step(model, ids)
    twin = copy.deepcopy(model)
    apply_activation_checkpointing(twin, check_fn=lambda m: type(m) is TransformerBlock)
    _, got = training_step(twin, ids)
    got = {n.replace('_checkpoint_wrapped_module.', ''): g for n, g in got.items()}
    assert_close(got, wanted, **BOUNDS[torch.float32])


def test_forward_and_decoding_wait_for_nothing():
    "No copy to the processor in a forward pass: a GPU that is asked for a number stands still"
    model = make_model(torch.bfloat16).cuda().eval()
    ids = make_ids().cuda()
    with torch.no_grad(), warnings.catch_warnings(record=True) as found:
        warnings.simplefilter('always')
        cache = LatentCache(CFG, 2, SEQ, torch.bfloat16, 'cuda')
        model(ids[:, :-1], cache)
        torch.cuda.set_sync_debug_mode('warn')
        try:
            model(ids)
            model(ids[:, -1:], cache)
        finally:
            torch.cuda.set_sync_debug_mode('default')
    waits = [str(w.message) for w in found if 'synchroniz' in str(w.message).lower()]
    waits = [said for said in waits if 'prototype feature' not in said]
    assert not waits, waits[:3]


def test_prefill_and_decode_agree():
    model = make_model(torch.float64).cuda().eval()
    ids = make_ids().cuda()
    with torch.no_grad(), torch.device('cuda'):
        assert_close(prefill(model, ids), model(ids), **BOUNDS[torch.float64])
        assert_close(token_by_token(model, ids), model(ids), **BOUNDS[torch.float64])
