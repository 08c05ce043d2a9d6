"""Losses on preference pairs, each at its own learning rate, on the news briefs of the chapter on DPO.

Every run gets the same 240 pairs of its seed, once, in 20 updates of 12, from the same start. Each loss is run at three
learning rates (DPO-positive, whose best was the highest, at a fourth); the chapters show each at the one with the
highest mean utility. β and the other numbers of a loss are those of the papers where they carry over, and of the
chapter where they do not. The two last rows train on damaged labels: one pair in five is exchanged.

What a run ends with is measured as in ``dpo_rate_beta``, and on 64 held-out pairs: by how many nats log π of the chosen
and of the rejected completion changed.

About 4 CPU seconds a run.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from _text import SAMPLING, start
from dpo_rate_beta import measure, pairs_of
from torch import Tensor
from torch.nn.functional import logsigmoid

from policyopt.estimators import sequence_log_prob
from policyopt.lm import DPOConfig, LanguageModel, Pairs, Sequences, completion_log_probs, generate, train_dpo
from policyopt.lm.data import encode_completion, encode_prompt
from policyopt_book.studies import Study
from policyopt_book.tasks import news

PAIRS = 240
RATES = (3e-4, 1e-3, 3e-3)
BASE = DPOConfig(batch_size=12, warmup_updates=5, schedule="linear", beta=0.1)


def orpo(pairs: Pairs, weight: float = 1.0) -> Tensor:
    """−log p̄(chosen) + λ · −log σ(log odds(chosen) − log odds(rejected)), p̄ per token."""
    chosen, rejected = pairs.chosen_log_prob, pairs.rejected_log_prob  # means
    odds = (chosen - torch.log1p(-chosen.exp())) - (rejected - torch.log1p(-rejected.exp()))
    return -chosen - weight * logsigmoid(odds)


def dpo_nll(pairs: Pairs, beta: float = 0.1, weight: float = 1.0) -> Tensor:
    """DPO plus the chosen completion's negative log-likelihood per token."""
    up = pairs.chosen_log_prob - pairs.reference_chosen_log_prob
    down = pairs.rejected_log_prob - pairs.reference_rejected_log_prob
    length = pairs.tokens.mask.sum(1)[0::2]
    return -logsigmoid(beta * (up - down)) - weight * pairs.chosen_log_prob / length


def dpo_positive(pairs: Pairs, beta: float = 0.1, weight: float = 5.0) -> Tensor:
    """DPO with λ max(0, −log-ratio of the chosen) taken from the margin's difference."""
    up = pairs.chosen_log_prob - pairs.reference_chosen_log_prob
    down = pairs.rejected_log_prob - pairs.reference_rejected_log_prob
    return -logsigmoid(beta * (up - down - weight * (-up).clamp(min=0)))


LOSSES: dict[str, tuple[dict[str, Any], Callable[[Pairs], Tensor] | None]] = {
    "DPO": ({}, None),
    "IPO": ({"loss": "ipo"}, None),
    "hinge": ({"loss": "hinge"}, None),
    "length-normalised": ({"length_normalized": True, "beta": 2.0}, None),
    "SimPO": (
        {"length_normalized": True, "reference_free": True, "beta": 2.0, "target_margin": 1.0},
        None,
    ),
    "reference-free": ({"reference_free": True}, None),
    "ORPO": ({"length_normalized": True, "reference_free": True}, orpo),
    "DPO + NLL": ({}, dpo_nll),
    "DPO-positive": ({}, dpo_positive),
    "20 % flipped": ({}, None),
    "flipped, smoothed": ({"label_smoothing": 0.2}, None),
}


def flipped(pairs: list[dict[str, Any]], seed: int) -> list[dict[str, Any]]:
    """Exchange one pair in five, in addition to the annotator's noise."""
    rng = random.Random(seed)
    return [
        {**p, "chosen": p["rejected"], "rejected": p["chosen"]} if rng.random() < 0.2 else p for p in pairs
    ]


@lru_cache(maxsize=1)
def held_out() -> list[dict[str, Any]]:
    """Pairs of samples of the start that no run trains on."""
    items = news.make_items(72, seed=150)
    texts = generate(start(), [item.prompt for item in items], SAMPLING, samples_per_prompt=2, seed=50)
    return news.preference_pairs(items, texts, seed=50)[:64]


def scores(policy: LanguageModel, which: str) -> Tensor:
    """Return log π of each held-out completion, nats."""
    tokenizer, pairs = policy.tokenizer, held_out()
    sequences = Sequences.pad(
        [encode_prompt(tokenizer, p["prompt"]) for p in pairs],
        [encode_completion(tokenizer, p[which], p["prompt"]) for p in pairs],
    )
    with torch.no_grad():
        log_probs = completion_log_probs(policy.model, sequences).log_probs
    return sequence_log_prob(log_probs, sequences.completion_mask)


@lru_cache(maxsize=2)
def at_the_start(which: str) -> Tensor:
    """Return the scores of the start."""
    return scores(start(), which)


def run(*, seed: int, loss: str, learning_rate: float) -> dict[str, Any]:
    """Train with one loss at one learning rate, and measure."""
    changes, function = LOSSES[loss]
    pairs = pairs_of(seed)[:PAIRS]
    if "flipped" in loss:
        pairs = flipped(pairs, seed)
    config = replace(BASE, learning_rate=learning_rate, **changes)
    result = train_dpo(start().copy(), pairs, config, loss=function, seed=seed, progress=False)
    shift = {
        which: float(np.mean((scores(result.language_model, which) - at_the_start(which)).tolist()))
        for which in ("chosen", "rejected")
    }
    return {**measure(result.language_model), **shift}


STUDY = Study(
    "dpo_losses",
    run,
    [{"loss": loss, "learning_rate": rate} for loss in LOSSES for rate in RATES]
    + [{"loss": "DPO-positive", "learning_rate": 1e-2}],
    seeds=4,
    sample={"loss": "DPO", "learning_rate": 1e-3},
)

if __name__ == "__main__":
    STUDY.main()
