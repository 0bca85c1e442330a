"""What a row says, piece by piece, and how a text is searched for it."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from typing import NamedTuple

from fastdpo.data.images.given import IMAGE

THOUGHTS = ("reasoning_content", "reasoning", "thinking")  # keys of a message
_KINDS = {"system": "system", "developer": "system", "tool": "tool_result"}  # by role


class Piece(NamedTuple):
    """Something that a message says."""

    kind: str
    texts: tuple[str, ...]  # what it is made of
    fill: Callable[..., dict]  # (the message, a mark) -> the message that says the mark instead


def pieces(message: dict) -> Iterator[Piece]:
    """All that a message says, of the kinds system, message, reasoning, tool_call and tool_result."""
    content = message.get("content") or ""
    thought, closing, answer = content.rpartition("</think>")
    if closing and message["role"] == "assistant":
        yield Piece("reasoning", (thought.rpartition("<think>")[2],), _fill_thought)
        yield Piece("message", (answer,), _fill_answer)
    else:
        kind = _KINDS.get(message["role"], "message")
        yield Piece(kind, tuple(content.split(IMAGE)), partial(_fill_key, key="content"))
    for key in THOUGHTS:
        if isinstance(message.get(key), str):
            yield Piece("reasoning", (message[key],), partial(_fill_key, key=key))
    for i, call in enumerate(message.get("tool_calls") or ()):
        function = call.get("function", call)
        yield Piece("tool_call", (function["name"],), partial(_fill_name, number=i))
        if texts := tuple(_leaves(function.get("arguments"))):
            yield Piece("tool_call", texts, partial(fill_arguments, number=i))


def last_words(message: dict) -> str:
    """What an assistant turn of text ends with; "" where it has tool calls, which come after."""
    content = message.get("content") or ""
    return "" if message.get("tool_calls") else content.rpartition("</think>")[2].strip()


def _fill_key(message: dict, mark: str, key: str) -> dict:
    return {**message, key: IMAGE * (message[key] or "").count(IMAGE) + mark}


def _fill_thought(message: dict, mark: str) -> dict:
    thought, closing, answer = message["content"].rpartition("</think>")
    opening, tag, _ = thought.rpartition("<think>")
    return {**message, "content": opening + tag + mark + closing + answer}


def _fill_answer(message: dict, mark: str) -> dict:
    thought, closing, _ = message["content"].rpartition("</think>")
    return {**message, "content": thought + closing + mark}


def _fill_name(message: dict, mark: str, number: int) -> dict:
    other = _fill_call(message, number, name=mark)
    call = message["tool_calls"][number]
    name = call.get("function", call)["name"]
    # Kimi K2 prints the id, functions.NAME:0, alone
    if isinstance(call.get("id"), str) and name in call["id"]:
        other["tool_calls"][number]["id"] = call["id"].replace(name, mark)
    return other


def fill_arguments(message: dict, mark: str, number: int) -> dict:
    """The message with `mark` in each place of the arguments of one of its calls, in one place at least."""
    call = message["tool_calls"][number]
    arguments = _filled(call.get("function", call).get("arguments"), mark)
    return _fill_call(message, number, arguments=arguments)


def _fill_call(message: dict, number: int, **changed) -> dict:
    calls = list(message["tool_calls"])
    function = {**calls[number].get("function", calls[number]), **changed}
    calls[number] = {**calls[number], "function": function} if "function" in calls[number] else function
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
    if isinstance(value, dict):
        return {key: _filled(item, mark) for key, item in value.items()} or {mark: mark}
    if isinstance(value, list):
        return [_filled(item, mark) for item in value] or [mark]
    return mark


def tool_texts(tools: list | None) -> list[tuple[str, ...]]:
    """Per tool what it is known by: its name and description."""
    found = []
    for tool in tools or ():
        function = tool.get("function", tool) if isinstance(tool, dict) else {}
        said = [function.get(key) for key in ("name", "description")] if isinstance(function, dict) else []
        found.append(tuple(text for text in said if isinstance(text, str)))
    return found


def rename_tool(tool: dict, name: str) -> dict:
    function = tool.get("function")
    renamed = {"function": {**function, "name": name}} if isinstance(function, dict) else {"name": name}
    return {**tool, **renamed}


def holds(text: str, texts: tuple[str, ...]) -> bool:
    """Whether the text has all of `texts`, as they are or as JSON."""
    return all(_has(text, said.strip()) for said in texts)


def _has(text: str, said: str) -> bool:
    return said in text or json.dumps(said, ensure_ascii=False)[1:-1] in text
