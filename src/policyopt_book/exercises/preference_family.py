"""Exercises of the chapter on the preference family."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from policyopt.losses import DPO, dpo_loss
from policyopt_book.exercises import Exercise

__all__ = ["EXERCISES"]


def _where_the_pull_vanishes(loss: Callable[[Tensor], DPO], p: float) -> float:
    """Return the log-ratio between whose two pulls, of one label and of the other,
    there is balance.
    """
    low, high = -1e3, 1e3
    for _ in range(60):
        z = (low + high) / 2
        weights = loss(torch.tensor([z, -z], dtype=torch.float64)).weight.tolist()
        low, high = (z, high) if p * weights[0] > (1 - p) * weights[1] else (low, z)
    return low if high < 999 else math.inf


def _minimisers(p: float, beta: float, epsilon: float) -> tuple[float, float, float]:
    def at(**options: Any) -> float:
        return _where_the_pull_vanishes(
            lambda z: dpo_loss(z, torch.zeros_like(z), beta=beta, **options), p
        )

    return at(), at(label_smoothing=epsilon), at(kind="ipo")


def _without_smoothing(
    p: float, beta: float, epsilon: float
) -> tuple[float, float, float]:
    sigmoid, _, ipo = _minimisers(p, beta, epsilon)
    return sigmoid, sigmoid, ipo


def _certain_ipo(p: float, beta: float, epsilon: float) -> tuple[float, float, float]:
    return *_minimisers(p, beta, epsilon)[:2], 1 / (2 * beta)


def _as_margins(p: float, beta: float, epsilon: float) -> tuple[float, float, float]:
    sigmoid, smoothed, ipo = _minimisers(p, beta, epsilon)
    return beta * sigmoid, beta * smoothed, beta * ipo


def _smoothed_by_certainty(
    p: float, beta: float, epsilon: float
) -> tuple[float, float, float]:
    sigmoid, _, ipo = _minimisers(p, beta, epsilon)
    return sigmoid, math.log((1 - epsilon) / epsilon) / beta, ipo


def _unflipped_loss(margin: Tensor, epsilon: float) -> Tensor:
    """Solve the two equations for the two factors."""
    mixing = torch.tensor(
        [[1 - epsilon, epsilon], [epsilon, 1 - epsilon]], dtype=margin.dtype
    )
    own, other = map(
        float, torch.linalg.solve(mixing, torch.tensor([1.0, 0.0], dtype=margin.dtype))
    )
    zero = torch.zeros_like(margin)
    return (
        own * dpo_loss(margin, zero, beta=1.0).loss
        + other * dpo_loss(zero, margin, beta=1.0).loss
    )


def _smoothed_loss(margin: Tensor, epsilon: float) -> Tensor:
    zero = torch.zeros_like(margin)
    return dpo_loss(margin, zero, beta=1.0, label_smoothing=epsilon).loss


def _margin_case(margins: list[float], epsilon: float) -> dict[str, Any]:
    return {"margin": torch.tensor(margins, dtype=torch.float64), "epsilon": epsilon}


def _orpo(chosen: Tensor, rejected: Tensor, weight: float) -> Tensor:
    """Take the logarithm of the odds' ratio term by term."""
    good, poor = chosen.exp(), rejected.exp()
    ratio = chosen + (1 - poor).log() - rejected - (1 - good).log()
    return -chosen + weight * torch.nn.functional.softplus(-ratio)


def _orpo_of_log_probs(chosen: Tensor, rejected: Tensor, weight: float) -> Tensor:
    difference = chosen - rejected
    return -chosen + weight * torch.nn.functional.softplus(-difference)


def _means_case(rows: list[list[float]], weight: float) -> dict[str, Any]:
    chosen, rejected = torch.tensor(rows, dtype=torch.float64).T.contiguous()
    return {"chosen": chosen.clone(), "rejected": rejected.clone(), "weight": weight}


def _kto_weights(
    log_ratio: Tensor, good: Tensor, beta: float, z0: float, up: float, down: float
) -> Tensor:
    """Differentiate (1)."""
    log_ratio = log_ratio.clone().requires_grad_()
    z = beta * log_ratio - z0
    liked, other = 1 - torch.sigmoid(z), 1 - torch.sigmoid(-z)
    loss = torch.where(good, up * liked, down * other).sum()
    return -torch.autograd.grad(loss, log_ratio)[0]


def _kto_of_dpo(
    log_ratio: Tensor, good: Tensor, beta: float, z0: float, up: float, down: float
) -> Tensor:
    z = beta * log_ratio - z0
    return torch.where(
        good, up * beta * torch.sigmoid(-z), -down * beta * torch.sigmoid(z)
    )


def _labels_case(
    seed: int, beta: float, z0: float, up: float, down: float
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    return {
        "log_ratio": 4 * torch.randn(6, generator=generator, dtype=torch.float64),
        "good": torch.rand(6, generator=generator) < 0.5,
        "beta": beta,
        "z0": z0,
        "up": up,
        "down": down,
    }


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="preference-family.minimisers",
        reference=_minimisers,
        cases=(
            {"p": 1.0, "beta": 0.5, "epsilon": 0.1},
            {"p": 0.8, "beta": 0.1, "epsilon": 0.2},
            {"p": 0.3, "beta": 1.5, "epsilon": 0.05},
        ),
        mistakes={
            "These are margins; the question is about log-ratios": _as_margins,
            "The smoothing is missing in the second value": _without_smoothing,
            "The second value holds for p = 1 only: mix p and "
            "epsilon": _smoothed_by_certainty,
            "The third value holds for p = 1 only: IPO's target is the "
            "mean over both labels": _certain_ipo,
        },
    ),
    Exercise(
        name="preference-family.flips",
        reference=_unflipped_loss,
        cases=(
            _margin_case([-2.0, 0.0, 3.0], 0.2),
            _margin_case([0.5], 0.4),
            _margin_case([-1.0, 4.0], 0.0),
        ),
        gradient="margin",
        mistakes={
            "That is label smoothing; it lowers the margin that is asked for and "
            "does not undo a flip": (_smoothed_loss),
            "The factors are in the right proportion, but too small: divide by 1 - 2 "
            "epsilon": (
                lambda margin, epsilon: (
                    (1 - 2 * epsilon) * _unflipped_loss(margin, epsilon)
                )
            ),
            "The other label's loss must be subtracted, not added": (
                lambda margin, epsilon: (
                    _smoothed_loss(margin, epsilon) / (1 - 2 * epsilon)
                )
            ),
            "That is the plain loss: its mean over flipped labels is not that over "
            "clean ones": (
                lambda margin, epsilon: (
                    dpo_loss(margin, torch.zeros_like(margin), beta=1.0).loss
                )
            ),
        },
    ),
    Exercise(
        name="preference-family.orpo",
        reference=_orpo,
        cases=(
            _means_case([[-0.3, -0.9], [-1.2, -0.4]], 1.0),
            _means_case([[-0.05, -60.0], [-45.0, -0.7]], 0.1),
        ),
        gradient=("chosen", "rejected"),
        mistakes={
            "These are log-probabilities; the second term compares log odds, "
            "log(p / (1 - p))": _orpo_of_log_probs,
            "The likelihood of the chosen text is missing": (
                lambda chosen, rejected, weight: (
                    _orpo(chosen, rejected, weight) + chosen
                )
            ),
            "Chosen and rejected are exchanged": (
                lambda chosen, rejected, weight: _orpo(rejected, chosen, weight)
            ),
            "The weight belongs to the second term, not to the likelihood": (
                lambda chosen, rejected, weight: (
                    weight * -chosen + _orpo(chosen, rejected, 1.0) + chosen
                )
            ),
        },
    ),
    Exercise(
        name="preference-family.kto",
        reference=_kto_weights,
        cases=(
            _labels_case(0, 0.5, 0.0, 1.0, 1.0),
            _labels_case(1, 0.1, 0.3, 1.0, 1.5),
        ),
        mistakes={
            "That is the weight with a logarithm, as in DPO; KTO has none": _kto_of_dpo,
            "The sign is wrong: good texts are to be pushed up": (
                lambda *case: -_kto_weights(*case)
            ),
            "The factor beta of the inner derivative is missing": (
                lambda log_ratio, good, beta, z0, up, down: (
                    _kto_weights(log_ratio, good, beta, z0, up, down) / beta
                )
            ),
            "The z0 is missing: the log-ratio is measured from the KL divergence": (
                lambda log_ratio, good, beta, z0, up, down: _kto_weights(
                    log_ratio, good, beta, 0.0, up, down
                )
            ),
            "The two lambdas are missing or exchanged": (
                lambda log_ratio, good, beta, z0, up, down: _kto_weights(
                    log_ratio, good, beta, z0, down, up
                )
            ),
        },
    ),
)
