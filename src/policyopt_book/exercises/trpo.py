"""Exercises of the chapter on trust region policy optimisation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from policyopt_book.exercises import Exercise

__all__ = ["EXERCISES"]


def _gaussian_fisher(sigma: float) -> tuple[Tensor, Tensor]:
    """Return the mean outer product of the scores, over a fine grid of actions round
    the mean 0.3.
    """
    actions = 0.3 + sigma * torch.linspace(-10, 10, 2001, dtype=torch.float64)
    weight = torch.softmax(-((actions - 0.3) ** 2) / (2 * sigma**2), 0)
    found = []
    for of_log in (True, False):
        # One copy of both numbers per action, so that one backward pass gives all
        # scores.
        mean = torch.full_like(actions, 0.3).requires_grad_()
        spread = torch.full_like(actions, sigma)
        spread = (spread.log() if of_log else spread).requires_grad_()
        std = spread.exp() if of_log else spread
        log_density = -((actions - mean) ** 2) / (2 * std**2) - std.log()
        scores = torch.stack(torch.autograd.grad(log_density.sum(), (mean, spread)))
        found.append(((scores * weight) @ scores.T).round(decimals=9) + 0.0)
    return found[0], found[1]


def _diagonals(
    by_log: Callable[[float], float],
    by_sigma: Callable[[float], float],
    power: float = 2.0,
) -> Any:
    def fisher(sigma: float) -> tuple[Tensor, Tensor]:
        corner = sigma**-power
        return (
            torch.diag(torch.tensor([corner, by_log(sigma)])),
            torch.diag(torch.tensor([corner, by_sigma(sigma)])),
        )

    return fisher


def _step_case(seed: int, size: int, factor: float, kl_limit: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    gradient = factor * torch.randn(size, generator=generator, dtype=torch.float64)
    identity = torch.eye(size, dtype=torch.float64)
    return {
        "gradient": gradient,
        "fisher": root @ root.T + 0.1 * identity,
        "kl_limit": kl_limit,
    }


def _trust_region_step(gradient: Tensor, fisher: Tensor, kl_limit: float) -> Tensor:
    """Return the lowest point of a linear loss in the ellipsoid, which is a ball in the
    right coordinates.
    """
    eigenvalues, vectors = torch.linalg.eigh(fisher)
    slope = (vectors.T @ gradient) / eigenvalues.sqrt()
    in_ball = -((2 * kl_limit) ** 0.5) * slope / slope.norm()
    step: Tensor = vectors @ (in_ball / eigenvalues.sqrt())
    return step


def _along_gradient(gradient: Tensor, fisher: Tensor, kl_limit: float) -> Tensor:
    return -gradient * torch.sqrt(2 * kl_limit / (gradient @ fisher @ gradient))


def _without_root(gradient: Tensor, fisher: Tensor, kl_limit: float) -> Tensor:
    x: Tensor = torch.linalg.solve(fisher, gradient)
    return -x * (2 * kl_limit / (gradient @ x))


def _features_case(seed: int, states: int, actions: int, size: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"features": (states, actions, size), "theta": (size,), "v": (size,)}
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64)
        for name, shape in shapes.items()
    }


def _fisher_product(
    features: Tensor, theta: Tensor, v: Tensor, weights: Tensor | None = None
) -> Tensor:
    """Return the covariance of the features under the policy, mean over states, times
    v.
    """
    states, actions, size = features.shape
    fisher = torch.zeros(size, size, dtype=features.dtype)
    for s in range(states):
        p = (features[s] @ theta).softmax(0)
        scores = features[s] - p @ features[s]
        for a in range(actions):
            fisher += (
                (p[a] if weights is None else weights[a])
                * torch.outer(scores[a], scores[a])
                / states
            )
    return fisher @ v


def _uniform_fisher(features: Tensor, theta: Tensor, v: Tensor) -> Tensor:
    actions = features.shape[1]
    return _fisher_product(
        features, theta, v, torch.full((actions,), 1 / actions, dtype=features.dtype)
    )


def _system_case(seed: int, size: int, iterations: int) -> dict[str, Any]:
    return {
        "A": _step_case(seed, size, 1.0, 0.0)["fisher"],
        "b": _step_case(seed, size, 1.0, 0.0)["gradient"],
        "iterations": iterations,
    }


def _softmax_system() -> dict[str, Any]:
    """Return the singular Fisher matrix of a softmax policy, with a right-hand side it
    can reach.
    """
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    advantages = torch.tensor([1.0, 0.0, 2.0, -1.0], dtype=torch.float64)
    return {
        "A": torch.diag(p) - torch.outer(p, p),
        "b": p * (advantages - p @ advantages),
        "iterations": 3,
    }


def _solve(A: Tensor, b: Tensor, iterations: int) -> Tensor:
    """Return the minimum of x·Ax/2 − b·x among the combinations of b, Ab, A²b, ..., one
    per iteration.
    """
    basis: list[Tensor] = []
    following = b
    for _ in range(iterations):
        for _ in range(2):  # twice, against rounding
            for known in basis:
                following = following - (known @ following) * known
        if following.norm() <= 1e-9 * b.norm():
            break
        basis.append(following / following.norm())
        following = A @ basis[-1]
    K = torch.stack(basis, 1)
    coefficients: Tensor = torch.linalg.solve(K.T @ A @ K, K.T @ b)
    return K @ coefficients


def _iterated(
    *, conjugate: bool = True, stops: bool = True
) -> Callable[[Tensor, Tensor, int], Tensor]:
    """Return the iteration, with steepest descent in place of conjugate directions, or
    without a stop.
    """

    def solve(A: Tensor, b: Tensor, iterations: int) -> Tensor:
        x, residual, direction = torch.zeros_like(b), b, b
        for _ in range(iterations):
            if stops and residual.norm() < 1e-12:
                break
            step = (residual @ residual) / (direction @ A @ direction)
            x = x + step * direction
            shorter = residual - step * (A @ direction)
            factor = (shorter @ shorter) / (residual @ residual) if conjugate else 0.0
            residual, direction = shorter, shorter + factor * direction
        return x

    return solve


def _line_case(seed: int, states: int, actions: int, kl_limit: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    logits, x = torch.randn(
        2, states, actions, generator=generator, dtype=torch.float64
    )
    return {"logits": logits, "x": x, "kl_limit": kl_limit}


def _longest(
    logits: Tensor,
    x: Tensor,
    kl_limit: float,
    *,
    forward: bool = True,
    mean: bool = True,
    sign: float = -1.0,
) -> float:
    """Narrow a grid of factors round the place where the KL crosses the limit."""
    p = logits.softmax(-1)
    low, high = 0.0, 100.0
    for _ in range(8):
        factors = torch.linspace(low, high, 101, dtype=logits.dtype)
        q = (logits + sign * factors[:, None, None] * x).log_softmax(-1)
        by_state = (
            (p * (p.log() - q)).sum(-1)
            if forward
            else (q.exp() * (q - p.log())).sum(-1)
        )
        kl = by_state.mean(-1) if mean else by_state.amax(-1)
        inside = int((kl <= kl_limit).sum()) - 1  # the KL grows along the line
        low, high = float(factors[inside]), float(factors[inside + 1])
    return low


def _model_length(logits: Tensor, x: Tensor, kl_limit: float) -> Tensor:
    p = logits.softmax(-1)
    variance = (p * x**2).sum(-1) - (p * x).sum(-1) ** 2
    return torch.sqrt(2 * kl_limit / variance.mean())


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="trpo.gaussian-fisher",
        reference=_gaussian_fisher,
        cases=({"sigma": 0.5}, {"sigma": 2.0}),
        mistakes={
            "The squared score of log σ has mean 2, not 1: the fourth moment of a "
            "standard normal is 3": (
                _diagonals(lambda sigma: 1.0, lambda sigma: 1 / sigma**2)
            ),
            "Both are the matrix of (μ, log σ); in (μ, σ) the second score is "
            "divided by σ": (_diagonals(lambda sigma: 2.0, lambda sigma: 2.0)),
            "In (μ, σ) the second score is divided by σ, so its square by σ², not by "
            "σ": (_diagonals(lambda sigma: 2.0, lambda sigma: 2 / sigma)),
            "The two matrices are in the other order": _diagonals(
                lambda sigma: 2 / sigma**2, lambda sigma: 2.0
            ),
            "The entry of μ is 1 over the variance, not over the standard deviation": (
                _diagonals(lambda sigma: 2.0, lambda sigma: 2 / sigma**2, power=1.0)
            ),
        },
    ),
    Exercise(
        name="trpo.step",
        reference=_trust_region_step,
        cases=(
            _step_case(0, 3, 1.0, 0.01),
            _step_case(
                0, 3, 1000.0, 0.01
            ),  # the same step: the scale of the rewards must not matter
            _step_case(1, 5, 1.0, 0.5),
        ),
        mistakes={
            "That steps uphill: the gradient is that of a loss": (
                lambda gradient, fisher, kl_limit: (
                    -_trust_region_step(gradient, fisher, kl_limit)
                )
            ),
            "That is the ordinary gradient, with the right length": _along_gradient,
            "The square root is missing, so the step shrinks when the "
            "rewards grow": _without_root,
            "The KL is half of Δ·FΔ, so the root must hold 2 δ": (
                lambda gradient, fisher, kl_limit: _trust_region_step(
                    gradient, fisher, kl_limit / 2
                )
            ),
            "The length does not depend on the KL limit: that is −F⁻¹g": (
                lambda gradient, fisher, kl_limit: -torch.linalg.solve(fisher, gradient)
            ),
        },
    ),
    Exercise(
        name="trpo.fisher-product",
        reference=_fisher_product,
        cases=(
            _features_case(0, 4, 3, 5),
            _features_case(1, 1, 2, 3),
            _features_case(2, 6, 4, 4),
        ),
        mistakes={
            "Both sides of the KL follow θ, so it is 0 everywhere and so is its "
            "Hessian: detach the old policy": (
                lambda features, theta, v: torch.zeros_like(v)
            ),
            "That is the sum over states; the KL of TRPO is their mean": (
                lambda features, theta, v: (
                    _fisher_product(features, theta, v) * len(features)
                )
            ),
            "All actions count the same; each must count with its "
            "probability": _uniform_fisher,
        },
    ),
    Exercise(
        name="trpo.conjugate-gradient",
        reference=_solve,
        cases=(
            _system_case(0, 6, 3),
            _system_case(1, 4, 4),
            {  # solved after one iteration: nothing is left to divide by
                "A": torch.diag(torch.tensor([2.0, 4.0, 8.0], dtype=torch.float64)),
                "b": torch.tensor([0.0, 2.0, 0.0], dtype=torch.float64),
                "iterations": 3,
            },
            _softmax_system(),
        ),
        mistakes={
            "The next direction is the residual itself; the part along the last "
            "direction is missing": (_iterated(conjugate=False)),
            "When the system is solved early, 0 is divided by 0: stop there": _iterated(
                stops=False
            ),
            "That is the exact solution, not the one after so many iterations": (
                lambda A, b, iterations: torch.linalg.pinv(A) @ b
            ),
        },
    ),
    Exercise(
        name="trpo.longest-step",
        reference=_longest,
        cases=(
            _line_case(0, 4, 3, 0.01),
            _line_case(1, 3, 4, 0.3),
            _line_case(2, 1, 2, 1.0),
        ),
        mistakes={
            "The arguments of the KL are exchanged: the old policy comes first": (
                lambda logits, x, kl_limit: _longest(logits, x, kl_limit, forward=False)
            ),
            "The limit is on the mean KL over states, not on the largest": (
                lambda logits, x, kl_limit: _longest(logits, x, kl_limit, mean=False)
            ),
            "That goes along +x; the step is downhill, along −x": (
                lambda logits, x, kl_limit: _longest(logits, x, kl_limit, sign=1.0)
            ),
            "That is the length by the quadratic model (11); measure "
            "the KL instead": _model_length,
        },
    ),
)
