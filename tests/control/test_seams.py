"""What an experiment may replace without patching anything: loss=, weigh=, step=, search=, a policy."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from control_runs import PPO, TRAINERS, assert_same_run, clipped, ppo, reinforce, surrogate, trpo, with_config
from torch import Tensor

from policyopt.control import (
    PPOConfig,
    Rollout,
    Steps,
    ppo_loss,
    reinforce_loss,
    reinforce_weights,
    trpo_loss,
)
from policyopt.estimators import normalize
from policyopt.losses import clipped_surrogate_loss, policy_gradient_loss
from policyopt.trust_region import LineSearch, TrustRegionStep, line_search, trust_region_step

ALGORITHMS = pytest.mark.parametrize("train", TRAINERS.values(), ids=TRAINERS)


class OnlyLoss(NamedTuple):
    loss: Tensor


@dataclass
class AsDataclass:
    loss: Tensor
    ratio: Tensor
    kl: Tensor
    clipped: Tensor


# --- loss= ---


@pytest.mark.parametrize(
    ("train", "default"),
    [(reinforce, reinforce_loss), (trpo, trpo_loss), (ppo, partial(ppo_loss, config=PPO))],
    ids=TRAINERS,
)
def test_the_default_loss_is_a_function_that_can_be_given(train: Any, default: Any) -> None:
    assert_same_run(train(loss=default), train())


def test_the_default_losses_are_those_of_the_maths() -> None:
    g = torch.Generator().manual_seed(0)
    fields = ("observations", "actions", "log_prob", "old_log_prob", "advantages", "targets", "old_values")
    steps = Steps(**{name: torch.randn(50, generator=g) for name in fields})
    assert torch.equal(reinforce_loss(steps), policy_gradient_loss(steps.log_prob, steps.advantages))
    assert torch.equal(trpo_loss(steps).loss, surrogate(steps).loss)
    for eps in (0.1, 0.5):
        expected = clipped_surrogate_loss(
            steps.log_prob, steps.old_log_prob, steps.advantages, clip_ratio=eps
        )
        ours = ppo_loss(steps, PPOConfig(clip_ratio=eps))
        assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


@ALGORITHMS
def test_a_loss_sees_the_steps_with_the_present_log_prob(train: Any) -> None:
    seen: list[Steps] = []

    def spy(steps: Steps) -> Tensor:
        seen.append(steps)
        return policy_gradient_loss(steps.log_prob, steps.advantages)

    result = with_config(train, total_steps=1)(loss=spy)
    assert sum(len(steps) for steps in seen) >= result.steps
    first = seen[0]
    assert first.log_prob.requires_grad
    for name in ("observations", "advantages", "old_log_prob", "targets", "old_values"):
        assert not getattr(first, name).requires_grad, name
        assert len(getattr(first, name)) == len(first)
    assert first.observations.shape == (len(first), 4)
    torch.testing.assert_close(first.log_prob.detach(), first.old_log_prob, rtol=0, atol=1e-6)


@ALGORITHMS
@pytest.mark.parametrize("wrap", [lambda x: x, OnlyLoss], ids=["tensor", "named tuple"])
def test_the_loss_alone_is_enough(train: Any, wrap: Any) -> None:
    """Same weights as with all statistics, which are NaN in the history."""
    whole = {"reinforce": reinforce_loss, "trpo": surrogate, "ppo": clipped}
    name = next(name for name in TRAINERS if TRAINERS[name] is train)

    def loss(steps: Steps) -> Any:
        items = whole[name](steps)
        return wrap(items if isinstance(items, Tensor) else items.loss)

    ours, full = train(loss=loss), train()
    for a, b in zip(ours.policy.parameters(), full.policy.parameters(), strict=True):
        assert torch.equal(a, b)
    for name, column in ours.history.table().items():
        if name in ("kl", "clip_fraction", "ratio_max") and train is ppo:
            assert np.isnan(column).all()
        else:
            np.testing.assert_array_equal(column, full.history.column(name), err_msg=name)


def test_a_dataclass_will_do() -> None:
    assert_same_run(ppo(loss=lambda steps: AsDataclass(**clipped(steps)._asdict())), ppo())


def test_a_loss_replaces_the_policys_objective_only() -> None:
    """Entropy bonus and value loss stay: with a loss of nothing the critic learns and the policy spreads out."""
    result = with_config(ppo, orthogonal_init=False, learning_rate=0.05, entropy_coef=1.0, total_steps=3000)(
        loss=lambda steps: 0.0 * steps.log_prob
    )
    assert result.history[-1].policy_loss == 0
    assert result.history[0].entropy < 0.69 < 0.999 * math.log(2) < result.history[-1].entropy
    assert result.history[0].explained_variance < 0.05
    assert result.history[-1].explained_variance > 0.3


@ALGORITHMS
@pytest.mark.parametrize(
    ("loss", "message"),
    [
        (3, r"loss must be a function of one argument, the Steps of a .*got 3"),
        ("ppo", r"loss must be a function of one argument.*got 'ppo'"),
        (
            lambda log_prob, old_log_prob, advantages: log_prob,
            r"loss must be a function of one argument.*missing a required argument.*lambda batch",
        ),
        (lambda: None, r"loss must be a function of one argument.*too many positional arguments"),
    ],
)
def test_what_is_no_loss_is_refused_before_anything_is_made(train: Any, loss: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        train.func("NoSuchEnvironment-v0", train.args[1], loss=loss, progress=False)


@ALGORITHMS
@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (
            lambda steps: steps.log_prob.mean(),
            ValueError,
            r"loss must return one number per item, shape \(\d+,\), got \(\); leave the mean",
        ),
        (lambda steps: steps.log_prob[1:], ValueError, r"loss must return one number per item"),
        (
            lambda steps: {"loss": steps.log_prob},
            TypeError,
            r"loss must return a tensor.*field 'loss', got dict",
        ),
        (lambda steps: None, TypeError, r"loss must return a tensor.*got NoneType"),
        (lambda steps: steps.log_prob.detach(), ValueError, r"loss must depend on the policy's parameters"),
    ],
    ids=["mean", "short", "dict", "nothing", "detached"],
)
def test_a_wrong_result_of_a_loss_is_refused_in_the_first_update(
    train: Any, loss: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        train(loss=loss)
    assert caught.value.result.history == []  # type: ignore[attr-defined]


def test_target_kl_needs_a_loss_that_returns_the_kl() -> None:
    train = with_config(ppo, target_kl=0.01)
    with pytest.raises(
        ValueError, match=r"loss must return the field 'kl' with this config, got only OnlyLoss"
    ):
        train(loss=lambda steps: OnlyLoss(clipped(steps).loss))
    assert_same_run(train(loss=clipped), train())


# --- weigh= ---


def test_reinforce_takes_weights_from_a_function() -> None:
    seen: list[dict[str, Any]] = []

    def spy(rollout: Rollout, **options: Any) -> tuple[Tensor, Tensor]:
        seen.append(options)
        return reinforce_weights(rollout, **options)

    assert_same_run(reinforce(weigh=spy), reinforce())
    assert {k: seen[0][k] for k in ("gamma", "reward_to_go", "baseline", "normalized")} == {
        "gamma": 0.99,
        "reward_to_go": True,
        "baseline": "learned",
        "normalized": True,
    }
    raw = with_config(reinforce, normalize_weights=False, bootstrap_truncated=False)
    raw(weigh=spy)
    assert seen[-1]["normalized"] is False
    assert seen[-1]["next_values"] is None


def test_weights_normalised_over_the_padding_too() -> None:
    """An experiment of the book: the padding's zeros pull mean and deviation."""

    def over_padding(rollout: Rollout, **options: Any) -> tuple[Tensor, Tensor]:
        weights, returns = reinforce_weights(rollout, **{**options, "normalized": False})
        return torch.where(rollout.valid, normalize(weights), 0.0), returns

    seen: list[Tensor] = []

    def spy(steps: Steps) -> Tensor:
        seen.append(steps.advantages)
        return reinforce_loss(steps)

    train = with_config(reinforce, baseline="none", total_steps=1)
    train(loss=spy)
    train(loss=spy, weigh=over_padding)
    assert abs(seen[0].mean()) < 1e-5
    assert seen[1].mean() > 0.1


# --- step= and search= ---


def test_trpo_takes_another_step() -> None:
    seen: list[dict[str, Any]] = []

    def spy(parameters: Any, loss_and_kl: Any, **settings: Any) -> TrustRegionStep:
        seen.append(settings)
        return trust_region_step(parameters, loss_and_kl, **settings)

    assert_same_run(trpo(step=spy), trpo())
    names = ("kl_limit", "damping", "cg_iterations", "backtracks", "shrink", "accept_ratio")
    assert seen[0] == {name: getattr(trpo.args[1], name) for name in names}


def test_trpo_without_a_line_search() -> None:
    """An experiment of the book: the full step, whatever it does."""

    def full_step(evaluate: Any, *, old_loss: float, **_: Any) -> LineSearch:
        loss, kl = evaluate(1.0)
        return LineSearch(True, 1.0, old_loss - loss, kl, [(1.0, old_loss - loss, kl)], "accepted")

    bold = with_config(trpo, damping=1e-3, kl_limit=0.02, total_steps=1000)
    free = bold(step=partial(trust_region_step, search=full_step))
    held = bold()
    assert set(free.history.column("step_fraction")) == {1.0}
    assert free.history.column("kl").max() > 0.1 > 0.02 >= held.history.column("kl").max()


def test_a_search_that_refuses_or_breaks_off_leaves_the_parameters_alone() -> None:
    x = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    old = x.detach().clone()

    def loss_and_kl() -> tuple[Tensor, Tensor]:
        return x.sum(), (x - old).square().sum()

    def refusing(evaluate: Any, **_: Any) -> LineSearch:
        evaluate(0.7)
        return LineSearch(False, 0.0, 0.0, 0.0, [], "no")

    def breaking(evaluate: Any, **_: Any) -> LineSearch:
        evaluate(0.7)
        raise KeyboardInterrupt

    assert trust_region_step([x], loss_and_kl, search=refusing).search.reason == "no"
    assert torch.equal(x, old)
    with pytest.raises(KeyboardInterrupt):
        trust_region_step([x], loss_and_kl, search=breaking)
    assert torch.equal(x, old)
    assert trust_region_step([x], loss_and_kl, search=line_search).search.accepted
    assert not torch.equal(x, old)


# --- a policy of one's own ---


def test_a_stale_actor_is_a_policy_that_acts_with_old_weights() -> None:
    """An experiment of the book: the log-probabilities of the update are not those of the actor."""
    from copy import deepcopy

    from policyopt.control import CategoricalPolicy, make_policy, make_vector_env

    class Stale(CategoricalPolicy):
        def act(self, observations: Tensor, generator: Any = None, **options: Any) -> Tensor:
            if not hasattr(self, "actor"):
                self.__dict__["actor"] = deepcopy(self.network)
            logits = self.actor(self.encoder(observations))
            with torch.no_grad():
                from policyopt.distributions import Categorical

                return Categorical.from_logits(logits).sample(generator)

    env, _ = make_vector_env("CartPole-v1", 1)
    fresh = make_policy(
        env.single_observation_space,
        env.single_action_space,
        hidden=(16,),
        generator=torch.Generator().manual_seed(0),
    )
    stale = Stale(fresh.encoder, env.single_action_space, fresh.network)
    before = deepcopy(fresh.network)
    result = with_config(ppo, total_steps=4000)(policy=stale)
    moved, kept = result.policy.network[0].weight, stale.actor[0].weight
    assert torch.equal(kept, before[0].weight)
    assert not torch.equal(moved, kept)
