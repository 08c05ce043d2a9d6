"""Measure SFT, DPO, GRPO and generation against TRL and transformers, and write the book's page.

    python benchmarks/lm.py [--seeds 5] [--device cpu|cuda] [--scales tiny] [--page book/benchmarks-lm.md]

Every run is a process of its own; contestants take turns, and each seed begins with the other one, so that a machine
whose speed drifts slows them alike. Ratios are formed within a seed. On the CPU (one thread) a second is a CPU second;
on CUDA it is a second. ``--device cpu`` measures three models, the book's ``news-sft`` and random ones of 13 and 135
million parameters; ``--device cuda`` one, random, with the shape of Qwen2.5-0.5B, under bfloat16 autocast.

Tokens are those of the real sequences: prompt and completion of every sequence trained on (the completion alone where
nothing is trained), padding left out, counted alike for both libraries. The clock starts after the first steps, which
pay for what only they cost.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import importlib.metadata
import json
import logging
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
import warnings
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from control import spread
from policyopt_book.studies import processor

REPOSITORY = Path(__file__).resolve().parent.parent
RAW = Path(__file__).with_suffix(".json")
SCALES = {"cpu": ("tiny", "small", "medium"), "cuda": ("gpu",)}
PEERS = {
    "sft": ["trl"], "dpo": ["trl", "trl-compact"], "grpo": ["trl", "trl-compact"], "generation": ["transformers"],
}  # fmt: skip

# What both libraries run with. A batch of SFT counts completions, one of DPO pairs, of GRPO and of generation prompts.
SETTINGS: dict[str, dict[str, dict[str, Any]]] = {
    "tiny": {
        "sft": {"steps": 96, "warm": 6, "batch": 64, "learning_rate": 6e-4},
        "dpo": {"steps": 96, "warm": 6, "batch": 64, "learning_rate": 6e-4, "beta": 0.1},
        "grpo": {"steps": 40, "warm": 3, "batch": 16, "group": 8, "tokens": 64, "learning_rate": 1e-3, "beta": 0.05},
        "generation": {"steps": 16, "warm": 2, "batch": 16, "group": 8, "tokens": 64},
    },
    "small": {
        "sft": {"steps": 8, "warm": 2, "batch": 16, "learning_rate": 1e-5},
        "dpo": {"steps": 8, "warm": 2, "batch": 8, "learning_rate": 1e-5, "beta": 0.1},
        "grpo": {"steps": 4, "warm": 1, "batch": 4, "group": 8, "tokens": 32, "learning_rate": 1e-5, "beta": 0.05},
        "generation": {"steps": 5, "warm": 1, "batch": 4, "group": 8, "tokens": 32},
    },
    "medium": {
        "sft": {"steps": 4, "warm": 1, "batch": 8, "learning_rate": 1e-5},
        "dpo": {"steps": 4, "warm": 1, "batch": 4, "learning_rate": 1e-5, "beta": 0.1},
        "grpo": {"steps": 3, "warm": 1, "batch": 2, "group": 8, "tokens": 32, "learning_rate": 1e-5, "beta": 0.05},
        "generation": {"steps": 3, "warm": 1, "batch": 2, "group": 8, "tokens": 32},
    },
    "gpu": {
        "sft": {"steps": 24, "warm": 4, "batch": 32, "learning_rate": 1e-6},
        "dpo": {"steps": 24, "warm": 4, "batch": 16, "learning_rate": 1e-6, "beta": 0.1},
        "grpo": {"steps": 12, "warm": 2, "batch": 16, "group": 8, "tokens": 128, "learning_rate": 1e-6, "beta": 0.05},
        "generation": {"steps": 8, "warm": 2, "batch": 16, "group": 8, "tokens": 128},
    },
}  # fmt: skip
# Random models. The tokenizer is that of the book's tiny models: it uses the first 640 tokens of each vocabulary.
SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "model_type": "llama", "vocab_size": 32_000, "hidden_size": 256, "intermediate_size": 688,
        "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 8,
    },
    "medium": {
        "model_type": "llama", "vocab_size": 49_152, "hidden_size": 576, "intermediate_size": 1536,
        "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
    },
    "gpu": {
        "model_type": "qwen2", "vocab_size": 151_936, "hidden_size": 896, "intermediate_size": 4864,
        "num_hidden_layers": 24, "num_attention_heads": 14, "num_key_value_heads": 2,
    },
}  # fmt: skip
CLIP = 0.2
PAIRS, PROMPTS, HELD_OUT = 2048, 640, 256


# --- the clock and the scales ---------------------------------------------------------------------------------


def resident(name: str) -> float:
    """Read a line of this process's status, MiB: ``VmRSS`` (resident now) or ``VmHWM`` (the most since a reset).

    NaN where there is no such file, that is, not on Linux.
    """
    status = Path("/proc/self/status")
    found = re.search(rf"^{name}:\s+(\d+) kB", status.read_text() if status.exists() else "", re.MULTILINE)
    return int(found[1]) / 1024 if found else float("nan")


@dataclass
class Meter:
    """Seconds, tokens and memory of one run. Made when all is loaded, before the trainer is called."""

    cuda: bool
    warm: int
    """Steps before the clock starts."""
    marks: list[tuple[float, int]] = field(default_factory=list)
    """Seconds and tokens so far at the end of each step."""

    def __post_init__(self) -> None:
        gc.collect()
        if self.cuda:
            import torch

            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            self.before = torch.cuda.memory_allocated() / 2**20
        else:
            if sys.platform == "linux":
                ctypes.CDLL(None).malloc_trim(0)
                Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to VmRSS
            self.before = resident("VmRSS")
        self.started = self.now()

    def now(self) -> float:
        """Return the seconds that count: the CPU's, or those on the wall when a GPU works."""
        if not self.cuda:
            return time.process_time()
        import torch

        torch.cuda.synchronize()
        return time.perf_counter()

    def mark(self, tokens: int) -> None:
        """Note the end of a step; ``tokens`` are those so far."""
        self.marks.append((self.now(), tokens))

    def figures(self) -> dict[str, float]:
        """Sum up, when the trainer has returned."""
        seconds, peak = self.now() - self.started, resident("VmHWM")
        if self.cuda:
            import torch

            peak = torch.cuda.max_memory_allocated() / 2**20
        (first, skipped), (last, tokens) = self.marks[self.warm - 1], self.marks[-1]
        return {
            "tokens_per_second": (tokens - skipped) / (last - first),
            "tokens": tokens,
            "seconds": seconds,
            "memory_growth": peak - self.before,
            "memory_peak": peak,
        }


@dataclass(frozen=True)
class Job:
    """One run: what a child process is asked to do."""

    contestant: str
    task: str
    scale: str
    seed: int
    folder: Path
    """Holds the model and the data, see :func:`prepare`."""

    @property
    def cuda(self) -> bool:
        """Whether a GPU works."""
        return self.scale == "gpu"

    @property
    def device(self) -> str:
        """PyTorch's name of the device."""
        return "cuda" if self.cuda else "cpu"

    @property
    def settings(self) -> dict[str, Any]:
        """What both libraries run with."""
        return SETTINGS[self.scale][self.task]

    def load(self) -> Any:
        """Load the model."""
        from policyopt.lm.models import load

        return load(self.folder / "model", device=self.device)

    def read(self, name: str) -> list[dict[str, Any]]:
        """Read the records of a file of :func:`prepare`."""
        return [json.loads(line) for line in (self.folder / f"{name}.jsonl").read_text().splitlines()]

    def meter(self) -> Meter:
        """Start the clock and the scales."""
        return Meter(self.cuda, self.settings["warm"])

    def autocast(self) -> AbstractContextManager[Any]:
        """Return the context that generation runs in; trainers have their own."""
        import torch

        return torch.autocast(self.device, torch.bfloat16, enabled=self.cuda)


# --- the data -------------------------------------------------------------------------------------------------


def chosen(job: Job, name: str = "pairs") -> list[dict[str, Any]]:
    """Return the preferred completions as data for SFT."""
    return [{"prompt": row["prompt"], "completion": row["chosen"]} for row in job.read(name)]


def prepare(folder: Path, scale: str) -> None:
    """Write the model and the data that all runs share."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    from policyopt.lm.sampling import SamplingConfig, generate
    from policyopt_book import load_model
    from policyopt_book.tasks import news

    def write(name: str, records: list[dict[str, Any]]) -> None:
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))

    model = load_model("news-sft", device="cpu")
    # Two samples of each item, compared by the simulated annotator.
    items, pairs = news.make_items(PAIRS + 2 * HELD_OUT, seed=1), []
    for start in range(0, len(items), 256):
        part = items[start : start + 256]
        texts = generate(
            model, [item.prompt for item in part], SamplingConfig(), samples_per_prompt=2, seed=start
        )
        pairs += news.preference_pairs(part, texts, seed=start)
    prompts = news.prompt_records(news.make_items(PROMPTS + HELD_OUT, seed=2))
    # No more pairs than there are steps for: the reference's log-probabilities are computed for all of them.
    dpo, sft = SETTINGS[scale]["dpo"], SETTINGS[scale]["sft"]
    most = max(s["steps"] * s["batch"] for s in (dpo, sft))
    write("pairs", pairs[: min(PAIRS, most)])
    write("held-out-pairs", pairs[PAIRS : PAIRS + HELD_OUT])
    write("prompts", prompts[:PROMPTS])
    write("held-out-prompts", prompts[PROMPTS:])
    if scale in SHAPES:
        torch.manual_seed(0)
        ends = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        shape = AutoConfig.for_model(**SHAPES[scale], **ends, tie_word_embeddings=True)
        model.model = AutoModelForCausalLM.from_config(shape)
    model.save(folder / "model")


# --- policyopt ------------------------------------------------------------------------------------------------


def policyopt_settings(job: Job) -> dict[str, Any]:
    """Return what the configs of both trainers share."""
    s = job.settings
    shared = {
        "updates": s["steps"],
        "batch_size": s["batch"],
        "learning_rate": s["learning_rate"],
    } | ({"beta": s["beta"]} if "beta" in s else {})
    return shared | {"autocast": "bfloat16" if job.cuda else None}


def count_prompts(job: Job, model: Any, records: list[dict[str, Any]], each: int) -> Any:
    """Return a function of a row of the history: prompt tokens in that step's batch, ``each`` times."""
    from policyopt.lm.data import batch_indices, encode_prompt

    lengths = [len(encode_prompt(model.tokenizer, record["prompt"])) for record in records]

    def count(row: Any) -> int:
        indices = batch_indices(len(lengths), job.settings["batch"], row.update - 1, job.seed)
        return each * sum(lengths[i] for i in indices)

    return count


def policyopt_sft(job: Job) -> dict[str, float]:
    """Train with :func:`policyopt.lm.sft.train_sft`, on the preferred completions."""
    from policyopt.lm.sft import SFTConfig, train_sft

    model, records = job.load(), chosen(job)
    prompts_of, prompt_tokens = count_prompts(job, model, records, 1), 0

    def callback(row: Any) -> None:
        nonlocal prompt_tokens
        prompt_tokens += prompts_of(row)
        meter.mark(row.tokens + prompt_tokens)

    meter = job.meter()
    config = SFTConfig(**policyopt_settings(job))
    train_sft(model, records, config, seed=job.seed, callback=callback, progress=False)
    return meter.figures() | judge_sft(job, model)


def policyopt_dpo(job: Job) -> dict[str, float]:
    """Train with :func:`policyopt.lm.dpo.train_dpo`."""
    from policyopt.lm.dpo import DPOConfig, train_dpo

    model, pairs = job.load(), job.read("pairs")
    prompts_of, prompt_tokens = count_prompts(job, model, pairs, 2), 0
    config = DPOConfig(**policyopt_settings(job))

    def callback(row: Any) -> None:
        nonlocal prompt_tokens
        prompt_tokens += prompts_of(row)
        meter.mark(row.tokens + prompt_tokens)

    meter = job.meter()
    train_dpo(model, pairs, config, seed=job.seed, callback=callback, progress=False)
    return meter.figures() | judge_dpo(job, model)


def policyopt_grpo(job: Job) -> dict[str, float]:
    """Train with :func:`policyopt.lm.grpo.train_grpo`."""
    from policyopt.lm.grpo import GRPOConfig, train_grpo
    from policyopt.lm.sampling import SamplingConfig
    from policyopt_book.tasks.news import utility_reward

    s, model, prompts = job.settings, job.load(), job.read("prompts")
    prompts_of, prompt_tokens = count_prompts(job, model, prompts, s["group"]), 0
    config = GRPOConfig(
        group_size=s["group"], clip_ratio=CLIP, loss_mean="token",
        sampling=SamplingConfig(max_new_tokens=s["tokens"]), **policyopt_settings(job),
    )  # fmt: skip

    def callback(row: Any) -> None:
        nonlocal prompt_tokens
        prompt_tokens += prompts_of(row)
        meter.mark(row.tokens + prompt_tokens)

    meter = job.meter()
    train_grpo(model, prompts, utility_reward, config, seed=job.seed, callback=callback, progress=False)
    return meter.figures() | judge_grpo(job, model)


def policyopt_generation(job: Job) -> dict[str, float]:
    """Sample with :class:`policyopt.lm.sampling.TransformersSampler`, log-probabilities included."""
    from policyopt.lm.sampling import SamplingConfig, TransformersSampler

    s, model, tokens = job.settings, job.load(), 0
    batches = prompt_batches(job, model.tokenizer)
    sampler, config = TransformersSampler(model), SamplingConfig(max_new_tokens=s["tokens"])
    meter = job.meter()
    for i, prompts in enumerate(batches):
        with job.autocast():
            samples = sampler.sample(prompts, s["group"], config, seed=1000 * job.seed + i)
        tokens += int(samples.sequences.lengths.sum())
        meter.mark(tokens)
    return meter.figures()


# --- TRL and transformers -------------------------------------------------------------------------------------


def trl_settings(job: Job) -> dict[str, Any]:
    """Return what the configs of both trainers share: our settings, and off what costs time and teaches nothing."""
    s = job.settings
    return {
        "output_dir": str(job.folder / "trl"), "max_steps": s["steps"], "seed": job.seed,
        "learning_rate": s["learning_rate"], "lr_scheduler_type": "constant", "weight_decay": 0.0,
        "adam_beta1": 0.9, "adam_beta2": 0.999, "max_grad_norm": 1.0, "optim": "adamw_torch_fused",
        "gradient_checkpointing": False, "bf16": job.cuda, "use_cpu": not job.cuda, "dataloader_num_workers": 0,
        "dataloader_pin_memory": job.cuda, "report_to": "none", "logging_strategy": "no", "save_strategy": "no",
        "eval_strategy": "no", "disable_tqdm": True, **({"beta": s["beta"]} if "beta" in s else {}),
    }  # fmt: skip


def trl_sft(job: Job) -> dict[str, float]:
    """Train with TRL's SFTTrainer."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    tokens = 0

    class Counting(SFTTrainer):  # type: ignore[misc,unused-ignore]
        def training_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
            nonlocal tokens
            tokens += int(inputs["attention_mask"].sum())
            return super().training_step(model, inputs, *args, **kwargs)

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            meter.mark(tokens)

    model, records = job.load(), Dataset.from_list(chosen(job))
    meter = job.meter()
    args = SFTConfig(per_device_train_batch_size=job.settings["batch"], max_length=None, **trl_settings(job))
    trainer = Counting(
        model.model, args=args, train_dataset=records, processing_class=model.tokenizer, callbacks=[Watch()]
    )
    trainer.train()
    return meter.figures() | judge_sft(job, model)


def compact() -> None:
    """Make TRL's head skip the prompt and the padding, as it does on GPUs."""
    import trl.trainer.utils

    trl.trainer.utils._use_triton = lambda device: True


def trl_dpo(job: Job) -> dict[str, float]:
    """Train with TRL's DPOTrainer."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import DPOConfig, DPOTrainer

    class Watch(TrainerCallback):
        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            meter.mark(int(trainer._total_train_tokens))  # TRL's own count of tokens that are not padding

    model, batch = job.load(), job.settings["batch"]
    pairs = Dataset.from_list(
        [{k: row[k] for k in ("prompt", "chosen", "rejected")} for row in job.read("pairs")]
    )
    meter = job.meter()
    args = DPOConfig(
        per_device_train_batch_size=batch, precompute_ref_log_probs=True, max_length=None, **trl_settings(job)
    )
    trainer = DPOTrainer(
        model.model, args=args, train_dataset=pairs, processing_class=model.tokenizer, callbacks=[Watch()]
    )
    trainer.train()
    return meter.figures() | judge_dpo(job, model)


def trl_grpo(job: Job) -> dict[str, float]:
    """Train with TRL's GRPOTrainer."""
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    from policyopt_book.tasks.news import utility_reward

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            meter.mark(int(state.num_input_tokens_seen))

    s, model, prompts = job.settings, job.load(), Dataset.from_list(job.read("prompts"))
    meter = job.meter()
    # Its loss "dapo" is our loss_mean="token"; its weighting of the KL term is one that we do not have.
    args = GRPOConfig(
        per_device_train_batch_size=s["batch"] * s["group"], num_generations=s["group"],
        max_completion_length=s["tokens"], loss_type="dapo", epsilon=CLIP, use_bias_correction_kl=False,
        **trl_settings(job),
    )  # fmt: skip
    trainer = GRPOTrainer(
        model.model, utility_reward, args=args, train_dataset=prompts, processing_class=model.tokenizer,
        callbacks=[Watch()],
    )  # fmt: skip
    trainer.train()
    return meter.figures() | judge_grpo(job, model)


def transformers_generation(job: Job) -> dict[str, float]:
    """Sample with ``model.generate``, without log-probabilities."""
    import torch

    s, tokens = job.settings, 0
    model, tokenizer = (loaded := job.load()).model, loaded.tokenizer
    batches = prompt_batches(job, tokenizer)
    torch.manual_seed(job.seed)
    meter = job.meter()
    for prompts in batches:
        inputs = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(
            job.device
        )
        with torch.no_grad(), job.autocast():
            ids = model.generate(
                **inputs, num_return_sequences=s["group"], max_new_tokens=s["tokens"], do_sample=True,
                temperature=1.0, top_k=0, top_p=1.0,
            )  # fmt: skip
        ended = ids[:, inputs["input_ids"].shape[1] :] == tokenizer.eos_token_id
        tokens += int(((ended.cumsum(1) - ended.long()) == 0).sum())
        meter.mark(tokens)
    return meter.figures()


def prompt_batches(job: Job, tokenizer: Any) -> list[list[list[int]]]:
    """Token ids of the prompts of each step."""
    ids = [tokenizer(record["prompt"]).input_ids for record in job.read("prompts")]
    size = job.settings["batch"]
    return [ids[i * size : (i + 1) * size] for i in range(job.settings["steps"])]


# --- the examination: the same for both -----------------------------------------------------------------------


def sampled_utility(model: Any, records: list[dict[str, Any]]) -> float:
    """Mean true utility of four sampled summaries of each item."""
    from policyopt.lm.sampling import SamplingConfig, generate
    from policyopt_book.tasks.news import utility

    prompts = [record["prompt"] for record in records]
    texts = generate(model, prompts, SamplingConfig(), samples_per_prompt=4, seed=12345)
    return float(
        np.mean([utility(t, r["facts"]) for row, r in zip(texts, records, strict=True) for t in row])
    )


def judge_sft(job: Job, model: Any) -> dict[str, float]:
    """Return −log π per token of held-out completions; nothing for random weights."""
    import torch

    from policyopt.lm.log_probs import completion_log_probs

    if job.scale in SHAPES:
        return {}
    rows = chosen(job, "held-out-pairs")
    sequences = model.encode([row["prompt"] for row in rows], [row["completion"] for row in rows])
    model.model.eval()
    with torch.no_grad():
        log_probs = completion_log_probs(model.model, sequences).log_probs
    return {"held-out loss": float(-log_probs.sum() / sequences.completion_mask.sum())}


def judge_dpo(job: Job, model: Any) -> dict[str, float]:
    """Margin and accuracy on held-out pairs, and the true utility of samples; nothing for random weights."""
    import torch

    from policyopt.lm.log_probs import completion_log_probs

    if job.scale in SHAPES:
        return {}
    rows = job.read("held-out-pairs")
    sequences = model.encode(
        [row["prompt"] for row in rows], [row[column] for row in rows for column in ("chosen", "rejected")]
    )
    model.model.eval()
    with torch.no_grad():
        policy, reference = (
            completion_log_probs(m.model, sequences).log_probs.sum(1) for m in (model, job.load())
        )
    chosen, rejected = (job.settings["beta"] * (policy - reference)).view(-1, 2).unbind(1)
    return {
        "held-out margin": float((chosen - rejected).mean()),
        "held-out accuracy": float((chosen > rejected).float().mean()),
        "utility": sampled_utility(model, rows),
    }


def judge_grpo(job: Job, model: Any) -> dict[str, float]:
    """Return the true utility of samples for held-out prompts; nothing for random weights."""
    if job.scale in SHAPES:
        return {}
    model.model.eval()
    return {"utility": sampled_utility(model, job.read("held-out-prompts"))}


# --- processes ------------------------------------------------------------------------------------------------

CONTESTANTS = {
    ("policyopt", "sft"): policyopt_sft,
    ("trl", "sft"): trl_sft,
    ("policyopt", "dpo"): policyopt_dpo,
    ("trl", "dpo"): trl_dpo,
    ("policyopt", "grpo"): policyopt_grpo,
    ("trl", "grpo"): trl_grpo,
    ("policyopt", "generation"): policyopt_generation,
    ("transformers", "generation"): transformers_generation,
}


def child(job: Job) -> None:
    """Run one contestant and print its figures as one JSON line."""
    import torch

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if not job.cuda:
        torch.set_num_threads(1)
    library, _, changed = job.contestant.partition("-")
    if changed:
        compact()
    print("\nRESULT " + json.dumps(CONTESTANTS[library, job.task](job)))


def measure(job: Job) -> dict[str, Any]:
    """Run :func:`child` in a process of its own."""
    command = [
        sys.executable,
        __file__,
        "--child",
        job.contestant,
        job.task,
        job.scale,
        str(job.seed),
        str(job.folder),
    ]
    environment = os.environ | {"TQDM_DISABLE": "1", "HF_HUB_OFFLINE": "1"}
    # A cache of an earlier run would spare a library its own work.
    environment["HF_DATASETS_CACHE"] = str(job.folder / f"cache-{job.task}-{job.seed}")
    if not job.cuda:
        environment |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{job} failed:\n{done.stderr[-3000:]}")
    figures: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return figures


def compare(scale: str, seeds: int) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Run all contestants, seed by seed, and return their figures by task and contestant."""
    runs: dict[str, dict[str, list[Any]]] = {
        task: {name: [] for name in ["policyopt", *peers]} for task, peers in PEERS.items()
    }
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare(folder, scale)
        for seed in range(seeds):
            for task, table in runs.items():
                order = list(table) if seed % 2 == 0 else list(table)[::-1]
                for contestant in order:
                    table[contestant].append(measure(Job(contestant, task, scale, seed, folder)))
                    print(scale, task, seed, contestant, table[contestant][-1], flush=True)
    return runs


# --- the page -------------------------------------------------------------------------------------------------

MODELS = {
    "tiny": """## The tiny model

`news-sft`, a tiny Llama of the book: 64 wide, 3 layers, vocabulary 640, 0.18 M parameters, float32. Its data are news
briefs: about 41 tokens of prompt and 17 of completion.
""",
    "small": """## A larger model

A Llama with random weights: 256 wide, 6 layers, vocabulary 32,000, 13 M parameters, float32. The data are the same.
There is nothing to be learned in a few steps, so only speed and memory are compared.
""",
    "medium": """## A model of 135 million parameters

A Llama of SmolLM2-135M's shape with random weights: 576 wide, 30 layers, vocabulary 49,152, float32. Again only speed
and memory are compared.
""",
    "gpu": """## On a GPU

A model of Qwen2.5-0.5B's shape with random weights: 896 wide, 24 layers, vocabulary 151,936, float32 weights under
bfloat16 autocast. Seconds are seconds on the wall; memory is what PyTorch allocated on the GPU.
""",
}
INTRODUCTION = """# Speed: language models

% Written by benchmarks/lm.py (make bench). Do not edit by hand.

How fast are `train_sft`, `train_dpo`, `train_grpo` and the sampler beside
[TRL](https://github.com/huggingface/trl), which most people would use instead, and beside `transformers.generate`?
This page is written by `make bench`.

Every run is a process of its own. Contestants take turns, and ratios are formed within a seed. On the CPU each has
one thread, and seconds are CPU seconds. Tokens are those of prompt and completion of every sequence trained on,
without padding, counted alike. *Whole call* includes what comes before the first step: tokenising, and the
reference's log-probabilities. *Memory on top* is the highest memory during the call minus that before it, when
libraries, model and data were loaded. *True utility* is that of samples for 256 unseen items, drawn by the same
sampler from both trained models. *TRL, compact* is TRL with one line changed: its head skips prompt and padding, as it
does on GPUs; on a CPU it computes them, in the belief that it will be compiled.
"""
NOTES = """## What is compared, and what is not

- Same data, batch sizes, steps, optimiser (fused AdamW), learning rate, gradient norm limit, β and clip range. Given
  one batch, the losses and gradients of both libraries are equal; `tests/lm/test_trl_parity.py` checks it. The order of
  the data and the samples drawn differ.
- TRL has its best settings here: no gradient checkpointing, no logging, no evaluation, no checkpoints, reference
  log-probabilities precomputed (DPO), no second pass for old log-probabilities (GRPO). Its `padding_free` is
  switched off in this version. Eager attention and a
  static cache changed its speed by at most 6 % when tried; `torch.compile` slowed DPO by a third.
- TRL computes more statistics in each step (entropy, token accuracy, mean logits) and cannot be told not to.
- TRL has much that policyopt has not: many more losses, vision models, tools and DeepSpeed. Part of its time
  is the price of that.
- The sampler returns log-probabilities as well; `transformers.generate` was not asked for them.

## Where the speed comes from

- Each prompt is read once for all its completions, in sampling and in training: its keys and values are shared,
  with their gradients. TRL reads it once per completion. The longer the prompt and the larger the group, the more
  this saves; with one completion per prompt it saves nothing.
- The head's logits are computed at completion tokens alone. On a CPU, TRL computes them at every position.
- Completions that have ended leave the batch that is being sampled.
- The trainer's loop does little else.
"""
TASKS = {"sft": "SFT", "dpo": "DPO", "grpo": "GRPO", "generation": "Generation"}
LABELS = {
    "policyopt": "policyopt",
    "trl": "TRL",
    "trl-compact": "TRL, compact",
    "transformers": "`transformers.generate`",
}
COLUMNS = {
    "tokens_per_second": ("tokens per second", 0),
    "seconds": ("seconds, whole call", 1),
    "memory_growth": ("memory on top, MiB", 0),
    "memory_peak": ("memory of the process, MiB", 0),
    "held-out loss": ("held-out loss, nats per token", 3),
    "held-out margin": ("held-out margin", 2),
    "held-out accuracy": ("held-out accuracy", 3),
    "utility": ("true utility of samples", 2),
}


def describe(task: str, settings: dict[str, Any]) -> str:
    """Say in one sentence what was run."""
    s, warm = settings, settings["warm"]
    one, several = ("batch", "batches") if task == "generation" else ("step", "steps")
    untimed = f"the first {one} is" if warm == 1 else f"the first {warm} {several} are"
    if task == "sft":
        return (
            f"{s['steps']} steps of {s['batch']} completions, AdamW with a constant learning rate of "
            f"{s['learning_rate']:g}; {untimed} not timed."
        )
    if task == "dpo":
        return (
            f"{s['steps']} steps of {s['batch']} pairs, β = {s['beta']:g}, AdamW with a constant learning rate of "
            f"{s['learning_rate']:g}; {untimed} not timed."
        )
    if task == "grpo":
        return (
            f"{s['steps']} steps of {s['batch']} prompts × {s['group']} samples of at most {s['tokens']} tokens, one "
            f"update per batch, β = {s['beta']:g}, AdamW with a constant learning rate of {s['learning_rate']:g}; "
            f"{untimed} not timed. The reward is the exact utility."
        )
    return (
        f"{s['steps']} batches of {s['batch']} prompts × {s['group']} samples of at most {s['tokens']} tokens, "
        f"temperature 1; {untimed} not timed. Tokens are those of the completions."
    )


def tables(scale: str, part: dict[str, Any]) -> list[str]:
    """Write the figures of one model."""
    versions = ", ".join(f"{name} {version}" for name, version in part["versions"].items())
    lines = [MODELS[scale]]
    for task, runs in part["runs"].items():
        rows = runs["policyopt"]
        columns = [name for name in COLUMNS if name in rows[0]]
        if scale == "gpu":
            columns.remove("memory_peak" if task != "generation" else "memory_growth")
        heads = [COLUMNS[name][0] for name in columns]
        lines += [f"### {TASKS[task]}", "", describe(task, SETTINGS[scale][task]), ""]
        lines += ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(heads)]
        for contestant, figures in runs.items():
            cells = [spread([row[name] for row in figures], COLUMNS[name][1]) for name in columns]
            lines.append(f"| {LABELS[contestant]} | " + " | ".join(cells) + " |")
        for peer in list(runs)[1:]:
            ratios = {
                name: [a[name] / b[name] for a, b in zip(rows, runs[peer], strict=True)]
                for name in columns
                if name in ("tokens_per_second", "seconds", "memory_growth", "memory_peak")
            }
            cells = [spread(ratios[name], 2) + " ×" if name in ratios else "" for name in columns]
            lines.append(f"| *policyopt over {LABELS[peer]}* | " + " | ".join(cells) + " |")
        lines.append("")
    lines += [
        f"Median (range), number of seeds: {len(rows)}. Measured on {part['date']} on {part['hardware']}. "
        f"Python {part['python']}, {versions}.",
        "",
    ]
    return lines


def page(results: dict[str, Any]) -> str:
    """Write the figures as the book's page (MyST Markdown)."""
    parts = [tables(scale, results[scale]) for scale in MODELS if scale in results]
    return "\n".join([INTRODUCTION, *(line for part in parts for line in part), NOTES])


def hardware(device: str) -> str:
    """Name the processor, or the GPU."""
    if device == "cpu":
        return f"one core of: {processor()}"
    import torch

    return f"one {torch.cuda.get_device_name()}"


def main() -> None:
    """Measure, save the raw figures beside this script, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--device", choices=list(SCALES), default="cpu")
    parser.add_argument(
        "--scales", nargs="+", help="of the device's models, measure these; others keep their figures"
    )
    parser.add_argument("--page", type=Path, default=REPOSITORY / "book" / "benchmarks-lm.md")
    parser.add_argument("--child", nargs=5, metavar=("CONTESTANT", "TASK", "SCALE", "SEED", "FOLDER"))
    options = parser.parse_args()
    if options.child:
        contestant, task, scale, seed, folder = options.child
        child(Job(contestant, task, scale, int(seed), Path(folder)))
        return

    packages = ["policyopt", "torch", "transformers", "trl", "accelerate", "datasets"]
    results = json.loads(RAW.read_text()) if RAW.exists() else {}
    for scale in options.scales or SCALES[options.device]:
        if scale not in SCALES[options.device]:
            parser.error(f"--scales for {options.device}: {', '.join(SCALES[options.device])}; got {scale!r}")
        results[scale] = {
            "date": datetime.now(UTC).date().isoformat(),
            "hardware": hardware(options.device),
            "python": platform.python_version(),
            "versions": {name: importlib.metadata.version(name) for name in packages},
            "runs": compare(scale, options.seeds),
        }
    RAW.write_text(json.dumps(results, indent=1) + "\n")
    options.page.write_text(page(results))
    print(f"wrote {options.page}")


if __name__ == "__main__":
    main()
