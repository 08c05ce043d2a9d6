"""The two loops of a tutorial as they are written, and beside each the loss it means, on SmolLM2-135M-Instruct.

All weights are trained, by AdamW, with the whole data in every batch. So nothing is drawn, and there is one run of each
setting. The tutorial states the rate 5e-5 for its DPO; a tenth of it is run too, because 5e-5 is large for all weights.

"DPO, as written": ten epochs on the five pairs, −mean σ(β (row of chosen − row of rejected)) with β 0.5, where a row is
the vocabulary's log-probabilities at the last position of prompt and text; no logarithm, no reference.
"ranking, as written": fifteen epochs on two prompts of four ranked answers, rows clamped to [−10, 10],
−log(σ(row of better − row of worse) + 1e-6) over all pairs, 0.02 kl_div with the reference's log-probabilities clamped
to at least 1e-6, gradient norm 1. "DPO" is train_dpo, "ranking" is train_ranking with means per token and β 3.

About 60 CPU seconds a run.
"""

from __future__ import annotations

from typing import Any

import torch
from _real_model import start, summary
from torch import Tensor

from policyopt.lm import DPOConfig, LanguageModel, RankingConfig, train_dpo, train_ranking
from policyopt.lm.data import encode_completion, encode_prompt
from policyopt_book.studies import Study
from policyopt_book.tasks.assistant import PAIRS, RANKED, pair_log_probs

EPOCHS = {"DPO": 10, "ranking": 15}


def last_rows(model: LanguageModel, prompt: Any, texts: list[str]) -> Tensor:
    """Log-probabilities of all tokens after each text, [texts, vocabulary]."""
    rows = []
    for text in texts:
        ids = encode_prompt(model.tokenizer, prompt)
        ids = ids + encode_completion(model.tokenizer, text, prompt)
        logits = model.model(input_ids=torch.tensor([ids])).logits
        rows.append(logits[0, -1].log_softmax(-1))
    return torch.stack(rows)


def dpo_as_written(policy: LanguageModel) -> Tensor:
    """Return the loss of one epoch."""
    losses = []
    for pair in PAIRS:
        chosen, rejected = last_rows(policy, pair["prompt"], [pair["chosen"], pair["rejected"]])
        losses.append(-torch.sigmoid(0.5 * (chosen - rejected)).mean())
    return torch.stack(losses).mean()


def ranking_as_written(policy: LanguageModel) -> Tensor:
    """Return the loss of one epoch."""
    losses = []
    for record in RANKED:
        rows = last_rows(policy, record["prompt"], record["ranked"])
        with torch.no_grad():
            reference = last_rows(start(), record["prompt"], record["ranked"])
        clamped = rows.clamp(-10, 10)
        pairs = [
            -torch.log(torch.sigmoid(clamped[i] - clamped[j]) + 1e-6).mean()
            for i in range(len(rows))
            for j in range(i + 1, len(rows))
        ]
        kl = torch.nn.functional.kl_div(rows, reference.clamp(min=1e-6), reduction="batchmean")
        losses.append(torch.stack(pairs).mean() + 0.02 * kl)
    return torch.stack(losses).sum()


def answers(model: LanguageModel) -> Tensor:
    """Return log π of the ranked answers, [prompts, 4], the best first."""
    rows = [
        {"prompt": r["prompt"], "chosen": r["ranked"][i], "rejected": r["ranked"][i + 1]}
        for r in RANKED
        for i in (0, 2)
    ]
    return pair_log_probs(model, rows).view(len(RANKED), 4)


def run(*, seed: int, system: str, learning_rate: float) -> dict[str, Any]:
    """Train by one loop, and measure."""
    policy = start().copy()
    name, _, written = system.partition(", ")
    if written:
        objective = {"DPO": dpo_as_written, "ranking": ranking_as_written}[name]
        optimiser = torch.optim.AdamW(policy.model.parameters(), lr=learning_rate)
        curve = []
        for _ in range(EPOCHS[name]):
            loss = objective(policy)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(policy.model.parameters(), 1.0)
            optimiser.step()
            curve.append(loss.item())
    elif name == "DPO":
        config = DPOConfig(batch_size=5, epochs=10, learning_rate=learning_rate, beta=0.5)
        curve = train_dpo(policy, PAIRS, config, seed=seed, progress=False).history.column("loss")
    else:
        ranking = RankingConfig(
            batch_size=2, epochs=15, learning_rate=learning_rate, beta=3.0, length_normalized=True
        )
        history = train_ranking(policy, RANKED, ranking, seed=seed, progress=False).history
        curve = history.column("loss")
    gained = answers(policy) - answers(start())
    better, worse = torch.triu_indices(4, 4, 1)
    return {
        "loss": curve,
        "answers_gained": gained.mean(0).tolist(),
        "answers_right": float((gained[:, better] > gained[:, worse]).float().mean()),
        **summary(policy),
    }


STUDY = Study(
    "real_model_articles",
    run,
    [
        {"system": system, "learning_rate": rate}
        for rate in (5e-5, 5e-6)
        for system in ("DPO, as written", "DPO", "ranking, as written", "ranking")
    ],
    seeds=1,
    minutes=True,
)

if __name__ == "__main__":
    STUDY.main()
