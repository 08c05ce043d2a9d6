"""Reinforcement learning on Gymnasium environments: REINFORCE, TRPO and PPO as plain
functions.
"""

from policyopt.control.config import ActorCriticConfig, ControlConfig
from policyopt.control.environments import EnvLike, make_vector_env
from policyopt.control.evaluation import Evaluation, evaluate
from policyopt.control.policies import (
    CategoricalPolicy,
    Critic,
    GaussianPolicy,
    ObservationEncoder,
    Policy,
    make_policy,
)
from policyopt.control.ppo import PPOConfig, PPOUpdate, ppo_loss, train_ppo
from policyopt.control.reinforce import (
    ReinforceConfig,
    ReinforceUpdate,
    reinforce_loss,
    reinforce_weights,
    train_reinforce,
)
from policyopt.control.results import TrainResult, Update
from policyopt.control.rollouts import Collector, Episodes, Rollout, sample_episodes
from policyopt.control.steps import Steps, estimate_advantages
from policyopt.control.trpo import TRPOConfig, TRPOUpdate, train_trpo, trpo_loss
from policyopt.runs import History, TrainingDivergedError, train_seeds

__all__ = [
    "ActorCriticConfig",
    "CategoricalPolicy",
    "Collector",
    "ControlConfig",
    "Critic",
    "EnvLike",
    "Episodes",
    "Evaluation",
    "GaussianPolicy",
    "History",
    "ObservationEncoder",
    "PPOConfig",
    "PPOUpdate",
    "Policy",
    "ReinforceConfig",
    "ReinforceUpdate",
    "Rollout",
    "Steps",
    "TRPOConfig",
    "TRPOUpdate",
    "TrainResult",
    "TrainingDivergedError",
    "Update",
    "estimate_advantages",
    "evaluate",
    "make_policy",
    "make_vector_env",
    "ppo_loss",
    "reinforce_loss",
    "reinforce_weights",
    "sample_episodes",
    "train_ppo",
    "train_reinforce",
    "train_seeds",
    "train_trpo",
    "trpo_loss",
]
