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
    generator = torch.Generator().manual_seed(seed)
    root = torch.randn(size, size, generator=generator, dtype=torch.float64)
    b = torch.randn(size, generator=generator, dtype=torch.float64)
    A = root @ root.T + 0.1 * torch.eye(size, dtype=torch.float64)
    return {"A": A, "b": b, "iterations": iterations}


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


def _update_case(
    seed: int, states: int, actions: int, size: int, kl_limit: float
) -> dict[str, Any]:
    case = _features_case(seed, states, actions, size)
    generator = torch.Generator().manual_seed(1000 + seed)
    return {
        "features": case["features"],
        "theta": case["theta"],
        "actions": torch.randint(actions, (states,), generator=generator),
        "weights": torch.randn(states, generator=generator, dtype=torch.float64),
        "kl_limit": kl_limit,
    }


def _update(
    *,
    damping: float = 0.1,
    natural: bool = True,
    sign: float = 1.0,
    trials: int = 10,
    checks_kl: bool = True,
    checks_loss: bool = True,
    moves: bool = True,
    forward: bool = True,
    refuses: bool = True,
) -> Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]:
    """Return TRPO's step from the closed forms of a softmax policy: its scores, its
    Fisher matrix, its gradient; or one with a fault.
    """

    def update(
        features: Tensor, theta: Tensor, actions: Tensor, weights: Tensor, limit: float
    ) -> Tensor:
        states, size = len(actions), len(theta)
        p = (features @ theta).softmax(-1)
        scores = features - torch.einsum("sa,sai->si", p, features)[:, None]
        fisher = torch.einsum("sa,sai,saj->ij", p, scores, scores) / states
        damped = fisher + damping * torch.eye(size, dtype=theta.dtype)
        taken = torch.arange(states)
        uphill = (weights[:, None] * scores[taken, actions]).mean(0)
        direction = torch.linalg.solve(damped, uphill) if natural else uphill
        curvature = direction @ damped @ direction
        full = sign * torch.sqrt(2 * limit / curvature) * direction
        if trials == 0:
            return theta + full
        for k in range(trials):
            step = 0.8**k * full
            q = (features @ (theta + step)).softmax(-1)
            first, second = (p, q) if forward else (q, p)
            kl = (first * (first / second).log()).sum(-1).mean()
            ratio = (q / p)[taken, actions]
            gain = (weights * (ratio - 1)).mean() if moves else 0 * kl
            near = not checks_kl or kl <= limit
            better = not checks_loss or gain >= 0.1 * (uphill @ step) > 0
            if near and better:
                return theta + step
        return theta if refuses else theta + step

    return update


_UPDATES: tuple[dict[str, Any], ...] = (
    _update_case(0, 6, 3, 4, 0.01),
    _update_case(1, 4, 3, 6, 1.0),  # the full step leaves the trust region
    _update_case(0, 3, 3, 3, 4.0),  # and here it promises too much
    _update_case(1, 3, 3, 3, 0.3),  # the two directions of the KL disagree
    _update_case(13, 4, 3, 6, 1.0),  # a smaller or larger gain asked for: another trial
    _update_case(7, 3, 3, 3, 100.0),  # the tenth trial passes
    _update_case(20, 3, 3, 3, 100.0),  # ten trials fail, the eleventh would pass
)

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
        name="trpo.minimal-loop",
        reference=_update(),
        cases=_UPDATES,
        mistakes={
            "Nothing moves: is the old policy recomputed in every trial, so that the "
            "ratio is always 1? It must stay that of the data": _update(moves=False),
            "That goes uphill: the gradient is that of a loss": _update(
                sign=-1.0, checks_loss=False
            ),
            "That is the full step: where is the line search?": _update(trials=0),
            "The KL of a trial is not compared with the limit": _update(
                checks_kl=False
            ),
            "The loss of a trial is not compared with the old one": _update(
                checks_loss=False
            ),
            "That goes along the ordinary gradient: solve with F": _update(
                natural=False
            ),
            "The damping is missing: solve with F + 0.1 I": _update(damping=1e-9),
            "That limits KL(new‖old); TRPO limits KL(old‖new)": _update(forward=False),
            "If every trial fails, nothing moves": _update(refuses=False),
        },
    ),
)
