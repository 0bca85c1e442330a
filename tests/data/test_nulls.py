"""Nulls: data where the row spells them, no data in the keys of a message and where Arrow filled them in."""

import json

import pytest
from datasets import Dataset, Features, Json, Value

from fastdpo.data.groups import to_group
from fastdpo.data.rows import parse_row
from fastdpo.data.sources import load_rows
from tests.data.every_format import ASKED, FORMATS, OLD, calling, rows_with
from tests.data.shared_data import WIDE, assistant, decode, scored_text, small_tokenizer, user


@pytest.mark.parametrize("format", FORMATS)
def test_nulls_of_arguments_are_data_and_those_of_a_message_are_not(format):
    arguments = {"city": "Paris", "unit": None, "days": [None, {"n": None}]}
    answer = calling(arguments, name=None, reasoning_content=None)
    answer["tool_calls"][0] |= {"index": None}
    answer["content"] = None
    prompt = [{**user("weather?"), "tool_calls": None, "name": None}]
    parsed = parse_row(rows_with(prompt, answer)[format], 0)
    assert (parsed.prompt, parsed.responses[0]) == (ASKED, [calling(arguments)])


def test_responses_that_differ_by_a_null_are_not_identical():
    row = {"prompt": ASKED, "chosen": [calling({"x": 1, "y": None})], "rejected": [calling({"x": 1})]}
    assert parse_row(row, 0).responses == (row["chosen"], row["rejected"])


@pytest.mark.parametrize("other", [True, 1.0])
def test_responses_that_differ_by_what_python_calls_equal_are_not_identical(other):
    answers = {"chosen": [calling({"x": 1})], "rejected": [calling({"x": other})]}
    arguments = parse_row({"prompt": ASKED} | answers, 0).responses[1][0]["tool_calls"][0]["function"]
    assert repr(arguments) == repr({"name": "f", "arguments": {"x": other}})
    turns = {name: [*ASKED, *answer, user("and?"), assistant(name)] for name, answer in answers.items()}
    assert parse_row(turns, 0).prompt == ASKED


def test_keys_in_another_order_are_the_same():
    a, b = (
        calling({"x": 1, "y": 2}, name="n", thinking="t"),
        calling({"y": 2, "x": 1}, thinking="t", name="n"),
    )
    turns = {
        name: [*ASKED, turn, user("and?"), assistant(name)]
        for name, turn in zip(("chosen", "rejected"), (a, b))
    }
    assert parse_row(turns, 0).prompt == [*ASKED, a, user("and?")]


def test_nulls_of_tools_and_template_arguments_are_data():
    schema = {"type": "object", "properties": {"unit": {"enum": ["a", None], "default": None}}}
    tools = [{"type": "function", "function": {"name": "f", "parameters": schema}}]
    for given in (tools, json.dumps(tools)):
        row = {"prompt": ASKED, "chosen": [assistant("a")], "rejected": OLD, "tools": given}
        parsed = parse_row(row | {"chat_template_kwargs": {"x": None, "y": {"z": None}}}, 0)
        assert parsed.tools == tools
        assert parsed.chat_template_kwargs == {"x": None, "y": {"z": None}}


def test_nulls_are_printed():
    template = (
        "{{ tools | tojson }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.arguments | tojson }}{% endfor %}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    )
    tokenizer = small_tokenizer(chat_template=template)
    row = {
        "prompt": ASKED,
        "chosen": [calling({"city": "Paris", "unit": None})],
        "rejected": [calling('{"city": "Paris"}')],
        "tools": [{"name": "f", "default": None}],
    }
    group, _ = to_group(row, 0, tokenizer, WIDE)
    assert '[{"name": "f", "default": null}]' in decode(tokenizer, group.prompt)
    shared = '{"city": "Paris'  # as far as the two are the same, and the prompt ends before it
    texts = [scored_text(tokenizer, response) for response in group.responses]
    assert texts == [f'{shared}", "unit": null}}<|im_end|>', f'{shared}"}}<|im_end|>']


@pytest.mark.parametrize("kind", ["parquet", "disk"])
def test_nulls_that_arrow_fills_in_are_no_data(tmp_path, kind):
    first = {"prompt": ASKED, "chosen": [calling({"city": "Paris"})], "rejected": [calling({"unit": "C"})]}
    first |= {"tools": [{"name": "f", "enum": ["a", None]}], "system": None}
    second = {"prompt": ASKED, "chosen": [calling({"unit": "C"})], "rejected": OLD}
    second |= {"tools": [{"name": "g", "x": 1}]}
    data = Dataset.from_list([first, second | {"system": "S"}])
    assert data[0]["chosen"][0]["tool_calls"][0]["function"]["arguments"] == {"city": "Paris", "unit": None}
    path = tmp_path / ("folder" if kind == "disk" else "d.parquet")
    (data.save_to_disk if kind == "disk" else data.to_parquet)(path)
    rows = load_rows(str(path))
    for row in (rows[0], next(iter(rows))):
        assert "system" in row  # a column, not a struct's key
        parsed = parse_row(row, 0)
        assert parsed.responses == (first["chosen"], first["rejected"])
        assert parsed.tools == [{"name": "f", "enum": ["a", None]}]


def test_nulls_of_json_in_arrow_are_data(tmp_path):
    features = Features({"prompt": Value("string"), "chat_template_kwargs": Json()})
    rows = [{"prompt": "a", "chat_template_kwargs": {"x": None}}, {"prompt": "b", "chat_template_kwargs": {}}]
    Dataset.from_list(rows, features=features).save_to_disk(tmp_path / "d")
    assert list(load_rows(str(tmp_path / "d"))) == rows
