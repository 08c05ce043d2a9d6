"""REINFORCE on CartPole with each choice of weights, at three step sizes.

Every run gets 40,000 steps in updates of 16 whole episodes. What an update takes beyond that is cut off. No run adds
V at the time limit, so that the arms differ in the weights alone.

About 60 CPU seconds a seed.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from policyopt.control import ReinforceConfig, train_reinforce
from policyopt_book.plotting import align_runs
from policyopt_book.studies import Study

STEPS = 40_000


def run(*, seed: int, to_go: bool, baseline: Any, normalised: bool, rate: float) -> dict[str, Any]:
    """Train once."""
    config = ReinforceConfig(
        total_steps=STEPS, learning_rate=rate, reward_to_go=to_go, baseline=baseline,
        normalize_weights=normalised, bootstrap_truncated=False, device="cpu",
    )  # fmt: skip
    episodes = train_reinforce("CartPole-v1", config, seed=seed, progress=False).episodes
    inside = episodes.steps <= STEPS
    returns, steps = episodes.returns[inside], episodes.steps[inside]
    grid = np.linspace(0, STEPS, 41)
    curve = align_runs([steps], [returns], grid, 32)[0]
    return {
        # The height of the learning curve, averaged over the budget.
        "mean": np.average(returns, weights=episodes.lengths[inside]),
        "last": returns[-32:].mean(),
        "curve": curve,
    }


ARMS = [
    {"to_go": to_go, "baseline": baseline, "normalised": normalised}
    for normalised in (False, True)
    for to_go, baseline in (
        (False, "none"),
        (False, "mean"),
        (True, "none"),
        (True, "mean"),
        (True, "learned"),
    )
    # Normalised, "none" and "mean" are one algorithm.
    if not (normalised and baseline == "none")
]
SETTINGS = [{**arm, "rate": rate} for arm in ARMS for rate in (0.003, 0.01, 0.03)]
STUDY = Study("reinforce_baselines", run, SETTINGS, seeds=5, sample=SETTINGS[1])

if __name__ == "__main__":
    STUDY.main()
