"""Rows of which only the prompt is needed, as rounds take them: without responses, or with one answer that
nothing is compared with."""

from fastdpo.data.formats import columns
from fastdpo.data.formats.columns import QUESTIONS, Columns, about, about_chat, column
from fastdpo.data.formats.turns import Tags, past_turns, starts_with, text_or_turns, turns
from fastdpo.data.report import RowProblem

ALONE, ANSWERED = "prompt_only", "prompt_completion"
_COMPARED = {  # columns of rows that have more than one answer
    *("chosen rejected responses answers completions chosen_response rejected_response".split()),
    *("rejected_messages preferred_output non_preferred_output".split()),
}
_ANSWERS = {"prompt": "completion", "instruction": "output"}  # by the prompt's column
_WHOLE = ("messages", "conversations")


def format_of(row: dict, named: str | None) -> str | None:
    """ALONE or ANSWERED, where the row (without nulls) is of that kind; `named`: the format that the user
    says, which an answered row is read as. Raises RowProblem where it has several prompts."""
    if named in (ALONE, ANSWERED) or not row.keys().isdisjoint(_COMPARED):
        return named
    found = _asking(row)
    if not found:
        return named
    if len(found) > 1:
        message = (
            f"prompts in several columns ({', '.join(found)}); say in data_format which to read, as in "
            f"{{{found[0]}: {found[0]}}}"
        )
        raise RowProblem("ambiguous_row", "row", message)
    if _answer(row, found[0]) is None:
        return ALONE
    judged = "label" in row or "kto_tag" in row
    return named if named or judged else ANSWERED


def _asking(row: dict) -> list[str]:
    """The columns that hold a prompt."""
    found = [name for name in QUESTIONS if name in row]
    if "instruction" in found:
        return [name for name in found if name != "input"]
    return [] if row.get("history") else found


def _answer(row: dict, asking: str) -> str | None:
    """The column with the answer."""
    if asking not in _WHOLE:
        name = _ANSWERS.get(asking)
        return name if name in row else None
    whole = row[asking]
    last = whole[-1:] if isinstance(whole, list) else []
    return asking if last and starts_with(last) == "assistant" else None


def alpaca_prompt(row: dict) -> list[dict]:
    """The history, then instruction and input, a line each: one of the two may be missing."""
    asked = [columns.text(row, name) for name in ("instruction", "input") if row.get(name)]
    if not asked:
        column(row, "instruction")
    history = past_turns(row.get("history", []), "history")
    return [*history, {"role": "user", "content": "\n".join(asked)}]


def _prompt(row: dict, name: str, tags: Tags) -> tuple[str | list[dict], dict]:
    """(the prompt, what Columns has of the row besides)."""
    more = {"prompt_field": name} | (about(row) if name == "prompt" else about_chat(row))
    value = column(row, name)
    if name == "instruction":
        return alpaca_prompt(row), more
    if name == "input" and isinstance(value, dict) and value.get("messages") is not None:
        more |= {"prompt_field": "input.messages", "tools": value.get("tools")}
        return turns(value["messages"], "input.messages", tags), more
    if name in ("input", "question"):
        return columns.text(row, name), more
    return text_or_turns(value, name, tags), more


def alone(row: dict, tags: Tags) -> Columns:
    """The prompt; the one score, of none, is that of the end token in place of a response."""
    name = next(iter(_asking(row)), "prompt")
    prompt, more = _prompt(row, name, tags)
    return Columns(prompt, (), (), (None,), (), (), (None,), **more)


def answered(row: dict, tags: Tags) -> Columns:
    """The prompt, and an answer."""
    name = next(iter(_asking(row)), "prompt")
    prompt, more = _prompt(row, name, tags)
    answer: str | list[dict]
    if name in _WHOLE:
        field = name
        prompt, answer = columns.last_answer(turns(column(row, name), name, tags), name)
    else:
        field = _ANSWERS.get(name, "completion")
        answer = text_or_turns(column(row, field), field, tags)
    return Columns(prompt, (field,), (answer,), (None,), (), (({}, "", ""),), (None,), **more)
