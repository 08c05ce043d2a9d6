"""Settings of a training run, and the networks that they name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import gymnasium as gym
import torch

from policyopt.control.policies import Critic, Policy, make_policy
from policyopt.runs import Count, Settings, Share

__all__ = ["ActorCriticConfig", "ControlConfig"]


@dataclass(frozen=True, kw_only=True)
class ControlConfig(Settings):
    """Settings that every control algorithm has. Frozen: use ``dataclasses.replace`` to
    change one.
    """

    total_steps: Count = 100_000
    """Environment steps to train for, over all copies. Training ends after the update
    that reaches it.
    """
    num_envs: Count = 32
    """Copies of the environment, side by side."""
    gamma: Share = 0.99
    """Discount γ per step, in [0, 1]."""
    hidden: tuple[int, ...] = (64, 64)
    """Width of each hidden layer, policy and critic alike."""
    activation: Literal["tanh", "relu"] = "tanh"
    orthogonal_init: bool = True
    """Orthogonal weights, output gain 0.01 (policy) and 1 (critic); False is PyTorch's
    default.
    """
    normalize_observations: bool | None = None
    """Running normalisation of Box observations; None means: when the actions are
    continuous.
    """
    normalize_rewards: bool = False
    """Divide rewards by the running standard deviation of the discounted return, so
    that values are of order 1.
    """
    initial_log_std: float = 0.0
    """Initial log σ of a Gaussian policy, on the scale where the action bounds are
    ±1.
    """
    checkpoint_every: Count = 50
    """Updates between two checkpoints, when a trainer is given a ``checkpoint_dir``."""
    device: str = "auto"
    """"auto" takes cuda, then mps, then cpu; or any PyTorch device name."""
    cpu_threads: Count = 1
    """CPU threads that PyTorch may use while training. Networks this small are fastest
    with one: a second thread waits more than it works, and the last digits of the
    results would depend on the number of cores."""
    compile: bool = False
    """torch.compile the networks. It pays for large networks on a GPU, hardly for small
    ones on a CPU.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = all(width >= 1 for width in self.hidden)
        self._check("hidden", ok, "a tuple of widths >= 1")


@dataclass(frozen=True, kw_only=True)
class ActorCriticConfig(ControlConfig):
    """Settings that TRPO and PPO have in common: how a batch is collected and its
    advantages estimated.
    """

    rollout_steps: Count | None = 64
    """Steps per copy and update; None runs one whole episode per copy instead."""
    gae_lambda: Share = 0.95
    """λ of the advantage estimate, in [0, 1]."""
    use_critic: bool = True
    """False takes V = 0, so that the advantage is a λ-discounted sum of rewards. It
    needs whole episodes (``rollout_steps=None``): without V there is nothing to put in
    place of the rewards after a cut."""
    normalize_advantages: bool = True
    """Shift and scale advantages to mean 0 and standard deviation 1 over the batch."""
    bootstrap_truncated: bool = True
    """False treats a time limit as a terminal state: a common mistake, kept to be
    measured.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        ok = self.use_critic or self.rollout_steps is None
        self._check("use_critic", ok, "True unless rollout_steps is None")


def build_networks(
    observation_space: gym.Space[Any],
    action_space: gym.Space[Any],
    config: ControlConfig,
    *,
    critic: bool,
    generator: torch.Generator,
    policy: Policy | None = None,
) -> tuple[Policy, Critic | None]:
    """Build the policy, unless one is given, and on request the critic that a config
    describes (on the CPU).
    """
    shared: dict[str, Any] = {
        "hidden": config.hidden, "activation": config.activation,
        "orthogonal": config.orthogonal_init, "generator": generator,
    }  # fmt: skip
    if policy is None:
        normalize = config.normalize_observations
        if normalize is None:
            normalize = isinstance(action_space, gym.spaces.Box)
        policy = make_policy(
            observation_space, action_space, normalize_observations=normalize,
            log_std=config.initial_log_std, **shared,
        )  # fmt: skip
    return policy, Critic(policy.encoder, **shared) if critic else None
