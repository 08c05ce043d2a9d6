"""What a trainer's ``loss=`` may be, and what it may return."""

from __future__ import annotations

import math
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from policyopt.losses import check_loss, item_losses


class Items(NamedTuple):
    loss: Tensor
    kl: Tensor | None = None


def batch() -> SimpleNamespace:
    return SimpleNamespace(log_prob=torch.randn(3, requires_grad=True))


def two(batch: Any, config: Any) -> Tensor:
    return batch.log_prob


class Callable2:
    def __call__(self, batch: Any, scale: float = 1.0) -> Tensor:
        return scale * batch.log_prob


@pytest.mark.parametrize(
    "loss", [lambda x: x, partial(two, config=None), Callable2(), max, lambda *args: args[0]]
)
def test_functions_of_one_argument_are_taken(loss: Any) -> None:
    assert check_loss(loss, two, "batch") is loss


def test_none_takes_the_default() -> None:
    assert check_loss(None, two, "batch") is two


@pytest.mark.parametrize("loss", [3, "ppo", two, lambda: 0, lambda *, batch: 0])
def test_others_are_refused(loss: Any) -> None:
    with pytest.raises(
        TypeError, match=r"loss must be a function of one argument, the Batch of .*got "
    ) as caught:
        check_loss(loss, two, "Batch of completions")
    assert repr(loss) in str(caught.value)


def test_a_tensor_a_named_tuple_and_an_object_give_the_same_items() -> None:
    x = batch()
    for loss in (
        lambda b: 2 * b.log_prob,
        lambda b: Items(2 * b.log_prob),
        lambda b: SimpleNamespace(loss=2 * b.log_prob),
    ):
        items = item_losses(loss, x, (3,))
        assert torch.equal(items.loss, 2 * x.log_prob)
        assert items.loss.requires_grad


def test_statistics_are_detached_and_nan_where_they_are_missing() -> None:
    x = batch()
    items = item_losses(lambda b: Items(b.log_prob, b.log_prob**2), x, (3,), statistics=("kl", "ratio"))
    assert torch.equal(items.kl, x.log_prob.detach() ** 2)
    assert not items.kl.requires_grad
    assert items.ratio.shape == (3,)
    assert items.ratio.isnan().all()
    # A tensor has attributes such as T and mean: none of them is a statistic.
    bare = item_losses(lambda b: b.log_prob, x, (3,), statistics=("T", "mean"))
    assert bare.T.isnan().all()
    assert bare.mean.isnan().all()
    # A mask and a number will do.
    mixed = SimpleNamespace(loss=x.log_prob, clipped=x.log_prob > 0, kl=2)
    items = item_losses(lambda b: mixed, x, (3,), statistics=("clipped", "kl"))
    assert items.clipped.mean().item() == pytest.approx((x.log_prob > 0).float().mean().item())
    assert items.kl.mean().item() == 2


def test_a_required_statistic_is_asked_for() -> None:
    with pytest.raises(ValueError, match="loss must return the field 'kl' with this config, got only Items"):
        item_losses(lambda b: Items(b.log_prob), batch(), (3,), statistics=("kl",), required=("kl",))
    whole = item_losses(
        lambda b: Items(b.log_prob, b.log_prob), batch(), (3,), statistics=("kl",), required=("kl",)
    )
    assert math.isfinite(whole.kl.sum())


@pytest.mark.parametrize(
    ("loss", "error", "message"),
    [
        (lambda b: b.log_prob.sum(), ValueError, r"one number per item, shape \(3,\), got \(\)"),
        (lambda b: b.log_prob[None], ValueError, r"one number per item, shape \(3,\), got \(1, 3\)"),
        (lambda b: b.log_prob.detach(), ValueError, "got a tensor without gradient"),
        (lambda b: Items(b.log_prob.tolist()), TypeError, "tensor in its field 'loss', got Items"),
        (lambda b: (b.log_prob, b.log_prob), TypeError, "tensor in its field 'loss', got tuple"),
        (lambda b: 1.0, TypeError, "tensor in its field 'loss', got float"),
    ],
)
def test_what_a_loss_may_not_return(loss: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        item_losses(loss, batch(), (3,))


def test_where_no_gradient_is_wanted_none_is_asked_for() -> None:
    with torch.no_grad():
        assert not item_losses(lambda b: 2 * b.log_prob, batch(), (3,)).loss.requires_grad
