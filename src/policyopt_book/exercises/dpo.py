"""Exercises of the chapter on direct preference optimisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from policyopt.losses import DPO, dpo_loss
from policyopt_book.exercises import Exercise

__all__ = ["EXERCISES"]


def _tilted(reference: Tensor, reward: Tensor, beta: float) -> list[float]:
    """Return π* as (2) has it, number by number."""
    weights = [
        q * math.exp(r / beta)
        for q, r in zip(reference.tolist(), reward.tolist(), strict=True)
    ]
    return [weight / sum(weights) for weight in weights]


def _divergence(p: list[float], q: list[float]) -> float:
    return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))


def _optimum(
    reference: Tensor, reward: Tensor, beta: float
) -> tuple[Tensor, float, float]:
    """Return π*, and the objective of π* and of the reference, by (1)."""
    best = _tilted(reference, reward, beta)
    at_reference = float(reference @ reward)
    at_best = sum(p * r for p, r in zip(best, reward.tolist(), strict=True))
    return (
        torch.tensor(best, dtype=torch.float64),
        at_best - beta * _divergence(best, reference.tolist()),
        at_reference,
    )


def _no_price(
    reference: Tensor, reward: Tensor, beta: float
) -> tuple[Tensor, float, float]:
    best, _, at_reference = _optimum(reference, reward, beta)
    return best, float(best @ reward), at_reference


def _logarithm_of_z(
    reference: Tensor, reward: Tensor, beta: float
) -> tuple[Tensor, float, float]:
    best, value, at_reference = _optimum(reference, reward, beta)
    return best, value / beta, at_reference


def _texts_case(seed: int, texts: int, beta: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    reference = torch.randn(texts, generator=generator, dtype=torch.float64).softmax(0)
    reward = torch.randn(texts, generator=generator, dtype=torch.float64)
    return {"reference": reference, "reward": reward, "beta": beta}


def _pair_loss(
    chosen: Tensor,
    rejected: Tensor,
    reference_chosen: Tensor,
    reference_rejected: Tensor,
    beta: float,
) -> Tensor:
    """Return -log of the share that e^(implicit reward) of the chosen has in the sum of
    both.
    """
    good, poor = (
        beta * (chosen - reference_chosen),
        beta * (rejected - reference_rejected),
    )
    return torch.logaddexp(good, poor) - good


def _pair_probability(
    c: Tensor, r: Tensor, ref_c: Tensor, ref_r: Tensor, beta: float
) -> Tensor:
    return torch.sigmoid(beta * ((c - ref_c) - (r - ref_r)))


def _pairs_case(rows: list[list[float]], beta: float) -> dict[str, Any]:
    """Rows of chosen, rejected, reference of the chosen, reference of the rejected."""
    c, r, ref_c, ref_r = torch.tensor(rows).T.contiguous()
    return {
        "chosen": c.clone(),
        "rejected": r.clone(),
        "reference_chosen": ref_c.clone(),
        "reference_rejected": ref_r.clone(),
        "beta": beta,
    }


def _text_log_prob(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    totals = []
    for i in range(len(ids)):
        total = logits.new_zeros(())
        for t in range(1, ids.shape[1]):
            if mask[i, t]:
                row = logits[i, t - 1]  # the model has read everything before token t
                total = total + row[ids[i, t]] - torch.logsumexp(row, 0)
        totals.append(total)
    return torch.stack(totals)


def _everything(mask: Tensor) -> Tensor:
    """Prompt and completion; padding follows the completion."""
    return mask.flip(1).cumsum(1).flip(1) > 0


def _not_shifted(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    rows = logits.log_softmax(-1).gather(-1, ids[..., None])[..., 0]
    return torch.where(mask, rows, 0.0).sum(1)


def _last_token_only(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    last = _everything(mask).sum(1) - 1
    only = torch.zeros_like(mask)
    only[torch.arange(len(ids)), last] = True
    return _text_log_prob(logits, ids, only)


def _mean_of_tokens(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    return _text_log_prob(logits, ids, mask) / mask.sum(1)


def _sum_of_logits(logits: Tensor, ids: Tensor, mask: Tensor) -> Tensor:
    rows = logits[:, :-1].gather(-1, ids[:, 1:, None])[..., 0]
    return torch.where(mask[:, 1:], rows, 0.0).sum(1)


def _logits_case(seed: int, prompts: list[int], lengths: list[int]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    width = max(p + n for p, n in zip(prompts, lengths, strict=True))
    position = torch.arange(width)
    return {
        "logits": torch.randn(
            len(prompts), width, 5, generator=generator, dtype=torch.float64
        ),
        "ids": torch.randint(5, (len(prompts), width), generator=generator),
        "mask": torch.stack(
            [
                (position >= p) & (position < p + n)
                for p, n in zip(prompts, lengths, strict=True)
            ]
        ),
    }


def _beta_for(
    reference: Tensor, reward: Tensor, nats: float, reverse: bool = False
) -> float:
    """Halve an interval of 1/β: the divergence rises with it."""
    low, high, q = 0.0, 1e3, reference.tolist()
    for _ in range(60):
        middle = (low + high) / 2
        logits = [
            math.log(a) + r * middle for a, r in zip(q, reward.tolist(), strict=True)
        ]
        largest = max(logits)
        log_z = largest + math.log(sum(math.exp(x - largest) for x in logits))
        gains = [x - log_z - math.log(a) for x, a in zip(logits, q, strict=True)]
        weights = q if reverse else [math.exp(x - log_z) for x in logits]
        distance = sum(w * gain for w, gain in zip(weights, gains, strict=True))
        low, high = (middle, high) if abs(distance) < nats else (low, middle)
    return 1 / low


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


def _margin_case(margins: list[float], epsilon: float) -> dict[str, Any]:
    return {"margin": torch.tensor(margins, dtype=torch.float64), "epsilon": epsilon}


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="dpo.optimum",
        reference=_optimum,
        cases=(
            {
                "reference": torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64),
                "reward": torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64),
                "beta": 1.0,
            },
            _texts_case(0, 4, 0.5),
            _texts_case(1, 6, 3.0),
        ),
        mistakes={
            "The reward is to be divided by beta, not multiplied: a small beta "
            "allows more": (
                lambda reference, reward, beta: (
                    torch.tensor(_tilted(reference, reward, 1 / beta)),
                    *_optimum(reference, reward, beta)[1:],
                )
            ),
            "You leave out the reference: the optimum re-weighs it": (
                lambda reference, reward, beta: (
                    (reward / beta).softmax(0),
                    *_optimum(reference, reward, beta)[1:],
                )
            ),
            "The policy is right, but its objective lacks the price of the "
            "distance": _no_price,
            "The policy is right, but its objective is beta log Z, "
            "not log Z": _logarithm_of_z,
        },
    ),
    Exercise(
        name="dpo.loss",
        reference=_pair_loss,
        cases=(
            _pairs_case(
                [[-45.6, -28.3, -45.6, -28.3], [-45.6, -28.3, -49.0, -27.1]], 0.5
            ),
            _pairs_case([[-12.0, -10.0, -9.0, -11.0], [-3.0, -20.0, -5.0, -16.0]], 0.1),
            _pairs_case([[-60.0, -40.0, -20.0, -400.0]], 0.5),
        ),
        gradient=("chosen", "rejected"),
        constants=("reference_chosen", "reference_rejected"),
        mistakes={
            "The rejected text is detached: it would never become less likely": (
                lambda c, r, ref_c, ref_r, beta: _pair_loss(
                    c, r.detach(), ref_c, ref_r, beta
                )
            ),
            "The chosen text is detached: it would never become likelier": (
                lambda c, r, ref_c, ref_r, beta: _pair_loss(
                    c.detach(), r, ref_c, ref_r, beta
                )
            ),
            "The reference is missing: the loss would prefer whichever text is "
            "shorter": (
                lambda c, r, ref_c, ref_r, beta: _pair_loss(c, r, 0 * c, 0 * r, beta)
            ),
            "The logarithm is missing: the weight vanishes where the pair is badly "
            "wrong": (
                lambda c, r, ref_c, ref_r, beta: (
                    -_pair_probability(c, r, ref_c, ref_r, beta)
                )
            ),
            "Chosen and rejected are exchanged": (
                lambda c, r, ref_c, ref_r, beta: _pair_loss(r, c, ref_r, ref_c, beta)
            ),
            "The sign is wrong: minimising this makes the preference unlikely": (
                lambda c, r, ref_c, ref_r, beta: -_pair_loss(c, r, ref_c, ref_r, beta)
            ),
            "The reference's log-ratio is added, not subtracted": (
                lambda c, r, ref_c, ref_r, beta: _pair_loss(c, r, -ref_c, -ref_r, beta)
            ),
            "The sigmoid rounds to 0 before its logarithm is taken; compute both in "
            "one piece": (
                lambda c, r, ref_c, ref_r, beta: (
                    -_pair_probability(c, r, ref_c, ref_r, beta).log()
                )
            ),
            "The factor beta is in front of the logarithm; it belongs in the margin": (
                lambda c, r, ref_c, ref_r, beta: (
                    beta * _pair_loss(c, r, ref_c, ref_r, 1.0)
                )
            ),
        },
    ),
    Exercise(
        name="dpo.position",
        reference=_text_log_prob,
        cases=(_logits_case(0, [2], [3]), _logits_case(1, [1, 3, 2], [4, 2, 1])),
        gradient="logits",
        mistakes={
            "Not shifted: the logits at position t say what comes at t + "
            "1": _not_shifted,
            "The prompt is counted too; the mask says where the completion is": (
                lambda logits, ids, mask: _text_log_prob(logits, ids, _everything(mask))
            ),
            "Padding is counted too; the mask says where the completion ends": (
                lambda logits, ids, mask: _text_log_prob(
                    logits, ids, mask.cumsum(1) > 0
                )
            ),
            "That is the last token only; the completion is all of "
            "its tokens": _last_token_only,
            "That is the mean; the log-probability of a text is the "
            "sum over its tokens": _mean_of_tokens,
            "These are logits: take the logarithm of the softmax over "
            "the vocabulary first": _sum_of_logits,
        },
    ),
    Exercise(
        name="dpo.beta-for-kl",
        reference=_beta_for,
        cases=tuple(
            {key: case[key] for key in ("reference", "reward")} | {"nats": nats}
            for case, nats in (
                (_texts_case(2, 6, 1.0), 0.5),
                (_texts_case(3, 15, 1.0), 1.0),
                (_texts_case(4, 4, 1.0), 0.02),
            )
        ),
        mistakes={
            "That is KL(reference || optimum); the question is the other direction": (
                lambda reference, reward, nats: _beta_for(
                    reference, reward, nats, reverse=True
                )
            ),
            "That is 1 / beta: the reward is divided by beta": (
                lambda reference, reward, nats: 1 / _beta_for(reference, reward, nats)
            ),
        },
    ),
    Exercise(
        name="dpo.minimisers",
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
        name="dpo.flips",
        reference=_unflipped_loss,
        cases=(
            _margin_case([-2.0, 0.0, 3.0], 0.2),
            _margin_case([0.5], 0.4),
            _margin_case([-1.0, 4.0], 0.0),
        ),
        gradient="margin",
        mistakes={
            "That is label smoothing; it lowers the margin that is asked for and "
            "does not undo a flip": (
                lambda margin, epsilon: (
                    dpo_loss(
                        margin,
                        torch.zeros_like(margin),
                        beta=1.0,
                        label_smoothing=epsilon,
                    ).loss
                )
            ),
            "The factors are in the right proportion, but too small: divide by 1 - 2 "
            "epsilon": (
                lambda margin, epsilon: (
                    (1 - 2 * epsilon) * _unflipped_loss(margin, epsilon)
                )
            ),
            "The other label's loss must be subtracted, not added": (
                lambda margin, epsilon: (
                    dpo_loss(
                        margin,
                        torch.zeros_like(margin),
                        beta=1.0,
                        label_smoothing=epsilon,
                    ).loss
                    / (1 - 2 * epsilon)
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
)
