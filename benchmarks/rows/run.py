"""From a file of rows to rows that can be trained on: fastdpo beside TRL, over rows and cores, the first time
and from what the first time left on disk; and `fastdpo train --resume` until it trains.

    python -m benchmarks.rows.run --tokenizer FOLDER [--out DIR] [--work DIR] [--quick]

The rows are random words with the lengths of UltraFeedback, as JSON lines in TRL's conversational format.
Each start is a process of its own; contenders take turns. What is timed begins when imports are over and
the tokenizer is there; memory is of the whole process and all that it starts. TRL's part is load_dataset
and DPOTrainer._prepare_dataset with num_proc = cores. An interrupted run goes on where it was when it is
started again on the same day and commit. --quick: a few rows, to see that all of it runs.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer

from benchmarks.results import RESULTS, result_of_today, write_result
from benchmarks.rows.resume import Resumed
from benchmarks.rows.text import make_model, words_of, write_rows
from benchmarks.rows.watch import EVERY, SHARE, on_disk, watch

WHO = ("ours", "trl")
DISK = {"data": 4000, "ours": 8000, "trl": 15_000}  # bytes a row, about: ours with the reference cache
OBJECTIVES = {"simpo": "none is needed", "sigmoid": "all in the cache"}  # and its reference


@dataclass(frozen=True)
class Plan:
    """What is measured. Starts of TRL's with more rows are left out: they take long and tell nothing new."""

    sizes: tuple[int, ...] = (2_000, 20_000, 200_000, 1_000_000)
    trl_most: int = 200_000
    one_core_most: int = 20_000
    resumed: tuple[int, ...] = (2_000, 200_000)
    turns: int = 3  # of sizes up to `often`; larger ones have one first start
    often: int = 2_000
    second: int = 3  # second starts, behind the first turn's first start
    mix: str = "UltraFeedback"
    max_length: int = 4096  # no row is longer: nothing is cut or dropped


QUICK = Plan(sizes=(60,), one_core_most=0, resumed=(60,), turns=1, second=1)


@dataclass(frozen=True)
class Unit:
    """What is measured in one go, and written down: first starts side by side, then second ones."""

    rows: int
    cores: int
    turn: int


def units(plan: Plan, cores: int) -> Iterator[Unit]:
    """Small sizes first, all cores before fewer: 1, 2, 4, ... and as many as there are."""
    counts = [cores, *sorted({1 << i for i in range(cores.bit_length())} - {cores}, reverse=True)]
    for rows in plan.sizes:
        for n in counts if rows <= plan.one_core_most else counts[:1]:
            for turn in range(plan.turns if rows <= plan.often else 1):
                yield Unit(rows, n, turn)


class Bench:
    """A plan on its way. All its files are below `work`, and go with it."""

    def __init__(self, plan: Plan, work: Path, tokenizer: Path | None, record: dict):
        self.plan, self.work, self.record = plan, work, record
        self.model = work / "model"
        record["tokenizer"] = make_model(self.model, tokenizer)
        self._words = words_of(AutoTokenizer.from_pretrained(self.model))
        self._size = 0

    def data(self, rows: int) -> Path:
        """The file of so many rows, in place of that of others."""
        path = self.work / "rows.jsonl"
        if rows != self._size:
            words = write_rows(path, self.plan.mix, rows, self._words)
            facts = {"bytes": path.stat().st_size, "words_a_row": words / rows}
            self.record["data"][str(rows)] = facts
            self._size = rows
        return path

    def order(self, rows: int, cores: int) -> dict:
        names = {"data": self.data(rows), "model": self.model, "folder": self.work / "trainer"}
        named = {name: str(path) for name, path in names.items()}
        return named | {"max_length": self.plan.max_length, "cores": cores}

    def environment(self, who: str) -> dict[str, str]:
        caches = {"XDG_CACHE_HOME": str(self.work / who), "HF_HOME": str(self.work / who / "hf")}
        quiet = {"TOKENIZERS_PARALLELISM": "false"} if who == "trl" else {}  # rows one by one: it warns
        return caches | quiet | {"HF_HUB_OFFLINE": "1"}

    def start(self, who: str, order: dict, called: str = "") -> dict:
        """One process from its start to its end."""
        files = [self.work / name for name in ("order.json", "answer.json", f"{who}.log")]
        files[0].write_text(json.dumps(order))
        files[1].unlink(missing_ok=True)
        command = [sys.executable, "-m", "benchmarks.rows.contenders", called or who, *map(str, files[:2])]
        os.sync()  # no one waits for what the one before has written
        watched = watch(command, order["cores"], self.environment(who), files[2])
        if watched.code or not files[1].exists():
            log = files[2].read_text(errors="replace")[-1500:]
            raise RuntimeError(f"{called or who} ended with code {watched.code}: {log}")
        answer = json.loads(files[1].read_text())
        marks = answer.pop("marks")
        ready, loaded = marks.get("ready", marks["imported"]), marks["loaded"]
        pss, own = watched.peak(until=loaded["at"])
        return answer | {
            "before_seconds": ready["at"] - watched.began,  # imports, the tokenizer
            "before_bytes": watched.peak(until=ready["at"])[0],
            "seconds": loaded["at"] - ready["at"],
            "cpu_seconds": loaded["cpu_seconds"] - ready["cpu_seconds"],
            "peak_bytes": pss,
            "peak_own_bytes": own,
            "largest_rss_bytes": loaded["largest_bytes"],  # without those that it starts; the kernel's
            "looks_every": watched.interval,
            "disk_bytes": on_disk(self.work / who),
        }

    def measure(self, unit: Unit) -> list[dict]:
        """A first start of each, then second ones by turns; their caches are gone afterwards."""
        who = [name for name in WHO if name == "ours" or unit.rows <= self.plan.trl_most]
        who = who[::-1] if unit.turn % 2 else who
        order, found = self.order(unit.rows, unit.cores), []
        for name in who:
            shutil.rmtree(self.work / name, ignore_errors=True)
        for again in range(1 + (self.plan.second if unit.turn == 0 else 0)):
            for name in who:
                said = {"who": name, **asdict(unit), "start": "second" if again else "first"}
                found.append(said | self.start(name, order))
                print({key: value for key, value in found[-1].items() if key != "first"}, flush=True)
        for name in who:
            shutil.rmtree(self.work / name, ignore_errors=True)
        if len({one["first"] for one in found}) > 1 or {one["groups"] for one in found} != {unit.rows}:
            raise RuntimeError("the contenders did not make the same token ids of the same rows")
        return found

    def resumed(self, rows: int, cores: int) -> list[dict]:
        """`fastdpo train --resume`, with the tokens on disk as the run before left them."""
        order, found, environment = self.order(rows, cores), [], self.environment("ours")
        shutil.rmtree(self.work / "ours", ignore_errors=True)
        for objective, reference in OBJECTIVES.items():
            if objective == "sigmoid":
                self.start("ours", order, "fill")
            run = Resumed(self.work / "runs" / objective, order, objective, environment)
            for _ in range(self.plan.second):
                said = {"rows": rows, "cores": cores, "objective": objective, "reference": reference}
                found.append(said | run.again())
                print(found[-1], flush=True)
        for name in ("ours", "runs"):
            shutil.rmtree(self.work / name, ignore_errors=True)
        return found


def run(plan: Plan, work: Path, tokenizer: Path | None, out: Path) -> Path:
    """All of the plan that today's result has not got, and a table. The file is written after each unit."""
    cores = len(os.sched_getaffinity(0))
    record = result_of_today("rows", out)
    if record is None or record["plan"] != json.loads(json.dumps(asdict(plan))):
        record = {"plan": asdict(plan), "data": {}, "runs": [], "resumed": [], "left_out": []}
        record |= {"cores": cores, "looks": {"every_seconds": EVERY, "or_times_its_cpu_seconds": SHARE}}
    record["left_out"] = []
    shutil.rmtree(work, ignore_errors=True)
    work.mkdir(parents=True)
    try:
        bench = Bench(plan, work, tokenizer, record)
        for unit in units(plan, cores):
            done = {Unit(one["rows"], one["cores"], one["turn"]) for one in record["runs"]}
            if unit not in done and has_room(plan, work, unit.rows, record):
                record["runs"] += bench.measure(unit)
                write_result("rows", record, out, quiet=True)
        for rows in plan.resumed:
            done = {one["rows"] for one in record["resumed"]}
            if rows not in done and has_room(plan, work, rows, record):
                record["resumed"] += bench.resumed(rows, cores)
                write_result("rows", record, out, quiet=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    print_table(record, Console(width=150))
    return write_result("rows", record, out)


def has_room(plan: Plan, work: Path, rows: int, record: dict) -> bool:
    """Whether the disk has as much as they take; if not, the record says so."""
    needed = rows * sum(DISK[name] for name in DISK if name != "trl" or rows <= plan.trl_most)
    free = shutil.disk_usage(work).free
    if free < needed:
        said = f"{rows:,} rows take {needed / 1e9:.1f} GB of disk, and {free / 1e9:.1f} GB are free"
        record["left_out"].append(said)
        return False
    return True


def print_table(record: dict, console: Console) -> None:
    """A line a run."""
    table = Table(title="From a file to rows that can be trained on")
    columns = (
        "rows",
        "cores",
        "who",
        "start",
        "s",
        "CPU s",
        "peak MB",
        "no file's, MB",
        "disk MB",
        "before, s",
    )
    for column in columns:
        table.add_column(column, justify="left" if column in ("who", "start") else "right")
    for one in record["runs"]:
        sizes = [f"{one[key] / 1e6:,.0f}" for key in ("peak_bytes", "peak_own_bytes", "disk_bytes")]
        times = [f"{one[key]:.2f}" for key in ("seconds", "cpu_seconds")]
        said = (f"{one['rows']:,}", str(one["cores"]), one["who"], one["start"])
        table.add_row(*said, *times, *sizes, f"{one['before_seconds']:.2f}")
    console.print(table)
    for one in record["resumed"]:
        console.print(f"{one['rows']:,} rows resumed, {one['objective']}: the stage began after ", end="")
        console.print(f"{one['stage_seconds']:.2f} s, its first step ended after {one['step_seconds']:.2f} s")


def main() -> None:
    """On this machine's cores, as many as this process may use."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokenizer", type=Path, help="a folder (default: one of a thousand tokens is made)")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the JSON")
    work = Path(tempfile.gettempdir(), "fastdpo-rows")
    parser.add_argument("--work", type=Path, default=work, help="a folder of its own for rows and caches")
    parser.add_argument("--quick", action="store_true", help="60 rows: shows that all of it runs")
    args = parser.parse_args()
    if args.quick and args.out == RESULTS:
        parser.error("--quick needs --out: its numbers mean nothing and belong nowhere else")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what it has started ends with it
    run(QUICK if args.quick else Plan(), args.work, args.tokenizer, args.out)


if __name__ == "__main__":
    main()
