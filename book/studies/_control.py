"""What the studies of the first half measure of a run."""

from __future__ import annotations

from typing import Any

import numpy as np

from policyopt_book.plotting import align_runs


def measure(result: Any, budget: int, *, points: int = 20, threshold: float | None = None) -> dict[str, Any]:
    """Measure the returns of a run up to ``budget`` environment steps, however many it took.

    ``curve`` is the mean return of the last 20 episodes at ``points`` equally spaced steps, null before the first
    episode has ended; ``last`` its end; ``mean`` its mean over the budget; ``drop`` how far ``last`` is below the best
    of the curve, as a share of it; ``steps_to_threshold`` the first step at which it reached ``threshold``.
    """
    steps, returns = result.episodes.steps, result.episodes.returns
    fine = np.linspace(budget / 200, budget, 200)
    curve = align_runs([steps], [returns], fine)[0]
    reached = fine[curve >= threshold] if threshold is not None else []
    best = np.nanmax(curve)
    return {
        "curve": curve[200 // points - 1 :: 200 // points],
        "last": curve[-1],
        "mean": np.nanmean(curve),
        "drop": (best - curve[-1]) / abs(best),
        "steps_to_threshold": reached[0] if len(reached) else None,
        "stopped_early": int(result.stop_reason != "budget"),
        "seconds": result.seconds,
    }
