"""Training on a CUDA device."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from control_runs import TRAINERS, Point, clipped, parameters, ppo, with_config
from torch import Tensor

from policyopt.control import PPOConfig, Steps, TrainResult, TRPOConfig, train_ppo
from policyopt.losses import ClippedSurrogate
from policyopt_book.tasks.tensor_envs import Acrobot, CartPole, Pendulum, TensorEnv


@pytest.mark.cuda
@pytest.mark.parametrize("train", TRAINERS.values(), ids=TRAINERS)
@pytest.mark.parametrize("environment", ["CartPole-v1", Point], ids=["discrete", "continuous"])
def test_cuda(train: Any, environment: Any, tmp_path: Path) -> None:
    config = dataclasses.replace(train.args[1], device="cuda", normalize_rewards=True, checkpoint_every=2)
    result = train.func(environment, config, checkpoint_dir=tmp_path / "run", progress=False)
    assert all(p.device.type == "cuda" for p in parameters(result))
    assert result.policy.predict(result.spaces[0].sample()).shape == result.spaces[1].shape
    if isinstance(config, TRPOConfig):
        assert (result.history.column("kl") <= config.kl_limit).all()
    for folder in (result.save(tmp_path / "saved"), tmp_path / "run"):
        for a, b in zip(parameters(result), parameters(TrainResult.load(folder)), strict=True):
            assert torch.equal(a.cpu(), b)
    longer = dataclasses.replace(config, total_steps=1200)
    resumed = train.func(environment, longer, checkpoint_dir=tmp_path / "run", progress=False)
    assert resumed.steps >= 1200
    assert resumed.history[: len(result.history)] == result.history


@pytest.mark.cuda
@pytest.mark.parametrize("kind", [CartPole, Pendulum, Acrobot])
@pytest.mark.parametrize("places", [("cuda", "cuda"), ("cpu", "cuda"), ("cuda", "cpu")], ids=str)
def test_cuda_environments_of_tensors(kind: type[TensorEnv], places: tuple[str, str]) -> None:
    """The environment where the networks are, or elsewhere; its steps are those of the CPU."""
    config = PPOConfig(total_steps=2000, rollout_steps=16, normalize_rewards=True, device=places[1])
    result = train_ppo(kind(64, device=places[0]), config, progress=False)
    assert all(p.device.type == places[1] for p in parameters(result))
    assert all(torch.isfinite(p).all() for p in parameters(result))
    here, there = kind(64), kind(64, device="cuda")
    here.reset(seed=0)
    there.reset(seed=0)
    there.state = here.state.cuda()
    shape = (64, *kind(1).single_action_space.shape)  # type: ignore[misc]
    actions = torch.ones(shape, dtype=torch.float32 if kind is Pendulum else torch.int64)
    for ours, theirs in zip(here.step(actions)[:4], there.step(actions.cuda())[:4], strict=True):
        torch.testing.assert_close(ours, theirs.cpu())


@pytest.mark.cuda
def test_cuda_ratio_of_the_first_pass_is_one() -> None:
    ratios: list[Tensor] = []

    def spy(steps: Steps) -> ClippedSurrogate:
        ratios.append(torch.exp(steps.log_prob - steps.old_log_prob).detach())
        return clipped(steps)

    with_config(ppo, minibatch_size=10**6, device="cuda")(loss=spy)
    for first in ratios[::2]:
        torch.testing.assert_close(first, torch.ones_like(first), rtol=0, atol=1e-5)
