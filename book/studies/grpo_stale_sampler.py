"""GRPO on the sums with a sampler that is some updates old, with the weight c and without it.

Every run makes 32 updates of 16 prompts in groups of 8. The sampler's weights are those of ``age`` updates before.
``cap`` 0 stands for no correction. A third way, ``masked``, leaves tokens whose weight leaves [1/2, 2] out.

About 6 CPU seconds a run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from grpo_group_and_rate import SAMPLING, measure
from torch import nn

from policyopt.estimators import kl_estimate
from policyopt.lm import GRPOConfig, SamplingConfig, TransformersSampler, train_grpo
from policyopt.lm.batches import Completions
from policyopt.lm.grpo import grpo_loss
from policyopt_book import load_model
from policyopt_book.studies import Study
from policyopt_book.tasks import addition


class StaleSampler:
    """Sample with the weights of ``age`` updates before."""

    def __init__(self, model: Any, age: int) -> None:
        self.copy = model.copy()
        self.sampler = TransformersSampler(self.copy)
        self.waiting: deque[dict[str, Any]] = deque()
        self.age = age

    def update_weights(self, model: nn.Module) -> None:
        """Take over the policy's weights, ``age`` calls later."""
        self.waiting.append({name: value.detach().clone() for name, value in model.state_dict().items()})
        if len(self.waiting) > self.age:
            self.copy.model.load_state_dict(self.waiting.popleft())

    def sample(
        self,
        prompts: Sequence[Sequence[int]],
        samples_per_prompt: int,
        config: SamplingConfig,
        **options: Any,
    ) -> Any:
        """Draw completions with the old weights."""
        return self.sampler.sample(prompts, samples_per_prompt, config, **options)


def run(*, seed: int, age: int, correction: str, rate: float) -> dict[str, Any]:
    """Train once."""
    config = GRPOConfig(
        updates=32, batch_size=16, group_size=8, learning_rate=rate, sampling=SAMPLING,
        importance_cap=2.0 if correction == "cap" else None,
    )  # fmt: skip
    seen: list[tuple[float, float]] = []

    def loss(batch: Completions) -> Any:
        log_c = (batch.old_log_probs - batch.sampler_log_probs)[batch.mask]
        gap = kl_estimate(batch.sampler_log_probs, batch.old_log_probs, "k3")[batch.mask]
        seen.append((gap.mean().item(), log_c.exp().max().item()))
        items = grpo_loss(batch, config)
        if correction == "mask":
            c = (batch.old_log_probs - batch.sampler_log_probs).exp()
            items = items._replace(loss=torch.where((c > 0.5) & (c < 2), c * items.loss, 0.0))
        return items

    model = load_model("addition-base", device="cpu")
    sums = addition.prompt_records(addition.make_problems(4_096, seed=7))
    history = train_grpo(
        model, sums, addition.answer_reward, config, loss=loss, sampler=StaleSampler(model, age), seed=seed,
        progress=False,
    ).history  # fmt: skip
    return {
        **measure(model),
        # Mean over the run of KL(sampler || trainer) per token, k3, and the largest c of all tokens.
        "gap": sum(gap for gap, _ in seen) / len(seen),
        "c_max": max(largest for _, largest in seen),
        "ratio_max": history.column("ratio_max").max(),
        "gap_curve": [gap for gap, _ in seen],
        "reward_curve": history.column("reward"),
    }


SETTINGS = [
    {"age": age, "correction": correction, "rate": rate}
    for age in (0, 1, 4, 8)
    for correction in ("none", "cap", "mask")
    for rate in (1.5e-4, 4e-4)
    if age > 0 or correction == "cap"
]
STUDY = Study(
    "grpo_stale_sampler", run, SETTINGS, seeds=5, sample={"age": 4, "correction": "cap", "rate": 1.5e-4}
)

if __name__ == "__main__":
    STUDY.main()
