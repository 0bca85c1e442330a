"""What a row says, piece by piece, and how a text is searched for it."""

import json
from collections.abc import Callable, Iterator
from typing import NamedTuple

THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # the keys by which templates know a turn's reasoning
_KINDS = {"system": "system", "developer": "system", "tool": "tool_result"}  # of a message's content, by its role


class Piece(NamedTuple):
    """Something that a message says: its kind, the texts it is made of, and the message saying `mark` instead."""

    kind: str
    texts: tuple[str, ...]
    other: Callable[[str], dict]


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

        def other(mark, i=i, call=call, function=function):
            changed = {**call, "function": {**function, "arguments": {mark: mark}}}
            calls = message["tool_calls"]
            return {**message, "tool_calls": [*calls[:i], changed, *calls[i + 1 :]]}

        yield Piece("tool_call", (function["name"], *_leaves(function["arguments"])), other)


def _leaves(value) -> Iterator[str]:
    """The texts and numbers in nested arguments, and their names."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield str(key)
            yield from _leaves(item)
    elif isinstance(value, list):
        for item in value:
            yield from _leaves(item)
    elif isinstance(value, str):
        yield value
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield json.dumps(value)


def tool_names(tools: list | None) -> list[tuple[str, tuple[str, ...]]]:
    """Per tool its kind and its name, as a piece has them."""
    functions = (tool.get("function", tool) if isinstance(tool, dict) else {} for tool in tools or ())
    names = (function.get("name") if isinstance(function, dict) else None for function in functions)
    return [("tools", (name,) if isinstance(name, str) else ()) for name in names]


def holds(text: str, texts: tuple[str, ...]) -> bool:
    """Whether the text has all of `texts`, as they are or as JSON."""
    return all(_has(text, said.strip()) for said in texts)


def _has(text: str, said: str) -> bool:
    return said in text or json.dumps(said, ensure_ascii=False)[1:-1] in text
