"""Curves in TensorBoard: ``python tensorboard_logs.py --output runs``, then ``tensorboard --logdir runs``."""

import argparse
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter  # pip install tensorboard

from policyopt.control import PPOConfig, train_ppo
from policyopt.lm import GRPOConfig, SamplingConfig, train_grpo
from policyopt_book import load_model
from policyopt_book.tasks import addition


class TensorBoard:
    """A callback for every trainer of both halves: each number of a row becomes a point of a curve."""

    def __init__(self, folder: Path) -> None:
        first = os.environ.get("RANK", "0") == "0"  # of several processes one writes
        self.writer = SummaryWriter(str(folder)) if first else None

    def __call__(self, row: Any) -> None:
        if self.writer is None:
            return
        values = dict(vars(row))
        for name, score in values.pop("rewards", {}).items():  # of several reward functions
            values[f"rewards/{name}"] = score
        # The control half counts steps of the environment, the language half its updates.
        update = values.pop("update", None)
        step = values.pop("steps", update)
        for name, value in values.items():
            if isinstance(value, (int, float)) and not math.isnan(value):  # NaN: not measured
                self.writer.add_scalar(name, value, step)
        self.writer.flush()


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--control-steps", type=int, default=100_000)
    parser.add_argument("--lm-updates", type=int, default=50)
    options = parser.parse_args(argv)

    train_ppo(
        "CartPole-v1",
        PPOConfig(total_steps=options.control_steps),
        callback=TensorBoard(options.output / "cartpole"),
    )
    problems = addition.prompt_records(addition.make_problems(256, seed=0))
    config = GRPOConfig(
        updates=options.lm_updates,
        learning_rate=5e-4,
        sampling=SamplingConfig(max_new_tokens=32),
        reward_weights=(1.0,),
    )
    rewards = {"right": addition.answer_reward}
    train_grpo(
        load_model("addition-base"),
        problems,
        rewards,
        config,
        callback=TensorBoard(options.output / "addition"),
    )


if __name__ == "__main__":
    main()
