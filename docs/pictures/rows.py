"""From a file to rows that can be trained on: how seconds grow with rows, and rows a second with cores."""

import math
from pathlib import Path

from benchmarks.results import RESULTS, newest_shown
from benchmarks.tables.markdown import number, where
from benchmarks.tables.row_blocks import core_counts, median, rate, sizes
from docs.pictures.canvas import INK, MARGIN, RIGHT, SMALL, SOFT, Canvas
from fastdpo.report.plots import COLOURS

TITLE = "From a file to rows to train on"
PALE_BLUE, GREY, PALE_GREY = "#7db4d8", "#9aa3ae", "#c9ced5"
LINES = {  # (who, start): what it is called, its colour
    ("ours", "first"): ("fastdpo, first start", COLOURS["train"]),
    ("ours", "second"): ("fastdpo, second start", PALE_BLUE),
    ("trl", "first"): ("TRL 1.16, first start", GREY),
    ("trl", "second"): ("TRL 1.16, second start", PALE_GREY),
}
LEFT, TOP, BOTTOM, END = 58, 122, 322, RIGHT - 52  # of the upper part
PITCH, BAR = 21, 13


def draw(folder: Path = RESULTS) -> str:
    """From the newest rows on a CPU; without any, that they wait."""
    record, path = newest_shown("rows", "cpu", folder)
    if record is None:
        canvas, command = Canvas(TITLE, 70), "python -m benchmarks.rows.run"
        canvas.notes(MARGIN, 50, [f"Not measured yet: {command}"])
        return canvas.svg(f"Seconds over rows and rows a second over cores, not measured yet: {command}")
    counts = core_counts(record)
    size = max(rows for rows in sizes(record) if all(rate(record, "trl", rows, n) for n in counts))
    bars = [(who, n, rate(record, who, size, n)) for n in counts for who in ("ours", "trl")]
    under = BOTTOM + 76
    canvas = Canvas(TITLE, under + PITCH * len(bars) + 50)
    canvas.notes(MARGIN, 50, [f"On {where(record)}; imports and the tokenizer not counted."])
    canvas.legend(76, dict(LINES.values()), columns=2)
    told = draw_lines(canvas, record)
    canvas.words(MARGIN, under - 14, f"Rows a second of a first start, {size:,} rows", bold=True)
    longest = max(value for *_, value in bars)
    for i, (who, n, value) in enumerate(bars):
        y, name = under + PITCH * i, "fastdpo" if who == "ours" else "TRL 1.16"
        canvas.words(MARGIN, y + 11, f"{name}, {n} core{'s' * (n > 1)}")
        canvas.box(MARGIN + 130, y, (RIGHT - MARGIN - 190) * value / longest, BAR, LINES[who, "first"][1])
        end = MARGIN + 136 + (RIGHT - MARGIN - 190) * value / longest
        canvas.words(end, y + 11, number(value), bold=who == "ours")
    notes = ["Medians of processes of their own, by turns:", f"benchmarks/results/{path.name}"]
    canvas.notes(MARGIN, under + PITCH * len(bars) + 20, notes)
    cores = "; ".join(f"{who}, {n} cores: {number(value)}" for who, n, value in bars)
    return canvas.svg(f"Seconds over rows. {told}. Rows a second at {size:,} rows. {cores}.")


def draw_lines(canvas: Canvas, record: dict) -> str:
    """Seconds over rows on two logarithmic axes, on all cores; returns them in words."""
    cores, lines = core_counts(record)[-1], {}
    for (who, start), look in LINES.items():
        found = [
            (n, median(record, "seconds", who=who, rows=n, cores=cores, start=start)) for n in sizes(record)
        ]
        lines[look] = [(n, seconds) for n, seconds in found if seconds is not None]
    times = [seconds for points in lines.values() for _, seconds in points]
    low, high = math.floor(math.log10(min(times))), math.ceil(math.log10(max(times)))
    first, last = math.log10(sizes(record)[0]), math.log10(sizes(record)[-1])
    x_of = lambda n: LEFT + (END - LEFT) * (math.log10(n) - first) / max(last - first, 1e-9)
    y_of = lambda seconds: BOTTOM - (BOTTOM - TOP) * (math.log10(seconds) - low) / max(high - low, 1)
    for power in range(low, high + 1):
        canvas.box(LEFT, y_of(10.0**power) - 0.5, END - LEFT, 1, COLOURS["grid"])
        canvas.words(LEFT - 8, y_of(10.0**power) + 4, f"{10.0**power:g} s", SMALL, SOFT, anchor="end")
    for n in sizes(record):
        canvas.words(x_of(n), BOTTOM + 18, f"{n:,}", SMALL, SOFT, anchor="middle")
    canvas.words(LEFT, BOTTOM + 38, "rows", SMALL, SOFT)
    ends: dict[tuple[float, float], str] = {}
    for (_, colour), points in lines.items():
        places = [(x_of(n), y_of(seconds)) for n, seconds in points]
        canvas.line(places, colour)
        for place in places:
            canvas.dot(*place, colour)
        if points:
            ends[places[-1]] = number(points[-1][1])
    lowest: dict[float, float] = {}
    for (x, y), word in sorted(ends.items(), reverse=True):  # from below, none over another
        lowest[x] = min(y + 4, lowest.get(x, BOTTOM) - 15)
        canvas.words(x + 8, lowest[x], word, SMALL, INK)
    said = lambda points: ", ".join(f"{n:,} rows {number(seconds)} s" for n, seconds in points)
    return "; ".join(f"{name}: {said(points)}" for (name, _), points in lines.items() if points)
