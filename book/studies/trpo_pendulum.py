"""TRPO on Pendulum, with the rewards as they are and divided by the standard deviation of the return."""

from __future__ import annotations

from typing import Any

from _control import measure

from policyopt.control import TRPOConfig, evaluate, train_trpo
from policyopt_book.studies import Study

STEPS = 50_000


def run(*, seed: int, normalize_rewards: bool) -> dict[str, Any]:
    """Train once, and evaluate the policy without exploration."""
    config = TRPOConfig(
        total_steps=STEPS,
        num_envs=8,
        rollout_steps=128,
        gamma=0.9,
        gae_lambda=0.5,
        kl_limit=0.06,
        normalize_rewards=normalize_rewards,
        critic_learning_rate=3e-3,
        device="cpu",
    )
    result = train_trpo("Pendulum-v1", config, seed=seed, progress=False)
    kls = [row.kl for row in result.history]
    return {
        **measure(result, STEPS),
        "kl_max": max(kls),
        "explained": result.history[-1].explained_variance,
        "final": evaluate(result.policy, "Pendulum-v1", episodes=10, seed=seed).mean,
    }


STUDY = Study(
    name="trpo_pendulum",
    run=run,
    settings=[{"normalize_rewards": False}, {"normalize_rewards": True}],
    seeds=10,
)

if __name__ == "__main__":
    STUDY.main()
