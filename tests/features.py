"""What each rank of tests/test_features_by_layout.py runs: as tests/ranks.py, with wide FP8

A case with `wide` computes FP8 with float64 around the rounded values. Layouts can then be compared
to the last digits: only the rounding of FP8 itself is left, which is the same everywhere.
"""

import json
import os
import sys
from pathlib import Path

import ranks
import torch
import torch.distributed as dist

from eva.distributed.expert_parallel import shutdown
from eva.training.config import DTYPES


def set_wide(wide):
    "Choose the type of the model's weights with precision fp8"
    DTYPES['fp8'] = torch.float64 if wide else torch.bfloat16


if __name__ == '__main__':
    torch.set_num_threads(1)
    dist.init_process_group('gloo')
    for raw in sys.argv[2:]:
        case = json.loads(raw)
        set_wide(case.get('wide'))
        ranks.run(Path(sys.argv[1]), case)
    shutdown()
    os._exit(0)  # see tests/ranks.py
