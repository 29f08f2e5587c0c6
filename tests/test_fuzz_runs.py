"""Checkpoints, logs and token files with mutated contents: taken up, or refused with a ValueError

Quickly, too. `EVA_FUZZ=20000 pytest tests/test_fuzz_runs.py` tries more.
"""

import ast
import json
import os
import random
import shutil
import struct
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from sizes import TINY

from eva.config import Config
from eva.data.decode import Document
from eva.data.ingest import documents
from eva.data.shards import ShardStream, ShardWriter
from eva.data.text import TokenStream, write_tokens
from eva.data.tokenizer import train_tokenizer
from eva.model.transformer import DeepSeekV3
from eva.training.checkpointing import _check, _sha, checkpoints, read_metrics
from eva.training.config import TrainConfig
from eva.training.trainer import Trainer

CASES = int(os.environ.get('EVA_FUZZ', 400))
ODD = [
    None,
    -1,
    0,
    1,
    3,
    1e30,
    float('nan'),
    float('inf'),
    'x',
    '',
    '8',
    [],
    [1],
    {},
    {'a': 1},
    True,
    2**31,
    2**62,
    2**70,
    -(2**63),
    0.5,
    [[1, 2, 3]],
    {'x': [1]},
]


@pytest.fixture(scope='module')
def run(tmp_path_factory):
    root = tmp_path_factory.mktemp('runs')
    text = 'for i in range(10):\n    print(i, i*i)\n' * 40
    tok = train_tokenizer([text], 270)
    train, held = (
        write_tokens(root / f'{n}.npy', [Document(n, t)], tok)
        for n, t in (('train', text * 3), ('held', text[:900]))
    )

    def make(out):
        torch.manual_seed(0)
        return Trainer(
            DeepSeekV3(Config.from_preset('mini', vocab_size=tok.get_vocab_size(), **TINY)),
            train,
            held,
            TrainConfig(
                steps=6, batch_size=2, micro_batch=2, seq_len=16, save_every=3, precision='fp16'
            ),
            out,
        )

    t = make(root / 'run')
    t.fit()
    return root, make


def attempt(work, what):
    start = time.time()
    try:
        out = work()
    except ValueError as e:
        assert 10 < len(str(e)) < 3000, (what, str(e))
        out = None
    except Exception as e:
        raise AssertionError(f'{what}: {type(e).__name__}: {e}') from e
    assert time.time() - start < 20, what
    return out


def spoil(x, rng):
    "Change something, somewhere"
    if isinstance(x, dict) and x and rng.random() < 0.8:
        k = rng.choice(sorted(x))
        if rng.random() < 0.1:
            return {a: v for a, v in x.items() if a != k}
        return {**x, k: spoil(x[k], rng)}
    if isinstance(x, list) and x and rng.random() < 0.7:
        i = rng.randrange(len(x))
        return x[:i] + [spoil(x[i], rng)] + x[i + 1 :]
    return rng.choice(ODD)


def rewritten(path, state):
    "A state.json whose checksums are right, as whoever wishes us ill would write it"
    state = {k: v for k, v in state.items() if k != 'check'}
    (path / 'state.json').write_text(json.dumps(dict(state, check=_check(state))))


def test_mutated_state(run, tmp_path):
    root, make = run
    source = checkpoints(root / 'run' / 'checkpoints')[-1]
    taken = 0
    state = json.loads((source / 'state.json').read_text())
    t = make(tmp_path)
    for i in range(CASES):
        rng = random.Random(i)
        case = tmp_path / 'checkpoints' / source.name
        case.mkdir(parents=True)
        os.link(source / 'tensors.safetensors', case / 'tensors.safetensors')
        bad = spoil(state, rng)
        rewritten(case, bad) if isinstance(bad, dict) else (case / 'state.json').write_text(
            json.dumps(bad)
        )
        said = attempt(
            t.resume,
            (
                i,
                {k: v for k, v in bad.items() if state.get(k) != v}
                if isinstance(bad, dict)
                else bad,
            ),
        )
        taken += bool(said)
        shutil.rmtree(tmp_path / 'checkpoints')
    assert 0 < taken < CASES


def test_mutated_tensors(run, tmp_path):
    "With a checksum that is right: a header that claims too much, names and shapes not ours"
    root, make = run
    source = checkpoints(root / 'run' / 'checkpoints')[-1]
    state = json.loads((source / 'state.json').read_text())
    raw = (source / 'tensors.safetensors').read_bytes()
    head = 8 + int.from_bytes(raw[:8], 'little')
    header = json.loads(raw[8:head])
    t = make(tmp_path)
    refused = 0
    for i in range(CASES):
        rng = random.Random(i)
        case = tmp_path / 'checkpoints' / source.name
        bad = bytearray(raw)
        kind = rng.choice(('json', 'header', 'length', 'cut', 'grow'))
        if kind == 'json':
            text = json.dumps(spoil(header, rng)).encode()
            bad = struct.pack('<Q', len(text)) + text + raw[head:]
        elif kind == 'header':
            for _ in range(rng.randrange(1, 6)):
                bad[rng.randrange(8, head)] = rng.choice(b'0123456789[]{},:"aF_')
        elif kind == 'length':
            bad[:8] = rng.choice((0, 1, head, head - 9, 2**31, 2**40, 2**63, 2**64 - 1)).to_bytes(
                8, 'little'
            )
        elif kind == 'cut':
            del bad[rng.randrange(len(bad)) :]
        else:
            bad += bytes(rng.randrange(1, 100))
        case.mkdir(parents=True)
        (case / 'tensors.safetensors').write_bytes(bad)
        rewritten(case, dict(state, sha256=_sha(case / 'tensors.safetensors')))
        said = attempt(t.resume, (i, kind))
        refused += said is None or 'no complete checkpoint' in said
        shutil.rmtree(tmp_path / 'checkpoints')
    assert refused > CASES // 2


def test_mutated_log(run, tmp_path):
    root, make = run
    raw = (root / 'run' / 'metrics.jsonl').read_bytes()
    for i in range(CASES):
        rng = random.Random(i)
        bad = bytearray(raw)
        for _ in range(rng.randrange(1, 8)):
            if rng.random() < 0.5:
                bad[rng.randrange(len(bad))] = rng.randrange(256)
            else:
                a = rng.randrange(len(bad))
                bad[a:a] = rng.choice(
                    (b'\n', b'{}\n', b'[1]\n', b'null\n', b'{"step": 1e99}\n', b'[' * 3000, b'\0')
                )
        (tmp_path / 'metrics.jsonl').write_bytes(bad)
        rows = attempt(lambda: read_metrics(tmp_path / 'metrics.jsonl'), i)
        assert rows is not None and all(isinstance(r['step'], int) for r in rows)


def test_mutated_tokens(run, tmp_path):
    root, _ = run
    npy = (root / 'train.npy').read_bytes()
    meta = json.loads((root / 'train.json').read_text())
    for i in range(CASES):
        rng = random.Random(i)
        bad = bytearray(npy)
        about = meta
        kind = rng.choice(('meta', 'header', 'zip', 'pickle', 'cut'))
        if kind == 'meta':
            about = spoil(meta, rng)
        elif kind == 'header':
            for _ in range(rng.randrange(1, 5)):
                bad[rng.randrange(128)] = rng.choice(b'0123456789(){},:\'"<u2OV \n')
        elif kind == 'zip':
            bad[:4] = b'PK\x03\x04'
        elif kind == 'pickle':
            text = b"{'descr': '|O', 'fortran_order': False, 'shape': (3,), }\n".ljust(118)
            bad = bytearray(
                b'\x93NUMPY\x01\x00'
                + struct.pack('<H', 118)
                + text
                + b'cos\nsystem\n(S"touch pwned"\ntR.'
            )
        else:
            del bad[rng.randrange(len(bad)) :]
        (tmp_path / 't.npy').write_bytes(bad)
        (tmp_path / 't.json').write_text(json.dumps(about))

        def read():
            s = TokenStream(tmp_path / 't.npy')
            return s.batch(0, 2, 16, 2)

        got = attempt(read, (i, kind, about if about != meta else ''))
        assert got is None or kind in ('meta', 'header')
    assert not Path('pwned').exists()


def test_mutated_shards(tmp_path):
    w = ShardWriter(tmp_path / 's', 300, size=100, with_loss_mask=True)
    for _ in range(30):
        w.add(np.arange(17), 17, np.ones(17, bool))
    w.close(align=1)
    index = json.loads((tmp_path / 's' / 'index.json').read_text())
    case = tmp_path / 'case'
    shutil.copytree(tmp_path / 's', case)
    for i in range(CASES):
        (case / 'index.json').write_text(json.dumps(spoil(index, random.Random(i))))

        def read():
            s = ShardStream(case)
            return s.batch(0, 2, 16, 2), s.loss_mask_batch(0, 2, 16, 2)

        attempt(read, i)


def test_mutated_lines(tmp_path):
    raw = ''.join(json.dumps(dict(text=f'text {i} ü')) + '\n' for i in range(20)).encode()
    for i in range(CASES):
        rng = random.Random(i)
        bad = bytearray(raw)
        for _ in range(rng.randrange(1, 5)):
            bad[rng.randrange(len(bad))] = rng.randrange(256)
        (tmp_path / 'a.jsonl').write_bytes(bad)
        attempt(
            lambda: [d.text.encode('utf-8', 'replace') for d in documents([tmp_path / 'a.jsonl'])],
            i,
        )


def test_nothing_is_unpickled():
    "No pickle, no torch.load, and numpy only where objects are refused"
    found = 0
    for path in sorted((Path(__file__).parents[1] / 'eva').rglob('*.py')):
        for node in ast.walk(ast.parse(path.read_text(encoding='utf-8'))):
            names = (
                [a.name for a in node.names] + [getattr(node, 'module', '') or '']
                if isinstance(node, (ast.Import, ast.ImportFrom))
                else []
            )
            assert not {
                'pickle',
                'cPickle',
                'dill',
                'cloudpickle',
                'joblib',
                'shelve',
                'marshal',
            } & {n.split('.')[0] for n in names}, path
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
                continue
            call = ast.unparse(node.func)
            assert call not in (
                'torch.load',
                'torch.jit.load',
                'torch.hub.load',
                'np.fromfile',
            ) and not call.endswith('load_state_dict_from_url'), (path, call)
            if call == 'np.load':
                assert any(
                    k.arg == 'allow_pickle' and k.value.value is False for k in node.keywords
                ), path
            found += call in ('np.load', 'np.lib.format.open_memmap', 'json.loads')
    assert found > 5
