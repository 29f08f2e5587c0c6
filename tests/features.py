"""What each rank of tests/test_features_by_layout.py runs: as tests/ranks.py, and three things more

A case with `wide` computes FP8 with float64 around the rounded values. Layouts can then be compared
to the last digits: only the rounding of FP8 itself is left, which is the same everywhere. A case
with `plant` has an error, which the comparison must find. With `overflow` in place of `train` a
gradient of one rank is infinite in the second step.
"""

import json
import math
from contextlib import ExitStack
from unittest.mock import patch

import ranks
import torch
import torch.distributed as dist

import eva.distributed.expert_parallel as expert_parallel
import eva.distributed.pipeline as pipeline
import eva.distributed.stage_sharding as stage_sharding
from eva.distributed.parallel import Parallel
from eva.training.config import DTYPES

scatter_rows = stage_sharding.scatter_rows
PLANTS = dict(
    sum_left_out=(Parallel, 'sum', lambda self, x: x),
    loads_left_out=(Parallel, 'loads', lambda self, meter: None),
    wrong_group=(Parallel, '_both_ends', lambda self: self.data.get_group()),
    histories_apart=(Parallel, 'largest', lambda self, x: x),
    mtp_rounded_down=(Parallel, 'local_count', lambda self, ahead: ahead // self.ranks),
    documents_seen=(pipeline, 'document_mask_ids', lambda *args: None),
    mixed_tiles=(
        expert_parallel,
        'senders',
        lambda received, row: torch.zeros_like(row),
    ),
    scattered_twice=(
        stage_sharding,
        'scatter_rows',
        lambda grads, group: [2 * part for part in scatter_rows(grads, group)],
    ),
)


def set_wide(wide):
    "Choose the type of the model's weights with precision fp8"
    DTYPES['fp8'] = torch.float64 if wide else torch.bfloat16


def overflow(out, case):
    "Train with an infinite gradient on the second rank in the second step; what each rank saw"
    t = ranks.trainer(
        out / case['name'],
        parallel=Parallel(device=ranks.DEVICE, **case['parallel']),
        **case['run'],
    )
    accumulate = t.opt.accumulate_grads

    def spoilt():
        accumulate()
        if t.step == 1 and dist.get_rank() == 1:
            next(iter(t.opt.masters.values())).grad.view(-1)[0] = math.inf

    t.opt.accumulate_grads = spoilt
    rows = []
    scales = []
    t.fit(lambda row: (rows.append(row), scales.append(t.scaler.get_scale())))
    everyone = [None] * dist.get_world_size()
    seen = dict(scales=scales, skipped=[r.get('skipped', False) for r in rows], bad=t.bad_row)
    dist.all_gather_object(everyone, seen)
    if dist.get_rank() == 0:
        (out / f'{case["name"]}.json').write_text(json.dumps(everyone))


def run(out, case):
    set_wide(case.get('wide'))
    with ExitStack() as stack:
        if case.get('plant'):
            stack.enter_context(patch.object(*PLANTS[case['plant']]))
        (overflow if case['do'] == 'overflow' else ranks.run)(out, case)


if __name__ == '__main__':
    ranks.run_cases(run)
