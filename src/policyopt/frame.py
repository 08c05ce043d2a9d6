"""The frame of a training run: how it starts, records, diverges, is interrupted, writes
a checkpoint and goes on. Both halves of the package build on it. No learning happens
here, and nothing here knows an environment, a language model or a second process.

The order of events is fixed. Whoever makes a run prepares everything that belongs to
its first moment: networks, optimiser, reference policy. Entering the ``with`` block
then reads the checkpoint, if there is one, and only after that lets the half spread or
compile what it likes (:meth:`Frame._enter`).
"""

from __future__ import annotations

import dataclasses
import json
import math
import time
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from policyopt import checkpoint
from policyopt.runs import History, Settings, TrainingDivergedError, check_seed

__all__ = ["Callback", "Frame", "Row", "Statistics", "read_run", "run_metadata"]

Callback = Callable[[Any], bool | None]
"""Called with every row of the history; a true return value stops the training."""


@dataclass(frozen=True, kw_only=True)
class Row:
    """One row of a history: what a trainer reports after an update."""

    update: int
    """Number of the update, from 1."""

    headline: ClassVar[tuple[str, ...]] = ()
    """Fields that the progress bar shows."""
    may_be_nan: ClassVar[tuple[str, ...]] = ()
    """Fields that are NaN where they were not measured or are not defined; any other
    NaN means that the training diverged."""


_FORMAT = 2

RowT = TypeVar("RowT", bound=Row)
ConfigT = TypeVar("ConfigT", bound=Settings)


class Statistics:
    """Named numbers, gathered piece by piece without waiting for the GPU."""

    def __init__(self) -> None:
        self._pieces: list[dict[str, Tensor]] = []

    def add(self, **values: Tensor) -> None:
        """Note numbers for each name; the names are the same for every piece."""
        self._pieces.append({name: value.detach() for name, value in values.items()})

    @property
    def names(self) -> tuple[str, ...]:
        """What was noted."""
        return tuple(self._pieces[0]) if self._pieces else ()

    def __getitem__(self, name: str) -> Tensor:
        """Return what was noted under a name, piece by piece; 0 without a piece."""
        noted = [piece[name].flatten() for piece in self._pieces]
        return torch.cat(noted) if noted else torch.zeros(1)

    def means(self, *names: str) -> dict[str, float]:
        """Return means over the pieces, by name; without names, of all."""
        names = names or self.names
        means = torch.stack([self[name] for name in names], 1).mean(0).tolist()
        return dict(zip(names, means, strict=True))


def run_metadata(
    run: Any, identity: Mapping[str, Any], state: Mapping[str, Any]
) -> dict[str, Any]:
    """Describe a run for a checkpoint, as JSON.

    ``run`` has an algorithm, a seed, a config and a history. A run that goes on from
    the checkpoint must share the first three with it, and ``identity``.
    """
    shared = {"algorithm": run.algorithm, "seed": run.seed, **identity}
    shared["config"] = dataclasses.asdict(run.config)
    rows = checkpoint.rows_to_json(run.history)
    return {"format": _FORMAT, "identity": shared, "state": state, "history": rows}


def read_run(folder: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read a checkpoint that holds a run: its tensors, and its :func:`run_metadata`."""
    tensors, metadata = checkpoint.load_checkpoint(folder)
    if metadata.get("format") != _FORMAT:
        raise ValueError(
            f"{folder} holds a checkpoint of format {metadata.get('format')!r}, this "
            f"version reads format {_FORMAT}; give another folder to start afresh"
        )
    return tensors, metadata


class Frame(ABC, Generic[ConfigT, RowT]):
    """The frame of a training loop.

    A trainer makes one, loops over :meth:`updates` inside ``with run:``, calls
    :meth:`log` at the end of each update, and returns :meth:`result` after the block.
    """

    unit: ClassVar[str] = "update"
    """What :meth:`position` counts."""
    kept: ClassVar[str] = "the last good one"
    """What a run that diverged has, besides what the update before left."""
    remedy: ClassVar[str] = "a lower learning rate"
    """What to try when a run diverges."""
    may_change: ClassVar[tuple[str, ...]] = ()
    """Settings that a run which goes on may have changed."""

    def __init__(
        self,
        algorithm: str,
        name: str,
        config: ConfigT,
        row_type: type[RowT],
        *,
        seed: int,
        callback: Callback | None,
        progress: bool,
        checkpoint_dir: str | Path | None,
        checkpoint_every: int,
    ) -> None:
        self.algorithm, self.name, self.config = algorithm, name, config
        self.seed, self.callback = check_seed(seed), callback
        self.history: History[RowT] = History()
        self.stop_reason = "budget"
        self._row_type, self._shows_bar = row_type, progress
        self._folder = None if checkpoint_dir is None else Path(checkpoint_dir)
        self._every, self._stopped = checkpoint_every, False
        self._bar: tqdm[Any] | None = None
        self._seconds, self._started = 0.0, time.perf_counter()

    # --- what a half adds ---

    @property
    @abstractmethod
    def position(self) -> tuple[int, int]:
        """How far the run is, and how far it is to go, in :attr:`unit`."""

    @abstractmethod
    def result(self) -> Any:
        """Return what was learned so far."""

    @abstractmethod
    def _common(self, **fields: Any) -> dict[str, Any]:
        """Fields of the row about to be logged that all algorithms of the half have."""

    @abstractmethod
    def _identity(self) -> dict[str, Any]:
        """Return what a run that goes on must share with the one that stopped."""

    @abstractmethod
    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """Return everything that a checkpoint holds, as tensors and as JSON."""

    @abstractmethod
    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        """Take over what :meth:`_state` returned; ValueError if it does not fit."""

    def _enter(self) -> None:
        """Begin: a checkpoint has been read, the first update has not been made."""

    def _prepare_update(self) -> None:
        """Set what an update needs before it: learning rate, seed, mode."""

    def _recorded(self) -> None:
        """Keep what the last good update left; its row is in the history."""

    def _saved(self) -> None:
        """Do what follows a checkpoint that is not the last."""

    def _revert(self, error: BaseException) -> bool:
        """Undo an update that broke off; say whether there still is a result."""
        return True

    def _leave(self, error: BaseException | None) -> None:
        """End, however it ends: undo what :meth:`_enter` did."""

    def _write(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        assert self._folder is not None
        checkpoint.save_checkpoint(self._folder, tensors, metadata)

    # --- the loop's interface ---

    @property
    def update(self) -> int:
        """Updates finished so far."""
        return len(self.history)

    @property
    def unfinished(self) -> bool:
        """Whether there is an update left to make."""
        done, total = self.position
        return not self._stopped and done < total

    @property
    def seconds(self) -> float:
        """Wall-clock time of the training so far, that before a checkpoint included."""
        return self._seconds + time.perf_counter() - self._started

    def updates(self) -> Iterator[int]:
        """Yield the number of each update to make, from 0 or a checkpoint's."""
        while self.unfinished:
            self._prepare_update()
            yield self.update

    def log(self, **fields: Any) -> None:
        """Record an update, write a checkpoint when one is due, ask the callback.

        Raises
        ------
        FloatingPointError
            If a field is not finite that should be.
        """
        row = self._row_type(update=self.update + 1, **self._common(**fields))
        numbers = {k: v for k, v in vars(row).items() if isinstance(v, float)}
        odd = {k: v for k, v in numbers.items() if not math.isfinite(v)}
        bad = [k for k, v in odd.items() if math.isinf(v) or k not in row.may_be_nan]
        if bad:
            raise FloatingPointError(f"{', '.join(bad)} not finite")
        self._recorded()
        self.history.append(row)
        done, total = self.position
        if self._bar is not None:
            self._bar.update(min(done, total) - self._bar.n)
            shown = {k: v for k in row.headline if not math.isnan(v := getattr(row, k))}
            self._bar.set_postfix(shown, refresh=False)
        last = not self.unfinished
        due = last or self.update % self._every == 0
        if self._folder is not None and due:
            self._checkpoint()
            if not last:
                self._saved()
        if self.callback is not None and self.callback(row):
            self.stop_reason, self._stopped = "callback", True
            if self._folder is not None and not due:
                self._checkpoint()

    # --- checkpoints ---

    def _checkpoint(self) -> None:
        tensors, state = self._state()
        state["seconds"] = self.seconds
        self._write(tensors, run_metadata(self, self._identity(), state))

    def _resume(self, folder: Path) -> None:
        tensors, metadata = read_run(folder)
        # Through JSON: what is read back must compare equal to what is there.
        ours = json.loads(json.dumps(run_metadata(self, self._identity(), {})))
        theirs, ours = metadata["identity"], ours["identity"]
        theirs, ours = theirs | theirs.pop("config"), ours | ours.pop("config")
        for name, mine in ours.items():
            if name not in self.may_change and theirs.get(name) != mine:
                raise ValueError(
                    f"{folder} holds a run with {name} {theirs.get(name)!r}, this one "
                    f"has {mine!r}; give another folder to start afresh, or begin as "
                    "it did"
                )
        try:
            self._restore(tensors, metadata["state"])
        except (KeyError, RuntimeError, ValueError) as error:
            raise ValueError(f"{folder} does not fit this run: {error}") from error
        rows = checkpoint.rows_from_json(self._row_type, metadata["history"])
        self.history.extend(rows)
        self._seconds = float(metadata["state"]["seconds"])

    # --- how it begins and ends ---

    def __enter__(self) -> Self:
        try:
            if self._folder:
                self._folder.mkdir(parents=True, exist_ok=True)
                if checkpoint.has_checkpoint(self._folder):
                    self._resume(self._folder)
            self._enter()
        except BaseException as error:
            self._leave(error)
            raise
        if self._shows_bar:
            done, total = self.position
            self._bar = tqdm(
                desc=f"{self.algorithm} {self.name} seed {self.seed}", total=total,
                initial=done, unit=self.unit, unit_scale=total > 10**4,
            )  # fmt: skip
        self._started = time.perf_counter()
        return self

    def __exit__(self, kind: object, error: BaseException | None, tb: object) -> bool:
        if self._bar is not None:
            self._bar.close()
        self._leave(error)
        if error is None:
            return False
        there = self._folder and checkpoint.has_checkpoint(self._folder)
        saved = f"; the last checkpoint is in {self._folder}" if there else ""
        if not self._revert(error):
            error.add_note(f"This process has no result{saved}")
            return False
        done, total = self.position
        made = f"{done} of {total} {self.unit}s"
        if isinstance(error, KeyboardInterrupt):
            self.stop_reason = "interrupted"
            what = f"interrupted after {made}; returning what was learned so far{saved}"
            warnings.warn(f"{self.algorithm} {what}", stacklevel=3)
            return True
        self.stop_reason = f"{type(error).__name__}: {error}"
        if isinstance(error, FloatingPointError):
            raise TrainingDivergedError(
                f"{error} in update {self.update + 1} (seed {self.seed}, {made}). The "
                f"exception's .result holds what update {self.update} left, "
                f"{self.kept}{saved}. Try {self.remedy}.",
                self.result(),
            ) from error
        # Whatever else broke (an environment, a reward function), what was learned must
        # not be lost with it.
        error.__dict__["result"] = self.result()
        error.add_note(f"What was learned so far is in this exception's .result{saved}")
        return False
