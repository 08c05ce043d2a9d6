"""RLHF's PPO: the score of a completion at its last token, a KL penalty at every token,
a critic, clipped steps.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor, nn

from policyopt import losses
from policyopt.estimators import adaptive_kl_coefficient, gae, kl_shaped_rewards
from policyopt.frame import Callback, Statistics
from policyopt.lm.batches import Completions
from policyopt.lm.config import Natural, OnlineConfig
from policyopt.lm.data import Records, prompt_examples
from policyopt.lm.environments import EnvironmentFactory
from policyopt.lm.log_probs import completion_log_probs
from policyopt.lm.models import LanguageModel, freeze_output_head_, scalar_head
from policyopt.lm.results import LMResult, LMUpdate
from policyopt.lm.rewards import RewardFunctions
from policyopt.lm.sampling import Sampler
from policyopt.lm.sequences import Sequences, hidden_states
from policyopt.lm.training import SamplingRun
from policyopt.losses import aggregate, check_loss
from policyopt.runs import Bound, Count, NonNegative, Positive, Share

__all__ = [
    "ActorCritic", "PPOConfig", "PPOUpdate", "ppo_loss", "token_advantages",
    "train_ppo",
]  # fmt: skip

Gain = Annotated[float, Bound("in (0, 5)", lambda x: 0 < x < 5)]


@dataclass(frozen=True, kw_only=True)
class PPOConfig(OnlineConfig):
    """Settings of :func:`train_ppo`. ``batch_size`` counts prompts."""

    warmup_updates: Natural = 5
    """Updates over which the learning rate rises linearly. Adam's first steps are as
    long as all others, however small the gradient, and the value head starts from
    nothing."""
    samples_per_prompt: Count = 1
    """Completions of each prompt. Several share the reading of the prompt, so they are
    cheaper than as many prompts.
    """
    beta: NonNegative = 0.05
    """Weight of the penalty log(π/π_ref) in each token's reward, ≥ 0, in units of score
    per nat.
    """
    target_kl: Positive | None = None
    """KL(π_θ ‖ π_ref) of a completion, nats, that β is steered to after every batch;
    None leaves β alone.
    """
    kl_gain: Gain = 0.1
    """With ``target_kl``, one batch changes β by at most a factor of 1 ± 0.2 ·
    ``kl_gain``.
    """
    gamma: Share = 1.0
    """Discount per token, in [0, 1]."""
    gae_lambda: Share = 0.95
    """λ of the advantage estimate, in [0, 1]."""
    normalize_advantages: bool = True
    """Shift and scale advantages to mean 0 and standard deviation 1 over the batch's
    tokens.
    """
    critic: Literal["head", "separate"] = "head"
    """A value head on the policy's own network, or a network of its own that starts as
    a copy of the policy.
    """
    value_coef: NonNegative = 0.1
    """Weight of the value loss, ≥ 0."""
    value_clip: Positive | None = None
    """Clip range of the value loss in units of score; None does not clip."""
    clip_ratio: Positive = 0.2
    """ε of the clipped surrogate, > 0."""
    epochs_per_batch: Count = 2
    """Passes over each batch of completions."""
    minibatches: Count = 2
    """Optimiser steps per pass."""

    def __post_init__(self) -> None:
        super().__post_init__()
        steered = self.target_kl is None or self.beta > 0
        self._check("beta", steered, "> 0 where target_kl is to steer it")
        self._check("minibatches", self.minibatches <= self.batch_size, "<= batch_size")


@dataclass(frozen=True, kw_only=True)
class PPOUpdate(LMUpdate):
    """One row of :func:`train_ppo`'s history. Means are over the batch's completions
    unless said otherwise.
    """

    reward: float
    """Mean score, the KL penalty not included."""
    rewards: dict[str, float]
    """Mean of each reward function over what it scored; NaN if it abstained from all.
    """
    kl: float
    """Estimate (k1) of KL(π_θ ‖ π_ref) of a completion, nats, before the update."""
    beta: float
    """Weight of the KL penalty in this update."""
    length: float
    """Mean tokens that the policy wrote."""
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
    """Largest ratio of the update."""

    headline: ClassVar = ("reward", "kl", "length")
    may_be_nan: ClassVar = ("explained_variance", "clip_fraction", "ratio_max")


class Judged(NamedTuple):
    """What :class:`ActorCritic` says of completions."""

    log_probs: Tensor
    """log π_θ(y_t | s_t), ``[B, T]``, where s_t = (prompt, y_<t)."""
    values: Tensor
    """V(s_t), ``[B, T]``."""


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

    def forward(self, sequences: Sequences, **options: Any) -> Judged:
        """Score the tokens of completions, and the states before them."""
        acted = sequences.states()
        hidden = hidden_states(self.model, acted)
        said = completion_log_probs(self.model, sequences, hidden=hidden, **options)
        if self.value_model is not None:
            hidden = hidden_states(self.value_model, acted)
        values = self.value_head(hidden.to(self.value_head.weight.dtype))
        return Judged(said.log_probs, values.squeeze(-1).float())


def token_advantages(
    rewards: Tensor, values: Tensor, mask: Tensor, *, gamma: float, gae_lambda: float
) -> tuple[Tensor, Tensor]:
    """GAE over the tokens of completions, each of which ends at its last token.

    Tokens that the policy did not choose are no actions: the state after an action is
    the one before the next, however much an environment wrote in between.

    Parameters
    ----------
    rewards, values : Tensor
        ``[B, T]``: the reward of token t, and V of the state before it.
    mask : Tensor
        Boolean ``[B, T]``: the policy's tokens.

    Returns
    -------
    advantages, targets : Tensor
        ``[B, T]``, 0 outside the mask; the targets of the value function are advantage
        + value.
    """
    order = mask.byte().argsort(dim=1, descending=True, stable=True)  # actions first
    rewards, values, mask = (x.gather(1, order) for x in (rewards, values, mask))
    last = mask & ~torch.nn.functional.pad(mask[:, 1:], (0, 1))
    values = torch.where(mask, values, 0.0)
    next_values = torch.nn.functional.pad(values[:, 1:], (0, 1))
    # Padding is terminal too, so that nothing leaks from it into the tokens before it.
    ended = last | ~mask
    rewards, never = torch.where(mask, rewards, 0.0), torch.zeros_like(ended)
    by_time = (x.T for x in (rewards, values, next_values, ended, never))
    advantages = gae(*by_time, gamma=gamma, gae_lambda=gae_lambda).T
    back = order.argsort(dim=1)
    return advantages.gather(1, back), (advantages + values).gather(1, back)


def ppo_loss(batch: Completions, config: PPOConfig) -> losses.ClippedSurrogate:
    """PPO's clipped surrogate of each token, ``[B, T]``.

    The value loss is apart: the trainer adds ``value_coef`` times
    :func:`~policyopt.losses.value_loss`.

    Parameters
    ----------
    batch : Completions
        With ``log_probs``, ``old_log_probs`` and ``advantages``, ``[B, T]`` each.
    """
    return losses.clipped_surrogate_loss(
        batch.log_probs, batch.old_log_probs, batch.advantages,
        clip_ratio=config.clip_ratio,
    )  # fmt: skip


def train_ppo(
    language_model: LanguageModel,
    data: Records,
    reward_functions: RewardFunctions,
    config: PPOConfig = PPOConfig(),
    *,
    environment: EnvironmentFactory | None = None,
    reference: LanguageModel | None = None,
    loss: Callable[[Completions], Any] | None = None,
    shape_rewards: Callable[..., Tensor] = kl_shaped_rewards,
    sampler: Sampler | None = None,
    seed: int = 0,
    callback: Callback | None = None,
    progress: bool = True,
    checkpoint_dir: str | Path | None = None,
) -> LMResult[PPOConfig, PPOUpdate]:
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
    config : PPOConfig
    environment : callable, optional
        Makes an :class:`~policyopt.lm.environments.Environment` for each episode, a
        class for instance. A completion is then a conversation with it, and its rewards
        are added to those of the reward functions, of which there may be none: ``()``.
    reference : LanguageModel, optional
        π_ref; by default the policy as it is given.
    loss : callable, optional
        A function of the :class:`~policyopt.lm.batches.Completions` of a micro-batch
        that returns the policy's loss of each token, ``[B, T]``: a named tuple with the
        field ``loss`` (and ``ratio`` and ``clipped``, if it has them), or a tensor. By
        default :func:`ppo_loss`. The value loss stays.
    shape_rewards : callable
        (scores, log π_old, log π_ref, mask, beta=…) ↦ the reward of each token,
        ``[B, T]``. Scores are ``[B]``, with an environment ``[B, T]``.
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
    limits, room = config.limits(language_model), config.sampling.max_new_tokens
    examples = prompt_examples(data, language_model.tokenizer, limits, reserve=room)
    network = ActorCritic(language_model.model, config.critic)
    run: SamplingRun[PPOConfig, PPOUpdate] = SamplingRun(
        "ppo", language_model, network, config, PPOUpdate, examples,
        reward_functions=reward_functions, sampler=sampler,
        group_size=config.samples_per_prompt, environment=environment, seed=seed,
        callback=callback, progress=progress, checkpoint_dir=checkpoint_dir,
        state={"beta": config.beta},
    )  # fmt: skip
    frozen = run.reference(reference)
    objective = check_loss(loss, partial(ppo_loss, config=config), "Completions")
    fits = loss is not None or config.value_coef > 0  # also where all advantages are 0

    with run:
        for _ in run.updates():
            batch = run.score(run.sample(), frozen)
            old, mask, beta = batch.old_log_probs, batch.mask, run.state["beta"]
            scores = batch.rewards if environment is None else batch.token_rewards
            rewards = shape_rewards(
                scores, old, batch.reference_log_probs, mask, beta=beta
            )
            advantages, targets = token_advantages(
                rewards, batch.old_values, mask, gamma=config.gamma,
                gae_lambda=config.gae_lambda,
            )  # fmt: skip
            explained = run.explained_variance(batch.old_values, targets, mask)
            if config.normalize_advantages:
                advantages = run.processes.normalize(advantages, mask)
            batch = replace(batch, advantages=advantages, targets=targets)

            statistics = Statistics()
            for part in run.minibatches(batch):
                tokens = run.sum(part.mask.sum()).clamp(min=1)
                for rows in run.micro_batches(len(part), config.samples_per_prompt):
                    piece = part.select(rows)
                    now = run.network(piece.sequences, **run.scoring)
                    piece = replace(piece, log_probs=now.log_probs, values=now.values)
                    items = run.token_losses(objective, piece)
                    errors = losses.value_loss(
                        now.values, piece.targets, piece.old_values,
                        clip=config.value_clip,
                    )  # fmt: skip
                    policy_term = aggregate(items.loss, piece.mask, denominator=tokens)
                    value_term = aggregate(errors.loss, piece.mask, denominator=tokens)
                    run.backward(policy_term + config.value_coef * value_term)
                    statistics.add(
                        policy=torch.where(piece.mask, items.loss, 0.0).sum(),
                        value=(errors.loss * piece.mask).sum(),
                        clipped=(items.clipped * piece.mask).sum(),
                        tokens=piece.mask.sum(),
                        ratio=torch.where(piece.mask, items.ratio, 0.0).max(),
                    )
                norm = run.descend(part.mask & (fits | (part.advantages != 0)))
            run.tell_sampler()

            kl = run.kl(batch, old)
            names = ("policy", "value", "clipped", "tokens")
            policy, value, clipped, seen = run.sums(statistics, *names)
            if config.target_kl is not None:
                run.state["beta"] = adaptive_kl_coefficient(
                    beta, kl, target=config.target_kl, gain=config.kl_gain
                )
            run.log(
                **run.summary(batch),
                gradient_norm=norm, kl=kl, beta=beta,
                policy_loss=policy / seen, value_loss=value / seen,
                explained_variance=explained, clip_fraction=clipped / seen,
                ratio_max=run.processes.max(statistics["ratio"].max()),
            )  # fmt: skip
    result = run.result()
    result.actor_critic = network
    return result
