"""CartPole with steps ten times too long: ten times the best step of ``control_race``, for each method.

What is multiplied is the length of the step: the learning rate, or the root of TRPO's limit on the KL divergence. No
learning rate is annealed (PPO's is in the race).

About 2 CPU seconds a run.
"""

from __future__ import annotations

from typing import Any

import control_race
from _control import measure

from policyopt_book.studies import Study

STEPS = 20_000
BEST = {"REINFORCE": 2.0, "REINFORCE, critic": 4.0, "TRPO": 1.0, "PPO": 1.0}


def run(*, seed: int, method: str, times: float) -> dict[str, Any]:
    """Train once, with a step ``times`` that of the method's best runs in the race."""
    factor = BEST[method] * times
    result = control_race.train(seed=seed, method=method, factor=factor, steps=STEPS, anneal=False)
    return measure(result, STEPS, threshold=control_race.THRESHOLD)


STUDY = Study(
    name="control_stress",
    run=run,
    settings=[{"method": method, "times": 10.0} for method in BEST],
    seeds=10,
    sample={"method": "REINFORCE", "times": 10.0},
)

if __name__ == "__main__":
    STUDY.main()
