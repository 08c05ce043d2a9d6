"""Exercises of the chapter on reinforcement learning from human feedback."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from policyopt_book.exercises import Exercise

__all__ = ["EXERCISES"]


def _shaped_rewards(
    scores: Tensor,
    log_prob: Tensor,
    reference_log_prob: Tensor,
    mask: Tensor,
    beta: float,
) -> Tensor:
    rewards = torch.zeros_like(log_prob)
    for i in range(len(scores)):
        length = int(mask[i].sum())
        for t in range(length):
            rewards[i, t] = -beta * (log_prob[i, t] - reference_log_prob[i, t])
        rewards[i, length - 1] += scores[i]
    return rewards


def _paid_for_distance(
    s: Tensor, p: Tensor, q: Tensor, mask: Tensor, beta: float
) -> Tensor:
    return _shaped_rewards(s, q, p, mask, beta)


def _paid_in_the_last_column(
    s: Tensor, p: Tensor, q: Tensor, mask: Tensor, beta: float
) -> Tensor:
    rewards = _shaped_rewards(torch.zeros_like(s), p, q, mask, beta)
    rewards[:, -1] += s
    return rewards


def _paid_at_every_token(
    s: Tensor, p: Tensor, q: Tensor, mask: Tensor, beta: float
) -> Tensor:
    return _shaped_rewards(torch.zeros_like(s), p, q, mask, beta) + s[:, None] * mask


def _charged_for_padding(
    s: Tensor, p: Tensor, q: Tensor, mask: Tensor, beta: float
) -> Tensor:
    return torch.where(mask, _shaped_rewards(s, p, q, mask, beta), -beta * (p - q))


def _padded_case() -> dict[str, Any]:
    generator = torch.Generator().manual_seed(0)
    log_prob, reference = -2 * torch.rand(
        2, 3, 4, generator=generator, dtype=torch.float64
    )
    mask = torch.tensor(
        [[True] * 4, [True, True, False, False], [True, False, False, False]]
    )
    return {
        "scores": torch.tensor([1.5, -2.0, 3.0], dtype=torch.float64),
        "log_prob": torch.where(mask, log_prob, 7.0),  # anything after the end
        "reference_log_prob": torch.where(mask, reference, -3.0),
        "mask": mask,
        "beta": 0.3,
    }


def _preference_loss(chosen: Tensor, rejected: Tensor) -> Tensor:
    """Return the negative logarithm of e^w / (e^w + e^l)."""
    return torch.logaddexp(chosen, rejected) - chosen


def _pair_case(chosen: list[float], rejected: list[float]) -> dict[str, Any]:
    return {"chosen": torch.tensor(chosen), "rejected": torch.tensor(rejected)}


def _expected_agreement(first: Tensor, second: Tensor, temperature: float) -> float:
    """Go through both answers that the annotator may give to each pair."""
    agreements = []
    for u, v in zip(
        (first / temperature).tolist(), (second / temperature).tolist(), strict=True
    ):
        prefers_first = math.exp(u) / (math.exp(u) + math.exp(v))
        judge_says_first = 0.5 if u == v else float(u > v)
        agreements.append(
            judge_says_first * prefers_first
            + (1 - judge_says_first) * (1 - prefers_first)
        )
    return sum(agreements) / len(agreements)


def _utility_case(
    first: list[float], second: list[float], temperature: float
) -> dict[str, Any]:
    return {
        "first": torch.tensor(first, dtype=torch.float64),
        "second": torch.tensor(second, dtype=torch.float64),
        "temperature": temperature,
    }


def _best_of_n(p: Tensor, scores: Tensor, n: int) -> tuple[Tensor, float]:
    """Draw one text after the other, and keep the best so far."""
    texts = range(len(p))
    best = [float(q) for q in p]
    for _ in range(n - 1):
        after = [0.0 for _ in texts]
        for old in texts:
            for new in texts:
                winner = new if scores[new] > scores[old] else old
                after[winner] += best[old] * float(p[new])
        best = after
    # A text that is never chosen adds 0: x log x goes to 0 with x.
    kl = sum(b * math.log(b / float(q)) for b, q in zip(best, p, strict=True) if b > 0)
    return torch.tensor(best, dtype=p.dtype), kl


def _in_order_of_score(p: Tensor, scores: Tensor, n: int) -> tuple[Tensor, float]:
    order = scores.argsort()
    chosen, kl = _best_of_n(p, scores, n)
    return chosen[order], kl


def _divergence_reversed(p: Tensor, scores: Tensor, n: int) -> tuple[Tensor, float]:
    chosen, _ = _best_of_n(p, scores, n)
    return chosen, float((p * (p / chosen).log()).sum())


def _zero_times_infinity(p: Tensor, scores: Tensor, n: int) -> tuple[Tensor, float]:
    chosen, _ = _best_of_n(p, scores, n)
    return chosen, float((chosen * (chosen / p).log()).sum())


def _worst_of_n(p: Tensor, scores: Tensor, n: int) -> tuple[Tensor, float]:
    return _best_of_n(p, -scores, n)


def _texts_case(seed: int, texts: int, n: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    p = torch.randn(texts, generator=generator, dtype=torch.float64).softmax(0)
    return {
        "p": p,
        "scores": torch.randn(texts, generator=generator, dtype=torch.float64),
        "n": n,
    }


def _rare_case() -> dict[str, Any]:
    """Return a case in which the worst of 100 has a probability that rounds to 0."""
    return {
        "p": torch.tensor([2e-4, 0.5, 0.3, 0.1998], dtype=torch.float64),
        "scores": torch.tensor([-2.0, 1.0, 0.5, -1.0], dtype=torch.float64),
        "n": 100,
    }


def _filtered_log_prob(
    logits: Tensor, tokens: Tensor, temperature: float, top_k: int
) -> Tensor:
    found = []
    for row, token in zip(logits.tolist(), tokens.tolist(), strict=True):
        kept = sorted(range(len(row)), key=lambda v: -row[v])[:top_k]
        mass = sum(math.exp(row[v] / temperature) for v in kept)
        found.append(
            math.log(math.exp(row[token] / temperature) / mass)
            if token in kept
            else -math.inf
        )
    return torch.tensor(found, dtype=logits.dtype)


def _cut_but_not_renormalised(
    logits: Tensor, tokens: Tensor, temperature: float, top_k: int
) -> Tensor:
    everything = _filtered_log_prob(logits, tokens, temperature, logits.shape[-1])
    return torch.where(
        _filtered_log_prob(logits, tokens, 1.0, top_k).isinf(), -math.inf, everything
    )


def _tempered_too_late(
    logits: Tensor, tokens: Tensor, temperature: float, top_k: int
) -> Tensor:
    return _filtered_log_prob(logits, tokens, 1.0, top_k) / temperature


def _logits_case(
    seed: int, tokens: list[int], temperature: float, top_k: int
) -> dict[str, Any]:
    logits = torch.randn(
        len(tokens),
        6,
        generator=torch.Generator().manual_seed(seed),
        dtype=torch.float64,
    )
    ranked = logits.argsort(-1, descending=True)
    return {
        "logits": logits,
        "tokens": ranked[
            torch.arange(len(tokens)), torch.tensor(tokens)
        ],  # given by their rank
        "temperature": temperature,
        "top_k": top_k,
    }


def _rlhf_loss(
    log_prob: Tensor,
    old: Tensor,
    reference: Tensor,
    scores: Tensor,
    mask: Tensor,
    beta: float,
    eps: float,
    *,
    signed: float = -1.0,
    last_column: bool = False,
    whole_return: bool = False,
    over_padding: bool = False,
    per_completion: bool = False,
    clips: bool = True,
    pessimistic: bool = True,
    moving: bool = False,
) -> Tensor:
    """Go through the tokens one by one; the options are mistakes."""
    count, width = log_prob.shape
    lengths = [int(n) for n in mask.sum(1)]
    to_go = torch.zeros_like(log_prob)
    now = log_prob if moving else old.detach()
    for i, length in enumerate(lengths):
        following = torch.zeros((), dtype=log_prob.dtype)
        for t in reversed(range(length)):
            reward = signed * beta * (now[i, t] - reference[i, t])
            if t == (width if last_column else length) - 1:
                reward = reward + scores[i]
            following = reward + following
            to_go[i, t] = following
        if whole_return:
            to_go[i, :length] = to_go[i, 0].clone()
    known = to_go.flatten() if over_padding else to_go[mask]
    shift, scale = known.mean(), known.std(correction=0)
    total = torch.zeros((), dtype=log_prob.dtype)
    for i, length in enumerate(lengths):
        for t in range(length):
            advantage = (to_go[i, t] - shift) / scale
            ratio = (log_prob[i, t] - old[i, t].detach()).exp()
            term = ratio * advantage
            if clips:
                clipped = ratio.clamp(1 - eps, 1 + eps) * advantage
                term = torch.minimum(term, clipped) if pessimistic else clipped
            share = count * length if per_completion else sum(lengths)
            total = total - term / share
    return total


def _loop_case(seed: int, beta: float, moved: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    old, reference, change = torch.randn(
        3, 3, 4, generator=generator, dtype=torch.float64
    )
    mask = torch.tensor(
        [[True] * 4, [True, True, True, False], [True, False, False, False]]
    )
    return {
        "log_prob": torch.where(mask, old - 2 + moved * change, 0.0),
        "old": torch.where(mask, old - 2, 0.0),
        "reference": torch.where(mask, reference - 2, 0.0),
        "scores": torch.randn(3, generator=generator, dtype=torch.float64),
        "mask": mask,
        "beta": beta,
        "eps": 0.2,
    }


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="rlhf.token-rewards",
        reference=_shaped_rewards,
        cases=(
            {
                "scores": torch.tensor([2.0]),
                "log_prob": torch.tensor([[0.5, -0.2, 0.1]]) - 1,
                "reference_log_prob": torch.full((1, 3), -1.0),
                "mask": torch.ones(1, 3, dtype=torch.bool),
                "beta": 0.5,
            },
            _padded_case(),
            _padded_case() | {"beta": 0.0},
        ),
        mistakes={
            "The sign of the KL is reversed: the policy is paid for every nat of "
            "distance": (_paid_for_distance),
            "The score is in the last column of the batch, not at the last token "
            "of each completion": (_paid_in_the_last_column),
            "Every token gets the score; only the last one should, or long texts are "
            "paid several times": (_paid_at_every_token),
            "Padding is charged as well: after the end the "
            "reward must be 0": _charged_for_padding,
            "The factor beta is missing: the log-ratio is charged in full": (
                lambda s, p, q, mask, beta: _shaped_rewards(s, p, q, mask, 1.0)
            ),
        },
    ),
    Exercise(
        name="rlhf.preference-loss",
        reference=_preference_loss,
        cases=(
            _pair_case([2.0, 0.0, 1.0], [0.0, 2.0, 1.0]),
            _pair_case([-0.3, 5.0], [0.4, -1.0]),
            _pair_case([-100.0, 100.0], [100.0, -100.0]),
        ),
        gradient=("chosen", "rejected"),
        mistakes={
            "You ask for the rejected text to win: the margin has the wrong sign": (
                lambda chosen, rejected: _preference_loss(rejected, chosen)
            ),
            "That is the log-likelihood; a loss is its negative": (
                lambda chosen, rejected: -_preference_loss(chosen, rejected)
            ),
            "The logarithm is missing: a pair that is ordered badly wrong would "
            "teach nothing": (
                lambda chosen, rejected: -torch.sigmoid(chosen - rejected)
            ),
            "The sigmoid rounds to 0 before its logarithm is taken; compute both in "
            "one piece": (
                lambda chosen, rejected: -torch.log(torch.sigmoid(chosen - rejected))
            ),
            "No gradient arrives at the scores: something detaches them": (
                lambda chosen, rejected: _preference_loss(
                    chosen.detach(), rejected.detach()
                )
            ),
            "The chosen score is detached: it would never rise": (
                lambda chosen, rejected: _preference_loss(chosen.detach(), rejected)
            ),
            "The rejected score is detached: it would never fall": (
                lambda chosen, rejected: _preference_loss(chosen, rejected.detach())
            ),
            "That is the mean; return one loss per pair": (
                lambda chosen, rejected: -logsigmoid(chosen - rejected).mean()
            ),
        },
    ),
    Exercise(
        name="rlhf.noise-ceiling",
        reference=_expected_agreement,
        cases=(
            _utility_case([0.2, 0.0], [0.0, 3.0], 1.0),
            _utility_case([1.0, -1.0, 2.0], [1.0, 0.5, -2.0], 2.0),
            _utility_case([0.5], [0.0], 0.1),
        ),
        mistakes={
            "The sign of the difference must not matter: the judge knows which of "
            "the two is better": (
                lambda first, second, temperature: torch.sigmoid(
                    (first - second) / temperature
                ).mean()
            ),
            "You take the mean before the sigmoid; the ceiling is the mean of the "
            "probabilities": (
                lambda first, second, temperature: torch.sigmoid(
                    (first - second).abs().mean() / temperature
                )
            ),
            "The temperature is missing: the hotter the annotator, the lower the "
            "ceiling": (
                lambda first, second, temperature: _expected_agreement(
                    first, second, 1.0
                )
            ),
            "The temperature divides the utilities; you multiply": (
                lambda first, second, temperature: _expected_agreement(
                    first, second, 1 / temperature
                )
            ),
        },
    ),
    Exercise(
        name="rlhf.best-of-n",
        reference=_best_of_n,
        cases=(
            _texts_case(0, 4, 3),
            _texts_case(1, 3, 6),
            _texts_case(2, 5, 1),
            _rare_case(),
        ),
        mistakes={
            "The probabilities are in the order of the scores; put them back in the "
            "order of the texts": (_in_order_of_score),
            "The distribution is right, but the divergence "
            "is that of p from it": _divergence_reversed,
            "That is the worst of n: F must count the texts with a lower "
            "score": _worst_of_n,
            "0 times the logarithm of 0 is nan in floating point; a text that is "
            "never the best of n adds 0 (torch.xlogy knows)": _zero_times_infinity,
        },
    ),
    Exercise(
        name="rlhf.filtered-scorer",
        reference=_filtered_log_prob,
        cases=(
            _logits_case(0, [0, 1, 2], 1.0, 3),
            _logits_case(
                1, [1, 0, 3], 0.5, 2
            ),  # the sampler cannot have drawn the last one
            _logits_case(2, [4, 5], 2.0, 6),
        ),
        mistakes={
            "The filter is missing: the sampler divides by the probability that was "
            "kept": (
                lambda logits, tokens, temperature, top_k: _filtered_log_prob(
                    logits, tokens, temperature, logits.shape[-1]
                )
            ),
            "What is left does not sum to 1: divide by the probability that was kept": (
                _cut_but_not_renormalised
            ),
            "The temperature is missing": (
                lambda logits, tokens, temperature, top_k: _filtered_log_prob(
                    logits, tokens, 1.0, top_k
                )
            ),
            "The temperature divides the logits, before the softmax, not the "
            "log-probabilities": (_tempered_too_late),
        },
    ),
    Exercise(
        name="rlhf.loop",
        reference=_rlhf_loss,
        cases=(
            _loop_case(0, 0.3, 0.3),
            _loop_case(1, 0.1, 0.5),
            _loop_case(2, 0.5, 0.0),
        ),
        gradient="log_prob",
        constants=("old", "reference", "scores"),
        mistakes={
            "The sign of the KL is reversed: the policy is paid for distance": (
                partial(_rlhf_loss, signed=1.0)
            ),
            "The score is in the last column: shorter completions never get it": (
                partial(_rlhf_loss, last_column=True)
            ),
            "Every token gets the whole return; what came before a token is no "
            "consequence of it": partial(_rlhf_loss, whole_return=True),
            "The mean and the deviation count the padding": (
                partial(_rlhf_loss, over_padding=True)
            ),
            "That is a mean over completions of their means; divide by the number of "
            "tokens of the batch": partial(_rlhf_loss, per_completion=True),
            "The clip is missing": partial(_rlhf_loss, clips=False),
            "The minimum is missing: a ratio that is clipped where it does harm could "
            "not come back": partial(_rlhf_loss, pessimistic=False),
            "The reward is computed from log_prob, and the gradient flows through it; "
            "use old": partial(_rlhf_loss, moving=True),
        },
    ),
)
