"""The steps that a policy learns from, in one object that can be cut by rows."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from policyopt.control.config import ActorCriticConfig
from policyopt.control.policies import Observations, Policy
from policyopt.control.rollouts import Rollout, ValueFunction
from policyopt.distributions import Distribution
from policyopt.estimators import explained_variance, gae, normalize
from policyopt.losses import aggregate, value_loss

__all__ = ["Steps", "estimate_advantages"]


@dataclass(frozen=True, kw_only=True)
class Steps:
    """``B`` steps of experience; what a trainer's ``loss=`` is called with."""

    observations: Observations
    """Raw observations s_t, ``[B, *observation shape]``, with the actions that were
    allowed where the environment masks them: a policy called on them is masked again.
    """
    actions: Tensor
    """Actions a_t of the policy's distribution, ``[B, ...]``."""
    advantages: Tensor
    """The weight w_t of ∇ log π(a_t|s_t), ``[B]``: an estimate of the advantage, in
    REINFORCE the return minus the baseline."""
    log_prob: Tensor
    """log π_θ(a_t|s_t) of the policy being trained, with gradient, ``[B]``."""
    old_log_prob: Tensor
    """The same of the policy that collected the steps, ``[B]``."""
    targets: Tensor
    """Regression targets of the value function, ``[B]``."""
    old_values: Tensor
    """V(s_t) at collection time, ``[B]``; 0 without a critic."""

    def __len__(self) -> int:
        return len(self.actions)

    def select(self, rows: Tensor | slice) -> Self:
        """Return the steps that an index, a mask or a slice picks."""
        return type(self)(**{name: x[rows] for name, x in vars(self).items()})

    def minibatches(
        self, size: int, generator: torch.Generator, *, normalized: bool = False
    ) -> Iterator[Self]:
        """Shuffle the steps and cut them into near-equal pieces of at most ``size``;
        with ``normalized`` shift and scale the advantages of each.

        Near-equal, because a small leftover batch would count as much as a full one in
        the mean that is descended.
        """
        order = torch.randperm(len(self), generator=generator, device=generator.device)
        shuffled = self.select(order)
        for rows in torch.arange(len(self)).tensor_split(math.ceil(len(self) / size)):
            # Views: one copy for all of them costs less than one for each.
            part = shuffled.select(slice(int(rows[0]), int(rows[-1]) + 1))
            if normalized:
                part = dataclasses.replace(part, advantages=normalize(part.advantages))
            yield part

    def scored(self, distribution: Distribution) -> Self:
        """Return the steps with the ``log_prob`` of another distribution of actions."""
        return dataclasses.replace(self, log_prob=distribution.log_prob(self.actions))


def estimate_advantages(
    rollout: Rollout,
    policy: Policy,
    critic: ValueFunction | None,
    config: ActorCriticConfig,
) -> Steps:
    """Turn a rollout into steps with advantages by GAE; without a critic V = 0.

    The targets are unnormalised advantages + V. ``policy`` is the one that collected
    the rollout; its log-probabilities are the old ones, and for now the present ones.
    """
    values, next_values = rollout.evaluate(critic)
    ended = rollout.terminated
    if not config.bootstrap_truncated:
        ended = ended | rollout.truncated
    advantages = gae(
        rollout.rewards, values, next_values, ended, rollout.truncated,
        gamma=config.gamma, gae_lambda=config.gae_lambda,
    )  # fmt: skip
    flat = rollout.flat(advantages)
    observations = rollout.flat(rollout.observations)
    actions = rollout.flat(rollout.actions)
    with torch.no_grad():
        log_prob = policy(observations).log_prob(actions)
    return Steps(
        observations=observations, actions=actions, log_prob=log_prob,
        advantages=normalize(flat) if config.normalize_advantages else flat,
        old_log_prob=log_prob, targets=rollout.flat(advantages + values),
        old_values=rollout.flat(values),
    )  # fmt: skip


def critic_loss(
    critic: ValueFunction | None, steps: Steps, *, clip: float | None = None
) -> Tensor:
    """Mean :func:`~policyopt.losses.value_loss` over some steps; 0 without a critic."""
    if critic is None:
        return torch.zeros_like(steps.targets[0])
    values = critic(steps.observations)
    items = value_loss(values, steps.targets, steps.old_values, clip=clip)
    return aggregate(items.loss)


def critic_fit(critic: object | None, steps: Steps) -> float:
    """Explained variance of the targets by V at collection time; NaN without a
    critic.
    """
    if critic is None:
        return math.nan
    return explained_variance(steps.old_values, steps.targets).item()
