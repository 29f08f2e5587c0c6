"""Mutation testing: errors made by a program, and which of them chapters and tests notice

`pip install cosmic-ray`, then `python tools/mutants.py eva/moe/router.py [MODULE…] [--sample 60]
[--seed 0] [--timeout 60] [--quick 20] [--json eva/results/mutants.json] [--again]`

Operators of cosmic-ray change one place of a module in a copy of the repository. A forked process
runs the chapter of the module there, its exported cells as they stand in the mutated module. What
survives runs against the quick chapters and tests that import the module. Of the operators of a
kind one is drawn for a place; arithmetic stays arithmetic. Left alone are annotations, docstrings,
type aliases, casts, messages, code for type checkers, and what Python cannot compile. Cells that
need more than `--heavy` seconds of the processor, or the names of such a cell, are left out.

`tests/equivalent_mutants.tsv` lists mutants that change nothing one can observe, with the reason.
`--again` runs only the mutants that the JSON file calls survivors.
"""

import argparse
import ast
import contextlib
import importlib
import json
import random
import shutil
import sys
import tempfile
from difflib import ndiff
from pathlib import Path
from typing import Any, NamedTuple

from cosmic_ray.ast import ast_nodes, get_ast  # type: ignore[import-untyped]
from cosmic_ray.mutating import mutate_code  # type: ignore[import-untyped]
from cosmic_ray.plugins import get_operator, operator_names  # type: ignore[import-untyped]
from mutant_runner import MARK, Runner

ROOT = Path(__file__).resolve().parents[1]
APART = dict(
    ReplaceBinaryOperator={'BitOr', 'BitAnd', 'BitXor', 'LShift', 'RShift'},
    ReplaceComparisonOperator={'Is', 'IsNot'},
)
EQUIVALENT = ROOT / 'tests' / 'equivalent_mutants.tsv'  # module, old, new, reason


class Mutant(NamedTuple):
    "One change of a module"

    operator: str
    line: int
    old: str  # what the change takes away, stripped
    new: str  # what it puts there
    source: str  # of the whole mutated module


def left_alone(tree: ast.AST) -> list[ast.AST]:
    "Nodes that are for readers and type checkers"
    found: list[Any] = []
    for node in ast.walk(tree):
        found += [getattr(node, name, None) for name in ('annotation', 'returns')]
        text = ast.unparse(node) if isinstance(node, (ast.Call, ast.If, ast.BinOp)) else ''
        if isinstance(node, ast.Raise) or text.startswith(('warnings.warn(', 'if TYPE_CHECKING')):
            found.append(node)
        elif text.startswith('cast('):
            found.append(node.args[0])  # type: ignore[attr-defined]
        elif isinstance(node, ast.BinOp) and text.endswith('| None'):
            found.append(node)
    return [node for node in found if node is not None]


def is_plausible(operator: str) -> bool:
    "Arithmetic for arithmetic, comparison for comparison, identity for identity"
    kind, *names = operator.split('_')
    return kind not in APART or (names[0] in APART[kind]) == (names[1] in APART[kind])


def mutants(source: str, number: int, rng: random.Random) -> tuple[int, list[Mutant]]:
    "How many places an operator can change, and mutants of some, in the order of the module"
    lines = source.splitlines()
    spans = [
        ((n.lineno, n.col_offset), (n.end_lineno, n.end_col_offset))  # type: ignore[attr-defined]
        for n in left_alone(ast.parse(source))
    ]
    places: dict[tuple, list[tuple[str, int]]] = {}
    nodes = list(ast_nodes(get_ast(source)))
    for full_name in operator_names():
        operator_class = get_operator(full_name)
        name = full_name.split('/')[-1]
        if operator_class.arguments() or not is_plausible(name):
            continue
        positions = [p for node in nodes for p in operator_class().mutation_positions(node)]
        for occurrence, ((line, column), _) in enumerate(positions):
            at = (line, len(lines[line - 1][:column].encode()))
            if not any(begin <= at < end for begin, end in spans):
                places.setdefault((*at, name.split('_')[0]), []).append((full_name, occurrence))
    drawn = [(place[0], rng.sample(ways, len(ways))) for place, ways in sorted(places.items())]
    made = (make(source, line, choices) for line, choices in spread(drawn, number, rng))
    return len(drawn), [m for m in made if m]


def make(source: str, line: int, choices: list[tuple[str, int]]) -> Mutant | None:
    "The first of the choices that Python compiles and that is another program"
    lines = source.splitlines()
    for full_name, occurrence in choices:
        name = full_name.split('/')[-1]
        if name == 'RemoveDecorator':  # that of cosmic-ray removes the comment above it too
            changed = '\n'.join(lines[: line - 1] + lines[line:])
        else:
            changed = mutate_code(source, get_operator(full_name)(), occurrence)
        with contextlib.suppress(SyntaxError):
            compile(changed, 'mutant', 'exec')
            if ast.dump(ast.parse(changed)) != ast.dump(ast.parse(source)):
                near = slice(max(0, line - 9), line + 9)
                diff = [d.strip() for d in ndiff(lines[near], changed.splitlines()[near])]
                old, new = (' '.join(d[2:].strip() for d in diff if d[:1] == s) for s in '-+')
                if name == 'RemoveDecorator':
                    new = lines[line].strip()
                    old = f'{lines[line - 1].strip()} {new}'
                return Mutant(name, line, old, new, changed)
    return None


def spread(items: list, number: int, rng: random.Random) -> list:
    "One of each of `number` stretches of equal length"
    number = min(number, len(items))
    ends = [round(i * len(items) / number) for i in range(number + 1)]
    return [items[rng.randrange(a, b)] for a, b in zip(ends, ends[1:])]


def judge(file: Path, runner: Runner, args: argparse.Namespace, before: dict) -> dict:
    "Run the mutants of a module and return what became of them"
    name = file.relative_to(ROOT / 'eva').with_suffix('').as_posix().replace('/', '.')
    source = file.read_text(encoding='utf-8')
    copy = runner.root / file.relative_to(ROOT)
    own = runner.root / MARK.findall(source)[0][0]
    if not runner.prepare(own, args.timeout):
        sys.exit(f'{own.name} fails without a mutant\n{(runner.root / "log.txt").read_text()}')
    paths = [*runner.root.glob('nbs/[0-9]*/[0-9]*.ipynb'), *runner.root.glob('tests/test_*.py')]
    users = [p for p in sorted(paths) if f'from eva.{name} import' in p.read_text('utf-8')]
    listed = [line.split('\t') for line in EQUIVALENT.read_text('utf-8').splitlines()]
    how = {k: before[k] if args.again else getattr(args, k) for k in ('seed', 'sample')}
    places, chosen = mutants(source, how['sample'], random.Random(how['seed']))
    left_out = len(runner.cells[own] or ())
    result: dict[str, Any] = dict(**how, places=places, tried=len(chosen), cells_left_out=left_out)
    result |= dict.fromkeys(('by_chapter', 'by_suite', 'timeouts'), 0)
    if args.again:
        result = before
        left = {(m['old'], m['new']) for m in before['survivors'] + before['equivalent']}
        chosen = [m for m in chosen if (m.old, m.new) in left]
    result |= dict(survivors=[], equivalent=[])
    for mutant in chosen:
        same = [name, mutant.old, mutant.new] in [row[:3] for row in listed]
        others = [p for p in users if p != own] if args.quick else []
        killer = '-'
        for path in () if same else (own, *others):
            copy.write_text(source, encoding='utf-8')
            if path != own and not runner.prepare(path, args.quick):
                continue
            copy.write_text(mutant.source, encoding='utf-8')
            passed = runner.run(path, args.timeout)
            if not passed:
                result['by_chapter' if path == own else 'by_suite'] += 1
                result['timeouts'] += passed is None
                killer = path.stem
                break
        if killer == '-':
            described = {k: v for k, v in mutant._asdict().items() if k != 'source'}
            result['equivalent' if same else 'survivors'].append(described)
        print(f'{name}:{mutant.line} {mutant.old} -> {mutant.new}: {killer}', flush=True)
    copy.write_text(source, encoding='utf-8')
    result.setdefault('left_at_first', result['tried'] - result['by_chapter'])
    return result


def main() -> None:
    p = argparse.ArgumentParser(description=(__doc__ or '').splitlines()[0])
    p.add_argument('modules', nargs='+', type=Path, help='such as eva/moe/router.py')
    p.add_argument('--sample', type=int, default=60, help='mutants of a module, spread evenly')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--timeout', type=float, default=60, help='of a mutant, processor seconds')
    p.add_argument('--quick', type=float, default=20, help='of another chapter or tests; 0: none')
    p.add_argument('--heavy', type=float, default=2, help='longest cell')
    p.add_argument('--json', type=Path, help='file to which the figures are added')
    p.add_argument('--again', action='store_true', help='run the survivors in the file only')
    args = p.parse_args()
    for name in ('sympy', 'torch._dynamo', 'transformers', 'matplotlib.pyplot', 'pytest'):
        importlib.import_module(name)
    known = json.loads(args.json.read_text()) if args.json and args.json.exists() else {}
    with tempfile.TemporaryDirectory() as tmp:
        root = Path(tmp) / 'eva'
        shutil.copytree(ROOT, root, ignore=shutil.ignore_patterns('.git', '__pycache__'))
        runner = Runner(root, args.heavy)
        for file in args.modules:
            key = file.with_suffix('').as_posix().removeprefix('eva/')
            known[key] = judge(file.resolve(), runner, args, known.get(key, {}))
            figures = {k: len(v) if isinstance(v, list) else v for k, v in known[key].items()}
            print(key, figures, *known[key]['survivors'], sep='\n', flush=True)
            if args.json:
                args.json.write_text(json.dumps(known, indent=1, sort_keys=True) + '\n')


if __name__ == '__main__':
    main()
