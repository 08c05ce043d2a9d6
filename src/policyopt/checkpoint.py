"""Tensors in safetensors, everything else in JSON, written so that a crash never leaves
half a checkpoint.

A checkpoint is a folder with ``state.json`` and one tensor file that ``state.json``
names. The tensor file is written first under a fresh name, then ``state.json`` is
replaced in one atomic step, then the old tensor file is removed. Whenever the process
dies, the folder holds one complete checkpoint: the old or the new one.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

__all__ = ["has_checkpoint", "load_checkpoint", "save_checkpoint"]

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
    previous = json.loads(state.read_text())["tensors"] if state.exists() else None
    name = f"tensors-{uuid.uuid4().hex[:12]}.safetensors"
    text = json.dumps(
        {"tensors": name, "metadata": dict(metadata)}, indent=1, allow_nan=False
    )
    scratch = folder / f"{_STATE}.{uuid.uuid4().hex[:12]}"
    try:
        # Clones: safetensors refuses tensors that share memory, such as views of one
        # flat vector.
        save_file(
            {key: t.detach().cpu().clone().contiguous() for key, t in tensors.items()},
            folder / name,
        )
        _fsync(folder / name)
        scratch.write_text(text)
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
    content = json.loads(state.read_text())
    # The name only: a checkpoint from elsewhere must not point out of its folder.
    return load_file(folder / Path(content["tensors"]).name), content["metadata"]
