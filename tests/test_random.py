"Random sizes and inputs, where the chapters show chosen ones"

import math

import numpy as np
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from eva.attention.kv_cache import LatentCache
from eva.config import PRESETS, Config
from eva.data.decode import Document
from eva.data.text import TokenStream, write_tokens
from eva.data.tokenizer import train_tokenizer
from eva.kernels.permutation import layout
from eva.model.transformer import DeepSeekV3

quick = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))
sizes = st.integers(1, 6)


@st.composite
def configs(draw):
    "A small model with every branch"
    groups, per_group = draw(st.sampled_from([(1, 4), (2, 3), (4, 2)]))
    topk = draw(st.integers(1, groups))
    layers = draw(st.integers(1, 3))
    return Config.from_preset(
        'mini',
        vocab_size=40,
        bos_token_id=0,
        eos_token_id=1,
        hidden_size=draw(st.integers(3, 20)),
        num_hidden_layers=layers,
        num_attention_heads=draw(sizes),
        q_lora_rank=draw(st.one_of(st.none(), sizes)),
        kv_lora_rank=draw(sizes),
        qk_nope_head_dim=draw(sizes),
        qk_rope_head_dim=2 * draw(st.integers(1, 4)),
        v_head_dim=draw(sizes),
        intermediate_size=draw(sizes),
        moe_intermediate_size=draw(sizes),
        first_k_dense_replace=draw(st.integers(0, layers)),
        n_routed_experts=groups * per_group,
        n_group=groups,
        topk_group=topk,
        n_shared_experts=draw(st.integers(0, 2)),
        num_experts_per_tok=draw(st.integers(1, topk * per_group)),
        num_nextn_predict_layers=draw(st.integers(0, 2)),
        tie_word_embeddings=draw(st.booleans()),
        initializer_range=0.4,
        max_position_embeddings=64,
        attention_bias=draw(st.booleans()),
        rope_interleave=draw(st.booleans()),
        post_mlp_layernorm=draw(st.booleans()),
        rope_scaling=draw(
            st.sampled_from(
                [
                    None,
                    dict(type='linear', factor=2.5),
                    dict(
                        type='llama3',
                        factor=8,
                        low_freq_factor=1,
                        high_freq_factor=4,
                        original_max_position_embeddings=16,
                    ),
                    dict(
                        type='yarn',
                        factor=4,
                        original_max_position_embeddings=16,
                        mscale=1.0,
                        mscale_all_dim=0.7,
                    ),
                ]
            )
        ),
    )


@st.composite
def sparse_configs(draw):
    "The same with an indexer in every layer, or in some"
    cfg = draw(configs().filter(lambda cfg: cfg.q_lora_rank is not None))
    is_glm = draw(st.booleans())
    types = ['full'] + [draw(st.sampled_from(['full', 'shared']))] * (cfg.num_hidden_layers - 1)
    return cfg.replace(
        model_type='glm_moe_dsa' if is_glm else 'deepseek_v32',
        index_topk=draw(st.integers(1, 9)),
        index_n_heads=draw(sizes),
        index_head_dim=cfg.qk_rope_head_dim + draw(st.integers(0, 3)),
        index_rope_interleave=is_glm,
        indexer_types=types if 'shared' in types and is_glm else None,
    )


any_config = st.one_of(configs(), sparse_configs())


@quick
@given(any_config, st.integers(0, 999), st.lists(st.integers(1, 6), min_size=1, max_size=5))
def test_any_model_is_one_function_however_it_is_fed(cfg, seed, chunks):
    torch.manual_seed(seed)
    model = DeepSeekV3(cfg).double().eval()
    ids = torch.randint(40, (2, sum(chunks)))
    with torch.no_grad():
        full = model(ids)
        cache = LatentCache(cfg, 2, sum(chunks), dtype=torch.float64)
        parts = torch.cat([model(c, cache) for c in ids.split(chunks, 1)], 1)
        assert_close(parts, full, atol=1e-9, rtol=1e-9)
        pad = torch.cat((torch.zeros(2, 3).long(), ids), 1)
        mask = torch.cat((torch.zeros(2, 3), torch.ones(ids.shape)), 1)
        assert_close(model(pad, attention_mask=mask)[:, 3:], full, atol=1e-9, rtol=1e-9)


@quick
@given(any_config)
def test_counts_are_those_of_the_tensors(cfg):
    with torch.device('meta'):
        model = DeepSeekV3(cfg)
    assert sum(p.numel() for p in model.parameters()) == cfg.num_params(mtp=True)[0]
    assert LatentCache(cfg, 1, 2, dtype=torch.float32).nbytes == 2 * cfg.kv_bytes_per_token(4)
    assert Config.from_dict(cfg.to_dict()) == cfg


@quick
@given(
    st.integers(1, 40),
    st.integers(1, 9),
    st.integers(1, 4),
    st.sampled_from([1, 2, 64]),
    st.integers(0, 999),
)
def test_layout_places_every_choice_once(tokens, experts, k, multiple, seed):
    k = min(k, experts)
    g = torch.Generator().manual_seed(seed)
    indices = torch.rand(tokens, experts, generator=g).topk(k)[1]
    source, place, ends = layout(indices, experts, multiple)
    assert torch.equal(
        source[place], torch.arange(tokens)[:, None].expand(-1, k)
    )  # each choice finds its token
    assert len(place.unique()) == place.numel()  # and no two share a row
    starts = torch.cat((ends.new_zeros(1), ends[:-1]))
    assert (
        ((place >= starts[indices]) & (place < ends[indices])).all()
        and (ends % multiple == 0).all()
        or multiple == 1
    )


@quick
@given(
    st.dictionaries(
        st.sampled_from(list(Config.from_preset('v3').to_dict())),
        st.one_of(
            st.none(),
            st.integers(-(10**12), 10**12),
            st.floats(),
            st.text(max_size=5),
            st.booleans(),
            st.lists(st.integers(), max_size=2),
            st.dictionaries(
                st.sampled_from(
                    ['type', 'factor', 'mscale', 'beta_fast', 'original_max_position_embeddings']
                ),
                st.one_of(st.none(), st.floats(), st.text(max_size=4)),
                max_size=3,
            ),
        ),
        min_size=1,
        max_size=4,
    ),
    st.sampled_from(list(PRESETS)),
)
def test_a_damaged_config_is_refused_or_right(damage, name):
    try:
        cfg = Config.from_dict(Config.from_preset(name).to_dict() | damage)
    except ValueError as e:
        assert len(str(e)) > 10
        return
    assert cfg.num_params()[0] > 0 and math.isfinite(cfg.rope_theta)


@quick
@given(
    st.integers(20, 200),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(1, 5),
    st.integers(0, 50),
)
def test_windows_of_an_epoch_tile_the_stream(tmp_path_factory, n, seq, extra, batch, seed):
    path = tmp_path_factory.mktemp('stream')
    tok = train_tokenizer(['ab'], 258)
    stream = write_tokens(
        path / 's.npy', [Document('d', ''.join(chr(97 + i % 26) for i in range(n)))], tok
    )
    if (len(stream) - extra) // seq < 1:
        return
    rows = torch.cat([stream.batch(i * batch, batch, seq, extra, seed) for i in range(4)])
    again = torch.cat(
        [
            TokenStream(path / 's.npy').batch(i * batch, batch, seq, extra, seed)
            for i in (3, 2, 1, 0)
        ][::-1]
    )
    assert torch.equal(rows, again) and rows.shape == (4 * batch, seq + extra)
    whole = stream.tokens.astype(np.int64).tobytes()
    assert all(r.numpy().tobytes() in whole for r in rows)
