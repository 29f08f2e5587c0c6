"lm_eval measures what Eva measures: bits per byte of texts, and the likeliest of several answers"

import importlib.util
import json
import math
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
from serving import Running
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from torch.testing import assert_close

from eva.config import Config
from eva.data.text import TokenStream
from eva.data.tokenizer import train_tokenizer
from eva.model.transformer import DeepSeekV3
from eva.training.evaluation import bits_per_byte

needs_lm_eval = pytest.mark.skipif(
    not importlib.util.find_spec('lm_eval'), reason='needs lm_eval: pip install lm_eval'
)
TASKS = Path(__file__).parent / 'lm_eval'
WINDOW = 64  # tokens of context; the texts are longer
TEXTS = [f'def größe_{i}(x):\n    return x * {i} + {i * i}\n' * (3 * i + 1) for i in range(4)]
QUESTIONS = [
    dict(
        question=f'def größe_{i}(x):\n    return',
        choices=[' x * 3', ' größe', ' return x', ' def'],
        answer=i % 4,
    )
    for i in range(6)
]

SCRIPT = """
import json, sys
import lm_eval
from lm_eval.tasks import TaskManager

tasks = TaskManager(include_path=sys.argv[1], include_defaults=False)
found = []
for run in json.loads(sys.argv[2]):
    done = lm_eval.simple_evaluate(**run, device='cpu', task_manager=tasks, bootstrap_iters=0)
    (task,) = run['tasks']
    answers = [o['filtered_resps'] for o in done['samples'][task]]
    found.append(dict(results=done['results'][task], answers=answers))
print(json.dumps(found))
"""


def stream_of(folder, tokenizer, text, bos):
    "One text after a start token, as a token stream"
    ids = [bos, *tokenizer.encode(text, add_special_tokens=False).ids]
    np.save(folder / 'one.npy', np.array(ids, np.uint16))
    about = dict(tokens=len(ids), bytes=len(text.encode()), vocab_size=tokenizer.get_vocab_size())
    (folder / 'one.json').write_text(json.dumps(about))
    return TokenStream(folder / 'one.npy')


def own_bits_per_byte(folder, model, tokenizer):
    "Bits per byte of all texts by Eva, in windows that do not overlap"
    total = 0.0
    for text in TEXTS:
        stream = stream_of(folder, tokenizer, text, model.cfg.bos_token_id)
        total += bits_per_byte(model, stream, window=WINDOW, stride=WINDOW) * stream.bytes
    return total / sum(len(text.encode()) for text in TEXTS)


@torch.no_grad()
def log_likelihoods(model, tokenizer):
    "Log-likelihood of each answer by Eva, after the start token and the question; is it greedy?"
    found = []
    for o in QUESTIONS:
        row = []
        start = len(tokenizer.encode(o['question'], add_special_tokens=False).ids)
        for choice in o['choices']:
            ids = tokenizer.encode(o['question'] + choice, add_special_tokens=False).ids
            tokens = torch.tensor([[model.cfg.bos_token_id, *ids]])
            log_probs = model(tokens[:, :-1])[0].log_softmax(-1)
            scored = log_probs.gather(-1, tokens[0, 1:, None])[start:, 0]
            likeliest = scored == log_probs.max(-1).values[start:]
            row.append((scored.sum().item(), likeliest.all().item()))
        found.append(row)
    return found


@dataclass
class Trained:
    "A model, its folders and the texts to measure"

    place: Path  # with the folders `plain` and `starts`, and the two files of the tasks
    model: DeepSeekV3
    tokenizer: Tokenizer
    bits: float  # per byte, by Eva
    answers: list[list[tuple[float, bool]]]  # log-likelihoods, and are they greedy? by Eva

    def measure(self, runs):
        "What lm_eval finds, in a process of its own, for some calls"
        done = subprocess.run(
            [sys.executable, '-c', SCRIPT, TASKS, json.dumps(runs)],
            cwd=self.place,
            env=os.environ | dict(HF_HOME=str(self.place / 'cache'), HF_HUB_OFFLINE='1'),
            capture_output=True,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])

    def check(self, text, choice):
        "Compare the results of both tasks with those of Eva"
        assert abs(text['results']['bits_per_byte,none'] - self.bits) < 1e-4
        assert abs(math.log2(text['results']['byte_perplexity,none']) - self.bits) < 1e-4
        likely, own = torch.tensor(choice['answers']), torch.tensor(self.answers)
        assert_close(likely[..., 0], own[..., 0], atol=1e-4, rtol=1e-4)
        assert likely[..., 1].equal(own[..., 1])
        best = own[..., 0].argmax(-1).tolist()
        right = [place == o['answer'] for place, o in zip(best, QUESTIONS)]
        assert choice['results']['acc,none'] == pytest.approx(sum(right) / len(right))


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
    place = tmp_path_factory.mktemp('lm_eval')
    tokenizer = train_tokenizer(TEXTS, 320)
    torch.manual_seed(0)
    cfg = Config.from_preset(
        'mini',
        num_hidden_layers=2,
        hidden_size=64,
        vocab_size=tokenizer.get_vocab_size(),
        initializer_range=0.1,
    )
    model = DeepSeekV3(cfg).eval()
    model.save_pretrained(place / 'plain', tokenizer=tokenizer)
    bos = tokenizer.id_to_token(cfg.bos_token_id)
    tokenizer.post_processor = TemplateProcessing(
        single=f'{bos} $A', pair=f'{bos} $A $B', special_tokens=[(bos, cfg.bos_token_id)]
    )
    model.save_pretrained(place / 'starts', tokenizer=tokenizer)
    lines = ''.join(json.dumps(dict(text=text)) + '\n' for text in TEXTS)
    (place / 'text.jsonl').write_text(lines, encoding='utf-8')
    lines = ''.join(json.dumps(o) + '\n' for o in QUESTIONS)
    (place / 'choice.jsonl').write_text(lines, encoding='utf-8')
    bits = own_bits_per_byte(place, model, tokenizer)
    return Trained(place, model, tokenizer, bits, log_likelihoods(model, tokenizer))


def tasks_of(model, shared, **more):
    "The calls for both tasks: the start token is of lm_eval in one, of the tokenizer in the other"
    return [
        dict(model=model, model_args=shared | dict(add_bos_token=starts), tasks=[task], **more)
        for task, starts in (('eva_text', False), ('eva_choice', True))
    ]


@needs_lm_eval
def test_lm_eval_gives_the_figures_of_eva(trained):
    "With a tokenizer that prepends the start token itself, and with one that does not"
    shared = dict(dtype='float32', max_length=WINDOW)
    runs = [
        run
        for folder in ('plain', 'starts')
        for run in tasks_of('hf', shared | dict(pretrained=folder), batch_size=4)
    ]
    found = trained.measure(runs)
    trained.check(*found[:2])
    trained.check(*found[2:])
    model, tokenizer = trained.model, trained.tokenizer
    assert max(len(tokenizer.encode(text).ids) for text in TEXTS) > 2 * WINDOW
    # Other windows, or no start token, would be seen.
    stream = stream_of(trained.place, tokenizer, TEXTS[-1], model.cfg.bos_token_id)
    windows = bits_per_byte(model, stream, window=WINDOW, stride=WINDOW)
    assert abs(bits_per_byte(model, stream, window=WINDOW, stride=WINDOW // 4) - windows) > 1e-3


@needs_lm_eval
@pytest.mark.skipif(not importlib.util.find_spec('tenacity'), reason="needs lm_eval's extra api")
def test_lm_eval_gives_the_same_figures_from_a_server(trained):
    "One request at a time, and several prompts in each of several requests at once"
    # Beside the window, lm_eval counts the token that the window follows and a new one.
    with Running(trained.place / 'starts') as server:
        address = dict(base_url=server.url + '/v1/completions', tokenizer='starts', model='starts')
        shared = address | dict(max_length=WINDOW + 2)
        together = shared | dict(num_concurrent=4)
        runs = [
            *tasks_of('local-completions', shared),
            *tasks_of('local-completions', together, batch_size=4),
        ]
        shorter = tasks_of('local-completions', shared | dict(max_length=WINDOW + 1))
        found = trained.measure([*runs, shorter[0]])
        assert server.idle()
    trained.check(*found[:2])
    trained.check(*found[2:4])
    # A window that is one token shorter would be seen.
    assert abs(found[4]['results']['bits_per_byte,none'] - trained.bits) > 1e-3


def test_the_guide_shows_the_tasks_that_are_tested():
    "What the guide writes into a YAML file is the file that the test reads"
    guide = Path(__file__).parents[1] / 'nbs/guides/lm_eval.ipynb'
    cells = json.loads(guide.read_text(encoding='utf-8'))['cells']
    sources = [''.join(cell['source']) for cell in cells]
    for path in sorted(TASKS.glob('*.yaml')):
        written = f'%%writefile tasks/{path.name}\n' + path.read_text(encoding='utf-8')
        assert written.strip() in sources, path.name
    assert len(list(TASKS.glob('*.yaml'))) == 2
