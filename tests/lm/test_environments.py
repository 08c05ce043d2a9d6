"""Episodes of several turns: whose tokens are whose, where they end, and the exact gradient of a small one."""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import product
from typing import Any

import numpy as np
import pytest
import torch
from lm_runs import COMMON, WORDS, count_ones, weights
from test_data import CHATML, END, INSTRUCTION, THINKING, TRIMMED, TURNS, assistant, byte_tokenizer, user
from test_text import SWITCH, THINKS
from test_trainers import furthest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from policyopt.lm import (
    GRPOConfig,
    LanguageModel,
    PPOConfig,
    SamplingConfig,
    TransformersSampler,
    completion_log_probs,
    train_grpo,
    train_ppo,
)
from policyopt.lm.batches import Completions
from policyopt.lm.config import OnlineConfig
from policyopt.lm.data import encode_prompt, encode_reply, prompt_examples
from policyopt.lm.environments import MethodTools, ToolEnvironment, play
from policyopt.lm.ppo import token_advantages
from policyopt.lm.rewards import settle
from policyopt.lm.sampling import Samples, collate

SPECIAL = ["<unk>", "<bos>", "<eos>", "<user>", "<bot>"]
# The end of the assistant's message is its EOS; "<user>" comes after it.
TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<bot>{{ m['content'] }}<eos>"
    "{% else %}<user>{{ m['content'] }}{% endif %}{% endfor %}{% if add_generation_prompt %}<bot>{% endif %}"
)


def chat_model(words: int = 10, seed: int = 0, **options: Any) -> LanguageModel:
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS[:words]])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", chat_template=TEMPLATE,
        extra_special_tokens=["<user>", "<bot>"],
    )  # fmt: skip
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=16, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=64, bos_token_id=1, eos_token_id=2,
        pad_token_id=2, initializer_range=0.3, **options,
    )  # fmt: skip
    return LanguageModel(LlamaForCausalLM(config).eval(), fast, "tiny")


class Scripted:
    """Says what it is told, and keeps what it hears."""

    def __init__(self, *answers: Any) -> None:
        self.answers, self.heard = list(answers), list[Any]()

    def reset(self, row: Any) -> Any:
        self.row = row
        return row["prompt"]

    def step(self, messages: Any) -> Any:
        self.heard.append(messages)
        return self.answers[min(len(self.heard), len(self.answers)) - 1]


DATA = [{"prompt": user(" ".join(WORDS[: 1 + i])), "goal": WORDS[i]} for i in range(4)]
SHORT = SamplingConfig(max_new_tokens=8)
CONFIG = OnlineConfig(sampling=SHORT, max_turns=3)
GO_ON, STOP = (user("two"), False, 0.25), ([], True, 1.0)


def draw_with(model: LanguageModel, config: OnlineConfig = CONFIG) -> Callable[..., Samples]:
    sampler = TransformersSampler(model)

    def draw(contexts: Any, each: int, turn: int, numbers: Any) -> Samples:
        return sampler.sample(contexts, each, config.sampling, seed=turn, first_row=numbers)

    return draw


def play_with(
    model: LanguageModel,
    make: Callable[[], Any],
    config: OnlineConfig = CONFIG,
    data: Any = DATA,
    **options: Any,
) -> Any:
    examples = prompt_examples(data, model.tokenizer, config.limits(model))
    return play(make, examples, draw_with(model, config), model, config, **options)


# --- What an episode is -----------------------------------------------------------------------------------------


def test_tokens_of_the_environment_are_read_and_not_chosen() -> None:
    model = chat_model()
    made = list[Scripted]()

    def make() -> Scripted:
        made.append(Scripted(GO_ON, GO_ON, STOP))
        return made[-1]

    episodes = play_with(model, make, group_size=8)
    sequences, several = episodes.samples.sequences, 0
    between = encode_reply(model.tokenizer, [*DATA[0]["prompt"], *assistant("one")], user("two"))
    assert between == model.tokenizer.convert_tokens_to_ids(["<user>", "two", "<bot>"])
    for row, chat in enumerate(episodes.messages):
        kept = sequences.completion_mask[row]
        ids, own = sequences.completion_ids[row][kept].tolist(), sequences.policy_mask[row][kept].tolist()
        said = [m["content"] for m in chat if m["role"] == "assistant"]
        pieces, start = list[list[int]](), 0
        for i in range(1, len(ids) + 1):
            if i == len(ids) or own[i] != own[start]:
                pieces, start = [*pieces, ids[start:i]], i
        assert pieces[1::2] == [between] * (len(said) - 1)
        assert [model.decode(piece) for piece in pieces[::2]] == said
        assert chat[0] == DATA[row // 8]["prompt"][0]
        assert chat[2:3] in ([], user("two"))
        # The log-probabilities and rewards are of the policy's tokens alone.
        own_row = sequences.policy_mask[row]
        assert (episodes.samples.log_probs[row] == 0).equal(~own_row)
        ends = [sum(map(len, pieces[: 2 * k + 1])) - 1 for k in range(len(said))]
        values = [0.25, 0.25, 1.0][: len(said)]
        assert episodes.rewards[row].nonzero().flatten().tolist() == ends
        assert episodes.rewards[row][ends].tolist() == values
        whole = pieces[-1][-1] == model.tokenizer.eos_token_id
        assert episodes.samples.finished[row] == (whole and len(said) == 3)
        assert all(piece[-1] == model.tokenizer.eos_token_id for piece in pieces[:-1:2]), (
            "cut messages end it"
        )
        several += len(said) > 1
        assert episodes.answers[row] == said[-1]
        assert made[row].row == DATA[row // 8]
        assert made[row].heard[-1][-1]["content"] == said[-1]
    assert several > 8, "many had a second turn"
    assert len(sequences.prompt_ids) == 4, "the members of a group share their prompt"

    scores = completion_log_probs(model.model, sequences).log_probs
    assert torch.allclose(scores, episodes.samples.log_probs, atol=1e-4), (
        "sampler = scorer, in later turns too"
    )


def test_an_episode_depends_on_its_own_number_alone() -> None:
    """Not on those beside it, some of which have ended: several processes play what one would."""
    model = chat_model()

    def make() -> Scripted:
        return Scripted(GO_ON, GO_ON, STOP)

    whole = play_with(model, make, group_size=6)
    for start in (0, 2):
        part = play_with(model, make, data=DATA[start : start + 2], group_size=6, first_row=6 * start)
        assert part.messages == whole.messages[6 * start : 6 * start + 12]
        assert part.rewards.sum(1).tolist() == whole.rewards.sum(1)[6 * start : 6 * start + 12].tolist()
    # Sharded weights: a process whose episodes have ended makes the passes of the others.
    waits = play_with(model, make, group_size=6, busiest=lambda count: 24)
    assert waits.messages == whole.messages
    calls = list[int]()

    def busiest(count: int) -> int:
        calls.append(count)
        return 3 if len(calls) <= 3 else 0

    alone = play_with(model, make, data=DATA[:1], busiest=busiest)
    assert len(calls) == 3, "it goes on sampling with the others, to max_turns"
    assert len(alone.messages) == 1


@pytest.mark.parametrize("train", ["grpo", "ppo"])
def test_one_turn_is_what_a_reward_function_gives(train: str) -> None:
    class OneTurn:
        def reset(self, row: Any) -> Any:
            return row["prompt"]

        def step(self, messages: Any) -> Any:
            return [], True, count_ones([messages[-1]["content"]])[0]

    data = [{"prompt": record["prompt"]} for record in DATA]
    changes = {**COMMON, "sampling": SHORT, "beta": 0.1, "minibatches": 2, "epochs_per_batch": 2}
    results = []
    for environment in (None, OneTurn):
        functions: Any = count_ones if environment is None else ()
        common: dict[str, Any] = {"environment": environment, "progress": False}
        if train == "grpo":
            config = GRPOConfig(**changes, group_size=4, drop_unfinished=True)
            results.append(train_grpo(chat_model(), data, functions, config, **common))
        else:
            ppo = PPOConfig(**changes, samples_per_prompt=2)
            results.append(train_ppo(chat_model(), data, functions, ppo, **common))
    assert furthest(weights(results[0]), weights(results[1])) == 0
    for one, other in zip(results[0].history, results[1].history, strict=True):
        assert one.reward == other.reward == other.rewards["environment"]
        assert (one.length, one.entropy, one.kl, one.tokens) == (
            other.length,
            other.entropy,
            other.kl,
            other.tokens,
        )


# --- The exact gradient -----------------------------------------------------------------------------------------


def test_the_gradient_of_two_turns_is_that_of_the_enumerated_language() -> None:
    """Three words and an end; a message has two tokens at most. Each episode has a probability and a reward."""
    model, prompt = chat_model(words=3), user("one")
    model.model.double()
    end, tokens = model.tokenizer.eos_token_id, range(len(model.tokenizer))
    whole = [[end], *([x, end] for x in tokens if x != end)]
    cut = [[x, y] for x, y in product(tokens, tokens) if x != end and y != end]

    class Talk:
        """Replies by what was said; pays for "two" at first and for "three" after the reply "one"."""

        def reset(self, row: Any) -> Any:
            return row["prompt"]

        def step(self, messages: Any) -> Any:
            words, turn = messages[-1]["content"].split(), len(messages) // 2
            if turn == 1:
                return user("one" if "two" in words else "three"), False, 1.0 * ("two" in words)
            return [], True, 2.0 * ("three" in words) * (messages[-2]["content"] == "one") - 0.5

    scripts = [[m] for m in cut] + [[m, n] for m in whole for n in whole + cut]

    def draw(contexts: Any, each: int, turn: int, numbers: Any) -> Samples:
        rows = [scripts[number] for number in numbers] if turn else scripts
        said = [row[turn] for row in rows]
        made = collate(contexts, said, [[-1.0] * len(ids) for ids in said], model)
        return replace(made, finished=torch.tensor([ids[-1] == end for ids in said]))

    config = OnlineConfig(sampling=SamplingConfig(max_new_tokens=2), max_turns=2)
    data = [{"prompt": prompt}]
    examples = prompt_examples(data, model.tokenizer, config.limits(model))
    episodes = play(Talk, examples, draw, model, config, group_size=len(scripts))

    # The objective by itself: plain forward passes over plain lists of tokens.
    def log_prob(context: list[int], said: list[int]) -> torch.Tensor:
        ids = torch.tensor([context + said])
        log_p = model.model(ids).logits[0].log_softmax(-1)
        return sum((log_p[len(context) + k - 1, token] for k, token in enumerate(said)), torch.tensor(0.0))

    name = model.tokenizer.convert_tokens_to_ids
    start = encode_prompt(model.tokenizer, prompt)
    objective, total = torch.tensor(0.0, dtype=torch.float64), 0.0
    for script in scripts:
        first = script[0]
        probability, reward = log_prob(start, first), 1.0 * (name("two") in first)
        if len(script) == 2:
            heard = name(["<user>", "one" if name("two") in first else "three", "<bot>"])
            probability = probability + log_prob(start + first + heard, script[1])
            reward += 2.0 * (name("three") in script[1]) * (name("two") in first) - 0.5
        objective, total = objective + probability.exp() * reward, total + float(probability.detach().exp())
    assert total == pytest.approx(1.0)
    parameters = list(model.model.parameters())
    exact = torch.autograd.grad(objective, parameters)

    def estimated(mask: torch.Tensor) -> tuple[torch.Tensor, ...]:
        sequences = replace(episodes.samples.sequences, policy_mask=mask)
        scores = completion_log_probs(model.model, sequences).log_probs.sum(1)
        own = completion_log_probs(model.model, episodes.samples.sequences).log_probs.sum(1)
        weights = own.detach().exp() * episodes.rewards.sum(1)
        return torch.autograd.grad((weights * scores).sum(), parameters)

    def distance(found: tuple[torch.Tensor, ...]) -> float:
        return max(float((a - b).abs().max()) for a, b in zip(found, exact, strict=True))

    scale = max(float(g.abs().max()) for g in exact)
    assert distance(estimated(episodes.samples.sequences.policy_mask)) < 1e-6 * scale
    everything = estimated(episodes.samples.sequences.completion_mask)
    assert distance(everything) > 0.01 * scale, "with the environment's tokens it is another gradient"


def test_advantages_pass_over_what_the_environment_wrote() -> None:
    torch.manual_seed(0)
    mask = torch.tensor([[1, 1, 0, 0, 1, 0, 1, 0], [1, 0, 0, 1, 1, 1, 0, 0], [1, 1, 1, 1, 0, 0, 0, 0]]).bool()
    rewards, values = torch.randn(2, 3, 8)
    found = token_advantages(rewards, values, mask, gamma=0.9, gae_lambda=0.8)
    for row in range(3):
        kept = mask[row]
        ones = torch.ones(1, int(kept.sum()), dtype=torch.bool)
        alone = token_advantages(
            rewards[row][kept][None], values[row][kept][None], ones, gamma=0.9, gae_lambda=0.8
        )
        for whole, part in zip(found, alone, strict=True):
            assert torch.equal(whole[row][kept], part[0])
            assert (whole[row][~kept] == 0).all()


def test_what_a_trainer_sees_of_an_episode() -> None:
    seen = list[Completions]()

    def watch(batch: Completions) -> torch.Tensor:
        seen.append(batch)
        return -batch.log_probs * batch.advantages[:, None]

    def judge(
        completions: list[str], messages: list[Any], finished: list[bool], **columns: Any
    ) -> list[float]:
        assert columns["goal"]
        assert all(chat[-1]["role"] for chat in messages)
        return [len(text.split()) for text in completions]

    config = GRPOConfig(**COMMON | {"updates": 1}, sampling=SHORT, max_turns=3, group_size=4, beta=0.1)
    result = train_grpo(
        chat_model(), DATA, judge, config, environment=lambda: Scripted(GO_ON, GO_ON, STOP), loss=watch,
        progress=False,
    )  # fmt: skip
    batch, row = seen[0], result.history[0]
    assert batch.mask.equal(batch.sequences.policy_mask)
    assert (batch.sequences.completion_mask & ~batch.mask).any()
    for numbers in (batch.log_probs, batch.sampler_log_probs, batch.reference_log_probs):
        assert (numbers[~batch.mask] == 0).all()
    assert row.length == pytest.approx(batch.mask.sum() / 16)
    assert row.tokens == batch.mask.sum()
    assert row.entropy == pytest.approx(-batch.sampler_log_probs.sum().item() / row.tokens)
    assert row.reward == pytest.approx(row.rewards["environment"] + row.rewards["judge"])
    assert torch.allclose(batch.token_rewards.sum(1), batch.rewards)
    last = [int(mask.nonzero().max()) for mask in batch.mask]
    shares = batch.parts["judge"] + torch.where(batch.token_rewards.gt(0).sum(1) == 3, 1.0, 0.25)
    assert batch.token_rewards[range(16), last].tolist() == pytest.approx(shares.tolist())


def test_where_the_environment_pays_reward_functions_may_abstain() -> None:
    def silent(completions: list[str], **columns: Any) -> list[None]:
        return [None] * len(completions)

    config = GRPOConfig(**COMMON | {"updates": 1}, sampling=SHORT, group_size=4)
    results = [
        train_grpo(
            chat_model(), DATA, functions, config, environment=lambda: Scripted(GO_ON, STOP), progress=False
        )
        for functions in (silent, ())
    ]
    assert furthest(weights(results[0]), weights(results[1])) == 0
    assert math.isnan(results[0].history[0].rewards["silent"])


def test_filters_of_the_sampling_leave_the_gradient_finite() -> None:
    """What the environment writes need not be among the tokens that top-k leaves to the policy."""
    sampling = SamplingConfig(max_new_tokens=4, top_k=2)
    config = GRPOConfig(**COMMON, sampling=sampling, max_turns=3, group_size=4, beta=0.1, epochs_per_batch=2)
    result = train_grpo(
        chat_model(),
        DATA,
        count_ones,
        config,
        environment=lambda: Scripted(GO_ON, GO_ON, STOP),
        progress=False,
    )
    assert all(math.isfinite(row.loss) and row.gradient_norm > 0 for row in result.history)
    assert result.history[0].kl == pytest.approx(0, abs=1e-5)


def test_the_constant_denominator_counts_all_turns() -> None:
    norms = []
    for turns in (2, 4):
        config = GRPOConfig(
            **COMMON | {"updates": 1}, sampling=SHORT, max_turns=turns, group_size=4, loss_mean="constant",
            max_gradient_norm=None,
        )  # fmt: skip
        result = train_grpo(
            chat_model(), DATA, count_ones, config, environment=lambda: Scripted(GO_ON, STOP), progress=False
        )
        norms.append(result.history[0].gradient_norm)
    assert norms[0] == pytest.approx(2 * norms[1], rel=1e-4)


# --- Where an episode ends --------------------------------------------------------------------------------------


def test_an_episode_without_end_is_cut_and_unfinished() -> None:
    model = chat_model()
    config = replace(CONFIG, max_turns=2, sampling=SamplingConfig(max_new_tokens=12))
    episodes = play_with(model, lambda: Scripted(GO_ON), config, group_size=8)
    turns = [sum(m["role"] == "assistant" for m in chat) for chat in episodes.messages]
    assert max(turns) == 2
    assert not episodes.samples.finished.any()
    assert all(chat[-1] == user("two")[0] for chat, n in zip(episodes.messages, turns, strict=True) if n == 2)


def test_an_episode_ends_where_another_message_has_no_room() -> None:
    model = chat_model()
    reply = user(" ".join(["two"] * 7))  # 9 tokens with what the template adds
    for most in (17, 20, 24):
        config = OnlineConfig(sampling=SHORT, max_turns=9, max_episode_tokens=most)
        episodes = play_with(model, lambda: Scripted((reply, False, 0.5)), config, group_size=8)
        sequences = episodes.samples.sequences
        assert int(sequences.lengths.max()) <= most
        first = sequences.policy_mask.long().cumprod(1).sum(1)
        whole = sequences.completion_ids[range(32), first - 1] == model.tokenizer.eos_token_id
        fits = whole & (first + 9 + 8 <= most)
        assert fits.equal(sequences.lengths > first)
        assert bool(fits.any()) == (most > 17)
        assert not episodes.samples.finished.any()
    # The context of the model is a limit too: 64 tokens here.
    config = OnlineConfig(sampling=SamplingConfig(max_new_tokens=20), max_turns=9)
    episodes = play_with(model, lambda: Scripted(GO_ON), config, group_size=8)
    assert int(episodes.samples.sequences.lengths.max()) + 6 <= 64
    with pytest.raises(ValueError, match="max_episode_tokens must be None or >= max_new_tokens = 8, got 7"):
        OnlineConfig(sampling=SHORT, max_episode_tokens=7)


# --- Bad environments -------------------------------------------------------------------------------------------

GOOD = assistant("one")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ((user("two"), False), r"Scripted.step must return \(messages, done, reward\)"),
        (
            (user("two"), False, None),
            "Scripted.step must return a finite reward, 0 where there is none, got None",
        ),
        ((user("two"), False, math.nan), "a finite reward"),
        ((user("two"), "no", 0.0), "must return whether it is done"),
        (([], False, 0.0), "the messages that Scripted.step returns must be text or a non-empty list"),
        (("two", False, 0.0), "Scripted.step must return a list of messages, got 'two'"),
        (
            ([{"role": "user"}, "two"], False, 0.0),
            "message 1 of the messages that Scripted.step returns must look",
        ),
        ((GOOD, False, 0.0), "must not return messages of the assistant's"),
        (([{"role": "user", "content": None}], False, 0.0), "must be text for this chat template"),
    ],
)
def test_what_a_step_may_not_return(answer: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        play_with(chat_model(), lambda: Scripted(answer), group_size=8)


@pytest.mark.parametrize("start", ["one", [], GOOD, None])
def test_what_a_reset_may_not_return(start: Any) -> None:
    class Odd(Scripted):
        def reset(self, row: Any) -> Any:
            return start

    with pytest.raises(ValueError, match=r"reset returns must be|must not end with the assistant's message"):
        play_with(chat_model(), Odd)


def test_an_environment_that_raises_is_named_with_the_turn_and_the_prompt(tmp_path: Any) -> None:
    class Breaks(Scripted):
        def step(self, messages: Any) -> Any:
            if len(messages) > 2 or self.row["goal"] == "four":
                raise KeyError("lost")
            return GO_ON

    config = GRPOConfig(**COMMON | {"batch_size": 1}, sampling=SHORT, group_size=4, checkpoint_every=1)
    with pytest.raises(
        RuntimeError, match=r"Breaks.step raised KeyError: 'lost' \(in turn [12] of the episode for"
    ):
        train_grpo(
            chat_model(), DATA, (), config, environment=Breaks, progress=False, checkpoint_dir=tmp_path
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"environment": Scripted(STOP)}, "environment must be a function or class that makes objects"),
        ({"environment": dict}, "environment must be a function or class that makes objects"),
        ({"data": [{"prompt": user("one"), "messages": 1}]}, "given 'messages' of the environment"),
        ({"reward_functions": {"environment": count_ones}}, "no reward function may be called 'environment'"),
        ({"data": [{"prompt": "one"}]}, "Scripted.reset returns must be a list of messages"),
    ],
)
def test_what_a_trainer_refuses(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "data": DATA,
        "reward_functions": (),
        "environment": lambda: Scripted(STOP),
        **options,
    }
    config = GRPOConfig(**COMMON | {"batch_size": 1}, sampling=SHORT, group_size=2)
    with pytest.raises(ValueError, match=message):
        train_grpo(
            chat_model(), given.pop("data"), given.pop("reward_functions"), config, progress=False, **given
        )
    with pytest.raises(ValueError, match="at least one reward function"):
        train_grpo(chat_model(), DATA, (), config, progress=False)


# --- Coroutines -------------------------------------------------------------------------------------------------


def test_coroutines_are_awaited_together_also_in_a_notebook() -> None:
    class Slow(Scripted):
        running = most = 0

        async def reset(self, row: Any) -> Any:
            await asyncio.sleep(0)
            return row["prompt"]

        async def step(self, messages: Any) -> Any:
            Slow.running += 1
            Slow.most = max(Slow.most, Slow.running)
            await asyncio.sleep(0.01)
            Slow.running -= 1
            return super().step(messages)

    model = chat_model()
    plain = play_with(model, lambda: Scripted(GO_ON, STOP))

    async def notebook() -> Any:
        return play_with(model, lambda: Slow(GO_ON, STOP))

    assert asyncio.run(notebook()).messages == plain.messages
    assert Slow.most == 4

    async def fails() -> None:
        raise KeyError("lost")

    settled = settle([lambda: 1, fails, lambda: 1 / 0])
    assert settled[0] == 1
    assert isinstance(settled[1], KeyError)
    assert isinstance(settled[2], ZeroDivisionError)


# --- Chat templates ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, TRIMMED, TURNS, INSTRUCTION, THINKING, SWITCH, THINKS])
@pytest.mark.parametrize("thinks", [None, False])
def test_what_comes_between_two_messages_is_what_the_template_writes(template: str, thinks: Any) -> None:
    if thinks is False and template is not SWITCH:
        pytest.skip("the template has no such switch")
    tokenizer = byte_tokenizer(eos=END if "im_end" in template and template is not THINKS else "</s>",
                               template=template)  # fmt: skip
    options = {} if thinks is None else {"enable_thinking": thinks}
    chat = [*user("Hi"), *assistant("Ho"), *user("So"), *assistant("<think>\nhm\n</think>\n\nWell")]
    ids = encode_reply(tokenizer, chat, user("Words?"), **options)
    text = str(tokenizer.decode(ids))
    expected = {
        CHATML: "\n<|im_start|>user\nWords?<|im_end|>\n<|im_start|>assistant\n",
        TRIMMED: "user: Words?</s>assistant: ",
        TURNS: "\n<start>user\nWords?<end_of_turn>\n<start>assistant\n",
        INSTRUCTION: "[INST] Words? [/INST]",
        THINKS: "<|im_start|>Words?<|im_end|><think>\n",
    }
    wanted = expected.get(template, expected[CHATML])
    assert text == wanted + ("<think>\n\n</think>\n\n" if thinks is False else "")
    # What was said plays no part: thoughts that a template leaves out of earlier messages stay in the context.
    other = [*user("Hi"), *assistant("No"), *user("So"), *assistant("Words")]
    assert encode_reply(tokenizer, other, user("Words?"), **options) == ids


def test_a_template_that_rewrites_the_conversation_is_refused() -> None:
    counts = (
        "{{ messages | length }}:" + CHATML  # the beginning changes with every message
    )
    tokenizer = byte_tokenizer(eos=END, template=counts)
    with pytest.raises(ValueError, match=r"rewrites the conversation as it goes on: '1:.*' becomes '3:"):
        encode_reply(tokenizer, [*user("Hi"), *assistant("Ho")], user("So"))


# --- Tools ------------------------------------------------------------------------------------------------------


def add(a: int, b: int) -> int:
    return a + b


async def wait(seconds: float = 0.0) -> str:
    await asyncio.sleep(seconds)
    return "waited"


def ask(environment: ToolEnvironment, text: str) -> Any:
    return asyncio.run(environment.step([*user("?"), *assistant(text)]))


def call(text: str) -> str:
    return f"<tool_call>\n{text}\n</tool_call>"


def test_calls_are_answered_and_an_answer_ends_the_episode() -> None:
    environment = ToolEnvironment([add, wait])
    assert environment.reset({"prompt": user("?")}) == user("?")
    text = "Well. " + call('{"name": "add", "arguments": {"a": 2, "b": 3}}') + call('{"name": "wait"}')
    replies, done, reward = ask(environment, text)
    assert [(m["role"], m["name"], m["content"]) for m in replies] == [
        ("tool", "add", "5"),
        ("tool", "wait", "waited"),
    ]
    assert (done, reward) == (False, 0.0)
    assert ask(environment, "It is 5") == ([], True, 0.0)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ('{"name": "sub", "arguments": {}}', "the tool must be one of ['add'], got 'sub'"),
        ('{"name": "add", "arguments": {"a": 1}}', "TypeError: add() missing 1 required"),
        ('{"name": "add", "arguments": {"a": 1, "b": "x"}}', "TypeError: unsupported operand"),
        ('{"name": "add", "arguments": [1, 2]}', "a tool call must be"),
        ("add 1 2", "error: JSONDecodeError"),
        ("[]", "a tool call must be"),
    ],
)
def test_errors_of_a_call_are_told_or_end_the_episode(text: str, told: str) -> None:
    replies, done, _ = ask(ToolEnvironment([add]), call(text))
    assert told in replies[0]["content"]
    assert replies[0]["content"].startswith("error: ")
    assert not done
    replies, done, reward = ask(ToolEnvironment([add], on_error="end"), call(text))
    assert told in replies[0]["content"]
    assert (done, reward) == (True, 0.0)
    with pytest.raises(ValueError, match="on_error must be 'tell' or 'end', got 'raise'"):
        ToolEnvironment([add], on_error="raise")  # type: ignore[arg-type]
    for tools, names in (([add, partial(add, 1)], r"\['add', ''\]"), ([add, add], r"\['add', 'add'\]")):
        with pytest.raises(
            ValueError, match=f"tools must be functions, each with a name of its own, got {names}"
        ):
            ToolEnvironment(tools)  # type: ignore[arg-type]
    for environment in (ToolEnvironment([add]), MethodTools(Increment())):
        with pytest.raises(
            ValueError, match="prompts must be lists of messages where there are tools, got 'one'"
        ):
            environment.reset({"prompt": "one", "start": 3})


def test_a_form_of_calls_of_ones_own() -> None:
    def parse(text: str) -> list[tuple[str, dict[str, Any]]]:
        a, sign, b = text.partition("+")
        return [("add", {"a": int(a), "b": int(b)})] if sign else []

    replies, done, _ = ask(ToolEnvironment([add], parse=parse), "2+3")
    assert replies[0]["content"] == "5"
    assert not done


class Increment:
    """As in TRL's documentation of ``environment_factory``, with a reward of its own."""

    def reset(self, **row: Any) -> str:
        self.counter = row["start"]
        return f" Now it is {self.counter}."

    def increment(self, step: int) -> int:
        """Add to the counter."""
        self.counter += step
        return self.counter

    def get_reward(self) -> float:
        return float(self.counter == 5)

    def _hidden(self) -> None: ...


def test_an_environment_in_the_form_of_trl() -> None:
    environment = MethodTools(Increment())
    assert sorted(environment.tools) == ["increment"]
    row = {"prompt": user("Count to 5."), "start": 2}
    assert environment.reset(row) == user("Count to 5. Now it is 2.")
    assert row["prompt"] == user("Count to 5.")
    replies, done, reward = ask(environment, call('{"name": "increment", "arguments": {"step": 3}}'))
    assert (replies[0]["content"], done, reward) == ("5", False, 0.0)
    assert ask(environment, "Done") == ([], True, 1.0)
    again = MethodTools(Increment(), on_error="end")
    again.reset(row)
    assert ask(again, call('{"name": "increment"}'))[1:] == (True, 0.0)


def test_an_episode_that_is_cut_is_asked_for_its_reward_once() -> None:
    class Pays(Increment):
        def get_reward(self) -> float:
            self.asked = getattr(self, "asked", 0) + 1
            return -1.0

    class Calls(MethodTools):
        async def step(self, messages: Any) -> Any:
            """Take whatever is said for a call."""
            return await super().step([assistant(call('{"name": "increment", "arguments": {"step": 1}}'))[0]])

    data = [{"prompt": user("one"), "start": 2}]
    for kind, turns in ((Calls, 2), (MethodTools, 1)):
        made: list[Pays] = []

        def make(kind: Any = kind, made: Any = made) -> MethodTools:
            made.append(Pays())
            return kind(made[-1])  # type: ignore[no-any-return]

        episodes = play_with(chat_model(), make, replace(CONFIG, max_turns=2), data, group_size=8)
        assert [game.asked for game in made] == [1] * 8
        assert episodes.rewards.sum(1).tolist() == [-1.0] * 8
        said = [sum(m["role"] == "assistant" for m in chat) for chat in episodes.messages]
        assert max(said) == turns


# --- What is the user's stays so --------------------------------------------------------------------------------


def test_what_an_environment_changes_is_its_own() -> None:
    """Its hint is read, the data stay as they are, and so does what was said."""

    class Careless(Scripted):
        def reset(self, row: Any) -> Any:
            row["prompt"][-1]["content"] += " nine"
            row["goal"].append("nine")
            self.row = row
            return row["prompt"]

        def step(self, messages: Any) -> Any:
            answer = super().step([*messages])
            messages[0]["content"] = "lost"
            messages.clear()
            self.row["prompt"][-1]["content"] = "lost"
            return answer

    class Hints(Scripted):
        def reset(self, row: Any) -> Any:
            return user(row["prompt"][0]["content"] + " nine")

    data = [{"prompt": user("one"), "goal": ["one"]}]
    careless = play_with(chat_model(), lambda: Careless(GO_ON, STOP), data=data, group_size=2)
    hints = play_with(chat_model(), lambda: Hints(GO_ON, STOP), data=data, group_size=2)
    assert data == [{"prompt": user("one"), "goal": ["one"]}]
    assert careless.messages == hints.messages
    assert torch.equal(careless.samples.sequences.prompt_ids, hints.samples.sequences.prompt_ids)


def test_replies_may_be_one_list_that_grows() -> None:
    class Grows(Scripted):
        def step(self, messages: Any) -> Any:
            self.said = getattr(self, "said", user("two"))
            answer = (self.said, len(messages) > 3, 0.0)
            super().step(messages)
            return answer

    shared = play_with(chat_model(), lambda: Grows(GO_ON), group_size=2)
    fresh = play_with(
        chat_model(), lambda: Scripted((user("two"), False, 0.0), (user("two"), True, 0.0)), group_size=2
    )
    assert shared.messages == fresh.messages


@pytest.mark.parametrize("done", [np.array(True), np.bool_(True), torch.tensor(True)])
def test_the_end_may_be_told_by_numpy_or_a_tensor(done: Any) -> None:
    episodes = play_with(chat_model(), lambda: Scripted(([], done, np.float32(1))), group_size=2)
    assert episodes.samples.finished.any()


def test_one_object_for_all_episodes_is_refused() -> None:
    one, game = Scripted(STOP), Increment()
    config = GRPOConfig(**COMMON, sampling=SHORT, group_size=2)
    for shared in (lambda: one, lambda: MethodTools(game)):
        with pytest.raises(ValueError, match="environment must make another object for each episode"):
            train_grpo(chat_model(), DATA, (), config, environment=shared, progress=False)  # type: ignore[arg-type]


def test_no_function_may_take_the_name_of_the_environments_rewards() -> None:
    def environment(completions: list[str], **columns: Any) -> list[float]:
        return [0.0] * len(completions)

    config = GRPOConfig(**COMMON, sampling=SHORT, group_size=2)
    with pytest.raises(ValueError, match="no reward function may be called 'environment'"):
        train_grpo(
            chat_model(), DATA, environment, config, environment=lambda: Scripted(STOP), progress=False
        )


def test_weights_of_functions_that_are_not_there_are_refused() -> None:
    config = GRPOConfig(**COMMON, sampling=SHORT, group_size=2, reward_weights=(0.5,))
    with pytest.raises(ValueError, match="reward_weights must be None where there are no reward functions"):
        train_grpo(chat_model(), DATA, (), config, environment=lambda: Scripted(STOP), progress=False)


def test_a_cancelled_step_is_named() -> None:
    class Cancelled(Scripted):
        async def step(self, messages: Any) -> Any:
            raise asyncio.CancelledError

    with pytest.raises(RuntimeError, match=r"Cancelled.step raised CancelledError"):
        play_with(chat_model(), lambda: Cancelled(STOP))


def test_no_call_may_be_told_by_none() -> None:
    assert ask(ToolEnvironment([add], parse=lambda text: None), "five") == ([], True, 0.0)  # type: ignore[arg-type, return-value]
