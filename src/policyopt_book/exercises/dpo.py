"""Exercises of the chapter on direct preference optimisation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

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


def _changes(reference: Tensor, reward: Tensor, beta: float) -> tuple[float, float]:
    """Go through all pairs of texts, one by one."""
    q, r = reference.tolist(), reward.tolist()
    best = _tilted(reference, reward, beta)
    change = [math.log(p / a) for p, a in zip(best, q, strict=True)]
    chosen = rejected = 0.0
    for i in range(len(q)):
        for j in range(len(q)):
            wins = q[i] * q[j] / (1 + math.exp(r[j] - r[i]))  # i is drawn first
            chosen += 2 * wins * change[i]
            rejected += 2 * wins * change[j]
    return chosen, rejected


def _changes_of_one_order(
    reference: Tensor, reward: Tensor, beta: float
) -> tuple[float, float]:
    chosen, rejected = _changes(reference, reward, beta)
    return chosen / 2, rejected / 2


def _changes_of_own_samples(
    reference: Tensor, reward: Tensor, beta: float
) -> tuple[float, float]:
    """Draw the pairs from the optimum, and weigh its changes."""
    best = torch.tensor(_tilted(reference, reward, beta), dtype=torch.float64)
    chosen, rejected = _changes(best, reward, -beta)  # from the optimum back
    return -chosen, -rejected


def _changes_without_labels(
    reference: Tensor, reward: Tensor, beta: float
) -> tuple[float, float]:
    mean = sum(_changes(reference, reward, beta)) / 2
    return mean, mean


def _batch_loss(
    policy: Tensor, reference: Tensor, ids: Tensor, mask: Tensor, beta: float
) -> Tensor:
    """Score text by text, and compare pair by pair."""
    return _loss_of_scores(
        _text_log_prob(policy, ids, mask), _text_log_prob(reference, ids, mask), beta
    )


def _loss_of_scores(ours: Tensor, theirs: Tensor, beta: float) -> Tensor:
    losses = [
        _pair_loss(ours[i], ours[i + 1], theirs[i], theirs[i + 1], beta)
        for i in range(0, len(ours), 2)
    ]
    return torch.stack(losses).mean()


def _in_halves(
    policy: Tensor, reference: Tensor, ids: Tensor, mask: Tensor, beta: float
) -> Tensor:
    half = len(ids) // 2
    order = torch.arange(len(ids)).view(2, half).T.flatten()
    return _batch_loss(policy[order], reference[order], ids[order], mask[order], beta)


def _beta_on_one_half(
    policy: Tensor, reference: Tensor, ids: Tensor, mask: Tensor, beta: float
) -> Tensor:
    ours, theirs = (_text_log_prob(x, ids, mask) for x in (policy, reference))
    return _loss_of_scores(beta * ours, theirs, 1.0)


def _scored_by(
    score: Callable[[Tensor, Tensor, Tensor], Tensor],
) -> Callable[..., Tensor]:
    def loss(
        policy: Tensor, reference: Tensor, ids: Tensor, mask: Tensor, beta: float
    ) -> Tensor:
        return _loss_of_scores(
            score(policy, ids, mask), score(reference, ids, mask), beta
        )

    return loss


def _the_colleague(
    policy: Tensor, reference: Tensor, ids: Tensor, mask: Tensor, beta: float
) -> Tensor:
    """Return what the version with four bugs does, as the chapter prints it."""
    ours, theirs = (
        (x.log_softmax(-1).gather(-1, ids[..., None])[..., 0] * mask).mean(1)
        for x in (policy, reference)
    )
    half = len(ours) // 2
    margin = beta * (ours[:half] - ours[half:]) - (theirs[:half] - theirs[half:])
    return -margin.sigmoid().log().mean()


def _batch_case(
    seed: int, prompts: list[int], lengths: list[int], beta: float
) -> dict[str, Any]:
    """Make logits of two models; the texts of a pair share the prompt's length."""
    case = _logits_case(seed, prompts, lengths)
    return {
        "policy": case["logits"],
        "reference": _logits_case(seed + 100, prompts, lengths)["logits"],
        "ids": case["ids"],
        "mask": case["mask"],
        "beta": beta,
    }


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
        name="dpo.changes",
        reference=_changes,
        cases=(_texts_case(5, 3, 1.0), _texts_case(6, 5, 0.3), _texts_case(7, 4, 5.0)),
        mistakes={
            "A pair can be drawn in two orders: your weights add up to one "
            "half": _changes_of_one_order,
            "You draw the pairs from the optimum; they are samples of the "
            "reference": _changes_of_own_samples,
            "Chosen and rejected are not alike: the label weighs the "
            "pairs": _changes_without_labels,
            "Chosen and rejected are exchanged": (
                lambda reference, reward, beta: _changes(reference, reward, beta)[::-1]
            ),
        },
    ),
    Exercise(
        name="dpo.step",
        reference=_batch_loss,
        cases=(
            _batch_case(10, [2, 2], [3, 2], 0.5),
            _batch_case(11, [1, 1, 3, 3], [4, 2, 1, 3], 0.1),
        ),
        gradient="policy",
        constants=("reference",),
        mistakes={
            "All four bugs are still there": _the_colleague,
            "Not shifted: the logits at position t say what comes at t + 1": _scored_by(
                _not_shifted
            ),
            "That is a mean over the tokens of the completion; the log-probability of "
            "a text is their sum": _scored_by(_mean_of_tokens),
            "That is a mean over all positions; the log-probability of a text is the "
            "sum over its tokens": _scored_by(
                lambda logits, ids, mask: (
                    _text_log_prob(logits, ids, mask) / ids.shape[1]
                )
            ),
            "The rows are chosen, rejected, chosen, …; you take them in "
            "halves": _in_halves,
            "The factor beta multiplies one half of the margin only": _beta_on_one_half,
            "The reference is missing": (
                lambda policy, reference, ids, mask, beta: _batch_loss(
                    policy, torch.zeros_like(reference), ids, mask, beta
                )
            ),
        },
    ),
)
