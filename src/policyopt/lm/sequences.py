"""Prompts and completions as padded tensors, and the states of a language model along
them.

A language model is a policy: the state s_t is the prompt with the first t tokens of the
completion, the action a_t is token t of the completion. :func:`hidden_states`
represents every s_t by a vector.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from policyopt._checks import require
from policyopt.lm.cache import CachedDecoder, check_cache
from policyopt.lm.heads import backbone_and_head, evaluating

__all__ = ["Sequences", "evaluating", "hidden_states", "widen"]

_MASKED = {"prompt": "prompt", "completion": "completion", "policy": "completion"}


@dataclass(frozen=True)
class Sequences:
    """``P`` prompts and ``B`` completions; several completions may continue one prompt.

    The masks come from lengths. No token is padding because of its id: an
    end-of-sequence token belongs to the completion even where the tokenizer pads with
    the same id.
    """

    prompt_ids: Tensor
    """Long ``[P, L]``, padded on the left. No prompt is empty."""
    prompt_mask: Tensor
    """Boolean ``[P, L]``, true at tokens."""
    completion_ids: Tensor
    """Long ``[B, T]``, padded on the right. A completion may be empty, and ``T`` may be
    0.
    """
    completion_mask: Tensor
    """Boolean ``[B, T]``, true at tokens."""
    prompt_index: Tensor
    """Long ``[B]``: the row of ``prompt_ids`` that each completion continues."""
    policy_mask: Tensor = None  # type: ignore[assignment]
    """Boolean ``[B, T]``: the tokens that the policy chose; by default all. The others
    are read and never scored: what an environment wrote between two turns.
    """

    def __post_init__(self) -> None:
        if self.policy_mask is None:
            object.__setattr__(self, "policy_mask", self.completion_mask)
        for name, whole in _MASKED.items():
            ids, mask = getattr(self, f"{whole}_ids"), getattr(self, f"{name}_mask")
            fits = ids.ndim == 2 and ids.dtype == torch.long
            require(fits, f"{whole}_ids must be a long matrix", (ids.dtype, ids.shape))
            fits = mask.shape == ids.shape and mask.dtype == torch.bool
            rule = f"{name}_mask must be Boolean with the shape of {whole}_ids"
            require(fits, f"{rule}, {tuple(ids.shape)}", (mask.dtype, mask.shape))
        index = self.prompt_index
        fits = index.shape == (len(self),) and index.dtype == torch.long
        rule = "prompt_index must hold one row number per completion, long"
        require(fits, f"{rule} [{len(self)}]", (index.dtype, index.shape))

    @staticmethod
    def pad(
        prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]],
        prompt_index: Sequence[int] | None = None, *, pad_id: int = 0,
        device: torch.device | str | None = None,
    ) -> Sequences:  # fmt: skip
        """Pad lists of token ids: prompts on the left, completions on the right.

        Parameters
        ----------
        prompts, completions : sequences of sequences of int
            Token ids. Completions include their end-of-sequence token if they have one.
        prompt_index : sequence of int, optional
            For each completion the number of its prompt; by default completion ``i``
            continues prompt ``i``.
        pad_id : int
            Fills the gaps. Which id it is makes no difference.

        Raises
        ------
        ValueError
            If a prompt is empty (there would be no state to act in) or ``prompt_index``
            does not fit.
        """
        refuse_empty(prompts)
        P, B = len(prompts), len(completions)
        if prompt_index is None and P != B:
            remedy = "say with prompt_index which prompt each completion continues"
            raise ValueError(f"{P} prompts and {B} completions: {remedy}")
        index = list(range(P) if prompt_index is None else prompt_index)
        if len(index) != B:
            raise ValueError(f"{len(index)} entries in prompt_index, {B} completions")
        for i, row in enumerate(index):
            if not 0 <= row < P:
                what = f"completion {i} continues prompt {row}"
                raise ValueError(f"{what}, but there are {P} prompts")
        left = pad_rows(prompts, pad_id, left=True)
        right = pad_rows(completions, pad_id, left=False)
        sequences = Sequences(*left, *right, torch.tensor(index, dtype=torch.long))
        return sequences if device is None else sequences.to(device)

    @staticmethod
    def join(batches: Sequence[Sequences]) -> Sequences:
        """Put batches one after another, padded to the longest prompt and the longest
        completion of all.
        """
        L = max(batch.prompt_ids.shape[1] for batch in batches)
        like = max((b.completion_ids for b in batches), key=lambda ids: ids.shape[1])
        rows, before = list[tuple[Tensor, ...]](), 0
        for batch in batches:
            left = (L - batch.prompt_ids.shape[1], 0)
            rows.append((
                pad(batch.prompt_ids, left), pad(batch.prompt_mask, left),
                widen(batch.completion_ids, like),
                widen(batch.completion_mask, like), batch.prompt_index + before,
                widen(batch.policy_mask, like),
            ))  # fmt: skip
            before += len(batch.prompt_ids)
        return Sequences(*map(torch.cat, zip(*rows, strict=True)))

    def __len__(self) -> int:
        """Return the number of completions, ``B``."""
        return self.completion_ids.shape[0]

    @property
    def lengths(self) -> Tensor:
        """Tokens per completion, long ``[B]``."""
        return self.completion_mask.sum(1)

    def to(self, device: torch.device | str) -> Sequences:
        """Move all tensors to ``device``."""
        return Sequences(*(tensor.to(device) for tensor in vars(self).values()))

    def states(self) -> Sequences:
        """Leave out the last column: the state after the last token chooses no
        action.
        """
        names = "completion_ids", "completion_mask", "policy_mask"
        return replace(self, **{name: getattr(self, name)[:, :-1] for name in names})

    def select(self, rows: Tensor | slice) -> Sequences:
        """Keep the completions ``rows`` (numbers, Boolean mask, slice), in that order.

        Prompts that no completion continues any more are dropped, and so is padding
        that no row needs.
        """
        used, index = torch.unique(self.prompt_index[rows], return_inverse=True)
        prompt_mask = self.prompt_mask[used]
        completion_mask = self.completion_mask[rows]
        L, T = (int(mask.any(0).sum()) for mask in (prompt_mask, completion_mask))
        first = prompt_mask.shape[1] - L
        return Sequences(
            self.prompt_ids[used][:, first:], prompt_mask[:, first:],
            self.completion_ids[rows][:, :T], completion_mask[:, :T], index,
            self.policy_mask[rows][:, :T],
        )  # fmt: skip


def refuse_empty(prompts: Sequence[Sequence[int]]) -> None:
    """Raise a ValueError for the first prompt without a token."""
    for i, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise ValueError(f"prompt {i} is empty; begin it with at least one token")


def pad_rows(
    rows: Sequence[Sequence[int]], pad_id: int, *, left: bool
) -> tuple[Tensor, Tensor]:
    """Token ids and mask ``[len(rows), length of the longest]``."""
    width = max(map(len, rows), default=0)
    ids = torch.full((len(rows), width), pad_id)
    mask = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if left else slice(len(row))
        ids[i, place], mask[i, place] = torch.as_tensor(row), True
    return ids, mask


def widen(values: Tensor, like: Tensor) -> Tensor:
    """Pad numbers per token, ``[B, t]``, with zeros on the right to the width of
    ``like``, ``[B, T]``.
    """
    return pad(values, (0, like.shape[1] - values.shape[1]))


def hidden_states(
    model: nn.Module, sequences: Sequences, *, share_prompts: bool = True
) -> Tensor:
    """Last hidden states of every state along the completions, with gradient.

    Parameters
    ----------
    model : nn.Module
        A causal language model of transformers, with or without LoRA.
    sequences : Sequences
        On the model's device.
    share_prompts : bool
        Run each prompt once and let all its completions read its keys and values. The
        result is the same up to rounding, for less work. With dropout, completions of
        one prompt then share the prompt's noise. Models for which that is not so
        (:func:`policyopt.lm.cache.check_cache`), layers that are dropped at random, and
        gradient checkpointing run the prompt again for each completion.

    Returns
    -------
    Tensor
        ``[B, T + 1, H]``; entry ``t`` is the state after reading the prompt and ``t``
        tokens of the completion. Entries after the end of a completion are finite and
        mean nothing.

    Raises
    ------
    ValueError
        If there are no completions, or :func:`backbone_and_head` refuses the model.
    """
    backbone = backbone_and_head(model).backbone
    if len(sequences) == 0:
        raise ValueError("there are no completions in this batch")
    shared = len(sequences) > len(sequences.prompt_ids)
    if share_prompts and shared and _can_share(model, backbone):
        return _shared(backbone, sequences)
    return _concatenated(backbone, sequences)


def _can_share(model: nn.Module, backbone: nn.Module) -> bool:
    # In training mode transformers switches the cache off with checkpointing, and with
    # layerdrop leaves out layers, which then have read no prompt. In evaluation mode
    # the passes are the same, so that they round alike.
    if switched_on(backbone, "gradient_checkpointing", "layerdrop"):
        return False
    return check_cache(model).shares


def switched_on(network: nn.Module, *names: str) -> bool:
    """Whether some module of a network has one of these attributes, and it is true."""
    return any(getattr(m, name, False) for m in network.modules() for name in names)


def _shared(backbone: nn.Module, sequences: Sequences) -> Tensor:
    """Two passes: the prompts, then the completions on top of the prompts' keys and
    values.
    """
    mask, index = sequences.prompt_mask, sequences.prompt_index
    decoder = CachedDecoder(backbone)
    hidden = decoder.read(sequences.prompt_ids, mask)
    first = hidden[:, -1:].index_select(0, index)
    decoder.share(index)
    ids, seen = sequences.completion_ids, sequences.completion_mask
    T = ids.shape[1]
    if T == 0:  # the second pass is made all the same: sharded processes wait for it
        ids, seen = pad(ids, (0, 1)), pad(seen, (0, 1))
    positions = mask.sum(1)[index, None] + torch.arange(ids.shape[1], device=ids.device)
    completions = decoder(ids, torch.cat([mask[index], seen], 1), positions)
    return torch.cat([first, completions], 1)[:, : T + 1]


def _concatenated(backbone: nn.Module, sequences: Sequences) -> Tensor:
    """One pass over prompt and completion, moved together and to the left.

    All padding then comes after the tokens, where causal attention never looks: no mask
    is needed, positions are 0, 1, 2, …, and attention may take its fastest route.
    """
    index = sequences.prompt_index
    prompt_lengths = sequences.prompt_mask.sum(1)[index]
    ids = torch.cat([sequences.prompt_ids[index], sequences.completion_ids], 1)
    L, T = sequences.prompt_ids.shape[1], sequences.completion_ids.shape[1]
    width = int((prompt_lengths + sequences.lengths).max())
    columns = torch.arange(width, device=ids.device) + (L - prompt_lengths)[:, None]
    ids = ids.gather(1, columns.clamp(max=L + T - 1))
    hidden: Tensor = backbone(input_ids=ids, use_cache=False)[0]
    wanted = prompt_lengths[:, None] - 1 + torch.arange(T + 1, device=ids.device)
    wanted = wanted.clamp(max=width - 1)[..., None].expand(-1, -1, hidden.shape[-1])
    return hidden.gather(1, wanted)
