"""The errata page names tests that guard it: each must exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NAMED = sorted(
    set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", (ROOT / "book" / "errata.md").read_text(encoding="utf-8")))
)


def test_the_errata_name_tests() -> None:
    assert len(NAMED) > 20


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_a_test_that_the_errata_name_exists(file: str, test: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_entry_of_the_errata_says_what_where_and_how_it_is_guarded() -> None:
    entries = re.split(r"(?m)^### ", (ROOT / "book" / "errata.md").read_text(encoding="utf-8"))[1:]
    assert len(entries) >= 20
    for entry in entries:
        for part in ("**Claim.**", "**Correct.**", "**Shown in**", "**Guarded by**"):
            assert entry.count(part) == 1, f"{part} in {entry.splitlines()[0]}"
