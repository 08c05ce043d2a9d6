"""The structure of the book: what can be checked without running a chapter."""

import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest
from markdown_it import MarkdownIt
from nbformat import NotebookNode

import notebooks
from build_book import EXTERNAL, pages, problems
from repository import ROOT

BOOK = ROOT / "book"
CHAPTERS = notebooks.chapters()
PAGES = pages()
MYST_ONLY = {
    "directive": r"^\s*(?:```+|~~~+|:::+)\s*\{",
    "colon fence": r"^\s*:::",
    "role": r"\{[a-z][\w:-]*\}`",
    "target": r"^\([\w-]+\)=\s*$",
    "comment": r"^%\s",
    "substitution": r"\{\{.*\}\}",
}
FENCED = re.compile(r"(?ms)^([ \t]*)(```+|~~~+).*?^\1?\s*\2[ \t]*$")
CODE_SPAN = re.compile(r"(?s)(?<!`)(`+)(?!`).+?(?<!`)\1(?!`)")


def source_of(page: str) -> Path:
    found = [path for path in (BOOK / f"{page}.ipynb", BOOK / f"{page}.md") if path.is_file()]
    assert len(found) == 1, f"_toc.yml names {page}: {found or 'no such page'}"
    return found[0]


def cells(name: str, kind: str) -> list[NotebookNode]:
    return [c for c in notebooks.read(notebooks.notebook_path(name)).cells if c.cell_type == kind]


def markdown_of(path: Path) -> list[str]:
    """Return the Markdown of a page, one text per cell."""
    if path.suffix == ".ipynb":
        return [c.source for c in cells(path.stem, "markdown")]
    return [path.read_text(encoding="utf-8")]


def without_code(text: str) -> str:
    return CODE_SPAN.sub(" ", FENCED.sub("", text))


def links(path: Path) -> Iterator[str]:
    parser = MarkdownIt("commonmark").enable("table")
    for text in markdown_of(path):
        for token in parser.parse(text):
            for child in token.children or []:
                if child.type in ("link_open", "image"):
                    yield str(child.attrs["href" if child.type == "link_open" else "src"])
        yield from re.findall(r"""<a\s[^>]*href=["']([^"']+)""", text)


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page: those of its headings, spelled as GitHub and MyST do, and explicit ones."""
    found: dict[str, int] = {}
    parser = MarkdownIt("commonmark")
    explicit: set[str] = set()
    for text in markdown_of(path):
        tokens = parser.parse(text)
        for opening, inline in pairwise(tokens):
            if opening.type == "heading_open":
                title = "".join(c.content for c in inline.children or [] if c.type in ("text", "code_inline"))
                slug = re.sub(r"[^\w\- ]", "", title.lower().strip()).replace(" ", "-")
                found[slug] = found.get(slug, -1) + 1
        explicit |= set(re.findall(r"""\b(?:id|name)=["']([^"']+)""", text))
        explicit |= set(re.findall(r"(?m)^\(([\w-]+)\)=", text))
    numbered = {slug if i == 0 else f"{slug}-{i}" for slug, n in found.items() for i in range(n + 1)}
    return numbered | explicit


def test_the_table_of_contents_names_each_page_once() -> None:
    assert len(PAGES) == len(set(PAGES))
    for page in PAGES:
        source_of(page)


def test_every_page_is_in_the_table_of_contents() -> None:
    sources = {p.relative_to(BOOK).with_suffix("").as_posix() for p in BOOK.rglob("*.ipynb")}
    sources |= {p.relative_to(BOOK).with_suffix("").as_posix() for p in BOOK.rglob("*.md")}
    hidden = {s for s in sources if s.startswith(("_", "twins/", "studies/")) or "/." in f"/{s}"}
    assert sources - hidden == set(PAGES)


@pytest.mark.parametrize("name", notebooks.pairs())
def test_notebook_and_twin_agree(name: str) -> None:
    assert notebooks.pair_problems(name) == ""


@pytest.mark.parametrize("name", CHAPTERS)
def test_every_cell_was_executed_in_order_without_error(name: str) -> None:
    problems = [notebooks.committed_problem(c, i) for i, c in enumerate(cells(name, "code"), start=1)]
    assert [p for p in problems if p] == []


@pytest.mark.parametrize("name", CHAPTERS)
def test_notebook_is_in_its_normal_form(name: str) -> None:
    """No metadata of an editor or a machine, and ids that follow from the text."""
    path = notebooks.notebook_path(name)
    expected = notebooks.nbformat.writes(notebooks.normalise(notebooks.read(path))) + "\n"
    assert path.read_text(encoding="utf-8") == expected, f"run: make execute NAMES={name}"


@pytest.mark.parametrize("name", CHAPTERS)
def test_pictures_have_a_text_alternative(name: str) -> None:
    for cell in cells(name, "code"):
        if any(mime.startswith("image/") for out in cell.outputs for mime in out.get("data", {})):
            alt = cell.metadata.get("mystnb", {}).get("image", {}).get("alt", "")
            assert len(alt) >= 20, f"mystnb.image.alt says too little ({alt!r}) about:\n{cell.source}"


@pytest.mark.parametrize("name", CHAPTERS)
def test_outputs_ask_nothing_of_the_network(name: str) -> None:
    for cell in cells(name, "code"):
        for out in cell.outputs:
            html = out.get("data", {}).get("text/html", "")
            assert EXTERNAL.search(html) is None, cell.source


@pytest.mark.parametrize("name", CHAPTERS)
def test_chapters_are_plain_markdown(name: str) -> None:
    """GitHub, Colab and Jupyter show MyST's own syntax as it is written."""
    for cell in cells(name, "markdown"):
        for kind, pattern in MYST_ONLY.items():
            text = cell.source if kind in ("directive", "colon fence") else without_code(cell.source)
            match = re.search(pattern, re.sub(r"(?s)\$\$.*?\$\$|\$[^$\n]*\$", "", text), re.M)
            assert match is None, f"MyST {kind}: {match and match[0]!r} in\n{cell.source}"


@pytest.mark.parametrize("page", PAGES)
def test_formulas_are_closed(page: str) -> None:
    for text in markdown_of(source_of(page)):
        plain = without_code(text).replace(r"\$", "")
        blocks = plain.split("$$")
        assert len(blocks) % 2 == 1, f"an odd number of $$ in\n{text}"
        for formula in blocks[1::2]:
            opened = re.findall(r"\\begin\{([\w*]+)\}", formula)
            assert sorted(opened) == sorted(re.findall(r"\\end\{([\w*]+)\}", formula)), formula
            braces = re.sub(r"\\[{}\\]", "", formula)
            assert braces.count("{") == braces.count("}"), formula
            assert len(re.findall(r"\\left\b", formula)) == len(re.findall(r"\\right\b", formula)), formula
        for prose in blocks[0::2]:
            for paragraph in re.split(r"\n\s*\n", prose):
                assert paragraph.count("$") % 2 == 0, f"an odd number of $ in\n{paragraph}"


@pytest.mark.parametrize("name", CHAPTERS)
def test_equation_numbers_are_unique(name: str) -> None:
    text = "\n".join(c.source for c in cells(name, "markdown"))
    tags = re.findall(r"\\tag\{([^}]*)\}", text)
    assert len(tags) == len(set(tags)), tags


@pytest.mark.parametrize("name", CHAPTERS)
def test_hidden_answers_are_closed(name: str) -> None:
    for cell in cells(name, "markdown"):
        for tag in ("details", "summary"):
            assert cell.source.count(f"<{tag}") == cell.source.count(f"</{tag}>"), cell.source


@pytest.mark.parametrize("page", PAGES)
def test_internal_links_lead_somewhere(page: str) -> None:
    source = source_of(page)
    for link in links(source):
        if re.match(r"[a-z][a-z+.-]*:|//", link):
            continue
        file, _, anchor = unquote(link).partition("#")
        target = (source.parent / file).resolve() if file else source
        assert target.is_file(), f"{source.name} links to {link}, which does not exist"
        if anchor and target.suffix in (".md", ".ipynb"):
            assert anchor in anchors(target), (
                f"{source.name} links to {link}; {target.name} has no such heading"
            )


def test_the_api_pages_cover_every_public_module() -> None:
    documented = {
        module if module == "policyopt_book" else ".".join(module.split(".")[:2])
        for path in (BOOK / "api").glob("*.md")
        for module in re.findall(r"module-api:: (policyopt[\w.]+)", path.read_text())
    }
    public = {"policyopt_book"}
    for package in (ROOT / "src" / "policyopt", ROOT / "src" / "policyopt_book"):
        modules = [p.stem for p in package.glob("*.py")] + [
            p.parent.name for p in package.glob("*/__init__.py")
        ]
        public |= {f"{package.name}.{name}" for name in modules if not name.startswith("_")}
    public.discard("policyopt_book.make_models")  # the script behind `make models`
    assert documented == public


def test_a_build_that_lacks_a_page_or_needs_the_network_is_refused(tmp_path: Path) -> None:
    (tmp_path / "sound.html").write_text('<img src="a.png"><a href="https://example.org">elsewhere</a>')
    (tmp_path / "script.html").write_text('<script async src="https://example.org/x.js"></script>')
    (tmp_path / "style.html").write_text('<link href="//example.org/x.css" rel="stylesheet">')
    (tmp_path / "broken.html").write_text('<aside class="system-message">')
    (tmp_path / "moved.html").write_text('<meta http-equiv="refresh" content="0; url=sound.html">')
    assert problems(tmp_path, ["sound"]) == []
    for page in ("missing", "script", "style", "broken", "moved"):
        assert len(problems(tmp_path, ["sound", page])) == 1, page


@pytest.mark.parametrize("name", notebooks.chapters())
def test_a_slider_of_colab_can_write_over_what_it_sets(name: str) -> None:
    """Colab writes all that is right of the first ``=``: in ``SEEDS = DEFAULT = 5`` it would lose ``DEFAULT``."""
    for cell in notebooks.read(notebooks.notebook_path(name)).cells:
        for line in cell.source.splitlines() if cell.cell_type == "code" else ():
            if "# @param" in line:
                assert re.match(r"\w+ = [^=]+ # @param ", line), line
            if re.match(r".*\bDEFAULT\w* =(?!=)", line):
                assert re.fullmatch(r"DEFAULT\w* = \d+( *#.*)?", line), line
