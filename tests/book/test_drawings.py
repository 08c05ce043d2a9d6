"""The schematic drawings: sound, by themselves, described, and each shown in a chapter."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest

import notebooks
from policyopt_book.plotting import drawing
from repository import ROOT

FOLDER = ROOT / "src" / "policyopt_book" / "drawings"
NAMES = sorted(path.stem for path in FOLDER.glob("*.svg"))
MAP = ROOT / "book" / "_static" / "methods.svg"  # not in a chapter but on a page
EVERY = [*NAMES, MAP.stem]
SVG = "{http://www.w3.org/2000/svg}"


def shown(name: str) -> list[str]:
    """Return the chapters that show a drawing, once for each cell."""
    return [
        chapter
        for chapter in notebooks.chapters()
        for cell in notebooks.read(notebooks.notebook_path(chapter)).cells
        if cell.cell_type == "code" and f'drawing("{name}")' in cell.source
    ]


def text_of(name: str) -> str:
    return MAP.read_text(encoding="utf-8") if name == MAP.stem else drawing(name)._repr_svg_()


@pytest.mark.parametrize("name", EVERY)
def test_a_drawing_stands_by_itself(name: str) -> None:
    text = text_of(name)
    root = ET.fromstring(text)
    assert root.tag == f"{SVG}svg"
    width, height = (float(root.attrib[key]) for key in ("width", "height"))
    assert root.attrib["viewBox"] == f"0 0 {width:g} {height:g}"
    assert width == 640, "the size of its letters is that of the other drawings"
    # Nothing from elsewhere, and no script.
    assert re.findall(r"https?://[^\"']+", text) == ["http://www.w3.org/2000/svg"]
    assert re.search(r"<script|<image|<foreignObject|@import", text) is None
    assert len(text) < 12_000
    # White paper, which the style sheet makes dark in the dark theme.
    paper = root.find(f"{SVG}rect")
    assert paper is not None
    assert paper.attrib == {"width": f"{width:g}", "height": f"{height:g}", "fill": "#ffffff"}
    # Letters that can be read on a phone, 390 pixels wide.
    sizes = [float(e.attrib["font-size"]) for e in root.iter() if "font-size" in e.attrib]
    assert min(sizes) >= 14


@pytest.mark.parametrize("name", EVERY)
def test_a_drawing_is_described(name: str) -> None:
    root = ET.fromstring(text_of(name))
    said = [root.findtext(f"{SVG}{part}", "") for part in ("title", "desc")]
    assert len(said[0]) > 5
    assert len(said[1]) > 60
    ids = root.attrib["aria-labelledby"].split()
    assert ids == [root.find(f"{SVG}{part}").attrib["id"] for part in ("title", "desc")]  # type: ignore[union-attr]
    assert all(e.attrib["id"].startswith(f"{name}-") for e in root.iter() if "id" in e.attrib)


@pytest.mark.parametrize("name", NAMES)
def test_a_drawing_is_in_one_chapter_and_in_its_output(name: str) -> None:
    (chapter,) = shown(name)
    cells = notebooks.read(notebooks.notebook_path(chapter)).cells
    (cell,) = [c for c in cells if f'drawing("{name}")' in c.source]
    (output,) = cell.outputs
    assert output["data"]["image/svg+xml"].strip() == drawing(name).svg.strip()


def test_an_unknown_drawing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"name must be one of \[.*'loop'.*\], got 'lop'"):
        drawing("lop")
    assert Path(FOLDER / "loop.svg").is_file()
