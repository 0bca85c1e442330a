"""The fused lm_head: target log-probs without a [tokens, vocab] matrix. Needs torch only."""

from . import reference
from .linear_logp import linear_logp
from .plan import MEMORY_BUDGET, Plan, plan

__all__ = ["MEMORY_BUDGET", "Plan", "linear_logp", "plan", "reference"]
