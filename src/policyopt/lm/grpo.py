"""GRPO: PPO's clipped surrogate with the other samples of the same prompt in place of a
critic.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import torch
from torch import Tensor

from policyopt.estimators import (
    group_relative_advantages,
    importance_weights,
    kl_estimate,
    leave_one_out_advantages,
)
from policyopt.lm.config import LMConfig
from policyopt.lm.data import Records, prompt_examples
from policyopt.lm.models import LanguageModel
from policyopt.lm.rewards import RewardFunctions
from policyopt.lm.rollouts import collect, minibatches
from policyopt.lm.sampling import (
    Sampler,
    SamplingConfig,
    TransformersSampler,
    UpdatedSampler,
)
from policyopt.lm.sequences import widen
from policyopt.lm.training import (
    Callback,
    LMResult,
    LMUpdate,
    PolicyNetwork,
    Reference,
    Run,
)
from policyopt.losses import (
    ClippedSurrogate,
    aggregate,
    clipped_surrogate_loss,
    sequence_log_ratio,
)

__all__ = [
    "GRPOConfig",
    "GRPOUpdate",
    "group_advantages",
    "grpo_surrogate",
    "train_grpo",
]


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(LMConfig):
    """Settings of :func:`train_grpo`. ``batch_size`` counts prompts.

    The defaults are those of DeepSeekMath but for the mean over tokens. Dr. GRPO:
    ``scale_rewards=False``, ``loss_mean="constant"``. DAPO's loss:
    ``clip_ratio_high=0.28``, ``loss_mean="token"``, ``beta=0``,
    ``drop_unfinished=True``. GSPO: ``ratio="sequence"``, ``loss_mean="sequence"``.
    RLOO: ``baseline="leave-one-out"``.
    """

    batch_size: int = 16
    group_size: int = 8
    """K ≥ 2 completions per prompt."""
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How completions are drawn, and scored likewise."""
    baseline: Literal["group", "leave-one-out"] = "group"
    """Compare each reward with the mean of its group, or with the mean of the others in
    it.
    """
    scale_rewards: bool = True
    """Divide by the group's standard deviation (only with ``baseline="group"``); False
    is "Dr. GRPO".
    """
    loss_mean: Literal["token", "sequence", "constant"] = "token"
    """Denominator of the loss: all tokens of the batch; each completion's tokens, then
    the completions; or completions times ``max_new_tokens``, which alone does not
    depend on the lengths."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio of each token, or of the whole completion (GSPO, with a clip
    range of about 1e-3).
    """
    clip_ratio: float = 0.2
    """ε of the clipped surrogate, > 0."""
    clip_ratio_high: float | None = None
    """Upper clip range, if it is another ("clip-higher")."""
    beta: float = 0.0
    """Weight of KL(π_θ ‖ π_ref) in the loss, ≥ 0, per token; 0 needs no reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """See :func:`~policyopt.estimators.kl_estimate` for what the gradient of each
    is.
    """
    epochs_per_batch: int = 1
    """Passes over each batch of completions."""
    minibatches: int = 1
    """Optimiser steps per pass."""
    importance_cap: float | None = 2.0
    """Largest weight that corrects for a sampler whose probabilities differ from the
    trainer's; None: no correction.
    """
    drop_unfinished: bool = False
    """Leave completions that ``max_new_tokens`` cut out of the loss (their reward still
    counts in the group).
    """
    reward_weights: tuple[float, ...] | None = None
    """One per reward function; None weighs each with 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check(
            "group_size",
            self.group_size >= 2,
            ">= 2: one sample has nothing to be compared with",
        )
        self._check(
            "sampling",
            self.sampling.temperature > 0,
            "of a temperature > 0: equal samples teach nothing",
        )
        self._check("clip_ratio", self.clip_ratio > 0, "> 0")
        self._check(
            "clip_ratio_high",
            self.clip_ratio_high is None or self.clip_ratio_high > 0,
            "> 0 or None",
        )
        self._check("beta", self.beta >= 0, ">= 0")
        for name in ("epochs_per_batch", "minibatches"):
            self._check(name, getattr(self, name) >= 1, ">= 1")
        self._check("minibatches", self.minibatches <= self.batch_size, "<= batch_size")
        self._check(
            "importance_cap",
            self.importance_cap is None or self.importance_cap >= 1,
            ">= 1 or None",
        )


@dataclass(frozen=True, kw_only=True)
class GRPOUpdate(LMUpdate):
    """One row of :func:`train_grpo`'s history. Means are over the batch's completions
    unless said otherwise.
    """

    reward: float
    """Mean reward."""
    rewards: dict[str, float]
    """Mean of each reward function."""
    reward_std: float
    """Mean over groups of the standard deviation within the group (denominator K −
    1).
    """
    zero_variance: float
    """Share of groups whose rewards are all equal: they teach nothing."""
    length: float
    """Mean completion tokens."""
    finished: float
    """Share of completions that ended by themselves."""
    loss: float
    """Surrogate plus KL term, summed over the step's updates. At the first update the
    surrogate is 0 for the sequence mean, and minus the covariance of advantage and
    length (scaled) for the others: its gradient is what counts."""
    kl: float
    """Estimate (k1) of KL(π_θ ‖ π_ref) of a completion, nats, before the step; NaN
    without a reference.
    """
    entropy: float
    """Estimate of the mean entropy per token, −log π of the sampled tokens, nats."""
    clip_fraction: float
    """Share of tokens whose gradient the clip switched off."""
    ratio_max: float
    """Largest ratio of the step; exactly 1 with one update per batch."""

    headline: ClassVar[tuple[str, ...]] = ("reward", "kl", "length")
    may_be_nan: ClassVar[tuple[str, ...]] = ("kl",)


def group_advantages(rewards: Tensor, config: GRPOConfig) -> Tensor:
    """Advantages ``[P, K]`` of rewards ``[P, K]``: each against its group."""
    if config.baseline == "leave-one-out":
        return leave_one_out_advantages(rewards)
    return group_relative_advantages(rewards, scale=config.scale_rewards)


def grpo_surrogate(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: GRPOConfig,
) -> ClippedSurrogate:
    """Return the clipped surrogate of each token, ``[B, T]``, with the ratio of the
    token or of its completion.

    Parameters
    ----------
    log_probs, old_log_probs : Tensor
        ``[B, T]``; gradient flows through the first alone.
    advantages : Tensor
        ``[B]``, the same for all tokens of a completion.
    mask : Tensor
        Boolean ``[B, T]``.
    """
    if config.ratio == "sequence":
        log_probs = sequence_log_ratio(log_probs, old_log_probs, mask)
        old_log_probs = torch.zeros_like(log_probs)
    return clipped_surrogate_loss(
        log_probs,
        old_log_probs,
        advantages[:, None].expand_as(log_probs),
        clip_ratio=config.clip_ratio,
        clip_ratio_high=config.clip_ratio_high,
    )


def train_grpo(
    language_model: LanguageModel,
    data: Records,
    reward_functions: RewardFunctions,
    config: GRPOConfig = GRPOConfig(),
    *,
    reference: LanguageModel | None = None,
    sampler: Sampler | None = None,
    seed: int = 0,
    callback: Callback | None = None,
    progress: bool = True,
    checkpoint_dir: str | Path | None = None,
) -> LMResult[GRPOConfig, GRPOUpdate]:
    """Train a policy on its own completions by group relative policy optimisation.

    Parameters
    ----------
    language_model : LanguageModel
        π_θ, trained in place.
    data : records
        Column ``prompt``; all other columns are handed to the reward functions.
    reward_functions : callable, sequence or mapping of callables
        Each ``(completions, prompts, **columns) -> scores``; see
        :func:`~policyopt.lm.rewards.compute_rewards`.
    config : GRPOConfig
    reference : LanguageModel, optional
        π_ref. By default the policy as it is given (for LoRA: with the adapters off)
        when ``config.beta`` > 0, and none otherwise. One that is given is reported on
        even with β = 0.
    sampler : Sampler, optional
        By default the model itself.
    seed, callback, progress, checkpoint_dir
        As in :func:`~policyopt.lm.sft.train_sft`.

    References
    ----------
    Shao et al. (2024), DeepSeekMath, arXiv:2402.03300, §4.1. Dr. GRPO: Liu et al.
    (2025), arXiv:2503.20783. DAPO: Yu et al. (2025), arXiv:2503.14476. GSPO: Zheng et
    al. (2025), arXiv:2507.18071. RLOO: Ahmadian et al. (2024), arXiv:2402.14740.
    """
    examples = prompt_examples(
        data,
        language_model.tokenizer,
        config.limits(language_model),
        reserve=config.sampling.max_new_tokens,
    )
    frozen = (
        Reference(language_model, reference, config)
        if config.beta > 0 or reference is not None
        else None
    )
    run: Run[GRPOConfig, GRPOUpdate] = Run(
        "grpo", language_model, PolicyNetwork(language_model.model), config, row_type=GRPOUpdate, items=len(examples),
        seed=seed, callback=callback, progress=progress, checkpoint_dir=checkpoint_dir,
        prompts=[example.prompt for example in examples[: config.logged_samples]],
    )  # fmt: skip
    sampler = sampler or TransformersSampler(language_model)
    size, sampling = config.group_size, config.sampling
    scoring = {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
    }
    one_update = config.epochs_per_batch * config.minibatches == 1

    with run:
        for _ in run.steps():
            indices = run.batch()
            batch = collect(
                language_model, sampler, [examples[i] for i in indices], size, sampling, reward_functions,
                weights=config.reward_weights, seed=run.stream(), first_row=run.rank * len(indices) * size,
            )  # fmt: skip
            sequences, groups = batch.sequences, batch.rewards.view(-1, size)
            advantages = group_advantages(groups, config).flatten()
            counted = sequences.completion_mask
            if config.drop_unfinished:
                counted = counted & batch.finished[:, None]
            reference_log_probs = None
            if frozen is not None:
                pieces = run.micro_batches(len(sequences))
                reference_log_probs = frozen.log_probs(sequences, pieces, **scoring)
            old_log_probs = None
            if not one_update:
                with torch.no_grad():
                    old_log_probs = torch.cat(
                        [widen(run.network(sequences.select(rows), **scoring).log_probs, counted)
                         for rows in run.micro_batches(len(sequences), size)]
                    )  # fmt: skip

            totals, ratio_max = (
                torch.zeros(3, device=run.device),
                torch.zeros((), device=run.device),
            )
            for _ in range(config.epochs_per_batch):
                for numbers in minibatches(len(sequences), config.minibatches, size):
                    part = torch.tensor(numbers, device=run.device)
                    reduction, denominator = _denominator(counted[part], config, run)
                    # Without a KL term a completion of advantage 0 has no gradient: it
                    # is counted but not computed.
                    active = (
                        part
                        if config.beta > 0 or run.world > 1
                        else part[advantages[part] != 0]
                    )
                    for places in run.micro_batches(len(active)):
                        rows = active[places]
                        piece = sequences.select(rows)
                        T = piece.completion_ids.shape[1]
                        mask = counted[rows, :T]
                        log_probs = run.network(piece, **scoring).log_probs
                        old = (
                            log_probs.detach()
                            if old_log_probs is None
                            else old_log_probs[rows, :T]
                        )
                        items = grpo_surrogate(
                            log_probs, old, advantages[rows], mask, config
                        )
                        losses = items.loss
                        if config.importance_cap is not None:
                            sampled = batch.sampler_log_probs[rows, :T]
                            losses = losses * importance_weights(
                                old, sampled, cap=config.importance_cap
                            )
                        if config.beta > 0 and reference_log_probs is not None:
                            kl = kl_estimate(
                                log_probs,
                                reference_log_probs[rows, :T],
                                config.kl_estimator,
                            )
                            losses = losses + config.beta * kl
                        loss = aggregate(
                            losses, mask, reduction=reduction, denominator=denominator
                        )
                        run.backward(loss)
                        clipped = (items.clipped * mask).sum()
                        totals += torch.stack(
                            [loss.detach(), clipped, mask.sum().to(clipped)]
                        )
                        if mask.any():
                            ratio_max = torch.maximum(
                                ratio_max, items.ratio[mask].max()
                            )
                    norm = run.descend() if len(active) else 0.0
            if isinstance(sampler, UpdatedSampler):
                sampler.update_weights(language_model.model)

            count = float(run.sum(len(sequences)))
            tokens = float(run.sum(sequences.completion_mask.sum()))
            loss_sum, clipped_sum, seen = run.sum(totals).tolist()
            kl_sum = torch.nan
            if reference_log_probs is not None:
                kl_sum = float(
                    run.sum((batch.sampler_log_probs - reference_log_probs).sum())
                )
            run.log(
                tokens=int(tokens),
                gradient_norm=norm,
                reward=float(run.sum(batch.rewards.sum())) / count,
                rewards={
                    name: float(run.sum(part.sum())) / count
                    for name, part in batch.parts.items()
                },
                reward_std=float(run.sum(groups.std(dim=1).sum())) / count * size,
                zero_variance=float(run.sum((groups == groups[:, :1]).all(dim=1).sum()))
                / count
                * size,
                length=tokens / count,
                finished=float(run.sum(batch.finished.sum())) / count,
                loss=loss_sum,
                kl=kl_sum / count,
                entropy=-float(run.sum(batch.sampler_log_probs.sum())) / max(tokens, 1),
                clip_fraction=clipped_sum / max(seen, 1),
                ratio_max=run.max(ratio_max),
            )
    return run.result()


def _denominator(
    mask: Tensor, config: GRPOConfig, run: Run[GRPOConfig, GRPOUpdate]
) -> tuple[Literal["mean", "sequence-mean"], Tensor]:
    """Return the loss's reduction and its denominator over the minibatch of all
    processes.
    """
    if config.loss_mean == "token":
        return "mean", run.sum(mask.sum()).clamp(min=1)
    if config.loss_mean == "constant":
        return "mean", run.sum(len(mask) * config.sampling.max_new_tokens)
    return "sequence-mean", run.sum(mask.any(dim=1).sum()).clamp(min=1)
