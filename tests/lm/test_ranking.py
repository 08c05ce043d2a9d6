"""Ranking: offline on lists, online on groups that a reward function orders."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lm_runs import (
    SHORT,
    Recording,
    assert_gradients,
    count_ones,
    gradients_of,
    records,
    tiny_model,
    weights,
)

from policyopt.estimators import sequence_log_prob
from policyopt.lm import OnlineRankingConfig, RankingConfig, completion_log_probs, train_ranking
from policyopt.losses import dpo_loss, ranking_loss

PROMPTS = [{"prompt": record["prompt"]} for record in records()]
ONLINE: dict[str, Any] = {
    "updates": 3, "batch_size": 4, "group_size": 4, "sampling": SHORT, "learning_rate": 3e-3
}  # fmt: skip


def online(model: Any, reward: Any = count_ones, **changes: Any) -> Any:
    options = {
        name: changes.pop(name) for name in ("loss", "seed", "reference", "sampler") if name in changes
    }
    if "loss_kind" in changes:
        changes["loss"] = changes.pop("loss_kind")
    config = OnlineRankingConfig(**{**ONLINE, **changes})
    return train_ranking(model, PROMPTS, config, reward_functions=reward, progress=False, **options)


def furthest(a: Any, b: Any) -> float:
    one, two = weights(a), weights(b)
    return max(float((one[name] - two[name]).abs().max()) for name in one)


def test_groups_are_ordered_by_their_rewards() -> None:
    groups: list[Any] = []

    def look(group: Any) -> torch.Tensor:
        groups.append(group)
        k = len(group.log_prob)
        return group.log_prob.new_zeros(k * (k - 1) // 2) + 0 * group.log_prob.sum()

    online(tiny_model(), loss=look, updates=1)
    assert len(groups) == 4
    for group in groups:
        assert torch.equal(group.rewards, group.rewards.sort(descending=True).values)


def test_online_on_a_fixed_batch_is_offline_on_its_list() -> None:
    """One update: sampling four texts and ranking them is training on that ranked list."""
    texts: list[tuple[str, list[str]]] = []

    def distinct(completions: list[str], prompts: list[str], **columns: Any) -> list[float]:
        rewards = [float(i % 4) for i in range(len(completions))]
        groups = range(0, len(completions), 4)
        texts.extend((prompts[i], completions[i : i + 4][::-1]) for i in groups)
        return rewards

    sampled = online(tiny_model(), distinct, updates=1, batch_size=1)
    assert sampled.history[0].accuracy == pytest.approx(offline_accuracy(texts[0][0], texts[0][1]), abs=1e-6)


def offline_accuracy(prompt: str, ranked: list[str]) -> float:
    model = tiny_model()
    sequences = model.encode([prompt], ranked)
    tokens = completion_log_probs(model.model, sequences).log_probs
    scores = sequence_log_prob(tokens, sequences.completion_mask)
    return float((ranking_loss(scores, beta=0.1).margin > 0).float().mean())


def test_equal_rewards_are_not_compared_and_move_nothing() -> None:
    def equal(completions: list[str], **columns: Any) -> list[float]:
        return [1.0] * len(completions)

    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    result = online(model, equal)
    assert all(torch.equal(p, before[name]) for name, p in model.model.named_parameters())
    assert all(
        row.loss == 0 and row.gradient_norm == 0 and math.isnan(row.accuracy) for row in result.history
    )
    assert [row.reward for row in result.history] == [1.0] * 3


def test_a_kl_term_holds_the_policy_near_its_start() -> None:
    free, held = (online(tiny_model(), updates=8, learning_rate=1e-2, kl_coef=c) for c in (0.0, 20.0))
    assert math.isnan(free.history[-1].kl)
    start = tiny_model()

    def distance(result: Any) -> float:
        pairs = zip(result.language_model.model.parameters(), start.model.parameters(), strict=True)
        return sum(float((p - q).detach().square().sum()) for p, q in pairs)

    assert held.history[0].kl == pytest.approx(0, abs=1e-4)
    assert distance(held) < 0.7 * distance(free)


def test_micro_batches_and_repetition() -> None:
    whole, again = online(tiny_model(), kl_coef=0.1), online(tiny_model(), kl_coef=0.1)
    assert furthest(whole, again) == 0
    assert furthest(whole, online(tiny_model(), kl_coef=0.1, micro_batch_size=4)) < 2e-5
    assert furthest(whole, online(tiny_model(), kl_coef=0.1, seed=1)) > 1e-4


def test_it_learns_the_order() -> None:
    result = online(tiny_model(), updates=40, batch_size=8, learning_rate=1e-2, beta=0.3)
    rewards = result.history.column("reward")
    assert rewards[-5:].mean() > rewards[:5].mean() + 0.2


# --- online DPO ------------------------------------------------------------------------------------------------


class Judge:
    """Reward the members of each group as told, or all alike in the first of a batch."""

    def __init__(self, rewards: list[float], *, tied: bool = False) -> None:
        self.rewards, self.tied = rewards, tied

    def __call__(self, completions: list[str], **columns: Any) -> list[float]:
        size = len(self.rewards)
        found = self.rewards * (len(completions) // size)
        return [1.0] * size + found[size:] if self.tied else found


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("rewards", "best", "worst"), [([0.0, 1.0], 1, 0), ([0.5, -1.0, 2.0, 1.0], 2, 1)])
def test_online_dpo_is_dpo_on_the_best_and_the_worst(
    rewards: list[float], best: int, worst: int, tied: bool
) -> None:
    reference, dense, model, size = tiny_model(1), tiny_model(), tiny_model(), len(rewards)
    gradients, sampler = gradients_of(model), Recording(model)
    result = online(
        model, Judge(rewards, tied=tied), loss_kind="dpo", updates=1, group_size=size, reference=reference,
        beta=0.3, micro_batch_size=4, sampler=sampler,
    )  # fmt: skip
    sequences, losses, margins = sampler.samples.sequences, [], []
    assert len(sequences) == 4 * size

    def scores(model: Any, group: int) -> torch.Tensor:
        part = sequences.select(torch.arange(group * size, (group + 1) * size))
        return sequence_log_prob(completion_log_probs(model.model, part).log_probs, part.completion_mask)

    for group in range(int(tied), 4):
        with torch.no_grad():
            theirs = scores(reference, group)
        ours = scores(dense, group)
        pair = dpo_loss(ours[best], ours[worst], theirs[best], theirs[worst], beta=0.3)
        losses.append(pair.loss)
        margins.append(float(pair.margin))
    assert len(losses) == 4 - tied
    loss = torch.stack(losses).mean()
    loss.backward()
    row = result.history[0]
    assert row.loss == pytest.approx(float(loss.detach()), rel=1e-4)
    assert row.margin == pytest.approx(sum(margins) / len(margins), rel=1e-3)
    assert row.accuracy == sum(margin > 0 for margin in margins) / len(margins)
    mean = sum(rewards) / len(rewards)
    assert row.reward == pytest.approx((mean * (4 - tied) + tied) / 4)  # of all, not of the pairs
    assert_gradients(gradients, dense)


def test_online_dpo_keeps_its_start_as_the_reference() -> None:
    result = online(tiny_model(), Judge([0.0, 1.0]), loss_kind="dpo", group_size=2, learning_rate=1e-2)
    first, *_, last = result.history
    assert first.loss == pytest.approx(math.log(2), rel=1e-4)
    assert first.margin == pytest.approx(0, abs=1e-5)
    assert first.kl == pytest.approx(0, abs=1e-4)
    assert last.kl != pytest.approx(0, abs=1e-3)
    given = online(
        tiny_model(), Judge([0.0, 1.0]), loss_kind="dpo", group_size=2, learning_rate=1e-2, reference=tiny_model()
    )  # fmt: skip
    assert furthest(result, given) < 1e-5


def test_online_dpo_learns_from_no_ties() -> None:
    model = tiny_model()
    before = {name: p.detach().clone() for name, p in model.model.named_parameters()}
    online(model, Judge([1.0, 1.0, 1.0]), loss_kind="dpo", group_size=3)
    assert all(torch.equal(p, before[name]) for name, p in model.model.named_parameters())


def test_online_dpo_raises_the_reward() -> None:
    result = online(tiny_model(), loss_kind="dpo", updates=40, batch_size=8, group_size=2, learning_rate=1e-2)
    rewards = result.history.column("reward")
    assert rewards[-5:].mean() > rewards[:5].mean() + 0.2


@pytest.mark.parametrize(
    ("config", "options", "message"),
    [
        (RankingConfig(), {"reward_functions": count_ones}, "must be None with a RankingConfig"),
        (RankingConfig(), {"reference": tiny_model()}, "must be None with a RankingConfig"),
        (OnlineRankingConfig(), {}, "reward_functions must be given with an OnlineRankingConfig"),
    ],
)
def test_what_does_not_belong_together_is_refused(config: Any, options: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        train_ranking(tiny_model(), records(), config, progress=False, **options)
