"""What a run left in its folder, read back: also from a run that is still going on, or was killed."""

import json
from array import array
from collections import defaultdict
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import yaml

from fastdpo.config.keys import FIELDS
from fastdpo.console.formatting import all_ties, first_few

_MISSING = {  # what a report then cannot say
    "config.yaml": "what was asked for is not known",
    "data_report.json": "what became of the rows is not known",
    "metrics.jsonl": "nothing was logged yet, or it was moved",
    "events.jsonl": "when it started and how it ended is not known",
}


@dataclass(frozen=True)
class Series:
    """One logged number over a run, by stage and step; each (stage, step) once."""

    stage: np.ndarray
    step: np.ndarray
    value: np.ndarray  # not finite where it was logged so

    def __len__(self) -> int:
        return len(self.step)

    def at(self, step: float) -> float | None:
        """The value at a step, where there is one."""
        here = self.value[self.step == step]
        return float(here[-1]) if len(here) else None

    def where(self, here: np.ndarray) -> "Series":
        return Series(self.stage[here], self.step[here], self.value[here])

    def of_stage(self, stage: int) -> "Series":
        return self.where(self.stage == stage)


_EMPTY = Series(*(np.zeros(0),) * 3)


@dataclass
class RunHistory:
    """The files of one run folder; `problems` says what of them is missing or damaged."""

    run: Path
    config: dict = field(default_factory=dict)
    config_text: str = ""
    data: dict = field(default_factory=dict)  # data_report.json
    numbers: dict[str, Series] = field(default_factory=dict)  # metrics.jsonl by name
    events: list[dict] = field(default_factory=list)
    samples: list[dict] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    plots: Path | None = None  # for PNGs; a report on the way has none: they take as long as the page itself

    def series(self, name: str, stage: int | None = None) -> Series:
        """A number's finite values; empty where it was never logged. What is 0 at the reference is 0 where it
        is rounding beside its largest value."""
        found = self.numbers.get(name, _EMPTY)
        found = found.where(np.isfinite(found.value))
        if "rewards/" in name or name.endswith("kl"):
            size = np.abs(found.value)
            found = replace(found, value=np.where(size < 1e-6 * size.max(initial=0), 0.0, found.value))
        return found if stage is None else found.of_stage(stage)

    def all_ties(self, accuracies: Series) -> np.ndarray:
        """Which of these accuracies over the reference say nothing: the policy was still the reference, so
        that held-out pairs tie, which counts as 0, or differ by rounding."""
        margin = self.series("eval_rewards/margins")
        still = margin.where(np.array([all_ties(value) for value in margin.value], bool))
        tied = set(zip(still.stage, still.step))
        return np.array([at in tied for at in zip(accuracies.stage, accuracies.step)], bool)

    def settings(self) -> dict:
        """The keys of config.yaml that are not at their default, or that this version does not know."""
        known = lambda name, value: name in FIELDS and value == FIELDS[name].default
        return {name: value for name, value in self.config.items() if not known(name, value)}

    def happened(self, *events: str) -> list[dict]:
        return [event for event in self.events if event.get("event") in events]

    def stages(self) -> list[dict]:
        """The stages begun, in order: the last `stage` event of each, or what the metrics tell."""
        begun = {int(event.get("stage", 0)): event for event in self.happened("stage")}
        for number in {int(s) for series in self.numbers.values() for s in np.unique(series.stage)}:
            begun.setdefault(number, {"stage": number})
        return [{"objective": self.objective(number)} | begun[number] for number in sorted(begun)]

    def objective(self, stage: int):
        """What config.yaml asks for in a stage."""
        stages = self.config.get("stages") or [{}]
        wanted = stages[stage] if stage < len(stages) else {}
        return wanted.get("objective") or self.config.get("objective")

    @property
    def reference_moves(self) -> bool:
        """Whether each round refers to the policy that sampled it, so that what is over the reference begins
        anew in each."""
        return bool(self.config.get("rounds")) and self.config.get("reference") != "start"

    @property
    def rows_kept(self) -> int | None:
        """How many rows of the data could be used, where that is known."""
        return ((self.data.get("data") or {}).get("kept") or {}).get("rows")

    @property
    def last_step(self) -> int:
        """The last step known of: logged, or saved since the run last went on."""
        logged = max((s.step.max() for s in self.numbers.values() if len(s)), default=0)
        saved = [event.get("step", 0) for event in self.happened("start", "resume", "checkpoint")]
        return int(max([logged, *[step for step in saved if isinstance(step, int)][-1:]]))


def read_run(run: Path) -> RunHistory:
    """Reads what is there. Never raises for a missing or damaged file."""
    history = RunHistory(Path(run))
    history.config_text, history.config = _mapping(history, "config.yaml", yaml.safe_load)
    _, history.data = _mapping(history, "data_report.json", json.loads)
    history.numbers = _columns(history)
    history.events = list(json_lines(history, "events.jsonl"))
    history.samples = list(json_lines(history, "samples.jsonl"))
    return history


def _text(history: RunHistory, name: str) -> str:
    try:
        return (history.run / name).read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        if name in _MISSING:
            history.problems.append(f"{name} is missing: {_MISSING[name]}.")
    except OSError as error:
        history.problems.append(f"{name} cannot be read: {error.strerror}.")
    return ""


def _mapping(history: RunHistory, name: str, parse) -> tuple[str, dict]:
    """(the file's text, what it says)"""
    text = _text(history, name)
    try:
        found = parse(text) if text else {}
        if isinstance(found, dict):
            return text, found
        why = f"it holds a {type(found).__name__}"
    except (ValueError, yaml.YAMLError) as error:
        why = str(error).splitlines()[0]
    history.problems.append(f"{name} is damaged ({why}), so it is left out.")
    return text, {}


def json_lines(history: RunHistory, name: str):
    """The records of a .jsonl file. A line that a kill cut short, or that is damaged, is named."""
    damaged = []
    lines = _text(history, name).splitlines()
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            yield record
        else:
            damaged.append(number)
    if damaged == [len(lines)]:
        history.problems.append(f"{name}: the last line is cut short, as by a kill; it is left out.")
    elif damaged:
        which = first_few(damaged)
        history.problems.append(f"{name}: {len(damaged)} damaged lines are left out (lines {which}).")


def _columns(history: RunHistory) -> dict[str, Series]:
    """metrics.jsonl by name: columns, since a long run's lines as dicts would take hundreds of MB."""
    columns: dict[str, list[array]] = defaultdict(lambda: [array("d") for _ in range(3)])
    for record in json_lines(history, "metrics.jsonl"):
        stage, step = record.pop("stage", 0), record.pop("step", None)
        if not isinstance(step, int) or not isinstance(stage, int):
            continue
        for name, value in record.items():
            if isinstance(value, int | float):
                for column, number in zip(columns[name], (stage, step, value)):
                    column.append(number)
    numbers = {name: _once(*map(np.array, column)) for name, column in columns.items()}
    for name, series in numbers.items():
        bad = series.step[~np.isfinite(series.value)].astype(int).tolist()
        if bad:
            which = first_few([f"{step:,}" for step in bad])
            history.problems.append(f"metrics.jsonl: {name} is not a number at step {which}.")
    return numbers


def _once(stage: np.ndarray, step: np.ndarray, value: np.ndarray) -> Series:
    """Sorted, and of a step that was logged twice (redone after a resume) the last."""
    keys = np.stack([stage, step])[:, ::-1]
    _, last = np.unique(keys, axis=1, return_index=True)
    last = len(step) - 1 - last
    return Series(stage[last], step[last], value[last])
