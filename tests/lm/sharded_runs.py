"""Runs of the trainers in settings where sharded weights could go wrong: by one process, or by several with FSDP2."""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lm_runs import (
    SHORT,
    TRAINERS,
    records,
    run_dpo,
    run_grpo,
    run_ppo,
    run_reward,
    run_sft,
    tiny_model,
    tiny_tokenizer,
    weights,
)
from safetensors.torch import save_file
from transformers import Gemma2Config, Gemma2ForCausalLM, GPT2Config, GPT2LMHeadModel

from policyopt.lm import (
    LanguageModel,
    LMResult,
    LoRA,
    RankingConfig,
    SamplingConfig,
    TransformersSampler,
    add_lora,
    generate,
    train_ranking,
)
from policyopt.lm.data import epoch_order

Result = LMResult[Any, Any]


def gpt2() -> LanguageModel:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=13, n_embd=16, n_layer=2, n_head=2, n_positions=64, eos_token_id=2, bos_token_id=1, resid_pdrop=0.0,
        attn_pdrop=0.0, embd_pdrop=0.0,
    )  # fmt: skip
    return LanguageModel(GPT2LMHeadModel(config).eval(), tiny_tokenizer(), "gpt2")


FILTERED = SamplingConfig(max_new_tokens=6, top_p=0.8, top_k=8)


def gemma2() -> LanguageModel:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=13, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, max_position_embeddings=64, sliding_window=4, eos_token_id=2,
        query_pre_attn_scalar=8,
    )  # fmt: skip
    return LanguageModel(Gemma2ForCausalLM(config).eval(), tiny_tokenizer(), "gemma2")


def lora() -> LanguageModel:
    return add_lora(tiny_model(), LoRA(rank=4), seed=0)


def trained_adapters() -> LanguageModel:
    """LoRA that has been trained before, so that the reference is not the model without it."""
    model, generator = lora(), torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


def tied() -> LanguageModel:
    return tiny_model(tie_word_embeddings=True)


def layer_by_layer(folder: Path) -> Result:
    model = tiny_model()
    several = "WORLD_SIZE" in os.environ
    return run_grpo(model, sampler=TransformersSampler(model, synchronize=several))


def saved(folder: Path) -> Result:
    """Counts what each process holds in the middle of the training, and saves at the end."""
    model = tied()
    held: dict[str, Any] = {}

    def count(row: Any) -> None:
        parameters = list(model.model.parameters())
        own = [p.to_local() if hasattr(p, "to_local") else p for p in parameters]
        held.update(own=sum(p.numel() for p in own), all=sum(p.numel() for p in parameters))

    result = run_sft(
        model, eval_data=records(5), callback=count, changes={"eval_every": 2, "logged_samples": 2}
    )
    result.save(folder / "saved-model")
    if os.environ.get("RANK", "0") == "0":
        held["texts"] = generate(result.language_model, ["one two"], SHORT)[0]
        held["samples"] = [sample.after for sample in result.samples]
        held["eval_loss"] = result.history[-1].eval_loss
        (folder / "held.json").write_text(json.dumps(held))
    return result


def resumed(folder: Path) -> Result:
    """Stops after two steps and takes up the checkpoint with a new model."""
    where, changes = folder / "checkpoint", {"checkpoint_every": 1}
    run_ppo(tiny_model(), checkpoint_dir=where, changes=changes, callback=lambda row: row.update == 2)
    if os.environ.get("RANK", "0") == "0":
        shutil.copytree(where, folder / "after-two-steps")
    return run_ppo(tiny_model(), checkpoint_dir=where, changes=changes)


def uneven(folder: Path) -> Result:
    """Lists of three and of two: one process gets two micro-batches and the other one."""
    lists = [{"prompt": "one", "ranked": ["one", "two", "three"][:size]} for size in (3, 2)]
    order = epoch_order(4, 0, 0)
    data = [lists[order.index(i) // 2] for i in range(4)]
    config = RankingConfig(updates=1, batch_size=4, micro_batch_size=4)
    return train_ranking(tiny_model(), data, config, progress=False)


def different(folder: Path) -> Result:
    return run_dpo(tiny_model(seed=int(os.environ["RANK"])))


REFUSED = {"uneven": uneven, "different": different}
"""Settings in which sharded processes must say what is wrong, all of them."""

SETTINGS: dict[str, Callable[[Path], Result]] = {
    **{name: lambda _, train=train: train(tiny_model()) for name, train in TRAINERS.items()},  # type: ignore[misc]
    "micro-batches": lambda _: run_dpo(tiny_model(), changes={"micro_batch_size": 2}),
    "checkpointing": lambda _: run_dpo(
        tied(), changes={"gradient_checkpointing": True, "micro_batch_size": 2}
    ),
    "lora-sft": lambda _: run_sft(lora()),
    "lora-dpo": lambda _: run_dpo(lora()),
    "lora-grpo": lambda _: run_grpo(lora()),
    "lora-ppo": lambda _: run_ppo(lora(), changes={"gradient_checkpointing": True}),
    "trained-adapters": lambda _: run_grpo(trained_adapters()),
    "filtered": lambda _: run_ppo(trained_adapters(), changes={"sampling": FILTERED}),
    "two-networks": lambda _: run_ppo(tied(), changes={"critic": "separate"}),
    "reward-eval": lambda _: run_reward(tiny_model(), eval_data=records(5), changes={"eval_every": 1}),
    "gpt2": lambda _: run_grpo(gpt2()),
    "gemma2": lambda _: run_grpo(gemma2()),
    "layer-by-layer": layer_by_layer,
    "saved": saved,
    "resumed": resumed,
}


def main(folder: Path, names: list[str]) -> None:
    torch.set_num_threads(1)
    for name in names:
        if name in REFUSED:
            with pytest.raises(ValueError) as caught:  # noqa: PT011 - the test reads the message
                REFUSED[name](folder)
            (folder / f"{name}-{os.environ['RANK']}.txt").write_text(str(caught.value))
            continue
        result = SETTINGS[name](folder)
        if os.environ.get("RANK", "0") == "0":
            save_file(weights(result), folder / f"{name}.safetensors")
            norms = [row.gradient_norm for row in result.history]
            (folder / f"{name}.json").write_text(json.dumps(norms))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
