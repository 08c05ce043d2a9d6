"""Exercises of the chapter on a pretrained model."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from policyopt.losses import dpo_loss
from policyopt_book.exercises import Exercise

__all__ = ["EXERCISES"]


def _count(rank: int, shapes: Sequence[tuple[int, int]]) -> int:
    """Make the matrices, without memory for them, and count."""
    total = 0
    for d_out, d_in in shapes:
        with torch.device("meta"):
            A, B = nn.Linear(d_in, rank, bias=False), nn.Linear(rank, d_out, bias=False)
        total += sum(
            weight.numel() for layer in (A, B) for weight in layer.parameters()
        )
    return total


def _adapter_case(
    seed: int, d_out: int, d_in: int, rank: int, alpha: float
) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    W, A, B = (
        torch.randn(*shape, generator=generator, dtype=torch.float64)
        for shape in ((d_out, d_in), (rank, d_in), (d_out, rank))
    )
    return {"W": W, "A": A, "B": B, "alpha": alpha}


def _merged(W: Tensor, A: Tensor, B: Tensor, alpha: float) -> Tensor:
    """Column by column: what the adapted layer makes of each unit vector."""
    rank = len(A)
    columns = [
        W @ x + alpha / rank * (B @ (A @ x))
        for x in torch.eye(W.shape[1], dtype=W.dtype)
    ]
    return torch.stack(columns, dim=1)


def _pair_numbers(
    chosen_gain: float, rejected_gain: float, beta: float
) -> tuple[float, float, float]:
    """Return the package's margin and loss, and the weight as the slope that autograd
    finds.
    """
    chosen = torch.tensor(chosen_gain, dtype=torch.float64, requires_grad=True)
    rejected, zero = (
        torch.tensor(rejected_gain, dtype=torch.float64),
        torch.zeros((), dtype=torch.float64),
    )
    items = dpo_loss(chosen, rejected, zero, zero, beta=beta)
    (slope,) = torch.autograd.grad(items.loss, chosen)
    return float(items.margin.detach()), float(items.loss.detach()), -float(slope)


def _sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def _from_margin(margin: float, weight: float) -> tuple[float, float, float]:
    return margin, math.log1p(math.exp(-margin)), weight


_END = 2


def _reply_mask(ids: Tensor, end_id: int) -> Tensor:
    """Walk along each reply until its end."""
    mask = torch.zeros_like(ids, dtype=torch.bool)
    for i, row in enumerate(ids.tolist()):
        for t, token in enumerate(row):
            mask[i, t] = True
            if token == end_id:
                break
    return mask


def _end_masked_only_when_long(ids: Tensor, end_id: int) -> Tensor:
    """Count the tokens that are not the end, and one more, but never the last
    column.
    """
    lengths = ((ids != end_id).sum(1) + 1).clamp(max=ids.shape[1] - 1)
    return torch.arange(ids.shape[1]) < lengths[:, None]


def _drift_case(seed: int, lengths: list[int]) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths) + 1)
    mask = torch.arange(shape[1]) < torch.tensor(lengths)[:, None]
    reference, model = (
        -3 * torch.rand(shape, generator=generator, dtype=torch.float64)
        for _ in range(2)
    )
    # What stands at padding is some number that must not count.
    return {
        "reference_log_probs": reference,
        "log_probs": torch.where(mask, model - 0.3, -50.0),
        "mask": mask,
    }


def _drift(reference_log_probs: Tensor, log_probs: Tensor, mask: Tensor) -> float:
    differences = [
        float(reference_log_probs[i, t] - log_probs[i, t])
        for i, t in mask.nonzero().tolist()
    ]
    return sum(differences) / len(differences)


def _mean_of_means(
    reference_log_probs: Tensor, log_probs: Tensor, mask: Tensor
) -> Tensor:
    difference = torch.where(mask, reference_log_probs - log_probs, 0.0)
    return (difference.sum(1) / mask.sum(1)).mean()


def _per_reply(reference_log_probs: Tensor, log_probs: Tensor, mask: Tensor) -> Tensor:
    return torch.where(mask, reference_log_probs - log_probs, 0.0).sum(1).mean()


_GOOD = "A mountain is land that rises high above its surroundings."
_LONG = (
    "A mountain is a very large piece of land that rises high above its surroundings."
)
# Completion, whether it stopped by itself, whether it should earn the reward.
_REPLIES = (
    ("Purr.", True, False),
    ("Isaac Newton.", True, False),
    ("A mountain.", True, False),
    (_GOOD, True, True),
    (_GOOD, False, False),
    (_GOOD.rstrip("."), True, False),
    (_LONG, True, False),
)


def _says_something(rewards: Any) -> str | None:
    """Say which reply is scored wrongly; None if all are right."""
    try:
        given = [float(reward) for reward in rewards]
    except (TypeError, ValueError):
        return f"Return one number for each completion, not {rewards!r}."
    if len(given) != len(_REPLIES):
        return (
            f"Return one number for each of the {len(_REPLIES)} completions; "
            f"there are {len(given)}."
        )
    for reward, (text, finished, right) in zip(given, _REPLIES, strict=True):
        if reward != float(right):
            state = "" if finished else ", which did not stop by itself,"
            return (
                f"The reply {text!r}{state} earns {reward:g}; "
                f"it should earn {float(right):g}."
            )
    return None


def _largest(memory: float, adapters: bool, frozen_bytes: int) -> float:
    """Add up what one parameter costs, piece by piece."""
    if adapters:
        pieces = {"weight": frozen_bytes}
    else:
        trained = ("weight", "gradient", "first moment", "second moment")
        pieces = dict.fromkeys(trained, 4) | {"reference": frozen_bytes}
    return memory / sum(pieces.values())


class Adapted(nn.Module):
    """A small policy with adapters: one question per row, one answer per column."""

    adapters = True

    def __init__(
        self, seed: int, chosen: list[int], rejected: list[int], *, trained: bool
    ) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        sizes, rows = (len(chosen), 5), range(len(chosen))
        self.chosen, self.rejected, self.rows = chosen, rejected, rows
        W, A, B = (
            torch.randn(*shape, generator=generator, dtype=torch.float64)
            for shape in (sizes, (2, sizes[1]), (sizes[0], 2))
        )
        self.W = nn.Parameter(W, requires_grad=False)
        self.A, self.B = nn.Parameter(A), nn.Parameter(B if trained else B * 0)

    @property
    def trained(self) -> list[nn.Parameter]:
        """The adapters."""
        return [self.A, self.B]

    def log_prob(self) -> Tensor:
        """Return log π of the chosen and the rejected answer of each question."""
        correction = 2 * self.B @ self.A if self.adapters else 0.0
        rows = (self.W + correction).log_softmax(-1)
        return torch.stack(
            [rows[self.rows, self.chosen], rows[self.rows, self.rejected]], 1
        )


def _losses(
    model: Adapted,
    beta: float,
    rate: float,
    updates: int,
    *,
    reference_on: bool = False,
    moving: bool = False,
    mean: bool = True,
    after: bool = False,
) -> list[float]:
    """Train as asked, or with one of the mistakes."""
    plain = model.W.detach().log_softmax(-1)
    start = [plain[model.rows, model.chosen], plain[model.rows, model.rejected]]
    if reference_on:
        start = list(model.log_prob().detach().T)
    adam = torch.optim.AdamW(model.trained, rate, weight_decay=0.0)
    losses: list[float] = []

    def loss_now() -> Tensor:
        now = model.log_prob().T
        reference = list(now.detach()) if moving else start
        each = dpo_loss(*now, *reference, beta=beta).loss
        return each.mean() if mean else each.sum()

    for _ in range(updates):
        loss = loss_now()
        adam.zero_grad()
        loss.backward()
        adam.step()
        losses.append((loss_now() if after else loss).item())
    return losses


_SQUARE = [(576, 576)] * 30
_LAYER = [(576, 576), (192, 576), (1536, 576), (576, 1536)]

EXERCISES: tuple[Exercise, ...] = (
    Exercise(
        name="real-model.lora-size",
        reference=_count,
        cases=({"rank": 4, "shapes": _SQUARE}, {"rank": 16, "shapes": _LAYER}),
        mistakes={
            "These are the sizes of the matrices themselves, which LoRA freezes": (
                lambda rank, shapes: sum(d_out * d_in for d_out, d_in in shapes)
            ),
            "Only A is counted; B, of shape [d_out, rank], is trained as well": (
                lambda rank, shapes: sum(rank * d_in for _, d_in in shapes)
            ),
            "That is one matrix; there is a pair A, B for each": (
                lambda rank, shapes: rank * sum(shapes[0])
            ),
            "The rank appears twice: both A and B have it as one of their sides, not "
            "as a factor more": (
                lambda rank, shapes: sum(
                    rank**2 * (d_out + d_in) for d_out, d_in in shapes
                )
            ),
        },
    ),
    Exercise(
        name="real-model.merge",
        reference=_merged,
        cases=(
            _adapter_case(0, 3, 5, 2, 4.0),
            _adapter_case(1, 4, 4, 2, 1.0),
            {
                **_adapter_case(2, 2, 3, 1, 32.0),
                "B": torch.zeros(2, 1, dtype=torch.float64),
            },
        ),
        mistakes={
            "The correction is scaled by α / r, not by α": (
                lambda W, A, B, alpha: _merged(W, A, B, alpha * len(A))
            ),
            "The correction is not scaled; its factor is α / "
            "r": lambda W, A, B, alpha: W + B @ A,
            "The rank is the number of rows of A, the side that A and B share": (
                lambda W, A, B, alpha: W + alpha / A.shape[1] * B @ A
            ),
            "The correction replaces W; it must be added to it": (
                lambda W, A, B, alpha: _merged(torch.zeros_like(W), A, B, alpha)
            ),
        },
    ),
    Exercise(
        name="real-model.pair",
        reference=_pair_numbers,
        cases=(
            {"chosen_gain": 12.0, "rejected_gain": -20.0, "beta": 0.1},
            {"chosen_gain": 0.0, "rejected_gain": 0.0, "beta": 0.1},
            {"chosen_gain": -3.0, "rejected_gain": -10.0, "beta": 0.3},
            {"chosen_gain": -4.0, "rejected_gain": 2.0, "beta": 0.2},
        ),
        mistakes={
            "The factor β is missing in the weight": (
                lambda chosen, rejected, beta: _from_margin(
                    beta * (chosen - rejected), _sigmoid(-beta * (chosen - rejected))
                )
            ),
            "The weight is β σ(−margin): what is ordered rightly pulls less, not "
            "more": (
                lambda chosen, rejected, beta: _from_margin(
                    beta * (chosen - rejected),
                    beta * _sigmoid(beta * (chosen - rejected)),
                )
            ),
            "The margin is β times the chosen gain minus the rejected gain; you add "
            "them": (
                lambda chosen, rejected, beta: _pair_numbers(chosen, -rejected, beta)
            ),
            "The margin has the factor β": (
                lambda chosen, rejected, beta: _from_margin(
                    chosen - rejected, beta * _sigmoid(rejected - chosen)
                )
            ),
        },
    ),
    Exercise(
        name="real-model.loop",
        reference=_losses,
        cases=tuple(
            {"model": model, "beta": 0.3, "rate": 0.1, "updates": 4}
            for model in (
                Adapted(0, [0, 1, 2], [3, 4, 0], trained=False),
                Adapted(1, [2, 2], [0, 1], trained=True),
            )
        ),
        mistakes={
            "The reference is the model with its adapters off. Ask it before the first "
            "update, with model.adapters = False, and turn them on again": (
                partial(_losses, reference_on=True)
            ),
            "Every loss is log 2: the reference moves with the policy. Ask it once, "
            "before the loop": partial(_losses, moving=True),
            "The loss is the mean over the pairs, not their sum": (
                partial(_losses, mean=False)
            ),
            "These are the losses after each step; the loss of an update is the one "
            "that it descends": partial(_losses, after=True),
        },
    ),
    Exercise(
        name="real-model.mask",
        reference=_reply_mask,
        cases=(
            {
                "ids": torch.tensor(
                    [[7, 5, 9, _END, _END], [4, _END, _END, _END, _END]]
                ),
                "end_id": _END,
            },
            {
                "ids": torch.tensor([[7, 5, 9], [8, 6, _END], [_END, _END, _END]]),
                "end_id": _END,
            },
        ),
        mistakes={
            "The end of each reply is missing: the first end token is an action, "
            "only those after it are padding": (lambda ids, end_id: ids != end_id),
            "Padding is counted": lambda ids, end_id: torch.ones_like(
                ids, dtype=torch.bool
            ),
            "A reply that fills the whole width loses its "
            "last token": _end_masked_only_when_long,
            "The mask is turned round: it must be true for tokens that count": (
                lambda ids, end_id: ~_reply_mask(ids, end_id)
            ),
        },
    ),
    Exercise(
        name="real-model.drift",
        reference=_drift,
        cases=(_drift_case(0, [4, 1, 6]), _drift_case(1, [2, 5])),
        mistakes={
            "The sign is turned round: KL(π_ref ‖ π) averages log π_ref − log π": (
                lambda *arguments: -_drift(*arguments)
            ),
            "Padding counts": lambda reference, model, mask: (reference - model).mean(),
            "The sum leaves padding out, but the denominator counts it": (
                lambda reference, model, mask: torch.where(
                    mask, reference - model, 0.0
                ).mean()
            ),
            "Each reply is averaged first, so a token of a short reply "
            "weighs more": _mean_of_means,
            "That is per reply; divide by the number of tokens": _per_reply,
        },
    ),
    Exercise(
        name="real-model.rule",
        cases=(
            {
                "completions": [text for text, _, _ in _REPLIES],
                "finished": [done for _, done, _ in _REPLIES],
            },
        ),
        verify=_says_something,
    ),
    Exercise(
        name="real-model.largest",
        reference=_largest,
        cases=(
            {"memory": 16e9, "adapters": False, "frozen_bytes": 4},
            {"memory": 16e9, "adapters": True, "frozen_bytes": 4},
            {"memory": 16e9, "adapters": True, "frozen_bytes": 2},
            {"memory": 24e9, "adapters": False, "frozen_bytes": 2},
        ),
        mistakes={
            "The reference is missing where all weights are trained: the KL term "
            "needs it throughout": (
                lambda memory, adapters, frozen_bytes: (
                    memory / (frozen_bytes if adapters else 16)
                )
            ),
            "With adapters the reference is the same model with the adapters off: it "
            "costs nothing": (
                lambda memory, adapters, frozen_bytes: (
                    memory / (2 * frozen_bytes if adapters else 16 + frozen_bytes)
                )
            ),
            "AdamW keeps two moments of every trained weight": (
                lambda memory, adapters, frozen_bytes: (
                    memory / (frozen_bytes if adapters else 12 + frozen_bytes)
                )
            ),
            "Only frozen weights are stored in frozen_bytes; weights that are "
            "trained take 4": (
                lambda memory, adapters, frozen_bytes: (
                    memory / (frozen_bytes if adapters else 5 * frozen_bytes)
                )
            ),
        },
    ),
)
