"INT8 folders through the commands, and decoding routes that agree in a whole model"

import copy

import pytest
import torch

from eva.checkpoints.int8 import Int8Experts, Int8Linear, quantize_model
from eva.checkpoints.pretrained import load_pretrained
from eva.cli.convert import eva_convert
from eva.config import Config
from eva.kernels.compiled import plain_products
from eva.kernels.few_rows import TYPES
from eva.model.transformer import DeepSeekV3


def small_model(**changes):
    "A model whose logits are far apart, so that rounding changes no token"
    torch.manual_seed(0)
    model = DeepSeekV3(Config.from_preset('tiny', **changes)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1 and 'gate.weight' not in name:
                parameter.mul_(3)
    return model


@pytest.fixture(autouse=True)
def compiled(monkeypatch):
    monkeypatch.setenv('EVA_COMPILE', '1')


def test_a_folder_through_the_command(tmp_path, capsys):
    model = small_model().bfloat16()
    model.save_pretrained(tmp_path / 'bf16')
    assert eva_convert([str(tmp_path / 'bf16'), str(tmp_path / 'int8'), '--to', 'int8']) == 0
    eight = load_pretrained(tmp_path / 'int8')
    kinds = {type(layer) for layer in eight.modules()}
    assert Int8Linear in kinds and Int8Experts in kinds
    assert eight.dtype == torch.bfloat16
    wide = load_pretrained(tmp_path / 'int8', torch.float32)
    assert {p.dtype for p in wide.parameters()} == {torch.float32}
    assert Int8Linear not in {type(layer) for layer in wide.modules()}
    capsys.readouterr()
    for options, said in (
        (['--pow2'], '--pow2 with --to int8: belongs to --to fp8'),
        (['--quant', 'q8_0'], '--quant with --to int8: belongs to --to gguf'),
    ):
        given = [str(tmp_path / 'bf16'), str(tmp_path / 'x'), '--to', 'int8', *options]
        assert eva_convert(given) != 0
        assert said in capsys.readouterr().err


@pytest.mark.parametrize('rows', (1, 2, 16, 17))
@pytest.mark.parametrize('kind', TYPES, ids=str)
@torch.no_grad()
def test_routes_agree_in_a_model(kind, rows):
    "Prompts and steps with kernels and without, padded rows among them"
    model = small_model()
    if kind == torch.bfloat16:
        model = model.bfloat16().float()  # weights that both types have
    if kind == torch.int8:
        model = quantize_model(model)
    ids = torch.randint(2, model.cfg.vocab_size, (rows, 9))
    mask = torch.ones_like(ids)
    mask[rows // 2 :, :3] = 0 if rows > 1 else 1
    got = model.generate(ids, 6, attention_mask=mask, eos_token_id=None)
    with plain_products():
        want = model.generate(ids, 6, attention_mask=mask, eos_token_id=None)
    assert torch.equal(got, want)


@torch.no_grad()
def test_hooks_and_adapters_see_their_layers():
    "A hook changes the output of a step as it does without kernels, in floating point and INT8"
    for rounds in (False, True):
        model = small_model()
        if rounds:
            model = quantize_model(model)
        ids = torch.randint(2, model.cfg.vocab_size, (1, 5))
        before = model(ids)
        changed = copy.deepcopy(model)
        changed.blocks[0].self_attn.o_proj.register_forward_hook(lambda m, x, y: 0 * y)
        after = changed(ids)
        assert (after - before).abs().max() > 0.1
        with plain_products():
            torch.testing.assert_close(changed(ids), after, rtol=1e-3, atol=1e-3)
