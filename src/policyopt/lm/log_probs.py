"""Log-probabilities of completions without the matrix of all log-probabilities.

A dense log-softmax stores ``[tokens, vocabulary]`` several times over. Here the tokens
pass through the language-model head a chunk at a time: the forward pass keeps the
log-probability of each token and forgets its logits, the backward pass computes them
again. Where the loss is known beforehand, or the head is frozen, the forward pass takes
the gradient from the logits while they are there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.backends import cuda
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from policyopt._checks import require
from policyopt.lm.heads import Head, backbone_and_head, scale_and_cap
from policyopt.lm.sequences import Sequences, hidden_states, switched_on

__all__ = [
    "TokenLogProbs", "chunked_log_probs", "completion_log_probs", "filter_logits",
]  # fmt: skip


_Apply = Callable[..., tuple[Tensor, ...]]
_Slopes = Callable[[slice, Sequence[Tensor]], list[Tensor]]


class TokenLogProbs(NamedTuple):
    """Result of :func:`completion_log_probs`."""

    log_probs: Tensor
    """log π(a_t | s_t), float32 ``[B, T]``, 0 at padding."""
    entropy: Tensor | None
    """Entropy of π(· | s_t) in nats, float32 ``[B, T]``, 0 at padding; None unless
    asked for."""


def filter_logits(
    logits: Tensor, *, top_k: int | None = None, top_p: float = 1.0,
    keep: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Set the logits of unlikely tokens to −∞: top-k, then top-p among what is left.

    The order is that of transformers. Which tokens go depends on the values alone:
    tokens tied with the last one kept are kept as well, so sampler and scorer agree.

    Parameters
    ----------
    logits : Tensor
        ``[..., V]``, already divided by the temperature.
    top_k : int, optional
        Keep the ``top_k`` largest.
    top_p : float
        Keep the smallest set of largest logits whose probability reaches ``top_p``;
        1 keeps all.
    keep : Tensor, optional
        Long ``[...]``: a token that stays whatever its logit. The scorer passes the
        token that was sampled, which rounding could otherwise push over the edge.

    Returns
    -------
    Tensor
        ``[..., V]``.

    Raises
    ------
    ValueError
        If ``top_k`` is below 1, or ``top_p`` outside (0, 1].

    References
    ----------
    Fan, Lewis & Dauphin (2018), arXiv:1805.04833 (top-k); Holtzman et al. (2020),
    arXiv:1904.09751 (top-p).
    """
    require(top_k is None or top_k >= 1, "top_k must be at least 1 or None", top_k)
    require(0.0 < top_p <= 1.0, "top_p must lie in (0, 1]", top_p)
    vocabulary = logits.shape[-1]
    top_k = min(top_k or vocabulary, vocabulary)
    if top_k == vocabulary and top_p == 1.0:
        return logits
    with torch.no_grad():
        values = logits
        dropped = torch.zeros_like(logits, dtype=torch.bool)
        if top_k < vocabulary:
            dropped = logits < logits.topk(top_k, dim=-1).values[..., -1:]
            values = logits.masked_fill(dropped, -torch.inf)
        if top_p < 1.0:
            values = values.sort(dim=-1, descending=True).values
            probabilities = values.float().softmax(-1)
            # A token stays if those before it do not reach top_p, the first always.
            kept = probabilities.cumsum(-1) - probabilities < top_p
            kept[..., 0] = True
            edge = values.masked_fill(~kept, torch.inf).amin(-1, keepdim=True)
            dropped |= logits < edge
        if keep is not None:
            dropped.scatter_(-1, keep[..., None], False)
    return logits.masked_fill(dropped, -torch.inf)


def chunked_log_probs(
    head: nn.Module, hidden: Tensor, targets: Tensor, *, temperature: float = 1.0,
    top_k: int | None = None, top_p: float = 1.0, softcap: float | None = None,
    scale: float = 1.0, entropy: bool = False, chunk_size: int | None = None,
    slopes: _Slopes | None = None,
) -> tuple[Tensor, Tensor | None]:  # fmt: skip
    """Log-probabilities of ``targets`` under softmax(head(hidden) / temperature).

    Equal to the dense log-softmax in values and gradients. Tokens that fit into one
    chunk are not computed twice. Softmax and entropy are in float32 (float64 for
    float64 logits) whatever the dtype of the head; products of matrices are in the
    head's dtype, or in that of autocast. If the head is a plain ``nn.Linear``, the
    gradient of its weight is summed over the chunks in float32, in one buffer; that
    of any other head is summed by autograd, in the dtype of its parameters. The
    gradient is not differentiable a second time.

    Parameters
    ----------
    head : nn.Module
        From ``[n, H]`` to logits z, ``[n, V]``.
    hidden : Tensor
        ``[N, H]``, one row per token to score.
    targets : Tensor
        Long ``[N]``, the tokens.
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
        Tokens at a time; by default about as many as fit into the processor's cache,
        or on a GPU as make 2²⁶ logits, and no fewer than 128.
    slopes : callable, optional
        A guess at the gradient that will arrive at the log-probabilities, up to a
        factor: a function of a slice of the tokens and of a list of one tensor, their
        log-probabilities, that returns the like. With it the logits are computed once
        and not twice; if another gradient arrives, they are computed again. A frozen
        head needs no guess. Not used with ``entropy``.

    Returns
    -------
    tuple[Tensor, Tensor | None]
        Log-probabilities ``[N]``, and entropies in nats ``[N]`` or None.

    Raises
    ------
    ValueError
        If the shapes do not fit, or an option is out of its range.
    """
    shapes = tuple(hidden.shape), tuple(targets.shape)
    fits = hidden.ndim == 2 and targets.shape == hidden.shape[:1]
    require(fits, "hidden must be [N, H] and targets [N]", shapes)
    greedy = "a greedy policy has no log-probabilities"
    require(temperature > 0, "temperature must be positive", temperature, greedy)
    require(softcap is None or softcap > 0, "softcap must be positive or None", softcap)
    fits = chunk_size is None or chunk_size >= 1
    require(fits, "chunk_size must be at least 1", chunk_size)

    def score(logits: Tensor, targets: Tensor) -> tuple[Tensor, ...]:
        logits = _divided(logits, scale, softcap, temperature)
        if top_k is not None or top_p < 1.0:
            logits = filter_logits(logits, top_k=top_k, top_p=top_p, keep=targets)
            logits = logits.clamp(min=-1e30)  # so that 0 · log 0 is 0 in the entropy
        apply: _Apply = _LogSoftmax.apply
        scores = apply(logits, targets, entropy)
        return scores if entropy else scores[:1]

    plain = head if type(head) is nn.Linear and "forward" not in vars(head) else None
    on = hidden.device.type
    if plain is not None:
        autocast = torch.is_autocast_enabled(on)
        dtype = torch.get_autocast_dtype(on) if autocast else plain.weight.dtype
        hidden = hidden.to(dtype)
    size = chunk_size or _chunk_size(head, hidden)
    if len(hidden) <= size:
        result = score(head(hidden), targets)
    elif plain is not None:
        weight, bias = plain.weight, plain.bias
        if not (weight.requires_grad or (bias is not None and bias.requires_grad)):
            slopes = _ones  # how log p changes with the state is then all there is
        apply: _Apply = _Recomputed.apply
        slopes = None if entropy else slopes
        result = apply(hidden, weight, bias, targets, score, size, slopes)
    else:
        pieces = [
            checkpoint(lambda h, t: score(head(h), t), *piece, use_reentrant=False)
            for piece in zip(hidden.split(size), targets.split(size), strict=True)
        ]
        result = tuple(map(torch.cat, zip(*pieces, strict=True)))
    return result[0], result[1] if entropy else None


def _divided(
    logits: Tensor, scale: float, softcap: float | None, temperature: float
) -> Tensor:
    """Return logits as they go into the filters: in float32 at least, tempered."""
    logits = scale_and_cap(logits, scale, softcap)
    return logits if temperature == 1.0 else logits / temperature


def _chunk_size(head: nn.Module, hidden: Tensor) -> int:
    # Few enough logits to stay in the cache of a CPU, many enough to fill a GPU. Below
    # 128 tokens reading the weight would take longer than multiplying by it.
    vocabulary = int(getattr(head, "out_features", 2**17))
    return max(128, (2**19 if hidden.device.type == "cpu" else 2**26) // vocabulary)


class _LogSoftmax(torch.autograd.Function):
    """Log-probabilities of the targets and entropies, from logits ``[n, V]``.

    With p the probabilities, H their entropy, g and g_H the gradients that arrive at
    log p_target and H, the gradient at the logits is
    g · (onehot(target) − p) − g_H · p · (log p + H). Autograd
    would keep p and log p more than once.
    """

    @staticmethod
    def forward(
        ctx: Any, logits: Tensor, targets: Tensor, entropy: bool
    ) -> tuple[Tensor, Tensor]:
        log_p = logits.log_softmax(-1)
        chosen = log_p.gather(1, targets[:, None])[:, 0]
        nothing = chosen.new_empty(0)
        entropies = -log_p.exp().mul_(log_p).sum(-1) if entropy else nothing
        ctx.save_for_backward(log_p, targets, entropies)
        ctx.entropy = entropy
        return chosen, entropies

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, g: Tensor, g_H: Tensor) -> tuple[Tensor, None, None]:
        log_p, targets, entropies = ctx.saved_tensors
        factor = -g[:, None]
        if ctx.entropy:
            inner = (log_p + entropies[:, None]).mul_(g_H[:, None]).add_(g[:, None])
            factor = inner.neg_()
        grad = log_p.exp().mul_(factor)
        return grad.scatter_add_(1, targets[:, None], g[:, None]), None, None


def _ones(rows: slice, scores: Sequence[Tensor]) -> list[Tensor]:
    return [torch.ones_like(one) for one in scores]


class _Recomputed(torch.autograd.Function):
    """``score(hidden · weightᵀ + bias, targets)`` in chunks, computed again backward
    unless the gradient was foreseen.

    ``torch.utils.checkpoint`` does the same, but holds the weight gradient of a chunk
    beside the sum: twice the memory at V = 131,072 and H = 896 in float32. In bfloat16
    it needs 0.6 of the memory, since it sums in bfloat16: over 32 chunks the error of
    the weight gradient is 0.6 % in place of 0.3 %, over 128 chunks 1.0 %.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor,
        score: Callable[[Tensor, Tensor], tuple[Tensor, ...]], size: int,
        slopes: _Slopes | None,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        # Cast here, so that the gradients need not go through the narrower type.
        ctx.dtype, weight = weight.dtype, weight.to(hidden.dtype)
        bias = None if bias is None else bias.to(hidden.dtype)
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.score, ctx.size = score, size
        slopes = slopes if any(ctx.needs_input_grad) else None
        said, sums = _in_chunks(ctx, (hidden, weight, bias, targets), slopes)
        ctx.foreseen = slopes and (said[1], sums)
        return said[:1] if slopes else said

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.foreseen is not None:
            (guess, sums), ctx.foreseen, g = ctx.foreseen, None, grads[0]
            frozen = not any(ctx.needs_input_grad[1:3])
            factor = g[:, None] if frozen else (g / guess)[guess.abs().argmax()]
            if frozen or torch.allclose(g, factor * guess, rtol=1e-6, atol=0.0):
                for total in sums:
                    if total is not None:
                        total.mul_(factor)
                return *sums, None, None, None, None
        arrived: _Slopes = lambda rows, _: [grad[rows] for grad in grads]  # noqa: E731
        return *_in_chunks(ctx, ctx.saved_tensors, arrived)[1], None, None, None, None


def _in_chunks(
    ctx: Any, tensors: Sequence[Any], slopes: _Slopes | None
) -> tuple[tuple[Tensor, ...], list[Tensor | None]]:
    """Return the scores; and, of a loss with these slopes at the scores, the slopes and
    the gradients of hidden states, weight and bias.
    """
    hidden, weight, bias, targets = tensors
    wide = torch.promote_types(weight.dtype, torch.float32)
    needs = ctx.needs_input_grad[:3] if slopes else [False] * 3
    grad_hidden = torch.empty_like(hidden) if needs[0] else None
    grad_weight = torch.zeros_like(weight, dtype=wide) if needs[1] else None
    grad_bias = torch.zeros_like(bias, dtype=wide) if needs[2] else None
    # A CPU widens products into memory that the system hands out page by page, which
    # takes longer than multiplying; small pieces of it are used again.
    most = 2**22 // weight.shape[1] if weight.device.type == "cpu" else len(weight)
    pieces = []
    for start in range(0, len(hidden), ctx.size):
        rows = slice(start, start + ctx.size)
        logits = nn.functional.linear(hidden[rows], weight, bias)
        with torch.set_grad_enabled(slopes is not None):
            logits.requires_grad_(slopes is not None)
            scores = ctx.score(logits, targets[rows])
        pieces.append([one.detach() for one in scores])
        if slopes is None:
            continue
        pieces[-1] += (known := slopes(rows, pieces[-1]))
        (grad,) = torch.autograd.grad(scores, logits, known)
        del logits, scores  # before the next chunk needs the room
        if grad_hidden is not None:
            grad_hidden[rows] = grad @ weight
        if grad_bias is not None:
            grad_bias += grad.sum(0)
        if grad_weight is not None and weight.dtype == wide:
            grad_weight.addmm_(grad.T, hidden[rows])
        elif grad_weight is not None:
            parts = zip(grad_weight.split(most), grad.T.split(most), strict=True)
            for total, of_logits in parts:
                total += of_logits @ hidden[rows]
        del grad
    sums = (grad_weight, grad_bias)
    typed = [None if total is None else total.to(ctx.dtype) for total in sums]
    return tuple(map(torch.cat, zip(*pieces, strict=True))), [grad_hidden, *typed]


def completion_log_probs(
    model: nn.Module, sequences: Sequences, *, temperature: float = 1.0,
    top_k: int | None = None, top_p: float = 1.0, entropy: bool = False,
    share_prompts: bool = True, hidden: Tensor | None = None,
    loss: Callable[[Tensor], Tensor] | None = None,
) -> TokenLogProbs:  # fmt: skip
    """Log-probabilities of completion tokens under the policy that samples like this.

    Padding is taken out before the head, so it costs nothing there.

    Parameters
    ----------
    model : nn.Module
        A causal language model of transformers, with or without LoRA.
    sequences : Sequences
        On the model's device; B completions of up to T tokens.
    temperature, top_k, top_p
        As in the sampler.
    entropy : bool
        Compute the entropies as well.
    share_prompts : bool
        See :func:`policyopt.lm.sequences.hidden_states`.
    hidden : Tensor, optional
        ``[B, T, H]`` or more columns from
        :func:`policyopt.lm.sequences.hidden_states`, if it is at hand; else it is
        computed.
    loss : callable, optional
        What will be minimised, a function of the log-probabilities ``[B, T]``. Where
        its gradient at each token depends on that token alone, the logits are computed
        once; where it does not, three times and not twice. The result is the same.

    Raises
    ------
    ValueError
        If an option is out of its range, or the model cannot be taken apart into
        decoder and head (see :func:`policyopt.lm.heads.backbone_and_head`).
    """
    states = token_states(model, sequences, hidden, share_prompts)
    parts, place = states.parts, states.place

    @torch.enable_grad()
    def slopes(rows: slice, scores: Sequence[Tensor]) -> list[Tensor]:
        now = place(scores[0], rows).requires_grad_()
        (grad,) = torch.autograd.grad(loss(now), now)  # type: ignore[misc]
        return [grad.flatten()[states.places[rows]]]

    scores, entropies = chunked_log_probs(
        parts.head, states.hidden, states.tokens,
        temperature=temperature, top_k=top_k, top_p=top_p, softcap=parts.softcap,
        scale=parts.scale, entropy=entropy, slopes=slopes if loss else None,
    )  # fmt: skip
    return TokenLogProbs(place(scores), None if entropies is None else place(entropies))


class TokenStates(NamedTuple):
    """The ``N`` tokens of all completions, and the states they were chosen in."""

    parts: Head
    hidden: Tensor
    """``[N, H]``, with gradient."""
    tokens: Tensor
    """Long ``[N]``."""
    places: Tensor
    """Long ``[N]``: where they are in ``[B, T]``, flattened."""
    shape: torch.Size
    """``[B, T]``."""

    def chunks(self) -> Iterator[slice]:
        """Cut the tokens as :func:`chunked_log_probs` does."""
        size = _chunk_size(self.parts.head, self.hidden)
        return (slice(i, i + size) for i in range(0, len(self.tokens), size))

    def logits(self, rows: slice, temperature: float) -> Tensor:
        """Return the logits ``[n, V]`` of some tokens, over the temperature."""
        parts, logits = self.parts, self.parts.head(self.hidden[rows])
        return _divided(logits, parts.scale, parts.softcap, temperature)

    def dropped(self, rows: slice, temperature: float, **filters: Any) -> Tensor:
        """Return what the filters take away, Boolean ``[n, V]``."""
        logits, tokens = self.logits(rows, temperature), self.tokens[rows]
        return filter_logits(logits, **filters, keep=tokens).isneginf()

    def place(self, values: Tensor, rows: slice = slice(None)) -> Tensor:
        """Return numbers per token, ``[N]`` or of some, as ``[B, T]``, 0 elsewhere."""
        padded = values.new_zeros(self.shape.numel())
        return padded.index_copy(0, self.places[rows], values).view(self.shape)


def token_states(
    model: nn.Module, sequences: Sequences, hidden: Tensor | None = None,
    share: bool = True,
) -> TokenStates:  # fmt: skip
    """Compute the states, or pick them from what :func:`completion_log_probs` got."""
    ids, mask = sequences.completion_ids, sequences.policy_mask
    if hidden is None:
        with _attending(model, sequences):
            hidden = hidden_states(model, sequences.states(), share_prompts=share)
    places = mask.flatten().nonzero()[:, 0]
    states = hidden[:, : ids.shape[1]].reshape(-1, hidden.shape[-1])
    picked, tokens = states.index_select(0, places), ids.flatten()[places]
    parts = backbone_and_head(model)
    return TokenStates(parts, picked, tokens, places, mask.shape)


@contextmanager
def _attending(model: nn.Module, sequences: Sequences) -> Iterator[None]:
    """Attend to few tokens by plain products where a CPU computes in 16 bits: its flash
    attention takes 1.5 times (512 tokens) to 3 times as long (90), most of it backward.
    """
    ids = sequences.prompt_ids
    short = ids.shape[1] + sequences.completion_ids.shape[1] <= 512
    halved = ids.device.type == "cpu" and torch.is_autocast_enabled("cpu")
    # A layer that is computed again backward would not attend in the same way there.
    if not (short and halved) or switched_on(model, "gradient_checkpointing"):
        yield
        return
    before = cuda.fp16_bf16_reduction_math_sdp_allowed()  # meant for CPUs too
    # Without it the products would be in float32.
    cuda.allow_fp16_bf16_reduction_math_sdp(True)
    try:
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        cuda.allow_fp16_bf16_reduction_math_sdp(before)
