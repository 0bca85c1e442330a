"""The gradients of one optimizer step: exact over the whole step, however it is cut into microbatches and
dealt to ranks, but for a mixture of experts' balance loss, which is a mean over microbatches.

Each rank goes through its own microbatches, as many as every other one (the last may stand in for none).
Counts are the whole step's, so its ranks' parts, and their gradients, just add up.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fastdpo.data.packing import Packing
from fastdpo.distributed.shards import part as held
from fastdpo.distributed.world import ALONE, World
from fastdpo.objectives.batch import kto_z0
from fastdpo.objectives.seam import Coupled, Decomposable, Rescaled
from fastdpo.optim.stepping import InBackward
from fastdpo.records import Groups, PackedGroups, ResponseLogps

LossOf = Callable[[ResponseLogps], Tensor]
_ROOM = 30.0  # weights up to e^30 beside the first microbatch's, before the sums are re-based


@dataclass
class StepLoss:
    """A step's loss, and what each microbatch was like, to find the rows where it is no number."""

    loss: Tensor | float = 0.0
    parts: list[Tensor] = field(default_factory=list)
    rows: list[tuple[int, ...]] = field(default_factory=list)
    scored_first: int = 0  # input tokens of forwards without gradient
    context: dict = field(default_factory=dict)  # what the objective was told of the step
    responses: int = 0  # of all its microbatches
    aux_loss: Tensor | float = 0.0  # a mixture's balance loss: the microbatches' mean, by their responses

    def of_all(self, world: World) -> "StepLoss":
        """With the microbatches of all ranks, to find the rows; collective."""
        ranks = world.gather([(part.cpu(), rows) for part, rows in zip(self.parts, self.rows)])
        parts, rows = zip(*(one for some in ranks for one in some))
        return replace(self, parts=list(parts), rows=list(rows))


class NotFinite(Exception):
    """A loss that is no number, before any weight was updated by it; its argument is the StepLoss."""


@dataclass
class Accumulator:
    """How to go through a step, by the kind of its objective."""

    parameters: Sequence[Tensor]
    microbatches: Callable[[Groups], Packing]  # each packed when it is asked for
    score: Callable[[PackedGroups], ResponseLogps]
    guard: Callable[[PackedGroups], AbstractContextManager]  # around a microbatch's work
    see: Callable[[PackedGroups, ResponseLogps], None]  # what else is done with each microbatch's log-probs
    memory: dict[str, float]  # what a Coupled objective carries from step to step
    in_backward: InBackward | None = None  # the optimizer, where it updates in the last backward
    balance: float = 0.0  # what the balance loss of scored microbatches is multiplied by
    world: World = ALONE

    def run(self, objective, groups: Groups, aside: Groups) -> StepLoss:
        """The gradients of the step's loss, in the parameters, or the updates by them. `aside`: KTO's
        mismatched groups. Raises NotFinite before a backward that would update."""
        step = StepLoss(responses=sum(len(group.responses) for group in groups))
        if objective.mismatched:
            with torch.no_grad():
                first = [(batch, self._first(batch, step)) for batch in self.microbatches(aside)]
                step.context = context_of(self._of_all(first)[0], self.parameters[0].device)
        kinds: dict[type, Callable]
        kinds = {Decomposable: self._decomposable, Rescaled: self._rescaled, Coupled: self._coupled}
        kinds[type(objective)](objective, groups, step)
        if self.balance:
            step.aux_loss = self.world.sum_of(torch.as_tensor(step.aux_loss))
            step.loss = step.loss + self.balance * step.aux_loss
        return step

    def _decomposable(self, objective: Decomposable, groups: Groups, step: StepLoss) -> None:
        """Each microbatch's part is divided by the whole step's counts, so the parts just add up."""
        counts = objective.counts(groups)
        part = lambda logps: objective.part(replace(logps, context=step.context), counts)
        losses = [
            self._at_once(batch, part, step, is_last) for batch, is_last in ending(self.microbatches(groups))
        ]
        step.loss = self.world.sum_of(torch.stack(losses).double().sum())

    def _at_once(self, batch: PackedGroups, loss_of: LossOf, step: StepLoss, is_last: bool) -> Tensor:
        """The backward of a microbatch's loss; returns that, without the balance loss."""
        with self.guard(batch):
            logps = self.score(batch)
            part = loss_of(logps) if not batch.stands_in else nothing(logps)
            balance = self._balance(batch, logps, step)
            loss = part if balance is None else part + balance
            self._before_backward(step, {batch.rows: loss.detach()}, is_last)
            loss.backward()
        self._seen(step, batch, logps, loss.detach())
        return part.detach()

    def _rescaled(self, objective: Rescaled, groups: Groups, step: StepLoss) -> None:
        """Sums exp((shift - loss) / T) * gradient over the microbatches and divides by the sum of the
        weights at the end: Wu et al. 2024, eq. 13, with no second forward."""
        running = _RunningWeights(objective.temperature, self.world)
        for batch in self.microbatches(groups):
            with self.guard(batch):
                logps = self.score(batch)
                losses = objective.term.losses(logps)
                pair_weight = torch.zeros_like(logps.weight) if batch.stands_in else logps.weight
                weights, rebase = running.add(losses.detach(), pair_weight)
                if rebase is not None:
                    self._scale_gradients(rebase)
                ((weights * losses).sum() if not batch.stands_in else nothing(logps)).backward()
            self._seen(step, batch, logps, losses.detach().sum())
        self._scale_gradients(1 / running.total_of_all())
        step.loss = running.loss()

    def _coupled(self, objective: Coupled, groups: Groups, step: StepLoss) -> None:
        """The loss of all responses as one, by its slopes at their log-probs (gradient caching, Gao et al.
        2021): several microbatches are scored without gradient first, a single one is not."""
        pairs = sum(len(group.pairs) for group in groups)
        size = objective.within or len(groups)

        def whole(share: float, logps: ResponseLogps) -> Tensor:
            if objective.remember is not None:  # the running memory has this batch's part too
                self.memory = objective.remember(logps.detached(), self.memory)
            return share * objective.whole(replace(logps, context=step.context | self.memory))

        for some, is_last in ending([groups[i : i + size] for i in range(0, len(groups), size)]):
            share = sum(len(group.pairs) for group in some) / pairs if objective.within else 1.0
            batches = self.microbatches(some)
            if len(batches) == self.world.size == 1:
                (batch,) = batches
                loss = self._at_once(batch, partial(whole, share), step, is_last)
            else:
                loss = self._by_slopes(batches, partial(whole, share), step, is_last)
            step.loss = step.loss + loss.double()

    def _by_slopes(self, batches, loss_of: LossOf, step: StepLoss, is_last: bool) -> Tensor:
        """The loss of the microbatches of all ranks as one, and the backward of this rank's. A rank's only
        one is scored once, with gradient."""
        twice = len(batches) > 1
        with torch.set_grad_enabled(not twice):
            batches, scored = zip(*[(batch, self._first(batch, step, twice)) for batch in batches])
        all_of_them, place = self._of_all([(b, logps.detached()) for b, logps in zip(batches, scored)])
        joined = ResponseLogps.joined(all_of_them)
        joined = replace(joined, token_logp=joined.token_logp.requires_grad_())
        loss = loss_of(joined)
        (slope,) = torch.autograd.grad(loss, joined.token_logp)
        sizes = [0 if batch.stands_in else len(batch.target) for batch in batches]
        mine = slice(place, place + sum(sizes))
        slopes_of, first = slope[mine].split(sizes), joined.token_logp.detach()[mine].split(sizes)
        parts = {batch.rows: (a * b).sum() for batch, a, b in zip(batches, first, slopes_of)}
        given = [None if twice else logps for logps in scored]
        del scored, all_of_them  # with all that went to the GPU
        for (batch, slopes, logps), ends in ending(list(zip(batches, slopes_of, given))):
            with self.guard(batch):
                logps = logps or self.score(batch)
                slopes = torch.zeros_like(logps.token_logp) if batch.stands_in else slopes
                part, down = (logps.token_logp.detach() * slopes).sum(), [(logps.token_logp, slopes)]
                if (balance := self._balance(batch, logps, step)) is not None:
                    part = parts[batch.rows] = part + balance.detach()
                    down += [(balance, None)] if balance.requires_grad else []
                self._before_backward(step, parts, is_last and ends)
                tensors, gradients = zip(*down)
                torch.autograd.backward(tensors, gradients)
            self._seen(step, batch, logps, part)
        return loss.detach()

    def _of_all(self, scored: list[tuple[PackedGroups, ResponseLogps]]) -> tuple[list[ResponseLogps], int]:
        """(the log-probs of all ranks' microbatches, rank after rank, without stand-ins; where this rank's
        begin in their scored tokens). All ranks have them in this order."""
        mine = [logps for batch, logps in scored if not batch.stands_in]
        ranks = of_ranks(self.world, mine, self.parameters[0].device)
        before = sum(len(logps.token_logp) for some in ranks[: self.world.rank] for logps in some)
        return [logps for some in ranks for logps in some], before

    def _balance(self, batch: PackedGroups, logps: ResponseLogps, step: StepLoss) -> Tensor | None:
        """What a microbatch's balance loss adds to the step's loss. It is no mean of single tokens, so a
        step's depends on the cut: as TRL's does, the mean over the microbatches, by their responses."""
        if logps.aux_loss is None:
            return None
        responses = 0 if batch.stands_in else len(logps.cu_resp) - 1
        part = logps.aux_loss * (responses / step.responses)
        step.aux_loss = step.aux_loss + part.detach()
        return self.balance * part

    def _before_backward(self, step: StepLoss, parts: dict, is_last: bool) -> None:
        """Before the step's last backward, where that one updates weights: makes sure that the loss is a
        number, as nothing could be undone, and announces it. parts: {rows: part} of microbatches not yet
        seen, or of more."""
        if self.in_backward is None or not is_last:
            return
        parts = dict(zip(step.rows, step.parts)) | parts
        if not torch.stack(list(parts.values())).isfinite().all():
            step.rows, step.parts = list(parts), list(parts.values())
            step.loss = torch.stack(step.parts).double().sum()
            raise NotFinite(step)
        self.in_backward.last_microbatch()

    def _first(self, batch: PackedGroups, step: StepLoss, again: bool = True) -> ResponseLogps:
        step.scored_first += batch.input_tokens if again and not batch.stands_in else 0
        with self.guard(batch):
            return self.score(batch)

    def _seen(self, step: StepLoss, batch: PackedGroups, logps: ResponseLogps, part: Tensor) -> None:
        if batch.stands_in:
            return
        step.parts.append(part)
        step.rows.append(batch.rows)
        self.see(batch, logps)

    def _scale_gradients(self, factor: Tensor) -> None:
        # bf16 gradients would round a tensor without dimensions to bf16 first, as _foreach_mul_ on the CPU
        # would; a number is not rounded, but a GPU's has to be waited for
        by = factor.float()[None] if factor.is_cuda else float(factor)
        for p in self.parameters:
            if p.grad is not None:
                torch.atleast_1d(held(p.grad)).mul_(by)


def nothing(logps: ResponseLogps) -> Tensor:
    """A loss whose gradient is 0, by the same backward as any."""
    return 0.0 * logps.token_logp.sum()


def of_ranks(world: World, mine: list[ResponseLogps], device) -> list[list[ResponseLogps]]:
    """The log-probs of each rank's microbatches, without gradient where there are several ranks;
    collective."""
    if world.size == 1:
        return [mine]
    ranks = world.gather([logps.kept().to("cpu") for logps in mine])
    return [[logps.to(device) for logps in some] for some in ranks]


def ending(items: Packing | list) -> Iterator[tuple]:
    """(item, whether it is the last) of each; none is made before it is due."""
    for number, item in enumerate(items, 1):
        yield item, number == len(items)


def context_of(mismatched: list[ResponseLogps], device) -> dict[str, Tensor]:
    """What the log-probs of mismatched responses say of a whole batch: KTO's reference point, 0 where no
    prompt has one."""
    return {"z0": kto_z0(ResponseLogps.joined(mismatched)) if mismatched else torch.zeros((), device=device)}


class _RunningWeights:
    """exp((shift - loss) / T) of pairs that come a microbatch at a time, and their sum. The shift is one for
    all ranks, for shards' gradients are added up over ranks in every backward."""

    def __init__(self, temperature: float, world: World):
        self.temperature, self.world = temperature, world
        self.shift: Any = None  # tensors all three, once there is a pair
        self.total: Any
        self.count: Any

    def add(self, losses: Tensor, pair_weight: Tensor) -> tuple[Tensor, Tensor | None]:
        """(the weights f32[P], None or what everything so far must be multiplied by)."""
        scaled, rebase = -losses.double() / self.temperature, None
        top = self.world.max_of(scaled.max())
        if self.shift is None:
            self.shift, self.total, self.count = top, 0.0, 0.0
        elif float(top - self.shift) > _ROOM:
            rebase = (self.shift - top).exp()
            self.shift, self.total = top, self.total * rebase
        weights = pair_weight * (scaled - self.shift).exp()
        self.total = self.total + weights.sum()
        self.count = self.count + pair_weight.double().sum()
        return weights.to(losses.dtype), rebase

    def total_of_all(self) -> Tensor:
        """The sum over all ranks, once all pairs are there; the same from then on."""
        both = self.world.sum_of(torch.stack([self.total, self.count]))
        self.total, self.count = both.unbind()
        return self.total

    def loss(self) -> Tensor:
        """-T log of the weighted mean of exp(-loss / T) over all pairs so far."""
        return -self.temperature * (self.total.log() + self.shift - self.count.log())
