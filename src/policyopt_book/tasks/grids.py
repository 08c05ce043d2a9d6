"""Grid worlds: small Markov decision processes drawn as maps, or read from the tables
of Gymnasium's toy-text environments.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from policyopt.mdp import FiniteMDP

__all__ = ["from_gymnasium", "grid_world"]


def grid_world(
    layout: Sequence[str],
    *,
    gamma: float = 0.95,
    slip: float = 0.0,
    step_reward: float = 0.0,
    terminals: Mapping[str, float] | None = None,
    allow_undiscounted: bool = False,
) -> FiniteMDP:
    """Build the MDP of a map such as ``["..G", ".#H", "S.."]``.

    State ``row * columns + column`` is a cell; the actions are 0 left, 1 down, 2 right,
    3 up, as in FrozenLake. A move against a wall or off the map stays where it is.
    ``#`` is a wall (its state is never visited), ``S`` a start (several: one is drawn
    uniformly; none: any free cell), a letter of ``terminals`` ends the episode, ``.``
    is free.

    Parameters
    ----------
    layout : sequence of str
        Rows of equal length.
    gamma : float
        Discount in [0, 1].
    slip : float
        Probability, in [0, 1], of moving at a right angle to the action instead, half
        of it to each side. FrozenLake's slippery ice is ``slip = 2 / 3``.
    step_reward : float
        Reward of every move.
    terminals : mapping from str to float, optional
        Reward for entering a cell with that letter, in addition to ``step_reward``; by
        default ``{"G": 1.0, "H": -1.0}``.
    allow_undiscounted : bool
        As in :class:`~policyopt.mdp.FiniteMDP`.

    Returns
    -------
    FiniteMDP
        With ``rows * columns`` states and 4 actions.

    Raises
    ------
    ValueError
        For an uneven map, an unknown letter, no cell to start in, or ``slip`` outside
        [0, 1].

    Examples
    --------
    >>> from policyopt import mdp
    >>> mdp.value_iteration(grid_world(["S.G"], gamma=0.5)).values.tolist()
    [0.5, 1.0, 0.0]
    """
    ends = {"G": 1.0, "H": -1.0} if terminals is None else dict(terminals)
    rows, columns = len(layout), len(layout[0]) if layout else 0
    if columns == 0 or any(len(line) != columns for line in layout):
        raise ValueError(
            f"layout must be non-empty strings of equal length, got {list(layout)}"
        )
    cells = "".join(layout)
    unknown = set(cells) - set("#S.") - set(ends)
    if unknown:
        raise ValueError(
            f"layout may hold '#', 'S', '.' and {sorted(ends)}, got {sorted(unknown)}"
        )
    if not 0.0 <= slip <= 1.0:
        raise ValueError(f"slip must lie in [0, 1], got {slip}")
    starts = [s for s, letter in enumerate(cells) if letter == "S"]
    starts = starts or [s for s, letter in enumerate(cells) if letter == "."]
    if not starts:
        raise ValueError(
            f"layout must hold at least one 'S' or '.' to start in, got {list(layout)}"
        )

    moves = ((0, -1), (1, 0), (0, 1), (-1, 0))
    P = torch.zeros(len(cells), 4, len(cells), dtype=torch.float64)
    R = torch.zeros(len(cells), 4, dtype=torch.float64)
    for s, letter in enumerate(cells):
        if letter == "#" or letter in ends:
            P[s, :, s] = 1.0
            continue
        for action in range(4):
            R[s, action] = step_reward
            for turn, probability in ((0, 1.0 - slip), (1, slip / 2), (-1, slip / 2)):
                down, right = moves[(action + turn) % 4]
                row, column = s // columns + down, s % columns + right
                inside = 0 <= row < rows and 0 <= column < columns
                free = inside and layout[row][column] != "#"
                following = row * columns + column if free else s
                P[s, action, following] += probability
                R[s, action] += probability * ends.get(cells[following], 0.0)
    initial = torch.zeros(len(cells), dtype=torch.float64)
    initial[starts] = 1.0 / len(starts)
    return FiniteMDP(P, R, gamma, initial, allow_undiscounted)


def from_gymnasium(
    source: Any,
    gamma: float,
    *,
    initial: Sequence[float] | Tensor | None = None,
    allow_undiscounted: bool = False,
) -> FiniteMDP:
    """Build the MDP of a Gymnasium toy-text environment (FrozenLake, CliffWalking,
    Taxi) from its table.

    A transition that the table marks as *done* ends the episode, whatever the table
    says about the state it leads to. It keeps its next state if that state is terminal
    anyhow (FrozenLake's holes and goal), and leads to one added terminal state, with
    index ``S``, otherwise (CliffWalking's goal, Taxi's drop-off). So nothing is ever
    bootstrapped from beyond the end. A time limit is not part of the table, nor of this
    MDP.

    Parameters
    ----------
    source : environment or mapping
        An environment whose ``unwrapped`` has ``P`` and ``initial_state_distrib``; or
        the table itself, ``table[s][a] = [(probability, next state, reward, done),
        ...]``.
    gamma : float
        Discount in [0, 1].
    initial : sequence of float, optional
        ``[S]``, the distribution of the first state; required with a bare table.
    allow_undiscounted : bool
        As in :class:`~policyopt.mdp.FiniteMDP`.

    Returns
    -------
    FiniteMDP
        With the ``S`` states of the table, and one more if a terminal state had to be
        added.

    Raises
    ------
    ValueError
        If ``source`` has no table, ``initial`` is missing, or the table is not a valid
        MDP.
    """
    environment = getattr(source, "unwrapped", source)
    table = source if isinstance(source, Mapping) else getattr(environment, "P", None)
    if not isinstance(table, Mapping) or not table:
        raise ValueError(
            "source must be a toy-text environment or its table P, got "
            f"{type(environment).__name__}"
        )
    if initial is None:
        initial = getattr(environment, "initial_state_distrib", None)
    if initial is None:
        raise ValueError(
            "initial is required with a bare table: the probability of each state to "
            "be the first"
        )
    n_states, n_actions = len(table), len(table[0])
    absorbing = [
        all(
            nxt == s and reward == 0
            for outcomes in table[s].values()
            for _, nxt, reward, _ in outcomes
        )
        for s in range(n_states)
    ]
    P = torch.zeros(n_states + 1, n_actions, n_states + 1, dtype=torch.float64)
    R = torch.zeros(n_states + 1, n_actions, dtype=torch.float64)
    end = n_states
    P[end, :, end] = 1.0
    for s in range(n_states):
        for a in range(n_actions):
            for probability, following, reward, done in table[s][a]:
                leaves = done and not absorbing[following]
                P[s, a, end if leaves else following] += probability
                R[s, a] += probability * reward
    start = torch.zeros(n_states + 1, dtype=torch.float64)
    start[:end] = torch.as_tensor(initial, dtype=torch.float64)
    if not P[:end, :, end].any():
        P, R, start = P[:end, :, :end], R[:end], start[:end]
    return FiniteMDP(P, R, gamma, start, allow_undiscounted)
