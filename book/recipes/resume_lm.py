"""GRPO that survives being killed: run ``python resume_lm.py --output runs/addition`` again, and it goes on."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from policyopt.lm import GRPOConfig, SamplingConfig, load, train_grpo
from policyopt_book import model_path
from policyopt_book.tasks import addition


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default=model_path("addition-base"), help="folder or hub id")
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--learning-rate", type=float, help="default: 1e-6, or 5e-4 for a tiny model")
    parser.add_argument("--save-every", type=int, default=10, help="updates between checkpoints")
    options = parser.parse_args(argv)

    # Load the model that the run began with: the checkpoint brings the trained weights, the optimiser and the history.
    model = load(options.model)
    # A tiny model takes steps that would destroy a pretrained one.
    default = 5e-4 if model.num_parameters < 10_000_000 else 1e-6
    problems = addition.prompt_records(addition.make_problems(512, seed=0))
    config = GRPOConfig(
        updates=options.updates,
        learning_rate=options.learning_rate or default,
        sampling=SamplingConfig(max_new_tokens=32),
        checkpoint_every=options.save_every,
    )
    result = train_grpo(
        model, problems, addition.answer_reward, config,
        checkpoint_dir=options.output / "checkpoints",
        callback=lambda row: print(f"update {row.update}: reward {row.reward:.2f}", flush=True),
    )  # fmt: skip
    result.save(options.output / "model")


if __name__ == "__main__":
    main()
