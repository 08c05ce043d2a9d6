"""Language models as policies: SFT, reward models, PPO, DPO, KTO and GRPO on any
Hugging Face causal language model.
"""

import typing as _typing
from importlib.util import find_spec as _find_spec

if _find_spec("transformers") is None:
    raise ImportError(
        "policyopt.lm needs transformers: "
        "pip install 'transformers>=5' 'accelerate>=1.0'"
    )

from policyopt import _public_names
from policyopt.lm.batches import *
from policyopt.lm.config import LMConfig as LMConfig
from policyopt.lm.data import *
from policyopt.lm.dpo import *
from policyopt.lm.environments import *
from policyopt.lm.grpo import *
from policyopt.lm.kto import *
from policyopt.lm.log_probs import *
from policyopt.lm.models import *
from policyopt.lm.ppo import *
from policyopt.lm.ranking import *
from policyopt.lm.results import *
from policyopt.lm.reward_model import *
from policyopt.lm.rewards import *
from policyopt.lm.sampling import *
from policyopt.lm.sequences import Sequences as Sequences
from policyopt.lm.sequences import hidden_states as hidden_states
from policyopt.lm.sft import *
from policyopt.runs import History as History
from policyopt.runs import TrainingDivergedError as TrainingDivergedError
from policyopt.runs import _warn_renamed
from policyopt.runs import train_seeds as train_seeds

if not _typing.TYPE_CHECKING:  # type checkers follow the stars
    __all__ = _public_names(globals())

    def __getattr__(name):
        renamed = {
            "train_ppo_lm": "train_ppo",
            "PPOLMConfig": "PPOConfig",
            "PPOLMUpdate": "PPOUpdate",
        }
        if name not in renamed:
            raise AttributeError(f"module 'policyopt.lm' has no attribute {name!r}")
        _warn_renamed("policyopt.lm", name, renamed[name])
        return globals()[renamed[name]]
