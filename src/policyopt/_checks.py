"""Conditions on arguments, refused by name."""

from __future__ import annotations

from torch import Tensor


def require(holds: bool, rule: str, got: object, remedy: str = "") -> None:
    """Raise a ValueError that says the rule and what came instead, unless it holds."""
    if not holds:
        raise ValueError(f"{rule}, got {got!r}{remedy and f'; {remedy}'}")


def require_shape_of(name: str, tensor: Tensor, **others: Tensor) -> None:
    """Refuse shapes that differ, which broadcasting would hide."""
    shape = tuple(tensor.shape)
    for other, value in others.items():
        rule = f"{other} must have the shape of {name}, {shape}"
        require(value.shape == tensor.shape, rule, tuple(value.shape))
