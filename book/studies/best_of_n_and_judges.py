"""RLHF on the news task: PPO, best of n and rejection sampling, watched by judges that the policy never saw.

Each seed draws 4,500 comparisons of its own. Two judges are fitted to the first half, and the policy is trained or
selected by one of them. Two more judges, of the same two kinds, are fitted to the other half: they are only recorded.

- ``ppo``: 14 updates of 8 prompts with 8 samples, at several beta.
- ``steered``: the same, with beta steered to a KL of 2 nats, ten times as fast as by default. It starts three times too
  high: while the KL is still near 0, the first batches lower it.
- ``best of n``: 192 completions of each of 32 prompts; everything is computed for the distribution of these samples.
- ``rejection``: as many completions as PPO draws (112 prompts, 8 each); the best of each 8 is imitated.

About 30 CPU seconds a run, and 60 for the first of a seed, which fits the judges.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import torch
from _text import start
from numpy.typing import NDArray

from policyopt.lm import (
    DPOConfig,
    ImplicitReward,
    LanguageModel,
    PPOConfig,
    RewardConfig,
    SamplingConfig,
    SFTConfig,
    TransformersSampler,
    completion_log_probs,
    generate,
    train_dpo,
    train_ppo,
    train_reward_model,
    train_sft,
)
from policyopt_book.studies import Study
from policyopt_book.tasks import news

SAMPLING = SamplingConfig(max_new_tokens=48)
KINDS = ("head", "likelihood")
SIZES = (1, 2, 4, 8, 16, 32, 64)
BETA_R = 0.3
MEASURED = ("score", "held-out head", "held-out likelihood", "utility", "wrong", "stated")


def _complete(model: LanguageModel, items: list[news.Item], each: int, seed: int) -> list[list[str]]:
    return generate(model, [i.prompt for i in items], SAMPLING, samples_per_prompt=each, seed=seed)


@functools.lru_cache(maxsize=1)
def _comparisons(seed: int) -> list[dict[str, Any]]:
    items = news.make_items(4_500, seed=20_000 + seed)
    return news.preference_pairs(items, _complete(start(), items, 2, seed), seed=seed)


@functools.lru_cache(maxsize=4)
def _judge(kind: str, half: int, seed: int) -> Any:
    """Return a judge of one kind, fitted to one half of the comparisons."""
    pairs = _comparisons(seed)[half::2]
    shared: dict[str, Any] = {
        "batch_size": 32, "learning_rate": 1e-3, "schedule": "linear", "warmup_updates": 10,
    }  # fmt: skip
    if kind == "head":
        config = RewardConfig(epochs=2, **shared)
        return train_reward_model(start(), pairs, config, seed=seed, progress=False).reward_model
    fit = train_dpo(
        start().copy(),
        pairs,
        DPOConfig(beta=BETA_R, **shared),
        reference=start(),
        seed=seed,
        progress=False,
    )
    return ImplicitReward(fit.language_model, start(), beta=BETA_R)


def _measures(kind: str, seed: int) -> dict[str, Any]:
    """Return reward functions: the judge that is obeyed, and what is only recorded."""

    def utility(completions: Any, *, facts: Any, **columns: Any) -> list[float]:
        return news.utility_reward(completions, completions, facts=facts)

    def wrong(completions: Any, *, facts: Any, **columns: Any) -> list[float]:
        return [float(news.count_facts(t, row)[1]) for t, row in zip(completions, facts, strict=True)]

    def stated(completions: Any, *, facts: Any, **columns: Any) -> list[float]:
        return [float(sum(news.count_facts(t, row))) for t, row in zip(completions, facts, strict=True)]

    return {
        "score": _judge(kind, 0, seed),
        "held-out head": _judge("head", 1, seed),
        "held-out likelihood": _judge("likelihood", 1, seed),
        "utility": utility,
        "wrong": wrong,
        "stated": stated,
    }


def _measure(
    texts: list[str], items: list[news.Item], kind: str, seed: int
) -> dict[str, NDArray[np.float64]]:
    """Return all measures of texts, of which every item has equally many."""
    each = len(texts) // len(items)
    about = [i for i in items for _ in range(each)]
    prompts, facts = [i.prompt for i in about], [list(i.facts) for i in about]
    found = {}
    for name, function in _measures(kind, seed).items():
        by_rule = name in ("utility", "wrong", "stated")
        values = function(texts, facts=facts) if by_rule else function(texts, prompts)
        found[name] = np.array(values, dtype=np.float64)
    return found


def _ppo(seed: int, kind: str, beta: float, **steering: float) -> dict[str, Any]:
    config = PPOConfig(
        updates=14, batch_size=8, samples_per_prompt=8, sampling=SAMPLING, learning_rate=5e-4,
        warmup_updates=3, beta=beta, reward_weights=(1.0, 0.0, 0.0, 0.0, 0.0, 0.0), **steering,
    )  # fmt: skip
    prompts = news.prompt_records(news.make_items(1_000, seed=40_000 + seed))
    history = train_ppo(
        start().copy(), prompts, _measures(kind, seed), config, reference=start(), seed=seed, progress=False
    ).history
    rewards = history.column("rewards")
    found = {"kl": history.column("kl"), **{name: [row[name] for row in rewards] for name in MEASURED}}
    return {**found, "beta": history.column("beta")} if steering else found


def _best_of(seed: int, kind: str) -> dict[str, Any]:
    items = news.make_items(32, seed=70_000 + seed)
    texts = [text for group in _complete(start(), items, 192, seed) for text in group]
    found = {name: v.reshape(len(items), -1) for name, v in _measure(texts, items, kind, seed).items()}
    rows: dict[str, list[float]] = {name: [] for name in ("kl", *MEASURED)}
    for n in SIZES:
        sums = dict.fromkeys(rows, 0.0)
        for item in range(len(items)):
            # The same text is the same action: its samples share one probability.
            _, first, of = np.unique(
                texts[item * 192 : (item + 1) * 192], return_index=True, return_inverse=True
            )
            p = np.bincount(of) / 192
            order = np.argsort(found["score"][item][first], kind="stable")
            below = np.cumsum(p[order]) ** n
            chosen = np.diff(below, prepend=0.0)
            some = chosen > 0
            sums["kl"] += float((chosen[some] * np.log(chosen[some] / p[order][some])).sum())
            for name in MEASURED:
                sums[name] += float(chosen @ found[name][item][first][order])
        for name, total in sums.items():
            rows[name].append(total / len(items))
    return rows


def _rejection(seed: int, kind: str, rate: float) -> dict[str, Any]:
    items = news.make_items(112, seed=40_000 + seed)
    groups = _complete(start(), items, 8, seed)
    flat = [text for group in groups for text in group]
    scores = np.array(_judge(kind, 0, seed)(flat, [i.prompt for i in items for _ in range(8)])).reshape(-1, 8)
    kept = [
        {"prompt": i.prompt, "completion": group[k]}
        for i, group, k in zip(items, groups, scores.argmax(1), strict=True)
    ]
    config = SFTConfig(batch_size=16, epochs=4, learning_rate=rate, warmup_updates=3, schedule="linear")
    policy = train_sft(start().copy(), kept, config, seed=seed, progress=False).language_model
    tested = news.make_items(64, seed=80_000 + seed)
    ids = [policy.tokenizer(i.prompt).input_ids for i in tested]
    drawn = TransformersSampler(policy).sample(ids, 4, SAMPLING, seed=seed).sequences
    with torch.no_grad():
        now = completion_log_probs(policy.model, drawn).log_probs
        then = completion_log_probs(start().model, drawn).log_probs
    kl = ((now - then) * drawn.completion_mask).sum(1).mean()
    rows = drawn.completion_ids.tolist()
    texts = [policy.decode(row[:n]) for row, n in zip(rows, drawn.lengths.tolist(), strict=True)]
    return {"kl": float(kl), **{name: v.mean() for name, v in _measure(texts, tested, kind, seed).items()}}


def run(*, seed: int, method: str, judge: str, beta: float, rate: float) -> dict[str, Any]:
    """Train or select once; what a method does not have is 0."""
    if method == "ppo":
        return _ppo(seed, judge, beta)
    if method == "steered":
        return _ppo(seed, judge, beta, target_kl=2.0, kl_gain=1.0)
    if method == "best of n":
        return _best_of(seed, judge)
    return _rejection(seed, judge, rate)


SETTINGS = [
    {"method": method, "judge": kind, "beta": beta, "rate": rate}
    for kind in KINDS
    for method, beta, rate in (
        ("best of n", 0.0, 0.0),
        ("rejection", 0.0, 3e-4),
        ("rejection", 0.0, 1e-3),
        ("ppo", 0.15, 0.0),
        ("ppo", 0.03, 0.0),
        ("ppo", 0.0, 0.0),
        ("steered", 0.45, 0.0),
    )
]
STUDY = Study("best_of_n_and_judges", run, SETTINGS, seeds=5, sample=SETTINGS[1])

if __name__ == "__main__":
    STUDY.main()
