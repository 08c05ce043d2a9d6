"""Collect experience from a vector environment into ``[T, N]`` tensors.

Gymnasium's vector environments reset a copy by themselves when its episode ends, in one
of two ways, and both are handled so that the *final* observation of an episode is what
gets bootstrapped and no junk is learned from:

next-step
    the final observation comes back as usual; the following ``step`` ignores the action
    and returns the first observation of the next episode. That following row is junk:
    it is marked ``valid = False``.
same-step
    ``step`` returns the first observation of the next episode at once and hides the
    final one in ``info["final_obs"]`` (or ``"final_observation"``, its older name). It
    is picked out and kept beside them.

An environment may be one of tensors: see :func:`make_vector_env`. Then no step copies
anything to NumPy, and nothing leaves its device except where the policy is on another.
Returns of episodes are counted once per rollout.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
import torch
from gymnasium.spaces import Discrete
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv, VectorEnv
from numpy.typing import NDArray
from torch import Tensor

from policyopt._checks import require
from policyopt.control import environments, policies
from policyopt.control.environments import EnvLike, environment_seed
from policyopt.control.policies import MaskedObservations, Observations, Policy

__all__ = ["Collector", "Episodes", "Rollout", "sample_episodes"]

RowsT = TypeVar("RowsT", Tensor, Observations)
ValueFunction = Callable[[Any], Tensor]
"""From raw observations ``[..., *observation shape]`` to V(s), ``[...]``."""


@dataclass(frozen=True)
class Episodes:
    """Every finished episode of a run, in the order in which they ended."""

    steps: NDArray[np.int64]
    """Environment steps taken by all copies together when the episode ended,
    ``[n]``.
    """
    returns: NDArray[np.float64]
    """Undiscounted return, ``[n]``, in units of reward."""
    lengths: NDArray[np.int64]
    """Length in environment steps, ``[n]``."""

    def __len__(self) -> int:
        return len(self.steps)

    @classmethod
    def concatenate(cls, parts: list[Episodes]) -> Episodes:
        """Join several records, in order."""
        none = cls(np.empty(0, np.int64), np.empty(0), np.empty(0, np.int64))
        columns = zip(*(vars(part).values() for part in [none, *parts]), strict=True)
        return cls(*map(np.concatenate, columns))

    def table(self) -> dict[str, NDArray[Any]]:
        """Return the columns by name, ready for ``pandas.DataFrame``."""
        return {"steps": self.steps, "return": self.returns, "length": self.lengths}


@dataclass(frozen=True)
class Rollout:
    """``T`` steps of ``N`` copies of an environment, on the policy's device.

    Rows where ``valid`` is False (the reset rows of next-step autoreset, the padding
    after an episode's end in :meth:`Collector.collect_episodes`) hold no experience:
    mask them out of every loss.
    """

    observations: Observations
    """Raw observations s_t, ``[T, N, *observation shape]``, with the allowed actions
    where the environment masks them.
    """
    actions: Tensor
    """Actions a_t of the policy's distribution, ``[T, N, ...]``."""
    rewards: Tensor
    """r_t, ``[T, N]``, float32."""
    terminated: Tensor
    """The episode ended in a true terminal state, bool ``[T, N]``."""
    truncated: Tensor
    """The episode was cut by a limit, bool ``[T, N]``."""
    valid: Tensor
    """The row is experience, bool ``[T, N]``."""
    last_observations: Tensor
    """Observations after the last row, ``[N, *observation shape]``."""
    final_index: tuple[Tensor, Tensor]
    """Rows (t, n) whose successor is not the next row's observation (same-step
    autoreset), two ``[M]``.
    """
    final_observations: Tensor
    """Their true successors, ``[M, *observation shape]``."""
    episodes: Episodes
    """Episodes that ended in this rollout."""

    @property
    def steps(self) -> int:
        """Number of environment steps, i.e. of valid rows."""
        return int(self.valid.sum())

    def flat(self, x: RowsT) -> RowsT:
        """Pick the valid rows of ``x`` ``[T, N, ...]``: ``[B, ...]`` with ``B`` =
        :attr:`steps`.
        """
        return x.flatten(0, 1) if bool(self.valid.all()) else x[self.valid]

    @torch.no_grad()
    def evaluate(self, critic: ValueFunction | None) -> tuple[Tensor, Tensor]:
        """Return V(s_t) and V(s_{t+1}), both ``[T, N]``; the successor of a cut row is
        its final observation. Without a critic V = 0.
        """
        if critic is None:
            return torch.zeros_like(self.rewards), torch.zeros_like(self.rewards)
        seen, _ = policies.split_mask(self.observations)
        values = critic(torch.cat([seen, self.last_observations[None]]))
        next_values = values[1:].clone()
        if len(self.final_index[0]):
            next_values[self.final_index] = critic(self.final_observations)
        return values[:-1], next_values


class Collector:
    """Runs a policy in a vector environment and remembers where each copy stands.

    A policy that takes masks gets those that the environment gives: the arrays in
    ``info["action_mask"]``, or what the method ``action_masks`` of each copy in a
    ``SyncVectorEnv`` or ``AsyncVectorEnv`` returns.

    Parameters
    ----------
    env : VectorEnv
        Reset here, with ``seed``.
    policy : Policy
        Acts on raw observations.
    generator : torch.Generator
        Source of the action samples, on the policy's device.
    seed : int
        Seed of the environment.
    name : str
        Name of the environment, for messages.
    """

    def __init__(
        self,
        env: VectorEnv[Any, Any, Any],
        policy: Policy,
        generator: torch.Generator,
        *,
        seed: int,
        name: str = "environment",
    ) -> None:
        encoder, space = policy.encoder, env.single_observation_space
        kind = np.dtype(space.dtype).kind if space.shape is not None else ""
        rule = f"observations of {name} must be arrays of numbers"
        remedy = "flatten them with gymnasium.wrappers.FlattenObservation"
        require(bool(kind) and kind in "biuf", rule, space, remedy)
        ours = type(encoder).__module__ == policies.__name__
        fits = not ours or encoder.fits(space)
        actions = env.single_action_space
        if not fits or getattr(policy, "action_space", actions) != actions:
            raise ValueError(
                "policy was made for other observations or actions than those of "
                f"{name}, {space} and {actions}: make one for its spaces"
            )
        self.env, self.policy, self.generator = env, policy, generator
        self.name, self.steps = name, 0
        self._same_step = env.metadata["autoreset_mode"] == AutoresetMode.SAME_STEP
        self._base: Any = getattr(env, "unwrapped", env)
        self._asks = isinstance(self._base, (SyncVectorEnv, AsyncVectorEnv)) and all(
            self._base.call("has_wrapper_attr", "action_masks")
        )
        self.reset(seed)

    def reset(self, seed: int | None = None) -> None:
        """Begin every copy's next episode; those under way are dropped."""
        n = self.env.num_envs
        self._observation, self._info = self.env.reset(seed=seed)
        given = self._asks or "action_mask" in self._info
        self._masked = self.policy.takes_masks and given
        one = self._observation
        # The device of an environment of tensors; None where it is of NumPy.
        self._place = one.device if isinstance(one, Tensor) else None
        self._pending_reset = torch.zeros(n, dtype=torch.bool, device=self._place)
        self._returns = np.zeros(n)
        self._lengths = np.zeros(n, dtype=np.int64)

    def collect(self, steps: int, *, deterministic: bool = False) -> Rollout:
        """Take ``steps`` steps with every copy, continuing where the last call stopped.

        Raises
        ------
        ValueError
            If ``steps`` < 1, or an observation or reward is NaN or infinite.
        """
        require(steps >= 1, "steps must be >= 1", steps)
        return self._run(steps, deterministic=deterministic, one_episode=False)

    def collect_episodes(
        self, *, max_steps: int = 100_000, deterministic: bool = False
    ) -> Rollout:
        """Run every copy through exactly one whole episode, from a fresh reset.

        Copies that finish early are padded with invalid rows. One episode per copy,
        however long, is an unbiased sample of episodes; "the first n to finish" would
        favour short ones.

        Raises
        ------
        ValueError
            If an episode is not over after ``max_steps`` steps.
        """
        self.reset()
        return self._run(max_steps, deterministic=deterministic, one_episode=True)

    def _run(self, steps: int, *, deterministic: bool, one_episode: bool) -> Rollout:
        device = self.generator.device
        running = torch.ones_like(self._pending_reset)
        rows: list[tuple[Any, ...]] = []
        masks: list[Tensor] = []
        finals: list[Any] = []
        for t in range(steps):
            seen = policies.to_tensor(self._observation)
            self._check_discrete(seen)
            values = policies.move(seen, device)
            batch: Observations = values
            if self._masked:
                masks.append(self._mask(t).to(device))
                batch = MaskedObservations(values, masks[-1])
            action = self.policy.act(batch, self.generator, deterministic=deterministic)
            reward, ended, cut = self._step(action)
            valid = running if one_episode else ~self._pending_reset
            rows.append((seen, action, reward, ended, cut, valid))
            done = ended | cut
            if not self._same_step:
                self._pending_reset = done
            elif done.any():
                finals.append(self._final_observations(done.nonzero()[:, 0]))
            running = running & ~done if one_episode else running
            if one_episode and not running.any():
                break
        else:
            if one_episode:
                raise ValueError(
                    f"an episode of {self.name} is not over after {steps} steps; raise "
                    "max_steps or wrap it in gymnasium.wrappers.TimeLimit"
                )
        columns = [torch.stack(c) for c in zip(*rows, strict=True)]
        observations, actions, rewards, terminated, truncated, valid = columns
        after = policies.to_tensor(self._observation)
        final = torch.cat([after[:0], *finals])
        self._check_discrete(torch.cat([after, final]))
        self._check_finite("observation", observations)
        self._check_finite("reward", rewards)
        # Neither is a row of the rollout, but both are bootstrapped from.
        self._check_finite("observation", after[None], "after the last step")
        self._check_finite("observation", final[None], "at the end of an episode")
        self._check_float32(observations, self.policy.encoder)
        late = "action_mask" in self._info and self.policy.takes_masks and not masks
        rule = f'info of {self.name} must hold "action_mask" from the reset on'
        require(not late, rule, "none there")
        values = policies.move(observations, device)
        states = MaskedObservations(values, torch.stack(masks)) if masks else values
        done = terminated | truncated
        t, n = (done & self._same_step).nonzero().T.to(device)
        return Rollout(
            observations=states, actions=actions, rewards=rewards.to(device),
            terminated=terminated.to(device), truncated=truncated.to(device),
            valid=valid.to(device), last_observations=policies.move(after, device),
            final_index=(t, n), final_observations=policies.move(final, device),
            episodes=self._close_episodes(rewards, done, valid),
        )  # fmt: skip

    def _step(self, action: Tensor) -> tuple[Tensor, ...]:
        """Step the environment; return the rewards and the two kinds of ends."""
        if self._place is None:
            given = self.policy.to_env(action)
        else:
            # A copy: the environment may keep it, or change it.
            given = self.policy.to_space(action).to(self._place, copy=True)
        self._observation, *said, self._info = self.env.step(given)
        reward, *ends = map(policies.to_tensor, said)
        shapes = {tuple(x.shape) for x in (reward, *ends)}
        if shapes != {(n := self.env.num_envs,)}:
            rule = f"rewards and ends of {self.name} must have the shape [{n}]"
            require(False, rule, shapes, "return one for each copy")
        flags = (end.to(self._place, torch.bool) for end in ends)
        return reward.to(self._place, torch.float32), *flags

    def _mask(self, t: int) -> Tensor:
        """Which actions each copy may take now, ``[N, K]``; all where it is about to be
        reset, as the action will be ignored.
        """
        here = f"at step {t} of the rollout in copy"
        ignored = self._pending_reset.cpu().numpy()
        space: Any = self.env.single_action_space
        if self._asks:
            found, what = self._base.call("action_masks"), "action_masks()"
        else:
            found, what = self._info.get("action_mask"), "action_mask"
            found = found.cpu().numpy() if isinstance(found, Tensor) else found
            # Gymnasium says so whose infos have it.
            given = np.full(self.env.num_envs, found is not None)
            missing = ~self._info.get(f"_{what}", given) & ~ignored
            rule = f'info of {self.name} must hold "{what}" in each step'
            require(not missing.any(), rule, f"none {here} {missing.argmax()}")
            if found is None:  # no copy acts
                found = np.ones((len(given), policies.choices(space).sum()))
        return policies.read_mask(
            found, space, self.env.num_envs, name=f"{what} of {self.name}", where=here,
            ignored=ignored,
        )  # fmt: skip

    def _final_observations(self, over: Tensor) -> Tensor:
        """Return the final observations of the copies whose episodes are over."""
        last = self._info.get("final_obs", self._info.get("final_observation"))
        if isinstance(last, Tensor):  # of all copies
            return last.detach()[over]
        rows = [None if last is None else last[i] for i in over.tolist()]
        rule = f"info of {self.name}, which resets in the same step, must hold"
        remedy = "put the observations before the reset there, or use AutoresetMode"
        found = all(row is not None for row in rows)
        require(found, f'{rule} "final_obs"', [*self._info], f"{remedy}.NEXT_STEP")
        return torch.stack([policies.to_tensor(row) for row in rows])

    def _check_float32(self, observations: Tensor, encoder: Any) -> None:
        """Refuse observations whose differences are lost on the way to the network."""
        here = policies.has_float64(self.generator.device)
        if not getattr(encoder, "wide", False) or (here and encoder.normalize):
            return
        exact = observations.cpu().numpy().astype(np.float64)
        error, spread = exact - exact.astype(np.float32), exact.std(axis=(0, 1))
        # Differences of 1e-4 are too small to learn from anyway.
        lost = error.std(axis=(0, 1)) > np.maximum(0.1 * spread, 1e-4)
        rule = f"observations of {self.name} must differ by more than float32 resolves"
        require(
            not lost.any(), rule, exact[0, 0], "subtract a constant in a wrapper, or "
            "set normalize_observations=True (and device='cpu' if it is 'mps')"
        )  # fmt: skip

    def _check_finite(self, what: str, x: Tensor, where: str = "") -> None:
        # Networks compute in float32.
        bad = ~x.float().isfinite() if x.is_floating_point() else torch.empty(0)
        for t, i, *place in bad.nonzero()[:1].tolist():
            value = f"{x[t, i, *place]}" + (f" at {place} of it" if place else "")
            where = where or f"at step {t} of the rollout in copy {i}"
            raise ValueError(
                f"{self.name} returned a NaN or infinite {what} ({value}) {where}"
                f"; fix the environment or wrap it so that every {what} is finite"
            )

    def _check_discrete(self, observations: Tensor) -> None:
        # A GPU would answer with an assertion that ends the process.
        space = self.env.single_observation_space
        if isinstance(space, Discrete):
            low, high = (int(x) for x in observations.long().aminmax())
            inside = space.start <= low and high < space.start + space.n
            rule = f"observations of {self.name} must be in {space}"
            remedy = "fix the environment or its observation_space"
            require(inside, rule, (low, high), remedy)

    def _close_episodes(self, rewards: Tensor, done: Tensor, valid: Tensor) -> Episodes:
        """Account for the rows just collected, and return the episodes that ended in
        them.
        """
        gained, counts = (rewards * valid).cpu().numpy(), valid.cpu().numpy()
        returns = np.cumsum(gained, axis=0, dtype=np.float64) + self._returns
        lengths = np.cumsum(counts, axis=0) + self._lengths
        steps = self.steps + np.cumsum(counts.sum(axis=1))
        before, begun = np.zeros_like(returns[0]), np.zeros_like(lengths[0])
        ends = np.nonzero((done & valid).cpu().numpy())
        totals, sizes = returns[ends], lengths[ends]
        for k, i in enumerate(ends[1]):
            # What the copy's earlier episodes gathered is none of this one's.
            totals[k], before[i] = totals[k] - before[i], totals[k]
            sizes[k], begun[i] = sizes[k] - begun[i], sizes[k]
        self._returns, self._lengths = returns[-1] - before, lengths[-1] - begun
        self.steps = int(steps[-1])
        return Episodes(steps[ends[0]], totals, sizes)


def sample_episodes(
    policy: Policy,
    env: EnvLike,
    *,
    episodes: int = 1,
    seed: int = 0,
    deterministic: bool = False,
    max_steps: int = 100_000,
) -> Rollout:
    """Run ``episodes`` whole episodes side by side and return them, padded, as a
    :class:`Rollout`.

    Parameters
    ----------
    policy : Policy
        Left as it is: observation statistics are not updated.
    env : EnvLike
        A vector environment decides the number of episodes itself: one per copy.
    seed : int
        Seeds the environment and the action samples; a stream apart from the
        training's.

    Examples
    --------
    >>> import torch
    >>> from policyopt.control import make_policy, sample_episodes
    >>> import gymnasium as gym
    >>> one = gym.make("CartPole-v1")
    >>> g = torch.Generator().manual_seed(0)
    >>> policy = make_policy(one.observation_space, one.action_space, generator=g)
    >>> rollout = sample_episodes(policy, "CartPole-v1", episodes=5)
    >>> len(rollout.episodes), rollout.steps == int(rollout.episodes.lengths.sum())
    (5, True)
    """
    require(episodes >= 1, "episodes must be >= 1", episodes)
    name, start = environments.environment_name(env), environment_seed(seed, 1)
    vector, owned = environments.make_vector_env(env, episodes)
    try:
        device = next((p.device for p in policy.parameters()), torch.device("cpu"))
        generator = torch.Generator(device).manual_seed(environment_seed(seed, 2))
        collector = Collector(vector, policy, generator, seed=start, name=name)
        return collector._run(max_steps, deterministic=deterministic, one_episode=True)
    finally:
        if owned:
            vector.close()
