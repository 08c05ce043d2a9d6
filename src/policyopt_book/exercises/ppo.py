"""Exercises of the chapter on proximal policy optimisation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from policyopt.control import PPOConfig, ppo_loss, train_ppo
from policyopt.control.steps import Steps
from policyopt.losses import ClippedSurrogate, clipped_surrogate_loss
from policyopt_book.exercises import Exercise

__all__ = ["EXERCISES", "four_logs"]

_LOGGED = (
    "return_mean",
    "entropy",
    "kl",
    "clip_fraction",
    "ratio_max",
    "explained_variance",
)


def four_logs(
    seed: int = 0, updates: tuple[int, ...] = (1, 2, 4, 8, 14)
) -> dict[str, list[dict[str, float]]]:
    """Train PPO on CartPole four times, each with a bug, and return some rows of the
    logs.
    """
    noise = torch.Generator().manual_seed(seed)

    def first(steps: Steps) -> ClippedSurrogate:
        items = ppo_loss(steps, config)
        return items._replace(loss=0 * items.loss)

    def second(steps: Steps) -> ClippedSurrogate:
        old = steps.log_prob.detach()
        return ppo_loss(dataclasses.replace(steps, old_log_prob=old), config)

    def third(steps: Steps) -> ClippedSurrogate:
        old = steps.old_log_prob
        old = old + 0.15 * torch.randn(old.shape, generator=noise)
        return ppo_loss(dataclasses.replace(steps, old_log_prob=old), config)

    def fourth(steps: Steps) -> ClippedSurrogate:
        wrong = dataclasses.replace(steps, advantages=-steps.advantages)
        return ppo_loss(wrong, config)

    many = PPOConfig(
        total_steps=14_000,
        num_envs=16,
        gamma=0.98,
        gae_lambda=0.9,
        minibatch_size=256,
        device="cpu",
    )
    once = dataclasses.replace(many, epochs_per_batch=1, minibatch_size=1024)
    logs = {}
    for name, loss in {"A": first, "B": second, "C": third, "D": fourth}.items():
        config = once if name == "C" else many
        history = train_ppo(
            "CartPole-v1", config, seed=seed, loss=loss, progress=False
        ).history
        logs[name] = [
            {"update": row.update, **{key: getattr(row, key) for key in _LOGGED}}
            for row in history
            if row.update in updates
        ]
    return logs


def _largest_kl_of(clip_ratio: float) -> float:
    """Return KL(π_old ‖ π) where half of the old probability has each of the extreme
    ratios.
    """
    return -0.5 * (math.log(1 + clip_ratio) + math.log(1 - clip_ratio))


def _clip_for(kl_limit: float) -> float:
    """Bisect."""
    low, high = 0.0, 1.0 - 1e-12
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if _largest_kl_of(middle) < kl_limit else (low, middle)
        )
    return low


def _update_case(
    seed: int, ratios: list[float], advantages: list[float], clip_ratio: float
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    n = len(ratios)
    logits = torch.randn(n, 3, generator=generator, dtype=torch.float64)
    actions = torch.randint(3, (n,), generator=generator)
    log_prob = torch.stack(
        [logits[t, a] - logits[t].logsumexp(0) for t, a in enumerate(actions.tolist())]
    )
    return {
        "logits": logits,
        "values": torch.randn(n, generator=generator, dtype=torch.float64),
        "actions": actions,
        "old_log_prob": log_prob - torch.tensor(ratios, dtype=torch.float64).log(),
        "advantages": torch.tensor(advantages, dtype=torch.float64),
        "targets": torch.randn(n, generator=generator, dtype=torch.float64),
        "clip_ratio": clip_ratio,
    }


def _minibatch_loss(
    logits: Tensor,
    values: Tensor,
    actions: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    targets: Tensor,
    clip_ratio: float,
) -> Tensor:
    """Add up the steps one by one."""
    total = torch.zeros((), dtype=logits.dtype)
    for t, action in enumerate(actions.tolist()):
        log_prob = logits[t, action] - logits[t].exp().sum().log()
        total = total - _objective(
            log_prob, old_log_prob[t].item(), advantages[t].item(), clip_ratio
        )
        total = total + 0.25 * (values[t] - targets[t]) ** 2
    return total / len(actions)


def _wrong_minibatch(
    *,
    over_batch: bool = False,
    no_minimum: bool = False,
    detached: bool = False,
    sign: float = 1.0,
) -> Callable[..., Tensor]:
    """Return the loss of a minibatch with some things wrong."""

    def loss(
        logits: Tensor,
        values: Tensor,
        actions: Tensor,
        old_log_prob: Tensor,
        advantages: Tensor,
        targets: Tensor,
        clip_ratio: float,
    ) -> Tensor:
        log_probs = logits.log_softmax(0 if over_batch else -1)
        log_prob = log_probs[torch.arange(len(actions)), actions]
        ratio = (log_prob - old_log_prob).exp()
        objective = ratio.clamp(1 - clip_ratio, 1 + clip_ratio) * advantages
        if not no_minimum:
            objective = torch.minimum(ratio * advantages, objective)
        error = (values.detach() if detached else values) - targets
        return -sign * objective.mean() + 0.25 * error.square().mean()

    return loss


def _four_samples() -> tuple[list[float], list[float]]:
    """Ask the package and autograd."""
    log_prob = (
        torch.tensor([1.3, 1.3, 0.7, 0.7], dtype=torch.float64).log().requires_grad_()
    )
    advantages = torch.tensor([2.0, -2.0, 2.0, -2.0], dtype=torch.float64)
    items = clipped_surrogate_loss(
        log_prob, torch.zeros_like(advantages), advantages, clip_ratio=0.2
    )
    (weights,) = torch.autograd.grad(-items.loss.sum(), log_prob)
    return (-items.loss).tolist(), weights.tolist()


def _batch_case(
    ratios: list[float],
    advantages: list[float],
    valid: list[bool] | None = None,
    **options: float,
) -> dict[str, Any]:
    advantage = torch.tensor(advantages, dtype=torch.float64)
    old = -1.0 - torch.arange(len(ratios), dtype=torch.float64) / 7
    case: dict[str, Any] = {
        "log_prob": old + torch.tensor(ratios, dtype=torch.float64).log(),
        "old_log_prob": old,
        "advantages": advantage,
    }
    return case | ({} if valid is None else {"valid": torch.tensor(valid)}) | options


def _objective(
    log_prob: Tensor, old: float, advantage: float, eps: float, c: float = float("inf")
) -> Tensor:
    """Return the objective of one sample, by cases: a constant where the gradient is
    off.
    """
    ratio = (log_prob - old).exp()
    if advantage > 0 and ratio > 1 + eps:
        return torch.full_like(ratio, (1 + eps) * advantage)
    if advantage < 0 and ratio < 1 - eps:
        return torch.full_like(ratio, (1 - eps) * advantage)
    if advantage < 0 and ratio > c:
        return torch.full_like(ratio, c * advantage)
    return ratio * advantage


def _clipped_loss(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    valid: Tensor,
    clip_ratio: float,
) -> Tensor:
    terms = [
        -_objective(
            log_prob[t], old_log_prob[t].item(), advantages[t].item(), clip_ratio
        )
        for t in range(len(log_prob))
        if valid[t]
    ]
    return torch.stack(terms).sum() / len(terms)


def _wrong_clipped(
    *,
    better: Callable[[Tensor, Tensor], Tensor] = torch.minimum,
    sign: float = 1.0,
    upside_down: bool = False,
    recomputed: bool = False,
    detached: bool = False,
    every_row: bool = False,
) -> Callable[..., Tensor]:
    """Return the loss with one thing wrong."""

    def loss(
        log_prob: Tensor,
        old_log_prob: Tensor,
        advantages: Tensor,
        valid: Tensor,
        clip_ratio: float,
    ) -> Tensor:
        log_ratio = log_prob - (log_prob.detach() if recomputed else old_log_prob)
        ratio = (-log_ratio if upside_down else log_ratio).exp()
        ratio = ratio.detach() if detached else ratio
        clipped = ratio.clamp(1 - clip_ratio, 1 + clip_ratio)
        items = -sign * better(ratio * advantages, clipped * advantages)
        return items.mean() if every_row else items[valid].mean()

    return loss


def _second(_: Tensor, clipped: Tensor) -> Tensor:
    return clipped


def _first(unclipped: Tensor, _: Tensor) -> Tensor:
    return unclipped


def _moves_unseen(policy: Any) -> str | None:
    """Say why the KL from (.5, .25, .25) is not above 2 nats at an unchanged first
    probability.
    """
    try:
        q = torch.as_tensor(policy, dtype=torch.float64)
    except (TypeError, ValueError, RuntimeError):
        return f"Return three probabilities, not {policy!r}."
    if q.shape != (3,):
        return f"Return three probabilities, not {policy!r}."
    if not bool((q > 0).all()):
        return f"All three probabilities must be positive, not {policy!r}."
    if abs(float(q.sum()) - 1) > 1e-6:
        return f"The three probabilities must sum to 1, not to {float(q.sum()):.6g}."
    if abs(float(q[0]) / 0.5 - 1) > 1e-6:
        return f"The ratio of action 0 is {float(q[0]) / 0.5:.4g}, and must be 1."
    p = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64)
    kl = float((p * (p / q).log()).sum())
    if kl <= 2:
        return (
            f"The KL is only {kl:.2f} nats. What does it do when an action of the old "
            "policy gets very rare?"
        )
    return None


def _dual_clip(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    clip_ratio: float,
    c: float,
) -> Tensor:
    terms = [
        -_objective(
            log_prob[t], old_log_prob[t].item(), advantages[t].item(), clip_ratio, c
        )
        for t in range(len(log_prob))
    ]
    return torch.stack(terms)


def _wrong_dual(
    change: Callable[[Tensor, Tensor, float], Tensor],
) -> Callable[..., Tensor]:
    """Return the loss with ``change(objective, advantages, c)`` in place of the second
    clip.
    """

    def loss(
        log_prob: Tensor,
        old_log_prob: Tensor,
        advantages: Tensor,
        clip_ratio: float,
        c: float,
    ) -> Tensor:
        objective = -clipped_surrogate_loss(
            log_prob, old_log_prob, advantages, clip_ratio=clip_ratio
        ).loss
        return -change(objective, advantages, c)

    return loss


def _buffer_case(
    seed: int,
    terminated: list[int],
    truncated: list[int],
    gamma: float,
    gae_lambda: float,
) -> dict[str, Any]:
    """Six steps; the lists hold the steps at which an episode ended or was cut."""
    generator = torch.Generator().manual_seed(seed)
    steps = torch.arange(6)
    values = torch.randn(6, generator=generator, dtype=torch.float64)
    cut = torch.isin(steps, torch.tensor([*terminated, *truncated, 5]))
    elsewhere = 3 + torch.rand(6, generator=generator, dtype=torch.float64)
    return {
        "rewards": torch.randn(6, generator=generator, dtype=torch.float64),
        "values": values,
        "next_values": torch.where(cut, elsewhere, values.roll(-1)),
        "terminated": torch.isin(steps, torch.tensor(terminated)),
        "truncated": torch.isin(steps, torch.tensor(truncated)),
        "gamma": gamma,
        "gae_lambda": gae_lambda,
    }


def _gae(
    rewards: Tensor,
    values: Tensor,
    next_values: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    gamma: float,
    gae_lambda: float,
) -> Tensor:
    """Add up the TD errors forwards from each step until its episode ends or is cut."""
    T, advantages = len(rewards), torch.zeros_like(rewards)
    for t in range(T):
        for k in range(t, T):
            following = 0.0 if terminated[k] else float(next_values[k])
            delta = float(rewards[k]) + gamma * following - float(values[k])
            advantages[t] += (gamma * gae_lambda) ** (k - t) * delta
            if terminated[k] or truncated[k]:
                break
    return advantages


def _wrong_gae(
    *,
    through_end: bool = False,
    through_limit: bool = False,
    limit_ends: bool = False,
    end_goes_on: bool = False,
    next_row: bool = False,
    no_lambda: bool = False,
    no_gamma: bool = False,
) -> Callable[..., Tensor]:
    """Return the recursion with one thing wrong."""

    def advantages(
        rewards: Tensor,
        values: Tensor,
        next_values: Tensor,
        terminated: Tensor,
        truncated: Tensor,
        gamma: float,
        gae_lambda: float,
    ) -> Tensor:
        if next_row:
            next_values = torch.cat([values[1:], next_values[-1:]])
        nothing = torch.zeros_like(terminated) if end_goes_on else terminated
        nothing = nothing | truncated if limit_ends else nothing
        deltas = rewards + gamma * next_values * ~nothing - values
        stop = torch.zeros_like(terminated) if through_end else terminated
        stop = stop if through_limit else stop | truncated
        decay = (1.0 if no_gamma else gamma) * (1.0 if no_lambda else gae_lambda)
        found, carried = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
        for t in reversed(range(len(rewards))):
            carried = deltas[t] + decay * ~stop[t] * carried
            found[t] = carried
        return found

    return advantages


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="ppo.four-samples",
        reference=_four_samples,
        mistakes={
            "You clip without the minimum; a sample that has gone the wrong way "
            "keeps its gradient": (
                lambda: ([2.4, -2.4, 1.6, -1.6], [0.0, 0.0, 0.0, 0.0])
            ),
            "You take the maximum; the objective is the pessimistic one of the two": (
                lambda: ([2.6, -2.4, 1.6, -1.4], [2.6, 0.0, 0.0, -1.4])
            ),
            "You do not clip at all": lambda: (
                [2.6, -2.6, 1.4, -1.4],
                [2.6, -2.6, 1.4, -1.4],
            ),
            "Where the gradient is on, the weight is ρA, not A": (
                lambda: ([2.4, -2.6, 1.4, -1.6], [0.0, -2.0, 2.0, 0.0])
            ),
            "These are losses; the objective has the other sign": (
                lambda: ([-2.4, 2.6, -1.4, 1.6], [0.0, 2.6, -1.4, 0.0])
            ),
        },
    ),
    Exercise(
        name="ppo.clipped-loss",
        reference=_clipped_loss,
        gradient="log_prob",
        constants=("old_log_prob", "advantages"),
        cases=(
            _batch_case(
                [1.3, 1.3, 0.7, 0.7], [2.0, -2.0, 2.0, -2.0], [True] * 4, clip_ratio=0.2
            ),
            _batch_case([1.0, 1.1, 0.9], [1.0, -1.0, 0.5], [True] * 3, clip_ratio=0.2),
            _batch_case(
                [1.15, 5.0, 1.0, 0.2, 3.0, 0.5],
                [1.0, -3.0, 0.0, 2.0, 9.0, -9.0],
                [True, True, True, True, False, False],
                clip_ratio=0.1,
            ),
        ),
        mistakes={
            "The minimum is missing: a sample that has gone the wrong way must keep "
            "its gradient": (_wrong_clipped(better=_second)),
            "That is the maximum; the minimum is the pessimistic one": _wrong_clipped(
                better=torch.maximum
            ),
            "Nothing is clipped": _wrong_clipped(better=_first),
            "The sign is reversed: a loss is minimised": _wrong_clipped(sign=-1.0),
            "The ratio is upside down: the new probability goes on top": _wrong_clipped(
                upside_down=True
            ),
            "The ratio is always 1: log_prob is compared with itself, not with "
            "old_log_prob": (_wrong_clipped(recomputed=True)),
            "The ratio is detached, so nothing learns": _wrong_clipped(detached=True),
            "The mean counts rows that are not valid": _wrong_clipped(every_row=True),
        },
    ),
    Exercise(name="ppo.unseen-move", verify=_moves_unseen),
    Exercise(
        name="ppo.dual-clip",
        reference=_dual_clip,
        gradient="log_prob",
        constants=("old_log_prob", "advantages"),
        cases=(
            _batch_case(
                [0.5, 1.0, 2.9, 3.1, 5.0, 5.0],
                [-1.0, -1.0, -1.0, -1.0, -2.0, 1.0],
                clip_ratio=0.2,
                c=3.0,
            ),
            _batch_case(
                [4.0, 0.5, 1.0, 2.5, 0.9],
                [-1.0, 2.0, 0.0, -0.5, 1.0],
                clip_ratio=0.1,
                c=2.0,
            ),
        ),
        mistakes={
            "That is the loss without the second clip": _wrong_dual(
                lambda objective, advantages, c: objective
            ),
            "Samples with A > 0 are changed as well": (
                _wrong_dual(
                    lambda objective, advantages, c: torch.maximum(
                        objective, c * advantages
                    )
                )
            ),
            "For A < 0 take the larger of the two objectives: cA is the least there "
            "can be": (
                _wrong_dual(
                    lambda objective, advantages, c: torch.where(
                        advantages < 0,
                        torch.minimum(objective, c * advantages),
                        objective,
                    )
                )
            ),
        },
    ),
    Exercise(
        name="ppo.gae",
        reference=_gae,
        cases=(
            _buffer_case(0, [1], [3], 0.9, 0.95),
            _buffer_case(1, [5], [0, 2], 0.99, 0.5),
            _buffer_case(
                2, [3], [3], 0.9, 1.0
            ),  # step 3 ends and is cut at once: it has ended
            _buffer_case(3, [2], [4], 0.5, 0.0),
        ),
        mistakes={
            "The trace goes through the end of an episode into the next "
            "one": _wrong_gae(through_end=True),
            "The trace goes through a time limit into the next episode": _wrong_gae(
                through_limit=True
            ),
            "A time limit is taken for an end: the value of the state that was "
            "reached counts": (_wrong_gae(limit_ends=True)),
            "A value is added after a true end, but nothing follows it": _wrong_gae(
                end_goes_on=True
            ),
            "At a cut the next row is another episode: use next_values, not values[t "
            "+ 1]": (_wrong_gae(next_row=True)),
            "The λ is missing": _wrong_gae(no_lambda=True),
            "The trace decays with γλ, not with λ alone": _wrong_gae(no_gamma=True),
        },
    ),
    Exercise(
        name="ppo.minibatch-loss",
        reference=_minibatch_loss,
        gradient=("logits", "values"),
        constants=("old_log_prob", "advantages", "targets"),
        cases=(
            _update_case(0, [1.0, 1.0, 1.0], [1.0, -1.0, 0.5], 0.2),
            _update_case(1, [1.3, 1.3, 0.7, 0.7], [2.0, -2.0, 2.0, -2.0], 0.2),
            _update_case(
                2, [4.0, 0.5, 1.05, 0.2, 1.0], [-3.0, 1.0, 1.0, -1.0, 0.0], 0.1
            ),
        ),
        mistakes={
            "All three faults are still there": _wrong_minibatch(
                over_batch=True, no_minimum=True, detached=True
            ),
            "The softmax runs over the batch: each row of logits is a distribution "
            "over actions": _wrong_minibatch(over_batch=True),
            "The softmax runs over the batch, and the minimum is missing": (
                _wrong_minibatch(over_batch=True, no_minimum=True)
            ),
            "The softmax runs over the batch, and the critic never learns": (
                _wrong_minibatch(over_batch=True, detached=True)
            ),
            "The minimum is missing: a sample that has gone the wrong way must keep "
            "its gradient": _wrong_minibatch(no_minimum=True),
            "The critic never learns: its values are detached": _wrong_minibatch(
                detached=True
            ),
            "The minimum is missing, and the critic never learns": _wrong_minibatch(
                no_minimum=True, detached=True
            ),
            "The policy descends its objective: the minus sign is missing": (
                _wrong_minibatch(sign=-1.0)
            ),
        },
    ),
    Exercise(
        name="ppo.clip-for-a-kl",
        reference=_clip_for,
        cases=({"kl_limit": 0.02}, {"kl_limit": 0.01}, {"kl_limit": 0.5}),
        mistakes={
            "That is the approximation for small ε; the exact bound is asked for": (
                lambda kl_limit: math.sqrt(2 * kl_limit)
            ),
            "That solves for a bound on the total variation, ε / 2": (
                lambda kl_limit: 2 * kl_limit
            ),
            "The factor ½ of the bound is missing": (
                lambda kl_limit: math.sqrt(1 - math.exp(-kl_limit))
            ),
        },
    ),
    Exercise(
        name="ppo.four-logs",
        reference=lambda: {"A": "d", "B": "b", "C": "c", "D": "a"},
        mistakes={
            "A and B: in both every ratio is 1, but only in one does the entropy "
            "move": lambda: {"A": "b", "B": "d", "C": "c", "D": "a"},
            "C makes one step per batch, so there is nothing to clip; yet its ratios "
            "are not 1": lambda: {"A": "d", "B": "b", "C": "f", "D": "a"},
            "D learns, but to fall": lambda: {"A": "d", "B": "b", "C": "c", "D": "f"},
        },
    ),
)
