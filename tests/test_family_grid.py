"""The settings of all model types on every route

A setting that one route forgets gives another model there, without an error. The routes are those
of `test_grid`; the settings are generated beside them.
"""

from functools import cache, partial

import pytest
import torch
import torch.distributed as dist
from test_grid import FEEDS, LENGTH, SIZES, WAYS, switched
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.testing import assert_close

from eva.attention.kv_cache import LatentCache
from eva.benchmarks.deepseek_code import refuse_unlike
from eva.checkpoints.conversion import convert_checkpoint
from eva.checkpoints.gguf_layout import check_representable
from eva.checkpoints.portable import portable
from eva.checkpoints.pretrained import load_pretrained, save_pretrained
from eva.config import Config
from eva.distributed.expert_parallel import parallelize_experts
from eva.fp8.linear import convert
from eva.generation.engine import Engine
from eva.generation.generate import generate
from eva.generation.scheduling import RequestSettings
from eva.model.transformer import DeepSeekV3
from eva.planner.stages import layer_counts
from eva.trainable import check_packed

YARN = dict(
    type='yarn', factor=4.0, original_max_position_embeddings=4, mscale=1.0, mscale_all_dim=0.7
)
LLAMA3 = dict(
    type='llama3',
    factor=8.0,
    low_freq_factor=1.0,
    high_freq_factor=4.0,
    original_max_position_embeddings=16,
)
TOP2 = dict(topk_method='group_limited_top2', scoring_func='softmax', n_group=2, topk_group=1)
SETTINGS = dict(
    biases=dict(attention_bias=True),
    biases_no_query_latent=dict(attention_bias=True, q_lora_rank=None),
    half_split=dict(rope_interleave=False),
    third_norm=dict(model_type='axk1', post_mlp_layernorm=True),
    top2=TOP2,
    linear=dict(rope_scaling=dict(type='linear', factor=3.0)),
    llama3=dict(rope_scaling=LLAMA3),
    not_truncated=dict(rope_scaling=YARN | dict(truncate=False)),
    attention_factor=dict(rope_scaling=YARN | dict(attention_factor=0.8)),
    query_scale=dict(model_type='mistral4', rope_scaling=YARN | dict(llama_4_scaling_beta=0.5)),
)
SETTINGS['all'] = TOP2 | dict(
    model_type='mistral4',
    attention_bias=True,
    rope_interleave=False,
    post_mlp_layernorm=True,
    rope_scaling=YARN | dict(llama_4_scaling_beta=0.5, truncate=False, attention_factor=0.8),
)
# What changes the function of the same weights; the others change the weights themselves
SAME_WEIGHTS = [
    'half_split', 'linear', 'llama3', 'not_truncated', 'attention_factor', 'query_scale'
]  # fmt: skip


def config_of(name, **changes):
    sizes = SIZES | dict(num_experts_per_tok=2) | SETTINGS[name] | changes
    return Config.from_preset('mini', **sizes)


def model_of(name, **changes):
    "A model in float64 whose biases and norms are random"
    torch.manual_seed(0)
    model = DeepSeekV3(config_of(name, **changes)).double().eval()
    with torch.no_grad():
        for key, p in model.named_parameters():
            if key.endswith('.bias'):
                nn.init.normal_(p, std=0.5)
            elif 'norm' in key:
                nn.init.uniform_(p, 0.5, 1.5)
    return model.requires_grad_(False)


@cache
def setting(name):
    torch.manual_seed(1)
    return model_of(name), torch.randint(2, SIZES['vocab_size'], (2, LENGTH))


MASKS = dict(
    none={},
    document_ids=dict(document_ids=torch.tensor([[0] * 4 + [1] * 5, [3] * 6 + [2] * 3])),
    prefix_mask=dict(prefix_mask=torch.arange(LENGTH).expand(2, -1) < torch.tensor([[3], [4]])),
)


@pytest.mark.parametrize('masks', MASKS)
@pytest.mark.parametrize('name', SETTINGS)
def test_every_route_is_one_function(name, masks):
    model, ids = setting(name)
    torch.set_num_threads(1)
    with torch.inference_mode():
        want = switched(FEEDS['one_pass'], False)(model, ids, MASKS[masks])
        for feed, route in FEEDS.items():
            for way, by in WAYS.items():
                got = by(route)(model, ids, MASKS[masks])
                off = ((got - want).norm() / want.norm()).item()
                assert off < 1e-9, f'{feed}, {way}: off by {off:.1e}'


@pytest.mark.parametrize('name', SAME_WEIGHTS)
def test_a_setting_that_is_forgotten_is_seen(name):
    "The negative control: the same weights without the setting, or with another number"
    model, ids = setting(name)
    without = dict(rope_interleave=True)
    if name in ('not_truncated', 'attention_factor', 'query_scale'):
        without['rope_scaling'] = YARN
    else:
        without['rope_scaling'] = None
    other = DeepSeekV3(model.cfg.replace(**without)).double().eval()
    other.load_state_dict(model.state_dict())
    with torch.no_grad():
        off = ((other(ids) - model(ids)).norm() / model(ids).norm()).item()
    assert off > 1e-4


@pytest.mark.parametrize('name', ['biases', 'third_norm'])
def test_weights_that_are_forgotten_are_seen(name):
    model, ids = setting(name)
    plain = dict(attention_bias=False, post_mlp_layernorm=False, model_type='deepseek_v3')
    other = DeepSeekV3(model.cfg.replace(**plain)).double().eval()
    left = other.load_state_dict(model.state_dict(), strict=False)
    assert left.unexpected_keys and not left.missing_keys
    with torch.no_grad():
        assert (other(ids) - model(ids)).abs().max() > 1e-2


@pytest.mark.parametrize('name', SETTINGS)
def test_packed_documents_are_read_as_alone(name):
    "Positions begin anew in each document, and so does what depends on them"
    model, ids = setting(name)
    documents = torch.tensor([[0] * 2 + [1] * 7, [0] * 2 + [1] * 7])
    with torch.no_grad():
        packed = model(ids, document_ids=documents)
        assert_close(packed[:, 2:], model(ids[:, 2:]), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize('name', SETTINGS)
def test_drafts_and_the_engine_write_what_one_by_one_decoding_writes(name):
    model, ids = setting(name)
    new = 12
    alone = generate(model, ids[:, :5], new, eos_token_id=None, speculate=0)
    assert generate(model, ids[:, :5], new, eos_token_id=None, speculate=2).equal(alone)
    by_hand = ids[:, :5]
    cache_ = LatentCache(model.cfg, 2, 40, torch.float64)
    logits = model(by_hand, cache_)
    for _ in range(new):
        by_hand = torch.cat((by_hand, logits[:, -1:].argmax(-1)), 1)
        logits = model(by_hand[:, -1:], cache_)
    assert by_hand.equal(alone)
    for drafts in (0, 1):
        engine = Engine(model, 16, 4, drafts=drafts)
        wanted = RequestSettings(new)
        requests = [engine.submit(row.tolist(), wanted) for row in ids[:, :5]]
        while engine.busy:
            engine.step()
        assert [r.token_ids for r in requests] == alone[:, 5:].tolist()


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', ['all', 'third_norm', 'llama3'])
def test_compiled(name):
    torch._dynamo.reset()
    model, ids = setting(name)
    run = torch.compile(model, backend='eager')
    with torch.no_grad():
        assert_close(run(ids), model(ids), atol=1e-9, rtol=1e-9)
        seen = LatentCache(model.cfg, 2, LENGTH, torch.float64)
        parts = torch.cat([run(part, seen) for part in ids.split([6, 3], 1)], 1)
        assert_close(parts, model(ids), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize('name', ['all', 'third_norm', 'top2'])
def test_divided_experts(name, tmp_path):
    "One rank of a process group has all experts, behind the exchange"
    model = model_of(name)
    ids = setting(name)[1]
    with torch.no_grad():
        want = model(ids)
        store = dist.FileStore(str(tmp_path / 'store'), 1)
        dist.init_process_group('gloo', store=store, rank=0, world_size=1)
        try:
            mesh = init_device_mesh('cpu', (1,))
            for block in model.blocks[1:]:
                parallelize_experts(block.mlp, mesh)
            assert_close(model(ids), want, atol=1e-9, rtol=1e-9)
        finally:
            dist.destroy_process_group()


@pytest.mark.parametrize('name', SETTINGS)
def test_fp8_layers_keep_their_biases(name):
    "In eight bits the function is nearly the same; without the biases it is not"
    exact, ids = setting(name)
    model = model_of(name, num_experts_per_tok=4, topk_group=SETTINGS[name].get('n_group', 1))
    exact = model_of(name, num_experts_per_tok=4, topk_group=SETTINGS[name].get('n_group', 1))
    convert(model, 'block', 'emulate')
    with torch.no_grad():
        want = exact(ids)
        off = ((model(ids) - want).norm() / want.norm()).item()
        assert off < 0.15, off
        if model.cfg.attention_bias:
            for key, p in model.named_parameters():
                if key.endswith('.bias'):
                    p.zero_()
            assert ((model(ids) - want).norm() / want.norm()).item() > 2 * off


@pytest.mark.parametrize('mtp', [False, True])
@pytest.mark.parametrize('name', SETTINGS)
def test_counts_are_exact(name, mtp):
    cfg = config_of(name, num_nextn_predict_layers=int(mtp))
    with torch.device('meta'):
        model = DeepSeekV3(cfg)
    assert sum(p.numel() for p in model.parameters()) == cfg.num_params(mtp=True)[0]
    counts = layer_counts(cfg)
    planned = sum(
        sum(counts[kind].get(part, 0) for part in ('split', 'whole', 'routed'))
        * (cfg.num_hidden_layers - 1 if kind == 'moe' else 1)
        for kind in counts
    )
    assert planned == cfg.num_params(mtp=True)[0]


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', SETTINGS)
def test_what_cannot_carry_a_setting_refuses_before_it_begins(name, tmp_path):
    cfg = config_of(name, num_nextn_predict_layers=0)
    with pytest.raises(ValueError, match='llama.cpp would run another model'):
        check_representable(cfg)
    with pytest.raises(ValueError, match='inference code of DeepSeek'):
        refuse_unlike(cfg, 8)
    found = {(f.reader, f.verdict) for f in portable(cfg)}
    assert ('llama.cpp', 'refuses') in found
    assert ('DeepSeek', 'differs') in found and ('torchtitan', 'differs') in found
    if cfg.model_type == 'mistral4':
        with pytest.raises(ValueError, match='train it in one process'):
            check_packed(cfg)
        save_pretrained(DeepSeekV3(cfg), tmp_path / 'packed')
        with pytest.raises(ValueError, match='holds all experts of a layer'):
            convert_checkpoint(tmp_path / 'packed', tmp_path / 'eight', 'fp8')
        assert not list(tmp_path.glob('eight*'))
    else:
        check_packed(cfg)


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('to', ['bf16', 'fp8'])
@pytest.mark.parametrize('name', SETTINGS)
def test_conversion_keeps_every_tensor(name, to, tmp_path):
    cfg = config_of(name)
    if to == 'fp8' and cfg.model_type == 'mistral4':
        return  # refused, see above
    model = model_of(name).float()
    save_pretrained(model, tmp_path / 'one')
    convert_checkpoint(tmp_path / 'one', tmp_path / 'two', to)
    again = load_pretrained(tmp_path / 'two', torch.float32)
    assert again.cfg == model.cfg
    assert list(again.state_dict()) == list(model.state_dict())
    room = 2**-8 if to == 'bf16' else 2**-3
    for key, tensor in model.state_dict().items():
        off = (again.state_dict()[key] - tensor).norm() / tensor.norm().clamp(min=1e-9)
        assert off <= room, (key, off)


def test_a_model_with_scaled_queries_needs_all_tables():
    model, _ = setting('query_scale')
    attention = model.blocks[0].self_attn
    tables = torch.ones(1, 3, 4).double(), torch.ones(1, 3, 4).double()
    h = torch.ones(1, 3, SIZES['hidden_size']).double()
    with pytest.raises(ValueError, match='2 rotary tables: this model has 3'):
        attention(h, tables)
    plain = partial(setting('half_split')[0].blocks[0].self_attn, h)
    plain(tables)
    with pytest.raises(ValueError, match='3 rotary tables: this model has 2'):
        plain((*tables, torch.ones(1, 3, 1).double()))
