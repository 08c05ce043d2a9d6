"""The links between chapters, API pages and references: what is read from the text, and what is put into pages."""

from __future__ import annotations

import json
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from repository import ROOT

pytest.importorskip("sphinxcontrib.bibtex")
sys.path.append(str(ROOT / "book" / "_ext"))

import crosslinks
from crosslinks import Book, Definition, Package, code_cells, reference_items, uses

INIT = """
from toy.below import helper as aid
from toy.deep.inner import Thing
"""
BELOW = """
LIMIT = 3
WIDTH: int = 4

def helper(x): return x

@staticmethod
def decorated():
    pass

class Thing:
    def method(self): ...
"""
INNER = """
try:
    from toy.below import Thing
except ImportError:
    pass
"""


@pytest.fixture
def toy(tmp_path: Path) -> Package:
    files = {"__init__": INIT, "below": BELOW, "deep/__init__": "from toy.loop import x", "deep/inner": INNER}
    files |= {"loop": "from toy.deep import x"}
    for name, text in files.items():
        path = tmp_path / "toy" / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return Package(tmp_path, "toy")


@pytest.mark.parametrize(
    ("dotted", "expected"),
    [
        ("toy.below.helper", "toy.below.helper"),
        ("toy.aid", "toy.below.helper"),
        ("toy.Thing", "toy.below.Thing"),
        ("toy.deep.inner.Thing", "toy.below.Thing"),
        ("toy.Thing.method", "toy.below.Thing"),
        ("toy.below.LIMIT", "toy.below.LIMIT"),
        ("toy.below.WIDTH", "toy.below.WIDTH"),
        ("toy.below", None),
        ("toy.deep.x", None),  # two modules that import it from each other
        ("toy.below.absent", None),
        ("other.helper", None),
    ],
)
def test_names_are_followed_to_their_definition(toy: Package, dotted: str, expected: str | None) -> None:
    found = toy.resolve(dotted)
    assert (found and found.full_name) == expected


def test_a_definition_begins_with_its_decorators(toy: Package) -> None:
    found = toy.resolve("toy.below.decorated")
    assert found is not None
    assert BELOW.splitlines()[found.first - 1 : found.last] == [
        "@staticmethod",
        "def decorated():",
        "    pass",
    ]


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
        ("with mock.patch('toy.below.helper', None): pass", {"helper": False}),
        ("'toy.below.helper is fine'", {}),
        ("from toy import aid\nshow_source(aid)\naid(1)", {"helper": True}),
        ("helper(1)", {}),
        ("from toy import aid\ndef f(x=aid): return [aid(y) for y in x]", {"helper": False}),
    ],
)
def test_uses_are_found(toy: Package, code: str, expected: dict[str, bool]) -> None:
    assert {d.name: shown for d, shown in uses([code], toy).items()} == expected


def test_imports_of_one_cell_count_in_the_next(toy: Package) -> None:
    assert [d.name for d in uses(["from toy import aid", "aid(1)"], toy)] == ["helper"]


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


# --- this book -----------------------------------------------------------------------------------------------

THIS = Book(ROOT / "book", Package(ROOT / "src", "policyopt"))


@pytest.mark.parametrize(
    ("chapter", "name", "shown"),
    [
        ("dpo", "policyopt.losses.dpo_loss", True),
        ("ppo", "policyopt.losses.surrogate_loss", False),
        ("mdp", "policyopt.mdp.occupancy", True),
        ("grpo", "policyopt.lm.grpo.grpo_surrogate", True),
        ("comparison", "policyopt.control.ppo.train_ppo", False),
    ],
)
def test_chapters_use_what_they_are_known_to_use(chapter: str, name: str, shown: bool) -> None:
    assert {d.full_name: s for d, s in THIS.uses[chapter].items()}[name] == shown


def test_every_chapter_uses_the_package() -> None:
    for chapter, found in THIS.uses.items():
        assert len(found) >= 10, chapter
        for definition in found:
            lines = definition.file.read_text(encoding="utf-8").splitlines()
            assert definition.name in "\n".join(lines[definition.first - 1 : definition.last])


def test_the_digest_sees_every_kind_of_change(toy: Package, tmp_path: Path) -> None:
    pages = tmp_path / "book"
    pages.mkdir()
    code, cited = "from toy import aid\naid(1)", "## References\n\n- arXiv:2305.18290"
    bib = "@misc{a, author={A}, title={T}, year={2023}, eprint={2305.18290}}"

    def digest(code: str = code, cited: str = cited, below: str = BELOW) -> str:
        (pages / "one.ipynb").write_text(json.dumps(notebook(("code", code), ("markdown", cited))))
        (pages / "references.bib").write_text(bib)
        (tmp_path / "toy" / "below.py").write_text(below)
        return Book(pages, Package(tmp_path, "toy")).digest()

    same = digest()
    assert digest() == same
    assert digest(code=f"{code}\nshow_source(aid)") != same
    assert digest(cited="nothing") != same
    assert digest(below=f"\n{BELOW}") != same  # the lines that links lead to have moved
    assert digest(below=f"{BELOW}\n# arXiv:2305.18290") != same


def test_the_citation_says_what_the_file_says() -> None:
    facts = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    words, bibtex = crosslinks.citation(facts)
    for text in (words, bibtex):
        assert facts["title"] in text
        assert f"{facts['version']}" in text
        assert facts["url"] in text
        assert facts["authors"][0]["name"] in text
    assert bibtex.count("{") == bibtex.count("}")
    released = crosslinks.citation(
        facts
        | {"date-released": "2031-05-06", "authors": [{"given-names": "Ada", "family-names": "Lovelace"}]}
    )
    assert released[0].startswith("Ada Lovelace (2031). ")
    assert "author = {Ada Lovelace},\n" in released[1]
    assert "year = {2031}" in released[1]


# --- pages, built ----------------------------------------------------------------------------------------------


class Site:
    """A small book around a package, built by Sphinx."""

    def __init__(self, root: Path) -> None:
        self.root, self.pages = root, root / "book"
        self.pages.mkdir()
        package = root / "src" / "toy"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")
        (package / "below.py").write_text('"""Below."""\n' + BELOW)
        self.write("index", "Home\n====\n\n.. toctree::\n\n   two\n   one\n   api\n   references\n")
        self.write("one", "First chapter\n=============\n\nText.\n")
        self.write("two", "Second chapter\n==============\n\nText.\n")
        api = "API\n===\n\n.. py:module:: toy.below\n\n"
        for kind, name in (("function", "helper(x)"), ("class", "Thing()"), ("data", "LIMIT")):
            api += f".. py:{kind}:: {name}\n\n   Words about it.\n\n"
            if kind == "class":
                api += "   .. py:method:: method()\n\n      More.\n\n"
        self.write("api", api)
        self.write("references", "References\n==========\n\n.. bibliography::\n   :all:\n   :list: bullet\n")
        (self.pages / "references.bib").write_text(
            "@misc{a, author={Anna A}, title={The Title}, year={2023}, eprint={2305.18290}, archivePrefix={arXiv}}"
        )
        self.chapter("one", "from toy.below import helper, LIMIT\nhelper(LIMIT)", "- arXiv:2305.18290")
        self.chapter("two", "from toy import below\nshow_source(below.helper)\nbelow.decorated()")

    def write(self, name: str, text: str) -> None:
        (self.pages / f"{name}.rst").write_text(text, encoding="utf-8")

    def chapter(self, name: str, code: str, cites: str = "") -> None:
        cells = [("code", code), ("markdown", f"## References\n\n{cites}")]
        (self.pages / f"{name}.ipynb").write_text(json.dumps(notebook(*cells)), encoding="utf-8")

    def build(self, parallel: int = 1) -> set[str]:
        """Build; return the names of the pages that were written."""
        from sphinx.application import Sphinx
        from sphinx.util.docutils import docutils_namespace, patch_docutils

        out = self.root / "out"
        before = {page: page.stat().st_mtime_ns for page in out.glob("*.html")}
        with patch_docutils(), docutils_namespace():
            app = Sphinx(
                self.pages,
                None,
                out,
                self.root / "doctrees",
                "html",
                confoverrides={
                    "extensions": ["sphinxcontrib.bibtex", "crosslinks"],
                    "bibtex_bibfiles": ["references.bib"],
                    "bibtex_cite_id": "cite-{key}",
                    "html_theme": "basic",
                    "root_doc": "index",
                },
                status=None,
                warning=None,
                warningiserror=True,
                parallel=parallel,
            )
            app.build()
            assert app.statuscode == 0
        return {page.stem for page in out.glob("*.html") if before.get(page) != page.stat().st_mtime_ns}

    def text(self, page: str) -> str:
        return re.sub(r"\s+", " ", (self.root / "out" / f"{page}.html").read_text(encoding="utf-8"))


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.setattr(crosslinks, "ROOT", tmp_path)
    monkeypatch.setattr(
        crosslinks,
        "book",
        crosslinks.cache(lambda: Book(tmp_path / "book", Package(tmp_path / "src", "toy"))),
    )
    return Site(tmp_path)


pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::PendingDeprecationWarning")


@pytest.mark.parametrize("parallel", [1, 2])
def test_links_are_put_in(site: Site, parallel: int) -> None:
    site.build(parallel)
    api = site.text("api")
    used = re.findall(r'<p class="used-in">(.*?)</p>', api)
    # In the order of the table of contents, which is not that of the alphabet.
    assert [re.sub("<[^>]*>", "", text) for text in used] == [
        "Used in: Second chapter (source shown), First chapter",
        "Used in: First chapter",
    ]
    assert 'href="two.html"' in used[0]
    assert api.index('id="toy.below.helper"') < api.index("used-in") < api.index('id="toy.below.Thing"')

    one, two = site.text("one"), site.text("two")
    for text in (one, two):
        assert text.count(f"<h2>{crosslinks.SECTION}") == 1
    assert 'href="api.html#toy.below.helper"' in one
    assert 'href="api.html#toy.below.LIMIT"' in one
    # Without an entry on the API page: the source.
    assert re.search(r'href="https://github\.com/[^"]*/src/toy/below\.py#L8-L10"', two)
    assert "from-the-package" not in site.text("index")

    references = site.text("references")
    assert re.search(
        r'<p class="cited-in">Cited in: <a [^>]*href="one.html">First chapter</a></p>', references
    )


def test_an_incremental_build_writes_what_others_have_changed(site: Site) -> None:
    assert site.build() >= {"index", "one", "two", "api", "references"}
    assert site.build() & {"index", "one", "two", "api", "references"} == set()

    site.chapter("one", "from toy.below import Thing\nThing()")
    written = site.build()
    assert {"one", "api", "references"} <= written
    assert "First chapter" not in re.findall(r'<p class="used-in">(.*?)</p>', site.text("api"))[0]
    assert 'href="api.html#toy.below.Thing"' in site.text("one")
    # The chapter no longer lists the work.
    assert "cited-in" not in site.text("references")

    # Before the members of a class.
    api = site.text("api")
    thing = api.index('id="toy.below.Thing"')
    assert (
        api.index("Words about it", thing) < api.rindex("used-in") < api.index('id="toy.below.Thing.method"')
    )


def test_a_page_is_not_given_the_links_twice(site: Site) -> None:
    site.build()
    os.utime(site.pages / "api.rst")
    site.write("api", (site.pages / "api.rst").read_text() + "\nMore words.\n")
    site.build()
    assert len(re.findall('<p class="used-in">', site.text("api"))) == 2


def test_definitions_sort_by_name_alone() -> None:
    here = Path(__file__)
    a, b = (Definition("m", name, here, line, line) for name, line in (("a", 9), ("b", 1)))
    assert sorted([b, a]) == [a, b]
    assert a == Definition("m", "a", here / "elsewhere", 1, 2)
