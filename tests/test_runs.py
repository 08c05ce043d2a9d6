"""The floor that both halves' runs stand on."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import pytest
import torch

from policyopt.runs import History, Settings, derive_seed, resolve_device


@dataclass(frozen=True, kw_only=True)
class _Example(Settings):
    rate: float = 0.1
    kind: Literal["a", "b"] | None = None
    sizes: tuple[int, ...] = (1,)


@dataclass(frozen=True)
class _Row:
    step: int
    loss: float


@dataclass(frozen=True)
class _Scored:
    step: int
    rewards: dict[str, float]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": math.nan}, "rate must be finite float, got nan"),
        ({"rate": True}, "rate must be finite float, got True"),
        ({"kind": "c"}, "kind must be .*, got 'c'"),
        ({"sizes": [1]}, r"sizes must be tuple\[int, ...\], got \[1\]"),
    ],
)
def test_settings_are_checked_against_their_annotations(changes: dict[str, object], message: str) -> None:
    assert _Example(rate=1, kind="b").kind == "b"
    with pytest.raises(ValueError, match=message):
        _Example(**changes)  # type: ignore[arg-type]


def test_a_history_is_a_list_with_columns() -> None:
    history = History([_Row(1, 0.5), _Row(2, 0.25)])
    assert history.column("loss").tolist() == [0.5, 0.25]
    assert list(history.table()) == ["step", "loss"]
    with pytest.raises(ValueError, match=r"name must be one of \['step', 'loss'\], got 'los'"):
        history.column("los")


def test_dictionaries_of_a_history_become_columns(tmp_path: Path) -> None:
    history = History([_Scored(1, {"right": 0.5, "form": 1.0}), _Scored(2, {"right": 0.75, "form": 0.5})])
    assert list(history.table()) == ["step", "rewards.right", "rewards.form"]
    assert history.table()["rewards.right"].tolist() == [0.5, 0.75]
    history.to_csv(tmp_path / "history.csv")
    assert (tmp_path / "history.csv").read_text().split() == [
        "step,rewards.right,rewards.form",
        "1,0.5,1.0",
        "2,0.75,0.5",
    ]
    assert History[_Scored]().table() == {}


def test_seeds_of_different_paths_differ() -> None:
    seeds = {derive_seed(a, b, c) for a in range(10) for b in range(10) for c in range(10)}
    assert len(seeds) == 1000
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_each_process_takes_the_gpu_of_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert resolve_device("auto") == torch.device("cuda")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert resolve_device("auto") == torch.device("cuda", 3)


def test_a_device_that_is_not_there_is_named() -> None:
    with pytest.raises(
        ValueError, match=r"device must be 'auto' or a device that this machine has.*got 'tpu7'"
    ):
        resolve_device("tpu7")
