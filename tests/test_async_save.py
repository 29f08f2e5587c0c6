"""Checkpoints that are written beside the training: the same bytes, and never half of one

A run is killed at random moments and between any two calls that change the disk, with writes in
their thread, and ends as one that was not. Where a write fails on one of two ranks, both say so.
"""

import errno
import json
import os
import signal
import time

import pytest
import test_survival
from test_survival import (
    CALLS,
    finishes,
    losses,
    same,
    straight_and_killed,
    streams,  # noqa: F401 - a fixture
    weights,
)

from eva.distributed.expert_parallel import torchrun
from eva.training.checkpointing import checkpoints, latest_checkpoint, load_checkpoint

pytestmark = pytest.mark.skipif(os.name != 'posix', reason='signals and limits of POSIX')
reads_proc = pytest.mark.skipif(not os.path.exists('/proc/self/fd'), reason='reads /proc')
straight_trainer = test_survival.trainer  # which waits for its writes, unless it is told otherwise


def trainer(streams, out, **kw):  # noqa: F811
    return straight_trainer(streams, out, **dict(async_save=True) | kw)


def contents(out):
    "Tensors and states of all checkpoints, without times"
    found = {}
    for path in checkpoints(out / 'checkpoints'):
        state = json.loads((path / 'state.json').read_text())
        state = {name: v for name, v in state.items() if name not in ('seconds', 'check')}
        found[path.name] = (path / 'tensors.safetensors').read_bytes(), state
    return found


@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp8'])
def test_the_same_bytes(streams, tmp_path, precision):  # noqa: F811
    for name, beside in (('waiting', False), ('beside', True)):
        trainer(streams, tmp_path / name, steps=6, precision=precision, async_save=beside).fit()
    assert list(contents(tmp_path / 'beside')) == ['step-000004', 'step-000006']
    assert contents(tmp_path / 'beside') == contents(tmp_path / 'waiting')


def test_a_write_without_a_copy_is_found(streams, tmp_path, monkeypatch):  # noqa: F811
    "The bug that the comparison is for: the thread writes what the training changes"
    monkeypatch.setattr('eva.training.async_save.host_copies', lambda tensors, memory: tensors)
    from eva.training.strategy import SingleProcess

    write = SingleProcess.background_save

    def late(*args):
        work = write(*args)
        return lambda: (time.sleep(0.3), work())

    monkeypatch.setattr(SingleProcess, 'background_save', late)
    for name, beside in (('waiting', False), ('beside', True)):
        trainer(streams, tmp_path / name, steps=6, keep_checkpoints=3, async_save=beside).fit()
    assert contents(tmp_path / 'beside') != contents(tmp_path / 'waiting')


def test_either_way_goes_on_with_the_other(streams, tmp_path):  # noqa: F811
    "Whether checkpoints are written beside the training is no part of what a run is"
    trainer(streams, tmp_path / 'whole', steps=8, async_save=False).fit()
    half = trainer(streams, tmp_path / 'half', steps=8)
    half.fit(lambda row: setattr(half, 'stop', 'SIGINT') if row['step'] == 3 else None)
    rest = trainer(streams, tmp_path / 'half', steps=8, async_save=False)
    assert rest.resume() == 'going on from step 3 of 8'
    rest.fit()
    assert losses(rest) == losses(trainer(streams, tmp_path / 'whole', steps=8))


@pytest.mark.slow
def test_killed_several_times(streams, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(test_survival, 'trainer', trainer)
    kills, _ = straight_and_killed(streams, tmp_path, 24, 4)
    assert kills >= 2


@pytest.mark.slow
@pytest.mark.parametrize('precision', ['fp32', 'fp8'])
def test_killed_a_hundred_times(streams, tmp_path, monkeypatch, precision):  # noqa: F811
    monkeypatch.setattr(test_survival, 'trainer', trainer)
    kills, mid_save = straight_and_killed(streams, tmp_path, 900, 130, precision=precision)
    assert kills >= 100 and mid_save >= 5


def killed_between_calls(streams, tmp_path, first, every):  # noqa: F811
    "The process dies before its i-th call that flushes or renames, whichever thread makes it"

    def work(out, i=None):
        count = [0]

        def counted(call):
            def f(*args, **kw):
                count[0] += 1
                if count[0] == i:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kw)

            return f

        for m, o in CALLS:
            setattr(m, o, counted(getattr(m, o)))
        t = trainer(streams, out, steps=6)
        t.resume()
        t.fit()
        if i is None:
            (out / 'calls').write_text(str(count[0]))

    assert finishes(lambda: work(tmp_path / 'straight')) == 0
    n = int((tmp_path / 'straight' / 'calls').read_text())
    want = trainer(streams, tmp_path / 'straight', steps=6)
    want.resume()
    assert n > 40
    for i in range(first, n - 8, every):  # the order of two threads differs by some calls
        out = tmp_path / f'{i}'
        assert finishes(lambda: work(out, i)) == -signal.SIGKILL, i
        for path in checkpoints(out / 'checkpoints'):  # what has its name is whole
            load_checkpoint(path)
        assert finishes(lambda: work(out)) == 0, i
        t = trainer(streams, out, steps=6)
        assert t.resume().startswith('finished'), i
        assert same(weights(t), weights(want)) and losses(t) == losses(want), i
        assert not any((out / 'checkpoints').glob('.step-*'))


def test_killed_between_some_calls(streams, tmp_path):  # noqa: F811
    killed_between_calls(streams, tmp_path, 17, 31)


@pytest.mark.slow
def test_killed_between_any_two_calls(streams, tmp_path):  # noqa: F811
    killed_between_calls(streams, tmp_path, 1, 1)


def slow_disk(monkeypatch, seconds):
    "Each flush of a file of a checkpoint takes a while"
    fsync = os.fsync

    def slowly(descriptor):
        if 'step-' in os.readlink(f'/proc/self/fd/{descriptor}'):
            time.sleep(seconds)
        fsync(descriptor)

    monkeypatch.setattr(os, 'fsync', slowly)


@reads_proc
def test_the_training_does_not_wait_for_the_disk(streams, tmp_path, monkeypatch):  # noqa: F811
    "With a disk whose flushes take 0.4 s, steps are taken while the write goes on"
    slow_disk(monkeypatch, 0.4)
    t = trainer(streams, tmp_path, steps=8, save_every=4)
    while_writing = []

    def watch(row):
        thread = t.background._thread
        while_writing.append(thread is not None and thread.is_alive())

    t.fit(watch)
    assert any(while_writing[4:]) and len(checkpoints(tmp_path / 'checkpoints')) == 2


@reads_proc
@pytest.mark.parametrize('how', ['signal', 'end', 'error'])
def test_the_end_waits_for_the_write(streams, tmp_path, monkeypatch, how):  # noqa: F811
    slow_disk(monkeypatch, 0.4)
    t = trainer(streams, tmp_path, steps=4 if how == 'end' else 40, save_every=4)

    def watch(row):
        if how == 'signal' and row['step'] == 5:
            os.kill(os.getpid(), signal.SIGTERM)
        if how == 'error' and row['step'] == 5:
            raise RuntimeError('of the training')

    if how == 'error':
        with pytest.raises(RuntimeError, match='of the training'):
            t.fit(watch)
    else:
        t.fit(watch)
    last = 5 if how == 'signal' else 4
    assert checkpoints(tmp_path / 'checkpoints')[-1].name == f'step-{last:06d}'
    assert not any((tmp_path / 'checkpoints').glob('.step-*'))
    assert latest_checkpoint(tmp_path / 'checkpoints')[3] == ''


@reads_proc
@pytest.mark.parametrize('step', [4, 8])
def test_a_full_disk_is_said_at_the_next_step(streams, tmp_path, monkeypatch, step):  # noqa: F811
    "And not only by the next save, which waits for the write"
    t = trainer(streams, tmp_path, steps=40, save_every=4)
    fsync = os.fsync

    def full(descriptor):
        if t.step >= step and 'step-' in os.readlink(f'/proc/self/fd/{descriptor}'):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    def watch(row):
        if row['step'] < step:
            t.background.wait()
        elif row['step'] == step + 1:
            t.background._thread.join()  # it has failed, and nobody was told

    monkeypatch.setattr(os, 'fsync', full)
    with pytest.raises(OSError, match='could not be written.*No space left.*then resume'):
        t.fit(watch)
    assert t.step <= step + 2
    monkeypatch.setattr(os, 'fsync', fsync)
    saved = [p.name for p in checkpoints(tmp_path / 'checkpoints')]
    assert saved == [f'step-{s:06d}' for s in range(4, step, 4)]
    again = trainer(streams, tmp_path, steps=40, save_every=4)
    assert 'damaged' not in again.resume()


TWO = """
import errno, json, os, sys, time
from pathlib import Path
import torch, torch.distributed as dist
import eva.distributed.mesh as mesh
import eva.distributed.together as together
import eva.training.async_save as async_save
from sizes import TINY
from eva.config import Config
from eva.data.text import TokenStream
from eva.distributed.expert_parallel import shutdown
from eva.distributed.checkpoint import SafetensorsStorageWriter
from eva.distributed.parallel import Parallel
from eva.model.transformer import DeepSeekV3
from eva.training.config import TrainConfig
from eva.training.trainer import Trainer

root, out, vocab = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
mesh.connect()
rank = dist.get_rank()
train, held = (TokenStream(root / f'{name}.npy') for name in ('train', 'held'))


def full(*args):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


# What fails, and on which rank
PLACES = dict(
    part=(SafetensorsStorageWriter, 'write_data', 1),
    first=(SafetensorsStorageWriter, 'prepare_global_plan', 0),
    begin=(mesh, 'owned_write', 0),
    sums=(together, 'write_manifest', 0),
    rename=(mesh.ExitStack, 'close', 0),
    old=(async_save, 'prune', 0),
)


def run(case):
    owner, name, bad = PLACES[case]
    right, said = getattr(owner, name), together.write_error
    torch.manual_seed(0)
    cfg = TrainConfig(steps=40, batch_size=2, micro_batch=1, seq_len=16, save_every=4,
                      eval_every=40, mtp_batch_ratio=1.0, async_save=True)
    model = DeepSeekV3(Config.from_preset('mini', vocab_size=vocab, **TINY))
    t = Trainer(model, train, held, cfg, out / case, Parallel(ep=2))

    def late(*args):  # the second rank knows later
        time.sleep(rank)
        return said(*args)

    def watch(row):
        if row['step'] == 7:
            t.background.wait()  # the first checkpoint is whole
            together.write_error = late
            if rank == bad:
                setattr(owner, name, full)
        if row['step'] == 9 and rank == 0:
            t.background._thread.join()

    try:
        t.fit(watch)
        told = None
    except OSError as e:
        told = str(e)
    finally:
        setattr(owner, name, right)
        together.write_error = said
    everyone = [None] * 2
    dist.all_gather_object(everyone, [told, t.step])
    return everyone


found = {case: run(case) for case in PLACES}
if rank == 0:
    print(json.dumps(found))
shutdown()
"""


def test_two_ranks_end_together_where_a_write_fails_on_one(streams, tmp_path):  # noqa: F811
    "All say why after the same step, nothing hangs, and the checkpoint before is whole"
    root, vocab = streams
    here = dict(PYTHONPATH=os.path.dirname(__file__))
    found = torchrun(TWO, root, tmp_path, vocab, ranks=2, timeout=180, env=here)
    assert len(found) == 6
    for case, ranks in found.items():
        for rank, (said, step) in enumerate(ranks):
            assert step == 9, (case, rank, said)
            words = 'could not be written by another rank' if case == 'old' else 'No space left'
            assert (words if rank else 'No space left') in said, (case, rank)
        folder = tmp_path / case / 'checkpoints'
        assert not any(folder.glob('.step-*')), case
        whole = ['step-000004'] + ['step-000008'] * (case == 'old')
        assert [p.name for p in checkpoints(folder)] == whole, case
        for path in checkpoints(folder):
            load_checkpoint(path)


@reads_proc
def test_rewinding_waits_for_the_write(streams, tmp_path, monkeypatch):  # noqa: F811
    slow_disk(monkeypatch, 0.3)
    t = trainer(streams, tmp_path, steps=40, save_every=100)
    t.fit(lambda row: setattr(t, 'stop', 'SIGINT') if row['step'] == 2 else None)
    t.train_step()
    t.save()
    assert t.background._thread is not None
    said = t.rewind()
    assert 'back to step 3' in said and t.background._thread is None


def test_settings():
    from eva.training.config import TrainConfig

    with pytest.raises(ValueError, match="async_save='yes': must be True or False"):
        TrainConfig(async_save='yes')
