"""What the three training loops share, on top of :mod:`policyopt.frame`: environment,
networks, random streams. No learning happens here.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from policyopt._checks import require
from policyopt.checkpoint import optimizer_slots, optimizer_tensors
from policyopt.control import environments, results
from policyopt.control.config import build_networks
from policyopt.control.environments import EnvLike, environment_seed
from policyopt.control.policies import Policy, split_mask
from policyopt.control.results import ConfigT, RowT, TrainResult
from policyopt.control.rollouts import Collector, Episodes, Rollout
from policyopt.frame import Frame
from policyopt.runs import derive_seed, resolve_device

__all__ = ["Run"]


class _RewardScaler:
    """Divide rewards by the running standard deviation of the discounted return (never
    shift them).

    While that return has not varied yet, rewards stay as they are.
    """

    def __init__(self, gamma: float, copies: int) -> None:
        self.gamma = gamma
        self.statistics = (0.0, 0.0, 0.0)
        """Mean, variance and count of the discounted returns so far."""
        self._running = np.zeros(copies)

    def __call__(self, rollout: Rollout) -> Rollout:
        rows = rollout.rewards.cpu().numpy().astype(np.float64)
        # Padding counts as an end: it must not leak into the next rollout.
        done = (rollout.terminated | rollout.truncated | ~rollout.valid).cpu().numpy()
        returns = np.empty_like(rows)
        for t, reward in enumerate(rows):
            returns[t] = self._running = self._running * self.gamma + reward
            self._running = np.where(done[t], 0.0, self._running)
        seen = returns[rollout.valid.cpu().numpy()]
        mean, variance, count = self.statistics
        total = count + len(seen)
        delta = float(seen.mean()) - mean
        spread = variance * count + float(seen.var()) * len(seen)
        spread += delta**2 * count * len(seen) / total
        mean, variance = mean + delta * len(seen) / total, spread / total
        self.statistics = (mean, variance, total)
        deviation = math.sqrt(variance)
        rewards = rollout.rewards / (deviation if deviation > 1e-8 else 1.0)
        return dataclasses.replace(rollout, rewards=rewards)

    def restart(self) -> None:
        """Forget the episodes that are under way."""
        self._running = np.zeros_like(self._running)


class Run(Frame[ConfigT, RowT]):
    """The frame of a training loop on an environment: see :class:`Frame`.

    It owns the environment's life, the networks and the random streams.
    """

    unit = "step"
    remedy = "a lower learning rate or normalize_rewards=True"
    may_change = ("total_steps", "checkpoint_every", "device", "cpu_threads", "compile")

    def __init__(
        self,
        algorithm: str,
        env: EnvLike,
        config: ConfigT,
        row_type: type[RowT],
        *,
        critic: bool,
        policy: Policy | None,
        **options: Any,
    ) -> None:
        """Prepare; ``options`` are the seed and others that a frame has."""
        name = environments.environment_name(env)
        options["checkpoint_every"] = config.checkpoint_every
        super().__init__(algorithm, name, config, row_type, **options)
        self.device = resolve_device(config.device)
        self._threads = torch.get_num_threads()
        self._optimizer: torch.optim.Optimizer | None = None
        self._episodes: list[Episodes] = []
        self._episode_count, self._last_returns = 0, list[float]()
        self.env, self._owned = environments.make_vector_env(env, config.num_envs)
        try:
            self._build(policy, critic)
        except BaseException as error:
            self._leave(error)
            raise

    def _build(self, policy: Policy | None, critic: bool) -> None:
        env, seed, name = self.env, self.seed, self.name
        self.spaces = (env.single_observation_space, env.single_action_space)
        # A generator of the CPU: the first weights do not depend on the device.
        start = torch.Generator().manual_seed(seed)
        self.policy, self.critic = build_networks(
            *self.spaces, self.config, critic=critic, generator=start, policy=policy
        )
        self._networks: Any = results.networks_of(self.policy, self.critic)
        self._networks.to(self.device)
        self._good = self._snapshot()
        self._scaler = _RewardScaler(self.config.gamma, env.num_envs)
        self.generator = torch.Generator(self.device).manual_seed(seed)
        self._collector = Collector(
            env, self.policy, self.generator, seed=environment_seed(seed), name=name
        )

    # --- the loop's interface ---

    def trainable(self) -> list[nn.Parameter]:
        """Return the parameters of the policy, then those of the critic."""
        return [p for module in self._networks.values() for p in module.parameters()]

    def adam(self, parameters: Iterable[nn.Parameter], rate: float) -> torch.optim.Adam:
        """Make the optimiser; a checkpoint holds its moments."""
        fused = self.device.type != "mps"
        adam = torch.optim.Adam(parameters, lr=rate, eps=1e-5, fused=fused)
        self._optimizer = adam
        return adam

    @property
    def position(self) -> tuple[int, int]:
        """Environment steps made, and to be made."""
        return self._collector.steps, self.config.total_steps

    @property
    def budget_used(self) -> float:
        """Share of the environment steps that are made, in [0, 1]."""
        return min(1.0, self._collector.steps / self.config.total_steps)

    def collect(self, steps: int | None) -> Rollout:
        """Collect ``steps`` rows of ``[T, N]``, or one whole episode per copy when
        ``steps`` is None.
        """
        collector = self._collector
        rollout = collector.collect(steps) if steps else collector.collect_episodes()
        while not rollout.valid.any():  # every row was a reset
            rollout = collector.collect(1)
        self._rollout = rollout  # for the encoder, once the update is made
        self._note(rollout.episodes)
        return self._scaler(rollout) if self.config.normalize_rewards else rollout

    def result(self) -> TrainResult[ConfigT, RowT]:
        """Return what was learned so far."""
        return TrainResult(
            algorithm=self.algorithm, environment=self.name, seed=self.seed,
            num_envs=self.env.num_envs, config=self.config, policy=self.policy,
            critic=self.critic, history=self.history, stop_reason=self.stop_reason,
            episodes=Episodes.concatenate(self._episodes), seconds=self.seconds,
            steps=self._collector.steps, spaces=self.spaces,
            reward_statistics=self._scaler.statistics,
        )  # fmt: skip

    # --- what the frame asks for ---

    def _common(self, **fields: Any) -> dict[str, Any]:
        mean = float(np.mean(self._last_returns)) if self._last_returns else math.nan
        counts = {"steps": self._collector.steps, "episodes": self._episode_count}
        return {**counts, "return_mean": mean, **fields}

    def _note(self, episodes: Episodes) -> None:
        self._episodes.append(episodes)
        self._episode_count += len(episodes)
        self._last_returns = [*self._last_returns, *episodes.returns.tolist()][-20:]

    def _recorded(self) -> None:
        if not bool(torch.isfinite(nn.utils.get_total_norm(self.trainable()))):
            raise FloatingPointError("parameters not finite")
        self._good = self._snapshot()
        seen, _ = split_mask(self._rollout.observations)
        for encoder in {network.encoder for network in self._networks.values()}:
            encoder.update(self._rollout.flat(seen))

    def _revert(self, error: BaseException) -> bool:
        # An update that broke off counts for nothing, so that policy and history agree.
        with torch.no_grad():
            for parameter, good in zip(self.trainable(), self._good, strict=True):
                parameter.copy_(good)
        return True

    def _enter(self) -> None:
        torch.set_num_threads(self.config.cpu_threads)
        if self.config.compile:
            for network in self._networks.values():
                # The inner network, where there is one: the distribution around it is
                # plain Python.
                getattr(network, "network", network).compile()
        if self.update:
            self._saved()

    def _leave(self, error: BaseException | None) -> None:
        torch.set_num_threads(self._threads)
        if self._owned:
            self.env.close()

    # --- checkpoints ---

    def _identity(self) -> dict[str, Any]:
        return results.identity_of(self.result())

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, state = results.parts_of(self.result())
        if self.unfinished:
            state["stop_reason"] = "unfinished"
        state["task"] = environments.describe(self.env)
        if self._optimizer is not None:
            tensors |= optimizer_tensors(self._optimizer)
        return tensors, state

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        theirs, ours = state.get("task"), environments.describe(self.env)
        require(theirs in (None, ours), f"in this folder env must be {theirs}", ours)
        results.load_networks(self._networks, tensors)
        self._good = self._snapshot()
        if self._optimizer is not None:
            slots = optimizer_slots(tensors)
            if not slots:
                raise ValueError(
                    "it is a saved result, without the optimiser's state; start from "
                    "it with policy= and another folder"
                )
            saved = self._optimizer.state_dict() | {"state": slots}
            self._optimizer.load_state_dict(saved)
        self._scaler.statistics = tuple(state["reward_statistics"])
        self._note(results.episodes_of(tensors))
        self._collector.steps = state["steps"]

    def _saved(self) -> None:
        # Neither an environment nor a generator in use can be saved everywhere. So all
        # that is random begins afresh here, in the run that wrote the checkpoint and in
        # the one that goes on from it alike.
        fresh = derive_seed(self.seed, self.update)
        self.generator.manual_seed(fresh)
        self._collector.reset(environment_seed(fresh))
        self._scaler.restart()

    def _snapshot(self) -> list[Tensor]:
        return [p.detach().clone() for p in self.trainable()]
