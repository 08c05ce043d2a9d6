"""policyopt: policy optimisation from MDPs to PPO, DPO and GRPO, as pure functions and
readable loops.

>>> import policyopt as po
>>> po.train_ppo, po.lm.train_grpo, po.losses.dpo_loss  # doctest: +ELLIPSIS
(<function train_ppo at ...>, <function train_grpo at ...>, <function dpo_loss at ...>)

The floors, from the ground up: :mod:`policyopt.mdp` (finite MDPs, solved exactly),
:mod:`policyopt.distributions`, :mod:`policyopt.estimators`, :mod:`policyopt.losses`,
:mod:`policyopt.trust_region` (tensor maths), and :mod:`policyopt.control` (training on
Gymnasium environments) and :mod:`policyopt.lm` (training of language models).

A module is imported when it is first used. The names of :mod:`policyopt.runs` and
:mod:`policyopt.control` are offered here too; those of :mod:`policyopt.lm` are not,
because both halves have a PPO.
"""

from collections.abc import Mapping
from importlib import import_module
from importlib.metadata import version
from pkgutil import iter_modules
from types import ModuleType
from typing import TYPE_CHECKING, Any

__version__ = version("policyopt")

if TYPE_CHECKING:
    from policyopt import checkpoint as checkpoint
    from policyopt import control as control
    from policyopt import distributions as distributions
    from policyopt import estimators as estimators
    from policyopt import frame as frame
    from policyopt import lm as lm
    from policyopt import losses as losses
    from policyopt import mdp as mdp
    from policyopt import runs as runs
    from policyopt import trust_region as trust_region
    from policyopt.control import *
    from policyopt.runs import *
else:
    _MODULES = {module.name for module in iter_modules(__path__)}
    _OFFERED = ("runs", "control")

    def __getattr__(name):
        if name in _MODULES:
            return import_module(f"policyopt.{name}")
        for half in () if name.startswith("_") else _OFFERED:
            module = import_module(f"policyopt.{half}")
            if name in module.__all__:
                return getattr(module, name)
        raise AttributeError(f"module 'policyopt' has no attribute {name!r}")

    def __dir__():
        offered = (import_module(f"policyopt.{half}").__all__ for half in _OFFERED)
        return sorted({"__version__", *_MODULES}.union(*offered))


def _public_names(package: Mapping[str, Any]) -> list[str]:
    """Names that a package gathers from its modules."""
    return sorted(
        name
        for name, value in package.items()
        if not name.startswith("_") and not isinstance(value, ModuleType)
    )
