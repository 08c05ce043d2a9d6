"""What PPO and TRPO do with a batch."""

from __future__ import annotations

import dataclasses
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch
from control_runs import PPO, TRPO, Point, clipped, ppo, surrogate, trpo, with_config
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from policyopt.control import PPOConfig, Steps, make_policy, ppo_loss, train_ppo, train_trpo
from policyopt.control import trpo as trpo_module
from policyopt.control.steps import estimate_advantages
from policyopt.control.training import Run
from policyopt.losses import ClippedSurrogate, Surrogate


def test_the_first_ratio_of_every_ppo_update_is_one() -> None:
    ratios: list[Tensor] = []

    def spy(steps: Steps) -> ClippedSurrogate:
        ratios.append(torch.exp(steps.log_prob - steps.old_log_prob).detach())
        return clipped(steps)

    result = with_config(ppo, minibatch_size=10**6)(loss=spy)
    assert len(ratios) == PPO.epochs_per_batch * len(result.history)
    for first, second in zip(ratios[::2], ratios[1::2], strict=True):
        assert (first == 1.0).all()
        assert (second != 1.0).any()
    # Also for continuous actions, where statistics of observations might move in between.
    ratios.clear()
    train_ppo(Point, dataclasses.replace(PPO, minibatch_size=10**6), loss=spy, progress=False)
    for first in ratios[::2]:
        assert (first == 1.0).all()


def test_ppo_sees_normalised_advantages_and_every_item_once_per_epoch() -> None:
    seen: list[Tensor] = []

    def spy(steps: Steps) -> ClippedSurrogate:
        seen.append(steps.advantages)
        return clipped(steps)

    result = with_config(ppo, epochs_per_batch=3, total_steps=1)(loss=spy)
    per_epoch = len(seen) // 3
    epochs = [torch.cat(seen[k * per_epoch : (k + 1) * per_epoch]) for k in range(3)]
    assert all(len(epoch) == result.steps for epoch in epochs)  # junk rows are not among them
    assert abs(epochs[0].mean()) < 1e-5
    assert epochs[0].std(correction=0).item() == pytest.approx(1, abs=1e-4)
    for epoch in epochs[1:]:
        assert torch.equal(epoch.sort().values, epochs[0].sort().values)
        assert not torch.equal(epoch, epochs[0])  # shuffled again


def numbered(size: int) -> Steps:
    """Steps whose every field says which one it is."""
    number = torch.arange(size, dtype=torch.float32)
    return Steps(**{field.name: number for field in dataclasses.fields(Steps)})


@given(size=st.integers(1, 200), minibatch=st.integers(1, 300))
def test_minibatches_partition_the_batch_evenly(size: int, minibatch: int) -> None:
    pieces = list(numbered(size).minibatches(minibatch, torch.Generator().manual_seed(0)))
    assert sorted(torch.cat([piece.advantages for piece in pieces]).tolist()) == list(range(size))
    lengths = [len(piece) for piece in pieces]
    assert max(lengths) <= minibatch
    assert max(lengths) - min(lengths) <= 1
    assert len(pieces) == math.ceil(size / minibatch)


def test_advantages_of_each_minibatch_are_scaled_if_asked() -> None:
    plain = list(numbered(50).minibatches(8, torch.Generator().manual_seed(0)))
    scaled = list(numbered(50).minibatches(8, torch.Generator().manual_seed(0), normalized=True))
    for one, other in zip(plain, scaled, strict=True):
        wanted = (one.advantages - one.advantages.mean()) / one.advantages.std(correction=0)
        torch.testing.assert_close(other.advantages, wanted)
        assert torch.equal(one.targets, other.targets)
    seen: list[torch.Tensor] = []
    config = PPOConfig(
        total_steps=64, num_envs=2, rollout_steps=32, minibatch_size=8, normalize_minibatches=True
    )

    def spy(steps: Steps) -> ClippedSurrogate:
        seen.append(steps.advantages)
        return ppo_loss(steps, config)

    train_ppo("CartPole-v1", config, loss=spy, progress=False)
    assert len(seen) >= 4 * 8
    assert all(abs(x.mean()) < 1e-5 and abs(x.std(correction=0) - 1) < 1e-3 for x in seen)


def test_rows_are_picked_from_every_field_alike() -> None:
    rows = torch.tensor([2, 0])
    picked = numbered(3).select(rows)
    assert all(getattr(picked, field.name).tolist() == [2, 0] for field in dataclasses.fields(Steps))
    masked = numbered(3).select(torch.tensor([True, False, True]))
    assert masked.targets.tolist() == [0, 2]


def test_target_kl_stops_the_epochs() -> None:
    train = with_config(ppo, epochs_per_batch=8, learning_rate=0.05, anneal_learning_rate=False)
    free, held = train(), with_config(train, target_kl=1e-4)()
    assert set(free.history.column("passes")) == {8}
    assert held.history.column("passes").max() < 8
    for row in held.history:
        assert row.kl > 1.5e-4 or row.passes == 8


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
        patch.setattr(Run, "adam", lambda self, p, lr: Sgd(p, lr=1.0))
        with_config(ppo, max_gradient_norm=limit, anneal_learning_rate=False)()
    assert 0.9 * limit < max(moved) < 1.01 * limit


@pytest.mark.parametrize("epochs", [1, 3])
def test_without_a_critic_ppo_weighs_by_returns(epochs: int) -> None:
    seen: list[Tensor] = []

    def spy(steps: Steps) -> ClippedSurrogate:
        seen.append(steps.advantages)
        return clipped(steps)

    train = with_config(
        ppo, use_critic=False, rollout_steps=None, normalize_advantages=False, gamma=1.0, gae_lambda=1.0,
        minibatch_size=10**6, epochs_per_batch=epochs, total_steps=1,
    )  # fmt: skip
    result = train(loss=spy)
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
    def no_better(steps: Steps) -> Surrogate:
        items = surrogate(steps)
        moved = (items.ratio != 1).any()
        return items._replace(loss=items.loss + 100.0 * moved)

    policy = trpo().policy
    before = [p.detach().clone() for p in policy.parameters()]
    result = trpo(policy=policy, loss=no_better)
    assert all(torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))
    assert set(result.history.column("step_fraction")) == {0.0}
    assert not result.history.column("kl").any()
    assert all(reason.startswith("improvement") for reason in result.history.column("line_search"))


def test_trpo_reports_the_critics_mean_loss_over_its_last_pass(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not that of the last minibatch: with a learning rate of nearly nothing both are seen beforehand."""
    batches: list[Steps] = []

    def spy(*args: Any) -> Steps:
        batches.append(estimate_advantages(*args))
        return batches[-1]

    monkeypatch.setattr(trpo_module, "estimate_advantages", spy)
    still = with_config(trpo, critic_learning_rate=1e-30, critic_minibatch_size=60)
    result = still()
    for row, steps in zip(result.history, batches, strict=True):
        with torch.no_grad():
            expected = 0.5 * (result.critic(steps.observations) - steps.targets).square()
        # Near-equal minibatches: the mean of their means is nearly the mean.
        assert row.value_loss == pytest.approx(expected.mean().item(), rel=0.02)


def test_without_a_critic_trpo_has_no_value_loss() -> None:
    row = with_config(trpo, use_critic=False, rollout_steps=None, total_steps=1)().history[0]
    assert row.value_loss == 0
    assert math.isnan(row.explained_variance)
