"""What search engines, link previews and old bookmarks see of the book."""

import html
import os
import re
import struct
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from sphinx.application import Sphinx
from sphinx.config import Config

import build_book
from repository import ROOT

sys.path.append(str(ROOT / "book" / "_ext"))
from bookmeta import descriptions, point_at_release, redirects

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


def test_redirects_are_relative_to_the_old_page() -> None:
    assert redirects("# nothing yet\n", {"mdp"}) == {}
    text = "old: mdp\napi/old: api/new#place\ndeep/er/old: mdp\n"
    assert redirects(text, {"mdp", "api/new"}) == {
        "old": "mdp.html",
        "api/old": "../api/new.html#place",
        "deep/er/old": "../../mdp.html",
    }


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("mdp: ppo", "'mdp' away, but that page exists"),
        ("old: gone", "'old' to 'gone', which is no page"),
        ("old: older\nolder: mdp", "'old' to 'older'"),
        ("[old, new]", "must map"),
    ],
)
def test_wrong_redirects_are_refused(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        redirects(text, {"mdp", "ppo"})


def test_the_redirects_of_the_book_lead_to_pages() -> None:
    redirects((BOOK / "redirects.yml").read_text(encoding="utf-8"), set(build_book.pages()))


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
    (source / "redirects.yml").write_text("old: a\nsub/older: sub/b\n")
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
    }
    lines = [f"import sys\nsys.path.append({str(BOOK / '_ext')!r})"]
    (source / "conf.py").write_text("\n".join(lines + [f"{k} = {v!r}" for k, v in settings.items()]))
    subprocess.run(
        [sys.executable, "-m", "sphinx", "-q", "-W", "-b", "html", source, source / "out"],
        check=True,
        env={**os.environ, "BOOK_REF": ""},
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


@pytest.mark.parametrize(("old", "new"), [("old", "a.html"), ("sub/older", "../sub/b.html")])
def test_redirect_pages(tiny: Path, old: str, new: str) -> None:
    text = (tiny / f"{old}.html").read_text(encoding="utf-8")
    assert set(re.findall(r'(?:url=|href=")([^"]+)"', text)) == {new}
    assert text.count(f'href="{new}"') == 2  # for search engines and for readers
    assert '<html lang="en">' in text
    assert ((tiny / old).parent / new).resolve().is_file()


def sitemap(folder: Path) -> set[str]:
    space = {"s": "http://www.sitemaps.org/schemas/sitemap/0.9"}
    found = [e.text or "" for e in ElementTree.parse(folder / "sitemap.xml").findall("s:url/s:loc", space)]
    assert len(found) == len(set(found))
    return set(found)


def test_sitemap_names_each_page_once_without_version(tiny: Path) -> None:
    assert sitemap(tiny) == {f"{BASE}{page}.html" for page in ("index", "a", "sub/b")}


def test_the_buttons_of_a_released_book_open_that_release(monkeypatch: pytest.MonkeyPatch) -> None:
    app, config = Sphinx.__new__(Sphinx), Config({}, {"html_theme_options": {"repository_branch": "main"}})
    config.add("html_theme_options", {}, "html", dict)
    monkeypatch.delenv("BOOK_REF", raising=False)
    point_at_release(app, config)
    assert config.html_theme_options == {"repository_branch": "main"}
    monkeypatch.setenv("BOOK_REF", "v1.2.3")
    point_at_release(app, config)
    assert config.html_theme_options == {"repository_branch": "v1.2.3"}


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
        (path,) = re.findall(r'href="https://mybinder\.org/v2/gh/[^?"]+\?urlpath=([^"]+)"', text)
        assert path == f"lab/tree/book/{chapter.name}"
