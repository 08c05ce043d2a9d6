"""Data sets of texts and chats: read, checked, and turned into token ids.

A record is a mapping from column names to values. Every trainer says which columns it
reads; a list of dicts, a JSON Lines file and a Hugging Face data set are read in the
same way. Errors in a record are reported here, before anything is trained, with the
record's number and what to do about it.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, lru_cache, partial
from itertools import chain, compress, product
from numbers import Real
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase as Tokenizer

from policyopt._checks import quote, require
from policyopt.runs import derive_seed

__all__ = ["Prompt", "read_records"]

Message = dict[str, Any]
Prompt = str | list[Message]
"""Plain text, or a conversation: a list of {"role": …, "content": …}."""
_FORM = '{"role": "user", "content": "…"}'

Records = Iterable[Mapping[str, Any]] | str | Path
"""Dicts, a Hugging Face data set, or the path of a JSON Lines file."""
_RECORDS = "dicts, a Hugging Face data set or the path of a JSON Lines file"
Record = dict[str, Any]

GIVEN = frozenset({"completions", "prompts", "finished", "completion_tokens"})
"""What reward functions are handed besides the columns of the data."""


@dataclass(frozen=True)
class Limits:
    """How items of the data become tokens, and how many they may have. None sets no
    limit.
    """

    context_length: int | None = None
    """Prompt and completion together: a longer item is an error."""
    max_prompt_tokens: int | None = None
    """Of a longer prompt, keep this many tokens at the *end*."""
    max_completion_tokens: int | None = None
    """Of a longer completion, keep this many tokens at the beginning; it loses its
    EOS. Items without completions are not affected.
    """
    vocabulary: float = math.inf
    """Rows of the model's embedding: a token id must be less."""
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    """What the chat template is given besides messages and tools."""

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, int) and value < 1:
                raise ValueError(f"{name} must be >= 1 or None, got {value!r}")

    def chat_options(self, record: Mapping[str, Any]) -> dict[str, Any]:
        """Return what the chat template is given besides the messages of a record."""
        return self.chat_template_kwargs | {"tools": record.get("tools")}


@dataclass(frozen=True)
class Item:
    """What all items of a data set have: a prompt, and any number of completions."""

    prompt: Prompt
    prompt_ids: list[int]

    @property
    def completions(self) -> list[list[int]]:
        """Token ids of the completions, in the order of the fields that hold them."""
        return [value for name, value in vars(self).items() if name in _COMPLETIONS]


@dataclass(frozen=True)
class Example(Item):
    """A prompt and the completion to learn."""

    completion_ids: list[int]
    learned: list[bool] | None = None
    """Which tokens of the completion count in the loss; None: all. The others are read,
    as what the user says between two messages of the assistant's.
    """


@dataclass(frozen=True)
class Pair(Item):
    """Two different completions of a prompt, one preferred."""

    chosen_ids: list[int]
    rejected_ids: list[int]


@dataclass(frozen=True)
class Labelled(Item):
    """A completion that is desirable or not, and that of another record."""

    completion_ids: list[int]
    other_ids: list[int]
    """Put after this prompt, it is one of KTO's mismatched pairs."""
    desirable: bool


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
_COMPLETIONS = "completion_ids", "other_ids", "chosen_ids", "rejected_ids"


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
            rule = "write one JSON object on each line"
            raise ValueError(f"{name}: not JSON ({where}); {rule}") from error
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


# --- texts to tokens ---


def pad_id(tokenizer: Tokenizer, vocabulary: float = math.inf) -> int:
    """Return a token to fill batches with: the tokenizer's, or EOS, or 0, whichever is
    first among the ``vocabulary`` rows of the model's embedding. Masks never come from
    it, so any will do.
    """
    choices = (tokenizer.pad_token_id, tokenizer.eos_token_id, 0)
    return next(int(x) for x in choices if x is not None and x < vocabulary)


def check_ids(tokenizer: Tokenizer, ids: Iterable[int], vocabulary: float) -> None:
    """Refuse token ids beyond the ``vocabulary`` rows of the model's embedding.

    Raises
    ------
    ValueError
        Where a token was added to the tokenizer alone; the message names it.
    """
    highest = max(ids, default=0)
    token = tokenizer.convert_ids_to_tokens(highest)
    rule = f"token ids must be below {vocabulary}, the rows of the model's embedding"
    remedy = "add rows: language_model.model.resize_token_embeddings(len(tokenizer))"
    require(highest < vocabulary, rule, (highest, token), remedy)


def encode_prompt(tokenizer: Tokenizer, prompt: Prompt, **options: Any) -> list[int]:
    """Turn a prompt into the token ids of the first state.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    prompt : str or list of messages
        Plain text begins with BOS if the tokenizer adds it. Chat messages go through
        the tokenizer's own template, up to where the assistant begins to speak; BOS is
        there if the template writes it. No EOS follows either.
    **options
        For the chat template: ``tools``, ``enable_thinking``, … Plain text ignores
        them.

    Raises
    ------
    ValueError
        If the prompt comes out empty, is no prompt, needs a chat template and the
        tokenizer has none, or holds something that the template does not show.
    """
    return _first(tokenizer, prompt, options)[0]


def _first(tokenizer: Tokenizer, prompt: Prompt, more: Record) -> tuple[list[int], str]:
    """Token ids of a prompt, and its text as the chat template writes it."""
    if isinstance(prompt, str):
        text, ids = prompt, _encode_plain(tokenizer, prompt)
    elif message_roles(prompt, "prompt")[-1] == "assistant":
        remedy = "make it the completion, or add the user's next message"
        raise ValueError(f"prompt must not end with the assistant's message; {remedy}")
    else:
        text = _render(tokenizer, more, prompt, True)
        ids = _ids(tokenizer, text)
    rule = "the prompt is empty and the tokenizer adds no BOS"
    require(bool(ids), rule, prompt, "begin the prompt with some text")
    return ids, text


def encode_completion(
    tokenizer: Tokenizer, completion: str | list[Message], prompt: Prompt = "", *,
    eos: bool = True, **options: Any,
) -> list[int]:  # fmt: skip
    """Turn a completion into the token ids of the actions that write it, the last of
    which is EOS.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    completion : str or list of one assistant message
        May be empty: EOS alone.
    prompt : str or list of messages
        What it completes. In a chat the completion begins and ends as the tokenizer's
        template begins and ends a message of the assistant, up to the token that stops
        generation; what the template puts after that token is nobody's action. The one
        exception is an empty block of thoughts (``<think></think>``), with which some
        templates begin the last message: it is left out, since the completion's own
        text says what was thought. With ``enable_thinking=False`` such templates put it
        in the prompt.
    eos : bool
        Whether the completion ends. One that was cut off does not.
    **options
        As for :func:`encode_prompt`.

    Raises
    ------
    ValueError
        If the tokenizer has no EOS, or the completion is no completion.
    """
    text, ending = _text(completion), ""
    if not isinstance(prompt, str):
        chat = _Chat(tokenizer, options, prompt)
        text = text if text.startswith(chat.opening) else chat.opening + text
        ending = chat.ending
    if eos and ending and not text.endswith(_special_tokens(tokenizer)):
        text += ending
    ids = _ids(tokenizer, text)
    if not eos or ending:
        return ids
    if tokenizer.eos_token_id is None:
        remedy = "set one: tokenizer.eos_token = '<a token of its vocabulary>'"
        raise ValueError(f"the tokenizer has no end-of-sequence token; {remedy}")
    end = [int(tokenizer.eos_token_id)]
    return ids if ids[-1:] == end else ids + end


def decode_completion(tokenizer: Tokenizer, ids: Sequence[int]) -> str:
    """Turn the tokens of a completion back into its text, special tokens left out.

    It inverts :func:`encode_completion`: a completion that begins with a space keeps
    it, also where the tokenizer takes every text for the beginning of one and drops its
    first space.
    """
    mark, before = _anchor(tokenizer)
    return _decode(tokenizer, before + list(ids)).removeprefix(mark)


@lru_cache(maxsize=16)
def _anchor(tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """Return a text, and its tokens, after which tokens are decoded to what they write
    in the middle of a text.

    It is empty where that is so at the beginning too (byte-level BPE), and where no
    text is decoded exactly (WordPiece).

    Raises
    ------
    ValueError
        If the tokenizer, of characters or bytes, has no decoder, and puts spaces
        between them: set ``tokenizer.backend_tokenizer.decoder``.
    """
    letter = r"[^\W_\u2e80-\U0010ffff]"  # Chinese and Japanese have no spaces to lose
    for word in (2 * t for t in tokenizer.get_vocab() if re.fullmatch(letter, t)):
        text = _decode(tokenizer, _tokenize(tokenizer, word))
        require(text != " ".join(word), f"tokenizer needs a decoder for {word!r}", text)
    for mark, letter in product(("", ":", "\n", "a"), "aA1."):
        before = _tokenize(tokenizer, mark)
        after = _ids(tokenizer, f" {letter}") + _ids(tokenizer, letter)
        if _decode(tokenizer, before + after) == f"{mark} {letter}{letter}":
            return mark, before
    return "", []


def _decode(tokenizer: Tokenizer, ids: list[int]) -> str:
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return str(tokenizer.decode(ids, **options))


def _ids(tokenizer: Tokenizer, text: str) -> list[int]:
    """Tokenise a text that continues another: no BOS, no EOS, no space put in front."""
    ids = _tokenize(tokenizer, text) if text else []
    signs = "▁" if text.startswith(" ") else ("▁", "Ġ")
    if not ids or not str(tokenizer.convert_ids_to_tokens(ids[0])).startswith(signs):
        return ids
    # The tokenizer may take every text for the beginning of one, and write a space
    # before it. After a newline or a colon it does not. (One of these may be no token,
    # or make one with the text.)
    for mark in ("\n", ":"):
        before, whole = _tokenize(tokenizer, mark), _tokenize(tokenizer, mark + text)
        if before and whole[: len(before)] == before:
            return whole[len(before) :]
    return ids


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


# --- chats ---


_PARTS = "tool_calls", "reasoning_content", "thinking"
"""What else a message may say. A template that knows nothing of it leaves it out."""
_NO_THOUGHTS = re.compile(r"\s*<(\w+)>\s*</\1>\s*")


def _render(tokenizer: Tokenizer, options: Record, chat: Any, generate: bool) -> str:
    """Write a conversation as the chat template does, and refuse what it would leave
    out or write as Python.
    """
    if not tokenizer.chat_template:
        remedy = "use a chat model's tokenizer, set chat_template, or give plain texts"
        raise ValueError(f"the tokenizer has no chat template; {remedy}")
    given = [name for name, value in options.items() if value not in (None, [])]
    given += [key for message in chat for key in _PARTS if message.get(key)]
    source = str(tokenizer.chat_template)
    if unread := [name for name in given if not re.search(rf"\b{name}\b", source)]:
        raise ValueError(f"the chat template never reads {unread}; change one of them")
    settings = {"tokenize": False, "add_generation_prompt": generate, **options}
    try:
        text = str(tokenizer.apply_chat_template(chat, **settings))
    except Exception as error:  # templates raise what they like
        raise ValueError(f"the chat template refuses the messages: {error}") from error
    for i, message in enumerate(chat):
        content = message.get("content")
        empty = not (content or message.get("tool_calls"))
        if not isinstance(content, str) and (empty or repr(content) in text):
            rule = f"the content of message {i} must be text for this chat template"
            raise ValueError(f"{rule}, got {quote(content)}; write {_FORM}")
    return text


class _Chat:
    """How the chat template writes a prompt, and answers to it.

    An answer comes after ``before`` and begins with ``opening``. After its words comes
    ``after``, which is ``ending`` up to the token that stops. ``thoughts`` is an empty
    block of thoughts in place of the opening. ``before`` need not be written again
    where it is known.
    """

    def __init__(
        self, tokenizer: Tokenizer, options: Record, prompt: Any, before: str = ""
    ) -> None:
        self.render, self.prompt = partial(_render, tokenizer, options), prompt
        self.before, words = before or self.render(prompt, True), "Words"
        whole = self.render([*prompt, {"role": "assistant", "content": words}], False)
        start, _, self.after = whole.rpartition(words)
        opening = start.partition(self.before)[2]
        self.thoughts = opening if _NO_THOUGHTS.fullmatch(opening) else ""
        self.opening = opening.removeprefix(self.thoughts)
        eos, after = tokenizer.eos_token, self.after
        stops = [eos] if eos and eos in after else _special_tokens(tokenizer)
        ends = [after.index(token) + len(token) for token in stops if token in after]
        self.ending = after[: min(ends, default=0)]

    def answer(self, message: Message) -> str:
        """Return what the assistant writes of the finished conversation.

        Raises
        ------
        ValueError
            If the template does not write that as the prompt, an answer and the end:
            the model would be taught what it is never asked for.
        """
        content = message.get("content")
        if isinstance(content, str):  # an end that it has already is not doubled
            message = {**message, "content": content.removesuffix(self.ending)}
        whole = self.render([*self.prompt, message], False)
        _compare(self.before, whole)
        text, after = whole[len(self.before) :].removeprefix(self.thoughts), self.after
        rule = f"the chat template must end this answer with {after!r}"
        require(text.endswith(after), rule, text[-40:], "give the answer as text")
        return text.removesuffix(after) + self.ending


def encode_reply(
    tokenizer: Tokenizer, messages: list[Message], reply: list[Message], **options: Any
) -> list[int]:
    """Turn what is said between two messages of the assistant's into token ids.

    Parameters
    ----------
    tokenizer : PreTrainedTokenizerBase
    messages : list of messages
        The conversation, whose last message is the assistant's. What the assistant said
        plays no part: the tokens that wrote it stay as they are, thoughts included,
        which some templates leave out of earlier messages.
    reply : list of messages
        What others say next.
    **options
        As for :func:`encode_prompt`.

    Returns
    -------
    list[int]
        From after the token that ended the assistant's message to where it begins to
        speak again.

    Raises
    ------
    ValueError
        If the template does not write the reply after what it wrote before.
    """
    said = {"role": "assistant", "content": "Words"}
    past = [said if m["role"] == "assistant" else m for m in messages]
    chat = _Chat(tokenizer, options, past[:-1])
    whole = chat.render([*past, *reply], True)
    # Before its last message the assistant may think, or be told not to: not here.
    spoken = re.sub(r"<(\w+)>\s*(</\1>\s*)?\Z", "", chat.before)
    starts = (chat.before + chat.opening, spoken + chat.opening, spoken)
    written = [start + said["content"] + chat.ending for start in starts]
    start = next(filter(whole.startswith, written), written[0])
    _compare(start, whole)
    return _ids(tokenizer, whole[len(start) :])


def _compare(before: str, whole: str) -> None:
    """Refuse a conversation that does not begin as its beginning was written."""
    if not whole.startswith(before):
        same = next(i for i in range(len(before)) if before[: i + 1] != whole[: i + 1])
        change = f"{quote(before[same:])} becomes {quote(whole[same:])}"
        rule = "the chat template rewrites the conversation as it goes on"
        raise ValueError(f"{rule}: {change}; use another, its settings, or texts")


def chat_end(tokenizer: Tokenizer) -> int | None:
    """Return the token with which the chat template ends a message of the assistant's;
    None if it has no template or none ends.
    """
    try:
        chat = _Chat(tokenizer, {}, [{"role": "user", "content": "Hi"}])
    except ValueError:  # it has no template, or one for other messages
        return None
    return next(reversed(_ids(tokenizer, chat.ending)), None)


def _special_tokens(tokenizer: Tokenizer) -> tuple[str, ...]:
    return tuple(_added(tokenizer, len(tokenizer)).union(tokenizer.all_special_tokens))


@lru_cache(maxsize=16)  # to list thousands of them takes milliseconds
def _added(tokenizer: Tokenizer, _size: int) -> set[str]:
    return {x.content for x in tokenizer.added_tokens_decoder.values() if x.special}


def copied(value: Any) -> Any:
    """Copy lists and dictionaries, however deep; what else they hold is shared."""
    if isinstance(value, dict):
        return {key: copied(part) for key, part in value.items()}
    return list(map(copied, value)) if isinstance(value, list) else value


def scalar(value: Any) -> Any:
    """Return what a number of NumPy or a tensor holds, and anything else as it is."""
    return value.item() if getattr(value, "ndim", None) == 0 else value


def message_roles(messages: Any, column: str) -> list[str]:
    """Check that these are messages, and return the role of each."""
    if not isinstance(messages, list) or not messages:
        got = f"{type(messages).__name__} {quote(messages)}"
        rule = f"{column} must be text or a non-empty list of messages"
        raise ValueError(f"{rule}, got {got}")
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
            rule = f"message {i} of {column} must look like {_FORM}"
            raise ValueError(f"{rule}, got {quote(message)}")
    return [message["role"] for message in messages]


def _message(completion: Any, column: str) -> Message:
    if isinstance(completion, str):
        return {"role": "assistant", "content": completion}
    roles = message_roles(completion, column)
    rule = f"{column} must be text or one message of the assistant"
    require(roles == ["assistant"], rule, roles)
    return dict(completion[0])


def _text(completion: Any, column: str = "completion") -> str:
    content = _message(completion, column).get("content")
    if not isinstance(content, str):
        raise ValueError(f"the content of {column} must be text, got {quote(content)}")
    return content


# --- records to items ---


def sft_examples(
    data: Records, tokenizer: Tokenizer, limits: Limits = Limits(),
    train_on: str = "last",
) -> list[Example]:  # fmt: skip
    """Read examples to imitate.

    Parameters
    ----------
    data : records
        Columns ``prompt`` (text or messages) and ``completion`` (text, or a list of one
        assistant message); or ``messages``, a conversation whose last message is the
        assistant's: that message is the completion. Of messages, prompt and completion
        together are what the chat template writes, up to the token that ends the
        completion; it is given a column ``tools``, a list of JSON schemas.
    tokenizer : PreTrainedTokenizerBase
    limits : Limits
        Where to cut, and what is too long.
    train_on : {"last", "assistant"}
        What of ``messages`` is learned: the last message, or all of the assistant's.
        These are the tokens in the template's ``{% generation %}`` blocks, if it has
        any; or else those of each message as "last" learns it, which needs a template
        that leaves earlier messages as they were.

    Raises
    ------
    ValueError
        If an item is unusable, does not fit or holds tokens beyond the model's
        embedding, or the chat template writes it differently; the message names the
        item and the remedy.
    """

    def make(record: Record) -> Example:
        if train_on == "assistant":
            return _all_turns(tokenizer, limits, record)
        if record.get("messages") is not None and record.get("completion") is None:
            prompt, text = _split_chat(record["messages"], "messages")
        else:
            prompt, text = _column(record, "prompt"), _column(record, "completion")
        ids, encoded = _encode(tokenizer, limits, record, prompt, {"completion": text})
        return Example(prompt, ids, encoded[0])

    return _read(data, make, limits)


def preference_pairs(
    data: Records, tokenizer: Tokenizer, limits: Limits = Limits()
) -> list[Pair]:
    """Read preference pairs.

    Parameters
    ----------
    data : records
        Columns ``prompt``, ``chosen`` and ``rejected``, texts or messages (and
        ``tools``) as in :func:`sft_examples`. Where ``chosen`` and ``rejected`` are
        whole conversations, what they have in common up to their last message is the
        prompt.
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
        ids, encoded = _encode(tokenizer, limits, record, prompt, texts)
        return Pair(prompt, ids, *encoded)

    return _read(data, make, limits)


def labelled_items(
    data: Records, tokenizer: Tokenizer, limits: Limits = Limits()
) -> list[Labelled]:
    """Read completions with a label each.

    Parameters
    ----------
    data : records
        Columns ``prompt``, ``completion`` (texts or messages, and ``tools``, as in
        :func:`sft_examples`) and ``label``: true where the completion is desirable,
        false where it is not.
    tokenizer, limits
        As in :func:`sft_examples`. The completion of another record is also cut to what
        the model's context has room for.

    Returns
    -------
    list[Labelled]
        In an order of all records that is always the same, each has the completion of
        the one before it, and the first that of the last.

    Raises
    ------
    ValueError
        If an item is unusable, a label is not true or false, or all are the same.
    """

    def make(record: Record) -> Labelled:
        prompt, text = _column(record, "prompt"), _column(record, "completion")
        label = scalar(_column(record, "label"))
        rule = "label must be true (desirable) or false"
        require(isinstance(label, bool), rule, label, "write it as a Boolean")
        ids, encoded = _encode(tokenizer, limits, record, prompt, {"completion": text})
        return Labelled(prompt, ids, encoded[0], [], label)

    items = _read(data, make, limits)
    kinds = {item.desirable for item in items}
    rule = "column 'label' must hold both true and false"
    require(len(kinds) == 2, rule, kinds, "for good completions alone use train_sft")
    order = epoch_order(len(items), 0, 0)
    for before, i in zip(order, order[1:] + order[:1], strict=True):
        here = items[i]
        room = limits.context_length and limits.context_length - len(here.prompt_ids)
        items[i] = replace(here, other_ids=items[before].completion_ids[:room])
    return items


def ranked_lists(
    data: Records, tokenizer: Tokenizer, limits: Limits = Limits()
) -> list[RankedList]:
    """Read ranked lists.

    Parameters
    ----------
    data : records
        Columns ``prompt`` and ``ranked``, a list of two or more completions, the best
        first; or ``completions`` in any order with ``ranks``, one number each, of which
        the lowest is the best. ``tools`` as in :func:`sft_examples`.
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
        return RankedList(prompt, *_encode(tokenizer, limits, record, prompt, texts))

    return _read(data, make, limits)


def prompt_examples(
    data: Records, tokenizer: Tokenizer, limits: Limits = Limits(), *, reserve: int = 0
) -> list[PromptExample]:
    """Read prompts, with all other columns for the reward functions.

    Parameters
    ----------
    data : records
        Column ``prompt``, text or messages. All records have the same other columns;
        one called ``tools`` goes to the chat template too.
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
            rule = f"reward functions are given {min(taken)!r} already"
            raise ValueError(f"{rule}; rename the column")
        expected = set(columns) if expected is None else expected
        if odd := columns.keys() ^ expected:
            remedy = "give it to all (None will do) or to none"
            raise ValueError(f"column {min(odd)!r} is in some records only; {remedy}")
        ids, _ = _encode(tokenizer, limits, record, prompt, {})
        return PromptExample(prompt, ids, columns)

    return _read(data, make, limits, reserve)


def _encode(
    tokenizer: Tokenizer, limits: Limits, record: Record, prompt: Prompt, texts: Record
) -> tuple[list[int], list[list[int]]]:
    """Token ids of a prompt and of its completions by name, cut to the limits.

    Raises
    ------
    ValueError
        If one of them is unusable, or two completions are the same tokens.
    """
    options = limits.chat_options(record)
    prompt_ids, before = _first(tokenizer, prompt, options)
    chats = texts and isinstance(prompt, list)
    chat = _Chat(tokenizer, options, prompt, before) if chats else None
    cut, encoded = limits.max_completion_tokens, dict[str, list[int]]()
    for name, text in texts.items():
        words = chat.answer(_message(text, name)) if chat else _text(text, name)
        ids = encode_completion(tokenizer, words, eos=not (chat and chat.ending))[:cut]
        same = next((other for other, seen in encoded.items() if seen == ids), None)
        if same is not None:
            both = f"{same} and {name} are the same tokens, so"
            more = f", or raise max_completion_tokens above {cut}" * (len(ids) == cut)
            raise ValueError(f"{both} there is nothing to prefer; drop the item{more}")
        encoded[name] = ids
    check_ids(tokenizer, chain(prompt_ids, *encoded.values()), limits.vocabulary)
    longest = limits.max_prompt_tokens or 0  # ids[-0:] are all
    return prompt_ids[-longest:], list(encoded.values())


def _all_turns(tokenizer: Tokenizer, limits: Limits, record: Record) -> Example:
    """Make an example of a conversation in which every message of the assistant's is
    learned.
    """
    messages = _column(record, "messages")
    _split_chat(messages, "messages")
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    prompt, template = messages[: turns[0]], str(tokenizer.chat_template)
    message_roles(prompt, "what comes before the assistant's first message")
    options = limits.chat_options(record)
    ids, learned, done = list[int](), list[bool](), ""
    if "endgeneration" in template:
        _render(tokenizer, options, messages, False)
        settings: Any = {"return_dict": True, "return_assistant_tokens_mask": True}
        encoded: Any = tokenizer.apply_chat_template(messages, **settings, **options)
        ids, learned = encoded["input_ids"], list(map(bool, encoded["assistant_masks"]))
        turns = []
    for i in turns:
        chat = _Chat(tokenizer, options, messages[:i])
        _compare(done, chat.before)
        text = chat.answer(messages[i])
        for part, own in ((chat.before[len(done) :], False), (text, True)):
            tokens = _ids(tokenizer, part)
            ids, learned = ids + tokens, learned + [own] * len(tokens)
        done = chat.before + text
    ends = {tokenizer.eos_token_id, chat_end(tokenizer)}
    rule = "what the chat template marks as the assistant's must hold the end of a turn"
    require(not ends.isdisjoint(compress(ids, learned)), rule, template)
    check_ids(tokenizer, ids, limits.vocabulary)
    start, cut = learned.index(True), limits.max_completion_tokens
    prompt_ids = ids[:start][-(limits.max_prompt_tokens or start) :]
    return Example(prompt, prompt_ids, ids[start:][:cut], learned[start:][:cut])


def _read(
    data: Records, make: Callable[[Record], ItemT], limits: Limits, reserve: int = 0
) -> list[ItemT]:
    """Make an item of each record, and check that the model's context can hold them."""
    named, items = _named_records(data), list[ItemT]()
    for name, record in named:
        try:
            items.append(make(record))
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
    context = limits.context_length or math.inf
    prompts = [len(item.prompt_ids) for item in items]
    rests = [max(map(len, item.completions), default=reserve) for item in items]
    long = [i for i in range(len(items)) if prompts[i] + rests[i] > context]
    if not long:
        return items
    kinds = ("has", "max_completion_tokens"), ("may have", "max_new_tokens")
    has, setting = kinds[0] if items[0].completions else kinds[1]
    first, room = long[0], context - max(rests)
    remedy = f"set max_prompt_tokens to at most {room}"
    if room <= 0:
        remedy = f"set {setting} below {context} and max_prompt_tokens to what is left"
    what = f"the prompt has {prompts[first]} tokens and the completion {has}"
    limit = f"{rests[first]}, more than the model's context of {context}"
    share = f"{len(long)} of {len(items)} items are too long"
    raise ValueError(f"{named[first][0]}: {what} {limit} ({share}); {remedy}")


def _column(record: Mapping[str, Any], name: str) -> Any:
    if record.get(name) is None:
        there = sorted(map(str, record))
        raise ValueError(f"column {name!r} is missing; there are {there}")
    return record[name]


def _split_chat(messages: Any, column: str) -> tuple[list[Message], list[Message]]:
    roles = message_roles(messages, column)
    rule = f"{column} must be a conversation that ends with the assistant's message"
    require(len(roles) > 1 and roles[-1] == "assistant", rule, roles)
    return messages[:-1], messages[-1:]


def _best_first(record: Mapping[str, Any]) -> list[Any]:
    column = "ranked" if record.get("ranked") is not None else "completions"
    completions, ranks = record.get(column), record.get("ranks")
    if completions is None or (column != "ranked" and ranks is None):
        wanted = "'ranked' (completions, the best first), or 'completions' and 'ranks'"
        there = sorted(map(str, record))
        raise ValueError(f"a ranked list needs the column {wanted}; there are {there}")
    if not isinstance(completions, list) or len(completions) < 2:
        rule = f"{column} must list two or more completions"
        raise ValueError(f"{rule}, got {quote(completions)}")
    if column == "ranked":
        return completions
    given = ranks if isinstance(ranks, list) else []
    numbers = {rank for rank in given if isinstance(rank, Real) and rank == rank}
    if not len(numbers) == len(given) == len(completions):
        wanted = f"{len(completions)} different numbers, one per completion"
        raise ValueError(f"ranks must be {wanted}, got {quote(ranks)}; leave out ties")
    return [completions[i] for i in sorted(range(len(given)), key=given.__getitem__)]


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
        if isinstance(item, Labelled):
            digest.update(bytes([item.desirable]))
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
    rule = "batch_size must be >= 1 and step >= 0"
    require(batch_size >= 1 and step >= 0, rule, (batch_size, step))
    positions = range(step * batch_size, (step + 1) * batch_size)
    order = cache(partial(epoch_order, size, seed))  # of each pass once
    return [order(i // size)[i % size] for i in positions]
