"All ranks of the published layout, simulated: they fit together, and the planner has their sizes"

import math
import multiprocessing
import os
from functools import cache

import pytest

from eva.config import Config
from eva.distributed.simulation import check_plans, simulate_ranks
from eva.layout import Layout
from eva.model.initialization import meta_model
from eva.planner.memory import communication_bytes, expected_devices, memory
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


PLANNED = Layout(
    WORLD,
    16,
    64,
    fsdp=True,
    schedule='dualpipev',
    recompute='none',
    precision='bf16',
    optimizer_state_dtype='fp32',
    zero1=False,
)


def sent(plan, *kinds):
    "Bytes that a rank sends in a step, of some kinds"
    figures = plan.exchanges.items()
    return sum(nbytes for (kind, _, _), (_, nbytes) in figures if kind in kinds)


def compare_with_planner(plans):
    "The planner's states and traffic for each pipeline rank are those of the first rank on it"
    parts = memory(V3, PLANNED)
    traffic = communication_bytes(V3, PLANNED)
    n = PLANNED.micro_batches
    for plan in plans:
        planned = parts[plan.rank * 16 // WORLD]
        for name in ('weights', 'gradients'):
            want = planned[f'dense {name}'] + planned[f'expert {name}']
            assert plan.state_bytes[name] == pytest.approx(want, rel=1e-3), (plan.rank, name)
        assert plan.state_bytes['optimizer'] == pytest.approx(planned['optimizer'], rel=1e-3)
        # states to the next rank and gradients to the one before, of two stages
        boundaries = len([key for key in plan.exchanges if key[0] == 'send'])
        assert sent(plan, 'send') == pytest.approx(boundaries * n * traffic['boundary'])
        dense, expert = (
            planned[f'{kind} weights'] + planned[f'{kind} gradients']
            for kind in ('dense', 'expert')
        )
        shared = sent(plan, 'all-gather', 'reduce-scatter')
        # 127 parts of 128 and one of two; rows that do not divide are rounded up
        assert shared == pytest.approx(127 * dense + expert, rel=0.02)
        assert shared <= traffic['zero_nvlink'] + traffic['zero_network']


def test_the_planner_has_the_sizes_and_messages_of_the_published_layout():
    compare_with_planner(some_ranks([0, 3 * 128]))


@pytest.mark.slow
def test_all_ranks_of_the_published_layout():
    parts = [range(i, WORLD, 64) for i in range(64)]
    with multiprocessing.get_context('spawn').Pool(os.cpu_count()) as pool:
        plans = [plan for part in pool.imap_unordered(some_ranks, parts) for plan in part]
    plans.sort(key=lambda plan: plan.rank)
    assert [plan.rank for plan in plans] == list(range(WORLD))
    check_plans(plans, whole())
    compare_with_planner(plans)
    # every weight is on one rank, or copied to both ends of the pipeline or a group of routers
    held = {}
    for plan in plans:
        for name, box in plan.boxes.items():
            held.setdefault(name, set()).add(box)
    numbers = {n: sum(math.prod(b.sizes) for b in boxes) for n, boxes in held.items()}
    weights = {n: p.numel() for n, p in whole().named_parameters()}
    assert {n: numbers[n] for n in weights} == weights
