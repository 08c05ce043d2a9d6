"""GRPO and online ranking with the rule "one short sentence", SmolLM2-135M-Instruct with adapters.

The chapter's settings: eight updates of four questions, six replies to each, at most 24 tokens, adapters of rank 16.
Online ranking is what an article calls GRPO: the policy draws a group, the reward ranks it, every ordered pair costs
−log σ(β (log π(better) − log π(worse))), with the article's β of 0.3 and no reference. A seed draws the adapters, the
order of the questions and the replies. At the end: greedy replies to four new questions, as tokens, and the share that
the rule accepts; what else moved, as in real_model_dpo.

About 150 CPU seconds a run.
"""

from __future__ import annotations

from typing import Any

from _real_model import adapted, summary

from policyopt.lm import (
    GRPOConfig,
    OnlineRankingConfig,
    SamplingConfig,
    TransformersSampler,
    train_grpo,
    train_ranking,
)
from policyopt.lm.data import encode_prompt
from policyopt_book.studies import Study
from policyopt_book.tasks.assistant import NEW_TOPICS, TOPICS, WISH, chat, short_sentence

ROUND: dict[str, Any] = {
    "updates": 8,
    "batch_size": 4,
    "group_size": 6,
    "sampling": SamplingConfig(max_new_tokens=24),
}


def run(*, seed: int, method: str, learning_rate: float) -> dict[str, Any]:
    """Train by one method, and measure."""
    policy = adapted(seed)
    prompts = [{"prompt": chat(topic + WISH)} for topic in TOPICS]
    lengths: list[float] = []

    def rule(completions: list[str], finished: list[bool]) -> list[float]:
        words = [len(text.split()) for text in completions]
        lengths.append(sum(words) / len(words))
        return short_sentence(completions, finished)

    result: Any
    if method == "GRPO":
        grpo = GRPOConfig(learning_rate=learning_rate, beta=0.02, **ROUND)
        result = train_grpo(policy, prompts, rule, grpo, seed=seed, progress=False)
    else:
        ranking = OnlineRankingConfig(learning_rate=learning_rate, beta=0.3, **ROUND)
        result = train_ranking(policy, prompts, ranking, reward_functions=rule, seed=seed, progress=False)
    history = result.history
    asked = [encode_prompt(policy.tokenizer, chat(topic + WISH)) for topic in NEW_TOPICS]
    greedy = SamplingConfig(temperature=0.0, max_new_tokens=32)
    replies = TransformersSampler(policy).sample(asked, 1, greedy, seed=0)
    lasts = replies.sequences.lengths.tolist()
    rows = [row[:last] for row, last in zip(replies.sequences.completion_ids.tolist(), lasts, strict=True)]
    texts = [policy.decode(row) for row in rows]
    end = policy.tokenizer.eos_token_id
    accepted = short_sentence(texts, replies.finished.tolist())
    return {
        "reward": history.column("reward"),
        "words": lengths,
        "kl": history.column("kl"),
        "accepted": sum(accepted) / len(accepted),
        "tokens": [row + [end] * (33 - len(row)) for row in rows],
        **{f"after_{name}": value for name, value in summary(policy).items()},
    }


STUDY = Study(
    "real_model_grpo",
    run,
    [{"method": method, "learning_rate": 5e-4} for method in ("GRPO", "online ranking")],
    seeds=3,
    minutes=True,
)

if __name__ == "__main__":
    STUDY.main()
