"""Acrobot: PPO and TRPO at a grid of step sizes, beside Stable-Baselines3 at the settings of its zoo.

Needs the extra ``bench``. The settings of the peer are those of rl-baselines3-zoo, ``hyperparams/ppo.yml`` and
``trpo.yml``, which are made for budgets of 1,000,000 and 100,000 steps; everybody gets 100,000 here. Ours are those of
the race on CartPole but for γ and λ. A return of −100 counts as solved; a run that never swings up ends at −500.

About 15 CPU seconds a run, 50 for the other package's TRPO.
"""

from __future__ import annotations

import time
from typing import Any

from _control import measure
from _peers import peer

from policyopt.control import PPOConfig, TRPOConfig, train_ppo, train_trpo
from policyopt_book.studies import Study

ENV, STEPS, SOLVED = "Acrobot-v1", 100_000, -100.0


def run(*, seed: int, algorithm: str, package: str, factor: float) -> dict[str, Any]:
    """Train once, with a step ``factor`` times the usual one; TRPO's limit grows with its square."""
    start = time.process_time()
    common: dict[str, Any] = {
        "total_steps": STEPS,
        "num_envs": 16,
        "rollout_steps": 128,
        "gamma": 0.99,
        "gae_lambda": 0.95,
        "normalize_observations": True,
        "normalize_rewards": True,
        "device": "cpu",
    }
    result: Any
    if package == "Stable-Baselines3":
        options: dict[str, Any] = {"copies": 2, "n_steps": 1024, "gamma": 0.99}
        if algorithm == "PPO":
            options = {"copies": 16, "n_steps": 256, "gamma": 0.99, "gae_lambda": 0.94, "n_epochs": 4}
        result = peer(ENV, algorithm, STEPS, options, {}, seed=seed)
    elif algorithm == "PPO":
        ppo = PPOConfig(learning_rate=3e-3 * factor, epochs_per_batch=10, minibatch_size=256, **common)
        result = train_ppo(ENV, ppo, seed=seed, progress=False)
    else:
        trpo = TRPOConfig(kl_limit=0.01 * factor**2, critic_learning_rate=3e-3, **common)
        result = train_trpo(ENV, trpo, seed=seed, progress=False)
    return {
        **measure(result, STEPS, threshold=SOLVED),
        "cpu_seconds": time.process_time() - start,
    }


STUDY = Study(
    name="acrobot",
    run=run,
    settings=[
        {"algorithm": algorithm, "package": package, "factor": factor}
        for algorithm, package, factors in (
            ("PPO", "policyopt", (0.25, 0.5, 1.0, 2.0)),
            ("TRPO", "policyopt", (0.5, 1.0, 2.0, 4.0, 8.0)),
            ("PPO", "Stable-Baselines3", (1.0,)),
            ("TRPO", "Stable-Baselines3", (1.0,)),
        )
        for factor in factors
    ],
    seeds=10,
    sample={"algorithm": "TRPO", "package": "policyopt", "factor": 4.0},
)

if __name__ == "__main__":
    STUDY.main()
