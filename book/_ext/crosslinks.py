"""Links between the chapters, the API pages and the list of references. Rendered pages only: no notebook is changed.

- Each function and class on an API page says which chapters use it, and where its source is shown.
- Each chapter ends with what it uses of the packages under ``src``, linked to the API pages.
- Each entry of the list of references says which pages list it or link to it.
- The directive ``citation`` says how to cite the book, from ``CITATION.cff``.

The links are put in when a page is written, so they are right only if all pages are: ``make book`` starts from nothing.
"""

from __future__ import annotations

import ast
import importlib
import inspect
import json
import re
import warnings
from collections.abc import Collection, Iterable, Mapping
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from pybtex.database import parse_file
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

import bookfix

ROOT = bookfix.ROOT
PACKAGES = tuple(sorted(file.parent.name for file in ROOT.glob("src/*/__init__.py")))
DOCUMENTED = ("function", "class", "exception", "data")
SECTION = "From the package"
ARXIV = re.compile(r"(?<![\d.])(\d{4}\.\d{5})(?!\d)")
DOI = re.compile(r"\b(10\.\d{4,9}/[^\s\"'<>)\],;]*[^\s\"'<>)\],;.:])")
Definition = tuple[str, str]  # module and name

# --- what the chapters use -------------------------------------------------------------------------------------


@cache
def resolve(dotted: str) -> Definition | None:
    """Follow a dotted name to where it is defined: through re-exports, and from a method to its class."""
    parts = dotted.split(".")
    for length in range(len(parts) - 1, 0, -1):
        try:
            module = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        with warnings.catch_warnings(action="ignore", category=DeprecationWarning):
            found = getattr(module, parts[length], None)  # an old name leads to the new one
        if found is None or inspect.ismodule(found):
            return None
        home, name = getattr(found, "__module__", None) or "", getattr(found, "__qualname__", "")
        return (home, name) if name and home.split(".")[0] in PACKAGES else (module.__name__, parts[length])
    return None


class Uses(ast.NodeVisitor):
    """Collect what code uses of the packages: ``found`` maps it to whether ``show_source`` shows it."""

    def __init__(self) -> None:
        self.aliases: dict[str, str] = {}
        self.found: dict[Definition, bool] = {}

    def visit_Import(self, node: ast.Import) -> None:
        """Remember ``import package.module as name``."""
        for alias in node.names:
            top = alias.name.split(".")[0]
            if top in PACKAGES:
                self.aliases[alias.asname or top] = alias.name if alias.asname else top

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        """Remember ``from package.module import name``."""
        if (node.module or "").split(".")[0] in PACKAGES:
            self.aliases |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}

    def visit_Name(self, node: ast.Name) -> None:
        """Count the use of an imported name."""
        if isinstance(node.ctx, ast.Load):
            self._count(node)

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Count ``module.name``; what follows the name of a definition belongs to it."""
        if not self._count(node):
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """Take note of ``show_source(name)``."""
        self.generic_visit(node)
        called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if called == "show_source" and node.args:
            self._count(node.args[0], shown=True)

    def _dotted(self, node: ast.AST) -> str:
        if isinstance(node, ast.Attribute):
            before = self._dotted(node.value)
            return before and f"{before}.{node.attr}"
        return self.aliases.get(node.id, "") if isinstance(node, ast.Name) else ""

    def _count(self, node: ast.AST, *, shown: bool = False) -> bool:
        definition = resolve(self._dotted(node))
        if definition is not None:
            self.found[definition] = self.found.get(definition, False) or shown
        return definition is not None


def code_cells(notebook: Mapping[str, Any]) -> list[str]:
    """Return the sources of the code cells, without the cell that installs the package and without magics."""
    found = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        run = cell["cell_type"] == "code" and "setup" not in cell["metadata"].get("tags", [])
        if run and not source.lstrip().startswith("%%"):
            found.append(re.sub(r"(?m)^([ \t]*)[%!].*$", r"\1pass", source))
    return found


def uses(cells: Iterable[str]) -> dict[Definition, bool]:
    """Return what code uses of the packages, and whether it shows its source."""
    visitor = Uses()
    for source in cells:
        visitor.visit(ast.parse(source))
    return visitor.found


# --- what the chapters and the packages cite -------------------------------------------------------------------


def reference_items(notebook: Mapping[str, Any]) -> list[str]:
    """Return the items of the list under a chapter's heading *References*."""
    text = "\n\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown")
    sections = re.findall(r"(?ms)^## References\s*$(.*?)(?=^## |\Z)", text)
    return [item for section in sections for item in re.findall(r"(?m)^[-*] +(.+)$", section)]


def identifiers(text: str) -> set[str]:
    """Return the arXiv ids and DOIs in a text."""
    return {i.lower() for pattern in (ARXIV, DOI) for i in pattern.findall(text)}


class Bibliography:
    """The entries of a .bib file, to be found by identifier, address or title."""

    def __init__(self, path: Path) -> None:
        self.entries = parse_file(str(path), "bibtex").entries
        fields = {key: entry.fields for key, entry in self.entries.items()}
        names = ("eprint", "doi", "url")
        self._by_id = {f[name].lower(): key for key, f in fields.items() for name in names if name in f}
        self._titles = {self._letters(f["title"]): key for key, f in fields.items()}

    @staticmethod
    def _letters(text: str) -> str:
        return re.sub(r"[^a-z0-9]", "", text.lower())

    def cited(self, text: str) -> set[str]:
        """Return the entries whose arXiv id, DOI or linked address is in a text."""
        links = {url.lower() for url in re.findall(r"\((https?://[^)\s]+)\)", text)}
        return {self._by_id[i] for i in (identifiers(text) | links) & self._by_id.keys()}

    def identify(self, item: str) -> str | None:
        """Return the entry that an item of a list of references is about: by identifier, address or title."""
        letters = self._letters(item)
        keys = self.cited(item) or {key for title, key in self._titles.items() if title in letters}
        return keys.pop() if len(keys) == 1 else None


class Book:
    """What the chapters use and cite, and what the packages cite."""

    def __init__(self, pages: Path, source: Path) -> None:
        self.source = source
        read = {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in pages.glob("*.ipynb")}
        self.notebooks = dict(sorted(read.items()))
        self.uses = {name: uses(code_cells(notebook)) for name, notebook in self.notebooks.items()}
        self.bibliography = Bibliography(pages / "references.bib")
        texts = {file.stem: file.read_text(encoding="utf-8") for file in pages.glob("*.md")}
        self.citing_pages = {name: self.bibliography.cited(text) for name, text in sorted(texts.items())}

    @cached_property
    def citing_chapters(self) -> dict[str, set[str]]:
        """The chapters that list each work, by its key."""
        found: dict[str, set[str]] = {}
        for name, notebook in self.notebooks.items():
            for item in reference_items(notebook):
                found.setdefault(self.bibliography.identify(item) or "", set()).add(name)
        return found

    @cached_property
    def citing_code(self) -> dict[str, list[tuple[Definition, Path, int]]]:
        """The places of the packages that cite each work, by its key: what is defined there, file and line."""
        found: dict[str, list[tuple[Definition, Path, int]]] = {}
        for file in sorted(self.source.rglob("*.py")):
            text = file.read_text(encoding="utf-8")
            if not self.bibliography.cited(text):
                continue
            module = ".".join(file.relative_to(self.source).with_suffix("").parts).removesuffix(".__init__")
            spans = [(n.lineno, n.end_lineno, n.name) for n in ast.parse(text).body if hasattr(n, "name")]
            for number, line in enumerate(text.splitlines(), start=1):
                name = next((name for first, last, name in spans if first <= number <= last), "")
                for key in self.bibliography.cited(line):
                    found.setdefault(key, []).append(((module, name), file, number))
        return found


@cache
def book() -> Book:
    """Return this book; read once per build."""
    return Book(ROOT / "book", ROOT / "src")


# --- pages -----------------------------------------------------------------------------------------------------


class Links:
    """The links of a page that is about to be written."""

    def __init__(self, app: Sphinx, page: str) -> None:
        self.app, self.env, self.page = app, app.env, page

    def to_page(self, page: str) -> nodes.reference:
        """Link to a page by its title."""
        uri = self.app.builder.get_relative_uri(self.page, page)
        return nodes.reference("", self.env.titles[page].astext(), refuri=uri, internal=True)

    def in_order(self, pages: Collection[str]) -> list[str]:
        """Sort pages as the table of contents does."""
        return [page for page in self.env.collect_relations() if page in pages]

    @cached_property
    def entries(self) -> dict[Definition | None, Any]:
        """Where each definition is documented."""
        objects = self.env.get_domain("py").objects  # type: ignore[attr-defined]
        return {resolve(name): item for name, item in objects.items() if item.objtype in DOCUMENTED}

    def to_entry(self, definition: Definition) -> tuple[str, nodes.Node] | None:
        """Return the name under which a definition is documented, and a link to that entry; None without one."""
        entry = self.entries.get(definition)
        if entry is None:
            return None
        uri = f"{self.app.builder.get_relative_uri(self.page, entry.docname)}#{entry.node_id}"
        return entry.node_id, _code_link(definition[1], uri, internal=True)

    def to_source(self, definition: Definition) -> tuple[str, nodes.Node]:
        """Return the full name of a definition, and a link to its source; for a value, to the line that sets it."""
        module, name = definition
        uri = bookfix.link_source("py", {"module": module, "fullname": name})
        if uri is None:
            file = Path(inspect.getfile(importlib.import_module(module)))
            lines = enumerate(file.read_text(encoding="utf-8").splitlines(), start=1)
            first = next((i for i, line in lines if line.startswith(name)), 1)
            uri = bookfix.source_address(file.relative_to(ROOT), first)
        return f"{module}.{name}", _code_link(name, uri, internal=False)


def _code_link(text: str, uri: str, *, internal: bool) -> nodes.reference:
    return nodes.reference("", "", nodes.literal("", text), refuri=uri, internal=internal)


def _listed(lead: nodes.Node, parts: Iterable[list[nodes.Node]], kind: str = "") -> nodes.paragraph:
    listed = [node for part in parts for node in (nodes.Text(", "), *part)][1:]
    return nodes.paragraph("", "", lead, nodes.Text(": "), *listed, classes=[kind] if kind else [])


def add_links(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Put the links into a page that is about to be written."""
    if app.builder.format == "html":
        links = Links(app, page)
        add_chapters_to_api(links, doctree)
        if page in book().uses:
            add_api_to_chapter(links, doctree)
        if page == "references":
            add_pages_to_references(links, doctree)


def add_chapters_to_api(links: Links, doctree: nodes.document) -> None:
    """Say below each function and class which chapters use it."""
    for description in list(doctree.findall(addnodes.desc)):
        if description.get("domain") != "py" or description.get("objtype") not in DOCUMENTED:
            continue
        signature, content = description.children[0], description.children[-1]
        definition = resolve(f"{signature.get('module')}.{signature.get('fullname')}")
        chapters = {name: found[definition] for name, found in book().uses.items() if definition in found}
        if chapters:
            shown = {True: [nodes.Text(" (source shown)")], False: []}
            named = [[links.to_page(name), *shown[chapters[name]]] for name in links.in_order(chapters)]
            # Before the members of a class, which may be many.
            members = (
                i for i, child in enumerate(content) if isinstance(child, addnodes.index | addnodes.desc)
            )
            content.insert(next(members, len(content)), _listed(nodes.Text("Used in"), named, "used-in"))


def add_api_to_chapter(links: Links, doctree: nodes.document) -> None:
    """End a chapter with what it uses of the packages."""
    modules: dict[str, dict[str, nodes.Node]] = {}
    for definition in book().uses[links.page]:
        name, link = links.to_entry(definition) or links.to_source(definition)
        modules.setdefault(name.rpartition(".")[0], {})[definition[1].lower()] = link
    if not modules:
        return
    items = []
    for module, found in sorted(modules.items()):
        line = _listed(nodes.literal("", module), ([link] for _, link in sorted(found.items())))
        items.append(nodes.list_item("", line))
    lead = (
        "What this chapter uses. A name leads to its description, and from there to its source; "
        "helpers without a description lead to the source at once."
    )
    top = next(child for child in doctree.children if isinstance(child, nodes.section))
    top += nodes.section(
        "",
        nodes.title("", SECTION),
        nodes.paragraph("", lead),
        nodes.bullet_list("", *items, classes=["from-the-package"]),
        ids=[nodes.make_id(SECTION)],
    )


def add_pages_to_references(links: Links, doctree: nodes.document) -> None:
    """Say below each entry of the list of references which pages list it or link to it."""
    keys = {nodes.make_id(f"cite-{key}"): key for key in book().bibliography.entries}
    for item in doctree.findall(nodes.list_item):
        for key in {keys[i] for i in item.get("ids", []) if i in keys}:
            pages = {name for name, works in book().citing_pages.items() if key in works}
            pages |= book().citing_chapters.get(key, set())
            cited = [[links.to_page(name)] for name in links.in_order(pages)]
            code: dict[str, nodes.Node] = {}
            for definition, file, line in book().citing_code.get(key, []):
                if entry := links.to_entry(definition):
                    code.setdefault(definition[1], entry[1])
                else:
                    name = file.relative_to(book().source).as_posix()
                    uri = bookfix.source_address(file.relative_to(ROOT), line)
                    code.setdefault(name, _code_link(name, uri, internal=False))
            cited += [[link] for _, link in sorted(code.items())]
            if cited:
                item += _listed(nodes.Text("Listed in"), cited, "cited-in")


class Citation(SphinxDirective):
    """Say how to cite the book, in words and as BibTeX, from ``CITATION.cff``."""

    def run(self) -> list[nodes.Node]:
        """Return the nodes."""
        words, bibtex = citation(yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8")))
        listing = nodes.literal_block(bibtex, bibtex, language="bibtex")
        return [nodes.block_quote("", nodes.paragraph("", words)), listing]


def citation(facts: Mapping[str, Any]) -> tuple[str, str]:
    """Return the citation that a ``CITATION.cff`` asks for, in words and as BibTeX."""
    # A group has one name, which BibTeX must not take apart.
    groups = [author.get("name") for author in facts["authors"]]
    names = [a.get("name") or f"{a['given-names']} {a['family-names']}" for a in facts["authors"]]
    year = str(facts.get("date-released", ""))[:4]
    when = f" ({year})" if year else ""
    words = f"{', '.join(names)}{when}. {facts['title']}. Version {facts['version']}. {facts['url']}"
    fields = {
        "author": " and ".join(f"{{{name}}}" if name in groups else name for name in names),
        "title": f"{{{facts['title']}}}",
        "year": year,
        "version": facts["version"],
        "url": facts["url"],
        "note": f"Code: {facts['repository-code']}",
    }
    lines = [f"  {name} = {{{value}}}" for name, value in fields.items() if value]
    return words, "@misc{policyopt,\n" + ",\n".join(lines) + "\n}"


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the links."""
    book.cache_clear()  # one process may build twice
    app.add_directive("citation", Citation)
    app.connect("doctree-resolved", add_links)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
