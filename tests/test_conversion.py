"Conversion goes on after a kill at any moment, and its memory does not grow with the checkpoint"

import itertools
import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from eva.checkpoints.files import SafetensorsFolder
from eva.config import Config


def big_folder(path, files, rows=2048, columns=1024, each=8):  # 32 MB a file
    "A folder of bfloat16 matrices, 4 MB each, under names that are published in FP8"
    path.mkdir()
    (path / 'config.json').write_text(json.dumps(Config.from_preset('mini').to_dict()))
    where = {}
    for i in range(files):
        g = torch.Generator().manual_seed(i)
        part = {
            f'model.layers.{i}.mlp.experts.{e}.up_proj.weight': torch.randn(
                rows, columns, generator=g
            ).bfloat16()
            for e in range(each)
        }
        save_file(part, path / f'model-{i}.safetensors')
        where |= dict.fromkeys(part, f'model-{i}.safetensors')
    (path / 'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=where)))


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
convert_checkpoint(*sys.argv[1:4])
stop = True
watcher.join()
print(peak - start)
"""


def convert(src, dst, to):
    return subprocess.Popen(
        [sys.executable, '-c', SCRIPT, str(src), str(dst), to], stdout=subprocess.PIPE, text=True
    )


def tensors(path):
    c = SafetensorsFolder(path)
    return {n: c.read(n).view(-1).view(torch.uint8).clone() for n in c}


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='reads /proc')
def test_memory_is_that_of_a_few_tensors(tmp_path):
    big_folder(tmp_path / 'src', 24)  # 800 MB, the largest tensor 4 MB
    p = convert(tmp_path / 'src', tmp_path / 'dst', 'fp8')
    peak = int(p.communicate(timeout=300)[0])
    largest = 2048 * 1024 * 2
    size = sum(f.stat().st_size for f in (tmp_path / 'src').iterdir())
    assert peak < 12 * largest < size / 10, (
        f'{peak / 1e6:.0f} MB for tensors of {largest / 1e6:.0f} MB'
    )


def test_killed_at_any_moment(tmp_path):
    big_folder(tmp_path / 'src', 8)
    assert convert(tmp_path / 'src', tmp_path / 'whole', 'fp8').wait(timeout=300) == 0
    rng = random.Random(0)
    part = tmp_path / 'dst.partial'
    cut = 0
    for _ in range(8):
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
    a = tensors(tmp_path / 'whole')
    b = tensors(tmp_path / 'dst')
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert sorted(f.name for f in (tmp_path / 'whole').iterdir()) == sorted(
        f.name for f in (tmp_path / 'dst').iterdir()
    )  # nothing half-written stays


def small_folder(path, dtype):
    from eva.checkpoints.pretrained import save_pretrained
    from eva.model.transformer import DeepSeekV3

    torch.manual_seed(0)
    cfg = Config.from_preset(
        'mini',
        vocab_size=40,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_nope_head_dim=4,
        qk_rope_head_dim=4,
        v_head_dim=4,
        intermediate_size=16,
        moe_intermediate_size=8,
        n_routed_experts=4,
        initializer_range=0.1,
    )
    save_pretrained(DeepSeekV3(cfg).to(dtype), path)


def expected(tensors, chain):
    "What a chain of conversions makes of tensors, by definition and in memory"
    from eva.checkpoints.conversion import FP8_WEIGHTS
    from eva.fp8.formats import dequantize, quantize

    out = dict(tensors)
    for to in chain:
        for name, value in out.items():
            if name.endswith('e_score_correction_bias'):
                continue
            if to == 'fp8':
                if FP8_WEIGHTS.search(name) and not isinstance(value, tuple):
                    out[name] = quantize(value, (128, 128))
            else:
                wide = dequantize(*value, (128, 128)) if isinstance(value, tuple) else value
                out[name] = wide.to(dict(bf16=torch.bfloat16, fp32=torch.float32)[to])
    rest = next(
        v.dtype for v in out.values() if not isinstance(v, tuple) and v.dim() == 1 and len(v) == 16
    )
    return {
        n: dequantize(*v, (128, 128)).to(rest) if isinstance(v, tuple) else v
        for n, v in out.items()
    }, rest


TARGETS = 'fp8', 'bf16', 'fp32'


@pytest.mark.parametrize('start', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('chain', [*itertools.product(TARGETS, repeat=2), TARGETS], ids='-'.join)
def test_a_chain_of_conversions_does_what_it_was_told(start, chain, tmp_path):
    check_chain(start, chain, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('start', [torch.float32, torch.bfloat16])
@pytest.mark.parametrize('chain', list(itertools.product(TARGETS, repeat=3)), ids='-'.join)
def test_every_chain_of_three_conversions(start, chain, tmp_path):
    check_chain(start, chain, tmp_path)


def check_chain(start, chain, tmp_path):
    from eva.checkpoints.conversion import convert_checkpoint
    from eva.checkpoints.pretrained import load_pretrained, published_state_dict

    small_folder(tmp_path / 'at', start)
    first = dict(published_state_dict(load_pretrained(tmp_path / 'at')))
    for i, to in enumerate(chain):
        convert_checkpoint(tmp_path / ('at' if i == 0 else f'at{i - 1}'), tmp_path / f'at{i}', to)
        model = load_pretrained(tmp_path / f'at{i}')
        with torch.no_grad():
            assert model(torch.arange(8)[None]).isfinite().all()
    want, dtype = expected(first, chain)
    assert {p.dtype for p in model.parameters()} == {dtype}
    got = dict(published_state_dict(model))
    assert got.keys() == want.keys()
    for name, value in want.items():
        assert torch.equal(got[name], value), name


@pytest.mark.parametrize('value', [float('nan'), float('inf'), -1.0, 0.0])
@pytest.mark.parametrize('to', ['bf16', 'fp32', 'fp8', None])
def test_a_scale_that_no_quantiser_writes_is_refused(value, to, tmp_path):
    from safetensors.torch import load_file

    from eva.checkpoints.conversion import convert_checkpoint
    from eva.checkpoints.pretrained import load_pretrained

    small_folder(tmp_path / 'src', torch.bfloat16)
    convert_checkpoint(tmp_path / 'src', tmp_path / 'eight', 'fp8')
    file = tmp_path / 'eight' / 'model.safetensors'
    tensors = load_file(file)
    name = 'model.layers.0.self_attn.o_proj.weight_scale_inv'
    save_file(tensors | {name: torch.full_like(tensors[name], value)}, file)
    with pytest.raises(ValueError, match=f'{name}: {value} in model.safetensors'):
        load_pretrained(tmp_path / 'eight') if to is None else convert_checkpoint(
            tmp_path / 'eight', tmp_path / 'out', to
        )
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    'where', ['.', 'src', 'src/inside', 'src/a/b', 'link/inside', 'src/../src', 'src.partial']
)
def test_an_output_in_or_around_the_source_is_refused(where, tmp_path):
    from eva.checkpoints.conversion import convert_checkpoint

    small_folder(tmp_path / 'src', torch.float32)
    (tmp_path / 'link').symlink_to(tmp_path / 'src')
    before = {p: p.read_bytes() for p in (tmp_path / 'src').iterdir()}
    source = tmp_path / 'src'
    if where == 'src.partial':
        source.rename(tmp_path / 'src.partial')
        source = tmp_path / 'src.partial'
        where = 'src'
        before = {}
        (tmp_path / 'link').unlink()
    with pytest.raises(
        ValueError, match='is the source itself|lies inside of the source|holds the source'
    ):
        convert_checkpoint(source, tmp_path / where)
    assert all(p.read_bytes() == raw for p, raw in before.items())
    assert sorted(p.name for p in source.iterdir() if p.name[0] != '.') == [
        'README.md',
        'config.json',
        'generation_config.json',
        'model.safetensors',
    ]
