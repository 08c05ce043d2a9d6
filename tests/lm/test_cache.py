"""The cache: under the name that the forward pass has, compared with the whole model before anything relies on it."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import pytest
import torch
import transformers
from families import EOS, PROMPTS, V, build, tokenizer, whole
from hypothesis import given, settings
from hypothesis import strategies as st
from lm_runs import tiny_model
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import LlamaForCausalLM, LlamaModel, cache_utils

from policyopt.lm import LanguageModel, SamplingConfig, TransformersSampler, completion_log_probs
from policyopt.lm.cache import check_cache
from policyopt.lm.heads import backbone_and_head
from policyopt.lm.sequences import Sequences

NATIVE = "cache" if "cache" in inspect.signature(LlamaModel.forward).parameters else "past_key_values"
SHAPE: dict[str, Any] = {
    "vocab_size": V,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": EOS,
    "pad_token_id": None,
}
has_recurrent_layers = pytest.mark.skipif(
    not hasattr(cache_utils, "LinearAttentionLayer"), reason="these caches came later"
)


def llama(**changes: Any) -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(transformers.LlamaConfig(**{**SHAPE, **changes})).eval()


def wrap(model: Any) -> LanguageModel:
    model.generation_config.eos_token_id = EOS
    return LanguageModel(model, tokenizer(), "tiny")


def largest_error(lm: LanguageModel, prompts: list[list[int]], group: int = 3, steps: int = 10) -> float:
    """Of the sampler's log-probabilities, beside the whole model's row by row."""
    samples = TransformersSampler(lm).sample(prompts, group, SamplingConfig(max_new_tokens=steps), seed=3)
    worst = 0.0
    for row, length in enumerate(samples.sequences.lengths.tolist()):
        completion = samples.sequences.completion_ids[row, :length].tolist()
        wanted = whole(lm.model, prompts[row // group], completion)
        worst = max(worst, float((samples.log_probs[row, :length] - wanted).abs().max()))
    return worst


class NamedCache(LlamaModel):
    """The decoder after 5.40, whatever the installed version: other names are swallowed."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Any = None,
        position_ids: Any = None,
        cache: Any = None,
        **_: Any,
    ) -> Any:
        options = {NATIVE: cache, "use_cache": cache is not None}
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **options
        )


class NamedPast(LlamaModel):
    """The decoder before 5.24."""

    def forward(
        self, input_ids: Tensor, attention_mask: Any = None, position_ids: Any = None, past_key_values: Any = None,
        **_: Any,
    ) -> Any:  # fmt: skip
        options = {NATIVE: past_key_values, "use_cache": past_key_values is not None}
        return super().forward(
            input_ids=input_ids, attention_mask=attention_mask, position_ids=position_ids, **options
        )


class Swallowing(LlamaModel):
    """Takes whatever comes, and a cache for nothing."""

    def forward(self, input_ids: Tensor, attention_mask: Any = None, **_: Any) -> Any:
        return super().forward(input_ids=input_ids, attention_mask=attention_mask, use_cache=False)


class Forgetful(LlamaModel):
    """Names the cache, and does not use it."""

    def forward(self, input_ids: Tensor, attention_mask: Any = None, cache: Any = None, **_: Any) -> Any:
        return super().forward(input_ids=input_ids, use_cache=False)


@pytest.mark.parametrize("decoder", [NamedCache, NamedPast])
def test_the_cache_goes_under_the_name_in_the_signature(decoder: type) -> None:
    plain, model = llama(), llama()
    model.model.__class__ = decoder
    assert check_cache(model) == (None, True)
    assert largest_error(wrap(model), PROMPTS) < 1e-5
    config = SamplingConfig(max_new_tokens=8)
    wanted = TransformersSampler(wrap(plain)).sample(PROMPTS, 2, config, seed=0)
    samples = TransformersSampler(wrap(model)).sample(PROMPTS, 2, config, seed=0)
    assert torch.equal(samples.sequences.completion_ids, wanted.sequences.completion_ids)
    assert torch.equal(samples.log_probs, wanted.log_probs)


@pytest.mark.parametrize(
    ("decoder", "why"),
    [(Swallowing, "Swallowing takes no cache"), (Forgetful, r"logits off by \[.*\] × spread: padding")],
)
def test_a_cache_that_is_not_used_is_refused(decoder: type, why: str) -> None:
    """The scorer, which needs none, is right; nothing is sampled."""
    plain, model = llama(), llama()
    samples = TransformersSampler(wrap(plain)).sample(PROMPTS, 2, SamplingConfig(max_new_tokens=6), seed=0)
    model.model.__class__ = decoder
    with pytest.raises(ValueError, match=f"LlamaForCausalLM cannot be sampled.*{why}"):
        TransformersSampler(wrap(model)).sample(PROMPTS, 1, SamplingConfig(max_new_tokens=4), seed=0)
    scored = completion_log_probs(model, samples.sequences).log_probs
    torch.testing.assert_close(scored, samples.log_probs, atol=2e-5, rtol=1e-5)


def test_positions_that_ignore_padding_are_noticed() -> None:
    torch.manual_seed(0)
    model = transformers.BartForCausalLM(
        transformers.BartConfig(
            vocab_size=V, d_model=32, decoder_layers=2, decoder_ffn_dim=48, decoder_attention_heads=4,
            encoder_layers=2, encoder_ffn_dim=48, encoder_attention_heads=4, max_position_embeddings=64,
        )
    ).eval()  # fmt: skip
    with pytest.raises(ValueError, match=r"BartForCausalLM cannot be sampled.*logits off by"):
        TransformersSampler(wrap(model)).sample([[5, 6], [7]], 1, SamplingConfig(max_new_tokens=4), seed=0)


@has_recurrent_layers
def test_states_outside_the_cache_are_noticed() -> None:
    """RecurrentGemma keeps them in its modules, where nobody gives each completion its prompt's."""
    model = build("recurrent_gemma")
    with pytest.raises(ValueError, match=r"RecurrentGemmaForCausalLM cannot be sampled.*logits off by"):
        TransformersSampler(wrap(model)).sample(PROMPTS, 1, SamplingConfig(max_new_tokens=4), seed=0)


def test_a_model_that_looks_ahead_is_refused() -> None:
    torch.manual_seed(0)
    options = {k: v for k, v in SHAPE.items() if k != "num_key_value_heads"} | {"pad_token_id": 2}
    config = transformers.BertGenerationConfig(**options, is_decoder=False)
    with pytest.raises(ValueError, match=r"BertGenerationDecoder is not causal.*is_decoder=True"):
        backbone_and_head(transformers.BertGenerationDecoder(config).eval())


def test_padding_is_not_among_the_tokens_tried() -> None:
    """XLM hides what has the id of padding: with it as last token, looking ahead went unseen."""
    torch.manual_seed(0)
    config = transformers.XLMConfig(
        vocab_size=V, emb_dim=32, n_layers=2, n_heads=4, pad_index=2, pad_token_id=2
    )
    with pytest.raises(ValueError, match="XLMWithLMHeadModel is not causal"):
        backbone_and_head(transformers.XLMWithLMHeadModel(config).eval())


class NoGradientAtZero(NamedCache):
    """Scales states by their norm, as Gemma 3n does: the gradient is 0/0 where padding attends to nothing."""

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Any = None,
        position_ids: Any = None,
        cache: Any = None,
        **_: Any,
    ) -> Any:
        output = super().forward(input_ids, attention_mask, position_ids, cache)
        state = output.last_hidden_state
        if attention_mask is not None and attention_mask.shape == state.shape[:2]:
            state = state * attention_mask[..., None]
        output.last_hidden_state = state * state.square().sum(-1, keepdim=True).sqrt()
        return output


def test_prompts_are_shared_only_where_the_gradient_is_finite() -> None:
    model = llama()
    model.model.__class__ = NoGradientAtZero
    assert check_cache(model) == (None, False)
    sequences = Sequences.pad([[5, 6, 7], [9]], [[8], [10, 11], [5], [7, 6]], [0, 0, 1, 1])
    completion_log_probs(model, sequences).log_probs.sum().backward()
    assert all(p.grad is None or bool(p.grad.isfinite().all()) for p in model.parameters())


@pytest.mark.filterwarnings("ignore::FutureWarning")  # peft asks by an old name
def test_adapters_checkpointing_and_modes() -> None:
    model = llama().train()
    model.gradient_checkpointing_enable()
    adapted = get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    modes, state = [m.training for m in adapted.modules()], torch.get_rng_state()
    assert check_cache(adapted) == (None, True)
    assert [m.training for m in adapted.modules()] == modes
    assert torch.equal(torch.get_rng_state(), state)
    assert all(p.grad is None for p in adapted.parameters())
    adapted.eval()
    assert largest_error(wrap(adapted), PROMPTS) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_rounding_is_no_fault(dtype: torch.dtype) -> None:
    model = llama(num_hidden_layers=8).to(dtype)
    assert check_cache(model) == (None, True)


def test_a_model_is_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = llama()
    check_cache(model)
    monkeypatch.setattr(model.model, "forward", lambda *_, **__: 1 / 0)
    assert check_cache(model) == (None, True)
    monkeypatch.undo()
    assert check_cache(copy.deepcopy(model)) == (None, True)


# --- recurrent states: no report has these ----------------------------------------------------------------------

LINEAR = {
    "head_dim": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}  # fmt: skip
HYBRIDS: dict[str, tuple[str, dict[str, Any]]] = {
    "Qwen3_5": ("linear_attention", LINEAR),
    "Lfm2": ("conv", {"block_auto_adjust_ff_dim": False}),
}


@has_recurrent_layers
@settings(max_examples=12, deadline=None)
@given(data=st.data())
def test_hybrid_layers_in_any_order_and_prompts_of_any_length(data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(HYBRIDS)))
    recurrent, options = HYBRIDS[name]
    kinds = data.draw(st.lists(st.sampled_from([recurrent, "full_attention"]), min_size=1, max_size=3))
    # A cache of transformers without any attention does not know how long the text is.
    kinds.insert(data.draw(st.integers(0, len(kinds))), "full_attention")
    prompts = data.draw(
        st.lists(st.lists(st.integers(3, V - 1), min_size=1, max_size=9), min_size=1, max_size=4)
    )
    config_class = getattr(transformers, f"{name}TextConfig" if name == "Qwen3_5" else f"{name}Config")
    shape = {**SHAPE, **options, "layer_types": kinds, "num_hidden_layers": len(kinds)}
    torch.manual_seed(0)
    model = getattr(transformers, f"{name}ForCausalLM")(config_class(**shape)).eval()
    assert largest_error(wrap(model), prompts, group=data.draw(st.integers(1, 3))) < 1e-4


@has_recurrent_layers
def test_a_recurrent_model_that_rounds_much_by_itself_is_not_refused() -> None:
    # Large activations, as trained models have them: the whole model alone is off by a few
    # thousandths of its logits' spread when it reads two texts at once.
    torch.manual_seed(0)
    config = transformers.MambaConfig(vocab_size=64, hidden_size=64, num_hidden_layers=6, state_size=8)
    model = transformers.MambaForCausalLM(config).eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "proj" in name and name.endswith("weight"):
                weight *= 4
        model.backbone.embeddings.weight[:, 0] += 100
    assert check_cache(model).fault is None


def test_the_check_takes_no_gradient_of_the_embedding() -> None:
    """It is as large as the head: for 150,000 tokens a gigabyte, to see that some gradient is finite."""

    def refuse(gradient: torch.Tensor) -> None:
        raise AssertionError("a gradient of the embedding")

    model = tiny_model().model
    model.get_input_embeddings().weight.register_hook(refuse)
    assert check_cache(model).shares
