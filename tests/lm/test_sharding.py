"""FSDP2: weights spread over two processes (CPU, gloo) learn what one process learns."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lm_runs import SHORT, run_dpo, run_ppo, tiny_model, weights
from safetensors.torch import load_file
from sharded_runs import REFUSED, SETTINGS, main

from policyopt.lm import generate, load
from policyopt.lm.sharding import gathered, sharding_requested

SCRIPT = Path(__file__).with_name("sharded_runs.py")
SAME = list(SETTINGS)
FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*command, str(SCRIPT), str(two), *SAME, *REFUSED],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **FSDP2},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr, done.stderr
    main(one, SAME)
    return one, two


@pytest.mark.parametrize("name", SAME)
def test_sharded_processes_compute_what_one_does(name: str, folders: tuple[Path, Path]) -> None:
    one, two = (load_file(folder / f"{name}.safetensors") for folder in folders)
    assert one.keys() == two.keys()
    assert max(float((one[key] - two[key]).abs().max()) for key in one) < 5e-5
    norms = [json.loads((folder / f"{name}.json").read_text()) for folder in folders]
    assert norms[0] == pytest.approx(norms[1], rel=1e-4)


def test_each_process_holds_its_share_and_the_first_saves_a_plain_model(folders: tuple[Path, Path]) -> None:
    alone, shared = (json.loads((folder / "held.json").read_text()) for folder in folders)
    assert alone["own"] == alone["all"] == shared["all"]
    assert 0.45 < shared["own"] / shared["all"] < 0.55  # 13 rows do not halve
    assert shared["samples"] == alone["samples"]
    assert shared["eval_loss"] == pytest.approx(alone["eval_loss"], rel=1e-5)
    model = load(folders[1] / "saved-model", device="cpu")
    assert generate(model, ["one two"], SHORT)[0] == alone["texts"]
    trained = load_file(folders[1] / "saved.safetensors")
    assert all(torch.equal(p, trained[name]) for name, p in model.model.named_parameters())


def test_one_process_goes_on_with_the_checkpoint_of_two(folders: tuple[Path, Path]) -> None:
    steps: list[int] = []
    result = run_ppo(
        tiny_model(), checkpoint_dir=folders[1] / "after-two-steps", changes={"checkpoint_every": 1},
        callback=lambda row: steps.append(row.update),
    )  # fmt: skip
    assert steps == [3]
    whole = weights(run_ppo(tiny_model()))
    assert max(float((whole[key] - p).abs().max()) for key, p in weights(result).items()) < 5e-5


def test_processes_that_cannot_work_together_say_so(folders: tuple[Path, Path]) -> None:
    for rank in (0, 1):
        uneven, different = ((folders[1] / f"{name}-{rank}.txt").read_text() for name in REFUSED)
        assert "all processes must cut their share into the same number of pieces" in uneven
        assert "the processes hold different weights: load the same model, with the same seed" in different


@pytest.mark.parametrize(
    ("environment", "message"),
    [
        (
            {"FSDP_VERSION": "1"},
            "FSDP of version 1; only version 2 is supported: launch with --fsdp_version 2",
        ),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "--fsdp_offload_params false"),
        ({"ACCELERATE_MIXED_PRECISION": "bf16"}, "set autocast='bfloat16'"),
    ],
)
def test_what_is_not_supported_is_refused(
    environment: dict[str, str], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in {**FSDP2, **environment}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        sharding_requested()


def test_mixed_precision_is_refused_without_fsdp_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "false")
    assert not sharding_requested()
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(
        ValueError, match="must be launched with --mixed_precision no, got 'fp16'; set autocast="
    ):
        sharding_requested()


def test_gathering_a_model_that_is_not_sharded_does_nothing() -> None:
    model = tiny_model()
    with gathered(model.model):
        run_dpo(model, changes={"updates": 1})
