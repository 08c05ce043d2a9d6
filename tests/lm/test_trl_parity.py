"""One batch, two libraries: losses and gradients of DPO and GRPO equal those of TRL.

Needs the ``bench`` extra (``make bench`` installs it); skipped without. Where TRL reads a name differently, the option
that makes the two agree is written beside the case.
"""

from __future__ import annotations

import dataclasses
import random
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("trl", reason="TRL is not installed: pip install -e '.[lm,bench]'")

import trl
from datasets import Dataset

from policyopt.estimators import kl_estimate
from policyopt.lm.data import epoch_order
from policyopt.lm.dpo import DPOConfig, train_dpo
from policyopt.lm.grpo import GRPOConfig, group_advantages, grpo_surrogate, train_grpo
from policyopt.lm.kto import KTOConfig, train_kto
from policyopt.lm.log_probs import completion_log_probs
from policyopt.lm.models import LanguageModel
from policyopt.lm.sampling import Samples, SamplingConfig
from policyopt.lm.sequences import Sequences
from policyopt.losses import aggregate, kto_loss, orpo_loss
from policyopt_book import load_model
from policyopt_book.tasks import news

# What TRL and its dependencies warn of is theirs.
pytestmark = pytest.mark.filterwarnings("ignore")

ITEMS = news.make_items(6, seed=0)
GROUP, LONGEST = 4, 24
COMMON: dict[str, Any] = {
    "report_to": "none",
    "save_strategy": "no",
    "logging_strategy": "no",
    "disable_tqdm": True,
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "dataloader_pin_memory": False,
}


def policy() -> LanguageModel:
    return load_model("news-sft", device="cpu")


def gradients_of(model: nn.Module) -> dict[str, Tensor]:
    """Gradient of each parameter in the step to come; it outlives the optimiser's clearing."""
    gradients: dict[str, Tensor] = {}

    def keep(name: str, p: Tensor) -> None:
        # What has accumulated so far: the last micro-batch leaves the step's whole gradient.
        gradients[name] = p.grad.clone()

    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(partial(keep, name))
    return gradients


def assert_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    scale = max(float(g.abs().max()) for g in theirs.values())
    assert scale > 1e-6
    for name, expected in theirs.items():
        torch.testing.assert_close(
            ours[name], expected, rtol=1e-3, atol=2e-5 * scale, msg=lambda m, n=name: f"{n}: {m}"
        )


# --- DPO ------------------------------------------------------------------------------------------------------


def pairs() -> list[dict[str, Any]]:
    rng = random.Random(0)
    return [
        {"prompt": item.prompt, "chosen": news.write_summary(item, news.COMPLETE, rng), "rejected": rejected}
        for item, rejected in zip(
            ITEMS, ("It acts.", "No.", "A plant in Oslo for $1m.", "?", "Oslo", "Who?"), strict=True
        )
    ]


def trl_dpo(folder: Path, per_batch: int, **options: Any) -> tuple[float, dict[str, Tensor]]:
    """Mean over batches of TRL's loss, and of its gradients."""
    model = policy()
    trainer = trl.DPOTrainer(
        model=model.model,
        ref_model=load_model("news-base", device="cpu").model,
        args=trl.DPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=per_batch,
            precompute_ref_log_probs=True,
            **COMMON,
            **options,
        ),
        train_dataset=Dataset.from_list(pairs()),
        processing_class=model.tokenizer,
    )
    trainer.model.train()
    losses = []
    for batch in trainer.get_train_dataloader():
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        losses.append(float(loss.detach()))
    count = len(losses)
    return sum(losses) / count, {name: p.grad / count for name, p in trainer.model.named_parameters()}


DPO_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ({}, {"loss_type": ["sigmoid"]}),
    "hinge": ({"loss": "hinge"}, {"loss_type": ["hinge"]}),
    # TRL's IPO takes means over tokens.
    "ipo": ({"loss": "ipo", "length_normalized": True}, {"loss_type": ["ipo"]}),
    "length-normalised": ({"length_normalized": True}, {"loss_type": ["sigmoid_norm"]}),
    # TRL takes the mean of the likelihood over the tokens of the batch, which with one pair a batch is the pair's.
    "dpo + nll": ({"nll_weight": 0.5}, {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]}),
    # TRL smooths labels in AOT only, which with one pair a batch has nothing to sort and is conservative DPO.
    "label smoothing": ({"label_smoothing": 0.2}, {"loss_type": ["aot"], "label_smoothing": 0.2}),
}


@pytest.mark.parametrize("case", DPO_CASES)
@pytest.mark.parametrize("beta", [0.1, 0.7])
def test_dpo_is_trls(case: str, beta: float, tmp_path: Path) -> None:
    our_options, their_options = DPO_CASES[case]
    alone = case in ("label smoothing", "dpo + nll")
    theirs = trl_dpo(tmp_path, 1 if alone else len(ITEMS), beta=beta, **their_options)

    ours = policy()
    gradients = gradients_of(ours.model)
    config = DPOConfig(updates=1, batch_size=len(ITEMS), micro_batch_size=4, beta=beta, **our_options)
    result = train_dpo(ours, pairs(), config, reference=load_model("news-base", device="cpu"), progress=False)

    assert result.history[0].loss == pytest.approx(theirs[0], rel=1e-4)
    assert result.history[0].margin != 0  # the reference is another model
    assert_same(gradients, theirs[1])


def test_the_odds_ratio_of_orpo_is_trls() -> None:
    """Only that term: TRL's likelihood term counts the prompt's tokens, the paper's and ours the completion's."""
    from trl.experimental.orpo import ORPOTrainer

    mean = -torch.rand(2, 8, generator=torch.Generator().manual_seed(0)).mul(3).requires_grad_()
    trainer: Any = SimpleNamespace(beta=0.3, accelerator=SimpleNamespace(device="cpu"))
    ratio, *_ = ORPOTrainer.odds_ratio_loss(trainer, *mean)
    ours = orpo_loss(*mean, weight=0.3).loss + mean[0]
    torch.testing.assert_close(ours, -ratio)
    ours, theirs = (torch.autograd.grad(x.sum(), mean)[0] for x in (ours, -ratio))
    torch.testing.assert_close(ours, theirs)


def test_kto_is_trls(tmp_path: Path) -> None:
    """One batch with TRL's own baseline: each completion under the prompt of another record."""
    model = policy()
    rows = [
        {"prompt": pair["prompt"], "completion": pair[kind], "label": kind == "chosen"}
        for i, pair in enumerate(pairs())
        for kind in (("chosen",) if i % 3 else ("chosen", "rejected"))
    ]
    trainer = trl.KTOTrainer(
        model=model.model,
        ref_model=load_model("news-base", device="cpu").model,
        args=trl.KTOConfig(
            output_dir=str(tmp_path),
            per_device_train_batch_size=len(rows),
            beta=0.03,
            desirable_weight=0.5,
            undesirable_weight=1.5,
            **COMMON,
        ),
        # Each record gets the completion of the one before it, in our trainer in this order.
        train_dataset=Dataset.from_list([rows[i] for i in epoch_order(len(rows), 0, 0)]),
        processing_class=model.tokenizer,
    )
    trainer.model.train()
    batch = next(iter(trainer.get_train_dataloader()))
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()

    ours, reference = policy(), load_model("news-base", device="cpu")

    def whole(kind: str, network: nn.Module) -> Tensor:
        """log π of the batch's completions, from the ids that TRL made."""
        ids, there = batch[f"{kind}input_ids"], batch[f"{kind}attention_mask"].bool()
        answers = batch[f"{kind}completion_mask"].bool()
        prompts = [row[keep].tolist() for row, keep in zip(ids, there & ~answers, strict=True)]
        texts = [row[keep].tolist() for row, keep in zip(ids, answers, strict=True)]
        sequences = Sequences.pad(prompts, texts, pad_id=ours.pad_id)
        return completion_log_probs(network, sequences).log_probs.sum(1)

    with torch.no_grad():
        baseline = whole("KL_", ours.model) - whole("KL_", reference.model)
        given = whole("", reference.model)
    assert baseline.mean() > 0.01  # not cut at 0
    labels = torch.as_tensor(batch["label"], dtype=torch.bool)
    items = kto_loss(
        whole("", ours.model),
        given,
        labels,
        baseline,
        beta=0.03,
        desirable_weight=0.5,
        undesirable_weight=1.5,
    )
    aggregate(items.loss).backward()
    assert 0 < int(labels.sum()) < len(labels)
    assert float(items.loss.detach().mean()) == pytest.approx(float(loss), rel=1e-4)
    theirs = {name: p.grad for name, p in trainer.model.named_parameters()}
    assert_same({name: p.grad for name, p in ours.model.named_parameters()}, theirs)

    trained = policy()
    gradients = gradients_of(trained.model)
    config = KTOConfig(
        updates=1, batch_size=len(rows), micro_batch_size=4, beta=0.03, desirable_weight=0.5,
        undesirable_weight=1.5,
    )  # fmt: skip
    row = train_kto(trained, rows, config, reference=reference, progress=False).history[0]
    assert row.loss == pytest.approx(float(loss), rel=1e-4)
    assert row.baseline == pytest.approx(float(baseline.mean()), rel=1e-4)
    assert_same(gradients, theirs)


# --- GRPO -----------------------------------------------------------------------------------------------------


class Fixed:
    """A sampler that returns the same completions to both libraries."""

    def __init__(self, model: LanguageModel) -> None:
        self.eos, self.pad = model.eos_ids[0], model.pad_id
        self.completions = {
            tuple(model.tokenizer(item.prompt).input_ids): self._write(model, item, random.Random(i))
            for i, item in enumerate(ITEMS)
        }

    def _write(self, model: LanguageModel, item: news.Item, rng: random.Random) -> list[list[int]]:
        texts = [news.write_summary(item, news.MIXED, rng) for _ in range(GROUP)]
        rows = [[*model.tokenizer(text, add_special_tokens=False).input_ids, self.eos] for text in texts]
        return [row[:LONGEST] for row in rows]

    def rollout(self, prompts: list[str], trainer: Any) -> dict[str, Any]:
        ids = [trainer.processing_class(prompt).input_ids for prompt in prompts]
        seen = dict.fromkeys(map(tuple, ids), 0)
        completions = []
        for row in map(tuple, ids):
            completions.append(self.completions[row][seen[row] % GROUP])
            seen[row] += 1
        return {
            "prompt_ids": ids,
            "completion_ids": completions,
            "logprobs": [[0.0] * len(c) for c in completions],
        }

    def sample(
        self, prompts: Any, samples_per_prompt: int, config: SamplingConfig, *, seed: int, first_row: int = 0
    ) -> Samples:
        completions = [c for prompt in prompts for c in self.completions[tuple(prompt)]]
        index = [i for i in range(len(prompts)) for _ in range(samples_per_prompt)]
        sequences = Sequences.pad(prompts, completions, index, pad_id=self.pad)
        finished = torch.tensor([c[-1] == self.eos for c in completions])
        return Samples(sequences, torch.zeros(sequences.completion_ids.shape), finished)


GRPO_CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "grpo": ({"loss_mean": "sequence"}, {"loss_type": "grpo"}),
    "dr. grpo": (
        {"loss_mean": "constant", "scale_rewards": False},
        {"loss_type": "dr_grpo", "scale_rewards": "none"},
    ),
    "dapo": ({"loss_mean": "token", "clip_ratio_high": 0.28}, {"loss_type": "dapo", "epsilon_high": 0.28}),
    "bnpo": ({"loss_mean": "token", "clip_ratio": 0.1}, {"loss_type": "bnpo", "epsilon": 0.1}),
    "cispo": (
        {"loss": "cispo", "loss_mean": "token", "clip_ratio": 1.0, "clip_ratio_high": 0.2},
        {"loss_type": "cispo", "epsilon_high": 1.2},  # theirs is the largest weight itself
    ),
    "gspo": (
        {"ratio": "sequence", "loss_mean": "sequence", "clip_ratio": 0.02, "clip_ratio_high": 0.03},
        {"importance_sampling_level": "sequence", "loss_type": "grpo", "epsilon": 0.02, "epsilon_high": 0.03},
    ),
}


def our_config(beta: float, options: dict[str, Any]) -> GRPOConfig:
    return GRPOConfig(
        updates=1,
        batch_size=len(ITEMS),
        group_size=GROUP,
        sampling=SamplingConfig(max_new_tokens=LONGEST),
        beta=beta,
        importance_cap=None,  # TRL corrects for the sampler with vLLM only
        **options,
    )


def trl_grpo(folder: Path, beta: float, options: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return TRL's trainer and its batch: completions, advantages and reference log-probabilities."""
    model = policy()
    trainer = trl.GRPOTrainer(
        model=model.model,
        reward_funcs=news.utility_reward,
        args=trl.GRPOConfig(
            output_dir=str(folder),
            per_device_train_batch_size=len(ITEMS) * GROUP,
            num_generations=GROUP,
            max_completion_length=LONGEST,
            beta=beta,
            use_bias_correction_kl=False,
            **COMMON,
            **options,
        ),
        train_dataset=Dataset.from_list(news.prompt_records(ITEMS)),
        processing_class=model.tokenizer,
        rollout_func=Fixed(model).rollout,
    )
    if beta:  # TRL takes the model's own folder as the reference, which would make the KL term 0
        trainer.ref_model.load_state_dict(load_model("news-base", device="cpu").model.state_dict())
    trainer.model.train()
    trainer.current_gradient_accumulation_steps = 1
    rows = [record for record in news.prompt_records(ITEMS) for _ in range(GROUP)]
    return trainer, trainer._generate_and_score_completions(rows)


@pytest.mark.parametrize("case", GRPO_CASES)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo_trainer_is_trls(case: str, beta: float, tmp_path: Path) -> None:
    """From rewards to gradients, in the first update on a batch (ratio 1)."""
    our_options, their_options = GRPO_CASES[case]
    trainer, batch = trl_grpo(tmp_path, beta, their_options)
    loss = trainer.compute_loss(trainer.model, batch)
    loss.backward()

    ours = policy()
    gradients = gradients_of(ours.model)
    result = train_grpo(
        ours,
        news.prompt_records(ITEMS),
        news.utility_reward,
        dataclasses.replace(our_config(beta, our_options), micro_batch_size=8),
        reference=load_model("news-base", device="cpu") if beta else None,
        sampler=Fixed(ours),
        progress=False,
    )
    assert result.history[0].loss == pytest.approx(float(loss), rel=1e-4, abs=1e-6)
    assert_same(gradients, {name: p.grad for name, p in trainer.model.named_parameters()})


@pytest.mark.parametrize("case", GRPO_CASES)
@pytest.mark.parametrize("beta", [0.0, 0.1])
def test_grpo_loss_is_trls_in_later_updates(case: str, beta: float, tmp_path: Path) -> None:
    """Ratios on both sides of the clip range, through the functions that the trainer is made of."""
    our_options, their_options = GRPO_CASES[case]
    config = our_config(beta, our_options)
    trainer, batch = trl_grpo(tmp_path, beta, their_options)

    ours = policy()
    sampler = Fixed(ours)
    prompts = [list(prompt) for prompt in sampler.completions]
    sequences = sampler.sample(prompts, GROUP, config.sampling, seed=0).sequences
    mask = sequences.completion_mask
    assert torch.equal(sequences.completion_ids.where(mask, 0), batch["completion_ids"].where(mask, 0))
    log_probs = completion_log_probs(ours.model, sequences).log_probs
    noise = torch.randn(mask.shape, generator=torch.Generator().manual_seed(0))
    old = (log_probs.detach() + 0.3 * noise) * mask

    loss = trainer.compute_loss(trainer.model, batch | {"old_per_token_logps": old})
    loss.backward()

    texts = [
        ours.decode(row[keep].tolist()) for row, keep in zip(sequences.completion_ids, mask, strict=True)
    ]
    rows = [record["facts"] for record in news.prompt_records(ITEMS) for _ in range(GROUP)]
    rewards = torch.tensor(news.utility_reward(texts, [None] * len(texts), facts=rows)).view(-1, GROUP)
    advantages = group_advantages(rewards, config).flatten()
    torch.testing.assert_close(advantages, batch["advantages"], rtol=1e-4, atol=1e-5)
    items = grpo_surrogate(log_probs, old, advantages, mask, config)
    assert 0 < float(items.clipped[mask].mean()) < 1
    values = items.loss
    if beta:
        with torch.no_grad():
            reference = completion_log_probs(load_model("news-base", device="cpu").model, sequences).log_probs
        values = values + beta * kl_estimate(log_probs, reference, "k3")
    reduction = "sequence-mean" if config.loss_mean == "sequence" else "mean"
    count = float(len(mask) * LONGEST) if config.loss_mean == "constant" else None
    mine = aggregate(values, mask, reduction=reduction, denominator=count)
    mine.backward()

    assert float(mine) == pytest.approx(float(loss), rel=1e-4, abs=1e-6)
    assert_same(
        {name: p.grad for name, p in ours.model.named_parameters()},
        {name: p.grad for name, p in trainer.model.named_parameters()},
    )
