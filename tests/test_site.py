"""The site in a real browser: every page of it, on a desktop and at the width of a phone

Needs the `docs` extra and Chromium; without them it is skipped, unless SITE_TEST=required."""

import functools
import http.server
import importlib.util
import os
import re
import runpy
import shutil
import subprocess
import sys
import threading
from pathlib import Path
from urllib.parse import unquote

import pytest

root = Path(__file__).parents[1]
CHROMIUM = (
    os.environ.get('CHROMIUM')
    or shutil.which('chromium')
    or shutil.which('chromium-browser')
    or shutil.which('google-chrome')
)


def missing():
    for package in ('sphinx', 'myst_parser', 'furo', 'playwright'):
        if not importlib.util.find_spec(package):
            return f"{package} is not installed: pip install -e '.[docs]'"
    if not CHROMIUM:
        return (
            'no Chromium: apt-get install -y --no-install-recommends '
            'chromium fonts-dejavu-core, or name one in CHROMIUM'
        )


# Tests that open every page can run in one process, and the others in another one beside it
EVERY_PAGE = pytest.mark.every_page


@pytest.fixture(scope='module')
def needed():
    if why := missing():
        (pytest.fail if os.environ.get('SITE_TEST') == 'required' else pytest.skip)(why)


@pytest.fixture(scope='module')
def site(needed, tmp_path_factory):
    "The pages, built anew; SITE_DIR names ones that are built already"
    if built := os.environ.get('SITE_DIR'):
        return Path(built).resolve()
    to = tmp_path_factory.mktemp('site')
    done = subprocess.run(
        [sys.executable, root / 'tools' / 'docs_site.py', to / 'html', '--src', to / 'src'],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return to / 'html'


class Handler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


class Server(http.server.ThreadingHTTPServer):
    request_queue_size = (
        128  # a browser opens many connections at once; refused ones wait for seconds
    )


class Reader:
    "Opens pages and says what is wrong with them"

    def __init__(self, browser, folder):
        self.server = Server(('127.0.0.1', 0), functools.partial(Handler, directory=folder))
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.base = f'http://127.0.0.1:{self.server.server_port}/'
        self.page = browser.new_page()
        self.page.set_default_timeout(120_000)  # milliseconds: a busy machine is no fault of a page
        self.page.route('**/*', self.guard)
        self.page.on(
            'console',
            lambda m: m.type in ('error', 'warning') and self.found.append(f'console: {m.text}'),
        )
        self.page.on('pageerror', lambda e: self.found.append(f'script: {e}'))
        self.page.on(
            'response', lambda r: r.status >= 400 and self.found.append(f'{r.status}: {r.url}')
        )
        self.found = []

    def guard(self, route):
        "Nothing from outside is fetched, and whatever tries is reported"
        if route.request.url.startswith((self.base, 'data:')):
            return route.continue_()
        self.found.append(f'outside: {route.request.url}')
        route.abort()

    def open(self, path, width=1280):
        self.found.clear()
        self.page.set_viewport_size(dict(width=width, height=900))
        self.page.goto(self.base + path, wait_until='load')
        self.page.evaluate('window.MathJax?.startup?.promise.then(() => true)')

    def examine(self, name):
        "(what is wrong, links, ids, formulas) of a page"
        self.open(name)
        seen = self.page.evaluate(LOOK)
        wrong = self.found + seen['wrong']
        self.page.set_viewport_size(dict(width=390, height=844))
        wide = self.page.evaluate(WIDE)
        return (
            wrong + [f'wider than a phone: {w}' for w in wide],
            seen['links'],
            set(seen['ids']),
            seen['formulas'],
        )


# raw TeX is looked for in what a reader sees, outside of code
LOOK = (root / 'tests' / 'site_examination.js').read_text(encoding='utf-8')
WIDE = (root / 'tests' / 'site_width.js').read_text(encoding='utf-8')


@pytest.fixture(scope='module')
def browser(needed):
    from playwright.sync_api import sync_playwright

    with sync_playwright() as p:
        b = p.chromium.launch(
            executable_path=CHROMIUM,
            args=[
                '--no-sandbox',
                '--disable-gpu',
                '--disable-background-networking',
                '--disable-component-update',
            ],
        )
        yield b
        b.close()


@pytest.fixture(scope='module')
def reader(browser, site):
    return Reader(browser, site)


@pytest.fixture(scope='module')
def pages(reader, site):
    "Every page examined once"
    names = sorted(p.relative_to(site).as_posix() for p in site.rglob('*.html'))
    return {name: reader.examine(name) for name in names if not name.startswith('_')}


@EVERY_PAGE
def test_every_chapter_has_a_page(pages):
    nbs = root / 'nbs'
    chapters = [
        f'{p.parent.name}/{re.sub(r"^[0-9]+_", "", p.stem)}'
        for p in nbs.glob('[0-9]*/[0-9]*.ipynb')
    ]
    parts = [f'{p.parent.name}/index' for p in nbs.glob('[0-9]*/index.ipynb')]
    assert len(chapters) > 50 and len(parts) == 16
    assert {
        f'{c}.html'
        for c in (*chapters, *parts, 'api', 'genindex', 'search', 'decisions', 'contributing')
    } <= set(pages)
    assert sum(formulas for *_, formulas in pages.values()) > 500, 'are formulas rendered at all?'


@EVERY_PAGE
def test_nothing_is_wrong_on_any_page(pages):
    "No error, nothing from outside, formulas rendered, pictures there, all 390 px wide"
    assert not (bad := {name: wrong for name, (wrong, *_) in pages.items() if wrong}), '\n'.join(
        f'{n}: {w}' for n, o in bad.items() for w in o
    )


def lost(pages, base, folder):
    "Links between pages that do not land, with the pages where they stand"
    for name, (_, links, *_) in pages.items():
        for to in links:
            if not to.startswith(base):
                continue
            path, _, anchor = to[len(base) :].partition('#')
            path = path.partition('?')[0] or 'index.html'
            anchor = unquote(anchor)
            if path.startswith('_images/') and (folder / path).is_file():
                continue  # a picture in full size
            if path not in pages:
                yield f'{name}: {path} is no page'
            elif anchor and anchor not in pages[path][2]:
                yield f'{name}: {path} has no #{anchor}'


@EVERY_PAGE
def test_every_link_lands(pages, reader, site):
    assert sum(to.startswith(reader.base) for _, links, *_ in pages.values() for to in links) > 2000
    assert not (bad := sorted(set(lost(pages, reader.base, site)))), '\n'.join(bad)


@EVERY_PAGE
def test_other_projects_links_land(pages):
    "Where nbdev sends those who use our symbols, there is something"
    symbols = runpy.run_path(root / 'eva' / '_modidx.py')['d']['syms']
    public = [
        (s, at)
        for m in symbols.values()
        for s, (at, _) in m.items()
        if not any(p.startswith('_') for p in s.split('.')[2:])
    ]
    there = [
        s
        for s, at in public
        if (p := pages.get(at.partition('#')[0])) and at.partition('#')[2] in p[2]
    ]
    assert len(public) > 300 and len(there) > 0.8 * len(public), (
        len(there),
        len(public),
    )  # methods that say nothing of themselves have no entry


def results(reader, words):
    "Addresses of what the search finds, best first"
    reader.open('index.html')
    reader.page.fill('input.sidebar-search', words)
    reader.page.press('input.sidebar-search', 'Enter')
    reader.page.wait_for_function(
        "document.querySelector('#search-results "
        ".search-summary')?.textContent.match(/found|did not match/)"
    )
    return reader.page.eval_on_selector_all('#search-results li a', 'all => all.map(a => a.href)')


@pytest.mark.parametrize(
    'word,page',
    [
        ('absorbed', '02_attention/mla.html'),  # prose and code
        ('quantisation', '04_fp8/formats.html'),  # prose
        ('itertools', '11_planner/placement.html'),  # code that is no symbol of ours
        ('LatentCache', '02_attention/kv_cache.html'),  # a symbol
        ('eva.moe.router.Router', 'router.html'),
    ],
)  # and its full name
def test_search_finds(reader, word, page):
    hits = results(reader, word)
    assert any(page in h for h in hits), (word, hits)
    assert not reader.found


def test_search_does_not_find_what_is_not_there(reader):
    reader.open('search.html?q=zygodactyl')
    reader.page.wait_for_function(
        "document.querySelector('#search-results "
        ".search-summary')?.textContent.match(/found|did not match/)"
    )
    assert not reader.page.query_selector_all('#search-results li a')


def test_a_reader_finds_the_way(reader):
    "Parts in the sidebar, next and previous, light and dark, the menu on a phone"
    reader.open('02_attention/mla.html')
    groups = reader.page.eval_on_selector_all(
        '.sidebar-tree .caption-text', 'all => all.map(e => e.textContent)'
    )
    assert groups == ['Learn', 'Do', 'Look up', 'Understand', 'The project']
    parts = reader.page.eval_on_selector_all(
        '.sidebar-tree li.toctree-l1.current > ul > li > a', 'all => all.map(e => e.textContent)'
    )
    assert parts == [
        '1 Foundations',
        '2 Multi-head latent attention and its alternatives',
        '3 Mixture of experts',
        '4 FP8 training and quantisation',
        '5 The transformer and multi-token prediction',
        '6 Training data',
        '7 Training',
        '8 Text generation',
        '9 Checkpoints',
        '10 Distributed training',
        '11 Planning a training cluster',
        '12 CPU kernels and custom operators for attention, experts and loss',
        '13 Benchmarks',
        '14 Findings',
        '15 Command-line interface',
        '16 File input and output',
    ]
    opened = reader.page.eval_on_selector_all(
        '.sidebar-tree li.toctree-l2.current a',
        'all => all.filter(e => e.offsetParent).map(e => e.pathname)',
    )
    chapters = len(list((root / 'nbs' / '02_attention').glob('*.ipynb')))
    own = '/02_attention/'
    assert opened[:2] == [f'{own}index.html', f'{own}rope.html'] and len(opened) == chapters
    assert '`' not in reader.page.text_content('.sidebar-tree')  # code in titles is plain there
    closed = reader.page.locator('.sidebar-tree a[href$="03_moe/router.html"]')
    assert closed.count() == 1 and not closed.is_visible()
    assert 'baselines.html' in reader.page.get_attribute(
        'a.next-page', 'href'
    ) and 'kv_cache.html' in reader.page.get_attribute('a.prev-page', 'href')

    def last(part):
        chapter = max((root / 'nbs' / part).glob('[0-9]*.ipynb')).stem
        return f'{part}/{chapter[3:]}.html'

    for page, before, after in (
        ('02_attention/index.html', last('01_foundations'), 'rope.html'),
        ('02_attention/rope.html', 'index.html', 'kv_cache.html'),
        ('03_moe/index.html', last('02_attention'), 'router.html'),
    ):
        reader.open(page)
        assert reader.page.get_attribute('a.prev-page', 'href').endswith(before)
        assert reader.page.get_attribute('a.next-page', 'href').endswith(after)
    reader.open('02_attention/mla.html')

    def paper():
        return reader.page.evaluate('getComputedStyle(document.body).backgroundColor')

    def card():
        return reader.page.evaluate(
            "getComputedStyle(document.querySelector('img.picture')).backgroundColor"
        )

    reader.page.emulate_media(color_scheme='light')
    light = paper()
    reader.page.emulate_media(color_scheme='dark')
    assert (
        light == 'rgb(255, 255, 255)' != paper() and card() == light
    )  # pictures have dark lines: they keep a light card
    reader.page.emulate_media(color_scheme='light')
    reader.open('02_attention/mla.html', width=390)
    menu = reader.page.locator('.sidebar-drawer')
    assert menu.bounding_box()['x'] < 0
    reader.page.locator('label.nav-overlay-icon').click()
    reader.page.wait_for_function(
        "document.querySelector('.sidebar-drawer').getBoundingClientRect().x >= 0"
    )


def test_parameters_are_tables(reader):
    reader.open('reference/eva.fp8.formats.html')
    rows = reader.page.evaluate(
        "[...document.getElementById('eva.fp8.formats.quantize').closest('dl')"
        ".querySelectorAll('table.parameters tr')]"
        '.map(r => [...r.cells].map(c => c.textContent.trim()))'
    )
    assert (
        rows[0] == ['name', 'type', 'default', 'what it is']
        and rows[1][0] == 'x'
        and rows[1][1] == 'Tensor'
        and rows[-1][0] == 'returns'
        and all(r[3] for r in rows)
    )


def core_course():
    "Pages of the sixteen core chapters, in order"
    text = (root / 'docs' / 'course.md').read_text(encoding='utf-8')
    found = re.findall(r'^\|[^|]*\| \[[^]]*\]\(\.\./nbs/([^)]+)\.ipynb\)', text, flags=re.M)
    return [re.sub(r'/\d+_', '/', name) + '.html' for name in found]


def test_code_and_formulas_of_the_course_are_never_cut(reader):
    "At 1280 pixels no block of code and no formula of a core chapter scrolls sideways"
    assert len(core_course()) == 16
    cut = []
    for path in core_course():
        reader.open(path)
        cut += reader.page.evaluate(
            """[...document.querySelectorAll('.highlight-python pre, mjx-container[display=true]')]
            .filter(e => e.offsetParent && e.scrollWidth > e.clientWidth + 1)
            .map(e => location.pathname + ': ' + e.textContent.slice(0, 80))"""
        )
    assert not cut, '\n'.join(cut)


def test_contents_of_a_page_stand_beside_it(reader):
    reader.open('02_attention/mla.html', width=1280)
    box = reader.page.locator('.toc-drawer').bounding_box()
    text = reader.page.locator('article').bounding_box()
    assert box['x'] >= text['x'] + text['width'] and box['x'] + box['width'] <= 1280
    assert reader.page.locator('.toc-tree a').count() > 5


def test_the_front_page_has_four_doors(reader):
    reader.open('index.html')
    doors = reader.page.eval_on_selector_all(
        'nav.doors a', "all => all.map(a => [a.querySelector('b').textContent, a.href])"
    )
    assert [name for name, _ in doors] == ['Learn', 'Do', 'Look up', 'Understand']
    for _, address in doors:
        reader.open(address.removeprefix(reader.base))
        assert reader.page.locator('h1').count() == 1
    reader.open('index.html')
    assert reader.page.locator('img.diagram').count() == 1
    shown = reader.page.inner_text('article')
    assert (
        'pip install -e .' in shown and 'import eva' in shown and 'What the trained model' in shown
    )


def test_pages_lead_to_their_source(reader):
    for path, source in {
        '03_moe/router.html': 'nbs/03_moe/01_router.ipynb',
        'guides/extend.html': 'nbs/guides/extend.ipynb',
        'decisions.html': 'docs/decisions.md',
    }.items():
        reader.open(path)
        links = reader.page.eval_on_selector_all('p.where a', 'all => all.map(a => a.href)')
        assert any(f'/blob/main/{source}' in a for a in links), links
        assert any(f'/edit/main/{source}' in a for a in links), links


@pytest.mark.parametrize(
    'words,page',
    [
        ('absorbed attention', '02_attention/mla.html'),
        ('speculative decoding', '08_generation/speculative.html'),
        ('load balancing', '03_moe/load_balancing.html'),
        ('supervised fine-tuning', 'guides/fine_tune_on_conversations.html'),
        ('expert parallelism', '10_distributed/expert_parallel.html'),
        ('rotary position embedding', '02_attention/rope.html'),
        ('multi-token prediction', '05_model/mtp.html'),
    ],
)
def test_search_puts_the_page_of_a_term_first(reader, words, page):
    assert page in results(reader, words)[0], results(reader, words)[:5]


def test_search_for_what_eva_lacks_does_not_mislead(reader):
    "LoRA is no part of the package; what is found first says that other software trains it"
    first = results(reader, 'LoRA')[:1]
    assert first and first[0].endswith('guides/lora_elsewhere.html'), first
    said = (root / 'nbs/guides/lora_elsewhere.ipynb').read_text(encoding='utf-8')
    assert 'peft' in said and 'has no LoRA' in said


def test_llms_txt_lists_the_pages(site):
    text = (site / 'llms.txt').read_text(encoding='utf-8')
    assert text.startswith('# Eva\n\n> ')
    links = re.findall(r'\]\(https://[^/]+/eva/([^)]+)\)', text)
    assert len(links) > 250 and all((site / link).is_file() for link in links)


# a page of each kind
KINDS = (
    'index.html',
    'course.html',
    '02_attention/mla.html',
    '02_attention/index.html',
    'guides/train_on_your_text.html',
    'reference/eva.moe.router.html',
    'reference/eva_train.html',
    'glossary.html',
)


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('path', KINDS)
def test_accessibility(reader, path, scheme):
    "axe-core finds nothing: contrast, names, alternative texts, order of headings, keyboard"
    axe = Path(importlib.util.find_spec('axe_playwright_python').origin).parent / 'axe.min.js'
    reader.page.emulate_media(color_scheme=scheme)
    reader.open(path)
    reader.page.evaluate(axe.read_text(encoding='utf-8'))
    found = reader.page.evaluate(
        """axe.run(document, {runOnly: ['wcag2a', 'wcag2aa', 'wcag21a', 'wcag21aa',
                                        'cat.semantics', 'cat.keyboard']})
        .then(r => r.violations.map(v => v.id + ': ' + v.help + ' ' + v.nodes.length + '× '
                                     + v.nodes[0].html.slice(0, 160)))"""
    )
    reader.page.emulate_media(color_scheme='light')
    assert not found, '\n'.join(found)


def test_accessibility_bites(reader):
    reader.open('course.html')
    axe = Path(importlib.util.find_spec('axe_playwright_python').origin).parent / 'axe.min.js'
    reader.page.evaluate(axe.read_text(encoding='utf-8'))
    reader.page.evaluate(
        "document.querySelector('article').insertAdjacentHTML('afterbegin', "
        '\'<img src="data:,"><h5>Deep</h5><p style="color:#ccc;background:#fff">pale</p>\')'
    )
    found = reader.page.evaluate('axe.run().then(r => r.violations.map(v => v.id))')
    assert {'image-alt', 'heading-order', 'color-contrast'} <= set(found)


def test_keyboard_alone(reader):
    "Tab reaches the search, the doors and the folded cells; Enter opens them"
    reader.open('index.html')
    reached = []
    for _ in range(60):
        reader.page.keyboard.press('Tab')
        reached.append(
            reader.page.evaluate('document.activeElement.className || document.activeElement.id')
        )
        if 'door' in reached[-1]:
            break
    assert any('sidebar-search' in o for o in reached) and 'door' in reached[-1], reached
    reader.page.keyboard.press('Enter')
    reader.page.wait_for_url('**/course.html')
    reader.open('02_attention/mla.html')
    fold = reader.page.locator('details.fold summary').first
    fold.focus()
    reader.page.keyboard.press('Enter')
    assert reader.page.locator('details.fold').first.get_attribute('open') is not None


BUGS = {
    'console': '<script>throw new Error("planted")</script>',
    'outside': '<img alt="a" src="https://example.com/a.png">',
    'picture: ': '<img alt="a" src="nowhere.png">',
    'picture without words': '<img src="favicon.svg">',
    'raw formula': '<span class="math">x</span>',
    'raw markup': r'<p>so $x_t$ is \frac{1}{2}</p>',
    'formula: ': r'<div class="math notranslate nohighlight">\[\frac{1}{\]</div>',
    'wider than a phone': '<p style="width:600px">wide</p>',
    'no page': '<a href="gone.html">gone</a>',
    'has no #': '<a href="mla.html#gone">gone</a>',
}


@EVERY_PAGE
@pytest.mark.parametrize('kind', BUGS)
def test_the_examination_bites(kind, browser, site, pages, tmp_path):
    "A page with one bug in it, each of another kind"
    folder = '02_attention'
    (tmp_path / folder).mkdir()
    for p in ('_static', '_images', f'{folder}/mla.html'):
        (tmp_path / p).symlink_to(site / p)
    (tmp_path / folder / 'favicon.svg').write_bytes((root / 'docs' / 'favicon.svg').read_bytes())
    whole = (site / folder / 'mla.html').read_text(encoding='utf-8')
    (tmp_path / folder / 'planted.html').write_text(
        re.sub(r'(<article[^>]*>)', lambda m: m[1] + BUGS[kind], whole, count=1), encoding='utf-8'
    )
    r = Reader(browser, tmp_path)
    wrong, links, ids, n = r.examine(f'{folder}/planted.html')
    r.page.close()
    wrong += list(lost({**pages, f'{folder}/planted.html': (wrong, links, ids, n)}, r.base, site))
    wanted = 'script: ' if kind == 'console' else kind
    assert any(wanted in w for w in wrong), wrong
