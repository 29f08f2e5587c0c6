"lm_eval measures what Eva measures: bits per byte of texts, and the likeliest of several answers"

import importlib.util
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from torch.testing import assert_close

from eva.config import Config
from eva.data.text import TokenStream
from eva.data.tokenizer import train_tokenizer
from eva.model.transformer import DeepSeekV3
from eva.training.evaluation import bits_per_byte

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
found = {}
for folder in sys.argv[2:]:
    for task, starts in (('eva_text', False), ('eva_choice', True)):
        done = lm_eval.simple_evaluate(
            model='hf',
            model_args=dict(
                pretrained=folder, dtype='float32', max_length=64, add_bos_token=starts
            ),
            tasks=[task],
            device='cpu',
            batch_size=4,
            task_manager=tasks,
            bootstrap_iters=0,
        )
        answers = [o['filtered_resps'] for o in done['samples'][task]]
        found[f'{folder} {task}'] = dict(results=done['results'][task], answers=answers)
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
    "Log-likelihood of each answer by Eva, after the start token and the question"
    found = []
    for o in QUESTIONS:
        row = []
        start = len(tokenizer.encode(o['question'], add_special_tokens=False).ids)
        for choice in o['choices']:
            ids = tokenizer.encode(o['question'] + choice, add_special_tokens=False).ids
            tokens = torch.tensor([[model.cfg.bos_token_id, *ids]])
            log_probs = model(tokens[:, :-1])[0].log_softmax(-1)
            scored = log_probs.gather(-1, tokens[0, 1:, None])[start:]
            row.append(scored.sum().item())
        found.append(row)
    return found


@pytest.mark.skipif(
    not importlib.util.find_spec('lm_eval'), reason='needs lm_eval: pip install lm_eval'
)
def test_lm_eval_gives_the_figures_of_eva(tmp_path):
    "With a tokenizer that prepends the start token itself, and with one that does not"
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
    model.save_pretrained(tmp_path / 'plain', tokenizer=tokenizer)
    bos = tokenizer.id_to_token(cfg.bos_token_id)
    tokenizer.post_processor = TemplateProcessing(
        single=f'{bos} $A', pair=f'{bos} $A $B', special_tokens=[(bos, cfg.bos_token_id)]
    )
    model.save_pretrained(tmp_path / 'starts', tokenizer=tokenizer)
    lines = ''.join(json.dumps(dict(text=text)) + '\n' for text in TEXTS)
    (tmp_path / 'text.jsonl').write_text(lines, encoding='utf-8')
    lines = ''.join(json.dumps(o) + '\n' for o in QUESTIONS)
    (tmp_path / 'choice.jsonl').write_text(lines, encoding='utf-8')
    done = subprocess.run(
        [sys.executable, '-c', SCRIPT, TASKS, 'plain', 'starts'],
        cwd=tmp_path,
        env=os.environ | dict(HF_HOME=str(tmp_path / 'cache'), HF_HUB_OFFLINE='1'),
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    bits = own_bits_per_byte(tmp_path, model, tokenizer)
    scores = log_likelihoods(model, tokenizer)
    assert max(len(tokenizer.encode(text).ids) for text in TEXTS) > 2 * WINDOW
    best = [max(range(4), key=row.__getitem__) == o['answer'] for row, o in zip(scores, QUESTIONS)]
    for folder in ('plain', 'starts'):
        measured = found[f'{folder} eva_text']['results']
        assert abs(measured['bits_per_byte,none'] - bits) < 1e-4, folder
        assert abs(math.log2(measured['byte_perplexity,none']) - bits) < 1e-4, folder
        answers = found[f'{folder} eva_choice']
        likely = [[score for score, _ in row] for row in answers['answers']]
        assert_close(torch.tensor(likely), torch.tensor(scores), atol=1e-4, rtol=1e-4)
        assert answers['results']['acc,none'] == pytest.approx(sum(best) / len(best)), folder
    # Other windows, or no start token, would be seen.
    stream = stream_of(tmp_path, tokenizer, TEXTS[-1], cfg.bos_token_id)
    windows = bits_per_byte(model, stream, window=WINDOW, stride=WINDOW)
    assert abs(bits_per_byte(model, stream, window=WINDOW, stride=WINDOW // 4) - windows) > 1e-3


def test_the_guide_shows_the_tasks_that_are_tested():
    "What the guide writes into a YAML file is the file that the test reads"
    guide = Path(__file__).parents[1] / 'nbs/guides/lm_eval.ipynb'
    cells = json.loads(guide.read_text(encoding='utf-8'))['cells']
    sources = [''.join(cell['source']) for cell in cells]
    for path in sorted(TASKS.glob('*.yaml')):
        written = f'%%writefile tasks/{path.name}\n' + path.read_text(encoding='utf-8')
        assert written.strip() in sources, path.name
    assert len(list(TASKS.glob('*.yaml'))) == 2
