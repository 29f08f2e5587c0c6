"Other software computes the same from what Eva writes: DeepSeek's code, drafts of transformers"

import importlib.util
import json
import os
import shutil
import sys
from importlib.resources import files
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from eva.benchmarks.deepseek_code import (
    ATTENTION_MODES,
    WRONG_SETTINGS,
    deepseek_model,
    load_deepseek_code,
    measure_deepseek_code,
    random_model,
    reference_configs,
)
from eva.config import Config
from eva.model.transformer import DeepSeekV3

STORED = json.loads((files('eva') / 'results/deepseek_code.json').read_text(encoding='utf-8'))
CODE = os.environ.get('EVA_DEEPSEEK_CODE', '')
# Rounding of float32 through a few layers, as a share of the standard deviation of the logits
ROUNDING = 1e-4


def agree(found):
    "The logits of both modes differ by rounding alone, and a wrong setting changes them"
    assert list(found['cases']) == list(reference_configs()) == list(WRONG_SETTINGS)
    for name, row in found['cases'].items():
        for mode in ATTENTION_MODES:
            assert row[mode]['largest'] < ROUNDING * row[mode]['spread'], (name, mode)
            assert row[mode]['same_choice'], (name, mode)
        wrong = row['wrong']
        assert wrong['settings'] == WRONG_SETTINGS[name]
        assert wrong['largest'] > 100 * ROUNDING * wrong['spread'], name


def test_stored_figures_of_deepseeks_code_agree():
    agree(STORED)
    broken = json.loads(json.dumps(STORED))
    next(iter(broken['cases'].values()))['naive']['largest'] = 0.01
    with pytest.raises(AssertionError):
        agree(broken)


@pytest.mark.skipif(
    not CODE,
    reason='EVA_DEEPSEEK_CODE must name inference/model.py of a clone of DeepSeek-V3',
)
def test_deepseeks_own_code_computes_the_same_logits():
    assert Path(CODE).is_file(), f'EVA_DEEPSEEK_CODE={CODE}: no such file'
    found = measure_deepseek_code(CODE)
    agree(found)
    # The logits themselves are those of the stored run, not only their differences.
    for name, row in found['cases'].items():
        stored = STORED['cases'][name]
        assert row['naive']['spread'] == pytest.approx(stored['naive']['spread'], rel=1e-3), name


@pytest.mark.skipif(
    not CODE or not Path(CODE).with_name('convert.py').is_file(),
    reason='EVA_DEEPSEEK_CODE must name inference/model.py of a clone of DeepSeek-V3',
)
def test_deepseeks_converter_reads_the_folder_and_eva_reads_its_result(tmp_path):
    "Its names and tensors are those that its model asks for; it does not know MTP elsewhere"
    spec = importlib.util.spec_from_file_location('convert', Path(CODE).with_name('convert.py'))
    converter = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(converter)
    cfg = reference_configs()['V3, 4 groups by their best']
    model = random_model(cfg)
    model.save_pretrained(tmp_path / 'own')
    threads = torch.get_num_threads()
    try:
        for parts in (1, 2):
            to = tmp_path / f'parts{parts}'
            converter.main(str(tmp_path / 'own'), str(to), cfg.n_routed_experts, parts)
            shutil.copy(tmp_path / 'own' / 'config.json', to)
            back = DeepSeekV3.from_pretrained(to)
            for name, tensor in model.state_dict().items():
                assert torch.equal(back.state_dict()[name], tensor), (parts, name)
        peer = deepseek_model(load_deepseek_code(CODE), model, 1, 8)
        written = load_file(tmp_path / 'parts1' / 'model0-mp1.safetensors')
        assert written.keys() == dict(peer.named_parameters()).keys()
        drafts = cfg.replace(num_nextn_predict_layers=1)
        DeepSeekV3(drafts).save_pretrained(tmp_path / 'drafts')
        with pytest.raises(AssertionError, match='not found in mapping'):
            converter.main(str(tmp_path / 'drafts'), str(tmp_path / 'x'), cfg.n_routed_experts, 1)
    finally:
        torch.set_num_threads(threads)


def drafting(folder, pattern, prompt, tokens):
    "Greedy text of transformers with drafts of the MTP modules, and the steps of its model"
    transformers = pytest.importorskip('transformers')
    kind = transformers.DeepseekV3ForCausalLM
    with patch.object(kind, '_keys_to_ignore_on_load_unexpected', [pattern]):
        peer = kind.from_pretrained(folder, dtype=torch.float32).eval()
        steps = []
        peer.model.register_forward_hook(lambda *found: steps.append(1))
        mask = torch.ones_like(prompt)
        text = peer.generate(
            prompt, attention_mask=mask, max_new_tokens=tokens, do_sample=False, use_mtp=True
        )
    return text, len(steps)


@pytest.mark.parametrize('modules', [1, 2])
@pytest.mark.parametrize('trained', [False, True], ids=['random', 'trained'])
def test_transformers_drafts_the_same_text(tmp_path, modules, trained):
    "With accepted drafts and with refused ones, from prompts of several lengths"
    torch.manual_seed(modules)
    cfg = Config.from_preset(
        'mini',
        num_hidden_layers=3,
        hidden_size=64,
        vocab_size=300,
        eos_token_id=None,
        num_nextn_predict_layers=modules,
        initializer_range=0.1,
    )
    model = DeepSeekV3(cfg)
    repeated = torch.randint(300, (9,))
    if trained:
        batch = repeated.repeat(6).unfold(0, 34, 1)[: len(repeated)]
        optimiser = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(40):
            sum(model.losses(batch)).backward()
            optimiser.step()
            optimiser.zero_grad()
    model.eval().save_pretrained(tmp_path)
    pattern = r'model\.layers\.[3-9]\..*'
    for length in (modules, 3, 7):  # it cannot draft after fewer tokens than there are modules
        prompt = repeated[None, :length]
        ours = model.generate(prompt, max_new_tokens=30)
        theirs, steps = drafting(tmp_path, pattern, prompt, 30)
        assert theirs.tolist() == ours.tolist(), length
        if trained and length == 7:
            # The prompt's step gives one token, and each step after it one more than is accepted.
            assert steps <= 2 + 30 // (1 + modules), 'drafts were refused'


def test_transformers_finds_no_drafts_at_another_index(tmp_path):
    "With the pattern of V3, modules behind another last layer are missing, and that is said"
    torch.manual_seed(0)
    cfg = Config.from_preset('mini', num_hidden_layers=2, hidden_size=64, vocab_size=300)
    DeepSeekV3(cfg).save_pretrained(tmp_path)
    prompt = torch.tensor([[1, 2, 3]])
    with pytest.raises(RuntimeError, match='missing'):
        drafting(tmp_path, r'model\.layers\.61.*', prompt, 4)


ADAPTERS = {
    'linear layers': dict(target_modules='all-linear'),
    'attention and experts': dict(
        target_modules=['q_b_proj', 'kv_b_proj', 'o_proj'],
        target_parameters=['mlp.experts.gate_up_proj', 'mlp.experts.down_proj'],
    ),
}


@pytest.mark.parametrize('adapted', ADAPTERS)
def test_lora_trained_elsewhere_loads_here(tmp_path, monkeypatch, adapted):
    "PEFT trains adapters on the folder with transformers, and the merged model is read by Eva"
    # Of Transformer Engine an empty package may be installed, which fails where PEFT asks for it.
    monkeypatch.setitem(sys.modules, 'transformer_engine', None)
    peft = pytest.importorskip('peft')
    transformers = pytest.importorskip('transformers')
    torch.manual_seed(0)
    cfg = Config.from_preset(
        'mini', num_hidden_layers=2, hidden_size=64, vocab_size=300, initializer_range=0.1
    )
    model = DeepSeekV3(cfg).eval()
    for block in model.blocks[cfg.first_k_dense_replace :]:
        block.mlp.gate.e_score_correction_bias.normal_(std=0.1)
    model.save_pretrained(tmp_path / 'base')
    base = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / 'base', dtype=torch.float32)
    options = ADAPTERS[adapted]
    adapter = peft.get_peft_model(
        base, peft.LoraConfig(r=4, lora_alpha=8, task_type='CAUSAL_LM', **options)
    )
    ids = torch.randint(cfg.vocab_size, (4, 32))
    learned = [p for p in adapter.parameters() if p.requires_grad]
    optimiser = torch.optim.AdamW(learned, lr=1e-2)
    losses = []
    for _ in range(10):
        loss = adapter(input_ids=ids, labels=ids).loss
        loss.backward()
        optimiser.step()
        optimiser.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    merged = adapter.merge_and_unload().eval()
    merged.save_pretrained(tmp_path / 'merged')
    with pytest.warns(UserWarning, match='MTP'):
        back = DeepSeekV3.from_pretrained(tmp_path / 'merged').eval()
    with torch.no_grad():
        want = merged(ids).logits
        assert_close(back(ids), want, atol=1e-5, rtol=1e-5)
        assert (model(ids) - want).abs().max() > 0.1  # the adapters are in the weights
    for ours, theirs in zip(model.blocks[1:], back.blocks[1:], strict=True):
        before, after = (o.mlp.gate.e_score_correction_bias for o in (ours, theirs))
        assert torch.equal(before, after)
