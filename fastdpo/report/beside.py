"""Several runs beside each other: in what they differ, and which held-out numbers by more than chance."""

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from fastdpo.config.keys import FIELDS
from fastdpo.console.formatting import all_ties, percent, signed, significant
from fastdpo.report.history import RunHistory, json_lines
from fastdpo.report.story import error_text
from fastdpo.training.held_out import standard_error
from fastdpo.training.resume import FREE

_FEWEST = 20  # held-out prompts: of fewer, two standard errors are no bound of 95%
_LONGEST_NAME = 28  # of a run made of its settings, in characters
_NO_SETTINGS = {"output_dir", "push_to_hub", "resume", "overwrite"}  # where a run is, how it was called
_NO_STEP = FREE - {"max_steps", "num_epochs"}  # keys that change no step of a run
_REFERENCE = ("model", "adapter")  # what a first stage refers to
_LOSS = (
    *_REFERENCE,
    "objective",
    "objective_args",
    "beta",
    "label_smoothing",
    "router_aux_loss_coef",
    "pairs",
)
_NUMBERS = (  # (metric, title, how it is written, lower is better or None: neither, where these are the same)
    ("logps/accuracies", "accuracy of the policy alone", percent, False, ()),
    ("rewards/accuracies", "accuracy over the reference", percent, False, _REFERENCE),
    ("accuracy", "accuracy of the rewards", percent, False, ()),
    ("loss", "loss", significant, True, _LOSS),
    ("rewards/margins", "reward margin", significant, None, ()),
    ("kl", "KL, nats a token", significant, None, ()),
)


def settings(histories: Sequence[RunHistory]) -> dict[str, list]:
    """{key: its value in each run} of the keys that differ; a stage's as `stage 2: beta`."""
    defaults = {name: f.default for name, f in FIELDS.items()}
    configs = [defaults | history.config for history in histories]
    found = {name: [config.get(name) for config in configs] for config in configs for name in config}
    staged = [config.get("stages") or [] for config in configs]
    found["stages"] = [len(stages) or None for stages in staged]
    for number in range(max(map(len, staged))):
        for key in dict.fromkeys(
            key for stages in staged for stage in stages[number : number + 1] for key in stage
        ):
            of = [stages[number] if number < len(stages) else None for stages in staged]
            own = [None if s is None else s.get(key, c.get(key)) for s, c in zip(of, configs)]
            found[f"stage {number + 1}: {key}"] = own
    return {name: values for name, values in found.items() if name not in _NO_SETTINGS and _differ(values)}


def machines(histories: Sequence[RunHistory]) -> dict[str, list]:
    """{what: of each run} of the device and the versions that they ran on last, where these differ."""
    ran = [(history.happened("start", "resume") or [{}])[-1] for history in histories]
    facts = [{"device": e.get("device")} | dict(sorted((e.get("versions") or {}).items())) for e in ran]
    found = {name: [fact.get(name) for fact in facts] for fact in facts for name in fact}
    return {name: values for name, values in found.items() if _differ(values)}


def rows(histories: Sequence[RunHistory]) -> dict[str, str]:
    """{"training", "held-out": "the same", "other" or "not known"}: whether the runs have the same rows,
    token by token."""
    started = [(history.happened("start", "resume") or [{}])[-1].get("rows") or {} for history in histories]
    out = {}
    for what in ("training", "held-out"):
        digests = [some.get(what) for some in started]
        out[what] = "not known" if None in digests else "other" if _differ(digests) else "the same"
    return out


def _differ(values: list) -> bool:
    return len({json.dumps(value, sort_keys=True, default=str) for value in values}) > 1


def names(histories: Sequence[RunHistory], differ: dict[str, list]) -> list[str]:
    """What tells the runs apart in few words: `beta 0.05` where one or two settings do, or their folders."""
    differ = {key: values for key, values in differ.items() if key not in _NO_STEP}
    if 0 < len(differ) <= 2 and all(":" not in key for key in differ):
        by_setting = [
            ", ".join(f"{key} {written(v[i])}" for key, v in differ.items()) for i in range(len(histories))
        ]
        if len(set(by_setting)) == len(histories) and max(map(len, by_setting)) <= _LONGEST_NAME:
            return by_setting
    return folders(histories)


def folders(histories: Sequence[RunHistory]) -> list[str]:
    """The folders' own names, or, where these are not all different, their paths from where they part."""
    paths = [history.run.resolve() for history in histories]
    last = [path.name for path in paths]
    if len(set(last)) == len(last):
        return last
    common = os.path.commonpath(paths)
    return [str(path.relative_to(common)) for path in paths]


def written(value) -> str:
    """A setting as in YAML."""
    if value is None:
        return "default"
    return value if isinstance(value, str) else json.dumps(value, default=str)


@dataclass
class Cell:
    """A run's number: how it is written, its standard error, and how it stands to the best of the column."""

    text: str = ""
    error: str = ""
    apart: str = ""  # from the best, with the standard error of the difference
    verdict: str = ""  # "best", "worse", "" where chance would do, or nobody asked


@dataclass
class Column:
    """One held-out number of all runs; `why_not`: why none is called better."""

    title: str
    cells: list[Cell] = field(default_factory=list)
    why_not: str = ""


def scored_at(history: RunHistory) -> tuple[int, int] | None:
    """(stage, step) of the evaluation that counts: the last, or that of the weights that load_best kept."""
    stages = history.stages()
    loss = history.series("eval_loss", stages[-1]["stage"]) if stages else history.series("eval_loss")
    if not len(loss):
        return None
    finished = bool(history.happened("done")) and history.config.get("load_best")
    at = int(np.argmin(loss.value)) if finished else -1
    return int(loss.stage[at]), int(loss.step[at])


def held_out(
    histories: Sequence[RunHistory], at: list, parts: list[dict], differ: dict[str, list]
) -> list[Column]:
    """The numbers of each run at these evaluations (of `scored_at`), and which of them are better than chance
    would make them. parts: of `by_prompt`; differ: of `settings`.

    A difference to the best run counts where it is more than two standard errors of itself, from the
    differences prompt by prompt (see training/held_out.py): a bound of 95%, of each difference by itself.
    """
    same_rows, scored, out = rows(histories)["held-out"], prompts(parts), []
    for metric, title, write, lower, needed in _NUMBERS:
        values = [_at(h, f"eval_{metric}", where) for h, where in zip(histories, at)]
        if metric == "rewards/accuracies":
            values = [None if _still(h, where) else v for h, where, v in zip(histories, at, values)]
        if all(value is None for value in values):
            continue
        errors = [_at(h, f"eval_{metric}_stderr", where) for h, where in zip(histories, at)]
        column = Column(title, [Cell(*_said(v, e, write)) for v, e in zip(values, errors)])
        others = [key for key in differ if key.rpartition(": ")[2] in needed or (needed and _before(key, at))]
        if lower is not None and sum(v is not None for v in values) > 1:
            if same_rows != "the same":
                column.why_not = "the held-out rows are not known to be the same"
            elif others:
                column.why_not = f"it depends on {', '.join(others)}, in which the runs differ"
            elif needed and any(history.reference_moves for history in histories):
                column.why_not = "it is over a reference that moves with each round"
            elif 0 < scored < _FEWEST:
                column.why_not = f"{scored} held-out prompts are too few to tell; score {_FEWEST} or more"
            else:
                _judge(column.cells, values, [part.get(metric) for part in parts], write, lower)
        out.append(column)
    return out


def _before(key: str, at: list) -> bool:
    """Whether a setting may have changed what a later stage starts from, and refers to."""
    last = max((where[0] for where in at if where), default=0)
    return last > 0 and key not in _NO_STEP and not key.startswith(f"stage {last + 1}: ")


def _said(value: float | None, error: float | None, write) -> tuple[str, str]:
    if value is None:
        return "", ""
    return write(value), "" if error is None else error_text(error, write)


def _judge(cells: list[Cell], values: list, parts: list, write, lower: bool) -> None:
    """Says of each cell how far it is from the best."""
    there = [i for i, value in enumerate(values) if value is not None]
    best = (min if lower else max)(there, key=lambda i: values[i])
    for i in there:
        if i == best:
            continue
        change = values[i] - values[best]
        if parts[i] is not None and parts[i] == parts[best]:
            cells[i].apart = "the same"
            continue
        text = f"{signed(100 * change)} pp" if write is percent else signed(change)
        if parts[i] is None or parts[best] is None or len(parts[i]) != len(parts[best]):
            cells[i].apart = f"{text}, no error known"
            continue
        error = standard_error(np.array(parts[i]) - np.array(parts[best]))
        cells[i].apart = f"{text} ± {error_text(error, write)}" if error is not None else text
        if error is not None and abs(change) > 2 * error:
            cells[i].verdict = "worse"
    if any(cell.verdict == "worse" for cell in cells):
        cells[best].verdict = "best"


def by_prompt(history: RunHistory, where) -> dict:
    """{number: what each held-out prompt adds} of an evaluation; of one logged twice the last."""
    lines = [r for r in json_lines(history, "held_out.jsonl") if (r.get("stage"), r.get("step")) == where]
    return {name: v for name, v in lines[-1].items() if isinstance(v, list)} if lines else {}


def prompts(parts: list[dict]) -> int:
    """How many different held-out prompts the evaluations scored; 0 where that is not known."""
    return max((len(values) for part in parts for values in part.values()), default=0)


def _at(history: RunHistory, name: str, where) -> float | None:
    return None if where is None else history.series(name, where[0]).at(where[1])


def _still(history: RunHistory, where) -> bool:
    """Whether the policy was still the reference, so that pairs tie."""
    margin = _at(history, "eval_rewards/margins", where)
    return margin is not None and all_ties(margin)
