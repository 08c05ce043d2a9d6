"""Language-model objectives by enumeration: every completion of a tiny model summed, nothing sampled.

The vocabulary is {EOS, a, b} and a completion ends at EOS or after three tokens, which makes 15 completions. The
policy is a table of logits, one row per state (= what was written before), so it can represent every distribution
over the 15. Padding holds NaN throughout: whatever is not masked out shows.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any, Literal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from policyopt.estimators import (
    discounted_returns,
    group_relative_advantages,
    importance_weights,
    kl_estimate,
    kl_shaped_rewards,
    leave_one_out_advantages,
    sequence_log_prob,
)
from policyopt.losses import (
    aggregate,
    bradley_terry_loss,
    clipped_surrogate_loss,
    dpo_loss,
    kto_loss,
    orpo_loss,
    policy_gradient_loss,
    ranking_loss,
    sequence_log_ratio,
)

F64 = torch.float64
STEPS = 3
EOS = 0


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=F64)


def enumerate_completions() -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, mask and states, each [15, 3]; padding repeats token and state 0."""
    states = [p for n in range(STEPS) for p in itertools.product((1, 2), repeat=n)]
    completions = [(*p, EOS) for p in states] + list(itertools.product((1, 2), repeat=STEPS))
    tokens, state = (torch.zeros(len(completions), STEPS, dtype=torch.long) for _ in range(2))
    mask = torch.zeros(len(completions), STEPS, dtype=torch.bool)
    for i, completion in enumerate(completions):
        for t, token in enumerate(completion):
            tokens[i, t], state[i, t], mask[i, t] = token, states.index(completion[:t]), True
    return tokens, mask, state


TOKENS, MASK, STATE = enumerate_completions()
N = len(TOKENS)
LENGTH = MASK.sum(-1)
N_STATES = int(STATE.max()) + 1
PAIRS = torch.cartesian_prod(torch.arange(N), torch.arange(N))  # every group of two samples

THETA = normal(0, N_STATES, 3)
REFERENCE = normal(1, N_STATES, 3)
REWARD = normal(2, N)


def token_log_probs(theta: Tensor) -> Tensor:
    """log π of each token of each completion, [15, 3]; NaN at padding."""
    return torch.where(MASK, theta.log_softmax(-1)[STATE, TOKENS], torch.nan)


def log_probs(theta: Tensor) -> Tensor:
    """log π of each completion, [15], without the package's help."""
    return torch.stack(
        [
            sum(row[:n], torch.zeros((), dtype=F64))
            for row, n in zip(token_log_probs(theta), LENGTH, strict=True)
        ]
    )


def gradient(function: Callable[[Tensor], Tensor], theta: Tensor = THETA) -> Tensor:
    theta = theta.clone().requires_grad_()
    (result,) = torch.autograd.grad(function(theta), theta)
    return result


def per_token(values: Tensor) -> Tensor:
    """One value per completion, repeated for each of its tokens; NaN at padding."""
    return torch.where(MASK, values.unsqueeze(-1), torch.nan)


PROBABILITY = log_probs(THETA).exp()
EXPECTED_REWARD_GRADIENT = gradient(lambda theta: log_probs(theta).exp() @ REWARD)


def expected_update(weights: Tensor) -> Tensor:
    """−∇ of the token-level loss, summed over tokens, in expectation over completions."""

    def loss(theta: Tensor) -> Tensor:
        losses = policy_gradient_loss(token_log_probs(theta), weights)
        return -aggregate(PROBABILITY.unsqueeze(-1) * losses, MASK, reduction="sum")

    return gradient(loss)


def cosine(x: Tensor, y: Tensor) -> float:
    return float(torch.nn.functional.cosine_similarity(x.flatten(), y.flatten(), dim=0))


def test_the_enumeration_is_complete() -> None:
    assert (N, N_STATES) == (15, 7)
    assert len({tuple(row[:n].tolist()) for row, n in zip(TOKENS, LENGTH, strict=True)}) == N
    assert PROBABILITY.sum().item() == pytest.approx(1.0)
    torch.testing.assert_close(sequence_log_prob(token_log_probs(THETA), MASK), log_probs(THETA))


# --- Policy gradients over completions ------------------------------------------------------------------------


def test_the_token_level_loss_has_the_exact_policy_gradient() -> None:
    torch.testing.assert_close(expected_update(per_token(REWARD)), EXPECTED_REWARD_GRADIENT)
    torch.testing.assert_close(expected_update(per_token(REWARD + 7)), EXPECTED_REWARD_GRADIENT)  # a baseline


def group_update(
    advantages: Tensor, reduction: Literal["mean", "sequence-mean"], denominator: float | None = None
) -> Tensor:
    """Expected update of groups of two samples: what a trainer does with a group, averaged over all 225 groups."""

    def loss(theta: Tensor) -> Tensor:
        token_log_prob = token_log_probs(theta)
        total = torch.zeros((), dtype=F64)
        for pair, weights in zip(PAIRS, advantages, strict=True):
            losses = policy_gradient_loss(token_log_prob[pair], weights.unsqueeze(-1).expand(2, STEPS))
            total = total - PROBABILITY[pair].prod() * aggregate(
                losses, MASK[pair], reduction=reduction, denominator=denominator
            )
        return total

    return gradient(loss)


def test_leave_one_out_with_a_constant_denominator_is_unbiased() -> None:
    """RLOO and Dr. GRPO: Σ over tokens divided by a constant, here the 2 sequences."""
    update = group_update(leave_one_out_advantages(REWARD[PAIRS]), "mean", denominator=2)
    torch.testing.assert_close(update, EXPECTED_REWARD_GRADIENT)


def test_the_group_mean_shrinks_the_gradient_by_k_minus_one_over_k() -> None:
    update = group_update(group_relative_advantages(REWARD[PAIRS], scale=False), "mean", denominator=2)
    torch.testing.assert_close(update, EXPECTED_REWARD_GRADIENT / 2)


def test_dividing_by_the_groups_deviation_bends_the_gradient() -> None:
    update = group_update(group_relative_advantages(REWARD[PAIRS]), "mean", denominator=2)
    assert cosine(update, EXPECTED_REWARD_GRADIENT) < 0.99


def test_the_sequence_mean_follows_another_objective() -> None:
    """GRPO's 1/|y| inside the sum: the update is ∇E[r/|y|] − J ∇E[1/|y|], not ∇J (Liu et al. 2025, §3.1)."""
    update = group_update(leave_one_out_advantages(REWARD[PAIRS]), "sequence-mean", denominator=2)
    j = PROBABILITY @ REWARD
    other = gradient(lambda theta: log_probs(theta).exp() @ ((REWARD - j) / LENGTH))
    torch.testing.assert_close(update, other)
    assert cosine(update, EXPECTED_REWARD_GRADIENT) < 0.95


def test_the_token_mean_is_biased_in_small_groups() -> None:
    """DAPO's denominator, the number of tokens, depends on the samples: a ratio of two random numbers."""
    update = group_update(leave_one_out_advantages(REWARD[PAIRS]), "mean")
    assert cosine(update, EXPECTED_REWARD_GRADIENT) < 0.999


def test_the_sequence_mean_lets_long_failures_off_lightly() -> None:
    """Two failures among successes: per token, the longer one is pushed down less. Not so with a constant."""
    pair = torch.stack([LENGTH.argmax(), LENGTH.argmin()])
    cases: list[tuple[Any, float]] = [("sequence-mean", 1 / STEPS), ("mean", 1.0)]
    for reduction, expected in cases:
        log_prob = token_log_probs(THETA)[pair].requires_grad_()
        losses = policy_gradient_loss(log_prob, -torch.ones_like(log_prob))
        loss = aggregate(losses, MASK[pair], reduction=reduction, denominator=2)
        (slope,) = torch.autograd.grad(loss, log_prob)
        assert (slope[0, 0] / slope[1, 0]).item() == pytest.approx(expected)


def test_truncated_importance_weights() -> None:
    """Samples from another policy: weights without a cap make the one-step update exact, a cap biases it."""
    new, sampler = normal(3, 3).log_softmax(-1), normal(4, 3).log_softmax(-1)
    reward = REWARD[:3]

    def update(cap: float) -> Tensor:
        def loss(logits: Tensor) -> Tensor:
            log_prob = logits.log_softmax(-1)
            weights = importance_weights(log_prob, sampler, cap=cap)
            return -(sampler.exp() @ (weights * policy_gradient_loss(log_prob, reward)))

        return gradient(loss, new)

    exact = gradient(lambda logits: logits.softmax(-1) @ reward, new)
    torch.testing.assert_close(update(math.inf), exact)
    assert (new - sampler).exp().max() > 1.2
    assert (update(1.0) - exact).abs().max() > 0.01


# --- KL over completions --------------------------------------------------------------------------------------


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    return (log_p.exp() * (log_p - log_q)).sum()


SEQUENCE_KL = kl(log_probs(THETA), log_probs(REFERENCE))


def test_the_kl_of_completions_from_samples() -> None:
    """k1 and k3 are unbiased, of whole completions and summed over tokens alike; k2 is not."""
    token_p, token_q = token_log_probs(THETA), token_log_probs(REFERENCE)
    for kind, exact in (("k1", True), ("k2", False), ("k3", True)):
        summed = sequence_log_prob(kl_estimate(token_p, token_q, kind), MASK)  # type: ignore[arg-type]
        whole = kl_estimate(log_probs(THETA), log_probs(REFERENCE), kind)  # type: ignore[arg-type]
        for estimate in (PROBABILITY @ summed, PROBABILITY @ whole):
            if exact:
                torch.testing.assert_close(estimate, SEQUENCE_KL)
            else:
                assert abs(estimate - SEQUENCE_KL) > 0.05


def state_kl(theta: Tensor, reverse: bool) -> Tensor:
    """Σ over the states that the *fixed* policy visits of the KL between the next-token distributions."""
    p, q = theta.log_softmax(-1), REFERENCE.log_softmax(-1)
    divergence = (q.exp() * (q - p)).sum(-1) if reverse else (p.exp() * (p - q)).sum(-1)
    visits = torch.zeros(N_STATES, dtype=F64)
    visits.index_add_(0, STATE[MASK], PROBABILITY.unsqueeze(-1).expand(-1, STEPS)[MASK])
    return visits @ divergence


def test_gradients_of_kl_penalties_over_completions() -> None:
    """A KL estimate put in the loss. Of whole completions: k1 gives 0, k2 ∇KL(π‖ref), k3 ∇KL(ref‖π).

    Summed over tokens the same holds at each state that the policy visits, but the visits count as fixed: what a
    token does to the KL of those after it is left out. So no choice of k makes the per-token sum exact.
    """
    log_q = log_probs(REFERENCE)
    to_reference = gradient(lambda theta: kl(log_probs(theta), log_q))
    from_reference = gradient(lambda theta: kl(log_q, log_probs(theta)))

    def whole(kind: Any) -> Tensor:
        return gradient(lambda theta: PROBABILITY @ kl_estimate(log_probs(theta), log_q, kind))

    def summed(kind: Any) -> Tensor:
        def penalty(theta: Tensor) -> Tensor:
            tokens = kl_estimate(token_log_probs(theta), token_log_probs(REFERENCE), kind)
            return PROBABILITY @ sequence_log_prob(tokens, MASK)

        return gradient(penalty)

    zero = torch.zeros_like(THETA)
    torch.testing.assert_close(whole("k1"), zero)
    torch.testing.assert_close(whole("k2"), to_reference)
    torch.testing.assert_close(whole("k3"), from_reference)
    torch.testing.assert_close(summed("k1"), zero)
    torch.testing.assert_close(summed("k2"), gradient(lambda theta: state_kl(theta, reverse=False)))
    torch.testing.assert_close(summed("k3"), gradient(lambda theta: state_kl(theta, reverse=True)))
    for kind in ("k2", "k3"):
        for exact in (to_reference, from_reference):
            assert (summed(kind) - exact).abs().max() > 0.01


@pytest.mark.parametrize("reward_to_go", [True, False])
def test_kl_shaped_rewards_have_the_gradient_of_the_regularised_objective(reward_to_go: bool) -> None:
    beta = 0.3
    exact = gradient(
        lambda theta: log_probs(theta).exp() @ REWARD - beta * kl(log_probs(theta), log_probs(REFERENCE))
    )

    def update(kind: Any) -> Tensor:
        rewards = kl_shaped_rewards(
            REWARD, token_log_probs(THETA), token_log_probs(REFERENCE), MASK, beta=beta, kind=kind
        )
        last = torch.arange(STEPS) == LENGTH.unsqueeze(-1) - 1
        returns = (
            discounted_returns(rewards.T, last.T, gamma=1.0).T if reward_to_go else per_token(rewards.sum(-1))
        )
        return expected_update(returns)

    torch.testing.assert_close(update("k1"), exact)
    assert (update("k3") - exact).abs().max() > 0.01  # unbiased for the KL itself, not for its gradient


# --- The sequence-level ratio (GSPO) --------------------------------------------------------------------------


def test_sequence_ratio_is_the_geometric_mean_of_the_tokens() -> None:
    new, old = token_log_probs(THETA), token_log_probs(REFERENCE)
    ratio = sequence_log_ratio(new, old, MASK).exp()
    expected = ((log_probs(THETA) - log_probs(REFERENCE)) / LENGTH).exp()
    torch.testing.assert_close(ratio[MASK], per_token(expected)[MASK])
    assert (ratio[~MASK] == 1).all()
    assert (sequence_log_ratio(new, new, MASK) == 0).all()  # exactly 1 at the first update


@pytest.mark.parametrize("reduction", ["mean", "sequence-mean"])
def test_sequence_ratio_has_the_gradient_of_gspo_and_of_gspo_token(reduction: Any) -> None:
    advantages = per_token(REWARD)
    old = token_log_probs(THETA + 0.3 * normal(5, N_STATES, 3))

    def ours(theta: Tensor) -> Tensor:
        log_ratio = sequence_log_ratio(token_log_probs(theta), old, MASK)
        out = clipped_surrogate_loss(log_ratio, torch.zeros_like(log_ratio), advantages, clip_ratio=0.05)
        assert 0 < out.clipped[MASK].mean() < 1
        return aggregate(out.loss, MASK, reduction=reduction)

    def gspo_token(theta: Tensor) -> Tensor:
        """Each token has the sequence's ratio as its value, and its own gradient."""
        log_prob = token_log_probs(theta)
        mean = torch.where(MASK, log_prob - old, 0.0).sum(-1) / LENGTH
        log_ratio = torch.where(MASK, mean.detach().unsqueeze(-1) + log_prob - log_prob.detach(), 0.0)
        out = clipped_surrogate_loss(log_ratio, torch.zeros_like(log_ratio), advantages, clip_ratio=0.05)
        return aggregate(out.loss, MASK, reduction=reduction)

    def gspo(theta: Tensor) -> Tensor:
        """Eq. 5 of the paper: one term per sequence."""
        s = ((log_probs(theta) - torch.where(MASK, old, 0.0).sum(-1)) / LENGTH).exp()
        return -torch.minimum(s * REWARD, s.clamp(0.95, 1.05) * REWARD).mean()

    torch.testing.assert_close(gradient(ours), gradient(gspo_token))
    if reduction == "sequence-mean":
        torch.testing.assert_close(gradient(ours), gradient(gspo))


def test_no_gradient_reaches_the_old_policy_through_the_sequence_ratio() -> None:
    old = torch.where(MASK, token_log_probs(REFERENCE), 0.0).requires_grad_()
    new = torch.where(MASK, token_log_probs(THETA), 0.0).requires_grad_()
    sequence_log_ratio(new, old, MASK).sum().backward()
    assert old.grad is None
    assert new.grad is not None


def test_sequence_ratio_checks_its_shapes() -> None:
    row, mask = torch.zeros(2, 3), torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match="old_log_prob must have the shape of log_prob"):
        sequence_log_ratio(row, row[:1], mask)
    with pytest.raises(ValueError, match="mask must have the shape of log_prob"):
        sequence_log_ratio(row, row, mask[:1])


# --- Preferences: DPO and its relatives -----------------------------------------------------------------------

KINDS = ["sigmoid", "ipo", "hinge"]


def minimise(loss: Callable[[Tensor], Tensor], start: Tensor) -> Tensor:
    theta = start.clone().requires_grad_()
    optimiser = torch.optim.LBFGS(
        [theta], max_iter=2000, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )

    def closure() -> Tensor:
        optimiser.zero_grad()
        value = loss(theta)
        value.backward()
        return value

    optimiser.step(closure)
    return theta.detach()


PREFERENCE = torch.sigmoid(REWARD.unsqueeze(1) - REWARD)  # Bradley–Terry: P(row beats column)
MU = log_probs(REFERENCE).exp()  # both completions of a pair are drawn from the reference


def expected_preference_loss(theta: Tensor, **arguments: Any) -> Tensor:
    """All pairs, labelled both ways, with their probabilities."""
    log_prob, reference = log_probs(theta), log_probs(REFERENCE)
    i, j = PAIRS.T
    losses = dpo_loss(log_prob[i], log_prob[j], reference[i], reference[j], **arguments).loss
    return (MU[i] * MU[j] * PREFERENCE[i, j]) @ losses


@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_the_minimiser_of_dpo_is_the_kl_regularised_optimum(beta: float) -> None:
    theta = minimise(lambda theta: expected_preference_loss(theta, beta=beta), REFERENCE)
    optimum = (log_probs(REFERENCE) + REWARD / beta).softmax(-1)
    torch.testing.assert_close(log_probs(theta).exp(), optimum, rtol=0, atol=1e-6)
    assert (optimum - MU).abs().max() > 0.05  # there was something to find

    # And that is where E[r] − β KL(π ‖ π_ref) is largest.
    def objective(theta: Tensor) -> Tensor:
        return log_probs(theta).exp() @ REWARD - beta * kl(log_probs(theta), log_probs(REFERENCE))

    assert gradient(objective, theta).abs().max() < 1e-6


def test_label_smoothing_equals_flipped_labels() -> None:
    """It lowers P towards ½: with the right ε the smoothed loss on clean labels is the plain loss on noisy ones."""
    beta, noise = 0.5, 0.2
    theta = normal(6, N_STATES, 3)
    i, j = PAIRS.T
    log_prob, reference = log_probs(theta), log_probs(REFERENCE)
    noisy = (1 - noise) * PREFERENCE + noise * PREFERENCE.T
    for kind in KINDS:
        losses = dpo_loss(log_prob[i], log_prob[j], reference[i], reference[j], beta=beta, kind=kind).loss  # type: ignore[arg-type]
        plain = (MU[i] * MU[j] * noisy[i, j]) @ losses
        smoothed = expected_preference_loss(theta, beta=beta, kind=kind, label_smoothing=noise)
        torch.testing.assert_close(smoothed, plain)


def test_the_minimiser_of_ipo() -> None:
    """π ∝ π_ref exp(P(y beats a completion of the pairs' law) / β): preferences count, not Bradley–Terry rewards."""
    beta = 0.4
    theta = minimise(lambda theta: expected_preference_loss(theta, beta=beta, kind="ipo"), REFERENCE)
    optimum = (log_probs(REFERENCE) + PREFERENCE @ MU / beta).softmax(-1)
    torch.testing.assert_close(log_probs(theta).exp(), optimum, rtol=0, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_certain_preference(kind: Any) -> None:
    """One pair, always labelled the same way: IPO stops at 1/(2β), hinge at 1/β, the sigmoid never stops."""
    beta = 0.5
    log_ratio = torch.zeros(1, dtype=F64, requires_grad=True)
    optimiser = torch.optim.SGD([log_ratio], lr=0.05)
    for _ in range(2000):
        optimiser.zero_grad()
        dpo_loss(log_ratio, torch.zeros(1, dtype=F64), beta=beta, kind=kind).loss.sum().backward()
        optimiser.step()
    reached = log_ratio.item()
    if kind == "ipo":
        assert reached == pytest.approx(1 / (2 * beta))
    elif kind == "hinge":
        assert 1 / beta <= reached <= 1 / beta + 0.05 * beta
    else:
        assert reached > 5
        assert log_ratio.grad is not None
        assert log_ratio.grad.item() < 0


def test_dpo_starts_at_margin_zero_and_loss_log_two() -> None:
    log_prob = log_probs(REFERENCE)
    i, j = PAIRS.T
    out = dpo_loss(log_prob[i], log_prob[j], log_prob[i], log_prob[j], beta=0.3)
    for value in (out.margin, out.chosen_reward, out.rejected_reward):
        assert (value == 0).all()
    torch.testing.assert_close(out.loss, torch.full_like(out.loss, math.log(2)))
    torch.testing.assert_close(out.weight, torch.full_like(out.weight, 0.15))


def test_the_gradient_of_dpo() -> None:
    """∇L = −β σ(−margin) (∇ log π(chosen) − ∇ log π(rejected)), Rafailov et al. (2023), §4."""
    beta, chosen, rejected = 0.7, 3, 11
    reference = log_probs(REFERENCE)

    def loss(theta: Tensor) -> Tensor:
        log_prob = log_probs(theta)
        return dpo_loss(
            log_prob[chosen], log_prob[rejected], reference[chosen], reference[rejected], beta=beta
        ).loss

    margin = beta * (
        (log_probs(THETA) - reference)[chosen].item() - (log_probs(THETA) - reference)[rejected].item()
    )
    weight = beta / (1 + math.exp(margin))
    direction = gradient(lambda theta: log_probs(theta)[chosen] - log_probs(theta)[rejected])
    torch.testing.assert_close(gradient(loss), -weight * direction)


def preference_loss(x: float, kind: str, beta: float) -> float:
    """ℓ(x) with plain numbers."""
    return {
        "sigmoid": math.log1p(math.exp(-x)),
        "ipo": (x / beta - 1 / (2 * beta)) ** 2,
        "hinge": max(0.0, 1 - x),
    }[kind]


@given(
    seed=st.integers(0, 10_000),
    kind=st.sampled_from(KINDS),
    beta=st.sampled_from([0.1, 0.5, 2.0]),
    smoothing=st.sampled_from([0.0, 0.1, 0.4]),
    gamma=st.sampled_from([0.0, 0.5, 1.5]),
    with_reference=st.booleans(),
)
def test_dpo_values_and_weights(
    seed: int, kind: Any, beta: float, smoothing: float, gamma: float, with_reference: bool
) -> None:
    gamma = 0.0 if kind == "ipo" else gamma
    chosen, rejected, *references = (3 * normal(seed + i, 6) for i in range(4))
    if not with_reference:
        references = [torch.zeros(6, dtype=F64)] * 2
    chosen.requires_grad_()
    rejected.requires_grad_()
    out = dpo_loss(
        chosen,
        rejected,
        *(references if with_reference else []),
        beta=beta,
        kind=kind,
        label_smoothing=smoothing,
        target_margin=gamma,
    )
    torch.testing.assert_close(out.chosen_reward, beta * (chosen - references[0]).detach())
    torch.testing.assert_close(out.rejected_reward, beta * (rejected - references[1]).detach())
    torch.testing.assert_close(out.margin, out.chosen_reward - out.rejected_reward)
    expected = [
        (1 - smoothing) * preference_loss(m - gamma, kind, beta)
        + smoothing * preference_loss(gamma - m, kind, beta)
        for m in out.margin.tolist()
    ]
    torch.testing.assert_close(out.loss.tolist(), expected)
    to_chosen, to_rejected = torch.autograd.grad(out.loss.sum(), (chosen, rejected))
    torch.testing.assert_close(out.weight, -to_chosen)
    torch.testing.assert_close(out.weight, to_rejected)
    assert not any(value.requires_grad for value in out[1:])


def test_smoothing_and_ipo_pull_an_excessive_margin_back() -> None:
    far, zero = torch.tensor([50.0]), torch.zeros(1)
    assert dpo_loss(far, zero, beta=1.0).weight.item() == pytest.approx(0.0, abs=1e-6)
    assert dpo_loss(far, zero, beta=1.0, label_smoothing=0.1).weight.item() == pytest.approx(-0.1)
    assert dpo_loss(far, zero, beta=1.0, kind="ipo").weight.item() == pytest.approx(1 - 100)


def test_simpo_is_length_normalised_without_a_reference() -> None:
    """Meng et al. (2024), eq. 6, with plain numbers."""
    token_log_prob = torch.tensor([[-1.0, -2.0, math.nan], [-0.5, -0.25, -1.5]])
    mean = sequence_log_prob(token_log_prob, token_log_prob.isfinite(), reduction="mean")
    out = dpo_loss(mean[:1], mean[1:], beta=2.0, target_margin=0.5)
    x = 2.0 * (-3.0 / 2) - 2.0 * (-2.25 / 3) - 0.5
    assert out.loss.item() == pytest.approx(math.log1p(math.exp(-x)))
    assert out.margin.item() == pytest.approx(x + 0.5)  # the target is not part of the margin


def test_dpo_by_hand() -> None:
    """The worked example of the source articles: the loss is 8.650, not 8.62."""
    out = dpo_loss(torch.tensor(-45.6, dtype=F64), torch.tensor(-28.3, dtype=F64), beta=0.5)
    assert out.margin.item() == pytest.approx(-8.65)
    assert torch.sigmoid(out.margin).item() == pytest.approx(0.000175, abs=5e-7)
    assert out.loss.item() == pytest.approx(8.650, abs=5e-4)


def test_without_the_logarithm_the_worst_pairs_teach_nothing() -> None:
    """−σ(margin), which the source articles print, has a gradient of σ(1 − σ): none where the model is most wrong."""
    margin = torch.tensor(-8.65, dtype=F64, requires_grad=True)
    (without,) = torch.autograd.grad(-torch.sigmoid(margin), margin)
    weight = dpo_loss(margin, torch.zeros((), dtype=F64), beta=1.0).weight
    assert weight.item() == pytest.approx(0.9998, abs=1e-4)
    assert -without.item() == pytest.approx(0.000175, abs=1e-6)


def test_no_gradient_reaches_the_reference() -> None:
    tensors = [normal(i, 4).requires_grad_() for i in range(4)]
    dpo_loss(*tensors).loss.sum().backward()
    assert [tensor.grad is None for tensor in tensors] == [False, False, True, True]


def test_losses_far_from_zero_are_finite() -> None:
    """Untrained models give log-probabilities of hundreds of nats; exp of them must not appear."""
    for margin in (-1e4, 1e4):
        x = torch.tensor([margin], requires_grad=True)
        losses = (
            dpo_loss(x, torch.zeros(1), beta=1.0),
            bradley_terry_loss(x, torch.zeros(1)),
            ranking_loss(torch.stack([x, torch.zeros(1)], -1), beta=1.0),
        )
        for out in losses:
            assert out.loss.item() == pytest.approx(max(0.0, -margin))
            (slope,) = torch.autograd.grad(out.loss.sum(), x)
            assert slope.item() == pytest.approx(-1.0 if margin < 0 else 0.0)


def test_dpo_errors() -> None:
    row, column = torch.zeros(3), torch.zeros(3, 1)
    with pytest.raises(ValueError, match="rejected_log_prob must have the shape of chosen_log_prob"):
        dpo_loss(row, column)
    with pytest.raises(
        ValueError, match="reference_rejected_log_prob must have the shape of chosen_log_prob"
    ):
        dpo_loss(row, row, row, column)
    for references in ((row, None), (None, row)):
        with pytest.raises(ValueError, match="must be given both or neither"):
            dpo_loss(row, row, *references)
    cases: list[tuple[dict[str, Any], str]] = [
        ({"beta": 0.0}, "beta must be finite and > 0, got 0.0"),
        ({"beta": math.nan}, "beta must be finite and > 0"),
        ({"label_smoothing": 0.5}, r"label_smoothing must lie in \[0, 0.5\), got 0.5"),
        ({"label_smoothing": -0.1}, "label_smoothing must lie in"),
        ({"target_margin": -1.0}, "target_margin must be finite and >= 0, got -1.0"),
        ({"target_margin": 1.0, "kind": "ipo"}, "target_margin must be 0 with kind='ipo'"),
        ({"kind": "logistic"}, "kind must be 'sigmoid', 'ipo' or 'hinge', got 'logistic'"),
    ]
    for arguments, message in cases:
        with pytest.raises(ValueError, match=message):
            dpo_loss(row, row, **arguments)


# --- The family of DPO ----------------------------------------------------------------------------------------


def plain_sigmoid_loss(x: Tensor) -> Tensor:
    return torch.log(1 + torch.exp(-x))


@given(
    seed=st.integers(0, 10_000),
    beta=st.sampled_from([0.1, 0.7]),
    nll=st.sampled_from([0.0, 0.3, 1.0]),
    dpop=st.sampled_from([0.0, 0.5, 5.0]),
)
def test_terms_that_hold_the_chosen_completion_up(seed: int, beta: float, nll: float, dpop: float) -> None:
    """Pang et al. (2024), eq. 1, and Pal et al. (2024), eq. 3, written out; gradients are autograd's of that."""
    chosen, rejected, *references = (3 * normal(seed + i, 6) for i in range(4))
    chosen.requires_grad_()
    rejected.requires_grad_()
    tokens = torch.randint(1, 9, (6,), generator=torch.Generator().manual_seed(seed))
    out = dpo_loss(
        chosen, rejected, *references, beta=beta, nll_weight=nll, chosen_tokens=tokens, dpop_weight=dpop
    )
    below = torch.maximum(torch.zeros(()), references[0] - chosen)  # log π_ref/π where it is positive
    x = beta * (chosen - references[0] - (rejected - references[1]) - dpop * below)
    expected = plain_sigmoid_loss(x) - nll * chosen / tokens
    torch.testing.assert_close(out.loss, expected)
    ours, theirs = (torch.autograd.grad(y.sum(), (chosen, rejected)) for y in (out.loss, expected))
    for mine, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, other)
    torch.testing.assert_close(out.weight, ours[1])
    torch.testing.assert_close(
        out.margin, (beta * (chosen - references[0] - rejected + references[1])).detach()
    )
    assert not any(value.requires_grad for value in out[1:])


def test_dpo_positive_is_dpo_where_the_chosen_completion_has_not_fallen() -> None:
    """Its gradient is exactly DPO's there; elsewhere ∇ log π of the chosen weighs 1 + λ times as much."""
    zeros = torch.zeros(2, dtype=F64)
    slopes = []
    for dpop in (0.0, 4.0):
        chosen = torch.tensor([0.5, -0.5], dtype=F64, requires_grad=True)
        out = dpo_loss(chosen, zeros, zeros, zeros, beta=1.0, dpop_weight=dpop)
        slopes.append(torch.autograd.grad(out.loss.sum(), chosen)[0] / -out.weight)
    assert slopes[0].tolist() == pytest.approx([1, 1])
    assert slopes[1].tolist() == pytest.approx([1, 5])


@given(seed=st.integers(0, 10_000), weight=st.sampled_from([0.1, 1.0, 3.0]))
def test_orpo_values_and_weights(seed: int, weight: float) -> None:
    """Hong et al. (2024), eq. 3 to 7, from probabilities instead of their logarithms."""
    mean = (-normal(seed, 2, 6).abs() - 1e-3).requires_grad_()
    out = orpo_loss(*mean, weight=weight)
    p = mean.exp()
    odds = p / (1 - p)
    expected = -torch.log(p[0]) - weight * torch.log(torch.sigmoid(torch.log(odds[0] / odds[1])))
    torch.testing.assert_close(out.loss, expected)
    (ours,) = torch.autograd.grad(out.loss.sum(), mean)
    (theirs,) = torch.autograd.grad(expected.sum(), mean)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(out.weight, ours[1])
    torch.testing.assert_close(out.margin, weight * torch.log(odds[0] / odds[1]).detach())
    torch.testing.assert_close(out.chosen_reward - out.rejected_reward, out.margin)
    assert not any(value.requires_grad for value in out[1:])


def test_orpo_is_finite_at_the_ends() -> None:
    """A completion that is certain has infinite odds, and one that is all but impossible a tiny probability."""
    for chosen, rejected in ((0.0, -1.0), (-1.0, 0.0), (0.0, 0.0), (-1e4, -1.0), (-1.0, -1e4)):
        mean = torch.tensor([[chosen], [rejected]], requires_grad=True)
        out = orpo_loss(*mean, weight=1.0)
        (slope,) = torch.autograd.grad(out.loss.sum(), mean)
        assert all(bool(value.isfinite().all()) for value in (*out, slope))
        assert slope[0].item() <= -1 + 1e-6  # the likelihood of the chosen always counts


@given(
    seed=st.integers(0, 10_000),
    beta=st.sampled_from([0.1, 0.7]),
    up=st.sampled_from([1.0, 2.0]),
    down=st.sampled_from([1.0, 0.3]),
)
def test_kto_values_and_weights(seed: int, beta: float, up: float, down: float) -> None:
    """Ethayarajh et al. (2024), eq. 8: λ_y − v with v = λ_D σ(β (r − z_0)), or λ_U σ(β (z_0 − r))."""
    log_prob, reference = (3 * normal(seed, 8)).requires_grad_(), 3 * normal(seed + 1, 8)
    others, good = 2 * normal(seed + 2, 5).requires_grad_(), normal(seed + 3, 8) > 0
    out = kto_loss(log_prob, reference, good, others, beta=beta, desirable_weight=up, undesirable_weight=down)
    z0 = max(0.0, sum(others.tolist()) / 5)
    for i, label in enumerate(good.tolist()):
        ratio = log_prob[i].item() - reference[i].item()
        factor, sign = (up, 1) if label else (down, -1)
        value = factor / (1 + math.exp(-sign * beta * (ratio - z0)))
        assert out.loss[i].item() == pytest.approx(factor - value)
        assert out.reward[i].item() == pytest.approx(beta * ratio)
    out.loss.sum().backward()
    torch.testing.assert_close(out.weight, -log_prob.grad)
    assert bool(((out.weight > 0) == good).all())
    assert not out.weight.requires_grad
    assert not out.reward.requires_grad


def test_the_baseline_of_kto_is_the_kl_divergence_and_constant() -> None:
    """With every completion of the policy as often as it is sampled, the mean log-ratio is KL(π ‖ π_ref)."""
    theta = THETA.clone().requires_grad_()
    log_ratio = log_probs(theta) - log_probs(REFERENCE)
    kl = float(PROBABILITY @ log_ratio.detach())
    good = REWARD > 0
    drawn = N * PROBABILITY * log_ratio  # its plain mean is the expectation
    out = kto_loss(log_probs(theta), log_probs(REFERENCE), good, drawn, beta=0.5)
    at_baseline = kto_loss(torch.tensor([kl]), torch.zeros(1), torch.tensor([True]), drawn, beta=0.5)
    assert at_baseline.loss.item() == pytest.approx(0.5)  # no gain and no loss
    fixed = kto_loss(log_probs(theta), log_probs(REFERENCE), good, drawn.detach(), beta=0.5)
    slopes = [torch.autograd.grad(x.loss.sum(), theta, retain_graph=True)[0] for x in (out, fixed)]
    assert torch.equal(*slopes)


def test_the_familys_errors() -> None:
    row, label = torch.zeros(3), torch.zeros(3, dtype=torch.bool)
    for name in ("nll_weight", "dpop_weight"):
        for value in (-1.0, math.inf, math.nan):
            with pytest.raises(ValueError, match=f"{name} must be finite and >= 0"):
                dpo_loss(row, row, row, row, **{name: value})
    with pytest.raises(ValueError, match=r"dpop_weight must be 0 without a reference .*, got 2\.0"):
        dpo_loss(row, row, dpop_weight=2.0)
    with pytest.raises(ValueError, match=r"dpop_weight must be 0 .* or with label_smoothing"):
        dpo_loss(row, row, row, row, dpop_weight=2.0, label_smoothing=0.1)
    with pytest.raises(ValueError, match="chosen_tokens must have the shape of chosen_log_prob"):
        dpo_loss(row, row, nll_weight=1.0, chosen_tokens=torch.ones(3, 1))
    with pytest.raises(ValueError, match="weight must be finite and > 0, got 0"):
        orpo_loss(row, row, weight=0)
    with pytest.raises(ValueError, match="desirable must have the shape of log_prob"):
        kto_loss(row, row, label[:1], row)
    with pytest.raises(ValueError, match=r"desirable must be Boolean, True for the good, got torch\.int64"):
        kto_loss(row, row, label.long(), row)
    with pytest.raises(ValueError, match="baseline_log_ratio must hold at least one number"):
        kto_loss(row, row, label, row[:0])
    for bad in ({"beta": 0.0}, {"desirable_weight": -1.0}, {"undesirable_weight": math.nan}):
        with pytest.raises(ValueError, match="beta, desirable_weight and undesirable_weight must be finite"):
            kto_loss(row, row, label, row, **bad)


# --- Reward models --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("centering", [0.0, 0.01, 1.0])
def test_bradley_terry_values_and_gradients(centering: float) -> None:
    chosen, rejected = normal(0, 8).requires_grad_(), normal(1, 8).requires_grad_()
    out = bradley_terry_loss(chosen, rejected, centering=centering)
    rows = zip(chosen.tolist(), rejected.tolist(), out.loss.tolist(), out.margin.tolist(), strict=True)
    for better, worse, loss, margin in rows:
        assert margin == pytest.approx(better - worse)
        expected = math.log(1 + math.exp(worse - better)) + centering * (better + worse) ** 2
        assert loss == pytest.approx(expected)
    to_chosen, to_rejected = torch.autograd.grad(out.loss.sum(), (chosen, rejected))
    with torch.no_grad():
        wrong, centre = torch.sigmoid(rejected - chosen), 2 * centering * (chosen + rejected)
        torch.testing.assert_close(to_chosen, -wrong + centre)
        torch.testing.assert_close(to_rejected, wrong + centre)
    assert not out.margin.requires_grad


def test_bradley_terry_finds_the_rewards_up_to_a_constant() -> None:
    i, j = PAIRS.T

    def loss(scores: Tensor, centering: float = 0.0) -> Tensor:
        losses = bradley_terry_loss(scores[i], scores[j], centering=centering).loss
        return (PREFERENCE[i, j] / N**2) @ losses

    scores = minimise(loss, torch.full((N,), 5.0, dtype=F64))
    torch.testing.assert_close(scores - scores.mean(), REWARD - REWARD.mean(), rtol=0, atol=1e-6)
    assert scores.mean().item() == pytest.approx(5.0)  # nothing says where zero is
    torch.testing.assert_close(loss(scores), loss(scores + 3))
    centred = minimise(lambda scores: loss(scores, 0.01), torch.full((N,), 5.0, dtype=F64))
    assert centred.mean().item() == pytest.approx(0.0, abs=1e-6)


def test_bradley_terry_errors() -> None:
    with pytest.raises(ValueError, match="rejected_scores must have the shape of chosen_scores"):
        bradley_terry_loss(torch.zeros(3), torch.zeros(3, 1))
    with pytest.raises(ValueError, match=r"centering must be >= 0, got -1\.0"):
        bradley_terry_loss(torch.zeros(3), torch.zeros(3), centering=-1.0)


# --- Ranked lists ---------------------------------------------------------------------------------------------

# Summaries 2, 3, 1, 4, best first, with the log-probabilities of the source articles.
RANKED = torch.tensor([-67.4, -58.9, -32.1, -18.2], dtype=F64)


def test_ranking_by_hand() -> None:
    """The worked example of the source articles: the six losses sum to 52.41, not 24.8."""
    out = ranking_loss(RANKED, beta=0.3)
    pairs = ["2>3", "2>1", "2>4", "3>1", "3>4", "1>4"]
    losses = {pair: round(loss, 3) for pair, loss in zip(pairs, out.loss.tolist(), strict=True)}
    assert losses == {"2>3": 2.625, "2>4": 14.760, "2>1": 10.590, "3>1": 8.040, "3>4": 12.210, "1>4": 4.185}
    assert out.loss.sum().item() == pytest.approx(52.41, abs=5e-3)


def test_clamped_log_probabilities_teach_nothing() -> None:
    """The source articles clamp to ±10: every completion of more than a few tokens becomes the same constant."""
    log_prob = RANKED.clone().requires_grad_()
    loss = ranking_loss(log_prob.clamp(-10, 10), beta=0.3).loss
    torch.testing.assert_close(loss, torch.full_like(loss, math.log(2)))
    loss.sum().backward()
    assert log_prob.grad is not None
    assert not log_prob.grad.any()


def test_a_clamped_reference_is_no_reference() -> None:
    """The source articles clamp the reference's log-probabilities to at least 1e-6. All are negative, so all change."""
    policy, references = (
        normal(0, 8).log_softmax(-1),
        (normal(1, 8).log_softmax(-1), normal(2, 8).log_softmax(-1)),
    )

    def slope(reference: Tensor, log_target: bool) -> Tensor:
        log_prob = policy.clone().requires_grad_()
        loss = torch.nn.functional.kl_div(log_prob, reference, reduction="sum", log_target=log_target)
        return torch.autograd.grad(loss, log_prob)[0]

    for log_target in (True, False):
        one, other = (slope(reference.clamp(min=1e-6), log_target) for reference in references)
        assert torch.equal(one, other)
        assert (one == one[0]).all()
    assert (slope(references[0], True) - slope(references[1], True)).abs().max() > 0.05


def test_means_over_tokens_take_the_length_out_of_the_margin() -> None:
    """Equally likely per token, but one twice as long: summed, the longer must make up for its length first."""
    mask = torch.arange(20) < torch.tensor([[20], [10]])
    token_log_prob = torch.full((2, 20), -0.5)
    summed, mean = (sequence_log_prob(token_log_prob, mask, reduction=r) for r in ("sum", "mean"))
    assert ranking_loss(summed, beta=0.3).margin.item() == pytest.approx(0.3 * -5.0)
    assert ranking_loss(mean, beta=0.3).margin.item() == 0.0


@given(seed=st.integers(0, 10_000), k=st.integers(2, 5), shape=st.sampled_from([(), (3,), (2, 2)]))
def test_ranking_is_reference_free_dpo_on_every_pair(seed: int, k: int, shape: tuple[int, ...]) -> None:
    log_prob = normal(seed, *shape, k).requires_grad_()
    out = ranking_loss(log_prob, beta=0.7)
    pairs = [
        dpo_loss(log_prob[..., i], log_prob[..., j], beta=0.7) for i in range(k) for j in range(i + 1, k)
    ]
    torch.testing.assert_close(out.loss, torch.stack([pair.loss for pair in pairs], -1))
    torch.testing.assert_close(out.margin, torch.stack([pair.margin for pair in pairs], -1))
    (slope,) = torch.autograd.grad(out.loss.sum(), log_prob)
    assert (slope[..., 0] < 0).all()  # the best is always pushed up, the worst always down
    assert (slope[..., -1] > 0).all()
    torch.testing.assert_close(slope.sum(-1), torch.zeros(shape, dtype=F64))
    assert not out.margin.requires_grad


def test_ranking_errors() -> None:
    for log_prob in (torch.tensor(-1.0), torch.zeros(3, 1), torch.zeros(0)):
        with pytest.raises(ValueError, match="log_prob must hold lists of at least 2 completions"):
            ranking_loss(log_prob, beta=0.1)
    for beta in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="beta must be finite and > 0"):
            ranking_loss(torch.zeros(2), beta=beta)
