"""Stable-Baselines3, as the studies of control measure it beside this package. Needs the extra ``bench``."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Episodes:
    """At which step each episode ended, and its return."""

    steps: NDArray[np.int64]
    returns: NDArray[np.float64]


@dataclass(frozen=True)
class Record:
    """A run of Stable-Baselines3, in the form that ``measure`` reads."""

    episodes: Episodes
    seconds: float
    stop_reason: str = "budget"


def peer(
    env: str, algorithm: str, steps: int, options: dict[str, Any], policy: dict[str, Any], *, seed: int
) -> Record:
    """Train with Stable-Baselines3, observations and rewards normalised as its zoo does here."""
    import sb3_contrib
    import stable_baselines3
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    episodes: list[tuple[int, float]] = []

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            ended = [info["episode"]["r"] for info in self.locals["infos"] if "episode" in info]
            episodes.extend((self.num_timesteps, float(value)) for value in ended)
            return True

    copies = options.get("copies", 1)
    options = {key: value for key, value in options.items() if key != "copies"}
    vector = VecNormalize(make_vec_env(env, copies, seed=seed), gamma=options["gamma"])
    kind = stable_baselines3.PPO if algorithm == "PPO" else sb3_contrib.TRPO
    model = kind("MlpPolicy", vector, seed=seed, device="cpu", policy_kwargs=policy, **options)
    start = time.perf_counter()
    model.learn(steps, callback=Watch())
    seconds = time.perf_counter() - start
    ends, returns = zip(*episodes, strict=True)
    return Record(Episodes(np.array(ends), np.array(returns)), seconds)
