"""What ``gpu.py`` measures: one function for each contestant, called in a process of its own.

All sequences are equally long, so both libraries get the same tokens: those of prompt and completion of every sequence
trained on, or of the completions where nothing is trained. The clock starts after the first updates ("warm").
"""

from __future__ import annotations

import warnings
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from lm import SHAPES, Meter

EOS = 1
# A batch counts sequences (SFT), pairs (DPO) or prompts, each with a group of completions. Lengths are in tokens.
GROUPS = {"batch": 8, "group": 8, "prompt": 128, "completion": 128}
FULL: dict[str, dict[str, Any]] = {
    "model": SHAPES["gpu"],
    "sft": {"updates": 24, "warm": 4, "batch": 16, "prompt": 128, "completion": 384},
    "dpo": {"updates": 24, "warm": 4, "batch": 8, "prompt": 128, "completion": 128},
    "grpo": {"updates": 6, "warm": 2} | GROUPS,
    "generation": {"updates": 5, "warm": 1} | GROUPS,
    "ppo": {"updates": 40, "warm": 4, "num_envs": 32, "rollout_steps": 64, "minibatch_size": 512},
    "ppo_tensors": {"updates": 20, "warm": 2, "num_envs": 4096, "rollout_steps": 16, "minibatch_size": 8192},
}
SMALL = {"updates": 2, "warm": 1, "batch": 2, "group": 2, "prompt": 4, "completion": 8, "num_envs": 4,
         "vocab_size": 64, "hidden_size": 28, "intermediate_size": 64, "num_hidden_layers": 2}  # fmt: skip
TINY = {task: {k: SMALL.get(k, v) for k, v in s.items()} for task, s in FULL.items()}


@dataclass(frozen=True)
class Job:
    """What one process measures, and with what."""

    task: str
    contestant: str
    device: str
    settings: dict[str, Any]
    shape: dict[str, Any]
    folder: str

    def model(self) -> Any:
        """Make a random model of Qwen2.5's architecture, and a tokenizer with a word for each id."""
        import torch
        from tokenizers import Tokenizer, models, pre_tokenizers
        from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

        from policyopt.lm import LanguageModel

        words = {"<pad>": 0, "<eos>": EOS} | {f"w{i}": i for i in range(2, self.shape["vocab_size"])}
        tokenizer = Tokenizer(models.WordLevel(words, unk_token="<pad>"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        torch.manual_seed(0)
        config = AutoConfig.for_model(
            **self.shape, tie_word_embeddings=True, bos_token_id=None, eos_token_id=EOS, pad_token_id=0
        )
        with torch.device(self.device), torch.no_grad():
            model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            if "group" in self.settings:
                # EOS never comes: feature 0 is positive and the same in all states, and lowers its logit alone.
                embedding = model.get_input_embeddings().weight
                embedding[:, 0], embedding[EOS, 0] = 0.2, -5000.0
                for name, weight in model.named_parameters():
                    if name.endswith(("o_proj.weight", "down_proj.weight")):
                        weight[0] = 0.0
        fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
        return LanguageModel(model, fast, "random")

    def records(self) -> list[dict[str, str]]:
        """Return random words. Both libraries end a completion with EOS, which counts as one of its tokens."""
        s, generator = self.settings, np.random.default_rng(0)
        columns = {"sft": ("completion",), "dpo": ("chosen", "rejected")}.get(self.task, ())
        lengths = {"prompt": s["prompt"]} | dict.fromkeys(columns, s["completion"] - 1)
        vocabulary = self.shape["vocab_size"]
        return [
            {c: "".join(f" w{i}" for i in generator.integers(2, vocabulary, n)) for c, n in lengths.items()}
            for _ in range(s["updates"] * s["batch"])
        ]

    @property
    def tokens(self) -> int:
        """Tokens of an update."""
        s = self.settings
        length = s["completion"] + (s["prompt"] if self.task != "generation" else 0)
        return int(length * s["batch"] * (2 if self.task == "dpo" else s.get("group", 1)))

    def meter(self) -> Meter:
        """Start the clock."""
        return Meter(self.device == "cuda", self.settings["warm"])


class Stopwatch:
    """Times a function that is called once an update."""

    def __init__(self, function: Callable[..., Any], meter: Meter) -> None:
        self.function, self.meter, self.seconds = function, meter, list[float]()

    def sample(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function."""
        start = self.meter.now()
        result = self.function(*args, **kwargs)
        self.seconds.append(self.meter.now() - start)
        return result

    def share(self) -> float:
        """Return the function's share of the time measured."""
        marks, warm = self.meter.marks, self.meter.warm
        assert len(self.seconds) == len(marks)
        return sum(self.seconds[warm:]) / (marks[-1][0] - marks[warm - 1][0])


def reward(completions: list[str], **columns: Any) -> list[float]:
    """Give every text another number, so that every group teaches something."""
    return [zlib.crc32(str(text).encode()) / 2**32 for text in completions]


def run_policyopt(job: Job) -> dict[str, Any]:
    """Train with policyopt."""
    from policyopt import lm

    s, model, records, meter = job.settings, job.model(), job.records(), job.meter()
    common = {
        "updates": s["updates"],
        "batch_size": s["batch"],
        "learning_rate": 1e-6,
        "autocast": "bfloat16",
    }
    options: dict[str, Any] = {"progress": False, "callback": lambda row: meter.mark(row.update * job.tokens)}
    if job.task != "grpo":
        kind, trainer = {"sft": (lm.SFTConfig, lm.train_sft), "dpo": (lm.DPOConfig, lm.train_dpo)}[job.task]
        trainer(model, records, kind(**common), **options)
        return meter.figures()
    watch = Stopwatch(lm.TransformersSampler(model, autocast=True).sample, meter)
    sampling = lm.SamplingConfig(max_new_tokens=s["completion"])
    config = lm.GRPOConfig(**common, group_size=s["group"], sampling=sampling)
    result = lm.train_grpo(model, records, reward, config, sampler=watch, **options)
    assert not any(row.finished for row in result.history), "a completion ended before its time"
    return meter.figures() | {"sampling_share": watch.share()}


def run_trl(job: Job) -> dict[str, Any]:
    """Train with TRL, in its fastest settings that do the same."""
    import trl
    from datasets import Dataset
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            meter.mark(state.global_step * job.tokens)

    s, model, records, meter = job.settings, job.model(), job.records(), job.meter()
    common: dict[str, Any] = {
        "output_dir": job.folder, "max_steps": s["updates"], "per_device_train_batch_size": s["batch"], "bf16": True,
        "learning_rate": 1e-6, "lr_scheduler_type": "constant", "optim": "adamw_torch_fused",
        "use_cpu": job.device == "cpu", "dataloader_pin_memory": job.device == "cuda", "gradient_checkpointing": False,
        "report_to": "none", "disable_tqdm": True, "logging_strategy": "no", "save_strategy": "no",
    }  # fmt: skip
    if job.task == "sft":
        kind, args = trl.SFTTrainer, trl.SFTConfig(**common, max_length=None)
    elif job.task == "dpo":
        kind, args = trl.DPOTrainer, trl.DPOConfig(**common, max_length=None, precompute_ref_log_probs=True)
    else:
        common["per_device_train_batch_size"] *= s["group"]
        args = trl.GRPOConfig(**common, num_generations=s["group"], max_completion_length=s["completion"])
        kind = trl.GRPOTrainer
    rewards = {"reward_funcs": reward} if job.task == "grpo" else {}
    data = {"train_dataset": Dataset.from_list(records), "processing_class": model.tokenizer}
    trainer = kind(model.model, args=args, callbacks=[Watch()], **data, **rewards)
    watch = Stopwatch(model.model.generate, meter)
    model.model.generate = watch.sample
    trainer.train()
    return meter.figures() | ({"sampling_share": watch.share()} if rewards else {})


def run_generation(job: Job) -> dict[str, Any]:
    """Sample and train nothing. policyopt returns log-probabilities as well."""
    import torch

    from policyopt.lm import SamplingConfig, TransformersSampler

    s, model = job.settings, job.model()
    ids = [model.tokenizer(record["prompt"]).input_ids for record in job.records()]
    meter = job.meter()
    for update in range(s["updates"]):
        prompts = ids[update * s["batch"] : (update + 1) * s["batch"]]
        with torch.no_grad(), torch.autocast(job.device, torch.bfloat16):
            if job.contestant == "policyopt":
                config = SamplingConfig(max_new_tokens=s["completion"])
                TransformersSampler(model).sample(prompts, s["group"], config, seed=update)
            else:
                batch = torch.tensor(prompts, device=job.device)
                model.model.generate(
                    batch, attention_mask=torch.ones_like(batch), num_return_sequences=s["group"], do_sample=True,
                    max_new_tokens=s["completion"], temperature=1.0, top_k=0, top_p=1.0,
                )  # fmt: skip
        meter.mark((update + 1) * job.tokens)
    return meter.figures()


def run_ppo(job: Job) -> dict[str, Any]:
    """Train PPO on CartPole: Gymnasium's on the CPU, or the book's of tensors where the networks are."""
    from policyopt.control import PPOConfig, train_ppo
    from policyopt_book.tasks.tensor_envs import CartPole

    s, meter = job.settings, job.meter()
    sizes = {name: s[name] for name in ("num_envs", "rollout_steps", "minibatch_size")}
    place = "cpu" if "CPU" in job.contestant else job.device
    config = PPOConfig(total_steps=s["updates"] * s["num_envs"] * s["rollout_steps"], device=place, **sizes)
    env = CartPole(s["num_envs"], device=place) if job.task == "ppo_tensors" else "CartPole-v1"
    train_ppo(env, config, progress=False, callback=lambda row: meter.mark(row.steps))
    figures = meter.figures()
    return {"steps_per_second": figures["tokens_per_second"], "seconds": figures["seconds"]}


LEARNERS = {"policyopt": run_policyopt, "TRL": run_trl}
PARTS: dict[str, dict[str, Callable[[Job], dict[str, Any]]]] = {
    "sft": LEARNERS, "dpo": LEARNERS, "grpo": LEARNERS,
    "generation": {"policyopt": run_generation, "transformers": run_generation},
    "ppo": {"networks on the GPU": run_ppo, "networks on the CPU": run_ppo},
    "ppo_tensors": {"all on the GPU": run_ppo, "all on the CPU": run_ppo},
}  # fmt: skip


def work(job: Job, answer: Any) -> None:
    """Measure one part, and send its figures or why there are none."""
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(1 if job.device == "cpu" else 8)
    try:
        figures = PARTS[job.task][job.contestant](job)
        kept = ("tokens_per_second", "steps_per_second", "sampling_share", "memory_peak", "seconds")
        answer.send({name: figures[name] for name in kept if name in figures})
    except Exception as error:
        answer.send({"skipped": f"{type(error).__name__}: {str(error)[:300]}"})
