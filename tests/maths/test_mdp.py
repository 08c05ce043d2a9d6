"""The exact solvers against hand computations, enumeration, finite differences and each other."""

from __future__ import annotations

import itertools
import math

import gymnasium as gym
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from policyopt import estimators, mdp
from policyopt.mdp import FiniteMDP
from policyopt_book.tasks.grids import from_gymnasium, grid_world

F64 = torch.float64


def random_mdp(seed: int, n_states: int, n_actions: int, gamma: float) -> FiniteMDP:
    """A dense random MDP whose last state is terminal with even odds."""
    g = torch.Generator().manual_seed(seed)
    P = torch.rand(n_states, n_actions, n_states, generator=g, dtype=F64) ** 3
    P = P / P.sum(-1, keepdim=True)
    R = torch.randn(n_states, n_actions, generator=g, dtype=F64)
    if seed % 2:
        P[-1], R[-1] = 0.0, 0.0
        P[-1, :, -1] = 1.0
    initial = torch.rand(n_states, generator=g, dtype=F64)
    return FiniteMDP(P, R, gamma, initial / initial.sum())


def random_policy(seed: int, problem: FiniteMDP) -> Tensor:
    g = torch.Generator().manual_seed(1000 + seed)
    return torch.randn(problem.R.shape, generator=g, dtype=F64).mul(2).softmax(-1)


def chain(gamma: float) -> FiniteMDP:
    """0 -> 1 -> 2 (terminal), rewards 1 and 10; the second action jumps from 0 to the end for reward 3."""
    P = torch.zeros(3, 2, 3, dtype=F64)
    P[0, 0, 1] = P[0, 1, 2] = P[1, :, 2] = P[2, :, 2] = 1.0
    return FiniteMDP(P, [[1.0, 3.0], [10.0, 10.0], [0.0, 0.0]], gamma, [1.0, 0.0, 0.0])


def short_episodes() -> FiniteMDP:
    """Stochastic, two actions, over after at most three steps, gamma = 1/2; small enough to enumerate."""
    P = torch.zeros(4, 2, 4, dtype=F64)
    P[0, 0] = torch.tensor([0.0, 0.25, 0.75, 0.0])
    P[0, 1] = torch.tensor([0.0, 0.5, 0.0, 0.5])
    P[1, 0] = torch.tensor([0.0, 0.0, 1.0, 0.0])
    P[1, 1] = torch.tensor([0.0, 0.0, 0.125, 0.875])
    P[2, :, 3] = P[3, :, 3] = 1.0
    R = torch.tensor([[1.0, -2.0], [3.0, 0.5], [-1.0, 4.0], [0.0, 0.0]], dtype=F64)
    return FiniteMDP(P, R, 0.5, [0.5, 0.5, 0.0, 0.0])


def enumerate_trajectories(
    problem: FiniteMDP, policy: Tensor
) -> list[tuple[float, list[tuple[int, int]], float]]:
    """Every trajectory of an MDP that surely ends, by recursion: probability, (s, a) pairs, return."""
    found = []

    def follow(s: int, probability: float, path: list[tuple[int, int]], total: float) -> None:
        if probability == 0.0:
            return
        if problem.terminal[s]:
            found.append((probability, path, total))
            return
        discount = problem.gamma ** len(path)
        for a, nxt in itertools.product(range(problem.n_actions), range(problem.n_states)):
            step = float(policy[s, a] * problem.P[s, a, nxt])
            follow(nxt, probability * step, [*path, (s, a)], total + discount * float(problem.R[s, a]))

    for s in range(problem.n_states):
        follow(s, float(problem.initial[s]), [], 0.0)
    return found


# --- By hand ------------------------------------------------------------------------------------------


def test_chain_by_hand() -> None:
    problem = chain(gamma=0.5)
    slow, quick = torch.tensor([0, 0, 0]), torch.tensor([1, 0, 0])
    one_hot = torch.eye(2, dtype=F64)
    assert problem.terminal.tolist() == [False, False, True]
    torch.testing.assert_close(mdp.policy_evaluation(problem, one_hot[slow]).tolist(), [6.0, 10.0, 0.0])
    torch.testing.assert_close(mdp.policy_evaluation(problem, one_hot[quick]).tolist(), [3.0, 10.0, 0.0])
    half = mdp.uniform_policy(problem)
    torch.testing.assert_close(mdp.policy_evaluation(problem, half).tolist(), [4.5, 10.0, 0.0])
    torch.testing.assert_close(mdp.action_values(problem, half)[0].tolist(), [6.0, 3.0])
    torch.testing.assert_close(mdp.advantages(problem, half)[0].tolist(), [1.5, -1.5])
    # Start in 0; half of the time reach 1 at t = 1; stay in 2 from t = 1 or t = 2 on.
    d = mdp.occupancy(problem, half)
    torch.testing.assert_close(d.tolist(), [1.0, 0.25, 0.25 / (1 - 0.5) + 0.125 / (1 - 0.5)])
    # dJ/dθ(0, 0) = d(0) π(0|0) A(0, 0) = 1 · 0.5 · 1.5
    gradient = mdp.exact_policy_gradient(problem, torch.zeros(3, 2, dtype=F64))
    torch.testing.assert_close(gradient.tolist(), [[0.75, -0.75], [0.0, 0.0], [0.0, 0.0]])


def test_the_best_choice_depends_on_gamma() -> None:
    for gamma, best in ((0.1, 1), (0.3, 0)):  # 1 + 10 γ against 3
        assert mdp.value_iteration(chain(gamma)).policy[0].argmax() == best


def test_bellman_operators_by_hand() -> None:
    problem, values = chain(0.5), torch.tensor([2.0, 4.0, 0.0], dtype=F64)
    torch.testing.assert_close(
        mdp.lookahead(problem, values).tolist(), [[3.0, 3.0], [10.0, 10.0], [0.0, 0.0]]
    )
    policy = torch.tensor([[0.25, 0.75]] * 3, dtype=F64)
    torch.testing.assert_close(
        mdp.bellman_expectation(problem, values * 2, policy).tolist(), [3.5, 10.0, 0.0]
    )
    torch.testing.assert_close(mdp.bellman_optimality(problem, values * 2).tolist(), [5.0, 10.0, 0.0])


# --- By enumeration, differentiation, simulation ------------------------------------------------------


def test_values_and_gradient_by_enumeration_of_all_trajectories() -> None:
    problem = short_episodes()
    theta = torch.tensor([[0.3, -0.2], [0.0, 1.0], [-0.5, 0.5], [0.0, 0.0]], dtype=F64)
    policy = mdp.softmax_policy(theta)
    trajectories = enumerate_trajectories(problem, policy)
    assert math.isclose(sum(p for p, _, _ in trajectories), 1.0, abs_tol=1e-12)
    expected = sum(p * total for p, _, total in trajectories)
    torch.testing.assert_close(mdp.expected_return(problem, policy).item(), expected, rtol=0, atol=1e-12)

    visits, gradient = torch.zeros(4, dtype=F64), torch.zeros(4, 2, dtype=F64)
    for p, path, total in trajectories:
        for t, (s, a) in enumerate(path):
            visits[s] += p * problem.gamma**t
            gradient[s] -= p * total * policy[s]  # G · ∇ log π(a|s), and ∇ log softmax = one-hot − π
            gradient[s, a] += p * total
    torch.testing.assert_close(mdp.occupancy(problem, policy)[:3], visits[:3], rtol=0, atol=1e-12)
    torch.testing.assert_close(mdp.exact_policy_gradient(problem, theta), gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("gamma", [0.0, 0.9, 0.999])
@pytest.mark.parametrize("seed", range(4))
def test_policy_gradient_theorem_against_autograd_and_finite_differences(seed: int, gamma: float) -> None:
    problem = random_mdp(seed, 5, 3, gamma)
    theta = torch.randn(5, 3, dtype=F64, generator=torch.Generator().manual_seed(seed)).requires_grad_()

    def objective(t: Tensor) -> Tensor:
        return mdp.expected_return(problem, mdp.softmax_policy(t))

    exact = mdp.exact_policy_gradient(problem, theta.detach())
    (by_autograd,) = torch.autograd.grad(objective(theta), theta)
    torch.testing.assert_close(exact, by_autograd, rtol=1e-9, atol=1e-10)
    differences = torch.zeros_like(exact)
    for s, a in itertools.product(range(5), range(3)):
        step = torch.zeros_like(exact)
        step[s, a] = 1e-5
        differences[s, a] = (objective(theta + step) - objective(theta - step)).detach() / 2e-5
    torch.testing.assert_close(exact, differences, rtol=1e-5, atol=1e-6)


def test_sampled_returns_agree_with_the_exact_value() -> None:
    problem = grid_world(["..G", ".#H", "S.."], gamma=0.9, slip=0.2)
    policy = random_policy(0, problem)
    batch = mdp.sample_trajectories(
        problem, policy, 20_000, max_steps=300, generator=torch.Generator().manual_seed(0)
    )
    returns = estimators.discounted_returns(
        batch.rewards, batch.terminated, batch.truncated, torch.zeros_like(batch.rewards), gamma=0.9
    )[0]
    error = returns.mean() - mdp.expected_return(problem, policy)
    assert error.abs() < 4 * returns.std() / len(returns) ** 0.5
    assert returns.std() / len(returns) ** 0.5 < 0.01  # otherwise the line above could not fail


def test_flags_of_sampled_trajectories() -> None:
    problem = grid_world(["S..G"], gamma=1.0, allow_undiscounted=True)
    policy = torch.tensor([0.2, 0.1, 0.6, 0.1], dtype=F64).expand(4, 4)
    batch = mdp.sample_trajectories(
        problem, policy, 500, max_steps=6, generator=torch.Generator().manual_seed(1)
    )
    assert batch.states.shape == (6, 500)
    ended, cut = batch.terminated.any(0), batch.truncated.any(0)
    assert ended.any()
    assert cut.any()
    assert torch.equal(ended, ~cut)
    assert torch.equal(batch.terminated.sum(0), ended.long())
    assert not batch.truncated[:-1].any()
    assert torch.equal(batch.next_states[:-1], batch.states[1:])
    lengths = batch.valid.sum(0)
    for n in range(500):  # valid is one block that ends with the flag
        assert batch.valid[: lengths[n], n].all()
        assert batch.terminated[lengths[n] - 1, n] | batch.truncated[lengths[n] - 1, n]
    assert not batch.rewards[~batch.valid].any()
    assert torch.equal(batch.rewards.sum(0), ended.to(F64))


def test_sampling_is_reproducible_and_short_when_all_have_ended() -> None:
    problem = chain(1.0)
    first, second = (
        mdp.sample_trajectories(
            problem, mdp.uniform_policy(problem), 50, max_steps=99, generator=torch.Generator().manual_seed(3)
        )
        for _ in range(2)
    )
    assert torch.equal(first.actions, second.actions)
    assert first.states.shape[0] == 2


# --- Properties of random MDPs ------------------------------------------------------------------------

RANDOM = {
    "seed": st.integers(0, 10_000),
    "n_states": st.integers(1, 7),
    "n_actions": st.integers(1, 4),
    "gamma": st.floats(0.0, 0.99),
}


@settings(max_examples=60, deadline=None)
@given(**RANDOM)
def test_identities_of_any_policy(seed: int, n_states: int, n_actions: int, gamma: float) -> None:
    problem = random_mdp(seed, n_states, n_actions, gamma)
    policy, other = random_policy(seed, problem), random_policy(seed + 1, problem)
    values = mdp.policy_evaluation(problem, policy)
    close = {"rtol": 0, "atol": 1e-10 / (1 - gamma)}
    torch.testing.assert_close(mdp.bellman_expectation(problem, values, policy), values, **close)
    torch.testing.assert_close(
        (policy * mdp.advantages(problem, policy)).sum(-1), torch.zeros_like(values), **close
    )
    d = mdp.occupancy(problem, policy)
    assert (d >= -1e-12).all()
    assert math.isclose(d.sum().item(), 1 / (1 - gamma), rel_tol=1e-9)
    # J in its two forms: values weighted by the first state, rewards weighted by the occupancy.
    torch.testing.assert_close(
        d @ (policy * problem.R).sum(-1), mdp.expected_return(problem, policy), **close
    )
    difference = mdp.expected_return(problem, other) - mdp.expected_return(problem, policy)
    torch.testing.assert_close(mdp.performance_difference(problem, other, policy), difference, **close)


@settings(max_examples=60, deadline=None)
@given(**RANDOM)
def test_solvers_agree_and_nothing_beats_them(seed: int, n_states: int, n_actions: int, gamma: float) -> None:
    problem = random_mdp(seed, n_states, n_actions, gamma)
    by_policies = mdp.policy_iteration(problem)
    by_values = mdp.value_iteration(problem, tolerance=1e-9)
    torch.testing.assert_close(by_policies.values, by_values.values, rtol=0, atol=2e-9)
    assert (by_policies.values >= mdp.policy_evaluation(problem, random_policy(seed, problem)) - 1e-9).all()
    assert (mdp.advantages(problem, by_policies.policy) <= 1e-9 / (1 - gamma)).all()
    again = mdp.policy_iteration(problem, random_policy(seed, problem))
    torch.testing.assert_close(again.values, by_policies.values, rtol=0, atol=1e-8)


@settings(max_examples=40, deadline=None)
@given(sweeps=st.integers(0, 30), **RANDOM)
def test_the_error_bound_holds(sweeps: int, seed: int, n_states: int, n_actions: int, gamma: float) -> None:
    problem = random_mdp(seed, n_states, n_actions, gamma)
    best, values = mdp.policy_iteration(problem).values, torch.zeros(n_states, dtype=F64)
    for _ in range(sweeps):
        values = mdp.bellman_optimality(problem, values)
    assert (values - best).abs().max() <= mdp.error_bound(problem, values) + 1e-9


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), n_states=st.integers(2, 7), n_actions=st.integers(1, 4))
def test_undiscounted_solvers_where_every_policy_ends(seed: int, n_states: int, n_actions: int) -> None:
    discounted = random_mdp(2 * seed + 1, n_states, n_actions, 0.9)  # odd: the last state is terminal
    exits = torch.zeros(n_states, dtype=F64)
    exits[-1] = 1.0
    # A tenth of a chance to end at every step keeps the bound, about (mean length)², above rounding errors.
    problem = FiniteMDP(0.9 * discounted.P + 0.1 * exits, discounted.R, 1.0, discounted.initial)
    by_policies = mdp.policy_iteration(problem)
    by_values = mdp.value_iteration(problem, tolerance=1e-9)
    torch.testing.assert_close(by_policies.values, by_values.values, rtol=0, atol=2e-9)
    assert (torch.zeros(n_states) - by_policies.values).abs().max() <= mdp.error_bound(
        problem, torch.zeros(n_states, dtype=F64)
    ) * (1 + 1e-9)
    policy = random_policy(seed, problem)
    clock = FiniteMDP(
        problem.P, (~problem.terminal).to(F64)[:, None].expand_as(problem.R), 1.0, problem.initial
    )
    length = mdp.expected_return(clock, policy)  # one per step
    torch.testing.assert_close(mdp.occupancy(problem, policy).sum(), length, rtol=1e-8, atol=1e-8)


# --- When gamma = 1 is allowed ------------------------------------------------------------------------


def two_rooms(stay_reward: float = 0.0) -> dict[str, object]:
    """State 0: action 0 stays, action 1 ends for reward 1. State 1: terminal."""
    P = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]], dtype=F64)
    return {"P": P, "R": [[stay_reward, 1.0], [0.0, 0.0]], "initial": [1.0, 0.0]}


def test_gamma_one_is_refused_where_a_policy_never_ends() -> None:
    with pytest.raises(ValueError, match=r"one can stay in states \[0\] for ever"):
        FiniteMDP(**two_rooms(), gamma=1.0)
    problem = FiniteMDP(**two_rooms(), gamma=1.0, allow_undiscounted=True)
    one_hot = torch.eye(2, dtype=F64)
    ends, loops = one_hot[[1, 0]], one_hot[[0, 0]]
    assert mdp.policy_evaluation(problem, ends)[0] == 1.0
    for refused in (mdp.policy_evaluation, mdp.occupancy, mdp.advantages):
        with pytest.raises(ValueError, match=r"go on for ever from states \[0\]"):
            refused(problem, loops)
    with pytest.raises(ValueError, match="no error bound"):
        mdp.value_iteration(problem)
    assert mdp.policy_iteration(problem).values.tolist() == [1.0, 0.0]
    assert mdp.occupancy(problem, mdp.uniform_policy(problem)).tolist() == [2.0, 0.0]  # mean length 2


def test_reward_without_end_is_reported() -> None:
    problem = FiniteMDP(**two_rooms(stay_reward=0.1), gamma=1.0, allow_undiscounted=True)
    with pytest.raises(ValueError, match="may go on for ever"):
        mdp.policy_iteration(problem)


def test_end_components_against_all_deterministic_policies() -> None:
    """The graph argument agrees with checking every deterministic policy by reachability."""
    disagreements, endless_seen = 0, 0
    for seed in range(60):
        g = torch.Generator().manual_seed(seed)
        P = (torch.rand(4, 2, 4, generator=g, dtype=F64) > 0.7).to(F64)
        P[:, :, 3] += (P.sum(-1) == 0).to(F64)
        P[3], P[3, :, 3] = 0.0, 1.0
        P = P / P.sum(-1, keepdim=True)
        R = torch.ones(4, 2, dtype=F64)
        R[3] = 0.0
        ends = True
        for actions in itertools.product(range(2), repeat=4):
            edges = P[torch.arange(4), list(actions)]
            ends &= bool((torch.linalg.matrix_power(edges + torch.eye(4, dtype=F64), 4)[:, 3] > 0).all())
        try:
            FiniteMDP(P, R, 1.0, [1.0, 0.0, 0.0, 0.0])
            accepted = True
        except ValueError:
            accepted = False
        disagreements += accepted != ends
        endless_seen += not ends
    assert disagreements == 0
    assert 5 < endless_seen < 55


def test_start_of_policy_iteration_avoids_a_trap() -> None:
    """In state 0 one action may end or fall into a trap, the other surely ends; only the second is proper."""
    P = torch.zeros(4, 2, 4, dtype=F64)
    P[0, 0, 3] = P[0, 0, 2] = 0.5
    P[0, 1, 1] = P[1, :, 3] = P[3, :, 3] = 1.0
    P[2, 0, 2] = P[2, 1, 2] = 1.0  # the trap has no exit, and costs
    R = [[0.0, 0.0], [0.0, 0.0], [-1.0, -1.0], [0.0, 0.0]]
    start = mdp._ending_policy(FiniteMDP(P, R, 1.0, [1.0, 0, 0, 0], allow_undiscounted=True))
    assert start[0].tolist() == [0.0, 1.0]


# --- Gymnasium and grid worlds ------------------------------------------------------------------------


def simulate(problem: FiniteMDP, actions: list[int]) -> tuple[list[int], list[float]]:
    """Follow deterministic transitions of the MDP until a terminal state."""
    s, states, rewards = int(problem.initial.argmax()), [], []
    for a in actions:
        rewards.append(problem.R[s, a].item())
        s = int(problem.P[s, a].argmax())
        states.append(s)
        if problem.terminal[s]:
            break
    return states, rewards


def test_frozen_lake_keeps_its_states_and_matches_the_environment() -> None:
    env = gym.make("FrozenLake-v1", is_slippery=False)
    problem = from_gymnasium(env, 0.99)
    assert problem.n_states == 16
    assert problem.terminal.nonzero().flatten().tolist() == [5, 7, 11, 12, 15]
    plan = [1, 1, 2, 1, 2, 2]
    env.reset(seed=0)
    seen = [env.step(a)[:3] for a in plan]
    states, rewards = simulate(problem, plan)
    assert states == [s for s, _, _ in seen]
    assert rewards == [r for _, r, _ in seen]
    assert math.isclose(mdp.policy_iteration(problem).values[0].item(), 0.99**5)


def test_slippery_frozen_lake_undiscounted_is_the_chance_of_success() -> None:
    problem = from_gymnasium(gym.make("FrozenLake-v1"), 1.0, allow_undiscounted=True)
    # 14/17, the known optimum of the 4 x 4 map: V = 0.82 everywhere that one can stay safe.
    assert math.isclose(mdp.policy_iteration(problem).values[0].item(), 14 / 17, abs_tol=1e-12)
    grid = grid_world(
        ["S...", ".H.H", "...H", "H..G"],
        gamma=0.9,
        slip=2 / 3,
        terminals={"G": 1.0, "H": 0.0},
    )
    lake = from_gymnasium(gym.make("FrozenLake-v1"), 0.9)
    torch.testing.assert_close(grid.P, lake.P)
    torch.testing.assert_close(grid.R, lake.R)


def test_done_transitions_never_bootstrap() -> None:
    """The table goes on after *done*; the MDP must not."""
    table = {0: {0: [(1.0, 1, 1.0, True)]}, 1: {0: [(1.0, 0, 100.0, False)]}}
    problem = from_gymnasium(table, 0.9, initial=[1.0, 0.0])
    assert problem.n_states == 3
    values = mdp.policy_evaluation(problem, mdp.uniform_policy(problem))
    torch.testing.assert_close(values.tolist(), [1.0, 100.9, 0.0])


def test_taxi_and_cliff_walking() -> None:
    newest = {
        name: max(i for i in gym.registry if i.startswith(f"{name}-v")) for name in ("CliffWalking", "Taxi")
    }
    cliff = from_gymnasium(gym.make(newest["CliffWalking"]), 1.0, allow_undiscounted=True)
    assert cliff.n_states == 49  # the goal's own state is not terminal in the table
    assert mdp.policy_iteration(cliff).values[36] == -13.0  # Sutton and Barto, 2018, example 6.6
    taxi = from_gymnasium(gym.make(newest["Taxi"]), 1.0, allow_undiscounted=True)
    best = mdp.expected_return(taxi, mdp.policy_iteration(taxi).policy)
    assert math.isclose(best.item(), 7.93, abs_tol=0.01)


# --- Errors -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"P": torch.ones(2, 2)}, r"P must have shape \[S, A, S\]"),
        ({"P": torch.full((2, 1, 2), 0.4)}, r"P\[0, 0\] must sum to 1, got 0.8"),
        ({"P": [[[1.5, -0.5]], [[0.0, 1.0]]]}, "P must hold probabilities >= 0, got -0.5"),
        ({"P": [[[math.nan, 1.0]], [[0.0, 1.0]]]}, "P must hold probabilities"),
        ({"R": [1.0, 0.0]}, r"R must have shape \[S, A\] = \(2, 1\)"),
        ({"R": [[math.inf], [0.0]]}, r"R\[0, 0\] must be finite, got inf"),
        ({"initial": [1.0]}, r"initial must have shape \[S\]"),
        ({"initial": [0.5, 0.4]}, "initial must sum to 1, got 0.9"),
        ({"gamma": 1.01}, r"gamma must lie in \[0, 1\], got 1.01"),
        ({"gamma": math.nan}, r"gamma must lie in \[0, 1\]"),
    ],
)
def test_invalid_mdp(change: dict[str, object], message: str) -> None:
    good = {"P": [[[0.0, 1.0]], [[0.0, 1.0]]], "R": [[1.0], [0.0]], "gamma": 0.9, "initial": [1.0, 0.0]}
    FiniteMDP(**good)
    with pytest.raises(ValueError, match=message):
        FiniteMDP(**(good | change))


def test_invalid_arguments() -> None:
    problem = chain(0.9)
    policy = mdp.uniform_policy(problem)
    with pytest.raises(ValueError, match=r"policy must have shape \[S, A\] = \(3, 2\), got \(2, 3\)"):
        mdp.policy_evaluation(problem, policy.T)
    with pytest.raises(ValueError, match=r"policy\[0\] must sum to 1, got 0.5"):
        mdp.policy_evaluation(problem, policy / 2)
    with pytest.raises(ValueError, match="policy must hold probabilities >= 0"):
        mdp.bellman_expectation(problem, torch.zeros(3, dtype=F64), policy - 1)
    with pytest.raises(ValueError, match="values must be float64"):
        mdp.lookahead(problem, torch.zeros(3))
    with pytest.raises(ValueError, match="tolerance must be > 0, got 0"):
        mdp.value_iteration(problem, tolerance=0.0)
    with pytest.raises(RuntimeError, match="after max_iterations = 2 sweeps"):
        mdp.value_iteration(random_mdp(0, 4, 2, 0.99), max_iterations=2)
    with pytest.raises(RuntimeError, match="still improves after max_iterations = 1"):
        mdp.policy_iteration(problem, torch.eye(2, dtype=F64)[[1, 0, 0]], max_iterations=1)
    with pytest.raises(ValueError, match="n must be >= 1, got 0"):
        mdp.sample_trajectories(problem, policy, 0, max_steps=1)
    with pytest.raises(ValueError, match="toy-text environment or its table P, got CartPoleEnv"):
        from_gymnasium(gym.make("CartPole-v1"), 0.9)
    with pytest.raises(ValueError, match="initial is required"):
        from_gymnasium({0: {0: [(1.0, 0, 0.0, True)]}}, 0.9)


def test_float32_is_accepted_and_made_exact() -> None:
    P = torch.rand(6, 2, 6, generator=torch.Generator().manual_seed(0)).softmax(-1)
    start = torch.full((6,), 1 / 6)
    assert start.double().sum() != 1
    continuing = FiniteMDP(P, torch.ones(6, 2), 0.99, start)
    visits = mdp.occupancy(continuing, mdp.uniform_policy(continuing)).sum()
    assert math.isclose(visits.item(), 100.0, rel_tol=1e-12)
    problem = chain(0.9)
    logits = torch.randn(3, 2, generator=torch.Generator().manual_seed(0))
    assert mdp.policy_evaluation(problem, logits.softmax(-1)).dtype == F64


def everything_of(problem: FiniteMDP) -> dict[str, Tensor]:
    """Every tensor that the module makes from an MDP."""
    theta = torch.linspace(-1, 1, problem.R.numel(), dtype=F64, device=problem.R.device).view_as(problem.R)
    policy, uniform = mdp.softmax_policy(theta), mdp.uniform_policy(problem)
    values = mdp.policy_evaluation(problem, policy)
    generator = torch.Generator(problem.R.device).manual_seed(0)
    episodes = mdp.sample_trajectories(problem, policy, 20, max_steps=9, generator=generator)
    best, iterated = mdp.policy_iteration(problem), mdp.value_iteration(problem)
    assert mdp.error_bound(problem, values) >= 0
    return {
        "P": problem.P,
        "R": problem.R,
        "initial": problem.initial,
        "terminal": problem.terminal,
        "uniform": uniform,
        "greedy": mdp.greedy_policy(problem.R),
        "values": values,
        "q": mdp.action_values(problem, policy),
        "advantages": mdp.advantages(problem, policy),
        "lookahead": mdp.lookahead(problem, values),
        "expectation": mdp.bellman_expectation(problem, values, policy),
        "optimality": mdp.bellman_optimality(problem, values),
        "occupancy": mdp.occupancy(problem, policy),
        "return": mdp.expected_return(problem, policy),
        "gradient": mdp.exact_policy_gradient(problem, theta),
        "difference": mdp.performance_difference(problem, policy, uniform),
        "best": best.values,
        "best policy": best.policy,
        "iterated": iterated.values,
        "greedy for it": iterated.policy,
        **{f"episodes {name}": column for name, column in vars(episodes).items()},
    }


@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_nothing_is_made_on_another_device_than_the_mdps(gamma: float) -> None:
    """Whatever is made without naming a device goes to one where it cannot be computed with."""
    expected = everything_of(chain(gamma))
    problem = chain(gamma)
    cpu = {name: getattr(problem, name) for name in ("P", "R", "initial")}
    with torch.device("meta"):
        found = everything_of(FiniteMDP(**cpu, gamma=gamma))
        # Only P decides: what comes as lists goes where it is.
        lists = FiniteMDP(cpu["P"], cpu["R"].tolist(), gamma, cpu["initial"].tolist())
    assert {lists.P.device.type, lists.R.device.type, lists.initial.device.type} == {"cpu"}
    for name, tensor in found.items():
        assert tensor.device.type == "cpu", name
        assert torch.equal(tensor, expected[name]), name


@pytest.mark.cuda
@pytest.mark.parametrize("gamma", [0.9, 1.0])
def test_an_mdp_on_cuda(gamma: float) -> None:
    problem = chain(gamma)
    expected = everything_of(problem)
    on_cuda = FiniteMDP(problem.P.cuda(), problem.R.tolist(), gamma, problem.initial.tolist())
    for name, tensor in everything_of(on_cuda).items():
        assert tensor.is_cuda, name
        if not name.startswith("episodes"):
            torch.testing.assert_close(tensor.cpu(), expected[name])
