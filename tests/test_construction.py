"""Models built part by part: the values of one process, and the memory of a part

Faults that are planted: a rank that builds the whole model, parts that take the values of other
places, and ranks that fill copies of a weight with values of their own.
"""

import json
import os
from functools import cache
from pathlib import Path

import construct
import pytest
import ranks
import torch
from safetensors.torch import load_file

from eva.checkpoints.pretrained import load_pretrained, save_pretrained
from eva.cli.train_init import start_model
from eva.distributed.expert_parallel import torchrun
from eva.model.initialization import meta_model

HERE = Path(__file__).parent
ENV = os.environ | dict(
    OMP_NUM_THREADS='1',
    MKL_NUM_THREADS='1',
    PYTHONPATH=f'{HERE.parent}{os.pathsep}{os.environ.get("PYTHONPATH", "")}',
)
NOISE = 2 * 2**20  # bytes by which the same work differs from time to time
# One MTP module, ties between the first and the last stage, and sizes that do not divide evenly
UNEVEN = dict(
    hidden_size=42,
    num_hidden_layers=5,
    n_routed_experts=12,
    n_group=1,
    topk_group=1,
    num_nextn_predict_layers=1,
    tie_word_embeddings=True,
)
FLAT = dict(num_nextn_predict_layers=0)
BIG = FLAT | dict(hidden_size=256, moe_intermediate_size=256)


def whole_model(model):
    "The model as `eva_train` builds it in one process"
    return start_model(construct.config(model), {}, construct.SEED)


@cache
def whole_weights(folder, model):
    "Its weights, or those that were saved to a folder; the model as JSON"
    if folder:
        return load_pretrained(folder).float().state_dict()
    return whole_model(json.loads(model)).state_dict()


def together(n, out, *cases):
    "Start n ranks that work through the cases; what each rank found, by case"
    ranks.stream(out / 'train.npy')
    for c in cases:
        if c.get('source') and not (out / c['source']).exists():
            save_pretrained(
                whole_model(c['model']).bfloat16(), out / c['source'], max_shard_size='20MB'
            )
    torchrun(HERE / 'construct.py', out, *map(json.dumps, cases), ranks=n, env=ENV)
    return {c['name']: json.loads((out / f'{c["name"]}.json').read_text()) for c in cases}


def case(name, parallel, model, **more):
    return dict(name=name, parallel=parallel, model=model) | more


def faults(out, c, everyone):
    "What is wrong with a model that ranks built"
    if any('error' in o for o in everyone):
        return ['memory refused']
    found = []
    if any(o['grew'] > o['part'] + 2 * o['largest'] + NOISE for o in everyone):
        found.append('memory')
    source = out / c['source'] if c.get('source') else None
    want = dict(whole_weights(source, json.dumps(c['model'])))
    if construct.config(c['model']).tie_word_embeddings:
        want.pop('lm_head.weight')
    got = load_file(out / f'{c["name"]}.safetensors')
    if got.keys() != want.keys() or not all(torch.equal(t, want[n]) for n, t in got.items()):
        found.append('values')
    seen: dict[tuple, set] = {}
    for o in everyone:
        for place, digest in o['parts']:
            seen.setdefault(tuple(place), set()).add(digest)
    if any(len(digests) > 1 for digests in seen.values()):
        found.append('copies')
    return found


TWO = [
    case('fsdp', {}, UNEVEN),
    case('fsdp-read', {}, UNEVEN, source='uneven'),
    case('copies', dict(ep=2, fsdp=False), UNEVEN),
    case('stages', dict(pp=2, schedule='dualpipev'), UNEVEN),
    case('large-read', dict(ep=2), FLAT, source='flat'),
    case('whole', {}, FLAT, fault='whole'),
    case('offsets', {}, UNEVEN, fault='offsets'),
    case('seed', dict(ep=2, fsdp=False), UNEVEN, fault='seed'),
]
CAUGHT = dict(whole=['memory'], offsets=['values'], seed=['values', 'copies'])
RESUMED = case('resumed', dict(ep=2), FLAT, resume=True)


def check_resumed(everyone):
    "A rank that resumes needs its moments and little more, and is in the same state"
    for o in everyone:
        assert o['same'] and o['step'] == 1
        assert o['grew'] <= o['moments'] + 2 * o['largest'] + NOISE, o


def test_parts_are_those_of_one_process(tmp_path):
    found = together(2, tmp_path, RESUMED, *TWO)
    for c in TWO:
        assert faults(tmp_path, c, found[c['name']]) == CAUGHT.get(c['name'], []), c['name']
    check_resumed(found['resumed'])


FOUR = [
    case('fsdp', {}, UNEVEN),
    case('experts', dict(ep=2), UNEVEN),
    case('experts-read', dict(ep=2), UNEVEN, source='uneven'),
    case('experts-4', dict(ep=4), UNEVEN),
    case('copies', dict(ep=2, fsdp=False), UNEVEN),
    case('both', dict(pp=2, ep=2), UNEVEN),
    case('stages', dict(pp=2, schedule='zbv'), UNEVEN, source='uneven'),
    case('large', dict(ep=2), FLAT),
    case('offsets', dict(ep=2), UNEVEN, fault='offsets'),
    case('seed', dict(pp=2), UNEVEN, fault='seed'),
    case('resumed', dict(ep=2), FLAT, resume=True),
]


@pytest.mark.slow
def test_four_ranks(tmp_path):
    found = together(4, tmp_path, *FOUR)
    caught = dict(offsets=['values'], seed=['values', 'copies'])
    for c in FOUR[:-1]:
        assert faults(tmp_path, c, found[c['name']]) == caught.get(c['name'], []), c['name']
    check_resumed(found['resumed'])


@pytest.mark.slow
def test_a_model_of_four_times_the_allowance(tmp_path):
    "The operating system allows each rank a quarter of the model"
    model = BIG
    allowance = sum(p.numel() for p in meta_model(construct.config(model)).parameters())
    layouts = dict(
        fsdp={}, experts=dict(ep=2), stages=dict(pp=8), mixture=dict(ep=4, pp=2), ep=dict(ep=8)
    )
    cases = [case(n, o, model, allowance=allowance) for n, o in layouts.items()]
    cases += [case(f'{n}-read', o, model, source='big') for n, o in layouts.items()]
    cases.append(case('whole', {}, model, allowance=allowance, fault='whole'))
    found = together(8, tmp_path, *cases)
    for c in cases[:-1]:
        everyone = found[c['name']]
        assert faults(tmp_path, c, everyone) == [], c['name']
        assert all(o['grew'] <= allowance for o in everyone), c['name']
    assert faults(tmp_path, cases[-1], found['whole']) == ['memory refused']
