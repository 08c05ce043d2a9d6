"""From an id, a factory or a vector environment to one checked vector environment."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, TypeAlias

import gymnasium as gym
import numpy as np
from gymnasium.envs.registration import EnvSpec
from gymnasium.vector import AutoresetMode, SyncVectorEnv, VectorEnv

from policyopt._checks import require

__all__ = ["EnvLike", "make_vector_env"]

EnvLike: TypeAlias = (
    "str | EnvSpec | Callable[[], gym.Env[Any, Any]] | VectorEnv[Any, Any, Any]"
)
"""An environment id (``"CartPole-v1"``), a spec, a factory of single environments, or a
vector environment.
"""

_CARTPOLE = "gymnasium.envs.classic_control.cartpole:CartPole"
_SAME_TASK = (f"{_CARTPOLE}Env", f"{_CARTPOLE}VectorEnv")
"""Entry points, single and vector, that are one task: the same spaces, dynamics,
rewards and time limit."""


_PROTOCOL = "single_observation_space single_action_space metadata spec unwrapped"


def environment_name(env: EnvLike) -> str:
    """Return a short name for messages and tables."""
    if isinstance(env, str):
        return env
    if isinstance(env, partial):
        by_id = env.func is gym.make and env.args
        return environment_name(env.args[0] if by_id else env.func)
    spec = env if isinstance(env, EnvSpec) else getattr(env, "spec", None)
    if spec is not None:
        return str(spec.id)
    return str(getattr(env, "__name__", None) or type(env).__name__)


def describe(env: Any) -> list[str]:
    """Say what can be told of a vector environment's task besides its spaces: id, time
    limit and arguments of the first copy, its class and those of its wrappers with
    their arguments. What a function computes cannot be told.
    """
    one = env.unwrapped.envs[0] if isinstance(env.unwrapped, SyncVectorEnv) else env
    told = [one.spec and (one.spec.id, one.spec.max_episode_steps, one.spec.kwargs)]
    while isinstance(one, gym.Env):
        told.append((type(one).__name__, getattr(one, "_saved_kwargs", None)))
        one = getattr(one, "env", None)
    # Addresses of objects differ between runs.
    return [str(item).split(" at 0x")[0] for item in told]


def environment_seed(seed: int, stream: int = 0) -> int:
    """Derive the environment's seed from a run's seed.

    A vector environment seeds its copies with s, s + 1, s + 2, …; runs with the seeds
    0, 1, 2 would share most of their episodes. Hashing keeps runs (and the streams
    "training" 0 and "evaluation" 1 of one run) apart.
    """
    # 31 bits: Gymnasium's copies add their index, and some environments refuse seeds
    # beyond 2**32 - 1.
    return int(np.random.SeedSequence([seed, stream]).generate_state(1)[0] >> 1)


def make_vector_env(
    env: EnvLike, num_envs: int
) -> tuple[VectorEnv[Any, Any, Any], bool]:
    """Return a vector environment and whether it was made here (and should be closed
    here).

    The environment is the one that ``gym.make`` makes. CartPole has a vector
    implementation of the same task, which is used: all copies then step in a few NumPy
    calls. Other ids and factories run ``num_envs`` copies one after another in this
    process, also where a ``vector_entry_point`` is registered: nothing promises that it
    has the same spaces and rewards (Atari's stacks and shrinks images and clips
    rewards), and equal spaces would not show that the rewards are. To train in such an
    environment make it yourself: ``gym.make_vec(id, num_envs)``.

    Vector environments of tensors are taken as Gymnasium's wrapper ``NumpyToTorch``
    makes them and ManiSkill's ``ManiSkillVectorEnv`` is one. They need not inherit from
    ``VectorEnv``: a ``gymnasium.Env`` with ``num_envs``, the two ``single_..._space``
    and ``metadata["autoreset_mode"]`` will do, the last of which you may have to set.
    ``reset(seed=...)`` returns observations and info. ``step`` takes a tensor of
    actions ``[N, *shape]`` on the observations' device, in the type of the space, and
    returns observations (one tensor: where there is a dictionary of them, as in Isaac
    Lab, choose or join its entries in a wrapper), rewards, two bool tensors ``[N]``,
    and info. The tensors may be the same ones in every step. Where the reset is of the
    same step, a copy's final observation is in its row of ``info["final_obs"]`` or
    ``"final_observation"``: add it in a wrapper if it is not there, because without it
    V of the state after a time limit is unknown.

    Parameters
    ----------
    env : EnvLike
        A vector environment is used as it is, with its own number of copies.
    num_envs : int
        Number of copies, ≥ 1.

    Raises
    ------
    ValueError
        If ``env`` is none of these things, ``num_envs`` < 1, or a vector environment
        lacks something or does not reset itself in one of Gymnasium's two modes.
    """
    if hasattr(env, "num_envs") and not isinstance(env, type):
        return _checked(env), False
    wanted = "env must be an id, a factory or a vector environment"
    if isinstance(env, gym.Env):
        by_spec = "its `.spec`, or " if env.spec is not None else ""
        raise ValueError(
            f"{wanted}, got one {type(env).__name__} instance; to get copies, pass "
            f"{by_spec}a function that makes one with the same arguments, time limit "
            "and wrappers, e.g. `lambda: gym.make(...)`"
        )
    require(num_envs >= 1, "num_envs must be >= 1", num_envs)
    factory: Any = env
    if isinstance(env, (str, EnvSpec)):
        spec = gym.spec(env) if isinstance(env, str) else env
        same = (spec.entry_point, spec.vector_entry_point) == _SAME_TASK
        # Without a limit in the spec the vector implementation would take its own.
        same = same and spec.max_episode_steps is not None
        if spec.entry_point is None or (same and not spec.additional_wrappers):
            made = gym.make_vec(spec, num_envs, vectorization_mode="vector_entry_point")
            return _checked(made), True
        # The passive checker costs more than many environments do; rollouts check what
        # matters.
        factory = partial(gym.make, spec, disable_env_checker=True)
    require(callable(factory), wanted, env)
    mode = AutoresetMode.NEXT_STEP
    return SyncVectorEnv([factory] * num_envs, autoreset_mode=mode), True


def _checked(env: Any) -> Any:
    kind = type(env).__name__
    for name in _PROTOCOL.split():
        require(hasattr(env, name), f"a {kind} with num_envs must have {name}", None)
    mode = env.metadata.get("autoreset_mode")
    allowed = (AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP)
    rule = f"env must reset its copies itself ({kind}.metadata['autoreset_mode'])"
    require(mode in allowed, rule, mode, "use AutoresetMode.NEXT_STEP or SAME_STEP")
    return env
