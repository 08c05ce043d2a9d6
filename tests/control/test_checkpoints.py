"""Checkpoints: a run that was killed ends like one that was not. Results on disk."""

from __future__ import annotations

import dataclasses
import itertools
import json
import signal
from functools import cache, partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from control_runs import (
    CHECKPOINTED,
    PPO,
    TRAINERS,
    Mine,
    Point,
    assert_same_run,
    on,
    ppo,
    reinforce,
    run_until_killed,
    trpo,
    with_config,
)
from gymnasium import spaces

from policyopt.checkpoint import load_checkpoint, strip
from policyopt.control import Collector, Policy, TrainResult, make_policy, train_ppo
from policyopt.control.config import build_networks
from policyopt.runs import _context

ALGORITHMS = pytest.mark.parametrize("train", TRAINERS.values(), ids=TRAINERS)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The runs that nobody killed: name ↦ (result, folder)."""

    @cache
    def run(name: str) -> tuple[TrainResult[Any, Any], Path]:
        folder = tmp_path_factory.mktemp("finished")
        return CHECKPOINTED[name](checkpoint_dir=folder), folder

    return run


def optimizer_of(folder: Path) -> dict[str, Any]:
    return strip(load_checkpoint(folder)[0], "optimizer.")


def assert_ended_alike(folder: Path, other: Path) -> None:
    """The last checkpoints agree bit for bit, the optimiser's memory included."""
    (ours, our_meta), (theirs, their_meta) = load_checkpoint(folder), load_checkpoint(other)
    assert ours.keys() == theirs.keys()
    assert any(key.startswith("optimizer.") for key in ours)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    for meta in (our_meta, their_meta):
        assert meta["state"].pop("seconds") > 0
    assert our_meta == their_meta


# --- Killed ---


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_a_killed_run_started_again_ends_as_if_nothing_had_happened(
    name: str, tmp_path: Path, finished: Any
) -> None:
    """SIGKILL in the middle of a rollout; processes are forked from one that has PyTorch imported."""
    expected, folder = finished(name)
    kill_at = expected.history[-1].steps * 2 // 3 // 2  # steps of each of the two copies
    process = _context().Process(target=run_until_killed, args=(name, tmp_path, kill_at))
    process.start()
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    left = TrainResult.load(tmp_path)
    assert left.stop_reason == "unfinished"
    assert 0 < len(left.history) < len(expected.history)
    assert_same_run(CHECKPOINTED[name](checkpoint_dir=tmp_path), expected)
    assert_ended_alike(tmp_path, folder)


@pytest.mark.parametrize("name", CHECKPOINTED)
def test_a_run_broken_off_again_and_again_ends_as_if_nothing_had_happened(
    name: str, tmp_path: Path, finished: Any
) -> None:
    expected, folder = finished(name)
    breaks, seen = {1, 2, 3, len(expected.history) - 1}, []

    def breaking(row: Any) -> None:
        seen.append(row)
        if row.update in breaks:
            breaks.remove(row.update)
            raise RuntimeError("power cut")

    while breaks:
        with pytest.raises(RuntimeError, match="power cut"):
            CHECKPOINTED[name](checkpoint_dir=tmp_path, callback=breaking)
    result = CHECKPOINTED[name](checkpoint_dir=tmp_path, callback=breaking)
    assert_same_run(result, expected)
    assert_ended_alike(tmp_path, folder)
    # A row that comes twice is the same twice. As texts: from Python 3.13 on a row with a NaN differs from itself.
    assert {row.update: str(row) for row in seen} == {row.update: str(row) for row in expected.history}
    assert len(seen) > len(expected.history)


@pytest.mark.parametrize("whole", [False, True], ids=["steps", "episodes"])
def test_same_step_environments_and_unfinished_episodes(whole: bool, tmp_path: Path) -> None:
    """A reset after each checkpoint drops the episodes that are under way, in both runs."""

    def run(folder: Path, **options: Any) -> TrainResult[Any, Any]:
        copies = [partial(gym.make, "CartPole-v1")] * 3
        env = gym.vector.SyncVectorEnv(copies, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP)
        config = dataclasses.replace(
            PPO, checkpoint_every=1, total_steps=900, rollout_steps=None if whole else 50
        )
        return train_ppo(env, config, checkpoint_dir=folder, progress=False, **options)

    def breaking(row: Any) -> None:
        if row.update == 2:
            raise RuntimeError

    expected = run(tmp_path / "whole")
    with pytest.raises(RuntimeError):
        run(tmp_path / "broken", callback=breaking)
    assert_same_run(run(tmp_path / "broken"), expected)
    assert_ended_alike(tmp_path / "broken", tmp_path / "whole")
    if whole:
        assert expected.episodes.lengths.sum() == expected.steps
    else:
        # Resets after each update but the last: no episode is longer than a rollout.
        assert expected.episodes.lengths.max() <= 50


def test_a_policy_of_ones_own_making_goes_on_too(tmp_path: Path) -> None:
    def breaking(row: Any) -> None:
        if row.update == 3:
            raise RuntimeError

    train = with_config(ppo, checkpoint_every=2, total_steps=1200)
    expected = train(policy=Mine(), checkpoint_dir=tmp_path / "whole")
    with pytest.raises(RuntimeError):
        train(policy=Mine(), checkpoint_dir=tmp_path / "broken", callback=breaking)
    policy = Mine()
    result = train(policy=policy, checkpoint_dir=tmp_path / "broken")
    assert result.policy is policy
    assert_same_run(result, expected)
    assert_ended_alike(tmp_path / "broken", tmp_path / "whole")
    with pytest.raises(ValueError, match=r"holds a Mine of your own making.*start its training again"):
        TrainResult.load(tmp_path / "whole")


def test_every_reset_after_a_checkpoint_has_a_seed_of_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: dict[int, list[Any]] = {0: [], 1: []}
    generators: dict[int, list[Any]] = {0: [], 1: []}
    original = Collector.reset

    def spy(collector: Collector, seed: int | None = None) -> None:
        seeds[current].append(seed)
        generators[current].append(collector.generator.initial_seed())
        original(collector, seed)

    monkeypatch.setattr(Collector, "reset", spy)
    for current in seeds:
        result = with_config(ppo, checkpoint_every=1)(seed=current, checkpoint_dir=tmp_path / str(current))
        assert len(seeds[current]) == len(result.history)  # one at the start, none after the last update
    assert len({*seeds[0], *seeds[1]}) == len(seeds[0]) + len(seeds[1])
    assert len({*generators[0], *generators[1]}) == len(generators[0]) + len(generators[1])


def test_without_a_folder_nothing_is_reset() -> None:
    """``checkpoint_every`` means nothing then."""
    assert_same_run(with_config(ppo, checkpoint_every=1)(), ppo())


def test_the_global_generators_do_not_matter_to_a_run_that_goes_on(tmp_path: Path) -> None:
    train = with_config(ppo, checkpoint_every=1)
    train(checkpoint_dir=tmp_path, callback=lambda row: row.update == 2)
    torch.manual_seed(99)
    assert_same_run(train(checkpoint_dir=tmp_path), train(checkpoint_dir=tmp_path / "whole"))


# --- Going on ---


@ALGORITHMS
def test_a_finished_run_goes_on_with_more_steps(train: Any, tmp_path: Path) -> None:
    first = train(checkpoint_dir=tmp_path)
    table, weights = first.history.table(), [p.clone() for p in first.policy.parameters()]
    second = with_config(train, total_steps=1400)(checkpoint_dir=tmp_path)
    assert second.steps >= 1400
    for name, column in table.items():
        np.testing.assert_array_equal(second.history.column(name)[: len(column)], column)
    assert second.history.column("update").tolist() == list(range(1, len(second.history) + 1))
    for column in (second.history.column("steps"), second.history.column("episodes"), second.episodes.steps):
        assert (np.diff(column) >= 0).all()
    assert len(second.episodes) == second.history[-1].episodes
    # The episodes are new ones, not those of the first part again.
    n = len(first.episodes)
    assert not np.array_equal(second.episodes.returns[n : 2 * n], first.episodes.returns[:n])
    assert second.seconds > first.seconds
    # The network of the first result was not touched, and a budget that is used up means no more training.
    assert all(torch.equal(a, b) for a, b in zip(weights, first.policy.parameters(), strict=True))
    again = with_config(train, total_steps=1400)(checkpoint_dir=tmp_path)
    assert_same_run(again, second)
    assert again.stop_reason == "budget"


def test_going_on_starts_from_the_weights_and_moments_of_before(tmp_path: Path) -> None:
    """A learning rate of (nearly) nothing shows where it started; Adam's counter, that its moments are there."""
    first = with_config(ppo, learning_rate=1e-30, anneal_learning_rate=False)(checkpoint_dir=tmp_path)
    before = optimizer_of(tmp_path)
    second = with_config(ppo, learning_rate=1e-30, anneal_learning_rate=False, total_steps=1400)(
        checkpoint_dir=tmp_path
    )
    for a, b in zip(first.policy.parameters(), second.policy.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-20)
    new = second.history[len(first.history) :]
    previous = [first.history[-1].steps, *(row.steps for row in new)]
    pieces = [-(-(b - a) // PPO.minibatch_size) for a, b in itertools.pairwise(previous)]
    after = optimizer_of(tmp_path)
    assert after["0.step"].item() == before["0.step"].item() + sum(pieces) * PPO.epochs_per_batch


def test_settings_that_do_not_matter_may_change(tmp_path: Path) -> None:
    train = with_config(ppo, checkpoint_every=1)
    train(checkpoint_dir=tmp_path, callback=lambda row: row.update == 2)
    changed = with_config(train, checkpoint_every=7, cpu_threads=2, device="auto", total_steps=800)
    if not torch.cuda.is_available():
        assert changed(checkpoint_dir=tmp_path).steps >= 800


def test_another_run_is_refused_by_what_differs(tmp_path: Path) -> None:
    train = with_config(ppo, checkpoint_every=1)
    train(checkpoint_dir=tmp_path)

    class Renamed(Point):
        pass

    class Bounded(Point):
        action_space = spaces.Box(-3, 3, (2,), np.float32)

    Bounded.__name__ = "Point"
    on(train, Point)(checkpoint_dir=tmp_path / "point")
    vector = gym.make_vec("CartPole-v1", 5, vectorization_mode="vector_entry_point")
    cases: list[tuple[Any, dict[str, Any], str]] = [
        (trpo, {}, "algorithm 'ppo', this one has 'trpo'"),
        (train, {"seed": 1}, "seed 0, this one has 1"),
        (with_config(ppo, hidden=(8, 8)), {}, r"hidden \[16\], this one has \[8, 8\]"),
        (with_config(ppo, gamma=0.5), {}, "gamma 0.99, this one has 0.5"),
        (with_config(ppo, normalize_observations=True), {}, "normalize_observations None, this one has True"),
        (on(train, vector), {}, "copies 4, this one has 5"),
        (train, {"policy": Mine()}, "policy 'CategoricalPolicy', this one has 'Mine'"),
        (on(train, Point), {}, "environment 'CartPole-v1', this one has 'Point'"),
    ]
    for run, options, message in cases:
        with pytest.raises(ValueError, match=rf"{tmp_path.name} holds a run with {message}; give another"):
            run(checkpoint_dir=tmp_path, **options)
    with pytest.raises(ValueError, match=r"action_space 'Box\(-1\.0, 1\.0.*this one has 'Box\(-3\.0"):
        on(train, Bounded)(checkpoint_dir=tmp_path / "point")
    with pytest.raises(ValueError, match="environment 'Point', this one has 'Renamed'"):
        on(train, Renamed)(checkpoint_dir=tmp_path / "point")


def _cart(**options: Any) -> Any:
    def make() -> Any:
        wrap = options.get("wrap", lambda env: env)
        return wrap(gym.make("CartPole-v1", **{k: v for k, v in options.items() if k != "wrap"}))

    return make


def _pendulum(**options: Any) -> Any:
    return lambda: gym.make("Pendulum-v1", **options)


@pytest.mark.parametrize(
    ("first", "second", "differs"),
    [
        (_cart(), _cart(max_episode_steps=7), r"'CartPole-v1', 500.*got .*'CartPole-v1', 7"),
        (_cart(), _cart(sutton_barto_reward=True), r"got .*'sutton_barto_reward': True"),
        (_pendulum(), _pendulum(g=5.0), r"got .*'g': 5.0"),
        (
            _cart(),
            _cart(wrap=lambda env: gym.wrappers.TransformReward(env, lambda r: 2 * r)),
            "TransformReward",
        ),
        (
            _cart(wrap=lambda env: gym.wrappers.NormalizeReward(env, gamma=0.5)),
            _cart(wrap=lambda env: gym.wrappers.NormalizeReward(env, gamma=0.9)),
            r"'gamma': 0.5.*got .*'gamma': 0.9",
        ),
        (lambda: gym.wrappers.TimeLimit(Point(), 5), lambda: gym.wrappers.TimeLimit(Point(), 6), "TimeLimit"),
        (
            partial(gym.make, "CartPole-v1"),
            partial(gym.make, "CartPole-v1", sutton_barto_reward=True),
            "'sutton_barto_reward': True",
        ),
    ],
    ids=["time limit", "argument", "pendulum", "wrapper", "wrapper's argument", "no id", "partial"],
)
def test_another_task_with_the_same_name_and_spaces_is_refused(
    first: Any, second: Any, differs: str, tmp_path: Path
) -> None:
    """Factories are often called "make" or "<lambda>", whatever they make."""
    on(ppo, first)(checkpoint_dir=tmp_path)
    longer = with_config(ppo, total_steps=1000)
    with pytest.raises(
        ValueError, match=rf"(?s)does not fit this run: in this folder env must be .*{differs}"
    ):
        on(longer, second)(checkpoint_dir=tmp_path)
    assert on(longer, first)(checkpoint_dir=tmp_path).steps >= 1000


def test_another_policy_of_the_same_name_is_refused(tmp_path: Path) -> None:
    env = gym.make("CartPole-v1")
    make = partial(make_policy, env.observation_space, env.action_space, generator=torch.Generator())
    ppo(policy=make(hidden=(5,)), checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=r"(?s)does not fit this run: .*size mismatch"):
        ppo(policy=make(hidden=(6,)), checkpoint_dir=tmp_path)


def test_a_saved_result_is_not_gone_on_from(tmp_path: Path) -> None:
    folder = ppo().save(tmp_path)
    with pytest.raises(ValueError, match=r"it is a saved result, without the optimiser's state; .*policy="):
        with_config(ppo, total_steps=1400)(checkpoint_dir=folder)


def test_a_refused_checkpoint_closes_the_environment(tmp_path: Path) -> None:
    closed = []

    class Closing(Point):
        def close(self) -> None:
            closed.append(True)

    ppo(checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="this one has 'Closing'"):
        on(ppo, Closing)(checkpoint_dir=tmp_path)
    assert len(closed) == PPO.num_envs


def test_a_run_that_is_interrupted_says_where_its_checkpoint_is(tmp_path: Path) -> None:
    def interrupt(row: Any) -> None:
        if row.update == 2:
            raise KeyboardInterrupt

    train = with_config(ppo, checkpoint_every=1)
    with pytest.warns(UserWarning, match=rf"interrupted after .*last checkpoint is in .*{tmp_path.name}"):
        train(checkpoint_dir=tmp_path, callback=interrupt)
    assert len(TrainResult.load(tmp_path).history) == 2


# --- On disk ---


@pytest.mark.parametrize("from_checkpoint", [False, True], ids=["save", "checkpoint"])
@pytest.mark.parametrize(
    "run",
    [
        reinforce,
        trpo,
        ppo,
        with_config(reinforce, baseline="none"),
        with_config(on(ppo, Point), normalize_rewards=True, activation="relu"),
    ],
    ids=["reinforce", "trpo", "ppo", "no critic", "continuous"],
)
def test_a_result_comes_back_from_the_disk(run: Any, from_checkpoint: bool, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    result = run(seed=np.int64(2), checkpoint_dir=folder if from_checkpoint else None)
    if not from_checkpoint:
        assert result.save(folder) == folder
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    json.loads((folder / "state.json").read_text())
    loaded = TrainResult.load(folder)
    assert_same_run(result, loaded)
    observations = torch.from_numpy(np.stack([result.spaces[0].sample() for _ in range(20)])).clamp(-5, 5)
    ours, theirs = result.policy(observations), loaded.policy(observations)
    assert torch.equal(ours.mode(), theirs.mode())
    assert torch.equal(ours.entropy(), theirs.entropy())
    assert (loaded.critic is None) == (result.critic is None)
    for name in ("algorithm", "environment", "num_envs", "seed", "config", "spaces", "stop_reason", "steps"):
        assert getattr(loaded, name) == getattr(result, name)
    assert loaded.seconds == pytest.approx(result.seconds, abs=1)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(3, start=-2),
        spaces.Box(np.array([-np.inf, 0]), np.array([np.inf, 1]), dtype=np.float64),
        spaces.Box(0, 255, (2, 3), np.uint8),
        spaces.Box(-1, 1, (), np.float32),
    ],
    ids=str,
)
def test_spaces_come_back_from_the_disk(space: Any, tmp_path: Path) -> None:
    result = on(ppo, Point)()
    policy, _ = build_networks(
        space, result.spaces[1], result.config, critic=False, generator=torch.Generator()
    )
    changed = dataclasses.replace(result, spaces=(space, result.spaces[1]), policy=policy, critic=None)
    loaded = TrainResult.load(changed.save(tmp_path)).spaces[0]
    assert loaded == space
    assert loaded.dtype == space.dtype


def test_a_policy_that_the_config_does_not_describe_is_not_saved_whole(tmp_path: Path) -> None:
    env = gym.make("CartPole-v1")
    policy = make_policy(env.observation_space, env.action_space, hidden=(5,), generator=torch.Generator())
    result = ppo(policy=policy)
    with pytest.raises(ValueError, match=r"policy must be the one that the config describes.*safetensors"):
        result.save(tmp_path)
    with pytest.raises(ValueError, match="got a Mine"):
        ppo(policy=Mine()).save(tmp_path)

    # For spaces that no built-in policy has, the answer is the same.
    class Switches(Point):
        action_space = spaces.Box(0, 1, (2,), np.int8)

    class ForSwitches(Policy):
        def __init__(self) -> None:
            super().__init__()
            self.inner = make_policy(Point.observation_space, Point.action_space, generator=torch.Generator())
            self.encoder = self.inner.encoder

        def forward(self, observations: torch.Tensor) -> Any:
            return self.inner(observations)

        def to_env(self, actions: torch.Tensor) -> Any:
            return (actions > 0).numpy().astype(np.int8)

    result = on(ppo, Switches)(policy=ForSwitches(), checkpoint_dir=tmp_path / "switches")
    with pytest.raises(ValueError, match="got a ForSwitches"):
        result.save(tmp_path)


def test_another_format_or_algorithm_is_named(tmp_path: Path) -> None:
    folder = ppo().save(tmp_path)
    state = json.loads((folder / "state.json").read_text())
    identity = state["metadata"]["identity"]
    for change, message in (
        ({"format": 3}, "holds a checkpoint of format 3, this version reads format 2"),
        ({"identity": {**identity, "algorithm": "sac"}}, "algorithm must be one of .*got 'sac'"),
    ):
        changed = {**state, "metadata": {**state["metadata"], **change}}
        (folder / "state.json").write_text(json.dumps(changed))
        with pytest.raises(ValueError, match=message):
            TrainResult.load(folder)
    with pytest.raises(ValueError, match=r"this one has 'ppo'; give another folder to start afresh"):
        ppo(checkpoint_dir=folder)
