"""Hopper and HalfCheetah: PPO and TRPO, ours and Stable-Baselines3's, at the same settings.

Needs the extra ``bench``. The settings are those of rl-baselines3-zoo, ``hyperparams/ppo.yml`` and ``trpo.yml``, made
for budgets of 1,000,000 steps and for the versions 3 and 4 of these tasks; everybody gets 300,000 steps of version 5
here. PPO runs once more, with what Schulman et al. (2017, table 3) took for MuJoCo. Where the two packages differ in
more than a name: the other's TRPO takes the mean of the KL divergence over the D dimensions of an action where ours has
their sum, so ours gets D times the limit and D times the damping; and its PPO shifts and scales advantages within each
minibatch, ours within the batch. The setting ``minibatch`` does here what theirs does, through a loss of one's own.

Two to seven CPU minutes a run.
"""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from _control import measure
from _peers import peer

from policyopt.control import PPOConfig, TRPOConfig, train_ppo, train_trpo
from policyopt.control.ppo import ppo_loss
from policyopt.control.steps import Steps
from policyopt.losses import ClippedSurrogate
from policyopt_book.studies import Study

STEPS = 300_000
DIMENSIONS = {"Hopper-v5": 3, "HalfCheetah-v5": 6}
WIDE: dict[str, Any] = {
    "hidden": (256, 256),
    "activation": "relu",
    "orthogonal_init": False,
    "initial_log_std": -2.0,
}
ZOO: dict[tuple[str, str], dict[str, Any]] = {
    ("Hopper-v5", "PPO"): {
        "rollout_steps": 512, "minibatch_size": 32, "epochs_per_batch": 5, "learning_rate": 9.80828e-5,
        "gamma": 0.999, "gae_lambda": 0.99, "clip_ratio": 0.2, "entropy_coef": 0.00229519,
        "max_gradient_norm": 0.7, "value_coef": 2 * 0.835671, "anneal_learning_rate": False, **WIDE,
    },
    ("HalfCheetah-v5", "PPO"): {
        "rollout_steps": 512, "minibatch_size": 64, "epochs_per_batch": 20, "learning_rate": 2.0633e-5,
        "gamma": 0.98, "gae_lambda": 0.92, "clip_ratio": 0.1, "entropy_coef": 0.000401762,
        "max_gradient_norm": 0.8, "value_coef": 2 * 0.58096, "anneal_learning_rate": False, **WIDE,
    },
    ("Hopper-v5", "TRPO"): {"kl_limit": 0.01},
    ("HalfCheetah-v5", "TRPO"): {"kl_limit": 0.04},
}  # fmt: skip
TRPO: dict[str, Any] = {
    "num_envs": 2, "rollout_steps": 1024, "gamma": 0.99, "gae_lambda": 0.95, "damping": 0.1, "cg_iterations": 25,
    "critic_epochs": 20, "critic_learning_rate": 1e-3, "critic_minibatch_size": 128,
}  # fmt: skip
PAPER: dict[str, Any] = {
    "rollout_steps": 2048, "minibatch_size": 64, "epochs_per_batch": 10, "learning_rate": 3e-4, "gamma": 0.99,
    "gae_lambda": 0.95, "clip_ratio": 0.2,
}  # fmt: skip
THEIRS = {
    "num_envs": "copies", "rollout_steps": "n_steps", "minibatch_size": "batch_size", "epochs_per_batch": "n_epochs",
    "clip_ratio": "clip_range", "entropy_coef": "ent_coef", "max_gradient_norm": "max_grad_norm",
    "kl_limit": "target_kl", "damping": "cg_damping", "cg_iterations": "cg_max_steps",
    "critic_epochs": "n_critic_updates", "critic_learning_rate": "learning_rate",
    "critic_minibatch_size": "batch_size",
}  # fmt: skip


def run(*, seed: int, env: str, algorithm: str, package: str, setting: str) -> dict[str, Any]:
    """Train once."""
    start = time.process_time()
    options = dict(PAPER) if setting == "paper" else dict(ZOO[env, algorithm])
    if algorithm == "TRPO":
        options = TRPO | options
    result: Any
    if package == "Stable-Baselines3":
        result = peer(env, algorithm, STEPS, *_theirs(options), seed=seed)
    else:
        options = {"num_envs": 1, "total_steps": STEPS, "device": "cpu"} | options
        options |= {"normalize_observations": True, "normalize_rewards": True}
        if algorithm == "PPO":
            config = PPOConfig(**options)

            def normalized(steps: Steps) -> ClippedSurrogate:
                advantages = steps.advantages - steps.advantages.mean()
                scaled = advantages / (steps.advantages.std() + 1e-8)
                return ppo_loss(dataclasses.replace(steps, advantages=scaled), config)

            loss = normalized if setting == "minibatch" else None
            result = train_ppo(env, config, seed=seed, loss=loss, progress=False)
        else:
            for name in ("kl_limit", "damping"):
                options[name] *= DIMENSIONS[env]
            result = train_trpo(env, TRPOConfig(**options), seed=seed, progress=False)
    return {**measure(result, STEPS), "cpu_seconds": time.process_time() - start}


def _theirs(options: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Translate to the other package's arguments, and to those of its policy."""
    from torch import nn

    options = {THEIRS.get(name, name): value for name, value in options.items()}
    options.pop("anneal_learning_rate", None)  # constant there unless it is told otherwise
    policy: dict[str, Any] = {}
    if "hidden" in options:
        policy = {
            "net_arch": list(options.pop("hidden")),
            "activation_fn": {"relu": nn.ReLU, "tanh": nn.Tanh}[options.pop("activation")],
            "ortho_init": options.pop("orthogonal_init"),
            "log_std_init": options.pop("initial_log_std"),
        }
    if "value_coef" in options:  # of a loss without our factor of one half
        options["vf_coef"] = options.pop("value_coef") / 2
    return options, policy


STUDY = Study(
    name="locomotion",
    run=run,
    settings=[
        {"env": env, "algorithm": algorithm, "package": package, "setting": setting}
        for env in ("Hopper-v5", "HalfCheetah-v5")
        for algorithm, package, setting in (
            ("TRPO", "policyopt", "zoo"),
            ("TRPO", "Stable-Baselines3", "zoo"),
            ("PPO", "policyopt", "zoo"),
            ("PPO", "Stable-Baselines3", "zoo"),
            ("PPO", "policyopt", "paper"),
            ("PPO", "policyopt", "minibatch"),
        )
    ],
    seeds=5,
    minutes=True,
)

if __name__ == "__main__":
    STUDY.main()
