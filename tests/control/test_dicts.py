"""Dictionaries as observations, made one vector: each part through an encoder of its own."""

from __future__ import annotations

import dataclasses
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from control_runs import PPO, assert_same_run, learners
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import FlattenObservation

from policyopt.control import (
    Collector,
    DictEncoder,
    ImageEncoder,
    ObservationEncoder,
    Policy,
    evaluate,
    make_policy,
    train_ppo,
)

TWO = spaces.Discrete(2)
IMAGE = spaces.Box(0, 255, (5, 4, 1), np.uint8)
PARTS = spaces.Dict(
    {
        "inner": spaces.Dict(
            {"clock": spaces.Box(0, np.inf, (1,), np.float64), "suit": spaces.Discrete(3, start=2)}
        ),
        "image": IMAGE,
        "speed": spaces.Box(-np.inf, np.inf, (2,), np.float32),
    }
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


FLAT = spaces.flatten_space(PARTS)


def dict_policy(actions: Any = TWO, seed: int = 0, *, normalize_clock: bool = True) -> Policy:
    clock = ObservationEncoder(PARTS["inner"]["clock"], normalize=normalize_clock)
    parts = {
        "image": ImageEncoder(IMAGE, features=8, generator=generator(seed)),
        "inner": DictEncoder(PARTS["inner"], {"clock": clock}),
        "speed": ObservationEncoder(PARTS["speed"], normalize=True),
    }
    encoder = DictEncoder(PARTS, parts)
    return make_policy(FLAT, actions, hidden=(16,), encoder=encoder, generator=generator(seed))


class Agree(gym.Env[Any, Any]):
    """Three signs in three parts: whether the majority is on. The last part is told in another order."""

    observation_space, action_space = PARTS, spaces.Discrete(2)

    def _observe(self) -> Any:
        self.signs = self.np_random.integers(0, 2, 3)
        self.clock += 1
        speed = (2 * self.signs[2] - 1 + 0.1 * self.np_random.normal(size=2)).astype(np.float32)
        image = np.full(IMAGE.shape, 50 + 150 * self.signs[0], np.uint8)
        inner = {"suit": np.int64(2 + 2 * self.signs[1]), "clock": np.array([1e9 + self.clock])}
        return {"speed": speed, "inner": inner, "image": image}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.count, self.clock = 0, 0.0
        return self._observe(), {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        reward = float(action == (self.signs.sum() > 1))
        self.count += 1
        return self._observe(), reward, False, self.count == 5, {}


def flat() -> Any:
    return FlattenObservation(Agree())


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_rollouts_hold_what_the_environment_returned(mode: AutoresetMode) -> None:
    seen: list[Any] = []

    class Noted(Agree):
        def _observe(self) -> Any:
            seen.append(super()._observe())
            return seen[-1]

    env = SyncVectorEnv([lambda: FlattenObservation(Noted())], autoreset_mode=mode)
    rollout = Collector(env, dict_policy(), generator(), seed=0).collect(12)
    assert rollout.observations.dtype == torch.float64  # type: ignore[union-attr]
    rows = [*rollout.observations[:, 0], rollout.last_observations[0]]
    if mode == AutoresetMode.SAME_STEP:
        assert rollout.final_index[0].tolist() == [4, 9]
        rows[5:5], rows[11:11] = rollout.final_observations[:1], rollout.final_observations[1:]
    assert [row.tolist() for row in rows] == [spaces.flatten(PARTS, x).tolist() for x in seen]


def test_features_are_those_of_the_parts_side_by_side() -> None:
    policy = dict_policy()
    encoder: Any = policy.encoder
    PARTS.seed(0)
    one = PARTS.sample()
    x = torch.as_tensor(spaces.flatten(PARTS, one))[None]
    read: dict[str, torch.Tensor] = {}
    for name in ("image", "speed"):
        encoder.parts[name].register_forward_pre_hook(
            lambda _, given, name=name: read.update({name: given[0]})
        )
    expected = [
        encoder.parts["image"](torch.as_tensor(one["image"])[None]),
        torch.as_tensor(one["inner"]["clock"])[None].float(),  # no statistics yet
        torch.eye(3)[[one["inner"]["suit"] - 2]],
        torch.as_tensor(one["speed"])[None],
    ]
    found = encoder(x)
    torch.testing.assert_close(found, torch.cat([y.clamp(-10, 10) for y in expected], -1))
    assert read["image"][0].tolist() == one["image"].tolist()
    assert read["speed"][0].tolist() == one["speed"].tolist()
    assert encoder.features == 8 + 1 + 3 + 2
    torch.testing.assert_close(encoder(torch.stack([x, x], 1)), torch.stack([found, found], 1))


@pytest.mark.parametrize(("train", "config"), learners(8000))
def test_what_all_parts_say_together_is_learned(train: Any, config: Any) -> None:
    result = train(flat, config, policy=dict_policy(), progress=False)
    assert evaluate(result.policy, flat, episodes=40).mean > 4.3  # of 5; two parts alone give 3.75
    statistics = result.policy.encoder.parts["inner"].parts["clock"]
    assert statistics.count.item() == result.steps
    assert statistics.mean.item() == pytest.approx(1e9, rel=1e-3)
    assert result.critic is None or torch.equal(
        result.critic.encoder.parts["speed"].mean, result.policy.encoder.parts["speed"].mean
    )


def test_runs_on_dictionaries_are_resumed_bit_for_bit(tmp_path: Any) -> None:
    short = dataclasses.replace(PPO, total_steps=400, checkpoint_every=1, anneal_learning_rate=False)
    longer = dataclasses.replace(short, total_steps=800)
    whole = train_ppo(flat, longer, policy=dict_policy(), checkpoint_dir=tmp_path / "a", progress=False)
    train_ppo(flat, short, policy=dict_policy(), checkpoint_dir=tmp_path / "b", progress=False)
    again = train_ppo(flat, longer, policy=dict_policy(), checkpoint_dir=tmp_path / "b", progress=False)
    assert_same_run(again, whole)


def test_predictions_for_one_and_for_several() -> None:
    policy = dict_policy(spaces.MultiBinary(2))
    env = flat()
    seen = [env.reset(seed=0)[0]] + [env.step(0)[0] for _ in range(3)]
    singles = np.stack([policy.predict(x) for x in seen])
    assert singles.shape == (4, 2)
    np.testing.assert_array_equal(policy.predict(np.stack(seen)), singles)
    for wrong in (np.zeros(3), np.zeros((2, 3)), np.float64(0), np.zeros((1, 2, len(seen[0])))):
        with pytest.raises(ValueError, match=r"observation must have the shape \(26,\)"):
            policy.predict(wrong)


# --- Bad input ---


def test_a_part_that_is_not_finite_is_refused() -> None:
    class Bad(Agree):
        def _observe(self) -> Any:
            return super()._observe() | {"speed": np.array([0, np.nan], np.float32)}

    with pytest.raises(ValueError, match=r"returned a NaN or infinite observation \(nan at \[25\] of it\)"):
        train_ppo(lambda: FlattenObservation(Bad()), PPO, policy=dict_policy(), progress=False)


def test_differences_that_float32_loses_are_refused_in_a_part() -> None:
    policy = dict_policy(normalize_clock=False)
    with pytest.raises(ValueError, match="must differ by more than float32 resolves"):
        train_ppo(flat, PPO, policy=policy, progress=False)


def test_a_dictionary_is_flattened_and_read_by_its_own_encoder() -> None:
    with pytest.raises(ValueError, match=r"arrays of numbers, got Dict.*FlattenObservation"):
        train_ppo(Agree, PPO, policy=dict_policy(), progress=False)
    image = {"image": ImageEncoder(IMAGE, generator=generator())}
    other = DictEncoder(spaces.Dict(image=IMAGE), image)
    policy = make_policy(FLAT, TWO, encoder=other, generator=generator())
    with pytest.raises(ValueError, match="policy was made for other observations or actions than those of"):
        train_ppo(flat, PPO, policy=policy, progress=False)
    with pytest.raises(ValueError, match=r"parts must be of \['speed'\], got \['image'\]"):
        DictEncoder(spaces.Dict(speed=PARTS["speed"]), image)
    with pytest.raises(
        ValueError, match=r"the encoder of 'image' must be for Box\(.*\(2,\), float32\), got \(5, 4, 1\)"
    ):
        DictEncoder(spaces.Dict(image=PARTS["speed"]), image)
    with pytest.raises(ValueError, match="space must be a Dict, got Box"):
        DictEncoder(IMAGE, image)


def test_parts_may_have_any_name_and_an_encoder_of_ones_own() -> None:
    class Sum(torch.nn.Module):
        """Two numbers as their sum."""

        shape, features = (2,), 1

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.float().sum(-1, keepdim=True)

        def update(self, x: torch.Tensor) -> None: ...

    names = ("type", "items", "pos.x")
    space = spaces.Dict({name: spaces.Box(-1, 1, (2,)) for name in names})
    encoder = DictEncoder(space, {"items": Sum()})  # type: ignore[dict-item]
    x = torch.arange(6.0).view(1, 6)  # in the order of the space: items, pos.x, type
    assert encoder(x).tolist() == [[1.0, 2.0, 3.0, 4.0, 5.0]]
    assert encoder.features == 5
    encoder.update(x)


@pytest.mark.parametrize("shape", [(24, 16, 3), (3, 16, 24)])
def test_an_encoder_for_images_of_another_shape_is_refused(shape: tuple[int, int, int]) -> None:
    space = spaces.Dict(image=spaces.Box(0, 255, (16, 24, 3), np.uint8))
    eyes = ImageEncoder(spaces.Box(0, 255, shape, np.uint8), generator=generator())
    with pytest.raises(ValueError, match=r"the encoder of 'image' must be for Box.*\(16, 24, 3\)"):
        DictEncoder(space, {"image": eyes})
