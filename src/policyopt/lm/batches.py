"""What a loss gets to see: one object per batch, which can be cut by rows.

The trainers of this half fill in the log-probabilities of the policy in training, with
gradient, and hand the object to the loss. Everything else in it is constant.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from policyopt.lm.sequences import Sequences, widen

__all__ = [
    "Completions", "LabelledCompletions", "Pairs", "RankedGroup", "ScoredPairs",
    "Tokens",
]  # fmt: skip


def _later() -> Tensor:
    return torch.empty(0)


def ordered_rightly(margins: Tensor, *, tie: float = 0.0) -> Tensor:
    """Return 1 where a margin is positive, ``tie`` where it is 0, 0 where it is
    negative, NaN where it is NaN.
    """
    return torch.where(margins.isnan(), margins, (margins > 0) + tie * (margins == 0))


@dataclass(frozen=True)
class Tokens:
    """``B`` completions of at most ``T`` tokens."""

    sequences: Sequences
    mask: Tensor
    """Boolean ``[B, T]``: the tokens that count in the loss."""
    log_probs: Tensor = field(default_factory=_later)
    """log π_θ of each token, ``[B, T]``, with gradient."""

    def __len__(self) -> int:
        return len(self.sequences)

    def select(self, rows: Tensor) -> Self:
        """Keep the completions ``rows`` (numbers or a Boolean mask), in that order.

        Columns that none of them needs are dropped.
        """
        sequences = self.sequences.select(rows)
        size, T = len(self), sequences.completion_ids.shape[1]
        changes = {
            f.name: value[rows] if value.ndim == 1 else value[rows, :T]
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
            and value.shape[:1] == (size,)
        }
        return replace(self, sequences=sequences, **changes)


@dataclass(frozen=True)
class Completions(Tokens):
    """Completions that the policy sampled, prompt by prompt, with their rewards.

    Tensors that a trainer does not use are empty.
    """

    rewards: Tensor = field(default_factory=_later)
    """``[B]``, the weighted sum of the reward functions."""
    parts: dict[str, Tensor] = field(default_factory=dict)
    """``[B]`` for each reward function, unweighted; of the whole batch."""
    token_rewards: Tensor = field(default_factory=_later)
    """``[B, T]``, where an environment rewards turns: the reward of each at its last
    token, and that of the reward functions at the last of all."""
    finished: Tensor = field(default_factory=_later)
    """Boolean ``[B]``: the completion ended by itself, or its environment ended it."""
    sampler_log_probs: Tensor = field(default_factory=_later)
    """``[B, T]``, of the distribution that was sampled from."""
    old_log_probs: Tensor = field(default_factory=_later)
    """log π_old, ``[B, T]``: of the policy before the first step on this batch."""
    reference_log_probs: Tensor = field(default_factory=_later)
    """log π_ref, ``[B, T]``."""
    advantages: Tensor = field(default_factory=_later)
    """``[B]`` (GRPO) or ``[B, T]`` (PPO)."""
    entropies: Tensor = None  # type: ignore[assignment]
    """Entropy of π_θ(·|s_t) in nats, ``[B, T]``, with gradient; None where the trainer
    does not compute it."""
    values: Tensor = field(default_factory=_later)
    """V(s_t) of the critic in training, ``[B, T]``, with gradient (PPO)."""
    old_values: Tensor = field(default_factory=_later)
    """V(s_t) before the first step on this batch, ``[B, T]`` (PPO)."""
    targets: Tensor = field(default_factory=_later)
    """What V(s_t) is fitted to, ``[B, T]`` (PPO)."""

    @staticmethod
    def join(batches: Sequence[Completions]) -> Completions:
        """Put batches one after another, padded to the longest completion of all."""
        if len(batches) == 1:
            return batches[0]
        sequences = Sequences.join([batch.sequences for batch in batches])
        changes: dict[str, Any] = {}
        for name, value in vars(batches[0]).items():
            if isinstance(value, Tensor):
                columns = [getattr(batch, name) for batch in batches]
                if value.ndim == 2:
                    columns = [widen(x, sequences.completion_ids) for x in columns]
                changes[name] = torch.cat(columns)
        parts = {n: torch.cat([b.parts[n] for b in batches]) for n in batches[0].parts}
        return replace(batches[0], sequences=sequences, parts=parts, **changes)


@dataclass(frozen=True)
class Pairs:
    """``N`` preference pairs: log-probabilities of whole completions, ``[N]`` each.

    Sums over tokens, or means where the config says ``length_normalized``.
    """

    chosen_log_prob: Tensor
    """log π_θ(chosen | prompt), with gradient."""
    rejected_log_prob: Tensor
    reference_chosen_log_prob: Tensor
    """log π_ref(chosen | prompt); 0 without a reference."""
    reference_rejected_log_prob: Tensor
    tokens: Tokens
    """The completions themselves: chosen, rejected, chosen, …, ``[2N, T]``."""


@dataclass(frozen=True)
class LabelledCompletions:
    """``N`` completions that are desirable or not: log-probabilities of whole ones,
    ``[N]`` each.
    """

    log_prob: Tensor
    """log π_θ(completion | prompt), with gradient."""
    reference_log_prob: Tensor
    """log π_ref(completion | prompt)."""
    desirable: Tensor
    """The labels, Boolean ``[N]``."""
    baseline: Tensor
    """Mean log π/π_ref of mismatched pairs, one number for the whole batch: KTO's z_0
    before it is cut at 0."""
    tokens: Tokens
    """The completions themselves, ``[N, T]``."""


@dataclass(frozen=True)
class ScoredPairs:
    """``N`` preference pairs with the scores of a reward model, ``[N]`` each."""

    chosen_scores: Tensor
    """With gradient."""
    rejected_scores: Tensor


@dataclass(frozen=True)
class RankedGroup:
    """``K`` completions of one prompt, the best first."""

    log_prob: Tensor
    """log π_θ(completion | prompt), ``[K]``, with gradient; in online DPO log π/π_ref
    of two."""
    rewards: Tensor
    """``[K]``, falling; where there are only ranks, K, …, 1."""
