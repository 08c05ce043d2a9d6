"""The minimal loop that the chapter on TRPO prints takes the steps of the library, shortened and refused ones too."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parameters_to_vector

import notebooks
from policyopt.trust_region import trust_region_step


@pytest.fixture(autouse=True)
def float64() -> Iterator[None]:
    """Two ways to the same numbers agree closely only in float64."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def printed() -> dict[str, Any]:
    cells = notebooks.read(notebooks.notebook_path("trpo")).cells
    (source,) = [c.source for c in cells if c.cell_type == "code" and "def trpo_step(" in c.source]
    names: dict[str, Any] = {}
    exec(source, names)
    return names


@pytest.mark.parametrize(
    ("kl_limit", "damping", "fractions"),
    [(0.01, 0.1, (1.0, 1.0)), (0.3, 0.003, (0.05, 0.95)), (1e4, 0.001, (0.0, 0.0))],
    ids=["full", "shortened", "refused"],
)
def test_the_printed_step_is_that_of_the_library(
    kl_limit: float, damping: float, fractions: tuple[float, float]
) -> None:
    generator = torch.Generator().manual_seed(0)
    states = torch.randn(60, 3, generator=generator)
    actions = torch.randint(2, (60,), generator=generator)
    weights = torch.randn(60, generator=generator) + states[:, 0] * (2 * actions - 1)
    network = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2))
    with torch.no_grad():
        for p in network.parameters():
            p.copy_(0.5 * torch.randn(p.shape, generator=generator))
        old = network(states).log_softmax(-1)
    ours, library = copy.deepcopy(network), copy.deepcopy(network)

    def loss_and_kl() -> tuple[Tensor, Tensor]:
        new = library(states).log_softmax(-1)
        ratio = (new - old)[torch.arange(60), actions].exp()
        return -(ratio * weights).mean(), (old.exp() * (old - new)).sum(-1).mean()

    fraction = printed()["trpo_step"](ours, states, actions, weights, kl_limit, damping)
    taken = trust_region_step(library.parameters(), loss_and_kl, kl_limit=kl_limit, damping=damping)
    assert fraction == taken.search.fraction
    assert fractions[0] <= fraction <= fractions[1]
    here, there, start = (parameters_to_vector(n.parameters()).detach() for n in (ours, library, network))
    torch.testing.assert_close(here, there, rtol=1e-4, atol=1e-4 * (there - start).abs().max().item())
