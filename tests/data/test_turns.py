"""Messages of every format: other tools' names of the roles, tool calls and contents in one form."""

import json

import pytest

from fastdpo.data.rows import RowProblem, parse_row
from fastdpo.data.sources import load_rows
from tests.data.every_format import ASKED, FORMATS, OLD, calling, rows_with
from tests.data.shared_data import assistant, user, write_lines

ALONE = {  # formats whose question is text
    "intel": {"question": "weather?"},
    "icr": {"input": "weather?"},
    "alpaca": {"instruction": "weather?"},
}


# ---- tool calls


@pytest.mark.parametrize("format", FORMATS)
def test_arguments_in_text_are_an_object(format):
    parsed = parse_row(rows_with(ASKED, calling('{"x": [1, null], "y": "é"}'))[format], 0)
    assert parsed.responses[0] == [calling({"x": [1, None], "y": "é"})]


@pytest.mark.parametrize("name", ALONE)
def test_arguments_in_text_are_an_object_beside_a_text_question(name):
    row = ALONE[name] | {"chosen": [calling('{"x": 1}')], "rejected": "old"}
    parsed = parse_row(row, 0)
    assert (parsed.format, parsed.responses) == (name, ([calling({"x": 1})], OLD))


@pytest.mark.parametrize("empty", [None, "", " ", "{}", "null", {}, []])
def test_arguments_that_are_empty(empty):
    row = {"prompt": ASKED, "chosen": [calling(empty)], "rejected": OLD}
    assert parse_row(row, 0).responses[0] == [calling({})]
    del row["chosen"][0]["tool_calls"][0]["function"]["arguments"]
    assert parse_row(row, 0).responses[0] == [calling({})]


def test_other_keys_of_messages_calls_and_functions_stay():
    call = {
        "index": 0,
        "id": "c1",
        "type": "custom",
        "function": {"name": "f", "arguments": {}, "strict": True},
    }
    turn = {"role": "assistant", "content": "a", "thinking": "t", "name": "n", "tool_calls": [call]}
    result = {"role": "tool", "content": "r", "tool_call_id": "c1", "name": "f"}
    row = {"prompt": ASKED, "chosen": [turn, result, assistant("b")], "rejected": OLD}
    assert parse_row(row, 0).responses[0] == row["chosen"]
    # and in the order in which a template's tojson prints them, where the row has them all
    assert list(parse_row(row, 0).responses[0][0]["tool_calls"][0]) == list(call)


def test_calls_in_openai_s_older_form():
    turns = [
        {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": '{"x": 1}'}},
        {"role": "function", "name": "f", "content": "r"},
        assistant("b"),
    ]
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    assert parse_row({"prompt": ASKED, "chosen": turns, "rejected": OLD}, 0).responses[0] == [
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "f", "content": "r"},
        assistant("b"),
    ]


def test_a_call_s_turn_keeps_what_else_it_says():
    call = {"role": "tool_call", "content": '{"name": "f"}'}
    row = {"prompt": ASKED, "chosen": [call, call | {"reasoning_content": "why"}], "rejected": OLD}
    called = {"type": "function", "function": {"name": "f", "arguments": {}}}
    turn = {"role": "assistant", "content": "", "tool_calls": [called]}
    assert parse_row(row, 0).responses[0] == [turn, turn | {"reasoning_content": "why"}]


# ---- roles


@pytest.mark.parametrize("format", FORMATS)
def test_other_names_of_the_roles(format):
    turns = [
        {"from": "human", "value": "weather?"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "r"},
    ]
    parsed = parse_row(rows_with(turns, {"from": "gpt", "value": "gold"})[format], 0)
    called = [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    tools = {"role": "assistant", "content": "", "tool_calls": called}, {"role": "tool", "content": "r"}
    assert parsed.prompt == [*ASKED, *tools] and parsed.responses[0] == [assistant("gold")]


@pytest.mark.parametrize(
    "theirs, ours",
    [
        ("human", "user"),
        ("gpt", "assistant"),
        ("bot", "assistant"),
        ("model", "assistant"),
        ("function", "tool"),
        ("ipython", "tool"),
        ("developer", "developer"),
    ],
)
def test_a_role_s_name(theirs, ours):
    prompt = [*ASKED, {"role": theirs, "content": "a"}, user("b")]
    row = {"prompt": prompt, "chosen": [assistant("a")], "rejected": OLD}
    assert parse_row(row, 0).prompt[1] == {"role": ours, "content": "a"}


@pytest.mark.parametrize("role", ["narrator", ["user"], {"a": 1}, 5, None])
@pytest.mark.parametrize("format", FORMATS)
def test_a_role_that_is_none(format, role):
    row = rows_with([*ASKED, {"role": role, "content": "x"}, *ASKED], assistant("a"))[format]
    with pytest.raises(RowProblem) as caught:
        parse_row(row, 0)
    wanted = {"narrator": ("unknown_role", "[1].role"), None: ("wrong_type", "[1]")}
    reason, place = wanted.get(role if role in ("narrator", None) else "", ("wrong_type", "[1].role"))
    assert caught.value.reason == reason and caught.value.field.endswith(place)


@pytest.mark.parametrize("key", ["role", "from"])
def test_whole_conversations_begin_with_any_role(key):
    content = "content" if key == "role" else "value"
    for role in (["user"], {"a": 1}, 5, "narrator"):
        turns = [{key: role, content: "x"}]
        with pytest.raises(RowProblem) as caught:
            parse_row({"chosen": turns, "rejected": turns}, 0)
        assert caught.value.field == f"chosen[0].{key}"


# ---- contents


@pytest.mark.parametrize("format", FORMATS)
def test_contents_in_parts_of_text(format):
    prompt = [
        {"role": "user", "content": [{"type": "text", "text": "weat"}, {"text": "her?", "type": "text"}]}
    ]
    answer = {"role": "assistant", "content": [{"type": "text", "text": "gold", "image": None}]}
    parsed = parse_row(rows_with(prompt, answer)[format], 0)
    assert (parsed.prompt, parsed.responses[0]) == (ASKED, [assistant("gold")])


FAULTS = {
    "arguments": ([calling("{")], "wrong_type", "chosen[0].tool_calls[0].arguments", "must be JSON"),
    "arguments quoted twice": (
        [calling(json.dumps('{"x": 1}'))],
        "wrong_type",
        "chosen[0].tool_calls[0].arguments",
        "an object, not str",
    ),
    "call": (
        [{"role": "assistant", "content": "", "tool_calls": [5]}],
        "wrong_type",
        "chosen[0].tool_calls[0]",
        "a name and arguments, not int",
    ),
    "part": (
        [{"role": "assistant", "content": ["x"]}],
        "wrong_type",
        "chosen[0].content[0]",
        "a part of the content",
    ),
    "part without text": (
        [{"role": "assistant", "content": [{"type": "text"}]}],
        "wrong_type",
        "chosen[0].content[0].text",
        "text, not nothing",
    ),
    "two names": (
        [{"role": "assistant", "content": "a", "value": "b"}],
        "ambiguous_row",
        "chosen[0]",
        "both content and value",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_faults(name):
    chosen, reason, field, part = FAULTS[name]
    with pytest.raises(RowProblem) as caught:
        parse_row({"prompt": ASKED, "chosen": chosen, "rejected": OLD}, 0)
    assert (caught.value.reason, caught.value.field) == (reason, field)
    assert part in caught.value.message


def test_turns_written_as_text_are_told(tmp_path):
    text = json.dumps([{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}])
    (row,) = load_rows(write_lines(tmp_path / "d.jsonl", [{"prompt": "p", "chosen": text, "rejected": "b"}]))
    with pytest.raises(RowProblem) as caught:
        parse_row(row, 0)
    assert (caught.value.reason, caught.value.field) == ("messages_as_text", "chosen")
