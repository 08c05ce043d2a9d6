"""The tiny models: as good as their record says, and the script that makes them is deterministic."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaForCausalLM

from policyopt.lm.models import LanguageModel, load
from policyopt.lm.sampling import SamplingConfig, generate
from policyopt_book import load_model, make_models
from policyopt_book.make_models import MODELS, RECIPES, evaluate, make, sample_texts
from policyopt_book.tasks import addition, news


@pytest.fixture(scope="module", params=list(RECIPES))
def shipped(request: pytest.FixtureRequest) -> tuple[str, LanguageModel]:
    return request.param, load_model(request.param, device="cpu")


def _prompts(name: str, count: int) -> list[str]:
    records = news.prompt_records(news.make_items(count, seed=0))
    if name == "addition-base":
        records = addition.prompt_records(addition.make_problems(count, seed=0))
    return [row["prompt"] for row in records]


def test_every_shipped_model_is_a_small_float32_llama(shipped: tuple[str, LanguageModel]) -> None:
    name, language_model = shipped
    model = language_model.model
    assert isinstance(model, LlamaForCausalLM)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert 100_000 <= model.num_parameters() <= 500_000
    assert model.config.vocab_size == len(language_model.tokenizer)
    folder = MODELS / name
    assert sum(file.stat().st_size for file in folder.iterdir()) < 1_500_000
    assert {file.suffix for file in folder.iterdir()} == {".json", ".safetensors"}


def test_special_tokens_agree_everywhere(shipped: tuple[str, LanguageModel]) -> None:
    name, language_model = shipped
    tokenizer = language_model.tokenizer
    generation = GenerationConfig.from_pretrained(MODELS / name)
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        ids = {getattr(holder, token) for holder in (language_model.model.config, tokenizer, generation)}
        assert len(ids) == 1
        assert ids != {None}
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3


@pytest.mark.parametrize("text", ["", "Fenn Air buys", " x\n\ny  ", "427+395=", "Zürich ≠ ∞ 😀 \t"])
def test_any_text_is_encoded_without_loss_after_one_bos(
    shipped: tuple[str, LanguageModel], text: str
) -> None:
    tokenizer = shipped[1].tokenizer
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.eos_token_id not in ids
    assert ids[1:] == tokenizer(text, add_special_tokens=False).input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_texts_are_short_in_tokens() -> None:
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "news-base")
    items = news.make_items(200, seed=0)
    assert max(len(tokenizer(item.prompt).input_ids) for item in items) <= 60
    summaries = [row["completion"] for row in news.sft_records(items, seed=0)]
    assert sum(len(tokenizer(text).input_ids) for text in summaries) / 200 <= 25


# What evaluate must find on 512 fresh problems; made.json beside each model has the figures of its making.
EXPECTED = {
    "news-base": {
        "utility_sampled": (2.9, 3.7),
        "utility_greedy": (4.1, 4.6),
        "facts_wrong_sampled": (0, 0.15),
    },
    "news-sft": {
        "utility_sampled": (0.7, 1.4),
        "utility_greedy": (-0.6, 0.4),
        "facts_wrong_sampled": (0.25, 0.6),
    },
    "addition-base": {"accuracy_sampled": (0.36, 0.54), "scratchpad_sampled": (0.4, 0.56)},
}


def test_measured_quality_holds(shipped: tuple[str, LanguageModel]) -> None:
    name, language_model = shipped
    measured = evaluate(name, language_model.model, language_model.tokenizer, seed=20_000_000)
    for figure, (low, high) in EXPECTED[name].items():
        assert low <= measured[figure] <= high, f"{figure} is {measured[figure]}"
    made = json.loads((MODELS / name / "made.json").read_text())
    assert made["recipe"] == dataclasses.asdict(RECIPES[name]), "the model was made by another recipe"
    assert set(made["measured"]) == set(measured)
    for figure, value in made["measured"].items():
        assert measured[figure] == pytest.approx(value, rel=0.15, abs=0.25)


def test_the_packages_sampler_and_the_scripts_agree(shipped: tuple[str, LanguageModel]) -> None:
    name, language_model = shipped
    model, tokenizer, prompts = language_model.model, language_model.tokenizer, _prompts(name, 32)
    greedy = generate(language_model, prompts, SamplingConfig(temperature=0))
    assert [text for (text,) in greedy] == sample_texts(model, tokenizer, prompts, greedy=True)


def test_sampling_depends_on_the_seed_alone() -> None:
    language_model = load_model("addition-base", device="cpu")
    model, tokenizer, prompts = language_model.model, language_model.tokenizer, _prompts("addition-base", 16)
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first = sample_texts(model, tokenizer, prompts, seed=5)
    assert torch.equal(state, torch.get_rng_state())
    torch.manual_seed(2)
    assert sample_texts(model, tokenizer, prompts, seed=5) == first
    assert sample_texts(model, tokenizer, prompts, seed=6) != first


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Finished models are measured on a handful of problems."""
    monkeypatch.setattr(make_models, "evaluate", functools.partial(evaluate, samples=4))


def _make(name: str, out: Path, steps: int) -> dict[str, Any]:
    folder = make(name, out, recipe=dataclasses.replace(RECIPES[name], steps=steps, batch=8))
    record: dict[str, Any] = json.loads((folder / "made.json").read_text())
    return record


@pytest.mark.usefixtures("quick")
def test_making_models_is_deterministic(tmp_path: Path) -> None:
    """Two small runs agree to the last byte, whatever the global seed, and the second model starts from the first."""
    folders, records = [tmp_path / "one", tmp_path / "two"], []
    for out in folders:
        torch.manual_seed(len(records))
        records.append(
            [
                _make(*arguments)
                for arguments in [("news-base", out, 10), ("news-sft", out, 3), ("addition-base", out, 10)]
            ]
        )
        for record in records[-1]:
            record.pop("seconds")
    assert records[0] == records[1]
    for name in RECIPES:
        for file in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"):
            contents = [(out / name / file).read_bytes() for out in folders]
            assert contents[0] == contents[1], f"{name}/{file} differs"
    base, tuned = (folders[0] / name for name in ("news-base", "news-sft"))
    assert (base / "tokenizer.json").read_bytes() == (tuned / "tokenizer.json").read_bytes()
    difference = (
        load(base, device="cpu").model.lm_head.weight - load(tuned, device="cpu").model.lm_head.weight
    )
    assert 0 < difference.abs().max() < 0.05


@pytest.mark.usefixtures("quick")
def test_the_tokenizers_are_those_that_ship(tmp_path: Path) -> None:
    """One step suffices: the tokenizer is made before the training."""
    for name in ("news-base", "addition-base"):
        _make(name, tmp_path, 1)
        for file in ("tokenizer.json", "config.json", "generation_config.json"):
            made, shipped = (
                {key: value for key, value in json.loads(path.read_text()).items() if "version" not in key}
                for path in (tmp_path / name / file, MODELS / name / file)
            )
            assert made == shipped


@pytest.mark.usefixtures("quick")
def test_training_lowers_the_loss(tmp_path: Path) -> None:
    first, last = (_make("addition-base", tmp_path, steps)["loss"] for steps in (1, 60))
    assert first == pytest.approx(math.log(259), abs=0.7)
    assert last < 2.6


def test_the_standard_classes_load_them_without_the_package() -> None:
    model = AutoModelForCausalLM.from_pretrained(MODELS / "addition-base")
    tokenizer = AutoTokenizer.from_pretrained(MODELS / "addition-base")
    batch = tokenizer("100+100=", return_tensors="pt", return_token_type_ids=False)
    greedy = GenerationConfig(do_sample=False, max_new_tokens=40, eos_token_id=2, pad_token_id=0)
    ids = model.generate(**batch, generation_config=greedy)
    assert ids[0, -1] == tokenizer.eos_token_id
    assert addition.final_answer(tokenizer.decode(ids[0, 9:], skip_special_tokens=True)) == 200
