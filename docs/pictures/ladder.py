"""The ladder of speed: whole training steps beside other trainers, fastdpo's ideas one after another."""

import re
from pathlib import Path

from benchmarks.models import MODELS
from benchmarks.results import RESULTS, newest_shown
from benchmarks.tables.blocks import measured, races
from benchmarks.tables.markdown import number, where
from docs.pictures.canvas import INK, MARGIN, PAPER, RIGHT, Canvas
from fastdpo.report.plots import COLOURS

PEERS = ("TRL", "TRL, tuned malloc", "TRL, lengths grouped", "plain HF")  # families
RUNG = "ladder: "
TUNED, STAR = ", tuned malloc", " *"
TOP, PITCH, BAR, GAP = 84, 21, 13, 7  # where bars begin, from bar to bar, a bar, more between kinds


def draw(folder: Path = RESULTS) -> str:
    """From the newest steps on a GPU, or where there are none on a CPU."""
    for machine in ("gpu", "cpu"):
        record, path = newest_shown("steps", machine, folder)
        found = [race for race in races(record or {"results": {}}) if "fastdpo" in measured(race[2])]
        if found:  # the one that has the ladder, else the first
            best = max(found, key=lambda race: any(map(is_rung, measured(race[2]))))
            return draw_race(record, path.name, *best)
    raise SystemExit("no result of steps to draw the ladder from: make bench-cpu")


def draw_race(record: dict, name: str, model: str, mix: str, race: dict) -> str:
    """One race of the record that the file of this name holds."""
    found = {label(who, record): (r, shade(who)) for who, r in contenders(measured(race)).items()}
    notes = notes_of(record, found)
    notes += [f"Medians and quartiles, steps of {race['plan']['pairs']} pairs:", f"benchmarks/results/{name}"]
    kinds = len({colour for _, colour in found.values()})
    bottom = TOP + PITCH * len(found) + GAP * (kinds - 1) + 18
    on, dtype = ("a GPU", "bf16") if record["gpu"] else ("a CPU", "fp32")
    canvas = Canvas(f"DPO steps: pairs a second on {on}", bottom + 17 * len(notes) - 4)
    size = MODELS[model]
    shape = f"{size.layers} layers, hidden {size.hidden}, vocabulary {size.vocab:,}"
    said = [
        f"On {where(record)}, {dtype}, row lengths of {mix}.",
        f"{model if record['gpu'] else shape}, random weights.",
    ]
    canvas.notes(MARGIN, 50, said)
    draw_bars(canvas, found)
    canvas.notes(MARGIN, bottom, notes)
    rates = "; ".join(f"{who}: {number(r['pairs_per_second'])}" for who, (r, _) in found.items())
    return canvas.svg(f"Pairs a second, measured on {where(record)}. {rates}. {' '.join(notes)}")


def contenders(race: dict) -> dict:
    """The fastest of each peer from slow to fast, the rungs in their order, fastdpo."""
    peers = {who: r for who, r in race.items() if r["family"] in PEERS and r.get("fastest_of_family")}
    peers = dict(sorted(peers.items(), key=lambda item: item[1]["pairs_per_second"]))
    rungs = {who: r for who, r in race.items() if is_rung(who)}
    return peers | rungs | {"fastdpo": race["fastdpo"]}


def is_rung(who: str) -> bool:
    return who.startswith(RUNG)


def label(who: str, record: dict) -> str:
    """Without batch sizes; of TRL with its version."""
    version = ".".join(record["versions"]["trl"].split(".")[:2])
    who = re.sub(r" \d+ x \d+", "", who).removeprefix(RUNG).replace(TUNED, STAR)
    return re.sub("^TRL", f"TRL {version}", who).replace("plain HF", "plain transformers")


def shade(who: str) -> str:
    return COLOURS["train"] if who == "fastdpo" else "#7db4d8" if is_rung(who) else "#9aa3ae"


def draw_bars(canvas: Canvas, found: dict) -> None:
    left = MARGIN + 10 + 7.4 * max(map(len, found))
    scale = (RIGHT - left - 42) / max(r["quartiles"][1] for r, _ in found.values())
    y, before = TOP, None
    for who, (r, colour) in found.items():
        y += GAP * (before not in (None, colour))
        before, bold = colour, who == "fastdpo"
        low, high = (left + scale * value for value in r["quartiles"])
        canvas.words(MARGIN, y + 11, who, bold=bold)
        canvas.box(left, y, scale * r["pairs_per_second"], BAR, colour)
        canvas.box(low, y + 4.5, high - low, 4, PAPER)
        canvas.box(low, y + 5.5, high - low, 2, INK)
        canvas.words(high + 6, y + 11, number(r["pairs_per_second"]), bold=bold)
        y += PITCH


def notes_of(record: dict, found: dict) -> list[str]:
    """What a reader has to know before comparing."""
    notes = [
        "Light blue: fastdpo's ideas one by one; these compute the",
        "reference in each step, all others have it stored.",
    ]
    if any(who.endswith(STAR) for who in found):
        notes += ["* with glibc told to keep freed memory, which is faster."]
    if not record["gpu"]:
        notes += ["On a CPU TRL scores prompts and padding too, on a GPU it does not."]
    return notes
