"""What a chat template is given besides the messages: one time for all rows, and chat_template_kwargs."""

import inspect
from datetime import datetime, timedelta

import pytest
from rich.console import Console
from transformers import PreTrainedTokenizerBase
from transformers.utils import chat_template_utils

from fastdpo.cli import main
from fastdpo.config.keys import from_values
from fastdpo.data.chat import arguments as chat_module
from fastdpo.data.chat.arguments import Chat
from fastdpo.data.groups import to_group
from fastdpo.data.load import load_groups
from fastdpo.data.report import RowProblem
from fastdpo.errors import ConfigError
from tests.data.shared_data import (
    CHATML,
    WIDE,
    chat_row,
    decode,
    scored_text,
    small_tokenizer,
    user,
    write_lines,
)
from tests.tiny import save_model

EVE = datetime(2026, 11, 28, 23, 59, 59)
DATED = (  # Llama 3.2's rule
    "{% if date_string is not defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}{% set date_string = '26 Jul 2024' %}"
    "{% endif %}{% endif %}<|im_start|>system\nToday Date: {{ date_string }}<|im_end|>\n" + CHATML
)
TODAY = (
    "<|im_start|>system\nToday Date: {}<|im_end|>\n<|im_start|>user\ngood?<|im_end|>\n<|im_start|>assistant\n"
)


class Ticking(datetime):
    """A clock that goes on by a second whenever someone looks at it."""

    looks = 0

    @classmethod
    def now(cls, tz=None):
        cls.looks += 1
        return EVE + timedelta(seconds=cls.looks - 1)


@pytest.fixture
def midnight(monkeypatch):
    """The first look at the clock, anyone's, is a second before midnight."""
    monkeypatch.setattr(Ticking, "looks", 0)
    monkeypatch.setattr(chat_template_utils, "datetime", Ticking)
    monkeypatch.setattr(chat_module, "datetime", Ticking)


def prompt_of(row, template=DATED, chat=None):
    tokenizer = small_tokenizer(chat_template=template, bos=False)
    group, notes = to_group(row, 0, tokenizer, WIDE, chat)
    assert not notes
    assert [scored_text(tokenizer, r) for r in group.responses] == ["gold<|im_end|>", "old<|im_end|>"]
    return decode(tokenizer, group.prompt)


def test_a_template_is_told_the_runs_time():
    chat = Chat(clock=EVE)
    assert prompt_of(chat_row(), chat=chat) == TODAY.format("28 Nov 2026")
    assert list(chat.dates) == ["28 Nov 2026"]


def test_a_date_string_is_the_configs_or_before_it_the_rows():
    chat = Chat({"date_string": "26 Jul 2024", "mood": "good"}, EVE)
    template = "{{ mood }}" + DATED
    assert prompt_of(chat_row(), template, chat) == "good" + TODAY.format("26 Jul 2024")
    row = {**chat_row(), "chat_template_kwargs": {"date_string": "1 May 2025"}}
    assert prompt_of(row, template, chat) == "good" + TODAY.format("1 May 2025")
    assert not chat.dates  # nobody asked


def test_the_time_is_told_everywhere_in_a_template():
    """In a macro that calls another, in a loop, in a block that is set; and theirs is back afterwards."""
    template = (
        "{% macro day() %}{{ strftime_now('%d') }}{% endmacro %}"
        "{% macro date() %}{{ day() }}.11.{% endmacro %}"
        "{% set year %}{{ strftime_now('%Y') }}{% endset %}"
        "{% for m in messages %}{{ date() }}{{ year }} {{ strftime_now('%H:%M') }} "
        "{{ m.content }};{% endfor %}"
    )
    tokenizer, chat = small_tokenizer(chat_template=template), Chat(clock=EVE)
    text = chat.render(tokenizer, [user("a"), user("b")], {})
    assert text == "28.11.2026 23:59 a;28.11.2026 23:59 b;"
    assert list(chat.dates) == ["2026", "28", "23:59"]
    assert chat_template_utils.datetime is datetime


def test_their_clock_is_back_where_a_template_refuses():
    tokenizer = small_tokenizer(chat_template="{{ raise_exception('no') }}")
    with pytest.raises(RowProblem, match="refuses these turns: no"):
        to_group(chat_row(), 0, tokenizer, WIDE)
    assert chat_template_utils.datetime is datetime


def test_no_midnight_comes_between_rows_or_within_one(midnight, tmp_path):
    tokenizer = small_tokenizer(chat_template=DATED, bos=False)
    path = write_lines(tmp_path / "rows.jsonl", [chat_row(), chat_row("old?")])
    console = Console(record=True, width=80, file=open("/dev/null", "w"))
    groups, report = load_groups(path, tokenizer, WIDE, strict=True, console=console)
    assert decode(tokenizer, groups[0].prompt) == TODAY.format("28 Nov 2026")
    assert decode(tokenizer, groups[1].prompt) == TODAY.format("28 Nov 2026").replace("good?", "old?")
    for group in groups:
        assert [scored_text(tokenizer, r) for r in group.responses] == ["gold<|im_end|>", "old<|im_end|>"]
    assert report.dates == report.to_dict()["dates"] == ["28 Nov 2026"]
    report.print(console)
    said = console.export_text()
    assert "the chat template prints the date (28 Nov 2026): a run keeps it when it resumes" in said
    assert 'chat_template_kwargs: {date_string: "28 Nov 2026"}' in said


def test_what_apply_chat_template_itself_takes_is_refused():
    names = inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters.keys()
    for name in (names | {"messages", "strftime_now"}) - {"self", "kwargs", "documents"}:
        with pytest.raises(ConfigError, match=f"chat_template_kwargs: {name}: not for the template to read"):
            config_of({name: True})
        with pytest.raises(RowProblem, match=f"chat_template_kwargs: {name}: not for") as caught:
            prompt_of({**chat_row(), "chat_template_kwargs": {name: True}})
        assert caught.value.reason == "template_kwargs"


def test_documents_are_the_templates():
    row = {**chat_row(), "chat_template_kwargs": {"documents": [{"title": "T", "text": "world"}]}}
    assert prompt_of(row, "{{ documents[0].text }}" + CHATML).startswith("world<|im_start|>user\n")


def config_of(kwargs):
    return from_values({"model": "m", "data": "d", "chat_template_kwargs": kwargs}).chat_template_kwargs


@pytest.mark.parametrize(
    "kwargs, message",
    [
        (
            "{date_string: 2024-07-26}",
            "date_string: a template cannot read date '2024-07-26'; put it in quotes",
        ),
        ("{a: [{b: 2024-07-26}]}", "a: a template cannot read list .*; give what JSON can hold"),
        ("{a: {1: b}}", "a: a template cannot read dict .*; give what JSON can hold"),
        ("{1: b}", "1: a name is text"),
        ("today", "expected {option: value, ...}, got 'today'"),
    ],
)
def test_what_no_template_can_read(kwargs, message):
    with pytest.raises(ConfigError, match=f"^chat_template_kwargs: {message}"):
        config_of(kwargs)


def test_what_a_template_can_read():
    text = "{date_string: 26 Jul 2024, enable_thinking: false, n: [1, 0.5, null, {a: b}]}"
    thinking = {"date_string": "26 Jul 2024", "enable_thinking": False}
    assert config_of(text) == thinking | {"n": [1, 0.5, None, {"a": "b"}]}


@pytest.mark.parametrize("command", ["data", "plan"])
def test_a_flag_reaches_the_rows(command, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    template = tmp_path / "dated.jinja"
    template.write_text(DATED)
    rows = write_lines(tmp_path / "rows.jsonl", [chat_row()])
    argv = [command, "--model", save_model(tmp_path / "model"), "--data", rows, "--max_length", "256"]
    argv += ["--chat_template", str(template), *(["--device", "cpu"] if command == "plan" else [])]
    assert main(argv) == 0
    assert "the chat template prints the date (" in capsys.readouterr().out
    assert main([*argv, "--chat_template_kwargs", "{date_string: 26 Jul 2024}"]) == 0
    said = capsys.readouterr().out
    assert "prints the date" not in said
    assert command == "plan" or "Today Date: 26 Jul 2024" in said
