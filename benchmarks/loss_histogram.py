"""Loss values of DPO on right labels and on labels that are coin flips: the page "How to read a run" shows them.

Writes ``loss_histogram.json`` beside this file and ``book/_static/loss-histogram.svg``, in five minutes on one core::

    python benchmarks/loss_histogram.py            # train, and draw
    python benchmarks/loss_histogram.py --draw     # draw only
"""

from __future__ import annotations

import argparse
import json
import platform
import random
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch

from policyopt.lm import DPOConfig, ImplicitReward, SamplingConfig, generate, pair_accuracy, train_dpo
from policyopt_book import load_model
from policyopt_book.tasks import news

HERE = Path(__file__).resolve().parent
STORED = HERE / "loss_histogram.json"
PICTURE = HERE.parent / "book" / "_static" / "loss-histogram.svg"
CONFIG = DPOConfig(epochs=15, batch_size=4, learning_rate=6e-4, beta=0.5)
LABELS = ("right labels", "coin flips")
SEEDS = range(5)


def preference_pairs(count: int, seed: int) -> list[dict[str, Any]]:
    """Pairs of drafts, ordered by their exact utility."""
    items, rng = news.make_items(count, seed=seed), random.Random(seed)
    drafts = [[news.write_summary(item, news.MIXED, rng) for _ in range(2)] for item in items]
    return news.preference_pairs(items, drafts, temperature=0.0, seed=seed)


def training_pairs(labels: str, seed: int) -> list[dict[str, Any]]:
    """Forty pairs; with coin flips for labels half of them are exchanged, whatever they say."""
    rng, pairs = random.Random(seed), preference_pairs(40, seed)
    if labels == "right labels":
        return pairs
    return [
        {**pair, "chosen": pair["rejected"], "rejected": pair["chosen"]} if rng.random() < 0.5 else pair
        for pair in pairs
    ]


def mean_utility(model: Any) -> float:
    """Mean exact utility of a sample for each of a hundred unseen items."""
    items = news.make_items(100, seed=2000)
    samples = generate(model, [item.prompt for item in items], SamplingConfig(max_new_tokens=64), seed=0)
    return float(np.mean([news.utility(texts[0], item) for texts, item in zip(samples, items, strict=True)]))


def run(labels: str, seed: int, config: DPOConfig = CONFIG) -> dict[str, Any]:
    """One training: its losses, and what it is worth on data that it has not seen."""
    model = load_model("news-sft", device="cpu")
    reference = model.copy()
    result = train_dpo(model, training_pairs(labels, seed), config, seed=seed, progress=False)
    judge = ImplicitReward(model, reference, beta=config.beta)
    return {
        "labels": labels,
        "seed": seed,
        "losses": [round(float(loss), 4) for loss in result.history.column("loss")],
        "held-out accuracy": round(pair_accuracy(judge, preference_pairs(200, 1000)), 3),
        "utility": round(mean_utility(model), 3),
    }


def table(stored: dict[str, Any]) -> str:
    """Return the rows of the page's table."""
    rows = []
    for labels in LABELS:
        runs = [r for r in stored["runs"] if r["labels"] == labels]
        losses = np.concatenate([r["losses"] for r in runs])
        accuracy, utility = ([r[name] for r in runs] for name in ("held-out accuracy", "utility"))
        rows.append(
            f"| {labels} | {np.mean([r['losses'][:10] for r in runs]):.2f} | "
            f"{np.mean([r['losses'][-10:] for r in runs]):.3f} | {losses.mean():.2f} | {np.median(losses):.3f} | "
            f"{min(accuracy):.0%} to {max(accuracy):.0%} | {min(utility):.1f} to {max(utility):.1f} |"
        )
    return "\n".join(rows).replace("| -", "| −").replace("to -", "to −")


def draw(stored: dict[str, Any]) -> None:
    """Draw the losses, their histograms, and what was learned."""
    import matplotlib.pyplot as plt

    from policyopt_book.plotting import OKABE_ITO, use_book_style

    use_book_style()
    plt.rcParams.update({"svg.hashsalt": "loss-histogram", "font.size": 11})
    figure, axes = plt.subplots(1, 3, figsize=(10, 3.3))
    bins = np.linspace(0, 1.5, 31)
    colours = dict(zip(LABELS, (OKABE_ITO["blue"], OKABE_ITO["vermillion"]), strict=True))
    for x, labels in enumerate(LABELS):
        runs = [r for r in stored["runs"] if r["labels"] == labels]
        shown = {"color": colours[labels], "label": labels}
        length = min(len(r["losses"]) for r in runs)
        axes[0].plot(
            np.arange(1, length + 1),
            np.mean([r["losses"][:length] for r in runs], axis=0),
            "-" if x == 0 else "--",
            **shown,
        )
        values = np.concatenate([r["losses"] for r in runs])
        axes[1].hist(
            values, bins, density=True, histtype="step", linewidth=2, ls="-" if x == 0 else "--", **shown
        )
        places = x + np.linspace(-0.15, 0.15, len(runs))
        axes[2].plot(places, [r["held-out accuracy"] for r in runs], "os"[x], **shown)
    axes[0].set(xlabel="update", ylabel="loss (mean of five runs)", title="The curve")
    axes[1].set(xlabel="loss of an update", ylabel="density", title="The histogram", yscale="log")
    axes[2].axhline(0.5, color="0.5", linewidth=1)
    axes[2].text(-0.45, 0.52, "chance", color="0.35")
    axes[2].set(xlim=(-0.5, 1.5), ylim=(0, 1), xticks=(0, 1), xticklabels=LABELS)
    axes[2].set(ylabel="held-out pairs in order", title="What was learned")
    axes[0].legend()
    figure.savefig(PICTURE, metadata={"Date": None})


def main() -> None:
    """Train, store and draw."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--draw", action="store_true", help="draw what is stored")
    if not parser.parse_args().draw:
        torch.set_num_threads(1)
        names = ("policyopt", "torch", "transformers")
        stored = {
            "date": date.today().isoformat(),
            "python": platform.python_version(),
            "versions": {name: version(name) for name in names},
            "utility before": round(mean_utility(load_model("news-sft", device="cpu")), 3),
            "runs": [run(labels, seed) for seed in SEEDS for labels in LABELS],
        }
        STORED.write_text(json.dumps(stored, indent=1) + "\n", encoding="utf-8")
    stored = json.loads(STORED.read_text(encoding="utf-8"))
    draw(stored)
    print(table(stored))


if __name__ == "__main__":
    main()
