"""CartPole: PPO without a critic, one episode per update, for 500 episodes and more."""

from __future__ import annotations

from typing import Any

import numpy as np

from policyopt.control import PPOConfig, train_ppo
from policyopt_book.studies import Study

EPISODES = 600


def run(*, seed: int, rate: float) -> dict[str, Any]:
    """Train for 600 episodes with the settings of a loop that has V = 0."""
    config = PPOConfig(
        total_steps=EPISODES * 500,
        num_envs=1,
        rollout_steps=None,
        use_critic=False,
        gamma=0.99,
        gae_lambda=0.95,
        epochs_per_batch=5,
        minibatch_size=32,
        learning_rate=rate,
        anneal_learning_rate=False,
        max_gradient_norm=None,
        device="cpu",
    )
    result = train_ppo(
        "CartPole-v1",
        config,
        seed=seed,
        progress=False,
        callback=lambda row: row.update >= EPISODES,
    )
    returns = np.asarray(result.episodes.returns)[:EPISODES]
    smooth = np.convolve(returns, np.ones(20) / 20, "valid")
    full = np.flatnonzero(returns >= 500)
    return {
        "curve": smooth[::20],
        "best": smooth.max(),
        "last": smooth[-1],
        "drop": 1 - smooth[-1] / smooth.max(),
        "full_episodes": len(full),
        "first_full": int(full[0]) + 1 if len(full) else None,
        "steps": int(result.episodes.steps[EPISODES - 1]),
    }


STUDY = Study(
    name="ppo_policy_only",
    run=run,
    settings=[{"rate": 1e-3}],
    seeds=6,
    minutes=True,
)

if __name__ == "__main__":
    STUDY.main()
