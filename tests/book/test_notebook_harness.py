"""book/conftest.py: a rotten notebook must fail, and a sound one must pass on another machine."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

from repository import ROOT

NotebookOutput = Any  # nbformat is untyped


def stream(text: str) -> NotebookOutput:
    return new_output("stream", name="stdout", text=text)


# name: (source, committed outputs, change to the cell, whether it passes)
CASES: dict[str, tuple[str, list[NotebookOutput], dict[str, Any], bool]] = {
    "same": ("print('a', 3)", [stream("a 3\n")], {}, True),
    "last digits": ("print([1.0000001, 2e-3])", [stream("[1.0000002, 0.002]\n")], {}, True),
    "other value": ("print(1.001)", [stream("1.0\n")], {}, False),
    "other integer": ("print(3)", [stream("4\n")], {}, False),
    "other text": ("print('loss 1.0')", [stream("gain 1.0\n")], {}, False),
    "ignored": ("print(3.5)", [stream("9.9\n")], {"metadata": {"tags": ["nbval-ignore-output"]}}, True),
    "address": (
        "object()",
        [new_output("execute_result", {"text/plain": "<object at 0x7f0000000000>"}, execution_count=7)],
        {},
        True,
    ),
    "semicolon": ("41 + 1;", [], {}, True),
    "picture": (
        "from IPython.display import SVG, display\ndisplay(SVG('<svg><text>a</text></svg>'))",
        [
            new_output(
                "display_data",
                {
                    "image/svg+xml": "<svg><text>b</text></svg>",
                    "text/plain": "<IPython.core.display.SVG object>",
                },
            )
        ],
        {},
        True,
    ),
    "progress bar": ("from tqdm import tqdm\nfor _ in tqdm(range(2)): pass", [], {}, True),
    "never executed": ("x = 1", [], {"execution_count": None}, False),
    "out of order": ("x = 1", [], {"execution_count": 99}, False),
    "committed error": (
        "x = 1",
        [new_output("error", ename="ValueError", evalue="no", traceback=[])],
        {"metadata": {"tags": ["nbval-ignore-output"]}},
        False,
    ),
    "fails now": ("raise ValueError('now')", [], {}, False),
    "warned when it was committed": (
        "import sys; print('old', file=sys.stderr)",
        [new_output("stream", name="stderr", text="old\n")],
        {},
        False,
    ),
    "warns now": ("import warnings; warnings.warn('old')", [], {}, False),
}


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, bool], str]:
    folder = tmp_path_factory.mktemp("harness")
    for name in ("conftest.py", "nbval_sanitize.cfg"):
        shutil.copy(ROOT / "book" / name, folder)
    (folder / "pytest.ini").write_text(
        f"[pytest]\nmarkers = notebook: a cell\npythonpath = {ROOT / 'book' / '_tools'}\nfilterwarnings = error\n"
    )
    cells = []
    for number, (source, outputs, changes, _) in enumerate(CASES.values(), start=1):
        cells.append(new_code_cell(source, outputs=outputs, **{"execution_count": number, **changes}))
    nbformat.write(new_notebook(cells=cells), folder / "chapter.ipynb")
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-current-env", "-rA", "-m", "notebook"]
    run = subprocess.run(
        [*command, "-p", "no:cacheprovider", "--color=no", "chapter.ipynb"],
        cwd=folder, capture_output=True, text=True, check=False, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    found = re.findall(r"(?m)^(PASSED|FAILED) chapter\.ipynb::Cell (\d+)", run.stdout)
    assert len(found) == len(CASES), run.stdout + run.stderr
    names = list(CASES)
    return {names[int(number)]: word == "PASSED" for word, number in found}, run.stdout


@pytest.mark.parametrize("case", CASES)
def test_a_cell_fails_if_it_raises_warns_or_prints_something_else(
    case: str, verdicts: tuple[dict[str, bool], str]
) -> None:
    passed, report = verdicts
    assert passed[case] is CASES[case][3], report


def test_report_ends_with_the_seconds_of_each_notebook(verdicts: tuple[dict[str, bool], str]) -> None:
    assert re.search(r"seconds per notebook.*\n\s+\d+\.\d  chapter\.ipynb", verdicts[1])


def test_configuration_is_the_one_the_project_runs_with() -> None:
    options = (ROOT / "pyproject.toml").read_text()
    assert '"--nbval"' in options
    assert '"--nbval-current-env"' in options
    assert Path(ROOT / "book" / "conftest.py").exists()
