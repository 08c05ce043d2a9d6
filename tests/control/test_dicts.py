"""Dictionaries as observations: each part through an encoder of its own."""

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

from policyopt.control import (
    Collector,
    DictEncoder,
    DictObservations,
    ImageEncoder,
    MaskedObservations,
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


def dict_policy(actions: Any = TWO, seed: int = 0) -> Policy:
    inner = PARTS["inner"]
    parts = {
        "image": ImageEncoder(IMAGE, features=8, generator=generator(seed)),
        "inner": DictEncoder(
            {
                "clock": ObservationEncoder(inner["clock"], normalize=True),
                "suit": ObservationEncoder(inner["suit"]),
            }
        ),
        "speed": ObservationEncoder(PARTS["speed"], normalize=True),
    }
    return make_policy(PARTS, actions, hidden=(16,), encoder=DictEncoder(parts), generator=generator(seed))


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


def plain(x: Any, *place: int) -> Any:
    """Numbers of one row, to be compared."""
    if isinstance(x, dict):
        return {name: plain(part, *place) for name, part in x.items()}
    return np.asarray(x)[place].tolist()


def recorded() -> tuple[type[Agree], list[Any]]:
    """An environment that notes what it returned."""
    seen: list[Any] = []

    class Noted(Agree):
        def _observe(self) -> Any:
            seen.append(super()._observe())
            return seen[-1]

    return Noted, seen


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_rollouts_hold_what_the_environment_returned(mode: AutoresetMode) -> None:
    env, seen = recorded()
    policy = dict_policy()
    rollout = Collector(SyncVectorEnv([env], autoreset_mode=mode), policy, generator(), seed=0).collect(12)
    found = rollout.observations
    assert isinstance(found, DictObservations)
    assert found["image"].dtype == torch.uint8
    assert found["inner"]["clock"].dtype == torch.float64
    assert found["inner"]["suit"].dtype == torch.int64
    rows = [plain(found, t, 0) for t in range(12)] + [plain(rollout.last_observations, 0)]
    if mode == AutoresetMode.SAME_STEP:
        finals = [plain(rollout.final_observations, i) for i in range(2)]
        assert rollout.final_index[0].tolist() == [4, 9]
        rows[5:5], rows[11:11] = finals[:1], finals[1:]
    assert rows == [plain(x) for x in seen]
    values, next_values = rollout.evaluate(lambda x: x["inner"]["clock"].squeeze(-1) - 1e9)
    assert values[:5, 0].tolist() == [1, 2, 3, 4, 5]
    assert next_values[:5, 0].tolist() == [2, 3, 4, 5, 6]
    assert next_values[-1, 0] == rollout.last_observations["inner"]["clock"].item() - 1e9
    flat = rollout.flat(found)
    assert len(flat["image"]) == rollout.steps
    picked = MaskedObservations(flat, torch.ones(rollout.steps, 2, dtype=torch.bool))[torch.tensor([3, 0])]
    assert plain(picked.values, 0) == plain(seen[3])


def test_features_are_those_of_the_parts_side_by_side() -> None:
    policy = dict_policy()
    encoder: Any = policy.encoder
    PARTS.seed(0)
    one = PARTS.sample()
    x = DictObservations({n: torch.as_tensor(one[n])[None] for n in ("image", "speed")})
    x["inner"] = DictObservations({n: torch.as_tensor(v)[None] for n, v in one["inner"].items()})
    expected = [
        encoder.parts["image"](x["image"]),
        (x["inner"]["clock"]).float(),  # no statistics yet
        torch.eye(3)[x["inner"]["suit"] - 2],
        x["speed"],
    ]
    torch.testing.assert_close(encoder(x), torch.cat([y.clamp(-10, 10) for y in expected], -1))
    assert encoder.features == 8 + 1 + 3 + 2


@pytest.mark.parametrize(("train", "config"), learners(8000))
def test_what_all_parts_say_together_is_learned(train: Any, config: Any) -> None:
    result = train(Agree, config, policy=dict_policy(), progress=False)
    assert evaluate(result.policy, Agree, episodes=40).mean > 4.3  # of 5; two parts alone give 3.75
    statistics = result.policy.encoder.parts["inner"].parts["clock"]
    assert statistics.count.item() == result.steps
    assert statistics.mean.item() == pytest.approx(1e9, rel=1e-3)
    assert result.critic is None or torch.equal(
        result.critic.encoder.parts["speed"].mean, result.policy.encoder.parts["speed"].mean
    )


def test_runs_on_dictionaries_are_resumed_bit_for_bit(tmp_path: Any) -> None:
    short = dataclasses.replace(PPO, total_steps=400, checkpoint_every=1, anneal_learning_rate=False)
    longer = dataclasses.replace(short, total_steps=800)
    whole = train_ppo(Agree, longer, policy=dict_policy(), checkpoint_dir=tmp_path / "a", progress=False)
    train_ppo(Agree, short, policy=dict_policy(), checkpoint_dir=tmp_path / "b", progress=False)
    again = train_ppo(Agree, longer, policy=dict_policy(), checkpoint_dir=tmp_path / "b", progress=False)
    assert_same_run(again, whole)


def test_predictions_for_one_and_for_several() -> None:
    policy = dict_policy(spaces.MultiBinary(2))
    env = Agree()
    seen = [env.reset(seed=0)[0]] + [env.step(0)[0] for _ in range(3)]
    singles = np.stack([policy.predict(x) for x in seen])
    assert singles.shape == (4, 2)
    several = {n: np.stack([x[n] for x in seen]) for n in ("image", "speed")}
    several["inner"] = {n: np.stack([x["inner"][n] for x in seen]) for n in ("clock", "suit")}  # type: ignore[assignment]
    np.testing.assert_array_equal(policy.predict(several), singles)
    wrong = [
        seen[0] | {"image": several["image"]},  # four images, one speed
        {n: x for n, x in seen[0].items() if n != "speed"},
        seen[0] | {"speed": np.zeros(3)},
        np.zeros(3),
    ]
    for observation in wrong:
        with pytest.raises(ValueError, match=r"observation must have the shape \{'image': "):
            policy.predict(observation)


# --- Bad input ---


@pytest.mark.parametrize(
    ("part", "value", "message"),
    [
        (
            "speed",
            np.array([0, np.nan], np.float32),
            r"returned a NaN or infinite observation 'speed' \(nan at \[1\]",
        ),
        ("suit", np.int64(5), r"observations of Agree must be in Discrete\(3, start=2\), got \(\d, 5\)"),
    ],
)
def test_a_bad_part_is_refused_by_name(part: str, value: Any, message: str) -> None:
    class Bad(Agree):
        def _observe(self) -> Any:
            seen = super()._observe()
            (seen if part in seen else seen["inner"])[part] = value
            return seen

    Bad.__name__ = "Agree"
    with pytest.raises(ValueError, match=message):
        train_ppo(Bad, PPO, policy=dict_policy(), progress=False)


def test_differences_that_float32_loses_are_refused_in_a_part() -> None:
    policy = dict_policy()
    encoder: Any = policy.encoder
    encoder.parts["inner"].parts["clock"] = ObservationEncoder(PARTS["inner"]["clock"])  # not normalised
    with pytest.raises(ValueError, match="observations of Agree must differ by more than float32 resolves"):
        train_ppo(Agree, PPO, policy=policy, progress=False)


def test_a_dictionary_needs_an_encoder_for_each_part() -> None:
    with pytest.raises(ValueError, match="or give a DictEncoder to make_policy"):
        train_ppo(Agree, PPO, progress=False)
    encoder = DictEncoder({"image": ImageEncoder(IMAGE, generator=generator())})
    policy = make_policy(PARTS, spaces.Discrete(2), encoder=encoder, generator=generator())
    with pytest.raises(
        ValueError, match="policy was made for other observations or actions than those of Agree"
    ):
        train_ppo(Agree, PPO, policy=policy, progress=False)
    flat = make_policy(PARTS["speed"], spaces.Discrete(2), generator=generator())
    with pytest.raises(
        ValueError, match=r"observations of Agree must be arrays of numbers, got Dict.*DictEncoder"
    ):
        train_ppo(Agree, PPO, policy=flat, progress=False)
