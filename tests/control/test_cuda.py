"""Training on a CUDA device."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from control_runs import TRAINERS, Point, clipped, parameters, ppo, with_config
from torch import Tensor

from policyopt.control import Steps, TrainResult, TRPOConfig
from policyopt.losses import ClippedSurrogate


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
def test_cuda_ratio_of_the_first_pass_is_one() -> None:
    ratios: list[Tensor] = []

    def spy(steps: Steps) -> ClippedSurrogate:
        ratios.append(torch.exp(steps.log_prob - steps.old_log_prob).detach())
        return clipped(steps)

    with_config(ppo, minibatch_size=10**6, device="cuda")(loss=spy)
    for first in ratios[::2]:
        torch.testing.assert_close(first, torch.ones_like(first), rtol=0, atol=1e-5)
