"""Runs that end early: a callback, Ctrl-C, NaN, an environment that breaks."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from control_runs import PPO, TRAINERS, Point, clipped, on, parameters, ppo, surrogate, trpo, with_config
from torch import Tensor

from policyopt.control import Steps, TrainingDivergedError, make_policy, train_ppo
from policyopt.losses import Surrogate

ALGORITHMS = pytest.mark.parametrize("train", TRAINERS.values(), ids=TRAINERS)


@ALGORITHMS
def test_a_callback_may_stop(train: Any) -> None:
    result = train(callback=lambda row: row.update == 2)
    assert result.stop_reason == "callback"
    assert len(result.history) == 2


@ALGORITHMS
def test_ctrl_c_returns_what_was_learned(train: Any) -> None:
    kept: list[Tensor] = []
    policy = train().policy

    def interrupt(row: Any) -> None:
        kept[:] = [p.detach().clone() for p in policy.parameters()]
        if row.update == 2:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match=r"interrupted after \d+ of 600 steps; returning what was learned"):
        result = train(policy=policy, callback=interrupt)
    assert result.stop_reason == "interrupted"
    assert len(result.history) == 2
    assert all(torch.equal(a, b) for a, b in zip(kept, policy.parameters(), strict=True))


def test_ctrl_c_in_the_middle_of_an_update_goes_back_to_the_last_one() -> None:
    """PPO broken off after its first step, TRPO in its line search: never half an update."""
    for train, normal in ((ppo, clipped), (trpo, surrogate)):
        policy, kept, calls = train().policy, [], 0

        def spy(steps: Steps, normal: Any = normal, kept: list[Any] = kept) -> Any:
            nonlocal calls
            calls += len(kept) == 2  # in the third update
            if calls == 2:
                raise KeyboardInterrupt
            return normal(steps)

        def keep(row: Any, policy: Any = policy, kept: list[Any] = kept) -> None:
            kept.append([p.detach().clone() for p in policy.parameters()])

        with pytest.warns(UserWarning, match="interrupted"):
            result = train(policy=policy, callback=keep, loss=spy)
        assert len(result.history) == 2
        assert all(torch.equal(a, b) for a, b in zip(kept[-1], policy.parameters(), strict=True))


def test_ctrl_c_in_the_environment() -> None:
    def fault(step: int) -> None:
        if step == 130:
            raise KeyboardInterrupt

    with pytest.warns(UserWarning, match="interrupted"):
        result = train_ppo(partial(Point, fault), PPO, progress=False)
    assert result.stop_reason == "interrupted"
    assert len(result.history) == 2


def test_an_environment_that_breaks_leaves_what_was_learned() -> None:
    def fault(step: int) -> None:
        if step == 130:
            raise RuntimeError("simulator crashed")

    kept: list[list[Tensor]] = []
    policy = make_policy(Point.observation_space, Point.action_space, generator=torch.Generator())

    def keep(row: Any) -> None:
        kept.append([p.detach().clone() for p in policy.parameters()])

    with pytest.raises(RuntimeError, match="simulator crashed") as caught:
        train_ppo(partial(Point, fault), PPO, policy=policy, callback=keep, progress=False)
    result: Any = caught.value.result  # type: ignore[attr-defined]
    assert len(result.history) == len(kept) == 2  # two rollouts of 50 steps, and a part of the third
    assert result.stop_reason == "RuntimeError: simulator crashed"
    assert all(torch.equal(a, b) for a, b in zip(kept[-1], policy.parameters(), strict=True))
    assert "What was learned so far is in this exception's .result" in caught.value.__notes__


def poisoned(update: int, per_update: int, normal: Any) -> Callable[..., Any]:
    """A loss that turns to NaN in the given update."""
    calls = 0

    def loss(steps: Steps) -> Any:
        nonlocal calls
        items = normal(steps)
        calls += 1
        return items._replace(loss=items.loss * math.nan) if calls > per_update * (update - 1) else items

    return loss


def test_nan_stops_with_the_update_number_and_the_last_good_policy() -> None:
    kept: list[list[Tensor]] = []
    policy = ppo().policy

    def keep(row: Any) -> None:
        kept.append([p.detach().clone() for p in policy.parameters()])

    train = with_config(ppo, minibatch_size=10**6, epochs_per_batch=1)
    with pytest.raises(TrainingDivergedError, match=r"not finite in update 3 .*what update 2 left") as caught:
        train(policy=policy, loss=poisoned(3, 1, clipped), callback=keep)
    result = caught.value.result
    assert isinstance(caught.value, FloatingPointError)
    assert len(result.history) == len(kept) == 2
    assert result.policy is policy
    assert all(torch.equal(a, b) for a, b in zip(kept[-1], policy.parameters(), strict=True))
    assert all(torch.isfinite(p).all() for p in parameters(result))
    assert "policy_loss" in result.stop_reason
    assert "not finite" in result.stop_reason
    # It can be gone on from.
    assert train(policy=result.policy).stop_reason == "budget"


def test_nan_in_trpo_stops_too() -> None:
    def loss(steps: Steps) -> Surrogate:
        items = surrogate(steps)
        return items._replace(loss=items.loss * math.nan)

    with pytest.raises(TrainingDivergedError, match=r"gradient is not finite.*what update 0 left") as caught:
        trpo(loss=loss)
    assert all(torch.isfinite(p).all() for p in parameters(caught.value.result))


@ALGORITHMS
def test_nan_from_the_environment_names_it_and_keeps_the_policy(train: Any) -> None:
    def fault(step: int) -> float | None:
        return math.nan if step == 130 else None

    config = dataclasses.replace(train.args[1], total_steps=10_000)
    with pytest.raises(ValueError, match=r"Point returned a NaN or infinite reward") as caught:
        train.func(partial(Point, fault), config, progress=False)
    result = caught.value.result  # type: ignore[attr-defined]
    assert len(result.history) >= 2
    assert all(torch.isfinite(p).all() for p in parameters(result))
    assert any(".result" in note for note in caught.value.__notes__)


def test_a_learning_rate_beyond_reason_diverges_and_says_so() -> None:
    with pytest.raises(
        TrainingDivergedError,
        match=r"seed 0, \d+ of 600 steps.*lower learning rate or normalize_rewards=True",
    ):
        with_config(ppo, learning_rate=1e30, max_gradient_norm=None)()


class OneStep(gym.Env[Any, Any]):
    """Every episode is over after one step."""

    observation_space = gym.spaces.Box(-1, 1, (2,))
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed: int | None = None, options: Any = None) -> Any:
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action: Any) -> Any:
        return np.ones(2, np.float32), float(action), True, False, {}


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("train", [ppo, trpo], ids=["ppo", "trpo"])
def test_a_rollout_of_resets_alone_is_passed_over(train: Any, scaled: bool) -> None:
    """With one row of one copy every second rollout holds nothing but a reset."""
    changes = {"num_envs": 1, "rollout_steps": 1, "total_steps": 20, "normalize_rewards": scaled}
    result = with_config(on(train, OneStep), **changes)(seed=0)
    assert result.steps == len(result.episodes) == len(result.history) == 20
    assert all(p.isfinite().all() for p in result.policy.parameters())
