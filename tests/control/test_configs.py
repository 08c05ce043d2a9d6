"""Settings: each is checked, and names the bad value."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
from control_runs import PPO

from policyopt.control import PPOConfig, ReinforceConfig, TRPOConfig

BAD: list[tuple[type, str, Any]] = [
    (PPOConfig, "total_steps", 0),
    (PPOConfig, "total_steps", 1e5),
    (PPOConfig, "total_steps", True),
    (PPOConfig, "num_envs", 0),
    (PPOConfig, "num_envs", "8"),
    (PPOConfig, "gamma", 1.01),
    (PPOConfig, "gamma", math.nan),
    (PPOConfig, "gamma", "0.9"),
    (PPOConfig, "cpu_threads", 0),
    (PPOConfig, "checkpoint_every", 0),
    (PPOConfig, "hidden", (64, 0)),
    (PPOConfig, "hidden", 64),
    (PPOConfig, "activation", "gelu"),
    (PPOConfig, "normalize_rewards", "yes"),
    (PPOConfig, "initial_log_std", math.nan),
    (PPOConfig, "rollout_steps", 0),
    (PPOConfig, "gae_lambda", -0.1),
    (PPOConfig, "use_critic", False),
    (PPOConfig, "epochs_per_batch", 0),
    (PPOConfig, "minibatch_size", 0),
    (PPOConfig, "learning_rate", 0.0),
    (PPOConfig, "learning_rate", math.inf),
    (PPOConfig, "clip_ratio", 0.0),
    (PPOConfig, "clip_ratio", None),
    (PPOConfig, "value_clip", 0.0),
    (PPOConfig, "value_coef", -1.0),
    (PPOConfig, "entropy_coef", -1.0),
    (PPOConfig, "max_gradient_norm", 0.0),
    (PPOConfig, "target_kl", 0.0),
    (TRPOConfig, "kl_limit", 0.0),
    (TRPOConfig, "damping", -1.0),
    (TRPOConfig, "cg_iterations", 0),
    (TRPOConfig, "backtracks", 0),
    (TRPOConfig, "shrink", 1.0),
    (TRPOConfig, "accept_ratio", 1.0),
    (TRPOConfig, "critic_learning_rate", 0.0),
    (TRPOConfig, "critic_epochs", 0),
    (TRPOConfig, "critic_minibatch_size", 0),
    (TRPOConfig, "compile", True),
    (ReinforceConfig, "learning_rate", -1.0),
    (ReinforceConfig, "baseline", "median"),
    (ReinforceConfig, "entropy_coef", -0.1),
    (ReinforceConfig, "critic_epochs", 0),
]


@pytest.mark.parametrize(("config", "name", "value"), BAD)
def test_configs_name_the_bad_value(config: type, name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"^{name} must be .+, got ") as caught:
        config(**{name: value})
    assert str(caught.value).endswith(f"got {value!r}")


def test_every_numeric_setting_is_covered_above() -> None:
    tried = {(config, name) for config, name, _ in BAD}
    for config in (PPOConfig, TRPOConfig, ReinforceConfig):
        for field in dataclasses.fields(config):
            kinds = ("int", "float", "Count", "Positive", "NonNegative", "Share")
            if any(kind in str(field.type) for kind in kinds):
                assert any((c, field.name) in tried for c in (config, PPOConfig)), (config, field.name)


def test_configs_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PPO.gamma = 0.5  # type: ignore[misc]


@pytest.mark.parametrize(
    ("config", "old", "new"),
    [
        (PPOConfig, "epochs", "epochs_per_batch"),
        (PPOConfig, "minibatch", "minibatch_size"),
        (TRPOConfig, "critic_minibatch", "critic_minibatch_size"),
    ],
)
def test_names_of_the_last_version_are_understood(config: Any, old: str, new: str) -> None:
    with pytest.warns(DeprecationWarning, match=f"{old} is called {new} now"):
        made = config(**{old: 7})
    assert getattr(made, new) == 7
    with pytest.warns(DeprecationWarning, match=f"{old} is called {new} now"):
        assert getattr(made, old) == 7
    with pytest.warns(DeprecationWarning, match=f"{old} is called {new} now"):
        assert getattr(dataclasses.replace(made, **{old: 3}), new) == 3


def test_messages_say_what_is_allowed() -> None:
    for changes, message in (
        ({"clip_ratio": 0}, "clip_ratio must be > 0, got 0"),
        ({"value_clip": -1.0}, "value_clip must be > 0 or None, got -1.0"),
        ({"rollout_steps": 0}, "rollout_steps must be >= 1 or None, got 0"),
        ({"gamma": 2.0}, r"gamma must be in \[0, 1\], got 2.0"),
        ({"hidden": (0,)}, r"hidden must be a tuple of widths >= 1, got \(0,\)"),
    ):
        with pytest.raises(ValueError, match=f"^{message}$"):
            PPOConfig(**changes)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"^shrink must be in \(0, 1\), got 1.0$"):
        TRPOConfig(shrink=1.0)
