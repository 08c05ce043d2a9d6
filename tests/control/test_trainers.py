"""The training loops' mechanics: data flow, seeds, ways to end, saving and resuming. (Learning: test_learning.py.)"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import itertools
import json
import math
import subprocess
import sys
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from policyopt.control import (
    Policy,
    PPOConfig,
    PPOUpdate,
    ReinforceConfig,
    TrainingDivergedError,
    TrainResult,
    TRPOConfig,
    make_policy,
    make_vector_env,
    train_ppo,
    train_reinforce,
    train_seeds,
    train_trpo,
)
from policyopt.control import ppo as ppo_module
from policyopt.control.config import build_networks
from policyopt.control.training import _RewardScaler, minibatches
from policyopt.losses import ClippedSurrogate, Surrogate, clipped_surrogate_loss, surrogate_loss

SMALL: dict[str, Any] = {"num_envs": 4, "hidden": (16,), "device": "cpu"}
PPO = PPOConfig(total_steps=600, rollout_steps=50, minibatch=64, epochs=2, **SMALL)
TRPO = TRPOConfig(total_steps=600, rollout_steps=50, critic_epochs=2, **SMALL)
REINFORCE = ReinforceConfig(total_steps=600, baseline="learned", critic_epochs=2, **SMALL)

ppo = partial(train_ppo, "CartPole-v1", PPO, progress=False)
trpo = partial(train_trpo, "CartPole-v1", TRPO, progress=False)
reinforce = partial(train_reinforce, "CartPole-v1", REINFORCE, progress=False)
ALGORITHMS = pytest.mark.parametrize("train", [reinforce, trpo, ppo], ids=["reinforce", "trpo", "ppo"])


def with_config(train: Any, **changes: Any) -> Any:
    return partial(train.func, train.args[0], dataclasses.replace(train.args[1], **changes), **train.keywords)


def parameters(result: TrainResult[Any, Any]) -> list[Tensor]:
    critic = [] if result.critic is None else list(result.critic.parameters())
    return [p.detach() for p in [*result.policy.parameters(), *critic]]


def assert_same_run(one: TrainResult[Any, Any], other: TrainResult[Any, Any]) -> None:
    """Bit for bit."""
    assert one.history.table().keys() == other.history.table().keys()
    for name, column in one.history.table().items():
        np.testing.assert_array_equal(column, other.history.column(name), err_msg=name)
    for a, b in zip(parameters(one), parameters(other), strict=True):
        assert torch.equal(a, b)
    for name, column in one.episodes.table().items():
        np.testing.assert_array_equal(column, other.episodes.table()[name])


class Point(gym.Env[Any, Any]):
    """One observation for ever, reward −|a|²; ``fault(step)`` may raise or return a reward of its own."""

    observation_space = spaces.Box(-2, 2, (1,), np.float32)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, fault: Callable[[int], float | None] = lambda step: None, length: int = 10) -> None:
        self.fault, self.length, self.total = fault, length, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        return np.ones(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.count += 1
        self.total += 1
        reward = self.fault(self.total)
        reward = -float(np.square(action).sum()) if reward is None else reward
        return np.ones(1, np.float32), reward, False, self.count >= self.length, {}


# --- A run, from outside -------------------------------------------------------------------------------------


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
    with pytest.raises(ValueError, match=r"policy was made for other observations than those of Point"):
        train_ppo(Point, PPO, policy=policy, progress=False)


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


# --- Data flow -----------------------------------------------------------------------------------------------


def test_the_first_ratio_of_every_ppo_update_is_one() -> None:
    ratios: list[Tensor] = []

    def spy(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> ClippedSurrogate:
        ratios.append(torch.exp(log_prob - old_log_prob).detach())
        return clipped_surrogate_loss(log_prob, old_log_prob, advantages)

    result = with_config(ppo, minibatch=10**6)(policy_loss=spy)
    assert len(ratios) == PPO.epochs * len(result.history)
    for first, second in zip(ratios[::2], ratios[1::2], strict=True):
        assert (first == 1.0).all()
        assert (second != 1.0).any()
    # Also for continuous actions, where statistics of observations might move in between.
    ratios.clear()
    train_ppo(Point, dataclasses.replace(PPO, minibatch=10**6), policy_loss=spy, progress=False)
    for first in ratios[::2]:
        assert (first == 1.0).all()


def test_ppo_sees_normalised_advantages_and_every_item_once_per_epoch() -> None:
    seen: list[Tensor] = []

    def spy(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> ClippedSurrogate:
        seen.append(advantages)
        return clipped_surrogate_loss(log_prob, old_log_prob, advantages)

    result = with_config(ppo, epochs=3, total_steps=1)(policy_loss=spy)
    per_epoch = len(seen) // 3
    epochs = [torch.cat(seen[k * per_epoch : (k + 1) * per_epoch]) for k in range(3)]
    assert all(len(epoch) == result.steps for epoch in epochs)  # junk rows are not among them
    assert abs(epochs[0].mean()) < 1e-5
    assert epochs[0].std(correction=0).item() == pytest.approx(1, abs=1e-4)
    for epoch in epochs[1:]:
        assert torch.equal(epoch.sort().values, epochs[0].sort().values)
        assert not torch.equal(epoch, epochs[0])  # shuffled anew


@given(size=st.integers(1, 200), minibatch=st.integers(1, 300))
def test_minibatches_partition_the_batch_evenly(size: int, minibatch: int) -> None:
    pieces = list(minibatches(size, minibatch, torch.Generator().manual_seed(0)))
    assert sorted(torch.cat(pieces).tolist()) == list(range(size))
    lengths = [len(piece) for piece in pieces]
    assert max(lengths) <= minibatch
    assert max(lengths) - min(lengths) <= 1
    assert len(pieces) == math.ceil(size / minibatch)


def test_target_kl_stops_the_epochs() -> None:
    train = with_config(ppo, epochs=8, learning_rate=0.05, anneal_learning_rate=False)
    free, held = train(), with_config(train, target_kl=1e-4)()
    assert set(free.history.column("epochs")) == {8}
    assert held.history.column("epochs").max() < 8
    for row in held.history:
        assert row.kl > 1.5e-4 or row.epochs == 8


def test_the_learning_rate_is_annealed_over_the_budget() -> None:
    result = ppo()
    previous = 0
    for row in result.history:
        assert row.learning_rate == pytest.approx(PPO.learning_rate * (1 - previous / 600))
        previous = row.steps
    constant = with_config(ppo, anneal_learning_rate=False)()
    assert set(constant.history.column("learning_rate")) == {PPO.learning_rate}


def test_the_gradient_is_limited() -> None:
    """With plain SGD in Adam's place, a step is no longer than learning rate × limit."""
    limit, moved = 1e-3, []

    class Sgd(torch.optim.SGD):
        def step(self, closure: Any = None) -> None:  # type: ignore[override]
            before = torch.nn.utils.parameters_to_vector(self.param_groups[0]["params"]).detach().clone()
            super().step()
            after = torch.nn.utils.parameters_to_vector(self.param_groups[0]["params"]).detach()
            moved.append((after - before).norm().item())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ppo_module.Run, "adam", lambda self, p, lr: Sgd(p, lr=1.0))
        with_config(ppo, max_gradient_norm=limit, anneal_learning_rate=False)()
    assert 0.9 * limit < max(moved) < 1.01 * limit


@pytest.mark.parametrize("epochs", [1, 3])
def test_without_a_critic_ppo_weighs_by_returns(epochs: int) -> None:
    seen: list[Tensor] = []

    def spy(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> ClippedSurrogate:
        seen.append(advantages)
        return clipped_surrogate_loss(log_prob, old_log_prob, advantages)

    train = with_config(
        ppo, use_critic=False, rollout_steps=None, normalize_advantages=False, gamma=1.0, gae_lambda=1.0,
        minibatch=10**6, epochs=epochs, total_steps=1,
    )  # fmt: skip
    result = train(policy_loss=spy)
    # CartPole pays 1 a step: the return-to-go counts down from the length of the episode.
    expected = sorted(g for length in result.episodes.lengths for g in range(1, length + 1))
    assert seen[0].sort().values.tolist() == pytest.approx(expected)
    assert result.critic is None
    assert math.isnan(result.history[-1].explained_variance)


@settings(max_examples=6)
@given(
    seed=st.integers(0, 1000),
    kl_limit=st.sampled_from([1e-3, 1e-2, 0.1]),
    damping=st.sampled_from([1e-3, 0.1]),
)
def test_trpo_keeps_its_kl_limit(seed: int, kl_limit: float, damping: float) -> None:
    """Measured here, from copies of the policy on the only observation there is; the spread σ moves too."""
    policy = make_policy(
        Point.observation_space,
        Point.action_space,
        hidden=(8,),
        generator=torch.Generator().manual_seed(seed),
    )

    def snapshot() -> torch.distributions.Distribution:
        with torch.no_grad():
            d = policy(torch.ones(1))
            return torch.distributions.Normal(d.mean.clone(), d.log_std.exp().clone())

    seen = [snapshot()]
    config = dataclasses.replace(
        TRPO, kl_limit=kl_limit, damping=damping, normalize_observations=False, total_steps=1600
    )
    result = train_trpo(
        Point,
        config,
        seed=seed,
        policy=policy,
        callback=lambda row: seen.append(snapshot()),  # type: ignore[func-returns-value]
        progress=False,
    )
    kls = [torch.distributions.kl_divergence(old, new).sum().item() for old, new in itertools.pairwise(seen)]
    assert max(kls) > 0.1 * kl_limit  # it does move
    assert max(kls) <= kl_limit * (1 + 1e-3) + 1e-6
    np.testing.assert_allclose(result.history.column("kl"), kls, rtol=1e-2, atol=2e-6)


def test_trpo_history_keeps_the_limit_on_cartpole() -> None:
    result = with_config(trpo, total_steps=2000)()
    kl, fraction = result.history.column("kl"), result.history.column("step_fraction")
    assert (kl <= TRPO.kl_limit).all()
    assert (kl > 0).any()
    accepted = result.history.column("line_search") == "accepted"
    assert ((fraction > 0) == accepted).all()
    assert ((result.history.column("improvement") > 0) == accepted).all()


def test_trpo_steps_that_are_refused_leave_the_policy_alone() -> None:
    def no_better(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> Surrogate:
        items = surrogate_loss(log_prob, old_log_prob, advantages)
        moved = (items.ratio != 1).any()
        return items._replace(loss=items.loss + 100.0 * moved)

    policy = trpo().policy
    before = [p.detach().clone() for p in policy.parameters()]
    result = trpo(policy=policy, surrogate=no_better)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    assert set(result.history.column("step_fraction")) == {0.0}
    assert not result.history.column("kl").any()
    assert all(reason.startswith("improvement") for reason in result.history.column("line_search"))


# --- Rewards -------------------------------------------------------------------------------------------------


def test_reward_scaling_equals_a_slow_loop() -> None:
    """The standard deviation of the discounted sums of rewards so far, restarted at episode ends, junk left out."""
    from policyopt.control import Collector

    class Noisy(Point):
        def __init__(self, length: int) -> None:
            super().__init__(lambda step: math.sin(7.0 * step) + 2.0, length)

    for whole in (False, True):
        env = SyncVectorEnv([partial(Noisy, 3), partial(Noisy, 7)], autoreset_mode=AutoresetMode.NEXT_STEP)
        policy = make_policy(Point.observation_space, Point.action_space, generator=torch.Generator())
        collector = Collector(env, policy, torch.Generator().manual_seed(0), seed=0)
        scaler, seen, running = _RewardScaler(0.9, 2, (0.0, 0.0, 0.0)), [], [0.0, 0.0]
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


# --- Ends ----------------------------------------------------------------------------------------------------


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
    for train, module in ((ppo, "policy_loss"), (trpo, "surrogate")):
        policy, kept, calls = train().policy, [], 0

        def spy(*tensors: Tensor, train: Any = train, kept: list[Any] = kept) -> Any:
            nonlocal calls
            calls += len(kept) == 2  # in the third update
            if calls == 2:
                raise KeyboardInterrupt
            return (clipped_surrogate_loss if train is ppo else surrogate_loss)(*tensors)

        def keep(row: Any, policy: Any = policy, kept: list[Any] = kept) -> None:
            kept.append([p.detach().clone() for p in policy.parameters()])

        with pytest.warns(UserWarning, match="interrupted"):
            result = train(policy=policy, callback=keep, **{module: spy})
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


def poisoned(update: int, per_update: int, normal: Any) -> Callable[..., Any]:
    """A loss that turns to NaN in the given update."""
    calls = 0

    def loss(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> Any:
        nonlocal calls
        items = normal(log_prob, old_log_prob, advantages)
        calls += 1
        return items._replace(loss=items.loss * math.nan) if calls > per_update * (update - 1) else items

    return loss


def test_nan_stops_with_the_update_number_and_the_last_good_policy() -> None:
    kept: list[list[Tensor]] = []
    policy = ppo().policy

    def keep(row: Any) -> None:
        kept.append([p.detach().clone() for p in policy.parameters()])

    train = with_config(ppo, minibatch=10**6, epochs=1)
    with pytest.raises(TrainingDivergedError, match=r"not finite in update 3 .*policy of update 2") as caught:
        train(policy=policy, policy_loss=poisoned(3, 1, clipped_surrogate_loss), callback=keep)
    result = caught.value.result
    assert isinstance(caught.value, FloatingPointError)
    assert len(result.history) == len(kept) == 2
    assert result.policy is policy
    assert all(torch.equal(a, b) for a, b in zip(kept[-1], policy.parameters(), strict=True))
    assert all(torch.isfinite(p).all() for p in parameters(result))
    assert "not finite in update 3" in result.stop_reason
    # It can be gone on from: the optimiser's broken moments are not among what is kept.
    assert result.optimizer_state == {}
    again = train(resume=result)
    assert again.stop_reason == "budget"
    assert len(again.history) > 2


def test_nan_in_trpo_stops_too() -> None:
    def loss(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> Surrogate:
        items = surrogate_loss(log_prob, old_log_prob, advantages)
        return items._replace(loss=items.loss * math.nan)

    with pytest.raises(TrainingDivergedError, match=r"gradient is not finite.*policy of update 0") as caught:
        trpo(surrogate=loss)
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
    with pytest.raises(TrainingDivergedError, match="lower learning rate"):
        with_config(ppo, learning_rate=1e30, max_gradient_norm=None)()


# --- Save, load, resume --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "run",
    [
        reinforce,
        trpo,
        ppo,
        with_config(reinforce, baseline="none"),
        partial(train_ppo, Point, dataclasses.replace(PPO, normalize_rewards=True, activation="relu")),
    ],
    ids=["reinforce", "trpo", "ppo", "no critic", "continuous"],
)
def test_save_and_load(run: Any, tmp_path: Path) -> None:
    result = run(seed=np.int64(2), progress=False)
    folder = result.save(tmp_path / "run")
    assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    json.loads((folder / "state.json").read_text())
    loaded = TrainResult.load(folder)
    assert_same_run(result, loaded)
    observations = torch.from_numpy(np.stack([result.spaces[0].sample() for _ in range(20)])).clamp(-5, 5)
    ours, theirs = result.policy(observations), loaded.policy(observations)
    assert torch.equal(ours.mode(), theirs.mode())
    assert torch.equal(ours.entropy(), theirs.entropy())
    assert (loaded.critic is None) == (result.critic is None)
    assert loaded.config == result.config
    assert loaded.spaces == result.spaces
    assert loaded.reward_statistics == result.reward_statistics
    for name in ("algorithm", "environment", "seed", "stop_reason", "steps", "seconds"):
        assert getattr(loaded, name) == getattr(result, name)
    ours, theirs = result.optimizer_state["state"], loaded.optimizer_state["state"]
    assert ours.keys() == theirs.keys()
    for index in ours:
        for key, value in ours[index].items():
            assert torch.equal(torch.as_tensor(value), theirs[index][key])


@ALGORITHMS
def test_resuming(train: Any, tmp_path: Path) -> None:
    first = train()
    frozen = [p.clone() for p in parameters(first)]
    moments = {i: s["exp_avg"].clone() for i, s in first.optimizer_state["state"].items()}
    longer = with_config(train, total_steps=1400)
    second = longer(resume=first)
    assert second.history[: len(first.history)] == first.history
    assert second.steps >= 1400
    updates = second.history.column("update").tolist()
    assert updates == list(range(1, len(updates) + 1))
    assert (np.diff(second.history.column("steps")) > 0).all()
    assert (np.diff(second.history.column("episodes")) >= 0).all()
    assert (np.diff(second.episodes.steps) >= 0).all()
    assert len(second.episodes) == second.history[-1].episodes
    # The episodes are new ones, not those of the first part again.
    n = len(first.episodes)
    assert not np.array_equal(second.episodes.returns[n : 2 * n], first.episodes.returns)
    # What was resumed from is left as it was.
    assert all(torch.equal(a, b) for a, b in zip(frozen, parameters(first), strict=True))
    for i, s in first.optimizer_state["state"].items():
        assert torch.equal(s["exp_avg"], moments[i])
    # From the disk it is the same.
    assert_same_run(second, longer(resume=TrainResult.load(first.save(tmp_path / "run"))))
    # A budget that is used up already means no more training.
    assert train(resume=first).history == first.history


def test_resuming_starts_from_the_old_weights_and_moments() -> None:
    """A learning rate of (nearly) nothing shows where it started; Adam's counter, that its moments were taken over."""
    first = ppo()
    still = with_config(ppo, total_steps=1000, learning_rate=1e-30, anneal_learning_rate=False)(resume=first)
    for a, b in zip(parameters(first), parameters(still), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-20)
    before, after = (r.optimizer_state["state"][0]["step"].item() for r in (first, still))
    new_steps = sum(
        math.ceil((row.steps - previous) / PPO.minibatch) * PPO.epochs
        for previous, row in zip(
            still.history.column("steps")[len(first.history) - 1 :],
            still.history[len(first.history) :],
            strict=False,
        )
    )
    assert after == before + new_steps
    assert still.history[-1].learning_rate == 1e-30  # the new config's, not the old one's


def test_resuming_refuses_what_does_not_fit() -> None:
    result = ppo()
    cases: list[tuple[Any, str]] = [
        (trpo, "resume must be a trpo run, got a ppo run"),
        (with_config(ppo, hidden=(8, 8)), r"resume has hidden=\(16,\), the config \(8, 8\)"),
        (with_config(ppo, activation="relu"), "resume has activation='tanh', the config 'relu'"),
        (with_config(ppo, normalize_observations=True), "differ in normalize_observations"),
        (with_config(ppo, use_critic=False, rollout_steps=None), "resume must have a critic exactly when"),
        (partial(train_ppo, Point, PPO, progress=False), "resume was trained on spaces"),
    ]
    for train, message in cases:
        with pytest.raises(ValueError, match=message):
            train(resume=result)


def test_a_policy_that_the_config_does_not_describe_is_not_saved_whole(tmp_path: Path) -> None:
    env = gym.make("CartPole-v1")
    policy = make_policy(env.observation_space, env.action_space, hidden=(5,), generator=torch.Generator())
    result = ppo(policy=policy)
    with pytest.raises(ValueError, match=r"policy must be the one that the config describes.*safetensors"):
        result.save(tmp_path)

    class Mine(Policy):
        def __init__(self, inner: Any) -> None:
            super().__init__()
            self.inner, self.encoder = inner, inner.encoder

        def forward(self, observations: Tensor) -> Any:
            return self.inner(observations)

        def to_env(self, actions: Tensor) -> Any:
            return self.inner.to_env(actions)

    with pytest.raises(ValueError, match="got a Mine"):
        ppo(policy=Mine(policy)).save(tmp_path)


def test_a_format_of_the_future_is_named(tmp_path: Path) -> None:
    folder = ppo().save(tmp_path)
    state = json.loads((folder / "state.json").read_text())
    for change, message in (
        ({"format": 2}, "has format 2"),
        ({"algorithm": "sac"}, "algorithm must be one of"),
    ):
        (folder / "state.json").write_text(json.dumps({**state, "metadata": {**state["metadata"], **change}}))
        with pytest.raises(ValueError, match=message):
            TrainResult.load(folder)


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


# --- Many seeds ----------------------------------------------------------------------------------------------


def test_seeds_in_parallel_equal_seeds_in_turn_equal_single_runs() -> None:
    scale = 1.0  # a closure: it travels to the workers too

    def own_loss(*tensors: Tensor) -> ClippedSurrogate:
        items = clipped_surrogate_loss(*tensors)
        return items._replace(loss=scale * items.loss)

    def diverging(*, seed: int, progress: bool) -> TrainResult[Any, Any]:
        loss = poisoned(2, 1, clipped_surrogate_loss)
        return with_config(ppo, minibatch=10**6, epochs=1)(seed=seed, policy_loss=loss)

    runs = {"ppo": partial(ppo, policy_loss=own_loss), "trpo": trpo, "diverging": diverging}
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
        assert "not finite in update 2" in result.stop_reason

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


# --- Bad input -----------------------------------------------------------------------------------------------

BAD: list[tuple[type, str, Any]] = [
    (PPOConfig, "total_steps", 0),
    (PPOConfig, "total_steps", 1e5),
    (PPOConfig, "total_steps", True),
    (PPOConfig, "num_envs", 0),
    (PPOConfig, "num_envs", "8"),
    (PPOConfig, "gamma", 1.01),
    (PPOConfig, "gamma", math.nan),
    (PPOConfig, "gamma", "0.9"),
    (PPOConfig, "cpu_threads", 0),
    (PPOConfig, "hidden", (64, 0)),
    (PPOConfig, "hidden", 64),
    (PPOConfig, "activation", "gelu"),
    (PPOConfig, "normalize_rewards", "yes"),
    (PPOConfig, "initial_log_std", math.nan),
    (PPOConfig, "rollout_steps", 0),
    (PPOConfig, "gae_lambda", -0.1),
    (PPOConfig, "use_critic", False),
    (PPOConfig, "epochs", 0),
    (PPOConfig, "minibatch", 0),
    (PPOConfig, "learning_rate", 0.0),
    (PPOConfig, "learning_rate", math.inf),
    (PPOConfig, "clip_ratio", 0.0),
    (PPOConfig, "clip_ratio", None),
    (PPOConfig, "value_clip", 0.0),
    (PPOConfig, "value_coef", -1.0),
    (PPOConfig, "entropy_coef", -1.0),
    (PPOConfig, "max_gradient_norm", 0.0),
    (PPOConfig, "target_kl", 0.0),
    (TRPOConfig, "kl_limit", 0.0),
    (TRPOConfig, "damping", -1.0),
    (TRPOConfig, "cg_iterations", 0),
    (TRPOConfig, "backtracks", 0),
    (TRPOConfig, "shrink", 1.0),
    (TRPOConfig, "accept_ratio", 1.0),
    (TRPOConfig, "critic_learning_rate", 0.0),
    (TRPOConfig, "critic_epochs", 0),
    (TRPOConfig, "critic_minibatch", 0),
    (TRPOConfig, "compile", True),
    (ReinforceConfig, "learning_rate", -1.0),
    (ReinforceConfig, "baseline", "median"),
    (ReinforceConfig, "entropy_coef", -0.1),
    (ReinforceConfig, "critic_epochs", 0),
]


@pytest.mark.parametrize(("config", "name", "value"), BAD)
def test_configs_name_the_bad_value(config: type, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .+, got ") as caught:
        config(**{name: value})
    assert str(caught.value).endswith(f"got {value!r}")


def test_every_numeric_setting_is_covered_above() -> None:
    tried = {(config, name) for config, name, _ in BAD}
    for config in (PPOConfig, TRPOConfig, ReinforceConfig):
        for field in dataclasses.fields(config):
            if any(kind in str(field.type) for kind in ("int", "float")):
                assert any((c, field.name) in tried for c in (config, PPOConfig)), (config, field.name)


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PPO.gamma = 0.5  # type: ignore[misc]


@pytest.mark.parametrize("device", ["warp-drive", "cuda:99", "cpu:x"])
def test_an_unknown_device_is_named(device: str) -> None:
    with pytest.raises(
        ValueError, match=rf"device must be 'auto' or a device that this machine has.*'{device}'"
    ):
        with_config(ppo, device=device)()


@pytest.mark.parametrize("seed", [-1, 1.5, "0"])
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
        action_space = spaces.MultiBinary(3)

    with pytest.raises(
        ValueError, match="action space must be Discrete or a floating-point Box, got MultiBinary"
    ):
        train.func(Wrong, train.args[1], progress=False)


# --- Quiet ---------------------------------------------------------------------------------------------------


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


# --- CUDA ----------------------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize("train", [reinforce, trpo, ppo], ids=["reinforce", "trpo", "ppo"])
@pytest.mark.parametrize("environment", ["CartPole-v1", Point], ids=["discrete", "continuous"])
def test_cuda(train: Any, environment: Any, tmp_path: Path) -> None:
    config = dataclasses.replace(train.args[1], device="cuda", normalize_rewards=True)
    result = train.func(environment, config, progress=False)
    assert all(p.device.type == "cuda" for p in parameters(result))
    if "kl" in result.history.table() and isinstance(config, TRPOConfig):
        assert (result.history.column("kl") <= config.kl_limit).all()
    loaded = TrainResult.load(result.save(tmp_path))
    for a, b in zip(parameters(result), parameters(loaded), strict=True):
        assert torch.equal(a.cpu(), b)
    longer = dataclasses.replace(config, total_steps=1200)
    resumed = train.func(environment, longer, resume=loaded, progress=False)
    assert resumed.steps >= 1200


@pytest.mark.cuda
def test_cuda_ratio_of_the_first_pass_is_one() -> None:
    ratios: list[Tensor] = []

    def spy(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> ClippedSurrogate:
        ratios.append(torch.exp(log_prob - old_log_prob).detach())
        return clipped_surrogate_loss(log_prob, old_log_prob, advantages)

    with_config(ppo, minibatch=10**6, device="cuda")(policy_loss=spy)
    for first in ratios[::2]:
        torch.testing.assert_close(first, torch.ones_like(first), rtol=0, atol=1e-5)
