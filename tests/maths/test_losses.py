"""Losses against the formulas written out, finite differences, and batches cut in pieces."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from policyopt.distributions import Categorical
from policyopt.estimators import kl_estimate
from policyopt.losses import (
    aggregate,
    cispo_loss,
    clipped_surrogate_loss,
    policy_gradient_loss,
    surrogate_loss,
    value_loss,
)

F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


# --- Policy losses -------------------------------------------------------------------------------------------


def test_policy_gradient_loss() -> None:
    log_prob, weights = normal(0, 4, 3).requires_grad_(), normal(1, 4, 3).requires_grad_()
    loss = policy_gradient_loss(log_prob, weights)
    torch.testing.assert_close(loss, -weights * log_prob)
    loss.sum().backward()
    torch.testing.assert_close(log_prob.grad, -weights.detach())
    assert weights.grad is None  # a weight is data, even if it was computed by a network


def test_surrogate_loss() -> None:
    log_prob, old, advantages = (normal(i, 5).requires_grad_() for i in range(3))
    out = surrogate_loss(log_prob, old, advantages)
    ratio = (log_prob.exp() / old.exp()).detach()
    torch.testing.assert_close(out.loss, -ratio * advantages)
    torch.testing.assert_close(out.ratio, ratio)
    torch.testing.assert_close(out.kl, ratio - 1 - ratio.log())
    out.loss.sum().backward()
    torch.testing.assert_close(log_prob.grad, (-ratio * advantages).detach())
    assert old.grad is None
    assert advantages.grad is None
    assert not out.ratio.requires_grad
    assert not out.kl.requires_grad


def test_the_kl_statistic_is_that_of_old_from_new() -> None:
    """By enumeration: actions come from π_old, so the mean of the statistic is KL(π_old ‖ π)."""
    log_old, log_new = normal(0, 4).log_softmax(-1), normal(1, 4).log_softmax(-1)
    exact = (log_old.exp() * (log_old - log_new)).sum()
    advantages = torch.ones(4, dtype=F64)
    for loss in (surrogate_loss, clipped_surrogate_loss):
        torch.testing.assert_close(log_old.exp() @ loss(log_new, log_old, advantages).kl, exact)


def objective(ratio: float, advantage: float, low: float, high: float) -> float:
    """Eq. 7 of the PPO paper with plain numbers."""
    clipped = min(max(ratio, 1 - low), 1 + high)
    return min(ratio * advantage, clipped * advantage)


RATIOS = [0.05, 0.5, 0.79, 0.81, 0.999, 1.0, 1.001, 1.19, 1.21, 1.29, 1.31, 2.0, 10.0]
ADVANTAGES = [-2.0, -0.3, 0.0, 0.4, 3.0]


@pytest.mark.parametrize(("clip_ratio", "clip_ratio_high"), [(0.2, None), (0.2, 0.3), (0.4, 0.1)])
def test_clipped_surrogate_on_a_grid(clip_ratio: float, clip_ratio_high: float | None) -> None:
    high = clip_ratio if clip_ratio_high is None else clip_ratio_high
    for ratio, advantage in itertools.product(RATIOS, ADVANTAGES):
        log_prob = torch.tensor([math.log(ratio) - 0.7], dtype=F64, requires_grad=True)
        old = torch.tensor([-0.7], dtype=F64)
        out = clipped_surrogate_loss(
            log_prob,
            old,
            torch.tensor([advantage], dtype=F64),
            clip_ratio=clip_ratio,
            clip_ratio_high=clip_ratio_high,
        )
        (gradient,) = torch.autograd.grad(out.loss, log_prob)
        assert out.loss.item() == pytest.approx(-objective(ratio, advantage, clip_ratio, high))
        assert out.ratio.item() == pytest.approx(ratio)
        h = 1e-6
        slope = (
            objective(ratio * math.exp(h), advantage, clip_ratio, high)
            - objective(ratio * math.exp(-h), advantage, clip_ratio, high)
        ) / (2 * h)
        assert gradient.item() == pytest.approx(-slope, abs=1e-6)
        if advantage != 0:  # without advantage there is no gradient for the clip to switch off
            assert bool(out.clipped.item()) == (gradient.item() == 0.0)
        else:
            assert out.clipped.item() == 0.0


def test_the_clip_keeps_the_way_back_open() -> None:
    """ρ far on the wrong side of 1: the full gradient, however far."""
    log_prob = torch.tensor([math.log(0.1), math.log(10.0)], requires_grad=True)
    out = clipped_surrogate_loss(log_prob, torch.zeros(2), torch.tensor([1.0, -1.0]))
    out.loss.sum().backward()
    torch.testing.assert_close(log_prob.grad, torch.tensor([-0.1, 10.0]))
    assert out.clipped.tolist() == [0.0, 0.0]


@pytest.mark.parametrize(("clip_ratio", "high"), [(1.0, 4.0), (0.2, 0.3), (0.4, None), (3.0, 1.0)])
def test_cispo_on_a_grid(clip_ratio: float, high: float | None) -> None:
    """MiniMax-M1, eq. 4 and 5: the clipped ratio weighs ∇ log π on both sides, whatever the advantage's sign."""
    for ratio, advantage in itertools.product(RATIOS, ADVANTAGES):
        log_prob = torch.tensor([math.log(ratio) - 0.7], dtype=F64, requires_grad=True)
        old, A = torch.tensor([-0.7], dtype=F64), torch.tensor([advantage], dtype=F64)
        out = cispo_loss(log_prob, old, A, clip_ratio=clip_ratio, clip_ratio_high=high)
        (gradient,) = torch.autograd.grad(out.loss, log_prob)
        weight = max(1 - clip_ratio, min(ratio, 1 + (clip_ratio if high is None else high)))
        assert gradient.item() == pytest.approx(-weight * advantage)
        assert out.loss.item() == pytest.approx(-weight * advantage * log_prob.item())
        assert bool(out.clipped.item()) == (weight != pytest.approx(ratio))
        assert out.ratio.item() == pytest.approx(ratio)
        assert out.kl.item() == pytest.approx(ratio - 1 - math.log(ratio))
        assert not any(x.requires_grad for x in out[1:])


def test_cispo_within_its_edges_is_the_surrogate() -> None:
    log_prob = torch.tensor([-0.5, -1.0, -2.0], dtype=F64, requires_grad=True)
    old, advantages = torch.tensor([-0.6, -0.9, -2.5], dtype=F64), torch.tensor([1.0, -2.0, 0.5], dtype=F64)
    ours, theirs = (f(log_prob, old, advantages).loss.sum() for f in (cispo_loss, surrogate_loss))
    assert torch.allclose(*(torch.autograd.grad(x, log_prob)[0] for x in (ours, theirs)))


FLOATS = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@given(
    st.sampled_from(FLOATS),
    st.one_of(st.integers(-800, 800), st.sampled_from([-math.inf, math.inf])),
    st.sampled_from([-2.0, -0.5, 0.0, 0.5, 3.0]),
)
def test_the_surrogate_at_any_log_ratio(dtype: torch.dtype, log_ratio: float, advantage: float) -> None:
    """Where the clip decides the gradient is 0, not 0 · inf, and a masked token adds nothing at all."""
    bound = 0.9 * math.log(torch.finfo(dtype).max)
    old = torch.tensor([-log_ratio, -1.0], dtype=dtype)
    advantages = torch.tensor([advantage, 1.0], dtype=dtype)
    log_prob = torch.tensor([0.0, -1.0], dtype=dtype, requires_grad=True)
    out = clipped_surrogate_loss(log_prob, old, advantages)
    out.loss[0].backward(retain_graph=True)
    assert log_prob.grad is not None
    off = (log_ratio > 0 and advantage > 0) or (log_ratio < 0 and advantage < 0) or advantage == 0
    if log_ratio == 0:
        off = advantage == 0
    pull = 0.0 if off else -advantage * math.exp(min(log_ratio, bound))
    if abs(log_ratio) < math.inf:  # at infinity the direction is not defined
        assert log_prob.grad[0].item() == pytest.approx(pull, rel=0.2 if dtype.itemsize == 2 else 1e-4)
    assert math.isfinite(log_prob.grad[0].item())
    edges = objective(math.exp(min(log_ratio, bound)), advantage, 0.2, 0.2)
    assert out.loss[0].item() == pytest.approx(-edges, rel=0.2 if dtype.itemsize == 2 else 1e-4)

    for loss in (clipped_surrogate_loss, surrogate_loss):
        log_prob.grad = None
        items = loss(log_prob, old, advantages).loss
        aggregate(items, torch.tensor([False, True])).backward()
        assert log_prob.grad.tolist() == [0.0, -1.0]


@given(st.sampled_from(FLOATS), st.one_of(st.floats(-800, 800), st.just(math.inf)))
def test_k3_does_not_overflow_into_a_masked_sum(dtype: torch.dtype, log_ratio: float) -> None:
    bound = 0.9 * math.log(torch.finfo(dtype).max)
    log_prob = torch.tensor([-log_ratio, -1.0], dtype=dtype, requires_grad=True)
    kl = kl_estimate(log_prob, torch.tensor([0.0, -2.0], dtype=dtype), "k3")
    aggregate(kl, torch.tensor([False, True])).backward()
    assert log_prob.grad is not None
    assert log_prob.grad.tolist() == pytest.approx([0.0, 1 - math.exp(-1)], rel=0.01)
    x = -log_prob[0].item()
    if x < bound:
        expected = math.expm1(x) - x
        loose = 0.3 if dtype.itemsize == 2 else 1e-3
        assert kl[0].item() == pytest.approx(expected, rel=loose, abs=1e-2 if dtype.itemsize == 2 else 1e-6)
    elif x < math.inf:
        assert math.isfinite(kl[0].item())


def test_all_policy_losses_agree_at_the_old_policy() -> None:
    old, advantages = normal(0, 6), normal(1, 6)
    gradients = []
    for loss in (surrogate_loss, clipped_surrogate_loss):
        log_prob = old.clone().requires_grad_()
        out = loss(log_prob, old, advantages)
        assert (out.ratio == 1).all()
        assert (out.kl == 0).all()
        gradients.append(torch.autograd.grad(out.loss.sum(), log_prob)[0])
    for gradient in gradients:
        torch.testing.assert_close(gradient, -advantages)


@pytest.mark.parametrize("loss", [clipped_surrogate_loss, cispo_loss])
@pytest.mark.parametrize("bad", [{"clip_ratio": 0.0}, {"clip_ratio": -0.1}, {"clip_ratio_high": math.nan}])
def test_clip_range_is_checked(bad: dict[str, float], loss: Any) -> None:
    with pytest.raises(ValueError, match=f"{list(bad)[-1]} must be > 0"):
        loss(torch.zeros(1), torch.zeros(1), torch.zeros(1), **bad)


def test_shapes_are_checked() -> None:
    """A [B] against a [B, 1] would broadcast to [B, B] without a word."""
    row, column = torch.zeros(3), torch.zeros(3, 1)
    with pytest.raises(ValueError, match=r"weights must have the shape of log_prob, \(3,\), got \(3, 1\)"):
        policy_gradient_loss(row, column)
    for loss in (surrogate_loss, clipped_surrogate_loss):
        with pytest.raises(ValueError, match="old_log_prob must have the shape of log_prob"):
            loss(row, column, row)
        with pytest.raises(ValueError, match="advantages must have the shape of log_prob"):
            loss(row, row, column)
    with pytest.raises(ValueError, match="targets must have the shape of values"):
        value_loss(row, column)
    with pytest.raises(ValueError, match="old_values must have the shape of values"):
        value_loss(row, row, column, clip=0.2)
    with pytest.raises(ValueError, match="mask must have the shape of values"):
        aggregate(row, column)


# --- Value and entropy ---------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10_000), clip=st.sampled_from([None, 0.1, 1.0]))
def test_value_loss(seed: int, clip: float | None) -> None:
    values, targets, old = normal(seed, 8).requires_grad_(), normal(seed + 1, 8), normal(seed + 2, 8)
    out = value_loss(values, targets, old, clip=clip)

    def reference(v: float, target: float, v_old: float) -> float:
        squared = (v - target) ** 2
        if clip is not None:
            squared = max(squared, (v_old + min(max(v - v_old, -clip), clip) - target) ** 2)
        return 0.5 * squared

    rows = list(zip(values.tolist(), targets.tolist(), old.tolist(), strict=True))
    torch.testing.assert_close(out.loss.tolist(), [reference(*row) for row in rows])
    torch.testing.assert_close(out.error, (values - targets).detach())
    (gradient,) = torch.autograd.grad(out.loss.sum(), values)
    h = 1e-6
    slopes = [(reference(v + h, t, o) - reference(v - h, t, o)) / (2 * h) for v, t, o in rows]
    torch.testing.assert_close(gradient.tolist(), slopes, rtol=1e-5, atol=1e-6)


def test_value_loss_holds_its_targets_constant() -> None:
    values, targets, old = (normal(i, 3).requires_grad_() for i in range(3))
    value_loss(values, targets, old, clip=0.1).loss.sum().backward()
    assert targets.grad is None
    assert old.grad is None


def test_value_loss_errors() -> None:
    with pytest.raises(ValueError, match="old_values must be given"):
        value_loss(torch.zeros(1), torch.zeros(1), clip=0.2)
    with pytest.raises(ValueError, match=r"clip must be > 0 or None, got -1\.0"):
        value_loss(torch.zeros(1), torch.zeros(1), torch.zeros(1), clip=-1.0)


def test_descending_minus_the_entropy_spreads_the_policy_out() -> None:
    logits = torch.tensor([2.0, 0.0, -1.0], requires_grad=True)

    def entropy(x: Tensor) -> Tensor:
        return Categorical.from_logits(x).entropy()

    (gradient,) = torch.autograd.grad(-entropy(logits), logits)
    assert entropy(logits - 0.1 * gradient) > entropy(logits)


# --- aggregate -----------------------------------------------------------------------------------------------

VALUES = torch.tensor([[1.0, 2.0, 9.0], [4.0, 9.0, 9.0], [9.0, 9.0, 9.0]])
MASK = torch.tensor([[1, 1, 0], [1, 0, 0], [0, 0, 0]], dtype=torch.bool)


@pytest.mark.parametrize(
    ("reduction", "denominator", "expected"),
    [
        ("mean", None, (1 + 2 + 4) / 3),
        ("mean", 10, (1 + 2 + 4) / 10),
        ("mean", torch.tensor(10.0), (1 + 2 + 4) / 10),
        ("sequence-mean", None, ((1 + 2) / 2 + 4) / 2),  # the empty sequence is not counted
        ("sequence-mean", 5, ((1 + 2) / 2 + 4) / 5),
        ("sum", None, 1 + 2 + 4),
    ],
)
def test_aggregate_by_hand(reduction: Any, denominator: float | Tensor | None, expected: float) -> None:
    for mask in (MASK, MASK.long(), MASK.float()):
        assert aggregate(VALUES, mask, reduction=reduction, denominator=denominator).item() == pytest.approx(
            expected
        )
    padded = torch.where(MASK, VALUES, torch.nan)  # what is masked out may be anything
    assert aggregate(padded, MASK, reduction=reduction, denominator=denominator).item() == pytest.approx(
        expected
    )


@pytest.mark.parametrize("reduction", ["mean", "sequence-mean", "sum"])
def test_masked_entries_get_no_gradient_even_when_nan(reduction: Any) -> None:
    values = torch.where(MASK, VALUES, torch.nan).requires_grad_()
    aggregate(values, MASK, reduction=reduction).backward()
    assert values.grad is not None
    assert (values.grad[~MASK] == 0).all()
    assert (values.grad[MASK] > 0).all()


def test_aggregate_without_a_mask() -> None:
    assert aggregate(VALUES).item() == pytest.approx(VALUES.mean().item())
    assert aggregate(VALUES, denominator=2).item() == pytest.approx(VALUES.sum().item() / 2)
    assert aggregate(VALUES, reduction="sequence-mean").item() == pytest.approx(VALUES.mean().item())
    assert aggregate(VALUES, reduction="sum").item() == pytest.approx(VALUES.sum().item())


def test_a_denominator_on_an_accelerator_is_not_waited_for() -> None:
    """A tensor of the device "meta" has no value: to ask for one would raise."""
    values = torch.empty(2, 3, device="meta")
    total = aggregate(values, denominator=torch.empty((), device="meta"))
    assert (total.shape, total.device.type) == ((), "meta")
    with pytest.raises(ValueError, match=r"denominator must be > 0, got 0"):
        aggregate(values, denominator=0)


def test_aggregate_errors() -> None:
    nothing = torch.zeros_like(MASK)
    for reduction in ("mean", "sequence-mean"):
        with pytest.raises(ValueError, match="values holds no item to average"):
            aggregate(VALUES, nothing, reduction=reduction)
        assert aggregate(VALUES, nothing, reduction=reduction, denominator=3).item() == 0.0
    with pytest.raises(ValueError, match="values holds no item to average"):
        aggregate(torch.empty(0))
    for denominator in (0, -1.0, torch.tensor(0.0), math.nan):
        with pytest.raises(ValueError, match="denominator must be > 0"):
            aggregate(VALUES, denominator=denominator)
    with pytest.raises(ValueError, match="denominator must be None with reduction='sum'"):
        aggregate(VALUES, reduction="sum", denominator=3)
    with pytest.raises(ValueError, match="reduction must be 'mean', 'sequence-mean' or 'sum', got 'median'"):
        aggregate(VALUES, reduction="median")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="values must be"):
        aggregate(torch.tensor(1.0), reduction="sequence-mean")


@given(
    seed=st.integers(0, 10_000),
    sequences=st.integers(8, 12),
    pieces=st.sampled_from([1, 2, 8]),
    reduction=st.sampled_from(["mean", "sequence-mean"]),
    kind=st.sampled_from(["policy gradient", "clipped surrogate", "value"]),
)
def test_gradients_do_not_depend_on_how_a_batch_is_cut(
    seed: int, sequences: int, pieces: int, reduction: Any, kind: str
) -> None:
    """Sequences of unequal length, summed over micro-batches with the denominator of the whole."""
    length, features, actions = 5, 3, 4
    inputs, weights = normal(seed, sequences, length, features), normal(seed + 1, sequences, length)
    taken = torch.randint(actions, (sequences, length), generator=generator(seed))
    lengths = torch.randint(0, length + 1, (sequences,), generator=generator(seed + 1))
    lengths[0] = 1
    mask = torch.arange(length) < lengths[:, None]
    network = torch.nn.Linear(features, actions, dtype=F64)
    old = normal(seed + 2, sequences, length, actions).log_softmax(-1)

    def items(rows: Tensor) -> Tensor:
        outputs = network(inputs[rows])
        if kind == "value":
            return value_loss(outputs[..., 0], weights[rows]).loss
        index = taken[rows].unsqueeze(-1)
        log_prob = outputs.log_softmax(-1).gather(-1, index).squeeze(-1)
        if kind == "policy gradient":
            return policy_gradient_loss(log_prob, weights[rows])
        return clipped_surrogate_loss(log_prob, old[rows].gather(-1, index).squeeze(-1), weights[rows]).loss

    everything = torch.arange(sequences)
    network.zero_grad()
    whole = aggregate(items(everything), mask, reduction=reduction)
    whole.backward()
    expected = [p.grad.clone() for p in network.parameters() if p.grad is not None]

    denominator = mask.sum() if reduction == "mean" else (lengths > 0).sum()
    network.zero_grad()
    total = torch.zeros((), dtype=F64)
    for rows in everything[torch.randperm(sequences, generator=generator(seed))].tensor_split(pieces):
        part = aggregate(items(rows), mask[rows], reduction=reduction, denominator=denominator)
        part.backward()
        total += part.detach()
    torch.testing.assert_close(total, whole.detach())
    torch.testing.assert_close([p.grad for p in network.parameters()], expected)
