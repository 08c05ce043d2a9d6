"""GRPO on the sums with a sampler that is some updates old, with four kinds of the weight c and without it.

Every run makes 32 updates of 16 prompts in groups of 8. The sampler's weights are those of ``age`` updates before;
until there are any, those of the start. Weights of tokens or of whole completions are truncated at 2, or dropped where
they leave [1/2, 2].

About 6 CPU seconds a run.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, get_args

from grpo_group_and_rate import SAMPLING, measure
from torch import nn

from policyopt.estimators import ImportanceMode
from policyopt.lm import GRPOConfig, SamplingConfig, TransformersSampler, train_grpo
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
    options: dict[str, Any] = (
        {"importance_mode": correction} if correction != "none" else {"importance_cap": None}
    )
    config = GRPOConfig(
        updates=32, batch_size=16, group_size=8, learning_rate=rate, sampling=SAMPLING, **options
    )  # fmt: skip
    model = load_model("addition-base", device="cpu")
    sums = addition.prompt_records(addition.make_problems(4_096, seed=7))
    history = train_grpo(
        model,
        sums,
        addition.answer_reward,
        config,
        sampler=StaleSampler(model, age),
        seed=seed,
        progress=False,
    ).history
    return {
        **measure(model),
        "kl_curve": history.column("sampler_kl"),
        "effective_samples_curve": history.column("effective_samples"),
        "reward_curve": history.column("reward"),
    }


SETTINGS = [
    {"age": age, "correction": correction, "rate": rate}
    for age in (0, 1, 4, 16)
    for correction in ("none", *get_args(ImportanceMode))
    for rate in (1.5e-4, 4e-4)
    if age > 0 or correction == "token_truncate"
]
STUDY = Study(
    "grpo_stale_sampler",
    run,
    SETTINGS,
    seeds=5,
    sample={"age": 4, "correction": "token_truncate", "rate": 1.5e-4},
)

if __name__ == "__main__":
    STUDY.main()
