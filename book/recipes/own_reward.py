"""GRPO on reward functions of your own: ``python own_reward.py --output runs/reward``.

``--data`` is a JSON Lines file with a column ``prompt`` and whatever your reward functions want to know, here
``keywords``, a list of words that the completion has to mention.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from policyopt.lm import GRPOConfig, SamplingConfig, generate, load, read_records, train_grpo
from policyopt_book import model_path

EXAMPLES = [
    {"prompt": "Gavo Steel opens a plant in Lima for $12m to save time.\nSummary:\n", "keywords": ["Lima", "Gavo"]},
    {"prompt": "Kira Bank opens a port in Quito for $41m to save water.\nSummary:\n", "keywords": ["Quito", "Kira"]},
]  # fmt: skip


def mentions(completions: Sequence[str], keywords: Sequence[Sequence[str]]) -> list[float]:
    """Share of the keywords that a completion mentions. ``keywords`` is a column of the data: one entry each."""
    return [
        sum(word in text for word in words) / len(words)
        for text, words in zip(completions, keywords, strict=True)
    ]


def brevity(completions: Sequence[str], finished: Sequence[bool]) -> list[float]:
    """Minus the number of words; an unfinished completion counts as 50."""
    return [
        -float(len(text.split())) if end else -50.0 for text, end in zip(completions, finished, strict=True)
    ]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model", default=model_path("news-sft"), help="folder or hub id")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--learning-rate", type=float, help="default: 1e-6, or 1e-3 for a tiny model")
    options = parser.parse_args(argv)

    records = read_records(options.data or EXAMPLES)
    model = load(options.model)
    # A tiny model takes steps that would destroy a pretrained one.
    default = 1e-3 if model.num_parameters < 10_000_000 else 1e-6
    config = GRPOConfig(
        updates=options.updates,
        batch_size=min(8, len(records)),  # prompts an update
        group_size=8,  # completions of each
        sampling=SamplingConfig(max_new_tokens=48),
        reward_weights=(1.0, 0.02),  # one keyword of two is worth 25 words
        learning_rate=options.learning_rate or default,
        beta=0.02,  # stay near the model that we began with
    )
    rewards: dict[str, Callable[..., list[float]]] = {"mentions": mentions, "brevity": brevity}
    result = train_grpo(model, records, rewards, config)
    result.save(options.output)

    first, last = result.history[0], result.history[-1]
    for name in rewards:
        print(f"{name}: {first.rewards[name]:.2f} before, {last.rewards[name]:.2f} after")
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=48)
    print(generate(model, [records[0]["prompt"]], greedy)[0][0])


if __name__ == "__main__":
    main()
