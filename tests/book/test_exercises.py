"""The exercises of the chapters: every stub fails, every solution passes, and mistakes are told by name."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

import notebooks
from policyopt_book.exercises import Exercise, check, exercises

CHAPTERS = notebooks.chapters()
TITLE = re.compile(r"^\*\*(\d+)\. .+ \((★{1,3}), (\d+) minutes\)\.\*\*", re.M)
CHECK = re.compile(r"^check\(\"([\w.-]+)\", (\w+)\)$", re.M)
SOLUTION = re.compile(r"<details><summary>Solution</summary>.*?```python\n(.*?)```.*?</details>", re.S)


@dataclass(frozen=True)
class Posed:
    """An exercise as a chapter poses it: the cell with the stub, and the solution folded below it."""

    chapter: str
    name: str
    function: str
    setup: str
    stub: str
    solution: str | None


def posed(chapter: str) -> Iterator[Posed]:
    cells = notebooks.read(notebooks.notebook_path(chapter)).cells
    setup = "\n".join(c.source for c in cells if "exercise-setup" in c.metadata.get("tags", []))
    for i, cell in enumerate(cells):
        if "exercise" in cell.metadata.get("tags", []):
            (asked,) = CHECK.findall(cell.source)
            below = cells[i + 1].source if i + 1 < len(cells) else ""
            solution = SOLUTION.search(below)
            # The solution belongs to this exercise only if it comes before the title of the next one.
            title = TITLE.search(below)
            if solution and title and title.start() < solution.start():
                solution = None
            yield Posed(chapter, *asked, setup, cell.source, solution and solution[1])


POSED = [p for chapter in CHAPTERS for p in posed(chapter)]
EXERCISES = exercises()


def prose(chapter: str) -> str:
    """All Markdown of a chapter."""
    cells = notebooks.read(notebooks.notebook_path(chapter)).cells
    return "\n\n".join(c.source for c in cells if c.cell_type == "markdown")


def run(*sources: str) -> dict[str, Any]:
    namespace: dict[str, Any] = {"__name__": "exercise"}
    for source in sources:
        exec(compile(source, "<exercise>", "exec"), namespace)
    return namespace


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_each_chapter_has_four_graded_and_timed_exercises(chapter: str) -> None:
    assert len([p for p in POSED if p.chapter == chapter]) >= 4
    numbers = [int(number) for number, _, _ in TITLE.findall(prose(chapter))]
    assert numbers == list(range(1, len(numbers) + 1))


def test_every_exercise_of_the_package_is_posed_once() -> None:
    assert sorted(p.name for p in POSED) == sorted(EXERCISES)
    for p in POSED:
        assert p.name.startswith(f"{p.chapter}.")


@pytest.mark.parametrize(
    "p",
    POSED,
    ids=lambda p: p.name,
)
def test_the_stub_fails_and_the_solution_passes(p: Posed) -> None:
    stub = run(p.setup, p.stub)[p.function]
    verdict = check(p.name, stub)
    assert not verdict
    assert "Nothing there yet" in verdict.message
    assert p.solution is not None, "the cell below the stub must begin with a folded solution"
    # The solution must stand alone: the setup cell is all that it may use.
    solution = run(p.setup, p.solution)[p.function]
    verdict = check(p.name, solution)
    assert verdict, verdict


@pytest.mark.parametrize("exercise", EXERCISES.values(), ids=EXERCISES)
def test_the_reference_passes_and_every_mistake_is_told_by_name(exercise: Exercise) -> None:
    if exercise.reference is None:
        return
    assert check(exercise.name, exercise.reference)
    for label, mistake in exercise.mistakes.items():
        verdict = check(exercise.name, mistake)
        assert not verdict
        assert verdict.message.startswith(label), verdict


@pytest.mark.parametrize("exercise", [e for e in EXERCISES.values() if e.learned], ids=lambda e: e.name)
def test_every_number_that_goes_in_is_learned_or_held_constant(exercise: Exercise) -> None:
    """A check of one gradient alone accepts an answer that detaches the others."""
    for case in exercise.cases:
        tensors = {n for n, x in case.items() if isinstance(x, torch.Tensor) and x.is_floating_point()}
        assert tensors == {*exercise.learned, *exercise.constants}
        assert not set(exercise.learned) & set(exercise.constants)


def detaching(exercise: Exercise, argument: str) -> Callable[..., Any]:
    """The right answer, but one input is detached."""

    def answer(*given: Any) -> Any:
        assert exercise.reference is not None
        names = exercise.cases[0]
        return exercise.reference(
            *(x.detach() if name == argument else x for name, x in zip(names, given, strict=True))
        )

    return answer


@pytest.mark.parametrize("exercise", [e for e in EXERCISES.values() if e.learned], ids=lambda e: e.name)
def test_an_answer_that_detaches_an_input_is_told_so(exercise: Exercise) -> None:
    for name in exercise.learned:
        verdict = check(exercise.name, detaching(exercise, name))
        assert not verdict
        assert "detache" in verdict.message
    for name in exercise.constants:
        assert check(exercise.name, detaching(exercise, name))


def test_verdicts_say_what_is_wrong() -> None:
    def raises(*_: Any) -> Any:
        raise KeyError("x")

    def in_place(rewards: torch.Tensor, gamma: float) -> torch.Tensor:
        rewards += 1
        return rewards

    assert "raises KeyError" in check("mdp.returns", raises).message
    assert "changes its argument rewards in place" in check("mdp.returns", in_place).message
    assert "the shape (1,), expected (3,)" in check("mdp.returns", lambda r, g: r[:1]).message
    assert "returns 'x', expected" in check("mdp.returns", lambda r, g: "x").message
    assert "It returns the shape (3,), expected (2,)" in check("mdp.by-hand", (12, 10, 0)).message
    assert "For rewards = [1., 2., 3.], gamma = 0.5, it returns [1., 2., 3.], expected" in (
        check("mdp.returns", lambda r, g: r).message
    )
    assert repr(check("mdp.by-hand", (12, 10))) == "mdp.by-hand: solved. 1 case agrees."


def test_a_name_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"name must be one of \[.*'mdp.returns'.*\], got 'mdp.return'"):
        check("mdp.return", None)
    with pytest.raises(ValueError, match=r"chapter must be one of .*, got 'nothing'"):
        check("nothing.at-all", None)
    with pytest.raises(ValueError, match="needs either a reference or verify"):
        Exercise(name="mdp.neither")


@pytest.mark.parametrize("chapter", CHAPTERS)
def test_each_chapter_says_what_it_takes_and_what_it_gives(chapter: str) -> None:
    text = prose(chapter)
    first = text.split("\n\n")[1]
    told = re.fullmatch(
        r"\*About \d+ minutes to read and (\d+) for the exercises, .+ to run .+\. You need .+\*", first
    )
    assert told, first
    assert int(told[1]) == sum(int(minutes) for _, _, minutes in TITLE.findall(text))
    assert "\nAfter this chapter you can\n" in text
    parts = re.findall(r"^## (.+)$", text, re.M)
    assert parts[-4:] == ["Check yourself", "Exercises", "Summary", "References"]
    # A question in bold, and an answer to unfold that says why.
    asked = text.split("## Check yourself")[1].split("\n## ")[0]
    answers = asked.count("<details><summary>Answer</summary>")
    assert answers == len(re.findall(r"^\*\*.+\*\*$", asked, re.M)) >= 4


def test_the_map_on_the_front_page_agrees_with_the_chapters() -> None:
    """The same minutes for reading and for the exercises, and every chapter is on it."""
    front = (notebooks.BOOK / "index.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| \[.+?\]\(([\w-]+)\.ipynb\) \| .+? \| (\d+) \| (\d+) \| [\d¼]+ \|", front, re.M)
    told = {}
    for chapter in CHAPTERS:
        found = re.search(r"^\*About (\d+) minutes to read and (\d+) for the exercises", prose(chapter), re.M)
        assert found is not None
        told[chapter] = (found[1], found[2])
    assert {name: (reading, exercises_) for name, reading, exercises_ in rows} == told
