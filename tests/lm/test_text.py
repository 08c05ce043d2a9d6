"""Text in, text out: what is decoded, where a completion ends, and what the chat template writes."""

from __future__ import annotations

import json
import re
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_data import (
    BARE,
    BOS,
    CHATML,
    END,
    EOS,
    START,
    THINKING,
    TRIMMED,
    assistant,
    byte_tokenizer,
    text_of,
    user,
)
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from policyopt.lm import (
    DPOConfig,
    GRPOConfig,
    LanguageModel,
    LoRA,
    PPOConfig,
    RankingConfig,
    RewardConfig,
    RewardModel,
    SamplingConfig,
    SFTConfig,
    TransformersSampler,
    add_lora,
    generate,
    load,
    train_dpo,
    train_grpo,
    train_ppo,
    train_ranking,
    train_reward_model,
    train_sft,
)
from policyopt.lm.data import (
    Limits,
    encode_completion,
    encode_prompt,
    preference_pairs,
    prompt_examples,
    ranked_lists,
    sft_examples,
)
from policyopt.lm.sequences import Sequences

TOOLS = (
    "{% if tools %}<tools>{{ tools | tojson }}</tools>{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content or '' }}"
    "{% if m.tool_calls %}<call>{{ m.tool_calls[0].function.name }}</call>{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CHANNELS = (  # as gpt-oss
    "{% for m in messages %}{% if m.role == 'assistant' %}<|im_start|>assistant<s>final<|im_start|>"
    "{{ m.content }}{% if loop.last and not add_generation_prompt %}</s>{% else %}<|im_end|>{% endif %}"
    "{% else %}<|im_start|>{{ m.role }}<s>{{ m.content }}<|im_end|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant{% endif %}"
)
SWITCH = THINKING.replace(  # as Qwen3
    "assistant\n{% endif %}",
    "assistant\n{% if enable_thinking is false %}<think>\n\n</think>\n\n{% endif %}{% endif %}",
)
THINKS = (  # as DeepSeek-R1: the prompt opens a thought, and a finished conversation shows none
    "{% for m in messages %}{% if m.role == 'user' %}<|im_start|>{{ m.content }}{% else %}"
    "<|im_end|>{{ m.content.split('</think>')[-1] }}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_end|><think>\n{% endif %}"
)
FORGETS = (  # thoughts of earlier messages are removed
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last else m.content.split('</think>')[-1] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}<|im_end|>{% endgeneration %}{% else %}{{ m.content }}<|im_end|>{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MARKED_SHORT = MARKED.replace("<|im_end|>{% endgeneration %}", "{% endgeneration %}<|im_end|>")
TWO_ENDS = CHATML.replace(
    "{{ m['content'] }}<|im_end|>", "{{ m['content'] }}{{ '</s>' if m['content'] == 'x' else '<|im_end|>' }}"
)
PARTS = [{"role": "user", "content": [{"type": "text", "text": "Hi"}]}]
FUNCTION = [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]
CHAT = [*user("a"), *assistant("bc"), *user("d"), *assistant("e")]
LETTERS = "abxyzABQ019.:,!?'"


def tiny_model(tokenizer: Any, rows: int | None = None, seed: int = 0) -> LanguageModel:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=rows or len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=128, eos_token_id=None,
        bos_token_id=None,
    )  # fmt: skip
    return LanguageModel(LlamaForCausalLM(config).eval(), tokenizer, "tiny")


# --- decode inverts encode -------------------------------------------------------------------------------------

WORDS = ["yes", "no", "the", "four"]


def _bpe(space: str, letters: str = LETTERS + "\n") -> models.BPE:
    """All letters, and the words above with and without the sign of a space before them."""
    vocabulary = {"<unk>": 0, BOS: 1, EOS: 2, **{c: i for i, c in enumerate([space, *letters], 3)}}
    merges = []
    for word in [prefix + word for word in WORDS for prefix in ("", space)]:
        for i in range(1, len(word)):
            for token in (word[:i], word[i], word[: i + 1]):
                vocabulary.setdefault(token, len(vocabulary))
            if (word[:i], word[i]) not in merges:
                merges.append((word[:i], word[i]))
    return models.BPE(vocab=vocabulary, merges=merges, unk_token="<unk>")


def _wrap(tokenizer: Tokenizer, **options: Any) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=BOS, eos_token=EOS, unk_token="<unk>", **options
    )


def _sentence_piece(scheme: str) -> PreTrainedTokenizerFast:
    """``"prepend"`` as Llama 2's file has it; the others as Metaspace has it."""
    tokenizer = Tokenizer(_bpe("▁"))
    if scheme == "prepend":
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=False)
    steps = [decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    tokenizer.decoder = decoders.Sequence(steps)
    return _wrap(tokenizer)


def _without_dummy_space() -> PreTrainedTokenizerFast:
    """As Gemma."""
    tokenizer = Tokenizer(_bpe("▁"))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return _wrap(tokenizer)


def _byte_level(*, prefix: bool) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(_bpe("Ġ", "".join(sorted(set(pre_tokenizers.ByteLevel.alphabet()) - {"Ġ"}))))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
    tokenizer.decoder = decoders.ByteLevel()
    return _wrap(tokenizer, clean_up_tokenization_spaces=True)


def _unigram() -> PreTrainedTokenizerFast:
    pieces = ["<unk>", BOS, EOS, "▁", "\n", *LETTERS, *WORDS, *(f"▁{word}" for word in WORDS)]
    pieces += sorted(set("".join(WORDS)) - set(LETTERS))
    tokenizer = Tokenizer(
        models.Unigram([(piece, -1.0 - 0.01 * i) for i, piece in enumerate(pieces)], unk_id=0)
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return _wrap(tokenizer)


def _characters() -> PreTrainedTokenizerFast:
    letters = [BOS, EOS, "<unk>", *dict.fromkeys(LETTERS + " \n" + "".join(WORDS))]
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(letters)}, [], unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    return _wrap(tokenizer)


def _word_piece() -> PreTrainedTokenizerFast:
    pieces = ["<unk>", BOS, EOS, *LETTERS, *WORDS, *(f"##{c}" for c in LETTERS + "esnothfur")]
    vocabulary = {piece: i for i, piece in enumerate(dict.fromkeys(pieces))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece(cleanup=False)
    return _wrap(tokenizer)


FAMILIES = {
    "prepend": _sentence_piece("prepend"),
    "first": _sentence_piece("first"),
    "always": _sentence_piece("always"),
    "without dummy space": _without_dummy_space(),
    "byte level": _byte_level(prefix=False),
    "byte level, prefix space": _byte_level(prefix=True),
    "unigram": _unigram(),
    "characters": _characters(),
    "word piece": _word_piece(),
}
TEXTS = st.lists(st.sampled_from([*LETTERS, *WORDS, " ", " ", "  ", "\n"]), max_size=8).map("".join)


@pytest.mark.parametrize("family", FAMILIES)
@given(text=TEXTS)
def test_decode_inverts_encode(family: str, text: str) -> None:
    tokenizer = FAMILIES[family]
    model = LanguageModel(None, tokenizer)
    ids = encode_completion(tokenizer, text)

    decoded = model.decode(ids)

    assert encode_completion(tokenizer, decoded) == ids
    if family == "word piece":  # knows no spaces, only words
        assert decoded.split() == tokenizer.decode(ids, skip_special_tokens=True).split()
    else:
        assert decoded == text


@pytest.mark.parametrize("family", [name for name in FAMILIES if name != "word piece"])
def test_a_completion_is_decoded_to_what_it_adds_to_its_prompt(family: str) -> None:
    """The text of prompt and completion together, from the tokenizer itself."""
    tokenizer = FAMILIES[family]
    prompt = encode_prompt(tokenizer, "Q:")
    for text in (" yes", "yes", "  no", "\nno", " the four.", " ", ""):
        whole = tokenizer.decode(prompt + encode_completion(tokenizer, text), skip_special_tokens=True)
        assert whole.lstrip(" ") == f"Q:{text}"


@pytest.mark.parametrize("family", ["prepend", "first"])
def test_a_reward_model_sees_the_tokens_that_were_sampled(family: str) -> None:
    tokenizer = FAMILIES[family]
    model = tiny_model(tokenizer)
    reward_model = RewardModel(model)
    torch.nn.init.normal_(reward_model.network.score.weight)
    ids = [encode_completion(tokenizer, text, "Q:") for text in (" yes", "yes", " no", "no")]
    sequences = Sequences.pad([encode_prompt(tokenizer, "Q:")], ids, [0] * 4)
    direct = reward_model.scores(sequences).tolist()

    scores = reward_model([model.decode(row) for row in ids], ["Q:"] * 4)

    assert scores == direct
    assert len(set(scores)) == 4


SCRIPTS = "aZ1xyz20éñßλπжщבגथ "


@given(
    alphabet=st.sets(st.sampled_from(SCRIPTS), min_size=1),
    kind=st.sampled_from(["characters", "bytes"]),
    has_decoder=st.booleans(),
    data=st.data(),
)
def test_a_tokenizer_of_drawn_characters_is_inverted_or_refused(
    alphabet: set[str], kind: str, has_decoder: bool, data: st.DataObject
) -> None:
    """Without a decoder the library of tokenizers puts spaces between tokens; no report has this."""
    signs = sorted(pre_tokenizers.ByteLevel.alphabet()) if kind == "bytes" else sorted(alphabet)
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate([BOS, EOS, "<unk>", *signs])}, []))
    if kind == "bytes":
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    if has_decoder:
        tokenizer.decoder = decoders.ByteLevel() if kind == "bytes" else decoders.Fuse()
    model = LanguageModel(None, _wrap(tokenizer))
    text = "".join(data.draw(st.lists(st.sampled_from(sorted(alphabet)), max_size=8)))
    ids = encode_completion(model.tokenizer, text)

    if has_decoder or (kind == "characters" and alphabet == {" "}):
        assert model.decode(ids) == text
    else:
        with pytest.raises(ValueError, match=r"tokenizer needs a decoder for '(.)\1', got '\1 \1'"):
            model.decode(ids)


def test_words_are_joined_by_spaces_without_a_decoder() -> None:
    """That is what decoding them means, also where letters and digits are among them."""
    words = ["<unk>", BOS, EOS, "a", "1", "yes", "é", "."]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    model = LanguageModel(None, _wrap(tokenizer))
    assert model.decode(encode_completion(model.tokenizer, "yes a 1 é .")) == "yes a 1 é ."


# --- the end ---------------------------------------------------------------------------------------------------


def test_what_ends_a_chat_completion_stops_the_sampling() -> None:
    """A base model with ChatML: its EOS is not the token that ends a message."""
    tokenizer = byte_tokenizer(template=CHATML, eos=EOS)
    model = tiny_model(tokenizer)
    end = tokenizer.convert_tokens_to_ids(END)
    assert encode_completion(tokenizer, "ab", user("x"))[-1] == end
    assert model.eos_ids == tuple(sorted((tokenizer.eos_token_id, end)))

    data = [{"messages": [*user("x"), *assistant("ab")]}]
    train_sft(model, data, SFTConfig(updates=60, batch_size=1, learning_rate=1e-2), progress=False)
    samples = TransformersSampler(model).sample(
        [encode_prompt(tokenizer, user("x"))], 4, SamplingConfig(max_new_tokens=8), seed=0
    )

    assert samples.finished.tolist() == [True] * 4
    assert generate(model, [user("x")], SamplingConfig(max_new_tokens=8, temperature=0.0)) == [["ab"]]
    seen: list[Any] = []

    def reward(completions: list[str], finished: list[bool]) -> list[float]:
        seen.append((completions, finished))
        return [0.0, 1.0]

    short = SamplingConfig(max_new_tokens=8, temperature=0.1)
    config = GRPOConfig(updates=1, batch_size=1, group_size=2, sampling=short)
    train_grpo(model, [{"prompt": user("x")}], reward, config, progress=False)
    assert seen == [(["ab", "ab"], [True, True])]


@pytest.mark.parametrize(
    ("text", "written"),
    [(f"x{END}", f"x{END}"), (f"x{END}y", f"x{END}y{END}"), (END, END), ("", END), (f"x{EOS}", f"x{EOS}")],
)
def test_a_text_that_holds_the_end_already_gets_no_second_one(text: str, written: str) -> None:
    tokenizer = byte_tokenizer(template=CHATML, eos=EOS)
    assert text_of(tokenizer, encode_completion(tokenizer, text, user("Hi"))) == written


def test_a_conversation_that_ends_with_a_tool_is_refused() -> None:
    messages = [*user("Hi"), {"role": "tool", "content": "42"}]
    with pytest.raises(ValueError, match=r"item 0: messages must be .* got \['user', 'tool'\]"):
        sft_examples([{"messages": messages}], byte_tokenizer(template=TOOLS, eos=END))


def test_templates_without_an_end_of_their_own_leave_the_eos() -> None:
    for template in (
        None,
        "{% for m in messages %}{{ m.content }}\n{% endfor %}",
        "{{ raise_exception('no') }}",
    ):
        tokenizer = byte_tokenizer(template=template)
        assert tiny_model(tokenizer).eos_ids == (tokenizer.eos_token_id,)


# --- the template ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "answer"),
    [
        (CHATML, assistant("Ho")),
        (CHANNELS, assistant("Ho")),
        (TRIMMED, assistant(" Ho \n")),
        (TOOLS, assistant("<think>")),
        (TOOLS, [{"role": "assistant", "content": None, "tool_calls": FUNCTION}]),
        (TOOLS, [{"role": "assistant", "content": "Let me see.", "tool_calls": FUNCTION}]),
    ],
)
def test_prompt_and_completion_are_what_the_template_writes(template: str, answer: list[Any]) -> None:
    tokenizer = byte_tokenizer(template=template, eos=EOS)
    whole = tokenizer.apply_chat_template([*user("Hi"), *answer], tokenize=False)
    other = assistant("Hu")

    (example,) = sft_examples([{"messages": [*user("Hi"), *answer]}], tokenizer)
    (pair,) = preference_pairs([{"prompt": user("Hi"), "chosen": answer, "rejected": other}], tokenizer)
    (ranked,) = ranked_lists([{"prompt": user("Hi"), "ranked": [answer, other]}], tokenizer)

    assert text_of(tokenizer, example.prompt_ids + example.completion_ids) == whole.rstrip("\n")
    assert pair.chosen_ids == ranked.ranked_ids[0] == example.completion_ids


@pytest.mark.parametrize("template", [THINKING, SWITCH])
def test_an_empty_block_of_thoughts_is_left_out(template: str) -> None:
    tokenizer = byte_tokenizer(template=template, eos=END)
    (example,) = sft_examples([{"messages": [*user("Hi"), *assistant("Ho")]}], tokenizer)
    assert text_of(tokenizer, example.completion_ids) == "Ho<|im_end|>"


def test_settings_of_the_template_reach_the_prompt() -> None:
    tokenizer = byte_tokenizer(template=SWITCH, eos=END)
    messages = [*user("Hi"), *assistant("Ho")]
    whole = tokenizer.apply_chat_template(messages, tokenize=False, enable_thinking=False)
    limits = Limits(chat_template_kwargs={"enable_thinking": False})

    (example,) = sft_examples([{"messages": messages}], tokenizer, limits)
    (prompt,) = prompt_examples([{"prompt": user("Hi")}], tokenizer, limits)

    assert text_of(tokenizer, example.prompt_ids + example.completion_ids) == whole.rstrip("\n")
    assert text_of(tokenizer, prompt.prompt_ids).endswith("assistant\n<think>\n\n</think>\n\n")
    assert prompt.prompt_ids == example.prompt_ids


@pytest.mark.parametrize(
    ("template", "messages", "message"),
    [
        (THINKS, [*user("Hi"), *assistant("Ho")], r"rewrites the conversation.*'<think>\\n' becomes 'Ho</s>'"),
        (CHATML, [*PARTS, *assistant("Ho")], "message 0 must be text for this"),
        (CHATML, [{"role": "user", "text": "Hi"}, *assistant("Ho")], "message 0 must be text .* got None"),
        (CHATML, [*user("Hi"), {"role": "assistant", "tool_calls": FUNCTION}], r"never reads \['tool_calls'\]"),
        (CHATML, [*user("Hi"), {**assistant("Ho")[0], "reasoning_content": "Hm"}], r"never reads \['reasoning_c"),
        (TWO_ENDS, [*user("Hi"), *assistant("x")], "must end this answer with '<|im_end|>"),
    ],
)  # fmt: skip
def test_what_the_template_would_change_is_refused(template: str, messages: list[Any], message: str) -> None:
    tokenizer = byte_tokenizer(template=template, eos=EOS)
    good = [*user("Hi"), *assistant("")]
    data = [{"messages": messages}] if template is THINKS else [{"messages": good}, {"messages": messages}]
    with pytest.raises(ValueError, match=message) as error:
        sft_examples(data, tokenizer)
    assert str(error.value).startswith(f"item {len(data) - 1}: ")


def test_parts_go_to_templates_that_know_them() -> None:
    template = CHATML.replace("{{ m['content'] }}", "{% for p in m['content'] %}{{ p.text }}{% endfor %}")
    tokenizer = byte_tokenizer(template=template, eos=END)
    assert "user\nHi<|im_end|>" in text_of(tokenizer, encode_prompt(tokenizer, PARTS))


READERS = {
    sft_examples: {"completion": "Ho"},
    preference_pairs: {"chosen": "Ho", "rejected": "Hu"},
    ranked_lists: {"ranked": ["Ho", "Hu"]},
    prompt_examples: {},
}


@pytest.mark.parametrize("read", READERS)
def test_tools_reach_the_template(read: Any) -> None:
    record = {"prompt": user("Hi"), **READERS[read]}
    tokenizer = byte_tokenizer(template=TOOLS, eos=END)
    expected = tokenizer.apply_chat_template(
        user("Hi"), tools=FUNCTION, tokenize=False, add_generation_prompt=True
    )
    (item,) = read([{**record, "tools": FUNCTION}], tokenizer)
    assert text_of(tokenizer, item.prompt_ids) == expected
    with pytest.raises(ValueError, match=r"item 0: the chat template refuses .*Tools"):
        read([{**record, "tools": json.dumps(FUNCTION)}], tokenizer)
    for nothing, template in product((None, []), (TOOLS, CHATML)):
        tokenizer = byte_tokenizer(template=template, eos=END)
        (with_column,), (without,) = (read([x], tokenizer) for x in ({**record, "tools": nothing}, record))
        assert with_column.prompt_ids == without.prompt_ids
    plain = {**record, "prompt": "Hi", "tools": "hammer"}
    assert read([plain], tokenizer)[0].prompt_ids == encode_prompt(tokenizer, "Hi")
    with pytest.raises(ValueError, match=r"item 0: the chat template never reads \['tools'\]"):
        read([{**record, "tools": FUNCTION}], byte_tokenizer(template=CHATML))


@pytest.mark.parametrize("read", READERS)
def test_the_prompt_of_a_chat_is_rendered_once(read: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = byte_tokenizer(template=CHATML, eos=END)
    render, seen = type(tokenizer).apply_chat_template, []

    def spy(self: Any, messages: Any, **options: Any) -> Any:
        seen.append(len(messages))
        return render(self, messages, **options)

    monkeypatch.setattr(type(tokenizer), "apply_chat_template", spy)
    (item,) = read([{"prompt": user("Hi"), **READERS[read]}], tokenizer)

    assert seen.count(1) == 1  # the others have an answer
    monkeypatch.undo()
    assert item.prompt_ids == encode_prompt(tokenizer, user("Hi"))
    for text, ids in zip(("Ho", "Hu"), item.completions, strict=False):
        assert ids == encode_completion(tokenizer, text, user("Hi"))


def test_thousands_of_added_tokens_are_listed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A completion took 35 ms with 10,000 of them; it ends as it did, also with tokens added later."""
    tokenizer = byte_tokenizer(template=CHATML, eos=EOS)
    tokenizer.add_tokens([f"<extra_{i}>" for i in range(3000)], special_tokens=True)
    listed, listing = [], type(tokenizer).added_tokens_decoder.fget
    counting = property(lambda self: listed.append(1) or listing(self))  # type: ignore[func-returns-value]
    monkeypatch.setattr(type(tokenizer), "added_tokens_decoder", counting)

    for _ in range(5):
        ids = encode_completion(tokenizer, "Ho<extra_7>", user("Hi"))
    assert len(listed) <= 1
    assert text_of(tokenizer, ids) == "Ho<extra_7>"  # it ends already, with a special token
    assert text_of(tokenizer, encode_completion(tokenizer, "Ho", user("Hi"))) == f"Ho{END}"
    assert text_of(tokenizer, encode_completion(tokenizer, "Ho<new>", user("Hi"))) == f"Ho<new>{END}"
    tokenizer.add_tokens(["<new>"], special_tokens=True)
    assert text_of(tokenizer, encode_completion(tokenizer, "Ho<new>", user("Hi"))) == "Ho<new>"


def test_an_unknown_setting_of_the_template_is_refused() -> None:
    limits = Limits(chat_template_kwargs={"enable_thinkin": False})
    with pytest.raises(ValueError, match=r"never reads \['enable_thinkin'\]"):
        prompt_examples([{"prompt": user("Hi")}], byte_tokenizer(template=SWITCH), limits)
    with pytest.raises(ValueError, match="chat_template_kwargs must be dict"):
        SFTConfig(chat_template_kwargs="enable_thinking")  # type: ignore[arg-type]


def test_the_trained_model_keeps_the_settings_of_its_template(tmp_path: Path) -> None:
    """So that what it is asked later is what it was trained on, also after loading, and by a reward model."""
    tokenizer = byte_tokenizer(template=SWITCH, eos=END)
    settings = {"enable_thinking": False}
    common: dict[str, Any] = {"updates": 1, "batch_size": 1, "chat_template_kwargs": settings}
    model = tiny_model(tokenizer)
    prompt = encode_prompt(tokenizer, user("Hi"), **settings)
    assert prompt != encode_prompt(tokenizer, user("Hi"))
    pairs = [{"prompt": user("Hi"), "chosen": "x", "rejected": "y"}]

    judge = train_reward_model(model, pairs, RewardConfig(**common), progress=False).reward_model
    assert model.chat_template_kwargs == {}, "a reward model is a copy"
    assert judge.language_model.encode([user("Hi")], ["x"]).prompt_ids.tolist() == [prompt]

    seen: list[Any] = []

    class Sampler(TransformersSampler):
        def sample(self, prompts: Any, *args: Any, **options: Any) -> Any:
            seen.append(prompts)
            return super().sample(prompts, *args, **options)

    config = GRPOConfig(group_size=2, sampling=SamplingConfig(max_new_tokens=3), logged_samples=1, **common)
    train_grpo(
        model, [{"prompt": user("Hi")}], lambda completions: [1.0, 0.0], config,
        sampler=Sampler(model), progress=False,
    )  # fmt: skip
    assert seen == [[prompt]]
    assert model.copy().encode([user("Hi")], ["x"]).prompt_ids.tolist() == [prompt]
    folder = model.save(tmp_path / "m")
    assert load(folder).encode([user("Hi")], ["x"]).prompt_ids.tolist() == [prompt]


def test_adapters_keep_the_settings_of_their_template(tmp_path: Path) -> None:
    """They are saved without a config of the model; the base keeps its own."""
    pytest.importorskip("peft")
    settings = {"enable_thinking": False}
    base = tiny_model(byte_tokenizer(template=SWITCH, eos=END)).save(tmp_path / "base")
    expected = encode_prompt(load(base).tokenizer, user("Hi"), **settings)
    config = SFTConfig(updates=1, batch_size=1, chat_template_kwargs=settings)
    data = [{"messages": [*user("Hi"), *assistant("Ho")]}]
    result = train_sft(load(base, lora=LoRA(rank=2)), data, config, progress=False)

    again = load(result.save(tmp_path / "adapters"))

    assert again.chat_template_kwargs == settings
    assert again.encode([user("Hi")], ["x"]).prompt_ids.tolist() == [expected]
    assert again.merged().chat_template_kwargs == settings
    assert load(base).chat_template_kwargs == {}
    add_lora(load(base), LoRA(rank=2)).save(tmp_path / "adapters")
    assert load(tmp_path / "adapters").chat_template_kwargs == {}


def test_a_reward_model_and_generate_are_shown_the_tools() -> None:
    tokenizer = byte_tokenizer(template=TOOLS, eos=END)
    model = tiny_model(tokenizer)
    prompts = [encode_prompt(tokenizer, user("Hi"), tools=FUNCTION), encode_prompt(tokenizer, user("Hi"))]
    ids = encode_completion(tokenizer, "Ho", user("Hi"))
    reward_model = RewardModel(model)
    torch.nn.init.normal_(reward_model.network.score.weight)
    direct = [reward_model.scores(Sequences.pad([prompt], [ids])).item() for prompt in prompts]

    scores = reward_model(["Ho", "Ho"], [user("Hi")] * 2, tools=[FUNCTION, None])

    torch.testing.assert_close(scores, direct)
    assert abs(direct[0] - direct[1]) > 1e-3
    short = SamplingConfig(max_new_tokens=4, temperature=0.0)
    greedy = TransformersSampler(model).sample(prompts, 1, short, seed=0).sequences
    expected = [
        [model.decode(row[:n])] for row, n in zip(greedy.completion_ids.tolist(), greedy.lengths, strict=True)
    ]
    assert generate(model, [user("Hi")] * 2, short, tools=[FUNCTION, None]) == expected


# --- every turn of the assistant -------------------------------------------------------------------------------


@pytest.mark.parametrize("template", [CHATML, MARKED, THINKING, TOOLS])
def test_all_turns_of_the_assistant_are_learned(template: str) -> None:
    tokenizer = byte_tokenizer(template=template, eos=EOS)

    (example,) = sft_examples([{"messages": CHAT}], tokenizer, train_on="assistant")

    assert text_of(tokenizer, example.prompt_ids) == f"{START}user\na{END}\n{START}assistant\n"
    assert example.learned is not None
    assert example.learned[0]
    pairs = list(zip(example.completion_ids, example.learned, strict=True))
    assert text_of(tokenizer, [i for i, own in pairs if own]) == f"bc{END}e{END}"
    between = f"\n{START}user\nd{END}\n{START}assistant\n"
    assert text_of(tokenizer, [i for i, own in pairs if not own]).rstrip("\n") == between.rstrip("\n")
    assert example.prompt == CHAT[:1]


PLAIN_CHAT, MARKED_CHAT = (byte_tokenizer(template=template, eos=END) for template in (CHATML, MARKED))


@given(turns=st.lists(st.text("abc <>\n", max_size=4), min_size=1, max_size=4))
def test_the_generation_mask_and_the_prefixes_agree(turns: list[str]) -> None:
    messages = [m for text in turns for m in (*user(text), *assistant(text[::-1]))]
    by_prefix, by_mask = (
        sft_examples([{"messages": messages}], tokenizer, train_on="assistant")[0]
        for tokenizer in (PLAIN_CHAT, MARKED_CHAT)
    )
    size = len(by_prefix.completion_ids)
    assert by_mask.prompt_ids == by_prefix.prompt_ids
    assert by_mask.completion_ids[:size] == by_prefix.completion_ids
    assert by_mask.learned is not None
    assert by_mask.learned == (by_prefix.learned or []) + [False] * (len(by_mask.learned) - size)


@pytest.mark.parametrize("micro_batch_size", [None, 1])
def test_only_the_turns_of_the_assistant_count_in_the_loss(micro_batch_size: int | None) -> None:
    """Against the model's own logits over the whole conversations."""
    tokenizer = byte_tokenizer(template=CHATML, eos=END)
    model = tiny_model(tokenizer)
    data = [{"messages": CHAT}, {"messages": [*user("long question"), *assistant("x")]}]
    total, count = 0.0, 0
    for record in data:
        (example,) = sft_examples([record], tokenizer, train_on="assistant")
        ids = torch.tensor(example.prompt_ids + example.completion_ids)
        mask = torch.tensor([False] * len(example.prompt_ids) + (example.learned or []))
        with torch.no_grad():
            log_probs = model.model(ids[None]).logits[0].log_softmax(-1)
        total -= float(log_probs[:-1].gather(1, ids[1:, None])[:, 0][mask[1:]].sum())
        count += int(mask.sum())

    config = SFTConfig(
        updates=1, batch_size=2, learning_rate=1e-9, train_on="assistant", micro_batch_size=micro_batch_size
    )
    (row,) = train_sft(model, data, config, eval_data=data, progress=False).history

    assert count == len("bc") + len("e") + len("x") + 3
    assert row.tokens == count
    assert row.loss == pytest.approx(total / count, rel=1e-5)
    assert row.eval_loss == pytest.approx(total / count, rel=1e-5)


def test_cut_conversations_keep_their_mask() -> None:
    tokenizer = byte_tokenizer(template=CHATML, eos=END)
    limits = Limits(max_prompt_tokens=3, max_completion_tokens=5)
    (example,) = sft_examples([{"messages": CHAT}], tokenizer, limits, train_on="assistant")
    assert text_of(tokenizer, example.prompt_ids) == "nt\n"
    assert text_of(tokenizer, example.completion_ids) == f"bc{END}\n{START}"
    assert example.learned == [True, True, True, False, False]


@pytest.mark.parametrize(
    ("template", "record", "message"),
    [
        (FORGETS, {"messages": [*user("a"), *assistant("Hm</think>b"), *user("c"), *assistant("d")]}, "rewrites"),
        (CHATML, {"messages": CHAT[1:]}, "what comes before the assistant's first message must be"),
        (CHATML, {"prompt": user("a"), "completion": "b"}, "column 'messages' is missing"),
        (CHATML, {"messages": CHAT[:3]}, "ends with the assistant's message"),
        (BARE, {"messages": CHAT}, "must hold the end of a turn"),
        (MARKED_SHORT, {"messages": CHAT}, "must hold the end of a turn"),
    ],
)  # fmt: skip
def test_conversations_whose_turns_cannot_be_told_are_refused(
    template: str, record: Any, message: str
) -> None:
    with pytest.raises(ValueError, match=message) as error:
        sft_examples([record], byte_tokenizer(template=template), train_on="assistant")
    assert str(error.value).startswith("item 0: ")


# --- ids beyond the embedding ----------------------------------------------------------------------------------


def _train(name: str, model: LanguageModel, text: str) -> None:
    short = SamplingConfig(max_new_tokens=2)
    common: dict[str, Any] = {"updates": 1, "batch_size": 2}
    prompts = [{"prompt": "a"}, {"prompt": f"abc{text}"}]
    pairs = [{**prompt, "chosen": f"x{text}", "rejected": "yyy"} for prompt in prompts]

    def reward(completions: list[str]) -> list[float]:
        return [float(i) for i, _ in enumerate(completions)]

    if name == "sft":
        data = [{**prompt, "completion": f"x{text}" * (i + 1)} for i, prompt in enumerate(prompts)]
        train_sft(model, data, SFTConfig(**common), progress=False)
    elif name == "dpo":
        train_dpo(model, pairs, DPOConfig(**common), progress=False)
    elif name == "reward":
        train_reward_model(model, pairs, RewardConfig(**common), progress=False)
    elif name == "ranking":
        ranked = [{"prompt": "a", "ranked": [f"x{text}", "yy", "zzz"]}] * 2
        train_ranking(model, ranked, RankingConfig(**common), progress=False)
    elif name == "grpo":
        train_grpo(model, prompts, reward, GRPOConfig(group_size=2, sampling=short, **common), progress=False)
    elif name == "ppo":
        config = PPOConfig(samples_per_prompt=2, sampling=short, **common)
        train_ppo(model, prompts, reward, config, progress=False)
    else:
        generate(model, ["a", f"abc{text}"], short)


@pytest.mark.parametrize("name", ["sft", "dpo", "reward", "ranking", "grpo", "ppo", "generate"])
def test_tokens_added_without_resizing(name: str) -> None:
    """A padding token is never read; one in the data is refused."""
    tokenizer = byte_tokenizer()
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    tokenizer.add_tokens(["<think>"])
    model = tiny_model(tokenizer, rows)
    assert tokenizer.pad_token_id == rows
    assert model.pad_id == tokenizer.eos_token_id

    _train(name, model, "")
    with pytest.raises(
        ValueError, match=rf"below {rows}.*{rows + 1}, '<think>'.*resize_token_embeddings\(len"
    ) as error:
        _train(name, model, "<think>")
    assert name == "generate" or re.match("item [01]: ", str(error.value))

    model.model.resize_token_embeddings(len(tokenizer))
    assert model.pad_id == rows
    _train(name, model, "<think>")


def test_padding_when_eos_is_beyond_the_embedding_too() -> None:
    tokenizer = byte_tokenizer(eos=None)
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    assert tiny_model(tokenizer, rows).pad_id == 0


# --- ranks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "ranks", [3, "12", {"a": 1}, [1, "2"], [1, None], [[1], [2]], [1, float("nan")], [1, 1]]
)
def test_ranks_that_are_not_numbers_are_refused(ranks: Any) -> None:
    record = {"prompt": "a", "completions": ["x", "y"], "ranks": ranks}
    with pytest.raises(ValueError, match="item 0: ranks must be 2 different numbers, one per completion"):
        ranked_lists([record], byte_tokenizer())
