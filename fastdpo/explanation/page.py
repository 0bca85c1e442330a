"""explain.html: an explanation as a page, made of its result alone."""

from pathlib import Path
from typing import Any

import numpy as np

from fastdpo.console.formatting import counted, percent, signed, significant
from fastdpo.explanation import plots
from fastdpo.explanation.cause_words import control, four_groups, lead_column, share_of
from fastdpo.explanation.inside import (
    causes_section,
    direction_section,
    neurons_section,
    spelt,
    title_of,
    where_section,
)
from fastdpo.explanation.summary import summary
from fastdpo.explanation.words import (
    Made,
    kind_names,
    looked_inside,
    of_effect,
    shares,
    small_percent,
    with_error,
)
from fastdpo.report.page import template

_MOST_CHANGED = 20  # matrices that the page lists
NUMBERS = {  # of the behaviour: (title, how it is written)
    "margins": ("margin: chosen less rejected, nats", signed),
    "log_ratio/chosen": ("log-ratio of chosen responses, nats", signed),
    "log_ratio/rejected": ("log-ratio of rejected responses, nats", signed),
    "accuracies": ("margin above 0", percent),
    "logps/accuracies/before": ("chosen likelier than rejected, before", percent),
    "logps/accuracies/after": ("chosen likelier than rejected, after", percent),
    "kl/forward": ("KL(before || after), nats a token", significant),
    "kl/reverse": ("KL(after || before), nats a token", significant),
    "perplexity/before": ("perplexity of chosen, before", significant),
    "perplexity/after": ("perplexity of chosen, after", significant),
}


def page(made: Made) -> str:
    """The page."""
    inside = looked_inside(made)
    parts = {
        "summary": summary(made),
        "tiles": tiles(made),
        "data": data_line(made),
        "inside": inside,
        "weights": _weights(made),
        "behaviour": _behaviour(made),
        "direction": direction_section(made),
        "where": where_section(made) if inside else None,
        "neurons": neurons_section(made) if inside else None,
        "causes": causes_section(made) if inside else None,
    }
    return template("explain.html.jinja", Path(__file__).parent).render(made=made, **parts)


def data_line(made: Made) -> str:
    data = made.get("data") or {}
    sizes = (("rows", "row"), ("prompts", "prompt"), ("pairs", "pair"), ("tokens", "scored token"))
    text = ", ".join(counted(data[key], noun) for key, noun in sizes if data.get(key) is not None)
    return f"{text} of {data['source']}" if data.get("source") else text


def tiles(made: Made) -> list[dict[str, str]]:
    """The head's numbers: {name, value, error, from}."""
    numbers, causes = (made.get("behaviour") or {}).get("numbers") or {}, made.get("causes") or {}
    weights, direction = made.get("weights") or {}, made.get("direction") or {}
    out = []
    if weights.get("relative") is not None:
        changed = weights.get("changed")
        note = f"{small_percent(changed)} of entries differ" if changed is not None else "of their size"
        out.append(_tile("Weights moved by", small_percent(weights["relative"]), note))
    if numbers.get("margins"):
        margin = with_error(numbers["margins"], signed)
        out.append(_tile("Margin", margin, "nats, chosen less rejected"))
    if numbers.get("logps/accuracies/after"):
        before = with_error(numbers.get("logps/accuracies/before"), percent)
        after = with_error(numbers["logps/accuracies/after"], percent)
        out.append(_tile("Chosen likelier", after, f"{before} before"))
    if numbers.get("kl/reverse"):
        kl = with_error(numbers["kl/reverse"], lambda value: significant(value, 3))
        out.append(_tile("KL to before", kl, "nats a token"))
    if direction.get("accuracy") is not None:
        out.append(_tile("Direction", percent(direction["accuracy"]), "right on what it was not fitted on"))
    column = lead_column(causes)
    rows = [row for row in four_groups(made) if column and of_effect(row.get(column))]
    if column and rows and looked_inside(made):
        row = max(rows, key=lambda row: row["what"] == "token")
        other = control(made, row)
        note = f"; random sets {share_of(causes, other, column)}" if other else ""
        note = f"of the effect on the {title_of(column).split(',')[0]}{note}"
        out.append(_tile("Four groups patched", of_effect(row[column]), note))
    return out


def _tile(name: str, value: str, note: str) -> dict[str, str]:
    value, _, error = value.partition(" ± ")
    return {"name": name, "value": value, "error": error, "from": note}


def _weights(made: Made) -> Made | None:
    """The map of matrices, a row each kind of module, and the matrices that changed most."""
    weights = made.get("weights")
    modules = (weights or {}).get("modules")
    if not weights or weights.get("reason") or not modules:
        return None
    named = [one | {"kind": kind} for one, kind in zip(modules, kind_names(modules))]
    by_kind = shares(named, "kind")
    rows = []
    for kind, share in by_kind.items():
        some = [one for one in named if one["kind"] == kind]
        ranks = [one["stable_rank"] for one in some if one.get("stable_rank") is not None]
        changed = [one["changed"] for one in some if one.get("changed") is not None]
        rows.append(
            {
                "kind": kind,
                "count": len(some),
                "relative": small_percent(_rms([one["relative"] for one in some])),
                "share": small_percent(share),
                "rank": significant(np.mean(ranks), 2) if ranks else "",
                "changed": small_percent(float(np.mean(changed))) if changed else "",
            }
        )
    most = sorted(named, key=lambda one: -one["relative"])[:_MOST_CHANGED]
    return {"figure": _map(named), "rows": rows, "most": [_module(one) for one in most if one["relative"]]}


def _module(one: Made) -> dict[str, str]:
    rank, changed = one.get("stable_rank"), one.get("changed")
    return {
        "name": one["name"],
        "relative": small_percent(one["relative"]),
        "share": small_percent(one["share"]),
        "rank": "" if rank is None else significant(rank, 2),
        "changed": "" if changed is None else small_percent(changed),
    }


def _rms(values: list[float]) -> float:
    return float(np.sqrt(np.mean(np.square(values))))


def _map(modules: list[Made]) -> Made | None:
    """Matrices of layers; experts of a layer as one."""
    some = [one for one in modules if one["layer"] is not None and one.get("stable_rank") is not None]
    if not some:
        return None
    kinds = list(dict.fromkeys(one["kind"] for one in some))
    layers = list(range(max(one["layer"] for one in some) + 1))
    found: dict[tuple[int, int], list[float]] = {}
    for one in some:
        found.setdefault((kinds.index(one["kind"]), one["layer"]), []).append(one["relative"])
    relative = np.full((len(kinds), len(layers)), np.nan)
    for at, values in found.items():
        relative[at] = _rms(values)
    return plots.weights_map(kinds, layers, relative)


def _behaviour(made: Made) -> Made | None:
    behaviour = made.get("behaviour")
    if not behaviour:
        return None
    numbers = behaviour.get("numbers") or {}
    rows = []
    for name, found in sorted(numbers.items(), key=lambda item: _place(item[0], NUMBERS)):
        title, write = NUMBERS.get(name, (name, significant))
        rows.append({"title": title, "value": with_error(found, write) or "no number"})
    bins = behaviour.get("by_position") or []
    figures = [figure for key in ("kl", "margin_part") if (figure := plots.positions(bins, key))]
    tokens = [_token(one) for one in behaviour.get("tokens") or []]
    return {"rows": rows, "figures": figures, "tokens": tokens}


def _place(name: str, known: dict[str, Any]) -> int:
    return list(known).index(name) if name in known else len(known)


def _token(one: Made) -> dict[str, str]:
    changes = {key: signed(one[key]) for key in ("change", "total")}
    return changes | {"token": spelt(one["token"]), "count": f"{one['count']:,}"}
