"""Follow the links of the built book.

Usage::

    python book/_tools/linkcheck.py               every link within the book leads to a page, a file, a heading
    python book/_tools/linkcheck.py --external    every address elsewhere answers (asks the network, minutes)

``make book`` does the first. The second is for the weekly run: other people's sites fail for reasons of their own, so
it never decides about a change.
"""

from __future__ import annotations

import argparse
import re
import sys
import time
import urllib.error
import urllib.request
from collections import defaultdict
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urldefrag, urlsplit

from repository import ROOT, Repository

HTML = ROOT / "book" / "_build" / "html"
ADDRESSES = {"href", "src", "poster", "data"}
# Anchors that mean a place in every page, without an element of that name.
EVERYWHERE = {"", "top"}
# Not asked: addresses of examples, those that start work elsewhere, those that need a login.
SKIPPED = re.compile(
    r"https?://(?:[\w.-]*\bexample\.(?:org|com|net)|localhost|127\.0\.0\.1|mybinder\.org/v2/|github\.com/[^/]+/[^/]+/"
    r"(?:issues/new|edit/))"
)
USER_AGENT = "Mozilla/5.0 (compatible; policyopt-linkcheck)"
REFUSALS = {401, 403, 406, 429, 451, 999}  # "not to a robot": says nothing about the page
PASSING = {408, 425, 429, 500, 502, 503, 504}


@dataclass
class Page:
    """What a page of HTML refers to, and what can be referred to in it."""

    links: list[str] = field(default_factory=list)
    ids: set[str] = field(default_factory=set)


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.page = Page()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if value is None:
                continue
            if name == "id" or (name == "name" and tag == "a"):
                self.page.ids.add(value)
            elif name in ADDRESSES and (name != "data" or tag == "object"):
                self.page.links.append(value.strip())
            elif name == "srcset":
                self.page.links += [part.split()[0] for part in value.split(",") if part.strip()]


def read(file: Path) -> Page:
    """Read a page of HTML."""
    reader = _Reader()
    reader.feed(file.read_text(encoding="utf-8"))
    return reader.page


def pages_of(html: Path) -> list[Path]:
    """Return the pages of the built book, without the templates that the theme leaves among the static files."""
    return [file for file in sorted(html.rglob("*.html")) if "_static" not in file.relative_to(html).parts]


def internal(html: Path = HTML) -> list[str]:
    """Return the links within the book that lead nowhere.

    Parameters
    ----------
    html : Path
        The folder of the built book.

    Returns
    -------
    list of str
        One line per dead link: page, link, and what is missing.
    """
    root = html.resolve()
    pages = {file: read(file) for file in pages_of(root)}
    found = []
    for file, page in pages.items():
        for link in dict.fromkeys(page.links):
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            if parts.path.startswith("/"):
                found.append(
                    f"{file.relative_to(root)}: {link}: from the root of the host; the book is in a folder"
                )
                continue
            target = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if target.is_dir():
                target /= "index.html"
            if not target.is_relative_to(root) or not target.is_file():
                found.append(f"{file.relative_to(root)}: {link}: no such file")
            elif target in pages and unquote(parts.fragment) not in pages[target].ids | EVERYWHERE:
                found.append(f"{file.relative_to(root)}: {link}: {target.name} has no such id")
    return found


def addresses(html: Path = HTML) -> dict[str, list[str]]:
    """Return the addresses elsewhere that the book refers to, with the pages that do."""
    found: dict[str, set[str]] = defaultdict(set)
    own = f"https://{Repository.of(ROOT).pages}/"  # the canonical addresses of the pages themselves
    for file in pages_of(html):
        for link in read(file).links:
            if link.startswith("//"):
                link = f"https:{link}"
            if re.match(r"https?://", link) and not SKIPPED.match(link) and not link.startswith(own):
                found[urldefrag(link).url].add(file.relative_to(html).as_posix())
    return {address: sorted(pages) for address, pages in sorted(found.items())}


def ask(address: str, method: str, timeout: float) -> int:
    """Ask for an address once; return the status.

    Raises
    ------
    OSError
        If there is no answer: no such host, no connection, no time left, a bad certificate.
    """
    headers = {"User-Agent": USER_AGENT, "Accept": "text/html,*/*"}
    try:
        with urllib.request.urlopen(
            urllib.request.Request(address, method=method, headers=headers), timeout=timeout
        ) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        error.close()
        return error.code


def probe(
    address: str,
    *,
    tries: int = 3,
    timeout: float = 20.0,
    pause: float = 5.0,
    sleep: Callable[[float], None] = time.sleep,
) -> str:
    """Find out whether an address answers: ``HEAD`` first, ``GET`` where that is not served, again after a pause.

    Parameters
    ----------
    address : str
        Where to ask.
    tries : int
        How often, at most.
    timeout : float
        Seconds to wait for an answer.
    pause : float
        Seconds before the second try; twice as many before the third, and so on.
    sleep : callable
        Waits that long.

    Returns
    -------
    str
        ``"ok"``, ``"refused: …"`` where robots are sent away, or ``"dead: …"``.
    """
    verdict = ""
    for attempt in range(tries):
        if attempt:
            sleep(pause * 2 ** (attempt - 1))
        try:
            status = ask(address, "HEAD", timeout)
            if status >= 400:
                status = ask(address, "GET", timeout)
        except (OSError, ValueError) as error:
            verdict = f"dead: {getattr(error, 'reason', error)}"
            continue
        if status < 400:
            return "ok"
        verdict = f"{'refused' if status in REFUSALS else 'dead'}: {status}"
        if status not in PASSING:
            break
    return verdict


def external(
    found: Iterable[str], *, pause: float = 1.0, hosts: int = 8, check: Callable[[str], str] = probe
) -> dict[str, str]:
    """Ask every address: one at a time at each host, with a pause in between, several hosts at once.

    Parameters
    ----------
    found : iterable of str
        The addresses.
    pause : float
        Seconds between two questions to one host.
    hosts : int
        How many hosts to ask at once.
    check : callable
        Asks one address.

    Returns
    -------
    dict of str to str
        What was found out of each address, see :func:`probe`.
    """
    queues: dict[str, list[str]] = defaultdict(list)
    for address in found:
        queues[urlsplit(address).netloc].append(address)

    def one_host(queue: list[str]) -> dict[str, str]:
        verdicts = {}
        for i, address in enumerate(queue):
            if i:
                time.sleep(pause)
            verdicts[address] = check(address)
        return verdicts

    with ThreadPoolExecutor(hosts) as pool:
        return {a: verdict for part in pool.map(one_host, queues.values()) for a, verdict in part.items()}


def report(verdicts: dict[str, str], pages: dict[str, list[str]]) -> str:
    """Return what to mend and what to look at, as Markdown."""
    lines = [f"{len(verdicts)} addresses asked, {sum(v == 'ok' for v in verdicts.values())} answered."]
    for kind, title in (("dead", "Lead nowhere"), ("refused", "Refuse robots; look at them yourself")):
        chosen = [(a, v) for a, v in sorted(verdicts.items()) if v.startswith(kind)]
        if chosen:
            lines += ["", f"{title}:", ""]
            lines += [f"- <{a}> ({v.partition(': ')[2]}), in {', '.join(pages[a][:3])}" for a, v in chosen]
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status: 1 if a link is dead."""
    parser = argparse.ArgumentParser(description="Follow the links of the built book.")
    parser.add_argument("--external", action="store_true", help="ask the addresses elsewhere")
    parser.add_argument("--html", type=Path, default=HTML, help="the folder of the built book")
    parser.add_argument("--pause", type=float, default=1.0, help="seconds between two questions to one host")
    options = parser.parse_args(argv)
    if not (options.html / "index.html").is_file():
        parser.error(f"{options.html} holds no book; run `make book` first")
    if options.external:
        pages = addresses(options.html)
        verdicts = external(pages, pause=options.pause)
        print(report(verdicts, pages))
        return int(any(v.startswith("dead") for v in verdicts.values()))
    dead = internal(options.html)
    print("\n".join(dead) or "every link within the book leads somewhere")
    return int(bool(dead))


if __name__ == "__main__":
    sys.exit(main())
