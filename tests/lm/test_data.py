"""Records, their errors, and their way into token ids."""

from __future__ import annotations

import copy
import json
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from policyopt.lm.data import (
    Example,
    Item,
    Limits,
    Pair,
    PromptExample,
    RankedList,
    batch_indices,
    encode_completion,
    encode_prompt,
    epoch_order,
    fingerprint,
    pad_id,
    preference_pairs,
    prompt_examples,
    ranked_lists,
    read_records,
    sft_examples,
)

BOS, EOS, START, END, TURN = "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<end_of_turn>"

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# What well-known families do: BOS from the template, words trimmed, a space for the model to write, …
TRIMMED = (
    "<s>{% for m in messages %}{{ m['role'] }}: {{ m['content'] | trim }}</s>{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
INSTRUCTION = (
    "<s>{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}</s>{% endif %}{% endfor %}"
)
TURNS = (
    "<s>{% for m in messages %}<start>{{ m['role'] }}\n{{ m['content'] }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)
THINKING = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
BARE = (
    "{% for m in messages %}{{ m['role'] }}: {{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)


def byte_tokenizer(
    *, eos: str | None = EOS, adds: str = "", template: str | None = None, pad: str | None = None
) -> PreTrainedTokenizerFast:
    """One token per byte. ``adds`` is what it writes around a text, such as "<s> $A"."""
    specials = [BOS, EOS, START, END, TURN]
    vocabulary = {
        token: i for i, token in enumerate([*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())])
    }
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    if adds:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=adds, special_tokens=[(BOS, vocabulary[BOS]), (EOS, vocabulary[EOS])]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=eos, pad_token=pad, chat_template=template,
        extra_special_tokens=[token for token in specials if token not in (BOS, eos)],
    )  # fmt: skip


def sentence_piece_tokenizer(kind: str) -> PreTrainedTokenizerFast:
    """Writes a space before every text, as Llama 2 does (``"prepend"``), or only at its first word."""
    letters = ["<unk>", BOS, EOS, "▁", "\n", *"abcdefghijklmnopqrstuvwxyz=+0123456789", "▁h", "▁4"]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={t: i for i, t in enumerate(letters)}, merges=[("▁", "h"), ("▁", "4")], unk_token="<unk>"
        )
    )
    if kind == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, unk_token="<unk>", chat_template=INSTRUCTION
    )


def text_of(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids)))


def user(text: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": text}]


def assistant(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


# --- records ---------------------------------------------------------------------------------------------------


def test_a_file_and_a_list_hold_the_same_records(tmp_path: Path) -> None:
    records = [{"prompt": "Gruß\u2028", "answer": 1}, {"prompt": "b", "answer": None}]
    path = tmp_path / "data.jsonl"
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    path.write_text("\ufeff" + lines[0] + "\r\n\n  \n" + lines[1], encoding="utf-8", newline="")

    assert read_records(path) == read_records(str(path)) == read_records(records) == records


def test_any_iterable_of_mappings_is_data() -> None:
    class Streaming:
        """As ``datasets.IterableDataset`` does: no length, no index."""

        def __iter__(self) -> Iterator[dict[str, Any]]:
            yield from ({"prompt": str(i)} for i in range(3))

    expected = [{"prompt": "0"}, {"prompt": "1"}, {"prompt": "2"}]
    assert read_records(Streaming()) == expected
    assert read_records({"prompt": str(i)} for i in range(3)) == expected


def test_hugging_face_data_sets() -> None:
    datasets = pytest.importorskip("datasets")
    records = [
        {"prompt": "a", "chosen": "x", "rejected": "y"},
        {"prompt": "b", "chosen": "y", "rejected": "x"},
    ]
    data = datasets.Dataset.from_list(records)

    assert read_records(data) == read_records(data.to_iterable_dataset()) == records
    with pytest.raises(ValueError, match=r"data\['train'\]"):
        read_records(datasets.DatasetDict(train=data))
    assert len(preference_pairs(data, byte_tokenizer())) == 2


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "a",}', "not JSON"),
        (b"prompt: a", "not JSON"),
        (b'["a"]', "must be a JSON object"),
        (b'{"prompt": "\xff"}', "not UTF-8"),
    ],
)
def test_a_malformed_line_is_named(tmp_path: Path, line: bytes, message: str) -> None:
    path = tmp_path / "data.jsonl"
    path.write_bytes(b'{"prompt": "a"}\n\n' + line + b'\n{"prompt": "c"}\n')

    with pytest.raises(ValueError, match=message) as error:
        read_records(path)
    assert str(error.value).startswith(f"{path}, line 3: ")


def test_unusable_data(tmp_path: Path) -> None:
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n\n")
    with pytest.raises(ValueError, match=r"empty\.jsonl holds no records"):
        read_records(empty)
    with pytest.raises(ValueError, match="the data set holds no records"):
        read_records([])
    with pytest.raises(FileNotFoundError, match=r"there is no file .*absent\.jsonl"):
        read_records("absent.jsonl")
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_records(tmp_path)
    with pytest.raises(ValueError, match=r"item 1: must be a dict of columns, got str 'b'"):
        read_records([{"prompt": "a"}, "b"])  # type: ignore[list-item]
    with pytest.raises(ValueError, match=r"choose one: data\['train'\]"):
        read_records({"train": [], "test": []})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="got int"):
        read_records(3)  # type: ignore[arg-type]


# --- prompts ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("adds", "expected"),
    [("", "Hi"), ("<s> $A", "<s>Hi"), ("$A </s>", "Hi"), ("<s> $A </s>", "<s>Hi")],
)
def test_plain_prompts_begin_with_what_the_tokenizer_puts_there_and_do_not_end(
    adds: str, expected: str
) -> None:
    tokenizer = byte_tokenizer(adds=adds)

    assert text_of(tokenizer, encode_prompt(tokenizer, "Hi")) == expected


def test_no_second_bos() -> None:
    tokenizer = byte_tokenizer(adds="<s> $A", template=TRIMMED)

    assert text_of(tokenizer, encode_prompt(tokenizer, "<s>Hi")) == "<s>Hi"
    assert text_of(tokenizer, encode_prompt(tokenizer, user("Hi"))) == "<s>user: Hi</s>assistant: "


def test_bos_that_is_eos() -> None:
    """As in GPT-2, when it is told to begin texts with its only special token."""
    tokenizer = byte_tokenizer(adds="</s> $A")
    tokenizer.bos_token = EOS

    assert text_of(tokenizer, encode_prompt(tokenizer, "Hi")) == "</s>Hi"
    assert text_of(tokenizer, encode_prompt(tokenizer, "")) == "</s>"


def test_an_empty_prompt_needs_bos() -> None:
    with_bos = byte_tokenizer(adds="<s> $A </s>")
    assert text_of(with_bos, encode_prompt(with_bos, "")) == "<s>"
    for adds in ("", "$A </s>"):
        with pytest.raises(ValueError, match="the prompt is empty"):
            encode_prompt(byte_tokenizer(adds=adds), "")


def test_a_prompt_keeps_the_eos_that_its_author_wrote() -> None:
    tokenizer = byte_tokenizer(adds="<s> $A </s>")
    assert text_of(tokenizer, encode_prompt(tokenizer, "A</s>B</s>")) == "<s>A</s>B</s>"


def test_chat_prompts_go_through_the_template() -> None:
    tokenizer = byte_tokenizer(template=CHATML, eos=END)
    messages = [{"role": "system", "content": "Be brief."}, *user("Hi")]

    ids = encode_prompt(tokenizer, messages)

    assert text_of(tokenizer, ids) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )
    assert ids == tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert ids[0] == tokenizer.convert_tokens_to_ids(START)


def test_unusable_prompts() -> None:
    tokenizer = byte_tokenizer(template="{{ raise_exception('only users') }}")
    with pytest.raises(ValueError, match=r"no chat template.*give plain texts"):
        encode_prompt(byte_tokenizer(), user("Hi"))
    with pytest.raises(ValueError, match="refuses the messages: only users"):
        encode_prompt(tokenizer, user("Hi"))
    with pytest.raises(ValueError, match="must not end with the assistant's message"):
        encode_prompt(tokenizer, [*user("Hi"), *assistant("Ho")])
    with pytest.raises(ValueError, match="non-empty list of messages, got list"):
        encode_prompt(tokenizer, [])
    with pytest.raises(ValueError, match="non-empty list of messages, got int"):
        encode_prompt(tokenizer, 3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="message 0 of prompt must look like"):
        encode_prompt(tokenizer, ["Hi"])  # type: ignore[list-item]


def test_texts_longer_than_the_tokenizer_says_raise_no_warning(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = byte_tokenizer(adds="<s> $A", template=CHATML)
    tokenizer.model_max_length = 4

    assert len(encode_prompt(tokenizer, "more than four")) == 15
    encode_prompt(tokenizer, user("more than four"))
    encode_completion(tokenizer, "more than four", user("more than four"))
    assert not caplog.records


# --- completions -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("adds", ["", "<s> $A", "<s> $A </s>"])
def test_completions_end_with_one_eos_and_begin_with_no_bos(adds: str) -> None:
    tokenizer = byte_tokenizer(adds=adds)

    assert text_of(tokenizer, encode_completion(tokenizer, " yes")) == " yes</s>"
    assert text_of(tokenizer, encode_completion(tokenizer, " yes</s>")) == " yes</s>"
    assert text_of(tokenizer, encode_completion(tokenizer, "")) == "</s>"
    assert text_of(tokenizer, encode_completion(tokenizer, " yes", eos=False)) == " yes"
    assert encode_completion(tokenizer, "", eos=False) == []


def test_eos_belongs_to_the_completion_when_it_is_also_the_padding() -> None:
    tokenizer = byte_tokenizer(pad=EOS)

    assert encode_completion(tokenizer, "a")[-1] == tokenizer.eos_token_id == pad_id(tokenizer)


def test_padding_comes_from_anywhere() -> None:
    assert pad_id(byte_tokenizer(pad=TURN)) == byte_tokenizer().convert_tokens_to_ids(TURN)
    assert pad_id(byte_tokenizer()) == byte_tokenizer().convert_tokens_to_ids(EOS)
    assert pad_id(byte_tokenizer(eos=None)) == 0


def test_a_tokenizer_without_eos() -> None:
    tokenizer = byte_tokenizer(eos=None, template=BARE)
    for prompt in ("Hi", user("Hi")):
        with pytest.raises(ValueError, match=r"no end-of-sequence token.*tokenizer\.eos_token = "):
            encode_completion(tokenizer, "a", prompt)
    assert text_of(tokenizer, encode_completion(tokenizer, "a", eos=False)) == "a"


@pytest.mark.parametrize(
    ("template", "eos", "expected"),
    [
        (CHATML, END, "Ho<|im_end|>"),  # the newline after it is the template's
        (CHATML, EOS, "Ho<|im_end|>"),  # the template's own end, where EOS is another token
        (TRIMMED, EOS, "Ho</s>"),
        (INSTRUCTION, EOS, " Ho</s>"),  # the space is the model's to write
        (TURNS, EOS, "Ho<end_of_turn>"),
        (THINKING, END, "Ho<|im_end|>"),  # the completion's own words say what was thought
        (BARE, EOS, "Ho</s>"),
    ],
)
def test_chat_completions_end_as_the_template_ends_them(template: str, eos: str, expected: str) -> None:
    tokenizer = byte_tokenizer(template=template, eos=eos)
    prompt = user("Hi")

    ids = encode_completion(tokenizer, "Ho", prompt)

    assert text_of(tokenizer, ids) == expected
    assert encode_completion(tokenizer, assistant("Ho"), prompt) == ids
    assert encode_completion(tokenizer, expected, prompt) == ids, "nothing is doubled"
    assert encode_completion(tokenizer, "Ho", prompt, eos=False) == ids[:-1]
    assert len(encode_completion(tokenizer, "", prompt)) == len(ids) - 2, "an empty completion is an ending"


@pytest.mark.parametrize("template", [CHATML, TRIMMED, INSTRUCTION, TURNS])
def test_prompt_and_completion_make_up_the_conversation(template: str) -> None:
    tokenizer = byte_tokenizer(template=template)
    prompt = [*user("Hi"), *assistant("Ho"), *user("Why?")]
    whole = tokenizer.apply_chat_template([*prompt, *assistant("Because")], return_dict=False)

    ids = encode_prompt(tokenizer, prompt) + encode_completion(tokenizer, "Because", prompt)

    assert ids == whole[: len(ids)]
    assert text_of(tokenizer, whole[len(ids) :]).strip() == ""


def test_words_of_the_prompt_do_not_confuse_the_ending() -> None:
    tokenizer = byte_tokenizer(template=CHATML, eos=END)
    for words in ("Words", "Say: Words<|im_end|>"):
        assert text_of(tokenizer, encode_completion(tokenizer, "Words", user(words))) == "Words<|im_end|>"


@pytest.mark.parametrize("kind", ["prepend", "always", "first"])
def test_sentence_piece_puts_no_space_before_a_completion(kind: str) -> None:
    tokenizer = sentence_piece_tokenizer(kind)

    def pieces(ids: list[int]) -> list[str]:
        return list(tokenizer.convert_ids_to_tokens(ids))

    assert pieces(encode_prompt(tokenizer, "2+2=")) == [BOS, "▁", "2", "+", "2", "="]
    assert pieces(encode_completion(tokenizer, "4")) == ["4", EOS]
    assert pieces(encode_completion(tokenizer, " 4")) == ["▁4", EOS]
    assert pieces(encode_completion(tokenizer, "hi", user("x"))) == ["▁h", "i", EOS], "the template's space"


def test_unusable_completions() -> None:
    tokenizer = byte_tokenizer(template=CHATML)
    with pytest.raises(ValueError, match=r"one message of the assistant, got \['user'\]"):
        encode_completion(tokenizer, user("Hi"))
    with pytest.raises(ValueError, match="one message of the assistant"):
        encode_completion(tokenizer, [*assistant("a"), *assistant("b")])
    with pytest.raises(ValueError, match="content of completion must be text, got None"):
        encode_completion(tokenizer, [{"role": "assistant", "content": None}])  # type: ignore[dict-item]
    with pytest.raises(ValueError, match="completion must be text or a non-empty list of messages, got int"):
        encode_completion(tokenizer, 3)  # type: ignore[arg-type]


# --- examples --------------------------------------------------------------------------------------------------


def test_sft_examples() -> None:
    tokenizer = byte_tokenizer(adds="<s> $A", template=CHATML, eos=END)
    conversation = [*user("Hi"), *assistant("Ho"), *user("Why?"), *assistant("Because")]
    plain, columns, chat = sft_examples(
        [
            {"prompt": "a", "completion": "b"},
            {"prompt": conversation[:3], "completion": "Because", "messages": None},
            {"messages": conversation, "prompt": None},
        ],
        tokenizer,
    )

    assert plain.prompt == "a"
    assert text_of(tokenizer, plain.prompt_ids + plain.completion_ids) == "<s>ab<|im_end|>"
    assert columns == chat
    assert chat.prompt == conversation[:3]
    assert text_of(tokenizer, chat.prompt_ids).endswith("Why?<|im_end|>\n<|im_start|>assistant\n")
    assert text_of(tokenizer, chat.completion_ids) == "Because<|im_end|>", "only the last message is learned"


def test_preference_pairs() -> None:
    tokenizer = byte_tokenizer(template=CHATML, eos=END)
    expected = preference_pairs([{"prompt": user("Hi"), "chosen": "A", "rejected": "B"}], tokenizer)
    assert text_of(tokenizer, expected[0].chosen_ids) == "A<|im_end|>"
    assert text_of(tokenizer, expected[0].rejected_ids) == "B<|im_end|>"

    one_message = {"prompt": user("Hi"), "chosen": assistant("A"), "rejected": assistant("B")}
    whole = {"chosen": [*user("Hi"), *assistant("A")], "rejected": [*user("Hi"), *assistant("B")]}
    for record in (one_message, whole, {"prompt": "Hi", **whole}):
        assert preference_pairs([record], tokenizer) == expected


def test_ranked_lists() -> None:
    tokenizer = byte_tokenizer()
    (ranked,) = ranked_lists([{"prompt": "a", "ranked": ["x", "yy", ""]}], tokenizer)

    assert [text_of(tokenizer, ids) for ids in ranked.ranked_ids] == ["x</s>", "yy</s>", "</s>"]
    assert ranked_lists([{"prompt": "a", "completions": ["yy", "", "x"], "ranks": [2, 3, 1]}], tokenizer) == [
        ranked
    ]


def test_prompt_examples_keep_the_other_columns() -> None:
    tokenizer = byte_tokenizer(adds="<s> $A")
    (first, second) = prompt_examples(
        [{"prompt": "a", "answer": 1, "hint": None}, {"hint": [2], "prompt": "b", "answer": 2}], tokenizer
    )

    assert (first.prompt, first.columns) == ("a", {"answer": 1, "hint": None})
    assert (second.prompt, second.columns) == ("b", {"answer": 2, "hint": [2]})
    assert text_of(tokenizer, second.prompt_ids) == "<s>b"


SFT = {"prompt": "a", "completion": "b"}
PAIR = {"prompt": "a", "chosen": "x", "rejected": "y"}
LIST = {"prompt": "a", "ranked": ["x", "y"]}
CHATS = {"chosen": [*user("a"), *assistant("x")], "rejected": [*user("b"), *assistant("y")]}


@pytest.mark.parametrize(
    ("make", "good", "bad", "message"),
    [
        (sft_examples, SFT, {"prompt": "a"}, r"'completion' is missing; there are \['prompt'\]"),
        (sft_examples, SFT, {"prompt": "", "completion": "b"}, "the prompt is empty"),
        (sft_examples, SFT, {"prompt": "a", "completion": 3}, "completion must be text"),
        (sft_examples, SFT, {"messages": user("a")}, "must be a conversation that ends with"),
        (sft_examples, SFT, {"messages": assistant("a")}, "must be a conversation that ends with"),
        (sft_examples, SFT, {"messages": "a"}, "messages must be text or a non-empty list"),
        (sft_examples, SFT, {"messages": [*user("a"), *assistant("b")]}, "no chat template"),
        (preference_pairs, PAIR, {"prompt": "a", "chosen": "x"}, "'rejected' is missing"),
        (preference_pairs, PAIR, {"chosen": "x", "rejected": "y"}, "'prompt' is missing"),
        (preference_pairs, PAIR, {**PAIR, "chosen": "y"}, "nothing to prefer; drop the item$"),
        (preference_pairs, PAIR, {**PAIR, "chosen": "y</s>"}, "chosen and rejected are the same tokens"),
        (preference_pairs, PAIR, CHATS, "the same conversation up to their last message"),
        (preference_pairs, PAIR, {**PAIR, "chosen": user("x")}, "chosen must be text or one message of the"),
        (ranked_lists, LIST, {"prompt": "a", "ranked": ["x"]}, "two or more completions"),
        (ranked_lists, LIST, {"prompt": "a", "ranked": "xy"}, "two or more completions"),
        (
            ranked_lists,
            LIST,
            {**LIST, "ranked": ["x", "y", "x"]},
            "completion 0 .* and completion 2 .* same tokens",
        ),
        (ranked_lists, LIST, {"prompt": "a"}, "needs the column 'ranked'"),
        (ranked_lists, LIST, {"prompt": "a", "completions": ["x", "y"], "ranks": [1]}, "2 different numbers"),
        (
            ranked_lists,
            LIST,
            {"prompt": "a", "completions": ["x", "y"], "ranks": [1, 1]},
            "2 different numbers",
        ),
        (prompt_examples, {"prompt": "a", "b": 1}, {"prompt": "a"}, "column 'b' is in some records"),
        (prompt_examples, {"prompt": "a"}, {"prompt": "a", "b": 2}, "column 'b' is in some records"),
        (
            prompt_examples,
            {"prompt": "a"},
            {"prompt": "a", "completions": 1},
            "'completions' already; rename",
        ),
        (prompt_examples, {"prompt": "a"}, {"question": "a"}, r"missing; there are \['question'\]"),
    ],
)
def test_a_bad_record_is_named(
    make: Any, good: dict[str, Any], bad: dict[str, Any], message: str, tmp_path: Path
) -> None:
    tokenizer = byte_tokenizer()
    with pytest.raises(ValueError, match=message) as error:
        make([good, good, bad], tokenizer)
    assert str(error.value).startswith("item 2: ")

    path = tmp_path / "data.jsonl"
    path.write_text(json.dumps(good) + "\n\n" + json.dumps(bad) + "\n")
    with pytest.raises(ValueError, match=message) as error:
        make(path, tokenizer)
    assert str(error.value).startswith(f"{path}, line 3: ")


# --- truncation ------------------------------------------------------------------------------------------------


def test_truncation_keeps_the_end_of_prompts_and_the_beginning_of_completions() -> None:
    tokenizer = byte_tokenizer(adds="<s> $A")
    (example,) = sft_examples(
        [{"prompt": "abcdef", "completion": "uvwxyz"}],
        tokenizer,
        Limits(context_length=5, max_prompt_tokens=3, max_completion_tokens=2),
    )

    assert text_of(tokenizer, example.prompt_ids) == "def"
    assert text_of(tokenizer, example.completion_ids) == "uv", "EOS goes with the rest"

    (short,) = sft_examples(
        [{"prompt": "ab", "completion": "u"}],
        tokenizer,
        Limits(max_prompt_tokens=3, max_completion_tokens=2),
    )
    assert text_of(tokenizer, short.prompt_ids + short.completion_ids) == "<s>abu</s>"


@pytest.mark.parametrize("name", ["context_length", "max_prompt_tokens", "max_completion_tokens"])
def test_limits_are_positive(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be >= 1 or None, got 0"):
        Limits(**{name: 0})


def test_pairs_that_truncation_makes_equal() -> None:
    data = [{"prompt": "a", "chosen": "same beginning", "rejected": "same end"}]
    with pytest.raises(ValueError, match=r"item 0: .*or raise max_completion_tokens above 4"):
        preference_pairs(data, byte_tokenizer(), Limits(max_completion_tokens=4))
    assert preference_pairs(data, byte_tokenizer(), Limits(max_completion_tokens=6))


def test_items_longer_than_the_context() -> None:
    tokenizer = byte_tokenizer()
    sft = [
        {"prompt": "ab", "completion": "u"},
        {"prompt": "abcdefg", "completion": "u"},
        {"prompt": "abcdefgh", "completion": "uv"},
    ]
    with pytest.raises(ValueError, match="item 1: the prompt has 7 tokens and the completion has 2") as error:
        sft_examples(sft, tokenizer, Limits(8))
    assert "the model's context of 8 (2 of 3 items are too long)" in str(error.value)
    remedy = re.search(r"set max_prompt_tokens to at most (\d+)", str(error.value))
    assert remedy is not None
    sft_examples(sft, tokenizer, Limits(8, int(remedy[1])))
    sft_examples(sft, tokenizer, Limits(11))

    with pytest.raises(
        ValueError, match=r"item 2: .*set max_completion_tokens below 3 and max_prompt_tokens"
    ):
        sft_examples(sft, tokenizer, Limits(3, 1))
    with pytest.raises(ValueError, match="item 0: the prompt has 1 tokens and the completion has 4"):
        preference_pairs([{"prompt": "a", "chosen": "x", "rejected": "yyy"}], tokenizer, Limits(4))
    with pytest.raises(ValueError, match="item 0: the prompt has 1 tokens and the completion has 4"):
        ranked_lists([{"prompt": "a", "ranked": ["x", "yyy"]}], tokenizer, Limits(4))


def test_prompts_leave_room_for_what_will_be_sampled() -> None:
    tokenizer = byte_tokenizer()
    data = [{"prompt": "ab"}, {"prompt": "abcde"}]
    with pytest.raises(ValueError, match=r"item 1: the prompt has 5 tokens .* may have 4.*at most 4$"):
        prompt_examples(data, tokenizer, Limits(8), reserve=4)
    examples = prompt_examples(data, tokenizer, Limits(8, 4), reserve=4)
    assert text_of(tokenizer, examples[1].prompt_ids) == "bcde"
    with pytest.raises(ValueError, match="set max_new_tokens below 8"):
        prompt_examples(data, tokenizer, Limits(8), reserve=8)


# --- identity --------------------------------------------------------------------------------------------------


class Plain:
    """Has no value of its own: its repr is its address."""


def some_function() -> None: ...


def items_of_every_kind(**columns: Any) -> list[Item]:
    return [
        Example("a", [1], [2]),
        Pair("a", [1], [2], [3]),
        RankedList("a", [1], [[2], [3], [4]]),
        PromptExample("a", [1], columns),
    ]


def test_equal_data_has_one_fingerprint() -> None:
    values: list[Any] = [
        1, None, math.nan, "é", [1, {"a": (2,)}], Fraction(1, 2), torch.arange(2000), np.float64(0.5), {"a", "b"},
    ]  # fmt: skip
    for value in values:
        twin = copy.deepcopy(value)
        assert fingerprint(items_of_every_kind(x=value)) == fingerprint(items_of_every_kind(x=twin))
    a, b = {"a": 1, "b": 2}, {"b": 2, "a": 1}
    assert fingerprint(items_of_every_kind(**a)) == fingerprint(items_of_every_kind(**b))
    assert fingerprint([]) != fingerprint(items_of_every_kind())


def test_whatever_differs_changes_the_fingerprint() -> None:
    """Tokens, where they are cut, their order, the kind of item, and every value of a column."""
    changed = torch.arange(2000)
    changed[1000] = 0  # where the repr has an ellipsis
    columns: list[dict[str, Any]] = [
        {}, {"x": 1}, {"x": 1.5}, {"x": "1"}, {"x": True}, {"y": 1}, {"x": None}, {"x": [1]}, {"x": {1}},
        {"x": {(1, 2): 3}}, {"x": {(1, 2): 4}}, {"x": torch.arange(2000)}, {"x": changed}, {"x": Plain()},
        {"x": some_function}, {"x": Fraction(1, 2)}, {"x": Fraction(1, 3)},
    ]  # fmt: skip
    data: list[list[Item]] = [items_of_every_kind(**c) for c in columns]
    data += [
        [Example("a", [1, 2], [3])],
        [Example("a", [1], [2, 3])],
        [Example("a", [1], [3, 2])],
        [Pair("a", [1], [2], [3])],
        [Pair("a", [1], [3], [2])],
        [Example("a", [1], [2]), Example("a", [3], [4])],
        [Example("a", [3], [4]), Example("a", [1], [2])],
        [RankedList("a", [1], [[2], [3], [4], [5]])],
        [Pair("a", [1], [2], [3]), Example("a", [4], [5])],
    ]
    assert len({fingerprint(items) for items in data}) == len(data)


@pytest.mark.sweep  # it starts interpreters
def test_the_fingerprint_is_the_same_in_every_process() -> None:
    """No address and no random hash gets in."""
    script = (
        "from policyopt.lm.data import PromptExample, fingerprint\n"
        "class Judge: pass\n"
        "x = [Judge(), {'a', 'b', 'c', 'd'}, lambda: 0, {(1, 2): Judge}, [Judge().__init__]]\n"
        "print(fingerprint([PromptExample('a', [1], {'x': value}) for value in x]))\n"
    )
    runs = [
        subprocess.run(
            [sys.executable, "-c", f"padding = [object()] * {i}\n{script}"],
            env={**os.environ, "PYTHONHASHSEED": str(i)}, capture_output=True, text=True, check=True,
        )
        for i in range(2)
    ]  # fmt: skip
    assert runs[0].stdout == runs[1].stdout != ""


# --- order -----------------------------------------------------------------------------------------------------


@given(
    size=st.integers(1, 12), batch_size=st.integers(1, 30), epochs=st.integers(1, 4), seed=st.integers(0, 99)
)
def test_every_item_comes_once_per_pass(size: int, batch_size: int, epochs: int, seed: int) -> None:
    steps = -(-epochs * size // batch_size)
    stream = [i for step in range(steps) for i in batch_indices(size, batch_size, step, seed)]

    assert len(stream) == steps * batch_size
    for epoch in range(epochs):
        assert stream[epoch * size : (epoch + 1) * size] == epoch_order(size, seed, epoch)
        assert sorted(epoch_order(size, seed, epoch)) == list(range(size))


def test_orders_differ_between_passes_and_seeds() -> None:
    orders = [epoch_order(50, seed, epoch) for seed in range(3) for epoch in range(3)]
    assert len({tuple(order) for order in orders}) == 9
    assert epoch_order(50, 2, 2) == orders[-1]


def test_there_is_no_batch_of_nothing() -> None:
    with pytest.raises(ValueError, match="the data set is empty"):
        batch_indices(0, 4, 0, 0)
    with pytest.raises(ValueError, match="batch_size must be >= 1"):
        batch_indices(4, 0, 0, 0)
    with pytest.raises(ValueError, match="step >= 0"):
        batch_indices(4, 1, -1, 0)
