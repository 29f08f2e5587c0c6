"""Several processes: the same result in every layout, and checkpoints for any number of ranks

Exports, and ranks that die, too.
"""

import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranks
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from eva.checkpoints.pretrained import load_pretrained, save_pretrained
from eva.config import Config
from eva.distributed.expert_parallel import torchrun
from eva.model.transformer import DeepSeekV3
from eva.training.checkpointing import checkpoints, load_checkpoint, read_metrics

HERE = Path(__file__).parent
ENV = os.environ | dict(
    OMP_NUM_THREADS='1',
    MKL_NUM_THREADS='1',
    PYTHONPATH=f'{HERE.parent}{os.pathsep}{os.environ.get("PYTHONPATH", "")}',
)
FSDP: dict = {}
EP = dict(ep=4, fsdp=False)
BOTH = dict(ep=2)
LAYOUTS = dict(
    fsdp=FSDP,
    ep=EP,
    both=BOTH,
    copies=dict(ep=2, fsdp=False),
    pipeline=dict(pp=2),
    pipeline_ep=dict(pp=2, ep=2),
    dualpipev=dict(pp=2, schedule='dualpipev'),
)
RECOMPUTE = dict(ep=2, recompute=True)
MORE = dict(
    recompute=RECOMPUTE,
    recompute_fsdp=dict(recompute=True),
    four_stages=dict(pp=4),
    zero_bubble=dict(pp=2, schedule='zero_bubble'),
    zbv=dict(pp=2, schedule='zbv'),
    ep_and_fsdp=dict(ep=4),
)


def together(n, out, *cases, timeout=900):
    "Start n ranks that work through the cases; what each rank found, by case"
    out.mkdir(exist_ok=True)
    for o in ('train', 'held'):
        ranks.stream(out / f'{o}.npy')
    torchrun(HERE / 'ranks.py', out, *map(json.dumps, cases), ranks=n, env=ENV, timeout=timeout)
    return {c['name']: json.loads((out / f'{c["name"]}.json').read_text()) for c in cases}


def alone(out, **kw):
    torch.set_num_threads(1)
    return ranks.trainer(out, **kw)


def case(name, layout, dtype='float64', do='train', **kw):
    return (
        dict(
            name=name,
            parallel=layout,
            do=do,
            run=dict(dtype=dtype)
            | (dict(micro_batch=1) if layout.get('pp') else {})
            | kw.pop('run', {}),
        )
        | kw
    )


def compare(out, found, cases, tolerance, of_gradients=None):
    "Cases with one process that does the same"
    settings = {k: v for k, v in cases[0]['run'].items() if k != 'micro_batch'}
    dtype = settings['dtype']
    rows, first = ranks.curve(alone(out / f'alone-{cases[0]["name"]}', **settings))
    for c in cases:
        everyone = found[c['name']]
        theirs = everyone[0]['rows']
        assert len(theirs) == len(rows) == settings.get('steps', 20)
        for key in ('loss', 'grad_norm', 'mtp_loss', 'val_loss'):
            off = max(abs(a[key] - b[key]) for a, b in zip(rows, theirs) if key in a)
            print(f'{c["name"]:24} {dtype} {key}: {off:.1e}')
            assert off <= (tolerance if key != 'grad_norm' else 100 * tolerance), (
                c['name'],
                key,
                off,
            )
        if dtype == 'float64':
            assert all(a['expert_load'] == b['expert_load'] for a, b in zip(rows, theirs))
        assert all(
            o['rows'][-1]['loss'] == theirs[-1]['loss'] for o in everyone
        )  # every rank knows
        grads = load_file(out / f'{c["name"]}.safetensors')
        assert grads.keys() == first.keys()
        for n in first:
            assert (grads[n] - first[n]).norm() <= (
                of_gradients or dict(float64=1e-12, float32=1e-4)[dtype]
            ) * first[n].norm(), (c['name'], n)


SHORT = dict(steps=6, save_every=3, keep_checkpoints=3)
SMALL = dict(model=dict(num_hidden_layers=2))
BACK = SMALL | dict(
    spoil=True,
    steps=40,
    batch_size=4,
    seq_len=32,
    mtp_batch_ratio=1.0,
    save_every=10,
    on_spike='rewind',
    lr=0.02,
    muon_lr=0.02,
    batch_size_warmup=0.0,
)
WIDE = dict(
    dtype='float32',
    model=dict(
        hidden_size=128, n_routed_experts=32, n_group=4, moe_intermediate_size=384, vocab_size=67
    ),
)
SAVED = dict(both=BOTH, pipeline_ep=dict(pp=2, ep=2))
# Starting ranks takes longer than most of what they do, so two starts do the work of all these
# tests: first four ranks, then two, which also read what the four have left
BY_FOUR = dict(
    test_exports_without_gathering=[
        case(f'export-{k}', v, do='export', run=WIDE)
        for k, v in dict(both=BOTH, fsdp=FSDP, stages=dict(pp=2, ep=2)).items()
    ],  # first: memory that was freed would hide growth
    # the others need no more than two; `test_more_layouts` has all of them with both
    test_every_layout_trains_alike_in_float64=[
        case(f'{k}-4', LAYOUTS[k]) for k in ('both', 'copies', 'pipeline_ep')
    ],
    test_every_layout_trains_alike_in_float32=[
        case(f'{k}-float32', LAYOUTS[k], 'float32') for k in ('both', 'pipeline')
    ],
    test_bfloat16_trains_nearly_alike=[
        case(
            f'{k}-bf16',
            LAYOUTS[k],
            'float32',
            run=SMALL | dict(precision='bf16', optimizer_state_dtype='bf16'),
        )
        for k in ('pipeline',)
    ],
    test_answers_are_learned_alike=[
        case(f'{k}-learn', LAYOUTS[k], run=SMALL | dict(loss_mask=True, mask_documents=True))
        for k in ('copies',)
    ],
    test_all_ranks_go_back_together=[
        case(f'{k}-back', LAYOUTS[k], run=BACK) for k in ('pipeline_ep',)
    ],
    test_checkpoints_suit_any_number_of_ranks=[
        case(k, v, run=SHORT | dict(micro_batch=1)) for k, v in SAVED.items()
    ],
)
BY_FOUR['test_damage_is_found_and_said_by_all'] = BY_FOUR[
    'test_checkpoints_suit_any_number_of_ranks'
]
BY_TWO = dict(
    test_every_layout_trains_alike_in_float64=[
        case(f'{k}-2', v)
        for k, v in (LAYOUTS | dict(recompute=RECOMPUTE)).items()
        if k in ('fsdp', 'copies', 'pipeline', 'dualpipev', 'recompute')
    ],
    test_checkpoints_suit_any_number_of_ranks=[
        case(f'{k}-{i}', v, do='save', folder=k, resume=True, run=SHORT | dict(micro_batch=1))
        for k in SAVED
        for i, v in enumerate([FSDP, dict(pp=2, schedule='dualpipev'), dict(ep=2, fsdp=False)])
    ],
    test_damage_is_found_and_said_by_all=[
        case('again', FSDP, do='save', folder='run', resume=True, run=SHORT | dict(micro_batch=1)),
        case('other', FSDP, do='refuse', folder='run', run=SHORT | dict(micro_batch=1, lr=0.5)),
    ],
    test_all_stop_where_one_is_asked=[case('stopped', FSDP, do='stop', run=dict(steps=9))],
)


@pytest.fixture(scope='module')
def done(request, tmp_path_factory):
    "A folder, and what each rank found, by case, of the tests that were asked for"
    out = tmp_path_factory.mktemp('ranks')
    asked = {i.name for i in request.session.items}
    four, two = (
        list({c['name']: c for name, cases in by.items() if name in asked for c in cases}.values())
        for by in (BY_FOUR, BY_TWO)
    )
    if 'test_exports_without_gathering' in asked:  # into a folder that holds shards of ours
        small = Config.from_preset('mini', vocab_size=67, num_hidden_layers=2)
        save_pretrained(DeepSeekV3(small), out / 'export-both', max_shard_size='1MB')
        assert len(list((out / 'export-both').glob('model-*.safetensors'))) > 1
    found = together(4, out, *four) if four else {}
    if 'both' in found:
        shutil.copytree(out / 'both', out / 'run')  # a run whose newest checkpoint is damaged
        newest = out / 'run' / 'checkpoints' / 'step-000006' / 'tensors.safetensors'
        raw = bytearray(newest.read_bytes())
        raw[-1] ^= 1
        newest.write_bytes(raw)
        for k in SAVED:  # and two that go on from step 3
            (out / f'{k}-later').mkdir()
            (out / k / 'checkpoints' / 'step-000006').rename(out / f'{k}-later' / 'step-000006')
    return out, found | (together(2, out, *two) if two else {})


def test_every_layout_trains_alike_in_float64(done):
    for by in (BY_FOUR, BY_TWO):
        compare(*done, by['test_every_layout_trains_alike_in_float64'], 1e-8)


def test_every_layout_trains_alike_in_float32(done):
    compare(*done, BY_FOUR['test_every_layout_trains_alike_in_float32'], 1e-3)


def test_bfloat16_trains_nearly_alike(done):
    compare(*done, BY_FOUR['test_bfloat16_trains_nearly_alike'], 2e-2, 0.05)  # 8 bits of mantissa


def test_answers_are_learned_alike(done):
    "The mean over the tokens that are learned, wherever they are"
    compare(*done, BY_FOUR['test_answers_are_learned_alike'], 1e-8)


def went_back(out, cases):
    one = alone(out / 'alone-back', dtype='float64', **BACK)
    one.fit()
    assert (one.rewound, one.skipped_windows) == (1, 24)
    want = [(r['step'], r['loss']) for r in read_metrics(one.out / 'metrics.jsonl')]
    for c in cases:
        rows = [(r['step'], r['loss']) for r in read_metrics(out / c['name'] / 'metrics.jsonl')]
        assert [s for s, _ in rows] == [s for s, _ in want] == list(range(1, 41))
        assert max(abs(a - b) for (_, a), (_, b) in zip(rows, want)) < 1e-8
        (event,) = map(json.loads, (out / c['name'] / 'events.jsonl').read_text().splitlines())
        assert (event['step'], event['action']) == (36, 'back to step 30, past 24 windows')


def test_all_ranks_go_back_together(done):
    "Past windows that made the loss jump, to the same result as one process"
    went_back(done[0], BY_FOUR['test_all_ranks_go_back_together'])


@pytest.mark.slow
def test_divided_weights_do_the_same(tmp_path):
    "The rest of bfloat16, answers and going back"
    half, loss_mask, back = (
        [
            case(f'{k}-{c["name"]}', LAYOUTS[k], run=c['run'])
            for k in ('fsdp', 'both')
            for c in BY_FOUR[test]
        ]
        for test in (
            'test_bfloat16_trains_nearly_alike',
            'test_answers_are_learned_alike',
            'test_all_ranks_go_back_together',
        )
    )
    found = together(4, tmp_path, *half, *loss_mask, *back)
    compare(tmp_path, found, half, 2e-2, 0.05)
    compare(tmp_path, found, loss_mask, 1e-8)
    went_back(tmp_path, back)


@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float64', 'float32'])
def test_more_layouts(tmp_path, dtype):
    for n in (2, 4):
        cases = [
            case(f'{k}-{n}', v, dtype)
            for k, v in (LAYOUTS | MORE).items()
            if n % (v.get('ep', 1) * v.get('pp', 1)) == 0
        ]
        compare(
            tmp_path, together(n, tmp_path, *cases), cases, dict(float64=1e-8, float32=1e-3)[dtype]
        )


def same(a, b):
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    for n in a:
        assert torch.equal(a[n].flatten(), b[n].flatten()), n


def test_checkpoints_suit_any_number_of_ranks(done):
    out, _ = done
    for k in SAVED:
        first = out / k / 'checkpoints' / 'step-000003'
        written, state = load_checkpoint(first)  # what one process reads: the same file
        t = alone(out / k, **SHORT, micro_batch=1)
        assert 'going on from step 3 of 6' in t.resume()
        same(
            t.opt.state_dict() | {f'buffer.{n}': b for n, b in t.model.named_buffers()},
            {n: w for n, w in written.items() if not n.startswith('random.')},
        )
        t.out = out / f'{k}-alone'
        t.fit()  # and it goes on as four ranks did
        ours, theirs = (
            load_checkpoint(o / 'step-000006')[0]
            for o in (t.out / 'checkpoints', out / f'{k}-later')
        )
        for n in ours:
            assert_close(ours[n].flatten(), theirs[n].flatten(), rtol=1e-7, atol=1e-9)
    for c in BY_TWO[
        'test_checkpoints_suit_any_number_of_ranks'
    ]:  # read by two, written again: not one bit differs
        (again,) = checkpoints(out / c['name'] / 'checkpoints')
        same(
            load_checkpoint(again)[0],
            load_checkpoint(out / c['folder'] / 'checkpoints' / 'step-000003')[0],
        )


def test_damage_is_found_and_said_by_all(done):
    out, found = done
    assert all(
        'checksum does not match' in o['said'] and 'going on from step 3' in o['said']
        for o in found['again']
    )
    assert all('lr=0.003 and not 0.5' in o['said'] for o in found['other'])
    assert len(list((out / 'run' / 'checkpoints').glob('damaged-*'))) == 1


def test_all_stop_where_one_is_asked(done):
    got = done[1]['stopped']
    assert [(o['step'], o['saved']) for o in got] == [(3, True)] * 2 and {
        o['why'] for o in got
    } == {'SIGTERM'}


def test_exports_without_gathering(done):
    out, found = done
    model = alone(out / 'x', **WIDE).model
    save_pretrained(model, out / 'alone')
    for c in BY_FOUR['test_exports_without_gathering']:
        same(
            load_file(out / c['name'] / 'model.safetensors'),
            load_file(out / 'alone' / 'model.safetensors'),
        )
        for name in ('config.json', 'generation_config.json'):
            texts = [(out / folder / name).read_text() for folder in (c['name'], 'alone')]
            assert texts[0] == texts[1]
        assert len(list((out / c['name']).glob('model*'))) == 1
        everyone = found[c['name']]
        print(
            c['name'],
            [f'{o["grew"] / o["model"]:.2f}' for o in everyone],
            'of',
            f'{everyone[0]["model"] / 1e6:.0f} MB',
        )
        assert all(o['grew'] < 0.25 * o['model'] for o in everyone)
    ids = torch.randint(67, (1, 9))
    with torch.no_grad():
        assert torch.equal(load_pretrained(out / 'export-both')(ids), model.eval()(ids))


START = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
TRAIN = [
    '--data',
    'text.txt',
    '--vocab_size',
    '270',
    '--steps',
    '24',
    '--seq_len',
    '32',
    '--batch_size',
    '4',
    '--mtp_batch_ratio',
    '1',
    '--precision',
    'fp32',
    '--save_every',
    '5',
    '--ep',
    '2',
    '--device',
    'cpu',
]


def job(folder, *options, restarts=0):
    "eva_train on two ranks, saving every fifth step"
    (folder / 'text.txt').write_text(
        'if x == 1: y = 2\nelse: y = 3\nfor i in range(10): print(i, x*y)\n' * 300
    )
    (folder / 'go.py').write_text(
        'import sys, eva.cli.train\nsys.exit(eva.cli.train.eva_train())\n'
    )
    return subprocess.Popen(
        [*START, '--max-restarts', str(restarts), 'go.py', *TRAIN, '--out', 'run', *options],
        cwd=folder,
        env=ENV,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )


def workers(launcher):
    "Processes that torchrun started, by rank"
    found = {}
    for p in Path('/proc').glob('[0-9]*'):
        try:
            if int((p / 'stat').read_text().rpartition(')')[2].split()[1]) != launcher:
                continue
            env = dict(o.split('=', 1) for o in (p / 'environ').read_text().split('\0') if '=' in o)
            if 'go.py' in (p / 'cmdline').read_text() and 'RANK' in env:
                found[int(env['RANK'])] = int(p.name)
        except (OSError, IndexError, ValueError):
            continue
    return found


def kill_one(p, folder, rank, step=12, patience=240):
    "SIGKILL to one rank once the run has come so far; when that was"
    log = folder / 'run' / 'metrics.jsonl'
    end = time.time() + patience
    while time.time() < end and p.poll() is None:
        if len(read_metrics(log)) >= step and rank in (w := workers(p.pid)):
            os.kill(w[rank], signal.SIGKILL)
            return time.time()
        time.sleep(0.02)
    raise AssertionError(p.communicate()[1][-2000:])


def digest(folder):
    return hashlib.sha256((folder / 'run' / 'model.safetensors').read_bytes()).hexdigest()


@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')
    p = job(folder)
    out, err = p.communicate(timeout=500)
    assert p.returncode == 0, err[-2000:]
    assert [r['step'] for r in read_metrics(folder / 'run' / 'metrics.jsonl')] == list(
        range(1, 25)
    ) and out.count('everything is in run') == 1
    assert {
        'model.safetensors',
        'config.json',
        'tokenizer.json',
        'run.json',
        'report.png',
        'sample.txt',
    } <= {o.name for o in (folder / 'run').iterdir()}
    return digest(folder), [r['loss'] for r in read_metrics(folder / 'run' / 'metrics.jsonl')]


def test_a_dead_rank_is_replaced(tmp_path, uninterrupted):
    "First one, then the other"
    p = job(tmp_path, restarts=2)
    kill_one(p, tmp_path, 1, 7)
    kill_one(p, tmp_path, 0, 17)
    out, err = p.communicate(timeout=500)
    assert p.returncode == 0, err[-2000:]
    assert re.search('going on from step (5|10) of 24', out) and re.search(
        'going on from step (15|20) of 24', out
    ), out  # a late kill finds a later checkpoint
    rows = read_metrics(tmp_path / 'run' / 'metrics.jsonl')
    assert [r['step'] for r in rows] == list(range(1, 25))
    assert (digest(tmp_path), [r['loss'] for r in rows]) == uninterrupted


def test_a_dead_rank_ends_the_job_with_one_message(tmp_path, uninterrupted):
    p = job(tmp_path)
    start = kill_one(p, tmp_path, 1)
    out, err = p.communicate(timeout=500)
    took = time.time() - start
    assert (
        p.returncode != 0
        and err.count('another rank is gone') == 1
        and 'Connection closed' not in err
    ), err
    print(f'ended {took:.1f} s after the kill')
    assert took < 60
    p = job(tmp_path, '--resume', '--lr', '0.5')  # by hand
    out, err = p.communicate(timeout=500)
    assert (
        p.returncode == 1 and 'a run goes on as it was started' in err
    )  # with another option it is refused, by one rank; the launcher ends with 1
    assert err.count('a run goes on as it was started') == 1
