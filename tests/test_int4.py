"INT4 folders of Kimi's form load, convert and resume; other software packs and reads the same"

import copy
import json
import random
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from eva.checkpoints import int4
from eva.checkpoints.conversion import FP8_WEIGHTS, convert_checkpoint
from eva.checkpoints.files import SafetensorsFolder
from eva.checkpoints.pretrained import load_pretrained, published_state_dict
from eva.config import Config
from eva.fp8.formats import dequantize, quantize
from eva.model.transformer import DeepSeekV3

SIZES = dict(
    vocab_size=50, hidden_size=40, num_hidden_layers=2, num_attention_heads=2, q_lora_rank=8,
    kv_lora_rank=8, qk_nope_head_dim=4, qk_rope_head_dim=4, v_head_dim=4, intermediate_size=16,
    moe_intermediate_size=36, n_routed_experts=4, num_nextn_predict_layers=0, initializer_range=0.1,
)  # fmt: skip


def quantization(group_size=32, **changes):
    "The settings of a published folder"
    weights = dict(
        num_bits=4, type='int', strategy='group', group_size=group_size, symmetric=True,
        dynamic=False, actorder=None, block_structure=None, observer='minmax', observer_kwargs={},
    )  # fmt: skip
    group = dict(
        targets=['Linear'],
        input_activations=None,
        output_activations=None,
        weights=weights | changes,
    )
    return dict(
        quant_method='compressed-tensors',
        format='pack-quantized',
        quantization_status='compressed',
        kv_cache_scheme=None,
        ignore=['lm_head', 're:.*self_attn.*', 're:.*shared_experts.*'],
        config_groups=dict(group_0=group),
    )


def packed_tensors(tensors, group_size=32, dtype=torch.bfloat16):
    "Tensors with packed experts; and the same tensors with rounded experts, by definition"
    stored = {}
    rounded = {}
    for name, tensor in tensors.items():
        if '.mlp.experts.' not in name:
            stored[name] = rounded[name] = tensor
            continue
        packed, scale = int4.quantize_int4(tensor, group_size, dtype)
        parts = dict(packed=packed, scale=scale, shape=torch.tensor(tensor.shape))
        stored |= {f'{name}_{part}': t for part, t in parts.items()}
        values = [
            [(n >> 4 * (i % 8) & 15) - 8 for i, n in enumerate(row)] for row in eights(packed)
        ]
        values = torch.tensor(values, dtype=torch.float32)[:, : tensor.shape[1]]
        factors = scale.float().repeat_interleave(group_size, 1)[:, : tensor.shape[1]]
        rounded[name] = values * factors
    return stored, rounded


def eights(packed):
    "Each packed integer eight times, with Python's integers"
    return [[n % 2**32 for n in row for _ in range(8)] for row in packed.tolist()]


def write_kimi(folder, model, group_size=32, files=1, text=None, **outer):
    "A folder of Kimi K2.5's form; returns the tensors of its language model with rounded experts"
    folder.mkdir()
    stored, rounded = packed_tensors(dict(published_state_dict(model)), group_size)
    tensors = {f'language_model.{name}': tensor for name, tensor in stored.items()}
    tensors |= {f'vision_tower.encoder.blocks.{i}.norm0.weight': torch.ones(3) for i in range(3)}
    tensors['mm_projector.proj.0.bias'] = torch.zeros(3)
    names = sorted(tensors)
    where = {}
    for i in range(files):
        part = {name: tensors[name] for name in names[i::files]}
        file = f'model-{i + 1}.safetensors' if files > 1 else 'model.safetensors'
        save_file(part, folder / file)
        where |= dict.fromkeys(part, file)
    if files > 1:
        (folder / 'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=where)))
    found = model.cfg.to_dict() | dict(quantization_config=quantization(group_size)) | (text or {})
    config = dict(model_type='kimi_k25', text_config=found, tie_word_embeddings=False) | outer
    (folder / 'config.json').write_text(json.dumps(config))
    return rounded


def model_of(**changes):
    torch.manual_seed(0)
    return DeepSeekV3(Config.from_preset('mini', **SIZES | changes))


def loaded(folder, **options):
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        return load_pretrained(folder, **options)


@pytest.mark.parametrize('files', [1, 3])
@pytest.mark.parametrize('group_size', [32, 12, 128])
@pytest.mark.parametrize('dtype', [None, torch.float32])
def test_a_folder_loads_as_the_model_with_rounded_experts(dtype, group_size, files, tmp_path):
    model = model_of().bfloat16()
    rounded = write_kimi(tmp_path / 'kimi', model, group_size, files)
    with pytest.warns(UserWarning) as caught:
        found = load_pretrained(tmp_path / 'kimi', dtype)
    assert [str(w.message) for w in caught] == [
        f'{tmp_path / "kimi"}: 4 tensors beside the language model are left out '
        '(1 of mm_projector, 3 of vision_tower); Eva reads text alone'
    ]
    want = DeepSeekV3(model.cfg).to(dtype or torch.bfloat16)
    state = dict(published_state_dict(found))
    assert state.keys() == rounded.keys()
    for name, tensor in state.items():
        assert tensor.equal(rounded[name].to(tensor.dtype)), name
        if not name.endswith('e_score_correction_bias'):
            assert tensor.dtype == want.dtype
    for name, tensor in want.state_dict().items():
        tensor.copy_(found.state_dict()[name])
    ids = torch.randint(50, (2, 9))
    with torch.no_grad():
        assert_close(found(ids), want.eval()(ids), rtol=0, atol=0)


def test_sizes_come_from_the_headers(tmp_path, monkeypatch):
    "A published folder has half a terabyte: no weight is read before it is wanted"
    rounded = write_kimi(tmp_path / 'kimi', model_of())
    ck = SafetensorsFolder(tmp_path / 'kimi')
    stored = {n: sum(part.nbytes for part in ck.stored_parts(n)) for n in ck}
    monkeypatch.setattr(
        SafetensorsFolder, 'stored_parts', lambda self, name: pytest.fail(f'{name}: read')
    )
    assert ck.packed and set(ck) == set(rounded)
    for name, tensor in rounded.items():
        dtype, shape = ck.shape(name)
        assert shape == tuple(tensor.shape)
        assert dtype == (torch.float32 if name in ck.packed else tensor.dtype), name
        assert ck.nbytes(name) == stored[name]


@pytest.mark.parametrize(
    'wrong',
    [
        dict(unpack_int4=lambda packed, columns: right_unpack(packed, columns) + 1),  # offset 7
        dict(unpack_int4=lambda packed, columns: right_unpack(packed, columns).flip(1)),
        dict(folder_group_size=lambda folder, packed: 16),
    ],
    ids=['offset', 'order', 'groups'],
)
def test_a_wrong_rule_would_be_seen(wrong, tmp_path, monkeypatch):
    rounded = write_kimi(tmp_path / 'kimi', model_of())
    for name, other in wrong.items():
        monkeypatch.setattr(int4, name, other)
    try:
        found = dict(published_state_dict(loaded(tmp_path / 'kimi', dtype=torch.float32)))
    except ValueError as e:
        assert 'scales for groups of 16' in str(e)
    else:
        assert not all(found[name].equal(rounded[name].float()) for name in rounded)


right_unpack = int4.unpack_int4


def test_settings_beside_the_language_model(tmp_path):
    "A quantization that the outer file names, an older model with settings at the top, kimi_k2"
    model = model_of()
    rounded = write_kimi(
        tmp_path / 'outer', model, text=dict(quantization_config=None),
        quantization_config=quantization(),
    )  # fmt: skip
    stored, _ = packed_tensors(dict(published_state_dict(model)))
    (tmp_path / 'flat').mkdir()
    save_file(stored, tmp_path / 'flat' / 'model.safetensors')
    config = model.cfg.to_dict() | dict(quantization_config=quantization())
    (tmp_path / 'flat' / 'config.json').write_text(json.dumps(config))
    folders = ['outer', 'flat', 'k2']
    write_kimi(tmp_path / 'k2', model, text=dict(model_type='kimi_k2'))
    for folder in folders:
        for name, tensor in published_state_dict(loaded(tmp_path / folder)):
            assert tensor.equal(rounded[name].float()), (folder, name)


def expected(rounded, to):
    "What a conversion makes of the rounded tensors"
    for name, tensor in rounded.items():
        if name.endswith('e_score_correction_bias'):
            yield name, tensor
        elif to == 'fp8' and FP8_WEIGHTS.search(name):
            yield name, dequantize(*quantize(tensor, (128, 128)), (128, 128)).bfloat16()
        else:
            yield name, tensor.to(torch.float32 if to == 'fp32' else torch.bfloat16)


@pytest.mark.parametrize('to', ['bf16', 'fp32', 'fp8'])
def test_conversion_unpacks_and_describes_the_language_model(to, tmp_path):
    rounded = write_kimi(tmp_path / 'kimi', model_of().bfloat16(), files=3, dtype='bfloat16')
    said = []
    seen = []
    out = convert_checkpoint(
        tmp_path / 'kimi', tmp_path / 'out', to, say=said.append,
        progress=lambda done, total: seen.append((done, total)), no_mtp=True,
    )  # fmt: skip
    assert len(said) == 1 and '4 tensors beside the language model are left out' in said[0]
    about = json.loads((out / 'config.json').read_text())
    assert about['model_type'] == 'deepseek_v3' and 'text_config' not in about
    kind = about.get('quantization_config', {}).get('quant_method')
    assert kind == ('fp8' if to == 'fp8' else None)
    assert not any('packed' in name or 'vision' in name for name in SafetensorsFolder(out))
    got = dict(published_state_dict(load_pretrained(out)))
    for name, tensor in expected(rounded, to):
        assert got[name].equal(tensor), name
    done, total = zip(*seen)
    read = sum(file.stat().st_size for file in (tmp_path / 'kimi').glob('*.safetensors'))
    assert list(done) == sorted(done) and done[-1] == total[-1] < read < total[-1] + 20_000


def test_gguf_gets_the_rounded_experts(tmp_path):
    gguf = pytest.importorskip('gguf')
    from eva.checkpoints.gguf import convert_to_gguf
    from eva.data.tokenizer import train_tokenizer

    model = model_of(vocab_size=300)
    rounded = write_kimi(tmp_path / 'kimi', model)
    train_tokenizer(['def f(x): return x\n' * 20], 280).save(str(tmp_path / 'kimi/tokenizer.json'))
    said = []
    file = convert_to_gguf(tmp_path / 'kimi', tmp_path / 'k.gguf', 'f32', say=said.append)
    assert 'left out (1 of mm_projector, 3 of vision_tower)' in said[0]
    found = {t.name: torch.tensor(t.data) for t in gguf.GGUFReader(file).tensors}
    name = 'model.layers.1.mlp.experts.2.up_proj.weight'
    assert found['blk.1.ffn_up_exps.weight'].view(4, 36, 40)[2].equal(rounded[name])


@pytest.mark.parametrize(
    'changes, said',
    [
        (dict(num_bits=8), 'num_bits=8'),
        (dict(symmetric=False), 'symmetric=False'),
        (dict(actorder='group'), "actorder='group'"),
        (dict(strategy='channel', group_size=None), "strategy='channel'"),
        (dict(type='float'), "type='float'"),
    ],
)
def test_other_layouts_are_refused_in_one_sentence(changes, said, tmp_path):
    write_kimi(
        tmp_path / 'kimi', model_of(), text=dict(quantization_config=quantization(**changes))
    )
    for use in (load_pretrained, lambda f: convert_checkpoint(f, tmp_path / 'out')):
        with pytest.raises(ValueError, match='dequantise the folder') as e:
            use(tmp_path / 'kimi')
        assert said in str(e.value) and '\n' not in str(e.value)
        assert str(tmp_path / 'kimi/config.json') in str(e.value)
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('part', ['weight_g_idx', 'weight_zero_point', 'weight_global_scale'])
def test_a_tensor_of_another_layout_is_refused(part, tmp_path):
    write_kimi(tmp_path / 'kimi', model_of())
    file = tmp_path / 'kimi/model.safetensors'
    name = f'language_model.model.layers.1.mlp.experts.0.up_proj.{part}'
    save_file(load_file(file) | {name: torch.arange(40)}, file)
    with pytest.raises(ValueError, match=f'{part}: a'):
        load_pretrained(tmp_path / 'kimi')


SCRIPT = """
import sys
import threading
import time

import torch

from eva.checkpoints.conversion import convert_checkpoint


def anonymous():
    with open('/proc/self/status') as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith('RssAnon'))


def watch():
    global peak
    while not stop:
        peak = max(peak, anonymous())
        time.sleep(0.001)


torch.randn(2048, 1024).bfloat16().float().sum()  # what PyTorch itself keeps
start = peak = anonymous()
stop = False
watcher = threading.Thread(target=watch)
watcher.start()
convert_checkpoint(*sys.argv[1:4], say=lambda text: None)
stop = True
watcher.join()
print(peak - start)
"""


def big_folder(path, files, rows=1024, columns=2048, each=8):  # 9.4 MB a file, 34 MB in bfloat16
    "A folder of packed matrices with the prefix, in several files"
    path.mkdir()
    text = Config.from_preset('mini').to_dict() | dict(quantization_config=quantization())
    (path / 'config.json').write_text(json.dumps(dict(model_type='kimi_k25', text_config=text)))
    g = torch.Generator().manual_seed(0)
    where = {}
    for i in range(files):
        part = {}
        for e in range(each):
            name = f'language_model.model.layers.{i}.mlp.experts.{e}.up_proj.weight'
            packed = torch.randint(-(2**31), 2**31, (rows, columns // 8), generator=g)
            part[f'{name}_packed'] = packed.int()
            part[f'{name}_scale'] = (torch.rand(rows, columns // 32, generator=g) + 0.1).bfloat16()
            part[f'{name}_shape'] = torch.tensor([rows, columns])
        save_file(part, path / f'model-{i}.safetensors')
        where |= dict.fromkeys(part, f'model-{i}.safetensors')
    (path / 'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=where)))


def convert(src, dst, to):
    command = [sys.executable, '-c', SCRIPT, str(src), str(dst), to]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def bytes_of(path):
    c = SafetensorsFolder(path)
    return {n: c.read(n).contiguous().view(-1).view(torch.uint8).clone() for n in c}


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='reads /proc')
def test_memory_is_that_of_a_few_tensors(tmp_path):
    big_folder(tmp_path / 'src', 16)
    peak = int(convert(tmp_path / 'src', tmp_path / 'dst', 'bf16').communicate(timeout=300)[0])
    largest = 1024 * 2048 * 4  # a matrix in float32
    size = sum(f.stat().st_size for f in (tmp_path / 'dst').glob('*.safetensors'))
    assert peak < 8 * largest < size / 7, f'{peak / 1e6:.0f} MB, {largest / 1e6:.0f} MB a matrix'


def test_killed_at_any_moment(tmp_path):
    big_folder(tmp_path / 'src', 6)
    assert convert(tmp_path / 'src', tmp_path / 'whole', 'fp8').wait(timeout=300) == 0
    rng = random.Random(0)
    part = tmp_path / 'dst.partial'
    cut = 0
    for _ in range(6):
        p = convert(tmp_path / 'src', tmp_path / 'dst', 'fp8')
        while p.poll() is None and not (
            part.exists() and any('.tmp' in f.name for f in part.iterdir())
        ):
            time.sleep(0.001)
        time.sleep(rng.uniform(0, 0.1))  # it is writing a file now
        p.send_signal(signal.SIGKILL)
        p.wait()
        if (tmp_path / 'dst').exists():
            break
        cut += any('.tmp' in f.name for f in part.iterdir())
    assert cut, 'no kill came while a file was being written'
    if not (tmp_path / 'dst').exists():
        assert convert(tmp_path / 'src', tmp_path / 'dst', 'fp8').wait(timeout=300) == 0
    a = bytes_of(tmp_path / 'whole')
    b = bytes_of(tmp_path / 'dst')
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert sorted(f.name for f in (tmp_path / 'whole').iterdir()) == sorted(
        f.name for f in (tmp_path / 'dst').iterdir()
    )


# Other software


@pytest.mark.parametrize('shape, group_size', [((3, 64), 32), ((5, 96), 32), ((2, 36), 12)])
def test_compressed_tensors_packs_and_unpacks_the_same(shape, group_size):
    pytest.importorskip('compressed_tensors')
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationConfig

    torch.manual_seed(0)
    W = torch.randn(shape)
    packed, scale = int4.quantize_int4(W, group_size)
    scheme = QuantizationConfig(**quantization(group_size)).config_groups['group_0']
    theirs = BaseCompressor.get_value_from_registry('pack-quantized')
    made = theirs.compress(dict(weight=W, weight_scale=scale), scheme)
    assert made['weight_packed'].equal(packed) and made['weight_shape'].tolist() == list(shape)
    stored = dict(weight_packed=packed, weight_scale=scale, weight_shape=torch.tensor(shape))
    restored = theirs.decompress(stored, scheme)['weight']
    ours = int4.unpack_weight([packed, scale, torch.tensor(shape)], group_size, 'w', 'f')
    assert restored.dtype == torch.bfloat16 and restored.equal(ours.bfloat16())


def kimi_of_transformers(tie=False):
    "A small model of the peer's class, with a vision tower"
    kimi = pytest.importorskip('transformers.models.kimi_k25')
    text = model_of().cfg.to_dict() | dict(rope_interleave=True)
    vision = dict(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        pos_emb_height=4, pos_emb_width=4,
    )  # fmt: skip
    config = kimi.Kimi_K25Config(
        text_config=text, vision_config=vision, projection_hidden_size=16, tie_word_embeddings=tie
    )
    torch.manual_seed(1)
    return kimi.Kimi_K25ForConditionalGeneration(config).eval()


@pytest.mark.parametrize('tie', [False, True])
def test_a_folder_that_transformers_wrote(tie, tmp_path):
    theirs = kimi_of_transformers(tie)
    theirs.save_pretrained(tmp_path / 'theirs')
    ours = loaded(tmp_path / 'theirs')
    assert ours.cfg.tie_word_embeddings == tie
    ids = torch.randint(50, (2, 9))
    with torch.no_grad():
        assert_close(ours(ids), theirs(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_transformers_reads_the_same_experts(tmp_path):
    pytest.importorskip('compressed_tensors')
    kimi = pytest.importorskip('transformers.models.kimi_k25')
    from transformers import CompressedTensorsConfig

    kimi_of_transformers().bfloat16().save_pretrained(tmp_path / 'kimi')
    file = tmp_path / 'kimi/model.safetensors'
    stored, _ = packed_tensors(load_file(file), group_size=4)  # the library wants whole groups
    save_file(stored, file, {'format': 'pt'})
    about = tmp_path / 'kimi/config.json'
    config = json.loads(about.read_text()) | dict(quantization_config=quantization(4))
    about.write_text(json.dumps(config))
    ours = loaded(tmp_path / 'kimi', dtype=torch.bfloat16).float()
    read = kimi.Kimi_K25ForConditionalGeneration.from_pretrained(
        tmp_path / 'kimi',
        dtype=torch.bfloat16,
        quantization_config=CompressedTensorsConfig(dequantize=True),
    )
    ids = torch.randint(50, (2, 9))
    with torch.no_grad():
        assert_close(ours(ids), read.float().eval()(input_ids=ids).logits, atol=1e-5, rtol=1e-5)


def test_the_language_models_settings_are_those_of_transformers():
    kimi = pytest.importorskip('transformers.models.kimi_k25')
    from eva.text_config import text_config

    text = Config.from_preset('mini', **SIZES).to_dict() | dict(model_type='kimi_k2')
    found = dict(model_type='kimi_k25', text_config=text, tie_word_embeddings=False)
    theirs = kimi.Kimi_K25Config(**copy.deepcopy(found)).text_config
    ours = Config.from_dict(text_config(found) | dict(model_type='deepseek_v3'))
    assert theirs.model_type == 'deepseek_v3'
    for name in SIZES:
        if hasattr(theirs, name):
            assert getattr(theirs, name) == getattr(ours, name), name
