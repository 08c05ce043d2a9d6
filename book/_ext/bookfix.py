"""Repairs to the pages that Jupyter Book 1.x and its theme make, and links from the API page to the source.

Each repair names the defect it is for; when the defect is gone upstream, the repair can go.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from pathlib import Path
from typing import Any

from docutils import nodes
from docutils.parsers.rst.states import Inliner
from PIL import Image
from sphinx.application import Sphinx
from sphinx.util.docutils import SphinxDirective
from sphinx.util.typing import ExtensionMetadata

sys.path.append(str(Path(__file__).parents[1] / "_tools"))
from repository import ROOT, Repository

# What tex-chtml.js loads for the formulas of this book; the other fonts and bundles are 20 MB.
MATHJAX_KEPT = ("tex-chtml.js", "output/chtml/fonts/woff-v2", "input/tex/extensions", "ui", "a11y")


# Chapters that need more than the 2 GB of memory that Binder gives: no button.
TOO_LARGE_FOR_BINDER = ("real-model",)


class ModuleApi(SphinxDirective):
    """Document a module: its docstring, a table of its public names, then each of them."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """Return the nodes for the module that is named by the argument."""
        name = self.arguments[0]
        module = importlib.import_module(name)
        lines = [f".. automodule:: {name}", "", ".. autosummary::", "   :nosignatures:", ""]
        # A named tuple is the result of a function: it comes after all functions.
        names = sorted(module.__all__, key=lambda public: hasattr(getattr(module, public), "_fields"))
        lines += [f"   {public}" for public in names]
        for public in names:
            member = getattr(module, public)
            if not getattr(member, "__module__", name).startswith(name):
                continue  # handed on from a floor below, whose own page describes it
            kind = "class" if inspect.isclass(member) else "function" if callable(member) else "data"
            lines += ["", f".. auto{kind}:: {public}"]
            if kind == "class":
                lines.append("   :members:")
                if member.__bases__ != (object,):
                    lines.append("   :show-inheritance:")
        return self.parse_text_to_nodes("\n".join(lines))


def plain_bar(self: Inliner, match: re.Match[str], lineno: int) -> tuple[str, list[Any], str, list[Any]]:
    """Read ``|`` as itself: docstrings write P(s' | s, a) and no substitutions."""
    end = match.end("start")
    return match.string[:end], [], match.string[end:], []


def use_mathjax_tags(app: Sphinx, doctree: nodes.document) -> None:
    r"""Pass display formulas on as written.

    Sphinx wraps every formula that holds ``\\`` in a ``split`` environment, in which ``\tag`` is an error.
    """
    for node in doctree.findall(nodes.math_block):
        if not node.get("nowrap") and not node.get("label"):
            node.children = [nodes.Text(rf"\[{node.astext()}\]")]
            node["nowrap"] = True


def repair_page(
    app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: nodes.document | None
) -> None:
    """Repair what the theme and its extensions put into a page."""
    # Thebe is off, but its script is emitted (twice) and throws.
    scripts: dict[str, Any] = {}
    for script in context.get("script_files", []):
        body = getattr(script, "attributes", {}).get("body") or ""
        name = str(getattr(script, "filename", "") or "")
        if "THEBE_JS_URL" not in body and "sphinx-thebe" not in name:
            scripts.setdefault(body or name or repr(script), script)
    context["script_files"] = list(scripts.values())
    context["css_files"] = [
        style
        for style in context.get("css_files", [])
        if "sphinx-thebe" not in str(getattr(style, "filename", style))
    ]
    # Colab and Binder open notebooks only.
    if doctree is None or app.env.doc2path(pagename, base=False).endswith(".md"):
        context["header_buttons"] = [
            button for button in context.get("header_buttons", []) if button.get("label") != "launch-buttons"
        ]
    # The theme offers Binder for all notebooks or for none.
    if pagename in TOO_LARGE_FOR_BINDER:
        for group in context.get("header_buttons", []):
            if group.get("label") == "launch-buttons":
                group["buttons"] = [button for button in group["buttons"] if button.get("text") != "Binder"]
    if "body" in context:
        context["body"] = repair_body(context["body"])


def repair_body(body: str) -> str:
    """Repair the HTML of an article."""
    # The label hides the visible text from screen readers.
    body = body.replace('<summary aria-label="Toggle hidden content">', "<summary>")
    # The corner of a table, pandas' or Markdown's, is an empty header cell.
    body = re.sub(r"<th( [^>]*)?>\s*(<p>\s*</p>)?\s*</th>", r"<td\1></td>", body)
    body = re.sub(
        r'<script type="text/x-thebe-config">.*?</script>\s*(<script>kernelName[^<]*</script>)?',
        "",
        body,
        flags=re.S,
    )
    # What may scroll sideways on a small screen must be reachable by keyboard.
    body = body.replace('<div class="highlight"><pre>', '<div class="highlight"><pre tabindex="0">')
    # Sphinx lists the parameters of a long signature in a definition list without terms.
    return re.sub(
        r'(<span class="sig-paren">\(</span>)\s*<dl>(.*?)</dl>',
        lambda m: m[1] + m[2].replace("<dd>", '<span class="sig-param-line">').replace("</dd>", "</span>"),
        body,
        flags=re.S,
    )


def link_source(domain: str, info: dict[str, str]) -> str | None:
    """Return the address of an object's source, for ``sphinx.ext.linkcode``."""
    if domain != "py" or not info["module"]:
        return None
    found: Any = importlib.import_module(info["module"])
    for part in info["fullname"].split("."):
        found = getattr(found, part, None)
        if found is None:
            return None
    found = inspect.unwrap(found.fget if isinstance(found, property) else found)
    try:
        file, (lines, first) = Path(inspect.getsourcefile(found) or ""), inspect.getsourcelines(found)
    except (TypeError, OSError):
        return None  # data, or made at run time
    if not file.is_relative_to(ROOT / "src"):
        return None
    return source_address(file.relative_to(ROOT), first, first + len(lines) - 1)


def source_address(file: Path, first: int, last: int | None = None) -> str:
    """Return the address of lines of a file, whose path is that in the repository."""
    span = f"#L{first}" + (f"-L{last}" if last else "")
    return f"{Repository.of().url}/blob/main/{file.as_posix()}{span}"


def prune_mathjax(app: Sphinx, error: Exception | None) -> None:
    """Delete the parts of the bundled MathJax that no page loads."""
    root = Path(app.outdir, "_static", "mathjax")
    if error is None and root.is_dir():
        for file in [f for f in root.rglob("*") if f.is_file()]:
            if not file.relative_to(root).as_posix().startswith(MATHJAX_KEPT):
                file.unlink()


def lighten(app: Sphinx, error: Exception | None) -> None:
    """Make the pages lighter by what they do not need.

    That is 1.5 MB of script that draws the icons a second time (the theme's style sheet has them as a font), and more
    than half of each figure: WebP stores the same pixels, without loss, in less than half of matplotlib's PNG.
    """
    if error is not None or app.builder.name not in ("html", "singlehtml"):
        return
    out = Path(app.outdir)
    for file in (out / "_images").glob("*.png"):
        with Image.open(file) as picture:
            picture.convert("RGB").save(file.with_suffix(".webp"), lossless=True)
        file.unlink()
    icons = re.compile(
        r'<script defer src="[^"]*fontawesome\.js[^"]*"></script>|<link[^>]*fontawesome\.js[^>]*>'
    )
    figure = re.compile(r'((?:src|href)="[^":]*_images/[^"]+)\.png"')
    for page in out.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        lean = figure.sub(r'\1.webp"', icons.sub("", text))
        if lean != text:
            page.write_text(lean, encoding="utf-8")
    (out / "_static" / "scripts" / "fontawesome.js").unlink(missing_ok=True)


def setup(app: Sphinx) -> ExtensionMetadata:
    """Register the repairs."""
    app.add_directive("module-api", ModuleApi)
    Inliner.dispatch["|"] = plain_bar
    app.config["linkcode_resolve"] = link_source
    app.connect("doctree-read", use_mathjax_tags)
    app.connect("html-page-context", repair_page, priority=900)
    app.connect("build-finished", prune_mathjax, priority=900)
    app.connect("build-finished", lighten, priority=900)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
