"""Exercises of the chapter on several turns and tools."""

from __future__ import annotations

import torch
from torch import Tensor

from policyopt.estimators import group_relative_advantages
from policyopt.lm.ppo import token_advantages
from policyopt.losses import aggregate
from policyopt_book.exercises import Exercise

__all__ = ["EXERCISES"]


def _mask(pieces: list[tuple[str, int]]) -> list[bool]:
    mask = list[bool]()
    for who, tokens in pieces:
        mask += [who == "policy"] * tokens
    return mask


def _without_the_end_tokens(pieces: list[tuple[str, int]]) -> list[bool]:
    mask = list[bool]()
    for who, tokens in pieces:
        own = who == "policy"
        mask += [own] * (tokens - 1) + [False]
    return mask


def _last_message_only(pieces: list[tuple[str, int]]) -> list[bool]:
    last = max(i for i, (who, _) in enumerate(pieces) if who == "policy")
    before = [("other", tokens) for _, tokens in pieces[:last]]
    return _mask([*before, *pieces[last:]])


def _to_go(rewards: Tensor, mask: Tensor) -> Tensor:
    result = torch.zeros_like(rewards)
    for b, t in mask.nonzero().tolist():
        result[b, t] = rewards[b, t:].sum()
    return result


def _whole_return(rewards: Tensor, mask: Tensor) -> Tensor:
    return rewards.sum(1, keepdim=True) * mask


def _so_far(rewards: Tensor, mask: Tensor) -> Tensor:
    return rewards.cumsum(1) * mask


def _to_go_everywhere(rewards: Tensor, mask: Tensor) -> Tensor:
    return _to_go(rewards, torch.ones_like(mask))


def _td(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float) -> Tensor:
    return token_advantages(rewards, values, mask, gamma=gamma, gae_lambda=0.0)[0]


def _next_token(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float) -> Tensor:
    following = torch.nn.functional.pad(values[:, 1:], (0, 1))
    return (rewards + gamma * following - values) * mask


def _turns_end(rewards: Tensor, values: Tensor, mask: Tensor, gamma: float) -> Tensor:
    goes_on = torch.nn.functional.pad(mask[:, 1:], (0, 1))
    following = torch.nn.functional.pad(values[:, 1:], (0, 1)) * goes_on
    return (rewards + gamma * following - values) * mask


def _discounted_tokens(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float
) -> Tensor:
    result = torch.zeros_like(rewards)
    for row in range(len(mask)):
        places = mask[row].nonzero().flatten().tolist()
        for t, later in zip(places, [*places[1:], None], strict=True):
            after = 0.0 if later is None else gamma ** (later - t) * values[row, later]
            result[row, t] = rewards[row, t] + after - values[row, t]
    return result


def _loss(log_probs: Tensor, mask: Tensor, rewards: Tensor) -> Tensor:
    A = group_relative_advantages(rewards).flatten()[:, None]
    return aggregate(-A * log_probs, mask)


def _over_all_tokens(log_probs: Tensor, mask: Tensor, rewards: Tensor) -> Tensor:
    A = group_relative_advantages(rewards).flatten()[:, None]
    return aggregate(-A * log_probs)


def _divided_by_all(log_probs: Tensor, mask: Tensor, rewards: Tensor) -> Tensor:
    A = group_relative_advantages(rewards).flatten()[:, None]
    return aggregate(-A * log_probs, mask, denominator=mask.numel())


def _against_the_batch(log_probs: Tensor, mask: Tensor, rewards: Tensor) -> Tensor:
    A = group_relative_advantages(rewards.view(1, -1)).flatten()[:, None]
    return aggregate(-A * log_probs, mask)


def _uphill(log_probs: Tensor, mask: Tensor, rewards: Tensor) -> Tensor:
    return -_loss(log_probs, mask, rewards)


_MASKS = torch.tensor(
    [
        [1, 1, 0, 0, 1, 1, 0, 0, 0],
        [1, 0, 0, 1, 0, 0, 0, 1, 1],
        [1, 1, 1, 0, 0, 0, 0, 0, 0],
    ]
).bool()


def _numbers(seed: int) -> Tensor:
    return torch.randn(_MASKS.shape, generator=torch.Generator().manual_seed(seed))


def _of_turns(seed: int) -> Tensor:
    """Rewards at the last token of each turn."""
    ends = _MASKS & ~torch.nn.functional.pad(_MASKS[:, 1:], (0, 1))
    return torch.where(ends, _numbers(seed), 0.0)


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="agents.mask",
        reference=_mask,
        cases=(
            {"pieces": [("policy", 3), ("tool", 3), ("policy", 2)]},
            {
                "pieces": [
                    ("policy", 2),
                    ("user", 4),
                    ("policy", 3),
                    ("tool", 2),
                    ("policy", 2),
                ]
            },
        ),
        mistakes={
            "The end of a message is an action too: the policy decides to "
            "stop": _without_the_end_tokens,
            "All messages of the policy's are actions, not only the "
            "last": _last_message_only,
        },
    ),
    Exercise(
        name="agents.to-go",
        reference=_to_go,
        cases=tuple({"rewards": _of_turns(i), "mask": _MASKS} for i in (1, 2)),
        mistakes={
            "A reward that came before an action is no consequence of "
            "it": _whole_return,
            "Rewards are added up from the action on, not up to it": _so_far,
            "Tokens of the environment have no weight": _to_go_everywhere,
        },
    ),
    Exercise(
        name="agents.next-state",
        reference=_td,
        cases=tuple(
            {
                "rewards": _of_turns(i),
                "values": _numbers(i + 5),
                "mask": _MASKS,
                "gamma": g,
            }
            for i, g in ((3, 1.0), (4, 0.9))
        ),
        mistakes={
            "The state after a turn is the one before the next action, not the one "
            "in the middle of the reply": _next_token,
            "A turn is not the end of the episode: the value of what comes after "
            "counts": _turns_end,
            "Time is counted in actions: what the environment writes is not "
            "discounted": _discounted_tokens,
        },
    ),
    Exercise(
        name="agents.minimal-loop",
        reference=_loss,
        cases=tuple(
            {
                "log_probs": -_numbers(i).abs()[[0, 1, 2, 0, 1, 2]],
                "mask": _MASKS[[0, 1, 2, 1, 2, 0]],
                "rewards": torch.tensor(rewards),
            }
            for i, rewards in (
                (6, [[0.8, 0.0, 1.0], [0.0, 0.8, 0.0]]),
                (7, [[0.0, 0.0, 1.0], [1.0, 1.0, 1.0]]),
            )
        ),
        mistakes={
            "Tokens of the environment have no place in the loss": _over_all_tokens,
            "The denominator counts the policy's tokens, not all places of the "
            "batch": _divided_by_all,
            "Each reward is compared with its own group, not with the "
            "batch": _against_the_batch,
            "The loss is descended: it is minus what should grow": _uphill,
        },
        gradient="log_probs",
        constants=("rewards",),
    ),
)
