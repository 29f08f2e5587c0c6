"Commands as a shell starts them: killed without a warning, resumed, and resumed where nothing is"
import contextlib, io, json, os, subprocess, sys, time
import pytest, torch
from eva.cli import eva_convert, eva_train
from eva.files import Checkpoint
from eva.train import checkpoints, read_metrics

SMALL = '--steps 14 --seq_len 32 --batch_size 2 --vocab_size 300 --precision fp32 --save_every 2 --fim 0.5 --data lines'.split()

def command(*argv):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err): code = eva_train(list(argv))
    assert code == 0, err.getvalue()
    return out.getvalue()

@pytest.mark.skipif(os.name != 'posix', reason='signals of POSIX')
def test_a_streamed_run_is_killed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'lines').mkdir()
    (tmp_path/'lines'/'a.jsonl').write_text(''.join(json.dumps(dict(text=f'def f{i}(x):\n    return x + {i}\n'*6))+'\n' for i in range(200)))
    assert 'nothing to resume in whole: starting at the beginning' in command('--out', 'whole', *SMALL, '--resume')
    p = subprocess.Popen([sys.executable, '-c', 'from eva.cli import eva_train; raise SystemExit(eva_train())', *SMALL, '--out', 'killed'], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while p.poll() is None and not any(int(o.name[5:]) >= 4 for o in checkpoints(tmp_path/'killed'/'checkpoints')): time.sleep(.01)
    p.kill(); p.wait()  # no time to save anything
    assert 'going on from step' in command('--out', 'killed', '--resume')
    assert (tmp_path/'killed'/'model.safetensors').read_bytes() == (tmp_path/'whole'/'model.safetensors').read_bytes()

def test_a_run_starts_from_eight_bits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path/'lines').mkdir()
    (tmp_path/'lines'/'a.jsonl').write_text(''.join(json.dumps(dict(text=f'def f{i}(x):\n    return x + {i}\n'*6))+'\n' for i in range(200)))
    command('--out', 'first', *SMALL, '--steps', '6')
    assert eva_convert(['first', 'eight', '--to', 'fp8']) == 0
    assert Checkpoint(tmp_path/'eight').shape('model.layers.0.mlp.down_proj.weight')[0] == torch.float8_e4m3fn
    out = command('--init', 'eight', '--data', 'lines', '--out', 'second', '--steps', '3', '--seq_len', '32', '--batch_size', '2', '--precision', 'fp32')
    assert 'everything is in second' in out
    first, second = (read_metrics(tmp_path/o/'metrics.jsonl') for o in ('first', 'second'))
    assert second[0]['loss'] < first[0]['loss']
