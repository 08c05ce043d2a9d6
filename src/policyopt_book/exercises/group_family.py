"""Exercises of the chapter on the family of GRPO."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from policyopt.estimators import importance_weights
from policyopt.losses import aggregate, clipped_surrogate_loss, ranking_loss
from policyopt_book.exercises import Exercise

__all__ = ["EXERCISES"]


def _token_weights(lengths: Tensor, denominator: str, longest: int) -> Tensor:
    """Return the slope of the package's mean with respect to each token."""
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    ones = torch.ones(mask.shape, dtype=torch.float64, requires_grad=True)
    if denominator == "sequence":
        mean = aggregate(ones, mask, reduction="sequence-mean")
    elif denominator == "token":
        mean = aggregate(ones, mask)
    else:
        mean = aggregate(ones, mask, denominator=len(lengths) * longest)
    (weights,) = torch.autograd.grad(mean, ones)
    return weights


def _longest_of_the_batch(lengths: Tensor, denominator: str, longest: int) -> Tensor:
    return _token_weights(lengths, denominator, int(lengths.max()))


def _sequences_added(lengths: Tensor, denominator: str, longest: int) -> Tensor:
    scale = len(lengths) if denominator == "sequence" else 1
    return scale * _token_weights(lengths, denominator, longest)


def _sequence_and_token_exchanged(
    lengths: Tensor, denominator: str, longest: int
) -> Tensor:
    other = {"sequence": "token", "token": "sequence"}.get(denominator, denominator)
    return _token_weights(lengths, other, longest)


def _pushes(log_prob: Tensor, beta: float) -> Tensor:
    probe = log_prob.clone().requires_grad_()
    (slope,) = torch.autograd.grad(-ranking_loss(probe, beta=beta).loss.sum(), probe)
    assert isinstance(slope, Tensor)
    return slope


def _neighbours_only(log_prob: Tensor, beta: float) -> Tensor:
    pushes = torch.zeros_like(log_prob)
    for i in range(len(log_prob) - 1):
        force = beta * torch.sigmoid(-beta * (log_prob[i] - log_prob[i + 1]))
        pushes[i] += force
        pushes[i + 1] -= force
    return pushes


def _pulled_where_right(log_prob: Tensor, beta: float) -> Tensor:
    return _pushes(-log_prob, beta)


def _ratio_weights(
    ratio: Tensor,
    advantages: Tensor,
    epsilon: float,
    cap: float,
    *,
    one_sided: bool = False,
) -> tuple[Tensor, Tensor]:
    """Return minus the slopes of both losses with respect to log π."""
    log_prob = ratio.log().requires_grad_()
    loss = clipped_surrogate_loss(
        log_prob, torch.zeros_like(log_prob), advantages, clip_ratio=epsilon
    ).loss
    (slope,) = torch.autograd.grad(-loss.sum(), log_prob)
    assert isinstance(slope, Tensor)
    if one_sided:
        outside = (ratio > 1 + epsilon) | (ratio < 1 - epsilon)
        slope = torch.where(outside, 0.0, ratio * advantages)
    return slope, torch.minimum(ratio, torch.tensor(cap)) * advantages


def _cispo_clipped_away(
    ratio: Tensor, advantages: Tensor, epsilon: float, cap: float
) -> tuple[Tensor, Tensor]:
    ppo, cispo = _ratio_weights(ratio, advantages, epsilon, cap)
    return ppo, torch.where(ratio > cap, 0.0, cispo)


def _without_ratio(
    ratio: Tensor, advantages: Tensor, epsilon: float, cap: float
) -> tuple[Tensor, Tensor]:
    ppo, cispo = _ratio_weights(ratio, advantages, epsilon, cap)
    return ppo / ratio, cispo / ratio


def _completions_drawn(rates: list[float], K: int) -> float:
    """Go through all groups of right and wrong answers."""
    total = 0.0
    for p in rates:
        varies = sum(
            math.prod(p if right else 1 - p for right in group)
            for group in itertools.product((True, False), repeat=K)
            if len(set(group)) > 1
        )
        total += K / varies
    return total


def _capped_weights(old: Tensor, sampler: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    weights = importance_weights(old, sampler, cap=cap)
    return weights, weights < importance_weights(old, sampler, cap=math.inf)


def _dropped_above_the_cap(
    old: Tensor, sampler: Tensor, cap: float
) -> tuple[Tensor, Tensor]:
    weights, biased = _capped_weights(old, sampler, cap)
    return torch.where(biased, 0.0, weights), biased


def _all_that_differ(old: Tensor, sampler: Tensor, cap: float) -> tuple[Tensor, Tensor]:
    return _capped_weights(old, sampler, cap)[0], old != sampler


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="group-family.token-weights",
        reference=_token_weights,
        cases=tuple(
            {
                "lengths": torch.tensor([4, 1, 2]),
                "denominator": denominator,
                "longest": 6,
            }
            for denominator in ("sequence", "token", "constant")
        ),
        mistakes={
            "The constant is the longest length allowed; the longest of the batch is "
            "no constant": (_longest_of_the_batch),
            "The sequence mean is also divided by the number of "
            "completions": _sequences_added,
            "Sequence mean and token mean are exchanged": _sequence_and_token_exchanged,
        },
    ),
    Exercise(
        name="group-family.ratio-weights",
        reference=_ratio_weights,
        cases=(
            {
                "ratio": torch.tensor([0.5, 1.0, 1.5, 8.0] * 2, dtype=torch.float64),
                "advantages": torch.tensor([1.0] * 4 + [-2.0] * 4, dtype=torch.float64),
                "epsilon": 0.2,
                "cap": 5.0,
            },
        ),
        mistakes={
            "PPO lets a token go on one side only: with A > 0 above 1 + epsilon, with "
            "A < 0 below 1 - epsilon": (
                lambda *batch: _ratio_weights(*batch, one_sided=True)
            ),
            "CISPO caps the weight and keeps the token; you clip it away": (
                _cispo_clipped_away
            ),
            "The ratio itself is missing from the weights": _without_ratio,
        },
    ),
    Exercise(
        name="group-family.dynamic-sampling",
        reference=_completions_drawn,
        cases=({"rates": [0.5], "K": 2}, {"rates": [0.05, 0.5, 0.9], "K": 4}),
        mistakes={
            "That is the number of groups; each has K completions": (
                lambda rates, K: _completions_drawn(rates, K) / K
            ),
            "A group whose answers are all right is silent, too": (
                lambda rates, K: sum(K / (1 - (1 - p) ** K) for p in rates)
            ),
            "Each prompt waits for itself: add the means, do not average the rates": (
                lambda rates, K: (
                    len(rates) * _completions_drawn([sum(rates) / len(rates)], K)
                )
            ),
        },
    ),
    Exercise(
        name="group-family.pushes",
        reference=_pushes,
        cases=(
            {
                "log_prob": torch.tensor(
                    [-67.4, -58.9, -32.1, -18.2], dtype=torch.float64
                ),
                "beta": 0.3,
            },
            {
                "log_prob": torch.tensor([-1.0, -3.0, -2.0], dtype=torch.float64),
                "beta": 1.0,
            },
            {"log_prob": torch.tensor([-4.0, -4.5], dtype=torch.float64), "beta": 2.0},
        ),
        mistakes={
            "The signs are reversed: the best must be pushed up": (
                lambda log_prob, beta: -_pushes(log_prob, beta)
            ),
            "The list is read from the worst to the best; the best comes first": (
                lambda log_prob, beta: _pushes(log_prob.flip(0), beta).flip(0)
            ),
            "Only neighbours are compared; the loss takes every pair": _neighbours_only,
            "The factor beta before the sigmoid is missing": (
                lambda log_prob, beta: _pushes(log_prob, beta) / beta
            ),
            "A pair pushes most where it is in the wrong order; yours pushes most "
            "where it is right": (_pulled_where_right),
        },
    ),
    Exercise(
        name="group-family.capped-weights",
        reference=_capped_weights,
        cases=(
            {
                "old": torch.tensor([0.9, 0.3, 0.05, 0.6], dtype=torch.float64).log(),
                "sampler": torch.tensor(
                    [0.6, 0.1, 0.2, 0.6], dtype=torch.float64
                ).log(),
                "cap": 2.0,
            },
            {
                "old": torch.tensor([-1.0, -0.5], dtype=torch.float64),
                "sampler": torch.tensor([-1.5, -0.4], dtype=torch.float64),
                "cap": 1.28,
            },
        ),
        mistakes={
            "The ratio is upside down: the policy's probability is above": (
                lambda old, sampler, cap: _capped_weights(sampler, old, cap)
            ),
            "A token above the cap stays, with the cap as its weight": (
                _dropped_above_the_cap
            ),
            "A weight other than 1 is no bias: it is what makes the mean right": (
                _all_that_differ
            ),
        },
    ),
)
