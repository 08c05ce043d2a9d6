"""Loading and saving: folders, GGUF files, adapters, the models of the package; and what cannot be loaded."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from lm_runs import run_dpo, run_reward, tiny_model
from packaging.version import Version
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaModel

from policyopt.lm import (
    History,
    LanguageModel,
    LoRA,
    RewardModel,
    SamplingConfig,
    add_lora,
    completion_log_probs,
    generate,
    load,
)
from policyopt.lm.models import is_adapted
from policyopt_book import load_model, model_paths

OLD = Version(transformers.__version__) < Version("5.18")  # too old to read a GGUF file's tokenizer


def scores(model: LanguageModel) -> torch.Tensor:
    """Log-probabilities of two completions of a prompt."""
    sequences = model.encode(["one two"], ["three", "four five six"])
    with torch.no_grad():
        return completion_log_probs(model.model, sequences).log_probs


def same_weights(a: Any, b: Any) -> bool:
    mine, theirs = a.state_dict(), b.state_dict()
    return mine.keys() == theirs.keys() and all(torch.equal(mine[k], theirs[k]) for k in mine)


def adapted_and_trained() -> LanguageModel:
    model = add_lora(tiny_model(), LoRA(rank=4), seed=1)
    run_dpo(model, changes={"learning_rate": 0.05})
    return model


# --- folders ----------------------------------------------------------------------------------------------------


def test_a_saved_model_comes_back_bit_for_bit(tmp_path: Path) -> None:
    model = tiny_model()
    folder = model.save(tmp_path / "mine")
    assert (folder / "model.safetensors").exists()
    assert not list(folder.glob("*.bin"))
    again = load(folder, device="cpu")
    assert same_weights(again.model, model.model)
    assert (again.name, again.eos_ids, again.pad_id) == ("mine", model.eos_ids, model.pad_id)
    assert again.context_length == model.context_length == 64
    assert not again.model.training
    assert torch.equal(scores(again), scores(model))


def test_transformers_reads_what_is_saved(tmp_path: Path) -> None:
    model = tiny_model()
    model.save(tmp_path / "mine")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "mine", trust_remote_code=False)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "mine")
    assert same_weights(theirs, model.model)
    assert tokenizer("one two")["input_ids"] == model.tokenizer("one two")["input_ids"]


def test_saving_twice_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    model = tiny_model()
    model.save(tmp_path / "mine")
    (tmp_path / "mine" / "old.txt").write_text("of an older save")
    tiny_model(seed=1).save(tmp_path / "mine")
    assert same_weights(load(tmp_path / "mine").model, tiny_model(seed=1).model)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert not (tmp_path / "mine" / "old.txt").exists()


def test_what_is_no_model_is_not_replaced(tmp_path: Path) -> None:
    model, notes = tiny_model(), tmp_path / "notes.txt"
    notes.write_text("mine")
    with pytest.raises(
        ValueError, match=r"must be new or empty, .*got \['notes.txt'\].*save to another folder"
    ):
        model.save(tmp_path)
    assert notes.read_text() == "mine"
    (tmp_path / "empty").mkdir()
    for _ in range(2):
        assert model.save(tmp_path / "empty").is_dir()


def test_checkpoints_are_not_replaced_by_what_is_saved(tmp_path: Path) -> None:
    result = run_dpo(tiny_model(), changes={"updates": 1}, checkpoint_dir=tmp_path / "run" / "checkpoints")
    for folder in (tmp_path / "run", tmp_path / "run" / "checkpoints"):
        with pytest.raises(
            ValueError, match=r"a saved model and no checkpoint, got .*state\.json.*another folder"
        ):
            result.save(folder)
    result.save(tmp_path / "run" / "model")
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoints", "model"}


def test_a_save_that_breaks_off_leaves_what_was_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    result = run_dpo(tiny_model(), changes={"updates": 1})
    folder = result.save(tmp_path / "mine")
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    assert {"model.safetensors", "history.csv", "training.json"} <= before.keys()

    def full(*_: object, **__: object) -> None:
        raise OSError("No space left on device")

    replace = Path.replace

    def once(path: Path, target: Path) -> Path:
        if path.name == "new":
            full()
        return replace(path, target)

    for owner, name, breaks in ((History, "to_csv", full), (Path, "replace", once)):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, breaks)
            with pytest.raises(OSError, match="No space left"):
                run_dpo(tiny_model(seed=1), changes={"updates": 1}).save(folder)
        assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
        assert [path.name for path in tmp_path.iterdir()] == ["mine"]


@pytest.mark.parametrize("name", model_paths())
def test_the_models_of_the_package_load_and_speak(name: str) -> None:
    model = load_model(name, device="cpu")
    assert model.name == name
    assert 1e5 < model.num_parameters == model.num_trainable_parameters < 1e6
    (texts,) = generate(model, ["1"], SamplingConfig(max_new_tokens=4), samples_per_prompt=2)
    assert len(texts) == 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_have_the_type_that_is_asked_for(dtype: Any, tmp_path: Path) -> None:
    wanted = getattr(torch, dtype)
    tiny_model().save(tmp_path)
    model = load(tmp_path, dtype=dtype, device="cpu")
    assert {p.dtype for p in model.model.parameters()} == {wanted}
    assert {p.dtype for p in load(tmp_path, device="cpu").model.parameters()} == {torch.float32}
    model.save(tmp_path / "half")
    assert next(load(tmp_path / "half", dtype="auto").model.parameters()).dtype == wanted


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_attention_implementations_agree(attention: str, tmp_path: Path) -> None:
    tiny_model().save(tmp_path)
    model = load(tmp_path, attention=attention, device="cpu")
    assert model.model.config._attn_implementation == attention
    assert torch.allclose(scores(model), scores(tiny_model()), atol=1e-5)


def test_a_copy_is_independent() -> None:
    model = tiny_model()
    copy = model.copy()
    with torch.no_grad():
        next(copy.model.parameters()).add_(1)
    assert same_weights(model.model, tiny_model().model)
    assert copy.tokenizer is model.tokenizer


# --- adapters ---------------------------------------------------------------------------------------------------


def test_adapters_come_back_on_their_base(tmp_path: Path) -> None:
    base = load(tiny_model().save(tmp_path / "base"), device="cpu")
    model = add_lora(base, LoRA(rank=4), seed=1)
    run_dpo(model, changes={"learning_rate": 0.05})
    folder = model.save(tmp_path / "adapters")
    assert all("lora_" in name for name in load_file(folder / "adapter_model.safetensors"))
    again = load(folder, device="cpu")
    assert torch.equal(scores(again), scores(model))
    assert again.num_trainable_parameters == model.num_trainable_parameters
    # Off, they leave the base.
    assert is_adapted(again.model)
    with again.model.disable_adapter():
        assert torch.equal(scores(again), scores(tiny_model()))
    assert not torch.allclose(scores(again), scores(tiny_model()), atol=1e-3)
    assert run_dpo(again).history[0].margin == 0  # the reference is what training starts from, not the base


def test_adapters_say_where_their_base_is(tmp_path: Path) -> None:
    model = add_lora(load_model("addition-base", device="cpu"), LoRA(rank=2))
    model.save(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(model_paths()["addition-base"])
    assert is_adapted(load(tmp_path, device="cpu").model)


def test_adapters_are_not_saved_over_their_base(tmp_path: Path) -> None:
    tiny_model().save(tmp_path / "base")
    adapted = load(tmp_path / "base", lora=LoRA(rank=2), device="cpu")
    with pytest.raises(ValueError, match=r"must not take the place of their base model.*merged\(\)"):
        adapted.save(tmp_path / "base")
    assert same_weights(load(tmp_path / "base", device="cpu").model, tiny_model().model)
    adapted.merged().save(tmp_path / "base")
    assert not is_adapted(load(tmp_path / "base", device="cpu").model)


def test_adapters_without_their_base_say_what_is_missing(tmp_path: Path) -> None:
    base = load(tiny_model().save(tmp_path / "base"), device="cpu")
    add_lora(base, LoRA(rank=2)).save(tmp_path / "adapters")
    shutil.rmtree(tmp_path / "base")
    with pytest.raises(
        ValueError, match=r"adapters for '.*base', which cannot be loaded .*adapter_config\.json"
    ):
        load(tmp_path / "adapters")


def test_adapters_on_adapters_are_refused(tmp_path: Path) -> None:
    base = load(tiny_model().save(tmp_path / "base"), device="cpu")
    add_lora(base, LoRA(rank=2)).save(tmp_path / "adapters")
    with pytest.raises(ValueError, match="leave lora out"):
        load(tmp_path / "adapters", lora=LoRA())


def test_merged_adapters_are_a_plain_model(tmp_path: Path) -> None:
    model = adapted_and_trained()
    expected = scores(model)
    merged = model.merged()
    assert isinstance(merged.model, LlamaForCausalLM)
    assert merged.num_parameters == tiny_model().num_parameters
    again = load(merged.save(tmp_path), device="cpu")
    assert not is_adapted(again.model)
    assert torch.allclose(scores(again), expected, atol=1e-5)
    assert merged.merged() is merged


@pytest.mark.parametrize("target", ["lm_head", "embed_tokens"])
def test_adapters_are_merged_into_weights_of_their_own_only(target: str, tmp_path: Path) -> None:
    """Tied, the embedding and the head are one tensor: what is added for one would be added to both."""
    for tied in (False, True):
        with warnings.catch_warnings():  # peft's
            warnings.simplefilter("ignore", UserWarning)
            model = add_lora(
                tiny_model(tie_word_embeddings=tied), LoRA(rank=2, target_modules=("q_proj", target))
            )
        for name, parameter in model.model.named_parameters():
            if "lora_" in name:
                torch.nn.init.normal_(parameter, std=0.3)
        expected = scores(model)
        if tied:
            with pytest.raises(ValueError, match="cannot be merged: the other one would change too"):
                model.merged()
            assert torch.equal(scores(model), expected)
        else:
            again = load(model.merged().save(tmp_path), device="cpu")
            assert torch.allclose(scores(again), expected, atol=1e-5)


def test_the_seed_draws_the_adapters(tmp_path: Path) -> None:
    folder = tiny_model().save(tmp_path)
    a, b, c = (load(folder, lora=LoRA(rank=2), seed=seed, device="cpu") for seed in (0, 0, 1))
    assert same_weights(a.model, b.model)
    assert not same_weights(a.model, c.model)
    assert torch.equal(scores(a), scores(tiny_model()))  # B starts at 0


def test_targets_of_adapters_can_be_chosen() -> None:
    model = add_lora(tiny_model(), LoRA(rank=2, target_modules=("q_proj",)))
    names = [name for name, p in model.model.named_parameters() if p.requires_grad]
    assert len(names) == 2 * 2
    assert all("q_proj.lora_" in name for name in names)


def test_reward_models_with_adapters_come_back(tmp_path: Path) -> None:
    base = load(tiny_model().save(tmp_path / "base"), device="cpu")
    reward_model = run_reward(add_lora(base, LoRA(rank=4)), changes={"learning_rate": 0.05}).reward_model
    assert reward_model is not None
    texts, prompts = ["two three", "four"], ["one", "one"]
    before = reward_model(texts, prompts)
    reward_model.save(tmp_path / "reward")
    assert RewardModel.load(tmp_path / "reward", device="cpu")(texts, prompts) == pytest.approx(
        before, abs=1e-6
    )
    assert len(set(before)) == 2


# --- GGUF -------------------------------------------------------------------------------------------------------

CHARACTERS = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))] + [
    chr(256 + i) for i in range(68)
]
MERGES = ["o n", "on e", "t w", "tw o"]
TEMPLATE = (
    "{% for m in messages %}{{ '<s>' + m['role'] + '\\n' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<s>assistant\\n' }}{% endif %}"
)


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """Write a Llama model with a byte-level tokenizer, in 32 bits, as llama.cpp's own converter does."""
    gguf = pytest.importorskip("gguf")
    config = model.config
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("tiny")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // heads)
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<unk>", "<s>", "</s>", *CHARACTERS, *(merge.replace(" ", "") for merge in MERGES)]
    assert len(tokens) == config.vocab_size
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3] + [1] * (len(tokens) - 3))
    writer.add_token_merges(MERGES)
    writer.add_unk_token_id(0)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    writer.add_chat_template(TEMPLATE)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        data = tensor.numpy().astype(np.float32)
        count = {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2])
        if count is not None:  # llama.cpp interleaves the halves that rotary embeddings turn
            data = data.reshape(count, 2, -1, data.shape[1]).swapaxes(1, 2).reshape(data.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), np.ascontiguousarray(data))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    if OLD:
        pytest.skip(f"transformers {transformers.__version__} misreads GGUF files, and load refuses them")
    path: Path = tmp_path_factory.mktemp("gguf") / "tiny-model.gguf"
    write_gguf(gguf_source(), path)
    return path


def gguf_source() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=3 + len(CHARACTERS) + len(MERGES),
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
            bos_token_id=1,
            eos_token_id=2,
            initializer_range=0.3,
            rope_parameters={"rope_type": "default", "rope_theta": 50_000.0},
        )
    ).eval()


def test_a_gguf_file_is_read_as_the_model_it_was_written_from(gguf_file: Path) -> None:
    model = load(gguf_file, device="cpu")
    assert model.name == "tiny-model"
    theirs, ours = gguf_source().state_dict(), model.model.state_dict()
    assert theirs.keys() == ours.keys()
    assert all(torch.allclose(theirs[k], ours[k], atol=1e-6) for k in theirs)
    assert model.eos_ids == (2,)
    assert model.context_length == 64
    text = "one two\n  three, é 日本"
    assert model.decode(model.tokenizer(text)["input_ids"]) == text
    assert model.tokenizer("one")["input_ids"] == [3 + len(CHARACTERS) + 1]
    ids = model.encode([[{"role": "user", "content": "one"}]], ["two"])
    assert model.tokenizer.decode(ids.prompt_ids[0]) == "<s>user\none</s><s>assistant\n"
    assert ids.completion_ids[0].tolist() == [3 + len(CHARACTERS) + 3, 2]


def test_a_gguf_model_is_trained_and_saved_like_any_other(gguf_file: Path, tmp_path: Path) -> None:
    model = load(gguf_file, device="cpu")
    assert model.num_trainable_parameters == model.num_parameters
    before = scores(model)
    run_dpo(model, changes={"updates": 2})
    assert not torch.equal(scores(model), before)
    again = load(model.save(tmp_path / "trained"), device="cpu")
    assert torch.equal(scores(again), scores(model))
    assert "quantization_config" not in json.loads((tmp_path / "trained" / "config.json").read_text())
    assert again.tokenizer.chat_template == TEMPLATE


def test_adapters_on_a_gguf_model_find_it_again(gguf_file: Path, tmp_path: Path) -> None:
    model = load(gguf_file, lora=LoRA(rank=2), device="cpu")
    run_dpo(model, changes={"learning_rate": 0.05})
    again = load(model.save(tmp_path / "adapters"), device="cpu")
    assert torch.equal(scores(again), scores(model))


def test_a_gguf_file_that_an_old_transformers_would_misread_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Until 5.18 it gave such files' tokenizers BOS as EOS: data ended with a token that ends nothing."""
    write_gguf(gguf_source(), tmp_path / "tiny.gguf")
    monkeypatch.setattr("policyopt.lm.models.transformers.__version__", "5.17.0")
    with pytest.raises(
        ValueError, match=r"tiny\.gguf .*transformers 5\.17\.0 misreads; install 5\.18 or newer"
    ):
        load(tmp_path / "tiny.gguf", device="cpu")


# --- what cannot be loaded --------------------------------------------------------------------------------------


def test_what_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for place in (tmp_path / "nowhere", tmp_path / "nowhere.gguf", tmp_path):
        if place.suffix and OLD:
            continue
        with pytest.raises(ValueError, match=r"must be a local folder, .*hub.*got .*" + place.name):
            load(place)


def test_weights_that_the_file_lacks_are_named(tmp_path: Path) -> None:
    """transformers would draw them at random."""
    model = tiny_model()
    LlamaModel(model.model.config).save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    with pytest.raises(
        ValueError, match=r"no weights for \['lm_head.weight'\]; load a causal language model"
    ):
        load(tmp_path)


@pytest.mark.parametrize("option", [{"dtype": "int8"}, {"device": "abacus"}])
def test_options_are_checked_before_anything_is_read(option: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(option))):
        load_model("addition-base", **option)


def test_weights_that_could_hold_code_are_not_read(tmp_path: Path) -> None:
    model = tiny_model()
    model.save(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ValueError, match="safetensors"):
        load(tmp_path)


def test_a_model_that_never_stops_is_refused(tmp_path: Path) -> None:
    model = tiny_model()
    model.tokenizer.eos_token = None
    model.model.config.eos_token_id = model.model.generation_config.eos_token_id = None
    model.save(tmp_path)
    with pytest.raises(ValueError, match="end-of-sequence"):
        load(tmp_path)
