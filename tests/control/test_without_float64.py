"""Devices without float64 (Apple's MPS), played by the CPU: any float64 tensor outside the host raises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from control_runs import TRAINERS, on, with_config
from gymnasium import spaces
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary

from policyopt.control import ObservationEncoder, evaluate, policies

_to = Tensor.to


class WithoutFloat64(TorchDispatchMode):
    """What ``.cpu()`` and ``from_numpy`` return is on the host, and so is what comes of it. The rest, and what is
    moved by ``.to(device)``, is on the device.

    As with Apple's, a float64 tensor on the device is a TypeError, and mixing fractions of the two places a
    RuntimeError.
    """

    def __init__(self) -> None:
        super().__init__()
        self.host = WeakIdKeyDictionary()

    def to_host(self, tensor: Tensor) -> Tensor:
        copied = tensor.clone()
        self.host[copied] = True
        return copied

    def to(self, tensor: Tensor, *args: Any, **options: Any) -> Tensor:
        moved: Tensor = _to(tensor, *args, **options)
        if any(isinstance(x, torch.device) for x in args):
            moved = moved.clone()
            self.host.pop(moved, None)
        return moved

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten.lift_fresh.default:  # from NumPy
            self.host[result] = True
            return result
        before = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        after = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        here = [x in self.host for x in before]
        if func is torch.ops.aten.copy_.default:  # from place to place
            after = []
        elif any(here):
            fractions = [h for h, x in zip(here, before, strict=True) if x.ndim and x.is_floating_point()]
            if len(set(fractions)) > 1:
                raise RuntimeError(f"{func} of tensors on the device and on the host")
            for x in after:
                self.host[x] = True
        for x in [*before, *after]:
            if x.dtype == torch.float64 and x not in self.host:
                raise TypeError(f"{func}: the device does not have float64")
        return result


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    mode = WithoutFloat64()
    monkeypatch.setattr(policies, "has_float64", lambda device: False)
    monkeypatch.setattr(Tensor, "cpu", lambda tensor: mode.to_host(tensor))
    monkeypatch.setattr(Tensor, "to", lambda tensor, *args, **options: mode.to(tensor, *args, **options))
    with mode:
        yield


class Task(gym.Env[Any, Any]):
    """Observations in any type, far from 0 if wanted; episodes of about 10 steps."""

    def __init__(self, dtype: Any, actions: gym.Space[Any], offset: float = 0.0) -> None:
        self.action_space, self.offset = actions, offset
        self.observation_space = spaces.Box(-(2**40), 2**40, (3,), dtype)

    def _observe(self) -> Any:
        dtype = self.observation_space.dtype
        return np.array(self.offset, dtype) + (10 * self.np_random.normal(size=3)).astype(dtype)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        return self._observe(), float(self.np_random.normal()), bool(self.np_random.random() < 0.1), False, {}


ACTIONS = [spaces.Discrete(3, start=1), spaces.Box(-2, 2, (2,), np.float64), spaces.MultiDiscrete([2, 3])]


@pytest.mark.usefixtures("device")
def test_the_device_refuses_float64() -> None:
    x = torch.ones(3)
    with pytest.raises(TypeError, match="does not have float64"):
        x.double()
    with pytest.raises(RuntimeError, match="on the device and on the host"):
        x + x.cpu()
    assert x.cpu().double().sum().item() == 3
    x.copy_(x.cpu().double().mul(2).float())
    assert x.tolist() == [2, 2, 2]


@pytest.mark.usefixtures("device")
@pytest.mark.parametrize("actions", ACTIONS, ids=str)
@pytest.mark.parametrize("dtype", [np.float64, np.float32, np.int64])
@pytest.mark.parametrize("name", TRAINERS)
def test_training_needs_no_float64(name: str, dtype: Any, actions: gym.Space[Any]) -> None:
    def env() -> Task:
        return Task(dtype, actions)

    train = with_config(on(TRAINERS[name], env), normalize_observations=True, normalize_rewards=True)
    result = with_config(train, total_steps=300)()
    tensors = result.policy.state_dict()
    assert {x.dtype for x in tensors.values()} == {torch.float32, torch.int64}
    assert tensors["encoder.count"] == result.steps
    torch.testing.assert_close(tensors["encoder.variance"], torch.full((3,), 100.0), rtol=0.5, atol=0)
    assert evaluate(result.policy, env, episodes=2).lengths.min() >= 1
    assert result.policy.predict(np.zeros(3, dtype)).dtype == actions.dtype
    assert result.policy.predict([0.0, 0.0, 0.0]).dtype == actions.dtype


def test_statistics_are_those_of_a_device_with_float64(request: pytest.FixtureRequest) -> None:
    x = 1e3 + torch.randn(40, 3, generator=torch.Generator().manual_seed(0))
    one, other = (ObservationEncoder(spaces.Box(-1, 1, (3,)), normalize=True) for _ in range(2))
    for part in x.split(10):
        one.update(part)
    request.getfixturevalue("device")
    for part in x.split(10):
        other.update(part)
    for name, buffer in one.state_dict().items():
        assert torch.equal(buffer, other.state_dict()[name])


@pytest.mark.usefixtures("device")
def test_time_stamps_are_refused_with_the_remedy() -> None:
    train = with_config(TRAINERS["ppo"], normalize_observations=True, total_steps=200)
    for dtype in (np.float64, np.int64):
        with pytest.raises(ValueError, match=r"must differ by more than float32 resolves.*device='cpu' if"):
            on(train, lambda dtype=dtype: Task(dtype, ACTIONS[0], 1.7e11))()


def test_normalised_time_stamps_pass_where_there_is_float64() -> None:
    train = with_config(TRAINERS["ppo"], normalize_observations=True, total_steps=200)
    assert on(train, lambda: Task(np.float64, ACTIONS[0], 1.7e11))().steps >= 200
