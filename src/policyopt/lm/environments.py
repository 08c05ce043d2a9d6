"""Conversations as episodes: the policy and an environment take turns.

What the environment writes is read by the policy and is no action of it: those tokens
are in the context, and never in the loss, the KL divergence, the entropy or the
lengths.
"""

from __future__ import annotations

import inspect
import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from policyopt._checks import quote, require
from policyopt.lm import data
from policyopt.lm.config import OnlineConfig
from policyopt.lm.data import Limits, Message, PromptExample
from policyopt.lm.models import LanguageModel
from policyopt.lm.rewards import by_name, settle, to_number
from policyopt.lm.sampling import Samples, collate

__all__ = ["Environment", "MethodTools", "ToolEnvironment", "parse_tool_calls"]


class Environment(Protocol):
    """What the policy talks to. One object plays one episode at a time.

    Both methods may be coroutines: those of all episodes are then awaited together.
    """

    def reset(self, row: Mapping[str, Any]) -> Any:
        """Begin an episode.

        Parameters
        ----------
        row : mapping
            The record of the data: ``prompt`` and all other columns.

        Returns
        -------
        list of messages
            The conversation to begin with, often ``row["prompt"]``. It does not end
            with the assistant's message.
        """

    def step(self, messages: list[Message]) -> Any:
        """Answer the policy.

        Parameters
        ----------
        messages : list of messages
            The conversation so far. The last message is the policy's.

        Returns
        -------
        messages : list of messages
            What the policy hears before it speaks again; after the end it may be empty.
        done : bool
            Whether the episode has ended.
        reward : float
            Of this turn.
        """


EnvironmentFactory = Callable[[], Environment]
"""Makes the environment of an episode: a class, or a function."""


@dataclass(frozen=True)
class Episodes:
    """``B`` conversations as the trainers see them."""

    samples: Samples
    """All that follows the first prompt is the completion; its ``policy_mask`` tells
    whose tokens are whose. ``finished``: the environment ended the episode."""
    rewards: Tensor
    """The environment's, float32 ``[B, T]``, at the last token of each turn."""
    messages: list[list[Message]]
    answers: list[str]
    """The policy's last message of each."""


@dataclass
class _Episode:
    """One conversation while it goes on."""

    environment: Environment
    example: PromptExample
    number: int
    language_model: LanguageModel
    limits: Limits
    messages: list[Message] = field(default_factory=list)
    prompt_ids: list[int] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    chosen: list[bool] = field(default_factory=list)
    """Which of them the policy chose."""
    log_probs: list[float] = field(default_factory=list)
    rewards: list[float] = field(default_factory=list)
    whole: bool = True
    """Whether the policy's last message ended by itself."""
    done: bool = False
    """Whether the environment has ended it."""
    over: bool = False
    finished: bool = False

    @property
    def name(self) -> str:
        return type(self.environment).__name__

    def begin(self, messages: Any) -> None:
        """Take the conversation that the environment begins with."""
        what = f"what {self.name}.reset returns"
        rule = f"{what} must be a list of messages"
        remedy = "return the conversation to begin with, such as row['prompt']"
        require(isinstance(messages, list), rule, messages, remedy)
        data.message_roles(messages, what)
        self.messages, ids = data.copied(messages), self.example.prompt_ids
        if messages != self.example.prompt:
            ids = self._encode(data.encode_prompt, messages)
        self.prompt_ids = ids[-(self.limits.max_prompt_tokens or 0) :]

    def speak(self, ids: list[int], log_probs: list[float], whole: bool) -> None:
        """Add a message of the policy's."""
        self._write(ids, log_probs)
        self.whole, text = whole, self.language_model.decode(ids)
        self.messages.append({"role": "assistant", "content": text})

    def hear(self, answer: Any, config: OnlineConfig) -> None:
        """Take the environment's answer, and see whether the episode goes on."""
        name = f"{self.name}.step"
        fits = isinstance(answer, tuple) and len(answer) == 3
        require(fits, f"{name} must return (messages, done, reward)", answer)
        reply, done, reward = answer
        value = to_number(reward)
        rule = f"{name} must return a finite reward, 0 where there is none"
        require(math.isfinite(value), rule, reward)
        done = data.scalar(done)
        require(isinstance(done, bool), f"{name} must return whether it is done", done)
        self.rewards[-1] = value
        self.done = done
        if reply or not done:
            rule = f"{name} must return a list of messages"
            require(isinstance(reply, list), rule, reply)
            who = data.message_roles(reply, f"the messages that {name} returns")
            rule = f"{name} must not return messages of the assistant's"
            require("assistant" not in who, rule, who, "they are the policy's to write")
            self.messages += data.copied(reply)
        self.finished = done and self.whole
        self.over = done or not self.whole
        if self.over:
            return
        ids = self._encode(data.encode_reply, self.messages[: -len(reply)], reply)
        context = (self.limits.context_length or math.inf) - len(self.prompt_ids)
        room = min(context, config.max_episode_tokens or math.inf)
        needed = len(self.ids) + len(ids) + config.sampling.max_new_tokens
        self.over = needed > room
        if not self.over:
            self._write(ids)

    def _write(self, ids: list[int], log_probs: list[float] | None = None) -> None:
        """Add what the policy says, or without log-probabilities the environment."""
        self.ids += ids
        self.chosen += [log_probs is not None] * len(ids)
        self.log_probs += log_probs or [0.0] * len(ids)
        self.rewards += [0.0] * len(ids)

    def _encode(self, encode: Callable[..., list[int]], *chat: Any) -> list[int]:
        tokenizer, options = self.language_model.tokenizer, self.limits.chat_options
        ids = encode(tokenizer, *chat, **options(self.example.columns))
        data.check_ids(tokenizer, ids, self.limits.vocabulary)
        return ids


def play(
    environment: EnvironmentFactory,
    examples: Sequence[PromptExample],
    draw: Callable[..., Samples],
    language_model: LanguageModel,
    config: OnlineConfig,
    *,
    group_size: int = 1,
    first_row: int = 0,
    busiest: Callable[[int], int] = int,
) -> Episodes:
    """Play an episode for each example and member of its group.

    An episode ends when its environment says so. It ends unfinished when a message of
    the policy's is cut by ``max_new_tokens``, after ``max_turns`` messages, or when
    ``max_episode_tokens`` or the model's context have no room for the reply and another
    message of full length.

    Parameters
    ----------
    environment : callable
        Makes an :class:`Environment`.
    draw : callable
        (contexts, samples of each, turn, number of each context's first row) ↦ Samples.
    first_row : int
        Number of the first episode.
    busiest : callable
        Turns the number of episodes that go on here into the largest of all processes
        that must sample together.

    Raises
    ------
    RuntimeError
        If an environment raises; its exception is the cause.
    ValueError
        If it returns something else than its protocol says.
    """
    limits = config.limits(language_model)
    examples = [example for example in examples for _ in range(group_size)]
    episodes = [
        _Episode(environment(), example, number, language_model, limits)
        for number, example in enumerate(examples, first_row)
    ]
    # Copies, here and below: what an environment changes is its own.
    rows = [data.copied({"prompt": e.prompt, **e.columns}) for e in examples]
    starts = _ask("reset", episodes, rows)
    for episode, messages in zip(episodes, starts, strict=True):
        episode.begin(messages)
    firsts = [e.prompt_ids for e in episodes]
    same = all(ids == firsts[i - i % group_size] for i, ids in enumerate(firsts))
    shared = group_size if same else 1
    for turn in range(config.max_turns):
        active = [e for e in episodes if not e.over]
        asked = busiest(len(active))
        if not asked:
            break
        # A process whose episodes are over reads a prompt again with the others.
        idle = episodes[:1] * (asked - len(active))
        contexts = [e.prompt_ids + e.ids for e in active] + [e.prompt_ids for e in idle]
        numbers = [e.number for e in active + idle]
        each = shared if turn == 0 else 1
        samples = draw(contexts[::each], each, turn, numbers[::each])
        drawn = samples.sequences
        spoken = zip(
            active, drawn.completion_ids.tolist(), samples.log_probs.tolist(),
            drawn.lengths.tolist(), samples.finished.tolist(), strict=False,
        )  # fmt: skip
        for episode, ids, log_probs, length, whole in spoken:
            episode.speak(ids[:length], log_probs[:length], whole)
        answers = _ask("step", active, [data.copied(e.messages) for e in active])
        for episode, answer in zip(active, answers, strict=True):
            episode.hear(answer, config)
    for episode in episodes:
        # It is asked at the end, also where the end came from outside.
        if not episode.done and isinstance(episode.environment, ToolEnvironment):
            episode.rewards[-1] += episode.environment.reward()
    return _collect(episodes, shared, language_model)


def check_environment(
    environment: EnvironmentFactory, example: PromptExample, functions: Any
) -> None:
    """Refuse what makes no environments, and names that would be taken twice."""
    made = [environment() if callable(environment) else None for _ in range(2)]
    fits = all(callable(getattr(made[0], name, None)) for name in ("reset", "step"))
    rule = "environment must be a function or class that makes objects with reset, step"
    require(fits, rule, environment)
    one, other = (getattr(x, "instance", x) for x in made)
    rule = "environment must make another object for each episode"
    require(one is not other, rule, one, "call the class in it, not outside")
    rule = "reward functions are given 'messages' of the environment"
    require("messages" not in example.columns, rule, "a column", "rename the column")
    taken = functions and "environment" in by_name(functions)
    require(not taken, "no reward function may be called 'environment'", functions)


def _collect(
    episodes: Sequence[_Episode], shared: int, language_model: LanguageModel
) -> Episodes:
    """Pad the episodes, of which ``shared`` neighbours have the same prompt."""
    samples = collate(
        [e.prompt_ids for e in episodes[::shared]], [e.ids for e in episodes],
        [e.log_probs for e in episodes], language_model,
    )  # fmt: skip
    mask = samples.sequences.completion_mask
    chosen, rewards = torch.zeros_like(mask), torch.zeros_like(samples.log_probs)
    chosen[mask] = torch.tensor([x for e in episodes for x in e.chosen]).to(mask)
    rewards[mask] = torch.tensor([x for e in episodes for x in e.rewards]).to(rewards)
    finished = torch.tensor([e.finished for e in episodes]).to(mask)
    sequences = replace(samples.sequences, policy_mask=chosen)
    samples = replace(samples, sequences=sequences, finished=finished)
    chats = [e.messages for e in episodes]
    own = ([m["content"] for m in chat if m["role"] == "assistant"] for chat in chats)
    return Episodes(samples, rewards, chats, [said[-1] for said in own])


def _ask(
    method: str, episodes: Sequence[_Episode], arguments: Sequence[Any]
) -> list[Any]:
    """Call a method of all environments; await those that are coroutines together."""
    calls = zip(episodes, arguments, strict=True)
    answers = settle(partial(getattr(e.environment, method), it) for e, it in calls)
    for episode, answer in zip(episodes, answers, strict=True):
        if isinstance(answer, BaseException):
            what = f"{episode.name}.{method} raised {type(answer).__name__}: {answer}"
            where = f"in turn {sum(m['role'] == 'assistant' for m in episode.messages)}"
            of = f"of the episode for {quote(episode.example.prompt)}"
            raise RuntimeError(f"{what} ({where} {of})") from answer
    return answers


# --- tools ---


ToolCall = tuple[str, dict[str, Any]]
"""Name of a tool, and its arguments."""


def parse_tool_calls(text: str) -> list[ToolCall]:
    """Read calls in the form of Hermes and Qwen, one JSON object in each pair of tags.

    Raises
    ------
    ValueError
        If one of them is not a JSON object with a ``name``.

    Examples
    --------
    >>> text = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    >>> parse_tool_calls(text)
    [('add', {'a': 1})]
    """
    calls = list[ToolCall]()
    for found in re.findall(r"<tool_call>(.*?)</tool_call>", text, re.DOTALL):
        call = json.loads(found)
        form = 'must be {"name": …, "arguments": {…}}'
        fits = isinstance(call, dict) and isinstance(call.get("name"), str)
        fits = fits and isinstance(call.get("arguments", {}), dict)
        require(fits, f"a tool call {form}", found)
        calls.append((call["name"], call.get("arguments", {})))
    return calls


class ToolEnvironment:
    """Functions that the policy may call before it answers.

    A message with calls is answered by their results, one message each; the first
    without a call is the answer, and ends the episode. There is no reward on the way:
    reward functions judge the answer, and find the calls in ``messages``.

    Parameters
    ----------
    tools : sequence of callables
        Called with the arguments that the policy gives, by their name. They may be
        coroutines.
    parse : callable
        Text ↦ list of (name, arguments); by default :func:`parse_tool_calls`.
    on_error : {"tell", "end"}
        A call that cannot be read, of a tool that is not there, or that raises: tell
        the policy what is wrong, or end the episode.

    Examples
    --------
    >>> def add(a: int, b: int) -> int:
    ...     return a + b
    >>> def environment():
    ...     return ToolEnvironment([add])
    """

    def __init__(
        self,
        tools: Sequence[Callable[..., Any]],
        *,
        parse: Callable[[str], Sequence[ToolCall]] = parse_tool_calls,
        on_error: Literal["tell", "end"] = "tell",
    ) -> None:
        names = [getattr(tool, "__name__", "") for tool in tools]
        rule = "tools must be functions, each with a name of its own"
        require(all(names) and len({*names}) == len(names), rule, names)
        self.tools = dict(zip(names, tools, strict=True))
        rule = "on_error must be 'tell' or 'end'"
        require(on_error in ("tell", "end"), rule, on_error)
        self.parse, self.on_error = parse, on_error

    def reset(self, row: Mapping[str, Any]) -> list[Message]:
        """Begin with the prompt."""
        prompt: list[Message] = row["prompt"]
        rule = "prompts must be lists of messages where there are tools"
        require(isinstance(prompt, list), rule, prompt)
        return prompt

    def reward(self) -> float:
        """Return the reward of the episode, asked for at its end."""
        return 0.0

    async def step(self, messages: list[Message]) -> tuple[list[Message], bool, float]:
        """Call the tools that the policy's message calls."""
        replies = list[Message]()
        try:
            for name, arguments in self.parse(messages[-1]["content"]) or ():
                rule = f"the tool must be one of {sorted(self.tools)}"
                require(name in self.tools, rule, name)
                result = self.tools[name](**arguments)
                result = await result if inspect.isawaitable(result) else result
                replies.append({"role": "tool", "name": name, "content": str(result)})
        except Exception as error:  # of the policy's making
            content = f"error: {type(error).__name__}: {error}"
            replies.append({"role": "tool", "content": content})
            if self.on_error == "end":
                return replies, True, self.reward()
        return replies, not replies, 0.0 if replies else self.reward()


class MethodTools(ToolEnvironment):
    """An object whose public methods are the tools: the form in which TRL takes an
    environment (``environment_factory``).

    Its ``reset`` takes the columns of the row as keywords; a text that it returns is
    added to the prompt's last message. Its ``get_reward``, if it has one, gives the
    reward of the episode. Neither is a tool.

    Parameters
    ----------
    instance : object
    **options
        Of :class:`ToolEnvironment`.
    """

    def __init__(self, instance: Any, **options: Any) -> None:
        kind, own = type(instance), ("reset", "get_reward")
        names = [n for n, _ in inspect.getmembers(kind, inspect.isfunction)]
        tools = [n for n in names if not n.startswith("_") and n not in own]
        super().__init__([getattr(instance, name) for name in tools], **options)
        self.instance = instance

    def reset(self, row: Mapping[str, Any]) -> list[Message]:
        """Reset the object, and add what it says to the prompt."""
        text = self.instance.reset(**row)
        *before, last = super().reset(row)
        return [*before, {**last, "content": last["content"] + (text or "")}]

    def reward(self) -> float:
        """Ask the object, if it has an opinion."""
        return float(getattr(self.instance, "get_reward", float)())
