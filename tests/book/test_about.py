"""The page about the book says nothing of its own about what stands elsewhere."""

from __future__ import annotations

import re
import tomllib

import yaml

from repository import ROOT, Repository

PAGE = (ROOT / "book" / "about.md").read_text(encoding="utf-8")
CITATION = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
CONFIG = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))


def test_the_citation_is_made_from_the_file() -> None:
    assert "```{citation}\n```" in PAGE
    # So no version that would grow old is typed.
    assert CITATION["version"] not in PAGE
    assert CITATION["title"].startswith(CONFIG["title"].split(",")[0].split(":")[0])


def test_licences_are_those_of_the_repository() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["license"] == CITATION["license"] == "MIT"
    assert f"[{project['license']}]" in PAGE
    assert (ROOT / "LICENSE").read_text(encoding="utf-8").startswith("MIT License")
    (text_licence,) = re.findall(
        r"https://creativecommons\.org/licenses/[\w./-]+/", CONFIG["html"]["extra_footer"]
    )
    assert text_licence in PAGE


def test_the_files_that_it_links_to_exist() -> None:
    blob = re.findall(rf"{re.escape(Repository.of(ROOT).url)}/blob/main/([\w./-]+)", PAGE)
    assert set(blob) >= {"CITATION.cff", "CHANGELOG.md", "LICENSE", "constraints.txt"}
    for name in blob:
        assert (ROOT / name).is_file(), name


def test_errata_have_all_five_facts() -> None:
    section = PAGE.split("## Errata of this book")[1]
    header, rule, *rows = [line for line in section.splitlines() if line.startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in (header, *rows)]
    assert cells[0] == ["Date", "Place", "Error", "Correction", "Reported by"]
    assert rule.count(":--") == 5
    assert rows
    for row in cells[1:]:
        assert len(row) == 5
        assert row[2] == "none has been reported yet" or re.fullmatch(r"\d{4}-\d\d-\d\d", row[0])
    if any("none has been reported yet" in row for row in cells[1:]):
        assert len(rows) == 1
    assert f"{Repository.of(ROOT).url}/issues/new" in section
