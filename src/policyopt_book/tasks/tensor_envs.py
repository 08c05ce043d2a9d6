"""CartPole, Pendulum and Acrobot as environments of tensors: many copies, on any
device, step by step equal to Gymnasium's.

Spaces, constants and time limit are read from Gymnasium's own environment; the
equations of motion are written here once more, for all copies at a time. A copy whose
episode ends is reset in the same step, and its final observation is in
``info["final_obs"]``. What is random is drawn by a generator of the device, so start
states are not those that Gymnasium draws with the same seed.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import gymnasium as gym
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space
from torch import Tensor

from policyopt._checks import require

__all__ = ["Acrobot", "CartPole", "Pendulum", "TensorEnv"]


class TensorEnv(VectorEnv[Tensor, Tensor, Tensor]):
    """``N`` copies of a task whose state is a few numbers.

    Subclasses say how it starts and moves and what is seen of it. The state is one row
    for each number and one column for each copy, ``[D, N]``.

    Parameters
    ----------
    num_envs : int
        Number of copies ``N``, ≥ 1.
    device : str or torch.device
        Where everything is computed.
    dtype : torch.dtype
        Of the state. Gymnasium's is float64, the default; float32 is faster, and all
        that Apple's GPUs have. Observations and rewards are float32.

    Examples
    --------
    >>> env = CartPole(3)
    >>> observation, _ = env.reset(seed=0)
    >>> observation, reward, terminated, *_ = env.step(torch.tensor([0, 1, 1]))
    >>> observation.shape, reward.tolist(), terminated.tolist()
    (torch.Size([3, 4]), [1.0, 1.0, 1.0], [False, False, False])
    """

    metadata: dict[str, Any] = {  # noqa: RUF012
        "autoreset_mode": AutoresetMode.SAME_STEP
    }
    id: ClassVar[str]

    def __init__(
        self,
        num_envs: int,
        *,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float64,
    ) -> None:
        require(num_envs >= 1, "num_envs must be >= 1", num_envs)
        self.num_envs, self.device, self.dtype = num_envs, torch.device(device), dtype
        self.spec = gym.spec(self.id)
        self.task: Any = gym.make(self.id, disable_env_checker=True).unwrapped
        self.single_observation_space = self.task.observation_space
        self.single_action_space = self.task.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.limit = int(self.spec.max_episode_steps or 0)
        self.generator = torch.Generator(self.device)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Tensor, dict[str, Any]]:
        """Begin every copy's next episode; ``seed`` restarts the random stream."""
        if seed is not None:
            self.generator.manual_seed(seed)
        self.state = self._start(self.num_envs)
        self.age = torch.zeros(self.num_envs, dtype=torch.long, device=self.device)
        return self._observe(), {}

    def step(
        self, actions: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, Any]]:
        """Move every copy by its action ``[N, ...]``; return observations ``[N, ...]``,
        rewards ``[N]``, terminated and truncated ``[N]``, and info.
        """
        reward, terminated = self._move(actions)
        self.age = self.age + 1
        observation, truncated = self._observe(), self.age >= self.limit
        over = (terminated | truncated).nonzero()[:, 0]
        info: dict[str, Any] = {}
        if len(over):
            info["final_obs"] = observation
            self.state[:, over] = self._start(len(over))
            self.age[over] = 0
            observation = self._observe()
        return observation, reward.float(), terminated, truncated, info

    def _start(self, copies: int) -> Tensor:
        """Draw start states ``[D, copies]``."""
        raise NotImplementedError

    def _move(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        """Change the state; return rewards and which copies are in a terminal state."""
        raise NotImplementedError

    def _observe(self) -> Tensor:
        """Return what is seen of the state, ``[N, ...]``, float32."""
        raise NotImplementedError

    def _uniform(self, *high: float, copies: int) -> Tensor:
        """Draw numbers between −high and high, ``[D, copies]``."""
        bound = torch.tensor(high, dtype=self.dtype, device=self.device)[:, None]
        draw = torch.empty(len(high), copies, dtype=self.dtype, device=self.device)
        return bound * draw.uniform_(-1, 1, generator=self.generator)


class CartPole(TensorEnv):
    """Gymnasium's ``CartPole-v1``: push a cart left (0) or right (1) so that the pole
    on it stays up. Seen are position (m), its speed, angle (rad) and its speed.
    """

    id = "CartPole-v1"

    def _start(self, copies: int) -> Tensor:
        return self._uniform(0.05, 0.05, 0.05, 0.05, copies=copies)

    def _move(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        t = self.task
        x, speed, angle, spin = self.state
        force = (2 * actions - 1) * t.force_mag
        cos, sin = angle.cos(), angle.sin()
        push = (force + t.polemass_length * spin.square() * sin) / t.total_mass
        lever = t.length * (4.0 / 3.0 - t.masspole * cos.square() / t.total_mass)
        turn = (t.gravity * sin - cos * push) / lever
        pull = push - t.polemass_length * turn * cos / t.total_mass
        rates = torch.stack([speed, pull, spin, turn])
        self.state = self.state + t.tau * rates
        x, _, angle, _ = self.state.abs()
        out = (x > t.x_threshold) | (angle > t.theta_threshold_radians)
        return torch.ones_like(x), out

    def _observe(self) -> Tensor:
        return self.state.T.float()


class Pendulum(TensorEnv):
    """Gymnasium's ``Pendulum-v1``: swing a pendulum up by a torque in [−2, 2] (N m) and
    hold it. Seen are cosine and sine of its angle, and its speed (rad/s).
    """

    id = "Pendulum-v1"

    def _start(self, copies: int) -> Tensor:
        return self._uniform(math.pi, 1.0, copies=copies)

    def _move(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        t = self.task
        angle, spin = self.state
        torque = actions[:, 0].clamp(-t.max_torque, t.max_torque)
        off = torch.remainder(angle + math.pi, 2 * math.pi) - math.pi
        cost = off.square() + 0.1 * spin.square() + 0.001 * torque.square()
        gravity, drive = 3 * t.g / (2 * t.l), 3.0 / (t.m * t.l**2)
        spin = spin + (gravity * angle.sin() + drive * torque) * t.dt
        spin = spin.clamp(-t.max_speed, t.max_speed)
        self.state = torch.stack([angle + spin * t.dt, spin])
        return -cost, torch.zeros_like(cost, dtype=torch.bool)

    def _observe(self) -> Tensor:
        angle, spin = self.state
        return torch.stack([angle.cos(), angle.sin(), spin], 1).float()


class Acrobot(TensorEnv):
    """Gymnasium's ``Acrobot-v1``: swing two links up to a height by a torque of −1, 0
    or 1 (N m) between them (the actions 0, 1, 2). Seen are cosine and sine of both
    angles, and their speeds (rad/s).
    """

    id = "Acrobot-v1"

    def _start(self, copies: int) -> Tensor:
        # Gymnasium rounds it to float32.
        return self._uniform(0.1, 0.1, 0.1, 0.1, copies=copies).float().to(self.dtype)

    def _rates(self, state: Tensor, torque: Tensor) -> Tensor:
        """Return the derivative of the state in time, ``[D, N]`` (Sutton 1996,
        Generalization in reinforcement learning, with the terms that it leaves out).
        """
        t, g = self.task, 9.8
        m1, m2, moment = t.LINK_MASS_1, t.LINK_MASS_2, t.LINK_MOI
        l1, c1, c2 = t.LINK_LENGTH_1, t.LINK_COM_POS_1, t.LINK_COM_POS_2
        angle, bend, spin, fold = state
        reach, swing = m2 * l1 * c2 * bend.cos(), m2 * l1 * c2 * bend.sin()
        outer = m2 * c2**2 + moment
        d2 = outer + reach
        d1 = m1 * c1**2 + m2 * l1**2 + moment + reach + d2
        # cos(x − π/2) = sin x
        phi2 = m2 * c2 * g * (angle + bend).sin()
        weight = (m1 * c1 + m2 * l1) * g * angle.sin()
        phi1 = weight + phi2 - swing * fold * (fold + 2 * spin)
        share = d2 / d1
        bending = torque + share * phi1 - swing * spin.square() - phi2
        bending = bending / (outer - d2 * share)
        return torch.stack([spin, fold, -share * bending - phi1 / d1, bending])

    def _move(self, actions: Tensor) -> tuple[Tensor, Tensor]:
        t, dt = self.task, self.task.dt
        torque = actions.to(self.dtype) - 1
        # The classic Runge-Kutta step of fourth order.
        k1 = self._rates(self.state, torque)
        k2 = self._rates(self.state + dt / 2 * k1, torque)
        k3 = self._rates(self.state + dt / 2 * k2, torque)
        k4 = self._rates(self.state + dt * k3, torque)
        moved = self.state + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        angles, (spin, fold) = moved[:2], moved[2:]
        angles = angles - 2 * math.pi * (angles / (2 * math.pi)).round()
        spin = spin.clamp(-t.MAX_VEL_1, t.MAX_VEL_1)
        fold = fold.clamp(-t.MAX_VEL_2, t.MAX_VEL_2)
        self.state = torch.stack([*angles, spin, fold])
        height = -angles[0].cos() - (angles[0] + angles[1]).cos()
        up = height > 1.0
        return up.to(self.dtype) - 1, up

    def _observe(self) -> Tensor:
        angle, bend, spin, fold = self.state
        seen = [angle.cos(), angle.sin(), bend.cos(), bend.sin(), spin, fold]
        return torch.stack(seen, 1).float()
