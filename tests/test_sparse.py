"""Sparse attention against `transformers`, and every route of it against every other

Models of DeepSeek-V3.2 and of GLM (`glm_moe_dsa`), at texts longer than the positions they choose.
"""

import copy
import itertools
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging

from eva.attention.kv_cache import LatentCache
from eva.attention.rope import rope_cos_sin
from eva.attention.sparse import SparseMLA, select_topk
from eva.checkpoints.conversion import convert_checkpoint
from eva.checkpoints.gguf import convert_to_gguf
from eva.checkpoints.pretrained import load_pretrained, save_pretrained
from eva.config import Config
from eva.data.decode import Document
from eva.data.text import write_tokens
from eva.data.tokenizer import train_tokenizer
from eva.generation.engine import Engine
from eva.generation.generate import generate
from eva.generation.session import DecodingSession
from eva.model.transformer import DeepSeekV3
from eva.training.config import TrainConfig
from eva.training.sparse import score_all
from eva.training.trainer import Trainer

logging.set_verbosity_error()
logging.disable_progress_bar()

SEQ = 40
SIZES = dict(
    vocab_size=60,
    hidden_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=4,
    q_lora_rank=24,
    kv_lora_rank=20,
    qk_nope_head_dim=12,
    qk_rope_head_dim=8,
    v_head_dim=10,
    intermediate_size=40,
    moe_intermediate_size=24,
    first_k_dense_replace=1,
    n_routed_experts=8,
    n_shared_experts=1,
    num_experts_per_tok=2,
    n_group=2,
    topk_group=1,
    max_position_embeddings=128,
    initializer_range=0.1,
    bos_token_id=1,
    eos_token_id=2,
    index_topk=7,
    index_n_heads=9,
    index_head_dim=20,
)
YARN = dict(
    rope_type='yarn',
    rope_theta=5000.0,
    factor=4.0,
    original_max_position_embeddings=32,
    mscale=1.0,
    mscale_all_dim=0.8,
)
# Two odd configurations of each type
FILES = {
    'v32': SIZES | dict(model_type='deepseek_v32'),
    'v32 with YaRN': SIZES
    | dict(
        model_type='deepseek_v32',
        index_head_dim=8,  # all features are rotated
        index_n_heads=13,  # with few heads, scores are often equal
        index_topk=11,
        rope_parameters=YARN,
        first_k_dense_replace=0,
        n_group=1,
        rms_norm_eps=1e-5,
    ),
    'glm': SIZES | dict(model_type='glm_moe_dsa'),
    'glm, shared layers': SIZES
    | dict(
        model_type='glm_moe_dsa',
        num_hidden_layers=5,
        indexer_types=['full', 'shared', 'full', 'shared', 'shared'],
        index_topk=5,
        rope_parameters=dict(rope_type='default', rope_theta=30000.0),
        tie_word_embeddings=True,
    ),
}


def make_peer(found, seed=0):
    "A model of `transformers` in which nothing is zero or one by default"
    torch.manual_seed(seed)
    peer = AutoModelForCausalLM.from_config(
        AutoConfig.for_model(**copy.deepcopy(found)), attn_implementation='eager'
    )
    with torch.no_grad():
        for name, tensor in itertools.chain(peer.named_parameters(), peer.named_buffers()):
            if name.endswith(('norm.weight', 'layernorm.weight')):
                tensor.uniform_(0.5, 1.5)
            elif name.endswith(('e_score_correction_bias', 'k_norm.bias')):
                tensor.normal_(std=0.3)
            elif tensor.dim() > 1 and tensor.is_floating_point():
                tensor.normal_(std=0.15)
    return peer.eval()


def opened(peer, folder):
    peer.save_pretrained(folder)
    return load_pretrained(folder, dtype=torch.float32)


def make_ids(batch=2, seq=SEQ, seed=1):
    torch.manual_seed(seed)
    return torch.randint(3, SIZES['vocab_size'], (batch, seq))


def make_model(name, **changes):
    "A model of Eva alone, in float64, with an MTP module"
    cfg = Config.from_dict(FILES[name] | dict(num_nextn_predict_layers=1)).replace(**changes)
    torch.manual_seed(0)
    model = DeepSeekV3(cfg).double().eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2) if parameter.dim() > 1 else None
    return model


# ---- transformers ----


@pytest.mark.parametrize('name', FILES)
def test_logits_and_gradients_are_those_of_the_peer(name, tmp_path):
    peer = make_peer(FILES[name])
    model = opened(peer, tmp_path / 'peer')
    assert model.cfg.index_topk < SEQ // 3
    ids = make_ids()
    want = peer(ids).logits
    got = model(ids)
    assert_close(got, want, atol=1e-5, rtol=1e-5)
    labels = ids.clone()
    peer(ids, labels=labels).loss.backward()
    model.train()
    model(ids, labels=labels).backward()
    theirs = {n: p.grad for n, p in peer.named_parameters() if p.grad is not None}
    compared = 0
    for key, parameter in model.named_parameters():
        if '.indexer.' in key:
            assert parameter.grad is None and theirs.get(key) is None, key
        elif key in theirs:
            assert_close(parameter.grad, theirs[key], atol=1e-5, rtol=1e-4, msg=key)
            compared += 1
    assert compared > 20


@pytest.mark.parametrize('name', FILES)
def test_a_field_read_wrongly_is_seen(name, tmp_path):
    "The order of rotated pairs, the number of positions, and which layers share"
    peer = make_peer(FILES[name])
    peer.save_pretrained(tmp_path)
    ids = make_ids()
    want = peer(ids).logits
    model = load_pretrained(tmp_path, dtype=torch.float32)
    cfg = model.cfg
    wrong = [
        dict(index_rope_interleave=not cfg.index_rope_interleave),
        dict(index_topk=cfg.index_topk + 1),
        dict(index_topk=cfg.index_topk - 1),
    ]
    for changes in wrong:
        other = DeepSeekV3(cfg.replace(**changes)).eval()
        other.load_state_dict(model.state_dict())
        assert (other(ids) - want).abs().max() > 1e-2, changes


@pytest.mark.parametrize('name', FILES)
def test_decoding_is_that_of_the_peer(name, tmp_path):
    "Greedy, behind prompts shorter and longer than what is chosen, with left padding"
    peer = make_peer(FILES[name])
    model = opened(peer, tmp_path)
    ids = make_ids(3, 21, seed=5)
    mask = torch.ones_like(ids)
    mask[1, :9] = 0
    mask[2, :17] = 0
    settings = dict(max_new_tokens=24, do_sample=False)
    want = peer.generate(ids, attention_mask=mask, eos_token_id=None, pad_token_id=0, **settings)
    got = generate(model, ids, 24, attention_mask=mask, eos_token_id=())
    assert torch.equal(got[:, 21:], want[:, 21:])


@pytest.mark.parametrize('name', FILES)
def test_a_folder_written_here_opens_there(name, tmp_path):
    model = opened(make_peer(FILES[name], seed=3), tmp_path / 'peer')
    save_pretrained(model, tmp_path / 'own')
    peer = AutoModelForCausalLM.from_pretrained(tmp_path / 'own', dtype=torch.float32).eval()
    ids = make_ids(seed=4)
    assert_close(model(ids), peer(ids).logits, atol=1e-5, rtol=1e-5)
    back = load_pretrained(tmp_path / 'own')
    assert back.cfg == model.cfg
    for key, tensor in model.state_dict().items():
        assert torch.equal(back.state_dict()[key], tensor), key


@torch.no_grad()
def test_where_the_peer_chooses_otherwise_scores_are_equal(tmp_path):
    """With one head half of the scores are exact zeros

    The peer takes any of them and Eva the earliest; the chosen scores are the same."""
    peer = make_peer(FILES['v32'] | dict(index_n_heads=1))
    model = opened(peer, tmp_path)
    ids = make_ids()
    theirs = []
    peer.model.layers[0].self_attn.indexer.register_forward_hook(lambda *o: theirs.append(o[2]))
    peer(ids)
    attention = model.blocks[0].self_attn
    h = model.blocks[0].input_layernorm(model.model['embed_tokens'](ids))
    rope = rope_cos_sin(model.cfg, torch.arange(SEQ)[None])
    scores = score_all(attention, h, rope)
    visible = torch.ones(2, SEQ, SEQ, dtype=torch.bool).tril()
    ours = select_topk(scores, visible, 7)
    other = torch.zeros_like(ours).scatter(-1, theirs[0].long(), True) & visible
    assert (ours != other).any()
    hidden = scores.masked_fill(~ours, -torch.inf), scores.masked_fill(~other, -torch.inf)
    assert_close(*(o.sort(-1).values for o in hidden))


def test_more_positions_than_there_are_is_dense(tmp_path):
    "As in the peer, which chooses min(k, T)"
    peer = make_peer(FILES['v32'] | dict(index_topk=100))
    model = opened(peer, tmp_path)
    ids = make_ids()
    assert_close(model(ids), peer(ids).logits, atol=1e-5, rtol=1e-5)
    dense = DeepSeekV3(model.cfg.replace(model_type='deepseek_v3', index_topk=None)).eval()
    dense.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(dense(ids), model(ids))


# ---- routes ----


def in_pieces(model, ids, sizes, kind=LatentCache, **marks):
    cache = kind(model.cfg, len(ids), SEQ, dtype=torch.float64)
    outs = []
    start = 0
    for size in sizes:
        end = start + size
        seen = {k: v[:, :end] for k, v in marks.items()}
        outs.append(model(ids[:, start:end], cache, **seen))
        start = end
    return torch.cat(outs, 1)


def some_marks():
    padding = torch.ones(2, SEQ, dtype=torch.long)
    padding[1, :13] = 0
    documents = (torch.arange(SEQ) >= 17).long().expand(2, SEQ)
    return {
        'nothing': {},
        'padding': dict(attention_mask=padding),
        'documents': dict(document_ids=documents),
        'both': dict(attention_mask=padding, document_ids=documents),
    }


@pytest.mark.parametrize('name', FILES)
@pytest.mark.parametrize('marks', some_marks())
@torch.no_grad()
def test_pieces_and_steps_give_the_logits_of_one_pass(name, marks):
    model = make_model(name)
    marks = some_marks()[marks]
    ids = make_ids()
    want = model(ids, **marks)
    real = marks.get('attention_mask', torch.ones_like(ids)).bool()
    for sizes in ([40], [25, 15], [3, 30, 4, 3], [1] * 40, [34, 1, 1, 2, 2]):
        assert_close(in_pieces(model, ids, sizes, **marks)[real], want[real])


@pytest.mark.parametrize('name', FILES)
@torch.no_grad()
def test_a_document_does_not_notice_what_stands_before_it(name):
    model = make_model(name)
    ids = make_ids()
    marks = some_marks()
    packed = model(ids, **marks['documents'])
    assert_close(packed[:, 17:], model(ids[:, 17:]))
    padded = model(ids, **marks['padding'])
    assert_close(padded[1:, 13:], model(ids[1:, 13:]))
    assert not torch.allclose(model(ids)[:, 17:], model(ids[:, 17:]))


@pytest.mark.parametrize('name', FILES)
@torch.no_grad()
def test_a_prefix_is_seen_both_ways(name):
    model = make_model(name)
    ids = make_ids()
    prefix = (torch.arange(SEQ) < 20).expand(2, SEQ)
    other = ids.clone()
    other[:, 19] = 59
    seen = [model(o, prefix_mask=prefix)[:, :19] for o in (ids, other)]
    assert not torch.allclose(*seen)
    assert_close(model(ids)[:, :19], model(other)[:, :19])


@pytest.mark.parametrize('name', FILES)
def test_text_does_not_depend_on_company_or_drafts(name):
    "Rows of several lengths in one session, with and without speculative decoding"
    model = make_model(name)
    ids = make_ids(3, 22)
    mask = torch.ones_like(ids)
    mask[0, :11] = 0
    mask[2, :5] = 0
    alone = [
        generate(model, ids[i : i + 1, mask[i] == 1], 15, eos_token_id=())[0, -15:]
        for i in range(3)
    ]
    for speculate in (False, 1, 3):
        made = generate(model, ids, 15, attention_mask=mask, speculate=speculate, eos_token_id=())
        assert torch.equal(made[:, -15:], torch.stack(alone)), speculate


@pytest.mark.parametrize('name', FILES)
@torch.inference_mode()
def test_a_session_can_be_rewound_and_forked(name):
    model = make_model(name)
    ids = make_ids(2, 36)
    session = DecodingSession(model, 60, batch=2, depths=1)
    session.read(ids[:, :30])
    copy_of_one = session.fork([1])
    session.rewind(torch.tensor([12, 25]))
    mask = torch.ones(2, 18, dtype=torch.bool)
    mask[1, :13] = False
    rest = torch.zeros(2, 18, dtype=torch.long)
    rest[0] = ids[0, 12:30]
    rest[1, 13:] = ids[1, 25:30]
    session.read(rest, mask)
    want = model.hidden(ids)
    assert_close(session.read(ids[:, 30:33]), want[:, 32])
    assert_close(copy_of_one.read(ids[1:, 30:36]), want[1:, 35])
    state = session.prefill(ids)
    assert_close(state, want[:, 35])


@torch.inference_mode()
def test_gaps_are_closed_in_index_keys_too():
    "A row that was shortened leaves gaps, which close before the next tokens are read"
    model = make_model('v32')
    ids = make_ids(2, 36)
    session = DecodingSession(model, 60, batch=2, extra_slots=0)
    session.read(ids[:, :30])
    session.rewind(torch.tensor([12, 25]))
    slots = session.cache.length
    rest = torch.zeros(2, 18, dtype=torch.long)
    mask = torch.ones(2, 18, dtype=torch.bool)
    rest[0], rest[1, 13:] = ids[0, 12:30], ids[1, 25:30]
    mask[1, :13] = False
    session.read(rest, mask)
    assert session.cache.length == slots + 18
    state = session.read(ids[:, 30:36])  # closes the gaps first
    assert session.cache.length == 36
    assert_close(state, model.hidden(ids)[:, 35])


@torch.no_grad()
def test_equal_scores_are_settled_alike_in_every_route():
    "With one head, half of the scores are exact zeros"
    model = make_model('v32', index_n_heads=1)
    ids = make_ids()
    want = model(ids)
    for sizes in ([40], [25, 15], [1] * 40, [34, 1, 1, 2, 2]):
        assert_close(in_pieces(model, ids, sizes), want)


@pytest.mark.filterwarnings('ignore')
def test_compiled_is_the_same_function():
    torch._dynamo.reset()
    model = make_model('glm, shared layers')
    ids = make_ids()
    compiled = torch.compile(model, backend='aot_eager')
    assert_close(compiled(ids), model(ids))


def test_other_caches_are_refused():
    sparse = make_model('v32')
    dense = DeepSeekV3(sparse.cfg.replace(model_type='deepseek_v3', index_topk=None)).double()
    cache = LatentCache(dense.cfg, 2, SEQ, dtype=torch.float64)
    with pytest.raises(ValueError, match='index keys of 0 layers: this model has an indexer in 3'):
        sparse(make_ids(), cache)


# ---- files ----


def change_tensors(folder, change):
    "Write a folder's tensors anew"
    tensors = load_file(folder / 'model.safetensors')
    save_file(change(tensors), folder / 'model.safetensors', metadata=dict(format='pt'))


def test_half_an_indexer_is_refused(tmp_path):
    model = make_model('v32', num_nextn_predict_layers=0).float()
    for lost in ('wq_b.weight', 'wk.weight', 'k_norm.weight', 'k_norm.bias', 'weights_proj.weight'):
        folder = tmp_path / lost
        save_pretrained(model, folder)
        name = f'model.layers.1.self_attn.indexer.{lost}'
        change_tensors(folder, lambda found: {k: v for k, v in found.items() if k != name})
        with pytest.raises(ValueError, match=f'{name}: missing.*indexer'):
            load_pretrained(folder)


def test_an_indexer_that_the_config_does_not_know_is_refused(tmp_path):
    model = make_model('v32', num_nextn_predict_layers=0).float()
    save_pretrained(model, tmp_path)
    about = json.loads((tmp_path / 'config.json').read_text())
    about |= dict(model_type='deepseek_v3', architectures=['DeepseekV3ForCausalLM'])
    (tmp_path / 'config.json').write_text(json.dumps(about))
    with pytest.raises(ValueError, match='an indexer.*model_type'):
        load_pretrained(tmp_path)


def test_weights_know_their_places():
    model = make_model('glm, shared layers')
    found = [n for n in model.state_dict() if '.indexer.' in n]
    layers = {int(n.split('.')[2]) for n in found}
    assert layers == {0, 2, 5}  # the full ones, and the MTP module
    assert len(found) == 3 * 5
    shared = [m for m in model.modules() if isinstance(m, SparseMLA) and m.indexer is None]
    assert len(shared) == 3


# ---- training ----


@pytest.fixture(scope='module')
def streams(tmp_path_factory):
    folder = tmp_path_factory.mktemp('tokens')
    text = 'for i in range(10):\n    print(i, i*i)\n' * 40
    tok = train_tokenizer([text], 300)
    train, held = (
        write_tokens(folder / f'{n}.npy', [Document(n, t)], tok)
        for n, t in [('train', text * 6), ('held', text[:900])]
    )
    changes = {name: SIZES[name] for name in SIZES if name.startswith(('index', 'qk_', 'hidden'))}
    cfg = Config.from_preset(
        'mini',
        vocab_size=tok.get_vocab_size(),
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        moe_intermediate_size=16,
        model_type='deepseek_v32',
        **changes,
    )
    return cfg, train, held


def train_for(streams, folder, steps, total=4, **changes):
    cfg, train, held = streams
    sizes = dict(batch_size=4, micro_batch=2, seq_len=32, eval_every=2, save_every=2)
    torch.manual_seed(0)
    trainer = Trainer(
        DeepSeekV3(cfg), train, held, TrainConfig(steps=total, **sizes, **changes), folder
    )
    before = {n: w.clone() for n, w in trainer.model.state_dict().items()}
    trainer.resume()
    rows = []

    def watch(row):
        rows.append(row)
        if row['step'] == steps:
            trainer.stop = 'SIGINT'

    trainer.fit(watch)
    return trainer.model, before, rows


@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp8'])
def test_both_stages_learn_in_every_precision(precision, streams, tmp_path):
    "Model and indexers move, those of the MTP module too"
    model, before, rows = train_for(streams, tmp_path, 4, precision=precision, mtp_batch_ratio=1.0)
    assert all(row['index_loss'] >= 0 for row in rows) and len(rows) == 4
    for name, weight in model.state_dict().items():
        assert weight.isfinite().all(), name
        if name.endswith(('proj.weight', 'wk.weight', 'wq_b.weight', 'k_norm.bias')):
            assert not torch.equal(weight, before[name].to(weight.dtype)), name


def test_a_resumed_run_is_the_same(streams, tmp_path):
    whole = train_for(streams, tmp_path / 'whole', 4)[0].state_dict()
    train_for(streams, tmp_path / 'cut', 2)
    resumed = train_for(streams, tmp_path / 'cut', 4)[0].state_dict()
    for name, weight in whole.items():
        assert torch.equal(resumed[name], weight), name


# ---- what cannot carry an indexer ----


def test_the_engine_refuses_before_it_begins():
    with pytest.raises(ValueError, match='sparse attention .*use `generate`'):
        Engine(make_model('v32'), pages=8)


def test_gguf_is_refused_before_anything_is_written(tmp_path):
    save_pretrained(make_model('v32', num_nextn_predict_layers=0).float(), tmp_path / 'model')
    with pytest.raises(ValueError, match='index_topk=7: its attention here is dense'):
        convert_to_gguf(tmp_path / 'model', tmp_path / 'model.gguf')
    assert not (tmp_path / 'model.gguf').exists()


def test_fp8_folders_keep_the_choices_of_the_rounded_weights(tmp_path):
    "The queries and keys of an indexer are stored in blocks, its weights and norm are not"
    model = make_model('v32', num_nextn_predict_layers=0, index_head_dim=32).float()
    save_pretrained(model, tmp_path / 'model')
    convert_checkpoint(tmp_path / 'model', tmp_path / 'fp8', to='fp8')
    stored = load_file(tmp_path / 'fp8' / 'model.safetensors')
    indexer = 'model.layers.1.self_attn.indexer'
    kinds = {n: stored[f'{indexer}.{n}.weight'].dtype for n in ('wq_b', 'wk', 'weights_proj')}
    assert kinds['wq_b'] == kinds['wk'] == torch.float8_e4m3fn
    assert kinds['weights_proj'] != torch.float8_e4m3fn
    convert_checkpoint(tmp_path / 'fp8', tmp_path / 'back', to='fp32')
    back = load_pretrained(tmp_path / 'back')
    eight = load_pretrained(tmp_path / 'fp8', dtype=torch.float32)
    ids = make_ids()
    assert_close(back(ids), eight(ids))
