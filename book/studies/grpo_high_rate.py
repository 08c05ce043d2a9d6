"""GRPO on the sums at a rate that is too high, and what helps.

Every run makes 30 updates of 16 prompts in groups of 8, at a rate of 3e-3: alone, with a KL term to the start, with a
warm-up of 10 updates; and at 4e-4.

About 5 CPU seconds a run.
"""

from __future__ import annotations

from typing import Any

from grpo_group_and_rate import SAMPLING, measure

from policyopt.lm import GRPOConfig, train_grpo
from policyopt_book import load_model
from policyopt_book.studies import Study
from policyopt_book.tasks import addition


def run(*, seed: int, rate: float, beta: float, warmup: int) -> dict[str, Any]:
    """Train once."""
    config = GRPOConfig(
        updates=30, batch_size=16, group_size=8, learning_rate=rate, beta=beta, warmup_updates=warmup,
        sampling=SAMPLING,
    )  # fmt: skip
    model = load_model("addition-base", device="cpu")
    sums = addition.prompt_records(addition.make_problems(4_096, seed=7))
    history = train_grpo(model, sums, addition.answer_reward, config, seed=seed, progress=False).history
    column = history.column
    return {
        **measure(model),
        "reward_curve": column("reward"),
        "silent_curve": column("zero_variance"),
        "gradient_curve": column("gradient_norm"),
    }


SETTINGS = [
    {"rate": 3e-3, "beta": 0.0, "warmup": 0},
    {"rate": 3e-3, "beta": 0.04, "warmup": 0},
    {"rate": 3e-3, "beta": 0.5, "warmup": 0},
    {"rate": 3e-3, "beta": 0.0, "warmup": 10},
    {"rate": 4e-4, "beta": 0.0, "warmup": 0},
]
STUDY = Study("grpo_high_rate", run, SETTINGS, seeds=5)

if __name__ == "__main__":
    STUDY.main()
