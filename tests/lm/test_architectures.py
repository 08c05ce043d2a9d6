"""Architectures beyond Llama, in tiny random form: log-probabilities are those of the model's own logits."""

from __future__ import annotations

from typing import Any

import families
import pytest
import torch
import transformers
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from torch import nn

from policyopt.lm import DPOConfig, LanguageModel, SFTConfig, train_dpo, train_sft
from policyopt.lm.cache import check_cache
from policyopt.lm.heads import backbone_and_head
from policyopt.lm.log_probs import completion_log_probs
from policyopt.lm.sequences import Sequences

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11, 12], [10]]
COMPLETIONS = [[11, 2], [12, 13, 14, 0, 7, 8], [], [15, 2], [2]]
INDEX = [0, 0, 1, 1, 2]

COMMON = {
    "vocab_size": 40,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "initializer_range": 0.3,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
# A window of 4 tokens bites within these prompts and completions.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    "Llama": COMMON,
    "Qwen3": GROUPED,
    "Mistral": {**GROUPED, "sliding_window": 4},
    "GPT2": {
        "vocab_size": 40,
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "initializer_range": 0.3,
        "n_positions": 32,
    },
    "Gemma2": {
        **GROUPED,
        "sliding_window": 4,
        "final_logit_softcapping": 2.0,
        "attn_implementation": "eager",
    },
    "Gemma3": {**GROUPED, "sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "Cohere": {**COMMON, "logit_scale": 0.25},
    "Granite": {**GROUPED, "logits_scaling": 4.0},
    "Bloom": {"vocab_size": 40, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.3},
    "Mamba": {
        "vocab_size": 40,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "state_size": 4,
        "pad_token_id": 0,
    },
}
# In float64, save for the norms and rotations that transformers computes in float32 whatever the model's dtype.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}
# Eager attention masks rows of padding with the dtype's least number: −∞ in its float32 softmax if that is float64's.
DTYPE = {"Gemma2": torch.float32}
SHARING = [name for name in ARCHITECTURES if name not in ("Bloom", "Mamba")]


def close(name: str) -> dict[str, float]:
    return {"rtol": 1e-3, "atol": 1e-4} if DTYPE.get(name) == torch.float32 else CLOSE


def build(name: str) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, "Gemma3TextConfig" if name == "Gemma3" else f"{name}Config")
    options = dict(ARCHITECTURES[name])
    attention = options.pop("attn_implementation", None)
    model = getattr(transformers, f"{name}ForCausalLM" if name != "GPT2" else "GPT2LMHeadModel")._from_config(
        config(**options), **({} if attention is None else {"attn_implementation": attention})
    )
    return model.to(DTYPE.get(name, torch.float64)).eval()


def score(model: nn.Module, **options: Any) -> Any:
    model.zero_grad()
    log_probs = completion_log_probs(model, Sequences.pad(PROMPTS, COMPLETIONS, INDEX), **options).log_probs
    log_probs.sum().backward()
    return log_probs.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_equals_the_models_own_logits(name: str) -> None:
    model = build(name)
    log_probs, gradient = score(model, temperature=0.9)
    wanted = torch.zeros_like(log_probs)
    model.zero_grad()
    for row, completion in enumerate(COMPLETIONS):
        if not completion:
            continue
        prompt = PROMPTS[INDEX[row]]
        logits = model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1] / 0.9
        chosen = logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]
        chosen.sum().backward()
        wanted[row, : len(completion)] = chosen.detach()
    torch.testing.assert_close(log_probs, wanted, **close(name))
    for parameter, own in model.named_parameters():
        if own.grad is not None:
            torch.testing.assert_close(
                gradient[parameter], own.grad, **close(name), msg=lambda m, n=parameter: f"{n}: {m}"
            )


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shared_prompts_or_not(name: str) -> None:
    model = build(name)
    passes: list[tuple[int, ...]] = []
    check_cache(model)  # at the first call
    backbone_and_head(model).backbone.register_forward_pre_hook(
        lambda module, args, kwargs: passes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    shared, gradient = score(model)
    assert len(passes) == (2 if name in SHARING else 1)
    apart, wanted = score(model, share_prompts=False)
    torch.testing.assert_close(shared, apart, **close(name))
    for parameter in wanted:
        torch.testing.assert_close(gradient[parameter], wanted[parameter], **close(name))


# peft asks transformers by a name that transformers is about to drop.
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_lora_on_layers_and_on_the_head() -> None:
    """Adapters are seen; where the head has one, it is not read as a plain matrix."""
    for target in (["q_proj", "v_proj"], ["q_proj", "lm_head"]):
        model = build("Llama")
        adapted = get_peft_model(
            model, LoraConfig(target_modules=target, r=2, init_lora_weights=False)
        ).double()
        adapted.eval()
        log_probs, gradient = score(adapted)
        assert gradient.keys() == {n for n, p in adapted.named_parameters() if p.requires_grad}
        assert all("lora_" in name for name in gradient)
        logits = adapted(torch.tensor([PROMPTS[0] + COMPLETIONS[0]])).logits[0, 2:-1]
        wanted = logits.log_softmax(-1).gather(1, torch.tensor(COMPLETIONS[0])[:, None])[:, 0]
        torch.testing.assert_close(log_probs[0, :2], wanted.detach(), **CLOSE)
        with adapted.disable_adapter():
            assert not torch.allclose(score_without_gradient(adapted), log_probs)


@torch.no_grad()
def score_without_gradient(model: nn.Module) -> Any:
    return completion_log_probs(model, Sequences.pad(PROMPTS, COMPLETIONS, INDEX)).log_probs


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_prompt_tuning_is_refused() -> None:
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(ValueError, match="PromptTuningConfig adds virtual tokens"):
        backbone_and_head(get_peft_model(build("Llama"), config))


def test_unknown_changes_of_the_logits_are_noticed() -> None:
    class Doubled(transformers.LlamaForCausalLM):
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            output = super().forward(*args, **kwargs)
            output.logits = output.logits * 2
            return output

    model = Doubled(transformers.LlamaConfig(**COMMON)).train()
    with pytest.raises(
        ValueError, match=r"Doubled: decoder and head do not reproduce the model's own logits"
    ):
        backbone_and_head(model)
    assert all(module.training for module in model.modules())


def test_a_head_that_draws_tokens_without_an_embedding_is_refused() -> None:
    model = build("Llama")
    more = torch.nn.Linear(COMMON["hidden_size"], COMMON["vocab_size"] + 1, bias=False).to(model.dtype)
    model.set_output_embeddings(more)
    with pytest.raises(ValueError, match=r"LlamaForCausalLM: the head must not draw.*got 'logits of"):
        backbone_and_head(model)


def test_a_model_without_gradients_without_dropout_is_trained_by_sft_alone() -> None:
    model = LanguageModel(families.build("reformer"), families.tokenizer(), "reformer")
    config = {"updates": 1, "batch_size": 2, "learning_rate": 1e-4}
    train_sft(model.copy(), families.DATA, SFTConfig(**config), progress=False)
    with pytest.raises(ValueError, match=r"dpo: the model must allow gradients without dropout.*reformer"):
        train_dpo(model.copy(), families.DATA, DPOConfig(**config), progress=False)


def test_a_broken_model_is_named() -> None:
    model = build("Llama")
    model.lm_head.weight.data.fill_(torch.nan)
    with pytest.raises(ValueError, match="LlamaForCausalLM: the logits are not finite"):
        backbone_and_head(model)


def test_a_model_without_head_is_refused() -> None:
    with pytest.raises(ValueError, match="LlamaModel is not a causal language model with a head"):
        backbone_and_head(build("Llama").model)


def test_the_check_leaves_modes_and_random_numbers_alone() -> None:
    model = build("Llama").train()
    model.model.layers[0].eval()
    modes, state = [m.training for m in model.modules()], torch.get_rng_state()
    backbone_and_head(model)
    assert [m.training for m in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
