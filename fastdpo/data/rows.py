"""From a preference row of any format to the one shape all of them become: `Row`.

formats/known.py has the formats and what their rows look like; one source may mix them. Where no column holds
the prompt, it is what the responses have in common; text beside whole conversations ({prompt: str, chosen:
[...]}, ultrafeedback_binarized) must be one of their turns. How a row says which tokens are relevant is in
spans.py.
"""

import json
import re
from dataclasses import dataclass, replace
from typing import Any

from fastdpo.data.formats.columns import Columns
from fastdpo.data.formats.layouts import Layout
from fastdpo.data.images.given import IMAGE, of_column, take_images
from fastdpo.data.media import placeholders, refuse_placeholders
from fastdpo.data.report import RowProblem, expect, kind
from fastdpo.data.spans import Relevance, all_or_none, read_relevance, shared_start

Messages = list[dict]
_WRITTEN_MESSAGES = re.compile(
    r"""\s*\[\s*\{.{0,99}?(?P<q>['"])(role(?P=q)\s*:|from(?P=q)\s*:\s*(?P=q)(human|gpt|system)(?P=q))"""
)


@dataclass(frozen=True)
class Row:
    """One row in the only shape the rest knows: all of it text, or all of it messages."""

    number: int
    format: str  # the name of what the row was read as, see formats/known.py
    prompt: Any  # str or Messages; a union would not tell that all of a row is of one kind
    responses: tuple[Any, ...]  # none of a prompt alone
    scores: tuple[float | None, ...]
    ref_logps: tuple[float | None, ...]  # of whole responses, from ref_chosen_logps and ref_rejected_logps
    pairs: tuple[tuple[int, int], ...]  # (winner, loser) as indices of responses
    tools: list | None
    chat_template_kwargs: dict
    ties: int  # pairs of a ranked row that equal scores left out
    label: bool | None  # of an unpaired row
    relevance: tuple[Relevance | None, ...]
    margin: Any = None  # by which a reward model has to tell chosen from rejected
    images: tuple[Any, ...] = ()  # of the prompt, as given; given.IMAGE stands for each in its text


def parse_row(
    row: dict | RowProblem,
    number: int,
    layout: Layout | None = None,
    with_images: bool = False,
    prompts_only: bool = False,
) -> Row:
    """One row of any known format as a Row; `layout` says how to read it, where its columns do not. A row
    with images is refused, unless they are wanted, and so is one without responses, unless prompts alone are
    (`prompts_only`): it then has none. Raises RowProblem."""
    if isinstance(row, RowProblem):  # a line that could not be read as JSON
        raise row
    if not isinstance(row, dict):
        raise RowProblem("wrong_type", "row", f"a JSON object is needed, got {kind(row)}")
    layout = layout or Layout()
    standing_for_media = placeholders(row, layout, with_images)
    images = of_column(row, layout.columns) if with_images else None
    if with_images:
        layout = replace(layout, tags=replace(layout.tags, images=True))
    try:
        return _parse(layout.ours(row), number, layout, standing_for_media, images, prompts_only)
    except RowProblem as problem:
        raise layout.problem(problem, row) from None


def _parse(
    given: dict,
    number: int,
    layout: Layout,
    standing_for_media: list[str],
    column: tuple[list, str] | None,
    prompts_only: bool,
) -> Row:
    row = {name: value for name, value in given.items() if value is not None}
    if "system" in given:
        row.setdefault("system", "")  # the column is there: the row is a conversation, without a system turn
    name, columns = layout.read(row, prompts_only)
    prompt, responses = _conversation(columns)
    images: tuple = ()
    if column is not None:
        prompt, images = take_images(prompt, responses, columns.fields, *column)
    _check_prompt(prompt, columns.prompt_field)
    for field, response in zip(columns.fields, responses):
        _check_response(response, field)
    if columns.pairs and all(_same(response, responses[0]) for response in responses[1:]):
        raise RowProblem("identical", " and ".join(columns.fields), "they are the same: nothing to prefer")
    kwargs = expect(row.get("chat_template_kwargs", {}), dict, "chat_template_kwargs", "an object")
    if columns.system:
        prompt = _with_system(prompt, columns.system)
    refuse_placeholders(prompt, columns.prompt_field, standing_for_media)
    same = ("scores", "ref_logps", "pairs", "ties", "label")
    return Row(
        number=number,
        format=name,
        prompt=prompt,
        responses=responses,
        tools=_tools(columns.tools),
        chat_template_kwargs=kwargs,
        relevance=_relevance(columns, responses),
        images=images,
        margin=row.get("margin"),
        **{field: getattr(columns, field) for field in same},
    )


def _relevance(columns: Columns, responses: tuple) -> tuple[Relevance | None, ...]:
    found = []
    for (source, prefix, where), value, response in zip(columns.marks, columns.values, responses):
        before: int | None = len(value) - len(response) if isinstance(value, list) else 0
        if isinstance(response, str) and columns.prompt is None:
            before = None
        found.append(read_relevance(source, prefix, where, response, before))
    return all_or_none(found, [f"{where}{prefix}spans" for _, prefix, where in columns.marks])


def _conversation(columns: Columns):
    """(prompt, responses), all text or all messages."""
    prompt, values, fields = columns.prompt, columns.values, columns.fields
    for field, value in zip((columns.prompt_field, *fields), (prompt, *values)):
        if isinstance(value, str) and _WRITTEN_MESSAGES.match(value):
            message = "messages written as text (a CSV cannot hold them): use JSON lines or parquet"
            raise RowProblem("messages_as_text", field, message)
    all_text = all(isinstance(value, str) for value in values)
    if all_text and not columns.chat and isinstance(prompt, str | None):
        return _split_text(*values) if prompt is None else (prompt, values)
    if all_text and prompt is None:
        message = "missing or null: beside a system column text needs its prompt in a column of its own"
        raise RowProblem("missing_column", columns.prompt_field, message)
    if isinstance(prompt, list) or (isinstance(prompt, str) and columns.chat):
        # a text answer to a conversation is one assistant turn
        turn = lambda value: [{"role": "assistant", "content": value}]
        values = tuple(turn(v) if isinstance(v, str) else v for v in values)
    conversations = tuple(_messages(v, f) for v, f in zip(values, fields))
    if isinstance(prompt, list):
        return prompt, conversations
    if isinstance(prompt, str) and all(c and c[0]["role"] == "assistant" for c in conversations):
        return [{"role": "user", "content": prompt}], conversations
    if len(conversations) == 1:
        message = "it starts with an assistant turn; the turns before it belong into the prompt"
        raise RowProblem("response_start", fields[0], message)
    spelt = [list(map(_spelt, conversation)) for conversation in conversations]
    shared = min(_common(spelt[0], other) for other in spelt[1:])
    turns = conversations[0][:shared]
    if prompt is not None and not any(_same_text(prompt, turn) for turn in turns):
        message = "it is none of the turns that the responses have in common; one of them is wrong"
        raise RowProblem("prompt_mismatch", columns.prompt_field, message)
    return turns, tuple(conversation[shared:] for conversation in conversations)


def _same(a, b) -> bool:
    return a == b and _spelt(a) == _spelt(b)


def _spelt(said) -> str:
    """What is equal where two say the same, in keys of any order: 1, 1.0 and true in arguments are not."""
    return json.dumps(said, sort_keys=True, default=repr)


def _same_text(prompt: str, turn: dict) -> bool:
    return prompt.strip() == (turn.get("content") or "").replace(IMAGE, "").strip()


def _split_text(chosen: str, rejected: str):
    """The implicit prompt of two strings: the whole words they begin with, without the space that
    follows (a word's space belongs to its token; a line's end stays). TRL splits inside words too
    ("ca|t", "ca|r"), where tokens merge across the boundary; splitting before the word changes no
    margin, as what both responses begin with cancels."""
    words = re.match(r"(?s).*\s", chosen[: _common(chosen, rejected)])
    prompt = words[0].removesuffix(" ") if words else ""
    return prompt, (chosen[len(prompt) :], rejected[len(prompt) :])


def _common(a, b) -> int:
    """How many leading items two sequences share; one less than all of the shorter one, so that both keep a
    response."""
    return max(min(shared_start(a, b), len(a) - 1, len(b) - 1), 0)


def _messages(value, field: str) -> Messages:
    problem = "a list of messages (a row is all text or all messages)"
    return expect(value, list, field, problem)


def _check_prompt(prompt: str | Messages, field: str) -> None:
    if isinstance(prompt, str):
        if not prompt.strip():
            raise RowProblem("empty_prompt", field, "there is none (or only white space)")
        return
    if not any(turn["content"].strip() for turn in prompt):
        raise RowProblem("empty_prompt", field, "no turn comes before the responses")
    if prompt[-1]["role"] == "assistant":
        message = "it ends with an assistant turn; the responses must be what comes next"
        raise RowProblem("prompt_end", field, message)


def _with_system(prompt: Messages, system: str) -> Messages:
    """The prompt after the system column's turn."""
    if prompt[0]["role"] not in ("system", "developer"):
        return [{"role": "system", "content": system}, *prompt]
    if not _same_text(system, prompt[0]):
        message = "it is another system prompt than the conversation's own; leave one out"
        raise RowProblem("ambiguous_row", "system", message)
    return prompt


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


def _tools(tools) -> list | None:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise RowProblem("wrong_type", "tools", f"the string is not JSON: {error}") from None
    expect(tools, list | None, "tools", "a list")
    return tools or None  # some templates print tool boilerplate for []
