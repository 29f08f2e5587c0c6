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
