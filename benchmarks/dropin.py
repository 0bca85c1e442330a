"""TRL's DPOTrainer, stock and after one line of ours, on the same rows: pairs a second and peak memory.

    python -m benchmarks.dropin [--model CPU] [--mix "hh real"] [--turns 5] [--out DIR] [--smoke]

Each in a process of its own, taking turns: a step of 8 pairs, as 8 microbatches of 1 and as 1 of 8, with
a stored reference and without gradient checkpointing, which is TRL's fastest way. The model is
benchmarks.models' of that name; losses that differ between stock and patched are an error.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.inputs import random_rows
from benchmarks.lengths import MIXES, draw, summary
from benchmarks.models import MODELS, tiny
from benchmarks.results import RESULTS, write_result
from benchmarks.steps import TOLERANCE
from benchmarks.workers import Worker, Workers

PAIRS = 8  # an optimizer step
SIZES = (1, 8)  # pairs a microbatch
POOL = 512  # rows of the mix; the step takes PAIRS of them, evenly by length, over and over
MODULES = {"stock": "benchmarks.peers.trl_dpo", "patched": "benchmarks.peers.trl_patched"}


def job(args: argparse.Namespace, rows: Path, size: int) -> dict:
    """benchmarks.peers.jobs.Job's arguments."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"batch_size": size, "best": True}
    common = dict(model=args.model, rows=str(rows), device=device, tiny=args.smoke)
    return common | {"learning_rate": 1e-5, "options": options}


def measure(args: argparse.Namespace, folder: Path) -> dict:
    """{"rows": one dict a contender, "lengths"}."""
    pool = sorted(draw(args.mix, POOL), key=sum)
    lengths = pool[POOL // (2 * PAIRS) :: POOL // PAIRS]
    model = tiny(MODELS[args.model]) if args.smoke else MODELS[args.model]
    rows = random_rows(lengths, model.vocab)
    path = folder / "rows.json"
    path.write_text(json.dumps([rows]))
    found = {}
    for size in SIZES:  # two processes at a time: memory for no more is needed
        with Workers(folder) as workers:
            racing: dict[str, Worker] = {}
            for name, module in MODULES.items():
                racing[name] = workers.get(f"{name} {size}", module, {})
                racing[name].prepare(job(args, path, size))
            answers = {name: [worker.steps(1)] for name, worker in racing.items()}  # warm, not timed
            for _ in range(args.turns):
                for name, worker in racing.items():
                    answers[name].append(worker.steps(1))
        found[size] = {name: told(answer) for name, answer in answers.items()}
        check_losses(found[size], size)
    return {"lengths": summary(lengths), "pool": summary(pool), "sizes": found}


def told(answers: list[dict]) -> dict:
    """Of a contender's answers, the first one its warm step."""
    seconds = [answer["steps"][0]["seconds"] for answer in answers[1:]]
    return {
        "seconds": seconds,
        "pairs_per_second": PAIRS / statistics.median(seconds),
        "peak_bytes": max(answer["peak_bytes"] for answer in answers),
        "losses": [answer["steps"][0]["loss"] for answer in answers],
    }


def check_losses(of: dict[str, dict], size: int) -> None:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for stock, patched in zip(of["stock"]["losses"], of["patched"]["losses"]):
        if not abs(stock - patched) <= TOLERANCE[device]:
            raise SystemExit(f"batch size {size}: stock TRL's loss is {stock}, patched {patched}: no timing")


def table(record: dict) -> Table:
    out = Table("batch size", "pairs/s stock", "patched", "times", "peak GB stock", "patched", "of stock")
    for size, of in record["sizes"].items():
        rates = [of[name]["pairs_per_second"] for name in MODULES]
        peaks = [of[name]["peak_bytes"] / 1e9 for name in MODULES]
        speed, memory = rates[1] / rates[0], peaks[1] / peaks[0]
        cells = [*(f"{rate:.2f}" for rate in rates), f"{speed:.2f}x"]
        out.add_row(str(size), *cells, *(f"{peak:.2f}" for peak in peaks), f"{memory:.2f}x")
    return out


def main() -> int:
    """Measures, prints, writes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=MODELS, default="CPU")
    parser.add_argument("--mix", choices=MIXES, default="hh real")
    parser.add_argument("--turns", type=int, default=5, help="timed steps of each")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the JSON")
    parser.add_argument("--smoke", action="store_true", help="a tiny model: shows that all of it runs")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        record = {"model": args.model, "mix": args.mix, "smoke": args.smoke} | measure(args, Path(folder))
    Console(width=120).print(table(record))
    write_result("dropin", record, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
