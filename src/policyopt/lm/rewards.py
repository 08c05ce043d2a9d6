"""Reward functions: called, checked, and added up.

A reward function is any callable that scores completions: it is given the completions,
their prompts and the other columns of the data, one entry per completion each, and
returns one number per completion.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from itertools import chain, count
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policyopt._checks import require
from policyopt.lm.data import Prompt, quote

__all__ = ["RewardFunction", "RewardFunctions", "Rewards", "compute_rewards"]

RewardFunction = Callable[..., Any]
"""``(completions, prompts, **columns)`` ↦ one number per completion (a sequence, array
or tensor).
"""

RewardFunctions = (
    RewardFunction | Sequence[RewardFunction] | Mapping[str, RewardFunction]
)
"""One reward function, several, or several by name."""

_Columns = Mapping[str, Sequence[Any]]
_FORM = "def reward(completions, prompts, **columns): ..."


@dataclass(frozen=True)
class Rewards:
    """Rewards of ``B`` completions, float32 on the CPU."""

    total: Tensor
    """``[B]``, the weighted sum of the parts."""
    parts: dict[str, Tensor]
    """``[B]`` for each reward function, unweighted."""


def compute_rewards(
    functions: RewardFunctions, completions: Sequence[str], prompts: Sequence[Prompt],
    columns: Mapping[str, Sequence[Any]] | None = None, *,
    weights: Sequence[float] | None = None,
) -> Rewards:  # fmt: skip
    """Score completions with every reward function.

    Parameters
    ----------
    functions : callable, sequence or mapping of callables
        Called with ``completions``, ``prompts`` and the columns as keywords. One
        without ``**columns`` is given only what its signature names.
    completions : sequence of str
        ``B`` texts.
    prompts : sequence of str or chat messages
        One per completion.
    columns : mapping of str to sequence, optional
        ``B`` entries each.
    weights : sequence of float, optional
        One per function; by default 1 each.

    Raises
    ------
    RuntimeError
        If a function raises; its own exception is the cause.
    ValueError
        If a function returns anything but one finite number per completion (the message
        names the function and the item), if there are no functions, or not one finite
        weight for each.
    TypeError
        If a function cannot be called with what there is.

    Examples
    --------
    >>> def brevity(completions):
    ...     return [-len(text) for text in completions]
    >>> compute_rewards(brevity, ["yes", "certainly"], ["?", "?"]).total
    tensor([-3., -9.])
    """
    named = _by_name(functions)
    factors = [1.0] * len(named) if weights is None else [float(w) for w in weights]
    fits = len(factors) == len(named) and all(map(math.isfinite, factors))
    each = f"each of the {len(named)} reward functions {list(named)}"
    require(fits, f"weights must be one finite number for {each}", weights)
    available = {"completions": completions, "prompts": prompts, **(columns or {})}
    parts = {name: _score(name, named[name], available) for name in named}
    total = torch.zeros(len(completions), dtype=torch.float64)
    for factor, part in zip(factors, parts.values(), strict=True):
        total += factor * part.double()
    return Rewards(total.float(), parts)


def refuse_trained(functions: RewardFunctions, trained: torch.nn.Module) -> None:
    """Refuse a reward function that computes with the weights that are trained."""
    weights = {p for p in trained.parameters() if p.requires_grad}
    for name, function in _by_name(functions).items():
        reference = getattr(getattr(function, "reference", None), "model", None)
        rule = f"reward function {name!r} must not hold the model that is trained"
        for held in (getattr(function, "network", None), reference):
            ours = isinstance(held, torch.nn.Module) and weights & {*held.parameters()}
            require(not ours, rule, function, "train a copy of the model: model.copy()")


def _by_name(functions: Any) -> dict[str, RewardFunction]:
    if isinstance(functions, Mapping):
        named = {str(name): function for name, function in functions.items()}
    else:
        named, alone = {}, callable(functions) or not isinstance(functions, Iterable)
        for function in [functions] if alone else list(functions):
            inner = getattr(function, "func", function)  # of functools.partial
            base = getattr(inner, "__name__", type(inner).__name__)
            names = chain([base], (f"{base}_{i}" for i in count(2)))
            named[next(name for name in names if name not in named)] = function
    require(bool(named), "there must be at least one reward function", functions)
    for name, function in named.items():
        if not callable(function):
            rule = f"reward function {name!r} must be callable"
            raise TypeError(f"{rule}, got {quote(function)}; write {_FORM}")
    return named


def _score(name: str, function: RewardFunction, available: _Columns) -> Tensor:
    """Call one function, and check what it returns."""
    label, B = f"reward function {name!r}", len(available["completions"])
    # Copies: a function that edits its lists does not change what the next one sees.
    accepted = _accepted(label, function, available)
    arguments = {key: list(available[key]) for key in accepted}
    try:
        result = function(**arguments)
    except Exception as error:
        what = f"{label} raised {type(error).__name__}: {error}"
        first = f"; the first: {_item(available, 0)}" if B else ""
        raise RuntimeError(f"{what} (on a batch of {B} completions{first})") from error
    values = _values(label, result, B)
    scores = [_number(value) for value in values]
    for i, score in enumerate(scores):
        if not math.isfinite(score):
            kind = "" if values[i] is None else f" ({type(values[i]).__name__})"
            got = f"{quote(values[i])}{kind} for item {i} ({_item(available, i)})"
            rule = "a finite number for every completion, 0 where it has no opinion"
            raise ValueError(f"{label} returned {got}; it must return {rule}")
    return torch.tensor(scores, dtype=torch.float32)


def _accepted(label: str, function: RewardFunction, available: _Columns) -> list[str]:
    """Return the names of the arguments that the function's signature takes."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{label} has no readable signature; write {_FORM}") from error
    parameters = signature.parameters.values()
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    keywords = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {p.name for p in parameters if p.kind in keywords}
    if "completions" not in named and not everything:
        what = f"takes no argument 'completions', its signature is {signature}"
        raise TypeError(f"{label} {what}; write {_FORM}")
    for p in parameters:
        variable = p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        given = p.name in available and p.kind is not p.POSITIONAL_ONLY
        if p.default is p.empty and not variable and not given:
            got = f"{p.name!r}, which is not there (there are {', '.join(available)})"
            remedy = "add the column to the data, or give it a default"
            raise TypeError(f"{label} requires {got}; {remedy}")
    return [name for name in available if everything or name in named]


def _values(label: str, result: Any, count: int) -> list[Any]:
    if isinstance(result, Tensor):
        result = result.detach().float().cpu().numpy()
    if isinstance(result, np.ndarray) and result.ndim == 1:
        result = result.tolist()
    scalar = isinstance(result, (str, bytes, Mapping, set))
    if isinstance(result, np.ndarray):
        got = f"an array of shape {result.shape}, not of shape ({count},)"
    elif scalar or not hasattr(result, "__iter__"):
        got = f"{quote(result)} ({type(result).__name__})"
    elif len(values := list(result)) != count:
        got = f"{len(values)} rewards for {count} completions"
    else:
        return values
    wanted = f"one number per completion, {count} here, in their order"
    raise ValueError(f"{label} returned {got}; it must return {wanted}")


def _number(value: Any) -> float:
    """Return a number as a float: infinite if float32 cannot hold it, and NaN for what
    is not a number.
    """
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, (Real, Decimal, np.bool_)):
        return math.nan
    try:
        return torch.tensor(value, dtype=torch.float32).item()
    except OverflowError:
        return math.inf


def _item(available: _Columns, i: int) -> str:
    """Quote a prompt and its completion."""
    prompt, completion = available["prompts"][i], available["completions"][i]
    text = prompt if isinstance(prompt, str) else repr(prompt)
    # The end of a prompt tells more than its beginning, which a template often fixes.
    short = text if len(text) <= 80 else f"…{text[-79:]}"
    return f"prompt {short!r}, completion {quote(completion)}"
