"""PPO on an environment of your own: ``python own_environment.py --output runs/thermostat``."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium.utils.env_checker import check_env

from policyopt.control import PPOConfig, TrainResult, evaluate, make_policy, train_ppo


class Thermostat(gym.Env[Any, Any]):
    """Keep a room at 20 °C for a day of 48 half hours, and heat as little as possible."""

    def __init__(self, comfort: float = 1.0, heating_cost: float = 0.2) -> None:
        self.comfort, self.heating_cost = comfort, heating_cost
        # What the agent sees, scaled to about 1: distance to 20 °C, outside temperature, time of day.
        self.observation_space = gym.spaces.Box(-10.0, 10.0, shape=(3,), dtype=np.float32)
        self.action_space = gym.spaces.Discrete(2)  # heater off, on

    def _observe(self) -> Any:
        state = [(self.room - 20) / 5, self.outside / 10, self.time / 48]
        return np.clip(np.array(state, dtype=np.float32), -10, 10)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)  # makes self.np_random, the only source of chance
        self.room = 20 + self.np_random.normal(0, 3)
        self.outside = self.np_random.normal(5, 5)
        self.time = 0
        return self._observe(), {}

    def step(self, action: int) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        self.room += 0.1 * (self.outside - self.room) + 3.0 * int(action) + self.np_random.normal(0, 0.2)
        self.time += 1
        reward = -self.comfort * abs(self.room - 20) / 5 - self.heating_cost * int(action)
        terminated = False  # the room has no final state: after the day comes another one,
        truncated = self.time == 48  # so this is a time limit, and the value of what follows is not 0
        return self._observe(), float(reward), terminated, truncated, {}


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=200_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)

    check_env(Thermostat(), skip_render_check=True)  # says what breaks Gymnasium's rules
    env = Thermostat()
    untrained = make_policy(
        env.observation_space, env.action_space, generator=torch.Generator().manual_seed(0)
    )
    before = evaluate(untrained, Thermostat, deterministic=False)

    # The class itself is the factory: 32 copies are made. A lambda sets its arguments.
    config = PPOConfig(total_steps=options.steps, normalize_rewards=True)
    result = train_ppo(lambda: Thermostat(heating_cost=0.2), config, seed=options.seed)
    result.save(options.output)

    policy = TrainResult.load(options.output).policy
    after = evaluate(policy, Thermostat)
    print(f"return {before.mean:.1f} untrained, {after.mean:.1f} trained")
    observation = torch.tensor([[-1.0, 0.5, 0.5]])  # 15 °C in the room
    print(f"heater at 15 °C: {'on' if int(policy(observation).mode()) else 'off'}")


if __name__ == "__main__":
    main()
