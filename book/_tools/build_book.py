"""Build the book from scratch, and fail if any page is missing, broken or asks the network for something."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import yaml

import linkcheck
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

    def walk(node: object) -> list[str]:
        if isinstance(node, list):
            return [name for item in node for name in walk(item)]
        if isinstance(node, dict):
            own = [str(node[key]) for key in ("root", "file") if key in node]
            return own + [name for key in ("parts", "chapters", "sections") for name in walk(node.get(key))]
        return []

    return walk(yaml.safe_load(toc.read_text(encoding="utf-8")))


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
            found.append(f"{name}: holds an error message of Sphinx")
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
    wrong = problems(HTML, pages()) + linkcheck.internal(HTML)
    for line in wrong:
        print(line, file=sys.stderr)
    if status or wrong:
        print("the book was NOT built cleanly; the first message above says why", file=sys.stderr)
        return status or 1
    print(f"{len(pages())} pages in {time.perf_counter() - start:.0f} s. Open {HTML / 'index.html'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
