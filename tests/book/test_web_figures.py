"""The interactive figures in a browser: in the book, on a page without the book's copy of Plotly, without scripts.

Run after ``make book``, with the other web tests. Figures of chapters that are yet to be executed are skipped.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from test_figures import BUNDLE, CHAPTER_OF
from test_web import AXE, HTML, SIZES, Visit, browser, site  # noqa: F401  (fixtures)

import notebooks
from policyopt_book import figures

pytestmark = pytest.mark.web

UID = {name: name.replace("_", "-") for name in CHAPTER_OF}
VIEWS = {
    f"{device}-{theme}": {"viewport": size, "color_scheme": theme}
    for device, size in SIZES.items()
    for theme in ("light", "dark")
}
LOADED = "performance.getEntriesByType('resource').filter(e => e.name.includes('plotly')).length"
DATA = "uid => JSON.stringify(document.querySelector(`#figure-${uid} .po-plot`).data)"
SAID = "uid => document.querySelector(`#figure-${uid} [role=status]`).textContent"


@pytest.fixture(scope="module")
def contexts(browser: Any) -> dict[str, Any]:  # noqa: F811
    return {name: browser.new_context(**view) for name, view in VIEWS.items()}


def page_of(name: str) -> str:
    chapter = CHAPTER_OF[name]
    cells = [c for c in notebooks.read(notebooks.notebook_path(chapter)).cells if c.cell_type == "code"]
    if not any(f"figures.{name}(" in c.source and c.outputs for c in cells):
        pytest.skip(f"{chapter} is to be executed")
    return f"{chapter}.html"


def draw(page: Any, name: str) -> Any:
    """Scroll to a figure and wait until the script has drawn it."""
    figure = page.locator(f"#figure-{UID[name]}")
    figure.scroll_into_view_if_needed()
    page.locator(f"#figure-{UID[name]}[data-ready] .main-svg").first.wait_for(timeout=120_000)
    return figure


def check_figure(page: Any, name: str) -> None:
    """Drawn in the page's colours and width, with controls that the keyboard moves, and no complaint of axe-core."""
    figure = draw(page, name)
    uid = UID[name]
    assert not figure.locator("img").is_visible(), "the picture has done its duty"
    plot = figure.locator(".po-plot")
    assert plot.get_attribute("role") == "img"
    assert len(plot.get_attribute("aria-label")) > 50
    inner, outer = plot.bounding_box(), figure.bounding_box()
    assert inner["width"] == pytest.approx(outer["width"], abs=2)
    assert inner["height"] > 200
    assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
    colour = "uid => getComputedStyle(document.getElementById(`figure-${uid}`)).color"
    font = "uid => document.querySelector(`#figure-${uid} .po-plot`).layout.font.color"
    assert page.evaluate(font, uid) == page.evaluate(colour, uid)
    around = "uid => [...document.querySelectorAll(`:has(> #figure-${uid})`)].map(e => getComputedStyle(e))"
    assert page.evaluate(colour, uid) == page.evaluate(
        "getComputedStyle(document.querySelector('article p, main')).color"
    ), "the colour of the text"
    assert page.evaluate(f"uid => ({around})(uid).map(s => s.backgroundColor)", uid) == [
        "rgba(0, 0, 0, 0)"
    ], "the theme puts outputs on a light box in the dark"

    fields = figure.locator("input, select")
    count = fields.count()
    assert count == len(getattr(figures, name)().controls)
    fields.first.focus()
    for i in range(count):
        field = fields.nth(i)
        assert field.evaluate("e => e === document.activeElement"), "Tab goes from one control to the next"
        assert field.bounding_box()["height"] >= 24
        assert field.evaluate("e => e.labels[0].textContent.length") > 0
        data, said = page.evaluate(DATA, uid), page.evaluate(SAID, uid)
        value = field.input_value()
        back = value != "0" or not _is_select(field)
        for _ in range(3):  # a single step may be too small to be seen in rounded numbers
            page.keyboard.press("ArrowUp" if back and _is_select(field) else "ArrowDown")
        assert field.input_value() != value
        page.wait_for_function("([uid, old]) => (" + DATA + ")(uid) !== old", arg=[uid, data])
        # The text is waited for, not read at once: the drawing may still be behind the last key, and between two
        # keys a figure may look different and say the same.
        page.wait_for_function("([uid, old]) => (" + SAID + ")(uid) !== old", arg=[uid, said])
        page.keyboard.press("Tab")

    page.evaluate(AXE.read_text(encoding="utf-8"))
    found = page.evaluate(
        """async uid => (await axe.run(`#figure-${uid}`, {resultTypes: ['violations'], preload: false})).violations.map(
            v => `${v.id}: ${v.nodes[0].html.slice(0, 100)} ${v.nodes[0].any[0]?.message ?? ''}`)""",
        uid,
    )
    assert found == []


def _is_select(field: Any) -> bool:
    return bool(field.evaluate("e => e.tagName === 'SELECT'"))


# --- In the book --------------------------------------------------------------------------------------


@pytest.mark.parametrize("view", VIEWS)
@pytest.mark.parametrize("name", CHAPTER_OF)
def test_a_figure_in_the_book(name: str, view: str, site: str, contexts: dict[str, Any]) -> None:  # noqa: F811
    with Visit(contexts[view], f"{site}/{page_of(name)}") as visit:
        assert visit.page.evaluate(LOADED) == 0, "Plotly was loaded before a figure came near"
        check_figure(visit.page, name)
        assert visit.page.evaluate(LOADED) == 1
        assert visit.foreign == []
        assert visit.faults == []


@pytest.mark.parametrize("name", CHAPTER_OF)
def test_a_figure_from_disk_without_a_network(name: str, browser: Any) -> None:  # noqa: F811
    context = browser.new_context(**VIEWS["phone-light"], offline=True)
    with Visit(context, (HTML / page_of(name)).as_uri()) as visit:
        check_figure(visit.page, name)
        assert visit.foreign == []
        assert visit.faults == []
    context.close()


@pytest.mark.parametrize("name", CHAPTER_OF)
def test_the_picture_stands_in_where_there_are_no_scripts(name: str, browser: Any) -> None:  # noqa: F811
    context = browser.new_context(**VIEWS["phone-dark"], java_script_enabled=False)
    page = context.new_page()
    page.goto((HTML / page_of(name)).as_uri())
    figure = page.locator(f"#figure-{UID[name]}")
    picture = figure.locator("img")
    assert picture.is_visible()
    assert picture.bounding_box()["width"] > 250
    assert figure.locator("input, select").count() == 0
    context.close()


def test_pages_without_figures_do_not_load_plotly(site: str, contexts: dict[str, Any]) -> None:  # noqa: F811
    with Visit(contexts["desktop-light"], f"{site}/api/losses.html") as visit:
        visit.page.evaluate("window.scrollTo(0, document.body.scrollHeight)")
        visit.page.wait_for_timeout(300)
        assert visit.page.evaluate("window.POLICYOPT_PLOTLY_URL").endswith(f"/_static/plotly/{BUNDLE.name}")
        assert (HTML / "_static" / "plotly" / BUNDLE.name).is_file()
        assert visit.page.evaluate(LOADED) == 0


# --- Elsewhere: a page without the book's copy, such as Jupyter's --------------------------------------


@pytest.fixture(scope="module")
def gallery(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All figures on one page, as a notebook shows them."""
    shown = "".join(f"<div>{getattr(figures, name)()._repr_html_()}</div>" for name in CHAPTER_OF)
    page = tmp_path_factory.mktemp("gallery") / "page.html"
    page.write_text(
        '<!doctype html><html lang="en"><head><meta charset="utf-8"><title>Figures</title>'
        "<style>html[data-theme='dark'] { color: #eee; background: #111; color-scheme: dark }</style></head>"
        f'<body><main style="max-width: 800px">{shown}</main></body></html>',
        encoding="utf-8",
    )
    return page


@pytest.fixture
def elsewhere(browser: Any, gallery: Path) -> Iterator[tuple[Any, list[str]]]:  # noqa: F811
    context = browser.new_context(**VIEWS["desktop-light"])
    page = context.new_page()
    errors: list[str] = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page, errors
    context.close()


def serve(page: Any, body: bytes) -> None:
    headers = {"Access-Control-Allow-Origin": "*", "Content-Type": "text/javascript"}
    page.route(figures.PLOTLY_URL, lambda route: route.fulfill(body=body, headers=headers))


def test_all_figures_with_plotly_from_the_mirror(gallery: Path, elsewhere: tuple[Any, list[str]]) -> None:
    page, errors = elsewhere
    serve(page, BUNDLE.read_bytes())
    page.goto(gallery.as_uri())
    for name in CHAPTER_OF:
        check_figure(page, name)
    assert page.evaluate(LOADED) == 1, "one script for all figures"
    assert errors == []


@pytest.mark.parametrize("answer", ["nothing", "another file"])
def test_the_picture_stays_where_plotly_does_not_come(
    answer: str, gallery: Path, elsewhere: tuple[Any, list[str]]
) -> None:
    page, errors = elsewhere
    if answer == "nothing":
        page.route("**/plotly*", lambda route: route.abort())
    else:
        serve(page, BUNDLE.read_bytes() + b"window.stolen = true;")
    with page.expect_console_message(lambda message: "stays a picture" in message.text):
        page.goto(gallery.as_uri())
    assert page.locator("#figure-value-iteration img").is_visible()
    assert page.locator(".policyopt-figure input").count() == 0
    assert page.evaluate("window.stolen === undefined && window.Plotly === undefined")
    assert errors == []


def test_a_figure_follows_the_theme_and_the_width(gallery: Path, elsewhere: tuple[Any, list[str]]) -> None:
    page, errors = elsewhere
    serve(page, BUNDLE.read_bytes())
    page.goto(gallery.as_uri())
    draw(page, "dpo_margin")
    layout = "document.querySelector('#figure-dpo-margin .po-plot').layout"
    before = page.evaluate(layout)
    page.evaluate("document.documentElement.dataset.theme = 'dark'")
    page.wait_for_function(f"{layout}.font.color !== {json.dumps(before['font']['color'])}")
    assert page.evaluate(layout)["font"]["color"] == "rgb(238, 238, 238)"
    page.set_viewport_size({"width": 390, "height": 800})
    page.wait_for_function(f"{layout}.width < 390")
    narrow = page.evaluate(layout)
    assert before["xaxis2"]["domain"][0] > 0.5, "side by side"
    assert narrow["xaxis2"]["domain"] == [0, 1], "one above the other"
    assert narrow["yaxis"]["domain"][0] > narrow["yaxis2"]["domain"][1]
    assert page.evaluate("document.documentElement.scrollWidth <= 390")
    assert errors == []
