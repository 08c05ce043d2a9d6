"""What a training run of a language model leaves behind."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Generic, TypeVar

import torch
from torch import nn

from policyopt.frame import Row
from policyopt.lm.config import LMConfig
from policyopt.lm.data import Prompt
from policyopt.lm.models import LanguageModel, RewardModel, new_folder
from policyopt.runs import History, _warn_renamed

__all__ = ["LMResult", "LMUpdate", "LoggedSample"]


@dataclass(frozen=True, kw_only=True)
class LMUpdate(Row):
    """One row of the history: what every trainer reports after an update.

    Sums and means are over all processes.
    """

    tokens: int
    """Completion tokens trained on so far."""
    learning_rate: float
    gradient_norm: float
    """Norm of the last gradient of the update, before it was limited; 0 where there was
    nothing to learn from, and no step."""
    seconds: float
    """Wall-clock time of the training so far."""

    headline: ClassVar[tuple[str, ...]] = ("loss",)

    @property
    def step(self) -> int:
        """Deprecated name of :attr:`update`."""
        _warn_renamed("LMUpdate", "step", "update")
        return self.update


RowT = TypeVar("RowT", bound=LMUpdate)
ConfigT = TypeVar("ConfigT", bound=LMConfig)


@dataclass(frozen=True)
class LoggedSample:
    """A prompt and its greedy completion before and after the training."""

    prompt: Prompt
    before: str
    after: str


@dataclass
class LMResult(Generic[ConfigT, RowT]):
    """What a training run leaves behind."""

    algorithm: str
    seed: int
    config: ConfigT
    language_model: LanguageModel
    """The trained model: the object that was given, trained in place."""
    history: History[RowT]
    stop_reason: str
    """"budget", "callback", "interrupted", or what went wrong."""
    seconds: float
    """Wall-clock time of the training."""
    updates: int
    """Updates made."""
    samples: list[LoggedSample] = field(default_factory=list)
    reward_model: RewardModel | None = None
    """What :func:`~policyopt.lm.reward_model.train_reward_model` trained."""
    actor_critic: nn.Module | None = None
    """The policy with its value function, from :func:`~policyopt.lm.ppo.train_ppo`."""

    @property
    def steps(self) -> int:
        """Deprecated name of :attr:`updates`."""
        _warn_renamed("LMResult", "steps", "updates")
        return self.updates

    def cpu(self) -> None:
        """Move the networks to the CPU, in place."""
        self.language_model.to("cpu")
        if self.reward_model is not None:
            self.reward_model.network.cpu()
        if self.actor_critic is not None:
            self.actor_critic.cpu()

    def save(self, folder: str | Path) -> Path:
        """Write the model (or the reward model) for :func:`~policyopt.lm.models.load`,
        and the history beside it, in one step.

        Of several processes the first one writes, and the others return at once.
        """
        folder = Path(folder)
        processes = torch.distributed
        several = processes.is_available() and processes.is_initialized()
        if several and processes.get_rank() != 0:
            return folder
        about = {
            "algorithm": self.algorithm, "seed": self.seed,
            "config": dataclasses.asdict(self.config),
            "stop_reason": self.stop_reason, "seconds": self.seconds,
            "updates": self.updates,
        }  # fmt: skip
        text = json.dumps(about, indent=1)
        with new_folder(folder) as scratch:
            (self.reward_model or self.language_model).write(scratch)
            self.history.to_csv(scratch / "history.csv")
            (scratch / "training.json").write_text(text, encoding="utf-8")
        return folder
