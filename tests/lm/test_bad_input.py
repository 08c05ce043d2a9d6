"""Bad input and trouble, through every trainer: the message names the item and the remedy, and nothing is lost."""

from __future__ import annotations

import json
import math
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_runs import TRAINERS, WORDS, records, tiny_model, weights
from safetensors import SafetensorError

from policyopt import checkpoint
from policyopt.checkpoint import load_checkpoint
from policyopt.lm import (
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    LanguageModel,
    PPOConfig,
    RankingConfig,
    RewardConfig,
    SamplingConfig,
    SFTConfig,
    load,
    train_dpo,
    train_grpo,
    train_kto,
    train_ppo,
    train_ranking,
    train_reward_model,
    train_sft,
)

SHORT = SamplingConfig(max_new_tokens=4)
COMMON: dict[str, Any] = {"updates": 3, "batch_size": 2, "learning_rate": 1e-3, "checkpoint_every": 1}


def zero(completions: list[str], **columns: Any) -> list[float]:
    return [0.0] * len(completions)


def run(
    name: str, data: Any, model: LanguageModel | None = None, *, reward: Any = zero, folder: Path | None = None,
    **changes: Any,
) -> Any:  # fmt: skip
    """Train on ``data`` with the trainer of that name."""
    model = model or tiny_model()
    options: dict[str, Any] = {"progress": False, "checkpoint_dir": folder}
    settings = {**COMMON, **changes}
    if name == "grpo":
        config = GRPOConfig(group_size=2, sampling=SHORT, **settings)
        return train_grpo(model, data, reward, config, **options)
    if name == "ppo":
        return train_ppo(model, data, reward, PPOConfig(sampling=SHORT, **settings), **options)
    trainer, config_type = {
        "sft": (train_sft, SFTConfig),
        "reward": (train_reward_model, RewardConfig),
        "dpo": (train_dpo, DPOConfig),
        "kto": (train_kto, KTOConfig),
        "ranking": (train_ranking, RankingConfig),
    }[name]
    return trainer(model, data, config_type(**settings), **options)


def data_for(name: str) -> list[dict[str, Any]]:
    if name in ("grpo", "ppo"):
        return [{"prompt": record["prompt"]} for record in records()]
    return records()


every_trainer = pytest.mark.parametrize("name", list(TRAINERS))
trainers_that_sample = pytest.mark.parametrize("name", ["grpo", "ppo"])

# --- data ------------------------------------------------------------------------------------------------------


@every_trainer
def test_nothing_is_trained_or_written_on_bad_data(name: str, tmp_path: Path) -> None:
    model = tiny_model()
    before = {key: value.clone() for key, value in model.model.state_dict().items()}
    data = data_for(name)
    del data[-1]["prompt"]

    with pytest.raises(ValueError, match="item 11: column 'prompt' is missing; there are"):
        run(name, data, model, folder=tmp_path / "run")

    assert not (tmp_path / "run").exists()
    assert all(torch.equal(value, before[key]) for key, value in model.model.state_dict().items())


@every_trainer
def test_no_data(name: str) -> None:
    with pytest.raises(ValueError, match="holds no records"):
        run(name, [])


@every_trainer
def test_malformed_lines_are_named(name: str, tmp_path: Path) -> None:
    lines = [json.dumps(record) for record in data_for(name)]
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join([*lines[:2], lines[2][:-1], *lines[3:]]))

    with pytest.raises(ValueError, match=r"data\.jsonl, line 3: not JSON .* one JSON object on each line"):
        run(name, path)

    path.write_text("\n\n".join(lines))
    from_file, from_list = run(name, path), run(name, data_for(name))
    for key, value in weights(from_list).items():
        assert torch.equal(weights(from_file)[key], value)


@every_trainer
def test_prompts_longer_than_the_context(name: str) -> None:
    data = data_for(name)
    data[5]["prompt"] = " ".join(WORDS * 7)

    with pytest.raises(
        ValueError, match=r"item 5: the prompt has 70 tokens .*context of 64 \(1 of 12 .*set max_prompt"
    ):
        run(name, data)
    assert run(name, data, max_prompt_tokens=20).updates == 3


@every_trainer
def test_prompts_without_a_token(name: str) -> None:
    data = data_for(name)
    data[2]["prompt"] = ""
    with pytest.raises(ValueError, match=r"item 2: the prompt is empty .* begin the prompt with some text"):
        run(name, data)


@every_trainer
def test_chats_without_a_template(name: str) -> None:
    data = data_for(name)
    data[1]["prompt"] = [{"role": "user", "content": "one two"}]
    with pytest.raises(ValueError, match=r"item 1: the tokenizer has no chat template.*give plain texts"):
        run(name, data)


@pytest.mark.parametrize("name", ["dpo", "reward", "ranking"])
def test_equal_texts_have_no_order(name: str) -> None:
    data = records()
    data[3] |= {"rejected": data[3]["chosen"] + " ", "ranked": [*data[3]["ranked"], data[3]["ranked"][0]]}
    with pytest.raises(
        ValueError, match=r"item 3: .* are the same tokens, so there is nothing to prefer; drop the item"
    ):
        run(name, data)


@pytest.mark.parametrize("name", ["sft", "reward", "dpo", "kto", "ranking"])
def test_empty_completions_are_eos_alone(name: str) -> None:
    data = [{**record, "completion": "", "rejected": "", "ranked": ["", "one"]} for record in records()]
    result = run(name, data)
    assert result.updates == 3
    assert math.isfinite(result.history[-1].loss)


# --- tokenizers ------------------------------------------------------------------------------------------------


@every_trainer
def test_a_tokenizer_without_eos(name: str) -> None:
    model = tiny_model()
    model.tokenizer.eos_token = None
    model.model.generation_config.eos_token_id = None
    with pytest.raises(ValueError, match=r"no end-of-sequence token.*tokenizer\.eos_token = "):
        run(name, data_for(name), model)


@every_trainer
def test_padding_may_be_missing_or_anything(name: str) -> None:
    results = []
    for pad in (None, "<eos>", "<bos>", "one"):
        model = tiny_model()
        assert model.tokenizer.pad_token is None
        if pad is not None:
            model.tokenizer.pad_token = pad
        results.append(weights(run(name, data_for(name), model)))
    for result in results[1:]:
        for key, value in results[0].items():
            torch.testing.assert_close(result[key], value, rtol=0, atol=1e-7)


# --- reward functions ------------------------------------------------------------------------------------------


def raises(completions: list[str]) -> list[float]:
    raise KeyError("level")


BAD_REWARDS: dict[str, tuple[Callable[[list[str]], Any], type[Exception], str]] = {
    "raises": (raises, RuntimeError, r"'judge' raised KeyError: 'level' \(on a batch of \d completions"),
    "short": (lambda completions: [0.0], ValueError, r"'judge' returned 1 rewards for \d completions"),
    "none": (lambda completions: [None] * len(completions), ValueError, r"'judge' returned None for item 0 \(prompt '"),
    "nan": (lambda completions: [math.nan] * len(completions), ValueError, r"'judge' returned nan .*finite number"),
    "forgot": (lambda completions: None, ValueError, r"'judge' returned None \(NoneType\); it must return one number"),
}  # fmt: skip


@trainers_that_sample
@pytest.mark.parametrize("kind", list(BAD_REWARDS))
def test_a_bad_reward_costs_nothing_that_was_learned(name: str, kind: str, tmp_path: Path) -> None:
    """The third batch goes wrong; the run then goes on from the second, as if nothing had been."""
    bad, error_type, message = BAD_REWARDS[kind]
    calls = 0

    def judge(completions: list[str], **columns: Any) -> Any:
        nonlocal calls
        calls += 1
        return bad(completions) if calls == 3 else [float(text.count("one")) for text in completions]

    def honest(completions: list[str], **columns: Any) -> list[float]:
        return [float(text.count("one")) for text in completions]

    with pytest.raises(error_type, match=message) as caught:
        run(name, data_for(name), reward={"judge": judge}, folder=tmp_path)

    result = caught.value.result  # type: ignore[attr-defined]
    assert len(result.history) == result.updates == 2
    assert f"the last checkpoint is in {tmp_path}" in caught.value.__notes__[0]
    assert len(load_checkpoint(tmp_path)[1]["history"]) == 2

    resumed = run(name, data_for(name), reward={"judge": honest}, folder=tmp_path)
    uninterrupted = run(name, data_for(name), reward={"judge": honest})
    assert resumed.updates == 3
    for key, value in weights(uninterrupted).items():
        assert torch.equal(weights(resumed)[key], value)


@trainers_that_sample
def test_a_reward_function_that_wants_what_is_not_there(name: str) -> None:
    def judge(completions: list[str], answer: list[int]) -> list[float]:
        return [0.0] * len(completions)

    with pytest.raises(TypeError, match=r"'judge' requires 'answer', .*add the column to the data"):
        run(name, data_for(name), reward=judge)
    with pytest.raises(
        ValueError, match="item 0: reward functions are given 'finished' already; rename the column"
    ):
        run(name, [{**record, "finished": 1} for record in data_for(name)], reward=judge)


@trainers_that_sample
def test_reward_weights_that_do_not_fit(name: str) -> None:
    with pytest.raises(ValueError, match=r"one finite number for each of the 1 reward functions \['zero'\]"):
        run(name, data_for(name), reward_weights=(1.0, 2.0))


@trainers_that_sample
def test_equal_rewards_are_no_trouble(name: str) -> None:
    assert all(math.isfinite(row.gradient_norm) for row in run(name, data_for(name)).history)


def test_a_group_of_one_has_nothing_to_compare_with() -> None:
    with pytest.raises(
        ValueError, match="group_size must be >= 2: one sample has nothing to be compared with"
    ):
        GRPOConfig(group_size=1)


# --- disks -----------------------------------------------------------------------------------------------------


@every_trainer
@pytest.mark.parametrize(
    "error",
    [
        OSError(28, "No space left on device"),
        SafetensorError("I/O error: No space left on device (os error 28)"),
    ],
)
def test_a_full_disk_leaves_the_last_checkpoint(
    name: str, error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data, writes = data_for(name), 0
    write = checkpoint.save_file

    def full(tensors: dict[str, torch.Tensor], path: Path) -> None:
        nonlocal writes
        writes += 1
        if writes == 2:
            path.write_bytes(b"half a")
            raise error
        write(tensors, path)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "save_file", full)
        with pytest.raises(
            OSError, match=r"No space left on device.*still holds the one of before\. Free some"
        ) as caught:
            run(name, data, folder=tmp_path)

    assert str(tmp_path) in str(caught.value)
    assert caught.value.__cause__ is error
    assert caught.value.result.updates == 2, "the step itself was made"  # type: ignore[attr-defined]
    assert len(list(tmp_path.iterdir())) == 2, "nothing half-written stays"
    assert len(load_checkpoint(tmp_path)[1]["history"]) == 1

    resumed, uninterrupted = run(name, data, folder=tmp_path), run(name, data)
    for key, value in weights(uninterrupted).items():
        assert torch.equal(weights(resumed)[key], value)


def test_a_disk_that_really_refuses(tmp_path: Path) -> None:
    """The operating system refuses the second checkpoint, in whatever way the writing library meets that."""
    resource = pytest.importorskip("resource")
    before, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.getsignal(signal.SIGXFSZ)
    train_sft(
        tiny_model(), records(), SFTConfig(updates=1), progress=False, checkpoint_dir=tmp_path / "measure"
    )
    size = max(path.stat().st_size for path in (tmp_path / "measure").iterdir())

    def fill(row: Any) -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (size - 1, before[1]))

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        with pytest.raises(
            OSError, match=r"no checkpoint could be written to .*still holds the one of before"
        ):
            train_sft(
                tiny_model(), records(), SFTConfig(updates=2, checkpoint_every=1), callback=fill, progress=False,
                checkpoint_dir=tmp_path / "run",
            )  # fmt: skip
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    assert len(load_checkpoint(tmp_path / "run")[1]["history"]) == 1


def test_a_full_disk_leaves_the_last_saved_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model()
    model.save(tmp_path / "model")
    before = sorted(path.name for path in tmp_path.rglob("*"))
    with torch.no_grad():
        next(model.model.parameters()).add_(1)

    def full(folder: str, **_: Any) -> None:
        (Path(folder) / "model.safetensors").write_bytes(b"half a")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(model.model, "save_pretrained", full)
        with pytest.raises(OSError, match=r"No space left on device"):
            model.save(tmp_path / "model")

    assert sorted(path.name for path in tmp_path.rglob("*")) == before
    again = load(tmp_path / "model", device="cpu")
    assert torch.equal(next(again.model.parameters()), next(tiny_model().model.parameters()))


@pytest.mark.parametrize(
    ("config", "field", "message"),
    [
        (GRPOConfig, "max_completion_tokens", r"did you mean sampling=SamplingConfig\(max_new_tokens"),
        (PPOConfig, "max_completion_tokens", r"did you mean sampling=SamplingConfig\(max_new_tokens"),
        (GRPOConfig, "beat", "did you mean beta"),
        (SFTConfig, "sampling", "SFTConfig has no field 'sampling'"),
    ],
)
def test_a_setting_that_would_be_ignored_is_refused(config: Any, field: str, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        config(**{field: 3})


def test_a_reward_model_logs_no_samples() -> None:
    with pytest.raises(ValueError, match="logged_samples must be 0: a reward model writes nothing, got 4"):
        RewardConfig(logged_samples=4)


# --- code from elsewhere ---------------------------------------------------------------------------------------


def test_code_of_a_model_folder_is_never_run(tmp_path: Path) -> None:
    folder = tiny_model().save(tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    config |= {
        "model_type": "of-their-own",
        "auto_map": {"AutoConfig": "theirs.Config", "AutoModelForCausalLM": "theirs.Model"},
    }
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "theirs.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")

    with pytest.raises(ValueError, match="needs code from its own repository, which is never run"):
        load(folder)
    assert not (tmp_path / "ran").exists()


def test_remote_code_is_never_trusted() -> None:
    sources = list(Path(str(checkpoint.__file__)).parent.rglob("*.py"))
    mentions = [
        line for path in sources for line in path.read_text().splitlines() if "trust_remote_code" in line
    ]
    assert mentions
    assert not [line for line in mentions if "True" in line]
