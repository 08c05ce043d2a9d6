"""GRPO: PPO's clipped surrogate with the other samples of the same prompt in place of a
critic.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch
from torch import Tensor

from policyopt import estimators, losses
from policyopt.frame import Callback, Statistics
from policyopt.lm.batches import Completions
from policyopt.lm.config import OnlineConfig
from policyopt.lm.data import Records, prompt_examples
from policyopt.lm.environments import EnvironmentFactory
from policyopt.lm.models import LanguageModel
from policyopt.lm.policies import PolicyNetwork
from policyopt.lm.results import LMResult, LMUpdate
from policyopt.lm.rewards import RewardFunctions
from policyopt.lm.sampling import Sampler
from policyopt.lm.training import SamplingRun
from policyopt.losses import ClippedSurrogate, aggregate, check_loss
from policyopt.runs import Bound, Count, NonNegative, Positive

__all__ = [
    "GRPOConfig", "GRPOUpdate", "group_advantages", "grpo_loss", "grpo_surrogate",
    "train_grpo",
]  # fmt: skip


GroupSize = Annotated[
    int, Bound(">= 2: one sample has nothing to be compared with", lambda x: x >= 2)
]
AtLeastOne = Annotated[float, Bound(">= 1", lambda x: x >= 1)]


@dataclass(frozen=True, kw_only=True)
class GRPOConfig(OnlineConfig):
    """Settings of :func:`train_grpo`. ``batch_size`` counts prompts.

    Defaults: group mean and standard deviation (GRPO), mean over tokens (DAPO), no KL
    term, and a correction for the sampler capped at 2. Dr. GRPO:
    ``scale_rewards=False``, ``loss_mean="constant"``. DAPO's loss:
    ``clip_ratio_high=0.28``, ``loss_mean="token"``, ``beta=0``,
    ``drop_unfinished=True``. GSPO: ``ratio="sequence"``, ``loss_mean="sequence"``,
    ``clip_ratio=3e-4``, ``clip_ratio_high=4e-4``. CISPO: ``loss="cispo"``,
    ``clip_ratio=1``, ``clip_ratio_high=4``. RLOO: ``baseline="leave-one-out"``.
    REINFORCE++: ``baseline="batch"``, or with a group baseline
    ``scale_rewards="batch"``. Best-of-n fine-tuning (RAFT): ``baseline="best"``.
    """

    batch_size: Count = 16
    group_size: GroupSize = 8
    """K ≥ 2 completions per prompt."""
    baseline: Literal["group", "leave-one-out", "batch", "best"] = "group"
    """Compare each reward with the mean of its group, with the mean of the others in
    it, or with the mean of all in the batch, whose standard deviation divides it then.
    Or imitate the best of each group: :func:`~policyopt.estimators.best_of_group`.
    """
    scale_rewards: bool | Literal["batch"] = True
    """Divide by the standard deviation of the group, or of what is left of the whole
    batch's rewards (only with ``baseline="group"``); False is "Dr. GRPO".
    """
    pass_at_k: Count = 1
    """Learn from the best of k samples of a prompt in place of each alone: k <
    ``group_size``, with ``baseline="leave-one-out"``. See
    :func:`~policyopt.estimators.pass_at_k_advantages`."""
    loss: Literal["clip", "cispo"] = "clip"
    """PPO's clipped surrogate, or CISPO's clipped weights: see
    :func:`~policyopt.losses.clipped_surrogate_loss` and
    :func:`~policyopt.losses.cispo_loss`."""
    loss_mean: Literal["token", "sequence", "constant"] = "token"
    """Denominator of the loss: all tokens of the batch; each completion's tokens, then
    the completions; or completions times ``max_new_tokens`` (with an environment times
    ``max_turns`` too), which alone does not depend on the lengths."""
    ratio: Literal["token", "sequence"] = "token"
    """Importance ratio of each token, or of the whole completion (GSPO, with a clip
    range of about 1e-3).
    """
    clip_ratio: Positive = 0.2
    """ε of the loss, > 0."""
    clip_ratio_high: Positive | None = None
    """Upper clip range, if it is another ("clip-higher")."""
    beta: NonNegative = 0.0
    """Weight of KL(π_θ ‖ π_ref) in the loss, ≥ 0, per token; 0 needs no reference."""
    kl_estimator: Literal["k1", "k2", "k3"] = "k3"
    """See :func:`~policyopt.estimators.kl_estimate` for what the gradient of each
    is.
    """
    entropy_coef: NonNegative = 0.0
    """Weight ≥ 0 of the exact entropy of each token's distribution, which is taken off
    the loss."""
    epochs_per_batch: Count = 1
    """Passes over each batch of completions."""
    minibatches: Count = 1
    """Optimiser steps per pass."""
    max_draws: Count = 1
    """DAPO's dynamic sampling: draw other prompts in place of those of whose
    completions all have the same reward, until ``batch_size`` groups vary, but no place
    more often than this. What is missing then is filled with the first groups that do
    not vary. In our study of the sums it gained nothing for the same number of
    completions. Each of several processes fills its own share, and ``epochs`` counts
    the prompts that are learned from."""
    importance_cap: AtLeastOne | None = 2.0
    """Largest weight that corrects for a sampler whose probabilities differ from the
    trainer's; None: no correction.
    """
    importance_mode: estimators.ImportanceMode = "token_truncate"
    """Weights of tokens or of whole completions, and what the cap does: see
    :func:`~policyopt.estimators.importance_weights`."""
    drop_unfinished: bool = False
    """Leave completions that ``max_new_tokens`` cut out of the loss (their reward still
    counts in the group).
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check("minibatches", self.minibatches <= self.batch_size, "<= batch_size")
        fits = self.scale_rewards != "batch" or self.baseline == "group"
        self._check("scale_rewards", fits, "True or False unless baseline='group'")
        k, fits = self.pass_at_k, self.baseline == "leave-one-out"
        rule = "1, or less than group_size with baseline='leave-one-out'"
        self._check("pass_at_k", k == 1 or (fits and k < self.group_size), rule)


@dataclass(frozen=True, kw_only=True)
class GRPOUpdate(LMUpdate):
    """One row of :func:`train_grpo`'s history. Means are over the batch's completions
    unless said otherwise.
    """

    completions: int
    """Completions sampled in this update. With ``max_draws`` > 1 the reward, its
    deviation within the groups, tokens, length, finished and entropy are those of all;
    the loss and ``kl`` are of those learned from."""
    reward: float
    """Mean reward."""
    rewards: dict[str, float]
    """Mean of each reward function over what it scored; NaN if it abstained from all.
    """
    reward_std: float
    """Mean over groups of the standard deviation within the group (denominator K −
    1).
    """
    zero_variance: float
    """Share of groups whose rewards are all equal: they teach nothing, but with
    ``baseline="batch"`` or ``"best"``."""
    length: float
    """Mean tokens that the policy wrote."""
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
    """Share of tokens whose gradient the clip switched off, or with ``loss="cispo"``
    whose weight it changed. Completions of advantage 0 count only where they have a
    gradient: with ``beta`` or ``entropy_coef`` > 0 or a loss of one's own."""
    ratio_max: float
    """Largest ratio of these tokens; exactly 1 with one update per batch, or none."""
    sampler_kl: float
    """Mean k3 estimate of KL(π_sampler ‖ π_old) over these tokens, nats: 0 but for
    rounding where the sampler has the policy's weights and settings."""
    effective_samples: float
    """Effective sample size of the completions that these tokens are of, as a share of
    their number: (Σc)² / (n Σc²) with c = π_old / π_sampler of the whole completion,
    not limited. 1 where the sampler is the policy."""

    headline: ClassVar = ("reward", "kl", "length")
    may_be_nan: ClassVar = ("kl", "clip_fraction", "ratio_max", "effective_samples")


def group_advantages(
    rewards: Tensor,
    config: GRPOConfig,
    normalize: Callable[[Tensor, Tensor], Tensor] = estimators.normalize,
) -> Tensor:
    """Advantages ``[P, K]`` of rewards ``[P, K]``: each against its group or all.

    ``normalize``, of numbers and a mask, is what shifts and scales a whole batch:
    another one where several processes share it.
    """
    if config.pass_at_k > 1:
        return estimators.pass_at_k_advantages(rewards, k=config.pass_at_k)
    if config.baseline == "leave-one-out":
        return estimators.leave_one_out_advantages(rewards)
    if config.baseline == "best":
        return estimators.best_of_group(rewards)
    if config.baseline == "group":
        scale = config.scale_rewards
        rewards = estimators.group_relative_advantages(rewards, scale=scale is True)
        if scale != "batch":
            return rewards
    return normalize(rewards, torch.ones_like(rewards, dtype=torch.bool))


def grpo_surrogate(
    log_probs: Tensor,
    old_log_probs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    config: GRPOConfig,
) -> ClippedSurrogate:
    """Return the clipped surrogate of each token, ``[B, T]``, or CISPO's, with the
    ratio of the token or of its completion.

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
        log_probs = losses.sequence_log_ratio(log_probs, old_log_probs, mask)
        old_log_probs = torch.zeros_like(log_probs)
    cispo = config.loss == "cispo"
    surrogate: Any = losses.cispo_loss if cispo else losses.clipped_surrogate_loss
    return surrogate(  # type: ignore[no-any-return]
        log_probs, old_log_probs, advantages[:, None].expand_as(log_probs),
        clip_ratio=config.clip_ratio, clip_ratio_high=config.clip_ratio_high,
    )  # fmt: skip


def grpo_loss(batch: Completions, config: GRPOConfig) -> ClippedSurrogate:
    r"""GRPO's loss of each token, ``[B, T]``, before any mean.

    The clipped surrogate, weighted by min(π_old/π_sampler, cap) or as
    ``importance_mode`` says, plus β times the
    estimate of the KL divergence to the reference, minus the entropy bonus:

    .. math:: -w_{i,t} \min(\rho_{i,t} A_i,\,
              \operatorname{clip}(\rho_{i,t}, 1 - \varepsilon, 1 + \varepsilon_{high})
              A_i) + \beta\,\mathrm{kl}_{i,t} - c\,H(\pi_\theta(\cdot|s_{i,t}))

    Parameters
    ----------
    batch : Completions
        With ``log_probs``, ``old_log_probs``, ``sampler_log_probs``, ``advantages``
        ``[B]``, ``reference_log_probs`` where β > 0, and ``entropies`` where c > 0.

    References
    ----------
    Shao et al. (2024), DeepSeekMath, arXiv:2402.03300, eq. 3; the weight: Yao et al.
    (2025), Your efficient RL framework secretly brings you off-policy RL training.
    """
    old = batch.old_log_probs
    items = grpo_surrogate(batch.log_probs, old, batch.advantages, batch.mask, config)
    loss = items.loss
    if (cap := config.importance_cap) is not None:
        sampled, mode = batch.sampler_log_probs, config.importance_mode
        loss = loss * estimators.importance_weights(
            old, sampled, cap=cap, mode=mode, mask=batch.mask
        )
    if config.beta > 0:
        reference, kind = batch.reference_log_probs, config.kl_estimator
        kl = estimators.kl_estimate(batch.log_probs, reference, kind)
        loss = loss + config.beta * kl
    if config.entropy_coef > 0:
        loss = loss - config.entropy_coef * batch.entropies
    return items._replace(loss=loss)


def train_grpo(
    language_model: LanguageModel,
    data: Records,
    reward_functions: RewardFunctions,
    config: GRPOConfig = GRPOConfig(),
    *,
    environment: EnvironmentFactory | None = None,
    reference: LanguageModel | None = None,
    loss: Callable[[Completions], Any] | None = None,
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
    environment : callable, optional
        Makes an :class:`~policyopt.lm.environments.Environment` for each episode, a
        class for instance. A completion is then a conversation with it, and its rewards
        are added to those of the reward functions, of which there may be none: ``()``.
    reference : LanguageModel, optional
        π_ref. By default the policy as it is given when ``config.beta`` > 0, and none
        otherwise. One that is given is reported on even with β = 0.
    loss : callable, optional
        A function of the :class:`~policyopt.lm.batches.Completions` of a micro-batch
        that returns one loss per token, ``[B, T]``: a named tuple with the field
        ``loss`` (and ``ratio`` and ``clipped``, if it has them), or a tensor. By
        default :func:`grpo_loss` as the config describes it.
    sampler : Sampler, optional
        By default the model itself.
    seed, callback, progress, checkpoint_dir
        As in :func:`~policyopt.lm.sft.train_sft`.

    References
    ----------
    Shao et al. (2024), DeepSeekMath, arXiv:2402.03300, §4.1. Dr. GRPO: Liu et al.
    (2025), arXiv:2503.20783. DAPO: Yu et al. (2025), arXiv:2503.14476. GSPO: Zheng et
    al. (2025), arXiv:2507.18071. RLOO: Ahmadian et al. (2024), arXiv:2402.14740. CISPO:
    MiniMax (2025), arXiv:2506.13585. REINFORCE++: Hu et al. (2025), arXiv:2501.03262.
    RAFT: Dong et al. (2023), arXiv:2304.06767.
    """
    limits, room = config.limits(language_model), config.sampling.max_new_tokens
    examples = prompt_examples(data, language_model.tokenizer, limits, reserve=room)
    run: SamplingRun[GRPOConfig, GRPOUpdate] = SamplingRun(
        "grpo", language_model, PolicyNetwork(language_model.model), config, GRPOUpdate,
        examples, reward_functions=reward_functions, sampler=sampler,
        group_size=config.group_size, environment=environment, seed=seed,
        callback=callback, progress=progress, checkpoint_dir=checkpoint_dir,
    )  # fmt: skip
    compared = config.beta > 0 or reference is not None
    frozen = run.reference(reference) if compared else None
    objective = check_loss(loss, partial(grpo_loss, config=config), "Completions")
    several_steps = config.epochs_per_batch * config.minibatches > 1
    # A completion of advantage 0 has no gradient then: it is counted, but not computed.
    skips = loss is None and config.beta == config.entropy_coef == 0
    # Then the loss at a token depends on its own log-probability, and is known before.
    by_token = "sequence" not in (config.ratio, config.importance_mode.split("_")[0])
    once = loss is None and not several_steps and by_token
    options = {**run.scoring, "entropy": config.entropy_coef > 0}

    with run:
        for _ in run.updates():
            sampled = run.sample_until_full(config.max_draws)
            batch = run.score(run.full(sampled), frozen, old=several_steps)
            groups = batch.rewards.view(-1, config.group_size)
            advantages = group_advantages(groups, config, run.processes.normalize)
            batch = replace(batch, advantages=advantages.flatten())
            if config.drop_unfinished:
                batch = replace(batch, mask=batch.mask & batch.finished[:, None])

            statistics = Statistics()
            for part in run.minibatches(batch):
                mean, count = _mean(part.mask, config, run)
                used = run.keep(part, part.advantages != 0) if skips else part
                for rows in run.micro_batches(len(used)):
                    piece = used.select(rows)
                    options["loss"] = once and run.ahead(objective, piece, mean, count)
                    now, entropies = run.network(piece.sequences, **options)
                    old = piece.old_log_probs if several_steps else now.detach()
                    piece = replace(
                        piece, log_probs=now, old_log_probs=old, entropies=entropies
                    )
                    items = run.token_losses(objective, piece)
                    total = aggregate(
                        items.loss, piece.mask, reduction=mean, denominator=count
                    )
                    run.backward(total)
                    statistics.add(
                        loss=total, tokens=piece.mask.sum(),
                        clipped=(items.clipped * piece.mask).sum(),
                        ratio=torch.where(piece.mask, items.ratio, 0.0).max(),
                        gap=run.gap(piece), log_weights=run.log_weights(piece),
                    )  # fmt: skip
                norm = run.descend(used.mask)
            run.tell_sampler()

            groups = sampled.rewards.view(-1, config.group_size)
            noted = run.sums(statistics, "loss", "clipped", "tokens", "gap")
            loss_sum, clipped, seen, gap = noted
            run.log(
                **run.summary(sampled), completions=int(run.sum(len(sampled))),
                gradient_norm=norm, loss=loss_sum,
                reward_std=run.mean(groups.std(dim=1)),
                zero_variance=run.mean(run.equal_groups(sampled)),
                kl=run.kl(batch, batch.sampler_log_probs),
                clip_fraction=clipped / max(seen, 1),
                ratio_max=run.processes.max(statistics["ratio"].max()) or 1.0,
                sampler_kl=gap / max(seen, 1),
                effective_samples=run.effective_samples(statistics),
            )  # fmt: skip
    return run.result()


def _mean(
    mask: Tensor, config: GRPOConfig, run: SamplingRun[GRPOConfig, GRPOUpdate]
) -> tuple[Literal["mean", "sequence-mean"], Tensor]:
    """Return the loss's reduction and its denominator over the minibatch of all
    processes.
    """
    if config.loss_mean == "token":
        return "mean", run.sum(mask.sum()).clamp(min=1)
    if config.loss_mean == "constant":
        return "mean", run.sum(len(mask) * run.longest)
    return "sequence-mean", run.sum(mask.any(dim=1).sum()).clamp(min=1)
