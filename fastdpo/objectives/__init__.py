"""Preference objectives: pure functions of ResponseLogps, by name, with what each needs of rows and trainer.

    objective = make("odpo", beta=0.5, alpha=0.5)
    objective.whole(logps)                          # the loss of a whole batch
    objective.part(logps, objective.counts(groups)) # what one microbatch of a step adds, where it decomposes

The losses themselves are in dpo.py (log-ratios), shifted.py (margins and penalties), reference_free.py,
batch.py (more than one pair at a time) and on_policy.py (scored samples); tokens.py holds what is done to the
tokens before. TDPO is not here: it needs the full-vocabulary KL from the reference at each token, which
ResponseLogps does not carry.
"""

from fastdpo.objectives import batch, dpo, on_policy, reference_free, shifted, tokens
from fastdpo.objectives.catalogue import objectives_table, table
from fastdpo.objectives.checks import check_rows
from fastdpo.objectives.make import make, make_objective
from fastdpo.objectives.seam import UNITS, Coupled, Decomposable, Objective, Rescaled, Reward, Term, Unit

__all__ = ["UNITS", "Coupled", "Decomposable", "Objective", "Rescaled", "Reward", "Term", "Unit"]
__all__ += ["check_rows", "make", "make_objective", "objectives_table", "table"]
__all__ += ["batch", "dpo", "on_policy", "reference_free", "shifted", "tokens"]
