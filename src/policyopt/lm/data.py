"""Data sets of texts and chats: read, checked, and turned into token ids.

A record is a mapping from column names to values. Every trainer says which columns it
reads; a list of dicts, a JSON Lines file and a Hugging Face data set are read in the
same way. Errors in a record are reported here, before anything is trained, with the
record's number and what to do about it.
"""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from policyopt.runs import derive_seed

__all__ = [
    "Example", "Item", "Limits", "Pair", "Prompt", "PromptExample", "RankedList",
    "Records", "batch_indices", "encode_completion", "encode_prompt", "epoch_order",
    "fingerprint", "pad_id", "preference_pairs", "prompt_examples", "ranked_lists",
    "read_records", "sft_examples",
]  # fmt: skip

Message = dict[str, str]
Prompt = str | list[Message]
"""Plain text, or a conversation: a list of {"role": …, "content": …}."""
_FORM = '{"role": "user", "content": "…"}'

Records = Iterable[Mapping[str, Any]] | str | Path
"""Dicts, a Hugging Face data set, or the path of a JSON Lines file."""
_RECORDS = "dicts, a Hugging Face data set or the path of a JSON Lines file"
Record = dict[str, Any]

GIVEN = frozenset({"completions", "prompts", "finished"})
"""What reward functions are handed besides the columns of the data."""


@dataclass(frozen=True)
class Limits:
    """How many tokens an item of the data may have. None sets no limit."""

    context_length: int | None = None
    """Prompt and completion together: a longer item is an error."""
    max_prompt_tokens: int | None = None
    """Of a longer prompt, keep this many tokens at the *end*."""
    max_completion_tokens: int | None = None
    """Of a longer completion, keep this many tokens at the beginning; it loses its
    EOS. Items without completions are not affected.
    """

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if value is not None and value < 1:
                raise ValueError(f"{name} must be >= 1 or None, got {value!r}")


@dataclass(frozen=True)
class Item:
    """What all items of a data set have: a prompt, and any number of completions."""

    prompt: Prompt
    prompt_ids: list[int]

    @property
    def completions(self) -> list[list[int]]:
        """Token ids of the completions, whatever their names."""
        return []


@dataclass(frozen=True)
class Example(Item):
    """A prompt and the completion to learn."""

    completion_ids: list[int]

    @property
    def completions(self) -> list[list[int]]:
        """The one to learn."""
        return [self.completion_ids]


@dataclass(frozen=True)
class Pair(Item):
    """Two different completions of a prompt, one preferred."""

    chosen_ids: list[int]
    rejected_ids: list[int]

    @property
    def completions(self) -> list[list[int]]:
        """The chosen one, then the rejected one."""
        return [self.chosen_ids, self.rejected_ids]


@dataclass(frozen=True)
class RankedList(Item):
    """Two or more different completions of a prompt, the best first."""

    ranked_ids: list[list[int]]

    @property
    def completions(self) -> list[list[int]]:
        """All of them, the best first."""
        return self.ranked_ids


@dataclass(frozen=True)
class PromptExample(Item):
    """A prompt to complete, and what else the record holds for the reward functions."""

    columns: dict[str, Any]


ItemT = TypeVar("ItemT", bound=Item)


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


def _named_records(data: Records) -> list[tuple[str, Record]]:
    """Read all records, each with the name that error messages call it by."""
    if isinstance(data, (str, Path)):
        source, named = str(data), list(_lines(Path(data)))
    else:
        source, named = "the data set", list(_items(data))
    if not named:
        raise ValueError(f"{source} holds no records")
    return named


def _lines(path: Path) -> Iterator[tuple[str, Record]]:
    try:
        content = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise FileNotFoundError(f"there is no file {path}; give {_RECORDS}") from error
    # Only \n ends a line: JSON texts may hold the other separators that str.splitlines
    # knows.
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        name = f"{path}, line {number}"
        try:
            record = json.loads(line.decode("utf-8"))
        except UnicodeDecodeError as error:
            raise ValueError(f"{name}: not UTF-8 ({error}); save as UTF-8") from error
        except json.JSONDecodeError as error:
            where = f"{error.msg}, column {error.colno}: {quote(error.doc)}"
            raise ValueError(
                f"{name}: not JSON ({where}); write one JSON object on each line"
            ) from error
        if not isinstance(record, dict):
            raise ValueError(f"{name}: must be a JSON object, got {quote(record)}")
        yield name, record


def _items(data: Iterable[Mapping[str, Any]]) -> Iterator[tuple[str, Record]]:
    if isinstance(data, Mapping):
        remedy = "if these are splits, choose one: data['train']"
        raise ValueError(f"data must be records, got the keys {[*data]}; {remedy}")
    if not isinstance(data, Iterable):
        raise TypeError(f"data must be {_RECORDS}, got {type(data).__name__}")
    for i, record in enumerate(data):
        if not isinstance(record, Mapping):
            got = f"{type(record).__name__} {quote(record)}"
            raise ValueError(f"item {i}: must be a dict of columns, got {got}")
        yield f"item {i}", dict(record)


def quote(value: object) -> str:
    """Represent a value in an error message, by at most 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:79]}…"


# --- texts to tokens ---


def pad_id(tokenizer: Tokenizer) -> int:
    """Return a token to fill batches with: the tokenizer's, or EOS, or 0. Masks never
    come from it, so any will do.
    """
    choices = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(token) for token in choices if token is not None)


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt) -> list[int]:
    """Turn a prompt into the token ids of the first state.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    prompt : str or list of messages
        Plain text begins with BOS if the tokenizer adds it. Chat messages go through
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
    elif _roles(prompt, "prompt")[-1] == "assistant":
        remedy = "make it the completion, or add the user's next message"
        raise ValueError(f"prompt must not end with the assistant's message; {remedy}")
    else:
        ids = _ids(tokenizer, _render(tokenizer, prompt, generate=True))
    if not ids:
        remedy = "begin the prompt with some text"
        raise ValueError(f"the prompt is empty and the tokenizer adds no BOS; {remedy}")
    return ids


def encode_completion(
    tokenizer: Tokenizer,
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
    if eos and ending and not text.endswith(tuple(_special_tokens(tokenizer))):
        text += ending
    ids = _ids(tokenizer, opening + text)
    if not eos or ending:
        return ids
    if tokenizer.eos_token_id is None:
        remedy = "set one: tokenizer.eos_token = '<a token of its vocabulary>'"
        raise ValueError(f"the tokenizer has no end-of-sequence token; {remedy}")
    end = [int(tokenizer.eos_token_id)]
    return ids if ids[-1:] == end else ids + end


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
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


def _tokenize(tokenizer: Tokenizer, text: str, *, special: bool = False) -> list[int]:
    # verbose=False: a text longer than the context is an error below, not a line on the
    # terminal.
    return list(tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"])


def _encode_plain(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokenise a text from its beginning: with BOS if the tokenizer puts one, once, and
    never with EOS.
    """
    plain, framed = _tokenize(tokenizer, text), _tokenize(tokenizer, text, special=True)
    if not plain:
        return framed[:1] if framed[:1] == [tokenizer.bos_token_id] else []
    length = len(plain)
    starts = (k for k in range(len(framed)) if framed[k : k + length] == plain)
    opening = framed[: next(starts, 0)]
    return plain if plain[: len(opening)] == opening else opening + plain


def _render(tokenizer: Tokenizer, messages: list[Message], *, generate: bool) -> str:
    if not tokenizer.chat_template:
        remedy = "use a chat model's tokenizer, set chat_template, or give plain texts"
        raise ValueError(f"the tokenizer has no chat template; {remedy}")
    render = tokenizer.apply_chat_template
    try:
        return str(render(messages, tokenize=False, add_generation_prompt=generate))
    except Exception as error:  # templates raise what they like
        raise ValueError(f"the chat template refuses the messages: {error}") from error


def _frame(tokenizer: Tokenizer, prompt: list[Message]) -> tuple[str, str]:
    """Return what the chat template puts before and after the assistant's words, up to
    the token that stops.
    """
    words = "Words"
    answer = {"role": "assistant", "content": words}
    before = _render(tokenizer, prompt, generate=True)
    whole = _render(tokenizer, [*prompt, answer], generate=False)
    start = whole.rfind(words)
    # Space in front of the words is the model's to write. Anything longer, such as an
    # empty block of thoughts, is the template's way to show finished messages, and the
    # completion's own text says what is to be written.
    opening = whole[len(before) : start] if whole.startswith(before) else ""
    ending = whole[start + len(words) :] if start >= 0 else ""
    eos = tokenizer.eos_token
    stops = [eos] if eos and eos in ending else _special_tokens(tokenizer)
    ends = [ending.index(token) + len(token) for token in stops if token in ending]
    return opening if opening.isspace() else "", ending[: min(ends, default=0)]


def _special_tokens(tokenizer: Tokenizer) -> list[str]:
    added = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special}
    return sorted(special | set(tokenizer.all_special_tokens))


def _roles(messages: Any, column: str) -> list[str]:
    """Check that these are messages, and return the role of each."""
    if not isinstance(messages, list) or not messages:
        wanted = "text or a non-empty list of messages"
        got = f"{type(messages).__name__} {quote(messages)}"
        raise ValueError(f"{column} must be {wanted}, got {got}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            raise ValueError(
                f"message {i} of {column} must look like {_FORM}, got {quote(message)}"
            )
    return [message["role"] for message in messages]


def _completion_text(completion: Any, column: str = "completion") -> str:
    if isinstance(completion, str):
        return completion
    roles = _roles(completion, column)
    if roles != ["assistant"]:
        wanted = "text or one message of the assistant"
        raise ValueError(f"{column} must be {wanted}, got the roles {roles}")
    content = completion[0].get("content")
    if not isinstance(content, str):
        raise ValueError(f"the content of {column} must be text, got {quote(content)}")
    return content


# --- records to items ---


def sft_examples(
    data: Records, tokenizer: Tokenizer, limits: Limits = Limits()
) -> list[Example]:
    """Read examples to imitate.

    Parameters
    ----------
    data : records
        Columns ``prompt`` (text or messages) and ``completion`` (text, or a list of one
        assistant message); or ``messages``, a conversation whose last message is the
        assistant's: that message is the completion.
    tokenizer : PreTrainedTokenizerBase
    limits : Limits
        Where to cut, and what is too long.

    Raises
    ------
    ValueError
        If an item is unusable or does not fit; the message names it and the remedy.
    """

    def make(record: Record) -> Example:
        if record.get("messages") is not None and record.get("completion") is None:
            prompt, text = _split_chat(record["messages"], "messages")
        else:
            prompt, text = _column(record, "prompt"), _column(record, "completion")
        ids, encoded = _encode(tokenizer, limits, prompt, {"completion": text})
        return Example(prompt, ids, *encoded)

    return _read(data, make, limits)


def preference_pairs(
    data: Records, tokenizer: Tokenizer, limits: Limits = Limits()
) -> list[Pair]:
    """Read preference pairs.

    Parameters
    ----------
    data : records
        Columns ``prompt``, ``chosen`` and ``rejected``, texts or messages as in
        :func:`sft_examples`. Where ``chosen`` and ``rejected`` are whole conversations,
        what they have in common up to their last message is the prompt.
    tokenizer, limits
        As in :func:`sft_examples`.

    Raises
    ------
    ValueError
        If an item is unusable, does not fit, or its two completions are the same
        tokens.
    """

    def make(record: Record) -> Pair:
        texts = {name: _column(record, name) for name in ("chosen", "rejected")}
        lists = all(isinstance(text, list) for text in texts.values())
        if lists and max(map(len, texts.values())) > 1:
            split = [_split_chat(text, name) for name, text in texts.items()]
            (prompt, chosen), (prompt_of_rejected, rejected) = split
            texts = {"chosen": chosen, "rejected": rejected}
            if prompt != prompt_of_rejected:
                wanted = "the same conversation up to their last message"
                raise ValueError(f"chosen and rejected must be {wanted}; drop the item")
        else:
            prompt = _column(record, "prompt")
        ids, encoded = _encode(tokenizer, limits, prompt, texts)
        return Pair(prompt, ids, *encoded)

    return _read(data, make, limits)


def ranked_lists(
    data: Records, tokenizer: Tokenizer, limits: Limits = Limits()
) -> list[RankedList]:
    """Read ranked lists.

    Parameters
    ----------
    data : records
        Columns ``prompt`` and ``ranked``, a list of two or more completions, the best
        first; or ``completions`` in any order with ``ranks``, one number each, of which
        the lowest is the best.
    tokenizer, limits
        As in :func:`sft_examples`.

    Raises
    ------
    ValueError
        If an item is unusable or does not fit, or two of its completions have one rank
        or are the same tokens.
    """

    def make(record: Record) -> RankedList:
        prompt, ranked = _column(record, "prompt"), _best_first(record)
        names = (f"completion {i} (from 0, best first)" for i in range(len(ranked)))
        texts = dict(zip(names, ranked, strict=True))
        return RankedList(prompt, *_encode(tokenizer, limits, prompt, texts))

    return _read(data, make, limits)


def prompt_examples(
    data: Records, tokenizer: Tokenizer, limits: Limits = Limits(), *, reserve: int = 0
) -> list[PromptExample]:
    """Read prompts, with all other columns for the reward functions.

    Parameters
    ----------
    data : records
        Column ``prompt``, text or messages. All records have the same other columns.
    tokenizer, limits
        As in :func:`sft_examples`.
    reserve : int
        Tokens that must be left for the completion, ``max_new_tokens`` of the sampling.

    Raises
    ------
    ValueError
        If an item is unusable or does not fit.
    """
    expected: set[str] | None = None

    def make(record: Record) -> PromptExample:
        nonlocal expected
        prompt = _column(record, "prompt")
        columns = {name: value for name, value in record.items() if name != "prompt"}
        if taken := columns.keys() & GIVEN:
            raise ValueError(
                f"reward functions are given {min(taken)!r} already; rename the column"
            )
        expected = set(columns) if expected is None else expected
        if odd := columns.keys() ^ expected:
            remedy = "give it to all (None will do) or to none"
            raise ValueError(f"column {min(odd)!r} is in some records only; {remedy}")
        ids, _ = _encode(tokenizer, limits, prompt, {})
        return PromptExample(prompt, ids, columns)

    return _read(data, make, limits, reserve)


def _encode(
    tokenizer: Tokenizer, limits: Limits, prompt: Prompt, completions: Mapping[str, Any]
) -> tuple[list[int], list[list[int]]]:
    """Token ids of a prompt and of its completions by name, cut to the limits.

    Raises
    ------
    ValueError
        If one of them is unusable, or two completions are the same tokens.
    """
    cut, encoded = limits.max_completion_tokens, dict[str, list[int]]()
    for name, completion in completions.items():
        text = _completion_text(completion, name)
        ids = encode_completion(tokenizer, text, prompt)[:cut]
        same = next((other for other, seen in encoded.items() if seen == ids), None)
        if same is not None:
            remedy = f", or raise max_completion_tokens above {cut}"
            raise ValueError(
                f"{same} and {name} are the same tokens, so there is nothing to "
                f"prefer; drop the item{remedy if len(ids) == cut else ''}"
            )
        encoded[name] = ids
    prompt_ids = encode_prompt(tokenizer, prompt)
    longest = limits.max_prompt_tokens or len(prompt_ids)
    return prompt_ids[-longest:], list(encoded.values())


def _read(
    data: Records, make: Callable[[Record], ItemT], limits: Limits, reserve: int = 0
) -> list[ItemT]:
    """Make an item of each record, and check that the model's context can hold them."""
    named = _named_records(data)
    items = []
    for name, record in named:
        try:
            items.append(make(record))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    if limits.context_length is not None:
        names = [name for name, _ in named]
        _check_lengths(names, items, limits.context_length, reserve)
    return items


def _check_lengths(
    names: Sequence[str], items: Sequence[Item], context: int, reserve: int
) -> None:
    """Raise for the first item that the model's context cannot hold."""
    prompts = [len(item.prompt_ids) for item in items]
    rests = [max(map(len, item.completions), default=reserve) for item in items]
    long = [i for i in range(len(items)) if prompts[i] + rests[i] > context]
    if not long:
        return
    has, setting = "has", "max_completion_tokens"
    if not items[0].completions:
        has, setting = "may have", "max_new_tokens"
    first, room = long[0], context - max(rests)
    remedy = f"set max_prompt_tokens to at most {room}"
    if room <= 0:
        remedy = f"set {setting} below {context} and max_prompt_tokens to what is left"
    raise ValueError(
        f"{names[first]}: the prompt has {prompts[first]} tokens and the completion "
        f"{has} {rests[first]}, more than the model's context of {context} "
        f"({len(long)} of {len(items)} items are too long); {remedy}"
    )


def _column(record: Mapping[str, Any], name: str) -> Any:
    if record.get(name) is None:
        there = sorted(map(str, record))
        raise ValueError(f"column {name!r} is missing; there are {there}")
    return record[name]


def _split_chat(messages: Any, column: str) -> tuple[list[Message], list[Message]]:
    roles = _roles(messages, column)
    if len(roles) < 2 or roles[-1] != "assistant":
        wanted = "a conversation that ends with the assistant's message"
        raise ValueError(f"{column} must be {wanted}, got the roles {roles}")
    return messages[:-1], messages[-1:]


def _best_first(record: Mapping[str, Any]) -> list[Any]:
    column = "ranked" if record.get("ranked") is not None else "completions"
    completions: Any = record.get(column)
    if completions is None or (column != "ranked" and record.get("ranks") is None):
        wanted = "'ranked' (completions, the best first), or 'completions' and 'ranks'"
        there = sorted(map(str, record))
        raise ValueError(f"a ranked list needs the column {wanted}; there are {there}")
    if not isinstance(completions, list) or len(completions) < 2:
        got = quote(completions)
        raise ValueError(f"{column} must list two or more completions, got {got}")
    if column == "ranked":
        return completions
    ranks = list(record["ranks"])
    if len(ranks) != len(completions) or len(set(ranks)) != len(ranks):
        wanted = f"{len(completions)} different numbers, one per completion"
        raise ValueError(f"ranks must be {wanted}, got {ranks}; leave out ties")
    return [completions[i] for i in sorted(range(len(ranks)), key=ranks.__getitem__)]


# --- identity ---


def fingerprint(items: Iterable[Item]) -> str:
    """Hash items, in their order, so that a checkpoint knows the data it was made for.

    Returns
    -------
    str
        16 hexadecimal digits, a function of the token ids and, for prompts to complete,
        of the other columns. It is the same in every run on the same data: of an object
        without a value of its own, such as a function, only the name counts.

    Examples
    --------
    >>> fingerprint([Example("a", [1, 2], [3])])
    'f189255a6c5e20b1'
    """
    digest = hashlib.sha256()
    for item in items:
        parts = [item.prompt_ids, *item.completions]
        for numbers in ([len(parts), *map(len, parts)], *parts):
            digest.update(array("i", numbers))
        if isinstance(item, PromptExample):
            digest.update(_canonical(item.columns).encode())
    return digest.hexdigest()[:16]


def _canonical(columns: Mapping[str, Any]) -> str:
    try:
        return json.dumps(columns, sort_keys=True, default=_plain)
    except (TypeError, ValueError):  # keys of other types than JSON's, or a cycle
        return str(_plain(columns))


def _plain(value: Any) -> Any:
    """Represent what JSON has no form for, by nothing that differs between runs."""
    if hasattr(value, "tolist"):  # an array or tensor, whose repr leaves numbers out
        return value.tolist()
    if isinstance(value, (set, frozenset)):
        return sorted(str(_plain(element)) for element in value)
    return re.sub(r" at 0x[0-9a-fA-F]+", "", repr(value))  # <function f at 0x7f…>


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
        got = f"{batch_size!r} and {step!r}"
        raise ValueError(f"batch_size must be >= 1 and step >= 0, got {got}")
    positions = range(step * batch_size, (step + 1) * batch_size)
    epochs = range(positions[0] // size, positions[-1] // size + 1)
    orders = {epoch: epoch_order(size, seed, epoch) for epoch in epochs}
    return [orders[i // size][i % size] for i in positions]
