"""Ranking: offline on lists, online on groups that a reward function orders."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lm_runs import SHORT, count_ones, records, tiny_model, weights

from policyopt.lm import OnlineRankingConfig, RankingConfig, train_ranking

PROMPTS = [{"prompt": record["prompt"]} for record in records()]
ONLINE: dict[str, Any] = {
    "updates": 3, "batch_size": 4, "group_size": 4, "sampling": SHORT, "learning_rate": 3e-3
}  # fmt: skip


def online(model: Any, reward: Any = count_ones, **changes: Any) -> Any:
    options = {name: changes.pop(name) for name in ("loss", "seed", "reference") if name in changes}
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
    from policyopt.estimators import sequence_log_prob
    from policyopt.lm import completion_log_probs
    from policyopt.losses import ranking_loss

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
