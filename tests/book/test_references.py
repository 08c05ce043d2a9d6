"""The list of references and the chapters cite the same works, and nothing about them disagrees."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import pytest

import notebooks
from repository import ROOT

pytest.importorskip("sphinxcontrib.bibtex")
sys.path.append(str(ROOT / "book" / "_ext"))

import crosslinks

BOOK = crosslinks.Book(ROOT / "book", ROOT / "src")
ENTRIES = dict(BOOK.bibliography.entries)
ITEMS = [
    (chapter, item)
    for chapter, notebook in BOOK.notebooks.items()
    for item in crosslinks.reference_items(notebook)
]


identify = BOOK.bibliography.identify

LISTED = {
    entry.fields[name].lower()
    for entry in ENTRIES.values()
    for name in ("eprint", "doi")
    if name in entry.fields
}


def test_every_chapter_has_references() -> None:
    assert {chapter for chapter, _ in ITEMS} == set(notebooks.chapters())
    assert len(ITEMS) >= 80


@pytest.mark.parametrize("chapter", notebooks.chapters())
def test_each_work_that_a_chapter_lists_is_an_entry_of_its_own(chapter: str) -> None:
    items = [item for name, item in ITEMS if name == chapter]
    keys = [identify(item) for item in items]
    assert [item for item, key in zip(items, keys, strict=True) if key is None] == []
    assert len(keys) == len(set(keys)), "one work is listed twice"


@pytest.mark.parametrize("chapter", notebooks.chapters())
def test_years_and_first_authors_are_those_of_the_chapter(chapter: str) -> None:
    for item in (item for name, item in ITEMS if name == chapter):
        entry = ENTRIES[identify(item) or ""]
        assert f"({entry.fields['year']})" in item, item
        first = "".join(entry.persons["author"][0].prelast_names + entry.persons["author"][0].last_names)
        before = re.sub(r"\W", "", item.split(f"({entry.fields['year']})")[0])
        assert re.sub(r"\W", "", first) in before, item


def test_every_identifier_in_the_chapters_is_listed() -> None:
    for name, notebook in BOOK.notebooks.items():
        text = "\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown")
        text = re.sub(r"\(https?://\S*\)", "", text)
        assert crosslinks.identifiers(text) - LISTED == set(), name


def test_every_identifier_in_the_package_and_the_other_pages_is_listed() -> None:
    for file in [*(ROOT / "src").rglob("*.py"), *(ROOT / "book").glob("*.md")]:
        assert crosslinks.identifiers(file.read_text(encoding="utf-8")) - LISTED == set(), file


@pytest.mark.parametrize("key", ENTRIES)
def test_an_entry_is_complete_plausible_and_cited(key: str) -> None:
    entry = ENTRIES[key]
    assert entry.persons["author"]
    assert entry.fields["title"]
    year = int(entry.fields["year"])
    assert key.startswith(re.sub(r"\W", "", "".join(entry.persons["author"][0].last_names)).lower()[:4]) or (
        entry.persons["author"][0].last_names[0].startswith(("De", "Ana", "Qwen", "Ben"))
    )
    assert str(year) in key
    if "eprint" in entry.fields:
        match = re.fullmatch(r"(\d\d)(\d\d)\.\d{5}", entry.fields["eprint"])
        assert match is not None
        assert 1 <= int(match[2]) <= 12
        # A preprint comes first, and its journal or conference within two years.
        assert 0 <= year - (2000 + int(match[1])) <= 2
        assert entry.fields["archivePrefix"] == "arXiv"
    if "doi" in entry.fields:
        assert crosslinks.DOI.fullmatch(entry.fields["doi"])
    cited = key in BOOK.citing_chapters or key in BOOK.citing_code
    assert cited or any(key in keys for keys in BOOK.citing_pages.values())


def test_no_work_is_listed_twice() -> None:
    for name in ("eprint", "doi", "url", "title"):
        values = [entry.fields[name].lower() for entry in ENTRIES.values() if name in entry.fields]
        assert len(values) == len(set(values)), name


@pytest.mark.parametrize(
    ("item", "key"),
    [
        ("Meng (2024), *SimPO*, [arXiv:2405.14734](https://arxiv.org/abs/2405.14734).", "meng2024simpo"),
        ("R. A. Howard (1960). *Dynamic Programming and Markov Processes.* MIT Press.", "howard1960dynamic"),
        ("Schulman (2020), [joschu.net](http://joschu.net/blog/kl-approx.html).", "schulman2020kl"),
        ("Bradley (1952), [doi:10.2307/2334029](https://doi.org/10.2307/2334029).", "bradley1952rank"),
        ("Nobody (1999), *A work that is not there*.", None),
        ("Two works, arXiv:2405.14734 and arXiv:2305.18290.", None),
    ],
)
def test_items_are_told_apart(item: str, key: str | None) -> None:
    assert identify(item) == key


def test_the_page_lists_them_all() -> None:
    page = (ROOT / "book" / "references.md").read_text(encoding="utf-8")
    assert "```{bibliography}\n:all:" in page
    built = Path(ROOT / "book" / "references.bib").read_text(encoding="utf-8")
    assert built.count("\n@") == len(ENTRIES)
