"""The repository's address stands in one place, and all its quotations agree with it."""

import re
import shutil
import tomllib
from pathlib import Path

import pytest
import yaml

import notebooks
from repository import ROOT, Repository, rewrite, tracked

HERE = Repository.of(ROOT)
QUOTED = {
    "github": r"github\.com/([\w-]+/[\w.-]+?)(?:\.git)?(?=[/\s\"'\\)\]>#]|$)",
    "raw": r"raw\.githubusercontent\.com/([\w-]+/[\w.-]+)",
    "colab": r"colab\.research\.google\.com/github/([\w-]+/[\w.-]+)",
    "binder": r"mybinder\.org/v2/gh/([\w-]+/[\w.-]+)",
}


def quotations(root: Path, kind: str) -> dict[str, set[str]]:
    """Map each tracked file to the repositories that it quotes, test files left out."""
    found = {}
    for file in tracked(ROOT):
        name = file.relative_to(ROOT)
        if name.parts[0] != "tests":
            slugs = set(re.findall(QUOTED[kind], (root / name).read_text(encoding="utf-8")))
            if slugs:
                found[str(name)] = slugs
    return found


@pytest.mark.parametrize("kind", ["colab", "binder"])
def test_every_launch_link_opens_this_repository(kind: str) -> None:
    for file, slugs in quotations(ROOT, kind).items():
        assert slugs == {HERE.slug}, f"{file} opens {slugs}; run make repo URL={HERE.url}"


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


def test_citation_and_package_have_one_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert str(citation["version"]) == project["version"]


@pytest.mark.parametrize("name", notebooks.chapters())
def test_setup_cells_install_from_the_address(name: str) -> None:
    assert notebooks.setup_is_current(name), "run: python book/_tools/notebooks.py setup"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    for file in tracked(ROOT):
        target = tmp_path / file.relative_to(ROOT)
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, target)
    return tmp_path


def test_moving_leaves_no_trace_and_can_be_undone(copy: Path) -> None:
    files = [copy / f.relative_to(ROOT) for f in tracked(ROOT)]
    before = {file: file.read_bytes() for file in files}
    # A capital, a dot and a digit: all are legal in a repository's name, and Pages has a lower-case host.
    # Not written as an address here, for this file is among those that are rewritten.
    there = Repository("Some-One", "another.book2")

    changed = rewrite(there, copy, files)

    assert {"pyproject.toml", "_config.yml", "README.md", "CITATION.cff"} <= {f.name for f in changed}
    assert Repository.of(copy) == there
    for file in files:
        text = file.read_text(encoding="utf-8")
        assert HERE.slug not in text, file
        assert HERE.pages not in text, file
    for kind in ("colab", "binder"):
        assert all(slugs == {there.slug} for slugs in quotations(copy, kind).values())
    for notebook in map(notebooks.read, copy.glob("book/*.ipynb")):
        setup = next(c for c in notebook.cells if "setup" in c.metadata.get("tags", []))
        assert setup.source == notebooks.setup_source(notebook, copy)

    rewrite(HERE, copy, files)

    assert {file: file.read_bytes() for file in files} == before


def test_moving_spares_names_that_only_begin_alike(copy: Path) -> None:
    file = copy / "note.md"
    longer = f"https://github.com/{HERE.slug}-fork https://{HERE.pages}-fork/"
    file.write_text(f"{longer} {HERE.url}.git {HERE.url}/issues")
    there = Repository("a", "b")
    rewrite(there, copy, [file])
    assert file.read_text() == f"{longer} https://github.com/a/b.git https://github.com/a/b/issues"


def test_pages_of_a_user_repository_have_no_folder() -> None:
    assert Repository("Ann", "ann.github.io").pages == "ann.github.io"
    assert Repository("Ann", "book").pages == "ann.github.io/book"


@pytest.mark.parametrize(
    "url", ["", "github.com/a/b", "https://gitlab.com/a/b", "https://github.com/a", "a/b"]
)
def test_other_addresses_are_refused(url: str) -> None:
    with pytest.raises(ValueError, match=r"https://github\.com/OWNER/NAME"):
        Repository.parse(url)


def test_common_spellings_are_accepted() -> None:
    expected = Repository("a", "b.c")
    assert Repository.parse("https://github.com/a/b.c") == expected
    assert Repository.parse("https://github.com/a/b.c/") == expected
    assert Repository.parse("https://github.com/a/b.c.git") == expected
