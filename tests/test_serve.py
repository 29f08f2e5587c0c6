"eva_serve over real sockets: the API with its official client, and every fault a client can make"

import asyncio
import contextlib
import http.client
import json
import os
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import Future
from pathlib import Path

import openai
import pytest
import torch
from serving import Running, train, with_template

from eva.checkpoints.pretrained import load_pretrained
from eva.checkpoints.tokenizers import load_tokenizer
from eva.cli import engine_thread, http_limits, serve
from eva.cli.engine_thread import EngineLoop, PromptScores
from eva.cli.openai_requests import ModelLimits
from eva.cli.serve import byte_size, eva_serve
from eva.generation.engine import Engine
from eva.generation.paged_cache import page_bytes
from eva.model.transformer import DeepSeekV3


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return with_template(train(tmp_path_factory.mktemp('serve')))


@pytest.fixture(scope='module')
def model(folder):
    return load_pretrained(folder)


@pytest.fixture(scope='module')
def tok(folder):
    found = load_tokenizer(folder / 'tokenizer.json', folder)
    found.encode_special_tokens = True
    return found


@pytest.fixture(scope='module')
def running(folder):
    with Running(folder, '--max_running', 8, '--queue', 24) as server:
        yield server


@pytest.fixture(scope='module')
def client(running):
    return openai.OpenAI(base_url=running.url + '/v1', api_key='none', max_retries=0)


PROMPT = 'def f7(x):\n'


def offline(model, tok, prompt, new, **how):
    "Tokens of the same prompt from the model alone"
    ids = torch.tensor(
        [[model.cfg.bos_token_id, *tok.encode(prompt, add_special_tokens=False).ids]]
    )
    said = model.generate(ids, max_new_tokens=new, eos_token_id=serve.end_tokens(model), **how)
    return said[0, ids.shape[1] :].tolist()


def text_of(model, tok, tokens):
    ends = serve.end_tokens(model)
    return tok.decode([t for t in tokens if t not in ends], skip_special_tokens=True)


def post(server, path, body, headers=None, raw=False):
    "Status, headers and JSON of a request, sent as it is"
    connection = http.client.HTTPConnection('127.0.0.1', server.port, timeout=30)
    data = body if raw else json.dumps(body)
    headers = {'Content-Type': 'application/json'} | (headers or {})
    connection.request('POST', path, data, headers)
    response = connection.getresponse()
    said = response.read()
    connection.close()
    return response.status, response.headers, json.loads(said)


def get(server, path, headers=None):
    connection = http.client.HTTPConnection('127.0.0.1', server.port, timeout=30)
    connection.request('GET', path, headers=headers or {})
    response = connection.getresponse()
    said = response.read()
    connection.close()
    return response.status, response.headers, said


def body(**more):
    return dict(model='run', prompt=PROMPT, max_tokens=4, temperature=0) | more


# The API


def test_models(client, running):
    (card,) = client.models.list().data
    assert card.id == 'run' and card.model_extra['eva']['chat']
    assert client.models.retrieve('run').id == 'run'
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve('../../etc/passwd')


def test_a_completion_is_what_the_model_says_alone(client, model, tok):
    "Greedy and seeded, the text of the server is that of `generate`"
    done = client.completions.create(model='run', prompt=PROMPT, max_tokens=24, temperature=0)
    tokens = offline(model, tok, PROMPT, 24)
    assert done.choices[0].text == text_of(model, tok, tokens)
    assert done.choices[0].finish_reason in ('stop', 'length')
    read = 1 + len(tok.encode(PROMPT, add_special_tokens=False).ids)
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (read, len(tokens))
    how = dict(temperature=1.3, top_p=0.9, seed=5)
    drawn = client.completions.create(model='run', prompt=PROMPT, max_tokens=24, **how)
    assert drawn.choices[0].text == text_of(
        model, tok, offline(model, tok, PROMPT, 24, do_sample=True, **how)
    )
    other = client.completions.create(
        model='run', prompt=PROMPT, max_tokens=24, **how | dict(seed=6)
    )
    assert other.choices[0].text != drawn.choices[0].text


def test_streams_say_the_same(client):
    how = dict(model='run', prompt=PROMPT, max_tokens=24, temperature=0)
    whole = client.completions.create(**how)
    stream = client.completions.create(**how, stream=True, stream_options=dict(include_usage=True))
    chunks = list(stream)
    assert ''.join(c.choices[0].text for c in chunks if c.choices) == whole.choices[0].text
    assert len(chunks) > 5 and chunks[-1].usage == whole.usage and not chunks[-1].choices
    assert [c.usage for c in chunks[:-1]] == [None] * (len(chunks) - 1)
    ends = [c.choices[0].finish_reason for c in chunks if c.choices]
    assert ends[-1] == whole.choices[0].finish_reason and set(ends[:-1]) == {None}
    assert len({c.id for c in chunks}) == 1


def test_chat(client, model, tok):
    messages = [
        dict(role='developer', content='Be brief.'),
        dict(role='user', content=[dict(type='text', text='f7')]),
    ]
    how = dict(model='run', messages=messages, temperature=0)
    done = client.chat.completions.create(**how, max_completion_tokens=12)
    rendered = '[system] Be brief.\n[user] f7\n[assistant] '
    assert done.choices[0].message.content == text_of(model, tok, offline(model, tok, rendered, 12))
    stream = client.chat.completions.create(**how, max_tokens=12, stream=True)
    deltas = [c.choices[0].delta for c in stream]
    assert deltas[0].role == 'assistant'
    assert ''.join(d.content or '' for d in deltas) == done.choices[0].message.content
    free = client.chat.completions.create(**how)  # no limit: to the end of the context
    assert free.usage.total_tokens <= model.cfg.max_position_embeddings


def test_markers_in_a_text_are_letters(client, folder, tok):
    "A special token that a user types is not that token"
    marker = tok.id_to_token(0)
    done = client.completions.create(model='run', prompt=marker, max_tokens=1, temperature=0)
    assert done.usage.prompt_tokens == 1 + len(tok.encode(marker, add_special_tokens=False).ids) > 2


def test_several_texts(client, model, tok):
    "Texts of several prompts, and several of one prompt, in the order of the API"
    prompts = [PROMPT, 'def f12(x):\n']
    how = dict(temperature=2.0, seed=3)
    done = client.completions.create(model='run', prompt=prompts, n=2, max_tokens=8, **how)
    assert [c.index for c in done.choices] == [0, 1, 2, 3]
    assert len({c.text for c in done.choices}) > 2
    for place, prompt in enumerate(prompts):
        ids = offline(model, tok, prompt, 8, do_sample=True, **how)
        assert done.choices[2 * place].text == text_of(model, tok, ids)
    stream = client.completions.create(
        model='run', prompt=prompts, n=2, max_tokens=8, stream=True, **how
    )
    texts = ['', '', '', '']
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == [c.text for c in done.choices]


def test_stop(client):
    how = dict(model='run', prompt=PROMPT, max_tokens=40, temperature=0)
    text = client.completions.create(**how).choices[0].text
    stop = text[9:11]
    done = client.completions.create(**how, stop=[stop, 'never said'])
    assert done.choices[0].text == text[: text.index(stop)]
    assert done.choices[0].finish_reason == 'stop'
    stream = client.completions.create(**how, stop=stop, stream=True)
    assert ''.join(c.choices[0].text for c in stream) == done.choices[0].text


def log_probabilities(model, ids):
    "Of each token behind the first, by one pass of the model"
    with torch.inference_mode():
        logprobs = model(torch.tensor([ids])).float().log_softmax(-1)[0]
    return logprobs, [float(logprobs[i, t]) for i, t in enumerate(ids[1:])]


def test_logprobs(client, model, tok):
    start = [model.cfg.bos_token_id, *tok.encode(PROMPT, add_special_tokens=False).ids]
    new = offline(model, tok, PROMPT, 10)
    all_of, each = log_probabilities(model, start + new)
    expected = each[len(start) - 1 :]
    how = dict(model='run', max_tokens=10)
    done = client.completions.create(**how, prompt=PROMPT, temperature=0, logprobs=3)
    told = done.choices[0].logprobs
    assert told.token_logprobs == pytest.approx(expected, abs=1e-4)
    assert [len(t) for t in told.top_logprobs] == [3] * len(new)
    assert all(max(t.values()) == pytest.approx(v, abs=1e-4)
               for t, v in zip(told.top_logprobs, expected))  # fmt: skip
    assert told.text_offset[0] == 0 and len(told.tokens) == len(new)
    drawn = client.completions.create(**how, prompt=PROMPT, temperature=1.7, seed=1, logprobs=0)
    ids = offline(model, tok, PROMPT, 10, do_sample=True, temperature=1.7, seed=1)
    _, each = log_probabilities(model, start + ids)
    # of the model's own distribution, before temperature
    assert drawn.choices[0].logprobs.token_logprobs == pytest.approx(
        each[len(start) - 1 :], abs=1e-4
    )
    chat = client.chat.completions.create(
        model='run',
        messages=[dict(role='user', content='f7')],
        max_tokens=5,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    content = chat.choices[0].logprobs.content
    assert b''.join(bytes(t.bytes) for t in content).decode() == chat.choices[0].message.content
    assert all(t.top_logprobs[0].logprob == t.logprob and len(t.top_logprobs) == 2 for t in content)


def test_echo_scores_the_prompt(client, model, tok):
    "What evaluation software asks: the log-probabilities of a given text, as tokens or as text"
    ids = [model.cfg.bos_token_id, *tok.encode(PROMPT * 9, add_special_tokens=False).ids]
    _, expected = log_probabilities(model, ids)
    how = dict(model='run', max_tokens=1, temperature=0, logprobs=1, echo=True)
    done = client.completions.create(**how, prompt=[ids, ids[:5]])
    told = done.choices[0].logprobs
    assert told.token_logprobs[0] is None and told.top_logprobs[0] is None
    assert told.token_logprobs[1 : len(ids)] == pytest.approx(expected, abs=1e-4)
    assert len(done.choices[1].logprobs.tokens) == 6
    text = client.completions.create(**how, prompt=PROMPT * 9).choices[0]
    assert text.text.startswith(PROMPT * 9)
    assert text.logprobs.token_logprobs[:-1] == pytest.approx(expected, abs=1e-4)
    assert ''.join(text.logprobs.tokens) == text.text
    stream = client.completions.create(**how | dict(logprobs=None), prompt=PROMPT, stream=True)
    assert next(iter(stream)).choices[0].text == PROMPT


def test_echo_without_a_new_token(client, running, model, tok):
    "The prompt alone, up to a full context, and nothing is generated"
    start = [model.cfg.bos_token_id, *tok.encode(PROMPT, add_special_tokens=False).ids]
    context = model.cfg.max_position_embeddings
    full = (start * context)[:context]
    how = dict(model='run', max_tokens=0, logprobs=1, echo=True)
    before = running.engine.stats.new_tokens
    done = client.completions.create(**how, prompt=[full, start], n=2)
    assert [c.finish_reason for c in done.choices] == ['length'] * 4
    assert (done.usage.prompt_tokens, done.usage.completion_tokens) == (context + len(start), 0)
    for choice, ids in zip(done.choices, (full, full, start, start)):
        _, expected = log_probabilities(model, ids)
        assert choice.logprobs.token_logprobs[0] is None
        assert choice.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-4)
    chunks = list(client.completions.create(**how, prompt=PROMPT, stream=True))
    (only,) = [c.choices[0] for c in chunks]
    assert (only.text, only.finish_reason) == (PROMPT, 'length')
    assert running.engine.stats.new_tokens == before and running.idle()
    with pytest.raises(openai.BadRequestError, match='together'):
        client.completions.create(**how, prompt=[full + [5]])


def test_the_stop_texts_of_evaluation_software(client):
    "More than the four of the API: the ends of a task, and the name of the end token"
    how = dict(model='run', prompt=PROMPT, max_tokens=40, temperature=0)
    text = client.completions.create(**how).choices[0].text
    stop = ['never', 'said', '\n\n\n', 'Question:', text[9:11], '<end>']
    done = client.completions.create(**how, stop=stop).choices[0]
    assert (done.text, done.finish_reason) == (text[: text.index(text[9:11])], 'stop')


def test_experts(client, model):
    how = dict(model='run', prompt=PROMPT, max_tokens=6, temperature=0)
    chunks = list(client.completions.create(**how, stream=True, extra_body=dict(eva_experts=True)))
    details = [c.choices[0].model_extra['eva'] for c in chunks if 'eva' in c.choices[0].model_extra]
    layers = model.cfg.num_hidden_layers - model.cfg.first_k_dense_replace
    assert len(details) == 6 and {len(d['experts']) for d in details} == {layers}
    chosen = [e for d in details for layer in d['experts'] for e in layer]
    assert all(0 <= e < model.cfg.n_routed_experts for e in chosen)
    assert {type(d['drafted']) for d in details} == {bool}
    whole = client.completions.create(**how, extra_body=dict(eva_experts=True))
    assert whole.choices[0].model_extra['eva'] == details


def test_the_asynchronous_client_and_company(running, model, tok):
    "Sixteen requests at once, and each gets the text that it gets alone"
    prompts = [f'def f{i}(x):\n' * (1 + i % 5) for i in range(16)]

    async def ask_all():
        async with openai.AsyncOpenAI(base_url=running.url + '/v1', api_key='-') as client:
            asked = [
                client.completions.create(
                    model='run', prompt=p, max_tokens=5 + i, temperature=i % 2, seed=i
                )
                for i, p in enumerate(prompts)
            ]
            return await asyncio.gather(*asked)

    for i, done in enumerate(asyncio.run(ask_all())):
        how = dict(do_sample=True, seed=i) if i % 2 else {}
        alone = text_of(model, tok, offline(model, tok, prompts[i], 5 + i, **how))
        assert done.choices[0].text == alone, i
    assert running.idle()


# Health and metrics


def test_health_and_metrics(client, running):
    assert get(running, '/health')[0] == 200
    before = running.engine.stats.new_tokens
    client.completions.create(model='run', prompt=PROMPT, max_tokens=3, temperature=0)
    status, headers, said = get(running, '/metrics')
    text = said.decode()
    assert status == 200 and headers['Content-Type'].startswith('text/plain')
    assert f'eva_new_tokens_total {float(before + 3)}' in text
    assert 'eva_http_answers_total{path="/v1/completions",status="200"}' in text
    assert re.search(r'eva_first_token_seconds_count [1-9]', text)
    get(running, '/some/path/of/a/client')
    assert 'path="other",status="404"' in get(running, '/metrics')[2].decode()
    assert 'some/path' not in get(running, '/metrics')[2].decode()


def test_a_cache_smaller_than_the_context(folder):
    "The context is what the pages hold, also for a chat without a limit"
    with Running(folder, '--pages', 4) as server:
        asked = dict(model='run', messages=[dict(role='user', content='f7')], temperature=0)
        status, _, answer = post(server, '/v1/chat/completions', asked)
        assert status == 200 and answer['usage']['total_tokens'] <= 64
        status, _, answer = post(server, '/v1/completions', body(max_tokens=64))
        assert status == 400 and 'at most 64 together' in answer['error']['message']


# Faults: wrong requests

WRONG = [
    (dict(prompt=''.join(chr(0xD800 + i) for i in range(3))), 'prompt'),
    (dict(prompt=17), 'prompt'),
    (dict(prompt=[]), 'prompt'),
    (dict(prompt=[[]]), 'prompt'),
    (dict(prompt=['a', 1]), 'prompt'),
    (dict(prompt=[1, 10**6]), 'token 1000000'),
    (dict(prompt=[1, -1]), 'token -1'),
    (dict(prompt=[True]), 'prompt'),
    (dict(prompt='x = 1\n' * 1000), 'together'),
    (dict(max_tokens='5'), 'max_tokens'),
    (dict(max_tokens=0), 'max_tokens'),
    (dict(max_tokens=2.5), 'max_tokens'),
    (dict(max_tokens=10**9), 'together'),
    (dict(max_tokens=True), 'max_tokens'),
    (dict(temperature=-1), 'temperature'),
    (dict(temperature=3), 'temperature'),
    (dict(temperature='hot'), 'temperature'),
    (dict(top_p=0), 'top_p'),
    (dict(n=0), 'n='),
    (dict(n=1000), 'n='),
    (dict(seed=2**64), 'seed'),
    (dict(seed=0.5), 'seed'),
    (dict(stop=''), 'stop'),
    (dict(stop=['a'] * 17), 'stop'),
    (dict(stop=[1]), 'stop'),
    (dict(logprobs=6), 'logprobs'),
    (dict(logprobs=True), 'logprobs'),
    (dict(stream='yes'), 'stream'),
    (dict(stream_options=[]), 'stream_options'),
    (dict(tempratur=1), 'no field'),
    (dict(frequency_penalty=0.5), 'not implemented'),
    (dict(logit_bias={'1': 5}), 'not implemented'),
    (dict(suffix='x'), 'not implemented'),
    (dict(best_of=3), 'not implemented'),
    (dict(model=None), 'model'),
    (dict(prompt=None), 'prompt'),
]


@pytest.mark.parametrize('change, said', WRONG, ids=[ascii(c)[:40] for c, _ in WRONG])
def test_wrong_requests_are_refused_without_work(running, change, said):
    assert running.idle()
    before = running.engine.stats
    status, _, answer = post(running, '/v1/completions', body(**change))
    error = answer['error']
    assert 400 <= status < 500 and set(error) == {'message', 'type', 'param', 'code'}, answer
    assert said in error['message'] and error['type'] == 'invalid_request_error'
    assert '\n' not in error['message'] and len(error['message']) < 300
    after = running.engine.stats
    assert (after.steps, after.prompt_tokens) == (before.steps, before.prompt_tokens)
    assert running.service.thread.admitted == 0


def test_harmless_fields_are_accepted(running):
    neutral = dict(frequency_penalty=0, presence_penalty=0.0, logit_bias={}, best_of=1, user='me')
    assert post(running, '/v1/completions', body(**neutral))[0] == 200


MALFORMED = [
    (b'', 400),
    (b'{', 400),
    (b'[1, 2]', 400),
    (b'"text"', 400),
    (b'null', 400),
    (b'\xff\xfe{}', 400),
    (b'{"model": "run", "prompt": NaN}', 400),
    (b'{"model": "run", "prompt": "a", "temperature": NaN}', 400),
    (b'{"model": "run", "prompt": "a", "temperature": 1e999}', 400),
    (b'[' * 60_000, 400),
    (b'{"a":' * 10_000, 400),
    (b'{"model": "run", "prompt": "a", "seed": ' + b'9' * 5000 + b'}', 400),
]


@pytest.mark.parametrize('data, expected', MALFORMED, ids=[repr(d[:24]) for d, _ in MALFORMED])
def test_malformed_bodies(running, data, expected):
    steps = running.engine.stats.steps
    status, _, answer = post(running, '/v1/completions', data, raw=True)
    assert status == expected and answer['error']['message'], answer
    assert running.engine.stats.steps == steps


def test_other_types_methods_and_paths(running):
    data = json.dumps(body())
    # what a browser sends to another origin without asking it first
    for kind in ('text/plain', 'application/x-www-form-urlencoded', 'multipart/form-data'):
        status, _, answer = post(running, '/v1/completions', data, {'Content-Type': kind}, raw=True)
        assert 400 <= status < 500, answer
        assert 'send Content-Type: application/json' in answer['error']['message']
    for path in ('/v1/completions', '/v1/embeddings', '/docs', '/openapi.json', '/v1'):
        status, _, said = get(running, path)
        assert status in (404, 405) and json.loads(said)['error']['message'], path


def test_chat_faults(running):
    for messages in (
        [],
        'f7',
        [dict(role='tool', content='x')],
        [dict(role='user')],
        [dict(role='user', content=[dict(type='image_url', image_url=dict(url='file:///etc'))])],
        [dict(role='user', content='x', tool_calls=[])],
    ):
        wrong = dict(model='run', messages=messages)
        status, _, answer = post(running, '/v1/chat/completions', wrong)
        assert status == 400 and 'messages' in answer['error']['message'], answer
    fine = [dict(role='user', content='x')]
    for more in (dict(tools=[dict(type='function')]), dict(top_logprobs=2)):
        status, _, answer = post(
            running, '/v1/chat/completions', dict(model='run', messages=fine) | more
        )
        assert status == 400 and next(iter(more)) in answer['error']['message'], answer


def test_no_template_no_chat(folder, tmp_path):
    plain = tmp_path / 'plain'
    shutil.copytree(folder, plain)
    about = json.loads((plain / 'tokenizer_config.json').read_text())
    about.pop('chat_template')
    (plain / 'tokenizer_config.json').write_text(json.dumps(about))
    with Running(plain) as server:
        asked = dict(model='plain', messages=[dict(role='user', content='x')])
        status, _, answer = post(server, '/v1/chat/completions', asked)
        assert status == 400 and '/v1/completions' in answer['error']['message']
        card = json.loads(get(server, '/v1/models')[2])['data'][0]
        assert card['eva']['chat'] is False


# Faults: size and time


def read_all(connection):
    "What a server sends until it closes the connection"
    said = b''
    while piece := connection.recv(65536):
        said += piece
    return said.decode()


def test_huge_bodies_are_refused_unread(running):
    "By their stated length before a byte is read, and by count where no length is stated"
    limit = running.service.body_bytes
    with socket.create_connection(('127.0.0.1', running.port), timeout=10) as s:
        s.sendall(
            b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n'
            b'Content-Type: application/json\r\nContent-Length: %d\r\n\r\n' % 10**12
        )
        said = read_all(s)
        assert ' 413 ' in said.splitlines()[0] and '"error"' in said, said
    with socket.create_connection(('127.0.0.1', running.port), timeout=10) as s:
        s.sendall(
            b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n'
            b'Content-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n'
        )
        piece = b' ' * 2**15
        sent = 0
        with contextlib.suppress(OSError):  # the server closes while we send
            while sent < 200 * limit:
                s.sendall(b'%x\r\n' % len(piece) + piece + b'\r\n')
                sent += len(piece)
        assert sent < 200 * limit, 'everything was read'
        with contextlib.suppress(ConnectionError):
            assert ' 413 ' in read_all(s).splitlines()[0]
    with socket.create_connection(('127.0.0.1', running.port), timeout=10) as s:
        s.sendall(b'GET / HTTP/1.1\r\nHost: localhost\r\nX: ' + b'a' * 10**6)
        with contextlib.suppress(ConnectionError):
            assert s.recv(65536)[:12] in (b'', b'HTTP/1.1 400')


def slow(service):
    service.limits = http_limits.Limits(receive_seconds=0.3, send_seconds=0.5)


def test_slow_clients_are_given_up(folder, monkeypatch):
    monkeypatch.setattr(http_limits.HeadTimeoutProtocol, 'head_seconds', 0.3)
    head = b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n'
    with Running(folder, change=slow) as server:
        for start, expected in ((b'', b''), (head[:40], b''), (head, b'')):
            with socket.create_connection(('127.0.0.1', server.port), timeout=10) as s:
                s.sendall(start)
                assert s.recv(65536) == expected  # closed without an answer: there is no request
        with socket.create_connection(('127.0.0.1', server.port), timeout=10) as s:
            s.sendall(head + b'Content-Length: 100\r\n\r\n{"model')
            said = read_all(s)
            assert ' 408 ' in said.splitlines()[0] and '"error"' in said
        assert server.engine.stats.steps == 0
        # a client that does not read what it asked for
        with socket.create_connection(('127.0.0.1', server.port), timeout=10) as s:
            s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            asked = dict(model='run', messages=[dict(role='user', content='x')], n=16)
            asked |= dict(max_tokens=400, logprobs=True, top_logprobs=20, stream=True)
            data = json.dumps(asked).encode()
            chat = head.replace(b'/v1/completions', b'/v1/chat/completions')
            s.sendall(chat + b'Content-Length: %d\r\n\r\n' % len(data) + data)
            end = time.monotonic() + 60
            while server.engine.stats.steps == 0 or server.service.thread.admitted:
                assert time.monotonic() < end, 'a client that does not read holds the engine'
                time.sleep(0.05)
        assert server.idle()


# Faults: leaving


def endless(service):
    "Texts have no end but their limit, and a step takes some milliseconds"
    service.model_limits = ModelLimits(service.model_limits.context, ())
    engine = service.thread.inside.engine
    step = engine.step

    def slow_step():
        time.sleep(0.005)
        return step()

    engine.step = slow_step


def wait_for(condition, seconds=20):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize('stream', [True, False])
def test_a_client_that_leaves_frees_its_pages(folder, stream):
    with Running(folder, change=endless) as running:
        leave(running, stream)


def leave(running, stream):
    "Ask for four long texts, leave, and look at the pages"
    asked = body(max_tokens=running.service.model_limits.context - 40, temperature=1, n=4)
    asked = json.dumps(asked | dict(stream=stream))
    thread = running.service.thread
    assert running.idle()
    with socket.create_connection(('127.0.0.1', running.port), timeout=10) as s:
        s.sendall(
            b'POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json'
            b'\r\nContent-Length: %d\r\n\r\n' % len(asked) + asked.encode()
        )
        wait_for(lambda: running.engine.stats.running == 4)
        if stream:
            assert b'200 OK' in s.recv(1000)
    left = time.monotonic()
    wait_for(lambda: not thread.admitted and not running.engine.busy, 5)
    assert time.monotonic() - left < 5
    assert running.idle()
    steps = running.engine.stats.steps
    time.sleep(0.2)
    assert running.engine.stats.steps == steps


def test_prompts_are_scored_one_after_the_other(model):
    "Each has a cache of its own while it is read, so one is read to its end before the next"
    loop = EngineLoop(Engine(model, 8))
    alive = []

    def turns(name):
        alive.append(name)
        for _ in range(3):
            yield
        alive.remove(name)
        return PromptScores([], [])

    futures = [Future() for _ in range(5)]
    for i, future in enumerate(futures):
        loop.add_turns(turns(i), future)
    most = 0
    while loop.turns:
        loop.take_turn()
        most = max(most, len(alive))
    assert most == 1 and all(future.done() for future in futures)


def test_a_client_that_leaves_while_its_prompt_is_scored(folder, monkeypatch):
    read = []

    def endless_turns(*args):
        while True:
            read.append(time.monotonic())
            time.sleep(0.01)
            yield

    monkeypatch.setattr(engine_thread, 'score_prompt', endless_turns)
    with Running(folder) as running:
        client = openai.OpenAI(base_url=running.url + '/v1', api_key='-', max_retries=0)
        how = body(max_tokens=1, echo=True, logprobs=1)
        for stream in (False, True):
            with pytest.raises(openai.APITimeoutError):
                client.with_options(timeout=0.5).completions.create(**how, stream=stream)
            thread = running.service.thread
            wait_for(lambda: not thread.admitted and not thread.inside.turns, 5)
        assert read


def test_a_client_that_leaves_the_queue(folder):
    "It leaves before its turn has come, and nothing is computed for it"
    with Running(folder, '--max_running', 1, '--queue', 2, change=endless) as server:
        client = openai.OpenAI(base_url=server.url + '/v1', api_key='-', max_retries=0)
        long = server.service.model_limits.context - 40
        first = client.completions.create(**body(max_tokens=long, temperature=1), stream=True)
        next(iter(first))
        with pytest.raises(openai.APITimeoutError):
            client.with_options(timeout=0.3).completions.create(**body(max_tokens=100))
        wait_for(lambda: server.service.thread.admitted == 1)
        wait_for(lambda: server.engine.stats.waiting == 0, 2)
        assert server.engine.stats.running == 1
        first.close()
        assert server.idle()


def test_a_full_queue(folder):
    with Running(folder, '--max_running', 1, '--queue', 1, change=endless) as server:
        client = openai.OpenAI(base_url=server.url + '/v1', api_key='-', max_retries=0)
        long = server.service.model_limits.context - 40
        how = body(max_tokens=long, temperature=1)
        streams = [client.completions.create(**how, stream=True) for _ in range(2)]
        status, headers, answer = post(server, '/v1/completions', body())
        assert status == 429 and answer['error']['type'] == 'rate_limit_error'
        assert 1 <= int(headers['Retry-After']) <= 60
        with pytest.raises(openai.RateLimitError, match='queue is full'):
            client.completions.create(**body())
        with pytest.raises(openai.BadRequestError, match='at most 2'):
            client.completions.create(**body(n=3))
        assert get(server, '/health')[0] == 200
        for s in streams:
            s.close()
        assert server.idle()
        assert client.completions.create(**body()).usage.completion_tokens == 4


def test_random_clients(running, model, tok):
    "Some leave at random, and the others get their texts; then all pages are free"
    dice = random.Random(0)
    wrong = []

    def one(i):
        client = openai.OpenAI(base_url=running.url + '/v1', api_key='-', max_retries=8)
        prompt = f'def f{i}(x):\n' * dice.randint(1, 6)
        new = dice.randint(1, 30)
        stream = client.completions.create(
            model='run', prompt=prompt, max_tokens=new, temperature=0, stream=True
        )
        if i % 3 == 0:
            next(iter(stream))
            stream.close()
            return
        text = ''.join(c.choices[0].text for c in stream)
        if text != text_of(model, tok, offline(model, tok, prompt, new)):
            wrong.append(i)

    threads = [threading.Thread(target=one, args=(i,)) for i in range(24)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(120)
    assert not wrong and running.idle()


# Faults: the engine


def poison(service):
    "A model whose logits are not a number behind one token"
    model = service.thread.model
    head = model.lm_head
    bad = service.encoder.text_ids('@')[-1]
    seen = []

    def hook(module, inputs, output):
        return output

    head.register_forward_hook(hook)
    with torch.no_grad():
        model.model['embed_tokens'].weight[bad] = float('nan')
    return seen


def test_logits_that_are_not_finite_end_one_request(folder, model, tok):
    with Running(folder, change=poison) as server:
        client = openai.OpenAI(base_url=server.url + '/v1', api_key='-', max_retries=0)
        good = client.completions.create(**body(max_tokens=60), stream=True)
        next(iter(good))
        with pytest.raises(openai.InternalServerError, match='finite'):
            client.completions.create(**body(prompt='@'))
        with pytest.raises(openai.APIError, match='finite'):
            list(client.completions.create(**body(prompt='@'), stream=True))
        assert sum(1 for _ in good) > 3
        assert client.completions.create(**body(max_tokens=24)).choices[0].text == text_of(
            model, tok, offline(model, tok, PROMPT, 24)
        )
        assert server.idle()


def test_an_engine_that_fails_ends_the_server(folder, capfd):
    def broken(service):
        def step():
            raise RuntimeError('planted')

        service.thread.inside.engine.step = step

    server = Running(folder, change=broken)
    with server:
        status, _, answer = post(server, '/v1/completions', body())
        assert status == 500 and answer['error']['type'] == 'server_error'
        server.thread.join(20)
        assert not server.thread.is_alive() and server.service.thread.failure
    assert 'planted' in capfd.readouterr().err


# Who may ask


def test_api_key(folder):
    with Running(folder, '--api_key', 'right') as server:
        for headers in (
            {},
            {'Authorization': 'Bearer wrong'},
            {'Authorization': 'Basic right'},
            {'Authorization': 'Bearer righ'},
            {'Authorization': 'Bearer right2'},
            {'Authorization': 'Bearer'},
        ):
            status, _, answer = post(server, '/v1/completions', body(), headers)
            assert status == 401 and answer['error']['code'] == 'invalid_api_key', headers
            assert get(server, '/v1/models', headers)[0] == 401
            assert get(server, '/metrics', headers)[0] == 401
        assert server.engine.stats.steps == 0
        assert get(server, '/health')[0] == get(server, '/')[0] == 200
        client = openai.OpenAI(base_url=server.url + '/v1', api_key='right', max_retries=0)
        assert client.completions.create(**body()).usage.completion_tokens == 4
        with pytest.raises(openai.AuthenticationError):
            client.with_options(api_key='wrong').models.list()


def test_other_names_for_this_host_are_refused(running):
    "A page of another site whose name was made to lead here"
    for host in ('evil.example', 'evil.example:8000', '127.0.0.1.evil.example', ''):
        status, _, answer = post(running, '/v1/completions', body(), {'Host': host})
        assert status == 403 and answer['error']['code'] == 'unknown_host'
    for host in ('localhost', f'127.0.0.1:{running.port}', '[::1]:80'):
        assert post(running, '/v1/completions', body(), {'Host': host})[0] == 200


def test_nothing_of_a_request_is_a_file(running, folder):
    for path in (
        '/chat.html',
        '/../settings.ini',
        '/..%2f..%2fetc/passwd',
        '//etc/passwd',
        '/config.json',
        '/model.safetensors',
        '/v1/models/..%2fconfig.json',
        '/chat.js/../../config.json',
    ):
        status, _, said = get(running, path)
        assert status == 404, path
        assert b'root:' not in said and b'hidden_size' not in said
    status, _, answer = post(running, '/v1/completions', body(model=str(folder)))
    assert status == 404 and answer['error']['code'] == 'model_not_found'


def test_the_page_and_its_headers(running):
    for path, kind in (('/', 'html'), ('/chat.css', 'css'), ('/chat.js', 'javascript')):
        status, headers, said = get(running, path)
        assert status == 200 and kind in headers['Content-Type']
        policy = headers['Content-Security-Policy']
        assert "default-src 'none'" in policy and 'unsafe' not in policy
        assert headers['X-Content-Type-Options'] == 'nosniff'
        assert not re.search(rb'https?://(?!www\.w3\.org/)', said), 'asks somebody else'


# The command


def start(folder, *options, env=None):
    "Start the command, and return the process and its address"
    command = Path(sys.executable).with_name('eva_serve')
    process = subprocess.Popen(
        [command, folder, '--port', '0', *map(str, options)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | (env or {}),
    )
    line = process.stdout.readline()
    found = re.search(r'http://([\d.]+):(\d+)/', line)
    assert found, line + process.stderr.read()
    return process, found


class At:
    def __init__(self, port):
        self.port = int(port)


def test_sigterm_drains(folder):
    "What runs is finished, what is new is refused, and then the process ends with 0"
    process, found = start(folder, '--drain', 60)
    assert found[1] == '127.0.0.1'
    server = At(found[2])
    client = openai.OpenAI(
        base_url=f'http://127.0.0.1:{server.port}/v1', api_key='-', max_retries=0
    )
    how = body(max_tokens=300, temperature=1, seed=1, n=8)
    chunks = iter(client.completions.create(**how, stream=True))
    ends = [next(chunks).choices[0].finish_reason]
    process.send_signal(signal.SIGTERM)
    wait_for(lambda: get(server, '/health')[0] == 503)
    status, headers, answer = post(server, '/v1/completions', body())
    assert status == 503 and int(headers['Retry-After']) > 0 and answer['error']['message']
    ends += [c.choices[0].finish_reason for c in chunks]
    ended = [o for o in ends if o]
    assert len(ended) == 8 and set(ended) <= {'stop', 'length'} and len(ends) > 100
    assert process.wait(20) == 0, process.stderr.read()
    with pytest.raises(openai.APIConnectionError):
        client.models.list()


def test_draining_ends_in_time(folder):
    process, found = start(folder, '--drain', 0.01, '--api_key', 'k')
    client = openai.OpenAI(base_url=f'http://127.0.0.1:{found[2]}/v1', api_key='k', max_retries=0)
    long = 10**9
    with pytest.raises(openai.BadRequestError) as refused:
        client.completions.create(**body(max_tokens=long))
    long = int(re.search(r'at most (\d+)', refused.value.message)[1]) - 40
    how = body(max_tokens=long, temperature=1, n=16, logprobs=5)
    stream = client.completions.create(**how, stream=True)
    next(iter(stream))
    asked = time.monotonic()
    process.send_signal(signal.SIGINT)
    with pytest.raises(openai.APIError):
        for _ in stream:
            pass
    assert process.wait(20) == 130
    assert time.monotonic() - asked < 15


def test_arguments(folder, tmp_path, capsys, monkeypatch):
    def ended(*argv):
        try:
            code = eva_serve([str(o) for o in argv])
        except SystemExit as e:
            code = e.code
        return code, capsys.readouterr().err

    without_mtp = tmp_path / 'without'
    shutil.copytree(folder, without_mtp)
    small = load_pretrained(folder).cfg.replace(num_nextn_predict_layers=0)
    DeepSeekV3(small).save_pretrained(without_mtp)
    for argv, said in [
        (('nowhere',), 'nowhere: no such folder'),
        ((tmp_path,), 'no tokenizer.json'),
        ((folder, '--cache_memory', '1'), 'two pages take'),
        ((folder, '--cache_memory', 'much'), 'is no size'),
        ((folder, '--pages', 0), 'above zero'),
        ((folder, '--queue', -1), 'negative'),
        ((without_mtp, '--speculate'), 'no MTP module'),
        ((folder, '--api_key', 'ключ'), 'printable ASCII'),
        ((folder, '--pages', 5, '--cache_memory', '1GB'), 'not allowed with'),
        ((folder, '--host', 'no.such.host.invalid'), 'choose another'),
        ((folder, '--port', 70000), 'choose another'),
    ]:
        code, err = ended(*argv)
        assert code in (1, 2) and said in err.splitlines()[-1], err
    with socket.create_server(('127.0.0.1', 0)) as taken:
        code, err = ended(folder, '--port', taken.getsockname()[1])
        assert code == 1 and 'choose another' in err and err.count('\n') == 1
    monkeypatch.setattr(serve, 'find_spec', lambda name: None)
    code, err = ended(folder)
    assert code == 2 and 'pip install "eva-deepseek[serve]"' in err and err.count('\n') == 1
    assert byte_size('2GB') == 2 * 10**9 and byte_size('1.5 mb') == 1_500_000


def test_the_key_of_the_environment(folder):
    process, found = start(folder, env=dict(EVA_API_KEY='from outside'))
    try:
        assert get(At(found[2]), '/v1/models')[0] == 401
    finally:
        process.terminate()
        assert process.wait(20) == 0


# Memory


def resident():
    for line in Path('/proc/self/status').read_text().splitlines():
        if line.startswith('VmRSS'):
            return int(line.split()[1]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@pytest.mark.skipif(not Path('/proc/self/status').exists(), reason='reads Linux /proc')
def test_a_thousand_requests_stay_within_the_memory(folder, model):
    "The cache has the pages it was given, and the process does not grow by more than a little"
    with Running(folder, '--pages', 64, '--max_running', 8, '--queue', 2000) as server:

        async def ask(count):
            async with openai.AsyncOpenAI(
                base_url=server.url + '/v1', api_key='-', max_retries=0, timeout=300
            ) as client:
                asked = [
                    client.completions.create(**body(prompt=f'def f{i}', max_tokens=2 + i % 3))
                    for i in range(count)
                ]
                return await asyncio.gather(*asked)

        asyncio.run(ask(100))
        before = resident()
        done = asyncio.run(ask(1000))
        assert len(done) == 1000 and server.idle()
        assert server.engine.stats.pages == 64
        assert server.engine.cache.nbytes == 65 * page_bytes(model.cfg, 16, torch.float32)
        assert resident() - before < 150 * 2**20, 'grows with requests'
