"""Exercises of the chapter on group relative policy optimisation."""

from __future__ import annotations

import itertools
import math
import statistics
from typing import Any

import torch
from torch import Tensor

from policyopt.estimators import kl_estimate
from policyopt_book.exercises import Exercise

__all__ = ["EXERCISES"]

Three = tuple[Tensor, Tensor, Tensor]


def _advantages(
    rewards: Tensor, deviation: Any = statistics.stdev, eps: float = 1e-4
) -> Three:
    rows: tuple[list[list[float]], ...] = ([], [], [])
    for group in rewards.tolist():
        mean, std = statistics.mean(group), deviation(group)
        rows[1].append([r - mean for r in group])
        rows[0].append(
            [a / (std + eps) if std + eps > 0 else math.nan for a in rows[1][-1]]
        )
        rows[2].append(
            [
                r - statistics.mean(group[:i] + group[i + 1 :])
                for i, r in enumerate(group)
            ]
        )
    grpo, dr_grpo, rloo = (torch.tensor(part, dtype=rewards.dtype) for part in rows)
    return grpo, dr_grpo, rloo


def _compared_with_the_batch(rewards: Tensor) -> Three:
    batch = _advantages(rewards.reshape(1, -1))
    return (
        batch[0].view_as(rewards),
        batch[1].view_as(rewards),
        batch[2].view_as(rewards),
    )


def _compared_with_itself(rewards: Tensor) -> Three:
    grpo, dr_grpo, _ = _advantages(rewards)
    return grpo, dr_grpo, dr_grpo


def _inverted_k3(log_prob: Tensor, reference_log_prob: Tensor, kind: str) -> Tensor:
    if kind != "k3":
        return _estimate(log_prob, reference_log_prob, kind)
    log_ratio = log_prob - reference_log_prob
    return log_ratio.exp() - 1 - log_ratio


def _estimate(log_prob: Tensor, reference_log_prob: Tensor, kind: Any) -> Tensor:
    return kl_estimate(log_prob, reference_log_prob, kind)


def _without_half(log_prob: Tensor, reference_log_prob: Tensor, kind: str) -> Tensor:
    return (2.0 if kind == "k2" else 1.0) * _estimate(
        log_prob, reference_log_prob, kind
    )


def _kl_case(kind: str) -> dict[str, Any]:
    log_prob = torch.tensor([-0.2, -1.5, -3.0, -2.0], dtype=torch.float64)
    reference = torch.tensor([-0.9, -0.5, -3.0, -2.1], dtype=torch.float64)
    return {"log_prob": log_prob, "reference_log_prob": reference, "kind": kind}


def _update_factor(
    p: float, K: int, failures: bool = True, slope: bool = True
) -> float:
    """Go through all groups of right and wrong answers."""
    total = 0.0
    for group in itertools.product((True, False), repeat=K):
        probability = math.prod(p if right else 1 - p for right in group)
        if any(group):
            total += probability * (1 / p if slope else 1.0)
        elif failures:
            total -= probability * (1 / (1 - p) if slope else 1.0)
    return total


def _loop_loss(
    log_probs: Tensor,
    old: Tensor,
    masks: Tensor,
    rewards: Tensor,
    clip: float,
    *,
    deviation: Any = statistics.stdev,
    which: Any = min,
    mean: str = "written",
) -> Tensor:
    """Token by token, group by group."""
    total = []
    for now, before, mask, r in zip(log_probs, old, masks, rewards, strict=True):
        numbers = r.tolist()
        middle, spread = statistics.mean(numbers), deviation(numbers)
        terms = []
        for i, t in mask.nonzero().tolist():
            A = (numbers[i] - middle) / (spread + 1e-4)
            ratio = (now[i, t] - before[i, t]).exp()
            edge = ratio.detach().clamp(1 - clip, 1 + clip)
            inside = bool(ratio.detach() == edge)
            terms.append(-which(ratio * A, (ratio if inside else edge) * A))
        share = len(rewards) * int(mask.sum()) if mean == "group" else 1
        total.append(torch.stack(terms).sum() / share)
    written = int(masks.sum()) if mean == "written" else 1
    return torch.stack(total).sum() / written


def _loop_case(seed: int) -> dict[str, Any]:
    """Return two groups of four completions, after the policy has moved."""
    generator = torch.Generator().manual_seed(seed)
    old = -3 * torch.rand(2, 4, 5, generator=generator, dtype=torch.float64)
    step = torch.randn(2, 4, 5, generator=generator, dtype=torch.float64)
    lengths = torch.tensor([[5, 3, 4, 5], [1, 2, 1, 3]])
    return {
        "log_probs": old + 0.4 * step,
        "old": old,
        "masks": torch.arange(5) < lengths[..., None],
        "rewards": torch.tensor([[1, 0, 0, 1], [0, 0, 1, 0]], dtype=torch.float64),
        "clip": 0.2,
    }


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="grpo.group-of-four",
        reference=_advantages,
        cases=(
            {"rewards": torch.tensor([[1.0, 0, 0, 1], [11, 10, 10, 11]])},
            {"rewards": torch.tensor([[0.5, -1.0, 2.0], [3.0, 3.0, 3.0]])},
            {"rewards": torch.tensor([[0.0, 1.0]])},
        ),
        rtol=1e-3,  # whether ε is in the denominator or not
        mistakes={
            "The standard deviation of (2) has the denominator K - 1": (
                lambda rewards: _advantages(rewards, statistics.pstdev)
            ),
            "A completion is compared with those of its own prompt, not with the "
            "whole batch": (_compared_with_the_batch),
            "In RLOO the mean is that of the others; a sample is not compared with "
            "itself": (_compared_with_itself),
            "A group of equal rewards is divided by 0: add the small number of (2) "
            "to the deviation": (lambda rewards: _advantages(rewards, eps=0.0)),
        },
    ),
    Exercise(
        name="grpo.every-k",
        reference=_estimate,
        cases=(_kl_case("k1"), _kl_case("k2"), _kl_case("k3")),
        gradient="log_prob",
        constants=("reference_log_prob",),
        mistakes={
            "The ratio r is the reference's probability over the policy's; you have "
            "it the other way round": (
                lambda log_prob, reference_log_prob, kind: _estimate(
                    reference_log_prob, log_prob, kind
                )
            ),
            "In k3 the ratio is the other way round: then its mean under the policy "
            "is not the KL": (_inverted_k3),
            "The estimate k2 is half of the square": _without_half,
            "No gradient arrives at the policy: something detaches it": (
                lambda log_prob, reference_log_prob, kind: _estimate(
                    log_prob.detach(), reference_log_prob, kind
                )
            ),
        },
    ),
    Exercise(
        name="grpo.best-of-the-group",
        reference=_update_factor,
        cases=({"p": 0.1, "K": 6}, {"p": 0.5, "K": 2}, {"p": 0.9, "K": 4}),
        mistakes={
            "A group without a success has a best completion as well: a failure, "
            "which is made likelier": (
                lambda p, K: _update_factor(p, K, failures=False)
            ),
            "These are probabilities; a success moves p by 1/p times its gradient, a "
            "failure by -1/(1-p)": (lambda p, K: _update_factor(p, K, slope=False)),
            "That is the factor of the policy gradient, 1: which completion is kept "
            "depends on the rewards": (lambda p, K: 1.0),
        },
    ),
    Exercise(
        name="grpo.loop",
        reference=_loop_loss,
        cases=(_loop_case(0), _loop_case(1)),
        gradient="log_probs",
        constants=("old", "rewards"),
        mistakes={
            "The standard deviation of (2) has the denominator K - 1": (
                lambda *batch: _loop_loss(*batch, deviation=statistics.pstdev)
            ),
            "That is the maximum; the minimum is the pessimistic one": (
                lambda *batch: _loop_loss(*batch, which=max)
            ),
            "Divide by the tokens of all groups together; you average within each "
            "group first, and its length then decides what a token counts": (
                lambda *batch: _loop_loss(*batch, mean="group")
            ),
            "The loop as it was given has three mistakes": (
                lambda *batch: _loop_loss(
                    *batch, deviation=statistics.pstdev, which=max, mean="group"
                )
            ),
        },
    ),
)
