"""The trainers learn: from the embedded models, on the two tasks whose truth is known."""

from __future__ import annotations

import functools

import pytest

from policyopt.lm import (
    DPOConfig,
    GRPOConfig,
    LanguageModel,
    PPOConfig,
    RankingConfig,
    SamplingConfig,
    SFTConfig,
    generate,
    train_dpo,
    train_grpo,
    train_ppo,
    train_ranking,
    train_sft,
)
from policyopt_book import load_model
from policyopt_book.tasks import addition, news

SAMPLING = SamplingConfig(max_new_tokens=48)
ITEMS = news.make_items(600, seed=5)
PROMPTS = news.prompt_records(ITEMS)


def utility(model: LanguageModel) -> float:
    """Mean exact utility of one sample for each of 200 unseen items; its standard error is about 0.1."""
    items = news.make_items(200, seed=999)
    prompts = [record["prompt"] for record in news.prompt_records(items)]
    texts = generate(model, prompts, SAMPLING, seed=1)
    return sum(news.utility(text[0], item) for text, item in zip(texts, items, strict=True)) / len(items)


@functools.cache
def gap() -> tuple[float, float]:
    """Utility of the policy that training starts from, and of the model before it was spoiled by mixed summaries."""
    return utility(load_model("news-sft", device="cpu")), utility(load_model("news-base", device="cpu"))


def closed(model: LanguageModel) -> float:
    start, target = gap()
    return (utility(model) - start) / (target - start)


@functools.cache
def samples() -> list[list[str]]:
    prompts = [record["prompt"] for record in PROMPTS]
    return generate(load_model("news-sft", device="cpu"), prompts, SAMPLING, samples_per_prompt=4, seed=2)


def test_there_is_a_gap_to_close() -> None:
    start, target = gap()
    assert start < 1.5
    assert target > 3.0


@pytest.mark.parametrize("seed", [0, 1])
def test_grpo_closes_two_thirds_of_the_gap(seed: int) -> None:
    config = GRPOConfig(
        updates=14, batch_size=16, group_size=8, learning_rate=5e-4, sampling=SAMPLING, beta=0.01
    )
    result = train_grpo(
        load_model("news-sft", device="cpu"), PROMPTS, news.utility_reward, config, seed=seed, progress=False
    )
    assert closed(result.language_model) > 2 / 3
    assert 0.3 < result.history[-1].kl < 6
    assert result.history.column("reward")[-3:].mean() > result.history[0].reward + 1


@pytest.mark.parametrize("critic", ["head", "separate"])
def test_ppo_closes_two_thirds_of_the_gap(critic: str) -> None:
    config = PPOConfig(
        updates=14, batch_size=32, samples_per_prompt=4, learning_rate=5e-4, epochs_per_batch=1, sampling=SAMPLING,
        critic=critic,  # type: ignore[arg-type]
    )  # fmt: skip
    result = train_ppo(
        load_model("news-sft", device="cpu"), PROMPTS, news.utility_reward, config, progress=False
    )
    assert closed(result.language_model) > 2 / 3
    assert 0.3 < result.history[-1].kl < 6


def test_dpo_closes_half_the_gap_in_one_pass() -> None:
    pairs = news.preference_pairs(ITEMS, samples(), seed=3)
    config = DPOConfig(batch_size=32, learning_rate=8e-4, beta=0.1, schedule="linear")
    result = train_dpo(load_model("news-sft", device="cpu"), pairs, config, progress=False)
    assert closed(result.language_model) > 1 / 2
    assert result.history.column("accuracy")[-10:].mean() > 0.6
    assert result.history[-1].margin > 0.3


def test_ranking_learns_the_order_of_lists() -> None:
    ranked = news.ranked_records(ITEMS, samples(), seed=3)
    config = RankingConfig(updates=25, batch_size=16, learning_rate=5e-4)
    result = train_ranking(load_model("news-sft", device="cpu"), ranked, config, progress=False)
    assert result.history.column("accuracy")[-5:].mean() > result.history.column("accuracy")[:5].mean() + 0.03
    assert utility(result.language_model) > gap()[0] + 0.5


def test_sft_on_complete_summaries_repairs_the_model() -> None:
    records = news.sft_records(ITEMS, news.COMPLETE, seed=4)
    config = SFTConfig(updates=40, batch_size=32, learning_rate=1e-3)
    result = train_sft(
        load_model("news-sft", device="cpu"), records, config, eval_data=records[:64], progress=False
    )
    assert closed(result.language_model) > 2 / 3
    assert result.history[-1].eval_loss < 0.8 * result.history[0].loss


def test_grpo_finds_out_that_thinking_pays() -> None:
    problems = addition.prompt_records(addition.make_problems(2000, seed=7))
    config = GRPOConfig(
        updates=25,
        batch_size=32,
        group_size=8,
        learning_rate=3e-4,
        sampling=SamplingConfig(max_new_tokens=48),
    )
    shares: list[float] = []

    def reward(completions: list[str], **columns: object) -> list[float]:
        shares.append(sum(addition.uses_scratchpad(text) for text in completions) / len(completions))
        return addition.answer_reward(completions, **columns)  # type: ignore[arg-type]

    result = train_grpo(load_model("addition-base", device="cpu"), problems, reward, config, progress=False)
    rewards, lengths = result.history.column("reward"), result.history.column("length")
    assert 0.3 < rewards[0] < 0.6
    assert rewards[-5:].mean() > 0.82
    assert shares[0] < 0.65
    assert shares[-1] > 0.85
    assert lengths[-1] > 1.4 * lengths[0]
