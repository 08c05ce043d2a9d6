"""Images as observations: the encoder, and who learns it."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from control_runs import PPO, TRPO, Guess, learners
from gymnasium import spaces
from torch import Tensor

from policyopt.control import (
    Critic,
    ImageEncoder,
    Policy,
    evaluate,
    make_policy,
    train_ppo,
    train_trpo,
)
from policyopt.trust_region import LineSearch, TrustRegionStep

IMAGES = spaces.Box(0, 255, (6, 8, 2), np.uint8)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def image_policy(seed: int = 0, space: Any = IMAGES, features: int = 16) -> Policy:
    encoder = ImageEncoder(space, features=features, generator=generator(seed))
    actions = spaces.Discrete(2)
    return make_policy(space, actions, hidden=(16,), encoder=encoder, generator=generator(seed))


class Side(Guess):
    """Noise, and a bright line somewhere in the left or right half: the action says which."""

    observation_space = IMAGES

    def _observe(self) -> Any:
        self.right = int(self.np_random.integers(2))
        image = self.np_random.integers(0, 100, IMAGES.shape, np.uint8)
        image[:, 4 * self.right + self.np_random.integers(4)] = 255
        return image


def convolved(image: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """ReLU of a 3 × 3 convolution of ``[C, H, W]`` with stride 2 and a border of zeros, sum by sum."""
    padded = np.pad(image, ((0, 0), (1, 1), (1, 1)))
    height, width = (image.shape[1] + 1) // 2, (image.shape[2] + 1) // 2
    result = np.empty((len(weight), height, width))
    for i in range(height):
        for j in range(width):
            result[:, i, j] = (weight * padded[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3]).sum((1, 2, 3))
    return result.clip(0)


@pytest.mark.parametrize("shape", [(5, 7, 3), (8, 8, 1), (1, 9, 4), (1, 1, 1)])
@pytest.mark.parametrize("channels_last", [True, False])
def test_features_are_those_of_convolutions_by_hand(shape: tuple[int, int, int], channels_last: bool) -> None:
    height, width, channels = shape
    if min(height, width) < channels:
        pytest.skip("where the first number is smaller, it counts channels")
    space = spaces.Box(0, 255, shape if channels_last else (channels, height, width), np.uint8)
    encoder = ImageEncoder(space, features=5, generator=generator())
    images = np.random.default_rng(0).integers(0, 256, (4, *space.shape), np.uint8)
    weights = [
        p.detach().numpy() for name, p in encoder.network.named_parameters() if name.endswith("weight")
    ]
    assert [len(weight) for weight in weights] == [16, 32, 32, 5]
    expected = []
    for image in images:
        x = (image.transpose(2, 0, 1) if channels_last else image) / 255
        for weight in weights[:3]:
            x = convolved(x, weight)
        expected.append((weights[3] @ x.reshape(-1)).clip(0))
    found = encoder(torch.from_numpy(images))
    np.testing.assert_allclose(found.detach().numpy(), expected, rtol=1e-4, atol=1e-5)
    assert encoder(torch.from_numpy(images).reshape(2, 2, *space.shape)).shape == (2, 2, 5)
    assert torch.equal(encoder(torch.from_numpy(images[0])), encoder(torch.from_numpy(images[:1]))[0])
    assert encoder(torch.from_numpy(images[:0])).shape == (0, 5)


def test_weights_come_from_the_generator() -> None:
    state = torch.get_rng_state()
    one, same, other = (ImageEncoder(IMAGES, generator=generator(s)) for s in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(one.parameters(), same.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(one.network[0].weight, other.network[0].weight)
    kernels = one.network[2].weight.detach().flatten(1)  # [32, 144]
    torch.testing.assert_close(kernels @ kernels.T, 2 * torch.eye(32), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("train", "config"), learners(6000))
def test_the_side_of_a_line_is_learned(train: Any, config: Any, tmp_path: Any) -> None:
    result = train(Side, config, policy=image_policy(), progress=False)
    assert evaluate(result.policy, Side, episodes=20).mean > 8  # of 10; chance is 5
    image = Side.observation_space.sample()
    assert result.policy.predict(image).shape == ()
    assert result.policy.predict(np.stack([image] * 3)).shape == (3,)
    with pytest.raises(ValueError, match=r"save its state_dict\(\) with safetensors"):
        result.save(tmp_path)


# --- The critic's copy ---


def test_a_critic_shares_no_parameters_of_an_encoder() -> None:
    policy = image_policy()
    assert isinstance(policy.encoder, ImageEncoder)
    critic = Critic(policy.encoder, generator=generator())
    assert not set(map(id, policy.parameters())) & set(map(id, critic.parameters()))
    image = torch.from_numpy(IMAGES.sample())
    assert torch.equal(critic.encoder(image), policy.encoder(image))
    plain = make_policy(IMAGES, spaces.Discrete(2), generator=generator())
    assert Critic(plain.encoder, generator=generator()).encoder is plain.encoder


def test_learning_the_value_does_not_move_the_policy() -> None:
    """A TRPO step that is refused leaves the policy as it is, its encoder too; the critic learns."""

    def refuse(*arguments: Any, **settings: Any) -> TrustRegionStep:
        search = LineSearch(False, 0.0, 0.0, 0.0, [], "refused")
        return TrustRegionStep(search, expected_improvement=0.0, gradient_norm=0.0, residual=0.0)

    policy = image_policy()
    before = [p.detach().clone() for p in policy.parameters()]
    features = policy.encoder(torch.from_numpy(IMAGES.sample()))
    result = train_trpo(Side, TRPO, policy=policy, step=refuse, progress=False)
    assert all(torch.equal(p, q) for p, q in zip(policy.parameters(), before, strict=True))
    assert result.critic is not None
    assert not torch.equal(result.critic.encoder.network[0].weight, policy.encoder.network[0].weight)
    assert features.shape == (16,)


def test_each_encoder_with_parameters_has_its_statistics_updated_once() -> None:
    class Scaled(ImageEncoder):
        def __init__(self) -> None:
            super().__init__(IMAGES, features=4, generator=generator())
            self.seen = torch.nn.Buffer(torch.zeros(()))

        def update(self, observations: Tensor) -> None:
            assert observations.shape[1:] == IMAGES.shape
            self.seen += len(observations)

    policy = make_policy(IMAGES, spaces.Discrete(2), encoder=Scaled(), generator=generator())
    result = train_ppo(Side, PPO, policy=policy, progress=False)
    assert result.critic is not None
    for network in (result.policy, result.critic):
        assert network.encoder.seen.item() == result.steps


# --- Bad input ---


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(0, 1, (8, 8, 3), np.float32),
        spaces.Box(0, 255, (8, 8), np.uint8),
        spaces.Discrete(3),
        spaces.Dict({"image": IMAGES}),
    ],
    ids=str,
)
def test_what_is_no_image_is_refused(space: Any) -> None:
    with pytest.raises(ValueError, match="images must be a Box of uint8 with three dimensions, got "):
        ImageEncoder(space, generator=generator())


def test_images_of_another_size_are_refused() -> None:
    policy = image_policy(space=spaces.Box(0, 255, (6, 6, 2), np.uint8))
    with pytest.raises(
        ValueError, match="policy was made for other observations or actions than those of Side"
    ):
        evaluate(policy, Side, episodes=1)
    with pytest.raises(ValueError, match=r"observation must have the shape \(6, 6, 2\)"):
        policy.predict(IMAGES.sample())
