"""Measure PPO and TRPO on CartPole against Stable-Baselines3 and sb3-contrib, and write the book's page.

    python benchmarks/control.py [--seeds 5] [--page book/benchmarks.md]

Every training run is a process of its own with one thread. Contestants take turns on every seed, so a machine
whose speed drifts slows them alike, and ratios are formed within a seed. Two quantities are measured in CPU
seconds of the training call alone, after a warm-up update (imports excluded): environment steps per second over the
whole budget, and the time until the mean return of the last 20 training episodes reaches 475.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from policyopt_book.studies import processor

ENVIRONMENT = "CartPole-v1"
BUDGET = 100_000
THRESHOLD = 475.0
WINDOW = 20
REPOSITORY = Path(__file__).resolve().parent.parent

Mark = Callable[[float, int], None]


def run_policyopt(algorithm: str, seed: int, budget: int, mark: Mark) -> int:
    """Train with this package; ``mark(mean of the last episodes, steps)`` after every update."""
    from policyopt.control import PPOConfig, TRPOConfig, train_ppo, train_trpo

    def callback(row: Any) -> None:
        mark(row.return_mean, row.steps)

    common: dict[str, Any] = {"total_steps": budget, "gamma": 0.98, "device": "cpu"}
    if algorithm == "ppo":
        ppo = PPOConfig(**common, gae_lambda=0.95, learning_rate=1e-2)
        return train_ppo(ENVIRONMENT, ppo, seed=seed, callback=callback, progress=False).steps
    trpo = TRPOConfig(
        **common, gae_lambda=0.9, kl_limit=0.02, cg_iterations=5,
        critic_learning_rate=5e-3, critic_epochs=5, critic_minibatch_size=512,
    )  # fmt: skip
    return train_trpo(ENVIRONMENT, trpo, seed=seed, callback=callback, progress=False).steps


def run_peer(algorithm: str, setting: str, seed: int, budget: int, mark: Mark) -> int:
    """Train with Stable-Baselines3 (PPO) or sb3-contrib (TRPO), in the zoo's setting or in ours."""
    from sb3_contrib import TRPO
    from stable_baselines3 import PPO
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            returns = [episode["r"] for episode in self.model.ep_info_buffer or []]
            mark(float(np.mean(returns)) if returns else float("nan"), self.num_timesteps)

    # "zoo": rl-baselines3-zoo, hyperparams/{ppo,trpo}.yml, CartPole-v1. "ours": what policyopt runs with above.
    settings: dict[tuple[str, str], tuple[int, dict[str, Any]]] = {
        ("ppo", "zoo"): (8, {
            "n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20, "ent_coef": 0.0,
            "learning_rate": lambda left: 1e-3 * left, "clip_range": lambda left: 0.2 * left,
        }),
        ("ppo", "ours"): (32, {
            "n_steps": 64, "batch_size": 512, "gae_lambda": 0.95, "gamma": 0.98, "n_epochs": 4, "ent_coef": 0.0,
            "learning_rate": lambda left: 1e-2 * left, "clip_range": 0.2,
        }),
        ("trpo", "zoo"): (2, {
            "n_steps": 512, "batch_size": 512, "cg_damping": 1e-3, "gae_lambda": 0.98, "gamma": 0.99,
            "learning_rate": 1e-3, "n_critic_updates": 20,
        }),
        ("trpo", "ours"): (32, {
            "n_steps": 64, "batch_size": 512, "cg_damping": 0.1, "cg_max_steps": 5, "gae_lambda": 0.9,
            "gamma": 0.98, "learning_rate": 5e-3, "n_critic_updates": 5, "target_kl": 0.02,
        }),
    }  # fmt: skip
    copies, arguments = settings[algorithm, setting]
    env = make_vec_env(ENVIRONMENT, n_envs=copies, seed=seed)
    kind = PPO if algorithm == "ppo" else TRPO
    model = kind("MlpPolicy", env, seed=seed, device="cpu", stats_window_size=WINDOW, **arguments)
    model.learn(budget, callback=Watch())
    return int(model.num_timesteps)


def child(contestant: str, algorithm: str, seed: int) -> None:
    """Run one training and print its figures as one JSON line."""
    import torch

    torch.set_num_threads(1)
    reached: dict[str, float] = {}

    def mark(mean: float, steps: int) -> None:
        if not reached and mean >= THRESHOLD:
            reached.update(cpu=time.process_time() - started, steps=steps)

    library, _, setting = contestant.partition("-")

    def run(budget: int, watch: Mark) -> int:
        if library == "policyopt":
            return run_policyopt(algorithm, seed, budget, watch)
        return run_peer(algorithm, setting, seed, budget, watch)

    # One update to warm up: what only the first call costs (imports, lazy initialisation) is no contestant's fault.
    run(1, lambda mean, steps: None)
    started = time.process_time()
    steps = run(BUDGET, mark)
    cpu = time.process_time() - started
    result = {"cpu": cpu, "steps_per_second": steps / cpu, "cpu_to_threshold": reached.get("cpu"),
              "steps_to_threshold": reached.get("steps")}  # fmt: skip
    print("RESULT " + json.dumps(result))


def measure(contestant: str, algorithm: str, seed: int) -> dict[str, Any]:
    """Run :func:`child` in a process of its own."""
    command = [sys.executable, __file__, "--child", contestant, algorithm, str(seed)]
    # CUDA is hidden so that the comparison is the same on machines that have it.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{contestant} {algorithm} seed {seed} failed:\n{done.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return figures


def spread(values: list[float], digits: int = 1) -> str:
    """Format the median with the range."""
    return f"{np.median(values):,.{digits}f} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


def page(results: dict[str, Any]) -> str:
    """Write the figures as the book's page (MyST Markdown)."""
    names = {
        "policyopt": "policyopt",
        "peer-zoo": "{peer}, zoo setting",
        "peer-ours": "{peer}, policyopt's setting",
    }
    peers = {"ppo": "Stable-Baselines3", "trpo": "sb3-contrib"}
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        "# Speed: control",
        "",
        "% Written by benchmarks/control.py (make bench). Do not edit by hand.",
        "",
        "How fast is the package beside the libraries that people would use instead? This page is written by",
        "`make bench`, which you can run yourself. [Language models](benchmarks-lm.md) have a page of their own.",
        "",
        f"{ENVIRONMENT}, {BUDGET:,} environment steps a run, {len(results['seeds'])} seeds "
        f"({results['seeds'][0]}–{results['seeds'][-1]}). Every run is a process of its own with one thread;",
        "contestants take turns, seed by seed. Times are CPU seconds of the training call, after a warm-up.",
        f"*Solved* means that the mean return of the last {WINDOW} training episodes has reached {THRESHOLD:g}.",
        "A cell shows the median over",
        "seeds and, in brackets, the range.",
        "",
        "The *zoo setting* is what [rl-baselines3-zoo](https://github.com/DLR-RM/rl-baselines3-zoo) recommends for",
        "this environment. The row with *policyopt's setting* gives the same library this package's",
        "hyper-parameters, as far as it has them: it tells how much of the difference is the setting and how much",
        "is the implementation.",
        "",
    ]
    for algorithm, runs in results["runs"].items():
        lines += [
            f"## {algorithm.upper()}",
            "",
            "| | steps per CPU second | CPU seconds until solved | environment steps until solved | unsolved seeds |",
            "|---|---:|---:|---:|---:|",
        ]
        for contestant, rows in runs.items():
            solved = [row for row in rows if row["cpu_to_threshold"] is not None]
            until = spread([row["cpu_to_threshold"] for row in solved]) if solved else "–"
            steps = spread([row["steps_to_threshold"] for row in solved], 0) if solved else "–"
            label = names[contestant].format(peer=peers[algorithm])
            rate = spread([row["steps_per_second"] for row in rows], 0)
            lines.append(
                f"| {label} | {rate} | {until} | {steps} | {len(rows) - len(solved)} of {len(rows)} |"
            )
        lines += ["", "Ratios within a seed, policyopt over the other:", ""]
        lines += ["| | steps per CPU second | time until solved |", "|---|---:|---:|"]
        for contestant in list(runs)[1:]:
            pairs = list(zip(runs["policyopt"], runs[contestant], strict=True))
            faster = [ours["steps_per_second"] / peer["steps_per_second"] for ours, peer in pairs]
            both = [
                peer["cpu_to_threshold"] / ours["cpu_to_threshold"]
                for ours, peer in pairs
                if ours["cpu_to_threshold"] and peer["cpu_to_threshold"]
            ]
            sooner = spread(both) + " × less" if both else "–"
            label = names[contestant].format(peer=peers[algorithm])
            lines.append(f"| against {label} | {spread(faster)} × more | {sooner} |")
        lines.append("")
    lines += [
        "## Where the speed comes from",
        "",
        "- CartPole's own vector implementation in Gymnasium steps all copies in a few NumPy calls.",
        "- Values and log-probabilities are computed once per batch, not once per step.",
        "- Many copies and large minibatches: fewer, fuller calls into PyTorch.",
        "- Adam is fused; statistics leave the graph once per minibatch.",
        "",
        f"Measured on {results['date']} on one core of: {results['processor']}. Python {results['python']},",
        f"{versions}.",
        "",
    ]
    return "\n".join(lines)


def main() -> None:
    """Measure, save the raw figures beside this script, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--page", type=Path, default=REPOSITORY / "book" / "benchmarks.md")
    parser.add_argument("--child", nargs=3, metavar=("CONTESTANT", "ALGORITHM", "SEED"))
    options = parser.parse_args()
    if options.child:
        child(options.child[0], options.child[1], int(options.child[2]))
        return

    seeds = list(range(options.seeds))
    contestants = ["policyopt", "peer-zoo", "peer-ours"]
    runs: dict[str, dict[str, list[Any]]] = {a: {c: [] for c in contestants} for a in ("ppo", "trpo")}
    for algorithm, table in runs.items():
        for seed in seeds:
            for contestant in contestants:
                table[contestant].append(measure(contestant, algorithm, seed))
                print(algorithm, seed, contestant, table[contestant][-1], flush=True)
    packages = ["policyopt", "torch", "gymnasium", "numpy", "stable-baselines3", "sb3-contrib"]
    results = {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": processor(),
        "python": platform.python_version(),
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "seeds": seeds,
        "runs": runs,
    }
    (Path(__file__).parent / "control.json").write_text(json.dumps(results, indent=1) + "\n")
    options.page.write_text(page(results))
    print(f"wrote {options.page}")


if __name__ == "__main__":
    main()
