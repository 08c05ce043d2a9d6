"""KTO: desirable completions likelier and others less, without pairs or sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from policyopt.estimators import sequence_log_prob
from policyopt.frame import Callback, Statistics
from policyopt.lm.batches import LabelledCompletions, Tokens, ordered_rightly
from policyopt.lm.config import OfflineConfig
from policyopt.lm.data import Records, labelled_items
from policyopt.lm.dpo import reference_log_probs
from policyopt.lm.models import LanguageModel
from policyopt.lm.policies import PolicyNetwork
from policyopt.lm.results import LMResult, LMUpdate
from policyopt.lm.sequences import Sequences
from policyopt.lm.training import Run
from policyopt.losses import KTO, aggregate, check_loss, item_losses, kto_loss
from policyopt.runs import Positive

__all__ = ["KTOConfig", "KTOUpdate", "completion_loss", "train_kto"]


@dataclass(frozen=True, kw_only=True)
class KTOConfig(OfflineConfig):
    """Settings of :func:`train_kto`."""

    beta: Positive = 0.1
    """β > 0: strength of the pull towards the reference."""
    desirable_weight: Positive = 1.0
    """Weight λ_D > 0 of desirable completions."""
    undesirable_weight: Positive = 1.0
    """Weight λ_U > 0 of the others."""


@dataclass(frozen=True, kw_only=True)
class KTOUpdate(LMUpdate):
    """One row of :func:`train_kto`'s history. Means are over the batch's completions,
    before the step.
    """

    loss: float
    accuracy: float
    """Share of completions whose reward has the sign of the label."""
    desirable_reward: float
    """Mean β log(π/π_ref) of the desirable completions, NaN in a batch without one; 0
    in the first step, but for rounding."""
    undesirable_reward: float
    weight: float
    """Mean size of the weight of ∇ log π in the gradient."""
    baseline: float
    """z_0 in nats, before it is cut at 0."""

    headline: ClassVar[tuple[str, ...]] = ("loss", "accuracy")
    may_be_nan: ClassVar[tuple[str, ...]] = (
        "accuracy", "desirable_reward", "undesirable_reward", "weight",
    )  # fmt: skip


def completion_loss(batch: LabelledCompletions, config: KTOConfig) -> KTO:
    """Return :func:`~policyopt.losses.kto_loss` of each completion, as configured."""
    return kto_loss(
        batch.log_prob, batch.reference_log_prob, batch.desirable, batch.baseline,
        beta=config.beta, desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
    )  # fmt: skip


def train_kto(
    language_model: LanguageModel,
    data: Records,
    config: KTOConfig = KTOConfig(),
    *,
    reference: LanguageModel | None = None,
    loss: Callable[[LabelledCompletions], Any] | None = None,
    seed: int = 0,
    callback: Callback | None = None,
    progress: bool = True,
    checkpoint_dir: str | Path | None = None,
) -> LMResult[KTOConfig, KTOUpdate]:
    """Train a policy on completions with a label each, desirable or not.

    The reference's log-probabilities are computed once, before the first step: no
    second model is kept. The baseline z_0 is the mean log-ratio of mismatched pairs:
    after each prompt of the batch the completion of another record, always the same
    one. It costs a pass without gradient, is one number for the whole batch of all
    processes, and does not change with ``micro_batch_size``.

    Parameters
    ----------
    language_model : LanguageModel
        π_θ, trained in place.
    data : records
        Columns ``prompt``, ``completion`` and ``label``, which is true where the
        completion is desirable.
    config : KTOConfig
    reference : LanguageModel, optional
        π_ref; by default the policy as it is given.
    loss : callable, optional
        A function of the :class:`~policyopt.lm.batches.LabelledCompletions` of a
        micro-batch that returns one loss per completion, ``[N]``: a
        :class:`~policyopt.losses.KTO`, another named tuple with the field ``loss``, or
        a tensor. By default :func:`completion_loss`.
    seed, callback, progress, checkpoint_dir
        As in :func:`~policyopt.lm.sft.train_sft`.

    References
    ----------
    Ethayarajh et al. (2024), KTO: Model alignment as prospect theoretic optimization,
    arXiv:2402.01306, eq. 7 and 8.
    """
    limits = config.limits(language_model)
    labelled = labelled_items(data, language_model.tokenizer, limits)
    run: Run[KTOConfig, KTOUpdate] = Run(
        "kto", language_model, PolicyNetwork(language_model.model), config, KTOUpdate,
        labelled, seed=seed, callback=callback, progress=progress,
        checkpoint_dir=checkpoint_dir,
    )  # fmt: skip
    frozen_scores = reference_log_probs(run, reference)
    default = partial(completion_loss, config=config)
    objective = check_loss(loss, default, "LabelledCompletions")

    with run:
        for _ in run.updates():
            both = language_model.pad(run.batch())
            batch = both.select(slice(0, None, 2))
            reference_of = frozen_scores[run.batch_numbers()].to(run.device)
            # Every second completion is of another record than its prompt.
            z0 = _mismatched(run, both.select(slice(1, None, 2)), reference_of[:, 1])
            labels = [item.desirable for item in run.batch()]
            desirable = torch.tensor(labels, device=run.device)
            count = run.sum(len(batch))
            share = run.sum(desirable.sum()) / count
            statistics = Statistics()
            for rows in run.micro_batches(len(batch)):
                sequences, label = batch.select(rows), desirable[rows]
                mask, theirs = sequences.completion_mask, reference_of[rows, 0]
                tokens = Tokens(sequences, mask, run.network(sequences).log_probs)
                scores = sequence_log_prob(tokens.log_probs, mask)
                piece = LabelledCompletions(scores, theirs, label, z0, tokens)
                items = item_losses(objective, piece, scores.shape, KTO._fields[1:])
                run.backward(aggregate(items.loss, denominator=count))
                reward = items.reward
                statistics.add(
                    loss=items.loss.sum(),
                    accuracy=ordered_rightly(reward.where(label, -reward)).sum(),
                    desirable_reward=reward.where(label, 0).sum() / share,
                    undesirable_reward=reward.where(~label, 0).sum() / (1 - share),
                    weight=items.weight.abs().sum(),
                )
            norm = run.descend()
            run.log(
                tokens=int(run.sum(batch.completion_mask.sum())), gradient_norm=norm,
                baseline=float(z0), **run.means(statistics, count),
            )  # fmt: skip
    return run.result()


@torch.no_grad()
def _mismatched(run: Run[Any, Any], batch: Sequences, reference: Tensor) -> Tensor:
    """Return the mean log π/π_ref of completions after prompts of other records."""
    total = torch.zeros((), device=run.device)
    for rows in run.micro_batches(len(batch)):
        piece = batch.select(rows)
        scores = sequence_log_prob(run.network(piece).log_probs, piece.completion_mask)
        total += (scores - reference[rows]).sum()
    return run.sum(total) / run.sum(len(batch))
