"""PPO: several epochs of minibatch steps on a surrogate that stops paying once the
policy has moved enough.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn

from policyopt.control.config import ActorCriticConfig
from policyopt.control.environments import EnvLike
from policyopt.control.policies import Policy
from policyopt.control.results import TrainResult, Update
from policyopt.control.training import Callback, Run, estimate_advantages, minibatches
from policyopt.losses import (
    ClippedSurrogate,
    aggregate,
    clipped_surrogate_loss,
    entropy_loss,
    value_loss,
)

__all__ = ["PPOConfig", "PPOUpdate", "train_ppo"]

PolicyLoss = Callable[[Tensor, Tensor, Tensor], ClippedSurrogate]


@dataclass(frozen=True, kw_only=True)
class PPOConfig(ActorCriticConfig):
    """Settings of :func:`train_ppo`."""

    epochs: int = 4
    """Passes over each batch."""
    minibatch: int = 512
    """Items per gradient step; batches are cut into near-equal pieces of at most this
    size.
    """
    learning_rate: float = 3e-3
    """Adam's step size."""
    anneal_learning_rate: bool = True
    """Let the learning rate fall linearly to 0 over ``total_steps``."""
    clip_ratio: float = 0.2
    """ε of the clipped surrogate, > 0."""
    value_clip: float | None = None
    """Clip range of the value loss in units of return; None does not clip."""
    value_coef: float = 0.5
    """Weight of the value loss, ≥ 0."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus, ≥ 0."""
    max_gradient_norm: float | None = 0.5
    """Largest norm of the gradient of a step, policy and critic together; None does not
    limit it.
    """
    target_kl: float | None = None
    """Skip the rest of the epochs once the mean KL(π_old ‖ π) of a pass exceeds 1.5
    times this, in nats.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("epochs", self.epochs >= 1, ">= 1")
        self._check("minibatch", self.minibatch >= 1, ">= 1")
        self._check("learning_rate", self.learning_rate > 0, "> 0")
        self._check("clip_ratio", self.clip_ratio > 0, "> 0")
        self._check(
            "value_clip", self.value_clip is None or self.value_clip > 0, "> 0 or None"
        )
        self._check("value_coef", self.value_coef >= 0, ">= 0")
        self._check("entropy_coef", self.entropy_coef >= 0, ">= 0")
        self._check(
            "max_gradient_norm",
            self.max_gradient_norm is None or self.max_gradient_norm > 0,
            "> 0 or None",
        )
        self._check(
            "target_kl", self.target_kl is None or self.target_kl > 0, "> 0 or None"
        )


@dataclass(frozen=True, kw_only=True)
class PPOUpdate(Update):
    """One row of :func:`train_ppo`'s history. Means are over the items of the update's
    last pass.
    """

    policy_loss: float
    """Mean clipped surrogate loss. Near 0 by construction (advantages have mean 0): its
    gradient is what counts.
    """
    value_loss: float
    """Mean ½ (V − target)²; 0 without a critic."""
    entropy: float
    """Mean entropy, nats."""
    kl: float
    """Mean k3 estimate of KL(π_old ‖ π), nats."""
    clip_fraction: float
    """Share of items whose gradient the clip switched off."""
    ratio_max: float
    """Largest ρ of the pass: the clip does not bound it."""
    gradient_norm: float
    """Of the last step, before it was limited."""
    explained_variance: float
    """Of the targets, by the critic before the update; NaN without one."""
    epochs: int
    """Passes made; fewer than configured when ``target_kl`` stopped them."""
    learning_rate: float


def train_ppo(
    env: EnvLike,
    config: PPOConfig = PPOConfig(),
    *,
    seed: int = 0,
    policy: Policy | None = None,
    policy_loss: PolicyLoss | None = None,
    resume: TrainResult[PPOConfig, PPOUpdate] | None = None,
    callback: Callback | None = None,
    progress: bool = True,
) -> TrainResult[PPOConfig, PPOUpdate]:
    """Train a policy by proximal policy optimisation, with GAE and a separate critic.

    Parameters
    ----------
    env, config, seed, policy, resume, callback, progress
        As in :func:`~policyopt.control.reinforce.train_reinforce`.
    policy_loss : callable, optional
        (log_prob, old_log_prob, advantages) ↦
        :class:`~policyopt.losses.ClippedSurrogate`; by default
        :func:`~policyopt.losses.clipped_surrogate_loss` with ``config.clip_ratio``.

    References
    ----------
    Schulman et al. (2017), Proximal policy optimization algorithms, arXiv:1707.06347.
    Implementation details: Huang et al. (2022), The 37 implementation details of
    proximal policy optimization, ICLR blog track.
    """
    run: Run[PPOConfig, PPOUpdate] = Run(
        "ppo", env, config, seed=seed, critic=config.use_critic, policy=policy, resume=resume, callback=callback,
        progress=progress,
    )  # fmt: skip
    policy, critic = run.policy, run.critic
    surrogate = policy_loss or partial(
        clipped_surrogate_loss, clip_ratio=config.clip_ratio
    )
    optimizer = run.adam(run.trainable(), config.learning_rate)

    with run:
        while run.unfinished:
            if config.anneal_learning_rate:
                optimizer.param_groups[0]["lr"] = config.learning_rate * (
                    1 - run.progress
                )
            rollout = run.collect(config.rollout_steps)
            advantages, targets, old_values, explained = estimate_advantages(
                rollout, critic, config
            )
            observations, actions = (
                rollout.flat(rollout.observations),
                rollout.flat(rollout.actions),
            )
            with torch.no_grad():
                old_log_prob = policy(observations).log_prob(actions)

            for epoch in range(1, config.epochs + 1):  # noqa: B007 - reported after the loop
                passes: list[Tensor] = []
                for index in minibatches(len(actions), config.minibatch, run.generator):
                    distribution = policy(observations[index])
                    items = surrogate(
                        distribution.log_prob(actions[index]),
                        old_log_prob[index],
                        advantages[index],
                    )
                    policy_term = aggregate(items.loss)
                    entropy_term = aggregate(entropy_loss(distribution.entropy()).loss)
                    total = policy_term + config.entropy_coef * entropy_term
                    value_term = torch.zeros_like(policy_term)
                    if critic is not None:
                        value_term = aggregate(
                            value_loss(
                                critic(observations[index]),
                                targets[index],
                                old_values[index],
                                clip=config.value_clip,
                            ).loss
                        )
                        total = total + config.value_coef * value_term
                    optimizer.zero_grad()
                    total.backward()
                    norm = nn.utils.clip_grad_norm_(
                        run.trainable(), config.max_gradient_norm or torch.inf
                    )
                    optimizer.step()
                    passes.append(
                        torch.stack(
                            [policy_term, value_term, -entropy_term, items.kl.mean(), items.clipped.mean(),
                             items.ratio.max(), norm]
                        ).detach()
                    )  # fmt: skip
                statistics = torch.stack(passes)
                if (
                    config.target_kl is not None
                    and statistics[:, 3].mean().item() > 1.5 * config.target_kl
                ):
                    break

            mean = statistics.mean(0).tolist()
            run.log(
                PPOUpdate(
                    **run.next_row(),
                    policy_loss=mean[0],
                    value_loss=mean[1],
                    entropy=mean[2],
                    kl=mean[3],
                    clip_fraction=mean[4],
                    ratio_max=statistics[:, 5].max().item(),
                    gradient_norm=statistics[-1, 6].item(),
                    explained_variance=explained,
                    epochs=epoch,
                    learning_rate=optimizer.param_groups[0]["lr"],
                )
            )
    return run.result()
