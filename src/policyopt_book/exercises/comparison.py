"""Exercises of the chapter that compares the methods."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from itertools import pairwise, permutations
from typing import Any

import torch
from torch import Tensor

from policyopt.losses import clipped_surrogate_loss, ranking_loss
from policyopt_book.exercises import Exercise

__all__ = ["EXERCISES"]


def _relative_variance_by_hand() -> float:
    """Take the signal from products of *different* batches, whose noise cancels on
    average.
    """
    gradients = [1.0, 2.0, 3.0]
    signal = statistics.mean(x * y for x, y in permutations(gradients, 2))
    return statistics.variance(gradients) / signal


def _gigabytes(weights: float, trained: int, frozen: int) -> float:
    floats = 0.0
    for _ in range(trained):
        for _ in ("weight", "gradient", "first moment", "second moment"):
            floats += weights
    for _ in range(frozen):
        floats += weights
    return 4 * floats / 1e9


def _minus_slope(loss: Callable[[Tensor], Tensor], log_probs: Tensor) -> Tensor:
    leaf = log_probs.detach().clone().requires_grad_()
    (slope,) = torch.autograd.grad(loss(leaf).mean(), leaf)
    return -slope


def _clipped_case(
    ratios: list[float], advantages: list[float], clip_ratio: float
) -> dict[str, Any]:
    old = torch.linspace(-3.0, -0.5, len(ratios), dtype=torch.float64)
    return {
        "log_prob": old + torch.tensor(ratios, dtype=torch.float64).log(),
        "old_log_prob": old,
        "advantages": torch.tensor(advantages, dtype=torch.float64),
        "clip_ratio": clip_ratio,
    }


def _clipped_weights(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_ratio: float
) -> Tensor:
    def loss(leaf: Tensor) -> Tensor:
        return clipped_surrogate_loss(
            leaf, old_log_prob, advantages, clip_ratio=clip_ratio
        ).loss

    return _minus_slope(loss, log_prob)


def _without_ratio(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_ratio: float
) -> Tensor:
    weights = _clipped_weights(log_prob, old_log_prob, advantages, clip_ratio)
    return weights / torch.exp(log_prob - old_log_prob)


def _off_on_both_sides(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_ratio: float
) -> Tensor:
    ratio = torch.exp(log_prob - old_log_prob)
    inside = (ratio > 1 - clip_ratio) & (ratio < 1 + clip_ratio)
    return torch.where(inside, ratio * advantages, 0.0) / len(ratio)


def _never_off(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, clip_ratio: float
) -> Tensor:
    return torch.exp(log_prob - old_log_prob) * advantages / len(log_prob)


def _list_case(log_probs: list[float], beta: float) -> dict[str, Any]:
    return {"log_probs": torch.tensor(log_probs, dtype=torch.float64), "beta": beta}


def _list_weights(log_probs: Tensor, beta: float) -> Tensor:
    return _minus_slope(lambda leaf: ranking_loss(leaf, beta=beta).loss, log_probs)


def _neighbours_only(log_probs: Tensor, beta: float) -> Tensor:
    def loss(leaf: Tensor) -> Tensor:
        margins = [beta * (better - worse) for better, worse in pairwise(leaf)]
        return -torch.nn.functional.logsigmoid(torch.stack(margins))

    return _minus_slope(loss, log_probs)


def _praise_what_is_right(log_probs: Tensor, beta: float) -> Tensor:
    """σ(margin) where it should be σ(−margin): that is the list with all
    log-probabilities turned round.
    """
    return _list_weights(-log_probs, beta)


def _pairs(log_probs: Tensor) -> float:
    return len(log_probs) * (len(log_probs) - 1) / 2


def _bits(gaps: Tensor) -> float:
    total = 0.0
    for gap in gaps.tolist():
        entropy = 0.0
        for z in (gap, -gap):
            p = 1 / (1 + math.exp(-z))
            entropy -= p * math.log2(p) if p > 0 else 0.0
        total += 1 - entropy
    return total / len(gaps)


def _bits_naive(gaps: Tensor) -> Tensor:
    p = torch.sigmoid(gaps)
    return (1 + p * p.log2() + (1 - p) * (1 - p).log2()).mean()


def _nats(gaps: Tensor) -> float:
    return math.log(2) * _bits(gaps)


def _seeds(a: Tensor, b: Tensor, scale: float = 1.0) -> int:
    """Count up until the difference is two standard errors."""
    variance = statistics.variance(a.tolist()) + statistics.variance(b.tolist())
    n = 1
    while abs(a.mean() - b.mean()) < 2 * math.sqrt(scale * variance / n):
        n += 1
    return n


def _seeds_from(
    noise: Callable[[list[float], list[float]], float],
) -> Callable[[Tensor, Tensor], int]:
    """Give the wrong number of seeds that follows from a wrong n times squared standard
    error.
    """

    def seeds(a: Tensor, b: Tensor) -> int:
        return math.ceil(
            4 * noise(a.tolist(), b.tolist()) / float(a.mean() - b.mean()) ** 2
        )

    return seeds


def _runs(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="comparison.by-hand",
        reference=_relative_variance_by_hand,
        mistakes={
            "The square of the mean holds noise as well: take S / M off": lambda: 1 / 4,
            "The sum of squares is divided by M; without bias it is M − 1": lambda: (
                (2 / 3) / (4 - 2 / 9)
            ),
            "That is signal over noise; ν is noise over signal": lambda: 11 / 3,
            "S is a variance already, and ν is not its root": lambda: math.sqrt(3 / 11),
        },
    ),
    Exercise(
        name="comparison.memory",
        reference=_gigabytes,
        cases=(
            {"weights": 7e9, "trained": 2, "frozen": 2},
            {"weights": 7e9, "trained": 1, "frozen": 1},
            {"weights": 7e9, "trained": 1, "frozen": 0},
        ),
        mistakes={
            "A frozen model needs its weights only; it has no gradients and no "
            "moments": (
                lambda weights, trained, frozen: 16 * (trained + frozen) * weights / 1e9
            ),
            "The gradients are missing": (
                lambda weights, trained, frozen: (
                    (12 * trained + 4 * frozen) * weights / 1e9
                )
            ),
            "Adam keeps two moments of each trained weight": (
                lambda weights, trained, frozen: (
                    (8 * trained + 4 * frozen) * weights / 1e9
                )
            ),
            "A gigabyte is 10⁹ bytes; you divided by 2³⁰": (
                lambda weights, trained, frozen: (
                    (16 * trained + 4 * frozen) * weights / 2**30
                )
            ),
        },
    ),
    Exercise(
        name="comparison.clipped-weights",
        reference=_clipped_weights,
        cases=(
            _clipped_case([1.0, 1.0, 1.0], [2.0, -1.0, 0.0], 0.2),
            _clipped_case(
                [1.5, 0.5, 1.5, 0.5, 1.1, 0.9], [1.0, 1.0, -1.0, -1.0, 2.0, -2.0], 0.2
            ),
            _clipped_case([1.25, 0.75, 0.3], [1.0, -1.0, 3.0], 0.3),
        ),
        mistakes={
            "A sample that comes back towards ρ = 1 keeps its "
            "weight: for A > 0 only ρ > 1 + ε is off, for A < 0 "
            "only ρ < 1 − ε": _off_on_both_sides,
            "Nothing is clipped": _never_off,
            "The factor ρ is missing: the derivative of ρ with respect "
            "to log π is ρ": _without_ratio,
            "The sign is turned round: w is minus the slope of the loss": (
                lambda *arguments: -_clipped_weights(*arguments)
            ),
            "The loss of the batch is a mean, so each weight is divided by N": (
                lambda log_prob, *others: (
                    len(log_prob) * _clipped_weights(log_prob, *others)
                )
            ),
        },
    ),
    Exercise(
        name="comparison.list-weights",
        reference=_list_weights,
        cases=(
            _list_case([-10.0, -10.0, -10.0, -10.0], 0.1),
            _list_case([-8.0, -12.0, -9.0], 0.5),
            _list_case([-20.0, -5.0], 0.1),
        ),
        mistakes={
            "Pairs in the right order pull most in your answer; a pair weighs "
            "σ(−margin), not σ(margin)": (_praise_what_is_right),
            "Only neighbours are compared; the loss has every pair "
            "of the list": _neighbours_only,
            "The factor β in front of σ is missing": (
                lambda log_probs, beta: _list_weights(log_probs, beta) / beta
            ),
            "These are the weights of the sum over pairs; the loss is their mean": (
                lambda log_probs, beta: (
                    _list_weights(log_probs, beta) * _pairs(log_probs)
                )
            ),
            "You divide by the number of completions; the loss is a mean over pairs": (
                lambda log_probs, beta: (
                    _list_weights(log_probs, beta) * _pairs(log_probs) / len(log_probs)
                )
            ),
        },
    ),
    Exercise(
        name="comparison.bits",
        reference=_bits,
        cases=(
            {"gaps": torch.tensor([0.0, 1.0, -1.0, 3.0], dtype=torch.float64)},
            {"gaps": torch.tensor([0.2, -0.4], dtype=torch.float64)},
            {"gaps": torch.tensor([2.0, 60.0], dtype=torch.float64)},
        ),
        mistakes={
            "A gap can be so large that p rounds to 1, and 0 · log 0 is "
            "then nan; its limit is 0": _bits_naive,
            "That is in nats: a logarithm to base 2 gives bits": _nats,
            "That is H₂, what a comparison leaves open; it tells 1 − H₂": lambda gaps: (
                1 - _bits(gaps)
            ),
            "The mean is taken of the gaps, and then the information; take it the "
            "other way round": (lambda gaps: _bits(gaps.mean(0, keepdim=True))),
        },
    ),
    Exercise(
        name="comparison.seeds",
        reference=_seeds,
        cases=(
            {"a": _runs(3.1, 2.8, 3.4, 3.3, 3.0), "b": _runs(2.9, 3.1, 2.9, 3.0, 2.8)},
            {"a": _runs(300.0, 410.0, 350.0), "b": _runs(420.0, 400.0, 395.0, 500.0)},
            {"a": _runs(4.1, 4.0), "b": _runs(3.0, 2.9)},
        ),
        mistakes={
            "Both means are noisy: the variances of the two methods add up": (
                _seeds_from(lambda a, b: statistics.variance(a))
            ),
            "Variances add up, standard deviations do not": (
                _seeds_from(
                    lambda a, b: (statistics.stdev(a) + statistics.stdev(b)) ** 2
                )
            ),
            "The variance between seeds has the denominator n − 1": (
                _seeds_from(
                    lambda a, b: statistics.pvariance(a) + statistics.pvariance(b)
                )
            ),
            "That is one standard error, not two": lambda a, b: _seeds(
                a, b, scale=1 / 4
            ),
        },
    ),
)
