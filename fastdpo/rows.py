"""What a preference row may look like, and the one shape all of them become: `Row`.

Known formats, told apart by their columns:
    {prompt, chosen, rejected}      strings, or message lists ([{role, content}, ...])
    {chosen, rejected}              the prompt is what the two have in common
    {prompt: str, chosen: [...]}    whole conversations beside a prompt (ultrafeedback_binarized)
    {prompt, responses: [{text, score}, ...]}   ranked: every pair whose scores differ
"""

import json
import math
import re
from dataclasses import dataclass

from fastdpo.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")

Messages = list[dict]

_ROUNDING = 0.01  # how far above 0 a sum of log-probs may come out


class RowProblem(DataError):
    """One row cannot be used: `reason` is what reports count by, `field` where in the row."""

    def __init__(self, reason: str, field: str, message: str):
        super().__init__(f"{field}: {message}")
        self.reason, self.field, self.message = reason, field, message


@dataclass(frozen=True)
class Row:
    """One row in the only shape the rest knows: all of it text, or all of it messages."""

    number: int
    prompt: str | Messages
    responses: tuple[str | Messages, ...]
    scores: tuple[float | None, ...]
    ref_logps: tuple[float | None, ...]  # of whole responses, from ref_chosen_logps and ref_rejected_logps
    pairs: tuple[tuple[int, int], ...]  # (winner, loser) as indices of responses
    tools: list | None
    chat_template_kwargs: dict
    ties: int  # pairs of a ranked row that equal scores left out


def parse_row(row: dict, number: int) -> Row:
    """One row of any known format as a Row. Raises RowProblem."""
    if isinstance(row, RowProblem):  # a line that could not be read as JSON
        raise row
    if not isinstance(row, dict):
        raise RowProblem("wrong_type", "row", f"a JSON object is needed, got {_kind(row)}")
    row = {name: value for name, value in row.items() if value is not None}
    if "responses" in row and not ("chosen" in row and "rejected" in row):
        fields, values, scores, pairs, ties = _ranked(row)
        ref_logps = (None,) * len(scores)
    else:
        fields, pairs, ties = ("chosen", "rejected"), ((0, 1),), 0
        values = tuple(_column(row, name) for name in fields)
        scores = tuple(_score(row.get(f"score_{name}"), f"score_{name}") for name in fields)
        ref_logps = _ref_logps(row)
    prompt, responses = _conversation(row.get("prompt"), values, fields)
    _check_prompt(prompt)
    for field, response in zip(fields, responses):
        _check_response(response, field)
    if all(response == responses[0] for response in responses[1:]):
        raise RowProblem("identical", " and ".join(fields), "they are the same: nothing to prefer")
    kwargs = row.get("chat_template_kwargs", {})
    if not isinstance(kwargs, dict):
        raise RowProblem("wrong_type", "chat_template_kwargs", f"an object, not {_kind(kwargs)}")
    kwargs = _without_none(kwargs)
    return Row(number, prompt, responses, scores, ref_logps, pairs, _tools(row), kwargs, ties)


def _column(row: dict, name: str):
    if name not in row:
        wanted = "{prompt, chosen, rejected}, {chosen, rejected} or {prompt, responses}"
        has = ", ".join(map(str, row)) or "none"
        message = f"the column is missing or null (this row has: {has}; a row is {wanted})"
        raise RowProblem("missing_column", name, message)
    return row[name]


def _ranked(row: dict):
    """(fields, texts, scores, pairs, ties): a pair wherever one score is higher than another."""
    responses = row["responses"]
    _column(row, "prompt")
    if not isinstance(responses, list):
        message = f"a list of {{text, score}}, not {_kind(responses)}"
        raise RowProblem("wrong_type", "responses", message)
    if len(responses) < 2:
        raise RowProblem("too_few_responses", "responses", f"two at least, got {len(responses)}")
    fields, values, scores = [], [], []
    for i, response in enumerate(responses):
        if not isinstance(response, dict):
            message = f"an object with text and score, not {_kind(response)}"
            raise RowProblem("wrong_type", f"responses[{i}]", message)
        for name in ("text", "score"):
            if response.get(name) is None:
                raise RowProblem("missing_column", f"responses[{i}].{name}", "missing or null")
        fields.append(f"responses[{i}].text")
        values.append(response["text"])
        scores.append(_score(response["score"], f"responses[{i}].score"))
    several = range(len(scores))
    pairs = tuple((i, j) for i in several for j in several if scores[i] > scores[j])
    if not pairs:
        message = "all scores are equal, so no response is preferred"
        raise RowProblem("no_pair", "responses", message)
    ties = len(scores) * (len(scores) - 1) // 2 - len(pairs)
    return tuple(fields), tuple(values), tuple(scores), pairs, ties


def _score(value, field: str) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RowProblem("wrong_type", field, f"a number, not {_kind(value)}")
    if not math.isfinite(value):
        raise RowProblem("nan_score", field, f"a finite number, not {value}")
    return float(value)


def _ref_logps(row: dict) -> tuple[float | None, float | None]:
    """What a reference model gave (chosen, rejected): both sums, or None twice where the row has neither."""
    fields = []
    for name in ("ref_chosen_logps", "ref_rejected_logps"):
        old = name.replace("ref_", "reference_", 1)  # TRL's name for it until 0.11
        fields.append(old if name not in row and old in row else name)
    if not any(field in row for field in fields):
        return None, None
    problem = lambda field, message: RowProblem("malformed_ref_logps", field, message)
    for field in fields:
        value = row.get(field)
        if field not in row:
            raise problem(field, "missing or null, where the row has the other response's; give both or none")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise problem(field, f"a number, the sum over the response's tokens, not {_kind(value)}")
        if not math.isfinite(value):
            raise problem(field, f"a finite number, not {value}")
        if value > _ROUNDING:
            raise problem(field, f"a log-probability is at most 0, not {value} (its sign may be turned)")
    return tuple(float(row[field]) for field in fields)


def _conversation(prompt, values: tuple, fields: tuple):
    """(prompt, responses), all text or all messages."""
    for field, value in zip(("prompt", *fields), (prompt, *values)):
        if isinstance(value, str) and re.match(r"""\s*\[\s*\{.{0,99}?['"]role['"]\s*:""", value):
            message = "messages written as text (a CSV cannot hold them): use JSON lines or parquet"
            raise RowProblem("messages_as_text", field, message)
    if all(isinstance(value, str) for value in values):
        if prompt is None:
            return _split_text(*values)
        if isinstance(prompt, str):
            return prompt, values
        prompt = _messages(prompt, "prompt")
        return prompt, tuple([{"role": "assistant", "content": value}] for value in values)
    if isinstance(prompt, list):  # a text answer to a conversation is one assistant turn
        turn = lambda value: [{"role": "assistant", "content": value}]
        values = tuple(turn(v) if isinstance(v, str) else v for v in values)
        prompt = _messages(prompt, "prompt")
    elif prompt is not None and not isinstance(prompt, str):
        message = f"text or a list of messages, not {_kind(prompt)}"
        raise RowProblem("wrong_type", "prompt", message)
    conversations = tuple(_messages(v, f) for v, f in zip(values, fields))
    if isinstance(prompt, list):
        return prompt, conversations
    if isinstance(prompt, str) and all(c and c[0]["role"] == "assistant" for c in conversations):
        return [{"role": "user", "content": prompt}], conversations
    turns, conversations = _split_turns(conversations)
    if prompt is not None and not any(_same_text(prompt, turn) for turn in turns):
        message = "it is none of the turns that the responses have in common; one of them is wrong"
        raise RowProblem("prompt_mismatch", "prompt", message)
    return turns, conversations


def _same_text(prompt: str, turn: dict) -> bool:
    return prompt.strip() == (turn.get("content") or "").strip()


def _split_text(chosen: str, rejected: str):
    """The implicit prompt of two strings: the whole words they begin with, without the space that
    follows (a word's space belongs to its token; a line's end stays). TRL splits inside words too
    ("ca|t", "ca|r"), where tokens merge across the boundary; splitting before the word changes no
    margin, as what both responses begin with cancels."""
    words = re.match(r"(?s).*\s", chosen[: _common(chosen, rejected)])
    prompt = words[0].removesuffix(" ") if words else ""
    return prompt, (chosen[len(prompt) :], rejected[len(prompt) :])


def _split_turns(conversations: tuple[Messages, ...]):
    shared = min(_common(conversations[0], other) for other in conversations[1:])
    return conversations[0][:shared], tuple(turns[shared:] for turns in conversations)


def _common(a, b) -> int:
    """How many leading items two sequences share; one less than all of the shorter one, so that
    both keep a response."""
    shortest = min(len(a), len(b))
    differing = (i for i in range(shortest) if a[i] != b[i])
    return next(differing, max(shortest - 1, 0))


def _messages(value, field: str) -> Messages:
    """Checked messages, without the nulls with which Arrow fills absent keys."""
    if not isinstance(value, list):
        message = f"a list of messages, not {_kind(value)} (a row is all text or all messages)"
        raise RowProblem("wrong_type", field, message)
    messages = []
    for i, message in enumerate(value):
        where = f"{field}[{i}]"
        if not isinstance(message, dict) or "role" not in message:
            raise RowProblem("wrong_type", where, "a message has a role and a content")
        message = _without_none(message)
        if message.get("role") not in ROLES:
            problem = f"unknown role {message.get('role')!r}; known are {', '.join(ROLES)}"
            raise RowProblem("unknown_role", f"{where}.role", problem)
        content = message.get("content")
        if content is None and message.get("tool_calls"):
            message = {**message, "content": ""}  # many templates would print "None"
        elif not isinstance(content, str):
            raise RowProblem("wrong_type", f"{where}.content", f"text, not {_kind(content)}")
        messages.append(message)
    return messages


def _without_none(value):
    if isinstance(value, dict):
        return {name: _without_none(v) for name, v in value.items() if v is not None}
    if isinstance(value, list):
        return [_without_none(v) for v in value]
    return value


def _check_prompt(prompt: str | Messages) -> None:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise RowProblem("empty_prompt", "prompt", "there is none (or only white space)")
        return
    if not any(turn["content"].strip() for turn in prompt):
        raise RowProblem("empty_prompt", "prompt", "no turn comes before the responses")
    if prompt[-1]["role"] == "assistant":
        message = "it ends with an assistant turn; the responses must be what comes next"
        raise RowProblem("prompt_end", "prompt", message)


def _check_response(response: str | Messages, field: str) -> None:
    if isinstance(response, str):
        empty = not response.strip()
    elif response and response[0]["role"] != "assistant":
        message = (
            f"a response starts with an assistant turn, not {response[0]['role']!r} "
            "(where it repeats the prompt, leave out the prompt column)"
        )
        raise RowProblem("response_start", field, message)
    else:
        empty = not response or not (response[0]["content"].strip() or "tool_calls" in response[0])
    if empty:
        raise RowProblem("empty_response", field, "there is no text")


def _tools(row: dict) -> list | None:
    tools = row.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise RowProblem("wrong_type", "tools", f"the string is not JSON: {error}") from None
    if tools is not None and not isinstance(tools, list):
        raise RowProblem("wrong_type", "tools", f"a list, not {_kind(tools)}")
    return _without_none(tools) or None  # some templates print tool boilerplate for []


def _kind(value) -> str:
    return "nothing" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
