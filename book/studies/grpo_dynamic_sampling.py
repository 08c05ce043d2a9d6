"""GRPO on the sums with and without dynamic sampling, at equal updates and at equal completions.

Every update learns from 16 groups of 8. ``dynamic`` replaces a group in which all rewards are equal by one for another
sum, up to eight draws for each place, and counts every completion that was drawn. ``plain`` draws 128 an update, so
3,072 in its 24 updates. A dynamic run also makes 24 updates; ``right_at_budget`` is measured on the policy after the
last update up to which it had drawn no more than 3,072.

About 7 CPU seconds a run.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from typing import Any

import torch
from grpo_group_and_rate import SAMPLING, measure
from torch.nn.utils.rnn import pad_sequence

from policyopt.lm import GRPOConfig, SamplingConfig, TransformersSampler, train_grpo
from policyopt.lm.data import encode_prompt
from policyopt.lm.sampling import Samples, decode_all
from policyopt.lm.sequences import Sequences
from policyopt.runs import derive_seed
from policyopt_book import load_model
from policyopt_book.studies import Study
from policyopt_book.tasks import addition

UPDATES, PROMPTS, K, DRAWS = 24, 16, 8, 8
BUDGET = UPDATES * PROMPTS * K
SUMS = addition.make_problems(4_096, seed=7)


class Redrawing:
    """Draw groups, for other sums where all rewards are equal, and grade them."""

    def __init__(self, model: Any, draws: int, seed: int) -> None:
        self.model, self.sampler, self.draws = model, TransformersSampler(model), draws
        self.random = random.Random(seed)
        self.of = {tuple(encode_prompt(model.tokenizer, p.prompt)): p.answer for p in SUMS}
        self.pool = list(self.of)
        self.drawn, self.rewards = 0, [0.0]

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        K: int,
        config: SamplingConfig,
        *,
        seed: int,
        first_row: int = 0,
    ) -> Samples:
        """Fill each place with the first group that varies, or with the last."""
        asked = [tuple(prompt) for prompt in prompts]
        groups: dict[int, Any] = {}
        open_places = list(range(len(asked)))
        for draw in range(self.draws):
            at = derive_seed(seed, draw) if draw else seed
            got = self.sampler.sample([asked[i] for i in open_places], K, config, seed=at)
            self.drawn += len(open_places) * K
            texts = decode_all(self.model, got.sequences)
            rows = [
                row[:n].tolist()
                for row, n in zip(got.sequences.completion_ids, got.sequences.lengths.tolist(), strict=True)
            ]
            silent = []
            for j, i in enumerate(open_places):
                part = slice(j * K, j * K + K)
                right = [float(addition.final_answer(y) == self.of[asked[i]]) for y in texts[part]]
                scores = [s[: len(y)] for s, y in zip(got.log_probs[part], rows[part], strict=True)]
                groups[i] = (asked[i], rows[part], scores, got.finished[part], right)
                if len(set(right)) == 1:
                    silent.append(i)
            if not silent or draw == self.draws - 1:
                break
            open_places = silent
            for i in silent:
                asked[i] = self.random.choice(self.pool)
        filled = [groups[i] for i in range(len(asked))]
        self.rewards = [r for group in filled for r in group[4]]
        return Samples(
            Sequences.pad(
                [list(group[0]) for group in filled],
                [row for group in filled for row in group[1]],
                [i for i in range(len(filled)) for _ in range(K)],
                pad_id=self.model.pad_id,
            ),
            pad_sequence([s for group in filled for s in group[2]], batch_first=True),
            torch.cat([group[3] for group in filled]),
        )

    def grade(self, completions: Sequence[str], prompts: Sequence[Any], **columns: object) -> list[float]:
        """Return the rewards of the groups that were kept."""
        return self.rewards


def run(*, seed: int, dynamic: bool, rate: float) -> dict[str, Any]:
    """Train once."""
    config = GRPOConfig(
        updates=UPDATES, batch_size=PROMPTS, group_size=K, learning_rate=rate, sampling=SAMPLING
    )
    model = load_model("addition-base", device="cpu")
    sampler = Redrawing(model, DRAWS if dynamic else 1, seed)
    drawn: list[int] = []
    in_budget: dict[str, Any] = {}

    def watch(row: Any) -> None:
        drawn.append(sampler.drawn)
        if sampler.drawn <= BUDGET:
            in_budget.update(model=model.copy(), updates=row.update, drawn=sampler.drawn)

    history = train_grpo(
        model, addition.prompt_records(SUMS), sampler.grade, config, sampler=sampler, seed=seed, callback=watch,
        progress=False,
    ).history  # fmt: skip
    at_budget = measure(in_budget["model"])
    return {
        **measure(model),
        "right_at_budget": at_budget["right"],
        "skill_at_budget": at_budget["right_given_scratchpad"],
        "updates_at_budget": in_budget["updates"],
        "drawn_at_budget": in_budget["drawn"],
        "drawn": drawn,
        "silent_curve": history.column("zero_variance"),
        "reward_curve": history.column("reward"),
        "entropy_curve": history.column("entropy"),
    }


SETTINGS = [{"dynamic": dynamic, "rate": rate} for rate in (4e-4, 2e-4) for dynamic in (False, True)]
STUDY = Study("grpo_dynamic_sampling", run, SETTINGS, seeds=5, sample={"dynamic": True, "rate": 4e-4})

if __name__ == "__main__":
    STUDY.main()
