"""Ranking by the policy's own log-probabilities, which some articles call GRPO.

Offline on ranked lists, or online: sample a group, rank it with a reward function.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from policyopt.estimators import kl_estimate, sequence_log_prob
from policyopt.frame import Callback, Statistics
from policyopt.lm.batches import Completions, RankedGroup, ordered_rightly
from policyopt.lm.config import OfflineConfig, OnlineConfig
from policyopt.lm.data import RankedList, Records, prompt_examples, ranked_lists
from policyopt.lm.grpo import GroupSize
from policyopt.lm.models import LanguageModel
from policyopt.lm.policies import PolicyNetwork
from policyopt.lm.results import LMResult, LMUpdate
from policyopt.lm.rewards import RewardFunctions
from policyopt.lm.sampling import Sampler
from policyopt.lm.training import Run, SamplingRun
from policyopt.losses import Loss, aggregate, check_loss, item_losses, ranking_loss
from policyopt.runs import Count, NonNegative, Positive

__all__ = ["OnlineRankingConfig", "RankingConfig", "RankingUpdate", "train_ranking"]


@dataclass(frozen=True, kw_only=True)
class RankingConfig(OfflineConfig):
    """Settings of :func:`train_ranking` on ranked lists; a batch is of lists."""

    beta: Positive = 0.1
    """β > 0: scale of the log-probabilities."""
    length_normalized: bool = False
    """Compare mean log-probabilities per token; sums favour short completions."""


@dataclass(frozen=True, kw_only=True)
class OnlineRankingConfig(OnlineConfig):
    """Settings of :func:`train_ranking` on groups of its own; a batch is of prompts."""

    batch_size: Count = 16
    group_size: GroupSize = 8
    """K ≥ 2 completions per prompt."""
    beta: Positive = 0.1
    """β > 0: scale of the log-probabilities."""
    length_normalized: bool = False
    """Compare mean log-probabilities per token; sums favour short completions."""
    loss: Literal["ranking", "dpo"] = "ranking"
    """"dpo" is online DPO: the best and the worst completion of each group are a pair,
    and log π/π_ref takes the place of log π. A group whose rewards are all equal has
    none."""
    kl_coef: NonNegative = 0.0
    """Weight of KL(π_θ ‖ π_ref) per token (k3) in the loss; 0 needs no reference."""


@dataclass(frozen=True, kw_only=True)
class RankingUpdate(LMUpdate):
    """One row of :func:`train_ranking`'s history.

    Means are over the ordered pairs of the batch's lists, before the step.
    """

    loss: float
    """Mean of the pairs' loss, without the KL term."""
    accuracy: float
    """Share of pairs that the policy's log-probabilities order as the list does."""
    margin: float
    """Mean β (log π of the better − log π of the worse completion)."""
    best_log_prob: float
    """Mean log π of the first completion of each list, nats (per token if
    normalised); of online DPO log π/π_ref."""
    reward: float
    """Mean reward of the sampled completions; NaN offline."""
    kl: float
    """Estimate (k1) of KL(π_θ ‖ π_ref) of a completion, nats; NaN without a reference.
    Of online DPO the mean over best and worst."""

    headline: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    may_be_nan: ClassVar[tuple[str, ...]] = ("reward", "kl", "accuracy", "margin")


AnyRankingConfig = RankingConfig | OnlineRankingConfig


class _ListRun(Run[Any, RankingUpdate]):
    """Offline: the lists are those of the data."""

    reward = math.nan
    """Mean over all that was sampled."""

    def lists(self) -> tuple[Completions, list[int]]:
        """Return the completions of this update, and how many each list has."""
        lists: list[RankedList] = self.batch()
        sizes = [len(ranked.ranked_ids) for ranked in lists]
        sequences = self.language_model.pad(lists)
        ranks = [torch.arange(size, 0, -1.0, device=self.device) for size in sizes]
        mask = sequences.completion_mask
        return Completions(sequences, mask, rewards=torch.cat(ranks)), sizes


class _GroupRun(SamplingRun[Any, RankingUpdate]):
    """Online: the lists are groups of samples, ordered by their rewards."""

    def lists(self) -> tuple[Completions, list[int]]:
        """Return the completions of this update, and how many each list has."""
        batch, size = self.sample(), self.config.group_size
        groups = batch.rewards.view(-1, size)
        order = groups.argsort(dim=1, descending=True, stable=True)
        self.reward = self.mean(groups.gather(1, order).flatten())
        if self.config.loss == "dpo":
            order, size = order[:, [0, -1]], 2
        first = torch.arange(0, len(batch), groups.shape[1], device=self.device)
        return batch.select((order + first[:, None]).flatten()), [size] * len(groups)


def train_ranking(
    language_model: LanguageModel,
    data: Records,
    config: AnyRankingConfig = RankingConfig(),
    *,
    reward_functions: RewardFunctions | None = None,
    reference: LanguageModel | None = None,
    loss: Callable[[RankedGroup], Any] | None = None,
    sampler: Sampler | None = None,
    seed: int = 0,
    callback: Callback | None = None,
    progress: bool = True,
    checkpoint_dir: str | Path | None = None,
) -> LMResult[AnyRankingConfig, RankingUpdate]:
    """Train a policy to order completions by their log-probabilities.

    Every ordered pair costs −log σ(β (log π(better) − log π(worse))). It is RankNet's
    loss (Burges et al. 2005, doi:10.1145/1102351.1102363) with the policy as the
    scorer, and with lists of two it is reference-free DPO. It is not group relative
    policy optimisation, although articles have given it that name.

    With a :class:`RankingConfig` the lists come from the data and nothing is sampled.
    With an :class:`OnlineRankingConfig` the policy samples a group per prompt, and its
    rewards rank it; completions with equal rewards are not compared. With its
    ``loss="dpo"`` that is online DPO.

    Parameters
    ----------
    language_model : LanguageModel
        Trained in place.
    data : records
        Offline: columns ``prompt`` and ``ranked`` (two or more completions, the best
        first). Online: column ``prompt``; all others are handed to the reward
        functions.
    config : RankingConfig or OnlineRankingConfig
    reward_functions : callable, sequence or mapping of callables
        Online only; see :func:`~policyopt.lm.rewards.compute_rewards`.
    reference : LanguageModel, optional
        Online only: π_ref, by default the policy as it is given when
        ``config.kl_coef`` > 0 or ``config.loss`` is "dpo", and none otherwise.
    loss : callable, optional
        A function of one :class:`~policyopt.lm.batches.RankedGroup` that returns one
        loss per ordered pair, in the order of :func:`~policyopt.losses.ranking_loss`,
        which is the default: a named tuple with the field ``loss`` (and ``margin``, if
        it has one), or a tensor.
    sampler : Sampler, optional
        Online only; by default the model itself.
    seed, callback, progress, checkpoint_dir
        As in :func:`~policyopt.lm.sft.train_sft`.

    Raises
    ------
    ValueError
        If ``reward_functions`` and the kind of config do not belong together.

    References
    ----------
    Online DPO: Guo et al. (2024), Direct language model alignment from online AI
    feedback, arXiv:2402.04792, algorithm 1, with reward functions as the judge.
    """
    online_only = (reward_functions, reference, sampler)
    if isinstance(config, RankingConfig) and online_only != (None, None, None):
        raise ValueError(
            "reward_functions, reference and sampler must be None with a RankingConfig "
            "(its lists are ranked already); give an OnlineRankingConfig to sample"
        )
    run = _make_run(
        language_model, data, config, reward_functions, sampler, seed=seed,
        callback=callback, progress=progress, checkpoint_dir=checkpoint_dir,
    )  # fmt: skip
    kl_coef, dpo = getattr(config, "kl_coef", 0.0), getattr(config, "loss", "") == "dpo"
    reduction: Any = "mean" if config.length_normalized else "sum"
    compared = kl_coef > 0 or dpo or reference is not None
    frozen = run.reference(reference) if compared else None
    objective = check_loss(
        loss, lambda one: ranking_loss(one.log_prob, beta=config.beta), "RankedGroup"
    )

    with run:
        for _ in run.updates():
            batch, sizes = run.lists()
            if isinstance(run, _GroupRun):
                batch = run.score(batch, frozen, old=False, group=sizes[0])
            above = [_is_above(rewards) for rewards in batch.rewards.split(sizes)]
            pairs = run.sum(torch.cat(above).sum())
            tokens = run.sum(batch.mask.sum())
            statistics = Statistics()
            for rows in run.micro_batches(len(batch), sizes):
                piece = batch.select(rows)
                now = run.network(piece.sequences, **run.scoring).log_probs
                ratio = now - piece.reference_log_probs if dpo else now
                scores = sequence_log_prob(ratio, piece.mask, reduction=reduction)
                counts = torch.bincount(piece.sequences.prompt_index).tolist()
                parts = scores.split(counts), piece.rewards.split(counts)
                groups = list(map(RankedGroup, *parts))
                losses, margins = _untied(groups, objective)
                total = aggregate(losses, denominator=pairs.clamp(min=1))
                if kl_coef > 0:
                    kl = kl_estimate(now, piece.reference_log_probs, "k3")
                    penalty = aggregate(kl, piece.mask, denominator=tokens)
                    total = total + kl_coef * penalty
                run.backward(total)
                statistics.add(
                    loss=losses.sum(),
                    accuracy=ordered_rightly(margins).sum(),
                    margin=margins.sum(),
                    best=torch.stack([group.log_prob[0] for group in groups]).sum(),
                )
            norm = run.descend(None if kl_coef > 0 else pairs > 0)
            names = ("loss", "accuracy", "margin", "best")
            loss_sum, right_sum, margin, best = run.sums(statistics, *names)
            count = max(float(pairs), 1.0)
            run.log(
                tokens=int(tokens), gradient_norm=norm, loss=loss_sum / count,
                accuracy=right_sum / count if pairs else math.nan,
                margin=margin / count if pairs else math.nan,
                best_log_prob=best / float(run.sum(len(sizes))),
                reward=run.reward, kl=run.kl(batch, batch.sampler_log_probs),
            )  # fmt: skip
    return run.result()


def _make_run(
    language_model: LanguageModel,
    data: Records,
    config: AnyRankingConfig,
    reward_functions: RewardFunctions | None,
    sampler: Sampler | None,
    **options: Any,
) -> _ListRun | _GroupRun:
    limits, tokenizer = config.limits(language_model), language_model.tokenizer
    network = PolicyNetwork(language_model.model)
    shared = ("ranking", language_model, network, config, RankingUpdate)
    if isinstance(config, RankingConfig):
        return _ListRun(*shared, ranked_lists(data, tokenizer, limits), **options)
    if reward_functions is None:
        raise ValueError("reward_functions must be given with an OnlineRankingConfig")
    room = config.sampling.max_new_tokens
    examples = prompt_examples(data, tokenizer, limits, reserve=room)
    return _GroupRun(
        *shared, examples, reward_functions=reward_functions, sampler=sampler,
        group_size=config.group_size, **options,
    )  # fmt: skip


def _is_above(rewards: Tensor) -> Tensor:
    """Whether the first of each ordered pair has the strictly higher reward."""
    size = len(rewards)
    better, worse = torch.triu_indices(size, size, 1, device=rewards.device)
    return rewards[better] > rewards[worse]


def _untied(groups: Sequence[RankedGroup], objective: Loss) -> tuple[Tensor, Tensor]:
    """Return the losses and the margins of all ordered pairs that are no ties."""
    losses, margins = [], []
    for group in groups:
        above = _is_above(group.rewards)
        items = item_losses(objective, group, above.shape, statistics=["margin"])
        losses.append(items.loss[above])
        margins.append(items.margin[above])
    return torch.cat(losses), torch.cat(margins)
