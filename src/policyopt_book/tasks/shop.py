"""Prices that are known and prices that must be asked for: a task with a tool.

A customer asks for the price of a good. Five goods cost the same every day; the others
have a new price each day, which nobody can know. The policy may answer at once, or ask
first (``"ask figs"``), which costs something, and is told the price of what it asked
for. So asking pays for the second kind of goods, and not for the first.

>>> day = make_records(1, seed=0)[0]
>>> day["prompt"], day["good"], day["price"]
([{'role': 'user', 'content': 'price of wool'}], 'wool', 'one')
>>> shop = Shop()
>>> chat = shop.reset(day)
>>> chat.append({"role": "assistant", "content": "ask wool"})
>>> shop.step(chat)
([{'role': 'tool', 'content': 'one'}], False, -0.2)
>>> shop.step([*chat, {"role": "assistant", "content": "one"}])
([], True, 1.0)
"""

from __future__ import annotations

import random
from collections.abc import Mapping
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from policyopt.lm import LanguageModel

__all__ = [
    "FIXED",
    "GOODS",
    "PRICES",
    "Shop",
    "demonstrations",
    "make_records",
    "new_model",
]

Messages = list[dict[str, str]]

PRICES = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]
FIXED = dict(zip(("bread", "milk", "salt", "rice", "soap"), PRICES[::2], strict=True))
"""Goods whose price never changes, and that price."""
GOODS = (*FIXED, "fish", "plums", "wool", "oil", "figs")
"""All goods."""
_SPECIAL = ["<unk>", "<end>", "<user>", "<tool>", "<bot>"]
_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m.role == 'assistant' %}<bot>{{ m.content }}<end>"
    "{% else %}<{{ m.role }}>{{ m.content }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)


class Shop:
    """The environment of an episode.

    Parameters
    ----------
    cost : float
        What a question costs, in units of the reward of a right answer.
    """

    def __init__(self, cost: float = 0.2) -> None:
        self.cost = cost

    def reset(self, row: Mapping[str, Any]) -> Messages:
        """Begin a day: its customer asks."""
        self.row = row
        return list(row["prompt"])

    def step(self, messages: Messages) -> tuple[Messages, bool, float]:
        """Answer a question, or judge an answer."""
        said = messages[-1]["content"]
        if not said.startswith("ask"):
            return [], True, float(said == self.row["price"])
        told = self.row["prices"].get(said.removeprefix("ask").strip(), "unknown")
        return [{"role": "tool", "content": told}], False, -self.cost


def make_records(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Draw ``count`` days: a customer's question, and the prices."""
    rng, days = random.Random(seed), []
    for _ in range(count):
        prices = {good: FIXED.get(good) or rng.choice(PRICES) for good in GOODS}
        good = rng.choice(GOODS)
        prompt = [{"role": "user", "content": f"price of {good}"}]
        days.append(
            {"prompt": prompt, "good": good, "price": prices[good], "prices": prices}
        )
    return days


def demonstrations(count: int, *, seed: int) -> list[dict[str, Any]]:
    """Draw conversations to imitate, by somebody who does not know when to ask.

    Half of the time they ask first, three times out of ten for another good, and answer
    what they were told. Else they answer at once: right for goods whose price is fixed,
    at random for others.
    """
    rng, chats = random.Random(seed), []
    for day in make_records(count, seed=seed + 1):
        good, chat = day["good"], list(day["prompt"])
        answer = FIXED.get(good) or rng.choice(PRICES)
        if rng.random() < 0.5:
            wanted = rng.choice(GOODS) if rng.random() < 0.3 else good
            answer = day["prices"][wanted]
            chat.append({"role": "assistant", "content": f"ask {wanted}"})
            chat.append({"role": "tool", "content": answer})
        chats.append({"messages": [*chat, {"role": "assistant", "content": answer}]})
    return chats


def new_model(seed: int = 0) -> LanguageModel:
    """Make a small Llama with random weights that reads and writes the words of the
    shop.
    """
    words = [*_SPECIAL, "price", "of", "ask", "unknown", *GOODS, *PRICES]
    numbers = {word: i for i, word in enumerate(words)}
    plain = Tokenizer(models.WordLevel(numbers, unk_token="<unk>"))
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    wrapped: Any = PreTrainedTokenizerFast
    tokenizer = wrapped(
        tokenizer_object=plain,
        eos_token="<end>",
        chat_template=_TEMPLATE,
        extra_special_tokens=_SPECIAL[2:],
    )
    config = LlamaConfig(
        vocab_size=len(words),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        bos_token_id=None,
        eos_token_id=1,
        pad_token_id=1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: Any = LlamaForCausalLM(config)
    return LanguageModel(model.eval(), tokenizer, "shop")
