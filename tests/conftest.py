"""Settings that all tests share."""

from __future__ import annotations

import pytest
import torch
from hypothesis import settings

# Derandomised: a run of the tests says something about the code, not about the day. Other draws come with
# --hypothesis-seed=N. Either way a failure prints the example, and a line that draws it again.
settings.register_profile(
    "policyopt", derandomize=True, deadline=None, max_examples=25, database=None, print_blob=True
)
settings.register_profile("seeded", settings.get_profile("policyopt"), derandomize=False)
settings.load_profile("policyopt")

# The tensors here are tiny: a second thread would only wait, above all when tests run in several processes.
torch.set_num_threads(1)


def pytest_configure(config: pytest.Config) -> None:
    """Draw by the seed where one is given."""
    if config.getoption("hypothesis_seed", None) is not None:
        settings.load_profile("seeded")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip what is marked ``cuda`` where there is no CUDA device."""
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device")
    for item in items:
        if item.get_closest_marker("cuda"):
            item.add_marker(skip)
