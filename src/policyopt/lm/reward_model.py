"""Reward models: scores learned from comparisons."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from policyopt import losses
from policyopt.frame import Callback, Statistics
from policyopt.lm.batches import ScoredPairs, ordered_rightly
from policyopt.lm.config import OfflineConfig
from policyopt.lm.data import Pair, Records, preference_pairs
from policyopt.lm.models import LanguageModel, RewardModel, TextScorer
from policyopt.lm.results import LMResult, LMUpdate
from policyopt.lm.sequences import evaluating
from policyopt.lm.sharding import gathered
from policyopt.lm.training import Run
from policyopt.losses import aggregate, check_loss, item_losses
from policyopt.runs import Count, NonNegative

__all__ = [
    "RewardConfig", "RewardUpdate", "pair_accuracy", "train_reward_model",
]  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class RewardConfig(OfflineConfig):
    """Settings of :func:`train_reward_model`."""

    centering: NonNegative = 0.0
    """Weight of the squared sum of a pair's scores, which keeps scores around 0."""
    eval_every: Count | None = None
    """Updates between measurements on ``eval_data``; None measures after the last
    only."""

    def __post_init__(self) -> None:
        super().__post_init__()
        writes = self.logged_samples > 0
        self._check("logged_samples", not writes, "0: a reward model writes nothing")


@dataclass(frozen=True, kw_only=True)
class RewardUpdate(LMUpdate):
    """One row of :func:`train_reward_model`'s history. Means are over the batch's
    pairs.
    """

    loss: float
    """Mean −log σ(chosen − rejected), plus the centring term."""
    accuracy: float
    """Share of pairs whose chosen completion scores higher, before the step; a tie
    counts half. NaN if a loss of one's own gives no margin."""
    margin: float
    """Mean score of the chosen minus that of the rejected completion."""
    eval_accuracy: float
    """Accuracy on held-out pairs; NaN where it was not measured."""

    headline: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    may_be_nan: ClassVar[tuple[str, ...]] = ("eval_accuracy", "accuracy", "margin")


def train_reward_model(
    language_model: LanguageModel,
    data: Records,
    config: RewardConfig = RewardConfig(),
    *,
    eval_data: Records | None = None,
    loss: Callable[[ScoredPairs], Any] | None = None,
    seed: int = 0,
    callback: Callback | None = None,
    progress: bool = True,
    checkpoint_dir: str | Path | None = None,
) -> LMResult[RewardConfig, RewardUpdate]:
    """Fit r_φ to comparisons under the Bradley–Terry model, P(chosen over rejected) =
    σ(r_φ(chosen) − r_φ(rejected)).

    Dropout is on, if the model or its adapters have any: no score is compared with one
    of another forward pass.

    Parameters
    ----------
    language_model : LanguageModel
        Where the reward model starts; copied, so that it stays available as the policy.
    data : records
        Columns ``prompt``, ``chosen`` and ``rejected``.
    eval_data : records, optional
        Held-out pairs, whose accuracy is reported.
    loss : callable, optional
        A function of the :class:`~policyopt.lm.batches.ScoredPairs` of a micro-batch
        that returns one loss per pair, ``[N]``: a named tuple with the field ``loss``
        (and ``margin``, if it has one), or a tensor. By default
        :func:`~policyopt.losses.bradley_terry_loss`.
    config, seed, callback, progress, checkpoint_dir
        As in :func:`~policyopt.lm.sft.train_sft`.

    Returns
    -------
    LMResult
        Its ``reward_model`` is a reward function for the trainers.

    References
    ----------
    Bradley and Terry (1952), doi:10.2307/2334029; Ouyang et al. (2022),
    arXiv:2203.02155, eq. 1.
    """
    how = language_model.tokenizer, config.limits(language_model)
    pairs = preference_pairs(data, *how)
    held_out = [] if eval_data is None else preference_pairs(eval_data, *how)
    start = language_model.copy()
    reward_model = RewardModel(start)
    run: Run[RewardConfig, RewardUpdate] = Run(
        "reward", start, reward_model.network, config, RewardUpdate, pairs, seed=seed,
        callback=callback, progress=progress, checkpoint_dir=checkpoint_dir,
        dropout=True,
    )  # fmt: skip

    def bradley_terry(batch: ScoredPairs) -> losses.BradleyTerry:
        chosen, rejected = batch.chosen_scores, batch.rejected_scores
        return losses.bradley_terry_loss(chosen, rejected, centering=config.centering)

    objective = check_loss(loss, bradley_terry, "ScoredPairs")

    with run:
        for _ in run.updates():
            batch = start.pad(run.batch())
            count = run.sum(len(batch) // 2)
            statistics = Statistics()
            for rows in run.micro_batches(len(batch), 2):
                scores: Tensor = run.network(batch.select(rows))
                piece = ScoredPairs(scores[0::2], scores[1::2])
                items = item_losses(objective, piece, scores[0::2].shape, ["margin"])
                run.backward(aggregate(items.loss, denominator=count))
                statistics.add(
                    loss=items.loss.sum(),
                    accuracy=ordered_rightly(items.margin, tie=0.5).sum(),
                    margin=items.margin.sum(),
                )
            norm = run.descend()
            accuracy = math.nan
            if held_out and run.is_due(config.eval_every):
                accuracy = _pairs_accuracy(reward_model, held_out, config)
            run.log(
                tokens=int(run.sum(batch.completion_mask.sum())), gradient_norm=norm,
                eval_accuracy=accuracy, **run.means(statistics, count),
            )  # fmt: skip
    result = run.result()
    result.reward_model = reward_model
    return result


def pair_accuracy(
    reward_model: TextScorer, data: Records, config: RewardConfig = RewardConfig()
) -> float:
    """Share of preference pairs whose chosen completion scores higher; a tie counts
    half.

    Parameters
    ----------
    reward_model : RewardModel or ImplicitReward
        A reward model, or what a policy trained by DPO believes
        (:class:`~policyopt.lm.dpo.ImplicitReward`).
    data : records
        Columns ``prompt``, ``chosen`` and ``rejected``.
    config : RewardConfig
        Its batch size and limits of length are used.

    Raises
    ------
    ValueError
        If a record is not usable; the message names it.
    """
    model = reward_model.language_model
    pairs = preference_pairs(data, model.tokenizer, config.limits(model))
    return _pairs_accuracy(reward_model, pairs, config)


@torch.no_grad()
def _pairs_accuracy(
    reward_model: TextScorer, pairs: Sequence[Pair], config: RewardConfig
) -> float:
    network = reward_model.network
    right, size = 0.0, config.micro_batch_size or config.batch_size
    with gathered(network), evaluating(network):
        for start in range(0, len(pairs), size):
            batch = reward_model.language_model.pad(pairs[start : start + size])
            scores = reward_model.scores(batch)
            margins = scores[0::2] - scores[1::2]
            right += float(ordered_rightly(margins, tie=0.5).sum())
    return right / len(pairs)
