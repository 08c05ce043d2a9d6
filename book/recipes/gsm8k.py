r"""GRPO on grade-school mathematics, for one GPU: ``python gsm8k.py --output runs/gsm8k``.

Needs the extra ``lm`` of the package (``pip install -e '.[lm]'`` in a clone) and ``pip install datasets``. GSM8K (Cobbe
et al. 2021, arXiv:2110.14168; MIT) has 7,473 training and 1,319 test problems in words. A rule reads the number after
the last ``####`` (or in the last ``\boxed{}``) of a solution: right is worth 1, wrong nothing, and an answer in the
form asked for a little, so that a model that has not found the form yet has something to learn from.

The run can be stopped and started again with the same command: it goes on from its last checkpoint.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from policyopt.lm import (
    GRPOConfig,
    LanguageModel,
    LMResult,
    Sampler,
    SamplingConfig,
    TransformersSampler,
    VLLMSampler,
    load,
    read_records,
    train_grpo,
)
from policyopt.lm.data import Records, encode_prompt
from policyopt.lm.rewards import RewardFunction
from policyopt_book.memory import estimate_memory
from policyopt_book.tasks.gsm8k import final_number, final_number_reward

MODEL = "Qwen/Qwen2.5-0.5B-Instruct"
"""Apache-2.0, 0.49 billion parameters; any chat model will do."""

INSTRUCTION = "Reason step by step. Write the answer, a number alone, on the last line after ####."
"""The system message of every problem."""


def form_reward(completions: Sequence[str], finished: Sequence[bool]) -> list[float]:
    """Reward function: 1 where a completion ended by itself and declares one number as its answer, else 0."""
    return [
        float(end and final_number(text) is not None) for text, end in zip(completions, finished, strict=True)
    ]


REWARDS: dict[str, RewardFunction] = {"right": final_number_reward, "form": form_reward}
"""Weighted by ``CONFIG.reward_weights``."""

CONFIG = GRPOConfig(
    updates=300,
    batch_size=16,  # prompts, so 128 completions an update
    group_size=8,
    sampling=SamplingConfig(max_new_tokens=400),
    reward_weights=(1.0, 0.1),
    learning_rate=1e-6,  # all weights are trained; adapters take ten to thirty times as much
    warmup_updates=10,
    adam_betas=(0.9, 0.99),
    max_gradient_norm=0.2,
    clip_ratio_high=0.28,  # no effect with one update per batch; there for those who make several
    loss_mean="token",
    beta=0.0,  # no reference is kept. Read samples all the same: a model finds what a rule does not see
    autocast="bfloat16",
    gradient_checkpointing=True,
    micro_batch_size=16,
    checkpoint_every=25,
    logged_samples=4,
)
"""The settings, chosen for one GPU with 24 GB or more."""


def math_records(data: Records) -> list[dict[str, Any]]:
    r"""Turn records with the columns ``question`` and ``answer`` into chat prompts with an ``answer`` column.

    Examples
    --------
    >>> math_records([{"question": "What is 1 + 1?", "answer": "It is 2.\n#### 2"}])[0]["prompt"][0]["role"]
    'system'
    """
    records = read_records(data)
    for i, record in enumerate(records):
        missing = {"question", "answer"} - record.keys()
        if missing:
            raise ValueError(f"item {i} has no column {sorted(missing)[0]!r}; it has {sorted(record)}")
    return [
        {
            "prompt": [
                {"role": "system", "content": INSTRUCTION},
                {"role": "user", "content": record["question"]},
            ],
            "answer": record["answer"],
        }
        for record in records
    ]


def read_gsm8k(split: str, path: str | Path | None = None) -> list[dict[str, Any]]:
    """Read a split of GSM8K from the Hugging Face hub, or from a JSON Lines file with the same columns.

    Parameters
    ----------
    split : "train" or "test"
    path : str or Path, optional
        The file; by default the hub's ``openai/gsm8k``, for which the package ``datasets`` is needed.
    """
    if path is not None:
        return math_records(path)
    try:
        from datasets import load_dataset  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError as error:
        raise ImportError(
            "reading GSM8K from the hub needs the package datasets: pip install datasets; or give a JSON Lines file "
            "with the columns question and answer"
        ) from error
    return math_records(load_dataset("openai/gsm8k", "main", split=split))


def accuracy(
    language_model: LanguageModel,
    records: Sequence[dict[str, Any]],
    *,
    max_new_tokens: int,
    batch_size: int = 128,
    sampler: Sampler | None = None,
    progress: bool = False,
) -> float:
    """Share of problems that greedy decoding solves.

    Parameters
    ----------
    language_model : LanguageModel
    records : sequence of dict
        What :func:`math_records` returns.
    max_new_tokens : int
        Longest solution.
    batch_size : int
        Problems side by side.
    sampler : Sampler, optional
        By default the model itself.
    progress : bool
        Show a progress bar.
    """
    sampler = sampler or TransformersSampler(language_model)
    greedy = SamplingConfig(max_new_tokens=max_new_tokens, temperature=0.0)
    right = 0.0
    for start in tqdm(range(0, len(records), batch_size), desc="accuracy", disable=not progress):
        batch = records[start : start + batch_size]
        prompts = [encode_prompt(language_model.tokenizer, record["prompt"]) for record in batch]
        sequences = sampler.sample(prompts, 1, greedy, seed=0).sequences
        texts = [
            language_model.decode(row[:length])
            for row, length in zip(sequences.completion_ids.tolist(), sequences.lengths.tolist(), strict=True)
        ]
        right += sum(final_number_reward(texts, answer=[record["answer"] for record in batch]))
    return right / len(records)


def main(argv: Sequence[str] | None = None) -> LMResult[Any, Any]:
    """Train from the command line; the model, its history and its accuracies are written to ``--output``."""
    parser = argparse.ArgumentParser(description="GRPO on GSM8K.")
    parser.add_argument("--output", type=Path, required=True, help="folder for the model and its checkpoints")
    parser.add_argument(
        "--model", default=MODEL, help="hub id or folder of a chat model (default: %(default)s)"
    )
    parser.add_argument("--train", type=Path, help="JSON Lines file (question, answer) in place of the hub's")
    parser.add_argument("--test", type=Path, help="the same for the test problems")
    parser.add_argument("--test-limit", type=int, help="evaluate on the first so many test problems only")
    parser.add_argument("--vllm", action="store_true", help="sample with vLLM, which must be installed")
    parser.add_argument("--seed", type=int, default=0)
    for name, kind in (("updates", int), ("batch-size", int), ("group-size", int), ("micro-batch-size", int),
                       ("max-new-tokens", int), ("learning-rate", float)):  # fmt: skip
        parser.add_argument(f"--{name}", type=kind)
    parser.add_argument("--device", default="auto")
    options = vars(parser.parse_args(argv))

    names = ("updates", "batch_size", "group_size", "micro_batch_size", "learning_rate")
    config = replace(CONFIG, **{name: options[name] for name in names if options[name] is not None})
    if options["max_new_tokens"] is not None:
        config = replace(config, sampling=replace(config.sampling, max_new_tokens=options["max_new_tokens"]))
    train = read_gsm8k("train", options["train"])
    test = read_gsm8k("test", options["test"])[: options["test_limit"]]

    language_model = load(options["model"], device=options["device"])
    sampler = None
    if options["vllm"]:
        sampler = VLLMSampler(language_model, max_model_len=1024 + config.sampling.max_new_tokens)
    memory = estimate_memory(language_model, config)
    print(f"memory: about {memory.total / 1e9:.2g} GB (estimate)")

    def solved() -> float:
        return accuracy(language_model, test, max_new_tokens=config.sampling.max_new_tokens, sampler=sampler)

    # Kept beside the checkpoints, because a run that goes on no longer has the model it began with.
    before_file = options["output"] / "before.json"
    if not before_file.exists():
        before_file.parent.mkdir(parents=True, exist_ok=True)
        before_file.write_text(json.dumps({"accuracy": solved()}), encoding="utf-8")
    before = json.loads(before_file.read_text(encoding="utf-8"))["accuracy"]
    result = train_grpo(
        language_model, train, REWARDS, config, sampler=sampler, seed=options["seed"],
        checkpoint_dir=options["output"] / "checkpoints",
    )  # fmt: skip
    result.save(options["output"] / "model")
    after = solved()
    measured = json.dumps({"before": before, "after": after})
    (options["output"] / "accuracy.json").write_text(measured, encoding="utf-8")
    print(f"solved of {len(test)} test problems: {before:.1%} before, {after:.1%} after")
    return result


if __name__ == "__main__":
    main()
