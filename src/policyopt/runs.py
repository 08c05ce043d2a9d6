"""What every training run needs, whatever it trains: settings, a history, streams of
seeds, many seeds at once.
"""

from __future__ import annotations

import copy
import csv
import dataclasses
import difflib
import math
import multiprocessing
import os
import pickle
import re
import sys
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from types import NoneType, UnionType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, TypeVar, overload

import cloudpickle
import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from policyopt._checks import require

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = [
    "History", "Settings", "TrainingDivergedError", "derive_seed", "resolve_device",
    "train_seeds",
]  # fmt: skip

RowT = TypeVar("RowT", bound="DataclassInstance")
ResultT = TypeVar("ResultT")
KeyT = TypeVar("KeyT")


@dataclass(frozen=True)
class Bound:
    """A condition on a number, in an annotation: ``Annotated[float, Bound(…)]``."""

    text: str
    holds: Callable[[Any], bool]

    def __repr__(self) -> str:
        return self.text


Count = Annotated[int, Bound(">= 1", lambda x: x >= 1)]
"""An integer ≥ 1."""
Positive = Annotated[float, Bound("> 0", lambda x: x > 0)]
"""A finite number > 0."""
NonNegative = Annotated[float, Bound(">= 0", lambda x: x >= 0)]
"""A finite number ≥ 0."""
Share = Annotated[float, Bound("in [0, 1]", lambda x: 0 <= x <= 1)]
"""A number in [0, 1]."""


class _Fields(type):
    """Makes a config: translates names of the last version, and names a wrong one."""

    def __call__(cls: Any, **values: Any) -> Any:
        for old in values.keys() & cls.renamed.keys():
            _warn_renamed(cls.__name__, old, cls.renamed[old])
            values[cls.renamed[old]] = values.pop(old)
        known = [f.name for f in dataclasses.fields(cls) if f.init]
        for name in values.keys() - set(known):
            near = [cls.elsewhere[name]] if name in cls.elsewhere else []
            near = near or difflib.get_close_matches(name, known, 1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise TypeError(f"{cls.__name__} has no field {name!r}{hint}")
        return super().__call__(**values)


def _warn_renamed(owner: str, old: str, new: str) -> None:
    message = f"{owner}: {old} is called {new} now; the old name goes in version 0.3"
    warnings.warn(message, DeprecationWarning, stacklevel=3)


@dataclass(frozen=True, kw_only=True)
class Settings(metaclass=_Fields):
    """Base of every config: a frozen dataclass, checked against its annotations.

    Use ``dataclasses.replace`` to change a field.
    """

    renamed: ClassVar[dict[str, str]] = {}
    """Fields by their names in the last version, still understood."""
    elsewhere: ClassVar[dict[str, str]] = {}
    """Fields of other configs that one may look for here, and what to use instead."""

    def __post_init__(self) -> None:
        hints = typing.get_type_hints(type(self), include_extras=True)
        for name in (field.name for field in dataclasses.fields(self)):
            value, options = getattr(self, name), _options(hints[name])
            fits = any(_fits(value, kind) for kind, *_ in options)
            self._check(name, fits, " | ".join(_describe(kind) for kind, *_ in options))
            bounds = [bound for _, *own in options for bound in own]
            suffix = " or None" if (NoneType,) in options else ""
            for bound in bounds if value is not None else ():
                self._check(name, bound.holds(value), bound.text + suffix)

    def __getattr__(self, name: str) -> Any:
        if new := self.renamed.get(name):
            _warn_renamed(type(self).__name__, name, new)
            return getattr(self, new)
        raise AttributeError(f"{type(self).__name__} has no field {name!r}")

    def _check(self, name: str, ok: bool, allowed: str) -> None:
        require(ok, f"{name} must be {allowed}", getattr(self, name))


def _options(hint: Any) -> list[tuple[Any, ...]]:
    """Return the types that an annotation allows, each followed by its bounds."""
    if typing.get_origin(hint) in (typing.Union, UnionType):
        return [option for part in typing.get_args(hint) for option in _options(part)]
    return [typing.get_args(hint) if typing.get_origin(hint) is Annotated else (hint,)]


def _describe(hint: Any) -> str:
    """Say what an annotation allows, for an error message."""
    plain = isinstance(hint, type) and not typing.get_args(hint)
    text = hint.__name__ if plain else str(hint).removeprefix("typing.")
    return text.replace("NoneType", "None").replace("float", "finite float")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type of a config's annotation.

    An int will do for a float; NaN and infinity will not.
    """
    origin, options = typing.get_origin(hint), typing.get_args(hint)
    if origin is Literal:
        return value in options
    if origin in (dict, tuple):  # of a dictionary, the keys
        return isinstance(value, origin) and all(_fits(x, options[0]) for x in value)
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if hint is float:
        return number and math.isfinite(value)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


def check_seed(seed: Any) -> int:
    """Return a seed as an integer ≥ 0, or refuse it (Booleans too)."""
    whole = isinstance(seed, (int, np.integer)) and not isinstance(seed, bool)
    require(whole and seed >= 0, "seed must be an integer >= 0", seed)
    return int(seed)


def resolve_device(name: str) -> torch.device:
    """Return the device for a config's ``device`` field; ``"auto"`` takes cuda, then
    mps, then cpu.

    Under ``torchrun`` or ``accelerate launch``, "auto" gives each process a GPU of its
    own.

    Raises
    ------
    ValueError
        If PyTorch does not know the name, or the machine does not have the device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            # One of several processes, started by torchrun or accelerate, takes the GPU
            # of its number.
            rank = os.environ.get("LOCAL_RANK")
            return torch.device("cuda", int(rank)) if rank else torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            "device must be 'auto' or a device that this machine has (such as 'cpu'), "
            f"got {name!r}: {str(error).splitlines()[0]}"
        ) from error
    return device


def derive_seed(*path: int) -> int:
    """Hash integers ≥ 0, such as (seed, step, purpose), into a seed of 63 bits.

    Streams that differ anywhere in the path are independent, and none has to be carried
    along: a run that is resumed at step 1,000 draws what the uninterrupted run draws
    there.

    Examples
    --------
    >>> derive_seed(0, 1) == derive_seed(0, 1), derive_seed(0, 1) == derive_seed(1, 0)
    (True, False)
    """
    return int(np.random.SeedSequence(list(path)).generate_state(1, np.uint64)[0]) >> 1


class History(list[RowT]):
    """The rows of a run, one per update; a list with columns."""

    def column(self, name: str) -> NDArray[Any]:
        """Return one field of every row.

        Raises
        ------
        ValueError
            If the rows have no such field.
        """
        names = [f.name for f in dataclasses.fields(self[0])] if self else [name]
        require(name in names, f"name must be one of {names}", name)
        return np.array([getattr(row, name) for row in self])

    def table(self) -> dict[str, NDArray[Any]]:
        """Return all columns by name, ready for ``pandas.DataFrame``.

        A field that holds a dictionary becomes one column per key, such as
        ``rewards.right``.
        """
        columns: dict[str, NDArray[Any]] = {}
        for field in dataclasses.fields(self[0]) if self else ():
            values = self.column(field.name)
            if isinstance(values[0], dict):
                # A run that goes on from a checkpoint may have other keys.
                for key in dict.fromkeys(key for row in values for key in row):
                    part = np.array([row.get(key, math.nan) for row in values])
                    columns[f"{field.name}.{key}"] = part
            else:
                columns[field.name] = values
        return columns

    def to_csv(self, path: str | Path) -> None:
        """Write the table with a header line."""
        table = self.table()
        rows = zip(*(column.tolist() for column in table.values()), strict=True)
        with Path(path).open("w", encoding="utf-8", newline="") as file:
            csv.writer(file).writerows([table, *rows])


class TrainingDivergedError(FloatingPointError):
    """A parameter or statistic became NaN or infinite; ``result`` holds the last good
    policy.
    """

    def __init__(self, message: str, result: Any) -> None:
        super().__init__(message)
        self.result = result


@overload
def train_seeds(
    runs: Callable[..., ResultT],
    seeds: int | Sequence[int] = ...,
    *,
    workers: int | None = ...,
    progress: bool = ...,
) -> list[ResultT]: ...
@overload
def train_seeds(
    runs: Mapping[KeyT, Callable[..., ResultT]],
    seeds: int | Sequence[int] = ...,
    *,
    workers: int | None = ...,
    progress: bool = ...,
) -> dict[KeyT, list[ResultT]]: ...
def train_seeds(
    runs: Callable[..., ResultT] | Mapping[KeyT, Callable[..., ResultT]],
    seeds: int | Sequence[int] = 10,
    *,
    workers: int | None = None,
    progress: bool = True,
) -> list[ResultT] | dict[KeyT, list[ResultT]]:
    """Repeat one training run, or several variants of it, over seeds, in parallel
    processes.

    Parameters
    ----------
    runs : callable, or mapping of label to callable
        Each is called as ``run(seed=seed, progress=False)``; make it with
        ``functools.partial``. Functions defined in a notebook may be used.
    seeds : int or sequence of int
        A number ``n`` means 0 … n − 1.
    workers : int, optional
        Processes; by default one per core that this process may use. Each computes with
        one thread. 1 runs in this process. In a script the call belongs under ``if
        __name__ == "__main__":``.
    progress : bool
        Show a bar that counts finished runs.

    Returns
    -------
    list of results, or dict of label to list
        What the callables return, in the order of ``seeds``; anything that can be
        pickled, moved by its method ``cpu`` if it has one. A run that diverged is
        represented by its last good result, whose ``stop_reason`` tells.

    Raises
    ------
    ValueError
        If several runs would keep their checkpoints in one folder.

    Examples
    --------
    >>> from functools import partial
    >>> from policyopt.control import PPOConfig, train_ppo, train_seeds
    >>> short = PPOConfig(total_steps=2_000, device="cpu")
    >>> run = partial(train_ppo, "CartPole-v1", short)
    >>> results = train_seeds(run, seeds=2, workers=1, progress=False)
    >>> [result.seed for result in results]
    [0, 1]
    """
    chosen = range(seeds) if isinstance(seeds, int) else list(seeds)
    require(len(chosen) > 0, "seeds must name at least one seed", seeds)
    require(workers is None or workers >= 1, "workers must be >= 1 or None", workers)
    variants: Mapping[Any, Any] = runs if isinstance(runs, Mapping) else {None: runs}
    jobs = [(label, seed) for label in variants for seed in chosen]
    options = (getattr(run, "keywords", {}) for run in variants.values())
    shared = [o["checkpoint_dir"] for o in options if o.get("checkpoint_dir")]
    remedy = "name it by the seed in a function of your own"
    alone = not shared or len(jobs) == 1
    require(alone, "runs must not share a checkpoint_dir", shared, remedy)
    affinity = getattr(os, "sched_getaffinity", None)  # Linux only
    available = len(affinity(0)) if affinity else os.cpu_count() or 1
    processes = min(workers or available, len(jobs))

    results: dict[tuple[Any, int], ResultT] = {}
    # Only ever disabled here, never forced on: TQDM_DISABLE must keep its say.
    switch: dict[str, Any] = {} if progress else {"disable": True}
    with tqdm(total=len(jobs), desc="runs", **switch) as bar:
        if processes == 1:
            for label, seed in jobs:
                # A copy, as the processes below have: what one run trains must not be
                # where the next one starts.
                own = copy.deepcopy(variants[label])
                result = results[label, seed] = _run(own, seed)
                if getattr(result, "stop_reason", None) == "interrupted":
                    # Ctrl-C means all the runs, not just this one
                    raise KeyboardInterrupt
                bar.update()
        else:
            # The parallelism is over runs; more threads per run would only fight each
            # other.
            one_thread = (torch.set_num_threads, (1,))
            with ProcessPoolExecutor(processes, _context(), *one_thread) as pool:
                futures: dict[Future[bytes], tuple[Any, int]] = {}
                for label, seed in jobs:
                    # cloudpickle carries functions that were defined in a notebook or a
                    # script.
                    job = cloudpickle.dumps((variants[label], seed))
                    futures[pool.submit(_run_pickled, job)] = (label, seed)
                try:
                    for future in as_completed(futures):
                        results[futures[future]] = pickle.loads(future.result())
                        bar.update()
                except BaseException as error:
                    pool.shutdown(wait=False, cancel_futures=True)
                    if isinstance(error, Exception):
                        error.add_note(f"in the run {futures[future]} (label, seed)")
                    raise
    grouped = {label: [results[label, seed] for seed in chosen] for label in variants}
    return grouped if isinstance(runs, Mapping) else grouped[None]


def _run(run: Callable[..., ResultT], seed: int) -> ResultT:
    try:
        result = run(seed=seed, progress=False)
    except TrainingDivergedError as error:
        result = error.result
    if callable(move := getattr(result, "cpu", None)):
        move()  # tensors of a GPU could not outlive a process of their own
    return result


def _run_pickled(job: bytes) -> bytes:
    return cloudpickle.dumps(_run(*pickle.loads(job)))  # type: ignore[no-any-return]


def _context() -> multiprocessing.context.BaseContext:
    """Return a start method that is safe beside PyTorch's threads.

    A fork of this process could inherit a locked thread pool. A fork server imports
    PyTorch once and forks from a clean state, so that a second pool starts at once;
    Windows has only "spawn". The classes of language models are imported ahead as well:
    each worker would take seconds to do so when it unpickles one.
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    heavy = r"policyopt\.(control|lm)|transformers\.models\.\w+\.modeling_\w+"
    preloaded = [name for name in sys.modules if re.fullmatch(heavy, name)]
    # An optimiser's first step imports the compiler of PyTorch, a second or two.
    context.set_forkserver_preload([*preloaded, "torch._dynamo"])
    return context
