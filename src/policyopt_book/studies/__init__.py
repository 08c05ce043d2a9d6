"""Studies: what takes longer than a chapter may, computed once and stored.

A study is a script of the folder ``book/studies``. It says what one run is, and which
settings and seeds are run. The results are the ``.json`` files beside this module, so
that a chapter can draw from them wherever it runs::

    race = load_study("control_race")
    race.values("last", method="PPO", factor=1.0)  # one number per seed

``make studies`` runs what is missing.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import textwrap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from importlib import metadata
from multiprocessing import get_context
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from policyopt._checks import require

__all__ = ["Study", "StudyResults", "load_study", "processor"]

Setting: TypeAlias = Mapping[str, Any]
Result: TypeAlias = Mapping[str, Any]

FOLDER = Path(__file__).parent
_PACKAGES = ("policyopt", "torch", "numpy", "gymnasium", "transformers")


@dataclass(frozen=True)
class StudyResults:
    """The stored runs of a study."""

    name: str
    made: Sequence[Mapping[str, str]]
    """Date, processor and versions of each time the study was run."""
    runs: Sequence[Mapping[str, Any]]
    """Each with its ``setting``, ``seed``, ``result``, and the index of ``made``."""

    @property
    def settings(self) -> list[Setting]:
        """The settings, in the order in which they were first run."""
        unique: list[Setting] = []
        for run in self.runs:
            if run["setting"] not in unique:
                unique.append(run["setting"])
        return unique

    @property
    def seeds(self) -> int:
        """The number of seeds that every setting has."""
        counts = [len(list(self._select(setting))) for setting in self.settings]
        return min(counts, default=0)

    def _select(self, setting: Setting) -> Iterator[Mapping[str, Any]]:
        for run in self.runs:
            if all(run["setting"].get(key) == value for key, value in setting.items()):
                yield run

    def values(self, result: str, **setting: Any) -> NDArray[np.float64]:
        """Return one number or curve per seed, in the order of the seeds.

        Parameters
        ----------
        result : str
            What the runs measured.
        **setting
            What names one setting; what all settings share may be left out.

        Raises
        ------
        ValueError
            If no setting fits, or several do.
        """
        runs = sorted(self._select(setting), key=lambda run: int(run["seed"]))
        fitting = {json.dumps(run["setting"], sort_keys=True) for run in runs}
        rule = f"one setting of {self.name} must fit {setting}"
        require(len(fitting) == 1, rule, sorted(fitting), "choose by its keys")
        return np.stack([_numbers(run["result"][result]) for run in runs])

    def __repr__(self) -> str:
        """Say what was run, when and with what."""
        last = dict(self.made[-1])
        date, processor = last.pop("date"), last.pop("processor")
        versions = ", ".join(f"{name} {version}" for name, version in last.items())
        seeds = f"{self.seeds} seeds each" if self.seeds > 1 else "seed 0"
        return textwrap.fill(
            f"{self.name}: {len(self.settings)} settings, {seeds}; "
            f"{date}, {processor}, {versions}",
            78,
        )


def load_study(name: str) -> StudyResults:
    """Load the stored results of a study.

    Raises
    ------
    ValueError
        If there is no study of this name.
    """
    path = FOLDER / f"{name}.json"
    known = sorted(file.stem for file in FOLDER.glob("*.json"))
    require(path.exists(), f"name must be one of {known}", name, "run make studies")
    return StudyResults(name, **json.loads(path.read_text(encoding="utf-8")))


@dataclass(frozen=True)
class Study:
    """What is run: ``run(seed=seed, **setting)`` for each setting and seed.

    Parameters
    ----------
    name : str
        Of the script and of the file of results.
    run : callable
        A function of the script's top level. It returns numbers, or lists of numbers,
        by name; None is a number that was not reached.
    settings : sequence of mapping
        The keywords of ``run``: strings, numbers and booleans.
    seeds : int
        Seeds 0, 1, 2, … of each setting.
    sample : mapping, optional
        The setting that :meth:`check` runs again, a quick one; by default the first.
    minutes : bool
        Whether one run takes minutes: then no test makes it again, only ``--check``.
    """

    name: str
    run: Callable[..., Result]
    settings: Sequence[Setting]
    seeds: int
    sample: Setting | None = None
    minutes: bool = False

    def check(self, seed: int = 0) -> list[str]:
        """Run one seed again, and return what differs from what is stored.

        With the versions and the processor of the stored run it must be equal. On
        another processor sums are rounded otherwise, and training amplifies that: there
        a number must lie where those of the other seeds lie, within their range.
        """
        stored = load_study(self.name)
        setting = dict(self.sample or self.settings[0])
        again = _one_thread(self.run, seed, setting)
        runs = [run for run in stored.runs if run["setting"] == setting]
        run = next(run for run in runs if run["seed"] == seed)
        made, here = dict(stored.made[run["made"]]), _circumstances()
        same = {**made, "date": ""} == {**here, "date": ""}
        wrong = []
        for key, value in run["result"].items():
            if "seconds" in key:
                continue
            found, wanted = _numbers(again[key]), _numbers(value)
            if same:
                fits = np.allclose(found, wanted, rtol=1e-5, equal_nan=True)
            else:
                others = np.stack([_numbers(other["result"][key]) for other in runs])
                low = np.where(np.isnan(others), np.inf, others).min(0)
                high = np.where(np.isnan(others), -np.inf, others).max(0)
                room = np.max(high - low, initial=0.0, where=high >= low) + 1e-6
                inside = (found >= low - room) & (found <= high + room)
                fits = bool(np.all(inside | np.isnan(found)))
            if not fits:
                wrong.append(f"{key}: {found} now, {wanted} stored")
        return wrong

    def main(self, arguments: Sequence[str] | None = None) -> None:
        """Run what is missing, and store each run as it ends."""
        parser = argparse.ArgumentParser(description=f"Run the study {self.name}.")
        parser.add_argument("--workers", type=int, default=os.cpu_count())
        parser.add_argument("--again", action="store_true", help="run all of it again")
        parser.add_argument("--check", action="store_true", help="run one seed again")
        options = parser.parse_args(arguments)
        if options.check:
            if wrong := self.check():
                raise SystemExit(f"{self.name}: " + "; ".join(wrong))
            return
        path = FOLDER / f"{self.name}.json"
        jobs = [(dict(x), seed) for seed in range(self.seeds) for x in self.settings]
        place = {_key(setting, seed): i for i, (setting, seed) in enumerate(jobs)}
        made: list[Any] = []
        runs: dict[int, Any] = {}  # by their place; those that went are left out
        if path.exists():
            stored = json.loads(path.read_text(encoding="utf-8"))
            made = stored["made"]
            kept = {_key(run["setting"], run["seed"]): run for run in stored["runs"]}
            runs = {place[key]: run for key, run in kept.items() if key in place}
        now = _circumstances()
        if made[-1:] != [now]:
            made.append(now)
        missing = [i for i in range(len(jobs)) if options.again or i not in runs]
        start = time.perf_counter()
        with ProcessPoolExecutor(options.workers, get_context("spawn")) as pool:
            futures = {}
            for i in missing:
                setting, seed = jobs[i]
                futures[pool.submit(_one_thread, self.run, seed, setting)] = i
            for count, future in enumerate(as_completed(futures), 1):
                setting, seed = jobs[futures[future]]
                run = {"setting": setting, "seed": seed, "result": future.result()}
                runs[futures[future]] = {**run, "made": len(made) - 1}
                _write(path, made, [runs[i] for i in sorted(runs)])
                seconds = time.perf_counter() - start
                print(f"{self.name}: {count} of {len(missing)}, {seconds:.0f} s")


def _key(setting: Setting, seed: int) -> str:
    return json.dumps([setting, seed], sort_keys=True)


def _one_thread(
    run: Callable[..., Result], seed: int, setting: Setting
) -> dict[str, Any]:
    import torch

    torch.set_num_threads(1)  # as many runs as cores, side by side
    return {key: _short(value) for key, value in run(seed=seed, **setting).items()}


def _numbers(value: Any) -> NDArray[np.float64]:
    """Read a number or curve back; what was not reached, null, is NaN."""
    return np.array(value, dtype=np.float64)  # None becomes NaN


def _short(value: Any) -> Any:
    """Keep six digits; NaN and infinity become null."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return [_short(entry) for entry in value]
    if value is None or isinstance(value, int):
        return value
    return float(f"{value:.6g}") if np.isfinite(value) else None


def processor() -> str:
    """Name the processor, without naming the machine."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _circumstances() -> dict[str, str]:
    made = {"date": time.strftime("%Y-%m-%d"), "processor": processor()}
    made["python"] = platform.python_version()
    for package in _PACKAGES:
        try:
            made[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return made


def _write(path: Path, made: Sequence[Any], runs: Sequence[Any]) -> None:
    """Replace the file in one step, one run a line."""
    used = sorted({run["made"] for run in runs})
    rows = [{**run, "made": used.index(run["made"])} for run in runs]
    lines = ",\n".join(json.dumps(row) for row in rows)
    heads = json.dumps([made[i] for i in used], indent=1)
    text = f'{{"made": {heads},\n"runs": [\n{lines}\n]}}\n'
    draft = path.with_suffix(".tmp")
    draft.write_text(text, encoding="utf-8")
    draft.replace(path)
