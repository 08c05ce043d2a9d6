"""TRPO on CartPole: the limit of the KL divergence and the size of the batch, together."""

from __future__ import annotations

from typing import Any

from _control import measure

from policyopt.control import TRPOConfig, train_trpo
from policyopt_book.studies import Study

STEPS = 20_000


def run(*, seed: int, kl_limit: float, batch: int) -> dict[str, Any]:
    """Train once; the batch is 16 copies times ``batch / 16`` steps."""
    config = TRPOConfig(
        total_steps=STEPS,
        num_envs=16,
        rollout_steps=batch // 16,
        gamma=0.98,
        gae_lambda=0.9,
        kl_limit=kl_limit,
        critic_learning_rate=3e-3,
        device="cpu",
    )
    result = train_trpo("CartPole-v1", config, seed=seed, progress=False)
    kls = [row.kl for row in result.history]
    return {**measure(result, STEPS), "kl_mean": sum(kls) / len(kls), "updates": len(kls)}


# For each batch far enough that the best is not at the edge.
GRID = {
    256: (0.0003, 0.001, 0.003, 0.01, 0.03),
    1024: (0.001, 0.003, 0.01, 0.03, 0.1),
    4096: (0.01, 0.03, 0.1, 0.3),
}
STUDY = Study(
    name="trpo_step_and_batch",
    run=run,
    settings=[
        {"kl_limit": kl_limit, "batch": batch} for batch, limits in GRID.items() for kl_limit in limits
    ],
    seeds=20,
    sample={"kl_limit": 0.01, "batch": 4096},
)

if __name__ == "__main__":
    STUDY.main()
