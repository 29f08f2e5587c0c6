"Folders with mutated bytes and mutated JSON: loaded, or refused with a ValueError, quickly; `EVA_FUZZ=50000 pytest tests/test_fuzz_files.py` tries more"
import json, os, random, shutil, time, warnings
import pytest, torch
from eva.config import Config
from eva.interop import convert_checkpoint, load_pretrained, save_pretrained
from eva.model import DeepSeekV3

CASES = int(os.environ.get('EVA_FUZZ', 1500))
ODD = [None, -1, 0, 1, 2, 3, 1e30, float('nan'), float('inf'), 'x', '', '8', [], [1], {}, {'type': 'yarn'}, True, False, 2**31, 2**40, 2**62, 2**70, -2**63, 0.5, 128]

@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp('fuzz')
    torch.manual_seed(0)
    cfg = Config.preset('mini', vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4,
                        v_head_dim=4, intermediate_size=16, moe_intermediate_size=8, n_routed_experts=4)
    save_pretrained(DeepSeekV3(cfg), root/'plain')
    convert_checkpoint(root/'plain', root/'fp8', 'fp8')
    return [root/'plain', root/'fp8'], root/'case'

def attempt(case, what):
    "Loads or refuses in one sentence; anything else is a finding"
    start = time.time()
    try:
        with warnings.catch_warnings(): warnings.simplefilter('ignore'); load_pretrained(case)
    except ValueError as e: assert 10 < len(str(e)) < 2000, (what, str(e))
    except Exception as e: raise AssertionError(f'{what}: {type(e).__name__}: {e}') from e
    assert time.time()-start < 20, what

def test_mutated_json(folders):
    sources, case = folders
    for i in range(CASES):
        rng = random.Random(i)
        source = rng.choice(sources)
        config = json.loads((source/'config.json').read_text())
        for _ in range(rng.choice((1, 1, 2))):
            target = config if rng.random() < .8 or 'quantization_config' not in config or not isinstance(config['quantization_config'], dict) else config['quantization_config']
            key = rng.choice(sorted(target) or ['x'])
            if rng.random() < .15: target.pop(key, None)
            else: target[key] = rng.choice(ODD)
        case.mkdir(exist_ok=True)
        os.path.exists(case/'model.safetensors') and os.unlink(case/'model.safetensors')
        os.link(source/'model.safetensors', case/'model.safetensors')
        (case/'config.json').write_text(json.dumps(config) if rng.random() < .95 else json.dumps(config)[:rng.randrange(200)])
        attempt(case, (i, {k: v for k, v in config.items() if v != json.loads((source/'config.json').read_text()).get(k)}))
    shutil.rmtree(case)

def test_mutated_bytes(folders):
    sources, case = folders
    for i in range(CASES):
        rng = random.Random(i)
        source = rng.choice(sources)
        raw = bytearray((source/'model.safetensors').read_bytes())
        head = 8+int.from_bytes(raw[:8], 'little')
        kind = rng.choice(('header', 'length', 'cut', 'grow'))
        if kind == 'header':
            for _ in range(rng.randrange(1, 6)): raw[rng.randrange(8, head)] = rng.choice(b'0123456789[]{},:"aF_')
        elif kind == 'length': raw[:8] = rng.choice((0, 1, head, head-9, 2**31, 2**40, 2**63, 2**64-1)).to_bytes(8, 'little')
        elif kind == 'cut': del raw[rng.randrange(len(raw)):]
        else: raw += bytes(rng.randrange(1, 100))
        case.mkdir(exist_ok=True)
        (case/'config.json').write_text((source/'config.json').read_text())
        (case/'model.safetensors').unlink(missing_ok=True)
        (case/'model.safetensors').write_bytes(raw)
        attempt(case, (i, kind))
    shutil.rmtree(case)
