"""What search engines, link previews and old bookmarks see of the book.

Descriptions come from the list of chapters on the front page, redirects from ``book/redirects.yml``. ``BOOK_REF``, the
name of a tag, makes the buttons of a released book open the notebooks of that release.
"""

from __future__ import annotations

import html
import os
import re
from pathlib import Path
from typing import Any

import yaml
from docutils import nodes
from sphinx.application import Sphinx
from sphinx.config import Config
from sphinx.errors import ExtensionError
from sphinx.util.typing import ExtensionMetadata

# A row of the front page's table: | [title](page.ipynb) | what you will do | …
CHAPTER = re.compile(r"(?m)^\| \[[^\]]+\]\((?P<page>[\w/-]+)\.(?:ipynb|md)\) \| (?P<text>[^|]+) \|")


def descriptions(index: str) -> dict[str, str]:
    """Return what the front page says of each chapter, as a sentence.

    Parameters
    ----------
    index : str
        The Markdown of the front page.

    Returns
    -------
    dict of str to str
        A sentence of plain text for each page that the table of chapters names.
    """
    found = {}
    for row in CHAPTER.finditer(index):
        text = re.sub(r"\[([^\]]+)\]\([^)]+\)|[*`$]", r"\1", row["text"]).strip()
        found[row["page"]] = f"{text[0].upper()}{text[1:].rstrip('.')}."
    return found


def redirects(text: str, pages: set[str]) -> dict[str, str]:
    """Read which page took the place of which.

    Parameters
    ----------
    text : str
        YAML: a mapping of old page names to present ones, both without suffix.
    pages : set of str
        The pages that there are.

    Returns
    -------
    dict of str to str
        For each old page the address of the new one, relative to the old.

    Raises
    ------
    ValueError
        If an old page still exists, or a new one does not.
    """
    table = yaml.safe_load(text) or {}
    if not isinstance(table, dict):
        raise ValueError("redirects.yml must map old page names to new ones: `old-name: new-name`")
    found = {}
    for old, new in table.items():
        if old in pages:
            raise ValueError(f"redirects.yml moves {old!r} away, but that page exists")
        target, _, anchor = str(new).partition("#")
        if target not in pages:
            raise ValueError(f"redirects.yml sends {old!r} to {target!r}, which is no page of the book")
        found[str(old)] = "../" * str(old).count("/") + f"{target}.html" + (f"#{anchor}" if anchor else "")
    return found


def read_redirects(app: Sphinx, docnames: list[str] | None = None) -> None:
    """Hand the redirects to sphinx-reredirects."""
    file = Path(app.srcdir, "redirects.yml")
    if file.is_file():
        try:
            app.config["redirects"] = redirects(file.read_text(encoding="utf-8"), set(app.env.found_docs))
        except ValueError as error:
            raise ExtensionError(str(error)) from error


def read_descriptions(app: Sphinx) -> None:
    """Keep the front page's words about the chapters."""
    index = Path(app.srcdir, "index.md")
    app.config["page_descriptions"] = descriptions(index.read_text(encoding="utf-8"))


def describe(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Describe a chapter by what its reader will do, not by its first lines."""
    text = app.config["page_descriptions"].get(pagename)
    if doctree is not None and text:
        context["meta"] = {**(context.get("meta") or {}), "og:description": html.escape(text)}
        tag = f'<meta name="description" content="{html.escape(text)}" />\n'
        context["metatags"] = context.get("metatags", "") + tag


def point_at_release(app: Sphinx, config: Config) -> None:
    """Let the buttons open the notebooks of the release, not those of the branch."""
    ref = os.environ.get("BOOK_REF")
    if ref:
        config.html_theme_options["repository_branch"] = ref


def setup(app: Sphinx) -> ExtensionMetadata:
    """Connect the hooks."""
    app.add_config_value("page_descriptions", {}, "", dict)
    app.connect("config-inited", point_at_release)
    app.connect("builder-inited", read_descriptions)
    app.connect("env-updated", lambda app, env: read_redirects(app))
    app.connect("html-page-context", describe, priority=400)  # before sphinxext.opengraph
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
