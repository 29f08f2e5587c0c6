"""Pipelines whose stages share sequences: the result of one process

Two short cases run always, in the start of ranks of test_features_by_layout.
"""

import json

import pytest
import torch
from test_distributed import ENV, HERE
from test_features_by_layout import (
    PARTS,
    PRECISIONS,
    alone,
    bounds,
    differences,
    ranks,
    same_rows,
)

from eva.distributed.expert_parallel import torchrun

# Answers in documents that do not see each other, MTP on 3 of 8 sequences, a balance loss that
# matters
MARKED = dict(loss_mask=True, mask_documents=True, mtp_batch_ratio=0.4, balance_weight=0.1)
TIED = dict(tie_word_embeddings=True)
OTHERS = dict(
    plain={},
    marked=MARKED,
    tied=dict(model=TIED | dict(attention_bias=True, q_lora_rank=None, num_nextn_predict_layers=2)),
    no_mtp=dict(model=TIED | dict(num_nextn_predict_layers=0), micro_batch=2, balance_over='batch'),
)
FOUR = PARTS | dict(
    cp_fsdp=dict(pp=2, cp=2, schedule='zero_bubble', fsdp=True),
    cp_zbv=dict(pp=2, cp=2, schedule='zbv'),
    cp_again=dict(pp=2, cp=2, schedule='dualpipev', recompute=True),
    tp_1f1b=dict(pp=2, tp=2),
    tp_zbv=dict(pp=2, tp=2, schedule='zbv'),
    tp_again=dict(pp=2, tp=2, schedule='dualpipev', recompute=True),
)
EIGHT = dict(
    cp_tp=dict(pp=2, cp=2, tp=2),
    cp_tp_zb=dict(pp=2, cp=2, tp=2, schedule='zero_bubble', recompute=True),
    cp_ep=dict(pp=2, cp=2, ep=2, schedule='dualpipev'),
    tp_ep_fsdp=dict(pp=2, tp=2, ep=2, fsdp=True, schedule='zbv'),
    cp_fsdp=dict(pp=2, cp=2, fsdp=True),
    tp_fsdp=dict(pp=2, tp=2, fsdp=True, schedule='dualpipev'),
    tp_copies=dict(pp=2, tp=2, fsdp=False),
    four_stages=dict(pp=4, cp=2),
)


def case(layout, name, feature, precision='float64', steps=3, **more):
    "A case of tests/pipeline_parts.py"
    run = dict(dtype='float64', micro_batch=1, steps=steps, eval_every=steps, save_every=1000)
    run |= PRECISIONS[precision] | OTHERS[feature]
    key = name, precision, feature
    wide = PRECISIONS[precision].get('precision') == 'fp8'
    about = dict(name='-'.join(key), key=key, parallel=layout, do='train', wide=wide, run=run)
    return about | more


def together(n, out, cases):
    "Start ranks that run the cases"
    for name in ('train', 'held'):
        ranks.stream(out / f'{name}.npy')
    script = HERE / 'pipeline_parts.py'
    torchrun(script, out, *map(json.dumps, cases), ranks=n, env=ENV, timeout=3000)
    return {c['name']: json.loads((out / f'{c["name"]}.json').read_text()) for c in cases}


def compare(out, found, cases, allowed=None):
    "Each case with one process: what differs too much, by name; None: in the last digits"
    known = {}
    wrong = {}
    for c in cases:
        key = c['key'][1:]
        if key not in known:
            known[key] = alone(out, c)
        rows, first = known[key]
        everyone = found[c['name']]
        off = differences(out, c, everyone, rows, first)
        print(f'{c["name"]:44}', *(f'{k} {v:.0e}' for k, v in off.items()))
        most = allowed or bounds('pp', 'float64', c['run']['steps'])
        wrong[c['name']] = [
            k for k, v in off.items() if v > most['gradient' if k == 'gradient' else 'loss']
        ]
        if key[0] == 'float64' and loads(rows) != loads(everyone[0]['rows']):
            wrong[c['name']].append('loads')
        if not all(same_rows(everyone[0], o) for o in everyone):
            wrong[c['name']].append('ranks')
    return wrong


def loads(rows):
    "Tokens of each expert in each step"
    return [(row['expert_load'], row.get('mtp_expert_load')) for row in rows]


@pytest.mark.slow
def test_four_ranks(tmp_path):
    "All schedules, documents, answers, MTP, tied and untied embeddings, FSDP, recomputation"
    cases = [case(layout, k, f) for k, layout in FOUR.items() for f in ('marked', 'tied')]
    cases += [case(FOUR[k], k, 'no_mtp') for k in ('cp_fsdp', 'tp_again')]
    cases.append(case(FOUR['cp_zbv'], 'long', 'plain', steps=20))
    wrong = compare(tmp_path, together(4, tmp_path, cases), cases)
    assert not any(wrong.values()), wrong


@pytest.mark.slow
def test_eight_ranks(tmp_path):
    "Both divisions of sequences, experts, and other sequences on other ranks"
    cases = [case(layout, k, 'marked') for k, layout in EIGHT.items()]
    cases += [case(EIGHT[k], k, 'tied') for k in ('cp_tp_zb', 'cp_fsdp', 'tp_ep_fsdp')]
    wrong = compare(tmp_path, together(8, tmp_path, cases), cases)
    assert not any(wrong.values()), wrong


@pytest.mark.slow
def test_precisions(tmp_path):
    "The ranks round sums in another order; experts of single tokens differ by more"
    half = [case(PARTS[k], k, 'marked', p) for k in PARTS for p in ('bf16', 'fp16')]
    fp8 = [case(PARTS['pp_cp'], 'pp_cp', 'marked', p) for p in ('block_pow2', 'deepseek_v3')]
    found = together(4, tmp_path, half + fp8)
    wrong = compare(tmp_path, found, half + fp8, bounds('pp', 'bf16'))
    assert not any(wrong.values()), wrong


PLANTED = dict(
    loads_of_one_part=('pp_cp', 'plain'),
    next_token_of_other_part=('pp_cp', 'plain'),
    boundary_of_other_ranks=('pp_cp', 'plain'),
    balance_of_one_part=('pp_tp', 'marked'),
    ends_without_parts=('pp_tp', 'tied'),
    embedding_without_mtp=('pp_cp', 'plain'),
)  # error -> where it shows


@pytest.mark.slow
def test_planted_errors_are_found(tmp_path):
    cases = [
        case(PARTS[layout], layout, feature) | dict(name=error, plant=error)
        for error, (layout, feature) in PLANTED.items()
    ]
    wrong = compare(tmp_path, together(4, tmp_path, cases), cases)
    assert all(wrong.values()), [name for name, keys in wrong.items() if not keys]


@pytest.mark.slow
def test_windows_that_do_not_divide(tmp_path):
    "They are padded for evaluation, and what is added does not count"
    cases = [case(PARTS[k], k, 'marked', do='evaluate') for k in PARTS]
    found = together(4, tmp_path, cases)
    (tmp_path / 'alone').mkdir()
    t = ranks.trainer(tmp_path / 'alone' / 'run', **cases[0]['run'])
    rows = torch.from_numpy(t.held_out.tokens[:42].astype('int64')).view(3, 14)
    on = rows[:, 1:] % 3 > 0
    with torch.no_grad():
        want = t.parallel.evaluate_batch(t.model, rows, True, on)
    for c in cases:
        assert all(abs(loss - want) < 1e-10 for loss in found[c['name']]), c['name']
