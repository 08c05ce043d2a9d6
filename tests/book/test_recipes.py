"""The scripts of the page on recipes, each run as a reader runs it: in a folder of its own, without a network."""

from __future__ import annotations

import json
import os
import random
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

from policyopt.checkpoint import has_checkpoint, load_checkpoint
from policyopt.control import TrainResult
from policyopt.lm import LanguageModel, LoRA, SFTConfig, add_lora, load
from policyopt_book import load_model, model_path
from policyopt_book.memory import estimate_memory
from policyopt_book.tasks import news
from repository import ROOT

RECIPES = ROOT / "book" / "recipes"
PAGE = (ROOT / "book" / "recipes.md").read_text(encoding="utf-8")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "TQDM_DISABLE": "1"}
# Any attempt to reach another machine is an error.
OFFLINE = """
import runpy, socket, sys
def refuse(*args, **kwargs):
    raise AssertionError(f"the recipe asked the network for {args[1:]}")
socket.socket.connect = socket.getaddrinfo = refuse
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def command(name: str, *arguments: object) -> list[str]:
    return [sys.executable, "-W", "error", "-c", OFFLINE, str(RECIPES / f"{name}.py"), *map(str, arguments)]


def run(folder: Path, name: str, *arguments: object, code: int = 0) -> str:
    """Run a recipe; return what it printed (or its complaint, where it is to fail)."""
    done = subprocess.run(
        command(name, *arguments), cwd=folder, env=ENVIRONMENT, capture_output=True, text=True, timeout=300, check=False
    )  # fmt: skip
    assert done.returncode == code, done.stdout + done.stderr
    return done.stdout if code == 0 else done.stderr


def number_behind(label: str, text: str) -> float:
    return float(text.split(label)[1].split()[0].rstrip(","))


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``pairs.jsonl`` (an annotator without noise) and ``examples.jsonl``."""
    folder = tmp_path_factory.mktemp("data")
    items = news.make_items(96, seed=1)
    rng = random.Random(0)
    texts = [[news.write_summary(item, news.MIXED, rng) for _ in range(4)] for item in items]
    for name, records in (
        ("pairs", news.preference_pairs(items, texts, temperature=0.0, seed=0)),
        ("examples", news.sft_records(items, seed=0)),
    ):
        lines = [json.dumps({k: v for k, v in record.items() if k != "facts"}) for record in records]
        (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture(scope="module")
def dpo_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("dpo")
    text = run(folder, "own_preferences", "--data", data / "pairs.jsonl", "--output", "run", "--epochs", 3,
               "--batch-size", 16)  # fmt: skip
    return folder / "run", text


@pytest.fixture(scope="module")
def lora_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("lora")
    text = run(folder, "lora_one_gpu", "--data", data / "examples.jsonl", "--output", "run",
               "--model", model_path("news-base"), "--rank", 8, "--updates", 12, "--batch-size", 16,
               "--micro-batch-size", 8)  # fmt: skip
    return folder / "run", text


def test_the_page_shows_every_recipe_and_pastes_none() -> None:
    shown = [line.split()[-1] for line in PAGE.splitlines() if line.startswith("```{literalinclude}")]
    assert sorted(shown) == sorted(f"recipes/{path.name}" for path in RECIPES.glob("*.py"))
    assert "```python" not in PAGE


def test_own_environment_is_learned_and_saved(tmp_path: Path) -> None:
    text = run(tmp_path, "own_environment", "--output", "room", "--steps", 60_000)
    untrained, trained = number_behind("return ", text), number_behind("untrained, ", text)
    assert trained > 0.6 * untrained > -40
    assert "heater at 15 °C: on" in text
    assert TrainResult.load(tmp_path / "room").steps >= 60_000


def test_own_reward_raises_both_rewards(tmp_path: Path) -> None:
    text = run(tmp_path, "own_reward", "--output", "run", "--updates", 25)
    assert number_behind("mentions: ", text) < text_after(text, "mentions: ") - 0.1
    assert number_behind("brevity: ", text) < text_after(text, "brevity: ")
    load(tmp_path / "run", device="cpu")


def text_after(text: str, label: str) -> float:
    return number_behind("before, ", text.split(label)[1])


def test_own_preferences_are_learned_beyond_the_training_pairs(dpo_run: tuple[Path, str]) -> None:
    folder, text = dpo_run
    assert number_behind("accuracy on held-out pairs: ", text) >= 0.65
    load(folder, device="cpu")


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        (
            '{"prompt": "a", "chosen": "b", "rejected": "b"}',
            "line 2: chosen and rejected are the same tokens",
        ),
        ('{"prompt": "a", "chosen": "b"}', "line 2: column 'rejected' is missing"),
        ('{"prompt": "a"', "line 2: not JSON"),
    ],
)
def test_bad_rows_are_named(line: str, complaint: str, tmp_path: Path) -> None:
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n' + line + "\n")
    recipe = runpy.run_path(str(RECIPES / "own_preferences.py"))
    with pytest.raises(SystemExit) as stopped:
        recipe["main"](["--data", str(tmp_path / "pairs.jsonl"), "--output", str(tmp_path / "run")])
    assert str(stopped.value).startswith(f"error: {tmp_path / 'pairs.jsonl'}, {complaint}")
    assert not (tmp_path / "run").exists()


def test_lora_lowers_the_loss_and_saves_the_adapters_alone(lora_run: tuple[Path, str]) -> None:
    folder, text = lora_run
    assert number_behind("loss: ", text) > number_behind("before, ", text) + 0.1
    assert (folder / "adapter_model.safetensors").stat().st_size < 300_000
    model = load(folder, device="cpu")
    trained = number_behind("trained: ", text.replace(",", ""))
    assert trained == model.num_trainable_parameters < model.num_parameters
    assert number_behind("optimizer: ", text) == pytest.approx(8 * trained / 1e9, rel=1e-2)


def test_the_table_of_memory_is_computed() -> None:
    """Qwen2.5-0.5B, from its shapes alone."""
    config = Qwen2Config(
        vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
        num_key_value_heads=2, tie_word_embeddings=True,
    )  # fmt: skip
    tokenizer = AutoTokenizer.from_pretrained(model_path("news-sft"))

    def model(dtype: torch.dtype) -> LanguageModel:
        with torch.device("meta"):
            return LanguageModel(Qwen2ForCausalLM(config).to(dtype), tokenizer, "Qwen2.5-0.5B")

    full, adapted = model(torch.float32), add_lora(model(torch.bfloat16), LoRA(rank=16))
    assert f"{full.num_parameters:,}" in PAGE
    assert f"{adapted.num_trainable_parameters:,}" in PAGE
    for label, language_model, size, checkpointing in (
        ("all weights, float32", full, 4, True),
        ("LoRA on bfloat16", adapted, 4, True),
        ("LoRA, 32 at a time", adapted, 32, True),
        ("LoRA, 32 at a time, nothing recomputed", adapted, 32, False),
    ):
        settings = SFTConfig(micro_batch_size=size, autocast="bfloat16", gradient_checkpointing=checkpointing)
        memory = estimate_memory(language_model, settings, prompt_tokens=256, completion_tokens=256)
        parts = (memory.weights, memory.gradients + memory.optimizer, memory.activations, memory.total)
        row = f"| {label} | " + " | ".join(f"{part / 1e9:.1f}" for part in parts) + " |"
        assert row in PAGE, row


def test_estimates_without_sampling_need_a_length() -> None:
    with pytest.raises(ValueError, match="completion_tokens must be given"):
        estimate_memory(load_model("news-base", device="cpu"), SFTConfig())


@pytest.mark.parametrize("launcher", ["torchrun", "accelerate"])
def test_many_processes_learn_what_one_learns(launcher: str, data: Path, tmp_path: Path) -> None:
    arguments = [str(RECIPES / "many_gpus.py"), "--data", str(data / "pairs.jsonl"),
                 "--model", str(model_path("news-sft")), "--updates", "3", "--batch-size", "8",
                 "--learning-rate", "1e-3", "--output"]  # fmt: skip
    processes = {
        "torchrun": ["torch.distributed.run", "--standalone", "--nproc-per-node", "2"],
        "accelerate": ["accelerate.commands.launch", "--num_processes", "2", "--use_fsdp", "--fsdp_version", "2",
                       "--main_process_port", "0"],
    }[launcher]  # fmt: skip
    for folder, start in (("one", []), ("two", ["-m", *processes])):
        done = subprocess.run(
            [sys.executable, *start, *arguments, folder], cwd=tmp_path, env=ENVIRONMENT, capture_output=True, text=True,
            timeout=300, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout + done.stderr
        assert f"{'2' if start else '1'} process(es), loss 0." in done.stdout
    one, two = (load_file(tmp_path / folder / "model" / "model.safetensors") for folder in ("one", "two"))
    assert furthest(one, two) < 2e-5
    assert (
        furthest(
            one,
            {k: p for k, p in load_model("news-sft", device="cpu").model.state_dict().items() if k in one},
        )
        > 1e-4
    )
    assert not list((tmp_path / "two").glob(".model*"))


def test_vllm_missing_is_said_with_the_remedy(tmp_path: Path) -> None:
    """What happens with vLLM is tested with a stand-in, in test_sampling.py."""
    if shutil.which("vllm"):
        pytest.skip("vLLM is installed")
    (tmp_path / "problems.jsonl").write_text('{"prompt": "1+1=", "answer": 2}\n')
    text = run(
        tmp_path,
        "vllm_sampling",
        "--data",
        "problems.jsonl",
        "--output",
        "run",
        "--model",
        model_path("news-sft"),
        code=1,
    )
    assert "error: VLLMSampler needs vLLM, on Linux with a GPU: pip install vllm" in text
    assert "Traceback" not in text


def test_tensorboard_gets_every_number_of_both_halves(tmp_path: Path) -> None:
    run(tmp_path, "tensorboard_logs", "--output", "runs", "--control-steps", 8192, "--lm-updates", 2)
    for name, tags in (
        ("cartpole", {"return_mean", "kl", "value_loss"}),
        ("addition", {"reward", "rewards/right", "length", "gradient_norm"}),
    ):
        events = EventAccumulator(str(tmp_path / "runs" / name))
        events.Reload()
        assert tags <= set(events.Tags()["scalars"])
        steps = [event.step for event in events.Scalars(min(tags))]
        assert steps == [1, 2] if name == "addition" else steps == sorted(steps) and steps[-1] >= 8192
    assert "kl" not in events.Tags()["scalars"]  # without a reference it is not measured


def kill_after(process: subprocess.Popen[str], line: str) -> None:
    """Kill a process, without warning, once it has printed a line that begins so."""
    assert process.stdout is not None
    deadline = time.monotonic() + 200
    for printed in process.stdout:
        if printed.startswith(line):
            process.send_signal(signal.SIGKILL)
            break
        assert time.monotonic() < deadline
    assert process.wait() == -signal.SIGKILL
    process.stdout.close()


@pytest.mark.parametrize(
    ("name", "options", "line", "checkpoint"),
    [
        ("resume_control", ("--steps", 24_000, "--save-every", 4), "update 6", "."),
        ("resume_lm", ("--updates", 5, "--save-every", 2), "update 3", "checkpoints"),
    ],
)
def test_a_killed_run_goes_on(
    name: str, options: tuple[object, ...], line: str, checkpoint: str, tmp_path: Path
) -> None:
    broken = command(name, "--output", "killed", *options)
    with subprocess.Popen(
        broken, cwd=tmp_path, env=ENVIRONMENT, stdout=subprocess.PIPE, text=True
    ) as process:
        kill_after(process, line)
    assert has_checkpoint(tmp_path / "killed" / checkpoint)
    text = run(tmp_path, name, "--output", "killed", *options)
    if name == "resume_control":  # the process may have got further than the line that it was killed for
        assert text.startswith(("update 5:", "update 9:"))
    else:
        assert text.startswith("update 3")
    run(tmp_path, name, "--output", "whole", *options)
    killed, whole = (load_checkpoint(tmp_path / folder / checkpoint)[0] for folder in ("killed", "whole"))
    assert furthest(killed, whole) == 0


def logits(model: Any, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return torch.as_tensor(model(torch.tensor([ids])).logits)


@pytest.mark.parametrize("kind", ["full", "merged", "adapters"])
def test_what_is_exported_is_the_trained_model_with_a_card(
    kind: str, dpo_run: tuple[Path, str], lora_run: tuple[Path, str], tmp_path: Path
) -> None:
    trained = dpo_run[0] if kind == "full" else lora_run[0]
    options = ["--base", "you/base", "--dataset", "you/data", "--license", "mit"]
    options += ["--merge"] if kind == "merged" else []
    folder = tmp_path / "exported"
    if kind == "full":
        assert "nothing was uploaded" in run(tmp_path, "export_to_hub", trained, "exported", *options)
    else:
        runpy.run_path(str(RECIPES / "export_to_hub.py"))["main"]([str(trained), str(folder), *options])
    ours = load(trained, device="cpu")
    ids = ours.encode(["Gavo Steel opens a plant in Lima."], ["Gavo Steel acts."]).completion_ids[0].tolist()
    if kind == "adapters":
        assert (folder / "adapter_config.json").exists()
        theirs = load(folder, device="cpu").model
    else:
        theirs = AutoModelForCausalLM.from_pretrained(folder)
        assert AutoTokenizer.from_pretrained(folder)("Lima") == ours.tokenizer("Lima")
    apart = (logits(theirs.eval(), ids) - logits(ours.model, ids)).abs().max()
    assert apart < (1e-4 if kind == "merged" else 1e-6)
    card = huggingface_hub.ModelCard.load(folder / "README.md")
    assert (card.data.base_model, card.data.datasets, card.data.license) == ("you/base", ["you/data"], "mit")
    assert card.data.library_name == ("peft" if kind == "adapters" else "transformers")
    about = json.loads((trained / "training.json").read_text())
    assert f"{about['updates']} updates, seed 0" in card.text
    assert '"learning_rate": ' in card.text
    assert "| loss | 0." in card.text


def test_only_push_uploads(
    dpo_run: tuple[Path, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, Any]] = []

    class Hub:
        def create_repo(self, repo_id: str, **options: Any) -> None:
            calls.append((repo_id, options))

        def upload_folder(self, *, repo_id: str, folder_path: Path, **options: Any) -> None:
            calls.append((repo_id, sorted(path.name for path in folder_path.iterdir())))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    recipe = runpy.run_path(str(RECIPES / "export_to_hub.py"))
    options = [
        str(dpo_run[0]),
        str(tmp_path / "out"),
        "--base",
        "b/b",
        "--dataset",
        "d/d",
        "--license",
        "mit",
    ]
    recipe["main"](options)
    assert calls == []
    recipe["main"]([*options, "--push", "you/model"])
    assert calls[0] == ("you/model", {"private": True, "exist_ok": True})
    assert {"README.md", "model.safetensors", "tokenizer.json"} <= set(calls[1][1])
