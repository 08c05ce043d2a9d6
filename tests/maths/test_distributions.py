"""Categorical and diagonal Gaussian distributions against torch.distributions, finite differences and counting."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch import distributions as reference

from policyopt.distributions import Categorical, DiagonalGaussian

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
    [Categorical.from_logits(torch.zeros(64, 3)), DiagonalGaussian(torch.zeros(64, 2), torch.zeros(2))],
)
def test_the_generator_alone_decides_the_samples(distribution: Categorical | DiagonalGaussian) -> None:
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
