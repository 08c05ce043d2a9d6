"""What the training loops of this half share: optimiser, micro-batches, sampling. No
learning happens here.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_layers import GradientCheckpointingLayer as Layer

from policyopt._checks import require
from policyopt.checkpoint import optimizer_slots, optimizer_tensors, strip
from policyopt.estimators import kl_estimate, sequence_log_prob
from policyopt.frame import Frame, Statistics
from policyopt.lm import sampling
from policyopt.lm.batches import Completions
from policyopt.lm.data import batch_indices, fingerprint
from policyopt.lm.environments import EnvironmentFactory, check_environment, play
from policyopt.lm.heads import causal_models
from policyopt.lm.models import LanguageModel
from policyopt.lm.policies import Reference
from policyopt.lm.processes import Processes
from policyopt.lm.results import ConfigT, LMResult, LoggedSample, RowT
from policyopt.lm.rewards import (
    RewardFunctions,
    Rewards,
    compute_rewards,
    refuse_trained,
)
from policyopt.lm.sequences import Sequences, evaluating, widen
from policyopt.losses import Loss, aggregate, item_losses
from policyopt.runs import derive_seed

GroupSizes = Sequence[int] | int
"""Completions in each group, or in all groups alike."""


class Run(Frame[ConfigT, RowT]):
    """The frame of a training loop for language models.

    A trainer makes one, with the reference policy if it needs one, and loops ``for _ in
    run.updates()`` inside ``with run:``. In each update it takes its share of the
    batch, calls :meth:`backward` for every piece of :meth:`micro_batches`, then
    :meth:`descend`, and at the end :meth:`log`.

    All randomness is a function of (seed, update), so a checkpoint needs no generator
    states, and a resumed run repeats the uninterrupted one.

    Parameters
    ----------
    network : nn.Module
        What is trained. Its forward pass is shared by the processes.
    items : sequence
        The data, one entry per item; those with a ``prompt`` may be logged.
    state : dict, optional
        Numbers of the trainer's own that a checkpoint must carry.
    dropout : bool
        Train with the dropout that the model has. A loss with a ratio, a reference or a
        margin compares log-probabilities, which must then be those of one policy: with
        dropout each forward pass is another one.
    **options
        Of :class:`~policyopt.frame.Frame`: ``seed``, ``callback``, ``progress`` and
        ``checkpoint_dir``.
    """

    kept = "the last good one, with the optimiser steps made since"
    remedy = "a lower learning rate or max_gradient_norm"
    may_change = (
        "updates", "epochs", "checkpoint_every", "micro_batch_size", "logged_samples",
    )  # fmt: skip

    def __init__(
        self, algorithm: str, language_model: LanguageModel, network: nn.Module,
        config: ConfigT, row_type: type[RowT], items: Sequence[Any], *,
        state: dict[str, float] | None = None, dropout: bool = False, **options: Any,
    ) -> None:  # fmt: skip
        options["checkpoint_every"] = config.checkpoint_every
        super().__init__(algorithm, language_model.name, config, row_type, **options)
        self.language_model, self.items = language_model, items
        if given := config.chat_template_kwargs:
            language_model.model.config.chat_template_kwargs = given
        self.total = config.total_updates(len(items))
        self.state: dict[str, float] = dict(state or {})
        self._dropout, self._recomputed = dropout, list[nn.Module]()
        self.scoring: dict[str, Any] = {}
        """Options under which the network scores completions."""
        self.network: Any = network
        self._bare = network
        self._references: list[Reference] | None = []
        self._started_from: dict[str, str] = {}
        self._random_state = torch.get_rng_state()
        _check_trainable(list(self._trained().values()))
        # Reversible layers compute gradients in training mode only.
        kinds = [model.config.model_type for model in causal_models(network)]
        rule = f"{self.algorithm}: the model must allow gradients without dropout"
        remedy = "choose another, or train it with SFT"
        require(dropout or "reformer" not in kinds, rule, kinds, remedy)
        self._slots: dict[int, dict[str, Tensor]] = {}
        self._logged = [item.prompt for item in items[: config.logged_samples]]
        self._before = self._complete()
        steps = getattr(config, "minibatches", 1)
        self.processes = Processes(language_model.device, config.batch_size, steps)
        self.world, self.rank = self.processes.count, self.processes.rank
        self._shows_bar = self._shows_bar and self.rank == 0

    def reference(
        self, reference: LanguageModel | None, *, copy: bool = True
    ) -> Reference:
        """Return π_ref, a model that is given or the policy as it is now.

        Raises
        ------
        RuntimeError
            If the training has begun: the policy is no longer the one to start from.
        """
        if self._references is None:
            raise RuntimeError("make the reference before entering the run")
        half = self.config.autocast is not None
        made = Reference(self.language_model, reference, autocast=half, copy=copy)
        self._references.append(made)
        self._started_from |= {"reference": made.fingerprint()}
        return made

    # --- the loop's interface ---

    @property
    def position(self) -> tuple[int, int]:
        """Updates made, and updates to make."""
        return self.update, self.total

    @property
    def device(self) -> torch.device:
        """Where the network is."""
        return self.processes.device

    def sum(self, value: Tensor | float) -> Tensor:
        """Add up a number (or tensor of numbers) over all processes; no gradient."""
        return self.processes.sum(value)

    def means(self, statistics: Statistics, count: Tensor) -> dict[str, float]:
        """Return the sums of all that was noted, divided by a count."""
        names = statistics.names
        sums = zip(names, self.sums(statistics, *names), strict=True)
        return {name: total / float(count) for name, total in sums}

    def sums(self, statistics: Statistics, *names: str) -> list[float]:
        """Return sums over the pieces of an update and over all processes."""
        pieces = [statistics[name].sum().float().to(self.device) for name in names]
        return self.sum(torch.stack(pieces)).tolist()

    def mean(self, values: Tensor) -> float:
        """Return the mean of numbers of which each process has as many."""
        return float(self.sum(values.sum())) / (len(values) * self.world)

    def batch(self, draw: int = 0) -> list[Any]:
        """Return the items of the data that this process works on in this update, or
        others, where it draws again.
        """
        return [self.items[i] for i in self.batch_numbers(draw)]

    def batch_numbers(self, draw: int = 0) -> list[int]:
        """Return the numbers of these items."""
        # Each draw goes through the data in an order of its own.
        seed = derive_seed(self.seed, 1 << 20, draw) if draw else self.seed
        size = self.config.batch_size
        indices = batch_indices(len(self.items), size, self.update, seed)
        share = len(indices) // self.world
        return indices[self.rank * share : (self.rank + 1) * share]

    def micro_batches(self, size: int, groups: GroupSizes = 1) -> Iterator[Tensor]:
        """Yield row numbers that cut ``size`` completions into pieces.

        A piece has at most ``micro_batch_size`` completions. Neighbours that form a
        group (a pair, a list) stay together, however many they are; ``groups`` are the
        sizes of the groups, or the one size that all have. With several processes,
        gradients travel with the last piece only.
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
        self.processes.check_pieces(len(cuts))
        pieces = torch.arange(size, device=self.device).split(cuts)
        for piece in pieces[:-1]:
            with self.processes.local():
                yield piece
        yield pieces[-1]

    def ahead(self, objective: Loss, piece: Any, reduction: Any, count: Tensor) -> Any:
        """Return the loss of a piece, of the first step of its update, as a function of
        its log-probabilities: with it the network foresees their gradient.
        """

        def loss(now: Tensor) -> Tensor:
            sampled = isinstance(piece, Completions)
            old = {"old_log_probs": now.detach()} if sampled else {}
            said: Any = objective(replace(piece, log_probs=now, **old))
            items = getattr(said, "loss", said)
            return aggregate(items, piece.mask, reduction=reduction, denominator=count)

        return loss

    def backward(self, loss: Tensor) -> None:
        """Add the gradient of a piece's loss, whose denominators are those of the whole
        batch of all processes.
        """
        self.processes.backward(loss)

    def descend(self, counted: Tensor | None = None) -> float:
        """Make an optimiser step with the gradient collected so far.

        Parameters
        ----------
        counted : Tensor, optional
            Boolean, any shape: what has a say in the loss. Where nothing has, in any
            process, no step is made: Adam's momentum and the weight decay would move
            the weights all the same.

        Returns
        -------
        float
            The gradient's norm before it was limited.
        """
        norm = 0.0
        if counted is None or self.sum(counted.sum()) > 0:
            norm = self.processes.clip(self.optimizer, self.config.max_gradient_norm)
            if not math.isfinite(norm):
                raise FloatingPointError("gradient is not finite")
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return norm

    def is_due(self, every: int | None) -> bool:
        """Whether to measure after this update: every so many, and the last."""
        number = self.update + 1
        return number == self.total or (every is not None and number % every == 0)

    def result(self) -> LMResult[ConfigT, RowT]:
        """Return what was learned so far."""
        try:
            after = self._complete()
        except (FloatingPointError, torch.OutOfMemoryError) as error:
            after = [f"({error})"] * len(self._logged)  # what was learned is not lost
        texts = zip(self._logged, self._before, after, strict=True)
        return LMResult(
            algorithm=self.algorithm, seed=self.seed, config=self.config,
            language_model=self.language_model, history=self.history,
            stop_reason=self.stop_reason, seconds=self.seconds, updates=self.update,
            samples=[LoggedSample(*sample) for sample in texts],
        )  # fmt: skip

    def kl(self, batch: Completions, log_probs: Tensor) -> float:
        """Return the mean over completions of log π − log π_ref (k1), in nats.

        NaN without a reference.
        """
        if not batch.reference_log_probs.numel():
            return math.nan
        total = (log_probs - batch.reference_log_probs).sum()
        return float(self.sum(total)) / float(self.sum(len(batch)))

    # --- what the frame asks of this half ---

    def _enter(self) -> None:
        for made in self._references or ():
            made.end()
        self._references = None
        if self.config.gradient_checkpointing:
            mode, layers = self._layer_mode, self._bare.modules()
            self._recomputed = [m for m in layers if isinstance(m, Layer)]
            options = {"use_reentrant": False, "context_fn": lambda: (mode(), mode())}
            _recompute(self._bare, **options)
        self.network, self.optimizer = self.processes.share(
            self._bare, self.language_model, self._new_optimizer, self._slots
        )
        self._slots = {}
        if self.config.autocast is not None:
            # The forward pass alone: a backward pass takes its types from it.
            cast = torch.autocast(self.device.type, torch.bfloat16)
            self._bare.forward = cast(self._bare.forward)

    def _prepare_update(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.learning_rate_at(self.update, self.total)
        # Dropout, where it is on, draws from the global stream.
        torch.manual_seed(derive_seed(self.seed, self.update, self.rank))
        self.network.train(self._dropout)
        for layer in self._recomputed:
            layer.training = True

    @contextmanager
    def _layer_mode(self) -> Iterator[None]:
        """Give layers that are recomputed the mode of all others while they compute.

        In between they are in training mode, in which alone they are recomputed.
        """
        for layer in self._recomputed:
            layer.training = self._dropout
        try:
            yield
        finally:
            for layer in self._recomputed:
                layer.training = True

    def _common(self, **fields: Any) -> dict[str, Any]:
        fields["tokens"] += self.history[-1].tokens if self.history else 0
        rate = self.optimizer.param_groups[0]["lr"]
        return {**fields, "learning_rate": rate, "seconds": self.seconds}

    def _leave(self, error: BaseException | None) -> None:
        self._bare.__dict__.pop("forward", None)
        if error is None:
            self.processes.release(self.language_model)
            self.network = self._bare
        self._bare.eval()
        if self.config.gradient_checkpointing:
            _recompute(self._bare)
        torch.set_rng_state(self._random_state)

    def _revert(self, error: BaseException) -> bool:
        self.optimizer.zero_grad(set_to_none=True)
        # To gather sharded weights all processes would have to be here, and nobody
        # knows where the others are.
        return not self.processes.sharded

    def _identity(self) -> dict[str, Any]:
        return {"items": len(self.items), "data": self._data, **self._started_from}

    @cached_property
    def _data(self) -> str:
        # Read once, not at every checkpoint: 100,000 pairs take a second or two.
        return fingerprint(self.items)

    def _state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        self.processes.prepare_checkpoint()
        tensors = {f"network.{n}": p.detach() for n, p in self._trained().items()}
        tensors |= optimizer_tensors(self.optimizer)
        return self.processes.whole(tensors), {"numbers": self.state}

    def _restore(self, tensors: dict[str, Tensor], state: dict[str, Any]) -> None:
        saved, trained = strip(tensors, "network."), self._trained()
        shapes = [{(n, *t.shape) for n, t in x.items()} for x in (saved, trained)]
        if differing := sorted(shapes[0] ^ shapes[1]):
            raise ValueError(f"names or shapes differ, first {differing[:3]}")
        with torch.no_grad():
            for name, parameter in trained.items():
                parameter.copy_(saved[name])
        self._slots, self.state = optimizer_slots(tensors), state["numbers"]

    def _write(self, tensors: dict[str, Tensor], metadata: dict[str, Any]) -> None:
        if self.rank == 0:
            super()._write(tensors, metadata)
        self.processes.wait()

    def _trained(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self._bare.named_parameters() if p.requires_grad}

    def _new_optimizer(self) -> torch.optim.Optimizer:
        config, betas = self.config, self.config.adam_betas
        return torch.optim.AdamW(
            self._trained().values(), lr=config.learning_rate,
            betas=(betas[0], betas[1]), weight_decay=config.weight_decay,
            fused=self.language_model.device.type != "mps",
        )  # fmt: skip

    def _complete(self) -> list[str]:
        """Return greedy completions of the logged prompts."""
        if not self._logged:
            return []
        model = self.language_model
        prompts = [item.prompt_ids for item in self.items[: len(self._logged)]]
        room = (model.context_length or math.inf) - max(map(len, prompts))
        usual = getattr(self.config, "sampling", sampling.SamplingConfig())
        most = int(min(usual.max_new_tokens, room))
        greedy = sampling.SamplingConfig(temperature=0.0, max_new_tokens=most)
        samples = sampling.TransformersSampler(model).sample(prompts, 1, greedy, seed=0)
        return sampling.decode_all(model, samples.sequences)


class SamplingRun(Run[ConfigT, RowT]):
    """The frame of a trainer whose completions are the policy's own.

    Its config has ``sampling`` and, but for ranking, ``epochs_per_batch`` and
    ``minibatches``.
    """

    def __init__(
        self, *args: Any, reward_functions: RewardFunctions, group_size: int,
        sampler: sampling.Sampler | None, environment: EnvironmentFactory | None = None,
        **options: Any,
    ) -> None:  # fmt: skip
        super().__init__(*args, **options)
        self._reward_functions, self._group = reward_functions, group_size
        self._environment, self._judged = environment, True
        if environment is not None:
            check_environment(environment, self.items[0], reward_functions)
            self._judged = callable(reward_functions) or bool(reward_functions)
            rule = "reward_weights must be None where there are no reward functions"
            weights = self.config.reward_weights
            require(self._judged or weights is None, rule, weights)
        if self._judged:
            refuse_trained(reward_functions, self.language_model.model)
        half = self.config.autocast is not None
        own = sampling.TransformersSampler(self.language_model, autocast=half)
        self._sampler = sampler or own
        self._sampling: sampling.SamplingConfig = self.config.sampling
        # Scores are those of the distribution that is sampled from.
        names = ("temperature", "top_k", "top_p")
        self.scoring = {name: getattr(self._sampling, name) for name in names}

    def _enter(self) -> None:
        super()._enter()
        if self.update:  # the weights are those of a checkpoint
            self.tell_sampler()

    @property
    def longest(self) -> int:
        """The most tokens of one completion that the policy chooses."""
        turns = self.config.max_turns if self._environment else 1
        return int(self._sampling.max_new_tokens * turns)

    def sample_until_full(self, draws: int) -> Completions:
        """Sample completions of a batch of prompts, and again, at most ``draws`` times
        in all, of others in place of those whose rewards are all equal.
        """
        drawn, varied = list[Completions](), 0
        missing = wanted = self.config.batch_size // self.world
        for draw in range(draws):
            drawn.append(self.sample(draw, missing))
            varied += int((~self.equal_groups(drawn[-1])).sum())
            # As many in all processes: they sample together where weights are sharded.
            missing = int(self.processes.max(torch.tensor(wanted - varied)))
            if missing <= 0:
                break
        return Completions.join(drawn)

    def sample(self, draw: int = 0, prompts: int | None = None) -> Completions:
        """Sample completions of this update's prompts, or of the first ``prompts`` of
        another draw, and score them.

        Reward functions get ``completions`` and ``prompts`` (texts or chat messages),
        one entry per completion, the other columns of the data likewise,
        ``finished``, which tells completions that ended by themselves, and
        ``completion_tokens``, how many tokens the policy wrote. With an environment a
        completion is the policy's last message, and ``messages`` are the whole
        conversations.
        """
        examples, size = self.batch(draw)[:prompts], self._group
        drawn = partial(self._draw, draw)
        config: Any = self.config
        rows = [example for example in examples for _ in range(size)]
        columns = {name: [r.columns[name] for r in rows] for name in rows[0].columns}
        first, given, token_rewards = self.rank * len(rows), None, torch.empty(0)
        if self._environment is None:
            contexts = [example.prompt_ids for example in examples]
            samples = drawn(contexts, size, 0, first)
            texts = sampling.decode_all(self.language_model, samples.sequences)
        else:
            played = play(
                self._environment, examples, drawn, self.language_model,
                config, group_size=size, first_row=first, busiest=self._busiest,
            )  # fmt: skip
            samples, texts = played.samples, played.answers
            token_rewards, columns["messages"] = played.rewards.cpu(), played.messages
            given = token_rewards.sum(1)
        columns["finished"] = samples.finished.tolist()
        columns["completion_tokens"] = samples.sequences.policy_mask.sum(1).tolist()
        if given is not None and not self._judged:
            rewards = Rewards(given, {})
        else:
            rewards = compute_rewards(
                self._reward_functions, texts, [row.prompt for row in rows], columns,
                weights=config.reward_weights, given=given,
            )  # fmt: skip
        sequences = samples.sequences
        if given is not None:
            # The functions judge the whole: their reward comes with the last action.
            steps = torch.arange(sequences.policy_mask.shape[1])
            last = (sequences.policy_mask.cpu() * steps).argmax(1)
            token_rewards[range(len(rows)), last] += rewards.total - given
            rewards.parts["environment"] = given
        sequences = sequences.to(self.device)
        return Completions(
            sequences, sequences.policy_mask,
            rewards=rewards.total.to(self.device),
            parts={name: part.to(self.device) for name, part in rewards.parts.items()},
            token_rewards=token_rewards.to(self.device),
            finished=samples.finished.to(self.device),
            sampler_log_probs=samples.log_probs.to(self.device),
        )  # fmt: skip

    def full(self, batch: Completions) -> Completions:
        """Keep as many groups as this process learns from: the first whose rewards
        differ, and where these are too few the first of the others.
        """
        size, equal = self._group, self.equal_groups(batch)
        wanted = self.config.batch_size // self.world
        if len(equal) == wanted:
            return batch
        kept = equal.int().argsort(stable=True)[:wanted]
        rows = kept[:, None] * size + torch.arange(size, device=self.device)
        return batch.select(rows.flatten())

    def equal_groups(self, batch: Completions) -> Tensor:
        """Return which groups have rewards that are all equal, Boolean ``[P]``."""
        groups = batch.rewards.view(-1, self._group)
        return (groups == groups[:, :1]).all(1)

    def _draw(
        self, draw: int, contexts: list[list[int]], size: int, turn: int, first: Any
    ) -> sampling.Samples:
        stream = (1 << 20) + draw
        seed = derive_seed(self.seed, self.update, stream, turn)  # in all processes
        return self._sampler.sample(
            contexts, size, self._sampling, seed=seed, first_row=first
        )

    def _busiest(self, count: int) -> int:
        """Return how many rows are sampled side by side: with sharded weights as many
        in all processes.
        """
        sharded = self.processes.sharded
        return int(self.processes.max(torch.tensor(count))) if sharded else count

    @torch.no_grad()
    def score(
        self, batch: Completions, reference: Reference | None, *, old: bool = True,
        group: int | None = None,
    ) -> Completions:  # fmt: skip
        """Fill in what π_ref and (with ``old``) the policy say before the first step.
        ``group`` is the size of the batch's groups, if it is another than was sampled.
        """
        sequences = batch.sequences
        changes: dict[str, Any] = {}
        cuts = list(self.micro_batches(len(batch), group or self._group))
        if reference is not None:
            scores = reference.log_probs(sequences, cuts, **self.scoring)
            changes["reference_log_probs"] = scores
        if old:
            with evaluating(self.network):
                said = [self.network(sequences.select(r), **self.scoring) for r in cuts]
            for name in {"log_probs", "values"}.intersection(said[0]._fields):
                wide = [widen(getattr(s, name), batch.mask) for s in said]
                changes[f"old_{name}"] = torch.cat(wide)
        return replace(batch, **changes)

    def minibatches(self, batch: Completions) -> Iterator[Completions]:
        """Yield what each optimiser step of the update is computed from.

        Minibatch m holds the groups m, m + count, m + 2 count, …, numbered over all
        processes: these cut the same pieces together that one process would cut alone.
        A process may have no group in a piece. (The data are shuffled already.)
        """
        config: Any = self.config
        rows = torch.arange(len(batch), device=self.device).view(-1, self._group)
        count, before = config.minibatches, self.rank * len(rows)
        for _ in range(config.epochs_per_batch):
            for number in range(count):
                part = rows[(number - before) % count :: count].flatten()
                yield batch if count == 1 else batch.select(part)

    def keep(self, batch: Completions, rows: Tensor) -> Completions:
        """Leave out the completions where ``rows``, Boolean ``[B]``, does not hold.

        Sharded weights need the same passes in all processes: they are computed there,
        and do not count.
        """
        if self.processes.sharded:
            return replace(batch, mask=batch.mask & rows[:, None])
        return batch.select(rows)

    def micro_batches(self, size: int, groups: GroupSizes = 1) -> Iterator[Tensor]:
        """As :meth:`Run.micro_batches`, also for a process without completions.

        It has no piece. Where others have one, it makes a pass whose gradient is 0:
        their gradients travel when all processes have one.
        """
        waits = self.world > 1 and self.sum(size) > 0 and size == 0
        yield from super().micro_batches(size, groups)
        if waits:
            ids = [self.items[0].prompt_ids[:1]]
            said = self.network(Sequences.pad(ids, ids).to(self.device), **self.scoring)
            self.backward(sum(0 * x.sum() for x in said if x is not None))

    def token_losses(self, loss: Loss, batch: Completions) -> Any:
        """Return the losses of a micro-batch, with ``ratio`` and ``clipped``."""
        return item_losses(loss, batch, batch.mask.shape, ["ratio", "clipped"])

    def gap(self, batch: Completions) -> Tensor:
        """Return the sum of k3 estimates of KL(π_sampler ‖ π_old) over the tokens."""
        kl = kl_estimate(batch.sampler_log_probs, batch.old_log_probs, "k3")
        return torch.where(batch.mask, kl, 0.0).sum()

    def log_weights(self, batch: Completions) -> Tensor:
        """Return log π_old/π_sampler of each completion that has a say."""
        log_ratio = batch.old_log_probs - batch.sampler_log_probs
        return sequence_log_prob(log_ratio, batch.mask)[batch.mask.any(1)]

    def effective_samples(self, statistics: Statistics) -> float:
        """Return (Σw)² / (n Σw²) of the noted ``log_weights`` over all processes; NaN
        without any.
        """
        noted = statistics["log_weights"] if statistics.names else torch.empty(0)
        mine = noted.cpu().double()
        least = mine.new_full((1,), -torch.inf)
        largest = self.processes.max(torch.cat([mine, least]).max().float())
        w = (mine - largest).exp()
        sums = torch.stack([w.sum(), w.square().sum(), w.new_tensor(float(len(w)))])
        total, squares, count = self.sum(sums).tolist()
        return total**2 / (count * squares) if count else math.nan

    def summary(self, batch: Completions) -> dict[str, Any]:
        """Return what a row of the history says of the completions themselves, whose
        mask is still that of all tokens that the policy chose.
        """
        tokens = float(self.sum(batch.mask.sum()))
        return {
            "tokens": int(tokens),
            "reward": self.mean(batch.rewards),
            "rewards": {name: self._scored(part) for name, part in batch.parts.items()},
            "length": self.mean(batch.mask.sum(1)),
            "finished": self.mean(batch.finished),
            "entropy": -float(self.sum(batch.sampler_log_probs.sum())) / max(tokens, 1),
        }

    def _scored(self, part: Tensor) -> float:
        """Return the mean of what a reward function did not abstain from, or NaN."""
        count = float(self.sum((~part.isnan()).sum()))
        return float(self.sum(part.nan_to_num().sum())) / (count or math.nan)

    def explained_variance(self, value: Tensor, target: Tensor, mask: Tensor) -> float:
        """Return 1 − Var(target − V) / Var(target) over the tokens of all processes."""
        variance = self.processes.variance
        return float(1 - variance(target - value, mask) / variance(target, mask))

    def tell_sampler(self) -> None:
        """Tell a sampler with weights of its own that they have changed."""
        if isinstance(self._sampler, sampling.UpdatedSampler):
            self._sampler.update_weights(self.language_model.model)


def _check_trainable(parameters: Sequence[nn.Parameter]) -> None:
    if not parameters:
        raise ValueError("language_model has no parameter with requires_grad=True")
    if any(p.dtype in (torch.bfloat16, torch.float16) for p in parameters):
        warnings.warn(
            "in 16 bits an update smaller than 1/256 of a weight is lost; load with "
            "dtype='float32' and set autocast='bfloat16', or train with lora=LoRA()",
            stacklevel=5,
        )


def _recompute(network: nn.Module, **options: Any) -> None:
    """Switch gradient checkpointing on, or off where there are no options, by its name
    in transformers 5.23 or the older one.
    """
    switch = f"checkpointing_{'enable' if options else 'disable'}"
    arguments = [options] if options else []
    for model in causal_models(network):
        new = getattr(model, f"activation_{switch}", None)
        (new or getattr(model, f"gradient_{switch}"))(*arguments)
