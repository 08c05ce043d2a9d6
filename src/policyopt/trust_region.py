"""One step of trust-region policy optimisation: Fisher-vector product, conjugate
gradient, line search.

The problem of each step is

    minimise  L(θ)   subject to   KL(π_old ‖ π_θ) ≤ δ_KL   (mean over states)

with L the surrogate loss. To first order in L and second order in the KL its solution
is Δθ = −√(2 δ_KL / gᵀF⁻¹g) · F⁻¹g, with g = ∇L and F the Fisher matrix. F is never
formed: conjugate gradient needs only F·v. The line search then restores what the
expansion gave up: it shortens the step until the *measured* KL and the *measured* loss
both agree, and refuses it otherwise.

The functions know nothing about environments or networks; they see parameters, a scalar
KL and a scalar loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils import parameters_to_vector

from policyopt._checks import require

__all__ = [
    "ConjugateGradient", "LineSearch", "TrustRegionStep", "conjugate_gradient",
    "fisher_vector_product", "line_search", "trust_region_step",
]  # fmt: skip


@dataclass(frozen=True)
class ConjugateGradient:
    """Result of :func:`conjugate_gradient`."""

    solution: Tensor
    """x with A x ≈ b, shape ``[P]``."""
    residual_norms: list[float]
    """‖b − A x‖ before the first and after every iteration."""


@dataclass(frozen=True)
class LineSearch:
    """Result of :func:`line_search`."""

    accepted: bool
    fraction: float
    """Length of the accepted step as a fraction of the full one; 0 when refused."""
    improvement: float
    """L(old) − L(new), measured; 0 when refused."""
    kl: float
    """Measured KL of the accepted step in nats; 0 when refused."""
    tried: list[tuple[float, float, float]]
    """Each trial as (fraction, improvement, kl), refused ones included."""
    reason: str
    """Why the search ended: ``"accepted"``, or what was wrong with the last trial."""


@dataclass(frozen=True)
class TrustRegionStep:
    """Result of :func:`trust_region_step`."""

    search: LineSearch
    expected_improvement: float
    """First-order prediction gᵀΔθ of the full step's improvement."""
    gradient_norm: float
    residual: float
    """‖g − (F + damping·I) x‖ / ‖g‖ after conjugate gradient, by its recursion: near 0
    the damped system is solved.
    """


def _flat_gradient(
    output: Tensor, theta: Sequence[Tensor], *, twice: bool = False
) -> Tensor:
    """Differentiate, keeping the graph; ``twice`` when the result is to be
    differentiated in turn.
    """
    gradients = torch.autograd.grad(
        output, theta, retain_graph=True, create_graph=twice, materialize_grads=True
    )
    return torch.cat([g.reshape(-1) for g in gradients])


@torch.no_grad()
def _assign(parameters: Sequence[Tensor], vector: Tensor) -> None:
    pieces = vector.split([p.numel() for p in parameters])
    for parameter, piece in zip(parameters, pieces, strict=True):
        parameter.copy_(piece.view_as(parameter))


def fisher_vector_product(
    kl: Tensor, parameters: Iterable[Tensor], *, damping: float = 0.0
) -> Callable[[Tensor], Tensor]:
    r"""Return the map v ↦ (F + damping·I) v, where F is the Hessian of ``kl`` in the
    parameters.

    At π_θ = π_old the gradient of mean KL(π_old ‖ π_θ) is 0 and its Hessian is the
    Fisher matrix E[∇log π ∇log πᵀ]. Differentiating (∇kl)ᵀv once more gives F v at the
    price of two backward passes (Pearlmutter 1994), without the P × P matrix.

    Parameters
    ----------
    kl : Tensor
        Scalar mean KL(π_old ‖ π_θ), with its graph, evaluated at θ = θ_old; π_old
        detached.
    parameters : iterable of Tensor
        The ``P`` numbers θ, as leaf tensors.
    damping : float
        ≥ 0, added to the diagonal: it bounds the step along directions the data say
        nothing about.

    Returns
    -------
    callable
        Maps ``[P]`` to ``[P]``; may be called any number of times.
    """
    require(damping >= 0, "damping must be >= 0", damping)
    require(kl.ndim == 0, "kl must be a scalar mean", tuple(kl.shape))
    theta = list(parameters)
    gradient = _flat_gradient(kl, theta, twice=True)

    def product(vector: Tensor) -> Tensor:
        along = gradient @ vector.detach()
        return _flat_gradient(along, theta) + damping * vector

    return product


def conjugate_gradient(
    matvec: Callable[[Tensor], Tensor],
    b: Tensor,
    *,
    iterations: int = 10,
    tolerance: float = 1e-5,
) -> ConjugateGradient:
    r"""Solve A x = b for a symmetric positive-definite A that is known only as a
    product.

    Starts at x = 0 and stops after ``iterations`` or when ‖b − A x‖ ≤
    ``tolerance``·‖b‖. In exact arithmetic P iterations solve a P × P system; the first
    few already find the directions with large eigenvalues.

    Parameters
    ----------
    matvec : callable
        v ↦ A v, both ``[P]``.
    b : Tensor
        Right-hand side ``[P]``.
    iterations : int
        ≥ 1.
    tolerance : float
        Relative residual, ≥ 0.

    Raises
    ------
    FloatingPointError
        If A turns out not to be positive definite along a search direction (curvature ≤
        0, or NaN).

    References
    ----------
    Hestenes and Stiefel (1952), doi:10.6028/jres.049.044.

    Examples
    --------
    >>> import torch
    >>> a = torch.tensor([[4.0, 1.0], [1.0, 3.0]])
    >>> conjugate_gradient(lambda v: a @ v, torch.tensor([1.0, 2.0])).solution
    tensor([0.0909, 0.6364])
    """
    require(iterations >= 1, "iterations must be >= 1", iterations)
    require(tolerance >= 0, "tolerance must be >= 0", tolerance)
    x, residual, direction = torch.zeros_like(b), b, b
    squared = residual @ residual
    norms = [math.sqrt(squared.item())]
    for _ in range(iterations):
        if norms[-1] <= tolerance * norms[0]:
            break
        product = matvec(direction)
        curvature = direction @ product
        if not bool(curvature > 0):
            raise FloatingPointError(
                f"matvec must be positive definite, got vᵀAv = {curvature.item():.3g}; "
                "raise the damping, or check the data for NaN"
            )
        step = squared / curvature
        x = x + step * direction
        residual = residual - step * product
        previous, squared = squared, residual @ residual
        direction = residual + (squared / previous) * direction
        norms.append(math.sqrt(squared.item()))
    return ConjugateGradient(solution=x, residual_norms=norms)


def line_search(
    evaluate: Callable[[float], tuple[float, float]],
    *,
    old_loss: float,
    expected_improvement: float,
    kl_limit: float,
    backtracks: int = 10,
    shrink: float = 0.8,
    accept_ratio: float = 0.1,
) -> LineSearch:
    r"""Shorten a step until it keeps the KL limit and improves the loss; refuse it if
    no length does.

    Trial k has the length fraction f = ``shrink``\ :sup:`k`. It is accepted when its
    measured KL is at most ``kl_limit`` and its measured improvement is positive and at
    least ``accept_ratio`` · f · ``expected_improvement``.

    Parameters
    ----------
    evaluate : callable
        fraction ↦ (loss, kl) at θ_old + fraction · Δθ. Called last with the fraction
        that was accepted; the caller restores θ_old when the step is refused.
    old_loss : float
        L(θ_old).
    expected_improvement : float
        First-order prediction for the full step, −gᵀΔθ > 0 for a descent direction.
    kl_limit : float
        δ_KL > 0, in nats.
    backtracks : int
        Largest number of trials, ≥ 1.
    shrink : float
        In (0, 1).
    accept_ratio : float
        In [0, 1): the share of the predicted improvement that must be real (Armijo).
    """
    require(kl_limit > 0, "kl_limit must be > 0", kl_limit)
    require(backtracks >= 1, "backtracks must be >= 1", backtracks)
    require(0 < shrink < 1, "shrink must lie in (0, 1)", shrink)
    require(0 <= accept_ratio < 1, "accept_ratio must lie in [0, 1)", accept_ratio)
    tried: list[tuple[float, float, float]] = []
    reason = ""
    for k in range(backtracks):
        fraction = shrink**k
        loss, kl = evaluate(fraction)
        improvement = old_loss - loss
        needed = accept_ratio * fraction * expected_improvement
        tried.append((fraction, improvement, kl))
        # Written so that NaN fails both comparisons.
        if not kl <= kl_limit:
            reason = f"KL {kl:.3g} above the limit {kl_limit:.3g}"
        elif not improvement > 0 or not improvement >= needed:
            share = f"{accept_ratio:g} of the predicted one"
            reason = f"improvement {improvement:.3g} below {share}"
        else:
            return LineSearch(True, fraction, improvement, kl, tried, "accepted")
    return LineSearch(False, 0.0, 0.0, 0.0, tried, reason)


def trust_region_step(
    parameters: Iterable[Tensor],
    loss_and_kl: Callable[[], tuple[Tensor, Tensor]],
    *,
    kl_limit: float = 0.01,
    damping: float = 0.1,
    cg_iterations: int = 10,
    backtracks: int = 10,
    shrink: float = 0.8,
    accept_ratio: float = 0.1,
    search: Callable[..., LineSearch] = line_search,
) -> TrustRegionStep:
    r"""Take one natural-gradient step on ``parameters``, in place, inside the trust
    region.

    1. g = ∇L, and x = (F + damping·I)⁻¹ g by :func:`conjugate_gradient`.
    2. Full step Δθ = −√(2 δ_KL / xᵀ(F + damping·I)x) · x: the longest one the quadratic
       model of the KL allows.
    3. :func:`line_search` along Δθ with the true loss and KL. A refused step leaves the
       parameters untouched, bit for bit.

    Parameters
    ----------
    parameters : iterable of Tensor
        Leaf tensors θ, changed in place.
    loss_and_kl : callable
        () ↦ (L(θ), mean KL(π_old ‖ π_θ)) as scalars with graph, at the current value of
        the parameters. π_old is the policy at the time of the call of this function.
    kl_limit, damping, cg_iterations, backtracks, shrink, accept_ratio
        See :func:`conjugate_gradient`, :func:`fisher_vector_product` and
        :func:`line_search`.
    search : callable
        What chooses the length; called as :func:`line_search` is.

    References
    ----------
    Schulman et al. (2015), arXiv:1502.05477, appendix C.
    """
    theta = list(parameters)
    loss, kl = loss_and_kl()
    gradient = _flat_gradient(loss, theta)
    gradient_norm = float(gradient.norm())
    if not math.isfinite(gradient_norm):
        raise FloatingPointError(f"the loss's gradient is not finite: {gradient_norm}")
    if gradient_norm == 0.0:
        still = LineSearch(False, 0.0, 0.0, 0.0, [], "the gradient is zero")
        return TrustRegionStep(still, 0.0, 0.0, 0.0)

    product = fisher_vector_product(kl, theta, damping=damping)
    cg = conjugate_gradient(product, gradient, iterations=cg_iterations)
    curvature = cg.solution @ product(cg.solution)
    full_step = -torch.sqrt(2 * kl_limit / curvature) * cg.solution
    expected = float(-(gradient @ full_step))

    start = parameters_to_vector(theta).detach().clone()

    @torch.no_grad()
    def evaluate(fraction: float) -> tuple[float, float]:
        _assign(theta, start + fraction * full_step)
        new_loss, new_kl = loss_and_kl()
        return float(new_loss), float(new_kl)

    found = None
    try:
        found = search(
            evaluate, old_loss=loss.item(), expected_improvement=expected,
            kl_limit=kl_limit, backtracks=backtracks, shrink=shrink,
            accept_ratio=accept_ratio,
        )  # fmt: skip
    # Also when an exception (Ctrl-C) breaks off the search at an untested length.
    finally:
        if found is None or not found.accepted:
            _assign(theta, start)
    residual = cg.residual_norms[-1] / cg.residual_norms[0]
    return TrustRegionStep(found, expected, gradient_norm, residual)
