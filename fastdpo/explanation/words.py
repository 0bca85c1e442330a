"""Sentences of what changed, each made from the numbers alone; and how these are written."""

import math
import re
from collections.abc import Callable
from typing import Any

from fastdpo.console.formatting import counted, percent, signed, significant

Made = dict[str, Any]
_SHORT = 10  # tokens: what is told as the beginning of a response
GOES_WITH_LENGTH = 0.5  # a correlation that is warned of
_SHALLOW = 2.0  # times the KL of a later token
_WHAT = {"pairs": "chosen from rejected responses", "labels": "label 1 from label 0"}
_UP = {"pairs": "towards the chosen", "labels": "towards label 1", "vector": "along the vector"}
_DOWN = {"pairs": "towards the rejected", "labels": "towards label 0", "vector": "against the vector"}


def told(found: dict[str, Any] | None) -> bool:
    """Whether a number is further than two standard errors from 0."""
    value, error = (found or {}).get("value"), (found or {}).get("error")
    return value is not None and value != 0 and (error is None or abs(value) > 2 * error)


def with_error(found: dict[str, Any] | None, write: Callable[[float], str] = significant) -> str:
    """3.21 ± 0.2; nothing where there is no number."""
    if not found or found.get("value") is None:
        return ""
    error = found.get("error")
    scaled = f"{significant(100 * error, 2)} pp" if error is not None and write is percent else None
    return write(found["value"]) + (f" ± {scaled or significant(error, 2)}" if error is not None else "")


def of_effect(cell: dict[str, Any] | None, error: str = "share_error") -> str:
    """A share of the effect: 81% ± 4."""
    if not cell or cell.get("share") is None:
        return ""
    around = cell.get(error)
    text = f"{round(100 * cell['share']):,}%".replace("-", "−")
    if around is None:
        return text
    return f"{text} ± {significant(100 * around, 1) if around < 0.01 else f'{100 * around:,.0f}'}"


def small_percent(share: float) -> str:
    """0.12%, 3.4%, 41%."""
    if 0 < abs(share) < 1e-6:
        return "< 0.0001%"
    return f"{significant(100 * share, 2)}%"


def goal(direction: Made) -> str:
    """Where a lowered projection along d takes the model: what training wanted."""
    return (_UP if direction["towards"] == "up" else _DOWN)[direction["kind"]]


def side(direction: Made, toward: str) -> str:
    """Where a value vector points: "T" along d, which is to fall, "A" against it."""
    up = (toward == "A") == (direction["towards"] == "up")
    return (_UP if up else _DOWN)[direction["kind"]]


def looked_inside(made: Made) -> bool:
    """Whether there is a direction to say where, by which neurons, by which causes."""
    direction = made.get("direction")
    return bool(direction and (direction["found"] or direction.get("forced")))


def shares(modules: list[Made], key: str) -> dict[Any, float]:
    """{kind or layer: its share of all squared change}, the largest first."""
    out: dict[Any, float] = {}
    for module in modules:
        if module.get(key) is not None:
            out[module[key]] = out.get(module[key], 0.0) + (module.get("share") or 0.0)
    return dict(sorted(out.items(), key=lambda item: -item[1]))


def kind_names(modules: list[Made]) -> list[str]:
    """Each module's kind, with more of its name where two parts of a layer have the same."""
    paths = [re.sub(r"(^|.*\.)(layers|h|blocks?)\.\d+\.", "", one["name"]) for one in modules]
    paths = [re.sub(r"\.\d+(?=\.|$)", "", path) for path in paths]
    of: dict[str, set[str]] = {}
    for one, path in zip(modules, paths):
        of.setdefault(one["kind"], set()).add(path)
    return [one["kind"] if len(of[one["kind"]]) == 1 else path for one, path in zip(modules, paths)]


def weights(made: Made) -> str | None:
    weights = made.get("weights")
    if not weights or weights.get("reason") or not weights.get("modules"):
        return None
    size = small_percent(weights["relative"])
    text = f"The weights moved by {size} of their size"
    if weights.get("changed") is not None:
        text += f"; {small_percent(weights['changed'])} of the entries differ at all"
    modules = weights["modules"]
    named = [one | {"kind": kind} for one, kind in zip(modules, kind_names(modules))]
    (kind, part), *_ = shares(named, "kind").items()
    return f"{text}. The largest part of the squared change, {small_percent(part)}, is in {kind}."


def behaviour(made: Made) -> str | None:
    numbers = (made.get("behaviour") or {}).get("numbers") or {}
    margin = numbers.get("margins")
    if not margin or margin["value"] is None:
        return None
    if not told(margin):
        return f"Chosen and rejected moved alike: the margin's change, {_nats(margin)}, is not told from 0."
    grew = "grew" if margin["value"] > 0 else "shrank"
    text = f"The margin between chosen and rejected {grew} by {_nats(margin, abs)}"
    parts = [f"{name} {_nats(numbers[key])}" for name, key in _SIDES if numbers.get(key)]
    return f"{text} ({', '.join(parts)})." if parts else f"{text}."


_SIDES = (("chosen", "log_ratio/chosen"), ("rejected", "log_ratio/rejected"))


def _nats(found: Made, of: Callable[[float], float] | None = None) -> str:
    value = of(found["value"]) if of else found["value"]
    write = lambda value: significant(value, 3) if of else signed(value)
    return f"{with_error(found | {'value': value}, write)} nats"


def beginning(behaviour: Made | None) -> Made | None:
    """The first tokens' KL: {last, tokens (their share), kl (their share), times (a later token's)}."""
    bins = [one for one in (behaviour or {}).get("by_position") or [] if one["tokens"]]
    first = [one for i, one in enumerate(bins) if not i or (one["last"] or math.inf) <= _SHORT]
    count = lambda some: sum(one["tokens"] for one in some)
    total = lambda some: sum(one["tokens"] * one["kl"] for one in some)
    while len(first) > 1 and total(first[:-1]) > total(bins) / 2:  # no longer than it takes to have most
        first.pop()
    later = bins[len(first) :]
    if not first or not later or first[-1]["last"] is None or total(later) <= 0:
        return None
    times = total(first) / count(first) / (total(later) / count(later))
    part, kl = count(first) / count(bins), total(first) / total(bins)
    return {"last": first[-1]["last"], "tokens": part, "kl": kl, "times": times}


def shallow(made: Made) -> str | None:
    found = beginning(made.get("behaviour"))
    if not found:
        return None
    how = "The change is not confined to the beginning"
    if found["times"] >= _SHALLOW:
        how = "The change is strongest at the beginning"
    elif found["times"] <= 1 / _SHALLOW:
        how = "The change is weaker at the beginning"
    tokens, kl, times = small_percent(found["tokens"]), small_percent(found["kl"]), found["times"]
    one = found["last"] == 1
    where, verb = ("the first token", "has") if one else (f"the first {found['last']} tokens", "have")
    text = f"{where} of a response, {tokens} of all, {verb} {kl} of the KL"
    return f"{how}: {text}, {significant(times, 2)} times a later token's."


def direction(made: Made) -> str | None:
    direction = made.get("direction")
    if not direction:
        return None
    if direction["kind"] == "vector":
        return f"The direction is the vector that was given; {_moved(direction)}."
    tested = {"pairs": f"the pairs of {counted(direction['tested'], 'prompt')}"}.get(direction["kind"])
    tested = f"{tested or counted(direction['tested'], 'text')} that it was not fitted on"
    right = f"right in {percent(direction['accuracy'])} of {tested}"
    if low_high := direction.get("interval"):
        right += f" (95%: {low_high[0]:.0%} to {low_high[1]:.0%})"
    what = _WHAT[direction["kind"]]
    if direction["found"]:
        return (
            f"A direction inside the model tells {what}, {right}; {_moved(direction)}.{_by_length(direction)}"
        )
    text = f"No direction found that tells {what} better than chance: {right}."
    return f"{text} What follows looks along it all the same, as was asked." if direction["forced"] else text


def _moved(direction: Made) -> str:
    before, after = direction.get("before"), direction.get("after")
    if before is None or after is None:
        return "how far the model moved along it is not known"
    text = f"the mean final state went from {significant(before, 3)} to {significant(after, 3)} along it"
    if (after - before) * (1 if direction["towards"] == "up" else -1) >= 0:
        return text
    other = "down" if direction["towards"] == "up" else "up"
    return f"{text}, which is not where it should have gone (--direction {other} looks at it the other way)"


def _by_length(direction: Made) -> str:
    correlation = direction.get("length_correlation") or 0.0
    if abs(correlation) <= GOES_WITH_LENGTH:
        return ""
    text = f" It goes with the response's length (correlation {significant(correlation, 2)})"
    return f"{text}: some of what follows may be length; --match_length fits it on matched pairs."


def where(made: Made) -> str | None:
    where = made.get("where")
    if not where or "attention" not in where:
        return None
    parts = {
        "the MLPs": sum(where["mlp"]),
        "attention": sum(where["attention"]),
        "the embedding": where["embedding"],
    }
    largest = sorted(parts.items(), key=lambda item: -abs(item[1]))
    listed = ", ".join(f"{name} {signed(value)}" for name, value in largest)
    return f"The projection on it changed by {signed(where['total'])}, as a sum: {listed}."


def neurons(made: Made) -> str | None:
    neurons = made.get("neurons")
    if not neurons or neurons.get("reason"):
        return None
    lowering = neurons["lowering"]
    gross, raised = (significant(abs(neurons[key]), 3) for key in ("gross", "raised"))
    text = f"{lowering:,} of {counted(neurons['neurons'], 'neuron')} write more {goal(made['direction'])} "
    text += f"than before, by {gross} in all, others less, by {raised}"
    half = next((one for one in neurons.get("concentration") or [] if one["share"] == 0.5), None)
    if half and half["neurons"]:
        share = small_percent(half["neurons"] / max(neurons["neurons"], 1))
        text += (
            f"; half of the {gross} is the {counted(half['neurons'], 'neuron')} with most ({share} of all)"
        )
    return f"{text}."
