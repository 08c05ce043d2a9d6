"""DPO: preferences straight into the policy, without a reward model and without
sampling.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from policyopt.estimators import sequence_log_prob
from policyopt.lm.config import LMConfig
from policyopt.lm.data import Pair, Prompt, Records, batch_indices, preference_pairs
from policyopt.lm.log_probs import completion_log_probs
from policyopt.lm.models import LanguageModel, is_adapted, text_batches
from policyopt.lm.reward_model import pad_pairs
from policyopt.lm.sequences import Sequences, evaluating
from policyopt.lm.training import (
    Callback,
    LMResult,
    LMUpdate,
    PolicyNetwork,
    Reference,
    Run,
)
from policyopt.losses import DPO, aggregate, dpo_loss

__all__ = ["DPOConfig", "DPOUpdate", "ImplicitReward", "train_dpo"]

PairLoss = Callable[[Tensor, Tensor, Tensor, Tensor], DPO]


@dataclass(frozen=True, kw_only=True)
class DPOConfig(LMConfig):
    """Settings of :func:`train_dpo`.

    SimPO is ``reference_free=True, length_normalized=True`` with a ``target_margin``
    and a β of 2 or more.
    """

    beta: float = 0.1
    """β > 0: how dear it is to leave the reference."""
    loss: Literal["sigmoid", "ipo", "hinge"] = "sigmoid"
    """See :func:`~policyopt.losses.dpo_loss`."""
    label_smoothing: float = 0.0
    """Share of preferences believed to be the wrong way round, in [0, 0.5)."""
    length_normalized: bool = False
    """Use the mean log-probability per token instead of the sum."""
    reference_free: bool = False
    """Leave the reference out: its log-probabilities count as 0."""
    target_margin: float = 0.0
    """γ ≥ 0: the margin, in units of reward, that counts as none."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("beta", self.beta > 0, "> 0")
        self._check("label_smoothing", 0 <= self.label_smoothing < 0.5, "in [0, 0.5)")
        self._check("target_margin", self.target_margin >= 0, ">= 0")
        self._check(
            "target_margin",
            self.target_margin == 0 or self.loss != "ipo",
            "0 with loss='ipo'",
        )


@dataclass(frozen=True, kw_only=True)
class DPOUpdate(LMUpdate):
    """One row of :func:`train_dpo`'s history. Means are over the batch's pairs, before
    the step.
    """

    loss: float
    margin: float
    """Mean implicit reward of the chosen minus that of the rejected completion; exactly
    0 in the first step.
    """
    accuracy: float
    """Share of pairs with a positive margin."""
    chosen_reward: float
    """Mean β log(π/π_ref) of the chosen completions."""
    rejected_reward: float
    chosen_log_prob: float
    """Mean log π of the chosen completions, nats per completion (per token if
    normalised). It may fall.
    """
    rejected_log_prob: float
    weight: float
    """Mean weight of ∇ log π in the gradient; β σ(−margin) for the sigmoid loss."""

    headline: ClassVar[tuple[str, ...]] = ("loss", "accuracy", "margin")


class ImplicitReward:
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
    reference : LanguageModel, optional
        π_ref; by default the policy with its adapters off, so LoRA needs no second
        model.
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
        reference: LanguageModel | None = None,
        *,
        beta: float = 0.1,
        batch_size: int = 64,
    ) -> None:
        if not beta > 0:
            raise ValueError(f"beta must be > 0, got {beta!r}")
        if reference is None and not is_adapted(policy.model):
            raise ValueError(
                "reference must be given for a policy without adapters: the model that "
                "DPO started from"
            )
        self.policy, self.beta, self.batch_size = policy, beta, batch_size
        self.reference = Reference(policy, reference, DPOConfig(), frozen=False)

    @property
    def language_model(self) -> LanguageModel:
        """The policy."""
        return self.policy

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

    def __call__(
        self,
        completions: Sequence[str],
        prompts: Sequence[Prompt],
        finished: Sequence[bool] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Score texts, one prompt to each: the interface of a reward function."""
        batches = text_batches(
            self.policy, completions, prompts, finished, self.batch_size
        )
        return [
            score for sequences in batches for score in self.scores(sequences).tolist()
        ]


def train_dpo(
    language_model: LanguageModel,
    data: Records,
    config: DPOConfig = DPOConfig(),
    *,
    reference: LanguageModel | None = None,
    loss: PairLoss | None = None,
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
        π_ref; by default the policy as it is given (for LoRA: with the adapters off).
    loss : callable, optional
        (chosen, rejected, reference chosen, reference rejected log-probabilities, each
        ``[B]``) ↦
        :class:`~policyopt.losses.DPO`; by default :func:`~policyopt.losses.dpo_loss` as the config describes it.
    seed, callback, progress, checkpoint_dir
        As in :func:`~policyopt.lm.sft.train_sft`.

    References
    ----------
    Rafailov et al. (2023), Direct preference optimization, arXiv:2305.18290, eq. 7.
    """
    pairs = preference_pairs(
        data, language_model.tokenizer, config.limits(language_model)
    )
    pair_loss = loss or partial(
        dpo_loss, beta=config.beta, kind=config.loss, label_smoothing=config.label_smoothing,
        target_margin=config.target_margin,
    )  # fmt: skip
    reference_log_probs = _reference_log_probs(
        language_model, pairs, config, reference, seed
    )
    run: Run[DPOConfig, DPOUpdate] = Run(
        "dpo", language_model, PolicyNetwork(language_model.model), config, row_type=DPOUpdate, items=len(pairs),
        seed=seed, callback=callback, progress=progress, checkpoint_dir=checkpoint_dir,
        prompts=[pair.prompt for pair in pairs[: config.logged_samples]],
    )  # fmt: skip
    reduction: Literal["sum", "mean"] = "mean" if config.length_normalized else "sum"

    with run:
        for _ in run.steps():
            indices = run.batch()
            batch = pad_pairs([pairs[i] for i in indices], language_model)
            reference_scores = reference_log_probs[indices].to(run.device).flatten()
            count = run.sum(len(indices))
            totals = torch.zeros(8, device=run.device)
            for rows in run.micro_batches(len(batch), 2):
                piece = batch.select(rows)
                scores = sequence_log_prob(
                    run.network(piece).log_probs,
                    piece.completion_mask,
                    reduction=reduction,
                )
                chosen, rejected = scores[0::2], scores[1::2]
                items = pair_loss(
                    chosen,
                    rejected,
                    reference_scores[rows][0::2],
                    reference_scores[rows][1::2],
                )
                run.backward(aggregate(items.loss, denominator=count))
                totals += torch.stack(
                    [items.loss.sum(), items.margin.sum(), (items.margin > 0).sum(), items.chosen_reward.sum(),
                     items.rejected_reward.sum(), chosen.sum(), rejected.sum(), items.weight.sum()]
                ).detach()  # fmt: skip
            norm = run.descend()
            mean = (run.sum(totals) / count).tolist()
            run.log(
                tokens=int(run.sum(batch.completion_mask.sum())),
                gradient_norm=norm,
                loss=mean[0],
                margin=mean[1],
                accuracy=mean[2],
                chosen_reward=mean[3],
                rejected_reward=mean[4],
                chosen_log_prob=mean[5],
                rejected_log_prob=mean[6],
                weight=mean[7],
            )
    return run.result()


def _reference_log_probs(
    language_model: LanguageModel,
    pairs: Sequence[Pair],
    config: DPOConfig,
    reference: LanguageModel | None,
    seed: int,
) -> Tensor:
    """Return log π_ref of the chosen and the rejected completion of each pair, ``[N,
    2]``, on the CPU.

    The batches are those of the training's first pass, so that rounding is the same
    too: the first margin is exactly 0.
    """
    result = torch.zeros(len(pairs), 2)
    if config.reference_free:
        return result
    model = Reference(language_model, reference, config, frozen=False)
    reduction: Literal["sum", "mean"] = "mean" if config.length_normalized else "sum"
    done: set[int] = set()
    for step in range(
        min(config.total_steps(len(pairs)), -(-len(pairs) // config.batch_size))
    ):
        batch = batch_indices(len(pairs), config.batch_size, step, seed)
        if done.issuperset(batch):
            continue
        size = max(1, (config.micro_batch_size or 2 * len(batch)) // 2)
        for start in range(0, len(batch), size):
            part = batch[start : start + size]
            sequences = pad_pairs([pairs[i] for i in part], language_model)
            log_probs = model.log_probs(sequences)
            result[part] = (
                sequence_log_prob(
                    log_probs, sequences.completion_mask, reduction=reduction
                )
                .view(-1, 2)
                .cpu()
            )
        done.update(batch)
    return result
