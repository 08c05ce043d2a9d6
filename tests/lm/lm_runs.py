"""Short runs of every trainer on a tiny random model, for tests in this and in other processes."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from policyopt.lm import (
    DPOConfig,
    GRPOConfig,
    KTOConfig,
    LanguageModel,
    LMResult,
    PPOConfig,
    RankingConfig,
    RewardConfig,
    Samples,
    SamplingConfig,
    SFTConfig,
    TransformersSampler,
    train_dpo,
    train_grpo,
    train_kto,
    train_ppo,
    train_ranking,
    train_reward_model,
    train_sft,
)

# Forked from a server that has imported everything once (what is installed: it does not find the tests).
FORKED = multiprocessing.get_context("forkserver")
FORKED.set_forkserver_preload(["policyopt.lm", "accelerate", "transformers.models.llama.modeling_llama"])

WORDS = ["one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten"]


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {word: i for i, word in enumerate(["<unk>", "<bos>", "<eos>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>")


def tiny_model(seed: int = 0, **options: Any) -> LanguageModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=13, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=64, bos_token_id=1, eos_token_id=2, pad_token_id=2,
        initializer_range=0.3, **options,
    )  # fmt: skip
    return LanguageModel(LlamaForCausalLM(config).eval(), tiny_tokenizer(), "tiny")


def records(count: int = 12) -> list[dict[str, Any]]:
    """Prompts and completions of different lengths, usable by every trainer."""
    result = []
    for i in range(count):
        texts = [" ".join(WORDS[(i + j + k) % 10] for k in range(1 + (i + j) % 4)) for j in (0, 3, 6)]
        result.append(
            {
                "prompt": " ".join(WORDS[: 1 + i % 5]),
                "completion": texts[0],
                "label": i % 3 > 0,
                "chosen": texts[0],
                "rejected": texts[1] + " ten",
                "ranked": [texts[0], texts[1] + " one", texts[2] + " two three"],
            }
        )
    return result


def count_ones(completions: list[str], **columns: Any) -> list[float]:
    return [text.split().count("one") - 0.1 * len(text.split()) for text in completions]


class Recording(TransformersSampler):
    """The model's sampler, which remembers what it drew last."""

    samples: Samples

    def sample(self, *args: Any, **options: Any) -> Samples:
        self.samples = super().sample(*args, **options)
        return self.samples


def gradients_of(model: LanguageModel) -> dict[str, torch.Tensor]:
    """Gradient of each parameter in the step to come; it outlives the optimiser's clearing."""
    gradients: dict[str, torch.Tensor] = {}

    def keep(name: str, p: torch.Tensor) -> None:
        gradients[name] = p.grad.clone()  # type: ignore[union-attr]

    for name, p in model.model.named_parameters():
        p.register_post_accumulate_grad_hook(partial(keep, name))
    return gradients


def assert_gradients(found: dict[str, torch.Tensor], model: LanguageModel) -> None:
    """The gradients are those that a backward pass has left in the model."""
    scale = max(float(p.grad.abs().max()) for p in model.model.parameters() if p.grad is not None)
    assert scale > 1e-4
    for name, p in model.model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-3, atol=1e-5 * scale)


COMMON: dict[str, Any] = {
    "updates": 3,
    "batch_size": 4,
    "learning_rate": 3e-3,
    "schedule": "linear",
    "weight_decay": 0.01,
}
SHORT = SamplingConfig(max_new_tokens=6)

Train = Callable[..., LMResult[Any, Any]]


def _prompts() -> list[dict[str, Any]]:
    return [{"prompt": record["prompt"]} for record in records()]


def run_sft(model: LanguageModel, **options: Any) -> LMResult[Any, Any]:
    config = SFTConfig(**{**COMMON, **options.pop("changes", {})})
    return train_sft(model, records(), config, progress=False, **options)


def run_reward(model: LanguageModel, **options: Any) -> LMResult[Any, Any]:
    config = RewardConfig(**{**COMMON, **options.pop("changes", {})})
    return train_reward_model(model, records(), config, progress=False, **options)


def run_dpo(model: LanguageModel, **options: Any) -> LMResult[Any, Any]:
    config = DPOConfig(**{**COMMON, **options.pop("changes", {})})
    return train_dpo(model, records(), config, progress=False, **options)


def run_kto(model: LanguageModel, **options: Any) -> LMResult[Any, Any]:
    changes = {"undesirable_weight": 1.5, "beta": 0.3}
    config = KTOConfig(**{**COMMON, **changes, **options.pop("changes", {})})
    return train_kto(model, records(), config, progress=False, **options)


def run_ranking(model: LanguageModel, **options: Any) -> LMResult[Any, Any]:
    config = RankingConfig(**{**COMMON, **options.pop("changes", {})})
    return train_ranking(model, records(), config, progress=False, **options)


def run_grpo(model: LanguageModel, **options: Any) -> LMResult[Any, Any]:
    changes = {"group_size": 4, "sampling": SHORT, "beta": 0.1, "minibatches": 2, "epochs_per_batch": 2}
    config = GRPOConfig(**{**COMMON, **changes, **options.pop("changes", {})})
    return train_grpo(model, _prompts(), count_ones, config, progress=False, **options)


def run_ppo(model: LanguageModel, **options: Any) -> LMResult[Any, Any]:
    changes = {"samples_per_prompt": 2, "sampling": SHORT, "target_kl": 2.0, "value_clip": 0.5}
    config = PPOConfig(**{**COMMON, **changes, **options.pop("changes", {})})
    return train_ppo(model, _prompts(), count_ones, config, progress=False, **options)


TRAINERS: dict[str, Train] = {
    "sft": run_sft,
    "reward": run_reward,
    "dpo": run_dpo,
    "kto": run_kto,
    "ranking": run_ranking,
    "grpo": run_grpo,
    "ppo": run_ppo,
}


def weights(result: LMResult[Any, Any]) -> dict[str, torch.Tensor]:
    network = result.language_model.model
    if result.reward_model is not None:
        network = result.reward_model.network
    if result.actor_critic is not None:
        network = result.actor_critic
    return {name: p.detach().clone() for name, p in network.named_parameters()}


def main(folder: str, names: str, kill_at: int | None = None) -> None:
    """Train in this process (or one of several) and write the weights; or die in the middle of a step."""
    import os
    import signal

    torch.set_num_threads(1)
    for name in names.split(","):

        def die(row: Any) -> None:
            if row.update == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

        result = TRAINERS[name](
            tiny_model(),
            callback=None if kill_at is None else die,
            checkpoint_dir=None if kill_at is None else Path(folder) / name,
            **({} if kill_at is None else {"changes": {"checkpoint_every": 1}}),
        )
        if int(os.environ.get("RANK", "0")) == 0:
            save_file(weights(result), Path(folder) / f"{name}.safetensors")
            (Path(folder) / f"{name}.txt").write_text(
                "\n".join(str({**vars(row), "seconds": 0}) for row in result.history)
            )


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]) if len(sys.argv) > 3 else None)
