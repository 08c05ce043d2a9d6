"""PPO on CartPole: its details, changed one at a time.

The run that they are compared with is stored in ``ppo_clip_epochs_rate``: a clip range of 0.2, four epochs, and a
learning rate of 0.003.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from ppo_clip_epochs_rate import REFERENCE, train

from policyopt.control import ppo_loss
from policyopt.control.steps import Steps
from policyopt.losses import ClippedSurrogate
from policyopt_book.studies import Study

CHANGES: dict[str, dict[str, Any]] = {
    "λ = 0": {"gae_lambda": 0.0},
    "λ = 1": {"gae_lambda": 1.0},
    "raw advantages": {"normalize_advantages": False},
    "normalised per minibatch": {"normalize_advantages": False},  # and by the loss, see below
    "default initialisation": {"orthogonal_init": False},
    "constant learning rate": {"anneal_learning_rate": False},
    "entropy bonus 0.01": {"entropy_coef": 0.01},
    "no gradient limit": {"max_gradient_norm": None},
    "value clip 0.2": {"value_clip": 0.2},
}


def per_minibatch(steps: Steps) -> ClippedSurrogate:
    """Normalise the advantages of each minibatch instead of the batch."""
    A = steps.advantages
    A = (A - A.mean()) / (A.std() + 1e-8)
    return ppo_loss(replace(steps, advantages=A), REFERENCE)


def run(*, seed: int, variant: str) -> dict[str, Any]:
    """Train once."""
    loss = per_minibatch if variant == "normalised per minibatch" else None
    return train(replace(REFERENCE, **CHANGES[variant]), seed=seed, loss=loss)


STUDY = Study(
    name="ppo_details",
    run=run,
    settings=[{"variant": label} for label in CHANGES],
    seeds=20,
    sample={"variant": "normalised per minibatch"},
)

if __name__ == "__main__":
    STUDY.main()
