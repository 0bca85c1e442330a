"""One row's chat template: conversations as text, and which of the text a message says."""

import re
from typing import Any

from fastdpo.data.pieces import THOUGHTS
from fastdpo.data.report import RowProblem
from fastdpo.data.rows import Messages, Row
from fastdpo.data.spans import shared_start


class Renderer:
    """The tokenizer's chat template with all that a row gives it besides its messages."""

    def __init__(self, row: Row, tokenizer, special: re.Pattern):
        self.row, self.tokenizer, self.special = row, tokenizer, special

    def __call__(self, messages: Messages, to_answer: bool = False, tools: list | None = None) -> str:
        """The text of `messages`; `to_answer`: with the generation prompt. Raises RowProblem."""
        try:
            return self.tokenizer.apply_chat_template(
                messages,
                tools=tools or self.row.tools,
                tokenize=False,
                add_generation_prompt=to_answer,
                **self.row.chat_template_kwargs,
            )
        except Exception as error:  # a template is a program, and fails like one
            message = f"the chat template refuses these turns: {error}"
            raise RowProblem("template_error", "messages", message) from None

    def said(self, messages: Messages, place: int, text: str, to_answer=False) -> tuple[int, int] | None:
        """(start, end) of what messages[place] says in `text`, the rendering of `messages`: it differs between
        them where the message says something else. None where nothing does."""
        mark = unused(text)
        other = self.differs([*messages[:place], _saying(mark, messages[place]), *messages[place + 1 :]], to_answer)
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


def unused(text: str) -> str:
    """A character for private use that the text does not hold."""
    return next(chr(code) for code in range(0xE000, 0xF8FF) if chr(code) not in text)


def _saying(mark: str, message: dict) -> dict:
    """The message with `mark` in place of all that it says, and the same keys."""
    other: dict[str, Any] = dict(message)
    for key in ("content", *THOUGHTS):
        if isinstance(message.get(key), str) and message[key].strip():
            other[key] = mark
    if calls := message.get("tool_calls"):
        # their names stay: some templates print them again before the result
        functions = ({**call.get("function", call), "arguments": {mark: mark}} for call in calls)
        other["tool_calls"] = [{**call, "function": function} for call, function in zip(calls, functions)]
    return other
