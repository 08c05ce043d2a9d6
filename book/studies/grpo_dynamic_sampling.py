"""GRPO on the sums with and without dynamic sampling, at equal updates and at equal completions.

Every update learns from 16 groups of 8. ``dynamic`` draws other sums in place of those whose groups have one reward,
up to eight draws for each place, and counts every completion that was drawn. ``plain`` draws 128 an update, so
3,072 in its 24 updates. A dynamic run also makes 24 updates; ``right_at_budget`` is measured on the policy after the
last update up to which it had drawn no more than 3,072.

About 7 CPU seconds a run.
"""

from __future__ import annotations

from typing import Any

from grpo_group_and_rate import SAMPLING, measure

from policyopt.lm import GRPOConfig, train_grpo
from policyopt_book import load_model
from policyopt_book.studies import Study
from policyopt_book.tasks import addition

UPDATES, PROMPTS, K, DRAWS = 24, 16, 8, 8
BUDGET = UPDATES * PROMPTS * K


def run(*, seed: int, dynamic: bool, rate: float) -> dict[str, Any]:
    """Train once."""
    config = GRPOConfig(
        updates=UPDATES, batch_size=PROMPTS, group_size=K, learning_rate=rate, sampling=SAMPLING,
        max_draws=DRAWS if dynamic else 1,
    )  # fmt: skip
    model = load_model("addition-base", device="cpu")
    sums = addition.prompt_records(addition.make_problems(4_096, seed=7))
    drawn = [0]
    in_budget: dict[str, Any] = {}

    def watch(row: Any) -> None:
        drawn.append(drawn[-1] + row.completions)
        if drawn[-1] <= BUDGET:
            in_budget.update(model=model.copy(), updates=row.update, drawn=drawn[-1])

    history = train_grpo(
        model, sums, addition.answer_reward, config, seed=seed, callback=watch, progress=False
    ).history
    at_budget = measure(in_budget["model"])
    return {
        **measure(model),
        "right_at_budget": at_budget["right"],
        "skill_at_budget": at_budget["right_given_scratchpad"],
        "updates_at_budget": in_budget["updates"],
        "drawn_at_budget": in_budget["drawn"],
        "drawn": drawn[1:],
        "silent_curve": history.column("zero_variance"),
        "reward_curve": history.column("reward"),
        "entropy_curve": history.column("entropy"),
    }


SETTINGS = [{"dynamic": dynamic, "rate": rate} for rate in (4e-4, 2e-4) for dynamic in (False, True)]
STUDY = Study("grpo_dynamic_sampling", run, SETTINGS, seeds=10, sample={"dynamic": True, "rate": 4e-4})

if __name__ == "__main__":
    STUDY.main()
