"""The repository's address: kept in ``[project.urls]`` of ``pyproject.toml``, quoted in many files."""

from __future__ import annotations

import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Repository:
    """A GitHub repository: every address that the project quotes follows from owner and name."""

    owner: str
    name: str

    @classmethod
    def of(cls, root: Path = ROOT) -> Repository:
        """Read the address that ``pyproject.toml`` under ``root`` gives."""
        project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
        url = project["urls"]["Repository"]
        match = re.fullmatch(r"https://github\.com/([\w-]+)/([\w.-]+)", url)
        if match is None:
            # Colab, Binder and GitHub Pages all need a repository on github.com.
            raise ValueError(f"{url!r} is not of the form https://github.com/OWNER/NAME")
        return cls(*match.groups())

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
        return f"{self.owner.lower()}.github.io/{self.name}"
