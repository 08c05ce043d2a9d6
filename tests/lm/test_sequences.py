"""Padded batches, and hidden states that depend on tokens alone: not on padding, order, sharing or slicing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from policyopt.lm.cache import check_cache
from policyopt.lm.log_probs import completion_log_probs
from policyopt.lm.sequences import Sequences, hidden_states

PROMPTS = [[1, 2, 3], [4, 5, 6, 7, 8, 9], [10]]
COMPLETIONS = [[11, 2], [12, 13, 14, 0], [], [15, 2], [2]]
INDEX = [0, 0, 1, 1, 2]


# In float64, save for the norms and rotations that transformers computes in float32 whatever the model's dtype.
CLOSE = {"rtol": 1e-5, "atol": 1e-5}


def tiny_llama(**changes: Any) -> LlamaForCausalLM:
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = LlamaConfig(**{"vocab_size": 40, "initializer_range": 0.3, **shape, **changes})
    return LlamaForCausalLM(config)


def batch(**options: Any) -> Sequences:
    return Sequences.pad(PROMPTS, COMPLETIONS, INDEX, **options)


def loss_and_gradient(model: LlamaForCausalLM, sequences: Sequences, weights: Tensor, **options: Any) -> Any:
    """Weighted sum over completions of log-probability and entropy: values [B, T] and all gradients."""
    model.zero_grad()
    result = completion_log_probs(model, sequences, entropy=True, **options)
    assert result.entropy is not None
    ((result.log_probs + 0.2 * result.entropy).sum(1) * weights).sum().backward()
    return result.log_probs.detach(), [p.grad.clone() for p in model.parameters()]


def assert_same(ours: Any, wanted: Any, **tolerance: float) -> None:
    tolerance = tolerance or CLOSE
    torch.testing.assert_close(ours[0], wanted[0], **tolerance)
    for mine, theirs in zip(ours[1], wanted[1], strict=True):
        torch.testing.assert_close(mine, theirs, **tolerance)


# --- the container ----------------------------------------------------------------------------------------------


def test_pad() -> None:
    s = batch(pad_id=39)
    assert s.prompt_ids.tolist() == [[39, 39, 39, 1, 2, 3], [4, 5, 6, 7, 8, 9], [39, 39, 39, 39, 39, 10]]
    assert s.prompt_mask.sum(1).tolist() == [3, 6, 1]
    assert s.completion_ids[:3].tolist() == [[11, 2, 39, 39], [12, 13, 14, 0], [39, 39, 39, 39]]
    assert s.lengths.tolist() == [2, 4, 0, 2, 1]
    assert s.prompt_index.tolist() == INDEX
    assert len(s) == 5


def test_masks_come_from_lengths() -> None:
    """Padding with an id that occurs in the text, EOS among them, hides no token."""
    s = Sequences.pad([[2, 2], [2]], [[5, 2], [2, 2, 2]], pad_id=2)
    assert s.prompt_mask.tolist() == [[True, True], [False, True]]
    assert s.completion_mask.tolist() == [[True, True, False], [True, True, True]]


def test_pad_without_completions() -> None:
    s = Sequences.pad([[1, 2]], [], [])
    assert s.completion_ids.shape == (0, 0)
    with pytest.raises(ValueError, match="no completions"):
        hidden_states(tiny_llama(), s)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (([[1], []], [[2], [3]]), "prompt 1 is empty; begin it with at least one token"),
        (([[1]], [[2], [3]]), "1 prompts and 2 completions: say with prompt_index"),
        (([[1]], [[2], [3]], [0]), "1 entries in prompt_index, 2 completions"),
        (([[1]], [[2]], [1]), "completion 0 continues prompt 1, but there are 1 prompts"),
    ],
)
def test_pad_refuses_what_does_not_fit(arguments: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Sequences.pad(*arguments)


def test_the_container_checks_its_tensors() -> None:
    s = batch()
    parts = (s.prompt_ids, s.prompt_mask, s.completion_ids, s.completion_mask, s.prompt_index)
    for place, wrong, message in (
        (0, s.prompt_ids.float(), "prompt_ids must be a long matrix"),
        (1, s.prompt_mask.long(), "prompt_mask must be Boolean"),
        (3, s.completion_mask[:, 1:], "completion_mask must be Boolean with the shape"),
        (4, s.prompt_index[1:], "prompt_index must hold one row number per completion"),
    ):
        with pytest.raises(ValueError, match=message):
            Sequences(*parts[:place], wrong, *parts[place + 1 :])


def test_select() -> None:
    for rows in (torch.tensor([4, 0]), torch.tensor([True, False, False, False, True])):
        s = batch().select(rows)
        kept = [INDEX[i] for i in (rows.tolist() if rows.dtype == torch.long else [0, 4])]
        assert s.prompt_ids.shape == (2, 3)  # prompt 1, the longest, is gone
        assert s.completion_ids.shape == (2, 2)
        for row, prompt in enumerate(kept):
            ids = s.prompt_ids[s.prompt_index[row]][s.prompt_mask[s.prompt_index[row]]]
            assert ids.tolist() == PROMPTS[prompt]
    assert batch().select(torch.tensor([2])).completion_ids.shape == (1, 0)
    assert len(batch().select(torch.tensor([], dtype=torch.long))) == 0


# --- hidden states ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", [True, False])
def test_states_are_those_of_each_text_alone(share: bool) -> None:
    model = tiny_llama().double()
    hidden = hidden_states(model, batch(), share_prompts=share)
    assert hidden.shape == (5, 5, 32)
    assert hidden.isfinite().all()
    for row, completion in enumerate(COMPLETIONS):
        prompt = PROMPTS[INDEX[row]]
        alone = model.model(torch.tensor([prompt + completion])).last_hidden_state[0, len(prompt) - 1 :]
        torch.testing.assert_close(hidden[row, : len(completion) + 1], alone, **CLOSE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("heads", [4, 2])
def test_sharing_prompts_changes_nothing(attention: str, heads: int) -> None:
    # Eager attention of transformers masks rows of padding with float64's least number: −∞ in its float32 softmax.
    dtype, close = (
        (torch.float64, CLOSE) if attention == "sdpa" else (torch.float32, {"rtol": 1e-3, "atol": 1e-4})
    )
    model = tiny_llama(attn_implementation=attention, num_key_value_heads=heads).to(dtype)
    weights = torch.linspace(-1, 1, 5)
    shared = loss_and_gradient(model, batch(), weights, share_prompts=True)
    assert_same(shared, loss_and_gradient(model, batch(), weights, share_prompts=False), **close)


def test_prompts_are_run_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_llama()
    tokens: list[int] = []
    model.model.register_forward_pre_hook(
        lambda module, args, kwargs: tokens.append(kwargs["input_ids"].numel()), with_kwargs=True
    )
    check_cache(model)  # at the first call
    tokens.clear()
    hidden_states(model, batch())
    assert tokens == [3 * 6, 5 * 4]
    tokens.clear()
    hidden_states(model, batch(), share_prompts=False)
    assert tokens == [5 * 8]  # the longest of them has 6 + 2 tokens: padding is squeezed out
    tokens.clear()
    hidden_states(model, Sequences.pad(PROMPTS, COMPLETIONS[:3]))
    assert tokens == [3 * 10]  # nothing to share: one pass


@pytest.mark.parametrize("share", [True, False])
def test_padding_changes_nothing(share: bool) -> None:
    """Neither how much there is, nor its id, EOS included."""
    model = tiny_llama().double()
    weights = torch.linspace(-1, 1, 5, dtype=torch.float64)
    wanted = loss_and_gradient(model, batch(), weights, share_prompts=share)
    for pad_id in (2, 39):
        s = batch(pad_id=pad_id)
        pads = torch.full((5, 3), pad_id), torch.zeros(5, 3, dtype=torch.bool)
        wider = Sequences(
            torch.cat([pads[0][:3], s.prompt_ids], 1),
            torch.cat([pads[1][:3], s.prompt_mask], 1),
            torch.cat([s.completion_ids, pads[0]], 1),
            torch.cat([s.completion_mask, pads[1]], 1),
            s.prompt_index,
        )
        log_probs, gradient = loss_and_gradient(model, wider, weights, share_prompts=share)
        assert (log_probs[:, 4:] == 0).all()
        assert_same((log_probs[:, :4], gradient), wanted)


def test_order_of_rows_and_prompts_changes_nothing() -> None:
    model = tiny_llama().double()
    weights = torch.linspace(-1, 1, 5, dtype=torch.float64)
    log_probs, gradient = loss_and_gradient(model, batch(), weights)
    rows, new_row = torch.tensor([3, 0, 4, 2, 1]), {0: 2, 1: 0, 2: 1}
    mixed = Sequences.pad(
        [PROMPTS[1], PROMPTS[2], PROMPTS[0]],
        [COMPLETIONS[i] for i in rows],
        [new_row[INDEX[i]] for i in rows.tolist()],
    )
    assert_same(loss_and_gradient(model, mixed, weights[rows]), (log_probs[rows], gradient))


@pytest.mark.parametrize("cuts", [[2, 3], [1, 1, 1, 1, 1], [4, 1]])
def test_micro_batches_add_up(cuts: list[int]) -> None:
    model = tiny_llama().double()
    weights = torch.linspace(-1, 1, 5, dtype=torch.float64)
    log_probs, gradient = loss_and_gradient(model, batch(), weights)
    total = [torch.zeros_like(g) for g in gradient]
    for rows in torch.arange(5).split(cuts):
        values, part = loss_and_gradient(model, batch().select(rows), weights[rows])
        torch.testing.assert_close(values, log_probs[rows, : values.shape[1]], **CLOSE)
        total = [a + b for a, b in zip(total, part, strict=True)]
    for ours, wanted in zip(total, gradient, strict=True):
        torch.testing.assert_close(ours, wanted, **CLOSE)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_mode_with_dropout_has_finite_gradients(attention: str, dtype: torch.dtype) -> None:
    """The rows of padding in front of short prompts attend to nothing: no NaN may come of it."""
    model = tiny_llama(attn_implementation=attention, attention_dropout=0.2).to(dtype).train()
    values, gradient = loss_and_gradient(model, batch(), torch.ones(5))
    assert values.isfinite().all()
    assert all(g.isfinite().all() for g in gradient)
    assert any(g.abs().sum() > 0 for g in gradient)
    assert model.training


def test_bfloat16_is_near_float32() -> None:
    model = tiny_llama(initializer_range=0.1)
    exact = completion_log_probs(model, batch()).log_probs
    for share in (True, False):
        half = completion_log_probs(copy.deepcopy(model).bfloat16(), batch(), share_prompts=share).log_probs
        assert half.dtype == torch.float32
        torch.testing.assert_close(half, exact, atol=0.05, rtol=0.02)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_gradient_checkpointing() -> None:
    """It excludes the cache, so the prompts are not shared; the result is the same."""
    model = tiny_llama().double().train()
    weights = torch.linspace(-1, 1, 5, dtype=torch.float64)
    wanted = loss_and_gradient(model, batch(), weights)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    assert_same(loss_and_gradient(model, batch(), weights), wanted)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_on_a_gpu(dtype: torch.dtype) -> None:
    model = tiny_llama(initializer_range=0.1)
    weights = torch.linspace(-1, 1, 5)
    wanted = loss_and_gradient(model, batch(), weights)
    model = model.to("cuda", dtype)
    tolerance = {"atol": 2e-3, "rtol": 2e-3} if dtype == torch.float32 else {"atol": 0.3, "rtol": 0.1}
    for share in (True, False):
        values, gradient = loss_and_gradient(model, batch(device="cuda"), weights.cuda(), share_prompts=share)
        assert_same((values.cpu(), [g.float().cpu() for g in gradient]), wanted, **tolerance)
