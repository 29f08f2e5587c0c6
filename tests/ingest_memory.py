"Memory that reading a corpus of one shape takes: `ingest_memory.py SHAPE MB FOLDER VOCAB`"

import json
import random
import re
import string
import sys
from pathlib import Path

shape = sys.argv[1]
mb = float(sys.argv[2])
root = Path(sys.argv[3])
vocab = sys.argv[4]


def write(shape, mb, root):
    rng = random.Random(0)
    part = 2**20
    n = int(mb * 1e6)
    f = root / 'a.txt'
    if shape == 'tiny':
        for i in range(n // 1000):
            d = root / f'd{i // 1000}'
            d.mkdir(exist_ok=True)
            (d / f'{i}.txt').write_text(
                ''.join(rng.choices(string.ascii_lowercase + '    \n', k=1000))
            )
        return
    alphabet = dict(
        words=string.ascii_lowercase + '    \n',
        line=string.ascii_lowercase + '    ',
        solid=string.ascii_lowercase,
        bytes=''.join(map(chr, range(1, 0x250))),
        json=string.ascii_lowercase + '    ',
        rows=string.ascii_lowercase + '    ',
    )[shape]
    if shape in ('json', 'rows'):
        f = root / 'a.jsonl'
    with open(f, 'w', newline='') as o:
        if shape == 'json':
            o.write('{"text": "\U0001f600')
        while o.tell() < n:
            if shape == 'rows':
                o.write(
                    '\n'.join(
                        json.dumps(dict(text=''.join(rng.choices(alphabet, k=rng.randrange(1, 9)))))
                        for _ in range(10000)
                    )
                    + '\n'
                )
            else:
                o.write(''.join(rng.choices(alphabet, k=part // 4)))
        if shape == 'json':
            o.write('"}\n' + '{"text": "one more document"}\n' * 100)


write(shape, mb, root)

import eva.cli.run_folder as C
import eva.data.corpus
import eva.data.text
import eva.data.tokenizer
import eva.training.trainer
from eva.cli.train_arguments import train_parser


def peak():
    return (
        int(re.search(r'VmHWM:\s+(\d+)', Path('/proc/self/status').read_text())[1]) / 1024
    )  # of this program alone


args = train_parser().parse_args(
    ['--data', str(root), '--out', str(root.parent / 'out'), '--steps', '1', '--vocab_size', vocab]
)
before = peak()
marks = []
import eva.data.text as D


def watch(mod, name):
    f = getattr(mod, name)

    def g(*a, **k):
        r = f(*a, **k)
        marks.append((name, round(peak() - before)))
        return r

    setattr(mod, name, g)


for m, n in (
    (eva.data.tokenizer, 'train_tokenizer'),
    (eva.data.corpus, 'tokenise'),
    (D, 'compressed_bits_per_byte'),
    (D, 'bigram_bits_per_byte'),
    (C, 'read_data'),
):
    watch(m, n)
C.new_run(args, lambda s: None)
print(
    json.dumps(
        dict(shape=shape, mb=mb, before=round(before), grown=round(peak() - before), marks=marks)
    )
)
