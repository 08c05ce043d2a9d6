"""Print the whole book: one long page, made by Sphinx, goes through a browser's printer.

Run by ``make pdf``. Needs a Chromium (Debian: ``apt install chromium``).
"""

from __future__ import annotations

import io
import itertools
import shutil
import sys
import time
from pathlib import Path

import yaml
from playwright.sync_api import sync_playwright
from pypdf import PdfReader

import notebooks
from browser import find_chromium
from build_book import BOOK, build
from repository import ROOT

PDF = BOOK / "_build" / "book.pdf"

FOOTER = """<div style="width: 100%; font: 8pt sans-serif; color: #555; text-align: center">
  <span class="pageNumber"></span></div>"""

STYLE = """
@page { size: A4; margin: 20mm 18mm 20mm 18mm; }
html, body, .bd-container, .bd-container__inner, .bd-main, .bd-content, .bd-article-container, .bd-article, main {
  display: block !important; max-width: none !important; width: auto !important;
  margin: 0 !important; padding: 0 !important; overflow: visible !important;
}
html { font-size: 10.5pt !important; }
body { hyphens: auto; }
.opens { break-before: page; }
h1, h2, h3, h4 { break-after: avoid; }
h2 { font-size: 1.9em; } h3 { font-size: 1.35em; } h4 { font-size: 1.1em; }
p, li { orphans: 3; widows: 3; }
img, svg, tr, .math, mjx-container { break-inside: avoid; }
img { max-width: 100% !important; filter: none !important; mix-blend-mode: normal !important; }
pre { white-space: pre-wrap !important; overflow-wrap: anywhere; overflow: visible !important;
      font-size: 8pt !important; line-height: 1.3; }
div.highlight, .cell, .cell_output, .output { overflow: visible !important; }
table { font-size: 8.5pt; width: 100% !important; }
td, th { overflow-wrap: break-word; }
.pst-scrollable-table-container { overflow: visible !important; }
details > summary { list-style: none; font-weight: bold; }
/* Screen furniture. */
.bd-header, .bd-header-article, .bd-sidebar-primary, .bd-sidebar-secondary, .bd-footer, .bd-footer-article, .headerlink,
.prev-next-footer, .copybtn, #jb-print-docs-body, .skip-link, #pst-skip-link, .toctree-wrapper > p.caption, button,
input, select, dialog, .viewcode-link { display: none !important; }
.cover { height: 240mm; display: flex; flex-direction: column; justify-content: center; text-align: center; }
.cover h1 { font-size: 30pt; border: 0; display: block !important; }
.contents { break-before: page; }
.contents ol { list-style: none; margin: 0; padding: 0; }
.contents li { margin: 0; line-height: 1.25; }
.contents li.page { font-weight: 600; margin-top: 0.5em; }
.contents li.part { font-size: 1.2em; margin-top: 1.4em; break-after: avoid; }
.contents li.section { padding-left: 2.2em; font-size: 0.9em; }
.contents a { display: flex; text-decoration: none; color: inherit; }
.contents a::after { content: attr(data-page); order: 3; }
.contents a > i { flex: 1; border-bottom: 1px dotted #999; margin: 0 0.4em 0.3em; }
"""

# Sphinx nests the pages of the book under its root, each after an empty span that bears its name.
PREPARE = """({style, title, author, note, pages}) => {
    document.documentElement.dataset.theme = document.documentElement.dataset.mode = 'light';
    document.head.append(Object.assign(document.createElement('style'), {textContent: style}));
    // Cells that only prepare are folded on the screen; on paper they are left out. Answers are printed.
    document.querySelectorAll('details.hide').forEach(e => e.remove());
    document.querySelectorAll('details').forEach(e => e.open = true);
    document.querySelectorAll('img').forEach(e => e.loading = 'eager');
    // Each word of the code is an element of its own. The colours of these few are enough, and halve the file.
    document.querySelectorAll('.highlight pre span:not(.c1, .k, .kn, .kc, .sd, .s1, .s2)').forEach(
        e => e.replaceWith(...e.childNodes));
    const make = (name, props, ...inside) => {
        const e = Object.assign(document.createElement(name), props); e.append(...inside); return e; };
    const first = document.querySelector('article h1').closest('section');
    const list = make('ol', {});
    let count = 0;
    const enter = (heading, kind) => {
        heading.id = 'printed-' + ++count;
        const text = heading.cloneNode(true);
        text.querySelectorAll('.headerlink').forEach(e => e.remove());
        const link = make('a', {href: '#' + heading.id}, make('span', {}, text.textContent), make('i', {}));
        list.append(make('li', {className: kind}, link));
    };
    for (const [name, part, number] of pages) {
        const heading = document.getElementById('document-' + name)?.nextElementSibling?.querySelector('h2');
        if (!heading) throw new Error(`page ${name} is missing`);
        if (part) list.append(make('li', {className: 'part'}, part));
        if (number) heading.prepend(number + '  ');
        heading.classList.add('opens');
        enter(heading, 'page');
        let k = 0;
        if (number) for (const below of heading.parentElement.querySelectorAll(':scope > section > h3')) {
            below.prepend(number + '.' + ++k + '  ');
            enter(below, 'section');
        }
    }
    first.before(make('div', {className: 'cover'}, make('h1', {}, title), make('p', {}, author), make('p', {}, note)),
                 make('section', {className: 'contents'}, make('h2', {}, 'Contents'), list));
    first.querySelector('h1').remove();
    first.prepend(make('h2', {className: 'opens'}, 'About this book'));
    return Promise.all([...document.images].map(i => i.decode().catch(() => { throw new Error(i.src); })));
}"""


def contents(toc: Path = ROOT / "_toc.yml") -> list[tuple[str, str, str]]:
    """Return each page after the root: its name, the caption of the part that it opens, its number if a chapter."""
    found, numbers = [], itertools.count(1)
    for part in yaml.safe_load(toc.read_text(encoding="utf-8"))["parts"]:
        for i, page in enumerate(page["file"] for page in part["chapters"]):
            number = str(next(numbers)) if page in notebooks.chapters() else ""
            found.append((page, "" if i else part["caption"], number))
    return found


def page_numbers(pdf: bytes, count: int) -> list[int]:
    """Return the pages, from 1, of the headings printed-1 … printed-count."""
    reader = PdfReader(io.BytesIO(pdf))
    targets = {name.lstrip("/"): target for name, target in reader.named_destinations.items()}
    found = (reader.get_destination_page_number(targets[f"printed-{i}"]) for i in range(1, count + 1))
    return [number + 1 for number in found]


def print_book(html: Path, chromium: str) -> bytes:
    """Return the PDF of the built page, with the page numbers in its table of contents."""
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    config = yaml.safe_load((ROOT / "_config.yml").read_text(encoding="utf-8"))
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page()
        page.set_default_timeout(300_000)
        page.goto(html.as_uri(), wait_until="load")
        page.evaluate("() => window.MathJax?.startup?.promise")
        page.emulate_media(media="print", color_scheme="light")
        page.evaluate(
            PREPARE,
            {
                "style": STYLE,
                "title": config["title"],
                "author": config["author"],
                "note": f"Version {citation['version']}",
                "pages": contents(),
            },
        )

        options = {
            "prefer_css_page_size": True,
            "print_background": True,
            "display_header_footer": True,
            "header_template": "<span></span>",
            "footer_template": FOOTER,
        }
        entries = page.locator(".contents a")
        # The numbers take no space of their own that could move a page, so two passes suffice.
        numbers = page_numbers(page.pdf(**options), entries.count())
        entries.evaluate_all(
            "(links, numbers) => links.forEach((a, i) => a.dataset.page = numbers[i])", numbers
        )
        final: bytes = page.pdf(**options, outline=True, tagged=True)
        browser.close()
    return final


def main() -> int:
    """Build and print; return the exit status."""
    start = time.perf_counter()
    chromium = find_chromium()
    if chromium is None:
        print("no browser: install chromium, or say where it is with CHROMIUM=…", file=sys.stderr)
        return 1
    out = BOOK / "_build" / "pdf"
    shutil.rmtree(out, ignore_errors=True)
    if status := build(out, "--builder", "custom", "--custom-builder", "singlehtml"):
        return status
    printed = print_book(out / "_build" / "singlehtml" / "index.html", chromium)
    PDF.write_bytes(printed)
    count = len(PdfReader(io.BytesIO(printed)).pages)
    print(f"{count} pages, {len(printed) / 1e6:.1f} MB in {time.perf_counter() - start:.0f} s: {PDF}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
