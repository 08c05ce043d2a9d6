"""Supervised fine-tuning: make the completions of a data set likely."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from policyopt.frame import Callback, Statistics
from policyopt.lm.batches import Tokens
from policyopt.lm.config import OfflineConfig
from policyopt.lm.data import Example, Records, sft_examples
from policyopt.lm.models import LanguageModel
from policyopt.lm.policies import PolicyNetwork
from policyopt.lm.results import LMResult, LMUpdate
from policyopt.lm.training import Run
from policyopt.losses import aggregate, check_loss, item_losses
from policyopt.runs import Count

__all__ = ["SFTConfig", "SFTUpdate", "sft_loss", "train_sft"]


@dataclass(frozen=True, kw_only=True)
class SFTConfig(OfflineConfig):
    """Settings of :func:`train_sft`."""

    eval_every: Count | None = None
    """Updates between measurements on ``eval_data``; None measures after the last
    only."""
    train_on: Literal["last", "assistant"] = "last"
    """What of ``messages`` is learned: the last message, or all of the assistant's; see
    :func:`~policyopt.lm.data.sft_examples`."""


@dataclass(frozen=True, kw_only=True)
class SFTUpdate(LMUpdate):
    """One row of :func:`train_sft`'s history."""

    loss: float
    """−log π_θ per completion token, mean over the batch's tokens, nats."""
    eval_loss: float
    """The same on the held-out data; NaN where it was not measured."""

    may_be_nan: ClassVar[tuple[str, ...]] = ("eval_loss",)


def sft_loss(batch: Tokens) -> Tensor:
    """Return −log π_θ of each token, ``[B, T]``."""
    return -batch.log_probs


def train_sft(
    language_model: LanguageModel,
    data: Records,
    config: SFTConfig = SFTConfig(),
    *,
    eval_data: Records | None = None,
    loss: Callable[[Tokens], Any] | None = None,
    seed: int = 0,
    callback: Callback | None = None,
    progress: bool = True,
    checkpoint_dir: str | Path | None = None,
) -> LMResult[SFTConfig, SFTUpdate]:
    """Maximise the likelihood of completions given their prompts. Prompt tokens are
    read, not learned. Dropout is on, if the model or its adapters have any.

    Parameters
    ----------
    language_model : LanguageModel
        Trained in place.
    data : records
        Columns ``prompt`` and ``completion``, or ``messages`` that end with the
        assistant's; and ``tools``, if the chat template shows them. See
        :func:`~policyopt.lm.data.sft_examples`.
    config : SFTConfig
    eval_data : records, optional
        Held-out examples, whose loss is reported.
    loss : callable, optional
        A function of the :class:`~policyopt.lm.batches.Tokens` of a micro-batch that
        returns one loss per token, ``[B, T]``: a tensor, or a named tuple with the
        field ``loss``. By default −log π_θ.
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
    how = language_model.tokenizer, config.limits(language_model), config.train_on
    examples = sft_examples(data, *how)
    held_out = [] if eval_data is None else sft_examples(eval_data, *how)
    run: Run[SFTConfig, SFTUpdate] = Run(
        "sft", language_model, PolicyNetwork(language_model.model), config, SFTUpdate,
        examples, seed=seed, callback=callback, progress=progress,
        checkpoint_dir=checkpoint_dir, dropout=True,
    )  # fmt: skip
    objective = check_loss(loss, sft_loss, "Tokens")

    with run:
        for _ in run.updates():
            batch = _pad(run.batch(), language_model)
            tokens = run.sum(batch.mask.sum())
            statistics = Statistics()
            for rows in run.micro_batches(len(batch)):
                piece = batch.select(rows)
                ahead = loss is None and run.ahead(objective, piece, "mean", tokens)
                now = run.network(piece.sequences, loss=ahead).log_probs
                piece = replace(piece, log_probs=now)
                items = item_losses(objective, piece, piece.mask.shape)
                total = aggregate(items.loss, piece.mask, denominator=tokens)
                run.backward(total)
                statistics.add(loss=total)
            norm = run.descend()
            measured = held_out and run.is_due(config.eval_every)
            run.log(
                tokens=int(tokens), gradient_norm=norm,
                loss=run.sums(statistics, "loss")[0],
                eval_loss=_mean_loss(run, held_out) if measured else math.nan,
            )  # fmt: skip
    return run.result()


def _pad(examples: Sequence[Example], language_model: LanguageModel) -> Tokens:
    learned = [e.learned or [True] * len(e.completion_ids) for e in examples]
    mask = pad_sequence([torch.tensor(row) for row in learned], batch_first=True)
    return Tokens(language_model.pad(examples), mask.to(language_model.device))


@torch.no_grad()
def _mean_loss(run: Run[SFTConfig, SFTUpdate], examples: Sequence[Example]) -> float:
    run.network.eval()
    size = run.config.micro_batch_size or run.config.batch_size
    total, tokens = 0.0, 0
    for start in range(0, len(examples), size):
        batch = _pad(examples[start : start + size], run.language_model)
        log_probs = run.network(batch.sequences).log_probs
        total -= float(log_probs.where(batch.mask, 0).sum())
        tokens += int(batch.mask.sum())
    run.network.train()
    return total / tokens
