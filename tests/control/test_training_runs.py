"""A training run from outside: budget, books, seeds, environments, threads, output."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import math
import subprocess
import sys
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from control_runs import (
    PPO,
    TRAINERS,
    Point,
    assert_same_run,
    parameters,
    ppo,
    reinforce,
    with_config,
)
from gymnasium import spaces
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from policyopt.control import Collector, PPOUpdate, make_policy, make_vector_env, train_ppo
from policyopt.control.config import build_networks
from policyopt.control.training import _RewardScaler

ALGORITHMS = pytest.mark.parametrize("train", TRAINERS.values(), ids=TRAINERS)


@ALGORITHMS
def test_a_run_keeps_its_budget_and_its_books(train: Any) -> None:
    rows = []
    result = train(callback=rows.append)
    assert rows == result.history
    assert result.stop_reason == "budget"
    assert result.steps >= 600 > result.history[-2].steps
    assert [row.update for row in result.history] == list(range(1, len(rows) + 1))
    assert result.history[-1].steps == result.steps
    assert result.history[-1].episodes == len(result.episodes) == len(result.episodes.returns)
    assert (np.diff(result.episodes.steps) >= 0).all()
    assert result.episodes.lengths.sum() <= result.steps
    # CartPole pays 1 per step.
    np.testing.assert_array_equal(result.episodes.returns, result.episodes.lengths)
    for row in result.history:
        finished = result.episodes.returns[: row.episodes]
        assert (result.episodes.steps[: row.episodes] <= row.steps).all()
        expected = finished[-20:].mean() if len(finished) else math.nan
        assert row.return_mean == pytest.approx(expected, nan_ok=True)
    assert result.algorithm == train.func.__name__.removeprefix("train_")
    assert result.environment == "CartPole-v1"
    assert result.seconds > 0


@ALGORITHMS
def test_one_seed_one_result(train: Any) -> None:
    torch.manual_seed(1)
    first = train(seed=3)
    torch.manual_seed(2)
    np.random.seed(5)  # noqa: NPY002 - the global generators must not matter
    assert_same_run(first, train(seed=3))
    other = train(seed=4)
    assert not np.array_equal(first.episodes.returns[:5], other.episodes.returns[:5])
    assert not torch.equal(parameters(first)[0], parameters(other)[0])


def test_the_global_generators_are_left_alone() -> None:
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()  # noqa: NPY002
    ppo()
    assert torch.equal(torch.get_rng_state(), state)
    assert np.array_equal(np.random.get_state()[1], numpy_state)  # noqa: NPY002


@ALGORITHMS
def test_everything_that_can_learn_is_trained(train: Any) -> None:
    result = train(seed=5)
    networks = build_networks(
        *result.spaces, train.args[1], critic=True, generator=torch.Generator().manual_seed(5)
    )
    start = [p for network in networks for p in network.parameters()]  # type: ignore[union-attr]
    assert all(not torch.equal(a, b) for a, b in zip(start, parameters(result), strict=True))


@pytest.mark.parametrize("train", [reinforce, ppo], ids=["reinforce", "ppo"])
def test_the_entropy_bonus_keeps_the_policy_spread_out(train: Any) -> None:
    """With a huge weight it is all that is learned; from a start that is far from uniform."""
    narrow = with_config(train, orthogonal_init=False, learning_rate=0.05, total_steps=2000)(seed=1)
    wide = with_config(
        train, orthogonal_init=False, learning_rate=0.05, total_steps=2000, entropy_coef=100.0
    )(seed=1)
    assert wide.history[-1].entropy > 0.97 * math.log(2) > narrow.history[-1].entropy


@ALGORITHMS
@pytest.mark.parametrize("ending", ["budget", "error", "interrupt"])
def test_the_number_of_threads_is_put_back(train: Any, ending: str) -> None:
    before, during = torch.get_num_threads(), []

    def callback(row: Any) -> None:
        during.append(torch.get_num_threads())
        if ending != "budget":
            raise {"error": RuntimeError, "interrupt": KeyboardInterrupt}[ending]

    with warnings.catch_warnings(), contextlib.suppress(RuntimeError):
        warnings.simplefilter("ignore")
        with_config(train, cpu_threads=before + 1, total_steps=1)(callback=callback)
    assert set(during) == {before + 1}
    assert torch.get_num_threads() == before


@ALGORITHMS
def test_continuous_actions_and_normalisation_run(train: Any) -> None:
    run = partial(
        train.func,
        Point,
        dataclasses.replace(train.args[1], normalize_rewards=True, num_envs=3),
        progress=False,
    )
    result = run()
    assert result.policy.encoder.normalize  # the default for continuous actions
    # Statistics of all the batches, including the last one: each is taken in after its update.
    assert result.policy.encoder.count.item() == result.steps
    assert result.policy.encoder.mean.tolist() == [1.0]
    assert result.reward_statistics[2] == result.steps
    assert result.reward_statistics[1] > 0
    assert not with_config(run, normalize_observations=False)().policy.encoder.normalize


def test_a_given_policy_is_trained_in_place() -> None:
    env = gym.make("CartPole-v1")
    policy = make_policy(
        env.observation_space, env.action_space, hidden=(5,), generator=torch.Generator().manual_seed(0)
    )
    before = [p.detach().clone() for p in policy.parameters()]
    result = ppo(policy=policy)
    assert result.policy is policy
    assert not torch.equal(before[0], next(iter(policy.parameters())))


def test_a_given_policy_must_fit_the_environment() -> None:
    env = gym.make("CartPole-v1")
    policy = make_policy(env.observation_space, env.action_space, generator=torch.Generator())
    with pytest.raises(ValueError, match=r"policy was made for other observations .*than those of Point"):
        train_ppo(Point, PPO, policy=policy, progress=False)


def test_copies_in_processes_of_their_own_make_the_same_run() -> None:
    copies = [partial(gym.make, "CartPole-v1")] * 2
    config = dataclasses.replace(PPO, total_steps=200)
    one, other = SyncVectorEnv(copies), AsyncVectorEnv(copies)
    assert_same_run(*(train_ppo(env, config, seed=3, progress=False) for env in (one, other)))
    other.close()


def test_episodes_of_one_step_are_counted() -> None:
    result = train_ppo(partial(Point, length=1), PPO, progress=False)
    assert result.episodes.lengths.tolist() == [1] * len(result.episodes)
    assert len(result.episodes) == result.steps


def test_a_vector_environment_is_used_and_left_open() -> None:
    env, _ = make_vector_env("CartPole-v1", 3)
    result = train_ppo(env, PPO, progress=False)  # its three copies, not the config's four
    assert result.history[0].steps <= 150
    env.reset(seed=0)
    env.close()


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
@ALGORITHMS
def test_both_modes_of_reset(train: Any, mode: AutoresetMode) -> None:
    env = SyncVectorEnv([partial(gym.make, "CartPole-v1")] * 2, autoreset_mode=mode)
    result = train.func(env, train.args[1], progress=False)
    assert result.stop_reason == "budget"
    np.testing.assert_array_equal(result.episodes.returns, result.episodes.lengths)


def test_reward_scaling_equals_a_slow_loop() -> None:
    """The standard deviation of the discounted sums of rewards so far, restarted at episode ends, junk left out."""

    class Noisy(Point):
        def __init__(self, length: int) -> None:
            super().__init__(lambda step: math.sin(7.0 * step) + 2.0, length)

    for whole in (False, True):
        env = SyncVectorEnv([partial(Noisy, 3), partial(Noisy, 7)], autoreset_mode=AutoresetMode.NEXT_STEP)
        policy = make_policy(Point.observation_space, Point.action_space, generator=torch.Generator())
        collector = Collector(env, policy, torch.Generator().manual_seed(0), seed=0)
        scaler, seen, running = _RewardScaler(0.9, 2), [], [0.0, 0.0]
        for _ in range(3):
            rollout = collector.collect_episodes() if whole else collector.collect(11)
            if whole:
                running = [0.0, 0.0]
            for t in range(len(rollout.rewards)):
                for i in range(2):
                    if rollout.valid[t, i]:
                        running[i] = 0.9 * running[i] + rollout.rewards[t, i].item()
                        seen.append(running[i])
                        if rollout.truncated[t, i]:
                            running[i] = 0.0
            scaled = scaler(rollout)
            torch.testing.assert_close(scaled.rewards, rollout.rewards / float(np.std(seen)))
            assert scaler.statistics == pytest.approx((np.mean(seen), np.var(seen), len(seen)))


def test_rewards_that_never_vary_are_not_blown_up() -> None:
    result = train_ppo(
        partial(Point, lambda step: -1.0),
        dataclasses.replace(PPO, normalize_rewards=True, gamma=0.0),
        progress=False,
    )
    assert result.history.column("value_loss").max() < 10


def test_history_as_columns_and_csv(tmp_path: Path) -> None:
    history = ppo().history
    assert history.column("kl").tolist() == [row.kl for row in history]
    with pytest.raises(ValueError, match=r"name must be one of \['update', .*got 'reward'"):
        history.column("reward")
    history.to_csv(tmp_path / "h.csv")
    with (tmp_path / "h.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(history)
    assert [float(row["kl"]) for row in rows] == history.column("kl").tolist()
    assert list(rows[0]) == [f.name for f in dataclasses.fields(PPOUpdate)]


@pytest.mark.parametrize("device", ["warp-drive", "cuda:99", "cpu:x"])
def test_an_unknown_device_is_named(device: str) -> None:
    with pytest.raises(
        ValueError, match=rf"device must be 'auto' or a device that this machine has.*'{device}'"
    ):
        with_config(ppo, device=device)()


@pytest.mark.parametrize("seed", [-1, 1.5, "0", True])
def test_a_seed_is_a_natural_number(seed: Any) -> None:
    with pytest.raises(ValueError, match=r"seed must be an integer >= 0, got"):
        ppo(seed=seed)


@ALGORITHMS
def test_an_instance_in_place_of_a_factory_is_refused(train: Any) -> None:
    with pytest.raises(ValueError, match="env must be an id, a factory or a vector environment"):
        train.func(gym.make("CartPole-v1"), train.args[1], progress=False)


@ALGORITHMS
def test_wrong_spaces_are_refused(train: Any) -> None:
    class Wrong(Point):
        action_space = spaces.Box(0, 3, (2,), np.int32)

    with pytest.raises(
        ValueError, match=r"action space must be Discrete, .* or a floating-point Box, got Box"
    ):
        train.func(Wrong, train.args[1], progress=False)


def test_importing_is_light_and_quiet_and_offline() -> None:
    code = """
import socket, sys
def refuse(*args, **kwargs):
    raise AssertionError("network access on import")
socket.socket.connect = socket.getaddrinfo = refuse
import policyopt.control
heavy = {"transformers", "datasets", "matplotlib", "pandas", "IPython"} & set(sys.modules)
assert not heavy, heavy
assert {m for m in sys.modules if m.startswith("policyopt.lm")} == set()
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_lower_floors_know_nothing_of_gymnasium() -> None:
    code = """
import sys
import policyopt, policyopt.mdp, policyopt.estimators, policyopt.losses, policyopt.trust_region
assert not {"gymnasium", "transformers", "policyopt.control"} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_only_the_progress_bar_prints(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    ppo()
    assert capfd.readouterr() == ("", "")
    monkeypatch.delenv("TQDM_DISABLE", raising=False)
    ppo(progress=True)
    out, err = capfd.readouterr()
    assert out == ""
    assert err == "" or "ppo CartPole-v1 seed 0" in err
