"""Returns, advantages and KL divergences, estimated from samples.

Time comes first: rewards, values and flags have shape ``[T, ...]``, usually ``[T, N]``
for ``N`` environments side by side. Two flags end an episode and they are never mixed
up:

``terminated[t]``
    the episode ended in a true terminal state. Nothing follows, so nothing is
    bootstrapped.
``truncated[t]``
    the episode was cut (time limit, end of the buffer) although the state has a future.
    That future is worth ``next_values[t]`` = V(final observation), which is
    bootstrapped; the λ-trace stops there all the same.

Completions of a language model come the other way round, ``[B, T]``, one row per
completion, with a Boolean ``mask`` that holds at their tokens, the end-of-sequence
token included.

Every function here is pure: tensors in, tensors out. No gradient history is required or
removed, except by :func:`importance_weights`, whose result is data.
"""

from __future__ import annotations

import math
from typing import Literal, TypeAlias, cast

import torch
from torch import Tensor

from policyopt._checks import check_shapes, require

__all__ = [
    "ImportanceMode", "adaptive_kl_coefficient", "best_of_group", "bounded_log_ratio",
    "discounted_returns", "explained_variance", "gae", "group_relative_advantages",
    "importance_weights", "kl_estimate", "kl_shaped_rewards",
    "leave_one_out_advantages", "normalize", "pass_at_k_advantages",
    "sequence_log_prob", "td_errors",
]  # fmt: skip

ImportanceMode: TypeAlias = Literal[
    "token_truncate", "token_mask", "sequence_truncate", "sequence_mask"
]
"""How :func:`importance_weights` weighs and limits."""


def _check_series(**tensors: Tensor) -> None:
    """Check a time series: equal shapes, time first, at least one step."""
    check_shapes(**tensors)
    name, series = next(iter(tensors.items()))
    rule = f"{name} must have a time dimension first, [T, ...] with T > 0"
    require(series.ndim > 0 and len(series) > 0, rule, tuple(series.shape))


def td_errors(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    *,
    gamma: float,
) -> Tensor:
    r"""Temporal-difference errors, δ_t = r_t + γ (1 − terminated_t) V(s_{t+1}) −
    V(s_t).

    Parameters
    ----------
    rewards, values, next_values : Tensor
        Shape ``[T, ...]``. ``next_values[t]`` is the value of the state that action
        ``t`` led to; at a truncation that is the *final* observation, not the first one
        of the next episode.
    terminated : Tensor
        Boolean ``[T, ...]``.
    gamma : float
        Discount per step, in [0, 1].

    Returns
    -------
    Tensor
        Shape ``[T, ...]``, in units of reward.

    Examples
    --------
    >>> import torch
    >>> one, terminated = torch.ones(1), torch.tensor([True])
    >>> td_errors(one, 2 * one, 4 * one, ~terminated, gamma=0.5)
    tensor([1.])
    >>> td_errors(one, 2 * one, 4 * one, terminated, gamma=0.5)
    tensor([-1.])
    """
    require(0 <= gamma <= 1, "gamma must lie in [0, 1]", gamma)
    _check_series(
        rewards=rewards, values=values, next_values=next_values, terminated=terminated
    )
    return rewards + gamma * torch.where(terminated, 0.0, next_values) - values


def gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    r"""Generalised advantage estimates.

    .. math:: \hat A_t = \delta_t + \gamma\lambda\,
              (1-\text{terminated}_t)(1-\text{truncated}_t)\,\hat A_{t+1}

    with the :func:`td_errors` δ. λ = 0 gives δ itself (low variance, biased by V); λ =
    1 gives the return minus V(s_t) (unbiased, high variance). The last row of the
    buffer is treated as a truncation.

    Parameters
    ----------
    rewards, values, next_values : Tensor
        Shape ``[T, ...]``, see :func:`td_errors`.
    terminated, truncated : Tensor
        Boolean ``[T, ...]``. Where both are set, ``terminated`` wins.
    gamma, gae_lambda : float
        Discount γ and trace decay λ, in [0, 1].

    Returns
    -------
    Tensor
        Advantages ``[T, ...]``; add ``values`` to get the λ-returns, the value
        function's regression target.

    References
    ----------
    Schulman, Moritz, Levine, Jordan, Abbeel (2016), High-dimensional continuous control
    using generalized advantage estimation, arXiv:1506.02438, eq. 16. Truncation: Pardo
    et al. (2018), arXiv:1712.00378.

    Examples
    --------
    >>> import torch
    >>> r, v = torch.ones(2), torch.zeros(2)
    >>> end, no = torch.tensor([False, True]), torch.tensor([False, False])
    >>> gae(r, v, v + 8, end, no, gamma=0.5, gae_lambda=1.0)  # terminated: no future
    tensor([5.5000, 1.0000])
    >>> gae(r, v, v + 8, no, end, gamma=0.5, gae_lambda=1.0)  # cut: its future is V = 8
    tensor([7.5000, 5.0000])
    """
    require(0 <= gae_lambda <= 1, "gae_lambda must lie in [0, 1]", gae_lambda)
    _check_series(rewards=rewards, truncated=truncated)
    deltas = td_errors(rewards, values, next_values, terminated, gamma=gamma)
    decay = torch.where(terminated | truncated, 0.0, gamma * gae_lambda)
    decays = decay.to(deltas.dtype).unbind()
    carried = torch.zeros_like(deltas[0])
    backwards = []
    for delta, d in zip(deltas.unbind()[::-1], decays[::-1], strict=True):
        carried = torch.addcmul(delta, d, carried)
        backwards.append(carried)
    return torch.stack(backwards[::-1])


def discounted_returns(
    rewards: Tensor,
    terminated: Tensor,
    truncated: Tensor | None = None,
    next_values: Tensor | None = None,
    *,
    gamma: float,
) -> Tensor:
    r"""Return-to-go, G_t = r_t + γ G_{t+1}, restarted at every episode end.

    Parameters
    ----------
    rewards, terminated : Tensor
        Shape ``[T, ...]``.
    truncated, next_values : Tensor, optional
        Shape ``[T, ...]``. Where ``truncated`` (and at the last row), G_t = r_t + γ
        ``next_values[t]``; without ``next_values`` the future after a cut counts as 0.
    gamma : float
        Discount per step, in [0, 1].

    Returns
    -------
    Tensor
        Shape ``[T, ...]``. It is :func:`gae` with V = 0 inside the episode and λ = 1.

    Examples
    --------
    >>> import torch
    >>> discounted_returns(torch.ones(3), torch.tensor([False, False, True]), gamma=0.5)
    tensor([1.7500, 1.5000, 1.0000])
    """
    zero = future = torch.zeros_like(rewards)
    truncated = torch.zeros_like(terminated) if truncated is None else truncated
    if next_values is not None:
        _check_series(rewards=rewards, truncated=truncated, next_values=next_values)
        cut = truncated.clone()
        cut[-1] = True
        future = torch.where(cut, next_values, zero)
    return gae(rewards, zero, future, terminated, truncated, gamma=gamma, gae_lambda=1)


def normalize(x: Tensor, mask: Tensor | None = None, *, eps: float = 1e-8) -> Tensor:
    """Shift and scale to mean 0 and standard deviation 1 over the entries where
    ``mask`` holds.

    The standard deviation has the denominator n (not n − 1), so one entry gives 0 and
    not NaN. Entries outside the mask are returned as 0.

    Parameters
    ----------
    x : Tensor
        Any shape.
    mask : Tensor, optional
        Boolean, the shape of ``x``.
    eps : float
        Added to the standard deviation.

    Examples
    --------
    >>> import torch
    >>> normalize(torch.tensor([1.0, 3.0, 99.0]), torch.tensor([True, True, False]))
    tensor([-1.,  1.,  0.])
    """
    if mask is None:
        centred = _centre(x.flatten())
        return (centred / (centred.std(correction=0) + eps)).view_as(x)
    if not bool(mask.any()):
        raise ValueError("mask selects no entry: there is nothing to normalise")
    return torch.zeros_like(x).masked_scatter(mask, normalize(x[mask], eps=eps))


def _centre(x: Tensor) -> Tensor:
    """Subtract the mean over the last dimension; equal entries give exactly 0.

    The mean of equal numbers may differ from them by a rounding, which a division by
    their standard deviation would blow up; taking the first entry off beforehand
    prevents that.
    """
    shifted = x - x[..., :1]
    return shifted - shifted.mean(dim=-1, keepdim=True)


def group_relative_advantages(
    rewards: Tensor, *, scale: bool = True, eps: float = 1e-4
) -> Tensor:
    r"""Advantage of each sample against the other samples of its group, A_i = (r_i −
    mean r) / (std r + ε).

    Parameters
    ----------
    rewards : Tensor
        Shape ``[..., K]``: ``K`` ≥ 2 samples of the same state (prompt) in the last
        dimension.
    scale : bool
        Divide by the group's standard deviation (denominator K − 1). ``False`` is "Dr.
        GRPO".
    eps : float
        Added to the standard deviation; a group whose rewards are all equal gets
        advantages of exactly 0.

    References
    ----------
    Shao et al. (2024), DeepSeekMath, arXiv:2402.03300, §4.1.2. Without scaling: Liu et
    al. (2025), arXiv:2503.20783.

    Examples
    --------
    >>> import torch
    >>> group_relative_advantages(torch.tensor([1.0, 0.0, 0.0, 1.0]), scale=False)
    tensor([ 0.5000, -0.5000, -0.5000,  0.5000])
    """
    _check_group(rewards)
    centred = _centre(rewards)
    return centred / (rewards.std(dim=-1, keepdim=True) + eps) if scale else centred


def leave_one_out_advantages(rewards: Tensor) -> Tensor:
    r"""Advantage of each sample against the mean of the *others* in its group.

    A_i = r_i − (1/(K−1)) Σ_{j≠i} r_j. The baseline does not depend on sample i, so the
    gradient estimate stays unbiased. It equals K/(K−1) times the unscaled
    :func:`group_relative_advantages`, and is computed so: equal rewards give exactly 0.

    Parameters
    ----------
    rewards : Tensor
        Shape ``[..., K]`` with ``K`` ≥ 2.

    References
    ----------
    Kool, van Hoof, Welling (2019), Buy 4 REINFORCE samples, get a baseline for free;
    Ahmadian et al. (2024), arXiv:2402.14740.

    Examples
    --------
    >>> import torch
    >>> leave_one_out_advantages(torch.tensor([3.0, 1.0, 2.0]))
    tensor([ 1.5000, -1.5000,  0.0000])
    """
    _check_group(rewards)
    k = rewards.shape[-1]
    return _centre(rewards) * (k / (k - 1))


def pass_at_k_advantages(rewards: Tensor, *, k: int) -> Tensor:
    r"""Advantage of each sample when only the best of ``k`` counts: unbiased for the
    gradient of pass@k.

    With rewards of 0 and 1 the objective E[max of k samples] is pass@k, the probability
    that at least one of k solves the task. Sample i of a group of K gets

    .. math:: A_i = k\,\bigl(\mathbb E_S \max(r_i, \max_{j \in S} r_j)
              - \mathbb E_T \max_{j \in T} r_j\bigr),

    averaged over all sets S of k − 1 and T of k of the *other* samples. The second term
    is a baseline that does not depend on sample i. The mean over the group of A_i ∇ log
    π(y_i) has the expectation ∇ E[max of k samples]; for k = 1 the result is that of
    :func:`leave_one_out_advantages`. As a prompt becomes easy its advantages vanish,
    since some of k samples would solve it anyway.

    Parameters
    ----------
    rewards : Tensor
        Shape ``[..., K]`` with ``K`` > k, any real numbers.
    k : int
        At least 1 and less than ``K``.

    References
    ----------
    Walder, Karkhanis (2025), Pass@K policy optimization, arXiv:2505.15201: their
    leave-one-out estimator.

    Examples
    --------
    >>> import torch
    >>> pass_at_k_advantages(torch.tensor([1.0, 0.0, 0.0, 0.0]), k=2)
    tensor([ 2.0000, -0.6667, -0.6667, -0.6667])
    """
    _check_group(rewards)
    K = rewards.shape[-1]
    require(1 <= k < K, f"k must be at least 1 and less than the group of {K}", k)
    # Off the first entry: equal rewards give exactly 0.
    own = rewards - rewards[..., :1]
    index = torch.arange(K, device=rewards.device)
    others = own[..., (index[:, None] + index[1:]) % K].sort(dim=-1).values

    def best(values: Tensor, size: int) -> Tensor:
        # The best of a random set is the j-th lowest in C(j, size − 1) of the sets.
        counts = [math.comb(j, size - 1) / math.comb(K - 1, size) for j in range(K - 1)]
        return values @ values.new_tensor(counts)

    joined = best(torch.maximum(others, own[..., None]), k - 1) if k > 1 else own
    return k * (joined - best(others, k))


def best_of_group(rewards: Tensor) -> Tensor:
    r"""Return 1 for the best sample of each group and 0 for the others: best-of-n, or
    rejection-sampling, fine-tuning.

    As advantages they make the policy imitate its own best of K samples, −∇L = ∇ log
    π(best of K). Among equal rewards the first sample is taken, also where all are
    equal: such a group still teaches what the policy does already.

    Parameters
    ----------
    rewards : Tensor
        Shape ``[..., K]`` with ``K`` ≥ 2.

    References
    ----------
    Dong et al. (2023), RAFT, arXiv:2304.06767, algorithm 1.

    Examples
    --------
    >>> import torch
    >>> best_of_group(torch.tensor([1.0, 3.0, 3.0]))
    tensor([0., 1., 0.])
    """
    _check_group(rewards)
    best = rewards.argmax(dim=-1, keepdim=True)
    return torch.zeros_like(rewards).scatter(-1, best, 1.0)


def _check_group(rewards: Tensor) -> None:
    grouped = rewards.ndim > 0 and rewards.shape[-1] >= 2
    rule = "rewards must hold groups of at least 2 samples, [..., K] with K >= 2"
    require(grouped, rule, tuple(rewards.shape))


def bounded_log_ratio(log_ratio: Tensor) -> Tensor:
    """Return the log-ratio, but no more than exp can take: 79.8 in float32 and
    bfloat16.

    Where exp overflows to infinity, its gradient times 0 is NaN: one such token would
    spoil a sum that masks it, or a loss whose clip has switched it off. The bound is
    0.9 log of the largest number of the dtype. At and above it the gradient of the
    result is 1, so that exp has value and gradient of the bound; below it nothing
    changes.

    Examples
    --------
    >>> import torch
    >>> bounded_log_ratio(torch.tensor([0.0, 1.0, 100.0]))
    tensor([ 0.0000,  1.0000, 79.8506])
    """
    bound = 0.9 * math.log(torch.finfo(log_ratio.dtype).max)
    # 0 with gradient 1; an infinite log-ratio has none.
    zero = (log_ratio - log_ratio.detach()).nan_to_num()
    return torch.where(log_ratio > bound, bound + zero, log_ratio)


def kl_estimate(
    log_prob: Tensor, reference_log_prob: Tensor, kind: Literal["k1", "k2", "k3"] = "k3"
) -> Tensor:
    r"""Per-sample estimates of KL(π ‖ π_ref) from actions drawn from π.

    With log r = log π_ref(a) − log π(a):

    ====  ==============  ==========================  =================================
    kind  value           mean over a ~ π             gradient of the value, mean over
                                                      a ~ π
    ====  ==============  ==========================  =================================
    k1    −log r          KL(π ‖ π_ref) exactly       0 (useless as a loss)
    k2    ½ (log r)²      biased, small when π ≈      ∇ KL(π ‖ π_ref) exactly
                          π_ref
    k3    r − 1 − log r   KL(π ‖ π_ref), low          ∇ KL(π_ref ‖ π): the *other*
                          variance                    direction
    ====  ==============  ==========================  =================================

    k3 grows like r, which overflows: log r is bounded by
    :func:`bounded_log_ratio`.

    Parameters
    ----------
    log_prob, reference_log_prob : Tensor
        log π(a) and log π_ref(a) of the same sampled actions, same shape.
    kind : {"k1", "k2", "k3"}

    Returns
    -------
    Tensor
        The shape of the input, in nats. k2 and k3 are never negative; k1 can be.

    References
    ----------
    Schulman (2020), Approximating KL divergence, http://joschu.net/blog/kl-approx.html.
    Gradients: derived in the tests by enumeration; see also Tang and Munos (2025),
    arXiv:2506.09477.

    Examples
    --------
    >>> import torch
    >>> p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    >>> for kind in ("k1", "k2", "k3"):
    ...     print(f"{(p * kl_estimate(p.log(), q.log(), kind)).sum():.4f}")
    0.1438
    0.1612
    0.1438
    """
    check_shapes(log_prob=log_prob, reference_log_prob=reference_log_prob)
    log_ratio = reference_log_prob - log_prob
    if kind == "k1":
        return -log_ratio
    if kind == "k2":
        return 0.5 * log_ratio.square()
    if kind == "k3":
        return torch.expm1(bounded_log_ratio(log_ratio)) - log_ratio
    raise ValueError(f"kind must be 'k1', 'k2' or 'k3', got {kind!r}")


def kl_shaped_rewards(
    scores: Tensor,
    log_prob: Tensor,
    reference_log_prob: Tensor,
    mask: Tensor,
    *,
    beta: float,
    kind: Literal["k1", "k2", "k3"] = "k1",
) -> Tensor:
    r"""Rewards of the tokens in RLHF: a KL penalty on each, and the completion's score
    on the last.

    .. math:: r_t = -\beta\,\mathrm{kl}_t
              + [t \text{ is the last token}]\cdot\text{score}

    With k1, kl_t = log π(a_t|s_t) − log π_ref(a_t|s_t), the undiscounted return of a
    completion is score − β log(π/π_ref) of the whole, so that the policy gradient of
    these rewards is *exactly* the gradient of E[score] − β KL(π ‖ π_ref). With k2 and
    k3 it is not.

    Parameters
    ----------
    scores : Tensor
        Shape ``[B]``, one score per completion, in units of reward; or ``[B, T]``, one
        per token, where rewards come on the way.
    log_prob, reference_log_prob : Tensor
        Shape ``[B, T]``, of the sampled tokens, in nats.
    mask : Tensor
        Boolean ``[B, T]``; its last True marks the last token, wherever the padding is.
    beta : float
        β ≥ 0, units of reward per nat.
    kind : {"k1", "k2", "k3"}
        See :func:`kl_estimate`.

    Returns
    -------
    Tensor
        Shape ``[B, T]``; 0 at padding, whatever the log-probabilities hold there.

    Raises
    ------
    ValueError
        If a completion has no token, so that there is nowhere to put its score.

    References
    ----------
    Ziegler et al. (2019), Fine-tuning language models from human preferences,
    arXiv:1909.08593, eq. 2.

    Examples
    --------
    >>> import torch
    >>> log_prob = torch.tensor([[-1.0, -2.0, 0.0]])
    >>> mask = torch.tensor([[True, True, False]])
    >>> kl_shaped_rewards(torch.tensor([5.0]), log_prob, log_prob - 1, mask, beta=0.5)
    tensor([[-0.5000,  4.5000,  0.0000]])
    """
    require(0 <= beta < math.inf, "beta must be finite and >= 0", beta)
    check_shapes(log_prob=log_prob, reference_log_prob=reference_log_prob, mask=mask)
    shapes = tuple(log_prob.shape), tuple(scores.shape)
    fits = log_prob.ndim == 2 and scores.shape in (log_prob.shape[:1], log_prob.shape)
    require(fits, "log_prob must be [B, T] and scores [B] or [B, T]", shapes)
    if empty := (~mask.any(dim=1)).nonzero().flatten().tolist():
        raise ValueError(f"mask must hold a token in every row, got none in {empty}")
    position = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
    last = torch.where(mask, position, -1).amax(dim=1, keepdim=True)
    penalty = torch.where(mask, kl_estimate(log_prob, reference_log_prob, kind), 0.0)
    if scores.ndim == 1:
        scores = torch.where(position == last, scores.unsqueeze(1), 0.0)
    return torch.where(mask, scores, 0.0) - beta * penalty


def adaptive_kl_coefficient(
    beta: float, kl: float, *, target: float, gain: float = 0.1
) -> float:
    r"""Return the KL penalty's next coefficient, so that the KL divergence settles near
    a target.

    .. math:: \beta \leftarrow \beta\,\bigl(1 + K_\beta\, e\bigr), \qquad
              e = \operatorname{clip}\Bigl(
              \frac{\mathrm{KL} - \text{target}}{\text{target}}, -0.2, 0.2\Bigr)

    Parameters
    ----------
    beta : float
        Present coefficient β > 0, units of reward per nat.
    kl : float
        KL(π ‖ π_ref) of a completion measured on the last batch, in nats.
    target : float
        The divergence wanted, in nats, > 0.
    gain : float
        K_β, in (0, 5): one update changes β by at most a factor of 1 ± 0.2 K_β.

    References
    ----------
    Ziegler et al. (2019), arXiv:1909.08593, §2.2, with K_β = 0.1.

    Examples
    --------
    >>> kls = (0.0, 4.9, 5.0, 50.0)
    >>> [round(adaptive_kl_coefficient(1.0, kl, target=5.0), 3) for kl in kls]
    [0.98, 0.998, 1.0, 1.02]
    """
    require(0 < beta < math.inf, "beta must be finite and > 0", beta)
    require(0 < target < math.inf, "target must be finite and > 0", target)
    require(0 < gain < 5, "gain must lie in (0, 5), so that beta stays positive", gain)
    require(math.isfinite(kl), "kl must be finite", kl, "the policy may have diverged")
    error = min(max(kl / target - 1, -0.2), 0.2)
    return beta * (1 + gain * error)


def importance_weights(
    log_prob: Tensor,
    sampler_log_prob: Tensor,
    *,
    cap: float,
    mode: ImportanceMode = "token_truncate",
    mask: Tensor | None = None,
) -> Tensor:
    r"""Return importance weights c = π(a|s) / π_sampler(a|s), limited by a cap C, with
    no gradient.

    They correct a loss whose samples came from a slightly different policy than the
    trainer believes: another numerical precision, another kernel, an older copy of the
    weights. Without a limit the correction is unbiased, but its variance may be
    infinite; a limit bounds it, at the price of a bias that only counts where the ratio
    is beyond it.

    Parameters
    ----------
    log_prob, sampler_log_prob : Tensor
        log-probabilities of the sampled actions under the policy to be trained, before
        its first update on them, and under the distribution really sampled from; same
        shape. Where both are 0 (padding) the weight of a token is 1.
    cap : float
        C ≥ 1.
    mode : {"token_truncate", "token_mask", "sequence_truncate", "sequence_mask"}
        c of each token, right given what stands before it; or of its whole sequence,
        the product of those of its tokens, which is right for what stands before it
        too, and far more scattered. Truncated, it is min(c, C); masked, it is 0 where c
        is outside [1/C, C].
    mask : Tensor, optional
        Boolean, the same shape: the tokens of a sequence, along the last dimension.
        Needed for whole sequences.

    Returns
    -------
    Tensor
        The shape of the input; multiply the per-item loss by it.

    References
    ----------
    Ionides (2008), Truncated importance sampling, doi:10.1198/106186008X320456.

    Examples
    --------
    >>> import torch
    >>> ratio = torch.tensor([0.5, 1.0, 3.0])
    >>> importance_weights(ratio.log(), torch.zeros(3), cap=2.0)
    tensor([0.5000, 1.0000, 2.0000])
    >>> importance_weights(ratio.log(), torch.zeros(3), cap=2.0, mode="token_mask")
    tensor([0.5000, 1.0000, 0.0000])
    """
    require(cap >= 1, "cap must be >= 1, or it shrinks weights that are right", cap)
    check_shapes(log_prob=log_prob, sampler_log_prob=sampler_log_prob)
    level, _, limit = mode.partition("_")
    known = level in ("token", "sequence") and limit in ("truncate", "mask")
    require(known, "mode must be token or sequence, _truncate or _mask", mode)
    log_ratio = (log_prob - sampler_log_prob).detach()
    if level == "sequence":
        require(mask is not None, "mask must be given for whole sequences", mask)
        whole = sequence_log_prob(log_ratio, cast(Tensor, mask))
        log_ratio = whole[..., None].expand_as(log_ratio)
    if limit == "truncate":
        return torch.exp(log_ratio).clamp(max=cap)
    return torch.where(log_ratio.abs() <= math.log(cap), torch.exp(log_ratio), 0.0)


def sequence_log_prob(
    log_prob: Tensor, mask: Tensor, *, reduction: Literal["sum", "mean"] = "sum"
) -> Tensor:
    r"""Log-probability of whole completions from those of their tokens.

    Parameters
    ----------
    log_prob : Tensor
        log π(a_t|s_t), ``[..., T]``.
    mask : Tensor
        Boolean, the same shape. Masked-out entries do not count, even if they are NaN.
    reduction : {"sum", "mean"}
        ``"sum"`` is log π(completion | prompt). ``"mean"`` divides it by the number of
        tokens: no longer the log-probability of anything, but comparable between
        completions of different length.

    Returns
    -------
    Tensor
        Shape ``[...]``, in nats (per token with ``"mean"``); 0 for a completion without
        tokens.

    Examples
    --------
    >>> import torch
    >>> log_prob = torch.tensor([[-1.0, -3.0, 9.0]])
    >>> mask = torch.tensor([[True, True, False]])
    >>> sequence_log_prob(log_prob, mask)
    tensor([-4.])
    >>> sequence_log_prob(log_prob, mask, reduction="mean")
    tensor([-2.])
    """
    check_shapes(log_prob=log_prob, mask=mask)
    total = torch.where(mask, log_prob, 0.0).sum(dim=-1)
    if reduction == "sum":
        return total
    if reduction == "mean":
        return total / mask.sum(dim=-1).clamp(min=1)
    raise ValueError(f"reduction must be 'sum' or 'mean', got {reduction!r}")


def explained_variance(values: Tensor, targets: Tensor) -> Tensor:
    """Share of the targets' variance that the value function explains, 1 − Var(target −
    V) / Var(target).

    1 is perfect, 0 is no better than a constant, below 0 is worse than one; NaN when
    the targets do not vary.

    Parameters
    ----------
    values, targets : Tensor
        Same shape.

    Examples
    --------
    >>> import torch
    >>> explained_variance(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 3.0])).item()
    0.75
    """
    _check_series(values=values, targets=targets)
    variance = targets.var(correction=0)
    residual = (targets - values).var(correction=0)
    return torch.where(variance > 0, 1 - residual / variance, torch.nan)
