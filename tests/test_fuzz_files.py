"""Folders from outside that were damaged: loaded and equal, or refused in one sentence

The sentence names the file.

Every case runs in a child process with a bounded address space, and its time is bounded too.
`EVA_FUZZ=50000 pytest tests/test_fuzz_files.py` tries more cases of each kind, `--flags slow` ten
thousand in all.
"""

import json
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch

from eva.checkpoints.conversion import convert_checkpoint
from eva.checkpoints.int4 import quantize_int4
from eva.checkpoints.pretrained import save_pretrained
from eva.config import Config
from eva.data.tokenizer import train_tokenizer
from eva.model.transformer import DeepSeekV3

ROUNDS = int(os.environ.get('EVA_FUZZ', 25))  # cases of each kind of damage
SLOW_ROUNDS = int(os.environ.get('EVA_FUZZ', 1000))
SECONDS_OF_A_CASE = 5  # of processor time; a normal one takes 0.02 s
SECONDS_OF_A_HANG = 120  # by the clock, on a machine that does other things too
BYTES_OF_A_CHILD = 6 * 2**30  # of address space, 2 of which PyTorch reserves
GROWTH_OF_A_CHILD = 600 * 2**20  # of resident memory, beyond what it has after the first load
ODD = [
    None, -1, 0, 1, 2, 3, 1e30, 1e-30, float('nan'), float('inf'), 'x', '', '8', [], [1], [[1]], {},
    {'type': 'yarn'}, True, False, 2**31, 2**40, 2**62, 2**70, -(2**63), 10**29, 0.5, 128,
    'a' * 10**5, list(range(1000)),
]  # fmt: skip
FILES = (
    'config.json', 'model.safetensors', 'tokenizer.json', 'tokenizer_config.json',
    'generation_config.json', 'model.safetensors.index.json',
)  # fmt: skip


OTHER_TYPES = dict(
    axk1=dict(model_type='axk1', post_mlp_layernorm=True, attention_bias=True),
    youtu=dict(model_type='youtu', tie_word_embeddings=True, rope_interleave=False),
    mistral4=dict(
        model_type='mistral4', topk_method='group_limited_top2', scoring_func='softmax',
        rope_scaling=dict(
            type='yarn', factor=4.0, original_max_position_embeddings=16, mscale=1.0,
            mscale_all_dim=1.0, llama_4_scaling_beta=0.1,
        ),
    ),
    kimi_k2=dict(model_type='kimi_k2', n_group=2, topk_group=1),
    sarvam_mla=dict(model_type='sarvam_mla', q_lora_rank=None, rope_interleave=False),
    glm4_moe_lite=dict(model_type='glm4_moe_lite', attention_bias=True),
    deepseek_v32=dict(
        model_type='deepseek_v32', index_topk=6, index_n_heads=2, index_head_dim=8,
    ),
    glm_moe_dsa=dict(
        model_type='glm_moe_dsa', index_topk=6, index_n_heads=2, index_head_dim=8,
        index_rope_interleave=True, indexer_types=('full', 'shared'),
    ),
)  # fmt: skip


@pytest.fixture(scope='module')
def sources(tmp_path_factory):
    "A plain folder, one in FP8, one of two files with an index, and one of each other kind of type"
    root = tmp_path_factory.mktemp('sources')
    torch.manual_seed(0)
    cfg = Config.from_preset(
        'mini', vocab_size=300, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
        q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4,
        intermediate_size=16, moe_intermediate_size=8, n_routed_experts=4,
    )  # fmt: skip
    tokenizer = train_tokenizer(['def f(x): return x\n' * 20], 280)
    save_pretrained(DeepSeekV3(cfg), root / 'plain', tokenizer)
    (root / 'plain' / 'generation_config.json').write_text(json.dumps(dict(eos_token_id=[1, 2])))
    convert_checkpoint(root / 'plain', root / 'fp8', 'fp8')
    shutil.copytree(root / 'plain', root / 'sharded')
    from safetensors.torch import load_file, save_file

    tensors = load_file(root / 'plain' / 'model.safetensors')
    (root / 'sharded' / 'model.safetensors').unlink()
    where = {}
    for i in range(2):
        part = {n: t for j, (n, t) in enumerate(tensors.items()) if j % 2 == i}
        save_file(part, root / 'sharded' / f'model-{i}.safetensors')
        where |= dict.fromkeys(part, f'model-{i}.safetensors')
    (root / 'sharded' / 'model.safetensors.index.json').write_text(
        json.dumps(dict(weight_map=where))
    )
    for name, changes in OTHER_TYPES.items():
        model = DeepSeekV3(cfg.replace(**changes, num_nextn_predict_layers=0))
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            save_pretrained(model, root / name, tokenizer)
    return [root / n for n in ('plain', 'fp8', 'sharded', *OTHER_TYPES)]


@pytest.fixture(scope='module')
def packed(sources):
    "The plain folder in the form of Kimi K2.5's: a prefix, experts of four bits, a vision tower"
    from safetensors.torch import load_file, save_file

    plain = sources[0]
    folder = plain.parent / 'packed'
    shutil.copytree(plain, folder)
    tensors = {'vision_tower.norm.weight': torch.ones(3)}
    for name, tensor in load_file(plain / 'model.safetensors').items():
        stored = {f'language_model.{name}': tensor}
        if '.experts.' in name:
            values, scale = quantize_int4(tensor, 8)
            parts = dict(packed=values, scale=scale, shape=torch.tensor(tensor.shape))
            stored = {f'language_model.{name}_{part}': t for part, t in parts.items()}
        tensors |= stored
    save_file(tensors, folder / 'model.safetensors')
    weights = dict(
        num_bits=4, type='int', strategy='group', group_size=8, symmetric=True, dynamic=False,
        actorder=None, block_structure=None,
    )  # fmt: skip
    group = dict(weights=weights, input_activations=None, output_activations=None)
    quantization = dict(
        quant_method='compressed-tensors', format='pack-quantized', kv_cache_scheme=None,
        quantization_status='compressed', ignore=['lm_head'], config_groups=dict(group_0=group),
    )  # fmt: skip
    text = json.loads((plain / 'config.json').read_text())
    text |= dict(quantization_config=quantization)
    config = dict(model_type='kimi_k25', text_config=text, vision_config={}, dtype='float32')
    (folder / 'config.json').write_text(json.dumps(config))
    return folder


def places(value, path=()):
    "Every place in a JSON value"
    yield path
    items = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for key, below in items:
        yield from places(below, (*path, key))


def put(value, path, new):
    for key in path[:-1]:
        value = value[key]
    if path:
        value[path[-1]] = new


def mutate_json(rng, raw):
    "Put something else in a few places, the upper ones more often"
    found = json.loads(raw)
    for _ in range(rng.choice((1, 1, 2))):
        spots = [p for p in places(found) if p]
        shallow = [p for p in spots if len(p) <= 2]
        spot = rng.choice(shallow if rng.random() < 0.8 else spots)
        if rng.random() < 0.15:
            holder = found
            for key in spot[:-1]:
                holder = holder[key]
            del holder[spot[-1]]
        else:
            put(found, spot, rng.choice(ODD))
    return json.dumps(found).encode()


def nest(rng, raw):
    depth = rng.choice((70, 1000, 10**5))
    deep = rng.choice(('[' * depth + ']' * depth, '{"a":' * depth + '1' + '}' * depth))
    return rng.choice((deep, raw.decode(errors='replace')[:-2] + ',"deep":' + deep + '}')).encode()


def huge_number(rng, raw):
    digits = rng.choice((400, 10**4, 10**6))
    text = raw.decode(errors='replace')
    numbers = [i for i, c in enumerate(text) if c.isdigit()]
    at = rng.choice(numbers) if numbers else len(text)
    return (text[:at] + '9' * digits + text[at + 1 :]).encode()


def truncate(rng, raw):
    return raw[: rng.randrange(len(raw))]


def flip(rng, raw):
    raw = bytearray(raw)
    limit = (
        8 + int.from_bytes(raw[:8], 'little') if raw[8:9] == b'{' and len(raw) > 2000 else len(raw)
    )
    for _ in range(rng.randrange(1, 6)):
        raw[rng.randrange(min(limit, len(raw)))] ^= 1 << rng.randrange(8)
    return bytes(raw)


def grow(rng, raw):
    return raw + bytes(rng.randrange(1, 100))


def header_of(raw):
    length = int.from_bytes(raw[:8], 'little')
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def mutate_header(rng, raw):
    "Wrong types, shapes and offsets in the header of safetensors, or a wrong length before it"
    if rng.random() < 0.2:
        return (
            rng.choice((0, 1, 2**20, 2**31, 2**40, 2**63, 2**64 - 1)).to_bytes(8, 'little')
            + raw[8:]
        )
    header, data = header_of(raw)
    name = rng.choice([n for n in header if n != '__metadata__'])
    entry = header[name]
    what = rng.choice(('dtype', 'shape', 'data_offsets', 'name', 'entry'))
    if what == 'dtype':
        entry['dtype'] = rng.choice(('F64', 'F16', 'I8', 'F8_E4M3', 'F4', 'BOOL', 'X', 7))
    elif what == 'shape':
        entry['shape'] = rng.choice(
            ([], [0], [-1, 4], [2**62, 4], [1.5], 'x', entry['shape'][::-1], [*entry['shape'], 1])
        )
    elif what == 'data_offsets':
        start, end = entry['data_offsets']
        entry['data_offsets'] = rng.choice(
            (
                [end, start],
                [start, end + 4],
                [0, 2**62],
                [start + 1, end + 1],
                [-4, end],
                [start],
                'x',
            )
        )
    elif what == 'name':
        header[
            rng.choice(
                ('', 'x', name + '.bias', 'model.layers.99.mlp.gate.weight', '../x', 'a' * 10**4)
            )
        ] = header.pop(name)
    else:
        header[name] = rng.choice(ODD[:20])
    text = json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + data


def mutate_quantization(rng, raw):
    "Put something else in the configuration of the language model, mostly in that of its weights"
    found = json.loads(raw)
    text = found['text_config']
    about = text if rng.random() < 0.2 else text['quantization_config']
    for _ in range(rng.choice((1, 1, 2))):
        spot = rng.choice([p for p in places(about) if p])
        if rng.random() < 0.2:
            holder = about
            for key in spot[:-1]:
                holder = holder[key]
            del holder[spot[-1]]
        else:
            more = 'channel', 'group', 'float', 'pack-quantized', 'static', 4, 16, json.loads(raw)
            put(about, spot, rng.choice((*ODD, *more)))
    return json.dumps(found).encode()


def mutate_packed(rng, raw):
    "Another number, type, name or place for one of the three tensors of a weight"
    header, data = header_of(raw)
    data = bytearray(data)
    name = rng.choice([n for n in header if n.rpartition('_')[2] in ('packed', 'scale', 'shape')])
    stem, _, part = name.rpartition('_')
    start, end = header[name]['data_offsets']
    what = rng.choice(('bytes', 'bytes', 'gone', 'renamed', 'twice', 'swapped', 'size'))
    if what == 'bytes':
        values = struct.pack('<q', rng.choice((-1, 0, 1, 8, 17, 2**31, 2**62, -(2**63))))
        odd = rng.choice((b'\xff' * 8, b'\x80\x7f' * 4, b'\0' * 8, values, rng.randbytes(8)))
        at = rng.randrange(start, end, 8) if rng.random() < 0.5 else start
        data[at : min(at + 8, end)] = odd[: end - at]
    elif what == 'gone':
        header['language_model.other'] = header.pop(name)
    elif what == 'renamed':
        other = rng.choice(('zero_point', 'g_idx', 'global_scale', 'packed', 'scale', 'shape'))
        header[f'{stem}_{other}'] = header.pop(name)
    elif what == 'twice':
        header[rng.choice((stem, f'{stem}_zero_point', f'{stem}_g_idx'))] = header[name]
    elif what == 'swapped':
        other = rng.choice([n for n in header if n.endswith(('_packed', '_scale', '_shape'))])
        header[name], header[other] = header[other], header[name]
    else:
        header[name]['shape'] = rng.choice(
            (header[name]['shape'][::-1], [1, *header[name]['shape']], [end - start], [])
        )
    text = json.dumps(header).encode()
    return struct.pack('<Q', len(text)) + text + bytes(data)


def content_damage(change, names):
    def damage(rng, folder):
        there = [n for n in names if (folder / n).exists()]
        shards = (
            [p.name for p in folder.glob('*.safetensors')] if 'model.safetensors' in names else []
        )
        path = folder / rng.choice(sorted({*there, *shards}))
        raw = path.read_bytes()
        path.unlink()  # it may be a hard link of the source
        path.write_bytes(change(rng, raw))
        return path.name

    return damage


def not_a_file(rng, folder):
    "A pipe, a folder, a device or a link that leads elsewhere, in place of a file"
    path = folder / rng.choice([n for n in FILES if (folder / n).exists()])
    outside = folder.parent / f'outside-{path.name}'
    outside.write_bytes(path.read_bytes())
    path.unlink()
    kind = rng.choice(('pipe', 'folder', 'null', 'zero', 'outside', 'itself', 'gone'))
    if kind == 'pipe':
        os.mkfifo(path)
    elif kind == 'folder':
        path.mkdir()
    else:
        path.symlink_to(
            dict(
                null='/dev/null',
                zero='/dev/zero',
                outside=outside,
                itself=path,
                gone=folder / 'none',
            )[kind]
        )
    return path.name


def too_large(rng, folder):
    "A sparse file of gigabytes"
    path = folder / rng.choice([n for n in FILES if (folder / n).exists() and n.endswith('.json')])
    path.unlink()
    with open(path, 'wb') as f:
        f.write(rng.choice((b'', b'{', b'[')))
        f.truncate(rng.choice((2**30, 2**34)))
    return path.name


JSONS = [n for n in FILES if n.endswith('.json')]
KINDS = dict(
    json=content_damage(mutate_json, JSONS),
    config=content_damage(mutate_json, ['config.json']),
    nested=content_damage(nest, JSONS),
    number=content_damage(huge_number, JSONS),
    cut=content_damage(truncate, FILES),
    flip=content_damage(flip, FILES),
    grow=content_damage(grow, ['model.safetensors']),
    header=content_damage(mutate_header, ['model.safetensors']),
    kind=not_a_file,
    large=too_large,
)  # fmt: skip
OF_INT4 = dict(
    quantization=content_damage(mutate_quantization, ['config.json']),
    packed=content_damage(mutate_packed, ['model.safetensors']),
)  # fmt: skip

CHILD = """
import json, hashlib, resource, sys, time, warnings
import torch
torch.set_num_threads(1)
from pathlib import Path
from eva.generation.chat_templates import ChatTemplate
from eva.checkpoints.tokenizers import load_tokenizer
from eva.checkpoints.pretrained import load_pretrained
from eva.generation.chat import ChatSession
warnings.simplefilter('ignore')
resource.setrlimit(resource.RLIMIT_AS, (int(sys.argv[1]),)*2)
def attempt(folder):
    s = ChatSession(folder)
    found = hashlib.sha256()
    for name, t in s.model.state_dict().items():
        found.update(name.encode())
        found.update(t.contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()
for line in sys.stdin:
    start = time.process_time()
    try: said = dict(loaded=attempt(Path(line.rstrip())))
    except ValueError as e: said = dict(refused=str(e))
    except BaseException as e: said = dict(fault=f'{type(e).__name__}: {e}'[:500])
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    seconds = time.process_time() - start
    print(json.dumps(said | dict(seconds=seconds, peak=peak)), flush=True)
"""


class Child:
    "A process that loads folders one after the other, and is killed when one takes too long"

    def __init__(self, script=CHILD):
        command = [sys.executable, '-c', script, str(BYTES_OF_A_CHILD)]
        clean = {k: v for k, v in os.environ.items() if not k.startswith('RUST_')}
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=clean
        )

    def load(self, folder, what):
        def ring(*_):
            raise TimeoutError

        before = signal.signal(signal.SIGALRM, ring)
        signal.alarm(SECONDS_OF_A_HANG)
        try:
            self.process.stdin.write(f'{folder}\n')
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except TimeoutError:
            self.process.kill()
            raise AssertionError(f'{what}: no answer after {SECONDS_OF_A_HANG} s') from None
        finally:
            signal.alarm(0)
            signal.signal(signal.SIGALRM, before)
        assert line, f'{what}: the process ended with {self.process.wait(5)}'
        return json.loads(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait(10)


@pytest.fixture(scope='module')
def child(sources, packed):
    c = Child()
    c.whole = {s: c.load(s, s)['loaded'] for s in (*sources, packed)}
    c.peak = c.load(sources[0], 'again')['peak']
    yield c
    c.close()


def copy_of(source, case):
    shutil.rmtree(case, ignore_errors=True)
    case.mkdir()
    for f in source.iterdir():
        os.link(f, case / f.name)


def one_sentence(text, folder, name):
    assert '\n' not in text and 10 < len(text) < 2000, text
    assert str(folder) in text or name in text or 'safetensors' in text or 'config.json' in text, (
        f'names no file: {text}'
    )


def run_cases(kind, rounds, sources, child, tmp_path):
    "Damage, load, judge; return how often each outcome came"
    seen = dict(loaded=0, refused=0)
    for i in range(rounds):
        rng = random.Random(f'{kind} {i}')
        source = rng.choice(sources)
        case = tmp_path / 'case'
        copy_of(source, case)
        try:
            name = (KINDS | OF_INT4)[kind](rng, case)
        except (json.JSONDecodeError, IndexError):
            continue
        what = f'{kind} case {i}: {name} of {source.name}'
        said = child.load(case, what)
        assert 'fault' not in said, f'{what}: {said["fault"]}'
        assert said['seconds'] < SECONDS_OF_A_CASE, f'{what}: {said["seconds"]:.1f} s'
        assert said['peak'] - child.peak < GROWTH_OF_A_CHILD, f'{what}: {said["peak"] / 1e6:.0f} MB'
        seen['loaded' if 'loaded' in said else 'refused'] += 1
        if 'refused' in said:
            one_sentence(said['refused'], case, name)
        elif (
            name in ('tokenizer.json', 'tokenizer_config.json', 'generation_config.json')
            or kind == 'kind'
        ):
            assert said['loaded'] == child.whole[source], f'{what}: loaded, and other weights'
    shutil.rmtree(tmp_path / 'case', ignore_errors=True)
    return seen


@pytest.mark.parametrize('kind', KINDS)
def test_damaged_folders(kind, sources, child, tmp_path):
    seen = run_cases(kind, ROUNDS // (4 if kind == 'nested' else 1), sources, child, tmp_path)
    assert seen['refused'] > 0, seen


@pytest.mark.slow
@pytest.mark.parametrize('kind', KINDS)
def test_ten_thousand_damaged_folders(kind, sources, child, tmp_path):
    run_cases(kind, SLOW_ROUNDS, sources, child, tmp_path)


@pytest.mark.parametrize('kind', [*KINDS, *OF_INT4])
def test_damaged_int4_folders(kind, packed, child, tmp_path):
    seen = run_cases(kind, ROUNDS // (4 if kind == 'nested' else 1), [packed], child, tmp_path)
    assert seen['refused'] > 0, seen


@pytest.mark.slow
@pytest.mark.parametrize('kind', [*KINDS, *OF_INT4])
def test_ten_thousand_damaged_int4_folders(kind, packed, child, tmp_path):
    run_cases(kind, SLOW_ROUNDS, [packed], child, tmp_path)


def test_conversion_of_damaged_folders(sources, packed, tmp_path):
    "Converted, or refused in a sentence; the output is there whole or not at all"
    for i in range(ROUNDS // 2):
        convert_damaged(f'convert {i}', sources, KINDS, tmp_path)
    for i in range(ROUNDS):
        convert_damaged(f'convert int4 {i}', [packed], KINDS | OF_INT4, tmp_path)


@pytest.mark.slow
def test_conversion_of_a_thousand_damaged_int4_folders(packed, tmp_path):
    for i in range(SLOW_ROUNDS):
        convert_damaged(f'convert int4 {i}', [packed], KINDS | OF_INT4, tmp_path)


def convert_damaged(what, sources, kinds, tmp_path):
    "Damage a folder, convert it, judge"
    rng = random.Random(what)
    source = rng.choice(sources)
    case = tmp_path / 'case'
    out = tmp_path / 'out'
    copy_of(source, case)
    kind = rng.choice([k for k in kinds if k != 'nested'])
    name = kinds[kind](rng, case)
    to = rng.choice(('bf16', 'fp32', 'fp8'))
    start = time.process_time()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            convert_checkpoint(case, out, to)
    except ValueError as e:
        one_sentence(str(e), case, name)
        assert not out.exists()
    else:
        assert (out / 'config.json').exists() and not list(out.glob('.*'))
    assert time.process_time() - start < SECONDS_OF_A_CASE, what
    for left in (out, tmp_path / 'out.partial'):
        shutil.rmtree(left, ignore_errors=True)


HARMFUL = CHILD.replace(
    '    s = ChatSession(folder)\n',
    """    if folder.name == 'error': raise KeyError('x')
    if folder.name == 'crash': import os; os._exit(3)
    if folder.name == 'large': return str(len(bytearray(2**30))) + str(len(bytes(b'x')*2**30))
""",
)


def test_the_cases_would_notice(monkeypatch):
    "A loader that raises something else, takes memory, ends the process or hangs is found out"
    harmful = Child(HARMFUL)
    assert 'KeyError' in harmful.load(Path('error'), 'an error')['fault']
    assert harmful.load(Path('large'), 'memory')['peak'] > GROWTH_OF_A_CHILD
    with pytest.raises(AssertionError, match='the process ended with 3'):
        harmful.load(Path('crash'), 'a crash')
    sleepy = Child('import time; time.sleep(1000)')
    monkeypatch.setattr(sys.modules[__name__], 'SECONDS_OF_A_HANG', 1)
    with pytest.raises(AssertionError, match='no answer after 1 s'):
        sleepy.load(Path('hang'), 'a child that sleeps')
    sleepy.process.wait(5)
