"""Offline or online × few pairs, all pairs or grades: what makes the gap between DPO and GRPO.

Every run gets 1,024 completions, eight for each of 128 prompts, and the same noisy annotator. DPO learns from four
disjoint pairs of each eight or from all 28; GRPO from grades with the same noise. The completions are sampled from
``news-sft``, or from the current policy. AdamW, 16 steps, one pass, and for each the two learning rates between the
edges that ``text_rates`` has.

About 6 CPU seconds a run.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from _text import RATES, compare, train

from policyopt_book.studies import Study

PAIRS = {"DPO, 4 pairs": 4, "DPO, all pairs": 28}


def run(*, seed: int, method: str, fixed: bool, learning_rate: float) -> dict[str, Any]:
    """Train once, on completions of a ``fixed`` policy or of the current one."""
    if method in PAIRS:
        loss = partial(compare, pairs=PAIRS[method])
        return train(seed, learning_rate, loss=loss, noisy=True, fixed=fixed)
    # The ratio is to the policy at the start of the batch; nothing corrects for whose the completions are.
    return train(seed, learning_rate, noisy=True, fixed=fixed, importance_cap=None)


STUDY = Study(
    name="pairs_two_by_two",
    run=run,
    settings=[
        {"method": method, "fixed": fixed, "learning_rate": rate}
        for rate in RATES
        for method in (*PAIRS, "GRPO, noisy grades")
        for fixed in (True, False)
    ],
    seeds=10,
    sample={"method": "DPO, all pairs", "fixed": True, "learning_rate": 8e-4},
)

if __name__ == "__main__":
    STUDY.main()
