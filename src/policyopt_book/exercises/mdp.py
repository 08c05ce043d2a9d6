"""Exercises of the chapter on Markov decision processes."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from policyopt import mdp
from policyopt_book.exercises import Exercise
from policyopt_book.tasks.grids import grid_world

__all__ = ["EXERCISES"]


def _by_hand() -> tuple[float, float]:
    chain = mdp.FiniteMDP(
        P=torch.tensor([[[0, 1, 0]], [[0.5, 0, 0.5]], [[0, 0, 1]]]),
        R=torch.tensor([[2.0], [4.0], [0.0]]),
        gamma=1.0,
        initial=torch.tensor([1.0, 0, 0]),
    )
    first, second, _ = mdp.policy_evaluation(chain, mdp.uniform_policy(chain)).tolist()
    return first, second


def _jumps(step_reward: Any) -> str | None:
    """Say why the best policy on the bridge of the chapter would not jump; None if it
    does.
    """
    if isinstance(step_reward, bool) or not isinstance(step_reward, (int, float)):
        return f"Return a number, not {step_reward!r}."
    bridge = grid_world(
        ["S...G", ".HHH.", "....."],
        slip=0.3,
        gamma=0.99,
        step_reward=float(step_reward),
    )
    moves = mdp.policy_iteration(bridge).policy.argmax(-1)
    if all(moves[cell] == 1 for cell in (1, 2)):
        return None
    names = ["left", "down", "right", "up"]
    return (
        f"With step_reward = {step_reward} the best moves on the bridge, above the "
        f"holes, are {', '.join(names[moves[cell]] for cell in (1, 2))}; to jump is "
        "down. How much must a step cost before an early end is worth more than the "
        "goal?"
    )


def _world(seed: int) -> tuple[Tensor, Tensor]:
    """Return P ``[4, 2, 4]`` and R ``[4, 2]`` of a random MDP whose last state is
    terminal.
    """
    generator = torch.Generator().manual_seed(seed)
    P = torch.rand(4, 2, 4, generator=generator, dtype=torch.float64)
    P[-1] = 0.0
    P[-1, :, -1] = 1.0
    R = torch.randn(4, 2, generator=generator, dtype=torch.float64)
    R[-1] = 0.0
    return P / P.sum(-1, keepdim=True), R


def _shaping_case(seed: int, gamma: float) -> dict[str, Any]:
    P, R = _world(seed)
    potential = torch.randn(
        4, generator=torch.Generator().manual_seed(100 + seed), dtype=torch.float64
    )
    potential[-1] = 0.0
    return {"P": P, "R": R, "gamma": gamma, "potential": potential}


def _shaped(P: Tensor, R: Tensor, gamma: float, potential: Tensor) -> Tensor:
    shaped = R.clone()
    states, actions = R.shape
    for s in range(states):
        for a in range(actions):
            following = sum(float(P[s, a, t] * potential[t]) for t in range(states))
            shaped[s, a] += gamma * following - potential[s]
    return shaped


def _return_case(rewards: list[float], gamma: float) -> dict[str, Any]:
    return {"rewards": torch.tensor(rewards, dtype=torch.float64), "gamma": gamma}


def _returns(rewards: Tensor, gamma: float) -> Tensor:
    T = len(rewards)
    discounts = torch.tensor(
        [[gamma ** (k - t) if k >= t else 0.0 for k in range(T)] for t in range(T)]
    )
    return discounts.to(rewards) @ rewards


def _length_case(seed: int, start: int) -> dict[str, Any]:
    P, R = _world(seed)
    generator = torch.Generator().manual_seed(200 + seed)
    policy = torch.randn(R.shape, generator=generator, dtype=torch.float64).softmax(-1)
    return {"P": P, "policy": policy, "start": start}


def _expected_length(P: Tensor, policy: Tensor, start: int) -> float:
    """Return the value of a reward of 1 for every move."""
    ones = torch.ones(policy.shape, dtype=torch.float64)
    ones[-1] = 0.0
    initial = torch.eye(len(P), dtype=torch.float64)[start]
    clock = mdp.FiniteMDP(P=P, R=ones, gamma=1.0, initial=initial)
    return float(mdp.policy_evaluation(clock, policy)[start])


def _length_with_the_end(P: Tensor, policy: Tensor, start: int) -> float:
    return _expected_length(P, policy, start) + 1.0


def _length_from_first_state(P: Tensor, policy: Tensor, start: int) -> float:
    return _expected_length(P, policy, 0)


EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="mdp.by-hand",
        reference=_by_hand,
        mistakes={
            "State 1 leads back to state 0 half of the time, and you stop "
            "there": lambda: (6.0, 4.0),
            "These are the values in the other order": lambda: (10.0, 12.0),
        },
    ),
    Exercise(
        name="mdp.returns",
        reference=_returns,
        cases=(
            _return_case([1.0, 2.0, 3.0], 0.5),
            _return_case([0.0, 0.0, 0.0, 1.0], 0.9),
            _return_case([1.0, -1.0], 1.0),
        ),
        mistakes={
            "You add up what came before the step; a return is what comes after it": (
                lambda rewards, gamma: _returns(rewards.flip(0), gamma).flip(0)
            ),
            "Each return is discounted from the start of the episode, not from its "
            "own step": (
                lambda rewards, gamma: (
                    (gamma ** torch.arange(len(rewards)) * rewards)
                    .flip(0)
                    .cumsum(0)
                    .flip(0)
                )
            ),
            "That is the return of the first step only, repeated": (
                lambda rewards, gamma: _returns(rewards, gamma)[0].expand(len(rewards))
            ),
            "The rewards are not discounted": lambda rewards, gamma: _returns(
                rewards, 1.0
            ),
        },
    ),
    Exercise(name="mdp.jump", verify=_jumps),
    Exercise(
        name="mdp.shaping",
        reference=_shaped,
        cases=(_shaping_case(0, 0.9), _shaping_case(1, 0.5)),
        mistakes={
            "The discount of the next state's potential is missing": (
                lambda P, R, gamma, potential: _shaped(P, R, 1.0, potential)
            ),
            "The signs are reversed: the next potential is added, the present one "
            "subtracted": (
                lambda P, R, gamma, potential: _shaped(P, R, gamma, -potential)
            ),
            "The present state's potential is not subtracted": (
                lambda P, R, gamma, potential: R + gamma * P @ potential
            ),
        },
    ),
    Exercise(
        name="mdp.length",
        reference=_expected_length,
        cases=(_length_case(0, 0), _length_case(1, 2)),
        mistakes={
            "The terminal state is counted as well, but no move "
            "is made there": _length_with_the_end,
            "You start in state 0, whatever start says": _length_from_first_state,
        },
    ),
)
