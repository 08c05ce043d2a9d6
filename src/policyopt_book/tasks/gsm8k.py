"""Word problems with a number as the answer (GSM8K): the rule that grades a worked
solution.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from decimal import Decimal

__all__ = ["final_number", "final_number_reward"]

_MARKED = re.compile(r"####([^\n]*)|\\boxed\{([^{}]*)\}")
_NUMBER = re.compile(
    r"[-+]?(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|\.[0-9]+)"
)


def final_number(text: str) -> Decimal | None:
    r"""Return the number that a worked solution declares as its answer.

    The answer is what follows the last ``####``, on the same line, or what is in the
    last ``\boxed{}``, whichever comes later. Currency signs, units and thousands
    separators do not matter. With no such place, no number in it, or several, there is
    no answer: a model cannot profit from listing candidates.

    Examples
    --------
    >>> final_number("48 / 2 = 24 and 48 + 24 = 72, #### 72")
    Decimal('72')
    >>> final_number(r"Together \boxed{\$1,250.50}.")
    Decimal('1250.50')
    >>> final_number("#### 71 or 72") is None
    True
    """
    places = [m.group(1) or m.group(2) or "" for m in _MARKED.finditer(text)]
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
