"""Context and tensor parallelism: parts of sequences, and the same result as one process"""

import shutil

import pytest
import ranks
import torch
from test_distributed import alone, case, compare, same, together
from torch.testing import assert_close

from eva.checkpoints.pretrained import load_pretrained
from eva.training.checkpointing import checkpoints, load_checkpoint

SMALL = dict(model=dict(num_hidden_layers=2))
# Documents that do not see each other, tokens that are not learned, and MTP on half of the batch
MARKED = SMALL | dict(loss_mask=True, mask_documents=True)
TWO = dict(cp=dict(cp=2), tp=dict(tp=2))
FOUR = dict(
    cp_tp=dict(cp=2, tp=2),
    cp_4=dict(cp=4),
    tp_ep=dict(tp=2, ep=2),
    cp_ep_copies=dict(cp=2, ep=2, fsdp=False),
    cp_fsdp=dict(cp=2),
    tp_fsdp=dict(tp=2),
    tp_copies=dict(tp=2, fsdp=False),
)
SHORT = SMALL | dict(steps=6, save_every=3, keep_checkpoints=3)


def cases_of(layouts, suffix, dtype='float64', do='train', **run):
    return [case(f'{k}-{suffix}', v, dtype, do, run=dict(run)) for k, v in layouts.items()]


def test_two_ranks_share_sequences(tmp_path):
    "Losses, gradients and loads of some steps; documents, answers and MTP are parts of them"
    cases = cases_of(TWO, 'marked', balance_weight=0.1, steps=4, eval_every=4, **MARKED)
    compare(tmp_path, together(2, tmp_path, *cases), cases, 1e-8)


@pytest.mark.slow
def test_four_ranks_share_sequences(tmp_path):
    "With experts, FSDP and each other; MTP on all sequences and on some, and more layers"
    marked = cases_of(FOUR, 'marked', **MARKED)
    changed = SMALL['model'] | dict(
        attention_bias=True, q_lora_rank=None, num_nextn_predict_layers=2
    )
    some = {k: FOUR[k] for k in ('cp_tp', 'tp_ep', 'tp_fsdp')}
    others = cases_of(some, 'others', mtp_batch_ratio=1.0, balance_weight=0.1, model=changed)
    # Over a batch the loss balances one micro-batch, which is another one where ranks have others.
    batch = cases_of({'cp_tp': FOUR['cp_tp']}, 'batch', balance_over='batch', **SMALL)
    recomputed = {k: FOUR[k] | dict(recompute=True) for k in ('cp_tp', 'tp_ep')}
    again = cases_of(recomputed, 'again', **MARKED)
    found = together(4, tmp_path, *marked, *others, *batch, *again)
    compare(tmp_path, found, marked + again, 1e-8)
    compare(tmp_path, found, others, 1e-8)
    compare(tmp_path, found, batch, 1e-8)


@pytest.mark.slow
def test_other_precisions(tmp_path):
    layouts = {k: FOUR[k] for k in ('cp_tp', 'tp_fsdp')}
    single = cases_of(layouts, 'float32', 'float32', **MARKED)
    half = cases_of(
        layouts, 'bf16', 'float32', precision='bf16', optimizer_state_dtype='bf16', **SMALL
    )
    found = together(4, tmp_path, *single, *half)
    compare(tmp_path, found, single, 1e-3)
    # The bound is below twice the largest difference that the type alone makes in one process
    first = {
        kw['precision']: ranks.curve(
            alone(tmp_path / kw['precision'], dtype='float32', steps=1, eval_every=1, **SMALL, **kw)
        )[1]
        for kw in (
            dict(precision='fp32'),
            dict(precision='bf16', optimizer_state_dtype='bf16'),
        )
    }
    rounded = max(
        ((first['bf16'][n] - g).norm() / g.norm()).item() for n, g in first['fp32'].items()
    )
    assert rounded > 0.05 and 2 * rounded > 0.1, rounded
    compare(tmp_path, found, half, 2e-2, 0.1)


@pytest.mark.slow
def test_checkpoints_and_exports_of_parts(tmp_path):
    "They have the format of one process, whatever divides the weights"
    layouts = {k: FOUR[k] for k in ('cp_tp', 'tp_ep', 'tp_fsdp', 'cp_fsdp')}
    first = cases_of(layouts, 'run', **SHORT)
    together(4, tmp_path, *first)
    again = []
    for name, layout in layouts.items():
        folder = tmp_path / f'{name}-run'
        written, _ = load_checkpoint(folder / 'checkpoints' / 'step-000003')
        t = alone(folder, **SHORT, dtype='float64')
        shutil.move(folder / 'checkpoints' / 'step-000006', tmp_path / f'{name}-later')
        assert 'going on from step 3 of 6' in t.resume()
        state = t.opt.state_dict() | {f'buffer.{n}': b for n, b in t.model.named_buffers()}
        same(state, {n: w for n, w in written.items() if not n.startswith('random.')})
        t.out = tmp_path / f'{name}-alone'
        t.fit()
        ours, _ = load_checkpoint(t.out / 'checkpoints' / 'step-000006')
        theirs, _ = load_checkpoint(tmp_path / f'{name}-later')
        for n in ours:
            assert_close(ours[n].flatten(), theirs[n].flatten(), rtol=1e-7, atol=1e-9)
        common = dict(folder=f'{name}-run', resume=True, run=SHORT)
        again.append(case(f'{name}-save', layout, do='save', **common))
        again.append(case(f'{name}-export', layout, do='export', **common))
    together(4, tmp_path, *again)
    for name in layouts:
        (path,) = checkpoints(tmp_path / f'{name}-save' / 'checkpoints')
        written, _ = load_checkpoint(tmp_path / f'{name}-run' / 'checkpoints' / 'step-000003')
        same(load_checkpoint(path)[0], written)
        model = load_pretrained(tmp_path / f'{name}-export', torch.float64)
        for n, p in model.named_parameters():
            assert torch.equal(p, written[f'master.{n}'].view_as(p)), (name, n)
