"""The edges of the grid of learning rates: half and twice the rates of ``pairs_two_by_two`` and ``text_race``.

They are there to show that no method's best rate lies beyond those two; so one seed is enough.

About 5 CPU seconds a run.
"""

from __future__ import annotations

from typing import Any

import pairs_two_by_two
import text_race
from _text import EDGES

from policyopt_book.studies import Study

STUDIES = {module.STUDY.name: module.STUDY for module in (pairs_two_by_two, text_race)}


def run(*, seed: int, study: str, **setting: Any) -> dict[str, Any]:
    """Train once, in a setting of another study but for its learning rate."""
    return dict(STUDIES[study].run(seed=seed, **setting))


STUDY = Study(
    name="text_rates",
    run=run,
    settings=[
        {"study": name, **setting, "learning_rate": rate}
        for name, study in STUDIES.items()
        for setting in study.settings
        if setting["learning_rate"] == study.settings[0]["learning_rate"]
        for rate in EDGES
    ],
    seeds=1,
    sample={"study": "text_race", "method": "GRPO", "learning_rate": 4e-4},
)

if __name__ == "__main__":
    STUDY.main()
