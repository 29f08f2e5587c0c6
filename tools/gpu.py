"""Measure on a GPU what no CPU can, for a file that the chapters show: `python tools/gpu.py`

Agreement first (bytes of the GPU equal to the CPU's, products within what their order of summation
allows), then times: block-scaled products against the chip's peak, and a training step of V3-shaped
layers in fp32, bf16 and FP8.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from eva.config import Config
from eva.fileio.atomic import atomic_write as replacing
from eva.fp8.backends import native_matmul, unsupported_reason
from eva.fp8.formats import dequantize, quantize, snr_db
from eva.fp8.linear import PRODUCTS, convert
from eva.fp8.recipes import RECIPES
from eva.moe.experts import MLP, Experts

PEAK = {
    'H100': 1979e12,
    'H200': 1979e12,
    'H800': 1979e12,
}  # dense FP8 of the SXM boards by the data sheet, FLOPs per second


def seconds(f, device, repeat):
    "Median time of a call"
    wait = torch.cuda.synchronize if device.type == 'cuda' else lambda: None
    for _ in range(3):
        f()
    times = []
    for _ in range(repeat):
        wait()
        start = time.perf_counter()
        f()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def agreement(device, size):
    "What the device computes against what the CPU does"
    torch.manual_seed(0)
    out = {}
    x = torch.randn(size, size) * torch.randn(size, 1).exp()
    for name in ('block', 'block_pow2', 'tensor'):
        r = RECIPES[name]
        (q, s), (q2, s2) = (
            quantize(x, r.x, r.fmt, r.pow2),
            quantize(x.to(device), r.x, r.fmt, r.pow2),
        )
        out[f'{name}: bytes that differ'] = (
            (q.view(torch.uint8) != q2.cpu().view(torch.uint8)).sum().item()
        )
        out[f'{name}: scales that differ'] = (s != s2.cpu()).sum().item()
        if unsupported_reason('native', device, r):
            continue
        W = torch.randn(size, size)
        want = dequantize(q, s, r.x) @ dequantize(*quantize(W, r.w, r.fmt, r.pow2), r.w).T
        got = native_matmul(x.to(device), W.to(device), r, 'xw', torch.bfloat16).float().cpu()
        out[f'{name}: product, dB against emulation'] = round(snr_db(want, got), 1)
    return out


def scaled_product(a, b):
    "A call that multiplies two matrices in blocks, which are quantised beforehand"
    kinds = F.ScalingType
    (qa, sa), (qb, sb) = quantize(a), quantize(b, (128, 128))
    return partial(
        F.scaled_mm,
        qa,
        qb.T,
        scale_a=sa.T.contiguous().T,
        scale_recipe_a=kinds.BlockWise1x128,
        scale_b=nn.functional.pad(sb, (0, -sb.shape[1] % 4)).T,
        scale_recipe_b=kinds.BlockWise128x128,
        output_dtype=torch.bfloat16,
    )


def products(device, sizes, repeat):
    "Block-scaled products alone: operands are quantised beforehand"
    rows = []
    for m, n, k in sizes:
        a, b = (torch.randn(o, k, device=device, dtype=torch.bfloat16) for o in (m, n))
        calls = dict(bf16=partial(torch.matmul, a, b.T))
        if not unsupported_reason('native', device, 'block'):
            calls['fp8'] = scaled_product(a, b)
        row = dict(m=m, n=n, k=k)
        for name, call in calls.items():
            row[name] = 2 * m * n * k / seconds(call, device, repeat) / 1e12
        rows.append(row)
    return rows


def step(layer, x, *routing):
    "A forward and a backward pass"
    layer[0](x, *routing).square().mean().backward()
    layer.zero_grad()
    x.grad = None


def steps(device, hidden, width, experts, tokens, repeat):
    "Forward and backward of a dense layer and of experts, by precision and backend"
    out = {}
    cfg = Config.from_preset(
        'v3',
        hidden_size=hidden,
        moe_intermediate_size=width,
        n_routed_experts=experts,
        n_group=1,
        topk_group=1,
    )
    for part in ('dense', 'experts'):
        for name in ('fp32', 'bf16', *(b for b in PRODUCTS)):
            torch.manual_seed(0)
            dtype = torch.float32 if name == 'fp32' else torch.bfloat16
            if name in PRODUCTS and unsupported_reason(name, device, 'block_pow2'):
                continue
            layer = nn.Sequential(MLP(hidden, width * 4) if part == 'dense' else Experts(cfg)).to(
                device, dtype
            )
            if name in PRODUCTS:
                convert(layer, 'block_pow2', name)
            x = torch.randn(tokens, hidden, device=device, dtype=dtype, requires_grad=True)
            indices = torch.rand(tokens, experts, device=device).topk(min(8, experts))[1]
            routing = (torch.ones_like(indices, dtype=torch.float32), indices)
            call = partial(step, layer, x, *(() if part == 'dense' else routing))
            out[f'{part}, {name}'] = 1e3 * seconds(call, device, repeat)
    return out


def main(argv=None):
    p = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    p.add_argument('--device', default='cuda', help='cuda, or cpu to try the script itself')
    p.add_argument('--small', action='store_true', help='sizes for trying the script')
    p.add_argument(
        '--no_tests', action='store_true', help='leave out the tests and cells flagged cuda'
    )
    p.add_argument(
        '--out',
        type=Path,
        default=Path(__file__).parents[1] / 'eva' / 'results' / 'gpu_fp8.json',
        help='file to write',
    )
    a = p.parse_args(argv)
    device = torch.device(a.device)
    if device.type == 'cuda' and not torch.cuda.is_available():
        sys.exit('PyTorch sees no GPU here; --device cpu --small --out FILE tries the script')
    if device.type == 'cpu' and a.out == p.get_default('out'):
        sys.exit(
            '--device cpu: figures of a CPU do not belong into the file of a GPU; give --out FILE'
        )
    machine = (
        torch.cuda.get_device_name()
        if device.type == 'cuda'
        else f'a CPU with {os.cpu_count()} cores'
    )
    repeat, size = (3, 256) if a.small else (20, 4096)
    sizes = (
        [(256, 256, 256)]
        if a.small
        else [
            (m, n, k)
            for m in (4096, 16384)
            for n, k in ((4096, 7168), (7168, 2048), (18432, 7168), (24576, 1536))
        ]
    )
    peak = next((v for k, v in PEAK.items() if k in machine), math.nan)
    result = dict(
        machine=machine,
        torch=torch.__version__,
        cuda=torch.version.cuda,
        date=time.strftime('%Y-%m-%d'),
        peak_fp8_tflops=None if math.isnan(peak) else peak / 1e12,
        absent={b: why for b in PRODUCTS if (why := unsupported_reason(b, device, 'block_pow2'))},
        agreement=agreement(device, 256 if a.small else 2048),
        products=products(device, sizes, repeat),
        steps=steps(device, *((256, 128, 8, 256) if a.small else (7168, 2048, 16, 8192)), repeat),
    )
    if device.type == 'cuda' and not a.no_tests:
        root = Path(__file__).parents[1]
        commands = dict(
            pytest=[sys.executable, '-m', 'pytest', '-q', 'tests/test_cuda.py', '--flags', 'cuda'],
            cells=['nbdev_test', '--n_workers', '1', '--flags', 'cuda', '--file_re', '0[78]'],
        )
        result['tests'] = {
            n: subprocess.run(c, cwd=root).returncode == 0 for n, c in commands.items()
        }
    a.out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(a.out) as t:
        t.write_text(json.dumps(result, indent=1) + '\n')
    print(json.dumps(result, indent=1))


if __name__ == '__main__':
    main()
