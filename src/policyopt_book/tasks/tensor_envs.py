"""CartPole, Pendulum and Acrobot as environments of tensors, many copies on any device,
or of NumPy's arrays: step by step equal to Gymnasium's.

Spaces, constants and time limit are read from Gymnasium's own environment; the
equations of motion are written here once more, for all copies at a time, in functions
that PyTorch and NumPy have in common. A copy whose episode ends is reset in the same
step, and its final observation is in ``info["final_obs"]``. What is random is drawn by
a generator of the device or of NumPy, so start states are not those that Gymnasium
draws with the same seed.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, cast

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import batch_space

from policyopt._checks import require

__all__ = ["Acrobot", "CartPole", "Pendulum", "TensorEnv"]


class TensorEnv(VectorEnv[Any, Any, Any]):
    """``N`` copies of a task whose state is a few numbers.

    Subclasses say how it starts and moves and what is seen of it. The state is one row
    for each number and one column for each copy, ``[D, N]``.

    Parameters
    ----------
    num_envs : int
        Number of copies ``N``, ≥ 1.
    device : str or torch.device
        Where everything is computed; ``"numpy"`` is NumPy, which on a CPU is faster up
        to some hundreds of copies.
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
        self.num_envs, self.dtype = num_envs, dtype
        self.device = None if device == "numpy" else torch.device(device)
        self.spec = gym.spec(self.id)
        self.task: Any = gym.make(self.id, disable_env_checker=True).unwrapped
        self.single_observation_space = self.task.observation_space
        self.single_action_space = self.task.action_space
        self.observation_space = batch_space(self.single_observation_space, num_envs)
        self.action_space = batch_space(self.single_action_space, num_envs)
        self.limit = int(self.spec.max_episode_steps or 0)
        self.generator: Any = torch.Generator(self.device) if self.device else None

    @property
    def xp(self) -> Any:
        """The module whose functions compute: ``torch`` or ``numpy``."""
        return np if self.device is None else torch

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Begin every copy's next episode; ``seed`` restarts the random stream."""
        if self.device is None and (seed is not None or self.generator is None):
            self.generator = np.random.default_rng(seed)
        elif self.device is not None and seed is not None:
            self.generator.manual_seed(seed)
        self.state = self._start(self.num_envs)
        self.age = self._cast(self.xp.zeros_like(self.state[0]), torch.int64)
        return self._observe(), {}

    def step(self, actions: Any) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        """Move every copy by its action ``[N, ...]``; return observations ``[N, ...]``,
        rewards ``[N]``, terminated and truncated ``[N]``, and info.
        """
        reward, terminated = self._move(actions)
        # NumPy widens where constants are float64.
        self.state = self._cast(self.state, self.dtype)
        self.age = self.age + 1
        observation, truncated = self._observe(), self.age >= self.limit
        (over,) = self.xp.where(terminated | truncated)
        info: dict[str, Any] = {}
        if len(over):
            info["final_obs"] = observation
            self.state[:, over] = self._start(len(over))
            self.age[over] = 0
            observation = self._observe()
        return observation, self._cast(reward), terminated, truncated, info

    def _start(self, copies: int) -> Any:
        """Draw start states ``[D, copies]``."""
        raise NotImplementedError

    def _move(self, actions: Any) -> tuple[Any, Any]:
        """Change the state; return rewards and which copies are in a terminal state."""
        raise NotImplementedError

    def _observe(self) -> Any:
        """Return a copy of what is seen of the state, ``[N, ...]``, float32."""
        raise NotImplementedError

    def _uniform(self, *high: float, copies: int) -> Any:
        """Draw numbers between −high and high, ``[D, copies]``."""
        size, bound = (len(high), copies), cast(Any, np.array(high))
        if self.device is None:
            drawn = self.generator.uniform(-1, 1, size)
        else:
            drawn = torch.empty(size, dtype=self.dtype, device=self.device)
            drawn.uniform_(-1, 1, generator=self.generator)
            bound = torch.tensor(high, dtype=self.dtype, device=self.device)
        return self._cast(bound[:, None] * drawn, self.dtype)

    def _cast(self, x: Any, dtype: torch.dtype = torch.float32) -> Any:
        """Return numbers in a type, by PyTorch's name of it."""
        if self.device is None:
            return x.astype(str(dtype).removeprefix("torch."), copy=False)
        return x.to(dtype)


class CartPole(TensorEnv):
    """Gymnasium's ``CartPole-v1``: push a cart left (0) or right (1) so that the pole
    on it stays up. Seen are position (m), its speed, angle (rad) and its speed.
    """

    id = "CartPole-v1"

    def _start(self, copies: int) -> Any:
        return self._uniform(0.05, 0.05, 0.05, 0.05, copies=copies)

    def _move(self, actions: Any) -> tuple[Any, Any]:
        t, xp = self.task, self.xp
        _, speed, angle, spin = self.state
        force = (2 * actions - 1) * t.force_mag
        cos, sin = xp.cos(angle), xp.sin(angle)
        push = (force + t.polemass_length * spin**2 * sin) / t.total_mass
        lever = t.length * (4.0 / 3.0 - t.masspole * cos**2 / t.total_mass)
        turn = (t.gravity * sin - cos * push) / lever
        pull = push - t.polemass_length * turn * cos / t.total_mass
        rates = xp.stack([speed, pull, spin, turn])
        self.state = self.state + t.tau * rates
        x, _, angle, _ = abs(self.state)
        out = (x > t.x_threshold) | (angle > t.theta_threshold_radians)
        return xp.ones_like(x), out

    def _observe(self) -> Any:
        return self._cast(self.xp.stack([*self.state], 1))


class Pendulum(TensorEnv):
    """Gymnasium's ``Pendulum-v1``: swing a pendulum up by a torque in [−2, 2] (N m) and
    hold it. Seen are cosine and sine of its angle, and its speed (rad/s).
    """

    id = "Pendulum-v1"

    def _start(self, copies: int) -> Any:
        return self._uniform(math.pi, 1.0, copies=copies)

    def _move(self, actions: Any) -> tuple[Any, Any]:
        t, xp = self.task, self.xp
        angle, spin = self.state
        torque = xp.clip(actions[:, 0], -t.max_torque, t.max_torque)
        off = xp.remainder(angle + math.pi, 2 * math.pi) - math.pi
        cost = off**2 + 0.1 * spin**2 + 0.001 * torque**2
        gravity, drive = 3 * t.g / (2 * t.l), 3.0 / (t.m * t.l**2)
        spin = spin + (gravity * xp.sin(angle) + drive * torque) * t.dt
        spin = xp.clip(spin, -t.max_speed, t.max_speed)
        self.state = xp.stack([angle + spin * t.dt, spin])
        return -cost, xp.zeros_like(cost, dtype=bool)

    def _observe(self) -> Any:
        (angle, spin), xp = self.state, self.xp
        return self._cast(xp.stack([xp.cos(angle), xp.sin(angle), spin], 1))


class Acrobot(TensorEnv):
    """Gymnasium's ``Acrobot-v1``: swing two links up to a height by a torque of −1, 0
    or 1 (N m) between them (the actions 0, 1, 2). Seen are cosine and sine of both
    angles, and their speeds (rad/s).
    """

    id = "Acrobot-v1"

    def _start(self, copies: int) -> Any:
        # Gymnasium rounds it to float32.
        drawn = self._cast(self._uniform(0.1, 0.1, 0.1, 0.1, copies=copies))
        return self._cast(drawn, self.dtype)

    def _rates(self, state: Any, torque: Any) -> Any:
        """Return the derivative of the state in time, ``[D, N]`` (Sutton 1996,
        Generalization in reinforcement learning, with the terms that it leaves out).
        """
        t, xp, g = self.task, self.xp, 9.8
        m1, m2, moment = t.LINK_MASS_1, t.LINK_MASS_2, t.LINK_MOI
        l1, c1, c2 = t.LINK_LENGTH_1, t.LINK_COM_POS_1, t.LINK_COM_POS_2
        angle, bend, spin, fold = state
        reach, swing = m2 * l1 * c2 * xp.cos(bend), m2 * l1 * c2 * xp.sin(bend)
        outer = m2 * c2**2 + moment
        d2 = outer + reach
        d1 = m1 * c1**2 + m2 * l1**2 + moment + reach + d2
        # cos(x − π/2) = sin x
        phi2 = m2 * c2 * g * xp.sin(angle + bend)
        weight = (m1 * c1 + m2 * l1) * g * xp.sin(angle)
        phi1 = weight + phi2 - swing * fold * (fold + 2 * spin)
        share = d2 / d1
        bending = torque + share * phi1 - swing * spin**2 - phi2
        bending = bending / (outer - d2 * share)
        return xp.stack([spin, fold, -share * bending - phi1 / d1, bending])

    def _move(self, actions: Any) -> tuple[Any, Any]:
        t, xp, dt = self.task, self.xp, self.task.dt
        torque = self._cast(actions, self.dtype) - 1
        # The classic Runge-Kutta step of fourth order.
        k1 = self._rates(self.state, torque)
        k2 = self._rates(self.state + dt / 2 * k1, torque)
        k3 = self._rates(self.state + dt / 2 * k2, torque)
        k4 = self._rates(self.state + dt * k3, torque)
        moved = self.state + dt / 6 * (k1 + 2 * k2 + 2 * k3 + k4)
        angles, (spin, fold) = moved[:2], moved[2:]
        angles = angles - 2 * math.pi * xp.round(angles / (2 * math.pi))
        spin = xp.clip(spin, -t.MAX_VEL_1, t.MAX_VEL_1)
        fold = xp.clip(fold, -t.MAX_VEL_2, t.MAX_VEL_2)
        self.state = xp.stack([*angles, spin, fold])
        height = -xp.cos(angles[0]) - xp.cos(angles[0] + angles[1])
        up = height > 1.0
        return self._cast(up) - 1, up

    def _observe(self) -> Any:
        (angle, bend, spin, fold), xp = self.state, self.xp
        seen = [xp.cos(angle), xp.sin(angle), xp.cos(bend), xp.sin(bend), spin, fold]
        return self._cast(xp.stack(seen, 1))
