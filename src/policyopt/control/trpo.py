"""TRPO: natural-gradient steps inside a KL trust region, with a line search that keeps
them honest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, ClassVar

import torch
from torch import Tensor

from policyopt import losses
from policyopt.control.config import ActorCriticConfig
from policyopt.control.environments import EnvLike
from policyopt.control.policies import Critic, Policy
from policyopt.control.results import TrainResult, Update
from policyopt.control.steps import Steps, critic_fit, critic_loss, estimate_advantages
from policyopt.control.training import Run
from policyopt.distributions import Distribution
from policyopt.frame import Callback, Statistics
from policyopt.runs import Bound, Count, NonNegative, Positive
from policyopt.trust_region import TrustRegionStep, trust_region_step

__all__ = ["TRPOConfig", "TRPOUpdate", "train_trpo", "trpo_loss"]


@dataclass(frozen=True, kw_only=True)
class TRPOConfig(ActorCriticConfig):
    """Settings of :func:`train_trpo`."""

    renamed: ClassVar[dict[str, str]] = {"critic_minibatch": "critic_minibatch_size"}

    kl_limit: Positive = 0.01
    """δ_KL: largest mean KL(π_old ‖ π_new) of an update, in nats."""
    damping: NonNegative = 0.1
    """Added to the Fisher matrix's diagonal, ≥ 0."""
    cg_iterations: Count = 10
    """Iterations of conjugate gradient per update, ≥ 1."""
    backtracks: Count = 10
    """Trials of the line search, ≥ 1."""
    shrink: Annotated[float, Bound("in (0, 1)", lambda x: 0 < x < 1)] = 0.8
    """Factor between two trials, in (0, 1)."""
    accept_ratio: Annotated[float, Bound("in [0, 1)", lambda x: 0 <= x < 1)] = 0.1
    """Share of the predicted improvement that must be real, in [0, 1)."""
    critic_learning_rate: Positive = 1e-3
    critic_epochs: Count = 10
    """Passes over the batch per update to fit V."""
    critic_minibatch_size: Count = 256
    """Steps per gradient step of the critic."""

    def __post_init__(self) -> None:
        super().__post_init__()
        # Double backward does not go through compiled graphs, and the Fisher-vector
        # product needs it.
        self._check("compile", not self.compile, "False with TRPO")


@dataclass(frozen=True, kw_only=True)
class TRPOUpdate(Update):
    """One row of :func:`train_trpo`'s history."""

    kl: float
    """Measured mean KL(π_old ‖ π_new) over the batch's states, nats; 0 when the step
    was refused.
    """
    improvement: float
    """Measured decrease of the surrogate loss."""
    expected_improvement: float
    """Its first-order prediction for the full step."""
    step_fraction: float
    """Length of the accepted step as a fraction of the full one; 0 when refused."""
    line_search: str
    """"accepted", or why the step was refused."""
    cg_residual: float
    """Of the damped system, ‖g − (F + damping·I) x‖ / ‖g‖ after conjugate gradient, as
    its recursion has it: below about 1e-7 it is not that of x, which float32 rounds.
    """
    gradient_norm: float
    entropy: float
    """Mean entropy of the old policy over the batch's states, nats."""
    value_loss: float
    """Mean ½ (V − target)² over the critic's last pass; 0 without a critic."""
    explained_variance: float
    """Of the targets, by the critic before its update; NaN without one."""


def trpo_loss(steps: Steps) -> losses.Surrogate:
    """TRPO's objective: :func:`~policyopt.losses.surrogate_loss` of each step."""
    return losses.surrogate_loss(steps.log_prob, steps.old_log_prob, steps.advantages)


def surrogate_and_kl(
    policy: Policy, old: Distribution, steps: Steps, loss: losses.Loss
) -> tuple[Tensor, Tensor]:
    """Return the mean loss and the mean KL(π_old ‖ π) of some steps."""
    new = policy(steps.observations)
    items = losses.item_losses(loss, steps.scored(new), steps.advantages.shape)
    return losses.aggregate(items.loss), losses.aggregate(old.kl(new))


def fit_critic(
    critic: Critic | None,
    optimizer: torch.optim.Optimizer | None,
    steps: Steps,
    config: TRPOConfig,
    generator: torch.Generator,
) -> float:
    """Regress V on the targets; return the mean loss of the last pass."""
    if critic is None or optimizer is None:
        return 0.0
    for _ in range(config.critic_epochs):
        seen = Statistics()
        for part in steps.minibatches(config.critic_minibatch_size, generator):
            value_loss = critic_loss(critic, part)
            optimizer.zero_grad()
            value_loss.backward()
            optimizer.step()
            seen.add(value_loss=value_loss)
    return seen.means()["value_loss"]


def train_trpo(
    env: EnvLike,
    config: TRPOConfig = TRPOConfig(),
    *,
    seed: int = 0,
    policy: Policy | None = None,
    loss: losses.Loss | None = None,
    step: Callable[..., TrustRegionStep] = trust_region_step,
    checkpoint_dir: str | Path | None = None,
    callback: Callback | None = None,
    progress: bool = True,
) -> TrainResult[TRPOConfig, TRPOUpdate]:
    """Train a policy by trust region policy optimisation, with GAE and a separate
    critic.

    Parameters
    ----------
    env, config, seed, policy, loss, checkpoint_dir, callback, progress
        As in :func:`~policyopt.control.reinforce.train_reinforce`; the loss is
        :func:`trpo_loss` by default.
    step : callable
        What moves the parameters: called as
        :func:`~policyopt.trust_region.trust_region_step` is, with parameters, a
        function () ↦ (loss, KL), and the settings as keywords.

    References
    ----------
    Schulman et al. (2015), Trust region policy optimization, arXiv:1502.05477.
    """
    loss = losses.check_loss(loss, trpo_loss, "Steps of a batch")
    run = Run(
        "trpo", env, config, TRPOUpdate, seed=seed, critic=config.use_critic,
        policy=policy, checkpoint_dir=checkpoint_dir, callback=callback,
        progress=progress,
    )  # fmt: skip
    policy, critic = run.policy, run.critic
    parameters = [p for p in policy.parameters() if p.requires_grad]
    rate = config.critic_learning_rate
    optimizer = run.adam(critic.parameters(), rate) if critic else None

    with run:
        for _ in run.updates():
            rollout = run.collect(config.rollout_steps)
            steps = estimate_advantages(rollout, policy, critic, config)
            with torch.no_grad():
                # A copy: a Gaussian's log σ is itself a parameter, and the step moves
                # parameters in place.
                old = policy(steps.observations).detach()
            taken = step(
                parameters, partial(surrogate_and_kl, policy, old, steps, loss),
                kl_limit=config.kl_limit, damping=config.damping,
                cg_iterations=config.cg_iterations, backtracks=config.backtracks,
                shrink=config.shrink, accept_ratio=config.accept_ratio,
            )  # fmt: skip
            value_loss = fit_critic(critic, optimizer, steps, config, run.generator)
            search = taken.search
            run.log(
                kl=search.kl, improvement=search.improvement,
                expected_improvement=taken.expected_improvement,
                step_fraction=search.fraction, line_search=search.reason,
                cg_residual=taken.residual, gradient_norm=taken.gradient_norm,
                entropy=losses.aggregate(old.entropy()).item(), value_loss=value_loss,
                explained_variance=critic_fit(critic, steps),
            )  # fmt: skip
    return run.result()
