"""The frame of the language-model trainers: the same gradient however it is computed, and runs that can be taken up."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, get_args

import numpy as np
import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from joint_runs import Setting
from joint_runs import run as joint_run
from lm_runs import (
    FORKED,
    SHORT,
    TRAINERS,
    Recording,
    assert_gradients,
    count_ones,
    gradients_of,
    main,
    records,
    run_dpo,
    run_grpo,
    run_kto,
    run_ppo,
    run_sft,
    tiny_model,
    tiny_tokenizer,
    weights,
)
from safetensors.torch import load_file
from torch import Tensor
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from policyopt.estimators import ImportanceMode
from policyopt.lm import (
    DPOConfig,
    GRPOConfig,
    ImplicitReward,
    LanguageModel,
    LMConfig,
    LoRA,
    OnlineRankingConfig,
    PPOConfig,
    RewardModel,
    SamplingConfig,
    Sequences,
    TrainingDivergedError,
    TransformersSampler,
    add_lora,
    completion_log_probs,
    load,
    log_probs,
    pair_accuracy,
    train_dpo,
    train_grpo,
    train_ranking,
    train_seeds,
)
from policyopt.lm.batches import Completions, Pairs
from policyopt.lm.cache import check_cache
from policyopt.lm.dpo import pair_loss
from policyopt.lm.grpo import group_advantages, grpo_loss
from policyopt.lm.policies import PolicyNetwork
from policyopt.lm.ppo import token_advantages
from policyopt.lm.results import LMUpdate
from policyopt.lm.training import Run, SamplingRun

SCRIPT = Path(__file__).with_name("lm_runs.py")
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}


def furthest(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(float((a[name] - b[name]).abs().max()) for name in a)


def rows(result: Any) -> list[dict[str, Any]]:
    return [{k: v for k, v in vars(row).items() if k != "seconds"} for row in result.history]


@pytest.mark.parametrize("name", TRAINERS)
def test_runs_repeat_bit_for_bit(name: str) -> None:
    first, second = TRAINERS[name](tiny_model()), TRAINERS[name](tiny_model())
    assert furthest(weights(first), weights(second)) == 0
    assert str(rows(first)) == str(rows(second))
    other = TRAINERS[name](tiny_model(), seed=1)
    assert furthest(weights(first), weights(other)) > 1e-4


@pytest.mark.parametrize("name", TRAINERS)
@pytest.mark.parametrize("size", [1, 2, 5])
def test_micro_batches_do_not_change_the_gradient(name: str, size: int) -> None:
    whole = TRAINERS[name](tiny_model())
    pieces = TRAINERS[name](tiny_model(), changes={"micro_batch_size": size})
    assert furthest(weights(whole), weights(pieces)) < 2e-5
    for a, b in zip(rows(whole), rows(pieces), strict=True):
        assert a["gradient_norm"] == pytest.approx(b["gradient_norm"], rel=1e-3)


@pytest.mark.parametrize("mean", ["token", "sequence", "constant"])
def test_micro_batches_do_not_change_any_of_grpo_denominators(mean: str) -> None:
    whole = run_grpo(tiny_model(), changes={"loss_mean": mean, "drop_unfinished": True})
    pieces = run_grpo(
        tiny_model(), changes={"loss_mean": mean, "drop_unfinished": True, "micro_batch_size": 3}
    )
    assert furthest(weights(whole), weights(pieces)) < 2e-4


def test_two_processes_compute_what_one_does(tmp_path: Path) -> None:
    names = ",".join(TRAINERS)
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir()
    two.mkdir()
    subprocess.run([sys.executable, SCRIPT, one, names], check=True, env=ENVIRONMENT)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        SCRIPT,
        two,
        names,
    ]
    subprocess.run(command, check=True, env=ENVIRONMENT, capture_output=True, timeout=300)
    for name in TRAINERS:
        alone, together = (load_file(folder / f"{name}.safetensors") for folder in (one, two))
        assert furthest(alone, together) < 2e-5, name


@pytest.mark.parametrize("name", TRAINERS)
def test_a_killed_run_goes_on_as_if_nothing_had_happened(name: str, tmp_path: Path) -> None:
    process = FORKED.Process(target=main, args=(str(tmp_path), name, 2))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL
    seen: list[int] = []
    resumed = TRAINERS[name](
        tiny_model(), checkpoint_dir=tmp_path / name, callback=lambda row: seen.append(row.update)
    )
    whole = TRAINERS[name](tiny_model())
    assert seen == [3]
    assert furthest(weights(resumed), weights(whole)) == 0
    assert str(rows(resumed)) == str(rows(whole))


@dataclass
class Numbered:
    """A batch whose rows are numbers."""

    rows: torch.Tensor

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, rows: torch.Tensor) -> Numbered:
        return Numbered(self.rows[rows])


@given(
    prompts=st.integers(1, 4),
    world=st.sampled_from([1, 2, 3, 4]),
    count=st.integers(1, 16),
    group=st.integers(1, 3),
    epochs=st.integers(1, 2),
)
def test_the_pieces_of_several_processes_are_those_of_one(
    prompts: int, world: int, count: int, group: int, epochs: int
) -> None:
    """Drawn as no report has them: also more pieces than a process has prompts."""
    every = torch.arange(prompts * world * group)
    together: list[list[int]] = [[] for _ in range(count * epochs)]
    for rank, share in enumerate(every.chunk(world)):
        config = SimpleNamespace(minibatches=count, epochs_per_batch=epochs)
        run: Any = SimpleNamespace(device="cpu", _group=group, config=config, rank=rank)
        pieces = list(SamplingRun.minibatches(run, Numbered(share)))  # type: ignore[arg-type]
        assert len(pieces) == len(together)
        for joint, piece in zip(together, pieces, strict=True):
            joint += piece.rows.tolist()  # type: ignore[attr-defined]
    for number, joint in enumerate(together):
        assert joint == [row for row in every.tolist() if row // group % count == number % count]


@settings(max_examples=8, phases=[Phase.generate])
@given(
    trainer=st.sampled_from(["grpo", "ranking"]),
    size=st.integers(1, 6),
    micro=st.sampled_from([None, 1, 3]),
    drops=st.booleans(),
    data=st.data(),
)
def test_a_drawn_batch_without_signal_moves_nothing(
    trainer: str, size: int, micro: int | None, drops: bool, data: st.DataObject
) -> None:
    """Where all rewards are equal, or nothing that counts has ended, Adam's momentum and the decay wait too."""
    changes: dict[str, Any] = {
        "batch_size": size,
        "micro_batch_size": micro,
        "weight_decay": 0.1,
        "updates": 2,
    }
    if trainer == "grpo":
        changes |= {"drop_unfinished": drops, "minibatches": data.draw(st.integers(1, size))}
        changes["loss_mean"] = data.draw(st.sampled_from(["token", "sequence", "constant"]))
    unfinished = trainer == "grpo" and drops and data.draw(st.booleans())
    setting = Setting(trainer, changes, *(("all", 9, 1) if unfinished else ("all", 1, 9)))
    outcome = joint_run(setting)
    assert outcome.moved[1] == 0.0
    assert outcome.rows[1]["gradient_norm"] == 0.0


def test_a_checkpoint_knows_its_data(tmp_path: Path) -> None:
    options: dict[str, Any] = {"progress": False, "checkpoint_dir": tmp_path}
    config, data = DPOConfig(updates=1, batch_size=4), records()
    train_dpo(tiny_model(), data, config, **options)
    train_dpo(tiny_model(), [dict(record) for record in data], config, **options)
    for other in (data[::-1], [*data[:-1], {**data[-1], "chosen": "one one one"}]):
        with pytest.raises(ValueError, match=r"holds a run with data '\w+', this one has '\w+'"):
            train_dpo(tiny_model(), other, config, **options)


def test_the_reference_is_the_policy_before_the_checkpoint_is_read(tmp_path: Path) -> None:
    """A run that goes on has the reference of the run that stopped: the policy at the start."""
    whole = run_grpo(tiny_model(), changes={"checkpoint_every": 1})
    run_grpo(
        tiny_model(),
        checkpoint_dir=tmp_path,
        changes={"checkpoint_every": 1},
        callback=lambda row: row.update == 2,
    )
    resumed = run_grpo(tiny_model(), checkpoint_dir=tmp_path, changes={"checkpoint_every": 1})
    assert resumed.history[-1].kl == whole.history[-1].kl != 0
    assert furthest(weights(resumed), weights(whole)) == 0


def test_a_reference_cannot_be_made_or_asked_too_late() -> None:
    model = tiny_model()
    run: Run[LMConfig, LMUpdate] = Run(
        "test", model, PolicyNetwork(model.model), LMConfig(), LMUpdate, [1], seed=0, callback=None,
        progress=False, checkpoint_dir=None,
    )  # fmt: skip
    borrowed, kept = run.reference(None, copy=False), run.reference(None)
    sequences = model.encode(["one"], ["two"])
    assert torch.equal(borrowed.log_probs(sequences), kept.log_probs(sequences))
    with run:
        kept.log_probs(sequences)
        with pytest.raises(RuntimeError, match="kept no copy of the policy, whose training has begun"):
            borrowed.log_probs(sequences)
        with pytest.raises(RuntimeError, match="make the reference before"):
            run.reference(None)


def test_a_finished_run_is_not_trained_again(tmp_path: Path) -> None:
    first = run_dpo(tiny_model(), checkpoint_dir=tmp_path)
    again = run_dpo(tiny_model(), checkpoint_dir=tmp_path, callback=lambda row: pytest.fail("trained again"))
    assert furthest(weights(first), weights(again)) == 0


def test_a_checkpoint_of_adapters_of_another_rank_is_refused(tmp_path: Path) -> None:
    """Those of rank 1 would be broadcast."""
    run_sft(add_lora(tiny_model(), LoRA(rank=1)), checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=r"does not fit this run: names or shapes differ.*lora_A"):
        run_sft(add_lora(tiny_model(), LoRA(rank=4)), checkpoint_dir=tmp_path)


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    run_dpo(tiny_model(), checkpoint_dir=tmp_path)
    with pytest.raises(ValueError, match=r"seed 0, this one has 1; give another folder"):
        run_dpo(tiny_model(), checkpoint_dir=tmp_path, seed=1)
    with pytest.raises(ValueError, match=r"learning_rate 0.003, this one has 0.1"):
        run_dpo(tiny_model(), checkpoint_dir=tmp_path, changes={"learning_rate": 0.1})
    with pytest.raises(ValueError, match="algorithm 'dpo', this one has 'sft'"):
        run_sft(tiny_model(), checkpoint_dir=tmp_path)


def _gpt2() -> Any:
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=13, n_embd=16, n_layer=2, n_head=2, n_positions=64, eos_token_id=2, bos_token_id=1,
                   resid_pdrop=0.1, attn_pdrop=0.0, embd_pdrop=0.0)
    )  # fmt: skip


def _qwen3() -> Any:
    return Qwen3ForCausalLM(
        Qwen3Config(vocab_size=13, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                    num_key_value_heads=1, head_dim=8, max_position_embeddings=64, eos_token_id=2)
    )  # fmt: skip


def _gemma2() -> Any:
    return Gemma2ForCausalLM(
        Gemma2Config(vocab_size=13, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
                     num_key_value_heads=1, head_dim=8, max_position_embeddings=64, sliding_window=4, eos_token_id=2,
                     query_pre_attn_scalar=8)
    )  # fmt: skip


@pytest.mark.parametrize("build", [_gpt2, _qwen3, _gemma2])
@pytest.mark.parametrize("name", TRAINERS)
def test_other_architectures_go_through_every_trainer(name: str, build: Any) -> None:
    torch.manual_seed(0)
    model = LanguageModel(build().eval(), tiny_tokenizer(), build.__name__)
    before = {k: p.detach().clone() for k, p in model.model.named_parameters()}
    result = TRAINERS[name](model)
    after = result.reward_model.network.model if result.reward_model else result.language_model.model
    changed = [k for k, p in after.named_parameters() if not torch.equal(p, before[k])]
    assert len(changed) > 0.8 * len(before)
    assert all(math.isfinite(row.gradient_norm) and row.gradient_norm > 0 for row in result.history)


def test_dpo_starts_with_a_margin_of_exactly_zero() -> None:
    result = run_dpo(tiny_model(), changes={"updates": 2})
    first = result.history[0]
    assert first.margin == first.chosen_reward == first.rejected_reward == 0.0
    assert first.loss == pytest.approx(math.log(2), rel=1e-6)
    assert first.weight == pytest.approx(0.5 * DPOConfig().beta)
    assert result.history[1].margin != 0


def test_group_advantages_of_the_whole_batch() -> None:
    """REINFORCE++ divides by one deviation for all prompts, of the rewards or of what the group's mean leaves."""
    rewards = torch.tensor([[1.0, 3.0], [10.0, 10.0], [0.0, -6.0]], dtype=torch.float64)
    found = group_advantages(rewards, GRPOConfig(group_size=2, baseline="batch"))
    torch.testing.assert_close(found, (rewards - 3) / (rewards.std(correction=0) + 1e-8))
    found = group_advantages(rewards, GRPOConfig(group_size=2, scale_rewards="batch"))
    left = torch.tensor([[-1.0, 1.0], [0.0, 0.0], [3.0, -3.0]], dtype=torch.float64)
    torch.testing.assert_close(found, left / ((2 * (1 + 9) / 6) ** 0.5 + 1e-8))
    assert (found[1] == 0).all()
    calls = []

    def other(x: Tensor, mask: Tensor) -> Tensor:
        calls.append((x, mask))
        return x + 7

    found = group_advantages(rewards, GRPOConfig(group_size=2, baseline="batch"), other)
    assert torch.equal(found, rewards + 7)
    assert calls[0][1].all()
    config = GRPOConfig(group_size=4, baseline="leave-one-out", pass_at_k=3)
    one = torch.tensor([[1.0, 0.0, 0.0, 0.0]])
    assert group_advantages(one, config)[0].tolist() == pytest.approx([3, -1, -1, -1])


def test_best_of_n_descends_the_likelihood_of_the_best_completions() -> None:
    def grade(completions: list[str], **columns: Any) -> list[float]:
        return [[0.0, 2.0, -1.0, 2.0][i % 4] for i in range(len(completions))]

    data = [{"prompt": record["prompt"]} for record in records()]
    config = GRPOConfig(
        updates=1, batch_size=4, group_size=4, sampling=SHORT, baseline="best", loss_mean="constant",
        micro_batch_size=3,
    )  # fmt: skip
    model, dense = tiny_model(), tiny_model()
    gradients, sampler = gradients_of(model), Recording(model)
    row = train_grpo(model, data, grade, config, sampler=sampler, progress=False).history[0]
    assert len(sampler.samples.sequences) == 16
    best = sampler.samples.sequences.select(torch.tensor([1, 5, 9, 13]))  # the first of two equals
    (-completion_log_probs(dense.model, best).log_probs.sum() / (16 * 6)).backward()
    assert_gradients(gradients, dense)
    assert row.ratio_max == 1
    assert row.clip_fraction == 0


def test_best_of_n_raises_the_reward() -> None:
    changes = {
        "baseline": "best", "updates": 40, "batch_size": 8, "learning_rate": 1e-2, "beta": 0.0,
        "schedule": "constant", "epochs_per_batch": 1, "minibatches": 1,
    }  # fmt: skip
    rewards = run_grpo(tiny_model(), changes=changes).history.column("reward")
    assert rewards[-5:].mean() > rewards[:5].mean() + 0.2


class Numbered4:
    """Groups of 4 whose rewards differ for some numbers only; what was sampled and what was learned from."""

    def __init__(self, *varied: int) -> None:
        self.varied, self.drawn = varied, list[int]()
        self.learned: list[Completions] = []

    def grade(self, completions: list[str], number: list[int], **columns: Any) -> list[float]:
        self.drawn += number[::4]
        return [float(i % 4) + n if n in self.varied else 7.0 for i, n in enumerate(number)]

    def run(self, model: LanguageModel, folder: Path | None = None, **changes: Any) -> Any:
        config = GRPOConfig(
            **{"updates": 3, "batch_size": 3, "group_size": 4, "sampling": SHORT, "learning_rate": 1e-2, **changes}
        )  # fmt: skip

        def loss(batch: Completions) -> Any:
            self.learned.append(batch)
            return grpo_loss(batch, config)

        data = [{"prompt": " ".join(["one", "two"][: 1 + i % 2]), "number": i} for i in range(24)]
        return train_grpo(model, data, self.grade, config, loss=loss, progress=False, checkpoint_dir=folder)

    @property
    def numbers(self) -> list[float]:
        """Numbers of the groups that the last update learned from; 7 − 0 where rewards are equal."""
        return self.learned[-1].rewards.view(-1, 4)[:, 0].tolist()


@pytest.mark.parametrize("draws", [8, 16])
def test_draws_go_on_until_the_batch_is_full_of_groups_that_differ(draws: int) -> None:
    task = Numbered4(*range(0, 24, 3))
    row = task.run(tiny_model(), max_draws=draws, updates=1).history[0]
    signal, last = [number for number in task.drawn if number % 3 == 0], task.drawn[-1]
    assert len(signal) == 3  # as many are drawn as are missing
    assert last == signal[-1]
    assert len(task.drawn) >= 6  # two draws and more
    assert signal != task.drawn[: len(signal)]
    assert task.numbers == signal[:3]
    assert row.completions == 4 * len(task.drawn)
    assert row.zero_variance == pytest.approx(1 - len(signal) / len(task.drawn))
    batch = task.learned[-1]
    assert batch.rewards.view(-1, 4).diff(dim=1).eq(1).all()  # whole groups, in order
    assert len(batch.sequences.prompt_ids) == 3
    assert row.tokens > int(batch.mask.sum())  # the others cost as much
    everything = [r for n in task.drawn for r in ((n, n + 1, n + 2, n + 3) if n % 3 == 0 else (7.0,) * 4)]
    assert row.reward == pytest.approx(sum(everything) / len(everything))


def test_a_batch_that_is_full_at_once_is_drawn_once() -> None:
    for changes in ({"max_draws": 8}, {}):
        task = Numbered4(*(range(24) if changes else ()))
        assert task.run(tiny_model(), updates=1, **changes).history[0].completions == 12


def test_equal_groups_fill_what_is_missing_after_the_last_draw() -> None:
    task = Numbered4()
    task.run(tiny_model(), max_draws=2, updates=1)
    assert len(task.drawn) == 6
    one = next(iter(task.drawn[3:]))
    task = Numbered4(one)
    task.run(tiny_model(), max_draws=2, updates=1)
    assert task.numbers == [one, 7.0, 7.0]


def test_runs_with_several_draws_are_taken_up_bit_for_bit(tmp_path: Path) -> None:
    whole = Numbered4(1, 5, 8).run(tiny_model(), max_draws=4, updates=2)
    task = Numbered4(1, 5, 8)
    for updates in (1, 2):
        resumed = task.run(tiny_model(), tmp_path, max_draws=4, updates=updates)
    assert len({*task.drawn}) > 12
    assert furthest(weights(resumed), weights(whole)) == 0
    assert str(rows(resumed)) == str(rows(whole))


def test_where_nothing_is_drawn_again_all_prompts_are_learned_from() -> None:
    task = Numbered4(*range(24))
    task.run(tiny_model(), max_draws=8, updates=None, epochs=1)
    assert sorted(task.drawn) == list(range(24))


def test_joined_batches_are_their_completions_one_after_another() -> None:
    g = torch.Generator().manual_seed(0)

    def batch(prompts: list[list[int]], completions: list[list[int]], index: list[int]) -> Completions:
        sequences = Sequences.pad(prompts, completions, index)
        mask = sequences.completion_mask.clone()
        mask[:, :1] = False  # what an environment wrote, say
        sequences = replace(sequences, policy_mask=mask)
        scores, rewards = torch.rand(mask.shape, generator=g), torch.rand(len(mask), generator=g)
        return Completions(
            sequences, mask, rewards=rewards, parts={"a": -rewards}, sampler_log_probs=scores * mask
        )

    parts = [
        batch([[1, 2], [3]], [[4], [5, 6], [7]], [1, 0, 1]),
        batch([[8, 9, 1]], [[2, 3, 4], []], [0, 0]),
        batch([[5]], [[6]], [0]),
    ]
    whole, start = Completions.join(parts), 0
    assert whole.old_log_probs.numel() == 0
    for part in parts:
        again = whole.select(torch.arange(start, start + len(part)))
        start += len(part)
        for name in ("mask", "rewards", "sampler_log_probs"):
            assert torch.equal(getattr(again, name), getattr(part, name)), name
        for name, mine in vars(again.sequences.select(torch.arange(len(part)))).items():
            assert torch.equal(mine, getattr(part.sequences, name)), name
    assert torch.equal(whole.parts["a"], -whole.rewards)
    assert len(whole) == start


def test_cispo_by_name_is_that_of_ones_own() -> None:
    def cispo(batch: Completions) -> Tensor:
        ratio = (batch.log_probs - batch.old_log_probs).exp().detach()
        return -ratio.clamp(max=1.3) * batch.advantages[:, None] * batch.log_probs

    changes = {"beta": 0.0, "importance_cap": None, "clip_ratio": 1.0, "clip_ratio_high": 0.3}
    named = run_grpo(tiny_model(), changes={**changes, "loss": "cispo"})
    plain = run_grpo(tiny_model(), changes=changes, loss=cispo)
    assert max(row.ratio_max for row in named.history) > 1.3
    assert max(row.clip_fraction for row in named.history) > 0
    assert furthest(weights(named), weights(plain)) < 2e-4


@pytest.mark.parametrize("filters", [{}, {"top_k": 4, "temperature": 0.7}])
def test_the_entropy_bonus_is_exact(filters: dict[str, Any]) -> None:
    """With equal rewards the gradient is that of −c times the mean entropy of dense softmaxes."""
    model, dense = tiny_model(), tiny_model()
    sampler, coefficient = Recording(model), 0.5
    gradients: dict[str, Tensor] = {}
    for name, p in model.model.named_parameters():
        hook = partial(lambda p, name: gradients.update({name: p.grad.clone()}), name=name)
        p.register_post_accumulate_grad_hook(hook)
    sampling = SamplingConfig(max_new_tokens=6, **filters)
    changes: dict[str, Any] = {"sampling": sampling, "micro_batch_size": 8, "batch_size": 4, "updates": 1}
    config = GRPOConfig(entropy_coef=coefficient, group_size=4, **changes)
    data = [{"prompt": record["prompt"]} for record in records()]
    result = train_grpo(
        model, data, lambda completions: [1.0] * len(completions), config, sampler=sampler, progress=False
    )
    sequences, entropies = sampler.samples.sequences, []
    prompts = [
        row[keep].tolist() for row, keep in zip(sequences.prompt_ids, sequences.prompt_mask, strict=True)
    ]
    for i, index in enumerate(sequences.prompt_index.tolist()):
        ids = prompts[index] + sequences.completion_ids[i][sequences.completion_mask[i]].tolist()
        logits = dense.model(torch.tensor([ids])).logits[0, len(prompts[index]) - 1 : -1]
        if filters:
            logits = (logits / 0.7).topk(4, dim=-1).values
        p = logits.softmax(-1)
        entropies.append(-(p * p.log()).sum(-1))
    bonus = torch.cat(entropies).mean()
    (-coefficient * bonus).backward()
    assert result.history[0].loss == pytest.approx(-coefficient * float(bonus.detach()), rel=1e-4)
    scale = max(float(p.grad.abs().max()) for p in dense.model.parameters())
    for name, p in dense.model.named_parameters():
        torch.testing.assert_close(gradients[name], p.grad, rtol=1e-3, atol=1e-5 * scale)


ORPO = {"loss": "orpo", "reference_free": True, "length_normalized": True}


def plain_orpo(pairs: Pairs) -> Tensor:
    good, poor = pairs.chosen_log_prob, pairs.rejected_log_prob
    odds = good - torch.log1p(-good.exp()) - poor + torch.log1p(-poor.exp())
    return -good - 0.1 * torch.nn.functional.logsigmoid(odds)


def plain_positive(pairs: Pairs, weight: float = 0.0) -> Tensor:
    u = pairs.chosen_log_prob - pairs.reference_chosen_log_prob
    v = pairs.rejected_log_prob - pairs.reference_rejected_log_prob
    return -torch.nn.functional.logsigmoid(0.1 * (u - v - weight * (-u).clamp(min=0)))


def plain_nll(pairs: Pairs) -> Tensor:
    lengths = torch.stack([row.sum() for row in pairs.tokens.mask])[::2]
    return plain_positive(pairs) - 0.7 * pairs.chosen_log_prob / lengths


def plain_mean_nll(pairs: Pairs) -> Tensor:
    return plain_positive(pairs) - 0.7 * pairs.chosen_log_prob


@pytest.mark.parametrize(
    ("own", "changes", "shared"),
    [
        (plain_orpo, ORPO, {"reference_free": True, "length_normalized": True}),
        (partial(plain_positive, weight=5.0), {"dpop_weight": 5.0}, {}),
        (plain_nll, {"nll_weight": 0.7}, {}),
        (plain_mean_nll, {"nll_weight": 0.7, "length_normalized": True}, {"length_normalized": True}),
    ],
)
def test_a_preference_loss_by_name_is_that_of_ones_own(
    own: Any, changes: dict[str, Any], shared: dict[str, Any]
) -> None:
    named = run_dpo(tiny_model(), changes={**changes, "micro_batch_size": 4})
    plain = run_dpo(tiny_model(), changes=shared, loss=own)
    assert [row.loss for row in named.history] == pytest.approx([row.loss for row in plain.history], rel=1e-4)
    assert furthest(weights(named), weights(plain)) < 2e-4
    assert all(math.isfinite(row.weight) and row.weight > 0 for row in named.history)


@pytest.mark.parametrize(("batch_size", "micro_batch_size", "seed"), [(5, 4, 2), (7, None, 2), (10, 4, 1)])
def test_the_first_margin_is_zero_where_batches_do_not_divide_the_data(
    batch_size: int, micro_batch_size: int | None, seed: int
) -> None:
    """The last batch of a pass holds pairs that the first one had, beside others: they round differently there."""
    changes = {"batch_size": batch_size, "micro_batch_size": micro_batch_size, "updates": 3}
    first = run_dpo(tiny_model(seed), changes=changes, seed=seed).history[0]
    assert first.margin == first.chosen_reward == first.rejected_reward == 0.0


def test_the_implicit_reward_is_the_trained_log_ratio() -> None:
    start = tiny_model()
    policy = run_dpo(start.copy(), changes={"learning_rate": 0.05}).language_model
    reward = ImplicitReward(policy, start, beta=0.3, batch_size=2)
    texts, prompts = ["one two", "three", "four five six"], ["two", "two", "seven"]
    sequences = policy.encode(prompts, texts)
    with torch.no_grad():
        new, old = (completion_log_probs(m.model, sequences).log_probs.sum(1) for m in (policy, start))
    assert reward(texts, prompts) == pytest.approx((0.3 * (new - old)).tolist(), abs=1e-5)
    assert ImplicitReward(start, start.copy())(texts, prompts) == pytest.approx([0, 0, 0], abs=1e-6)
    with pytest.raises(ValueError, match="reference must be the model that DPO started from"):
        ImplicitReward(policy)


def test_pair_accuracy_of_an_implicit_reward_counts_positive_margins() -> None:
    start = tiny_model()
    policy = run_dpo(start.copy(), changes={"learning_rate": 0.05}).language_model
    reward, data = ImplicitReward(policy, start), records()
    prompts = [record["prompt"] for record in data]
    chosen, rejected = (reward([record[key] for record in data], prompts) for key in ("chosen", "rejected"))
    right = [a > b for a, b in zip(chosen, rejected, strict=True)]
    assert 0.5 < sum(right) / len(right) <= 1
    assert pair_accuracy(reward, data) == sum(right) / len(right)
    assert pair_accuracy(ImplicitReward(start, start.copy()), data) == 0.5  # ties


def test_one_update_per_batch_has_ratios_of_exactly_one_and_a_loss_of_zero() -> None:
    result = run_grpo(
        tiny_model(), changes={"minibatches": 1, "epochs_per_batch": 1, "beta": 0.0, "loss_mean": "sequence"}
    )
    for row in result.history:
        assert row.ratio_max == 1.0
        assert row.clip_fraction == 0.0
        assert abs(row.loss) < 1e-6  # advantages of a group add up to 0 …
        assert row.gradient_norm > 0.01  # … and their gradient does not
        assert math.isnan(row.kl)


def test_groups_of_equal_rewards_teach_nothing() -> None:
    model = tiny_model()
    before = {k: p.detach().clone() for k, p in model.model.named_parameters()}
    result = run_grpo(model, changes={"beta": 0.0})
    assert furthest(weights(result), {f"{k}": v for k, v in before.items()}) > 0
    model = tiny_model()
    config = GRPOConfig(updates=2, batch_size=4, group_size=4, sampling=SHORT, learning_rate=0.1)
    prompts = [{"prompt": record["prompt"]} for record in records()]
    equal = train_grpo(
        model, prompts, lambda completions, **_: [1.0] * len(completions), config, progress=False
    )
    assert furthest(weights(equal), before) == 0
    assert [row.zero_variance for row in equal.history] == [1.0, 1.0]


def test_skipping_completions_without_advantage_changes_nothing() -> None:
    def sparse(completions: list[str], **_: Any) -> list[float]:
        return [float("one" in text) for text in completions]

    prompts = [{"prompt": record["prompt"]} for record in records()]
    common: dict[str, Any] = {
        "updates": 3,
        "batch_size": 4,
        "group_size": 4,
        "sampling": SHORT,
        "learning_rate": 3e-3,
    }
    skipped = train_grpo(tiny_model(), prompts, sparse, GRPOConfig(**common), progress=False)
    # A KL weight too small to matter makes the trainer compute every completion.
    computed = train_grpo(tiny_model(), prompts, sparse, GRPOConfig(**common, beta=1e-12), progress=False)
    assert 0 < skipped.history[0].zero_variance < 1
    assert furthest(weights(skipped), weights(computed)) < 1e-5


def test_the_reference_stays_where_training_started() -> None:
    model = tiny_model()
    other = tiny_model(seed=5)
    result = run_grpo(model, changes={"updates": 6, "learning_rate": 0.02, "beta": 1e-9})
    assert abs(result.history[0].kl) < 1e-5
    assert result.history[-1].kl > 0.05
    elsewhere = run_grpo(tiny_model(), changes={"beta": 0.0, "updates": 1}, reference=other)
    assert elsewhere.history[0].kl > 0.1


def test_lora_trains_adapters_and_its_reference_is_the_bare_model() -> None:
    pytest.importorskip("peft")
    for name in ("dpo", "kto", "grpo", "ppo", "sft", "reward", "ranking"):
        base = tiny_model()
        frozen = {k: p.detach().clone() for k, p in base.model.named_parameters()}
        adapted = add_lora(base, LoRA(rank=4), seed=0)
        assert 0 < adapted.num_trainable_parameters < 0.5 * adapted.num_parameters
        result = TRAINERS[name](adapted, changes={"learning_rate": 0.05})
        kept = {k.replace("base_model.model.", "").replace(".base_layer", ""): p
                for k, p in adapted.model.named_parameters() if "lora_" not in k}  # fmt: skip
        assert all(torch.equal(kept[k], frozen[k]) for k in frozen), name
        if name == "dpo":
            assert result.history[0].margin == 0
            assert result.history[-1].margin > 0.01
        if name == "grpo":
            assert abs(result.history[0].kl) < 1e-5
            assert result.history[-1].kl != 0


def test_a_lora_run_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    stop = run_dpo(add_lora(tiny_model(), LoRA(rank=2)), checkpoint_dir=tmp_path, changes={"checkpoint_every": 1},
                   callback=lambda row: row.update == 2)  # fmt: skip
    assert stop.stop_reason == "callback"
    resumed = run_dpo(add_lora(tiny_model(), LoRA(rank=2)), checkpoint_dir=tmp_path)
    whole = run_dpo(add_lora(tiny_model(), LoRA(rank=2)))
    assert furthest(weights(resumed), weights(whole)) == 0


def test_a_model_that_cannot_be_sampled_any_more_leaves_its_result() -> None:
    """The logged completions are missing then, and nothing else."""
    model = tiny_model()

    def spoil(row: Any) -> None:
        with torch.no_grad():
            next(iter(model.model.parameters())).fill_(math.nan)

    with pytest.raises(TrainingDivergedError, match=r"update 2 .*the optimiser steps made since") as caught:
        run_grpo(model, changes={"logged_samples": 1}, callback=spoil)
    assert caught.value.result.updates == 1
    (sample,) = caught.value.result.samples
    assert "NaN or infinite logits" in sample.after


def test_callback_stops_and_the_result_tells() -> None:
    result = run_sft(tiny_model(), callback=lambda row: row.update == 2)
    assert (result.updates, result.stop_reason, len(result.history)) == (2, "callback", 2)
    assert result.history[-1].tokens == sum(result.history.column("tokens")[:1]) + (
        result.history[1].tokens - result.history[0].tokens
    )


def test_interruption_returns_what_was_learned() -> None:
    calls = []

    def interrupt(completions: list[str], **_: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return count_ones(completions)

    prompts = [{"prompt": record["prompt"]} for record in records()]
    config = GRPOConfig(updates=5, batch_size=4, group_size=4, sampling=SHORT)
    with pytest.warns(UserWarning, match="interrupted after 2 of 5 updates"):
        result = train_grpo(tiny_model(), prompts, interrupt, config, progress=False)
    assert result.stop_reason == "interrupted"
    assert len(result.history) == 2


def test_a_gradient_that_is_not_finite_leaves_the_weights_of_before() -> None:
    model = tiny_model()
    before = {k: p.detach().clone() for k, p in model.model.named_parameters()}

    def broken(pairs: Pairs) -> Any:
        items = pair_loss(pairs, DPOConfig())
        return items._replace(loss=items.loss * torch.nan)

    with pytest.raises(
        TrainingDivergedError, match=r"gradient is not finite in update 1 .*lower learning rate"
    ) as caught:
        train_dpo(model, records(), DPOConfig(updates=2, batch_size=4), loss=broken, progress=False)
    assert furthest(weights(caught.value.result), before) == 0


def test_what_was_learned_is_not_lost_with_a_reward_function() -> None:
    calls = []

    def fails(completions: list[str], **_: Any) -> list[float]:
        calls.append(1)
        if len(calls) == 3:
            raise OSError("the judge is down")
        return count_ones(completions)

    prompts = [{"prompt": record["prompt"]} for record in records()]
    config = GRPOConfig(updates=5, batch_size=4, group_size=4, sampling=SHORT)
    with pytest.raises(
        RuntimeError, match="reward function 'fails' raised OSError: the judge is down"
    ) as caught:
        train_grpo(tiny_model(), prompts, fails, config, progress=False)
    assert len(caught.value.result.history) == 2  # type: ignore[attr-defined]


def test_samples_are_recorded_before_and_after() -> None:
    result = run_sft(tiny_model(), changes={"logged_samples": 2, "learning_rate": 0.05, "updates": 8})
    assert len(result.samples) == 2
    assert any(sample.before != sample.after for sample in result.samples)
    assert [sample.prompt for sample in result.samples] == [record["prompt"] for record in records()[:2]]


def test_results_are_saved_for_load_and_tables(tmp_path: Path) -> None:
    result = run_grpo(tiny_model())
    result.save(tmp_path / "model")
    again = load(tmp_path / "model", device="cpu")
    assert furthest(weights(result), {k: p.detach() for k, p in again.model.named_parameters()}) == 0
    assert not list(tmp_path.glob("**/*.bin"))
    lines = (tmp_path / "model" / "history.csv").read_text().splitlines()
    assert len(lines) == 4
    assert lines[0].startswith("update,tokens")
    reward = TRAINERS["reward"](tiny_model())
    reward.save(tmp_path / "reward")
    loaded = RewardModel.load(tmp_path / "reward", device="cpu")
    texts, prompts = ["one two", "three"], ["four", "five"]
    assert loaded(texts, prompts) == pytest.approx(reward.reward_model(texts, prompts), abs=1e-6)  # type: ignore[misc]


def test_autocast_and_checkpointing_change_cost_and_not_the_result() -> None:
    plain = run_dpo(tiny_model())
    checkpointed = run_dpo(tiny_model(), changes={"gradient_checkpointing": True})
    assert furthest(weights(plain), weights(checkpointed)) < 1e-5
    half = run_dpo(tiny_model(), changes={"autocast": "bfloat16"})
    assert 0 < furthest(weights(plain), weights(half)) < 0.02
    assert half.history[0].margin == 0


@pytest.mark.parametrize("autocast", [None, "bfloat16"])
@pytest.mark.parametrize("name", ["grpo", "ppo", "online ranking"])
def test_the_own_sampler_computes_in_the_runs_precision(
    name: str, autocast: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every pass of it; a sampler that is handed over is left alone, and in float32 they draw the same."""
    kinds, drawing, plain_sample = set(), False, TransformersSampler.sample

    def sample(self: Any, prompts: Any, count: int, config: SamplingConfig, **options: Any) -> Any:
        nonlocal drawing
        drawing = config.temperature > 0  # and no completion of the log
        samples = plain_sample(self, prompts, count, config, **options)
        drawing = False
        return samples

    def train(own: bool) -> dict[str, Tensor]:
        model = tiny_model()
        check_cache(model.model)  # in float32 always
        for module in model.model.modules():
            if isinstance(module, torch.nn.Linear):
                module.register_forward_hook(lambda *io: kinds.add(io[-1].dtype) if drawing else None)
        options = {} if own else {"sampler": TransformersSampler(model)}
        if name == "online ranking":
            config = OnlineRankingConfig(
                updates=2, batch_size=4, group_size=3, learning_rate=3e-3, sampling=SHORT, autocast=autocast
            )
            data = [{"prompt": record["prompt"]} for record in records()]
            return weights(
                train_ranking(model, data, config, reward_functions=count_ones, progress=False, **options)
            )
        return weights(TRAINERS[name](model, changes={"autocast": autocast}, **options))

    monkeypatch.setattr(TransformersSampler, "sample", sample)
    own = train(own=True)
    assert kinds == {torch.bfloat16 if autocast else torch.float32}
    kinds.clear()
    given = train(own=False)
    assert kinds == {torch.float32}
    assert furthest(own, given) == 0 or autocast


FORESEEN: dict[str, dict[str, Any]] = {
    "sft": {},
    "grpo": {},
    "grpo, two processes' factor": {},
    "grpo, k2": {"beta": 0.2, "kl_estimator": "k2", "loss_mean": "sequence", "importance_cap": None},
    "grpo, dr": {"beta": 0.0, "scale_rewards": False, "loss_mean": "sequence"},
    "grpo, gspo": {"ratio": "sequence", "loss_mean": "sequence"},
    "grpo, cispo": {"loss": "cispo", "drop_unfinished": True, "loss_mean": "constant"},
    "grpo, top-k": {"sampling": SamplingConfig(max_new_tokens=6, top_k=5, temperature=0.8)},
    "grpo, entropy": {"entropy_coef": 0.1},
    "grpo, two steps": {"minibatches": 2},
}


@pytest.mark.parametrize("name", FORESEEN)
def test_one_update_per_batch_passes_the_head_once(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And its result is that of the recomputation, bit for bit."""
    passes, results, in_chunks = list[bool](), [], log_probs._in_chunks
    monkeypatch.setattr(log_probs, "_chunk_size", lambda *_: 3)
    monkeypatch.setattr(
        log_probs, "_in_chunks", lambda *a: (passes.append(torch.is_grad_enabled()), in_chunks(*a))[1]
    )
    trainer, changes = name.partition(",")[0], {"micro_batch_size": 5, **FORESEEN[name]}
    if trainer == "grpo":
        changes = {"minibatches": 1, "epochs_per_batch": 1, **changes}
    if "factor" in name:  # of data parallelism
        backward = Run.backward
        monkeypatch.setattr(Run, "backward", lambda run, loss: backward(run, 3 * loss))
    counts = []
    for foreseen in (True, False):
        if not foreseen:
            monkeypatch.setattr(Run, "ahead", lambda *_: None)
        passes.clear()
        results.append(TRAINERS[trainer](tiny_model(), changes=changes))
        counts.append(len(passes))
    assert furthest(weights(results[0]), weights(results[1])) == (
        0 if "factor" not in name else pytest.approx(0, abs=1e-5)
    )
    if name in ("grpo, entropy", "grpo, gspo", "grpo, two steps"):
        assert counts[0] == counts[1]
    else:
        assert counts[1] - counts[0] >= 3  # one for each piece of more than three tokens


def test_16_bit_weights_are_warned_about() -> None:
    model = tiny_model()
    model.model.to(torch.bfloat16)
    with pytest.warns(UserWarning, match="smaller than 1/256 of a weight is lost"):
        run_sft(model)


def test_learning_rate_schedules() -> None:
    linear = LMConfig(learning_rate=1.0, schedule="linear", warmup_updates=2)
    assert [round(linear.learning_rate_at(s, 6), 3) for s in range(6)] == [0.5, 1.0, 1.0, 0.75, 0.5, 0.25]
    cosine = LMConfig(learning_rate=1.0, schedule="cosine")
    assert [round(cosine.learning_rate_at(s, 4), 3) for s in range(4)] == [1.0, 0.854, 0.5, 0.146]
    assert LMConfig(epochs=2, batch_size=8).total_updates(12) == 3


def test_the_adaptive_kl_moves_beta_by_its_gain() -> None:
    """At the start the KL is 0, far below the target, so the first batch takes the largest step down."""
    for gain in (0.1, 2.0):
        history = run_ppo(tiny_model(), changes={"updates": 2, "kl_gain": gain}).history
        assert history[1].beta == pytest.approx(history[0].beta * (1 - 0.2 * gain))


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (
            GRPOConfig,
            {"group_size": 1},
            "group_size must be >= 2: one sample has nothing to be compared with",
        ),
        (GRPOConfig, {"sampling": SamplingConfig(temperature=0.0)}, "sampling must be of a temperature > 0"),
        (GRPOConfig, {"minibatches": 20, "batch_size": 4}, "minibatches must be <= batch_size"),
        (GRPOConfig, {"batch_size": 0}, "batch_size must be >= 1"),
        (
            GRPOConfig,
            {"scale_rewards": "batch", "baseline": "leave-one-out"},
            "scale_rewards must be True or False unless baseline='group', got 'batch'",
        ),
        (OnlineRankingConfig, {"batch_size": 0}, "batch_size must be >= 1"),
        (
            GRPOConfig,
            {"pass_at_k": 2},
            "pass_at_k must be 1, or less than group_size with baseline='leave-one-",
        ),
        (
            GRPOConfig,
            {"pass_at_k": 8, "baseline": "leave-one-out"},
            "pass_at_k must be 1, or less than group_size with baseline='leave-one-out', got 8",
        ),
        (GRPOConfig, {"scale_rewards": "all"}, "scale_rewards must be bool"),
        (GRPOConfig, {"loss": "ppo"}, "loss must be"),
        (GRPOConfig, {"entropy_coef": -0.1}, "entropy_coef must be >= 0"),
        (PPOConfig, {"target_kl": 1.0, "beta": 0.0}, "beta must be > 0 where target_kl"),
        (PPOConfig, {"kl_gain": 5.0}, r"kl_gain must be in \(0, 5\)"),
        (DPOConfig, {"loss": "ipo", "target_margin": 1.0}, "target_margin must be 0 with loss='ipo'"),
        (DPOConfig, {"loss": "hing"}, "loss must be"),
        (
            DPOConfig,
            {"loss": "orpo", "reference_free": True},
            "loss must be another without length_normalized=True and reference_free=True, got 'orpo'",
        ),
        (DPOConfig, {**ORPO, "nll_weight": 1.0}, "nll_weight must be 0 with loss='orpo', got 1.0"),
        (DPOConfig, {**ORPO, "label_smoothing": 0.1}, "label_smoothing must be 0 with loss='orpo'"),
        (
            DPOConfig,
            {"dpop_weight": 1.0, "reference_free": True},
            "dpop_weight must be 0 with reference_free",
        ),
        (DPOConfig, {"dpop_weight": 1.0, "label_smoothing": 0.1}, "dpop_weight must be 0 .* label_smoothing"),
        (LMConfig, {"learning_rate": -1.0}, "learning_rate must be > 0"),
        (LMConfig, {"adam_betas": (0.9,)}, "adam_betas must be two numbers"),
    ],
)
def test_settings_are_checked(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kind(**settings)


def test_token_advantages_equal_a_slow_loop() -> None:
    torch.manual_seed(0)
    lengths = [4, 1, 3]
    mask = torch.arange(4) < torch.tensor(lengths)[:, None]
    rewards, values = torch.randn(3, 4, dtype=torch.float64), torch.randn(3, 4, dtype=torch.float64)
    advantages, targets = token_advantages(
        torch.where(mask, rewards, 99.0),
        torch.where(mask, values, torch.nan),
        mask,
        gamma=0.9,
        gae_lambda=0.8,
    )
    for row, length in enumerate(lengths):
        carried = 0.0
        for t in reversed(range(length)):
            following = values[row, t + 1] if t + 1 < length else 0.0
            delta = rewards[row, t] + 0.9 * following - values[row, t]
            carried = delta + 0.9 * 0.8 * carried
            assert advantages[row, t] == pytest.approx(float(carried))
            assert targets[row, t] == pytest.approx(float(carried + values[row, t]))
    assert (advantages[~mask] == 0).all()


def test_the_sampler_may_be_anything_that_samples() -> None:
    class Counting(TransformersSampler):
        updates = 0

        def update_weights(self, model: Any) -> None:
            self.updates += 1

    model = tiny_model()
    sampler = Counting(model)
    with_own = run_ppo(model, sampler=sampler)
    assert sampler.updates == 3
    assert furthest(weights(with_own), weights(run_ppo(tiny_model()))) == 0


def test_a_sampler_that_lies_is_corrected_for() -> None:
    """Importance weights: a sampler at another temperature than the trainer believes gives another gradient."""

    class Hotter(TransformersSampler):
        def sample(
            self, prompts: Any, samples_per_prompt: int, config: SamplingConfig, **options: Any
        ) -> Any:
            hot = SamplingConfig(max_new_tokens=config.max_new_tokens, temperature=3.0)
            return super().sample(prompts, samples_per_prompt, hot, **options)

    changes: dict[str, Any] = {
        "updates": 1,
        "minibatches": 1,
        "epochs_per_batch": 1,
        "max_gradient_norm": None,
    }
    norms = []
    for cap in (2.0, None):
        model = tiny_model()
        result = run_grpo(model, sampler=Hotter(model), changes={**changes, "importance_cap": cap})
        norms.append(result.history[0].gradient_norm)
    assert abs(norms[0] - norms[1]) > 0.01 * norms[1]
    honest = [run_grpo(tiny_model(), changes={**changes, "importance_cap": cap}).history[0].gradient_norm
              for cap in (2.0, None)]  # fmt: skip
    assert honest[0] == pytest.approx(honest[1], rel=1e-4)


@pytest.mark.parametrize("mode", get_args(ImportanceMode))
def test_each_way_of_weighing_is_the_formula(mode: ImportanceMode) -> None:
    """The trainer's update is that of a loss written by hand, and its history says how far the sampler is off."""

    class Warmer(TransformersSampler):
        def sample(
            self, prompts: Any, samples_per_prompt: int, config: SamplingConfig, **options: Any
        ) -> Any:
            warm = replace(config, temperature=1.5)
            return super().sample(prompts, samples_per_prompt, warm, **options)

    gaps, completions = list[float](), list[float]()

    def by_hand(batch: Completions) -> torch.Tensor:
        loss = -(batch.log_probs - batch.log_probs.detach()).exp() * batch.advantages[:, None]
        for i, t in batch.mask.nonzero().tolist():
            n = int(batch.mask[i].sum())
            here = range(t, t + 1) if mode.startswith("token") else range(n)
            pairs = [(batch.old_log_probs[i, k].item(), batch.sampler_log_probs[i, k].item()) for k in here]
            c = math.exp(sum(old - sampler for old, sampler in pairs))
            beyond = 0.0 if mode.endswith("mask") else 2.0
            loss[i, t] *= beyond if c > 2 else 0.0 if mode.endswith("mask") and c < 0.5 else c
            old, sampler = batch.old_log_probs[i, t].item(), batch.sampler_log_probs[i, t].item()
            gaps.append(math.exp(old - sampler) - 1 - (old - sampler))
        log_c = ((batch.old_log_probs - batch.sampler_log_probs) * batch.mask).sum(1)
        completions.extend(log_c.double().exp().tolist())
        return loss

    changes: dict[str, Any] = {"updates": 1, "minibatches": 1, "epochs_per_batch": 1}
    model, other = tiny_model(), tiny_model()
    ours = run_grpo(model, sampler=Warmer(model), changes={**changes, "importance_mode": mode, "beta": 0.0})
    hand = run_grpo(other, sampler=Warmer(other), changes={**changes, "beta": 0.0}, loss=by_hand)
    assert furthest(weights(ours), weights(hand)) < 1e-6
    (row,), w = hand.history, np.array(completions)
    assert row.sampler_kl == pytest.approx(np.mean(gaps), rel=1e-4)
    assert row.sampler_kl > 1e-3
    assert row.effective_samples == pytest.approx(w.sum() ** 2 / (len(w) * (w**2).sum()), rel=1e-4)
    (honest,) = run_grpo(tiny_model(), changes=changes).history
    assert abs(honest.sampler_kl) < 1e-6
    assert honest.effective_samples == pytest.approx(1, abs=1e-5)


class Copied:
    """A sampler with weights of its own."""

    def __init__(self, model: LanguageModel) -> None:
        self.copy = model.copy()
        self.inner = TransformersSampler(self.copy)

    def update_weights(self, model: Any) -> None:
        self.copy.model.load_state_dict(model.state_dict())

    def sample(self, *args: Any, **options: Any) -> Any:
        return self.inner.sample(*args, **options)


def test_a_sampler_of_age_0_changes_nothing() -> None:
    """A copy that is told the weights after each update samples what the policy would."""
    model = tiny_model()
    ours, copied = run_grpo(tiny_model()), run_grpo(model, sampler=Copied(model))
    assert furthest(weights(ours), weights(copied)) == 0
    for mine, theirs in zip(ours.history, copied.history, strict=True):
        assert replace(mine, seconds=0.0) == replace(theirs, seconds=0.0)


def test_a_sampler_is_told_the_weights_of_a_checkpoint(tmp_path: Path) -> None:
    model, again = tiny_model(), tiny_model()
    changes = {"checkpoint_every": 1}
    run_grpo(model, changes=changes, checkpoint_dir=tmp_path, callback=lambda row: row.update == 1)
    resumed = run_grpo(again, sampler=Copied(again), changes=changes, checkpoint_dir=tmp_path)
    assert furthest(weights(resumed), weights(run_grpo(tiny_model()))) == 0


def test_seeds_in_parallel_do_not_share_a_model() -> None:
    run = partial(run_grpo_quiet, tiny_model())
    alone = train_seeds(run, seeds=2, workers=1, progress=False)
    together = train_seeds(run, seeds=2, workers=2, progress=False)
    for a, b in zip(alone, together, strict=True):
        assert furthest(weights(a), weights(b)) < 1e-6


def run_grpo_quiet(model: LanguageModel, *, seed: int, progress: bool) -> Any:
    config = GRPOConfig(updates=2, batch_size=4, group_size=4, sampling=SHORT, learning_rate=3e-3)
    prompts = [{"prompt": record["prompt"]} for record in records()]
    return train_grpo(model, prompts, count_ones, config, seed=seed, progress=progress)


@pytest.mark.parametrize("trainer", ["dpo", "grpo", "ppo", "kto"])
def test_a_run_that_goes_on_from_another_reference_is_refused(trainer: str, tmp_path: Path) -> None:
    """Such as the policy that the first part of the run trained in place."""
    run_it = {"dpo": run_dpo, "grpo": run_grpo, "ppo": run_ppo, "kto": run_kto}[trainer]
    more: dict[str, Any] = {"beta": 0.1} if trainer != "ppo" else {}
    model = tiny_model()
    run_it(model, changes={"updates": 1, **more}, checkpoint_dir=tmp_path)
    with pytest.raises(
        ValueError, match=r"holds a run with reference '\w+', this one has '\w+'; .*begin as it did"
    ):
        run_it(model, changes={"updates": 2, **more}, checkpoint_dir=tmp_path)
    result = run_it(tiny_model(), changes={"updates": 2, **more}, checkpoint_dir=tmp_path)
    assert len(result.history) == 2


def test_fresh_adapters_do_not_change_what_a_run_is_compared_with(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    for updates, seed in ((1, 0), (2, 1)):
        model = add_lora(tiny_model(), LoRA(rank=2), seed=seed)  # A is random
        result = run_dpo(model, changes={"updates": updates}, checkpoint_dir=tmp_path)
    assert len(result.history) == 2
