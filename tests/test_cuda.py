"What a GPU must agree on with the CPU; skipped where there is none: `pytest --flags cuda`"

import pytest
import torch
from torch.testing import assert_close

from eva.attention.kv_cache import LatentCache
from eva.config import Config
from eva.fp8.backends import unsupported_reason
from eva.fp8.formats import quantize, snr_db
from eva.fp8.linear import convert
from eva.fp8.recipes import RECIPES
from eva.model.transformer import DeepSeekV3

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device'),
]


def test_one_function_on_both_machines():
    """In float64, up to the cosines and sines

    They are float32 in every model, and two libraries may differ in their last two bits: 2.4e-7.
    """
    torch.manual_seed(0)
    model = DeepSeekV3(Config.from_preset('mini')).double().eval()
    ids = torch.randint(4096, (2, 200))
    with torch.no_grad():
        want = model(ids)
        model.cuda()
        assert_close(model(ids.cuda()).cpu(), want, atol=2.4e-7, rtol=2.4e-7)
        cache = LatentCache(model.cfg, 2, 200, dtype=torch.float64, device='cuda')
        parts = torch.cat([model(c, cache) for c in ids.cuda().split([150, 49, 1], 1)], 1)
        assert_close(parts, model(ids.cuda()), atol=1e-9, rtol=1e-9)


def test_losses_and_gradients():
    torch.manual_seed(0)
    model = DeepSeekV3(Config.from_preset('mini'))
    tokens = torch.randint(4096, (2, 66))
    sum(model.losses(tokens)).backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    model.cuda()
    sum(model.losses(tokens.cuda())).backward()
    for n, p in model.named_parameters():
        assert (p.grad.cpu() - want[n]).norm() <= 2e-3 * want[n].norm(), n


@pytest.mark.parametrize('recipe', ['block', 'block_pow2', 'tensor', 'mx'])
def test_quantised_bytes(recipe):
    torch.manual_seed(0)
    r = RECIPES[recipe]
    x = torch.randn(300, 700) * torch.randn(300, 1).exp()
    (q, s), (q2, s2) = quantize(x, r.x, r.fmt, r.pow2), quantize(x.cuda(), r.x, r.fmt, r.pow2)
    assert torch.equal(q.view(torch.uint8), q2.cpu().view(torch.uint8)) and torch.equal(s, s2.cpu())


@pytest.mark.parametrize('backend', ['native', 'te'])
@pytest.mark.parametrize('recipe', ['block', 'block_pow2', 'tensor', 'deepseek_v3'])
def test_backends_agree_with_emulation(backend, recipe):
    if why := unsupported_reason(backend, torch.device('cuda'), recipe):
        pytest.skip(why)
    out = {}
    for b in ('emulate', backend):
        torch.manual_seed(0)
        # Every expert is chosen: a choice that turns over is no rounding of a number.
        sizes = dict(num_hidden_layers=2, num_nextn_predict_layers=0, num_experts_per_tok=8)
        model = DeepSeekV3(Config.from_preset('mini', **sizes)).cuda().bfloat16()
        convert(model, recipe, b)
        tokens = torch.randint(4096, (2, 257), device='cuda')
        loss = model.losses(tokens)[0]
        loss.backward()
        out[b] = (
            loss.item(),
            {n: p.grad.float() for n, p in model.named_parameters() if p.grad is not None},
        )
    (a, ga), (b, gb) = out.values()
    assert abs(a - b) < 0.01 * a
    ratios = {n: snr_db(ga[n], gb[n]) for n in ga}
    print(f'{recipe}, {backend}: from {min(ratios.values()):.1f} dB')
    # Two neighbours in eight bits lie 2^-3 apart, and a value between them may go either way.
    assert min(ratios.values()) > 10, min(ratios, key=ratios.get)


def test_training_in_eight_bits(tmp_path):
    from eva.data.decode import Document
    from eva.data.text import write_tokens
    from eva.data.tokenizer import train_tokenizer
    from eva.training.checkpointing import read_metrics
    from eva.training.config import TrainConfig
    from eva.training.trainer import Trainer

    text = 'if x == 1: y = 2\nelse: y = 3\n' * 60
    tok = train_tokenizer([text], 270)
    train, held = (
        write_tokens(tmp_path / f'{n}.npy', [Document(n, t)], tok)
        for n, t in [('train', text * 3), ('held', text)]
    )
    t = Trainer(
        DeepSeekV3(
            Config.from_preset('mini', vocab_size=tok.get_vocab_size(), num_hidden_layers=2)
        ).cuda(),
        train,
        held,
        TrainConfig(steps=25, batch_size=4, micro_batch=4, seq_len=64, precision='fp8', lr=3e-3),
        tmp_path / 'run',
    )
    t.fit()
    rows = read_metrics(tmp_path / 'run' / 'metrics.jsonl')
    assert rows[-1]['loss'] < 0.7 * rows[0]['loss'] and not any(r.get('skipped') for r in rows)


@pytest.mark.parametrize('speculate', [0, 2])
def test_generation_says_on_the_gpu_what_it_says_on_the_cpu(speculate):
    from eva.generation.generate import generate

    torch.manual_seed(0)
    model = (
        DeepSeekV3(
            Config.from_preset('mini', vocab_size=200, hidden_size=64, initializer_range=0.15)
        )
        .double()
        .eval()
    )
    ids = torch.randint(2, 200, (3, 9))
    mask = torch.tensor([[1] * 9, [0] * 4 + [1] * 5, [0] * 8 + [1]])
    drawn = dict(do_sample=True, temperature=0.9, top_p=0.95, repetition_penalty=1.2)
    for how in (dict(eos_token_id=None), dict(eos_token_id=None, **drawn)):
        want = generate(
            model.cpu(), ids, 20, seed=1, speculate=speculate, attention_mask=mask, **how
        )
        got = generate(
            model.cuda(),
            ids.cuda(),
            20,
            seed=1,
            speculate=speculate,
            attention_mask=mask.cuda(),
            **how,
        )
        assert torch.equal(got.cpu(), want)
