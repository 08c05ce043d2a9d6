"""What the training loops share: optimiser, micro-batches, processes, record,
checkpoints. No learning happens here.
"""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import os
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, ClassVar, Generic, Self, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from policyopt.checkpoint import has_checkpoint, load_checkpoint, save_checkpoint
from policyopt.estimators import normalize
from policyopt.lm.config import LMConfig
from policyopt.lm.data import Prompt, batch_indices, encode_prompt
from policyopt.lm.heads import backbone_and_head
from policyopt.lm.log_probs import TokenLogProbs, completion_log_probs
from policyopt.lm.models import LanguageModel, RewardModel, is_adapted
from policyopt.lm.sampling import SamplingConfig, TransformersSampler
from policyopt.lm.sequences import Sequences, evaluating, widen
from policyopt.lm.sharding import (
    ShardedNetwork,
    gathered,
    shard_like,
    sharding_requested,
    whole,
)
from policyopt.runs import History, TrainingDivergedError, derive_seed

__all__ = [
    "Callback",
    "LMResult",
    "LMUpdate",
    "LoggedSample",
    "PolicyNetwork",
    "Reference",
    "Run",
]

Callback = Callable[[Any], bool | None]
"""Called with every row of the history; a true return value stops the training."""


@dataclass(frozen=True, kw_only=True)
class LMUpdate:
    """One row of the history: what every trainer reports after a step. Sums and means
    are over all processes.
    """

    step: int
    """Number of the step, from 1."""
    tokens: int
    """Completion tokens trained on so far."""
    learning_rate: float
    gradient_norm: float
    """Norm of the last gradient of the step, before it was limited."""
    seconds: float
    """Wall-clock time of the training so far."""

    headline: ClassVar[tuple[str, ...]] = ("loss",)
    """Fields that the progress bar shows."""
    may_be_nan: ClassVar[tuple[str, ...]] = ()
    """Fields that are NaN where they were not measured; any other NaN means that the
    training diverged.
    """


RowT = TypeVar("RowT", bound=LMUpdate)
ConfigT = TypeVar("ConfigT", bound=LMConfig)


@dataclass(frozen=True)
class LoggedSample:
    """A prompt and its greedy completion before and after the training."""

    prompt: Prompt
    before: str
    after: str


@dataclass
class LMResult(Generic[ConfigT, RowT]):
    """What a training run leaves behind."""

    algorithm: str
    seed: int
    config: ConfigT
    language_model: LanguageModel
    """The trained model: the object that was given, trained in place."""
    history: History[RowT]
    stop_reason: str
    """"budget", "callback", "interrupted", or what went wrong."""
    seconds: float
    """Wall-clock time of the training."""
    steps: int
    samples: list[LoggedSample] = field(default_factory=list)
    reward_model: RewardModel | None = None
    """What :func:`~policyopt.lm.reward_model.train_reward_model` trained."""
    critic: nn.Module | None = None
    """The value function of :func:`~policyopt.lm.ppo.train_ppo_lm`."""

    def cpu(self) -> None:
        """Move the networks to the CPU, in place."""
        self.language_model.to("cpu")
        if self.reward_model is not None:
            self.reward_model.network.cpu()
        if self.critic is not None:
            self.critic.cpu()

    def save(self, folder: str | Path) -> Path:
        """Write the model (or the reward model) for :func:`~policyopt.lm.models.load`,
        and the history beside it.

        Of several processes the first one writes, and the others return at once.
        """
        folder = Path(folder)
        several = (
            torch.distributed.is_available() and torch.distributed.is_initialized()
        )
        if several and torch.distributed.get_rank() != 0:
            return folder
        (self.language_model if self.reward_model is None else self.reward_model).save(
            folder
        )
        self.history.to_csv(folder / "history.csv")
        about = {
            "algorithm": self.algorithm,
            "seed": self.seed,
            "config": dataclasses.asdict(self.config),
            "stop_reason": self.stop_reason,
            "seconds": self.seconds,
            "steps": self.steps,
        }
        (folder / "training.json").write_text(json.dumps(about, indent=1))
        return folder


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
    otherwise a copy is kept. Make it before the training (and before a checkpoint is
    read): it remembers the weights of that moment. ``frozen=False`` makes no copy, for
    those who ask it everything before the first step.
    """

    def __init__(
        self,
        language_model: LanguageModel,
        reference: LanguageModel | None,
        config: LMConfig,
        *,
        frozen: bool = True,
    ) -> None:
        self._adapted = reference is None and is_adapted(language_model.model)
        if reference is not None:
            if len(reference.tokenizer) != len(language_model.tokenizer):
                raise ValueError(
                    "reference must have the policy's tokenizer, got "
                    f"{len(reference.tokenizer)} tokens for "
                    f"{len(language_model.tokenizer)}"
                )
            self.model = reference.model
        elif self._adapted or not frozen:
            self.model = language_model.model
        else:
            self.model = copy.deepcopy(language_model.model).requires_grad_(False)
        self._autocast = config.autocast is not None
        self._device = language_model.device

    @torch.no_grad()
    def log_probs(
        self,
        sequences: Sequences,
        pieces: Iterable[Tensor] | None = None,
        **options: Any,
    ) -> Tensor:
        """Return log π_ref(y_t | x, y_<t), ``[B, T]``; ``pieces`` are row numbers to be
        computed one after another.
        """
        adapters_off = self.model.disable_adapter() if self._adapted else nullcontext()
        precision = torch.autocast(
            self._device.type, torch.bfloat16, enabled=self._autocast
        )
        with gathered(self.model), evaluating(self.model), adapters_off, precision:
            parts = [sequences] if pieces is None else map(sequences.select, pieces)
            log_probs = [
                completion_log_probs(self.model, part, **options).log_probs
                for part in parts
            ]
        return torch.cat([widen(part, sequences.completion_mask) for part in log_probs])


class Run(Generic[ConfigT, RowT]):
    """The frame of a training loop.

    A trainer makes one and loops ``for step in run.steps()`` inside ``with run:``. In
    each step it takes its share of the batch, calls :meth:`backward` for every piece of
    :meth:`micro_batches`, then :meth:`descend`, and at the end
    :meth:`log`. The frame owns the optimiser, the other processes, the record, the checkpoints, and the ways in which
    a run can end early.

    All randomness is a function of (seed, step), so a checkpoint needs no generator
    states, and a resumed run repeats the uninterrupted one.
    """

    def __init__(
        self,
        algorithm: str,
        language_model: LanguageModel,
        network: nn.Module,
        config: ConfigT,
        *,
        row_type: type[RowT],
        items: int,
        seed: int,
        callback: Callback | None,
        progress: bool,
        checkpoint_dir: str | Path | None,
        prompts: Sequence[Prompt] = (),
        state: dict[str, float] | None = None,
    ) -> None:
        if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
            raise ValueError(f"seed must be an integer >= 0, got {seed!r}")
        self.algorithm, self.language_model, self.config, self.seed = (
            algorithm,
            language_model,
            config,
            seed,
        )
        self.callback, self.device = callback, language_model.device
        self.items, self.total = items, config.total_steps(items)
        self.state = dict(state or {})
        """Numbers of the trainer's own that a checkpoint must carry."""
        self.history: History[RowT] = History()
        self.stop_reason = "budget"
        self._row_type, self._progress = row_type, progress
        self._checkpoint_dir = None if checkpoint_dir is None else Path(checkpoint_dir)
        self._stopped = False
        self._bar: tqdm[Any] | None = None

        self.network: Any = network
        self._bare = network
        parameters = self.parameters()
        if not parameters:
            raise ValueError(
                "language_model has no trainable parameter: all have "
                "requires_grad=False"
            )
        if any(p.dtype in (torch.bfloat16, torch.float16) for p in parameters):
            warnings.warn(
                "the trained weights are in 16 bits, where an update smaller than "
                "1/256 of a weight is lost; load the model with dtype='float32' and "
                "set autocast='bfloat16', or train adapters with lora=LoRA()",
                stacklevel=3,
            )
        self.optimizer = self._new_optimizer()
        self._sampled = list(prompts[: config.logged_samples])
        self._before = self._complete()
        if config.gradient_checkpointing:
            _recompute(language_model.model, True)
        self._seconds = 0.0
        self._accelerator: Any = None
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import Accelerator

            sharding = sharding_requested()
            # FSDP is set up below: to accelerate these are plain processes.
            with _environment(ACCELERATE_USE_FSDP="false" if sharding else None):
                self._accelerator = Accelerator(cpu=self.device.type == "cpu")
            kind = str(self._accelerator.distributed_type.value)
            if kind not in ("NO", "MULTI_CPU", "MULTI_GPU"):
                raise ValueError(
                    f"the processes were launched for {kind}; these trainers share the "
                    "work by data parallelism (DDP) or FSDP2: launch them with "
                    "torchrun, or with accelerate and no other plugin"
                )
            if config.batch_size % self.world:
                raise ValueError(
                    f"batch_size must be a multiple of the {self.world} processes, got "
                    f"{config.batch_size}"
                )
        self._slots: dict[
            int, dict[str, Tensor]
        ] = {}  # the optimiser's, from a checkpoint
        if self._checkpoint_dir is not None and has_checkpoint(self._checkpoint_dir):
            self._resume(self._checkpoint_dir)
        self._sharded: ShardedNetwork | None = None
        if self._accelerator is not None and sharding:
            self._shard()
        if self._slots:
            self.optimizer.load_state_dict(
                {**self.optimizer.state_dict(), "state": self._slots}
            )
            self._slots = {}
        if self._accelerator is not None and self._sharded is None:
            self.network, self.optimizer = self._accelerator.prepare(
                network, self.optimizer
            )
            self.device = self._accelerator.device
        self._started = time.perf_counter()

    # --- the loop's interface ---
    # ---------------------------------------------------------------------------------

    def parameters(self) -> list[nn.Parameter]:
        """Return the parameters that are trained."""
        return [p for p in self._bare.parameters() if p.requires_grad]

    @property
    def step(self) -> int:
        """Steps finished so far."""
        return len(self.history)

    def steps(self) -> Iterator[int]:
        """Yield the number of each step to make, from 0 (or where the checkpoint left
        off).
        """
        while not self._stopped and self.step < self.total:
            for group in self.optimizer.param_groups:
                group["lr"] = self.config.learning_rate_at(self.step, self.total)
            # Dropout, if the model has any, draws from the global stream.
            torch.manual_seed(derive_seed(self.seed, self.step, self.rank))
            self.network.train()
            yield self.step

    def batch(self) -> list[int]:
        """Return the items of the data that this process works on in this step."""
        indices = batch_indices(
            self.items, self.config.batch_size, self.step, self.seed
        )
        share = len(indices) // self.world
        return indices[self.rank * share : (self.rank + 1) * share]

    def stream(self) -> int:
        """Return the seed for this step's draws, the same in all processes."""
        return derive_seed(self.seed, self.step, 1 << 20, 0)

    def micro_batches(
        self, size: int, groups: Sequence[int] | int = 1
    ) -> Iterator[Tensor]:
        """Yield row numbers that cut ``size`` completions into pieces of at most
        ``micro_batch_size``.

        Neighbours that form a group (a pair, a list) stay together, however many they
        are; ``groups`` are the sizes of the groups, or the one size that all have. With
        several processes, gradients travel with the last piece only.
        """
        if size == 0:
            return
        sizes = [groups] * (size // groups) if isinstance(groups, int) else groups
        most = self.config.micro_batch_size or size
        cuts = [0]
        for group in sizes:
            if cuts[-1] and cuts[-1] + group > most:
                cuts.append(0)
            cuts[-1] += group
        if self._sharded is not None and self.sum(len(cuts)) != len(cuts) * self.world:
            raise ValueError(
                "with FSDP all processes must cut their share into the same number of "
                "pieces, and here the sizes of the groups differ; set micro_batch_size "
                "to None, or launch without FSDP"
            )
        pieces = torch.arange(size, device=self.device).split(cuts)
        for piece in pieces[:-1]:
            with self._local():
                yield piece
        yield pieces[-1]

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a piece's loss, whose denominators are those of the whole
        batch of all processes.
        """
        # Data parallelism averages over the processes what must be summed here.
        loss = loss * self.world
        if self._accelerator is None or self._sharded is not None:
            loss.backward()
        else:
            self._accelerator.backward(loss)

    def descend(self) -> float:
        """Make an optimiser step with the gradient collected so far; return its norm
        before it was limited.
        """
        limit = self.config.max_gradient_norm or math.inf
        if self._accelerator is None:
            norm = float(nn.utils.clip_grad_norm_(self.parameters(), limit))
        elif self._sharded is not None:
            shares = [
                p for group in self.optimizer.param_groups for p in group["params"]
            ]
            norm = float(whole(nn.utils.clip_grad_norm_(shares, limit)))
        else:
            norm = float(
                self._accelerator.clip_grad_norm_(self.network.parameters(), limit)
            )
        if not math.isfinite(norm):
            raise FloatingPointError("gradient is not finite")
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def sum(self, value: Tensor | float) -> Tensor:
        """Add up a number (or tensor of numbers) over all processes; no gradient."""
        total = torch.as_tensor(
            value, dtype=torch.float64 if self.device.type != "mps" else torch.float32
        )
        total = total.detach().to(self.device)
        return (
            total
            if self._accelerator is None
            else self._accelerator.reduce(total, "sum")
        )

    def max(self, value: Tensor) -> float:
        """Return the largest of a number over all processes."""
        return float(
            value
            if self._accelerator is None
            else self._accelerator.gather(value.detach()).max()
        )

    def variance(self, x: Tensor, mask: Tensor) -> Tensor:
        """Return the variance (denominator n) over the masked entries of all processes;
        NaN if it is 0.
        """
        kept = x[mask].double() if x.device.type != "mps" else x[mask]
        count, total = self.sum(mask.sum()), self.sum(kept.sum())
        variance = self.sum((kept - total / count).square().sum()) / count
        return torch.where(variance > 0, variance, torch.nan)

    def normalize(self, x: Tensor, mask: Tensor) -> Tensor:
        """Shift and scale to mean 0 and standard deviation 1 over the masked entries of
        all processes.
        """
        if self._accelerator is None:
            return normalize(x, mask)
        mean = self.sum(x[mask].sum()) / self.sum(mask.sum())
        deviation = torch.nan_to_num(self.variance(x, mask)).sqrt() + 1e-8
        return torch.where(mask, (x - mean.to(x.dtype)) / deviation.to(x.dtype), 0.0)

    def log(self, *, tokens: int, **fields: Any) -> None:
        """Record a step: complete the row, write a checkpoint when one is due, ask the
        callback.

        ``tokens`` are those of this step.
        """
        values: dict[str, Any] = fields
        row = self._row_type(
            step=self.step + 1,
            tokens=tokens + (self.history[-1].tokens if self.history else 0),
            learning_rate=self.optimizer.param_groups[0]["lr"],
            seconds=self._seconds + time.perf_counter() - self._started,
            **values,
        )
        bad = [
            f.name
            for f in dataclasses.fields(row)
            if self._diverged(f.name, getattr(row, f.name))
        ]
        if bad:
            raise FloatingPointError(f"{', '.join(bad)} not finite")
        self.history.append(row)
        if self._bar is not None:
            self._bar.update()
            shown = {
                k: fields[k]
                for k in self._row_type.headline
                if not math.isnan(fields[k])
            }
            self._bar.set_postfix(
                {k: f"{v:.3g}" for k, v in shown.items()}, refresh=False
            )
        due = self.step % self.config.checkpoint_every == 0 or self.step == self.total
        if self._checkpoint_dir is not None and due:
            self._save(self._checkpoint_dir)
        if self.callback is not None and self.callback(row):
            self.stop_reason, self._stopped = "callback", True

    def result(self) -> LMResult[ConfigT, RowT]:
        """Return what was learned so far."""
        after = self._complete()
        return LMResult(
            algorithm=self.algorithm,
            seed=self.seed,
            config=self.config,
            language_model=self.language_model,
            history=self.history,
            stop_reason=self.stop_reason,
            seconds=self._seconds + time.perf_counter() - self._started,
            steps=self.step,
            samples=[
                LoggedSample(*texts)
                for texts in zip(self._sampled, self._before, after, strict=True)
            ],
        )

    # --- several processes ---
    # ------------------------

    def _new_optimizer(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(
            self.parameters(),
            lr=self.config.learning_rate,
            betas=(self.config.adam_betas[0], self.config.adam_betas[1]),
            weight_decay=self.config.weight_decay,
            fused=self.device.type != "mps",
        )

    def _shard(self) -> None:
        """Spread the network over the processes, and what the optimiser remembers with
        it.
        """
        backbone_and_head(
            self.language_model.model
        )  # looks at the model on its first call: while it is whole
        self.network = self._sharded = ShardedNetwork(
            self._bare, self.language_model.model, self.device
        )
        self.optimizer = self._new_optimizer()
        parameters = self.parameters()
        self._slots = {
            i: shard_like(slot, parameters[i]) for i, slot in self._slots.items()
        }

    def _restore(self) -> None:
        """Make the network a plain one again, whole and on the CPU."""
        if self._sharded is not None:
            network: Any = self._sharded.restore()
            self.language_model.model = network.model
            self.network, self._sharded = self._bare, None
            self.device = torch.device("cpu")

    @property
    def world(self) -> int:
        """Number of processes."""
        return 1 if self._accelerator is None else int(self._accelerator.num_processes)

    @property
    def rank(self) -> int:
        """Number of this process, from 0."""
        return 0 if self._accelerator is None else int(self._accelerator.process_index)

    def _local(self) -> AbstractContextManager[Any]:
        # Sharded gradients are added up share by share: a whole one would need the
        # memory that sharding saves.
        alone = self._accelerator is None or self._sharded is not None
        return nullcontext() if alone else self._accelerator.no_sync(self.network)

    # --- how it ends ---
    # ------------------------

    def __enter__(self) -> Self:
        self._random_state = torch.get_rng_state()
        if self.config.autocast is not None:
            # The forward pass alone: a backward pass takes its types from it.
            self._bare.forward = torch.autocast(self.device.type, torch.bfloat16)(
                self._bare.forward
            )
        if self._progress and self.rank == 0:
            self._bar = tqdm(
                total=self.total,
                initial=self.step,
                desc=f"{self.algorithm} {self.language_model.name} seed {self.seed}",
                unit="step",
            )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> bool:
        if self._bar is not None:
            self._bar.close()
        self._bare.__dict__.pop("forward", None)
        if error is None:
            self._restore()
        self._bare.eval()
        if self.config.gradient_checkpointing:
            _recompute(self.language_model.model, False)
        torch.set_rng_state(self._random_state)
        if error is None:
            return False
        self.optimizer.zero_grad(set_to_none=True)
        saved = (
            f"; the last checkpoint is in {self._checkpoint_dir}"
            if self._checkpoint_dir
            else ""
        )
        if self._sharded is not None:
            # To gather the weights all processes would have to be here, and who knows
            # where the others are.
            error.add_note(
                "The weights are spread over the processes, so this one has no "
                f"result{saved}"
            )
            return False
        if isinstance(error, KeyboardInterrupt):
            self.stop_reason = "interrupted"
            warnings.warn(
                f"{self.algorithm} interrupted after {self.step} of {self.total} "
                f"steps; returning what was learned so far{saved}",
                stacklevel=3,
            )
            return True
        self.stop_reason = f"{type(error).__name__}: {error}"
        if isinstance(error, FloatingPointError):
            raise TrainingDivergedError(
                f"{error} in step {self.step + 1} (seed {self.seed}). The exception's "
                f".result holds the model of before that gradient{saved}. Try a lower "
                "learning rate or max_gradient_norm.",
                self.result(),
            ) from error
        # Whatever else broke (usually a reward function), what was learned must not be
        # lost with it.
        error.__dict__["result"] = self.result()
        error.add_note(
            f"The model trained so far is in this exception's .result{saved}"
        )
        return False

    def _diverged(self, name: str, value: Any) -> bool:
        # Undefined where nothing varies or nothing was measured: no sign of divergence.
        return (
            name not in self._row_type.may_be_nan
            and isinstance(value, float)
            and not math.isfinite(value)
        )

    def _complete(self) -> list[str]:
        if not self._sampled:
            return []
        model = self.language_model
        sampler = TransformersSampler(model)
        prompts = [encode_prompt(model.tokenizer, prompt) for prompt in self._sampled]
        sampling: SamplingConfig = getattr(self.config, "sampling", SamplingConfig())
        room = (model.context_length or math.inf) - max(len(ids) for ids in prompts)
        greedy = SamplingConfig(
            temperature=0.0, max_new_tokens=int(min(sampling.max_new_tokens, room))
        )
        sequences = sampler.sample(prompts, 1, greedy, seed=0).sequences
        return [
            model.decode(ids[:length].tolist())
            for ids, length in zip(
                sequences.completion_ids, sequences.lengths.tolist(), strict=True
            )
        ]

    # --- checkpoints ---
    # ------------------------

    def _identity(self) -> dict[str, Any]:
        free = (
            "steps",
            "epochs",
            "checkpoint_every",
            "micro_batch_size",
            "logged_samples",
        )
        config = {
            k: v for k, v in dataclasses.asdict(self.config).items() if k not in free
        }
        # Through JSON: what is read back must compare equal to what is there.
        identity = {
            "algorithm": self.algorithm,
            "seed": self.seed,
            "items": self.items,
            "config": config,
        }
        return json.loads(json.dumps(identity))  # type: ignore[no-any-return]

    def _save(self, folder: Path) -> None:
        if self._sharded is not None:
            self._sharded.reshard()
        named = {
            name: p for name, p in self._bare.named_parameters() if p.requires_grad
        }
        tensors: dict[str, Tensor] = {
            f"network.{name}": p.detach() for name, p in named.items()
        }
        for index, slot in self.optimizer.state_dict()["state"].items():
            tensors |= {
                f"optimizer.{index}.{key}": torch.as_tensor(value)
                for key, value in slot.items()
            }
        if self._sharded is not None:
            tensors = {key: whole(value).cpu() for key, value in tensors.items()}
        if self.rank == 0:
            rows = [
                {
                    k: None if isinstance(v, float) and math.isnan(v) else v
                    for k, v in dataclasses.asdict(row).items()
                }
                for row in self.history
            ]
            metadata = {
                "format": 1,
                "identity": self._identity(),
                "state": self.state,
                "history": rows,
            }
            save_checkpoint(folder, tensors, metadata)
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()

    def _resume(self, folder: Path) -> None:
        tensors, metadata = load_checkpoint(folder)
        theirs, ours = metadata["identity"], self._identity()
        for name in ("algorithm", "seed", "items"):
            if theirs[name] != ours[name]:
                raise ValueError(
                    f"checkpoint_dir {folder} holds a run with {name} "
                    f"{theirs[name]!r}, this one has {ours[name]!r}; give another "
                    "folder to start afresh"
                )
        for name, value in ours["config"].items():
            if theirs["config"].get(name) != value:
                raise ValueError(
                    f"checkpoint_dir {folder} holds a run with "
                    f"{name}={theirs['config'].get(name)!r}, the config says "
                    f"{value!r}; give another folder to start afresh"
                )
        named = {
            name: p for name, p in self._bare.named_parameters() if p.requires_grad
        }
        missing = sorted(
            set(named)
            ^ {k.removeprefix("network.") for k in tensors if k.startswith("network.")}
        )
        if missing:
            raise ValueError(
                f"checkpoint_dir {folder} was written for another model: they differ "
                f"in {missing[:3]}"
            )
        with torch.no_grad():
            for name, parameter in named.items():
                parameter.copy_(tensors[f"network.{name}"])
        slots: dict[int, dict[str, Tensor]] = {}
        for key, value in tensors.items():
            part, _, rest = key.partition(".")
            if part == "optimizer":
                index, _, name = rest.partition(".")
                slots.setdefault(int(index), {})[name] = value
        self._slots = slots
        for row in metadata["history"]:
            values: dict[str, Any] = {
                k: math.nan if v is None else v for k, v in row.items()
            }
            self.history.append(self._row_type(**values))
        self.state = metadata["state"]
        self._seconds = float(self.history[-1].seconds)


@contextmanager
def _environment(**values: str | None) -> Iterator[None]:
    """Set environment variables for a moment; those that are None stay."""
    before = {
        name: os.environ.get(name)
        for name, value in values.items()
        if value is not None
    }
    os.environ.update(
        {name: value for name, value in values.items() if value is not None}
    )
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _recompute(model: Any, on: bool) -> None:
    """Switch gradient checkpointing, under its name in transformers 5 or the older
    one.
    """
    switch = "enable" if on else "disable"
    new = getattr(model, f"activation_checkpointing_{switch}", None)
    (new or getattr(model, f"gradient_checkpointing_{switch}"))()
