"""Log-probabilities of completions without the matrix of all log-probabilities.

A dense log-softmax stores ``[tokens, vocabulary]`` several times over. Here the tokens
pass through the language-model head a chunk at a time: the forward pass keeps the
log-probability of each token and forgets its logits, the backward pass computes them
again.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from policyopt.lm.heads import backbone_and_head
from policyopt.lm.sequences import Sequences, hidden_states

__all__ = [
    "TokenLogProbs", "chunked_log_probs", "completion_log_probs", "filter_logits",
]  # fmt: skip


class TokenLogProbs(NamedTuple):
    """Result of :func:`completion_log_probs`."""

    log_probs: Tensor
    """log π(a_t | s_t), float32 ``[B, T]``, 0 at padding."""
    entropy: Tensor | None
    """Entropy of π(· | s_t) in nats, float32 ``[B, T]``, 0 at padding; None unless
    asked for.
    """


class _Transform(NamedTuple):
    """From the head's output to the logits of the policy, in this order."""

    scale: float
    softcap: float | None
    temperature: float
    top_k: int | None
    top_p: float

    @property
    def filters(self) -> bool:
        return self.top_k is not None or self.top_p < 1.0


def filter_logits(
    logits: Tensor,
    *,
    top_k: int | None = None,
    top_p: float = 1.0,
    keep: Tensor | None = None,
) -> Tensor:
    """Set the logits of unlikely tokens to −∞: top-k first, then top-p among what is
    left, as in transformers.

    Which tokens go depends on the values alone: tokens tied with the last one kept are
    kept as well, so sampler and scorer decide alike.

    Parameters
    ----------
    logits : Tensor
        ``[..., V]``, already divided by the temperature.
    top_k : int, optional
        Keep the ``top_k`` largest.
    top_p : float
        Keep the smallest set of largest logits whose probability reaches ``top_p``; 1
        keeps all.
    keep : Tensor, optional
        Long ``[...]``: a token that stays whatever its logit. The scorer passes the
        token that was sampled, which rounding could otherwise push over the edge.

    References
    ----------
    Fan, Lewis & Dauphin (2018), arXiv:1805.04833 (top-k); Holtzman et al. (2020),
    arXiv:1904.09751 (top-p).
    """
    if top_k is not None and top_k < 1:
        raise ValueError(
            f"top_k must be at least 1, or None for no limit, got {top_k!r}"
        )
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p must lie in (0, 1], got {top_p!r}")
    limited = top_k is not None and top_k < logits.shape[-1]
    if not limited and top_p == 1.0:
        return logits
    with torch.no_grad():
        values = logits
        dropped = torch.zeros_like(logits, dtype=torch.bool)
        if limited:
            assert top_k is not None
            dropped = logits < logits.topk(top_k, dim=-1).values[..., -1:]
            values = logits.masked_fill(dropped, -torch.inf)
        if top_p < 1.0:
            values = values.sort(dim=-1, descending=True).values
            probabilities = values.float().softmax(-1)
            # A token stays if those before it do not reach top_p; the first always
            # stays.
            kept = probabilities.cumsum(-1) - probabilities < top_p
            kept[..., 0] = True
            dropped |= logits < values.masked_fill(~kept, torch.inf).amin(
                -1, keepdim=True
            )
        if keep is not None:
            dropped.scatter_(-1, keep[..., None], False)
    return logits.masked_fill(dropped, -torch.inf)


def chunked_log_probs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    softcap: float | None = None,
    scale: float = 1.0,
    entropy: bool = False,
    chunk_size: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    r"""Log-probabilities of ``targets`` under softmax(z / temperature), z = hidden ·
    weightᵀ + bias.

    Equal to the dense log-softmax in values and gradients. With p the probabilities, H
    their entropy, g and g_H the gradients that arrive at log p_target and H, the
    gradient at the logits is in closed form

    .. math:: g\,(\mathrm{onehot}(target) − p) − g_H\, p\,(\log p + H).

    Softmax and sums over chunks are in float32 (float64 for float64 input) whatever the
    dtype of ``hidden`` and ``weight``; products of matrices are in their dtype. The
    gradient is not differentiable a second time.

    Parameters
    ----------
    hidden : Tensor
        ``[N, H]``, one row per token to score.
    weight : Tensor
        ``[V, H]``, the weight of the language-model head.
    targets : Tensor
        Long ``[N]``, the tokens.
    bias : Tensor, optional
        ``[V]``, added to the logits.
    temperature : float
        Divides the logits, as in the sampler.
    top_k, top_p
        See :func:`filter_logits`; the target always stays.
    softcap : float, optional
        Replace z by softcap · tanh(z / softcap), before the temperature (Gemma 2).
    scale : float
        Multiplies z, before the soft cap (Cohere, Granite).
    entropy : bool
        Return the entropy too, with gradient.
    chunk_size : int, optional
        Tokens at a time; by default about as many as fit into the processor's cache, or
        on a GPU as make 2²⁶ logits, and no fewer than 128.

    Returns
    -------
    tuple[Tensor, Tensor | None]
        Log-probabilities ``[N]``, and entropies in nats ``[N]`` or None.
    """
    transform = _Transform(scale, softcap, temperature, top_k, top_p)
    _check(hidden, targets, transform)
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1]:
        raise ValueError(
            f"weight must be [V, {hidden.shape[1]}] to fit hidden, got "
            f"{tuple(weight.shape)}"
        )
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    size = _chunk_size(chunk_size, weight.shape[0], hidden.device)
    with torch.autocast(hidden.device.type, enabled=False):
        log_probs, entropies = _ChunkedLogProbs.apply(  # type: ignore[no-untyped-call]
            hidden.to(weight.dtype),
            weight,
            None if bias is None else bias.to(weight.dtype),
            targets,
            transform,
            entropy,
            size,
        )
    return log_probs, entropies if entropy else None


def _check(hidden: Tensor, targets: Tensor, transform: _Transform) -> None:
    if hidden.ndim != 2 or targets.shape != hidden.shape[:1]:
        raise ValueError(
            f"hidden must be [N, H] and targets [N], got {tuple(hidden.shape)} and "
            f"{tuple(targets.shape)}"
        )
    if not transform.temperature > 0:
        raise ValueError(
            f"temperature must be positive, got {transform.temperature!r}; a greedy "
            "policy has no log-probabilities"
        )
    if transform.softcap is not None and not transform.softcap > 0:
        raise ValueError(f"softcap must be positive or None, got {transform.softcap!r}")


def _chunk_size(chunk_size: int | None, vocabulary: int, device: torch.device) -> int:
    if chunk_size is None:
        # Few enough logits to stay in the cache of a CPU, many enough to fill a GPU.
        # Below 128 tokens reading the weight would take longer than multiplying by it.
        return max(128, (2**19 if device.type == "cpu" else 2**26) // vocabulary)
    if chunk_size < 1:
        raise ValueError(f"chunk_size must be at least 1, got {chunk_size!r}")
    return chunk_size


class _ChunkedLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        transform: _Transform,
        entropy: bool,
        chunk_size: int,
    ) -> tuple[Tensor, Tensor]:
        N = hidden.shape[0]
        dtype = torch.promote_types(hidden.dtype, torch.float32)
        log_probs = hidden.new_empty(N, dtype=dtype)
        entropies = hidden.new_empty(N if entropy else 0, dtype=dtype)
        for start in range(0, N, chunk_size):
            rows = slice(start, start + chunk_size)
            logits = nn.functional.linear(hidden[rows], weight, bias)
            log_p, _ = _log_softmax(logits, targets[rows], transform)
            del logits
            log_probs[rows] = log_p.gather(1, targets[rows, None])[:, 0]
            if entropy:
                p = log_p.exp()
                entropies[rows] = -p.mul_(_finite(log_p, transform)).sum(-1)
        ctx.save_for_backward(hidden, weight, bias, targets, entropies)
        ctx.transform, ctx.entropy, ctx.chunk_size = transform, entropy, chunk_size
        if not entropy:
            ctx.mark_non_differentiable(entropies)
        return log_probs, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any, grad_log_probs: Tensor, grad_entropies: Tensor
    ) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, entropies = ctx.saved_tensors
        transform: _Transform = ctx.transform
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        dtype = entropies.dtype
        grad_hidden = torch.empty_like(hidden) if need_hidden else None
        grad_weight = torch.zeros_like(weight, dtype=dtype) if need_weight else None
        grad_bias = torch.zeros_like(bias, dtype=dtype) if need_bias else None
        for start in range(0, hidden.shape[0], ctx.chunk_size):
            rows = slice(start, start + ctx.chunk_size)
            g = grad_log_probs[rows, None]
            logits = nn.functional.linear(hidden[rows], weight, bias)
            log_p, slope = _log_softmax(logits, targets[rows], transform, slope=True)
            del logits
            if ctx.entropy:
                # −p (g + g_H (log p + H)), built in place
                p = log_p.exp()
                grad = (
                    _finite(log_p, transform)
                    .add_(entropies[rows, None])
                    .mul_(grad_entropies[rows, None])
                )
                grad = grad.add_(g).mul_(p).neg_()
                del p
            else:
                grad = log_p.exp_().mul_(-g)
            grad.scatter_add_(1, targets[rows, None], g)
            if slope is not None:
                grad.mul_(slope)
                del slope
            if transform.scale != transform.temperature:
                grad.mul_(transform.scale / transform.temperature)
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(weight.dtype)
            if grad_hidden is not None:
                torch.mm(grad, weight, out=grad_hidden[rows])
            if grad_weight is not None:
                if grad_weight.dtype == weight.dtype:
                    grad_weight.addmm_(grad.T, hidden[rows])
                else:
                    grad_weight += grad.T @ hidden[rows]
            del grad, log_p  # before the next chunk needs the room
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
            None,
            None,
        )


def _log_softmax(
    logits: Tensor, targets: Tensor, transform: _Transform, *, slope: bool = False
) -> tuple[Tensor, Tensor | None]:
    """Log-probabilities of one chunk and the derivative of the soft cap; overwrites
    ``logits``.
    """
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    derivative = None
    if transform.scale != 1.0:
        logits.mul_(transform.scale)
    if transform.softcap is not None:
        tanh = logits.div_(transform.softcap).tanh_()
        derivative = 1 - tanh.square() if slope else None
        logits = tanh * transform.softcap
    if transform.temperature != 1.0:
        logits.div_(transform.temperature)
    if transform.filters:
        logits = filter_logits(
            logits, top_k=transform.top_k, top_p=transform.top_p, keep=targets
        )
    return torch.log_softmax(logits, -1), derivative


def _finite(log_p: Tensor, transform: _Transform) -> Tensor:
    """Put 0 for log 0, since what it is multiplied by is 0."""
    return log_p.masked_fill(log_p == -torch.inf, 0.0) if transform.filters else log_p


def _through_module(
    head: nn.Module,
    hidden: Tensor,
    targets: Tensor,
    transform: _Transform,
    entropy: bool,
) -> tuple[Tensor, Tensor | None]:
    """Chunked log-probabilities for a head that is more than one matrix: LoRA on the
    head, quantised weights.
    """

    def score(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        log_p, _ = _log_softmax(head(hidden).clone(), targets, transform)
        chosen = log_p.gather(1, targets[:, None])[:, 0]
        return chosen, -(log_p.exp() * _finite(log_p, transform)).sum(
            -1
        ) if entropy else chosen.new_empty(0)

    vocabulary = int(getattr(head, "out_features", 2**17))
    size = _chunk_size(None, vocabulary, hidden.device)
    pieces = [
        checkpoint(
            score, hidden[i : i + size], targets[i : i + size], use_reentrant=False
        )
        for i in range(0, max(1, len(hidden)), size)
    ]
    log_probs = torch.cat([piece[0] for piece in pieces])
    return log_probs, torch.cat([piece[1] for piece in pieces]) if entropy else None


def completion_log_probs(
    model: nn.Module,
    sequences: Sequences,
    *,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    entropy: bool = False,
    share_prompts: bool = True,
    hidden: Tensor | None = None,
) -> TokenLogProbs:
    """Log-probabilities of all completion tokens under the policy that samples with
    these settings.

    Padding is taken out before the head, so it costs nothing there.

    Parameters
    ----------
    model : nn.Module
        A causal language model of transformers, with or without LoRA.
    sequences : Sequences
        On the model's device.
    temperature, top_k, top_p
        As in the sampler.
    entropy : bool
        Compute the entropies as well.
    share_prompts : bool
        See :func:`policyopt.lm.sequences.hidden_states`.
    hidden : Tensor, optional
        ``[B, T + 1, H]`` from :func:`policyopt.lm.sequences.hidden_states`, if it is at
        hand; else it is computed.
    """
    parts = backbone_and_head(model)
    ids, mask = sequences.completion_ids, sequences.completion_mask
    if hidden is None:
        # The state after the last token chooses no action.
        shorter = Sequences(
            sequences.prompt_ids,
            sequences.prompt_mask,
            ids[:, :-1],
            mask[:, :-1],
            sequences.prompt_index,
        )
        hidden = hidden_states(model, shorter, share_prompts=share_prompts)
    places = mask.flatten().nonzero()[:, 0]
    states = (
        hidden[:, : ids.shape[1]].reshape(-1, hidden.shape[-1]).index_select(0, places)
    )
    targets = ids.flatten()[places]
    head = parts.head
    if type(head) is nn.Linear and "forward" not in vars(head):
        scores, entropies = chunked_log_probs(
            states,
            head.weight,
            targets,
            bias=head.bias,
            temperature=temperature,
            top_k=top_k,
            top_p=top_p,
            softcap=parts.softcap,
            scale=parts.scale,
            entropy=entropy,
        )
    else:
        transform = _Transform(parts.scale, parts.softcap, temperature, top_k, top_p)
        _check(states, targets, transform)
        scores, entropies = _through_module(head, states, targets, transform, entropy)

    def place(values: Tensor) -> Tensor:
        return (
            values.new_zeros(mask.numel())
            .index_copy(0, places, values)
            .view(mask.shape)
        )

    return TokenLogProbs(place(scores), None if entropies is None else place(entropies))
