"""How good is a policy? Whole episodes, apart from training."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from policyopt.control.environments import EnvLike
from policyopt.control.policies import Policy
from policyopt.control.rollouts import sample_episodes

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Undiscounted returns and lengths of whole episodes."""

    returns: NDArray[np.float64]
    lengths: NDArray[np.int64]

    @property
    def mean(self) -> float:
        """Mean return."""
        return float(self.returns.mean())

    @property
    def std(self) -> float:
        """Standard deviation of the return over episodes (denominator n)."""
        return float(self.returns.std())


def evaluate(
    policy: Policy,
    env: EnvLike,
    *,
    episodes: int = 20,
    deterministic: bool = True,
    seed: int = 0,
    max_steps: int = 100_000,
) -> Evaluation:
    """Measure a policy over ``episodes`` whole episodes.

    Parameters
    ----------
    policy : Policy
        Not changed.
    env : EnvLike
        An id, a factory, or a vector environment (which then decides the number of
        episodes: one per copy).
    deterministic : bool
        True takes the most probable action (the mean, for a Gaussian); False samples,
        as in training.
    seed : int
        Seeds a stream of its own: evaluation episodes are not training episodes, even
        with equal seeds.

    Raises
    ------
    ValueError
        If an episode is not over after ``max_steps``.
    """
    rollout = sample_episodes(
        policy, env, episodes=episodes, seed=seed, deterministic=deterministic,
        max_steps=max_steps,
    )  # fmt: skip
    return Evaluation(rollout.episodes.returns, rollout.episodes.lengths)
