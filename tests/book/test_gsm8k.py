"""The recipe for GSM8K, from the command line, on a tiny model; its settings are those that a chapter shows."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import gsm8k
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import notebooks
from policyopt.lm import GRPOConfig, LanguageModel, LoRA, add_lora, generate, load, train_grpo
from policyopt.lm.memory import estimate_memory
from policyopt.lm.sampling import SamplingConfig

WORDS = ["####", "so", "the", "answer", "is", *map(str, range(10))]
QUESTIONS = ["the answer is", "so the answer is", "is the answer 7", "7 is the answer"]
TEMPLATE = (
    "{% for m in messages %}{{ m['content'] + ' <eos> ' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<bos>' }}{% endif %}"
)


def tiny_chat_model() -> LanguageModel:
    torch.manual_seed(0)
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<bos>", "<eos>", *WORDS])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", chat_template=TEMPLATE
    )
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=128, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    return LanguageModel(LlamaForCausalLM(config).eval(), tokenizer, "tiny-chat")


def write_problems(path: Path, count: int) -> Path:
    lines = [
        json.dumps({"question": QUESTIONS[i % len(QUESTIONS)], "answer": "It is 3 + 4.\n#### 7"})
        for i in range(count)
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def command(tmp_path: Path) -> list[str]:
    tiny_chat_model().save(tmp_path / "tiny-chat")
    train, test = write_problems(tmp_path / "train.jsonl", 8), write_problems(tmp_path / "test.jsonl", 6)
    return [
        "--model", str(tmp_path / "tiny-chat"), "--train", str(train), "--test", str(test), "--test-limit", "4",
        "--output", str(tmp_path / "run"), "--device", "cpu", "--updates", "40", "--batch-size", "8",
        "--group-size", "16", "--micro-batch-size", "64", "--max-new-tokens", "3", "--learning-rate", "0.02",
    ]  # fmt: skip


def test_gsm8k_runs_from_the_command_line_and_learns(
    command: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    result = gsm8k.main(command)
    # Everything else is the recipe's own configuration.
    expected = replace(
        gsm8k.CONFIG, updates=40, batch_size=8, group_size=16, micro_batch_size=64, learning_rate=0.02,
        sampling=SamplingConfig(max_new_tokens=3),
    )  # fmt: skip
    assert result.config == expected
    assert result.config.autocast == "bfloat16"
    assert result.config.gradient_checkpointing
    right = [row.rewards["right"] for row in result.history]
    assert max(right[:3]) < 0.1
    assert min(right[-3:]) > 0.6
    assert all(row.rewards.keys() == {"right", "form"} for row in result.history)
    solved = json.loads((tmp_path / "run" / "accuracy.json").read_text())
    assert solved == {"before": 0.0, "after": 1.0}
    assert "0.0% before, 100.0% after" in capsys.readouterr().out
    assert len(result.samples) == 4
    (texts,) = generate(
        load(tmp_path / "run" / "model", device="cpu"),
        [[{"role": "user", "content": "is the answer"}]],
        SamplingConfig(temperature=0.0, max_new_tokens=3),
    )
    assert "#### 7" in texts[0]


def test_the_chapter_shows_the_settings_of_the_recipe() -> None:
    cells = notebooks.read(notebooks.notebook_path("real-model")).cells
    (shown,) = [cell.source for cell in cells if cell.source.startswith("gsm8k_config = ")]
    names: dict[str, Any] = {"GRPOConfig": GRPOConfig, "SamplingConfig": SamplingConfig}
    exec(shown, names)
    assert names["gsm8k_config"] == gsm8k.CONFIG


def test_gsm8k_goes_on_where_it_stopped(command: list[str], tmp_path: Path) -> None:
    where = command.index("--updates") + 1
    command[where] = "2"
    gsm8k.main(command)
    command[where] = "4"
    again = gsm8k.main(command)
    assert [row.update for row in again.history] == list(range(1, 5))
    assert json.loads((tmp_path / "run" / "accuracy.json").read_text())["before"] == 0.0


def test_problems_become_chats() -> None:
    (record,) = gsm8k.math_records([{"question": "What is 1 + 1?", "answer": "#### 2"}])
    assert record["prompt"][1] == {"role": "user", "content": "What is 1 + 1?"}
    assert "####" in record["prompt"][0]["content"]
    assert record["answer"] == "#### 2"
    with pytest.raises(ValueError, match="item 1 has no column 'answer'"):
        gsm8k.math_records([{"question": "?", "answer": "1"}, {"question": "?"}])


def test_rewards_of_solutions() -> None:
    texts = ["6 * 7 = 42\n#### 42", r"so \boxed{42}", "#### 41", "42", "#### 42 or 43"]
    ends = [True, True, True, True, False]
    assert gsm8k.REWARDS["right"](texts, answer=["#### 42"] * 5) == [1, 1, 0, 0, 0]
    assert gsm8k.form_reward(texts, ends) == [1, 1, 1, 0, 0]
    assert gsm8k.form_reward(["#### 42"], [False]) == [0]


def test_without_the_package_datasets_a_file_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(ImportError, match="JSON Lines file"):
        gsm8k.read_gsm8k("test")


def tensors(value: Any) -> int:
    return sum(t.numel() * t.element_size() for t in value)


@pytest.mark.parametrize("adapted", [False, True])
def test_the_memory_that_stays_is_counted_exactly(adapted: bool) -> None:
    model = add_lora(tiny_chat_model(), LoRA(rank=4)) if adapted else tiny_chat_model()
    config = GRPOConfig(beta=0.1, sampling=SamplingConfig(max_new_tokens=10))
    memory = estimate_memory(model, config, prompt_tokens=20)
    trained = [p for p in model.model.parameters() if p.requires_grad]
    loss = sum((p * p).sum() for p in trained)
    assert isinstance(loss, torch.Tensor)
    optimizer = torch.optim.AdamW(trained)
    loss.backward()
    optimizer.step()
    assert memory.weights == tensors(model.model.parameters())
    assert memory.gradients == tensors(p.grad for p in trained)
    moments = [t for state in optimizer.state.values() for name, t in state.items() if name != "step"]
    assert memory.optimizer == tensors(moments)
    assert memory.reference == (0 if adapted else memory.weights)
    # 16 prompts x 8 completions, 30 tokens, 2 layers, keys and values, 1 head of width 16, 4 bytes
    assert memory.cache == 16 * 8 * 30 * 2 * 2 * 16 * 4
    assert memory.total == sum(memory[:4]) + max(memory.cache, memory.activations)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_estimate_of_activations_covers_what_is_kept(checkpointing: bool) -> None:
    """Bytes that autograd keeps for the backward pass, outside the head, against the estimate."""
    model = tiny_chat_model()
    config = GRPOConfig(
        updates=1, batch_size=2, group_size=4, gradient_checkpointing=checkpointing,
        sampling=SamplingConfig(max_new_tokens=10),
    )  # fmt: skip
    weights = {p.data_ptr() for p in model.model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in weights:
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        train_grpo(
            model,
            [{"prompt": " ".join(["so"] * 30)}] * 2,
            lambda completions: [float(i) for i in range(len(completions))],
            config,
            progress=False,
        )
    estimate = estimate_memory(model, config, prompt_tokens=30).activations
    assert 0.1 * estimate < sum(kept.values()) < 1.5 * estimate
