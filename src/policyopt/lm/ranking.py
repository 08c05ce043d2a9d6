"""Pairwise ranking loss on ranked lists of completions: what some articles call
GRPO.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

import torch

from policyopt.estimators import sequence_log_prob
from policyopt.lm.config import LMConfig
from policyopt.lm.data import RankedList, Records, ranked_lists
from policyopt.lm.models import LanguageModel
from policyopt.lm.sequences import Sequences
from policyopt.lm.training import Callback, LMResult, LMUpdate, PolicyNetwork, Run
from policyopt.losses import aggregate, ranking_loss

__all__ = ["RankingConfig", "RankingUpdate", "train_ranking"]


@dataclass(frozen=True, kw_only=True)
class RankingConfig(LMConfig):
    """Settings of :func:`train_ranking`. ``batch_size`` counts lists."""

    beta: float = 0.1
    """β > 0: scale of the log-probabilities."""
    length_normalized: bool = False
    """Compare mean log-probabilities per token; sums favour short completions."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("beta", self.beta > 0, "> 0")


@dataclass(frozen=True, kw_only=True)
class RankingUpdate(LMUpdate):
    """One row of :func:`train_ranking`'s history. Means are over all ordered pairs of
    the batch's lists.
    """

    loss: float
    accuracy: float
    """Share of pairs that the policy's log-probabilities order as the list does, before
    the step.
    """
    margin: float
    """Mean β (log π of the better − log π of the worse completion)."""
    best_log_prob: float
    """Mean log π of the first completion of each list, nats (per token if
    normalised).
    """

    headline: ClassVar[tuple[str, ...]] = ("loss", "accuracy")


def train_ranking(
    language_model: LanguageModel,
    data: Records,
    config: RankingConfig = RankingConfig(),
    *,
    seed: int = 0,
    callback: Callback | None = None,
    progress: bool = True,
    checkpoint_dir: str | Path | None = None,
) -> LMResult[RankingConfig, RankingUpdate]:
    """Train a policy to order the completions of each list as the list does, by their
    log-probabilities.

    Every ordered pair costs −log σ(β (log π(better) − log π(worse))). There is no
    reference policy and nothing is sampled: it is RankNet's loss (Burges et al. 2005,
    doi:10.1145/1102351.1102363) with the policy as the scorer, and with lists of two it
    is reference-free DPO. It is not group relative policy optimisation, although
    articles have given it that name.

    Parameters
    ----------
    language_model : LanguageModel
        Trained in place.
    data : records
        Columns ``prompt`` and ``ranked`` (two or more completions, the best first).
    config, seed, callback, progress, checkpoint_dir
        As in :func:`~policyopt.lm.sft.train_sft`.
    """
    lists = ranked_lists(data, language_model.tokenizer, config.limits(language_model))
    run: Run[RankingConfig, RankingUpdate] = Run(
        "ranking", language_model, PolicyNetwork(language_model.model), config, row_type=RankingUpdate,
        items=len(lists), seed=seed, callback=callback, progress=progress, checkpoint_dir=checkpoint_dir,
        prompts=[ranked.prompt for ranked in lists[: config.logged_samples]],
    )  # fmt: skip
    reduction: Literal["sum", "mean"] = "mean" if config.length_normalized else "sum"

    with run:
        for _ in run.steps():
            lists_of_step = [lists[i] for i in run.batch()]
            sizes = [len(ranked.ranked_ids) for ranked in lists_of_step]
            batch = _pad(lists_of_step, language_model)
            pairs = run.sum(sum(size * (size - 1) // 2 for size in sizes))
            totals = torch.zeros(4, device=run.device)
            for rows in run.micro_batches(len(batch), sizes):
                piece = batch.select(rows)
                log_probs = run.network(piece).log_probs
                scores = sequence_log_prob(
                    log_probs, piece.completion_mask, reduction=reduction
                )
                by_list = scores.split(torch.bincount(piece.prompt_index).tolist())
                items = [
                    ranking_loss(scores_of_list, beta=config.beta)
                    for scores_of_list in by_list
                ]
                losses, margins = (
                    torch.cat([i.loss for i in items]),
                    torch.cat([i.margin for i in items]),
                )
                run.backward(aggregate(losses, denominator=pairs))
                best = torch.stack([scores_of_list[0] for scores_of_list in by_list])
                totals += torch.stack(
                    [losses.sum(), (margins > 0).sum(), margins.sum(), best.sum()]
                ).detach()
            norm = run.descend()
            loss, right, margin, best_sum = run.sum(totals).tolist()
            run.log(
                tokens=int(run.sum(batch.completion_mask.sum())),
                gradient_norm=norm,
                loss=loss / float(pairs),
                accuracy=right / float(pairs),
                margin=margin / float(pairs),
                best_log_prob=best_sum / float(run.sum(len(sizes))),
            )
    return run.result()


def _pad(lists: Sequence[RankedList], language_model: LanguageModel) -> Sequences:
    return Sequences.pad(
        [ranked.prompt_ids for ranked in lists],
        [ids for ranked in lists for ids in ranked.ranked_ids],
        [i for i, ranked in enumerate(lists) for _ in ranked.ranked_ids],
        pad_id=language_model.pad_id,
        device=language_model.device,
    )
