"""Configurations are read as `transformers` reads them, in both families

Fields may be left out, null, renamed, or contradict each other.
"""

import copy
import json
import random
import warnings

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from eva.checkpoints.pretrained import load_pretrained, save_pretrained
from eva.config import YARN_V3, Config
from eva.model.transformer import DeepSeekV3
from eva.published_families import FAMILIES

logging.set_verbosity_error()
logging.disable_progress_bar()

SMALL = dict(
    vocab_size=60,
    hidden_size=64,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=12,
    kv_lora_rank=10,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    intermediate_size=20,
    moe_intermediate_size=12,
    first_k_dense_replace=1,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    max_position_embeddings=128,
    hidden_act='silu',
    initializer_range=0.1,
    rms_norm_eps=1e-6,
    tie_word_embeddings=False,
    rope_theta=10000.0,
    rope_scaling=None,
    norm_topk_prob=True,
    routed_scaling_factor=1.5,
    bos_token_id=3,
    eos_token_id=4,
    pad_token_id=None,
)
FILES = dict(
    deepseek_v3=SMALL
    | dict(
        model_type='deepseek_v3',
        topk_method='noaux_tc',
        scoring_func='sigmoid',
        num_nextn_predict_layers=0,
    ),
    deepseek_v2=SMALL
    | dict(
        model_type='deepseek_v2', topk_method='greedy', scoring_func='softmax', norm_topk_prob=False
    ),
)
OURS = [f for f in Config.__dataclass_fields__ if f != 'model_type']


def peer_config(found):
    "What the peer reads, in our words; None where it has no such field"
    peer = AutoConfig.for_model(**copy.deepcopy(found))
    out = {name: getattr(peer, name) for name in OURS if hasattr(peer, name)}
    rope = dict(peer.rope_parameters)
    out['rope_theta'] = rope.pop('rope_theta')
    kind = rope.pop('rope_type')
    rope.pop('type', None)
    out['rope_scaling'] = None if kind == 'default' else rope
    for name, value in FAMILIES[found['model_type']].ignored.items():
        out[name] = value
    out.pop('mlp_bias', None)
    types = out.get('indexer_types')
    if types is not None and 'shared' not in types:
        out['indexer_types'] = None  # an indexer in every layer
    return out


def assert_same_reading(found):
    ours = Config.from_dict(copy.deepcopy(found)).to_dict()
    theirs = peer_config(found)
    if ours['rope_scaling'] is not None:
        ours['rope_scaling'] = {
            k: v for k, v in ours['rope_scaling'].items() if k not in ('type', 'rope_type')
        }
    if theirs['n_group'] is None:
        theirs |= dict(n_group=1, topk_group=1)  # greedy: no groups
    elif theirs['topk_group'] is None:
        theirs |= dict(topk_group=theirs['n_group'])
    for name, value in theirs.items():
        assert ours[name] == value, (name, ours[name], value)


@pytest.mark.parametrize('family', FILES)
def test_a_field_left_out_means_what_the_peer_means(family):
    full = FILES[family]
    for name in full:
        found = {k: v for k, v in full.items() if k not in (name, 'num_key_value_heads')}
        if name in ('n_group', 'topk_group', 'num_experts_per_tok'):
            found |= dict(n_routed_experts=64)
        if name == 'model_type':
            with pytest.raises(ValueError, match='model_type: missing'):
                Config.from_dict(found)
        elif name == 'num_experts_per_tok' and family == 'deepseek_v2':
            with pytest.raises(
                ValueError, match='num_experts_per_tok: missing, and deepseek_v2 has no default'
            ):
                Config.from_dict(found)
        else:
            assert_same_reading(found)


YARN = YARN_V3 | dict(factor=8.0, original_max_position_embeddings=32)
PAIRS = [
    (
        dict(rope_theta=5e4, rope_parameters=dict(rope_type='default', rope_theta=1e4)),
        'rope_theta=50000.0 and rope_parameters.rope_theta=10000.0',
    ),
    (
        dict(rope_theta=5e4, rope_scaling=YARN | dict(rope_theta=1e4)),
        'rope_theta=50000.0 and rope_scaling.rope_theta=10000.0',
    ),
    (
        dict(rope_scaling=YARN | dict(rope_theta=5e4), rope_parameters=YARN | dict(rope_theta=1e4)),
        'rope_scaling.rope_theta=50000.0 and rope_parameters.rope_theta=10000.0',
    ),
    (
        dict(rope_scaling=YARN, rope_parameters=YARN | dict(factor=4.0)),
        "'factor': 8.0.*'factor': 4.0",
    ),
    (
        dict(rope_scaling=dict(type='default'), rope_parameters=YARN),
        'rope_scaling=None and rope_parameters=',
    ),
    (dict(rope_scaling=YARN | dict(rope_type='default')), "type='yarn' and rope_type='default'"),
    (
        dict(rope_scaling=YARN, original_max_position_embeddings=64),
        (
            'original_max_position_embeddings=64 and rope '
            'settings: original_max_position_embeddings=32'
        ),
    ),
    (dict(num_key_value_heads=2), 'num_key_value_heads=2 and num_attention_heads=4'),
    (dict(head_dim=128), 'head_dim=128 and qk_rope_head_dim=4'),
    (dict(qk_head_dim=12), 'qk_head_dim=12 and qk_nope_head_dim . qk_rope_head_dim=10'),
    (dict(num_experts=16), 'n_routed_experts=8 and num_experts=16'),
    (dict(num_local_experts=16), 'n_routed_experts=8 and num_local_experts=16'),
    (dict(architectures=['LlamaForCausalLM', 'DeepseekV{}ForCausalLM']), 'contradict each other'),
]


@pytest.mark.parametrize('family', FILES)
@pytest.mark.parametrize('changes,said', PAIRS)
def test_contradictions_are_refused_with_both_values(family, changes, said):
    other = '2' if family == 'deepseek_v3' else '3'
    changes = json.loads(json.dumps(changes).replace('V{}', f'V{other}'))
    found = {
        k: v for k, v in FILES[family].items() if k not in ('rope_theta', 'rope_scaling')
    } | changes
    with pytest.raises(ValueError, match=said):
        Config.from_dict(found)


NULLS = [
    dict(eos_token_id=None),
    dict(eos_token_id=[4, 5, 6]),
    dict(eos_token_id=[4]),
    dict(eos_token_id=[]),
    dict(bos_token_id=None),
    dict(pad_token_id=None),
    dict(pad_token_id=7),
    dict(pad_token_id=-1),
    dict(rope_scaling={}),
    dict(rope_scaling=None),
    dict(q_lora_rank=None),
    dict(rope_scaling=dict(type='default')),
    dict(rope_scaling=dict(rope_type='default')),
    dict(rope_parameters=None),
    dict(rope_parameters=dict(rope_type='default', rope_theta=1e4)),
    dict(num_key_value_heads=None),
    dict(head_dim=4),
    dict(rope_scaling=YARN),
    dict(rope_scaling=None, rope_parameters=YARN | dict(rope_theta=1e4, rope_type='yarn')),
    dict(rope_scaling=YARN, rope_parameters=YARN),
    dict(norm_topk_prob=None),
]


@pytest.mark.parametrize('family', FILES)
@pytest.mark.parametrize('changes', NULLS)
def test_null_is_absent_and_comes_back_as_it_was(family, changes, tmp_path):
    found = FILES[family] | changes
    assert_same_reading(
        found | (dict(norm_topk_prob=False) if changes == dict(norm_topk_prob=None) else {})
    )
    cfg = Config.from_dict(found)
    cfg.to_json_file(tmp_path / 'config.json')
    written = json.loads((tmp_path / 'config.json').read_text())
    assert Config.from_pretrained(tmp_path) == cfg
    for name in ('eos_token_id', 'bos_token_id', 'pad_token_id'):
        assert written[name] == found[name] and type(written[name]) is type(found[name])
    assert AutoConfig.from_pretrained(tmp_path).eos_token_id == found['eos_token_id']


@pytest.mark.parametrize(
    'groups',
    [dict(n_group=None, topk_group=None), dict(n_group=None), dict(n_group=4, topk_group=None)],
)
def test_experts_without_groups(groups):
    found = {k: v for k, v in FILES['deepseek_v2'].items() if k != 'topk_group'} | groups
    assert Config.from_dict(found).n_group == (groups['n_group'] or 1)
    with pytest.raises(ValueError, match='group'):
        Config.from_dict(found | dict(topk_method='group_limited_greedy'))
    v3 = {k: v for k, v in FILES['deepseek_v3'].items() if k != 'topk_group'} | groups
    if groups['n_group'] is None:
        cfg = Config.from_dict(v3)
        assert (cfg.n_group, cfg.topk_group) == (1, 1)
    else:
        with pytest.raises(ValueError, match='topk_group=None'):
            Config.from_dict(v3)


@pytest.mark.parametrize('family', FILES)
def test_what_the_peer_ignores_is_ignored_and_said(family, tmp_path):
    other = dict(
        scoring_func=('sigmoid', 'softmax'),
        topk_method=('noaux_tc', 'greedy'),
        norm_topk_prob=(True, False),
        rope_interleave=(True, False),
        post_mlp_layernorm=(True, False),
    )
    for name, value in FAMILIES[family].ignored.items():
        lie = next(o for o in other[name] if o != value)
        with pytest.warns(
            UserWarning, match=f'{name}={lie!r}: transformers ignores this in {family}'
        ):
            cfg = Config.from_dict(FILES[family] | {name: lie})
        assert getattr(cfg, name) == value
        ours = cfg.replace(**{name: lie})
        assert ours.ignored_by_others() == {name: value}
        with pytest.warns(UserWarning, match=f'transformers differs: .*({lie}|{name})'):
            save_pretrained(DeepSeekV3(ours), tmp_path / f'{family}-{name}')
        with warnings.catch_warnings():
            warnings.simplefilter('error')
            assert load_pretrained(tmp_path / f'{family}-{name}').cfg == ours
            warnings.filterwarnings('ignore', message='.*(vLLM|SGLang|llama.cpp) differs')
            save_pretrained(DeepSeekV3(cfg), tmp_path / 'plain')


def test_a_bias_of_the_feed_forward_network_is_refused_by_its_name(tmp_path):
    with pytest.raises(ValueError, match='mlp_bias=True'):
        Config.from_dict(FILES['deepseek_v2'] | dict(mlp_bias=True))
    found = FILES['deepseek_v2'] | dict(mlp_bias=True)
    peer = AutoModelForCausalLM.from_config(AutoConfig.for_model(**found))
    peer.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match='mlp_bias=True'):
        load_pretrained(tmp_path)


@pytest.mark.parametrize('key', ['mlp_bias', 'attention_bias'])
def test_biases_that_the_file_does_not_promise_are_refused(key, tmp_path):
    found = FILES['deepseek_v2'] | {key: True}
    peer = AutoModelForCausalLM.from_config(AutoConfig.for_model(**found))
    peer.save_pretrained(tmp_path)
    path = tmp_path / 'config.json'
    path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != key}))
    with pytest.raises(ValueError, match=r'\.bias: .*no biases.*attention_bias and mlp_bias'):
        load_pretrained(tmp_path)
    if key == 'attention_bias':  # and the other way round: promised, and not there
        path.write_text(json.dumps(json.loads(path.read_text()) | {key: True, 'q_lora_rank': None}))
        with pytest.raises(ValueError, match='missing'):
            load_pretrained(tmp_path)


def odd_file(seed):
    "A config.json as somebody might write it: odd sizes, missing or renamed fields, nulls"
    rng = random.Random(seed)
    family = rng.choice(list(FILES))
    groups, per_group = rng.choice(((1, 6), (2, 3), (4, 2), (3, 4)))
    chosen = rng.randint(1, groups)
    heads = rng.randint(1, 4)
    found = dict(
        model_type=family,
        vocab_size=rng.randint(20, 70),
        hidden_size=heads * rng.randint(3, 12),
        num_hidden_layers=rng.randint(1, 3),
        num_attention_heads=heads,
        q_lora_rank=rng.choice((None, 5, 12)),
        kv_lora_rank=rng.randint(3, 14),
        qk_nope_head_dim=rng.randint(3, 9),
        qk_rope_head_dim=2 * rng.randint(1, 4),
        v_head_dim=rng.randint(3, 9),
        intermediate_size=rng.randint(5, 30),
        moe_intermediate_size=rng.randint(5, 20),
        n_routed_experts=groups * per_group,
        num_experts_per_tok=rng.randint(1, chosen * per_group),
        n_group=groups,
        topk_group=chosen,
        first_k_dense_replace=rng.randint(0, 1),
        n_shared_experts=rng.randint(1, 2),
        num_nextn_predict_layers=0,
        max_position_embeddings=rng.choice((64, 128)),
        routed_scaling_factor=rng.choice((1.0, 2.5, 16.0)),
        norm_topk_prob=rng.random() < 0.5,
        rms_norm_eps=rng.choice((1e-6, 1e-5, 1e-3)),
        hidden_act=rng.choice(('silu', 'gelu', 'gelu_pytorch_tanh', 'relu')),
        tie_word_embeddings=rng.random() < 0.3,
        topk_method=rng.choice(('greedy', 'group_limited_greedy')),
        bos_token_id=None,
        eos_token_id=rng.choice((None, 1, [1, 2])),
    )
    rope = dict(
        rope_type='yarn', factor=rng.choice((2.0, 40.0)), original_max_position_embeddings=16
    )
    rope |= rng.choice(
        (
            {},
            dict(mscale=0.7, mscale_all_dim=0.7),
            dict(mscale=1.0, mscale_all_dim=0.5),
            dict(beta_fast=16, beta_slow=2),
        )
    )
    theta = rng.choice((100.0, 10000.0, 50000.0))
    places = (
        dict(rope_theta=theta),
        dict(rope_theta=theta, rope_scaling=rope),
        dict(rope_scaling=rope | dict(rope_theta=theta)),
        dict(rope_scaling={}),
        dict(rope_parameters=rope | dict(rope_theta=theta)),
        dict(rope_theta=theta, rope_scaling=None, rope_parameters=rope),
    )
    found |= rng.choice(places)
    found['num_key_value_heads'] = rng.choice(
        (None, heads)
    )  # left out, it is 128 in V3 of the peer, which cannot run then
    if family == 'deepseek_v2':
        found['qk_nope_head_dim'] *= 2  # the peer takes pairs as complex numbers, where they stand
        found['kv_lora_rank'] *= 2
    for name in (
        'norm_topk_prob',
        'routed_scaling_factor',
        'rms_norm_eps',
        'hidden_act',
        'tie_word_embeddings',
        'topk_method',
    ):
        if rng.random() < 0.3:
            del found[name]
    if (
        found.get('topk_method', 'greedy') == 'greedy'
        and family == 'deepseek_v2'
        and rng.random() < 0.5
    ):
        found |= dict(n_group=None, topk_group=None)
    if rng.random() < 0.3:
        found['num_local_experts' if family == 'deepseek_v3' else 'num_experts'] = found.pop(
            'n_routed_experts'
        )
    return found


def peer_of(found, seed):
    "A random model of the peer, so that nothing is right by luck"
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**copy.deepcopy(found))
    peer = AutoModelForCausalLM.from_config(
        config, experts_implementation='eager', attn_implementation='eager'
    )
    peer = peer.float().eval()
    with torch.no_grad():
        for name, p in peer.named_parameters():
            p.uniform_(0.5, 1.5) if 'norm' in name else p.normal_(std=0.3)
        for name, b in peer.named_buffers():
            if 'e_score_correction_bias' in name:
                b.normal_(std=0.1)
    return peer


LIES = dict(
    routed_scaling_factor=lambda v: 2.0 * (v or 1.0),
    rms_norm_eps=lambda v: 0.5,
    hidden_act=lambda v: 'relu2',
)


def logits_of(folder, found, ids):
    (folder / 'config.json').write_text(json.dumps(found))
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter('ignore')
        return load_pretrained(folder)(ids)


@pytest.mark.parametrize('seed', range(24))
def test_random_odd_files_give_the_logits_of_the_peer(seed, tmp_path):
    torch.set_num_threads(1)
    found = odd_file(seed)
    peer = peer_of(found, seed)
    peer.save_pretrained(tmp_path)
    ids = torch.randint(found['vocab_size'], (2, 40))
    with torch.no_grad():
        want = peer(ids).logits

    def distance(got):
        return ((got - want).norm() / want.norm()).item()

    assert distance(logits_of(tmp_path, found, ids)) < 1e-5
    for name, lie in LIES.items():
        has_experts = found['first_k_dense_replace'] < found['num_hidden_layers']
        if has_experts or name != 'routed_scaling_factor':
            assert (
                distance(logits_of(tmp_path, found | {name: lie(found.get(name))}, ids)) > 1e-4
            ), name


def test_a_config_cannot_be_changed_after_it_was_checked():
    cfg = Config.from_preset('v3')
    for change in (
        lambda: setattr(cfg, 'kv_lora_rank', 0),
        lambda: delattr(cfg, 'kv_lora_rank'),
        lambda: cfg.rope_scaling.update(factor=-1),
        lambda: cfg.rope_scaling.__setitem__('factor', -1),
        lambda: cfg.rope_scaling.pop('factor'),
    ):
        with pytest.raises((AttributeError, TypeError)):
            change()
    settings = dict(YARN_V3)
    mine = Config(rope_scaling=settings)
    settings['factor'] = -1
    assert mine == cfg and copy.deepcopy(mine) == cfg
    assert cfg.replace(kv_lora_rank=64).kv_lora_rank == 64
    with pytest.raises(ValueError, match='kv_lora_rank=0'):
        cfg.replace(kv_lora_rank=0)
    with pytest.raises(ValueError, match='layers: no such field'):
        cfg.replace(layers=3)
