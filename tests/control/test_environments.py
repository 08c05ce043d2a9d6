"""From ids, factories and vector environments to one checked vector environment."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.envs.classic_control.cartpole import CartPoleEnv, CartPoleVectorEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv

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


def test_an_instance_is_refused_with_the_remedy() -> None:
    with pytest.raises(
        ValueError, match=r"env must be an id, a factory.*instance.*`lambda: CartPoleEnv\(\)`"
    ):
        make_vector_env(gym.make("CartPole-v1"), 2)  # type: ignore[arg-type]


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
