"""Objectives as pure functions.

Every loss is minimised, so it is the *negative* of the objective in the papers. Each
function returns one entry per item (time step, token, sample): the loss alone, or a
named tuple with ``loss`` first, then the statistics that tell whether it is healthy.
Nothing is averaged here. :func:`aggregate` alone decides what is counted and what it is
divided by, so that a batch cut into pieces gives the gradient of the whole.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from policyopt._checks import check_shapes, require
from policyopt.estimators import bounded_log_ratio, kl_estimate, sequence_log_prob

__all__ = [
    "DPO", "KTO", "BradleyTerry", "ClippedSurrogate", "Loss", "Ranking", "Surrogate",
    "ValueLoss", "aggregate", "bradley_terry_loss", "cispo_loss",
    "clipped_surrogate_loss", "dpo_loss", "kto_loss", "orpo_loss",
    "policy_gradient_loss", "ranking_loss", "sequence_log_ratio", "surrogate_loss",
    "value_loss",
]  # fmt: skip


Loss = Callable[[Any], Any]
"""What a trainer's ``loss=`` takes: a function from the batch whose log-probabilities
have just been computed, with gradient, to one loss per item: a tensor, or a named tuple
or dataclass with the field ``loss`` and, if it likes, statistics such as ``ratio``."""


class Surrogate(NamedTuple):
    """Result of :func:`surrogate_loss`, one entry per item."""

    loss: Tensor
    ratio: Tensor
    """ρ = π/π_old (detached)."""
    kl: Tensor
    """k3 estimate of KL(π_old ‖ π), in nats (detached)."""


class ClippedSurrogate(NamedTuple):
    """Result of :func:`clipped_surrogate_loss` and :func:`cispo_loss`, one entry per
    item.
    """

    loss: Tensor
    ratio: Tensor
    """ρ = π/π_old (detached)."""
    clipped: Tensor
    """1 where the clip switches the gradient off (CISPO: changes its weight), else 0.
    """
    kl: Tensor
    """k3 estimate of KL(π_old ‖ π), in nats (detached)."""


class ValueLoss(NamedTuple):
    """Result of :func:`value_loss`, one entry per item."""

    loss: Tensor
    error: Tensor
    """V − target, in units of return (detached)."""


class BradleyTerry(NamedTuple):
    """Result of :func:`bradley_terry_loss`, one entry per pair."""

    loss: Tensor
    margin: Tensor
    """Score of the chosen minus score of the rejected (detached); the pair is ordered
    rightly where it is > 0.
    """


class DPO(NamedTuple):
    """Result of :func:`dpo_loss` and :func:`orpo_loss`, one entry per pair."""

    loss: Tensor
    chosen_reward: Tensor
    """Implicit reward of the chosen completion, β log(π/π_ref), in ORPO λ log odds
    (detached)."""
    rejected_reward: Tensor
    """The same of the rejected completion (detached)."""
    margin: Tensor
    """``chosen_reward`` − ``rejected_reward`` (detached); the pair is ordered rightly
    where it is > 0.
    """
    weight: Tensor
    """w = ∂L/∂(rejected log-prob) (detached). Where nothing holds the chosen completion
    up, −∇L = w (∇ log π(chosen) − ∇ log π(rejected)); ``nll_weight``, ``dpop_weight``
    and ORPO add to the first term. Negative only where label smoothing or IPO pulls
    back a margin that has grown too large."""


class KTO(NamedTuple):
    """Result of :func:`kto_loss`, one entry per completion."""

    loss: Tensor
    reward: Tensor
    """Implicit reward β log(π/π_ref) (detached)."""
    weight: Tensor
    """w = −∂L/∂(log-prob) (detached): −∇L = w ∇ log π. Positive for a desirable
    completion, negative for another."""


class Ranking(NamedTuple):
    """Result of :func:`ranking_loss`, one entry per ordered pair, in the order (0, 1),
    (0, 2), …, (K−2, K−1).
    """

    loss: Tensor
    margin: Tensor
    """β (log-prob of the better − log-prob of the worse) (detached)."""


def policy_gradient_loss(log_prob: Tensor, weights: Tensor) -> Tensor:
    r"""REINFORCE: L_t = −w_t log π_θ(a_t|s_t), with the weights held constant.

    Its gradient is −w_t ∇ log π_θ, so descending it ascends E[Σ_t w_t log π_θ]. What
    w_t is (return, return − baseline, advantage) is the whole difference between the
    variants.

    Parameters
    ----------
    log_prob : Tensor
        log π_θ(a_t|s_t), any shape, with gradient.
    weights : Tensor
        w_t, same shape; no gradient flows through it.

    References
    ----------
    Williams (1992), Simple statistical gradient-following algorithms,
    doi:10.1007/BF00992696.

    Examples
    --------
    >>> import torch
    >>> policy_gradient_loss(torch.tensor([-1.0]), torch.tensor([3.0]))
    tensor([3.])
    """
    check_shapes(log_prob=log_prob, weights=weights)
    return -weights.detach() * log_prob


def surrogate_loss(
    log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor
) -> Surrogate:
    r"""Importance-weighted surrogate: L_t = −ρ_t A_t with ρ_t = π_θ(a_t|s_t) /
    π_old(a_t|s_t).

    At θ = θ_old its gradient is that of :func:`policy_gradient_loss` with w_t = A_t.

    Parameters
    ----------
    log_prob : Tensor
        log π_θ(a_t|s_t), any shape, with gradient.
    old_log_prob, advantages : Tensor
        Same shape; no gradient flows through them.

    References
    ----------
    Schulman et al. (2015), Trust region policy optimization, arXiv:1502.05477, eq. 14.
    """
    check_shapes(log_prob=log_prob, old_log_prob=old_log_prob, advantages=advantages)
    old = old_log_prob.detach()
    ratio = torch.exp(bounded_log_ratio(log_prob - old))
    kl = kl_estimate(old, log_prob.detach(), "k3")
    return Surrogate(-ratio * advantages.detach(), ratio.detach(), kl)


def clipped_surrogate_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    clip_ratio: float = 0.2,
    clip_ratio_high: float | None = None,
) -> ClippedSurrogate:
    r"""PPO's objective: L_t = −min(ρ_t A_t, clip(ρ_t, 1 − ε, 1 + ε) A_t).

    The minimum is pessimistic: it removes the reward for moving ρ *further* in the
    direction the advantage asks for, and keeps the full gradient for coming back. The
    gradient is exactly 0 where A > 0 and ρ > 1 + ε, or A < 0 and ρ < 1 − ε, whatever
    the log-ratio is. Where A < 0, ρ is not clipped from above: it is bounded only where
    it would overflow, see :func:`~policyopt.estimators.bounded_log_ratio`.

    Parameters
    ----------
    log_prob : Tensor
        log π_θ(a_t|s_t), any shape, with gradient.
    old_log_prob, advantages : Tensor
        Same shape; no gradient flows through them.
    clip_ratio : float
        ε > 0. The lower edge is 1 − ε, and the upper one too unless ``clip_ratio_high``
        is given.
    clip_ratio_high : float, optional
        Upper edge 1 + ε_high ("clip-higher", Yu et al. 2025, arXiv:2503.14476).

    References
    ----------
    Schulman et al. (2017), Proximal policy optimization algorithms, arXiv:1707.06347,
    eq. 7.

    Examples
    --------
    >>> import torch
    >>> ratio, advantage = torch.tensor([1.5, 0.5, 1.5]), torch.tensor([1.0, 1.0, -1.0])
    >>> out = clipped_surrogate_loss(ratio.log(), torch.zeros(3), advantage)
    >>> out.loss, out.clipped
    (tensor([-1.2000, -0.5000,  1.5000]), tensor([1., 0., 0.]))
    """
    high = clip_ratio if clip_ratio_high is None else clip_ratio_high
    require(clip_ratio > 0, "clip_ratio must be > 0", clip_ratio)
    require(high > 0, "clip_ratio_high must be > 0", high)
    check_shapes(log_prob=log_prob, old_log_prob=old_log_prob, advantages=advantages)
    old, advantages = old_log_prob.detach(), advantages.detach()
    ratio = torch.exp(bounded_log_ratio(log_prob - old))
    clipped = ratio.clamp(1 - clip_ratio, 1 + high)
    pessimistic = torch.minimum(ratio * advantages, clipped * advantages)
    above, below = ratio > 1 + high, ratio < 1 - clip_ratio
    off = (above & (advantages > 0)) | (below & (advantages < 0))
    kl = kl_estimate(old, log_prob.detach(), "k3")
    return ClippedSurrogate(-pessimistic, ratio.detach(), off.to(ratio.dtype), kl)


def cispo_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    clip_ratio: float = 1.0,
    clip_ratio_high: float | None = 4.0,
) -> ClippedSurrogate:
    r"""CISPO: the clip limits the weight of a token, and never takes its gradient away.

    .. math:: L_t = -\operatorname{sg}\bigl[\operatorname{clip}(\rho_t, 1-\varepsilon,
              1+\varepsilon_{high})\bigr]\, A_t \log\pi_\theta(a_t|s_t)

    where sg holds its argument constant. Within the edges the gradient is that of
    :func:`surrogate_loss`. Beyond them PPO's objective has none on one side, which
    often meets rare tokens with a large ratio; here they keep the weight of the edge.

    Parameters
    ----------
    log_prob : Tensor
        log π_θ(a_t|s_t), any shape, with gradient.
    old_log_prob, advantages : Tensor
        Same shape; no gradient flows through them.
    clip_ratio : float
        ε > 0; from 1 on there is no lower edge.
    clip_ratio_high : float, optional
        ε_high > 0: the largest weight is 1 + ε_high. None: ε.

    References
    ----------
    MiniMax (2025), MiniMax-M1, arXiv:2506.13585, eq. 4 and 5.

    Examples
    --------
    >>> import torch
    >>> log_prob = torch.tensor([2.0, 10.0]).log().requires_grad_()
    >>> cispo_loss(log_prob, torch.zeros(2), torch.ones(2)).loss.sum().backward()
    >>> log_prob.grad
    tensor([-2., -5.])
    """
    high = clip_ratio if clip_ratio_high is None else clip_ratio_high
    out = clipped_surrogate_loss(
        log_prob.detach(), old_log_prob, advantages,
        clip_ratio=clip_ratio, clip_ratio_high=high,
    )  # fmt: skip
    weight = out.ratio.clamp(1 - clip_ratio, 1 + high)
    clipped = (weight != out.ratio).to(weight.dtype)
    loss = -weight * advantages.detach() * log_prob
    return out._replace(loss=loss, clipped=clipped)


def sequence_log_ratio(log_prob: Tensor, old_log_prob: Tensor, mask: Tensor) -> Tensor:
    r"""Log-ratio of whole completions, per token, repeated for each of their tokens
    (GSPO).

    .. math:: \log s_i = \frac{1}{|y_i|} \sum_t
              \log\frac{\pi_\theta(a_t|s_t)}{\pi_\text{old}(a_t|s_t)}

    Give it to :func:`clipped_surrogate_loss` as the log-probability, with zeros as the
    old one: all tokens of a completion then share one ratio s_i, and are clipped
    together or not at all. The gradient of s_i is s_i times the mean over its tokens of
    ∇ log π(a_t|s_t). With one advantage per completion the loss's gradient equals that
    of "GSPO-token", where token t carries the value s_i but only its own gradient,
    under each reduction of :func:`aggregate`.

    Parameters
    ----------
    log_prob : Tensor
        log π_θ(a_t|s_t), ``[..., T]``, with gradient.
    old_log_prob : Tensor
        Same shape; no gradient flows through it.
    mask : Tensor
        Boolean, the same shape.

    Returns
    -------
    Tensor
        Shape ``[..., T]``, in nats per token; 0 at padding.

    References
    ----------
    Zheng et al. (2025), Group sequence policy optimization, arXiv:2507.18071, eq. 7 and
    §4.3.

    Examples
    --------
    >>> import torch
    >>> log_prob = torch.tensor([[-1.0, -2.0, 0.0]])
    >>> old_log_prob = torch.tensor([[-1.5, -2.25, 0.0]])
    >>> mask = torch.tensor([[True, True, False]])
    >>> log_ratio = sequence_log_ratio(log_prob, old_log_prob, mask)
    >>> log_ratio
    tensor([[0.3750, 0.3750, 0.0000]])
    >>> zeros, ones = torch.zeros(1, 3), torch.ones(1, 3)
    >>> clipped_surrogate_loss(log_ratio, zeros, ones).clipped
    tensor([[1., 1., 0.]])
    """
    check_shapes(log_prob=log_prob, old_log_prob=old_log_prob, mask=mask)
    mean = sequence_log_prob(log_prob - old_log_prob.detach(), mask, reduction="mean")
    return torch.where(mask, mean.unsqueeze(-1), 0.0)


def value_loss(
    values: Tensor,
    targets: Tensor,
    old_values: Tensor | None = None,
    *,
    clip: float | None = None,
) -> ValueLoss:
    r"""Squared error of the value function, L_t = ½ (V_t − target_t)², optionally
    clipped as in PPO.

    With ``clip`` = c the loss is ½ max((V − target)², (V_old + clamp(V − V_old, −c, c)
    − target)²): the value may not profit from moving further than c from where it was
    when the data were collected.

    Parameters
    ----------
    values : Tensor
        V_φ(s_t), any shape, with gradient.
    targets : Tensor
        Regression targets (for instance advantage + old value), same shape; no gradient
        flows through them.
    old_values : Tensor, optional
        V at collection time; needed with ``clip``.
    clip : float, optional
        c > 0, in units of return.

    Examples
    --------
    >>> import torch
    >>> value, target, old = torch.tensor([2.0]), torch.tensor([5.0]), torch.zeros(1)
    >>> value_loss(value, target).loss, value_loss(value, target, old, clip=1.0).loss
    (tensor([4.5000]), tensor([8.]))
    """
    check_shapes(values=values, targets=targets)
    targets = targets.detach()
    error = values - targets
    squared = error.square()
    if clip is not None:
        require(clip > 0, "clip must be > 0 or None", clip)
        if old_values is None:
            raise ValueError("old_values must be given when clip is")
        check_shapes(values=values, old_values=old_values)
        old = old_values.detach()
        clipped = old + (values - old).clamp(-clip, clip)
        squared = torch.maximum(squared, (clipped - targets).square())
    return ValueLoss(loss=0.5 * squared, error=error.detach())


def bradley_terry_loss(
    chosen_scores: Tensor, rejected_scores: Tensor, *, centering: float = 0.0
) -> BradleyTerry:
    r"""Reward model on comparisons: L = −log σ(s_w − s_l) + c (s_w + s_l)².

    The Bradley–Terry model says P(w beats l) = σ(s_w − s_l), so the first term is a
    negative log-likelihood. It sees differences only: adding a constant to all scores
    changes nothing. The second term picks the scores whose sum is near 0.

    Parameters
    ----------
    chosen_scores, rejected_scores : Tensor
        s_w and s_l, same shape, with gradient.
    centering : float
        c ≥ 0; 0.01 is usual, 0 leaves the constant free.

    References
    ----------
    Bradley and Terry (1952), doi:10.2307/2334029; Ouyang et al. (2022),
    arXiv:2203.02155, eq. 1. Centring: Eisenstein et al. (2023), Helping or herding?,
    arXiv:2312.09244.

    Examples
    --------
    >>> import torch
    >>> bradley_terry_loss(torch.tensor([2.0, 0.0]), torch.tensor([0.0, 2.0]))
    BradleyTerry(loss=tensor([0.1269, 2.1269]), margin=tensor([ 2., -2.]))
    """
    require(centering >= 0, "centering must be >= 0", centering)
    check_shapes(chosen_scores=chosen_scores, rejected_scores=rejected_scores)
    margin = chosen_scores - rejected_scores
    loss = -logsigmoid(margin) + centering * (chosen_scores + rejected_scores).square()
    return BradleyTerry(loss=loss, margin=margin.detach())


def dpo_loss(
    chosen_log_prob: Tensor,
    rejected_log_prob: Tensor,
    reference_chosen_log_prob: Tensor | None = None,
    reference_rejected_log_prob: Tensor | None = None,
    *,
    beta: float = 0.1,
    kind: Literal["sigmoid", "ipo", "hinge"] = "sigmoid",
    label_smoothing: float = 0.0,
    target_margin: float = 0.0,
    nll_weight: float = 0.0,
    chosen_tokens: Tensor | None = None,
    dpop_weight: float = 0.0,
) -> DPO:
    r"""Direct preference optimisation: a reward model's loss, with the policy's
    log-ratio as the score.

    With the margin m = β (log π/π_ref of the chosen − log π/π_ref of the rejected
    completion) and x = m − γ:

    =============  ===============  ===================================================
    kind           ℓ(x)             what it asks for
    =============  ===============  ===================================================
    ``"sigmoid"``  −log σ(x)        the likelihood of the preferences (DPO); always a
                                    little more margin
    ``"ipo"``      ((x − ½) / β)²   a difference of log-ratios of 1/(2β), no more and no
                                    less (IPO)
    ``"hinge"``    max(0, 1 − x)    a margin of at least 1 (SLiC)
    =============  ===============  ===================================================

    The loss is (1 − ε) ℓ(x) + ε ℓ(−x) with the label smoothing ε, the share of
    preferences believed to be the wrong way round ("conservative DPO").

    Two terms hold the chosen completion up, whose log-probability may otherwise fall
    with the other's. DPO + NLL adds α times its negative log-likelihood per token.
    DPO-positive subtracts β λ max(0, −log π/π_ref of the chosen) from x: nothing, as
    long as the policy finds it at least as likely as the reference does.

    For length-normalised DPO give means over tokens instead of sums,
    :func:`~policyopt.estimators.sequence_log_prob` with ``reduction="mean"``. SimPO is
    that without a reference, and with ``target_margin``.

    Parameters
    ----------
    chosen_log_prob, rejected_log_prob : Tensor
        log π_θ(completion | prompt), summed over its tokens; same shape, with gradient.
    reference_chosen_log_prob, reference_rejected_log_prob : Tensor, optional
        The same under the reference policy; no gradient flows through them. None for
        both: no reference, both count as 0.
    beta : float
        β > 0, strength of the pull towards the reference: the optimum of DPO is π_ref
        exp(reward/β)/Z.
    kind : {"sigmoid", "ipo", "hinge"}
    label_smoothing : float
        ε in [0, 0.5).
    target_margin : float
        γ ≥ 0, in units of reward; 0 with ``"ipo"``, whose target is β's.
    nll_weight : float
        α ≥ 0 (DPO + NLL, also called RPO).
    chosen_tokens : Tensor, optional
        Length of each chosen completion, the shape of ``chosen_log_prob``, by which
        this is divided in the term of α. None: it is a mean over tokens already.
    dpop_weight : float
        λ ≥ 0 (DPO-positive); needs a reference, and no label smoothing, which would
        reward the fall of the chosen completion.

    References
    ----------
    Rafailov et al. (2023), Direct preference optimization, arXiv:2305.18290, eq. 7.
    IPO: Azar et al. (2023), arXiv:2310.12036, eq. 17 (its τ is our β). Hinge: Zhao et
    al. (2023), SLiC-HF, arXiv:2305.10425, on log-ratios as in Liu et al. (2023),
    arXiv:2309.06657. SimPO: Meng et al. (2024), arXiv:2405.14734, eq. 6. Label
    smoothing: Mitchell (2023), A note on DPO with noisy preferences. DPO + NLL: Pang et
    al. (2024), Iterative reasoning preference optimization, arXiv:2404.19733, eq. 1.
    DPO-positive: Pal et al. (2024), Smaug, arXiv:2402.13228, eq. 3.

    Examples
    --------
    >>> import torch
    >>> out = dpo_loss(torch.tensor([-45.6]), torch.tensor([-28.3]), beta=0.5)
    >>> out.margin, out.loss, out.weight
    (tensor([-8.6500]), tensor([8.6502]), tensor([0.4999]))
    """
    free = reference_chosen_log_prob is None
    _check_dpo(
        beta, kind, label_smoothing, free, target_margin=target_margin,
        nll_weight=nll_weight, dpop_weight=dpop_weight,
    )  # fmt: skip
    references = (reference_chosen_log_prob, reference_rejected_log_prob)
    ratios = _log_ratios(chosen_log_prob, rejected_log_prob, *references)
    chosen, rejected = beta * ratios[0], beta * ratios[1]
    margin = chosen - rejected
    x, share = margin - target_margin, label_smoothing
    if dpop_weight:
        x = x - dpop_weight * (-chosen).clamp(min=0)
    right, slope = _preference_loss(x, kind, beta)
    wrong, flipped_slope = _preference_loss(-x, kind, beta)
    loss = (1 - share) * right + share * wrong if share else right
    if nll_weight:
        mean = chosen_log_prob
        if chosen_tokens is not None:
            check_shapes(chosen_log_prob=mean, chosen_tokens=chosen_tokens)
            mean = mean / chosen_tokens
        loss = loss - nll_weight * mean
    weight = beta * ((1 - share) * slope - share * flipped_slope)
    return DPO(loss, chosen.detach(), rejected.detach(), margin.detach(), weight)


def _log_ratios(
    chosen: Tensor, rejected: Tensor, first: Tensor | None, second: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Return log π/π_ref of both completions; without a reference, log π."""
    check_shapes(chosen_log_prob=chosen, rejected_log_prob=rejected)
    if first is None and second is None:
        return chosen, rejected
    if first is None or second is None:
        raise ValueError("reference_*_log_prob must be given both or neither")
    check_shapes(chosen_log_prob=chosen, reference_chosen_log_prob=first)
    check_shapes(chosen_log_prob=chosen, reference_rejected_log_prob=second)
    return chosen - first.detach(), rejected - second.detach()


def _check_dpo(
    beta: float, kind: str, smoothing: float, free: bool, **weights: float
) -> None:
    require(0 < beta < math.inf, "beta must be finite and > 0", beta)
    require(0 <= smoothing < 0.5, "label_smoothing must lie in [0, 0.5)", smoothing)
    for name, value in weights.items():
        require(0 <= value < math.inf, f"{name} must be finite and >= 0", value)
    margin, dpop = weights["target_margin"], weights["dpop_weight"]
    fits = kind != "ipo" or margin == 0
    require(fits, "target_margin must be 0 with kind='ipo'", margin)
    rule = "dpop_weight must be 0 without a reference or with label_smoothing"
    require(not dpop or not (free or smoothing), rule, dpop)


def _preference_loss(x: Tensor, kind: str, beta: float) -> tuple[Tensor, Tensor]:
    """Return ℓ(x) of :func:`dpo_loss`, and −ℓ'(x) without gradient."""
    fixed = x.detach()
    if kind == "sigmoid":
        return -logsigmoid(x), torch.sigmoid(-fixed)
    if kind == "ipo":
        return ((x - 0.5) / beta).square(), (1 - 2 * fixed) / beta**2
    if kind == "hinge":
        return torch.relu(1 - x), (fixed < 1).to(fixed.dtype)
    raise ValueError(f"kind must be 'sigmoid', 'ipo' or 'hinge', got {kind!r}")


def orpo_loss(
    chosen_log_prob: Tensor, rejected_log_prob: Tensor, *, weight: float = 0.1
) -> DPO:
    r"""ORPO: fine-tuning on the chosen completion and a preference in one loss, without
    a reference.

    With p the geometric mean of a completion's token probabilities:

    .. math:: L = -\log p_w - \lambda \log\sigma\Bigl(
              \log\frac{p_w}{1 - p_w} - \log\frac{p_l}{1 - p_l}\Bigr)

    Parameters
    ----------
    chosen_log_prob, rejected_log_prob : Tensor
        log p, the *mean* of log π over the tokens of a completion
        (:func:`~policyopt.estimators.sequence_log_prob` with ``reduction="mean"``);
        same shape, with gradient.
    weight : float
        λ > 0.

    References
    ----------
    Hong, Lee, Thorne (2024), ORPO, arXiv:2403.07691, eq. 6 and 7.

    Examples
    --------
    >>> import torch
    >>> half = torch.tensor([0.5]).log()
    >>> orpo_loss(half, half, weight=1.0).loss  # 2 log 2
    tensor([1.3863])
    """
    require(0 < weight < math.inf, "weight must be finite and > 0", weight)
    # A completion that is certain has infinite odds: the largest below counts.
    limit = -torch.finfo(chosen_log_prob.dtype).eps
    scores = [x.clamp(max=limit) for x in (chosen_log_prob, rejected_log_prob)]
    odds = [x - torch.log(-torch.expm1(x)) for x in scores]
    out = dpo_loss(*odds, beta=1.0)
    loss = weight * out.loss - chosen_log_prob
    # The derivative of the log odds is 1 / (1 − p), and 0 where they are limited.
    slope = (rejected_log_prob <= limit) / -torch.expm1(scores[1])
    chosen, rejected, margin = (weight * reward for reward in out[1:4])
    return DPO(loss, chosen, rejected, margin, weight * (out.weight * slope).detach())


def kto_loss(
    log_prob: Tensor,
    reference_log_prob: Tensor,
    desirable: Tensor,
    baseline_log_ratio: Tensor,
    *,
    beta: float = 0.1,
    desirable_weight: float = 1.0,
    undesirable_weight: float = 1.0,
) -> KTO:
    r"""KTO: one label for each completion in place of pairs.

    With z = β (log π/π_ref − z_0) the loss is λ_D σ(−z) for a desirable completion and
    λ_U σ(z) for another. The baseline z_0 is max(0, mean of ``baseline_log_ratio``), an
    estimate of KL(π ‖ π_ref) that is held constant. The weight of ∇ log π fades on both
    sides of z = 0, so a completion that the policy finds very likely or very unlikely
    hardly moves, whatever its label.

    Parameters
    ----------
    log_prob, reference_log_prob : Tensor
        log π(completion | prompt) under policy, with gradient, and reference, summed
        over tokens; same shape.
    desirable : Tensor
        Boolean, the same shape.
    baseline_log_ratio : Tensor
        log π/π_ref of at least one completion, any shape; no gradient flows through it.
        Samples of the policy make z_0 an estimate of the KL divergence. The paper takes
        the completions of the batch, each under the prompt of another one.
    beta : float
        β > 0.
    desirable_weight, undesirable_weight : float
        λ_D and λ_U > 0; where one label is more frequent, the other's can balance it.

    References
    ----------
    Ethayarajh et al. (2024), KTO: Model alignment as prospect theoretic optimization,
    arXiv:2402.01306, eq. 7 and 8 (a constant, λ, is left out of the loss there).

    Examples
    --------
    >>> import torch
    >>> zeros, label = torch.zeros(2), torch.tensor([True, False])
    >>> kto_loss(zeros, zeros, label, zeros, beta=0.4).weight
    tensor([ 0.1000, -0.1000])
    """
    numbers = (beta, desirable_weight, undesirable_weight)
    rule = "beta, desirable_weight and undesirable_weight must be finite and > 0"
    require(all(0 < x < math.inf for x in numbers), rule, numbers)
    reference = reference_log_prob.detach()
    check_shapes(log_prob=log_prob, reference_log_prob=reference, desirable=desirable)
    kind = desirable.dtype
    require(kind == torch.bool, "desirable must be Boolean, True for the good", kind)
    rule = "baseline_log_ratio must hold at least one number"
    require(baseline_log_ratio.numel() > 0, rule, baseline_log_ratio)
    baseline = baseline_log_ratio.detach().mean().clamp(min=0)
    log_ratio = log_prob - reference
    z = torch.where(desirable, 1, -1) * beta * (log_ratio - baseline)
    factor = torch.where(desirable, desirable_weight, undesirable_weight).to(z.dtype)
    loss, fixed = factor * torch.sigmoid(-z), z.detach()
    slope = beta * factor * torch.sigmoid(fixed) * torch.sigmoid(-fixed)
    weight = torch.where(desirable, slope, -slope)
    return KTO(loss, beta * log_ratio.detach(), weight)


def ranking_loss(log_prob: Tensor, *, beta: float) -> Ranking:
    r"""Pairwise loss on a ranked list: −log σ(β (log π(y_i) − log π(y_j))) for every
    pair with y_i ranked above y_j.

    It is RankNet's loss with β log π as the score: DPO without a reference, on all
    K(K−1)/2 pairs of a list. Some tutorials call it GRPO. It is not: it samples
    nothing, needs no reward and has no ratio to clip.

    Parameters
    ----------
    log_prob : Tensor
        Shape ``[..., K]``: log π_θ(completion | prompt) of the K ≥ 2 completions of one
        prompt, best first, with gradient. Sums over tokens favour short completions;
        means over tokens (:func:`~policyopt.estimators.sequence_log_prob`) do not.
        Log-ratios to a reference may stand in for them.
    beta : float
        β > 0.

    Returns
    -------
    Ranking
        Fields of shape ``[..., K(K−1)/2]``.

    References
    ----------
    Burges et al. (2005), Learning to rank using gradient descent,
    doi:10.1145/1102351.1102363.

    Examples
    --------
    >>> import torch
    >>> ranking_loss(torch.tensor([-1.0, -3.0, -2.0]), beta=1.0).margin
    tensor([ 2.,  1., -1.])
    """
    require(0 < beta < math.inf, "beta must be finite and > 0", beta)
    k = log_prob.shape[-1] if log_prob.ndim else 0
    rule = "log_prob must hold lists of at least 2 completions, [..., K]"
    require(k >= 2, rule, tuple(log_prob.shape))
    better, worse = torch.triu_indices(k, k, offset=1, device=log_prob.device)
    margin = beta * (log_prob[..., better] - log_prob[..., worse])
    return Ranking(loss=-logsigmoid(margin), margin=margin.detach())


def aggregate(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: Literal["mean", "sequence-mean", "sum"] = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    r"""Reduce per-item values to one number; the only place where a denominator is
    chosen.

    ===================  ============================================================
    reduction            result
    ===================  ============================================================
    ``"mean"``           Σ of masked items / number of masked items (every time step
                         or token counts once)
    ``"sequence-mean"``  mean over sequences of each one's own mean over its items
                         (last dimension); sequences without items are not counted
    ``"sum"``            Σ of masked items
    ===================  ============================================================

    ``denominator`` replaces the count (of items, or of sequences for
    ``"sequence-mean"``). Give the count of the *whole* batch when it is cut into
    micro-batches: the pieces' results, and so their gradients, then add up to those of
    the whole. A number, or a tensor on the CPU, must be positive; a tensor on a GPU is
    not checked, which would make the CPU wait.

    The group methods differ here: GRPO takes the ``"sequence-mean"``, DAPO the
    ``"mean"``, Dr. GRPO the ``"mean"`` with a constant denominator (sequences × longest
    length allowed), and RLOO the ``"mean"`` with the number of sequences.

    Parameters
    ----------
    values : Tensor
        Any shape; ``"sequence-mean"`` needs the sequence in the last dimension.
    mask : Tensor, optional
        Boolean or 0/1, the shape of ``values``. Masked-out entries do not count, even
        if they are NaN.

    Raises
    ------
    ValueError
        If nothing is selected and no denominator is given, or the denominator is not
        positive (where that is checked).

    Examples
    --------
    >>> import torch
    >>> x = torch.tensor([[1.0, 2.0], [5.0, 9.0]])
    >>> keep, kinds = x < 9, ("mean", "sequence-mean", "sum")
    >>> [aggregate(x, keep, reduction=kind).item() for kind in kinds]
    [2.6666667461395264, 3.25, 8.0]
    """
    if mask is not None:
        check_shapes(values=values, mask=mask)
        keep = mask.bool()
        values = torch.where(keep, values, 0.0)
    if denominator is not None and getattr(denominator, "is_cpu", True):
        require(bool(denominator > 0), "denominator must be > 0", denominator)
    if reduction == "sum":
        rule = "denominator must be None with reduction='sum'"
        require(denominator is None, rule, denominator, "use reduction='mean'")
        return values.sum()
    rule = "reduction must be 'mean', 'sequence-mean' or 'sum'"
    require(reduction in ("mean", "sequence-mean"), rule, reduction)
    count: float | Tensor = values.numel() if mask is None else keep.sum()
    if reduction == "sequence-mean":
        require(values.ndim > 0, "values must be [..., T]", tuple(values.shape))
        lengths = (torch.ones_like(values) if mask is None else keep).sum(dim=-1)
        values, count = values.sum(dim=-1) / lengths.clamp(min=1), (lengths > 0).sum()
    elif mask is None and denominator is None and values.numel() > 0:
        return values.mean()
    if denominator is None and not bool(count > 0):
        raise ValueError(
            "values holds no item to average; give a denominator or skip the batch"
        )
    return values.sum() / (count if denominator is None else denominator)


def check_loss(loss: Loss | None, default: Loss, batch: str) -> Loss:
    """Return the loss that a trainer is to use, or refuse what cannot be one.

    Parameters
    ----------
    loss : callable, optional
        A trainer's argument of that name; None takes ``default``.
    batch : str
        What the loss will be called with, for the message.

    Raises
    ------
    TypeError
        If ``loss`` cannot be called with one argument.
    """
    if loss is None:
        return default
    try:
        inspect.signature(loss).bind(None)
    except TypeError as error:
        raise TypeError(
            f"loss must be a function of one argument, the {batch}, got {loss!r}: "
            f"{error}; write lambda batch: … around a function of tensors"
        ) from error
    except ValueError:
        pass  # a builtin that does not tell its signature
    return loss


def item_losses(
    loss: Loss,
    batch: Any,
    shape: Sequence[int],
    statistics: Sequence[str] = (),
    required: Sequence[str] = (),
) -> Any:
    """Call a trainer's ``loss`` and check what it returns.

    Parameters
    ----------
    shape : sequence of int
        Shape of one loss per item.
    statistics : sequence of str
        Fields that the trainer reports.
    required : sequence of str
        Those of them without which it cannot do what its config says.

    Returns
    -------
    object
        With the field ``loss``, and a field for each name in ``statistics``: detached,
        and NaN where the loss did not return it.

    Raises
    ------
    TypeError, ValueError
        If the loss is not a tensor of that shape, has no gradient where one is needed,
        or lacks a required field.
    """
    returned = loss(batch)
    bare = isinstance(returned, Tensor)
    items = returned if bare else getattr(returned, "loss", None)
    if not isinstance(items, Tensor):
        raise TypeError(
            "loss must return a tensor, or a named tuple or dataclass with a tensor "
            f"in its field 'loss', got {type(returned).__name__}"
        )
    wanted, got = tuple(shape), tuple(items.shape)
    rule = f"loss must return one number per item, shape {wanted}"
    require(got == wanted, rule, got, "leave the mean to the trainer")
    if torch.is_grad_enabled() and not items.requires_grad:
        raise ValueError(
            "loss must depend on the policy's parameters, got a tensor without "
            "gradient; compute it from the batch's log_prob, not detached"
        )
    fields = {}
    for name in statistics:
        # A bare tensor has attributes of its own, none of them a statistic.
        value = None if bare else getattr(returned, name, None)
        if value is None and name in required:
            raise ValueError(
                f"loss must return the field {name!r} with this config, got only "
                f"{type(returned).__name__}; return a named tuple that has it"
            )
        if value is None:
            value = torch.full_like(items, math.nan)
        fields[name] = torch.as_tensor(value).to(items).detach()
    return SimpleNamespace(loss=items, **fields)
