"""DPO on preference pairs of your own: ``python own_preferences.py --data pairs.jsonl --output runs/dpo``.

Each line of the file is a JSON object with ``prompt``, ``chosen`` and ``rejected``: texts, or messages of a chat.
"""

import argparse
import random
import sys
from collections.abc import Sequence
from pathlib import Path

from policyopt.lm import DPOConfig, ImplicitReward, load, pair_accuracy, read_records, train_dpo
from policyopt.lm.data import Limits, preference_pairs
from policyopt_book import model_path


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default=model_path("news-sft"), help="folder or hub id")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, help="default: 1e-6, or 6e-4 for a tiny model")
    options = parser.parse_args(argv)

    model = load(options.model)
    # A tiny model takes steps that would destroy a pretrained one.
    default = 6e-4 if model.num_parameters < 10_000_000 else 1e-6
    try:
        records = read_records(options.data)
        # Every row is looked at now. Training would do the same, but with numbers that count the training rows alone.
        preference_pairs(options.data, model.tokenizer, Limits(model.context_length))
    except ValueError as error:
        sys.exit(f"error: {error}")
    random.Random(0).shuffle(records)
    count = max(1, len(records) // 10)
    held_out, train = records[:count], records[count:]

    reference = model.copy()
    config = DPOConfig(
        epochs=options.epochs,
        batch_size=options.batch_size,
        learning_rate=options.learning_rate or default,
        warmup_updates=5,
        beta=0.1,
    )
    result = train_dpo(model, train, config)
    result.save(options.output)

    reward = ImplicitReward(model, reference, beta=config.beta)
    print(f"pairs: {len(train)} for training, {len(held_out)} held out")
    print(f"accuracy in the last update: {result.history[-1].accuracy:.2f}")
    print(f"accuracy on held-out pairs: {pair_accuracy(reward, held_out):.2f}")


if __name__ == "__main__":
    main()
