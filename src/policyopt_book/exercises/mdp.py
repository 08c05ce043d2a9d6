"""Exercises of the chapter on Markov decision processes."""

from __future__ import annotations

import math
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
    if not math.isfinite(step_reward):
        return f"Return a finite number, not {step_reward!r}."
    layout = ["S...G", ".HHH.", "....."]
    bridge = grid_world(layout, slip=0.3, gamma=0.99, step_reward=float(step_reward))
    moves = mdp.policy_iteration(bridge).policy.argmax(-1).tolist()
    row = column = 0
    walked = []
    for _ in range(bridge.n_states):  # as long as it does not slip
        move = moves[5 * row + column]
        walked.append(("left", "down", "right", "up")[move])
        down, right = ((0, -1), (1, 0), (0, 1), (-1, 0))[move]
        row = min(max(row + down, 0), 2)
        column = min(max(column + right, 0), 4)
        if layout[row][column] in "GH":
            break
    if layout[row][column] == "H":
        return None
    end = "the goal" if layout[row][column] == "G" else "no end"
    return (
        f"With step_reward = {step_reward} the best moves from the start, without a "
        f"slip, are {', '.join(walked[:6])}{', ...' if len(walked) > 6 else ''}: they "
        f"lead to {end}. How much must a step cost before an early end is worth more "
        "than the goal?"
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


def _random_policy(seed: int, shape: torch.Size) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).softmax(-1)


def _length_case(seed: int, start: int) -> dict[str, Any]:
    P, R = _world(seed)
    return {"P": P, "policy": _random_policy(200 + seed, R.shape), "start": start}


def _visits_and_length(P: Tensor, policy: Tensor, start: int) -> tuple[Tensor, float]:
    """Return the visits by adding up the probabilities of every step, and the value of
    a reward of 1 for every move.
    """
    ones = torch.ones(policy.shape, dtype=torch.float64)
    ones[-1] = 0.0
    initial = torch.eye(len(P), dtype=torch.float64)[start]
    clock = mdp.FiniteMDP(P=P, R=ones, gamma=1.0, initial=initial)
    moves = torch.einsum("sa,sat->st", policy, P)
    visits, here = torch.zeros(len(P), dtype=torch.float64), initial
    while here[:-1].sum() > 1e-12:
        visits, here = visits + here, here @ moves
    return visits[:-1], float(mdp.policy_evaluation(clock, policy)[start])


def _count_the_end(P: Tensor, policy: Tensor, start: int) -> tuple[Tensor, float]:
    visits, length = _visits_and_length(P, policy, start)
    return visits, length + 1.0


def _from_the_first_state(
    P: Tensor, policy: Tensor, start: int
) -> tuple[Tensor, float]:
    return _visits_and_length(P, policy, 0)


def _into_the_state(P: Tensor, policy: Tensor, start: int) -> tuple[Tensor, float]:
    """Take the column of the inverse for its row."""
    moves = torch.einsum("sa,sat->st", policy, P)[:-1, :-1]
    inverse = torch.linalg.inv(torch.eye(len(moves), dtype=torch.float64) - moves)
    return inverse[:, start], float(inverse[start].sum())


def _solve_case(seed: int, gamma: float) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(300 + seed)
    P = torch.rand(4, 3, 4, generator=generator, dtype=torch.float64)
    R = torch.rand(4, 3, generator=generator, dtype=torch.float64)
    return {
        "P": P / P.sum(-1, keepdim=True),
        "R": R,
        "gamma": gamma,
        "tolerance": _TOLERANCE,
    }


_TOLERANCE = 1e-3


def _solve(P: Tensor, R: Tensor, gamma: float, tolerance: float) -> Tensor:
    initial = torch.full((len(R),), 1 / len(R))
    return mdp.policy_iteration(mdp.FiniteMDP(P, R, gamma, initial)).values


def _swept(
    P: Tensor, R: Tensor, gamma: float, stop: float, *, best: bool = True
) -> Tensor:
    """Sweep until the last change is below ``stop``."""
    values, change = torch.zeros(len(R), dtype=R.dtype), float("inf")
    while change > stop:
        q = R + gamma * P @ values
        updated = q.amax(-1) if best else q.mean(-1)
        change, values = float((updated - values).abs().max()), updated
    return values


def _problem(seed: int, gamma: float) -> mdp.FiniteMDP:
    P, R = _world(seed)
    return mdp.FiniteMDP(P, R, gamma, [0.5, 0.5, 0.0, 0.0])  # type: ignore[arg-type]


def _gain_case(seed: int, gamma: float) -> dict[str, Any]:
    problem = _problem(seed, gamma)
    new, old = (_random_policy(k + seed, problem.R.shape) for k in (400, 500))
    return {"problem": problem, "new": new, "old": old}


def _gain(problem: mdp.FiniteMDP, new: Tensor, old: Tensor) -> Tensor:
    return mdp.expected_return(problem, new) - mdp.expected_return(problem, old)


def _old_states(problem: mdp.FiniteMDP, new: Tensor, old: Tensor) -> Tensor:
    gain = (new * mdp.advantages(problem, old)).sum(-1)
    return mdp.occupancy(problem, old) @ gain


def _gradient_case(seed: int, gamma: float) -> dict[str, Any]:
    problem = _problem(seed, gamma)
    theta = _random_policy(600 + seed, problem.R.shape) * 2.0
    return {"problem": problem, "theta": theta}


def _gradient(problem: mdp.FiniteMDP, theta: Tensor) -> Tensor:
    """Differentiate J through the linear solve."""
    theta = theta.detach().requires_grad_()
    J = mdp.expected_return(problem, theta.softmax(-1))
    return torch.autograd.grad(J, theta)[0]


def _parts(problem: mdp.FiniteMDP, theta: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    policy = theta.softmax(-1)
    return (
        mdp.occupancy(problem, policy)[:, None],
        policy,
        mdp.advantages(problem, policy),
    )


def _without_occupancy(problem: mdp.FiniteMDP, theta: Tensor) -> Tensor:
    _, policy, advantage = _parts(problem, theta)
    return policy * advantage


def _without_policy(problem: mdp.FiniteMDP, theta: Tensor) -> Tensor:
    occupancy, _, advantage = _parts(problem, theta)
    return occupancy * advantage


def _with_q(problem: mdp.FiniteMDP, theta: Tensor) -> Tensor:
    occupancy, policy, _ = _parts(problem, theta)
    return occupancy * policy * mdp.action_values(problem, policy)


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
        reference=_visits_and_length,
        cases=(_length_case(0, 0), _length_case(1, 2)),
        mistakes={
            "The length counts the terminal state as well, but no move "
            "is made there": _count_the_end,
            "You start in state 0, whatever start says": _from_the_first_state,
            "The visits are the column of the inverse, which says from where "
            "the start is reached; take its row": _into_the_state,
        },
    ),
    Exercise(
        name="mdp.solve",
        reference=_solve,
        cases=(_solve_case(0, 0.99), _solve_case(1, 0.9), _solve_case(2, 0.0)),
        mistakes={
            "The loop stops when the last change is below the tolerance; the error "
            "may be γ / (1 − γ) times as large": (
                lambda P, R, gamma, tolerance: _swept(P, R, gamma, tolerance)
            ),
            "The values are those of the uniform policy: take the best action, not "
            "the mean": (
                lambda P, R, gamma, tolerance: _swept(
                    P, R, gamma, 1e-3 * tolerance, best=False
                )
            ),
        },
        rtol=0.0,
        atol=_TOLERANCE,
    ),
    Exercise(
        name="mdp.gain",
        reference=_gain,
        cases=(_gain_case(0, 0.9), _gain_case(1, 0.5), _gain_case(2, 1.0)),
        mistakes={
            "The states are those of the old policy; the lemma needs the new "
            "one's": _old_states,
            "The roles are exchanged: advantages of the new policy in the states of "
            "the old one give J(old) − J(new)": (
                lambda problem, new, old: -_gain(problem, new, old)
            ),
            "The occupancy is normalised; in this book it is not": (
                lambda problem, new, old: (1 - problem.gamma) * _gain(problem, new, old)
            ),
        },
    ),
    Exercise(
        name="mdp.gradient",
        reference=_gradient,
        cases=(_gradient_case(0, 0.9), _gradient_case(1, 0.5), _gradient_case(2, 1.0)),
        mistakes={
            "The occupancy is missing: states count as often as they are "
            "visited": _without_occupancy,
            "The probability of the action is missing": _without_policy,
            "This is Q in the place of the advantage: for the softmax the two are not "
            "the same, because raising one preference lowers the others' "
            "probabilities": _with_q,
        },
    ),
)
