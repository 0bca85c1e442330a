"""The race of whole training steps: what is run, and what is told of it.

`measure_steps` races fastdpo and its peers on one model and one mix of lengths; gpu/steps.py and cpu/steps.py
say which. A contender whose first losses are not fastdpo's gets no speed.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks import lengths as length_mixes
from benchmarks.flops import USEFUL, step_flops
from benchmarks.inputs import random_rows
from benchmarks.lengths import PairLengths
from benchmarks.models import MODELS, BenchModel, tiny
from benchmarks.steps.race import Contender, Course, Entry, Race
from benchmarks.workers import ROOT, Workers

POOL = 50  # steps that rows are chosen from, and that TRL's length grouping sorts at a time
# glibc gives every large temporary back to the kernel and faults it in again; trainers that make many run
# up to twice as fast without (TRL: 7.7 million page faults a step become 0.2). Both are shown.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 32), "MALLOC_TRIM_THRESHOLD_": str(1 << 34)}
TOLERANCE = {"cpu": 1e-3, "cuda": 2e-2}  # of a loss: fp32, bf16


@dataclass(frozen=True)
class Plan:
    """How much is run, on what."""

    model: str
    mix: str
    device: str
    pairs: int  # an optimizer step
    turns: int
    measured: int  # steps of a turn
    minutes: float
    warm: int = 0  # steps of a turn before those
    checks: int = 1  # first steps
    distinct: int = 1  # different steps, over and over
    learning_rate: float = 1e-5
    tiny: bool = False

    @property
    def bench_model(self) -> BenchModel:
        return tiny(MODELS[self.model]) if self.tiny else MODELS[self.model]


def useful_tokens(rows: Sequence[PairLengths]) -> int:
    """Tokens that no trainer can do without: each prompt once."""
    return sum(map(sum, rows))


def tokens_a_step(steps: list[list[PairLengths]]) -> float:
    return sum(map(useful_tokens, steps)) / len(steps)


def width(row: PairLengths) -> int:
    """The longest of a pair's two rows, as a padding trainer groups them."""
    return row.prompt + max(row.chosen, row.rejected)


def pool_of(plan: Plan) -> list[PairLengths]:
    """The rows that steps are chosen from; in a dry run a tenth of their lengths."""
    rows = length_mixes.draw(plan.mix, POOL * plan.pairs)
    return [PairLengths(*(max(2, n // 10) for n in row)) for row in rows] if plan.tiny else rows


def even_steps(pool: list[PairLengths], pairs: int, n: int) -> list[list[PairLengths]]:
    """n steps with the pool's distribution each: rows at even quantiles of their tokens, dealt out in turn
    and shuffled within a step."""
    ranked = sorted(pool, key=lambda row: (sum(row), row))
    places = ((np.arange(n * pairs) + 0.5) * len(pool) / (n * pairs)).astype(int)
    draw = np.random.Generator(np.random.PCG64(0))
    steps = [[ranked[i] for i in places[step::n]] for step in range(n)]
    return [[step[i] for i in draw.permutation(pairs)] for step in steps]


def grouped_steps(pool: list[PairLengths], pairs: int, n: int) -> list[list[PairLengths]]:
    """n steps of those that transformers' LengthGroupedSampler would make of the pool: sorted, longest
    first, in one chunk of POOL steps (what it sorts at a time). Every POOL/n-th, in shuffled order.

    DPOTrainer 1.16 takes train_sampling_strategy="group_by_length" only with remove_unused_columns=False
    and a column of lengths of one's own; its order is made here, so that the first steps can be the same
    for all."""
    ranked = sorted(pool, key=width, reverse=True)
    draw = np.random.Generator(np.random.PCG64(0))
    chosen = draw.permutation(((np.arange(n) + 0.5) * POOL / n).astype(int))
    return [ranked[i * pairs : (i + 1) * pairs] for i in chosen]


def rows_of_steps(steps: list[list[PairLengths]], vocab: int, seed: int) -> list[list[dict]]:
    """Random rows of these lengths, for Job.rows."""
    return [random_rows(step, vocab, seed + number) for number, step in enumerate(steps)]


def in_turns(even: list, grouped: list, plan: Plan) -> list:
    """All steps of a grouped contender in order: everybody's first ones, then in every turn those that
    warm up and those that count."""
    out = [even[i % len(even)] for i in range(plan.checks)]
    for start in range(0, len(grouped), plan.measured):
        out += [grouped[start]] * plan.warm + grouped[start : start + plan.measured]
    return out


def measure_steps(
    plan: Plan,
    contenders: list[Contender],
    ceiling_tflops: float,
    workers: Workers,
    keep: Callable[[dict], None] = lambda record: None,
) -> dict:
    """One model and mix: {"plan", "lengths", "summary": {name: numbers}, "entries", "sets", "seconds"}.
    `keep` is given the same, as far as it goes, whenever something was measured."""
    began = time.perf_counter()
    pool, vocab = pool_of(plan), plan.bench_model.vocab
    even = even_steps(pool, plan.pairs, plan.distinct)
    grouped = grouped_steps(pool, plan.pairs, plan.turns * plan.measured)
    rows = {"even": rows_of_steps(even, vocab, 0)}
    if plan.distinct > 1:
        rows["even"].insert(0, rows["even"][0])  # seen again in the second step, where the loss has moved
    rows["grouped"] = in_turns(rows["even"], rows_of_steps(grouped, vocab, len(even)), plan)
    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.json" for name in rows}
        for name, path in files.items():
            path.write_text(json.dumps(rows[name]))
        job = {"model": plan.model, "rows": str(files["even"]), "device": plan.device, "tiny": plan.tiny}
        course = Course(
            job=job | {"learning_rate": plan.learning_rate},
            grouped_rows=str(files["grouped"]),
            tolerance=TOLERANCE[plan.device],
            turns=plan.turns,
            measured=plan.measured,
            warm=plan.warm,
            checks=plan.checks,
        )
        rows_of = {True: grouped, False: even}
        record = lambda race: record_of(race, rows_of, plan, ceiling_tflops, began)
        race = Race(course, contenders, workers, 60 * plan.minutes, keep=lambda race: keep(record(race)))
        race.run()
    return record(race)


def record_of(race: Race, rows_of: dict, plan: Plan, ceiling_tflops: float, began: float) -> dict:
    """What a race says, during it too; rows_of: the steps' rows of grouped contenders and of the others."""
    numbers = {c.name: told(c, race, rows_of, plan, ceiling_tflops) for c in race.contenders}
    mark_fastest(numbers)
    return {
        "plan": asdict(plan),
        "lengths": length_mixes.summary([row for step in rows_of[False] for row in step]),
        "summary": numbers,
        "entries": {name: asdict(entry) for name, entry in race.entries.items()},
        "sets": race.sets,
        "sets_formed": race_doc(),
        "seconds": time.perf_counter() - began,
    }


def race_doc() -> str:
    return (
        "in the contenders' order, each making its first steps alone; one out of memory beside those before "
        "it opened the next set, and fastdpo runs in every set; set_number null: alone on the device, "
        "its turns in a row"
    )


def told(contender: Contender, race: Race, rows_of: dict, plan: Plan, ceiling_tflops: float) -> dict:
    """What one contender's entry says, in pairs and tokens a second, beside fastdpo's."""
    entry = race.entries.get(contender.name) or Entry("time", "no time left")
    ours = race.entries[race.ours.name]
    steps = rows_of[contender.grouped]
    model, rows = plan.bench_model, [row for step in steps for row in step]
    mean = lambda how: step_flops(model, rows, how)["total"] / len(steps)
    own, ours_own = mean(contender.how), mean(race.ours.how)
    compared = race.compared(contender, entry)
    ours_turns = race.ours_turns[entry.set_number or 0 :][:1]
    out = {
        "state": entry.state,
        "why": entry.why,
        "losses": [theirs for theirs, _ in compared],
        "largest_loss_difference": max((abs(a - b) for a, b in compared), default=None),
        "flops": own,
        "flop_ratio": own / ours_own,
        "family": contender.family,
    }
    seconds = [s for turn in entry.turns for s in turn]
    if entry.state != "measured":
        return out
    if not seconds or not any(ours_turns):
        return out | {"state": "time", "why": "no time for a turn" + ("" if not seconds else " of fastdpo")}
    tokens = tokens_a_step(steps)
    typical = statistics.mean(seconds) if contender.grouped else statistics.median(seconds)
    low, high = np.quantile(seconds, (0.25, 0.75)).tolist()
    memory, ours_memory = entry.memory, ours.memory
    return out | {
        "pairs_per_second": plan.pairs / typical,
        "quartiles": [plan.pairs / high, plan.pairs / low],
        "slowest_and_fastest": [plan.pairs / max(seconds), plan.pairs / min(seconds)],
        "steps": len(seconds),
        "median_seconds": statistics.median(seconds),
        "useful_tokens_per_second": tokens / typical,
        "flop_utilisation": mean(USEFUL) / typical / (ceiling_tflops * 1e12),
        "peak_gb": memory["peak_bytes"] / 1e9,
        "process_peak_gb": memory["resident_peak_bytes"] / 1e9,
        "paged_gb": memory.get("paged_bytes", 0) / 1e9,
        "fastdpo_times_faster": times_faster(
            contender, race, tokens / typical, tokens_a_step(rows_of[False])
        ),
        "fastdpo_memory_ratio": ours_memory["peak_bytes"] / memory["peak_bytes"],
        "interleaved": entry.set_number is not None,
    }


def times_faster(contender: Contender, race: Race, tokens_per_second: float, our_tokens: float) -> float:
    """How many times faster fastdpo is: the median over the turns of their set, each beside its own. Of
    grouped rows, which are others in every turn, by useful tokens a second over all of them."""
    entry = race.entries[contender.name]
    alone, middle = entry.set_number is None, statistics.median
    ours = race.ours_turns[0 if alone else entry.set_number]
    if contender.grouped:
        return our_tokens / middle([s for turn in ours for s in turn]) / tokens_per_second
    if alone:
        return middle(map(middle, entry.turns)) / middle(map(middle, ours))
    return middle(middle(theirs) / middle(mine) for theirs, mine in zip(entry.turns, ours))


def mark_fastest(numbers: dict[str, dict]) -> None:
    """Sets fastest_of_family where the highest rate of a peer's settings is."""
    for family in {n["family"] for n in numbers.values()} - {None}:
        found = [n for n in numbers.values() if n["family"] == family and "pairs_per_second" in n]
        if found:
            max(found, key=lambda n: n["pairs_per_second"])["fastest_of_family"] = True


def measured_ceilings(small: bool) -> dict:
    """What this machine can do at best, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.ceilings", *(["--small"] if small else [])]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return json.loads(done.stdout)


def print_table(title: str, record: dict, console: Console) -> None:
    """The contenders under each other; below, who has no numbers and why."""
    table = Table(title=title)
    columns = ("", "pairs/s", "quartiles", "tokens/s", "peak GB", "fastdpo is", "by FLOPs", "takes")
    columns += ("of ceiling",)
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for name, r in record["summary"].items():
        if "pairs_per_second" not in r:
            continue
        star = " *" if r.get("fastest_of_family") else ""
        table.add_row(
            name + star + ("" if r["interleaved"] else " (alone)"),
            f"{r['pairs_per_second']:.3g}",
            "{:.3g} to {:.3g}".format(*r["quartiles"]),
            f"{r['useful_tokens_per_second']:,.0f}",
            f"{r['peak_gb']:.2f}",
            f"{r['fastdpo_times_faster']:.2f}x faster",
            f"{r['flop_ratio']:.2f}x",
            f"{r['fastdpo_memory_ratio']:.2f}x memory",
            f"{r['flop_utilisation']:.1%}",
        )
    console.print(table)
    for name, r in record["summary"].items():
        if "pairs_per_second" not in r:
            console.print(f"  {name}: {r['state']}: {r['why']}", style="dim", highlight=False)
    console.print("* the fastest of its settings. by FLOPs: those of a step over fastdpo's, by lengths.")
