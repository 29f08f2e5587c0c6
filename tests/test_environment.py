"The commands in environments of cron jobs, containers, strict interpreters and other systems"

import os
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = ('train', 'generate', 'convert', 'bench', 'plan')
C_LOCALE = dict(LC_ALL='C', LANG='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
ENVIRONMENTS = {
    'as it is': {},
    'warnings are errors': dict(PYTHONWARNINGS='error'),
    'ascii output': dict(PYTHONIOENCODING='ascii'),
    'C locale': C_LOCALE,
    'no HOME': dict(HOME=None),
    'HOME cannot be written': dict(HOME='/nonexistent'),
    'all of them': dict(C_LOCALE, PYTHONWARNINGS='error', PYTHONIOENCODING='ascii', HOME=None),
}


def run(
    *argv: object,  # what follows `python`
    environment: str = 'as it is',  # a key of ENVIRONMENTS
    cwd: Path | None = None,  # where it runs
) -> subprocess.CompletedProcess:
    "A real process with one thread, the environment's variables and the usual umask"
    changes = ENVIRONMENTS[environment] | dict(OMP_NUM_THREADS='1')
    env = {k: v for k, v in (os.environ | changes).items() if v is not None}
    return subprocess.run(
        [sys.executable, *map(str, argv)],
        env=env,
        cwd=cwd,
        umask=0o022,
        capture_output=True,
        timeout=300,
    )


def said(done: subprocess.CompletedProcess) -> str:
    return (done.stdout + done.stderr).decode('utf-8', 'backslashreplace')


@pytest.mark.parametrize('environment', ENVIRONMENTS)
@pytest.mark.parametrize('command', COMMANDS)
def test_help(command, environment):
    done = run('-m', 'eva', command, '--help', environment=environment)
    assert done.returncode == 0, said(done)
    assert f'usage: eva_{command}'.encode() in done.stdout and not done.stderr


@pytest.mark.parametrize('module', ['eva', 'eva.cli.main'])
@pytest.mark.parametrize('environment', ENVIRONMENTS)
def test_list_of_commands(module, environment):
    "`python -m eva` and `python -m eva.cli.main` say what there is, and refuse what there is not"
    done = run('-m', module, environment=environment)
    assert done.returncode == 0 and not done.stderr, said(done)
    assert all(f'    {c} ' in done.stdout.decode() for c in COMMANDS)
    done = run('-m', module, 'nonsense', environment=environment)
    assert done.returncode == 2 and b'invalid choice' in done.stderr


TINY = """
from eva.config import Config
from eva.data.tokenizer import train_tokenizer
from eva.checkpoints.pretrained import save_pretrained
from eva.model.transformer import DeepSeekV3

tok = train_tokenizer(['naïve café größer als √2'] * 9, 300)
small = dict(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64)
ranks = dict(q_lora_rank=16, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8)
experts = dict(moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2)
groups = dict(n_group=1, topk_group=1, num_nextn_predict_layers=0)
sizes = small | ranks | experts | groups
cfg = Config.from_preset('mini', vocab_size=tok.get_vocab_size(), **sizes)
save_pretrained(DeepSeekV3(cfg), 'tiny', tok)
"""


@pytest.fixture(scope='module')
def tiny(tmp_path_factory):
    "A checkpoint that is quickly trained"
    folder = tmp_path_factory.mktemp('checkpoint')
    done = run('-c', TINY, cwd=folder)
    assert done.returncode == 0, said(done)
    return folder / 'tiny'


def chain(folder: Path, tiny: Path, environment: str) -> dict[str, str]:
    "Train, generate, convert and plan; what each printed"
    text = folder / 'größe'
    text.mkdir()
    for i in range(60):
        lines = f'Zeile {i}: naïve café — {i * i} größer als √{i}\n' * 9
        text.joinpath(f'naïve {i}.txt').write_text(lines, encoding='utf-8')
    small = ('--init', tiny, '--steps', 2, '--batch_size', 1, '--seq_len', 16)
    commands = {
        'train': ('train', '--data', 'größe', *small, '--out', 'run'),
        'generate': ('generate', 'run', '--prompt', 'naïve', '--max_new_tokens', 8),
        'convert': ('convert', 'run', 'run8', '--to', 'fp8'),
        'plan': ('plan', '--out', 'plan.json'),
    }
    printed = {}
    for module, (name, argv) in zip(('eva', 'eva.cli.main') * 2, commands.items()):
        done = run('-m', module, *argv, environment=environment, cwd=folder)
        printed[name] = said(done)
        assert done.returncode == 0, (name, printed[name])
        assert 'Traceback' not in printed[name], (name, printed[name])
    return printed


@pytest.mark.parametrize(
    'environment',
    [pytest.param(e, marks=() if e == 'all of them' else pytest.mark.slow) for e in ENVIRONMENTS],
)
def test_train_generate_convert_plan(environment, tiny, tmp_path):
    printed = chain(tmp_path, tiny, environment)
    left = {p.relative_to(tmp_path).as_posix(): p for p in tmp_path.rglob('*') if p.is_file()}
    assert {'run/model.safetensors', 'run8/model.safetensors', 'plan.json'} <= set(left)
    assert 'größer' in left['run/sample.txt'].read_text(encoding='utf-8')
    assert printed['generate'].startswith(('naïve', 'na\\xefve'))
    modes = {name: oct(p.stat().st_mode & 0o777) for name, p in left.items()}
    assert {name: mode for name, mode in modes.items() if mode != '0o644'} == {}


@pytest.mark.parametrize('command', COMMANDS)
@pytest.mark.parametrize('arguments', [(), ('--help',), ('--nonsense',)], ids=' '.join)
def test_windows_is_refused_in_one_sentence(command, arguments):
    fake = 'import sys, eva.cli.main as c; sys.platform = "win32"; sys.exit(c.main(sys.argv[1:]))'
    done = run('-c', fake, command, *arguments)
    sentence = 'eva: Windows is not supported; use Linux, or the Windows Subsystem for Linux\n'
    assert (done.returncode, done.stdout, done.stderr.decode()) == (1, b'', sentence)


def test_the_readme_says_so():
    readme = Path(__file__).parents[1] / 'README.md'
    assert 'Windows is not supported' in readme.read_text(encoding='utf-8')
