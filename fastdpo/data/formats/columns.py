"""What a format is made of: what its columns are told by, and what they say of a row, as Columns."""

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

from fastdpo.data.formats.turns import Tags, starts_with, text_or_turns, turns
from fastdpo.data.report import RowProblem, expect, is_finite, is_number, kind

QUESTIONS = ("prompt", "instruction", "question", "input", "messages", "conversations", "context")
WHOLE, NOWHERE = "in whole conversations", "nowhere"
_ROUNDING = 0.01  # how far above 0 a sum of log-probs may come out


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


# ---- what tells a format


def asked(row: dict) -> set[str]:
    """Where a pair's question may be: in these columns, or in WHOLE conversations (chosen and rejected, so
    that no other column asks it), or NOWHERE else. Empty where the row has no chosen and rejected."""
    if "chosen" not in row or "rejected" not in row:
        return set()
    lists = [row[name] for name in ("chosen", "rejected") if isinstance(row[name], list) and row[name]]
    if (
        len(lists) == 2
        and all(isinstance(turns[0], dict) for turns in lists)
        and ("assistant" not in map(starts_with, lists))
    ):
        return {WHOLE}
    there = {name for name in QUESTIONS if name in row}
    return there - {"input"} if "instruction" in there else there or {NOWHERE}


def has(*names: str, one_of: tuple[str, ...] = ()) -> Callable[[dict, set], bool]:
    """All of these columns (and one of those), in a row without chosen and rejected."""
    needed = set(names)
    return lambda row, asked: (
        not asked and needed <= row.keys() and (not one_of or not row.keys().isdisjoint(one_of))
    )


def asks(name: str) -> Callable[[dict, set], bool]:
    """A pair whose question is in this column."""
    return lambda row, asked: name in asked


def turns_beside(name: str) -> Callable[[dict, set], bool]:
    """Turns in this column beside a pair; beside whole conversations only where it says something else."""
    differ = lambda turns, chosen: not isinstance(turns, list) or turns != chosen[: len(turns)]
    return lambda row, asked: (
        name in asked
        or (WHOLE in asked and name in row and "prompt" not in row and differ(row[name], row["chosen"]))
    )


# ---- one column


def column(row: dict, name: str):
    """The row's value; RowProblem where it has none."""
    if name not in row:
        message = (
            f"the column is missing or null (this row has: {_names(row)}; a row is {{prompt, chosen, "
            "rejected}, {chosen, rejected}, {prompt, responses}, {prompt, completion, label} or another "
            "known format, or with rounds a prompt alone; or name its columns in data_format)"
        )
        raise RowProblem("missing_column", name, message)
    return row[name]


def beside_names(message: str, row: dict) -> str:
    """The message of `column`, with the names that the row itself has for its columns."""
    has = _names({name: value for name, value in row.items() if value is not None})
    return re.sub(r"(?<=\(this row has: ).*?(?=; a row is)", lambda _: has, message)


def _names(row: dict) -> str:
    """Such that space around a name is seen."""
    return ", ".join(str(n) if str(n) == str(n).strip() else repr(n) for n in row) or "none"


def text(row: dict, name: str) -> str:
    """A column that is text."""
    return expect(column(row, name), str, name, "text")


def items(row: dict, name: str, keys: tuple[str, ...]) -> list[dict]:
    """A column that is a list of objects with these keys, none of them null."""
    value = expect(column(row, name), list, name, f"a list of {{{', '.join(keys)}}}")
    for i, item in enumerate(value):
        expect(item, dict, f"{name}[{i}]", f"an object with {' and '.join(keys)}")
        for key in keys:
            if item.get(key) is None:
                raise RowProblem("missing_column", f"{name}[{i}].{key}", "missing or null")
    return value


def score(value, field: str) -> float | None:
    """A rating or a reward; None where there is none."""
    if value is None:
        return None
    if not is_number(value):
        raise RowProblem("wrong_type", field, f"a number, not {kind(value)}")
    if not is_finite(value):
        raise RowProblem("nan_score", field, f"a finite number, not {str(value)[:20]}")
    return float(value)


def about_chat(row: dict) -> dict:
    """What Columns has of a conversation's other columns: its tools, and a system prompt."""
    system = expect(row.get("system", ""), str, "system", "text")
    return {"chat": True, "system": system or None, "tools": row.get("tools")}


def about(row: dict) -> dict:
    """The same of a row that may be text: beside a system column it is a conversation."""
    return about_chat(row) if "system" in row else {"tools": row.get("tools")}


# ---- the whole row


def pair(row: dict, prompt, values: tuple, *, fields=("chosen", "rejected"), **more) -> Columns:
    """Two responses, the first one preferred. More: what Columns has by default."""
    scores = tuple(score(row.get(name), name) for name in ("score_chosen", "score_rejected"))
    marks = ((row, "chosen_", ""), (row, "rejected_", ""))
    return Columns(prompt, fields, values, scores, ((0, 1),), marks, _ref_logps(row), **more)


def judged(row: dict, prompt, field: str, value, label_field: str, **more) -> Columns:
    """One response, desirable or not: a bool, or 0 or 1."""
    label = column(row, label_field)
    if not isinstance(label, bool | int | float) or label not in (0, 1):
        raise RowProblem("malformed_label", label_field, f"true or false (or 1 or 0), not {kind(label)}")
    marks = ((row, "", ""),)
    return Columns(prompt, (field,), (value,), (None,), (), marks, (None,), label=bool(label), **more)


def ranked(list_field: str, prompt, answers: list[tuple[str, object, float]], marks=None, **more) -> Columns:
    """Responses (field, value, score): a pair wherever one score is higher than another."""
    if len(answers) < 2:
        raise RowProblem("too_few_responses", list_field, f"two at least, got {len(answers)}")
    fields, values, scores = zip(*answers)
    pairs = tuple((i, j) for i, a in enumerate(scores) for j, b in enumerate(scores) if a > b)
    if not pairs:
        raise RowProblem("no_pair", list_field, "all scores are equal, so no response is preferred")
    ties = math.comb(len(scores), 2) - len(pairs)
    marks = marks or (({}, "", ""),) * len(scores)
    return Columns(prompt, fields, values, scores, pairs, marks, (None,) * len(scores), ties, **more)


def answers(
    row: dict, name: str, said: str, rating: str, tags: Tags, check=None
) -> list[tuple[str, object, float]]:
    """What `ranked` needs of a list of objects, where each says `said` and is rated by `rating`."""
    found: list[tuple[str, object, float]] = []
    for i, item in enumerate(items(row, name, (said, rating))):
        said_in, field = f"{name}[{i}].{said}", f"{name}[{i}].{rating}"
        value: Any = score(item[rating], field)  # which `items` knows not to be null
        if check:
            check(value, item, field)
        found.append((said_in, text_or_turns(item[said], said_in, tags), value))
    return found


def _ref_logps(row: dict) -> tuple[float | None, ...]:
    """What a reference model gave (chosen, rejected): both sums, or None twice where the row has neither."""
    old = lambda name: name.replace("ref_", "reference_", 1)  # TRL's name for it until 0.11
    names = ("ref_chosen_logps", "ref_rejected_logps")
    fields = [old(name) if name not in row and old(name) in row else name for name in names]
    if not any(field in row for field in fields):
        return None, None
    problem = lambda field, message: RowProblem("malformed_ref_logps", field, message)
    for field in fields:
        value = row.get(field)
        if field not in row:
            raise problem(field, "missing or null, where the row has the other response's; give both or none")
        if not is_number(value):
            raise problem(field, f"a number, the sum over the response's tokens, not {kind(value)}")
        if not is_finite(value):
            raise problem(field, f"a finite number, not {str(value)[:20]}")
        if value > _ROUNDING:
            raise problem(field, f"a log-probability is at most 0, not {value} (its sign may be turned)")
    return tuple(float(row[field]) for field in fields)


# ---- readers that several formats share


def paired(prompt_field: str, prompt: Callable, fields=("chosen", "rejected"), about=about_chat):
    """The reader of two columns of responses, and of what `prompt` makes of the row."""

    def read(row: dict, tags: Tags) -> Columns:
        given = prompt(row)
        asked = None if given is None else text_or_turns(given, prompt_field, tags)
        values = tuple(text_or_turns(column(row, name), name, tags) for name in fields)
        return pair(row, asked, values, fields=fields, prompt_field=prompt_field, **about(row))

    return read


def question(name: str, fields=("chosen", "rejected")):
    """The reader of a text question beside the responses."""
    return paired(name, lambda row: text(row, name), fields)


def asked_first(row: dict, tags: Tags) -> Columns:
    """Text in the first of these columns that is there, as Axolotl's types chatml and llama3 read it."""
    name = next((name for name in ("prompt", "input", "question") if name in row), "instruction")
    fields = tuple(name if name in row else f"{name}_response" for name in ("chosen", "rejected"))
    return question(name, fields)(row, tags)


def messages(name: str):
    """The reader of turns beside chosen and rejected, which are a message, a list of them or text."""

    def read(row: dict, tags: Tags) -> Columns:
        prompt, *values = (text_or_turns(column(row, n), n, tags) for n in (name, "chosen", "rejected"))
        return pair(row, prompt, tuple(values), prompt_field=name, **about_chat(row))

    return read


def messages_kto(name: str):
    """The reader of turns that end with the judged response."""

    def read(row: dict, tags: Tags) -> Columns:
        prompt, answer = last_answer(turns(column(row, name), name, tags), name)
        label_field = "kto_tag" if "kto_tag" in row else "label"
        return judged(row, prompt, name, answer, label_field, prompt_field=name, **about_chat(row))

    return read


def last_answer(whole: list[dict], field: str) -> tuple[list[dict], list[dict]]:
    """(the turns before, the last assistant turn)."""
    if not whole or whole[-1]["role"] != "assistant":
        raise RowProblem("prompt_end", field, "its last turn must be the assistant's: it is the response")
    return whole[:-1], whole[-1:]
