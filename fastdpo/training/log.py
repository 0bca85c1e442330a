"""Where a run's numbers go: metrics.jsonl, the progress bar and the lines above it."""

from collections.abc import Iterable
from contextlib import contextmanager
from datetime import datetime, timedelta
from itertools import islice, starmap
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console

from fastdpo.console.formatting import about, all_ties, at_time, counted, duration
from fastdpo.console.progress import make_progress
from fastdpo.data.dealing import deal_sizes, deal_step, used_and_room
from fastdpo.data.packing import Size, epoch_steps, places_of, sizes_of
from fastdpo.data.store.stored import facts_of
from fastdpo.files import durable
from fastdpo.model.experts import experts
from fastdpo.objectives.seam import Coupled
from fastdpo.training.held_out import standard_error
from fastdpo.training.metrics import Sums, Window
from fastdpo.training.speed import Pace
from fastdpo.training.stage import Stage, step_groups

_SHOWN = {
    "loss": "loss {:.4f}",
    "rewards/accuracies": "accuracy {:.3f}",
    "rewards/margins": "margin {:+.4f}",
    "accuracy": "accuracy {:.3f}",
    "margin": "margin {:+.4f}",
    "aux_loss": "balance {:.3f}",
    "logps/chosen": "logp chosen {:.2f}",
    "logps/rejected": "rejected {:.2f}",
    "grad_norm": "grad {:.3g}",
    "learning_rate": "lr {:.2e}",
    "pairs_per_second": "{:.1f} pairs/s",
}
SOON, MORE = 60, 5  # seconds; steps
_DEALT = 50  # steps over which it is said how busy ranks are


class RunLog:
    """The log of a run: what each line says goes to metrics.jsonl, the trackers and the screen."""

    def __init__(self, run: Path, console: Console, trackers, stages: int = 1, writes: bool = True):
        self.console, self.stage, self.stages, self.writes = console, 0, stages, writes
        self._estimate = 0.0  # seconds left, as last said
        self._file, self._by_prompt, self._trackers = run / "metrics.jsonl", run / "held_out.jsonl", trackers

    @contextmanager
    def bar(self, name: str, done: int, total: int):
        with make_progress(self.console) as self._progress:
            self._task = self._progress.add_task(name, completed=done, total=total, unit="steps", info="")
            yield

    def track(self, batches: Iterable, total: int, what: str):
        """Yields the batches under a bar of their own, gone when they are done."""
        task = self._progress.add_task(what, total=total, unit="packs", info="", visible=total > 1)
        for batch in batches:
            yield batch
            self._progress.update(task, advance=1)
        self._progress.remove_task(task)

    def advance(self, window: Window, left: float) -> None:
        """One optimizer step done, and about so many seconds of the stage left."""
        speed = window.throughput()
        pairs = f"{speed['pairs_per_second']:.1f} pairs/s · " if window.pairs else ""
        info = f"{pairs}{speed['tokens_per_second']:,.0f} tokens/s · "
        info += f"MFU {speed['mfu']:.0%} · " if "mfu" in speed else ""
        info += f"idle {speed['idle_share']:.0%} · " if window.idle.on_gpu else ""
        info += f"{speed['peak_memory_gb']:.1f} GB"
        self._progress.update(self._task, advance=1, info=info, left=left)

    def estimate(self, step: int, steps_left: int, pace: Pace, left: float) -> None:
        """Says how long a stage will take: after the first step, and, where five others have shown that to be
        off by a fifth, after these. Of what is soon over, nothing."""
        off = abs(left - self._estimate) > self._estimate / 5
        if left < SOON or not (pace.steps == 0 or (pace.steps == MORE and off)):
            return
        self._estimate, now = left, datetime.now()
        took = f"step {step} took {duration(pace.step)}"
        if pace.steps:
            took = f"steps {step - pace.steps + 1} to {step} took {duration(pace.step)} each"
        of = f" of stage {self.stage + 1} of {self.stages}" if self.stages > 1 else ""
        until = at_time(now + timedelta(seconds=left), now)
        self.say(f"{took}: {about(left)} for the {counted(steps_left, 'step')} to come{of}, until {until}")

    def train(self, step: int, epoch: float, window: Window, left: float) -> None:
        if not self.writes:
            return
        record = {"step": step, "epoch": round(epoch, 4), **window.sums.means(), **window.throughput()}
        record["seconds_left"] = round(left)
        self._tell(record, f"step {step:>5}", record)

    def round(self, number: int, of: int, step: int, numbers: dict[str, Any]) -> None:
        """What a round has sampled."""
        if not self.writes:
            return
        said = {name: value for name, value in numbers.items() if isinstance(value, int | float)}
        record = {"step": step, "round": number, **said}
        durable.add_lines(self._file, {"stage": self.stage, **record})
        self._trackers.log(step, record)
        score, error = said["objective/scores"], said.get("objective/scores_stderr")
        text = f"[bold]round {number} of {of}[/]: score {score:.3f}" + (f" ± {error:.3f}" if error else "")
        text += f" · KL {said['objective/kl']:z.2f}" if "objective/kl" in said else ""
        text += f" · {said['val/contain_eos_token']:.0%} ended · {said['completions/mean_length']:.0f} tokens"
        quiet = f"; {said['no_signal']:,} have none" if said["no_signal"] else ""
        self.say(f"{text} · {said['prompts'] - said['no_signal']:,} prompts with a signal{quiet}")

    def held_out(self, step: int, sums: Sums, by_prompt: dict[str, list[float]]) -> None:
        if not self.writes:
            return
        means = sums.means()
        record = {"step": step, **{f"eval_{name}": value for name, value in means.items()}}
        errors = {f"eval_{name}_stderr": standard_error(values) for name, values in by_prompt.items()}
        record |= {name: error for name, error in errors.items() if error is not None}
        durable.add_lines(self._by_prompt, {"stage": self.stage, "step": step, **by_prompt})
        self._tell(record, f"[bold]held-out at {step}[/]", means)

    def _tell(self, record: dict, what: str, values: dict) -> None:
        durable.add_lines(self._file, {"stage": self.stage, **record})
        self._trackers.log(record["step"], record)
        shown = {name: text.format(values[name]) for name, text in _SHOWN.items() if name in values}
        if "rewards/accuracies" in shown and all_ties(values["rewards/margins"]):
            shown |= {"rewards/accuracies": "accuracy all ties", "rewards/margins": "margin 0"}
        self.console.print(what, " ".join(shown.values()), highlight=False, soft_wrap=True)

    def announce(self, stage: Stage) -> dict:
        """Says what a stage will do, before it does it; returns the same as numbers."""
        name, first = stage.objective.name, next(step_groups(stage.groups, stage.job, 1))
        known = facts_of(stage.groups)
        rounds = deal_step(first, stage.world.size, *stage.caps)
        batches = [stage.packed(part) for one in rounds for part in one if part]
        facts: dict[str, Any] = {
            "objective": name,
            "steps": stage.total,
            "groups": len(stage.groups),
            "pairs": len(known.pairs),
            "responses": len(known.key),
            "first_step_microbatches": len(batches),
            "first_step_tokens": sum(b.input_tokens for b in batches),
            "first_step_separate_tokens": sum(b.unshared_tokens for b in batches),
            "head_plan": stage.policy.head_plan(batches),
            "shared": stage.policy.share,
        }
        tokens, separate = facts["first_step_tokens"], facts["first_step_separate_tokens"]
        preferences = f"{facts['pairs']:,} pairs over " if facts["pairs"] else ""
        self.say(
            f"[bold]{name}[/]: {counted(stage.total, 'step')} of {counted(stage.job.batch_size, 'group')}; "
            f"a pass is {preferences}{facts['responses']:,} responses, each computed once. "
            f"{counted(len(first), 'group')} in {counted(len(batches), 'microbatch')}: {tokens:,} tokens "
            f"for {separate:,} of separate rows ({tokens / separate:.0%}); "
            f"{stage.policy.head_name}: {facts['head_plan']}"
        )
        if isinstance(stage.objective, Coupled) and len(batches) > 1:
            what = f"{stage.objective.within} groups" if stage.objective.within else "a step"
            parts = "several microbatches of it are scored once without gradient first"
            self.say(f"{name} looks at {what} as a whole: {parts}")
        if stage.objective.mismatched:
            self.say(f"{name} also scores each prompt with another row's response, without gradient")
            if not stage.mismatched:
                self.say("[yellow]all rows have one prompt, so there is no such response and z0 is 0")
        return (
            facts | self._announce_ranks(stage) | self._announce_balance(stage) | self._announce_caps(stage)
        )

    def _announce_ranks(self, stage: Stage) -> dict:
        """How the work is dealt to several ranks; of one nothing."""
        world = stage.world
        if world.size == 1:
            return {}
        sizes, steps = sizes_of(facts_of(stage.groups)), min(stage.total, _DEALT)
        busy = could = rounds = 0
        for places in islice(epoch_steps(len(sizes), stage.job.batch_size, stage.job.seed), steps):
            of_step = list(starmap(Size, sizes[places].tolist()))
            dealt = deal_sizes(of_step, world.size, *stage.caps)
            tokens, room = used_and_room(of_step, dealt)
            busy, could, rounds = busy + tokens, could + room, rounds + len(dealt)
        idle = 1 - busy / could
        how = "each with a part of the weights" if world.sharded else "each with all weights"
        self.say(
            f"{world.size} processes, {how}: a step's groups are dealt in {rounds / steps:.1f} rounds of one "
            f"microbatch each, in which a process idles {idle:.1%} of the time by its tokens"
        )
        if stage.job.batch_size < world.size:
            self.say(
                f"[yellow]batch_size: {counted(stage.job.batch_size, 'group')} a step for {world.size} "
                "processes: some compute what another one computes, and count nothing"
            )
        return {"ranks": world.size, "sharded": world.sharded, "dealt_idle_share": round(idle, 4)}

    def _announce_balance(self, stage: Stage) -> dict:
        """Whether a mixture of experts has its balance loss; of other models nothing."""
        coef, count = stage.balance.coef if stage.balance else 0.0, experts(stage.policy.core.config)
        if not coef and not stage.unbalanced:
            return {}
        if coef:
            self.say(f"balance loss of {count} experts a layer: added, times {coef:g} (router_aux_loss_coef)")
        else:
            self.say(f"[yellow]balance loss of {count} experts a layer: off, as {stage.unbalanced}")
        return {"router_aux_loss_coef": coef}

    def _announce_caps(self, stage: Stage) -> dict:
        cap, scored, facts = stage.job.max_tokens, stage.policy.max_scored, facts_of(stage.groups)
        sizes = places_of(sizes_of(facts), stage.policy.share)
        if scored is not None and _may_end(stage, scored, sizes):
            self.say(f"a microbatch ends at {scored:,} scored tokens or max_tokens={cap:,}")
        over = facts.row[sizes > cap].tolist()
        largest = int(sizes.max())
        if over:
            row = facts.row[sizes == largest].max()
            self.say(
                f"[yellow]{len(over)} groups are larger than max_tokens={cap:,} and go alone, whole "
                f"(rows {', '.join(map(str, over[:5]))}{', ...' * (len(over) > 5)}); "
                f"the largest has {largest:,} tokens (row {row})"
            )
        return {"groups_over_max_tokens": len(over), "largest_group_tokens": largest}

    def say(self, text: str) -> None:
        self.console.print(text, highlight=False)


def _may_end(stage: Stage, scored: int, sizes: np.ndarray) -> bool:
    """Whether so many scored tokens can end a microbatch: a step has more, and max_tokens may hold more."""
    counts = facts_of(stage.groups).scored_tokens
    in_a_step = np.sort(counts)[-stage.job.batch_size :].sum()
    densest = (counts / sizes).max()
    return bool(min(in_a_step, densest * stage.job.max_tokens) > scored)
