"""Vector environments of tensors: the rollouts of the same environment of NumPy, and what is refused."""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from control_runs import TRAINERS, on, with_config
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import Tensor, nn

from policyopt.control import (
    Collector,
    Policy,
    PPOConfig,
    Rollout,
    evaluate,
    make_policy,
    make_vector_env,
    policies,
    train_ppo,
)
from policyopt.distributions import Categorical

MODES = pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
BOX, FOUR = spaces.Box(-9, 9, (3,), np.float32), spaces.Discrete(4)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Walk(gym.Env[Any, Any]):
    """Any spaces. Observations are random and depend on the actions; episodes last 3 to 9 steps."""

    def __init__(self, observations: gym.Space[Any] = BOX, actions: gym.Space[Any] = FOUR) -> None:
        self.observation_space, self.action_space = copy.deepcopy(observations), actions

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.left = int(self.np_random.integers(3, 10))
        return self.observation_space.sample(), self.info()

    def info(self) -> dict[str, Any]:
        return {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        self.left -= 1
        self.observation_space.seed(int(self.np_random.integers(1000)) + int(10 * np.abs(action).sum()))
        reward, ends = float(self.np_random.normal()), [self.left == 0, False]
        return self.observation_space.sample(), reward, *ends[:: self.np_random.choice([1, -1])], self.info()


def parts(given: Any) -> Any:
    """To tensors."""
    if isinstance(given, dict):
        return {name: parts(x) for name, x in given.items()}
    return torch.from_numpy(np.array(given))


class AsTensors:
    """An environment of NumPy as one of tensors: no VectorEnv, and no more than what is asked for.

    It gives the same tensors in every step, and writes into the actions that it was given.
    """

    def __init__(self, env: Any, final: str = "final_obs") -> None:
        self.env, self.num_envs, self.final = env, env.num_envs, final
        self.kept: dict[str, Tensor] = {}
        self.single_observation_space = env.single_observation_space
        self.single_action_space = env.single_action_space
        self.metadata, self.spec = dict(env.metadata), None

    @property
    def unwrapped(self) -> Any:
        return self

    def in_place(self, name: str, given: Any) -> Any:
        new = torch.from_numpy(np.array(given))
        return self.kept.setdefault(name, new.clone()).copy_(new)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed)
        return self.in_place("observation", observation), self.as_info(info, observation)

    def as_info(self, info: dict[str, Any], observation: Any) -> dict[str, Any]:
        found = {n: torch.from_numpy(np.stack(x)) for n, x in info.items() if n == "action_mask"}
        if "final_obs" in info:
            rows = [x if x is not None else None for x in info["final_obs"]]
            for i, row in enumerate(rows):
                if row is not None:
                    observation[i] = row
            found[self.final] = self.in_place("final", observation)
        return found

    def step(self, actions: Any) -> Any:
        assert isinstance(actions, Tensor)
        assert not actions.is_inference()
        given = actions.numpy().astype(self.single_action_space.dtype)
        assert given.dtype == actions.numpy().dtype
        observation, *rest, info = self.env.step(given)
        actions.zero_()
        names = ("reward", "terminated", "truncated")
        outcome = [self.in_place(name, x) for name, x in zip(names, rest, strict=True)]
        return self.in_place("observation", observation), *outcome, self.as_info(info, observation)


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, policies.MaskedObservations):
        return torch.equal(a.mask, b.mask) and equal(a.values, b.values)
    if isinstance(a, dict):  # the record of episodes
        return a.keys() == b.keys() and all(equal(x, b[name]) for name, x in a.items())
    if isinstance(a, tuple):
        return all(map(equal, a, b))
    return torch.equal(a, b) if isinstance(a, Tensor) else bool(np.array_equal(a, b))


def assert_same(a: Rollout, b: Rollout) -> None:
    for name, x in vars(a).items():
        other = getattr(b, name)
        assert equal(vars(x), vars(other)) if name == "episodes" else equal(x, other), name


@MODES
@pytest.mark.parametrize("observations", [BOX, spaces.Discrete(5)], ids=["box", "discrete"])
@pytest.mark.parametrize(
    "actions",
    [
        spaces.Discrete(3, start=7),
        spaces.MultiDiscrete(np.array([[2, 3]]), start=np.array([[1, -4]])),
        spaces.MultiBinary(2),
        spaces.Box(np.array([0, -2], np.float32), np.array([1, np.inf], np.float32)),
    ],
    ids=str,
)
def test_rollouts_are_those_of_the_same_environment_of_numpy(
    mode: AutoresetMode, observations: gym.Space[Any], actions: gym.Space[Any]
) -> None:
    def collectors() -> list[Collector]:
        policy = make_policy(observations, actions, generator=generator())
        made = [
            SyncVectorEnv([partial(Walk, observations, actions)] * 4, autoreset_mode=mode) for _ in range(2)
        ]
        envs = [made[0], make_vector_env(AsTensors(made[1]), 9)[0]]  # type: ignore[arg-type]
        return [Collector(env, policy, generator(), seed=3) for env in envs]

    ours, theirs = collectors()
    for _ in range(3):
        assert_same(ours.collect(17), theirs.collect(17))
    assert_same(ours.collect_episodes(), theirs.collect_episodes())
    assert ours.steps == theirs.steps


@MODES
def test_masks_are_taken(mode: AutoresetMode) -> None:
    class Masked(Walk):
        def info(self) -> dict[str, Any]:
            return {"action_mask": np.arange(4) != self.left % 4}

    envs = [SyncVectorEnv([Masked] * 3, autoreset_mode=mode) for _ in range(2)]
    policy = make_policy(BOX, FOUR, generator=generator())
    ours = Collector(envs[0], policy, generator(), seed=1).collect(20)
    theirs = Collector(AsTensors(envs[1]), policy, generator(), seed=1).collect(20)  # type: ignore[arg-type]
    assert isinstance(theirs.observations, policies.MaskedObservations)
    assert not theirs.observations.mask.all()
    assert_same(ours, theirs)


def same_step(**options: Any) -> AsTensors:
    return AsTensors(SyncVectorEnv([Walk] * 2, autoreset_mode=AutoresetMode.SAME_STEP), **options)


@pytest.mark.parametrize("train", TRAINERS.values(), ids=TRAINERS)
def test_every_trainer_and_evaluate_take_them(train: Any) -> None:
    results = [
        with_config(on(train, env), total_steps=200, num_envs=2, normalize_rewards=True)()
        for env in (SyncVectorEnv([Walk] * 2, autoreset_mode=AutoresetMode.SAME_STEP), same_step())
    ]
    for a, b in zip(*(r.policy.parameters() for r in results), strict=True):
        assert torch.equal(a, b)
    envs: list[Any] = [same_step(), same_step()]
    returns = [evaluate(results[0].policy, env).returns.tolist() for env in envs]
    assert returns[0] == returns[1]


def test_the_older_name_of_final_observations_is_known() -> None:
    policy = make_policy(BOX, FOUR, generator=generator())
    rollouts = [
        Collector(same_step(final=name), policy, generator(), seed=0).collect(12)  # type: ignore[arg-type]
        for name in ("final_obs", "final_observation")
    ]
    assert len(rollouts[0].final_observations)
    assert_same(*rollouts)


def collect(env: Any, steps: int = 12) -> Rollout:
    policy = make_policy(BOX, FOUR, generator=generator())
    return Collector(env, policy, generator(), seed=0, name="Broken").collect(steps)


def test_missing_final_observations_are_named() -> None:
    with pytest.raises(
        ValueError,
        match=r'info of Broken, which resets in the same step, must hold "final_obs", got \[\'last\'\]; put the '
        r"observations before the reset there, or use AutoresetMode.NEXT_STEP",
    ):
        collect(same_step(final="last"))


@pytest.mark.parametrize("what", ["observation", "reward"])
def test_nan_is_named_with_step_and_copy(what: str) -> None:
    class Broken(AsTensors):
        count = 0

        def step(self, actions: Any) -> Any:
            observation, reward, *rest = super().step(actions)
            self.count += 1
            if self.count == 2:
                (observation[1, 2:] if what == "observation" else reward[1:]).fill_(torch.nan)
            return observation, reward, *rest

    place = (
        r"\(nan\) at step 1 of the rollout in copy 1"
        if what == "reward"
        else r"\(nan at \[2\] of it\) at step 2"
    )
    with pytest.raises(ValueError, match=rf"Broken returned a NaN or infinite {what} {place}"):
        collect(Broken(SyncVectorEnv([Walk] * 2)))


def test_an_observation_outside_its_discrete_space_is_refused() -> None:
    class Outside(AsTensors):
        def step(self, actions: Any) -> Any:
            observation, *rest = super().step(actions)
            return observation + 9, *rest

    space = spaces.Discrete(5)
    env = Outside(SyncVectorEnv([partial(Walk, space)] * 2))
    policy = make_policy(space, FOUR, generator=generator())
    with pytest.raises(
        ValueError, match=r"observations of Broken must be in Discrete\(5\), got \(\d+, \d+\); fix"
    ):
        Collector(env, policy, generator(), seed=0, name="Broken").collect(3)  # type: ignore[arg-type]


def test_an_environment_is_told_what_it_lacks() -> None:
    env: Any = same_step()
    del env.single_action_space
    with pytest.raises(
        ValueError,
        match="a AsTensors with num_envs must have single_action_space, got None",
    ):
        make_vector_env(env, 2)
    env = same_step()
    env.metadata = {"render_modes": []}
    with pytest.raises(
        ValueError,
        match=r"env must reset its copies itself \(AsTensors\.metadata\['autoreset_mode'\]\), got None; use "
        r"AutoresetMode\.NEXT_STEP or SAME_STEP",
    ):
        train_ppo(env, progress=False)


def test_an_env_with_copies_of_its_own_need_not_be_a_vectorenv() -> None:
    """As Isaac Lab's are: a gymnasium.Env with num_envs."""

    class Several(AsTensors, gym.Env[Any, Any]):  # type: ignore[misc]
        pass

    env: Any = Several(SyncVectorEnv([Walk] * 3))
    assert make_vector_env(env, 1) == (env, False)
    result = train_ppo(env, PPOConfig(total_steps=50, rollout_steps=5, device="cpu"), progress=False)
    assert result.num_envs == 3
    assert result.environment == "Several"


def test_a_policy_for_numpy_alone_is_told_what_it_lacks() -> None:
    class Old(Policy):
        encoder = nn.Identity()  # type: ignore[assignment]

        def forward(self, observations: Tensor) -> Categorical:
            return Categorical.from_logits(torch.zeros(len(observations), 4))

        def to_env(self, actions: Tensor) -> Any:
            return actions.numpy()

    assert Collector(SyncVectorEnv([Walk] * 2), Old(), generator(), seed=0).collect(3).steps == 6
    with pytest.raises(NotImplementedError, match="Old must define to_space for environments of tensors"):
        Collector(same_step(), Old(), generator(), seed=0).collect(3)  # type: ignore[arg-type]
