"""PPO that survives being killed: run ``python resume_control.py --output runs/cartpole`` again, and it goes on."""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path

from policyopt.checkpoint import has_checkpoint
from policyopt.control import PPOConfig, PPOUpdate, TrainResult, evaluate, train_ppo


def reached(steps: int) -> Callable[[PPOUpdate], bool]:
    """Make a callback that stops the training at a number of environment steps."""
    return lambda row: row.steps >= steps


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--env", default="CartPole-v1")
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument(
        "--save-every", type=int, default=50_000, help="environment steps between checkpoints"
    )
    options = parser.parse_args(argv)

    config = PPOConfig(total_steps=options.steps)
    result = TrainResult.load(options.output) if has_checkpoint(options.output) else None
    print(f"starting at step {0 if result is None else result.steps}", flush=True)
    while result is None or result.steps < config.total_steps:
        until = options.save_every + (0 if result is None else result.steps)
        # The config stays the same, so that the learning rate falls as planned; the callback ends the leg.
        result = train_ppo(options.env, config, resume=result, callback=reached(until))
        result.save(options.output)  # in one step: a crash leaves the checkpoint of before
        print(f"saved at step {result.steps}", flush=True)
    print(f"return {evaluate(result.policy, options.env).mean:.0f} after {result.steps} steps")


if __name__ == "__main__":
    main()
