"""Settings that every trainer of language models has."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from policyopt.lm.data import Limits
from policyopt.lm.models import LanguageModel
from policyopt.runs import Settings

__all__ = ["LMConfig"]


@dataclass(frozen=True, kw_only=True)
class LMConfig(Settings):
    """Settings that every language-model trainer has. Frozen: use
    ``dataclasses.replace`` to change one.
    """

    steps: int | None = None
    """Batches to train on; None makes ``epochs`` passes over the data."""
    epochs: int = 1
    """Passes over the data when ``steps`` is None."""
    batch_size: int = 32
    """Items of the data (examples, pairs, lists, prompts) per step, over all
    processes.
    """
    micro_batch_size: int | None = None
    """Most completions in one forward and backward pass; None takes the batch in one
    piece. The gradient is the same: only memory and time differ."""
    learning_rate: float = 1e-5
    """AdamW's step size, at its highest."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate goes on after the warm-up: stays, or falls to 0 at the last
    step.
    """
    warmup_steps: int = 0
    """Steps over which the learning rate rises linearly."""
    weight_decay: float = 0.0
    adam_betas: tuple[float, ...] = (0.9, 0.999)
    """Decay of AdamW's first and second moment."""
    max_gradient_norm: float | None = 1.0
    """Largest norm of the gradient of an optimiser step; None does not limit it."""
    autocast: Literal["bfloat16"] | None = None
    """Compute in this type while weights and optimiser stay in theirs: about half the
    time and memory on a GPU.
    """
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more
    time.
    """
    max_prompt_tokens: int | None = None
    """Cut longer prompts to their last tokens; None: a prompt too long for the model is
    an error.
    """
    max_completion_tokens: int | None = None
    """Cut longer completions of the data (they lose their EOS); None: too long for the
    model is an error.
    """
    checkpoint_every: int = 50
    """Steps between checkpoints, where a ``checkpoint_dir`` is given. The last step
    always leaves one.
    """
    logged_samples: int = 0
    """Prompts of the data whose greedy completions are recorded before and after the
    training.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("epochs", "batch_size", "checkpoint_every"):
            self._check(name, getattr(self, name) >= 1, ">= 1")
        for name in (
            "steps",
            "micro_batch_size",
            "max_prompt_tokens",
            "max_completion_tokens",
        ):
            self._check(
                name,
                getattr(self, name) is None or getattr(self, name) >= 1,
                ">= 1 or None",
            )
        for name in ("warmup_steps", "weight_decay", "logged_samples"):
            self._check(name, getattr(self, name) >= 0, ">= 0")
        self._check("learning_rate", self.learning_rate > 0, "> 0")
        self._check(
            "adam_betas",
            len(self.adam_betas) == 2
            and all(0 <= beta < 1 for beta in self.adam_betas),
            "two numbers in [0, 1)",
        )
        self._check(
            "max_gradient_norm",
            self.max_gradient_norm is None or self.max_gradient_norm > 0,
            "> 0 or None",
        )

    def limits(self, language_model: LanguageModel) -> Limits:
        """Return how many tokens an item of the data may have."""
        return Limits(
            language_model.context_length,
            self.max_prompt_tokens,
            self.max_completion_tokens,
        )

    def total_steps(self, items: int) -> int:
        """Return the number of steps for a data set of this many items."""
        return (
            self.steps
            if self.steps is not None
            else math.ceil(self.epochs * items / self.batch_size)
        )

    def learning_rate_at(self, step: int, total: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        if step < self.warmup_steps:
            return self.learning_rate * (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, total - self.warmup_steps)
        factor = {
            "constant": 1.0,
            "linear": 1 - progress,
            "cosine": 0.5 * (1 + math.cos(math.pi * progress)),
        }[self.schedule]
        return self.learning_rate * factor
