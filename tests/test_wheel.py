"""What is uploaded to PyPI: built by the build backend from this checkout, without a network."""

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path

import pytest

from repository import ROOT

VERSION = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
INFO = f"policyopt-{VERSION}.dist-info"


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return folder


@pytest.fixture(scope="module")
def wheel(built: Path) -> zipfile.ZipFile:
    return zipfile.ZipFile(built / f"policyopt-{VERSION}-py3-none-any.whl")


def sources() -> set[str]:
    files = (
        f.relative_to(ROOT / "src").as_posix() for f in (ROOT / "src").glob("policyopt*/**/*") if f.is_file()
    )
    return {f for f in files if "__pycache__" not in f}


def test_the_wheel_holds_the_two_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = {n for n in wheel.namelist() if not n.startswith(INFO)}
    assert names == sources()
    assert {"policyopt/py.typed", "policyopt_book/py.typed", "policyopt_book/figures.js"} <= names
    for model in ("addition-base", "news-base", "news-sft"):
        for file in ("model.safetensors", "config.json", "tokenizer.json"):
            assert f"policyopt_book/models/{model}/{file}" in names


def test_the_wheel_is_small(wheel: zipfile.ZipFile) -> None:
    sizes = {i.filename: i.file_size for i in wheel.infolist()}
    assert sum(i.compress_size for i in wheel.infolist()) < 4e6
    large = {
        name
        for name, size in sizes.items()
        if size > 2e5 and "/models/" not in name and "/studies/" not in name
    }
    assert large == set()


def metadata(wheel: zipfile.ZipFile) -> Message:
    return HeaderParser().parsestr(wheel.read(f"{INFO}/METADATA").decode("utf-8"))


def test_metadata(wheel: zipfile.ZipFile) -> None:
    told = metadata(wheel)
    assert told["Name"] == "policyopt"
    assert told["Version"] == VERSION
    assert told["License-Expression"] == "MIT"
    assert told["Description-Content-Type"] == "text/markdown"
    assert told["Requires-Python"] == ">=3.11"
    assert wheel.read(f"{INFO}/licenses/LICENSE") == (ROOT / "LICENSE").read_bytes()


def test_the_wheel_works_away_from_the_checkout(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Modules, version and tiny models come from the wheel: nothing reaches back for the repository."""
    wheel.extractall(tmp_path / "site")
    code = (
        "import pathlib, sys, policyopt, policyopt_book;"
        "files = [pathlib.Path(module.__file__) for module in (policyopt, policyopt_book, policyopt.losses)];"
        "assert all(file.is_relative_to(sys.argv[1]) for file in files), files;"
        "assert policyopt_book.load_model('news-sft', device='cpu').num_parameters == 180352;"
        "from policyopt_book import figures; figures.dpo_margin()._repr_html_();"
        "print(policyopt.__version__)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path / "site")],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site"), "PYTHONSAFEPATH": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == VERSION


def test_the_source_archive_holds_what_a_build_needs(built: Path) -> None:
    with tarfile.open(built / f"policyopt-{VERSION}.tar.gz") as archive:
        names = {n.partition("/")[2] for n in archive.getnames()}
        size = sum(m.size for m in archive.getmembers())
    top = {n for n in names if not n.startswith("src/")}
    assert top - {".gitignore"} == {
        "PKG-INFO",
        "pyproject.toml",
        *("LICENSE", "README.md", "CHANGELOG.md", "CITATION.cff"),
    }
    assert {n.removeprefix("src/") for n in names if n.startswith("src/")} == sources() | {"ruff.toml"}
    assert size < 6e6
