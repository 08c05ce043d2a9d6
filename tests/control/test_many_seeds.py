"""train_seeds: the same runs one after another, in parallel, or alone."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from control_runs import assert_same_run, clipped, ppo, trpo, with_config

from policyopt.control import Steps, TrainResult, train_seeds
from policyopt.losses import ClippedSurrogate


def test_seeds_in_parallel_equal_seeds_in_turn_equal_single_runs() -> None:
    scale = 1.0  # a closure: it travels to the workers too

    def own_loss(steps: Steps) -> ClippedSurrogate:
        items = clipped(steps)
        return items._replace(loss=scale * items.loss)

    def diverging(*, seed: int, progress: bool) -> TrainResult[Any, Any]:
        calls = 0

        def loss(steps: Steps) -> ClippedSurrogate:
            nonlocal calls
            calls += 1
            items = clipped(steps)
            return items._replace(loss=items.loss * float("nan")) if calls > 1 else items

        return with_config(ppo, minibatch_size=10**6, epochs_per_batch=1)(seed=seed, loss=loss)

    runs = {"ppo": partial(ppo, loss=own_loss), "trpo": trpo, "diverging": diverging}
    parallel = train_seeds(runs, seeds=[5, 7], workers=2, progress=False)
    serial = train_seeds(runs, seeds=[5, 7], workers=1, progress=False)
    assert list(parallel) == list(serial) == list(runs)
    for label in runs:
        for seed, one, other in zip([5, 7], parallel[label], serial[label], strict=True):
            assert one.seed == other.seed == seed
            assert_same_run(one, other)
    for seed, one in zip([5, 7], parallel["ppo"], strict=True):
        assert_same_run(one, ppo(seed=seed))
    # A run that diverged is there all the same, with what it had learned and why it stopped.
    for result in (*parallel["diverging"], *serial["diverging"]):
        assert len(result.history) == 1
        assert "not finite" in result.stop_reason

    # Any result will do; one that has a method cpu is moved by it.
    def plain(*, seed: int, progress: bool) -> list[int]:
        return [seed]

    assert train_seeds(plain, seeds=2, workers=2, progress=False) == [[0], [1]]

    # An error in one run is not swallowed, and says which run it was (the workers are warm: this is quick).
    def failing(*, seed: int, progress: bool) -> TrainResult[Any, Any]:
        if seed == 1:
            raise ValueError("the environment broke")
        return ppo(seed=seed)

    with pytest.raises(ValueError, match="the environment broke") as caught:
        train_seeds({"mine": failing}, seeds=2, workers=2, progress=False)
    assert any("('mine', 1)" in note for note in caught.value.__notes__)


def test_seeds_in_turn() -> None:
    results = train_seeds(ppo, seeds=2, workers=1, progress=False)
    assert [result.seed for result in results] == [0, 1]
    assert_same_run(results[1], ppo(seed=1))


@pytest.mark.parametrize("workers", [1, 2])
def test_runs_may_not_share_a_folder(tmp_path: Path, workers: int) -> None:
    run = partial(ppo, checkpoint_dir=tmp_path)
    with pytest.raises(
        ValueError, match=r"runs must not share a checkpoint_dir, got .*; name it by the seed"
    ):
        train_seeds(run, seeds=2, workers=workers, progress=False)
    train_seeds(run, seeds=1, workers=workers, progress=False)
    assert any(tmp_path.iterdir())


def test_results_are_moved_to_the_cpu_also_in_turn() -> None:
    moved: list[int] = []

    def run(*, seed: int, progress: bool) -> SimpleNamespace:
        return SimpleNamespace(cpu=lambda: moved.append(seed))

    train_seeds(run, seeds=2, workers=1, progress=False)
    assert moved == [0, 1]


def test_ctrl_c_stops_all_seeds() -> None:
    started = []

    def interrupted(*, seed: int, progress: bool) -> TrainResult[Any, Any]:
        def callback(row: Any) -> None:
            raise KeyboardInterrupt

        started.append(seed)
        return ppo(seed=seed, callback=callback)

    with pytest.raises(KeyboardInterrupt), pytest.warns(UserWarning, match="interrupted"):
        train_seeds(interrupted, seeds=3, workers=1, progress=False)
    assert started == [0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"seeds": 0}, "seeds must name at least one seed, got 0"),
        ({"seeds": []}, "seeds must name at least one seed"),
        ({"seeds": 2, "workers": 0}, "workers must be >= 1 or None, got 0"),
    ],
)
def test_train_seeds_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_seeds(ppo, **arguments, progress=False)
