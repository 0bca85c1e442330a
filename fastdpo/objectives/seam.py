"""What the trainer needs to know of an objective, and the three ways a loss may look at a step.

Decomposable: a sum over pairs, tokens or responses; any microbatch adds its part.
Rescaled:     Dr. DPO: weights that only the whole step normalises; one rescale of the gradients at its end.
Coupled:      any function of the whole step; several microbatches are scored once without gradient first.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from fastdpo.data.store.stored import only_chosen
from fastdpo.objectives.batch import drdpo
from fastdpo.records import Groups, PreferenceGroup, ResponseLogps

Reward = Callable[[ResponseLogps], Tensor]  # -> f32[R]


class Unit(NamedTuple):
    """What a loss is a mean over: how many a group holds, how many a batch, and which response each value is
    of (of a pair: the winner)."""

    of_group: Callable[[PreferenceGroup], int]
    of_logps: Callable[[ResponseLogps], int]
    responses: Callable[[ResponseLogps], Tensor]  # -> i64[n]


UNITS = {
    "pair": Unit(lambda group: len(group.pairs), lambda logps: len(logps.pairs), lambda logps: logps.winner),
    "chosen token": Unit(
        lambda group: sum(int(group.responses[i].target_mask.sum()) for i in group.chosen),
        lambda logps: int(logps.lengths[logps.chosen].sum()),
        lambda logps: logps.chosen,
    ),
    "judged response": Unit(
        lambda group: len(group.judged(True)) + len(group.judged(False)),
        lambda logps: len(logps.desirable) + len(logps.undesirable),
        lambda logps: torch.cat([logps.desirable, logps.undesirable]),
    ),
    "response": Unit(
        lambda group: len(group.responses),
        lambda logps: len(logps.cu_resp) - 1,
        lambda logps: torch.arange(len(logps.cu_resp) - 1, device=logps.cu_resp.device),
    ),
}


@dataclass(frozen=True)
class Term:
    """One loss, its options bound: `losses` gives one value a unit (a chosen response's is the sum over its
    tokens), whose sum over the step is divided by the step's units."""

    losses: Callable[[ResponseLogps], Tensor]  # -> f32[n]
    unit: str = "pair"  # a key of UNITS
    weight: float = 1.0

    def each(self, logps: ResponseLogps) -> Tensor:
        """The losses, before the term's weight; pairs count with their own."""
        losses = self.losses(logps)
        return logps.weight * losses if self.unit == "pair" else losses

    def sum(self, logps: ResponseLogps) -> Tensor:
        """The weighted sum over a batch."""
        return self.weight * self.each(logps).sum()


@dataclass(frozen=True, kw_only=True)
class Objective:
    """What all kinds have in common. `whole` is the definition; how a step is cut never changes it."""

    name: str
    beta: float | None  # None where the loss has none
    needs_reference: bool = True
    only_chosen: bool = False  # the other responses are not computed at all
    mismatched: bool = False  # it also looks at each prompt with another row's response (KTO's z0)
    stats: tuple[str, ...] = ()  # the token_stats it reads
    needs: frozenset[str] = frozenset()  # what every row must have, see checks.py
    learns_from_ties: bool = False  # also where all samples of a prompt score the same
    seen: Callable[[ResponseLogps], ResponseLogps] = lambda logps: logps  # with the token weights it applies
    reward: Reward | None = None  # of each response as `seen`, for the metrics rewards/*
    of_rewards: bool = False  # it trains a reward model, whose rewards stand in the log-probs' place

    def select(self, groups: Groups) -> Groups:
        """The part of each group that this objective computes."""
        return only_chosen(groups) if self.only_chosen else groups

    def whole(self, logps: ResponseLogps) -> Tensor:
        """The loss of a whole batch, a scalar: a mean."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Decomposable(Objective):
    """A weighted sum of terms, each a mean over the whole step: exact in any cut."""

    terms: tuple[Term, ...]

    def counts(self, groups: Sequence[PreferenceGroup]) -> list[int]:
        """Per term, the units of all these groups."""
        return [sum(UNITS[term.unit].of_group(group) for group in groups) for term in self.terms]

    def part(self, logps: ResponseLogps, counts: Sequence[int]) -> Tensor:
        """What one microbatch adds to the loss of a step with these counts."""
        parts = (term.sum(logps) / max(count, 1) for term, count in zip(self.terms, counts))
        return sum(parts)  # type: ignore[return-value]  # there is a term

    def whole(self, logps: ResponseLogps) -> Tensor:
        return self.part(logps, [UNITS[term.unit].of_logps(logps) for term in self.terms])


@dataclass(frozen=True, kw_only=True)
class Rescaled(Objective):
    """-T log mean exp(-loss / T) over a step's pairs: Dr. DPO; Wu et al. 2024, arXiv 2407.07880, eq. 12."""

    term: Term  # of pairs
    temperature: float  # the paper's beta'

    def whole(self, logps: ResponseLogps) -> Tensor:
        return drdpo(self.term.losses(logps), logps.weight, beta_prime=self.temperature)


@dataclass(frozen=True, kw_only=True)
class Coupled(Objective):
    """Any function of all responses of a step (or of each `within` of its groups, then averaged by pairs;
    held-out rows are one batch always).

    `remember(logps, memory)` moves what the objective carries from step to step (BCO's running mean) over
    a step, without gradient; the loss finds it in logps.context.
    """

    loss: Callable[[ResponseLogps], Tensor]  # -> scalar
    within: int | None = None
    remember: Callable[[ResponseLogps, dict[str, float]], dict[str, float]] | None = None

    def whole(self, logps: ResponseLogps) -> Tensor:
        return self.loss(logps)
