"""What an evaluation found, as a dict and on disk: eval.json and eval.html, whole or not at all."""

import dataclasses
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from fastdpo.errors import ConfigError
from fastdpo.evaluation.answers import Answers, Sampling, as_json
from fastdpo.evaluation.estimates import KINDS, Estimate, Test, paired
from fastdpo.evaluation.rows import OfRows, Rows, won_by_length
from fastdpo.files import durable

_SCORED = 100  # prompts that are answered where a scorer is named and no number is
_TESTED = {  # against: which numbers
    "reference": ("logps/accuracies", "samples/score"),
    "versus": ("logps/accuracies", "rewards/accuracies", "rewards/margins", "loss", "samples/score"),
}


@dataclass(frozen=True)
class Settings:
    """What is asked for: all that a result depends on."""

    model: str
    data: str | list[str]
    reference: str | None = None
    versus: str | None = None
    objective: Any = None
    beta: float | None = None
    max_length: int | None = None
    data_format: Any = None
    chat_template: str | None = None
    samples: int | None = None
    per_prompt: int = 1
    max_new_tokens: int = 128
    seed: int = 0
    scorer: str | None = None

    def __post_init__(self) -> None:
        least = {"samples": 0, "per_prompt": 1, "max_new_tokens": 1}
        for name, low in least.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ConfigError(f"{name}: {value} is below {low}")
        if not self.data:
            raise ConfigError(
                "data: which rows? Name them behind the model, as in `fastdpo eval RUN rows.jsonl`"
            )
        if self.scorer is not None and self.samples == 0:
            raise ConfigError("scorer: it needs answers to score, and samples is 0; leave samples out")

    @property
    def wanted(self) -> int:
        """How many prompts are answered, at most."""
        return self.samples if self.samples is not None else _SCORED if self.scorer else 0

    def keys(self) -> dict[str, Any]:
        """Those that are a config's."""
        names = ("objective", "beta", "max_length", "data_format", "chat_template")
        return {name: getattr(self, name) for name in names}


@dataclass
class Measured:
    """What is known of one model."""

    name: str
    rows: OfRows | None = None
    answers: Answers | None = None
    numbers: dict[str, Estimate] = field(default_factory=dict)

    def summed(self) -> "Measured":
        of_answers = self.answers.numbers() if self.answers else {}
        return replace(self, numbers=(self.rows.numbers if self.rows else {}) | of_answers)


def check_free(
    folder: Path, settings: Any, overwrite: bool, name: str = "eval.json", what: str = "an evaluation"
) -> None:
    """Raises ConfigError where the folder cannot be written, or its file `name` is `what` of other settings
    (a record). One of the same settings is replaced."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / ".writable").touch()
        (folder / ".writable").unlink()
    except OSError as error:
        raise ConfigError(f"output: cannot write into the folder {folder}: {error}") from None
    if overwrite or not (folder / name).exists():
        return
    try:
        before = json.loads((folder / name).read_text(encoding="utf-8"))["settings"]
    except (OSError, ValueError, KeyError, TypeError):
        before = {}
    now = plain(dataclasses.asdict(settings))
    if differ := [key for key in now if before.get(key) != now[key]]:
        was = ", ".join(f"{key} {before.get(key)!r}" for key in differ)
        raise ConfigError(
            f"output: {folder} holds {what} of other settings ({was}). Name another folder "
            "by --output, or replace it by --overwrite"
        )


def result(
    settings: Settings, rows: Rows, sampling: Sampling | None, measured: dict[str, Measured], facts: dict
) -> dict[str, Any]:
    """All that was found, as JSON has it. measured: by "model", "reference", "versus"; facts: what else is
    told."""
    wins = list(_wins(measured))
    tests = [*_tests(measured), *(test for _, test in wins)]
    numbers = {key: _as_json(one.numbers) for key, one in measured.items()}
    numbers["model"] |= {f"samples/wins over {test.other}": _one(won) for won, test in wins}
    data = won_by_length(rows)
    answers = {key: one.answers for key, one in measured.items() if one.answers}
    return plain(
        {
            "settings": dataclasses.asdict(settings),
            **facts,
            "names": {key: one.name for key, one in measured.items()},
            "data": {
                "rows": len(rows.groups),
                "prompts": len(rows.first_rows),
                "pairs": data["pairs"],
                "won_by_length": _one(data["share"]) if data["share"] else None,
                "chosen_longer": data["longer"],
                "chosen_shorter": data["shorter"],
            },
            "answered": len(sampling.prompts) if sampling else 0,
            "numbers": numbers,
            "tests": [test._asdict() for test in tests],
            "sources": _sources(rows, measured),
            "by_prompt": _by_prompt(rows, measured),
            "margins": {
                key: one.rows.margins for key, one in measured.items() if one.rows and one.rows.margins
            },
            "answers": as_json(answers, sampling.prompts) if sampling else [],
        }
    )


def _wins(measured: dict[str, Measured]) -> Iterator[tuple[Estimate, Test]]:
    model = measured["model"].answers
    if model is None or model.score is None:
        return
    for key, other in measured.items():
        if key != "model" and other.answers is not None:
            won = model.wins_over(other.answers)
            half = won._replace(value=0.5, by_prompt=np.full(len(won.by_prompt), 0.5))
            yield won, paired("samples/wins", ("model", key), won, half)


def _tests(measured: dict[str, Measured]) -> Iterator[Test]:
    model = measured["model"].numbers
    for key in measured.keys() - {"model"}:
        other = measured[key].numbers
        for number in _TESTED[key]:
            if number in model and number in other and len(model[number].by_prompt):
                yield paired(number, ("model", key), model[number], other[number])


def _sources(rows: Rows, measured: dict[str, Measured]) -> list[dict]:
    """One entry a source, the largest first."""
    out = []
    pairs = np.repeat(np.arange(len(rows.groups)), np.diff(rows.facts.cu_pairs))
    for name, here in rows.sources.items():
        of = {key: one.rows.sources.get(name, {}) for key, one in measured.items() if one.rows}
        numbers = {key: _as_json(some) for key, some in of.items()}
        out.append({"source": name, "rows": here.sum(), "pairs": here[pairs].sum(), "numbers": numbers})
    return out


def _by_prompt(rows: Rows, measured: dict[str, Measured]) -> dict[str, dict]:
    """{number: {"rows": the first row of each prompt, "model": [...], ...}}; a number is the mean of its
    values, see training/held_out.py."""
    out: dict[str, dict] = {}
    for key, one in measured.items():
        for number, found in one.numbers.items():
            if len(found.by_prompt):
                entry = out.setdefault(number, {"rows": rows.first_rows[found.prompts]})
                entry[key] = found.by_prompt
    return out


def _as_json(numbers: dict[str, Estimate]) -> dict[str, dict]:
    return {name: _one(numbers[name]) for name in KINDS if name in numbers}


def _one(found: Estimate) -> dict[str, Any]:
    return {"value": found.value, "stderr": found.error, "prompts": len(found.by_prompt) or None}


def plain(value: Any) -> Any:
    """As JSON has it: nothing of numpy, twelve digits, None for what is no number."""
    if isinstance(value, dict):
        return {str(name): plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple | np.ndarray):
        return [plain(one) for one in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float):
        return float(f"{value:.12g}") if math.isfinite(value) else None
    return value


def write(folder: Path, made: dict[str, Any], page: str, name: str = "eval") -> None:
    """The page first: where the JSON is, all is."""
    durable.write_text(folder / f"{name}.html", page)
    text = json.dumps(made, indent=1, ensure_ascii=False, allow_nan=False)
    durable.write_text(folder / f"{name}.json", text)
