"""Data sets of texts and chats: read, checked, and turned into token ids.

A record is a mapping from column names to values. Every trainer says which columns it
reads; a list of dicts, a JSON Lines file and a Hugging Face data set are all read
alike. What is wrong with a record is said here, before anything is trained, with the
record's number and what to do about it.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

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
    "split_records",
]

Message = dict[str, str]
Prompt = str | list[Message]
"""Plain text, or a conversation: a list of {"role": …, "content": …}."""

Records = Iterable[Mapping[str, Any]] | str | Path
"""Dicts, a Hugging Face data set, or the path of a JSON Lines file."""

ItemT = TypeVar("ItemT")

GIVEN = ("completions", "prompts", "finished")
"""What reward functions are handed besides the columns of the data."""


@dataclass(frozen=True)
class Example:
    """A prompt and the completion to learn."""

    prompt: Prompt
    prompt_ids: list[int]
    completion_ids: list[int]


@dataclass(frozen=True)
class Pair:
    """Two different completions of a prompt, one preferred."""

    prompt: Prompt
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclass(frozen=True)
class RankedList:
    """Two or more different completions of a prompt, the best first."""

    prompt: Prompt
    prompt_ids: list[int]
    ranked_ids: list[list[int]]


@dataclass(frozen=True)
class PromptExample:
    """A prompt to complete, and what else the record holds for the reward functions."""

    prompt: Prompt
    prompt_ids: list[int]
    columns: dict[str, Any]


# --- reading ---


def read_records(data: Records) -> list[dict[str, Any]]:
    """Read all records.

    Parameters
    ----------
    data : iterable of mappings, str or Path
        Dicts; a Hugging Face ``Dataset`` or ``IterableDataset`` (read to its end:
        ``take`` a part of an endless one); or the path of a JSON Lines file, UTF-8 with
        one JSON object a line, whose blank lines are skipped.

    Raises
    ------
    ValueError
        If there are no records, or one is not a mapping or not JSON; the message names
        the item or line.
    FileNotFoundError
        If there is no such file.

    Examples
    --------
    >>> read_records([{"prompt": "Two and two is", "completion": " four"}])
    [{'prompt': 'Two and two is', 'completion': ' four'}]
    """
    return [record for _, record in _named_records(data)]


def split_records(
    data: Records, fraction: float, *, seed: int = 0
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Split at random into (training, held-out) records; both keep the order of the
    data.

    Parameters
    ----------
    data : records
    fraction : float
        Share to hold out, in (0, 1); at least one record goes to either side.
    seed : int

    Examples
    --------
    >>> train, held_out = split_records([{"prompt": str(i)} for i in range(10)], 0.2)
    >>> len(train), len(held_out)
    (8, 2)
    """
    records = read_records(data)
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must be between 0 and 1, got {fraction!r}")
    if len(records) < 2:
        raise ValueError("one record cannot be split; at least two are needed")
    count = min(max(1, round(fraction * len(records))), len(records) - 1)
    held_out = set(epoch_order(len(records), seed, 0)[:count])
    return (
        [record for i, record in enumerate(records) if i not in held_out],
        [record for i, record in enumerate(records) if i in held_out],
    )


def _named_records(data: Records) -> list[tuple[str, dict[str, Any]]]:
    """Read all records, each with the name that error messages call it by."""
    named = list(_lines(Path(data)) if isinstance(data, (str, Path)) else _items(data))
    if not named:
        raise ValueError(
            f"{data if isinstance(data, (str, Path)) else 'the data set'} holds no "
            "records"
        )
    return named


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    try:
        content = path.read_bytes()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(
            f"there is no file {path}; data are dicts, a Hugging Face data set or the "
            "path of a JSON Lines file"
        ) from error
    # Only \n ends a line: JSON texts may hold the other separators that str.splitlines
    # knows.
    for number, line in enumerate(
        content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1
    ):
        if not line.strip():
            continue
        name = f"{path}, line {number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{name}: not UTF-8 text ({error}); save the file as UTF-8 JSON Lines"
            ) from error
        except json.JSONDecodeError as error:
            raise ValueError(
                f"{name}: not JSON ({error.msg}, column {error.colno}: "
                f"{_shorten(error.doc)!r}); a JSON Lines file holds one JSON object on "
                "each line"
            ) from error
        if not isinstance(record, dict):
            raise ValueError(
                f'{name}: must be a JSON object such as {{"prompt": …}}, got {_shorten(repr(record))}'
            )
        yield name, record


def _items(data: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(data, Mapping):
        raise ValueError(
            f"the data must be a sequence of records, got a {type(data).__name__} with "
            f"the keys {[str(key) for key in data]}; if these are splits, choose one: "
            "data['train']"
        )
    if not isinstance(data, Iterable):
        raise TypeError(
            "data must be dicts, a Hugging Face data set or the path of a JSON Lines "
            f"file, got {type(data).__name__}"
        )
    for i, record in enumerate(data):
        if not isinstance(record, Mapping):
            raise ValueError(
                f"item {i}: must be a dict of columns, got {type(record).__name__} "
                f"{_shorten(repr(record))}"
            )
        yield f"item {i}", dict(record)


def _shorten(text: str, width: int = 80) -> str:
    return text if len(text) <= width else f"{text[: width - 1]}…"


# --- texts to tokens ---


def pad_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return a token to fill batches with: the tokenizer's, or EOS, or 0. Masks never
    come from it, so any will do.
    """
    for token in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token is not None:
            return int(token)
    return 0


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: Prompt) -> list[int]:
    """Turn a prompt into the token ids of the first state.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    prompt : str or list of messages
        Plain text begins with BOS if the tokenizer has it so. Chat messages go through
        the tokenizer's own template, up to where the assistant begins to speak; BOS is
        there if the template writes it. No EOS follows either.

    Raises
    ------
    ValueError
        If the prompt comes out empty, is no prompt, or needs a chat template and the
        tokenizer has none.
    """
    if isinstance(prompt, str):
        ids = _encode_plain(tokenizer, prompt)
    else:
        _check_messages(prompt, "prompt")
        if prompt[-1]["role"] == "assistant":
            raise ValueError(
                "the prompt must not end with the assistant's message, which is what a "
                "completion is; move it to the completion, or add the next message of "
                "the user"
            )
        ids = _ids(tokenizer, _render(tokenizer, prompt, generate=True))
    if not ids:
        raise ValueError(
            "the prompt is empty and the tokenizer begins no text with BOS, so there "
            "is no state to act in; begin the prompt with some text"
        )
    return ids


def encode_completion(
    tokenizer: PreTrainedTokenizerBase,
    completion: str | list[Message],
    prompt: Prompt = "",
    *,
    eos: bool = True,
) -> list[int]:
    """Turn a completion into the token ids of the actions that write it, the last of
    which is EOS.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    completion : str or list of one assistant message
        May be empty: EOS alone.
    prompt : str or list of messages
        What it completes. In a chat the completion ends as the tokenizer's template
        ends a message of the assistant, up to the token that stops generation; what the
        template puts after that token is nobody's action.
    eos : bool
        Whether the completion ends. One that was cut off does not.

    Raises
    ------
    ValueError
        If the tokenizer has no EOS, or the completion is no completion.
    """
    text = _completion_text(completion)
    opening, ending = ("", "") if isinstance(prompt, str) else _frame(tokenizer, prompt)
    if text.startswith(opening):
        opening = ""
    stops = _special_tokens(tokenizer) if ending else []
    if eos and ending and not text.endswith(tuple(stops)):
        return _ids(tokenizer, opening + text + ending)
    ids = _ids(tokenizer, opening + text)
    if not eos or (stops and text.endswith(tuple(stops))):
        return ids
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "the tokenizer has no end-of-sequence token, so no completion could ever "
            "end; set one: tokenizer.eos_token = '<a token of its vocabulary>'"
        )
    return (
        ids
        if ids[-1:] == [tokenizer.eos_token_id]
        else [*ids, int(tokenizer.eos_token_id)]
    )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenise a text that continues another: no BOS, no EOS, no space put in front."""
    if not text:
        return []
    ids = _tokenize(tokenizer, text)
    if not str(tokenizer.convert_ids_to_tokens(ids[0])).startswith("▁"):
        return ids
    # SentencePiece tokenizers may take every text for the beginning of one, and write a
    # space before it. After a newline they do not.
    before, whole = _tokenize(tokenizer, "\n"), _tokenize(tokenizer, "\n" + text)
    return whole[len(before) :] if whole[: len(before)] == before else ids


def _tokenize(
    tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = False
) -> list[int]:
    # verbose=False: a text longer than the context is an error of ours below, not a
    # line on the terminal.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _encode_plain(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Tokenise a text from its beginning: with BOS if the tokenizer puts one, once, and
    never with EOS.
    """
    plain, framed = _tokenize(tokenizer, text), _tokenize(tokenizer, text, special=True)
    if not plain:
        return framed[:1] if framed[:1] == [tokenizer.bos_token_id] else []
    first = next(
        (k for k in range(len(framed)) if framed[k : k + len(plain)] == plain), 0
    )
    opening = framed[:first]
    return plain if plain[:first] == opening else opening + plain


def _render(
    tokenizer: PreTrainedTokenizerBase, messages: list[Message], *, generate: bool
) -> str:
    if not tokenizer.chat_template:
        raise ValueError(
            "the tokenizer has no chat template, so messages cannot be written as one "
            "text; use a chat model's tokenizer, set tokenizer.chat_template, or give "
            "plain texts"
        )
    try:
        text = tokenizer.apply_chat_template(
            messages, tokenize=False, add_generation_prompt=generate
        )
    except Exception as error:  # templates raise what they like
        raise ValueError(
            f"the tokenizer's chat template refuses the messages: {error}"
        ) from error
    return str(text)


def _frame(
    tokenizer: PreTrainedTokenizerBase, prompt: list[Message]
) -> tuple[str, str]:
    """Return what the chat template puts before and after the assistant's words, up to
    the token that stops.
    """
    words = "Words"
    before = _render(tokenizer, prompt, generate=True)
    whole = _render(
        tokenizer, [*prompt, {"role": "assistant", "content": words}], generate=False
    )
    start = whole.rfind(words)
    # Space in front of the words is the model's to write. Anything longer, such as an
    # empty block of thoughts, is the template's way to show finished messages, and the
    # completion's own text says what is to be written.
    opening = whole[len(before) : start] if whole.startswith(before) else ""
    ending = whole[start + len(words) :] if start >= 0 else ""
    stops = [token for token in [tokenizer.eos_token] if token and token in ending]
    stops = stops or [token for token in _special_tokens(tokenizer) if token in ending]
    ends = [ending.index(token) + len(token) for token in stops]
    return (opening if opening.isspace() else ""), (ending[: min(ends)] if ends else "")


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    added = [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.special
    ]
    return sorted({*tokenizer.all_special_tokens, *added})


def _check_messages(messages: Any, column: str) -> None:
    if not isinstance(messages, list) or not messages:
        raise ValueError(
            f"{column} must be text or a non-empty list of messages, got "
            f"{type(messages).__name__} {_shorten(repr(messages))}"
        )
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f'message {i} of {column} must look like {{"role": "user", "content": "…"}}, '
                f"got {_shorten(repr(message))}"
            )


def _completion_text(completion: Any, column: str = "completion") -> str:
    if isinstance(completion, str):
        return completion
    _check_messages(completion, column)
    if len(completion) != 1 or completion[0]["role"] != "assistant":
        raise ValueError(
            f"{column} must be text or one message of the assistant, got the roles "
            f"{[message['role'] for message in completion]}"
        )
    content = completion[0].get("content")
    if not isinstance(content, str):
        raise ValueError(
            f"the content of {column} must be text, got {_shorten(repr(content))}"
        )
    return content


# --- records to examples ---


@dataclass(frozen=True)
class Limits:
    """temporary"""

    context_length: int | None = None
    max_prompt_tokens: int | None = None
    max_completion_tokens: int | None = None


def fingerprint(items: Any) -> str:
    """Temporary"""
    import hashlib

    return hashlib.sha256(repr(items).encode()).hexdigest()[:16]


def sft_examples(
    data: Records, tokenizer: PreTrainedTokenizerBase, limits: Limits = Limits()
) -> list[Example]:
    """Read examples to imitate.

    Parameters
    ----------
    data : records
        Columns ``prompt`` (text or messages) and ``completion`` (text, or a list of one
        assistant message); or ``messages``, a conversation whose last message is the
        assistant's: that message is the completion.
    tokenizer : PreTrainedTokenizerBase
    context_length : int, optional
        Most tokens of prompt and completion together.
    max_prompt_tokens : int, optional
        Keep this many tokens at the *end* of a longer prompt.
    max_completion_tokens : int, optional
        Keep this many tokens at the beginning of a longer completion, which thereby
        loses its EOS.

    Raises
    ------
    ValueError
        If an item is unusable or does not fit; the message names it and the remedy.
    """

    def make(record: dict[str, Any]) -> Example:
        if record.get("messages") is not None and record.get("completion") is None:
            prompt, completion = _split_conversation(record["messages"], "messages")
        else:
            prompt, completion = (
                _column(record, "prompt"),
                _column(record, "completion"),
            )
        return Example(
            prompt,
            _cut_prompt(encode_prompt(tokenizer, prompt), limits.max_prompt_tokens),
            encode_completion(tokenizer, completion, prompt)[
                : limits.max_completion_tokens
            ],
        )

    examples = _make_all(_named_records(data), make)
    lengths = [(name, len(e.prompt_ids), len(e.completion_ids)) for name, e in examples]
    _check_lengths(lengths, limits.context_length)
    return [example for _, example in examples]


def preference_pairs(
    data: Records, tokenizer: PreTrainedTokenizerBase, limits: Limits = Limits()
) -> list[Pair]:
    """Read preference pairs.

    Parameters
    ----------
    data : records
        Columns ``prompt``, ``chosen`` and ``rejected``, texts or messages as in
        :func:`sft_examples`. Where ``chosen`` and ``rejected`` are whole conversations,
        what they have in common up to their last message is the prompt.
    tokenizer, limits.context_length, limits.max_prompt_tokens, max_completion_tokens
        As in :func:`sft_examples`.

    Raises
    ------
    ValueError
        If an item is unusable, does not fit, or its two completions are the same
        tokens.
    """

    def make(record: dict[str, Any]) -> Pair:
        chosen, rejected = _column(record, "chosen"), _column(record, "rejected")
        if (
            isinstance(chosen, list)
            and isinstance(rejected, list)
            and max(len(chosen), len(rejected)) > 1
        ):
            prompt, chosen = _split_conversation(chosen, "chosen")
            prompt_of_rejected, rejected = _split_conversation(rejected, "rejected")
            if prompt != prompt_of_rejected:
                raise ValueError(
                    "chosen and rejected must be the same conversation up to their "
                    "last message; drop the item, or give the common part as prompt "
                    "and one message each as chosen and rejected"
                )
        else:
            prompt = _column(record, "prompt")
        encoded = [
            encode_completion(tokenizer, _completion_text(text, column), prompt)[
                : limits.max_completion_tokens
            ]
            for column, text in (("chosen", chosen), ("rejected", rejected))
        ]
        _check_different(encoded, ["chosen", "rejected"], limits.max_completion_tokens)
        return Pair(
            prompt,
            _cut_prompt(encode_prompt(tokenizer, prompt), limits.max_prompt_tokens),
            *encoded,
        )

    pairs = _make_all(_named_records(data), make)
    lengths = [
        (name, len(p.prompt_ids), max(len(p.chosen_ids), len(p.rejected_ids)))
        for name, p in pairs
    ]
    _check_lengths(lengths, limits.context_length)
    return [pair for _, pair in pairs]


def ranked_lists(
    data: Records, tokenizer: PreTrainedTokenizerBase, limits: Limits = Limits()
) -> list[RankedList]:
    """Read ranked lists.

    Parameters
    ----------
    data : records
        Columns ``prompt`` and ``ranked``, a list of two or more completions, the best
        first; or ``completions`` in any order with ``ranks``, one number each, of which
        the lowest is the best.
    tokenizer, limits.context_length, limits.max_prompt_tokens, max_completion_tokens
        As in :func:`sft_examples`.

    Raises
    ------
    ValueError
        If an item is unusable or does not fit, or two of its completions have one rank
        or are the same tokens.
    """

    def make(record: dict[str, Any]) -> RankedList:
        prompt, ranked = _column(record, "prompt"), _best_first(record)
        names = [f"completion {i} (from 0, best first)" for i in range(len(ranked))]
        encoded = [
            encode_completion(tokenizer, _completion_text(text, name), prompt)[
                : limits.max_completion_tokens
            ]
            for name, text in zip(names, ranked, strict=True)
        ]
        _check_different(encoded, names, limits.max_completion_tokens)
        return RankedList(
            prompt,
            _cut_prompt(encode_prompt(tokenizer, prompt), limits.max_prompt_tokens),
            encoded,
        )

    lists = _make_all(_named_records(data), make)
    lengths = [
        (name, len(item.prompt_ids), max(map(len, item.ranked_ids)))
        for name, item in lists
    ]
    _check_lengths(lengths, limits.context_length)
    return [item for _, item in lists]


def prompt_examples(
    data: Records,
    tokenizer: PreTrainedTokenizerBase,
    limits: Limits = Limits(),
    *,
    reserve: int = 0,
) -> list[PromptExample]:
    """Read prompts, with all other columns for the reward functions.

    Parameters
    ----------
    data : records
        Column ``prompt``, text or messages. All records have the same other columns.
    tokenizer : PreTrainedTokenizerBase
    reserve : int
        Tokens that must be left for the completion, ``max_new_tokens`` of the sampling.
    limits.context_length, max_prompt_tokens
        As in :func:`sft_examples`.
    max_completion_tokens
        Of no effect: the sampling says how long completions get.

    Raises
    ------
    ValueError
        If an item is unusable or does not fit.
    """
    columns: list[str] = []

    def make(record: dict[str, Any]) -> PromptExample:
        prompt = _column(record, "prompt")
        others = {name: value for name, value in record.items() if name != "prompt"}
        for name in GIVEN:
            if name in others:
                raise ValueError(
                    f"reward functions are given {name!r} already; rename the column"
                )
        if not examples:
            columns.extend(others)
        if others.keys() != set(columns):
            name = min(others.keys() ^ set(columns))
            raise ValueError(
                f"column {name!r} is in some records and not in others; reward "
                "functions get one value per completion, so give it to all of them "
                "(None will do) or to none"
            )
        example = PromptExample(
            prompt,
            _cut_prompt(encode_prompt(tokenizer, prompt), limits.max_prompt_tokens),
            others,
        )
        examples.append(example)
        return example

    examples: list[PromptExample] = []
    named = _make_all(_named_records(data), make)
    _check_lengths(
        [(name, len(e.prompt_ids), reserve) for name, e in named],
        limits.context_length,
        sampled=True,
    )
    return examples


def _make_all(
    named: list[tuple[str, dict[str, Any]]], make: Callable[[dict[str, Any]], ItemT]
) -> list[tuple[str, ItemT]]:
    made = []
    for name, record in named:
        try:
            made.append((name, make(record)))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    return made


def _column(record: Mapping[str, Any], name: str) -> Any:
    if record.get(name) is None:
        raise ValueError(
            f"column {name!r} is missing; there are {sorted(map(str, record))}"
        )
    return record[name]


def _split_conversation(
    messages: Any, column: str
) -> tuple[list[Message], list[Message]]:
    _check_messages(messages, column)
    if len(messages) < 2 or messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{column} must be a conversation that ends with a message of the "
            f"assistant, got the roles {[message['role'] for message in messages]}"
        )
    return messages[:-1], messages[-1:]


def _best_first(record: Mapping[str, Any]) -> list[Any]:
    if record.get("ranked") is not None:
        ranked, column = record["ranked"], "ranked"
    else:
        if record.get("completions") is None or record.get("ranks") is None:
            raise ValueError(
                "a ranked list needs the column 'ranked' (completions, the best "
                "first), or 'completions' and 'ranks'; there are "
                f"{sorted(map(str, record))}"
            )
        ranked, column = record["completions"], "completions"
    if not isinstance(ranked, list) or len(ranked) < 2:
        raise ValueError(
            f"{column} must be a list of two or more completions, got "
            f"{_shorten(repr(ranked))}"
        )
    if column == "ranked":
        return ranked
    ranks = list(record["ranks"])
    if len(ranks) != len(ranked) or len(set(ranks)) != len(ranks):
        raise ValueError(
            f"ranks must be {len(ranked)} different numbers, one per completion, got "
            f"{ranks}; leave out completions that tie with a better one"
        )
    return [ranked[i] for i in sorted(range(len(ranks)), key=lambda i: ranks[i])]


def _cut_prompt(ids: list[int], most: int | None) -> list[int]:
    return ids if most is None else ids[-most:]


def _check_different(
    encoded: list[list[int]], names: Sequence[str], cut: int | None
) -> None:
    for j, ids in enumerate(encoded):
        i = encoded.index(ids)
        if i < j:
            raise ValueError(
                f"{names[i]} and {names[j]} are the same tokens, so there is nothing "
                "to prefer; drop the item"
                + (
                    f", or raise max_completion_tokens above {cut}"
                    if cut is not None and len(ids) == cut
                    else ""
                )
            )


def _check_lengths(
    lengths: Sequence[tuple[str, int, int]],
    context_length: int | None,
    *,
    sampled: bool = False,
) -> None:
    """Raise for the first item that the model's context cannot hold."""
    if context_length is None:
        return
    long = [item for item in lengths if item[1] + item[2] > context_length]
    if not long:
        return
    name, prompt, completion = long[0]
    rest = max(length for _, _, length in lengths)
    setting = "max_new_tokens" if sampled else "max_completion_tokens"
    if rest < context_length:
        remedy = f"shorten the texts, or set max_prompt_tokens to at most {context_length - rest}"
    else:
        remedy = f"shorten the texts, or set {setting} below {context_length} and max_prompt_tokens to what is left"
    raise ValueError(
        f"{name}: the prompt has {prompt} tokens and the completion "
        f"{'may have' if sampled else 'has'} {completion}, more than the model's "
        f"context of {context_length} ({len(long)} of {len(lengths)} items are too "
        f"long); {remedy}"
    )


# --- order ---


def epoch_order(size: int, seed: int, epoch: int) -> list[int]:
    """Return the numbers of all items in the order in which a pass over the data visits
    them.

    Examples
    --------
    >>> sorted(epoch_order(4, seed=0, epoch=7))
    [0, 1, 2, 3]
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, 1, epoch))
    order: list[int] = torch.randperm(size, generator=generator).tolist()
    return order


def batch_indices(size: int, batch_size: int, step: int, seed: int) -> list[int]:
    """Return the items that a step trains on, a function of nothing but the arguments.

    Passes over the data follow one another in new orders; a batch may hold the end of
    one and the beginning of the next. A run that is resumed at some step needs no
    memory of the steps before.

    Parameters
    ----------
    size, batch_size : int
        Items in the data and in a batch.
    step : int
        Counted from 0.
    seed : int

    Raises
    ------
    ValueError
        If there are no items.

    Examples
    --------
    >>> first, second = batch_indices(4, 2, 0, seed=0), batch_indices(4, 2, 1, seed=0)
    >>> sorted(first + second)
    [0, 1, 2, 3]
    """
    if size < 1:
        raise ValueError("the data set is empty: there is nothing to make a batch of")
    if batch_size < 1 or step < 0:
        raise ValueError(
            f"batch_size must be >= 1 and step >= 0, got {batch_size!r} and {step!r}"
        )
    first, last = step * batch_size, (step + 1) * batch_size
    orders = {
        epoch: epoch_order(size, seed, epoch)
        for epoch in range(first // size, (last - 1) // size + 1)
    }
    return [
        orders[position // size][position % size] for position in range(first, last)
    ]
