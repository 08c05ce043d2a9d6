"""What search engines and link previews say of a chapter: its row in the table of the front page."""

from __future__ import annotations

import html
import re
from pathlib import Path
from typing import Any

from docutils import nodes
from sphinx.application import Sphinx
from sphinx.util.typing import ExtensionMetadata

# A row of the front page's table: | [title](page.ipynb) | what you will do | …
CHAPTER = re.compile(r"(?m)^\| \[[^\]]+\]\((?P<page>[\w/-]+)\.(?:ipynb|md)\) \| (?P<text>[^|]+) \|")


def descriptions(index: str) -> dict[str, str]:
    """Return a sentence of plain text for each page that the front page's table of chapters names."""
    found = {}
    for row in CHAPTER.finditer(index):
        text = re.sub(r"\[([^\]]+)\]\([^)]+\)|[*`$]", r"\1", row["text"]).strip()
        found[row["page"]] = f"{text[0].upper()}{text[1:].rstrip('.')}."
    return found


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


def setup(app: Sphinx) -> ExtensionMetadata:
    """Connect the hooks."""
    app.add_config_value("page_descriptions", {}, "", dict)
    app.connect("builder-inited", read_descriptions)
    app.connect("html-page-context", describe, priority=400)  # before sphinxext.opengraph
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
