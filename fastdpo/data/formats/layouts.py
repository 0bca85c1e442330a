"""How a source's rows are read where the user says so, and where nothing is said: by their columns."""

import re
from dataclasses import dataclass, field
from typing import Any

from fastdpo.data.formats import prompts
from fastdpo.data.formats.columns import Columns, beside_names
from fastdpo.data.formats.known import COLUMNS, FORMATS, detect
from fastdpo.data.formats.turns import Tags
from fastdpo.data.report import RowProblem
from fastdpo.errors import ConfigError
from fastdpo.values import nearest

_TEXTS = ("prompt_format", "chosen_format", "rejected_format")
_SAYABLE = ("format", *_TEXTS, *COLUMNS)  # in a data_format, to the left of the colon


@dataclass(frozen=True)
class Layout:
    """How a source's rows are to be read, as far as that is said and not told by their columns."""

    format: str | None = None  # None: told by the columns after all
    columns: dict[str, str] = field(default_factory=dict)  # ours -> theirs; no other column is read
    texts: dict[str, str] = field(default_factory=dict)  # prompt_format, chosen_format, rejected_format
    tags: Tags = Tags()

    def ours(self, row: dict) -> dict:
        """The row with our names for its columns."""
        if not self.columns:
            return row
        return {ours: row[theirs] for ours, theirs in self.columns.items() if theirs in row}

    def read(self, row: dict, prompts_only: bool = False) -> tuple[str, Columns]:
        """(the name of the row's format, what its columns say), of a row under our names, without nulls.
        `prompts_only`: those of a prompt alone are read too."""
        name = prompts.format_of(row, self.format) if prompts_only else self.format
        if name in (prompts.ALONE, prompts.ANSWERED) and not prompts_only:
            raise RowProblem("unknown_format", "row", f"{name} rows are read with rounds, which answer them")
        name = name or detect(row)
        columns = FORMATS[name].read(row, self.tags)
        return name, _as_text(columns, self.texts) if self.texts else columns

    def problem(self, problem: RowProblem, row: dict) -> RowProblem:
        """The problem of this row with the row's own names for the columns it is in, and those it has."""
        theirs = lambda match: self.columns.get(match[0], match[0])
        field = re.sub(r"^\w+|(?<= and )\w+", theirs, problem.field)
        message = beside_names(problem.message, row)
        if field in self.columns.values():
            message += "; data_format asks for it: name the rows' own columns there, or set it to null"
        return RowProblem(problem.reason, field, message)


def layout_of(data_format: str | dict | None) -> Layout | None:
    """The config's data_format: a format's name, or {our column: the rows' own name}, in which `format` may
    name the format and prompt_format, chosen_format, rejected_format the text around. Raises ConfigError."""
    if data_format is None:
        return None
    said = {"format": data_format} if isinstance(data_format, str) else dict(data_format)
    for name, value in said.items():
        if name not in _SAYABLE:
            close, known = nearest(name, _SAYABLE), ", ".join(_SAYABLE)
            raise ConfigError(f"data_format: {name!r} is no column of ours. {close}Known are {known}")
        if not isinstance(value, str):
            raise ConfigError(f"data_format: {name}: a name is needed, not {value!r}")
    format = said.pop("format", None)
    if format is not None and format not in FORMATS:
        message = f"data_format: {format!r} is not one of {', '.join(FORMATS)}. {nearest(format, FORMATS)}"
        raise ConfigError(message.rstrip())
    texts = {name: said.pop(name) for name in _TEXTS if name in said}
    for name, text in texts.items():
        place = f"{{{name.removesuffix('_format')}}}"
        if place not in text:
            raise ConfigError(f"data_format: {name}: {text!r} has no {place} in it")
    return Layout(format, said, texts)


def _as_text(columns: Columns, texts: dict[str, str]) -> Columns:
    """The row as plain text, each part within the user's own text around it."""
    for name, value in zip(("prompt", *columns.fields), (columns.prompt, *columns.values)):
        if not isinstance(value, str):
            raise RowProblem("wrong_type", name, "text is needed: data_format puts text around it")
    if "{system}" in texts.get("prompt_format", "") and columns.system is None:
        raise RowProblem("missing_column", "system", "missing or empty, and prompt_format has {system} in it")

    def around(name: str, **values: Any) -> str:
        frame = texts.get(f"{name}_format", f"{{{name}}}")
        return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), frame)

    prompt = around("prompt", prompt=columns.prompt, system=columns.system)
    values = tuple(around(name, **{name: v}) for name, v in zip(("chosen", "rejected"), columns.values))
    return columns._replace(prompt=prompt, values=values, chat=False, system=None)
