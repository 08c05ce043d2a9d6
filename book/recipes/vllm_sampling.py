"""GRPO with completions from vLLM: ``python vllm_sampling.py --data problems.jsonl --output runs/vllm``.

``problems.jsonl`` has the columns ``prompt`` and ``answer`` (a number). Needs Linux, a GPU and ``pip install vllm``.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from policyopt.lm import GRPOConfig, SamplingConfig, VLLMSampler, load, train_grpo
from policyopt_book.tasks.gsm8k import final_number_reward


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--updates", type=int, default=100)
    options = parser.parse_args(argv)

    model = load(options.model)
    config = GRPOConfig(
        updates=options.updates,
        sampling=SamplingConfig(max_new_tokens=400),
        learning_rate=1e-6,
        autocast="bfloat16",
        micro_batch_size=16,
        gradient_checkpointing=True,
        importance_cap=2.0,  # vLLM rounds differently from the trainer: weigh by the ratio of both, at most 2
    )
    try:
        # In this process, on this GPU. It gets a share of the memory; the rest is the trainer's.
        sampler = VLLMSampler(model, max_model_len=1024, gpu_memory_utilization=0.3)
    except ImportError as error:
        sys.exit(f"error: {error}")
    result = train_grpo(model, options.data, final_number_reward, config, sampler=sampler)
    result.save(options.output)


if __name__ == "__main__":
    main()
