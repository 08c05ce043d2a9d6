"""A decoder that reads prompts once and goes on from what it kept of them, and the
check that this changes nothing.
"""

from __future__ import annotations

import inspect
import weakref
from typing import Any, NamedTuple

import torch
import transformers
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import DynamicCache, cache_utils

from policyopt.lm.heads import Head, backbone_and_head, base_model, evaluating, some_ids

__all__ = ["CacheCheck", "CachedDecoder", "check_cache"]

# transformers 5.24 renamed `past_key_values` to `cache`. State-space models had a name
# of their own. What a forward pass does not name it may swallow without a word.
_ARGUMENTS = ("cache", "past_key_values", "cache_params")


class CachedDecoder:
    """A decoder and the cache of what it has read: keys and values, or the states of
    recurrent layers.

    Parameters
    ----------
    backbone : nn.Module
        From :func:`policyopt.lm.heads.backbone_and_head`.

    Raises
    ------
    TypeError
        If its forward pass takes no cache.
    """

    def __init__(self, backbone: Any) -> None:
        accepted = inspect.signature(type(backbone).forward).parameters
        names = [name for name in _ARGUMENTS if name in accepted]
        if not names:
            raise TypeError(f"{type(backbone).__name__} takes no cache")
        self._argument, self._positions = names[0], "position_ids" in accepted
        self.backbone, self.cache = backbone, DynamicCache(config=backbone.config)
        self.layers: list[Any] = self.cache.layers
        known = cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer
        plain = all(type(layer) in known for layer in self.layers)
        self.attends = plain and self._positions
        """Whether all layers keep keys and values alone, and positions can be given,
        so that several tokens can go on from a padded prompt at once."""

    def __call__(self, ids: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        """Read ``ids``, ``[b, t]``: their last hidden states ``[b, t, H]``."""
        options: dict[str, Any] = {self._argument: self.cache, "attention_mask": mask}
        if self._positions:
            options["position_ids"] = positions
        hidden: Tensor = self.backbone(input_ids=ids, use_cache=True, **options)[0]
        return hidden

    def read(self, prompt_ids: Tensor, prompt_mask: Tensor) -> Tensor:
        """Read prompts padded on the left: their last hidden states ``[P, L, H]``."""
        positions = (prompt_mask.cumsum(1) - 1).clamp(min=0)
        return self(prompt_ids, prompt_mask, positions)

    def share(self, index: Tensor) -> None:
        """Give each completion its prompt's keys and values, with their gradient."""
        for layer in self.layers:
            # One that reads another layer's cache has none itself.
            if layer.is_initialized:
                layer.keys = _rows(layer.keys, index)
                layer.values = _rows(layer.values, index)

    def repeat(self, rows: Tensor, room: int) -> None:
        """Give each completion what was kept of its prompt, and ordinary layers room
        for ``room`` tokens.
        """
        for i, layer in enumerate(self.layers):
            # Layers of other kinds (sliding windows, recurrent states) keep their way.
            if type(layer) is cache_utils.DynamicLayer and layer.is_initialized:
                self.layers[i] = _RoomyLayer(layer, rows, room)
            else:
                layer.reorder_cache(rows)

    def select(self, rows: Tensor) -> None:
        """Keep these rows."""
        self.cache.reorder_cache(rows)  # type: ignore[arg-type]

    def step_mask(self, prompts: Tensor, room: int) -> Tensor | None:
        """Attention mask of prompts and ``room`` tokens, in the form that costs least;
        None if nothing is padded, so that all tokens may see all before them.
        """
        # A recurrent state has left padding out already.
        recurrent = not any(hasattr(layer, "keys") for layer in self.layers)
        if bool(prompts.all()) or recurrent:
            return None
        mask = torch.cat([prompts, prompts.new_ones(len(prompts), room)], 1)
        # From a mask over keys alone transformers builds the one over (row, head,
        # query, key) at every step, and makes the CPU wait for a GPU. Sliding windows,
        # ALiBi and other attention functions need it to.
        config = self.backbone.config
        plain = all(type(layer) is _RoomyLayer for layer in self.layers)
        plain = plain and not getattr(config, "alibi", False)
        if plain and config._attn_implementation == "sdpa":
            return mask[:, None, None]
        return mask


def _rows(tensor: Tensor, index: Tensor) -> Tensor:
    # As a matrix: the backward pass then adds whole contiguous rows, ten times as fast.
    return tensor.flatten(1).index_select(0, index).view(len(index), *tensor.shape[1:])


class _RoomyLayer(cache_utils.DynamicLayer):  # type: ignore[no-untyped-call]
    """Keys and values of one layer in buffers with room at the end, so that a step
    copies one column, not all.
    """

    keys: Tensor
    values: Tensor

    def __init__(self, layer: Any, rows: Tensor, room: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lazy_initialization(layer.keys, layer.values)
        self.keys, self.values = layer.keys, layer.values
        self.capacity = self.keys.shape[-2] + room
        self.reorder_cache(rows)

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Make new buffers of these rows."""
        length = self.keys.shape[-2]
        self.buffers = []
        for states in (self.keys, self.values):
            shape = (len(beam_idx), states.shape[1], self.capacity, states.shape[3])
            buffer = states.new_empty(shape)
            torch.index_select(states, 0, beam_idx, out=buffer[:, :, :length])
            self.buffers.append(buffer)
        self.keys, self.values = (buffer[:, :, :length] for buffer in self.buffers)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Write the new columns, and return all columns so far."""
        start = self.keys.shape[-2]
        end = start + key_states.shape[-2]
        keys, values = self.buffers
        keys[:, :, start:end], values[:, :, start:end] = key_states, value_states
        self.keys, self.values = keys[:, :, :end], values[:, :, :end]
        return self.keys, self.values


class CacheCheck(NamedTuple):
    """What :func:`check_cache` found."""

    fault: str | None
    """Why the model cannot be sampled; None if stepping with a cache is right."""
    shares: bool
    """Whether several tokens can go on from a shared prompt in one pass."""


_checked: weakref.WeakKeyDictionary[nn.Module, CacheCheck] = weakref.WeakKeyDictionary()


def check_cache(model: nn.Module) -> CacheCheck:
    """Compare cached steps with the whole model, on the first call with a model.

    Two prompts of unequal length, padded on the left, and some tokens more of each, are
    read as the sampler and :func:`policyopt.lm.sequences.hidden_states` read them, and
    by the whole model, row by row, without padding or cache. Right means: equal up to
    rounding, and a gradient that is finite.

    Raises
    ------
    ValueError
        If :func:`policyopt.lm.heads.backbone_and_head` refuses the model.
    """
    parts, causal = backbone_and_head(model), base_model(model)
    if causal not in _checked:
        with evaluating(causal), torch.autocast(causal.device.type, enabled=False):
            _checked[causal] = _check(causal, parts)
    return _checked[causal]


@torch.no_grad()
def _check(causal: Any, parts: Head) -> CacheCheck:
    shares = False
    try:
        attends = CachedDecoder(parts.backbone).attends
        most = _rounding(causal, attends)
        T = 2 if attends else 8  # errors of recurrent states add up
        ids = some_ids(causal, 8 + 2 * T)
        texts = ids[: 3 + T], ids[3 + T :]  # prompts of 3 and 5 tokens, and T more
        whole = [causal(input_ids=text[None], use_cache=False) for text in texts]
        wanted = torch.stack([w.logits[0, -1 - T :] for w in whole]).float()
        if not attends:  # ten times what the model is off from itself, with two texts
            both = causal(input_ids=ids[None].repeat(2, 1), use_cache=False).logits
            itself = both[:1, : 3 + T].float(), whole[0].logits.float()
            most = max(most, min(10 * max(_errors(*itself)), 5e-3))
        tokens = torch.stack([text[-T:] for text in texts])
        filler = max(0, int(ids[0]) - 1)  # padding, whose embedding may be 0
        prompts = torch.stack([pad(texts[0][:3], (2, 0), value=filler), texts[1][:5]])
        mask = torch.arange(5, device=ids.device) >= ids.new_tensor([[2], [0]])
        errors = _errors(_steps(parts, prompts, mask, tokens), wanted)
        if max(errors) > most:
            raise ValueError(f"logits off by {errors} × spread: padding, {T} steps")
        if attends:
            with torch.enable_grad():
                logits = _together(parts, prompts, mask, tokens)
                # Where padding attends to nothing a gradient may be 0/0 (Gemma 3n).
                trained = [p for p in parts.backbone.parameters() if p.requires_grad]
                # The embedding last: its gradient is as large as the head.
                embedding = causal.get_input_embeddings().weight
                trained.sort(key=lambda p: p is embedding)
                if trained and logits.requires_grad:
                    (grad,) = torch.autograd.grad(logits.sum(), trained[:1])
                    logits = logits + 0 * grad.sum()  # NaN is never close
            shares = max(_errors(logits.detach(), wanted)) <= most
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model of someone else's may raise
        fault = (
            f"{type(causal).__name__} cannot be sampled: with a cache it is another "
            f"model ({error!r}). Choose one of another kind, or try a newer "
            f"transformers than {transformers.__version__}; SFT and DPO need no cache"
        )
        return CacheCheck(fault, shares=False)
    return CacheCheck(None, shares)


def _rounding(model: nn.Module, attends: bool) -> float:
    """Return the most that rounding may do to logits, as a share of their spread."""
    weight = next(model.parameters())
    # Products of float32 matrices may be in TensorFloat-32, or less.
    exact = torch.get_float32_matmul_precision() == "highest"
    # SmolLM2's thirty layers round to 5e-4, and a shifted position makes 0.05 or more.
    # A recurrent state that is stepped otherwise than scanned may be off by 6e-4.
    exact = exact and weight.device.type == "cpu"
    least = (5e-3 if attends else 3e-4) if exact else 0.05
    return max(least, {torch.bfloat16: 0.2, torch.float16: 0.05}.get(weight.dtype, 0.0))


def _steps(parts: Head, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """Logits ``[P, T + 1, V]`` after the prompts and each token, as in the sampler."""
    decoder, T = CachedDecoder(parts.backbone), tokens.shape[1]
    hidden = [decoder.read(ids, mask)[:, -1].flip(0)]
    # A row more, then one fewer: the prompts change places.
    decoder.repeat(torch.tensor([0, 1, 0], device=ids.device), room=T)
    decoder.select(torch.tensor([1, 2], device=ids.device))
    tokens, mask = tokens.flip(0), mask.flip(0)
    steps = decoder.step_mask(mask, T)
    for t in range(T):
        seen = None if steps is None else steps[..., : ids.shape[1] + t + 1]
        states = decoder(tokens[:, t, None], seen, mask.sum(1)[:, None] + t)
        hidden.append(states[:, -1])
    return parts.logits(torch.stack(hidden, 1)).flip(0)


def _together(parts: Head, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
    """Logits ``[P, T + 1, V]``, with the tokens read in one pass."""
    decoder = CachedDecoder(parts.backbone)
    first = decoder.read(ids, mask)[:, -1:]
    decoder.share(torch.arange(len(ids), device=ids.device))
    positions = mask.sum(1)[:, None] + torch.arange(tokens.shape[1], device=ids.device)
    seen = torch.cat([mask, mask.new_ones(tokens.shape)], 1)
    return parts.logits(torch.cat([first, decoder(tokens, seen, positions)], 1))


def _errors(logits: Tensor, wanted: Tensor) -> list[float]:
    """How far the logits of each pass are off, as a share of their spread."""
    spread = (wanted - wanted.mean(-1, keepdim=True)).norm(dim=(0, 2))
    off = (logits.float() - wanted).norm(dim=(0, 2)) / spread.clamp(min=1e-6)
    return [float(f"{error:.1g}") for error in off.nan_to_num(torch.inf).tolist()]
