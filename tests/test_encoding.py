"""What the project writes and reads as text is UTF-8, whatever the platform's own encoding is."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SHIPPED = [*ROOT.glob("src/**/*.py"), *ROOT.glob("book/recipes/*.py")]


def unnamed_encodings(source: str) -> Iterator[int]:
    """Lines that open a text file without saying its encoding."""
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call) or any(k.arg in ("encoding", None) for k in node.keywords):
            continue
        name = getattr(node.func, "attr", getattr(node.func, "id", ""))
        modes = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
        binary = name == "open" and any("b" in mode for mode in modes if len(mode) <= 3)
        if name in ("read_text", "write_text") or (name == "open" and not binary):
            yield node.lineno


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: str(path.relative_to(ROOT)))
def test_text_files_are_utf_8(path: Path) -> None:
    assert list(unnamed_encodings(path.read_text(encoding="utf-8"))) == []


def test_an_unnamed_encoding_is_found() -> None:
    assert list(
        unnamed_encodings("open('a', 'w')\nPath(p).write_text(t)\nq.open('rb')\nopen('a', encoding='utf-8')")
    ) == [1, 2]
