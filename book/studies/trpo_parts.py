"""TRPO on CartPole without one of its parts; the natural gradient with a fixed rate; and one episode per update."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from _control import measure
from torch import Tensor
from torch.nn.utils import parameters_to_vector, vector_to_parameters

from policyopt.control import TRPOConfig, train_trpo
from policyopt.trust_region import (
    LineSearch,
    TrustRegionStep,
    conjugate_gradient,
    fisher_vector_product,
    trust_region_step,
)
from policyopt_book.studies import Study

STEPS = 20_000


def take_the_full_step(evaluate: Callable[[float], tuple[float, float]], **known: Any) -> LineSearch:
    """In place of line_search: accept the full step, whatever it does."""
    loss, kl = evaluate(1.0)
    gain = known["old_loss"] - loss
    return LineSearch(True, 1.0, gain, kl, [(1.0, gain, kl)], "accepted")


def fixed_rate(
    parameters: Sequence[Tensor],
    loss_and_kl: Callable[[], tuple[Tensor, Tensor]],
    *,
    rate: float,
    damping: float,
    cg_iterations: int,
    **_: Any,
) -> TrustRegionStep:
    """In place of trust_region_step: the natural gradient times a rate (Kakade 2001)."""
    loss, kl = loss_and_kl()
    gradient = parameters_to_vector(torch.autograd.grad(loss, parameters, retain_graph=True))
    product = fisher_vector_product(kl, parameters, damping=damping)
    solved = conjugate_gradient(product, gradient, iterations=cg_iterations)
    with torch.no_grad():
        vector_to_parameters(parameters_to_vector(parameters) - rate * solved.solution, parameters)
        new_loss, new_kl = loss_and_kl()
    gain = loss.item() - new_loss.item()
    search = LineSearch(True, 1.0, gain, new_kl.item(), [], "accepted")
    predicted = rate * (gradient @ solved.solution).item()
    residual = solved.residual_norms[-1] / solved.residual_norms[0]
    return TrustRegionStep(search, predicted, gradient.norm().item(), residual)


CARTPOLE = {"num_envs": 16, "rollout_steps": 64, "gamma": 0.98, "gae_lambda": 0.9}
CARTPOLE["critic_learning_rate"] = 3e-3
WITHOUT_CRITIC = {"use_critic": False, "rollout_steps": None, "gae_lambda": 1.0}
# The loop of the article: one whole episode per update.
EPISODE = {**WITHOUT_CRITIC, "num_envs": 1, "gamma": 0.99}
VARIANTS: dict[str, dict[str, Any]] = {
    "TRPO": {},
    "no critic": WITHOUT_CRITIC,
    "damping 10": {"damping": 10.0},
    "damping 0.00001": {"damping": 1e-5},
    "the same, no line search": {
        "damping": 1e-5,
        "step": partial(trust_region_step, search=take_the_full_step),
    },
    "1 CG iteration": {"cg_iterations": 1},
    "fixed rate 0.3": {"step": partial(fixed_rate, rate=0.3)},
    "fixed rate 1": {"step": partial(fixed_rate, rate=1.0)},
    "fixed rate 3": {"step": partial(fixed_rate, rate=3.0)},
    "one episode": EPISODE,
    "one episode, KL 0.0001": {**EPISODE, "kl_limit": 1e-4},
}


def run(*, seed: int, variant: str) -> dict[str, Any]:
    """Train once."""
    settings: dict[str, Any] = {**CARTPOLE, **VARIANTS[variant]}
    step = settings.pop("step", trust_region_step)
    config = TRPOConfig(total_steps=STEPS, device="cpu", **settings)
    result = train_trpo("CartPole-v1", config, seed=seed, step=step, progress=False)
    rows = list(result.history)
    kls = [row.kl for row in rows]
    return {
        **measure(result, STEPS),
        "updates": len(rows),
        "kl_mean": sum(kls) / len(rows),
        "kl_max": max(kls),
        "fraction": sum(row.step_fraction for row in rows) / len(rows),
        "residual": sum(row.cg_residual for row in rows) / len(rows),
    }


STUDY = Study(
    name="trpo_parts",
    run=run,
    settings=[{"variant": variant} for variant in VARIANTS],
    seeds=10,
    sample={"variant": "fixed rate 1"},
)

if __name__ == "__main__":
    STUDY.main()
