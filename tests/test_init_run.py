"A run that starts from a checkpoint keeps its marks and chat templates and says its purpose"

import contextlib
import io
import json
import shlex

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from eva.checkpoints.pretrained import load_pretrained, save_pretrained
from eva.cli.convert import eva_convert
from eva.cli.generate import eva_generate
from eva.cli.train import eva_train
from eva.config import Config
from eva.data.conversations import CHAT_TEMPLATE as EVAS
from eva.generation.chat_templates import ChatTemplate
from eva.model.transformer import DeepSeekV3

MARKS = ['<s>', '</s>', '<pad>', '<|user|>', '<|model|>']
TEMPLATE = (
    '{{ bos_token }}{% for m in messages %}{% if m.role '
    "== 'user' %}<|user|>{{ m.content }}{% else %}"
    '<|model|>{{ m.content }}{{ eos_token }}{% endif %}{% endfor %}'
    '{% if add_generation_prompt %}<|model|>{% endif %}'
)
SEVERAL = [dict(name='default', template=TEMPLATE), dict(name='tool_use', template='tools')]
NAMED = dict(bos_token='<s>', eos_token=dict(content='</s>', lstrip=False), pad_token='<pad>')
SMALL = ['--steps', '1', '--seq_len', '32', '--batch_size', '2', '--precision', 'fp32']


def said_by(command, *argv) -> str:
    "What a command prints, where it succeeds"
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = command([str(o) for o in argv])
    assert code == 0, err.getvalue()
    return out.getvalue()


@pytest.fixture(scope='module')
def init(tmp_path_factory):
    "A checkpoint whose marks are not those that Eva gives to its own tokenizers"
    folder = tmp_path_factory.mktemp('init')
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = byte_level
    tok.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=280, special_tokens=MARKS, initial_alphabet=alphabet)
    tok.train_from_iterator(['def f(x): return x + 1\n'] * 50, trainer)
    torch.manual_seed(0)
    sizes = dict(
        hidden_size=32, num_hidden_layers=2, num_attention_heads=2, moe_intermediate_size=16
    )
    sizes |= dict(
        intermediate_size=64, vocab_size=tok.get_vocab_size(), bos_token_id=0, eos_token_id=1
    )
    save_pretrained(DeepSeekV3(Config.from_preset('mini', **sizes)), folder, tok)
    about = dict(tokenizer_class='PreTrainedTokenizerFast', **NAMED)
    (folder / 'tokenizer_config.json').write_text(json.dumps(about))
    (folder / 'special_tokens_map.json').write_text(json.dumps(NAMED))
    (folder / 'generation_config.json').write_text(json.dumps(dict(eos_token_id=[1, 3])))
    return folder


@pytest.fixture
def data(tmp_path):
    "Conversations and texts"

    def talk(i):
        question = dict(role='user', content=f'f{i % 9}')
        return dict(messages=[question, dict(role='assistant', content=f'def f{i % 9}')])

    rows = dict(
        talks=[talk(i) for i in range(40)], texts=[dict(text='def f(x): return x + 1\n' * 9)] * 40
    )
    for name, these in rows.items():
        (tmp_path / f'{name}.jsonl').write_text(''.join(json.dumps(row) + '\n' for row in these))
    return tmp_path


@pytest.mark.parametrize('kind', ['talks', 'texts'])
@pytest.mark.parametrize('place', ['list', 'file'])
def test_marks_and_templates_are_kept(init, data, kind, place):
    from transformers import AutoTokenizer

    about = json.loads((init / 'tokenizer_config.json').read_text())
    own = init / 'chat_template.jinja'
    own.unlink(missing_ok=True)
    about.pop('chat_template', None)
    if place == 'list':
        about['chat_template'] = SEVERAL
    else:
        own.write_text(TEMPLATE)
    (init / 'tokenizer_config.json').write_text(json.dumps(about))
    out = data / 'out folder'
    said = said_by(
        eva_train, '--init', init, '--data', data / f'{kind}.jsonl', '--out', out, *SMALL
    )

    names = (
        'tokenizer_config.json special_tokens_map.json generation_config.json chat_template.jinja'
    )
    for path in (init / name for name in names.split()):
        assert path.exists() == (out / path.name).exists()
        assert not path.exists() or (out / path.name).read_bytes() == path.read_bytes()
    question = [dict(role='user', content='f3')]
    assert ChatTemplate.of(out)(question) == '<s><|user|>f3<|model|>'
    before = AutoTokenizer.from_pretrained(init)
    after = AutoTokenizer.from_pretrained(out)
    assert len(after) == len(before)  # no mark was added to the vocabulary
    assert after.get_vocab() == before.get_vocab()
    for mark in ('bos_token_id', 'eos_token_id', 'pad_token_id'):
        assert getattr(after, mark) == getattr(before, mark) is not None
    assert after.chat_template == before.chat_template is not None

    hint = said.strip().splitlines()[-1].split('; ')[-1]
    if kind == 'talks':
        assert hint == f"talk to it: eva_generate '{out}'"
    else:
        begin = f"let it continue a text: eva_generate '{out}' --plain --prompt '"
        assert hint.startswith(begin)
        assert hint.removeprefix(begin).removesuffix("'") in 'def f(x): return x + 1\n' * 2


def test_a_checkpoint_without_a_template_gets_one(init, data):
    (init / 'chat_template.jinja').unlink(missing_ok=True)
    (init / 'tokenizer_config.json').write_text(json.dumps(NAMED))
    out = data / 'out'
    argv = ['--init', init, '--data', data / 'talks.jsonl', '--out', out, *SMALL, '--seq_len', 64]
    said = said_by(eva_train, *argv)
    assert (out / 'chat_template.jinja').read_text(encoding='utf-8') == EVAS
    text = ChatTemplate.of(out)([dict(role='user', content='f3')])
    assert text == '<s><｜User｜>f3<｜Assistant｜>'
    assert said.strip().endswith(f'talk to it: eva_generate {out}')


def test_a_damaged_tokenizer_configuration_leaves_no_run(init, data):
    folder = data / 'damaged'
    folder.mkdir()
    for path in init.iterdir():
        if path.is_file():
            (folder / path.name).write_bytes(path.read_bytes())
    (folder / 'special_tokens_map.json').write_text('[' * 100_000)
    err = io.StringIO()
    with contextlib.redirect_stderr(err):
        argv = ['--init', folder, '--data', data / 'texts.jsonl', '--out', data / 'out', *SMALL]
        code = eva_train([str(o) for o in argv])
    assert (
        code == 2
        and f'{folder}/special_tokens_map.json: objects nested more than 64 deep' in err.getvalue()
    )
    assert not (data / 'out').exists()


def test_the_hint_is_a_command_that_works(data, monkeypatch):
    monkeypatch.chdir(data)
    tiny = ('--preset', 'tiny', *SMALL)
    task = ('--data', 'synthetic:copy', '--out', 'task', *tiny)
    base = ('--data', 'texts.jsonl', '--out', 'base', '--vocab_size', 300, *tiny)
    kinds = dict(task='give it the beginning of a document', base='let it continue a text')
    for argv, (out, kind) in zip((task, base), kinds.items()):
        hint = said_by(eva_train, *argv).strip().splitlines()[-1].split('; ')[-1]
        what, command = hint.split(': ', 1)
        name, *rest = shlex.split(command)
        assert (what, name, rest[0], rest[1]) == (kind, 'eva_generate', out, '--prompt')
        text = said_by(eva_generate, *rest, '--max_new_tokens', 3)
        assert text.startswith(rest[2])


@pytest.mark.parametrize('kind', ['saved', 'task', 'base', 'init', 'init without'])
def test_special_tokens_are_named_in_every_folder(init, data, monkeypatch, kind):
    """What transformers reads beside the weights of a model, a run, and what was converted of them

    A run on a checkpoint whose tokenizer says nothing gets the names from config.json.
    """
    from transformers import AutoTokenizer, GenerationConfig

    monkeypatch.chdir(data)
    (init / 'tokenizer_config.json').write_text(json.dumps(NAMED))
    runs = dict(
        task=('--data', 'synthetic:copy'), base=('--data', 'texts.jsonl', '--vocab_size', 300)
    )
    runs |= {'init': ('--init', init, '--data', 'texts.jsonl')}
    runs['init without'] = ('--init', 'bare', '--data', 'texts.jsonl')
    if kind == 'init without':
        names = 'config.json', 'model.safetensors', 'tokenizer.json', 'generation_config.json'
        (data / 'bare').mkdir()
        for name in names:
            (data / 'bare' / name).write_bytes((init / name).read_bytes())
    if kind == 'saved':
        model = load_pretrained(init)
        model.cfg = model.cfg.replace(pad_token_id=2)
        save_pretrained(model, 'folder', Tokenizer.from_file(str(init / 'tokenizer.json')))
    else:
        said_by(eva_train, *runs[kind], '--out', 'folder', *SMALL)
    said_by(eva_convert, 'folder', 'eight', '--to', 'fp8')
    for folder in ('folder', 'eight'):
        cfg = load_pretrained(folder).cfg
        theirs = AutoTokenizer.from_pretrained(folder)
        pad = 2 if kind in ('saved', 'init') else 1  # the end token where nothing is named
        named = (theirs.bos_token_id, theirs.eos_token_id, theirs.pad_token_id)
        assert named == (cfg.bos_token_id, cfg.eos_token_ids[0], pad), (folder, named)
        config = GenerationConfig.from_pretrained(folder)
        ends = [1, 3] if kind in ('saved', 'init', 'init without') else [1, 0]
        assert (config.bos_token_id or cfg.bos_token_id, config.eos_token_id) == (0, ends)
