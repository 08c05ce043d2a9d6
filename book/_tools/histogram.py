"""The picture and the table of the page "How to read a run", from the study of the same name.

Prints the table, and writes ``book/_static/loss-histogram.svg``::

    python book/_tools/histogram.py
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from policyopt_book.studies import load_study
from repository import ROOT

PICTURE = ROOT / "book" / "_static" / "loss-histogram.svg"
LABELS = ("right labels", "coin flips")


def losses(labels: str) -> list[NDArray[np.float64]]:
    """Return the loss of each update, one array per seed."""
    return [run[~np.isnan(run)] for run in load_study("loss_histogram").values("losses", labels=labels)]


def table() -> str:
    """Return the rows of the page's table."""
    study, rows = load_study("loss_histogram"), []
    for labels in LABELS:
        runs = losses(labels)
        every = np.concatenate(runs)
        accuracy, utility = (study.values(name, labels=labels) for name in ("held_out_accuracy", "utility"))
        rows.append(
            f"| {labels} | {np.mean([run[:10] for run in runs]):.2f} | "
            f"{np.mean([run[-10:] for run in runs]):.3f} | {every.mean():.2f} | {np.median(every):.3f} | "
            f"{min(accuracy):.0%} to {max(accuracy):.0%} | {min(utility):.1f} to {max(utility):.1f} |"
        )
    return "\n".join(rows).replace("| -", "| −").replace("to -", "to −")


def draw() -> None:
    """Draw the losses, their histograms, and what was learned."""
    import matplotlib.pyplot as plt

    from policyopt_book.plotting import OKABE_ITO, use_book_style

    use_book_style()
    plt.rcParams.update({"svg.hashsalt": "loss-histogram", "font.size": 11})
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.3))
    bins = np.linspace(0, 1.5, 31)
    colours = dict(zip(LABELS, (OKABE_ITO["blue"], OKABE_ITO["vermillion"]), strict=True))
    for x, labels in enumerate(LABELS):
        runs, style = losses(labels), "-" if x == 0 else "--"
        shown = {"color": colours[labels], "label": labels}
        length = min(len(run) for run in runs)
        mean = np.mean([run[:length] for run in runs], axis=0)
        axes[0].plot(np.arange(1, length + 1), mean, style, **shown)
        values = np.concatenate(runs)
        axes[1].hist(values, bins, density=True, histtype="step", linewidth=2, ls=style, **shown)
        accuracy = load_study("loss_histogram").values("held_out_accuracy", labels=labels)
        axes[2].plot(x + np.linspace(-0.15, 0.15, len(runs)), accuracy, "os"[x], **shown)
    axes[0].set(xlabel="update", ylabel="loss (mean of five runs)", title="The curve")
    axes[1].set(xlabel="loss of an update", ylabel="density", title="The histogram", yscale="log")
    axes[2].axhline(0.5, color="0.5", linewidth=1)
    axes[2].text(-0.45, 0.52, "chance", color="0.35")
    axes[2].set(xlim=(-0.5, 1.5), ylim=(0, 1), xticks=(0, 1), xticklabels=LABELS)
    axes[2].set(ylabel="held-out pairs in order", title="What was learned")
    axes[0].legend()
    figure.savefig(PICTURE, metadata={"Date": None})


if __name__ == "__main__":
    draw()
    print(table())
