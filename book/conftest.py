"""How the chapters are tested: every cell is run by nbval and compared with its committed output.

On top of nbval: floats are compared with a tolerance, pictures are not compared, and a cell that was
committed unexecuted, out of order or with an error fails even if it would run now. The seconds that each
notebook took are printed at the end of the run.
"""

from __future__ import annotations

import math
import os
import re
from collections import defaultdict
from collections.abc import Generator
from pathlib import Path
from typing import Any

import pytest
from nbval.kernel import RunningKernel
from nbval.plugin import IPyNbCell, IPyNbFile

from notebooks import KERNEL_ENVIRONMENT, committed_problem

collect_ignore = ["studies"]  # scripts: what they hold is tested by tests/book/test_studies.py
REL_TOL, ABS_TOL = 1e-5, 1e-8
FLOAT = re.compile(r"[-+]?(?:\d+\.\d*|\.\d+|\d+(?=[eE][-+]?\d))(?:[eE][-+]?\d+)?")
SECONDS_PER_CHAPTER = 150
PICTURES = ("image/svg+xml", "application/pdf")

os.environ.update(KERNEL_ENVIRONMENT)
# Chapters that train a real model take fewer steps in the tests; POLICYOPT_SHORT=0 runs them in full.
os.environ.setdefault("POLICYOPT_SHORT", "1")


class Tolerant(str):
    """A text that equals another when they differ only in the last digits of their floats."""

    __slots__ = ()
    __hash__ = str.__hash__

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, str):
            return NotImplemented
        if str.__eq__(self, other):
            return True
        mine, theirs = FLOAT.findall(self), FLOAT.findall(other)
        return (
            len(mine) == len(theirs)
            # Arrays are padded to the width of their longest element, so blanks may differ with the digits.
            and self._without_floats(self) == self._without_floats(other)
            and all(
                math.isclose(float(x), float(y), rel_tol=REL_TOL, abs_tol=ABS_TOL)
                for x, y in zip(mine, theirs, strict=True)
            )
        )

    def __ne__(self, other: object) -> bool:
        equal = self.__eq__(other)
        return equal if equal is NotImplemented else not equal

    @staticmethod
    def _without_floats(text: str) -> str:
        return " ".join(FLOAT.sub(" # ", text).split())


def _tolerant_sanitize(self: IPyNbCell, text: Any) -> Any:
    text = _sanitize(self, text)
    return Tolerant(text) if isinstance(text, str) else text


def _init_without_pictures(self: IPyNbFile, *args: Any, **kwargs: Any) -> None:
    _init(self, *args, **kwargs)
    self.skip_compare += PICTURES


def _sanitize_files(self: IPyNbFile) -> list[str]:
    return [str(Path(__file__).with_name("nbval_sanitize.cfg"))]


def _execute_with_history(self: RunningKernel, source: str, allow_stdin: bool | None = None) -> str:
    # nbval runs cells outside the history; IPython then cannot see the `;` that hides the last value.
    return self.kc.execute(source, allow_stdin=allow_stdin, stop_on_error=False)


# nbval has no hooks for these; the names below are the whole of what is relied on.
_sanitize, _init = IPyNbCell.sanitize, IPyNbFile.__init__
RunningKernel.execute_cell_input = _execute_with_history
IPyNbCell.sanitize = _tolerant_sanitize
IPyNbFile.__init__ = _init_without_pictures
IPyNbFile.get_sanitize_files = _sanitize_files


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if isinstance(item, IPyNbCell):
            item.add_marker(pytest.mark.notebook)
            # What nbval and the Jupyter client warn about in this process is not ours to mend.
            item.add_marker(pytest.mark.filterwarnings("default"))


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item: pytest.Item) -> Generator[None, Any, Any]:
    result = yield  # run the cell first: those below need what it defines
    if isinstance(item, IPyNbCell):
        problem = committed_problem(item.cell, item.cell_num + 1)
        if problem is not None:
            pytest.fail(problem, pytrace=False)
    return result


def pytest_terminal_summary(terminalreporter: Any) -> None:
    seconds: defaultdict[str, float] = defaultdict(float)
    for reports in terminalreporter.stats.values():
        for report in reports:
            path = getattr(report, "nodeid", "").partition("::")[0]
            if path.endswith(".ipynb") and hasattr(report, "duration"):
                seconds[path] += report.duration
    if seconds:
        terminalreporter.section("seconds per notebook, kernel start included")
        for path, spent in sorted(seconds.items()):
            over = (
                f"  (over the limit of {SECONDS_PER_CHAPTER} s on two cores)"
                if spent > SECONDS_PER_CHAPTER
                else ""
            )
            terminalreporter.write_line(f"{spent:7.1f}  {path}{over}")
