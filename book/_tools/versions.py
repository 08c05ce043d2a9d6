"""Put the book of the main branch and the books of all releases together into one site.

Usage::

    python book/_tools/versions.py RELEASES SITE

``RELEASES`` is a folder of archives ``policyopt-book-X.Y.Z.tar.gz``, one from each release; ``book/_build/html`` is the
book of the main branch. ``SITE`` gets that book at its root and the last patch of each release under ``vX.Y/``, and
``versions.json`` lists them. Nothing of the past is built again, so nothing of it can break.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
import tarfile
from pathlib import Path

from repository import ROOT

HTML = ROOT / "book" / "_build" / "html"
ARCHIVE = re.compile(r"policyopt-book-(\d+)\.(\d+)\.(\d+)\.tar\.gz")
NOTE = (
    '<aside class="version-note" aria-label="Version" style="padding:.6rem 1rem;background:#fff3cd;color:#1b1b1b;'
    'text-align:center">This is version {version} of the book. '
    '<a href="{newest}" style="color:#0a4b78;text-decoration:underline">Go to the newest.</a></aside>'
)


def releases(folder: Path) -> dict[str, tuple[str, Path]]:
    """Return the last patch of each minor version, the newest first.

    Parameters
    ----------
    folder : Path
        Where the archives are.

    Returns
    -------
    dict of str to tuple
        For each ``X.Y``: the full version and the archive.

    Raises
    ------
    ValueError
        If a file there is no archive of a book.
    """
    found = {}
    for file in folder.iterdir():
        match = ARCHIVE.fullmatch(file.name)
        if match is None:
            raise ValueError(f"{file.name} is not named policyopt-book-X.Y.Z.tar.gz")
        found[tuple(int(part) for part in match.groups())] = file
    best: dict[str, tuple[str, Path]] = {}
    for (major, minor, patch), file in sorted(found.items(), reverse=True):
        best.setdefault(f"{major}.{minor}", (f"{major}.{minor}.{patch}", file))
    return best


def assemble(main: Path, archives: Path, site: Path) -> list[dict[str, str]]:
    """Write the site.

    Parameters
    ----------
    main : Path
        The built book of the main branch.
    archives : Path
        The folder of the releases' books.
    site : Path
        Where to write; must not exist.

    Returns
    -------
    list of dict
        What ``versions.json`` holds: version and path of each book, the main branch first.
    """
    best = releases(archives)
    shutil.copytree(main, site)
    listed = [{"version": "main", "path": ""}]
    for minor, (version, file) in best.items():
        with tarfile.open(file) as archive:
            archive.extractall(site / f"v{minor}", filter="data")
        # Search engines are told of one address for each page: that without a version.
        (site / f"v{minor}" / "sitemap.xml").unlink(missing_ok=True)
        listed.append({"version": version, "path": f"v{minor}/"})
    (site / "versions.json").write_text(json.dumps(listed, indent=1) + "\n", encoding="utf-8")
    if best:
        for book in listed:
            for page in sorted((site / book["path"]).rglob("*.html")):
                place = page.relative_to(site / book["path"])
                if "_static" in place.parts or (not book["path"] and re.match(r"v\d+\.\d+$", place.parts[0])):
                    continue
                mark(page, place, book, listed, site)
    return listed


def mark(page: Path, place: Path, book: dict[str, str], listed: list[dict[str, str]], site: Path) -> None:
    """Tell the reader of a page which version this is, and link the others."""
    up = "../" * (len(page.relative_to(site).parts) - 1)

    def same_page(other: dict[str, str]) -> str:
        there = place if (site / other["path"] / place).is_file() else Path("index.html")
        return f"{up}{other['path']}{there.as_posix()}"

    links = [
        f"<strong>{other['version']}</strong>"
        if other is book
        else f'<a href="{same_page(other)}">{other["version"]}</a>'
        for other in listed
    ]
    text = page.read_text(encoding="utf-8")
    text = re.sub(
        r'(<div class="extra_footer">.*?)(\s*</div>)',
        lambda m: f"{m[1]} Versions: {', '.join(links)}.{m[2]}",
        text,
        count=1,
        flags=re.S,
    )
    if book["path"]:
        note = NOTE.format(version=book["version"], newest=same_page(listed[0]))
        # Behind the link that skips to the text, which screen readers expect first.
        start = r'<body[^>]*>(?:\s*<div id="pst-skip-link".*?</div>)?'
        text = re.sub(start, lambda m: f"{m[0]}\n{note}", text, count=1, flags=re.S)
    page.write_text(text, encoding="utf-8")


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Put the books of all versions into one site.")
    parser.add_argument("releases", type=Path, help="folder of policyopt-book-X.Y.Z.tar.gz")
    parser.add_argument("site", type=Path, help="folder to write; must not exist")
    parser.add_argument("--html", type=Path, default=HTML, help="the book of the main branch")
    options = parser.parse_args(argv)
    for book in assemble(options.html, options.releases, options.site):
        print(f"{book['version']}: /{book['path']}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
