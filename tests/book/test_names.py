"""The page that maps our names to those of Stable-Baselines3 and TRL: complete, and true."""

from __future__ import annotations

import dataclasses
import re
from typing import Any

import pytest

from policyopt import control, lm
from repository import ROOT

PAGE = (ROOT / "book" / "names.md").read_text(encoding="utf-8")
CONTROL, LANGUAGE = PAGE.split("## Training in environments")[1].split("## Training of language models")
OURS = {
    "control": (CONTROL, [control.ReinforceConfig, control.TRPOConfig, control.PPOConfig]),
    "lm": (
        LANGUAGE,
        [
            lm.SFTConfig,
            lm.RewardConfig,
            lm.DPOConfig,
            lm.KTOConfig,
            lm.GRPOConfig,
            lm.PPOConfig,
            lm.OnlineRankingConfig,
        ],
    ),
}
OF_THE_TRAINER = ("tools", "environment_factory")
# Settings that neither of the other libraries has under any name.
ALONE = {
    "bootstrap_truncated", "use_critic", "compile", "cpu_threads", "accept_ratio", "reward_to_go", "baseline",
    "normalize_weights", "critic_learning_rate", "sampling",
}  # fmt: skip


def cells(text: str) -> list[list[str]]:
    return [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| `")]


def names(cell: str) -> set[str]:
    return {name.lstrip(".").split("=")[0].split("(")[0] for name in re.findall(r"`([^`]+)`", cell)}


def fields(configs: list[Any]) -> set[str]:
    return {field.name for config in configs for field in dataclasses.fields(config)}


@pytest.mark.parametrize("half", OURS)
def test_every_setting_is_on_the_page(half: str) -> None:
    text, configs = OURS[half]
    listed = set().union(*(names(row[0]) for row in cells(text)))
    listed |= {name.removeprefix("sampling.") for name in listed}
    assert fields(configs) - listed - ALONE == set()


@pytest.mark.parametrize("half", OURS)
def test_every_name_of_ours_exists(half: str) -> None:
    text, configs = OURS[half]
    known = fields([*configs, lm.SamplingConfig])
    known |= (
        set(dir(control))
        | set(dir(lm))
        | {"checkpoint_dir", "seed", "callback", "reference", "sampler", "lora", "environment"}
    )
    known |= {"policy.predict", "result.save", "TrainResult.load", "lm.train_ppo", "load", "reward_functions"}
    for row in cells(text):
        for name in names(row[0]):
            assert name in known or name.removeprefix("sampling.") in known or name.startswith('"'), name


def test_names_of_trl_exist() -> None:
    trl = pytest.importorskip("trl")
    theirs = fields([trl.SFTConfig, trl.RewardConfig, trl.DPOConfig, trl.GRPOConfig, trl.KTOConfig])
    for row in cells(LANGUAGE):
        if row[-1].startswith("PPO"):
            continue  # of a trainer that is gone
        for name in names(row[1]):
            simple = re.fullmatch(r"[a-z_0-9]+", name)
            if simple and name not in ("reward_funcs", "ref_model", "peft_config", "load", *OF_THE_TRAINER):
                assert name in theirs, name
