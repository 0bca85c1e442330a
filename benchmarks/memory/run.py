"""What fits: the longest pair, and the largest model, that each trainer can train on 24, 48 and 80 GB.

Every trial is a real step in a worker whose allocator is limited (limited.py); running out of
memory is its result. All contenders recompute their layers in the backward, take one pair at a time and
train in the same precision. Steps are not timed, so trials run side by side where the device has room.
"""

import json
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.inputs import random_rows
from benchmarks.lengths import PairLengths
from benchmarks.memory.room import BESIDE, Room
from benchmarks.models import MODELS
from benchmarks.results import result_of_today, write_result
from benchmarks.workers import Worker, WorkerFailed

CONTENDERS = {
    "fastdpo": ("ours", {"max_tokens": 1 << 20, "keys": {"gradient_checkpointing": True}}),
    "TRL": ("trl_dpo", {"batch_size": 1, "best": True, "checkpointing": True}),
    "plain HF": ("hf_plain", {"batch_size": 1, "checkpointing": True}),
    "TRL default": ("trl_dpo", {"batch_size": 1, "best": False}),
}
# from small to large
LADDERS = {
    "all weights": ("Qwen2.5-0.5B", "Llama-3.2-1B", "Qwen3-1.7B", "Qwen2.5-3B"),
    "LoRA": ("Qwen2.5-7B LoRA", "Llama-3.1-8B LoRA", "Qwen2.5-14B LoRA", "Qwen2.5-32B LoRA"),
}
# the first step's pair: the optimizer's state exists before the one that counts
WARM = PairLengths(32, 16, 16)
GRACE = 15  # seconds that the last trial may go on after the minutes are over
PRECISION = 1.1  # smallest that failed over largest that fit


@dataclass(frozen=True)
class Limits:
    """How far everything goes."""

    device: str
    gigabytes: tuple[float, ...]  # 10^9 bytes
    pair_models: tuple[str, ...]
    ladders: dict[str, tuple[str, ...]]
    contenders: tuple[str, ...]
    first: int  # tokens of the shortest row tried
    most: int  # ... and of the longest, if the model has so many positions
    row: int  # tokens of a row in the trials of models
    precision: float = PRECISION
    tiny: bool = False


FULL = Limits(
    device="cuda",
    gigabytes=(24, 48, 80),
    pair_models=("Llama-3.2-1B", "Llama-3.1-8B LoRA"),
    ladders=LADDERS,
    contenders=tuple(CONTENDERS),
    first=1024,
    most=131_072,
    row=2048,
)


@dataclass(frozen=True)
class Task:
    """One question: the longest pair of a model, or the largest model of a ladder."""

    kind: str  # "pair" or "model"
    of: str  # a model, or a ladder
    gigabytes: float
    contender: str


def tasks(limits: Limits) -> list[Task]:
    """The smallest card first, then pairs before models."""
    asked = [("pair", name) for name in limits.pair_models] + [("model", name) for name in limits.ladders]
    return [Task(*a, gb, who) for gb in limits.gigabytes for a in asked for who in limits.contenders]


class TimeUp(Exception):
    """No time for another trial."""


def longest(
    fits: Callable[[int], int | None], first: int, most: int, room: int, precision: float
) -> tuple[int, int | None]:
    """(the largest n that fits, 0 for none, and the smallest found that does not, None if `most` fits).

    fits(n) is the peak bytes of n, or None where memory ran out. Peaks grow about linearly, so the line
    through the last two foretells where `room` bytes end; the search closes in until the two are within
    `precision`.
    """
    seen, high, n = [], None, first
    while True:
        peak = fits(n)
        if peak is None:
            high = n
        else:
            seen.append((n, peak))
        low = max((n for n, _ in seen), default=0)
        if low == 0 or low == most or (high is not None and high <= precision * low):
            return low, high
        guess = _foretold(seen, room)
        if high is None:
            n = min(most, 4 * low if guess is None else max(int(0.95 * guess), int(low * precision)))
        elif guess is not None and precision**0.5 * low < guess < high:
            n = int(guess)
        else:
            n = int((low * high) ** 0.5)
        n = max(n, low + 1)


def _foretold(seen: list[tuple[int, int]], room: int) -> float | None:
    """Where the line through the two largest sizes reaches `room`."""
    if len(seen) < 2:
        return None
    (n0, bytes0), (n1, bytes1) = sorted(seen)[-2:]
    return n1 + (room - bytes1) * (n1 - n0) / (bytes1 - bytes0) if bytes1 > bytes0 else None


class Trials:
    """One contender under one limit: its worker, and what became of each trial."""

    def __init__(self, limits: Limits, task: Task, folder: Path, until: float):
        self.limits, self.task, self.folder, self.until = limits, task, folder, until
        self.worker, self.log = None, []

    @property
    def room(self) -> int:
        return int(self.task.gigabytes * 1e9)

    def steps(self, row: int) -> list[list[PairLengths]]:
        """The pairs of a trial's steps; the last has rows of `row` tokens, half of them the prompt."""
        return [[WARM], [PairLengths(row - row // 2, row // 2, row // 2)]]

    def peer(self, row: int) -> tuple[str, dict]:
        """The contender's module and options."""
        return CONTENDERS[self.task.contender]

    def told(self, model: str, row: int, answer: dict | None) -> dict:
        """What the log keeps of a trial; `answer` is its worker's, or None where memory ran out."""
        return {"model": model, "row": row, "peak_bytes": answer and answer["peak_bytes"]}

    def fits(self, model: str, row: int) -> int | None:
        """Trains the steps; the peak in bytes, or None. Raises TimeUp, and WorkerFailed for anything but
        memory."""
        if time.perf_counter() > self.until:
            raise TimeUp
        steps = self.steps(row)
        path = self.folder / f"{row}.json"
        vocab = 1000 if self.limits.tiny else MODELS[model].vocab
        path.write_text(json.dumps([random_rows(step, vocab) for step in steps]))
        module, options = self.peer(row)
        job = {"model": model, "rows": str(path), "device": self.limits.device, "learning_rate": 1e-5}
        answer = None
        try:
            worker = self.living(f"benchmarks.peers.{module}")
            worker.prepare(job | {"tiny": self.limits.tiny, "options": options}, self.seconds())
            answer = worker.steps(len(steps), self.seconds())
            worker.end()
        except WorkerFailed as failed:
            if failed.kind == "time" and self.seconds() <= GRACE:
                raise TimeUp from None
            if failed.kind != "memory":
                raise
        self.log.append(self.told(model, row, answer))
        print(self.task, self.log[-1], flush=True)
        return self.log[-1]["peak_bytes"]

    def seconds(self) -> float:
        """How long a worker may take for an answer."""
        return self.until - time.perf_counter() + GRACE

    def living(self, module: str) -> Worker:
        if self.worker is None or not self.worker.alive:
            limit = {"BENCH_BYTES": str(self.room), "BENCH_DEVICE": self.limits.device}
            self.worker = Worker(
                "benchmarks.memory.limited", limit | {"BENCH_PEER": module}, self.folder / "log"
            )
        return self.worker

    def stop(self) -> None:
        if self.worker is not None and self.worker.alive:
            self.worker.stop()


def answer(limits: Limits, task: Task, until: float) -> dict:
    """The task, {"fits", "fails"} (tokens of a row, or a model; None: nothing, or nothing failed), and
    every trial. Or why there is no answer."""

    def found() -> dict:
        if task.kind == "pair":
            most = min(limits.most, MODELS[task.of].config["max_position_embeddings"])
            fits = lambda row: trials.fits(task.of, row)
            low, high = longest(fits, limits.first, most, trials.room, limits.precision)
            return {"fits": low or None, "fails": high}
        names = limits.ladders[task.of]
        which = [trials.fits(name, limits.row) is not None for name in _until_failure(names, trials)]
        fitting, fails = which.count(True), False in which
        return {"fits": names[fitting - 1] if fitting else None, "fails": names[fitting] if fails else None}

    with tempfile.TemporaryDirectory() as folder:
        trials = Trials(limits, task, Path(folder), until)
        return asdict(task) | settled(trials, found)


def settled(trials: Trials, ask: Callable[[], dict]) -> dict:
    """What ask() finds by the trials, or why there is no answer; and every trial. Ends their worker."""
    try:
        out = ask()
    except TimeUp:
        out = {"no_answer": "no time left"}
    except WorkerFailed as failed:
        out = {"no_answer": f"{failed.kind}: {failed.why}"}
    finally:
        trials.stop()
    return out | {"trials": trials.log}


def _until_failure(names: tuple[str, ...], trials: Trials) -> Iterator[str]:
    """The names, until the last one tried did not fit: what is larger does not fit either."""
    for name in names:
        yield name
        if trials.log[-1]["peak_bytes"] is None:
            return


def run(limits: Limits, minutes: float, out: Path) -> Path:
    """Every task in order, as many side by side as there is room for."""
    until = time.perf_counter() + 60 * minutes
    earlier = (result_of_today("memory", out) or {"found": []})["found"]
    answered = [f for f in earlier if "no_answer" not in f]
    found = {Task(*(f[k] for k in Task.__annotations__)): f for f in answered}
    room = Room(torch.cuda.get_device_properties(0).total_memory if limits.device == "cuda" else 1.0)

    def write() -> Path:
        told = {"limits": asdict(limits), "contenders": CONTENDERS}
        return write_result("memory", told | {"found": list(found.values())}, out)

    def work(task: Task, taken: float) -> None:
        with room.back(taken):
            new = answer(limits, task, until)
        with room.changed:  # what is answered stays, whatever comes next
            found[task] = new
            if "no_answer" not in new:
                write()

    with ThreadPoolExecutor() as pool:
        todo = [task for task in tasks(limits) if task not in found]
        for future in [pool.submit(work, t, room.take(t.gigabytes * 1e9 + BESIDE)) for t in todo]:
            future.result()
    print_table(list(found.values()), limits, Console(width=130))
    return write()


def print_table(found: list[dict], limits: Limits, console: Console) -> None:
    """A row for every question, a column for every contender."""
    table = Table(title="What fits (one pair at a time, layers recomputed)")
    for name in ("", *limits.contenders):
        table.add_column(name, justify="right" if name else "left")
    by_task = {tuple(f[k] for k in Task.__annotations__): f for f in found}
    asked = dict.fromkeys((t.kind, t.of, t.gigabytes) for t in tasks(limits))
    for kind, of, gb in asked:
        what = f"longest row, {of}" if kind == "pair" else f"largest model, {of}"
        cells = [by_task.get((kind, of, gb, name), {}) for name in limits.contenders]
        table.add_row(f"{what}, {gb:g} GB", *(_cell(kind, cell) for cell in cells))
    console.print(table)


def _cell(kind: str, found: dict) -> str:
    if "fits" not in found:
        return found.get("no_answer", "")
    if found["fits"] is None:
        return "none"
    return f"{found['fits']:,}" if kind == "pair" else found["fits"]
