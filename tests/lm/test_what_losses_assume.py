"""What a loss takes for granted: π, π_old and π_ref are one policy at the start, and a KL divergence is one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from lm_runs import (
    SHORT,
    TRAINERS,
    count_ones,
    records,
    run_dpo,
    run_grpo,
    run_ppo,
    tiny_model,
    tiny_tokenizer,
    weights,
)
from transformers import GPT2Config, GPT2LMHeadModel, OPTConfig, OPTForCausalLM

from policyopt.lm import LanguageModel, LoRA, OnlineRankingConfig, add_lora, train_ranking

NOTHING = {"learning_rate": 1e-9, "updates": 1}  # so that what is reported is what there was at the start


def gpt2() -> LanguageModel:
    """GPT-2 as its config comes, with dropout 0.1 in three places."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=13, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5,
                        bos_token_id=1, eos_token_id=2)  # fmt: skip
    return LanguageModel(GPT2LMHeadModel(config).eval(), tiny_tokenizer(), "gpt2")


def opt() -> LanguageModel:
    """OPT calls ``dropout`` in the decoder layer itself, by the layer's own mode."""
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=13, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
                       max_position_embeddings=64, word_embed_proj_dim=16, init_std=0.5,
                       bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
    return LanguageModel(OPTForCausalLM(config).eval(), tiny_tokenizer(), "opt")


def adapters() -> LanguageModel:
    """LoRA with dropout, and trained, so that its dropout is felt."""
    model = add_lora(tiny_model(), LoRA(rank=4, dropout=0.5))
    train_adapters(model)
    return model


def train_adapters(language_model: LanguageModel) -> None:
    """Give the adapters other weights: B is no longer 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in language_model.model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def run_online_ranking(model: LanguageModel, **changes: Any) -> Any:
    config = OnlineRankingConfig(batch_size=4, group_size=4, sampling=SHORT, kl_coef=0.1, **changes)
    prompts = [{"prompt": record["prompt"]} for record in records()]
    return train_ranking(model, prompts, config, reward_functions=count_ones, progress=False)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("build", [gpt2, opt, adapters])
def test_at_the_start_all_policies_are_one(build: Any, checkpointing: bool) -> None:
    changes = {**NOTHING, "gradient_checkpointing": checkpointing}
    first = run_dpo(build(), changes=changes).history[0]
    assert first.margin == first.chosen_reward == first.rejected_reward == 0.0
    assert first.loss == pytest.approx(math.log(2), rel=1e-6)
    whole = {"minibatches": 1, "epochs_per_batch": 1}
    first = run_ppo(build(), changes={**changes, **whole}).history[0]
    assert first.kl == 0.0
    assert first.ratio_max == 1.0
    first = run_ppo(build(), changes=changes).history[0]  # minibatches round differently
    assert first.kl == 0.0
    assert first.ratio_max == pytest.approx(1, abs=1e-4)
    assert first.clip_fraction == 0.0
    for settings in ({"minibatches": 2}, {"minibatches": 1, "beta": 0.0}):
        first = run_grpo(build(), changes={**changes, **settings}).history[0]
        assert first.ratio_max == pytest.approx(1, abs=1e-4)
        assert first.clip_fraction == 0.0
    first = run_grpo(build(), changes=changes).history[0]
    assert first.kl == pytest.approx(0, abs=1e-4)  # the sampler's log-probabilities, step by step
    assert run_online_ranking(build(), **changes).history[0].kl == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("build", [gpt2, opt])
@pytest.mark.parametrize("name", TRAINERS)
def test_dropout_is_on_in_sft_and_the_reward_model_alone(name: str, build: Any) -> None:
    model, without = build(), build()
    for module in without.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    first, second = weights(TRAINERS[name](model)), weights(TRAINERS[name](without))
    equal = all(torch.equal(p, second[key]) for key, p in first.items())
    assert equal == (name not in ("sft", "reward"))


@pytest.mark.parametrize("name", ["sft", "dpo", "ranking", "grpo", "ppo"])
@pytest.mark.parametrize("build", [gpt2, opt, adapters, tiny_model])
def test_checkpointing_recomputes_every_layer_and_changes_nothing(name: str, build: Any) -> None:
    def run(checkpointing: bool) -> tuple[list[float], int]:
        model, in_backward = build(), []
        layers = next(m for m in model.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2)
        for layer in layers:
            first = next(m for m in layer.modules() if "Norm" in type(m).__name__)
            first.register_forward_hook(lambda *_: in_backward.append(torch._C._current_graph_task_id() != -1))
        changes = {"gradient_checkpointing": checkpointing, "updates": 2}
        result = TRAINERS[name](model, changes=changes)
        assert not any(module.training for module in model.model.modules())
        return result.history.column("gradient_norm"), sum(in_backward)

    plain, never = run(False)
    recomputed, twice = run(True)
    assert never == 0
    steps = {"grpo": 8, "ppo": 8, "sft": 2, "dpo": 2, "ranking": 2}[name]  # 2 updates, or 8 steps in them
    assert twice == 2 * steps
    if name != "sft":  # where dropout draws
        assert list(recomputed) == pytest.approx(list(plain), rel=1e-3)
