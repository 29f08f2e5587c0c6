"""Weights in shards: the Hub's layout, equal bits, little memory, and no half of a checkpoint

A process that is killed while it replaces a checkpoint leaves the old one, the new one, or a folder
that is refused with a sentence. Here it is killed at every step.
"""

import contextlib
import itertools
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers import GenerationConfig as TheirGenerationConfig

from eva.checkpoints.conversion import convert_checkpoint
from eva.checkpoints.files import pretrained_folder
from eva.checkpoints.pretrained import load_pretrained, published_state_dict, save_pretrained
from eva.checkpoints.tokenizers import load_tokenizer
from eva.config import Config
from eva.data.tokenizer import train_tokenizer
from eva.fileio.manifest import Manifest
from eva.model.generation_config import GenerationConfig, read_generation_config
from eva.model.transformer import DeepSeekV3

INDEX = 'model.safetensors.index.json'
CFG = Config.from_preset(
    'mini',
    vocab_size=300,
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=2,
    intermediate_size=64,
    moe_intermediate_size=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    num_nextn_predict_layers=0,
)
SIZES = {'one file': '5GB', 'three': 200_000, 'other three': 220_000, 'many': '40KB'}


@pytest.fixture(autouse=True)
def quick_disk(monkeypatch):
    "Nothing here cuts the power, so nothing has to be flushed"
    monkeypatch.setattr(os, 'fsync', lambda descriptor: None)


def model_of(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    return DeepSeekV3(CFG).to(dtype).eval()


def same(a, b):
    "Have two models the same weights, bit for bit?"
    x, y = a.state_dict(), b.state_dict()
    return list(x) == list(y) and all(
        s.dtype == t.dtype and s.equal(t) for s, t in zip(x.values(), y.values())
    )


def weights_of(folder):
    return {p.name for p in folder.glob('*.safetensors')} | {p.name for p in folder.glob(INDEX)}


@pytest.mark.parametrize('dtype', [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize('size', SIZES)
def test_shards_hold_the_same_bits(tmp_path, size, dtype):
    model = model_of(0, dtype)
    save_pretrained(model, tmp_path, max_shard_size=SIZES[size])
    assert same(load_pretrained(tmp_path), model)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype='auto').state_dict()
    ours = model.state_dict()
    assert set(theirs) == set(ours) and all(theirs[name].equal(t) for name, t in ours.items())
    tensors = dict(published_state_dict(model))
    shards = list(tmp_path.glob('*.safetensors'))
    assert (tmp_path / INDEX).exists() == (len(shards) > 1)
    if len(shards) > 1:
        # tensors that share their storage go into one file there; experts are views of a stack
        copies = {name: t.clone() for name, t in tensors.items()}
        index = json.loads((tmp_path / INDEX).read_text())
        assert set(index['weight_map']) == set(tensors)
        assert index['metadata']['total_size'] == sum(t.nbytes for t in tensors.values())
        hub = huggingface_hub.split_torch_state_dict_into_shards(copies, max_shard_size=SIZES[size])
        assert index['weight_map'] == hub.tensor_to_filename
    found = {}
    for path in shards:
        found |= load_file(path)
    assert set(found) == set(tensors) and all(found[name].equal(t) for name, t in tensors.items())


@pytest.mark.parametrize('old, new', list(itertools.product(SIZES, SIZES)))
def test_a_checkpoint_of_ours_is_replaced(tmp_path, old, new):
    save_pretrained(model_of(0), tmp_path / 'folder', max_shard_size=SIZES[old])
    model = model_of(1)
    save_pretrained(model, tmp_path / 'folder', max_shard_size=SIZES[new])
    save_pretrained(model, tmp_path / 'fresh', max_shard_size=SIZES[new])
    assert same(load_pretrained(tmp_path / 'folder'), model)
    names = [{p.name for p in (tmp_path / f).iterdir()} for f in ('folder', 'fresh')]
    assert names[0] == names[1]
    lists = [Manifest(tmp_path / f).files for f in ('folder', 'fresh')]
    listed = [{name for name in files if not name.startswith('.')} for files in lists]
    assert listed[0] == listed[1] == names[0] - {Manifest.NAME}


@pytest.mark.parametrize(
    'foreign', [INDEX, 'model-00001-of-00002.safetensors', 'model.safetensors']
)
@pytest.mark.parametrize('size', ['one file', 'many'])
def test_what_somebody_else_wrote_is_refused(tmp_path, foreign, size):
    (tmp_path / foreign).write_text('{}')
    with pytest.raises(ValueError, match=f'{foreign}: was not written by Eva'):
        save_pretrained(model_of(0), tmp_path, max_shard_size=SIZES[size])
    assert (tmp_path / foreign).read_text() == '{}'
    (tmp_path / foreign).unlink()
    save_pretrained(model_of(0), tmp_path, max_shard_size='40KB')
    shard = next(tmp_path.glob('model-00002-*'))
    shard.write_bytes(shard.read_bytes()[:-1] + b'!')
    before = {p: p.read_bytes() for p in tmp_path.iterdir()}
    with pytest.raises(ValueError, match='was changed since Eva wrote it'):
        save_pretrained(model_of(1), tmp_path, max_shard_size=SIZES[size])
    assert {p: p.read_bytes() for p in tmp_path.iterdir()} == before


class KilledError(BaseException):
    "Instead of a signal"


class Kill:
    "Let a process die before its n-th change of the folder's names, and do nothing any more"

    def __init__(self, monkeypatch, n):
        self.left = n
        for name in ('replace', 'unlink', 'remove', 'rename'):
            monkeypatch.setattr(os, name, self.guarded(getattr(os, name)))

    def guarded(self, do):
        def step(*args, **kw):
            self.left -= 1
            if self.left < 0:
                raise KilledError
            return do(*args, **kw)

        return step


def read_as_transformers(folder):
    "The tensors that transformers would read: one file first, then the index"
    if (folder / 'model.safetensors').exists():
        return load_file(folder / 'model.safetensors')
    where = json.loads((folder / INDEX).read_text())['weight_map']
    return {name: load_file(folder / file)[name] for name, file in where.items()}


@pytest.mark.parametrize(
    'old, new',
    [
        (None, 'three'),
        ('one file', 'one file'),
        ('one file', 'three'),
        ('three', 'three'),
        ('three', 'other three'),
        ('three', 'one file'),
    ],
)
def test_a_kill_at_any_step_leaves_a_whole_checkpoint_or_a_sentence(tmp_path, old, new):
    before, after = model_of(0), model_of(1)
    outcomes = []
    for n in itertools.count():
        folder = tmp_path / str(n)
        if old:
            save_pretrained(before, folder, max_shard_size=SIZES[old])
        with pytest.MonkeyPatch.context() as patch:
            killer = Kill(patch, n)
            with contextlib.suppress(KilledError):
                save_pretrained(after, folder, max_shard_size=SIZES[new])
        try:
            found = load_pretrained(folder)
            outcomes.append('old' if same(found, before) else 'new')
            assert same(found, before) or same(found, after), n
        except ValueError as e:
            outcomes.append('refused')
            assert str(folder) in str(e) or 'has one place' in str(e), e
        try:
            theirs = read_as_transformers(folder)
        except (OSError, TypeError, KeyError, AttributeError):
            pass  # refused there too
        else:
            states = [dict(published_state_dict(m)) for m in (before, after)]
            assert any(all(s[k].equal(t) for k, t in theirs.items()) for s in states), n
        save_pretrained(after, folder, max_shard_size=SIZES[new])  # the next call ends it
        assert same(load_pretrained(folder), after)
        assert not list(folder.glob('.model*'))
        if killer.left >= 0:
            break
    assert n > 5 and outcomes[0] == ('old' if old else 'refused') and outcomes[-1] == 'new'
    print(old, new, outcomes)
    order = [name for name, _ in itertools.groupby(outcomes)]
    assert order in (['old', 'new'], ['old', 'refused', 'new'], ['refused', 'new']), order


@pytest.mark.parametrize('old', [None, 'one file', 'three'])
def test_an_error_while_shards_are_written_leaves_the_old_checkpoint(tmp_path, monkeypatch, old):
    import eva.checkpoints.safetensors as module

    if old:
        save_pretrained(model_of(0), tmp_path / 'folder', max_shard_size=SIZES[old])
    honest = module.write_safetensors
    left = [2]

    def full(file, shapes, tensors, atomic=True):
        left[0] -= 1
        if left[0] < 0:
            Path(file).write_bytes(b'half')
            raise OSError(28, 'No space left on device')
        honest(file, shapes, tensors, atomic)

    # the chapter's function looks its helper up in the module
    monkeypatch.setattr(module, 'write_safetensors', full)
    with pytest.raises(OSError, match='No space left'):
        save_pretrained(model_of(1), tmp_path / 'folder', max_shard_size='40KB')
    if not old:
        assert not (tmp_path / 'folder').exists() or not weights_of(tmp_path / 'folder')
        return
    assert same(load_pretrained(tmp_path / 'folder'), model_of(0))
    names = {p.name for p in (tmp_path / 'folder').iterdir()}
    assert not [name for name in names if 'tmp' in name], names


MEMORY = """
import resource, sys, torch
from eva.checkpoints.pretrained import load_pretrained, save_pretrained
from eva.config import Config
from eva.model.transformer import DeepSeekV3
sizes = dict(hidden_size=512, moe_intermediate_size=512, n_routed_experts=32, vocab_size=300)
torch.manual_seed(0)
model = DeepSeekV3(Config.from_preset('mini', **sizes, num_hidden_layers=3))
total = sum(t.nbytes for t in model.state_dict().values())
save_pretrained(DeepSeekV3(Config.from_preset('mini', vocab_size=300)), 'small')
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
save_pretrained(model, 'large', max_shard_size='20MB')
print(total >> 10, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_saving_takes_no_second_copy_of_the_model(tmp_path):
    "What it takes beside the model is less than a shard"
    run = subprocess.run(
        [sys.executable, '-c', MEMORY], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    total, more = map(int, run.stdout.split())
    assert total > 250_000 and more < 20_000, (total, more)  # KB


# ---- what stands beside the weights


def test_generation_config_goes_everywhere_with_the_model(tmp_path):
    model = model_of(0)
    tok = train_tokenizer(['def f(x): return x\n' * 20], 300)
    save_pretrained(model, tmp_path / 'fresh', tok)
    file = json.loads((tmp_path / 'fresh' / 'generation_config.json').read_text())
    assert file == dict(bos_token_id=0, eos_token_id=[1, 0], pad_token_id=1, do_sample=False)
    theirs = TheirGenerationConfig.from_pretrained(tmp_path / 'fresh')
    assert (theirs.bos_token_id, theirs.eos_token_id, theirs.do_sample) == (0, [1, 0], False)

    published = dict(
        _from_model_config=True,
        bos_token_id=0,
        eos_token_id=[1, 7],
        do_sample=True,
        temperature=0.6,
        top_p=0.95,
        transformers_version='4.46.3',
    )
    (tmp_path / 'fresh' / 'generation_config.json').write_text(json.dumps(published))
    back = load_pretrained(tmp_path / 'fresh')
    assert back.generation_config == GenerationConfig(0, (1, 7), None, True, 0.6, top_p=0.95)
    save_pretrained(back, tmp_path / 'again', tok)
    convert_checkpoint(tmp_path / 'again', tmp_path / 'converted')
    for name in ('again', 'converted'):
        assert load_pretrained(tmp_path / name).generation_config == back.generation_config
        theirs = TheirGenerationConfig.from_pretrained(tmp_path / name)
        assert (theirs.do_sample, theirs.temperature, theirs.top_p) == (True, 0.6, 0.95)
        assert theirs.eos_token_id == [1, 7]
        tokens = AutoTokenizer.from_pretrained(tmp_path / name)
        assert (tokens.bos_token_id, tokens.eos_token_id) == (0, 1)


def test_a_file_that_says_the_same_stays_as_it_is(tmp_path):
    "A run that continues a checkpoint keeps what Eva does not know"
    model = model_of(0)
    raw = json.dumps(dict(eos_token_id=[1, 3], num_beams=4))
    with Manifest(tmp_path).write('generation_config.json') as f:
        f.write_text(raw)
    model.generation_config = read_generation_config(tmp_path, 300)
    save_pretrained(model, tmp_path)
    assert (tmp_path / 'generation_config.json').read_text() == raw
    model.generation_config = GenerationConfig(eos_token_id=5)
    save_pretrained(model, tmp_path)
    assert load_pretrained(tmp_path).generation_config.eos_token_id == 5


def test_a_damaged_file_is_refused_by_name(tmp_path):
    save_pretrained(model_of(0), tmp_path)
    (tmp_path / 'generation_config.json').write_text('{"eos_token_id": 300}')
    with pytest.raises(ValueError, match='generation_config.json: token 300: must be below'):
        load_pretrained(tmp_path)
    with pytest.raises(ValueError, match='generation_config.json: was changed since'):
        save_pretrained(model_of(0), tmp_path)
    (tmp_path / 'generation_config.json').unlink()
    assert load_pretrained(tmp_path).generation_config is None


@pytest.mark.parametrize('dtype', [None, torch.bfloat16], ids=str)
def test_tensors_are_moved_as_they_are_read(tmp_path, dtype):
    save_pretrained(model_of(0), tmp_path, max_shard_size='40KB')
    model = load_pretrained(tmp_path, dtype, device='meta')
    assert {t.device.type for t in model.state_dict().values()} == {'meta'}
    assert {t.dtype for t in model.parameters()} == {dtype or torch.float32}
    assert same(load_pretrained(tmp_path, dtype, 'cpu'), load_pretrained(tmp_path, dtype))


# ---- the Hub


def test_a_name_is_fetched_from_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_pretrained(model_of(0), tmp_path / 'there')
    asked = []

    def snapshot_download(repo_id, *, revision=None, allow_patterns=None):
        asked.append((repo_id, revision))
        assert '*.safetensors' in allow_patterns and '*.json' in allow_patterns
        assert not any(pattern.endswith(('.bin', '.pt', '.py', '*')) for pattern in allow_patterns)
        return str(tmp_path / 'there')

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', snapshot_download)
    assert same(load_pretrained('eva/small'), model_of(0))
    assert same(load_pretrained('eva/small@v1.0'), model_of(0))
    assert asked == [('eva/small', None), ('eva/small', 'v1.0')]
    (tmp_path / 'eva' / 'small').mkdir(parents=True)  # a folder goes before a name
    with pytest.raises(ValueError, match='config.json: no such file'):
        load_pretrained('eva/small')
    with pytest.raises(ValueError, match='no such file'):
        load_pretrained(Path('eva/other'))  # a path is no name
    assert len(asked) == 2


def test_without_the_library_or_the_network_there_is_one_sentence(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def offline(*args, **kw):
        raise ConnectionError('no route to host\nand a long explanation')

    monkeypatch.setattr(huggingface_hub, 'snapshot_download', offline)
    with pytest.raises(ValueError) as e:
        load_pretrained('eva/small')
    assert str(e.value) == (
        'eva/small: no such folder, and it could not be fetched from the Hub '
        '(ConnectionError: no route to host); check the name and the connection'
    )
    monkeypatch.setitem(sys.modules, 'huggingface_hub', None)
    with pytest.raises(ValueError, match='^eva/small: no such folder; .* install huggingface_hub$'):
        load_pretrained('eva/small')


CACHED = """
import sys
from eva.checkpoints.files import pretrained_folder
from eva.checkpoints.pretrained import load_pretrained
from eva.checkpoints.tokenizers import load_tokenizer
for name in sys.argv[1:]:
    try:
        model = load_pretrained(name)
        folder = pretrained_folder(name)
        tok = load_tokenizer(folder / 'tokenizer.json', folder)
        print(folder.name, model.generation_config.eos_token_id, tok.get_vocab_size())
    except ValueError as e:
        print(e)
"""


def test_the_cache_of_the_real_library_is_read(tmp_path):
    "Snapshots of links to blobs, as huggingface_hub lays them out, without a network"
    tok = train_tokenizer(['def f(x): return x\n' * 20], 300)
    save_pretrained(model_of(0), tmp_path / 'there', tok, max_shard_size=SIZES['three'])
    repo = tmp_path / 'home' / 'hub' / 'models--eva--small'
    commit = '0123456789abcdef0123456789abcdef01234567'
    snapshot = repo / 'snapshots' / commit
    for folder in (repo / 'refs', repo / 'blobs', snapshot):
        folder.mkdir(parents=True)
    (repo / 'refs' / 'main').write_text(commit)
    for i, path in enumerate(sorted((tmp_path / 'there').glob('[a-z]*'))):
        (repo / 'blobs' / f'{i:040d}').write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(f'../../blobs/{i:040d}')
    environment = os.environ | dict(HF_HOME=str(tmp_path / 'home'), HF_HUB_OFFLINE='1')
    run = subprocess.run(
        [sys.executable, '-c', CACHED, 'eva/small', f'eva/small@{commit}', 'eva/none'],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
    )
    first, second, third = run.stdout.splitlines() or [run.stderr] * 3
    assert first == second == f'{commit} (1, 0) 269', run.stdout + run.stderr
    assert third.startswith('eva/none: no such folder, and it could not be fetched from the Hub')
    assert same(load_pretrained(snapshot), model_of(0))
    outside = tmp_path / 'secret.json'
    outside.write_text('{}')
    (snapshot / 'generation_config.json').unlink()
    (snapshot / 'generation_config.json').symlink_to(outside)
    with pytest.raises(ValueError, match='a link that leads out of'):
        load_pretrained(snapshot)
    assert pretrained_folder(str(snapshot)) == snapshot
    assert load_tokenizer(snapshot / 'tokenizer.json', snapshot).get_vocab_size() == 269


def test_no_warning_comes_of_any_of_it(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        save_pretrained(model_of(0), tmp_path, max_shard_size='40KB')
        load_pretrained(tmp_path)
