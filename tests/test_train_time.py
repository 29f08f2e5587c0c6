"""Trials, forecasts and --minutes: a trial changes nothing, and the steps that it chooses repeat

Runs with a trial are compared byte for byte with runs without one, in each precision, on text,
streams, conversations, tasks and sparse attention, with recomputation, and on two ranks.
"""

import contextlib
import gc
import io
import json
import os
import random
import re
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from sizes import TINY

import eva.cli.train_time as train_time
from eva.cli.common import discard_message
from eva.cli.run_folder import open_run
from eva.cli.train import eva_train
from eva.cli.train_arguments import train_parser
from eva.cli.train_time import StepTimes, forecast, plan_run, steps_for_minutes, steps_that_fit
from eva.config import PRESETS
from eva.distributed.expert_parallel import torchrun
from eva.model.transformer import DeepSeekV3
from eva.training.checkpointing import checkpoints, load_checkpoint, read_metrics
from eva.training.config import TrainConfig

HERE = Path(__file__).parent
ENV = os.environ | dict(
    OMP_NUM_THREADS='1',
    PYTHONPATH=f'{HERE.parent}{os.pathsep}{HERE}{os.pathsep}{os.environ.get("PYTHONPATH", "")}',
)
SLOW = StepTimes(0.0, 600.0, 0.0, 0.0)  # ten minutes a step, so that three fit into 39 minutes
SMALL = ('--seq_len', 32, '--batch_size', 2, '--micro_batch', 1, '--vocab_size', 270)


def command(*argv):
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = eva_train(list(map(str, argv)))
    return code, out.getvalue(), err.getvalue()


@pytest.fixture
def folder(monkeypatch, tmp_path):
    "Texts, documents and conversations"
    monkeypatch.setitem(PRESETS, 'mini', PRESETS['mini'] | TINY)
    monkeypatch.chdir(tmp_path)
    texts = [f'def f{i}(x):\n    return x + {i}\n' * 6 for i in range(200)]
    Path('text').mkdir()
    Path('text/a.py').write_text(''.join(texts))
    Path('lines.jsonl').write_text(''.join(json.dumps(dict(text=o)) + '\n' for o in texts))
    talks = [
        [dict(role='user', content=f'f{i % 9}'), dict(role='assistant', content=f'x + {i % 9}')]
        for i in range(120)
    ]
    Path('talks.jsonl').write_text(''.join(json.dumps(dict(messages=o)) + '\n' for o in talks))
    return tmp_path


@pytest.fixture
def slow(monkeypatch):
    "Measured as always, but with the times of a slow machine; what was measured"
    found = []

    def measure(trainer, right=train_time.measure):
        found.append(right(trainer))
        return SLOW

    monkeypatch.setattr(train_time, 'measure', measure)
    return found


def weights(out):
    return (Path(out) / 'model.safetensors').read_bytes()


def random_states(out):
    "What the last checkpoint holds of the generators"
    tensors = load_checkpoint(max(checkpoints(Path(out) / 'checkpoints')))[0]
    return {name: t for name, t in tensors.items() if name.startswith('random.')}


def same_runs(one, two, states=True):
    "Compare weights, losses and random states of two runs"
    losses = [[r['loss'] for r in read_metrics(Path(o) / 'metrics.jsonl')] for o in (one, two)]
    assert losses[0] == losses[1]
    assert weights(one) == weights(two)
    if not states:
        return
    first, second = random_states(one), random_states(two)
    assert first.keys() == second.keys() and first
    assert all(torch.equal(first[name], second[name]) for name in first)


# ---- a trial changes nothing

GRID = [('fp32', 0), ('fp32', 1), ('bf16', 0), ('fp16', 1), ('fp8', 0), ('fp8', 1)]


@pytest.mark.parametrize('precision, recompute', GRID)
def test_a_trial_changes_nothing(folder, monkeypatch, precision, recompute):
    argv = ('--data', 'text', *SMALL, '--steps', 3, '--precision', precision)
    argv = (*argv, '--recompute') if recompute else argv
    code, out, err = command(*argv, '--out', 'plain')
    assert code == 0 and 'measured' not in out, err
    monkeypatch.setattr(train_time, 'MEASURED_FROM', 1)
    code, out, err = command(*argv, '--out', 'tried')
    assert code == 0 and out.count(' on this machine: 3 steps of ') == 1, err
    assert out.index('measured\n') < out.index('held-out text')  # before the bar
    same_runs('plain', 'tried')
    assert sorted(p.name for p in Path('plain').iterdir()) == sorted(
        p.name for p in Path('tried').iterdir()
    )


def drawing(right):
    "A function that also draws from each generator"

    def work(*args, **kw):
        random.random()
        np.random.random()
        torch.rand(1)
        return right(*args, **kw)

    return work


def test_the_generators_are_put_back(folder, monkeypatch):
    args = train_parser().parse_args(['--data', 'text', *map(str, SMALL), '--out', 'run'])
    run, _ = open_run(args, discard_message)

    def drawn():
        return random.random(), np.random.random(), torch.rand(1).item()

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    wanted = drawn()
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    monkeypatch.setattr(train_time, 'measure_once', drawing(train_time.measure_once))
    train_time.trial(args, run)
    assert drawn() == wanted


def test_the_trial_is_gone_before_the_model_is_built(folder, monkeypatch):
    there = []
    right = train_time.build_trainer

    def models():
        return sum(type(o) is DeepSeekV3 for o in gc.get_objects())

    def build(*args):
        there.append(models())
        return right(*args)

    gc.collect()
    monkeypatch.setattr(train_time, 'build_trainer', build)
    monkeypatch.setattr(train_time, 'MEASURED_FROM', 1)
    before = models()
    code, _, err = command('--data', 'text', *SMALL, '--steps', 2, '--out', 'run')
    assert code == 0, err
    assert there == [before, before]


def test_a_run_of_few_steps_is_not_measured(folder, monkeypatch):
    def never(*args):
        raise AssertionError('a trial')

    monkeypatch.setattr(train_time, 'trial', never)
    assert command('--data', 'text', *SMALL, '--steps', 3, '--out', 'run')[0] == 0
    with pytest.raises(AssertionError, match='a trial'):
        command('--data', 'text', *SMALL, '--steps', train_time.MEASURED_FROM, '--out', 'long')
    with pytest.raises(AssertionError, match='a trial'):
        command('--data', 'text', *SMALL, '--minutes', 1, '--out', 'timed')


# ---- the steps of --minutes

KINDS = dict(
    text=('--data', 'text'),
    streamed=('--data', 'lines.jsonl', '--fim', 0.5),
    task=('--data', 'synthetic:copy'),
    answers=('--data', 'talks.jsonl', '--init', 'first', '--seq_len', 96),
    sparse=('--data', 'text', '--init', 'first', '--sparse', 'k=8', 'warmup=2', 'heads=2', 'dim=8'),
)


@pytest.mark.parametrize('kind', KINDS)
def test_the_chosen_steps_repeat(folder, slow, kind):
    sizes = SMALL if kind in ('text', 'streamed') else SMALL[:6]
    argv = (*sizes, *KINDS[kind], '--precision', 'fp32', '--batch_size_warmup', 0.5)
    if '--init' in argv:
        assert command('--data', 'text', *SMALL, '--steps', 2, '--out', 'first')[0] == 0
    code, out, err = command(*argv, '--minutes', 39, '--out', 'timed')
    assert code == 0, err
    assert len(slow) == 1 and min(slow[0]) > 0
    assert out.count('about 30 minutes on this machine: 3 steps of up to 600 s, measured') == 1
    about, file = (
        json.loads(Path(f'timed/{name}.json').read_text()) for name in ('run', 'run_config')
    )
    assert about['train']['steps'] == file['training']['steps'] == 3
    assert file['minutes'] is None and 'minutes' not in about['arguments']
    code, _, err = command(*argv, '--steps', 3, '--out', 'counted')
    assert code == 0, err
    same_runs('timed', 'counted')
    code, _, err = command('--config', 'timed/run_config.json', '--out', 'again')
    assert code == 0, err
    same_runs('timed', 'again')
    assert len(slow) == 1
    code, out, err = command(*argv, '--minutes', 39, '--out', 'timed', '--resume')
    assert code == 0 and 'this run is finished, 3 steps' in out, err
    assert 'keeps its steps, 3 here' in out and len(slow) == 1
    assert command(*argv, '--steps', 3, '--out', 'timed', '--resume')[0] == 0
    assert 'not with --steps 4 (was: 3)' in command('--steps', 4, '--out', 'timed', '--resume')[2]


def test_minutes_in_a_file(folder, slow):
    Path('run.yaml').write_text(
        'minutes: 39\ntraining: {seq_len: 32, batch_size: 2, micro_batch: 1}\n'
        'data: {sources: text, vocab_size: 270}\n'
    )
    assert command('--config', 'run.yaml', '--out', 'timed')[0] == 0
    assert read_metrics('timed/metrics.jsonl')[-1]['step'] == 3
    assert command('--config', 'run.yaml', '--minutes', 29, '--out', 'shorter')[0] == 0
    assert read_metrics('shorter/metrics.jsonl')[-1]['step'] == 2
    assert command('--config', 'run.yaml', '--steps', 1, '--out', 'counted')[0] == 0
    assert command('--config', 'timed/run_config.json', '--minutes', 19, '--out', 'file')[0] == 0
    assert read_metrics('file/metrics.jsonl')[-1]['step'] == 1
    code, out, err = command('--config', 'run.yaml', '--print_config', 'json')
    assert code == 0 and '"minutes": 39' in out and '"steps": null' in out, err
    Path('printed.json').write_text(out)
    assert command('--config', 'printed.json', '--out', 'printed')[0] == 0
    same_runs('timed', 'printed')
    Path('run.yaml').write_text('minutes: 5\ntraining: {steps: 7}\n')
    code, _, err = command('--config', 'run.yaml', '--out', 'both')
    assert code == 2 and '--minutes 5, --steps 7: both set the length of a run' in err
    Path('run.yaml').write_text('minutes: 0\n')
    code, _, err = command('--config', 'run.yaml', '--out', 'none')
    assert code == 2 and '--minutes 0: must be positive and finite' in err
    assert err.count('\n') == 1


def test_too_few_minutes(folder, slow):
    code, _, err = command('--data', 'text', *SMALL, '--minutes', 9, '--out', 'run')
    assert code == 2 and err.count('\n') == 1 and not Path('run/run.json').exists()
    assert '--minutes 9: one step and its evaluations take about 10 minutes' in err
    least = float(re.search(r'give --minutes ([\d.]+) or more', err)[1])
    assert 10 < least < 19
    code, _, err = command('--data', 'text', *SMALL, '--minutes', least + 9, '--out', 'run')
    assert code == 0 and read_metrics('run/metrics.jsonl')[-1]['step'] == 1, err


@pytest.mark.parametrize('seconds, gone', [(0.5, 0.0), (3.7, 12.0), (7200.0, 61.0)])
def test_what_is_advised_is_enough(seconds, gone):
    times = StepTimes(seconds, 0.1 * seconds, seconds, 2 * seconds)
    tcfg = TrainConfig()
    with pytest.raises(ValueError, match='or more') as failure:
        steps_for_minutes(1e-3, gone, times, tcfg)
    least = float(re.search(r'give --minutes ([\d.e+]+) or more', str(failure.value))[1])
    assert steps_for_minutes(least, gone, times, tcfg) == 1


def test_the_time_before_the_trial_counts(folder, slow, monkeypatch):
    "Reading the data took 25 of 39 minutes, so one step fits"
    args = train_parser().parse_args(['--data', 'text', *map(str, SMALL), '--minutes', '39'])
    args.out = Path('run')
    run, exists = open_run(args, discard_message)
    start = train_time.time.time() - 25 * 60
    planned, times = plan_run(args, run, exists, None, discard_message, start)
    assert planned.tcfg.steps == planned.about['train']['steps'] == 1 and times == SLOW
    assert asdict(replace(run.tcfg, steps=1)) == planned.about['train']


def test_the_steps_that_fit_by_counting():
    rng = random.Random(0)
    for _ in range(200):
        times = StepTimes(*(rng.expovariate(1) for _ in range(4)))
        tcfg = TrainConfig(
            batch_size=rng.choice((1, 3, 16)),
            batch_size_warmup=rng.choice((0.0, rng.random())),
            eval_every=rng.choice((1, 7, 50)),
        )
        seconds = rng.expovariate(1 / 300)
        needed = [forecast(times, replace(tcfg, steps=n)) for n in range(1, 400)]
        if needed[-1] > seconds:
            fits = [n for n, o in enumerate(needed, 1) if o <= seconds]
            assert steps_that_fit(times, tcfg, seconds) == max(fits, default=0)


# ---- a run that is resumed


def test_the_rest_of_a_run(folder, slow, monkeypatch):
    monkeypatch.setattr(train_time, 'MEASURED_FROM', 2)
    argv = ('--data', 'text', *SMALL, '--save_every', 1, '--out', 'run')
    script = (
        'import sys; from eva.config import PRESETS; from sizes import TINY\n'
        'PRESETS["mini"] = PRESETS["mini"] | TINY\n'
        'import eva.cli.train as t, eva.training.trainer as tr\n'
        'right = tr.Trainer.train_step\n'
        'def step(self):\n    row = right(self)\n'
        '    if self.step == 2 and self.cfg.steps > 2: self.stop = "SIGINT"\n    return row\n'
        'tr.Trainer.train_step = step\n'
        'sys.exit(t.eva_train())\n'
    )
    done = subprocess.run(
        [sys.executable, '-c', script, *map(str, argv), '--steps', '5'], env=ENV, text=True
    )
    assert done.returncode == 130
    code, out, err = command(*argv, '--steps', 5, '--resume')
    assert code == 0 and 'going on from step 2 of 5' in out, err
    assert 'about 30 minutes more on this machine: 3 steps of 600 s, measured' in out
    assert command('--data', 'text', *SMALL, '--steps', 5, '--out', 'whole')[0] == 0
    same_runs('run', 'whole', states=False)  # what a start measures draws numbers


# ---- two ranks

TWO = """
import json, os, sys
from pathlib import Path
import torch, torch.distributed as dist
import eva.cli.train_time as train_time, eva.distributed.parallel as parallel
from eva.cli.train import eva_train
from eva.config import PRESETS
from sizes import TINY
torch.set_num_threads(1)
dist.init_process_group('gloo')
PRESETS['mini'] = PRESETS['mini'] | TINY
parallel.connect = lambda *args: None  # once for all runs
parallel.shutdown = lambda *args: dist.barrier()
right = train_time.measure
taken = []
def measure(trainer):
    taken.append(min(right(trainer)))
    # what the second rank measures must not count
    return train_time.StepTimes(0.0, 600.0 if dist.get_rank() == 0 else 100.0, 0.0, 0.0)
train_time.measure = measure
codes = {}
for name, argv in json.loads(sys.argv[1]).items():
    codes[name] = eva_train(argv)
every = [None] * 2
dist.all_gather_object(every, [codes, len(taken), min(taken)])
if dist.get_rank() == 0:
    print(json.dumps(every))
dist.barrier()
"""
LAYOUTS = dict(
    recompute=('--precision', 'fp32', '--recompute'),
    stages=('--precision', 'bf16', '--pp', 2, '--batch_size_warmup', 0.7),
    heads=('--precision', 'fp32', '--tp', 2),
    positions=('--precision', 'bf16', '--cp', 2, '--no-fsdp'),
    experts=('--precision', 'fp8', '--ep', 2),
)


@pytest.fixture(scope='module')
def two_ranks(tmp_path_factory):
    "Each layout with --minutes, and with the number of steps that fits"
    folder = tmp_path_factory.mktemp('two')
    (folder / 'text.txt').write_text('def f(x):\n    return x + 1\n' * 400)
    sizes = ['--seq_len', '32', '--batch_size', '8', '--micro_batch', '1']
    sizes += ['--vocab_size', '270', '--device', 'cpu']
    runs = {}
    for name, argv in LAYOUTS.items():
        shared = ['--data', str(folder / 'text.txt'), *sizes, *map(str, argv)]
        runs[f'{name} timed'] = [*shared, '--minutes', '39', '--out', str(folder / f'{name}-t')]
        runs[f'{name} counted'] = [*shared, '--steps', '3', '--out', str(folder / f'{name}-c')]
    found = torchrun(TWO, json.dumps(runs), ranks=2, env=ENV, timeout=900)
    return folder, found


def test_ranks_agree_on_the_steps(two_ranks):
    folder, found = two_ranks
    for codes, trials, shortest in found:
        assert set(codes.values()) == {0}, codes
        assert trials == len(LAYOUTS) and shortest > 0


@pytest.mark.parametrize('layout', LAYOUTS)
def test_a_trial_of_two_ranks_changes_nothing(two_ranks, layout):
    folder, _ = two_ranks
    timed, counted = folder / f'{layout}-t', folder / f'{layout}-c'
    assert json.loads((timed / 'run.json').read_text())['train']['steps'] == 3
    same_runs(timed, counted)
