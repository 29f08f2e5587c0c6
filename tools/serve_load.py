"""Measure `eva_serve` under load with OpenAI's client, and llama.cpp's server beside it

`python tools/serve_load.py DIR [--gguf FILE] [--out FIGURES.json]`: DIR is a folder of `eva_train`,
FILE the same weights as GGUF. Each server runs in a process of its own, with each number of
threads; all get the same prompts, one server after the other at each number of clients.
"""

import argparse
import asyncio
import itertools
import json
import re
import statistics
import subprocess
import sys
import sysconfig
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import openai

from eva.benchmarks.harness import machine

LLAMA_SERVER = """
import sys, threading, xllamacpp
path, parallel, context, threads = sys.argv[1], *map(int, sys.argv[2:5])
params = xllamacpp.CommonParams()
params.model.path = path
params.n_parallel = parallel
params.n_ctx = parallel * context
params.n_gpu_layers = 0
params.cpuparams.n_threads = threads
params.cpuparams_batch.n_threads = threads
params.port = 0
params.hostnames = ['127.0.0.1']
params.warmup = True
server = xllamacpp.Server(params)
print(server.listening_address, flush=True)
threading.Event().wait()
"""


@dataclass
class Load:
    "What one run of clients measured"

    server: str  # its name
    threads: int  # of the server
    clients: int  # that ask at once
    requests: int = 0  # answered
    tokens: int = 0  # generated
    seconds: float = 0.0  # of the run
    first: list[float] = field(default_factory=list)  # seconds to the first piece of text
    between: list[float] = field(default_factory=list)  # seconds between two pieces

    def row(self) -> dict:
        "The figures of the table"
        return dict(
            server=self.server,
            threads=self.threads,
            clients=self.clients,
            requests=self.requests,
            tokens=self.tokens,
            tokens_per_second=round(self.tokens / self.seconds, 1),
            first_ms=quantiles(self.first),
            between_ms=quantiles(self.between),
        )


def quantiles(seconds: list[float]) -> list[float]:
    "Median and 99th percentile in milliseconds"
    if len(seconds) < 2:
        return [round(1000 * o, 1) for o in seconds * 2]
    cuts = statistics.quantiles(seconds, n=100, method='inclusive')
    return [round(1000 * cuts[49], 1), round(1000 * cuts[98], 1)]


def prompts(count: int, characters: int) -> list[str]:
    "Beginnings of Python's own source files, none twice"
    found = []
    for path in sorted(Path(sysconfig.get_paths()['stdlib']).glob('*.py')):
        text = path.read_text(encoding='utf-8', errors='replace')
        for start in range(0, len(text) - characters, 4 * characters):
            found.append(text[start : start + characters])
            if len(found) == count:
                return found
    return found


async def one_request(
    client: openai.AsyncOpenAI, model: str, prompt: str, new: int, load: Load
) -> None:
    "Stream one answer and note when its pieces come"
    start = time.perf_counter()
    last = None
    stream = await client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=new,
        temperature=0,
        stream=True,
        stream_options=dict(include_usage=True),
    )
    async for chunk in stream:
        now = time.perf_counter()
        if chunk.usage is not None:
            load.tokens += chunk.usage.completion_tokens
        if chunk.choices and chunk.choices[0].text:
            if last is None:
                load.first.append(now - start)
            else:
                load.between.append(now - last)
            last = now
    load.requests += 1


async def run_clients(load: Load, address: str, model: str, texts: list[str], new: int) -> None:
    "Let so many clients ask until all prompts are answered"
    waiting = list(texts)
    async with openai.AsyncOpenAI(
        base_url=address + '/v1', api_key='none', max_retries=2, timeout=1200
    ) as client:

        async def ask_on() -> None:
            while waiting:
                await one_request(client, model, waiting.pop(), new, load)

        # Opens what is opened once.
        await one_request(client, model, 'import', 2, Load(load.server, load.threads, 1))
        start = time.perf_counter()
        await asyncio.gather(*(ask_on() for _ in range(load.clients)))
        load.seconds = time.perf_counter() - start


@contextmanager
def process(command: list[str]):
    "A server in a process, and its address"
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        for line in server.stdout:
            if found := re.search(r'http://[^\s/]+', line):
                break
        else:
            sys.exit(f'{command[0]}: ended without an address')
        yield found[0]
    finally:
        server.terminate()
        server.wait(60)


def eva_command(args: argparse.Namespace, most: int, threads: int) -> list[str]:
    "Command that starts eva_serve"
    program = str(Path(sys.executable).with_name('eva_serve'))
    sizes = ['--max_running', str(most), '--queue', str(most), '--threads', str(threads)]
    return [program, str(args.dir), '--port', '0', '--name', 'model', *sizes, *args.serve]


def llama_command(args: argparse.Namespace, most: int, threads: int) -> list[str]:
    "Command that starts llama.cpp's server"
    context = json.loads((args.dir / 'config.json').read_text())['max_position_embeddings']
    context = min(context, args.characters + args.new + 16)
    return [
        sys.executable,
        '-c',
        LLAMA_SERVER,
        str(args.gguf),
        str(most),
        str(context),
        str(threads),
    ]


def table(rows: list[dict]) -> str:
    "The figures as a table"
    head = (
        'server',
        'threads',
        'clients',
        'requests',
        'tokens',
        'tokens per second',
        'first token, ms (median, p99)',
        'between tokens, ms (median, p99)',
    )
    lines = ['| ' + ' | '.join(head) + ' |', '|' + '---|' * len(head)]
    for row in rows:
        cells = [', '.join(map(str, o)) if isinstance(o, list) else str(o) for o in row.values()]
        lines.append('| ' + ' | '.join(cells) + ' |')
    return '\n'.join(lines) + '\n'


def measured(args: argparse.Namespace, rows: list[dict]) -> dict:
    "The figures with what they were measured on and with"
    packages = ('torch', 'xllamacpp', 'openai')
    return dict(
        machine=machine('cpu'),
        versions={name: metadata.version(name) for name in packages},
        new_tokens=args.new,
        prompt_characters=args.characters,
        rows=rows,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('dir', type=Path, help='a folder of eva_train')
    parser.add_argument('--gguf', type=Path, help='the same weights as GGUF')
    parser.add_argument('--clients', type=int, nargs='+', default=[1, 4, 16, 64])
    parser.add_argument(
        '--requests', type=int, default=2, help='for each client, at least 8 in all'
    )
    parser.add_argument('--new', type=int, default=64, help='tokens of an answer')
    parser.add_argument('--characters', type=int, default=400, help='of a prompt')
    parser.add_argument('--threads', type=int, nargs='+', default=[1, 2], help='of each server')
    parser.add_argument('--serve', nargs=argparse.REMAINDER, default=[], help='for eva_serve')
    parser.add_argument('--out', type=Path, help='file for the figures, JSON')
    args = parser.parse_args()
    most = max(args.clients)
    kinds = {'eva_serve': eva_command} | ({'llama.cpp': llama_command} if args.gguf else {})
    rows = []
    for clients in args.clients:
        texts = prompts(max(8, args.requests * clients), args.characters)
        for threads, name in itertools.product(args.threads, kinds):
            load = Load(name, threads, clients)
            with process(kinds[name](args, most, threads)) as address:
                asyncio.run(run_clients(load, address, 'model', texts, args.new))
            rows.append(load.row())
            print(rows[-1], flush=True)
    print(table(rows))
    if args.out:
        args.out.write_text(json.dumps(measured(args, rows), indent=1) + '\n', encoding='utf-8')


if __name__ == '__main__':
    main()
