"""The methods for language models on one task: 1,024 judged completions each, and the same learning rates.

All start at ``news-sft`` and make two steps of AdamW on each of eight batches of 16 × 8 completions. The ranking loss
gets the noisy annotator's order of each eight; all others get exact grades. DPO and GRPO on noisy grades are in
``pairs_two_by_two``, with the same budget. The rates are the two between the edges that ``text_rates`` has.

About 5 CPU seconds a run.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from _text import RATES, K, compare, train
from torch import Tensor

from policyopt.lm import PPOConfig, train_ppo
from policyopt.lm.batches import Completions
from policyopt_book.studies import Study


def cispo(batch: Completions) -> Tensor:
    """CISPO: every token keeps its gradient; its ratio is a weight, capped and without gradient."""
    ratio = torch.exp(batch.log_probs - batch.old_log_probs).detach().clamp(max=1.28)
    return -ratio * batch.advantages[:, None] * batch.log_probs


def imitate_best(batch: Completions) -> Tensor:
    """Expert iteration: SFT on the best of each group, and on nothing else."""
    grades = batch.rewards.view(-1, K)
    best = torch.zeros_like(grades).scatter(1, grades.argmax(1, keepdim=True), 1.0)
    return -best.view(-1, 1) * batch.log_probs


# Each as its paper has it, in the words of GRPOConfig; no KL term in any. (RLOO's gradient is 8/7 of Dr. GRPO's: under
# Adam the same runs.)
METHODS: dict[str, dict[str, Any]] = {
    "GRPO": {"loss_mean": "sequence"},
    "Dr. GRPO": {"scale_rewards": False, "loss_mean": "constant"},
    "DAPO's loss": {"clip_ratio_high": 0.28, "loss_mean": "token", "drop_unfinished": True},
    "GSPO": {
        "ratio": "sequence",
        "loss_mean": "sequence",
        "clip_ratio": 3e-4,
        "clip_ratio_high": 4e-4,
    },
    "CISPO": {"loss": cispo},
    "PPO": {
        "trainer": train_ppo,
        "config": PPOConfig,
        "samples_per_prompt": K,
        "epochs_per_batch": 1,
        "beta": 0.01,
        "gae_lambda": 1.0,
        "value_coef": 0.01,
    },
    "PPO, untuned": {  # the defaults of the library
        "trainer": train_ppo,
        "config": PPOConfig,
        "samples_per_prompt": K,
        "epochs_per_batch": 1,
        "beta": 0.01,
        "gae_lambda": 0.95,
        "value_coef": 0.1,
    },
    "expert iteration": {"loss": imitate_best},
    "ranking": {
        "loss": partial(compare, pairs=28, reference=False),
        "noisy": True,
        "fixed": True,
    },
    "ranking, online": {"loss": partial(compare, pairs=28, reference=False), "noisy": True},
}


def run(*, seed: int, method: str, learning_rate: float) -> dict[str, Any]:
    """Train once by one method."""
    return train(seed, learning_rate, **METHODS[method])


STUDY = Study(
    name="text_race",
    run=run,
    settings=[{"method": method, "learning_rate": rate} for rate in RATES for method in METHODS],
    seeds=5,
    sample={"method": "GRPO", "learning_rate": 8e-4},
)

if __name__ == "__main__":
    STUDY.main()
