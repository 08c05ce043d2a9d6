"""DPO: preferences straight into the policy: no reward model, no sampling."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from policyopt import losses
from policyopt._checks import require
from policyopt.estimators import sequence_log_prob
from policyopt.frame import Callback, Statistics
from policyopt.lm.batches import Pairs, Tokens, ordered_rightly
from policyopt.lm.config import OfflineConfig
from policyopt.lm.data import Records, batch_indices, preference_pairs
from policyopt.lm.log_probs import completion_log_probs
from policyopt.lm.models import LanguageModel, TextScorer, is_adapted
from policyopt.lm.policies import PolicyNetwork, Reference
from policyopt.lm.results import LMResult, LMUpdate
from policyopt.lm.sequences import Sequences, evaluating
from policyopt.lm.training import Run
from policyopt.losses import DPO, aggregate, check_loss, item_losses
from policyopt.runs import Bound, NonNegative, Positive

__all__ = ["DPOConfig", "DPOUpdate", "ImplicitReward", "pair_loss", "train_dpo"]

Smoothing = Annotated[float, Bound("in [0, 0.5)", lambda x: 0 <= x < 0.5)]


@dataclass(frozen=True, kw_only=True)
class DPOConfig(OfflineConfig):
    """Settings of :func:`train_dpo`.

    SimPO is ``reference_free=True, length_normalized=True`` with a ``target_margin``
    and a β of 2 or more. DPO + NLL: ``nll_weight=1``. DPO-positive: ``dpop_weight=5``
    or more. ORPO: ``loss="orpo", reference_free=True, length_normalized=True``.
    """

    beta: Positive = 0.1
    """β > 0: strength of the pull towards the reference; λ of ORPO."""
    loss: Literal["sigmoid", "ipo", "hinge", "orpo"] = "sigmoid"
    """See :func:`~policyopt.losses.dpo_loss` and
    :func:`~policyopt.losses.orpo_loss`."""
    label_smoothing: Smoothing = 0.0
    """Share of preferences believed to be the wrong way round, in [0, 0.5)."""
    length_normalized: bool = False
    """Use the mean log-probability per token instead of the sum."""
    reference_free: bool = False
    """Leave the reference out: its log-probabilities count as 0."""
    target_margin: NonNegative = 0.0
    """Margin γ ≥ 0 subtracted before the loss, in units of reward (SimPO's γ)."""
    nll_weight: NonNegative = 0.0
    """Weight α ≥ 0 of the chosen completion's negative log-likelihood per token (DPO +
    NLL)."""
    dpop_weight: NonNegative = 0.0
    """Penalty λ ≥ 0 for a chosen completion less likely than under the reference
    (DPO-positive)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        fits = self.target_margin == 0 or self.loss != "ipo"
        self._check("target_margin", fits, "0 with loss='ipo'")
        fits = not self.dpop_weight or not (self.reference_free or self.label_smoothing)
        rule = "0 with reference_free=True or with label_smoothing"
        self._check("dpop_weight", fits, rule)
        if self.loss == "orpo":
            fits = self.length_normalized and self.reference_free
            rule = "another without length_normalized=True and reference_free=True"
            self._check("loss", fits, rule)
            for name in ("label_smoothing", "target_margin", "nll_weight"):
                self._check(name, getattr(self, name) == 0, "0 with loss='orpo'")

    @property
    def reduction(self) -> Literal["sum", "mean"]:
        """How log-probabilities of tokens become one of the completion."""
        return "mean" if self.length_normalized else "sum"


@dataclass(frozen=True, kw_only=True)
class DPOUpdate(LMUpdate):
    """One row of :func:`train_dpo`'s history. Means are over the batch's pairs, before
    the step.
    """

    loss: float
    margin: float
    """Mean implicit reward of the chosen minus that of the rejected completion; exactly
    0 in the first step, but in ORPO.
    """
    accuracy: float
    """Share of pairs with a positive margin."""
    chosen_reward: float
    """Mean β log(π/π_ref) of the chosen completions; of ORPO λ log odds."""
    rejected_reward: float
    chosen_log_prob: float
    """Mean log π of the chosen completions, nats per completion (per token if
    normalised). It may fall.
    """
    rejected_log_prob: float
    weight: float
    """Mean weight of −∇ log π(rejected) in the gradient; β σ(−margin) for the sigmoid
    loss."""

    headline: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "margin")
    may_be_nan: ClassVar[tuple[str, ...]] = (
        "margin", "accuracy", "chosen_reward", "rejected_reward", "weight",
    )  # fmt: skip


class ImplicitReward(TextScorer):
    """The reward that a policy trained by DPO believes in: r(x, y) = β log(π_θ(y|x) /
    π_ref(y|x)).

    It is a reward function, to be handed to the trainers that sample. It scores a
    completion by the likelihood of each of its tokens, where a
    :class:`~policyopt.lm.models.RewardModel` has one number at the last token to say it
    all: a small model can check a fact that way which it could not put into that
    number.

    Parameters
    ----------
    policy : LanguageModel
        π_θ; not copied.
    reference : LanguageModel or "base"
        π_ref, the model that DPO started from. "base" is the policy with its adapters
        off, so LoRA needs no second model: right where DPO started from fresh adapters,
        and wrong where these had been trained before, say by SFT.
        Not copied either: trainers refuse a reward that holds the model they train.
    beta : float
        The β of the training.
    batch_size : int
        Completions scored at a time.

    References
    ----------
    Rafailov et al. (2023), arXiv:2305.18290, eq. 5 (without the term that depends on
    the prompt alone).
    """

    __name__ = "implicit_reward"

    def __init__(
        self,
        policy: LanguageModel,
        reference: LanguageModel | Literal["base"] | None = None,
        *,
        beta: float = 0.1,
        batch_size: int = 64,
    ) -> None:
        require(beta > 0, "beta must be > 0", beta)
        off = reference == "base" and is_adapted(policy.model)
        rule = "reference must be the model that DPO started from, or 'base'"
        remedy = "'base' needs a policy whose adapters DPO trained from fresh"
        require(off or isinstance(reference, LanguageModel), rule, reference, remedy)
        self.language_model = self.policy = policy
        self.beta, self.batch_size = beta, batch_size
        self.reference = Reference(policy, reference, copy=False)

    @property
    def network(self) -> nn.Module:
        """The policy's network."""
        return self.policy.model  # type: ignore[no-any-return]

    @torch.no_grad()
    def scores(self, sequences: Sequences) -> Tensor:
        """Scores ``[B]``, float32, no gradient."""
        with evaluating(self.policy.model):
            log_probs = completion_log_probs(self.policy.model, sequences).log_probs
        log_ratio = log_probs - self.reference.log_probs(sequences)
        return self.beta * sequence_log_prob(log_ratio, sequences.completion_mask)


def pair_loss(batch: Pairs, config: DPOConfig) -> DPO:
    """Return :func:`~policyopt.losses.dpo_loss` of each pair, or
    :func:`~policyopt.losses.orpo_loss`, as configured.
    """
    chosen, rejected = batch.chosen_log_prob, batch.rejected_log_prob
    if config.loss == "orpo":
        return losses.orpo_loss(chosen, rejected, weight=config.beta)
    summed = config.nll_weight and not config.length_normalized
    return losses.dpo_loss(
        chosen, rejected,
        batch.reference_chosen_log_prob, batch.reference_rejected_log_prob,
        beta=config.beta, kind=config.loss, label_smoothing=config.label_smoothing,
        target_margin=config.target_margin, nll_weight=config.nll_weight,
        chosen_tokens=batch.tokens.mask[0::2].sum(1) if summed else None,
        dpop_weight=config.dpop_weight,
    )  # fmt: skip


def train_dpo(
    language_model: LanguageModel,
    data: Records,
    config: DPOConfig = DPOConfig(),
    *,
    reference: LanguageModel | None = None,
    loss: Callable[[Pairs], Any] | None = None,
    seed: int = 0,
    callback: Callback | None = None,
    progress: bool = True,
    checkpoint_dir: str | Path | None = None,
) -> LMResult[DPOConfig, DPOUpdate]:
    """Train a policy on preference pairs by direct preference optimisation.

    The reference's log-probabilities are computed once, before the first step: no
    second model is kept.

    Parameters
    ----------
    language_model : LanguageModel
        π_θ, trained in place.
    data : records
        Columns ``prompt``, ``chosen`` and ``rejected``.
    config : DPOConfig
    reference : LanguageModel, optional
        π_ref; by default the policy as it is given.
    loss : callable, optional
        A function of the :class:`~policyopt.lm.batches.Pairs` of a micro-batch that
        returns one loss per pair, ``[N]``: a :class:`~policyopt.losses.DPO`, another
        named tuple with the field ``loss``, or a tensor. By default :func:`pair_loss`.
    seed, callback, progress, checkpoint_dir
        As in :func:`~policyopt.lm.sft.train_sft`.

    References
    ----------
    Rafailov et al. (2023), Direct preference optimization, arXiv:2305.18290, eq. 7.
    """
    limits = config.limits(language_model)
    pairs = preference_pairs(data, language_model.tokenizer, limits)
    run: Run[DPOConfig, DPOUpdate] = Run(
        "dpo", language_model, PolicyNetwork(language_model.model), config, DPOUpdate,
        pairs, seed=seed, callback=callback, progress=progress,
        checkpoint_dir=checkpoint_dir,
    )  # fmt: skip
    reduction, frozen_scores = config.reduction, torch.zeros(len(pairs), 2)
    if not config.reference_free:
        frozen_scores = reference_log_probs(run, reference, reduction)
    objective = check_loss(loss, partial(pair_loss, config=config), "Pairs")

    with run:
        for _ in run.updates():
            batch = language_model.pad(run.batch())
            reference_of = frozen_scores[run.batch_numbers()].to(run.device).flatten()
            count = run.sum(len(batch) // 2)
            statistics = Statistics()
            for rows in run.micro_batches(len(batch), 2):
                sequences = batch.select(rows)
                mask = sequences.completion_mask
                tokens = Tokens(sequences, mask, run.network(sequences).log_probs)
                scores = sequence_log_prob(tokens.log_probs, mask, reduction=reduction)
                theirs = reference_of[rows]
                chosen, rejected = scores[0::2], scores[1::2]
                pair = Pairs(chosen, rejected, theirs[0::2], theirs[1::2], tokens)
                items = item_losses(objective, pair, chosen.shape, DPO._fields[1:])
                run.backward(aggregate(items.loss, denominator=count))
                statistics.add(
                    **{name: values.sum() for name, values in vars(items).items()},
                    accuracy=ordered_rightly(items.margin).sum(),
                    chosen_log_prob=chosen.sum(),
                    rejected_log_prob=rejected.sum(),
                )
            norm = run.descend()
            run.log(
                tokens=int(run.sum(batch.completion_mask.sum())), gradient_norm=norm,
                **run.means(statistics, count),
            )  # fmt: skip
    return run.result()


def reference_log_probs(
    run: Run[Any, Any], reference: LanguageModel | None, reduction: Any = "sum"
) -> Tensor:
    """Return log π_ref of the two completions of each item, ``[N, 2]``, on the CPU.

    The batches are those of the training's first pass, so that rounding is the same
    too: DPO's first margin is exactly 0. The last of them may hold items that an
    earlier one had; what they were there is what counts.
    """
    config, items = run.config, run.items
    result, frozen = torch.zeros(len(items), 2), run.reference(reference, copy=False)
    one_pass = min(run.total, -(-len(items) // config.batch_size))
    for update in reversed(range(one_pass)):
        batch = batch_indices(len(items), config.batch_size, update, run.seed)
        size = max(1, (config.micro_batch_size or 2 * len(batch)) // 2)
        for start in range(0, len(batch), size):
            part = batch[start : start + size]
            sequences = run.language_model.pad([items[i] for i in part])
            log_probs, mask = frozen.log_probs(sequences), sequences.completion_mask
            scores = sequence_log_prob(log_probs, mask, reduction=reduction)
            result[part] = scores.view(-1, 2).cpu()
    return result
