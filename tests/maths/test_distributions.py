"""Action distributions against torch.distributions, enumeration, finite differences and counting."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch import distributions as reference

from policyopt.distributions import Categorical, DiagonalGaussian, MultiCategorical

F64 = torch.float64


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


shapes = st.sampled_from([(), (1,), (4,), (3, 2)])


@given(
    seed=st.integers(0, 10_000), batch=shapes, k=st.integers(1, 6), scale=st.sampled_from([0.1, 1.0, 30.0])
)
def test_categorical_agrees_with_torch(seed: int, batch: tuple[int, ...], k: int, scale: float) -> None:
    logits, other = scale * normal(seed, *batch, k), normal(seed + 1, *batch, k)
    ours, theirs = Categorical.from_logits(logits), reference.Categorical(logits=logits)
    actions = torch.randint(k, batch, generator=generator(seed))
    torch.testing.assert_close(ours.log_prob(actions), theirs.log_prob(actions))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    kl = reference.kl_divergence(theirs, reference.Categorical(logits=other))
    torch.testing.assert_close(ours.kl(Categorical.from_logits(other)), kl)
    assert torch.equal(ours.mode(), logits.argmax(-1))
    assert ours.sample(generator(seed)).shape == torch.Size(batch)


@given(seed=st.integers(0, 10_000), batch=shapes, d=st.integers(1, 4), shared=st.booleans())
def test_gaussian_agrees_with_torch(seed: int, batch: tuple[int, ...], d: int, shared: bool) -> None:
    shape = (d,) if shared else (*batch, d)  # a policy has one log σ for all states
    mean, log_std = normal(seed, *batch, d), normal(seed + 1, *shape)
    other_mean, other_log_std = normal(seed + 2, *batch, d), normal(seed + 3, *shape)
    ours = DiagonalGaussian(mean, log_std)
    theirs = reference.Independent(reference.Normal(mean, log_std.exp()), 1)
    actions = normal(seed + 4, *batch, d)
    torch.testing.assert_close(ours.log_prob(actions), theirs.log_prob(actions))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())
    kl = reference.kl_divergence(
        theirs, reference.Independent(reference.Normal(other_mean, other_log_std.exp()), 1)
    )
    torch.testing.assert_close(ours.kl(DiagonalGaussian(other_mean, other_log_std)), kl)
    assert torch.equal(ours.mode(), mean)
    assert ours.sample(generator(seed)).shape == mean.shape


def test_kl_has_the_direction_that_it_says() -> None:
    """KL(self ‖ other) is the mean under self; the two directions differ."""
    p, q = torch.tensor([0.9, 0.1], dtype=F64), torch.tensor([0.5, 0.5], dtype=F64)
    forward = (p * (p / q).log()).sum()
    torch.testing.assert_close(Categorical(p.log()).kl(Categorical(q.log())), forward)
    # From N(0, 1) to N(1, 2²): log 2 + (1 + 1) / 8 − 1/2.
    unit = DiagonalGaussian(torch.zeros(1, dtype=F64), torch.zeros(1, dtype=F64))
    wide = DiagonalGaussian(torch.ones(1, dtype=F64), torch.full((1,), 2.0, dtype=F64).log())
    assert unit.kl(wide).item() == pytest.approx(0.6931471805599453 + 0.25 - 0.5)
    assert wide.kl(unit).item() == pytest.approx(-0.6931471805599453 + 2.5 - 0.5)


def test_kl_gradients_by_finite_differences() -> None:
    logits, other = (normal(i, 3).requires_grad_() for i in (0, 1))
    mean, log_std, mean2, log_std2 = (normal(i, 2).requires_grad_() for i in (2, 3, 4, 5))
    assert torch.autograd.gradcheck(
        lambda a, b: Categorical.from_logits(a).kl(Categorical.from_logits(b)), (logits, other)
    )
    assert torch.autograd.gradcheck(
        lambda a, b, c, d: DiagonalGaussian(a, b).kl(DiagonalGaussian(c, d)), (mean, log_std, mean2, log_std2)
    )


def test_categorical_sampling_frequencies() -> None:
    n = 40_000
    p = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0])
    draws = Categorical(p.log().expand(n, 5)).sample(generator(0))
    counts = torch.bincount(draws, minlength=5)
    assert counts[4] == 0
    z = (counts[:4] - n * p[:4]) / (n * p[:4] * (1 - p[:4])).sqrt()
    assert z.abs().max() < 4


def test_categorical_samples_are_independent_over_the_batch() -> None:
    log_probs = torch.tensor([0.5, 0.5]).log().expand(20_000, 2, 2)
    first, second = Categorical(log_probs).sample(generator(1)).unbind(-1)
    assert abs((first == second).double().mean() - 0.5) < 4 * 0.5 / 20_000**0.5


def test_gaussian_sampling_moments() -> None:
    n = 40_000
    mean, log_std = torch.tensor([1.0, -2.0]), torch.tensor([0.0, 1.0])
    draws = DiagonalGaussian(mean.expand(n, 2), log_std).sample(generator(0))
    std = log_std.exp()
    assert ((draws.mean(0) - mean) / std * n**0.5).abs().max() < 4
    assert ((draws.var(0) / std.square() - 1) * (n / 2) ** 0.5).abs().max() < 4


@pytest.mark.parametrize(
    "distribution",
    [
        Categorical.from_logits(torch.zeros(64, 3)),
        MultiCategorical(Categorical.from_logits(torch.zeros(64, 2, 3))),
        DiagonalGaussian(torch.zeros(64, 2), torch.zeros(2)),
    ],
    ids=lambda distribution: type(distribution).__name__,
)
def test_the_generator_alone_decides_the_samples(
    distribution: Categorical | MultiCategorical | DiagonalGaussian,
) -> None:
    state = torch.get_rng_state()
    first = distribution.sample(generator(3))
    torch.manual_seed(123)
    assert torch.equal(distribution.sample(generator(3)), first)
    assert not torch.equal(distribution.sample(generator(4)), first)
    torch.set_rng_state(state)
    distribution.sample(generator(3))
    assert torch.equal(torch.get_rng_state(), state)  # the global generator is left alone


def test_detached_copies_do_not_follow_the_parameters() -> None:
    """A Gaussian policy hands out its log σ itself; the "old" policy must not move with it."""
    log_std = torch.nn.Parameter(torch.zeros(2))
    logits = torch.nn.Parameter(torch.zeros(3).log_softmax(-1))
    gaussian, categorical = DiagonalGaussian(torch.zeros(2), log_std).detach(), Categorical(logits).detach()
    with torch.no_grad():
        log_std.fill_(5.0)
        logits.fill_(5.0)
    assert not gaussian.log_std.requires_grad
    assert not categorical.log_probs.requires_grad
    assert gaussian.log_std.tolist() == [0.0, 0.0]
    assert categorical.log_probs.max() < 0


def test_kl_between_kinds_is_refused() -> None:
    gaussian = DiagonalGaussian(torch.zeros(2), torch.zeros(2))
    categorical = Categorical.from_logits(torch.zeros(2))
    with pytest.raises(ValueError, match=r"other must be a Categorical.*DiagonalGaussian"):
        categorical.kl(gaussian)
    with pytest.raises(ValueError, match=r"other must be a DiagonalGaussian.*Categorical"):
        gaussian.kl(categorical)
    with pytest.raises(ValueError, match=r"other must be a MultiCategorical, got Categorical"):
        MultiCategorical(categorical).kl(categorical)


# --- Masks ---


@given(
    seed=st.integers(0, 10_000), batch=shapes, k=st.integers(1, 6), scale=st.sampled_from([0.1, 30.0, 1e4])
)
def test_a_mask_leaves_the_distribution_over_what_is_allowed(
    seed: int, batch: tuple[int, ...], k: int, scale: float
) -> None:
    """Each item beside the softmax of its allowed logits alone."""
    g = generator(seed)
    logits, other = scale * normal(seed, *batch, k), normal(seed + 1, *batch, k)
    mask = torch.rand(*batch, k, generator=g) < 0.5
    mask.scatter_(-1, torch.randint(k, (*batch, 1), generator=g), True)
    ours, theirs = (Categorical.from_logits(x, mask) for x in (logits, other))
    assert ours.log_probs.exp()[~mask].eq(0).all()
    rows = zip(*(x.reshape(-1, k) for x in (logits, other, mask)), strict=True)
    alone = [[Categorical.from_logits(x[m]) for x in (a, b)] for a, b, m in rows]
    expected = torch.cat([p.log_probs for p, _ in alone])
    torch.testing.assert_close(ours.log_probs[mask], expected)
    for found, each in [
        (ours.entropy(), [p.entropy() for p, _ in alone]),
        (ours.kl(theirs), [p.kl(q) for p, q in alone]),
    ]:
        torch.testing.assert_close(found.reshape(-1), torch.stack(each))
    for actions in (ours.mode(), ours.sample(g)):
        assert mask.gather(-1, actions.unsqueeze(-1)).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, F64])
@pytest.mark.parametrize("scale", [1.0, 100.0])
def test_derivatives_by_masked_logits_are_those_by_the_allowed_ones(dtype: torch.dtype, scale: float) -> None:
    """The first and the second, which the Fisher matrix needs: finite, and 0 by logits that are masked."""
    mask = torch.tensor([True, False, True, True, False])
    logits, other = ((scale * normal(i, 5)).to(dtype) for i in (0, 1))

    def derivatives(x: Tensor, y: Tensor, action: int, allowed: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        x, found = x.clone().requires_grad_(), []
        p, q = (Categorical.from_logits(z, allowed) for z in (x, y))
        for score in (p.log_prob(torch.tensor(action)), p.entropy(), p.kl(q), q.kl(p)):
            # What comes after may have a large derivative of its own.
            (gradient,) = torch.autograd.grad(100 * score, x, create_graph=True)
            rows = [torch.autograd.grad(entry, x, retain_graph=True)[0] for entry in gradient]
            found.append((gradient.detach(), torch.stack(rows)))
        return found

    masked = derivatives(logits, other, 3, mask)
    alone = derivatives(logits[mask], other[mask], 2, None)
    for (gradient, hessian), (expected, curvature) in zip(masked, alone, strict=True):
        assert torch.isfinite(gradient).all()
        assert torch.isfinite(hessian).all()
        assert not gradient[~mask].any()
        assert not hessian[~mask].any()
        assert not hessian[:, ~mask].any()
        if dtype == F64:
            torch.testing.assert_close(gradient[mask], expected)
            torch.testing.assert_close(hessian[mask][:, mask], curvature)


# --- Several choices ---

SIZES = (2, 3, 1)
EXISTS = torch.arange(3) < torch.tensor(SIZES)[:, None]
JOINT = torch.tensor(list(itertools.product(*map(range, SIZES))))


def joint(logits: Tensor, allowed: Tensor) -> Tensor:
    """Probability of each joint action by enumeration, with nothing of ours."""
    rows = []
    for action in JOINT.tolist():
        total = torch.tensor(1.0, dtype=F64)
        for d, value in enumerate(action):
            weights = logits[d].exp() * allowed[d]
            total = total * weights[value] / weights.sum()
        rows.append(total)
    return torch.stack(rows)


@pytest.mark.parametrize("masked", [False, True])
@given(seed=st.integers(0, 10_000))
def test_several_choices_agree_with_the_enumeration_of_joint_actions(masked: bool, seed: int) -> None:
    allowed = EXISTS.clone()
    if masked:
        allowed[1, seed % 3] = False
    logits, other = (normal(seed + i, 3, 3).requires_grad_() for i in (0, 1))
    ours, theirs = (MultiCategorical(Categorical.from_logits(x, allowed)) for x in (logits, other))
    p, q = joint(logits, allowed), joint(other, allowed)
    possible = p > 0
    assert possible.sum() == (4 if masked else 6)
    log_prob = MultiCategorical(Categorical(ours.factors.log_probs.expand(len(JOINT), 3, 3))).log_prob(JOINT)
    torch.testing.assert_close(log_prob.exp(), p)
    p, q = p[possible], q[possible]
    pairs = [
        (log_prob[possible], p.log()),
        (ours.entropy(), -(p * p.log()).sum()),
        (ours.kl(theirs), (p * (p / q).log()).sum()),
    ]
    for found, expected in pairs:
        torch.testing.assert_close(found, expected)
        weights = torch.arange(1, 1 + found.numel(), dtype=F64).reshape(found.shape)
        for x in (logits, other):
            gradients = [
                torch.autograd.grad((y * weights).sum(), x, retain_graph=True, allow_unused=True)[0]
                for y in (found, expected)
            ]
            if gradients[0] is None or gradients[1] is None:
                assert gradients[0] is gradients[1] is None
                continue
            torch.testing.assert_close(*gradients)
    best = JOINT[joint(logits, allowed).argmax()]
    assert torch.equal(ours.mode(), best)


def test_several_choices_are_drawn_independently_and_detached() -> None:
    n, logits = 20_000, torch.nn.Parameter(torch.zeros(3, 3))
    frozen = MultiCategorical(Categorical.from_logits(logits, EXISTS)).detach()
    with torch.no_grad():
        logits.fill_(5.0)
    assert not frozen.factors.log_probs.requires_grad
    draws = MultiCategorical(Categorical(frozen.factors.log_probs.expand(n, 3, 3))).sample(generator(0))
    assert draws.shape == (n, 3)
    counts = torch.stack([(draws == action).all(-1).sum() for action in JOINT])
    assert counts.sum() == n
    z = (counts - n / 6) / (n * (1 / 6) * (5 / 6)) ** 0.5
    assert z.abs().max() < 4
