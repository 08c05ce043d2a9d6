"""Reinforcement learning on Gymnasium environments: REINFORCE, TRPO and PPO as plain
functions.
"""

import typing as _typing

from policyopt import _public_names
from policyopt.control.config import *
from policyopt.control.environments import *
from policyopt.control.evaluation import *
from policyopt.control.policies import *
from policyopt.control.ppo import *
from policyopt.control.reinforce import *
from policyopt.control.results import *
from policyopt.control.rollouts import *
from policyopt.control.steps import *
from policyopt.control.trpo import *
from policyopt.runs import History as History
from policyopt.runs import TrainingDivergedError as TrainingDivergedError
from policyopt.runs import train_seeds as train_seeds

if not _typing.TYPE_CHECKING:  # type checkers follow the stars
    __all__ = _public_names(globals())
