"""How much of the training's effect each intervention brings back, with its standard error over prompts."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fastdpo.evaluation.estimates import Estimate
from fastdpo.evaluation.kl import head_of
from fastdpo.explanation.behaviour import kls, nll, perplexity
from fastdpo.explanation.causes import Causes, Plan
from fastdpo.explanation.measure import Pass
from fastdpo.explanation.rows import Rows
from fastdpo.model.policy import Policy
from fastdpo.training.held_out import standard_error

_TOLD = 2  # standard errors that an effect has to be from 0, for shares of it to be told
_NOISE = 1e-9  # below it an effect is rounding
_NO_SHARE = ("kl", "perplexity")  # distances from before, which any damage makes, and damage itself


def estimates(rows: Rows, before: Pass, found: Pass, kl: Estimate) -> dict[str, Estimate]:
    """The columns of the table of causes, of one pass."""
    everyone = rows.lengths.nonzero()[:, 0]
    ratio = rows.sums(found.token_logp.double() - before.token_logp.double())
    alone = rows.of_pairs(rows.sums(found.token_logp))
    return {
        "projection": rows.mean(found.projection, everyone, rows.lengths),
        "margins": rows.mean_of_pairs(rows.of_pairs(ratio)),
        "logps/accuracies": rows.mean_of_pairs((alone > 0).double()),
        "kl": kl,
        "perplexity": nll(rows, found.token_logp),
    }


def tabled(
    causes: Causes, policy: Policy, planned: Sequence[Plan], passes: Mapping[str, Sequence[Pass]]
) -> dict[str, list[dict[str, Estimate]]]:
    """{name of a row: the columns of each of its passes}; policy: the model before the training."""
    rows, at, own = causes.rows, causes.at, head_of(policy)
    assert causes.ends is not None
    ended = {"after"} | {plan.name for plan in planned if plan.ends}
    (before,), out = passes["before"], {}
    for name, some in passes.items():
        heads = (own, causes.ends.head if name in ended else own)
        columns = []
        for one in some:
            kl = rows.mean_of_tokens(kls(before.hidden, one.hidden, heads, policy.device)[1], at)
            columns.append(estimates(rows, before, one, kl))
        out[name] = columns
    return out


def shares(planned: Sequence[Plan], found: Mapping[str, Sequence[Mapping[str, Estimate]]]) -> dict[str, Any]:
    """The parts "columns", "effect" and "rows" of "causes" in explain.json."""
    (before,), (after,) = found["before"], found["after"]
    names = list(before)
    effect = {name: _effect(name, before[name], after[name]) for name in names}
    ends = [Plan(f"{when} training", when, when, when, ()) for when in ("before", "after")]
    listed = [ends[0], *planned, ends[1]]
    rows = []
    for plan in listed:
        some = found[plan.what if plan.what in ("before", "after") else plan.name]
        row: dict[str, Any] = {key: getattr(plan, key) for key in ("name", "what", "how", "group", "size")}
        row["seeds"] = len(some) if plan.what == "random" else None
        for name in names:
            cells = [one[name] for one in some if name in one]
            told = effect[name]["told"] and name not in _NO_SHARE and plan.patches
            if cells:
                row[name] = _cell(name, cells, before[name], after[name], bool(told))
        rows.append(row)
    return {"columns": names, "effect": effect, "rows": rows}


def _effect(name: str, before: Estimate, after: Estimate) -> dict[str, Any]:
    apart, value = after.by_prompt - before.by_prompt, after.value - before.value
    if name == "perplexity":  # exp of a mean, to first order
        old, new = (perplexity(one).value for one in (before, after))
        apart, value = new * after.by_prompt - old * before.by_prompt, new - old
    error = standard_error(apart)
    told = error is not None and abs(value) > max(_TOLD * error, _NOISE)
    return {"value": value, "error": error, "told": told}


def _cell(
    name: str, some: Sequence[Estimate], before: Estimate, after: Estimate, told: bool
) -> dict[str, Any]:
    """Of one pass, or the mean of several, with the spread of their values."""
    by_prompt = np.mean([one.by_prompt for one in some], 0)
    mean = Estimate(float(np.mean([one.value for one in some])), standard_error(by_prompt), by_prompt)
    shown = perplexity(mean) if name == "perplexity" else mean
    cell: dict[str, Any] = {"value": shown.value, "error": shown.error}
    cell |= {"share": None, "share_error": None, "spread": None}
    if told:
        cell["share"], cell["share_error"] = share(mean, before, after)
    if len(some) > 1:
        each = [perplexity(one).value if name == "perplexity" else one.value for one in some]
        cell["spread"] = float(np.std(each, ddof=1))
    return cell


def share(found: Estimate, before: Estimate, after: Estimate) -> tuple[float, float | None]:
    """s = (found - before) / (after - before), and its standard error over prompts: that of a ratio of means,
    to first order std(a - s b) / (|mean(b)| sqrt(P)), a and b the differences of each prompt (Cochran 1977,
    Sampling Techniques, section 6)."""
    a, b = found.by_prompt - before.by_prompt, after.by_prompt - before.by_prompt
    s = float(a.mean() / b.mean())
    error = standard_error(a - s * b)
    return s, None if error is None else error / abs(float(b.mean()))
