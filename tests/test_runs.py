"""The floor that both halves' runs stand on."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import ClassVar, Literal

import numpy as np
import pytest
import torch

from policyopt.runs import (
    Count,
    History,
    Positive,
    Settings,
    Share,
    check_seed,
    derive_seed,
    resolve_device,
)


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


@dataclass(frozen=True, kw_only=True)
class _Bounded(Settings):
    renamed: ClassVar[dict[str, str]] = {"size": "count"}
    elsewhere: ClassVar[dict[str, str]] = {"speed": "rate of the other config"}
    count: Count = 1
    most: Positive | None = None
    share: Share = 0.5


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"count": 0}, "count must be >= 1, got 0"),
        ({"count": 1.5}, "count must be int, got 1.5"),
        ({"most": 0.0}, "most must be > 0 or None, got 0.0"),
        ({"most": "1"}, r"most must be finite float \| None, got '1'"),
        ({"share": 1.1}, r"share must be in \[0, 1\], got 1.1"),
    ],
)
def test_bounds_in_annotations_are_checked(changes: dict[str, object], message: str) -> None:
    assert _Bounded(most=1, share=1).share == 1
    with pytest.raises(ValueError, match=message):
        _Bounded(**changes)  # type: ignore[arg-type]


def test_names_of_the_last_version_work_and_warn() -> None:
    with pytest.warns(DeprecationWarning, match="_Bounded: size is called count now"):
        config = _Bounded(size=3)  # type: ignore[call-arg]
    assert config.count == 3
    with pytest.warns(DeprecationWarning, match="size is called count now"):
        assert config.size == 3
    assert replace(config, count=4).count == 4


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cuont", "_Bounded has no field 'cuont'; did you mean count"),
        ("speed", "_Bounded has no field 'speed'; did you mean rate of the other config"),
        ("zzz", "_Bounded has no field 'zzz'$"),
    ],
)
def test_an_unknown_field_is_refused_with_a_hint(name: str, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        _Bounded(**{name: 1})
    with pytest.raises(AttributeError, match=name):
        getattr(_Bounded(), name)


@pytest.mark.parametrize("seed", [3, np.int64(3)])
def test_seeds_are_integers_of_any_kind(seed: object) -> None:
    assert check_seed(seed) == 3


@pytest.mark.parametrize("seed", [True, -1, 1.0, "1", None])
def test_what_is_no_seed_is_refused(seed: object) -> None:
    with pytest.raises(ValueError, match="seed must be an integer >= 0, got"):
        check_seed(seed)


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


def test_a_table_has_all_keys_that_some_row_has() -> None:
    @dataclass
    class Scores:
        update: int
        rewards: dict[str, float]

    history = History([Scores(1, {"old": 1.0}), Scores(2, {"new": 2.0})])
    table = history.table()
    assert [*table] == ["update", "rewards.old", "rewards.new"]
    np.testing.assert_array_equal(table["rewards.old"], [1.0, np.nan])
    np.testing.assert_array_equal(table["rewards.new"], [np.nan, 2.0])
