"""PPO that survives being killed: run ``python resume_control.py --output runs/cartpole`` again, and it goes on."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from policyopt.control import PPOConfig, PPOUpdate, evaluate, train_ppo


def report(row: PPOUpdate) -> None:
    print(f"update {row.update}: {row.steps} steps, return {row.return_mean:.0f}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--save-every", type=int, default=25, help="updates between checkpoints")
    options = parser.parse_args(argv)

    config = PPOConfig(total_steps=options.steps, checkpoint_every=options.save_every)
    # Reads the checkpoint in the folder, if there is one, and goes on from it.
    result = train_ppo(options.env, config, checkpoint_dir=options.output, callback=report)
    print(f"return {evaluate(result.policy, options.env).mean:.0f} after {result.steps} steps")


if __name__ == "__main__":
    main()
