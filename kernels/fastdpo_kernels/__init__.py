"""The fused lm_head: target log-probs without a [tokens, vocab] matrix. Needs torch only."""

from . import reference
from .linear_dpo import linear_dpo
from .linear_logp import linear_logp
from .modules import FusedLinearCrossEntropyLoss, LinearCrossEntropy
from .plan import MEMORY_BUDGET, Plan, default_budget, plan
from .reference import DPOStats
from .tiles import avoid, backend

__all__ = ["MEMORY_BUDGET", "DPOStats", "FusedLinearCrossEntropyLoss", "LinearCrossEntropy", "Plan", "avoid"]
__all__ += ["backend", "default_budget", "linear_dpo", "linear_logp", "plan", "reference"]
