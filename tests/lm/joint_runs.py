"""Runs of the sampling trainers by one process, or by several that wait for settings (CPU, gloo)."""

from __future__ import annotations

import dataclasses
import os
import socket
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from typing import Any

import torch
from lm_runs import FORKED, SHORT, count_ones, tiny_model, weights

from policyopt.lm import (
    GRPOConfig,
    OnlineRankingConfig,
    PPOConfig,
    TransformersSampler,
    grpo_loss,
    train_grpo,
    train_ppo,
    train_ranking,
)

FSDP2 = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
COMMON: dict[str, Any] = {"updates": 3, "batch_size": 4, "learning_rate": 3e-3, "sampling": SHORT}
WORDS = ["one", "two", "three", "four", "five", "six"]


@dataclass
class Setting:
    """A run that can be sent to another process."""

    trainer: str
    changes: dict[str, Any] = field(default_factory=dict)
    signal: str = "all"
    """Which prompts have rewards that differ: "all", those of every fourth item of the data ("few"), or "none"."""
    silent_from: int = 9
    """No rewards differ from this update on, counted from 0."""
    unfinished_from: int = 9
    """The sampler says that no completion ended, from this update on."""
    own_loss: bool = False


@dataclass
class Outcome:
    weights: dict[str, torch.Tensor]
    rows: list[dict[str, Any]]
    moved: list[float]
    """Largest change of a weight of the network in each update."""


class Cut(TransformersSampler):
    """The model's sampler, which says after a while that nothing has ended."""

    def __init__(self, model: Any, since: int) -> None:
        super().__init__(model)
        self.since, self.calls = since, 0

    def sample(self, *args: Any, **options: Any) -> Any:
        samples = super().sample(*args, **options)
        self.calls += 1
        none = torch.zeros_like(samples.finished)
        return samples if self.calls <= self.since else dataclasses.replace(samples, finished=none)


def run(setting: Setting) -> Outcome:
    model = tiny_model()
    data = [{"prompt": " ".join(WORDS[: 1 + i % 5]), "number": i} for i in range(16)]
    update = 0

    def reward(completions: list[str], number: list[int]) -> list[float]:
        scores = count_ones(completions)
        if setting.signal == "none" or update >= setting.silent_from:
            return [0.1] * len(scores)
        if setting.signal == "few":
            return [s if n % 4 == 0 else 0.1 for s, n in zip(scores, number, strict=True)]
        return scores

    last = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    moved: list[float] = []

    def count(row: Any) -> None:
        nonlocal update
        update = row.update
        if os.environ.get("ACCELERATE_USE_FSDP") == "true":
            return
        now = dict(model.model.named_parameters())
        moved.append(max(float((now[name].detach() - last[name]).abs().max()) for name in last))
        last.update({name: p.detach().clone() for name, p in now.items()})

    options: dict[str, Any] = {
        "sampler": Cut(model, setting.unfinished_from), "progress": False, "callback": count,
    }  # fmt: skip
    changes = {**COMMON, **setting.changes}
    if changes.get("beta") and setting.trainer == "grpo":
        # The gradient of the KL term at π = π_ref is nothing but roundings.
        options["reference"] = tiny_model(seed=1)
    if setting.trainer == "grpo":
        grpo = GRPOConfig(**{"group_size": 3, **changes})
        if setting.own_loss:
            options["loss"] = lambda batch: grpo_loss(batch, grpo)
        result: Any = train_grpo(model, data, reward, grpo, **options)
    elif setting.trainer == "ppo":
        result = train_ppo(model, data, reward, PPOConfig(**{"warmup_updates": 0, **changes}), **options)
    else:
        ranking = OnlineRankingConfig(**{"group_size": 3, **changes})
        result = train_ranking(model, data, ranking, reward_functions=reward, **options)
    rows = [{k: v for k, v in vars(row).items() if k != "seconds"} for row in result.history]
    return Outcome(weights(result), rows, moved)


def serve(connection: Connection, environment: dict[str, str]) -> None:
    """Make the runs that are asked for, until the other end hangs up."""
    os.environ.update(environment)
    torch.set_num_threads(1)
    while True:
        try:
            setting = connection.recv()
        except EOFError:
            return
        try:
            outcome: Any = run(setting)
        except ValueError as error:
            outcome = str(error)
        connection.send(outcome)


def environments(count: int, **more: str) -> list[dict[str, str]]:
    """What a launcher would tell each of ``count`` processes of this machine."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {"WORLD_SIZE": str(count), "LOCAL_WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
              "MASTER_PORT": port, "OMP_NUM_THREADS": "1", **more}  # fmt: skip
    return [{"RANK": str(rank), "LOCAL_RANK": str(rank), **shared} for rank in range(count)]


class World:
    """Processes that make every run together; they are started by the first."""

    def __init__(self, count: int, **environment: str) -> None:
        self.count, self.environment = count, environment
        self.ends: list[Any] = []
        self.processes: list[Any] = []

    def start(self) -> None:
        for environment in environments(self.count, **self.environment):
            ours, theirs = FORKED.Pipe()
            process = FORKED.Process(target=serve, args=(theirs, environment), daemon=True)
            process.start()
            theirs.close()
            self.ends.append(ours)
            self.processes.append(process)

    def run(self, setting: Setting, timeout: float = 60) -> list[Any]:
        """Return what each process has to say: an outcome, or the text of a ValueError."""
        if not self.ends:
            self.start()
        for end in self.ends:
            end.send(setting)
        said = []
        for rank, end in enumerate(self.ends):
            if not end.poll(timeout):
                self.stop()
                raise TimeoutError(f"process {rank} of {self.count} hangs in {setting}")
            said.append(end.recv())
        return said

    def stop(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for end in self.ends:
            end.close()
        self.ends, self.processes = [], []
