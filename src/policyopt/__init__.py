"""policyopt: policy optimisation from MDPs to PPO, DPO and GRPO, as pure functions and
readable loops.

The floors, from the ground up: :mod:`policyopt.mdp` (finite MDPs, solved exactly),
:mod:`policyopt.distributions`, :mod:`policyopt.estimators`, :mod:`policyopt.losses`,
:mod:`policyopt.trust_region` (tensor maths), and :mod:`policyopt.control` (training on
Gymnasium environments) and :mod:`policyopt.lm` (training of language models).
"""

from importlib.metadata import version

from policyopt import distributions, estimators, losses, mdp, trust_region

__version__ = version("policyopt")

__all__ = [
    "__version__",
    "distributions",
    "estimators",
    "losses",
    "mdp",
    "trust_region",
]
