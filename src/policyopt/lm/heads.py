"""A causal language model taken apart: the decoder, the language-model head, and what
is done to the logits.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from policyopt._checks import require

__all__ = ["Head", "backbone_and_head", "causal_models", "evaluating"]


class Head(NamedTuple):
    """The parts of a causal language model: logits = softcap · tanh(scale ·
    head(hidden) / softcap).
    """

    backbone: nn.Module
    """The decoder; its last hidden states are the head's input."""
    head: nn.Module
    """From hidden states ``[..., H]`` to ``[..., V]``."""
    softcap: float | None
    """Bound on the logits (Gemma 2: ``final_logit_softcapping``), or None."""
    scale: float
    """Factor on the logits (Cohere: ``logit_scale``; Granite: 1 /
    ``logits_scaling``).
    """

    def logits(self, hidden: Tensor) -> Tensor:
        """Logits ``[..., V]`` of hidden states ``[..., H]``, in float32 at least.
        Dense: for few positions.
        """
        if type(self.head) is nn.Linear:  # some residual streams are in float32
            hidden = hidden.to(self.head.weight.dtype)
        return scale_and_cap(self.head(hidden), self.scale, self.softcap)


def scale_and_cap(logits: Tensor, scale: float, softcap: float | None) -> Tensor:
    """Return softcap · tanh(scale · logits / softcap), as :class:`Head` says, in
    float32 at least.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if scale != 1.0:
        logits = logits * scale
    return logits if softcap is None else torch.tanh(logits / softcap) * softcap


# Models whose parts have been seen to reproduce the whole. The parts are looked up at
# every call, because adapters may be added and heads replaced in between.
_verified: weakref.WeakSet[nn.Module] = weakref.WeakSet()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch dropout and its like off, and leave every module's mode as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


def backbone_and_head(model: nn.Module) -> Head:
    """Take apart a causal language model of transformers, with or without LoRA.

    The first call with a model checks on four tokens that the parts reproduce
    ``model(...).logits``, and that no state depends on later tokens.

    Raises
    ------
    ValueError
        If the model has no language-model head, does something to its logits that is
        not known here, or looks ahead.
    """
    active = getattr(model, "active_peft_config", None)
    if getattr(active, "is_prompt_learning", False):
        name = type(active).__name__
        raise ValueError(f"{name} adds virtual tokens, not supported; use LoRA")
    causal = base_model(model)
    name = type(causal).__name__
    head = getattr(causal, "get_output_embeddings", lambda: None)()
    backbone = getattr(causal, "get_decoder", lambda: None)()
    # Where parts have other names than get_decoder expects (Llama 4, ModernBERT).
    if backbone is None or backbone is causal or backbone is head:
        backbone = getattr(causal, "model", None)
    if head is None or backbone is None:
        remedy = "load one with AutoModelForCausalLM"
        raise ValueError(f"{name} is not a causal language model with a head; {remedy}")
    config = causal.config.get_text_config(decoder=True)
    scale = 1.0
    for attribute in ("logit_scale", "lm_head_multiplier"):  # Cohere; Falcon-H1
        scale *= float(getattr(config, attribute, None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)  # Granite, MiniCPM3
    softcap = getattr(config, "final_logit_softcapping", None)  # Gemma
    softcap = softcap or getattr(config, "logits_soft_cap", None)  # RecurrentGemma
    parts = Head(backbone, head, None if softcap is None else float(softcap), scale)
    if causal not in _verified:
        _verify(causal, parts)
        _verified.add(causal)
    return parts


def causal_models(network: nn.Module) -> list[Any]:
    """Return the causal language models that a network is made of."""
    return [m for m in network.children() if hasattr(m, "get_output_embeddings")]


def base_model(model: Any) -> Any:
    """Return the model without its adapters (peft). LoRA lives inside the layers, which
    stay what they are.
    """
    return getattr(model, "get_base_model", lambda: model)()


def some_ids(causal: Any, count: int) -> Tensor:
    """Return tokens to try, padding not among them: some models hide it by its id."""
    embedding = causal.get_input_embeddings().weight
    pad = getattr(causal.config.get_text_config(decoder=True), "pad_token_id", None)
    ids = torch.arange(count, device=embedding.device) % max(1, len(embedding) - 1)
    return (ids + (pad or 0) + 1) % len(embedding)


@torch.no_grad()
def _verify(causal: Any, parts: Head) -> None:
    """Compare the parts with the whole, and see that earlier logits do not know the
    last token, in evaluation mode.
    """
    ids, name = some_ids(causal, 5), type(causal).__name__
    tokens = torch.stack([ids[:4], torch.cat([ids[:3], ids[4:]])])
    try:
        with evaluating(causal), torch.autocast(ids.device.type, enabled=False):
            whole = causal(input_ids=tokens, use_cache=False).logits.float()
            rebuilt = parts.logits(parts.backbone(input_ids=tokens, use_cache=False)[0])
    except Exception as reason:  # whatever a model of someone else's may raise
        raise ValueError(f"{name} cannot read four tokens: {reason!r}") from reason
    if not bool(whole.isfinite().all()):
        raise ValueError(f"{name}: the logits are not finite; the weights are broken")
    # Rounding only: a forgotten factor or cap is far larger in any trained model.
    precision = max(1e-7, torch.finfo(next(causal.parameters()).dtype).eps) ** 0.5
    most = 0.3 * precision * max(1e-3, whole.abs().max().item())
    fits = rebuilt.shape == whole.shape
    error = (rebuilt.float() - whole).abs().max().item() if fits else math.inf
    if not error <= most:
        what = "decoder and head do not reproduce the model's own logits"
        remedy = "so its log-probabilities would be wrong: choose another model"
        raise ValueError(f"{name}: {what} (largest difference {error:.3g}), {remedy}")
    width, known = whole.shape[-1], len(causal.get_input_embeddings().weight)
    rule = f"{name}: the head must not draw tokens that have no embedding ({known})"
    require(width <= known, rule, f"logits of {width}", "make both of one size")
    # The median: an expert chosen by a hair may change at one position.
    change = (whole[0] - whole[1])[:-1].abs().amax(-1).median().item()
    if not change <= most:
        what = f"another last token changes the logits before it by {change:.3g}"
        remedy = "in its config if it is a decoder, or choose another model"
        raise ValueError(f"{name} is not causal: {what}. Set is_decoder=True {remedy}")
