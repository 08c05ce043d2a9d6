"""One version everywhere, a changelog that a release can quote, and a site that keeps the books of old releases."""

import io
import json
import re
import shutil
import tarfile
import tomllib
from pathlib import Path

import pytest
import yaml

import drift
import linkcheck
import policyopt
import release
import versions
from repository import ROOT, Repository

CHANGELOG = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
ENTRIES = release.entries(CHANGELOG)


def test_one_version() -> None:
    version = release.project_version()
    assert release.VERSION.fullmatch(version)
    assert policyopt.__version__ == version, (
        "the installed package is older than pyproject.toml: make test mends that"
    )
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == version
    assert list(ENTRIES)[:2] == ["Unreleased", version]


def test_the_changelog_has_its_form() -> None:
    assert CHANGELOG.startswith("# Changelog\n")
    names = list(ENTRIES)
    assert names[0] == "Unreleased"
    numbers = [tuple(map(int, name.split("."))) for name in names[1:]]
    assert numbers == sorted(set(numbers), reverse=True)
    for i, (name, (date, text)) in enumerate(ENTRIES.items()):
        if i == 0:
            assert date == ""
        else:
            assert re.fullmatch(r"\d{4}-\d\d-\d\d", date) or (i == 1 and date == release.PENDING), name
            assert text, f"nothing is said of {name}"
    links = dict(re.findall(r"(?m)^\[([^\]]+)\]: (\S+)$", CHANGELOG))
    url = Repository.of(ROOT).url
    assert links.pop("Unreleased") == f"{url}/compare/v{names[1]}...HEAD"
    assert links == {name: f"{url}/releases/tag/v{name}" for name in names[1:]}


@pytest.fixture
def repo(tmp_path: Path) -> Path:
    """A repository whose version 0.1.0 waits for its release."""
    for name in ("pyproject.toml", "CITATION.cff"):
        text = (ROOT / name).read_text(encoding="utf-8")
        text = re.sub(r'(?m)^version = ".*"$', 'version = "0.1.0"', text)
        (tmp_path / name).write_text(re.sub(r"(?m)^version: .*$", "version: 0.1.0", text), encoding="utf-8")
    url = Repository.of(ROOT).url
    (tmp_path / "CHANGELOG.md").write_text(
        "# Changelog\n\n## [Unreleased]\n\n## [0.1.0] - not yet released\n\n- All of it.\n\n"
        f"[Unreleased]: {url}/compare/v0.1.0...HEAD\n[0.1.0]: {url}/releases/tag/v0.1.0\n"
    )
    return tmp_path


def add(repo: Path, line: str) -> None:
    file = repo / "CHANGELOG.md"
    file.write_text(file.read_text().replace("## [Unreleased]\n", f"## [Unreleased]\n\n{line}\n", 1))


def test_two_releases(repo: Path) -> None:
    assert any("no entry" in line for line in release.tag_problems("v0.1.0", repo))
    release.prepare("0.1.0", "2026-01-02", repo)
    assert release.tag_problems("v0.1.0", repo) == []
    with pytest.raises(ValueError, match="nothing under"):
        release.prepare("0.1.1", "2026-02-03", repo)
    add(repo, "- More.")
    release.prepare("0.2.0", "2026-03-04", repo)
    assert release.tag_problems("v0.2.0", repo) == []
    assert release.tag_problems("v0.1.0", repo) == [
        "the tag is v0.1.0, but pyproject.toml says version 0.2.0"
    ]
    text = (repo / "CHANGELOG.md").read_text()
    assert release.entries(text) == {
        "Unreleased": ("", ""),
        "0.2.0": ("2026-03-04", "- More."),
        "0.1.0": ("2026-01-02", "- All of it."),
    }
    assert "/compare/v0.2.0...HEAD\n" in text
    assert text.count("/releases/tag/") == 2
    assert yaml.safe_load((repo / "CITATION.cff").read_text())["version"] == "0.2.0"
    assert tomllib.loads((repo / "pyproject.toml").read_text())["project"]["version"] == "0.2.0"


@pytest.mark.parametrize(
    ("version", "words"),
    [
        ("1.0", "not of the form"),
        ("0.0.9", "older than 0.1.0"),
        ("0.1.0", "move what"),
        ("v0.2.0", "not of the form"),
    ],
)
def test_releases_that_are_refused_change_nothing(repo: Path, version: str, words: str) -> None:
    add(repo, "- Something new.")
    before = {file: file.read_bytes() for file in repo.iterdir()}
    with pytest.raises(ValueError, match=words):
        release.prepare(version, "2026-01-02", repo)
    assert {file: file.read_bytes() for file in repo.iterdir()} == before


def test_a_released_version_is_not_released_again(repo: Path) -> None:
    release.prepare("0.1.0", "2026-01-02", repo)
    with pytest.raises(ValueError, match="was released on 2026-01-02"):
        release.prepare("0.1.0", "2026-01-03", repo)


PAGE = (
    '<html><head></head><body class="x">\n<div id="pst-skip-link"><a href="#">Skip</a></div><a href="b.html">b</a>'
    '<div class="extra_footer">\n  Text: CC BY.\n</div></body></html>'
)


@pytest.fixture
def books(tmp_path: Path) -> tuple[Path, Path]:
    """The book of main, with pages that the releases lack and the other way round, and three archives."""
    main, archives = tmp_path / "main", tmp_path / "releases"
    archives.mkdir()
    for version, pages in (
        ("main", ("index", "b", "api/c", "new")),
        ("0.1.9", ("index", "b", "old")),
        ("0.1.10", ("index", "b", "api/c", "old")),
        ("0.2.0", ("index", "b")),
    ):
        folder = main if version == "main" else tmp_path / version
        for page in pages:
            file = folder / f"{page}.html"
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(PAGE.replace('"b.html"', '"../b.html"') if "/" in page else PAGE)
        (folder / "sitemap.xml").write_text(version)
        (folder / "_static").mkdir()
        (folder / "_static" / "template.html").write_text(PAGE)
        if version != "main":
            with tarfile.open(archives / f"policyopt-book-{version}.tar.gz", "w:gz") as archive:
                archive.add(folder, ".")
    return main, archives


def test_the_site_holds_main_and_the_last_patch_of_each_release(
    books: tuple[Path, Path], tmp_path: Path
) -> None:
    site = tmp_path / "site"
    assert versions.main([str(books[1]), str(site), "--html", str(books[0])]) == 0
    assert json.loads((site / "versions.json").read_text()) == [
        {"version": "main", "path": ""},
        {"version": "0.2.0", "path": "v0.2/"},
        {"version": "0.1.10", "path": "v0.1/"},
    ]
    assert (site / "v0.1" / "api" / "c.html").is_file(), "0.1.10 is later than 0.1.9"
    assert [p.relative_to(site).as_posix() for p in site.rglob("sitemap.xml")] == ["sitemap.xml"]
    assert linkcheck.internal(site) == []


def test_pages_say_which_version_they_are(books: tuple[Path, Path], tmp_path: Path) -> None:
    site = tmp_path / "site"
    versions.assemble(*books, site)
    text = (site / "api" / "c.html").read_text()
    assert "version-note" not in text
    assert 'CC BY. Versions: <strong>main</strong>, <a href="../v0.2/index.html">0.2.0</a>, ' in text
    assert '<a href="../v0.1/api/c.html">0.1.10</a>.' in text
    text = (site / "v0.1" / "api" / "c.html").read_text()
    assert text.count("This is version 0.1.10 of the book") == 1
    assert text.index("Skip") < text.index("version-note") < text.index("b.html")
    assert '<a href="../../api/c.html" style' in text
    assert 'Versions: <a href="../../api/c.html">main</a>, <a href="../../v0.2/index.html">0.2.0</a>' in text
    assert '<a href="../index.html" style' in (site / "v0.1" / "old.html").read_text(), "gone from main"
    assert (site / "v0.1" / "_static" / "template.html").read_text() == PAGE


def test_before_the_first_release_the_site_is_the_book(books: tuple[Path, Path], tmp_path: Path) -> None:
    shutil.rmtree(books[1])
    books[1].mkdir()
    versions.assemble(*books, tmp_path / "site")
    assert (tmp_path / "site" / "index.html").read_text() == PAGE


def test_what_is_no_archive_of_a_book_is_refused(books: tuple[Path, Path], tmp_path: Path) -> None:
    (books[1] / "policyopt-book-0.3.tar.gz").touch()
    with pytest.raises(ValueError, match=r"0\.3\.tar\.gz is not named"):
        versions.assemble(*books, tmp_path / "site")
    assert not (tmp_path / "site").exists()


def test_the_footer_of_the_book_has_room_for_the_versions() -> None:
    if not (versions.HTML / "mdp.html").is_file():
        pytest.skip("no book built")
    assert '<div class="extra_footer">' in (versions.HTML / "mdp.html").read_text(encoding="utf-8")


PINS = """# comment
numpy==2.0.0 ; python_version >= "3.11"
numpy==1.0.0 ; python_version < "3.11"
torch==2.13.0
    # via x
jupyter-book==1.0.4.post1
PyYAML==6.0
"""


def test_drift_is_what_differs_from_the_pins() -> None:
    installed = (
        "numpy==2.1.0\ntorch==2.13.0+cpu\njupyter_book==1.0.5\npyyaml==6.0\npip==26\nnewcomer==1\n-e git+x\n"
    )
    assert drift.changes(PINS, installed) == [
        ("jupyter_book", "1.0.4.post1", "1.0.5"),
        ("newcomer", "-", "1"),
        ("numpy", "2.0.0", "2.1.0"),
    ]


def test_drift_report(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    good, bad = tmp_path / "good.log", tmp_path / "bad.log"
    good.write_text("fine\n")
    bad.write_text("".join(f"\x1b[31mline {i}\x1b[0m\n" for i in range(500)))
    monkeypatch.setattr("sys.stdin", io.StringIO())
    assert (
        drift.main([f"quick=success:{good}", f"book=failure:{bad}", f"links=skipped:{tmp_path}/no.log"]) == 1
    )
    told = capsys.readouterr().out
    assert "- quick: **success**\n- book: **failure**\n- links: **skipped**\n" in told
    assert "fine" not in told
    assert "\nline 499\n~~~" in told
    assert "line 400\n" not in told
    assert drift.main([f"quick=success:{good}"]) == 0
    assert drift.main(["quick"]) == 2


def test_drift_report_fits_an_issue() -> None:
    steps = dict.fromkeys("abcde", ("failure", ("x" * 1000 + "\n") * 1000))
    table = [("a-package-with-a-long-name", "1.22.333", "4.55.666")] * 300
    assert len(drift.report(steps, table)) < 65536
