"""Language models as policies: SFT, reward models, PPO, DPO and GRPO on any Hugging
Face causal language model.
"""

import policyopt.lm._requirements  # noqa: F401 - says what is missing, before anything else fails
from policyopt.lm.config import LMConfig
from policyopt.lm.data import Prompt, read_records
from policyopt.lm.dpo import DPOConfig, DPOUpdate, ImplicitReward, train_dpo
from policyopt.lm.grpo import GRPOConfig, GRPOUpdate, train_grpo
from policyopt.lm.log_probs import TokenLogProbs, completion_log_probs
from policyopt.lm.models import LanguageModel, LoRA, RewardModel, add_lora, load
from policyopt.lm.ppo import PPOConfig, PPOUpdate, train_ppo
from policyopt.lm.ranking import (
    OnlineRankingConfig,
    RankingConfig,
    RankingUpdate,
    train_ranking,
)
from policyopt.lm.results import LMResult, LMUpdate, LoggedSample
from policyopt.lm.reward_model import (
    RewardConfig,
    RewardUpdate,
    pair_accuracy,
    train_reward_model,
)
from policyopt.lm.rewards import compute_rewards
from policyopt.lm.sampling import (
    Sampler,
    Samples,
    SamplingConfig,
    TransformersSampler,
    UpdatedSampler,
    VLLMSampler,
    generate,
)
from policyopt.lm.sequences import Sequences, hidden_states
from policyopt.lm.sft import SFTConfig, SFTUpdate, train_sft
from policyopt.runs import History, TrainingDivergedError, train_seeds

__all__ = [
    "DPOConfig",
    "DPOUpdate",
    "GRPOConfig",
    "GRPOUpdate",
    "History",
    "ImplicitReward",
    "LMConfig",
    "LMResult",
    "LMUpdate",
    "LanguageModel",
    "LoRA",
    "LoggedSample",
    "OnlineRankingConfig",
    "PPOConfig",
    "PPOUpdate",
    "Prompt",
    "RankingConfig",
    "RankingUpdate",
    "RewardConfig",
    "RewardModel",
    "RewardUpdate",
    "SFTConfig",
    "SFTUpdate",
    "Sampler",
    "Samples",
    "SamplingConfig",
    "Sequences",
    "TokenLogProbs",
    "TrainingDivergedError",
    "TransformersSampler",
    "UpdatedSampler",
    "VLLMSampler",
    "add_lora",
    "completion_log_probs",
    "compute_rewards",
    "generate",
    "hidden_states",
    "load",
    "pair_accuracy",
    "read_records",
    "train_dpo",
    "train_grpo",
    "train_ppo",
    "train_ranking",
    "train_reward_model",
    "train_seeds",
    "train_sft",
]
