"""What the README and the front page show is run as a reader would run it, and says what it did."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from policyopt.lm import LMResult
from policyopt_book.studies import load_study
from repository import ROOT, Repository

README = (ROOT / "README.md").read_text(encoding="utf-8")
INDEX = (ROOT / "book" / "index.md").read_text(encoding="utf-8")
PLACEHOLDER = "policyopt/policyopt"


def blocks(page: str) -> list[str]:
    return re.findall(r"(?ms)^```python\n(.*?)^```$", page)


# A block that both pages show runs once.
BLOCKS = list(dict.fromkeys(block.replace('result.save("brief-model")\n', "") for block in blocks(INDEX)))
SMALLER = {"po.PPOConfig(": "po.PPOConfig(total_steps=30_000, "}
EXPECTED = (
    r"mean return (\d+) of at most 500",
    r"words: (\d+\.\d) before, (\d+\.\d) after",
    r"ended: .*\ncut: ",
)


@pytest.mark.parametrize("block", BLOCKS, ids=["agent", "language model", "one function"])
def test_a_block_runs_by_itself_and_shows_that_it_worked(block: str, tmp_path: Path) -> None:
    code = block
    for budget, smaller in SMALLER.items():
        code = code.replace(budget, smaller)
    (tmp_path / "block.py").write_text(code)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
    done = subprocess.run(
        [sys.executable, "block.py"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = re.search(EXPECTED[BLOCKS.index(block)], done.stdout)
    assert found, done.stdout
    if "train_ppo" in block:
        assert float(found[1]) > 100
    if "train_grpo" in block:
        assert float(found[2]) < 0.6 * float(found[1])
        assert "a sample: " in done.stdout


def test_what_the_readme_saves_can_be_saved() -> None:
    """The line that only the README has."""
    assert hasattr(LMResult, "save")
    assert sum('result.save("brief-model")' in block for block in blocks(README)) == 1


def test_the_readme_shows_the_blocks_of_the_front_page() -> None:
    assert [b.replace('result.save("brief-model")\n', "") for b in blocks(README)] == BLOCKS[:2]


def test_the_readme_begins_with_a_sentence_and_a_picture() -> None:
    head = README.split("\n## ")[0]
    assert "make " not in head.split("**The address")[0]
    (picture,) = re.findall(r"!\[[^\]]{40,}\]\((https://raw\.githubusercontent\.com/\S+?)\)", head)
    owner, name, branch, path = re.fullmatch(
        r"https://raw\.githubusercontent\.com/([^/]+)/([^/]+)/([^/]+)/(.+)", picture
    ).groups()  # type: ignore[union-attr]
    assert (f"{owner}/{name}", branch) == (Repository.of(ROOT).slug, "main")
    assert (ROOT / path).is_file()


@pytest.mark.parametrize("page", [README, INDEX], ids=["README.md", "index.md"])
def test_a_placeholder_is_called_one(page: str) -> None:
    """As long as nobody has put an address of their own in its place; afterwards the note must go."""
    assert ("address is a placeholder" in page) == (Repository.of(ROOT).slug == PLACEHOLDER)
    assert "pip install -e '.[lm]'" in page


def test_nobody_is_told_to_install_a_name_that_is_not_ours() -> None:
    """``pip install policyopt`` would fetch whatever somebody registers under that name."""
    files = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "src").rglob("*.py")]
    files += [*(ROOT / "book").glob("*.md"), *(ROOT / "book" / "recipes").glob("*.py")]
    files += [*(ROOT / "book" / "twins").glob("*.md")]
    for file in files:
        for line in re.findall(r"pip install[^\n]*", file.read_text(encoding="utf-8")):
            assert not re.search(r"policyopt(?!\S* @ git\+|/|_)(?:\[[\w,]+\])?['\"]?(?:\s|$)", line), (
                f"{file}: {line}"
            )


def test_the_hours_of_the_front_page_are_the_sums_of_its_table() -> None:
    rows = re.findall(r"(?m)^\| \[.+?\]\([\w-]+\.ipynb\) \| .+? \| (\d+) \| (\d+) \|", INDEX)
    words = (
        "no one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
    )
    words += " seventeen eighteen nineteen twenty"
    reading, exercises = (round(sum(int(row[i]) for row in rows) / 60) for i in (0, 1))
    expected = (
        f"{words.split()[reading]} hours to read, and {words.split()[exercises]} more for the exercises"
    )
    assert f"about {expected}" in INDEX
    assert (
        f"About {words.split()[reading]} hours to read and {words.split()[exercises]} for all exercises"
        in README
    )


def test_what_the_chapter_on_a_real_model_takes_is_said_alike_everywhere() -> None:
    """Its own first line, which its last output bears out, against the front pages."""
    chapter = (ROOT / "book" / "twins" / "real-model.md").read_text(encoding="utf-8")
    found = re.search(r"(\w+) minutes to run on two CPU cores\. It takes (\d+) GB of memory", chapter)
    assert found is not None
    minutes, memory = found[1], found[2]
    (readme,) = re.findall(r"the\s+one on a real model takes (\w+), and (\d+) GB of memory", README)
    assert readme == (minutes, memory)
    (card,) = re.findall(r"the one on a real model in (\w+)\.", INDEX)
    assert card == minutes
    (row,) = re.findall(r"\(real-model\.ipynb\) \| .*\((\d+) GB of memory\) \| \d+ \| \d+ \| (\d+) \|", INDEX)
    assert row == (memory, str(["no", "one", "two", "three", "four", "five"].index(minutes)))
    # It runs on Windows, says its first line: only make does not.
    assert "Windows" in chapter.split("\n## ")[0]
    (windows,) = re.findall(r"On\s+Windows use WSL: ([^.]*)\.", README)
    assert windows == "`make` needs it"


def test_as_many_seeds_as_the_front_page_promises() -> None:
    """Ten or more for most curves in environments, five or six for the others, three for language models; a single
    run where nothing is drawn, or where only the edges of a grid are looked for.
    """
    promise = (
        "ten or more for most curves in environments, five or six where a sweep is wide or a run long, "
        "three or more for language models"
    )
    assert promise in INDEX
    environments, texts = {}, {}
    for twin in sorted((ROOT / "book" / "twins").glob("*.md")):
        page = twin.read_text(encoding="utf-8")
        kind = texts if "from policyopt.lm import" in page else environments
        for default in re.findall(r"(?m)^(?:SEEDS|DEFAULT\w*) = (?:DEFAULT = )?(\d+)\b", page):
            kind[twin.stem] = int(default)
        for name in re.findall(r"load_study\(\"(\w+)\"\)", page):
            script = (ROOT / "book" / "studies" / f"{name}.py").read_text(encoding="utf-8")
            kind = texts if re.search(r"from (policyopt\.lm|_text) import", script) else environments
            kind[name] = load_study(name).seeds
    assert len(environments) >= 9
    assert len(texts) >= 15
    single = {name for name, seeds in {**environments, **texts}.items() if seeds == 1}
    assert single == {"real_model_articles", "text_rates"}
    assert min(environments.values()) >= 5, environments
    few = [name for name, seeds in environments.items() if seeds < 10]
    assert 2 * len(few) < len(environments), few
    assert min(seeds for name, seeds in texts.items() if name not in single) >= 3, texts
