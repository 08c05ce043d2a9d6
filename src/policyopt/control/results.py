"""What a training run leaves behind: its history, its networks, and how they are saved
and loaded.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import gymnasium as gym
import numpy as np
import torch
from torch import Tensor, nn

from policyopt._checks import require
from policyopt.checkpoint import rows_from_json, save_checkpoint, strip
from policyopt.control.config import ControlConfig, build_networks
from policyopt.control.policies import Critic, Policy
from policyopt.control.rollouts import Episodes
from policyopt.frame import Row, read_run, run_metadata
from policyopt.runs import History

__all__ = ["TrainResult", "Update"]


@dataclass(frozen=True, kw_only=True)
class Update(Row):
    """One row of the history: what every algorithm reports after an update."""

    headline: ClassVar[tuple[str, ...]] = ("return_mean",)
    # Undefined before the first episode, and for targets that do not vary.
    may_be_nan: ClassVar[tuple[str, ...]] = ("return_mean", "explained_variance")

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
_SPACES = ("observation_space", "action_space")


@dataclass
class TrainResult(Generic[ConfigT, RowT]):
    """What a training run leaves behind."""

    algorithm: str
    """"reinforce", "trpo" or "ppo"."""
    environment: str
    num_envs: int
    """Copies of the environment."""
    seed: int
    config: ConfigT
    policy: Policy
    critic: Critic | None
    history: History[RowT]
    episodes: Episodes
    stop_reason: str
    """"budget", "callback", "interrupted", or what went wrong; "unfinished" in a
    checkpoint from the middle of a run."""
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
        networks_of(self.policy, self.critic).cpu()

    def save(self, folder: str | Path) -> Path:
        """Write the networks (safetensors) and all the rest (JSON), atomically; return
        the folder.

        Raises
        ------
        ValueError
            If the policy is of your own making: only its ``state_dict`` could be saved,
            not how to rebuild it.
        """
        tensors, state = parts_of(self)
        if not state["built_in"]:
            raise ValueError(
                "policy must be the one that the config describes to be saved whole, "
                f"got a {type(self.policy).__name__} of another structure; save its "
                "state_dict() with safetensors.torch.save_file instead"
            )
        metadata = run_metadata(self, identity_of(self), state)
        return save_checkpoint(folder, tensors, metadata)

    @staticmethod
    def load(folder: str | Path) -> TrainResult[Any, Any]:
        """Read what :meth:`save` wrote, or the checkpoint in a trainer's
        ``checkpoint_dir``.

        The policy is on the CPU; move it with ``.to(device)``.

        Raises
        ------
        ValueError
            If the checkpoint's policy was of your own making.
        """
        tensors, metadata = read_run(folder)
        identity, state = metadata["identity"], metadata["state"]
        config_type, row_type = _algorithm_types(identity["algorithm"])
        if not state["built_in"]:
            raise ValueError(
                f"{folder} holds a {identity['policy']} of your own making; to get the "
                "result, start its training again with this checkpoint_dir"
            )
        settings = identity["config"]
        config = config_type(**settings | {"hidden": tuple(settings["hidden"])})
        observations, actions = (_space_of(strip(tensors, f"{n}.")) for n in _SPACES)
        policy, critic = build_networks(
            observations, actions, config, generator=torch.Generator(),
            critic=any(name.startswith("critic.") for name in tensors),
        )  # fmt: skip
        load_networks(networks_of(policy, critic), tensors)
        return TrainResult(
            algorithm=identity["algorithm"], environment=identity["environment"],
            num_envs=identity["copies"], seed=identity["seed"], config=config,
            policy=policy, critic=critic, episodes=episodes_of(tensors),
            history=History(rows_from_json(row_type, metadata["history"])),
            stop_reason=state["stop_reason"], seconds=state["seconds"],
            steps=state["steps"], spaces=(observations, actions),
            reward_statistics=tuple(state["reward_statistics"]),
        )  # fmt: skip


def identity_of(result: TrainResult[Any, Any]) -> dict[str, Any]:
    """Return what a run that goes on from a result's checkpoint must share with it,
    besides algorithm, seed and config.
    """
    return {
        "environment": result.environment, "observation_space": str(result.spaces[0]),
        "action_space": str(result.spaces[1]), "copies": result.num_envs,
        "policy": type(result.policy).__name__,
    }  # fmt: skip


def parts_of(result: TrainResult[Any, Any]) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return what a checkpoint holds of a result, as tensors and as JSON."""
    tensors = dict(networks_of(result.policy, result.critic).state_dict())
    for name, column in result.episodes.table().items():
        tensors[f"episodes.{name}"] = torch.from_numpy(column)
    built_in = _is_built_in(result)
    if built_in:
        for name, space in zip(_SPACES, result.spaces, strict=True):
            tensors |= {f"{name}.{k}": v for k, v in _space_tensors(space).items()}
    return tensors, {
        "built_in": built_in, "stop_reason": result.stop_reason,
        "seconds": result.seconds, "steps": result.steps,
        "reward_statistics": list(result.reward_statistics),
    }  # fmt: skip


def _is_built_in(result: TrainResult[Any, Any]) -> bool:
    """Whether the policy can be built again from the spaces and the config."""
    spaces, config, start = result.spaces, result.config, torch.Generator()
    try:
        rebuilt, _ = build_networks(*spaces, config, critic=False, generator=start)
    except ValueError:  # other spaces than those of the built-in policies
        return False
    return _structure(rebuilt) == _structure(result.policy)


def networks_of(policy: Policy, critic: Critic | None) -> nn.ModuleDict:
    """Return the networks that there are by their names in a checkpoint."""
    return nn.ModuleDict({"policy": policy} | ({"critic": critic} if critic else {}))


def load_networks(networks: nn.ModuleDict, tensors: Mapping[str, Tensor]) -> None:
    """Take over the weights and statistics of a checkpoint."""
    for name, network in networks.items():
        network.load_state_dict(strip(tensors, f"{name}."))


def episodes_of(tensors: Mapping[str, Tensor]) -> Episodes:
    """Return the record of episodes in a checkpoint."""
    columns = strip(tensors, "episodes.")
    return Episodes(*(columns[name].numpy() for name in ("steps", "return", "length")))


def _structure(module: nn.Module) -> tuple[Any, ...]:
    shapes = {name: tensor.shape for name, tensor in module.state_dict().items()}
    return type(module), str(module), shapes


def _algorithm_types(algorithm: str) -> tuple[type[ControlConfig], type[Update]]:
    names = {"reinforce": "Reinforce", "trpo": "TRPO", "ppo": "PPO"}
    require(algorithm in names, f"algorithm must be one of {sorted(names)}", algorithm)
    from policyopt import control  # late: the algorithms' modules import this one

    name = names[algorithm]
    return getattr(control, f"{name}Config"), getattr(control, f"{name}Update")


def _space_tensors(space: gym.Space[Any]) -> dict[str, Tensor]:
    # All have the space's own type, which is read from them.
    if isinstance(space, gym.spaces.MultiBinary):
        return {"bits": torch.tensor(space.n)}
    names = ("low", "high") if isinstance(space, gym.spaces.Box) else ("n", "start")
    if isinstance(space, gym.spaces.MultiDiscrete):
        names = ("nvec", "start")
    return {n: torch.from_numpy(np.array(getattr(space, n))) for n in names}


def _space_of(tensors: Mapping[str, Tensor]) -> gym.Space[Any]:
    if "bits" in tensors:
        return gym.spaces.MultiBinary(tensors["bits"].tolist())
    if "nvec" in tensors:
        nvec, start = tensors["nvec"].numpy(), tensors["start"].numpy()
        return gym.spaces.MultiDiscrete(nvec, dtype=nvec.dtype.type, start=start)
    if "n" in tensors:
        n, start = tensors["n"].numpy(), tensors["start"].numpy()
        # Older versions of Gymnasium know no other type, and no argument for it.
        options: Any = {} if n.dtype == np.int64 else {"dtype": n.dtype}
        return gym.spaces.Discrete(int(n), start=int(start), **options)
    low, high = tensors["low"].numpy(), tensors["high"].numpy()
    return gym.spaces.Box(low, high, dtype=low.dtype.type)
