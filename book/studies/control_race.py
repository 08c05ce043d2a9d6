"""CartPole: each method at a grid of step sizes, the same steps for all."""

from __future__ import annotations

import time
from typing import Any

from _control import measure

from policyopt.control import (
    PPOConfig,
    ReinforceConfig,
    TRPOConfig,
    train_ppo,
    train_reinforce,
    train_trpo,
)
from policyopt_book.studies import Study

STEPS, THRESHOLD = 40_000, 300.0


def train(*, seed: int, method: str, factor: float, steps: int = STEPS, anneal: bool = True) -> Any:
    """Train once, with a step ``factor`` times that of the method's chapter.

    TRPO's limit is of the KL divergence, which grows with the square of the step. Only PPO's chapter anneals.
    """
    common: dict[str, Any] = {"total_steps": steps, "num_envs": 16, "gamma": 0.98, "device": "cpu"}
    batch: dict[str, Any] = {"rollout_steps": 64, "gae_lambda": 0.9}
    options: dict[str, Any] = {"seed": seed, "progress": False}
    if method.startswith("REINFORCE"):
        baseline: Any = "learned" if "critic" in method else "mean"
        reinforce = ReinforceConfig(learning_rate=1e-2 * factor, baseline=baseline, **common)
        return train_reinforce("CartPole-v1", reinforce, **options)
    if method == "TRPO":
        trpo = TRPOConfig(kl_limit=0.01 * factor**2, critic_learning_rate=3e-3, **common, **batch)
        return train_trpo("CartPole-v1", trpo, **options)
    ppo = PPOConfig(
        learning_rate=3e-3 * factor,
        anneal_learning_rate=anneal,
        epochs_per_batch=10,
        minibatch_size=256,
        **common,
        **batch,
    )
    return train_ppo("CartPole-v1", ppo, **options)


def run(*, seed: int, method: str, factor: float) -> dict[str, Any]:
    """Train once, and measure."""
    start = time.process_time()
    result = train(seed=seed, method=method, factor=factor)
    return {
        **measure(result, STEPS, threshold=THRESHOLD),
        "cpu_seconds": time.process_time() - start,
    }


METHODS = ("REINFORCE", "REINFORCE, critic", "TRPO", "PPO")
SETTINGS = [{"method": method, "factor": factor} for factor in (1.0, 2.0, 0.5, 4.0) for method in METHODS]
SETTINGS.append({"method": "REINFORCE, critic", "factor": 8.0})  # its best of the four is at the edge
STUDY = Study(
    name="control_race",
    run=run,
    settings=SETTINGS,
    seeds=10,
    sample={"method": "REINFORCE", "factor": 1.0},
)

if __name__ == "__main__":
    STUDY.main()
