"""Sampling: what is drawn has the probabilities it claims, and depends on nothing but its seed and row."""

from __future__ import annotations

import itertools
import os
import sys
import types
from dataclasses import replace
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma3TextConfig,
    GPT2Config,
    LlamaConfig,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

from policyopt.lm import GRPOConfig, sampling, train_grpo
from policyopt.lm.cache import check_cache
from policyopt.lm.log_probs import completion_log_probs, filter_logits
from policyopt.lm.models import LanguageModel, LoRA, add_lora
from policyopt.lm.sampling import Samples, SamplingConfig, TransformersSampler, VLLMSampler, generate

EOS = 0
PROMPTS = [[3, 4, 5], [6, 7, 8, 9, 10, 11, 12, 13, 14], [15], [0, 5, 0, 5, 1]]


def tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    words = Tokenizer(WordLevel({f"w{i}": i for i in range(vocabulary)}, unk_token="w1"))
    words.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token=f"w{EOS}", unk_token="w1")


def tiny(
    name: str = "llama", vocabulary: int = 40, *, context: int = 64, scale: float = 0.3
) -> LanguageModel:
    common: dict[str, Any] = {
        "vocab_size": vocabulary,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": context,
        "eos_token_id": EOS,
        "bos_token_id": 2,
        "pad_token_id": EOS,
    }
    configs = {
        "llama": lambda: LlamaConfig(**common),
        "qwen3": lambda: Qwen3Config(**common, head_dim=8),
        "gpt2": lambda: GPT2Config(
            vocab_size=vocabulary,
            n_embd=32,
            n_layer=2,
            n_head=4,
            n_positions=context,
            eos_token_id=EOS,
            bos_token_id=2,
        ),
        # Windows shorter than prompt and completion, so that keys and values do leave them.
        "gemma2": lambda: Gemma2Config(**common, head_dim=8, sliding_window=6),
        "gemma3": lambda: Gemma3TextConfig(
            **common, head_dim=8, sliding_window=6, layer_types=["sliding_attention", "full_attention"]
        ),
    }
    config = configs[name]()
    config.initializer_range = scale
    torch.manual_seed(0)
    return LanguageModel(AutoModelForCausalLM.from_config(config).eval(), tokenizer(vocabulary))


ARCHITECTURES = ["llama", "qwen3", "gpt2", "gemma2", "gemma3"]
SETTINGS = [
    SamplingConfig(max_new_tokens=12),
    SamplingConfig(max_new_tokens=12, temperature=0.6),
    SamplingConfig(max_new_tokens=12, temperature=1.5, top_k=7),
    SamplingConfig(max_new_tokens=12, top_p=0.7),
    SamplingConfig(max_new_tokens=12, temperature=1.3, top_k=11, top_p=0.8),
]


def completions(samples: Samples) -> list[list[int]]:
    ids, lengths = samples.sequences.completion_ids.tolist(), samples.sequences.lengths.tolist()
    return [row[:length] for row, length in zip(ids, lengths, strict=True)]


def dense_log_probs(
    lm: LanguageModel, prompt: list[int], completion: list[int], config: SamplingConfig
) -> Tensor:
    """The plainest reference: one text at a time, no cache, no padding, a full log-softmax."""
    with torch.no_grad():
        logits = lm.model(torch.tensor([prompt + completion])).logits[0, len(prompt) - 1 : -1].float()
    logits = filter_logits(logits / config.temperature, top_k=config.top_k, top_p=config.top_p)
    return logits.log_softmax(-1).gather(1, torch.tensor(completion)[:, None])[:, 0]


@pytest.mark.parametrize("config", SETTINGS)
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_log_probs_are_those_of_the_distribution_sampled_from(name: str, config: SamplingConfig) -> None:
    lm = tiny(name)
    samples = TransformersSampler(lm).sample(PROMPTS, 3, config, seed=0)
    assert samples.log_probs.dtype == torch.float32
    assert samples.log_probs.shape == samples.sequences.completion_ids.shape
    assert bool((samples.log_probs[~samples.sequences.completion_mask] == 0).all())
    for row, completion in enumerate(completions(samples)):
        expected = dense_log_probs(lm, PROMPTS[row // 3], completion, config)
        torch.testing.assert_close(samples.log_probs[row, : len(completion)], expected, atol=2e-5, rtol=1e-5)
    scored = completion_log_probs(
        lm.model, samples.sequences, temperature=config.temperature, top_k=config.top_k, top_p=config.top_p
    )
    torch.testing.assert_close(samples.log_probs, scored.log_probs, atol=2e-5, rtol=1e-5)


def enumerate_completions(
    lm: LanguageModel, prompt: list[int], config: SamplingConfig, vocabulary: int
) -> dict[tuple[int, ...], float]:
    """Every completion with its exact probability."""
    tree: dict[tuple[int, ...], float] = {}
    for text in itertools.product(range(vocabulary), repeat=config.max_new_tokens):
        end = text.index(EOS) + 1 if EOS in text else len(text)
        if text[:end] not in tree:
            tree[text[:end]] = float(dense_log_probs(lm, prompt, list(text[:end]), config).sum().exp())
    return tree


@pytest.mark.parametrize(
    "config",
    [
        SamplingConfig(max_new_tokens=3),
        SamplingConfig(max_new_tokens=3, temperature=0.7, top_k=4),
        SamplingConfig(max_new_tokens=3, temperature=1.4, top_p=0.8),
    ],
)
def test_frequencies_match_enumeration(config: SamplingConfig) -> None:
    lm = tiny(vocabulary=5, scale=0.2)
    prompt, draws = [1, 2, 3], 20_000
    exact = enumerate_completions(lm, prompt, config, 5)
    assert sum(exact.values()) == pytest.approx(1, abs=1e-5)
    samples = TransformersSampler(lm).sample([prompt], draws, config, seed=3)
    counts = dict.fromkeys(exact, 0)
    for completion in completions(samples):
        counts[tuple(completion)] += 1
    assert all(counts[text] == 0 for text, p in exact.items() if p == 0)
    likely = [text for text, p in exact.items() if p * draws >= 5]
    statistic = sum((counts[text] - exact[text] * draws) ** 2 / (exact[text] * draws) for text in likely)
    freedom = len(likely) - 1
    assert freedom > 10
    # Mean ± 5 standard deviations of χ² with that many degrees of freedom.
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5
    assert bool((samples.finished == torch.tensor([row[-1] == EOS for row in completions(samples)])).all())


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_rows_do_not_depend_on_each_other(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    lm, config = tiny(name), SamplingConfig(max_new_tokens=24, temperature=3.0)
    whole = TransformersSampler(lm).sample(PROMPTS, 4, config, seed=5)
    texts = completions(whole)
    assert {True, False} == set(whole.finished.tolist())  # the batch did shrink
    for batch_size in (1, 3, 6):
        part = TransformersSampler(lm, batch_size=batch_size).sample(PROMPTS, 4, config, seed=5)
        assert completions(part) == texts
        torch.testing.assert_close(part.log_probs, whole.log_probs, atol=2e-5, rtol=1e-5)
    # Two processes, each with its half of the prompts.
    halves = [
        TransformersSampler(lm).sample(PROMPTS[i : i + 2], 4, config, seed=5, first_row=4 * i) for i in (0, 2)
    ]
    assert completions(halves[0]) + completions(halves[1]) == texts
    for share in (0.0, 1.0):  # never drop ended rows before all have ended; drop each at once
        monkeypatch.setattr(sampling, "_COMPACT", share)
        assert completions(TransformersSampler(lm).sample(PROMPTS, 4, config, seed=5)) == texts


def test_a_prompt_draws_the_same_wherever_it_stands() -> None:
    lm, config = tiny(), SamplingConfig(max_new_tokens=8)
    order = [2, 0, 3, 1]
    rows = [
        completions(TransformersSampler(lm).sample([PROMPTS[i]], 2, config, seed=1, first_row=2 * place))
        for place, i in enumerate(order)
    ]
    together = TransformersSampler(lm).sample([PROMPTS[i] for i in order], 2, config, seed=1)
    assert completions(together) == [row for pair in rows for row in pair]


def test_seeds_decide() -> None:
    lm, config = tiny(), SamplingConfig(max_new_tokens=8)
    sampler = TransformersSampler(lm)
    first = sampler.sample(PROMPTS, 2, config, seed=1)
    torch.manual_seed(1234)
    again = sampler.sample(PROMPTS, 2, config, seed=1)
    assert torch.equal(first.sequences.completion_ids, again.sequences.completion_ids)
    assert torch.equal(first.log_probs, again.log_probs)
    assert completions(sampler.sample(PROMPTS, 2, config, seed=2)) != completions(first)
    assert len({tuple(row) for row in completions(first)}) > 4  # rows draw numbers of their own
    longer = completions(sampler.sample(PROMPTS, 2, replace(config, max_new_tokens=12), seed=1))
    assert [row[:8] for row in longer] == completions(first)
    state = torch.get_rng_state()
    sampler.sample(PROMPTS, 2, config, seed=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_uniform_numbers() -> None:
    table = sampling._uniforms(7, range(1000), 20)
    assert table.shape == (20, 1000)
    assert table.dtype == torch.float64
    assert torch.equal(sampling._uniforms(7, range(990, 1000), 5), table[:5, 990:])
    assert table.unique().numel() == table.numel()
    assert float(table.mean()) == pytest.approx(0.5, abs=0.01)
    assert abs(float(torch.corrcoef(table[:2])[0, 1])) < 0.15


@pytest.mark.parametrize(
    ("uniform", "dtype"), [(0.0, torch.float64), (1 - 2**-50, torch.float64), (1 - 2**-20, torch.float32)]
)
def test_extreme_uniforms_never_choose_an_excluded_token(uniform: float, dtype: torch.dtype) -> None:
    logits = torch.tensor([[-50.0, 1.0, 0.5, -60.0, 2.0, -70.0], [3.0, 1.0, 2.0, 0.0, -1.0, -9.0]])
    u = torch.full((2,), uniform, dtype=dtype)
    token, log_prob = sampling._draw(logits, u, SamplingConfig(top_k=3))
    kept = filter_logits(logits, top_k=3)
    assert bool(kept.gather(1, token[:, None]).isfinite().all())
    torch.testing.assert_close(log_prob, kept.log_softmax(-1).gather(1, token[:, None])[:, 0])
    assert token.tolist() == ([1, 0] if uniform == 0 else [4, 2])


def one_level(p: Tensor, u: Tensor) -> Tensor:
    """The inverse of the cumulative distribution, token by token."""
    cumulative = p.double().cumsum(-1)
    return (cumulative <= u[:, None].double() * cumulative[:, -1:]).sum(-1)


@pytest.mark.parametrize("count", [1025, 1152, 5000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_large_vocabulary_is_inverted_block_by_block(count: int, dtype: torch.dtype) -> None:
    """The middle of each token's share of [0, 1) is that token; ends of shares are one of the two, never one of 0.

    Sums of blocks round in float32, and on mps all sums do: tokens less likely than that are not asked for.
    """
    torch.manual_seed(0)
    p = (3 * torch.randn(count)).softmax(-1)
    p[torch.rand(count) < 0.5] = 0.0
    p[:200] = p[-5:] = 0.0  # whole blocks and both ends
    p /= p.sum()
    exact = p.double().cumsum(-1) / p.double().sum()
    middles, floor = exact - p.double() / 2, 1e-6 if dtype == torch.float64 else 1e-5
    tokens = (p > floor).nonzero()[:, 0]
    u = middles[tokens].to(dtype)
    assert torch.equal(sampling._invert(p.expand(len(u), -1), u)[:, 0], tokens)
    most = 1 - 8 * torch.finfo(dtype).eps
    edges = torch.cat([exact, exact.nextafter(torch.tensor(0.0).double()), torch.tensor([0.0, most])]).to(
        dtype
    )
    edges = edges.clamp(0, most)
    drawn = sampling._invert(p.expand(len(edges), -1), edges)[:, 0]
    assert bool((p[drawn] > 0).all())
    assert drawn[-2] == p.nonzero()[0]
    assert drawn[-1] == p.nonzero()[-1] or dtype == torch.float32
    off = (exact[drawn] - edges.double()).clamp(max=0).abs() + (
        exact[drawn] - p[drawn] - edges.double()
    ).clamp(min=0)
    assert float(off.max()) < (1e-6 if dtype == torch.float32 else 1e-7)


def test_two_levels_draw_what_one_does_whatever_the_batch() -> None:
    torch.manual_seed(0)
    p, u = (3 * torch.randn(300, 3000)).softmax(-1), torch.rand(300, dtype=torch.float64)
    token = sampling._invert(p, u)[:, 0]
    assert torch.equal(token, one_level(p, u))
    for rows in (torch.tensor([7]), torch.arange(5), torch.arange(299, -1, -3)):
        assert torch.equal(sampling._invert(p[rows], u[rows])[:, 0], token[rows])
    p[3] = torch.nan
    assert 0 <= int(sampling._invert(p, u)[3]) < 3000


def test_frequencies_in_a_large_vocabulary() -> None:
    torch.manual_seed(0)
    logits, draws = (2 * torch.randn(1, 2000)).expand(40_000, -1), 40_000
    u = sampling._uniforms(0, range(draws), 1)[0]
    token, log_prob = sampling._draw(logits, u, SamplingConfig())
    p = logits[0].double().softmax(-1)
    torch.testing.assert_close(log_prob.double(), p.log()[token], atol=1e-5, rtol=0)
    counts, likely = torch.bincount(token, minlength=2000), p * draws >= 5
    statistic = float(((counts - p * draws).square() / (p * draws))[likely].sum())
    freedom = int(likely.sum()) - 1
    assert abs(statistic - freedom) < 5 * (2 * freedom) ** 0.5


def test_autocast_computes_in_16_bits_and_draws_in_32() -> None:
    """The prompt's pass and all steps, with frozen weights too; the mode of the weights is left alone."""
    lm, config = tiny("gemma2"), SamplingConfig(max_new_tokens=8)  # its logits have a soft cap
    frozen = lm.model.get_decoder().layers[0].mlp.up_proj.requires_grad_(False)
    kinds, logits = set(), list[torch.dtype]()
    check_cache(lm.model)  # in float32 always
    for module in lm.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_hook(lambda *io: kinds.add(io[-1].dtype))
    plain = TransformersSampler(lm).sample(PROMPTS, 3, config, seed=0)
    assert kinds == {torch.float32}
    kinds.clear()
    with pytest.MonkeyPatch.context() as patch:
        draw = sampling._draw
        patch.setattr(sampling, "_draw", lambda z, *rest: (logits.append(z.dtype), draw(z, *rest))[1])
        half = TransformersSampler(lm, autocast=True).sample(PROMPTS, 3, config, seed=0)
    assert kinds == {torch.bfloat16}
    assert set(logits) == {torch.float32}
    assert not frozen.weight.requires_grad
    assert not torch.is_autocast_enabled("cpu")
    assert not torch.equal(plain.log_probs, half.log_probs)
    with torch.autocast("cpu", torch.bfloat16):
        scored = completion_log_probs(lm.model, half.sequences).log_probs
    assert float((scored - half.log_probs).detach().abs().max()) < 0.05


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_other_attention_functions_draw_the_same(name: str) -> None:
    lm, config = tiny(name), SamplingConfig(max_new_tokens=12)
    usual = TransformersSampler(lm).sample(PROMPTS, 3, config, seed=0)
    lm.model.set_attn_implementation("eager")
    eager = TransformersSampler(lm).sample(PROMPTS, 3, config, seed=0)
    assert completions(eager) == completions(usual)
    torch.testing.assert_close(eager.log_probs, usual.log_probs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_greedy_is_that_of_transformers(name: str) -> None:
    lm = tiny(name)
    samples = TransformersSampler(lm).sample(
        PROMPTS, 1, SamplingConfig(max_new_tokens=14, temperature=0), seed=0
    )
    assert bool((samples.log_probs == 0).all())
    for prompt, completion in zip(PROMPTS, completions(samples), strict=True):
        text = lm.model.generate(
            torch.tensor([prompt]),
            attention_mask=torch.ones(1, len(prompt)),
            max_new_tokens=14,
            do_sample=False,
        )
        assert text[0, len(prompt) :].tolist() == completion


def steered(token_after: dict[int, int], vocabulary: int = 8, **options: Any) -> LanguageModel:
    """A model that always follows token i by ``token_after[i]`` (its layers are switched off)."""
    lm = tiny(vocabulary=vocabulary, **options)
    with torch.no_grad():
        for name, weight in lm.model.named_parameters():
            if "layers" in name:
                weight.zero_()
        hidden = torch.eye(vocabulary, 32)
        lm.model.get_input_embeddings().weight.copy_(hidden)
        head = torch.zeros(vocabulary, 32)
        for token, follower in token_after.items():
            head[follower] += 30 * hidden[token]
        lm.model.get_output_embeddings().weight.copy_(head)
    return lm


def test_eos_ends_the_completion_and_belongs_to_it() -> None:
    lm = steered({1: 2, 2: 3, 3: EOS, 4: 4, EOS: 5})
    assert lm.pad_id in lm.eos_ids  # padding with EOS must not shorten or lengthen anything
    # An EOS within the prompt ends nothing.
    samples = TransformersSampler(lm).sample(
        [[1], [4], [3], [1, EOS, 2]], 2, SamplingConfig(max_new_tokens=5), seed=0
    )
    expected = [[2, 3, EOS], [4, 4, 4, 4, 4], [EOS], [3, EOS]]
    assert completions(samples) == [row for row in expected for _ in range(2)]
    assert samples.finished.tolist() == [True, True, False, False, True, True, True, True]
    assert samples.sequences.prompt_index.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]


def test_cut_at_the_limit_even_if_eos_would_be_next() -> None:
    lm = steered({1: 2, 2: 3, 3: EOS})
    cut = TransformersSampler(lm).sample([[1]], 1, SamplingConfig(max_new_tokens=2), seed=0)
    assert (completions(cut), cut.finished.tolist()) == ([[2, 3]], [False])
    exact = TransformersSampler(lm).sample([[1]], 1, SamplingConfig(max_new_tokens=3), seed=0)
    assert (completions(exact), exact.finished.tolist()) == ([[2, 3, EOS]], [True])
    one = TransformersSampler(lm).sample([[1], [3]], 1, SamplingConfig(max_new_tokens=1), seed=0)
    assert (completions(one), one.finished.tolist()) == ([[2], [EOS]], [False, True])


def test_every_eos_of_the_generation_config_ends() -> None:
    lm = steered({1: 2, 2: 3, 3: EOS, 4: 6, 6: 7})
    lm.model.generation_config.eos_token_id = [EOS, 7]
    samples = TransformersSampler(lm).sample([[1], [4]], 1, SamplingConfig(max_new_tokens=6), seed=0)
    assert completions(samples) == [[2, 3, EOS], [6, 7]]
    assert samples.finished.tolist() == [True, True]


class Counting(nn.Module):
    """Wraps a decoder and records how many tokens each forward pass reads."""

    def __init__(self, lm: LanguageModel, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        decoder = lm.model.get_decoder()
        forward = decoder.forward

        def counted(*args: Any, **kwargs: Any) -> Any:
            self.shapes.append(tuple(kwargs["input_ids"].shape))
            return forward(*args, **kwargs)

        monkeypatch.setattr(decoder, "forward", counted)


def test_work_done(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = steered({1: 2, 2: 3, 3: EOS, 4: 4})
    TransformersSampler(lm).sample([[1]], 1, SamplingConfig(max_new_tokens=1), seed=0)  # verifies the head
    count = Counting(lm, monkeypatch)
    TransformersSampler(lm).sample([[1, 1, 1], [4]], 4, SamplingConfig(max_new_tokens=6), seed=0)
    # Each prompt once; then a token per row and step; the four rows that end after three tokens leave.
    assert count.shapes == [(2, 3), (8, 1), (8, 1), (4, 1), (4, 1), (4, 1)]
    count.shapes.clear()
    TransformersSampler(lm).sample([[1]], 4, SamplingConfig(max_new_tokens=60), seed=0)
    assert count.shapes == [(1, 1), (4, 1), (4, 1)]  # stops when all have ended


def test_modes_and_gradients_are_left_alone() -> None:
    lm = tiny()
    lm.model.train()
    frozen = lm.model.get_decoder().layers[0]
    frozen.eval()
    modes = [module.training for module in lm.model.modules()]
    samples = TransformersSampler(lm).sample(PROMPTS, 2, SamplingConfig(max_new_tokens=4), seed=0)
    assert [module.training for module in lm.model.modules()] == modes
    assert all(parameter.grad is None for parameter in lm.model.parameters())
    assert not samples.log_probs.is_inference()
    # The samples can be trained on.
    lm.model.eval()
    new = completion_log_probs(lm.model, samples.sequences).log_probs
    (new * samples.log_probs).sum().backward()
    assert all(parameter.grad is not None for parameter in lm.model.parameters())


def test_dropout_is_off() -> None:
    lm = tiny("gpt2")  # its config has dropout 0.1
    config = SamplingConfig(max_new_tokens=8)
    quiet = TransformersSampler(lm).sample(PROMPTS, 2, config, seed=0)
    lm.model.train()
    assert torch.equal(TransformersSampler(lm).sample(PROMPTS, 2, config, seed=0).log_probs, quiet.log_probs)
    assert lm.model.training


def test_modes_are_restored_after_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    lm = tiny()
    TransformersSampler(lm).sample(PROMPTS, 1, SamplingConfig(max_new_tokens=5), seed=0)
    lm.model.train()
    with torch.no_grad():
        lm.model.get_output_embeddings().weight[3] = torch.nan
    for temperature in (0.0, 1.0):
        with pytest.raises(FloatingPointError, match="NaN or infinite logits"):
            TransformersSampler(lm).sample(
                PROMPTS, 1, SamplingConfig(max_new_tokens=5, temperature=temperature), seed=0
            )
    monkeypatch.setattr(sampling, "_draw", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        TransformersSampler(lm).sample(PROMPTS, 1, SamplingConfig(max_new_tokens=5), seed=0)
    assert lm.model.training


peft_warns = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own


def randomise_lora(lm: LanguageModel) -> None:
    torch.manual_seed(1)
    with torch.no_grad():
        for name, weight in lm.model.named_parameters():
            if "lora_B" in name:
                weight.normal_(0, 0.3)


@peft_warns
def test_adapters_are_sampled_from() -> None:
    lm, config = tiny(), SamplingConfig(max_new_tokens=8)
    plain = TransformersSampler(lm).sample(PROMPTS, 2, config, seed=0)
    adapted = add_lora(lm, LoRA(rank=2))
    randomise_lora(adapted)
    samples = TransformersSampler(adapted).sample(PROMPTS, 2, config, seed=0)
    scored = completion_log_probs(adapted.model, samples.sequences).log_probs
    torch.testing.assert_close(samples.log_probs, scored, atol=2e-5, rtol=1e-5)
    assert completions(samples) != completions(plain)


def test_bfloat16() -> None:
    lm = tiny()
    lm.model.bfloat16()
    samples = TransformersSampler(lm).sample(PROMPTS, 3, SamplingConfig(max_new_tokens=8), seed=0)
    assert samples.log_probs.dtype == torch.float32
    scored = completion_log_probs(lm.model, samples.sequences).log_probs.detach()
    assert float((samples.log_probs - scored).abs().mean()) < 0.05


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_cuda_draws_what_the_cpu_draws(name: str) -> None:
    lm, config = tiny(name), SamplingConfig(max_new_tokens=24, temperature=1.2, top_k=20)
    cpu = TransformersSampler(lm).sample(PROMPTS, 8, config, seed=0)
    gpu = TransformersSampler(lm.to("cuda")).sample(PROMPTS, 8, config, seed=0)
    assert gpu.log_probs.is_cuda
    assert gpu.sequences.completion_ids.is_cuda
    assert completions(gpu) == completions(cpu)
    torch.testing.assert_close(gpu.log_probs.cpu(), cpu.log_probs, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be >= 1"),
        ({"temperature": -0.5}, "temperature must be >= 0"),
        ({"top_k": 0}, "top_k must be >= 1"),
        ({"top_p": 0.0}, "top_p must be in"),
        ({"top_p": 1.5}, "top_p must be in"),
        ({"temperature": float("nan")}, "temperature must be finite"),
    ],
)
def test_config_is_checked(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SamplingConfig(**changes)


def test_requests_are_checked() -> None:
    lm = tiny(context=16)
    sampler = TransformersSampler(lm)
    config = SamplingConfig(max_new_tokens=10)
    with pytest.raises(ValueError, match="prompt 1 is empty"):
        sampler.sample([[3], []], 1, config, seed=0)
    with pytest.raises(ValueError, match="no prompts"):
        sampler.sample([], 1, config, seed=0)
    with pytest.raises(ValueError, match="samples_per_prompt must be >= 1"):
        sampler.sample([[3]], 0, config, seed=0)
    with pytest.raises(
        ValueError, match=r"prompt 1 has 9 tokens.*context of 16.*max_new_tokens to at most 7"
    ):
        sampler.sample([[3], [3] * 9], 1, config, seed=0)
    with pytest.raises(ValueError, match=r"prompt 0 has 20 tokens.*shorten the prompt$"):
        sampler.sample([[3] * 20], 1, config, seed=0)
    sampler.sample([[3] * 6], 1, config, seed=0)  # exactly full
    with pytest.raises(ValueError, match="batch_size must be >= 1"):
        TransformersSampler(lm, batch_size=0)
    lm.model.generation_config.eos_token_id = None
    lm.tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no end-of-sequence token"):
        sampler.sample([[3]], 1, config, seed=0)


def test_generate_returns_texts_prompt_by_prompt() -> None:
    lm = steered({1: 2, 2: 3, 3: EOS, 4: 5, 5: EOS})
    texts = generate(lm, ["w1", "w4"], SamplingConfig(max_new_tokens=9), samples_per_prompt=2)
    assert texts == [["w2 w3"] * 2, ["w5"] * 2]


@pytest.mark.parametrize("peer_goes_on", [0, 2, 5, 99])
def test_processes_keep_in_step(peer_goes_on: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """A process whose completions have ended runs on while another has not, and its samples stay what they are."""
    checks = []

    def all_reduce(flag: Tensor, operation: Any) -> None:
        assert operation == torch.distributed.ReduceOp.MAX
        checks.append(int(flag))
        flag.clamp_(min=int(len(checks) <= peer_goes_on))

    monkeypatch.setattr(torch.distributed, "all_reduce", all_reduce)
    lm = steered({1: 2, 2: 3, 3: EOS})
    config = SamplingConfig(max_new_tokens=7)
    alone = TransformersSampler(lm).sample([[1], [3]], 2, config, seed=0)
    count = Counting(lm, monkeypatch)
    samples = TransformersSampler(lm, synchronize=True).sample([[1], [3]], 2, config, seed=0)
    assert completions(samples) == completions(alone) == [[2, 3, EOS]] * 2 + [[EOS]] * 2
    assert torch.equal(samples.log_probs, alone.log_probs)
    assert samples.finished.all()
    # One pass over the prompts, then one for each check that found somebody at work, up to the limit of seven tokens.
    assert len(count.shapes) == 1 + min(max(2, peer_goes_on), 6)
    assert checks[:4] == [1, 1, 0, 0][: len(checks)]


# vLLM: a stand-in that accepts exactly the calls of vLLM's LLM, and answers from a transformers model.


class FakeParams:
    allowed = frozenset(
        (
            "n",
            "max_tokens",
            "temperature",
            "top_p",
            "top_k",
            "stop_token_ids",
            "logprobs",
            "detokenize",
            "seed",
        )
    )

    def __init__(self, **settings: Any) -> None:
        assert settings.keys() <= self.allowed
        assert 0 <= settings["seed"] < 2**63 - 2**20
        self.__dict__.update(settings)


class FakeLLM:
    """Greedy only where a model is steered; its own weights come through ``load_weights`` alone."""

    built: dict[str, Any]

    def __init__(self, model: str, **options: Any) -> None:
        type(self).built = options
        self.inner = AutoModelForCausalLM.from_config(LlamaConfig.from_pretrained(model))
        self.inner.load_weights = self.load_weights
        self.model_config = types.SimpleNamespace(logprobs_mode=options["logprobs_mode"])
        self.calls: list[str] = []
        self.loaded: list[str] = []

    def load_weights(self, weights: Any) -> None:
        own = dict(self.inner.named_parameters())
        with torch.no_grad():
            for name, weight in weights:
                own[name].copy_(weight)
                self.loaded.append(name)

    def apply_model(self, function: Any) -> list[Any]:
        self.calls.append("apply_model")
        return [function(self.inner)]

    def reset_prefix_cache(self) -> None:
        self.calls.append("reset_prefix_cache")

    def generate(
        self, prompts: list[dict[str, Any]], params: list[FakeParams], *, use_tqdm: bool
    ) -> list[Any]:
        self.calls.append("generate")
        self.params = params
        assert not use_tqdm
        lm = LanguageModel(self.inner, tokenizer(self.inner.config.vocab_size))
        results = []
        for prompt, p in zip(prompts, params, strict=True):
            assert p.logprobs == 0
            assert p.stop_token_ids == [EOS]
            config = SamplingConfig(
                max_new_tokens=p.max_tokens,
                temperature=p.temperature,
                top_k=getattr(p, "top_k", None),
                top_p=p.top_p,
            )
            samples = TransformersSampler(lm).sample([prompt["prompt_token_ids"]], p.n, config, seed=p.seed)
            outputs = [
                types.SimpleNamespace(
                    token_ids=tuple(ids),
                    # vLLM's form: per step a dictionary from token to an object with the field logprob.
                    logprobs=[
                        {token: types.SimpleNamespace(logprob=float(x))}
                        for token, x in zip(ids, row, strict=False)
                    ],
                )
                for ids, row in zip(completions(samples), samples.log_probs, strict=True)
            ]
            results.append(types.SimpleNamespace(outputs=outputs))
        return results


@pytest.fixture
def fake_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    module = types.ModuleType("vllm")
    module.LLM, module.SamplingParams = FakeLLM, FakeParams  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "vllm", module)
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")


@pytest.mark.usefixtures("fake_vllm")
@pytest.mark.parametrize("config", [SETTINGS[1], SETTINGS[4]])
def test_vllm_samples_the_current_weights(config: SamplingConfig) -> None:
    lm = tiny()
    sampler = VLLMSampler(lm, max_model_len=48)
    assert os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] == "0"
    assert FakeLLM.built == {
        "max_model_len": 48,
        "dtype": "float32",
        "gpu_memory_utilization": 0.3,
        "generation_config": "vllm",
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "logprobs_mode": "processed_logprobs",
        "trust_remote_code": False,
    }
    for _ in range(2):
        samples = sampler.sample(PROMPTS, 3, config, seed=4)
        scored = completion_log_probs(
            lm.model,
            samples.sequences,
            temperature=config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
        ).log_probs
        torch.testing.assert_close(samples.log_probs, scored, atol=2e-5, rtol=1e-5)
        assert samples.finished.tolist() == [row[-1] == EOS for row in completions(samples)]
        assert samples.sequences.prompt_index.tolist() == [i for i in range(4) for _ in range(3)]
        with torch.no_grad():  # an optimiser step
            for weight in lm.model.parameters():
                weight += 0.05 * torch.randn_like(weight)
    assert sampler.engine.calls == ["apply_model", "reset_prefix_cache", "generate"] * 2
    # Processes that share the prompts draw what one draws.
    whole = completions(sampler.sample(PROMPTS, 3, config, seed=4))
    assert len({p.seed for p in sampler.engine.params}) == 4
    assert completions(sampler.sample(PROMPTS[2:], 3, config, seed=4, first_row=6)) == whole[6:]
    with pytest.raises(ValueError, match="context of 48"):
        sampler.sample([[3] * 40], 1, config, seed=0)


@pytest.mark.usefixtures("fake_vllm")
def test_vllm_samples_for_a_trainer_and_gets_the_weights_once_a_step() -> None:
    lm = tiny()
    sampler = VLLMSampler(lm)
    config = GRPOConfig(updates=2, batch_size=2, group_size=2, sampling=SamplingConfig(max_new_tokens=4))
    prompts = [{"prompt": text} for text in ("w3 w4 w5", "w6", "w7 w8")]
    train_grpo(lm, prompts, lambda completions, **_: [len(t) for t in completions], config,
               sampler=sampler, progress=False)  # fmt: skip
    assert sampler.engine.calls == ["apply_model", "reset_prefix_cache", "generate"] * 2


@pytest.mark.usefixtures("fake_vllm")
def test_vllm_greedy_is_deterministic() -> None:
    lm = steered({1: 2, 2: EOS})
    samples = VLLMSampler(lm).sample([[1]], 2, SamplingConfig(max_new_tokens=5, temperature=0), seed=0)
    assert completions(samples) == [[2, EOS]] * 2
    assert bool((samples.log_probs == 0).all())


@pytest.mark.usefixtures("fake_vllm")
def test_vllm_refuses_unprocessed_log_probs() -> None:
    engine = types.SimpleNamespace(model_config=types.SimpleNamespace(logprobs_mode="raw_logprobs"))
    with pytest.raises(ValueError, match="processed_logprobs"):
        VLLMSampler(tiny(), engine=engine)


@peft_warns
@pytest.mark.usefixtures("fake_vllm")
def test_vllm_gets_adapters_merged_and_the_model_keeps_them_apart() -> None:
    lm = add_lora(tiny(), LoRA(rank=2))
    randomise_lora(lm)
    before = {name: weight.clone() for name, weight in lm.model.named_parameters()}
    sampler = VLLMSampler(lm)
    sampler.sample(PROMPTS, 1, SamplingConfig(max_new_tokens=3), seed=0)
    assert all(torch.equal(weight, before[name]) for name, weight in lm.model.named_parameters())
    merged = dict(lm.copy().merged().model.named_parameters())
    assert set(sampler.engine.loaded) == set(merged)
    for name, weight in sampler.engine.inner.named_parameters():
        torch.testing.assert_close(weight, merged[name])


def test_vllm_missing_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with pytest.raises(ImportError, match=r"pip install vllm.*TransformersSampler"):
        VLLMSampler(tiny())
