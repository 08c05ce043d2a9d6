"""Estimators against slow loops, numbers computed by hand, and exact expectations by enumeration."""

from __future__ import annotations

import itertools
import math
from functools import partial
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from policyopt import mdp
from policyopt.control import Episodes, Rollout, reinforce_weights
from policyopt.estimators import (
    ImportanceMode,
    adaptive_kl_coefficient,
    best_of_group,
    discounted_returns,
    explained_variance,
    gae,
    group_relative_advantages,
    importance_weights,
    kl_estimate,
    kl_shaped_rewards,
    leave_one_out_advantages,
    normalize,
    pass_at_k_advantages,
    sequence_log_prob,
    td_errors,
)
from policyopt.losses import aggregate, clipped_surrogate_loss, policy_gradient_loss, surrogate_loss
from policyopt.mdp import FiniteMDP

F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- Policy gradients are unbiased ------------------------------------------------------------------------


def tiny_mdp(gamma: float) -> FiniteMDP:
    """Stochastic, two actions, over after at most three steps, all probabilities multiples of 1/4."""
    P = torch.zeros(4, 2, 4, dtype=F64)
    P[0, 0] = torch.tensor([0.0, 0.25, 0.75, 0.0])
    P[0, 1] = torch.tensor([0.0, 0.5, 0.0, 0.5])
    P[1, 0] = torch.tensor([0.0, 0.0, 1.0, 0.0])
    P[1, 1] = torch.tensor([0.0, 0.0, 0.25, 0.75])
    P[2, :, 3] = P[3, :, 3] = 1.0
    R = torch.tensor([[1.0, -2.0], [3.0, 0.5], [-1.0, 4.0], [0.0, 0.0]], dtype=F64)
    return FiniteMDP(P, R, gamma, [0.5, 0.5, 0.0, 0.0])


# Log-probabilities of multiples of 1/4, so that every trajectory's probability is a multiple of 2^-11.
THETA = torch.tensor([[0.25, 0.75], [0.5, 0.5], [0.75, 0.25], [0.5, 0.5]], dtype=F64).log()


def all_trajectories(problem: FiniteMDP) -> tuple[Rollout, Tensor]:
    """Every trajectory, as often as its probability says, so that the plain mean over columns is E over the policy.

    Returns them as a rollout whose observations are states, and the next states.
    """
    policy = mdp.softmax_policy(THETA)
    found: list[tuple[float, list[tuple[int, int, int]]]] = []

    def follow(s: int, probability: float, path: list[tuple[int, int, int]]) -> None:
        if probability == 0.0:
            return
        if problem.terminal[s]:
            found.append((probability, path))
            return
        for a, following in itertools.product(range(2), range(problem.n_states)):
            step = float(policy[s, a] * problem.P[s, a, following])
            follow(following, probability * step, [*path, (s, a, following)])

    for s in range(problem.n_states):
        follow(s, float(problem.initial[s]), [])
    columns = [path for probability, path in found for _ in range(round(probability * 2**11))]
    assert len(columns) == 2**11  # nothing was lost to rounding
    horizon, n = max(len(path) for path in columns), len(columns)
    states, actions, following = (torch.zeros(horizon, n, dtype=torch.long) for _ in range(3))
    rewards = torch.full((horizon, n), 1e6, dtype=F64)  # junk where nothing is written: it must not matter
    valid, terminated = torch.zeros(horizon, n, dtype=torch.bool), torch.zeros(horizon, n, dtype=torch.bool)
    for i, path in enumerate(columns):
        for t, (s, a, s_next) in enumerate(path):
            states[t, i], actions[t, i], following[t, i] = s, a, s_next
            rewards[t, i], valid[t, i] = problem.R[s, a], True
        terminated[len(path) - 1, i] = True
    none = torch.empty(0, dtype=torch.long)
    rollout = Rollout(
        states, actions, rewards, terminated, torch.zeros_like(valid), valid, states[-1], (none, none), none,
        Episodes.concatenate([]),
    )  # fmt: skip
    return rollout, following


def mean_gradient(rollout: Rollout, weights: Tensor, gamma: float, kind: str = "policy gradient") -> Tensor:
    """−∇ of the loss, summed over time with the factor γ^t and averaged over trajectories."""
    theta = THETA.clone().requires_grad_()
    log_prob = theta.log_softmax(-1)[rollout.observations, rollout.actions]
    discounts = gamma ** torch.arange(len(weights), dtype=F64)[:, None]
    if kind == "policy gradient":
        loss = policy_gradient_loss(log_prob, weights * discounts)
    elif kind == "surrogate":
        loss = surrogate_loss(log_prob, log_prob, weights * discounts).loss
    else:
        loss = clipped_surrogate_loss(log_prob, log_prob, weights * discounts).loss
    aggregate(loss, rollout.valid, denominator=rollout.valid.shape[1]).backward()
    assert theta.grad is not None
    return -theta.grad


@pytest.mark.parametrize("gamma", [1.0, 0.6])
@pytest.mark.parametrize("reward_to_go", [True, False])
@pytest.mark.parametrize("baseline", ["none", "mean", "learned"])
def test_reinforce_is_unbiased(gamma: float, reward_to_go: bool, baseline: Any) -> None:
    problem = tiny_mdp(gamma)
    rollout, _ = all_trajectories(problem)
    values = torch.tensor([7.0, -3.0, 0.5, 99.0], dtype=F64)[
        rollout.observations
    ]  # any function of the state
    weights, returns = reinforce_weights(
        rollout, gamma=gamma, reward_to_go=reward_to_go, baseline=baseline, values=values
    )
    # The whole return is discounted from t = 0 already: no factor γ^t.
    estimate = mean_gradient(rollout, weights, gamma if reward_to_go else 1.0)
    torch.testing.assert_close(estimate, mdp.exact_policy_gradient(problem, THETA))
    assert not weights[~rollout.valid].any()
    assert not returns[~rollout.valid].any()


def test_leaving_out_the_discount_factor_is_biased() -> None:
    """What everybody does, and reinforce_weights too: said in its docstring, and seen here."""
    problem = tiny_mdp(0.6)
    rollout, _ = all_trajectories(problem)
    estimate = mean_gradient(rollout, reinforce_weights(rollout, gamma=0.6)[0], 1.0)
    assert (estimate - mdp.exact_policy_gradient(problem, THETA)).abs().max() > 0.01


@pytest.mark.parametrize("gamma", [1.0, 0.6])
@pytest.mark.parametrize("gae_lambda", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("kind", ["policy gradient", "surrogate", "clipped surrogate"])
def test_gae_is_unbiased_with_the_true_values(gamma: float, gae_lambda: float, kind: str) -> None:
    problem = tiny_mdp(gamma)
    rollout, following = all_trajectories(problem)
    true_values = mdp.policy_evaluation(problem, mdp.softmax_policy(THETA))
    exact = mdp.exact_policy_gradient(problem, THETA)

    def estimate(values: Tensor) -> Tensor:
        advantages = gae(
            torch.where(rollout.valid, rollout.rewards, 0.0),
            values[rollout.observations],
            values[following],
            rollout.terminated,
            rollout.truncated,
            gamma=gamma,
            gae_lambda=gae_lambda,
        )
        return mean_gradient(rollout, advantages, gamma, kind)

    torch.testing.assert_close(estimate(true_values), exact)
    wrong = true_values + torch.tensor([3.0, -2.0, 1.0, 50.0], dtype=F64)
    if gae_lambda == 1.0:  # a baseline, and nothing else: any V will do
        torch.testing.assert_close(estimate(wrong), exact)
    else:
        assert (estimate(wrong) - exact).abs().max() > 0.01


def test_sampled_gradient_is_within_its_standard_error_of_the_exact_one() -> None:
    problem, n = tiny_mdp(1.0), 20_000
    policy = mdp.softmax_policy(THETA)
    sample = mdp.sample_trajectories(problem, policy, n, max_steps=10, generator=generator(0))
    returns = discounted_returns(sample.rewards, sample.terminated, sample.truncated, gamma=1.0)
    scores = torch.zeros(n, 4, 2, dtype=F64)
    for state, action, weight, valid in zip(
        sample.states, sample.actions, returns, sample.valid, strict=True
    ):
        score = torch.nn.functional.one_hot(action, 2) - policy[state]
        scores[torch.arange(n), state] += torch.where(valid, weight, 0.0)[:, None] * score
    error = (scores.mean(0) - mdp.exact_policy_gradient(problem, THETA)).abs()
    assert (error <= 4.5 * scores.std(0) / n**0.5 + 1e-12).all()


# --- TD errors, GAE and returns -----------------------------------------------------------------------------


def episode_data(seed: int, steps: int, copies: int) -> dict[str, Tensor]:
    g = generator(seed)
    rewards, values, next_values = torch.randn(3, steps, copies, generator=g, dtype=F64)
    terminated, truncated = torch.rand(2, steps, copies, generator=g) < 0.25  # sometimes both
    return {
        "rewards": rewards,
        "values": values,
        "next_values": next_values,
        "terminated": terminated,
        "truncated": truncated,
    }


def slow_gae(data: dict[str, Tensor], gamma: float, gae_lambda: float) -> Tensor:
    """The definition, a sum over k for every t: A_t = Σ_k (γλ)^k δ_{t+k}, up to the end of the episode."""
    r, v, w = (data[k].tolist() for k in ("rewards", "values", "next_values"))
    term, trunc = data["terminated"].tolist(), data["truncated"].tolist()
    steps, copies = data["rewards"].shape
    result = torch.zeros(steps, copies, dtype=F64)
    for i in range(copies):
        for t in range(steps):
            total, k = 0.0, t
            while k < steps:
                future = 0.0 if term[k][i] else gamma * w[k][i]
                total += (gamma * gae_lambda) ** (k - t) * (r[k][i] + future - v[k][i])
                if term[k][i] or trunc[k][i]:
                    break
                k += 1
            result[t, i] = total
    return result


fractions = st.sampled_from([0.0, 0.3, 0.9, 1.0])


@given(
    seed=st.integers(0, 10_000),
    steps=st.integers(1, 12),
    copies=st.integers(1, 4),
    gamma=fractions,
    lam=fractions,
)
def test_gae_equals_its_definition(seed: int, steps: int, copies: int, gamma: float, lam: float) -> None:
    data = episode_data(seed, steps, copies)
    ours = gae(**data, gamma=gamma, gae_lambda=lam)
    torch.testing.assert_close(ours, slow_gae(data, gamma, lam))
    # Without the dimension of copies too.
    column = {name: tensor[:, 0] for name, tensor in data.items()}
    torch.testing.assert_close(gae(**column, gamma=gamma, gae_lambda=lam), ours[:, 0])


@given(seed=st.integers(0, 10_000), steps=st.integers(1, 12), gamma=fractions)
def test_gae_limits(seed: int, steps: int, gamma: float) -> None:
    data = episode_data(seed, steps, 3)
    deltas = td_errors(*(data[k] for k in ("rewards", "values", "next_values", "terminated")), gamma=gamma)
    torch.testing.assert_close(gae(**data, gamma=gamma, gae_lambda=0.0), deltas)
    # λ = 1 telescopes: the return, bootstrapped where the episode was cut, minus V. It needs a V that agrees with
    # itself: inside an episode next_values[t] is values[t + 1].
    inside = ~(data["terminated"] | data["truncated"])[:-1]
    data["next_values"][:-1] = torch.where(inside, data["values"][1:], data["next_values"][:-1])
    returns = discounted_returns(
        data["rewards"], data["terminated"], data["truncated"], data["next_values"], gamma=gamma
    )
    torch.testing.assert_close(gae(**data, gamma=gamma, gae_lambda=1.0), returns - data["values"])


@given(seed=st.integers(0, 10_000), steps=st.integers(1, 12), gamma=fractions, bootstrap=st.booleans())
def test_returns_equal_a_slow_loop(seed: int, steps: int, gamma: float, bootstrap: bool) -> None:
    data = episode_data(seed, steps, 2)
    rewards, terminated, truncated = data["rewards"], data["terminated"], data["truncated"]
    expected = torch.zeros_like(rewards)
    for i in range(2):
        for t in range(steps):
            for k in range(t, steps):
                expected[t, i] += gamma ** (k - t) * rewards[k, i]
                cut = truncated[k, i] or k == steps - 1
                if cut and bootstrap and not terminated[k, i]:
                    expected[t, i] += gamma ** (k - t + 1) * data["next_values"][k, i]
                if terminated[k, i] or truncated[k, i]:
                    break
    next_values = data["next_values"] if bootstrap else None
    ours = discounted_returns(rewards, terminated, truncated, next_values, gamma=gamma)
    torch.testing.assert_close(ours, expected)
    zero = torch.zeros_like(rewards)
    if not bootstrap:
        torch.testing.assert_close(
            ours, gae(rewards, zero, zero, terminated, truncated, gamma=gamma, gae_lambda=1.0)
        )


@pytest.mark.parametrize(
    ("terminated", "truncated", "expected"),
    [
        (True, False, [1.7 - 0.72 * 2.0, -2.0]),  # δ_1 = 1 − 3: nothing follows
        (False, True, [1.7 + 0.72 * 2.5, 2.5]),  # δ_1 = 1 + 0.9 · 5 − 3: the final observation is worth 5
        (True, True, [1.7 - 0.72 * 2.0, -2.0]),  # terminated wins
    ],
)
def test_two_state_chain_by_hand(terminated: bool, truncated: bool, expected: list[float]) -> None:
    """V = 2 then 3, γ = 0.9, λ = 0.8; the next episode's rows (reward 100) must not leak back over the end."""
    advantages = gae(
        torch.tensor([1.0, 1.0, 100.0], dtype=F64),
        torch.tensor([2.0, 3.0, 0.0], dtype=F64),
        torch.tensor([3.0, 5.0, 0.0], dtype=F64),
        torch.tensor([False, terminated, False]),
        torch.tensor([False, truncated, False]),
        gamma=0.9,
        gae_lambda=0.8,
    )
    torch.testing.assert_close(advantages[:2].tolist(), expected)


@pytest.mark.parametrize("unused", [math.nan, math.inf])
def test_what_follows_a_terminal_state_has_no_say(unused: float) -> None:
    """Buffers hold anything there; A = r − V, and 1 + 0.9 · 0.5 (4 − 3) one step before."""
    yes, no = torch.tensor([True]), torch.tensor([False])
    one = gae(torch.ones(1), torch.zeros(1), torch.tensor([unused]), yes, no, gamma=0.9, gae_lambda=0.5)
    assert one.tolist() == [1.0]
    two = gae(
        torch.tensor([2.0, 4.0]), torch.tensor([1.9, 3.0]), torch.tensor([1.0, unused]), torch.tensor([False, True]),
        torch.tensor([False, False]), gamma=0.9, gae_lambda=0.5,
    )  # fmt: skip
    torch.testing.assert_close(two, torch.tensor([1.45, 1.0]))


def test_gae_in_single_precision_and_dtype() -> None:
    data = {k: v.float() if v.is_floating_point() else v for k, v in episode_data(0, 200, 3).items()}
    ours = gae(**data, gamma=0.99, gae_lambda=0.95)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, slow_gae(data, 0.99, 0.95).float(), rtol=1e-4, atol=1e-4)


def test_time_series_errors() -> None:
    data = episode_data(0, 4, 2)
    for name, wrong in (("gamma", 1.5), ("gae_lambda", -0.1), ("gamma", math.nan)):
        with pytest.raises(ValueError, match=rf"{name} must lie in \[0, 1\], got {wrong}"):
            gae(**data, **{"gamma": 0.9, "gae_lambda": 0.9, name: wrong})
    for name in ("values", "next_values", "terminated", "truncated"):
        with pytest.raises(
            ValueError, match=rf"{name} must have the shape of rewards, \(4, 2\), got \(3, 2\)"
        ):
            gae(**{**data, name: data[name][:3]}, gamma=0.9, gae_lambda=0.9)
    with pytest.raises(ValueError, match="rewards must have a time dimension"):
        gae(**{k: v[:0] for k, v in data.items()}, gamma=0.9, gae_lambda=0.9)
    with pytest.raises(ValueError, match="next_values must have the shape of rewards"):
        discounted_returns(
            data["rewards"], data["terminated"], next_values=data["next_values"][:1], gamma=0.9
        )


def test_reinforce_weights_by_hand() -> None:
    """Two episodes, γ = 1/2: rewards 1, 2, 4, then truncated with final value 8; and 16, then terminated, padded."""
    rewards = torch.tensor([[1.0, 16.0], [2.0, 99.0], [4.0, 99.0]])
    valid = torch.tensor([[True, True], [True, False], [True, False]])
    no = torch.zeros(3, 2, dtype=torch.bool)
    terminated, truncated = no.clone(), no.clone()
    terminated[0, 1] = truncated[2, 0] = True
    none = torch.empty(0, dtype=torch.long)
    rollout = Rollout(
        rewards, rewards, rewards, terminated, truncated, valid, rewards[0], (none, none), none,
        Episodes.concatenate([]),
    )  # fmt: skip
    values, next_values = torch.full((3, 2), 10.0), torch.full((3, 2), 8.0)
    cases: list[tuple[dict[str, Any], list[list[float]]]] = [
        ({}, [[3.0, 16.0], [4.0, 0.0], [4.0, 0.0]]),
        ({"reward_to_go": False}, [[3.0, 16.0], [3.0, 0.0], [3.0, 0.0]]),
        ({"next_values": next_values}, [[4.0, 16.0], [6.0, 0.0], [8.0, 0.0]]),
        ({"baseline": "mean"}, [[-3.75, 9.25], [-2.75, 0.0], [-2.75, 0.0]]),  # mean of 3, 4, 4, 16
        ({"baseline": "mean", "reward_to_go": False}, [[-3.25, 9.75], [-3.25, 0.0], [-3.25, 0.0]]),
        ({"baseline": "learned", "values": values}, [[-7.0, 6.0], [-6.0, 0.0], [-6.0, 0.0]]),
    ]
    for arguments, expected in cases:
        weights, _ = reinforce_weights(rollout, gamma=0.5, **arguments)
        assert weights.tolist() == expected, arguments


def test_reinforce_weights_needs_values_for_a_learned_baseline() -> None:
    rollout, _ = all_trajectories(tiny_mdp(1.0))
    with pytest.raises(ValueError, match="values must be given with baseline='learned'"):
        reinforce_weights(rollout, gamma=1.0, baseline="learned")


# --- Normalisation and groups -------------------------------------------------------------------------------


@given(seed=st.integers(0, 10_000), masked=st.booleans(), shape=st.sampled_from([(5,), (4, 3), (1,)]))
def test_normalize_against_numpy(seed: int, masked: bool, shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=generator(seed), dtype=F64) * 3 + 10
    mask = (
        torch.rand(shape, generator=generator(seed)) < 0.7 if masked else torch.ones(shape, dtype=torch.bool)
    )
    mask.view(-1)[0] = True
    if masked:
        x = torch.where(mask, x, torch.nan)  # padding may hold anything
    chosen = x[mask].numpy()
    expected = np.zeros(shape)
    expected[mask.numpy()] = (chosen - chosen.mean()) / (chosen.std() + 1e-8)
    torch.testing.assert_close(normalize(x, mask if masked else None), torch.from_numpy(expected))


@given(value=st.floats(-1e3, 1e3, width=32), n=st.integers(2, 1000))
def test_equal_entries_normalise_to_exactly_zero(value: float, n: int) -> None:
    """A rounding of the mean must not be blown up to an advantage of ±1."""
    x = torch.full((n,), value)
    assert not normalize(x).any()
    assert not group_relative_advantages(x).any()
    assert not group_relative_advantages(x, scale=False).any()
    assert not leave_one_out_advantages(x).any()
    assert not pass_at_k_advantages(x[:50], k=min(n, 50) // 2).any()


@given(seed=st.integers(0, 10_000), groups=st.integers(1, 3), k=st.integers(2, 6))
def test_group_advantages_against_loops(seed: int, groups: int, k: int) -> None:
    rewards = torch.randn(groups, k, generator=generator(seed), dtype=F64)
    relative, scaled, leave_one_out = (np.zeros((groups, k)) for _ in range(3))
    for g, i in itertools.product(range(groups), range(k)):
        row = rewards[g].numpy()
        relative[g, i] = row[i] - row.mean()
        scaled[g, i] = relative[g, i] / (row.std(ddof=1) + 1e-4)
        leave_one_out[g, i] = row[i] - np.delete(row, i).mean()
    torch.testing.assert_close(group_relative_advantages(rewards, scale=False), torch.from_numpy(relative))
    torch.testing.assert_close(group_relative_advantages(rewards), torch.from_numpy(scaled))
    torch.testing.assert_close(leave_one_out_advantages(rewards), torch.from_numpy(leave_one_out))
    torch.testing.assert_close(leave_one_out_advantages(rewards), torch.from_numpy(relative) * k / (k - 1))


def test_group_baselines_bias_the_gradient_as_stated() -> None:
    """All groups of 3 samples of 3 actions: leave-one-out is unbiased, the group mean shrinks by (K − 1)/K."""
    logits = torch.tensor([0.3, -0.5, 0.1], dtype=F64, requires_grad=True)
    reward = torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    (exact,) = torch.autograd.grad(logits.softmax(-1) @ reward, logits)
    groups = torch.tensor(list(itertools.product(range(3), repeat=3)))
    probability = logits.softmax(-1).detach()[groups].prod(-1)
    for advantages, factor in (
        (leave_one_out_advantages(reward[groups]), 1.0),
        (group_relative_advantages(reward[groups], scale=False), 2 / 3),
    ):
        loss = policy_gradient_loss(logits.log_softmax(-1)[groups], advantages).mean(-1)
        (gradient,) = torch.autograd.grad((probability * loss).sum(), logits)
        torch.testing.assert_close(-gradient, factor * exact)


@given(seed=st.integers(0, 10_000), size=st.integers(2, 6), data=st.data())
def test_pass_at_k_advantages_against_all_subsets(seed: int, size: int, data: st.DataObject) -> None:
    """Ties and negative rewards too; the definition with every set of the others."""
    k = data.draw(st.integers(1, size - 1))
    rewards = torch.randint(-2, 3, (3, size), generator=generator(seed)).to(F64)
    found = pass_at_k_advantages(rewards, k=k)
    for row, advantages in zip(rewards.tolist(), found.tolist(), strict=True):
        for i, advantage in enumerate(advantages):
            others = row[:i] + row[i + 1 :]
            joined = [max(row[i], *s) if s else row[i] for s in itertools.combinations(others, k - 1)]
            alone = [max(s) for s in itertools.combinations(others, k)]
            assert advantage == pytest.approx(k * (np.mean(joined) - np.mean(alone)))
    torch.testing.assert_close(pass_at_k_advantages(rewards, k=1), leave_one_out_advantages(rewards))


@pytest.mark.parametrize("reward", [[1.0, 0.0, 0.0], [1.0, -2.0, 0.5]])
@pytest.mark.parametrize("k", [1, 2, 3])
def test_pass_at_k_advantages_have_the_gradient_of_pass_at_k(k: int, reward: list[float]) -> None:
    """All 81 groups of 4 samples of 3 actions, against the exact E[max of k samples] and its gradient."""
    logits = torch.tensor([0.3, -0.5, 0.1], dtype=F64, requires_grad=True)
    r = torch.tensor(reward, dtype=F64)
    draws = torch.tensor(list(itertools.product(range(3), repeat=k)))
    objective = (logits.softmax(-1)[draws].prod(-1) * r[draws].amax(-1)).sum()
    if reward[1:] == [0.0, 0.0]:
        p = logits.softmax(-1)[0]
        assert objective.item() == pytest.approx(1 - (1 - p.item()) ** k)
    (exact,) = torch.autograd.grad(objective, logits)
    groups = torch.tensor(list(itertools.product(range(3), repeat=4)))
    probability = logits.softmax(-1).detach()[groups].prod(-1)
    advantages = pass_at_k_advantages(r[groups], k=k)
    loss = policy_gradient_loss(logits.log_softmax(-1)[groups], advantages).mean(-1)
    (gradient,) = torch.autograd.grad((probability * loss).sum(), logits)
    torch.testing.assert_close(-gradient, exact)


@pytest.mark.parametrize("reward", [[1.0, 0.0, 0.5], [0.0, 2.0, 2.0]])
@pytest.mark.parametrize("size", [2, 3])
def test_best_of_group_imitates_the_best_sample(size: int, reward: list[float]) -> None:
    """All groups of 2 or 3 samples of 3 actions: on average the gradient is that of log π(best), samples held fixed."""
    logits = torch.tensor([0.3, -0.5, 0.1], dtype=F64, requires_grad=True)
    p = logits.detach().softmax(-1).tolist()
    chances = [0.0, 0.0, 0.0]  # of each action to be the best of its group, the first among equals
    for group in itertools.product(range(3), repeat=size):
        best = next(a for a in group if reward[a] == max(reward[b] for b in group))
        chances[best] += math.prod(p[a] for a in group)
    assert chances[0] != pytest.approx(p[0], abs=0.05)
    log_p = logits - logits.exp().sum().log()
    objective = sum(chance * log_p[action] for action, chance in enumerate(chances))
    (exact,) = torch.autograd.grad(objective, logits)

    groups = torch.tensor(list(itertools.product(range(3), repeat=size)))
    probability = logits.softmax(-1).detach()[groups].prod(-1)
    weights = best_of_group(torch.tensor(reward, dtype=F64)[groups])
    loss = policy_gradient_loss(logits.log_softmax(-1)[groups], weights).sum(-1)
    (gradient,) = torch.autograd.grad((probability * loss).sum(), logits)
    torch.testing.assert_close(-gradient, exact)


def test_pass_at_k_needs_a_larger_group() -> None:
    for k in (0, 3, 4):
        with pytest.raises(ValueError, match=f"k must be at least 1 and less than the group of 3, got {k}"):
            pass_at_k_advantages(torch.zeros(2, 3), k=k)


@pytest.mark.parametrize("rewards", [torch.tensor(1.0), torch.ones(3, 1), torch.ones(2, 0)])
def test_groups_of_one_are_refused(rewards: Tensor) -> None:
    for function in (group_relative_advantages, leave_one_out_advantages, partial(pass_at_k_advantages, k=1)):
        with pytest.raises(ValueError, match="rewards must hold groups of at least 2"):
            function(rewards)


def test_normalize_refuses_an_empty_mask() -> None:
    with pytest.raises(ValueError, match="mask selects no entry"):
        normalize(torch.ones(3), torch.zeros(3, dtype=torch.bool))


# --- KL estimates --------------------------------------------------------------------------------------------


def kl(p: Tensor, q: Tensor) -> Tensor:
    return (p * (p.log() - q.log())).sum()


@given(seed=st.integers(0, 10_000), k=st.integers(2, 5))
def test_kl_estimates_values_and_gradients_by_enumeration(seed: int, k: int) -> None:
    """The table of the docstring, line by line: the mean of the value, and the mean of the value's gradient."""
    logits = torch.randn(k, generator=generator(seed), dtype=F64, requires_grad=True)
    log_p = logits.log_softmax(-1)
    log_q = torch.randn(k, generator=generator(seed + 1), dtype=F64).log_softmax(-1)
    p, p_fixed, q = log_p.exp(), log_p.exp().detach(), log_q.exp()

    def mean_value_and_gradient(kind: Any) -> tuple[Tensor, Tensor]:
        value = p_fixed @ kl_estimate(log_p, log_q, kind)  # actions are data: their law has no gradient
        return value.detach(), torch.autograd.grad(value, logits, retain_graph=True)[0]

    (to_reference,) = torch.autograd.grad(kl(p, q), logits, retain_graph=True)
    (from_reference,) = torch.autograd.grad(kl(q, p), logits, retain_graph=True)
    exact = kl(p_fixed, q)

    value, gradient = mean_value_and_gradient("k1")
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(gradient, torch.zeros(k, dtype=F64))
    value, gradient = mean_value_and_gradient("k2")
    torch.testing.assert_close(value, 0.5 * (p_fixed * (log_p.detach() - log_q).square()).sum())
    torch.testing.assert_close(gradient, to_reference)
    value, gradient = mean_value_and_gradient("k3")
    torch.testing.assert_close(value, exact)
    torch.testing.assert_close(gradient, from_reference)


def test_kl_estimates_near_zero() -> None:
    """k2's bias is of third order, k3 is never negative and exact where 1 + x would lose all digits."""
    p = torch.tensor([0.2, 0.3, 0.5], dtype=F64)
    for step in (1e-2, 1e-3):
        q = (p.log() + step * torch.tensor([1.0, -2.0, 0.5], dtype=F64)).softmax(-1)
        assert abs(p @ kl_estimate(p.log(), q.log(), "k2") - kl(p, q)) < 20 * step**3
    x = torch.tensor([1e-6, -1e-6, 0.0])
    torch.testing.assert_close(
        kl_estimate(-x, torch.zeros(3), "k3"), torch.tensor([5e-13, 5e-13, 0.0]), rtol=0.2, atol=1e-20
    )
    samples = torch.randn(1000, generator=generator(0))
    assert (kl_estimate(samples, torch.zeros(1000), "k3") >= 0).all()
    assert (kl_estimate(samples, torch.zeros(1000), "k1") < 0).any()


def test_kl_estimate_errors() -> None:
    with pytest.raises(ValueError, match="kind must be 'k1', 'k2' or 'k3', got 'k4'"):
        kl_estimate(torch.zeros(2), torch.zeros(2), "k4")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reference_log_prob must have the shape"):
        kl_estimate(torch.zeros(2), torch.zeros(3))


# --- Completions -----------------------------------------------------------------------------------------------

LOG_PROB = torch.tensor([[-1.0, -2.0, -3.0], [-0.5, math.nan, math.nan], [math.nan, -4.0, -1.0]], dtype=F64)
TOKENS = LOG_PROB.isfinite()  # the third row is padded on the left


def test_sequence_log_prob_by_hand() -> None:
    assert sequence_log_prob(LOG_PROB, TOKENS).tolist() == [-6.0, -0.5, -5.0]
    assert sequence_log_prob(LOG_PROB, TOKENS, reduction="mean").tolist() == [-2.0, -0.5, -2.5]
    for reduction in ("sum", "mean"):
        log_prob = LOG_PROB.clone().requires_grad_()
        sequence_log_prob(log_prob, TOKENS, reduction=reduction).sum().backward()
        assert log_prob.grad is not None
        assert (log_prob.grad[~TOKENS] == 0).all()
        assert (log_prob.grad[TOKENS] > 0).all()
        nothing = torch.zeros(2, 3, dtype=torch.bool)
        assert not sequence_log_prob(LOG_PROB[:2], nothing, reduction=reduction).any()
    with pytest.raises(ValueError, match="reduction must be 'sum' or 'mean', got 'max'"):
        sequence_log_prob(LOG_PROB, TOKENS, reduction="max")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="mask must have the shape of log_prob"):
        sequence_log_prob(LOG_PROB, TOKENS[:, :1])


def test_kl_shaped_rewards_by_hand() -> None:
    """β = 2: a token costs 2 (log π − log π_ref), and the score sits on the last token, wherever the padding is."""
    reference = LOG_PROB + torch.tensor([0.5, -1.0, 0.25], dtype=F64)
    scores = torch.tensor([10.0, 20.0, 30.0], dtype=F64)
    rewards = kl_shaped_rewards(scores, LOG_PROB, reference, TOKENS, beta=2.0)
    assert rewards.tolist() == [[1.0, -2.0, 10.5], [21.0, 0.0, 0.0], [0.0, -2.0, 30.5]]
    alone = kl_shaped_rewards(scores, LOG_PROB, reference, TOKENS, beta=0.0)
    assert alone.tolist() == [[0.0, 0.0, 10.0], [20.0, 0.0, 0.0], [0.0, 0.0, 30.0]]
    for kind in ("k1", "k2", "k3"):
        penalty = kl_shaped_rewards(0 * scores, LOG_PROB, reference, TOKENS, beta=1.0, kind=kind)
        torch.testing.assert_close(penalty[TOKENS], -kl_estimate(LOG_PROB, reference, kind)[TOKENS])
        assert not penalty[~TOKENS].any()


def test_rewards_on_the_way_stay_where_they_are() -> None:
    mask = torch.tensor([[True, False, True, True], [True, True, False, False]])
    log_prob, reference = torch.randint(-8, 9, (2, 2, 4), generator=torch.Generator().manual_seed(0)) / 4
    scores = torch.tensor([[1.0, 7.0, 0.0, 2.0], [0.0, 3.0, 7.0, 7.0]])
    shaped = kl_shaped_rewards(scores, log_prob, reference, mask, beta=0.5)
    assert torch.equal(shaped, torch.where(mask, scores - 0.5 * (log_prob - reference), 0.0))
    last = kl_shaped_rewards(torch.tensor([2.0, 3.0]), log_prob, reference, mask, beta=0.5)
    assert torch.equal(last, shaped - torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0]])), (
        "a score comes with the last token"
    )


def test_kl_shaped_rewards_errors() -> None:
    scores, log_prob, mask = torch.zeros(3), torch.zeros(3, 4), torch.ones(3, 4, dtype=torch.bool)
    hollow = mask.clone()
    hollow[[0, 2]] = False
    with pytest.raises(ValueError, match=r"a token in every row, got none in \[0, 2\]"):
        kl_shaped_rewards(scores, log_prob, log_prob, hollow, beta=0.1)
    with pytest.raises(ValueError, match=r"a token in every row, got none in \[0, 1, 2\]"):
        kl_shaped_rewards(scores, log_prob[:, :0], log_prob[:, :0], mask[:, :0], beta=0.1)
    with pytest.raises(ValueError, match="reference_log_prob must have the shape of log_prob"):
        kl_shaped_rewards(scores, log_prob, log_prob[:1], mask, beta=0.1)
    with pytest.raises(ValueError, match="mask must have the shape of log_prob"):
        kl_shaped_rewards(scores, log_prob, log_prob, mask[:, :1], beta=0.1)
    for wrong in (torch.zeros(4), torch.zeros(3, 1), torch.tensor(0.0)):
        with pytest.raises(ValueError, match=r"be \[B, T\] and scores \[B\] or \[B, T\], got \(\(3, 4\), "):
            kl_shaped_rewards(wrong, log_prob, log_prob, mask, beta=0.1)
    for beta in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match="beta must be finite and >= 0"):
            kl_shaped_rewards(scores, log_prob, log_prob, mask, beta=beta)


def test_importance_weights_by_hand() -> None:
    ratio = torch.tensor([[0.0, 0.25, 1.0], [1.9, 2.0, 70.0]], dtype=F64)
    log_prob = ratio.log().requires_grad_()
    weights = importance_weights(log_prob, torch.zeros(2, 3, dtype=F64), cap=2.0)
    torch.testing.assert_close(weights, ratio.clamp(max=2.0))
    assert not weights.requires_grad
    assert importance_weights(torch.tensor([800.0]), torch.zeros(1), cap=3.0).item() == 3.0
    tiny = importance_weights(torch.tensor([-80.0, -800.0]), torch.zeros(2), cap=3.0).tolist()
    assert tiny == [pytest.approx(math.exp(-80)), 0.0]
    with pytest.raises(ValueError, match="sampler_log_prob must have the shape of log_prob"):
        importance_weights(torch.zeros(3), torch.zeros(3, 1), cap=2.0)
    for cap in (0.99, math.nan):
        with pytest.raises(ValueError, match="cap must be >= 1"):
            importance_weights(torch.zeros(1), torch.zeros(1), cap=cap)


def test_importance_weights_of_each_mode_by_hand() -> None:
    ratio = torch.tensor([[4.0, 0.5, 9.0], [0.4, 1.0, 1.0], [1.5, 2.0, 0.5]], dtype=F64)
    mask = torch.tensor([[True, True, False], [True, True, True], [True, True, True]])
    wanted = {
        "token_truncate": [[2.0, 0.5, 2.0], [0.4, 1.0, 1.0], [1.5, 2.0, 0.5]],
        "token_mask": [[0.0, 0.5, 0.0], [0.0, 1.0, 1.0], [1.5, 2.0, 0.5]],
        "sequence_truncate": [[2.0] * 3, [0.4] * 3, [1.5] * 3],  # 4 · 0.5 = 2; 9 is padding
        "sequence_mask": [[2.0] * 3, [0.0] * 3, [1.5] * 3],
    }
    for mode in get_args(ImportanceMode):
        log_prob = ratio.log().requires_grad_()
        weights = importance_weights(log_prob, torch.zeros_like(ratio), cap=2 + 1e-9, mode=mode, mask=mask)
        torch.testing.assert_close(weights, torch.tensor(wanted[mode], dtype=F64))
        assert not weights.requires_grad
    with pytest.raises(ValueError, match="mask must be given for whole sequences"):
        importance_weights(ratio, ratio, cap=2.0, mode="sequence_mask")
    with pytest.raises(ValueError, match="mode must be token or sequence"):
        importance_weights(ratio, ratio, cap=2.0, mode="sequence")  # type: ignore[arg-type]


def test_weights_of_sequences_are_unbiased_and_those_of_tokens_are_not() -> None:
    """All sequences of two tokens out of three: E_sampler[c f] is E_old[f] if c is of the sequence."""
    generator = torch.Generator().manual_seed(0)
    first = torch.randn(2, 3, generator=generator, dtype=F64).log_softmax(-1)  # of each policy
    second = torch.randn(2, 3, 3, generator=generator, dtype=F64).log_softmax(-1)
    value = torch.randn(3, 3, generator=generator, dtype=F64)
    pairs = [(a, b) for a in range(3) for b in range(3)]
    old, sampler = (
        torch.stack([torch.stack([first[k, a], second[k, a, b]]) for a, b in pairs]) for k in (0, 1)
    )
    f = torch.stack([value[a, b] for a, b in pairs])
    right = (old.sum(1).exp() * f).sum()
    mask = torch.ones(9, 2, dtype=torch.bool)
    weights = {
        mode: importance_weights(old, sampler, cap=math.inf, mode=mode, mask=mask)
        for mode in get_args(ImportanceMode)
    }
    for mode, c in weights.items():
        estimate = (sampler.sum(1).exp() * c[:, 1] * f).sum()
        assert (abs(estimate - right) < 1e-12) == mode.startswith("sequence"), mode


def test_adaptive_kl_coefficient() -> None:
    """Ziegler et al. (2019), §2.2, with their K = 0.1: at most 2 % per update."""
    for kl, factor in (
        (0.0, 0.98),
        (4.0, 0.98),
        (4.5, 0.99),
        (5.0, 1.0),
        (5.5, 1.01),
        (6.0, 1.02),
        (99.0, 1.02),
    ):
        assert adaptive_kl_coefficient(0.2, kl, target=5.0) == pytest.approx(0.2 * factor)
    assert adaptive_kl_coefficient(0.2, 9.0, target=5.0, gain=1.0) == pytest.approx(0.24)
    beta = 1.0  # as a controller: a policy whose divergence is 1/β settles where it should
    for _ in range(500):
        beta = adaptive_kl_coefficient(beta, 1 / beta, target=4.0)
    assert beta == pytest.approx(0.25, rel=1e-3)
    cases: list[tuple[dict[str, float], str]] = [
        ({"beta": 0.0}, "beta must be finite and > 0"),
        ({"target": math.inf}, "target must be finite and > 0"),
        ({"gain": 5.0}, r"gain must lie in \(0, 5\)"),
        ({"kl": math.nan}, "kl must be finite, got nan; the policy may have diverged"),
    ]
    for wrong, message in cases:
        with pytest.raises(ValueError, match=message):
            adaptive_kl_coefficient(**{"beta": 1.0, "kl": 1.0, "target": 1.0, **wrong})


# --- Explained variance --------------------------------------------------------------------------------------


def test_explained_variance() -> None:
    targets = torch.tensor([1.0, 2.0, 4.0, 9.0], dtype=F64)
    rng = np.random.default_rng(0)
    values = torch.from_numpy(rng.normal(size=4))
    expected = 1 - np.var((targets - values).numpy()) / np.var(targets.numpy())
    assert explained_variance(values, targets).item() == pytest.approx(expected)
    assert explained_variance(targets + 5, targets).item() == pytest.approx(1.0)  # a shift costs nothing
    assert explained_variance(torch.zeros(4, dtype=F64), targets).item() == pytest.approx(0.0)
    assert math.isnan(explained_variance(values, torch.ones(4, dtype=F64)).item())
    with pytest.raises(ValueError, match="targets must have the shape of values"):
        explained_variance(values, targets[:2])
