"""What the columns of a row say, whatever the format: the step between a row as written and a Row."""

from typing import NamedTuple

from fastdpo.data import row_fields
from fastdpo.data.row_fields import RowProblem, kind


class Columns(NamedTuple):
    """A row's prompt and responses as given, before they are checked and taken apart."""

    prompt: str | list | None  # None: it is what the responses have in common
    fields: tuple[str, ...]  # what to call the responses in messages
    values: tuple  # the responses as given
    scores: tuple[float | None, ...]
    pairs: tuple[tuple[int, int], ...]
    marks: tuple[tuple[dict, str, str], ...]  # per response: where its spans are, their prefix, their place
    ref_logps: tuple[float | None, ...]
    ties: int = 0
    label: bool | None = None
    prompt_field: str = "prompt"
    chat: bool = False  # a text prompt is a user's turn, and text responses are an assistant's
    system: str | None = None  # a system turn that comes before all others
    tools: object = None


def column(row: dict, name: str):
    """The row's value; RowProblem where it has none."""
    if name not in row:
        has = ", ".join(map(str, row)) or "none"
        message = (
            f"the column is missing or null (this row has: {has}; a row is {{prompt, chosen, rejected}}, "
            "{chosen, rejected}, {prompt, responses}, {prompt, completion, label} or another known format; "
            "or name its columns in data_format)"
        )
        raise RowProblem("missing_column", name, message)
    return row[name]


def about_chat(row: dict) -> dict:
    """What Columns has of a conversation's other columns: its tools, and a system prompt."""
    system = row.get("system")
    if system is not None and not isinstance(system, str):
        raise RowProblem("wrong_type", "system", f"text, not {kind(system)}")
    return {"chat": True, "system": system or None, "tools": row.get("tools")}


def about(row: dict) -> dict:
    """The same of a row that may be text: beside a system column it is a conversation."""
    return about_chat(row) if "system" in row else {"tools": row.get("tools")}


def text(row: dict, name: str) -> str:
    """A column that is text."""
    value = column(row, name)
    if not isinstance(value, str):
        raise RowProblem("wrong_type", name, f"text, not {kind(value)}")
    return value


def pair(row: dict, prompt, values: tuple, *, fields=("chosen", "rejected"), **more) -> Columns:
    """Two responses, the first one preferred. More: what Columns has by default."""
    scores = tuple(row_fields.score(row.get(name), name) for name in ("score_chosen", "score_rejected"))
    marks = ((row, "chosen_", ""), (row, "rejected_", ""))
    return Columns(prompt, fields, values, scores, ((0, 1),), marks, row_fields.ref_logps(row), **more)


def judged(row: dict, prompt, field: str, value, label_field: str, **more) -> Columns:
    """One response, desirable or not."""
    label = row_fields.label(column(row, label_field), label_field)
    return Columns(prompt, (field,), (value,), (None,), (), ((row, "", ""),), (None,), label=label, **more)


def ranked(list_field: str, prompt, answers: list[tuple[str, object, float]], marks=None, **more) -> Columns:
    """Responses (field, value, score): a pair wherever one score is higher than another."""
    if len(answers) < 2:
        raise RowProblem("too_few_responses", list_field, f"two at least, got {len(answers)}")
    fields, values, scores = zip(*answers)
    several = range(len(scores))
    pairs = tuple((i, j) for i in several for j in several if scores[i] > scores[j])
    if not pairs:
        raise RowProblem("no_pair", list_field, "all scores are equal, so no response is preferred")
    ties = len(scores) * (len(scores) - 1) // 2 - len(pairs)
    marks = marks or (({}, "", ""),) * len(scores)
    return Columns(prompt, fields, values, scores, pairs, marks, (None,) * len(scores), ties, **more)


def items(row: dict, name: str, keys: tuple[str, ...]) -> list[dict]:
    """A column that is a list of objects with these keys, none of them null."""
    value = column(row, name)
    wanted = " and ".join(keys)
    if not isinstance(value, list):
        raise RowProblem("wrong_type", name, f"a list of {{{', '.join(keys)}}}, not {kind(value)}")
    for i, item in enumerate(value):
        if not isinstance(item, dict):
            raise RowProblem("wrong_type", f"{name}[{i}]", f"an object with {wanted}, not {kind(item)}")
        for key in keys:
            if item.get(key) is None:
                raise RowProblem("missing_column", f"{name}[{i}].{key}", "missing or null")
    return value
