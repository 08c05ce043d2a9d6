"""Environments of tensors and of NumPy: step by step Gymnasium's, and trained in as they are."""

from __future__ import annotations

import copy
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch

from policyopt.control import PPOConfig, evaluate, train_ppo
from policyopt_book.tasks.tensor_envs import Acrobot, CartPole, Pendulum, TensorEnv

KINDS = pytest.mark.parametrize("kind", [CartPole, Pendulum, Acrobot])
DEVICES = pytest.mark.parametrize("device", ["cpu", "numpy"])


def random_actions(env: TensorEnv, generator: torch.Generator) -> torch.Tensor:
    """Draw actions, some beyond the bounds where there are any."""
    if isinstance(env, Pendulum):
        return 5 * torch.rand(env.num_envs, 1, generator=generator) - 2.5
    # The same action for a while, so that an acrobot gets up in time.
    if torch.rand((), generator=generator) < 0.3 or not hasattr(env, "last"):
        n = env.single_action_space.n  # type: ignore[attr-defined]
        env.last = torch.randint(0, n, (env.num_envs,), generator=generator)  # type: ignore[attr-defined]
    return env.last  # type: ignore[no-any-return, attr-defined]


def moved(env: TensorEnv, actions: torch.Tensor) -> Any:
    """Make a step, in NumPy if the environment is of NumPy, and return tensors."""
    if env.device is not None:
        return env.step(actions)
    *columns, info = env.step(actions.numpy())
    assert all(isinstance(x, np.ndarray) for x in (*columns, *info.values(), env.state))
    return *map(torch.from_numpy, columns), {name: torch.from_numpy(x) for name, x in info.items()}


def theirs(env: TensorEnv) -> list[Any]:
    """One environment of Gymnasium for each copy, with the time limit."""
    singles = [gym.make(env.id) for _ in range(env.num_envs)]
    for single in singles:
        single.reset(seed=0)
    return singles


@KINDS
@DEVICES
def test_equal_to_gymnasiums_step_by_step(kind: type[TensorEnv], device: str) -> None:
    """600 steps of 3 copies through ends and time limits; each from the same state by the same action."""
    env, generator = kind(3, device=device), torch.Generator().manual_seed(0)
    env.reset(seed=1)
    singles, over = theirs(env), 0
    for _ in range(600):
        for i, single in enumerate(singles):
            single.unwrapped.state = torch.as_tensor(env.state)[:, i].numpy().copy()
        actions = random_actions(env, generator)
        observation, reward, terminated, truncated, info = moved(env, actions)
        assert observation.dtype == reward.dtype == torch.float32
        for i, single in enumerate(singles):
            expected, r, term, trunc, _ = single.step(actions[i].numpy())
            done = bool(terminated[i] | truncated[i])
            assert (bool(terminated[i]), bool(truncated[i])) == (term, trunc)
            seen = info["final_obs"][i] if done else observation[i]
            np.testing.assert_allclose(seen.numpy(), expected, rtol=1e-6, atol=1e-6)
            assert reward[i].item() == pytest.approx(r, rel=1e-6)
            over += done
            if done:
                single.reset()
                assert env.age[i] == 0
                assert not torch.equal(observation[i], info["final_obs"][i])
    assert over >= 3


@pytest.mark.parametrize("kind", [CartPole, Pendulum])
@DEVICES
def test_whole_episodes_are_gymnasiums(kind: type[TensorEnv], device: str) -> None:
    """Neither state is ever put right. An acrobot is too chaotic for that."""
    env, generator = kind(4, device=device), torch.Generator().manual_seed(0)
    env.reset(seed=2)
    singles = theirs(env)
    for i, single in enumerate(singles):
        single.unwrapped.state = torch.as_tensor(env.state)[:, i].numpy().copy()
    running = set(range(4))
    while running:
        actions = random_actions(env, generator)
        observation, _, terminated, truncated, info = moved(env, actions)
        for i in list(running):
            expected, _, term, trunc, _ = singles[i].step(actions[i].numpy())
            done = bool(terminated[i] | truncated[i])
            seen = info["final_obs"][i] if done else observation[i]
            np.testing.assert_allclose(seen.numpy(), expected, rtol=1e-6, atol=1e-6)
            assert done == (term or trunc)
            running -= {i} if done else set()


@KINDS
@DEVICES
def test_start_states_are_gymnasiums(kind: type[TensorEnv], device: str) -> None:
    """Uniform between the same bounds; the same again with the same seed, and others in each reset."""
    env = kind(4000, device=device)
    env.reset()  # without a seed too
    first = torch.as_tensor(env.reset(seed=3)[0])
    drawn = torch.as_tensor(env.state).numpy()
    low, high = drawn.min(1), drawn.max(1)
    starts = []
    for seed in range(300):
        env.task.reset(seed=seed)
        starts.append(env.task.state)
    bound = np.abs(starts).max(0)
    np.testing.assert_allclose(high, bound, rtol=0.05)
    np.testing.assert_allclose(-low, bound, rtol=0.05)
    np.testing.assert_allclose(drawn.mean(1), 0, atol=0.05 * bound.max())
    assert not torch.equal(first, torch.as_tensor(env.reset()[0]))
    assert torch.equal(first, torch.as_tensor(env.reset(seed=3)[0]))
    with pytest.raises(ValueError, match="num_envs must be >= 1, got 0"):
        kind(0)


@KINDS
def test_spaces_are_gymnasiums(kind: type[TensorEnv]) -> None:
    env, single = kind(2), gym.make(kind.id)
    assert env.single_observation_space == single.observation_space
    assert env.single_action_space == single.action_space
    assert env.action_space.shape == (2, *single.action_space.shape)  # type: ignore[misc]
    observation, _ = env.reset(seed=0)
    assert env.observation_space.contains(observation.numpy())


@KINDS
@DEVICES
def test_in_float32_a_final_observation_is_the_old_episodes(kind: type[TensorEnv], device: str) -> None:
    env = kind(3, device=device, dtype=torch.float32)
    env.reset(seed=0)
    env.limit = 2
    actions = random_actions(env, torch.Generator().manual_seed(0))
    first = moved(env, actions)[0]
    observation, _, _, _, info = moved(env, actions)
    assert torch.as_tensor(env.state).dtype == torch.float32
    assert not torch.equal(info["final_obs"], observation)
    again = kind(3, device=device, dtype=torch.float32)
    again.reset(seed=0)
    assert torch.equal(moved(again, actions)[0], first)
    assert torch.equal(moved(again, actions)[0], info["final_obs"])
    assert copy.deepcopy(env).num_envs == 3  # for seeds that run in turn


@KINDS
def test_float32_is_nearly_the_same(kind: type[TensorEnv]) -> None:
    env, narrow = kind(50), kind(50, dtype=torch.float32)
    env.reset(seed=0)
    narrow.reset(seed=0)
    narrow.state = env.state.float()
    actions = random_actions(env, torch.Generator().manual_seed(0))
    assert narrow.state.dtype == torch.float32
    torch.testing.assert_close(env.step(actions)[:4], narrow.step(actions)[:4], rtol=1e-4, atol=1e-4)


@DEVICES
def test_training_is_reproducible_and_solves_cartpole(device: str) -> None:
    config = PPOConfig(total_steps=60_000, num_envs=1, gamma=0.98, learning_rate=1e-2, device="cpu")
    runs = [train_ppo(CartPole(32, device=device), config, seed=0, progress=False) for _ in range(2)]
    assert runs[0].environment == "CartPole-v1"
    assert runs[0].num_envs == 32
    first, second = (list(run.policy.parameters()) for run in runs)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    # Good on Gymnasium's own, and measured alike on ours.
    assert evaluate(runs[0].policy, "CartPole-v1").mean > 400
    assert evaluate(runs[0].policy, CartPole(20, device=device)).mean > 400
