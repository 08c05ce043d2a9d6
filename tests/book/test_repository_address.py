"""The repository's address is kept in one place, and all its quotations agree with it; so with the version."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest
import yaml

import notebooks
import policyopt
from repository import ROOT, Repository

HERE = Repository.of(ROOT)
QUOTED = {
    "github": r"github\.com/([\w-]+/[\w.-]+?)(?:\.git)?(?=[/\s\"'\\)\]>#]|$)",
    "raw": r"raw\.githubusercontent\.com/([\w-]+/[\w.-]+)",
    "colab": r"colab\.research\.google\.com/github/([\w-]+/[\w.-]+)",
    "binder": r"mybinder\.org/v2/gh/([\w-]+/[\w.-]+)",
}
CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def tracked() -> list[Path]:
    """Return the text files that git tracks, or would with the next ``git add .``; without the tests."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split("\0")
    files = [ROOT / name for name in sorted({*names}) if name and not name.startswith("tests/")]
    return [f for f in files if f.is_file() and b"\0" not in f.read_bytes()[:8192]]


@pytest.mark.parametrize("kind", ["colab", "binder"])
def test_every_launch_link_opens_this_repository(kind: str) -> None:
    found = {f: set(re.findall(QUOTED[kind], f.read_text(encoding="utf-8"))) for f in tracked()}
    quoting = {f: slugs for f, slugs in found.items() if slugs}
    assert ROOT / "README.md" in quoting
    for file, slugs in quoting.items():
        assert slugs == {HERE.slug}, f"{file} opens {slugs} instead of {HERE.slug}"


def test_the_files_that_must_quote_the_address_do() -> None:
    config = yaml.safe_load((ROOT / "_config.yml").read_text())
    assert config["repository"]["url"] == HERE.url
    assert config["html"]["baseurl"] == f"https://{HERE.pages}/"
    assert config["sphinx"]["config"]["ogp_site_url"] == f"https://{HERE.pages}/"
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["repository-code"] == HERE.url
    assert citation["url"] == f"https://{HERE.pages}/"
    readme = (ROOT / "README.md").read_text()
    assert HERE.slug in set(re.findall(QUOTED["github"], readme))
    assert HERE.pages in readme


@pytest.mark.parametrize("name", notebooks.chapters())
def test_setup_cells_install_from_the_address(name: str) -> None:
    assert notebooks.setup_is_current(name), "run: python book/_tools/notebooks.py setup"


@pytest.mark.parametrize("url", ["", "github.com/a/b", "https://gitlab.com/a/b", "https://github.com/a"])
def test_other_addresses_are_refused(tmp_path: Path, url: str) -> None:
    (tmp_path / "pyproject.toml").write_text(f'[project.urls]\nRepository = "{url}"\n')
    with pytest.raises(ValueError, match=r"https://github\.com/OWNER/NAME"):
        Repository.of(tmp_path)


def test_one_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert policyopt.__version__ == version, "the installed package is older: make test reinstalls it"
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == version
    headings = re.findall(r"(?m)^## \[(.+?)\](?: - (.+))?$", CHANGELOG)
    assert [name for name, _ in headings[:2]] == ["Unreleased", version]
    for _, date in headings[2:]:
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", date)
    links = dict(re.findall(r"(?m)^\[([^\]]+)\]: (\S+)$", CHANGELOG))
    assert links.pop("Unreleased") == f"{HERE.url}/compare/v{version}...HEAD"
    assert links == {name: f"{HERE.url}/releases/tag/v{name}" for name, _ in headings[1:]}
