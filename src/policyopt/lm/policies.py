"""π_θ as a module that scores completions, and π_ref."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn

from policyopt.lm.log_probs import TokenLogProbs, completion_log_probs
from policyopt.lm.models import LanguageModel, is_adapted
from policyopt.lm.sequences import Sequences, evaluating, widen
from policyopt.lm.sharding import gathered


class PolicyNetwork(nn.Module):
    """π_θ as a module whose forward pass scores completions: what is wrapped for
    several processes.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sequences: Sequences, **options: Any) -> TokenLogProbs:
        """As :func:`~policyopt.lm.log_probs.completion_log_probs`."""
        return completion_log_probs(self.model, sequences, **options)


class Reference:
    """π_ref: the policy that training starts from, or another one, without gradient.

    With LoRA it is the model with its adapters switched off, and costs no memory;
    otherwise a copy is kept. It remembers the weights of the moment it is made, so
    trainers make it through :meth:`Run.reference`, which refuses to do so too late.

    Parameters
    ----------
    language_model : LanguageModel
        The policy.
    reference : LanguageModel, optional
        Another model with the policy's tokenizer.
    autocast : bool
        Compute in bfloat16.
    copy : bool
        False keeps no copy, for those who ask everything before the first update.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        reference: LanguageModel | None,
        *,
        autocast: bool = False,
        copy: bool = True,
    ) -> None:
        given = reference or language_model
        theirs, ours = len(given.tokenizer), len(language_model.tokenizer)
        if theirs != ours:
            raise ValueError(
                f"reference must have the policy's tokenizer, got {theirs} tokens for "
                f"{ours}"
            )
        self.model: Any = given.model
        self._adapted = reference is None and is_adapted(self.model)
        trained = reference is None and not self._adapted
        self._borrowed = trained and not copy
        if trained and copy:
            self.model = deepcopy(self.model).requires_grad_(False)
        self._autocast, self._device = autocast, language_model.device

    def end(self) -> None:
        """Say that the policy is about to change: without a copy, π_ref is gone."""
        if self._borrowed:
            self.model = None

    @torch.no_grad()
    def log_probs(
        self, sequences: Sequences, pieces: Sequence[Tensor] = (), **options: Any
    ) -> Tensor:
        """Return log π_ref(y_t | x, y_<t), ``[B, T]``.

        ``pieces`` are row numbers to be computed one after another; by default all
        rows are computed at once.

        Raises
        ------
        RuntimeError
            If no copy was kept and the training has begun.
        """
        if self.model is None:
            raise RuntimeError(
                "this reference kept no copy of the policy, whose training has begun: "
                "ask it before, or make it with copy=True"
            )
        off = self.model.disable_adapter() if self._adapted else nullcontext()
        kind = self._device.type
        precision = torch.autocast(kind, torch.bfloat16, enabled=self._autocast)
        with gathered(self.model), evaluating(self.model), off, precision:
            parts = [sequences.select(rows) for rows in pieces] or [sequences]
            scored = [completion_log_probs(self.model, p, **options) for p in parts]
        like = sequences.completion_mask
        return torch.cat([widen(one.log_probs, like) for one in scored])
