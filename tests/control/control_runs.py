"""Short training runs that several test files share, and what they are compared by.

Nothing here imports pytest: processes that are started to be killed import this module.
"""

from __future__ import annotations

import dataclasses
import os
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor, nn

from policyopt.control import (
    Policy,
    PPOConfig,
    ReinforceConfig,
    Steps,
    TrainResult,
    TRPOConfig,
    make_vector_env,
    train_ppo,
    train_reinforce,
    train_trpo,
)
from policyopt.distributions import Categorical
from policyopt.losses import ClippedSurrogate, Surrogate, clipped_surrogate_loss, surrogate_loss

SMALL: dict[str, Any] = {"num_envs": 4, "hidden": (16,), "device": "cpu"}
PPO = PPOConfig(total_steps=600, rollout_steps=50, minibatch_size=64, epochs_per_batch=2, **SMALL)
TRPO = TRPOConfig(total_steps=600, rollout_steps=50, critic_epochs=2, **SMALL)
REINFORCE = ReinforceConfig(total_steps=600, baseline="learned", critic_epochs=2, **SMALL)

ppo = partial(train_ppo, "CartPole-v1", PPO, progress=False)
trpo = partial(train_trpo, "CartPole-v1", TRPO, progress=False)
reinforce = partial(train_reinforce, "CartPole-v1", REINFORCE, progress=False)
TRAINERS: dict[str, Any] = {"reinforce": reinforce, "trpo": trpo, "ppo": ppo}


def learners(total_steps: int) -> list[tuple[Any, Any]]:
    """Each trainer with settings that learn a small guessing task in so many steps."""
    common: dict[str, Any] = {"total_steps": total_steps, "num_envs": 8}
    return [
        (train_ppo, dataclasses.replace(PPO, minibatch_size=128, epochs_per_batch=4, **common)),
        (train_trpo, dataclasses.replace(TRPO, kl_limit=0.05, **common)),
        (train_reinforce, dataclasses.replace(REINFORCE, learning_rate=3e-3, **common)),
    ]


class Guess(gym.Env[Any, Any]):
    """What is seen tells whether action 1 or 0 is right, a reward of 1, for 10 steps. Subclasses show it."""

    action_space = spaces.Discrete(2)
    right: int

    def _observe(self) -> Any:
        raise NotImplementedError

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward = float(action == self.right)
        self.count += 1
        return self._observe(), reward, False, self.count == 10, {}


def with_config(train: Any, **changes: Any) -> Any:
    return partial(train.func, train.args[0], dataclasses.replace(train.args[1], **changes), **train.keywords)


def on(train: Any, env: Any) -> Any:
    """The same trainer in another environment."""
    return partial(train.func, env, *train.args[1:], **train.keywords)


def surrogate(steps: Steps) -> Surrogate:
    return surrogate_loss(steps.log_prob, steps.old_log_prob, steps.advantages)


def clipped(steps: Steps) -> ClippedSurrogate:
    return clipped_surrogate_loss(steps.log_prob, steps.old_log_prob, steps.advantages)


def parameters(result: TrainResult[Any, Any]) -> list[Tensor]:
    critic = [] if result.critic is None else list(result.critic.parameters())
    return [p.detach() for p in [*result.policy.parameters(), *critic]]


def assert_same_run(one: TrainResult[Any, Any], other: TrainResult[Any, Any]) -> None:
    """Bit for bit: weights, statistics of observations and rewards, history, episodes."""
    assert one.history.table().keys() == other.history.table().keys()
    for name, column in one.history.table().items():
        np.testing.assert_array_equal(column, other.history.column(name), err_msg=name)
    ours, theirs = one.policy.state_dict(), other.policy.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    for a, b in zip(parameters(one), parameters(other), strict=True):
        assert torch.equal(a, b)
    for name, column in one.episodes.table().items():
        np.testing.assert_array_equal(column, other.episodes.table()[name])
    assert one.reward_statistics == other.reward_statistics
    assert one.steps == other.steps


class Point(gym.Env[Any, Any]):
    """One observation for ever, reward −|a|²; ``fault(step)`` may raise or return a reward of its own."""

    observation_space = spaces.Box(-2, 2, (1,), np.float32)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, fault: Callable[[int], float | None] = lambda step: None, length: int = 10) -> None:
        self.fault, self.length, self.total = fault, length, 0

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        return np.ones(1, np.float32), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.count += 1
        self.total += 1
        reward = self.fault(self.total)
        reward = -float(np.square(action).sum()) if reward is None else reward
        return np.ones(1, np.float32), reward, False, self.count >= self.length, {}


class Mine(Policy):
    """A policy of somebody's own making, for CartPole: it must be given to the trainer, never rebuilt."""

    class Encoder(nn.Module):
        shape = (4,)

        def forward(self, observations: Tensor) -> Tensor:
            return observations[..., 2:]

        def update(self, observations: Tensor) -> None:
            pass

        features = 2

    def __init__(self) -> None:
        super().__init__()
        self.encoder = self.Encoder()  # type: ignore[assignment]
        self.linear = nn.Linear(2, 2)
        with torch.no_grad():
            self.linear.weight.fill_(0.1)
            self.linear.bias.zero_()

    def forward(self, observations: Tensor) -> Categorical:
        return Categorical.from_logits(self.linear(self.encoder(observations)))

    def to_env(self, actions: Tensor) -> NDArray[Any]:
        return actions.numpy()


# --- Runs that are killed ---

CHECKPOINTED: dict[str, Any] = {
    f"{name} {env}": with_config(
        on(train, env), total_steps=1600, checkpoint_every=2, normalize_rewards=True, num_envs=2
    )
    for name, train in TRAINERS.items()
    for env in ("CartPole-v1", "Pendulum-v1")
}


class Fatal(gym.vector.VectorWrapper):
    """Kills its own process, by a signal that nobody can catch, in the middle of a rollout."""

    def __init__(self, name: str, copies: int, steps: int) -> None:
        super().__init__(make_vector_env(name, copies)[0])
        self.name, self.left = name, steps

    @property
    def spec(self) -> Any:
        return self.env.spec or gym.spec(self.name)

    def step(self, actions: Any) -> Any:
        self.left -= 1
        if self.left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return self.env.step(actions)


def run_until_killed(name: str, folder: Path, steps: int) -> None:
    """Run one of :data:`CHECKPOINTED` up to a step; called in a process of its own."""
    torch.set_num_threads(1)
    train = CHECKPOINTED[name]
    env, config = train.args
    on(train, Fatal(env, config.num_envs, steps))(checkpoint_dir=folder)
