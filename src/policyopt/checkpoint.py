"""Tensors in safetensors, everything else in JSON, written so that a crash never leaves
half a checkpoint.

A checkpoint is a folder with ``state.json`` and one tensor file that ``state.json``
names. The tensor file is written first under a fresh name, then ``state.json`` is
replaced in one atomic step, then the old tensor file is removed. Whenever the process
dies, the folder holds one complete checkpoint: the old or the new one.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = [
    "has_checkpoint", "load_checkpoint", "optimizer_slots", "optimizer_tensors",
    "rows_from_json", "rows_to_json", "save_checkpoint", "strip",
]  # fmt: skip

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

RowT = TypeVar("RowT")
_STATE = "state.json"


def _fsync(path: Path) -> None:
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def has_checkpoint(folder: str | Path) -> bool:
    """Whether the folder holds a checkpoint."""
    return (Path(folder) / _STATE).exists()


def save_checkpoint(
    folder: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]
) -> Path:
    """Write ``tensors`` and the JSON-serialisable ``metadata`` to ``folder``; return
    the folder.

    An existing checkpoint in the folder is replaced, and stays intact if anything fails
    on the way (full disk, kill). Tensors are copied to the CPU; none may have the type
    ``object`` and no pickle is involved.

    Raises
    ------
    TypeError
        If ``metadata`` cannot be written as JSON.
    OSError
        If the folder cannot be written to, or the disk is full.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    state = folder / _STATE
    previous = None
    if state.exists():
        previous = json.loads(state.read_text(encoding="utf-8"))["tensors"]
    name = f"tensors-{uuid.uuid4().hex[:12]}.safetensors"
    content = {"tensors": name, "metadata": dict(metadata)}
    text = json.dumps(content, indent=1, allow_nan=False)
    scratch = folder / f"{_STATE}.{uuid.uuid4().hex[:12]}"
    try:
        # Clones: safetensors refuses tensors that share memory, such as views of one
        # flat vector.
        copies = {k: t.detach().cpu().clone().contiguous() for k, t in tensors.items()}
        save_file(copies, folder / name)
        _fsync(folder / name)
        scratch.write_text(text, encoding="utf-8")
        _fsync(scratch)
        scratch.replace(state)
    except BaseException as error:
        scratch.unlink(missing_ok=True)
        (folder / name).unlink(missing_ok=True)
        if not isinstance(error, (OSError, SafetensorError)):
            raise
        kept = "it still holds the one of before" if previous else "it holds none"
        raise OSError(
            f"no checkpoint could be written to {folder} ({error}); {kept}. Free some "
            "space there, or choose another folder"
        ) from error
    if previous is not None:
        (folder / Path(previous).name).unlink(missing_ok=True)
    return folder


def load_checkpoint(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`save_checkpoint` wrote: (tensors on the CPU, metadata).

    Raises
    ------
    FileNotFoundError
        If the folder holds no checkpoint.
    """
    folder = Path(folder)
    state = folder / _STATE
    if not state.exists():
        raise FileNotFoundError(f"{folder} holds no checkpoint: {_STATE} is missing")
    content = json.loads(state.read_text(encoding="utf-8"))
    # The name only: a checkpoint from elsewhere must not point out of its folder.
    return load_file(folder / Path(content["tensors"]).name), content["metadata"]


def strip(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """Return the tensors whose names begin with ``prefix``, without it."""
    names = [name for name in tensors if name.startswith(prefix)]
    return {name.removeprefix(prefix): tensors[name] for name in names}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return what an optimiser remembers of each parameter, as ``optimizer.0.name``."""
    return {
        f"optimizer.{index}.{name}": torch.as_tensor(value)
        for index, slot in optimizer.state_dict()["state"].items()
        for name, value in slot.items()
    }


def optimizer_slots(tensors: Mapping[str, Tensor]) -> dict[int, dict[str, Tensor]]:
    """Undo :func:`optimizer_tensors`: the memory of each parameter, by its number."""
    slots: dict[int, dict[str, Tensor]] = {}
    for key, value in strip(tensors, "optimizer.").items():
        index, _, name = key.partition(".")
        slots.setdefault(int(index), {})[name] = value
    return slots


def rows_to_json(rows: Iterable[DataclassInstance]) -> list[dict[str, Any]]:
    """Turn the rows of a history into records; JSON has no NaN, so it becomes None."""
    # NaN is the only value that differs from itself.
    return [_exchange(dataclasses.asdict(r), lambda v: v != v, None) for r in rows]


def rows_from_json(
    row_type: Callable[..., RowT], records: Iterable[dict[str, Any]]
) -> list[RowT]:
    """Undo :func:`rows_to_json`."""
    missing = [_exchange(r, lambda v: v is None, math.nan) for r in records]
    return [row_type(**record) for record in missing]


def _exchange(value: Any, old: Callable[[Any], bool], new: Any) -> Any:
    """Put something else in the place of some values, in dictionaries too."""
    if isinstance(value, dict):
        return {k: _exchange(v, old, new) for k, v in value.items()}
    return new if old(value) else value
