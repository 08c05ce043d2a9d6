"""Settings that every trainer of language models has."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from policyopt.lm.data import Limits
from policyopt.lm.models import LanguageModel
from policyopt.lm.sampling import SamplingConfig
from policyopt.runs import Bound, Count, NonNegative, Positive, Settings

__all__ = ["LMConfig", "OfflineConfig", "OnlineConfig"]

Natural = Annotated[int, Bound(">= 0", lambda x: x >= 0)]
"""An integer ≥ 0."""


@dataclass(frozen=True, kw_only=True)
class LMConfig(Settings):
    """Settings that every language-model trainer has.

    Frozen: use ``dataclasses.replace`` to change one.

    There is none for dropout. It is off, whatever the model's config or ``LoRA`` say,
    where log-probabilities are compared (DPO, KTO, GRPO, PPO, ranking): π, π_old and
    π_ref are one policy at the start, so that the first ratio is 1, the first KL
    divergence and the first margin are 0. It is as the model has it in
    :func:`~policyopt.lm.sft.train_sft` and
    :func:`~policyopt.lm.reward_model.train_reward_model`.
    """

    renamed: ClassVar = {"steps": "updates", "warmup_steps": "warmup_updates"}
    elsewhere: ClassVar[dict[str, str]] = {
        "max_completion_tokens": "sampling=SamplingConfig(max_new_tokens=…)"
    }

    updates: Count | None = None
    """Updates to make, one per batch; None makes ``epochs`` passes over the data."""
    epochs: Count = 1
    """Passes over the data when ``updates`` is None."""
    batch_size: Count = 32
    """Items of the data (examples, pairs, lists, prompts) per update, over all
    processes."""
    micro_batch_size: Count | None = None
    """Most completions in one forward and backward pass; None takes the batch in one
    piece. The gradient is the same: only memory and time differ."""
    learning_rate: Positive = 1e-5
    """AdamW's step size, at its highest. With all weights of a pretrained model about
    1e-6 (1e-5 in SFT), with adapters ten to thirty times that; tiny models such as the
    book's take 1e-4 to 1e-3."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """The learning rate after the warm-up: constant, or falling to 0 at the end."""
    warmup_updates: Natural = 0
    """Updates over which the learning rate rises linearly."""
    weight_decay: NonNegative = 0.0
    adam_betas: tuple[float, ...] = (0.9, 0.999)
    """Decay of AdamW's first and second moment."""
    max_gradient_norm: Positive | None = 1.0
    """Largest norm of the gradient of an optimiser step; None does not limit it."""
    autocast: Literal["bfloat16"] | None = None
    """Compute in this type while weights and optimiser stay in theirs: about half the
    time and memory on a GPU. The built-in sampler does so too; one that is handed over
    computes as it likes. Sampler and trainer then round apart: see GRPO's
    ``importance_cap``."""
    gradient_checkpointing: bool = False
    """Recompute each layer in the backward pass: less memory, about a third more
    time."""
    max_prompt_tokens: Count | None = None
    """Cut longer prompts to their last tokens; None: a prompt too long for the model is
    an error."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """What the chat template is given besides messages and tools, such as
    ``{"enable_thinking": False}``, in data and in sampling. The model keeps it, and
    where this is empty, what the model has kept is used."""
    checkpoint_every: Count = 50
    """Updates between checkpoints, where a ``checkpoint_dir`` is given. The last update
    always leaves one."""
    logged_samples: Natural = 0
    """Prompts of the data whose greedy completions are recorded before and after the
    training."""

    def __post_init__(self) -> None:
        super().__post_init__()
        decays = len(self.adam_betas) == 2 and all(0 <= b < 1 for b in self.adam_betas)
        self._check("adam_betas", decays, "two numbers in [0, 1)")

    def limits(self, language_model: LanguageModel) -> Limits:
        """Return how data become tokens that the model can take."""
        lm, cut = language_model, getattr(self, "max_completion_tokens", None)
        own = self.chat_template_kwargs or lm.chat_template_kwargs
        sizes = lm.context_length, self.max_prompt_tokens, cut, lm.vocabulary
        return Limits(*sizes, own)

    def total_updates(self, items: int) -> int:
        """Return the number of updates for a data set of this many items."""
        return self.updates or math.ceil(self.epochs * items / self.batch_size)

    def learning_rate_at(self, update: int, total: int) -> float:
        """Return the learning rate of an update, counted from 0."""
        if update < self.warmup_updates:
            return self.learning_rate * (update + 1) / self.warmup_updates
        after = update - self.warmup_updates
        done = after / max(1, total - self.warmup_updates)
        cosine = 0.5 * (1 + math.cos(math.pi * done))
        factor = {"constant": 1.0, "linear": 1 - done, "cosine": cosine}[self.schedule]
        return self.learning_rate * factor


@dataclass(frozen=True, kw_only=True)
class OfflineConfig(LMConfig):
    """Settings of the trainers whose completions come from the data."""

    max_completion_tokens: Count | None = None
    """Cut longer completions (they lose their EOS); None: too long for the model is an
    error."""


@dataclass(frozen=True, kw_only=True)
class OnlineConfig(LMConfig):
    """Settings of the trainers whose completions are the policy's own."""

    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How completions are drawn, and scored likewise."""
    reward_weights: tuple[float, ...] | None = None
    """One per reward function; None weighs each with 1."""
    max_turns: Count = 8
    """Most messages of the policy's in an episode with an environment."""
    max_episode_tokens: Count | None = None
    """Most tokens after the first prompt of such an episode, those of the environment
    included; None: as many as the model's context has room for. An episode ends where a
    message of ``max_new_tokens`` would not fit any more."""

    def __post_init__(self) -> None:
        super().__post_init__()
        needed = "of a temperature > 0: equal samples teach nothing"
        self._check("sampling", self.sampling.temperature > 0, needed)
        one, most = self.sampling.max_new_tokens, self.max_episode_tokens
        fits = most is None or most >= one
        self._check("max_episode_tokens", fits, f"None or >= max_new_tokens = {one}")
