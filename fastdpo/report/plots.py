"""Charts of a run as SVG, for the report, and as PNG, to send to somebody."""

import io
import itertools
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from fastdpo.report.history import Series

# Okabe and Ito's colours, told apart by colour-blind people too. The report's style sheet names the same
# ones and lighter ones for a dark page: in the SVG each of these becomes the style sheet's variable.
COLOURS = {
    "train": "#0072b2",
    "held-out": "#d55e00",
    "chosen": "#009e73",
    "rejected": "#b8559a",
    "ink": "#3b4450",
    "muted": "#8a939e",
    "grid": "#dfe3e8",
}
_MOST_POINTS = 400  # of a curve: more than its pixels show nothing, and only make the page heavy
DASHED = (0, (4, 2))
DOTTED = (0, (1, 1.3))
SMALL_PRINT: dict = dict(textcoords="offset points", color=COLOURS["muted"], size=8.5)
STYLE: dict = {
    "svg.fonttype": "none",  # text stays text: readable by machines, in the page's own font
    "svg.hashsalt": "fastdpo",
    "font.family": "sans-serif",
    "font.size": 10,
    "path.simplify": False,
    "text.parse_math": False,
}


@dataclass
class Curve:
    """One line: a number over steps. Held-out ones have a dot at every evaluation; two have no line."""

    label: str
    colour: str
    series: Series
    dots: bool
    style: Any = None  # of the line; None: dashed where it is held-out
    error: Series | None = None  # a band of so much above and below, where it is known


@dataclass
class Chart:
    """What one figure shows."""

    name: str  # of the PNG, and of the ids in the SVG
    title: str
    unit: str
    curves: list[Curve]
    levels: list[tuple[float, str]]  # to compare with, such as chance or the clip
    log_scale: bool = False
    note: str = ""  # what a reader should know
    legend: bool = True  # False where the page has one for all charts
    of: str = "optimizer step"  # what its steps are


@dataclass
class Mark:
    """Something that happened at a step: a stage began, a run went on."""

    step: float
    label: str
    is_stage: bool


def draw(chart: Chart, marks: list[Mark], folder: Path | None) -> Markup:
    """SVG without its XML header; a PNG, too, into a folder that is named."""
    with rc_context(STYLE):
        axes = new_axes(chart.of, chart.unit)
        for curve in chart.curves:
            _plot(axes, curve)
        if chart.log_scale:
            axes.set_yscale("log")
        axes.yaxis.set_major_formatter(short)
        axes.yaxis.set_minor_formatter("")
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        for value, label in chart.levels:
            axes.axhline(value, color=COLOURS["muted"], lw=1, ls=(0, (1, 2)))
            at_the_right: dict = dict(xycoords=axes.get_yaxis_transform(), xytext=(0, 2), ha="right")
            axes.annotate(label, (0.998, value), **at_the_right, **SMALL_PRINT)
        first = min(curve.series.step[0] for curve in chart.curves)
        _mark(axes, [mark for mark in marks if mark.step >= first or (mark.is_stage and first <= 1)])
        _legend(axes, chart.curves if chart.legend else [])
        return render(axes, chart.name, chart.title, folder)


def draw_lengths(edges: list[int], counts: list[int], limit: int | None, folder: Path | None) -> Markup:
    """The histogram of sequence lengths, and where rows are cut; see `draw`."""
    with rc_context(STYLE):
        axes = new_axes("prompt + response, in tokens", "responses")
        axes.bar(edges[:-1], counts, np.diff(edges) * 0.92, align="edge", color=COLOURS["train"])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_formatter("{x:,.0f}")
        if limit and limit <= 1.5 * edges[-1]:
            _mark(axes, [Mark(limit, f"max_length {limit:,}", False)])
        return render(axes, "lengths", "Lengths", folder)


def draw_histogram(
    name: str,
    title: str,
    labels: tuple[str, str],
    edges: np.ndarray,
    counts: dict[str, tuple[str, np.ndarray]],
) -> Markup:
    """Histograms over each other, {label: (colour, counts)}, with the same edges; labels: of the axes."""
    with rc_context(STYLE):
        axes = new_axes(*labels)
        for label, (colour, some) in counts.items():
            axes.stairs(some, edges, color=COLOURS[colour], lw=1.6, label=label)
        axes.set_ylim(bottom=0)
        axes.xaxis.set_major_formatter(short)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        legend_above(axes)
        return render(axes, name, title, None)


def new_axes(
    x_label: str,
    y_label: str,
    size: tuple[float, float] = (5.2, 3.0),
    place: tuple[float, float, float, float] = (0.15, 0.165, 0.83, 0.72),
) -> Axes:
    """An empty plot in the pages' style; its size in inches, its place in the figure."""
    axes = Figure(figsize=size).add_axes(place)
    axes.grid(True, axis="y", color=COLOURS["grid"], lw=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=COLOURS["ink"], length=0, which="both")
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(COLOURS["muted"])
    axes.margins(x=0.015, y=0.1)  # room above the curves for the names of the marks
    axes.set_xlabel(x_label, color=COLOURS["ink"])
    axes.set_ylabel(y_label, color=COLOURS["ink"], labelpad=7)
    return axes


def _plot(axes: Axes, curve: Curve) -> None:
    colour, style = COLOURS[curve.colour], curve.style or (DASHED if curve.dots else "-")
    _band(axes, curve)
    label: str | None = curve.label
    for stage in np.unique(curve.series.stage):
        part = curve.series.of_stage(stage)
        if curve.dots or len(part) < 20:
            part = thinned(part)
            is_course = len(part) > 2 or not curve.dots or curve.style  # two evaluations show none
            marker: dict = dict(marker="o", ms=4 if len(part) <= 40 else 0, ls=style if is_course else "")
            axes.plot(part.step, part.value, color=colour, lw=1.6, label=label, **marker)
        else:
            raw = thinned(part)
            some = np.unique(np.linspace(0, len(part) - 1, _MOST_POINTS // 2).astype(int))
            axes.plot(raw.step, raw.value, color=colour, lw=1, alpha=0.28)
            axes.plot(
                part.step[some], smoothed(part.value)[some], color=colour, lw=1.8, ls=style, label=label
            )
        label = None  # a legend entry for all stages


def _band(axes: Axes, curve: Curve) -> None:
    if curve.error is not None:
        known = curve.series.where(np.isin(curve.series.step, curve.error.step))
        error = curve.error.where(np.isin(curve.error.step, known.step)).value
        look: dict = dict(color=COLOURS[curve.colour], alpha=0.18, lw=0)
        axes.fill_between(known.step, known.value - error, known.value + error, **look)


def _mark(axes: Axes, marks: list[Mark]) -> None:
    """Stages by a line with their name, resumes by a fine one."""
    for mark in marks:
        style = dict(lw=1, alpha=0.9) if mark.is_stage else dict(lw=0.9, ls=(0, (3, 3)), alpha=0.8)
        axes.axvline(mark.step, color=COLOURS["muted"], zorder=0.5, **style)
    x_axis, (left, right) = axes.get_xaxis_transform(), axes.get_xlim()
    for mark in marks:
        if mark.label:
            late = mark.step > left + 0.8 * (right - left)
            side: dict = dict(xytext=(-3, 0), ha="right") if late else dict(xytext=(3, 0), ha="left")
            axes.annotate(mark.label, (mark.step, 0.985), xycoords=x_axis, va="top", **side, **SMALL_PRINT)


def _legend(axes: Axes, curves: list[Curve]) -> None:
    """Above the plot. Of four curves the held-out ones share an entry: their colours are named already."""
    if len(curves) < 2:
        axes.set_position((0.15, 0.165, 0.83, 0.8))  # the room is the plot's
        return
    handles: dict[str, Any] = {label: h for h, label in zip(*axes.get_legend_handles_labels())}
    if len(curves) > 2:
        points = all(handles[curve.label].get_linestyle() == "None" for curve in curves if curve.dots)
        handles = {curve.label: handles[curve.label] for curve in curves if not curve.dots}
        line: dict = dict(lw=1.6, ls="" if points else DASHED, marker="o", ms=4)
        handles["held-out"] = Line2D([], [], color=COLOURS["ink"], **line)
    legend_above(axes, handles)


def legend_above(axes: Axes, handles: dict[str, Any] | None = None) -> None:
    """What is named in the plot, or these, {label: handle}."""
    if handles is None:
        handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels())}
    place: dict = dict(loc="lower left", bbox_to_anchor=(-0.02, 0.985), ncols=4, columnspacing=1.2)
    look: dict = dict(frameon=False, labelcolor=COLOURS["ink"], handlelength=1.8, handletextpad=0.5)
    axes.legend(handles.values(), handles.keys(), borderpad=0.1, **place, **look)


def render(axes: Axes, name: str, title: str, folder: Path | None = None) -> Markup:
    """The plot's figure as SVG, and as a PNG into a folder that is named."""
    svg, figure = io.StringIO(), axes.figure
    assert isinstance(figure, Figure)
    figure.savefig(svg, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    if folder:
        figure.set_figheight(3.2)
        axes.set_position((0.15, 0.152, 0.83, 0.665))
        figure.text(0.02, 0.985, title, weight="bold", size=11, va="top", color=COLOURS["ink"])
        part, quick = folder / f".part-{name}.png", {"compress_level": 2}
        try:
            figure.savefig(part, format="png", dpi=130, facecolor="white", pil_kwargs=quick)
            os.replace(part, folder / f"{name}.png")
        finally:
            part.unlink(missing_ok=True)
    return Markup(themed(svg.getvalue(), name))


def themed(svg: str, name: str) -> str:
    """The <svg> element alone, its colours the style sheet's, its ids unlike another chart's."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>|<!--.*?-->", "", svg, flags=re.S)
    svg = re.sub(r'(\sid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    for colour, value in COLOURS.items():
        svg = svg.replace(value, f"var(--{colour})")
    # The page says how large it is, what it is called and which font it has.
    svg = re.sub(r'<svg\b[^>]*?(viewBox="[^"]*")[^>]*>', r'<svg \1 aria-hidden="true">', svg, count=1)
    svg = re.sub(r"font: ([\d.]+)px [^;\"]*", r"font-size: \1px", svg)
    return re.sub(r"\n\s*", "\n", svg).replace("xlink:href", "href")


def thinned(series: Series) -> Series:
    """At most _MOST_POINTS points: the lowest and the highest of each stretch, so that spikes stay."""
    if len(series) <= _MOST_POINTS:
        return series
    bounds = np.linspace(0, len(series), _MOST_POINTS // 2 + 1).astype(int)
    lowest_and_highest = [
        a + int(f(series.value[a:b])) for a, b in itertools.pairwise(bounds) for f in (np.argmin, np.argmax)
    ]
    return series.where(np.unique([0, *lowest_and_highest, len(series) - 1]))


def smoothed(value: np.ndarray) -> np.ndarray:
    """A centred mean over a twentieth of the curve, twice, so that a spike becomes a hill and no box."""
    half, at = max(1, len(value) // 80), np.arange(len(value))
    reach = np.minimum(half, np.minimum(at, len(value) - 1 - at))  # symmetric, so the ends do not lean
    for _ in range(2):
        total = np.concatenate([[0.0], np.cumsum(value)])
        value = (total[at + reach + 1] - total[at - reach]) / (2 * reach + 1)
    return value


def short(value: float, _position=None) -> str:
    """A tick's number in few characters: 0.002, 15k, 1e-06."""
    size = abs(value)
    text = f"{value:.4g}" if size >= 1e-4 or not value else f"{value:.2g}"
    for unit, factor in (("k", 1e3), ("M", 1e6), ("G", 1e9)):
        if size >= max(factor, 1e4):
            text = f"{value / factor:g}{unit}"
    return text.replace("-", "−")
