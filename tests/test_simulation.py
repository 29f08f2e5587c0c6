"All ranks of the published layout, simulated: they fit together, and the planner has their sizes"

import math
import multiprocessing
import os
from functools import cache

import pytest

from eva.config import Config
from eva.distributed.simulation import check_plans, simulate_ranks
from eva.model.initialization import meta_model
from eva.planner.memory import expected_devices
from eva.training.config import TrainConfig

V3 = Config.from_preset('v3')
SETTINGS = TrainConfig(batch_size=15360, micro_batch=1, seq_len=4096, precision='bf16', muon_lr=0.0)
LAYOUT = dict(ep=64, pp=16, fsdp=True, schedule='dualpipev')
WORLD = 2048
AWAY = round(expected_devices(V3, 64) * 63 / 64 * SETTINGS.seq_len)


@cache
def whole():
    return meta_model(V3)


def even_rows(name, passes):
    return AWAY * passes, AWAY * passes


def some_ranks(ranks):
    return list(simulate_ranks(whole(), SETTINGS, WORLD, even_rows, ranks, **LAYOUT))


@pytest.mark.slow
def test_all_ranks_of_the_published_layout():
    parts = [range(i, WORLD, 64) for i in range(64)]
    with multiprocessing.get_context('spawn').Pool(os.cpu_count()) as pool:
        plans = [plan for part in pool.imap_unordered(some_ranks, parts) for plan in part]
    plans.sort(key=lambda plan: plan.rank)
    assert [plan.rank for plan in plans] == list(range(WORLD))
    check_plans(plans, whole())
    # every weight is on one rank, or copied to both ends of the pipeline or a group of routers
    held = {}
    for plan in plans:
        for name, box in plan.boxes.items():
            held.setdefault(name, set()).add(box)
    numbers = {n: sum(math.prod(b.sizes) for b in boxes) for n, boxes in held.items()}
    weights = {n: p.numel() for n, p in whole().named_parameters()}
    assert {n: numbers[n] for n in weights} == weights
