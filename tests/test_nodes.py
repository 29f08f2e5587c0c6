"""Several agents of torchrun, each on an address or in a network of its own, as on several nodes

A node that is slow, a node that dies, a rank that dies, fewer nodes, a rendezvous that fails, a
check, and a job of Slurm.
"""

import contextlib
import errno
import fcntl
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.torch import load_file
from test_distributed import ENV, HERE

from eva.distributed import measurements
from eva.distributed.health import run_check
from eva.distributed.launch import launch
from eva.training.checkpointing import read_metrics

ROOT = HERE.parent
SLURM = ROOT / 'tools' / 'slurm'
pytestmark = pytest.mark.skipif(sys.platform != 'linux', reason='addresses of Linux')
PATHS = ENV | dict(PYTHONPATH=f'{HERE}{os.pathsep}{ENV["PYTHONPATH"]}')
STEPS = 40
SMALL = dict(vocab_size=270, steps=STEPS, seq_len=16, batch_size=4, mtp_batch_ratio=1, save_every=4)
FIXED = dict(precision='fp32', device='cpu', data='text.txt', out='run', on_spike='log')
FIXED |= dict(lr=0.002, muon_lr=0.002)
# A node counts as lost after twelve seconds, and the others wait for another one
SOON = 'join_timeout=300,read_timeout=300,last_call_timeout=4'
SOON += ',keep_alive_interval=3,keep_alive_max_attempt=4'
# Steps take so long that a signal comes in time, and longer on the node that is slow
GO = """
import os, sys, time
from eva.config import PRESETS
from sizes import TINY
PRESETS['mini'] |= TINY
from eva.cli.train import eva_train
if 'TORCHELASTIC_RUN_ID' in os.environ:
    from eva.distributed.parallel import Parallel
    right = Parallel.gradients
    def slowly(*args):
        time.sleep(float(os.environ.get('PACE', 0.1)))
        return right(*args)
    Parallel.gradients = slowly
    Parallel.straggler_seconds = float(os.environ.get('REPORT', 10))
sys.exit(eva_train())
"""


def prepared(folder):
    "A folder with a text and a command of ranks; a port"
    text = 'if x == 1: y = 2\nelse: y = 3\nfor i in range(10): print(i, x*y)\n' * 300
    (folder / 'text.txt').write_text(text)
    (folder / 'go.py').write_text(GO)
    with socket.create_server(('127.0.0.1', 0)) as server:
        return server.getsockname()[1]


def arguments(**options):
    "Options of eva_train as words"
    given = FIXED | SMALL | options
    words = [(f'--{name}', str(value)) for name, value in given.items() if value is not True]
    return [w for pair in words for w in pair] + [f'--{n}' for n, v in given.items() if v is True]


def agent(folder, port, number, nodes, *options, within=(), host='127.0.0', restarts=3, **env):
    """Start the agent of one node

    Node 2 has the store of the rendezvous."""
    address = f'{host}.{number}'
    where = ['--rdzv-backend', 'c10d', '--rdzv-endpoint', f'{host}.2:{port}', '--rdzv-id', 'job']
    counts = ['--nnodes', nodes, '--nproc-per-node', '1', '--max-restarts', str(restarts)]
    return subprocess.Popen(
        [*within, sys.executable, '-m', 'eva.distributed.launch', *counts, *where]
        + ['--rdzv-conf', f'{SOON},is_host={int(number == 2)}', '--local-addr', address, 'go.py']
        + [*options],
        cwd=folder,
        env=PATHS | env,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )


def when(folder, step, *agents, patience=500):
    "Wait until the run has come so far"
    end = time.time() + patience
    while len(read_metrics(folder / 'run' / 'metrics.jsonl')) < step:
        ended = [p.communicate() for p in agents if p.poll() is not None]
        assert not ended and time.time() < end, ended
        time.sleep(0.1)


def children(p):
    "Process ids of the ranks that an agent started"
    found = subprocess.run(['ps', '-o', 'pid=', '--ppid', str(p.pid)], capture_output=True)
    return [int(pid) for pid in found.stdout.split()]


def kill(p):
    "Kill an agent and its ranks, each of which has a session of its own, as the end of a node does"
    p.send_signal(signal.SIGSTOP)  # so that no rank is started anew
    for pid in [*children(p), p.pid]:
        os.kill(pid, signal.SIGKILL)
    p.wait()


def environment(p, name):
    "A variable in the environments of the ranks that an agent started"
    found = []
    for pid in children(p):
        with contextlib.suppress(OSError):  # it may just have ended
            found += re.findall(
                rf'(?:^|\0){name}=([^\0]*)', Path(f'/proc/{pid}/environ').read_text()
            )
    return found


def stop(*agents):
    "Kill what still runs"
    for p in agents:
        if p.poll() is None:
            kill(p)


def ended(*agents):
    "Exit codes and what was printed"
    try:
        told = [p.communicate(timeout=600) for p in agents]
    finally:
        stop(*agents)
    return [(p.returncode, out, err) for p, (out, err) in zip(agents, told)]


def events(folder):
    "What the run logged besides numbers"
    path = folder / 'run' / 'events.jsonl'
    rows = read_metrics(path) if path.exists() else []
    return [row['message'] for row in rows if row['kind'] == 'slow_rank']


def test_a_slow_node_is_named_and_the_run_goes_on_without_it(tmp_path):
    "Of two nodes one is slow, is named, and dies; the other goes on from the checkpoint alone"
    port = prepared(tmp_path)
    options = arguments(resume=True, steps=100_000)
    first = agent(tmp_path, port, 2, '1:2', *options, PACE='0', REPORT='2')
    second = agent(tmp_path, port, 3, '1:2', *options, PACE='0.5', REPORT='2')
    try:
        end = time.time() + 500
        while not events(tmp_path):
            assert first.poll() is None and second.poll() is None and time.time() < end
            time.sleep(0.2)
        when(tmp_path, 6, first, second)  # after a checkpoint
        kill(second)
        lost = len(read_metrics(tmp_path / 'run' / 'metrics.jsonl'))
        while environment(first, 'WORLD_SIZE') != ['1']:
            assert first.poll() is None and time.time() < end
            time.sleep(0.2)
        when(tmp_path, lost + 5, first)
        first.send_signal(signal.SIGTERM)
        ((code, out, err),) = ended(first)
    finally:
        stop(first, second)
    (said,) = {re.sub(r'[\d.]+ times', 'N times', s) for s in events(tmp_path)}
    assert re.match(r'rank 1 on \S+ takes N times as long as the others', said), said
    assert code == 128 + signal.SIGTERM, err[-3000:]
    at = int(re.search(r'going on from step (\d+) of 100000', out)[1])
    assert lost - 8 <= at <= lost + 1 and 'nothing is lost' in out, out
    rows = read_metrics(tmp_path / 'run' / 'metrics.jsonl')
    assert [r['step'] for r in rows] == list(range(1, len(rows) + 1))
    assert 'another rank is gone' in err and 'Traceback' not in err, err


def test_a_rendezvous_that_fails_is_one_sentence(capfd):
    "The second node never comes"
    conf = ['--rdzv-conf', 'join_timeout=1', '--rdzv-id', 'job', '--nnodes', '2']
    where = ['--rdzv-backend', 'c10d', '--rdzv-endpoint', '127.0.0.1:0']
    assert launch([*where, *conf, '--no-python', 'true']) == 1
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith('launch: ')]
    assert len(said) == 1
    assert '127.0.0.1:0: no rendezvous of 2 nodes for --rdzv-id job (timeout)' in said[0], said
    assert said[0].endswith(
        'start the same command on every node, and see that the first node is '
        'up and that this port is open'
    )


@pytest.mark.slow
def test_a_dead_node_leaves_a_run_of_fewer_ranks(tmp_path):
    "Two nodes, of which one is killed with its ranks; the other goes on from the checkpoint alone"
    port = prepared(tmp_path)
    options = arguments(resume=True)
    first, second = (agent(tmp_path, port, n, '1:2', *options) for n in (2, 3))
    when(tmp_path, 10, first, second)
    kill(second)
    ((code, out, err),) = ended(first)
    assert code == 0, err[-3000:]
    assert re.search(r'going on from step \d+ of 40', out), out
    rows = read_metrics(tmp_path / 'run' / 'metrics.jsonl')
    assert [r['step'] for r in rows] == list(range(1, STEPS + 1))
    assert 'another rank is gone' in err and 'Traceback' not in err, err
    one = subprocess.run(  # the same run by one process
        [sys.executable, 'go.py', *arguments(out='alone')],
        cwd=tmp_path,
        env=PATHS,
        capture_output=True,
        text=True,
    )
    assert one.returncode == 0, one.stderr[-2000:]
    alone = read_metrics(tmp_path / 'alone' / 'metrics.jsonl')
    off = max(abs(a['loss'] - b['loss']) for a, b in zip(alone, rows))
    print(f'losses of one process and of two nodes, then one: within {off:.1e}')
    assert off < 1e-3
    found, want = (load_file(tmp_path / o / 'model.safetensors') for o in ('run', 'alone'))
    assert all((found[n] - want[n]).norm() < 1e-2 * (1 + want[n].norm()) for n in want)


@pytest.mark.slow
def test_a_layout_that_fewer_nodes_cannot_run(tmp_path):
    "The experts are shared by two ranks: one alone refuses, in one sentence"
    port = prepared(tmp_path)
    options = arguments(resume=True, ep=2)
    agents = [agent(tmp_path, port, n, '1:2', *options, restarts=1) for n in (2, 3)]
    when(tmp_path, 10, *agents)
    kill(agents[1])
    ((code, _, err),) = ended(agents[0])
    assert code == 1
    assert err.count('ep=2: must divide the 1 replicas of a stage') == 1
    assert 'Traceback' not in err, err


@pytest.mark.slow
@pytest.mark.parametrize('place', [0, 1])
def test_a_dead_rank_is_replaced_on_both_nodes(tmp_path, place):
    "The agents count different numbers of restarts, and their ranks find each other all the same"
    port = prepared(tmp_path)
    agents = [agent(tmp_path, port, n, '2', *arguments(resume=True, ep=2)) for n in (2, 3)]
    for step in (6, 14):
        when(tmp_path, step, *agents)
        os.kill(children(agents[place])[0], signal.SIGKILL)
    told = ended(*agents)
    assert [code for code, _, _ in told] == [0, 0], told
    assert sum(out.count('going on from step') for _, out, _ in told) == 2
    rows = read_metrics(tmp_path / 'run' / 'metrics.jsonl')
    assert [r['step'] for r in rows] == list(range(1, STEPS + 1))


@pytest.mark.slow
def test_a_signal_to_all_agents_saves_and_stops(tmp_path):
    "As Slurm does it before the time of a job is over; the job goes on when it is submitted again"
    port = prepared(tmp_path)
    options = arguments(resume=True, steps=100_000, save_every=10**6, async_save=True)
    agents = [agent(tmp_path, port, n, '2', *options) for n in (2, 3)]
    when(tmp_path, 5, *agents)
    for p in agents:
        os.kill(p.pid, signal.SIGTERM)
    told = ended(*agents)
    assert [code for code, _, _ in told] == [128 + signal.SIGTERM] * 2, told
    assert sum('nothing is lost' in out for _, out, _ in told) == 1, told
    steps = len(read_metrics(tmp_path / 'run' / 'metrics.jsonl'))
    assert (tmp_path / 'run' / 'checkpoints' / f'step-{steps:06d}').is_dir()


@pytest.mark.slow
def test_check(tmp_path):
    "Two nodes pass; with a folder that only one of them sees, the other one is named"
    port = prepared(tmp_path)
    agents = [agent(tmp_path, port, n, '2', *arguments(check=True)) for n in (2, 3)]
    told = ended(*agents)
    assert [code for code, _, _ in told] == [0, 0], told
    shown = ''.join(out for _, out, _ in told)
    assert '2 ranks on one node: no fault found' in shown and 'all_to_all: latency' in shown
    assert not (tmp_path / 'run').exists()
    agents = [
        agent(tmp_path, port, n, '2', *arguments(check=True, out=f'run{n}'), restarts=0)
        for n in (2, 3)
    ]
    told = ended(*agents)
    assert [code for code, _, _ in told] == [1, 1], told
    shown = ''.join(out for _, out, _ in told)
    assert shown.count('fault: ') == 1 and 'does not see what rank 0 writes' in shown, shown


def test_the_patience_of_a_check_is_that_of_all_its_parts(tmp_path, monkeypatch):
    "Both checks that wait for other nodes wait as long as `run_check` is told"
    waited = []

    def see(folder, ranks, seconds):
        waited.append(('visible', seconds))
        return 0.0, []

    def replace(folder, ranks, sees, seconds=-1.0):
        waited.append(('replaced', seconds))
        return []

    monkeypatch.setattr(measurements, 'check_visible', see)
    monkeypatch.setattr(measurements, 'check_replacement', replace)
    said = []
    assert run_check(tmp_path / 'run', 'cpu', said.append, seconds=0.25) == 0, said
    assert waited == [('visible', 0.25), ('replaced', 0.25)]


def test_a_storage_that_cannot_lock_is_one_sentence(tmp_path, monkeypatch):
    "As on Lustre without its mount option, where the system refuses each lock"

    def refuse(*args):
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))

    monkeypatch.setattr(fcntl, 'flock', refuse)
    said = []
    assert run_check(tmp_path / 'run', 'cpu', said.append) == 1
    assert re.fullmatch(
        rf'fault: rank 0 on \S+: cannot lock {tmp_path}/run \(Function not implemented\): '
        'mount it with shared locks',
        said[-1],
    ), said
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_a_node_that_mounts_the_folder_for_reading_only(tmp_path):
    "Its rank is named, and the other one does not wait for it"
    (tmp_path / 'shared').mkdir()
    mount = 'mount --bind shared shared && mount -o remount,bind,ro shared && exec "$@"'
    within = ['unshare', '--mount', 'sh', '-c', mount, 'sh']
    tried = subprocess.run([*within, 'touch', 'shared/x'], cwd=tmp_path, capture_output=True)
    if b'Read-only file system' not in tried.stderr:
        pytest.skip('mount namespaces need root')
    port = prepared(tmp_path)
    options = arguments(check=True, out='shared/run')
    first = agent(tmp_path, port, 2, '2', *options, restarts=0)
    second = agent(tmp_path, port, 3, '2', *options, restarts=0, within=within)
    told = ended(first, second)
    assert [code for code, _, _ in told] == [1, 1], told
    shown = ''.join(out for _, out, _ in told)
    faults = re.findall(r'^fault: (.*)', shown, flags=re.M)
    assert len(faults) == 1, told
    assert re.fullmatch(
        r'rank 1 on \S+: cannot write in shared/run \(Read-only file system\): mount it for '
        'writing on every node',
        faults[0],
    ), faults


def network(*words):
    return subprocess.run(['ip', *words], capture_output=True).returncode == 0


@pytest.fixture
def two_networks():
    "Two network namespaces, joined by a cable that can be pulled"
    names = [f'eva{os.getpid()}a', f'eva{os.getpid()}b']
    if os.geteuid() or not network('netns', 'add', names[0]):
        pytest.skip('network namespaces need root')
    try:
        network('netns', 'add', names[1])
        cable = [f'v{os.getpid()}a', f'v{os.getpid()}b']
        assert network('link', 'add', cable[0], 'type', 'veth', 'peer', 'name', cable[1])
        for number, (name, end) in enumerate(zip(names, cable), 2):
            assert network('link', 'set', end, 'netns', name)
            assert network('-n', name, 'addr', 'add', f'10.77.0.{number}/24', 'dev', end)
            for device in (end, 'lo'):
                assert network('-n', name, 'link', 'set', device, 'up')
        yield names, cable
    finally:
        for name in names:
            network('netns', 'del', name)


def so_far(stream):
    "What a process has written and nobody has read, of a pipe that does not block"
    try:
        return os.read(stream.fileno(), 1 << 16).decode(errors='replace')
    except BlockingIOError:
        return ''


@pytest.mark.slow
def test_a_node_whose_cable_is_pulled_is_named(tmp_path, two_networks):
    "No connection is closed, and nothing answers: within a minute it is said which rank is silent"
    names, cable = two_networks
    port = prepared(tmp_path)
    agents = []
    for n, (name, end) in enumerate(zip(names, cable), 2):
        within = ['ip', 'netns', 'exec', name, 'env', f'GLOO_SOCKET_IFNAME={end}']
        options = arguments(resume=True, steps=100_000, save_every=1000)
        agents.append(agent(tmp_path, port, n, '2', *options, within=within, host='10.77.0'))
    try:
        when(tmp_path, 10, *agents)
        time.sleep(25)  # two reports of each rank
        first = agents[0 if environment(agents[0], 'RANK') == ['0'] else 1]
        assert network('-n', names[1], 'link', 'set', cable[1], 'down')
        start = time.time()
        os.set_blocking(first.stderr.fileno(), False)
        said = ''
        while 'has not reported' not in said and time.time() < start + 90:
            said += so_far(first.stderr)
            time.sleep(0.5)
        took = time.time() - start
        print(f'named after {took:.0f} s: {said[-300:]}')
        assert 'rank 1 on' in said and took < 60
    finally:
        stop(*agents)


# ---- Slurm

SRUN = """#!/usr/bin/env bash
# as srun starts one task on each node: here each has an address of its own
while [[ "$1" == --* ]]; do shift; done
for n in 2 3; do EVA_ADDRESS=127.0.0.$n SLURM_PROCID=$((n - 2)) "$@" & pids+=($!); done
code=0
for pid in "${pids[@]}"; do wait "$pid" || code=$?; done
exit $code
"""
SCONTROL = """#!/usr/bin/env bash
[ "$1 $2 $3" = 'show hostnames 127.0.0.[2-3]' ] || exit 1
# as one that writes many names: the pipe of a reader of one line breaks
echo 127.0.0.2
sleep 0.2
for n in {3..2000}; do echo 127.0.0.$n; done
"""


@pytest.mark.parametrize('script', sorted(SLURM.iterdir()), ids=lambda p: p.name)
def test_scripts_are_sound(script):
    done = subprocess.run(['bash', '-n', script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    'environ, words, said',
    [
        ({}, [], 'no command'),
        ({}, ['true'], 'EVA_ENDPOINT: not set, and this is no Slurm job'),
        (dict(EVA_ENDPOINT='a:1'), ['true'], 'EVA_JOB: not set'),
    ],
)
def test_the_script_says_what_is_missing(environ, words, said):
    clean = {k: v for k, v in ENV.items() if not k.startswith(('SLURM_', 'EVA_'))}
    done = subprocess.run(
        ['bash', SLURM / 'node.sh', *words], env=clean | environ, capture_output=True, text=True
    )
    assert done.returncode == 1 and done.stderr.count('\n') == 1 and said in done.stderr


@pytest.mark.slow
def test_a_job_of_slurm(tmp_path):
    "The batch script with srun and scontrol that start two agents here: check, train, go on"
    port = prepared(tmp_path)
    (tmp_path / 'bin').mkdir()
    for name, text in (('srun', SRUN), ('scontrol', SCONTROL)):
        (tmp_path / 'bin' / name).write_text(text)
        (tmp_path / 'bin' / name).chmod(0o755)
    command = f'#!/usr/bin/env bash\nexec {sys.executable} {tmp_path}/go.py "$@"\n'
    (tmp_path / 'bin' / 'eva_train').write_text(command)
    (tmp_path / 'bin' / 'eva_train').chmod(0o755)
    path = f'{tmp_path}/bin:{Path(sys.executable).parent}:{os.environ["PATH"]}'
    slurm = dict(SLURM_JOB_NODELIST='127.0.0.[2-3]', SLURM_JOB_ID='7', SLURM_JOB_NUM_NODES='2')
    env = ENV | slurm | dict(PATH=path, EVA_SCRIPTS=str(SLURM), EVA_PORT=str(port), EVA_RANKS='1')
    env |= dict(PYTHONPATH=PATHS['PYTHONPATH'])
    for again in (False, True):
        done = subprocess.run(
            ['bash', SLURM / 'train.sbatch', *arguments()],
            cwd=tmp_path,
            env=env,
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        assert 'no fault found' in done.stdout
        said = 'this run is finished' if again else 'everything is in run'
        assert said in done.stdout, done.stdout
