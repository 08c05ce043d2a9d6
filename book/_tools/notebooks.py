"""Chapters as notebooks and as text: make, run and compare them.

A chapter is ``book/NAME.ipynb``, committed with its outputs, and ``book/twins/NAME.md``, the same cells as
MyST Markdown, for authors and reviewers. Nothing here trusts file times: each command says what it writes.

    from-twin NAME...       write the notebook from its twin
    execute [NAME...]       run notebooks in place
    twins [--check]         write every twin from its notebook, or only compare
    setup [--check]         write the setup cell (install on Colab and Binder), or only compare
    new NAME --title TITLE  begin a chapter from the template, with its exercises
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import keyword
import multiprocessing
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

from repository import ROOT, Repository

BOOK = ROOT / "book"
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
CELL_TIMEOUT_S = 900
TOC = ROOT / "_toc.yml"
TEMPLATE = BOOK / "_tools" / "chapter.md"
EXERCISES_TEMPLATE = BOOK / "_tools" / "chapter_exercises.py"
FRONT = BOOK / "index.md"
# What the front page says of a chapter that is still the template.
ROW = "| [{title}]({name}.ipynb) | derive the direction in which {name} moves a policy | 10 | 45 | ¼ | MDPs |"

SETUP_TEMPLATE = """\
# Colab and Binder: install what this chapter needs where it is missing.
import importlib.util
import subprocess
import sys

needed = ("policyopt_book", "matplotlib", "transformers", "peft")
if any(importlib.util.find_spec(name) is None for name in needed):
    package = "policyopt[book] @ git+{url}"
    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", package])
    importlib.invalidate_caches()"""
SETUP_TAGS = ["setup", "hide-cell"]


def setup_source(root: Path = ROOT) -> str:
    """Return the source of the cell that opens a chapter."""
    return SETUP_TEMPLATE.format(url=Repository.of(root).url)


def put_setup_cell(notebook: NotebookNode) -> None:
    """Make the cell tagged ``setup`` current; insert one if there is none."""
    source = setup_source()
    cells = notebook.cells
    cell = next((c for c in cells if "setup" in c.metadata.get("tags", [])), None)
    if cell is None:
        first = next((i for i, c in enumerate(cells) if c.cell_type == "code"), len(cells))
        cell = nbformat.v4.new_code_cell(metadata={"tags": SETUP_TAGS})
        cells.insert(first, cell)
    cell.source = source


def normalise(notebook: NotebookNode) -> NotebookNode:
    """Drop what changes from run to run or machine to machine; give cells ids that follow from their text."""
    notebook.metadata = nbformat.from_dict({"kernelspec": KERNELSPEC, "language_info": {"name": "python"}})
    notebook.nbformat, notebook.nbformat_minor = 4, 5
    seen: dict[str, int] = {}
    for cell in notebook.cells:
        if "setup" in cell.metadata.get("tags", []):
            name = "setup"  # its text holds the repository's address, which may change
        else:
            name = hashlib.sha256(f"{cell.cell_type}\n{cell.source}".encode()).hexdigest()[:12]
        seen[name] = seen.get(name, 0) + 1
        cell.id = name if seen[name] == 1 else f"{name}-{seen[name]}"
        cell.metadata.pop("execution", None)
    nbformat.validate(notebook)
    return notebook


def read(path: Path) -> NotebookNode:
    """Read a notebook."""
    return nbformat.read(path, as_version=4)


def write(notebook: NotebookNode, path: Path) -> None:
    """Write a notebook; no temporary state is ever visible to a reader of ``path``."""
    partial = path.with_suffix(f".{os.getpid()}.tmp")
    partial.write_text(nbformat.writes(normalise(notebook)) + "\n", encoding="utf-8")
    partial.replace(path)


def twin_text(notebook: NotebookNode) -> str:
    """Return the twin of a notebook."""
    text = jupytext.writes(notebook, fmt="md:myst")
    # The tool's version would change every twin whenever the tool is upgraded.
    return re.sub(r"(?m)^ *jupytext_version: .*\n", "", text, count=1)


def twin_path(name: str) -> Path:
    """Return where the twin of chapter ``name`` lives."""
    return BOOK / "twins" / f"{name}.md"


def notebook_path(name: str) -> Path:
    """Return where the notebook of chapter ``name`` lives."""
    return BOOK / f"{name}.ipynb"


def exercises_path(name: str) -> Path:
    """Return where the exercises of chapter ``name`` are checked."""
    return ROOT / "src" / "policyopt_book" / "exercises" / f"{name.replace('-', '_')}.py"


def chapters() -> list[str]:
    """Return the names of all committed notebooks."""
    return sorted(p.stem for p in BOOK.glob("*.ipynb"))


def chosen(names: Iterable[str], exists: Callable[[str], Path]) -> list[str]:
    """Accept ``NAME``, ``NAME.ipynb``, ``NAME.md`` and paths to them; refuse what does not exist."""
    stems = [Path(name).stem for name in names]
    missing = [str(exists(s).relative_to(ROOT)) for s in stems if not exists(s).is_file()]
    if missing:
        raise SystemExit("no such file: " + ", ".join(missing))
    return stems


def code_of(notebook: NotebookNode) -> list[tuple[str, tuple[str, ...]]]:
    """Return what decides the outputs of a notebook: the code cells in order."""
    return [(c.source, tuple(c.metadata.get("tags", []))) for c in notebook.cells if c.cell_type == "code"]


def from_twin(name: str) -> str:
    """Write the notebook of a twin, and the twin in its canonical form.

    Outputs are kept if not one code cell differs: then only prose was edited. Else all are dropped, for the
    output of a cell depends on every cell above it.
    """
    twin, target = twin_path(name), notebook_path(name)
    notebook = jupytext.reads(twin.read_text(encoding="utf-8"), fmt="md:myst")
    put_setup_cell(notebook)
    kept = False
    if target.exists():
        old = read(target)
        kept = code_of(old) == code_of(notebook)
        if kept:
            ran = [c for c in old.cells if c.cell_type == "code"]
            for cell, before in zip((c for c in notebook.cells if c.cell_type == "code"), ran, strict=True):
                cell.outputs, cell.execution_count = before.outputs, before.execution_count
    write(notebook, target)
    twin.write_text(twin_text(read(target)), encoding="utf-8")
    return "outputs kept" if kept else "to be executed"


def committed_problem(cell: NotebookNode, position: int) -> str | None:
    """Say what is wrong with a committed code cell, the ``position``-th (from 1) of its notebook."""
    if not cell.source.strip():
        return "the cell is empty: delete it"
    if cell.execution_count is None:
        return "the cell was committed without being executed: run `make execute`"
    if cell.execution_count != position:
        return (
            f"the cell was executed as number {cell.execution_count} but stands at {position}: "
            "run `make execute`, which runs cells top to bottom"
        )
    expected = "raises-exception" in cell.metadata.get("tags", [])
    if not expected and any(out.output_type == "error" for out in cell.outputs):
        return "the cell was committed with an error as its output: mend it and run `make execute`"
    if any(out.output_type == "stream" and out.name == "stderr" for out in cell.outputs):
        return (
            "the cell was committed with a warning or a progress bar: mend the cause and run `make execute`"
        )
    return None


# What the kernels of `execute` and of the tests run under. Progress bars write to stderr, which nbval takes for a
# failure, and never look the same twice. One thread: sums then have one order, on any number of cores. tqdm, which
# transformers imports, warns in every notebook that it cannot draw its bars without ipywidgets.
KERNEL_ENVIRONMENT = {
    "TQDM_DISABLE": "1",
    "OMP_NUM_THREADS": "1",
    "PYTHONWARNINGS": "ignore:IProgress not found",
}


@dataclass(frozen=True)
class Run:
    """What the execution of one notebook cost, and its error if it failed."""

    name: str
    wall_s: float
    cpu_s: float
    error: str | None


def execute(name: str) -> Run:
    """Run a notebook in place with a fresh kernel; leave the file alone when a cell fails."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    os.environ.update(KERNEL_ENVIRONMENT)
    path = notebook_path(name)
    notebook = read(path)
    put_setup_cell(notebook)
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT_S,
        kernel_name=KERNELSPEC["name"],
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(BOOK)}},
    )
    start, error = time.perf_counter(), None
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as failure:
        error = str(failure)
    else:
        write(notebook, path)
    # This process ran one kernel, so its children are that kernel and whatever the kernel started.
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return Run(name, time.perf_counter() - start, used.ru_utime + used.ru_stime, error)


def execute_all(names: list[str], jobs: int) -> list[Run]:
    """Run notebooks, ``jobs`` at a time, and report each as it ends."""
    from concurrent.futures import as_completed

    context = multiprocessing.get_context("spawn")
    runs = []
    with ProcessPoolExecutor(jobs, mp_context=context, max_tasks_per_child=1) as pool:
        for future in as_completed([pool.submit(execute, name) for name in names]):
            run = future.result()
            runs.append(run)
            verdict = "ok" if run.error is None else "FAILED, file left as it was"
            print(f"{run.name:<24} {run.wall_s:7.1f} s wall {run.cpu_s:7.1f} s CPU  {verdict}", flush=True)
            if run.error is not None:
                print(run.error, file=sys.stderr)
    return runs


def difference(expected: str, found: str, label: str, found_in: str) -> str:
    """Return a unified diff, empty when the texts agree."""
    lines = (expected.splitlines(keepends=True), found.splitlines(keepends=True))
    return "".join(difflib.unified_diff(*lines, fromfile=f"{label} (from the notebook)", tofile=found_in))


def pair_problems(name: str) -> str:
    """Return how a notebook and its twin disagree; empty when they do not."""
    twin, notebook = twin_path(name), notebook_path(name)
    if not twin.exists():
        return f"{notebook.relative_to(ROOT)} has no twin; run: make twins\n"
    if not notebook.exists():
        return f"{twin.relative_to(ROOT)} has no notebook: delete it, or run from-twin and execute\n"
    label = str(twin.relative_to(ROOT))
    return difference(twin_text(read(notebook)), twin.read_text(encoding="utf-8"), label, label)


def pairs() -> list[str]:
    """Return the names of all chapters, whichever side exists."""
    return sorted({*chapters(), *(p.stem for p in (BOOK / "twins").glob("*.md"))})


def setup_is_current(name: str) -> bool:
    """Say whether a notebook opens with the present setup cell."""
    notebook = read(notebook_path(name))
    first = next((c for c in notebook.cells if c.cell_type == "code"), None)
    return first is not None and first.source == setup_source() and first.metadata.get("tags") == SETUP_TAGS


def write_setup(name: str) -> None:
    """Put the present setup cell into a notebook and its twin."""
    notebook = read(notebook_path(name))
    put_setup_cell(notebook)
    write(notebook, notebook_path(name))
    twin_path(name).write_text(twin_text(read(notebook_path(name))), encoding="utf-8")


def complaints(name: str, title: str) -> list[str]:
    """Say why a chapter cannot have this name or this title; empty when it can."""
    found = []
    if not re.fullmatch(r"[a-z][a-z0-9]*(-[a-z0-9]+)*", name) or len(name) > 40:
        found.append(
            f"NAME must be lower-case letters and digits, in words joined by single hyphens, beginning with a "
            f"letter, at most 40 characters, such as my-chapter; got {name!r}"
        )
    elif keyword.iskeyword(name):
        found.append(f"NAME becomes the name of a Python module, and {name!r} is a word of the language")
    else:
        used = [notebook_path(name), twin_path(name), BOOK / f"{name}.md", BOOK / name, exercises_path(name)]
        found += [
            f"{path.relative_to(ROOT)} exists already; choose another NAME" for path in used if path.exists()
        ]
        if re.search(rf"(?m)^ *- file: {name}$", TOC.read_text(encoding="utf-8")):
            found.append(f"{TOC.name} names {name} already; choose another NAME")
    if not re.fullmatch(r"\w([\w ,.:;!?'’()&+/–-]*[\w!?)])?", title) or "_" in title or len(title) > 100:
        found.append(
            "TITLE must be one line of words and plain punctuation, at most 100 characters, such as "
            f"'My chapter: a start'; got {title!r}"
        )
    return found


def with_chapter(toc: str, name: str) -> str:
    """Return the table of contents with a chapter put behind the last one that is a notebook."""
    entries = re.finditer(r"(?m)^( *- file: )([\w/-]+) *\n", toc)
    last = max((e for e in entries if notebook_path(e[2]).is_file()), key=lambda e: e.end(), default=None)
    if last is None:
        raise SystemExit(f"{TOC.name} names no notebook, behind which the chapter would go")
    return f"{toc[: last.end()]}{last[1]}{name}\n{toc[last.end() :]}"


def with_row(front: str, name: str, title: str) -> str:
    """Return the front page with a chapter put behind the last one of its map."""
    rows = list(re.finditer(r"(?m)^\| \[.+?\]\([\w-]+\.ipynb\) \|.*\n", front))
    if not rows:
        raise SystemExit(f"{FRONT.name} has no map of the chapters, into which the chapter would go")
    end = rows[-1].end()
    return f"{front[:end]}{ROW.format(name=name, title=title)}\n{front[end:]}"


def new(name: str, title: str) -> int:
    """Write a chapter that works from the template, run it, and add it to the book; return the exit status.

    If it cannot be run, nothing is left behind.
    """
    if found := complaints(name, title):
        print("\n".join(found), file=sys.stderr)
        return 1
    # If one of these is impossible, say so before anything is written.
    with_chapter(TOC.read_text(encoding="utf-8"), name)
    with_row(FRONT.read_text(encoding="utf-8"), name, title)
    sources = {twin_path(name): TEMPLATE, exercises_path(name): EXERCISES_TEMPLATE}
    written = [*sources, notebook_path(name)]
    sound = False
    try:
        for target, source in sources.items():
            text = source.read_text(encoding="utf-8").replace("@NAME@", name).replace("@TITLE@", title)
            target.write_text(text, encoding="utf-8")
        from_twin(name)
        error = execute(name).error
        sound = error is None
    finally:
        if not sound:
            for path in written:
                path.unlink(missing_ok=True)
    if error is not None:
        print(f"the template does not run, so nothing was written:\n{error}", file=sys.stderr)
        return 1
    TOC.write_text(with_chapter(TOC.read_text(encoding="utf-8"), name), encoding="utf-8")
    FRONT.write_text(with_row(FRONT.read_text(encoding="utf-8"), name, title), encoding="utf-8")
    print("\n".join(str(path.relative_to(ROOT)) for path in [*written, TOC, FRONT]))
    print("These work as they are. Replace them part by part: CONTRIBUTING.md, Add a chapter.")
    return 0


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("from-twin", help="write notebooks from their twins")
    command.add_argument("names", nargs="+", metavar="NAME")
    command = commands.add_parser("execute", help="run notebooks in place")
    command.add_argument("names", nargs="*", metavar="NAME", help="default: all")
    command.add_argument("-j", "--jobs", type=int, default=min(4, os.cpu_count() or 1), help="at a time")
    for name, text in (("twins", "twins from notebooks"), ("setup", "the setup cell")):
        command = commands.add_parser(name, help=f"write {text}, or compare")
        command.add_argument("--check", action="store_true", help="only compare; exit 1 on a difference")
    command = commands.add_parser("new", help="begin a chapter from the template")
    command.add_argument("name", metavar="NAME", help="of its files and of its page: my-chapter")
    command.add_argument("--title", required=True, help="its heading")
    args = parser.parse_args(argv)

    if args.command == "new":
        return new(args.name, args.title)
    if args.command == "from-twin":
        for name in chosen(args.names, twin_path):
            print(f"{notebook_path(name).relative_to(ROOT)}: {from_twin(name)}")
        return 0
    if args.command == "execute":
        if args.jobs < 1:
            parser.error(f"--jobs must be at least 1, got {args.jobs}")
        runs = execute_all(chosen(args.names or chapters(), notebook_path), args.jobs)
        return int(any(run.error for run in runs))
    if args.command == "twins":
        if not args.check:
            for name in chapters():
                twin_path(name).parent.mkdir(exist_ok=True)
                twin_path(name).write_text(twin_text(read(notebook_path(name))), encoding="utf-8")
        problems = "".join(pair_problems(name) for name in pairs())
        print(problems or f"{len(pairs())} pairs agree")
        return int(bool(problems))
    stale = [name for name in chapters() if not setup_is_current(name)]
    if not args.check:
        for name in stale:
            write_setup(name)
    done = "stale in" if args.check else "written to"
    print(f"setup cell {done}: {', '.join(stale)}" if stale else "setup cells are current")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
