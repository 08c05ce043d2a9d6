"""Small data for an instruct model: five preference pairs and five that are held out,
ranked answers, questions, a rule, and what training changes on them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from policyopt.lm import (
    LanguageModel,
    SamplingConfig,
    Sequences,
    TransformersSampler,
    completion_log_probs,
)
from policyopt.lm.data import encode_prompt

__all__ = [
    "HELD_OUT", "NAMES", "NEW_TOPICS", "PAIRS", "RANKED", "TOPICS", "UNRELATED",
    "WISH", "Drift", "chat", "pair_log_probs", "short_sentence",
]  # fmt: skip


def chat(text: str) -> list[dict[str, str]]:
    """Return a conversation that begins with this question."""
    return [{"role": "user", "content": text}]


def _records(*rows: tuple[str, str, str]) -> list[dict[str, Any]]:
    return [
        {"prompt": chat(question), "chosen": chosen, "rejected": rejected}
        for question, chosen, rejected in rows
    ]


NAMES = ["capital", "Hamlet", "joke", "AI", "motivation"]
PAIRS = _records(
    (
        "What is the capital of France?",
        "The capital of France is Paris.",
        "The capital of France is Berlin.",
    ),
    (
        "Who wrote Hamlet?",
        "Hamlet was written by William Shakespeare, around the year 1600.",
        "Hamlet was written by Charles Dickens.",
    ),
    (
        "Tell me a joke.",
        "Why did the scarecrow win a prize? Because he was outstanding in his field!",
        "I do not know any jokes.",
    ),
    (
        "What is artificial intelligence?",
        "Artificial intelligence is the craft of building programs that do what would "
        "take intelligence if a person did it.",
        "It is a robot that thinks like a person.",
    ),
    (
        "How do I stay motivated?",
        "Choose one small goal for today, give it ten minutes, and write down what you "
        "finished.",
        "Just try harder.",
    ),
)
"""The subjects are those of a tutorial on DPO; the texts are ours."""

HELD_OUT = _records(
    (
        "What is the capital of Italy?",
        "The capital of Italy is Rome.",
        "The capital of Italy is Madrid.",
    ),
    (
        "Who wrote Don Quixote?",
        "Don Quixote was written by Miguel de Cervantes, around the year 1605.",
        "Don Quixote was written by Victor Hugo.",
    ),
    (
        "Tell me a riddle.",
        "What has keys but opens no door? A piano!",
        "I do not know any riddles.",
    ),
    (
        "What is machine learning?",
        "Machine learning is the craft of building programs that improve with "
        "examples.",
        "It is a computer that learns like a child.",
    ),
    (
        "How do I sleep better?",
        "Go to bed at the same hour every day, and leave the phone in another room.",
        "Just sleep more.",
    ),
)

RANKED: list[dict[str, Any]] = [
    {
        "prompt": chat("Why are leaves green?"),
        "ranked": [
            "Leaves hold chlorophyll, which takes in red and blue light and sends "
            "green light back to our eyes.",
            "They contain a green pigment, chlorophyll.",
            "Because the sun is warm.",
            "No idea.",
        ],
    },
    {
        "prompt": chat("What does the needle of a compass do?"),
        "ranked": [
            "It is a small magnet itself, and turns until it points along the magnetic "
            "field of the earth.",
            "It is a magnet and points north.",
            "It shows the time of day.",
            "Spins.",
        ],
    },
]
"""Two prompts, four answers each, the best first."""

UNRELATED = [
    "Why is the sky blue?",
    "What is a volcano?",
    "What do bees eat?",
    "What is bread made of?",
    "Who was Marie Curie?",
    "Name a large river.",
]

TOPICS = [
    "What is the capital of Japan?",
    "What is gravity?",
    "What is a volcano?",
    "Who was Marie Curie?",
    "What do bees eat?",
    "Why is the sky blue?",
    "What is bread made of?",
    "Why do birds sing?",
    "What is salt?",
    "Why do we sleep?",
    "What is a poem?",
    "Name a large river.",
]
NEW_TOPICS = [
    "Why do cats purr?",
    "What is democracy?",
    "Who was Isaac Newton?",
    "What is a mountain?",
]
"""Not in ``TOPICS``."""
WISH = " Answer in one short sentence."


def short_sentence(completions: Sequence[str], finished: Sequence[bool]) -> list[float]:
    """Return 1 for at most ten words that end in a full stop, if the model stopped by
    itself, else 0.
    """
    return [
        float(done and text.endswith(".") and len(text.split()) <= 10)
        for text, done in zip(completions, finished, strict=True)
    ]


@torch.no_grad()
def pair_log_probs(
    model: LanguageModel, pairs: Sequence[dict[str, Any]] = PAIRS
) -> Tensor:
    """Return log π of the chosen and of the rejected reply of each pair, [N, 2]."""
    texts = [text for pair in pairs for text in (pair["chosen"], pair["rejected"])]
    sequences: Sequences = model.encode([pair["prompt"] for pair in pairs], texts)
    log_probs = completion_log_probs(model.model, sequences).log_probs
    return log_probs.sum(1).view(-1, 2).cpu()


class Drift:
    """Estimate KL(reference ‖ model) per token, on the reference's own replies to
    unrelated questions.
    """

    def __init__(
        self, reference: LanguageModel, *, samples: int = 2, tokens: int = 24
    ) -> None:
        prompts = [encode_prompt(reference.tokenizer, chat(q)) for q in UNRELATED]
        sampling = SamplingConfig(max_new_tokens=tokens)
        sampler = TransformersSampler(reference)
        self.usual = sampler.sample(prompts, samples, sampling, seed=0)

    @torch.no_grad()
    def __call__(self, model: LanguageModel) -> float:
        """Return the estimate for a model, in nats."""
        usual = self.usual
        log_probs = completion_log_probs(model.model, usual.sequences).log_probs
        tokens = usual.sequences.completion_mask.sum()
        return float((usual.log_probs - log_probs).sum() / tokens)
