"""LoRA on one GPU: ``python lora_one_gpu.py --data examples.jsonl --output runs/lora``.

Each line of the file is a JSON object with ``prompt`` and ``completion``, or with ``messages``.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch

from policyopt.lm import LoRA, SFTConfig, load, train_sft
from policyopt.lm.data import Limits, sft_examples
from policyopt_book.memory import estimate_memory


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--micro-batch-size", type=int, default=4)
    options = parser.parse_args(argv)

    # The base model's weights stay as they are, so 16 bits will do for them. The adapters are float32.
    lora = LoRA(rank=options.rank, alpha=2.0 * options.rank)
    model = load(options.model, dtype="bfloat16", lora=lora)
    config = SFTConfig(
        updates=options.updates,
        batch_size=options.batch_size,
        micro_batch_size=options.micro_batch_size,  # the first thing to lower when memory runs out
        learning_rate=2e-4,  # ten to thirty times that of training all weights
        warmup_updates=10,
        schedule="cosine",
        autocast="bfloat16",
        gradient_checkpointing=True,  # the second: recompute each layer in the backward pass
    )

    examples = sft_examples(options.data, model.tokenizer, Limits(model.context_length))
    memory = estimate_memory(
        model, config,
        prompt_tokens=max(len(example.prompt_ids) for example in examples),
        completion_tokens=max(len(example.completion_ids) for example in examples),
    )  # fmt: skip
    print(f"trained: {model.num_trainable_parameters:,} of {model.num_parameters:,} parameters")
    for name in ("weights", "gradients", "optimizer", "activations"):
        print(f"{name}: {getattr(memory, name) / 1e9:.3g} GB")
    print(f"estimate: {memory.total / 1e9:.3g} GB, and about 1 GB for PyTorch itself", flush=True)

    result = train_sft(model, options.data, config)
    if torch.cuda.is_available():
        print(f"measured: {torch.cuda.max_memory_allocated() / 1e9:.3g} GB")
    result.save(options.output)  # the adapters alone
    print(f"loss: {result.history[0].loss:.3f} before, {result.history[-1].loss:.3f} after")


if __name__ == "__main__":
    main()
