"""Policies and value functions as multilayer perceptrons over Gymnasium spaces."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from numpy.typing import NDArray
from torch import Tensor, nn

from policyopt.distributions import Categorical, DiagonalGaussian, Distribution

__all__ = [
    "CategoricalPolicy", "Critic", "GaussianPolicy", "ObservationEncoder", "Policy",
    "make_policy",
]  # fmt: skip

_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}


class ObservationEncoder(nn.Module):
    """Turn raw observations into a feature vector per item.

    ``Discrete(n)`` becomes a one-hot vector ``[..., n]``. ``Box`` is flattened to
    ``[..., D]`` in float32 and, on request, normalised with a running mean and standard
    deviation (then clipped to ±10) that :meth:`update` maintains. The statistics are
    buffers: they are saved with the policy, and they move only between updates, so the
    policy that collected a batch and the one that starts learning from it are the same
    function.

    Parameters
    ----------
    space : gymnasium.Space
        ``Discrete`` or ``Box``.
    normalize : bool
        Ignored for ``Discrete``.
    """

    def __init__(self, space: gym.Space[Any], *, normalize: bool = False) -> None:
        super().__init__()
        self.shape: tuple[int, ...] = tuple(space.shape or ())
        if isinstance(space, Discrete):
            self.kind: Literal["one-hot", "flat"] = "one-hot"
            self.features, self.start = int(space.n), int(space.start)
        elif isinstance(space, Box):
            self.kind = "flat"
            self.features, self.start = math.prod(self.shape), 0
        else:
            raise ValueError(
                f"observation space must be Discrete or Box, got {space}; wrap the "
                "environment, for instance with gymnasium.wrappers.FlattenObservation"
            )
        self.normalize = normalize and self.kind == "flat"
        if self.normalize:
            self.mean = nn.Buffer(torch.zeros(self.features))
            self.variance = nn.Buffer(torch.ones(self.features))
            self.count = nn.Buffer(torch.zeros((), dtype=torch.float64))

    def fits(self, space: gym.Space[Any]) -> bool:
        """Whether observations of this space can be encoded."""
        if isinstance(space, Discrete):
            wanted = ("one-hot", int(space.n), int(space.start))
            return (self.kind, self.features, self.start) == wanted
        return self.kind == "flat" and self.shape == space.shape

    def forward(self, observations: Tensor) -> Tensor:
        """Map raw observations ``[..., *space.shape]`` to features ``[..., features]``
        (float32).
        """
        if self.kind == "one-hot":
            index = observations.long() - self.start
            return nn.functional.one_hot(index, self.features).float()
        x = observations.float()
        if len(self.shape) != 1:
            x = x.reshape(*x.shape[: x.ndim - len(self.shape)], self.features)
        if not self.normalize:
            return x
        return ((x - self.mean) * torch.rsqrt(self.variance + 1e-8)).clamp(-10.0, 10.0)

    @torch.no_grad()
    def update(self, observations: Tensor) -> None:
        """Take the raw observations ``[B, *space.shape]`` into the running statistics
        (Chan et al. 1979).
        """
        if not self.normalize or observations.numel() == 0:
            return
        x = observations.reshape(-1, self.features).double()
        count, mean, variance = len(x), x.mean(0), x.var(0, correction=0)
        total = self.count + count
        delta = mean - self.mean
        spread = self.variance * self.count + variance * count
        spread += delta.square() * self.count * count / total
        self.mean.add_(delta * (count / total))
        self.variance.copy_(spread / total)
        self.count.copy_(total)


def _mlp(
    sizes: Sequence[int],
    activation: str,
    output_gain: float,
    generator: torch.Generator,
    orthogonal: bool,
) -> nn.Sequential:
    known = sorted(_ACTIVATIONS)
    if activation not in known:
        raise ValueError(f"activation must be one of {known}, got {activation!r}")
    layers: list[nn.Module] = []
    last = len(sizes) - 2
    for i, (fan_in, fan_out) in enumerate(pairwise(sizes)):
        # skip_init: the default initialisation would draw from the global generator.
        linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out)
        if orthogonal:
            gain = output_gain if i == last else nn.init.calculate_gain(activation)  # type: ignore[arg-type]
            nn.init.orthogonal_(linear.weight, gain=gain, generator=generator)
            nn.init.zeros_(linear.bias)
        else:
            bound = 1 / math.sqrt(fan_in)
            nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5), generator=generator)
            nn.init.uniform_(linear.bias, -bound, bound, generator=generator)
        layers += [linear] if i == last else [linear, _ACTIVATIONS[activation]()]
    return nn.Sequential(*layers)


class Policy(nn.Module):
    """A stochastic policy π_θ(a|s): call it on observations to get a
    :class:`~policyopt.distributions.Distribution`.

    Subclasses define :meth:`forward` and :meth:`to_env`. Your own policy needs no more
    than that, plus an ``encoder`` that handles raw observations; for :meth:`predict`
    the encoder has the ``shape`` of one.
    """

    encoder: ObservationEncoder

    def forward(self, observations: Tensor) -> Distribution:
        """Return π_θ(·|s) for raw observations ``[..., *observation shape]``."""
        raise NotImplementedError

    def to_env(self, actions: Tensor) -> NDArray[Any]:
        """Translate actions ``[N, ...]`` of the distribution to what the environment's
        ``step`` takes.
        """
        raise NotImplementedError

    @torch.inference_mode()
    def act(
        self,
        observations: Tensor,
        generator: torch.Generator | None = None,
        *,
        deterministic: bool = False,
    ) -> Tensor:
        """Sample actions for raw observations ``[N, ...]``, or take the mode when
        ``deterministic``.
        """
        distribution: Distribution = self(observations)
        return distribution.mode() if deterministic else distribution.sample(generator)

    def predict(
        self,
        observation: Any,
        *,
        deterministic: bool = True,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Choose an action for one observation, or one for each of a batch, as NumPy.

        Parameters
        ----------
        observation : array_like
            As the environment returns it, ``[*observation shape]``, or ``N`` of them.
        deterministic : bool
            Take the most probable action (the mean, for a Gaussian); False samples.
        generator : torch.Generator, optional
            Source of the samples, on the policy's device; by default the global one.

        Returns
        -------
        action
            What the environment's ``step`` takes, or an array of ``N`` of them.

        Examples
        --------
        >>> import gymnasium as gym
        >>> import torch
        >>> from policyopt.control import make_policy
        >>> env = gym.make("CartPole-v1")
        >>> spaces = env.observation_space, env.action_space
        >>> policy = make_policy(*spaces, generator=torch.Generator().manual_seed(0))
        >>> observation, _ = env.reset(seed=0)
        >>> action = policy.predict(observation)
        >>> observation, reward, terminated, truncated, _ = env.step(action)
        >>> action.dtype, policy.predict([observation, observation]).shape
        (dtype('int64'), (2,))
        """
        array, shape = np.array(observation), self.encoder.shape
        got = array.shape
        if got not in (shape, got[:1] + shape):
            raise ValueError(
                f"observation must have the shape {shape}, or [N, *{shape}], got {got}"
            )
        one = array.ndim == len(shape)
        device = next((p.device for p in self.parameters()), None)
        batch = torch.from_numpy(array[None] if one else array).to(device)
        actions = self.to_env(self.act(batch, generator, deterministic=deterministic))
        if not one:
            return actions
        # One action of a Discrete is a number, one of a Box an array, if need be of ().
        return actions[0] if actions.dtype.kind == "i" else actions[0, ...]


class CategoricalPolicy(Policy):
    """Softmax policy over ``Discrete`` actions: an MLP gives the logits ``[...,
    n]``.
    """

    def __init__(
        self, encoder: ObservationEncoder, space: Discrete, network: nn.Sequential
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.network = network
        self.start = int(space.start)

    def forward(self, observations: Tensor) -> Categorical:
        """Return π_θ(·|s) over the ``n`` actions."""
        return Categorical.from_logits(self.network(self.encoder(observations)))

    def to_env(self, actions: Tensor) -> NDArray[np.int64]:
        """Return the actions as integers of the space (which may not start at 0)."""
        array: NDArray[np.int64] = actions.cpu().numpy()
        return array + self.start if self.start else array


class GaussianPolicy(Policy):
    """Diagonal Gaussian policy over ``Box`` actions ``[D]``: an MLP gives the mean, log
    σ is a free parameter.

    The distribution lives on a standard scale. :meth:`to_env` maps −1…1 to the bounds
    of each bounded dimension and clips there; unbounded dimensions pass through. The
    log-probability is that of the unclipped action.
    """

    def __init__(
        self,
        encoder: ObservationEncoder,
        space: Box,
        network: nn.Sequential,
        log_std: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.network = network
        self.action_shape, self.action_dtype = space.shape, space.dtype
        bounds = (space.low, space.high)
        low, high = (torch.as_tensor(b.astype(np.float32)).flatten() for b in bounds)
        bounded = torch.isfinite(low) & torch.isfinite(high)
        self.log_std = nn.Parameter(torch.full((low.numel(),), float(log_std)))
        self.low = nn.Buffer(low, persistent=False)
        self.high = nn.Buffer(high, persistent=False)
        centre = torch.where(bounded, (high + low) / 2, 0.0)
        self.centre = nn.Buffer(centre, persistent=False)
        half_range = torch.where(bounded, (high - low) / 2, 1.0)
        self.half_range = nn.Buffer(half_range, persistent=False)

    def forward(self, observations: Tensor) -> DiagonalGaussian:
        """Return π_θ(·|s) over ``[D]`` numbers."""
        mean = self.network(self.encoder(observations))
        return DiagonalGaussian(mean, self.log_std)

    def to_env(self, actions: Tensor) -> NDArray[Any]:
        """Return the actions in the environment's units, clipped to its bounds, ``[N,
        *space.shape]``.
        """
        scaled = self.centre + self.half_range * actions
        scaled = torch.clamp(scaled, self.low, self.high)
        array: NDArray[Any] = scaled.cpu().numpy().astype(self.action_dtype, copy=False)
        return array.reshape(-1, *self.action_shape)


class Critic(nn.Module):
    """State-value function V_φ(s): an MLP of its own that shares only the observation
    encoder with the policy.
    """

    def __init__(
        self,
        encoder: ObservationEncoder,
        *,
        hidden: Sequence[int] = (64, 64),
        activation: str = "tanh",
        orthogonal: bool = True,
        generator: torch.Generator,
    ) -> None:
        super().__init__()
        self.encoder = encoder
        sizes = [encoder.features, *hidden, 1]
        self.network = _mlp(sizes, activation, 1.0, generator, orthogonal)

    def forward(self, observations: Tensor) -> Tensor:
        """Return V(s) for raw observations ``[..., *observation shape]``, shape
        ``[...]``.
        """
        values: Tensor = self.network(self.encoder(observations)).squeeze(-1)
        return values


def make_policy(
    observation_space: gym.Space[Any],
    action_space: gym.Space[Any],
    *,
    hidden: Sequence[int] = (64, 64),
    activation: str = "tanh",
    normalize_observations: bool = False,
    orthogonal: bool = True,
    log_std: float = 0.0,
    generator: torch.Generator,
) -> CategoricalPolicy | GaussianPolicy:
    """Build the policy that fits a pair of spaces.

    Parameters
    ----------
    observation_space, action_space : gymnasium.Space
        Of a single environment; each ``Discrete`` or ``Box``.
    hidden : sequence of int
        Width of each hidden layer.
    activation : {"tanh", "relu"}
    normalize_observations : bool
        See :class:`ObservationEncoder`.
    orthogonal : bool
        Orthogonal weights with gain 0.01 at the output, so that the first policy is
        nearly uniform (or nearly centred) whatever the observation; ``False`` is
        PyTorch's default initialisation.
    log_std : float
        Initial log σ of a Gaussian policy, on the scale where the action bounds are ±1.
    generator : torch.Generator
        Source of all randomness of the initialisation (CPU).

    Raises
    ------
    ValueError
        For a space that is neither ``Discrete`` nor ``Box``.
    """
    encoder = ObservationEncoder(observation_space, normalize=normalize_observations)

    def network(outputs: int) -> nn.Sequential:
        sizes = [encoder.features, *hidden, outputs]
        return _mlp(sizes, activation, 0.01, generator, orthogonal)

    if isinstance(action_space, Discrete):
        return CategoricalPolicy(encoder, action_space, network(int(action_space.n)))
    floating = np.issubdtype(action_space.dtype, np.floating)
    if isinstance(action_space, Box) and floating:
        outputs = math.prod(action_space.shape)
        return GaussianPolicy(encoder, action_space, network(outputs), log_std)
    raise ValueError(
        f"action space must be Discrete or a floating-point Box, got {action_space}; "
        "wrap the environment or give a policy of your own"
    )
