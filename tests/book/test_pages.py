"""The pages "How to read a run" and "Which method when": their numbers, and what they say of histories."""

from __future__ import annotations

import json
import re
import runpy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from policyopt import control, lm
from repository import ROOT

READ = (ROOT / "book" / "how-to-read-a-run.md").read_text(encoding="utf-8")
WHICH = (ROOT / "book" / "which-method-when.md").read_text(encoding="utf-8")
SCRIPT = runpy.run_path(str(ROOT / "benchmarks" / "loss_histogram.py"), run_name="loss_histogram")
STORED: dict[str, Any] = json.loads((ROOT / "benchmarks" / "loss_histogram.json").read_text(encoding="utf-8"))
ROWS = (lm.DPOUpdate, lm.GRPOUpdate, lm.PPOUpdate, control.PPOUpdate, control.TRPOUpdate)


def runs(labels: str) -> list[dict[str, Any]]:
    return [run for run in STORED["runs"] if run["labels"] == labels]


def test_the_table_is_that_of_the_stored_runs() -> None:
    for row in SCRIPT["table"](STORED).splitlines():
        assert row in READ
    assert f"({STORED['utility before']:.1f} before)" in READ


def test_losses_do_not_tell_right_labels_from_coin_flips() -> None:
    right, coin = (np.concatenate([r["losses"] for r in runs(labels)]) for labels in SCRIPT["LABELS"])
    bins = np.linspace(0, 1.5, 16)
    shares = [np.histogram(x, bins)[0] / len(x) for x in (right, coin)]
    assert np.minimum(*shares).sum() > 0.9  # the part that the histograms have in common
    accuracy = [[r["held-out accuracy"] for r in runs(labels)] for labels in SCRIPT["LABELS"]]
    assert min(accuracy[0]) > max(accuracy[1]) + 0.1
    assert min(r["utility"] for r in runs("right labels")) > max(r["utility"] for r in runs("coin flips")) + 1


def test_a_histogram_does_not_know_the_order() -> None:
    losses = np.array(STORED["runs"][0]["losses"])
    bins = np.linspace(0, 1.5, 31)
    assert np.histogram(losses, bins)[0].tolist() == np.histogram(losses[::-1], bins)[0].tolist()
    assert losses[:10].mean() > 0.4 > 0.01 > losses[-10:].mean()


@pytest.mark.parametrize("labels", SCRIPT["LABELS"])
def test_the_stored_runs_begin_as_they_do_today(labels: str) -> None:
    SCRIPT["run"].__globals__["mean_utility"] = lambda model: 0.0  # the slow part
    config = replace(SCRIPT["CONFIG"], updates=8)
    losses = SCRIPT["run"](labels, 0, config)["losses"]
    np.testing.assert_allclose(losses, runs(labels)[0]["losses"][:8], atol=2e-3)


def test_the_numbers_that_are_named_are_logged() -> None:
    fields = {name for row in ROWS for name in row.__dataclass_fields__}
    table = READ.split("## The numbers")[1].split("\n## ")[0]
    named = {
        name
        for line in table.splitlines()
        if line.startswith("| ")
        for name in re.findall(r"`(\w+)`", line.split("|")[1])
    }
    assert len(named) > 12
    assert named - {"loss"} <= fields
    assert "policy_loss" in fields


def test_every_line_of_the_tables_leads_to_its_evidence() -> None:
    for page in (READ, WHICH):
        for line in page.splitlines():
            first = line.split("|")[1].strip() if line.startswith("| ") else ""
            if (
                first
                and not first.startswith(("Labels", *SCRIPT["LABELS"]))
                and not re.match(r"(Method|Number|You see|saves|costs|do without)", first)
            ):
                assert re.search(r"\]\([\w-]+\.ipynb(#[^)]+)?\)", line), line


def test_both_pages_are_linked_from_the_front_page() -> None:
    front = (ROOT / "book" / "index.md").read_text(encoding="utf-8")
    assert "](how-to-read-a-run.md)" in front
    assert "](which-method-when.md)" in front
