"""Supervised fine-tuning: make the completions of a data set likely."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from policyopt.lm.config import LMConfig
from policyopt.lm.data import Example, Records, sft_examples
from policyopt.lm.models import LanguageModel
from policyopt.lm.sequences import Sequences
from policyopt.lm.training import Callback, LMResult, LMUpdate, PolicyNetwork, Run
from policyopt.losses import aggregate

__all__ = ["SFTConfig", "SFTUpdate", "train_sft"]


@dataclass(frozen=True, kw_only=True)
class SFTConfig(LMConfig):
    """Settings of :func:`train_sft`."""

    eval_every: int | None = None
    """Steps between measurements on ``eval_data``; None measures after the last step
    only.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(
            "eval_every",
            self.eval_every is None or self.eval_every >= 1,
            ">= 1 or None",
        )


@dataclass(frozen=True, kw_only=True)
class SFTUpdate(LMUpdate):
    """One row of :func:`train_sft`'s history."""

    loss: float
    """−log π_θ per completion token, mean over the batch's tokens, nats."""
    eval_loss: float
    """The same on the held-out data; NaN where it was not measured."""

    may_be_nan: ClassVar[tuple[str, ...]] = ("eval_loss",)


def train_sft(
    language_model: LanguageModel,
    data: Records,
    config: SFTConfig = SFTConfig(),
    *,
    eval_data: Records | None = None,
    seed: int = 0,
    callback: Callback | None = None,
    progress: bool = True,
    checkpoint_dir: str | Path | None = None,
) -> LMResult[SFTConfig, SFTUpdate]:
    """Maximise the likelihood of completions given their prompts. Prompt tokens are
    read, not learned.

    Parameters
    ----------
    language_model : LanguageModel
        Trained in place.
    data : records
        Columns ``prompt`` and ``completion``, or ``messages`` that end with the
        assistant's. See
        :func:`~policyopt.lm.data.read_records`.
    config : SFTConfig
    eval_data : records, optional
        Held-out examples, whose loss is reported.
    seed : int
        Orders the data.
    callback : callable, optional
        Gets every :class:`SFTUpdate`; a true return value stops the training.
    progress : bool
        Show a progress bar.
    checkpoint_dir : path, optional
        A folder for checkpoints. If it holds one of this very run, training goes on
        from there, and ends as the uninterrupted run would have, bit for bit on a CPU.

    Raises
    ------
    ValueError
        If the data are not usable; the message names the item.
    TrainingDivergedError
        If a gradient is not finite; ``.result`` holds the model of before.
    """
    limits = config.limits(language_model)
    examples = sft_examples(data, language_model.tokenizer, limits)
    held_out = (
        []
        if eval_data is None
        else sft_examples(eval_data, language_model.tokenizer, limits)
    )
    run: Run[SFTConfig, SFTUpdate] = Run(
        "sft", language_model, PolicyNetwork(language_model.model), config, row_type=SFTUpdate, items=len(examples),
        seed=seed, callback=callback, progress=progress, checkpoint_dir=checkpoint_dir,
        prompts=[example.prompt for example in examples[: config.logged_samples]],
    )  # fmt: skip
    with run:
        for step in run.steps():
            batch = _pad([examples[i] for i in run.batch()], language_model)
            tokens = run.sum(batch.completion_mask.sum())
            total = torch.zeros((), device=run.device)
            for rows in run.micro_batches(len(batch)):
                piece = batch.select(rows)
                log_probs = run.network(piece).log_probs
                loss = aggregate(-log_probs, piece.completion_mask, denominator=tokens)
                run.backward(loss)
                total += loss.detach()
            norm = run.descend()
            every = config.eval_every or run.total
            measured = bool(held_out) and (
                (step + 1) % every == 0 or step + 1 == run.total
            )
            run.log(
                tokens=int(tokens),
                gradient_norm=norm,
                loss=float(run.sum(total)),
                eval_loss=_mean_loss(run, held_out) if measured else math.nan,
            )
    return run.result()


def _pad(examples: Sequence[Example], language_model: LanguageModel) -> Sequences:
    return Sequences.pad(
        [example.prompt_ids for example in examples],
        [example.completion_ids for example in examples],
        pad_id=language_model.pad_id,
        device=language_model.device,
    )


@torch.no_grad()
def _mean_loss(run: Run[SFTConfig, SFTUpdate], examples: Sequence[Example]) -> float:
    run.network.eval()
    total, tokens, size = 0.0, 0, run.config.micro_batch_size or run.config.batch_size
    for start in range(0, len(examples), size):
        batch = _pad(examples[start : start + size], run.language_model)
        total -= float(run.network(batch).log_probs.sum())
        tokens += int(batch.completion_mask.sum())
    run.network.train()
    return total / tokens
