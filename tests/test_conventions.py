"""What others' software expects of a folder: tokens, files, metadata

A run of `eva_train` is continued by Eva's command, by `model.generate` and by a pipeline of
`transformers`, alone and padded in a batch: the same text at temperature 0.
"""

import contextlib
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from sizes import TINY

from eva.checkpoints.pretrained import load_pretrained, save_pretrained
from eva.checkpoints.tokenizers import load_tokenizer
from eva.cli.generate import eva_generate
from eva.cli.train import eva_train
from eva.config import PRESETS, Config
from eva.data.synthetic import BOS, EOS
from eva.data.tokenizer import train_tokenizer
from eva.generation.chat_templates import ChatTemplate
from eva.model.transformer import DeepSeekV3

transformers = pytest.importorskip('transformers')
transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

SMALL = ['--seq_len', '32', '--batch_size', '8', '--vocab_size', '270', '--precision', 'fp32']
PROMPTS = ['one', 'two three', 'fo']
TOKENS = ('tokenizer', 'tokenizer_config', 'special_tokens_map')
STORY = 'one two three four five six.\n'


def command(function, *argv):
    "What a command prints, where it succeeds"
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = function([str(o) for o in argv])
    assert code == 0, err.getvalue()
    return out.getvalue()


@pytest.fixture(scope='module', autouse=True)
def small_preset():
    "A model that learns a sentence in seconds"
    with pytest.MonkeyPatch.context() as m:
        m.setitem(PRESETS, 'mini', PRESETS['mini'] | TINY | dict(hidden_size=32))
        yield


@pytest.fixture(scope='module')
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp('conventions')
    rows = [dict(text=STORY)] * 300
    (folder / 'tales.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in rows))
    answer = dict(role='assistant', content='two three')
    talk = dict(messages=[dict(role='user', content='one'), answer])
    (folder / 'talks.jsonl').write_text((json.dumps(talk) + '\n') * 60)
    return folder


@pytest.fixture(scope='module')
def run(place):
    "A run on short documents, each of which ends"
    argv = ('--data', place / 'tales.jsonl', '--steps', 120, '--out', place / 'run', *SMALL)
    command(eva_train, *argv)
    return place / 'run'


@pytest.fixture(scope='module')
def tuned(place, run):
    "The run, continued on conversations"
    argv = ('--init', run, '--data', place / 'talks.jsonl', '--steps', 60, '--lr', 0.01)
    more = ('--seq_len', 64, '--batch_size', 4, '--precision', 'fp32', '--out', place / 'tuned')
    command(eva_train, *argv, *more)
    return place / 'tuned'


def by_eva(folder, prompt, *more):
    "What the command writes greedily"
    argv = (folder, '--prompt', prompt, '--temperature', 0, '--max_new_tokens', 24, *more)
    return command(eva_generate, *argv)


def streams(folder):
    return [np.load(file) for file in sorted((folder / 'tokens').rglob('tokens-*.npy'))]


# ---- tokens


def test_documents_end_with_an_end_token(run):
    for tokens in streams(run):
        ends, starts = (np.flatnonzero(tokens == token) for token in (1, 0))
        assert len(ends) == len(starts) and (ends[:-1] + 1 == starts[1:]).all()
    assert json.loads((run / 'run.json').read_text())['add_eos_token'] is True


def test_a_run_can_leave_end_tokens_out(place):
    out = place / 'endless'
    argv = ('--data', place / 'tales.jsonl', '--steps', 1, '--out', out, *SMALL)
    command(eva_train, *argv, '--no-add_eos_token')
    assert not any((tokens == 1).any() for tokens in streams(out))
    command(eva_train, *argv, '--no-add_eos_token', '--resume')
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        assert eva_train([*map(str, argv), '--add_eos_token', '--resume']) == 2
    assert '--add_eos_token True (was: False)' in err.getvalue()


def test_a_run_of_an_older_eva_is_resumed_as_it_is(place):
    "Its shards have no end tokens, its run.json does not speak of them, its tokenizer adds nothing"
    out = place / 'older'
    argv = ['--data', place / 'tales.jsonl', '--steps', 3, '--out', out, *SMALL]
    command(eva_train, *argv, '--no-add_eos_token', '--save_every', 1)
    about = json.loads((out / 'run.json').read_text())
    del about['add_eos_token'], about['arguments']['add_eos_token']
    (out / 'run.json').write_text(json.dumps(about))
    saved = json.loads((out / 'tokenizer.json').read_text())
    (out / 'tokenizer.json').write_text(json.dumps(saved | dict(post_processor=None)))
    for name in ('.eva-manifest.json', 'README.md', 'special_tokens_map.json', 'report.png'):
        (out / name).unlink()
    before = [tokens.tolist() for tokens in streams(out)]
    said = command(eva_train, '--out', out, '--resume')
    assert 'older than the list' in said
    assert [tokens.tolist() for tokens in streams(out)] == before


@pytest.mark.parametrize('kind', ['run', 'tuned'])
def test_transformers_encodes_as_eva_does(request, kind):
    folder = request.getfixturevalue(kind)
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    ours = load_tokenizer(folder / 'tokenizer.json', folder)
    ours.encode_special_tokens = kind == 'run'  # as `eva_generate` does with a chat template
    for text in ('one two', '', ' 12 ü\n\n', f'{BOS}one{EOS}two', 'x' * 300):
        ids = [0, *ours.encode(text, add_special_tokens=False).ids]
        assert theirs(text)['input_ids'] == ours.encode(text).ids == ids, text
    assert (theirs.bos_token, theirs.eos_token, theirs.pad_token) == (BOS, EOS, EOS)
    assert theirs.padding_side == 'left'
    marked = theirs(f'one {BOS}')['input_ids']
    assert (marked.count(0) == 1) == (kind == 'run')


@pytest.mark.parametrize('batch', [1, 3])
def test_the_same_text_from_three_programs(run, batch):
    "By `eva_generate`, by `model.generate`, and by a pipeline; alone, and padded in a batch"
    wanted = [by_eva(run, prompt) for prompt in PROMPTS]
    tokens = transformers.AutoTokenizer.from_pretrained(run)
    model = transformers.AutoModelForCausalLM.from_pretrained(run)
    writer = transformers.pipeline('text-generation', model=model, tokenizer=tokens)
    wrote = writer(PROMPTS, max_new_tokens=24, batch_size=batch)
    assert [answer[0]['generated_text'] for answer in wrote] == wanted
    for start in range(0, 3, batch):
        given = tokens(PROMPTS[start : start + batch], padding=True, return_tensors='pt')
        rows = model.generate(**given, max_new_tokens=24)
        said = tokens.batch_decode(rows, skip_special_tokens=True)
        assert said == wanted[start : start + batch]
    assert wanted[0] == STORY  # the run has learned where a text ends
    assert rows[0, -1].item() == 1


def test_a_chat_gives_the_same_answer(tuned):
    messages = [dict(role='user', content='one')]
    tokens = transformers.AutoTokenizer.from_pretrained(tuned)
    text = tokens.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == ChatTemplate.of(tuned)(messages)
    ids = tokens.apply_chat_template(messages, add_generation_prompt=True)['input_ids']
    assert ids.count(0) == 1 and ids[0] == 0
    writer = transformers.pipeline('text-generation', str(tuned))
    answer = writer(messages, max_new_tokens=24)[0]['generated_text'][-1]['content']
    assert answer == by_eva(tuned, 'one') == 'two three'


def test_a_published_tokenizer_with_a_start_token_gets_no_second_one(tmp_path, run):
    saved = load_tokenizer(run / 'tokenizer.json', run)
    model = load_pretrained(run)
    save_pretrained(model, tmp_path / 'again', saved)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / 'again')
    assert theirs('one')['input_ids'].count(0) == 1
    theirs.save_pretrained(tmp_path / 'theirs')
    model.save_pretrained(tmp_path / 'theirs_too')
    for name in ('tokenizer.json', 'tokenizer_config.json'):
        text = (tmp_path / 'theirs' / name).read_text()
        (tmp_path / 'theirs_too' / name).write_text(text)
    assert by_eva(tmp_path / 'theirs_too', 'one') == by_eva(run, 'one')


# ---- files


def test_files_are_readable_by_others_and_complete(run):
    umask = os.umask(0o022)
    os.umask(umask)
    files = [file for file in run.rglob('*') if file.is_file() and 'tensorboard' not in file.parts]
    modes = {file.name: oct(file.stat().st_mode & 0o777) for file in files}
    assert set(modes.values()) == {oct(0o666 & ~umask)}, modes
    names = {file.name for file in files}
    wanted = ('config', 'generation_config', *TOKENS)
    assert {f'{name}.json' for name in wanted} | {'README.md', 'model.safetensors'} <= names
    said = json.loads((run / 'generation_config.json').read_text())
    assert said == dict(bos_token_id=0, eos_token_id=[1, 0], pad_token_id=1, do_sample=False)
    card = (run / 'README.md').read_text()
    shown = ('tales.jsonl', '| steps | 120 |', 'held-out bits per byte: Eva', 'load_pretrained')
    assert all(text in card for text in shown) and str(run.parent) not in card


def test_shards_have_an_index_that_others_read(run, tmp_path):
    model = load_pretrained(run)
    save_pretrained(model, tmp_path, load_tokenizer(run / 'tokenizer.json'), '30KB')
    index = json.loads((tmp_path / 'model.safetensors.index.json').read_text())
    files = set(index['weight_map'].values())
    assert len(files) > 3 and {path.name for path in tmp_path.glob('*.safetensors')} == files
    for name, file in index['weight_map'].items():
        with safe_open(tmp_path / file, 'pt') as shard:
            assert name in shard.keys()  # noqa: SIM118 - it is no dictionary
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([[0, 5, 9, 7]])
    with torch.no_grad():
        torch.testing.assert_close(peer(ids).logits, model(ids), atol=1e-5, rtol=1e-5)


def test_a_readme_of_somebody_else_stays(tmp_path):
    model = DeepSeekV3(Config.from_preset('mini', vocab_size=270))
    (tmp_path / 'README.md').write_text('ours')
    save_pretrained(model, tmp_path, train_tokenizer(['ab'], 258))
    assert Path(tmp_path / 'README.md').read_text() == 'ours'


# ---- configurations under DeepSeek's own names

HEADS = dict(kv_lora_rank=512, qk_nope_head_dim=128, qk_rope_head_dim=64, v_head_dim=128)
INFERENCE = {  # of DeepSeek's repository: preset -> configs/config_*.json
    'v2-lite': HEADS
    | dict(vocab_size=102400, dim=2048, inter_dim=10944, moe_inter_dim=1408, n_layers=27)
    | dict(n_dense_layers=1, n_heads=16, n_routed_experts=64, n_shared_experts=2)
    | dict(n_activated_experts=6, route_scale=1.0, q_lora_rank=0, mscale=0.707),
    'v2': HEADS
    | dict(vocab_size=102400, dim=5120, inter_dim=12288, moe_inter_dim=1536, n_layers=60)
    | dict(n_dense_layers=1, n_heads=128, n_routed_experts=160, n_shared_experts=2)
    | dict(n_activated_experts=6, n_expert_groups=8, n_limited_groups=3, route_scale=16.0)
    | dict(q_lora_rank=1536),
    'v3': HEADS
    | dict(vocab_size=129280, dim=7168, inter_dim=18432, moe_inter_dim=2048, n_layers=61)
    | dict(n_dense_layers=3, n_heads=128, n_routed_experts=256, n_shared_experts=1)
    | dict(n_activated_experts=8, n_expert_groups=8, n_limited_groups=4, route_scale=2.5)
    | dict(score_func='sigmoid', q_lora_rank=1536, dtype='fp8'),
}


@pytest.mark.parametrize('preset', INFERENCE)
def test_configurations_of_the_inference_code_are_read(tmp_path, preset):
    (tmp_path / 'config.json').write_text(json.dumps(INFERENCE[preset]))
    found = Config.from_pretrained(tmp_path)
    same = dict(num_nextn_predict_layers=0, initializer_range=0.02)
    if preset == 'v2':  # its file leaves mscale at 1, where the published config.json says 0.707
        yarn = found.rope_scaling
        assert (yarn['mscale'], yarn['mscale_all_dim']) == (1.0, 1.0)
        same['rope_scaling'] = dict(yarn)
    assert found == Config.from_preset(preset).replace(**same)
    assert Config.from_dict(found.to_dict()) == found


@pytest.mark.parametrize('to', ['bf16', 'fp8'])
def test_a_folder_of_the_inference_code_is_loaded_and_converted(tmp_path, to):
    "The same small model under both kinds of names: the same logits"
    from safetensors.torch import load_file, save_file

    from eva.checkpoints.conversion import convert_checkpoint
    from eva.checkpoints.files import INFERENCE_NAMES

    torch.manual_seed(0)
    sizes = TINY | dict(vocab_size=99, hidden_size=32, num_nextn_predict_layers=0)
    routing = dict(topk_method='greedy', routed_scaling_factor=1.5, initializer_range=0.02)
    cfg = Config.from_preset('mini', **sizes | routing, bos_token_id=None, eos_token_id=None)
    model = DeepSeekV3(cfg).eval()
    source = tmp_path / 'published'
    save_pretrained(model, source)
    if to == 'fp8':
        source = convert_checkpoint(source, tmp_path / 'eight', 'fp8')
    short = {long: name for name, long in INFERENCE_NAMES.items()}
    tensors = load_file(source / 'model.safetensors')
    folder = tmp_path / 'inference'
    folder.mkdir()
    named = {}
    for name, tensor in tensors.items():
        parts = name.removeprefix('model.').replace('weight_scale_inv', 'scale').split('.')
        named['.'.join(short.get(part, part) for part in parts)] = tensor
    save_file(named, folder / 'model0-mp1.safetensors')
    fields = dict(vocab_size=99, dim=32, inter_dim=16, moe_inter_dim=8, n_layers=2)
    fields |= dict(n_dense_layers=1, n_heads=2, n_routed_experts=4, n_shared_experts=1)
    fields |= dict(n_activated_experts=2, score_func='sigmoid', route_scale=1.5, max_seq_len=4096)
    fields |= {name: TINY[name] for name in TINY if name.endswith(('lora_rank', 'head_dim'))}
    (folder / 'config.json').write_text(json.dumps(fields | dict(dtype=to)))
    ids = torch.arange(9)[None]
    back = load_pretrained(folder)
    assert back.cfg == cfg.replace(max_position_embeddings=4096)
    with torch.no_grad():
        assert torch.equal(back(ids), load_pretrained(source)(ids))
    wide = load_pretrained(convert_checkpoint(folder, tmp_path / 'wide', 'fp32'))
    assert json.loads((tmp_path / 'wide' / 'config.json').read_text())['hidden_size'] == 32
    with torch.no_grad():
        assert torch.equal(wide(ids), load_pretrained(source, torch.float32)(ids))


# ---- types, and the preset for fast kernels


@pytest.mark.parametrize('first', ['fp32', 'bf16', 'fp8'])
@pytest.mark.parametrize('then', ['fp32', 'bf16', 'fp8'])
def test_a_converted_run_writes_in_one_type(run, tmp_path, first, then):
    "Each pair of types: one type when loaded, a text, and the same text from transformers"
    from eva.checkpoints.conversion import convert_checkpoint

    said = []
    convert_checkpoint(run, tmp_path / 'first', first, say=said.append)
    end = convert_checkpoint(tmp_path / 'first', tmp_path / 'end', then, say=said.append)
    assert any('FP8 already and are copied as they are' in s for s in said) == (
        first == then == 'fp8'
    )
    model = load_pretrained(end)
    dtype = {p.dtype for p in model.parameters()}
    assert len(dtype) == 1
    assert json.loads((end / 'config.json').read_text())['dtype'] == str(model.dtype)[6:]
    text = by_eva(end, 'one')
    assert text.startswith('one') and len(text) > 8
    if then != 'fp8':
        theirs = transformers.AutoModelForCausalLM.from_pretrained(end)
        kinds = {n: p.dtype for n, p in theirs.named_parameters() if 'gate.weight' not in n}
        assert set(kinds.values()) == dtype  # it keeps routers in float32
        if then == 'fp32':
            tokens = transformers.AutoTokenizer.from_pretrained(end)
            writer = transformers.pipeline('text-generation', model=theirs, tokenizer=tokens)
            assert writer('one', max_new_tokens=24)[0]['generated_text'] == text


def test_the_servable_preset_is_what_fast_kernels_know():
    from eva.checkpoints.portable import portable

    cfg = Config.from_preset('mini-servable')
    assert (cfg.kv_lora_rank, cfg.qk_rope_head_dim) == (512, 64)
    assert (cfg.qk_nope_head_dim, cfg.v_head_dim) == (128, 128)
    widths = (cfg.hidden_size, cfg.intermediate_size, cfg.moe_intermediate_size, cfg.q_lora_rank)
    assert all(width % 128 == 0 for width in widths)  # whole blocks of FP8
    served = [f for f in portable(cfg) if f.reader in ('transformers', 'vLLM', 'SGLang')]
    assert {f.verdict for f in served} == {'leaves out'}
    assert portable(cfg.replace(kv_lora_rank=256)) != portable(cfg)


def test_the_servable_preset_trains_and_is_opened(place):
    out = place / 'servable'
    argv = ('--preset', 'mini-servable', '--data', place / 'tales.jsonl', '--steps', 2)
    said = command(eva_train, *argv, '--out', out, *SMALL)
    assert 'in other software:' in said and 'vLLM' not in said
    assert by_eva(out, 'one').startswith('one')
    transformers.AutoModelForCausalLM.from_pretrained(out)


# ---- what a folder cannot hold, and folders that are in use


def test_own_classes_are_said_to_be_missing_from_the_files(tmp_path):
    import warnings

    from eva.attention.baselines import GroupedQueryAttention, replace_attention
    from eva.moe.router import Router

    class OwnRouter(Router):
        "Not of Eva"

    cfg = Config.from_preset('mini', vocab_size=270)
    for change, name in ((True, 'OwnRouter'), (False, '')):
        model = DeepSeekV3(cfg)
        if change:
            model.blocks[1].mlp.gate = OwnRouter(cfg)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter('always')
            model.save_pretrained(tmp_path / 'own')
        said = [str(w.message) for w in caught if 'not the code of' in str(w.message)]
        assert len(said) == change and all(f'not the code of {name};' in s for s in said)
    assert GroupedQueryAttention.__module__ == 'eva.attention.baselines' and replace_attention


def test_a_second_trainer_does_not_write_into_the_log_of_the_first(tmp_path):
    from eva.data.decode import Document
    from eva.data.text import write_tokens
    from eva.training.config import TrainConfig
    from eva.training.trainer import Trainer

    tok = train_tokenizer([STORY], 270)
    stream = write_tokens(tmp_path / 'text.npy', [Document('x', STORY * 60)], tok)
    settings = dict(steps=3, batch_size=2, micro_batch=2, seq_len=16, save_every=2)
    cfg = Config.from_preset('mini', vocab_size=tok.get_vocab_size())

    def trainer(**more):
        settings_ = TrainConfig(**settings | more)
        return Trainer(DeepSeekV3(cfg), stream, stream, settings_, tmp_path / 'run')

    trainer().fit()
    log = (tmp_path / 'run' / 'metrics.jsonl').read_bytes()
    with pytest.raises(ValueError, match=r'its log has 3 steps, and this trainer has done 0; call'):
        trainer().fit()
    assert (tmp_path / 'run' / 'metrics.jsonl').read_bytes() == log
    again = trainer()
    assert 'finished: all 3 steps' in again.resume()
