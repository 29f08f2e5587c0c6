"Reading ahead, times of steps, expert traffic and traces: in runs, on two ranks, in the command"

import contextlib
import gzip
import io
import json
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import ranks
import torch
from sizes import TINY
from test_distributed import ENV
from torch.testing import assert_close

from eva.cli.train import eva_train
from eva.config import PRESETS
from eva.distributed.expert_parallel import torchrun
from eva.fileio.manifest import Manifest
from eva.training import metric_writers
from eva.training.checkpointing import read_metrics
from eva.training.metric_writers import step_numbers
from eva.training.monitoring import Event
from eva.training.prefetch import Prefetcher
from eva.training.step_times import PARTS

SHORT = dict(model=dict(num_hidden_layers=2), batch_size=4, mtp_batch_ratio=1.0)
# The batch grows at steps 4 and 8. A rewind from 4 to 2 reads smaller batches first, while larger
# ones that come later are already read
BACK = SHORT | dict(steps=12, save_every=2, on_spike='rewind', batch_size_warmup=8 / 12)


def back_once(t, step=4):
    "As if the loss had risen at a step, once"

    def step_ends():
        due = t.step == step - 1 and not t.rewound
        return [Event('spike', 'loss 9.0 after 3.0')] if due else []

    t.parallel.step_ends = step_ends


def prefetch_threads():
    return [t for t in threading.enumerate() if t.name == 'prefetch']


def trained(out, ahead, stop_at=None, **settings):
    "A run with so many batches read ahead, stopped and resumed if asked; its losses"
    t = ranks.trainer(out, **settings)
    back_once(t)
    t.input.ahead = ahead
    if stop_at:
        t.fit(lambda row: setattr(t, 'stop', 'SIGTERM') if row['step'] == stop_at else None)
        t = ranks.trainer(out, **settings)
        back_once(t)
        t.input.ahead = ahead
        t.resume()
    t.fit()
    assert not prefetch_threads()
    return t, [(row['step'], row['loss']) for row in read_metrics(out / 'metrics.jsonl')]


@pytest.fixture(scope='module')
def plainly(tmp_path_factory):
    "A run that goes back once, without a thread"
    plain, losses = trained(tmp_path_factory.mktemp('plainly') / 'run', 0, **BACK)
    assert plain.rewound == 1 and plain.skipped_windows > 0, 'nothing was rewound'
    return plain, losses


@pytest.mark.parametrize('stop_at', [None, 7])
def test_runs_read_the_same_with_a_growing_batch_a_rewind_and_a_restart(tmp_path, plainly, stop_at):
    plain, losses = plainly
    t, theirs = trained(tmp_path / 'ahead', 3, stop_at, **BACK)
    assert theirs == losses and t.skipped_windows == plain.skipped_windows
    for a, b in zip(plain.opt.masters.values(), t.opt.masters.values()):
        assert torch.equal(a, b)


def test_the_next_batch_is_read_before_the_step_ends(tmp_path):
    t = ranks.trainer(tmp_path / 'run', steps=6, **SHORT)
    right = t.train.batch
    was_read = [threading.Event() for _ in range(6)]

    def batch(first, *args):
        was_read[first // 4].set()
        return right(first, *args)

    t.train.batch = batch

    def watch(row):
        assert all(thread.daemon for thread in prefetch_threads())
        if row['step'] < 6:
            assert was_read[row['step']].wait(timeout=60), 'nothing is read beside the step'

    t.fit(watch)
    assert t.step == 6


@pytest.mark.parametrize('ahead', [0, 2])
def test_errors_of_the_reader_end_the_run_at_their_step(tmp_path, ahead):
    t = ranks.trainer(tmp_path / 'run', steps=9, **SHORT)
    t.input.ahead = ahead
    right = t.train.batch

    def batch(first, *args):
        if first >= 16:
            raise ValueError('tokens-00007.npy: not a readable shard; tokenise again')
        return right(first, *args)

    t.train.batch = batch
    with pytest.raises(ValueError, match='tokens-00007.npy: not a readable shard; tokenise again'):
        t.fit()
    assert t.step == 4 and len(read_metrics(tmp_path / 'run' / 'metrics.jsonl')) == 4
    assert not prefetch_threads()


HANGS = """
import signal, sys, threading
from pathlib import Path
import ranks
signal.signal(signal.SIGINT, signal.default_int_handler)
t = ranks.trainer(Path(sys.argv[1]), steps=9, batch_size=4, mtp_batch_ratio=1.0)
right = t.train.batch
def batch(first, *args):
    if first >= 12:
        print('hangs', flush=True)
        threading.Event().wait()
    return right(first, *args)
t.train.batch = batch
t.fit()
"""


def test_a_reader_that_hangs_does_not_keep_the_loop():
    "The thread is left behind after a second"
    hangs = threading.Event()
    with pytest.raises(KeyboardInterrupt), Prefetcher(lambda i: i and hangs.wait(60), 1) as ahead:
        ahead.take((0,), [(1,)])
        start = time.monotonic()
        raise KeyboardInterrupt
    assert time.monotonic() - start < 30
    hangs.set()


@pytest.mark.slow
def test_a_reader_that_hangs_does_not_keep_the_process(tmp_path):
    "The first Ctrl-C asks to stop after the step, the second one ends the process"
    ranks.stream(tmp_path / 'train.npy')
    ranks.stream(tmp_path / 'held.npy')
    command = [sys.executable, '-c', HANGS, str(tmp_path / 'run')]
    here = ENV | dict(PYTHONPATH=f'{Path(__file__).parent}:{ENV["PYTHONPATH"]}')
    with subprocess.Popen(command, env=here, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as p:
        assert p.stdout.readline() == b'hangs\n'
        while len(read_metrics(tmp_path / 'run' / 'metrics.jsonl')) < 3:
            time.sleep(0.05)
        for _ in range(2):
            time.sleep(0.5)
            p.send_signal(signal.SIGINT)
        _, err = p.communicate(timeout=120)
    assert p.returncode != 0 and b'KeyboardInterrupt' in err


# ---- other tools


class Recorder:
    "Keeps what it is given"

    calls: list = []

    def __init__(self, folder, step, config):
        self.calls.append(('open', step))

    def write(self, step, numbers):
        self.calls.append((step, numbers))

    def flush(self):
        pass

    def back_to(self, step):
        self.calls.append(('back', step))

    def close(self):
        self.calls.append(('close', None))


def test_writers_get_every_step_and_every_rewind(tmp_path, monkeypatch):
    monkeypatch.setitem(metric_writers.WRITERS, 'mlflow', Recorder)
    monkeypatch.setattr(metric_writers, 'is_installed', lambda name: True)
    monkeypatch.setattr(Recorder, 'calls', [])
    t = ranks.trainer(tmp_path / 'run', **BACK)
    back_once(t)
    t.log_to = ['mlflow']
    t.fit()
    found = dict(step for step in Recorder.calls if isinstance(step[0], int))
    assert found == {r['step']: step_numbers(r) for r in read_metrics(t.out / 'metrics.jsonl')}
    assert [c for c in Recorder.calls if isinstance(c[0], str)] == [
        ('open', 0),
        ('back', 2),
        ('close', None),
    ]
    assert 'mlflow' in Manifest(t.out).folders and not (t.out / 'tensorboard').exists()


# ---- two ranks

TWO = """
import json, sys, time
from pathlib import Path
import torch, torch.distributed as dist
import ranks
from eva.distributed.expert_parallel import CommTracker, shutdown
from eva.distributed.parallel import Parallel
torch.set_num_threads(1)
dist.init_process_group('gloo')
out = Path(sys.argv[1])
found = {}
for name, layout in json.loads(sys.argv[2]).items():
    parallel = Parallel(**layout)
    settings = dict(micro_batch=1) if parallel.pp > 1 else {}
    t = ranks.trainer(out / name, steps=4, parallel=parallel, **settings)
    if name == 'ep':
        right = parallel.gradients
        def late(*args):
            time.sleep(0.5 * dist.get_rank())
            return right(*args)
        parallel.gradients = late
    rows = []
    t.fit(rows.append)
    found[name] = dict(rows=rows)
    if name == 'ep':
        layer = parallel.exchanging[0]
        layer.traffic = [0, 0, 0]
        torch.manual_seed(dist.get_rank())
        x = torch.randn(40, 24, dtype=torch.float64)
        indices = torch.stack([torch.randperm(8)[:3] for _ in range(40)])
        with CommTracker() as comm:
            layer(x, torch.rand(40, 3, dtype=torch.float64), indices)
        mine = dict(traffic=layer.traffic, bytes=comm.total('all-to-all'))
        every = [None] * 2
        dist.all_gather_object(every, mine)
        found[name]['once'] = every
if dist.get_rank() == 0:
    print(json.dumps(found))
shutdown()
"""


@pytest.fixture(scope='module')
def two(tmp_path_factory):
    out = tmp_path_factory.mktemp('two')
    for name in ('train', 'held'):
        ranks.stream(out / f'{name}.npy')
    layouts = dict(fsdp={}, ep=dict(ep=2, fsdp=False), pipeline=dict(pp=2))
    here = ENV | dict(PYTHONPATH=f'{Path(__file__).parent}:{ENV["PYTHONPATH"]}')
    return torchrun(TWO, out, json.dumps(layouts), ranks=2, env=here, timeout=600)


def test_ranks_read_ahead_and_agree_with_one_process(two, tmp_path):
    t = ranks.trainer(tmp_path / 'alone', steps=4)
    t.input.ahead = 0
    rows = []
    t.fit(rows.append)
    for found in two.values():
        for a, b in zip(rows, found['rows'], strict=True):
            assert abs(a['loss'] - b['loss']) <= 1e-12
            assert abs(a['grad_norm'] - b['grad_norm']) <= 1e-10


def test_times_of_ranks_add_up(two):
    for name, found in two.items():
        for row in found['rows']:
            entries = [*PARTS, 'communication', 'waiting', 'other']
            seconds = [row[f'seconds_{entry}'] for entry in entries]
            assert_close(sum(seconds), row['seconds_step'], atol=1e-5, rtol=0)
            assert min(seconds) >= 0 and row['seconds_communication'] > 0, (name, row)
            assert len(row['seconds_by_rank']) == 2
    late = [row['seconds_by_rank'][1] for row in two['ep']['rows']]
    assert min(late) >= 0.5  # it slept, and that is no communication


def test_expert_traffic_is_what_the_collectives_carry(two):
    assert 'expert_traffic' not in two['fsdp']['rows'][0]
    for row in two['ep']['rows']:
        traffic = row['expert_traffic']
        assert traffic['sent'] == traffic['received'][::-1]  # of two ranks
        rows = sum(traffic['sent']) + sum(traffic['kept'])
        tokens = 8 * 16 * 3 + 4 * 16  # of three MoE layers, and of MTP for half of the batch
        assert tokens <= rows <= 2 * tokens
    for (sent, received, kept), total in ((o['traffic'], o['bytes']) for o in two['ep']['once']):
        # hidden states, weights and expert ids there, results back, and the number of rows
        assert total == sent * (24 * 8 + 3 * 8 + 3 * 4) + received * 24 * 8 + 8
        assert 0 < kept <= 40


# ---- the command


@pytest.fixture
def small(monkeypatch, tmp_path):
    monkeypatch.setitem(PRESETS, 'mini', PRESETS['mini'] | TINY)
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'text').mkdir()
    (tmp_path / 'text' / 'a.py').write_text('def f(x):\n    return x + 1\n' * 200)
    sizes = ('--seq_len', 32, '--batch_size', 2, '--vocab_size', 270, '--precision', 'fp32')
    return ('--data', 'text', '--out', 'run', '--steps', 6, *sizes)


def command(*argv):
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = eva_train(list(map(str, argv)))
    return code, out.getvalue(), err.getvalue()


def test_a_run_says_where_its_time_goes_and_leaves_a_trace(small):
    code, out, err = command(*small, '--profile', 2, '--peak_tflops', 0.05, '--log_to')
    assert code == 0, err
    assert 'a step of ' in out and 'MFU ' in out and 'of 0.05 TFLOP/s' in out
    assert 'perfetto' in out and ' calls  ' in out
    rows = read_metrics('run/metrics.jsonl')
    assert all(row['mfu'] >= 0 and row['seconds_input'] >= 0 for row in rows)
    with gzip.open('run/traces/rank-0.json.gz') as f:
        events = json.load(f)['traceEvents']
    steps = [e for e in events if e.get('name', '').startswith('ProfilerStep')]
    assert len({e['name'] for e in steps}) == 2
    assert {'input', 'compute', 'optimizer'} <= {e.get('name') for e in events}
    assert 'traces' in Manifest('run').folders and not Path('run/tensorboard').exists()
    code, out, err = command('--out', 'run', '--resume', '--prefetch', 0, '--log_to')
    assert code == 0 and 'this run is finished' in out, err


@pytest.mark.parametrize(
    'given, said',
    [
        (('--profile', 0), '--profile 0: must be a positive number of steps'),
        (('--prefetch', -1), '--prefetch -1: must be a number of steps, 0 or more'),
        (('--peak_tflops', 0), '--peak_tflops 0.0: must be positive'),
        (('--log_to', 'wandb'), "log_to='wandb': its package is not installed; pip install wandb"),
    ],
)
def test_options_that_are_wrong_are_refused(small, monkeypatch, given, said):
    if 'wandb' in given:
        monkeypatch.setattr(metric_writers, 'is_installed', lambda name: False)
    code, _, err = command(*small, *given)
    assert code == 2 and said in err and 'Traceback' not in err and not Path('run').exists()


@pytest.mark.parametrize('name', ['wandb', 'mlflow'])
def test_the_real_packages_write_into_the_run(small, name):
    pytest.importorskip(name)
    code, _, err = command(*small, '--log_to', name)
    assert code == 0, err
    assert any(Path('run', name).iterdir()) and name in Manifest('run').folders
