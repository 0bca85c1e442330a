"""Preference objectives: pure functions of ResponseLogps.

An objective returns a SUM and says how each group counts towards the step's normaliser; the trainer
divides by the count over the whole step, so the result does not depend on how a step is cut into
microbatches.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch.nn.functional as F
from torch import Tensor

from fastdpo.config import Config
from fastdpo.errors import ConfigError
from fastdpo.records import PreferenceGroup, ResponseLogps


def dpo_sigmoid(logps: ResponseLogps, beta: float, label_smoothing: float = 0.0) -> Tensor:
    """DPO's loss of each pair, f32[P].

    Rafailov et al. 2023, eq. 7: -log sigmoid(beta * h) with h the difference of the pair's log-ratios.
    With label_smoothing eps > 0 conservative DPO (Mitchell 2023, eq. 3):
    -(1 - eps) log sigmoid(beta * h) - eps log sigmoid(-beta * h). A pair's offset (ODPO, Amini et al.
    2024, eq. 6) is subtracted from beta * h. TRL 1.16 accepts label_smoothing here and ignores it.
    """
    ratio = logps.log_ratio
    z = beta * (ratio[logps.winner] - ratio[logps.loser]) - logps.offset
    return -(1 - label_smoothing) * F.logsigmoid(z) - label_smoothing * F.logsigmoid(-z)


def sft(logps: ResponseLogps) -> Tensor:
    """Negative log-likelihood of each chosen response, summed over its tokens, f32[C]."""
    return -logps.logp[logps.chosen]


@dataclass(frozen=True)
class Objective:
    """What the trainer needs to know of an objective."""

    name: str
    loss_sum: Callable[[ResponseLogps], Tensor]  # -> scalar, not yet normalised
    count: Callable[[PreferenceGroup], float]  # a group's share of the step's normaliser
    needs_reference: bool
    only_chosen: bool = False  # the other responses are not computed at all
    stats: tuple[str, ...] = ()  # the token_stats it reads

    def select(self, group: PreferenceGroup) -> PreferenceGroup:
        """The part of a group that this objective computes."""
        return group.only_chosen() if self.only_chosen else group


def make_objective(config: Config) -> Objective:
    """The objective that a config names. Raises ConfigError for an unknown name."""
    if config.objective == "sigmoid":
        return Objective(
            name="sigmoid",
            loss_sum=lambda logps: (
                logps.weight * dpo_sigmoid(logps, config.beta, config.label_smoothing)
            ).sum(),
            count=lambda group: len(group.pairs),
            needs_reference=True,
        )
    if config.objective == "sft":
        return Objective(
            name="sft",
            loss_sum=lambda logps: sft(logps).sum(),
            count=lambda group: group.scored_tokens,
            needs_reference=False,
            only_chosen=True,
        )
    raise ConfigError(f"objective: {config.objective!r} is not one of sigmoid, sft")
