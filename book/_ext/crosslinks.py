"""Links between the chapters, the API pages and the list of references. Rendered pages only: no notebook is changed.

- Each function and class on an API page says which chapters use it, and where its source is shown.
- Each chapter ends with what it uses of the package, linked to the API pages.
- Each entry of the list of references says which pages cite it.
- The directive ``citation`` says how to cite the book, from ``CITATION.cff``.

All of it is read from the text of the notebooks and of the package, nothing is imported. The links are put in when a
page is written. So a page whose own source did not change must be written again when somebody else's did:
:func:`stale_pages` sees to that.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from pybtex.database import BibliographyData, parse_file
from sphinx import addnodes
from sphinx.application import Sphinx
from sphinx.environment import BuildEnvironment
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

import bookfix

ROOT = bookfix.ROOT
DOCUMENTED = ("function", "class", "exception", "data")
SECTION = "From the package"
ARXIV = re.compile(r"(?<![\d.])(\d{4}\.\d{5})(?!\d)")
DOI = re.compile(r"\b(10\.\d{4,9}/[^\s\"'<>)\],;]*[^\s\"'<>)\],;.:])")


# --- the package -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, order=True)
class Definition:
    """Where a function, class or constant is defined."""

    module: str
    name: str
    file: Path = field(compare=False)
    first: int = field(compare=False)
    last: int = field(compare=False)

    @property
    def full_name(self) -> str:
        """The name with its module."""
        return f"{self.module}.{self.name}"


class Package:
    """A package on disk, read and not imported."""

    def __init__(self, source: Path, name: str) -> None:
        self.source, self.name = source, name
        self._names: dict[str, dict[str, Definition | str]] = {}
        self._files: dict[str, Path | None] = {}
        self._resolved: dict[str, Definition | None] = {}

    def file(self, module: str) -> Path | None:
        """Return the file of a module, or None."""
        if module not in self._files:
            path = self.source.joinpath(*module.split("."))
            candidates = (path.with_suffix(".py"), path / "__init__.py")
            self._files[module] = next((file for file in candidates if file.is_file()), None)
        return self._files[module]

    def resolve(self, dotted: str) -> Definition | None:
        """Follow a dotted name through re-exports to its definition; a method leads to its class."""
        if dotted not in self._resolved:
            self._resolved[dotted] = self._follow(dotted)
        return self._resolved[dotted]

    def _follow(self, dotted: str) -> Definition | None:
        seen: set[str] = set()
        while dotted not in seen:
            seen.add(dotted)
            parts = dotted.split(".")
            if parts[0] != self.name:
                return None
            length = next((n for n in range(len(parts), 0, -1) if self.file(".".join(parts[:n]))), 0)
            if length in (0, len(parts)):
                return None
            found = self._names_of(".".join(parts[:length])).get(parts[length])
            if not isinstance(found, str):
                return found
            dotted = ".".join([found, *parts[length + 1 :]])
        return None

    def _names_of(self, module: str) -> dict[str, Definition | str]:
        """Map each name of a module to its definition, or to the dotted name that it was imported as."""
        if module not in self._names:
            path = self.file(module)
            names = self._names[module] = {}
            for node in _top_level(ast.parse(path.read_text(encoding="utf-8")).body) if path else ():
                if isinstance(node, ast.ImportFrom) and node.module and not node.level:
                    names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
                elif isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
                    first = min([node.lineno, *(d.lineno for d in node.decorator_list)])
                    names[node.name] = Definition(module, node.name, path, first, node.end_lineno or first)
                elif isinstance(node, ast.Assign | ast.AnnAssign):
                    targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                    for target in targets:
                        if isinstance(target, ast.Name):
                            last = node.end_lineno or node.lineno
                            names[target.id] = Definition(module, target.id, path, node.lineno, last)
        return self._names[module]


def _top_level(body: list[ast.stmt]) -> Iterator[ast.stmt]:
    for node in body:
        yield node
        for part in ("body", "orelse"):
            if isinstance(node, ast.If | ast.Try):
                yield from _top_level(getattr(node, part))


# --- the chapters ----------------------------------------------------------------------------------------------


def code_cells(notebook: Mapping[str, Any]) -> list[str]:
    """Return the sources of the code cells, without the cell that installs the package and without magics."""
    found = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        run = cell["cell_type"] == "code" and "setup" not in cell["metadata"].get("tags", [])
        if run and not source.lstrip().startswith("%%"):
            found.append(re.sub(r"(?m)^([ \t]*)[%!].*$", r"\1pass", source))
    return found


class Uses(ast.NodeVisitor):
    """Collect what a chapter uses of a package: ``found`` maps it to whether ``show_source`` shows it."""

    def __init__(self, package: Package) -> None:
        self.package = package
        self.aliases: dict[str, str] = {}
        self.found: dict[Definition, bool] = {}

    def visit_Import(self, node: ast.Import) -> None:
        """Remember ``import package.module as name``."""
        for alias in node.names:
            if alias.name.split(".")[0] == self.package.name:
                name = alias.asname or self.package.name
                self.aliases[name] = alias.name if alias.asname else self.package.name

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        """Remember ``from package.module import name``."""
        if node.module and node.module.split(".")[0] == self.package.name:
            self.aliases |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}

    def visit_Name(self, node: ast.Name) -> None:
        """Count the use of an imported name."""
        if isinstance(node.ctx, ast.Load):
            self._count(self._dotted(node))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        """Count ``module.name``; what is behind a definition belongs to it."""
        if self._count(self._dotted(node)) is None:
            self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        """Take note of ``show_source(name)``."""
        self.generic_visit(node)
        called = node.func.id if isinstance(node.func, ast.Name) else getattr(node.func, "attr", "")
        if called == "show_source" and node.args:
            self._count(self._dotted(node.args[0]), shown=True)

    def visit_Constant(self, node: ast.Constant) -> None:
        """Count what ``mock.patch("package.module.name")`` replaces."""
        if isinstance(node.value, str) and re.fullmatch(rf"{self.package.name}(\.\w+)+", node.value):
            self._count(node.value)

    def _dotted(self, node: ast.AST) -> str:
        if isinstance(node, ast.Attribute):
            before = self._dotted(node.value)
            return before and f"{before}.{node.attr}"
        return self.aliases.get(node.id, "") if isinstance(node, ast.Name) else ""

    def _count(self, dotted: str, *, shown: bool = False) -> Definition | None:
        definition = self.package.resolve(dotted) if dotted else None
        if definition is not None:
            self.found[definition] = self.found.get(definition, False) or shown
        return definition


def uses(cells: Iterable[str], package: Package) -> dict[Definition, bool]:
    """Return what code uses of a package, and whether it shows its source."""
    visitor = Uses(package)
    for source in cells:
        visitor.visit(ast.parse(source))
    return visitor.found


def reference_items(notebook: Mapping[str, Any]) -> list[str]:
    """Return the items of the list under a chapter's heading *References*."""
    text = "\n\n".join("".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == "markdown")
    sections = re.findall(r"(?ms)^## References\s*$(.*?)(?=^## |\Z)", text)
    return [item for section in sections for item in re.findall(r"(?m)^[-*] +(.+)$", section)]


# --- the references --------------------------------------------------------------------------------------------


class Bibliography:
    """The entries of the .bib file, to be found by identifier, address or title."""

    def __init__(self, data: BibliographyData) -> None:
        self.entries = data.entries
        self._by_id: dict[str, str] = {}
        self._titles: dict[str, str] = {}
        for key, entry in data.entries.items():
            for name in ("eprint", "doi", "url"):
                if name in entry.fields:
                    self._by_id[entry.fields[name].lower()] = key
            self._titles[_letters(entry.fields["title"])] = key

    @classmethod
    def read(cls, path: Path) -> Bibliography:
        """Read a .bib file."""
        return cls(parse_file(str(path), "bibtex"))

    def cited_by_identifier(self, text: str) -> set[str]:
        """Return the entries whose arXiv id or DOI stands in a text."""
        found = {i.lower() for pattern in (ARXIV, DOI) for i in pattern.findall(text)}
        return {self._by_id[i] for i in found & self._by_id.keys()}

    def identify(self, item: str) -> str | None:
        """Return the entry that an item of a list of references is about: by identifier, address or title."""
        keys = self.cited_by_identifier(item)
        keys |= {self._by_id[url.lower()] for url in re.findall(r"\((https?://[^)\s]+)\)", item)
                 if url.lower() in self._by_id}  # fmt: skip
        if not keys:
            letters = _letters(item)
            keys = {key for title, key in self._titles.items() if title in letters}
        return keys.pop() if len(keys) == 1 else None


def _letters(text: str) -> str:
    return re.sub(r"[^a-z0-9]", "", text.lower())


# --- what the pages need ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Citing:
    """A place in the package that cites a work."""

    module: str
    file: Path
    line: int


@dataclass(frozen=True)
class Entry:
    """A definition on an API page."""

    name: str
    page: str
    anchor: str


class Book:
    """What the chapters use and cite, and what the package cites."""

    def __init__(self, pages: Path, package: Package) -> None:
        self.pages, self.package = pages, package
        self.entries: dict[Definition, Entry] = {}

    @cached_property
    def notebooks(self) -> dict[str, dict[str, Any]]:
        """The chapters by name."""
        files = sorted(self.pages.glob("*.ipynb"))
        return {file.stem: json.loads(file.read_text(encoding="utf-8")) for file in files}

    @cached_property
    def uses(self) -> dict[str, dict[Definition, bool]]:
        """What each chapter uses of the package, and whether it shows its source."""
        return {name: uses(code_cells(notebook), self.package) for name, notebook in self.notebooks.items()}

    @cached_property
    def bibliography(self) -> Bibliography | None:
        """The entries of the .bib file, if there is one."""
        path = self.pages / "references.bib"
        return Bibliography.read(path) if path.is_file() else None

    @cached_property
    def citing_chapters(self) -> dict[str, list[str]]:
        """The chapters that list each work, by its key."""
        found: dict[str, list[str]] = {}
        for name, notebook in self.notebooks.items():
            for item in reference_items(notebook):
                key = self.bibliography.identify(item) if self.bibliography else None
                if key is not None and name not in found.setdefault(key, []):
                    found[key].append(name)
        return found

    @cached_property
    def citing_code(self) -> dict[str, list[Citing]]:
        """The places of the package that cite each work, by its key."""
        found: dict[str, list[Citing]] = {}
        for file in sorted(self.package.source.joinpath(self.package.name).rglob("*.py")):
            module = ".".join(file.relative_to(self.package.source).with_suffix("").parts)
            text = file.read_text(encoding="utf-8")
            if not ARXIV.search(text) and not DOI.search(text):
                continue
            for number, line in enumerate(text.splitlines(), start=1):
                for key in self.bibliography.cited_by_identifier(line) if self.bibliography else ():
                    found.setdefault(key, []).append(Citing(module.removesuffix(".__init__"), file, number))
        return found

    def digest(self) -> str:
        """Return a text that changes whenever a link may have to change."""
        used = {
            name: [(d.full_name, d.first, d.last, shown) for d, shown in sorted(found.items())]
            for name, found in self.uses.items()
        }
        code = {key: [str(place) for place in places] for key, places in self.citing_code.items()}
        return json.dumps([used, self.citing_chapters, code], sort_keys=True)


@cache
def book() -> Book:
    """Return this book; read once per build."""
    return Book(ROOT / "book", Package(ROOT / "src", "policyopt"))


class Links:
    """Make links from a page, and know where each definition is documented."""

    def __init__(self, app: Sphinx, page: str) -> None:
        self.app, self.env, self.page = app, app.env, page

    @property
    def entries(self) -> dict[Definition, Entry]:
        """Where each definition is documented."""
        if not book().entries:  # once per build: all pages have been read
            for name, item in self.env.get_domain("py").objects.items():  # type: ignore[attr-defined]
                known = item.objtype in DOCUMENTED and not item.aliased
                definition = book().package.resolve(name) if known else None
                if definition is not None and definition.name == name.rpartition(".")[2]:
                    book().entries[definition] = Entry(name, item.docname, item.node_id)
        return book().entries

    def to_page(self, page: str) -> nodes.reference:
        """Link to a page by its title."""
        title = self.env.titles[page].astext() if page in self.env.titles else page
        uri = self.app.builder.get_relative_uri(self.page, page)
        return nodes.reference("", "", nodes.Text(title), refuri=uri, internal=True)

    def to_entry(self, entry: Entry, text: str | None = None) -> nodes.reference:
        """Link to an entry of an API page."""
        uri = f"{self.app.builder.get_relative_uri(self.page, entry.page)}#{entry.anchor}"
        return _code_link(text or entry.name.rpartition(".")[2], uri, internal=True)

    def to_source(self, text: str, file: Path, first: int, last: int | None = None) -> nodes.reference:
        """Link to lines of the source in the repository."""
        return _code_link(text, bookfix.source_address(file.relative_to(ROOT), first, last), internal=False)

    @cached_property
    def order(self) -> dict[str, int]:
        """The place of each page in the table of contents."""
        return {page: i for i, page in enumerate(_walk(self.env, self.env.config.root_doc, set()))}

    def in_order(self, pages: Iterable[str]) -> list[str]:
        """Sort pages as the table of contents does."""
        return sorted(pages, key=lambda page: (self.order.get(page, len(self.order)), page))


def _walk(env: BuildEnvironment, page: str, seen: set[str]) -> Iterator[str]:
    if page not in seen:
        seen.add(page)
        yield page
        for below in env.toctree_includes.get(page, []):
            yield from _walk(env, below, seen)


def _code_link(text: str, uri: str, *, internal: bool) -> nodes.reference:
    return nodes.reference("", "", nodes.literal("", text), refuri=uri, internal=internal)


def _joined(parts: Iterable[list[nodes.Node]], separator: str = ", ") -> list[nodes.Node]:
    result: list[nodes.Node] = []
    for part in parts:
        result += [nodes.Text(separator), *part] if result else part
    return result


# --- events ----------------------------------------------------------------------------------------------------


def stale_pages(app: Sphinx, env: BuildEnvironment) -> list[str]:
    """Name the pages to write again, because a chapter, the package or the .bib file has changed."""
    documented = sorted(name for name in env.get_domain("py").objects)  # type: ignore[attr-defined]
    digest = json.dumps([book().digest(), documented, sorted((k, v.astext()) for k, v in env.titles.items())])
    if getattr(env, "crosslinks_digest", None) == digest:
        return []
    env.crosslinks_digest = digest  # type: ignore[attr-defined]
    api = {item.docname for item in env.get_domain("py").objects.values()}  # type: ignore[attr-defined]
    return sorted((api | set(book().uses) | {"references"}) & env.found_docs)


def add_links(app: Sphinx, doctree: nodes.document, page: str) -> None:
    """Put the links into a page that is about to be written."""
    if app.builder.format != "html":
        return
    links = Links(app, page)
    add_chapters_to_api(links, doctree)
    if page in book().uses:
        add_api_to_chapter(links, doctree)
    if page == "references":
        add_pages_to_references(links, doctree)


def add_chapters_to_api(links: Links, doctree: nodes.document) -> None:
    """Say below each function and class which chapters use it."""
    for description in list(doctree.findall(addnodes.desc)):
        signature = description.next_node(addnodes.desc_signature)
        if description.get("domain") != "py" or description.get("objtype") not in DOCUMENTED or not signature:
            continue
        definition = book().package.resolve(f"{signature.get('module')}.{signature.get('fullname')}")
        if definition is None or definition.name != signature.get("fullname"):
            continue
        chapters = {name: found[definition] for name, found in book().uses.items() if definition in found}
        if not chapters:
            continue
        named = [
            [links.to_page(name), *([nodes.Text(" (source shown)")] if chapters[name] else [])]
            for name in links.in_order(chapters)
        ]
        text = nodes.paragraph("", "", nodes.Text("Used in: "), *_joined(named), classes=["used-in"])
        content = description.next_node(addnodes.desc_content)
        if content is not None:
            # Before the members of a class, which may be many.
            inner = (
                i for i, child in enumerate(content) if isinstance(child, addnodes.index | addnodes.desc)
            )
            content.insert(next(inner, len(content)), text)


def add_api_to_chapter(links: Links, doctree: nodes.document) -> None:
    """End a chapter with what it uses of the package."""
    tops = [child for child in doctree.children if isinstance(child, nodes.section)]
    used = book().uses[links.page]
    if not tops or not used:
        return
    modules: dict[str, list[tuple[str, nodes.reference]]] = {}
    for definition in sorted(used):
        entry = links.entries.get(definition)
        if entry is not None:
            module = entry.name.rpartition(".")[0]
            link = links.to_entry(entry)
        else:
            module = definition.module
            link = links.to_source(definition.name, definition.file, definition.first, definition.last)
        modules.setdefault(module, []).append((definition.name.lower(), link))
    items = []
    for module, found in sorted(modules.items()):
        parts = _joined([link] for _, link in sorted(found, key=lambda pair: pair[0]))
        line = nodes.paragraph("", "", nodes.literal("", module), nodes.Text(": "), *parts)
        items.append(nodes.list_item("", line))
    lead = (
        "What this chapter uses. A name leads to its description, and from there to its source; "
        "helpers without a description lead to the source at once."
    )
    tops[-1] += nodes.section(
        "",
        nodes.title("", SECTION),
        nodes.paragraph("", lead),
        nodes.bullet_list("", *items, classes=["from-the-package"]),
        ids=[nodes.make_id(SECTION)],
    )


def add_pages_to_references(links: Links, doctree: nodes.document) -> None:
    """Say below each entry of the list of references which pages cite it."""
    bibliography = book().bibliography
    keys = {nodes.make_id(f"cite-{key}"): key for key in bibliography.entries} if bibliography else {}
    for item in doctree.findall(nodes.list_item):
        key = next((keys[i] for i in item.get("ids", []) if i in keys), None)
        if key is None:
            continue
        cited = [[links.to_page(name)] for name in links.in_order(book().citing_chapters.get(key, []))]
        seen: dict[str, nodes.reference] = {}
        for place in book().citing_code.get(key, []):
            name, link = _place(links, place)
            seen.setdefault(name, link)
        cited += [[link] for _, link in sorted(seen.items())]
        if cited:
            item += nodes.paragraph("", "", nodes.Text("Cited in: "), *_joined(cited), classes=["cited-in"])


def _place(links: Links, place: Citing) -> tuple[str, nodes.reference]:
    """Return the name of the documented object around a place of the package, and a link to it."""
    for definition, entry in links.entries.items():
        if definition.module == place.module and definition.first <= place.line <= definition.last:
            return definition.name, links.to_entry(entry)
    name = place.file.relative_to(ROOT / "src").as_posix()
    return name, links.to_source(name, place.file, place.line)


class Citation(SphinxDirective):
    """Say how to cite the book, in words and as BibTeX, from ``CITATION.cff``."""

    def run(self) -> list[nodes.Node]:
        """Return the nodes."""
        file = ROOT / "CITATION.cff"
        self.env.note_dependency(str(file))
        words, bibtex = citation(yaml.safe_load(file.read_text(encoding="utf-8")))
        listing = nodes.literal_block(bibtex, bibtex, language="bibtex")
        return [nodes.block_quote("", nodes.paragraph("", words)), listing]


def citation(facts: Mapping[str, Any]) -> tuple[str, str]:
    """Return the citation that a ``CITATION.cff`` asks for, in words and as BibTeX."""
    names, bibtex_names = [], []
    for author in facts["authors"]:
        # A group has one name, which BibTeX must not take apart.
        name = author.get("name") or f"{author['given-names']} {author['family-names']}"
        names.append(name)
        bibtex_names.append(f"{{{name}}}" if "name" in author else name)
    year = str(facts.get("date-released", ""))[:4]
    when = f" ({year})" if year else ""
    words = f"{', '.join(names)}{when}. {facts['title']}. Version {facts['version']}. {facts['url']}"
    fields = {
        "author": " and ".join(bibtex_names),
        "title": f"{{{facts['title']}}}",
        "year": year,
        "version": facts["version"],
        "url": facts["url"],
        "note": f"Code: {facts['repository-code']}",
    }
    lines = [f"  {name} = {{{value}}}" for name, value in fields.items() if value]
    return words, "@misc{policyopt,\n" + ",\n".join(lines) + "\n}"


def forget(app: Sphinx) -> None:
    """Read the book anew: one process may build twice."""
    book.cache_clear()


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the links."""
    app.add_directive("citation", Citation)
    app.connect("builder-inited", forget)
    app.connect("env-get-updated", stale_pages)
    app.connect("doctree-resolved", add_links)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
