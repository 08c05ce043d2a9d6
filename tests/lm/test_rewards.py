"""Reward functions: how they are called, and what may come back."""

from __future__ import annotations

import asyncio
import copy
import math
import multiprocessing
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_runs import tiny_model, tiny_tokenizer
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
)

from policyopt.lm import GRPOConfig, SamplingConfig, train_grpo
from policyopt.lm.rewards import ClassifierReward, OverlongPenalty, compute_rewards

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


# --- functions that wait ---------------------------------------------------------------------------------------


async def slow_lengths(completions: Sequence[str]) -> list[int]:
    await asyncio.sleep(0.01)
    return lengths(completions)


def test_asynchronous_functions_are_awaited() -> None:
    class Judge:
        async def __call__(self, completions: list[str], answer: list[int]) -> torch.Tensor:
            return torch.tensor(answer)

    result = score([slow_lengths, Judge(), lengths, partial(slow_lengths)])
    assert list(result.parts) == ["slow_lengths", "Judge", "lengths", "slow_lengths_2"]
    assert result.total.tolist() == [3 * 3 + 1, 3 * 5 + 3, 3 * 6 + 11]


def test_they_work_where_a_loop_is_running() -> None:
    """As in Jupyter, whose cells run inside a loop."""

    async def cell() -> list[float]:
        return score([slow_lengths, lengths]).total.tolist()

    assert asyncio.run(cell()) == [6, 10, 12]


def test_they_wait_at_the_same_time_and_in_one_loop_for_all_batches() -> None:
    met: list[Any] = []
    loops = set()

    async def meet(completions: list[str]) -> list[int]:
        loops.add(asyncio.get_running_loop())
        if not met:
            met.append(asyncio.Barrier(2))
        await asyncio.wait_for(met[0].wait(), 20)  # each waits for the other
        return [1] * len(completions)

    for _ in range(2):
        assert score([meet, meet]).total.tolist() == [2, 2, 2]
    assert len(loops) == 1


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
def test_they_work_in_a_forked_process() -> None:
    """A child has no thread of its parent: the parent's loop would never answer there."""
    assert score(slow_lengths).total.tolist() == [3, 5, 6]
    context = multiprocessing.get_context("fork")
    queue = context.SimpleQueue()
    process = context.Process(target=lambda: queue.put(score(slow_lengths).total.tolist()))
    process.start()
    process.join(30)
    alive = process.is_alive()
    process.kill()
    assert not alive
    assert queue.get() == [3, 5, 6]


def test_an_asynchronous_function_that_raises_is_named() -> None:
    async def broken(completions: list[str]) -> list[float]:
        await asyncio.sleep(0)
        raise ConnectionError("no judge")

    with pytest.raises(
        RuntimeError, match=r"reward function 'broken' raised ConnectionError: no judge \(on a batch of 3"
    ) as error:
        score([lengths, broken])
    assert isinstance(error.value.__cause__, ConnectionError)

    async def short(completions: list[str]) -> list[float]:
        return [1.0]

    with pytest.raises(ValueError, match=r"'short' returned 1 rewards for 3 completions"):
        score(short)
    assert sum(thread.name == "policyopt" for thread in threading.enumerate()) == 1


def test_what_a_function_changes_is_its_own() -> None:
    chats = [[{"role": "user", "content": "one"}, {"role": "user", "content": "two"}] for _ in range(2)]
    columns = {"goals": [["a", "b"], ["c"]]}

    def careless(completions: list[str], prompts: Any, goals: list[list[str]]) -> list[float]:
        for chat, goal in zip(prompts, goals, strict=True):
            chat.pop()
            chat[0]["content"] = "lost"
            goal.clear()
        return [0.0] * len(completions)

    def counts(completions: list[str], prompts: Any, goals: list[list[str]]) -> list[float]:
        return [len(chat) + 10.0 * len(goal) for chat, goal in zip(prompts, goals, strict=True)]

    result = compute_rewards([careless, counts], ["x", "y"], chats, columns)
    assert result.total.tolist() == [22.0, 12.0]
    assert [len(chat) for chat in chats] == [2, 2]
    assert columns == {"goals": [["a", "b"], ["c"]]}


# --- functions that abstain ------------------------------------------------------------------------------------


def test_none_is_not_counted() -> None:
    def sometimes(completions: list[str]) -> list[float | None]:
        return [None, 2.0, None]

    result = score([lengths, sometimes], weights=[1.0, 10.0])
    assert result.total.tolist() == [3, 25, 6]
    assert result.parts["sometimes"].isnan().tolist() == [True, False, True]
    assert result.parts["sometimes"][1] == 2


def test_one_function_must_have_an_opinion() -> None:
    def never(completions: list[str]) -> list[None]:
        return [None] * 3

    def first(completions: list[str]) -> list[float | None]:
        return [0.0, None, 1.0]

    assert score([never, lengths]).total.tolist() == [3, 5, 6]
    with pytest.raises(
        ValueError, match=r"'never and first' returned None for item 1 \(prompt '3'.*that no other scores"
    ):
        score([never, first])
    with pytest.raises(ValueError, match=r"'never' returned None for item 0"):
        score(never)


def test_the_history_has_the_mean_of_what_was_scored(tmp_path: Path) -> None:
    seen: list[list[float | None]] = []

    def brief(completions: list[str]) -> list[float | None]:
        seen.append([None if len(text.split()) > 3 else 1.0 + len(text) for text in completions])
        return seen[-1]

    def never(completions: list[str]) -> list[None]:
        return [None] * len(completions)

    config = GRPOConfig(updates=2, batch_size=4, group_size=4, sampling=SamplingConfig(max_new_tokens=6))
    functions = {"zero": lambda completions: [0.0] * len(completions), "brief": brief, "never": never}
    data = [{"prompt": "one two"}] * 4
    result = train_grpo(tiny_model(), data, functions, config, progress=False, checkpoint_dir=tmp_path)
    longer = train_grpo(
        tiny_model(), data, functions, replace(config, updates=3), progress=False, checkpoint_dir=tmp_path
    )
    assert str(longer.history[:2]) == str(result.history[:])
    for row, values in zip(longer.history, seen, strict=True):
        given = [value for value in values if value is not None]
        assert 0 < len(given) < len(values)
        assert row.rewards["brief"] == pytest.approx(sum(given) / len(given))
        assert row.reward == pytest.approx(sum(given) / len(values))
        assert math.isnan(row.rewards["never"])


# --- lengths ---------------------------------------------------------------------------------------------------


def test_the_overlong_penalty_is_that_of_dapo() -> None:
    """Eq. 13, case by case."""
    longest, buffer = 40, 15
    penalty = OverlongPenalty(longest, buffer)
    for n, found in zip(range(1, 61), penalty([""] * 60, list(range(1, 61))), strict=True):
        if n <= longest - buffer:
            assert found == 0
        elif n <= longest:
            assert found == pytest.approx((longest - buffer - n) / buffer)
        else:
            assert found == -1
    for wrong in (0, 41):
        with pytest.raises(ValueError, match=f"buffer must be from 1 to longest, 40, got {wrong}"):
            OverlongPenalty(40, wrong)
    assert list(compute_rewards(penalty, ["a"], ["b"], {"completion_tokens": [40]}).parts) == [
        "overlong_penalty"
    ]


def test_trainers_tell_reward_functions_the_lengths() -> None:
    seen: list[list[int]] = []

    def length(completions: list[str], completion_tokens: list[int]) -> list[float]:
        seen.append(completion_tokens)
        return [float(n) for n in completion_tokens]

    config = GRPOConfig(updates=2, batch_size=2, group_size=4, sampling=SamplingConfig(max_new_tokens=6))
    result = train_grpo(tiny_model(), [{"prompt": "one two"}] * 4, length, config, progress=False)
    for row, tokens in zip(result.history, seen, strict=True):
        assert row.length == pytest.approx(sum(tokens) / 8) == row.reward
        assert len(set(tokens)) > 1


# --- reward models of the hub ----------------------------------------------------------------------------------

TEMPLATE = "{% for m in messages %}{{ m.role }} {{ m.content }} ten {% endfor %}"
SIZES: dict[str, Any] = {"vocab_size": 13, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "llama": LlamaConfig(**SIZES, hidden_size=16, intermediate_size=32, max_position_embeddings=32, num_labels=1,
                         pad_token_id=0),
    "llama without padding": LlamaConfig(**SIZES, hidden_size=16, intermediate_size=32, num_labels=1,
                                         pad_token_id=None),
    "gpt2": GPT2Config(vocab_size=13, n_embd=16, n_layer=2, n_head=2, n_positions=32, num_labels=3, pad_token_id=2,
                       resid_pdrop=0.3),
    "bert": BertConfig(**SIZES, hidden_size=16, intermediate_size=32, max_position_embeddings=32, num_labels=2,
                       pad_token_id=0, hidden_dropout_prob=0.3),
}  # fmt: skip
TEXTS = ["one", "two three four five", "six seven", "", "eight nine"]
ASKED = ["one two", "ten", "three four five", "six", "two"]


def classifier(name: str) -> Any:
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_config(copy.deepcopy(CONFIGS[name])).train()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(10) if p.ndim > 1 else None
    return model


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("batch_size", [1, 2, 16])
def test_a_classifier_scores_as_the_model_does_alone(name: str, chat: bool, batch_size: int) -> None:
    model, tokenizer = classifier(name), tiny_tokenizer()
    tokenizer.padding_side, tokenizer.chat_template = "left", TEMPLATE
    label = None if model.config.num_labels == 1 else 1
    reward = ClassifierReward(model, tokenizer, label=label, batch_size=batch_size)
    prompts: list[Any] = (
        [[{"role": "user", "content": p}] for p in ASKED] if chat else [f"{p} " for p in ASKED]
    )
    found = compute_rewards(reward, TEXTS, prompts)
    assert list(found.parts) == ["classifier_reward"]
    assert model.training
    model.eval()
    for prompt, text, one in zip(ASKED, TEXTS, found.total.tolist(), strict=True):
        written = f"user {prompt} ten assistant {text} ten " if chat else f"{prompt} {text}"
        ids = torch.tensor([tokenizer(written).input_ids])
        with torch.no_grad():
            assert one == pytest.approx(model(input_ids=ids).logits[0, label or 0].item(), rel=1e-4, abs=1e-5)
    assert len({round(x, 3) for x in found.total.tolist()}) == 5


def test_a_classifier_that_cannot_score_says_why() -> None:
    model, tokenizer = classifier("gpt2"), tiny_tokenizer()
    for label in (None, 3, -1):
        with pytest.raises(ValueError, match=f"label must be the one of 3 logits that counts, got {label}"):
            ClassifierReward(model, tokenizer, label=label)
    with pytest.raises(ValueError, match="batch_size must be >= 1, got 0"):
        ClassifierReward(model, tokenizer, label=0, batch_size=0)
    reward = ClassifierReward(model, tokenizer, label=0)
    with pytest.raises(ValueError, match=r"item 1 must have from 1 to 32 tokens with its prompt, got 41"):
        reward(["one", "one " * 40], ["two ", "two "])
    with pytest.raises(ValueError, match="item 0 must have from 1 to 32 tokens with its prompt, got 0"):
        reward([""], [""])


def test_a_classifier_is_a_reward_function_of_the_trainers() -> None:
    reward = ClassifierReward(classifier("llama"), tiny_tokenizer())
    config = GRPOConfig(updates=1, batch_size=2, group_size=4, sampling=SamplingConfig(max_new_tokens=6))
    result = train_grpo(tiny_model(), [{"prompt": "one two"}] * 4, reward, config, progress=False)
    assert result.history[0].reward_std > 0
    policy = tiny_model()
    reward.network = policy.model
    with pytest.raises(ValueError, match="'classifier_reward' must not hold the model that is trained"):
        train_grpo(policy, [{"prompt": "one two"}] * 4, reward, config, progress=False)


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
