"""The built book in a browser: what it fetches, how it looks on a phone and in the dark, who can use it.

Run by ``make web-test``, which builds the book first. Needs a Chromium (Debian: ``apt install chromium``); without one
all tests are skipped, and say so.
"""

from __future__ import annotations

import functools
import gzip
import http.server
import socketserver
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import notebooks
from browser import find_chromium
from build_book import HTML, pages

pytestmark = pytest.mark.web
playwright = pytest.importorskip("playwright.sync_api", reason="the web tests need `pip install playwright`")

CHROMIUM = find_chromium()
if CHROMIUM is None:
    pytest.skip("no browser: install chromium, or say where it is with CHROMIUM=…", allow_module_level=True)

PAGES = [*pages(), "search", "genindex"]
CHAPTERS = notebooks.chapters()
SIZES = {"desktop": {"width": 1280, "height": 900}, "phone": {"width": 390, "height": 844}}
VIEWS = {f"{device}-{theme}": (size, theme) for theme in ("light", "dark") for device, size in SIZES.items()}
AXE = Path(pytest.importorskip("axe_playwright_python").__file__).with_name("axe.min.js")


class _Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """Say nothing when the browser hangs up."""


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    """The book on a loopback address."""
    if not (HTML / "index.html").is_file():
        pytest.fail(f"{HTML} holds no book; run `make book` first")
    server = _Server(("127.0.0.1", 0), functools.partial(_Quiet, directory=str(HTML)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu", "--disable-quic"]
        )
        yield browser
        browser.close()


class Visit:
    """A page that is open, and what has happened since."""

    def __init__(self, context: Any, address: str) -> None:
        self.foreign: list[str] = []
        self.faults: list[str] = []
        self.page = context.new_page()
        self.page.set_default_timeout(120_000)  # a busy machine is slow, not wrong
        self.page.on("request", self._ask)
        self.page.on("response", self._get)
        self.page.on("console", lambda m: m.type == "error" and self.faults.append(m.text))
        self.page.on("pageerror", lambda error: self.faults.append(str(error)))
        self.page.goto(address, wait_until="load")
        # MathJax is the last to finish; without it there is nothing to wait for.
        self.page.evaluate("() => window.MathJax?.startup?.promise")

    def _ask(self, request: Any) -> None:
        if not request.url.startswith(("http://127.0.0.1:", "file:", "data:", "blob:", "about:")):
            self.foreign.append(request.url)

    def _get(self, response: Any) -> None:
        if response.status >= 400:
            self.faults.append(f"{response.status} {response.url}")

    def __enter__(self) -> Visit:
        return self

    def __exit__(self, *_: object) -> None:
        self.page.close()


# Nine tenths of axe-core's time goes into the contrast of highlighted code, token by token. One token of each kind is
# enough: they get their colours from the style sheet. The others become plain text.
THIN_OUT_CODE = """() => {
    const seen = new Set();
    for (const token of document.querySelectorAll('.highlight pre span')) {
        const kind = token.closest('.highlight').parentElement.className + token.className;
        if (seen.has(kind) && !token.id) token.replaceWith(...token.childNodes); else seen.add(kind);
    }
    document.querySelectorAll('.highlight pre').forEach(e => e.normalize());
}"""
ASK_AXE = """async () => {
    const found = await axe.run(document, {resultTypes: ['violations'], preload: false});
    return found.violations.map(v => `${v.id}: ${v.help} (${v.nodes.length}), as in ${v.nodes[0].target} `
                                     + (v.nodes[0].any[0]?.message ?? ''));
}"""


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_sound_in_every_size_and_theme(name: str, site: str, browser: Any) -> None:
    """On a desk and on a phone, by day and by night.

    Nothing from the network, no error, nothing wider than the window, maths set, and no complaint of axe-core.
    """
    context = browser.new_context()
    with Visit(context, f"{site}/{name}.html") as visit:
        page = visit.page
        page.evaluate(AXE.read_text(encoding="utf-8"))
        page.evaluate(THIN_OUT_CODE)
        complaints: dict[str, list[str]] = {}
        for view, (size, theme) in VIEWS.items():
            page.set_viewport_size(size)
            page.emulate_media(color_scheme=theme)
            page.wait_for_function("theme => document.documentElement.dataset.theme === theme", arg=theme)
            page.wait_for_timeout(500)  # the theme takes that long to notice which boxes scroll now
            width, window = page.evaluate(
                "[document.documentElement.scrollWidth, document.documentElement.clientWidth]"
            )
            found = complaints[view] = page.evaluate(ASK_AXE)
            if width > window:
                found.append(f"the page scrolls sideways: {width} > {window}")
        formulas, done, wrong = page.evaluate(
            "['.math', 'mjx-container', 'mjx-merror'].map(s => document.querySelectorAll(s).length)"
        )
        assert wrong == 0
        assert done >= formulas
        broken = page.evaluate(
            "[...document.images].filter(i => i.loading !== 'lazy' && !i.naturalWidth).map(i => i.src)"
        )
        assert not broken
        assert complaints == {view: [] for view in VIEWS}
        assert visit.foreign == []
        assert visit.faults == []
    context.close()


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapters_paint_quickly(name: str, site: str, browser: Any) -> None:
    """The best of five visits: on a busy machine one alone says more about the neighbours than about the page."""
    painted = []
    for _ in range(5):
        context = browser.new_context(viewport=SIZES["desktop"])
        with Visit(context, f"{site}/{name}.html") as visit:
            painted.append(
                visit.page.evaluate(
                    """() => new Promise(done => new PerformanceObserver(
                        list => done(list.getEntries().at(-1).startTime)
                    ).observe({type: 'largest-contentful-paint', buffered: true}))"""
                )
            )
        context.close()
        if painted[-1] < 1000:
            return
    pytest.fail(f"{painted} ms to the largest contentful paint")


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapters_weigh_little(name: str, site: str, browser: Any) -> None:
    """What a chapter costs to fetch, text compressed by gzip as GitHub Pages does; the figures' script excepted."""
    context = browser.new_context(viewport=SIZES["desktop"])
    sizes: dict[str, int] = {}

    def weigh(response: Any) -> None:
        body, kind = response.body(), response.headers.get("content-type", "")
        text = kind.startswith("text/") or any(word in kind for word in ("javascript", "json", "svg"))
        sizes[response.url.removeprefix(site)] = len(gzip.compress(body, 6)) if text else len(body)

    with Visit(context, "about:blank") as visit:
        visit.page.on("response", weigh)
        visit.page.goto(f"{site}/{name}.html", wait_until="load")
        visit.page.evaluate("() => window.MathJax?.startup?.promise")
        visit.page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
        visit.page.wait_for_load_state("networkidle")
    context.close()
    total = sum(size for address, size in sizes.items() if "plotly" not in address)
    heaviest = sorted(sizes.items(), key=lambda pair: -pair[1])[:5]
    assert total <= 1.5e6, f"{total / 1e6:.2f} MB, most of it {heaviest}"


@pytest.mark.parametrize("word", ["advantage", "KL", "train_grpo"])
def test_search_works_from_disk_without_a_network(word: str, browser: Any) -> None:
    context = browser.new_context(viewport=SIZES["desktop"], offline=True)
    with Visit(context, (HTML / "search.html").as_uri() + f"?q={word}") as visit:
        hits = visit.page.locator("#search-results ul.search li a")
        # Hits come one by one; the summary counts them when all are there.
        visit.page.locator("#search-results", has_text="Search finished").wait_for(timeout=120_000)
        targets = {
            Path(link.split("?")[0].split("#")[0]).stem
            for link in hits.evaluate_all("l => l.map(a => a.href)")
        }
        wanted = {
            "advantage": {"policy-gradient", "ppo"},
            "KL": {"trpo", "rlhf"},
            "train_grpo": {"grpo", "lm"},
        }[word]
        assert wanted <= targets
        assert visit.foreign == []
        assert visit.faults == []
    context.close()


def test_a_chapter_works_from_disk_without_a_network(browser: Any) -> None:
    context = browser.new_context(viewport=SIZES["desktop"], offline=True)
    with Visit(context, (HTML / "ppo.html").as_uri()) as visit:
        assert visit.page.locator("mjx-container").count() > 50
        assert visit.page.locator("mjx-merror").count() == 0
        assert visit.foreign == []
        assert visit.faults == []
    context.close()


@pytest.mark.parametrize("name", ["index", "mdp"])
def test_the_keyboard_reaches_every_control(name: str, site: str, browser: Any) -> None:
    """Tab visits every link, button and field that can be seen."""
    context = browser.new_context(viewport=SIZES["desktop"])
    with Visit(context, f"{site}/{name}.html") as visit:
        page = visit.page
        controls = page.evaluate(
            """() => {
                const seen = [...document.querySelectorAll('a[href], button, input, select, textarea, summary')]
                    .filter(e => e.checkVisibility({visibilityProperty: true, opacityProperty: true}) && !e.disabled
                                 && e.getBoundingClientRect().width > 1);
                seen.forEach((e, i) => e.dataset.control = i);
                return seen.map(e => e.outerHTML.slice(0, 120));
            }"""
        )
        reached: set[int] = set()
        # Formulas and wide code can be reached too, so there are more stops than controls.
        stops = page.locator("[tabindex='0']").count()
        for _ in range(2 * len(controls) + stops + 40):
            page.keyboard.press("Tab")
            number = page.evaluate("document.activeElement?.dataset.control")
            if number is not None:
                reached.add(int(number))
            if len(reached) == len(controls):
                break
        missed = [html for i, html in enumerate(controls) if i not in reached]
        assert not missed
    context.close()
