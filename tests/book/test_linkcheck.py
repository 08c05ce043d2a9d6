"""The check of links: it finds the dead ones, and says nothing of the living."""

import http.server
import socket
import subprocess
import threading
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

import build_book
import linkcheck
from repository import ROOT, Repository

SOUND = """<html id="all"><img src="a%20b.png" srcset="a%20b.png 1x, x/c.svg 2x"><a href="#here">1</a><a href="#">2</a>
<a href="x/two.html#there">3</a><a href="x/">4</a><a href="https://example.org/gone">5</a><a href="mailto:a@b.c">6</a>
<img src="data:image/png;base64,AA"><h1 id="here">7</h1><object data="x/c.svg"></object><p data-src="no.png"></html>"""


@pytest.fixture
def book(tmp_path: Path) -> Path:
    (tmp_path / "x").mkdir()
    (tmp_path / "_static").mkdir()
    (tmp_path / "index.html").write_text(SOUND)
    (tmp_path / "a b.png").touch()
    (tmp_path / "x" / "c.svg").touch()
    (tmp_path / "x" / "index.html").write_text('<a href="../index.html?q=1#here">up</a>')
    (tmp_path / "x" / "two.html").write_text('<a name="there" href="../a%20b.png">picture</a>')
    (tmp_path / "_static" / "template.html").write_text('<script src="{{ pathto() }}"></script>')
    return tmp_path


def test_living_links_pass(book: Path) -> None:
    assert linkcheck.internal(book) == []


@pytest.mark.parametrize(
    ("link", "words"),
    [
        ('<a href="gone.html">', "no such file"),
        ('<img src="gone.png">', "no such file"),
        ('<script src="gone.js"></script>', "no such file"),
        ('<img src="a%20b.png" srcset="gone.png 2x">', "no such file"),
        ('<a href="x/two.html#gone">', "two.html has no such id"),
        ('<a href="#gone">', "page.html has no such id"),
        ('<a href="../outside.html">', "no such file"),
        ('<a href="/x/two.html">', "root of the host"),
    ],
)
def test_dead_links_are_found(book: Path, link: str, words: str) -> None:
    (book.parent / "outside.html").touch()
    (book / "page.html").write_text(link)
    (line,) = linkcheck.internal(book)
    assert line.startswith("page.html: ")
    assert words in line


def test_a_build_with_a_dead_link_is_refused(
    book: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """``make book`` looks at what it built."""
    monkeypatch.setattr(build_book, "HTML", book)
    monkeypatch.setattr(build_book, "BOOK", book)
    monkeypatch.setattr(build_book, "pages", lambda: ["index"])
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: subprocess.CompletedProcess(args, 0))
    assert build_book.main() == 0
    (book / "page.html").write_text('<a href="gone.html">')
    assert build_book.main() == 1
    assert "gone.html: no such file" in capsys.readouterr().err


def test_command_line(book: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert linkcheck.main(["--html", str(book)]) == 0
    (book / "page.html").write_text('<a href="gone.html">')
    assert linkcheck.main(["--html", str(book)]) == 1
    assert "gone.html: no such file" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        linkcheck.main(["--html", str(book / "x" / "nothing")])


def test_addresses_elsewhere(book: Path) -> None:
    own = f"https://{Repository.of(ROOT).pages}/mdp.html"
    issue = "https://github.com/a/b/issues/new?title=x"
    (book / "page.html").write_text(
        "".join(f'<a href="{a}">' for a in ("https://a.b/c#d", "https://a.b/c#e", "//a.b/f", own, issue))
    )
    (book / "x" / "more.html").write_text('<a href="https://a.b/c">')
    assert linkcheck.addresses(book) == {
        "https://a.b/c": ["page.html", "x/more.html"],
        "https://a.b/f": ["page.html"],
    }


class _Site(http.server.BaseHTTPRequestHandler):
    """Answers ``/404`` with 404 and so on; ``/get`` serves no ``HEAD``; ``/tired`` works the second time."""

    seen: Counter[str]

    def do_HEAD(self) -> None:
        self.seen[f"{self.command} {self.path}"] += 1
        status = 200
        if self.path.strip("/").isdigit():
            status = int(self.path.strip("/"))
        elif self.path == "/get" and self.command == "HEAD":
            status = 405
        elif self.path == "/tired" and self.seen["GET /tired"] < 2:
            status = 503
        self.send_response(status)
        if status == 301:
            self.send_header("Location", "/ok")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.do_HEAD()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def site() -> Iterator[str]:
    _Site.seen = Counter()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Site)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.mark.usefixtures("no_proxy")
@pytest.mark.parametrize(
    ("path", "verdict", "pauses", "asked"),
    [
        ("ok", "ok", [], {"HEAD": 1}),
        ("301", "ok", [], {"HEAD": 1}),
        ("get", "ok", [], {"HEAD": 1, "GET": 1}),
        ("404", "dead: 404", [], {"HEAD": 1, "GET": 1}),
        ("403", "refused: 403", [], {"HEAD": 1, "GET": 1}),
        ("tired", "ok", [5.0], {"HEAD": 2, "GET": 2}),
        ("500", "dead: 500", [5.0, 10.0], {"HEAD": 3, "GET": 3}),
        ("429", "refused: 429", [5.0, 10.0], {"HEAD": 3, "GET": 3}),
    ],
)
def test_probe(site: str, path: str, verdict: str, pauses: list[float], asked: dict[str, int]) -> None:
    waited: list[float] = []
    assert linkcheck.probe(f"{site}/{path}", sleep=waited.append) == verdict
    assert waited == pauses
    assert {m: n for m in ("HEAD", "GET") if (n := _Site.seen[f"{m} /{path}"])} == asked


@pytest.mark.usefixtures("no_proxy")
def test_a_host_that_does_not_answer_is_dead() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # nobody listens
        address = f"http://127.0.0.1:{taken.getsockname()[1]}/"
        assert linkcheck.probe(address, tries=2, sleep=lambda s: None).startswith("dead: ")


def test_hosts_are_asked_one_question_at_a_time() -> None:
    busy: Counter[str] = Counter()
    lock = threading.Lock()
    meet = threading.Barrier(2, timeout=10)

    def check(address: str) -> str:
        host = address.split("/")[2]
        with lock:
            busy[host] += 1
            assert busy[host] == 1
        meet.wait()  # passes only if the other host is asked at the same time
        with lock:
            busy[host] -= 1
        return "ok"

    found = [f"https://{host}/{i}" for host in "ab" for i in range(3)]
    assert linkcheck.external(found, pause=0.0, check=check) == dict.fromkeys(found, "ok")


def test_report_and_status(
    book: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (book / "page.html").write_text('<a href="https://a.b/gone"><a href="https://c.d/shy">')
    verdicts = {"https://a.b/gone": "dead: 404", "https://c.d/shy": "refused: 403"}
    monkeypatch.setattr(linkcheck, "external", lambda pages, pause: {p: verdicts[p] for p in pages})
    assert linkcheck.main(["--external", "--html", str(book)]) == 1
    printed = capsys.readouterr().out
    assert "2 addresses asked, 0 answered" in printed
    assert "<https://a.b/gone> (404), in page.html" in printed
    assert printed.index("Refuse robots") < printed.index("https://c.d/shy")
    verdicts["https://a.b/gone"] = "ok"
    assert linkcheck.main(["--external", "--html", str(book)]) == 0
