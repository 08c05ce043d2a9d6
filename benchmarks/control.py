"""Measure PPO and TRPO beside Stable-Baselines3, sbx and rejax, and write the book's page.

    python benchmarks/control.py [--seeds 5] [--page book/benchmarks.md]

Every training run is a process of its own with one thread. Contestants take turns on every seed, so a machine
whose speed drifts slows them alike, and ratios are formed within a seed. Three quantities are measured in CPU
seconds of the training call (imports excluded): the start-up, which is a first run of one update; environment steps
per second over the whole budget, after it; and the time until the mean return of the last 20 training episodes
reaches the threshold.

sbx and rejax need JAX, in versions of their own. ``--jax`` names the Python of an environment with them; without it
their rows are left out:

    pip install sbx-rl==0.28.0 rejax==0.1.3 gymnax==0.0.9 jax==0.6.2 "flax<0.11" "chex<0.1.91" seaborn
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

BUDGET = 100_000
WINDOW = 20
REPOSITORY = Path(__file__).resolve().parent.parent

Mark = Callable[[float, int], None]


@dataclass(frozen=True)
class Task:
    """What is trained, and how."""

    env: str
    algorithm: str
    threshold: float
    ours: dict[str, Any]
    """Settings of this package."""
    zoo: dict[str, Any]
    """Those of rl-baselines3-zoo, hyperparams/ppo.yml and trpo.yml, by Stable-Baselines3's names; ``copies`` and
    ``normalize`` are ours."""
    contestants: tuple[str, ...]

    @property
    def title(self) -> str:
        """What the page's heading says."""
        return f"{self.algorithm}, {self.env}"


RACE = ("policyopt", "peer-ours", "sbx-ours", "rejax-ours", "peer-zoo")
SWING = {"gamma": 0.99, "gae_lambda": 0.95, "normalize_observations": True, "normalize_rewards": True}
TASKS = (
    Task(
        "CartPole-v1", "PPO", 475,
        {"minibatch_size": 512, "gamma": 0.98, "gae_lambda": 0.95, "learning_rate": 1e-2},
        {"copies": 8, "n_steps": 32, "batch_size": 256, "gae_lambda": 0.8, "gamma": 0.98, "n_epochs": 20,
         "ent_coef": 0.0, "learning_rate": ("falls", 1e-3), "clip_range": ("falls", 0.2)},
        ("policyopt", "policyopt-default", *RACE[1:]),
    ),
    Task(
        "CartPole-v1", "TRPO", 475,
        {"gamma": 0.98, "gae_lambda": 0.9, "kl_limit": 0.02, "cg_iterations": 5, "critic_learning_rate": 5e-3,
         "critic_epochs": 5, "critic_minibatch_size": 512},
        {"copies": 2, "n_steps": 512, "batch_size": 512, "cg_damping": 1e-3, "gae_lambda": 0.98, "gamma": 0.99,
         "learning_rate": 1e-3, "n_critic_updates": 20},
        ("policyopt", "peer-ours", "peer-zoo"),
    ),
    Task(
        "Acrobot-v1", "PPO", -100,
        {"num_envs": 16, "rollout_steps": 128, "minibatch_size": 256, "epochs_per_batch": 10, **SWING},
        {"copies": 16, "n_steps": 256, "gamma": 0.99, "gae_lambda": 0.94, "n_epochs": 4, "normalize": (True, True)},
        ("policyopt", "policyopt-vector", *RACE[1:]),
    ),
    Task(
        "Pendulum-v1", "PPO", -250,
        {"num_envs": 16, "minibatch_size": 512, "epochs_per_batch": 10, "learning_rate": 3e-3, "gamma": 0.9,
         "gae_lambda": 0.95, "normalize_observations": False, "normalize_rewards": True},
        {"copies": 4, "n_steps": 1024, "gae_lambda": 0.95, "gamma": 0.9, "n_epochs": 10, "ent_coef": 0.0,
         "learning_rate": 1e-3, "clip_range": 0.2, "use_sde": True, "sde_sample_freq": 4},
        ("policyopt", "policyopt-vector", *RACE[1:]),
    ),
)  # fmt: skip
NAMES = {
    "policyopt": "policyopt",
    "policyopt-default": "policyopt, its defaults",
    "policyopt-vector": "policyopt, vector environment",
    "peer-zoo": "{peer}, zoo's setting",
    "peer-ours": "{peer}, policyopt's setting",
    "sbx-ours": "sbx, policyopt's setting",
    "rejax-ours": "rejax, policyopt's setting",
}
PEERS = {"PPO": "SB3", "TRPO": "sb3-contrib"}


def run_policyopt(task: Task, kind: str, seed: int, budget: int, mark: Mark) -> int:
    """Train with this package; ``mark(mean of the last episodes, steps)`` after every update."""
    from policyopt import control
    from policyopt_book.tasks import tensor_envs

    def callback(row: Any) -> None:
        mark(row.return_mean, row.steps)

    settings = {} if kind == "default" else task.ours
    config = getattr(control, f"{task.algorithm}Config")(total_steps=budget, device="cpu", **settings)
    env: Any = task.env
    if kind == "vector":
        env = getattr(tensor_envs, task.env.partition("-")[0])(config.num_envs, device="numpy")
    train = getattr(control, f"train_{task.algorithm.lower()}")
    return int(train(env, config, seed=seed, callback=callback, progress=False).steps)


def settings_of_ours(task: Task) -> dict[str, Any]:
    """Return this package's settings by the names of Stable-Baselines3."""
    ours = {"num_envs": 32, "rollout_steps": 64, "minibatch_size": 256, "epochs_per_batch": 4, **task.ours}
    both = {"copies": ours["num_envs"], "n_steps": ours["rollout_steps"],
            "batch_size": ours.get("critic_minibatch_size", ours["minibatch_size"]),
            "gamma": ours["gamma"], "gae_lambda": ours["gae_lambda"],
            "normalize": (ours.get("normalize_observations", False), ours.get("normalize_rewards", False))}  # fmt: skip
    if task.algorithm == "PPO":
        rate = ours.get("learning_rate", 3e-3)
        return {**both, "n_epochs": ours["epochs_per_batch"], "ent_coef": 0.0, "clip_range": 0.2,
                "learning_rate": ("falls", rate)}  # fmt: skip
    return {
        **both, "cg_damping": 0.1, "cg_max_steps": ours["cg_iterations"], "target_kl": ours["kl_limit"],
        "learning_rate": ours["critic_learning_rate"], "n_critic_updates": ours["critic_epochs"],
    }  # fmt: skip


def run_peer(task: Task, library: str, kind: str, seed: int, budget: int, mark: Mark) -> int:
    """Train with Stable-Baselines3 or sb3-contrib, or with sbx, which has their interface."""
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.env_util import make_vec_env
    from stable_baselines3.common.vec_env import VecNormalize

    class Watch(BaseCallback):
        def _on_step(self) -> bool:
            return True

        def _on_rollout_end(self) -> None:
            returns = [episode["r"] for episode in self.model.ep_info_buffer or []]
            mark(float(np.mean(returns)) if returns else float("nan"), self.num_timesteps)

    def value(given: Any) -> Any:
        return (lambda left: given[1] * left) if isinstance(given, tuple) else given

    options = dict(task.zoo if kind == "zoo" else settings_of_ours(task))
    seen, rewards = options.pop("normalize", (False, False))
    env: Any = make_vec_env(task.env, n_envs=options.pop("copies"), seed=seed)
    if seen or rewards:
        env = VecNormalize(env, norm_obs=seen, norm_reward=rewards, gamma=options["gamma"])
    peers = {"sbx": "sbx", "peer": "stable_baselines3" if task.algorithm == "PPO" else "sb3_contrib"}
    kind_of_model = getattr(importlib.import_module(peers[library]), task.algorithm)
    arguments = {name: value(given) for name, given in options.items()}
    device = {} if library == "sbx" else {"device": "cpu"}
    model = kind_of_model("MlpPolicy", env, seed=seed, **device, **arguments)
    model._stats_window_size = WINDOW  # an argument that sbx has not
    model.learn(budget, callback=Watch())
    return int(model.num_timesteps)


def measure_rejax(task: Task, seed: int) -> dict[str, Any]:
    """Compile the whole training, environment and all, and run it; it tells no training returns."""
    import jax
    import rejax

    s = settings_of_ours(task)
    batch = s["copies"] * s["n_steps"]
    steps = -(-BUDGET // batch) * batch
    algorithm = rejax.PPO.create(
        env=task.env, total_timesteps=steps, eval_freq=steps, num_envs=s["copies"], num_steps=s["n_steps"],
        num_epochs=s["n_epochs"], num_minibatches=batch // s["batch_size"], learning_rate=s["learning_rate"][1],
        gamma=s["gamma"], gae_lambda=s["gae_lambda"], max_grad_norm=0.5, ent_coef=0.0, vf_coef=0.5,
        normalize_observations=s["normalize"][0], normalize_rewards=s["normalize"][1],
        reward_normalization_discount=s["gamma"],
    )  # fmt: skip
    algorithm = algorithm.replace(eval_callback=lambda *_: ())
    started = time.process_time()
    compiled = jax.jit(algorithm.train).lower(jax.random.PRNGKey(seed)).compile()
    ready = time.process_time()
    jax.block_until_ready(compiled(jax.random.PRNGKey(seed)))
    cpu = time.process_time() - ready
    return {"start_up": ready - started, "cpu": cpu, "steps_per_second": steps / cpu,
            "cpu_to_threshold": None, "steps_to_threshold": None}  # fmt: skip


def child(contestant: str, number: int, seed: int) -> None:
    """Run one training and print its figures as one JSON line."""
    task, (library, _, kind) = TASKS[number], contestant.partition("-")
    if library == "rejax":
        print("RESULT " + json.dumps(measure_rejax(task, seed)))
        return
    import torch

    torch.set_num_threads(1)
    reached: dict[str, float] = {}

    def mark(mean: float, steps: int) -> None:
        if not reached and mean >= task.threshold:
            reached.update(cpu=time.process_time() - started, steps=steps)

    def run(budget: int, watch: Mark) -> int:
        if library == "policyopt":
            return run_policyopt(task, kind, seed, budget, watch)
        return run_peer(task, library, kind, seed, budget, watch)

    # One update first: what only the first call costs (lazy initialisation, compiling) is told apart.
    begun = time.process_time()
    run(1, lambda mean, steps: None)
    started = time.process_time()
    steps = run(BUDGET, mark)
    cpu = time.process_time() - started
    result = {"start_up": started - begun, "cpu": cpu, "steps_per_second": steps / cpu,
              "cpu_to_threshold": reached.get("cpu"), "steps_to_threshold": reached.get("steps")}  # fmt: skip
    print("RESULT " + json.dumps(result))


def measure(python: str, contestant: str, number: int, seed: int) -> dict[str, Any]:
    """Run :func:`child` in a process of its own."""
    command = [python, __file__, "--child", contestant, str(number), str(seed)]
    # CUDA is hidden so that the comparison is the same on machines that have it.
    environment = os.environ | {
        "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "TQDM_DISABLE": "1", "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    }  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        raise RuntimeError(f"{contestant} {TASKS[number].title} seed {seed} failed:\n{done.stderr[-2000:]}")
    figures: dict[str, Any] = json.loads(lines[-1].removeprefix("RESULT "))
    return figures


def spread(values: list[float], digits: int = 1) -> str:
    """Format the median with the range."""
    return f"{np.median(values):,.{digits}f} ({min(values):,.{digits}f}–{max(values):,.{digits}f})"


def page(results: dict[str, Any]) -> str:
    """Write the figures as the book's page (MyST Markdown)."""
    versions = ", ".join(f"{name} {version}" for name, version in results["versions"].items())
    lines = [
        "# Speed: control",
        "",
        "% Written by benchmarks/control.py (make bench). Do not edit by hand.",
        "",
        "How fast is the package beside the libraries that people would use instead? This page is written by",
        "`make bench`, which you can run yourself. [Language models](benchmarks-lm.md) have a page of their own.",
        "",
        f"{BUDGET:,} environment steps a run, {len(results['seeds'])} seeds "
        f"({results['seeds'][0]}–{results['seeds'][-1]}). Every run is a process of its own with one thread;",
        "contestants take turns, seed by seed. Times are CPU seconds of the training call. *policyopt over it* is the",
        "ratio of steps per second within a seed.",
        "*Start-up* is a first run of one update, with compiling where there is any. It is in no other column: add it",
        "if you train once.",
        f"*Solved* means that the mean return of the last {WINDOW} training episodes has reached a threshold.",
        "A cell shows the median over seeds and, in brackets, the range.",
        "",
        "Rows with *policyopt's setting* give another library this package's hyper-parameters, as far as it has",
        "them: they compare the implementations. SB3 is Stable-Baselines3; sbx is the same in JAX; rejax compiles the",
        "environment, too. *The zoo's setting* is what",
        "[rl-baselines3-zoo](https://github.com/DLR-RM/rl-baselines3-zoo) recommends for the environment, mostly for",
        "more steps than here.",
        "",
    ]
    for task in TASKS:
        runs = results["runs"][task.title]
        lines += [
            f"## {task.title}",
            "",
            f"Solved at {task.threshold:g}.".replace("-", "−"),
            "",
            "| | steps per s | policyopt over it | start-up, s | to solve, s | to solve, steps | unsolved |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        for contestant, rows in runs.items():
            solved = [row for row in rows if row["cpu_to_threshold"] is not None]
            until = spread([row["cpu_to_threshold"] for row in solved], 2) if solved else "–"
            steps = spread([row["steps_to_threshold"] for row in solved], 0) if solved else "–"
            told = "–" if contestant.startswith("rejax") else f"{len(rows) - len(solved)} of {len(rows)}"
            label = NAMES[contestant].format(peer=PEERS[task.algorithm])
            rate = spread([row["steps_per_second"] for row in rows], 0)
            start = f"{np.median([row['start_up'] for row in rows]):.1f}"
            pairs = zip(runs["policyopt"], rows, strict=True)
            faster = [ours["steps_per_second"] / row["steps_per_second"] for ours, row in pairs]
            over = "" if contestant == "policyopt" else f"{spread(faster, 2)} ×"
            lines.append(f"| {label} | {rate} | {over} | {start} | {until} | {steps} | {told} |")
        lines.append("")
    lines += [
        "## Where the speed comes from, and where it does not",
        "",
        "- CartPole's own vector implementation in Gymnasium steps all copies in a few NumPy calls. Acrobot and",
        "  Pendulum have none, so their copies are stepped one after another, here as elsewhere; the rows with a",
        "  *vector environment* hand over the book's own, {py:mod}`policyopt_book.tasks.tensor_envs`, in NumPy.",
        "- Values and log-probabilities are computed once per batch, not once per step.",
        "- Many copies and large minibatches: fewer, fuller calls into PyTorch.",
        "- Adam is fused; statistics leave the graph once per minibatch.",
        "- A loop that is compiled with its environment leaves all of these behind, once it is compiled. rejax tells",
        "  no returns of training episodes, and bootstraps nothing at time limits.",
        "- On AMD's processors MKL, which computes products and tanh for PyTorch, takes a slower path than on Intel's.",
        "  Made to take the other one, it gave PPO on CartPole 1.3 times the steps per second (seed 0, two pairs of",
        "  runs). The other rows in PyTorch were not tried.",
        "- PufferLib 3.0 did not install here (its sources fetch a library while they are built). In an earlier",
        "  measurement, on another day and with 3 seeds, it made as many steps per CPU second on CartPole as this",
        "  package did then.",
        "",
        f"Measured on {results['date']} on one core of: {results['processor']}. Python {results['python']},",
        f"{versions}.",
        "",
    ]
    return "\n".join(lines)


def versions(python: str, packages: list[str]) -> dict[str, str]:
    """Ask a Python for the versions of its packages."""
    code = (
        "import json, sys; from importlib.metadata import version; "
        "print(json.dumps([version(name) for name in sys.argv[1:]]))"
    )
    said = subprocess.run([python, "-c", code, *packages], capture_output=True, text=True, check=True).stdout
    return dict(zip(packages, json.loads(said), strict=True))


def main() -> None:
    """Measure, save the raw figures beside this script, and write the page."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--page", type=Path, default=REPOSITORY / "book" / "benchmarks.md")
    parser.add_argument("--jax", help="a Python with JAX, sbx and rejax")
    titles = [task.title for task in TASKS]
    parser.add_argument("--tasks", nargs="+", choices=titles, help="measure these; others keep their figures")
    parser.add_argument("--child", nargs=3, metavar=("CONTESTANT", "TASK", "SEED"))
    options = parser.parse_args()
    if options.child:
        child(options.child[0], int(options.child[1]), int(options.child[2]))
        return
    from policyopt_book.studies import processor

    seeds = list(range(options.seeds))
    raw = Path(__file__).with_suffix(".json")
    runs: dict[str, dict[str, list[Any]]] = json.loads(raw.read_text())["runs"] if options.tasks else {}
    for number, task in enumerate(TASKS):
        if options.tasks and task.title not in options.tasks:
            continue
        names = [c for c in task.contestants if options.jax or not c.startswith(("sbx", "rejax"))]
        table: dict[str, list[Any]] = {name: [] for name in names}
        runs[task.title] = table
        for seed in seeds:
            for contestant in names:
                python = options.jax if contestant.startswith(("sbx", "rejax")) else sys.executable
                table[contestant].append(measure(python, contestant, number, seed))
                print(task.title, seed, contestant, table[contestant][-1], flush=True)
    packages = ["policyopt", "torch", "gymnasium", "numpy", "stable-baselines3", "sb3-contrib"]
    found = {name: importlib.metadata.version(name) for name in packages}
    if options.jax:
        found |= versions(options.jax, ["jax", "sbx-rl", "rejax", "gymnax"])
    results = {
        "date": datetime.now(UTC).date().isoformat(),
        "processor": processor(),
        "python": platform.python_version(),
        "versions": found,
        "seeds": seeds,
        "runs": runs,
    }
    raw.write_text(json.dumps(results, indent=1) + "\n")
    options.page.write_text(page(results))
    print(f"wrote {options.page}")


if __name__ == "__main__":
    main()
