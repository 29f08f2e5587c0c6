"""Build the distributions and try the wheel alone, away from the repository

`python tools/check_wheel.py [FOLDER]`
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
import venv
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = 'eva-deepseek'
COMMANDS = ('eva_train', 'eva_generate', 'eva_convert', 'eva_bench', 'eva_plan', 'eva_serve')
# One compares with transformers, one writes files of weights, one reads the results inside the
# package.
CHAPTERS = ('02_attention/01_rope', '09_checkpoints/03_files', '14_findings/04_when')
SMALL_RUN = [
    '--data',
    'synthetic:copy',
    '--steps',
    '2',
    '--batch_size',
    '1',
    '--seq_len',
    '32',
    '--out',
    'runs/mini',
]
RUN_BLOCKS = """
import contextlib, io, json, sys
scope = {}
for code, wanted in json.load(sys.stdin):
    shown = io.StringIO()
    with contextlib.redirect_stdout(shown):
        exec(code, scope)
    if wanted is not None and shown.getvalue().rstrip() != wanted.rstrip():
        sys.exit(f'{code}\\nprinted\\n{shown.getvalue()}\\nand the README says\\n{wanted}')
"""


def run(*command: object, cwd: Path | None = None, given: str | None = None) -> str:
    "Run a command without the variables that lead to other packages, and return what it printed"
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'VIRTUAL_ENV')}
    done = subprocess.run(
        [str(c) for c in command], cwd=cwd, env=env, input=given, capture_output=True, text=True
    )
    if done.returncode:
        line = ' '.join(map(str, command))
        sys.exit(f'{line}: exit code {done.returncode}\n{done.stdout[-3000:]}{done.stderr[-6000:]}')
    return done.stdout


def build(folder: Path) -> Path:
    "Build the source distribution, and the wheel from it; return the wheel"
    run(sys.executable, '-m', 'build', '--outdir', folder, ROOT)
    (sdist,) = folder.glob('*.tar.gz')
    (wheel,) = folder.glob('*.whl')
    print(f'built {sdist.name} ({sdist.stat().st_size:,} bytes) and {wheel.name} from it')
    return wheel


def needed(
    requirements: list[Requirement],  # what is asked for, with extras
) -> dict[str, Distribution]:  # name -> what is installed here
    "Return the installed distributions that the requirements lead to, and nothing else"
    found = {}
    seen = set()
    open_ = list(requirements)
    while open_:
        wanted = open_.pop()
        name = canonicalize_name(wanted.name)
        if (name, frozenset(wanted.extras)) in seen:
            continue
        seen.add((name, frozenset(wanted.extras)))
        found[name] = distribution(name)
        for requirement in map(Requirement, found[name].requires or ()):
            extras = wanted.extras or {''}
            marker = requirement.marker
            if marker is None or any(marker.evaluate({'extra': extra}) for extra in extras):
                open_.append(requirement)
    return found


def link(source: Path, target: Path) -> None:
    if not target.exists() and source.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        target.symlink_to(source)


def link_distribution(found: Distribution, prefix: Path, site_packages: Path) -> None:
    "Make one installed distribution visible in another environment, without copying it"
    here = Path(found.locate_file('')).resolve()
    for file in found.files or ():
        if file.parts[0] != '..':
            if file.parts[0] != '__pycache__':
                link(here / file.parts[0], site_packages / file.parts[0])
            continue
        # what Jupyter keeps beside the packages: kernels and templates
        source = Path(os.path.normpath(here / file))
        for folder in ('share', 'etc'):
            if source.is_relative_to(here.parents[2] / folder):
                link(source, prefix / source.relative_to(here.parents[2]))


def environment(folder: Path, wheel: Path) -> Path:
    "Make an environment of the wheel and of what it and the chapters need; return its Python"
    venv.create(folder, symlinks=True)
    python = folder / 'bin' / 'python'
    code = 'import sysconfig; print(sysconfig.get_path("purelib"))'
    site_packages = Path(run(python, '-c', code).strip())
    pip = (sys.executable, '-m', 'pip', '--python', python)
    run(*pip, 'install', '-q', '--no-index', '--no-deps', wheel)
    (metadata,) = site_packages.glob('eva_deepseek-*.dist-info')
    lines = Distribution.at(metadata).requires or ()
    asked = [
        r
        for r in map(Requirement, lines)
        if r.marker is None or r.marker.evaluate({'extra': 'course'})
    ]
    found = needed(asked)
    for one in found.values():
        link_distribution(one, folder, site_packages)
    run(*pip, 'check')
    print(f'an environment of the wheel and the {len(found)} distributions that it leads to')
    return python


def check_contents(python: Path, away: Path) -> None:
    "The package is the wheel's, it is typed, and it has the results that the README reads"
    code = """
import eva, importlib.util, json
from importlib.resources import files
names = ('py.typed', 'web/chat.html', 'web/chat.css', 'web/chat.js',
         'results/bench_cpu.json', 'results/claims.json')
print(json.dumps([eva.__file__, importlib.util.find_spec('nbdev') is None,
                  [n for n in names if not (files('eva')/n).is_file()]]))
"""
    where, without_nbdev, missing = json.loads(run(python, '-c', code, cwd=away))
    assert Path(where).is_relative_to(python.parents[1]), where
    assert without_nbdev and not missing, (without_nbdev, missing)


def check_description(wheel_python: Path, away: Path) -> None:
    "The package index shows the README without the files around it: every link there is absolute"
    code = f'from importlib.metadata import metadata; print(metadata({PACKAGE!r}).get_payload())'
    text = run(wheel_python, '-c', code, cwd=away)
    links = re.findall(r'\]\(([^)\s]+)\)', text)
    relative = [to for to in links if not re.match(r'https?://|#', to)]
    assert len(links) > 5 and not relative, relative
    print(f'{len(links)} links of the long description are absolute')


def check_commands(python: Path, away: Path) -> None:
    "Every command explains itself, and a small run is trained and asked"
    for command in COMMANDS:
        assert f'usage: {command}' in run(python.with_name(command), '--help', cwd=away)
    assert 'plan' in run(python, '-m', 'eva', cwd=away)
    run(python.with_name('eva_train'), *SMALL_RUN, cwd=away)
    some = ('--prompt', 's1 s2', '--max_new_tokens', 4)
    run(python.with_name('eva_generate'), 'runs/mini', *some, cwd=away)
    print(
        f'{len(COMMANDS)} commands explain themselves, and a run of two steps is trained and asked'
    )


def check_readme(python: Path, away: Path) -> None:
    "The README's Python code runs and prints what the README shows"
    readme = (ROOT / 'README.md').read_text(encoding='utf-8')
    blocks = re.findall(r'```python\n(.*?)```(?:\n\n```\n(.*?)```)?', readme, flags=re.S)
    given = json.dumps([(code, shown or None) for code, shown in blocks])
    run(python, '-c', RUN_BLOCKS, cwd=away, given=given)
    print(f"the README's {len(blocks)} blocks of Python run and print what it shows")


def check_chapters(python: Path, away: Path) -> None:
    "Chapters run from top to bottom in a real kernel, in a folder that holds nothing else"
    for name in CHAPTERS:
        folder = away / name
        folder.mkdir(parents=True)
        chapter = folder / 'chapter.ipynb'
        chapter.write_bytes((ROOT / 'nbs' / f'{name}.ipynb').read_bytes())
        run(python, '-m', 'nbconvert', '--to', 'notebook', '--execute', '--inplace', chapter)
        print(f'{name}: run in a kernel', flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('folder', nargs='?', type=Path, help='an empty folder (default: temporary)')
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = args.folder or Path(temporary)
        away = folder / 'away'
        away.mkdir(parents=True)
        python = environment(folder / 'environment', build(folder / 'dist'))
        for check in (
            check_contents,
            check_description,
            check_commands,
            check_readme,
            check_chapters,
        ):
            check(python, away)


if __name__ == '__main__':
    main()
