"Conversion of checkpoints: killed at any moment it goes on, and its memory does not grow with the checkpoint"
import json, random, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from safetensors.torch import save_file
from eva.config import Config
from eva.files import Checkpoint

def big_folder(path, files, rows=2048, columns=1024, each=8): # 32 MB a file
    "A folder of bfloat16 matrices, 4 MB each, under names that are published in FP8"
    path.mkdir()
    (path/'config.json').write_text(json.dumps(Config.preset('mini').to_json()))
    where = {}
    for i in range(files):
        g = torch.Generator().manual_seed(i)
        part = {f'model.layers.{i}.mlp.experts.{e}.up_proj.weight': torch.randn(rows, columns, generator=g).bfloat16() for e in range(each)}
        save_file(part, path/f'model-{i}.safetensors')
        where |= dict.fromkeys(part, f'model-{i}.safetensors')
    (path/'model.safetensors.index.json').write_text(json.dumps(dict(weight_map=where)))

SCRIPT = '''
import sys, threading, time, torch
from eva.interop import convert_checkpoint
def anonymous(): return next(int(l.split()[1])*1024 for l in open('/proc/self/status') if l.startswith('RssAnon'))
torch.randn(2048, 1024).bfloat16().float().sum() # what PyTorch itself keeps
start = peak = anonymous(); stop = False
def watch():
    global peak
    while not stop: peak = max(peak, anonymous()); time.sleep(.001)
t = threading.Thread(target=watch); t.start()
convert_checkpoint(*sys.argv[1:4])
stop = True; t.join(); print(peak-start)
'''
def convert(src, dst, to): return subprocess.Popen([sys.executable, '-c', SCRIPT, str(src), str(dst), to], stdout=subprocess.PIPE, text=True)

def tensors(path):
    c = Checkpoint(path)
    return {n: c.read(n).view(-1).view(torch.uint8).clone() for n in c}

@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='reads /proc')
def test_memory_is_that_of_a_few_tensors(tmp_path):
    big_folder(tmp_path/'src', 24) # 800 MB, the largest tensor 4 MB
    p = convert(tmp_path/'src', tmp_path/'dst', 'fp8')
    peak = int(p.communicate(timeout=300)[0])
    largest, size = 2048*1024*2, sum(f.stat().st_size for f in (tmp_path/'src').iterdir())
    assert peak < 12*largest < size/10, f'{peak/1e6:.0f} MB for tensors of {largest/1e6:.0f} MB'

def test_killed_at_any_moment(tmp_path):
    big_folder(tmp_path/'src', 8)
    assert convert(tmp_path/'src', tmp_path/'whole', 'fp8').wait(timeout=300) == 0
    rng, part, cut = random.Random(0), tmp_path/'dst.partial', 0
    for _ in range(8):
        p = convert(tmp_path/'src', tmp_path/'dst', 'fp8')
        while p.poll() is None and not (part.exists() and any('.tmp' in f.name for f in part.iterdir())): time.sleep(.001)
        time.sleep(rng.uniform(0, .1)) # it is writing a file now
        p.send_signal(signal.SIGKILL); p.wait()
        if (tmp_path/'dst').exists(): break
        cut += any('.tmp' in f.name for f in part.iterdir())
    assert cut, 'no kill came while a file was being written'
    if not (tmp_path/'dst').exists(): assert convert(tmp_path/'src', tmp_path/'dst', 'fp8').wait(timeout=300) == 0
    a, b = tensors(tmp_path/'whole'), tensors(tmp_path/'dst')
    assert a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)
    assert sorted(f.name for f in (tmp_path/'whole').iterdir()) == sorted(f.name for f in (tmp_path/'dst').iterdir()) # nothing half-written stays
