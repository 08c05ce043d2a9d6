"""The errata page names tests that guard it: each must exist. Those of statements on the articles are here."""

from __future__ import annotations

import ast
import math
import re
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from policyopt.estimators import group_relative_advantages
from policyopt.losses import bradley_terry_loss, ranking_loss

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "book" / "errata.md").read_text(encoding="utf-8")
NAMED = sorted(set(re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", PAGE)))


def test_the_errata_name_tests() -> None:
    assert len(NAMED) > 20


@pytest.mark.parametrize(("file", "test"), NAMED)
def test_a_test_that_the_errata_name_exists(file: str, test: str) -> None:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    assert test in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_every_entry_of_the_errata_says_what_where_and_how_it_is_guarded() -> None:
    entries = re.split(r"(?m)^### ", PAGE)[1:]
    assert len(entries) >= 20
    for entry in entries:
        for part in ("**Claim.**", "**Correct.**", "**Shown in**", "**Guarded by**"):
            assert entry.count(part) == 1, f"{part} in {entry.splitlines()[0]}"


# --- what the entries say, computed ----------------------------------------------------------------------------


def trained_rows(answers: int, vocabulary: int) -> Tensor:
    """Log-probability rows like those of a trained model: a few likely tokens, and a long tail below −10."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(answers, vocabulary, generator=generator, dtype=torch.float64)
    logits[:, :8] += 15
    return logits.log_softmax(-1)


def test_clamped_rows_teach_about_the_likely_next_tokens_alone() -> None:
    """The article's loss on vocabulary rows: near log 2 whatever the model says, moved by few entries."""
    rows = trained_rows(4, 2000).requires_grad_()
    clamped = rows.clamp(-10, 10)
    pairs = [(i, j) for i in range(4) for j in range(i + 1, 4)]
    loss = torch.stack(
        [-torch.log(torch.sigmoid(clamped[i] - clamped[j]) + 1e-6).mean() for i, j in pairs]
    ).mean()
    assert abs(loss.item() - math.log(2)) < 0.01
    (slope,) = torch.autograd.grad(loss, rows)
    tail = rows < -10
    assert tail.double().mean() > 0.99
    assert not slope[tail].any()
    assert slope[~tail].any()
    assert rows.exp()[~tail].sum() / 4 > 0.98


def test_the_row_after_a_text_says_nothing_of_the_text() -> None:
    """A table of logits per text so far: the row after the text is one row, and no token of the text is drawn by it."""
    table = torch.randn(3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    text = [4, 1]  # the first token is drawn by row 0, the second by row 1; row 2 comes after both
    probability = sum(table[t].log_softmax(-1)[token] for t, token in enumerate(text))
    (needed,) = torch.autograd.grad(probability, table)  # type: ignore[arg-type]
    (taken,) = torch.autograd.grad(table[2].log_softmax(-1).sum(), table)
    assert [row.any().item() for row in needed] == [True, True, False]
    assert [row.any().item() for row in taken] == [False, False, True]


def test_the_clamped_penalty_pulls_towards_the_uniform_distribution() -> None:
    logits = torch.randn(50, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    reference = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64).log_softmax(
        -1
    )
    penalty = kl_div(logits.log_softmax(-1), reference.clamp(min=1e-6), reduction="sum")
    (slope,) = torch.autograd.grad(penalty, logits)
    p = logits.detach().softmax(-1)
    torch.testing.assert_close(slope, -1e-6 * (1 - 50 * p), rtol=1e-9, atol=1e-18)

    def distance(z: Tensor) -> Tensor:
        return -z.log_softmax(-1).mean()  # KL(uniform || p), up to a constant

    assert distance(logits.detach() - 1e3 * slope) < distance(logits.detach())


def test_comparisons_do_not_see_a_constant() -> None:
    chosen, rejected = torch.tensor([8.2, 5.0]), torch.tensor([5.1, 6.0])
    before = bradley_terry_loss(chosen, rejected).loss
    torch.testing.assert_close(
        bradley_terry_loss(chosen + 100, rejected + 100).loss, before, rtol=1e-4, atol=1e-4
    )
    # Two chosen ratings of 8 and 9 are the same comparison; a regression tells them apart.
    assert ((chosen - 8) ** 2).tolist() != ((chosen - 9) ** 2).tolist()


def test_a_ranking_sees_the_order_of_the_rewards_and_grpo_more() -> None:
    rewards = torch.tensor([[0.1, 0.9, 0.5, 0.4]], dtype=torch.float64)
    log_prob = torch.tensor([-12.0, -9.0, -14.0, -10.0], dtype=torch.float64)

    def ranked(scores: Tensor) -> Tensor:
        return ranking_loss(log_prob[scores[0].argsort(descending=True)], beta=0.3).loss

    advantages = group_relative_advantages(rewards)
    for changed in (rewards.sqrt(), rewards**3, 2 * rewards + 5):
        torch.testing.assert_close(ranked(changed), ranked(rewards))
    torch.testing.assert_close(group_relative_advantages(2 * rewards + 5), advantages, rtol=1e-3, atol=1e-3)
    assert (group_relative_advantages(rewards.sqrt()) - advantages).abs().max() > 0.1


def test_the_articles_can_be_opened() -> None:
    """A page that lists somebody's faults names and links them."""
    head = PAGE.split("## Foundations")[0]
    for address in (
        "analyticsvidhya.com/blog/2025/02/llm-optimization",
        "medium.com/@mandeep0405",
        "towardsai.net",
    ):
        assert address in head
