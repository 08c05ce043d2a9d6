"""π_θ as a module that scores completions, and π_ref."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from typing import Any, Literal

import torch
from torch import Tensor, nn

from policyopt._checks import require
from policyopt.lm.log_probs import TokenLogProbs, completion_log_probs, token_states
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
    r"""π_ref: the policy that training starts from, or another one, without gradient.

    It remembers the weights of the moment it is made, so trainers make it through
    :meth:`Run.reference`, which refuses to do so too late. Fresh adapters (LoRA's B is
    0) cost no memory: π_ref is the model with its adapters off. Of adapters that have
    been trained a copy is kept, of a model without adapters a copy of all that is
    trained; frozen weights are shared with the policy.

    With top-k or top-p the policy draws from a set S of tokens. π_ref is then
    restricted to the same set,

    .. math:: \pi_\text{ref}^S(a) = \frac{\pi_\text{ref}(a)\,[a \in S]}
              {\sum_{b \in S} \pi_\text{ref}(b)},

    so that log π/π_ref is an estimate of a KL divergence between distributions on S:
    never negative in expectation, and 0 for equal policies. Under filters of its own
    π_ref would have another set, and the difference would be no divergence. S is the
    policy's at the moment π_ref is asked, and costs another pass of the policy.

    Parameters
    ----------
    language_model : LanguageModel
        The policy.
    reference : LanguageModel or "base", optional
        Another model with the policy's tokenizer; "base" is the policy with its
        adapters off, whatever they have learned.
    autocast : bool
        Compute in bfloat16.
    copy : bool
        False keeps no copy, for those who ask everything before the first update.

    Raises
    ------
    ValueError
        If the reference has another tokenizer, or shares weights that are trained.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        reference: LanguageModel | Literal["base"] | None,
        *,
        autocast: bool = False,
        copy: bool = True,
    ) -> None:
        given = reference if isinstance(reference, LanguageModel) else language_model
        theirs, ours = len(given.tokenizer), len(language_model.tokenizer)
        rule = f"reference must have the policy's tokenizer, of {ours} tokens"
        require(theirs == ours, rule, theirs)
        self._policy: Any = language_model.model
        self.model: Any = given.model
        own = self.model is self._policy
        trained = {p for p in self._policy.parameters() if p.requires_grad}
        rule = "reference must not share trained weights with the policy, or it moves"
        remedy = "leave it out, or load it again (add_lora changes what it is given)"
        apart = own or trained.isdisjoint(self.model.parameters())
        require(apart, rule, given.name, remedy)
        self._off = reference == "base" or (own and _adds_nothing(self.model))
        self._borrowed = own and not self._off and not copy
        if own and not self._off and copy:
            shared = {id(p): p for p in self.model.parameters() if p not in trained}
            self.model = deepcopy(self.model, shared).requires_grad_(False)
        self._autocast, self._kind = autocast, language_model.device.type

    def fingerprint(self) -> str:
        """Tell it from other references, by some numbers of each of its weights."""
        digest = hashlib.sha256()
        for p in self.model.parameters():
            if not (self._off and p.requires_grad):  # adapters, which are off
                digest.update(
                    p.detach().flatten()[:64].cpu().double().numpy().tobytes()
                )
        return digest.hexdigest()[:16]

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
        rows are computed at once. ``options`` are the ``temperature``, ``top_k`` and
        ``top_p`` of the policy.

        Raises
        ------
        RuntimeError
            If no copy was kept and the training has begun.
        """
        if self.model is None:
            lost = "this reference kept no copy of the policy, whose training has begun"
            raise RuntimeError(f"{lost}: ask it before, or make it with copy=True")
        filtered = bool(options.get("top_k")) or options.get("top_p", 1.0) < 1.0
        score = self._restricted if filtered else self._score
        asked = self._policy if filtered else self.model
        with gathered(asked), evaluating(self.model), evaluating(asked):
            parts = [sequences.select(rows) for rows in pieces] or [sequences]
            scored = [score(part, **options) for part in parts]
        return torch.cat([widen(one, sequences.completion_mask) for one in scored])

    def _score(self, sequences: Sequences, **options: Any) -> Tensor:
        with self._computing(reference=True):
            return completion_log_probs(self.model, sequences, **options).log_probs

    def _restricted(self, sequences: Sequences, **filters: Any) -> Tensor:
        temperature = filters.pop("temperature", 1.0)
        with self._computing(reference=False):
            policy = token_states(self._policy, sequences)
        with self._computing(reference=True):
            states = token_states(self.model, sequences)
        scores = torch.zeros_like(policy.tokens, dtype=torch.float32)
        for rows in policy.chunks():
            with self._computing(reference=False):
                dropped = policy.dropped(rows, temperature, **filters)
            with self._computing(reference=True):
                logits = states.logits(rows, temperature)
            log_p = logits.masked_fill(dropped, -torch.inf).log_softmax(-1)
            scores[rows] = log_p.gather(1, policy.tokens[rows, None])[:, 0].float()
        return policy.place(scores)

    @contextmanager
    def _computing(self, *, reference: bool) -> Iterator[None]:
        off = reference and self._off
        precision = torch.autocast(self._kind, torch.bfloat16, enabled=self._autocast)
        with self.model.disable_adapter() if off else nullcontext(), precision:
            yield


def _adds_nothing(model: nn.Module) -> bool:
    """Whether a model has adapters and is the same with them off: LoRA's B is 0, and
    nothing but LoRA's matrices is trained.
    """
    for name, parameter in model.named_parameters():
        zero = "lora_B." in name or "lora_embedding_A." in name
        free = "lora_A." in name or "lora_embedding_B." in name
        if parameter.any() if zero else parameter.requires_grad and not free:
            return False
    return is_adapted(model)
