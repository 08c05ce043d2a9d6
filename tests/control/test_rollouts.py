"""Rollouts against a slow loop over an environment whose every transition is known beforehand."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.envs.classic_control.cartpole import CartPoleEnv
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray
from torch import Tensor

from policyopt.control import (
    Collector,
    Episodes,
    Policy,
    PPOConfig,
    Rollout,
    evaluate,
    make_policy,
    make_vector_env,
    sample_episodes,
)
from policyopt.control.steps import estimate_advantages
from policyopt.distributions import Categorical
from policyopt.estimators import gae

MODES = [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP]
CODE = np.array([1e4, 1e2, 1.0])  # (copy, episode, step) as one number


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Counting(gym.Env[NDArray[np.float32], int]):
    """Observes (copy, episode, step). Episode e of copy c lasts c + 1 + (e mod 2) steps; odd copies are truncated."""

    observation_space = spaces.Box(0, 1e4, (3,), np.float32)
    action_space = spaces.Discrete(5)

    def __init__(self, index: int, scale: int = 1) -> None:
        self.index, self.scale, self.episode = index, scale, -1

    def reset(
        self, *, seed: int | None = None, options: Any = None
    ) -> tuple[NDArray[np.float32], dict[str, Any]]:
        super().reset(seed=seed)
        self.episode, self.step_count = self.episode + 1, 0
        return self._observe(), {}

    def _observe(self) -> NDArray[np.float32]:
        return np.array([self.index, self.episode, self.step_count], np.float32)

    def length(self, episode: int) -> int:
        return (self.index + 1 + episode % 2) * self.scale

    def step(self, action: int) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        reward = float(self._observe() @ CODE) + 0.1 * action
        self.step_count += 1
        over, cut = self.step_count >= self.length(self.episode), self.index % 2 == 1
        return self._observe(), reward, over and not cut, over and cut, {}


class Rule(Policy):
    """A deterministic rule in place of a network: a = (2 · step + episode) mod 5."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Identity()  # type: ignore[assignment]

    def act(self, observations: Tensor, generator: Any = None, *, deterministic: bool = False) -> Tensor:
        return (2 * observations[..., 2] + observations[..., 1]).long() % 5

    def forward(self, observations: Tensor) -> Categorical:
        return Categorical.from_logits(torch.zeros(*observations.shape[:-1], 5))

    def to_env(self, actions: Tensor) -> NDArray[Any]:
        return actions.numpy()


def counting(copies: int, mode: AutoresetMode, scale: int = 1) -> SyncVectorEnv:
    return SyncVectorEnv([partial(Counting, i, scale) for i in range(copies)], autoreset_mode=mode)


Transition = tuple[float, int, float, float, bool, bool]


def expected_transitions(index: int, first_episode: int, n: int) -> list[Transition]:
    """The first ``n`` transitions (s, a, r, s', terminated, truncated) of a copy, by a plain loop."""
    env, found = Counting(index), []
    env.episode = first_episode - 1
    while len(found) < n:
        s, _ = env.reset()
        over = False
        while not over and len(found) < n:
            action = int(2 * s[2] + s[1]) % 5
            s_next, reward, terminated, truncated, _ = env.step(action)
            found.append((float(s @ CODE), action, reward, float(s_next @ CODE), terminated, truncated))
            s, over = s_next, terminated or truncated
    return found


def code(observations: Tensor) -> Tensor:
    """A critic that names the state, so that ``next_values`` says which successor was used."""
    return observations @ torch.tensor(CODE, dtype=torch.float32)


def column(rollout: Rollout, i: int) -> list[Transition]:
    values, next_values = rollout.evaluate(code)
    return [
        (
            values[t, i].item(),
            int(rollout.actions[t, i]),
            rollout.rewards[t, i].item(),
            next_values[t, i].item(),
            bool(rollout.terminated[t, i]),
            bool(rollout.truncated[t, i]),
        )
        for t in range(len(values))
        if rollout.valid[t, i]
    ]


def assert_transitions(ours: list[Transition], expected: list[Transition]) -> None:
    assert len(ours) == len(expected)
    np.testing.assert_allclose(ours, expected, rtol=1e-6)


# --- Fixed-length rollouts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pieces", [(40,), (1, 2, 3, 4, 30), (1,) * 12])
def test_valid_rows_are_the_transitions_of_the_environment(
    mode: AutoresetMode, pieces: tuple[int, ...]
) -> None:
    """Whatever the mode of reset, and wherever the rollout is cut: same transitions, in order, nothing else."""
    collector = Collector(counting(4, mode), Rule(), generator(), seed=0)
    rollouts = [collector.collect(steps) for steps in pieces]
    for i in range(4):
        ours = [row for rollout in rollouts for row in column(rollout, i)]
        assert_transitions(ours, expected_transitions(i, 0, len(ours)))
        lost = sum(pieces) - len(ours)
        if mode == AutoresetMode.SAME_STEP:
            assert lost == 0
        else:  # one row per reset
            ends = sum(row[4] or row[5] for row in ours)
            assert lost in (ends, ends - 1)
    assert collector.steps == sum(rollout.steps for rollout in rollouts)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("pieces", [(40,), (7, 1, 2, 30)])
def test_episodes_are_recorded_across_the_borders_of_rollouts(
    mode: AutoresetMode, pieces: tuple[int, ...]
) -> None:
    collector = Collector(counting(4, mode), Rule(), generator(), seed=0)
    rollouts = [collector.collect(steps) for steps in pieces]
    episodes = Episodes.concatenate([rollout.episodes for rollout in rollouts])
    # A slow pass over the valid rows, in time order.
    steps, running, expected = 0, [[0.0, 0] for _ in range(4)], []
    for rollout in rollouts:
        for t in range(len(rollout.rewards)):
            steps += int(rollout.valid[t].sum())
            for i in range(4):
                if not rollout.valid[t, i]:
                    continue
                running[i] = [running[i][0] + rollout.rewards[t, i].item(), running[i][1] + 1]
                if rollout.terminated[t, i] or rollout.truncated[t, i]:
                    expected.append((steps, *running[i]))
                    running[i] = [0.0, 0]
    assert len(expected) > 10
    ours = zip(episodes.steps, episodes.returns, episodes.lengths, strict=True)
    np.testing.assert_allclose(list(ours), expected, rtol=1e-6)
    assert set(episodes.table()) == {"steps", "return", "length"}


@pytest.mark.parametrize("mode", MODES)
def test_advantages_do_not_see_beyond_the_end_of_an_episode(mode: AutoresetMode) -> None:
    """GAE of a rollout equals GAE of each episode taken alone, with the final observation's value at a cut."""
    collector = Collector(counting(3, mode), Rule(), generator(), seed=0)
    rollout = collector.collect(30)
    config = PPOConfig(gamma=0.9, gae_lambda=0.8, normalize_advantages=False)
    ours = estimate_advantages(rollout, Rule(), code, config)
    where = rollout.valid.nonzero().tolist()
    by_column: dict[int, list[float]] = {}
    for (_, i), advantage in zip(where, ours.advantages.tolist(), strict=True):
        by_column.setdefault(i, []).append(advantage)
    for i in range(3):
        rows = column(rollout, i)
        expected: list[float] = []
        start = 0
        for end in range(len(rows)):
            if rows[end][4] or rows[end][5] or end == len(rows) - 1:
                s, _, r, s_next, term, trunc = (
                    torch.tensor(c) for c in zip(*rows[start : end + 1], strict=True)
                )
                expected += gae(r, s, s_next, term, trunc, gamma=0.9, gae_lambda=0.8).tolist()
                start = end + 1
        np.testing.assert_allclose(by_column[i], expected, rtol=1e-4)
    torch.testing.assert_close(
        ours.targets, ours.advantages + code(rollout.flat(rollout.observations)), rtol=1e-5, atol=0.1
    )


def test_treating_a_limit_as_an_end_changes_only_cut_rows() -> None:
    rollout = Collector(counting(2, MODES[1]), Rule(), generator(), seed=0).collect(12)
    config = {"gamma": 0.9, "gae_lambda": 0.0, "normalize_advantages": False}
    right = estimate_advantages(rollout, Rule(), code, PPOConfig(**config)).advantages
    wrong = estimate_advantages(
        rollout, Rule(), code, PPOConfig(**config, bootstrap_truncated=False)
    ).advantages
    cut = rollout.flat(rollout.truncated)
    assert cut.any()
    assert torch.equal(right[~cut], wrong[~cut])
    _, next_values = rollout.evaluate(code)
    torch.testing.assert_close(right[cut] - wrong[cut], 0.9 * rollout.flat(next_values)[cut])


def test_cartpoles_own_vector_environment_obeys_cartpoles_physics() -> None:
    """Every valid row of the vectorised CartPole, replayed one by one in the single one."""
    spec = copy.deepcopy(gym.spec("CartPole-v1"))
    spec.max_episode_steps = 12  # so that both ways to end are seen
    env, _ = make_vector_env(spec, 16)
    policy = make_policy(env.single_observation_space, env.single_action_space, generator=generator())
    rollout = Collector(env, policy, generator(), seed=3).collect(60)
    successors = torch.stack(
        [rollout.evaluate(lambda x, k=k: x[..., k])[1] for k in range(4)],  # type: ignore[misc]
        dim=-1,
    )
    single = CartPoleEnv()
    single.reset(seed=0)
    length = np.zeros(16, int)
    for t, i in rollout.valid.nonzero().tolist():
        single.state = rollout.observations[t, i].double().numpy()
        single.steps_beyond_terminated = None
        following, reward, terminated, _, _ = single.step(int(rollout.actions[t, i]))
        np.testing.assert_allclose(successors[t, i], following, rtol=1e-4, atol=1e-5)
        assert rollout.rewards[t, i] == reward
        assert bool(rollout.terminated[t, i]) == terminated
        length[i] += 1
        assert bool(rollout.truncated[t, i]) == (length[i] == 12)
        if rollout.terminated[t, i] or rollout.truncated[t, i]:
            length[i] = 0
    assert rollout.terminated.any()
    assert rollout.truncated.any()
    assert (~rollout.valid).any()
    env.close()


# --- Whole episodes ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_one_whole_episode_per_copy(mode: AutoresetMode) -> None:
    collector = Collector(counting(5, mode), Rule(), generator(), seed=0)
    collector.collect(3)  # leave the copies in the middle of something
    for _ in range(2):
        rollout = collector.collect_episodes()
        for i in range(5):
            episode = int(rollout.observations[0, i, 1])
            length = Counting(i).length(episode)
            assert_transitions(column(rollout, i), expected_transitions(i, episode, length))
            assert rollout.valid[:length, i].all()
            assert not rollout.valid[length:, i].any()
        assert sorted(rollout.episodes.lengths) == sorted(rollout.valid.sum(0).tolist())
        assert rollout.steps == rollout.episodes.lengths.sum()
        assert len(rollout.rewards) == rollout.episodes.lengths.max()


def test_the_buffer_of_whole_episodes_grows() -> None:
    rollout = Collector(counting(2, MODES[0], scale=700), Rule(), generator(), seed=0).collect_episodes()
    lengths = [1400, 2100]  # the second episode of each
    assert rollout.valid.sum(0).tolist() == lengths
    for i in range(2):
        counter = rollout.observations[: lengths[i], i, 2]
        assert torch.equal(counter, torch.arange(lengths[i], dtype=torch.float32))
        expected = (2 * torch.arange(lengths[i]) + rollout.observations[0, i, 1]).long() % 5
        assert torch.equal(rollout.actions[: lengths[i], i], expected)


def test_endless_episodes_are_refused() -> None:
    collector = Collector(counting(2, MODES[0], scale=50), Rule(), generator(), seed=0)
    with pytest.raises(
        ValueError, match=r"an episode of environment is not over after 60 steps; raise max_steps"
    ):
        collector.collect_episodes(max_steps=60)
    assert collector.collect_episodes(max_steps=100).steps >= 100  # exactly as long as allowed


@pytest.mark.parametrize("steps", [0, -3])
def test_empty_rollouts_are_refused(steps: int) -> None:
    collector = Collector(counting(1, MODES[0]), Rule(), generator(), seed=0)
    with pytest.raises(ValueError, match=rf"steps must be >= 1, got {steps}"):
        collector.collect(steps)


def test_sample_episodes_and_evaluate() -> None:
    one = gym.make("CartPole-v1")
    policy = make_policy(
        one.observation_space, one.action_space, normalize_observations=True, generator=generator()
    )
    policy.encoder.update(torch.randn(10, 4, generator=generator()))
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    rollout = sample_episodes(policy, "CartPole-v1", episodes=6, seed=1)
    assert len(rollout.episodes) == 6
    same, other = (evaluate(policy, "CartPole-v1", episodes=6, seed=s, deterministic=False) for s in (1, 2))
    assert np.array_equal(np.sort(same.returns), np.sort(rollout.episodes.returns))
    assert not np.array_equal(np.sort(same.returns), np.sort(other.returns))
    assert same.mean == pytest.approx(same.returns.sum() / 6)
    assert same.std == pytest.approx(np.sqrt(np.mean((same.returns - same.mean) ** 2)))
    assert all(torch.equal(before[name], tensor) for name, tensor in policy.state_dict().items())
    # The most probable action, taken by hand in a single environment.
    env, _ = make_vector_env("CartPole-v1", 3)
    best = evaluate(policy, env, seed=5)
    assert len(best.returns) == 3  # a vector environment decides the number itself
    rollout = sample_episodes(policy, env, seed=5, deterministic=True)
    with torch.no_grad():
        assert torch.equal(rollout.actions, policy.network(policy.encoder(rollout.observations)).argmax(-1))
    assert np.array_equal(np.sort(best.returns), np.sort(rollout.episodes.returns))
    env.close()
    with pytest.raises(ValueError, match="episodes must be >= 1, got 0"):
        sample_episodes(policy, "CartPole-v1", episodes=0)
    with pytest.raises(ValueError, match=r"not over after 3 steps"):
        evaluate(policy, "CartPole-v1", max_steps=3)
    with pytest.raises(
        ValueError, match=r"policy was made for other observations .*than those of Pendulum-v1"
    ):
        evaluate(policy, "Pendulum-v1")


# --- The final observation, given in the same step ---


class Reusing(gym.vector.VectorEnv[Any, Any, Any]):
    """Two copies, observing (episode, step); every episode is cut after 3 steps. One array for all final ones."""

    metadata: dict[str, Any] = {"autoreset_mode": AutoresetMode.SAME_STEP}  # noqa: RUF012
    single_observation_space = spaces.Box(0, 1e6, (2,), np.float32)
    single_action_space = spaces.Discrete(5)
    num_envs = 2

    def __init__(self, final: str = "one array") -> None:
        self.final, self.array = final, np.zeros((2, 2), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        self.state = np.array([[1, 0], [1, 0]], np.float32)
        return self.state, {}

    def step(self, actions: Any) -> Any:
        self.state[:, 1] += 1
        self.array[:] = self.state  # also in steps in which no episode ends
        done = self.state[:, 1] >= 3
        self.state[done] = self.state[done] * [1, 0] + [1, 0]
        info = {
            "one array": {"final_obs": self.array},
            "none": {"episode": {}},
            "None": {"final_obs": [None] * 2},
        }
        return self.state, np.ones(2), np.zeros(2, bool), done, info[self.final]


def rule() -> Rule:
    policy = Rule()
    policy.act = lambda x, *_, **__: torch.zeros(len(x), dtype=torch.long)  # type: ignore[method-assign]
    return policy


def test_final_observations_survive_an_environment_that_reuses_its_arrays() -> None:
    rollout = Collector(Reusing(), rule(), generator(), seed=0).collect(8)
    assert rollout.final_index[0].tolist() == [2, 2, 5, 5]
    assert rollout.final_index[1].tolist() == [0, 1, 0, 1]
    assert rollout.final_observations.tolist() == [[1, 3], [1, 3], [2, 3], [2, 3]]
    assert rollout.observations[:, 0].tolist() == [[e, t] for e in (1, 2, 3) for t in range(3)][:8]


@pytest.mark.parametrize("final", ["none", "None"])
def test_an_environment_without_final_observations_is_told_what_is_missing(final: str) -> None:
    collector = Collector(Reusing(final), rule(), generator(), seed=0, name="Reusing")
    with pytest.raises(
        ValueError,
        match=r'info of Reusing, which resets in the same step, must hold "final_obs", got .*; put the '
        "observations before the reset there, or use AutoresetMode.NEXT_STEP",
    ):
        collector.collect(8)


def test_observations_that_become_fractions_are_not_cut() -> None:
    """Reset returned integers; later observations of another kind used to lose what follows the point."""

    class Careless(Reusing):
        def reset(self, **arguments: Any) -> Any:
            return super().reset(**arguments)[0].astype(np.int64), {}

        def step(self, actions: Any) -> Any:
            observation, *rest = super().step(actions)
            return observation + np.float32(0.5), *rest

    rollout = Collector(Careless(), rule(), generator(), seed=0).collect(4)
    assert rollout.observations[:, 0].tolist() == [[1, 0], [1.5, 1.5], [1.5, 2.5], [2.5, 0.5]]


# --- Spaces --------------------------------------------------------------------------------------------------


class Recording(gym.Env[Any, Any]):
    """Any spaces; checks every action against its space and remembers it. Episodes of 4 steps."""

    def __init__(
        self, observation_space: gym.Space[Any], action_space: gym.Space[Any], log: list[Any]
    ) -> None:
        self.observation_space, self.action_space, self.log = observation_space, action_space, log

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.count = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(np.asarray(action)), (action, self.action_space)
        self.log.append(np.array(action))
        self.count += 1
        return self.observation_space.sample(), 1.0, self.count == 4, False, {}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "observation_space",
    [
        spaces.Discrete(5),
        spaces.Discrete(3, start=-1),
        spaces.Box(-1, 1, (2, 3, 1), np.float32),
        spaces.Box(-1, 1, (), np.float32),
        spaces.Box(-1, 1, (3,), np.float64),
        spaces.Box(0, 255, (4,), np.uint8),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    "action_space",
    [
        spaces.Discrete(4),
        spaces.Discrete(3, start=7),
        spaces.Box(-1, 1, (2, 1, 2), np.float32),
        spaces.Box(0, 5, (), np.float32),
        spaces.Box(np.array([-1, 0], np.float64), np.array([1, np.inf]), dtype=np.float64),
    ],
    ids=str,
)
def test_spaces(mode: AutoresetMode, observation_space: gym.Space[Any], action_space: gym.Space[Any]) -> None:
    log: list[Any] = []
    env = SyncVectorEnv(
        [lambda: Recording(copy.deepcopy(observation_space), action_space, log)] * 2, autoreset_mode=mode
    )
    policy = make_policy(observation_space, action_space, hidden=(8,), generator=generator())
    rollout = Collector(env, policy, generator(), seed=0).collect(10)
    observation_shape = observation_space.shape or ()
    assert rollout.observations.shape == (10, 2, *observation_shape)
    assert rollout.last_observations.shape == (2, *observation_shape)
    assert rollout.final_observations.shape[1:] == observation_shape
    flat = rollout.flat(rollout.observations)
    log_prob = policy(flat).log_prob(rollout.flat(rollout.actions))
    assert log_prob.shape == (rollout.steps,)
    assert torch.isfinite(log_prob).all()
    assert log  # and every action was in its space


# --- Broken environments -------------------------------------------------------------------------------------


class Broken(Counting):
    """Returns NaN or infinity at a chosen step of its only, endless episode (or at its end)."""

    def __init__(self, index: int, what: str, at: int, value: float, length: int = 10_000) -> None:
        super().__init__(index)
        self.what, self.at, self.value, self._length = what, at, value, length

    def length(self, episode: int) -> int:
        return self._length

    def step(self, action: int) -> tuple[NDArray[np.float32], float, bool, bool, dict[str, Any]]:
        observation, reward, *rest = super().step(action)
        if self.step_count == self.at and self.index == 1:
            if self.what == "reward":
                reward = self.value
            else:
                observation[2] = self.value
        return observation, reward, *rest  # type: ignore[return-value]


def broken(mode: AutoresetMode = MODES[0], **arguments: Any) -> Callable[[], Rollout]:
    env = SyncVectorEnv([partial(Broken, i, **arguments) for i in range(3)], autoreset_mode=mode)
    collector = Collector(env, Rule(), generator(), seed=0, name="Broken")
    return lambda: collector.collect(8)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nan_or_infinity_names_the_culprit(value: float) -> None:
    with pytest.raises(
        ValueError, match=r"Broken returned a NaN or infinite reward.*at step 3 of the rollout in copy 1"
    ):
        broken(what="reward", at=4, value=value)()
    with pytest.raises(
        ValueError, match=r"Broken returned a NaN or infinite observation.*at step 4 of the rollout in copy 1"
    ):
        broken(what="observation", at=4, value=value)()


@pytest.mark.parametrize("mode", MODES)
def test_nan_after_the_last_row_is_found_too(mode: AutoresetMode) -> None:
    """It would be bootstrapped from, and the NaN that comes of it blamed on the learner."""
    with pytest.raises(ValueError, match=r"Broken returned a NaN or infinite.*observation"):
        broken(mode, what="observation", at=8, value=np.nan)()
    with pytest.raises(ValueError, match=r"Broken returned a NaN or infinite.*observation"):
        broken(mode, what="observation", at=5, value=np.nan, length=5)()


def test_what_float32_cannot_hold_is_infinite_to_a_network() -> None:
    class Huge(Counting):
        observation_space = spaces.Box(0, np.inf, (3,), np.float64)  # type: ignore[assignment]

        def _observe(self) -> Any:
            return np.array([1e300, 0, 0])

        def step(self, action: int) -> Any:
            return self._observe(), 1.0, False, False, {}

    env = SyncVectorEnv([partial(Huge, 0)])
    with pytest.raises(
        ValueError, match=r"Huge returned a NaN or infinite observation \(1e\+300 at \[0\] of it"
    ):
        Collector(env, rule(), generator(), seed=0, name="Huge").collect(3)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("at", [2, 6])
def test_a_discrete_observation_outside_its_space_names_the_environment(mode: AutoresetMode, at: int) -> None:
    class Outside(Counting):
        observation_space = spaces.Discrete(5, start=-2)  # type: ignore[assignment]

        def _observe(self) -> Any:
            return np.int64(3 if self.step_count == at else -2)

        def step(self, action: int) -> Any:
            self.step_count += 1
            return self._observe(), 1.0, False, self.step_count == 6, {}

    env = SyncVectorEnv([partial(Outside, 0)], autoreset_mode=mode)
    policy = make_policy(env.single_observation_space, env.single_action_space, generator=generator())
    with pytest.raises(ValueError, match=r"Outside must be in Discrete\(5, start=-2\), got \(.*3\); fix"):
        Collector(env, policy, generator(), seed=0, name="Outside").collect(6)


def test_large_but_finite_rewards_pass() -> None:
    assert broken(what="reward", at=4, value=1e30)().steps == 24


@pytest.mark.parametrize("place", [1, 2, 3])
def test_results_of_another_shape_are_refused(place: int) -> None:
    class Wide(gym.vector.VectorWrapper):
        def step(self, actions: Any) -> Any:
            results = [*self.env.step(actions)]
            results[place] = results[place][:, None]
            return tuple(results)

    env = Wide(gym.make_vec("CartPole-v1", num_envs=3))
    policy = make_policy(env.single_observation_space, env.single_action_space, generator=torch.Generator())
    with pytest.raises(ValueError, match=r"rewards and ends of environment must have the shape \[3\]"):
        Collector(env, policy, torch.Generator(), seed=0).collect(2)
