"""On-policy rounds: the policy answers some prompts, the answers are scored, and train as rows do. All rounds
are one stage, whose rows change: the optimizer, its schedule and the log go on."""

import itertools
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape

from fastdpo.console.formatting import counted
from fastdpo.data.mismatched import beside
from fastdpo.data.pairs import select_pairs
from fastdpo.data.store.stored import facts_of, joined, taken
from fastdpo.errors import DataError, DeadEndError
from fastdpo.files import durable
from fastdpo.model.policy import Policy
from fastdpo.objectives import check_rows
from fastdpo.optim.optimizers import set_schedule
from fastdpo.records import Groups, PreferenceGroup
from fastdpo.reference import tables
from fastdpo.reference.fill import ReferenceTable
from fastdpo.reference.fingerprint import reference_fingerprint
from fastdpo.sampling.calls import seed_of
from fastdpo.sampling.draw import Drawing
from fastdpo.sampling.generate import end_tokens, positions_of
from fastdpo.sampling.rows import Answered, RoundFile, ask, places_of
from fastdpo.sampling.scorers import Scorer
from fastdpo.training.job import Job, step_groups, total_steps
from fastdpo.training.metrics import Progress
from fastdpo.training.resume import FREE, check_start
from fastdpo.training.round_numbers import numbers_of, quiet_rounds
from fastdpo.training.stage import Stage
from fastdpo.values import as_bytes

_LOOKED_AT = 200  # rows of the data whose responses tell what ends one


def run_rounds(run, resumed) -> Progress:
    """All rounds, from the start or from a checkpoint."""
    run.log.stage = 0
    run.place.namespace = reference_fingerprint(run.policy, run.fresh_lora).namespace
    check_start(resumed.state["namespace"] if resumed else None, run.place.namespace)
    stage = RoundStage(run)
    run.place.total = stage.total
    return stage.run(run, resumed)


class RoundStage(Stage):
    """`Progress.rounds` of it: the round that trains ("number", from 1), the steps before it ("first"), how
    many rounds up to it had no pair ("quiet"), and what its files are known by ("key")."""

    def __init__(self, run):
        job = run.job.stages[0]
        seen = run.policy.processor is not None
        explain = partial(run.around.explain, run.job.config, run.policy.core.config, seen)
        super().__init__(job, run.policy, [], run.eval_groups, explain)
        self.of_run, self.rounds, self.spec = run, run.job.rounds, run.job.sample
        self.prompts, left_out = with_room(run.groups, run.policy, run.job, run.console)
        if left_out:
            run.event("no_room", rows=left_out)
        self.count = min(self.spec.prompts, len(self.prompts))
        self.planned = total_steps(job, self.count)  # steps of a round whose prompts all have a signal
        self.total = self.rounds * self.planned
        self.per_epoch = self.planned * len(self.prompts) / self.count
        self.folder = run.folder / "rounds"
        said = {name: v for name, v in run.job.settings.items() if name not in FREE - {"num_epochs"}}
        said |= {"rounds": self.rounds, "max_tokens": job.max_tokens if self.balance else None}
        self.lineage = durable.json_digest([run.place.namespace, run.data, said])
        self.say_first()

    def say_first(self) -> None:
        """What of the rounds is not as one may think."""
        say = partial(self.of_run.console.print, highlight=False, soft_wrap=True)
        if self.count < self.spec.prompts:
            say(f"sample: prompts: the rows have {self.count:,}, and a round takes all of them")
        without = int((~facts_of(self.prompts).resettable).sum())
        if self.spec.resets and without:
            say(
                f"[yellow]sample: resets: {counted(without, 'row')} of {len(self.prompts):,} have no chosen "
                "response to begin with"
            )
        if "response scores" in self.objective.needs and (self.spec.temperature, self.spec.top_p) != (1, 1):
            say(
                f"[yellow]{self.objective.name} takes samples for the policy's own, which they are at "
                "temperature 1 and top_p 1 alone"
            )

    def steps(self, run, progress: Progress, settle, schedule) -> Iterator[tuple[Groups, Groups]]:
        first = progress.rounds.get("number", 1)
        for number in range(first, self.rounds + 1):
            with progress.window.paused(), self.pace.of("round"):
                self.begin(number, progress, settle)
            before = (number - 1) * self.planned
            count = total_steps(self.job, len(self.groups)) if self.groups else 0
            if progress.rounds["quiet"] > 1:
                count, self.total = 0, progress.steps
                break
            done = progress.steps - progress.rounds["first"]
            self.total = progress.rounds["first"] + count + self.rounds * self.planned - before - self.planned
            set_schedule(schedule, before + done)
            if not progress.evaluated:
                settle()
            job = replace(self.job, seed=seed_of("order", self.job.seed, number) % 2**32)
            steps = step_groups(self.groups, job, count, done)
            yield from itertools.pairwise(itertools.chain(steps, [[]]))
        if not count:  # the end has not been seen
            if progress.window.responses:
                self.log_step(run, progress)
            progress.evaluated = False
            settle()

    def seconds_left(self, steps: int) -> float:
        rounds = (self.total - steps) / self.planned
        return super().seconds_left(steps) + int(rounds) * self.pace.last.get("round", 0.0)

    def reference_sets(self) -> list[Groups]:
        some = self.groups
        if self.objective.mismatched:
            some = joined(some, beside(self.mismatched, facts_of(some).row))
        return [some, self.eval_groups, self.eval_mismatched]

    def begin(self, number: int, progress: Progress, settle) -> None:
        """Makes a round's samples the rows that train, from its files where they are there."""
        run, is_new = self.of_run, progress.rounds.get("number") != number
        key = durable.json_digest([self.lineage, number]) if is_new else progress.rounds["key"]
        rows, images = self.sampled(number, RoundFile(self.file(number, "jsonl"), key), is_new, settle)
        groups = [one.group(images.get(one.row, ())) for one in rows]
        signal = [group for group in groups if group.pairs or self.objective.learns_from_ties]
        trained, _ = select_pairs(signal, self.job.pairs)
        self.take(trained)
        if signal:
            check_rows(self.objective, self.groups)
        known = self.tables_of(number, key, is_new, groups, settle)
        own = run.job.reference == "start"
        self.reference = known.get("start" if own else "now") if self.objective.needs_reference else None
        self.old = known.get("now") if own else None
        if not is_new:
            return
        quiet = 0 if any(group.pairs for group in groups) else progress.rounds.get("quiet", 0) + 1
        progress.rounds = {"number": number, "first": progress.steps, "quiet": quiet, "key": key}
        numbers = numbers_of(rows, groups, known)
        run.event("round", round=number, step=progress.steps, **numbers)
        run.log.round(number, self.rounds, progress.steps, numbers)
        if quiet == number > 1:
            raise DeadEndError(quiet_rounds(number, rows, ends=False))
        if quiet > 1:
            why = escape(quiet_rounds(number, rows, ends=True))
            run.console.print(f"[yellow]{why}", highlight=False, soft_wrap=True)
        if signal and not progress.steps:
            run.event("stage", stage=0, **run.log.announce(self))
        if number == 1:
            self.drifts = [] if self.reference else None

    def sampled(
        self, number: int, file: RoundFile, is_new: bool, settle
    ) -> tuple[list[Answered], dict[int, tuple]]:
        """(the round's samples, the images of their rows)."""
        run, seed = self.of_run, self.job.seed
        places = places_of(len(self.prompts), self.count, number, seed)
        asked = ask(
            [self.prompts[i] for i in places], self.spec, number, seed, limit_of(self.policy, run.job)
        )
        images = {one.group.row: one.group.images for one in asked}
        if not is_new:  # the weights are no longer those that have sampled
            found = self.world.told(file.read)
            if len(found) < len(asked) or not all(one.is_scored for one in found):
                raise _lost(file.path)
            return found, images
        drawing = drawing_of(
            run.job, self.policy, run.tokenizer, run.groups, run.scorer, run.console, self.stops(settle)
        )
        if self.world.first:
            self.folder.mkdir(exist_ok=True)
        return drawing.draw(asked, seed_of("samples", seed, number), file), images

    def file(self, number: int, kind: str):
        return self.folder / f"round-{number}.{kind}"

    def stops(self, settle):
        """What to call where a round may stop: saves what has trained, and raises Stopped, after a signal."""
        return lambda: settle() if self.of_run.stopping.requested() else None

    def tables_of(
        self, number: int, key: str, is_new: bool, groups: list[PreferenceGroup], settle
    ) -> dict[str, ReferenceTable]:
        """The log-probs of the policy as the round found it ("now"), and of a LoRA's base ("start")."""
        if not self.objective.needs_reference:
            return {}
        path = self.file(number, "safetensors")
        if stored := self.world.told(partial(tables.load, path, key)):
            return {name: tables.restored(*columns) for name, columns in stored.items()}
        if not is_new:
            raise _lost(path)
        is_lora, console = self.of_run.job.model.lora_rank is not None, self.of_run.console
        # all of them, for the KL to the start
        sets = [*self.reference_sets(), *([groups] if is_lora else [])]
        compute, stops = (
            partial(tables.computed, self.policy, sets, max_tokens=self.job.max_tokens),
            self.stops(settle),
        )
        made = {"now": compute(base=False, console=console, check=stops)}
        if is_lora and number == 1:  # it has learnt nothing
            made["start"] = made["now"]
        elif is_lora:  # nothing can be saved while the LoRA is off
            made["start"] = compute(base=True, console=Console(quiet=True), check=lambda: None)
            stops()
        if self.world.first:
            tables.save(path, key, made)
        return made


def _lost(path: Path) -> DeadEndError:
    return DeadEndError(
        f"{path} is not there as it was written, and what sampled it has been trained since: the run cannot "
        "go on exactly; start it anew, by --overwrite and without --resume"
    )


def drawing_of(
    job: Job, policy: Policy, tokenizer, groups: Groups, scorer: Scorer | None, console: Console, check
) -> Drawing:
    """What draws a job's samples. groups: of the data, whose responses tell what ends one."""
    return Drawing(
        spec=job.sample,
        model=job.model,
        policy=policy,
        tokenizer=tokenizer,
        ends=end_tokens(policy, tokenizer, groups[:_LOOKED_AT]),
        scorer=scorer,
        scorer_name=job.reward,
        console=console,
        budget=as_bytes("memory", job.config.memory) if job.config.memory else None,
        check=check,
    )


def limit_of(policy: Policy, job: Job) -> int:
    """Tokens that prompt and response may have."""
    return min(job.data.max_length, positions_of(policy) or job.data.max_length)


def with_room(groups: Groups, policy: Policy, job: Job, console: Console) -> tuple[Groups, int]:
    """The rows whose prompts leave room for max_new_tokens; the others are counted. Raises DataError where
    none does, or, under `strict`, one does not."""
    facts, new, limit = facts_of(groups), job.sample.max_new_tokens, limit_of(policy, job)
    fits = facts.prompt + new <= limit
    if fits.all():
        return groups, 0
    first = int(np.argmin(fits))
    what = f"row {facts.row[first]} has a prompt of {facts.prompt[first]:,} tokens, which leaves no room for "
    what += f"max_new_tokens: {new} within {limit:,}"
    if job.data.strict or not fits.any():
        raise DataError(f"sample: {what}; sample fewer, raise max_length or leave out such rows")
    left_out = int((~fits).sum())
    text = f"[yellow]sample: {counted(left_out, 'row')} left out: {what}"
    console.print(text, highlight=False, soft_wrap=True)
    return taken(groups, np.flatnonzero(fits)), left_out


def check_judged(eval_groups: Groups) -> None:
    """Raises DataError for a held-out row that is a prompt alone, of which nothing is measured."""
    facts = facts_of(eval_groups)
    bare = (np.diff(facts.cu_pairs) == 0) & (facts.per_group(facts.label >= 0) == 0)
    for place in np.flatnonzero(bare)[:1]:
        raise DataError(
            f"eval_data: row {facts.row[place]} has no responses that are judged, by which held-out rows are "
            "measured; name other rows, or leave eval_data out"
        )
