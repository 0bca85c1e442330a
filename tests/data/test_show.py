"""`fastdpo data`: which rows are shown, and what stands out."""

import io
import re

import pytest
from rich.console import Console

from fastdpo.data.load import load_groups
from fastdpo.data.show import show
from fastdpo.errors import DataError
from tests.data.shared_data import WIDE, assistant, chat_row, small_tokenizer, text_row, user, write_lines

CALL = {"type": "function", "function": {"name": "gold", "arguments": {"x": 1}}}


def test_one_row_of_each_kind_is_shown(tmp_path):
    rows = [
        chat_row(),
        chat_row("more?"),
        text_row(),
        {**chat_row(), "prompt": [{"role": "system", "content": "old"}, user("good?")]},
        {**chat_row(), "chosen": [assistant("old"), user("more"), assistant("gold")]},
        {**chat_row(), "prompt": [user("good?"), {**assistant(""), "tool_calls": [CALL]}, user("more")]},
    ]
    console = Console(file=io.StringIO(), width=200)
    how = dict(strict=False, console=Console(quiet=True))
    groups, report = load_groups(write_lines(tmp_path / "d.jsonl", rows), small_tokenizer(), WIDE, **how)
    show(groups, report, small_tokenizer(), console)
    assert re.findall("row .*decoded.*", console.file.getvalue()) == [
        "row 0, decoded: trl, messages",
        "row 2, decoded: trl, text",
        "row 3, decoded: trl, messages, system",
        "row 4, decoded: trl, messages, several answers",
        "row 5, decoded: trl, messages, tools",
    ]


def test_what_a_template_leaves_out_stands_out_and_stops_a_strict_run(tmp_path):
    turns = [user("good?"), {**assistant("old"), "tool_calls": [CALL]}, user("more")]
    spec = write_lines(tmp_path / "d.jsonl", [{**chat_row(), "prompt": turns}])
    console = Console(file=io.StringIO(), width=200, color_system="standard", force_terminal=True)
    how = dict(console=Console(quiet=True))
    _, report = load_groups(spec, small_tokenizer(), WIDE, strict=False, **how)
    report.print(console)
    (line,) = (line for line in console.file.getvalue().split("\n") if "tool_call_not_printed" in line)
    assert "\x1b[33m" in line and "messages with tool calls that the chat template does not print" in line
    with pytest.raises(DataError, match="1 messages with tool calls that the chat template does not print"):
        load_groups(spec, small_tokenizer(), WIDE, strict=True, **how)
