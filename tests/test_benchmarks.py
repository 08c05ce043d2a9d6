"""The benchmarks' pages say what their figures say, and the benchmark for a GPU runs without one."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

REPOSITORY = Path(__file__).resolve().parent.parent
FOLDER = REPOSITORY / "benchmarks"
PAGES = {
    "control": "benchmarks.md",
    "lm": "benchmarks-lm.md",
    "gpu": "benchmarks-gpu.md",
    "sweep": "sweep.md",
}
NAMES = ("control", "lm", "gpu", "gpu_jobs", "sweep")


def script(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Run a script of the folder up to its main(), with its neighbours importable for that long."""
    monkeypatch.syspath_prepend(FOLDER)
    try:
        return runpy.run_path(str(FOLDER / f"{name}.py"))
    finally:
        for neighbour in NAMES:
            sys.modules.pop(neighbour, None)


@pytest.mark.parametrize("name", PAGES)
def test_the_page_shows_the_figures(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    raw = FOLDER / f"{name}.json"
    results = json.loads(raw.read_text()) if raw.exists() else None
    assert results is not None or name == "gpu"
    assert script(name, monkeypatch)["page"](results) == (REPOSITORY / "book" / PAGES[name]).read_text()


def test_a_page_without_figures_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    text = script("gpu", monkeypatch)["page"](None)
    assert "Not run on a GPU yet" in text
    assert "make gpu" in text
    assert "|" not in text


def test_the_gpu_benchmark_on_the_cpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "figures.json"
    command = [sys.executable, str(FOLDER / "gpu.py"), "--device", "cpu", "--tiny", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr + done.stdout
    results = json.loads(out.read_text())
    assert {"Python", "CUDA", "policyopt", "torch", "transformers", "gymnasium"} <= results["versions"].keys()
    assert "bfloat16" in results["types"]
    assert results["settings"]["model"]["model_type"] == "qwen2"
    figures = results["figures"]
    assert list(figures) == ["sft", "dpo", "grpo", "generation", "ppo", "ppo_tensors"]
    tasks = ("generation", "ppo", "ppo_tensors")  # without TRL
    for task, runs in figures.items():
        peer = runs.pop("TRL", {})
        # It is compared where it is installed, and never in the way.
        assert "skipped" in peer or peer.get("tokens_per_second", 0) > 0 or task in tasks
        assert len(runs) == (1 if task in ("sft", "dpo", "grpo") else 2)
        for row in runs.values():
            assert row["steps_per_second" if "ppo" in task else "tokens_per_second"] > 0
            assert row["seconds"] > 0
            assert "ppo" in task or row["memory_peak"] > 0
    assert 0 < figures["grpo"]["policyopt"]["sampling_share"] < 1
    figures["sft"]["TRL"] = {"skipped": "TRL is not installed"}
    text = script("gpu", monkeypatch)["page"](results)
    assert "TRL: not measured (TRL is not installed)." in text
    assert f"| policyopt | {figures['sft']['policyopt']['tokens_per_second']:,.0f} |" in text


@pytest.mark.parametrize("arguments", [["--device", "cpu"], ["--tiny"], ["--only", "sft"]])
def test_the_page_is_for_whole_runs_on_a_gpu(arguments: list[str]) -> None:
    command = [sys.executable, str(FOLDER / "gpu.py"), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert "give --out for any other" in done.stderr
