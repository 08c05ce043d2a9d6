"""The processes that share a run: one alone, or those that ``torchrun`` or
``accelerate launch`` started.

Data parallelism (DDP) is accelerate's; FSDP2 is in :mod:`policyopt.lm.sharding`. The
result is that of one process, to rounding.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from policyopt._checks import require
from policyopt.estimators import normalize
from policyopt.lm.cache import check_cache
from policyopt.lm.heads import causal_models
from policyopt.lm.models import LanguageModel
from policyopt.lm.sharding import ShardedNetwork, shard_like, sharding_requested, whole

__all__ = ["Processes"]


class Processes:
    """The processes of a run, whoever launched them.

    Parameters
    ----------
    device : torch.device
        Where the model is.
    batch_size : int
        Must be a multiple of the number of processes.
    minibatches : int
        The parts that a batch is cut into. For FSDP2 ``batch_size`` must be a multiple
        of processes times minibatches.
    """

    def __init__(
        self, device: torch.device, batch_size: int, minibatches: int = 1
    ) -> None:
        self.device = device
        # Number of processes, and of this one, from 0.
        self.count, self.rank = 1, 0
        self._accelerator: Any = None
        self._wants_sharding = False
        # The network, if its weights are spread or (parallel) each process has all.
        self._sharded: ShardedNetwork | None = None
        self._parallel: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            return
        from accelerate import Accelerator
        from accelerate.utils import patch_environment

        self._wants_sharding = sharding_requested()
        # FSDP is set up here: to accelerate these are plain processes.
        plain = {"ACCELERATE_USE_FSDP": "false"} if self._wants_sharding else {}
        with patch_environment(**plain):
            made = self._accelerator = Accelerator(cpu=device.type == "cpu")
        self.count, self.rank = made.num_processes, made.process_index
        kind = str(made.distributed_type.value)
        known = kind in ("NO", "MULTI_CPU", "MULTI_GPU")
        remedy = "launch them with torchrun, or with accelerate and no other plugin"
        require(known, "the processes must be those of DDP or FSDP2", kind, remedy)
        rule = f"batch_size must be a multiple of the {self.count} processes"
        require(batch_size % self.count == 0, rule, batch_size)
        if self._wants_sharding and batch_size % (self.count * minibatches):
            raise ValueError(
                "with FSDP all processes must have as many prompts in every minibatch: "
                f"batch_size must be a multiple of {self.count} processes times "
                f"{minibatches} minibatches, got {batch_size}; or launch without FSDP"
            )

    @property
    def sharded(self) -> bool:
        """Whether the weights are spread over the processes."""
        return self._sharded is not None

    # --- numbers ---

    def sum(self, value: Tensor | float) -> Tensor:
        """Add up a number (or tensor of numbers) over all processes; no gradient."""
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.as_tensor(value, dtype=dtype).detach().to(self.device)
        if self._accelerator is None:
            return total
        return self._accelerator.reduce(total, "sum")  # type: ignore[no-any-return]

    def max(self, value: Tensor) -> float:
        """Return the largest of a number over all processes."""
        if self._accelerator is not None:
            value = self._accelerator.gather(value.detach().to(self.device))
        return float(value.max())

    def variance(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return the variance (denominator n) over the masked entries of all processes.

        NaN if it is 0, or so far below the mean that it is of roundings.
        """
        kept = _kept(x, mask)
        count, total = self.sum(mask.sum()), self.sum(kept.sum())
        variance = self.sum((kept - total / count).square().sum()) / count
        varies = variance > 1e-12 * (total / count).square()
        return torch.where(varies, variance, torch.nan)

    def normalize(self, x: Tensor, mask: Tensor) -> Tensor:
        """Shift and scale to mean 0 and standard deviation 1 over the masked entries of
        all processes.
        """
        if self._accelerator is None:
            return normalize(x, mask)
        count = self.sum(mask.sum())
        mean = self.sum(_kept(x, mask).sum()) / count
        x = torch.where(mask, x - mean.to(x.dtype), 0.0)
        deviation = (self.sum(_kept(x, mask).square().sum()) / count).sqrt() + 1e-8
        return x / deviation.to(x.dtype)

    def check_pieces(self, count: int) -> None:
        """Refuse, where weights are sharded, pieces that others do not have."""
        if self._sharded is not None and self.sum(count) != count * self.count:
            raise ValueError(
                "with FSDP all processes must cut their share into the same number of "
                "pieces, and here the sizes of the groups differ; set micro_batch_size "
                "to None, or launch without FSDP"
            )

    # --- networks and gradients ---

    def share(
        self,
        network: nn.Module,
        language_model: LanguageModel,
        new_optimizer: Callable[[], torch.optim.Optimizer],
        slots: dict[int, dict[str, Tensor]],
    ) -> tuple[Any, torch.optim.Optimizer]:
        """Return the network and its optimiser as all processes train them together.

        ``slots`` is what the optimiser remembers from a checkpoint.
        """
        if self._wants_sharding:
            for part in causal_models(network):  # while they are whole
                check_cache(part)
            self._sharded = ShardedNetwork(network, language_model.model, self.device)
            parameters = [p for p in network.parameters() if p.requires_grad]
            slots = {
                i: {name: shard_like(t, parameters[i]) for name, t in slot.items()}
                for i, slot in slots.items()
            }
        optimizer = new_optimizer()
        if slots:
            optimizer.load_state_dict({**optimizer.state_dict(), "state": slots})
        if self._accelerator is not None and self._sharded is None:
            self._parallel, optimizer = self._accelerator.prepare(network, optimizer)
            self.device = self._accelerator.device
        return self._parallel or self._sharded or network, optimizer

    def release(self, language_model: LanguageModel) -> None:
        """Make a sharded network a plain one again, whole and on the CPU."""
        if self._sharded is not None:
            network: Any = self._sharded.restore()
            language_model.model = network.model
            self._sharded, self.device = None, torch.device("cpu")

    def local(self) -> AbstractContextManager[Any]:
        """Keep the gradients of the block's backward pass to this process for now."""
        # Sharded gradients are added up share by share: a whole one would need the
        # memory that sharding saves.
        if self._parallel is None:
            return nullcontext()
        return self._accelerator.no_sync(self._parallel)  # type: ignore[no-any-return]

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a piece's loss to that of all processes."""
        # Data parallelism averages over the processes what must be summed here.
        loss = loss * self.count
        if self._parallel is None:
            loss.backward()
        else:
            self._accelerator.backward(loss)

    def clip(self, optimizer: torch.optim.Optimizer, limit: float | None) -> float:
        """Limit the norm of the gradient; return what it was."""
        trained = [p for group in optimizer.param_groups for p in group["params"]]
        most = limit or math.inf
        if self._parallel is None:
            return float(whole(nn.utils.clip_grad_norm_(trained, most)))
        return float(self._accelerator.clip_grad_norm_(trained, most))

    # --- checkpoints ---

    def prepare_checkpoint(self) -> None:
        """Let every process hold its share alone, before its tensors are read."""
        if self._sharded is not None:
            self._sharded.reshard()

    def whole(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return whole tensors; all processes must ask together."""
        if self._sharded is None:
            return dict(tensors)
        return {key: whole(value).cpu() for key, value in tensors.items()}

    def wait(self) -> None:
        """Wait for the others."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()


def _kept(x: Tensor, mask: Tensor) -> Tensor:
    # In float64 the mean of equal numbers is exact, and they differ from it by 0.
    return x[mask] if x.device.type == "mps" else x[mask].double()
