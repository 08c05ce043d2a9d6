"""What is written comes back, and is whole or not there: drawn contents, and processes killed at drawn moments."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from lm_runs import tiny_model

from policyopt.checkpoint import load_checkpoint, rows_from_json, rows_to_json, save_checkpoint
from policyopt.lm import LanguageModel, LoRA, RewardModel, add_lora, completion_log_probs, load
from policyopt.lm.sequences import Sequences
from policyopt.runs import History

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own

TEXTS = st.text(max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.floats(allow_nan=False, allow_infinity=False) | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=8,
)  # fmt: skip
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]


@st.composite
def tensors(draw: st.DrawFn) -> torch.Tensor:
    """Of any type and shape; some are views of others, in other orders, or the same number again and again."""
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    tensor = (100 * torch.randn(shape, generator=generator)).to(draw(st.sampled_from(DTYPES)))
    change = draw(st.sampled_from(["nothing", "transpose", "slice", "expand", "gradient"]))
    if change == "transpose":
        return tensor.mT if tensor.ndim >= 2 else tensor
    if change == "slice" and tensor.ndim and len(tensor):
        return tensor[1:]
    if change == "gradient" and tensor.is_floating_point():
        return tensor.requires_grad_()
    return tensor.expand(2, *shape) if change == "expand" else tensor


NAMES = st.text("abcπ.é ", min_size=1, max_size=5)


@given(st.dictionaries(NAMES, tensors(), max_size=4), st.dictionaries(TEXTS, JSON, max_size=4))
def test_any_checkpoint_comes_back(content: dict[str, torch.Tensor], metadata: dict[str, Any]) -> None:
    with tempfile.TemporaryDirectory() as name:
        folder = save_checkpoint(Path(name, "a π"), content, metadata)
        (folder / "state.json").read_bytes().decode("utf-8")
        got, said = load_checkpoint(folder)
    assert json.dumps(said) == json.dumps(metadata)
    assert got.keys() == content.keys()
    for key, tensor in content.items():
        assert got[key].dtype == tensor.dtype
        assert got[key].shape == tensor.shape
        assert torch.equal(got[key], tensor.detach())


@dataclass(frozen=True)
class Written:
    number: float
    parts: dict[str, float]


@given(
    parts=st.lists(TEXTS, unique=True, max_size=3),
    rows=st.lists(st.floats(width=32, allow_infinity=False), min_size=1, max_size=3),
)
def test_any_history_comes_back(parts: list[str], rows: list[float]) -> None:
    """Names of reward functions are whatever their author chose."""
    history = History([Written(number, dict.fromkeys(parts, number)) for number in rows])
    with tempfile.TemporaryDirectory() as name:
        history.to_csv(Path(name, "history.csv"))
        text = Path(name, "history.csv").read_bytes().decode("utf-8")
    header, *lines = csv.reader(io.StringIO(text, newline=""))
    assert header == ["number", *(f"parts.{part}" for part in parts)]
    read = [[float(cell) for cell in line] for line in lines]
    assert str(read) == str([[number] * (1 + len(parts)) for number in rows])
    again = rows_from_json(lambda number, parts: number, json.loads(json.dumps(rows_to_json(history))))
    assert str(again) == str(rows)
    assert all(math.isnan(a) == math.isnan(b) for a, b in zip(again, rows, strict=True))


# --- killed at a drawn moment ---

_EVENTS = {"open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "shutil.rmtree"}


def run_and_kill(work: Callable[[], Any], folder: Path, moment: int) -> bool:
    """Do it in a process that dies before the ``moment``-th thing it does to files in a folder. Whether it did."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore", DeprecationWarning
        )  # Python 3.12 and later: other threads are not copied
        child = os.fork()
    if child:
        return bool(os.waitpid(child, 0)[1])
    left = moment

    def die(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal left
        if event in _EVENTS and str(folder) in str(arguments):
            left -= 1
            if left < 0:
                os._exit(9)

    code = 1
    try:
        sys.addaudithook(die)
        work()
        code = 0
    finally:
        os._exit(code)


forks = pytest.mark.skipif(sys.platform != "linux", reason="forks a process that has threads")


@forks
@given(moment=st.integers(0, 12))
def test_a_checkpoint_of_a_process_that_dies_is_the_old_or_the_new_one(moment: int) -> None:
    old, new = {"x": torch.zeros(3)}, {"x": torch.ones(4), "y": torch.ones(2)}
    with tempfile.TemporaryDirectory() as name:
        folder = save_checkpoint(Path(name, "run"), old, {"number": 0})
        died = run_and_kill(lambda: save_checkpoint(folder, new, {"number": 1}), folder, moment)
        tensors, metadata = load_checkpoint(folder)
        assert metadata["number"] in ((0, 1) if died else (1,))
        expected = new if metadata["number"] else old
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[key], tensor) for key, tensor in expected.items())
        # The next one works as if nothing had happened.
        save_checkpoint(folder, old, {"number": 2})
        assert load_checkpoint(folder)[1] == {"number": 2}


@pytest.fixture(scope="module")
def models() -> tuple[LanguageModel, LanguageModel]:
    old, new = tiny_model(), tiny_model(seed=1)
    new.model.config.chat_template_kwargs = {"new": "π"}
    return old, new


def state(model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.model.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@forks
@settings(max_examples=10, phases=[Phase.generate])
@given(moment=st.integers(0, 40))
def test_a_model_of_a_process_that_dies_is_the_old_or_the_new_one(
    moment: int, models: tuple[LanguageModel, LanguageModel]
) -> None:
    """Or, between two renamings, the old one is beside the folder and nothing is in its place."""
    old, new = models
    with tempfile.TemporaryDirectory() as name:
        folder = old.save(Path(name, "model"))
        before = {path.name: path.read_bytes() for path in folder.iterdir()}
        died = run_and_kill(lambda: new.save(folder), Path(name), moment)
        if not folder.exists():
            assert died
            (folder,) = Path(name).glob(".model.*/old")
        loaded = load(folder, device="cpu")
        assert same(state(loaded), state(new)) or (died and same(state(loaded), state(old)))
        assert loaded.chat_template_kwargs == ({"new": "π"} if same(state(loaded), state(new)) else {})
        if same(state(loaded), state(old)):
            assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# --- models that come back ---

TARGETS: list[Any] = ["all-linear", ("q_proj", "lm_head"), ("up_proj",)]


@settings(max_examples=12, phases=[Phase.generate])
@given(
    tied=st.booleans(),
    adapters=st.none() | st.tuples(st.integers(1, 4), st.sampled_from(TARGETS)),
    dtype=st.sampled_from(["float32", "bfloat16", "float16"]),
    chat=st.dictionaries(st.text("abcé", min_size=1, max_size=5), JSON, max_size=2),
    judges=st.booleans(),
    name=st.text("aπ é-.", min_size=1, max_size=4).filter(lambda text: text.strip(". ") == text),
)  # fmt: skip
def test_any_model_comes_back(
    tied: bool, adapters: Any, dtype: Any, chat: dict[str, Any], judges: bool, name: str
) -> None:
    """Weights, adapters, reward head and settings of the chat template; in folders with any name."""
    with tempfile.TemporaryDirectory() as parent:
        base = tiny_model(tie_word_embeddings=tied).save(Path(parent, f"base {name}"))
        model = load(base, device="cpu", dtype=dtype)
        if adapters is not None:
            model = add_lora(model, LoRA(rank=adapters[0], target_modules=adapters[1]))
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for parameter in model.model.parameters():
                if parameter.requires_grad:
                    parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if chat:
            model.model.config.chat_template_kwargs = chat
        sequences = model.encode(["one two"], ["three", "four five six"])
        if judges and dtype == "float32":
            judge = RewardModel(model)
            torch.nn.init.normal_(judge.network.score.weight)
            expected = judge.scores(sequences).tolist()
            again = RewardModel.load(judge.save(Path(parent, name)), device="cpu")
            assert again.scores(sequences).tolist() == expected
            loaded = again.language_model
        else:
            loaded = load(model.save(Path(parent, name)), device="cpu", dtype=dtype)
            assert same(state(loaded), state(model))
            assert torch.equal(log_probs(loaded, sequences), log_probs(model, sequences))
        said = [json.dumps(settings, sort_keys=True) for settings in (loaded.chat_template_kwargs, chat)]
        assert said[0] == said[1]
        assert loaded.name == name


def log_probs(model: LanguageModel, sequences: Sequences) -> torch.Tensor:
    with torch.no_grad():
        return completion_log_probs(model.model, sequences).log_probs
