"""What a loss takes for granted: π, π_old and π_ref are one policy at the start, and a KL divergence is one."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from lm_runs import (
    SHORT,
    TRAINERS,
    count_ones,
    records,
    run_dpo,
    run_grpo,
    run_ppo,
    tiny_model,
    tiny_tokenizer,
    weights,
)
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from policyopt.estimators import kl_estimate
from policyopt.lm import (
    DPOConfig,
    GRPOConfig,
    ImplicitReward,
    LanguageModel,
    LoRA,
    OnlineRankingConfig,
    PPOConfig,
    RewardModel,
    SamplingConfig,
    add_lora,
    completion_log_probs,
    train_dpo,
    train_grpo,
    train_ppo,
    train_ranking,
)
from policyopt.lm.policies import Reference
from policyopt.lm.sequences import Sequences

pytestmark = pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing:FutureWarning")  # peft's own

NOTHING = {"learning_rate": 1e-9, "updates": 1}  # so that what is reported is what there was at the start


def gpt2() -> LanguageModel:
    """GPT-2 as its config comes, with dropout 0.1 in three places."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=13, n_embd=16, n_layer=2, n_head=2, n_positions=64, initializer_range=0.5,
                        bos_token_id=1, eos_token_id=2)  # fmt: skip
    return LanguageModel(GPT2LMHeadModel(config).eval(), tiny_tokenizer(), "gpt2")


def opt() -> LanguageModel:
    """OPT calls ``dropout`` in the decoder layer itself, by the layer's own mode."""
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=13, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
                       max_position_embeddings=64, word_embed_proj_dim=16, init_std=0.5,
                       bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
    return LanguageModel(OPTForCausalLM(config).eval(), tiny_tokenizer(), "opt")


def adapters() -> LanguageModel:
    """LoRA with dropout, and trained, so that its dropout is felt."""
    model = add_lora(tiny_model(), LoRA(rank=4, dropout=0.5))
    train_adapters(model)
    return model


def train_adapters(language_model: LanguageModel) -> None:
    """Give the adapters other weights: B is no longer 0."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in language_model.model.parameters():
            if parameter.requires_grad:
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)


def run_online_ranking(model: LanguageModel, **changes: Any) -> Any:
    config = OnlineRankingConfig(batch_size=4, group_size=4, sampling=SHORT, kl_coef=0.1, **changes)
    prompts = [{"prompt": record["prompt"]} for record in records()]
    return train_ranking(model, prompts, config, reward_functions=count_ones, progress=False)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("build", [gpt2, opt, adapters])
def test_at_the_start_all_policies_are_one(build: Any, checkpointing: bool) -> None:
    changes = {**NOTHING, "gradient_checkpointing": checkpointing}
    first = run_dpo(build(), changes=changes).history[0]
    assert first.margin == first.chosen_reward == first.rejected_reward == 0.0
    assert first.loss == pytest.approx(math.log(2), rel=1e-6)
    whole = {"minibatches": 1, "epochs_per_batch": 1}
    first = run_ppo(build(), changes={**changes, **whole}).history[0]
    assert first.kl == 0.0
    assert first.ratio_max == 1.0
    first = run_ppo(build(), changes=changes).history[0]  # minibatches round differently
    assert first.kl == 0.0
    assert first.ratio_max == pytest.approx(1, abs=1e-4)
    assert first.clip_fraction == 0.0
    for settings in ({"minibatches": 2}, {"minibatches": 1, "beta": 0.0}):
        first = run_grpo(build(), changes={**changes, **settings}).history[0]
        assert first.ratio_max == pytest.approx(1, abs=1e-4)
        assert first.clip_fraction == 0.0
    first = run_grpo(build(), changes=changes).history[0]
    assert first.kl == pytest.approx(0, abs=1e-4)  # the sampler's log-probabilities, step by step
    assert run_online_ranking(build(), **changes).history[0].kl == pytest.approx(0, abs=1e-4)


@pytest.mark.parametrize("build", [gpt2, opt])
@pytest.mark.parametrize("name", TRAINERS)
def test_dropout_is_on_in_sft_and_the_reward_model_alone(name: str, build: Any) -> None:
    model, without = build(), build()
    for module in without.model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
        elif isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    first, second = weights(TRAINERS[name](model)), weights(TRAINERS[name](without))
    equal = all(torch.equal(p, second[key]) for key, p in first.items())
    assert equal == (name not in ("sft", "reward"))


def with_dropped_layers(share: float) -> LanguageModel:
    """OPT whose layers are left out at random, and no other dropout."""
    torch.manual_seed(0)
    config = OPTConfig(vocab_size=13, hidden_size=16, ffn_dim=32, num_hidden_layers=2, num_attention_heads=2,
                       max_position_embeddings=64, word_embed_proj_dim=16, init_std=0.5, layerdrop=share,
                       dropout=0.0, bos_token_id=1, eos_token_id=2, pad_token_id=0)  # fmt: skip
    return LanguageModel(OPTForCausalLM(config).eval(), tiny_tokenizer(), "opt")


def test_a_dropped_layer_is_dropped_for_prompt_and_completions() -> None:
    """Where the first layer is dropped, what is left is a model of the second one."""
    model, without = with_dropped_layers(0.5), with_dropped_layers(0.0)
    without.model.model.decoder.layers = without.model.model.decoder.layers[1:]
    sequences = model.encode(["one two"], ["three", "four five"])
    model.model.train()
    ids = sequences.prompt_ids.expand(2, -1)
    torch.manual_seed(16)
    assert [torch.rand([]).item() < 0.5 for _ in range(3)] == [True, False, False]
    torch.manual_seed(16)
    with torch.no_grad():
        said = completion_log_probs(model.model, sequences).log_probs
        whole = torch.cat([ids, sequences.completion_ids], 1)
        logits = without.model(input_ids=whole, use_cache=False).logits.log_softmax(-1)
    expected = logits[:, ids.shape[1] - 1 : -1].gather(2, sequences.completion_ids[..., None])[..., 0]
    torch.testing.assert_close(said, expected.where(sequences.completion_mask, 0))


@pytest.mark.parametrize("name", TRAINERS)
def test_layers_are_dropped_in_sft_and_the_reward_model_alone(name: str) -> None:
    first, second = (weights(TRAINERS[name](with_dropped_layers(share))) for share in (0.5, 1e-12))
    equal = all(torch.equal(p, second[key]) for key, p in first.items())
    assert equal == (name not in ("sft", "reward"))


@pytest.mark.parametrize("name", ["sft", "dpo", "ranking", "grpo", "ppo"])
@pytest.mark.parametrize(
    "build", [*(pytest.param(build, marks=pytest.mark.sweep) for build in (gpt2, opt)), adapters, tiny_model]
)
def test_checkpointing_recomputes_every_layer_and_changes_nothing(name: str, build: Any) -> None:
    def run(checkpointing: bool) -> tuple[list[float], int]:
        model, in_backward = build(), []
        layers = next(m for m in model.model.modules() if isinstance(m, torch.nn.ModuleList) and len(m) == 2)
        for layer in layers:
            first = next(m for m in layer.modules() if "Norm" in type(m).__name__)
            first.register_forward_hook(
                lambda *_: in_backward.append(torch._C._current_graph_task_id() != -1)
            )
        changes = {"gradient_checkpointing": checkpointing, "updates": 2}
        if name in ("grpo", "ppo"):
            changes |= {"epochs_per_batch": 1, "minibatches": 1}
        result = TRAINERS[name](model, changes=changes)
        assert not any(module.training for module in model.model.modules())
        return result.history.column("gradient_norm"), sum(in_backward)

    plain, never = run(False)
    recomputed, twice = run(True)
    assert never == 0
    assert twice == 2 * 2
    if name != "sft":  # where dropout draws
        assert list(recomputed) == pytest.approx(list(plain), rel=1e-3)


# --- the reference of adapters ---


def state(language_model: LanguageModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in language_model.model.named_parameters()}


@pytest.mark.parametrize("name", ["dpo", "kto", "grpo", "ppo"])
def test_trained_adapters_have_themselves_as_reference(name: str) -> None:
    """The same numbers as with a second model that is given, and not those of the model without adapters."""
    runs = [TRAINERS[name](adapters(), **options) for options in ({}, {"reference": adapters()})]
    ours, given = map(weights, runs)
    assert all(torch.equal(ours[key], p) for key, p in given.items())
    assert ours.keys() == given.keys() == weights(TRAINERS[name](add_lora(tiny_model(), LoRA(rank=4)))).keys()


def test_only_what_is_trained_is_copied() -> None:
    fresh, trained = add_lora(tiny_model(), LoRA(rank=4)), adapters()
    assert Reference(fresh, None).model is fresh.model
    reference = Reference(trained, None)
    ours = {id(p) for p in trained.model.parameters()}
    copied = sum(p.numel() for p in reference.model.parameters() if id(p) not in ours)
    assert copied == trained.num_trainable_parameters < 0.5 * trained.num_parameters
    assert not any(p.requires_grad for p in reference.model.parameters())
    sequences = trained.encode(["one two"], ["three four"])
    before = reference.log_probs(sequences)
    assert torch.equal(before, completion_log_probs(trained.model, sequences).log_probs)
    train_adapters(trained)
    assert torch.equal(reference.log_probs(sequences), before)
    partly = tiny_model()
    partly.model.model.requires_grad_(False)
    shared = Reference(partly, None).model
    assert shared.model.norm.weight is partly.model.model.norm.weight
    assert shared.lm_head.weight is not partly.model.lm_head.weight


def test_results_know_nothing_of_the_copy(tmp_path: Path) -> None:
    names = state(adapters()).keys()
    result = run_grpo(adapters(), changes={"learning_rate": 0.01})
    assert weights(result).keys() == names
    result.save(tmp_path / "adapters")
    written = (tmp_path / "adapters" / "adapter_config.json").exists()
    assert written
    assert not (tmp_path / "adapters" / "reference").exists()
    sequences = result.language_model.encode(["one two"], ["three four"])
    expected = completion_log_probs(result.language_model.model, sequences).log_probs
    merged = result.language_model.merged()
    torch.testing.assert_close(completion_log_probs(merged.model, sequences).log_probs, expected)


def test_a_run_from_trained_adapters_is_resumed_bit_for_bit(tmp_path: Path) -> None:
    run_grpo(adapters(), checkpoint_dir=tmp_path, changes={"checkpoint_every": 1},
             callback=lambda row: row.update == 2)  # fmt: skip
    resumed, whole = run_grpo(adapters(), checkpoint_dir=tmp_path), run_grpo(adapters())
    assert resumed.history[-1].kl == whole.history[-1].kl != 0
    assert all(torch.equal(weights(resumed)[key], p) for key, p in weights(whole).items())


def other_adapters(kind: str) -> LanguageModel:
    """Models whose adapters, switched off, leave another policy than the one at the start."""
    peft = pytest.importorskip("peft")
    options: dict[str, Any] = {
        "bias": {"bias": "all"},
        "saved": {"modules_to_save": ["lm_head"]},
        "random": {"init_lora_weights": False},
        "pissa": {"init_lora_weights": "pissa"},
        "dora": {"use_dora": True},
        "embedding": {"target_modules": ["embed_tokens"]},
        "frozen": {},
    }[kind]
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=4, **{"target_modules": ["q_proj", "o_proj"], **options}
    )
    language_model = tiny_model(**({"attention_bias": True} if kind == "bias" else {}))
    model = peft.get_peft_model(language_model.model, config)
    adapted = LanguageModel(model, language_model.tokenizer, kind)
    if kind == "frozen":  # trained adapters that stay, and fresh ones to train
        train_adapters(adapted)
        model.add_adapter("second", config)
        model.base_model.set_adapter(["default", "second"])
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".second." in name)
    return adapted


# peft 0.18 says so of this model too, which ties nothing.
@pytest.mark.filterwarnings("ignore:Model has `tie_word_embeddings=True`")
@pytest.mark.parametrize("kind", ["bias", "saved", "random", "pissa", "dora", "embedding", "frozen"])
def test_the_reference_of_any_adapters_is_the_policy_at_the_start(kind: str) -> None:
    model = other_adapters(kind)
    sequences = model.encode(["one two", "six"], ["three four", "seven"])
    start = completion_log_probs(model.model, sequences).log_probs.detach()
    reference = Reference(model, None)
    torch.testing.assert_close(reference.log_probs(sequences), start, rtol=0, atol=1e-6)
    train_adapters(model)
    now = completion_log_probs(model.model, sequences).log_probs.detach()
    assert float((now - start).abs().max()) > 1e-3
    torch.testing.assert_close(reference.log_probs(sequences), start, rtol=0, atol=1e-6)


def test_a_reference_that_would_move_with_the_policy_is_refused() -> None:
    base = tiny_model()
    policy = add_lora(base, LoRA(rank=4))  # puts its layers into the model of base
    with pytest.raises(
        ValueError, match=r"must not share trained weights .* got 'tiny'; leave it out, or load"
    ):
        train_dpo(policy, records(), DPOConfig(updates=1), reference=base, progress=False)
    with pytest.raises(ValueError, match="must not share trained weights"):
        ImplicitReward(policy, base)
    # The policy itself stands for what it is now.
    same, model = run_grpo(tiny_model()), tiny_model()
    given = run_grpo(model, reference=model)
    assert all(torch.equal(weights(given)[key], p) for key, p in weights(same).items())


def test_an_implicit_reward_asks_what_training_started_from() -> None:
    policy, prompts, texts = adapters(), ["one", "six"], ["two three", "four"]
    for reference, model in ((None, policy), ("base", tiny_model()), ("bas", policy)):
        with pytest.raises(ValueError, match=r"reference must be the model that DPO started from, or 'base'"):
            ImplicitReward(model, reference)  # type: ignore[arg-type]
    sequences = policy.encode(prompts, texts)
    now, bare = (completion_log_probs(m.model, sequences).log_probs for m in (policy, tiny_model()))
    reward = ImplicitReward(policy, "base", beta=0.5)
    assert reward(texts, prompts) == pytest.approx((0.5 * (now - bare).sum(1)).tolist(), abs=1e-5)


@pytest.mark.parametrize("train", [train_grpo, train_ppo, train_ranking])
def test_a_judge_that_would_move_with_the_policy_is_refused(train: Any) -> None:
    configs = {train_grpo: GRPOConfig, train_ppo: PPOConfig, train_ranking: OnlineRankingConfig}
    config, prompts = configs[train](updates=1, sampling=SHORT, micro_batch_size=4), [{"prompt": "one"}] * 4
    policy = tiny_model()
    judges = {
        "reference": ImplicitReward(policy.copy(), policy),
        "policy": ImplicitReward(policy, policy.copy()),
        "backbone": RewardModel(policy),
    }
    for name, judge in judges.items():
        given = {"count": count_ones, name: judge}
        with pytest.raises(
            ValueError, match=rf"'{name}' must not hold the model that is trained.*model\.copy\(\)"
        ):
            train(policy, prompts, reward_functions=given, config=config, progress=False)
    # A copy is right.
    before = judges["reference"](["two"], ["one"])
    train(policy.copy(), prompts, reward_functions=judges, config=config, progress=False)
    assert judges["reference"](["two"], ["one"]) == before


# --- the KL divergence to the reference under filters ---


def five(seed: int) -> LanguageModel:
    """A model of five tokens."""
    torch.manual_seed(seed)
    config = LlamaConfig(vocab_size=5, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
                         num_key_value_heads=1, initializer_range=1.0, bos_token_id=1, eos_token_id=2)  # fmt: skip
    return LanguageModel(LlamaForCausalLM(config).eval(), tiny_tokenizer(), "five")


def kept(probabilities: list[float], top_k: int | None, top_p: float) -> list[int]:
    """Top-k, then top-p, one token at a time."""
    order = sorted(range(len(probabilities)), key=lambda a: -probabilities[a])[: top_k or None]
    total, mass, result = sum(probabilities[a] for a in order), 0.0, list[int]()
    for a in order:
        if result and mass >= top_p:
            break
        result.append(a)
        mass += probabilities[a] / total
    return result


FILTERS = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([1.0, 0.7, 1.5]),
        "top_k": st.sampled_from([None, 1, 2, 3, 4]),
        "top_p": st.sampled_from([1.0, 0.95, 0.8, 0.5]),
    }
)


@given(st.integers(0, 50), st.integers(0, 50), FILTERS)
def test_under_filters_the_kl_is_one_of_distributions(
    policy: int, other: int, filters: dict[str, Any]
) -> None:
    """All five tokens enumerated: the sums are expectations, and the reference is one distribution."""
    model, reference = five(policy), Reference(five(policy), five(other))
    every = Sequences.pad([[1, 4, 3]], [[a] for a in range(5)], [0] * 5)
    with torch.no_grad():
        ours, theirs = (
            (m.model(torch.tensor([[1, 4, 3]])).logits[0, -1].double() / filters["temperature"])
            .softmax(-1)
            .tolist()
            for m in (model, five(other))
        )
        log_pi = completion_log_probs(model.model, every, **filters).log_probs[:, 0]
        log_ref = reference.log_probs(every, **filters)[:, 0]
    chosen = kept(ours, filters["top_k"], filters["top_p"])
    p = [ours[a] / sum(ours[b] for b in chosen) for a in chosen]
    q = [theirs[a] / sum(theirs[b] for b in chosen) for a in chosen]
    divergence = sum(x * math.log(x / y) for x, y in zip(p, q, strict=True))
    assert log_ref[chosen].tolist() == pytest.approx([math.log(y) for y in q], abs=1e-4)
    for kind in ("k1", "k3"):
        mean = (torch.tensor(p) * kl_estimate(log_pi[chosen], log_ref[chosen], kind)).sum().item()  # type: ignore[arg-type]
        assert mean == pytest.approx(divergence, rel=1e-3, abs=1e-5)
        assert mean > -1e-6
        assert mean == 0 or policy != other


def test_the_set_is_that_of_the_policy_now_and_its_head() -> None:
    """An adapted head: the policy's set needs it on, the reference off."""
    peft = pytest.importorskip("peft")
    base = five(3)
    bare = base.copy()
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=2, target_modules=["q_proj", "lm_head"])
    policy = LanguageModel(peft.get_peft_model(base.model, config), base.tokenizer, "head")
    reference = Reference(policy, None, copy=False)
    train_adapters(policy)
    every = Sequences.pad([[1, 4, 3]], [[a] for a in range(5)], [0] * 5)
    with torch.no_grad():
        ours, theirs = (
            m.model(torch.tensor([[1, 4, 3]])).logits[0, -1].softmax(-1).tolist() for m in (policy, bare)
        )
    chosen = kept(ours, None, 0.8)
    assert chosen != kept(theirs, None, 0.8)
    q = [theirs[a] / sum(theirs[b] for b in chosen) for a in chosen]
    said = reference.log_probs(every, top_p=0.8)[chosen, 0].exp().tolist()
    assert said == pytest.approx(q, rel=1e-4)


def test_with_filters_training_starts_at_a_kl_of_zero() -> None:
    sampling = SamplingConfig(max_new_tokens=6, top_p=0.7, top_k=6, temperature=0.8)
    for build in (tiny_model, gpt2, adapters):
        changes = {**NOTHING, "sampling": sampling}
        assert run_ppo(build(), changes=changes).history[0].kl == 0.0
        assert run_grpo(build(), changes=changes).history[0].kl == pytest.approx(0, abs=1e-4)
        pieces = run_ppo(build(), changes={**changes, "micro_batch_size": 2}).history[0]
        assert pieces.kl == 0.0
