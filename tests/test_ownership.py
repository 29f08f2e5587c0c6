"""Eva overwrites and deletes what its own lists name, and nothing else, whatever stands in its way

Generated: each command, each name that it writes, each kind of thing that may have this name
already.
"""

import contextlib
import io
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sizes import TINY

from eva.benchmarks.harness import BenchResult
from eva.benchmarks.harness import run as bench
from eva.checkpoints.pretrained import save_pretrained
from eva.cli import run_folder, train_time
from eva.cli.bench import eva_bench
from eva.cli.convert import eva_convert
from eva.cli.generate import eva_generate
from eva.cli.plan import eva_plan
from eva.cli.run_folder import RUN_FILES, RUN_FOLDERS
from eva.cli.train import eva_train
from eva.config import Config
from eva.fileio.locks import FolderLock
from eva.fileio.manifest import Manifest
from eva.model.transformer import DeepSeekV3
from eva.training.checkpointing import (
    RunLog,
    checkpoints,
    latest_checkpoint,
    owned_write,
    save_checkpoint,
)

pytestmark = pytest.mark.skipif(os.name != 'posix', reason='links, pipes and locks of POSIX')

SMALL = [
    '--steps',
    '4',
    '--seq_len',
    '16',
    '--batch_size',
    '2',
    '--vocab_size',
    '300',
    '--save_every',
    '1',
]
SMALL += ['--precision', 'fp32', '--device', 'cpu', '--data', 'text']
SHRINK = f"""
from eva.config import Config
preset = Config.from_preset
Config.from_preset = lambda name, **kw: preset(name, **({TINY!r} if name == 'mini' else {{}}) | kw)
"""
KINDS = ['file', 'folder', 'link to a file', 'link to a folder', 'link to nothing', 'pipe']


def bench_quickly():
    "What eva_bench measures here"
    return [BenchResult('quickly', 'ms', 1.0, {'peer': 2.0}, {'peer': 2.0})]


@pytest.fixture
def quick_case(monkeypatch):
    monkeypatch.setattr('eva.benchmarks.harness.CASES', {'quickly': __name__})


def plant(path, kind, elsewhere):
    "Put something of a user's at a path, in the place of what is there"
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    path.unlink(missing_ok=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    elsewhere.mkdir(exist_ok=True)
    (elsewhere / 'folder').mkdir(exist_ok=True)
    for file in (elsewhere / 'file', elsewhere / 'folder' / 'file'):
        file.write_text('precious')
    if kind == 'file':
        path.write_text('precious')
    elif kind == 'folder':
        path.mkdir()
        (path / 'notes.txt').write_text('precious')
    elif kind == 'pipe':
        os.mkfifo(path)
    else:
        path.symlink_to(elsewhere / kind.removeprefix('link to a ').replace('link to ', ''))


def snapshot(*roots):
    "Everything about everything below some folders"
    found = {}
    for root in roots:
        for p in sorted([root, *root.rglob('*')]):
            about = os.lstat(p)
            if (
                p.name == Manifest.NAME
                and stat.S_ISREG(about.st_mode)
                and p.read_text().startswith('{\n "files"')
            ):
                continue  # ours: names of files that are gone are struck out
            content = (
                p.read_bytes()
                if stat.S_ISREG(about.st_mode)
                else os.readlink(p)
                if p.is_symlink()
                else None
            )
            changed = None if stat.S_ISDIR(about.st_mode) else about.st_mtime_ns
            found[str(p)] = stat.S_IFMT(about.st_mode), about.st_ino, changed, content
    return found


def command(work, *argv):
    "Exit code, what was printed, what went to standard error"
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = work(list(map(str, argv)))
    return code, out.getvalue(), err.getvalue()


def refused(work, *argv, names, roots):
    "A command is refused by one sentence that names a file, and changes nothing"
    before = snapshot(*roots)
    code, out, err = command(work, *argv)
    assert code == 2 and err.count('\n') == 1 and names in err, (argv, code, out, err)
    assert snapshot(*roots) == before, argv


@pytest.fixture(scope='module', autouse=True)
def small_presets():
    "The smallest model there is, for the commands"
    preset = Config.from_preset
    exec(SHRINK, {})
    yield
    Config.from_preset = preset


@pytest.fixture(scope='module')
def started(tmp_path_factory):
    "A run that was stopped after two of its four steps, and the text that it reads"
    root = tmp_path_factory.mktemp('started')
    (root / 'text').mkdir()
    for i in range(30):
        (root / 'text' / f'{i}.py').write_text(f'def f{i}(x):\n    return x + {i}\n' * 12)
    here = os.getcwd()
    watched = RunLog.write

    def stop_after_two(self, row):
        watched(self, row)
        if row['step'] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    os.chdir(root)
    old_mask = os.umask(0o022)
    RunLog.write = stop_after_two
    try:
        code, out, err = command(eva_train, '--out', 'run', *SMALL)
    finally:
        RunLog.write = watched
        os.umask(old_mask)
        os.chdir(here)
    assert code == 130, (code, out, err)
    return root


@pytest.fixture
def no_work(monkeypatch):
    "Nothing is read, built or trained: a refusal comes before"

    def work(*args, **kwargs):
        raise AssertionError('the command began to work')

    # each in the module that looks it up
    for module, name in (
        (run_folder, 'new_run'),
        (run_folder, 'old_run'),
        (train_time, 'start_model'),
    ):
        monkeypatch.setattr(module, name, work)


@pytest.mark.parametrize('kind', KINDS)
def test_a_new_run_meets_something_of_a_users(tmp_path, monkeypatch, no_work, kind):
    monkeypatch.chdir(tmp_path)
    names = [*RUN_FILES, *RUN_FOLDERS, Manifest.NAME, '.eva-lock']
    for i, name in enumerate(names):
        out = Path(f'run{i}')
        plant(out / name, kind, tmp_path / 'elsewhere')
        is_run = name == 'run.json' and kind != 'link to nothing'
        for more in ([], ['--resume']):
            said = 'run.json' if is_run and more else out.name if is_run else f'{out}/{name}: '
            refused(
                eva_train,
                '--out',
                out,
                *([] if more and is_run else SMALL),
                *more,
                names=said,
                roots=[tmp_path],
            )


@pytest.mark.parametrize('kind', KINDS)
def test_out_is_something_else(tmp_path, monkeypatch, no_work, kind):
    "A folder, or a link to one, is what --out may be"
    if kind in ('folder', 'link to a folder'):
        return
    monkeypatch.chdir(tmp_path)
    plant(tmp_path / 'run', kind, tmp_path / 'elsewhere')
    refused(eva_train, '--out', 'run', *SMALL, names='run: is no folder', roots=[tmp_path])


@pytest.mark.parametrize('kind', KINDS)
def test_a_resumed_run_meets_something_of_a_users(started, tmp_path, monkeypatch, no_work, kind):
    "Where something of the run was replaced since, or something new has a name not yet written"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(started / 'run', 'copy')
    steps = (
        ['checkpoints/step-000003'] if kind not in ('folder', 'link to a folder') else []
    )  # see below
    files = [f for f in RUN_FILES if f != 'run.json']
    folders = RUN_FOLDERS[1:]
    if kind == 'folder' and Path('copy/tensorboard').exists():
        folders.remove('tensorboard')  # logs are only added to it, whoever made it
    for name in (*files, *folders, *steps, Manifest.NAME, '.eva-lock'):
        run = tmp_path / 'run'
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree('copy', run)
        plant(run / name, kind, tmp_path / 'elsewhere')
        refused(eva_train, '--out', 'run', '--resume', names=f'run/{name}: ', roots=[tmp_path])


@pytest.mark.parametrize('kind', ['folder', 'link to a folder'])
def test_a_users_folder_is_called_as_a_checkpoint(started, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(started / 'run', 'run')
    plant(tmp_path / 'run' / 'checkpoints' / 'step-000003', kind, tmp_path / 'elsewhere')
    refused(
        eva_train,
        '--out',
        'run',
        '--resume',
        names='run/checkpoints/step-000003: ',
        roots=[tmp_path],
    )


@pytest.mark.parametrize('kind', KINDS)
def test_files_that_are_read(started, tmp_path, monkeypatch, kind):
    "What a resumed run only reads: another kind of file there is one sentence, at once"
    monkeypatch.chdir(tmp_path)
    run = tmp_path / 'run'
    for name in ('run.json', 'tokens/train.json', 'tokens/train.npy', 'tokens/held_out.npy'):
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(started / 'run', run)
        plant(run / name, kind, tmp_path / 'elsewhere')
        if name == 'run.json' and kind == 'link to nothing':
            continue  # a new run, see above
        refused(eva_train, '--out', 'run', '--resume', names=f'run/{name}', roots=[tmp_path])


HOSTILE = {
    'deep': b'[' * 10**6,
    'list': b'[1]',
    'digits': b'{"a": 1' + b'0' * 400 + b'}',
    'twice': b'{"step": 1, "step": 2}',
    'half': b'{"a": ',
    'bytes': b'\xff\xfe\x00',
}


@pytest.mark.parametrize('name', ['run.json', 'tokens/train.json'])
def test_hostile_contents_are_one_sentence(started, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(started / 'run', 'run')
    for raw in HOSTILE.values():
        Path('run', name).write_bytes(raw)
        refused(eva_train, '--out', 'run', '--resume', names='run', roots=[tmp_path])
    with open(Path('run', name), 'wb') as f:
        f.truncate(2**40)  # no bytes on the disk, a terabyte in memory
    code, _, err = command(eva_train, '--out', 'run', '--resume')
    assert code == 2 and '1,099,511,627,776 bytes' in err and err.count('\n') == 1


def test_a_hostile_state_is_passed_over(started, tmp_path):
    shutil.copytree(started / 'run' / 'checkpoints', tmp_path / 'checkpoints')
    for raw in HOSTILE.values():
        last = checkpoints(tmp_path / 'checkpoints')[-1]
        (last / 'state.json').write_bytes(raw)
        path, _, _, said = latest_checkpoint(tmp_path / 'checkpoints')
        assert path.name == 'step-000001' and 'step-000002: no complete checkpoint' in said
        next((tmp_path / 'checkpoints').glob('damaged-*')).rename(last)


@pytest.mark.parametrize('kind', KINDS)
def test_a_conversion_meets_something_of_a_users(started, tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(started / 'run', 'run')
    for i, name in enumerate(('', '.partial')):
        plant(tmp_path / f'to{i}{name}', kind, tmp_path / 'elsewhere')
        refused(eva_convert, 'run', f'to{i}', names=f'to{i}{name}: ', roots=[tmp_path])
    code, _, err = command(eva_convert, 'run', 'fine')
    assert code == 0, err
    weights = {'config.json', 'generation_config.json', 'model.safetensors'}
    theirs = weights | {'tokenizer.json', 'tokenizer_config.json', 'special_tokens_map.json'}
    theirs |= {'README.md'}
    assert {p.name for p in Path('fine').iterdir()} == theirs


@pytest.mark.parametrize('kind', KINDS)
def test_an_interrupted_conversion_meets_something_of_a_users(started, tmp_path, monkeypatch, kind):
    "The conversion is stopped before it takes its name, and goes on with something in its folder"
    monkeypatch.chdir(tmp_path)

    def stop(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr('eva.checkpoints.conversion._Conversion.config', stop)
        assert command(eva_convert, started / 'run', 'to')[0] == 130
    shutil.copytree('to.partial', 'copy')
    for name in ('model.safetensors', 'config.json', 'tokenizer.json', Manifest.NAME):
        shutil.rmtree('to.partial')
        shutil.copytree('copy', 'to.partial')
        plant(tmp_path / 'to.partial' / name, kind, tmp_path / 'elsewhere')
        refused(eva_convert, started / 'run', 'to', names=f'to.partial/{name}: ', roots=[tmp_path])
    shutil.rmtree('to.partial')
    shutil.copytree('copy', 'to.partial')
    code, _, err = command(eva_convert, started / 'run', 'to')
    assert code == 0 and not Path('to.partial').exists(), err


@pytest.mark.parametrize('kind', KINDS)
def test_figures_and_plans_meet_something_of_a_users(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        'eva.benchmarks.harness.import_module',
        lambda name: pytest.fail('measured before the refusal'),
    )
    for i, name in enumerate(('bench.json', 'bench.png', Manifest.NAME)):
        plant(tmp_path / f'b{i}' / name, kind, tmp_path / 'elsewhere')
        refused(
            eva_bench,
            '--only',
            'moe',
            '--quick',
            '--out',
            f'b{i}',
            names=f'b{i}/{name}: ',
            roots=[tmp_path],
        )
    plant(tmp_path / 'plan.json', kind, tmp_path / 'elsewhere')
    refused(eva_plan, '--out', 'plan.json', names='plan.json: ', roots=[tmp_path])


def test_figures_and_plans_are_replaced_where_they_are_ours(tmp_path, monkeypatch, quick_case):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert command(eva_plan, '--out', 'plan.json')[0] == 0
    before = Path('plan.json').read_text()
    Path('plan.json').write_text(before + ' ')
    refused(eva_plan, '--out', 'plan.json', names='plan.json: was changed since', roots=[tmp_path])
    assert bench(['quickly'], out=tmp_path / 'b', say=lambda *args: None)
    shutil.rmtree(tmp_path / 'c', ignore_errors=True)
    (tmp_path / 'c').mkdir()
    shutil.copy('b/bench.json', 'c/bench.json')  # of a version that kept no list
    for out in ('b', 'c'):
        assert bench(['quickly'], out=tmp_path / out, say=lambda *args: None)


@pytest.mark.parametrize('kind', KINDS)
def test_a_model_is_saved_beside_something_of_a_users(tmp_path, kind):
    model = DeepSeekV3(Config.from_preset('mini', vocab_size=40, **TINY))
    names = (
        'model.safetensors',
        'config.json',
        'generation_config.json',
        Manifest.NAME,
        '.eva-lock',
    )
    names += ('model.safetensors.index.json', 'model-00001-of-00002.safetensors')
    for i, name in enumerate(names):
        plant(tmp_path / f'm{i}' / name, kind, tmp_path / 'elsewhere')
        before = snapshot(tmp_path)
        with pytest.raises(ValueError, match=f'm{i}/{name}: '):
            save_pretrained(model, tmp_path / f'm{i}')
        assert snapshot(tmp_path) == before
    (tmp_path / 'mine').mkdir()
    (tmp_path / 'mine' / 'notes.txt').write_text('precious')
    for _ in range(2):  # ours may be replaced
        save_pretrained(model, tmp_path / 'mine')
    assert (tmp_path / 'mine' / 'notes.txt').read_text() == 'precious'


def test_what_stands_beside_is_left(started, tmp_path, monkeypatch):
    "A whole run among files of other names, some of which look like temporary ones"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(started / 'run', 'run')
    run = tmp_path / 'run'
    mine = [
        'notes.txt',
        '.sample.txt.tmp77',
        'checkpoints/.step-000009.tmp77/x',
        'checkpoints/best/x',
        'tokens/notes',
    ]
    mine += ['checkpoints/.step-000009.old77/x', 'tensorboard/theirs', '.report.png.old1']
    for name in mine[: -2 if not (run / 'tensorboard').exists() else None]:
        plant(run / name, 'file', tmp_path / 'elsewhere')
    files = [p for p in run.rglob('*') if p.is_file() and p.read_bytes() == b'precious']
    before = {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in files}
    code, out, err = command(eva_train, '--out', 'run', '--resume')
    assert code == 0 and 'going on from step 2 of 4' in out, err
    assert {p: (p.stat().st_ino, p.stat().st_mtime_ns) for p in files} == before and len(files) >= 6
    assert all(p.read_text() == 'precious' for p in files)
    modes(run)


def modes(folder):
    "Files are 0644 and folders 0755"
    odd = {
        p: oct(p.stat().st_mode)
        for p in folder.rglob('*')
        if p.stat().st_mode & 0o777 != (0o755 if p.is_dir() else 0o644)
    }
    assert not odd, odd


def test_modes(started, tmp_path, monkeypatch, quick_case):
    monkeypatch.chdir(tmp_path)
    old_mask = os.umask(0o022)
    try:
        modes(started / 'run')
        assert command(eva_convert, started / 'run', 'to', '--to', 'fp8')[0] == 0
        assert command(eva_plan, '--out', 'plans/plan.json')[0] == 0
        save_pretrained(DeepSeekV3(Config.from_preset('mini', vocab_size=40, **TINY)), 'model')
        bench(['quickly'], out='figures', say=lambda *args: None)
        with FolderLock('locked'):
            modes(tmp_path)
    finally:
        os.umask(old_mask)


def test_an_older_run_is_taken_over(started, tmp_path, monkeypatch):
    "A run from before there were lists, and one copied without them: read, resumed, and said"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(started / 'run', 'run', copy_function=shutil.copyfile)
    for p in list(Path('run').rglob('.eva-*')):
        p.unlink()
    code, out, err = command(eva_train, '--out', 'run', '--resume')
    assert (
        code == 0
        and 'run: the run is older than the list of what Eva wrote; now listed: run.json, ' in out
    ), err
    assert (
        'going on from step 2 of 4' in out and len(checkpoints(Path('run/checkpoints'))) == 2
    )  # old ones are pruned
    code, out, err = command(eva_train, '--out', 'run', *SMALL)
    assert (
        code == 2
        and 'already holds a run; --resume goes on with it, --out DIR starts another' in err
    )
    Path('run/run.json').write_text('{"train": 1}')
    refused(
        eva_train,
        '--out',
        'run',
        '--resume',
        names='run.json is no file of eva_train',
        roots=[tmp_path],
    )


def test_a_copied_run_goes_on(started, tmp_path, monkeypatch):
    "Other times and inodes, the same contents"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(started / 'run', 'run', copy_function=shutil.copyfile)
    code, out, err = command(eva_train, '--out', 'run', '--resume')
    assert code == 0 and 'going on from step 2 of 4' in out, err


START = [
    sys.executable,
    '-c',
    SHRINK + 'from eva.cli.train import eva_train; raise SystemExit(eva_train())',
]


def running(run, *argv, until=2):
    "A run of a process of its own, once it has done some steps"
    p = subprocess.Popen(
        [*START, '--out', run, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    log = Path(run) / 'metrics.jsonl'
    end = time.time() + 300
    while not (log.exists() and log.read_text().count('\n') >= until):
        assert p.poll() is None and time.time() < end, p.communicate()[1][-2000:]
        time.sleep(0.02)
    return p


def test_two_runs_in_one_folder(started, tmp_path, monkeypatch):
    "The second is refused, whichever command it is, and the first one goes on; reading is allowed"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(started / 'text', 'text')
    long = [*SMALL, '--steps', '100000', '--save_every', '50000']
    p = running('run', *long)
    try:
        who = f'run: in use by process {p.pid} on '
        second = {
            'the same again': (eva_train, '--out', 'run', *long),
            'resumed': (eva_train, '--out', 'run', '--resume'),
            'by another name': (eva_train, '--out', tmp_path / 'run', '--resume'),
            'figures': (eva_bench, '--out', 'run', '--only', 'moe', '--quick'),
        }
        for name, (work, *argv) in second.items():
            code, _, err = command(work, *argv)
            assert code == 2 and who in err and err.count('\n') == 1, (name, err)
        assert command(eva_convert, started / 'run', 'run')[0] == 2
        with pytest.raises(ValueError, match=f'in use by process {p.pid}'):
            save_pretrained(DeepSeekV3(Config.from_preset('mini', vocab_size=40, **TINY)), 'run')
        with pytest.raises(ValueError, match=f'in use by process {p.pid}'):
            RunLog(tmp_path / 'run')
        for name in (
            'model.safetensors',
            'config.json',
        ):  # a model that can be read while the run goes on
            assert not Path('run', name).exists()
        before = Path('run/metrics.jsonl').stat().st_size
        code, _, err = command(eva_generate, 'run', '--prompt', 'def', '--max_new_tokens', 2)
        assert 'in use' not in err
        end = time.time() + 120
        while Path('run/metrics.jsonl').stat().st_size == before:
            assert p.poll() is None and time.time() < end
            time.sleep(0.02)
    finally:
        p.kill()
        p.wait()
    plant(
        tmp_path / 'run' / 'sample.txt', 'file', tmp_path / 'elsewhere'
    )  # of the user's, after the kill
    refused(
        eva_train,
        '--out',
        'run',
        '--resume',
        names='run/sample.txt: was not written by Eva',
        roots=[tmp_path / 'elsewhere'],
    )
    assert Path('run/sample.txt').read_text() == 'precious'
    os.unlink('run/sample.txt')
    again = running('run', '--resume', until=1)  # what a killed process had locked is free
    again.send_signal(signal.SIGTERM)
    assert 'in use' not in again.communicate(timeout=300)[1]


def test_a_dead_holder_is_said(started, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(started / 'run', 'run')
    child = os.fork()
    if not child:
        FolderLock('run').acquire()
        os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
    code, out, err = command(eva_train, '--out', 'run', '--resume')
    assert code == 0 and f'run: process {child} on ' in out and 'ended without a word' in out, (
        out,
        err,
    )
    assert not Path('run/.eva-lock').exists()
    code, out, err = command(eva_train, '--out', 'run', '--resume')
    assert code == 0 and 'ended without a word' not in out


def test_a_checkpoint_that_is_being_saved_is_left(tmp_path):
    "Another process looks for the newest checkpoint in the middle of a save"
    folder = tmp_path / 'checkpoints'
    save_checkpoint(folder / 'step-000001', dict(x=torch.ones(3)), dict(step=1))
    ready = os.pipe()
    go = os.pipe()
    child = os.fork()
    if not child:
        try:
            with owned_write(folder / 'step-000002') as t:
                t.mkdir()
                (t / 'half').write_text('half')
                os.write(ready[1], b'x')
                os.read(go[0], 1)
            os._exit(0)
        except BaseException:
            os._exit(1)
    os.read(ready[0], 1)
    path, *_ = latest_checkpoint(folder)
    there = sorted(p.name for p in folder.glob('.step-*'))
    os.write(go[1], b'x')
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert path.name == 'step-000001' and there == [f'.step-000002.tmp{child}'] and code == 0
    assert (folder / 'step-000002' / 'half').read_text() == 'half'


def test_the_list_costs_a_step_nothing(tmp_path, monkeypatch):
    "The list is written where files appear, and not where lines are appended"

    def saves(folder, steps):
        count = []
        save = Manifest._save
        monkeypatch.setattr(
            Manifest,
            '_save',
            lambda self, *args, **kw: count.append(self.path) or save(self, *args, **kw),
        )
        with RunLog(folder, log_to=[]) as log:
            for i in range(1, steps + 1):
                log.write(dict(step=i, loss=1.0 / i, expert_load=[[1, 2, 3]] * 4))
                if i % (steps // 3) == 0:
                    log.sync()
                    save_checkpoint(
                        folder / 'checkpoints' / f'step-{i:06d}',
                        dict(x=torch.ones(3)),
                        dict(step=i),
                    )
        monkeypatch.setattr(Manifest, '_save', save)
        return len(count)

    few = saves(tmp_path / 'few', 300)
    many = saves(tmp_path / 'many', 3000)
    print(
        f'the list is written {few} times in 300 steps with '
        f'three checkpoints, {many} times in 3,000 with three'
    )
    assert few == many <= 12


def test_the_list_itself(tmp_path):
    "Names outside, links in the way, and contents of any kind are no way out of the folder"
    (tmp_path / 'precious').write_text('precious')
    run = tmp_path / 'run'
    (run / 'real').mkdir(parents=True)
    (run / 'link').symlink_to(tmp_path)
    for names in (
        ['../precious', 'link/precious', str(tmp_path / 'precious'), 'link'],
        ['link/.precious.tmp1'],
    ):
        (run / Manifest.NAME).write_text(
            json.dumps(dict(files=dict.fromkeys(names), folders=['link']))
        )
        manifest = Manifest(run)
        manifest.recover()
        for name in names:
            with contextlib.suppress(ValueError):
                manifest.remove(name)
                manifest.write(name).__enter__()
        assert (tmp_path / 'precious').read_text() == 'precious' and (run / 'link').is_symlink()
    for odd in (
        '[]',
        '{}',
        '{"files": 1}',
        '{"files": {"a": 1}}',
        '{"files": {"a": [1]}}',
        '{"files": {}, "folders": [1]}',
    ):
        (run / Manifest.NAME).write_text(odd)
        with pytest.raises(
            ValueError, match='is no list of files that Eva wrote|must be a JSON object'
        ):
            Manifest(run)
