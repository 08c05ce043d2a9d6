"""The sampling trainers: several processes learn and report what one does (CPU, gloo)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from joint_runs import FSDP2, Outcome, Setting, World, run

# Half a minute of processes that wait for one another: run by make sweep-quick.
pytestmark = pytest.mark.sweep

# With beta = 0 completions without advantage are left out; with beta > 0 they are not.
SETTINGS = {
    "grpo": Setting("grpo", {"minibatches": 2, "epochs_per_batch": 2, "batch_size": 8}),
    "grpo that falls silent": Setting("grpo", {}, silent_from=2),
    "grpo with a KL term that falls silent": Setting("grpo", {"beta": 0.1}, silent_from=2),
    "grpo with few signals": Setting(
        "grpo", {"epochs_per_batch": 2, "clip_ratio": 0.01, "minibatches": 2}, signal="few"
    ),
    "grpo with few signals in pieces": Setting(
        "grpo", {"epochs_per_batch": 2, "clip_ratio": 0.01, "micro_batch_size": 2}, signal="few"
    ),
    "grpo, minibatches that do not divide": Setting(
        "grpo", {"batch_size": 12, "minibatches": 5, "loss_mean": "constant"}
    ),
    "grpo, more minibatches than prompts": Setting("grpo", {"minibatches": 4, "loss_mean": "sequence"}),
    "grpo, uneven pieces with a KL term": Setting(
        "grpo", {"batch_size": 8, "minibatches": 3, "beta": 0.1, "micro_batch_size": 2}
    ),
    "reinforce++ with few signals": Setting("grpo", {"baseline": "batch", "loss": "cispo"}, signal="few"),
    "grpo, scaled by the batch, with an entropy bonus": Setting(
        "grpo", {"scale_rewards": "batch", "entropy_coef": 0.1, "minibatches": 2}
    ),
    "grpo, nothing finished": Setting("grpo", {"drop_unfinished": True}, unfinished_from=2),
    "grpo, a loss of one's own and nothing finished": Setting(
        "grpo", {"drop_unfinished": True, "minibatches": 3}, unfinished_from=2, own_loss=True
    ),
    "ppo, minibatches that do not divide": Setting("ppo", {"batch_size": 12, "minibatches": 5}),
    "ppo, more minibatches than prompts": Setting(
        "ppo", {"minibatches": 4, "samples_per_prompt": 2, "critic": "separate"}
    ),
    "ppo without signal": Setting("ppo", {"beta": 0.0, "gae_lambda": 1.0}, signal="none"),
    "ppo, no critic, that falls silent": Setting(
        "ppo", {"beta": 0.0, "gae_lambda": 1.0, "value_coef": 0.0}, silent_from=2
    ),
    "ranking that falls silent": Setting("ranking", {}, silent_from=2),
    "online dpo with few signals": Setting("ranking", {"loss": "dpo", "micro_batch_size": 3}, signal="few"),
    "best of n": Setting("grpo", {"baseline": "best", "micro_batch_size": 2}),
    "ranking with few signals": Setting("ranking", {"micro_batch_size": 3}, signal="few"),
}

SHARDED = [
    "grpo", "grpo that falls silent", "grpo with few signals in pieces", "grpo, nothing finished",
    "ranking with few signals", "online dpo with few signals",
]  # fmt: skip


@pytest.fixture(scope="module")
def worlds() -> Iterator[dict[str, World]]:
    started = {"two": World(2), "four": World(4), "sharded": World(2, **FSDP2)}
    yield started
    for world in started.values():
        world.stop()


def compare(one: Outcome, several: list[Any], within: float = 1e-5) -> None:
    assert not any(isinstance(said, str) for said in several), several
    for said in several:
        for mine, theirs in zip(one.rows, said.rows, strict=True):
            assert mine.keys() == theirs.keys()
            for name, value in mine.items():
                assert theirs[name] == pytest.approx(value, rel=2e-3, abs=2e-5, nan_ok=True), name
        assert one.weights.keys() == said.weights.keys()
        for name, weight in one.weights.items():
            assert float((weight - said.weights[name]).abs().max()) < within, name


@pytest.mark.parametrize("name", SETTINGS)
def test_two_processes_learn_and_report_what_one_does(name: str, worlds: dict[str, World]) -> None:
    compare(run(SETTINGS[name]), worlds["two"].run(SETTINGS[name]))


@pytest.mark.parametrize("name", [name for name in SETTINGS if "more" in name or "few" in name])
def test_four_processes_learn_and_report_what_one_does(name: str, worlds: dict[str, World]) -> None:
    compare(run(SETTINGS[name]), worlds["four"].run(SETTINGS[name]))


@pytest.mark.parametrize("name", SHARDED)
def test_sharded_processes_learn_and_report_what_one_does(name: str, worlds: dict[str, World]) -> None:
    compare(run(SETTINGS[name]), worlds["sharded"].run(SETTINGS[name]))


@pytest.mark.parametrize(
    "name",
    [
        "grpo that falls silent", "grpo, nothing finished", "grpo, a loss of one's own and nothing finished",
        "ppo, no critic, that falls silent", "ranking that falls silent",
    ],
)  # fmt: skip
def test_without_a_signal_no_step_is_made(name: str) -> None:
    outcome = run(SETTINGS[name])
    assert min(outcome.moved[:2]) > 1e-3  # Adam has a momentum …
    assert outcome.moved[2:] == [0.0]  # … which does not move the weights
    assert [row["gradient_norm"] for row in outcome.rows[2:]] == [0.0]
    if SETTINGS[name].trainer == "grpo" and not SETTINGS[name].changes.get("minibatches"):
        assert [row["ratio_max"] for row in outcome.rows] == [1.0] * 3


def test_the_learning_rate_falls_without_steps_as_well() -> None:
    silent = run(Setting("grpo", {"schedule": "linear"}, signal="none"))
    assert [row["learning_rate"] for row in silent.rows] == pytest.approx([3e-3, 2e-3, 1e-3])
    assert silent.moved == [0.0] * 3


def test_a_kl_term_has_a_gradient_without_advantages() -> None:
    outcome = run(SETTINGS["grpo with a KL term that falls silent"])
    assert min(outcome.moved) > 0
    assert min(row["gradient_norm"] for row in outcome.rows) > 0


def test_sharded_processes_refuse_minibatches_that_do_not_divide(worlds: dict[str, World]) -> None:
    for setting in (Setting("grpo", {"batch_size": 6, "minibatches": 2}), Setting("ppo", {"batch_size": 6})):
        for said in worlds["sharded"].run(setting):
            assert said == (
                "with FSDP all processes must have as many prompts in every minibatch: batch_size must be a "
                "multiple of 2 processes times 2 minibatches, got 6; or launch without FSDP"
            )


@pytest.mark.parametrize("world", ["two", "sharded"])
def test_each_process_fills_its_own_share_with_groups_that_differ(
    world: str, worlds: dict[str, World]
) -> None:
    one, other = worlds[world].run(Setting("grpo", {"max_draws": 3, "minibatches": 2}, signal="few"))
    compare(one, [other], within=1e-7)
    assert 4 * 3 < min(row["completions"] for row in one.rows) < 3 * 4 * 3
    for row in one.rows:
        assert 0 < row["zero_variance"] < 1
    assert one.rows[0]["gradient_norm"] > 0


def test_a_batch_that_the_processes_cannot_share_is_refused(worlds: dict[str, World]) -> None:
    for said in worlds["two"].run(Setting("grpo", {"batch_size": 5})):
        assert said == "batch_size must be a multiple of the 2 processes, got 5"


@st.composite
def drawn(draw: st.DrawFn) -> Setting:
    trainer = draw(st.sampled_from(["grpo", "grpo", "ppo", "ranking"]))
    batch_size = 4 * draw(st.integers(1, 3))
    changes: dict[str, Any] = {
        "updates": 3, "batch_size": batch_size, "micro_batch_size": draw(st.sampled_from([None, 1, 3, 4]))
    }  # fmt: skip
    if trainer != "ranking":
        changes["minibatches"] = draw(st.integers(1, batch_size))
        changes["epochs_per_batch"] = draw(st.integers(1, 2))
    if trainer == "ppo":
        changes["samples_per_prompt"] = draw(st.integers(1, 2))
        changes["value_coef"] = draw(st.sampled_from([0.1, 0.0]))
        changes["normalize_advantages"] = draw(st.booleans())
    else:
        changes["group_size"] = draw(st.integers(2, 4))
    if trainer == "grpo":
        changes["drop_unfinished"] = draw(st.booleans())
        changes["loss_mean"] = draw(st.sampled_from(["token", "sequence", "constant"]))
        changes["beta"] = draw(st.sampled_from([0.0, 0.0, 0.1]))
    return Setting(
        trainer, changes, draw(st.sampled_from(["all", "few", "none"])), draw(st.sampled_from([1, 9])),
        draw(st.sampled_from([1, 9])), trainer == "grpo" and draw(st.booleans()),
    )  # fmt: skip


@pytest.mark.sweep
@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(setting=drawn())
def test_drawn_settings_learn_alike(setting: Setting, worlds: dict[str, World]) -> None:
    one = run(setting)
    # Adam makes much of a gradient that is all rounding; a step more or less moves weights by 3e-3.
    within = 1e-4
    for world in ("two", "four"):
        compare(one, worlds[world].run(setting), within)
    sharded = worlds["sharded"].run(setting)
    if setting.changes["batch_size"] % (2 * setting.changes.get("minibatches", 1)) == 0:
        compare(one, sharded, within)
    else:
        assert all("or launch without FSDP" in said for said in sharded)
