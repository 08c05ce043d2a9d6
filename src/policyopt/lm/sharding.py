"""Weights, gradients and optimiser states spread over processes, by PyTorch's
``fully_shard`` (FSDP2).

Each decoder layer is one group of parameters, gathered when it runs; what is left
(embeddings, norms, heads) is the group of the root, gathered once per forward pass.
PyTorch does all of that. Here stands what a trainer needs around it: weights gathered
for sampling, whole tensors for checkpoints, and a plain model again when the training
is over.

Accelerate's own FSDP2 (1.15) would replace only the few lines that call
``fully_shard``, and on CPUs, where the tests run, it falls back to data parallelism.

Left out: offloading to the CPU, mixed precision other than ``autocast``, and tensor or
context parallelism.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from policyopt._checks import require

__all__ = ["ShardedNetwork", "gathered", "sharding_requested", "whole"]

_ON = ("1", "true", "yes", "on")

# From every module that is used on its own (the network, the language model in it) to
# the network it is sharded with.
_sharded: WeakKeyDictionary[nn.Module, ref[ShardedNetwork]] = WeakKeyDictionary()


def sharding_requested() -> bool:
    """Whether the processes were launched for FSDP2: ``accelerate launch --use_fsdp
    --fsdp_version 2``.

    With ``torchrun`` the environment variables ``ACCELERATE_USE_FSDP=true`` and
    ``FSDP_VERSION=2`` say the same.

    Raises
    ------
    ValueError
        If they were launched for what is not supported: mixed precision other than
        ``autocast``, FSDP of the first version, or offloading.
    """
    environment = os.environ
    precision = environment.get("ACCELERATE_MIXED_PRECISION", "no").lower()
    rule = "the processes must be launched with --mixed_precision no"
    remedy = "set autocast='bfloat16' in the trainer's config"
    require(precision == "no", rule, precision, remedy)
    if environment.get("ACCELERATE_USE_FSDP", "").lower() not in _ON:
        return False
    version = environment.get("FSDP_VERSION", "1")
    if version != "2":
        raise ValueError(
            f"the processes were launched for FSDP of version {version}; only version "
            "2 is supported: launch with --fsdp_version 2 (FSDP_VERSION=2), or with DDP"
        )
    offload = environment.get("FSDP_OFFLOAD_PARAMS", "").lower()
    rule = "FSDP must be launched with --fsdp_offload_params false"
    require(offload not in _ON, rule, offload)
    # Each process loads the weights itself. With this on, transformers would leave them
    # empty in all but one.
    environment["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return True


class ShardedNetwork(nn.Module):
    """A network whose parameters are spread over all processes of
    ``torch.distributed``.

    Parameters
    ----------
    network : nn.Module
        Sharded in place. Its forward pass is a joint one of all processes;
        :func:`gathered` makes others possible.
    model : nn.Module
        The language model in it, which is also used on its own.
    """

    def __init__(
        self, network: nn.Module, model: nn.Module, device: torch.device
    ) -> None:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

        super().__init__()
        _check_equal(network)
        # The network without its weights, to put them back into; in a list, so that it
        # is not one of the parts.
        empty = _copied(network, lambda _, p: torch.empty_like(p, device="meta"))
        self._skeleton = [empty]
        self.network = network
        mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
        for layer in decoder_layers(network):
            fully_shard(layer, mesh=mesh)
        fully_shard(self, mesh=mesh)
        # The first forward pass decides what the root is: it must be one through all of
        # it.
        register_fsdp_forward_method(self, "_begin")
        self._begin()
        self.reshard()
        _sharded[network] = _sharded[model] = ref(self)

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """As the network's."""
        # FSDP hooks into the tensors that come out, which views would not survive.
        return tree_map_only(Tensor, torch.clone, self.network(*args, **kwargs))

    def _begin(self) -> None:
        pass

    def parts(self) -> list[Any]:
        """All groups of parameters, the root's first."""
        from torch.distributed.fsdp import FSDPModule

        return [module for module in self.modules() if isinstance(module, FSDPModule)]

    def reshard(self) -> None:
        """Let every process keep its share alone, as between two steps."""
        for part in self.parts():
            part.reshard()

    def restore(self) -> nn.Module:
        """Return the network with whole weights, on the CPU, in every process; this one
        is used up.

        The given network gets the plain parts back, so whoever holds it has them too.
        """
        self.reshard()
        weights = dict(self.network.named_parameters())
        plain = _copied(
            self._skeleton[0], lambda name, _: whole(weights[name].detach()).cpu()
        ).cpu()
        for name, child in plain.named_children():
            setattr(self.network, name, child)
        return self.network


def _copied(network: nn.Module, weight: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """Copy a network with other weights; what was tied stays tied."""
    weights: dict[int, Any] = {
        id(p): nn.Parameter(weight(name, p), requires_grad=p.requires_grad)
        for name, p in network.named_parameters()
    }
    return copy.deepcopy(network, weights)


def decoder_layers(network: nn.Module) -> list[nn.Module]:
    """Return the decoder layers: what transformers says must not be split."""
    names: set[str] = set()
    for module in network.modules():
        names.update(getattr(module, "_no_split_modules", None) or ())
    return [module for module in network.modules() if type(module).__name__ in names]


def _check_equal(network: nn.Module) -> None:
    """Compare a fingerprint of the weights: each process contributes its share of its
    own copy.
    """
    own = sum(p.detach().float().sum().double() for p in network.parameters())
    others = [0.0] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(others, float(own))
    if set(others) != {others[0]}:
        raise ValueError(
            "the processes hold different weights: load the same model, with the same "
            "seed, in each of them"
        )


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that may be sharded; all processes must ask
    together.
    """
    from torch.distributed.tensor import DTensor

    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(value: Tensor, parameter: Any) -> Tensor:
    """Shard a tensor of the parameter's shape (an optimiser's moment) as the parameter
    is; another one stays whole.
    """
    from torch.distributed.tensor import distribute_tensor

    if value.shape != parameter.shape:
        return value
    mesh, placements = parameter.device_mesh, parameter.placements
    return distribute_tensor(value.to(parameter.device), mesh, placements)


@contextmanager
def gathered(module: nn.Module, *, layers: bool = True) -> Iterator[None]:
    """Make the weights of a sharded network whole for passes without gradient; nothing
    happens to another one.

    Within the block each process has all weights in memory and goes its own way. All
    must enter and leave it.

    Parameters
    ----------
    module : nn.Module
        The network that was sharded, or the language model in it.
    layers : bool
        False gathers all but the decoder layers. Each of these is then gathered for
        every pass through it, which needs less memory, and all processes must make the
        same passes.
    """
    root = _sharded.get(module, lambda: None)()
    if root is None:
        yield
        return
    parts: list[Any] = root.parts() if layers else [root]
    for part in parts:
        if layers:
            part.set_reshard_after_forward(False, recurse=False)
        part.unshard()
    try:
        yield
    finally:
        for part in parts:
            part.reshard()
            # The root's parameters are needed by the backward pass at once.
            part.set_reshard_after_forward(part is not root, recurse=False)
