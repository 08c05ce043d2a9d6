"""``loss=`` means one thing in all trainers: a function of the batch, one number per item."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from lm_runs import SHORT, TRAINERS, count_ones, records, run_grpo, run_ppo, tiny_model, weights

from policyopt.lm import DPOConfig, GRPOConfig, KTOConfig, PPOConfig, SamplingConfig, train_grpo
from policyopt.lm.batches import Completions, LabelledCompletions, Pairs, RankedGroup, ScoredPairs, Tokens
from policyopt.lm.dpo import pair_loss
from policyopt.lm.grpo import grpo_loss
from policyopt.lm.kto import completion_loss
from policyopt.lm.ppo import ppo_loss
from policyopt.lm.sft import sft_loss
from policyopt.losses import bradley_terry_loss, ranking_loss

GRPO = GRPOConfig(batch_size=4, group_size=4, sampling=SHORT, beta=0.1, minibatches=2, epochs_per_batch=2)
DEFAULTS: dict[str, tuple[type, Any]] = {
    "sft": (Tokens, sft_loss),
    "reward": (ScoredPairs, lambda batch: bradley_terry_loss(batch.chosen_scores, batch.rejected_scores)),
    "dpo": (Pairs, partial(pair_loss, config=DPOConfig())),
    "kto": (
        LabelledCompletions,
        partial(completion_loss, config=KTOConfig(undesirable_weight=1.5, beta=0.3)),
    ),
    "ranking": (RankedGroup, lambda group: ranking_loss(group.log_prob, beta=0.1)),
    "grpo": (Completions, partial(grpo_loss, config=GRPO)),
    "ppo": (Completions, partial(ppo_loss, config=PPOConfig())),
}


@pytest.mark.parametrize("name", TRAINERS)
def test_the_default_given_as_a_loss_changes_nothing(name: str) -> None:
    seen: set[type] = set()

    def loss(batch: Any) -> Any:
        seen.add(type(batch))
        return DEFAULTS[name][1](batch)

    ours, default = TRAINERS[name](tiny_model(), loss=loss), TRAINERS[name](tiny_model())
    assert seen == {DEFAULTS[name][0]}
    assert all(torch.equal(p, weights(default)[key]) for key, p in weights(ours).items())


@pytest.mark.parametrize("name", TRAINERS)
def test_another_loss_trains_another_model_and_may_be_a_tensor(name: str) -> None:
    def half(batch: Any) -> torch.Tensor:
        items = DEFAULTS[name][1](batch)
        return (items if isinstance(items, torch.Tensor) else items.loss) * 0

    options = {"changes": {"beta": 0.05, "value_coef": 0.0}} if name == "ppo" else {}
    model = tiny_model()
    before = {key: p.detach().clone() for key, p in model.model.named_parameters()}
    options = {"changes": {"weight_decay": 0.0, **options.get("changes", {})}}
    result = TRAINERS[name](model, loss=half, **options)
    trained = result.reward_model.network if result.reward_model else result.language_model.model
    for key, p in trained.named_parameters():
        if (old := before.get(key.removeprefix("model."), before.get(key))) is not None:
            assert torch.equal(p, old), "a loss of 0 moves nothing"


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        ("dpo", TypeError, "loss must be a function of one argument"),
        (lambda: 0, TypeError, "loss must be a function of one argument"),
        (lambda log_probs, advantages: 0, TypeError, "loss must be a function of one argument"),
        (lambda batch: torch.zeros(()), ValueError, r"loss must return one number per item.*got \(\)"),
        (lambda batch: 0.0, TypeError, "loss must return a tensor, or a named tuple.*got float"),
    ],
    ids=["text", "no argument", "two arguments", "mean", "number"],
)
def test_what_is_no_loss_is_refused(name: str, loss: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TRAINERS[name](tiny_model(), loss=loss)


def test_statistics_that_a_loss_does_not_report_are_nan() -> None:
    def reinforce(batch: Completions) -> torch.Tensor:
        return -batch.log_probs * batch.advantages[:, None]

    config = GRPOConfig(updates=1, batch_size=4, group_size=4, sampling=SHORT, importance_cap=None)
    data = [{"prompt": record["prompt"]} for record in records()]
    options: dict[str, Any] = {"progress": False}
    ours = train_grpo(tiny_model(), data, count_ones, config, loss=reinforce, **options)
    assert torch.tensor(ours.history[0].clip_fraction).isnan()
    # On one update per batch every ratio is 1: the clipped surrogate has this gradient.
    default = train_grpo(tiny_model(), data, count_ones, config, **options)
    assert ours.history[0].gradient_norm == pytest.approx(default.history[0].gradient_norm, rel=1e-5)


def test_a_loss_of_ones_own_sees_completions_of_advantage_zero() -> None:
    rows: list[int] = []

    def count(batch: Completions) -> Any:
        rows.append(len(batch))
        return -batch.log_probs

    def equal(completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    data = [{"prompt": "one"}] * 4
    config = GRPOConfig(updates=1, batch_size=4, group_size=4, sampling=SHORT)
    train_grpo(tiny_model(), data, equal, config, loss=count, progress=False)
    assert sum(rows) == 16


def test_pieces_are_cut_with_everything_that_belongs_to_them() -> None:
    shapes: list[tuple[int, ...]] = []

    def look(batch: Completions) -> Any:
        B, T = batch.mask.shape
        per_token = (
            batch.log_probs, batch.old_log_probs, batch.reference_log_probs, batch.sampler_log_probs,
            batch.advantages, batch.values, batch.old_values, batch.targets,
        )  # fmt: skip
        assert {tensor.shape for tensor in per_token} == {(B, T)}
        assert batch.rewards.shape == batch.finished.shape == (B,)
        assert batch.sequences.completion_mask.equal(batch.mask)
        assert batch.mask.any(0).all(), "no column without a token"
        shapes.append((B, T))
        return ppo_loss(batch, PPOConfig())

    run_ppo(tiny_model(), loss=look, changes={"micro_batch_size": 2})
    assert {B for B, _ in shapes} == {2}
    assert len({T for _, T in shapes}) > 1


def test_rewards_are_shaped_as_one_likes() -> None:
    calls: list[dict[str, Any]] = []

    def at_the_end(scores: Any, log_prob: Any, reference: Any, mask: Any, **options: Any) -> Any:
        calls.append(options)
        last = torch.zeros_like(log_prob)
        last[torch.arange(len(mask)), mask.sum(1) - 1] = scores
        return last

    ours = run_ppo(tiny_model(), shape_rewards=at_the_end, changes={"target_kl": None})
    none = run_ppo(tiny_model(), changes={"beta": 0.0, "target_kl": None})
    assert calls == [{"beta": 0.05}] * 3
    theirs = weights(none)
    assert all(torch.allclose(p, theirs[name], atol=1e-6) for name, p in weights(ours).items())


def test_a_temperature_of_zero_is_refused() -> None:
    with pytest.raises(ValueError, match="sampling must be of a temperature > 0"):
        run_grpo(tiny_model(), changes={"sampling": SamplingConfig(temperature=0.0)})


@pytest.mark.parametrize("name", ["reward", "dpo", "kto", "ranking"])
def test_without_a_margin_there_is_no_accuracy(name: str) -> None:
    seen: list[Any] = []

    def bare(batch: Any) -> torch.Tensor:
        seen.append(batch)
        return DEFAULTS[name][1](batch).loss

    rows = TRAINERS[name](tiny_model(), loss=bare).history
    assert rows.column("accuracy").tolist() == pytest.approx([float("nan")] * 3, nan_ok=True)
    if name == "ranking":
        assert seen[0].rewards.tolist() == [3.0, 2.0, 1.0]
    assert TRAINERS["reward"](tiny_model()).history[0].accuracy == 0.5  # the head starts at 0: ties
