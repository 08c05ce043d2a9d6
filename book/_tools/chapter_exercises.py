"""Exercises of the chapter ``@NAME@``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from policyopt_book.exercises import Exercise

__all__ = ["EXERCISES"]


# A reference is written as differently from the solution in the chapter as can be: a loop, autograd, differences.


def _expected_reward(theta: Tensor, rewards: Tensor) -> float:
    odds = [float(torch.exp(x)) for x in theta]
    return sum(o / sum(odds) * float(r) for o, r in zip(odds, rewards, strict=True))


def _score(theta: Tensor, action: int) -> Tensor:
    leaf = theta.detach().clone().requires_grad_()
    (gradient,) = torch.autograd.grad(leaf.log_softmax(-1)[action], leaf)
    return gradient


def _exact_gradient(theta: Tensor, rewards: Tensor, step: float = 1e-5) -> Tensor:
    gradient = torch.zeros_like(theta)
    for a in range(len(theta)):
        for side in (1, -1):
            moved = theta.clone()
            moved[a] += side * step
            gradient[a] += side * _expected_reward(moved, rewards) / (2 * step)
    return gradient


def _loss(theta: Tensor, actions: Tensor, rewards: Tensor, baseline: float = 1.0) -> Tensor:
    total = torch.zeros((), dtype=theta.dtype)
    for action, reward in zip(actions.tolist(), rewards, strict=True):
        log_prob = theta[action] - theta.exp().sum().log()
        total = total - (reward - baseline * rewards.mean()) * log_prob
    return total / len(rewards)


def _case(theta: list[float], **others: Any) -> dict[str, Any]:
    return {
        "theta": torch.tensor(theta, dtype=torch.float64),
        **{
            name: torch.tensor(value, dtype=torch.float64) if name == "rewards" else value
            for name, value in others.items()
        },
    }


# The labels are sentences for the reader. Each mistake must differ from the reference, and from the other mistakes,
# in at least one case.
EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="@NAME@.expected-reward",
        reference=_expected_reward,
        cases=(
            _case([0.0, 0.0, 0.0], rewards=[1.0, 0.8, 0.0]),
            _case([2.0, -1.0], rewards=[0.5, 3.0]),
        ),
        mistakes={
            "The arms are not equally likely: weigh each reward with its probability": (
                lambda theta, rewards: rewards.mean()
            ),
            "That is what the likeliest arm pays; the others are drawn as well": (
                lambda theta, rewards: rewards[theta.argmax()]
            ),
        },
    ),
    Exercise(
        name="@NAME@.score",
        reference=_score,
        cases=(
            _case([0.0, 0.0, 0.0], action=1),
            _case([2.0, -1.0, 0.5, 0.0], action=0),
        ),
        mistakes={
            "The sign is turned round: the action that was taken has the positive entry": (
                lambda theta, action: -_score(theta, action)
            ),
            "The 1 for the action itself is missing": lambda theta, action: -theta.softmax(-1),
        },
    ),
    Exercise(
        name="@NAME@.exact-gradient",
        reference=_exact_gradient,
        cases=(
            _case([0.0, 0.0, 0.0], rewards=[1.0, 0.8, 0.0]),
            _case([2.0, -1.0], rewards=[0.5, 3.0]),
        ),
        mistakes={
            "The expected reward is not subtracted": (lambda theta, rewards: theta.softmax(-1) * rewards),
            "The mean that is subtracted must weigh each reward with its probability": (
                lambda theta, rewards: theta.softmax(-1) * (rewards - rewards.mean())
            ),
            "The factor π is missing": (lambda theta, rewards: rewards - _expected_reward(theta, rewards)),
        },
    ),
    Exercise(
        name="@NAME@.loss",
        reference=_loss,
        gradient="theta",
        cases=(
            _case([0.0, 0.0, 0.0], actions=torch.tensor([0, 2, 1, 0]), rewards=[1.0, 0.0, 0.8, 1.0]),
            _case([2.0, -1.0], actions=torch.tensor([1, 0]), rewards=[3.0, 0.5]),
        ),
        mistakes={
            "The sign is turned round: an optimiser descends": (
                lambda theta, actions, rewards: -_loss(theta, actions, rewards)
            ),
            "The log-probability is detached, so nothing is learned": (
                lambda theta, actions, rewards: _loss(theta, actions, rewards).detach()
            ),
            "The mean reward is not subtracted": (
                lambda theta, actions, rewards: _loss(theta, actions, rewards, baseline=0.0)
            ),
            "That is the sum over the batch; divide by its size": (
                lambda theta, actions, rewards: len(rewards) * _loss(theta, actions, rewards)
            ),
        },
    ),
)
