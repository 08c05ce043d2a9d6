"""The repository's address: kept once, in ``[project.urls]`` of ``pyproject.toml``; quoted in many files.

``python book/_tools/repository.py URL`` writes a new address there and rewrites each quotation of the old one
(web pages, Colab and Binder links, badges, the notebooks' setup cells) in every file that git tracks.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
BRANCH = "main"


@dataclass(frozen=True)
class Repository:
    """A GitHub repository: every address that the project quotes follows from owner and name."""

    owner: str
    name: str

    @classmethod
    def parse(cls, url: str) -> Repository:
        """Read ``https://github.com/OWNER/NAME`` (a trailing ``/`` or ``.git`` is dropped)."""
        match = re.fullmatch(r"https://github\.com/([\w-]+)/([\w.-]+?)(?:\.git)?/?", url)
        if match is None:
            raise ValueError(
                f"URL={url!r} is not of the form https://github.com/OWNER/NAME; "
                "Colab, Binder and GitHub Pages all need a repository on github.com"
            )
        return cls(*match.groups())

    @classmethod
    def of(cls, root: Path = ROOT) -> Repository:
        """Read the address that ``pyproject.toml`` under ``root`` holds."""
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        return cls.parse(project["urls"]["Repository"])

    @property
    def slug(self) -> str:
        """``OWNER/NAME``."""
        return f"{self.owner}/{self.name}"

    @property
    def url(self) -> str:
        """The repository's page."""
        return f"https://github.com/{self.slug}"

    @property
    def pages(self) -> str:
        """Where GitHub Pages serves the book, without the protocol and the last slash."""
        host = f"{self.owner.lower()}.github.io"
        return host if self.name.lower() == host else f"{host}/{self.name}"

    def colab(self, page: str) -> str:
        """Address that opens ``page`` (a path below the repository's root) in Colab."""
        return f"https://colab.research.google.com/github/{self.slug}/blob/{BRANCH}/{page}"

    def quotations(self) -> re.Pattern[str]:
        """Match the address wherever it is quoted: slugs behind a known host, and the book's pages."""
        hosts = r"(?<=github\.com/)|(?<=githubusercontent\.com/)|(?<=/github/)|(?<=/gh/)"
        slug, pages = re.escape(self.slug), re.escape(self.pages)
        return re.compile(rf"(?P<slug>(?:{hosts}){slug}(?![\w-]))|(?P<pages>\b{pages}(?![\w-]))")


def tracked(root: Path) -> list[Path]:
    """Return the text files under ``root`` that git tracks, or would with the next ``git add .``."""
    command = ["git", "-C", str(root), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    files = sorted({root / name for name in names if name})
    return [f for f in files if f.is_file() and b"\0" not in f.read_bytes()[:8192]]


def rewrite(new: Repository, root: Path, files: list[Path]) -> list[Path]:
    """Replace the present address by ``new`` in ``files``; return those that changed."""
    old = Repository.of(root)
    pattern = old.quotations()
    changed = []
    for file in files:
        # Bytes, not text mode: line endings must survive.
        text = file.read_bytes().decode("utf-8")
        result = pattern.sub(lambda m: new.slug if m["slug"] else new.pages, text)
        if result != text:
            file.write_bytes(result.encode("utf-8"))
            changed.append(file)
    return changed


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(description="Change the repository's address everywhere.")
    parser.add_argument("url", help="https://github.com/OWNER/NAME")
    url = parser.parse_args(argv).url
    try:
        new = Repository.parse(url)
    except ValueError as error:
        parser.error(str(error))
    changed = rewrite(new, ROOT, tracked(ROOT))
    for file in changed:
        print(file.relative_to(ROOT))
    print(f"{len(changed)} files changed; all point to {new.url}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
