"""REINFORCE: the policy gradient estimated from whole episodes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from policyopt.control.config import ControlConfig
from policyopt.control.environments import EnvLike
from policyopt.control.policies import Policy
from policyopt.control.results import TrainResult, Update
from policyopt.control.rollouts import Rollout
from policyopt.control.training import Callback, Run
from policyopt.estimators import discounted_returns, explained_variance, normalize
from policyopt.losses import aggregate, entropy_loss, policy_gradient_loss, value_loss

__all__ = ["ReinforceConfig", "ReinforceUpdate", "reinforce_weights", "train_reinforce"]


@dataclass(frozen=True, kw_only=True)
class ReinforceConfig(ControlConfig):
    """Settings of :func:`train_reinforce`."""

    num_envs: int = 16
    """Episodes per update, run side by side. 1 is the textbook's one-episode loop."""
    learning_rate: float = 1e-2
    """Adam's step size."""
    reward_to_go: bool = True
    """w_t from rewards after t only; False weighs every step with the whole episode's
    return.
    """
    baseline: Literal["none", "mean", "learned"] = "mean"
    """b in w_t = G_t − b: nothing; the mean of G_t over all steps of the batch; or
    V_φ(s_t).
    """
    normalize_weights: bool = True
    """Shift and scale w_t to mean 0 and standard deviation 1 over the batch."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, ≥ 0."""
    critic_epochs: int = 10
    """Gradient steps on V_φ per update, with baseline "learned"."""
    bootstrap_truncated: bool = True
    """With a learned baseline, add V of the final observation where an episode was cut
    by a limit. Without one there is nothing to bootstrap with, and the future after the
    cut counts as 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("learning_rate", self.learning_rate > 0, "> 0")
        self._check("entropy_coef", self.entropy_coef >= 0, ">= 0")
        self._check("critic_epochs", self.critic_epochs >= 1, ">= 1")


@dataclass(frozen=True, kw_only=True)
class ReinforceUpdate(Update):
    """One row of :func:`train_reinforce`'s history."""

    policy_loss: float
    """−mean w_t log π over the batch's steps. Its value says nothing about progress;
    its gradient does.
    """
    entropy: float
    """Mean entropy of the policy over the batch's states, nats."""
    gradient_norm: float
    explained_variance: float
    """Of the returns, by the learned baseline; NaN without one."""


def reinforce_weights(
    rollout: Rollout,
    *,
    gamma: float,
    reward_to_go: bool = True,
    baseline: Literal["none", "mean", "learned"] = "none",
    values: Tensor | None = None,
    next_values: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    r"""Weights w_t of the policy gradient, and the return-to-go G_t that they come
    from.

    The textbook's factor γ^t in front of ∇ log π(a_t|s_t) is left out, as nearly
    everybody does. The result estimates Σ_s η(s) Σ_a Q(s,a) ∇π(a|s) with the
    undiscounted visits η in place of the discounted ones: not ∇J, and in general the
    gradient of no function at all (Nota and Thomas 2020, arXiv:1906.07073).

    Parameters
    ----------
    rollout : Rollout
        Whole episodes, one per column, ``[T, N]`` (:meth:`Collector.collect_episodes`).
    values, next_values : Tensor, optional
        V(s_t) and V(s_{t+1}), ``[T, N]``; ``values`` is the baseline "learned", and
        ``next_values`` is bootstrapped where an episode was truncated.

    Returns
    -------
    weights, returns : Tensor
        Both ``[T, N]``, 0 in invalid rows.
    """
    rewards = torch.where(rollout.valid, rollout.rewards, 0.0)
    returns = discounted_returns(
        rewards, rollout.terminated, rollout.truncated, next_values, gamma=gamma
    )
    returns = torch.where(rollout.valid, returns, 0.0)
    weights = returns if reward_to_go else returns[0].expand_as(returns)
    if baseline == "mean":
        weights = weights - aggregate(weights, rollout.valid)
    elif baseline == "learned":
        if values is None:
            raise ValueError("values must be given with baseline='learned'")
        weights = weights - values
    return torch.where(rollout.valid, weights, 0.0), returns


def train_reinforce(
    env: EnvLike,
    config: ReinforceConfig = ReinforceConfig(),
    *,
    seed: int = 0,
    policy: Policy | None = None,
    resume: TrainResult[ReinforceConfig, ReinforceUpdate] | None = None,
    callback: Callback | None = None,
    progress: bool = True,
) -> TrainResult[ReinforceConfig, ReinforceUpdate]:
    """Train a policy by REINFORCE: run whole episodes, push up log π of each action by
    its weight.

    Parameters
    ----------
    env : EnvLike
        An id, a factory, or a vector environment (its number of copies then overrides
        ``config.num_envs``). Episodes must end by themselves or by a time limit.
    config : ReinforceConfig
    seed : int
        ≥ 0; decides everything random. Two runs with one seed are equal on the CPU.
    policy : Policy, optional
        Start from this policy (trained in place) instead of a new one.
    resume : TrainResult, optional
        Go on from an earlier result until ``config.total_steps`` in all. Environments
        start afresh.
    callback : callable, optional
        Gets every :class:`ReinforceUpdate`; a true return value stops.
    progress : bool
        Show a progress bar.

    Returns
    -------
    TrainResult
        Also after Ctrl-C, with what was learned so far.

    Raises
    ------
    TrainingDivergedError
        When a parameter or statistic is no longer finite; it carries the last good
        result.

    References
    ----------
    Williams (1992), doi:10.1007/BF00992696.
    """
    learned = config.baseline == "learned"
    run: Run[ReinforceConfig, ReinforceUpdate] = Run(
        "reinforce", env, config, seed=seed, critic=learned, policy=policy, resume=resume, callback=callback,
        progress=progress,
    )  # fmt: skip
    policy, critic = run.policy, run.critic
    optimizer = run.adam(run.trainable(), config.learning_rate)

    with run:
        while run.unfinished:
            rollout = run.collect(None)
            values, next_values = (
                (None, None) if critic is None else rollout.evaluate(critic)
            )
            weights, returns = reinforce_weights(
                rollout,
                gamma=config.gamma,
                reward_to_go=config.reward_to_go,
                baseline=config.baseline,
                values=values,
                next_values=next_values if config.bootstrap_truncated else None,
            )
            if config.normalize_weights:
                weights = normalize(weights, rollout.valid)

            observations = rollout.flat(rollout.observations)
            distribution = policy(observations)
            policy_term = aggregate(
                policy_gradient_loss(
                    distribution.log_prob(rollout.flat(rollout.actions)),
                    rollout.flat(weights),
                ).loss
            )
            entropy_term = aggregate(entropy_loss(distribution.entropy()).loss)
            optimizer.zero_grad()
            (policy_term + config.entropy_coef * entropy_term).backward()
            norm = torch.nn.utils.get_total_norm(
                [p.grad for p in policy.parameters() if p.grad is not None]
            )
            optimizer.step()

            explained = torch.nan
            if critic is not None and values is not None:
                targets = rollout.flat(returns)
                explained = explained_variance(rollout.flat(values), targets).item()
                for _ in range(config.critic_epochs):
                    optimizer.zero_grad()
                    aggregate(value_loss(critic(observations), targets).loss).backward()
                    optimizer.step()

            run.log(
                ReinforceUpdate(
                    **run.next_row(),
                    policy_loss=policy_term.item(),
                    entropy=-entropy_term.item(),
                    gradient_norm=norm.item(),
                    explained_variance=explained,
                )
            )
    return run.result()
