"""A run while it goes: where it stands, its checkpoints and events, and how each ending is told."""

import contextlib
import dataclasses
import platform
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from safetensors import SafetensorError
from transformers import PreTrainedTokenizerBase

from fastdpo.data.store.stored import facts_of
from fastdpo.distributed.ending import Elsewhere
from fastdpo.errors import ConfigError, DeadEndError, FastDPOError, Stopped, TrainingError
from fastdpo.files import durable
from fastdpo.files.installed import versions
from fastdpo.model.policy import Policy
from fastdpo.records import Groups
from fastdpo.sampling.scorers import Scorer
from fastdpo.training import checkpoint
from fastdpo.training.folder import growing_sizes
from fastdpo.training.job import Around, Job
from fastdpo.training.log import RunLog
from fastdpo.training.resume import rows_digest
from fastdpo.training.samples import complete
from fastdpo.training.stopping import Stopping
from fastdpo.training.trackers import Trackers

_PACKAGES = "fastdpo torch transformers datasets safetensors numpy peft bitsandbytes torchao".split()
# Between two packings of the same rows on one machine, a response's mean over its tokens moves by 1e-6
# in fp32; bf16 activations keep 8 bits.
WRONG_REFERENCE = 1.0  # nats a token: no rounding does this
DRIFT_BOUND = {torch.float32: 1e-4, torch.bfloat16: 0.05, torch.float64: 1e-9}


@dataclass
class Place:
    """The stage a run is in."""

    stage: int = 0
    first: int = 0  # optimizer steps of the run before this stage
    start: str | None = None  # the checkpoint with the stage's start weights; None: the model as loaded
    namespace: str | None = None  # of those start weights, see reference_fingerprint
    total: int = 0  # optimizer steps of this stage


@dataclass
class Run:
    """Make it once the folder is ready."""

    folder: Path
    job: Job
    console: Console
    stopping: Stopping
    around: Around
    trackers: Trackers
    policy: Policy
    tokenizer: PreTrainedTokenizerBase
    groups: Groups
    eval_groups: Groups
    data: str  # the fingerprint of both
    clock: datetime  # what their chat template was told where it asked for the time
    scorer: Scorer | None = None  # of samples, on the first rank
    place: Place = field(default_factory=Place)

    def __post_init__(self):
        self.checkpoints, self.start = self.folder / "checkpoints", time.perf_counter()
        self.world = self.policy.world
        stages, writes = len(self.job.stages), self.world.first
        self.log = RunLog(self.folder, self.console, self.trackers, stages, writes)

    @property
    def fresh_lora(self) -> bool:
        """Whether the start weights are the base model's, under an adapter that has learnt nothing."""
        return self.job.model.lora_rank is not None and self.place.start is None

    def event(self, event: str, **values) -> None:
        """A line of events.jsonl: what happened and when, for people and the report."""
        if not self.world.first:
            return
        time = datetime.now(UTC).isoformat(timespec="seconds")
        durable.add_lines(self.folder / "events.jsonl", {"time": time, "event": event, **values})

    def save(self, optimizer, progress, may_be_best: bool) -> None:
        """A checkpoint of where the stage stands, then the report; older checkpoints go."""
        step, start = self.place.first + progress.steps, time.perf_counter()
        loss = progress.eval_loss if may_be_best else None
        best = loss is not None and (progress.best is None or loss < progress.best["eval_loss"])
        if best:
            progress.best = {"step": step, "eval_loss": loss}
        keep = {self.place.start} | ({f"step-{progress.best['step']}"} if progress.best else set())
        progress.window.sums.all_to_first(self.world)
        state = {
            **dataclasses.asdict(self.place),
            "progress": progress.state(),
            "data": self.data,
            "clock": self.clock.isoformat(),
            "head_budget": self.policy.head_budget,
            "ranks": self.world.size,
            "config": self.job.settings,
        }
        if self.world.first:
            if not self.checkpoints.exists():
                self.checkpoints.mkdir()
                durable.sync(self.folder)
            state["files"] = growing_sizes(self.folder)
        folder = self.checkpoints / f"step-{step}"
        size = checkpoint.save(folder, self.policy, optimizer, state)
        if self.world.first:
            checkpoint.prune(self.checkpoints, self.job.save_total_limit, keep)
        seconds = round(time.perf_counter() - start, 3)
        facts = {"step": step, "folder": folder.name, "bytes": size, "seconds": seconds}
        self.event("checkpoint", **facts, eval_loss=loss, best=best)
        self.report(ended=False)

    def end_stage(self, progress) -> None:
        """Moves the place to the next stage's start: the last weights, or under load_best the best."""
        step = self.place.first + progress.steps
        name = f"step-{step}"
        if self.job.stages[self.place.stage].load_best and progress.best and progress.best["step"] != step:
            best, loss = f"step-{progress.best['step']}", progress.best["eval_loss"]
            found, error = self.world.told(partial(checkpoint.attempt, self.checkpoints / best))
            if found:
                found.load_weights(self.policy)
                name = best
                text = f"load_best: {best}, with the lowest held-out loss, {loss:.4f}"
            else:
                why = escape(f"{best} cannot be used: {error}")
                text = f"[yellow]load_best: {why}; the stage ends with {name}"
            self.console.print(text, highlight=False, soft_wrap=True)
        self.place = Place(self.place.stage + 1, step, name)

    def tell_drift(self, drift: float) -> None:
        """How far policy and reference were apart in a stage's first step, where they are one model. Raises
        TrainingError for a reference that is of another model altogether."""
        bound = DRIFT_BOUND[self.policy.dtype]
        self.event("drift", stage=self.place.stage, max_nats=drift, bound=bound)
        text = f"reference: before the first update it differs from the policy by {drift:.2g} nats a token"
        if drift > WRONG_REFERENCE:
            raise TrainingError(
                f"{text} in one response: it is another model's. If the data brings ref_chosen_logps and "
                "ref_rejected_logps, --reference_cache off leaves them and computes the reference"
            )
        if drift > bound:
            self.console.print(
                f"[yellow]{text} in one response, more than rounding explains ({bound:g}). Where another "
                "device or other versions computed it, --reference_cache off computes it here"
            )
        elif drift > 0:
            self.console.print(f"{text} at most (of {bound:g} that rounding explains)", highlight=False)

    @cached_property
    def shown(self) -> Groups:
        """Whose prompts are completed for the report."""
        return spread(self.eval_groups or self.groups, self.job.samples)

    def sample(self, when: str) -> None:
        """Completes some prompts, for the report: `when` is "start" or "end"."""
        groups = self.shown
        where = {"when": when, "stage": self.place.stage, "step": self.place.first}
        rows = complete(self.policy, self.tokenizer, groups, console=self.console) if groups else []
        if self.world.first:
            durable.add_lines(self.folder / "samples.jsonl", *(where | row for row in rows))

    def report(self, ended: bool) -> None:
        """Writes report.html. A report that cannot be written costs no training: it is said, and that is
        all."""
        if not self.world.first:
            return
        try:
            self.around.write_report(self.folder, ended)
        except Exception as error:
            why = escape(f"{type(error).__name__}: {error}")
            self.console.print(f"[yellow]report.html was not written: {why}", highlight=False)

    @contextlib.contextmanager
    def told(self, found: checkpoint.Checkpoint | None, passed: dict[str, str]) -> Iterator[None]:
        """Around the training: its start and its end, whichever it is, go to events.jsonl and the report."""
        begun = {"step": found.step, "checkpoint": found.name} if found else {}
        here = {"python": platform.python_version(), **versions(*_PACKAGES)}
        facts = {
            "skipped": passed,
            "versions": here,
            "device": device_name(),
            "clock": self.clock.isoformat(),
            "rows": {"training": rows_digest(self.groups), "held-out": rows_digest(self.eval_groups)},
        }
        self.event("resume" if found else "start", **begun, **facts)
        try:
            yield
        except Stopped as stop:
            self._end("stopped", signal=stop.signal.name)
            stop.args = (f"{stop}; {self.way_on()}",)
            raise
        except (OSError, SafetensorError) as error:
            self._end("error", message=f"cannot write: {error}")
            raise TrainingError(f"cannot write: {error}. Nothing saved is lost: {self.way_on()}") from None
        except Exception as error:
            cause = self.world.ending.cause(error)  # another rank may have raised before
            message = cause.message if isinstance(cause, Elsewhere) else f"{type(cause).__name__}: {cause}"
            self._end("error", message=message)
            if isinstance(cause, FastDPOError) and not isinstance(cause, ConfigError | DeadEndError):
                cause.args = (f"{cause}\n{self.way_on()}",)
            if cause is error:
                raise
            raise cause from None
        self._end("done", seconds=round(time.perf_counter() - self.start, 1))

    def _end(self, event: str, **facts) -> None:
        with contextlib.suppress(OSError):  # what ended the run may be that nothing can be written
            self.event(event, **facts)
        self.report(ended=True)

    def way_on(self) -> str:
        """What is saved, and how to go on."""
        names = checkpoint.found(self.checkpoints)
        if not names:
            return "no checkpoint was written yet: the same command with --resume starts over"
        return f"the newest checkpoint is {names[-1]}: the same command with --resume goes on from it"


def spread(groups: Groups, count: int) -> Groups:
    """At most `count` groups with different prompts, from all over them."""
    _, first = np.unique(facts_of(groups).prompt_key, return_index=True)
    different, count = np.sort(first).tolist(), min(count, len(first))
    return [groups[different[i * len(different) // count]] for i in range(count)]


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"
