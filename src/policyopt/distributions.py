"""Action distributions as small tensor records: categorical, several categorical ones
at once, and diagonal Gaussian.

They differ from ``torch.distributions`` in three ways that matter here: sampling takes
an explicit ``torch.Generator`` (so a run is reproducible without touching the global
seed), ``kl`` is a method with its direction in the docstring, and nothing is validated
per call (a rollout makes thousands of them a second).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

__all__ = ["Categorical", "DiagonalGaussian", "Distribution", "MultiCategorical"]


class Distribution(Protocol):
    """What a policy's output must offer to be trained by the algorithms of this
    package.

    Batch dimensions are written ``[...]``. All logarithms are natural, so entropies and
    KL divergences are in nats.
    """

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw one action per batch item."""

    def mode(self) -> Tensor:
        """Return the most probable action per batch item."""

    def log_prob(self, actions: Tensor) -> Tensor:
        """Return log π(a|s), shape ``[...]``."""

    def entropy(self) -> Tensor:
        """Return H(π(·|s)), shape ``[...]``."""

    def kl(self, other: Distribution) -> Tensor:
        """Return KL(self ‖ other), shape ``[...]``."""

    def detach(self) -> Distribution:
        """Return a frozen copy: no gradient, and no change when the parameters are
        changed in place.
        """


@dataclass(frozen=True, slots=True)
class Categorical:
    """A distribution over ``K`` discrete actions.

    Parameters
    ----------
    log_probs : Tensor
        Normalised log-probabilities, shape ``[..., K]``. Use :meth:`from_logits` for
        raw network outputs.

    Examples
    --------
    >>> import torch
    >>> d = Categorical.from_logits(torch.tensor([0.0, 0.0]))
    >>> round(d.entropy().item(), 4)  # log 2
    0.6931
    >>> round(d.log_prob(torch.tensor(1)).item(), 4)
    -0.6931
    """

    log_probs: Tensor

    @classmethod
    def from_logits(cls, logits: Tensor, mask: Tensor | None = None) -> Categorical:
        """Normalise raw scores ``[..., K]``: log π(k) = logit_k − log Σ_j exp
        logit_j.

        ``mask``, bool and broadcast to ``[..., K]``, is True for the actions that are
        allowed: j and k run over these alone. The others have probability 0, and their
        logits get no gradient. Each item must have one that is allowed.
        """
        if mask is None:
            return cls(torch.log_softmax(logits, dim=-1))
        allowed = torch.log_softmax(logits.masked_fill(~mask, -torch.inf), dim=-1)
        # Not −∞: 0 · −∞ would make NaN of entropy and KL divergence.
        return cls(allowed.masked_fill(~mask, torch.finfo(logits.dtype).min))

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw actions ``[...]`` (int64).

        The race of exponential clocks: with E_k ~ Exp(1) independent, argmax_k π_k /
        E_k has law π. One fused draw for the whole batch, and unlike
        ``torch.multinomial`` it takes any number of batch dimensions.
        """
        clocks = torch.empty_like(self.log_probs).exponential_(generator=generator)
        return (self.log_probs.exp() / clocks).argmax(dim=-1)

    def mode(self) -> Tensor:
        """Return the most probable action, ``[...]`` (int64)."""
        return self.log_probs.argmax(dim=-1)

    def log_prob(self, actions: Tensor) -> Tensor:
        """Return log π(a|s) for ``actions`` ``[...]`` (int64), shape ``[...]``."""
        return self.log_probs.gather(-1, actions.unsqueeze(-1)).squeeze(-1)

    def entropy(self) -> Tensor:
        """Return −Σ_k π_k log π_k in nats, shape ``[...]``."""
        return -(self.log_probs.exp() * self.log_probs).sum(dim=-1)

    def kl(self, other: Distribution) -> Tensor:
        """Return KL(self ‖ other) = Σ_k π_k (log π_k − log π'_k) in nats, shape
        ``[...]``.
        """
        if not isinstance(other, Categorical):
            raise ValueError(f"other must be a Categorical, got {type(other).__name__}")
        return (self.log_probs.exp() * (self.log_probs - other.log_probs)).sum(dim=-1)

    def detach(self) -> Categorical:
        """Return a frozen copy: no gradient, and no change when the parameters are
        changed in place.
        """
        return Categorical(self.log_probs.detach().clone())


@dataclass(frozen=True, slots=True)
class MultiCategorical:
    """``D`` independent choices, each from a categorical distribution of its own.

    Parameters
    ----------
    factors : Categorical
        All of them, log-probabilities ``[..., D, K]``. A choice from fewer than ``K``
        values has the rest masked: see :meth:`Categorical.from_logits`.

    Examples
    --------
    >>> import torch
    >>> exists = torch.tensor([[True, True, False], [True, True, True]])
    >>> d = MultiCategorical(Categorical.from_logits(torch.zeros(2, 3), exists))
    >>> round(d.entropy().item(), 4)  # log 2 + log 3
    1.7918
    """

    factors: Categorical

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw actions ``[..., D]`` (int64)."""
        return self.factors.sample(generator)

    def mode(self) -> Tensor:
        """Return the most probable action, ``[..., D]`` (int64)."""
        return self.factors.mode()

    def log_prob(self, actions: Tensor) -> Tensor:
        """Return log π(a|s) = Σ_d log π_d(a_d|s) for ``actions`` ``[..., D]`` (int64),
        shape ``[...]``.
        """
        return self.factors.log_prob(actions).sum(dim=-1)

    def entropy(self) -> Tensor:
        """Return the entropy, the sum of those of the choices, in nats, shape
        ``[...]``.
        """
        return self.factors.entropy().sum(dim=-1)

    def kl(self, other: Distribution) -> Tensor:
        """Return KL(self ‖ other), the sum of those of the choices, in nats, shape
        ``[...]``.
        """
        if not isinstance(other, MultiCategorical):
            kind = type(other).__name__
            raise ValueError(f"other must be a MultiCategorical, got {kind}")
        return self.factors.kl(other.factors).sum(dim=-1)

    def detach(self) -> MultiCategorical:
        """Return a frozen copy: no gradient, and no change when the parameters are
        changed in place.
        """
        return MultiCategorical(self.factors.detach())


@dataclass(frozen=True, slots=True)
class DiagonalGaussian:
    """Independent normal distributions, one per action dimension ``D``.

    Parameters
    ----------
    mean, log_std : Tensor
        Shape ``[..., D]`` (``log_std`` may be broadcast). Units are those of the
        action.

    Examples
    --------
    >>> import torch
    >>> d = DiagonalGaussian(torch.zeros(2), torch.zeros(2))
    >>> round(d.log_prob(torch.zeros(2)).item(), 4)  # −log 2π
    -1.8379
    """

    mean: Tensor
    log_std: Tensor

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Draw actions ``[..., D]``: mean + σ·ε with ε standard normal."""
        noise = torch.empty_like(self.mean).normal_(generator=generator)
        return self.mean + noise * self.log_std.exp()

    def mode(self) -> Tensor:
        """Return the mean, ``[..., D]``."""
        return self.mean

    def log_prob(self, actions: Tensor) -> Tensor:
        """Return log π(a|s), summed over action dimensions, for ``actions`` ``[...,
        D]``; shape ``[...]``.
        """
        z = (actions - self.mean) * torch.exp(-self.log_std)
        per_dimension = 0.5 * z.square() + self.log_std + 0.5 * math.log(2 * math.pi)
        return -per_dimension.sum(dim=-1)

    def entropy(self) -> Tensor:
        """Return Σ_d (log σ_d + ½ log 2πe) in nats, shape ``[...]``. It can be
        negative.
        """
        per_dimension = self.log_std + 0.5 * math.log(2 * math.pi * math.e)
        return per_dimension.expand_as(self.mean).sum(dim=-1)

    def kl(self, other: Distribution) -> Tensor:
        """Return KL(self ‖ other) in nats, shape ``[...]``.

        Per dimension: log(σ'/σ) + (σ² + (μ − μ')²) / 2σ'² − ½.
        """
        if not isinstance(other, DiagonalGaussian):
            kind = type(other).__name__
            raise ValueError(f"other must be a DiagonalGaussian, got {kind}")
        variance = torch.exp(2 * self.log_std)
        precision = torch.exp(-2 * other.log_std)
        distance = (self.mean - other.mean).square()
        log_ratio = other.log_std - self.log_std
        return (log_ratio + 0.5 * (variance + distance) * precision - 0.5).sum(dim=-1)

    def detach(self) -> DiagonalGaussian:
        """Return a frozen copy: no gradient, and no change when the parameters are
        changed in place.
        """
        mean, log_std = self.mean.detach().clone(), self.log_std.detach().clone()
        return DiagonalGaussian(mean, log_std)
