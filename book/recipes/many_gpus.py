"""DPO on one or many GPUs. The script is the same; the launcher decides.

python many_gpus.py ...                                                          one process
torchrun --nproc-per-node 8 many_gpus.py ...                                     DDP
accelerate launch --num_processes 8 many_gpus.py ...                             DDP
accelerate launch --num_processes 8 --use_fsdp --fsdp_version 2 many_gpus.py ... FSDP2
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from policyopt.lm import DPOConfig, load, train_dpo


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="DPO on one or many GPUs.")
    parser.add_argument("--data", type=Path, required=True, help="JSON Lines: prompt, chosen, rejected")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default="Qwen/Qwen2.5-0.5B-Instruct")
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--batch-size", type=int, default=64, help="pairs, over all processes")
    parser.add_argument("--micro-batch-size", type=int, default=8, help="completions, in each process")
    parser.add_argument("--learning-rate", type=float, default=1e-6)
    options = parser.parse_args(argv)

    config = DPOConfig(
        updates=options.updates,
        batch_size=options.batch_size,
        micro_batch_size=options.micro_batch_size,
        learning_rate=options.learning_rate,
        gradient_checkpointing=True,
        checkpoint_every=10,
    )
    # Every process loads the model and reads the data. The trainer shares out the batch, and with FSDP the weights.
    model = load(options.model)
    result = train_dpo(model, options.data, config, checkpoint_dir=options.output / "checkpoints")
    result.save(options.output / "model")  # written by the first process
    if os.environ.get("RANK", "0") == "0":
        print(f"{os.environ.get('WORLD_SIZE', '1')} process(es), loss {result.history[-1].loss:.6f}")


if __name__ == "__main__":
    main()
