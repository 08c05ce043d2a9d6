"""PPO: several epochs of minibatch steps on a surrogate that stops paying once the
policy has moved enough.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import ClassVar

import torch
from torch import nn

from policyopt import losses
from policyopt.control.config import ActorCriticConfig
from policyopt.control.environments import EnvLike
from policyopt.control.policies import Policy
from policyopt.control.results import TrainResult, Update
from policyopt.control.steps import Steps, critic_fit, critic_loss, estimate_advantages
from policyopt.control.training import Run
from policyopt.frame import Callback, Statistics
from policyopt.runs import Count, NonNegative, Positive

__all__ = ["PPOConfig", "PPOUpdate", "ppo_loss", "train_ppo"]


@dataclass(frozen=True, kw_only=True)
class PPOConfig(ActorCriticConfig):
    """Settings of :func:`train_ppo`."""

    renamed: ClassVar = {"epochs": "epochs_per_batch", "minibatch": "minibatch_size"}

    epochs_per_batch: Count = 4
    """Passes over each batch."""
    minibatch_size: Count = 256
    """Steps per gradient step; batches are cut into near-equal pieces of at most this
    size.
    """
    normalize_minibatches: bool = False
    """Shift and scale advantages over each minibatch too, as most other implementations
    do: it matters where minibatches are small.
    """
    learning_rate: Positive = 3e-3
    """Adam's step size."""
    anneal_learning_rate: bool = True
    """Let the learning rate fall linearly to 0 over ``total_steps``."""
    clip_ratio: Positive = 0.2
    """ε of the clipped surrogate, > 0."""
    value_clip: Positive | None = None
    """Clip range of the value loss in units of return; None does not clip."""
    value_coef: NonNegative = 0.5
    """Weight of the value loss, ≥ 0."""
    entropy_coef: NonNegative = 0.0
    """Weight of the entropy bonus, ≥ 0."""
    max_gradient_norm: Positive | None = 0.5
    """Largest norm of the gradient of a step, policy and critic together; None does not
    limit it.
    """
    target_kl: Positive | None = None
    """Skip the rest of the passes once the mean KL(π_old ‖ π) of one exceeds 1.5 times
    this, in nats.
    """


@dataclass(frozen=True, kw_only=True)
class PPOUpdate(Update):
    """One row of :func:`train_ppo`'s history. Means are over the steps of the update's
    last pass; statistics that a loss of your own does not return are NaN.
    """

    may_be_nan: ClassVar = (*Update.may_be_nan, "kl", "clip_fraction", "ratio_max")

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
    """Share of steps whose gradient the clip switched off."""
    ratio_max: float
    """Largest ρ of the pass: the clip does not bound it."""
    gradient_norm: float
    """Of the last step, before it was limited."""
    explained_variance: float
    """Of the targets, by the critic before the update; NaN without one."""
    passes: int
    """Passes made over the batch; fewer than configured if ``target_kl`` was met."""
    learning_rate: float


def ppo_loss(steps: Steps, config: PPOConfig) -> losses.ClippedSurrogate:
    """PPO's: :func:`~policyopt.losses.clipped_surrogate_loss` of each step."""
    old, clip = steps.old_log_prob, config.clip_ratio
    return losses.clipped_surrogate_loss(
        steps.log_prob, old, steps.advantages, clip_ratio=clip
    )


def train_ppo(
    env: EnvLike,
    config: PPOConfig = PPOConfig(),
    *,
    seed: int = 0,
    policy: Policy | None = None,
    loss: losses.Loss | None = None,
    checkpoint_dir: str | Path | None = None,
    callback: Callback | None = None,
    progress: bool = True,
) -> TrainResult[PPOConfig, PPOUpdate]:
    """Train a policy by proximal policy optimisation, with GAE and a separate critic.

    Parameters
    ----------
    env, config, seed, policy, loss, checkpoint_dir, callback, progress
        As in :func:`~policyopt.control.reinforce.train_reinforce`; the loss is
        :func:`ppo_loss` by default.

    References
    ----------
    Schulman et al. (2017), Proximal policy optimization algorithms, arXiv:1707.06347.
    Implementation details: Huang et al. (2022), The 37 implementation details of
    proximal policy optimization, ICLR blog track.
    """
    ours = partial(ppo_loss, config=config)
    loss = losses.check_loss(loss, ours, "Steps of a minibatch")
    run = Run(
        "ppo", env, config, PPOUpdate, seed=seed, critic=config.use_critic,
        policy=policy, checkpoint_dir=checkpoint_dir, callback=callback,
        progress=progress,
    )  # fmt: skip
    policy, critic, parameters = run.policy, run.critic, run.trainable()
    optimizer = run.adam(parameters, config.learning_rate)
    statistics = ("ratio", "kl", "clipped")
    required = ("kl",) if config.target_kl else ()
    size, again = config.minibatch_size, config.normalize_minibatches
    largest_norm = config.max_gradient_norm or torch.inf

    with run:
        for _ in run.updates():
            if config.anneal_learning_rate:
                rate = config.learning_rate * (1 - run.budget_used)
                optimizer.param_groups[0]["lr"] = rate
            rollout = run.collect(config.rollout_steps)
            steps = estimate_advantages(rollout, policy, critic, config)

            for passes in range(1, config.epochs_per_batch + 1):  # noqa: B007
                seen = Statistics()
                for part in steps.minibatches(size, run.generator, normalized=again):
                    distribution = policy(part.observations)
                    part = part.scored(distribution)
                    items = losses.item_losses(
                        loss, part, part.log_prob.shape, statistics, required
                    )
                    policy_loss = losses.aggregate(items.loss)
                    value_loss = critic_loss(critic, part, clip=config.value_clip)
                    entropy = losses.aggregate(distribution.entropy())
                    total = policy_loss - config.entropy_coef * entropy
                    optimizer.zero_grad()
                    (total + config.value_coef * value_loss).backward()
                    norm = nn.utils.clip_grad_norm_(parameters, largest_norm)
                    optimizer.step()
                    seen.add(
                        policy_loss=policy_loss, value_loss=value_loss, entropy=entropy,
                        kl=items.kl.mean(), clip_fraction=items.clipped.mean(),
                        ratio_max=items.ratio.max(), gradient_norm=norm,
                    )  # fmt: skip
                if config.target_kl and seen["kl"].mean() > 1.5 * config.target_kl:
                    break

            run.log(
                **seen.means(
                    "policy_loss", "value_loss", "entropy", "kl", "clip_fraction"
                ),
                ratio_max=seen["ratio_max"].max().item(),
                gradient_norm=seen["gradient_norm"][-1].item(),
                explained_variance=critic_fit(critic, steps), passes=passes,
                learning_rate=optimizer.param_groups[0]["lr"],
            )  # fmt: skip
    return run.result()
