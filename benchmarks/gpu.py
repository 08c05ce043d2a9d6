"""Measure training and sampling on one GPU, beside TRL and transformers, and write the book's page.

    python benchmarks/gpu.py                                     needs a GPU; five minutes at most
    python benchmarks/gpu.py --device cpu --tiny --out x.json    does it work? on any machine; the figures say nothing
    python benchmarks/gpu.py --page-only                         write the page from gpu.json again

Every part is a process of its own. What fails or takes too long is recorded with the reason, and the rest goes on.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import multiprocessing
import os
import platform
import sys
import tempfile
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_jobs import FULL, PARTS, TINY, Job, work
from policyopt_book.studies import processor

PAGE = Path(__file__).resolve().parent.parent / "book" / "benchmarks-gpu.md"
RAW = Path(__file__).with_suffix(".json")
BUDGET, LIMIT = 300, 75  # seconds: of all parts, and of one
TYPES = "float32 weights under bfloat16 autocast, in training and in sampling"
COLUMNS = {
    "tokens_per_second": ("tokens per second", ",.0f"), "steps_per_second": ("steps per second", ",.0f"),
    "sampling_share": ("sampling, share of the time", ".0%"), "memory_peak": ("peak memory, MiB", ",.0f"),
    "seconds": ("seconds, whole call", ".1f"),
}  # fmt: skip


def measure(job: Job, seconds: float) -> dict[str, Any]:
    """Run :func:`work` in a process of its own, for at most so long."""
    if job.contestant == "TRL" and importlib.util.find_spec("trl") is None:
        return {"skipped": "TRL is not installed"}
    if seconds <= 0:
        return {"skipped": f"the {BUDGET} s for all parts were over"}
    # A fork has all imports done, but may not use CUDA if any of them has asked for it.
    context: Any = multiprocessing.get_context("spawn" if job.device == "cuda" else "forkserver")
    if job.device == "cpu":
        context.set_forkserver_preload(
            ["policyopt.lm", "policyopt.control", "torch._dynamo", "transformers.models.qwen2.modeling_qwen2"]
        )
    here, there = context.Pipe(duplex=False)
    process = context.Process(target=work, args=(job, there))
    process.start()
    there.close()
    try:
        return dict(here.recv()) if here.poll(seconds) else {"skipped": f"not done in {seconds:.0f} s"}
    except EOFError:
        return {"skipped": "the process was killed"}
    finally:
        process.join(3)
        process.kill()
        process.join()


HEAD = """# Speed: on a GPU

% Written by benchmarks/gpu.py (make gpu). Do not edit by hand.

How fast are the trainers on one GPU, with a model of Qwen2.5-0.5B's shape and random weights, beside
[TRL](https://github.com/huggingface/trl) and `transformers.generate`? Both libraries get the same model, batches,
lengths and number of updates. And what does a GPU do for PPO's small networks, while the environment runs on the CPU,
and when it runs on the GPU too?

"""
NOT_YET = """**Not run on a GPU yet**, so there are no figures here. On a machine with an NVIDIA GPU, `make gpu` runs
the tests that need one and then `benchmarks/gpu.py`, which writes the figures into this page. Allow eight minutes, and
the installation of PyTorch the first time.
"""
NOTES = """Tokens are those of prompt and completion of every sequence trained on, or of the completions where nothing
is trained. Seconds are on the wall. *Whole call* includes what comes before the first update: tokenising, and DPO's
reference. *Peak memory* is the most that PyTorch held on the GPU, weights and optimiser included. One run each:
differences of a few per cent mean nothing.
"""
TITLES = {"sft": "SFT", "dpo": "DPO", "grpo": "GRPO", "generation": "Generation", "ppo": "PPO on CartPole",
          "ppo_tensors": "PPO on a CartPole of tensors"}  # fmt: skip


def describe(task: str, s: dict[str, Any]) -> str:
    """Say in one sentence what was run."""
    if task in ("ppo", "ppo_tensors"):
        what = f"{s['num_envs']} environments × {s['rollout_steps']} steps"
    elif task in ("sft", "dpo"):
        what = f"{s['batch']} {'pairs' if task == 'dpo' else 'sequences'} of {s['prompt'] + s['completion']} tokens"
    else:
        what = f"{s['batch']} prompts of {s['prompt']} tokens × {s['group']} completions of {s['completion']}"
    return f"{s['updates']} updates of {what}; the first {s['warm']} are not timed."


def page(results: dict[str, Any] | None) -> str:
    """Write the figures as the book's page (MyST Markdown)."""
    if results is None:
        return HEAD + NOT_YET
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [HEAD + NOTES, f"Types: {results['types']}.", ""]
    lines += [f"Measured on {results['date']} on one {results['device']}. {versions}.", ""]
    for task, runs in results["figures"].items():
        columns = {k: v for k, v in COLUMNS.items() if any(k in row for row in runs.values())}
        heads = " | ".join(name for name, _ in columns.values())
        lines += [f"## {TITLES[task]}", "", describe(task, results["settings"][task]), ""]
        lines += [f"| | {heads} |", "|---|" + "---:|" * len(columns)]
        for contestant, row in runs.items():
            cells = [format(row[k], style) if k in row else "–" for k, (_, style) in columns.items()]
            lines.append(f"| {contestant} | {' | '.join(cells)} |")
        missing = {contestant: row["skipped"] for contestant, row in runs.items() if "skipped" in row}
        lines += ["", *(f"{who}: not measured ({why}).\n" for who, why in missing.items())]
    return "\n".join(lines)


def main() -> None:
    """Measure, save the figures, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--tiny", action="store_true", help="a tiny model, two updates")
    parser.add_argument("--only", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=RAW)
    parser.add_argument("--page-only", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if options.page_only:
        PAGE.write_text(page(json.loads(RAW.read_text()) if RAW.exists() else None))
        return
    if options.out == RAW and (options.device, options.tiny, options.only) != ("cuda", False, list(PARTS)):
        parser.error("the page shows whole runs on a GPU: give --out for any other")
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU; try --device cpu --tiny --out FILE")
    os.environ |= {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
    # With more than one GPU in sight, TRL would take them all.
    os.environ["CUDA_VISIBLE_DEVICES"] = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]
    started, settings = time.monotonic(), TINY if options.tiny else FULL
    figures: dict[str, dict[str, Any]] = {task: {} for task in options.only}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["HF_DATASETS_CACHE"] = folder
        for task in options.only:
            for who in PARTS[task]:
                left = BUDGET - (time.monotonic() - started)
                job = Job(task, who, options.device, settings[task], settings["model"], folder)
                figures[task][who] = measure(job, min(left, LIMIT))
                print(task, who, figures[task][who], flush=True)
    packages = ("policyopt", "torch", "transformers", "trl", "gymnasium")
    installed = {p: importlib.metadata.version(p) for p in packages if importlib.util.find_spec(p)}
    results = {
        "date": datetime.now(UTC).date().isoformat(),
        "device": torch.cuda.get_device_name() if options.device == "cuda" else processor(),
        "versions": {"Python": platform.python_version(), "CUDA": torch.version.cuda} | installed,
        "types": TYPES,
        "settings": settings,
        "seconds": time.monotonic() - started,
        "figures": figures,
    }
    options.out.write_text(json.dumps(results, indent=1) + "\n")
    if options.out == RAW:
        PAGE.write_text(page(results))
    failed = [task for task, runs in figures.items() if "skipped" in next(iter(runs.values()))]
    sys.exit(f"failed: {', '.join(failed)}" if failed else None)


if __name__ == "__main__":
    main()
