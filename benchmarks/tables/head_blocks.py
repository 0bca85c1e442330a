"""The lm_head in every shape: what a GPU took, or before one has run what a model of it says."""

from benchmarks.head import model
from benchmarks.tables.markdown import markdown, number, where

_HEADER = ("", "floor", "`linear_logp`", "`linear_dpo`")


def predicted(up: str) -> str:
    """A line a shape and mode. up: from the page to the root."""
    rows = []
    for (M, D, V), mode, floor, ours in model.predicted():
        plain = 2 * M * V * D / model.RATE
        times = [f"{1e3 * time:.2f}{_words(how)}" for time, how in ours.values()]
        best = min(time for time, _ in ours.values())
        trl = f"{1e3 * model.TRL[mode] / 2 * plain:.2f}"
        rows.append([f"{M} x {D} x {V}, {mode}", f"{1e3 * floor:.2f}", *times, trl, f"{floor / best:.2f}"])
    text = (
        "**Predicted by a model, not measured:** milliseconds on an H100 (M scored rows x D hidden x V "
        f"vocabulary, bf16). The model ([its assumptions]({up}benchmarks/head/model.py)) has "
        f"{number(model.RATE / 1e12)} TFLOP/s, {number(model.BANDWIDTH / 1e12)} TB/s and "
        f"{model.epilogue('E'):g} epilogue instructions an element of E. Floor: the products that a mode "
        "cannot do without. TRL's column is the FLOPs of its chunked head at the same rate, and nothing else:"
    )
    return f"{text}\n\n{markdown((*_HEADER, 'FLOPs of TRL', 'floor / ours'), rows)}"


def _words(how) -> str:
    if how.name in ("keep", "recompute"):
        return f" ({how.name})"
    return f" ({len(how.parts)} part{'s' * (len(how.parts) > 1)})" if how.name == "grouped" else ""


def shapes(record: dict, link: str) -> str:
    """A line a shape and mode that was measured."""
    rows = []
    for shape, modes in record["results"].items():
        for mode, (found, _) in modes.items():
            times = [found.get(name, {}).get("median_s") for name in ("floor", "linear_logp", "linear_dpo")]
            ours = [time for time in times[1:] if time]
            ratio = f"{times[0] / min(ours):.2f}" if times[0] and ours else ""
            cells = [number(1e3 * time) if time else "" for time in times]
            rows.append([f"{shape}, {mode}", *cells, ratio])
    text = (
        f"Milliseconds on {where(record)} (M scored rows x D hidden x V vocabulary, "
        f"{record['dtype'].split('.')[-1]}, {link}); floor: the GEMMs that a mode cannot do without, "
        "measured in the same turns:"
    )
    return f"{text}\n\n{markdown((*_HEADER, 'floor / ours'), rows)}"
