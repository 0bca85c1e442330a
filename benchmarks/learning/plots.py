"""Curves with the band of their seeds, over any x, in the style of benchmarks.figures."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure

from benchmarks import figures
from fastdpo.report.plots import COLOURS


@dataclass(frozen=True)
class Curve:
    """A curve for each seed over the same x: the mean is drawn, and from the lowest to the highest a band."""

    label: str
    x: Sequence[float]
    ys: np.ndarray  # [seeds, x]


def lines(
    name: str, title: str, x_label: str, y_label: str, curves: Sequence[Curve], folder: Path
) -> list[Path]:
    """plots/<name>.svg and .png."""
    with rc_context(figures.STYLE):
        figure = Figure(figsize=(6.4, 4.0), layout="constrained")
        axes = figures.make_axes(figure, title, grid="both")
        for i, curve in enumerate(curves):
            colour = COLOURS[figures.LINES[i % len(figures.LINES)]]
            axes.fill_between(curve.x, curve.ys.min(0), curve.ys.max(0), color=colour, alpha=0.12, lw=0)
            marker = figures.MARKERS[i % len(figures.MARKERS)] if len(curve.x) < 10 else ""
            axes.plot(curve.x, curve.ys.mean(0), color=colour, lw=1.6, marker=marker, ms=4, label=curve.label)
        axes.set_xlabel(x_label, color=COLOURS["ink"])
        axes.set_ylabel(y_label, color=COLOURS["ink"])
        figures.add_legend(axes)
        return figures.save_figure(figure, name, folder)
