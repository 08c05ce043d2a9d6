"""Build the book from scratch, and fail if a page is missing or broken, asks the network, or has a dead link."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

from repository import ROOT

BOOK = ROOT / "book"
HTML = BOOK / "_build" / "html"
EXTERNAL = re.compile(
    r"""<(?:script|img|iframe|source|video|embed)\b[^>]*\bsrc=["'](?:https?:)?//[^"']+"""
    r"""|<link\b(?=[^>]*\brel=["'](?:stylesheet|preload|icon)["'])[^>]*\bhref=["'](?:https?:)?//[^"']+""",
    re.I,
)


def pages(toc: Path = ROOT / "_toc.yml") -> list[str]:
    """Return the names of all pages in the table of contents, the root first."""
    return re.findall(r"(?m)^[ -]*(?:root|file): ([\w/-]+)$", toc.read_text(encoding="utf-8"))


def problems(html: Path, names: list[str]) -> list[str]:
    """Return what is wrong with the built pages."""
    found = []
    for name in names:
        page = html / f"{name}.html"
        if not page.is_file():
            found.append(f"{name}: in _toc.yml but {page} was not made")
            continue
        text = page.read_text(encoding="utf-8")
        found += [f"{name}: would fetch from the network: {m[0][:160]}" for m in EXTERNAL.finditer(text)]
        if 'class="system-message"' in text:
            found.append(f"{name}: contains an error message of Sphinx")
        if 'http-equiv="refresh"' in text:
            found.append(
                f"{name}: is in _toc.yml, but `redirects` in _config.yml sends its readers elsewhere"
            )
    return found


class Links(HTMLParser):
    """What a page of HTML refers to, and the ids in it."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.ids = {"", "top"}  # these lead to the top of any page
        self.feed(file.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        """Take note of an element's id, or its name if it is an anchor, and of its addresses."""
        for name, value in attrs:
            if name == "id" or (tag, name) == ("a", "name"):
                self.ids.add(value or "")
            elif name in ("href", "src") or (tag, name) == ("object", "data"):
                self.links.append((value or "").strip())


def dead_links(html: Path) -> list[str]:
    """Return the links within the book that lead to no page, no file or no id of a page."""
    root = html.resolve()
    # The theme leaves templates among the static files.
    files = [file for file in sorted(root.rglob("*.html")) if "_static" not in file.relative_to(root).parts]
    read = {file: Links(file) for file in files}
    found = []
    for file, page in read.items():
        for link in dict.fromkeys(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            # A path from the root of the host leaves the book, which is in a folder.
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if target.is_dir():
                target /= "index.html"
            if not target.is_relative_to(root) or not target.is_file():
                found.append(f"{file.relative_to(root)}: {link}: no such file")
            elif target in read and unquote(parts.fragment) not in read[target].ids:
                found.append(f"{file.relative_to(root)}: {link}: {target.name} has no such id")
    return found


def build(out: Path, *options: str) -> int:
    """Run Jupyter Book on the whole book; return the exit status."""
    # Absolute: Jupyter Book looks for a relative table of contents beside the pages.
    command = [Path(sys.executable).with_name("jupyter-book"), "build", BOOK, "--path-output", out]
    command += ["--config", ROOT / "_config.yml", "--toc", ROOT / "_toc.yml", "--quiet", *options]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


def main() -> int:
    """Build; return the exit status."""
    start = time.perf_counter()
    # A build into an old folder can succeed on what an earlier build left there.
    shutil.rmtree(BOOK / "_build", ignore_errors=True)
    status = build(BOOK, "-W", "--keep-going")
    wrong = problems(HTML, pages()) + dead_links(HTML)
    for line in wrong:
        print(line, file=sys.stderr)
    if status or wrong:
        print("the book was NOT built cleanly; the first message above says why", file=sys.stderr)
        return status or 1
    print(f"{len(pages())} pages in {time.perf_counter() - start:.0f} s. Open {HTML / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
