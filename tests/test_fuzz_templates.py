"""Chat templates, hostile and harmless: each one gives a text or a ValueError of one sentence, in
bounded time and memory, and harmless ones give what Jinja itself gives

300 cases run by default; `EVA_FUZZ_TEMPLATES=20000` runs as many, `--flags slow` 10,000.
Each batch of cases is run by a process of its own, whose memory is then known.
"""

import json
import os
import random
import re
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest

from eva.generation.chat_templates import ChatTemplate
from eva.generation.sandbox import RENDER_PROCESS, Renderer

CASES = int(os.environ.get('EVA_FUZZ_TEMPLATES', 300))
SECONDS = 0.2  # of the processor, for one rendering
MEMORY = 2**26  # bytes, for one rendering
LONGEST_WAIT = (
    20  # seconds by the clock: ten times SECONDS for each of two renderings, and a busy machine
)
TALK = [
    dict(role='system', content='Be brief.'),
    dict(role='user', content="Wie geht's? <b> 日本 {{ 1 }}"),
    dict(
        role='assistant', content='hm</think>Gut.', tool_calls=[dict(name='f', arguments={'a': 1})]
    ),
    dict(role='user', content=''),
]
MARKS = dict(bos_token='<s>', eos_token='</s>')

# --- templates


class Grammar:
    "Templates drawn at random: values, filters and statements, with sizes that are harmless or not"

    def __init__(self, rng: random.Random, hostile: bool):
        self.rng = rng
        self.hostile = hostile

    def size(self) -> str:
        sizes = ['0', '1', '2', '7']
        if self.hostile:
            sizes += [
                '10**9',
                '99999',
                '2**31',
                '10**18',
                '10**5000',
                '-1',
                '1e308',
                '2**63',
                '9**(9**9)',
            ]
        return self.rng.choice(sizes)

    def atom(self) -> str:
        kinds = [
            "'a'",
            '"ü\\n"',
            '3',
            '1.5',
            'none',
            'true',
            'messages',
            'messages[0].content',
            '[1, 2]',
        ]
        kinds += ['bos_token', "{'a': [1, 'b']}", 'missing', 'messages|length', 'loop', 'range(3)']
        if self.hostile:
            kinds += [
                f'range({self.size()})',
                f'lipsum(n={self.size()})',
                'cycler(1, 2)',
                'joiner()',
            ]
            kinds += [
                'namespace(a=1)',
                'dict(a=1)',
                "''.__class__",
                'self',
                f"'%{self.size()}d'",
                'f(1)',
            ]
            kinds += [
                'messages.append(1)',
                f"'{{:>{self.rng.choice((9, 10**9, 10**18))}}}'.format(1)",
            ]
            kinds += [
                f"'%{self.rng.choice((9, 10**9, 10**18))}d' % 1",
                f'strftime_now({self.atom_text()})',
            ]
        return self.rng.choice(kinds)

    def atom_text(self) -> str:
        return self.rng.choice(["'%Y'", "'%1000000000d'", "'%'", "'\\x00'", "'ü' * 9999"])

    def filter(self) -> str:
        plain = (
            'length upper title trim first last list string int float abs join sort unique tojson'
        )
        plain += ' reverse escape wordcount default capitalize lower safe items dictsort'
        name = self.rng.choice(plain.split())
        if not self.hostile or self.rng.random() < 0.5:
            return name
        sized = (
            'center({}) indent({}) batch({}) slice({}) '
            'tojson(indent={}) truncate({}) wordwrap({}) round({})'
        )
        sized += (
            ' replace("",messages|string*{}) join("x"*{}) '
            'sum(start={}) format({}) attr("__class__")'
        )
        return self.rng.choice(sized.split()).format(self.size())

    def value(self, depth: int) -> str:
        pick = self.rng.random()
        if depth <= 0 or pick < 0.3:
            return self.atom()
        if pick < 0.6:
            return f'({self.value(depth - 1)})|{self.filter()}'
        if pick < 0.8:
            operator = self.rng.choice(
                ['+', '~', '==', 'in', 'and', 'or', '-'] + ['*', '**', '%', '//'] * self.hostile
            )
            right = self.size() if self.rng.random() < 0.4 else self.value(depth - 1)
            return f'({self.value(depth - 1)} {operator} {right})'
        if pick < 0.9:
            return (
                f'({self.value(depth - 1)} if {self.value(depth - 1)} else {self.value(depth - 1)})'
            )
        return f'({self.value(depth - 1)})[{self.size()}]'

    def statements(self, depth: int) -> str:
        return ''.join(self.statement(depth) for _ in range(self.rng.randrange(1, 4)))

    def statement(self, depth: int) -> str:
        kind = self.rng.choice(
            ['text', 'value', 'value', 'for', 'if', 'set', 'raise', 'filter', 'generation']
        )
        if self.hostile and self.rng.random() < 0.4:
            kind = self.rng.choice(
                ['many', 'twice', 'doubled', 'macro', 'cut', 'deep', 'call', 'include']
            )
        if depth <= 0 or kind == 'text':
            return self.rng.choice(['x', '\n', ' <|User|> ', 'ü日\n  '])
        body = lambda: self.statements(depth - 1)  # noqa: E731
        v = lambda: self.value(2)  # noqa: E731
        number = self.rng.choice((30, 500, 50_000))
        return {
            'value': lambda: f'{{{{ {v()} }}}}',
            'for': lambda: (
                f'{{% for m in messages %}}{body()}{{% if loop.last '
                f'%}}{{% break %}}{{% endif %}}{{% endfor %}}'
            ),
            'if': lambda: f'{{%- if {v()} %}}{body()}{{% else %}}{body()}{{% endif -%}}',
            'set': lambda: f'{{% set x = {v()} %}}{{{{ x }}}}',
            'raise': lambda: f'{{% if {v()} == 3 %}}{{{{ raise_exception({v()}) }}}}{{% endif %}}',
            'filter': lambda: (
                f'{{% filter {self.rng.choice(("upper", "trim"))} %}}{body()}{{% endfilter %}}'
            ),
            'generation': lambda: f'{{% generation %}}{body()}{{% endgeneration %}}',
            'many': lambda: '{% for i in range(99999) %}' * 3 + body() + '{% endfor %}' * 3,
            'twice': lambda: (
                f'{{% for i in {v()} %}}{{% for j in {v()} %}}{body()}{{% endfor %}}{{% endfor %}}'
            ),
            'doubled': lambda: (
                "{% set n = namespace(a='xy') %}{% for i in range(60) %}{% set n.a = n.a "
                f'{self.rng.choice("~+")} n.a %}}{{% endfor %}}{{{{ n.a|length }}}}'
            ),
            'macro': lambda: (
                f'{{% macro f(a) %}}{body()}{{{{ f(a) }}}}{{{{ '
                f'f(a) }}}}{{% endmacro %}}{{{{ f({v()}) }}}}'
            ),
            'cut': lambda: (
                body()[: self.rng.randrange(20)]
                + self.rng.choice(['{{', '{%', '}}', '{#', '{% raw %}'])
            ),
            'deep': lambda: '{{ ' + '(' * number + v() + ')' * number + ' }}',
            'call': lambda: f'{{% call(u) f({v()}) %}}{body()}{{% endcall %}}',
            'include': lambda: "{% include '/etc/passwd' %}",
        }[kind]()


def draw(i: int) -> tuple[str, bool]:  # template, is it a hostile one?
    "Case number i"
    rng = random.Random(i)
    hostile = rng.random() < 0.7
    return Grammar(rng, hostile).statements(rng.randrange(1, 4)), hostile


# --- what a process of its own does


def outcome(template: str) -> tuple[str, str]:  # 'text' or 'refused', and what was said
    "Render a template twice over, with and without its last turn"
    try:
        t = ChatTemplate(template, '/x/chat_template.jinja', **MARKS)
        return 'text', t.prefixes(TALK, [(4, True), (2, False)])[0]
    except ValueError as e:
        return 'refused', str(e)


def expected(template: str) -> tuple[str, str | None]:
    "What Jinja says in this process, for templates that can do no harm"
    try:
        render = Renderer(template)
        whole, _ = (render(TALK[:n], ask, MARKS, 2**24) for n, ask in ((4, True), (2, False)))
        return 'text', whole
    except Exception:
        return 'refused', None


def without_addresses(text: str) -> str:
    "A text in which objects were written, with their places in memory left out"
    return re.sub('0x[0-9a-f]+', '', text, flags=re.IGNORECASE)


def run_cases(first: int, count: int) -> dict:
    "Try cases, and report what was seen"
    ChatTemplate.seconds = SECONDS
    ChatTemplate.memory = MEMORY
    endless = outcome('{% for i in range(99999) %}' * 4 + '{% endfor %}' * 4)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    seen = dict(text=0, refused=0, limits=0, compared=0, slowest=0.0, findings=[])
    if 'takes longer than' not in endless[1]:
        seen['findings'].append(f'endless: {endless}')
    for i in range(first, first + count):
        template, hostile = draw(i)
        start = time.monotonic()
        try:
            kind, said = outcome(template)
        except Exception as e:
            seen['findings'].append(f'{i}: {type(e).__name__}: {str(e)[:200]}')
            continue
        seen['slowest'] = max(seen['slowest'], time.monotonic() - start)
        seen[kind] += 1
        sentence = said.startswith('/x/chat_template.jinja: ') and 25 <= len(said) < 600
        if kind == 'refused' and not (sentence and said.isprintable()):
            seen['findings'].append(f'{i}: not a sentence: {said[:700]!r}')
        seen['limits'] += kind == 'refused' and ('longer than' in said or 'memory' in said)
        if not hostile:
            want, text = expected(template)
            seen['compared'] += 1
            if (
                want != kind
                or text is not None
                and without_addresses(text) != without_addresses(said)
            ):
                seen['findings'].append(
                    f'{i}: {kind} {said[:100]!r} instead of {want} {str(text)[:100]!r}'
                )
    RENDER_PROCESS.stop()
    peak = [
        resource.getrusage(w).ru_maxrss for w in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ]
    return seen | dict(grown=1024 * (peak[0] - before), worker=1024 * peak[1])


# --- tests


def check(first: int, count: int):
    "Run cases in a process of its own and judge what it saw"
    command = [sys.executable, __file__, str(first), str(count)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120 + count)
    assert done.returncode == 0, done.stderr[-2000:]
    seen = json.loads(done.stdout)
    print(seen)
    assert not seen['findings'], seen['findings'][:10]
    assert seen['text'] + seen['refused'] == count
    assert (
        min(seen['text'], seen['refused'], seen['compared']) > count // 10
    )  # all kinds were there
    assert seen['limits'] > count // 50
    assert seen['slowest'] < LONGEST_WAIT, seen
    assert seen['grown'] < 2**26, seen  # bytes, in the process that asks
    assert seen['worker'] < MEMORY + 2**27, seen  # Python and Jinja are in it too


def test_templates():
    check(0, CASES)


ATTACKS = [  # ways to Python's own objects; the first ones were open before Jinja 3.1.6
    "{{ ('{0.__init__.__globals__}'|attr('format'))(cycler) }}",
    "{{ ('{0.__class__.__mro__}'|attr('format'))(1) }}",
    "{{ ('{a.__class__}'|attr('format_map'))({'a': 1}) }}",
    "{% set f = '{0.__class__}'.format %}{{ f(1) }}",
    "{{ (['{0.__class__}']|map('attr', 'format')|first)(1) }}",
    "{{ ''.__class__.__base__.__subclasses__() }}",
    "{{ ''|attr('__class__')|attr('__mro__') }}",
    '{{ raise_exception.__globals__ }}',
    '{{ strftime_now.__closure__[0].cell_contents }}',
    '{{ self._TemplateReference__context }}',
    '{{ messages.append(1) }}',
    "{{ messages[0].update(role='system') }}",
]


@pytest.mark.parametrize('template', ATTACKS)
def test_attacks(template):
    kind, said = outcome(template)
    assert kind == 'refused' or said == '', said  # an attribute that cannot be reached is undefined


@pytest.mark.skipif(not Path('/proc/self/environ').exists(), reason='the system does not show it')
def test_the_process_of_templates_knows_no_secrets(monkeypatch):
    monkeypatch.setenv('EVA_SECRET', 'sesame')
    RENDER_PROCESS.stop()
    assert outcome('x') == ('text', 'x')
    assert b'sesame' not in Path(f'/proc/{RENDER_PROCESS.process.pid}/environ').read_bytes()


@pytest.mark.slow
def test_ten_thousand_templates():
    for first in range(0, 10_000, 1000):
        check(10**6 + first, 1000)


if __name__ == '__main__':
    print(json.dumps(run_cases(int(sys.argv[1]), int(sys.argv[2]))))
