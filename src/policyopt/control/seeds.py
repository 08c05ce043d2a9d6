"""One experiment, many seeds, all cores."""

from __future__ import annotations

import multiprocessing
import os
import pickle
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from typing import Any, TypeVar, overload

import cloudpickle
import torch
from tqdm import tqdm

from policyopt.control.results import TrainingDivergedError, TrainResult

__all__ = ["train_seeds"]

Trainer = Callable[..., TrainResult[Any, Any]]
KeyT = TypeVar("KeyT")


@overload
def train_seeds(
    runs: Trainer, seeds: int | Sequence[int] = ..., *, workers: int | None = ..., progress: bool = ...
) -> list[TrainResult[Any, Any]]: ...
@overload
def train_seeds(
    runs: Mapping[KeyT, Trainer],
    seeds: int | Sequence[int] = ...,
    *,
    workers: int | None = ...,
    progress: bool = ...,
) -> dict[KeyT, list[TrainResult[Any, Any]]]: ...
def train_seeds(
    runs: Trainer | Mapping[KeyT, Trainer],
    seeds: int | Sequence[int] = 10,
    *,
    workers: int | None = None,
    progress: bool = True,
) -> list[TrainResult[Any, Any]] | dict[KeyT, list[TrainResult[Any, Any]]]:
    """Repeat one training run, or several variants of it, over seeds, in parallel processes.

    Parameters
    ----------
    runs : callable, or mapping of label to callable
        Each is called as ``run(seed=seed, progress=False)``; make it with ``functools.partial``. Functions defined in
        a notebook may be used.
    seeds : int or sequence of int
        A number ``n`` means 0 … n − 1.
    workers : int, optional
        Processes; by default one per core that this process may use. Each computes with one thread. 1 runs in this
        process. In a script the call must stand under ``if __name__ == "__main__":``.
    progress : bool
        Show a bar that counts finished runs.

    Returns
    -------
    list of TrainResult, or dict of label to list
        In the order of ``seeds``. A run that diverged is represented by its last good result, whose ``stop_reason``
        tells.

    Examples
    --------
    >>> from functools import partial
    >>> from policyopt.control import PPOConfig, train_ppo, train_seeds
    >>> short = PPOConfig(total_steps=2_000, device="cpu")
    >>> results = train_seeds(partial(train_ppo, "CartPole-v1", short), seeds=2, workers=1, progress=False)
    >>> [result.seed for result in results]
    [0, 1]
    """
    seed_list = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not seed_list:
        raise ValueError(f"seeds must name at least one seed, got {seeds!r}")
    variants: Mapping[Any, Trainer] = runs if isinstance(runs, Mapping) else {None: runs}
    jobs = [(label, seed) for label in variants for seed in seed_list]
    available = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if workers is not None and workers < 1:
        raise ValueError(f"workers must be >= 1 or None, got {workers!r}")
    processes = min(workers or available, len(jobs))

    results: dict[tuple[Any, int], TrainResult[Any, Any]] = {}
    # Only ever disabled here, never forced on: TQDM_DISABLE must keep its say.
    switch: dict[str, Any] = {} if progress else {"disable": True}
    with tqdm(total=len(jobs), desc="runs", **switch) as bar:
        if processes == 1:
            for label, seed in jobs:
                result = results[label, seed] = _run(variants[label], seed)
                if result.stop_reason == "interrupted":
                    raise KeyboardInterrupt  # Ctrl-C means all the runs, not just this one
                bar.update()
        else:
            with ProcessPoolExecutor(processes, _context(), _start_worker) as pool:
                # cloudpickle carries functions that were defined in a notebook or a script.
                futures: dict[Future[bytes], tuple[Any, int]] = {
                    pool.submit(_run_pickled, cloudpickle.dumps((variants[label], seed))): (label, seed)
                    for label, seed in jobs
                }
                try:
                    for future in as_completed(futures):
                        results[futures[future]] = pickle.loads(future.result())
                        bar.update()
                except BaseException as error:
                    pool.shutdown(wait=False, cancel_futures=True)
                    if isinstance(error, Exception):
                        error.add_note(f"in the run {futures[future]} (label, seed)")
                    raise
    grouped = {label: [results[label, seed] for seed in seed_list] for label in variants}
    return grouped if isinstance(runs, Mapping) else grouped[None]


def _run(run: Trainer, seed: int) -> TrainResult[Any, Any]:
    try:
        return run(seed=seed, progress=False)
    except TrainingDivergedError as error:
        return error.result


def _run_pickled(job: bytes) -> bytes:
    run, seed = pickle.loads(job)
    result = _run(run, seed)
    # Tensors of a GPU could not outlive this process.
    result.policy.cpu()
    if result.critic is not None:
        result.critic.cpu()
    return cloudpickle.dumps(result)  # type: ignore[no-any-return]


def _start_worker() -> None:
    # The parallelism is over runs; more threads per run would only fight each other.
    torch.set_num_threads(1)


def _context() -> multiprocessing.context.BaseContext:
    """Return a start method that is safe beside PyTorch's threads.

    A fork of this process could inherit a locked thread pool. A fork server imports PyTorch once and forks from a
    clean state, which makes a second pool start at once; Windows has only "spawn".
    """
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["policyopt.control"])
    return context
