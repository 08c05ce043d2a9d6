"""Objectives as pure functions.

Every loss is minimised, so it is the *negative* of the objective in the papers. Each function returns a named
tuple whose fields have one entry per item (time step, token, sample): ``loss`` first, then the statistics that
tell whether the loss is healthy. Nothing is averaged here. :func:`aggregate` alone decides what is counted and
what it is divided by, so that a batch cut into pieces gives the gradient of the whole.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from policyopt.estimators import kl_estimate

__all__ = [
    "ClippedSurrogate",
    "EntropyLoss",
    "PolicyGradient",
    "Surrogate",
    "ValueLoss",
    "aggregate",
    "clipped_surrogate_loss",
    "entropy_loss",
    "policy_gradient_loss",
    "surrogate_loss",
    "value_loss",
]


class PolicyGradient(NamedTuple):
    """Result of :func:`policy_gradient_loss`, one entry per item."""

    loss: Tensor


class Surrogate(NamedTuple):
    """Result of :func:`surrogate_loss`, one entry per item."""

    loss: Tensor
    ratio: Tensor
    """ρ = π/π_old (detached)."""
    kl: Tensor
    """k3 estimate of KL(π_old ‖ π), in nats (detached)."""


class ClippedSurrogate(NamedTuple):
    """Result of :func:`clipped_surrogate_loss`, one entry per item."""

    loss: Tensor
    ratio: Tensor
    """ρ = π/π_old (detached)."""
    clipped: Tensor
    """1 where the clip switches the gradient off, else 0."""
    kl: Tensor
    """k3 estimate of KL(π_old ‖ π), in nats (detached)."""


class ValueLoss(NamedTuple):
    """Result of :func:`value_loss`, one entry per item."""

    loss: Tensor
    error: Tensor
    """V − target, in units of return (detached)."""


class EntropyLoss(NamedTuple):
    """Result of :func:`entropy_loss`, one entry per item."""

    loss: Tensor


def _check_match(reference_name: str, reference: Tensor, **others: Tensor) -> None:
    for name, tensor in others.items():
        if tensor.shape != reference.shape:
            raise ValueError(
                f"{name} must have the shape of {reference_name}, {tuple(reference.shape)}, "
                f"got {tuple(tensor.shape)}"
            )


def policy_gradient_loss(log_prob: Tensor, weights: Tensor) -> PolicyGradient:
    r"""REINFORCE: L_t = −w_t log π_θ(a_t|s_t), with the weights held constant.

    Its gradient is −w_t ∇ log π_θ, so descending it ascends E[Σ_t w_t log π_θ]. What w_t is (return,
    return − baseline, advantage) is the whole difference between the variants.

    Parameters
    ----------
    log_prob : Tensor
        log π_θ(a_t|s_t), any shape, with gradient.
    weights : Tensor
        w_t, same shape; no gradient flows through it.

    References
    ----------
    Williams (1992), Simple statistical gradient-following algorithms, doi:10.1007/BF00992696.

    Examples
    --------
    >>> import torch
    >>> policy_gradient_loss(torch.tensor([-1.0]), torch.tensor([3.0])).loss
    tensor([3.])
    """
    _check_match("log_prob", log_prob, weights=weights)
    return PolicyGradient(-weights.detach() * log_prob)


def surrogate_loss(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor) -> Surrogate:
    r"""Importance-weighted surrogate: L_t = −ρ_t A_t with ρ_t = π_θ(a_t|s_t) / π_old(a_t|s_t).

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
    _check_match("log_prob", log_prob, old_log_prob=old_log_prob, advantages=advantages)
    old = old_log_prob.detach()
    ratio = torch.exp(log_prob - old)
    return Surrogate(
        loss=-ratio * advantages.detach(),
        ratio=ratio.detach(),
        kl=kl_estimate(old, log_prob.detach(), "k3"),
    )


def clipped_surrogate_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    *,
    clip_ratio: float = 0.2,
    clip_ratio_high: float | None = None,
) -> ClippedSurrogate:
    r"""PPO's objective: L_t = −min(ρ_t A_t, clip(ρ_t, 1 − ε, 1 + ε) A_t).

    The minimum is pessimistic: it removes the reward for moving ρ *further* in the direction the advantage
    asks for, and keeps the full gradient for coming back. The gradient is exactly 0 where A > 0 and ρ > 1 + ε,
    or A < 0 and ρ < 1 − ε; ρ itself is not bounded.

    Parameters
    ----------
    log_prob : Tensor
        log π_θ(a_t|s_t), any shape, with gradient.
    old_log_prob, advantages : Tensor
        Same shape; no gradient flows through them.
    clip_ratio : float
        ε > 0. The lower edge is 1 − ε, and the upper one too unless ``clip_ratio_high`` is given.
    clip_ratio_high : float, optional
        Upper edge 1 + ε_high ("clip-higher", Yu et al. 2025, arXiv:2503.14476).

    References
    ----------
    Schulman et al. (2017), Proximal policy optimization algorithms, arXiv:1707.06347, eq. 7.

    Examples
    --------
    >>> import torch
    >>> ratio, advantage = torch.tensor([1.5, 0.5, 1.5]), torch.tensor([1.0, 1.0, -1.0])
    >>> out = clipped_surrogate_loss(ratio.log(), torch.zeros(3), advantage, clip_ratio=0.2)
    >>> out.loss, out.clipped
    (tensor([-1.2000, -0.5000,  1.5000]), tensor([1., 0., 0.]))
    """
    high = clip_ratio if clip_ratio_high is None else clip_ratio_high
    if not clip_ratio > 0 or not high > 0:
        raise ValueError(
            f"clip_ratio and clip_ratio_high must be > 0, got {clip_ratio!r} and {clip_ratio_high!r}"
        )
    _check_match("log_prob", log_prob, old_log_prob=old_log_prob, advantages=advantages)
    old, advantages = old_log_prob.detach(), advantages.detach()
    ratio = torch.exp(log_prob - old)
    pessimistic = torch.minimum(ratio * advantages, ratio.clamp(1 - clip_ratio, 1 + high) * advantages)
    with torch.no_grad():
        off = torch.where(advantages > 0, ratio > 1 + high, (ratio < 1 - clip_ratio) & (advantages < 0))
        kl = kl_estimate(old, log_prob, "k3")
    return ClippedSurrogate(loss=-pessimistic, ratio=ratio.detach(), clipped=off.to(ratio.dtype), kl=kl)


def value_loss(
    values: Tensor, targets: Tensor, old_values: Tensor | None = None, *, clip: float | None = None
) -> ValueLoss:
    r"""Squared error of the value function, L_t = ½ (V_t − target_t)², optionally clipped as in PPO.

    With ``clip`` = c the loss is ½ max((V − target)², (V_old + clamp(V − V_old, −c, c) − target)²): the value
    may not profit from moving further than c from where it was when the data were collected.

    Parameters
    ----------
    values : Tensor
        V_φ(s_t), any shape, with gradient.
    targets : Tensor
        Regression targets (for instance advantage + old value), same shape; no gradient flows through them.
    old_values : Tensor, optional
        V at collection time; needed with ``clip``.
    clip : float, optional
        c > 0, in units of return.

    Examples
    --------
    >>> import torch
    >>> value_loss(torch.tensor([2.0]), torch.tensor([5.0])).loss
    tensor([4.5000])
    >>> value_loss(torch.tensor([2.0]), torch.tensor([5.0]), torch.tensor([0.0]), clip=1.0).loss
    tensor([8.])
    """
    _check_match("values", values, targets=targets)
    targets = targets.detach()
    error = values - targets
    squared = error.square()
    if clip is not None:
        if not clip > 0:
            raise ValueError(f"clip must be > 0 or None, got {clip!r}")
        if old_values is None:
            raise ValueError("old_values must be given when clip is")
        _check_match("values", values, old_values=old_values)
        old = old_values.detach()
        clipped = old + (values - old).clamp(-clip, clip)
        squared = torch.maximum(squared, (clipped - targets).square())
    return ValueLoss(loss=0.5 * squared, error=error.detach())


def entropy_loss(entropy: Tensor) -> EntropyLoss:
    """Return −H: descending it spreads the policy out. Weigh it with a small coefficient (``entropy_coef``).

    Parameters
    ----------
    entropy : Tensor
        H(π(·|s_t)) in nats, any shape, with gradient.
    """
    return EntropyLoss(-entropy)


def aggregate(
    values: Tensor,
    mask: Tensor | None = None,
    *,
    reduction: Literal["mean", "sequence-mean", "sum"] = "mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    r"""Reduce per-item values to one number; the only place where a denominator is chosen.

    ========================  ===============================================================================
    reduction                 result
    ========================  ===============================================================================
    ``"mean"``                Σ of masked items / number of masked items (every time step or token counts once)
    ``"sequence-mean"``       mean over sequences of each one's own mean over its items (last dimension);
                              sequences without items are not counted
    ``"sum"``                 Σ of masked items
    ========================  ===============================================================================

    ``denominator`` replaces the count (of items, or of sequences for ``"sequence-mean"``). Give the count of
    the *whole* batch when it is cut into micro-batches: the pieces' results, and so their gradients, then add
    up to those of the whole.

    Parameters
    ----------
    values : Tensor
        Any shape; ``"sequence-mean"`` needs the sequence in the last dimension.
    mask : Tensor, optional
        Boolean or 0/1, the shape of ``values``. Masked-out entries do not count, even if they are NaN.

    Raises
    ------
    ValueError
        If nothing is selected and no denominator is given, or the denominator is not positive.

    Examples
    --------
    >>> import torch
    >>> x, keep = torch.tensor([[1.0, 2.0], [5.0, 9.0]]), torch.tensor([[True, True], [True, False]])
    >>> [aggregate(x, keep, reduction=r).item() for r in ("mean", "sequence-mean", "sum")]
    [2.6666667461395264, 3.25, 8.0]
    """
    if mask is not None:
        _check_match("values", values, mask=mask)
        keep = mask.bool()
        values = torch.where(keep, values, 0.0)
    if denominator is not None and not bool(torch.as_tensor(denominator) > 0):
        raise ValueError(f"denominator must be > 0, got {denominator!r}")
    if reduction == "sum":
        if denominator is not None:
            raise ValueError(
                f"denominator must be None with reduction='sum', got {denominator!r}; use reduction='mean'"
            )
        return values.sum()
    if reduction == "mean":
        if mask is None and denominator is None and values.numel() > 0:
            return values.mean()
        count: float | Tensor = values.numel() if mask is None else keep.sum()
        return values.sum() / _positive_count(count, denominator)
    if reduction == "sequence-mean":
        if values.ndim == 0:
            raise ValueError("values must have the sequence in its last dimension, got a scalar")
        lengths = (torch.ones_like(values) if mask is None else keep).sum(dim=-1)
        means = values.sum(dim=-1) / lengths.clamp(min=1)
        return means.sum() / _positive_count((lengths > 0).sum(), denominator)
    raise ValueError(f"reduction must be 'mean', 'sequence-mean' or 'sum', got {reduction!r}")


def _positive_count(count: float | Tensor, denominator: float | Tensor | None) -> float | Tensor:
    if denominator is not None:
        return denominator
    if not bool(torch.as_tensor(count) > 0):
        raise ValueError(
            "values holds no item to average: the mask is empty; give a denominator or skip the batch"
        )
    return count
