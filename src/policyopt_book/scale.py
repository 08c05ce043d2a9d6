"""What a training on several processes sends and holds, from shapes alone."""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from policyopt._checks import require
from policyopt.lm.sharding import decoder_layers

__all__ = ["Share", "Traffic", "model_of_shape", "process_share", "update_traffic"]

Strategy = Literal["ddp", "fsdp2"]


class Share(NamedTuple):
    """What one process holds of the model, in bytes."""

    weights: int
    gradients: int
    optimizer: int
    """AdamW's two moments."""
    sampling: int
    """Weights of all processes that are here while it samples: all of them, or with
    ``synchronize`` those of the root and of two layers. (The root is what is in no
    layer: embeddings and head.)"""
    training: int
    """Weights of all processes that are here in the backward pass, of the root and of
    two layers, and the whole gradients of the root and of one layer, before they are
    scattered."""

    @property
    def total(self) -> int:
        """The larger of what sampling needs, which has no gradients, and the backward
        pass.
        """
        phases = self.sampling, self.gradients + self.training
        return self.weights + self.optimizer + max(phases)


class Traffic(NamedTuple):
    """What one process sends in an update, in bytes."""

    sampling: int
    forward: int
    backward: int
    """Weights that are gathered again."""
    gradients: int


def model_of_shape(config: PretrainedConfig, dtype: torch.dtype) -> nn.Module:
    """Return a model without memory: PyTorch's ``meta`` device knows shapes only."""
    with torch.device("meta"):
        auto: Any = AutoModelForCausalLM
        model: nn.Module = auto.from_config(config, dtype=dtype)
    return model


def process_share(
    model: nn.Module,
    *,
    processes: int,
    strategy: Strategy,
    samples: bool = True,
    synchronize: bool = False,
) -> Share:
    """Return what the first process, whose share is the largest, holds of a model that
    is trained in full.

    Activations, keys and values, and the buffers of the libraries come on top: see
    :func:`~policyopt_book.memory.estimate_memory`. A kept reference is one more copy of
    the weights in every process.

    Parameters
    ----------
    model : nn.Module
        On any device.
    processes : int
    strategy : {"ddp", "fsdp2"}
    samples : bool
        Whether the trainer samples.
    synchronize : bool
        Whether the sampler is ``TransformersSampler(model, synchronize=True)``.
    """
    require(processes >= 1, "processes must be >= 1", processes)
    everything = list(model.parameters())
    shares = processes if strategy == "fsdp2" else 1
    weights = _bytes(everything, shares)
    if strategy == "ddp":
        return Share(weights, weights, 2 * weights, 0, 0)
    layers = sorted(_bytes(layer.parameters()) for layer in decoder_layers(model))
    root = _bytes(everything) - sum(layers)
    passing = root + sum(layers[-2:])
    whole = passing if synchronize else root + sum(layers)
    training = passing + root + layers[-1]
    return Share(weights, weights, 2 * weights, whole if samples else 0, training)


def update_traffic(
    model: nn.Module,
    *,
    processes: int,
    strategy: Strategy,
    pieces: int = 1,
    passes: int = 1,
    new_tokens: int = 0,
    synchronize: bool = False,
    gloo: bool = False,
) -> Traffic:
    """Return what a process sends in an update of one optimiser step, all weights
    trained.

    A collective of N processes over S bytes costs each (N − 1)/N · S where it gathers
    or scatters, and twice that where it adds up (a ring).

    Parameters
    ----------
    model : nn.Module
    processes : int
    strategy : {"ddp", "fsdp2"}
    pieces : int
        Micro-batches.
    passes : int
        Passes through the layers for each piece: 2 where completions share a prompt
        (GRPO, PPO with several samples of a prompt, ranking, DPO), else 1.
    new_tokens : int
        The longest completion that is sampled; 0 for trainers that do not sample.
    synchronize : bool
        As for :func:`process_share`.
    gloo : bool
        Whether the backend is gloo, which scatters sums at the cost of adding up.
    """
    everything = list(model.parameters())
    if strategy == "ddp":
        return Traffic(
            0, 0, 0, int(2 * (processes - 1) / processes * _bytes(everything))
        )
    others = processes - 1
    whole = others * _bytes(everything, processes)
    sizes = [_bytes(x.parameters(), processes) for x in decoder_layers(model)]
    layers = others * sum(sizes)
    root = whole - layers
    # Between two backward passes PyTorch gathers one layer that is not needed yet.
    again = others * max(sizes)
    # One pass reads the prompt and gives the first token; the last token needs none.
    each = root + new_tokens * layers if synchronize else whole
    return Traffic(
        sampling=each if new_tokens else 0,
        forward=pieces * (root + passes * layers),
        backward=pieces * (passes * layers + (passes - 1) * again),
        gradients=pieces * whole * (2 if gloo else 1),
    )


def _bytes(parameters: Any, shares: int = 1) -> int:
    """Bytes of the largest share; FSDP2 cuts along the first dimension."""
    return sum(
        -(-len(p) // shares) * (p.numel() // max(len(p), 1)) * p.element_size()
        for p in parameters
    )
