"""The recipe for GSM8K, from the command line, on a tiny model; its settings are those that a chapter shows."""

from __future__ import annotations

import json
from dataclasses import replace
from decimal import Decimal
from pathlib import Path
from typing import Any

import gsm8k
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import notebooks
from policyopt.lm import GRPOConfig, LanguageModel, LoRA, add_lora, generate, load, train_grpo
from policyopt.lm.rewards import compute_rewards
from policyopt.lm.sampling import SamplingConfig
from policyopt_book.memory import estimate_memory
from policyopt_book.tasks.gsm8k import final_number, final_number_reward

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
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
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


# --- the rule that grades a solution ---


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("Natalia sold 48 / 2 = 24 clips in May.\n#### 72", "72"),
        ("#### 72\nand so on, 99 times", "72"),
        ("####-3.50", "-3.50"),
        ("#### $1,234,567.", "1234567"),
        ("#### 50%", "50"),
        ("#### .5", "0.5"),
        ("#### 1\n#### 2", "2"),
        (r"so \boxed{12} kg", "12"),
        (r"\boxed{1} then #### 2", "2"),
        (r"#### \boxed{2}", "2"),
        (r"#### 2 then \boxed{1}", None),
        ("#### 2\n\\boxed{1}", "1"),
        ("the answer is 72", None),
        ("####", None),
        ("####\n72", None),
        ("#### seventy-two", None),
        ("#### 71 72 73", None),
        ("#### 1,2,3", None),
        ("#### 1/2", None),
        (r"\boxed{\frac{1}{2}}", None),
        (r"#### 72" + "\n" + r"\boxed{}", None),
        ("", None),
    ],
)
def test_final_number(text: str, number: str | None) -> None:
    assert final_number(text) == (None if number is None else Decimal(number))


def test_final_number_reward() -> None:
    solution = "He has 5 and 5 more, 5 + 5 = <<5+5=10>>10.\n#### 10"
    completions = ["#### 10", "#### 10.0", r"\boxed{10}", "10", "#### 11", "#### 9 10 11"]
    for answer in (solution, "10", "10.00", 10, 10.0):
        scores = final_number_reward(completions, prompts=[], answer=[answer] * 6, finished=[True] * 6)
        assert scores == [1, 1, 1, 0, 0, 0]
    assert final_number_reward(["#### 0", "none"], answer=["5 - 5 = 0\n#### 0"] * 2) == [1, 0]

    columns = {"answer": [solution] * 6, "finished": [True] * 6}
    assert compute_rewards(final_number_reward, completions, ["?"] * 6, columns).total.sum() == 3


def test_an_answer_without_a_number_is_named() -> None:
    for answer in ("ten", "1 or 2", "#### ten"):
        with pytest.raises(ValueError, match=f"answer 1 holds no number: '{answer}'"):
            final_number_reward(["a", "b"], answer=["1", answer])


@given(number=st.decimals(-(10**9), 10**9, places=2))
def test_final_number_reads_what_is_written(number: Decimal) -> None:
    assert final_number(f"first 3, then\n#### {number}") == number
    assert final_number(f"first 3, then\n#### {number:,}") == number
    assert final_number(f"\\boxed{{{number} m}}") == number
