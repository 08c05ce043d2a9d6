"""What a training run leaves behind: its history, its networks, and how they are saved
and loaded.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from policyopt.checkpoint import load_checkpoint, save_checkpoint
from policyopt.control.config import ControlConfig, build_networks
from policyopt.control.policies import Critic, Policy
from policyopt.control.rollouts import Episodes
from policyopt.runs import History

__all__ = ["ConfigT", "RowT", "TrainResult", "Update"]


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
    """Mean undiscounted return of the last 20 finished episodes (NaN before the
    first).
    """


RowT = TypeVar("RowT", bound=Update)
ConfigT = TypeVar("ConfigT", bound=ControlConfig)


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
    """Running (mean, variance, count) of the discounted return, when rewards are
    normalised.
    """

    def cpu(self) -> None:
        """Move the networks to the CPU, in place."""
        for network in (self.policy, self.critic):
            if network is not None:
                network.cpu()

    def save(self, folder: str | Path) -> Path:
        """Write weights and optimiser state (safetensors) and all the rest (JSON),
        atomically; return the folder.

        Raises
        ------
        ValueError
            If the policy is of your own making: only its ``state_dict`` could be saved,
            not how to rebuild it.
        """
        rebuilt, _ = build_networks(
            *self.spaces, self.config, critic=False, generator=torch.Generator()
        )
        if _structure(self.policy) != _structure(rebuilt):
            raise ValueError(
                "policy must be the one that the config describes to be saved whole, "
                f"got a {type(self.policy).__name__} of another structure; save its "
                "state_dict() with safetensors.torch.save_file instead"
            )
        tensors = {f"policy.{k}": v for k, v in self.policy.state_dict().items()}
        if self.critic is not None:
            tensors |= {f"critic.{k}": v for k, v in self.critic.state_dict().items()}
        state = self.optimizer_state
        for index, slot in state.get("state", {}).items():
            tensors |= {
                f"optimizer.{index}.{k}": torch.as_tensor(v) for k, v in slot.items()
            }
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
            "history": [_without_nan(dataclasses.asdict(row)) for row in self.history],
            "stop_reason": self.stop_reason,
            "seconds": self.seconds,
            "steps": self.steps,
            "spaces": [_space_to_json(space) for space in self.spaces],
            "reward_statistics": list(self.reward_statistics),
        }
        return save_checkpoint(folder, tensors, metadata)

    @staticmethod
    def load(folder: str | Path) -> TrainResult[Any, Any]:
        """Read what :meth:`save` wrote. The policy is on the CPU; move it with
        ``.to(device)``.
        """
        tensors, meta = load_checkpoint(folder)
        if meta.get("format") != 1:
            raise ValueError(
                f"{folder} has format {meta.get('format')!r}, this version reads "
                "format 1"
            )
        config_type, row_type = _algorithm_types(meta["algorithm"])
        fields: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in meta["config"].items()
        }
        config = config_type(**fields)
        observation_space, action_space = (_space_from_json(s) for s in meta["spaces"])
        policy, critic = build_networks(
            observation_space,
            action_space,
            config,
            critic=meta["has_critic"],
            generator=torch.Generator(),
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
            optimizer_state={"state": slots, "param_groups": meta["optimizer_groups"]}
            if slots
            else {},
            history=History(row_type(**_with_nan(row)) for row in meta["history"]),
            episodes=Episodes(
                *(episodes[k].numpy() for k in ("steps", "return", "length"))
            ),
            stop_reason=meta["stop_reason"],
            seconds=meta["seconds"],
            steps=meta["steps"],
            spaces=(observation_space, action_space),
            reward_statistics=tuple(meta["reward_statistics"]),
        )


def _structure(module: nn.Module) -> tuple[Any, ...]:
    return (
        type(module),
        str(module),
        {name: tensor.shape for name, tensor in module.state_dict().items()},
    )


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    # JSON has no NaN, and readers in other languages stop at Python's.
    return {
        k: None if isinstance(v, float) and math.isnan(v) else v for k, v in row.items()
    }


def _with_nan(row: dict[str, Any]) -> dict[str, Any]:
    return {k: math.nan if v is None else v for k, v in row.items()}


def _strip(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        key.removeprefix(prefix): value
        for key, value in tensors.items()
        if key.startswith(prefix)
    }


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
        np.array([float(v) for v in data[k]]).astype(dtype).reshape(data["shape"])
        for k in ("low", "high")
    )
    return gym.spaces.Box(low, high, dtype=dtype.type)
