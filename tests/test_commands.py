"Commands as a shell starts them: killed without a warning, resumed, and resumed where nothing is"

import contextlib
import io
import json
import os
import subprocess
import sys
import time

import pytest
import torch
from safetensors import SafetensorError
from sizes import TINY

from eva.checkpoints.files import SafetensorsFolder
from eva.cli.common import guarded
from eva.cli.convert import eva_convert
from eva.cli.field_options import CHOICES as FIELD_WORDS
from eva.cli.field_options import MODEL_ARGUMENTS, TRAIN_CONFIG_ARGUMENTS
from eva.cli.train import eva_train
from eva.cli.train_arguments import check_arguments_again, started_with, train_parser
from eva.config import Config
from eva.training.checkpointing import checkpoints, read_metrics
from eva.training.recovery import DivergedError

SMALL = [
    '--steps',
    '14',
    '--seq_len',
    '32',
    '--batch_size',
    '2',
    '--vocab_size',
    '300',
    '--precision',
    'fp32',
    '--save_every',
    '2',
    '--fim',
    '0.5',
    '--data',
    'lines',
]


def command(*argv):
    out = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = eva_train(list(argv))
    assert code == 0, err.getvalue()
    return out.getvalue()


@pytest.mark.skipif(os.name != 'posix', reason='signals of POSIX')
def test_a_streamed_run_is_killed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'lines').mkdir()
    (tmp_path / 'lines' / 'a.jsonl').write_text(
        ''.join(
            json.dumps(dict(text=f'def f{i}(x):\n    return x + {i}\n' * 6)) + '\n'
            for i in range(200)
        )
    )
    assert 'nothing to resume in whole: starting at the beginning' in command(
        '--out', 'whole', *SMALL, '--resume'
    )
    p = subprocess.Popen(
        [
            sys.executable,
            '-c',
            'from eva.cli.train import eva_train; raise SystemExit(eva_train())',
            *SMALL,
            '--out',
            'killed',
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while p.poll() is None and not any(
        int(o.name[5:]) >= 4 for o in checkpoints(tmp_path / 'killed' / 'checkpoints')
    ):
        time.sleep(0.01)
    p.kill()
    p.wait()  # no time to save anything
    assert 'going on from step' in command('--out', 'killed', '--resume')
    assert (tmp_path / 'killed' / 'model.safetensors').read_bytes() == (
        tmp_path / 'whole' / 'model.safetensors'
    ).read_bytes()


def test_a_run_starts_from_eight_bits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / 'lines').mkdir()
    (tmp_path / 'lines' / 'a.jsonl').write_text(
        ''.join(
            json.dumps(dict(text=f'def f{i}(x):\n    return x + {i}\n' * 6)) + '\n'
            for i in range(200)
        )
    )
    command('--out', 'first', *SMALL, '--steps', '6')
    assert eva_convert(['first', 'eight', '--to', 'fp8']) == 0
    assert (
        SafetensorsFolder(tmp_path / 'eight').shape('model.layers.0.mlp.down_proj.weight')[0]
        == torch.float8_e4m3fn
    )
    out = command(
        '--init',
        'eight',
        '--data',
        'lines',
        '--out',
        'second',
        '--steps',
        '3',
        '--seq_len',
        '32',
        '--batch_size',
        '2',
        '--precision',
        'fp32',
    )
    assert 'everything is in second' in out
    first, second = (read_metrics(tmp_path / o / 'metrics.jsonl') for o in ('first', 'second'))
    assert second[0]['loss'] < first[0]['loss']


# Every option again at --resume: as it was, it is accepted; another value is refused by name

MAY_CHANGE = {
    'out',
    'resume',
    'check',
    'config',
    'print_config',
    'device',
    'gpus',
    'per_node',
    'ep',
    'pp',
    'tp',
    'cp',
    'schedule',
    'fsdp',
    'recompute',
    'prefetch',
    'log_to',
    'profile',
    'peak_tflops',
    'minutes',
}  # where, on how many processes, and what is seen of it
STARTED = dict(
    preset='mini',
    data='lines',
    text_column='body',
    strict=True,
    steps=2,
    precision='fp8',
    recipe='deepseek_v3',
    vocab_size=290,
    seq_len=16,
    batch_size=2,
    lr=0.01,
    muon_lr=0.03,
    mtp_batch_ratio=0.5,
    fim=0.5,
    add_eos_token=True,
    mask_documents=True,
    on_spike='skip',
    on_collapse='stop',
    save_every=1,
    async_save=True,
    seed=3,
)
OTHERS = dict(
    preset='v3',
    data='stdlib',
    text_column='title',
    strict=True,
    steps=3,
    precision='fp16',
    recipe='mx',
    vocab_size=291,
    seq_len=32,
    batch_size=4,
    lr=0.04,
    muon_lr=0.04,
    mtp_batch_ratio=0.75,
    fim=0.25,
    add_eos_token=False,
    mask_documents=True,
    on_spike='stop',
    on_collapse='rewind',
    save_every=2,
    async_save=True,
    seed=4,
    init='given',
    sparse='k=4',
)
DEFAULTS = dict(
    preset='mini',
    recipe='block_pow2',
    text_column='text',
    fim=0.0,
    add_eos_token=True,
    mtp_batch_ratio=0.25,
    on_spike='rewind',
    on_collapse='log',
    seed=0,
)


def generated(run):
    "Fields of the model and of the settings of a run without an option in STARTED, by name"
    about = json.loads((run / 'run.json').read_text())
    names = {*MODEL_ARGUMENTS, *TRAIN_CONFIG_ARGUMENTS} - STARTED.keys()
    return {name: started_with(name, about) for name in sorted(names)}


def changed(name, value):
    "Another value of a field"
    if isinstance(value, bool):
        return not value
    if name in FIELD_WORDS:
        return next(word for word in FIELD_WORDS[name] if word != value)
    if isinstance(value, (int, float)):
        return value + 1
    others = dict(model_type='deepseek_v2', rope_scaling='{"type": "yarn"}', indexer_types='full')
    return others.get(name, 7)


def flags(options):
    "Options as they stand on a command line"
    return [
        word
        for name, value in options.items()
        for word in (
            [f'--{"" if value else "no-"}{name}']
            if isinstance(value, bool)
            else [f'--{name}', json.dumps(value) if isinstance(value, dict) else str(value)]
        )
    ]


def resumed(out, **options):
    "Exit code of a resumed run, what was printed, what went to standard error"
    shown = io.StringIO()
    err = io.StringIO()
    with contextlib.redirect_stdout(shown), contextlib.redirect_stderr(err):
        code = eva_train(['--out', out, '--resume', *flags(options)])
    return code, shown.getvalue(), err.getvalue()


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    "Runs that were started with every option, with as few as possible, and from a checkpoint"
    root = tmp_path_factory.mktemp('finished')
    preset = Config.from_preset
    small = {
        name: STARTED[name] for name in ('steps', 'seq_len', 'batch_size', 'precision', 'data')
    }
    with contextlib.chdir(root), pytest.MonkeyPatch.context() as patch:
        patch.setattr(Config, 'from_preset', lambda name, **kw: preset(name, **TINY | kw))
        (root / 'lines').mkdir()
        rows = [f'def f{i}(x):\n    return x + {i}\n' * 6 for i in range(200)]
        (root / 'lines' / 'a.jsonl').write_text(
            ''.join(json.dumps(dict(body=r, text=r)) + '\n' for r in rows)
        )
        command('--out', 'given', *flags(STARTED))
        command('--out', 'plain', *flags(small))
        command('--out', 'begun', *flags(small), '--init', 'given')
    return root


def test_each_option_again(finished, monkeypatch):
    monkeypatch.chdir(finished)
    options = {action.dest for action in train_parser()._actions} - {'help'}
    fields = generated(finished / 'given')
    assert options == STARTED.keys() | {'init', 'sparse', 'model'} | MAY_CHANGE | fields.keys(), (
        'say here whether a new option may change when a run is resumed'
    )
    for name, value in STARTED.items():
        code, out, err = resumed('given', **{name: value})
        assert code == 0 and 'this run is finished' in out and not err, (name, err)
    for name, value in (('init', 'given'), ('init', finished / 'given'), *DEFAULTS.items()):
        run = 'begun' if name == 'init' else 'plain'
        code, out, err = resumed(run, **{name: value})
        assert code == 0 and 'this run is finished' in out and not err, (name, err)
    assert resumed('given', **STARTED)[0] == 0
    fields = generated(finished / 'given')
    assert resumed('given', **STARTED, **fields)[0] == 0  # the others all at once
    for name, value in dict(device='cpu', schedule='zbv', fsdp=True, recompute=True).items():
        assert resumed('given', **{name: value})[0] == 0, name


def test_each_option_changed(finished, monkeypatch):
    monkeypatch.chdir(finished)
    assert OTHERS.keys() == STARTED.keys() | {'init', 'sparse'}
    before = {p: p.stat().st_mtime_ns for p in finished.rglob('*') if p.is_file()}
    for name, value in OTHERS.items():
        for run in ('given', 'plain', 'begun'):
            if (
                value == (STARTED if run == 'given' else DEFAULTS).get(name)
                or run == 'begun'
                and name == 'init'
            ):
                continue
            code, _, err = resumed(run, **{name: value})
            assert (
                code == 2
                and err.count('\n') == 1
                and f'a run goes on as it was started, and not with --{name} ' in err
            ), (run, name, err)
    about = json.loads((finished / 'given' / 'run.json').read_text())
    for name, value in generated(finished / 'given').items():
        args = train_parser().parse_args(flags({name: changed(name, value)}))
        with pytest.raises(ValueError, match=f'and not with --{name} '):
            check_arguments_again(finished / 'given', args, about)
    code, _, err = resumed('given', hidden_size=32, weight_decay=0.3)
    assert code == 2 and 'not with --hidden_size 32 (was: 16), --weight_decay 0.3 (was: 0.1)' in err
    code, _, err = resumed('given', model='given')
    assert code == 2 and '--model' in err
    code, _, err = resumed('begun', init='plain')
    assert code == 2 and f'--init {finished / "plain"} (was: {finished / "given"})' in err
    assert {p: p.stat().st_mtime_ns for p in finished.rglob('*') if p.is_file()} == before


@pytest.mark.parametrize(
    'error, code',
    [
        (ValueError('--steps 0: must be positive'), 2),
        (OSError('no space left'), 1),
        (FloatingPointError('layer 1: not finite'), 1),
        (DivergedError('step 9: went wrong three times'), 1),
        (SafetensorError('header too large'), 1),
        (KeyboardInterrupt(), 130),
        (BrokenPipeError(), 0),
    ],
    ids=lambda o: type(o).__name__ if isinstance(o, BaseException) else str(o),
)
def test_what_goes_wrong_is_said_in_one_sentence(error, code, capsys):
    def work():
        raise error

    assert guarded('eva_train', work) == code
    said = capsys.readouterr().err
    assert said == {130: '\neva_train: interrupted\n', 0: ''}.get(code, f'eva_train: {error}\n')


def test_our_own_mistakes_keep_their_traceback():
    def work():
        raise KeyError('layers')

    with pytest.raises(KeyError):
        guarded('eva_train', work)
