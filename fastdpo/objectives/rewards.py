"""The loss of a reward model: its rewards r(x, y) stand where an objective finds log-probs."""

import torch.nn.functional as F
from torch import Tensor

from fastdpo.objectives.seam import Decomposable, Term
from fastdpo.records import ResponseLogps


def bradley_terry(logps: ResponseLogps) -> Tensor:
    """-log sigmoid(r(x, y_w) - r(x, y_l) - margin), f32[P]: the likelihood of a choice by Bradley and Terry
    (1952, Rank analysis of incomplete block designs), with the margin m(r) of Llama 2 (Touvron et al. 2023,
    arXiv 2307.09288, eq. 2), which is the pair's offset."""
    rewards = logps.logp
    return -F.logsigmoid(rewards[logps.winner] - rewards[logps.loser] - logps.offset)


BRADLEY_TERRY = Decomposable(
    name="bradley_terry",
    beta=None,
    needs_reference=False,
    needs=frozenset({"pairs"}),
    of_rewards=True,
    terms=(Term(bradley_terry),),
)
