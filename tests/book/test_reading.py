"""The minutes for reading that a chapter states are counted, not felt."""

from __future__ import annotations

import re

import pytest
from nbformat import NotebookNode

import notebooks

WORDS_A_MINUTE = 200
MINUTES_A_FORMULA = 1.5  # one with a number
CODE_LINES_A_MINUTE = 10
FOLDED = {"hide-cell", "hide-input", "remove-input", "remove-cell"}


def reading_minutes(cells: list[NotebookNode]) -> float:
    """Count a chapter up to its exercises, which have minutes of their own.

    A formula in a line of text counts as a word. Lines of code count where they are seen: in cells that are not
    folded, and in the listings of the package's source.
    """
    words = formulas = lines = 0
    for cell in cells:
        if cell.cell_type == "markdown":
            text, *rest = re.split(r"(?m)^## Exercises$", cell.source)
            formulas += len(re.findall(r"\\tag\{", text))
            text = re.sub(r"(?s)\$\$.*?\$\$", " ", text)
            words += len(re.sub(r"\$[^$\n]+\$", "x", text).split())
            if rest:
                break
        elif cell.cell_type == "code":
            if not set(cell.metadata.get("tags", [])) & FOLDED:
                lines += sum(bool(line.strip()) for line in cell.source.splitlines())
            for output in cell.outputs:
                for block in re.findall(
                    r"(?s)```python\n(.*?)```", output.get("data", {}).get("text/markdown", "")
                ):
                    lines += sum(bool(line.strip()) for line in block.splitlines())
    return words / WORDS_A_MINUTE + formulas * MINUTES_A_FORMULA + lines / CODE_LINES_A_MINUTE


@pytest.mark.parametrize("name", notebooks.chapters())
def test_the_minutes_for_reading_are_counted(name: str) -> None:
    cells = notebooks.read(notebooks.notebook_path(name)).cells
    counted = reading_minutes(cells)
    found = re.search(r"^\*About (\d+) minutes to read", cells[0].source, re.M)
    assert found is not None
    assert int(found[1]) % 5 == 0
    assert abs(int(found[1]) - counted) <= 5, f"counted are {counted:.0f} minutes"


def test_each_part_counts() -> None:
    text = nb("markdown", "word " * 400 + "$a + b = c$\n\n$$x + y \\tag{1}$$\n\n$$z$$")
    code = nb("code", "a\n\nb\n" * 5)
    folded = nb("code", "a\n" * 100, tags=["hide-input"])
    listing = nb("code", "f()", markdown="`f.py`\n\n```python\n" + "a\n" * 19 + "```")
    exercises = nb("markdown", "## Exercises\n\n" + "word " * 1000)
    parts = [text, code, folded, listing, exercises, nb("code", "a\n" * 100)]
    assert reading_minutes(parts) == pytest.approx(401 / 200 + 1.5 + (10 + 20) / 10)


def nb(kind: str, source: str, tags: list[str] | None = None, markdown: str = "") -> NotebookNode:
    cell = {"cell_type": kind, "source": source, "metadata": {"tags": tags or []}}
    if kind == "code":
        cell["outputs"] = [{"data": {"text/markdown": markdown}}] if markdown else []
    return notebooks.nbformat.from_dict(cell)
