"""The loss sheet says what the code does: each printed formula is computed here again, from its definition alone.

A row is its two formulas, word for word as the page prints them, and a check that computes both with plain tensor
arithmetic and compares them with the package: the values with the function's, the weight with autograd's.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from policyopt import losses
from policyopt.distributions import Categorical
from policyopt.estimators import (
    best_of_group,
    gae,
    group_relative_advantages,
    importance_weights,
    kl_estimate,
    kl_shaped_rewards,
    leave_one_out_advantages,
    pass_at_k_advantages,
    sequence_log_prob,
)
from policyopt.lm.grpo import GRPOConfig, group_advantages
from policyopt.losses import (
    aggregate,
    bradley_terry_loss,
    cispo_loss,
    clipped_surrogate_loss,
    dpo_loss,
    kto_loss,
    orpo_loss,
    policy_gradient_loss,
    ranking_loss,
    sequence_log_ratio,
    surrogate_loss,
    value_loss,
)

ROOT = Path(__file__).parents[2]
BOOK = ROOT / "book"
PAGE = (BOOK / "loss-sheet.md").read_text(encoding="utf-8")
TESTS = {
    name: ROOT / path
    for name, path in re.findall(r"(?m)^\[(\w+)\]: https://\S+/blob/main/(tests/[\w/]+\.py)$", PAGE)
}


@dataclass(frozen=True)
class Row:
    """A line of one of the sheet's tables of objectives."""

    objective: str
    chapter: str
    loss: str
    weight: str
    denominator: str
    functions: str
    checked_by: str


def table_lines() -> list[list[str]]:
    """Return the cells of each line of each table, headers left out."""
    lines = [line for line in PAGE.splitlines() if line.startswith("| [")]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def rows() -> dict[str, Row]:
    found = {}
    for cells in table_lines():
        if len(cells) == 6:
            match = re.fullmatch(r"\[([^]]+)\]\(([\w-]+)\.ipynb\)", cells[0])
            assert match is not None, cells[0]
            assert match[1] not in found
            found[match[1]] = Row(match[1], match[2], *cells[1:])
    return found


# --- arithmetic to compare with ------------------------------------------------------------------------------


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def sigma(z: Tensor) -> Tensor:
    return 1 / (1 + torch.exp(-z))


def same(found: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(found.detach(), expected.detach())


def pull(loss: Tensor, on: Tensor) -> Tensor:
    """−∂(sum of the losses)/∂(log-probability): the weight, with the denominator 1."""
    return -torch.autograd.grad(loss.sum(), on, retain_graph=True)[0]


def edges(ratio: Tensor, advantage: Tensor, low: float, high: float) -> tuple[Tensor, Tensor]:
    """The clipped loss and whether the way is open, by cases."""
    values, is_open = [], []
    for r, a in zip(ratio.flatten().tolist(), advantage.flatten().tolist(), strict=True):
        values.append(-min(r * a, min(max(r, 1 - low), 1 + high) * a))
        is_open.append(not ((a > 0 and r > 1 + high) or (a < 0 and r < 1 - low)))
    shape = ratio.shape
    return torch.tensor(values, dtype=torch.float64).view(shape), torch.tensor(is_open).view(shape).double()


# --- checks, one per row -------------------------------------------------------------------------------------


def reinforce(baseline: bool) -> None:
    returns, b, log_prob = normal(0, 7), normal(1, 7) * baseline, normal(2, 7).requires_grad_()
    out = policy_gradient_loss(log_prob, returns - b)
    same(out, -(returns - b) * log_prob)
    same(pull(out, log_prob), returns - b)
    # The denominator: with the mean over D items the weight is that of the sheet over D.
    same(7 * pull(aggregate(out), log_prob), returns - b)


def actor_critic() -> None:
    gamma, lam, steps = 0.9, 0.8, 6
    rewards, values, next_values = (normal(i, steps) for i in range(3))
    never = torch.zeros(steps, dtype=torch.bool)
    delta = rewards + gamma * next_values - values
    advantage = torch.stack(
        [sum((gamma * lam) ** k * delta[t + k] for k in range(steps - t)) for t in range(steps)]  # type: ignore[misc]
    )
    estimated = gae(rewards, values, next_values, never, never, gamma=gamma, gae_lambda=lam)
    # γλ is rounded to single precision on its way.
    torch.testing.assert_close(estimated, advantage, rtol=1e-6, atol=1e-6)
    log_prob = normal(3, steps).requires_grad_()
    out = policy_gradient_loss(log_prob, advantage)
    same(out, -advantage * log_prob)
    same(pull(out, log_prob), advantage)


def trpo() -> None:
    log_prob, old, advantage = normal(0, 9).requires_grad_(), normal(1, 9), normal(2, 9)
    out = surrogate_loss(log_prob, old, advantage).loss
    ratio = (log_prob - old).exp()
    same(out, -ratio * advantage)
    same(pull(out, log_prob), ratio * advantage)


def clip(high: float | None = None, advantages: Callable[[], Tensor] = lambda: normal(2, 10, 8)) -> None:
    advantage = advantages()
    log_prob, old = 0.4 * normal(0, 10, 8), 0.4 * normal(1, 10, 8)
    log_prob.requires_grad_()
    out = clipped_surrogate_loss(log_prob, old, advantage, clip_ratio=0.2, clip_ratio_high=high).loss
    ratio = (log_prob - old).exp()
    expected, is_open = edges(ratio, advantage, 0.2, high or 0.2)
    assert 0.1 < is_open.mean() < 0.9
    same(out, expected)
    same(pull(out, log_prob), ratio * advantage * is_open)


def value(clipped: bool) -> None:
    values, target, old, c = normal(0, 60).requires_grad_(), normal(1, 60), normal(2, 60), 0.5
    out = value_loss(values, target, old, clip=c if clipped else None).loss
    plain = (values - target) ** 2
    near = (old + (values - old).clamp(-c, c) - target) ** 2
    off = ((values - old).abs() > c) & (near > plain) if clipped else torch.zeros(60, dtype=torch.bool)
    assert off.any() == clipped
    same(out, 0.5 * torch.maximum(plain, near) if clipped else 0.5 * plain)
    same(pull(out, values), torch.where(off, 0.0, target - values))


def entropy() -> None:
    logits = normal(0, 5, 4).requires_grad_()
    log_prob = logits.log_softmax(-1)
    prob = log_prob.exp().detach()
    out = -Categorical.from_logits(logits).entropy()
    same(out, (prob * log_prob).sum(-1))
    # The mean of w ∇ log π over a ~ π, with w = −log π.
    weighted = (prob * -log_prob.detach() * log_prob).sum()
    same(pull(out, logits), torch.autograd.grad(weighted, logits)[0])


def sft() -> None:
    log_prob, mask = (
        normal(0, 3, 4).requires_grad_(),
        torch.tensor([[1, 1, 1, 0], [1, 0, 0, 0], [1, 1, 1, 1]]),
    )
    # As train_sft has it.
    same(pull(aggregate(-log_prob, mask, denominator=8), log_prob), mask.double() / 8)


def bradley_terry() -> None:
    c, chosen, rejected = 0.3, normal(0, 6).requires_grad_(), normal(1, 6).requires_grad_()
    out = bradley_terry_loss(chosen, rejected, centering=c).loss
    same(out, -torch.log(sigma(chosen - rejected)) + c * (chosen + rejected) ** 2)
    same(pull(out, chosen), sigma(rejected - chosen) - 2 * c * (chosen + rejected))
    same(pull(out, rejected), -sigma(rejected - chosen) - 2 * c * (chosen + rejected))


def shaped() -> None:
    beta, score, old, reference = 0.7, normal(0, 2), normal(1, 2, 3), normal(2, 2, 3)
    mask = torch.tensor([[True, True, True], [True, True, False]])
    expected = -beta * (old - reference)
    expected[1, 2] = 0
    expected[0, 2] += score[0]
    expected[1, 1] += score[1]
    same(kl_shaped_rewards(score, old, reference, mask, beta=beta), expected)


def preferences(
    loss: Callable[[Tensor], Tensor],
    weight: Callable[[Tensor], Tensor],
    *,
    beta: float = 0.7,
    normalised: bool = False,
    reference: bool = True,
    **options: Any,
) -> None:
    """Compare losses and weights of pairs whose completions have 3 and 5 tokens; m is the sheet's margin."""
    tokens = [normal(i, 8, size).requires_grad_() for i, size in enumerate((3, 5))]
    fixed = [reference * normal(i + 2, 8, size) for i, size in enumerate((3, 5))]
    score = [x.mean(-1) if normalised else x.sum(-1) for x in (*tokens, *fixed)]
    reduction = "mean" if normalised else "sum"
    given = [
        sequence_log_prob(x, torch.ones_like(x, dtype=torch.bool), reduction=reduction)  # type: ignore[arg-type]
        for x in (*tokens, *fixed)
    ]
    out = dpo_loss(*(given if reference else given[:2]), beta=beta, **options).loss
    m = beta * ((score[0] - score[2]) - (score[1] - score[3]))
    same(out, loss(m))
    for sign, x in ((1, tokens[0]), (-1, tokens[1])):
        length = x.shape[1] if normalised else 1
        same(pull(out, x), (sign * weight(m) / length)[:, None].expand_as(x))
    same(8 * pull(aggregate(out), tokens[0])[:, 0], pull(out, tokens[0])[:, 0])


def smoothed(m: Tensor, e: float = 0.2) -> Tensor:
    return -(1 - e) * torch.log(sigma(m)) - e * torch.log(sigma(-m))


def held_up(kind: str) -> None:
    """The rows whose weights of the two completions differ."""
    beta, c = 0.7, 0.4
    lengths = torch.tensor([3.0, 5, 2, 4, 6, 1], dtype=torch.float64)
    w, v = normal(0, 6).requires_grad_(), normal(1, 6).requires_grad_()
    ref_w, ref_l = normal(2, 6), normal(3, 6)
    m = beta * ((w - ref_w) - (v - ref_l))
    if kind == "nll":
        out = dpo_loss(w, v, ref_w, ref_l, beta=beta, nll_weight=c, chosen_tokens=lengths).loss
        same(out, -torch.log(sigma(m)) - c * w / lengths)
        same(pull(out, w), beta * sigma(-m) + c / lengths)
        same(pull(out, v), -beta * sigma(-m))
    elif kind == "dpop":
        out = dpo_loss(w, v, ref_w, ref_l, beta=beta, dpop_weight=c).loss
        x = m - beta * c * (ref_w - w).clamp(min=0)
        same(out, -torch.log(sigma(x)))
        same(pull(out, w), beta * sigma(-x) * (1 + c * (w < ref_w)))
        same(pull(out, v), -beta * sigma(-x))
    else:  # a mean log-probability is what is given: the sheet's weight is |y| times that of a token
        w, v = (-x.detach().abs().add(0.1).requires_grad_() for x in (w, v))
        out = orpo_loss(w, v, weight=c).loss
        p_w, p_l = w.exp(), v.exp()
        o = torch.log(p_w / (1 - p_w)) - torch.log(p_l / (1 - p_l))
        same(out, -w - c * torch.log(sigma(o)))
        same(pull(out, w), 1 + c * sigma(-o) / (1 - p_w))
        same(pull(out, v), -c * sigma(-o) / (1 - p_l))


def kto() -> None:
    beta, up, down = 0.7, 1.5, 0.5
    log_prob, reference, others = normal(0, 6).requires_grad_(), normal(1, 6), normal(2, 4).abs()
    good = normal(3, 6) > 0
    out = kto_loss(
        log_prob, reference, good, others, beta=beta, desirable_weight=up, undesirable_weight=down
    ).loss
    z = beta * (log_prob - reference - others.mean())
    same(out, torch.where(good, up * sigma(-z), down * sigma(z)))
    same(
        pull(out, log_prob),
        torch.where(good, 1, -1) * torch.where(good, up, down) * beta * sigma(z) * sigma(-z),
    )


def ranking() -> None:
    beta, k, scores = 0.7, 5, normal(0, 5).requires_grad_()
    out = ranking_loss(scores, beta=beta).loss
    m = beta * (scores[:, None] - scores[None, :])
    pairs = [(i, j) for i in range(k) for j in range(i + 1, k)]
    same(out, torch.stack([-torch.log(sigma(m[i, j])) for i, j in pairs]))
    expected = [
        beta * (sum(sigma(-m[i, j]) for j in range(i + 1, k)) - sum(sigma(-m[j, i]) for j in range(i)))
        for i in range(k)
    ]
    same(pull(out, scores), torch.stack(expected))
    assert len(out) == k * (k - 1) / 2


MASK = torch.tensor([[True] * 8, [True] * 3 + [False] * 5, [True] * 6 + [False] * 2] * 3 + [[True] * 8])
REWARDS = normal(5, 2, 5)


def per_group(kind: str) -> Tensor:
    """Advantages of ten completions in two groups, by loops."""
    found = []
    for group in REWARDS.tolist():
        mean = sum(group) / 5
        std = (sum((r - mean) ** 2 for r in group) / 4) ** 0.5
        for r in group:
            others = (sum(group) - r) / 4
            found.append({"grpo": (r - mean) / (std + 1e-4), "dr": r - mean, "rloo": r - others}[kind])
    return torch.tensor(found, dtype=torch.float64)


def group(kind: str) -> None:
    package = {
        "grpo": partial(group_relative_advantages),
        "dr": partial(group_relative_advantages, scale=False),
        "rloo": leave_one_out_advantages,
    }[kind](REWARDS).flatten()
    same(package, per_group(kind))
    clip(0.28 if kind == "grpo" else None, advantages=lambda: package[:, None].expand(10, 8))


def grpo() -> None:
    beta, advantage = 0.3, group_relative_advantages(REWARDS).flatten()[:, None].expand(10, 8)
    same(advantage[:, 0], per_group("grpo"))
    log_prob, old, reference = (0.4 * normal(i, 10, 8) for i in range(3))
    log_prob.requires_grad_()
    # As train_grpo adds them up.
    out = clipped_surrogate_loss(log_prob, old, advantage).loss + beta * kl_estimate(
        log_prob, reference, "k3"
    )
    ratio = (log_prob - old).exp()
    first, is_open = edges(ratio, advantage, 0.2, 0.2)
    kl = (reference - log_prob).exp() - 1 - (reference - log_prob)
    weight = ratio * advantage * is_open + beta * ((reference - log_prob).exp() - 1)
    same(out, first + beta * kl)
    same(pull(out, log_prob), weight)
    lengths = MASK.sum(-1, keepdim=True)
    found = pull(aggregate(out, MASK, reduction="sequence-mean"), log_prob)
    same(found, torch.where(MASK, weight / (lengths * 10), 0.0))
    same(pull(aggregate(out, MASK), log_prob), torch.where(MASK, weight / lengths.sum(), 0.0))
    same(pull(aggregate(out, MASK, denominator=10 * 8), log_prob), torch.where(MASK, weight / 80, 0.0))


def gspo() -> None:
    log_prob, old = 0.4 * normal(0, 10, 8), 0.4 * normal(1, 10, 8)
    advantage = group_relative_advantages(REWARDS).flatten()[:, None].expand(10, 8)
    log_prob.requires_grad_()
    log_ratio = sequence_log_ratio(log_prob, old, MASK)
    out = clipped_surrogate_loss(log_ratio, torch.zeros_like(log_ratio), advantage, clip_ratio=0.1).loss
    lengths = MASK.sum(-1, keepdim=True)
    ratio = (torch.where(MASK, log_prob - old, 0.0).sum(-1, keepdim=True) / lengths).exp().expand(10, 8)
    expected, is_open = edges(ratio, advantage, 0.1, 0.1)
    assert 0 < is_open.mean() < 1
    same(out[MASK], expected[MASK])
    found = pull(aggregate(out, MASK, reduction="sequence-mean"), log_prob)
    same(found, torch.where(MASK, ratio * advantage * is_open / (lengths * 10), 0.0))


def cispo() -> None:
    log_prob, old = normal(0, 10, 8), normal(1, 10, 8)
    advantage = group_relative_advantages(REWARDS).flatten()[:, None].expand(10, 8)
    log_prob.requires_grad_()
    out = cispo_loss(log_prob, old, advantage, clip_ratio=0.4, clip_ratio_high=0.9).loss
    ratios = (log_prob - old).exp().flatten().tolist()
    capped = torch.tensor([min(max(x, 1 - 0.4), 1 + 0.9) for x in ratios], dtype=torch.float64).view(10, 8)
    same(out, -capped * advantage * log_prob)
    same(pull(out, log_prob), capped * advantage)


def reinforce_plus_plus() -> None:
    flat = REWARDS.flatten().tolist()
    mean = sum(flat) / 10
    std = (sum((r - mean) ** 2 for r in flat) / 10) ** 0.5
    expected = torch.tensor([(r - mean) / (std + 1e-8) for r in flat], dtype=torch.float64)
    found = group_advantages(REWARDS, GRPOConfig(baseline="batch")).flatten()
    same(found, expected)
    clip(None, advantages=lambda: found[:, None].expand(10, 8))


def pass_at_k() -> None:
    k = 3
    expected = []
    for row in REWARDS.tolist():
        for i, r in enumerate(row):
            others = row[:i] + row[i + 1 :]
            best = [[max(s) for s in itertools.combinations(others, size)] for size in (k - 1, k)]
            with_i = sum(max(r, x) for x in best[0]) / len(best[0])
            expected.append(k * (with_i - sum(best[1]) / len(best[1])))
    found = pass_at_k_advantages(REWARDS, k=k).flatten()
    same(found, torch.tensor(expected, dtype=torch.float64))
    clip(None, advantages=lambda: found[:, None].expand(10, 8))


def best_of_n() -> None:
    expected = [[float(row.index(max(row)) == i) for i in range(len(row))] for row in REWARDS.tolist()]
    found = best_of_group(REWARDS).flatten()
    same(found, torch.tensor(expected, dtype=torch.float64).flatten())
    log_prob, advantage = normal(0, 10, 8).requires_grad_(), found[:, None].expand(10, 8)
    same(pull(clipped_surrogate_loss(log_prob, log_prob.detach(), advantage).loss, log_prob), advantage)


def correction() -> None:
    log_prob, old, sampler, advantage = (0.5 * normal(i, 30) for i in range(4))
    log_prob.requires_grad_()
    loss = surrogate_loss(log_prob, old, advantage).loss
    c = torch.tensor([min(x, 1.2) for x in (old - sampler).exp().tolist()], dtype=torch.float64)
    assert 0 < (c == 1.2).double().mean() < 1
    out = loss * importance_weights(old, sampler, cap=1.2)
    same(out, c * loss)
    same(pull(out, log_prob), c * pull(loss, log_prob))


CLIP = r"$-\min\bigl(\rho_t {A},\ \operatorname{clip}(\rho_t, 1-\epsilon, 1+{e})\, {A}\bigr)"
OPEN = r"$\rho_t {A}\, \mathbb 1_{\text{open}}"
STEP, COMPLETION = r"\hat A_t", "A_i"


def clipped(advantage: str, rest: str = "$", high: str = r"\epsilon") -> str:
    return CLIP.replace("{A}", advantage).replace("{e}", high) + rest


def opened(advantage: str, rest: str = "$") -> str:
    return OPEN.replace("{A}", advantage) + rest


# Objective: (loss as printed, weight as printed, check of both). The formulas are here a second time so that nobody
# changes the page without looking at the check.
CHECKS: dict[str, tuple[str, str, Callable[[], None] | None]] = {
    "REINFORCE": (r"$-G_t\,\ell_t$", "$G_t$", lambda: reinforce(False)),
    "REINFORCE with a baseline": (r"$-(G_t - b_t)\,\ell_t$", "$G_t - b_t$", lambda: reinforce(True)),
    "Actor-critic with GAE": (
        r"$-\hat A_t\,\ell_t$",
        r"$\hat A_t = \sum_{k \ge 0} (\gamma\lambda)^k \delta_{t+k}$",
        actor_critic,
    ),
    "TRPO, surrogate": (r"$-\rho_t \hat A_t$", r"$\rho_t \hat A_t$", trpo),
    "TRPO, constraint": (
        r"$\mathrm{KL}\bigl(\pi_{\text{old}}(\cdot \mid s) \,\Vert\, \pi_\theta(\cdot \mid s)\bigr)$, "
        r"its mean at most $\delta_{\text{KL}}$",
        "–",
        None,  # a constraint; the test it names measures it
    ),
    "PPO, clip": (clipped(STEP), opened(STEP), clip),
    "Value": (
        r"$\tfrac12 (V_\phi - \text{target})^2$",
        r"of $\nabla V_\phi$: $\text{target} - V_\phi$",
        lambda: value(False),
    ),
    "Value, clipped": (
        r"$\tfrac12 \max(e^2, e_c^2)$ with $e = V_\phi - \text{target}$ and "
        r"$e_c = V_{\text{old}} + \operatorname{clip}(V_\phi - V_{\text{old}}, -\epsilon_V, \epsilon_V) "
        r"- \text{target}$",
        r"of $\nabla V_\phi$: $\text{target} - V_\phi$; 0 where $\lvert V_\phi - V_{\text{old}} \rvert > \epsilon_V$ "
        r"and $e_c^2 > e^2$",
        lambda: value(True),
    ),
    "Entropy bonus": (
        r"$-H\bigl(\pi_\theta(\cdot \mid s)\bigr)$",
        r"$-\log \pi_\theta(a \mid s)$, averaged over $a \sim \pi_\theta$",
        entropy,
    ),
    "Supervised fine-tuning": (r"$-\ell_t$", "$1$", sft),
    "Reward model (Bradley–Terry)": (
        r"$-\log \sigma(r_w - r_l) + \kappa\,(r_w + r_l)^2$",
        r"of $\nabla r_w$: $\sigma(r_l - r_w) - 2\kappa\,(r_w + r_l)$; "
        r"of $\nabla r_l$: $-\sigma(r_l - r_w) - 2\kappa\,(r_w + r_l)$",
        bradley_terry,
    ),
    "KL-shaped reward": (
        r"no loss: $r_t = -\beta\,(\ell_{\text{old},t} - \ell_{\text{ref},t})$ "
        r"$+\, \mathbb 1[t \text{ is the last token}]\; r(x, y)$",
        r"enters $\hat A_t$",
        shaped,
    ),
    "PPO of RLHF": (clipped(STEP) + " plus `value_coef` times the value loss", opened(STEP), clip),
    "DPO": (
        r"$-\log \sigma(m)$",
        r"$\beta\,\sigma(-m)$",
        lambda: preferences(lambda m: -torch.log(sigma(m)), lambda m: 0.7 * sigma(-m)),
    ),
    "Label-smoothed DPO (cDPO)": (
        r"$-(1 - \epsilon_{\text{ls}}) \log \sigma(m) - \epsilon_{\text{ls}} \log \sigma(-m)$",
        r"$\beta\,\bigl(\sigma(-m) - \epsilon_{\text{ls}}\bigr)$",
        lambda: preferences(smoothed, lambda m: 0.7 * (sigma(-m) - 0.2), label_smoothing=0.2),
    ),
    "IPO": (
        r"$\bigl((m - \tfrac12) / \beta\bigr)^2$",
        r"$(1 - 2m) / \beta$",
        lambda: preferences(lambda m: ((m - 0.5) / 0.7) ** 2, lambda m: (1 - 2 * m) / 0.7, kind="ipo"),
    ),
    "Hinge (SLiC)": (
        r"$\max(0,\, 1 - m)$",
        r"$\beta\, \mathbb 1[m < 1]$",
        lambda: preferences(lambda m: (1 - m).clamp(min=0), lambda m: 0.7 * (m < 1).double(), kind="hinge"),
    ),
    "Reference-free DPO": (
        r"$-\log \sigma(m)$, $m = \beta\,(\ell_w - \ell_l)$",
        r"$\beta\,\sigma(-m)$",
        lambda: preferences(lambda m: -torch.log(sigma(m)), lambda m: 0.7 * sigma(-m), reference=False),
    ),
    "Length-normalised DPO": (
        r"$-\log \sigma(m)$, $m = \beta\,\bigl[(\bar\ell_w - \bar\ell_{\text{ref},w}) "
        r"- (\bar\ell_l - \bar\ell_{\text{ref},l})\bigr]$",
        r"$\beta\,\sigma(-m) / \lvert y_w \rvert$; for $y_l$: $-\beta\,\sigma(-m) / \lvert y_l \rvert$",
        lambda: preferences(lambda m: -torch.log(sigma(m)), lambda m: 0.7 * sigma(-m), normalised=True),
    ),
    "SimPO": (
        r"$-\log \sigma(m - m_0)$, $m = \beta\,(\bar\ell_w - \bar\ell_l)$",
        r"$\beta\,\sigma(m_0 - m) / \lvert y_w \rvert$; for $y_l$: $-\beta\,\sigma(m_0 - m) / \lvert y_l \rvert$",
        lambda: preferences(
            lambda m: -torch.log(sigma(m - 0.5)),
            lambda m: 0.7 * sigma(0.5 - m),
            normalised=True,
            reference=False,
            target_margin=0.5,
        ),
    ),
    "DPO + NLL": (
        r"$-\log \sigma(m) - \alpha\,\bar\ell_w$",
        r"$\beta\,\sigma(-m) + \alpha / \lvert y_w \rvert$; for $y_l$: $-\beta\,\sigma(-m)$",
        lambda: held_up("nll"),
    ),
    "DPO-positive": (
        r"$-\log \sigma(m')$, $m' = m - \beta\lambda \max(0,\, \ell_{\text{ref},w} - \ell_w)$",
        r"$\beta\,\sigma(-m')\,\bigl(1 + \lambda\, \mathbb 1[\ell_w < \ell_{\text{ref},w}]\bigr)$; "
        r"for $y_l$: $-\beta\,\sigma(-m')$",
        lambda: held_up("dpop"),
    ),
    "ORPO": (
        r"$-\bar\ell_w - \lambda \log \sigma(o)$, $o = \log \frac{\bar p_w}{1 - \bar p_w} - "
        r"\log \frac{\bar p_l}{1 - \bar p_l}$, $\bar p = e^{\bar\ell}$",
        r"$\bigl(1 + \frac{\lambda\,\sigma(-o)}{1 - \bar p_w}\bigr) / \lvert y_w \rvert$; "
        r"for $y_l$: $-\frac{\lambda\,\sigma(-o)}{1 - \bar p_l} / \lvert y_l \rvert$",
        lambda: held_up("orpo"),
    ),
    "KTO": (
        r"$\lambda_D\,\sigma(-z)$ if $y$ is desirable, else $\lambda_U\,\sigma(z)$; "
        r"$z = \beta\,(\ell - \ell_{\text{ref}} - z_0)$",
        r"of $\nabla \ell$: $\lambda_D\,\beta\,\sigma(z)\,\sigma(-z)$, or "
        r"$-\lambda_U\,\beta\,\sigma(z)\,\sigma(-z)$",
        kto,
    ),
    "Online DPO": (
        r"$-\log \sigma(m)$, $y_w$ the best and $y_l$ the worst of a group of samples",
        r"$\beta\,\sigma(-m)$",
        lambda: preferences(lambda m: -torch.log(sigma(m)), lambda m: 0.7 * sigma(-m)),
    ),
    "Ranking": (
        r"$-\log \sigma(m_{ij})$, $m_{ij} = \beta\,(\ell_i - \ell_j)$, for each pair with $y_i$ above $y_j$",
        r"of $\nabla \ell_i$: $\beta\,\bigl[\sum_{j > i} \sigma(-m_{ij}) - \sum_{j < i} \sigma(-m_{ji})\bigr]$",
        ranking,
    ),
    "GRPO": (
        clipped(
            COMPLETION,
            r"$ $+\, \beta\,\bigl(e^{\ell_{\text{ref},t} - \ell_t} - 1 - (\ell_{\text{ref},t} - \ell_t)\bigr)$, "
            r"$A_i = \frac{r_i - \bar r}{\operatorname{std} r + 10^{-4}}$",
        ),
        opened(COMPLETION, r"$ $+\, \beta\,\bigl(e^{\ell_{\text{ref},t} - \ell_t} - 1\bigr)$"),
        grpo,
    ),
    "Dr. GRPO": (
        clipped(COMPLETION, r"$, $A_i = r_i - \bar r$"),
        opened(COMPLETION),
        lambda: group("dr"),
    ),
    "Clip-higher (DAPO)": (
        clipped(COMPLETION, "$, $A_i$ as in GRPO", r"\epsilon_{\text{high}}"),
        opened(COMPLETION),
        lambda: group("grpo"),
    ),
    "GSPO": (
        clipped(COMPLETION).replace(r"\rho_t", "s_i")
        + r", $\log s_i = \frac{1}{\lvert y_i \rvert} \sum_t (\ell_t - \ell_{\text{old},t})$, $A_i$ as in GRPO",
        opened(COMPLETION).replace(r"\rho_t", "s_i"),
        gspo,
    ),
    "CISPO": (
        r"$-\operatorname{sg}\bigl[\operatorname{clip}(\rho_t, 1-\epsilon, 1+\epsilon_{\text{high}})\bigr]\, "
        r"A_i\, \ell_t$, $A_i$ as in GRPO",
        r"$\operatorname{clip}(\rho_t, 1-\epsilon, 1+\epsilon_{\text{high}})\, A_i$",
        cispo,
    ),
    "RLOO": (
        clipped(COMPLETION, r"$, $A_i = r_i - \frac{1}{K-1} \sum_{j \ne i} r_j$"),
        opened(COMPLETION),
        lambda: group("rloo"),
    ),
    "REINFORCE++": (
        clipped(
            COMPLETION, r"$, $A_i = \frac{r_i - \bar r}{\operatorname{std} r + 10^{-8}}$ of the whole batch"
        ),
        opened(COMPLETION),
        reinforce_plus_plus,
    ),
    "pass@k": (
        clipped(
            COMPLETION,
            r"$, $A_i = k\,\bigl(\mathbb E_S \max(r_i, \max_S r) - \mathbb E_T \max_T r\bigr)$ over the sets "
            r"$S$ of $k - 1$ and $T$ of $k$ of the others",
        ),
        opened(COMPLETION),
        pass_at_k,
    ),
    "Best of n": (
        clipped(COMPLETION, r"$, $A_i = \mathbb 1[i \text{ is the first with } r_i = \max_j r_j]$"),
        opened(COMPLETION),
        best_of_n,
    ),
    "Sampler correction": (
        r"$c_t\, L_t$, $c_t = \min(e^{\ell_{\text{old},t} - \ell_{\text{sampler},t}}, \text{cap})$; "
        "not on the KL term",
        r"$c_t\, w_t$",
        correction,
    ),
}


def test_every_row_has_a_check_and_every_check_a_row() -> None:
    assert list(rows()) == list(CHECKS)


@pytest.mark.parametrize("objective", CHECKS)
def test_the_formulas_of_a_row_are_those_of_the_code(objective: str) -> None:
    row = rows()[objective]
    loss, weight, check = CHECKS[objective]
    assert row.loss == loss
    assert row.weight == weight
    assert len(row.denominator) > 0
    if check is not None:
        check()


def test_every_public_loss_is_on_the_sheet() -> None:
    seam = {"check_loss", "item_losses"}  # what trainers do with a loss of one's own
    functions = {name for name in losses.__all__ if name.islower()} - seam
    assert len(functions) >= 9
    named = set(re.findall(r"\{py:func\}`~policyopt\.losses\.(\w+)`", PAGE))
    assert named == functions


@cache
def documented_modules() -> set[str]:
    pages = (BOOK / "api").glob("*.md")
    return {m for p in pages for m in re.findall(r"module-api:: ([\w.]+)", p.read_text(encoding="utf-8"))}


@pytest.mark.parametrize("name", sorted(set(re.findall(r"\{py:func\}`~([\w.]+)`", PAGE))))
def test_a_function_that_the_sheet_names_is_on_an_api_page(name: str) -> None:
    module, _, function = name.rpartition(".")
    assert module in documented_modules()
    assert function in importlib.import_module(module).__all__


@pytest.mark.parametrize(("test", "file"), sorted(set(re.findall(r"\[`(\w+)`\]\[(\w+)\]", PAGE))))
def test_a_test_that_the_sheet_names_exists(test: str, file: str) -> None:
    tree = ast.parse(TESTS[file].read_text(encoding="utf-8"))
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_line_names_a_test_and_a_chapter() -> None:
    lines = table_lines()
    assert len(lines) > len(rows())
    for cells in lines:
        assert re.search(r"\[`test_\w+`\]\[\w+\]", cells[-1]), cells[0]
        chapter = re.fullmatch(r"\[[^]]+\]\(([\w-]+\.ipynb)\)", cells[0])
        assert chapter is not None
        assert (BOOK / chapter[1]).is_file()
