"""GRPO on the sums with 1, 4 and 16 optimiser steps per batch, and ways to weight what is off-policy.

Every run draws 3,072 completions: 24 batches of 16 prompts, groups of 8. A batch is used once, in M minibatches. All
methods take the mean over tokens but GSPO, which takes the sequence mean of its paper.

- clip: the token ratio, clipped at 1 ± 0.2 (GRPO);
- sequence: the completion's ratio, clipped at 1 - 3e-4 and 1 + 4e-4 (GSPO);
- cispo: the token ratio as a weight without a gradient, capped at 5 (CISPO);
- none: the token ratio as it is.

At 16 steps and the rate 1.5e-4 there are also clip-higher (1 - 0.2 and 1 + 0.28), and CISPO with caps of 1, 1.28 and 2.

About 6 CPU seconds a run.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from grpo_group_and_rate import SAMPLING, measure
from torch import Tensor

from policyopt.lm import GRPOConfig, train_grpo
from policyopt.lm.batches import Completions
from policyopt_book import load_model
from policyopt_book.studies import Study
from policyopt_book.tasks import addition


class Weighted(NamedTuple):
    """What a loss of one's own may return."""

    loss: Tensor
    ratio: Tensor
    clipped: Tensor


def cispo(batch: Completions, cap: float = 5) -> Weighted:
    """Weight log π by the capped ratio, without a gradient of the ratio."""
    ratio = (batch.log_probs - batch.old_log_probs).exp().detach()
    loss = -ratio.clamp(max=cap) * batch.advantages[:, None] * batch.log_probs
    return Weighted(loss, ratio, torch.zeros_like(batch.mask))


METHODS: dict[str, tuple[dict[str, Any], Callable[[Completions], Any] | None]] = {
    "clip": ({}, None),
    "sequence": (
        {"ratio": "sequence", "loss_mean": "sequence", "clip_ratio": 3e-4, "clip_ratio_high": 4e-4},
        None,
    ),
    "cispo": ({}, cispo),
    "none": ({"clip_ratio": 1e6}, None),
}
AT_16_STEPS: dict[str, tuple[dict[str, Any], Callable[[Completions], Any] | None]] = {
    "clip-higher": ({"clip_ratio_high": 0.28}, None),
    "cispo, cap 1": ({}, partial(cispo, cap=1)),
    "cispo, cap 1.28": ({}, partial(cispo, cap=1.28)),
    "cispo, cap 2": ({}, partial(cispo, cap=2)),
}


def run(*, seed: int, method: str, steps: int, rate: float) -> dict[str, Any]:
    """Train once."""
    options, loss = {**METHODS, **AT_16_STEPS}[method]
    config = GRPOConfig(
        updates=24,
        batch_size=16,
        group_size=8,
        minibatches=steps,
        learning_rate=rate,
        sampling=SAMPLING,
        **options,
    )
    model = load_model("addition-base", device="cpu")
    sums = addition.prompt_records(addition.make_problems(4_096, seed=7))
    history = train_grpo(
        model, sums, addition.answer_reward, config, loss=loss, seed=seed, progress=False
    ).history
    column = history.column
    clipped, largest = column("clip_fraction"), column("ratio_max")
    return {
        **measure(model),
        "entropy": column("entropy")[-5:].mean(),
        "silent": column("zero_variance")[-5:].mean(),
        "clipped": float(torch.tensor(clipped).nanmean()),
        "ratio_max": float(torch.tensor(largest).nan_to_num(1.0).max()),
        "reward_curve": column("reward"),
    }


SETTINGS = [
    {"method": method, "steps": steps, "rate": rate}
    for steps in (1, 4, 16)
    for method in METHODS
    for rate in (5e-5, 1.5e-4, 4e-4)
    if steps > 1 or method == "clip"  # at one step all ratios are 1
] + [{"method": method, "steps": 16, "rate": 1.5e-4} for method in AT_16_STEPS]
STUDY = Study(
    "grpo_off_policy", run, SETTINGS, seeds=5, sample={"method": "clip", "steps": 4, "rate": 1.5e-4}
)

if __name__ == "__main__":
    STUDY.main()
