"""What the three training loops share: set-up, bookkeeping, interruption, results. No learning happens here."""

from __future__ import annotations

import copy
import csv
import dataclasses
import importlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType, UnionType
from typing import Any, Generic, Literal, NamedTuple, Self, TypeVar, get_args, get_origin, get_type_hints

import gymnasium as gym
import numpy as np
import torch
from gymnasium.vector import VectorEnv
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from policyopt.checkpoint import load_checkpoint, save_checkpoint
from policyopt.control.environments import (
    EnvLike,
    environment_name,
    environment_seed,
    make_vector_env,
)
from policyopt.control.policies import Critic, Policy, make_policy
from policyopt.control.rollouts import Collector, Episodes, Rollout
from policyopt.estimators import explained_variance, gae, normalize

__all__ = [
    "Callback",
    "ControlConfig",
    "History",
    "TrainResult",
    "TrainingDivergedError",
    "Update",
    "resolve_device",
]


@dataclass(frozen=True, kw_only=True)
class ControlConfig:
    """Settings that every control algorithm has. Frozen: use ``dataclasses.replace`` to change one."""

    total_steps: int = 100_000
    """Environment steps to train for, over all copies. Training ends after the update that reaches it."""
    num_envs: int = 32
    """Copies of the environment, side by side."""
    gamma: float = 0.99
    """Discount γ per step, in [0, 1]."""
    hidden: tuple[int, ...] = (64, 64)
    """Width of each hidden layer, policy and critic alike."""
    activation: Literal["tanh", "relu"] = "tanh"
    orthogonal_init: bool = True
    """Orthogonal weights, output gain 0.01 (policy) and 1 (critic); False is PyTorch's default."""
    normalize_observations: bool | None = None
    """Running normalisation of Box observations; None means: when the actions are continuous."""
    normalize_rewards: bool = False
    """Divide rewards by the running standard deviation of the discounted return, so that values are of order 1."""
    initial_log_std: float = 0.0
    """Initial log σ of a Gaussian policy, on the scale where the action bounds are ±1."""
    device: str = "auto"
    """"auto" takes cuda, then mps, then cpu; or any PyTorch device name."""
    cpu_threads: int = 1
    """CPU threads that PyTorch may use while training. Networks this small are fastest with one: a second thread
    waits more than it works, and the last digits of the results would depend on the number of cores."""
    compile: bool = False
    """torch.compile the networks. It pays for large networks on a GPU, hardly for small ones on a CPU."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self)).items():
            allowed = getattr(hint, "__name__", str(hint)) if isinstance(hint, type) else str(hint)
            allowed = allowed.removeprefix("typing.").replace("float", "finite float")
            self._check(name, _fits(getattr(self, name), hint), allowed)
        self._check("total_steps", self.total_steps >= 1, ">= 1")
        self._check("num_envs", self.num_envs >= 1, ">= 1")
        self._check("cpu_threads", self.cpu_threads >= 1, ">= 1")
        self._check("gamma", 0 <= self.gamma <= 1, "in [0, 1]")
        self._check("hidden", all(width >= 1 for width in self.hidden), "a tuple of widths >= 1")

    def _check(self, name: str, ok: bool, allowed: str) -> None:
        if not ok:
            raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is what a config's annotation says; an int will do for a float, NaN and infinity will not."""
    origin, options = get_origin(hint), get_args(hint)
    if origin is UnionType:
        return any(_fits(value, option) for option in options)
    if origin is Literal:
        return value in options
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(item, options[0]) for item in value)
    if hint is float:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    return isinstance(value, hint) and (hint is bool or not isinstance(value, bool))


@dataclass(frozen=True, kw_only=True)
class ActorCriticConfig(ControlConfig):
    """Settings that TRPO and PPO have in common: how a batch is collected and its advantages estimated."""

    rollout_steps: int | None = 64
    """Steps per copy and update; None runs one whole episode per copy instead."""
    gae_lambda: float = 0.95
    """λ of the advantage estimate, in [0, 1]."""
    use_critic: bool = True
    """False takes V = 0, so that the advantage is a λ-discounted sum of rewards. It needs whole episodes
    (``rollout_steps=None``): without V nothing stands for the rewards after a cut."""
    normalize_advantages: bool = True
    """Shift and scale advantages to mean 0 and standard deviation 1 over the batch."""
    bootstrap_truncated: bool = True
    """False treats a time limit as a terminal state: a common mistake, kept to be measured."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("rollout_steps", self.rollout_steps is None or self.rollout_steps >= 1, ">= 1 or None")
        self._check("gae_lambda", 0 <= self.gae_lambda <= 1, "in [0, 1]")
        self._check(
            "use_critic", self.use_critic or self.rollout_steps is None, "True unless rollout_steps is None"
        )


@dataclass(frozen=True, kw_only=True)
class Update:
    """One row of the history: what every algorithm reports after an update."""

    update: int
    """Number of the update, from 1."""
    steps: int
    """Environment steps so far."""
    episodes: int
    """Episodes finished so far."""
    return_mean: float
    """Mean undiscounted return of the last 20 finished episodes (NaN before the first)."""


RowT = TypeVar("RowT", bound=Update)
ConfigT = TypeVar("ConfigT", bound=ControlConfig)

Callback = Callable[[Any], bool | None]
"""Called with every :class:`Update`; a true return value stops the training."""


class History(list[RowT]):
    """The rows of a run, one per update; a list with columns."""

    def column(self, name: str) -> NDArray[Any]:
        """Return one field of every row.

        Raises
        ------
        ValueError
            If the rows have no such field.
        """
        if self and name not in (names := [f.name for f in dataclasses.fields(self[0])]):
            raise ValueError(f"name must be one of {names}, got {name!r}")
        return np.array([getattr(row, name) for row in self])

    def table(self) -> dict[str, NDArray[Any]]:
        """Return all columns by name, ready for ``pandas.DataFrame``."""
        return {f.name: self.column(f.name) for f in dataclasses.fields(self[0])} if self else {}

    def to_csv(self, path: str | Path) -> None:
        """Write the table with a header line."""
        table = self.table()
        with Path(path).open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(table)
            writer.writerows(zip(*(column.tolist() for column in table.values()), strict=True))


class TrainingDivergedError(FloatingPointError):
    """A parameter or statistic became NaN or infinite; ``result`` holds the last good policy."""

    def __init__(self, message: str, result: TrainResult[Any, Any]) -> None:
        super().__init__(message)
        self.result = result


@dataclass
class TrainResult(Generic[ConfigT, RowT]):
    """What a training run leaves behind."""

    algorithm: str
    """"reinforce", "trpo" or "ppo"."""
    environment: str
    seed: int
    config: ConfigT
    policy: Policy
    critic: Critic | None
    optimizer_state: dict[str, Any]
    """State of the Adam optimiser, for resuming."""
    history: History[RowT]
    episodes: Episodes
    stop_reason: str
    """"budget", "callback", "interrupted", or what went wrong."""
    seconds: float
    """Wall-clock time of the training."""
    steps: int
    spaces: tuple[Any, Any] = field(repr=False)
    """Observation and action space of one environment."""
    reward_statistics: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """Running (mean, variance, count) of the discounted return, when rewards are normalised."""

    def save(self, folder: str | Path) -> Path:
        """Write weights and optimiser state (safetensors) and all the rest (JSON), atomically; return the folder.

        Raises
        ------
        ValueError
            If the policy is of your own making: only its ``state_dict`` could be saved, not how to rebuild it.
        """
        rebuilt, _ = build_networks(*self.spaces, self.config, critic=False, generator=torch.Generator())
        if _structure(self.policy) != _structure(rebuilt):
            raise ValueError(
                "policy must be the one that the config describes to be saved whole, got a "
                f"{type(self.policy).__name__} of another structure; save its state_dict() with "
                "safetensors.torch.save_file instead"
            )
        tensors = {f"policy.{k}": v for k, v in self.policy.state_dict().items()}
        if self.critic is not None:
            tensors |= {f"critic.{k}": v for k, v in self.critic.state_dict().items()}
        state = self.optimizer_state
        for index, slot in state.get("state", {}).items():
            tensors |= {f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in slot.items()}
        for name, column in self.episodes.table().items():
            tensors[f"episodes.{name}"] = torch.from_numpy(column)
        metadata = {
            "format": 1,
            "algorithm": self.algorithm,
            "environment": self.environment,
            "seed": self.seed,
            "config": dataclasses.asdict(self.config),
            "has_critic": self.critic is not None,
            "optimizer_groups": state.get("param_groups", []),
            "history": [dataclasses.asdict(row) for row in self.history],
            "stop_reason": self.stop_reason,
            "seconds": self.seconds,
            "steps": self.steps,
            "spaces": [_space_to_json(space) for space in self.spaces],
            "reward_statistics": list(self.reward_statistics),
        }
        return save_checkpoint(folder, tensors, metadata)

    @staticmethod
    def load(folder: str | Path) -> TrainResult[Any, Any]:
        """Read what :meth:`save` wrote. The policy is on the CPU; move it with ``.to(device)``."""
        tensors, meta = load_checkpoint(folder)
        if meta.get("format") != 1:
            raise ValueError(f"{folder} has format {meta.get('format')!r}, this version reads format 1")
        config_type, row_type = _algorithm_types(meta["algorithm"])
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in meta["config"].items()
        }
        config = config_type(**fields)
        observation_space, action_space = (_space_from_json(s) for s in meta["spaces"])
        policy, critic = build_networks(
            observation_space, action_space, config, critic=meta["has_critic"], generator=torch.Generator()
        )
        policy.load_state_dict(_strip(tensors, "policy."))
        if critic is not None:
            critic.load_state_dict(_strip(tensors, "critic."))
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in _strip(tensors, "optimizer.").items():
            index, _, name = key.partition(".")
            slots.setdefault(int(index), {})[name] = value
        episodes = _strip(tensors, "episodes.")
        return TrainResult(
            algorithm=meta["algorithm"],
            environment=meta["environment"],
            seed=meta["seed"],
            config=config,
            policy=policy,
            critic=critic,
            optimizer_state={"state": slots, "param_groups": meta["optimizer_groups"]} if slots else {},
            history=History(row_type(**row) for row in meta["history"]),
            episodes=Episodes(*(episodes[k].numpy() for k in ("steps", "return", "length"))),
            stop_reason=meta["stop_reason"],
            seconds=meta["seconds"],
            steps=meta["steps"],
            spaces=(observation_space, action_space),
            reward_statistics=tuple(meta["reward_statistics"]),
        )


def _structure(module: nn.Module) -> tuple[Any, ...]:
    return type(module), str(module), {name: tensor.shape for name, tensor in module.state_dict().items()}


def _strip(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}


def _algorithm_types(algorithm: str) -> tuple[type[ControlConfig], type[Update]]:
    names = {
        "reinforce": ("ReinforceConfig", "ReinforceUpdate"),
        "trpo": ("TRPOConfig", "TRPOUpdate"),
        "ppo": ("PPOConfig", "PPOUpdate"),
    }
    if algorithm not in names:
        raise ValueError(f"algorithm must be one of {sorted(names)}, got {algorithm!r}")
    # Looked up late: the algorithms' modules import this one.
    module = importlib.import_module(f"policyopt.control.{algorithm}")
    config, row = names[algorithm]
    return getattr(module, config), getattr(module, row)


def _space_to_json(space: gym.Space[Any]) -> dict[str, Any]:
    if isinstance(space, gym.spaces.Discrete):
        return {"type": "Discrete", "n": int(space.n), "start": int(space.start)}
    assert isinstance(space, gym.spaces.Box)
    return {
        "type": "Box",
        # JSON has no infinity: bounds travel as text.
        "low": [str(v) for v in space.low.flatten()],
        "high": [str(v) for v in space.high.flatten()],
        "shape": list(space.shape),
        "dtype": str(space.dtype),
    }


def _space_from_json(data: Mapping[str, Any]) -> gym.Space[Any]:
    if data["type"] == "Discrete":
        return gym.spaces.Discrete(data["n"], start=data["start"])
    dtype = np.dtype(data["dtype"])
    low, high = (
        np.array([float(v) for v in data[k]]).astype(dtype).reshape(data["shape"]) for k in ("low", "high")
    )
    return gym.spaces.Box(low, high, dtype=dtype.type)


def resolve_device(name: str) -> torch.device:
    """Return the device for a config's ``device`` field; ``"auto"`` takes cuda, then mps, then cpu.

    Raises
    ------
    ValueError
        If PyTorch does not know the name, or the machine does not have the device.
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise ValueError(
            f"device must be 'auto' or a device that this machine has (such as 'cpu'), got {name!r}: "
            f"{str(error).splitlines()[0]}"
        ) from error
    return device


def build_networks(
    observation_space: gym.Space[Any],
    action_space: gym.Space[Any],
    config: ControlConfig,
    *,
    critic: bool,
    generator: torch.Generator,
) -> tuple[Policy, Critic | None]:
    """Build the policy and, on request, the critic that a config describes (on the CPU)."""
    continuous = isinstance(action_space, gym.spaces.Box)
    normalize = config.normalize_observations
    policy = make_policy(
        observation_space,
        action_space,
        hidden=config.hidden,
        activation=config.activation,
        normalize_observations=continuous if normalize is None else normalize,
        orthogonal=config.orthogonal_init,
        log_std=config.initial_log_std,
        generator=generator,
    )
    if not critic:
        return policy, None
    return policy, Critic(
        policy.encoder,
        hidden=config.hidden,
        activation=config.activation,
        orthogonal=config.orthogonal_init,
        generator=generator,
    )


class Advantages(NamedTuple):
    """Result of :func:`estimate_advantages`; the tensors hold the ``B`` valid rows of the rollout."""

    advantages: Tensor
    targets: Tensor
    """Regression targets of the value function: unnormalised advantage + V, ``[B]``."""
    values: Tensor
    """V at collection time, ``[B]``."""
    explained_variance: float
    """Of the targets by V; NaN without a critic."""


def estimate_advantages(
    rollout: Rollout, critic: Callable[[Tensor], Tensor] | None, config: ActorCriticConfig
) -> Advantages:
    """Turn a rollout into advantages by GAE; without a critic V = 0."""
    if critic is None:
        values = next_values = torch.zeros_like(rollout.rewards)
    else:
        values, next_values = rollout.evaluate(critic)
    ended = rollout.terminated if config.bootstrap_truncated else rollout.terminated | rollout.truncated
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
    explained = math.nan if critic is None else explained_variance(rollout.flat(values), targets).item()
    return Advantages(
        normalize(flat) if config.normalize_advantages else flat, targets, rollout.flat(values), explained
    )


def minibatches(size: int, minibatch: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Yield index tensors that cut 0 … ``size`` − 1, shuffled, into near-equal pieces of at most ``minibatch``.

    Near-equal, because a small leftover batch would count as much as a full one in the mean that is descended.
    """
    order = torch.randperm(size, generator=generator, device=generator.device)
    yield from order.tensor_split(math.ceil(size / minibatch))


class _RewardScaler:
    """Divide rewards by the running standard deviation of the discounted return (never shift them).

    While that return has not varied yet, rewards stay as they are.
    """

    def __init__(self, gamma: float, copies: int, statistics: tuple[float, float, float]) -> None:
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

    A trainer makes one, loops inside ``with run:`` while :attr:`unfinished`, calls :meth:`collect` and :meth:`log`
    once per update, and returns :meth:`result`. The frame owns the
    environment's life, the random streams, the record, and the ways in which a run can end early.
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
        self.algorithm, self.config, self.seed, self.callback = algorithm, config, seed, callback
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
        # One CPU generator starts the weights, so they do not depend on the device.
        built, self.critic = (
            build_networks(*self.spaces, config, critic=critic, generator=torch.Generator().manual_seed(seed))
            if policy is None
            else (policy, self._critic_for(policy, seed) if critic else None)
        )
        self.policy: Policy = built
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
        for module in (self.policy,) if self.critic is None else (self.policy, self.critic):
            module.to(self.device)
            if config.compile:
                # The inner network, where there is one: the distribution around it is plain Python.
                getattr(module, "network", module).compile()
        # A resumed run continues with fresh random streams, not with those it has already used.
        fresh = environment_seed(seed, 3 + start) if start else seed
        self.generator = torch.Generator(self.device).manual_seed(fresh)
        self._collector = Collector(
            self.env, self.policy, self.generator, seed=environment_seed(fresh), name=self.name
        )
        self._collector.steps = start
        self._first_step = start
        self._scaler = (
            _RewardScaler(config.gamma, self.env.num_envs, statistics) if config.normalize_rewards else None
        )
        self._last_returns: list[float] = [] if resume is None else list(resume.episodes.returns[-20:])
        self._episode_count = 0 if resume is None else len(resume.episodes)
        self._rollout: Rollout | None = None
        self._good = self._snapshot()
        self._stopped = False
        self._progress = progress
        self._threads = torch.get_num_threads()
        self._optimizer: torch.optim.Optimizer | None = None
        self._started = time.perf_counter()

    def _critic_for(self, policy: Policy, seed: int) -> Critic:
        config = self.config
        return Critic(
            policy.encoder,
            hidden=config.hidden,
            activation=config.activation,
            orthogonal=config.orthogonal_init,
            generator=torch.Generator().manual_seed(seed),
        )

    def _check_resumable(self, resume: TrainResult[ConfigT, RowT]) -> None:
        if resume.algorithm != self.algorithm:
            raise ValueError(f"resume must be a {self.algorithm} run, got a {resume.algorithm} run")
        if resume.spaces != self.spaces:
            raise ValueError(
                f"resume was trained on spaces {resume.spaces}, but {self.name} has {self.spaces}"
            )
        for name in ("hidden", "activation"):
            theirs, ours = getattr(resume.config, name), getattr(self.config, name)
            if theirs != ours:
                raise ValueError(f"resume has {name}={theirs!r}, the config {ours!r}")
        if resume.policy.encoder.normalize != self.policy.encoder.normalize:
            raise ValueError("resume and the config differ in normalize_observations")
        if (resume.critic is None) != (self.critic is None):
            raise ValueError("resume must have a critic exactly when the config asks for one")

    # --- the loop's interface -------------------------------------------------------------------------------

    def trainable(self) -> list[nn.Parameter]:
        """Return the parameters of the policy, then those of the critic."""
        modules = [self.policy] if self.critic is None else [self.policy, self.critic]
        return [p for module in modules for p in module.parameters()]

    def adam(self, parameters: Sequence[nn.Parameter], learning_rate: float) -> torch.optim.Adam:
        """Make the optimiser, with the resumed state if there is one to restore."""
        optimizer = torch.optim.Adam(parameters, lr=learning_rate, eps=1e-5, fused=self.device.type != "mps")
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
        """Collect ``steps`` rows of ``[T, N]``, or one whole episode per copy when ``steps`` is None."""
        rollout = self._collector.collect_episodes() if steps is None else self._collector.collect(steps)
        self._rollout = rollout
        self._episodes.append(rollout.episodes)
        self._episode_count += len(rollout.episodes)
        self._last_returns = (self._last_returns + rollout.episodes.returns.tolist())[-20:]
        return rollout if self._scaler is None else self._scaler(rollout)

    def next_row(self) -> dict[str, Any]:
        """Return the fields of :class:`Update` for the row about to be logged."""
        return {
            "update": len(self.history) + 1,
            "steps": self.steps,
            "episodes": self._episode_count,
            "return_mean": float(np.mean(self._last_returns)) if self._last_returns else math.nan,
        }

    def log(self, row: RowT) -> None:
        """Record an update; stop on divergence or when the callback says so."""
        bad = [
            f.name
            for f in dataclasses.fields(row)
            # Undefined before the first episode, and for targets that do not vary: no sign of divergence.
            if f.name not in ("return_mean", "explained_variance")
            and isinstance(value := getattr(row, f.name), float)
            and not math.isfinite(value)
        ]
        if not bool(torch.isfinite(torch.nn.utils.get_total_norm(self.trainable()))):
            bad.append("parameters")
        if bad:
            raise FloatingPointError(f"{', '.join(bad)} not finite in update {row.update}")
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
            reward_statistics=(0.0, 0.0, 0.0) if self._scaler is None else self._scaler.statistics,
        )

    # --- how it ends ----------------------------------------------------------------------------------------

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
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
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
                f"{self.algorithm} interrupted after {self.steps} of {self.config.total_steps} steps; returning what "
                "was learned so far",
                stacklevel=3,
            )
            return True
        self.stop_reason = f"{type(error).__name__}: {error}"
        if isinstance(error, FloatingPointError):
            self._optimizer = None  # its moments are no longer finite either
            raise TrainingDivergedError(
                f"{error} (seed {self.seed}, {self.steps} steps). The exception's .result holds the policy of update "
                f"{len(self.history)}, the last good one. Try a lower learning rate or normalize_rewards=True.",
                self.result(),
            ) from error
        # Whatever else broke (usually the environment), what was learned must not be lost with it.
        error.__dict__["result"] = self.result()
        error.add_note("The policy trained so far is in this exception's .result")
        return False

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
