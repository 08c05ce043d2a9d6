"""A chapter begun with ``make chapter`` is sound from the start: it passes what CI asks of every chapter."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import notebooks
from build_book import pages
from repository import ROOT, tracked

NAME, TITLE = "trial-chapter", "A trial: what is in it?"
# What every chapter has, in this order.
PARTS = (
    rf"^# {re.escape(TITLE)}$",
    r"^\*About \d+ minutes to read and \d+ for the exercises, .* to run .*\. You need .*\.ipynb\)",
    r"^After this chapter you can$",
    r"^:tags: \[setup, hide-cell\]$",
    r"^from policyopt",
    r"^## The idea in one picture$",
    r"^ +alt: ",
    r"^## The derivation$",
    r"\\tag\{1\}",
    r"^assert torch\.allclose\(by_formula",
    r"^## What goes wrong if ",
    r"^## Check yourself$",
    r"^<details><summary>Answer</summary>$",
    r"^## Exercises$",
    r"^:tags: \[exercise-setup\]$",
    r"^## Summary$",
    r"^## References$",
)


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the repository, and begin a chapter in the copy."""
    folder = tmp_path_factory.mktemp("repository")
    for file in tracked(ROOT):
        target = folder / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    done = run(folder, "book/_tools/notebooks.py", "new", NAME, "--title", TITLE)
    assert done.returncode == 0, done.stderr
    return folder


def run(folder: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python in a copy of the repository, with the package of the copy."""
    environment = {**os.environ, "PYTHONPATH": str(folder / "src"), "COLUMNS": "200"}
    return subprocess.run(
        [sys.executable, *command], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )


def test_the_template_has_the_parts_of_a_chapter_in_order(copy: Path) -> None:
    text = (copy / "book" / "twins" / f"{NAME}.md").read_text(encoding="utf-8")
    position = 0
    for part in PARTS:
        match = re.compile(part, re.M).search(text, position)
        assert match is not None, f"{part} is missing, or not where it should be"
        position = match.end()
    assert len(re.findall(r"(?m)^:tags: \[exercise\]$", text)) == 4
    assert text.count("<details><summary>Answer</summary>") >= 4
    for file in (*copy.rglob(f"{NAME}.*"), *copy.rglob(f"{NAME.replace('-', '_')}.py")):
        assert not re.search("@NAME@|@TITLE@", file.read_text(encoding="utf-8")), file


def test_the_chapter_stands_behind_the_last_one(copy: Path) -> None:
    before, after = pages(), pages(copy / "_toc.yml")
    place = after.index(NAME)
    assert after[:place] + after[place + 1 :] == before
    assert place == 1 + max(before.index(name) for name in notebooks.chapters() if name in before)


def test_the_front_page_maps_it_behind_the_last_one(copy: Path) -> None:
    before, after = (
        (root / "book" / "index.md").read_text(encoding="utf-8").splitlines() for root in (ROOT, copy)
    )
    (row,) = [line for line in after if NAME in line]
    assert row.startswith(f"| [{TITLE}]({NAME}.ipynb) | ")
    place = after.index(row)
    assert after[:place] + after[place + 1 :] == before
    assert place == 1 + max(i for i, line in enumerate(before) if re.match(r"\| \[.*\.ipynb\) \|", line))


def test_the_chapter_passes_the_checks_of_the_book(copy: Path) -> None:
    """The structure, the exercises, the address, and every cell run anew and compared."""
    files = (
        "tests/test_book.py",
        "tests/test_exercises.py",
        "tests/test_references.py",
        "tests/test_repository_address.py",
    )
    options = ("-rA", "-q", "--color=no", "-p", "no:cacheprovider", "-k", f"{NAME} or front_page")
    done = run(copy, "-m", "pytest", *options, *files, "tests/test_site.py", f"book/{NAME}.ipynb")
    assert done.returncode == 0, done.stdout
    passed = re.findall(r"(?m)^PASSED (\S+?)::(.*)$", done.stdout)
    functions = {
        f"{file}::{name}"
        for file in files
        for name in re.findall(
            r'@pytest\.mark\.parametrize\("(?:name|page|chapter)", .*\n(?:@.*\n)*def (test_\w+)',
            (ROOT / file).read_text(encoding="utf-8"),
        )
    }
    assert len(functions) >= 12
    assert functions <= {f"{file}::{test.partition('[')[0]}" for file, test in passed}
    stubs, references = (
        sorted(re.search(rf"\[{NAME}\.(.*)\]", test)[1] for _, test in passed if test.startswith(start))
        for start in ("test_the_stub_fails_and", "test_the_reference_passes_and")
    )
    assert stubs == references
    assert len(stubs) == 4
    cells = notebooks.read(copy / "book" / f"{NAME}.ipynb").cells
    assert len([file for file, _ in passed if file == f"book/{NAME}.ipynb"]) == sum(
        cell.cell_type == "code" for cell in cells
    )


def test_the_module_of_its_exercises_passes_the_linters(copy: Path) -> None:
    module = f"src/policyopt_book/exercises/{NAME.replace('-', '_')}.py"
    for command in (("ruff", "check"), ("ruff", "format", "--check")):
        done = run(copy, "-m", *command, "--no-cache", module)
        assert done.returncode == 0, done.stdout + done.stderr
    # Where it comes from is a module with the same types; there the type checker has its cache.
    done = run(ROOT, "-m", "mypy", "--no-error-summary", "book/_tools/chapter_exercises.py")
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "name",
    ["", "My-chapter", "my_chapter", "3d", "-x", "a--b", "a-", "a b", "../a", "a.md", "ä", "x" * 41],
)
def test_ill_formed_names_are_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert notebooks.new(name, TITLE) == 1
    assert "NAME must be lower-case letters and digits, in words joined by single hyphens" in (
        said := capsys.readouterr().err
    )
    assert f"got {name!r}" in said


@pytest.mark.parametrize("title", ["", " ", "two\nlines", "# more", "$x$", "a_b", "`code`", "<b>", "x" * 101])
def test_ill_formed_titles_are_refused(title: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert notebooks.new(NAME, title) == 1
    assert "TITLE must be one line of words" in (said := capsys.readouterr().err)
    assert f"got {title!r}" in said


@pytest.mark.parametrize(
    ("name", "taken"),
    [
        ("mdp", "book/mdp.ipynb exists already"),
        ("errata", "book/errata.md exists already"),
        ("api", "_toc.yml names api already"),
        ("class", "'class' is a word of the language"),
    ],
)
def test_names_that_are_taken_are_refused(name: str, taken: str, capsys: pytest.CaptureFixture[str]) -> None:
    toc = notebooks.TOC.read_bytes()
    assert notebooks.new(name, TITLE) == 1
    assert taken in capsys.readouterr().err
    assert notebooks.TOC.read_bytes() == toc


def test_a_chapter_is_not_begun_twice(copy: Path) -> None:
    files = {path: path.read_bytes() for path in copy.rglob("*") if NAME in path.name and path.is_file()}
    again = run(copy, "book/_tools/notebooks.py", "new", NAME, "--title", TITLE)
    assert again.returncode == 1
    for path in (f"book/{NAME}.ipynb", f"book/twins/{NAME}.md", "src/policyopt_book/exercises/trial_chapter.py"):
        assert f"{path} exists already; choose another NAME" in again.stderr
    assert all(path.read_bytes() == content for path, content in files.items())


def test_a_template_that_does_not_run_leaves_nothing_behind(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    for folder in ("twins", "exercises"):
        (tmp_path / folder).mkdir()
    (tmp_path / "_toc.yml").write_text("chapters:\n  - file: first\n", encoding="utf-8")
    (tmp_path / "first.ipynb").touch()
    front = "| [First](first.ipynb) | do this | 1 | 1 | 1 | – |\n"
    (tmp_path / "index.md").write_text(front, encoding="utf-8")
    monkeypatch.setattr(notebooks, "ROOT", tmp_path)
    monkeypatch.setattr(notebooks, "BOOK", tmp_path)
    monkeypatch.setattr(notebooks, "TOC", tmp_path / "_toc.yml")
    monkeypatch.setattr(notebooks, "FRONT", tmp_path / "index.md")
    monkeypatch.setattr(notebooks, "exercises_path", lambda name: tmp_path / "exercises" / f"{name}.py")
    monkeypatch.setattr(notebooks, "setup_source", lambda notebook: "pass")
    before = sorted(tmp_path.rglob("*"))

    monkeypatch.setattr(notebooks, "execute", lambda name: notebooks.Run(name, 0.0, 0.0, "the cell raised"))
    assert notebooks.new(NAME, TITLE) == 1
    assert "the cell raised" in capsys.readouterr().err
    assert sorted(tmp_path.rglob("*")) == before

    def interrupted(name: str) -> notebooks.Run:
        assert notebooks.notebook_path(name).is_file()
        raise KeyboardInterrupt

    monkeypatch.setattr(notebooks, "execute", interrupted)
    with pytest.raises(KeyboardInterrupt):
        notebooks.new(NAME, TITLE)
    assert sorted(tmp_path.rglob("*")) == before
    assert (tmp_path / "_toc.yml").read_text(encoding="utf-8") == "chapters:\n  - file: first\n"
    assert (tmp_path / "index.md").read_text(encoding="utf-8") == front
