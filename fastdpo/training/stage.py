"""One stage of a run: one objective on one data set, from the stage's start weights to its last step."""

import contextlib
import itertools
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from fastdpo.data.dealing import deal_step
from fastdpo.data.mismatched import beside, mismatched
from fastdpo.data.packing import Packing, epoch_steps, in_row_order
from fastdpo.data.store.stored import as_whole, facts_of, joined, taken
from fastdpo.distributed.shards import whole
from fastdpo.model.experts import Balance, coefficient
from fastdpo.model.flops import Counted
from fastdpo.model.policy import Policy
from fastdpo.objectives import Rescaled
from fastdpo.optim.optimizers import make_optimizer, set_schedule
from fastdpo.records import Groups, PackedGroups, PreferenceGroup, ResponseLogps
from fastdpo.reference.columns import ReferenceColumns
from fastdpo.reference.fill import ReferenceTable
from fastdpo.training.accumulate import Accumulator, NotFinite
from fastdpo.training.evaluating import evaluate
from fastdpo.training.failures import Explain, memory_guard, not_finite, update_guard
from fastdpo.training.job import RESCALES, StageJob, step_groups, total_steps
from fastdpo.training.metrics import (
    Progress,
    Sums,
    add_kl,
    add_metrics,
    counts_of,
    drift,
    peak_memory_gb,
)
from fastdpo.training.speed import Pace


class Stage:
    """Make it before the first step, while the policy stands at the stage's start weights. `reference` is set
    before `run` where the objective needs one: `reference.of(groups)` gives the reference's token log-probs
    of a microbatch. `explain` says more of one that memory ends at."""

    def __init__(self, job: StageJob, policy: Policy, groups, eval_groups, explain: Explain | None = None):
        self.job, self.policy, self.explain = job, policy, explain
        self.world = policy.world
        policy.adds_to_grad = not self.world.sharded  # whose gradients FSDP2 takes from the backward
        self.reference: ReferenceTable | ReferenceColumns | None = None
        self.old: ReferenceTable | None = None  # of a round, where it does not refer to what sampled
        self.objective = job.objective
        self.balance, self.unbalanced = self.balance_of()
        self.eval_groups = self.selected(eval_groups)
        self.eval_mismatched = self.mismatched_of(self.eval_groups)
        self.take(groups)
        self.per_epoch: float = math.ceil(len(self.groups) / job.batch_size)
        self.total = total_steps(job, len(self.groups))
        self.counted, self.pace = Counted.of(policy), Pace()
        self.drifts: list[Tensor] | None = None  # of the first step's microbatches, while it runs
        self.last_aside: tuple = (None, [])  # (groups, what is aside of them)
        self.ahead: tuple = (None, None)  # (groups, the same packed) of a microbatch that is to come

    def take(self, groups: Groups) -> None:
        """Makes these the rows that train."""
        self.groups = self.selected(groups)
        self.mismatched = self.mismatched_of(self.groups)

    def selected(self, groups: Groups) -> Groups:
        groups = self.objective.select(groups)
        return as_whole(groups) if self.balance else groups

    def mismatched_of(self, groups: Groups) -> Groups:
        return mismatched(groups, self.job.max_length) if self.objective.mismatched else []

    def balance_of(self) -> tuple[Balance | None, str]:
        """(the balance loss of a mixture of experts, or of one why it is off)."""
        if self.objective.of_rewards:
            return None, ""  # as in TRL
        coef, off = coefficient(self.policy.core.config, self.job.router_aux_loss_coef)
        if coef and isinstance(self.objective, Rescaled):
            return None, RESCALES.format(self.objective.name)
        return (Balance(self.policy, coef) if coef else None), off

    def run(self, run, resumed=None) -> Progress:
        """Trains to the end, or from the checkpoint `resumed`; `run` (a run.Run) knows the place.
        Raises Stopped after a signal, with a checkpoint written."""
        optimizer, schedule = make_optimizer(self.policy, self.job.optim, self.total)
        progress, done = Progress(), resumed.steps if resumed else 0
        progress.window.ranks = self.world.size
        with contextlib.closing(optimizer), run.log.bar(self.objective.name, done, self.total):
            eval_batches = self.in_row_order(self.eval_groups)
            if resumed:  # the reference is made: the start weights are needed no more
                progress = Progress.restored(resumed.state["progress"], self.policy.device, self.world)
                resumed.load_weights(self.policy)
                resumed.load_optimizer(optimizer)
                set_schedule(schedule, progress.steps)
            settle = lambda: self.settle(run, progress, eval_batches, optimizer)
            for groups, following in self.steps(run, progress, settle, schedule):
                self.pace.begin()
                step = run.place.first + progress.steps + 1
                norm = self.step(groups, progress, step, optimizer, following)
                if self.drifts is not None:
                    most = torch.stack(self.drifts).max() if self.drifts else 0.0
                    run.tell_drift(self.world.max(float(most)))
                    self.drifts = None
                progress.window.sums.add("grad_norm", norm)
                progress.window.sums.add("learning_rate", schedule.get_last_lr()[0])
                with self.updating(step, groups, progress):
                    optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                schedule.step()
                progress.steps += 1
                self.pace.stepped()
                self.log_step(run, progress)
                settle()
        return progress

    def steps(self, run, progress: Progress, settle, schedule) -> Iterator[tuple[Groups, Groups]]:
        """(the groups of a step, those of the next one) from where the stage stands; the next step is asked
        for once this one is done."""
        if not progress.evaluated:
            settle()
        self.drifts = [] if self.reference and progress.steps == 0 else None
        steps = step_groups(self.groups, self.job, self.total, progress.steps)
        yield from itertools.pairwise(itertools.chain(steps, [[]]))

    def due(self, steps: int, every: int | None) -> bool:
        return steps == self.total or bool(every and steps and steps % every == 0)

    def log_step(self, run, progress: Progress) -> None:
        i, job, window = progress.steps, self.job, progress.window
        window.idle.read()
        left = self.seconds_left(i)
        run.log.advance(window, left)
        if self.due(i, job.logging_steps):
            window.sums.all_to_first(self.world)
            window.memory = self.world.max(peak_memory_gb())
            run.log.train(run.place.first + i, i / self.per_epoch, window, left)
            progress.window = window.next()
        run.log.estimate(run.place.first + i, self.total - i, self.pace, left)
        evaluates = self.due(i, job.eval_steps) or (job.load_best and self.due(i, job.save_steps))
        progress.evaluated, progress.eval_loss = not evaluates, None

    def seconds_left(self, steps: int) -> float:
        """Of this stage, after so many steps, about."""
        due = lambda every: -(-self.total // every) - steps // every  # the last step's too
        saves = due(self.job.save_steps or self.total)
        checks = max(due(self.job.eval_steps or self.total), saves if self.job.load_best else 0)
        return self.pace.left(self.total - steps, held_out=checks, checkpoint=saves)

    def settle(self, run, progress: Progress, eval_batches, optimizer) -> None:
        """Evaluates and saves where due; after a signal saves and raises Stopped."""
        with progress.window.paused():
            if not progress.evaluated:
                with self.pace.of("held_out"):
                    evaluate(self, eval_batches, run, progress)
            due, stop = self.due(progress.steps, self.job.save_steps), run.stopping.requested()
            if (stop and progress.steps) or due:
                # what only a signal made must not be the best, or the run would end as no other
                with self.pace.of("checkpoint"):
                    run.save(optimizer, progress, may_be_best=due)
        if stop or due:  # a signal since then waits for the next step: it would find this one not saved
            run.stopping.check()

    def step(self, groups: Groups, progress: Progress, step: int, optimizer=None, following=None):
        """Forward and backward of one optimizer step, in microbatches; returns the gradient norm, before
        clipping. The gradient is that of the whole step's loss however the step was cut. Under
        optimizer_in_backward the optimizer is needed, and has updated the weights. `following`: the next
        step's groups, to begin with while the device computes this one."""
        window, counts = progress.window, Counter[str]()

        def see(batch: PackedGroups, logps: ResponseLogps) -> None:
            if self.drifts is not None:
                self.drifts.append(drift(logps, self.reference.per_token))  # type: ignore[union-attr]
            self.add_metrics(window.sums, logps)
            counts.update(counts_of(batch, self.counted.flops(batch) if self.counted else 0))

        parameters, in_backward = self.policy.trained(), self.job.optim.optimizer_in_backward
        accumulator = Accumulator(
            parameters=parameters,
            microbatches=self.microbatches,
            score=self.score,
            guard=lambda batch: window.idle.busy(memory_guard(step, batch, self.explain)),
            see=see,
            memory=dict(progress.memory),
            in_backward=optimizer if in_backward else None,
            balance=self.balance.coef if self.balance else 0.0,
            world=self.world,
        )
        try:
            done = accumulator.run(self.objective, groups, self.aside(groups))
        except NotFinite as stop:
            raise not_finite(step, *stop.args) from None
        self.world.sum_gradients(parameters)
        clip, limit = torch.nn.utils.clip_grad_norm_, self.job.optim.max_grad_norm or math.inf
        with self.updating(step, groups, progress):
            norm = optimizer.end_backward() if in_backward else whole(clip(parameters, limit))
        if following:
            self.look_ahead(following)
        if not math.isfinite(float(done.loss + norm)):
            raise not_finite(step, done.of_all(self.world), norm, updated=in_backward)
        window.sums.add("loss", done.loss)
        counts["first_pass"] = done.scored_first
        window.count(counts, self.world)
        if "z0" in done.context:
            window.sums.add("z0", done.context["z0"])
        if self.balance:
            window.sums.add("aux_loss", done.aux_loss)
        progress.memory = accumulator.memory
        return norm

    def updating(self, step: int, groups: Groups, progress: Progress):
        """What goes around the update by these groups."""
        offloaded = self.job.optim.offload_optimizer
        guard = update_guard(step, lambda: self.policy.pack([groups[0]]), offloaded, self.explain)
        return progress.window.idle.busy(guard)

    @torch.no_grad()
    def add_metrics(self, sums: Sums, logps: ResponseLogps) -> None:
        add_metrics(sums, self.objective, logps)
        if self.reference and self.reference.per_token:
            add_kl(sums, logps)

    @property
    def caps(self) -> tuple[int, int | None, bool]:
        """What a step is cut by: most tokens, most scored ones, whether prompts are shared."""
        return self.job.max_tokens, self.policy.max_scored, self.policy.share

    def cut(self, groups: Groups) -> tuple[list[list[PreferenceGroup]], bool]:
        """(this rank's microbatches of one step's groups, as many as every other rank's; whether the last one
        stands in for none)."""
        rounds = deal_step(groups, self.world.size, *self.caps)
        parts = [one[self.world.rank] for one in rounds]
        if not parts or parts[-1]:
            return parts, False
        some = [part for part in rounds[-1] if part]
        return [*parts[:-1], min(some, key=lambda part: sum(g.input_tokens for g in part))], True

    def microbatches(self, groups: Groups) -> Packing:
        parts, stands_in = self.cut(groups)
        return Packing(parts, self.packed, stands_in)

    def packed(self, part: Groups) -> PackedGroups:
        """One microbatch, with the reference's log-probs."""
        groups, batch = self.ahead
        if part == groups:  # the very same ones
            self.ahead = None, None
            return batch
        batch = self.policy.pack(part)
        old = self.old.of(part) if self.old else None
        known = self.reference.of(part) if self.reference else None
        return replace(batch, ref_token_logp=known, old_token_logp=old)

    def look_ahead(self, following: Groups) -> None:
        """Packs what a step begins with, for nothing else would be done while the device is waited for."""
        first = self.aside(following) or following[: getattr(self.objective, "within", None)]
        part = self.cut(first)[0][0]
        self.ahead = part, self.packed(part)

    def score(self, batch: PackedGroups, stats=()) -> ResponseLogps:
        """The policy's log-probs of a microbatch beside the reference's, and what the objective reads."""
        batch = batch.to(self.policy.device)
        stats = tuple(dict.fromkeys((*self.objective.stats, *stats)))
        balance = self.balance
        routed: list[tuple[Tensor, ...]] = []
        with balance.recorded(routed) if balance else contextlib.nullcontext():
            out = self.policy.token_logp(batch, stats)
        token_logp, token_stats = out if stats else (out, {})
        logps = ResponseLogps.of(batch, token_logp, batch.ref_token_logp, token_stats)
        return replace(logps, aux_loss=balance.loss(routed, batch)) if balance else logps

    def in_row_order(self, groups: Groups) -> Packing:
        """Rows packed as the reference packs what it computes: equal models then agree bit by bit."""
        return Packing(in_row_order(groups, self.job.max_tokens, self.policy.share), self.packed)

    def aside(self, groups: Groups) -> Groups:
        """The mismatched groups beside these training rows, where the objective looks at them; the very same
        ones where they are asked for again at once."""
        last, found = self.last_aside
        if last is not groups:
            rows = [group.row for group in groups]
            found = list(beside(self.mismatched, rows)) if self.mismatched else []
            self.last_aside = groups, found
        return found

    def reference_sets(self) -> list[Groups]:
        """What the reference must know: training rows (all, unless max_steps ends before one pass) and what
        lies beside them, held-out rows, and what lies beside those."""
        used = self.groups
        if self.total < self.per_epoch:
            steps = epoch_steps(len(used), self.job.batch_size, self.job.seed)
            used = taken(used, np.sort(np.concatenate(list(itertools.islice(steps, self.total)))))
        sets = [used, self.eval_groups]
        if self.objective.mismatched:
            sets[0] = joined(used, beside(self.mismatched, facts_of(used).row))
        return [*sets, self.eval_mismatched]
