"""Try the language-model half on every causal family of the installed transformers, and write the book's page.

python benchmarks/sweep.py                    all of them: minutes on one core
python benchmarks/sweep.py --only llama mamba --out x.json
python benchmarks/sweep.py --page-only        write the page from sweep.json again
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import platform
import sys
import time
from collections import Counter
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parent.parent
PAGE = REPOSITORY / "book" / "sweep.md"
RAW = Path(__file__).with_suffix(".json")

HEAD = """# What was tried: every causal model of transformers

% Written by benchmarks/sweep.py (make sweep). Do not edit by hand.

Does the sampler draw from the model, and does the scorer score it, whatever the architecture? Every class that
`AutoModelForCausalLM` knows is built in a tiny random form. Completions of prompts of unequal length are sampled with
a cache and scored, with prompts shared and not; the right values are those of the model itself, row by row, without
padding or cache. Then SFT, DPO and GRPO make one step each. What is not right must be refused by name: a class that
computes something else without a word fails the sweep.

"""
MEANING = {
    "right": "sampled, scored and trained; log-probabilities are the model's up to rounding",
    "scores": "scored and trained with SFT and DPO; sampling is refused, because the model with a cache is not the "
    "model without (or it takes no cache)",
    "refused": "refused at the first use",
    "not built": "could not be tried: the tiny configuration does not suit it, or it needs another package",
    "wrong": "computes something else without a word",
}


def page(results: dict[str, Any]) -> str:
    """Write the verdicts as the book's page (MyST Markdown)."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    verdicts = results["verdicts"]
    counts = Counter(verdict["outcome"] for verdict in verdicts)
    lines = [HEAD + f"Run on {results['date']} in {results['seconds']:.0f} s. {versions}.", ""]
    lines += ["| Outcome | Model types | Meaning |", "|---|---:|---|"]
    lines += [f"| {outcome} | {counts[outcome]} | {text} |" for outcome, text in MEANING.items()]
    lines += ["", f"In all {len(verdicts)}. *Difference* is the largest of any log-probability, in nats.", ""]
    for outcome in MEANING:
        rows = [verdict for verdict in verdicts if verdict["outcome"] == outcome]
        if not rows:
            continue
        # The reason names the class; a column more would not fit beside it.
        columns = {"right": ("Class", "Difference"), "scores": ("Difference", "Why")}.get(outcome, ("Why",))
        lines += [f"## {outcome.capitalize()}", "", f"| Model type | {' | '.join(columns)} |"]
        lines += ["|---|" + "".join("---:|" if column == "Difference" else "---|" for column in columns)]
        for row in rows:
            cells = {"Class": row["model"], "Why": f"`{_short(row['why'])}`"}
            if "Difference" in columns:
                cells["Difference"] = f"{row['difference']:.0e}"
            lines.append(f"| {row['name']} | {' | '.join(cells[column] for column in columns)} |")
        lines.append("")
    return "\n".join(lines)


def _short(text: str) -> str:
    text = " ".join(text.replace("`", "'").replace("|", "/").split())
    return text if len(text) <= 160 else text[:159] + "…"


def main() -> None:
    """Try all, save the verdicts, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", help="model types")
    parser.add_argument("--out", type=Path, default=RAW)
    parser.add_argument("--page-only", action="store_true", help="try nothing")
    options = parser.parse_args()
    if options.page_only:
        PAGE.write_text(page(json.loads(RAW.read_text())))
        return
    if options.only and options.out == RAW:
        parser.error("the page shows whole sweeps: give --out for any other")
    sys.path.insert(0, str(REPOSITORY / "tests" / "lm"))
    import torch
    import transformers
    from families import judge, names

    torch.set_num_threads(1)
    transformers.logging.set_verbosity(transformers.logging.CRITICAL)
    transformers.utils.logging.disable_progress_bar()
    started, verdicts = time.monotonic(), []
    for name in options.only or names():
        verdict = judge(name)
        verdicts.append(verdict._asdict())
        print(
            f"{verdict.outcome:10}{verdict.name:36}{verdict.difference or '':<10.3} {verdict.why[:90]}",
            flush=True,
        )
    packages = ("policyopt", "torch", "transformers")
    results = {
        "date": datetime.now(UTC).date().isoformat(),
        "versions": {"Python": platform.python_version()}
        | {p: importlib.metadata.version(p) for p in packages},
        "seconds": time.monotonic() - started,
        "verdicts": verdicts,
    }
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    if options.out == RAW:
        PAGE.write_text(page(results))
    wrong = [verdict["name"] for verdict in verdicts if verdict["outcome"] == "wrong"]
    sys.exit(f"wrong: {', '.join(wrong)}" if wrong else None)


if __name__ == "__main__":
    main()
