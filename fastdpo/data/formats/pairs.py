"""Formats of one preferred and one other response, or of one judged response: their columns as Columns."""

from fastdpo.data.formats.columns import Columns, about, about_chat, column, judged, pair, text
from fastdpo.data.formats.turns import Tags, past_turns, turns
from fastdpo.data.row_fields import RowProblem, kind, score


def trl(row: dict, tags: Tags | None = None) -> Columns:
    values = column(row, "chosen"), column(row, "rejected")
    return pair(row, row.get("prompt"), values, tools=row.get("tools"))


def with_system(row: dict, tags: Tags | None = None) -> Columns:
    """TRL's columns and a system prompt."""
    values = column(row, "chosen"), column(row, "rejected")
    return pair(row, row.get("prompt"), values, **about_chat(row))


def unpaired(row: dict, tags: Tags | None = None) -> Columns:
    prompt, completion, _ = (column(row, name) for name in ("prompt", "completion", "label"))
    return judged(row, prompt, "completion", completion, "label", **about(row))


def question(prompt_field: str):
    """The reader of a text question beside chosen and rejected."""

    def read(row: dict, tags: Tags | None = None) -> Columns:
        values = column(row, "chosen"), column(row, "rejected")
        return pair(row, text(row, prompt_field), values, prompt_field=prompt_field, **about_chat(row))

    return read


def argilla(row: dict, tags: Tags | None = None) -> Columns:
    fields = ("chosen_response", "rejected_response")
    values = tuple(column(row, name) for name in fields)
    more = about_chat(row) | {"prompt_field": "instruction"}
    return pair(row, text(row, "instruction"), values, fields=fields, **more)


def aligner(row: dict, tags: Tags | None = None) -> Columns:
    """NeMo-Aligner's: the prompt is text that already has its turns' markup."""
    fields = ("chosen_response", "rejected_response")
    prompt, *values = (column(row, name) for name in ("prompt", *fields))
    rewards = ("chosen_reward", "rejected_reward")
    scores = tuple(score(row.get(name), name) for name in rewards)
    return pair(row, prompt, tuple(values), fields=fields)._replace(scores=scores)


def alpaca(row: dict, tags: Tags | None = None) -> Columns:
    values = column(row, "chosen"), column(row, "rejected")
    return pair(row, _alpaca_prompt(row), values, prompt_field="instruction", **about_chat(row))


def alpaca_kto(row: dict, tags: Tags | None = None) -> Columns:
    prompt, output = _alpaca_prompt(row), column(row, "output")
    return judged(row, prompt, "output", output, "kto_tag", prompt_field="instruction", **about_chat(row))


def _alpaca_prompt(row: dict) -> list[dict]:
    """The history, then instruction and input, a line each: one of the two may be missing."""
    asked = [text(row, name) for name in ("instruction", "input") if row.get(name)]
    if not asked:
        column(row, "instruction")
    history = past_turns(row.get("history", []), "history")
    return [*history, {"role": "user", "content": "\n".join(asked)}]


def messages(name: str):
    """The reader of turns beside chosen and rejected, which are a message, a list of them or text."""

    def read(row: dict, tags: Tags | None = None) -> Columns:
        prompt = _turns(column(row, name), name, tags)
        values = tuple(_turns(column(row, field), field, tags) for field in ("chosen", "rejected"))
        return pair(row, prompt, values, prompt_field=name, **about_chat(row))

    return read


def messages_kto(name: str):
    """The reader of turns that end with the judged response."""

    def read(row: dict, tags: Tags | None = None) -> Columns:
        prompt, answer = _last_answer(turns(column(row, name), name, tags), name)
        label_field = "kto_tag" if "kto_tag" in row else "label"
        return judged(row, prompt, name, answer, label_field, prompt_field=name, **about_chat(row))

    return read


def swift(row: dict, tags: Tags | None = None) -> Columns:
    """ms-swift's: the turns end with the preferred response, and the other one (or all turns that lead to it)
    has a column."""
    whole = turns(column(row, "messages"), "messages", tags)
    if "rejected_response" in row and "rejected_messages" in row:
        message = "both rejected_response and rejected_messages; leave one out"
        raise RowProblem("ambiguous_row", "rejected_messages", message)
    if "rejected_messages" in row:
        prompt, field = None, "rejected_messages"  # what the two have in common
        values = whole, turns(row[field], field, tags)
    else:
        prompt, chosen = _last_answer(whole, "messages")
        field = "rejected_response"
        values = chosen, _turns(column(row, field), field, tags)
    fields = ("messages", field)
    return pair(row, prompt, values, fields=fields, prompt_field="messages", **about_chat(row))


def openai(row: dict, tags: Tags | None = None) -> Columns:
    """OpenAI's preference fine-tuning: {input: {messages, tools}, preferred_output, non_preferred_output}."""
    asked = column(row, "input")
    if not isinstance(asked, dict) or asked.get("messages") is None:
        raise RowProblem("wrong_type", "input", f"an object with messages, not {kind(asked)}")
    fields = ("preferred_output", "non_preferred_output")
    prompt = turns(asked["messages"], "input.messages", tags)
    values = tuple(_turns(column(row, name), name, tags) for name in fields)
    more = about_chat(row | {"tools": asked.get("tools")})
    return pair(row, prompt, values, fields=fields, prompt_field="input.messages", **more)


def _turns(value, field: str, tags: Tags | None):
    return value if isinstance(value, str) else turns(value, field, tags)


def _last_answer(whole: list[dict], field: str) -> tuple[list[dict], list[dict]]:
    """(the turns before, the last assistant turn)."""
    if not whole or whole[-1]["role"] != "assistant":
        raise RowProblem("prompt_end", field, "its last turn must be the assistant's: it is the response")
    return whole[:-1], whole[-1:]
