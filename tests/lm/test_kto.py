"""KTO, which learns from completions with a label each: against the formula with full softmaxes, and bad labels."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lm_runs import TRAINERS, assert_gradients, gradients_of, records, tiny_model, tiny_tokenizer, weights
from torch import Tensor

from policyopt.lm import KTOConfig, LanguageModel, train_kto
from policyopt.lm.data import Limits, epoch_order, fingerprint, labelled_items

N = 12
BETA, GOOD, POOR = 0.3, 0.5, 1.5
CONFIG = KTOConfig(beta=BETA, desirable_weight=GOOD, undesirable_weight=POOR, updates=1, batch_size=N)


def log_prob(model: LanguageModel, prompt: list[int], completion: list[int]) -> Tensor:
    """log π(completion | prompt), token by token from the whole distribution."""
    logits = model.model(torch.tensor([prompt + completion])).logits[0].double()
    places = range(len(prompt) - 1, len(prompt) + len(completion) - 1)
    tokens = zip(places, completion, strict=True)
    return torch.stack([logits[place].log_softmax(-1)[token] for place, token in tokens]).sum()


def by_hand(policy: LanguageModel, reference: LanguageModel) -> dict[str, Tensor]:
    """The paper's loss on all records, whose baseline takes completion j after prompt i, and what is reported."""
    items = labelled_items(records(N), policy.tokenizer)
    order = epoch_order(N, 0, 0)
    ratios, strange = [], []
    for k, i in enumerate(order):
        mine, other = items[i].completion_ids, items[order[k - 1]].completion_ids
        here = items[i].prompt_ids
        with torch.no_grad():
            given = log_prob(reference, here, mine), log_prob(reference, here, other)
            strange.append(log_prob(policy, here, other) - given[1])
        ratios.append(log_prob(policy, here, mine) - given[0])
    z0 = torch.stack(strange).mean()
    labels = [items[i].desirable for i in order]
    losses = [
        GOOD * (1 - torch.sigmoid(BETA * (u - z0.clamp(min=0))))
        if label
        else POOR * (1 - torch.sigmoid(BETA * (z0.clamp(min=0) - u)))
        for u, label in zip(ratios, labels, strict=True)
    ]
    u, is_good = torch.stack(ratios).detach(), torch.tensor(labels)
    return {
        "loss": torch.stack(losses).mean(),
        "baseline": z0,
        "desirable_reward": BETA * u[is_good].mean(),
        "undesirable_reward": BETA * u[~is_good].mean(),
        "accuracy": ((u > 0) == is_good).double().mean(),
    }


@pytest.mark.parametrize("micro_batch_size", [None, 5])
@pytest.mark.parametrize(("seeds", "sign"), [((0, 1), 1), ((1, 0), -1)])
def test_loss_and_gradient_are_those_of_the_paper(
    seeds: tuple[int, int], sign: int, micro_batch_size: int | None
) -> None:
    """With a baseline that counts, and with one below 0 that does not; whole and in pieces."""
    policy, reference = map(tiny_model, seeds)
    expected = by_hand(policy, reference)
    assert sign * float(expected["baseline"]) > 0.1
    expected["loss"].backward()

    trained = tiny_model(seeds[0])
    gradients = gradients_of(trained)
    config = KTOConfig(**{**vars(CONFIG), "micro_batch_size": micro_batch_size})
    row = train_kto(trained, records(N), config, reference=reference, progress=False).history[0]
    for name, value in expected.items():
        assert getattr(row, name) == pytest.approx(float(value.detach()), rel=1e-4), name
    assert_gradients(gradients, policy)
    assert row.tokens == sum(
        len(item.completion_ids) for item in labelled_items(records(N), trained.tokenizer)
    )


def test_at_the_start_every_reward_is_zero_and_weighs_a_quarter() -> None:
    row = train_kto(tiny_model(), records(N), CONFIG, progress=False).history[0]
    shares = (8 * GOOD, 4 * POOR)
    assert row.loss == pytest.approx(sum(shares) / N / 2, rel=1e-5)
    assert row.weight == pytest.approx(BETA * sum(shares) / N / 4, rel=1e-5)
    rewards = (row.desirable_reward, row.undesirable_reward, row.baseline)
    assert rewards == pytest.approx((0, 0, 0), abs=1e-5)


def test_a_batch_with_labels_of_one_kind_has_no_reward_of_the_other() -> None:
    config = KTOConfig(updates=N, batch_size=1)
    rows = train_kto(tiny_model(), records(N), config, progress=False).history
    good, poor = (~np.isnan(rows.column(f"{kind}desirable_reward")) for kind in ("", "un"))
    assert (good != poor).all()
    assert (good.sum(), poor.sum()) == (8, 4)


def test_desirable_completions_become_likelier_and_others_less() -> None:
    model, start = tiny_model(), tiny_model()
    config = KTOConfig(beta=0.1, updates=60, batch_size=6, learning_rate=3e-3)
    result = train_kto(model, records(N), config, progress=False)
    moved: dict[bool, list[float]] = {True: [], False: []}
    with torch.no_grad():
        for item in labelled_items(records(N), model.tokenizer):
            now, then = (log_prob(m, item.prompt_ids, item.completion_ids) for m in (model, start))
            moved[item.desirable].append(float(now - then))
    assert min(moved[True]) > 0
    assert max(moved[False]) < -2
    assert result.history[-1].accuracy == 1
    assert result.history[-1].loss < 0.7 * result.history[0].loss


def test_each_completion_is_the_other_of_one_record() -> None:
    items = labelled_items(records(N), tiny_tokenizer())
    own = Counter(tuple(item.completion_ids) for item in items)
    assert own == Counter(tuple(item.other_ids) for item in items)
    order = epoch_order(N, 0, 0)
    assert order != sorted(order)  # neighbours in the data often share a prompt
    assert items[order[0]].other_ids == items[order[-1]].completion_ids
    assert items[order[3]].other_ids == items[order[2]].completion_ids


def test_the_other_completion_fits_the_context() -> None:
    data = [
        {"prompt": "one " * 6, "completion": "two", "label": True},
        {"prompt": "one", "completion": "two " * 6, "label": False},
    ]
    long, short = labelled_items(data, tiny_tokenizer(), Limits(context_length=9))
    assert len(short.completion_ids) == 7
    assert long.other_ids == short.completion_ids[:3]
    assert short.other_ids == long.completion_ids


def test_a_label_is_part_of_the_data(tmp_path: Path) -> None:
    data = records(N)
    flipped = [*data[:-1], {**data[-1], "label": not data[-1]["label"]}]
    tokenizer = tiny_tokenizer()
    assert fingerprint(labelled_items(data, tokenizer)) != fingerprint(labelled_items(flipped, tokenizer))
    options: dict[str, Any] = {"progress": False, "checkpoint_dir": tmp_path}
    train_kto(tiny_model(), data, CONFIG, **options)
    with pytest.raises(ValueError, match=r"holds a run with data '\w+', this one has '\w+'"):
        train_kto(tiny_model(), flipped, CONFIG, **options)


def test_a_run_is_taken_up_bit_for_bit(tmp_path: Path) -> None:
    whole = TRAINERS["kto"](tiny_model())
    first = TRAINERS["kto"](
        tiny_model(), checkpoint_dir=tmp_path, changes={"checkpoint_every": 1}, callback=lambda row: row.update == 2
    )  # fmt: skip
    assert first.updates == 2
    again = TRAINERS["kto"](tiny_model(), checkpoint_dir=tmp_path)
    assert again.updates == 3
    assert all(torch.equal(p, weights(whole)[name]) for name, p in weights(again).items())


LABELS = "label must be true (desirable) or false"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": None}, "item 5: column 'label' is missing; there are"),
        ({"completion": None}, "item 5: column 'completion' is missing"),
        ({"label": 1}, rf"item 5: {LABELS}, got 1; write it as a Boolean".replace("(", r"\(").replace(")", r"\)")),
        ({"label": "true"}, r"item 5: label must be true .*, got 'true'"),
        ({"completion": 3}, "item 5: completion must be"),
    ],
)  # fmt: skip
def test_a_bad_record_is_named(change: dict[str, Any], message: str) -> None:
    data = records(N)
    data[5] |= change
    with pytest.raises(ValueError, match=message):
        train_kto(tiny_model(), data, CONFIG, progress=False)


@pytest.mark.parametrize("label", [True, False])
def test_labels_of_one_kind_teach_no_difference(label: bool) -> None:
    data = [{**record, "label": label} for record in records(N)]
    message = (
        rf"column 'label' must hold both true and false, got \{{{label}\}}; for good completions alone use"
    )
    with pytest.raises(ValueError, match=message):
        train_kto(tiny_model(), data, CONFIG, progress=False)


def test_weights_are_positive() -> None:
    with pytest.raises(ValueError, match="desirable_weight must be > 0"):
        KTOConfig(desirable_weight=0.0)
