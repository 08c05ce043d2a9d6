"""The check of links in the built book: it finds the dead ones, and says nothing of the living."""

import subprocess
from pathlib import Path

import pytest

import build_book

SOUND = """<html id="all"><img src="a%20b.png"><a href="#here">1</a><a href="#">2</a><a href="https://example.org/x">3</a>
<a href="x/two.html#there">4</a><a href="x/">5</a><a href="mailto:a@b.c">6</a><a href="#top">7</a>
<img src="data:image/png;base64,AA"><h1 id="here">8</h1><object data="x/c.svg"></object><p data-src="no.png"></html>"""


@pytest.fixture
def book(tmp_path: Path) -> Path:
    (tmp_path / "x").mkdir()
    (tmp_path / "_static").mkdir()
    (tmp_path / "index.html").write_text(SOUND)
    (tmp_path / "a b.png").touch()
    (tmp_path / "x" / "c.svg").touch()
    (tmp_path / "x" / "index.html").write_text('<a href="../index.html?q=1#here">up</a>')
    (tmp_path / "x" / "two.html").write_text('<a name="there" href="../a%20b.png">picture</a>')
    (tmp_path / "_static" / "template.html").write_text('<script src="{{ pathto() }}"></script>')
    return tmp_path


def test_living_links_pass(book: Path) -> None:
    assert build_book.dead_links(book) == []


@pytest.mark.parametrize(
    ("link", "words"),
    [
        ('<a href="gone.html">', "no such file"),
        ('<img src="gone.png">', "no such file"),
        ('<script src="gone.js"></script>', "no such file"),
        ('<object data="gone.svg"></object>', "no such file"),
        ('<a href="x/two.html#gone">', "two.html has no such id"),
        ('<a href="#gone">', "page.html has no such id"),
        ('<a href="../outside.html">', "no such file"),
        ('<a href="/x/two.html">', "no such file"),
    ],
)
def test_dead_links_are_found(book: Path, link: str, words: str) -> None:
    (book.parent / "outside.html").touch()
    (book / "page.html").write_text(link)
    (line,) = build_book.dead_links(book)
    assert line.startswith("page.html: ")
    assert words in line


def test_a_build_with_a_dead_link_is_refused(
    book: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``make book`` looks at what it built."""
    monkeypatch.setattr(build_book, "HTML", book)
    monkeypatch.setattr(build_book, "BOOK", book)
    monkeypatch.setattr(build_book, "pages", lambda: ["index"])
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: subprocess.CompletedProcess(args, 0))
    assert build_book.main() == 0
    (book / "page.html").write_text('<a href="gone.html">')
    assert build_book.main() == 1
    assert "gone.html: no such file" in capsys.readouterr().err
