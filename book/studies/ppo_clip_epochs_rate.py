"""PPO on CartPole: clip range, passes over a batch and learning rate, together."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
from _control import measure

from policyopt.control import PPOConfig, train_ppo
from policyopt_book.studies import Study

STEPS = 14_000
REFERENCE = PPOConfig(
    total_steps=STEPS,
    num_envs=16,
    minibatch_size=256,
    epochs_per_batch=4,
    gamma=0.98,
    gae_lambda=0.9,
    clip_ratio=0.2,
    learning_rate=3e-3,
    device="cpu",
)


def train(config: PPOConfig, *, seed: int, loss: Any = None) -> dict[str, Any]:
    """Train once, and measure; batches of 16 copies times 64 steps, minibatches of 256."""
    result = train_ppo("CartPole-v1", config, seed=seed, loss=loss, progress=False)
    rows = result.history
    return {
        **measure(result, STEPS, points=10),
        "second_half": np.nanmean(measure(result, STEPS, points=200)["curve"][100:]),
        "kl": np.mean([row.kl for row in rows]),
        "ratio_max": max(row.ratio_max for row in rows),
        "clip_fraction": np.mean([row.clip_fraction for row in rows]),
    }


def run(*, seed: int, clip: float, epochs: int, rate: float) -> dict[str, Any]:
    """Train once with these three changed."""
    return train(replace(REFERENCE, clip_ratio=clip, epochs_per_batch=epochs, learning_rate=rate), seed=seed)


RATES = (1e-3, 3e-3, 6e-3, 1.2e-2, 2.4e-2)
STUDY = Study(
    name="ppo_clip_epochs_rate",
    run=run,
    settings=[
        *({"clip": 0.2, "epochs": epochs, "rate": rate} for epochs in (1, 4, 10) for rate in RATES),
        *({"clip": clip, "epochs": 10, "rate": rate} for clip in (0.05, 0.1, 0.4, 1e9) for rate in RATES[:3]),
    ],
    seeds=20,
    sample={"clip": 0.2, "epochs": 1, "rate": 3e-3},
)

if __name__ == "__main__":
    STUDY.main()
