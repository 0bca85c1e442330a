"""The race of training steps on prompts with pictures: fastdpo beside TRL's vision trainer.

TRL refuses to store the reference of rows with images and computes it in every step; ours is made before, and
both are told: a step that finds it, and a step of the first epoch, with its rows' part of the fill. Four
responses are two pairs of one prompt, each response in one of them: fewer rows TRL cannot take. TRL's clock
does not see its pixels made, ours does.
"""

import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.pictures import picture_rows
from benchmarks.steps.contenders import BATCHED, fastdpo
from benchmarks.steps.race import Contender, Race
from benchmarks.steps.steps import Plan, first_twice, raced
from benchmarks.steps.timed import mark_fastest, timed
from benchmarks.workers import Workers

PAIRS_A_PROMPT = {"2 responses": 1, "4 responses": 2}
ASKED = {"2 responses": 1.8, "4 responses": 2.8}  # times TRL's tokens a second
SHAPE = {"image_tokens": 1024, "prompt": 1100, "response": 150}
TINY_SHAPE = {"image_tokens": 4, "prompt": 10, "response": 8}
AROUND = 2  # tokens beside an image's
WORKER = "benchmarks.peers.trl_images"


def trl(size: int, pairs: int, label: str = "", **options) -> Contender:
    """TRL with this many pairs a microbatch; nobody recomputes layers."""
    how = replace(BATCHED, padded_to=size, reference_forward=True)
    options = {"batch_size": size, "best": True} | options
    name = f"TRL{label} {size} x {pairs // size}"
    family = "patched" if options.get("patch") else "TRL"
    return Contender(name, WORKER, options, how, family=family, sizes_of=f"TRL{label}")


def contenders(pairs: int, sizes: tuple[int, ...], max_tokens: int) -> list[Contender]:
    """fastdpo, TRL at each size, and at the first one with what may make it faster, our patch() last."""
    more = {
        " + flash-attn": {"flash": True},
        " + liger layers": {"liger": True},
        " + patch()": {"patch": True},
    }
    faster = [trl(sizes[0], pairs, label, **options) for label, options in more.items()]
    return [fastdpo(max_tokens), *(trl(size, pairs) for size in sizes), *faster]


def measure_images(
    plan: Plan, field: list[Contender], workers: Workers, keep: Callable[[dict], None] = lambda record: None
) -> dict:
    """One model and number of responses, the plan's mix: as steps.measure_steps, with "shape" in the lengths'
    place."""
    each, shape = PAIRS_A_PROMPT[plan.mix], TINY_SHAPE if plan.tiny else SHAPE
    prompts = plan.pairs // each
    text = shape["prompt"] - shape["image_tokens"] - AROUND
    told = shape | {"prompts": prompts, "responses": 2 * each}
    with tempfile.TemporaryDirectory() as folder:
        made = lambda seed: picture_rows(
            plan.bench_model,
            *(shape["image_tokens"], text, shape["response"]),
            *((prompts, each), Path(folder), seed),
        )
        rows = {"even": [made(seed) for seed in range(plan.distinct)]}
        first_twice(rows["even"], plan)
        return raced(plan, field, rows, workers, lambda race: record_of(race, plan, told), keep)


def record_of(race: Race, plan: Plan, shape: dict) -> dict:
    """What a race says, during it too."""
    tokens = shape["prompts"] * (shape["prompt"] + shape["responses"] * shape["response"])
    numbers = {c.name: timed(c, race, plan.pairs, tokens, tokens) for c in race.contenders}
    mark_fastest(numbers)
    ours = numbers[race.ours.name]
    fill = race.entries[race.ours.name].facts.get("reference")
    for name, told in numbers.items():
        if "pairs_per_second" in told:
            told |= seen(race.entries[name].also[plan.checks :])
        if "collating_seconds" in told:
            pixels = 1 + told["collating_seconds"] / told["median_seconds"]
            told["fastdpo_times_faster_with_trls_pixels"] = told["fastdpo_times_faster"] * pixels
    if fill and "pairs_per_second" in ours:
        rows = fill["seconds"] / fill["responses"] * shape["responses"] * shape["prompts"]
        slower = 1 + rows / ours["median_seconds"]
        first = ours["useful_tokens_per_second"] / slower
        ours |= {"fill_seconds_a_step": rows, "first_epoch_tokens_per_second": first}
        for told in numbers.values():
            if told is not ours and "pairs_per_second" in told:
                told["fastdpo_times_faster_in_a_first_epoch"] = told["fastdpo_times_faster"] / slower
    return {"shape": shape, "asked": ASKED[plan.mix], "summary": numbers}


def seen(steps: list[dict]) -> dict:
    """The medians of what steps tell besides their seconds."""
    return {key: statistics.median(step[key] for step in steps) for key in (steps[0] if steps else ())}


def print_table(title: str, record: dict, console: Console) -> None:
    """The contenders under each other; below, who has no numbers and why."""
    columns = ("", "tokens/s", "peak GB", "images seen", "by a reference", "fastdpo is", "in a first epoch")
    table, shape = Table(title=title), record["shape"]
    for column in columns:
        table.add_column(column, justify="right" if column else "left")
    for name, r in record["summary"].items():
        if "pairs_per_second" not in r:
            continue
        first = r.get("fastdpo_times_faster_in_a_first_epoch")
        table.add_row(
            name + (" *" if r.get("fastest_of_family") else "") + ("" if r["interleaved"] else " (alone)"),
            f"{r['useful_tokens_per_second']:,.0f}",
            f"{r['peak_gb']:.2f}",
            *(f"{r[key] / shape['prompts']:.1f} an image" for key in ("images", "reference_images")),
            f"{r['fastdpo_times_faster']:.2f}x faster",
            "" if first is None else f"{first:.2f}x",
        )
    console.print(table)
    for name, r in record["summary"].items():
        if "pairs_per_second" not in r:
            console.print(f"  {name}: {r['state']}: {r['why']}", style="dim", highlight=False)
    console.print(f"* the fastest of its settings. Asked: {record['asked']}x TRL's tokens a second.")
