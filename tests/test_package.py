"The package as a user gets it: what it imports, where it comes from, what it installs"

import json
import re
import shlex
import subprocess
import sys
import tomllib
from configparser import ConfigParser
from importlib.metadata import version
from pathlib import Path

import pytest
from packaging.requirements import Requirement

root = Path(__file__).parents[1]
parser = ConfigParser(delimiters=['='])
parser.read(root / 'settings.ini', encoding='utf-8')
cfg = parser['DEFAULT']
notebooks = sorted(
    p for p in (root / 'nbs').rglob('*.ipynb') if '.ipynb_checkpoints' not in p.parts
)


def module_of(path):
    "A module's name without the package's: attention.mla"
    return '.'.join(path.relative_to(root / 'eva').with_suffix('').parts)


modules = sorted(
    m for m in map(module_of, (root / 'eva').rglob('*.py')) if not m.split('.')[-1].startswith('_')
)


def python(code):
    return subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, timeout=120)


def test_imports_nothing_that_users_do_not_have():
    "Developers' tools and pictures stay unimported until they are used"
    all_of_it = '\n'.join(f'import eva.{m}' for m in modules)
    done = python(
        f'{all_of_it}\nimport sys\nprint([m for m in ("nbdev", "IPython", '
        f'"matplotlib", "transformers", "execnb") if m in sys.modules])'
    )
    assert done.returncode == 0 and done.stdout.strip() == '[]', done.stdout + done.stderr


def exported_by(nb):
    src = [
        ''.join(c['source'])
        for c in json.loads(nb.read_text(encoding='utf-8'))['cells']
        if c['cell_type'] == 'code'
    ]
    return next((m[1] for s in src if (m := re.match(r'#\|\s*default_exp ([\w.]+)', s))), None)


def test_every_module_has_its_notebook():
    "A module whose notebook is gone would still be imported; nbdev does not notice"
    made = sorted(
        module_of(p) for p in (root / 'eva').rglob('*.py') if p.stem not in ('__init__', '_modidx')
    )
    assert made == sorted(filter(None, map(exported_by, notebooks)))


def layers_hold(config):
    "Does the contract of a configuration file hold? And what was said"
    program = Path(sys.executable).with_name('lint-imports')
    done = subprocess.run(
        [program, '--no-cache', config], cwd=root, capture_output=True, text=True, timeout=120
    )
    return done.returncode == 0, done.stdout + done.stderr


def test_modules_import_only_from_their_layer_and_below(tmp_path):
    "The contract stands in pyproject.toml; turned upside down it is broken, so imports are read"
    held, said = layers_hold(root / 'pyproject.toml')
    assert held and 'Contracts: 1 kept, 0 broken' in said, said
    contract = tomllib.loads((root / 'pyproject.toml').read_text(encoding='utf-8'))
    layers = contract['tool']['importlinter']['contracts'][0]['layers']
    packages = {p.name for p in (root / 'eva').iterdir() if (p / '__init__.py').exists()}
    named = {name.strip() for layer in layers for name in re.split('[:|]', layer)}
    assert {f'eva.{p}' for p in packages} <= named, 'a package without a layer'
    upside_down = tmp_path / 'contract.toml'
    lines = ',\n'.join(f'"{layer}"' for layer in reversed(layers))
    upside_down.write_text(
        '[tool.importlinter]\nroot_package = "eva"\n[[tool.importlinter.contracts]]\n'
        f'name = "upside down"\ntype = "layers"\nlayers = [{lines}]\n'
    )
    held, said = layers_hold(upside_down)
    assert not held and 'is not allowed to import' in said, said


def test_chapters_store_outputs_and_no_errors():
    for nb in notebooks:
        cells = [
            c
            for c in json.loads(nb.read_text(encoding='utf-8'))['cells']
            if c['cell_type'] == 'code'
        ]
        assert not any(o['output_type'] == 'error' for c in cells for o in c['outputs']), nb.name

        def only_defines(source):
            return all(
                re.match(r'(def |class |@|#|\s|$)', line) for line in ''.join(source).splitlines()
            )

        silent = [
            c['source']
            for c in cells
            if not only_defines(c['source'])
            and re.search(r'^\s*print\(', ''.join(c['source']), flags=re.M)
            and not c['outputs']
            and not ''.join(c['source']).startswith('#|')
        ]
        assert not silent, (nb.name, silent)


def test_readme_is_the_index():
    assert subprocess.run([sys.executable, root / 'tools' / 'readme.py', '--check']).returncode == 0


@pytest.mark.parametrize('command', [o.split('=')[0] for o in cfg['console_scripts'].split()])
def test_commands_are_installed_and_answer(command):
    exe = Path(sys.executable).with_name(command)
    assert exe.exists()
    done = subprocess.run([exe, '--help'], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and command in done.stdout
    assert (
        subprocess.run([exe, '--nonsense'], capture_output=True, text=True, timeout=60).returncode
        == 2
    )


LISTS = sorted(k for k in cfg if k.endswith('requirements'))


@pytest.mark.parametrize('name', LISTS)
def test_every_dependency_has_a_floor(name):
    "A name alone would accept a release from years ago; what is tested lies in the bounds"
    for wanted in map(Requirement, shlex.split(cfg[name])):
        assert any(s.operator in ('>=', '==') for s in wanted.specifier), f'{name}: {wanted}'
        if name == 'requirements':
            assert wanted.specifier.contains(version(wanted.name), prereleases=True), wanted


def test_templates_are_rendered_by_a_safe_release():
    "jinja2 3.1.5 and older let a template out of the sandbox"
    jinja2 = next(
        r for r in map(Requirement, shlex.split(cfg['requirements'])) if r.name == 'jinja2'
    )
    assert not jinja2.specifier.contains('3.1.5') and jinja2.specifier.contains('3.1.6')


def test_commands_have_one_entry():
    from eva.cli.main import COMMANDS

    assert dict(o.split('=') for o in cfg['console_scripts'].split()) == {
        f'eva_{c}': 'eva.cli.main:main' for c in COMMANDS
    }


def test_files_that_builders_need():
    "The three files agree: pyproject.toml names the builder and nothing that settings.ini says"
    project = tomllib.loads((root / 'pyproject.toml').read_text(encoding='utf-8'))
    assert (
        set(project) == {'build-system', 'tool'}
        and project['build-system']['build-backend'] == 'setuptools.build_meta'
    )
    assert (
        cfg['update_pyproject'] == 'False'
        and cfg['lib_name'] == 'eva-deepseek'
        and cfg['lib_path'] == 'eva'
    )
    assert (root / 'eva' / 'py.typed').exists()


def test_extras():
    assert 'transformer-engine' in cfg['te_requirements'] and 'datasets' in cfg['data_requirements']
    assert 'torch>=2.11,<2.14' in cfg['requirements'] and 'nbdev==2.4.14' in cfg['dev_requirements']
