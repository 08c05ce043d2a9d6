"""Conditions on arguments, refused by name."""

from __future__ import annotations

from torch import Tensor


def require(holds: bool, rule: str, got: object, remedy: str = "") -> None:
    """Raise a ValueError that says the rule and what came instead, unless it holds."""
    if not holds:
        raise ValueError(f"{rule}, got {quote(got, 400)}{remedy and f'; {remedy}'}")


def quote(value: object, most: int = 80) -> str:
    """Represent a value in an error message, by at most so many characters."""
    text = repr(value)
    return text if len(text) <= most else f"{text[: most - 1]}…"


def check_shapes(**tensors: Tensor) -> None:
    """Refuse shapes that differ from the first, which broadcasting would hide."""
    (first, tensor), *others = tensors.items()
    for name, other in others:
        rule = f"{name} must have the shape of {first}, {tuple(tensor.shape)}"
        require(other.shape == tensor.shape, rule, tuple(other.shape))
