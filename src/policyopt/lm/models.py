"""Language models: loading, saving, adapters, and the reward model that is built on
one.

Everything here wraps a standard ``transformers`` causal language model; nothing
replaces it. Weights are read and written as safetensors (or GGUF, read only), and code
from a model repository is never run.
"""

from __future__ import annotations

import copy
import json
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import chain, groupby
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase
from transformers.utils import logging

from policyopt._checks import require
from policyopt.lm import data
from policyopt.lm.data import Prompt
from policyopt.lm.sequences import Sequences, evaluating, hidden_states
from policyopt.runs import resolve_device

__all__ = ["LanguageModel", "LoRA", "RewardModel", "add_lora", "load"]

_DTYPES = ("auto", "bfloat16", "float16", "float32")


@dataclass
class LanguageModel:
    """A causal language model and its tokenizer: what every function of this half works
    on.
    """

    model: Any
    """A ``transformers`` causal language model, or a ``peft`` model around one."""
    tokenizer: PreTrainedTokenizerBase
    name: str = "custom"

    @property
    def device(self) -> torch.device:
        """Where the weights are."""
        return torch.device(next(self.model.parameters()).device)

    @property
    def eos_ids(self) -> tuple[int, ...]:
        """The tokens that end a completion: the generation config's, the tokenizer's,
        and the one with which its chat template ends a message of the assistant's.

        Raises
        ------
        ValueError
            If there is none: sampling would never stop, and no completion would ever be
            finished.
        """
        generation = getattr(self.model, "generation_config", None)
        ids = getattr(generation, "eos_token_id", None)
        listed = ids if isinstance(ids, (list, tuple)) else [ids]
        found = {*listed, self.tokenizer.eos_token_id}
        found = (found | {data.chat_end(self.tokenizer)}) - {None}
        if not found:
            remedy = "set one of its vocabulary: tokenizer.eos_token = '…'"
            raise ValueError(f"{self.name} has no end-of-sequence token; {remedy}")
        return tuple(sorted(map(int, found)))

    @property
    def pad_id(self) -> int:
        """A token to fill batches with. It may equal EOS: masks come from lengths,
        never from this id.
        """
        return data.pad_id(self.tokenizer, self.vocabulary)

    @property
    def vocabulary(self) -> int:
        """Rows of the embedding: every token id is less."""
        return int(self.model.get_input_embeddings().weight.shape[0])

    @property
    def chat_template_kwargs(self) -> dict[str, Any]:
        """What the chat template is given besides messages and tools, such as
        ``{"enable_thinking": False}``: the setting of that name that the model was
        trained with, which is kept in the model's config (and beside saved adapters).
        """
        return dict(getattr(self.model.config, "chat_template_kwargs", {}))

    @property
    def context_length(self) -> int | None:
        """The most tokens, prompt and completion together, that the model was built
        for; None if it does not say.
        """
        config = self.model.config.get_text_config()
        length = getattr(config, "max_position_embeddings", None)
        return int(length) if length and length > 0 else None

    @property
    def num_parameters(self) -> int:
        """Number of parameters, adapters included."""
        return sum(p.numel() for p in self.model.parameters())

    @property
    def num_trainable_parameters(self) -> int:
        """Number of parameters that training changes: all of them, or the adapters'."""
        return sum(p.numel() for p in self.model.parameters() if p.requires_grad)

    def encode(
        self, prompts: Sequence[Prompt], completions: Sequence[str], *,
        prompt_index: Sequence[int] | None = None,
        finished: Sequence[bool] | None = None, tools: Sequence[Any] | None = None,
    ) -> Sequences:  # fmt: skip
        """Turn texts into a padded batch on the model's device.

        Parameters
        ----------
        prompts : sequence of str or chat messages
        completions : sequence of str
        prompt_index : sequence of int, optional
            Which prompt each completion belongs to; by default they come prompt by
            prompt, the same number to each.
        finished : sequence of bool, optional
            Whether each completion ends with EOS; by default all do.
        tools : sequence, optional
            What each prompt's chat template is shown as tools; None shows none.

        Raises
        ------
        ValueError
            If a text is unusable or holds a token beyond the model's embedding, or the
            lengths of the arguments do not fit.
        """
        P, B = len(prompts), len(completions)
        if prompt_index is None:
            if P == 0 or B % P:
                remedy = "give the same number to each, or prompt_index"
                raise ValueError(f"{B} completions for {P} prompts: {remedy}")
            prompt_index = [i // (B // P) for i in range(B)]
        ends = [True] * B if finished is None else finished
        tokenizer, settings = self.tokenizer, self.chat_template_kwargs
        given = [settings | {"tools": shown} for shown in tools or [None] * P]
        chats = zip(prompts, given, strict=True)
        ids = [data.encode_prompt(tokenizer, prompt, **more) for prompt, more in chats]
        encoded = [
            data.encode_completion(tokenizer, text, prompts[i], eos=end, **given[i])
            for text, i, end in zip(completions, prompt_index, ends, strict=True)
        ]
        data.check_ids(tokenizer, chain(*ids, *encoded), self.vocabulary)
        return Sequences.pad(
            ids, encoded, prompt_index, pad_id=self.pad_id, device=self.device
        )

    def pad(self, items: Sequence[data.Item]) -> Sequences:
        """Return a batch of all completions of some items of the data, one after the
        other; those of an item share its prompt.
        """
        return Sequences.pad(
            [item.prompt_ids for item in items],
            [ids for item in items for ids in item.completions],
            [i for i, item in enumerate(items) for _ in item.completions],
            pad_id=self.pad_id, device=self.device,
        )  # fmt: skip

    def decode(self, ids: Sequence[int]) -> str:
        """Text of a completion's tokens, special tokens left out. :meth:`encode` turns
        it into the same tokens again.
        """
        return data.decode_completion(self.tokenizer, ids)

    def copy(self) -> LanguageModel:
        """Return an independent copy of the weights; the tokenizer is shared."""
        return replace(self, model=copy.deepcopy(self.model))

    def to(self, device: str | torch.device) -> LanguageModel:
        """Move the weights, in place; return self."""
        self.model.to(device)
        return self

    def merged(self) -> LanguageModel:
        """Return a plain model with the adapters added into its weights; invalidates
        self.
        """
        if not is_adapted(self.model):
            return self
        refuse_tied_adapters(self.model)
        return replace(self, model=self.model.merge_and_unload())

    def save(self, folder: str | Path) -> Path:
        """Write a folder that :func:`load` and every ``from_pretrained`` can read
        (adapters alone for LoRA).

        The folder appears in one step: a crash or a full disk on the way leaves what
        was there before.
        """
        with new_folder(Path(folder)) as scratch:
            self.write(scratch)
        return Path(folder)

    def write(self, folder: Path) -> None:
        """Write the files of :meth:`save` into a folder that exists."""
        # Without this peft asks the hub whether the vocabulary has grown.
        options = {"save_embedding_layers": False} if is_adapted(self.model) else {}
        self.model.save_pretrained(folder, **options)
        self.tokenizer.save_pretrained(folder)
        if options and (kept := self.chat_template_kwargs):  # adapters have no config
            (folder / "chat_settings.json").write_bytes(json.dumps(kept).encode())


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a scratch folder that takes the place of ``folder`` if all goes well."""
    kept = sorted(path.name for path in folder.glob("*"))
    known = not kept or bool({"config.json", "adapter_config.json"}.intersection(kept))
    found = [str(path) for path in folder.glob("**/state.json")]
    rule = f"{folder} must be new or empty, or hold a saved model and no checkpoint"
    remedy = "all of it would be replaced: save to another folder"
    require(known and not found, rule, found or kept, remedy)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(
        prefix=f".{folder.name}.", dir=folder.parent, ignore_cleanup_errors=True
    ) as beside:
        scratch, old = Path(beside, "new"), Path(beside, "old")
        scratch.mkdir()
        with _quiet(True):
            yield scratch
        if (adapters := scratch / "adapter_config.json").exists():
            base = str(json.loads(adapters.read_bytes())["base_model_name_or_path"])
            rule = "adapters must not take the place of their base model"
            remedy = "save them elsewhere, or save language_model.merged()"
            require(Path(base).resolve() != folder.resolve(), rule, base, remedy)
        if folder.exists():
            folder.replace(old)
        try:
            scratch.replace(folder)
        except OSError:
            if old.exists():
                old.replace(folder)
            raise


def is_adapted(model: nn.Module) -> bool:
    """Whether the model carries ``peft`` adapters that can be switched off."""
    return hasattr(model, "disable_adapter")


def refuse_tied_adapters(model: Any) -> None:
    """Raise a ValueError if adapters cannot be merged: input embedding and output head
    are one weight, and one of the two is adapted.
    """
    head, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    adapted = any(hasattr(layer, "base_layer") for layer in (head, inputs))
    if adapted and head.weight is inputs.weight:
        why = "cannot be merged: the other one would change too"
        remedy = "leave both out of target_modules, or set tie_word_embeddings=False"
        raise ValueError(f"adapters of a tied embedding or output head {why}; {remedy}")


@dataclass(frozen=True, kw_only=True)
class LoRA:
    """Low-rank adapters: train W + (α/r) B A with B, A of rank r, and leave W alone (Hu
    et al. 2021, arXiv:2106.09685).

    The unadapted model stays available. It is the reference policy of a training that
    starts from fresh adapters, which then costs no memory; of trained adapters a copy
    is kept.
    """

    rank: int = 16
    alpha: float = 32.0
    dropout: float = 0.0
    """On the adapters' input, where a trainer has dropout on (see
    :class:`~policyopt.lm.config.LMConfig`)."""
    target_modules: str | tuple[str, ...] = "all-linear"
    """Names of the linear layers to adapt; "all-linear" takes all but the output
    head.
    """


def add_lora(
    language_model: LanguageModel, lora: LoRA, *, seed: int = 0
) -> LanguageModel:
    """Put adapters on a model, in place of training all its weights. Needs ``peft``.

    B starts at 0, so the adapted model starts equal to the model; ``seed`` draws A.
    """
    targets = lora.target_modules
    with torch.random.fork_rng(devices=[]), _peft() as peft:
        torch.manual_seed(seed)
        config = peft.LoraConfig(
            task_type="CAUSAL_LM", r=lora.rank, lora_alpha=lora.alpha,
            target_modules=targets if isinstance(targets, str) else list(targets),
            lora_dropout=lora.dropout,
        )  # fmt: skip
        model = peft.get_peft_model(language_model.model, config)
    return replace(language_model, model=model.eval())


@contextmanager
def _peft() -> Iterator[Any]:
    """Import peft, without the warning that it asks transformers for an attribute by
    its old name.
    """
    try:
        import peft
    except ImportError as error:
        raise ImportError("LoRA needs peft: pip install 'peft>=0.18'") from error
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*is_gradient_checkpointing", FutureWarning)
        yield peft


def load(
    name_or_path: str | Path, *,
    dtype: Literal["float32", "bfloat16", "float16", "auto"] = "float32",
    device: str = "auto", attention: str | None = None, lora: LoRA | None = None,
    revision: str | None = None, seed: int = 0,
) -> LanguageModel:  # fmt: skip
    """Load a model and its tokenizer.

    Parameters
    ----------
    name_or_path : str or Path
        A local folder (of a model, or of adapters, which are put on their base model),
        a local ``.gguf`` file (unpacked, so that it can be trained), or the id of a
        model on the Hugging Face hub (``"HuggingFaceTB/SmolLM2-135M-Instruct"``).
    dtype : str
        Type of the weights; "auto" takes the stored one. The default is float32,
        because in bfloat16 an optimiser step smaller than 1/256 of a weight is lost. To
        save time and memory on a GPU, set ``autocast="bfloat16"`` in the trainer's
        config, or train adapters on bfloat16 weights.
    device : str
        "auto" takes cuda, then mps, then cpu; or any PyTorch device name.
    attention : str, optional
        ``transformers``' attention implementation: "sdpa", "eager",
        "flash_attention_2", …
    lora : LoRA, optional
        Train adapters instead of all weights.
    revision : str, optional
        Branch, tag or commit on the hub.
    seed : int
        Of the adapters' first weights.

    Raises
    ------
    ValueError
        If there is no such model (or no base model for the adapters), if nothing stops
        its completions, or if the installed transformers misreads GGUF files.
    """
    folder = Path(name_or_path)
    if (folder / "adapter_config.json").exists():
        if lora is not None:
            raise ValueError(f"{folder} holds adapters to train on: leave lora out")
        return _load_adapters(
            folder, dtype=dtype, device=device, attention=attention, revision=revision
        )
    place = resolve_device(device)
    require(dtype in _DTYPES, f"dtype must be one of {_DTYPES}", dtype)
    gguf = folder.suffix == ".gguf"
    source = str(folder.parent if gguf else name_or_path)
    local = Path(source).exists()
    options = {"trust_remote_code": False, "revision": revision or "main"}
    weights: dict[str, Any] = {"dtype": dtype, "output_loading_info": True}
    if attention is not None:
        weights["attn_implementation"] = attention
    if gguf:
        version = transformers.__version__
        if tuple(map(int, version.split(".")[:2])) < (5, 18):
            # They take BOS for EOS and give Llama's tokenizer tokens beyond the model.
            why = f"has a tokenizer that transformers {version} misreads"
            remedy = "install 5.18 or newer: pip install -U transformers"
            raise ValueError(f"{name_or_path} {why}; {remedy}")
        options["gguf_file"] = folder.name
        # Packed weights could be neither trained nor saved.
        weights["quantization_config"] = transformers.GgufConfig(dequantize=True)
    else:
        weights["use_safetensors"] = True
    try:
        with _quiet(local):
            tokenizer = AutoTokenizer.from_pretrained(source, **options)
            auto: Any = AutoModelForCausalLM
            model, report = auto.from_pretrained(source, **options, **weights)
    except (OSError, ImportError, ValueError) as error:
        raise ValueError(_why_not(str(name_or_path), error)) from error
    if getattr(model, "_hf_peft_config_loaded", False):
        remedy = "get it with huggingface_hub.snapshot_download and load the folder"
        raise ValueError(f"{name_or_path} holds adapters; {remedy}")
    if missing := sorted(report["missing_keys"]):
        remedy = "load a causal language model, saved with its head"
        raise ValueError(f"{name_or_path} has no weights for {missing[:3]}; {remedy}")
    name = model.name_or_path = str(name_or_path)  # what adapters will look for
    if local:
        file = folder.resolve()
        name, model.name_or_path = file.stem if gguf else file.name, str(file)
    loaded = LanguageModel(model.to(place).eval(), tokenizer, name)
    loaded.eos_ids  # noqa: B018 - raises if nothing would stop a completion
    return loaded if lora is None else add_lora(loaded, lora, seed=seed)


def _why_not(name: str, error: Exception) -> str:
    """Say why a model could not be loaded."""
    if "trust_remote_code" in str(error):
        why = "needs code from its own repository, which is never run"
        return f"{name!r} {why}; choose a model whose architecture transformers knows"
    wanted = "a local folder, a .gguf file or the id of a model on the Hugging Face hub"
    return f"name_or_path must be {wanted} (with safetensors), got {name!r}: {error}"


def _load_adapters(folder: Path, **options: Any) -> LanguageModel:
    with _peft() as peft:
        name = str(peft.PeftConfig.from_pretrained(str(folder)).base_model_name_or_path)
        try:
            base = load(name, **options).model
        except ValueError as error:
            what = f"{folder} holds adapters for {name!r}, which cannot be loaded"
            raise ValueError(f"{what} (see adapter_config.json): {error}") from error
        if (kept := folder / "chat_settings.json").exists():
            base.config.chat_template_kwargs = json.loads(kept.read_bytes())
        model = peft.PeftModel.from_pretrained(base, str(folder), is_trainable=True)
    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    return LanguageModel(model.eval(), tokenizer, folder.resolve().name)


@contextmanager
def _quiet(active: bool) -> Iterator[None]:
    """Hide transformers' progress bar for local files; a download keeps its bar."""
    if hides := active and logging.is_progress_bar_enabled():
        logging.disable_progress_bar()  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        if hides:
            logging.enable_progress_bar()  # type: ignore[no-untyped-call]


class ScoreNetwork(nn.Module):
    """A language model with one number in place of its head, read at the last token of
    the completion.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        freeze_output_head_(model)
        self.model = model
        # Zero: before training every text scores the same, and the first gradient goes
        # to the head alone.
        self.score = scalar_head(model)

    def forward(self, sequences: Sequences) -> Tensor:
        """Scores ``[B]``, float32, of completions given their prompts."""
        hidden = hidden_states(self.model, sequences)
        rows = torch.arange(len(sequences), device=hidden.device)
        last = hidden[rows, sequences.lengths].to(self.score.weight.dtype)
        scores: Tensor = self.score(last).squeeze(-1)
        return scores.float()


def freeze_output_head_(model: Any) -> None:
    """Exclude the output head from training, in place: a network that reads hidden
    states has no gradient for it. Does nothing if it shares its weights with the input.
    """
    head, inputs = model.get_output_embeddings(), model.get_input_embeddings()
    if head is not None and head.weight is not inputs.weight:
        head.requires_grad_(False)


def scalar_head(model: Any) -> nn.Linear:
    """Return a linear map from the model's hidden states to one number, on its device,
    starting at 0.
    """
    width = model.config.get_text_config().hidden_size
    head = nn.Linear(width, 1, device=next(model.parameters()).device)
    nn.init.zeros_(head.weight)
    nn.init.zeros_(head.bias)
    return head


class TextScorer:
    """What scores completions; called, it is a reward function."""

    language_model: LanguageModel
    """Whose tokenizer writes the completions."""
    network: Any
    """What computes the scores."""
    batch_size: int
    """Completions scored at a time."""

    def scores(self, sequences: Sequences) -> Tensor:
        """Scores ``[B]``."""
        raise NotImplementedError

    @torch.no_grad()
    def __call__(
        self, completions: Sequence[str], prompts: Sequence[Prompt],
        finished: Sequence[bool] | None = None, **columns: Any,
    ) -> list[float]:  # fmt: skip
        """Score texts, one prompt to each, with the tools that a column may hold: the
        interface of a reward function.
        """
        ends = [True] * len(completions) if finished is None else list(finished)
        nothing, scores = [None] * len(prompts), list[float]()
        shown = list(zip(prompts, columns.get("tools") or nothing, strict=True))
        with evaluating(self.network):
            for start in range(0, len(completions), self.batch_size):
                part = slice(start, start + self.batch_size)
                # Equal prompts that follow one another are run once.
                groups = [list(group) for _, group in groupby(shown[part])]
                unique, tools = zip(*(group[0] for group in groups), strict=True)
                index = [i for i, group in enumerate(groups) for _ in group]
                batch = self.language_model.encode(
                    unique, completions[part], prompt_index=index, finished=ends[part],
                    tools=tools,
                )  # fmt: skip
                scores += self.scores(batch).tolist()
        return scores


class RewardModel(TextScorer):
    """r_φ(x, y): scores of completions, learned from comparisons.

    It is a reward function: pass the object itself where a trainer asks for one.

    Parameters
    ----------
    language_model : LanguageModel
        Its weights become the reward model's (no copy is made); its own head is not
        used.
    batch_size : int
        Completions scored at a time when texts are scored.

    References
    ----------
    Ouyang et al. (2022), Training language models to follow instructions with human
    feedback, arXiv:2203.02155, §3.5.
    """

    __name__ = "reward_model"

    def __init__(self, language_model: LanguageModel, *, batch_size: int = 64) -> None:
        self.language_model = language_model
        self.network = ScoreNetwork(language_model.model)
        self.batch_size = batch_size

    def scores(self, sequences: Sequences) -> Tensor:
        """Scores ``[B]``, float32, with gradient."""
        return self.network(sequences)  # type: ignore[no-any-return]

    def save(self, folder: str | Path) -> Path:
        """Write the backbone, the tokenizer and the head, all as safetensors, in one
        step.
        """
        with new_folder(Path(folder)) as scratch:
            self.write(scratch)
        return Path(folder)

    def write(self, folder: Path) -> None:
        """Write the files of :meth:`save` into a folder that exists."""
        self.language_model.write(folder)
        save_file(self.network.score.state_dict(), folder / "reward_head.safetensors")
        (folder / "reward_model.json").write_bytes(b'{"format": 1}')

    @staticmethod
    def load(folder: str | Path, *, device: str = "auto") -> RewardModel:
        """Read what :meth:`save` wrote."""
        head = Path(folder) / "reward_head.safetensors"
        if not head.exists():
            raise FileNotFoundError(f"{folder} holds no reward model: no {head.name}")
        reward_model = RewardModel(load(folder, device=device))
        reward_model.network.score.load_state_dict(load_file(head))
        return reward_model
