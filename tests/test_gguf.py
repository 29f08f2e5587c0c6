"""The real llama.cpp reads what `eva_convert --to gguf` writes, and computes the same

`xllamacpp` is llama.cpp with its server. Each server runs in this process, with one thread and a
cache in float32.
"""

import contextlib
import io
import json
import random
import signal
import subprocess
import sys
import time
import urllib.request
from pathlib import Path
from statistics import median

import pytest
import torch
from tokenizers import Tokenizer

import eva.checkpoints.gguf as writer
import eva.checkpoints.gguf_layout as layout
from eva.checkpoints.gguf import convert_to_gguf
from eva.checkpoints.pretrained import load_pretrained, save_pretrained
from eva.config import Config
from eva.data.tokenizer import train_tokenizer
from eva.generation.chat_templates import ChatTemplate
from eva.generation.generate import generate
from eva.model.transformer import DeepSeekV3

gguf = pytest.importorskip('gguf', reason='gguf is not installed: pip install gguf')
xllamacpp = pytest.importorskip('xllamacpp', reason='xllamacpp is not installed')

TOLERANCE = 1e-4  # of log-probabilities in float32, in nats
SEEN = 1e-3  # what a mistake changes at least


class Llama:
    "llama.cpp's server on one file"

    def __init__(self, path):
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_threads_http = 256, 1, 1
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
        params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
        params.warmup, params.fit_params, params.verbosity = False, False, -1
        params.use_jinja, params.port = True, 0
        self.server = xllamacpp.Server(params)

    def ask(self, path, **body):
        url = self.server.listening_address + path
        kind = {'Content-Type': 'application/json'}
        request = urllib.request.Request(url, json.dumps(body).encode(), kind)
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)

    def tokens(self, text, special=False, start=False):
        "The tokens of a text"
        body = dict(content=text, parse_special=special, add_special=start)
        return self.ask('/tokenize', **body)['tokens']

    def complete(self, prompt, count):
        "The tokens that follow a prompt at temperature 0"
        body = dict(prompt=prompt, n_predict=count, temperature=0, return_tokens=True)
        return self.ask('/completion', **body)['tokens']

    def logprobs(self, ids):
        "Log-probabilities of the likeliest next tokens; none where one is half a character"
        body = dict(prompt=ids, n_predict=1, temperature=0, n_probs=20, cache_prompt=False)
        found = self.ask('/completion', **body).get('completion_probabilities') or [{}]
        return {t['id']: t['logprob'] for t in found[0].get('top_logprobs', [])}


def difference(model, llama, ids, lengths, of=max):
    "The largest difference of log-probabilities, or another figure of the prompts' largest"
    with torch.no_grad():
        ours = model(ids)[0].log_softmax(-1)
    found = []
    count = 0
    for length in lengths:
        theirs = llama.logprobs(ids[0, :length].tolist())
        count += len(theirs)
        if theirs:
            found.append(max(abs(ours[length - 1, t].item() - p) for t, p in theirs.items()))
    assert count >= 20 * len(lengths) // 3
    return of(found)


def quietly(text):
    pass


# ---- a run of eva_train


def command(main, *argv):
    said = io.StringIO()
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        code = main([str(a) for a in argv])
    assert code == 0, said.getvalue()[-2000:]


@pytest.fixture(scope='module')
def runs(tmp_path_factory):
    "A small run on text, and one on conversations that begins with it"
    from eva.cli.train import eva_train

    at = tmp_path_factory.mktemp('runs')
    (at / 'texts').mkdir()
    for i in range(30):
        (at / 'texts' / f'{i}.py').write_text(f'def f{i}(x):\n    return x + {i}\n' * 12)
    with open(at / 'talk.jsonl', 'w') as file:
        for i in range(30):
            pair = [('user', f'f{i}'), ('assistant', f'return x + {i}')]
            messages = [dict(role=role, content=content) for role, content in pair]
            file.write(json.dumps(dict(messages=messages)) + '\n')
    small = ('--batch_size', 4, '--seq_len', 64, '--precision', 'fp32', '--device', 'cpu')
    text = ('--data', at / 'texts', '--out', at / 'base', '--steps', 16, '--vocab_size', 320)
    command(eva_train, *text, *small)
    talk = ('--init', at / 'base', '--data', at / 'talk.jsonl', '--out', at / 'chat')
    command(eva_train, *talk, *small, '--steps', 8)
    for name in ('base', 'chat'):
        for quant in ('f32', 'bf16', 'f16', 'q8_0'):
            if name == 'base' or quant == 'f32':
                convert_to_gguf(at / name, at / f'{name}-{quant}.gguf', quant, say=quietly)
    return at


def held_out(folder):
    "Tokens of a text that a run did not see"
    tok = Tokenizer.from_file(str(folder / 'tokenizer.json'))
    text = 'def f77(x):\n    return x + 77\n\ndef g(y):\n    return y - 1  # the rest\n'
    return torch.tensor([[0, *tok.encode(text, add_special_tokens=False).ids]])


def test_a_run_has_the_same_probabilities(runs):
    model = load_pretrained(runs / 'base')
    ids = held_out(runs / 'base')
    lengths = range(1, ids.shape[1] + 1, 3)
    assert difference(model, Llama(runs / 'base-f32.gguf'), ids, lengths) < TOLERANCE


def test_a_run_says_the_same_greedy_tokens(runs):
    model = load_pretrained(runs / 'base')
    llama = Llama(runs / 'base-f32.gguf')
    ids = held_out(runs / 'base')
    for length in (1, 4, 9, 17, ids.shape[1]):
        prompt = ids[:, :length]
        ours = generate(model, prompt, 32)[0, length:].tolist()
        theirs = llama.complete(prompt[0].tolist(), 32)
        ends = [*model.cfg.eos_token_ids]
        assert theirs == ours or theirs == [t for t in ours if t not in ends], length
        assert len(theirs) > 4


def test_reduced_precision_has_its_price(runs):
    "At the median of the prompts: where rounding changes the choice of an expert it is more"
    model = load_pretrained(runs / 'base')
    ids = held_out(runs / 'base')
    lengths = range(1, ids.shape[1] + 1, 3)
    found = {
        quant: difference(model, Llama(runs / f'base-{quant}.gguf'), ids, lengths, median)
        for quant in ('f32', 'f16', 'bf16', 'q8_0')
    }
    print(found)
    assert found['f32'] < found['f16'] < 0.03
    assert found['f16'] < found['bf16'] < 0.15
    assert found['f16'] < found['q8_0'] < 0.3


def test_q8_0_keeps_its_bound(runs):
    "Each number errs by at most its share of the largest of its block"
    exact = {t.name: t for t in gguf.GGUFReader(runs / 'base-f32.gguf').tensors}
    rounded = [
        t for t in gguf.GGUFReader(runs / 'base-q8_0.gguf').tensors if t.tensor_type.name == 'Q8_0'
    ]
    assert len(rounded) > 20
    for tensor in rounded:
        want = torch.tensor(exact[tensor.name].data).reshape(-1, 32)
        got = torch.tensor(gguf.dequantize(tensor.data, tensor.tensor_type)).reshape(-1, 32)
        largest = want.abs().amax(1, keepdim=True)
        assert ((got - want).abs() <= largest * (1 / 254 + 2**-11)).all(), tensor.name


# ---- forms of the architecture

YARN = dict(
    type='yarn',
    factor=4,
    original_max_position_embeddings=32,
    beta_fast=32,
    beta_slow=1,
    mscale=0.8,
    mscale_all_dim=0.8,
)
V2 = dict(
    model_type='deepseek_v2',
    scoring_func='softmax',
    norm_topk_prob=False,
    topk_method='greedy',
    routed_scaling_factor=1.0,
    n_shared_experts=2,
)
GROUPS = dict(n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4)
FORMS = {
    'V3': {},
    'tied embeddings': dict(tie_word_embeddings=True),
    'YaRN of V2': dict(rope_scaling=YARN),
    'YaRN of V3': dict(rope_scaling=YARN | dict(mscale=1.0, mscale_all_dim=1.0)),
    'YaRN that extends nothing': dict(rope_scaling=YARN | dict(factor=1, mscale=0.5)),
    'groups': GROUPS,
    'groups without a limit': GROUPS | dict(topk_group=4),
    'queries without a latent': dict(q_lora_rank=None),
    'as many layers as V2-Lite': dict(q_lora_rank=None, num_hidden_layers=26),
    'V2': V2,
    'V2 without a latent': V2 | dict(q_lora_rank=None, num_hidden_layers=27),
    'softmax, normalised': dict(scoring_func='softmax', routed_scaling_factor=3.0),
    'dense layers alone': dict(first_k_dense_replace=3),
    'experts from the first layer on': dict(first_k_dense_replace=0),
    'odd widths': dict(
        qk_nope_head_dim=24, qk_rope_head_dim=6, v_head_dim=20, kv_lora_rank=40, q_lora_rank=50
    ),
    'another base': dict(rope_theta=500.0),
    'MTP modules': dict(num_nextn_predict_layers=2),
    'no start token': dict(bos_token_id=None),
}


@pytest.fixture(scope='module')
def words():
    return train_tokenizer(['the cat sat on the mat, it is 123\n'] * 3, 330, ('<|user|>',))


def folder_of(changes, words, at):
    "A model with large random weights, and its folder"
    torch.manual_seed(0)
    sizes = dict(vocab_size=340, num_hidden_layers=3, hidden_size=64, initializer_range=0.1)
    cfg = Config.from_preset('mini', **(sizes | dict(num_nextn_predict_layers=0) | changes))
    model = DeepSeekV3(cfg).eval()
    for name, buffer in model.named_buffers():
        if name.endswith('e_score_correction_bias'):
            buffer.normal_(std=0.1)
    save_pretrained(model, at / 'model', words)
    return model


IDS = torch.randint(4, 280, (1, 100), generator=torch.Generator().manual_seed(1))
LENGTHS = 1, 3, 7, 20, 33, 50, 64, 81, 100


@pytest.mark.filterwarnings('ignore::UserWarning')  # of what transformers computes otherwise
@pytest.mark.parametrize('form', FORMS)
def test_every_form_has_the_same_probabilities(form, words, tmp_path):
    model = folder_of(FORMS[form], words, tmp_path)
    file = convert_to_gguf(tmp_path / 'model', tmp_path / 'a.gguf', 'f32', say=quietly)
    assert difference(model, Llama(file), IDS, LENGTHS) < TOLERANCE


REFUSED = {
    'epsilon': dict(rms_norm_eps=1e-3),
    'two mscales': dict(rope_scaling=YARN | dict(mscale=1.0)),
    'a context that shrinks': dict(rope_scaling=YARN | dict(factor=0.5)),
    'groups of V2': GROUPS | V2 | dict(topk_method='group_limited_greedy', topk_group=1),
    'GELU': dict(hidden_act='gelu'),
    'begin of the ramp': dict(rope_scaling=YARN | dict(beta_fast=1)),
    'end of the ramp': dict(rope_scaling=YARN | dict(beta_slow=0.25)),
    '26 layers with a latent': dict(num_hidden_layers=26),
}
REFUSED['groups of V2']['num_experts_per_tok'] = 2


@pytest.mark.filterwarnings('ignore::UserWarning')
@pytest.mark.parametrize('case', REFUSED)
def test_what_is_refused_would_be_another_model(case, words, tmp_path, monkeypatch):
    model = folder_of(REFUSED[case], words, tmp_path)
    source, file = tmp_path / 'model', tmp_path / 'a.gguf'
    with pytest.raises(ValueError, match='llama.cpp would run another model'):
        convert_to_gguf(source, file, 'f32', say=quietly)
    assert [path.name for path in tmp_path.iterdir()] == ['model']
    monkeypatch.setattr(writer, 'check_representable', lambda cfg: None)
    convert_to_gguf(source, file, 'f32', say=quietly)
    try:
        llama = Llama(file)
    except RuntimeError:  # it does not load
        return
    assert difference(model, llama, IDS, LENGTHS) > SEEN


def without(*names):
    "Keys of the architecture without some"
    real = layout.architecture_keys
    return lambda cfg: {k: v for k, v in real(cfg).items() if not k.endswith(names)}


def untransposed(weight, part, cfg):
    "A mistake: the rows of the keys, in their order"
    right = layout.take_part(weight, part, cfg)
    return right.transpose(1, 2).reshape(right.shape) if part == 'keys' else right


MISTAKES = {
    'YaRN factor': ('architecture_keys', without('yarn_log_multiplier')),
    'length before': ('architecture_keys', without('original_context_length')),
    'groups': ('architecture_keys', without('group_count', 'group_used_count')),
    'scaling factor': ('architecture_keys', without('expert_weights_scale')),
    'scores': ('architecture_keys', without('expert_gating_func')),
    'keys': ('take_part', untransposed),
}


@pytest.mark.parametrize('mistake', MISTAKES)
def test_a_mistake_is_seen(mistake, words, tmp_path, monkeypatch):
    everything = GROUPS | dict(rope_scaling=YARN)
    model = folder_of(everything, words, tmp_path)
    monkeypatch.setattr(writer, *MISTAKES[mistake])
    file = convert_to_gguf(tmp_path / 'model', tmp_path / 'a.gguf', 'f32', say=quietly)
    assert difference(model, Llama(file), IDS, LENGTHS) > SEEN


# ---- text

TEXT = """def f(x):\n    return {'a': 1, "b": [x, 2.5]}  # it's don't we'll I'M\n\n\n\tif 12345:
\r\n  Größe naïve café 你好，世界。こんにちは カタカナ 한국어 Привет עברית العربية हिन्दी
 🙂🙃👩‍👩‍👧 e\u0301 \u00a0\u2003\u3000x ½ ² Ⅷ ٣٤ 123 4567 89012\n"""
HARD = [
    *(TEXT, ' ', '  ', '   a', 'a   ', '\n', '\n\n\n', 'a\n\n b', '\t\tx', ' \n \n', '\r\n\r\n'),
    *("don't", "DON'T I'LL we've", '1', '12', '123', '1234567', 'x1y22', '3.14e-10', '①②③'),
    *('٣٤٥', '½', '你好世界', 'かなカナ漢字', '한국어', '🙂🙂🙂', '👩‍👩‍👧‍👦', 'e\u0301a\u0308'),
    *('\u00a0x\u00a0', '\u3000\u2003 ', '\ufeffa', 'a\u200bb', '!!!???', '...---', '<|user|>'),
    *('a <|user|> b', '<｜begin▁of▁sentence｜>x', 'x<｜end▁of▁sentence｜>', '\x00\x01', '`~|'),
]
LETTERS = [
    *(' \n\t\r' * 4 + 'abcXYZ\'sdtm0123456789.,!?-_<>|/\\"$`~^'),
    *'éßñ你好のア한Жא🙂½²٣\u00a0\u3000\u2003e\u0301\u200d',
]


@pytest.mark.parametrize('name', layout.PRE_TOKENIZERS)
def test_every_text_has_the_same_tokens(name, tmp_path):
    draw = random.Random(0)
    texts = HARD + [
        ''.join(draw.choice(LETTERS) for _ in range(draw.randint(1, 40))) for _ in range(500)
    ]
    found = json.loads(train_tokenizer([TEXT] * 20 + texts, 700, ('<|user|>',)).to_str())
    found['pre_tokenizer'] = layout.PRE_TOKENIZERS[name]
    tok = Tokenizer.from_str(json.dumps(found))
    folder_of(dict(vocab_size=720), tok, tmp_path)
    file = convert_to_gguf(tmp_path / 'model', tmp_path / 'a.gguf', 'f16', say=quietly)
    llama = Llama(file)
    for special in (False, True):
        tok.encode_special_tokens = not special  # is the text of a special token text?
        for text in texts:
            ours = tok.encode(text, add_special_tokens=False).ids
            assert llama.tokens(text, special) == ours, (special, text)
    kinds = {len(llama.tokens('<|user|>', special)) for special in (False, True)}
    assert min(kinds) == 1 < max(kinds)
    spaced = "it 's a ? b ! c , d n't"
    ids = tok.encode(spaced, add_special_tokens=False).ids
    assert llama.ask('/detokenize', tokens=ids)['content'] == spaced
    assert llama.tokens('a', start=True) == [0, *llama.tokens('a')]


def test_a_model_without_a_start_token_gets_none(words, tmp_path):
    folder_of(dict(bos_token_id=None), words, tmp_path)
    file = convert_to_gguf(tmp_path / 'model', tmp_path / 'a.gguf', 'f16', say=quietly)
    llama = Llama(file)
    assert llama.tokens('the cat', start=True) == llama.tokens('the cat')


def test_a_conversation_is_the_same_prompt(runs):
    folder = runs / 'chat'
    llama = Llama(runs / 'chat-f32.gguf')
    tok = Tokenizer.from_file(str(folder / 'tokenizer.json'))
    template = ChatTemplate.of(folder)
    turns = [('user', 'f3'), ('assistant', 'return x + 3'), ('user', ' a\n\nb  ')]
    for begin, end in ((0, 1), (0, 3), (2, 3)):
        messages = [dict(role=role, content=content) for role, content in turns[begin:end]]
        for system in ([], [dict(role='system', content='Be short.\n')]):
            ours = template(system + messages)
            theirs = llama.ask('/apply-template', messages=system + messages)['prompt']
            start = tok.id_to_token(0)
            assert start + theirs.removeprefix(start) == ours
            tok.encode_special_tokens = False
            ids = tok.encode(ours, add_special_tokens=False).ids
            assert llama.tokens(theirs, special=True, start=True) == ids


def test_a_name_that_ends_texts_elsewhere_ends_them(tmp_path):
    "llama.cpp knows some names; Eva goes on, as no file of the folder names an end"
    tok = train_tokenizer(['the cat sat\n'] * 3, 300, ('<|im_end|>', '<|other|>'))
    model = folder_of(dict(vocab_size=300), tok, tmp_path)
    for name, count in (('<|im_end|>', 1), ('<|other|>', 6)):
        token = tok.token_to_id(name)
        with torch.no_grad():
            model.lm_head.weight.zero_()
            model.lm_head.weight[token] = model.hidden(IDS[:, :9])[0, -1]
        at = tmp_path / name.strip('<|>')
        save_pretrained(model, at, tok)
        llama = Llama(convert_to_gguf(at, tmp_path / f'{at.name}.gguf', 'f32', say=quietly))
        theirs = llama.ask('/completion', prompt=IDS[0, :9].tolist(), n_predict=6, temperature=0)
        assert theirs['tokens_predicted'] == count, name


# ---- large files

SCRIPT = """
import sys
import threading
import time

import gguf
import numpy as np
import torch

import eva.checkpoints.gguf as writer


def anonymous():
    with open('/proc/self/status') as f:
        return next(int(line.split()[1]) * 1024 for line in f if line.startswith('RssAnon'))


def watch():
    global peak
    while not stop:
        peak = max(peak, anonymous())
        time.sleep(0.001)


writer.SYNC_BYTES = 2**23
gguf.quantize(np.ones((4, 32), np.float32), gguf.GGMLQuantizationType.Q8_0)
torch.randn(1024, 1024).bfloat16().float().sum()  # what PyTorch itself keeps
start = peak = anonymous()
stop = False
watcher = threading.Thread(target=watch)
watcher.start()
writer.convert_to_gguf(sys.argv[1], sys.argv[2], sys.argv[3], say=print)
stop = True
watcher.join()
print(peak - start)
"""


def convert(src, dst, quant):
    arguments = [sys.executable, '-c', SCRIPT, str(src), str(dst), quant]
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True)


@pytest.fixture(scope='module')
def large(words, tmp_path_factory):
    "A checkpoint of 24 experts, 2 MB for each matrix"
    at = tmp_path_factory.mktemp('large')
    cfg = Config.from_preset(
        'mini',
        vocab_size=340,
        hidden_size=1024,
        moe_intermediate_size=1024,
        num_hidden_layers=1,
        first_k_dense_replace=0,
        n_routed_experts=24,
        num_nextn_predict_layers=0,
    )
    save_pretrained(DeepSeekV3(cfg).bfloat16(), at / 'model', words, max_shard_size='50MB')
    return at / 'model'


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='reads /proc')
@pytest.mark.parametrize('quant', ['f32', 'q8_0'])
def test_memory_is_that_of_a_few_matrices(quant, large, tmp_path):
    process = convert(large, tmp_path / 'a.gguf', quant)
    peak = int(process.communicate(timeout=300)[0].split()[-1])
    matrix = 1024 * 1024 * 4  # in float32
    size = (tmp_path / 'a.gguf').stat().st_size
    print(f'{peak / 1e6:.0f} MB for a file of {size / 1e6:.0f} MB')
    assert peak < 8 * matrix < 24 * matrix / 2  # the experts of a layer are one tensor of the file
    assert size > 72 * (matrix if quant == 'f32' else matrix / 4)


def test_killed_at_any_moment(large, tmp_path):
    assert convert(large, tmp_path / 'whole.gguf', 'q8_0').wait(timeout=300) == 0
    draw = random.Random(0)
    target = tmp_path / 'a.gguf'
    record = tmp_path / 'a.gguf.partial' / 'progress.json'

    def units():
        return json.loads(record.read_text())['units'] if record.exists() else 0

    recorded = [0]
    for _ in range(3):
        process = convert(large, target, 'q8_0')
        while process.poll() is None and units() == recorded[-1]:
            time.sleep(0.001)
        time.sleep(draw.uniform(0, 0.1))  # it is writing the next matrices now
        process.send_signal(signal.SIGKILL)
        process.wait()
        if target.exists():
            break
        recorded.append(units())
    assert len(recorded) > 2 and recorded == sorted(set(recorded)), recorded
    if not target.exists():
        assert convert(large, target, 'q8_0').wait(timeout=300) == 0
    assert target.read_bytes() == (tmp_path / 'whole.gguf').read_bytes()
    left = sorted(path.name for path in tmp_path.iterdir() if path.name[0] != '.')
    assert left == ['a.gguf', 'whole.gguf']
