"""Checkpoints: what goes in comes out, and a failure on the way leaves the old one whole."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from policyopt import checkpoint
from policyopt.checkpoint import load_checkpoint, save_checkpoint

TENSORS = {
    "weights": torch.randn(3, 2, generator=torch.Generator().manual_seed(0)),
    "count": torch.tensor(7, dtype=torch.int64),
    "empty": torch.empty(0, 4, dtype=torch.float64),
    "flags": torch.tensor([True, False]),
}
METADATA: dict[str, Any] = {"name": "π", "nested": {"rate": 0.1, "none": None, "list": [1, 2]}}


def files(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_round_trip(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path / "a" / "b", TENSORS, METADATA)
    tensors, metadata = load_checkpoint(folder)
    assert metadata == METADATA
    assert tensors.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert tensors[name].dtype == tensor.dtype
        assert torch.equal(tensors[name], tensor)


def test_views_of_one_vector_and_gradients_can_be_saved(tmp_path: Path) -> None:
    whole = torch.arange(6.0, requires_grad=True)
    save_checkpoint(tmp_path, {"whole": whole, "view": whole[:3], "transposed": whole.view(2, 3).T}, {})
    tensors, _ = load_checkpoint(tmp_path)
    assert torch.equal(tensors["transposed"], whole.detach().view(2, 3).T)


def test_saving_again_replaces_and_leaves_nothing_behind(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, TENSORS, METADATA)
    save_checkpoint(tmp_path, {"x": torch.ones(1)}, {"second": True})
    tensors, metadata = load_checkpoint(tmp_path)
    assert metadata == {"second": True}
    assert list(tensors) == ["x"]
    assert len(files(tmp_path)) == 2


def test_no_pickle(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, TENSORS, METADATA)
    state, tensors = files(tmp_path)
    assert (state, tensors.rpartition(".")[2]) == ("state.json", "safetensors")
    json.loads((tmp_path / state).read_text())
    header = (tmp_path / tensors).read_bytes()
    assert not header.startswith((b"\x80", b"PK"))  # pickle, and the zip archive that torch.save makes
    json.loads(header[8 : 8 + int.from_bytes(header[:8], "little")])


@pytest.mark.parametrize("moment", ["tensors", "sync", "state"])
@pytest.mark.parametrize("error", [OSError("disk full"), KeyboardInterrupt()])
def test_a_failure_in_the_middle_keeps_the_old_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str, error: BaseException
) -> None:
    save_checkpoint(tmp_path, TENSORS, METADATA)
    before = files(tmp_path)

    def fail(*_: object, **__: object) -> None:
        raise error

    def half_written(_: object, path: Path) -> None:
        path.write_bytes(b"half")
        raise error

    with monkeypatch.context() as patch:
        if moment == "tensors":
            patch.setattr(checkpoint, "save_file", half_written)
        elif moment == "sync":
            patch.setattr(checkpoint, "_fsync", fail)
        else:
            patch.setattr(Path, "replace", fail)
        with pytest.raises(type(error)):
            save_checkpoint(tmp_path, {"x": torch.ones(1)}, {"second": True})
    assert files(tmp_path) == before
    tensors, metadata = load_checkpoint(tmp_path)
    assert metadata == METADATA
    assert torch.equal(tensors["weights"], TENSORS["weights"])


def test_a_crash_before_the_old_tensors_are_removed_is_harmless(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_checkpoint(tmp_path, TENSORS, METADATA)

    def killed(*_: object, **__: object) -> None:
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", killed)
        with pytest.raises(SystemExit):
            save_checkpoint(tmp_path, {"x": torch.ones(1)}, {"second": True})
    assert load_checkpoint(tmp_path)[1] == {"second": True}


def test_metadata_that_is_not_json_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="not JSON serializable"):
        save_checkpoint(tmp_path, TENSORS, {"policy": object()})
    assert files(tmp_path) == []


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no checkpoint: state\.json is missing"):
        load_checkpoint(tmp_path / "nowhere")


def test_a_checkpoint_cannot_reach_out_of_its_folder(tmp_path: Path) -> None:
    outside = tmp_path / "outside.safetensors"
    outside.write_bytes(b"precious")
    folder = save_checkpoint(tmp_path / "inside", TENSORS, METADATA)
    state = folder / "state.json"
    state.write_text(json.dumps({"tensors": "../outside.safetensors", "metadata": {}}))
    with pytest.raises(FileNotFoundError):
        load_checkpoint(folder)
    save_checkpoint(folder, TENSORS, METADATA)
    assert outside.read_bytes() == b"precious"
