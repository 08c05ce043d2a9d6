"""Reinforcement learning on Gymnasium environments: REINFORCE, TRPO and PPO as plain
functions.
"""

import typing as _typing

from policyopt import _public_names
from policyopt.control.config import ActorCriticConfig as ActorCriticConfig
from policyopt.control.config import ControlConfig as ControlConfig
from policyopt.control.environments import EnvLike as EnvLike
from policyopt.control.environments import make_vector_env as make_vector_env
from policyopt.control.evaluation import *
from policyopt.control.policies import *
from policyopt.control.ppo import *
from policyopt.control.reinforce import *
from policyopt.control.results import TrainResult as TrainResult
from policyopt.control.results import Update as Update
from policyopt.control.rollouts import *
from policyopt.control.steps import Steps as Steps
from policyopt.control.steps import estimate_advantages as estimate_advantages
from policyopt.control.trpo import *
from policyopt.runs import History as History
from policyopt.runs import TrainingDivergedError as TrainingDivergedError
from policyopt.runs import train_seeds as train_seeds

if not _typing.TYPE_CHECKING:  # type checkers follow the stars
    __all__ = _public_names(globals())
