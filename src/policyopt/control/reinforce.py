"""REINFORCE: the policy gradient estimated from whole episodes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from policyopt import losses
from policyopt.control.config import ControlConfig
from policyopt.control.environments import EnvLike
from policyopt.control.policies import Policy
from policyopt.control.results import TrainResult, Update
from policyopt.control.rollouts import Rollout
from policyopt.control.steps import Steps, critic_fit, critic_loss
from policyopt.control.training import Run
from policyopt.estimators import discounted_returns, normalize
from policyopt.frame import Callback
from policyopt.runs import Count, NonNegative, Positive

__all__ = [
    "ReinforceConfig", "ReinforceUpdate", "reinforce_loss", "reinforce_weights",
    "train_reinforce",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class ReinforceConfig(ControlConfig):
    """Settings of :func:`train_reinforce`."""

    num_envs: Count = 16
    """Episodes per update, run side by side. 1 is the textbook's one-episode loop."""
    learning_rate: Positive = 1e-2
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
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus, ≥ 0."""
    critic_epochs: Count = 10
    """Gradient steps on V_φ per update, with baseline "learned"."""
    bootstrap_truncated: bool = True
    """With a learned baseline, add V of the final observation where an episode was cut
    by a limit. Without one there is nothing to bootstrap with, and the future after the
    cut counts as 0."""


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
    normalized: bool = False,
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
    normalized : bool
        Shift and scale the weights to mean 0 and standard deviation 1 over the batch.
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
        weights = weights - losses.aggregate(weights, rollout.valid)
    elif baseline == "learned":
        if values is None:
            raise ValueError("values must be given with baseline='learned'")
        weights = weights - values
    weights = torch.where(rollout.valid, weights, 0.0)
    return normalize(weights, rollout.valid) if normalized else weights, returns


def reinforce_loss(steps: Steps) -> Tensor:
    """REINFORCE's objective: :func:`~policyopt.losses.policy_gradient_loss` of each
    step.
    """
    return losses.policy_gradient_loss(steps.log_prob, steps.advantages)


def train_reinforce(
    env: EnvLike,
    config: ReinforceConfig = ReinforceConfig(),
    *,
    seed: int = 0,
    policy: Policy | None = None,
    weigh: Callable[..., tuple[Tensor, Tensor]] = reinforce_weights,
    loss: losses.Loss | None = None,
    checkpoint_dir: str | Path | None = None,
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
    weigh : callable
        Where the weights w_t come from: called as :func:`reinforce_weights` is, with a
        rollout and the settings as keywords.
    loss : callable, optional
        The policy's objective: a function from :class:`~policyopt.control.Steps`, whose
        ``log_prob`` has just been computed, to one loss per step, as a tensor or in the
        field ``loss`` of a named tuple. By default :func:`reinforce_loss`. The entropy
        bonus and the value function's loss are added to its mean.
    checkpoint_dir : path, optional
        Write a checkpoint there every ``config.checkpoint_every`` updates and at the
        end, and go on from one that is there. A run that was killed and started again
        then ends as if nothing had happened, bit for bit on the CPU; one that was
        finished goes on when ``config.total_steps`` is larger. To make that possible
        the environments are reset after each checkpoint, with a seed made from ``seed``
        and the number of the update: episodes that are under way are dropped. What an
        environment or a wrapper remembers beyond a reset is not saved.
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
    loss = losses.check_loss(loss, reinforce_loss, "Steps of a batch")
    run = Run(
        "reinforce", env, config, ReinforceUpdate, seed=seed,
        critic=config.baseline == "learned", policy=policy,
        checkpoint_dir=checkpoint_dir, callback=callback, progress=progress,
    )  # fmt: skip
    policy, critic = run.policy, run.critic
    optimizer = run.adam(run.trainable(), config.learning_rate)

    with run:
        for _ in run.updates():
            rollout = run.collect(None)
            values, next_values = rollout.evaluate(critic)
            weights, returns = weigh(
                rollout, gamma=config.gamma, reward_to_go=config.reward_to_go,
                baseline=config.baseline, normalized=config.normalize_weights,
                values=values,
                next_values=next_values if config.bootstrap_truncated else None,
            )  # fmt: skip
            observations = rollout.flat(rollout.observations)
            actions = rollout.flat(rollout.actions)
            distribution = policy(observations)
            log_prob = distribution.log_prob(actions)
            steps = Steps(
                observations=observations, actions=actions,
                advantages=rollout.flat(weights), log_prob=log_prob,
                old_log_prob=log_prob.detach(), targets=rollout.flat(returns),
                old_values=rollout.flat(values),
            )  # fmt: skip
            items = losses.item_losses(loss, steps, log_prob.shape)
            policy_loss = losses.aggregate(items.loss)
            entropy = losses.aggregate(distribution.entropy())
            optimizer.zero_grad()
            (policy_loss - config.entropy_coef * entropy).backward()
            gradients = [p.grad for p in policy.parameters() if p.grad is not None]
            norm = nn.utils.get_total_norm(gradients)
            optimizer.step()

            for _ in range(config.critic_epochs if critic else 0):
                optimizer.zero_grad()
                critic_loss(critic, steps).backward()
                optimizer.step()

            run.log(
                policy_loss=policy_loss.item(), entropy=entropy.item(),
                gradient_norm=norm.item(), explained_variance=critic_fit(critic, steps),
            )  # fmt: skip
    return run.result()
