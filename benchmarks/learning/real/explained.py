"""What DPO changed inside a real assistant, as 2411.06424 asks it of GPT-2: `fastdpo explain` of two tasks.

    python -m benchmarks.learning.real.explained [--only TASK] [--work DIR] [--out DIR]

Each task is trained with some seeds, and has a record. What has ended stays in --work, and the same command
goes on there.
"""

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import fastdpo
from benchmarks.learning.real import sentiment
from benchmarks.learning.real.grid import HH_TEST, HH_TRAIN
from benchmarks.learning.real.start import QUIET, absent, installed
from benchmarks.results import RESULTS, write_result
from fastdpo.files import durable

SEEDS = {"harmless": (0, 1, 2), "sentiment": (0, 1)}
ROWS, HELD_OUT = 800, 300  # that a seed draws to train on, of which half are short enough; held-out ones
HARMLESS = {
    "learning_rate": 2e-5,
    "batch_size": 16,
    "warmup_steps": 8,
    "max_length": 160,
    "truncation": "drop",
}
SENTIMENT = {"learning_rate": 5e-4, "batch_size": 8, "warmup_steps": 4, "max_length": 128, "max_steps": 20}
SENTIMENT |= {"lora_rank": 16}
KEYS = {"harmless": HARMLESS, "sentiment": SENTIMENT}
LOOKED_AT: dict[str, Any] = {"pairs": 200, "random_sets": 3, "causes": 24}
ASKED: dict[str, dict] = {"harmless": {}, "sentiment": {"scorer": "vader", "samples": 32}}
PROMPTS, ANSWERS = 96, 4  # of the start model, which sentiment's pairs are made of


def rows(task: str, seed: int, work: Path) -> tuple[Path, Path]:
    """Rows to train on, and held-out ones."""
    train, held_out = work / f"{task}-{seed}.jsonl", work / f"{task}-held-out.jsonl"
    if task == "harmless":
        _harmless(train, held_out, seed)
    else:
        _sentiment(train, held_out, seed)
    return train, held_out


def _harmless(train: Path, held_out: Path, seed: int) -> None:
    """hh-rlhf's harmless-base; no held-out row shares its opening question with one that is trained on."""
    known, new = (
        [row for row in map(json.loads, file.read_text().splitlines()) if "harmless" in row["source"]]
        for file in (HH_TRAIN, HH_TEST)
    )
    opening = lambda row: row["prompt"][0]["content"]
    cut = len(known) - HELD_OUT
    pool, new = known[:cut], new + known[cut:]
    seen = {opening(row) for row in pool}
    new = [row for row in new if opening(row) not in seen]
    for path, some in ((train, random.Random(seed).sample(pool, ROWS)), (held_out, new)):
        if not path.exists():
            durable.write_text(path, "".join(json.dumps(row) + "\n" for row in some))


def _sentiment(train: Path, held_out: Path, seed: int) -> None:
    """The start model's own answers, ranked by VADER's rules."""
    model = str(installed())
    for path, asked, drawn in (
        (train, sentiment.prompts(held_out=False)[seed * PROMPTS : (seed + 1) * PROMPTS], seed),
        (held_out, sentiment.prompts(held_out=True)[:HELD_OUT], 2000),
    ):
        if not path.exists():
            sentiment.write_rows(path, model, SENTIMENT["lora_rank"], asked, ANSWERS, drawn)


def best_and_worst(ranked: Path) -> Path:
    """The same prompts with two of their answers: a pair each, where not all score the same."""
    path, lines = ranked.with_suffix(".pairs.jsonl"), []
    for row in map(json.loads, ranked.read_text().splitlines()):
        order = sorted(row["responses"], key=lambda one: -one["score"])
        if order[0]["score"] > order[-1]["score"]:
            lines.append(json.dumps(row | {"responses": [order[0], order[-1]]}) + "\n")
    durable.write_text(path, "".join(lines))
    return path


def trained(task: str, seed: int, work: Path) -> Path:
    train, held_out = rows(task, seed, work)
    run = work / f"{task}-{seed}"
    if not (run / "model").exists():
        keys = {"model": str(installed()), "data": str(train), "output_dir": str(run), "seed": seed}
        keys |= {"reference_cache": str(work / f"{task}.sqlite"), "resume": True, "samples": 0}
        keys |= {
            "data_cache": str(work / "tokens"),
            "eval_data": f"{held_out}#train[:80]",
            "max_tokens": 8192,
        }
        fastdpo.train(keys | {"logging_steps": 4, "save_steps": 20, "max_tokens": 8192} | KEYS[task], QUIET)
    return run


def explained(task: str, seed: int, work: Path) -> dict:
    """What `fastdpo explain` finds of a trained one, as far as the record has it."""
    run, made = trained(task, seed, work), work / f"{task}-{seed}" / "explain" / "explain.json"
    if not made.exists():
        held_out = rows(task, seed, work)[1]
        if task == "sentiment":
            held_out = best_and_worst(held_out)
        fastdpo.explain(run, data=str(held_out), **LOOKED_AT, **ASKED[task], console=QUIET)
    found = json.loads(made.read_text())
    kept = {name: found[name] for name in ("direction", "data", "where", "seconds")}
    numbers = found["behaviour"]["numbers"]
    kept["behaviour"] = {name: numbers[name]["value"] for name in ("margins", "kl/reverse")}
    kept["by_position"] = [(one["last"], one["kl"]) for one in found["behaviour"]["by_position"]]
    if found["neurons"]:
        named = ("neurons", "gross", "raised", "net", "activation", "value", "concentration")
        kept["neurons"] = {name: found["neurons"][name] for name in named}
        keys = ("name", "paper", "lowers", "count", "sum", "share")
        kept["neurons"]["groups"] = [{key: one[key] for key in keys} for one in found["neurons"]["groups"]]
        kept["causes"] = {key: found["causes"].get(key) for key in ("effect", "rows", "reason")}
    return kept


def main() -> int:
    """Trains and explains what is missing; a task's record is written when all of it is there."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=KEYS, help="one task")
    parser.add_argument("--work", type=Path, default=Path("runs/explained"), help="rows, runs and caches")
    parser.add_argument("--out", type=Path, default=RESULTS, help="the folder of the JSON")
    args = parser.parse_args()
    if why := absent(None) or (None if HH_TRAIN.exists() else f"not there: {HH_TRAIN.name}"):
        print(why)
        return 2
    args.work.mkdir(parents=True, exist_ok=True)
    for task in [args.only] if args.only else KEYS:
        seeds = {str(seed): explained(task, seed, args.work) for seed in SEEDS[task]}
        record = {"model": Path(str(installed())).name, "keys": KEYS[task], "asked": LOOKED_AT | ASKED[task]}
        write_result(f"explained_{task}", record | {"seeds": seeds}, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
