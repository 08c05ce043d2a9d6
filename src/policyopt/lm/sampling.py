"""Completions drawn from a language model, with the log-probabilities of the
distribution they were drawn from.

Every token costs one uniform number, looked up by (seed, row, step), and inverts the
cumulative distribution. A sample therefore depends on its own row alone: not on the
rows beside it, the batch size, or the number of processes.
"""

from __future__ import annotations

import copy
import math
import os
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Annotated, Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from policyopt._checks import require
from policyopt.lm.cache import CachedDecoder, check_cache
from policyopt.lm.data import Prompt
from policyopt.lm.heads import backbone_and_head, base_model
from policyopt.lm.log_probs import filter_logits
from policyopt.lm.models import LanguageModel, refuse_tied_adapters
from policyopt.lm.sequences import Sequences, evaluating, refuse_empty
from policyopt.lm.sharding import gathered, whole
from policyopt.runs import Bound, Count, Settings, derive_seed

__all__ = [
    "Sampler", "Samples", "SamplingConfig", "TransformersSampler", "UpdatedSampler",
    "VLLMSampler", "generate",
]  # fmt: skip


_Temperature = Annotated[float, Bound(">= 0 (0 is greedy)", lambda x: x >= 0)]
_Probability = Annotated[float, Bound("in (0, 1]", lambda x: 0 < x <= 1)]


@dataclass(frozen=True, kw_only=True)
class SamplingConfig(Settings):
    """How completions are drawn. The scorer must be given the same temperature, top-k
    and top-p.

    The filters, top-k and top-p, are the policy's: π_ref is restricted to the tokens
    that they leave to the policy (:class:`~policyopt.lm.policies.Reference`).
    """

    max_new_tokens: Count = 64
    """Longest completion, its end-of-sequence token included."""
    temperature: _Temperature = 1.0
    """Divides the logits. 0 is greedy: the likeliest token, always."""
    top_k: Count | None = None
    """Draw from the k likeliest tokens; None draws from all."""
    top_p: _Probability = 1.0
    """Draw from the smallest set of likeliest tokens that has this probability; 1 draws
    from all.
    """


@dataclass(frozen=True)
class Samples:
    """``B`` completions, prompt by prompt."""

    sequences: Sequences
    log_probs: Tensor
    """log-probability of each token under the distribution it was drawn from (after
    temperature, top-k and top-p), float32 ``[B, T]``, 0 at padding. Greedy decoding is
    deterministic: log 1 = 0 everywhere."""
    finished: Tensor
    """Boolean ``[B]``: the completion ends with an end-of-sequence token; False where
    ``max_new_tokens`` cut it.
    """


class Sampler(Protocol):
    """Anything that completes prompts. One with weights of its own is an
    :class:`UpdatedSampler`.
    """

    def sample(
        self, prompts: Sequence[Sequence[int]], samples_per_prompt: int,
        config: SamplingConfig, *, seed: int, first_row: int | Sequence[int] = 0,
    ) -> Samples:  # fmt: skip
        """Draw completions.

        Parameters
        ----------
        prompts : sequence of token id lists
            ``P`` prompts, none empty.
        samples_per_prompt : int
            Completions of each prompt.
        config : SamplingConfig
        seed : int
            Equal seeds give equal samples.
        first_row : int or sequence of int
            Number of the first row. Processes that share one batch pass the number of
            rows before theirs, and together draw what one process would. In the later
            turns of conversations, some of which have ended: the number of the first
            row of each prompt.

        Returns
        -------
        Samples
            ``B = P · samples_per_prompt`` rows, those of the first prompt first.
        """


@runtime_checkable
class UpdatedSampler(Sampler, Protocol):
    """A sampler that keeps weights of its own, such as an engine in another process,
    and is told of new ones.
    """

    def update_weights(self, model: nn.Module) -> None:
        """Take over the policy's weights. The trainers call this after every batch they
        learned from.

        Parameters
        ----------
        model : nn.Module
            The policy, with its adapters if it has any.
        """


class TransformersSampler:
    """Sample with the model itself, by a loop over tokens with a cache of keys and
    values.

    Each prompt is read once, whatever the number of its completions; completions that
    have ended leave the batch.

    Parameters
    ----------
    language_model : LanguageModel
        Sampled as it is at each call, so training it needs no hand-over. Its modes
        (train, eval) are kept.
    batch_size : int, optional
        Most completions side by side; None takes all. Fewer need less memory and draw
        the same samples.
    autocast : bool
        Compute in bfloat16, as a trainer with ``autocast="bfloat16"`` does; what is
        drawn from is in float32 all the same.
    synchronize : bool
        Keep all processes of ``torch.distributed`` in step: each runs the forward
        passes that the slowest needs. Required when the weights are sharded, because
        every forward pass is then a joint one. All processes must ask for the same
        number of rows.
    """

    def __init__(
        self, language_model: LanguageModel, *, batch_size: int | None = None,
        autocast: bool = False, synchronize: bool = False,
    ) -> None:  # fmt: skip
        if batch_size is not None and batch_size < 1:
            raise ValueError(f"batch_size must be >= 1 or None, got {batch_size!r}")
        self.language_model = language_model
        self.batch_size, self.autocast = batch_size, autocast
        self.synchronize = synchronize

    @torch.no_grad()
    def sample(
        self, prompts: Sequence[Sequence[int]], samples_per_prompt: int,
        config: SamplingConfig, *, seed: int, first_row: int | Sequence[int] = 0,
    ) -> Samples:  # fmt: skip
        """Draw completions; see :meth:`Sampler.sample`.

        Raises
        ------
        ValueError
            If a prompt is empty or leaves no room for ``max_new_tokens``, the model has
            no EOS, or it computes something else with a cache than without.
        FloatingPointError
            If the model's logits are NaN or infinite.
        """
        lm = self.language_model
        _check_request(prompts, samples_per_prompt, config, lm.context_length)
        eos = torch.tensor(lm.eos_ids, device=lm.device)
        count = len(prompts) * samples_per_prompt
        size = self.batch_size or count
        numbers = _row_numbers(first_row, len(prompts), samples_per_prompt)
        completions, log_probs = list[list[int]](), list[list[float]]()
        joint = gathered(lm.model, layers=not self.synchronize)
        halved = _halved(lm, copies=not self.synchronize)
        precision = halved if self.autocast else nullcontext()
        with joint, evaluating(lm.model), precision:
            for start in range(0, count, size):
                rows = range(start, min(start + size, count))
                steps = config.max_new_tokens
                uniforms = _uniforms(seed, numbers[rows.start : rows.stop], steps)
                # The prompts of this batch, and which of them each row continues.
                index = [row // samples_per_prompt for row in rows]
                batch = prompts[index[0] : index[-1] + 1]
                places = [i - index[0] for i in index]
                ids, scores = self._decode(batch, places, uniforms, eos, config)
                # A completion ends with its first EOS.
                ended = torch.isin(ids, eos)
                lengths = ((ended.cumsum(1) - ended.long()) == 0).sum(1).tolist()
                completions += _cut(ids, lengths)
                log_probs += _cut(scores, lengths)
        return collate(prompts, completions, log_probs, lm)

    def _decode(
        self, prompts: Sequence[Sequence[int]], index: list[int], uniforms: Tensor,
        eos: Tensor, config: SamplingConfig,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Token ids and log-probabilities ``[b, t]`` of one batch; what follows a row's
        first EOS means nothing.
        """
        model, device, T = self.language_model.model, eos.device, config.max_new_tokens
        parts, fault = backbone_and_head(model), check_cache(model).fault
        if fault is not None:
            raise ValueError(fault)
        decoder = CachedDecoder(parts.backbone)
        batch = Sequences.pad(prompts, [], [], device=device)
        rows = torch.tensor(index, device=device)
        hidden = decoder.read(batch.prompt_ids, batch.prompt_mask)
        logits = parts.logits(hidden[:, -1])[rows]
        decoder.repeat(rows, room=T)
        if device.type == "mps":  # has no float64
            # The bound keeps u · total below total in float32 too.
            uniforms = uniforms.float().clamp(max=1 - 2**-20)
        uniforms = uniforms.to(device)
        length = batch.prompt_ids.shape[1]
        positions = batch.prompt_mask.sum(1)[rows, None]
        mask = decoder.step_mask(batch.prompt_mask[rows], T)
        # Step by row, so that one step is contiguous.
        ids = torch.zeros(T, len(rows), dtype=torch.long, device=device)
        log_probs = torch.zeros(T, len(rows), dtype=torch.float32, device=device)
        active = torch.arange(len(rows), device=device)
        done = torch.zeros(len(rows), dtype=torch.bool, device=device)
        # Looking whether all rows are done makes the CPU wait for a GPU, so it is not
        # done at every step there.
        interval = 1 if device.type == "cpu" else 8
        for t in range(T):
            token, log_prob = _draw(logits, uniforms[t], config)
            ids[t, active], log_probs[t, active] = token, log_prob
            done |= (token[:, None] == eos).any(1)
            if t + 1 == T:
                break
            if (t + 1) % interval == 0:
                left = len(done) - int(done.sum())
                if not self._any(left > 0, device):
                    break
                if left <= _COMPACT * len(done):
                    # Other processes may go on when all rows here are done: keep one.
                    keep = (~done).nonzero()[:, 0] if left else active.new_zeros(1)
                    token, positions, done = token[keep], positions[keep], done[keep]
                    active, uniforms = active[keep], uniforms[:, keep]
                    mask = None if mask is None else mask[keep]
                    decoder.select(keep)
            seen = None if mask is None else mask[..., : length + t + 1]
            hidden = decoder(token[:, None], seen, positions)
            logits = parts.logits(hidden[:, -1])
            positions = positions + 1
        return ids[: t + 1].T, log_probs[: t + 1].T

    def _any(self, flag: bool, device: torch.device) -> bool:
        """Whether the flag is set here or, if the processes keep in step, anywhere."""
        if not self.synchronize:
            return flag
        value = torch.tensor(int(flag), device=device)
        torch.distributed.all_reduce(value, torch.distributed.ReduceOp.MAX)
        return bool(value)


@contextmanager
def _halved(lm: LanguageModel, *, copies: bool) -> Iterator[None]:
    """Compute in bfloat16, with ``copies`` from one copy of the weights for all steps
    (for which there is no room where each layer is gathered when it is needed).
    """
    parameters = lm.model.parameters()
    frozen = [p for p in parameters if p.is_floating_point() and not p.requires_grad]
    with torch.autocast(lm.device.type, torch.bfloat16, cache_enabled=copies):
        for parameter in frozen:  # autocast keeps no copies of frozen weights
            parameter.requires_grad = True
        try:
            yield
        finally:
            for parameter in frozen:
                parameter.requires_grad = False


_COMPACT = 0.75
"""Ended rows leave the batch once at most this share of it goes on."""


def _draw(
    logits: Tensor, uniforms: Tensor, config: SamplingConfig
) -> tuple[Tensor, Tensor]:
    """One token per row, and its log-probability, from logits ``[b, V]`` and uniform
    numbers ``[b]``.
    """
    if config.temperature == 0:
        top, token = logits.max(-1)
        return token, (top - top).float()  # 0, or NaN if the logits are not finite
    if config.temperature != 1:
        logits = logits / config.temperature
    logits = filter_logits(logits, top_k=config.top_k, top_p=config.top_p)
    probabilities = logits.softmax(-1)
    token = _invert(probabilities, uniforms)
    return token[:, 0], probabilities.gather(-1, token)[:, 0].log().float()


def _invert(probabilities: Tensor, uniforms: Tensor) -> Tensor:
    """Return the first token, ``[b, 1]``, whose cumulative probability exceeds u of the
    total; its own is then not 0. Of NaN any.

    In a large vocabulary the block of 128 tokens is found first, then the token in it:
    so there are few sums in float64.
    """
    count, size = probabilities.shape[-1], 128
    if count <= 8 * size:
        return _first_above(probabilities, uniforms)[0]
    if count % size:
        probabilities = pad(probabilities, (0, -count % size))
    blocks = probabilities.unflatten(-1, (-1, size))
    masses = blocks.sum(-1)
    block, excess = _first_above(masses, uniforms)
    share = 1 - (excess / masses.gather(-1, block))[:, 0]
    # So close to 1, share · total would be rounded up to total.
    share = share.clamp(min=0.0, max=1 - 8 * torch.finfo(share.dtype).eps)
    inside = blocks.take_along_dim(block[..., None], 1)[:, 0]
    return (block * size + _first_above(inside, share)[0]).clamp_(max=count - 1)


def _first_above(masses: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """Return which of ``n`` masses, ``[b, n]``, is the first whose cumulative sum
    exceeds u of the total, and by how much, ``[b, 1]`` both.
    """
    cumulative = masses.cumsum(-1, dtype=uniforms.dtype)
    wanted = uniforms[:, None] * cumulative[:, -1:]
    found = torch.searchsorted(cumulative, wanted, right=True)
    found = found.clamp_(max=masses.shape[-1] - 1)  # NaN finds none
    return found, cumulative.gather(-1, found) - wanted


def _row_numbers(
    first_row: int | Sequence[int], prompts: int, samples_per_prompt: int
) -> list[int]:
    """Return the number of each row, which is what its sample depends on."""
    if isinstance(first_row, int):
        count = prompts * samples_per_prompt
        first_row = range(first_row, first_row + count, samples_per_prompt)
    rule = f"first_row must be one number, or one for each of the {prompts} prompts"
    require(len(first_row) == prompts, rule, list(first_row))
    return [
        first + sample for first in first_row for sample in range(samples_per_prompt)
    ]


def _uniforms(seed: int, numbers: Sequence[int], steps: int) -> Tensor:
    """Uniform numbers in [0, 1), float64 ``[steps, rows]``, each a function of (seed,
    row, step) alone.

    Philox is a counter: the row is one word of it, so any row can be drawn without
    those before it.
    """
    table = np.empty((steps, len(numbers)))
    for row, number in enumerate(numbers):
        bits = np.random.Philox(key=seed % 2**128, counter=[0, number, 0, 0])
        table[:, row] = np.random.Generator(bits).random(steps)
    # So close to 1, u · total would be rounded up to total.
    return torch.from_numpy(table.clip(max=1 - 2**-50))


def _check_request(
    prompts: Sequence[Sequence[int]], samples_per_prompt: int, config: SamplingConfig,
    context_length: int | None,
) -> None:  # fmt: skip
    if not prompts:
        raise ValueError("there are no prompts to complete")
    if samples_per_prompt < 1:
        raise ValueError(f"samples_per_prompt must be >= 1, got {samples_per_prompt!r}")
    refuse_empty(prompts)
    longest = config.max_new_tokens
    for i, prompt in enumerate(prompts):
        room = (context_length or math.inf) - len(prompt)
        if room < longest:
            remedy = f", or set max_new_tokens to at most {room}" if room > 0 else ""
            what = f"prompt {i} has {len(prompt)} tokens and max_new_tokens = {longest}"
            limit = f"the model's context of {context_length}"
            raise ValueError(f"{what}: more than {limit}; shorten the prompt{remedy}")


def _cut(rows: Tensor, lengths: list[int]) -> list[list[Any]]:
    """Turn rows into lists of these lengths."""
    return [row[:length] for row, length in zip(rows.tolist(), lengths, strict=True)]


def collate(
    prompts: Sequence[Sequence[int]], completions: list[list[int]],
    log_probs: list[list[float]], lm: LanguageModel,
) -> Samples:  # fmt: skip
    """Pad completions and log-probabilities, and check that these are numbers."""
    device, ends = lm.device, set(lm.eos_ids)
    samples_per_prompt = len(completions) // len(prompts)
    index = [row // samples_per_prompt for row in range(len(completions))]
    batch = Sequences.pad(prompts, completions, index, pad_id=lm.pad_id, device=device)
    scores = torch.zeros(batch.completion_ids.shape, device=device)
    flat = [number for row in log_probs for number in row]
    scores[batch.completion_mask] = torch.tensor(flat, device=device)
    if not bool(scores.isfinite().all()):
        row = int((~scores.isfinite()).any(1).nonzero()[0])
        what = f"{lm.name} has NaN or infinite logits (completion {row})"
        remedy = "go back to the last good checkpoint and lower the learning rate"
        raise FloatingPointError(f"{what}: {remedy}")
    finished = [not ends.isdisjoint(row[-1:]) for row in completions]
    return Samples(batch, scores, torch.tensor(finished, device=device))


class VLLMSampler:
    """Sample with vLLM (≥ 0.11) in this process, sharing the GPU with the training.
    Needs the package ``vllm``.

    The weights are handed over before every batch, so the samples are the current
    policy's. Its kernels round differently from the trainer's: train with an importance
    correction.

    Parameters
    ----------
    language_model : LanguageModel
        The engine is built from its configuration alone; nothing is read from disk or
        hub.
    engine : vllm.LLM, optional
        An engine to use instead; it must run in this process and return
        ``logprobs_mode="processed_logprobs"``.
    **options
        Of ``vllm.LLM``, such as ``gpu_memory_utilization`` (here 0.3 unless given, the
        rest is the trainer's), ``max_model_len`` (give it: by default vLLM sets memory
        aside for the model's whole context) or ``dtype``.

    Raises
    ------
    ImportError
        If vLLM is not installed.
    """

    def __init__(
        self, language_model: LanguageModel, *, engine: Any = None, **options: Any
    ) -> None:
        try:
            import vllm  # type: ignore[import-not-found,unused-ignore]
        except ImportError as error:
            what = "VLLMSampler needs vLLM, on Linux with a GPU: pip install vllm"
            raise ImportError(f"{what}. TransformersSampler runs everywhere") from error
        lm = self.language_model = language_model
        self.context_length = options.get("max_model_len", lm.context_length)
        self._sampling_params = vllm.SamplingParams
        self.engine = engine or _build_engine(vllm.LLM, lm, options)
        model_config = getattr(self.engine, "model_config", None)
        mode = getattr(model_config, "logprobs_mode", "processed_logprobs")
        rule = "logprobs_mode must be 'processed_logprobs', after top-k and top-p"
        require(mode == "processed_logprobs", rule, mode, "give it to vllm.LLM")

    def _hand_over(self) -> None:
        """Give the model's weights, adapters merged, to the engine."""
        model = self.language_model.model
        # In one process the function is called as it is: nothing is copied to another
        # process or pickled.
        with gathered(model):
            weights = _merged_weights(model)
            self.engine.apply_model(lambda inner: inner.load_weights(weights))
        self.engine.reset_prefix_cache()  # those keys and values are the old weights'

    def sample(
        self, prompts: Sequence[Sequence[int]], samples_per_prompt: int,
        config: SamplingConfig, *, seed: int, first_row: int | Sequence[int] = 0,
    ) -> Samples:  # fmt: skip
        """Draw completions; see :meth:`Sampler.sample`. ``first_row`` must be the first
        of a prompt's rows.

        Samples depend on (seed, row), and by rounding on the batch: vLLM's kernels are
        not batch-invariant.
        """
        lm = self.language_model
        _check_request(prompts, samples_per_prompt, config, self.context_length)
        self._hand_over()
        options: dict[str, Any] = {
            "n": samples_per_prompt, "max_tokens": config.max_new_tokens,
            "temperature": config.temperature, "top_p": config.top_p,
            "stop_token_ids": list(lm.eos_ids), "detokenize": False,
            "logprobs": 0,  # of the sampled token only
        }  # fmt: skip
        if config.top_k is not None:
            options["top_k"] = config.top_k
        # Halved, because vLLM adds the number of the sample to the seed.
        rows = _row_numbers(first_row, len(prompts), samples_per_prompt)
        seeds = [derive_seed(seed, row) >> 1 for row in rows[::samples_per_prompt]]
        outputs = self.engine.generate(
            [{"prompt_token_ids": list(prompt)} for prompt in prompts],
            [self._sampling_params(**options, seed=number) for number in seeds],
            use_tqdm=False,
        )
        samples = [sample for output in outputs for sample in output.outputs]
        completions = [list(sample.token_ids) for sample in samples]
        log_probs = [
            [step[token].logprob for step, token in zip(s.logprobs, ids, strict=True)]
            for s, ids in zip(samples, completions, strict=True)
        ]
        if config.temperature == 0:
            log_probs = [[0.0] * len(ids) for ids in completions]
        return collate(prompts, completions, log_probs, lm)


def _build_engine(engine: Any, lm: LanguageModel, options: dict[str, Any]) -> Any:
    """Build a vLLM engine for the model's architecture, its weights still to come."""
    model = base_model(lm.model)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model).__name__]
    # Only an engine in this process can be given weights without a copy.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        options = {"distributed_executor_backend": "external_launcher", **options}
    dtype = str(model.dtype).removeprefix("torch.")
    # The model's own sampling defaults must not mix with ours.
    defaults = {
        "dtype": dtype, "gpu_memory_utilization": 0.3, "generation_config": "vllm",
    }  # fmt: skip
    required = {
        "load_format": "dummy", "skip_tokenizer_init": True,
        "logprobs_mode": "processed_logprobs", "trust_remote_code": False,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        config.save_pretrained(folder)
        return engine(model=folder, **(defaults | options | required))


def _merged_weights(model: Any) -> Iterator[tuple[str, Tensor]]:
    """Names and weights of the plain model, one at a time; LoRA is added to copies, not
    to the weights.
    """
    refuse_tied_adapters(model)
    base = base_model(model)
    for name, parameter in base.named_parameters():
        if ".lora_" in name:
            continue
        weight = whole(parameter.detach())
        path, _, kind = name.partition(".base_layer.")
        if kind == "weight":
            layer = base.get_submodule(path)
            for adapter in layer.active_adapters:
                if adapter in layer.lora_A:
                    weight = weight + layer.get_delta_weight(adapter).to(weight.dtype)
        yield name.replace(".base_layer", ""), weight


def decode_all(language_model: LanguageModel, sequences: Sequences) -> list[str]:
    """Return the texts of all completions."""
    rows = _cut(sequences.completion_ids, sequences.lengths.tolist())
    return [language_model.decode(row) for row in rows]


def generate(
    language_model: LanguageModel, prompts: Sequence[Prompt],
    config: SamplingConfig | None = None, *, samples_per_prompt: int = 1, seed: int = 0,
    tools: Sequence[Any] | None = None,
) -> list[list[str]]:  # fmt: skip
    """Complete texts or chat messages.

    Parameters
    ----------
    language_model : LanguageModel
    prompts : sequence of str or chat messages
    config : SamplingConfig, optional
    samples_per_prompt : int
    seed : int
    tools : sequence, optional
        What the chat template shows each prompt as tools.

    Returns
    -------
    list[list[str]]
        For each prompt its completions, special tokens left out.
    """
    batch = language_model.encode(prompts, [], prompt_index=[], tools=tools)
    pairs = zip(batch.prompt_ids, batch.prompt_mask, strict=True)
    ids = [row[mask].tolist() for row, mask in pairs]
    sampler = TransformersSampler(language_model)
    config = config or SamplingConfig()
    sequences = sampler.sample(ids, samples_per_prompt, config, seed=seed).sequences
    texts = decode_all(language_model, sequences)
    starts = range(0, len(texts), samples_per_prompt)
    return [texts[start : start + samples_per_prompt] for start in starts]
