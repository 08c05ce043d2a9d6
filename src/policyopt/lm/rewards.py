"""Reward functions: called, checked, and added up.

A reward function is any callable that scores completions: it is given the completions,
their prompts and the other columns of the data, one entry per completion each, and
returns one number per completion.
"""

from __future__ import annotations

import inspect
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policyopt.lm.data import Prompt, _shorten

__all__ = [
    "RewardFunction",
    "RewardFunctions",
    "Rewards",
    "compute_rewards",
    "final_number",
    "final_number_reward",
]

RewardFunction = Callable[..., Any]
"""``(completions, prompts, **columns)`` ↦ one number per completion (a sequence, array
or tensor).
"""

RewardFunctions = (
    RewardFunction | Sequence[RewardFunction] | Mapping[str, RewardFunction]
)
"""One reward function, several, or several by name."""


@dataclass(frozen=True)
class Rewards:
    """Rewards of ``B`` completions, float32 on the CPU."""

    total: Tensor
    """``[B]``, the weighted sum of the parts."""
    parts: dict[str, Tensor]
    """``[B]`` for each reward function, unweighted."""


def compute_rewards(
    functions: RewardFunctions,
    completions: Sequence[str],
    prompts: Sequence[Prompt],
    columns: Mapping[str, Sequence[Any]] | None = None,
    *,
    weights: Sequence[float] | None = None,
) -> Rewards:
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
    factors = (
        [1.0] * len(named) if weights is None else [float(weight) for weight in weights]
    )
    if len(factors) != len(named) or not all(map(math.isfinite, factors)):
        raise ValueError(
            f"weights must be one finite number for each of the {len(named)} reward "
            f"functions {list(named)}, got {weights!r}"
        )
    parts = {
        name: _score(name, function, completions, prompts, columns or {})
        for name, function in named.items()
    }
    total = torch.zeros(len(completions), dtype=torch.float64)
    for factor, part in zip(factors, parts.values(), strict=True):
        total += factor * part.double()
    return Rewards(total.float(), parts)


def _by_name(functions: RewardFunctions) -> dict[str, RewardFunction]:
    if isinstance(functions, Mapping):
        named = {str(name): function for name, function in functions.items()}
    else:
        named = {}
        for function in [functions] if callable(functions) else list(functions):
            inner = getattr(function, "func", function)  # of functools.partial
            base = getattr(inner, "__name__", type(inner).__name__)
            name, number = base, 1
            while name in named:
                number += 1
                name = f"{base}_{number}"
            named[name] = function
    if not named:
        raise ValueError("there are no reward functions; give at least one")
    for name, function in named.items():
        if not callable(function):
            raise TypeError(
                f"reward function {name!r} must be callable, got "
                f"{type(function).__name__}"
            )
    return named


def _score(
    name: str,
    function: RewardFunction,
    completions: Sequence[str],
    prompts: Sequence[Prompt],
    columns: Mapping[str, Sequence[Any]],
) -> Tensor:
    # Copies, so that a function that edits its lists does not change what the next one
    # sees.
    available: dict[str, list[Any]] = {
        "completions": list(completions),
        "prompts": list(prompts),
    }
    available |= {column: list(values) for column, values in columns.items()}
    arguments = _accepted(name, function, available)
    try:
        result = function(**arguments)
    except Exception as error:
        first = (
            f"; the first: {_quote(completions[0], prompts[0])}" if completions else ""
        )
        raise RuntimeError(
            f"reward function {name!r} raised {type(error).__name__}: {error} (on a "
            f"batch of {len(completions)} completions{first})"
        ) from error
    values = _values(name, result, len(completions))
    scores = torch.zeros(len(values), dtype=torch.float32)
    for i, value in enumerate(values):
        number = _number(value)
        if number is None or not math.isfinite(number):
            shown = (
                "None"
                if value is None
                else _shorten(f"{value!r} ({type(value).__name__})")
            )
            raise ValueError(
                f"reward function {name!r} returned {shown} for item {i} "
                f"({_quote(completions[i], prompts[i])}); it must return a finite "
                "number for every completion, 0 or a penalty where it has no opinion"
            )
        scores[i] = number
    return scores


def _accepted(
    name: str, function: RewardFunction, available: dict[str, list[Any]]
) -> dict[str, list[Any]]:
    """Keep the arguments that the function's signature takes."""
    try:
        parameters = inspect.signature(function).parameters.values()
    except (TypeError, ValueError) as error:
        raise TypeError(
            f"reward function {name!r} has no readable signature; wrap it: "
            "def reward(completions, prompts, **columns): ..."
        ) from error
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    named = {
        p.name: p
        for p in parameters
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
    }
    if "completions" not in named and not everything:
        raise TypeError(
            f"reward function {name!r} takes no argument 'completions', its signature "
            f"is {inspect.signature(function)}; write it as: def reward(completions, "
            "prompts, **columns): ..."
        )
    for p in parameters:
        required = p.default is p.empty and p.kind not in (
            p.VAR_POSITIONAL,
            p.VAR_KEYWORD,
        )
        if required and (p.kind is p.POSITIONAL_ONLY or p.name not in available):
            raise TypeError(
                f"reward function {name!r} requires {p.name!r}, which is not there; it "
                f"can have {', '.join(available)} as keywords: add the column to the "
                "data, or give the argument a default"
            )
    return {
        key: value for key, value in available.items() if everything or key in named
    }


def _values(name: str, result: Any, count: int) -> list[Any]:
    if isinstance(result, Tensor):
        result = result.detach().float().cpu().numpy()
    if isinstance(result, np.ndarray):
        if result.ndim != 1:
            raise ValueError(
                f"reward function {name!r} returned an array of shape {result.shape}; "
                f"it must return one number per completion, {count} here, shape "
                f"({count},)"
            )
        result = result.tolist()
    if isinstance(result, (str, bytes, Mapping, set)) or not hasattr(
        result, "__iter__"
    ):
        raise ValueError(
            f"reward function {name!r} returned {_shorten(repr(result))} "
            f"({type(result).__name__}); it must return one number per completion, "
            f"{count} here"
        )
    values = list(result)
    if len(values) != count:
        raise ValueError(
            f"reward function {name!r} returned {len(values)} rewards for {count} "
            "completions; it must return one number per completion, in their order"
        )
    return values


def _number(value: Any) -> float | None:
    """Return a number as a float, infinite if float32 cannot hold it, or None for what
    is not a number.
    """
    if isinstance(value, (Tensor, np.ndarray)) and value.ndim == 0:
        value = value.item()
    if not isinstance(value, (Real, Decimal, np.bool_)):
        return None
    try:
        return torch.tensor(value, dtype=torch.float32).item()
    except OverflowError:
        return math.inf


def _quote(completion: str, prompt: Prompt) -> str:
    text = prompt if isinstance(prompt, str) else repr(prompt)
    # The end of a prompt tells more than its beginning, which a template often fixes.
    short = text if len(text) <= 80 else f"…{text[-79:]}"
    return f"prompt {short!r}, completion {_shorten(completion)!r}"


# --- a rule for arithmetic ---

_MARKED = re.compile(r"####([^\n]*)|\\boxed\{([^{}]*)\}")
_NUMBER = re.compile(
    r"[-+]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)


def final_number(text: str) -> Decimal | None:
    r"""Return the number that a worked solution declares as its answer.

    The answer stands behind the last ``####`` of the text, on its line, or in the last
    ``\boxed{}``, whichever comes later. Currency signs, units and thousands separators
    do not matter. With no such place, no number in it, or several, there is no answer:
    a model cannot profit from listing candidates.

    Examples
    --------
    >>> final_number("48 / 2 = 24 and 48 + 24 = 72, #### 72")
    Decimal('72')
    >>> final_number(r"Together \boxed{\$1,250.50}.")
    Decimal('1250.50')
    >>> final_number("#### 71 or 72") is None
    True
    """
    places = [
        match.group(1) or match.group(2) or "" for match in _MARKED.finditer(text)
    ]
    return _only_number(places[-1]) if places else None


def final_number_reward(
    completions: Sequence[str], *, answer: Sequence[str | float], **columns: object
) -> list[float]:
    r"""Reward function: 1 where :func:`final_number` of the completion equals the
    column ``answer``, else 0.

    Parameters
    ----------
    completions : sequence of str
    answer : sequence of str or number
        The right numbers, or texts that end with ``#### number`` as in GSM8K, or that
        are a number.

    References
    ----------
    Cobbe et al. (2021), Training verifiers to solve math word problems,
    arXiv:2110.14168: the data set GSM8K.
    """
    scores = []
    for i, (text, right) in enumerate(zip(completions, answer, strict=True)):
        truth = _truth(right)
        if truth is None:
            raise ValueError(f"answer {i} holds no number: {right!r}")
        scores.append(float(final_number(text) == truth))
    return scores


def _truth(answer: str | float) -> Decimal | None:
    if not isinstance(answer, str):
        return Decimal(str(answer))
    return final_number(answer) if _MARKED.search(answer) else _only_number(answer)


def _only_number(text: str) -> Decimal | None:
    found = _NUMBER.findall(text)
    return Decimal(found[0].replace(",", "")) if len(found) == 1 else None
