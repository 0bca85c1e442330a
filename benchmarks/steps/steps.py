"""The race of whole training steps: what is run, and what is told of it.

`measure_steps` races fastdpo and its peers on one model and one mix of lengths; gpu/steps.py and cpu/steps.py
say which. A contender whose first losses are not fastdpo's gets no speed.
"""

import json
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
from benchmarks.steps.race import Contender, Course, Race
from benchmarks.steps.timed import mark_fastest, timed
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
    pool, vocab = pool_of(plan), plan.bench_model.vocab
    even = even_steps(pool, plan.pairs, plan.distinct)
    grouped = grouped_steps(pool, plan.pairs, plan.turns * plan.measured)
    rows = {"even": rows_of_steps(even, vocab, 0)}
    first_twice(rows["even"], plan)
    rows["grouped"] = in_turns(rows["even"], rows_of_steps(grouped, vocab, len(even)), plan)
    rows_of = {True: grouped, False: even}
    tell = lambda race: record_of(race, rows_of, plan, ceiling_tflops)
    return raced(plan, contenders, rows, workers, tell, keep)


def first_twice(steps: list, plan: Plan) -> None:
    """The first step's rows are seen again in the second, where the loss has moved."""
    if plan.distinct > 1:
        steps.insert(0, steps[0])


def raced(
    plan: Plan,
    contenders: list[Contender],
    rows: dict[str, list],
    workers: Workers,
    tell: Callable[[Race], dict],
    keep: Callable[[dict], None],
) -> dict:
    """A race over these rows, "even" ones and where somebody reads them "grouped" ones: what `tell` says of
    it and "plan", "entries", "sets", "sets_formed", "seconds"; `keep` is given that as far as it goes."""
    began = time.perf_counter()

    def record(race: Race) -> dict:
        return {
            "plan": asdict(plan),
            **tell(race),
            "entries": {name: asdict(entry) for name, entry in race.entries.items()},
            "sets": race.sets,
            "sets_formed": race_doc(),
            "seconds": time.perf_counter() - began,
        }

    with tempfile.TemporaryDirectory() as folder:
        files = {name: Path(folder) / f"{name}.json" for name in rows}
        for name, path in files.items():
            path.write_text(json.dumps(rows[name]))
        job = {"model": plan.model, "rows": str(files["even"]), "device": plan.device, "tiny": plan.tiny}
        course = Course(
            job=job | {"learning_rate": plan.learning_rate},
            grouped_rows=str(files.get("grouped", files["even"])),
            tolerance=TOLERANCE[plan.device],
            turns=plan.turns,
            measured=plan.measured,
            warm=plan.warm,
            checks=plan.checks,
        )
        race = Race(course, contenders, workers, 60 * plan.minutes, keep=lambda race: keep(record(race)))
        race.run()
    return record(race)


def record_of(race: Race, rows_of: dict, plan: Plan, ceiling_tflops: float) -> dict:
    """What a race says, during it too; rows_of: the steps' rows of grouped contenders and of the others."""
    numbers = {c.name: told(c, race, rows_of, plan, ceiling_tflops) for c in race.contenders}
    mark_fastest(numbers)
    lengths = length_mixes.summary([row for step in rows_of[False] for row in step])
    return {"lengths": lengths, "summary": numbers}


def race_doc() -> str:
    return (
        "in the contenders' order, each making its first steps alone; one out of memory beside those before "
        "it opened the next set, and fastdpo runs in every set; set_number null: alone on the device, "
        "its turns in a row"
    )


def told(contender: Contender, race: Race, rows_of: dict, plan: Plan, ceiling_tflops: float) -> dict:
    """What one contender's entry says, beside fastdpo's, and what the FLOPs of its steps say."""
    steps = rows_of[contender.grouped]
    model, rows = plan.bench_model, [row for step in steps for row in step]
    mean = lambda how: step_flops(model, rows, how)["total"] / len(steps)
    own, ours_own = mean(contender.how), mean(race.ours.how)
    out = {"flops": own, "flop_ratio": own / ours_own}
    out |= timed(contender, race, plan.pairs, tokens_a_step(steps), tokens_a_step(rows_of[False]))
    if "pairs_per_second" in out:
        useful = mean(USEFUL) * out["pairs_per_second"] / plan.pairs
        out["flop_utilisation"] = useful / (ceiling_tflops * 1e12)
    return out


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
