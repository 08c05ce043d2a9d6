"""Studies: what is stored is what the scripts would run, and one run of each gives the stored numbers again."""

from __future__ import annotations

import importlib
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from policyopt_book import studies
from policyopt_book.studies import Study, load_study
from repository import ROOT

SCRIPTS = sorted(p.stem for p in (ROOT / "book" / "studies").glob("[a-z]*.py"))


@pytest.fixture(autouse=True)
def on_the_path() -> Iterator[None]:
    folder = str(ROOT / "book" / "studies")
    sys.path.append(folder)
    yield
    sys.path.remove(folder)


def study(name: str) -> Study:
    made: Study = importlib.import_module(name).STUDY
    return made


@pytest.mark.parametrize("name", SCRIPTS)
def test_every_run_of_a_study_is_stored(name: str) -> None:
    script = study(name)
    stored = load_study(name)
    assert script.name == name == stored.name
    jobs = [(run["setting"], run["seed"]) for run in stored.runs]
    wanted = [(dict(setting), seed) for seed in range(script.seeds) for setting in script.settings]
    assert [job for job in wanted if job not in jobs] == []
    assert [job for job in jobs if job not in wanted] == []
    assert len(jobs) == len(wanted)


def test_no_results_without_a_script() -> None:
    assert {p.stem for p in studies.FOLDER.glob("*.json")} == set(SCRIPTS)


@pytest.mark.sweep
@pytest.mark.parametrize("name", SCRIPTS)
def test_one_run_gives_the_stored_numbers_again(name: str) -> None:
    script = study(name)
    if script.minutes:
        pytest.skip(f"minutes: python book/studies/{name}.py --check")
    assert script.check() == []


def throw(*, seed: int, sides: int) -> dict[str, Any]:
    """One throw of a die, a curve with a gap, and a number that is not reached."""
    value = float(np.random.default_rng(seed).integers(1, sides + 1))
    return {"value": value, "curve": [math.nan, value], "never": None, "seconds": 1.0}


@pytest.fixture
def die(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Study:
    monkeypatch.setattr(studies, "FOLDER", tmp_path)
    return Study("die", throw, [{"sides": 6}, {"sides": 20}], seeds=3)


def test_runs_are_stored_and_only_missing_ones_are_made(die: Study, tmp_path: Path) -> None:
    replace(die, seeds=2).main(["--workers", "1"])
    first = load_study("die")
    assert first.seeds == 2
    kept = first.runs[0]["result"]["value"]
    text = (tmp_path / "die.json").read_text()
    (tmp_path / "die.json").write_text(text.replace(f'"value": {kept}', '"value": 99.0'))
    die.main(["--workers", "1"])
    stored = load_study("die")
    assert stored.seeds == 3
    assert stored.values("value", sides=6)[0] == 99.0  # not run again
    wanted = [throw(seed=seed, sides=20)["value"] for seed in range(3)]
    assert stored.values("value", sides=20).tolist() == wanted
    assert stored.values("curve", sides=20).shape == (3, 2)
    assert np.isnan(stored.values("never", sides=20)).all()
    assert [line[:11] for line in die.check()] == ["value: 6.0 "]
    text = (tmp_path / "die.json").read_text()
    (tmp_path / "die.json").write_text(text.replace('"date": "', '"date": "before '))
    die.main(["--again", "--workers", "1"])
    assert die.check() == []
    again = load_study("die")
    assert len(again.made) == 1
    assert "before" not in again.made[0]["date"]
    assert "2 settings, 3 seeds each" in repr(again)
    assert max(map(len, repr(again).splitlines())) <= 78


def test_what_breaks_off_while_all_is_made_again_loses_no_run(die: Study) -> None:
    die.main(["--workers", "1"])
    with pytest.raises(RuntimeError, match="broke off"):
        replace(die, run=breaks_off).main(["--again", "--workers", "1"])
    assert len(load_study("die").runs) == 6


def breaks_off(*, seed: int, sides: int) -> dict[str, Any]:
    """A run that ends in an error from the second seed on."""
    if seed:
        raise RuntimeError("broke off")
    return throw(seed=seed, sides=sides)


def test_another_processor_may_round_otherwise_but_not_leave_the_range(die: Study, tmp_path: Path) -> None:
    die.main(["--workers", "1"])
    path = tmp_path / "die.json"
    path.write_text(path.read_text().replace('"processor": "', '"processor": "Another '))
    assert die.check() == []
    assert [line[:15] for line in replace(die, run=far).check()] == ["value: 40.0 now"]


def far(*, seed: int, sides: int) -> dict[str, Any]:
    """A run that went wrong."""
    return {**throw(seed=seed, sides=sides), "value": 40.0}


def test_a_setting_must_be_named(die: Study) -> None:
    die.main(["--workers", "1"])
    with pytest.raises(ValueError, match=r"one setting of die must fit \{\}, got .*choose by its keys"):
        load_study("die").values("value")
    with pytest.raises(ValueError, match=r"name must be one of \['die'\], got 'dice'; run make studies"):
        load_study("dice")
