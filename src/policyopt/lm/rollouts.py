"""Experience for the trainers that sample: completions of their own, scored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from policyopt.lm.data import PromptExample
from policyopt.lm.models import LanguageModel
from policyopt.lm.rewards import RewardFunctions, compute_rewards
from policyopt.lm.sampling import Sampler, SamplingConfig
from policyopt.lm.sequences import Sequences

__all__ = ["Experience", "collect", "minibatches"]


@dataclass(frozen=True)
class Experience:
    """``B`` sampled completions with their rewards, prompt by prompt."""

    sequences: Sequences
    sampler_log_probs: Tensor
    """``[B, T]``, of the distribution sampled from."""
    rewards: Tensor
    """``[B]``, the weighted sum of the reward functions."""
    parts: dict[str, Tensor]
    """``[B]`` for each reward function, unweighted."""
    finished: Tensor
    """Boolean ``[B]``: the completion ended by itself."""
    texts: list[str]


def collect(
    language_model: LanguageModel,
    sampler: Sampler,
    examples: Sequence[PromptExample],
    samples_per_prompt: int,
    config: SamplingConfig,
    reward_functions: RewardFunctions,
    *,
    weights: Sequence[float] | None = None,
    seed: int,
    first_row: int = 0,
) -> Experience:
    """Sample completions of each prompt and score them.

    Reward functions get ``completions`` and ``prompts`` (texts or chat messages), one
    entry per completion, the other columns of the data likewise, and ``finished``,
    which tells completions that ended by themselves.
    """
    samples = sampler.sample(
        [example.prompt_ids for example in examples],
        samples_per_prompt,
        config,
        seed=seed,
        first_row=first_row,
    )
    sequences = samples.sequences
    lengths = sequences.lengths.tolist()
    texts = [
        language_model.decode(row[:length])
        for row, length in zip(sequences.completion_ids.tolist(), lengths, strict=True)
    ]
    rows = [example for example in examples for _ in range(samples_per_prompt)]
    columns: dict[str, list[Any]] = {
        name: [row.columns[name] for row in rows] for name in rows[0].columns
    }
    columns["finished"] = samples.finished.tolist()
    rewards = compute_rewards(
        reward_functions, texts, [row.prompt for row in rows], columns, weights=weights
    )
    device = language_model.device
    return Experience(
        sequences=sequences.to(device),
        sampler_log_probs=samples.log_probs.to(device),
        rewards=rewards.total.to(device),
        parts={name: part.to(device) for name, part in rewards.parts.items()},
        finished=samples.finished.to(device),
        texts=texts,
    )


def minibatches(size: int, count: int, group: int) -> list[list[int]]:
    """Cut the numbers 0 … ``size`` − 1 into ``count`` pieces of whole groups (``group``
    neighbours each).

    Piece m takes the groups m, m + count, m + 2 count, …: the data are shuffled
    already, and processes that hold neighbouring shares of a batch cut the same pieces
    together that one process would cut alone.
    """
    groups = [range(start, start + group) for start in range(0, size, group)]
    return [
        [row for rows in groups[first::count] for row in rows] for first in range(count)
    ]
