"""Every model type of the family against `transformers`: in, out, and field by field

A field of the class in `transformers` is changed to each other value that it may have. Eva then
computes the same logits, or refuses; a field that changes nothing is in a list, with the reason.
"""

import contextlib
import copy
import dataclasses
import json
import random
import warnings

import pytest
import torch
import transformers
from transformers import CONFIG_MAPPING, AutoConfig
from transformers.utils import logging

from eva.checkpoints.conversion import convert_checkpoint
from eva.checkpoints.pretrained import load_pretrained, save_pretrained
from eva.config import Config
from eva.published_families import FAMILIES, OTHER_TYPES, V3_FIELDS

logging.set_verbosity_error()
logging.disable_progress_bar()

TYPES = [
    'deepseek_v3', 'deepseek_v2', 'kimi_k2', 'sarvam_mla', 'glm4_moe_lite', 'youtu', 'axk1',
    'mistral4', 'deepseek_v32', 'glm_moe_dsa',
]  # fmt: skip
SPARSE = ('deepseek_v32', 'glm_moe_dsa')
TYPES = [name for name in TYPES if name in ('kimi_k2', *CONFIG_MAPPING)]  # an older release
PEERS = [name for name in TYPES if FAMILIES[name].is_in_transformers]
YARN = dict(rope_type='yarn', factor=4.0, original_max_position_embeddings=16)
LLAMA3 = YARN | dict(rope_type='llama3', low_freq_factor=1.0, high_freq_factor=4.0)
SCALED = dict(llama_4_scaling_beta=0.3)


# ---- models of both ----


def for_peer(found):
    "A file as `transformers` takes it: Kimi K2 under the name of the class that computes it"
    found = copy.deepcopy(found)
    if not FAMILIES[found['model_type']].is_in_transformers:
        found['model_type'] = 'deepseek_v3'
    return found


def class_of(found):
    "The class that computes a file; `AutoModelForCausalLM` does not know that of `mistral4`"
    return getattr(transformers, FAMILIES[found['model_type']].architecture)


def peer_of(found, seed=0):
    "A random model of `transformers` in float64, so that nothing is right by luck"
    torch.manual_seed(seed)
    config = AutoConfig.for_model(**for_peer(found))
    config._experts_implementation = config._attn_implementation = 'eager'
    peer = class_of(found)(config).double().eval()
    with torch.no_grad():
        for name, p in peer.named_parameters():
            p.uniform_(0.5, 1.5) if 'norm' in name else p.normal_(std=0.3)
        for name, b in peer.named_buffers():
            if 'e_score_correction_bias' in name:
                b.normal_(std=0.1)
    return peer


@contextlib.contextmanager
def widened(peer):
    "Norms, routers and scores of the peer in float64, where it takes float32; not its angles"
    narrow = torch.float32, torch.Tensor.float
    rotary = peer.model.rotary_emb
    angles = rotary.forward

    def in_float32(*args, **kwargs):
        torch.float32, torch.Tensor.float = narrow
        try:
            return angles(*args, **kwargs)
        finally:
            torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double

    rotary.forward = in_float32
    torch.float32, torch.Tensor.float = torch.float64, torch.Tensor.double
    try:
        yield
    finally:
        torch.float32, torch.Tensor.float = narrow
        rotary.forward = angles


def read_as(folder, found):
    "Load a folder with another config.json"
    (folder / 'config.json').write_text(json.dumps(found))
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return load_pretrained(folder)


def relative(got, want):
    return ((got - want).norm() / want.norm().clamp(min=1e-30)).item()


def name_in_eva(name):
    "The third norm of A.X-K1 is a part of the block, as in its files"
    return name.replace('.mlp.post_mlp_layernorm', '.post_mlp_layernorm')


# ---- random files ----


def rotary(rng, model_type, content, width):
    "Rotary settings of a kind that `transformers` computes for this type"
    theta = rng.choice((100.0, 10000.0, 50000.0))
    mscales = rng.choice(({}, dict(mscale=0.7, mscale_all_dim=0.7), dict(mscale_all_dim=0.5)))
    more = rng.choice(
        ({}, dict(beta_fast=16, beta_slow=2), dict(truncate=False), dict(attention_factor=0.8))
    )
    kinds = [YARN | mscales | more, LLAMA3 | mscales, dict(rope_type='linear', factor=3.0)]
    if model_type == 'mistral4':
        share = width / (content + width)
        chosen = rng.choice(kinds) | SCALED | dict(original_max_position_embeddings=16)
        return dict(rope_parameters=chosen | dict(rope_theta=theta, partial_rotary_factor=share))
    chosen = rng.choice([None, *kinds])
    if chosen is None:
        return dict(rope_theta=theta)
    places = [
        dict(rope_parameters=chosen | dict(rope_theta=theta)),
        dict(rope_theta=theta, rope_scaling=chosen),
    ]
    if model_type == 'sarvam_mla' and chosen['rope_type'] == 'yarn':
        words = {k: v for k, v in chosen.items() if k != 'rope_type'}
        places.append(dict(rope_theta=theta, rope_scaling=words | dict(type='deepseek_yarn')))
    return rng.choice(places)


def experts(rng, layers):
    "Counts of experts and groups"
    groups, per_group = rng.choice(((1, 6), (2, 3), (4, 2), (3, 4)))
    chosen = rng.randint(1, groups)
    return dict(
        moe_intermediate_size=rng.randint(5, 20),
        n_routed_experts=groups * per_group,
        num_experts_per_tok=rng.randint(1, chosen * per_group),
        n_group=groups,
        topk_group=chosen,
        first_k_dense_replace=rng.randint(0, layers - 1),
        n_shared_experts=rng.randint(1, 2),
        routed_scaling_factor=rng.choice((1.0, 2.5, 16.0)),
        norm_topk_prob=rng.random() < 0.5,
    )


def indexer(rng, model_type, layers, rotary_width):
    "Sizes of the indexers: many heads, because the peer settles equal scores by chance"
    out = dict(
        index_topk=rng.randint(3, 30),
        index_n_heads=rng.randint(13, 17),
        index_head_dim=rotary_width + rng.choice((0, 3, 8)),
    )
    if model_type == 'glm_moe_dsa' and rng.random() < 0.7:
        types = rng.choices(('full', 'shared'), k=layers - 1)
        out['indexer_types'] = ['full', *types]
    return out


def odd_file(model_type, seed):
    "A config.json of one type: odd sizes, other spellings"
    rng = random.Random(f'{model_type} {seed}')
    heads = rng.randint(1, 4)
    layers = rng.randint(2, 3)
    widths = rng.choice(((6, 2), (8, 8), (6, 4), (12, 4), (2, 6)))
    found = dict(
        model_type=model_type,
        vocab_size=rng.randint(20, 70),
        hidden_size=heads * rng.randint(3, 12),
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads,
        q_lora_rank=rng.choice((5, 12) if model_type in ('axk1', *SPARSE) else (None, 5, 12)),
        kv_lora_rank=2 * rng.randint(3, 14),
        qk_nope_head_dim=widths[0],
        qk_rope_head_dim=widths[1],
        v_head_dim=rng.randint(3, 9),
        intermediate_size=rng.randint(5, 30),
        max_position_embeddings=rng.choice((64, 128)),
        rms_norm_eps=rng.choice((1e-6, 1e-5, 1e-3)),
        hidden_act=rng.choice(('silu', 'gelu', 'gelu_pytorch_tanh')),  # relu has a kink
        tie_word_embeddings=rng.random() < 0.3,
        attention_bias=rng.random() < 0.5,
        bos_token_id=rng.choice((None, 3)),
        eos_token_id=rng.choice((None, 1, [1, 2])),
        pad_token_id=None,
    )
    found |= rotary(rng, model_type, *widths)
    if model_type not in ('deepseek_v2', *SPARSE):
        found['rope_interleave'] = rng.random() < 0.7
    if model_type in SPARSE:
        found |= indexer(rng, model_type, layers, widths[1])
    if model_type == 'youtu':
        return found
    found |= experts(rng, layers)
    if model_type == 'deepseek_v2':
        found['topk_method'] = rng.choice(('greedy', 'group_limited_greedy'))
    if model_type == 'sarvam_mla' and rng.random() < 0.5:
        found['num_experts'] = found.pop('n_routed_experts')
        found['num_shared_experts'] = found.pop('n_shared_experts')
        found['head_dim'] = found['kv_lora_rank'] + found['qk_rope_head_dim']
    in_list = ('axk1', *SPARSE)
    if model_type == 'glm4_moe_lite' or (model_type in in_list and rng.random() < 0.5):
        dense = found.pop('first_k_dense_replace')
        found['mlp_layer_types'] = ['dense'] * dense + ['sparse'] * (layers - dense)
    return found


# Files in the form of published models, with small sizes
PUBLISHED = dict(
    moonlight=dict(  # 64 experts in one group, queries without a latent, no MTP module
        model_type='deepseek_v3', architectures=['DeepseekV3ForCausalLM'], vocab_size=60,
        hidden_size=32, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=4,
        q_lora_rank=None, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
        intermediate_size=40, moe_intermediate_size=8, n_routed_experts=64, n_shared_experts=2,
        num_experts_per_tok=6, n_group=1, topk_group=1, topk_method='noaux_tc',
        scoring_func='sigmoid', norm_topk_prob=True, routed_scaling_factor=2.446,
        first_k_dense_replace=1, moe_layer_freq=1, num_nextn_predict_layers=0,
        rms_norm_eps=1e-5, rope_theta=50000.0, rope_scaling=None, max_position_embeddings=128,
        attention_bias=False, attention_dropout=0.0, hidden_act='silu', bos_token_id=3,
        eos_token_id=4, pad_token_id=5, pretraining_tp=1, ep_size=1, seq_aux=True,
        aux_loss_alpha=0.001, tie_word_embeddings=False, torch_dtype='bfloat16', use_cache=True,
    ),
    kimi_k2=dict(  # 384 experts in one group, half of V3's heads
        model_type='kimi_k2', architectures=['DeepseekV3ForCausalLM'], vocab_size=60,
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        q_lora_rank=12, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
        intermediate_size=40, moe_intermediate_size=4, n_routed_experts=384, n_shared_experts=1,
        num_experts_per_tok=8, n_group=1, topk_group=1, topk_method='noaux_tc',
        scoring_func='sigmoid', norm_topk_prob=True, routed_scaling_factor=2.827,
        first_k_dense_replace=1, moe_layer_freq=1, num_nextn_predict_layers=0, rms_norm_eps=1e-6,
        rope_theta=50000.0, max_position_embeddings=128, attention_bias=False,
        rope_scaling=dict(
            type='yarn', factor=32.0, beta_fast=1.0, beta_slow=1.0, mscale=1.0, mscale_all_dim=1.0,
            original_max_position_embeddings=16,
        ),
        hidden_act='silu', bos_token_id=3, eos_token_id=4, pad_token_id=5,
        tie_word_embeddings=False,
    ),
)  # fmt: skip
FILES = {f'{name} {seed}': odd_file(name, seed) for name in TYPES for seed in range(4)} | PUBLISHED


# ---- in and out ----


def lies(found):
    "One field of a file, read wrongly"
    out = dict(rms_norm_eps=dict(rms_norm_eps=0.5), hidden_act=dict(hidden_act='relu2'))
    if found['model_type'] not in ('deepseek_v2', *SPARSE):
        pairs = found.get('rope_interleave', True)
        if found['qk_rope_head_dim'] > 2:
            out['rope_interleave'] = dict(rope_interleave=not pairs)
    if found['model_type'] != 'youtu':
        factor = 2 * found.get('routed_scaling_factor', 1.0)
        out['routed_scaling_factor'] = dict(routed_scaling_factor=factor)
    if found['model_type'] == 'mistral4':
        rope = found['rope_parameters'] | dict(llama_4_scaling_beta=0.0)
        out['llama_4_scaling_beta'] = dict(rope_parameters=rope)
    if found['model_type'] in SPARSE:
        out['index_topk'] = dict(index_topk=found['index_topk'] + 5)
    return out


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', FILES)
def test_logits_and_gradients_are_those_of_the_peer(name, tmp_path):
    torch.set_num_threads(1)
    found = FILES[name]
    peer = peer_of(found)
    peer.save_pretrained(tmp_path)
    if FAMILIES[found['model_type']].is_in_transformers:
        written = json.loads((tmp_path / 'config.json').read_text())
        assert load_pretrained(tmp_path).cfg == read_as(tmp_path, found).cfg, written
    ours = read_as(tmp_path, found)
    assert ours.dtype == torch.float64
    ids = torch.randint(found['vocab_size'], (2, 40))
    got = ours(ids)
    assert relative(got, peer(ids).logits) < 1e-5
    weights = torch.randn_like(got)
    (got * weights).sum().backward()
    with widened(peer):
        want = peer(ids).logits
        (want * weights).sum().backward()
    # The tables of V2 are complex numbers in float32, ours cosines and sines.
    bound = 1e-5 if found['model_type'] == 'deepseek_v2' else 1e-9
    assert relative(got, want) < bound
    theirs = {name_in_eva(n): p for n, p in peer.named_parameters()}
    assert theirs.keys() == dict(ours.named_parameters()).keys()
    # A router that always chooses one expert and normalises has no gradient but rounding errors.
    floor = 1e-3 * max(p.grad.norm() for p in peer.parameters() if p.grad is not None)
    for key, p in ours.named_parameters():
        if key == 'model.embed_tokens.weight' and found['pad_token_id'] is not None:
            p.grad[found['pad_token_id']] = 0  # `transformers` gives this row no gradient
        if p.grad is not None and theirs[key].grad is not None:
            off = (p.grad - theirs[key].grad).norm() / max(theirs[key].grad.norm(), floor)
            assert off < bound, key
    for lie, changes in lies(found).items():
        with torch.no_grad():
            off = relative(read_as(tmp_path, found | changes)(ids), want)
        assert off > 1e-5, lie  # and so would have failed


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', FILES)
def test_what_eva_writes_opens_in_the_peer(name, tmp_path):
    found = FILES[name]
    peer = peer_of(found)
    peer.save_pretrained(tmp_path / 'theirs')
    ours = read_as(tmp_path / 'theirs', found)
    save_pretrained(ours, tmp_path / 'ours')
    assert load_pretrained(tmp_path / 'ours').cfg == ours.cfg
    config = json.loads((tmp_path / 'ours/config.json').read_text())
    (tmp_path / 'ours/config.json').write_text(json.dumps(for_peer(config)))
    again, info = class_of(found).from_pretrained(
        tmp_path / 'ours',
        output_loading_info=True,
        experts_implementation='eager',
        attn_implementation='eager',
        dtype=torch.float64,
    )
    kinds = ('missing_keys', 'unexpected_keys', 'mismatched_keys')
    assert [len(info[k]) for k in kinds] == [0, 0, 0], info
    ids = torch.randint(found['vocab_size'], (2, 40))
    with torch.no_grad():
        assert relative(again.eval()(ids).logits, peer(ids).logits) < 1e-5
        assert relative(ours(ids), peer(ids).logits) < 1e-5


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('name', [f'{name} 0' for name in TYPES])
def test_conversion_of_each_type(name, tmp_path):
    "A folder of the peer, converted, is the model that Eva loads from the folder itself"
    found = FILES[name]
    peer_of(found).save_pretrained(tmp_path / 'theirs')
    (tmp_path / 'theirs/config.json').write_text(json.dumps(found))
    whole = load_pretrained(tmp_path / 'theirs', torch.float32)
    convert_checkpoint(tmp_path / 'theirs', tmp_path / 'wide', 'fp32')
    wide = load_pretrained(tmp_path / 'wide')
    assert wide.cfg == whole.cfg and list(wide.state_dict()) == list(whole.state_dict())
    for key, tensor in whole.state_dict().items():
        assert wide.state_dict()[key].equal(tensor), key


def test_experts_in_one_tensor_or_many_are_read_in_every_type(tmp_path):
    "Software that packs what others do not pack"
    from safetensors.torch import load_file, save_file

    for model_type, packed_in_files in (('mistral4', True), ('axk1', False)):
        if model_type not in TYPES:
            continue
        folder = tmp_path / model_type
        found = odd_file(model_type, 1)
        peer_of(found).save_pretrained(folder)
        before = read_as(folder, found)
        tensors = load_file(folder / 'model.safetensors')
        assert any(n.endswith('experts.down_proj') for n in tensors) == packed_in_files
        width = before.cfg.moe_intermediate_size
        out = {n: t for n, t in tensors.items() if '.mlp.experts.' not in n}
        for name, tensor in before.state_dict().items():
            if not name.endswith(('experts.gate_up_proj', 'experts.down_proj')):
                continue
            if not packed_in_files:
                out[name] = tensor.clone()
                continue
            stem = name.rpartition('.')[0]
            for i, matrix in enumerate(tensor):
                if name.endswith('down_proj'):
                    out[f'{stem}.{i}.down_proj.weight'] = matrix.clone()
                else:
                    out[f'{stem}.{i}.gate_proj.weight'] = matrix[:width].clone()
                    out[f'{stem}.{i}.up_proj.weight'] = matrix[width:].clone()
        save_file(out, folder / 'model.safetensors', {'format': 'pt'})
        after = load_pretrained(folder)
        for name, tensor in before.state_dict().items():
            assert after.state_dict()[name].equal(tensor), name


@pytest.mark.skipif('axk1' not in TYPES, reason='an older release of transformers')
def test_published_folders_of_axk1(tmp_path):
    "They hold the third norm of dense layers too, and no routing biases"
    from safetensors.torch import load_file, save_file

    found = odd_file('axk1', 0) | dict(first_k_dense_replace=1)
    found.pop('mlp_layer_types', None)
    peer = peer_of(found)
    for name, b in peer.named_buffers():
        if 'e_score_correction_bias' in name:
            b.zero_()
    peer.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / 'model.safetensors')
    norms = [n for n in tensors if n.endswith('post_mlp_layernorm.weight')]
    assert norms and all(n.count('.mlp.') == 0 for n in norms)
    tensors = {n: t for n, t in tensors.items() if 'e_score_correction_bias' not in n}
    tensors['model.layers.0.post_mlp_layernorm.weight'] = torch.full((found['hidden_size'],), 9.0)
    save_file(tensors, tmp_path / 'model.safetensors', {'format': 'pt'})
    ids = torch.randint(found['vocab_size'], (1, 20))
    with torch.no_grad():
        assert relative(read_as(tmp_path, found)(ids), peer(ids).logits) < 1e-5
    del tensors[norms[0]]
    save_file(tensors, tmp_path / 'model.safetensors', {'format': 'pt'})
    with pytest.raises(ValueError, match=r'post_mlp_layernorm.weight: missing'):
        load_pretrained(tmp_path)


MISTRAL = dict(
    dim=32, n_layers=3, n_heads=2, n_kv_heads=2, head_dim=12, hidden_dim=40, norm_eps=1e-5,
    vocab_size=60, rope_theta=10000.0, max_position_embeddings=128, q_lora_rank=14, kv_lora_rank=16,
    qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=6, tied_embeddings=False,
    moe=dict(
        num_experts=6, num_experts_per_tok=2, num_shared_experts=1, expert_hidden_dim=10,
        first_k_dense_replace=1, route_every_n=1, routed_scale=1.5, num_expert_groups=1,
        num_expert_groups_per_tok=1, expert_parallel=1, expert_model_parallel=1,
    ),
    llama_4_scaling=dict(beta=0.3, original_max_position_embeddings=16),
    yarn=dict(alpha=1, beta=32, factor=36, apply_scale=False, original_max_position_embeddings=16),
)  # fmt: skip
MISTRAL_ATTENTION = dict(
    q_a_proj='wq_a', q_a_layernorm='q_a_norm', q_b_proj='wq_b', kv_a_layernorm='kv_a_norm',
    kv_a_proj_with_mqa='wkv_a_with_mqa', kv_b_proj='wkv_b', o_proj='wo',
)  # fmt: skip
MISTRAL_TOP = {
    'model.embed_tokens.weight': 'tok_embeddings.weight',
    'model.norm.weight': 'norm.weight',
    'lm_head.weight': 'output.weight',
}


def names_of_mistral(name):
    "The names of a tensor of the peer in a file of Mistral, each with its rows"
    if name in MISTRAL_TOP:
        return {MISTRAL_TOP[name]: ()}
    _, _, layer, part, *rest = name.split('.')
    stem = f'layers.{layer}'
    if part == 'self_attn':
        return {f'{stem}.attention.{MISTRAL_ATTENTION[rest[0]]}.weight': ()}
    if part != 'mlp':
        norms = dict(input_layernorm='attention_norm', post_attention_layernorm='ffn_norm')
        return {f'{stem}.{norms[part]}.weight': ()}
    words = dict(gate_proj='w1', down_proj='w2', up_proj='w3')
    if rest[0] == 'gate':
        return {f'{stem}.gate.weight': ()}
    if rest[0] == 'shared_experts':
        return {f'{stem}.shared_experts.{words[rest[1]]}.weight': ()}
    if rest[0] != 'experts':
        return {f'{stem}.feed_forward.{words[rest[0]]}.weight': ()}
    width = MISTRAL['moe']['expert_hidden_dim']
    out = {}
    for i in range(MISTRAL['moe']['num_experts']):
        if rest[1] == 'down_proj':
            out[f'{stem}.experts.{i}.w2.weight'] = (i,)
        else:
            out[f'{stem}.experts.{i}.w1.weight'] = (i, slice(0, width))
            out[f'{stem}.experts.{i}.w3.weight'] = (i, slice(width, 2 * width))
    return out


@pytest.mark.skipif('mistral4' not in TYPES, reason='an older release of transformers')
def test_a_folder_in_the_form_of_mistral_large_3(tmp_path):
    "Names as in its files, its params.json as config.json; the peer's mistral4 computes it"
    from safetensors.torch import save_file

    cfg = Config.from_dict(MISTRAL)
    assert cfg.model_type == 'mistral4' and cfg.rope_scaling['llama_4_scaling_beta'] == 0.3
    peer = peer_of(cfg.to_dict())
    tensors = {
        new: tensor[rows].clone()
        for name, tensor in peer.state_dict().items()
        for new, rows in names_of_mistral(name).items()
    }
    save_file(tensors, tmp_path / 'consolidated.safetensors')
    ids = torch.randint(60, (2, 40))
    with torch.no_grad():
        want = peer(ids).logits
        assert relative(read_as(tmp_path, MISTRAL)(ids), want) < 1e-5
        yarn = MISTRAL['yarn'] | dict(factor=18)
        scaling = MISTRAL['llama_4_scaling'] | dict(beta=0.2)
        for lie in (dict(yarn=yarn), dict(llama_4_scaling=scaling), dict(norm_eps=0.1)):
            assert relative(read_as(tmp_path, MISTRAL | lie)(ids), want) > 1e-5, lie
    tensors['vision_encoder.transformer.layers.0.attention.wq.weight'] = torch.zeros(2, 2)
    save_file(tensors, tmp_path / 'consolidated.safetensors')
    (tmp_path / 'config.json').write_text(json.dumps(MISTRAL))
    with pytest.warns(UserWarning, match='1 tensors of images'), torch.no_grad():
        assert relative(load_pretrained(tmp_path, torch.float64)(ids), want) < 1e-5


@pytest.mark.skipif('mistral4' not in TYPES, reason='an older release of transformers')
@pytest.mark.filterwarnings('ignore')
def test_a_folder_in_the_form_of_mistral_is_converted(tmp_path):
    "The result has a config.json and published names"
    from safetensors.torch import save_file

    cfg = Config.from_dict(MISTRAL)
    peer = peer_of(cfg.to_dict()).float()
    state = peer.state_dict().items()
    tensors = {
        new: t[rows].clone() for name, t in state for new, rows in names_of_mistral(name).items()
    }
    (tmp_path / 'src').mkdir()
    save_file(tensors, tmp_path / 'src/consolidated.safetensors')
    (tmp_path / 'src/config.json').write_text(json.dumps(MISTRAL))
    convert_checkpoint(tmp_path / 'src', tmp_path / 'dst', 'fp32')
    assert json.loads((tmp_path / 'dst/config.json').read_text())['model_type'] == 'mistral4'
    ids = torch.randint(60, (2, 40))
    with torch.no_grad():
        assert relative(load_pretrained(tmp_path / 'dst')(ids), peer(ids).logits) < 1e-4


# ---- defaults ----


def peer_fields(model_type, **given):
    "What the class of the peer says, in our words"
    peer = AutoConfig.for_model(**for_peer(dict(model_type=model_type) | given))
    out = {name: getattr(peer, name) for name in V3_FIELDS if hasattr(peer, name)}
    rope = dict(peer.rope_parameters)
    out['rope_theta'] = rope['rope_theta']
    if hasattr(peer, 'mlp_layer_types'):
        out['first_k_dense_replace'] = peer.mlp_layer_types.count('dense')
    if model_type == 'deepseek_v2':
        out |= dict(n_group=1, topk_group=1, num_experts_per_tok=given['num_experts_per_tok'])
    return out | FAMILIES[model_type].ignored, rope


@pytest.mark.parametrize('model_type', TYPES)
def test_defaults_are_those_of_the_peers_class(model_type):
    given = dict(num_experts_per_tok=4) if model_type == 'deepseek_v2' else {}
    theirs, rope = peer_fields(model_type, **given)
    ours = Config.from_dict(dict(model_type=model_type) | given)
    for name, value in theirs.items():
        assert getattr(ours, name) == value, (name, getattr(ours, name), value)
    missing = V3_FIELDS.keys() - theirs.keys()
    if model_type != 'youtu':
        mtp = set() if FAMILIES[model_type].has_mtp else {'num_nextn_predict_layers'}
        if model_type in SPARSE:
            mtp.add('rope_interleave')  # always, in their main attention
        assert missing <= {'topk_method', *mtp, 'scoring_func', 'post_mlp_layernorm'}, missing
    kind = rope['rope_type']
    assert (ours.rope_scaling is None) == (kind == 'default')
    if ours.rope_scaling is not None:
        for key, value in ours.rope_scaling.items():
            assert rope[key] == value, key


# ---- field by field ----

SIZES = dict(
    vocab_size=60,
    hidden_size=24,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    q_lora_rank=12,
    kv_lora_rank=10,
    qk_nope_head_dim=6,
    qk_rope_head_dim=4,
    v_head_dim=5,
    intermediate_size=20,
    max_position_embeddings=128,
    bos_token_id=3,
    eos_token_id=4,
    pad_token_id=None,
    tie_word_embeddings=False,
    initializer_range=0.1,
)
EXPERTS = dict(
    moe_intermediate_size=12,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=4,
    topk_group=2,
    routed_scaling_factor=1.5,
)
MISTRAL_ROPE = YARN | SCALED | dict(rope_theta=1e4, partial_rotary_factor=0.4)


def walk_base(model_type):
    found = dict(model_type=model_type) | SIZES
    if model_type != 'youtu':
        found |= EXPERTS
    if model_type == 'deepseek_v2':
        found |= dict(topk_method='group_limited_greedy', first_k_dense_replace=1)
    if model_type in ('deepseek_v3', 'sarvam_mla', *SPARSE):
        found |= dict(first_k_dense_replace=1)
    if model_type in SPARSE:
        found |= dict(index_topk=7, index_n_heads=13, index_head_dim=9)
    if model_type == 'mistral4':
        found |= dict(rope_parameters=MISTRAL_ROPE, first_k_dense_replace=1)
    return found


ROPES = [
    None,
    {},
    dict(rope_type='default'),
    dict(rope_type='default', rope_theta=500.0),
    dict(rope_type='default', factor=3.0, mscale_all_dim=0.5),
    dict(rope_type='linear', factor=3.0),
    dict(rope_type='linear', factor=3.0, mscale_all_dim=0.5),
    dict(type='linear', factor=0.5),
    LLAMA3,
    LLAMA3 | dict(mscale_all_dim=0.5, mscale=0.9),
    {k: v for k, v in LLAMA3.items() if k != 'original_max_position_embeddings'},
    LLAMA3 | dict(high_freq_factor=1.0),
    LLAMA3 | dict(high_freq_factor=0.5),
    YARN,
    YARN | dict(mscale=0.7, mscale_all_dim=0.7),
    YARN | dict(mscale_all_dim=0.7),
    YARN | dict(mscale=0.7),
    YARN | dict(mscale=0.0, mscale_all_dim=0.7),
    YARN | dict(attention_factor=0.6),
    YARN | dict(attention_factor=1.0, mscale=0.5, mscale_all_dim=1.0),
    YARN | dict(attention_factor=None),
    YARN | dict(attention_factor=0.0),
    YARN | dict(truncate=False),
    YARN | dict(truncate=None),
    YARN | dict(beta_fast=4, beta_slow=0.5),
    YARN | dict(beta_fast=0.01, beta_slow=5),
    YARN | dict(beta_fast=None),
    YARN | dict(beta_fast=0),
    YARN | dict(factor=None),
    YARN | dict(factor=0.5),
    YARN | dict(rope_theta=500.0),
    YARN | dict(partial_rotary_factor=0.5),
    YARN | dict(llama_4_scaling_beta=0.3),
    YARN | dict(unknown=7),
    {k: v for k, v in YARN.items() if k != 'original_max_position_embeddings'},
    YARN | dict(original_max_position_embeddings=None),
    dict(rope_type='dynamic', factor=3.0),
    dict(rope_type='longrope', short_factor=[1.0, 2.0], long_factor=[1.0, 2.0], factor=2.0),
    dict(rope_type='proportional', factor=2.0, partial_rotary_factor=0.5),
    dict(rope_type='proportional', factor=2.0),
    dict(rope_type='deepseek_yarn', factor=4.0, original_max_position_embeddings=16),
    dict(factor=3.0),
]
DENSE = ['dense', 'dense', 'sparse']
# Field -> changes of the file, each another valid value of that field (with what it must go with)
CHANGES = dict(
    vocab_size=[dict(vocab_size=61)],
    hidden_size=[dict(hidden_size=28)],
    intermediate_size=[dict(intermediate_size=21)],
    moe_intermediate_size=[dict(moe_intermediate_size=11)],
    num_hidden_layers=[dict(num_hidden_layers=2)],
    num_attention_heads=[dict(num_attention_heads=4, num_key_value_heads=4)],
    num_key_value_heads=[dict(num_key_value_heads=1), dict(num_key_value_heads=None)],
    n_shared_experts=[dict(n_shared_experts=2)],
    n_routed_experts=[dict(n_routed_experts=12)],
    output_router_logits=[dict(output_router_logits=True)],
    routed_scaling_factor=[dict(routed_scaling_factor=3.0)],
    kv_lora_rank=[dict(kv_lora_rank=8)],
    q_lora_rank=[dict(q_lora_rank=9), dict(q_lora_rank=None)],
    qk_rope_head_dim=[dict(qk_rope_head_dim=6)],
    qk_nope_head_dim=[dict(qk_nope_head_dim=8)],
    v_head_dim=[dict(v_head_dim=7), dict(v_head_dim=None)],
    n_group=[dict(n_group=2), dict(n_group=None), dict(n_group=None, topk_group=None)],
    topk_group=[dict(topk_group=1), dict(topk_group=4), dict(topk_group=None)],
    topk_method=[dict(topk_method='greedy'), dict(topk_method=None)],
    num_experts_per_tok=[dict(num_experts_per_tok=3), dict(num_experts_per_tok=None)],
    first_k_dense_replace=[dict(first_k_dense_replace=2), dict(first_k_dense_replace=0)],
    norm_topk_prob=[dict(norm_topk_prob=v) for v in (True, False, None)],
    hidden_act=[dict(hidden_act=v) for v in ('gelu', 'relu', 'tanh', 'relu2', 'quick_gelu')],
    max_position_embeddings=[dict(max_position_embeddings=64)],
    initializer_range=[dict(initializer_range=0.3)],
    embedding_initializer_range=[dict(embedding_initializer_range=0.3)],
    rms_norm_eps=[dict(rms_norm_eps=0.1)],
    use_cache=[dict(use_cache=False)],
    pad_token_id=[dict(pad_token_id=5), dict(pad_token_id=-1)],
    bos_token_id=[dict(bos_token_id=7), dict(bos_token_id=None)],
    eos_token_id=[dict(eos_token_id=7), dict(eos_token_id=None), dict(eos_token_id=[5, 6])],
    pretraining_tp=[dict(pretraining_tp=2)],
    tie_word_embeddings=[dict(tie_word_embeddings=True)],
    rope_parameters=[dict(rope_parameters=rope) for rope in ROPES]
    + [dict(rope_scaling=rope) for rope in ROPES]
    + [
        dict(rope_theta=500.0),
        dict(rope_theta=500.0, rope_scaling=YARN),
        dict(rope_parameters=YARN, original_max_position_embeddings=32),
        dict(rope_parameters=dict(rope_type='linear', factor=3.0), partial_rotary_factor=0.5),
        dict(partial_rotary_factor=0.5),
    ],
    rope_interleave=[dict(rope_interleave=v) for v in (False, None)],
    attention_bias=[dict(attention_bias=True)],
    attention_dropout=[dict(attention_dropout=0.5)],
    mlp_bias=[dict(mlp_bias=True)],
    mlp_layer_types=[
        dict(mlp_layer_types=DENSE),
        dict(mlp_layer_types=['sparse'] * 3),
        dict(mlp_layer_types=['dense'] * 3),
        dict(mlp_layer_types=['sparse', 'dense', 'sparse']),
        dict(mlp_layer_types=[*DENSE, 'dense']),
    ],
    num_mtp_layers=[dict(num_mtp_layers=2)],
    index_topk=[dict(index_topk=5), dict(index_topk=100), dict(index_topk=None)],
    index_n_heads=[dict(index_n_heads=15)],
    index_head_dim=[dict(index_head_dim=12), dict(index_head_dim=4), dict(index_head_dim=2)],
    indexer_types=[
        dict(indexer_types=['full', 'shared', 'full']),
        dict(indexer_types=['full'] * 3),
        dict(indexer_types=['shared', 'full', 'full']),
        dict(indexer_types=['full']),
    ],
    layer_types=[dict(layer_types=['indexed_attention'] * 3), dict(layer_types=['other'] * 3)],
    head_dim=[dict(head_dim=4), dict(head_dim=10), dict(head_dim=7)],
    transformers_version=[dict(transformers_version='4.0')],
    architectures=[dict(architectures=['OtherModel'])],
    output_hidden_states=[dict(output_hidden_states=True)],
    return_dict=[dict(return_dict=False)],
    dtype=[dict(dtype='bfloat16')],
    chunk_size_feed_forward=[dict(chunk_size_feed_forward=3)],
    is_encoder_decoder=[dict(is_encoder_decoder=True)],
    id2label=[dict(id2label={'0': 'a', '1': 'b', '2': 'c'})],
    label2id=[dict(label2id=dict(a=0, b=1, c=2))],
    problem_type=[dict(problem_type='regression', num_labels=1)],
)
# Keys that are no field of the class, and are read all the same, or could be
MORE_KEYS = dict(
    per_layer_config=[dict(per_layer_config={'0': dict(hidden_act='gelu')})],
    num_local_experts=[dict(num_local_experts=12)],
    num_experts=[dict(num_experts=12)],
    num_shared_experts=[dict(num_shared_experts=2)],
    qk_head_dim=[dict(qk_head_dim=11)],
    index_topk_freq=[dict(index_topk_freq=2), dict(index_topk_freq=3, index_skip_topk_offset=1)],
    index_topk_pattern=[dict(index_topk_pattern='FSS'), dict(index_topk_pattern='FFF')],
    indexer_rope_interleave=[dict(indexer_rope_interleave=v) for v in (False, True)],
    moe_layer_freq=[dict(moe_layer_freq=2)],
    head_dim=CHANGES['head_dim'],
    first_k_dense_replace=CHANGES['first_k_dense_replace'],
)
# Fields that change nothing that is computed, and why
NO_EFFECT = dict(
    output_router_logits='whether more is returned',
    use_cache='whether a cache is returned',
    output_hidden_states='whether more is returned',
    return_dict='the form of what is returned',
    attention_dropout='acts in training alone, and Eva has none',
    initializer_range='of fresh weights',
    embedding_initializer_range='of fresh weights',
    max_position_embeddings='a limit, which is no part of the function',
    bos_token_id='begins texts',
    eos_token_id='ends texts',
    pad_token_id='fills up batches; only the gradient of its row differs',
    pretraining_tp='not read',
    num_mtp_layers='modules that these files do not hold',
    transformers_version='says who wrote the file',
    architectures='the classes of the file',
    dtype='of tensors of several types, where a file has them',
    chunk_size_feed_forward='not read by these models',
    is_encoder_decoder='not read by these models',
    id2label='of classifiers',
    label2id='of classifiers',
    problem_type='of classifiers',
)
IDS = torch.arange(80).view(2, 40).mul(7).remainder(59)


def peer_logits(found, state=None):
    "Logits of the peer, with the weights of another if they fit; None where it refuses or fails"
    try:
        peer = peer_of(found)
        if state is not None and {n: t.shape for n, t in peer.state_dict().items()} == {
            n: t.shape for n, t in state.items()
        }:
            peer.load_state_dict(state)
        else:
            state = None
        with torch.no_grad():
            logits = peer(IDS)[0]
        return (peer, logits, state is not None) if logits.isfinite().all() else None
    except Exception:
        return None


def fields_of(model_type):
    "The names of the fields of the peer's class"
    peer = AutoConfig.for_model(**for_peer(walk_base(model_type)))
    return [f.name for f in dataclasses.fields(peer) if f.name != 'model_type']


def test_the_walk_knows_every_field():
    for model_type in PEERS:
        names = fields_of(model_type)
        assert len(names) > 20
        assert set(names) <= CHANGES.keys(), set(names) - CHANGES.keys()


def outcome(found, base, changes, folder):
    "equal, refused, or by how much the logits differ; and whether the peer's own changed"
    found = found | changes
    if found['model_type'] == 'mistral4' and 'rope_parameters' not in changes:
        widths = found['qk_rope_head_dim'], found['qk_nope_head_dim']
        share = dict(partial_rotary_factor=widths[0] / sum(widths))
        found['rope_parameters'] = found['rope_parameters'] | share
    theirs = peer_logits(found, base[0].state_dict())
    if theirs is None:
        return 'the peer fails', None
    peer, want, same_weights = theirs
    peer.save_pretrained(folder)
    changed = not same_weights or relative(want, base[1]) > 1e-9
    try:
        ours = read_as(folder, found)
    except ValueError as e:
        assert len(str(e)) > 20
        return 'refused', changed
    with torch.no_grad():
        off = relative(ours(IDS), want)
    return ('equal' if off < 1e-5 else off), changed


@pytest.mark.filterwarnings('ignore')
@pytest.mark.parametrize('model_type', PEERS)
def test_every_field_is_read_or_refused_or_without_effect(model_type, tmp_path):
    torch.set_num_threads(1)
    found = walk_base(model_type)
    base = peer_logits(found)
    assert base is not None
    seen = {}
    walked = {name: CHANGES[name] for name in fields_of(model_type)}
    walked |= {name: values for name, values in MORE_KEYS.items() if name not in walked}
    for name, values in walked.items():
        for i, changes in enumerate(values):
            result, changed = outcome(found, base, changes, tmp_path / f'{name}-{i}')
            seen[name, i] = result
            assert result in ('equal', 'refused', 'the peer fails'), (name, changes, result)
            if name in NO_EFFECT and changed is not None:
                assert not changed, f'{name} has an effect'
                assert result == 'equal' or name in ('eos_token_id', 'bos_token_id'), (name, result)
    # One has a single right value, with the other the peer itself fails.
    for name in set(fields_of(model_type)) - {'num_key_value_heads', 'return_dict'}:
        results = {seen[name, i] for i in range(len(CHANGES[name]))}
        assert results & {'equal', 'refused'}, f'{name}: nothing was compared'
    assert sum(result == 'equal' for result in seen.values()) > 40


@pytest.mark.parametrize('model_type', PEERS)
def test_a_field_that_is_not_read_would_be_seen(model_type, tmp_path):
    "The negative control of the walk: a file from which one changed field was dropped"
    found = walk_base(model_type)
    dropped = dict(
        rms_norm_eps=0.1,
        hidden_act='gelu',
        routed_scaling_factor=3.0,
        rope_interleave=False,
        norm_topk_prob=model_type == 'deepseek_v2',
    )
    if model_type == 'deepseek_v2':
        del dropped['rope_interleave'], dropped['norm_topk_prob']  # which it does not read
    if model_type == 'youtu':
        del dropped['routed_scaling_factor'], dropped['norm_topk_prob']
    if model_type in SPARSE:
        del dropped['rope_interleave']
        dropped['index_topk'] = 3
    for name, value in dropped.items():
        theirs = peer_logits(found | {name: value})
        assert theirs is not None
        theirs[0].save_pretrained(tmp_path / name)
        with torch.no_grad():
            off = relative(read_as(tmp_path / name, found)(IDS), theirs[1])
        assert off > 1e-5, name


# ---- types that are close ----


def test_types_that_are_close_are_refused_with_what_they_have():
    for name in OTHER_TYPES:
        with pytest.raises(ValueError, match=f"model_type='{name}': has .*Eva reads deepseek_v3"):
            Config.from_dict(walk_base('deepseek_v3') | dict(model_type=name))
    with pytest.raises(ValueError, match="model_type='llama': must be one of deepseek_v3"):
        Config.from_dict(dict(model_type='llama'))
