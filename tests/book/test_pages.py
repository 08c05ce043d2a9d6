"""The pages "How to read a run" and "Which method when": their numbers, and what they say of histories."""

from __future__ import annotations

import re

import numpy as np

import histogram
from policyopt import control, lm
from policyopt_book.studies import load_study
from repository import ROOT

READ = (ROOT / "book" / "how-to-read-a-run.md").read_text(encoding="utf-8")
WHICH = (ROOT / "book" / "which-method-when.md").read_text(encoding="utf-8")
STORED = load_study("loss_histogram")
ROWS = (lm.DPOUpdate, lm.GRPOUpdate, lm.PPOUpdate, control.PPOUpdate, control.TRPOUpdate)


def test_the_table_is_that_of_the_stored_runs() -> None:
    for row in histogram.table().splitlines():
        assert row in READ
    for labels in histogram.LABELS:
        (before,) = set(STORED.values("utility_before", labels=labels))
        assert f"({before:.1f} before)" in READ


def test_losses_do_not_tell_right_labels_from_coin_flips() -> None:
    right, coin = (np.concatenate(histogram.losses(labels)) for labels in histogram.LABELS)
    bins = np.linspace(0, 1.5, 16)
    shares = [np.histogram(x, bins)[0] / len(x) for x in (right, coin)]
    assert np.minimum(*shares).sum() > 0.9  # the part that the histograms have in common
    accuracy, utility = (
        [STORED.values(name, labels=labels) for labels in histogram.LABELS]
        for name in ("held_out_accuracy", "utility")
    )
    assert min(accuracy[0]) > max(accuracy[1]) + 0.1
    assert min(utility[0]) > max(utility[1]) + 1


def test_a_histogram_does_not_know_the_order() -> None:
    losses = histogram.losses("right labels")[0]
    bins = np.linspace(0, 1.5, 31)
    assert np.histogram(losses, bins)[0].tolist() == np.histogram(losses[::-1], bins)[0].tolist()
    assert losses[:10].mean() > 0.4 > 0.01 > losses[-10:].mean()


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
                and not first.startswith(("Labels", *histogram.LABELS))
                and not re.match(r"(Method|Number|You see|saves|costs|do without)", first)
            ):
                assert re.search(r"\]\([\w-]+\.ipynb(#[^)]+)?\)", line), line


def test_both_pages_are_linked_from_the_front_page() -> None:
    front = (ROOT / "book" / "index.md").read_text(encoding="utf-8")
    assert "](how-to-read-a-run.md)" in front
    assert "](which-method-when.md)" in front
