"""The algorithms learn: CartPole and Pendulum, over seeds, to stated thresholds.

Thresholds were set from 12 seeds (5 for Pendulum): far enough below what a sound implementation reaches to hold on
another machine, far above what a broken one does (a random policy scores about 20 on CartPole and about -1200 on
Pendulum). ``benchmarks`` measures speed; here only the result counts.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest

from policyopt.control import (
    PPOConfig,
    ReinforceConfig,
    Steps,
    TrainResult,
    TRPOConfig,
    evaluate,
    train_ppo,
    train_reinforce,
    train_seeds,
    train_trpo,
)
from policyopt.losses import ClippedSurrogate, clipped_surrogate_loss

Trainer = Callable[..., TrainResult[Any, Any]]

CARTPOLE: dict[str, Callable[[str], Trainer]] = {
    "reinforce": lambda device: partial(
        train_reinforce, "CartPole-v1", ReinforceConfig(total_steps=120_000, device=device)
    ),
    "reinforce-critic": lambda device: partial(
        train_reinforce,
        "CartPole-v1",
        ReinforceConfig(total_steps=100_000, baseline="learned", device=device),
    ),
    "trpo": lambda device: partial(
        train_trpo,
        "CartPole-v1",
        TRPOConfig(total_steps=70_000, gamma=0.98, gae_lambda=0.9, kl_limit=0.02, device=device),
    ),
    "ppo": lambda device: partial(
        train_ppo,
        "CartPole-v1",
        PPOConfig(total_steps=100_000, gamma=0.98, gae_lambda=0.95, learning_rate=7e-3, device=device),
    ),
}
PENDULUM: dict[str, Callable[[str], Trainer]] = {
    "ppo": lambda device: partial(
        train_ppo,
        "Pendulum-v1",
        PPOConfig(
            total_steps=80_000,
            num_envs=8,
            rollout_steps=128,
            epochs_per_batch=10,
            minibatch_size=256,
            learning_rate=2e-3,
            gamma=0.9,
            normalize_rewards=True,
            device=device,
        ),
    ),
}


def _solve_rate(results: list[TrainResult[Any, Any]]) -> float:
    """Share of runs whose mean return over 20 training episodes in a row reached 475."""
    reached = []
    for result in results:
        returns = result.episodes.returns
        trailing = np.convolve(returns, np.ones(20) / 20, mode="valid") if len(returns) >= 20 else np.zeros(1)
        reached.append(trailing.max() >= 475)
    return float(np.mean(reached))


@pytest.mark.parametrize("algorithm", CARTPOLE)
def test_cartpole_is_solved_over_seeds(algorithm: str) -> None:
    results = train_seeds(CARTPOLE[algorithm]("cpu"), seeds=5, workers=1, progress=False)
    assert _solve_rate(results) >= 0.8, [result.history[-1].return_mean for result in results]
    final = [evaluate(result.policy, "CartPole-v1", episodes=20).mean for result in results]
    assert np.median(final) >= 450, final
    assert min(final) >= 100, final


@pytest.mark.sweep  # half a minute
@pytest.mark.parametrize("algorithm", PENDULUM)
def test_pendulum_is_swung_up(algorithm: str) -> None:
    results = train_seeds(PENDULUM[algorithm]("cpu"), seeds=3, workers=1, progress=False)
    final = [evaluate(result.policy, "Pendulum-v1", episodes=20).mean for result in results]
    # A policy that holds the pendulum up after one swing scores about -150; one that only swings, below -700.
    assert np.median(final) >= -250, final


def test_learning_fails_when_the_advantage_has_the_wrong_sign() -> None:
    # The thresholds above must be out of reach for a policy that is pushed the wrong way.
    def upside_down(steps: Steps) -> ClippedSurrogate:
        return clipped_surrogate_loss(steps.log_prob, steps.old_log_prob, -steps.advantages)

    config = PPOConfig(total_steps=20_000, gamma=0.98, device="cpu")
    result = train_ppo("CartPole-v1", config, seed=0, loss=upside_down, progress=False)
    assert result.history[-1].return_mean < 15


@pytest.mark.cuda
@pytest.mark.parametrize("algorithm", CARTPOLE)
def test_cartpole_is_solved_on_cuda(algorithm: str) -> None:
    results = [CARTPOLE[algorithm]("cuda")(seed=seed, progress=False) for seed in range(2)]
    assert all(next(r.policy.parameters()).is_cuda for r in results)
    assert _solve_rate(results) == 1.0


@pytest.mark.cuda
def test_pendulum_is_swung_up_on_cuda() -> None:
    result = PENDULUM["ppo"]("cuda")(seed=0, progress=False)
    assert evaluate(result.policy, "Pendulum-v1", episodes=20).mean >= -250
