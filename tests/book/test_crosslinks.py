"""The links between chapters, API pages and references: what is read from the text, and what is put into pages."""

from __future__ import annotations

import importlib
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from repository import ROOT

pytest.importorskip("sphinxcontrib.bibtex")
sys.path.append(str(ROOT / "book" / "_ext"))

import bookfix
import crosslinks
from crosslinks import code_cells, reference_items, resolve, uses

BELOW = '''"""Below."""
LIMIT = 3
SECRET = 4

def helper(x): return x

@staticmethod
def hidden():
    """After arXiv:2305.18290."""

class Thing:
    def method(self): ...
'''


@pytest.fixture
def toy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package whose root hands on what a module below it defines; the folder around its ``src``."""
    package = tmp_path / "src" / "toy"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("from toy.below import helper as aid, Thing\n")
    (package / "below.py").write_text(BELOW)
    monkeypatch.syspath_prepend(package.parent)
    monkeypatch.setattr(crosslinks, "PACKAGES", ("toy",))
    resolve.cache_clear()
    importlib.import_module("toy.below")
    yield tmp_path
    resolve.cache_clear()
    crosslinks.book.cache_clear()
    for name in ("toy", "toy.below"):
        del sys.modules[name]


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("dotted", "expected"),
    [
        ("toy.below.helper", "toy.below.helper"),
        ("toy.aid", "toy.below.helper"),
        ("toy.Thing.method", "toy.below.Thing"),
        ("toy.below.LIMIT", "toy.below.LIMIT"),
        ("toy.below", None),
        ("toy.below.absent", None),
        ("absent.helper", None),
        ("", None),
    ],
)
def test_names_are_followed_to_their_definition(dotted: str, expected: str | None) -> None:
    found = resolve(dotted)
    assert (found and ".".join(found)) == expected


@pytest.mark.usefixtures("toy")
@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("from toy import aid\naid(1)", {"helper": False}),
        ("from toy import aid", {}),  # imported and not used
        ("from toy import aid as a\nshow_source(a)", {"helper": True}),
        ("import toy.below as b\nb.helper(b.LIMIT)", {"helper": False, "LIMIT": False}),
        ("import toy.below\ntoy.below.helper(1)", {"helper": False}),
        ("from toy import below\ndisplay(show_source(below.helper), 1)", {"helper": True}),
        ("from toy import Thing\nThing().method()\nx = Thing.method", {"Thing": False}),
        ("from toy import aid\nshow_source(aid)\naid(1)", {"helper": True}),
        ("helper(1)", {}),
        ("from toy import aid\ndef f(x=aid): return [aid(y) for y in x]", {"helper": False}),
    ],
)
def test_uses_are_found(code: str, expected: dict[str, bool]) -> None:
    assert {name: shown for (_, name), shown in uses([code]).items()} == expected


@pytest.mark.usefixtures("toy")
def test_imports_of_one_cell_count_in_the_next() -> None:
    assert list(uses(["from toy import aid", "aid(1)"])) == [("toy.below", "helper")]


def notebook(*cells: tuple[str, str], tags: tuple[str, ...] = ()) -> dict[str, Any]:
    made = [{"cell_type": kind, "source": [text], "metadata": {"tags": list(tags)}} for kind, text in cells]
    return {"cells": made, "metadata": {}, "nbformat": 4, "nbformat_minor": 5}


def test_cells_that_are_not_the_chapters_code_are_left_out() -> None:
    assert code_cells(notebook(("code", "x = 1"), ("markdown", "x"), ("code", "%%time\nx"))) == ["x = 1"]
    assert code_cells(notebook(("code", "if a:\n    %pip install x\n!ls"))) == ["if a:\n    pass\npass"]
    assert code_cells(notebook(("code", "x = 1"), tags=("setup",))) == []


def test_only_the_list_under_references_counts() -> None:
    text = "## Other\n\n- no\n\n## References\n\n- one\n* two\n\n## Next\n\n- no"
    assert reference_items(notebook(("markdown", text), ("code", "- no"))) == ["one", "two"]


def test_the_citation_says_what_the_file_says() -> None:
    facts = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    words, bibtex = crosslinks.citation(facts)
    for text in (words, bibtex):
        for fact in (facts["title"], str(facts["version"]), facts["url"], facts["authors"][0]["name"]):
            assert fact in text
    assert bibtex.count("{") == bibtex.count("}")
    person = {"given-names": "Ada", "family-names": "Lovelace"}
    words, bibtex = crosslinks.citation(facts | {"date-released": "2031-05-06", "authors": [person]})
    assert words.startswith("Ada Lovelace (2031). ")
    assert "author = {Ada Lovelace},\n" in bibtex
    assert "year = {2031}" in bibtex


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")
def test_links_are_put_in(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a small book around the toy package, built by Sphinx."""
    from sphinx.application import Sphinx
    from sphinx.util.docutils import docutils_namespace, patch_docutils

    pages = toy / "book"
    pages.mkdir()
    for module in (crosslinks, bookfix):
        monkeypatch.setattr(module, "ROOT", toy)
    api = "API\n===\n\n.. py:module:: toy.below\n\n"
    for kind, name in (("function", "helper(x)"), ("class", "Thing()"), ("data", "LIMIT")):
        method = "   .. py:method:: method()\n\n      More.\n\n" if kind == "class" else ""
        api += f".. py:{kind}:: {name}\n\n   Words about it.\n\n{method}"
    for name, text in {
        "index": "Home\n====\n\n.. toctree::\n\n   two\n   one\n   api\n   references\n",
        "one": "First chapter\n=============\n\nText.\n",
        "two": "Second chapter\n==============\n\nText.\n",
        "api": api,
        "references": "References\n==========\n\n.. bibliography::\n   :all:\n   :list: bullet\n",
    }.items():
        (pages / f"{name}.rst").write_text(text)
    (pages / "references.bib").write_text(
        "@misc{a, author={Anna A}, title={The Title}, year={2023}, eprint={2305.18290}, archivePrefix={arXiv}}"
    )
    for name, code, cites in (
        ("one", "from toy.below import helper, LIMIT, Thing\nThing(helper(LIMIT))", "- arXiv:2305.18290"),
        ("two", "from toy import below\nshow_source(below.helper)\nbelow.hidden(below.SECRET)", ""),
    ):
        cells = (("code", code), ("markdown", f"## References\n\n{cites}"))
        (pages / f"{name}.ipynb").write_text(json.dumps(notebook(*cells)))
    settings = {"extensions": ["sphinxcontrib.bibtex", "crosslinks"], "bibtex_bibfiles": ["references.bib"],
                "bibtex_cite_id": "cite-{key}", "html_theme": "basic", "root_doc": "index"}  # fmt: skip
    out = toy / "out"
    with patch_docutils(), docutils_namespace():
        app = Sphinx(pages, None, out, toy / "doctrees", "html", settings, None, None, warningiserror=True)
        app.build()
    assert app.statuscode == 0

    def read(page: str) -> str:
        return re.sub(r"\s+", " ", (out / f"{page}.html").read_text(encoding="utf-8"))

    used = re.findall(r'<p class="used-in">(.*?)</p>', read("api"))
    # In the order of the table of contents, which is not that of the alphabet.
    assert [re.sub("<[^>]*>", "", text) for text in used] == [
        "Used in: Second chapter (source shown), First chapter",
        "Used in: First chapter",
        "Used in: First chapter",
    ]
    assert 'href="two.html"' in used[0]
    # At the end of each entry, but before the members of a class, which may be many.
    places = [
        'id="toy.below.helper"',
        "used-in",
        'id="toy.below.Thing"',
        "about it",
        "used-in",
        "Thing.method",
    ]
    assert re.search(".*?".join(map(re.escape, places)), read("api"))

    one, two = read("one"), read("two")
    for text in (one, two):
        assert text.count(f"<h2>{crosslinks.SECTION}") == 1
    assert "from-the-package" not in read("index")
    for name in ("helper", "LIMIT", "Thing"):
        assert f'href="api.html#toy.below.{name}"' in one
    # Without an entry on the API page: the source.
    lines = re.findall(r'href="https://github\.com/[^"]*/src/toy/below\.py#([L\d-]+)"', two)
    assert sorted(lines) == ["L3", "L7-L9"]

    (cited,) = re.findall(r'<p class="cited-in">(.*?)</p>', read("references"))
    assert re.sub("<[^>]*>", "", cited) == "Listed in: First chapter, toy/below.py"
    assert 'href="one.html"' in cited
    assert "/src/toy/below.py#L9" in cited
