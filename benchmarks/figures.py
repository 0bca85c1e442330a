"""The benchmarks' plots: bars with their spread, log-log lines with the fitted slope, curves in a band.

Each goes as PNG and SVG to plots/ beside the JSON it is drawn from. The same numbers give the same bytes
of SVG.
"""

import functools
import io
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

try:
    from matplotlib import rc_context
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.ticker import FixedLocator, FuncFormatter, LogLocator, NullLocator

    from fastdpo.report.plots import COLOURS, short
except ModuleNotFoundError:  # numbers do not wait for plots
    Axes = Figure = rc_context = None

from benchmarks.results import RESULTS

LINES = ("train", "held-out", "chosen", "rejected", "ink", "muted")  # of COLOURS, in this order
MARKERS = "osD^vP"
STYLE = {
    "svg.fonttype": "none",
    "svg.hashsalt": "fastdpo",
    "font.family": "sans-serif",
    "font.size": 10,
    "text.parse_math": False,
}


@dataclass(frozen=True)
class Bar:
    """A contender: its median and the quartiles (or other ends of its spread)."""

    label: str
    value: float
    low: float | None = None
    high: float | None = None
    ours: bool = False


@dataclass(frozen=True)
class Line:
    """A measured number over a size."""

    label: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Band:
    """A curve for each seed: the mean is drawn, and from the lowest to the highest a band."""

    label: str
    ys: Sequence[Sequence[float]]  # [seeds][steps]


def _if_possible(draw: Callable[..., list[Path]]) -> Callable[..., list[Path]]:
    """draw, or without matplotlib a word about it. Nothing where BENCH_NO_PLOTS is set: from a machine that
    gives back few files only the numbers come."""

    @functools.wraps(draw)
    def drawn(name, *args, **options):
        if os.environ.get("BENCH_NO_PLOTS"):
            return []
        if rc_context is None:
            print(f"no plot of {name}: matplotlib is not installed")
            return []
        return draw(name, *args, **options)

    return drawn


@_if_possible
def bars(name: str, title: str, unit: str, items: Sequence[Bar], folder: Path = RESULTS) -> list[Path]:
    """Contenders under each other, ours in blue, with their numbers."""
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 0.9 + 0.33 * len(items)), layout="constrained")
        axes = make_axes(figure, title, grid="x")
        places = np.arange(len(items))
        colours = [COLOURS["train" if item.ours else "muted"] for item in items]
        axes.barh(places, [item.value for item in items], 0.66, color=colours)
        for place, item in zip(places, items):
            if item.low is not None:
                axes.plot([item.low, item.high], [place, place], color=COLOURS["ink"], lw=1.2)
            end = item.value if item.high is None else max(item.value, item.high)
            text = dict(xytext=(5, 0), textcoords="offset points", va="center", color=COLOURS["ink"])
            axes.annotate(f"{item.value:.3g}", (end, place), **text)
        axes.set_yticks(places, [item.label for item in items])
        axes.invert_yaxis()
        axes.set_xlim(0, 1.15 * max(max(item.value, item.high or 0) for item in items))
        axes.xaxis.set_major_formatter(FuncFormatter(short))
        axes.set_xlabel(unit, color=COLOURS["ink"])
        return save_figure(figure, name, folder)


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """The power k of the fit y = c x^k."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


@_if_possible
def loglog(
    name: str, title: str, x_label: str, y_label: str, lines: Sequence[Line], folder: Path = RESULTS
) -> list[Path]:
    """Points and the fitted power of each line, on two logarithmic axes; x_label and y_label with units."""
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = make_axes(figure, title, grid="both")
        for i, line in enumerate(lines):
            colour, label = COLOURS[LINES[i % len(LINES)]], line.label
            if len(line.x) > 1:
                power = slope(line.x, line.y)
                label += f" (slope {power:.2f})".replace("-", "−")
                x = np.array([min(line.x), max(line.x)], float)
                scale = np.exp(np.mean(np.log(line.y)) - power * np.mean(np.log(line.x)))
                axes.plot(x, scale * x**power, color=colour, lw=1, alpha=0.5)
            axes.plot(line.x, line.y, MARKERS[i % len(MARKERS)], color=colour, ms=5, label=label)
        axes.set_xscale("log")
        axes.set_yscale("log")
        sizes = sorted({x for line in lines for x in line.x})
        axes.xaxis.set_major_locator(FixedLocator(sizes) if len(sizes) <= 10 else LogLocator())
        axes.xaxis.set_minor_locator(NullLocator())
        low, high = axes.get_ylim()
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if high > 100 * low else (1.0, 2.0, 5.0)))
        axes.yaxis.set_minor_formatter(FuncFormatter(lambda *_: ""))
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter(FuncFormatter(short))
        axes.set_xlabel(x_label, color=COLOURS["ink"])
        axes.set_ylabel(y_label, color=COLOURS["ink"])
        add_legend(axes)
        return save_figure(figure, name, folder)


@_if_possible
def curves(
    name: str, title: str, x_label: str, y_label: str, bands: Sequence[Band], folder: Path = RESULTS
) -> list[Path]:
    """Curves over steps 1, 2, ..., each with the band of its seeds."""
    with rc_context(STYLE):
        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = make_axes(figure, title, grid="y")
        for i, band in enumerate(bands):
            ys, colour = np.asarray(band.ys, float), COLOURS[LINES[i % len(LINES)]]
            steps = np.arange(1, ys.shape[1] + 1)
            if len(ys) > 1:
                axes.fill_between(steps, ys.min(0), ys.max(0), color=colour, alpha=0.15, lw=0)
            dashes = "-" if i == 0 else (0, (4, 2))  # both are seen where they agree
            axes.plot(steps, ys.mean(0), color=colour, lw=1.6, ls=dashes, label=band.label)
        axes.yaxis.set_major_formatter(FuncFormatter(short))
        axes.set_xlabel(x_label, color=COLOURS["ink"])
        axes.set_ylabel(y_label, color=COLOURS["ink"])
        add_legend(axes)
        return save_figure(figure, name, folder)


def make_axes(figure: Figure, title: str, grid: str) -> Axes:
    axes = figure.add_subplot()
    axes.set_title(title, loc="left", weight="bold", size=11, color=COLOURS["ink"])
    axes.grid(True, axis=grid, color=COLOURS["grid"], lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=COLOURS["ink"], length=0, which="both")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.spines["bottom"].set_color(COLOURS["muted"])
    return axes


def add_legend(axes: Axes) -> None:
    axes.legend(frameon=False, labelcolor=COLOURS["ink"], fontsize=9)


def save_figure(figure: Figure, name: str, folder: Path) -> list[Path]:
    """plots/<name>.svg and .png; name says what is shown as the JSON's name does."""
    stem = re.sub(r"[^A-Za-z0-9.-]+", "_", name).strip("_")
    plots = folder / "plots"
    plots.mkdir(parents=True, exist_ok=True)
    svg = io.StringIO()
    figure.savefig(svg, format="svg", facecolor="white", metadata={"Date": None, "Creator": None})
    paths = [plots / f"{stem}.svg", plots / f"{stem}.png"]
    paths[0].write_text(re.sub(r"[ \t]+\n", "\n", svg.getvalue()))
    figure.savefig(paths[1], format="png", dpi=130, facecolor="white")
    return paths
