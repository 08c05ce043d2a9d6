"""Reward functions: plain callables, and what is checked of the scores they return."""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from policyopt.lm.data import Prompt

__all__ = ["RewardFunction", "RewardFunctions", "Rewards", "compute_rewards", "final_number_reward"]

RewardFunction: TypeAlias = Callable[..., Sequence[float]]
"""``(completions, prompts, **columns) -> scores``: lists with one entry per completion."""
RewardFunctions: TypeAlias = "RewardFunction | Sequence[RewardFunction] | Mapping[str, RewardFunction]"


@dataclass(frozen=True)
class Rewards:
    """Scores of ``B`` completions."""

    total: Tensor
    """Weighted sum, float32 ``[B]``."""
    parts: dict[str, Tensor]
    """Scores of each function, float32 ``[B]``, unweighted."""


def compute_rewards(
    functions: RewardFunctions,
    completions: Sequence[str],
    prompts: Sequence[Prompt],
    columns: Mapping[str, Sequence[Any]] | None = None,
    *,
    weights: Sequence[float] | None = None,
) -> Rewards:
    """Call reward functions and check what they return.

    Parameters
    ----------
    functions : callable, sequence of callables, or mapping of name to callable
        Each is called with ``completions``, ``prompts`` and the columns as keyword arguments; one without ``**kwargs``
        gets those it names.
    completions, prompts : sequences
        One prompt to each completion.
    columns : mapping of sequences, optional
        Further arguments, one entry per completion.
    weights : sequence of float, optional
        One per function; by default 1.

    Raises
    ------
    RuntimeError
        If a function raises; the message names it, the cause is chained.
    ValueError
        If the scores are not one finite number per completion; the message names the function and the completion.

    Examples
    --------
    >>> def brevity(completions, **columns):
    ...     return [-len(text.split()) for text in completions]
    >>> compute_rewards(brevity, ["one two", "three"], ["", ""]).total
    tensor([-2., -1.])
    """
    named = _named(functions)
    if weights is not None and len(weights) != len(named):
        raise ValueError(f"weights must be one per reward function, got {len(weights)} for {list(named)}")
    parts = {
        name: _scores(name, function, completions, prompts, columns or {}) for name, function in named.items()
    }
    factors = [1.0] * len(parts) if weights is None else weights
    total = torch.stack([factor * part for factor, part in zip(factors, parts.values(), strict=True)]).sum(0)
    return Rewards(total, parts)


def _named(functions: RewardFunctions) -> dict[str, RewardFunction]:
    if isinstance(functions, Mapping):
        named = dict(functions)
    else:
        listed = [functions] if callable(functions) else list(functions)
        names = [getattr(function, "__name__", type(function).__name__) for function in listed]
        # Two lambdas have one name.
        unique = [n if names.count(n) == 1 else f"{n}_{i}" for i, n in enumerate(names)]
        named = dict(zip(unique, listed, strict=True))
    if not named:
        raise ValueError("reward_functions must hold at least one function, got none")
    for name, function in named.items():
        if not callable(function):
            raise TypeError(f"reward function {name!r} must be callable, got a {type(function).__name__}")
    return named


def _scores(
    name: str,
    function: RewardFunction,
    completions: Sequence[str],
    prompts: Sequence[Prompt],
    columns: Mapping[str, Sequence[Any]],
) -> Tensor:
    arguments = {"completions": list(completions), "prompts": list(prompts), **columns}
    try:
        parameters = dict(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # some built-in callables have no signature
        parameters = {}
    if parameters and not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        if "completions" not in parameters:
            raise TypeError(
                f"reward function {name!r} must take an argument named completions, it takes {list(parameters)}"
            )
        arguments = {key: value for key, value in arguments.items() if key in parameters}
    try:
        scores = function(**arguments)
    except Exception as error:
        raise RuntimeError(
            f"reward function {name!r} raised {type(error).__name__}: {error} (on a batch of {len(completions)} "
            f"completions, the first: {_short(completions[0])})"
        ) from error
    if isinstance(scores, Tensor) or hasattr(scores, "tolist"):
        scores = scores.tolist()
    if isinstance(scores, (str, bytes)) or not isinstance(scores, Sequence):
        raise ValueError(
            f"reward function {name!r} must return a list of {len(completions)} numbers, got a {type(scores).__name__}"
        )
    if len(scores) != len(completions):
        raise ValueError(
            f"reward function {name!r} must return one score per completion, {len(completions)}, got {len(scores)}"
        )
    for i, score in enumerate(scores):
        try:
            fine = score is not None and math.isfinite(score)
        except TypeError:
            fine = False
        if not fine:
            raise ValueError(
                f"reward function {name!r} gave {score!r} for completion {i}, {_short(completions[i])} of the prompt "
                f"{_short(prompts[i])}; every score must be a finite number: return a low one for what cannot be scored"
            )
    return torch.tensor([float(score) for score in scores], dtype=torch.float32)


def _short(value: Any) -> str:
    text = value if isinstance(value, str) else str(value)
    return repr(text if len(text) <= 60 else text[:57] + "…")


_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")


def final_number_reward(completions: Sequence[str], answer: Sequence[Any], **columns: Any) -> list[float]:
    r"""1 where a completion's final number is the answer's, else 0: the usual rule for GSM8K.

    The final number is the one after ``####`` or in ``\boxed{}``, and without either the last one of the text. The
    column ``answer`` may be a number or a worked solution that ends with ``#### number``.

    Examples
    --------
    >>> final_number_reward(["so 6 * 7 = 42 apples", "#### 41"], answer=["… #### 42", 42])
    [1.0, 0.0]
    """
    rewards = []
    for completion, expected in zip(completions, answer, strict=True):
        target, found = _final_number(str(expected)), _final_number(completion)
        rewards.append(float(target is not None and found is not None and math.isclose(target, found)))
    return rewards


def _final_number(text: str) -> float | None:
    for marker in ("####", "\\boxed{"):
        if marker in text:
            numbers = _NUMBER.findall(text.rpartition(marker)[2])
            return float(numbers[0].replace(",", "")) if numbers else None
    numbers = _NUMBER.findall(text)
    return float(numbers[-1].replace(",", "")) if numbers else None
