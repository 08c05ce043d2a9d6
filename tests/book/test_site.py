"""What search engines, link previews and old bookmarks see of the book."""

import html
import re
import struct
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from xml.etree import ElementTree

import pytest
import yaml

import build_book
from repository import ROOT

sys.path.append(str(ROOT / "book" / "_ext"))
import bookfix
import crosslinks
from bookmeta import descriptions

BOOK = ROOT / "book"
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
SPHINX = CONFIG["sphinx"]["config"]
BASE = CONFIG["html"]["baseurl"]
INDEX = (BOOK / "index.md").read_text(encoding="utf-8")


def test_the_front_page_describes_the_chapters() -> None:
    """A chapter that is not on the front page yet is described by its first words."""
    found = descriptions(INDEX)
    assert len(found) >= 9
    assert set(found) <= {p.stem for p in BOOK.glob("*.ipynb")}
    for text in found.values():
        assert re.fullmatch(r"[A-Z][^|*`$\[\]]{20,160}\.", text)
    assert len(set(found.values())) == len(found)


def test_descriptions_are_plain_sentences() -> None:
    table = (
        "| Chapter | Do |\n|:--|:--|\n| [A title](a.ipynb) | see *what* [it](b.md) does to `x` | 5 min |\n"
    )
    assert descriptions(table) == {"a": "See what it does to x."}


def test_the_preview_picture_has_the_size_that_the_pages_say() -> None:
    picture = BOOK / SPHINX["ogp_image"]
    head = picture.read_bytes()[:24]
    assert head[:8] == b"\x89PNG\r\n\x1a\n"
    size = struct.unpack(">II", head[16:24])
    assert size == (1200, 630)
    said = dict(re.findall(r'"og:image:(\w+)" content="(\d+)"', "".join(SPHINX["ogp_custom_meta_tags"])))
    assert (int(said["width"]), int(said["height"])) == size
    assert picture.stat().st_size < 300_000, "some sites do not show larger pictures"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A book of three pages, built with the extensions and settings of the real one, warnings as errors."""
    source = tmp_path_factory.mktemp("tiny")
    (source / "_templates").mkdir()
    (source / "_static").mkdir()
    template = SPHINX["redirect_html_template_file"]
    (source / template).write_text((BOOK / template).read_text(encoding="utf-8"), encoding="utf-8")
    row = '| [Chapter](a.md) | tell "this" & that | 5 min |'
    (source / "index.md").write_text(
        f"# Book\n\n{row}\n|:--|:--|:--|\n{row}\n\n```{{toctree}}\na\nsub/b\n```\n"
    )
    (source / "a.md").write_text("# A\n\nFirst words.\n")
    (source / "sub").mkdir()
    (source / "sub" / "b.md").write_text("# B\n\nWords of b.\n")
    kept = {k: v for k, v in SPHINX.items() if k.startswith(("ogp_", "sitemap_", "redirect_"))}
    settings = {
        "extensions": [
            "bookmeta",
            "myst_parser",
            "sphinx_reredirects",
            "sphinx_sitemap",
            "sphinxext.opengraph",
        ],
        "html_baseurl": BASE,
        "html_static_path": ["_static"],
        "project": "Tiny",
        "version": "9.9",
        **kept,
        "redirects": {"old": "a.html", "sub/older": "b.html#b", "lost": "nowhere.html"},
    }
    lines = [f"import sys\nsys.path.append({str(BOOK / '_ext')!r})"]
    (source / "conf.py").write_text("\n".join(lines + [f"{k} = {v!r}" for k, v in settings.items()]))
    subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", source, source / "out"],
        check=True,
    )
    return source / "out"


def tags(page: Path) -> dict[str, str]:
    """Return the tags of a page for previews and search engines, each of which must be there once."""
    text = page.read_text(encoding="utf-8")
    found = re.findall(
        r'<meta (?:property|name)="(og:[\w:]+|twitter:\w+|description)" content="([^"]*)"', text
    )
    assert len(found) == len(dict(found)), f"{page.name} says something twice: {found}"
    return {name: html.unescape(value) for name, value in found}


def test_previews(tiny: Path) -> None:
    chapter, other = tags(tiny / "a.html"), tags(tiny / "sub" / "b.html")
    assert chapter["og:description"] == chapter["description"] == 'Tell "this" & that.'
    assert other["og:description"] == other["description"] == "Words of b."
    for page in (chapter, other):
        assert page["og:image"] == f"{BASE}_static/social.png"
        assert page["og:image:alt"]
        assert page["twitter:card"] == "summary_large_image"
    assert other["og:url"] == f"{BASE}sub/b.html"


@pytest.mark.parametrize(("old", "new"), [("old", "a.html"), ("sub/older", "b.html#b")])
def test_redirect_pages(tiny: Path, old: str, new: str) -> None:
    text = (tiny / f"{old}.html").read_text(encoding="utf-8")
    assert set(re.findall(r'(?:url=|href=")([^"]+)"', text)) == {new}
    assert text.count(f'href="{new}"') == 2  # for search engines and for readers
    assert '<html lang="en">' in text


def test_a_redirect_that_leads_nowhere_is_a_dead_link(tiny: Path) -> None:
    assert build_book.dead_links(tiny) == ["lost.html: nowhere.html: no such file"]


def sitemap(folder: Path) -> set[str]:
    space = {"s": "http://www.sitemaps.org/schemas/sitemap/0.9"}
    found = [e.text or "" for e in ElementTree.parse(folder / "sitemap.xml").findall("s:url/s:loc", space)]
    assert len(found) == len(set(found))
    return set(found)


def test_sitemap_names_each_page_once_without_version(tiny: Path) -> None:
    assert sitemap(tiny) == {f"{BASE}{page}.html" for page in ("index", "a", "sub/b")}


def built_page() -> Path:
    """The front page of the built book, unless what it was built from has changed since."""
    page = build_book.HTML / "index.html"
    sources = [ROOT / "_config.yml", ROOT / "_toc.yml", *BOOK.glob("*.*")]
    if not page.is_file() or page.stat().st_mtime < max(s.stat().st_mtime for s in sources):
        pytest.skip("no book built, or an old one")
    return page


def test_the_built_book() -> None:
    built = built_page().parent
    assert {f"{BASE}{name}.html" for name in build_book.pages()} <= sitemap(built)
    assert (built / SPHINX["ogp_image"]).is_file()
    described = descriptions(INDEX)
    for name in build_book.pages():
        told = tags(built / f"{name}.html")
        assert len(told["description"]) >= 20, name
        assert told["og:description"] == described.get(name, told["og:description"])


def test_the_buttons_of_the_built_book_open_its_chapters() -> None:
    built = built_page().parent
    for chapter in BOOK.glob("*.ipynb"):
        text = (built / f"{chapter.stem}.html").read_text(encoding="utf-8")
        paths = re.findall(r'href="https://mybinder\.org/v2/gh/[^?"]+\?urlpath=([^"]+)"', text)
        fits = chapter.stem not in bookfix.TOO_LARGE_FOR_BINDER
        assert paths == [f"lab/tree/book/{chapter.name}"] * fits
        assert f"/blob/main/book/{chapter.name}" in text


def test_links_between_chapters_and_api_pages_go_both_ways() -> None:
    """What a chapter uses and an API page documents is linked there, and the entry names the chapter."""
    built = built_page().parent
    documented, named = set(), set()
    for page in (built / "api").glob("*.html"):
        entry = ""
        pattern = r'(?s)<dt class="sig sig-object py" id="([\w.]+)"|<p class="used-in">(.*?)</p>'
        for identity, chapters in re.findall(pattern, page.read_text(encoding="utf-8")):
            entry = identity or entry
            documented.add(crosslinks.resolve(entry))
            named |= {(entry, chapter) for chapter in re.findall(r'href="\.\./([\w-]+)\.html"', chapters)}
    listed = set()
    for chapter, used in crosslinks.book().uses.items():
        text = (built / f"{chapter}.html").read_text(encoding="utf-8")
        (section,) = re.findall(r'(?s)<ul class="[^"]*from-the-package.*?</ul>', text)
        entries = re.findall(r'href="api/[\w-]+\.html#([\w.]+)"', section)
        assert {crosslinks.resolve(entry) for entry in entries} == used.keys() & documented, chapter
        assert section.count("<a ") == len(used), f"{chapter}: a name without a link"
        listed |= {(entry, chapter) for entry in entries}
    assert listed == named
    assert len(listed) > 200


def test_references_lead_back_to_the_pages_that_cite_them() -> None:
    text = (built_page().parent / "references.html").read_text(encoding="utf-8")
    cited = re.findall(r'(?s)<p class="cited-in">(.*?)</p>', text)
    assert len(cited) == len(crosslinks.book().bibliography.entries)
    named = {chapter for links in cited for chapter in re.findall(r'href="([\w-]+)\.html"', links)}
    chapters = {p.stem for p in BOOK.glob("*.ipynb")}
    assert chapters | {"errata"} <= named <= chapters | crosslinks.book().citing_pages.keys()


def test_an_api_page_has_the_functions_before_their_results() -> None:
    page = SimpleNamespace(arguments=["policyopt.losses"], parse_text_to_nodes=lambda text: text)
    text = str(bookfix.ModuleApi.run(page))  # type: ignore[arg-type]
    table, entries = text.split(".. autofunction", 1)
    assert table.index("value_loss") < table.index("BradleyTerry")
    kinds = re.findall(r"auto(function|class):: \w+", ".. autofunction" + entries)
    assert kinds == sorted(kinds, reverse=True)
    assert set(kinds) == {"function", "class"}
