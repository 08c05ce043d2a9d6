"""RLHF's PPO: the score of a completion at its last token, a KL penalty at every token,
a critic, clipped steps.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from policyopt.estimators import adaptive_kl_coefficient, gae, kl_shaped_rewards
from policyopt.lm.config import LMConfig
from policyopt.lm.data import Records, prompt_examples
from policyopt.lm.log_probs import completion_log_probs
from policyopt.lm.models import LanguageModel, freeze_output_head_, scalar_head
from policyopt.lm.rewards import RewardFunctions
from policyopt.lm.rollouts import collect, minibatches
from policyopt.lm.sampling import (
    Sampler,
    SamplingConfig,
    TransformersSampler,
    UpdatedSampler,
)
from policyopt.lm.sequences import Sequences, hidden_states, widen
from policyopt.lm.training import Callback, LMResult, LMUpdate, Reference, Run
from policyopt.losses import aggregate, clipped_surrogate_loss, value_loss

__all__ = [
    "ActorCritic",
    "PPOLMConfig",
    "PPOLMUpdate",
    "token_advantages",
    "train_ppo_lm",
]


@dataclass(frozen=True, kw_only=True)
class PPOLMConfig(LMConfig):
    """Settings of :func:`train_ppo_lm`. ``batch_size`` counts prompts."""

    warmup_steps: int = 5
    """Steps over which the learning rate rises linearly. Adam's first steps are as long
    as all others, however small the gradient, and the value head starts from
    nothing."""
    samples_per_prompt: int = 1
    """Completions of each prompt. Several share the reading of the prompt, so they are
    cheaper than as many prompts.
    """
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    """How completions are drawn, and scored likewise."""
    beta: float = 0.05
    """Weight of the penalty log(π/π_ref) in each token's reward, ≥ 0, in units of score
    per nat.
    """
    target_kl: float | None = None
    """KL(π_θ ‖ π_ref) of a completion, nats, that β is steered to after every batch;
    None leaves β alone.
    """
    kl_gain: float = 0.1
    """With ``target_kl``, one batch changes β by at most a factor of 1 ± 0.2 ·
    ``kl_gain``.
    """
    gamma: float = 1.0
    """Discount per token, in [0, 1]."""
    gae_lambda: float = 0.95
    """λ of the advantage estimate, in [0, 1]."""
    normalize_advantages: bool = True
    """Shift and scale advantages to mean 0 and standard deviation 1 over the batch's
    tokens.
    """
    critic: Literal["head", "separate"] = "head"
    """A value head on the policy's own network, or a network of its own that starts as
    a copy of the policy.
    """
    value_coef: float = 0.1
    """Weight of the value loss, ≥ 0."""
    value_clip: float | None = None
    """Clip range of the value loss in units of score; None does not clip."""
    clip_ratio: float = 0.2
    """ε of the clipped surrogate, > 0."""
    epochs_per_batch: int = 2
    """Passes over each batch of completions."""
    minibatches: int = 2
    """Optimiser steps per pass."""
    reward_weights: tuple[float, ...] | None = None
    """One per reward function; None weighs each with 1."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("samples_per_prompt", "epochs_per_batch", "minibatches"):
            self._check(name, getattr(self, name) >= 1, ">= 1")
        self._check(
            "sampling",
            self.sampling.temperature > 0,
            "of a temperature > 0: the policy must explore",
        )
        self._check("beta", self.beta >= 0, ">= 0")
        self._check(
            "target_kl", self.target_kl is None or self.target_kl > 0, "> 0 or None"
        )
        self._check(
            "beta",
            self.target_kl is None or self.beta > 0,
            "> 0 where target_kl is to steer it",
        )
        self._check("kl_gain", 0 < self.kl_gain < 5, "in (0, 5)")
        for name in ("gamma", "gae_lambda"):
            self._check(name, 0 <= getattr(self, name) <= 1, "in [0, 1]")
        self._check("value_coef", self.value_coef >= 0, ">= 0")
        self._check(
            "value_clip", self.value_clip is None or self.value_clip > 0, "> 0 or None"
        )
        self._check("clip_ratio", self.clip_ratio > 0, "> 0")
        self._check("minibatches", self.minibatches <= self.batch_size, "<= batch_size")


@dataclass(frozen=True, kw_only=True)
class PPOLMUpdate(LMUpdate):
    """One row of :func:`train_ppo_lm`'s history. Means are over the batch's completions
    unless said otherwise.
    """

    reward: float
    """Mean score, the KL penalty not included."""
    rewards: dict[str, float]
    """Mean of each reward function."""
    kl: float
    """Estimate (k1) of KL(π_θ ‖ π_ref) of a completion, nats, before the step."""
    beta: float
    """Weight of the KL penalty in this step."""
    length: float
    """Mean completion tokens."""
    finished: float
    """Share of completions that ended by themselves."""
    policy_loss: float
    """Mean over tokens and updates. Near 0 by construction; its gradient is what
    counts.
    """
    value_loss: float
    """Mean ½ (V − target)² over tokens and updates."""
    explained_variance: float
    """Of the value targets, by the critic before the step; NaN where they do not
    vary.
    """
    entropy: float
    """Estimate of the mean entropy per token, −log π of the sampled tokens, nats."""
    clip_fraction: float
    """Share of tokens (over all updates) whose gradient the clip switched off."""
    ratio_max: float
    """Largest ratio of the step."""

    headline: ClassVar[tuple[str, ...]] = ("reward", "kl", "length")
    may_be_nan: ClassVar[tuple[str, ...]] = ("explained_variance",)


class ActorCritic(nn.Module):
    """π_θ and V_φ on sequences: one network with two heads, or two networks."""

    def __init__(self, model: nn.Module, critic: Literal["head", "separate"]) -> None:
        super().__init__()
        self.model = model
        self.value_model: nn.Module | None = None
        if critic == "separate":
            self.value_model = copy.deepcopy(model)
            freeze_output_head_(self.value_model)
        self.value_head = scalar_head(model)

    def forward(self, sequences: Sequences, **options: Any) -> tuple[Tensor, Tensor]:
        """Return log π_θ(y_t | s_t) and V(s_t), both ``[B, T]``, where s_t = (prompt,
        y_<t).
        """
        hidden = hidden_states(self.model, sequences)
        log_probs = completion_log_probs(
            self.model, sequences, hidden=hidden, **options
        ).log_probs
        if self.value_model is not None:
            hidden = hidden_states(self.value_model, sequences)
        states = hidden[:, : sequences.completion_ids.shape[1]].to(
            self.value_head.weight.dtype
        )
        return log_probs, self.value_head(states).squeeze(-1).float()


def token_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """GAE over the tokens of completions, each of which ends at its last token.

    Parameters
    ----------
    rewards, values : Tensor
        ``[B, T]``: the reward of token t, and V of the state before it.
    mask : Tensor
        Boolean ``[B, T]``, padding on the right.

    Returns
    -------
    advantages, targets : Tensor
        ``[B, T]``, 0 at padding; the targets of the value function are advantage +
        value.
    """
    last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    values = torch.where(mask, values, 0.0)
    next_values = torch.nn.functional.pad(values[:, 1:], (0, 1))
    # Padding is terminal too, so that nothing leaks from it into the tokens before it.
    ended = last | ~mask
    advantages = gae(
        torch.where(mask, rewards, 0.0).T, values.T, next_values.T, ended.T, torch.zeros_like(ended).T,
        gamma=gamma, gae_lambda=gae_lambda,
    ).T  # fmt: skip
    return advantages, advantages + values


def train_ppo_lm(
    language_model: LanguageModel,
    data: Records,
    reward_functions: RewardFunctions,
    config: PPOLMConfig = PPOLMConfig(),
    *,
    reference: LanguageModel | None = None,
    sampler: Sampler | None = None,
    seed: int = 0,
    callback: Callback | None = None,
    progress: bool = True,
    checkpoint_dir: str | Path | None = None,
) -> LMResult[PPOLMConfig, PPOLMUpdate]:
    """Train a policy on its own completions by PPO, towards a reward and not too far
    from a reference.

    Parameters
    ----------
    language_model : LanguageModel
        π_θ, trained in place.
    data : records
        Column ``prompt``; all other columns are handed to the reward functions.
    reward_functions : callable, sequence or mapping of callables
        Usually a :class:`~policyopt.lm.models.RewardModel`; see
        :func:`~policyopt.lm.rewards.compute_rewards`.
    config : PPOLMConfig
    reference : LanguageModel, optional
        π_ref; by default the policy as it is given (for LoRA: with the adapters off).
    sampler : Sampler, optional
        By default the model itself.
    seed, callback, progress, checkpoint_dir
        As in :func:`~policyopt.lm.sft.train_sft`.

    References
    ----------
    Ziegler et al. (2019), Fine-tuning language models from human preferences,
    arXiv:1909.08593, §2; Ouyang et al. (2022), arXiv:2203.02155, eq. 2; Huang et al.
    (2024), The N+ implementation details of RLHF with PPO, arXiv:2403.17031.
    """
    examples = prompt_examples(
        data,
        language_model.tokenizer,
        config.limits(language_model),
        reserve=config.sampling.max_new_tokens,
    )
    frozen = Reference(language_model, reference, config)
    network = ActorCritic(language_model.model, config.critic)
    run: Run[PPOLMConfig, PPOLMUpdate] = Run(
        "ppo", language_model, network, config, row_type=PPOLMUpdate, items=len(examples), seed=seed,
        callback=callback, progress=progress, checkpoint_dir=checkpoint_dir, state={"beta": config.beta},
        prompts=[example.prompt for example in examples[: config.logged_samples]],
    )  # fmt: skip
    sampler = sampler or TransformersSampler(language_model)
    size, sampling = config.samples_per_prompt, config.sampling
    scoring = {
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
    }

    with run:
        for _ in run.steps():
            indices = run.batch()
            batch = collect(
                language_model, sampler, [examples[i] for i in indices], size, sampling, reward_functions,
                weights=config.reward_weights, seed=run.stream(), first_row=run.rank * len(indices) * size,
            )  # fmt: skip
            sequences, mask = batch.sequences, batch.sequences.completion_mask
            beta = run.state["beta"]
            with torch.no_grad():
                before = [run.network(sequences.select(rows), **scoring)
                          for rows in run.micro_batches(len(sequences), size)]  # fmt: skip
                old_log_probs = torch.cat(
                    [widen(log_probs, mask) for log_probs, _ in before]
                )
                old_values = torch.cat([widen(values, mask) for _, values in before])
                pieces = run.micro_batches(len(sequences), size)
                reference_log_probs = frozen.log_probs(sequences, pieces, **scoring)
                rewards = kl_shaped_rewards(
                    batch.rewards, old_log_probs, reference_log_probs, mask, beta=beta
                )
                advantages, targets = token_advantages(
                    rewards,
                    old_values,
                    mask,
                    gamma=config.gamma,
                    gae_lambda=config.gae_lambda,
                )
                explained = 1 - run.variance(targets - old_values, mask) / run.variance(
                    targets, mask
                )
                if config.normalize_advantages:
                    advantages = run.normalize(advantages, mask)

            totals, ratio_max = (
                torch.zeros(4, device=run.device),
                torch.zeros((), device=run.device),
            )
            for _ in range(config.epochs_per_batch):
                for numbers in minibatches(len(sequences), config.minibatches, size):
                    part = torch.tensor(numbers, device=run.device)
                    tokens = run.sum(mask[part].sum())
                    for places in run.micro_batches(len(part), size):
                        rows = part[places]
                        piece = sequences.select(rows)
                        T = piece.completion_ids.shape[1]
                        kept = piece.completion_mask
                        log_probs, values = run.network(piece, **scoring)
                        items = clipped_surrogate_loss(
                            log_probs,
                            old_log_probs[rows, :T],
                            advantages[rows, :T],
                            clip_ratio=config.clip_ratio,
                        )
                        errors = value_loss(
                            values,
                            targets[rows, :T],
                            old_values[rows, :T],
                            clip=config.value_clip,
                        )
                        policy_term = aggregate(items.loss, kept, denominator=tokens)
                        value_term = aggregate(errors.loss, kept, denominator=tokens)
                        run.backward(policy_term + config.value_coef * value_term)
                        totals += torch.stack(
                            [(items.loss * kept).sum(), (errors.loss * kept).sum(), (items.clipped * kept).sum(),
                             kept.sum().to(values)]
                        ).detach()  # fmt: skip
                        ratio_max = torch.maximum(ratio_max, items.ratio[kept].max())
                    norm = run.descend()
            if isinstance(sampler, UpdatedSampler):
                sampler.update_weights(language_model.model)

            count = float(run.sum(len(sequences)))
            batch_tokens = float(run.sum(mask.sum()))
            kl = float(run.sum((old_log_probs - reference_log_probs).sum())) / count
            if config.target_kl is not None:
                run.state["beta"] = adaptive_kl_coefficient(
                    beta, kl, target=config.target_kl, gain=config.kl_gain
                )
            policy_sum, value_sum, clipped_sum, seen = run.sum(totals).tolist()
            run.log(
                tokens=int(batch_tokens),
                gradient_norm=norm,
                reward=float(run.sum(batch.rewards.sum())) / count,
                rewards={
                    name: float(run.sum(part.sum())) / count
                    for name, part in batch.parts.items()
                },
                kl=kl,
                beta=beta,
                length=batch_tokens / count,
                finished=float(run.sum(batch.finished.sum())) / count,
                policy_loss=policy_sum / seen,
                value_loss=value_sum / seen,
                explained_variance=float(explained),
                entropy=-float(run.sum(batch.sampler_log_probs.sum())) / batch_tokens,
                clip_fraction=clipped_sum / seen,
                ratio_max=run.max(ratio_max),
            )
    result = run.result()
    result.critic = network
    return result
