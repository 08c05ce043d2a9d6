"""Reward functions: called, checked, and added up.

A reward function is any callable that scores completions: it is given the completions,
their prompts and the other columns of the data, one entry per completion each, and
returns one number per completion, or None where it abstains. It may be asynchronous.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache, partial
from itertools import chain, count
from numbers import Real
from threading import Thread
from typing import Any

import numpy as np
import torch
from torch import Tensor

from policyopt._checks import quote, require
from policyopt.lm.data import Prompt, copied, scalar
from policyopt.lm.sequences import evaluating, pad_rows

__all__ = [
    "ClassifierReward", "OverlongPenalty", "RewardFunction", "RewardFunctions",
    "Rewards", "compute_rewards",
]  # fmt: skip

RewardFunction = Callable[..., Any]
"""``(completions, prompts, **columns)`` ↦ one number per completion (a sequence, array
or tensor), or an awaitable of that. In a sequence None abstains.
"""

RewardFunctions = (
    RewardFunction | Sequence[RewardFunction] | Mapping[str, RewardFunction]
)
"""One reward function, several, or several by name."""

_Columns = Mapping[str, Sequence[Any]]
_FORM = "def reward(completions, prompts, **columns): ..."


@dataclass(frozen=True)
class Rewards:
    """Rewards of ``B`` completions, float32 on the CPU."""

    total: Tensor
    """``[B]``, the weighted sum of the parts that are there."""
    parts: dict[str, Tensor]
    """``[B]`` for each reward function, unweighted; NaN where it abstained."""


def compute_rewards(
    functions: RewardFunctions, completions: Sequence[str], prompts: Sequence[Prompt],
    columns: Mapping[str, Sequence[Any]] | None = None, *,
    weights: Sequence[float] | None = None, given: Tensor | None = None,
) -> Rewards:  # fmt: skip
    """Score completions with every reward function.

    What an asynchronous function returns is awaited in an event loop of the package's
    own, which lasts as long as the process: clients keep their connections from batch
    to batch, and the caller's loop, as in Jupyter, may be running. They are awaited
    together, after all functions have been called.

    A function that returns None for a completion adds nothing to its total, whatever
    the weights of the others.

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
    given : Tensor, optional
        ``[B]`` rewards that there are already, such as an environment's: they are added
        to the total, and all functions may abstain.

    Raises
    ------
    RuntimeError
        If a function raises; its own exception is the cause.
    ValueError
        If a function returns anything but one finite number or None per completion (the
        message names the function and the item), if all functions abstain from one, if
        there are no functions, or not one finite weight for each.
    TypeError
        If a function cannot be called with what there is.

    Examples
    --------
    >>> def brevity(completions):
    ...     return [-len(text) for text in completions]
    >>> compute_rewards(brevity, ["yes", "certainly"], ["?", "?"]).total
    tensor([-3., -9.])
    """
    named = by_name(functions)
    factors = [1.0] * len(named) if weights is None else [float(w) for w in weights]
    fits = len(factors) == len(named) and all(map(math.isfinite, factors))
    each = f"each of the {len(named)} reward functions {list(named)}"
    require(fits, f"weights must be one finite number for {each}", weights)
    available = {"completions": completions, "prompts": prompts, **(columns or {})}
    label = "reward function {!r}".format
    calls = [_bound(label(name), f, available) for name, f in named.items()]
    returned = zip(named, settle(calls), strict=True)
    parts = {name: _scores(label(name), got, available) for name, got in returned}
    total = torch.zeros(len(completions), dtype=torch.float64)
    if given is not None:
        total += given
    for factor, part in zip(factors, parts.values(), strict=True):
        total += factor * part.double().nan_to_num(0.0)
    abstained = torch.stack([part.isnan() for part in parts.values()]).all(dim=0)
    for i in abstained.nonzero().flatten().tolist() if given is None else ():
        who = f"{label(' and '.join(named))} returned None for item {i}"
        rule = "must return a finite number for every completion that no other scores"
        raise ValueError(f"{who} ({_item(available, i)}); it {rule}")
    return Rewards(total.float(), parts)


def refuse_trained(functions: RewardFunctions, trained: torch.nn.Module) -> None:
    """Refuse a reward function that computes with the weights that are trained."""
    weights = {p for p in trained.parameters() if p.requires_grad}
    for name, function in by_name(functions).items():
        reference = getattr(getattr(function, "reference", None), "model", None)
        rule = f"reward function {name!r} must not hold the model that is trained"
        for held in (getattr(function, "network", None), reference):
            ours = isinstance(held, torch.nn.Module) and weights & {*held.parameters()}
            require(not ours, rule, function, "train a copy of the model: model.copy()")


def by_name(functions: Any) -> dict[str, RewardFunction]:
    """Return reward functions by the names that the history calls them by."""
    if isinstance(functions, Mapping):
        named = {str(name): function for name, function in functions.items()}
    else:
        named, alone = {}, callable(functions) or not isinstance(functions, Iterable)
        for function in [functions] if alone else list(functions):
            inner = getattr(function, "func", function)  # of functools.partial
            base = getattr(inner, "__name__", type(inner).__name__)
            names = chain([base], (f"{base}_{i}" for i in count(2)))
            named[next(name for name in names if name not in named)] = function
    require(bool(named), "there must be at least one reward function", functions)
    for name, function in named.items():
        if not callable(function):
            rule = f"reward function {name!r} must be callable"
            raise TypeError(f"{rule}, got {quote(function)}; write {_FORM}")
    return named


def _bound(
    label: str, function: RewardFunction, available: _Columns
) -> Callable[[], Any]:
    """Return a function with the arguments that its signature takes."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise TypeError(f"{label} has no readable signature; write {_FORM}") from error
    parameters = signature.parameters.values()
    everything = any(p.kind is p.VAR_KEYWORD for p in parameters)
    keywords = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
    named = {p.name for p in parameters if p.kind in keywords}
    if "completions" not in named and not everything:
        what = f"takes no argument 'completions', its signature is {signature}"
        raise TypeError(f"{label} {what}; write {_FORM}")
    for p in parameters:
        variable = p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        given = p.name in available and p.kind is not p.POSITIONAL_ONLY
        if p.default is p.empty and not variable and not given:
            got = f"{p.name!r}, which is not there (there are {', '.join(available)})"
            remedy = "add the column to the data, or give it a default"
            raise TypeError(f"{label} requires {got}; {remedy}")
    accepted = [name for name in available if everything or name in named]
    # Copies: a function that edits its lists does not change what the next one sees.
    return partial(function, **{n: copied(list(available[n])) for n in accepted})


def _scores(label: str, result: Any, available: _Columns) -> Tensor:
    """Check what a function returned or raised; NaN where it abstained."""
    B = len(available["completions"])
    if isinstance(result, Exception):
        what = f"{label} raised {type(result).__name__}: {result}"
        first = f"; the first: {_item(available, 0)}" if B else ""
        error = f"{what} (on a batch of {B} completions{first})"
        raise RuntimeError(error) from result
    values = _values(label, result, B)
    scores = [to_number(value) for value in values]
    for i, score in enumerate(scores):
        if not math.isfinite(score) and values[i] is not None:
            kind = f" ({type(values[i]).__name__})"
            got = f"{quote(values[i])}{kind} for item {i} ({_item(available, i)})"
            rule = "a finite number for every completion, None where it has no opinion"
            raise ValueError(f"{label} returned {got}; it must return {rule}")
    return torch.tensor(scores, dtype=torch.float32)


def settle(calls: Iterable[Callable[[], Any]]) -> list[Any]:
    """Return what each function returns, or the exception that it raises.

    What they return is awaited, all together, where it can be: in a thread, because a
    notebook runs an event loop of its own in this one.
    """
    results = list[Any]()
    for call in calls:
        try:
            results.append(call())
        except Exception as error:
            results.append(error)

    async def finish(result: Any) -> Any:
        return await result if inspect.isawaitable(result) else result

    async def together() -> list[Any]:
        return await asyncio.gather(*map(finish, results), return_exceptions=True)

    if any(map(inspect.isawaitable, results)):
        return asyncio.run_coroutine_threadsafe(together(), _loop(os.getpid())).result()
    return results


@cache
def _loop(process: int) -> asyncio.AbstractEventLoop:
    """Return the event loop of a process, in a thread of its own.

    It is the same from batch to batch, so that clients keep their connections. A
    process that was forked has no threads of its parent, so it gets another.
    """
    loop = asyncio.new_event_loop()
    Thread(target=loop.run_forever, name="policyopt", daemon=True).start()
    return loop


def _values(label: str, result: Any, count: int) -> list[Any]:
    if isinstance(result, Tensor):
        result = result.detach().float().cpu().numpy()
    if isinstance(result, np.ndarray) and result.ndim == 1:
        result = result.tolist()
    scalar = isinstance(result, (str, bytes, Mapping, set))
    if isinstance(result, np.ndarray):
        got = f"an array of shape {result.shape}, not of shape ({count},)"
    elif scalar or not hasattr(result, "__iter__"):
        got = f"{quote(result)} ({type(result).__name__})"
    elif len(values := list(result)) != count:
        got = f"{len(values)} rewards for {count} completions"
    else:
        return values
    wanted = f"one number per completion, {count} here, in their order"
    raise ValueError(f"{label} returned {got}; it must return {wanted}")


def to_number(value: Any) -> float:
    """Return a number as a float: infinite if float32 cannot hold it, and NaN for what
    is not a number.
    """
    value = scalar(value)
    if not isinstance(value, (Real, Decimal)):
        return math.nan
    try:
        return torch.tensor(value, dtype=torch.float32).item()
    except OverflowError:
        return math.inf


def _item(available: _Columns, i: int) -> str:
    """Quote a prompt and its completion."""
    prompt, completion = available["prompts"][i], available["completions"][i]
    text = prompt if isinstance(prompt, str) else repr(prompt)
    # The end of a prompt tells more than its beginning, which a template often fixes.
    short = text if len(text) <= 80 else f"…{text[-79:]}"
    return f"prompt {short!r}, completion {quote(completion)}"


@dataclass(frozen=True)
class OverlongPenalty:
    """A reward function that fines completions close to a limit of length.

    It returns 0 up to ``longest`` − ``buffer`` tokens, falls linearly to −1 at
    ``longest``, and stays there.

    Parameters
    ----------
    longest : int
        Length at which the penalty is full, in tokens; as a rule the ``max_new_tokens``
        of the sampling.
    buffer : int
        Tokens over which it grows, from 1 to ``longest``.

    References
    ----------
    Yu et al. (2025), DAPO, arXiv:2503.14476, eq. 13.

    Examples
    --------
    >>> OverlongPenalty(longest=100, buffer=20)(["…"] * 3, [80, 90, 100])
    [0.0, -0.5, -1.0]
    """

    longest: int
    buffer: int
    __name__ = "overlong_penalty"

    def __post_init__(self) -> None:
        rule = f"buffer must be from 1 to longest, {self.longest}"
        require(1 <= self.buffer <= self.longest, rule, self.buffer)

    def __call__(
        self, completions: Sequence[str], completion_tokens: Sequence[int]
    ) -> list[float]:
        """Score completions by their lengths: the interface of a reward function."""
        free = self.longest - self.buffer
        return [-min(max((n - free) / self.buffer, 0), 1) for n in completion_tokens]


class ClassifierReward:
    """A reward model of transformers as a reward function: the logit of a sequence
    classifier, such as the hub offers them.

    A prompt of chat messages and its completion go through the chat template of the
    reward model's own tokenizer; a prompt that is text is followed by the completion
    with nothing in between, and the tokenizer adds its special tokens. Rows are padded
    on the right, whatever side the tokenizer prefers. Without a ``pad_token_id`` in the
    model's config they are scored one by one, since such a model cannot tell where a
    padded row ends.

    Parameters
    ----------
    model : PreTrainedModel
        From ``AutoModelForSequenceClassification``; not copied.
    tokenizer : PreTrainedTokenizerBase
        The reward model's.
    label : int, optional
        Which logit is the score, if the model has several.
    batch_size : int
        Completions scored at a time.

    Raises
    ------
    ValueError
        If the model has several logits and none is named; when called, if a row is
        empty or longer than the model takes.
    """

    __name__ = "classifier_reward"

    def __init__(
        self, model: Any, tokenizer: Any, *,
        label: int | None = None, batch_size: int = 16,
    ) -> None:  # fmt: skip
        size = model.config.num_labels
        fits = size == 1 if label is None else 0 <= label < size
        require(fits, f"label must be the one of {size} logits that counts", label)
        require(batch_size >= 1, "batch_size must be >= 1", batch_size)
        self.network, self.tokenizer = model, tokenizer
        self.label, self.batch_size = label or 0, batch_size

    @torch.no_grad()
    def __call__(
        self, completions: Sequence[str], prompts: Sequence[Prompt], **columns: Any
    ) -> list[float]:
        """Score texts, one prompt to each: the interface of a reward function."""
        tools = columns.get("tools") or [None] * len(prompts)
        rows = list(map(self._ids, prompts, completions, tools))
        model, config = self.network, self.network.config.get_text_config()
        takes = getattr(config, "max_position_embeddings", None) or math.inf
        most = min(takes, self.tokenizer.model_max_length)
        for i, row in enumerate(rows):
            rule = f"item {i} must have from 1 to {most} tokens with its prompt"
            require(1 <= len(row) <= most, rule, len(row), "shorten the completions")
        pad = getattr(config, "pad_token_id", None)
        pad = -1 if pad is None else pad
        size, scores = self.batch_size if pad >= 0 else 1, list[float]()
        with evaluating(model):
            for start in range(0, len(rows), size):
                ids, mask = pad_rows(rows[start : start + size], pad, left=False)
                ids, mask = ids.to(model.device), mask.long().to(model.device)
                said = model(input_ids=ids, attention_mask=mask)
                scores += said.logits[:, self.label].tolist()
        return scores

    def _ids(self, prompt: Prompt, completion: str, tools: Any) -> list[int]:
        if isinstance(prompt, str):
            return list(self.tokenizer(prompt + completion)["input_ids"])
        messages = [*prompt, {"role": "assistant", "content": completion}]
        encode = self.tokenizer.apply_chat_template
        return list(encode(messages, tools=tools, return_dict=True)["input_ids"])
