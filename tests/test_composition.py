"""The model with the rest of PyTorch, each compared with plain eager

Compiled, under autocast, in DistributedDataParallel and Accelerate's loop, with hooks and adapters
on every linear layer, copied and pickled, transformed by torch.func, without memory, and with
activation checkpointing.
"""

import copy
import io
import os
import pickle
import sys
from pathlib import Path

import ddp_loop
import pytest
import torch
from sizes import TINY
from torch import nn
from torch._dynamo.utils import counters
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    apply_activation_checkpointing,
)
from torch.func import functional_call
from torch.testing import assert_close

from eva.attention.kv_cache import LatentCache
from eva.attention.rope import rope_cos_sin
from eva.config import Config
from eva.distributed.expert_parallel import torchrun
from eva.fp8.linear import convert
from eva.fp8.recipes import RECIPES
from eva.model.block import TransformerBlock
from eva.model.transformer import DeepSeekV3

HERE = Path(__file__).parent
CFG = Config.from_preset('mini', vocab_size=64, **TINY)
SEQ = 12
# Sums in another order: 2^-24 and 2^-8 a rounding, and some hundred of them in sequence.
BOUNDS = {
    torch.float32: dict(atol=1e-5, rtol=1e-4),
    torch.bfloat16: dict(atol=0.05, rtol=0.05),
    torch.float64: dict(atol=1e-10, rtol=1e-9),
}
TYPES = [torch.float32, torch.bfloat16]


def make_model(dtype=torch.float32, **changes):
    "In sixteen bits every expert is chosen: a choice that turns over is no rounding of a number"
    torch.manual_seed(0)
    chosen = CFG.n_routed_experts if dtype == torch.bfloat16 else CFG.num_experts_per_tok
    sizes = dict(initializer_range=0.1, num_experts_per_tok=chosen)
    return DeepSeekV3(CFG.replace(**sizes, **changes)).to(dtype)


def make_ids(batch=2):
    torch.manual_seed(1)
    return torch.randint(2, 64, (batch, SEQ))


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def training_step(model, ids):
    "Loss and gradients of a step, MTP included"
    model.zero_grad()
    loss = model(ids, labels=ids, mtp_weight=0.3)
    loss.backward()
    return loss.detach(), gradients(model)


def prefill(model, ids):
    return model(ids, LatentCache(model.cfg, len(ids), SEQ, model.dtype))


def token_by_token(model, ids):
    cache = LatentCache(model.cfg, len(ids), SEQ, model.dtype)
    return torch.cat([model(one, cache) for one in ids.split(1, 1)], 1)


# ---- torch.compile ----


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
@pytest.mark.parametrize('layer', ['dense', 'experts'])
@pytest.mark.parametrize('dtype', TYPES, ids=str)
def test_a_block_is_one_graph(dtype, layer, backend):
    torch._dynamo.reset()
    block = make_model(dtype).blocks[['dense', 'experts'].index(layer)]
    states = torch.randn(2, SEQ, CFG.hidden_size, dtype=dtype, requires_grad=True)
    rope = rope_cos_sin(CFG, torch.arange(SEQ)[None], dtype)
    found = []
    for run in (block, torch.compile(block, fullgraph=True, backend=backend)):
        out = run(states, rope)
        block.zero_grad()
        (grad,) = torch.autograd.grad(out.square().mean(), states, retain_graph=True)
        out.square().mean().backward(inputs=list(block.parameters()))
        found.append((out.detach(), grad, *gradients(block).values()))
    assert len(found[0]) > 8
    assert_close(found[1], found[0], **BOUNDS[dtype])


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('backend', ['aot_eager', pytest.param('inductor', marks=pytest.mark.slow)])
@pytest.mark.parametrize('dtype', TYPES, ids=str)
def test_the_whole_model_compiled(dtype, backend):
    "Logits, loss and gradients, each in one graph"
    torch._dynamo.reset()
    counters.clear()
    model = make_model(dtype)
    ids = make_ids()
    compiled = torch.compile(model, backend=backend)
    assert_close(compiled(ids), model(ids), **BOUNDS[dtype])
    assert counters['stats']['unique_graphs'] == 1
    want, wanted = training_step(model, ids)
    got = compiled(ids, labels=ids, mtp_weight=0.3)
    assert counters['stats']['unique_graphs'] == 2
    assert not counters['graph_break']
    model.zero_grad()
    got.backward()
    assert_close(got.detach(), want, **BOUNDS[dtype])
    assert_close(gradients(model), wanted, **BOUNDS[dtype])


def layer_step(layer, states):
    "Result and gradients of one layer, as a training step sees them"
    layer.zero_grad()
    loss = layer(states).square().mean()
    loss.backward()
    return loss.detach(), gradients(layer)


# One for each kind of state and scale; `tests/test_stored_activations.py` has what V3 adds
COMPILED = ('block_pow2', 'delayed', 'mx')


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('part', ['experts', pytest.param('model', marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    'recipe',
    [r if r in COMPILED else pytest.param(r, marks=pytest.mark.slow) for r in RECIPES],
)
def test_every_recipe_compiled(recipe, part):
    "With breaks where the rows of experts are counted, and with the same loss and gradients"
    torch._dynamo.reset()
    model = convert(make_model(), recipe, 'emulate')
    if part == 'model':
        given, step = make_ids(), training_step
    else:
        model = model.blocks[-1].mlp
        given, step = torch.randn(2, SEQ, CFG.hidden_size), layer_step
    want, wanted = step(copy.deepcopy(model), given)
    got, found = step(torch.compile(model, backend='aot_eager'), given)
    assert_close(got, want, **BOUNDS[torch.float32])
    off = torch.stack([(found[f'_orig_mod.{n}'] - g).norm() for n, g in wanted.items()]).norm()
    assert off < 0.01 * torch.stack([g.norm() for g in wanted.values()]).norm()


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('dtype', TYPES, ids=str)
def test_decoding_is_compiled_once(dtype):
    "One graph for the prompt and one for every later token, whatever the length of the cache"
    torch._dynamo.reset()
    counters.clear()
    model = make_model(dtype).eval()
    ids = make_ids()
    run = torch.compile(model, backend='eager')
    graphs = []
    with torch.no_grad():
        # One slot is left: a full cache has no gaps, and converting it is another graph.
        cache = LatentCache(model.cfg, 2, SEQ + 1, dtype)
        out = [run(ids[:, :4], cache)]
        for one in ids[:, 4:].split(1, 1):
            out.append(run(one, cache))
            graphs.append(counters['stats']['unique_graphs'])
        assert_close(torch.cat(out, 1), model(ids), **BOUNDS[dtype])
    assert graphs == [2] * (SEQ - 4)
    assert not counters['graph_break']


# ---- autocast ----


@pytest.mark.parametrize('mtp_weight', [0.0, 0.3])
def test_autocast_trains(mtp_weight):
    "Losses and gradients in float32, near those of float32 throughout"
    model = make_model()
    ids = make_ids()
    exact = model(ids, labels=ids, mtp_weight=mtp_weight)
    exact.backward()
    wanted = torch.cat([g.flatten() for g in gradients(model).values()])
    model.zero_grad()
    with torch.autocast('cpu', torch.bfloat16):
        loss = model(ids, labels=ids, mtp_weight=mtp_weight)
    loss.backward()
    got = torch.cat([g.flatten() for g in gradients(model).values()])
    assert loss.dtype == got.dtype == torch.float32
    assert_close(loss, exact, atol=0, rtol=2**-6)
    assert (got - wanted).norm() < 0.1 * wanted.norm()


# ---- several processes ----


@pytest.mark.parametrize('by', ['ddp', 'accelerate'])
def test_two_processes_train_as_one(by, tmp_path):
    "Each sees half of a batch; losses and weights are those of one process that sees all"
    env = os.environ | dict(OMP_NUM_THREADS='1', PYTHONPATH=f'{HERE.parent}{os.pathsep}{HERE}')
    torchrun(HERE / 'ddp_loop.py', tmp_path, by, ranks=2, env=env, timeout=300)
    losses, weights = torch.load(tmp_path / 'found.pt')
    want, wanted = ddp_loop.train_alone()
    assert want[0] != want[-1]
    assert_close(losses, want, atol=1e-9, rtol=1e-9)
    assert_close(dict(weights), dict(wanted), atol=1e-7, rtol=1e-7)


# ---- hooks and adapters on every linear layer ----

LINEAR = [n for n, m in make_model().named_modules() if isinstance(m, nn.Linear)]
MAIN = [name for name in LINEAR if f'layers.{CFG.num_hidden_layers}.' not in name]


class Adapter(nn.Module):
    "A frozen layer and a product of two thin matrices beside it, as PEFT's LoRA"

    def __init__(self, base):
        super().__init__()
        self.base = base
        weight = base.weight
        self.down = nn.Parameter(torch.randn(2, weight.shape[1], dtype=weight.dtype))
        self.up = nn.Parameter(torch.randn(weight.shape[0], 2, dtype=weight.dtype) * 0.1)

    def forward(self, x):
        return self.base(x) + x @ self.down.T @ self.up.T


def add_adapter(model, name):
    parent, _, last = name.rpartition('.')
    adapter = Adapter(model.get_submodule(name))
    setattr(model.get_submodule(parent), last, adapter)
    return adapter.base.weight + adapter.up @ adapter.down


def factors(features):
    "Not all the same, which a norm behind the layer would undo"
    return torch.linspace(0.5, 1.5, features, dtype=torch.float64)


def add_hook(model, name):
    layer = model.get_submodule(name)
    scale = factors(layer.out_features)
    layer.register_forward_hook(lambda module, args, out: scale.to(out.device) * out)
    return scale[:, None] * layer.weight


def add_pre_hook(model, name):
    layer = model.get_submodule(name)
    scale = factors(layer.in_features)
    layer.register_forward_pre_hook(lambda module, args: (scale.to(args[0].device) * args[0],))
    return scale * layer.weight


CHANGES = dict(adapter=add_adapter, hook=add_hook, pre_hook=add_pre_hook)


@pytest.mark.parametrize('change', CHANGES)
@pytest.mark.parametrize('name', MAIN)
def test_every_linear_layer_is_called(name, change):
    "In one pass, with a cache, token by token and in the loss: as if its weight were another"
    model = make_model(torch.float64).eval()
    merged = copy.deepcopy(model)
    weight = CHANGES[change](model, name)
    ids = make_ids()
    with torch.no_grad():
        plain = merged(ids)
        merged.get_submodule(name).weight.copy_(weight)
        want = merged(ids)
        assert (want - plain).abs().max() > 1e-6
        for route in (lambda m, ids: m(ids), prefill, token_by_token):
            assert_close(route(model, ids), want, **BOUNDS[torch.float64])
    labels = ids.masked_fill(ids == ids[0, 3], -100)
    for options in ({}, dict(mtp_weight=0.3)):
        loss = model(ids, labels=labels, **options)
        assert_close(loss, merged(ids, labels=labels, **options), **BOUNDS[torch.float64])
    loss.backward()
    if change == 'adapter':
        assert model.get_submodule(name).down.grad.abs().sum() > 0


def test_peft_adapts_every_linear_layer(monkeypatch):
    "PEFT's own LoRA: prefill, decode and generation agree, and merging changes nothing"
    # Of Transformer Engine an empty package may be installed, which fails where PEFT asks for it.
    monkeypatch.setitem(sys.modules, 'transformer_engine', None)
    peft = pytest.importorskip('peft')
    model = make_model(torch.float64).eval()
    ids = make_ids()
    with torch.no_grad():
        plain = model(ids)
    names = sorted({name.rpartition('.')[2] for name in MAIN})
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=names))
    for name, parameter in adapted.named_parameters():
        if 'lora_B' in name:
            nn.init.normal_(parameter, std=0.1)
    inner = adapted.get_base_model()
    with torch.no_grad():
        want = adapted(ids)
        assert (want - plain).abs().max() > 1e-3
        assert_close(prefill(inner, ids), want, **BOUNDS[torch.float64])
        assert_close(token_by_token(inner, ids), want, **BOUNDS[torch.float64])
        written = inner.generate(ids[:, :4], 5, eos_token_id=None)
    loss = adapted(ids, labels=ids)
    loss.backward()
    learned = [n for n, p in adapted.named_parameters() if p.grad is not None]
    assert learned and all('lora' in name for name in learned)
    merged = adapted.merge_and_unload()
    with torch.no_grad():
        assert_close(merged(ids), want, **BOUNDS[torch.float64])
        assert torch.equal(merged.generate(ids[:, :4], 5, eos_token_id=None), written)
    assert_close(merged(ids, labels=ids), loss, **BOUNDS[torch.float64])


# ---- copies ----


def by_torch_save(model):
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES = dict(
    deepcopy=copy.deepcopy,
    pickle=lambda model: pickle.loads(pickle.dumps(model)),
    torch_save=by_torch_save,
)


@pytest.mark.parametrize('recipe', [None, 'block'])
@pytest.mark.parametrize('make', COPIES)
def test_a_copy_is_the_same_and_its_own(make, recipe):
    model = make_model().eval()
    if recipe:
        convert(model, recipe, 'emulate')
    ids = make_ids()
    with torch.no_grad():
        want = model(ids)
        twin = COPIES[make](model)
        assert torch.equal(twin(ids), want)
        assert torch.equal(token_by_token(twin, ids), token_by_token(model, ids))
        for parameter in twin.parameters():
            parameter.zero_()
        assert torch.equal(model(ids), want)


# ---- torch.func ----


@pytest.mark.parametrize('mtp_weight', [0.0, 0.3])
def test_functional_gradients(mtp_weight):
    "Those of `torch.func.grad` and of backward"
    model = make_model()
    ids = make_ids()
    weights = dict(model.named_parameters())
    options = dict(labels=ids, mtp_weight=mtp_weight)
    found, value = torch.func.grad_and_value(
        lambda weights: functional_call(model, weights, (ids,), options)
    )(weights)
    model(ids, **options).backward()
    assert_close(value, model(ids, **options))
    wanted = gradients(model)
    assert len(wanted) > 20
    assert_close({name: found[name] for name in wanted}, wanted, **BOUNDS[torch.float32])


# ---- without memory ----


@pytest.mark.parametrize('dtype', TYPES, ids=str)
@pytest.mark.parametrize('where', ['meta', 'fake'])
def test_shapes_without_numbers(where, dtype):
    "A forward pass, a training step and decoding, as a planner would ask for them"
    old = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device('meta') if where == 'meta' else FakeTensorMode():
            model = DeepSeekV3(CFG)
            ids = torch.zeros(2, SEQ, dtype=torch.long)
            assert model(ids).shape == (2, SEQ, 64)
            loss = model(ids, labels=ids, mtp_weight=0.3)
            loss.backward()
            assert loss.shape == () and all(p.grad is not None for p in model.parameters())
            with torch.no_grad():
                cache = LatentCache(CFG, 2, SEQ, dtype)
                model(ids[:, :-1], cache)
                assert model(ids[:, -1:], cache).shape == (2, 1, 64)
    finally:
        torch.set_default_dtype(old)


def test_built_without_memory_and_filled_later():
    with torch.device('meta'):
        model = DeepSeekV3(CFG.replace(initializer_range=0.1))
    given = make_model()
    model.load_state_dict(given.state_dict(), assign=True)
    assert torch.equal(model(make_ids()), given(make_ids()))


# ---- activation checkpointing ----


@pytest.mark.parametrize('dtype', TYPES, ids=str)
def test_checkpointed_blocks_have_the_same_gradients(dtype):
    model = make_model(dtype)
    ids = make_ids()
    want, wanted = training_step(model, ids)
    twin = copy.deepcopy(model)
    apply_activation_checkpointing(twin, check_fn=lambda m: isinstance(m, TransformerBlock))
    twin.zero_grad()
    loss = twin(ids, labels=ids)
    assert 'Checkpoint' in type(twin.blocks[0]).__name__
    loss.backward()
    plain = copy.deepcopy(model)
    plain.zero_grad()
    plain(ids, labels=ids).backward()
    got = {n.replace('_checkpoint_wrapped_module.', ''): g for n, g in gradients(twin).items()}
    assert_close(got, gradients(plain), atol=0, rtol=0)


# ---- labels ----


@pytest.mark.parametrize('masked', [False, True])
def test_the_loss_is_that_of_transformers(masked):
    from transformers import DeepseekV3Config, DeepseekV3ForCausalLM

    model = make_model(num_nextn_predict_layers=0)
    about = {k: v for k, v in model.cfg.to_dict().items() if k != 'architectures'}
    peer = DeepseekV3ForCausalLM(DeepseekV3Config(**about, num_mtp_layers=0))
    peer.load_state_dict(model.state_dict())
    ids = make_ids()
    labels = ids.masked_fill(torch.rand(ids.shape) < 0.4, -100) if masked else ids
    ours = model(ids, labels=labels)
    ours.backward()
    theirs = peer(ids, labels=labels).loss
    theirs.backward()
    assert_close(ours, theirs)
    for name, parameter in peer.named_parameters():
        own = dict(model.named_parameters())[name].grad
        assert_close(own, parameter.grad, **BOUNDS[torch.float32])


def test_the_loss_joins_those_of_every_depth():
    "Where all positions of the window are used by each, it is the sum that training weighs"
    model = make_model(torch.float64)
    ids = make_ids()
    main, ahead = model.losses(ids)
    joined = model(ids, labels=ids, mtp_weight=0.3) - model(ids, labels=ids)
    assert_close(joined, 0.3 * ahead)
    assert_close(model(ids[:, :-1], labels=ids[:, :-1]), main)


@pytest.mark.parametrize('mtp_weight', [0.0, 0.3])
@pytest.mark.parametrize('marks', ['document_ids', 'prefix_mask', 'document_ids_and_prefix_mask'])
def test_a_padded_row_has_the_loss_of_the_row_alone(marks, mtp_weight):
    "Whatever else is marked; what stands in the padding changes nothing"
    model = make_model(torch.float64)
    ids = make_ids()[:1]
    given = {}
    if 'document_ids' in marks:
        given['document_ids'] = (torch.arange(SEQ) > 6).long()[None]
    if 'prefix_mask' in marks:
        given['prefix_mask'] = torch.arange(SEQ)[None] < 4
    labels = ids.clone()
    labels[:, 0] = -100  # nothing real stands before it
    want = model(ids, labels=labels, mtp_weight=mtp_weight, **given)
    for filler in (5, 60):
        padded = nn.functional.pad(ids, (3, 0), value=filler)
        got = model(
            padded,
            attention_mask=(torch.arange(SEQ + 3) > 2).long()[None],
            labels=nn.functional.pad(labels, (3, 0), value=-100),
            mtp_weight=mtp_weight,
            **{name: nn.functional.pad(mark, (3, 0)) for name, mark in given.items()},
        )
        assert_close(got, want, **BOUNDS[torch.float64])


def test_documents_in_a_row_have_the_losses_of_training():
    model = make_model(torch.float64)
    ids = make_ids()
    document_ids = torch.tensor([[0] * 5 + [1] * 7, [2] * 8 + [3] * 4])
    _, ahead = model.losses(ids, document_ids=document_ids, mask_documents=True)
    given = dict(labels=ids, document_ids=document_ids)
    joined = model(ids, mtp_weight=0.3, **given) - model(ids, **given)
    assert_close(joined, 0.3 * ahead)
    assert (ahead - model.losses(ids)[1]).abs() > 1e-6


@pytest.mark.parametrize(
    'make, said',
    [
        (lambda ids: dict(labels=ids[:, 1:]), 'must be int64 and as large as input_ids'),
        (lambda ids: dict(labels=ids.float()), 'must be int64'),
        (lambda ids: dict(input_ids=ids[:0], labels=ids[:0]), 'at least one row of two tokens'),
        (lambda ids: dict(input_ids=ids[:, :1], labels=ids[:, :1]), 'row of two tokens'),
        (lambda ids: dict(labels=ids, mtp_weight=0.3, plain=True), 'has no MTP module'),
        (lambda ids: dict(labels=ids, mtp_weight=0.3, cached=True), 'leave the cache out'),
        (lambda ids: dict(labels=ids.clamp(max=63) + 60), 'must lie in 0..63'),
    ],
)
def test_labels_that_cannot_be_meant(make, said):
    ids = make_ids()
    given = dict(input_ids=ids) | make(ids)
    model = make_model(num_nextn_predict_layers=0) if given.pop('plain', False) else make_model()
    if given.pop('cached', False):
        given['cache'] = LatentCache(CFG, 2, SEQ, torch.float32)
    with pytest.raises(ValueError, match=said):
        model(**given)
