"""What examples/smollm2_hh.yaml learns: trained on some of hh-rlhf's helpful rows, evaluated on others.

    python -m benchmarks.learning.real.example [--work DIR] [--out DIR]

Twice an honest number: in the second half of the only pass over the data, where each pair is scored before it
is trained on, and on held-out rows, none of which shares its opening question with a row of the training.
"""

import argparse
import json
import math
import sys
from datetime import datetime
from pathlib import Path

import numpy as np
import yaml

import fastdpo
from benchmarks.learning.real.grid import HH_TEST, HH_TRAIN
from benchmarks.learning.real.start import absent, installed
from benchmarks.process import ROOT
from benchmarks.results import RESULTS, write_result

TRAINED = 1500  # rows
MAX_LENGTH = 512  # of the held-out rows: those that the training leaves out for their length count as well
NUMBERS = ("rewards/accuracies", "rewards/margins", "loss")
BY_LENGTH = ("rewards/accuracies_longer", "rewards/accuracies_shorter")


def write_rows(work: Path) -> tuple[Path, Path]:
    """Rows to train on, and held-out ones."""
    train, test = (
        [row for row in map(json.loads, file.read_text().splitlines()) if "helpful" in row["source"]]
        for file in (HH_TRAIN, HH_TEST)
    )
    opening = lambda row: row["prompt"][0]["content"]
    seen = {opening(row) for row in train[:TRAINED]}
    held_out = test + [row for row in train[TRAINED:] if opening(row) not in seen]
    paths = work / "train.jsonl", work / "held_out.jsonl"
    work.mkdir(parents=True, exist_ok=True)
    for path, rows in zip(paths, (train[:TRAINED], held_out)):
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return paths


def of_run(run: Path) -> dict:
    """How it was trained, how right it was on pairs that were new to it, and how long it took behind the
    reference."""
    config = yaml.safe_load((run / "config.yaml").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    stage = next(event for event in events if event["event"] == "stage")
    trained = [line for line in lines if "loss" in line]  # each of the steps since the last
    steps = np.diff([0, *(line["step"] for line in trained)])
    new = [0.5 < line["epoch"] <= 1 for line in trained]
    right = np.array([line["rewards/accuracies"] for line in trained])
    began, ended = (datetime.fromisoformat(event["time"]) for event in (stage, events[-1]))
    accuracy, pairs = float(np.average(right[new], weights=steps[new])), stage["pairs"] // 2
    return {
        "learning_rate": config["learning_rate"],
        "steps": stage["steps"],
        "pairs": stage["pairs"],
        "new_pairs": {"value": accuracy, "stderr": math.sqrt(accuracy * (1 - accuracy) / pairs)},
        "seconds": (ended - began).total_seconds(),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("runs/example"), help="rows, runs and the cache")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the JSON")
    args = parser.parse_args()
    if why := absent(None) or (None if HH_TRAIN.exists() else f"not there: {HH_TRAIN.name}"):
        print(why)
        return 2
    train, held_out = map(str, write_rows(args.work))
    keys = yaml.safe_load((ROOT / "examples/smollm2_hh.yaml").read_text())
    keys |= {"model": installed(), "data": train, "eval_data": f"{held_out}#train[:120]", "resume": True}
    keys |= {"reference_cache": str(args.work / "reference.sqlite"), "logging_steps": 4}
    run = args.work / "run"
    if not (run / "model").exists():
        fastdpo.train(keys, output_dir=run)
    found = fastdpo.evaluate(run, held_out, max_length=MAX_LENGTH, overwrite=True)
    numbers = {name: found["numbers"]["model"][name] for name in (*NUMBERS, *BY_LENGTH)}
    write_result("example", {"run": of_run(run), "held_out": numbers, "data": found["data"]}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
