"""What a row says, piece by piece, and how a text is searched for it."""

import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

THOUGHTS = (
    "reasoning_content",
    "reasoning",
    "thinking",
)  # keys of a message
_KINDS = {
    "system": "system",
    "developer": "system",
    "tool": "tool_result",
}  # by role


class Piece(NamedTuple):
    """Something that a message says."""

    kind: str
    texts: tuple[str, ...]  # what it is made of
    other: Callable[[str], dict]  # mark -> the message that says `mark` instead


def pieces(message: dict) -> Iterator[Piece]:
    """All that a message says, of the kinds system, message, reasoning, tool_call and tool_result."""
    content = message.get("content") or ""
    thought, closing, answer = content.rpartition("</think>")
    if closing and message["role"] == "assistant":
        opening, _, thought = thought.rpartition("<think>")
        said = lambda mark: {**message, "content": f"{opening}<think>{mark}</think>{answer}"}
        yield Piece("reasoning", (thought,), said)
        said = lambda mark: {**message, "content": f"{opening}<think>{thought}</think>{mark}"}
        yield Piece("message", (answer,), said)
    else:
        kind = _KINDS.get(message["role"], "message")
        yield Piece(kind, (content,), lambda mark: {**message, "content": mark})
    for key in THOUGHTS:
        if isinstance(message.get(key), str):
            yield Piece("reasoning", (message[key],), lambda mark, key=key: {**message, key: mark})
    for i, call in enumerate(message.get("tool_calls") or ()):
        function = call.get("function", call)
        texts = (function["name"], *_leaves(function.get("arguments")))
        yield Piece("tool_call", texts, lambda mark, i=i: saying_in_call(mark, message, i))


def saying_in_call(mark: str, message: dict, number: int) -> dict:
    """The message with `mark` in place of all arguments of one of its calls. The function's name stays: some
    templates print it again before the result."""
    calls = list(message["tool_calls"])
    function = calls[number].get("function", calls[number])
    other = {**function, "arguments": _filled(function.get("arguments"), mark)}
    calls[number] = {**calls[number], "function": other} if "function" in calls[number] else other
    return {**message, "tool_calls": calls}


def _leaves(value) -> Iterator[str]:
    """The texts and numbers in nested arguments."""
    if isinstance(value, dict | list):
        for item in value.values() if isinstance(value, dict) else value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def _filled(value, mark: str):
    """The same structure with `mark` in each place, and in one at least."""
    if isinstance(value, dict):
        return {key: _filled(item, mark) for key, item in value.items()} or {mark: mark}
    if isinstance(value, list):
        return [_filled(item, mark) for item in value] or [mark]
    return mark


def tool_texts(tools: list | None) -> list[tuple[str, tuple[str, ...]]]:
    """Per tool its kind and what it is known by, its name and description, as a piece has them."""
    found = []
    for tool in tools or ():
        function = tool.get("function", tool) if isinstance(tool, dict) else {}
        said = [function.get(key) for key in ("name", "description")] if isinstance(function, dict) else []
        found.append(("tools", tuple(text for text in said if isinstance(text, str))))
    return found


def holds(text: str, texts: tuple[str, ...]) -> bool:
    """Whether the text has all of `texts`, as they are or as JSON."""
    return all(_has(text, said.strip()) for said in texts)


def _has(text: str, said: str) -> bool:
    return said in text or json.dumps(said, ensure_ascii=False)[1:-1] in text
