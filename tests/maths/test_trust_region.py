"""The trust-region step against explicit matrices: Fisher by enumerated scores, linear solves, measured KLs."""

from __future__ import annotations

import math
import re
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from policyopt.distributions import Categorical, DiagonalGaussian, Distribution
from policyopt.losses import surrogate_loss
from policyopt.trust_region import (
    conjugate_gradient,
    fisher_vector_product,
    line_search,
    trust_region_step,
)

F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


class TinyPolicy(nn.Module):
    """A two-layer network on 3 features, either kind of action; few parameters, so that F can be written out."""

    def __init__(self, kind: str, seed: int = 0) -> None:
        super().__init__()
        self.kind = kind
        self.network = nn.Sequential(
            nn.Linear(3, 3, dtype=F64), nn.Tanh(), nn.Linear(3, 3 if kind == "categorical" else 2, dtype=F64)
        )
        if kind == "gaussian":
            self.log_std = nn.Parameter(torch.zeros(2, dtype=F64))
        for i, p in enumerate(self.parameters()):
            p.data = 0.7 * normal(100 * seed + i, *p.shape)

    def forward(self, x: Tensor) -> Distribution:
        out = self.network(x)
        return (
            Categorical.from_logits(out)
            if self.kind == "categorical"
            else DiagonalGaussian(out, self.log_std)
        )


def flat(tensors: tuple[Tensor, ...]) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors])


def explicit_fisher(policy: TinyPolicy, states: Tensor) -> Tensor:
    """E[∇ log π ∇ log πᵀ], the mean over the states and the exact expectation over actions.

    Categorical: a sum over the actions. Gaussian: Gauss–Hermite quadrature, exact for the polynomial of degree 4 in
    the action that the product of two scores is.
    """
    parameters = tuple(policy.parameters())
    n = sum(p.numel() for p in parameters)
    fisher = torch.zeros(n, n, dtype=F64)
    for state in states:
        distribution = policy(state)
        if isinstance(distribution, Categorical):
            weighted = [(p.item(), torch.tensor(a)) for a, p in enumerate(distribution.log_probs.exp())]
        else:
            assert isinstance(distribution, DiagonalGaussian)
            root = math.sqrt(3)  # three-point rule in each of the two dimensions
            rule = ((1 / 6, -root), (2 / 3, 0.0), (1 / 6, root))
            weighted = [
                (
                    u * v,
                    (
                        distribution.mean + torch.tensor([x, y], dtype=F64) * distribution.log_std.exp()
                    ).detach(),
                )
                for u, x in rule
                for v, y in rule
            ]
        for probability, action in weighted:
            score = flat(torch.autograd.grad(policy(state).log_prob(action), parameters))
            fisher += probability * torch.outer(score, score) / len(states)
    return fisher


def mean_kl(policy: TinyPolicy, states: Tensor) -> Callable[[], Tensor]:
    old = policy(states).detach()
    return lambda: old.kl(policy(states)).mean()


# --- Fisher-vector product -----------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
@pytest.mark.parametrize("damping", [0.0, 0.1, 2.5])
def test_product_equals_the_explicit_fisher_matrix(kind: str, damping: float) -> None:
    policy, states = TinyPolicy(kind), normal(9, 5, 3)
    fisher = explicit_fisher(policy, states)
    assert fisher.abs().max() > 0.1
    product = fisher_vector_product(mean_kl(policy, states)(), policy.parameters(), damping=damping)
    for seed in range(3):  # may be called any number of times
        v = normal(seed, len(fisher))
        torch.testing.assert_close(product(v), fisher @ v + damping * v)


def test_product_needs_a_scalar_and_no_negative_damping() -> None:
    policy, states = TinyPolicy("categorical"), normal(9, 5, 3)
    with pytest.raises(ValueError, match=r"kl must be a scalar.*\(5,\)"):
        fisher_vector_product(policy(states).detach().kl(policy(states)), policy.parameters())
    with pytest.raises(ValueError, match=r"damping must be >= 0, got -0\.1"):
        fisher_vector_product(mean_kl(policy, states)(), policy.parameters(), damping=-0.1)


# --- Conjugate gradient --------------------------------------------------------------------------------------


@given(seed=st.integers(0, 10_000), n=st.integers(1, 8))
def test_conjugate_gradient_solves(seed: int, n: int) -> None:
    root = normal(seed, n, n)
    a, b = root @ root.T + torch.eye(n, dtype=F64), normal(seed + 1, n)
    result = conjugate_gradient(lambda v: a @ v, b, iterations=4 * n, tolerance=1e-12)
    torch.testing.assert_close(result.solution, torch.linalg.solve(a, b), rtol=1e-7, atol=1e-9)
    assert result.residual_norms[0] == pytest.approx(b.norm().item())
    assert result.residual_norms[-1] == pytest.approx((b - a @ result.solution).norm().item(), abs=1e-9)


def test_conjugate_gradient_minimises_over_the_krylov_space() -> None:
    """After k steps no combination of b, Ab, …, A^{k−1}b has a smaller error in the norm of A."""
    root, b = normal(0, 6, 6), normal(1, 6)
    a = root @ root.T + 0.1 * torch.eye(6, dtype=F64)
    for k in range(1, 5):
        ours = conjugate_gradient(lambda v: a @ v, b, iterations=k, tolerance=0.0).solution
        basis = torch.stack([torch.linalg.matrix_power(a, i) @ b for i in range(k)], dim=1)
        best = basis @ torch.linalg.solve(basis.T @ a @ basis, basis.T @ b)
        torch.testing.assert_close(ours, best, rtol=1e-5, atol=1e-8)


def test_conjugate_gradient_stops_at_its_tolerance() -> None:
    calls = 0

    def matvec(v: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return 2.0 * v

    result = conjugate_gradient(matvec, normal(0, 5), iterations=50)
    assert calls == 1  # a multiple of the identity takes one step
    assert len(result.residual_norms) == 2
    zero = conjugate_gradient(matvec, torch.zeros(3), iterations=5)
    assert zero.solution.tolist() == [0.0, 0.0, 0.0]


def test_conjugate_gradient_errors() -> None:
    b = torch.ones(2)
    with pytest.raises(ValueError, match="iterations must be >= 1, got 0"):
        conjugate_gradient(lambda v: v, b, iterations=0)
    with pytest.raises(ValueError, match="tolerance must be >= 0"):
        conjugate_gradient(lambda v: v, b, tolerance=-1.0)
    for factor in (-1.0, 0.0, math.nan):
        with pytest.raises(FloatingPointError, match=r"matvec must be positive definite.*raise the damping"):
            conjugate_gradient(lambda v, factor=factor: factor * v, b)


# --- Line search ---------------------------------------------------------------------------------------------


def test_line_search_takes_the_first_length_that_passes() -> None:
    """KL = f² and loss = −f: with limit 0.3 the lengths 1, 0.5 give KL 1, 0.25."""
    result = line_search(
        lambda f: (-f, f * f), old_loss=0.0, expected_improvement=1.0, kl_limit=0.3, shrink=0.5
    )
    assert result.accepted
    assert (result.fraction, result.improvement, result.kl) == (0.5, 0.5, 0.25)
    assert result.tried == [(1.0, 1.0, 1.0), (0.5, 0.5, 0.25)]
    assert result.reason == "accepted"


def test_line_search_may_touch_the_limit() -> None:
    assert (
        line_search(lambda f: (-f, 0.25), old_loss=0, expected_improvement=1, kl_limit=0.25).fraction == 1.0
    )


@pytest.mark.parametrize(
    ("loss", "kl", "why"),
    [
        (-1.0, 2.0, "KL 2 above the limit"),
        (0.5, 0.0, "improvement -0.5 below"),
        (0.0, 0.0, "improvement 0 below"),  # no improvement is no reason to move
        (-0.001, 0.0, r"below 0\.1 of the predicted"),
        (math.nan, 0.0, "improvement nan below"),
        (-1.0, math.nan, "KL nan above the limit"),
    ],
)
def test_line_search_refuses(loss: float, kl: float, why: str) -> None:
    result = line_search(
        lambda f: (loss, kl), old_loss=0.0, expected_improvement=1.0, kl_limit=0.01, backtracks=4, shrink=0.9
    )
    assert not result.accepted
    assert (result.fraction, result.improvement, result.kl) == (0.0, 0.0, 0.0)
    assert [f for f, _, _ in result.tried] == pytest.approx([1.0, 0.9, 0.81, 0.729])
    assert re.search(why, result.reason)


def test_line_search_accept_ratio_scales_with_the_length() -> None:
    """The share asked for shrinks with the step: 0.1 · f of the prediction, not 0.1 of the full one."""
    result = line_search(
        lambda f: (-0.2 * f, 0.0 if f < 0.6 else 1.0),
        old_loss=0.0,
        expected_improvement=1.0,
        kl_limit=0.5,
        shrink=0.5,
        accept_ratio=0.15,
    )
    assert result.fraction == 0.5


@pytest.mark.parametrize(
    ("name", "value"),
    [("kl_limit", 0.0), ("kl_limit", math.nan), ("backtracks", 0), ("shrink", 1.0), ("accept_ratio", 1.0)],
)
def test_line_search_errors(name: str, value: float) -> None:
    arguments = {"old_loss": 0.0, "expected_improvement": 1.0, "kl_limit": 0.01, name: value}
    with pytest.raises(ValueError, match=rf"{name} must .*got {value}"):
        line_search(lambda f: (0.0, 0.0), **arguments)  # type: ignore[arg-type]


# --- The whole step ------------------------------------------------------------------------------------------


def problem(kind: str, seed: int) -> tuple[TinyPolicy, Tensor, Callable[[], tuple[Tensor, Tensor]]]:
    policy, states = TinyPolicy(kind, seed), normal(seed + 50, 30, 3)
    old = policy(states).detach()
    actions, advantages = old.sample(generator(seed)), normal(seed + 51, 30)
    old_log_prob = old.log_prob(actions)

    def loss_and_kl() -> tuple[Tensor, Tensor]:
        new = policy(states)
        loss = surrogate_loss(new.log_prob(actions), old_log_prob, advantages).loss.mean()
        return loss, old.kl(new).mean()

    return policy, states, loss_and_kl


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_step_is_the_natural_gradient(kind: str) -> None:
    """Small enough for the quadratic model to be exact: the step is the one that linear algebra gives."""
    policy, states, loss_and_kl = problem(kind, 0)
    parameters, limit, damping = tuple(policy.parameters()), 1e-8, 0.1
    before = flat(parameters).detach().clone()
    loss, _ = loss_and_kl()
    g = flat(torch.autograd.grad(loss, parameters))
    damped = explicit_fisher(policy, states) + damping * torch.eye(len(g), dtype=F64)
    x = torch.linalg.solve(damped, g)
    expected = -math.sqrt(2 * limit / (x @ damped @ x)) * x

    step = trust_region_step(
        parameters, loss_and_kl, kl_limit=limit, damping=damping, cg_iterations=100, shrink=0.5
    )
    torch.testing.assert_close(flat(parameters).detach() - before, expected, rtol=1e-3, atol=1e-9)
    assert step.search.accepted
    assert step.search.fraction == 1.0
    assert step.gradient_norm == pytest.approx(g.norm().item())
    assert step.expected_improvement == pytest.approx(-(g @ expected).item(), rel=1e-3)
    assert step.search.improvement == pytest.approx(step.expected_improvement, rel=1e-2)
    assert step.residual < 1e-4
    # What the damping takes from the KL's quadratic model, the step does not use.
    fisher = damped - damping * torch.eye(len(g), dtype=F64)
    assert step.search.kl == pytest.approx((expected @ fisher @ expected / 2).item(), rel=1e-2)


@given(
    seed=st.integers(0, 1000),
    kind=st.sampled_from(["categorical", "gaussian"]),
    kl_limit=st.floats(1e-4, 2.0),
    damping=st.floats(1e-3, 10.0),
    cg_iterations=st.integers(1, 20),
)
def test_measured_kl_never_exceeds_the_limit(
    seed: int, kind: str, kl_limit: float, damping: float, cg_iterations: int
) -> None:
    policy, states, loss_and_kl = problem(kind, seed)
    frozen = TinyPolicy(kind)
    frozen.load_state_dict({k: v.clone() for k, v in policy.state_dict().items()})
    before, (old_loss, _) = flat(tuple(policy.parameters())).detach().clone(), loss_and_kl()
    step = trust_region_step(
        policy.parameters(), loss_and_kl, kl_limit=kl_limit, damping=damping, cg_iterations=cg_iterations
    )
    kl = torch.distributions.kl_divergence(*(as_torch(p(states)) for p in (frozen, policy))).mean().item()
    assert kl <= kl_limit * (1 + 1e-9)
    assert step.search.kl == pytest.approx(kl, rel=1e-9, abs=1e-14)
    if step.search.accepted:
        assert loss_and_kl()[0] < old_loss
        assert step.search.improvement == pytest.approx((old_loss - loss_and_kl()[0]).item())
        # Where the search starts, and that lengths shrink by 0.8 from there.
        assert [f for f, _, _ in step.search.tried] == pytest.approx(
            [0.8**k for k in range(len(step.search.tried))]
        )
    else:
        assert torch.equal(flat(tuple(policy.parameters())), before)


def as_torch(d: Distribution) -> torch.distributions.Distribution:
    if isinstance(d, Categorical):
        return torch.distributions.Categorical(logits=d.log_probs)
    assert isinstance(d, DiagonalGaussian)
    return torch.distributions.Independent(torch.distributions.Normal(d.mean, d.log_std.exp()), 1)


def test_a_refused_step_leaves_the_parameters_bit_identical() -> None:
    policy, _, loss_and_kl = problem("gaussian", 1)
    before = [p.detach().clone() for p in policy.parameters()]
    first = True

    def never_better() -> tuple[Tensor, Tensor]:
        nonlocal first
        loss, kl = loss_and_kl()
        first, was_first = False, first
        return (loss if was_first else loss.detach() + 10.0), kl

    step = trust_region_step(policy.parameters(), never_better, backtracks=7)
    assert not step.search.accepted
    assert len(step.search.tried) == 7
    assert all(torch.equal(p, b) for p, b in zip(policy.parameters(), before, strict=True))


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_a_search_that_breaks_off_leaves_the_parameters_bit_identical(error: type[BaseException]) -> None:
    policy, _, loss_and_kl = problem("categorical", 1)
    before = [p.detach().clone() for p in policy.parameters()]
    calls = 0

    def interrupted() -> tuple[Tensor, Tensor]:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise error
        loss, kl = loss_and_kl()
        return loss, kl if calls == 1 else kl + 100.0

    with pytest.raises(error):
        trust_region_step(policy.parameters(), interrupted)
    assert all(torch.equal(p, b) for p, b in zip(policy.parameters(), before, strict=True))


def test_no_gradient_means_no_step() -> None:
    policy, states, _ = problem("categorical", 0)
    old = policy(states).detach()
    step = trust_region_step(
        policy.parameters(), lambda: (0.0 * policy(states).entropy().mean(), old.kl(policy(states)).mean())
    )
    assert not step.search.accepted
    assert step.search.reason == "the gradient is zero"
    assert step.gradient_norm == 0.0


def test_nan_is_reported_before_anything_moves() -> None:
    policy, _, loss_and_kl = problem("categorical", 0)
    before = flat(tuple(policy.parameters())).detach().clone()
    with pytest.raises(FloatingPointError, match="gradient is not finite"):
        trust_region_step(policy.parameters(), lambda: (loss_and_kl()[0] * math.nan, loss_and_kl()[1]))
    assert torch.equal(flat(tuple(policy.parameters())), before)
