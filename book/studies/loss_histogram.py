"""Loss values of DPO on right labels and on labels that are coin flips: the page "How to read a run" shows them.

Forty pairs of news briefs, fifteen epochs. Once each pair is labelled by the exact utility; once each label is a coin
flip, so that there is nothing to learn. ``book/_tools/histogram.py`` draws the picture and the table of the page.

About 30 CPU seconds a run.
"""

from __future__ import annotations

import math
import random
from typing import Any

import numpy as np

from policyopt.lm import (
    DPOConfig,
    ImplicitReward,
    LanguageModel,
    SamplingConfig,
    generate,
    pair_accuracy,
    train_dpo,
)
from policyopt_book import load_model
from policyopt_book.studies import Study
from policyopt_book.tasks import news

PAIRS, EPOCHS = 40, 15
CONFIG = DPOConfig(epochs=EPOCHS, batch_size=4, learning_rate=6e-4, beta=0.5)
UPDATES = EPOCHS * PAIRS // CONFIG.batch_size


def preference_pairs(count: int, seed: int) -> list[dict[str, Any]]:
    """Pairs of drafts, ordered by their exact utility."""
    items, rng = news.make_items(count, seed=seed), random.Random(seed)
    drafts = [[news.write_summary(item, news.MIXED, rng) for _ in range(2)] for item in items]
    return news.preference_pairs(items, drafts, temperature=0.0, seed=seed)


def training_pairs(labels: str, seed: int) -> list[dict[str, Any]]:
    """Forty pairs; with coin flips for labels half of them are exchanged, whatever they say."""
    rng, pairs = random.Random(seed), preference_pairs(PAIRS, seed)
    if labels == "right labels":
        return pairs
    return [
        {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} if rng.random() < 0.5 else pair
        for pair in pairs
    ]


def mean_utility(model: LanguageModel) -> float:
    """Mean exact utility of a sample for each of a hundred unseen items."""
    items = news.make_items(100, seed=2000)
    samples = generate(model, [item.prompt for item in items], SamplingConfig(max_new_tokens=64), seed=0)
    return float(np.mean([news.utility(texts[0], item) for texts, item in zip(samples, items, strict=True)]))


def run(*, seed: int, labels: str) -> dict[str, Any]:
    """Train once: the losses, and what the model is worth on data that it has not seen."""
    model = load_model("news-sft", device="cpu")
    reference = model.copy()
    result = train_dpo(model, training_pairs(labels, seed), CONFIG, seed=seed, progress=False)
    losses = result.history.column("loss").tolist()
    judge = ImplicitReward(model, reference, beta=CONFIG.beta)
    return {
        # Where two drafts are equal there is a pair less, and with it some updates.
        "losses": losses + [math.nan] * (UPDATES - len(losses)),
        "held_out_accuracy": pair_accuracy(judge, preference_pairs(200, 1000)),
        "utility": mean_utility(model),
        "utility_before": mean_utility(reference),
    }


STUDY = Study(
    name="loss_histogram",
    run=run,
    settings=[{"labels": labels} for labels in ("right labels", "coin flips")],
    seeds=5,
)

if __name__ == "__main__":
    STUDY.main()
