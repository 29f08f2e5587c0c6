"""The page to chat in a real browser, with a real server behind it

Needs playwright and Chromium; without them it is skipped, unless SITE_TEST=required."""

import importlib.util
import json
import os
import shutil

import pytest
from serving import Running, train, with_template

CHROMIUM = (
    os.environ.get('CHROMIUM')
    or shutil.which('chromium')
    or shutil.which('chromium-browser')
    or shutil.which('google-chrome')
)
WIDE = """() => [...document.querySelectorAll('body *')]
  .filter((e) => e.getClientRects().length && e.getBoundingClientRect().right > innerWidth + 1)
  .map((e) => e.tagName + '.' + e.className)"""
SHOTS = os.environ.get('CHAT_SHOTS')  # a folder for pictures of the page


@pytest.fixture(scope='module')
def browser():
    why = None
    if not importlib.util.find_spec('playwright'):
        why = "playwright is not installed: pip install -e '.[docs]'"
    elif not CHROMIUM:
        why = 'no Chromium: apt-get install -y --no-install-recommends chromium fonts-dejavu-core'
    if why:
        (pytest.fail if os.environ.get('SITE_TEST') == 'required' else pytest.skip)(why)
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        b = p.chromium.launch(
            executable_path=CHROMIUM,
            args=['--no-sandbox', '--disable-gpu', '--disable-background-networking'],
        )
        yield b
        b.close()


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    return with_template(train(tmp_path_factory.mktemp('page')))


@pytest.fixture(scope='module')
def server(folder, browser):
    with Running(folder, '--speculate') as running:
        yield running


def until(page, expression):
    "Wait until an expression is true; the page's policy allows no `eval`, which playwright's takes"
    for _ in range(1500):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f'never true: {expression}')


class Page:
    "The page of a server, and what is wrong with it"

    def __init__(self, browser, server, **options):
        self.found = []
        self.context = browser.new_context(**dict(viewport=dict(width=1280, height=800)) | options)
        self.page = self.context.new_page()
        self.page.set_default_timeout(30_000)  # milliseconds: a busy machine is no fault
        self.page.route('**/*', lambda route: self.guard(route, server.url))
        self.page.on(
            'console',
            lambda m: m.type in ('error', 'warning') and self.found.append(f'console: {m.text}'),
        )
        self.page.on('pageerror', lambda e: self.found.append(f'script: {e}'))
        self.page.goto(server.url)
        until(self.page, 'document.title !== "Chat"')

    def guard(self, route, url):
        "Nothing from outside is fetched"
        if route.request.url.startswith((url, 'data:')):
            return route.continue_()
        self.found.append(f'outside: {route.request.url}')
        route.abort()

    def set(self, **settings):
        if not self.page.locator('#settings').evaluate('o => o.open'):
            self.page.locator('summary').click()
        for name, value in settings.items():
            self.page.fill(f'#{name}', str(value))

    def ask(self, text):
        self.page.fill('#prompt', text)
        self.page.press('#prompt', 'Enter')

    def answer(self):
        "Wait for the end, and return the text of the last answer"
        until(self.page, '!document.getElementById("send").disabled')
        return self.page.locator('.turn.assistant').last.inner_text()

    def shot(self, name):
        if SHOTS:
            self.page.screenshot(path=f'{SHOTS}/{name}.png')

    def close(self):
        self.context.close()
        assert self.found == []


@pytest.fixture
def page(browser, server):
    found = Page(browser, server)
    yield found
    found.close()


def test_an_answer_streams_and_its_tokens_explain_themselves(page, server):
    page.set(temperature=0, max_tokens=24)
    page.ask('f7')
    answer = page.answer()
    assert answer.strip() and 'tokens in' in page.page.inner_text('#status')
    tokens = page.page.locator('.turn.assistant .token')
    assert 5 < tokens.count() <= 24
    tokens.nth(2).hover()
    assert '%' in page.page.inner_text('#chosen')
    assert page.page.locator('#likely tr').count() == 5
    assert page.page.locator('#likely tr.chosen').count() == 1
    layers = server.service.about['moe_layers']
    assert page.page.locator('#map .layer').count() == len(layers)
    each = server.service.about['experts_per_token']
    assert page.page.locator('#map .cell.on').count() == each * len(layers)
    label = page.page.get_attribute('#map', 'aria-label')
    assert f'layer {layers[0]}: ' in label
    assert page.page.locator('.token.drafted').count() == server.engine.stats.accepted > 0
    page.shot('desktop')


def test_the_settings_are_sent(page):
    sent = []
    page.page.on('request', lambda r: r.method == 'POST' and sent.append(json.loads(r.post_data)))
    page.set(temperature=1.5, top_p=0.8, max_tokens=9, seed=4)
    page.ask('f7')
    first = page.answer()
    page.page.click('#new')
    assert page.page.locator('.turn').count() == 0
    page.ask('f7')
    assert page.answer() == first
    page.ask('f8')
    page.answer()
    assert [(s['temperature'], s['top_p'], s['max_tokens'], s['seed']) for s in sent] == [
        (1.5, 0.8, 9, 4)
    ] * 3
    assert [len(s['messages']) for s in sent] == [1, 1, 3]  # the conversation goes on
    page.set(temperature=7)
    page.ask('f9')
    assert 'Temperature' in page.page.inner_text('#status') and len(sent) == 3


def test_stop(page, server):
    engine = server.engine
    page.set(temperature=2, max_tokens=256, seed=1)
    page.ask('f7')
    page.page.wait_for_selector('.turn.assistant .token')
    page.page.keyboard.press('Escape')
    until(page.page, 'document.getElementById("status").textContent !== ""')
    assert server.idle()
    steps = engine.stats.steps
    page.page.wait_for_timeout(200)
    assert engine.stats.steps == steps


def test_by_keyboard_alone(page):
    page.set(temperature=0, max_tokens=12)
    page.page.focus('#prompt')
    page.page.keyboard.type('f7')
    page.page.keyboard.press('Shift+Enter')
    page.page.keyboard.type('f8')
    page.page.keyboard.press('Enter')
    page.answer()
    assert page.page.locator('.turn.user').inner_text().endswith('f7\nf8')
    page.page.focus('#new')
    page.page.keyboard.press('Tab')
    focused = 'document.activeElement'
    assert page.page.evaluate(f'{focused}.className').startswith('token')
    first = page.page.inner_text('#chosen')
    page.page.keyboard.press('ArrowRight')
    page.page.keyboard.press('ArrowRight')
    place = f'[...{focused}.parentElement.children].indexOf({focused})'
    assert page.page.evaluate(place) == 2
    assert page.page.inner_text('#chosen') and first
    page.page.keyboard.press('Tab')
    assert page.page.evaluate(f'{focused}.id') == 'prompt'


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_on_a_phone(browser, server, scheme):
    page = Page(
        browser, server, viewport=dict(width=390, height=844), color_scheme=scheme, has_touch=True
    )
    page.set(temperature=0, max_tokens=24)
    page.page.locator('summary').click()
    page.ask('a_word_that_is_much_too_long_for_a_line_of_a_phone' * 3)
    page.answer()
    page.page.locator('.token').nth(3).tap()
    assert '%' in page.page.inner_text('#chosen')
    page.shot(f'phone_{scheme}')
    assert page.page.evaluate(WIDE) == []
    assert page.page.evaluate('document.documentElement.scrollWidth') <= 390
    box = page.page.locator('#send').bounding_box()
    assert box['y'] + box['height'] <= 844, 'the button is below the screen'
    page.close()


CONTRAST = """() => {
  const light = (c) => {
    const [r, g, b] = c.match(/[\\d.]+/g).slice(0, 3).map((v) => {
      v = v / 255; return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; });
    return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const solid = (e) => { for (; e; e = e.parentElement) {
    const c = getComputedStyle(e).backgroundColor;
    if (!/, 0\\)|transparent/.test(c) && !/rgba/.test(c)) return c; } return 'rgb(255,255,255)'; };
  const bad = [];
  const all = 'h1, p, label, button, caption, th, td, summary, .turn';
  for (const e of document.querySelectorAll(all)) {
    if (!e.offsetParent) continue;
    const a = light(getComputedStyle(e).color), b = light(solid(e));
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    if (ratio < 4.5) bad.push([e.tagName, e.id, ratio]);
  }
  return bad;
}"""


@pytest.mark.parametrize('scheme', ['light', 'dark'])
def test_contrast(browser, server, scheme):
    page = Page(browser, server, color_scheme=scheme)
    page.set(temperature=0, max_tokens=12)
    page.ask('f7')
    page.answer()
    page.page.locator('.token').nth(1).hover()
    page.shot(f'desktop_{scheme}')
    assert page.page.evaluate(CONTRAST) == []
    page.close()


def test_without_a_chat_template(browser, folder, tmp_path):
    plain = tmp_path / 'plain'
    shutil.copytree(folder, plain)
    about = json.loads((plain / 'tokenizer_config.json').read_text())
    del about['chat_template']
    (plain / 'tokenizer_config.json').write_text(json.dumps(about))
    with Running(plain) as server:
        page = Page(browser, server)
        assert 'no chat template' in page.page.inner_text('#about')
        page.set(temperature=0, max_tokens=12)
        page.ask('def f7(x):')
        assert page.answer().strip()
        for token in page.page.locator('.token').all():
            token.focus()
            shown = page.page.locator('#likely td:last-child').all_inner_texts()
            values = [0 if '<' in text else float(text.rstrip(' %')) for text in shown]
            assert len(values) >= 4 and values == sorted(values, reverse=True), shown
        page.close()


def test_errors_are_shown(browser, folder):
    with Running(folder, '--api_key', 'secret') as server:
        page = Page.__new__(Page)
        page.found = []
        page.context = browser.new_context()
        page.page = page.context.new_page()
        page.page.goto(server.url)
        until(page.page, 'document.getElementById("status").textContent !== ""')
        assert 'key' in page.page.inner_text('#status')
        page.set(key='secret', max_tokens=4)
        page.page.press('#key', 'Tab')
        until(page.page, 'document.title === "run"')
        page.ask('f7')
        assert page.answer().strip()
        server.service.thread.admitted += 1000
        page.ask('f8')
        page.page.wait_for_selector('.turn.failed')
        assert 'queue is full' in page.page.inner_text('#status')
        server.service.thread.admitted -= 1000
        page.close()
