"""TRPO: natural-gradient steps inside a KL trust region, with a line search that keeps
them honest.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from policyopt.control.config import ActorCriticConfig
from policyopt.control.environments import EnvLike
from policyopt.control.policies import Policy
from policyopt.control.results import TrainResult, Update
from policyopt.control.training import Callback, Run, estimate_advantages, minibatches
from policyopt.losses import Surrogate, aggregate, surrogate_loss, value_loss
from policyopt.trust_region import trust_region_step

__all__ = ["TRPOConfig", "TRPOUpdate", "train_trpo"]

SurrogateLoss = Callable[[Tensor, Tensor, Tensor], Surrogate]


@dataclass(frozen=True, kw_only=True)
class TRPOConfig(ActorCriticConfig):
    """Settings of :func:`train_trpo`."""

    kl_limit: float = 0.01
    """δ_KL: largest mean KL(π_old ‖ π_new) of an update, in nats."""
    damping: float = 0.1
    """Added to the Fisher matrix's diagonal, ≥ 0."""
    cg_iterations: int = 10
    """Iterations of conjugate gradient per update, ≥ 1."""
    backtracks: int = 10
    """Trials of the line search, ≥ 1."""
    shrink: float = 0.8
    """Factor between two trials, in (0, 1)."""
    accept_ratio: float = 0.1
    """Share of the predicted improvement that must be real, in [0, 1)."""
    critic_learning_rate: float = 1e-3
    critic_epochs: int = 10
    """Passes over the batch per update to fit V."""
    critic_minibatch: int = 256
    """Items per gradient step of the critic."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("kl_limit", self.kl_limit > 0, "> 0")
        self._check("damping", self.damping >= 0, ">= 0")
        self._check("cg_iterations", self.cg_iterations >= 1, ">= 1")
        self._check("backtracks", self.backtracks >= 1, ">= 1")
        self._check("shrink", 0 < self.shrink < 1, "in (0, 1)")
        self._check("accept_ratio", 0 <= self.accept_ratio < 1, "in [0, 1)")
        self._check("critic_learning_rate", self.critic_learning_rate > 0, "> 0")
        self._check("critic_epochs", self.critic_epochs >= 1, ">= 1")
        self._check("critic_minibatch", self.critic_minibatch >= 1, ">= 1")
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
    """‖g − F x‖ / ‖g‖ after conjugate gradient."""
    gradient_norm: float
    entropy: float
    """Mean entropy of the old policy over the batch's states, nats."""
    value_loss: float
    """Mean ½ (V − target)² over the last pass (NaN-free 0 without a critic)."""
    explained_variance: float
    """Of the targets, by the critic before its update; NaN without one."""


def train_trpo(
    env: EnvLike,
    config: TRPOConfig = TRPOConfig(),
    *,
    seed: int = 0,
    policy: Policy | None = None,
    surrogate: SurrogateLoss = surrogate_loss,
    resume: TrainResult[TRPOConfig, TRPOUpdate] | None = None,
    callback: Callback | None = None,
    progress: bool = True,
) -> TrainResult[TRPOConfig, TRPOUpdate]:
    """Train a policy by trust region policy optimisation, with GAE and a separate
    critic.

    Parameters
    ----------
    env, config, seed, policy, resume, callback, progress
        As in :func:`~policyopt.control.reinforce.train_reinforce`.
    surrogate : callable
        (log_prob, old_log_prob, advantages) ↦ a named tuple with ``loss``; replace it
        to study another objective.

    References
    ----------
    Schulman et al. (2015), Trust region policy optimization, arXiv:1502.05477.
    """
    run: Run[TRPOConfig, TRPOUpdate] = Run(
        "trpo", env, config, seed=seed, critic=config.use_critic, policy=policy, resume=resume, callback=callback,
        progress=progress,
    )  # fmt: skip
    policy, critic = run.policy, run.critic
    parameters = [p for p in policy.parameters() if p.requires_grad]
    optimizer = (
        None
        if critic is None
        else run.adam(list(critic.parameters()), config.critic_learning_rate)
    )

    with run:
        while run.unfinished:
            rollout = run.collect(config.rollout_steps)
            advantages, targets, _, explained = estimate_advantages(
                rollout, critic, config
            )
            observations, actions = (
                rollout.flat(rollout.observations),
                rollout.flat(rollout.actions),
            )
            with torch.no_grad():
                # A copy: a Gaussian's log σ is itself a parameter, and the step moves
                # parameters in place.
                old = policy(observations).detach()
                old_log_prob = old.log_prob(actions)

            def loss_and_kl() -> tuple[Tensor, Tensor]:
                new = policy(observations)  # noqa: B023 - called within this iteration only
                items = surrogate(new.log_prob(actions), old_log_prob, advantages)  # noqa: B023
                return aggregate(items.loss), aggregate(old.kl(new))  # noqa: B023

            step = trust_region_step(
                parameters,
                loss_and_kl,
                kl_limit=config.kl_limit,
                damping=config.damping,
                cg_iterations=config.cg_iterations,
                backtracks=config.backtracks,
                shrink=config.shrink,
                accept_ratio=config.accept_ratio,
            )

            critic_loss = torch.zeros(())
            if critic is not None and optimizer is not None:
                for _ in range(config.critic_epochs):
                    for index in minibatches(
                        len(targets), config.critic_minibatch, run.generator
                    ):
                        critic_loss = aggregate(
                            value_loss(critic(observations[index]), targets[index]).loss
                        )
                        optimizer.zero_grad()
                        critic_loss.backward()
                        optimizer.step()

            run.log(
                TRPOUpdate(
                    **run.next_row(),
                    kl=step.search.kl,
                    improvement=step.search.improvement,
                    expected_improvement=step.expected_improvement,
                    step_fraction=step.search.fraction,
                    line_search=step.search.reason,
                    cg_residual=step.residual,
                    gradient_norm=step.gradient_norm,
                    entropy=aggregate(old.entropy()).item(),
                    value_loss=critic_loss.item(),
                    explained_variance=explained,
                )
            )
    return run.result()
