"""The parts of an explanation's page that need a direction: where, which neurons, which causes."""

from typing import Any

from fastdpo.console.formatting import counted, percent, printable, signed, significant
from fastdpo.explanation import plots
from fastdpo.explanation.cause_words import broken, share_of
from fastdpo.explanation.words import GOES_WITH_LENGTH, Made, goal, of_effect, side, small_percent, with_error

COLUMNS = {  # of the causes
    "projection": ("projection", significant),
    "margins": ("margin, nats", signed),
    "kl": ("KL to before", significant),
    "perplexity": ("perplexity of chosen", significant),
    "logps/accuracies": ("chosen likelier", percent),
    "score": ("score", significant),
}
_SPACES = {
    "folded": "folded: times the final norm's weights, so that it can be held against what enters that norm",
    "plain": "plain, as in the papers: fitted behind the final norm, used before it",
}
_KINDS = {"pairs": "fitted on the pairs", "labels": "fitted on labelled texts", "vector": "given"}
_LONGEST_TOKEN = 24  # characters


def spelt(token: str) -> str:
    """A token as one can see it: spaces marked, what cannot be printed spelt, the very long cut."""
    text = printable(str(token)).replace(" ", "·")
    return f"{text[:_LONGEST_TOKEN]}…" if len(text) > _LONGEST_TOKEN else text or "(empty)"


def direction_section(made: Made) -> Made | None:
    direction = made.get("direction")
    if not direction:
        return None
    fitted, tested = ("response", "prompt") if direction["kind"] == "pairs" else ("text", "text")
    low_high, correlation = direction.get("interval"), direction.get("length_correlation")
    rows = {
        "kind": _KINDS[direction["kind"]],
        "wanted": goal(direction),
        "space": _SPACES.get(direction["space"], direction["space"]),
        "fitted on": counted(direction["fitted"], fitted) if direction.get("fitted") else "",
        "tested on": f"{counted(direction['tested'], tested)}, others" if direction.get("tested") else "",
        "right": "" if direction.get("accuracy") is None else percent(direction["accuracy"]),
        "95% interval": f"{percent(low_high[0])} to {percent(low_high[1])} (Wilson)" if low_high else "",
        "strength C of its fit": ""
        if direction.get("C") is None
        else f"{direction['C']:g} (cross-validated)",
        "correlation with length": "" if correlation is None else significant(correlation, 2),
        "projection before": "" if direction.get("before") is None else significant(direction["before"]),
        "projection after": "" if direction.get("after") is None else significant(direction["after"]),
    }
    long = significant(correlation, 2) if abs(correlation or 0) > GOES_WITH_LENGTH else ""
    return {"rows": {name: text for name, text in rows.items() if text}, "long": long}


def where_section(made: Made) -> Made | None:
    where = made.get("where")
    if not where or "attention" not in where:
        return {"reason": where["reason"]} if where and where.get("reason") else None
    parts = {"embedding": where["embedding"], "attention": sum(where["attention"]), "MLPs": sum(where["mlp"])}
    rows = [{"name": name, "value": signed(value)} for name, value in parts.items()]
    layers = [
        {"layer": at, "attention": signed(attention), "mlp": signed(mlp)}
        for at, (attention, mlp) in enumerate(zip(where["attention"], where["mlp"]))
    ]
    totals = {key: signed(where[key], 4) for key in ("sum", "total")}
    return totals | {
        "reason": where.get("reason"),
        "rows": rows,
        "layers": layers,
        "exact": f"{where['exact']:.1e}",
        "figure": plots.where_by_layer(where),
    }


def neurons_section(made: Made) -> Made | None:
    neurons, direction = made.get("neurons"), made.get("direction")
    if not neurons or not direction or neurons.get("reason"):
        return {"reason": neurons["reason"]} if neurons else None
    figures = [plots.classes(neurons), plots.neurons_by_layer(neurons, direction)]
    sums = {key: signed(neurons[key]) for key in ("gross", "raised", "net", "activation", "value")}
    return sums | {
        "bias": signed(neurons["bias"]) if neurons.get("bias") else "",
        "groups": [_group(group, direction, neurons["definition"]) for group in neurons["groups"]],
        "concentration": [
            {"share": f"{one['share']:.0%}", "neurons": f"{one['neurons']:,}"}
            | {"of": small_percent(one["neurons"] / max(neurons["neurons"], 1))}
            for one in neurons.get("concentration") or []
            if one["neurons"]
        ],
        "top": {name: [_neuron(one) for one in some] for name, some in (neurons.get("top") or {}).items()},
        "figures": [figure for figure in figures if figure],
    }


def _group(group: Made, direction: Made, definition: str) -> dict[str, Any]:
    """A class: what its names stand for, and its numbers."""
    positive = group["name"][1:2] == "P"
    mean = "0 or above" if positive else "below 0"
    what = f"point {side(direction, group['toward'])}; mean activation {mean}"
    if definition == "v1":
        rises = (group["name"][-1:] == "+") == positive
        what += ", higher after" if rises else ", lower after"
    else:
        what += "; its projection moved as wanted" if group["lowers"] else "; its projection moved against it"
    return {
        "name": group["name"],
        "paper": group.get("paper") or "",
        "what": what,
        "lowers": group["lowers"],
        "count": f"{group['count']:,}",
        "sum": signed(group["sum"]),
        "share": "" if group.get("share") is None else small_percent(group["share"]),
        "activation": signed(group["activation"]),
        "value": signed(group["value"]),
    }


def _neuron(one: Made) -> Made:
    row = {key: f"{one[key]:,}" for key in ("layer", "neuron")}
    row |= {key: significant(one[key], 3) for key in ("cos", "before", "after")}
    row |= {"change": signed(one["change"])}
    row |= {key: f"{one[key]:.0%}" for key in ("firing_before", "firing_after")}
    return row | {"tokens": [spelt(token) for token in one.get("tokens") or []]}


def causes_section(made: Made) -> Made | None:
    causes = made.get("causes")
    if not causes or causes.get("reason"):
        return {"reason": causes["reason"]} if causes else None
    names = [name for name in COLUMNS if name in causes["columns"]]
    effect = [causes["effect"].get(name) for name in names]
    rows = [
        {
            "name": row["name"],
            "what": row["what"],
            "size": f"{row['size']:,}" if row["size"] else "",
            "seeds": row.get("seeds"),
            "cells": [_cell(row.get(name), name) | {"share": share_of(causes, row, name)} for name in names],
            "broken": broken(causes, row),
        }
        for row in causes["rows"]
    ]
    drawn = [name for name in ("margins", "projection", "score") if name in names]
    figures = [plots.recovered(causes, name, f"Share of the effect: {title_of(name)}") for name in drawn]
    return {
        "rows": rows,
        "columns": [title_of(name) for name in names],
        "effect": [_effect(one, name) for one, name in zip(effect, names)],
        "figures": [figure for figure in figures if figure],
    }


def title_of(name: str) -> str:
    return COLUMNS.get(name, (name, significant))[0]


def _cell(cell: Made | None, name: str) -> dict[str, str]:
    write = COLUMNS.get(name, (name, significant))[1]
    value, _, error = with_error(cell, write).partition(" ± ")
    spread = (cell or {}).get("spread")
    return {
        "value": value,
        "error": error,
        "share": of_effect(cell),
        "spread": ""
        if spread is None
        else significant(100 * spread if name == "logps/accuracies" else spread, 2),
    }


def _effect(one: Made | None, name: str) -> dict[str, str]:
    cell = _cell(one, name)
    write = COLUMNS.get(name, (name, significant))[1]
    if one and one.get("value") is not None:
        cell["value"] = f"{signed(100 * one['value'])} pp" if write is percent else signed(one["value"])
    return cell | {"share": "" if (one or {}).get("told") else "not told"}
