"""Action masks: against enumeration, beside sb3-contrib, in tasks that need them, and refused where they are wrong."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import pytest
import torch
from control_runs import PPO, REINFORCE, TRAINERS, TRPO, Mine, assert_same_run, on, with_config
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from numpy.typing import NDArray
from torch import Tensor

from policyopt.control import (
    Collector,
    MaskedObservations,
    Steps,
    TrainResult,
    evaluate,
    make_policy,
    sample_episodes,
    train_ppo,
    train_reinforce,
    train_trpo,
)
from policyopt.losses import policy_gradient_loss, surrogate_loss

BOX = spaces.Box(-1, 1, (3,), np.float32)
SPACES = [
    spaces.Discrete(4),
    spaces.Discrete(4, start=-2),
    spaces.MultiDiscrete([2, 3, 1]),
    spaces.MultiBinary(3),
]
ALGORITHMS = pytest.mark.parametrize("train", TRAINERS.values(), ids=TRAINERS)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def sizes(space: gym.Space[Any]) -> list[int]:
    if isinstance(space, spaces.Discrete):
        return [int(space.n)]
    return [2] * int(np.prod(space.shape)) if isinstance(space, spaces.MultiBinary) else list(space.nvec.flat)


def draw_mask(space: gym.Space[Any], rng: np.random.Generator) -> NDArray[np.int8]:
    """Each value with probability ½, and at least one of each choice."""
    parts = [rng.integers(0, 2, n) for n in sizes(space)]
    for part in parts:
        part[rng.integers(len(part))] = 1
    return np.concatenate(parts).astype(np.int8)


class Largest(gym.Env[Any, Any]):
    """The reward is the sum of the chosen values, of which a random half is forbidden; 5 steps.

    The observation tells nothing of it, and a forbidden action is an error. Where the episode ends nothing is
    allowed, as on a board where the game is over; ``give`` changes what is said in a step.
    """

    observation_space = spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, space: gym.Space[Any], give: Callable[[int, Any], Any] = lambda t, mask: mask) -> None:
        self.action_space, self.give = space, give

    def _info(self) -> dict[str, Any]:
        self.mask = draw_mask(self.action_space, self.np_random)
        if self.count == 5:
            self.mask[:] = 0
        given = self.give(self.count, self.mask)
        return {} if given is None else {"action_mask": given}

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        super().reset(seed=seed)
        self.count = 0
        return np.zeros(1, np.float32), self._info()

    def values(self, action: Any) -> NDArray[Any]:
        return np.ravel(action - getattr(self.action_space, "start", 0))

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        chosen, ends = self.values(action), np.cumsum(sizes(self.action_space))
        for value, part in zip(chosen, np.split(self.mask, ends[:-1]), strict=True):
            assert part[value], (action, self.mask)
        self.count += 1
        return np.zeros(1, np.float32), float(chosen.sum()), self.count == 5, False, self._info()


class Asked(Largest):
    """The same, for those who ask."""

    def _info(self) -> dict[str, Any]:
        super()._info()
        return {}

    def action_masks(self) -> NDArray[np.int8]:
        return self.mask


def best_return(space: gym.Space[Any]) -> float:
    """Of 5 steps, exactly: the mean of the largest allowed value, over all masks with their probabilities."""
    total = 0.0
    for n in sizes(space):
        for spared, *bits in itertools.product(range(n), *[range(2)] * n):
            total += max(i for i in range(n) if bits[i] or i == spared) / (n * 2**n)
    return 5 * total


# --- Values and gradients ---


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_probabilities_are_those_of_sb3_contrib_on_one_batch(space: Any) -> None:
    maskable = pytest.importorskip("sb3_contrib.common.maskable.distributions")
    rng = np.random.default_rng(0)
    policy = make_policy(BOX, space, orthogonal=False, generator=generator())
    x = torch.randn(64, 3, generator=generator(1))
    mask = torch.from_numpy(np.stack([draw_mask(space, rng) for _ in x])).bool()
    ours = policy(MaskedObservations(x, mask))
    theirs = maskable.make_masked_proba_distribution(space)
    theirs.proba_distribution(policy.network(policy.encoder(x))).apply_masking(mask)
    actions = ours.sample(generator())
    assert torch.equal(ours.mode(), theirs.mode())
    assert len({tuple(row) for row in actions.reshape(64, -1).tolist()}) > 3
    pairs = [(ours.log_prob(actions), theirs.log_prob(actions)), (ours.entropy(), theirs.entropy())]
    for found, expected in pairs:
        torch.testing.assert_close(found, expected)
        gradients = [
            torch.autograd.grad(y.square().sum(), list(policy.parameters()), retain_graph=True)
            for y in (found, expected)
        ]
        for one, other in zip(*gradients, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def joint_actions(space: Any) -> Tensor:
    actions = torch.tensor(list(itertools.product(*map(range, sizes(space)))))
    return actions.squeeze(-1) if isinstance(space, spaces.Discrete) else actions


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_gradients_are_those_of_a_small_task_by_enumeration(space: Any) -> None:
    """Three states in a row, each with its mask and a reward for each action; an action leads to the next state
    or, if it is odd in all, past it. J by all paths, with probabilities computed from nothing but logits."""
    rng = np.random.default_rng(0)
    policy = make_policy(spaces.Discrete(3), space, orthogonal=False, generator=generator()).double()
    actions, states = joint_actions(space), torch.arange(3)
    mask = torch.from_numpy(np.stack([draw_mask(space, rng) for _ in states])).bool()
    rewards = torch.from_numpy(rng.normal(size=(3, len(actions))))
    jump = actions.reshape(len(actions), -1).sum(-1) % 2 + 1
    logits = policy.network(policy.encoder(states).double())
    probability = torch.ones(3, len(actions), dtype=torch.float64)
    for i, (part, allowed) in enumerate(
        zip(logits.split(sizes(space), -1), mask.split(sizes(space), -1), strict=True)
    ):
        weights = part.exp() * allowed
        probability = (
            probability
            * (weights / weights.sum(-1, keepdim=True))[:, actions.reshape(len(actions), -1)[:, i]]
        )

    def paths(s: int, chance: Tensor, steps: list[Any]) -> list[tuple[Tensor, list[Any]]]:
        if s > 2:
            return [(chance, steps)]
        found = []
        for a in torch.nonzero(probability[s])[:, 0].tolist():
            found += paths(s + int(jump[a]), chance * probability[s, a], [*steps, (s, a)])
        return found

    every = paths(0, torch.tensor(1.0, dtype=torch.float64), [])
    assert sum(chance.item() for chance, _ in every) == pytest.approx(1)
    objective = sum(chance * sum(rewards[s, a] for s, a in steps) for chance, steps in every)
    expected = torch.autograd.grad(objective, list(policy.parameters()), retain_graph=True)
    # The same from what a trainer has: each step of each path, weighed with its chance and its return to go.
    rows = [
        (s, a, chance.item() * sum(rewards[x].item() for x in steps[t:]))
        for chance, steps in every
        for t, (s, a) in enumerate(steps)
    ]
    index, chosen, weights = (torch.tensor(column) for column in zip(*rows, strict=True))
    seen = MaskedObservations(states, mask)[index]
    distribution = doubled(policy, seen)
    log_prob = distribution.log_prob(actions[chosen])
    torch.testing.assert_close(log_prob.exp(), probability[index, chosen])
    for loss in (
        policy_gradient_loss(log_prob, weights.double()),
        surrogate_loss(log_prob, log_prob.detach(), weights.double()).loss,
    ):
        found = torch.autograd.grad(-loss.sum(), list(policy.parameters()), retain_graph=True)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other)
    # Entropy and KL divergence from another policy, state by state.
    other = make_policy(spaces.Discrete(3), space, orthogonal=False, generator=generator(5)).double()
    q = doubled(other, MaskedObservations(states, mask))
    p = doubled(policy, MaskedObservations(states, mask))
    for s in range(3):
        possible = probability[s] > 0
        mine = probability[s][possible]
        theirs = torch.stack(
            [doubled(other, MaskedObservations(states, mask)[s]).log_prob(a) for a in actions]
        )
        torch.testing.assert_close(p.entropy()[s], -(mine * mine.log()).sum())
        torch.testing.assert_close(p.kl(q)[s], (mine * (mine.log() - theirs[possible])).sum())
        assert not theirs[~possible].exp().any()
        assert theirs.exp().sum().item() == pytest.approx(1)


def doubled(policy: Any, observations: MaskedObservations) -> Any:
    """The distribution in float64: encoders make float32 of their features."""
    encoder, policy.encoder = policy.encoder, torch.nn.Sequential(policy.encoder, Double())
    try:
        return policy(observations)
    finally:
        policy.encoder = encoder


class Double(torch.nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.double()


# --- Training ---

LEARN: dict[str, Any] = {"total_steps": 4000, "num_envs": 8}
LEARNERS = [
    (train_ppo, dataclasses.replace(PPO, minibatch_size=128, epochs_per_batch=4, **LEARN)),
    (train_trpo, dataclasses.replace(TRPO, kl_limit=0.05, **LEARN)),
    (train_reinforce, dataclasses.replace(REINFORCE, baseline="mean", **LEARN)),
]


@pytest.mark.parametrize("space", SPACES[1:], ids=str)
def test_the_best_of_what_is_allowed_is_learned(space: Any, tmp_path: Path) -> None:
    """No action is right in itself: without the mask in the policy the best mean is far below."""
    for train, config in LEARNERS if space is SPACES[1] else LEARNERS[:1]:
        result = train(lambda: Largest(space), config, progress=False)
        loaded = TrainResult.load(result.save(tmp_path / train.__name__))
        for policy in (result.policy, loaded.policy):
            found = evaluate(policy, lambda: Largest(space), episodes=400)
            error = found.std / 400**0.5
            assert abs(found.mean - best_return(space)) < 4 * error, (train, found.mean, best_return(space))


@ALGORITHMS
@pytest.mark.parametrize("space", SPACES, ids=str)
def test_the_mask_of_a_step_is_used_again_when_it_is_learned_from(space: Any, train: Any) -> None:
    """In the first minibatch the policy has not moved: log π is what it was, and no step was forbidden."""
    seen: list[Steps] = []

    def loss(steps: Steps) -> Tensor:
        seen.append(steps)
        return surrogate_loss(steps.log_prob, steps.old_log_prob, steps.advantages).loss

    small = with_config(on(train, lambda: Largest(space)), total_steps=1)
    policy = make_policy(Largest.observation_space, space, orthogonal=False, generator=generator())
    small(loss=loss, policy=policy)
    steps = seen[0]
    assert isinstance(steps.observations, MaskedObservations)
    assert steps.observations.mask.shape == (len(steps), sum(sizes(space)))
    torch.testing.assert_close(steps.log_prob, steps.old_log_prob, rtol=1e-5, atol=1e-6)
    chosen = torch.nn.functional.one_hot(steps.actions.reshape(len(steps), -1), max(sizes(space)))
    parts = [chosen[:, i, :n] for i, n in enumerate(sizes(space))]
    assert (steps.observations.mask | ~torch.cat(parts, -1).bool()).all()
    # A mask of another step would not do: 3 of 4 forbid some action that was taken.
    assert not (steps.observations.mask.roll(1, 0) | ~torch.cat(parts, -1).bool()).all()


@ALGORITHMS
def test_all_allowed_is_no_mask_bit_for_bit(train: Any) -> None:
    class Open(gym.Wrapper[Any, Any, Any, Any]):
        def reset(self, **arguments: Any) -> Any:
            return self.env.reset(**arguments)[0], {"action_mask": np.ones(2, np.int8)}

        def step(self, action: Any) -> Any:
            return *self.env.step(action)[:4], {"action_mask": np.ones(2, bool)}

    plain = on(train, lambda: gym.make("CartPole-v1"))(seed=1)
    masked = on(train, lambda: Open(gym.make("CartPole-v1")))(seed=1)
    assert plain.history.table().keys() == masked.history.table().keys()
    for one, other in zip(plain.policy.parameters(), masked.policy.parameters(), strict=True):
        assert torch.equal(one, other)


@ALGORITHMS
def test_masked_runs_are_resumed_bit_for_bit(train: Any, tmp_path: Path) -> None:
    short = with_config(on(train, lambda: Largest(SPACES[2])), total_steps=400, checkpoint_every=1)
    if "anneal_learning_rate" in {f.name for f in dataclasses.fields(short.args[1])}:
        short = with_config(short, anneal_learning_rate=False)
    whole = with_config(short, total_steps=800)(checkpoint_dir=tmp_path / "a")
    short(checkpoint_dir=tmp_path / "b")
    assert_same_run(with_config(short, total_steps=800)(checkpoint_dir=tmp_path / "b"), whole)


@ALGORITHMS
def test_an_environment_that_is_asked_gives_the_same_run(train: Any) -> None:
    told, asked = (
        with_config(on(train, partial(kind, SPACES[2])), total_steps=400)() for kind in (Largest, Asked)
    )
    assert told.environment != asked.environment
    assert_same_run(told, asked)
    wrapped = on(train, lambda: gym.wrappers.TimeLimit(Asked(SPACES[2]), 100))
    assert_same_run(told, with_config(wrapped, total_steps=400)())


def test_a_policy_that_does_not_know_masks_is_called_as_before() -> None:
    class Told(gym.Wrapper[Any, Any, Any, Any]):
        def reset(self, **arguments: Any) -> Any:
            return self.env.reset(**arguments)[0], {"action_mask": np.zeros(2)}

        def step(self, action: Any) -> Any:
            return *self.env.step(action)[:4], {"action_mask": np.zeros(2)}

    plain, told = (
        train_ppo(env, PPO, policy=Mine(), progress=False)
        for env in (lambda: gym.make("CartPole-v1"), lambda: Told(gym.make("CartPole-v1")))
    )
    assert_same_run(told, plain)
    with pytest.raises(ValueError, match="action_mask needs a policy that takes it, got 'Mine'"):
        plain.policy.predict(np.zeros(4), action_mask=[1, 0])


# --- Rollouts and predictions ---


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_each_row_has_the_mask_under_which_its_action_was_taken(mode: AutoresetMode) -> None:
    space = spaces.Discrete(4)
    given: list[NDArray[Any]] = []

    def note(t: int, mask: NDArray[Any]) -> NDArray[Any]:
        given.append(mask.copy())
        return mask

    vector = SyncVectorEnv([lambda: Largest(space, note)], autoreset_mode=mode)
    policy = make_policy(Largest.observation_space, space, generator=generator())
    collector = Collector(vector, policy, generator(), seed=0)
    parts = [collector.collect(7) for _ in range(3)]
    found = torch.cat([part.flat(part.observations).mask for part in parts])
    allowed = [mask for mask in given if mask.any()]  # at an episode's end nothing is
    if mode == AutoresetMode.NEXT_STEP:
        assert [int(part.steps) for part in parts] == [6, 6, 6]
        assert all(part.observations.mask[~part.valid].all() for part in parts)
    np.testing.assert_array_equal(found.numpy(), np.stack(allowed).astype(bool)[: len(found)])
    assert 0 <= len(allowed) - len(found) <= 1
    episode = collector.collect_episodes()
    assert episode.steps == 5


def test_what_is_forbidden_is_never_done_however_likely_it_is() -> None:
    space = spaces.Discrete(4)
    policy = make_policy(Largest.observation_space, space, generator=generator())
    with torch.no_grad():
        policy.network[-1].bias.copy_(torch.tensor([300.0, 0.0, -300.0, 1e4]))
    rollout = sample_episodes(policy, lambda: Largest(space), episodes=50)  # it would raise
    taken = rollout.flat(rollout.observations).mask.gather(-1, rollout.flat(rollout.actions)[:, None])
    assert taken.all()
    assert evaluate(policy, lambda: Largest(space), episodes=20).lengths.tolist() == [5] * 20


@pytest.mark.parametrize("deterministic", [True, False])
@pytest.mark.parametrize("space", SPACES, ids=str)
def test_predictions_take_masks(space: Any, deterministic: bool) -> None:
    policy = make_policy(BOX, space, orthogonal=False, generator=generator())
    rng = np.random.default_rng(0)
    x = rng.normal(size=(50, 3)).astype(np.float32)
    masks = np.stack([draw_mask(space, rng) for _ in x])
    predict = partial(policy.predict, deterministic=deterministic, generator=generator())
    batch = policy(MaskedObservations(torch.from_numpy(x), torch.from_numpy(masks).bool()))
    several = predict(x, action_mask=masks)
    singles = [predict(one, action_mask=mask.tolist()) for one, mask in zip(x, masks, strict=True)]
    for found in (several, np.stack(singles)):
        assert all(space.contains(np.asarray(action)) for action in found)
        start = getattr(space, "start", 0)
        actions = torch.from_numpy((found - start).reshape(50, *space.shape)).long()
        assert batch.log_prob(actions).exp().gt(0).all()
        if deterministic:
            assert torch.equal(actions, batch.mode())
    assert not np.array_equal(predict(x), several)


@pytest.mark.parametrize(
    ("space", "mask", "message"),
    [
        (
            SPACES[0],
            [1, 1, 1],
            r"action_mask must have the shape \[1, 4\], 0 or 1 for each value, got \(1, 3\)",
        ),
        (SPACES[0], [[1, 1, 1, 1]], r"action_mask must have the shape \[1, 4\]"),
        (SPACES[3], [1, 1, 1], r"\[1, 6\], .*got \(1, 3\); give it as one array"),
        (SPACES[0], [0.5, 1, 1, 1], "action_mask must hold zeros and ones"),
        (SPACES[0], [1, np.nan, 1, 1], "action_mask must hold zeros and ones"),
        (SPACES[0], [0, 0, 0, 0], "action_mask forbids every action in row 0; allow at least one"),
        (SPACES[2], [1, 1, 0, 0, 0, 1], "action_mask forbids every action in choice 1 in row 0"),
    ],
)
def test_wrong_masks_of_predictions_are_refused(space: Any, mask: Any, message: str) -> None:
    policy = make_policy(BOX, space, generator=generator())
    with pytest.raises(ValueError, match=message):
        policy.predict(np.zeros(3), action_mask=mask)


def test_a_prediction_for_several_needs_a_mask_for_each() -> None:
    policy = make_policy(BOX, SPACES[0], generator=generator())
    with pytest.raises(ValueError, match=r"action_mask must have the shape \[2, 4\], .*got \(3, 4\)"):
        policy.predict(np.zeros((2, 3)), action_mask=np.ones((3, 4)))
    gaussian = make_policy(BOX, BOX, generator=generator())
    with pytest.raises(ValueError, match="action_mask needs a policy that takes it, got 'GaussianPolicy'"):
        gaussian.predict(np.zeros(3), action_mask=[1, 1, 1])


# --- Bad masks ---

WRONG: dict[str, tuple[Any, Any, str]] = {
    "nothing": (
        SPACES[0],
        lambda t, mask: 0 * mask if t == 2 else mask,
        "action_mask of env forbids every action at step 2 of the rollout in copy 1; allow at least one, or end",
    ),
    "nothing in a choice": (
        SPACES[2],
        lambda t, mask: mask * [1, 1, 0, 0, 0, 1] if t == 2 else mask,
        "action_mask of env forbids every action in choice 1 at step 2 of the rollout in copy 1",
    ),
    "too long": (
        SPACES[0],
        lambda t, mask: np.append(mask, 1),
        r"action_mask of env must have the shape \[2, 4\], 0 or 1 for each value, got \(2, 5\)",
    ),
    "Gymnasium's for bits": (
        SPACES[3],
        lambda t, mask: mask[:3],
        r"\[2, 6\], .*got \(2, 3\); give it as one array",
    ),
    "a list": (SPACES[0], lambda t, mask: mask.tolist(), r"\[2, 4\], .*got \(2,\); give it as one array"),
    "probabilities": (SPACES[0], lambda t, mask: mask / 2, "action_mask of env must hold zeros and ones"),
    "late": (
        SPACES[0],
        lambda t, mask: mask if t else None,
        r'info of env must hold "action_mask" from the reset on, got .none there',
    ),
    "missing": (
        SPACES[0],
        lambda t, mask: None if t == 3 else mask,
        'info of env must hold "action_mask" in each step, got .none at step 3 of the rollout in copy 1',
    ),
}


@pytest.mark.parametrize("name", WRONG)
@pytest.mark.parametrize("both", [False, True])
def test_wrong_masks_of_environments_are_refused(name: str, both: bool) -> None:
    space, give, message = WRONG[name]
    whole = lambda t, mask: mask  # noqa: E731
    if name not in ("nothing", "nothing in a choice", "missing"):
        both = True  # copies that differ in shape are refused by Gymnasium

    class Free(Largest):
        def step(self, action: Any) -> Any:
            self.mask[:] = 1  # where it is not told, all is allowed
            return super().step(action)

    def env() -> SyncVectorEnv:
        gives = [give if both else whole, give]
        return SyncVectorEnv([partial(Free, space, g) for g in gives])

    if both:
        message = message.replace("copy 1", "copy 0")
    vector = env()
    vector.spec = gym.envs.registration.EnvSpec("env")
    with pytest.raises(ValueError, match=message):
        train_ppo(vector, dataclasses.replace(PPO, num_envs=2), progress=False)


def test_masks_of_other_actions_are_refused() -> None:
    class Careless(Mine):
        takes_masks = True

    space = spaces.Box(-1, 1, (2,))
    env = SyncVectorEnv([lambda: Largest(SPACES[0])])
    env.single_action_space = space
    with pytest.raises(ValueError, match=r"action masks need actions that are Discrete, .*, got Box\(-1"):
        Collector(env, Careless(), generator(), seed=0).collect(1)


def test_a_mask_is_not_needed_where_no_copy_acts() -> None:
    """At the end of an episode some environments say nothing at all."""
    result = train_ppo(
        lambda: Largest(SPACES[0], lambda t, mask: None if t == 5 else mask),
        dataclasses.replace(PPO, num_envs=3),
        progress=False,
    )
    assert result.steps >= 600


def test_copies_in_processes_of_their_own_are_asked_too() -> None:
    """The smallest value is forbidden always, and so never taken."""
    space = spaces.Discrete(3)

    def rollout(kind: Any) -> Any:
        env = kind([partial(Asked, space)] * 2)
        policy = make_policy(env.single_observation_space, space, generator=generator())
        try:
            return Collector(env, policy, generator(1), seed=0).collect(12)
        finally:
            env.close()

    one, other = rollout(gym.vector.SyncVectorEnv), rollout(gym.vector.AsyncVectorEnv)
    assert not one.observations.mask.all()
    assert torch.equal(one.observations.mask, other.observations.mask)
    assert torch.equal(one.actions, other.actions)
