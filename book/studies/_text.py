"""What the studies on the news briefs share: the start, and how a model is judged.

And, of those of the comparison, the budget, one trainer and one loss for each method.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from policyopt.estimators import sequence_log_prob
from policyopt.lm import (
    GRPOConfig,
    LanguageModel,
    SamplingConfig,
    TransformersSampler,
    completion_log_probs,
    train_grpo,
)
from policyopt.lm.batches import Completions
from policyopt.lm.data import encode_prompt
from policyopt_book import load_model
from policyopt_book.tasks import news

UPDATES, PROMPTS, K, WARMUP = 8, 16, 8, 2  # 8 × 16 × 8 = 1,024 completions are judged
SAMPLING = SamplingConfig(max_new_tokens=40)
RATES, EDGES = (8e-4, 1.6e-3), (4e-4, 3.2e-3)  # every method's best is one of the first two
BETA = 0.1
COMMON: dict[str, Any] = {
    "updates": UPDATES,
    "batch_size": PROMPTS,
    "sampling": SAMPLING,
    "warmup_updates": WARMUP,
    "minibatches": 2,
}
Loss = Callable[[Completions], Tensor]


@lru_cache(maxsize=1)
def start() -> LanguageModel:
    """Load the model that all runs start from."""
    return load_model("news-sft", device="cpu")


@torch.no_grad()
def examine(model: LanguageModel, count: int, samples: int) -> dict[str, float]:
    """Sample summaries of unseen items, and judge them; KL to the start in nats per completion, the k1 estimate."""
    items = news.make_items(count, seed=999)
    prompts = [encode_prompt(model.tokenizer, item.prompt) for item in items]
    drawn = TransformersSampler(model).sample(prompts, samples, SAMPLING, seed=7)
    there = completion_log_probs(start().model, drawn.sequences).log_probs
    nats = sequence_log_prob(drawn.log_probs - there, drawn.sequences.completion_mask)
    rows, lengths = drawn.sequences.completion_ids.tolist(), drawn.sequences.lengths.tolist()
    texts = [model.decode(row[:length]) for row, length in zip(rows, lengths, strict=True)]
    judged = [(text, items[i // samples]) for i, text in enumerate(texts)]
    right, wrong = np.mean([news.count_facts(*pair) for pair in judged], axis=0)
    return {
        "utility": float(np.mean([news.utility(*pair) for pair in judged])),
        "kl": float(nats.mean()),
        "right": float(right),
        "wrong": float(wrong),
        "tokens": float(np.mean(lengths)),
        "unfinished": 1 - float(drawn.finished.float().mean()),
    }


def noisy_grades(seed: int) -> Callable[..., list[float]]:
    """Grade with the annotator's own noise: of two such grades the higher is the annotator's choice."""
    noise = random.Random(seed)

    def grade(completions: Any, prompts: Any, **columns: Any) -> list[float]:
        exact = news.utility_reward(completions, prompts, **columns)
        return [u - math.log(-math.log(noise.uniform(1e-12, 1))) for u in exact]

    return grade


def compare(batch: Completions, pairs: int, *, reference: bool = True) -> Tensor:
    """DPO's loss on 4 disjoint pairs, or on all 28, of each group of eight: one number for all tokens.

    Without a reference and with all pairs it is the ranking loss of the whole list.
    """
    log_ratio = batch.log_probs - (batch.reference_log_probs if reference else 0.0)
    score = BETA * sequence_log_prob(log_ratio, batch.mask).view(-1, K)
    grade = batch.rewards.view(-1, K)
    one, two = torch.triu_indices(K, K, 1) if pairs == 28 else torch.arange(K).view(-1, 2).T
    sign = torch.sign(grade[:, one] - grade[:, two])
    return -logsigmoid(sign * (score[:, one] - score[:, two])).mean().expand_as(batch.log_probs)


def train(
    seed: int,
    learning_rate: float,
    *,
    loss: Loss | None = None,
    noisy: bool = False,
    fixed: bool = False,
    trainer: Callable[..., Any] = train_grpo,
    config: Any = GRPOConfig,
    **options: Any,
) -> dict[str, Any]:
    """Train on 1,024 judged completions in 16 steps, and measure.

    ``fixed`` samples them from the start instead of the current policy.
    """
    model = start().copy()
    items = news.make_items(UPDATES * PROMPTS, seed=20_000 + seed)
    curve, looking = [], 0.0

    def watch(row: Any) -> None:
        nonlocal looking
        if row.update % 2 == 0 and row.update < UPDATES:
            before = time.process_time()
            curve.append(examine(model, 100, 1)["utility"])
            looking += time.process_time() - before

    begin = time.process_time()
    result = trainer(
        model,
        news.prompt_records(items),
        noisy_grades(seed) if noisy else news.utility_reward,
        config(learning_rate=learning_rate, **{**COMMON, **options}),
        reference=start(),
        loss=loss,
        sampler=TransformersSampler(start()) if fixed else None,
        seed=seed,
        callback=watch,
        progress=False,
    )
    seconds = time.process_time() - begin - looking
    last = examine(model, 100, 3)
    clipped = [row.clip_fraction for row in result.history]
    return {
        **last,
        "curve": [*curve, last["utility"]],
        "clipped": float(np.mean(clipped)) if loss is None else None,
        "trained_tokens": result.history[-1].tokens,
        "cpu_seconds": seconds,
    }
