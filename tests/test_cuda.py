"What a GPU must agree on with the CPU; skipped where there is none: `pytest --flags cuda`"
import pytest, torch
from torch.testing import assert_close
from eva.cache import LatentCache
from eva.config import Config
from eva.model import DeepSeekV3

pytestmark = [pytest.mark.cuda, pytest.mark.skipif(not torch.cuda.is_available(), reason='no CUDA device')]

def test_one_function_on_both_machines():
    torch.manual_seed(0)
    model = DeepSeekV3(Config.preset('mini')).double().eval()
    ids = torch.randint(4096, (2, 200))
    with torch.no_grad():
        want = model(ids)
        model.cuda()
        assert_close(model(ids.cuda()).cpu(), want, atol=1e-9, rtol=1e-9)
        cache = LatentCache(model.cfg, 2, 200, dtype=torch.float64, device='cuda')
        parts = torch.cat([model(c, cache) for c in ids.cuda().split([150, 49, 1], 1)], 1)
    assert_close(parts.cpu(), want, atol=1e-9, rtol=1e-9)

def test_losses_and_gradients():
    torch.manual_seed(0)
    model = DeepSeekV3(Config.preset('mini'))
    tokens = torch.randint(4096, (2, 66))
    sum(model.losses(tokens)).backward()
    want = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad(); model.cuda()
    sum(model.losses(tokens.cuda())).backward()
    for n, p in model.named_parameters(): assert (p.grad.cpu()-want[n]).norm() <= 2e-3*want[n].norm(), n
