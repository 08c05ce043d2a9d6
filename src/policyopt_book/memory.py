"""What a training step needs in memory, estimated from shapes before anything is
run.
"""

from __future__ import annotations

from typing import NamedTuple

from policyopt.lm.config import LMConfig
from policyopt.lm.dpo import DPOConfig
from policyopt.lm.models import LanguageModel
from policyopt.lm.reward_model import RewardConfig
from policyopt.lm.sampling import SamplingConfig

__all__ = ["Memory", "estimate_memory"]


class Memory(NamedTuple):
    """What a training step needs, in bytes. The first four are exact; the last two are
    upper estimates.
    """

    weights: int
    gradients: int
    optimizer: int
    """AdamW's two moments."""
    reference: int
    """A frozen copy; 0 with adapters, or where there is no KL term."""
    cache: int
    """Keys and values of all completions of a step, at their longest."""
    activations: int
    """Of one micro-batch in the backward pass."""

    @property
    def total(self) -> int:
        """Sampling and training take turns, so only the larger of their needs
        counts.
        """
        return sum(self[:4]) + max(self.cache, self.activations)


def estimate_memory(
    language_model: LanguageModel,
    config: LMConfig,
    *,
    prompt_tokens: int = 200,
    completion_tokens: int | None = None,
) -> Memory:
    """Estimate the memory of a training, :func:`~policyopt.lm.grpo.train_grpo` or
    another, from shapes.

    The libraries' own buffers (about 1 GB on a GPU) and fragmentation come on top.

    Parameters
    ----------
    language_model : LanguageModel
    config : LMConfig
        Of any trainer but :func:`~policyopt.lm.ppo.train_ppo`, whose critic is not
        counted.
    prompt_tokens : int
        Length of the longest prompt.
    completion_tokens : int, optional
        Length of the longest completion; by default the ``max_new_tokens`` of the
        sampling.

    Raises
    ------
    ValueError
        If ``completion_tokens`` is not given and the config has no sampling to say it.
    """
    sampling: SamplingConfig | None = getattr(config, "sampling", None)
    if completion_tokens is None:
        if sampling is None:
            raise ValueError(
                "completion_tokens must be given for a trainer that samples nothing"
            )
        completion_tokens = sampling.max_new_tokens
    parameters = list(language_model.model.parameters())
    trained = [p for p in parameters if p.requires_grad]
    weights = sum(p.numel() * p.element_size() for p in parameters)
    gradients = sum(p.numel() * p.element_size() for p in trained)
    adapted = len(trained) < len(parameters)
    shape = language_model.model.config.get_text_config()
    width = (
        getattr(shape, "head_dim", None)
        or shape.hidden_size // shape.num_attention_heads
    )
    kv_heads = getattr(shape, "num_key_value_heads", None) or shape.num_attention_heads
    pairs = isinstance(config, (DPOConfig, RewardConfig))
    completions = config.batch_size * (2 if pairs else getattr(config, "group_size", 1))
    length = prompt_tokens + completion_tokens
    cache = (
        completions
        * length
        * shape.num_hidden_layers
        * 2
        * kv_heads
        * width
        * parameters[0].element_size()
        if sampling is not None
        else 0
    )
    # Per token and layer: its input if the layer is recomputed, else that and about
    # what the layer makes of it: the attention's and the feed-forward's inner states.
    tokens = min(config.micro_batch_size or completions, completions) * length
    inner = 8 * shape.hidden_size + 4 * getattr(
        shape, "intermediate_size", 4 * shape.hidden_size
    )
    kept = shape.num_hidden_layers * (
        shape.hidden_size
        if config.gradient_checkpointing
        else shape.hidden_size + inner
    )
    size = 2 if config.autocast else parameters[0].element_size()
    activations = tokens * (kept + inner) * size
    return Memory(
        weights=weights,
        gradients=gradients,
        optimizer=2 * gradients,
        # DPO asks its reference before the training, and keeps numbers alone.
        reference=0
        if adapted or pairs or getattr(config, "beta", 0.0) == 0
        else weights,
        cache=cache,
        activations=activations,
    )
