"""DPO's two knobs together: learning rate × β, on the news briefs of the chapter on DPO.

Every run gets the chapter's 600 pairs of its seed, once, in 50 updates of 12, from the same start. Only the learning
rate and β differ. What a run ends with is measured on samples for 128 unseen items: utility, KL to the start (nats
per completion, the k1 estimate), facts right and wrong, tokens, and the share that did not end.

About 4 CPU seconds a run.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
from _text import SAMPLING, examine, start

from policyopt.lm import DPOConfig, LanguageModel, generate, train_dpo
from policyopt_book.studies import Study
from policyopt_book.tasks import news

PAIRS = 600
RATES = (3e-4, 1e-3, 3e-3)
BETAS = (0.03, 0.1, 0.3, 1.0)


@lru_cache(maxsize=1)
def pairs_of(seed: int) -> list[dict[str, Any]]:
    """Pairs of samples of the start, compared by the annotator: those of the chapter."""
    items = news.make_items(PAIRS + PAIRS // 8, seed=100 + seed)
    prompts = [item.prompt for item in items]
    texts = generate(start(), prompts, SAMPLING, samples_per_prompt=2, seed=seed)
    return news.preference_pairs(items, texts, seed=seed)[:PAIRS]


def measure(policy: LanguageModel) -> dict[str, float]:
    """Judge one summary of each of 128 unseen items."""
    return examine(policy, 128, 1)


def run(*, seed: int, learning_rate: float, beta: float) -> dict[str, Any]:
    """Train with one learning rate and one β, and measure."""
    config = DPOConfig(
        batch_size=12, learning_rate=learning_rate, warmup_updates=5, schedule="linear", beta=beta
    )
    result = train_dpo(start().copy(), pairs_of(seed), config, seed=seed, progress=False)
    last = [row.accuracy for row in result.history[-15:]]
    return {**measure(result.language_model), "accuracy": float(np.mean(last))}


STUDY = Study(
    "dpo_rate_beta",
    run,
    [{"learning_rate": rate, "beta": beta} for rate in RATES for beta in BETAS],
    seeds=20,
    sample={"learning_rate": 1e-3, "beta": 0.1},
)

if __name__ == "__main__":
    STUDY.main()
