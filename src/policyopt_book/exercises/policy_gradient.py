"""Exercises of the chapter on policy gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from policyopt_book.exercises import Exercise

__all__ = ["EXERCISES"]


def _weighted_score(logits: Tensor, w: Tensor) -> Tensor:
    """Return the gradient of the expected weight, in closed form."""
    p = logits.softmax(0)
    return (p * (w - p @ w)).round(decimals=12) + 0.0  # no rounding errors in messages


def _gradient(function: Callable[[Tensor], Tensor], logits: Tensor) -> Tensor:
    logits = logits.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(function(logits.log_softmax(0)), logits)
    return gradient


def _bandit_case(
    logits: list[float], name: str, numbers: list[float]
) -> dict[str, Any]:
    return {
        "logits": torch.tensor(logits, dtype=torch.float64),
        name: torch.tensor(numbers, dtype=torch.float64),
    }


def _episodes_case(seed: int, lengths: list[int]) -> dict[str, Any]:
    """Return-to-go of episodes of different length, with rubbish in the padding."""
    T, N = max(lengths), len(lengths)
    mask = torch.arange(T)[:, None] < torch.tensor(lengths)
    generator = torch.Generator().manual_seed(seed)
    returns = 5 * torch.rand(T, N, generator=generator, dtype=torch.float64)
    return {"returns": torch.where(mask, returns, -7.0), "mask": mask}


def _fair_weights(returns: Tensor, mask: Tensor) -> Tensor:
    weights = torch.zeros_like(returns)
    T, N = returns.shape
    for n in range(N):
        others = [
            float(returns[t, m])
            for m in range(N)
            if m != n
            for t in range(T)
            if mask[t, m]
        ]
        for t in range(T):
            if mask[t, n]:
                weights[t, n] = returns[t, n] - sum(others) / len(others)
    return weights


def _minus_batch_mean(returns: Tensor, mask: Tensor) -> Tensor:
    return (returns - returns[mask].mean()) * mask


def _counting_padding(returns: Tensor, mask: Tensor) -> Tensor:
    T, N = returns.shape
    others = returns.sum() - returns.sum(0)
    return (returns - others / (T * (N - 1))) * mask


def _mean_of_means(returns: Tensor, mask: Tensor) -> Tensor:
    means = (returns * mask).sum(0) / mask.sum(0)
    return (returns - (means.sum() - means) / (returns.shape[1] - 1)) * mask


def _padding_weighted(returns: Tensor, mask: Tensor) -> Tensor:
    total, count = (returns * mask).sum(0), mask.sum(0)
    return returns - (total.sum() - total) / (count.sum() - count)


def _network_case(seed: int, mask: list[bool]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    T = len(mask)
    return {
        "outputs": torch.randn(T, 4, generator=generator, dtype=torch.float64),
        "actions": torch.randint(3, (T,), generator=generator),
        "returns": 2 * torch.randn(T, generator=generator, dtype=torch.float64),
        "mask": torch.tensor(mask),
    }


def _actor_critic_loss(
    outputs: Tensor, actions: Tensor, returns: Tensor, mask: Tensor
) -> Tensor:
    terms = []
    for t in range(len(outputs)):
        if mask[t]:
            weight = float(returns[t]) - outputs[t, -1].item()
            log_prob = outputs[t, actions[t]] - outputs[t, :-1].exp().sum().log()
            terms.append(-weight * log_prob + (outputs[t, -1] - returns[t]) ** 2 / 2)
    return torch.stack(terms).sum() / len(terms)


def _wrong_actor_critic(
    *,
    attached: bool = False,
    sign: float = -1.0,
    half: float = 0.5,
    deaf: bool = False,
    padded: bool = False,
) -> Callable[..., Tensor]:
    """Return the loss with one thing wrong."""

    def loss(outputs: Tensor, actions: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
        values = outputs[:, -1].detach() if deaf else outputs[:, -1]
        log_prob = outputs[:, :-1].log_softmax(-1).gather(-1, actions[:, None])[:, 0]
        weights = returns - values
        items = (
            sign * (weights if attached else weights.detach()) * log_prob
            + half * (values - returns) ** 2
        )
        return (items * mask).sum() / (len(mask) if padded else mask.sum())

    return loss


def _buffer_case(
    seed: int, terminated: list[int], truncated: list[int], gamma: float
) -> dict[str, Any]:
    """Six steps; the lists hold the steps at which an episode ended or was cut."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.arange(6)
    return {
        "rewards": torch.randn(6, generator=generator, dtype=torch.float64),
        "next_values": 4 + torch.rand(6, generator=generator, dtype=torch.float64),
        "terminated": torch.isin(steps, torch.tensor(terminated)),
        "truncated": torch.isin(steps, torch.tensor(truncated)),
        "gamma": gamma,
    }


def _returns_with_cuts(
    rewards: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
) -> Tensor:
    """Add up forwards from each step until its episode ends, is cut, or the buffer is
    over.
    """
    T, returns = len(rewards), torch.zeros_like(rewards)
    for t in range(T):
        for k in range(t, T):
            returns[t] += gamma ** (k - t) * rewards[k]
            if terminated[k]:
                break
            if truncated[k] or k == T - 1:
                returns[t] += gamma ** (k - t + 1) * next_values[k]
                break
    return returns


def _wrong_returns(
    *,
    through_end: bool = False,
    through_limit: bool = False,
    limit_ends: bool = False,
    end_goes_on: bool = False,
    last_ends: bool = False,
) -> Callable[..., Tensor]:
    """Return the recursion with one thing wrong."""

    def returns(
        rewards: Tensor,
        next_values: Tensor,
        terminated: Tensor,
        truncated: Tensor,
        gamma: float,
    ) -> Tensor:
        T, found = len(rewards), torch.zeros_like(rewards)
        following = torch.zeros_like(rewards[0])
        for t in reversed(range(T)):
            if terminated[t] and not through_end:
                following = (
                    next_values[t] if end_goes_on else torch.zeros_like(following)
                )
            elif t == T - 1:
                following = torch.zeros_like(following) if last_ends else next_values[t]
            elif truncated[t] and not through_limit and not terminated[t]:
                following = (
                    torch.zeros_like(following) if limit_ends else next_values[t]
                )
            following = rewards[t] + gamma * following
            found[t] = following
        return found

    return returns


def _best_baseline(logits: Tensor, rewards: Tensor) -> float:
    """Return the lowest point of the parabola through the total variance at three
    baselines.
    """
    p = logits.softmax(0)
    scores = torch.eye(len(p), dtype=p.dtype) - p

    def total_variance(b: float) -> float:
        estimates = (rewards - b)[:, None] * scores
        return float(p @ (estimates - p @ estimates).square().sum(1))

    left, middle, right = (total_variance(b) for b in (-1.0, 0.0, 1.0))
    return (left - right) / (2 * (left + right - 2 * middle))


def _weighted_mean(power: float) -> Callable[[Tensor, Tensor], Tensor]:
    def mean(logits: Tensor, rewards: Tensor) -> Tensor:
        p = logits.softmax(0)
        w: Tensor = p * (torch.eye(len(p), dtype=p.dtype) - p).norm(dim=1) ** power
        return (w * rewards).sum() / w.sum()

    return mean


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="policy-gradient.score",
        reference=_weighted_score,
        cases=(
            _bandit_case([0.3, -1.2, 0.5], "w", [1.0, 1.0, 1.0]),
            _bandit_case([0.3, -1.2, 0.5], "w", [1.0, 2.0, 3.0]),
            _bandit_case([2.0, 0.0, 0.0, -1.0], "w", [-1.0, 0.0, 4.0, 0.5]),
        ),
        mistakes={
            "The probability π(a) is differentiated too; it only says how often each "
            "action comes, so detach it": (
                lambda logits, w: _gradient(
                    lambda log_p: (log_p.exp() * w * log_p).sum(), logits
                )
            ),
            "Each action counts once; it must count as often as the policy takes it, "
            "π(a)": (
                lambda logits, w: _gradient(lambda log_p: (w * log_p).sum(), logits)
            ),
            "That is the gradient with respect to log π; the logits come before the "
            "softmax": (lambda logits, w: logits.softmax(0) * w),
        },
    ),
    Exercise(
        name="policy-gradient.fair-baseline",
        reference=_fair_weights,
        cases=(
            _episodes_case(0, [4, 2]),
            _episodes_case(1, [3, 5, 1]),
            _episodes_case(2, [2, 2, 2, 2]),
        ),
        mistakes={
            "The mean contains the episode it is subtracted from, "
            "so it looks at the action": _minus_batch_mean,
            "The mean of the others counts their padding": _counting_padding,
            "Each of the others counts once, whatever its length; take "
            "the mean over their steps": _mean_of_means,
            "The padding has weights; they must be 0": _padding_weighted,
        },
    ),
    Exercise(
        name="policy-gradient.actor-critic",
        reference=_actor_critic_loss,
        gradient="outputs",
        constants=("returns",),
        cases=(
            _network_case(0, [True, True, True]),
            _network_case(1, [True, True, False, False, False]),
            _network_case(2, [True, False, True, True]),
        ),
        mistakes={
            "The weight of log π is not detached: the critic is pushed by the "
            "policy's loss": (_wrong_actor_critic(attached=True)),
            "The sign of the policy's part is reversed: a "
            "loss is minimised": _wrong_actor_critic(sign=1.0),
            "The critic learns nothing: V is detached in its own "
            "squared error": _wrong_actor_critic(deaf=True),
            "The half before the squared error is missing": _wrong_actor_critic(
                half=1.0
            ),
            "The mean counts the padding: divide by the number of "
            "real steps": _wrong_actor_critic(padded=True),
        },
    ),
    Exercise(
        name="policy-gradient.cuts",
        reference=_returns_with_cuts,
        cases=(
            _buffer_case(0, [1], [3], 0.9),
            _buffer_case(1, [5], [0, 2], 0.5),
            _buffer_case(
                2, [3], [3, 5], 0.99
            ),  # step 3 ends and is cut at once: it has ended
            _buffer_case(3, [], [], 1.0),
        ),
        mistakes={
            "The rewards of the next episode are added to one that has "
            "ended": _wrong_returns(through_end=True),
            "The sum goes through a time limit into the next episode": _wrong_returns(
                through_limit=True
            ),
            "A time limit is taken for an end: V of the state that was reached is "
            "missing": (_wrong_returns(limit_ends=True)),
            "V is added after a true end as well, but nothing follows "
            "it": _wrong_returns(end_goes_on=True),
            "The last step of the buffer is taken for an end": _wrong_returns(
                last_ends=True
            ),
        },
    ),
    Exercise(
        name="policy-gradient.best-baseline",
        reference=_best_baseline,
        cases=(
            _bandit_case([0.0, 1.0, -1.0], "rewards", [1.0, 2.0, 6.0]),
            _bandit_case([1.0, -2.0, 0.5, 0.0], "rewards", [-3.0, 10.0, 0.0, 1.0]),
            _bandit_case([0.0, 0.0], "rewards", [5.0, 7.0]),
        ),
        mistakes={
            "That is the expected reward; an action with a long score "
            "must count for more": _weighted_mean(0.0),
            "The length of the score must be squared: it is the "
            "variance that is minimised": _weighted_mean(1.0),
            "The probabilities are missing: actions that are taken often count for "
            "more": (
                lambda logits, rewards: (
                    (
                        rewards
                        * (torch.eye(len(logits)) - logits.softmax(0)).square().sum(1)
                    ).sum()
                    / (torch.eye(len(logits)) - logits.softmax(0)).square().sum()
                )
            ),
        },
    ),
)
