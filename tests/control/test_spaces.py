"""Spaces that nobody here chose: every one is acted in, saved and resumed rightly, or refused by name."""

from __future__ import annotations

import copy
import dataclasses
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from control_runs import PPO, REINFORCE, TRPO, Guess, assert_same_run
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import Phase, event, example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor

from policyopt.control import (
    ObservationEncoder,
    Policy,
    TrainResult,
    evaluate,
    make_policy,
    train_ppo,
    train_reinforce,
    train_trpo,
)
from policyopt.distributions import Categorical

TINY: dict[str, Any] = {"num_envs": 2, "hidden": (4,), "total_steps": 24}
CONFIG = dataclasses.replace(
    PPO, rollout_steps=6, epochs_per_batch=1, checkpoint_every=1, anneal_learning_rate=False, **TINY
)


class AnySpaces(gym.Env[Any, Any]):
    """Observes samples; insists that each action is one of its space, in the space's own type."""

    def __init__(self, observations: gym.Space[Any], actions: gym.Space[Any]) -> None:
        self.observation_space, self.action_space = copy.deepcopy(observations), actions

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        if seed is not None:
            self.observation_space.seed(seed)
        self.count = 0
        return self.observation_space.sample(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(np.asarray(action)), (action, self.action_space)
        assert getattr(action, "dtype", None) == self.action_space.dtype, (action, self.action_space)
        self.count += 1
        reward = float(self.np_random.normal())
        return self.observation_space.sample(), reward, False, self.count == 4, {}


# --- Box and Discrete, drawn ---

SHAPES = [(), (1,), (3,), (2, 1, 2)]
OFFSETS = [0.0, -0.1, 0.1, 1.0, -700.0, 1e6, 1.7e9, -1.7e9, 1e15, -1e30, 1e300]
WIDTHS = [0.0, 1e-3, 0.1, 1.0, 2.0, 255.0, 1e6, 1e30]


@st.composite
def float_boxes(draw: st.DrawFn) -> spaces.Box:
    """Each dimension with bounds of its own: both, one or none, near 0 or far away."""
    dtype = draw(st.sampled_from([np.float16, np.float32, np.float64]))
    shape, largest = draw(st.sampled_from(SHAPES)), float(np.finfo(dtype).max)
    low, high = np.empty(shape, dtype), np.empty(shape, dtype)
    for where in np.ndindex(shape):
        offset = draw(st.sampled_from([x for x in OFFSETS if abs(x) < largest / 2]))
        width = draw(st.sampled_from([x for x in WIDTHS if x < largest / 2]))
        below, above = draw(st.booleans()), draw(st.booleans())
        low[where] = offset if below else -np.inf
        high[where] = max(low[where], dtype(offset + width)) if above else np.inf
    return spaces.Box(low, high, dtype=dtype)


@st.composite
def integer_boxes(draw: st.DrawFn) -> spaces.Box:
    dtype = draw(st.sampled_from(["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "bool"]))
    shape = draw(st.sampled_from(SHAPES))
    if dtype == "bool":
        return spaces.Box(0, 1, shape, np.bool_)
    limits = np.iinfo(dtype)
    low, high = sorted(draw(st.tuples(*[st.integers(int(limits.min), int(limits.max) - 1)] * 2)))
    return spaces.Box(low, high, shape, np.dtype(dtype).type)


@st.composite
def discretes(draw: st.DrawFn) -> spaces.Discrete[Any]:
    dtype = draw(st.sampled_from(["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"]))
    limits = np.iinfo(dtype)
    n = draw(st.integers(1, 9))
    start = draw(st.integers(max(limits.min, -(2**62)), min(limits.max, 2**62) - n))
    try:
        return spaces.Discrete(n, start=start, dtype=np.dtype(dtype))
    except TypeError:  # Gymnasium 1.1 has no other type than int64
        return spaces.Discrete(n, start=start)


@st.composite
def several_choices(draw: st.DrawFn) -> gym.Space[Any]:
    shape = draw(st.sampled_from([(1,), (3,), (2, 1, 2)]))
    if draw(st.booleans()):
        return spaces.MultiBinary(shape[0] if len(shape) == 1 and draw(st.booleans()) else shape)
    dtype = np.dtype(draw(st.sampled_from(["int8", "int16", "int32", "int64", "uint8", "uint16", "uint32"])))
    rng = np.random.default_rng(draw(st.integers(0, 1000)))
    start = rng.integers(max(np.iinfo(dtype).min, -(2**62)), np.iinfo(dtype).max - 9, shape, dtype)
    return spaces.MultiDiscrete(rng.integers(1, 9, shape, dtype), dtype=dtype.type, start=start)


OBSERVATIONS = st.one_of(float_boxes(), integer_boxes(), discretes())
ACTIONS = st.one_of(float_boxes(), discretes(), several_choices())


def assert_same_space(one: gym.Space[Any], other: gym.Space[Any]) -> None:
    assert type(one) is type(other)
    assert one.dtype == other.dtype
    assert one.shape == other.shape
    assert one == other
    names = {spaces.Box: ("low", "high"), spaces.MultiDiscrete: ("nvec", "start"), spaces.MultiBinary: ("n",)}
    for name in names.get(type(one), ("n", "start")):
        np.testing.assert_array_equal(getattr(one, name), getattr(other, name))


DRAWN = given(observations=OBSERVATIONS, actions=ACTIONS, normalize=st.booleans(), same_step=st.booleans())


@settings(max_examples=8, phases=[Phase.explicit, Phase.generate])
@DRAWN
@example(
    observations=spaces.Box(1.7e9, np.inf, (1,), np.float64),
    actions=spaces.Box(0.1, 0.3, (), np.float64),
    normalize=True,
    same_step=False,
)
@example(
    observations=spaces.Box(1.7e9, 1.7e9 + 1, (1,), np.float64),
    actions=spaces.Discrete(2),
    normalize=False,
    same_step=True,
)
@example(  # a dtype that safetensors before 0.6.1 does not write
    observations=spaces.Box(0, 70_000, (2,), np.uint32),
    actions=spaces.Discrete(2),
    normalize=False,
    same_step=False,
)
@example(
    observations=spaces.Discrete(3),
    actions=spaces.MultiDiscrete([[2, 3], [1, 4]], start=[[-1, 5], [0, 7]], dtype=np.int32),
    normalize=False,
    same_step=True,
)
@example(
    observations=spaces.Box(-1, 1, (2,)), actions=spaces.MultiBinary((2, 2)), normalize=True, same_step=False
)
@example(observations=spaces.Box(-1, 1, (2,)), actions=spaces.MultiBinary(3), normalize=True, same_step=False)
def test_any_box_or_discrete_is_acted_in_saved_loaded_and_resumed(**drawn: Any) -> None:
    check_spaces(**drawn)


@pytest.mark.sweep
@settings(max_examples=200, phases=[Phase.generate], derandomize=False, print_blob=True)
@DRAWN
def test_sweep_of_boxes_and_discretes(**drawn: Any) -> None:
    check_spaces(**drawn)


def check_spaces(
    observations: gym.Space[Any], actions: gym.Space[Any], normalize: bool, same_step: bool
) -> None:
    def env() -> SyncVectorEnv:
        mode = AutoresetMode.SAME_STEP if same_step else AutoresetMode.NEXT_STEP
        return SyncVectorEnv([lambda: AnySpaces(observations, actions)] * 2, autoreset_mode=mode)

    config = dataclasses.replace(CONFIG, normalize_observations=normalize)
    longer = dataclasses.replace(config, total_steps=48)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            result = train_ppo(env(), config, checkpoint_dir=folder / "a", progress=False)
        except ValueError as error:
            event("refused")
            if "NaN or infinite observation" in str(error):  # 1e300 is infinite in float32
                limits = np.abs([observations.low, observations.high])
                assert limits[np.isfinite(limits)].max() > 3e38
                return
            if normalize or "must differ by more than float32 resolves" not in str(error):
                raise
            assert np.dtype(observations.dtype).itemsize >= 4
            return
        assert all(torch.isfinite(p).all() for p in result.policy.parameters())
        loaded = TrainResult.load(result.save(folder / "b"))
        for ours, theirs in zip(result.spaces, loaded.spaces, strict=True):
            assert_same_space(ours, theirs)
        assert_same_run(result, loaded)
        samples = np.stack([observations.sample() for _ in range(3)])
        for policy in (result.policy, loaded.policy):
            one, several = policy.predict(samples[0]), policy.predict(samples)
            assert actions.contains(one)
            assert one.dtype == several.dtype == actions.dtype
        np.testing.assert_array_equal(result.policy.predict(samples), loaded.policy.predict(samples))
        resumed = train_ppo(env(), longer, checkpoint_dir=folder / "a", progress=False)
        assert_same_run(resumed, train_ppo(env(), longer, checkpoint_dir=folder / "c", progress=False))


# --- Several choices at once, and a policy of one's own for the spaces that the built-in ones refuse ---


@dataclass(frozen=True)
class Independent:
    """One categorical distribution for each of several choices, ``[..., K]``."""

    parts: list[Categorical]

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        return torch.stack([p.sample(generator) for p in self.parts], -1)

    def mode(self) -> Tensor:
        return torch.stack([p.mode() for p in self.parts], -1)

    def log_prob(self, actions: Tensor) -> Tensor:
        return torch.stack([p.log_prob(actions[..., i]) for i, p in enumerate(self.parts)]).sum(0)

    def entropy(self) -> Tensor:
        return torch.stack([p.entropy() for p in self.parts]).sum(0)

    def kl(self, other: Any) -> Tensor:
        return torch.stack([p.kl(q) for p, q in zip(self.parts, other.parts, strict=True)]).sum(0)

    def detach(self) -> Independent:
        return Independent([p.detach() for p in self.parts])


class Choices(Policy):
    """Chooses 2 and 3 ways; ``form`` turns the choices ``[N, 2]`` into actions of the space."""

    def __init__(self, form: Callable[[NDArray[Any]], Any], encoder: Any = None) -> None:
        super().__init__()
        self.form, self.encoder = form, encoder or ObservationEncoder(Hint.observation_space)
        self.net = torch.nn.Sequential(torch.nn.Linear(5, 32), torch.nn.Tanh(), torch.nn.Linear(32, 5))

    def forward(self, observations: Tensor) -> Independent:
        pair = self.net(self.encoder(observations)).split([2, 3], dim=-1)
        return Independent([Categorical.from_logits(x) for x in pair])  # type: ignore[arg-type]

    def to_env(self, actions: Tensor) -> Any:
        return self.form(actions.cpu().numpy())


class Hint(gym.Env[Any, Any]):
    """The observation says which of the 2 and of the 3 ways is right: a reward of 1 each, 10 steps."""

    observation_space = spaces.Box(0, 1, (5,), np.float32)

    def __init__(self, actions: gym.Space[Any], read: Callable[[Any], Any]) -> None:
        self.action_space, self.read = actions, read

    def _observe(self) -> Any:
        self.right = self.np_random.integers([2, 3])
        return np.concatenate([np.eye(n)[k] for n, k in zip((2, 3), self.right, strict=True)]).astype("f4")

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        assert self.action_space.contains(action), action
        reward = float(np.sum(np.array(self.read(action)) == self.right))
        self.count += 1
        return self._observe(), reward, False, self.count == 10, {}


def to_bits(choices: NDArray[Any]) -> NDArray[Any]:
    """The second choice as two bits."""
    return np.stack([choices[:, 0], choices[:, 1] // 2, choices[:, 1] % 2], -1).astype(np.int8)


STRANGE: dict[str, tuple[gym.Space[Any], Any, Any]] = {
    "MultiDiscrete": (spaces.MultiDiscrete([2, 3]), lambda c: c, lambda a: a),
    "MultiDiscrete from -1, int32": (
        spaces.MultiDiscrete([2, 3], start=[-1, 5], dtype=np.int32),
        lambda c: (c + np.array([-1, 5])).astype(np.int32),
        lambda a: a - [-1, 5],
    ),
    "MultiBinary": (spaces.MultiBinary(3), to_bits, lambda a: [a[0], 2 * a[1] + a[2]]),
    "Dict": (
        spaces.Dict({"x": spaces.Discrete(2), "y": spaces.MultiDiscrete([3])}),
        lambda c: {"x": c[:, 0], "y": c[:, 1:]},
        lambda a: [a["x"], a["y"][0]],
    ),
    "Tuple": (
        spaces.Tuple((spaces.Discrete(2), spaces.Box(0, 2, (1,), np.float32))),
        lambda c: (c[:, 0], c[:, 1:].astype(np.float32)),
        lambda a: [a[0], a[1][0]],
    ),
    "Box of integers": (spaces.Box(0, 2, (2,), np.int16), lambda c: c.astype(np.int16), lambda a: a),
}
LEARN: dict[str, Any] = {"total_steps": 5000, "num_envs": 8}
TRAINERS = [
    (train_ppo, dataclasses.replace(PPO, minibatch_size=128, epochs_per_batch=4, **LEARN)),
    (train_trpo, dataclasses.replace(TRPO, kl_limit=0.05, **LEARN)),
    (train_reinforce, dataclasses.replace(REINFORCE, baseline="mean", **LEARN)),
]


@pytest.mark.parametrize("name", STRANGE)
def test_a_policy_of_ones_own_acts_in_any_space(name: str, tmp_path: Path) -> None:
    actions, form, read = STRANGE[name]
    if not name.startswith("Multi"):
        with pytest.raises(ValueError, match=r"action space must be Discrete, MultiDiscrete, .*Box, got "):
            make_policy(Hint.observation_space, actions, generator=torch.Generator())
    # One trainer for each space, all three for the first.
    chosen = TRAINERS if name == "MultiDiscrete" else TRAINERS[:1]
    for train, config in chosen:
        result = train(lambda: Hint(actions, read), config, policy=Choices(form), progress=False)
        found = evaluate(result.policy, lambda: Hint(actions, read), episodes=5)
        assert found.mean > 15, (train, found.mean)  # of 20; chance is 8.3
        for deterministic in (True, False):
            seen = np.array([0, 1, 0, 0, 1], np.float32)
            action = result.policy.predict(seen, deterministic=deterministic)
            assert actions.contains(action), action
        with pytest.raises(ValueError, match=r"save its state_dict\(\) with safetensors"):
            result.save(tmp_path / "a")


@pytest.mark.parametrize("name", [name for name in STRANGE if name.startswith("Multi")])
def test_several_choices_are_learned(name: str, tmp_path: Path) -> None:
    actions, _, read = STRANGE[name]
    # All three trainers for the first space.
    for train, config in TRAINERS if name == "MultiDiscrete" else TRAINERS[:1]:
        result = train(lambda: Hint(actions, read), config, progress=False)
        loaded = TrainResult.load(result.save(tmp_path / train.__name__))
        for policy in (result.policy, loaded.policy):
            found = evaluate(policy, lambda: Hint(actions, read), episodes=5)
            assert found.mean > 15, (
                train,
                found.mean,
            )  # of 20; chance is 8.3, the best fixed action the same


@pytest.mark.parametrize(
    "observations", [spaces.MultiDiscrete([2, 3], dtype=np.int32), spaces.MultiBinary([2, 2])], ids=str
)
def test_an_encoder_of_ones_own_reads_other_arrays(observations: gym.Space[Any]) -> None:
    class Encoder(torch.nn.Module):
        shape, features = observations.shape, 5

        def forward(self, x: Tensor) -> Tensor:
            return torch.nn.functional.pad(x.flatten(-len(self.shape)).float(), (0, 5 - np.prod(self.shape)))

        def update(self, x: Tensor) -> None:
            assert tuple(x.shape[1:]) == observations.shape

    with pytest.raises(ValueError, match=r"observation space must be Discrete or Box, got Multi.*Flatten"):
        make_policy(observations, spaces.Discrete(2), generator=torch.Generator())
    actions = spaces.MultiDiscrete([2, 3])
    policy = Choices(lambda c: c, Encoder())
    result = train_ppo(lambda: AnySpaces(observations, actions), CONFIG, policy=policy, progress=False)
    assert actions.contains(result.policy.predict(observations.sample()))


@pytest.mark.parametrize(
    "observations",
    [
        spaces.Dict({"x": spaces.Discrete(2)}),
        spaces.Tuple((spaces.Discrete(2), spaces.Box(0, 1))),
        spaces.Text(4),
        spaces.Sequence(spaces.Discrete(2)),
    ],
    ids=lambda space: type(space).__name__,
)
def test_observations_that_are_no_arrays_are_refused(observations: gym.Space[Any]) -> None:
    def env() -> AnySpaces:
        return AnySpaces(observations, spaces.MultiDiscrete([2, 3]))

    with pytest.raises(ValueError, match=r"observation space must be Discrete or Box.*FlattenObservation"):
        train_ppo(env, CONFIG, progress=False)
    with pytest.raises(
        ValueError, match=r"observations of env must be arrays of numbers, got .*; flatten them"
    ):
        train_ppo(env, CONFIG, policy=Choices(lambda c: c), progress=False)


def test_filtering_before_flattening_leaves_out_what_cannot_be_flattened() -> None:
    """The advice of the error, followed in an environment like MiniGrid's."""

    class Mission(gym.Space[str]):
        def sample(self, mask: Any = None, probability: Any = None) -> str:
            return "go"

    observations = spaces.Dict({"image": spaces.Box(0, 255, (2, 2), np.uint8), "mission": Mission()})

    def env() -> gym.Env[Any, Any]:
        filtered = gym.wrappers.FilterObservation(AnySpaces(observations, spaces.Discrete(2)), ["image"])
        return gym.wrappers.FlattenObservation(filtered)

    assert train_ppo(env, CONFIG, progress=False).steps >= CONFIG.total_steps


# --- Bounds ---


@given(space=float_boxes(), seed=st.integers(0, 100))
def test_actions_are_in_bounds_however_far_the_mean_has_moved(space: spaces.Box, seed: int) -> None:
    policy = make_policy(spaces.Box(-1, 1, (2,)), space, generator=torch.Generator())
    size = int(np.prod(space.shape))
    raw = 10 ** torch.linspace(-3, 30, 40)[:, None] * torch.randn(
        40, size, generator=torch.Generator().manual_seed(seed)
    )
    with np.errstate(over="ignore"):
        actions = policy.to_env(torch.cat([raw, torch.zeros(1, size)]))
    assert actions.dtype == space.dtype
    assert np.isfinite(actions).all()
    for action in actions:
        assert space.contains(np.asarray(action))


def test_the_middle_the_bounds_and_the_nearest_to_0() -> None:
    infinity = np.inf
    low = np.array([1.7e9, 0.1, 1e6, -infinity, -3, -infinity])
    high = np.array([1.7e9 + 1, 0.1, infinity, -5, infinity, infinity])
    policy = make_policy(
        spaces.Box(-1, 1), spaces.Box(low, high, dtype=np.float64), generator=torch.Generator()
    )
    rows = torch.tensor([[0.0] * 6, [1.0] * 6, [-1.0] * 6])
    expected = [
        [1.7e9 + 0.5, 0.1, 1e6, -5, 0, 0],
        [1.7e9 + 1, 0.1, 1e6 + 1, -5, 1, 1],
        [1.7e9, 0.1, 1e6, -6, -1, -1],
    ]
    np.testing.assert_array_equal(policy.to_env(rows), expected)


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        (spaces.Discrete(3), spaces.Discrete(3, start=1)),
        (spaces.Discrete(3), spaces.Discrete(4)),
        (spaces.Box(-1, 1, (2,)), spaces.Box(-2, 2, (2,))),
        (spaces.MultiDiscrete([2, 3]), spaces.MultiDiscrete([2, 3], start=[0, 1])),
        (spaces.MultiDiscrete([2, 2]), spaces.MultiBinary(2)),
    ],
)
def test_a_policy_for_other_actions_is_refused(ours: gym.Space[Any], theirs: gym.Space[Any]) -> None:
    """It would act in its own units, beyond the bounds or in half of them."""
    observations = spaces.Box(-1, 1, (2,))
    policy = make_policy(observations, ours, generator=torch.Generator())
    evaluate(policy, lambda: AnySpaces(observations, ours), episodes=1)
    with pytest.raises(ValueError, match=r"policy was made for other observations or actions than those of"):
        evaluate(policy, lambda: AnySpaces(observations, theirs), episodes=1)


# --- Observations far from 0 ---


class Stamped(Guess):
    """A time stamp that is even or odd says which action is right."""

    def __init__(self, offset: float, dtype: Any) -> None:
        bound = np.inf if np.dtype(dtype).kind == "f" else np.iinfo(dtype).max - 1
        self.offset, self.observation_space = offset, spaces.Box(0, bound, (1,), dtype)

    def _observe(self) -> Any:
        self.right = int(self.np_random.integers(2))
        return np.array([self.offset], self.observation_space.dtype) + self.observation_space.dtype.type(
            self.right
        )


STAMPS = dataclasses.replace(
    PPO, total_steps=6000, num_envs=8, minibatch_size=128, epochs_per_batch=4, normalize_observations=True
)


@pytest.mark.parametrize(("offset", "dtype"), [(1.7e9, np.float64), (2**52, np.int64)])
def test_time_stamps_keep_their_differences(offset: float, dtype: Any, tmp_path: Path) -> None:
    def env() -> Stamped:
        return Stamped(offset, dtype)

    result = train_ppo(env, STAMPS, progress=False)
    assert evaluate(result.policy, env, episodes=10).mean == 10  # chance is 5
    assert evaluate(TrainResult.load(result.save(tmp_path)).policy, env, episodes=10).mean == 10
    with pytest.raises(
        ValueError, match=r"observations of env must differ by more than float32 resolves, got "
    ):
        train_ppo(env, dataclasses.replace(STAMPS, normalize_observations=False), progress=False)


@given(
    seed=st.integers(0, 1000),
    offset=st.floats(-1e12, 1e12),
    drift=st.floats(-1e3, 1e3),
    sizes=st.lists(st.integers(1, 20), min_size=1, max_size=5),
)
def test_statistics_far_from_0_equal_numpys(seed: int, offset: float, drift: float, sizes: list[int]) -> None:
    rng = np.random.default_rng(seed)
    batches = [offset + i * drift + rng.normal(size=(n, 2)) for i, n in enumerate(sizes)]
    encoder = ObservationEncoder(spaces.Box(-np.inf, np.inf, (2,), np.float64), normalize=True)
    for batch in batches:
        encoder.update(torch.from_numpy(batch))
    seen = np.concatenate(batches)
    centred = seen - offset
    mean = encoder.mean.double().numpy() - offset + encoder.mean_rest.numpy()
    # 48 bits for the mean, 24 for the variance.
    np.testing.assert_allclose(mean, centred.mean(0), rtol=1e-5, atol=1e-5 + abs(offset) * 2.0**-46)
    np.testing.assert_allclose(encoder.variance, centred.var(0), rtol=1e-3, atol=1e-3)
    expected = (centred - centred.mean(0)) / np.sqrt(centred.var(0) + 1e-8)
    got = encoder(torch.from_numpy(seen))
    assert got.dtype == torch.float32
    large = centred.var(0) > 1e-2
    np.testing.assert_allclose(got[:, large], expected.clip(-10, 10)[:, large], rtol=1e-2, atol=1e-2)


def test_what_is_constant_or_differs_by_nothing_is_not_refused() -> None:
    """A balance of 1e9 + 0.3 that does not move, noise of 1e-12 around 0.1, and integers that float32 holds."""

    class Still(AnySpaces):
        def reset(self, **arguments: Any) -> Any:
            super().reset(**arguments)
            return self._observe(), {}

        def _observe(self) -> Any:
            return np.array(
                [1e9 + 0.3, 0.1 + 1e-12 * self.np_random.normal(), 1e6 + self.np_random.integers(2)]
            )

        def step(self, action: Any) -> Any:
            return self._observe(), *super().step(action)[1:]

    space = spaces.Box(-np.inf, np.inf, (3,), np.float64)
    config = dataclasses.replace(CONFIG, normalize_observations=False)
    assert train_ppo(lambda: Still(space, spaces.Discrete(2)), config, progress=False).steps >= 24
