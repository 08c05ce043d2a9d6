"""Chunked log-probabilities: the dense ones in a fraction of the memory."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_runs import tiny_model
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import TopKLogitsWarper, TopPLogitsWarper
from transformers.modeling_layers import GradientCheckpointingLayer

from policyopt.lm import log_probs as log_probs_module
from policyopt.lm.log_probs import (
    chunked_log_probs,
    completion_log_probs,
    filter_logits,
)
from policyopt.lm.sequences import Sequences, hidden_states

N, H, V = 11, 6, 13


def problem(dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return hidden, weight, bias, targets."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(N, H, generator=generator, dtype=torch.float64)
    weight = torch.randn(V, H, generator=generator, dtype=torch.float64)
    bias = torch.randn(V, generator=generator, dtype=torch.float64)
    targets = torch.randint(0, V, (N,), generator=generator)
    return (*(x.to(dtype).requires_grad_() for x in (hidden, weight, bias)), targets)


def linear(weight: Tensor, bias: Tensor | None = None) -> nn.Linear:
    """A head with these very tensors, so that gradients arrive at them."""
    head = nn.Linear(weight.shape[1], weight.shape[0])
    del head.weight, head.bias
    head.weight, head.bias = weight, bias
    return head


def dense(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """The definition, token by token: a loop that shares no code with the tested."""
    log_probs, entropies = [], []
    for h, target in zip(hidden, targets.tolist(), strict=True):
        z = weight @ h if bias is None else weight @ h + bias
        z = z * scale
        if softcap is not None:
            z = softcap * torch.tanh(z / softcap)
        z = z / temperature
        order = z.argsort(descending=True).tolist()
        kept = order if top_k is None else order[:top_k]
        nucleus, mass = [], 0.0
        for token in kept:
            if mass >= top_p:
                break
            nucleus.append(token)
            mass += float(z[kept].softmax(0)[kept.index(token)].detach())
        if target not in nucleus:
            nucleus.append(target)
        log_p = z[nucleus].log_softmax(0)
        log_probs.append(log_p[nucleus.index(target)])
        entropies.append(-(log_p.exp() * log_p).sum())
    return torch.stack(log_probs), torch.stack(entropies)


OPTIONS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"softcap": 1.5},
    {"scale": 0.3},
    {"top_k": 4},
    {"top_p": 0.7},
    {"top_k": 5, "top_p": 0.8, "temperature": 1.7},
    {"top_k": 5, "top_p": 0.8, "temperature": 0.7, "softcap": 2.0, "scale": 1.3},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("chunk_size", [None, 1, 4])
def test_equals_the_dense_definition(
    options: dict[str, Any], with_bias: bool, chunk_size: int | None
) -> None:
    results = []
    for chunked in (True, False):
        hidden, weight, bias, targets = problem()
        used = bias if with_bias else None
        if chunked:
            head = linear(weight, used)
            log_probs, entropy = chunked_log_probs(
                head, hidden, targets, entropy=True, chunk_size=chunk_size, **options
            )
            assert entropy is not None
        else:
            log_probs, entropy = dense(hidden, weight, targets, bias=used, **options)
        weights = torch.linspace(-1, 2, N, dtype=torch.float64)
        ((weights * log_probs).sum() + (weights.flip(0) * entropy).sum()).backward()
        results.append(
            [
                log_probs,
                entropy,
                hidden.grad,
                weight.grad,
                *([bias.grad] if with_bias else []),
            ]
        )
    for ours, wanted in zip(*results, strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("options", [{}, {"temperature": 0.6, "softcap": 2.0, "scale": 0.5}], ids=str)
def test_gradcheck(entropy: bool, options: dict[str, Any]) -> None:
    hidden, weight, bias, targets = problem()

    def function(hidden: Tensor, weight: Tensor, bias: Tensor) -> Any:
        result = chunked_log_probs(
            linear(weight, bias),
            hidden,
            targets,
            entropy=entropy,
            chunk_size=4,
            **options,
        )
        return result if entropy else result[0]

    assert torch.autograd.gradcheck(function, (hidden, weight, bias))


def test_only_one_gradient_wanted() -> None:
    """Frozen head, or frozen model: the other gradient is the same."""
    hidden, weight, _, targets = problem()
    chunked_log_probs(linear(weight), hidden, targets)[0].sum().backward()
    alone, _ = chunked_log_probs(linear(weight.detach()), hidden.detach().requires_grad_(), targets)
    assert alone.requires_grad
    only_weight = weight.detach().clone().requires_grad_()
    chunked_log_probs(linear(only_weight), hidden.detach(), targets, chunk_size=3)[0].sum().backward()
    torch.testing.assert_close(only_weight.grad, weight.grad)


ARRIVING = torch.linspace(-1, 2, N).where(torch.arange(N) % 4 > 0, 0.0)
GUESSES = {"none": None, "right": ARRIVING, "scaled": ARRIVING / 3.7, "wrong": ARRIVING.square()}


@pytest.fixture
def products(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry for each product of states and weight."""
    made, linear_of = list[int](), nn.functional.linear
    monkeypatch.setattr(nn.functional, "linear", lambda *a: (made.append(1), linear_of(*a))[1])
    return made


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_foreseen_gradient_is_that_of_the_recomputation(
    options: dict[str, Any], dtype: torch.dtype, products: list[int]
) -> None:
    """Up to a factor it need not be computed again; where another one arrives, or again, it is."""
    results = {}
    for name, guess in GUESSES.items():
        hidden, weight, bias, targets = problem(dtype)
        slopes = (
            None if guess is None else lambda rows, scores, guess=guess: [guess[rows].to(scores[0].dtype)]
        )
        products.clear()
        log_probs, _ = chunked_log_probs(
            linear(weight, bias), hidden, targets, chunk_size=4, slopes=slopes, **options
        )
        for time in ("first", "again"):
            hidden.grad = weight.grad = bias.grad = None
            log_probs.backward(ARRIVING.to(log_probs.dtype), retain_graph=True)
            passes = 2 + (time == "again") - (name in ("right", "scaled"))
            assert len(products) == 3 * passes
            results[name, time] = [log_probs, hidden.grad, weight.grad, bias.grad]
    half = dtype == torch.bfloat16
    for result in results.values():
        for ours, wanted in zip(result, results["none", "first"], strict=True):
            torch.testing.assert_close(ours, wanted, **({"rtol": 0.02, "atol": 0.02} if half else {}))
    for ours, wanted in zip(results["right", "first"], results["none", "first"], strict=True):
        assert torch.equal(ours, wanted)


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("autocast", [False, True])
def test_a_frozen_head_needs_no_guess(options: dict[str, Any], autocast: bool, products: list[int]) -> None:
    """Whatever gradient arrives, it has been computed but for a factor at each token."""
    gradients = []
    for trained in (True, False):
        hidden, weight, bias, targets = problem(torch.float32)
        head = linear(weight.requires_grad_(trained), bias.requires_grad_(trained))
        products.clear()
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            log_probs, _ = chunked_log_probs(head, hidden, targets, chunk_size=4, **options)
        (log_probs.exp() * ARRIVING).sum().backward()
        assert len(products) == (6 if trained else 3)
        gradients.append(hidden.grad)
    most = 0.02 if autocast else 1e-6
    torch.testing.assert_close(*gradients, rtol=most, atol=most)


@pytest.mark.parametrize("entropy", [False, True])
def test_no_tokens(entropy: bool) -> None:
    hidden, weight, _, targets = problem()
    log_probs, entropies = chunked_log_probs(linear(weight), hidden[:0], targets[:0], entropy=entropy)
    assert log_probs.shape == (0,)
    assert (entropies is not None) == entropy
    log_probs.sum().backward()
    assert weight.grad is not None
    assert weight.grad.abs().sum() == 0


def test_bfloat16_is_as_good_as_its_matrix_products() -> None:
    """Softmax in float32: the only error is that of bfloat16 logits and products."""
    hidden, weight, _, targets = problem(torch.bfloat16)
    log_probs, _ = chunked_log_probs(linear(weight), hidden, targets, chunk_size=2)
    assert log_probs.dtype == torch.float32
    logits = (hidden @ weight.T).float()  # rounded to bfloat16 once, by the product
    torch.testing.assert_close(log_probs, logits.log_softmax(-1).gather(1, targets[:, None])[:, 0])
    log_probs.sum().backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert weight.grad.dtype == torch.bfloat16
    exact_hidden, exact_weight, _, _ = problem()
    chunked_log_probs(linear(exact_weight), exact_hidden, targets)[0].sum().backward()
    for rounded, exact in (
        (hidden.grad, exact_hidden.grad),
        (weight.grad, exact_weight.grad),
    ):
        assert exact is not None
        assert (rounded.double() - exact).norm() < 0.01 * exact.norm()


def test_the_weight_gradient_is_summed_in_float32() -> None:
    """1,000 chunks of one token: in bfloat16 the sum would stop growing at 256."""
    weight = torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    hidden = torch.full((1000, 1), 2.0, dtype=torch.bfloat16)
    chunked_log_probs(linear(weight), hidden, torch.zeros(1000, dtype=torch.long), chunk_size=1)[
        0
    ].sum().backward()
    assert weight.grad is not None
    assert weight.grad.flatten().tolist() == [1000.0, -1000.0]


def test_autocast() -> None:
    hidden, weight, _, targets = problem(torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        log_probs, _ = chunked_log_probs(linear(weight), hidden, targets)
        wanted = nn.functional.linear(hidden, weight).float().log_softmax(-1)
    log_probs.sum().backward()
    torch.testing.assert_close(log_probs, wanted.gather(1, targets[:, None])[:, 0])
    assert weight.grad is not None
    assert weight.grad.dtype == torch.float32


def test_under_autocast_the_weight_gradient_is_never_rounded_to_16_bits() -> None:
    """257 has nine bits, of which bfloat16 keeps eight."""
    weight, hidden = torch.zeros(2, 1, requires_grad=True), torch.full((257, 1), 2.0)
    bias = torch.zeros(2, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        targets = torch.zeros(257, dtype=torch.long)
        log_probs, _ = chunked_log_probs(linear(weight, bias), hidden, targets, chunk_size=1)
    log_probs.sum().backward()
    assert weight.grad is not None
    assert bias.grad is not None
    assert weight.grad.flatten().tolist() == [257.0, -257.0]
    assert bias.grad.tolist() == [128.5, -128.5]


def test_the_gradient_of_a_large_16_bit_weight_is_added_up_in_pieces() -> None:
    """They are all of it, the last and shorter one too."""
    size = 3 * 2**16 + 5  # 2²² numbers are 2¹⁷ rows: a piece and a half
    hidden, targets = torch.randn(4, 32), torch.tensor([0, 2**17 - 1, 2**17, size - 1])
    weight = torch.zeros(size, 32, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        log_probs, _ = chunked_log_probs(linear(weight), hidden, targets, chunk_size=2)
    log_probs.sum().backward()
    assert weight.grad is not None
    wanted = (-hidden.sum(0) / size).repeat(size, 1).index_add(0, targets, hidden)
    torch.testing.assert_close(weight.grad, wanted, rtol=0.02, atol=2e-6)


@pytest.mark.parametrize("case", ["short", "long", "checkpointed", "exact"])
def test_a_cpu_attends_to_few_tokens_by_plain_products_in_16_bits(
    case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if case == "checkpointed":  # recomputed without what surrounds the forward pass
        monkeypatch.setattr(GradientCheckpointingLayer, "gradient_checkpointing", True)
    model = tiny_model().model
    prompts = [[3] * (511 if case == "long" else 2), [5]]
    batch = Sequences.pad(prompts, [[4, 6], [7], [8, 9]], [0, 0, 1])
    completion_log_probs(model, batch)  # the checks of the first call
    flags = torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed()
    results = []
    for autocast in (False, case != "exact"):
        with (
            profile(activities=[ProfilerActivity.CPU]) as run,
            torch.autocast("cpu", torch.bfloat16, enabled=autocast),
        ):
            results.append(completion_log_probs(model, batch).log_probs)
    assert torch.backends.cuda.fp16_bf16_reduction_math_sdp_allowed() == flags
    called = {event.name for event in run.events() or ()}
    assert ("aten::_scaled_dot_product_attention_math" in called) == (case == "short")
    assert ("aten::_scaled_dot_product_flash_attention_for_cpu" in called) == (case != "short")
    if case == "exact":
        assert torch.equal(*results)
    torch.testing.assert_close(*results, rtol=0.05, atol=0.05)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"temperature": 0.0}, "temperature must be positive"),
        ({"top_k": 0}, "top_k must be at least 1"),
        ({"top_p": 0.0}, r"top_p must lie in \(0, 1\]"),
        ({"softcap": -1.0}, "softcap must be positive"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
    ],
)
def test_bad_options_are_refused(change: dict[str, Any], message: str) -> None:
    hidden, weight, _, targets = problem()
    with pytest.raises(ValueError, match=message):
        chunked_log_probs(linear(weight), hidden, targets, **change)


def test_bad_shapes_are_refused() -> None:
    hidden, weight, _, targets = problem()
    with pytest.raises(ValueError, match=r"hidden must be \[N, H\] and targets \[N\]"):
        chunked_log_probs(linear(weight), hidden, targets[1:])


def peak_bytes(function: Any) -> int:
    """Most bytes that PyTorch held at a time beyond those it held at the start."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        result = function()
    held = peak = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    del result
    return peak


@pytest.mark.parametrize("entropy", [False, True])
def test_memory_is_a_fifth_of_the_dense_form(entropy: bool) -> None:
    tokens, width, vocabulary = 1024, 32, 16_384
    hidden = torch.randn(tokens, width, requires_grad=True)
    weight = torch.randn(vocabulary, width, requires_grad=True)
    targets = torch.randint(0, vocabulary, (tokens,))

    def dense_form() -> Any:
        log_p = (hidden @ weight.T).log_softmax(-1)
        loss = log_p.gather(1, targets[:, None]).sum()
        if entropy:
            loss = loss - (log_p.exp() * log_p).sum()
        return torch.autograd.grad(loss, (hidden, weight))

    def chunked_form() -> Any:
        log_probs, entropies = chunked_log_probs(linear(weight), hidden, targets, entropy=entropy)
        loss = log_probs.sum() if entropies is None else log_probs.sum() + entropies.sum()
        return torch.autograd.grad(loss, (hidden, weight))

    wanted = peak_bytes(dense_form)
    assert wanted > 2 * tokens * vocabulary * 4  # the measurement sees the dense matrices
    assert weight.nbytes < peak_bytes(chunked_form) <= wanted / 5


def test_filters_are_those_of_transformers() -> None:
    logits = torch.randn(50, 40, generator=torch.Generator().manual_seed(0)) * 3
    for top_k in (None, 1, 7, 40, 100):
        for top_p in (1.0, 0.9, 0.3, 1e-6):
            wanted = logits
            if top_k is not None:
                wanted = TopKLogitsWarper(top_k)(None, wanted)
            if top_p < 1.0:
                wanted = TopPLogitsWarper(top_p)(None, wanted)
            assert torch.equal(filter_logits(logits, top_k=top_k, top_p=top_p), wanted), (top_k, top_p)


def test_filters_depend_on_values_alone() -> None:
    logits = torch.tensor([0.0, 2.0, 1.0, 2.0, 1.0, -3.0])
    inf = -torch.inf
    assert filter_logits(logits, top_k=1).tolist() == [
        inf,
        2,
        inf,
        2,
        inf,
        inf,
    ]  # a tie is kept
    assert filter_logits(logits, top_p=0.5).tolist() == [inf, 2, inf, 2, inf, inf]
    assert filter_logits(logits, top_p=0.8).tolist() == [inf, 2, 1, 2, 1, inf]
    kept = filter_logits(logits, top_k=1, keep=torch.tensor(5))
    assert kept.tolist() == [inf, 2, inf, 2, inf, -3]


@given(st.integers(0, 1000), st.integers(1, 12), st.floats(0.01, 1.0))
def test_filters_commute_with_renaming_the_tokens(seed: int, top_k: int, top_p: float) -> None:
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randint(-3, 4, (12,), generator=generator).float()  # many ties
    order = torch.randperm(12, generator=generator)
    filtered = filter_logits(logits, top_k=top_k, top_p=top_p)
    assert torch.equal(filtered[order], filter_logits(logits[order], top_k=top_k, top_p=top_p))
    assert filtered.max() == logits.max()


# --- completion_log_probs -------------------------------------------------------------


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
    }
    config = LlamaConfig(**{"vocab_size": 40, "initializer_range": 0.3, **shape, **changes})
    return LlamaForCausalLM(config)


PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10]]
COMPLETIONS = [[11, 2], [12, 13, 14, 0], [], [15, 2], [2]]
INDEX = [0, 0, 1, 1, 2]


@pytest.mark.parametrize("share", [True, False])
def test_against_the_model_itself(share: bool) -> None:
    model = tiny_llama()
    sequences = Sequences.pad(PROMPTS, COMPLETIONS, INDEX)
    result = completion_log_probs(model, sequences, temperature=0.7, entropy=True, share_prompts=share)
    assert result.log_probs.shape == (5, 4)
    assert result.entropy is not None
    for row, completion in enumerate(COMPLETIONS):
        prompt = PROMPTS[INDEX[row]]
        logits = model(torch.tensor([prompt + completion])).logits[0]
        log_p = (logits / 0.7).log_softmax(-1)
        for t, token in enumerate(completion):
            now = log_p[len(prompt) - 1 + t]
            torch.testing.assert_close(result.log_probs[row, t], now[token])
            torch.testing.assert_close(result.entropy[row, t], -(now.exp() * now).sum())
        assert (result.log_probs[row, len(completion) :] == 0).all()
        assert (result.entropy[row, len(completion) :] == 0).all()


def test_hidden_states_at_hand_are_used() -> None:
    model = tiny_llama()
    sequences = Sequences.pad(PROMPTS, COMPLETIONS, INDEX)
    hidden = hidden_states(model, sequences).detach().requires_grad_()
    again = completion_log_probs(model, sequences, hidden=hidden)
    torch.testing.assert_close(again.log_probs, completion_log_probs(model, sequences).log_probs)
    again.log_probs.sum().backward()
    assert hidden.grad is not None
    used = hidden.grad.abs().sum(-1) > 0
    assert torch.equal(used[:, :-1], sequences.completion_mask)  # and nothing flows to padding
    assert not used[:, -1].any()


def test_only_empty_completions() -> None:
    model = tiny_llama()
    result = completion_log_probs(model, Sequences.pad([[1], [2]], [[], []]), entropy=True)
    assert result.log_probs.shape == (2, 0)
    result.log_probs.sum().backward()  # nothing to learn, and no error


def test_log_probs_of_a_filtered_policy_sum_to_one() -> None:
    """Score every token that could follow: the kept ones are a distribution."""
    model = tiny_llama()
    every = Sequences.pad([[1, 2, 3]], [[token] for token in range(40)], [0] * 40)
    with torch.no_grad():
        log_p = completion_log_probs(model, every, temperature=1.3, top_k=9, top_p=0.9).log_probs[:, 0]
        logits = model(torch.tensor([[1, 2, 3]])).logits[0, -1] / 1.3
    kept = filter_logits(logits, top_k=9, top_p=0.9).isfinite()
    assert 1 < kept.sum() <= 9
    torch.testing.assert_close(log_p[kept].exp().sum(), torch.tensor(1.0))


class TwoPartHead(nn.Module):
    """A head that is not one matrix: as with LoRA on the head."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.extra = nn.Linear(linear.in_features, linear.out_features)

    def forward(self, hidden: Tensor) -> Tensor:
        return self.linear(hidden) + self.extra(hidden)


@pytest.mark.parametrize("filters", [{}, {"top_k": 10, "top_p": 0.9}], ids=str)
def test_a_head_that_is_not_one_matrix(filters: dict[str, Any]) -> None:
    model = tiny_llama().double()
    sequences = Sequences.pad(PROMPTS, COMPLETIONS, INDEX)
    head = TwoPartHead(model.lm_head).double()
    merged = nn.Linear(32, 40).double()
    with torch.no_grad():
        merged.weight.copy_(head.linear.weight + head.extra.weight)
        merged.bias.copy_(head.extra.bias)
    gradients = []
    for module in (head, merged):
        model.lm_head = module
        model.zero_grad()
        result = completion_log_probs(model, sequences, entropy=True, temperature=0.8, **filters)
        assert result.entropy is not None
        (result.log_probs.sum() + 0.1 * result.entropy.sum()).backward()
        gradients.append(
            [
                result.log_probs,
                result.entropy,
                model.model.layers[0].mlp.up_proj.weight.grad.clone(),
            ]
        )
    for ours, wanted in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, wanted)
    torch.testing.assert_close(head.extra.weight.grad, merged.weight.grad)


@pytest.mark.parametrize("coupled", [False, True])
def test_a_loss_that_is_known_beforehand(coupled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one's own log-probability alone: one pass through the head. Else another one, and the same gradient."""
    sequences, passes, gradients = Sequences.pad(PROMPTS, COMPLETIONS, INDEX), list[int](), []
    monkeypatch.setattr(log_probs_module, "_chunk_size", lambda *_: 2)
    in_chunks = log_probs_module._in_chunks
    monkeypatch.setattr(log_probs_module, "_in_chunks", lambda *a: (passes.append(1), in_chunks(*a))[1])

    def loss(now: Tensor) -> Tensor:
        total = (torch.arange(20.0).view(5, 4) * (0.1 * now).exp()).sum()
        return total.square() if coupled else total

    for known in (None, loss):
        model = tiny_llama()
        passes.clear()
        loss(completion_log_probs(model, sequences, temperature=0.7, loss=known).log_probs).backward()
        assert len(passes) == (1 if known and not coupled else 2)
        gradients.append([p.grad for p in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-6, atol=1e-6 * float(other.abs().max()))
