"""Prepare a release, and check that a tag may become one.

Usage::

    python book/_tools/release.py prepare 0.2.0      write the version and today's date where they belong
    python book/_tools/release.py check v0.2.0       is this the version of the package, and described in the changelog?
    python book/_tools/release.py check v0.2.0 --notes notes.md     also write the changelog's entry to a file

The version stands in ``pyproject.toml``; ``policyopt.__version__`` asks the installed package for it. ``CITATION.cff``
and ``CHANGELOG.md`` repeat it, and a test compares them.
"""

from __future__ import annotations

import argparse
import datetime
import re
import sys
import tomllib
from pathlib import Path

from repository import ROOT, Repository

VERSION = re.compile(r"\d+\.\d+\.\d+")
HEADING = re.compile(r"(?m)^## \[(?P<name>[^\]]+)\](?: - (?P<date>.+))?$")
PENDING = "not yet released"


def project_version(root: Path = ROOT) -> str:
    """Return the version that ``pyproject.toml`` gives."""
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return str(project["version"])


def entries(changelog: str) -> dict[str, tuple[str, str]]:
    """Return date and text of each entry of a changelog, in its order.

    Parameters
    ----------
    changelog : str
        A changelog as https://keepachangelog.com describes it.

    Returns
    -------
    dict of str to tuple of str
        For each version, and for ``Unreleased``: its date (``""`` if there is none) and its text.
    """
    headings = list(HEADING.finditer(changelog))
    ends = [h.start() for h in headings[1:]] + [len(changelog)]
    found = {}
    for heading, end in zip(headings, ends, strict=True):
        text = re.sub(r"(?m)^\[[^\]]+\]: \S+$\n?", "", changelog[heading.end() : end])
        found[heading["name"]] = (heading["date"] or "", text.strip())
    return found


def tag_problems(tag: str, root: Path = ROOT) -> list[str]:
    """Return why a tag cannot be released; nothing if it can.

    Parameters
    ----------
    tag : str
        The tag's name, such as ``v0.2.0``.
    root : Path
        The repository.

    Returns
    -------
    list of str
        One line per reason.
    """
    found = []
    version = project_version(root)
    if tag != f"v{version}":
        found.append(f"the tag is {tag}, but pyproject.toml says version {version}")
    date, text = entries((root / "CHANGELOG.md").read_text(encoding="utf-8")).get(version, ("", ""))
    if not re.fullmatch(r"\d{4}-\d\d-\d\d", date):
        found.append(f"CHANGELOG.md has no entry `## [{version}] - YEAR-MONTH-DAY`")
    if not text:
        found.append(f"CHANGELOG.md does not say what is in {version}")
    return found


def prepare(version: str, date: str, root: Path = ROOT) -> None:
    """Write a version and its date into ``pyproject.toml``, ``CITATION.cff`` and ``CHANGELOG.md``.

    Parameters
    ----------
    version : str
        ``MAJOR.MINOR.PATCH``.
    date : str
        The day of the release, ``YEAR-MONTH-DAY``.
    root : Path
        The repository.

    Raises
    ------
    ValueError
        If the version is none, is older than the present one or was released, or the changelog has nothing for it.
    """
    if not VERSION.fullmatch(version):
        raise ValueError(f"{version!r} is not of the form MAJOR.MINOR.PATCH")
    present = project_version(root)
    if _numbers(version) < _numbers(present):
        raise ValueError(f"{version} is older than {present}")
    file = root / "CHANGELOG.md"
    changelog = file.read_text(encoding="utf-8")
    known = entries(changelog)
    text = known.get("Unreleased", ("", ""))[1]
    if version in known:
        if known[version][0] != PENDING:
            raise ValueError(f"{version} was released on {known[version][0]}")
        if text:
            raise ValueError(f"move what CHANGELOG.md lists under [Unreleased] to [{version}] first")
        changelog = changelog.replace(f"## [{version}] - {PENDING}", f"## [{version}] - {date}")
    elif not text:
        raise ValueError("CHANGELOG.md lists nothing under [Unreleased]")
    else:
        changelog = changelog.replace("## [Unreleased]", f"## [Unreleased]\n\n## [{version}] - {date}", 1)
        url = Repository.of(root).url
        changelog = re.sub(
            r"(?m)^\[Unreleased\]: .*$",
            f"[Unreleased]: {url}/compare/v{version}...HEAD\n[{version}]: {url}/releases/tag/v{version}",
            changelog,
        )
    changes = {file: changelog}
    for name, pattern, line in (
        ("pyproject.toml", r'(?m)^version = ".*"$', f'version = "{version}"'),
        ("CITATION.cff", r"(?m)^version: .*$", f"version: {version}"),
    ):
        old = (root / name).read_text(encoding="utf-8")
        new, times = re.subn(pattern, line, old)
        if times != 1:
            raise ValueError(f"{name} has {times} lines for the version instead of one")
        changes[root / name] = new
    for path, new in changes.items():
        path.write_text(new, encoding="utf-8")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("."))


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Prepare a release, or check a tag.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("prepare", help="write version and date where they belong")
    command.add_argument("version")
    command = commands.add_parser("check", help="may this tag become a release?")
    command.add_argument("tag")
    command.add_argument("--notes", type=Path, help="write the changelog's entry to this file")
    options = parser.parse_args(argv)
    if options.command == "prepare":
        try:
            prepare(options.version, datetime.date.today().isoformat())
        except ValueError as error:
            parser.error(str(error))
        print(f"Look at the changes, commit them, and: git tag v{options.version} && git push --tags")
        return 0
    found = tag_problems(options.tag)
    print("\n".join(found) or f"{options.tag} can be released")
    if options.notes and not found:
        text = entries((ROOT / "CHANGELOG.md").read_text(encoding="utf-8"))[project_version()][1]
        options.notes.write_text(f"{text}\n", encoding="utf-8")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main())
