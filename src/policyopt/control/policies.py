"""Policies and value functions as multilayer perceptrons over Gymnasium spaces."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, ClassVar, TypeAlias

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete
from numpy.typing import NDArray
from torch import Tensor, nn

from policyopt._checks import require
from policyopt.distributions import (
    Categorical,
    DiagonalGaussian,
    Distribution,
    MultiCategorical,
)

__all__ = [
    "CategoricalPolicy", "Critic", "DictEncoder", "GaussianPolicy",
    "ImageEncoder", "MaskedObservations", "MultiCategoricalPolicy",
    "ObservationEncoder", "Policy", "make_policy",
]  # fmt: skip

_ACTIVATIONS: dict[str, type[nn.Module]] = {"tanh": nn.Tanh, "relu": nn.ReLU}
LARGEST = torch.finfo(torch.float32).max


def has_float64(device: torch.device) -> bool:
    """Whether the device computes in float64: Apple's GPUs do not."""
    return device.type != "mps"


def double(x: Tensor) -> Tensor:
    """Return ``x`` in float64: on the CPU, if its device does not have it."""
    return (x if has_float64(x.device) else x.cpu()).double()


def to_tensor(given: Any) -> Tensor:
    """Copy what an environment returned to a tensor of the same type, where it is.

    A copy: some environments return the same array or tensor in every step.
    """
    if isinstance(given, Tensor):
        return given.detach().clone()
    return torch.from_numpy(np.array(given))


def move(x: Tensor, device: torch.device) -> Tensor:
    """Move observations to a device, as they are; only float64 becomes float32 where
    the device does not have it.
    """
    narrow = x.dtype == torch.float64 and not has_float64(device)
    return (x.float() if narrow else x).to(device)


def first_action(actions: Any) -> Any:
    """Return the first of a batch of actions, as the environment's ``step`` takes it;
    actions of a ``Dict`` or ``Tuple`` space come as one batch for each part.
    """
    if isinstance(actions, dict):
        return {name: first_action(part) for name, part in actions.items()}
    if isinstance(actions, tuple):
        return tuple(map(first_action, actions))
    # One action of a Discrete is a number, one of a Box an array, if need be of ().
    return actions[0] if actions.dtype.kind in "iu" else actions[0, ...]


@dataclass(frozen=True, eq=False)
class MaskedObservations:
    """Raw observations, and which actions are allowed in each. It is what a policy that
    takes masks is called on where the environment gives them, and is cut by rows as a
    tensor is.
    """

    values: Tensor
    """The observations, ``[..., *observation shape]``."""
    mask: Tensor
    """True where an action is allowed, bool ``[..., K]``, in the order of the space;
    for several choices at once all their values one after another, two for each bit of
    a ``MultiBinary``."""

    def __getitem__(self, rows: Any) -> MaskedObservations:
        return MaskedObservations(self.values[rows], self.mask[rows])

    def flatten(self, first: int, last: int) -> MaskedObservations:
        """Make one of the leading dimensions ``first`` to ``last``."""
        x, mask = self.values, self.mask
        return MaskedObservations(x.flatten(first, last), mask.flatten(first, last))


Observations: TypeAlias = Tensor | MaskedObservations


def split_mask(observations: Observations) -> tuple[Tensor, Tensor | None]:
    """Return the observations as such, and the mask if there is one."""
    if isinstance(observations, MaskedObservations):
        return observations.values, observations.mask
    return observations, None


def choices(space: gym.Space[Any]) -> NDArray[np.int64]:
    """Return from how many values each component of an action is chosen, ``[D]``."""
    if isinstance(space, Discrete):
        return np.array([space.n], np.int64)
    if isinstance(space, MultiDiscrete):
        return space.nvec.reshape(-1).astype(np.int64)
    if isinstance(space, MultiBinary):
        return np.full(math.prod(space.shape), 2)
    kinds = "Discrete, MultiDiscrete or MultiBinary"
    raise ValueError(f"action masks need actions that are {kinds}, got {space}")


def read_mask(
    mask: Any,
    space: gym.Space[Any],
    rows: int,
    *,
    name: str = "action_mask",
    where: str = "in row",
    ignored: NDArray[np.bool_] | None = None,
) -> Tensor:
    """Return a copy of a mask as bool ``[rows, K]``, all True in those to be ignored.

    Raises
    ------
    ValueError
        If it is not of zeros and ones ``[rows, K]``, or allows nothing in a row.
    """
    array, sizes = np.array(mask), choices(space)
    rule = f"{name} must have the shape [{rows}, {sizes.sum()}], 0 or 1 for each value"
    remedy = "give it as one array, the masks of several choices one after another"
    require(array.shape == (rows, sizes.sum()), rule, array.shape, remedy)
    allowed = array.astype(bool)
    require((allowed == array).all(), f"{name} must hold zeros and ones", array)
    if ignored is not None:
        allowed[ignored] = True
    possible = np.logical_or.reduceat(allowed, np.cumsum(sizes) - sizes, axis=1)
    for row, choice in np.argwhere(~possible)[:1].tolist():
        which = f" in choice {choice}" if len(sizes) > 1 else ""
        raise ValueError(
            f"{name} forbids every action{which} {where} {row}; allow at least one, or "
            "end the episode where there is none"
        )
    return torch.from_numpy(allowed)


class ObservationEncoder(nn.Module):
    """Turn raw observations into a feature vector per item.

    ``Discrete(n)`` becomes a one-hot vector ``[..., n]``. ``Box`` is flattened to
    ``[..., D]`` in float32 and, on request, normalised with a running mean and standard
    deviation (then clipped to ±10) that :meth:`update` maintains. The statistics are
    buffers: they are saved with the policy, and they move only between updates, so the
    policy that collected a batch and the one that starts learning from it are the same
    function.

    Where the space has numbers that float32 would round (float64, integers beyond 2²⁴),
    the mean is subtracted in float64: time stamps of 1.7e9 seconds keep
    their differences. Without normalisation, or on Apple's GPUs, which have no float64,
    rollouts refuse observations whose differences float32 would lose.

    Parameters
    ----------
    space : gymnasium.Space
        ``Discrete`` or ``Box``.
    normalize : bool
        Ignored for ``Discrete``.
    """

    def __init__(self, space: gym.Space[Any], *, normalize: bool = False) -> None:
        super().__init__()
        self.shape: Any = tuple(space.shape or ())
        self.one_hot = isinstance(space, Discrete)
        if isinstance(space, Discrete):
            self.features, self.start = int(space.n), int(space.start)
        elif isinstance(space, Box):
            self.features, self.start = math.prod(self.shape), 0
        else:
            raise ValueError(
                f"observation space must be Discrete or Box, got {space}; wrap the "
                "environment, for instance with gymnasium.wrappers.FlattenObservation, "
                "after FilterObservation where a part of it is not made of numbers; or "
                "give a DictEncoder to make_policy"
            )
        exact = np.can_cast(space.dtype, np.float32)
        if np.issubdtype(space.dtype, np.integer) and isinstance(space, Box):
            largest = np.abs([space.low, space.high], dtype=np.float64).max(initial=0)
            exact = largest <= 2**24
        self.wide = not (self.one_hot or exact)
        self.normalize = normalize and not self.one_hot
        if self.normalize:
            self.mean = nn.Buffer(torch.zeros(self.features))
            self.variance = nn.Buffer(torch.ones(self.features))
            self.count = nn.Buffer(torch.zeros((), dtype=torch.long))
            # What float32 cuts off the mean of a wide space; 0 otherwise. A buffer of
            # float64 could not move to Apple's GPUs.
            self.mean_rest = nn.Buffer(torch.zeros(self.features), persistent=self.wide)

    def fits(self, space: gym.Space[Any]) -> bool:
        """Whether observations of this space can be encoded."""
        if isinstance(space, Discrete):
            ours = self.one_hot, self.features, self.start
            return ours == (True, space.n, space.start)
        return not self.one_hot and self.shape == space.shape

    def forward(self, observations: Tensor) -> Tensor:
        """Map raw observations ``[..., *space.shape]`` to features ``[..., features]``
        (float32).
        """
        if self.one_hot:
            index = observations.long() - self.start
            return nn.functional.one_hot(index, self.features).float()
        x = observations
        if len(self.shape) != 1:
            x = x.reshape(*x.shape[: x.ndim - len(self.shape)], self.features)
        if not self.normalize:
            return x.float()
        x = x.double() if self.wide and has_float64(x.device) else x.float()
        x = (x - self.mean).float() - self.mean_rest
        return (x * torch.rsqrt(self.variance + 1e-8)).clamp(-10.0, 10.0)

    @torch.no_grad()
    def update(self, observations: Tensor) -> None:
        """Take the raw observations ``[B, *space.shape]`` into the running statistics
        (Chan et al. 1979).
        """
        if not self.normalize or observations.numel() == 0:
            return
        x = double(observations.reshape(-1, self.features))
        mean = double(self.mean) + double(self.mean_rest)
        count, seen = len(x), int(self.count)
        total = seen + count
        delta = x.mean(0) - mean
        spread = double(self.variance * seen) + x.var(0, correction=0) * count
        spread += delta.square() * seen * count / total
        mean += delta * (count / total)
        self.mean.copy_(mean.float())
        self.mean_rest.copy_((mean - mean.float()).float() * self.wide)
        # A square may be beyond float32; infinity would make NaN of the features.
        self.variance.copy_((spread / total).clamp(max=LARGEST).float())
        self.count.fill_(total)


class ImageEncoder(ObservationEncoder):
    """Turn images of bytes into a feature vector per item.

    Pixels are scaled to [0, 1]. Three convolutions of 3 × 3 with 16, 32 and 32 channels
    each halve width and height, and a linear layer makes the features; a ReLU follows
    each. So images of any size will do. It learns with the policy; a critic has a copy
    of its own.

    Parameters
    ----------
    space : gymnasium.spaces.Box
        uint8, ``[height, width, channels]`` or ``[channels, height, width]``: where the
        first number is smaller than the last, it counts the channels.
    features : int
        Length of the feature vector.
    generator : torch.Generator
        Source of the (orthogonal) weights (CPU).

    Examples
    --------
    >>> import gymnasium as gym
    >>> import torch
    >>> space = gym.spaces.Box(0, 255, (84, 84, 3), "uint8")
    >>> g = torch.Generator().manual_seed(0)
    >>> encoder, actions = ImageEncoder(space, generator=g), gym.spaces.Discrete(4)
    >>> policy = make_policy(space, actions, encoder=encoder, generator=g)
    >>> policy(torch.zeros(5, 84, 84, 3, dtype=torch.uint8)).entropy().shape
    torch.Size([5])
    """

    def __init__(
        self, space: gym.Space[Any], *, features: int = 256, generator: torch.Generator
    ) -> None:
        image = space.dtype == np.uint8 and len(space.shape or ()) == 3
        require(image, "images must be a Box of uint8 with three dimensions", space)
        super().__init__(space)
        self.features = features
        first, middle, last = self.shape
        self.channels_last = last <= first
        height, width = (first, middle) if self.channels_last else (middle, last)
        layers: list[nn.Module] = []
        for sizes in pairwise([last if self.channels_last else first, 16, 32, 32]):
            # skip_init: see _mlp.
            conv = nn.utils.skip_init(nn.Conv2d, *sizes, 3, stride=2, padding=1)
            _init_orthogonal(conv, math.sqrt(2), generator)
            layers += [conv, nn.ReLU()]
        # Each convolution halves them, rounding up.
        pixels = math.ceil(height / 8) * math.ceil(width / 8)
        linear = nn.utils.skip_init(nn.Linear, 32 * pixels, features)
        _init_orthogonal(linear, math.sqrt(2), generator)
        self.network = nn.Sequential(*layers, nn.Flatten(), linear, nn.ReLU())

    def forward(self, observations: Tensor) -> Tensor:
        """Map images ``[..., *space.shape]`` to features ``[..., features]``
        (float32).
        """
        images = observations.reshape(-1, *self.shape)
        images = images.movedim(-1, 1) if self.channels_last else images
        found: Tensor = self.network(images.float() / 255)
        return found.reshape(*observations.shape[:-3], self.features)


class DictEncoder(ObservationEncoder):
    """Encode each part of a ``Dict`` space by an encoder of its own, and join the
    features.

    It reads what ``gymnasium.wrappers.FlattenObservation`` makes of such observations:
    one vector, the parts in the order of the space, each flat. Every part gets its
    shape back.

    Parameters
    ----------
    space : gymnasium.spaces.Dict
        As it is before the wrapper.
    parts : mapping
        Encoders by the names of their parts, an :class:`ImageEncoder` for instance, or
        another ``DictEncoder``. A part without one goes into the features as the
        wrapper writes it.

    Examples
    --------
    >>> import gymnasium as gym
    >>> import torch
    >>> image = gym.spaces.Box(0, 255, (32, 32, 3), "uint8")
    >>> space = gym.spaces.Dict(image=image, speed=gym.spaces.Box(-1, 1, (2,)))
    >>> g = torch.Generator().manual_seed(0)
    >>> eyes = ImageEncoder(image, features=64, generator=g)
    >>> encoder = DictEncoder(space, {"image": eyes})
    >>> encoder(torch.zeros(5, 32 * 32 * 3 + 2)).shape
    torch.Size([5, 66])
    """

    def __init__(self, space: Any, parts: Mapping[str, ObservationEncoder]) -> None:
        require(isinstance(space, Dict), "space must be a Dict", space)
        super().__init__(gym.spaces.flatten_space(space))
        flat: Any = {n: gym.spaces.flatten_space(part) for n, part in space.items()}
        rule = f"parts must be of {[*flat]}"
        require(parts.keys() <= flat.keys(), rule, [*parts])
        encoders = {n: parts.get(n) or ObservationEncoder(flat[n]) for n in flat}
        self.sizes = [math.prod(part.shape) for part in flat.values()]
        for name, part in encoders.items():
            fits = tuple(part.shape) in (space[name].shape, flat[name].shape)
            rule = f"the encoder of {name!r} must be for {space[name]}"
            require(fits, rule, tuple(part.shape), "make it for this space")
        # A ModuleDict would not take every name.
        self.parts, self.encoders = encoders, nn.ModuleList(encoders.values())
        self.features = sum(part.features for part in encoders.values())
        wide = [x for x in encoders.values() if getattr(x, "wide", False)]
        self.normalize = all(part.normalize for part in wide)

    def _pieces(self, observations: Tensor) -> Iterator[tuple[Any, Tensor]]:
        pieces = observations.split(self.sizes, -1)
        for part, piece in zip(self.parts.values(), pieces, strict=True):
            yield part, piece.reshape(*piece.shape[:-1], *part.shape)

    def forward(self, observations: Tensor) -> Tensor:
        """Map flat observations ``[..., D]`` to features ``[..., features]``
        (float32).
        """
        found = [part(piece) for part, piece in self._pieces(observations)]
        return torch.cat(found, -1)

    def update(self, observations: Tensor) -> None:
        """Take flat observations ``[B, D]`` into the running statistics of each
        part.
        """
        for part, piece in self._pieces(observations):
            part.update(piece)


def _cast(x: Tensor, space: gym.Space[Any]) -> Tensor:
    return x.to(torch.from_numpy(np.empty(0, space.dtype)).dtype)


def _init_orthogonal(layer: Any, gain: float, generator: torch.Generator) -> None:
    nn.init.orthogonal_(layer.weight, gain, generator=generator)
    nn.init.zeros_(layer.bias)


def _mlp(
    sizes: Sequence[int],
    activation: str,
    output_gain: float,
    generator: torch.Generator,
    orthogonal: bool,
) -> nn.Sequential:
    known = sorted(_ACTIVATIONS)
    require(activation in known, f"activation must be one of {known}", activation)
    hidden_gain = nn.init.calculate_gain(activation)  # type: ignore[arg-type]
    gains = [hidden_gain] * (len(sizes) - 2) + [output_gain]
    layers: list[nn.Module] = []
    for (fan_in, fan_out), gain in zip(pairwise(sizes), gains, strict=True):
        # skip_init: the default initialisation would draw from the global generator.
        linear = nn.utils.skip_init(nn.Linear, fan_in, fan_out)
        if orthogonal:
            _init_orthogonal(linear, gain, generator)
        else:
            bound = 1 / math.sqrt(fan_in)
            nn.init.kaiming_uniform_(linear.weight, a=math.sqrt(5), generator=generator)
            nn.init.uniform_(linear.bias, -bound, bound, generator=generator)
        layers += [linear, _ACTIVATIONS[activation]()]
    return nn.Sequential(*layers[:-1])


class Policy(nn.Module):
    """A stochastic policy π_θ(a|s): call it on observations to get a
    :class:`~policyopt.distributions.Distribution`.

    Subclasses define :meth:`forward`, and :meth:`to_space` or, for environments of
    NumPy alone, :meth:`to_env`. Your own policy needs no more than that, plus an
    ``encoder`` that handles raw observations; for :meth:`predict` the encoder has the
    ``shape`` of one.

    Where ``takes_masks`` is True and the environment says which actions are allowed,
    the observations that it is called on are :class:`MaskedObservations`. Otherwise
    what the environment says is ignored. Masks in :meth:`predict` need an
    ``action_space``.
    """

    encoder: ObservationEncoder
    action_space: gym.Space[Any]
    takes_masks: ClassVar[bool] = False

    def forward(self, observations: Tensor) -> Distribution:
        """Return π_θ(·|s) for raw observations ``[..., *observation shape]``."""
        raise NotImplementedError

    def to_space(self, actions: Tensor) -> Tensor:
        """Translate actions ``[N, ...]`` of the distribution to those of the space,
        ``[N, *space.shape]`` in its type: what the ``step`` of an environment of
        tensors takes.
        """
        raise NotImplementedError(
            f"{type(self).__name__} must define to_space for environments of tensors"
        )

    def to_env(self, actions: Tensor) -> Any:
        """Translate actions ``[N, ...]`` of the distribution to what the environment's
        ``step`` takes: an array ``[N, ...]``, or for a ``Dict`` or ``Tuple`` space a
        dictionary or tuple of them.
        """
        return self.to_space(actions).cpu().numpy()

    @torch.inference_mode()
    def act(
        self,
        observations: Observations,
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
        action_mask: Any = None,
        deterministic: bool = True,
        generator: torch.Generator | None = None,
    ) -> Any:
        """Choose an action for one observation, or one for each of a batch, as NumPy.

        Parameters
        ----------
        observation : array_like
            As the environment returns it, ``[*observation shape]``, or ``N`` of them.
        action_mask : array_like, optional
            1 for each allowed action and 0 for the others, ``[K]``, or ``N`` of them:
            see :class:`MaskedObservations`. By default all are allowed.
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
        one = array.shape == shape
        rule = f"observation must have the shape {shape}, or [N, *{shape}]"
        require(one or array.shape[1:] == shape, rule, array.shape)
        device = next((p.device for p in self.parameters()), torch.device("cpu"))
        values = move(to_tensor(array[None] if one else array), device)
        batch: Observations = values
        if action_mask is not None:
            kind = type(self).__name__
            require(self.takes_masks, "action_mask needs a policy that takes it", kind)
            mask = np.array(action_mask)[None] if one else action_mask
            allowed = read_mask(mask, self.action_space, len(values))
            batch = MaskedObservations(values, allowed.to(device))
        actions = self.to_env(self.act(batch, generator, deterministic=deterministic))
        return first_action(actions) if one else actions


class CategoricalPolicy(Policy):
    """Softmax policy over ``Discrete`` actions: an MLP gives the logits ``[...,
    n]``.
    """

    action_space: Discrete
    takes_masks = True

    def __init__(
        self, encoder: ObservationEncoder, space: Discrete, network: nn.Sequential
    ) -> None:
        super().__init__()
        self.encoder, self.network, self.action_space = encoder, network, space

    def forward(self, observations: Observations) -> Categorical:
        """Return π_θ(·|s) over the ``n`` actions."""
        values, mask = split_mask(observations)
        return Categorical.from_logits(self.network(self.encoder(values)), mask)

    def to_space(self, actions: Tensor) -> Tensor:
        """Return the actions as integers of the space (which may not start at 0)."""
        return _cast(actions + int(self.action_space.start), self.action_space)


class MultiCategoricalPolicy(Policy):
    """Several softmax policies at once, for ``MultiDiscrete`` and ``MultiBinary``
    actions: an MLP gives the logits of all ``D`` choices, one after another, two for
    each bit.
    """

    action_space: MultiDiscrete | MultiBinary
    takes_masks = True

    def __init__(
        self,
        encoder: ObservationEncoder,
        space: MultiDiscrete | MultiBinary,
        network: nn.Sequential,
    ) -> None:
        super().__init__()
        self.encoder, self.network, self.action_space = encoder, network, space
        sizes = choices(space)[:, None]
        value = np.arange(sizes.max())
        place = np.where(value < sizes, np.cumsum(sizes)[:, None] - sizes + value, 0)
        # [D, K]: where the logit of a value is, and whether the choice has the value.
        self.place = nn.Buffer(torch.from_numpy(place), persistent=False)
        self.exists = nn.Buffer(torch.from_numpy(value < sizes), persistent=False)
        start = np.array(getattr(space, "start", 0), np.int64)
        self.start = nn.Buffer(torch.from_numpy(start), persistent=False)

    def forward(self, observations: Observations) -> MultiCategorical:
        """Return π_θ(·|s) over the ``D`` choices."""
        values, mask = split_mask(observations)
        logits = self.network(self.encoder(values))[..., self.place]
        allowed = self.exists if mask is None else self.exists & mask[..., self.place]
        return MultiCategorical(Categorical.from_logits(logits, allowed))

    def to_space(self, actions: Tensor) -> Tensor:
        """Return the actions as integers of the space, ``[N, *space.shape]``."""
        found = actions.reshape(len(actions), *self.action_space.shape) + self.start
        return _cast(found, self.action_space)


class GaussianPolicy(Policy):
    """Diagonal Gaussian policy over ``Box`` actions ``[D]``: an MLP gives the mean, log
    σ is a free parameter.

    The distribution lives on a standard scale. :meth:`to_space` maps −1…1 to the bounds
    of each bounded dimension and clips there; unbounded dimensions pass through, and
    with one bound 0 stands for the number nearest to 0 that the bound allows. The
    log-probability is that of the unclipped action.
    """

    action_space: Box

    def __init__(
        self,
        encoder: ObservationEncoder,
        space: Box,
        network: nn.Sequential,
        log_std: float = 0.0,
    ) -> None:
        super().__init__()
        self.encoder, self.network, self.action_space = encoder, network, space
        bounded = space.bounded_below & space.bounded_above
        # In place of infinity the largest number of the space's type.
        low, high = (np.float64(np.nan_to_num(b)) for b in (space.low, space.high))
        centre = np.where(bounded, low / 2 + high / 2, np.clip(0, low, high))
        half_range = np.where(bounded, high / 2 - low / 2, 1.0)
        # No buffer: float64 holds every bound, and Apple's GPUs do not have it.
        self.scale = torch.from_numpy(np.stack([centre, half_range, low, high]))
        self.log_std = nn.Parameter(torch.full((low.size,), float(log_std)))

    def forward(self, observations: Tensor) -> DiagonalGaussian:
        """Return π_θ(·|s) over ``[D]`` numbers."""
        return DiagonalGaussian(self.network(self.encoder(observations)), self.log_std)

    def to_space(self, actions: Tensor) -> Tensor:
        """Return the actions in the environment's units, clipped to its bounds, ``[N,
        *space.shape]``.
        """
        standard = double(actions).reshape(len(actions), *self.action_space.shape)
        self.scale = self.scale.to(standard)
        centre, half_range, low, high = self.scale
        scaled = (centre + half_range * standard).clamp(low, high)
        return _cast(scaled, self.action_space)


class Critic(nn.Module):
    """State-value function V_φ(s): an MLP of its own that shares at most the
    observation encoder with the policy, and not even that if it has parameters.
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
        learns = any(p.requires_grad for p in getattr(encoder, "parameters", tuple)())
        # What V learns must not move the policy.
        self.encoder = copy.deepcopy(encoder) if learns else encoder
        sizes = [encoder.features, *hidden, 1]
        self.network = _mlp(sizes, activation, 1.0, generator, orthogonal)

    def forward(self, observations: Observations) -> Tensor:
        """Return V(s) for raw observations ``[..., *observation shape]``, shape
        ``[...]``. It does not depend on a mask.
        """
        features = self.encoder(split_mask(observations)[0])
        values: Tensor = self.network(features).squeeze(-1)
        return values


def make_policy(
    observation_space: gym.Space[Any],
    action_space: gym.Space[Any],
    *,
    hidden: Sequence[int] = (64, 64),
    activation: str = "tanh",
    encoder: ObservationEncoder | None = None,
    normalize_observations: bool = False,
    orthogonal: bool = True,
    log_std: float = 0.0,
    generator: torch.Generator,
) -> CategoricalPolicy | MultiCategoricalPolicy | GaussianPolicy:
    """Build the policy that fits a pair of spaces.

    Parameters
    ----------
    observation_space, action_space : gymnasium.Space
        Of a single environment: observations ``Discrete`` or ``Box``, or what the given
        encoder reads; actions also ``MultiDiscrete`` or ``MultiBinary``.
    hidden : sequence of int
        Width of each hidden layer.
    activation : {"tanh", "relu"}
    encoder : ObservationEncoder, optional
        What turns raw observations into ``encoder.features`` numbers for the network:
        an :class:`ImageEncoder`, or a module of your own with the same ``shape``,
        ``features`` and methods ``forward`` and ``update``.
    normalize_observations : bool
        See :class:`ObservationEncoder`, the encoder that is made if none is given.
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
        For other spaces.
    """
    if encoder is None:
        normalize = normalize_observations
        encoder = ObservationEncoder(observation_space, normalize=normalize)

    def network(outputs: int) -> nn.Sequential:
        sizes = [encoder.features, *hidden, outputs]
        return _mlp(sizes, activation, 0.01, generator, orthogonal)

    if isinstance(action_space, Discrete):
        return CategoricalPolicy(encoder, action_space, network(int(action_space.n)))
    if isinstance(action_space, (MultiDiscrete, MultiBinary)):
        outputs = int(choices(action_space).sum())
        return MultiCategoricalPolicy(encoder, action_space, network(outputs))
    if isinstance(action_space, Box) and np.issubdtype(action_space.dtype, np.floating):
        outputs = math.prod(action_space.shape)
        return GaussianPolicy(encoder, action_space, network(outputs), log_std)
    raise ValueError(
        "action space must be Discrete, MultiDiscrete, MultiBinary or a floating-point "
        f"Box, got {action_space}; wrap the environment or give a policy of your own"
    )
