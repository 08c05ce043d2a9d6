"""Checks for the exercises of the book: each says whether an answer is right and, if
not, what is wrong.

A chapter's exercises are in the module of its name, as a tuple ``EXERCISES``. They are
imported when first asked for, so that the exercises of the first half need nothing of
the second.
"""

from __future__ import annotations

import copy
import importlib
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

__all__ = ["Exercise", "Verdict", "check", "exercises"]


@dataclass(frozen=True)
class Verdict:
    """What a check found; true if the answer is right, and printed in words."""

    name: str
    passed: bool
    message: str

    def __bool__(self) -> bool:
        """Return whether the answer is right."""
        return self.passed

    def __repr__(self) -> str:
        return (
            f"{self.name}: {'solved' if self.passed else 'not solved'}. {self.message}"
        )


@dataclass(frozen=True, kw_only=True)
class Exercise:
    """A question whose answer is a function, and how to tell whether it is right.

    Attributes
    ----------
    name : str
        ``"chapter.name"``.
    reference : callable
        A right answer, written as differently from the expected solution as can be: by
        enumeration, by a slow loop, by finite differences, or the package's own
        function.
    cases : sequence of mapping
        The arguments of each call, by name, in order. They are handed over by position.
    mistakes : mapping of str to callable
        Typical wrong answers. Whoever answers like one of them in every case is told
        its label, a sentence that says what is wrong and why.
    gradient : str or tuple of str, optional
        Arguments, tensors: the sum of the answer must have the reference's gradient
        with respect to each of them as well.
    constants : tuple of str
        The other tensors of numbers, where there is a ``gradient``: what the method
        holds constant, so that an answer may detach it or not. Each must be named, so
        that none is forgotten.
    verify : callable, optional
        For questions with many right answers: called with the answer to the first case;
        returns what is wrong with it, or None. There is no reference then.
    rtol, atol : float
        How far numbers may be off.
    """

    name: str
    reference: Callable[..., Any] | None = None
    cases: Sequence[Mapping[str, Any]] = ({},)
    mistakes: Mapping[str, Callable[..., Any]] = field(default_factory=dict)
    gradient: str | tuple[str, ...] | None = None
    constants: tuple[str, ...] = ()
    verify: Callable[[Any], str | None] | None = None
    rtol: float = 1e-4
    atol: float = 1e-6

    def __post_init__(self) -> None:
        if (self.reference is None) == (self.verify is None):
            raise ValueError(f"exercise {self.name} needs either a reference or verify")

    @property
    def learned(self) -> tuple[str, ...]:
        """The arguments whose gradients are compared."""
        if self.gradient is None or isinstance(self.gradient, tuple):
            return self.gradient or ()
        return (self.gradient,)


class _WrongError(Exception):
    """The answer is wrong; the message says how."""


def exercises(chapter: str | None = None) -> dict[str, Exercise]:
    """Return the exercises of a chapter, or of all, by name.

    Raises
    ------
    ValueError
        If the book has no such chapter, or one without exercises.

    Examples
    --------
    >>> "mdp.by-hand" in exercises("mdp")
    True
    """
    modules = sorted(module.name for module in pkgutil.iter_modules(__path__))
    chapters = [module.replace("_", "-") for module in modules]
    if chapter is not None and chapter not in chapters:
        raise ValueError(f"chapter must be one of {chapters}, got {chapter!r}")
    found: dict[str, Exercise] = {}
    for module, title in zip(modules, chapters, strict=True):
        if chapter in (None, title):
            found |= {
                e.name: e
                for e in importlib.import_module(f"{__name__}.{module}").EXERCISES
            }
    return found


def check(name: str, answer: Any) -> Verdict:
    """Check the answer to an exercise.

    Parameters
    ----------
    name : str
        As the chapter gives it, such as ``"mdp.by-hand"``.
    answer : callable or any
        The function that was asked for. Where it takes no arguments, what it returns
        will do as well.

    Raises
    ------
    ValueError
        If there is no such exercise.

    Examples
    --------
    >>> check("mdp.by-hand", (12, 10))
    mdp.by-hand: solved. 1 case agrees.
    """
    chapter, dot, _ = name.partition(".")
    known = exercises(chapter if dot else None)
    if name not in known:
        raise ValueError(f"name must be one of {sorted(known)}, got {name!r}")
    exercise = known[name]
    try:
        _examine(exercise, answer if callable(answer) else lambda: answer)
    except _WrongError as wrong:
        text = str(wrong)
        return Verdict(name, False, text[0].upper() + text[1:])
    count = len(exercise.cases)
    return Verdict(name, True, f"{count} case{'s agree' if count > 1 else ' agrees'}.")


def _examine(exercise: Exercise, answer: Callable[..., Any]) -> None:
    if exercise.verify is not None:
        case = exercise.cases[0]
        if complaint := exercise.verify(_call(answer, case, ())[0]):
            raise _WrongError(complaint)
        return
    assert exercise.reference is not None
    first: _WrongError | None = None
    right = [
        _call(exercise.reference, case, exercise.learned) for case in exercise.cases
    ]
    got = []
    for case, expected in zip(exercise.cases, right, strict=True):
        given = _call(answer, case, exercise.learned)
        got.append(given)
        try:
            _compare_both(exercise, case, given, expected)
        except _WrongError as wrong:
            first = first or wrong
    if first is None:
        return
    # Wrong somewhere. Does the answer behave like a mistake that is known?
    for label, mistake in exercise.mistakes.items():
        try:
            for case, given in zip(exercise.cases, got, strict=True):
                _compare_both(
                    exercise, case, given, _call(mistake, case, exercise.learned)
                )
        except _WrongError:
            continue
        raise _WrongError(f"{label}. {str(first)[0].upper()}{str(first)[1:]}")
    raise first


def _call(
    function: Callable[..., Any], case: Mapping[str, Any], learned: tuple[str, ...]
) -> tuple[Any, dict[str, torch.Tensor]]:
    """Call a function on copies of the arguments; return its answer, and the gradient
    with respect to each argument asked for.
    """
    arguments = copy.deepcopy(dict(case))
    for name in learned:
        arguments[name].requires_grad_()
    untouched = copy.deepcopy(arguments)
    try:
        given = function(*arguments.values())
    except NotImplementedError:
        raise _WrongError(
            "Nothing there yet: write the body of the function."
        ) from None
    except Exception as error:
        raise _WrongError(
            f"{_words(case)}it raises {type(error).__name__}: {error}"
        ) from error
    if given is None:
        raise _WrongError("Nothing there yet: the function returns None.")
    for name, value in untouched.items():
        if isinstance(value, torch.Tensor) and not torch.equal(value, arguments[name]):
            raise _WrongError(
                f"It changes its argument {name} in place; work on a copy."
            )
    if not learned:
        return given, {}
    if not isinstance(given, torch.Tensor):
        raise _WrongError(
            f"{_words(case)}it must return a tensor, not {type(given).__name__}."
        )
    inputs = [arguments[name] for name in learned]
    slopes: Sequence[torch.Tensor | None] = [None] * len(inputs)
    if given.requires_grad:
        slopes = torch.autograd.grad(given.sum(), inputs, allow_unused=True)
    return given, {
        name: torch.zeros_like(value) if slope is None else slope
        for name, value, slope in zip(learned, inputs, slopes, strict=True)
    }


def _compare_both(
    exercise: Exercise,
    case: Mapping[str, Any],
    given: tuple[Any, dict[str, torch.Tensor]],
    expected: tuple[Any, dict[str, torch.Tensor]],
) -> None:
    _compare(exercise, f"{_words(case)}it returns", given[0], expected[0])
    for name, slope in expected[1].items():
        what = f"{_words(case)}the value is right, but "
        if slope.any() and not given[1][name].any():
            raise _WrongError(
                f"{what}no gradient arrives at {name}: something detaches it."
            )
        what += f"the gradient with respect to {name} is"
        _compare(exercise, what, given[1][name], slope)


def _compare(exercise: Exercise, what: str, given: Any, expected: Any) -> None:
    if isinstance(expected, Mapping):
        if not isinstance(given, Mapping) or set(given) != set(expected):
            raise _WrongError(
                f"{what} {_show(given)}; expected a dictionary with the keys "
                f"{sorted(expected)}."
            )
        for key in expected:
            _compare(exercise, f"{what}, under {key!r},", given[key], expected[key])
        return
    if isinstance(expected, (tuple, list)) and not all(
        isinstance(e, (int, float)) for e in expected
    ):
        if not isinstance(given, (tuple, list)) or len(given) != len(expected):
            raise _WrongError(
                f"{what} {_show(given)}; expected {len(expected)} values."
            )
        for i, (g, e) in enumerate(zip(given, expected, strict=True)):
            _compare(exercise, f"{what}, as value {i + 1},", g, e)
        return
    if isinstance(expected, (str, bool)):
        if type(given) is not type(expected) or given != expected:
            raise _WrongError(f"{what} {given!r}, expected {expected!r}.")
        return
    try:
        numbers, target = _numbers(given), _numbers(expected)
    except (TypeError, ValueError):
        raise _WrongError(
            f"{what} {_show(given)}, expected {_show(expected)}."
        ) from None
    if numbers.shape != target.shape:
        raise _WrongError(f"{what} the shape {numbers.shape}, expected {target.shape}.")
    if not np.allclose(
        numbers, target, rtol=exercise.rtol, atol=exercise.atol, equal_nan=True
    ):
        raise _WrongError(f"{what} {_show(numbers)}, expected {_show(target)}.")


def _numbers(value: Any) -> np.ndarray[Any, np.dtype[np.float64]]:
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu().double().numpy()
    return np.asarray(value, dtype=np.float64)


def _show(value: Any) -> str:
    if isinstance(value, (torch.Tensor, np.ndarray, float, int)) and not isinstance(
        value, bool
    ):
        numbers = _numbers(value)
        return np.array2string(
            numbers, precision=4, threshold=12, edgeitems=3, separator=", "
        )
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


def _words(case: Mapping[str, Any]) -> str:
    """Say for which arguments, unless there are none or they are too long to be of
    help.
    """
    text = ", ".join(f"{name} = {_show(value)}" for name, value in case.items())
    text = " ".join(text.split())
    return (
        "" if not text else f"For {text if len(text) <= 200 else 'one of the cases'}, "
    )
