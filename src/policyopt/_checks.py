"""Conditions on arguments, refused by name."""

from __future__ import annotations

from torch import Tensor


def require(holds: bool, rule: str, got: object, remedy: str = "") -> None:
    """Raise a ValueError that says the rule and what came instead, unless it holds."""
    if not holds:
        raise ValueError(f"{rule}, got {got!r}{remedy and f'; {remedy}'}")


def check_shapes(**tensors: Tensor) -> None:
    """Refuse shapes that differ from the first, which broadcasting would hide."""
    (first, tensor), *others = tensors.items()
    for name, other in others:
        rule = f"{name} must have the shape of {first}, {tuple(tensor.shape)}"
        require(other.shape == tensor.shape, rule, tuple(other.shape))
