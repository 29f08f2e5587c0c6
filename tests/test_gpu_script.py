"The script for a GPU machine runs here too, small, and never into the file of real figures"

import json
import subprocess
import sys
from pathlib import Path

script = Path(__file__).parents[1] / 'tools' / 'gpu.py'


def run(*args):
    return subprocess.run(
        [sys.executable, str(script), *map(str, args)], capture_output=True, text=True
    )


def test_runs_on_a_cpu(tmp_path):
    done = run('--device', 'cpu', '--small', '--out', tmp_path / 'figures.json')
    assert done.returncode == 0, done.stderr
    r = json.loads((tmp_path / 'figures.json').read_text())
    assert (
        'CPU' in r['machine'] and r['peak_fp8_tflops'] is None and 'Hopper' in r['absent']['native']
    )
    assert (
        all(v == 0 for k, v in r['agreement'].items() if k.endswith('differ'))
        and r['agreement']['tensor: product, dB against emulation'] > 40
    )
    assert {'dense, fp32', 'dense, emulate', 'experts, bf16', 'experts, emulate'} <= set(r['steps'])


def test_refuses_to_mix(tmp_path):
    done = run('--device', 'cpu', '--small')
    assert done.returncode == 1 and 'do not belong into the file of a GPU' in done.stderr


def test_the_formula_agrees_with_the_stored_bytes_of_a_gpu():
    "Memory that CUDA's allocator gave out, against the formula of today"
    from test_cuda_ranks import MEMORY, compared

    from eva.planner.states import Machine

    path = script.parents[1] / 'eva' / 'results' / 'gpu_layouts.json'
    stored: dict = {}
    for row in json.loads(path.read_text(encoding='utf-8'))['memory']:
        stored.setdefault(row['name'], []).append(row['measured'])
    h200 = Machine('cuda', fast_bf16=True, onednn=False, emulates_fp8=False)
    for name, (number, _, _) in MEMORY.items():
        if name in stored:
            every = [m for m in stored[name] for _ in range(number // len(stored[name]))]
            for row in compared(name, every, h200):
                assert abs(row['formula'] / row['measured'] - 1) < 0.05, row
    assert len(stored) == 12
