"""From ids, factories and vector environments to one checked vector environment."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.envs.classic_control import PendulumEnv
from gymnasium.envs.classic_control.cartpole import CartPoleEnv, CartPoleVectorEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray

from policyopt.control import make_policy, sample_episodes
from policyopt.control.environments import environment_name, environment_seed, make_vector_env


def test_an_id_with_its_own_vector_implementation_uses_it() -> None:
    env, owned = make_vector_env("CartPole-v1", 3)
    assert isinstance(env.unwrapped, CartPoleVectorEnv)
    assert owned
    assert env.num_envs == 3
    env.close()


def test_its_time_limit_comes_from_the_spec() -> None:
    spec = copy.deepcopy(gym.spec("CartPole-v1"))
    spec.max_episode_steps = 5
    env, _ = make_vector_env(spec, 2)
    env.reset(seed=0)
    truncated = [env.step(np.array([t % 2, t % 2]))[3].tolist() for t in range(5)]
    assert truncated == [[False, False]] * 4 + [[True, True]]
    env.close()


@pytest.mark.parametrize("env", ["Pendulum-v1", partial(gym.make, "Pendulum-v1"), gym.spec("Pendulum-v1")])
def test_other_ids_specs_and_factories_run_side_by_side(env: Any) -> None:
    made, owned = make_vector_env(env, 2)
    assert isinstance(made, SyncVectorEnv)
    assert owned
    assert made.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    observation, _ = made.reset(seed=0)
    assert not np.array_equal(observation[0], observation[1])  # each copy has a seed of its own
    made.close()


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_a_vector_environment_is_used_as_it_is(mode: AutoresetMode) -> None:
    given = SyncVectorEnv([CartPoleEnv] * 2, autoreset_mode=mode)
    assert make_vector_env(given, 7) == (given, False)


def test_a_vector_environment_must_reset_itself() -> None:
    env = SyncVectorEnv([CartPoleEnv], autoreset_mode=AutoresetMode.DISABLED)
    with pytest.raises(ValueError, match=r"env must reset its copies itself.*SyncVectorEnv.*NEXT_STEP"):
        make_vector_env(env, 1)


class Clipped(SyncVectorEnv):
    """The same spaces as the single environment's, but other rewards, as Atari's vector environment has."""

    def __init__(self, num_envs: int, max_episode_steps: int) -> None:
        super().__init__([partial(gym.make, "Pendulum-v1", max_episode_steps=max_episode_steps)] * num_envs)

    def step(self, actions: Any) -> Any:
        observations, rewards, *rest = super().step(actions)
        return observations, np.sign(rewards), *rest


@pytest.fixture
def clipped() -> Iterator[str]:
    name = "MadeUp/Clipped-v0"
    entry_point = "gymnasium.envs.classic_control:PendulumEnv"
    gym.register(name, entry_point, vector_entry_point=Clipped, max_episode_steps=20)
    yield name
    del gym.registry[name]


def rewards(env: Any, steps: int = 5) -> NDArray[Any]:
    made, _ = make_vector_env(env, 2)
    made.reset(seed=0)
    return np.array([made.step(np.full((2, 1), 0.5, np.float32))[1] for _ in range(steps)])


def test_a_vector_entry_point_with_other_rewards_is_not_used(clipped: str) -> None:
    by_factory = rewards(partial(gym.make, clipped))
    assert (by_factory != np.sign(by_factory)).all()
    np.testing.assert_array_equal(rewards(clipped), by_factory)
    np.testing.assert_array_equal(rewards(gym.spec(clipped)), by_factory)
    # Whoever wants it says so.
    np.testing.assert_array_equal(rewards(gym.make_vec(clipped, 2)), np.sign(by_factory))


def test_an_environment_that_only_has_a_vector_implementation_uses_it(clipped: str) -> None:
    spec = copy.deepcopy(gym.spec(clipped))
    spec.entry_point = None
    made, owned = make_vector_env(spec, 2)
    assert isinstance(made, Clipped)
    assert owned


@pytest.mark.parametrize("change", [{"entry_point": PendulumEnv}, {"max_episode_steps": None}])
def test_a_changed_spec_of_cartpole_does_not_get_cartpoles_vector_environment(change: dict[str, Any]) -> None:
    """It would be another task, or have a time limit of its own."""
    spec = copy.deepcopy(gym.spec("CartPole-v1"))
    for name, value in change.items():
        setattr(spec, name, value)
    made, _ = make_vector_env(spec, 2)
    one = gym.make(spec)
    assert isinstance(made, SyncVectorEnv)
    assert made.single_observation_space == one.observation_space


@pytest.mark.parametrize("sutton_barto_reward", [False, True])
def test_cartpoles_vector_environment_is_the_task_of_gym_make(sutton_barto_reward: bool) -> None:
    """From the same state, with the same actions: the same observations, rewards and ends."""
    spec = copy.deepcopy(gym.spec("CartPole-v1"))
    spec.kwargs, spec.max_episode_steps = {"sutton_barto_reward": sutton_barto_reward}, 30
    several, _ = make_vector_env(spec, 1)
    assert isinstance(several.unwrapped, CartPoleVectorEnv)
    one = gym.make(spec)
    assert several.single_observation_space == one.observation_space
    assert several.single_action_space == one.action_space
    several.reset(seed=0)
    for action in ([0, 1] * 20, [1] * 20):
        one.reset(seed=0)
        one.unwrapped.state = several.unwrapped.state[:, 0].copy()  # type: ignore[attr-defined]
        for a in action:
            ours, theirs = several.step(np.array([a])), one.step(a)
            np.testing.assert_allclose(ours[0][0], theirs[0], rtol=1e-5, atol=1e-6)
            assert [float(x[0]) for x in ours[1:4]] == [float(x) for x in theirs[1:4]]
            if ours[2][0] or ours[3][0]:
                break
        else:
            raise AssertionError("no episode ended")
        several.step(np.array([0]))  # the reset


def episode_lengths(env: Any) -> list[int]:
    made, _ = make_vector_env(env, 2)
    policy = make_policy(
        made.single_observation_space, made.single_action_space, generator=torch.Generator().manual_seed(0)
    )
    return sample_episodes(policy, env, episodes=2, max_steps=300).episodes.lengths.tolist()


def test_an_instance_is_refused_with_advice_that_keeps_its_time_limit_and_wrappers() -> None:
    half = np.full(1, 0.5, np.float32)
    env = gym.wrappers.RescaleAction(gym.make("Pendulum-v1", g=5.0, max_episode_steps=30), -half, half)
    with pytest.raises(
        ValueError,
        match=r"env must be an id, a factory.*got one RescaleAction instance; to get copies, pass its `\.spec`, "
        r"or a function that makes one with the same arguments, time limit and wrappers",
    ):
        make_vector_env(env, 2)  # type: ignore[arg-type]
    made, _ = make_vector_env(env.spec, 2)  # type: ignore[arg-type]
    assert made.single_action_space == env.action_space
    assert made.get_attr("g") == (5.0, 5.0)  # type: ignore[attr-defined]
    assert episode_lengths(env.spec) == [30, 30]


def test_an_instance_without_a_spec_gets_no_advice_to_use_it() -> None:
    with pytest.raises(
        ValueError, match=r"got one CartPoleEnv instance; to get copies, pass a function that"
    ):
        make_vector_env(CartPoleEnv(), 2)  # type: ignore[arg-type]


@pytest.mark.parametrize("env", [42, None, ["CartPole-v1"]])
def test_something_else_is_refused(env: Any) -> None:
    with pytest.raises(ValueError, match=r"env must be an id, a factory or a vector environment, got"):
        make_vector_env(env, 2)


def test_the_number_of_copies_is_checked() -> None:
    with pytest.raises(ValueError, match="num_envs must be >= 1, got 0"):
        make_vector_env("CartPole-v1", 0)


def test_an_unknown_id_is_named() -> None:
    with pytest.raises(gym.error.NameNotFound, match="NoSuchEnvironment"):
        make_vector_env("NoSuchEnvironment-v0", 1)


def test_names() -> None:
    def my_factory() -> gym.Env[Any, Any]:
        return CartPoleEnv()

    assert environment_name("CartPole-v1") == "CartPole-v1"
    assert environment_name(gym.spec("CartPole-v1")) == "CartPole-v1"
    assert environment_name(my_factory) == "my_factory"
    assert environment_name(CartPoleEnv) == "CartPoleEnv"
    assert environment_name(partial(CartPoleEnv, render_mode=None)) == "CartPoleEnv"
    assert environment_name(partial(gym.make, "Pendulum-v1")) == "Pendulum-v1"
    assert environment_name(SyncVectorEnv([CartPoleEnv])) == "SyncVectorEnv"


def test_seeds_of_runs_and_streams_do_not_overlap() -> None:
    """Copies are seeded s, s + 1, …: runs 0, 1, 2 … with 100 copies each must not share any."""
    starts = [environment_seed(seed, stream) for seed in range(50) for stream in range(3)]
    assert len({s + i for s in starts for i in range(100)}) == 100 * len(starts)
    assert environment_seed(3) == environment_seed(3, 0) != environment_seed(3, 1)
    assert max(starts) < 2**31
