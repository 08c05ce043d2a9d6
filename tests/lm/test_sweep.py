"""A fixed spread of the families that `make sweep` tries whole: one or two for each kind of cache and of refusal."""

from __future__ import annotations

import pytest
from families import judge, names
from transformers import cache_utils

# Keys and values; windows; shared layers; ALiBi; latent keys; experts; learned positions; multimodal wrappers.
RIGHT = [
    "llama", "llama (eager)", "qwen3", "gemma2", "gemma3_text", "gemma4_text", "gpt2", "opt", "bloom", "mpt", "falcon",
    "falcon (alibi)", "cohere2", "gpt_oss", "qwen3_moe", "deepseek_v3", "llama4_text", "mistral", "gemma3n_text",
]  # fmt: skip
# Recurrent states, convolutions, and both beside attention.
RECURRENT = [
    "mamba", "mamba2", "falcon_mamba", "qwen3_5_text", "qwen3_next", "lfm2", "lfm2_moe", "granitemoehybrid", "jamba",
    "bamba", "falcon_h1", "olmo_hybrid", "nemotron_h", "zamba2",
]  # fmt: skip
# No cache, positions that ignore padding, states kept outside the cache, steps that clamp otherwise than the scan.
SCORES = ["rwkv", "openai-gpt", "bart", "moshi", "recurrent_gemma", "nemotron_h (time_step_min=0.001)"]
# Heads of several layers, and models that look ahead.
REFUSED = ["modernbert-decoder", "bert", "xlm", "bert-generation (is_decoder=False)"]
OUTCOMES = {
    **dict.fromkeys(RIGHT, "right"),
    **dict.fromkeys(RECURRENT, "right"),
    **dict.fromkeys(SCORES, "scores"),
    **dict.fromkeys(REFUSED, "refused"),
}


@pytest.mark.sweep
@pytest.mark.parametrize("name", OUTCOMES)
def test_a_family_is_right_or_refused(name: str) -> None:
    if name not in names():
        pytest.skip("not in this version of transformers")
    verdict = judge(name)
    assert verdict.outcome != "wrong", verdict
    # Older versions keep recurrent states in caches of each family's own, which are refused.
    if hasattr(cache_utils, "LinearAttentionLayer"):
        assert verdict.outcome == OUTCOMES[name], verdict
