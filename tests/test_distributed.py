"Several processes: the same result in every layout, checkpoints for any number of ranks, exports, and ranks that die"
import hashlib, json, os, signal, subprocess, sys, time
from pathlib import Path
import pytest, torch
from safetensors.torch import load_file
from torch.testing import assert_close
import ranks
from eva.interop import load_pretrained, save_pretrained
from eva.checkpoints import checkpoints, load_checkpoint, read_metrics

HERE = Path(__file__).parent
ENV = os.environ | dict(OMP_NUM_THREADS='1', MKL_NUM_THREADS='1', PYTHONPATH=f'{HERE.parent}{os.pathsep}{os.environ.get("PYTHONPATH", "")}')
FSDP, EP, BOTH = dict(), dict(ep=4, fsdp=False), dict(ep=2)
LAYOUTS = dict(fsdp=FSDP, ep=EP, both=BOTH, copies=dict(ep=2, fsdp=False), pipeline=dict(pp=2), pipeline_ep=dict(pp=2, ep=2), dualpipev=dict(pp=2, schedule='dualpipev'), recompute=dict(ep=2, recompute=True))
MORE = dict(four_stages=dict(pp=4), zero_bubble=dict(pp=2, schedule='zero_bubble'), zbv=dict(pp=2, schedule='zbv'), ep_and_fsdp=dict(ep=4))

def together(n, out, *cases, timeout=500):
    "Start n ranks that work through the cases"
    out.mkdir(exist_ok=True)
    for o in ('train', 'held'): ranks.stream(out/f'{o}.npy')
    r = subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', str(n), str(HERE/'ranks.py'), str(out), *map(json.dumps, cases)],
                       env=ENV, capture_output=True, text=True, timeout=timeout)
    assert r.returncode == 0, '\n'.join(o for o in r.stderr.splitlines() if 'Error' in o) or r.stderr[-3000:]
    return [json.loads((out/f'{c["name"]}.json').read_text()) for c in cases]

def alone(out, **kw):
    torch.set_num_threads(1)
    return ranks.trainer(out, **kw)

def case(name, layout, dtype='float64', do='train', **kw):
    return dict(name=name, parallel=layout, do=do, run=dict(dtype=dtype) | (dict(micro_batch=1) if layout.get('pp') else {}) | kw.pop('run', {})) | kw

def compare(out, cases, got, tolerance, of_gradients=None, **kw):
    dtype = cases[0]['run']['dtype']
    rows, first = ranks.curve(alone(out/f'alone-{dtype}-{len(kw)}', dtype=dtype, **kw))
    for c, everyone in zip(cases, got):
        theirs = everyone[0]['rows']
        assert len(theirs) == len(rows) == 20
        for key in ('loss', 'grad_norm', 'mtp_loss', 'val_loss'):
            off = max(abs(a[key]-b[key]) for a, b in zip(rows, theirs) if key in a)
            print(f'{c["name"]:24} {dtype} {key}: {off:.1e}')
            assert off <= (tolerance if key != 'grad_norm' else 100*tolerance), (c['name'], key, off)
        if dtype == 'float64': assert all(a['expert_load'] == b['expert_load'] for a, b in zip(rows, theirs))
        assert all(o['rows'][-1]['loss'] == theirs[-1]['loss'] for o in everyone)  # every rank knows
        grads = load_file(out/f'{c["name"]}.safetensors')
        assert grads.keys() == first.keys()
        for n in first: assert (grads[n]-first[n]).norm() <= (of_gradients or dict(float64=1e-12, float32=1e-4)[dtype])*first[n].norm(), (c['name'], n)

@pytest.mark.parametrize('n', [2, 4])
def test_every_layout_trains_alike_in_float64(tmp_path, n):
    cases = [case(f'{k}-{n}', v) for k, v in LAYOUTS.items() if n%(v.get('ep', 1)*v.get('pp', 1)) == 0 and (n == 4 or k in ('fsdp', 'copies', 'pipeline'))]
    compare(tmp_path, cases, together(n, tmp_path, *cases), 1e-8)

def test_every_layout_trains_alike_in_float32(tmp_path):
    cases = [case(k, LAYOUTS[k], 'float32') for k in ('fsdp', 'ep', 'both', 'pipeline')]
    half = [case(f'{k}-bf16', LAYOUTS[k], 'float32', run=dict(precision='bf16', moments='bf16')) for k in ('both', 'pipeline')]
    got = together(4, tmp_path, *cases, *half)
    compare(tmp_path, cases, got[:4], 1e-3)
    compare(tmp_path, half, got[4:], 2e-2, .05, precision='bf16', moments='bf16') # bfloat16 has 8 bits of mantissa

def test_answers_are_learned_alike(tmp_path):
    "The mean over the tokens that are learned, wherever they are"
    cases = [case(f'{k}-learn', LAYOUTS[k], run=dict(learn=True, apart=True)) for k in ('fsdp', 'both')]
    compare(tmp_path, cases, together(4, tmp_path, *cases), 1e-8, learn=True, apart=True)

def test_all_ranks_go_back_together(tmp_path):
    "Past windows that made the loss jump, to the same result as one process"
    how = dict(spoil=True, steps=40, batch_size=4, seq_len=32, mtp_share=1., save_every=10, on_spike='rewind', lr=.02, muon_lr=.02, ramp=0.)
    cases = [case(f'{k}-back', LAYOUTS[k], run=how) for k in ('fsdp', 'pipeline_ep')]
    got = together(4, tmp_path, *cases)
    one = alone(tmp_path/'alone-back', dtype='float64', **how); one.fit()
    assert (one.rewound, one.passed) == (1, 24)
    want = [(r['step'], r['loss']) for r in read_metrics(one.out/'metrics.jsonl')]
    for c, everyone in zip(cases, got):
        rows = [(r['step'], r['loss']) for r in read_metrics(tmp_path/c['name']/'metrics.jsonl')]
        assert [s for s, _ in rows] == [s for s, _ in want] == list(range(1, 41))
        assert max(abs(a-b) for (_, a), (_, b) in zip(rows, want)) < 1e-8
        event, = map(json.loads, (tmp_path/c['name']/'events.jsonl').read_text().splitlines())
        assert (event['step'], event['answer']) == (36, 'back to step 30, past 24 windows')

@pytest.mark.slow
@pytest.mark.parametrize('dtype', ['float64', 'float32'])
def test_more_layouts(tmp_path, dtype):
    for n in (2, 4):
        cases = [case(f'{k}-{n}', v, dtype) for k, v in (LAYOUTS | MORE).items() if n%(v.get('ep', 1)*v.get('pp', 1)) == 0]
        compare(tmp_path, cases, together(n, tmp_path, *cases), dict(float64=1e-8, float32=1e-3)[dtype])

def same(a, b):
    assert a.keys() == b.keys(), a.keys() ^ b.keys()
    for n in a: assert torch.equal(a[n].flatten(), b[n].flatten()), n

def test_checkpoints_suit_any_number_of_ranks(tmp_path):
    layouts, short = dict(both=BOTH, pipeline_ep=dict(pp=2, ep=2)), dict(steps=6, save_every=3, keep=3, micro_batch=1)
    cases = [case(k, v, run=short) for k, v in layouts.items()]
    together(4, tmp_path, *cases)
    for k in layouts:
        first = tmp_path/k/'checkpoints'/'step-000003'
        (tmp_path/f'{k}-later').mkdir()
        (tmp_path/k/'checkpoints'/'step-000006').rename(tmp_path/f'{k}-later'/'step-000006')
        written, state = load_checkpoint(first)                            # what one process reads: the same file
        t = alone(tmp_path/k, **short)
        assert 'going on from step 3 of 6' in t.resume()
        same(t.opt.state_dict() | {f'buffer.{n}': b for n, b in t.model.named_buffers()}, {n: w for n, w in written.items() if not n.startswith('random.')})
        t.out = tmp_path/f'{k}-alone'
        t.fit()                                                            # and it goes on as four ranks did
        ours, theirs = (load_checkpoint(o/'step-000006')[0] for o in (t.out/'checkpoints', tmp_path/f'{k}-later'))
        for n in ours: assert_close(ours[n].flatten(), theirs[n].flatten(), rtol=1e-7, atol=1e-9)
    for n, layout in [(2, FSDP), (2, dict(pp=2, schedule='dualpipev')), (2, dict(ep=2, fsdp=False))]:
        cases = [case(f'{k}-{n}-{i}', layout, do='save', folder=k, resume=True, run=short) for k in layouts for i in [len(layout)]]
        together(n, tmp_path, *cases)
        for c, k in zip(cases, layouts):                                   # read by two, written again: not one bit differs
            again, = checkpoints(tmp_path/c['name']/'checkpoints')
            same(load_checkpoint(again)[0], load_checkpoint(tmp_path/k/'checkpoints'/'step-000003')[0])

def test_damage_is_found_and_said_by_all(tmp_path):
    short = dict(steps=6, save_every=3, keep=3)
    together(2, tmp_path, case('run', FSDP, run=short))
    newest = checkpoints(tmp_path/'run'/'checkpoints')[-1]/'tensors.safetensors'
    raw = bytearray(newest.read_bytes()); raw[-1] ^= 1; newest.write_bytes(raw)
    (again,), (other,) = (together(2, tmp_path, c) for c in (case('again', FSDP, do='save', folder='run', resume=True, run=short),
                                                             case('other', FSDP, do='refuse', folder='run', run=short | dict(lr=.5))))
    assert all('checksum does not match' in o['said'] and 'going on from step 3' in o['said'] for o in again)
    assert all('lr=0.003 and not 0.5' in o['said'] for o in other)
    assert len(list((tmp_path/'run'/'checkpoints').glob('damaged-*'))) == 1

def test_all_stop_where_one_is_asked(tmp_path):
    (got,) = together(2, tmp_path, case('stopped', FSDP, do='stop', run=dict(steps=9)))
    assert [(o['step'], o['saved']) for o in got] == [(3, True)]*2 and {o['why'] for o in got} == {'SIGTERM'}

def test_exports_without_gathering(tmp_path):
    wide = dict(dtype='float32', model=dict(hidden_size=128, n_routed_experts=32, n_group=4, moe_intermediate_size=384, vocab_size=67))
    cases = [case(f'export-{k}', v, do='export', run=wide) for k, v in dict(both=BOTH, fsdp=FSDP, stages=dict(pp=2, ep=2)).items()]
    got = together(4, tmp_path, *cases)
    model = alone(tmp_path/'x', **wide).model
    save_pretrained(model, tmp_path/'alone')
    for c, everyone in zip(cases, got):
        same(load_file(tmp_path/c['name']/'model.safetensors'), load_file(tmp_path/'alone'/'model.safetensors'))
        assert (tmp_path/c['name']/'config.json').read_text() == (tmp_path/'alone'/'config.json').read_text()
        print(c['name'], [f'{o["grew"]/o["model"]:.2f}' for o in everyone], 'of', f'{everyone[0]["model"]/1e6:.0f} MB')
        assert all(o['grew'] < .25*o['model'] for o in everyone)
    ids = torch.randint(67, (1, 9))
    with torch.no_grad(): assert torch.equal(load_pretrained(tmp_path/'export-both')(ids), model.eval()(ids))

START = [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc-per-node', '2']
TRAIN = '--data text.txt --vocab_size 270 --steps 24 --seq_len 32 --batch_size 4 --mtp_share 1 --precision fp32 --save_every 5 --ep 2 --device cpu'.split()

def job(folder, *options, restarts=0):
    "eva_train on two ranks, saving every fifth step"
    (folder/'text.txt').write_text('if x == 1: y = 2\nelse: y = 3\nfor i in range(10): print(i, x*y)\n'*300)
    (folder/'go.py').write_text('import sys, eva.cli\nsys.exit(eva.cli.eva_train())\n')
    return subprocess.Popen([*START, '--max-restarts', str(restarts), 'go.py', *TRAIN, '--out', 'run', *options], cwd=folder, env=ENV, text=True,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE)

def workers(launcher):
    "Processes that torchrun started, by rank"
    found = {}
    for p in Path('/proc').glob('[0-9]*'):
        try:
            if int((p/'stat').read_text().rpartition(')')[2].split()[1]) != launcher: continue
            env = dict(o.split('=', 1) for o in (p/'environ').read_text().split('\0') if '=' in o)
            if 'go.py' in (p/'cmdline').read_text() and 'RANK' in env: found[int(env['RANK'])] = int(p.name)
        except (OSError, IndexError, ValueError): continue
    return found

def kill_one(p, folder, rank, step=12, patience=240):
    "SIGKILL to one rank once the run has come so far; when that was"
    log, end = folder/'run'/'metrics.jsonl', time.time()+patience
    while time.time() < end and p.poll() is None:
        if len(read_metrics(log)) >= step and rank in (w := workers(p.pid)):
            os.kill(w[rank], signal.SIGKILL)
            return time.time()
        time.sleep(.02)
    raise AssertionError(p.communicate()[1][-2000:])

def digest(folder): return hashlib.sha256((folder/'run'/'model.safetensors').read_bytes()).hexdigest()

@pytest.fixture(scope='module')
def uninterrupted(tmp_path_factory):
    folder = tmp_path_factory.mktemp('whole')
    p = job(folder)
    out, err = p.communicate(timeout=500)
    assert p.returncode == 0, err[-2000:]
    assert [r['step'] for r in read_metrics(folder/'run'/'metrics.jsonl')] == list(range(1, 25)) and 'everything is in run' in out
    return digest(folder), [r['loss'] for r in read_metrics(folder/'run'/'metrics.jsonl')]

@pytest.mark.parametrize('rank', [0, 1])
def test_a_dead_rank_is_replaced(tmp_path, uninterrupted, rank):
    p = job(tmp_path, restarts=1)
    kill_one(p, tmp_path, rank)
    out, err = p.communicate(timeout=500)
    assert p.returncode == 0, err[-2000:]
    assert 'going on from step 10 of 24' in out or 'going on from step 15 of 24' in out, out
    rows = read_metrics(tmp_path/'run'/'metrics.jsonl')
    assert [r['step'] for r in rows] == list(range(1, 25))
    assert (digest(tmp_path), [r['loss'] for r in rows]) == uninterrupted

def test_a_dead_rank_ends_the_job_with_one_message(tmp_path, uninterrupted):
    p = job(tmp_path)
    start = kill_one(p, tmp_path, 1)
    out, err = p.communicate(timeout=500)
    took = time.time()-start
    assert p.returncode != 0 and err.count('another rank is gone') == 1 and 'Connection closed' not in err, err
    print(f'ended {took:.1f} s after the kill')
    assert took < 60
    p = job(tmp_path, '--resume')                                            # by hand
    out, err = p.communicate(timeout=500)
    assert p.returncode == 1 and 'a run goes on as it was started' in err    # with the options of the start it is refused, by one rank
    assert err.count('a run goes on as it was started') == 1
