"""An explanation's charts, as figures for the page: {title, note, words, svg}; None: nothing to draw."""

from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap, LogNorm, to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from fastdpo.console.formatting import printable, signed, significant
from fastdpo.explanation.words import Made, goal, of_effect, side, small_percent
from fastdpo.report.plots import COLOURS, SMALL_PRINT, STYLE, legend_above, new_axes, render, short

Drawn = dict[str, Any]
_LOOKS = {  # of a cause: (colour, marker)
    "ablated": ("held-out", "v"),
    "constant": ("train", "s"),
    "token": ("chosen", "o"),
    "parts": ("rejected", "D"),
    "random": ("muted", "x"),
}
_BY_POSITION = {  # of a number: (title, colour, note)
    "kl": (
        "KL by position",
        "train",
        "On given text, whose beginning fixes much of the rest. Bars that fall from the left: shallow.",
    ),
    "margin_part": (
        "The margin by position",
        "chosen",
        "The mean change of a chosen token's log-prob less that of a rejected one there.",
    ),
}
_SEEN = (-100.0, 200.0)  # percent of an effect that the chart of causes has room for
_LONGEST = 30  # characters of a name beside a chart


def weights_map(kinds: list[str], layers: list[int], relative: np.ndarray) -> Drawn | None:
    """Relative changes by module kind and layer, on a log scale; [kinds, layers], nan: there is none."""
    some = relative[np.isfinite(relative) & (relative > 0)]
    if not len(some):
        return None
    low, high = float(some.min()), float(some.max())
    norm = LogNorm(low, high if high > low else low * 1.1, clip=True)
    rgb = to_rgb(COLOURS["train"])
    shades = LinearSegmentedColormap.from_list("one", [(*rgb, 0.07), (*rgb, 1.0)], N=9)
    with rc_context(STYLE):
        height = 0.95 + 0.26 * len(kinds)
        left = float(np.clip(0.04 + 0.0165 * max(map(len, kinds)), 0.18, 0.45))
        axes = new_axes("layer", "", (5.2, height), (left, 0.52 / height, 0.81 - left, 1 - 0.62 / height))
        axes.grid(False)
        axes.spines["bottom"].set_visible(False)
        filled = np.ma.masked_where(~(relative > 0), relative)
        mesh = axes.pcolormesh(layers, range(len(kinds)), filled, cmap=shades, norm=norm, shading="nearest")
        axes.set_yticks(range(len(kinds)), [_cut(kind) for kind in kinds])
        axes.invert_yaxis()
        axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
        figure = axes.figure
        assert isinstance(figure, Figure)
        scale = figure.colorbar(mesh, cax=figure.add_axes((0.83, 0.52 / height, 0.022, 1 - 0.62 / height)))
        scale.outline.set_visible(False)
        ticks = np.geomspace(low, high, 3) if high > 1.5 * low else np.array([low])
        scale.set_ticks(ticks.tolist(), labels=[small_percent(value) for value in ticks])
        scale.ax.minorticks_off()
        scale.ax.tick_params(colors=COLOURS["ink"], length=0, labelsize=8.5)
        svg = render(axes, "weights", "Weights")
    at = np.unravel_index(np.nanargmax(relative), relative.shape)
    note = f"From {small_percent(low)} to {small_percent(high)}; most in {kinds[at[0]]} of layer "
    note += f"{layers[at[1]]}. Empty: unchanged, or not there."
    return _figure("Relative change of each matrix", note, svg)


def positions(bins: list[Made], key: str) -> Drawn | None:
    """A number by where in the response a token stands."""
    bins = [one for one in bins if one[key] is not None]
    if not any(one[key] for one in bins):
        return None
    title, colour, note = _BY_POSITION[key]
    with rc_context(STYLE):
        axes = new_axes("token of the response", "nats a token")
        axes.bar(range(len(bins)), [one[key] for one in bins], 0.86, color=COLOURS[colour])
        axes.axhline(0, color=COLOURS["muted"], lw=0.8)
        labels = [_span(one) for one in bins]
        axes.set_xticks(range(len(bins)), labels)
        bottom = 0.23 if len(bins) > 8 else 0.165
        if len(bins) > 8:
            axes.tick_params("x", rotation=30)
        axes.set_position((0.15, bottom, 0.83, 0.97 - bottom))
        axes.yaxis.set_major_formatter(short)
        svg = render(axes, key, title)
    ends = (
        f"From {significant(bins[0][key], 3)} ({labels[0]}) to {significant(bins[-1][key], 3)} ({labels[-1]})"
    )
    return _figure(title, f"{note} {ends}.", svg)


def _span(one: Made) -> str:
    if one["last"] is None:
        return f"{one['first']}+"
    return f"{one['first']}" if one["first"] == one["last"] else f"{one['first']}–{one['last']}"


def where_by_layer(where: Made) -> Drawn | None:
    """What each attention and each MLP adds to the change of the projection."""
    attention, mlp = np.array(where["attention"], float), np.array(where["mlp"], float)
    if not attention.any() and not mlp.any() and not where["embedding"]:
        return None
    at = np.arange(len(mlp))
    with rc_context(STYLE):
        axes = _signed_bars("layer")
        axes.bar([-1.3], [where["embedding"]], 0.8, color=COLOURS["muted"], label="embedding")
        axes.xaxis.set_major_formatter(lambda at, _: f"{at:g}" if at >= 0 else "")
        axes.bar(at - 0.2, attention, 0.4, color=COLOURS["held-out"], label="attention")
        axes.bar(at + 0.2, mlp, 0.4, color=COLOURS["train"], label="MLP")
        legend_above(axes)
        svg = render(axes, "where", "Where")
    most = int(np.abs(attention + mlp).argmax())
    note = f"Embedding {signed(where['embedding'])}, attention {signed(attention.sum())}, MLPs "
    note += f"{signed(mlp.sum())}. Most in layer {most}: {signed(attention[most] + mlp[most])}."
    return _figure("The projection's change by layer", note, svg)


def _signed_bars(x_label: str) -> Axes:
    axes = new_axes(x_label, "change of the projection")
    axes.axhline(0, color=COLOURS["muted"], lw=0.8)
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    axes.yaxis.set_major_formatter(short)
    return axes


def neurons_by_layer(neurons: Made, direction: Made) -> Drawn | None:
    layers = neurons.get("by_layer") or []
    lowered, raised = (np.array([abs(one[key]) for one in layers]) for key in ("lowered", "raised"))
    if not lowered.any() and not raised.any():
        return None
    at = [one["layer"] for one in layers]
    back = side(direction, "T")
    with rc_context(STYLE):
        axes = _signed_bars("layer")
        axes.bar(at, lowered, 0.8, color=COLOURS["chosen"], label=goal(direction))
        axes.bar(at, -raised, 0.8, color=COLOURS["rejected"], label=back)
        legend_above(axes)
        svg = render(axes, "layers", "Neurons by layer")
    most = int(lowered.argmax())
    note = f"Up: neurons that write more {goal(direction)} than before; down: more {back}. "
    note += (
        f"Most in layer {at[most]}: {significant(lowered[most], 3)} against {significant(raised[most], 3)}."
    )
    return _figure("Neurons by layer", note, svg)


def classes(neurons: Made) -> Drawn | None:
    """The sums of the eight classes."""
    groups = neurons["groups"]
    if not any(group["sum"] for group in groups):
        return None
    with rc_context(STYLE):
        axes = new_axes(
            "change of the projection, in the wanted direction", "", place=(0.24, 0.165, 0.73, 0.8)
        )
        _sideways(axes)
        colours = [COLOURS["chosen" if group["lowers"] else "rejected"] for group in groups]
        axes.barh(range(len(groups)), [group["sum"] for group in groups], 0.74, color=colours)
        labels = [f"{group['name'].replace('-', '−')}  ({group['count']:,})" for group in groups]
        axes.set_yticks(range(len(groups)), labels)
        svg = render(axes, "classes", "Classes")
    note = "; ".join(f"{group['name']} {signed(group['sum'])}" for group in groups)
    figure = _figure(
        "Neurons by class",
        "Positive is where --direction says that training should go. In brackets how many.",
        svg,
    )
    return figure | {"words": f"Neurons by class: {note}."}


def _sideways(axes: Axes) -> None:
    axes.grid(False)
    axes.grid(True, axis="x", color=COLOURS["grid"], lw=0.8)
    axes.axvline(0, color=COLOURS["muted"], lw=0.8)
    axes.spines["bottom"].set_visible(False)
    axes.xaxis.set_major_formatter(short)
    axes.invert_yaxis()


def recovered(causes: Made, column: str, title: str) -> Drawn | None:
    """The share of the effect on one number that each cause has."""
    rows = [row for row in causes["rows"] if row["what"] in _LOOKS]
    rows = [row for row in rows if (row.get(column) or {}).get("share") is not None]
    if not rows:
        return None
    size = abs(causes["effect"][column]["value"]) or 1.0
    low, high = _SEEN
    with rc_context(STYLE):
        height = 0.75 + 0.25 * len(rows)
        axes = new_axes("", "", (5.2, height), (0.42, 0.4 / height, 0.55, 1 - 0.72 / height))
        _sideways(axes)
        axes.axvline(100, color=COLOURS["muted"], lw=1, ls=(0, (1, 2)))
        at_the_top: dict = dict(xycoords=axes.get_xaxis_transform(), xytext=(0, 3), ha="center")
        for value, name in ((0, "before"), (100, "after")):
            axes.annotate(name, (value, 1), **at_the_top, **SMALL_PRINT)
        for at, row in enumerate(rows):
            cell, (colour, marker) = row[column], _LOOKS[row["what"]]
            error = cell.get("share_error")
            if row["what"] == "random" and cell.get("spread") is not None:
                error = max(error or 0.0, cell["spread"] / size)
            bar = None if error is None else 100 * error
            look: dict = dict(color=COLOURS[colour], fmt=marker, ms=5, lw=1.4, capsize=2.5)
            share = 100 * cell["share"]
            if low <= share <= high:
                axes.errorbar([share], [at], xerr=bar, **look)
            else:  # an arrow at the edge, and the number
                end, sign = (low, "◂") if share < low else (high, "▸")
                side: dict = dict(ha="left" if share < low else "right", va="center", size=8.5)
                text = f"{sign} {share:,.0f}%" if share < low else f"{share:,.0f}% {sign}"
                axes.text(end, at, text.replace("-", "−"), color=COLOURS[colour], **side)
        left, right = axes.get_xlim()
        every = [100 * row[column]["share"] for row in rows]
        axes.set_xlim(
            low if min(every) < low else max(low, left), high if max(every) > high else min(high, right)
        )
        axes.set_yticks(range(len(rows)), [_cut(row["name"]) for row in rows])
        axes.margins(y=0.6 / len(rows))
        axes.xaxis.set_major_formatter("{x:,.0f}%")
        svg = render(axes, f"causes-{column}", title)
    best = max(rows, key=lambda row: row[column]["share"])
    note = f"Share of the effect; most: {best['name']}, {of_effect(best[column])}. Bars: one standard error, "
    return _figure(title, f"{note}of random sets the spread over seeds where that is more.", svg)


def _cut(name: str) -> str:
    name = printable(name)
    return name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…"


def _figure(title: str, note: str, svg: str) -> Drawn:
    return {"title": title, "note": note, "words": f"{title}. {note}", "svg": svg}
