"""What `benchmarks.head.run` measured, as tables in a terminal and as plots beside the JSON."""

import math
from pathlib import Path

from rich.console import Console
from rich.table import Table

from benchmarks.figures import Bar, bars
from benchmarks.head import our_heads


def row(name: str, r: dict, ours: float) -> list[str]:
    """One line of the table; `ours` is the fastest of ours in the same mode, in seconds."""
    show = lambda key, form, unit=1.0: form.format(r[key] * unit) if key in r else ""
    plan = f" ({r['plan']})" if "plan" in r else show("tflops", " ({:.2f} TFLOP/s)")
    nats = f"{r['nats_max']:.0e} / {r['nats_median']:.0e}" if "nats_max" in r else ""
    own = show("of_own_flops", " ({:.2f})")
    promised = show("promised_bytes", " of {:,.1f}", 1e-6)
    return [
        name + plan,
        show("median_s", "{:.2f}", 1e3),
        show("of_floor", "{:.2f}") + own,
        "" if name == "floor" else f"{r['median_s'] / ours:.2f}x",
        show("peak_bytes", "{:,.1f}", 1e-6) + promised,
        nats,
        show("d_hidden_roundings", "{:.2f}"),
        show("d_weight_roundings", "{:.2f}"),
        {True: "yes", False: "no"}.get(r.get("same_bits"), ""),
    ]


def print_table(results: dict, console: Console) -> None:
    """A table for every shape; the modes follow each other."""
    columns = ("ms", "of floor (own)", "of ours", "peak MB", "nats max / med", "dX", "dW", "same bits")
    for shape, modes in results.items():
        table = Table(title=f"{shape} (M x D x V)")
        table.add_column("")
        for column in columns:
            table.add_column(column, justify="right")
        for mode, (measured, _) in modes.items():
            mine = [measured[n]["median_s"] for n in our_heads.CONTENDERS if n in measured]
            table.add_section()
            table.add_row(f"[bold]{mode}")
            for name, numbers in measured.items():
                table.add_row(*row(name, numbers, min(mine, default=math.nan)))
        console.print(table)
        reasons = {}
        for mode, (_, absent) in modes.items():
            for name, why in absent.items():
                reasons.setdefault((name, why), []).append(mode)
        for (name, why), where in reasons.items():
            console.print(f"  absent: {name} ({', '.join(where)}): {why}", style="dim", highlight=False)
    console.print(
        "of floor: the time of the GEMMs no head can do without over ours; (own): with the plan's own "
        "FLOPs. dX, dW: errors against fp64 in units of one rounding of dZ to the inputs' dtype. peak MB: "
        "beyond the inputs, gradients included, of what the plan promised."
    )


def draw(path: Path, results: dict) -> None:
    """A plot of each mode of the first shape, beside the JSON."""
    shape, modes = next(iter(results.items()))
    for mode, (measured, _) in modes.items():
        title = f"The lm_head, {mode}, {shape} (M x D x V)"
        drawn = [
            Bar(name, 1e3 * r["median_s"], *spread_ms(r), ours=name in our_heads.CONTENDERS)
            for name, r in measured.items()
        ]
        bars(f"{path.stem}_{mode}", title, "milliseconds", drawn, path.parent)


def spread_ms(r: dict) -> tuple[float, float] | tuple[()]:
    """The fastest and the slowest turn; nothing for the floor, which is a sum of medians."""
    return (1e3 * min(r["seconds"]), 1e3 * max(r["seconds"])) if "seconds" in r else ()
