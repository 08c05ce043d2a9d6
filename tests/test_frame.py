"""The frame of a run, apart from both halves."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor

from policyopt.frame import Frame, Row, Statistics, read_run
from policyopt.runs import Count, Settings, TrainingDivergedError


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    total: Count = 5
    rate: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Update(Row):
    may_be_nan: ClassVar[tuple[str, ...]] = ("sometimes",)
    loss: float
    sometimes: float = math.nan


class Counter(Frame[Config, Update]):
    """Adds 1 to a number in each update."""

    unit = "turn"
    remedy = "counting slowly"
    may_change = ("total",)

    def __init__(self, config: Config = Config(), **options: Any) -> None:
        defaults: dict[str, Any] = {
            "seed": 0,
            "callback": None,
            "progress": False,
            "checkpoint_dir": None,
            "checkpoint_every": 2,
        }
        super().__init__("counting", "sheep", config, Update, **{**defaults, **options})
        self.number, self.events = 0, list[str]()

    @property
    def position(self) -> tuple[int, int]:
        return self.number, self.config.total

    def result(self) -> int:
        return self.number

    def _common(self, **fields: Any) -> dict[str, Any]:
        return fields

    def _identity(self) -> dict[str, Any]:
        return {"animal": "sheep"}

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        return {"number": torch.tensor(self.number)}, {}

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        self.number = int(tensors["number"])

    def _saved(self) -> None:
        self.events.append(f"saved {self.update}")

    def _leave(self, error: BaseException | None) -> None:
        self.events.append("left")

    def train(self, loss: float = 0.0, **fields: Any) -> Counter:
        with self:
            for _ in self.updates():
                self.number += 1
                self.log(loss=loss, **fields)
        return self


# --- Statistics ---


def test_statistics_have_names() -> None:
    seen = Statistics()
    for k in range(3):
        seen.add(loss=torch.tensor(float(k), requires_grad=True), norm=torch.tensor(10.0 * k))
    assert seen["norm"].tolist() == [0, 10, 20]
    assert not seen["loss"].requires_grad
    assert seen.means() == {"loss": 1.0, "norm": 10.0}
    assert seen.means("norm") == {"norm": 10.0}
    with pytest.raises(KeyError):
        seen.means("ratio")
    with pytest.raises(KeyError):
        seen["ratio"]


# --- Recording ---


@pytest.mark.parametrize(
    ("fields", "bad"),
    [
        ({"loss": math.nan}, "loss"),
        ({"loss": -math.inf}, "loss"),
        ({"loss": 0.0, "sometimes": math.inf}, "sometimes"),
        ({"loss": 0.0, "sometimes": math.nan}, None),
    ],
)
def test_what_counts_as_diverged(fields: dict[str, float], bad: str | None) -> None:
    """A field may be NaN where it was not measured; nothing may be infinite."""
    if bad is None:
        assert len(Counter().train(**fields).history) == 5
        return
    with pytest.raises(TrainingDivergedError, match=rf"^{bad} not finite in update 1 .*Try counting slowly"):
        Counter().train(**fields)


# --- Checkpoints ---


def test_after_a_checkpoint_that_is_not_the_last_a_half_may_act(tmp_path: Path) -> None:
    run = Counter(checkpoint_dir=tmp_path).train()
    assert run.events == ["saved 2", "saved 4", "left"]
    assert Counter().train().events == ["left"]
    assert Counter(Config(total=4), checkpoint_dir=tmp_path / "even").train().events == ["saved 2", "left"]


def test_a_checkpoint_holds_the_whole_config_and_may_change_part_of_it(tmp_path: Path) -> None:
    Counter(checkpoint_dir=tmp_path).train()
    _, metadata = read_run(tmp_path)
    assert metadata["identity"] == {
        "algorithm": "counting",
        "seed": 0,
        "animal": "sheep",
        "config": {"total": 5, "rate": 1.0},
    }
    longer = Counter(Config(total=8), checkpoint_dir=tmp_path).train()
    assert [row.update for row in longer.history] == list(range(1, 9))
    with pytest.raises(
        ValueError, match=r"holds a run with rate 1\.0, this one has 2\.0; give another folder"
    ):
        Counter(Config(rate=2.0), checkpoint_dir=tmp_path).train()


def test_what_cannot_be_restored_is_refused_with_the_reason(tmp_path: Path) -> None:
    Counter(checkpoint_dir=tmp_path).train()

    class Picky(Counter):
        def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
            raise KeyError("wool")

    run = Picky(checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match="does not fit this run: 'wool'"):
        run.train()
    assert run.events == ["left"]


def test_a_run_that_its_callback_stops_leaves_a_checkpoint(tmp_path: Path) -> None:
    for stop in (3, 4):  # between two checkpoints, and at one
        folder = tmp_path / str(stop)
        stopped = Counter(callback=lambda row, stop=stop: row.update == stop, checkpoint_dir=folder).train()
        assert stopped.stop_reason == "callback"
        longer = Counter(checkpoint_dir=folder)
        with longer:
            assert (longer.number, longer.update) == (stop, stop)


def test_no_checkpoint_is_promised_where_there_is_none(tmp_path: Path) -> None:
    def breaks(row: Any) -> bool:
        raise KeyError("lost")

    for every, there in ((2, False), (1, True)):
        with pytest.raises(KeyError) as caught:
            Counter(callback=breaks, checkpoint_dir=tmp_path / str(every), checkpoint_every=every).train()
        assert ("last checkpoint is in" in caught.value.__notes__[0]) == there


def test_a_folder_that_cannot_be_is_noticed_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    run = Counter(checkpoint_dir=tmp_path / "file")
    with pytest.raises(FileExistsError, match="file"):
        run.train()
    assert run.number == 0
