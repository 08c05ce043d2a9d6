"""Reward functions: how they are called, and what may come back."""

from __future__ import annotations

from collections.abc import Sequence
from decimal import Decimal
from fractions import Fraction
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from policyopt.lm.rewards import compute_rewards

COMPLETIONS = ["one", "three", "eleven"]
PROMPTS = ["1", "3", "11"]
COLUMNS = {"answer": [1, 3, 11], "level": ["a", "b", "c"]}


def score(functions: Any, **options: Any) -> Any:
    return compute_rewards(functions, COMPLETIONS, PROMPTS, COLUMNS, **options)


def lengths(completions: Sequence[str]) -> list[int]:
    return [len(text) for text in completions]


def answers(completions: Sequence[str], answer: Sequence[int]) -> list[int]:
    return list(answer)


# --- how they are called ---------------------------------------------------------------------------------------


def test_functions_get_what_they_name() -> None:
    seen: dict[str, Any] = {}

    def everything(completions: list[str], prompts: list[str], **columns: Any) -> list[float]:
        seen.update(completions=completions, prompts=prompts, **columns)
        return [0.0] * 3

    def one_column(*, completions: list[str], level: list[str], absent: int = 4) -> list[int]:
        assert (level, absent) == (COLUMNS["level"], 4)
        return [0] * 3

    def only_keywords(**everything: Any) -> list[int]:
        assert sorted(everything) == ["answer", "completions", "level", "prompts"]
        return [0] * 3

    score([everything, one_column, only_keywords])
    assert seen == {"completions": COMPLETIONS, "prompts": PROMPTS, **COLUMNS}


def test_one_function_several_or_several_by_name() -> None:
    assert list(score(lengths).parts) == ["lengths"]
    assert list(score([lengths, answers]).parts) == ["lengths", "answers"]
    assert list(score({"brief": lengths, "right": answers}).parts) == ["brief", "right"]
    assert list(score([lengths, lengths, partial(answers)]).parts) == ["lengths", "lengths_2", "answers"]


def test_objects_can_be_functions() -> None:
    class Judge:
        def __call__(self, completions: list[str]) -> list[float]:
            return [1.0] * len(completions)

    result = score([Judge(), Judge().__call__])
    assert list(result.parts) == ["Judge", "__call__"]


def test_the_total_is_the_weighted_sum() -> None:
    assert score([lengths, answers]).total.tolist() == [4, 8, 17]
    result = score([lengths, answers], weights=[0.5, -1])
    assert result.total.tolist() == [0.5, -0.5, -8.0]
    assert result.total.dtype == torch.float32
    assert result.parts["lengths"].tolist() == [3, 5, 6], "parts are not weighted"
    assert result.parts["answers"].tolist() == [1, 3, 11]


def test_a_function_that_edits_its_lists_harms_no_other() -> None:
    def careless(completions: list[str], answer: list[int]) -> list[int]:
        completions.clear()
        answer.reverse()
        return [0, 0, 0]

    assert score([careless, lengths, answers]).total.tolist() == [4, 8, 17]
    assert COMPLETIONS == ["one", "three", "eleven"]


@pytest.mark.parametrize(
    "values",
    [
        [1, 2.5, True],
        (1, 2.5, True),
        torch.tensor([1, 2.5, 1]),
        torch.tensor([1, 2.5, 1], dtype=torch.bfloat16, requires_grad=True),
        np.array([1, 2.5, 1]),
        [torch.tensor(1), np.float32(2.5), np.array(1)],
        [Decimal(1), Fraction(5, 2), np.bool_(True)],
        iter([1, 2.5, 1]),
    ],
)
def test_any_sequence_of_numbers_is_a_result(values: Any) -> None:
    def judge(completions: list[str]) -> Any:
        return values

    total = score(judge).total
    assert total.tolist() == [1, 2.5, 1]
    assert (total.dtype, total.requires_grad) == (torch.float32, False)


def test_an_empty_batch() -> None:
    result = compute_rewards(lengths, [], [])
    assert result.total.shape == result.parts["lengths"].shape == (0,)


# --- what goes wrong -------------------------------------------------------------------------------------------


def test_a_function_that_raises_is_named_and_its_exception_kept() -> None:
    def broken(completions: list[str]) -> list[float]:
        raise KeyError("facts")

    with pytest.raises(RuntimeError, match=r"reward function 'broken' raised KeyError: 'facts'") as error:
        score([lengths, broken])
    assert isinstance(error.value.__cause__, KeyError)
    assert "batch of 3 completions; the first: prompt '1', completion 'one'" in str(error.value)

    with pytest.raises(RuntimeError, match=r"batch of 0 completions\)$"):
        compute_rewards(broken, [], [])


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ([1.0, 2.0], "returned 2 rewards for 3 completions"),
        ([], "returned 0 rewards for 3 completions"),
        (torch.zeros(4), "returned 4 rewards for 3 completions"),
        (torch.zeros(3, 1), r"returned an array of shape \(3, 1\).*shape \(3,\)"),
        (np.float64(1), r"returned (np\.float64\(1\.0\)|1\.0) \(float64\); it must return one number"),
        (torch.tensor(1.0), r"returned an array of shape \(\)"),
        (None, r"returned None \(NoneType\); it must return one number per completion, 3 here"),
        (1.0, r"returned 1\.0 \(float\)"),
        ("123", r"returned '123' \(str\)"),
        ({0: 1, 1: 1, 2: 1}, r"returned \{0: 1, 1: 1, 2: 1\} \(dict\)"),
    ],
)
def test_a_result_of_the_wrong_shape(result: Any, message: str) -> None:
    def judge(completions: list[str]) -> Any:
        return result

    with pytest.raises(ValueError, match=rf"^reward function 'judge' {message}"):
        score(judge)


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (None, "None"),
        (float("nan"), "nan"),
        (float("inf"), "inf"),
        (-np.inf, "-inf"),
        (1e39, r"1e\+39"),
        (10**400, "1000"),
        ("1", "'1'"),
        (1j, "1j"),
        (torch.tensor([1.0]), "tensor"),
        (torch.tensor(float("nan")), "tensor"),
        ([1.0], r"\[1\.0\]"),
    ],
)
def test_a_result_that_is_no_finite_number_is_named(value: Any, shown: str) -> None:
    def judge(completions: list[str]) -> Any:
        return [0.0, value, 0.0]

    with pytest.raises(ValueError, match=rf"^reward function 'judge' returned {shown}") as error:
        score(judge)
    assert "for item 1 (prompt '3', completion 'three')" in str(error.value)
    assert "it must return a finite number for every completion" in str(error.value)


def test_long_texts_are_shortened_in_messages() -> None:
    chat = [{"role": "user", "content": "long " * 100 + "question"}]
    with pytest.raises(ValueError, match="for item 0") as error:
        compute_rewards(lambda completions: [None], ["word " * 1000], [chat])
    assert len(str(error.value)) < 500
    assert "question" in str(error.value)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (lambda texts: [0.0], "takes no argument 'completions', its signature is"),
        (
            lambda completions, truth: [0.0],
            "requires 'truth', which is not there.*completions, prompts, answer, level",
        ),
        (lambda completions, /: [0.0], "takes no argument 'completions'"),
        (lambda other, /, **rest: [0.0], "requires 'other'"),
        (type("Opaque", (), {"__signature__": 1, "__call__": print})(), "no readable signature"),
    ],
)
def test_functions_that_cannot_be_called(function: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        score(function)


def test_no_function_and_things_that_are_none() -> None:
    for nothing in ([], {}):
        with pytest.raises(ValueError, match=r"at least one reward function, got (\[\]|{})"):
            score(nothing)
    with pytest.raises(
        TypeError, match=r"reward function 'a' must be callable, got 3; write def reward\(comp"
    ):
        score({"a": 3})
    for wrong in (3, None, [lengths, 3]):
        with pytest.raises(TypeError, match=r"must be callable, got (3|None); write def reward\(completions"):
            score(wrong)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 2.0, 3.0], [1.0, float("nan")]])
def test_weights_that_do_not_fit(weights: list[float]) -> None:
    with pytest.raises(
        ValueError, match=r"one finite number for each of the 2 reward functions \['lengths', 'answers'\]"
    ):
        score([lengths, answers], weights=weights)
