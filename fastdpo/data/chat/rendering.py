"""One row's chat template: conversations as text, and which of the text a message says."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from itertools import chain, islice
from typing import Any

from fastdpo.data.chat.arguments import Chat
from fastdpo.data.chat.pieces import THOUGHTS, fill_arguments
from fastdpo.data.images.given import IMAGE
from fastdpo.data.images.reader import Pictures
from fastdpo.data.report import RowProblem
from fastdpo.data.rows import Messages, Row
from fastdpo.data.spans import shared_start


class Renderer:
    """The tokenizer's chat template with all that a row gives it besides its messages."""

    def __init__(
        self, row: Row, tokenizer, special: re.Pattern, chat: Chat, pictures: Pictures | None = None
    ):
        self.row, self.tokenizer, self.special, self.chat = row, tokenizer, special, chat
        self.pictures = pictures

    def __call__(self, messages: Messages, to_answer: bool = False, tools: list | None = None) -> str:
        """The text of `messages`; `to_answer`: with the generation prompt. Raises RowProblem."""
        given = self.pictures.for_template(messages) if self.pictures else messages
        try:
            settings = {"tools": tools or self.row.tools, "add_generation_prompt": to_answer}
            text = self.chat.render(self.tokenizer, given, self.row.chat_template_kwargs, **settings)
        except MemoryError:
            raise
        except Exception as error:  # a template is a program, and fails like one
            message = f"the chat template refuses these turns: {error}"
            raise RowProblem("template_error", "messages", message) from None
        return self.pictures.expanded(text, messages) if self.pictures else text

    def said(self, messages: Messages, place: int, text: str, to_answer=False) -> tuple[int, int] | None:
        """(start, end) of what messages[place] says in `text`, the rendering of `messages`: between them it
        differs where the message says something else. None where nothing does."""
        (mark,) = unused(text)
        changed = [*messages[:place], _saying(mark, messages[place]), *messages[place + 1 :]]
        other = self.differs(changed, to_answer)
        if other is None or mark not in other:
            return None
        same = shared_start(text[::-1], other[::-1])
        return min(shared_start(text, other), len(text) - same), len(text) - same

    def differs(self, messages: Messages, to_answer: bool = False, tools: list | None = None) -> str | None:
        """The text of changed messages, to compare; None where the template refuses them."""
        try:
            return self(messages, to_answer, tools)
        except RowProblem:
            return None


def unused(text: str, count: int = 1) -> list[str]:
    """Characters for private use that the text does not hold."""
    private = map(chr, chain(range(0xE000, 0xF900), range(0xF0000, 0xFFFFE)))
    return list(islice((mark for mark in private if mark not in text), count))


def _saying(mark: str, message: dict) -> dict:
    """The message with `mark` in place of all that it says, and the same keys."""
    other: dict[str, Any] = dict(message)
    for key in ("content", *THOUGHTS):
        if isinstance(message.get(key), str) and message[key].strip():
            other[key] = IMAGE * message[key].count(IMAGE) + mark
    for number in range(len(message.get("tool_calls") or ())):
        other = fill_arguments(other, mark, number)  # some templates print the name before the result too
    return other


def call_forms(row: Row) -> Iterator[Row]:
    """The row, and where it has tool calls the same with the forms in which templates may want them."""
    turns = [*row.prompt, *(turn for response in row.responses for turn in response)]
    yield row
    if any(turn.get("tool_calls") for turn in turns):
        for no_content, as_text in ((True, False), (False, True), (True, True)):
            prompt, *responses = (
                [_with_calls(turn, no_content, as_text) for turn in messages]
                for messages in (row.prompt, *row.responses)
            )
            yield replace(row, prompt=prompt, responses=tuple(responses))


def _with_calls(message: dict, no_content: bool, as_text: bool) -> dict:
    if not message.get("tool_calls"):
        return message
    calls = message["tool_calls"]
    if as_text:
        functions = [call.get("function", call) for call in calls]
        texts = [json.dumps(function.get("arguments"), ensure_ascii=False) for function in functions]
        calls = [
            {**call, "function": {**function, "arguments": text}}
            for call, function, text in zip(calls, functions, texts)
        ]
    return {**message, "content": message["content"] or (None if no_content else ""), "tool_calls": calls}
