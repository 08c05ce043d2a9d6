"""GRPO on the sums: group size and learning rate, at equal completions.

Every run draws 4,096 completions: 32 updates of 128, in groups of K, so of 128 / K prompts. Each update is one
optimiser step. At the end, 64 unseen sums are answered eight times each.

About 5 CPU seconds a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from policyopt.lm import GRPOConfig, SamplingConfig, generate, train_grpo
from policyopt_book import load_model
from policyopt_book.studies import Study
from policyopt_book.tasks import addition

COMPLETIONS = 128  # of one update
SAMPLING = SamplingConfig(max_new_tokens=40)


def scratchpads(completions: Sequence[str], prompts: Sequence[Any], **columns: object) -> list[float]:
    """Report the share of scratchpads; its weight in the reward is 0."""
    return [float(addition.uses_scratchpad(text)) for text in completions]


def measure(model: Any) -> dict[str, float]:
    """Answer 64 unseen sums eight times each."""
    unseen = addition.make_problems(64, seed=99)
    texts = generate(model, [p.prompt for p in unseen], SAMPLING, samples_per_prompt=8, seed=1)
    right = np.array(
        [[addition.final_answer(t) == p.answer for t in row] for row, p in zip(texts, unseen, strict=True)]
    )
    pad = np.array([[addition.uses_scratchpad(t) for t in row] for row in texts])
    return {
        "right": right.mean(),
        "right_given_scratchpad": right[pad].mean() if pad.any() else np.nan,
        "scratchpads": pad.mean(),
        "pass_8": right.any(1).mean(),
    }


def run(*, seed: int, K: int, rate: float) -> dict[str, Any]:
    """Train once."""
    config = GRPOConfig(
        updates=32, batch_size=COMPLETIONS // K, group_size=K, learning_rate=rate, sampling=SAMPLING,
        reward_weights=(1.0, 0.0),
    )  # fmt: skip
    model = load_model("addition-base", device="cpu")
    sums = addition.prompt_records(addition.make_problems(4_096, seed=7))
    rewards = {"right": addition.answer_reward, "scratchpads": scratchpads}
    history = train_grpo(model, sums, rewards, config, seed=seed, progress=False).history
    column = history.column
    return {
        **measure(model),
        # Means of the last five updates.
        "entropy": column("entropy")[-5:].mean(),
        "silent": column("zero_variance")[-5:].mean(),
        "length": column("length")[-5:].mean(),
        # Curves over the updates.
        "reward_curve": column("reward"),
        "entropy_curve": column("entropy"),
        "silent_curve": column("zero_variance"),
        # One optimiser step a batch: 1 by construction, stored as the check of that.
        "ratio_max": column("ratio_max").max(),
    }


SETTINGS = [{"K": K, "rate": rate} for K in (2, 4, 8, 16, 32) for rate in (1e-4, 2e-4, 4e-4, 8e-4)]
STUDY = Study("grpo_group_and_rate", run, SETTINGS, seeds=20, sample={"K": 8, "rate": 4e-4})

if __name__ == "__main__":
    STUDY.main()
