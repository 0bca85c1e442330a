"""Sentences of what patches and ablations bring, beside their controls."""

import math

from fastdpo.console.formatting import significant
from fastdpo.explanation.words import Made, goal, of_effect

_SHARED = ("margins", "score", "projection", "logps/accuracies")
_BROKEN = 3  # times training's own KL
_OF = {"margins": "the margin", "logps/accuracies": "the accuracy", "score": "the score"}


def lead_column(causes: Made | None) -> str | None:
    """The number whose effect the summary speaks of: the margin, or else another that is told."""
    effect = (causes or {}).get("effect") or {}
    return next((name for name in _SHARED if (effect.get(name) or {}).get("told")), None)


def four_groups(made: Made) -> list[Made]:
    """The rows that patch the four groups that lower the projection: the constants', the tokens'."""
    rows = (made.get("causes") or {}).get("rows") or []
    return [row for row in rows if row["group"] == "all four" and row["what"] in ("constant", "token")]


def control(made: Made, row: Made) -> Made | None:
    """Of a set of neurons: as many, drawn at random, in the same way."""
    rows = (made.get("causes") or {}).get("rows") or []
    mine = (row["what"], row["group"])
    return next((one for one in rows if one["what"] == "random" and (one["how"], one["group"]) == mine), None)


def share_of(causes: Made, row: Made, column: str) -> str:
    """81% ± 4: of one pass by its standard error; of random sets by the larger of that and their spread."""
    cell, size = row.get(column) or {}, abs((causes["effect"].get(column) or {}).get("value") or 0.0)
    if cell.get("share") is None or cell.get("spread") is None or not size:
        return of_effect(cell)
    return of_effect(cell | {"share_error": max(cell["share_error"] or 0.0, cell["spread"] / size)})


def not_told(causes: Made) -> list[str]:
    """The numbers that no share is told of, of those that have shares."""
    return [name for name in _SHARED if not (causes["effect"].get(name) or {"told": True})["told"]]


def patched(made: Made) -> str | None:
    """What the four groups bring."""
    causes = made.get("causes")
    if not causes or causes.get("reason"):
        return None
    column = lead_column(causes)
    if column is None:
        return "No number of the causes changed by more than two standard errors: no share of it is told."
    rows = [row for row in four_groups(made) if (row.get(column) or {}).get("share") is not None]
    if not rows:
        return None
    row = max(rows, key=lambda row: row["what"] == "token")
    text = "Giving the model before what the model after has in the four groups of neurons that moved "
    text += f"{goal(made['direction'])} brings {share_of(causes, row, column)} of the effect on "
    text += _OF.get(column, f"the {column}") + (
        " token by token" if row["what"] == "token" else " by constants"
    )
    text += _beside_random(made, row, column)
    other = next((one for one in rows if one is not row), None)
    if other is not None:
        text += f". Their means alone bring {share_of(causes, other, column)}{_cost(causes, other)}"
    return f"{text}."


def switched_off(made: Made) -> str | None:
    """The ablation that comes nearest to the effect, of those that leave a model whole where there is one."""
    causes = made.get("causes") or {}
    column = lead_column(causes)
    rows = [row for row in causes.get("rows") or [] if row["what"] == "ablated"]
    rows = [row for row in rows if column and (row.get(column) or {}).get("share") is not None]
    if column is None or not rows:
        return None
    whole = [row for row in rows if not broken(causes, row)]
    best = max(whole or rows, key=lambda row: row[column]["share"])
    if best[column]["share"] <= 0:
        effect = f"the effect on {_OF.get(column, f'the {column}')}"
        damage = " without breaking it" if len(whole) < len(rows) else ""
        return f"No set of neurons that was switched off in the model before brings any of {effect}{damage}."
    text = f"Of the sets of neurons that were switched off in the model before, {best['name']}"
    text = f"{text.removesuffix(', off')} bring most: {share_of(causes, best, column)} of the effect on "
    return (
        f"{text}{_OF.get(column, f'the {column}')}{_cost(causes, best)}{_beside_random(made, best, column)}."
    )


def broken(causes: Made, row: Made) -> str:
    """How far a patch takes the model from the one before, where it damages it: further than three times the
    training did, with a perplexity of the chosen above both ends'."""
    ends = [one for one in causes["rows"] if one["what"] in ("before", "after")]
    read = [(one.get(name) or {}).get("value") for name in ("kl", "perplexity") for one in (*ends, row)]
    found = [float(value) for value in read if value is not None]
    if len(found) < 6 or row in ends:
        return ""
    _, trained, kl, *perplexities = found
    if kl <= _BROKEN * trained or perplexities[-1] <= max(perplexities[:-1]):
        return ""
    return f"KL {significant(kl, 2)} where training's is {significant(trained, 2)}"


def _cost(causes: Made, row: Made) -> str:
    why = broken(causes, row)
    return f", but that breaks the model ({why})" if why else ""


def _beside_random(made: Made, row: Made, column: str) -> str:
    """What random sets do beside it, and whether that is told apart."""
    causes, other = made["causes"], control(made, row) or {}
    cell = other.get(column) or {}
    if cell.get("share") is None:
        return ""
    size = abs(causes["effect"][column]["value"])
    errors = [row[column].get("share_error"), cell.get("share_error"), (cell.get("spread") or 0.0) / size]
    told = 2 * math.hypot(*(error or 0.0 for error in errors))
    more = cell["share"] - row[column]["share"]
    if (other.get("seeds") or 0) < 2:
        return f"; one random set of as many neurons {share_of(causes, other, column)}"
    text = f"; random sets of as many neurons {share_of(causes, other, column)}"
    return text + (", which is more" if more > told else "" if -more > told else ", which is not told apart")
