"""What the three training loops share: set-up, bookkeeping, interruption. No learning
happens here.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
from typing import Any, Generic, NamedTuple, Self

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor, nn
from tqdm import tqdm

from policyopt.control.config import ActorCriticConfig, build_critic, build_networks
from policyopt.control.environments import (
    EnvLike,
    environment_name,
    environment_seed,
    make_vector_env,
)
from policyopt.control.policies import Critic, Policy
from policyopt.control.results import ConfigT, RowT, TrainResult
from policyopt.control.rollouts import Collector, Episodes, Rollout
from policyopt.estimators import explained_variance, gae, normalize
from policyopt.runs import History, TrainingDivergedError, resolve_device

__all__ = ["Advantages", "Callback", "Run", "estimate_advantages", "minibatches"]

Callback = Callable[[Any], bool | None]
"""Called with every :class:`Update`; a true return value stops the training."""


class Advantages(NamedTuple):
    """Result of :func:`estimate_advantages`; the tensors hold the ``B`` valid rows of
    the rollout.
    """

    advantages: Tensor
    targets: Tensor
    """Regression targets of the value function: unnormalised advantage + V, ``[B]``."""
    values: Tensor
    """V at collection time, ``[B]``."""
    explained_variance: float
    """Of the targets by V; NaN without a critic."""


def estimate_advantages(
    rollout: Rollout,
    critic: Callable[[Tensor], Tensor] | None,
    config: ActorCriticConfig,
) -> Advantages:
    """Turn a rollout into advantages by GAE; without a critic V = 0."""
    if critic is None:
        values = next_values = torch.zeros_like(rollout.rewards)
    else:
        values, next_values = rollout.evaluate(critic)
    ended = (
        rollout.terminated
        if config.bootstrap_truncated
        else rollout.terminated | rollout.truncated
    )
    advantages = gae(
        rollout.rewards,
        values,
        next_values,
        ended,
        rollout.truncated,
        gamma=config.gamma,
        gae_lambda=config.gae_lambda,
    )
    flat, targets = rollout.flat(advantages), rollout.flat(advantages + values)
    explained = (
        math.nan
        if critic is None
        else explained_variance(rollout.flat(values), targets).item()
    )
    return Advantages(
        normalize(flat) if config.normalize_advantages else flat,
        targets,
        rollout.flat(values),
        explained,
    )


def minibatches(
    size: int, minibatch: int, generator: torch.Generator
) -> Iterator[Tensor]:
    """Yield index tensors that cut 0 … ``size`` − 1, shuffled, into near-equal pieces
    of at most ``minibatch``.

    Near-equal, because a small leftover batch would count as much as a full one in the
    mean that is descended.
    """
    order = torch.randperm(size, generator=generator, device=generator.device)
    yield from order.tensor_split(math.ceil(size / minibatch))


class _RewardScaler:
    """Divide rewards by the running standard deviation of the discounted return (never
    shift them).

    While that return has not varied yet, rewards stay as they are.
    """

    def __init__(
        self, gamma: float, copies: int, statistics: tuple[float, float, float]
    ) -> None:
        self.gamma = gamma
        self.mean, self.variance, self.count = statistics
        self._running = np.zeros(copies)

    def __call__(self, rollout: Rollout) -> Rollout:
        rewards = rollout.rewards.cpu().numpy().astype(np.float64)
        # Padding counts as an end: it must not leak into the next rollout.
        done = (rollout.terminated | rollout.truncated | ~rollout.valid).cpu().numpy()
        returns = np.empty_like(rewards)
        for t, reward in enumerate(rewards):
            returns[t] = self._running = self._running * self.gamma + reward
            self._running = np.where(done[t], 0.0, self._running)
        seen = returns[rollout.valid.cpu().numpy()]
        total = self.count + len(seen)
        delta = seen.mean() - self.mean
        spread = self.variance * self.count + seen.var() * len(seen)
        spread += delta**2 * self.count * len(seen) / total
        self.mean += delta * len(seen) / total
        self.variance, self.count = spread / total, float(total)
        deviation = math.sqrt(self.variance)
        return dataclasses.replace(
            rollout, rewards=rollout.rewards / (deviation if deviation > 1e-8 else 1.0)
        )

    @property
    def statistics(self) -> tuple[float, float, float]:
        return float(self.mean), float(self.variance), self.count


class Run(Generic[ConfigT, RowT]):
    """The frame of a training loop.

    A trainer makes one, loops inside ``with run:`` while :attr:`unfinished`, calls
    :meth:`collect` and :meth:`log` once per update, and returns :meth:`result`. The
    frame owns the environment's life, the random streams, the record, and the ways in
    which a run can end early.
    """

    def __init__(
        self,
        algorithm: str,
        env: EnvLike,
        config: ConfigT,
        *,
        seed: int,
        critic: bool,
        policy: Policy | None,
        resume: TrainResult[ConfigT, RowT] | None,
        callback: Callback | None,
        progress: bool,
    ) -> None:
        if not isinstance(seed, (int, np.integer)) or seed < 0:
            raise ValueError(f"seed must be an integer >= 0, got {seed!r}")
        seed = int(seed)
        self.algorithm, self.config, self.seed, self.callback = (
            algorithm,
            config,
            seed,
            callback,
        )
        self.device = resolve_device(config.device)
        self.name = environment_name(env)
        self.env: VectorEnv[Any, Any, Any]
        self.env, self._owned = make_vector_env(env, config.num_envs)
        self.spaces = (self.env.single_observation_space, self.env.single_action_space)
        try:
            self._set_up(seed, critic, policy, resume, progress)
        except BaseException:
            self._close()
            raise

    def _set_up(
        self,
        seed: int,
        critic: bool,
        policy: Policy | None,
        resume: TrainResult[ConfigT, RowT] | None,
        progress: bool,
    ) -> None:
        config = self.config
        # A CPU generator starts the weights, so they do not depend on the device.
        start_weights = torch.Generator().manual_seed(seed)
        self.policy: Policy
        self.critic: Critic | None
        if policy is None:
            self.policy, self.critic = build_networks(
                *self.spaces, config, critic=critic, generator=start_weights
            )
        else:
            self.policy = policy
            self.critic = (
                build_critic(policy.encoder, config, generator=start_weights)
                if critic
                else None
            )
        self.history: History[RowT] = History()
        self._episodes: list[Episodes] = []
        self.stop_reason = "budget"
        self._resumed_optimizer: dict[str, Any] = {}
        statistics = (0.0, 0.0, 0.0)
        start = 0
        if resume is not None:
            self._check_resumable(resume)
            self.policy.load_state_dict(resume.policy.state_dict())
            if self.critic is not None and resume.critic is not None:
                self.critic.load_state_dict(resume.critic.state_dict())
            self.history.extend(resume.history)
            self._episodes.append(resume.episodes)
            self._resumed_optimizer = resume.optimizer_state
            statistics, start = resume.reward_statistics, resume.steps
        for module in self._networks():
            module.to(self.device)
            if config.compile:
                # The inner network, where there is one: the distribution around it is
                # plain Python.
                getattr(module, "network", module).compile()
        # A resumed run continues with fresh random streams, not with those it has
        # already used.
        fresh = environment_seed(seed, 3 + start) if start else seed
        self.generator = torch.Generator(self.device).manual_seed(fresh)
        self._collector = Collector(
            self.env,
            self.policy,
            self.generator,
            seed=environment_seed(fresh),
            name=self.name,
        )
        self._collector.steps = start
        self._first_step = start
        self._scaler = (
            _RewardScaler(config.gamma, self.env.num_envs, statistics)
            if config.normalize_rewards
            else None
        )
        self._last_returns: list[float] = (
            [] if resume is None else list(resume.episodes.returns[-20:])
        )
        self._episode_count = 0 if resume is None else len(resume.episodes)
        self._rollout: Rollout | None = None
        self._good = self._snapshot()
        self._stopped = False
        self._progress = progress
        self._optimizer: torch.optim.Optimizer | None = None
        self._started = time.perf_counter()

    def _check_resumable(self, resume: TrainResult[ConfigT, RowT]) -> None:
        if resume.algorithm != self.algorithm:
            raise ValueError(
                f"resume must be a {self.algorithm} run, got a {resume.algorithm} run"
            )
        if resume.spaces != self.spaces:
            raise ValueError(
                f"resume was trained on spaces {resume.spaces}, but {self.name} has "
                f"{self.spaces}"
            )
        for name in ("hidden", "activation"):
            theirs, ours = getattr(resume.config, name), getattr(self.config, name)
            if theirs != ours:
                raise ValueError(f"resume has {name}={theirs!r}, the config {ours!r}")
        if resume.policy.encoder.normalize != self.policy.encoder.normalize:
            raise ValueError("resume and the config differ in normalize_observations")
        if (resume.critic is None) != (self.critic is None):
            raise ValueError(
                "resume must have a critic exactly when the config asks for one"
            )

    # --- the loop's interface
    # -------------------------------------------------------------------------------

    def trainable(self) -> list[nn.Parameter]:
        """Return the parameters of the policy, then those of the critic."""
        return [p for module in self._networks() for p in module.parameters()]

    def adam(
        self, parameters: Sequence[nn.Parameter], learning_rate: float
    ) -> torch.optim.Adam:
        """Make the optimiser, with the resumed state if there is one to restore."""
        optimizer = torch.optim.Adam(
            parameters, lr=learning_rate, eps=1e-5, fused=self.device.type != "mps"
        )
        if self._resumed_optimizer:
            # The moments only, and a copy of them; the step size is this config's.
            moments = copy.deepcopy(self._resumed_optimizer["state"])
            optimizer.load_state_dict({**optimizer.state_dict(), "state": moments})
        self._optimizer = optimizer
        return optimizer

    @property
    def steps(self) -> int:
        """Environment steps so far."""
        return self._collector.steps

    @property
    def unfinished(self) -> bool:
        """Whether the budget is not used up."""
        return not self._stopped and self.steps < self.config.total_steps

    @property
    def progress(self) -> float:
        """Share of the budget that is used, in [0, 1]."""
        return min(1.0, self.steps / self.config.total_steps)

    def collect(self, steps: int | None) -> Rollout:
        """Collect ``steps`` rows of ``[T, N]``, or one whole episode per copy when
        ``steps`` is None.
        """
        rollout = (
            self._collector.collect_episodes()
            if steps is None
            else self._collector.collect(steps)
        )
        self._rollout = rollout
        self._episodes.append(rollout.episodes)
        self._episode_count += len(rollout.episodes)
        self._last_returns = (self._last_returns + rollout.episodes.returns.tolist())[
            -20:
        ]
        return rollout if self._scaler is None else self._scaler(rollout)

    def next_row(self) -> dict[str, Any]:
        """Return the fields of :class:`Update` for the row about to be logged."""
        return {
            "update": len(self.history) + 1,
            "steps": self.steps,
            "episodes": self._episode_count,
            "return_mean": float(np.mean(self._last_returns))
            if self._last_returns
            else math.nan,
        }

    def log(self, row: RowT) -> None:
        """Record an update; stop on divergence or when the callback says so."""
        bad = [
            f.name
            for f in dataclasses.fields(row)
            # Undefined before the first episode, and for targets that do not vary: no
            # sign of divergence.
            if f.name not in ("return_mean", "explained_variance")
            and isinstance(value := getattr(row, f.name), float)
            and not math.isfinite(value)
        ]
        if not bool(torch.isfinite(torch.nn.utils.get_total_norm(self.trainable()))):
            bad.append("parameters")
        if bad:
            raise FloatingPointError(
                f"{', '.join(bad)} not finite in update {row.update}"
            )
        self._good = self._snapshot()
        if self._rollout is not None:
            self.policy.encoder.update(self._rollout.flat(self._rollout.observations))
        self.history.append(row)
        if self._bar is not None:
            self._bar.update(min(self.steps, self.config.total_steps) - self._bar.n)
            self._bar.set_postfix(return_mean=f"{row.return_mean:.1f}", refresh=False)
        if self.callback is not None and self.callback(row):
            self.stop_reason, self._stopped = "callback", True

    def result(self) -> TrainResult[ConfigT, RowT]:
        """Return what was learned so far."""
        state = {} if self._optimizer is None else self._optimizer.state_dict()
        return TrainResult(
            algorithm=self.algorithm,
            environment=self.name,
            seed=self.seed,
            config=self.config,
            policy=self.policy,
            critic=self.critic,
            optimizer_state=state,
            history=self.history,
            episodes=Episodes.concatenate(self._episodes),
            stop_reason=self.stop_reason,
            seconds=time.perf_counter() - self._started,
            steps=self.steps,
            spaces=self.spaces,
            reward_statistics=(0.0, 0.0, 0.0)
            if self._scaler is None
            else self._scaler.statistics,
        )

    # --- how it ends ---
    # ----------------------

    _bar: tqdm[Any] | None = None

    def __enter__(self) -> Self:
        self._threads = torch.get_num_threads()
        torch.set_num_threads(self.config.cpu_threads)
        if self._progress:
            self._bar = tqdm(
                total=self.config.total_steps,
                initial=self._first_step,
                desc=f"{self.algorithm} {self.name} seed {self.seed}",
                unit="step",
                unit_scale=True,
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        torch.set_num_threads(self._threads)
        self._close()
        if error is None:
            return False
        # An update that broke off counts for nothing, so that policy and history agree.
        self._restore(self._good)
        if isinstance(error, KeyboardInterrupt):
            self.stop_reason = "interrupted"
            warnings.warn(
                f"{self.algorithm} interrupted after {self.steps} of "
                f"{self.config.total_steps} steps; returning what was learned so far",
                stacklevel=3,
            )
            return True
        self.stop_reason = f"{type(error).__name__}: {error}"
        if isinstance(error, FloatingPointError):
            self._optimizer = None  # its moments are no longer finite either
            raise TrainingDivergedError(
                f"{error} (seed {self.seed}, {self.steps} steps). The exception's "
                f".result holds the policy of update {len(self.history)}, the last "
                "good one. Try a lower learning rate or normalize_rewards=True.",
                self.result(),
            ) from error
        # Whatever else broke (usually the environment), what was learned must not be
        # lost with it.
        error.__dict__["result"] = self.result()
        error.add_note("The policy trained so far is in this exception's .result")
        return False

    def _networks(self) -> list[nn.Module]:
        return [self.policy] if self.critic is None else [self.policy, self.critic]

    def _close(self) -> None:
        if self._bar is not None:
            self._bar.close()
        if self._owned:
            self.env.close()

    def _snapshot(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.trainable()]

    @torch.no_grad()
    def _restore(self, snapshot: list[Tensor]) -> None:
        for parameter, good in zip(self.trainable(), snapshot, strict=True):
            parameter.copy_(good)
