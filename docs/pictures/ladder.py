"""The ladder of speed: whole training steps beside other trainers, fastdpo's ideas one after another."""

import re
from pathlib import Path

from benchmarks.models import MODELS
from benchmarks.results import RESULTS, newest_shown
from benchmarks.tables.blocks import measured, races
from benchmarks.tables.markdown import number, where
from docs.pictures.canvas import INK, MARGIN, RIGHT, Canvas
from fastdpo.report.plots import COLOURS

PEERS = ("TRL", "TRL, tuned malloc", "TRL, lengths grouped", "plain HF")  # families
RUNG = "ladder: "
PITCH, BAR = 37, 14


def draw(folder: Path = RESULTS) -> str:
    """From the newest steps on a GPU, or where there are none on a CPU."""
    for machine in ("gpu", "cpu"):
        record, path = newest_shown("steps", machine, folder)
        if record is not None:
            return draw_race(record, path.name)
    raise SystemExit("no result of steps to draw the ladder from: make bench-cpu")


def draw_race(record: dict, name: str) -> str:
    """The race that has the ladder, else the first."""
    model, mix, race = max(races(record), key=lambda found: any(map(is_rung, measured(found[2]))))
    found = contenders(measured(race))
    notes = notes_of(record) + [f"Medians, lines between quartiles: benchmarks/results/{name}"]
    canvas = Canvas(f"DPO steps: pairs a second on {'a GPU' if record['gpu'] else 'a CPU'}", 0)
    config = MODELS[model]
    said = [
        f"On {where(record)}; {race['plan']['pairs']} pairs a step, lengths of {mix}.",
        f"Random weights: hidden {config.hidden:,}, {config.layers} layers, vocabulary {config.vocab:,}.",
    ]
    canvas.notes(MARGIN, 52, said)
    scale = (RIGHT - MARGIN - 44) / max(r["quartiles"][1] for r in found.values())
    for i, (who, r) in enumerate(found.items()):
        draw_bar(canvas, 92 + PITCH * i, label(who, record), r, scale, shade(who))
    bottom = 92 + PITCH * len(found) + 8
    canvas.notes(MARGIN, bottom, notes)
    canvas.height = bottom + 17 * len(notes) - 3
    rates = "; ".join(f"{label(who, record)}: {number(r['pairs_per_second'])}" for who, r in found.items())
    return canvas.svg(f"Pairs a second, measured on {where(record)}. {rates}.")


def contenders(race: dict) -> dict:
    """The fastest of each peer from slow to fast, the rungs in their order, fastdpo."""
    peers = {n: r for n, r in race.items() if r.get("family") in PEERS and r.get("fastest_of_family")}
    peers = dict(sorted(peers.items(), key=lambda item: item[1]["pairs_per_second"]))
    rungs = {who: r for who, r in race.items() if is_rung(who)}
    return peers | rungs | {"fastdpo": race["fastdpo"]}


def is_rung(who: str) -> bool:
    return who.startswith(RUNG)


def label(who: str, record: dict) -> str:
    version = ".".join(record["versions"]["trl"].split(".")[:2])
    who = re.sub(r" \d+ x \d+", "", who).removeprefix(RUNG)
    return re.sub("^TRL", f"TRL {version}", who).replace("plain HF", "plain transformers")


def shade(who: str) -> str:
    return COLOURS["train"] if who == "fastdpo" else "#7db4d8" if is_rung(who) else "#9aa3ae"


def draw_bar(canvas: Canvas, y: float, who: str, r: dict, scale: float, colour: str) -> None:
    low, high = (MARGIN + scale * value for value in r["quartiles"])
    middle = y + 6 + BAR / 2
    canvas.words(MARGIN, y, who, bold=who == "fastdpo")
    canvas.box(MARGIN, y + 6, scale * r["pairs_per_second"], BAR, colour)
    canvas.line((low, middle), (high, middle), INK, 'stroke-width="1.5"')
    canvas.words(high + 7, middle + 5, number(r["pairs_per_second"]), bold=who == "fastdpo")


def notes_of(record: dict) -> list[str]:
    """What a reader has to know before comparing."""
    notes = ["The rungs compute the reference in each step, the others have it stored."]
    if not record["gpu"]:
        notes += [
            "On a CPU TRL scores prompts and padding too, on a GPU it does not.",
            "Tuned malloc: freed memory is kept. Nothing here is a GPU number.",
        ]
    return notes
