"""`generate` follows the conventions of transformers: the same calls give the same tokens

The peer has the same weights. Each option is tried with one prompt and with two, with padding on
the left and without, with drafts and without. Where Eva differs on purpose, a test says so.
"""

import inspect
import json
import threading
import warnings
from dataclasses import replace

import pytest
import torch
import transformers
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    MaxLengthCriteria,
    PreTrainedTokenizerFast,
    StoppingCriteriaList,
    TextIteratorStreamer,
    TextStreamer,
)
from transformers.generation.streamers import BaseStreamer

import eva.generation.sampling as sampling
from eva.config import Config
from eva.data.tokenizer import train_tokenizer
from eva.generation.generate import generate, stream
from eva.generation.sampling import SamplingParams
from eva.generation.stopping import DEFAULT, GenerationStats
from eva.model.generation_config import GenerationConfig
from eva.model.transformer import DeepSeekV3

VOCAB = 260
SEQ = 7
PAD = 3


def quiet(model):
    "Let blocks add little, so that the MTP module often drafts what the main model says"
    zeros = torch.nn.init.zeros_
    for block in [*model.blocks, *model.mtp]:
        torch.nn.init.normal_(block.self_attn.o_proj.weight, std=0.002)
        is_dense = not hasattr(block.mlp, 'experts')
        zeros((block.mlp if is_dense else block.mlp.shared_experts).down_proj.weight)
        if not is_dense:
            zeros(block.mlp.experts.down_proj)
    eye = torch.eye(64)
    for module in model.mtp:
        zeros(module.self_attn.o_proj.weight)
        module.eh_proj.weight.data.copy_(torch.cat((eye, torch.zeros(64, 64)), 1))
    return model


@pytest.fixture(scope='module')
def models():
    "A model with an MTP module, and its peer without"
    torch.manual_seed(4)
    sizes = dict(vocab_size=VOCAB, hidden_size=64, num_hidden_layers=2, initializer_range=0.15)
    cfg = Config.from_preset('mini', **sizes, max_position_embeddings=80)
    ours = quiet(DeepSeekV3(cfg)).double().eval()
    fields = {k: v for k, v in cfg.to_dict().items() if k != 'architectures'}
    peer = DeepseekV3ForCausalLM(DeepseekV3Config(**fields, num_mtp_layers=0)).double().eval()
    peer.set_experts_implementation('eager')  # the others know no float64
    mtp = f'model.layers.{cfg.num_hidden_layers}.'
    main = {k: v for k, v in ours.state_dict().items() if not k.startswith(mtp)}
    peer.load_state_dict(main)
    return ours, peer


@pytest.fixture(autouse=True)
def restored(models):
    "Give the models their defaults back after a test has changed them"
    ours, peer = models
    before = peer.generation_config
    yield
    ours.generation_config = None
    peer.generation_config = before


@pytest.fixture(scope='module')
def words():
    return PreTrainedTokenizerFast(tokenizer_object=train_tokenizer(['ab ba\n'], VOCAB))


@pytest.fixture(scope='module')
def peer_said():
    "What the peer says, by option, batch and padding: it knows nothing of our drafts"
    return {}


def prompts(batch, padded):
    "Prompts (batch, seq) and their mask"
    g = torch.Generator().manual_seed(0)
    ids = torch.randint(4, VOCAB, (2, SEQ), generator=g)[-batch:]
    mask = torch.ones_like(ids)
    if padded:
        ids[-1, :3] = PAD
        mask[-1, :3] = 0
    return ids, mask


class Recorder(BaseStreamer):
    "A streamer that remembers what it was told"

    def __init__(self):
        self.told = []

    def put(self, value):
        self.told.append(value.tolist())

    def end(self):
        self.told.append('end')


def said(models, batch, padded):
    "The greedy text of each row, which nothing ends"
    ids, mask = prompts(batch, padded)
    return generate(models[0], ids, 16, attention_mask=mask, eos_token_id=None)[:, SEQ:].tolist()


def of_each_row(rows, n):
    "A token that each row says, at place n"
    return [row[n] for row in rows]


# option -> what both are asked for, from the rows that are said without it and the tokenizer
OPTIONS = {
    'greedy': lambda rows, words: {},
    'do_sample=False': lambda rows, words: dict(do_sample=False),
    'one end token': lambda rows, words: dict(eos_token_id=rows[0][5]),
    'several end tokens': lambda rows, words: dict(eos_token_id=of_each_row(rows, 6)),
    'no end token': lambda rows, words: dict(eos_token_id=None),
    'the first token ends': lambda rows, words: dict(eos_token_id=rows[0][0]),
    'penalty': lambda rows, words: dict(repetition_penalty=1.7),
    'penalty and end': lambda rows, words: dict(repetition_penalty=0.8, eos_token_id=rows[0][2]),
    'stop string': lambda rows, words: dict(stop_strings=text_of(rows, words), tokenizer=words),
    'stop strings': lambda rows, words: dict(
        stop_strings=['nowhere', text_of(rows, words)], tokenizer=words
    ),
    'longest': lambda rows, words: dict(
        stopping_criteria=StoppingCriteriaList([MaxLengthCriteria(SEQ + 9)])
    ),
    'a function': lambda rows, words: dict(
        stopping_criteria=StoppingCriteriaList([lambda ids, scores: ids[:, -1] == rows[0][4]])
    ),
    'two functions': lambda rows, words: dict(
        stopping_criteria=[
            lambda ids, scores: ids[:, -1] == rows[-1][3],
            MaxLengthCriteria(SEQ + 12),
        ]
    ),
    'a truth value': lambda rows, words: dict(
        stopping_criteria=StoppingCriteriaList([lambda ids, scores: ids.shape[1] > SEQ + 4])
    ),
}


def text_of(rows, words):
    "A printable character that the first row says after its first token"
    text = words.decode(rows[0][1:])
    return next(c for c in text if c.isascii() and c.isprintable())


@pytest.mark.parametrize('speculate', [0, 1, 3])
@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('batch', [1, 2])
@pytest.mark.parametrize('option', OPTIONS)
def test_the_same_call_gives_the_same_tokens(
    models, words, peer_said, option, batch, padded, speculate
):
    ours, peer = models
    ids, mask = prompts(batch, padded)
    asked = OPTIONS[option](said(models, batch, padded), words)
    heard = Recorder()
    common = dict(attention_mask=mask, pad_token_id=PAD, max_new_tokens=16)
    got = generate(ours, ids, **common, **asked, streamer=heard, speculate=speculate)
    if (option, batch, padded) not in peer_said:
        by_peer = Recorder()
        want = peer.generate(ids, **common, **asked, streamer=by_peer)
        peer_said[option, batch, padded] = want.tolist(), by_peer.told
    assert (got.tolist(), heard.told) == peer_said[option, batch, padded]
    steps = stream(ours, ids, 16, attention_mask=mask, speculate=speculate, **stream_only(asked))
    if 'repetition_penalty' not in asked:
        rows = [sum(row, []) for row in zip(*steps)]
        for row, whole in zip(rows, got[:, SEQ:].tolist()):
            assert whole == row + [PAD] * (len(whole) - len(row))


def stream_only(asked):
    "What `stream` is asked for: how tokens are chosen stands in its `sampling_params`"
    return {k: v for k, v in asked.items() if k not in ('do_sample', 'repetition_penalty')}


def test_drafts_are_accepted_in_these_tests(models):
    ours, _ = models
    ids, mask = prompts(2, True)
    tally = GenerationStats()
    generate(ours, ids, 16, attention_mask=mask, eos_token_id=None, speculate=3, tally=tally)
    assert 0.1 < tally.acceptance < 0.95


DEFAULTS = {
    'end token': dict(eos_token_id=11),
    'end tokens and padding': dict(eos_token_id=[11, 12], pad_token_id=13),
    'penalty': dict(eos_token_id=11, repetition_penalty=1.4),
    'limit': dict(eos_token_id=11, max_new_tokens=6),
}


@pytest.mark.parametrize('speculate', [0, 2])
@pytest.mark.parametrize('batch', [1, 2])
@pytest.mark.parametrize('default', DEFAULTS)
def test_what_the_file_says_counts_where_the_call_says_nothing(models, default, batch, speculate):
    ours, peer = models
    ids, mask = prompts(batch, True)
    file = dict(DEFAULTS[default])
    rows = said(models, batch, True)
    ends = of_each_row(rows, 8)
    file['eos_token_id'] = ends if isinstance(file['eos_token_id'], list) else ends[0]
    ours.generation_config = GenerationConfig(**file)
    peer.generation_config = transformers.GenerationConfig(**file)
    most = {} if 'max_new_tokens' in file else dict(max_new_tokens=16)
    got = generate(ours, ids, attention_mask=mask, speculate=speculate, **most)
    assert got.tolist() == peer.generate(ids, attention_mask=mask, **most).tolist()
    asked = dict(eos_token_id=rows[0][2], pad_token_id=PAD, repetition_penalty=1.0)
    got = generate(ours, ids, 9, attention_mask=mask, speculate=speculate, **asked)
    want = peer.generate(ids, attention_mask=mask, max_new_tokens=9, **asked)
    assert got.tolist() == want.tolist()


def test_the_model_ends_at_its_own_end_token(models):
    ours, peer = models
    cfg = ours.cfg
    ids, mask = prompts(1, False)
    end = said(models, 1, False)[0][4]
    ours.cfg = cfg.replace(eos_token_id=end)
    peer.generation_config = transformers.GenerationConfig(eos_token_id=end)
    try:
        got = generate(ours, ids, 16)
        assert got.shape[1] < SEQ + 16
        assert got.tolist() == peer.generate(ids, attention_mask=mask, max_new_tokens=16).tolist()
        (rows,) = [[t for new in stream(ours, ids, 16) for t in new[0]]]
        assert rows == got[0, SEQ:].tolist()  # `stream` has the same defaults
        assert generate(ours, ids, 16, eos_token_id=None).shape[1] == SEQ + 16
    finally:
        ours.cfg = cfg


KNOBS = [
    {},
    dict(temperature=0.7),
    dict(top_k=5),
    dict(top_p=0.8),
    dict(min_p=0.05),
    dict(repetition_penalty=1.3),
    dict(temperature=1.4, top_k=40, top_p=0.9, min_p=0.02, repetition_penalty=1.2),
]


@pytest.mark.parametrize('place', ['call', 'file'])
@pytest.mark.parametrize('padded', [False, True])
@pytest.mark.parametrize('batch', [1, 2])
@pytest.mark.parametrize('knobs', KNOBS, ids=str)
def test_tokens_are_drawn_from_the_same_distribution(
    models, monkeypatch, knobs, batch, padded, place
):
    ours, peer = models
    ids, mask = prompts(batch, padded)
    drawn_from = []
    honest = sampling.probabilities

    def listening(logits, how, seen=None):
        drawn_from.append(honest(logits, how, seen))
        return drawn_from[-1]

    monkeypatch.setattr(sampling, 'probabilities', listening)
    asked = dict(do_sample=True, **knobs)
    if place == 'file':
        ours.generation_config = GenerationConfig(**asked)
        peer.generation_config = transformers.GenerationConfig(**asked)
        asked = {}
    generate(ours, ids, 1, attention_mask=mask, **asked)
    theirs = peer.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=1,
        pad_token_id=PAD,
        return_dict_in_generate=True,
        output_scores=True,
        top_k=knobs.get('top_k', 0),
        **{k: v for k, v in asked.items() if k != 'top_k'},
    )
    want = theirs.scores[0].softmax(-1)
    got = drawn_from[0]
    if padded and penalises_padding():
        got, want = (p[:, torch.arange(p.shape[1]) != PAD] for p in (got, want))
        got, want = (p / p.sum(-1, keepdim=True) for p in (got, want))
    torch.testing.assert_close(got, want, atol=2e-7, rtol=1e-4, check_dtype=False)


def penalises_padding():
    "Does this release of the peer count padding as text when it penalises repetitions, as 5.20?"
    taken = inspect.signature(transformers.RepetitionPenaltyLogitsProcessor.__init__).parameters
    return 'Tensor' not in str(taken['prompt_ignore_length'].annotation)


@pytest.mark.parametrize('speculate', [0, 2])
def test_text_streamers_are_told_what_transformers_tells_them(models, words, capsys, speculate):
    ours, peer = models
    ids, mask = prompts(1, False)
    for skip in (False, True):
        peer.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=16,
            pad_token_id=PAD,
            streamer=TextStreamer(words, skip_prompt=skip),
        )
        want = capsys.readouterr().out
        generate(ours, ids, 16, streamer=TextStreamer(words, skip_prompt=skip), speculate=speculate)
        assert capsys.readouterr().out == want and want.endswith('\n')

    streamer = TextIteratorStreamer(words, skip_prompt=True)
    asked = dict(max_new_tokens=16, streamer=streamer, speculate=speculate)
    thread = threading.Thread(target=generate, args=(ours, ids), kwargs=asked)
    thread.start()
    pieces = list(streamer)
    thread.join()
    assert ''.join(pieces) == want.removesuffix('\n') and len(pieces) > 2
    with pytest.raises(ValueError, match='only supports batch size 1'):
        generate(ours, prompts(2, False)[0], 4, streamer=TextStreamer(words))


@pytest.mark.parametrize(
    'asked',
    [
        dict(temperature=0.7),
        dict(temperature=0.0),
        dict(top_p=0.9),
        dict(min_p=0.1),
        dict(top_k=7),
        dict(temperature=1.0),
        dict(top_p=1.0),
        dict(repetition_penalty=1.5),
        dict(temperature=0.7, top_p=0.9),
    ],
    ids=str,
)
def test_what_changes_nothing_is_said(models, asked):
    "A setting of draws without do_sample is no error, in both, and both say it"
    ours, _ = models
    ids, _ = prompts(1, False)
    theirs_warns = False
    try:
        transformers.GenerationConfig(**asked).validate(strict=True)
    except ValueError:
        theirs_warns = True
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter('default')
        for _ in range(2):
            generate(ours, ids, 2, **asked)
    names = [w for w in heard if 'without do_sample=True' in str(w.message)]
    assert len(names) == int(theirs_warns)  # once
    assert all(w.filename == __file__ for w in names)
    if names:
        assert all(name in str(names[0].message) for name in asked)


def test_temperature_zero_is_no_temperature_to_draw_at(models):
    ours, peer = models
    ids, mask = prompts(1, False)
    with pytest.raises(ValueError, match='strictly positive'):
        peer.generate(ids, attention_mask=mask, do_sample=True, temperature=0.0)
    with pytest.raises(ValueError, match='nothing is drawn at temperature 0'):
        generate(ours, ids, 4, do_sample=True, temperature=0.0)


def test_stop_strings_need_the_tokenizer(models):
    ours, peer = models
    ids, mask = prompts(1, False)
    with pytest.raises(ValueError, match='tokenizer'):
        peer.generate(ids, attention_mask=mask, stop_strings='a')
    with pytest.raises(ValueError, match='pass tokenizer='):
        generate(ours, ids, 4, stop_strings='a')


def test_sampling_params_name_every_setting_of_a_stream(models):
    ours, _ = models
    ids, _ = prompts(1, False)
    ours.generation_config = GenerationConfig(do_sample=True, temperature=0.7, top_k=9)
    left_out = list(stream(ours, ids, 9, seed=1, eos_token_id=None))
    named = SamplingParams(0.7, top_k=9)
    assert left_out == list(stream(ours, ids, 9, named, seed=1, eos_token_id=None))
    greedy = list(stream(ours, ids, 9, SamplingParams(0), eos_token_id=None))
    ours.generation_config = None
    assert greedy == list(stream(ours, ids, 9, eos_token_id=None))


# ---- where Eva differs on purpose


def test_without_a_limit_text_goes_on_to_the_last_position(models):
    ours, peer = models
    ids, mask = prompts(1, False)
    got = generate(ours, ids, eos_token_id=None)
    want = peer.generate(ids, attention_mask=mask, eos_token_id=None)
    assert got.shape[1] == ours.cfg.max_position_embeddings and want.shape[1] == SEQ + 20
    assert got[:, : SEQ + 20].tolist() == want.tolist()
    ours.generation_config = GenerationConfig(max_new_tokens=10**6)  # of a model with more room
    assert generate(ours, ids, eos_token_id=None).tolist() == got.tolist()


def test_nothing_is_cut_off_unless_it_is_asked_for(models):
    "transformers keeps the 50 likeliest tokens of a draw by default"
    _, peer = models
    assert peer.generation_config._get_default_generation_params()['top_k'] == 50
    assert sampling.resolve_sampling_params(GenerationConfig(), do_sample=True).top_k is None


def test_a_file_that_names_no_end_token_leaves_that_of_the_config(models):
    ours, peer = models
    ids, mask = prompts(1, False)
    cfg = ours.cfg
    end = said(models, 1, False)[0][4]
    ours.cfg = cfg.replace(eos_token_id=end)
    ours.generation_config = GenerationConfig(repetition_penalty=1.0)
    peer.generation_config = transformers.GenerationConfig(repetition_penalty=1.0)
    try:
        assert generate(ours, ids, 16).shape[1] < SEQ + 16
    finally:
        ours.cfg = cfg
    assert peer.generate(ids, attention_mask=mask, max_new_tokens=16).shape[1] == SEQ + 16


def test_padding_is_what_the_mask_says(models):
    "transformers takes tokens that equal pad_token_id for padding where no mask is given"
    ours, peer = models
    ids, mask = prompts(1, True)
    asked = dict(max_new_tokens=16, pad_token_id=PAD, eos_token_id=None)
    assert peer.generate(ids, **asked).equal(peer.generate(ids, attention_mask=mask, **asked))
    ones = torch.ones_like(mask)
    assert generate(ours, ids, **asked).equal(generate(ours, ids, attention_mask=ones, **asked))
    with torch.no_grad():  # the two are not the same to the model
        assert not ours(ids)[:, -1].equal(ours(ids, attention_mask=mask)[:, -1])


def test_none_means_what_the_file_says_except_for_end_tokens(models):
    "In transformers a None of the call replaces what the file says"
    ours, peer = models
    ids, mask = prompts(1, False)
    file = dict(repetition_penalty=1.7, eos_token_id=said(models, 1, False)[0][1])
    ours.generation_config = GenerationConfig(**file)
    peer.generation_config = transformers.GenerationConfig(**file)
    got = generate(ours, ids, 16, repetition_penalty=None, eos_token_id=None).tolist()
    asked = dict(attention_mask=mask, max_new_tokens=16, eos_token_id=None)
    assert got == peer.generate(ids, **asked, repetition_penalty=1.7).tolist()
    assert got != peer.generate(ids, **asked, repetition_penalty=None).tolist()


@pytest.mark.parametrize('nothing', [(), [], set()], ids=str)
def test_an_empty_collection_is_no_end_token(models, nothing):
    ours, peer = models
    ids, mask = prompts(2, False)
    want = generate(ours, ids, 12, eos_token_id=None).tolist()
    assert generate(ours, ids, 12, eos_token_id=nothing).tolist() == want
    with pytest.raises((IndexError, RuntimeError, TypeError, ValueError)):
        peer.generate(ids, attention_mask=mask, max_new_tokens=12, eos_token_id=nothing)


def test_rows_that_have_ended_are_filled_up_even_without_end_tokens(models):
    "transformers lets them go on until all rows have ended"
    ours, peer = models
    ids, mask = prompts(2, False)
    rows = said(models, 2, False)
    asked = dict(
        max_new_tokens=12,
        attention_mask=mask,
        eos_token_id=None,
        pad_token_id=PAD,
        stopping_criteria=StoppingCriteriaList([lambda ids, scores: ids[:, -1] == rows[0][2]]),
    )
    n = rows[0].index(rows[0][2]) + 1
    assert rows[0][2] not in rows[1][:12]
    assert generate(ours, ids, **asked)[0, SEQ:].tolist() == rows[0][:n] + [PAD] * (12 - n)
    assert peer.generate(ids, **asked)[0, SEQ:].tolist() == rows[0][:12]


def test_a_stop_string_lies_in_the_new_text_alone(models, words):
    "transformers finds one that the prompt begins and the first new token completes"
    ours, peer = models
    ids, mask = prompts(1, False)
    for letter in words.encode('abcdefghijklmnopqrstuvwxyz', add_special_tokens=False):
        ids[0, -1] = letter
        said_first = generate(ours, ids, 1, eos_token_id=None)[0, SEQ].item()
        stop = words.decode([letter, said_first])
        if len(stop) == 2 and stop.isascii():
            break
    else:
        pytest.fail('after no letter the model says a character of ASCII')
    asked = dict(stop_strings=stop, tokenizer=words, eos_token_id=None)
    assert generate(ours, ids, 3, **asked).shape[1] == SEQ + 3
    theirs = peer.generate(ids, attention_mask=mask, max_new_tokens=3, pad_token_id=PAD, **asked)
    assert theirs.shape[1] == SEQ + 1


def test_the_default_is_shown_by_its_name():
    assert repr(DEFAULT) == 'DEFAULT'
    assert json.dumps(GenerationConfig(1, (2, 3)).to_dict())
    assert replace(GenerationConfig(eos_token_id=[4])).eos_token_ids == (4,)
