"""CartPole with steps ten times too long: ten times the best step of ``control_race``, for each method.

What is multiplied is the length of the step: the learning rate, or the root of TRPO's limit on the KL divergence. No
learning rate is annealed. PPO's is in the race, so its best step is run again, too.

About 3 CPU seconds a run.
"""

from __future__ import annotations

from typing import Any

import control_race
from _control import measure

from policyopt.control import PPOConfig, train_ppo
from policyopt_book.studies import Study

BEST = {"REINFORCE": 2.0, "REINFORCE, critic": 4.0, "TRPO": 1.0, "PPO": 1.0}


def run(*, seed: int, method: str, times: float) -> dict[str, Any]:
    """Train once, with a step ``times`` that of the method's best runs in the race."""
    factor = BEST[method] * times
    if method != "PPO":
        return control_race.run(seed=seed, method=method, factor=factor)
    ppo = PPOConfig(
        learning_rate=3e-3 * factor,
        anneal_learning_rate=False,
        epochs_per_batch=10,
        minibatch_size=256,
        rollout_steps=64,
        gae_lambda=0.9,
        gamma=0.98,
        num_envs=16,
        total_steps=control_race.STEPS,
        device="cpu",
    )
    result = train_ppo("CartPole-v1", ppo, seed=seed, progress=False)
    return measure(result, control_race.STEPS, threshold=control_race.THRESHOLD)


STUDY = Study(
    name="control_stress",
    run=run,
    settings=[*({"method": m, "times": 10.0} for m in BEST), {"method": "PPO", "times": 1.0}],
    seeds=10,
    sample={"method": "REINFORCE", "times": 10.0},
)

if __name__ == "__main__":
    STUDY.main()
