"""A run that is killed, starved of disk or handed damaged files ends with the same bits

Or it says why not, in one sentence."""

import errno
import json
import os
import random
import resource
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from sizes import TINY

from eva.cli.train import eva_train
from eva.config import Config
from eva.data.decode import Document
from eva.data.text import TokenStream, write_tokens
from eva.data.tokenizer import train_tokenizer
from eva.model.transformer import DeepSeekV3
from eva.training.checkpointing import checkpoints, load_checkpoint, read_metrics, save_checkpoint
from eva.training.config import TrainConfig
from eva.training.trainer import Trainer

pytestmark = pytest.mark.skipif(os.name != 'posix', reason='signals and limits of POSIX')


@pytest.fixture(scope='module')
def streams(tmp_path_factory):
    root = tmp_path_factory.mktemp('streams')
    text = 'for i in range(10):\n    print(i, i*i)\n' * 40
    tok = train_tokenizer([text], 270)
    for n, t in (('train', text * 3), ('held', text[:900])):
        write_tokens(root / f'{n}.npy', [Document(n, t)], tok)
    return root, tok.get_vocab_size()


def trainer(streams, out, **kw):
    root, vocab = streams
    torch.manual_seed(0)
    c = TrainConfig(
        **dict(
            dict(
                steps=40,
                batch_size=2,
                micro_batch=2,
                seq_len=16,
                eval_every=10,
                save_every=2,
                lr=3e-3,
            ),
            **kw,
        )
    )
    return Trainer(
        DeepSeekV3(Config.from_preset('mini', vocab_size=vocab, **TINY)),
        TokenStream(root / 'train.npy'),
        TokenStream(root / 'held.npy'),
        c,
        out,
    )


def weights(t):
    return {
        **{k: v.clone() for k, v in t.opt.state_dict().items()},
        **{k: v.clone() for k, v in t.model.named_buffers()},
    }


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def losses(t):
    return [
        (r['step'], r['loss'], r['grad_norm'], r['expert_load'])
        for r in read_metrics(t.out / 'metrics.jsonl')
    ]


def names(folder):
    return sorted(
        p.name for p in folder.iterdir() if not p.name.startswith('.eva-')
    )  # but for the lock and the list of what is ours


def in_child(work):
    "Fork, so that nothing has to be imported again; the child's outcome is its exit code"
    pid = os.fork()
    if pid:
        return pid
    torch.set_num_threads(1)  # threads do not survive a fork
    try:
        work()
        os._exit(0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(1)


def finishes(work):
    "Exit code of a child"
    return os.waitstatus_to_exitcode(os.waitpid(in_child(work), 0)[1])


def killed_often(streams, out, steps, least, precision='fp32'):
    "Kill a run at random moments until it ends in spite of it; kills, and kills during a save"
    rng = random.Random(0)
    kills = 0
    mid_save = 0
    idle = 0
    longest = 0.3

    def work():
        t = trainer(streams, out, steps=steps, precision=precision)
        t.resume()
        t.fit()

    def at():
        return max([int(p.name[5:]) for p in checkpoints(out / 'checkpoints')], default=0)

    while True:
        before = at()
        pid = in_child(work)
        end = time.monotonic() + rng.uniform(0, longest)
        while time.monotonic() < end and (done := os.waitpid(pid, os.WNOHANG))[0] == 0:
            time.sleep(0.0005)
        if done[0] == pid:
            assert os.waitstatus_to_exitcode(done[1]) == 0
            return kills, mid_save
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        kills += 1
        mid_save += (
            any((out / 'checkpoints').glob('.step-*')) if (out / 'checkpoints').exists() else 0
        )
        idle = 0 if at() > before else idle + 1
        longest *= (
            1.1 if idle > 3 else 0.9 if at() - before > steps / (2 * least) else 1.0
        )  # often enough, on a slow machine too


def straight_and_killed(streams, tmp_path, steps, least, **kw):
    straight = trainer(streams, tmp_path / 'straight', steps=steps, **kw)
    assert finishes(straight.fit) == 0
    kills, mid_save = killed_often(streams, tmp_path / 'killed', steps, least, **kw)
    a, b = (trainer(streams, tmp_path / o, steps=steps, **kw) for o in ('straight', 'killed'))
    for t in (a, b):
        assert t.resume().startswith(f'finished: all {steps} steps')
    assert (
        same(weights(a), weights(b))
        and losses(a) == losses(b)
        and [s for s, *_ in losses(b)] == list(range(1, steps + 1))
    )
    left = tmp_path / 'killed' / 'checkpoints'
    assert not any(left.glob('.step-*'))
    assert len(checkpoints(left)) == 2
    print(f'{kills} kills, {mid_save} of them in the middle of a save')
    return kills, mid_save


def test_killed_several_times(streams, tmp_path):
    kills, _ = straight_and_killed(streams, tmp_path, 60, 8)
    assert kills >= 4


def test_a_resumed_run_removes_what_a_killed_one_could_not(streams, tmp_path, monkeypatch):
    "Killed between its last save and the removal of the oldest checkpoint"
    out = tmp_path / 'run'

    def killed_before_the_removal():
        def die_instead(folder, keep):
            if len(checkpoints(folder)) > keep:
                os._exit(7)

        monkeypatch.setattr('eva.training.async_save.prune', die_instead)
        trainer(streams, out, steps=6).fit()

    assert finishes(killed_before_the_removal) == 7
    assert [p.name for p in checkpoints(out / 'checkpoints')] == [
        'step-000002',
        'step-000004',
        'step-000006',
    ]
    t = trainer(streams, out, steps=6)
    assert t.resume().startswith('finished: all 6 steps')
    assert [p.name for p in checkpoints(out / 'checkpoints')] == ['step-000004', 'step-000006']


@pytest.mark.slow
@pytest.mark.parametrize('precision', ['fp32', 'bf16', 'fp8'])
def test_killed_a_hundred_times(streams, tmp_path, precision):
    kills, mid_save = straight_and_killed(streams, tmp_path, 900, 130, precision=precision)
    assert kills >= 100 and mid_save >= 5


CALLS = [(os, o) for o in ('fsync', 'replace', 'mkdir', 'unlink', 'rmdir')]


def test_killed_between_any_two_calls(streams, tmp_path, every=6):
    "The process dies before its i-th call that flushes or renames, for every i"

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
    for i in range(1, n + 1, every):
        out = tmp_path / f'{i}'
        assert finishes(lambda: work(out, i)) == -signal.SIGKILL, i
        assert finishes(lambda: work(out)) == 0, i
        t = trainer(streams, out, steps=6)
        assert (
            t.resume().startswith('finished')
            and same(weights(t), weights(want))
            and losses(t) == losses(want)
        ), i


@pytest.mark.slow
def test_killed_between_all_calls(streams, tmp_path):
    test_killed_between_any_two_calls(streams, tmp_path, 1)


def begun(streams, out):
    "A run of 40 steps stopped after 6, with checkpoints of steps 4 and 6, and one not stopped"

    def half():
        t = trainer(streams, out)
        t.fit(lambda row: setattr(t, 'stop', 'SIGINT') if row['step'] == 6 else None)

    assert finishes(half) == 0 and finishes(trainer(streams, out.with_name('straight')).fit) == 0
    want = trainer(streams, out.with_name('straight'))
    want.resume()
    return want


def ends_alike(streams, out, want):
    def work():
        t = trainer(streams, out)
        t.resume()
        t.fit()

    assert finishes(work) == 0
    t = trainer(streams, out)
    t.resume()
    return same(weights(t), weights(want)) and losses(t) == losses(want)


def test_disk_full(streams, tmp_path):
    """A limit on the size of files stands for a full disk

    The save fails in one sentence, what was there stays, and later it goes on."""
    want = begun(streams, tmp_path / 'run')
    out = tmp_path / 'run'

    def work():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))  # a checkpoint has more
        t = trainer(streams, out)
        t.resume()
        try:
            t.fit()
        except OSError as e:
            assert 'step-000008: could not be written' in str(
                e
            ) and 'what was saved before is untouched' in str(e), e
        else:
            raise AssertionError('nothing was refused')

    assert max(p.stat().st_size for p in (out / 'checkpoints').rglob('*')) > 20_000
    assert finishes(work) == 0
    assert names(out / 'checkpoints') == [
        'step-000004',
        'step-000006',
    ]  # nothing half-written is left
    assert ends_alike(streams, out, want)


@pytest.mark.parametrize('what', ['state.json', 'tensors', 'fsync', 'rename'])
def test_disk_full_at_each_file(streams, tmp_path, monkeypatch, what):
    def full(*args, **kw):
        return (_ for _ in ()).throw(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))

    save_checkpoint(tmp_path / 'step-000001', dict(x=torch.ones(3)), {})
    if what == 'state.json':
        monkeypatch.setattr(Path, 'write_text', full)
    if what == 'tensors':
        monkeypatch.setattr('eva.training.checkpointing.save_file', full)
    if what == 'fsync':
        monkeypatch.setattr(os, 'fsync', full)
    if what == 'rename':
        monkeypatch.setattr(os, 'replace', full)
    with pytest.raises(OSError, match='step-000002: could not be written.*No space left'):
        save_checkpoint(tmp_path / 'step-000002', dict(x=torch.ones(3)), {})
    assert names(tmp_path) == ['step-000001']


def test_folder_that_cannot_be_written(streams, tmp_path):
    want = begun(streams, tmp_path / 'run')
    out = tmp_path / 'run'
    os.chmod(out / 'checkpoints', 0o555)

    def work():
        t = trainer(streams, out)
        t.resume()
        # root may write anywhere: go on as nobody, from inside, where the folders above do not
        # matter
        if os.geteuid() == 0:
            for p in (out, out / 'metrics.jsonl'):
                os.chown(p, 65534, 65534)
            os.chdir(out)
            t.out = Path('.')
            os.setgroups([])
            os.setgid(65534)
            os.setuid(65534)
        try:
            t.fit()
        except OSError as e:
            assert 'step-000008: could not be written (' in str(
                e
            ) and 'give write access, then resume' in str(e), e
        else:
            raise AssertionError('nothing was refused')

    assert finishes(work) == 0
    os.chmod(out / 'checkpoints', 0o755)
    assert ends_alike(streams, out, want)


def damage(path, kind, rng):
    raw = bytearray(path.read_bytes())
    if kind == 'cut':
        del raw[rng.randrange(len(raw)) :]
    if kind == 'flipped':
        raw[rng.randrange(len(raw))] ^= 1 << rng.randrange(8)
    if kind == 'zeroed':
        i = rng.randrange(len(raw))
        raw[i : i + 512] = bytes(len(raw[i : i + 512]))
        raw[-1] ^= 1  # a block that never reached the disk
    if kind == 'empty':
        raw = b''
    path.unlink() if kind == 'gone' else path.write_bytes(raw)


@pytest.mark.parametrize('file', ['tensors.safetensors', 'state.json'])
@pytest.mark.parametrize('kind', ['cut', 'flipped', 'zeroed', 'empty', 'gone'])
def test_damaged_checkpoint(streams, tmp_path, file, kind):
    "The one before is used, and both are said"
    out = tmp_path / 'run'
    t = trainer(streams, out, steps=6)
    t.fit()
    kept = weights(t)
    damage(out / 'checkpoints' / 'step-000006' / file, kind, random.Random(1))
    again = trainer(streams, out, steps=6)
    said = again.resume()
    assert (
        'step-000006: no complete checkpoint (' in said
        and said.endswith('going on from step 4 of 6')
        and said.count('\n') == 0
    )
    again.fit()
    assert same(weights(again), kept)
    for p in checkpoints(out / 'checkpoints'):
        damage(p / file, kind, random.Random(2))
    said = trainer(streams, out, steps=6).resume()
    assert said.count('no complete checkpoint') == 2 and said.endswith(
        f'nothing to resume from in {out}: starting at the beginning'
    )


def test_every_flipped_bit_is_found(tmp_path):
    torch.manual_seed(0)
    save_checkpoint(
        tmp_path / 'step-000001',
        dict(x=torch.randn(20), y=torch.arange(5)),
        dict(step=1, seconds=0.1, name='x'),
    )
    for file in ('tensors.safetensors', 'state.json'):
        path = tmp_path / 'step-000001' / file
        raw = path.read_bytes()
        for bit in range(8 * len(raw)):
            path.write_bytes(
                raw[: bit // 8] + bytes([raw[bit // 8] ^ 1 << bit % 8]) + raw[bit // 8 + 1 :]
            )
            with pytest.raises(ValueError, match='no complete checkpoint'):
                load_checkpoint(tmp_path / 'step-000001')
        path.write_bytes(raw)
    assert load_checkpoint(tmp_path / 'step-000001')[1] == dict(
        step=1, seconds=0.1, name='x', sha256=load_checkpoint(tmp_path / 'step-000001')[1]['sha256']
    )


def test_terminated(streams, tmp_path):
    "SIGTERM: the step is finished and saved, and the end is the same"
    want = begun(streams, tmp_path / 'run')
    out = tmp_path / 'run'

    def work():
        t = trainer(streams, out)
        t.resume()
        t.fit(lambda row: os.kill(os.getpid(), signal.SIGTERM) if row['step'] == 17 else None)
        assert (t.step, t.stop, checkpoints(out / 'checkpoints')[-1].name) == (
            17,
            'SIGTERM',
            'step-000017',
        )

    assert finishes(work) == 0
    assert ends_alike(streams, out, want)


def test_changed_run_is_refused_with_the_difference(streams, tmp_path):
    out = tmp_path / 'run'
    t = trainer(streams, out, steps=4)
    t.fit()
    with pytest.raises(
        ValueError,
        match=(
            'step-000004: was written by a run with other settings, '
            'steps=4 and not 6, lr=0.003 and not 0.004; resume with those'
        ),
    ):
        trainer(streams, out, steps=6, lr=0.004).resume()
    root, vocab = streams
    other = trainer(streams, out, steps=4)
    other.train = TokenStream(root / 'held.npy')
    with pytest.raises(ValueError, match=r'other settings, tokens=\d+ and not \d+'):
        other.resume()
    wider = Trainer(
        DeepSeekV3(Config.from_preset('mini', vocab_size=vocab, **TINY | dict(hidden_size=32))),
        t.train,
        t.held_out,
        t.cfg,
        out,
    )
    with pytest.raises(ValueError, match='hidden_size=16 and not 32'):
        wider.resume()
    assert len(checkpoints(out / 'checkpoints')) == 2  # none was set aside


def test_random_states_go_on(streams, tmp_path):
    "Whoever draws numbers while training draws the same ones after resuming"

    def run(out, until=None):
        t = trainer(streams, out, steps=8)
        t.resume()
        drawn = []

        def watch(row):
            drawn.append(torch.rand(()).item())
            if row['step'] == until:
                t.stop = 'SIGINT'

        t.fit(watch)
        return drawn

    whole = run(tmp_path / 'whole')
    first = run(tmp_path / 'parts', 5)
    torch.manual_seed(77)
    assert first + run(tmp_path / 'parts') == whole


# eva_train itself, killed at any moment, with files of a user's in its folder


USERS = {  # where something of a user's may lie, and what
    'notes.txt': b'precious',
    'empty': b'',
    'data/deep/a.npy': bytes(range(256)),
    '.run.json.tmp77': b'precious',
    '.eva-manifest.json.bak': b'{}',
    'model.safetensors.bak': b'precious',
    'checkpoints/notes.txt': b'precious',
    'checkpoints/best/tensors.safetensors': b'precious',
    'checkpoints/.step-000002.tmp77/x': b'precious',
    'checkpoints/.step-000002.old77/x': b'precious',
    'tokens/notes.txt': b'precious',
    'tokens/train.npy.bak': b'precious',
    'tokens/train/mine': b'precious',
}
OTHERS = {  # paths, and what is made there
    'pipe': os.mkfifo,
    'link': lambda path: path.symlink_to('/usr'),
    'checkpoints/link': lambda path: path.symlink_to('nothing'),
    'tokens/link': lambda path: path.symlink_to('../notes.txt'),
    'tokens/pipe': os.mkfifo,
}
RUN = [
    '--preset',
    'tiny',
    '--steps',
    '6',
    '--seq_len',
    '16',
    '--batch_size',
    '2',
    '--save_every',
    '1',
    '--precision',
    'fp32',
    '--device',
    'cpu',
    '--seed',
    '1',
]
SOURCES = {  # what is read decides what is written before run.json
    'text': ['--data', 'text', '--vocab_size', '300'],
    'lines': ['--data', 'lines.jsonl', '--vocab_size', '300', '--fim', '0.5'],
    'task': ['--data', 'synthetic:copy', '--steps', '3', '--seq_len', '32'],
}


@pytest.fixture
def sources(tmp_path, monkeypatch):
    "Data to train on, the smallest model there is, and everything imported that a child will need"

    preset = Config.from_preset
    monkeypatch.setattr(Config, 'from_preset', lambda name, **kw: preset(name, **TINY | kw))
    monkeypatch.setenv('TOKENIZERS_PARALLELISM', 'false')  # its threads do not survive a fork
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'text').mkdir()
    texts = [f'def f{i}(x):\n    return x + {i}\n' * 12 for i in range(30)]
    for i, text in enumerate(texts):
        (tmp_path / 'text' / f'{i}.py').write_text(text)
    (tmp_path / 'lines.jsonl').write_text(
        ''.join(json.dumps(dict(text=text)) + '\n' for text in texts * 8)
    )


def train_in_child(*argv, err='err.txt', before=lambda: None):
    "Start eva_train in a child; its process id"

    def work():
        with open(err, 'w') as f, open(os.devnull, 'w') as shown:
            os.dup2(f.fileno(), 2)
            os.dup2(shown.fileno(), 1)
            sys.stderr = f
            sys.stdout = shown  # pytest's own, where it captures, lead elsewhere
            before()
            code = eva_train([str(o) for o in argv])
            f.flush()
            os._exit(code)

    return in_child(work)


def exit_code(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def put(run, name):
    "Put something of a user's into the folder of a run, if nothing is there; everything about it"
    path = run / name
    top = run / name.split('/')[0]
    if os.path.lexists(path) or '/' in name and not top.exists():
        return {}
    path.parent.mkdir(parents=True, exist_ok=True)
    if name in USERS:
        path.write_bytes(USERS[name])
    else:
        OTHERS[name](path)
    return {name: about(path)}


def about(path):
    "What must not change"
    if not os.path.lexists(path):
        return 'gone'
    content = (
        os.readlink(path) if path.is_symlink() else path.read_bytes() if path.is_file() else None
    )
    state = os.lstat(path)
    return state.st_mode, state.st_ino, state.st_mtime_ns, state.st_size, content


def killed_among_files(run, straight, seconds, kills, rng):
    "Kill eva_train at random moments and put files beside what it left, until it comes to its end"
    mine = {}
    refused = []
    when = []
    names = [*USERS, *OTHERS]
    for name in ('notes.txt', 'pipe', 'checkpoints/notes.txt', 'data/deep/a.npy'):
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        mine |= put(run, name)
    while True:
        pid = train_in_child('--out', run, *RUN, *SOURCES['text'], '--resume')
        end = time.monotonic() + rng.uniform(0, seconds)
        while (done := os.waitpid(pid, os.WNOHANG))[0] == 0 and (
            kills <= 0 or time.monotonic() < end
        ):
            time.sleep(0.001)
        if done[0] == 0:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            kills -= 1
        assert {name: about(run / name) for name in mine} == mine
        if done[0] == pid and os.waitstatus_to_exitcode(done[1]) == 0:
            assert (run / 'model.safetensors').read_bytes() == straight
            return len(mine), refused, when
        if done[0] == pid:  # refused, for something that lies where the run wants to write
            said = Path('err.txt').read_text()
            assert os.waitstatus_to_exitcode(done[1]) == 2 and said.count('\n') == 1, said
            name = next(
                (
                    n
                    for n in mine
                    if f'{run}/{n}' in said or '/' in n and f'{run}/{Path(n).parent}' in said
                ),
                None,
            )
            assert name, said
            refused.append(name)
            inside = [n for n in mine if n.split('/')[0] == name.split('/')[0]]
            for n in inside:  # the user does as is said
                (run / n).unlink()
                mine.pop(n)
                for above in (run / n).parents:
                    if above == run or not above.is_dir() or any(above.iterdir()):
                        break
                    above.rmdir()
            continue
        when.append(
            'before'
            if not (run / 'run.json').exists()
            else 'after'
            if (run / 'report.png').exists()
            else 'while'
        )
        for name in names if kills <= 0 else rng.sample(names, 3):
            mine |= put(run, name)


def files_and_kills(tmp_path, kills):
    "Spend a number of kills on as many runs as it takes"
    start = time.monotonic()
    assert exit_code(train_in_child('--out', 'straight', *RUN, *SOURCES['text'])) == 0, Path(
        'err.txt'
    ).read_text()
    seconds = time.monotonic() - start
    straight = Path('straight/model.safetensors').read_bytes()
    rng = random.Random(0)
    files = 0
    refused = []
    when = []
    while len(when) < kills:
        run = tmp_path / f'run{len(when)}'
        found = killed_among_files(run, straight, seconds, min(8, kills - len(when)), rng)
        files = files + found[0]
        refused = refused + found[1]
        when = when + found[2]
    phases = {phase: when.count(phase) for phase in ('before', 'while', 'after')}
    print(
        f'{files} files of a user are as they were; kills: '
        f'{phases}; refused for: {" ".join(refused)}'
    )
    assert (
        files >= 7 and sum(phases.values()) == len(when) >= kills
    )  # when they fell depends on the machine


def test_a_users_files_survive_kills(sources, tmp_path):
    files_and_kills(tmp_path, 6)


@pytest.mark.slow
def test_a_users_files_survive_many_kills(sources, tmp_path):
    files_and_kills(tmp_path, 300)


def killed_before_it_was_a_run(tmp_path, kind, every):
    "Kill eva_train before its i-th call that changes the disk, while there is no run.json; restart"
    argv = [*RUN, *SOURCES[kind], '--steps', '1']

    def killed_at(i):
        count = [0]

        def counted(call):
            def f(*args, **kw):
                count[0] += 1
                if count[0] == i:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*args, **kw)

            return f

        for module, name in CALLS:
            setattr(module, name, counted(getattr(module, name)))

    assert exit_code(train_in_child('--out', 'straight', *argv)) == 0, Path('err.txt').read_text()
    straight = Path('straight/model.safetensors').read_bytes()
    i = 1
    moments = 0
    while True:
        run = tmp_path / f'run{i}'
        assert (
            exit_code(train_in_child('--out', run, *argv, before=lambda: killed_at(i)))
            == -signal.SIGKILL
        ), i
        if (run / 'run.json').exists():
            break
        run.mkdir(exist_ok=True)
        (run / 'notes.txt').write_text('precious')
        before = about(run / 'notes.txt')
        code = exit_code(train_in_child('--out', run, *argv))  # the same command, without --resume
        assert code == 0, (i, Path('err.txt').read_text())
        assert (run / 'model.safetensors').read_bytes() == straight and about(
            run / 'notes.txt'
        ) == before
        i = i + every
        moments = moments + 1
    print(f'{kind}: killed at {moments} moments before there was a run')
    assert moments >= 2


@pytest.mark.parametrize('kind', SOURCES)
def test_killed_before_it_was_a_run(sources, tmp_path, kind):
    killed_before_it_was_a_run(tmp_path, kind, 29)


@pytest.mark.slow
@pytest.mark.parametrize('kind', SOURCES)
def test_killed_at_every_call_before_it_was_a_run(sources, tmp_path, kind):
    killed_before_it_was_a_run(tmp_path, kind, 1)
