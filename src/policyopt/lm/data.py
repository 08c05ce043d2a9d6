"""Data: records from anywhere, checked, and turned into token ids.

A record is a dict. Its columns decide what it can train: ``prompt`` and ``completion`` (or ``messages``) for
fine-tuning, ``prompt``, ``chosen`` and ``rejected`` for preferences, ``prompt`` and ``ranked`` for rankings, ``prompt``
alone for the trainers that sample; what else there is goes to the reward functions. A prompt is text, or a list of chat
messages that the tokenizer's own template turns into text.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias, cast

import torch
from transformers import PreTrainedTokenizerBase

from policyopt.runs import derive_seed

__all__ = [
    "Example",
    "Pair",
    "Prompt",
    "PromptExample",
    "RankedList",
    "Records",
    "batch_indices",
    "encode_completion",
    "encode_prompt",
    "epoch_order",
    "pad_id",
    "preference_pairs",
    "prompt_examples",
    "ranked_lists",
    "read_records",
    "sft_examples",
]

Prompt: TypeAlias = "str | list[dict[str, str]]"
"""Plain text, or chat messages: dicts with ``role`` and ``content``."""
Records: TypeAlias = "Iterable[Mapping[str, Any]] | str | Path"
"""Dicts in a list or any iterable (a Hugging Face ``datasets.Dataset`` is one), or the path of a JSONL file."""


@dataclass(frozen=True)
class Example:
    """A prompt and the completion to learn."""

    prompt: Prompt
    prompt_ids: list[int]
    completion_ids: list[int]


@dataclass(frozen=True)
class Pair:
    """A prompt with a better and a worse completion."""

    prompt: Prompt
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclass(frozen=True)
class RankedList:
    """A prompt with completions, the best first."""

    prompt: Prompt
    prompt_ids: list[int]
    ranked_ids: list[list[int]]


@dataclass(frozen=True)
class PromptExample:
    """A prompt to complete, and the columns for the reward functions."""

    prompt: Prompt
    prompt_ids: list[int]
    columns: dict[str, Any] = field(default_factory=dict)


def read_records(data: Records) -> list[dict[str, Any]]:
    """Return the records of a list, an iterable, a ``datasets.Dataset`` or a JSONL file.

    Raises
    ------
    ValueError
        If there is none, or one is not a dict; for a file the message names the line.
    """
    records: list[dict[str, Any]] = []
    if isinstance(data, (str, Path)):
        with Path(data).open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if not line.strip():
                    continue
                try:
                    record = json.loads(line)
                except json.JSONDecodeError as error:
                    raise ValueError(
                        f"{data}, line {number}: not valid JSON ({error.msg} at column {error.colno}); "
                        "each line must be one JSON object"
                    ) from error
                if not isinstance(record, dict):
                    raise ValueError(
                        f'{data}, line {number}: must be a JSON object such as {{"prompt": …}}, got a '
                        f"{type(record).__name__}"
                    )
                records.append(record)
    elif isinstance(data, Mapping):
        raise ValueError("data must be a list of records, got one mapping; for a DatasetDict choose a split")
    else:
        for index, record in enumerate(data):
            if not isinstance(record, Mapping):
                raise ValueError(f"data item {index} must be a dict, got a {type(record).__name__}")
            records.append(dict(record))
    if not records:
        raise ValueError("data must hold at least one record, got none")
    return records


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a token id to fill batches with: the tokenizer's, or EOS, or 0. Masks never depend on it."""
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def _eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-sequence token, so no completion could ever end; set one: "
            "tokenizer.eos_token = '<a token of its vocabulary>'"
        )
    return int(tokenizer.eos_token_id)


def _template(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Mapping[str, str]], *, reply: bool
) -> list[int]:
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "the prompt is a list of chat messages, but the tokenizer has no chat template; give plain text, or set "
            "tokenizer.chat_template"
        )
    ids = tokenizer.apply_chat_template(
        [dict(message) for message in messages], add_generation_prompt=reply, tokenize=True, return_dict=False
    )
    return list(cast("list[int]", ids))


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Return the token ids of a prompt, ready to be continued.

    Plain text gets what the tokenizer puts in front (BOS, if it has one), and no EOS at the end. Chat messages go
    through the tokenizer's own template, up to where the assistant's reply begins; the template writes BOS itself.

    Examples
    --------
    >>> from policyopt.lm import load
    >>> tokenizer = load("addition-base").tokenizer
    >>> tokenizer.decode(encode_prompt(tokenizer, "12+34=")).replace(" ", "")[-6:]
    '12+34='
    """
    if isinstance(prompt, str):
        ids = [int(i) for i in tokenizer(prompt)["input_ids"]]
        if ids and ids[-1] == tokenizer.eos_token_id and not prompt.endswith(str(tokenizer.eos_token)):
            # Some tokenizers close every text; a single token is kept, for it may be BOS as well.
            return ids[:-1] if len(ids) > 1 else ids
        return ids
    return _template(tokenizer, prompt, reply=True)


def encode_completion(
    tokenizer: PreTrainedTokenizerBase,
    completion: str | Sequence[Mapping[str, str]],
    prompt: Prompt = "",
    *,
    eos: bool = True,
) -> list[int]:
    """Return the token ids of a completion, ended by EOS.

    After a chat prompt, what follows the assistant's text is the template's: everything up to its EOS.

    Parameters
    ----------
    completion : str, or a list with one assistant message
    prompt : str or chat messages
        What is completed; only its kind matters.
    eos : bool
        False leaves the end open, for a completion that was cut.
    """
    if not isinstance(completion, str):
        messages = list(completion)
        if len(messages) != 1 or messages[0].get("role") != "assistant":
            raise ValueError(
                f"a completion must be text or a list with one assistant message, got {messages!r}"
            )
        completion = str(messages[0]["content"])
    end = _eos_id(tokenizer)
    ids = [int(i) for i in tokenizer(completion, add_special_tokens=False)["input_ids"]]
    if not eos:
        return ids
    if not isinstance(prompt, str):
        start = _template(tokenizer, prompt, reply=True)
        whole = _template(tokenizer, [*prompt, {"role": "assistant", "content": completion}], reply=False)
        if whole[: len(start)] == start and end in whole[len(start) :]:
            ending = whole[len(start) :]
            return ending[: len(ending) - ending[::-1].index(end)]
    return ids if ids and ids[-1] == end else [*ids, end]


def _text(value: Any) -> str:
    shown = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return repr(shown if len(shown) <= 60 else shown[:57] + "…")


def _column(record: Mapping[str, Any], index: int, name: str) -> Any:
    if record.get(name) is None:
        raise ValueError(f"data item {index} has no {name!r}; its columns are {sorted(record)}")
    return record[name]


def _prompt(record: Mapping[str, Any], index: int) -> Prompt:
    prompt = _column(record, index, "prompt")
    if isinstance(prompt, str):
        return prompt
    if (
        isinstance(prompt, Sequence)
        and prompt
        and all(isinstance(m, Mapping) and "role" in m for m in prompt)
    ):
        return [dict(message) for message in prompt]
    raise ValueError(
        f"data item {index}: prompt must be text or a list of messages with role and content, got {_text(prompt)}"
    )


@dataclass(frozen=True)
class _Encoder:
    """Token ids within the model's limits; errors name the item."""

    tokenizer: PreTrainedTokenizerBase
    context_length: int | None
    max_prompt_tokens: int | None
    max_completion_tokens: int | None

    def prompt(self, prompt: Prompt, index: int) -> list[int]:
        ids = encode_prompt(self.tokenizer, prompt)
        if not ids:
            raise ValueError(
                f"data item {index}: the prompt is empty, so there is no state to act in; begin it with some text"
            )
        return ids if self.max_prompt_tokens is None else ids[-self.max_prompt_tokens :]

    def completion(self, completion: Any, prompt: Prompt, index: int, name: str) -> list[int]:
        if not isinstance(completion, str) and not (isinstance(completion, Sequence) and completion):
            raise ValueError(f"data item {index}: {name} must be text, got {_text(completion)}")
        ids = encode_completion(self.tokenizer, completion, prompt)
        return ids if self.max_completion_tokens is None else ids[: self.max_completion_tokens]

    def check(
        self, index: int, prompt: Prompt, prompt_tokens: int, completion_tokens: int, what: str
    ) -> None:
        length = prompt_tokens + completion_tokens
        if self.context_length is not None and length > self.context_length:
            raise ValueError(
                f"data item {index}: {prompt_tokens} prompt tokens and {completion_tokens} {what} make {length}, but "
                f"the model's context is {self.context_length}; shorten the item {_text(prompt)}, or set "
                "max_prompt_tokens or max_completion_tokens"
            )


def sft_examples(
    data: Records,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int | None = None,
    max_prompt_tokens: int | None = None,
    max_completion_tokens: int | None = None,
) -> list[Example]:
    """Return the examples of records with ``prompt`` and ``completion``, or with ``messages``.

    Parameters
    ----------
    data : records
    tokenizer : PreTrainedTokenizerBase
    context_length : int, optional
        The most tokens that the model can read; a longer item is an error that names it.
    max_prompt_tokens : int, optional
        Longer prompts keep their last tokens.
    max_completion_tokens : int, optional
        Longer completions are cut, and so lose their EOS.
    """
    encoder = _Encoder(tokenizer, context_length, max_prompt_tokens, max_completion_tokens)
    examples = []
    for index, record in enumerate(read_records(data)):
        if "messages" in record and "prompt" not in record:
            *before, last = record["messages"]
            if not before or last.get("role") != "assistant":
                raise ValueError(
                    f"data item {index}: messages must end with the assistant's reply to a message"
                )
            record = {"prompt": before, "completion": last["content"]}
        prompt = _prompt(record, index)
        ids = encoder.prompt(prompt, index)
        completion = encoder.completion(_column(record, index, "completion"), prompt, index, "completion")
        encoder.check(index, prompt, len(ids), len(completion), "of completion")
        examples.append(Example(prompt, ids, completion))
    return examples


def preference_pairs(
    data: Records,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int | None = None,
    max_prompt_tokens: int | None = None,
    max_completion_tokens: int | None = None,
) -> list[Pair]:
    """Return the pairs of records with ``prompt``, ``chosen`` and ``rejected``.

    ``chosen`` and ``rejected`` may also be whole conversations without a ``prompt`` column: what they share is the
    prompt. The other parameters are those of :func:`sft_examples`.
    """
    encoder = _Encoder(tokenizer, context_length, max_prompt_tokens, max_completion_tokens)
    pairs = []
    for index, record in enumerate(read_records(data)):
        if "prompt" not in record:
            record = _split_conversation(record, index)
        prompt = _prompt(record, index)
        ids = encoder.prompt(prompt, index)
        chosen, rejected = (
            encoder.completion(_column(record, index, name), prompt, index, name)
            for name in ("chosen", "rejected")
        )
        if chosen == rejected:
            raise ValueError(
                f"data item {index}: chosen and rejected are the same {len(chosen)} tokens, {_text(record['chosen'])}: "
                "there is nothing to learn from it; remove the pair"
                + ("" if max_completion_tokens is None else " or raise max_completion_tokens")
            )
        encoder.check(index, prompt, len(ids), max(len(chosen), len(rejected)), "of completion")
        pairs.append(Pair(prompt, ids, chosen, rejected))
    return pairs


def _split_conversation(record: Mapping[str, Any], index: int) -> dict[str, Any]:
    chosen, rejected = (_column(record, index, name) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) or isinstance(rejected, str):
        raise ValueError(f"data item {index} has no 'prompt'; its columns are {sorted(record)}")
    if len(chosen) < 2 or len(chosen) != len(rejected) or list(chosen[:-1]) != list(rejected[:-1]):
        raise ValueError(
            f"data item {index} has no prompt, and chosen and rejected do not differ in their last message alone"
        )
    return {"prompt": list(chosen[:-1]), "chosen": chosen[-1]["content"], "rejected": rejected[-1]["content"]}


def ranked_lists(
    data: Records,
    tokenizer: PreTrainedTokenizerBase,
    *,
    context_length: int | None = None,
    max_prompt_tokens: int | None = None,
    max_completion_tokens: int | None = None,
) -> list[RankedList]:
    """Return the lists of records with ``prompt`` and ``ranked``: two or more completions, the best first.

    ``completions`` with ``ranks`` (1 is the best, no ties) will do as well. The other parameters are those of
    :func:`sft_examples`.
    """
    encoder = _Encoder(tokenizer, context_length, max_prompt_tokens, max_completion_tokens)
    lists = []
    for index, record in enumerate(read_records(data)):
        if "ranked" not in record and "ranks" in record:
            completions, ranks = _column(record, index, "completions"), record["ranks"]
            if len(completions) != len(ranks) or len(set(ranks)) != len(ranks):
                raise ValueError(
                    f"data item {index}: ranks must be one to each completion, all different, got {ranks}"
                )
            order = sorted(range(len(ranks)), key=lambda i: ranks[i])
            record = {**record, "ranked": [completions[i] for i in order]}
        prompt = _prompt(record, index)
        ids = encoder.prompt(prompt, index)
        texts = _column(record, index, "ranked")
        if isinstance(texts, str) or len(texts) < 2:
            raise ValueError(
                f"data item {index}: ranked must hold at least two completions, the best first, got {_text(texts)}"
            )
        ranked = [encoder.completion(text, prompt, index, "ranked") for text in texts]
        if len({tuple(one) for one in ranked}) < len(ranked):
            raise ValueError(f"data item {index}: two completions of ranked are the same; remove one of them")
        encoder.check(index, prompt, len(ids), max(len(one) for one in ranked), "of completion")
        lists.append(RankedList(prompt, ids, ranked))
    return lists


def prompt_examples(
    data: Records,
    tokenizer: PreTrainedTokenizerBase,
    *,
    reserve: int = 0,
    context_length: int | None = None,
    max_prompt_tokens: int | None = None,
    max_completion_tokens: int | None = None,
) -> list[PromptExample]:
    """Return the prompts of records with ``prompt``, and their other columns.

    ``reserve`` tokens of the context are kept for the completion that will be sampled. The other parameters are those
    of :func:`sft_examples`; nothing of the data is completion here, so ``max_completion_tokens`` has no effect.
    """
    encoder = _Encoder(tokenizer, context_length, max_prompt_tokens, max_completion_tokens)
    examples = []
    records = read_records(data)
    names = set(records[0]) - {"prompt"}
    for index, record in enumerate(records):
        if set(record) - {"prompt"} != names:
            raise ValueError(
                f"data item {index} has the columns {sorted(record)}, item 0 has {sorted(records[0])}; reward "
                "functions need the same in all"
            )
        prompt = _prompt(record, index)
        ids = encoder.prompt(prompt, index)
        encoder.check(index, prompt, len(ids), reserve, "reserved by max_new_tokens")
        examples.append(
            PromptExample(prompt, ids, {name: record[name] for name in record if name != "prompt"})
        )
    return examples


def epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    """Return the shuffled item numbers of one pass over the data."""
    generator = torch.Generator().manual_seed(derive_seed(seed, 1, epoch))
    order: list[int] = torch.randperm(size, generator=generator).tolist()
    return order


def batch_indices(size: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Return the item numbers of a step's batch: a pure function, so a resumed run needs no state of the data.

    Every item is seen once per pass; a batch may take the end of one pass and the beginning of the next.

    Examples
    --------
    >>> first, second = batch_indices(4, 2, 0, seed=0), batch_indices(4, 2, 1, seed=0)
    >>> sorted(first + second)
    [0, 1, 2, 3]
    """
    if size < 1 or batch_size < 1:
        raise ValueError(f"size and batch_size must be >= 1, got {size} and {batch_size}")
    first, last = step * batch_size, (step + 1) * batch_size
    orders = {epoch: epoch_order(size, seed, epoch) for epoch in range(first // size, (last - 1) // size + 1)}
    return [orders[position // size][position % size] for position in range(first, last)]
