"""Layouts on GPUs: the result of one process, and memory by formula: `pytest --flags cuda`

Ranks use NCCL. They need a GPU each, or a library that lets them share one (NCCL 2.30 or newer).
"""

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial

import pytest
import ranks
import test_features_by_layout as table
import torch
from test_distributed import ENV, HERE
from torch.torch_version import TorchVersion

from eva.cli.train_memory import one_process
from eva.config import Config
from eva.distributed.expert_parallel import torchrun
from eva.planner.peak import peak_memory
from eva.planner.states import Machine
from eva.training.config import TrainConfig

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device'),
]
NATIVE = dict(dtype='float32', precision='fp8', recipe='block_pow2')  # by PyTorch's scaled product
PRECISIONS = ('float64', 'float32', 'bf16', 'native')
# Sums of a GPU have no fixed order where several threads add to one value
BOUNDS = dict(
    float64=dict(loss=1e-8, gradient=1e-10),
    float32=table.SINGLE,
    bf16=table.ROUNDED,
    native=table.FIRST_STEP,
)
MODEL = dict(
    vocab_size=16384,
    hidden_size=1024,
    num_hidden_layers=6,
    num_attention_heads=16,
    q_lora_rank=384,
    kv_lora_rank=256,
    intermediate_size=2816,
    moe_intermediate_size=704,
)  # libraries' own buffers are small beside it
TRAIN = dict(batch_size=16, micro_batch=8, seq_len=1024, mtp_batch_ratio=1.0)
MEMORY: dict[str, tuple[int, dict, dict]] = {
    'fp32': (1, {}, {}),
    'bf16': (1, {}, dict(precision='bf16')),
    'fp8': (1, {}, dict(precision='fp8')),
    'fsdp, bf16': (2, dict(fsdp=True), dict(precision='bf16')),
    'copies, bf16': (2, dict(fsdp=False), dict(precision='bf16')),
    'ep, bf16': (2, dict(ep=2, fsdp=False), dict(precision='bf16')),
    'ep, fp8': (2, dict(ep=2, fsdp=False), dict(precision='fp8')),
    'ep and fsdp, recomputed, bf16': (2, dict(ep=2, recompute=True), dict(precision='bf16')),
    'tp, bf16': (2, dict(tp=2), dict(precision='bf16')),
    'cp, bf16': (2, dict(cp=2), dict(precision='bf16')),
    '1f1b, bf16': (2, dict(pp=2), dict(precision='bf16', micro_batch=4)),
    '1f1b, fp8': (2, dict(pp=2), dict(precision='fp8', micro_batch=4)),
    'zbv, bf16': (2, dict(pp=2, schedule='zbv'), dict(precision='bf16', micro_batch=4)),
    'dualpipev, bf16': (
        2,
        dict(pp=2, schedule='dualpipev'),
        dict(precision='bf16', micro_batch=4),
    ),
}


def whole_passes(layout):
    "Can this PyTorch run the schedule? Some releases do not split the backward pass of experts"
    return layout.get('schedule', '1f1b') == '1f1b' or TorchVersion(torch.__version__) >= '2.13'


def layouts():
    "Layouts of two ranks"
    return [name for name, layout in table.TWO.items() if whole_passes(layout)]


def rows():
    "Each layout in each precision, with features in turn"
    features = [f for f in table.FEATURES if f != 'warm_up']
    out = []
    for i, layout in enumerate(layouts()):
        for j, precision in enumerate(PRECISIONS):
            if precision != 'native' or layout != 'two_tp':
                out.append((layout, precision, features[(i + j) % len(features)]))
    return out


def equality(folder, steps=6):
    "How far ranks on GPUs are from one process on a GPU: rows of names and differences"
    table.PRECISIONS['native'] = NATIVE
    ranks.DEVICE = 'cuda'
    ENV['EVA_TEST_DEVICE'] = 'cuda'
    # communicators of a process are not all given back, so each layout has processes of its own
    with ThreadPoolExecutor(4) as pool:
        work = [pool.submit(trained, folder / name, name, steps) for name in layouts()]
    known: dict = {}
    out = []
    for job in work:
        cases, found = job.result()
        if 'error' in found:
            out.append(dict(name=cases[0]['key'][0], error=found['error']))
            continue
        for c in cases:
            same = {k: v for k, v in c['run'].items() if k != 'eval_every'}
            like = json.dumps(same)
            if like not in known:
                known[like] = table.alone(folder, c)
            off = table.differences(folder / c['key'][0], c, found[c['name']], *known[like])
            out.append(dict(name=c['name'], precision=c['key'][1]) | off)
            print(f'{c["name"]:44}', *(f'{k} {v:.0e}' for k, v in off.items()))
    return out


def trained(folder, layout, steps):
    "The cases of a layout, and what two ranks found"
    cases = [table.case(*row, steps=steps) | dict(wide=False) for row in rows() if row[0] == layout]
    if layout == 'two_ep':
        planted = table.case('two_ep', 'float64', 'plain', steps=4)
        cases.append(planted | dict(name='loads_left_out', plant='loads_left_out'))
    try:
        return cases, table.together(2, folder, cases, timeout=400)
    except RuntimeError as e:
        return cases, dict(error=str(e))


def memory(folder):
    "Peak of a step by formula and by CUDA's allocator, in bytes: rows of a layout and stage"
    names = [name for name, (_, layout, _) in MEMORY.items() if whole_passes(layout)]
    with ThreadPoolExecutor(3) as pool:
        return sum(pool.map(partial(fullest, folder), names), [])


def case_of(name):
    "A layout for tests/cuda_memory.py"
    _, layout, train = MEMORY[name]
    return dict(name=name, model=MODEL, train=TRAIN | train, parallel=layout)


def fullest(folder, name):
    "Rows of one layout"
    own = folder / name.replace(', ', '-').replace(' ', '-')
    own.mkdir()
    cases = json.dumps([case_of(name)])
    number = MEMORY[name][0]
    try:
        found = torchrun(HERE / 'cuda_memory.py', own, cases, ranks=number, env=ENV, timeout=400)
    except RuntimeError as e:
        return [dict(name=name, error=str(e))]
    return compared(name, found[0], Machine.here('cuda'))


def compared(name, every, machine):
    "Rows of one layout: the fullest rank of each stage"
    case = case_of(name)
    number = len(every)
    settings = TrainConfig(steps=10, **case['train'])
    given = dict(fsdp='pp' not in case['parallel'] and number > 1) | case['parallel']
    given['recompute'] = 'full' if given.get('recompute') else 'none'
    lay = replace(one_process(settings), gpus=number, per_node=number, **given)
    need = peak_memory(Config.from_preset('mini', **case['model']), settings, lay, machine)
    each = number // len(need)
    out = []
    for stage, parts in enumerate(need):
        measured = max(every[stage * each : (stage + 1) * each])
        row = dict(name=name, stage=stage, measured=measured, parts=parts)
        out.append(row | dict(formula=sum(parts.values())))
        print(f'{name:30} {stage}  {sum(parts.values()) / measured:.3f}', parts)
    return out


def test_layouts_are_one_process(tmp_path):
    found = equality(tmp_path)
    assert not [row for row in found if 'error' in row]
    wrong = [
        row
        for row in found
        for key, bound in (('loss', 'loss'), ('val_loss', 'loss'), ('gradient', 'gradient'))
        if row[key] > BOUNDS[row['precision']][bound]
    ]
    assert {row['name'] for row in wrong} == {'loads_left_out'}


def test_peak_memory(tmp_path):
    "The formula agrees with the allocator within 5 %"
    found = memory(tmp_path)
    assert not [row for row in found if 'error' in row]
    off = {(row['name'], row['stage']): row['formula'] / row['measured'] - 1 for row in found}
    assert max(abs(o) for o in off.values()) < 0.05, off
