"""Policies, encoders and critics over Gymnasium spaces."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from hypothesis import given
from hypothesis import strategies as st

from policyopt.control import (
    CategoricalPolicy,
    Critic,
    GaussianPolicy,
    MultiCategoricalPolicy,
    ObservationEncoder,
    make_policy,
)

BOX = spaces.Box(-1, 1, (3,), np.float32)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- Observations --------------------------------------------------------------------------------------------


@given(
    seed=st.integers(0, 10_000),
    sizes=st.lists(st.integers(1, 9), min_size=1, max_size=5),
    shape=st.sampled_from([(3,), (2, 2), ()]),
)
def test_running_statistics_equal_numpys(seed: int, sizes: list[int], shape: tuple[int, ...]) -> None:
    rng = np.random.default_rng(seed)
    batches = [rng.normal(5.0, 3.0, (size, *shape)).astype(np.float32) for size in sizes]
    encoder = ObservationEncoder(spaces.Box(-np.inf, np.inf, shape, np.float32), normalize=True)
    for batch in batches:
        encoder.update(torch.from_numpy(batch))
    seen = np.concatenate(batches).astype(np.float64).reshape(sum(sizes), -1)
    np.testing.assert_allclose(encoder.mean.numpy(), seen.mean(0), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(encoder.variance.numpy(), seen.var(0), rtol=1e-4, atol=1e-5)
    assert encoder.count.item() == sum(sizes)
    x = torch.from_numpy(batches[0])
    expected = (batches[0].reshape(sizes[0], -1) - seen.mean(0)) / np.sqrt(seen.var(0) + 1e-8)
    np.testing.assert_allclose(encoder(x).numpy(), np.clip(expected, -10, 10), rtol=1e-2, atol=1e-2)


def test_statistics_survive_large_offsets() -> None:
    """A mean of 1e4 and a deviation of 1: the sum of squares minus the square of the sum would lose it all."""
    x = 1e4 + torch.randn(1000, 3, generator=generator())
    encoder = ObservationEncoder(BOX, normalize=True)
    for batch in x.split(10):
        encoder.update(batch)
    torch.testing.assert_close(encoder.variance, x.double().var(0, correction=0).float(), rtol=2e-2, atol=0)


def test_normalised_observations_are_clipped_and_only_on_request() -> None:
    encoder = ObservationEncoder(BOX, normalize=True)
    before = encoder(torch.full((1, 3), 5.0))
    assert before.tolist() == [[5.0, 5.0, 5.0]]  # no statistics yet: nearly the identity
    encoder.update(torch.randn(100, 3, generator=generator()))
    assert encoder(torch.full((1, 3), 1e6)).tolist() == [[10.0, 10.0, 10.0]]
    plain = ObservationEncoder(BOX)
    plain.update(torch.randn(100, 3, generator=generator()))
    assert plain(torch.full((1, 3), 1e6)).tolist() == [[1e6, 1e6, 1e6]]
    encoder.update(torch.empty(0, 3))
    assert encoder.count.item() == 100


@pytest.mark.parametrize("leading", [(), (5,), (2, 5)])
def test_encodings(leading: tuple[int, ...]) -> None:
    one_hot = ObservationEncoder(spaces.Discrete(4, start=-2))
    observations = torch.randint(-2, 2, leading, generator=generator())
    assert torch.equal(one_hot(observations).argmax(-1) - 2, observations)
    assert one_hot(observations).sum(-1).eq(1).all()
    flat = ObservationEncoder(spaces.Box(0, 255, (2, 3), np.uint8))
    image = torch.randint(0, 255, (*leading, 2, 3), generator=generator()).to(torch.uint8)
    assert torch.equal(flat(image), image.reshape(*leading, 6).float())
    double = ObservationEncoder(spaces.Box(-1, 1, (3,), np.float64))
    assert double(torch.zeros(*leading, 3, dtype=torch.float64)).dtype == torch.float32
    scalar = ObservationEncoder(spaces.Box(-1, 1, (), np.float32))
    assert scalar(torch.zeros(leading)).shape == (*leading, 1)


# --- Actions -------------------------------------------------------------------------------------------------


def test_actions_are_scaled_and_clipped_to_the_bounds() -> None:
    space = spaces.Box(
        np.array([0, -2, -np.inf, 1], np.float32), np.array([10, 2, np.inf, np.inf], np.float32)
    )
    policy = make_policy(BOX, space, generator=generator())
    actions = torch.tensor([[0.0, 0.5, 3.0, 0.0], [1.0, -1.0, -40.0, 5.0], [9.0, -9.0, 0.0, -9.0]])
    expected = [[5.0, 1.0, 3.0, 1.0], [10.0, -2.0, -40.0, 6.0], [10.0, -2.0, 0.0, 1.0]]
    assert policy.to_env(actions).tolist() == expected
    assert policy.to_env(actions).dtype == np.float32


def test_action_shapes_and_starts() -> None:
    shaped = make_policy(BOX, spaces.Box(-1, 1, (2, 1, 2), np.float64), generator=generator())
    actions = shaped.act(torch.zeros(5, 3), generator())
    assert actions.shape == (5, 4)
    assert shaped.to_env(actions).shape == (5, 2, 1, 2)
    assert shaped.to_env(actions).dtype == np.float64
    shifted = make_policy(BOX, spaces.Discrete(3, start=7), generator=generator())
    actions = shifted.act(torch.zeros(200, 3), generator())
    assert set(actions.tolist()) == {0, 1, 2}
    assert set(shifted.to_env(actions).tolist()) == {7, 8, 9}


def test_each_choice_has_its_own_logits_start_and_place() -> None:
    """The logits are read one after another; the space is filled row by row."""
    space = spaces.MultiDiscrete([[2, 3], [1, 2]], start=[[10, 20], [30, -40]], dtype=np.int16)
    policy = make_policy(BOX, space, orthogonal=False, generator=generator())
    x = torch.randn(50, 3, generator=generator(1))
    logits = policy.network(policy.encoder(x))
    assert logits.shape == (50, 8)
    parts = [part.log_softmax(-1) for part in logits.split([2, 3, 1, 2], dim=-1)]
    actions = policy(x).sample(generator())
    expected = sum(part.gather(-1, actions[:, i : i + 1]) for i, part in enumerate(parts))
    torch.testing.assert_close(policy(x).log_prob(actions), expected.squeeze(-1))
    best = torch.stack([part.argmax(-1) for part in parts], -1)
    assert torch.equal(policy.act(x, deterministic=True), best)
    wanted = best.numpy().reshape(50, 2, 2) + np.array([[10, 20], [30, -40]])
    np.testing.assert_array_equal(policy.to_env(best), wanted)
    assert policy.to_env(best).dtype == np.int16
    assert len({tuple(row) for row in best.tolist()}) > 3
    bits = make_policy(BOX, spaces.MultiBinary([2, 2]), generator=generator())
    assert bits.network(bits.encoder(x)).shape == (50, 8)
    assert bits.predict(x.numpy()).shape == (50, 2, 2)


def test_acting() -> None:
    discrete = make_policy(BOX, spaces.Discrete(3), generator=generator())
    continuous = make_policy(BOX, spaces.Box(-1, 1, (2,)), log_std=-1.0, generator=generator())
    x = torch.randn(500, 3, generator=generator())
    for policy in (discrete, continuous):
        assert torch.equal(policy.act(x, generator(1)), policy.act(x, generator(1)))
        assert not torch.equal(policy.act(x, generator(1)), policy.act(x, generator(2)))
        assert torch.equal(policy.act(x, deterministic=True), policy(x).mode())
        assert not policy.act(x, generator(1)).requires_grad
    noise = continuous.act(x, generator(1)) - continuous.act(x, deterministic=True)
    assert noise.std().item() == pytest.approx(math.exp(-1.0), rel=0.1)


# --- Predictions in one's own loop ---

OBSERVATIONS = [
    spaces.Discrete(5, start=2),
    spaces.Box(-1, 1, (3,), np.float32),
    spaces.Box(-1, 1, (2, 2), np.float64),
    spaces.Box(0, 255, (2, 3), np.uint8),
    spaces.Box(-1, 1, (), np.float32),
]
ACTIONS = [
    spaces.Discrete(4),
    spaces.Discrete(3, start=7),
    spaces.Box(-2, 2, (2,), np.float32),
    spaces.Box(-1, 1, (2, 1, 2), np.float64),
    spaces.Box(-1, 1, (), np.float32),
    spaces.MultiDiscrete([2, 4, 1]),
    spaces.MultiDiscrete([[2, 3], [1, 4]], start=[[-1, 5], [0, 7]], dtype=np.int32),
    spaces.MultiBinary(3),
    spaces.MultiBinary([2, 2]),
]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("actions", ACTIONS, ids=str)
@pytest.mark.parametrize("observations", OBSERVATIONS, ids=str)
def test_a_prediction_is_an_action_of_the_environment(
    observations: Any, actions: Any, deterministic: bool
) -> None:
    policy = make_policy(observations, actions, orthogonal=False, generator=generator())
    observations.seed(0)
    seen = [observations.sample() for _ in range(6)]
    one = policy.predict(seen[0], deterministic=deterministic)
    assert actions.contains(one)
    assert isinstance(one, np.integer if isinstance(actions, spaces.Discrete) else np.ndarray)
    assert one.dtype == actions.dtype
    several = policy.predict(np.stack(seen), deterministic=deterministic)
    assert several.shape == (6, *actions.shape)
    assert all(actions.contains(np.asarray(action)) for action in several)
    if deterministic:
        for observation, action in zip(seen, several, strict=True):
            np.testing.assert_allclose(policy.predict(observation), action, rtol=1e-4, atol=1e-5)
    assert policy.predict(np.stack(seen)[:1]).shape == (1, *actions.shape)


def test_a_prediction_is_the_mode_unless_it_is_to_be_sampled() -> None:
    policy = make_policy(BOX, spaces.Discrete(3), orthogonal=False, generator=generator())
    x = np.random.default_rng(0).normal(size=(400, 3))
    expected = policy(torch.from_numpy(x)).log_probs.argmax(-1).numpy()
    np.testing.assert_array_equal(policy.predict(x), expected)
    sampled = policy.predict(x, deterministic=False, generator=generator(1))
    np.testing.assert_array_equal(sampled, policy.predict(x, deterministic=False, generator=generator(1)))
    assert (sampled != expected).any()
    assert (sampled != policy.predict(x, deterministic=False, generator=generator(2))).any()
    torch.manual_seed(0)
    first = policy.predict(x, deterministic=False)
    torch.manual_seed(0)
    np.testing.assert_array_equal(first, policy.predict(x, deterministic=False))


def test_predictions_take_lists_and_read_only_arrays() -> None:
    policy = make_policy(BOX, spaces.Discrete(3), generator=generator())
    frozen = np.zeros(3, np.float32)
    frozen.setflags(write=False)
    assert policy.predict(frozen) == policy.predict([0.0, 0.0, 0.0]) == policy.predict(frozen[::-1])
    one_hot = make_policy(spaces.Discrete(5, start=2), spaces.Discrete(3), generator=generator())
    assert one_hot.predict(3).shape == ()
    assert one_hot.predict([3, 6]).shape == (2,)


@pytest.mark.parametrize("shape", [(), (2,), (3, 2), (4, 4, 3)])
def test_an_observation_of_another_shape_is_refused(shape: tuple[int, ...]) -> None:
    policy = make_policy(BOX, spaces.Discrete(3), generator=generator())
    with pytest.raises(ValueError, match=r"observation must have the shape \(3,\), or .*, got \("):
        policy.predict(np.zeros(shape))


@pytest.mark.parametrize("name", ["CartPole-v1", "Pendulum-v1", "FrozenLake-v1"])
def test_ones_own_loop(name: str) -> None:
    """FrozenLake looks actions up in a dictionary: they must be hashable."""
    env = gym.make(name)
    policy = make_policy(env.observation_space, env.action_space, generator=generator())
    observation, _ = env.reset(seed=0)
    for _ in range(5):
        action = policy.predict(observation)
        observation, _, terminated, truncated, _ = env.step(action)
        if terminated or truncated:
            observation, _ = env.reset()
    env.close()


# --- Networks ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("action_space", [spaces.Discrete(4), spaces.MultiBinary(3), spaces.Box(-1, 1, (4,))])
def test_orthogonal_start_is_nearly_uniform_or_centred(action_space: spaces.Space) -> None:
    policy = make_policy(BOX, action_space, generator=generator())
    x = 5 * torch.randn(100, 3, generator=generator())
    if isinstance(policy, CategoricalPolicy):
        assert (policy(x).log_probs + math.log(4)).abs().max() < 0.05
    elif isinstance(policy, MultiCategoricalPolicy):
        assert (policy(x).entropy() - 3 * math.log(2)).abs().max() < 0.01
    else:
        assert policy(x).mean.abs().max() < 0.05
    hidden = policy.network[2].weight
    gain = torch.nn.init.calculate_gain("tanh")
    torch.testing.assert_close(hidden @ hidden.T, gain**2 * torch.eye(64), rtol=1e-4, atol=1e-4)


def test_initialisation_takes_its_randomness_from_the_generator() -> None:
    state = torch.get_rng_state()
    for orthogonal in (True, False):
        one, same, other = (
            make_policy(BOX, spaces.Discrete(2), orthogonal=orthogonal, generator=generator(s))
            for s in (0, 0, 1)
        )
        assert all(torch.equal(a, b) for a, b in zip(one.parameters(), same.parameters(), strict=True))
        assert not torch.equal(one.network[0].weight, other.network[0].weight)
        assert all(torch.isfinite(p).all() for p in one.parameters())
    assert torch.equal(torch.get_rng_state(), state)


def test_default_initialisation_has_pytorchs_range() -> None:
    policy = make_policy(BOX, spaces.Discrete(2), orthogonal=False, generator=generator())
    for layer in (policy.network[0], policy.network[2]):
        bound = 1 / math.sqrt(layer.in_features)
        for tensor in (layer.weight, layer.bias):
            assert tensor.abs().max() <= bound
            assert tensor.abs().max() > 0.8 * bound


def test_architecture_follows_the_arguments() -> None:
    policy = make_policy(BOX, spaces.Discrete(2), hidden=(7, 5, 4), activation="relu", generator=generator())
    linear = [layer for layer in policy.network if isinstance(layer, torch.nn.Linear)]
    assert [layer.out_features for layer in linear] == [7, 5, 4, 2]
    assert sum(isinstance(layer, torch.nn.ReLU) for layer in policy.network) == 3
    critic = Critic(policy.encoder, hidden=(7,), generator=generator())
    assert critic(torch.zeros(2, 5, 3)).shape == (2, 5)
    assert not {id(p) for p in critic.parameters()} & {id(p) for p in policy.parameters()}


@pytest.mark.parametrize(
    ("observations", "actions", "message"),
    [
        (spaces.Dict({"x": BOX}), spaces.Discrete(2), "observation space must be Discrete or Box, got Dict"),
        (
            spaces.MultiBinary(3),
            spaces.Discrete(2),
            "observation space must be Discrete or Box, got MultiBinary",
        ),
        (
            BOX,
            spaces.Tuple((spaces.Discrete(2), spaces.Discrete(2))),
            "action space must be Discrete, MultiDiscrete, MultiBinary or a floating-point Box, got Tuple",
        ),
        (
            BOX,
            spaces.Box(0, 5, (2,), np.int32),
            "action space must be Discrete, MultiDiscrete, MultiBinary or a floating-point Box, got Box",
        ),
    ],
)
def test_other_spaces_are_refused(observations: spaces.Space, actions: spaces.Space, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make_policy(observations, actions, generator=generator())


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(ValueError, match=r"activation must be one of \['relu', 'tanh'\], got 'gelu'"):
        make_policy(BOX, spaces.Discrete(2), activation="gelu", generator=generator())


def test_gaussian_policy_starts_at_the_given_width() -> None:
    policy = make_policy(BOX, spaces.Box(-1, 1, (2,)), log_std=-0.7, generator=generator())
    assert isinstance(policy, GaussianPolicy)
    torch.testing.assert_close(policy(torch.zeros(4, 3)).log_std.detach(), torch.full((2,), -0.7))
