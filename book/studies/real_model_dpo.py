"""DPO on five pairs, SmolLM2-135M-Instruct with adapters: three learning rates.

The chapter's settings: ten updates on all five pairs, β 0.1, adapters of rank 16. A seed draws the adapters. After
updates 1, 2, 3, 5 and 10: what the chosen and the rejected texts have gained, on the five pairs and on five that
were held out, the share of held-out pairs that moved the right way, and the drift on unrelated texts.

About 60 CPU seconds a run.
"""

from __future__ import annotations

from typing import Any

from _real_model import adapted, columns, summary

from policyopt.lm import DPOConfig, train_dpo
from policyopt_book.studies import Study
from policyopt_book.tasks.assistant import PAIRS

MEASURED = (1, 2, 3, 5, 10)


def run(*, seed: int, learning_rate: float) -> dict[str, Any]:
    """Train with one learning rate, and measure on the way."""
    policy = adapted(seed)
    rows = []

    def watch(row: Any) -> None:
        if row.update in MEASURED:
            rows.append(summary(policy))

    config = DPOConfig(batch_size=5, epochs=10, learning_rate=learning_rate, beta=0.1)
    history = train_dpo(policy, PAIRS, config, seed=seed, callback=watch, progress=False).history
    names = ("loss", "margin", "accuracy", "weight")
    return {**columns(rows), **{name: history.column(name) for name in names}}


STUDY = Study(
    "real_model_dpo",
    run,
    [{"learning_rate": rate} for rate in (1e-4, 5e-4, 5e-3)],
    seeds=1,
    sample={"learning_rate": 5e-4},
    minutes=True,
)

if __name__ == "__main__":
    STUDY.main()
