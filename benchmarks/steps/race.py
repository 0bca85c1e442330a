"""Whole training steps of several contenders, taking turns: A B C A B C, only one computing at a time.

The first contender is fastdpo, and runs in every set. Workers join a set one by one, each making its
first steps alone; one that runs out of memory beside the others, or would when all wait with their
weights loaded, opens the next set. What fails is a result: it is recorded with its reason. After everybody's
first steps and after every turn `keep` is told, so that a race that is killed loses no more than that.
"""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.flops import How
from benchmarks.workers import Worker, WorkerFailed, Workers

SLOWER = 1.2  # of the batch sizes of one thing, those slower than this in the first steps leave
SPARE = 1.05  # of the memory a step takes from the device
DOORS = 0.7  # of the time is for first steps; then who stands takes turns
TOO_LONG = 240  # seconds for an answer
GRACE = 20  # seconds that the last answer may come after the time is over


@dataclass(frozen=True, eq=False)
class Contender:
    """A worker's module and options, and how it computes a step."""

    name: str
    module: str
    options: dict
    how: How
    environment: dict[str, str] = field(default_factory=dict)
    family: str | None = None  # of whom it is a setting: the fastest of a family's counts
    sizes_of: str | None = None  # what it is a batch size of: the slow ones leave after the first steps
    grouped: bool = False  # reads rows grouped by length
    checkpointed: "Contender | None" = None  # who tries instead where memory is out
    like: str | None = None  # whose first losses it must have; None: fastdpo's
    tolerance: float = 1.0  # of those, in the course's
    checks_only: bool = False  # leaves after its first steps: others must have its losses


@dataclass(frozen=True)
class Course:
    """What everybody runs: `job` without options (see benchmarks.peers.jobs), and how many steps."""

    job: dict
    grouped_rows: str  # the file of rows for grouped contenders
    tolerance: float  # of the losses of the first steps
    turns: int
    measured: int  # steps of a turn that count,
    warm: int  # ... after these
    checks: int  # first steps, before any turn
    compared: int = 3  # losses that must agree, from the first


@dataclass
class Entry:
    """What became of a contender."""

    state: str  # measured, checked, slower (than another size), disagrees, memory, absent, error, time
    why: str | None = None
    facts: dict = field(default_factory=dict)
    first_seconds: list[float] = field(default_factory=list)  # of the first steps: not for comparing
    turns: list[list[float]] = field(default_factory=list)  # seconds of the steps that count
    losses: list[float] = field(default_factory=list)  # of all steps
    memory: dict = field(default_factory=dict)  # see session.memory
    also: list[dict] = field(default_factory=list)  # what else it tells of all steps
    set_number: int | None = None  # None: it ran alone, beside nobody
    trace: dict | None = None

    def add(self, answer: dict) -> list[float]:
        """Takes over losses and memory of an answer; returns its seconds."""
        self.losses += [step["loss"] for step in answer["steps"]]
        told = [{k: v for k, v in step.items() if k not in ("loss", "seconds")} for step in answer["steps"]]
        self.also += filter(None, told)
        self.memory = {k: v for k, v in answer.items() if k.endswith("_bytes")}
        return [step["seconds"] for step in answer["steps"]]


class Race:
    """run() fills `entries` (by name) and `sets` (names, in order)."""

    def __init__(
        self,
        course: Course,
        contenders: list[Contender],
        workers: Workers,
        seconds: float,
        say: Callable[[str], None] = print,
        keep: Callable[["Race"], None] = lambda race: None,
    ):
        self.course, self.ours, self.others = course, contenders[0], contenders[1:]
        self.workers, self.say, self.keep = workers, say, keep
        self.doors, self.deadline = (time.perf_counter() + part * seconds for part in (DOORS, 1.0))
        self.entries: dict[str, Entry] = {}
        self.sets: list[list[str]] = []
        self.ours_turns: list[list[list[float]]] = []  # of each set
        self.fastest: dict[str, tuple[float, str]] = {}  # by sizes_of: seconds of the first steps, and whose
        self.contenders = list(contenders)  # grows by those that try again with checkpointing

    def run(self) -> None:
        for contender in self.contenders:  # all at once: they import while the first one builds
            self.worker(contender)
        waiting = self.run_set(list(self.others))
        while waiting and time.perf_counter() < self.deadline:
            try:
                waiting = self.run_set(waiting)
            except WorkerFailed as failed:  # fastdpo, which ran before: what is measured stays
                self.say(f"  the last set ended: fastdpo: {failed.why}")
                waiting = []
        for contender in self.contenders:
            self.entries.setdefault(contender.name, Entry("time", "no time left"))

    def worker(self, contender: Contender) -> Worker:
        return self.workers.get(contender.name, contender.module, contender.environment)

    def job(self, contender: Contender) -> dict:
        rows = {"rows": self.course.grouped_rows} if contender.grouped else {}
        return self.course.job | rows | {"options": contender.options}

    def start(self, contender: Contender) -> Entry:
        """Builds a contender and lets it make its first steps. Raises WorkerFailed."""
        self.say(f"  {contender.name}: first steps")
        worker = self.worker(contender)
        # fastdpo is awaited while everybody imports, and without it nobody is measured
        patience = self.patience(0.8 if contender is self.ours else 0.5)
        entry = Entry("measured", facts=worker.prepare(self.job(contender), patience)["facts"])
        entry.first_seconds = entry.add(worker.steps(self.course.checks, self.patience(0.5)))
        return entry

    def patience(self, part: float = 1.0) -> float:
        """Seconds to wait for an answer, at most this part of what is left: who hangs must not take the
        others' results with it."""
        return min(TOO_LONG, max(1.0, part * (self.deadline + GRACE - time.perf_counter())))

    def run_set(self, waiting: list[Contender]) -> list[Contender]:
        """One set: fastdpo and whoever fits beside it. Returns those that did not."""
        number, later = len(self.sets), []
        standing = {self.ours: self.start(self.ours)}  # if this fails there is nothing to compare with
        self.entries.setdefault(self.ours.name, standing[self.ours])
        self.keep(self)
        queue = list(waiting)
        while queue:
            contender = queue.pop(0)
            if time.perf_counter() > (self.deadline if number else self.doors):
                self.entries[contender.name] = Entry("time", "no time left")
                continue
            try:
                entry = self.start(contender)
            except WorkerFailed as failed:
                if failed.kind == "memory" and len(standing) > 1:
                    later.append(contender)
                elif failed.kind == "memory":
                    queue[:0] = self.alone(contender, standing)
                else:
                    self.entries[contender.name] = Entry(failed.kind, failed.why)
            else:
                self.join(contender, entry, standing, later)
            self.keep(self)
        for entry in standing.values():
            entry.set_number = number
        self.sets.append([contender.name for contender in standing])
        if number == 0:
            self.entries[self.ours.name] = standing[self.ours]
        self.ours_turns.append(standing[self.ours].turns)
        self.take_turns(standing)
        if number == 0:
            standing[self.ours].trace = self.traced()
        for contender in list(standing):
            self.worker(contender).end()
        return later

    def join(self, contender: Contender, entry: Entry, standing: dict, later: list[Contender]) -> None:
        """Lets a contender that made its first steps into the set; or why not."""
        if why := self.disagreement(contender, entry):
            self.dismiss(contender, entry, "disagrees", why)
            return
        if contender.checks_only:
            self.dismiss(contender, entry, "checked", "it is there for its losses alone")
            return
        members = [*standing.values(), entry]
        needed = max(e.memory["held_bytes"] - e.memory["idle_bytes"] for e in members)
        if needed * SPARE > entry.memory["free_bytes"] and len(standing) > 1:
            later.append(contender)
            self.worker(contender).end()
            return
        if (of := contender.sizes_of) is not None:
            mine = (pace(entry), contender.name)
            best, name = self.fastest[of] = min(mine, self.fastest.get(of, mine))
            slower = f"slower than {name} in the first steps"
            if pace(entry) > SLOWER * best:
                self.dismiss(contender, entry, "slower", slower)
                return
            for other in [c for c in standing if c.sizes_of == of and pace(standing[c]) > SLOWER * best]:
                self.dismiss(other, standing.pop(other), "slower", slower)
        standing[contender] = self.entries[contender.name] = entry

    def dismiss(self, contender: Contender, entry: Entry, state: str, why: str) -> None:
        self.say(f"  {contender.name} leaves: {why}")
        entry.state, entry.why = state, why
        self.entries[contender.name] = entry
        self.worker(contender).end()

    def alone(self, contender: Contender, standing: dict) -> list[Contender]:
        """Tries a contender that found no room beside fastdpo with the device to itself, all its turns in
        a row; returns who is to try instead."""
        self.workers.stop()  # even a worker that waits without a model keeps some memory of a GPU
        instead = []
        try:
            entry = self.entries[contender.name] = self.start(contender)
            why = self.disagreement(contender, entry)
            for number in range(0 if why or contender.checks_only else self.course.turns):
                if number and time.perf_counter() > self.deadline:
                    break
                entry.turns.append(self.turn(contender, entry))
                self.keep(self)
            if why:
                entry.state, entry.why = "disagrees", why
            elif contender.checks_only:
                entry.state = "checked"
            self.worker(contender).end()
        except WorkerFailed as failed:
            self.entries[contender.name] = Entry(failed.kind, failed.why)
            if failed.kind == "memory" and contender.checkpointed is not None:
                instead = [contender.checkpointed]
                self.contenders.append(contender.checkpointed)
        standing[self.ours] = self.start(self.ours)
        return instead

    def turn(self, contender: Contender, entry: Entry) -> list[float]:
        warm, measured = self.course.warm, self.course.measured
        return entry.add(self.worker(contender).steps(warm + measured, self.patience()))[warm:]

    def take_turns(self, standing: dict[Contender, Entry]) -> None:
        """A B C A B C. Who fails here has a reason instead of numbers; fastdpo ends the turns."""
        longest = 0.0
        for number in range(self.course.turns):
            if number and time.perf_counter() + longest > self.deadline:
                break
            self.say(f"  turn {number + 1} of {self.course.turns}: {len(standing)} contenders")
            began = time.perf_counter()
            if not self.one_turn(standing):
                break
            self.keep(self)
            longest = max(longest, time.perf_counter() - began)
        for contender, entry in standing.items():
            if contender is not self.ours and (why := self.disagreement(contender, entry)):
                entry.state, entry.why = "disagrees", why

    def one_turn(self, standing: dict[Contender, Entry]) -> bool:
        """Whether fastdpo made its turn, which comes first; raises WorkerFailed where it never made one."""
        for contender, entry in list(standing.items()):
            try:
                entry.turns.append(self.turn(contender, entry))
            except WorkerFailed as failed:
                if contender is self.ours:
                    if not entry.turns:
                        raise
                    self.say(f"  the turns ended: fastdpo: {failed.why}")
                    return False
                entry.state, entry.why = failed.kind, failed.why
                del standing[contender]
        return True

    def compared(self, contender: Contender, entry: Entry) -> list[tuple[float, float]]:
        """The first losses, each beside fastdpo's, or whose they must be, on the same rows."""
        course = self.course
        n = min(course.checks, course.compared) if contender.grouped else course.compared
        truth = (
            entry if contender.like == contender.name else self.entries.get(contender.like or self.ours.name)
        )
        return list(zip(entry.losses, truth.losses if truth else ()))[:n]

    def disagreement(self, contender: Contender, entry: Entry) -> str | None:
        """Where this contender's first losses are not those that they must be."""
        found = self.compared(contender, entry)
        if entry.losses and not found:
            return f"{contender.like} has no losses to compare with"
        for step, (theirs, ours) in enumerate(found, 1):
            if not abs(theirs - ours) <= self.course.tolerance * contender.tolerance:
                return f"loss {theirs:.5f} in step {step}, {contender.like or 'fastdpo'}'s is {ours:.5f}"
        return None

    def traced(self) -> dict | None:
        """One more step of fastdpo under the profiler."""
        try:
            return self.worker(self.ours).profile(self.patience())["trace"]
        except WorkerFailed as failed:
            self.say(f"  no profile: {failed.why}")
            return None


def pace(entry: Entry) -> float:
    """Seconds of a step, as far as the first ones tell."""
    return statistics.median(entry.first_seconds[1:] or entry.first_seconds)
