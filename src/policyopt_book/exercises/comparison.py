"""Exercises of the chapter that compares the methods."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable
from functools import partial
from itertools import combinations, permutations
from typing import Any

import torch
from torch import Tensor

from policyopt.losses import clipped_surrogate_loss
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


def _silent_weights(actions: Tensor, p: float) -> Tensor:
    """Divide 1 by each score, found by differentiating log π at the logit."""
    logit = torch.tensor(math.log(p / (1 - p)), dtype=actions.dtype, requires_grad=True)
    weights = []
    for action in actions:
        sign = 1.0 if action == 1 else -1.0
        log_prob = torch.nn.functional.logsigmoid(sign * logit)
        (score,) = torch.autograd.grad(log_prob, logit)
        weights.append(1 / score)
    return torch.stack(weights)


def _actions(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def _pairs_of(
    log_ratios: Tensor,
    grades: Tensor,
    beta: float,
    *,
    chosen: Callable[[int], list[tuple[int, int]]],
    sign: float = 1.0,
    total: bool = False,
    size: bool = False,
) -> Tensor:
    """Go through the groups and the pairs one by one, better completion first."""
    costs = []
    for group, given in zip(log_ratios, grades.tolist(), strict=True):
        for i, j in chosen(len(given)):
            if given[i] == given[j]:
                continue
            better, worse = (i, j) if given[i] > given[j] else (j, i)
            gap = abs(given[i] - given[j]) if size else 1.0
            margin = sign * gap * beta * (group[better] - group[worse])
            costs.append(torch.nn.functional.softplus(-margin))
    stacked = torch.stack(costs)
    return stacked.sum() if total else stacked.mean()


def _every(size: int) -> list[tuple[int, int]]:
    return list(combinations(range(size), 2))


def _disjoint(size: int) -> list[tuple[int, int]]:
    return [(i, i + 1) for i in range(0, size - 1, 2)]


def _with_ties(log_ratios: Tensor, grades: Tensor, beta: float) -> Tensor:
    size = grades.shape[1]
    one, two = torch.triu_indices(size, size, 1)
    better = (grades[:, one] - grades[:, two]).sign()
    margins = beta * better * (log_ratios[:, one] - log_ratios[:, two])
    return torch.nn.functional.softplus(-margins).mean()


def _groups_case(seed: int, groups: int, size: int, beta: float) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    grades = torch.randint(0, 4, (groups, size), generator=draw).double()
    ratios = torch.randn(groups, size, generator=draw, dtype=torch.float64)
    return {"log_ratios": 5 * ratios, "grades": grades, "beta": beta}


def _offline(
    now: Tensor,
    start: Tensor,
    mask: Tensor,
    grades: Tensor,
    clip: float,
    *,
    scale: bool = True,
    token_mean: bool = False,
    present: bool = False,
) -> Tensor:
    """Take the library's surrogate of each token, and the means in two loops."""
    groups, size = grades.shape
    advantages = grades - grades.mean(1, keepdim=True)
    if scale:
        advantages = advantages / grades.std(1, keepdim=True)
    advantages = advantages.reshape(groups * size, 1).expand_as(now)
    old = now.detach() if present else start
    items = clipped_surrogate_loss(now, old, advantages, clip_ratio=clip).loss
    if token_mean:
        return items[mask].mean()
    return torch.stack(
        [row[m].mean() for row, m in zip(items, mask, strict=True)]
    ).mean()


def _unclipped(
    now: Tensor, start: Tensor, mask: Tensor, grades: Tensor, clip: float
) -> Tensor:
    return _offline(now, start, mask, grades, 1e6)


def _offline_case(seed: int, groups: int, size: int, clip: float) -> dict[str, Any]:
    draw = torch.Generator().manual_seed(seed)
    rows, T = groups * size, 5
    lengths = torch.randint(1, T + 1, (rows, 1), generator=draw)
    mask = torch.arange(T) < lengths
    start = -3 * torch.rand(rows, T, generator=draw, dtype=torch.float64)
    moved = 0.5 * torch.randn(rows, T, generator=draw, dtype=torch.float64)
    grades = torch.randn(groups, size, generator=draw, dtype=torch.float64)
    return {
        "now": torch.where(mask, start + moved, 0.0),
        "start": torch.where(mask, start, 0.0),
        "mask": mask,
        "grades": grades,
        "clip": clip,
    }


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
        name="comparison.silent-weights",
        reference=_silent_weights,
        cases=(
            {"actions": _actions(1, 0, 0, 1), "p": 0.5},
            {"actions": _actions(0, 1, 1), "p": 0.9},
            {"actions": _actions(0, 0, 0, 0), "p": 0.25},
        ),
        mistakes={
            "Those are the scores; the weight times the score must be 1": (
                lambda actions, p: actions - p
            ),
            "With ±1 the product is the same for both actions only at p = 1/2": (
                lambda actions, p: 2 * (2 * actions - 1)
            ),
            "The sign of action 0 is wrong: its score is −p, so praise would make it "
            "likelier": (lambda actions, p: _silent_weights(actions, p).abs()),
            "Divided by the probability of the action taken; its score is 1 − p for "
            "action 1 and −p for action 0": (
                lambda actions, p: torch.where(actions == 1, 1 / p, -1 / (1 - p))
            ),
        },
    ),
    Exercise(
        name="comparison.all-pairs",
        reference=partial(_pairs_of, chosen=_every),
        gradient="log_ratios",
        constants=("grades",),
        cases=(
            _groups_case(0, 2, 4, 0.1),
            _groups_case(1, 3, 8, 0.5),
            _groups_case(2, 1, 3, 1.0),
        ),
        mistakes={
            "Only neighbours 1–2, 3–4, … are compared: that is the loop that you "
            "were to repair": partial(_pairs_of, chosen=_disjoint),
            "The worse completion is praised": partial(
                _pairs_of, chosen=_every, sign=-1.0
            ),
            "A pair of equal grades says nothing: leave it out, and out of the "
            "number of pairs too": _with_ties,
            "That is the sum over pairs; the loss is their mean": partial(
                _pairs_of, chosen=_every, total=True
            ),
            "The annotator tells which is better, not by how much": partial(
                _pairs_of, chosen=_every, size=True
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
    Exercise(
        name="comparison.offline-grpo",
        reference=_offline,
        gradient="now",
        constants=("start", "grades"),
        cases=(
            _offline_case(0, 2, 4, 0.2),
            _offline_case(1, 3, 8, 0.2),
            _offline_case(2, 1, 3, 0.5),
        ),
        mistakes={
            "The ratio is to the policy that sampled, start, and not to the "
            "current one": partial(_offline, present=True),
            "Nothing is clipped": _unclipped,
            "The advantages are not divided by the group's standard deviation": (
                partial(_offline, scale=False)
            ),
            "Long completions weigh more in your mean; take the mean of each "
            "completion's tokens first": partial(_offline, token_mean=True),
        },
    ),
)
