"""JSON files: which are read by line, what an array must be, and what each error names."""

import io
import json
import re
import shlex

import pytest
from rich.console import Console

from fastdpo.data.load import load_groups
from fastdpo.data.report import RowProblem
from fastdpo.data.rows import parse_row
from fastdpo.data.sources import load_rows
from fastdpo.errors import DataError
from tests.data.shared_data import WIDE, pieces, small_tokenizer, text_row, write_lines  # noqa: F401

pytestmark = pytest.mark.usefixtures("pieces")
QUIET = Console(file=io.StringIO())
ROW = text_row()
LINE = json.dumps(ROW)


def rows_of(tmp_path, text: str, name="d.json"):
    (tmp_path / name).write_text(text, encoding="utf-8")
    return load_rows(str(tmp_path / name))


def test_jsonl_is_read_by_line_whatever_it_begins_with(tmp_path):
    good = [text_row(chosen=f" gold {i}") for i in range(50)]
    spec = write_lines(tmp_path / "d.jsonl", [f"[{LINE}]", *good])
    first, *others = load_rows(spec)
    assert others == good and isinstance(first, RowProblem)
    groups, report = load_groups(spec, small_tokenizer(), WIDE, strict=False, console=QUIET)
    assert len(groups) == 50 and {n: t.examples for n, t in report.dropped.items()} == {"wrong_type": [0]}
    with pytest.raises(
        DataError, match=r"row 0 of .*\(line 1 of d\.jsonl\): line 1: a row is an object, not a list"
    ):
        load_groups(spec, small_tokenizer(), WIDE, strict=True, console=QUIET)


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
def test_an_object_a_line_may_be_called_either(tmp_path, name):
    rows = rows_of(tmp_path, f"\n{LINE}\n\n{LINE}\r\n", name)
    assert list(rows) == [ROW, ROW]
    assert rows.line(1) == f"line 4 of {name}"


def test_an_array_in_a_jsonl_is_told_its_name(tmp_path):
    with pytest.raises(DataError, match=r"has no line that is JSON: line 1: not JSON: .*to be named \.json"):
        rows_of(tmp_path, '[\n{"a": 1\n},\n{"b": 2\n}\n]', "d.jsonl")
    opening, row, comma, closing = rows_of(tmp_path, '[\n{"a": 1}\n{"a": 1},\n]', "d.jsonl")
    assert row == {"a": 1}
    way_out = "; a file that is one array is to be named .json"
    assert opening.message == f"not JSON: Expecting value (character 2){way_out}"
    assert comma.message == "not JSON: Extra data (character 9)"
    assert closing.message == "not JSON: Expecting value (character 1)"
    (whole,) = rows_of(tmp_path, f"[{LINE}, {LINE}]", "d.jsonl")
    assert (whole.reason, whole.message) == ("wrong_type", f"a row is an object, not a list{way_out}")


@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
def test_objects_over_several_lines_are_told_how_to_become_rows(tmp_path, name):
    path = shlex.quote(f"{tmp_path}/{name}")
    with pytest.raises(DataError, match=rf"over several lines: jq -c \. {re.escape(path)} > rows\.jsonl"):
        rows_of(tmp_path, json.dumps(ROW, indent=1) * 2, name)


@pytest.mark.parametrize("line", ['{"a": 1, "b": {"c": 2, "d": 3, "c": 2}}', '{"c": 1, "a": 2, "c": 2}'])
def test_a_key_that_is_there_twice_is_not_lost_without_a_word(tmp_path, line):
    bad, good = rows_of(tmp_path, f"{line}\n{LINE}\n", "d.jsonl")
    assert good == ROW and bad.reason == "invalid_json"
    assert str(bad) == "line 1: not JSON: the key 'c' is there twice; remove one"
    with pytest.raises(DataError, match="not JSON from line 2 on: the key 'c' is there twice"):
        rows_of(tmp_path, f"[{LINE},\n{line}]")


@pytest.mark.parametrize(
    "whole",
    [
        {"prompt": {"0": "p", "1": "q"}, "chosen": {"0": "a", "1": "b"}},  # pandas' to_json
        {"0": {"prompt": "p", "chosen": "a"}, "1": {"prompt": "q", "chosen": "b"}},  # orient="index"
        {"columns": ["prompt", "chosen"], "index": [0], "data": [["p", "a"]]},  # orient="split"
    ],
)
def test_a_table_in_one_object_is_told_how_to_become_rows(tmp_path, whole):
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path, json.dumps(whole))
    assert str(caught.value) == (
        f"data: {tmp_path}/d.json is one object that holds a table; write an object a row; with pandas, "
        'to_json(PATH, orient="records", lines=True)'
    )


def test_rows_of_an_array_keep_their_lines(tmp_path):
    rows = rows_of(tmp_path, f'\n [ {LINE},\n\n{{\n"prompt": "p"}}\n, 3\n]\n\n')
    assert list(rows) == [ROW, {"prompt": "p"}, 3]
    assert [rows.line(i) for i in range(3)] == [f"line {n} of d.json" for n in (2, 4, 6)]


def test_numbers_and_escapes_of_an_array_are_whole_wherever_it_is_read_from(tmp_path):
    items = [1.5, 12, -1e-7, 1e5, True, None, float("-inf"), "é😀\n\\" + "long" * 20, {"é": ["😀"]}]
    for ascii in (True, False):
        text = json.dumps(items, ensure_ascii=ascii)
        assert list(rows_of(tmp_path, text)) == items
        rows = rows_of(tmp_path, text.replace(", ", ",\n"))
        assert [rows.line(i) for i in (0, 8)] == ["line 1 of d.json", "line 9 of d.json"]


@pytest.mark.parametrize("space", ["", "\n"])
def test_a_fault_of_an_array_has_its_place_in_the_whole_file(tmp_path, space):
    text = f'[{{"é": 1}},{space} {{"é": "b",{space} "c" 2}}]'
    with pytest.raises(json.JSONDecodeError) as fault:
        json.loads(text)
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path, text)
    assert str(caught.value).endswith(f"is not JSON from line {2 if space else 1} on: {fault.value}")


@pytest.mark.parametrize("text", ["[]", "[ \n]\n", "\f[\n]"])
def test_an_empty_array_has_no_rows(tmp_path, text):
    with pytest.raises(DataError, match="has no rows"):
        rows_of(tmp_path, text)


@pytest.mark.parametrize(
    "text, line, why",
    [
        ("[{}\n{}]", 2, "a comma or ] is missing"),
        ("[{},\n\n,{}]", 3, "a comma too many"),
        ("[,{}]", 1, "a comma too many"),
        ("[{},\n{},\n]", 3, "a comma too many"),
        ("[{},\n{}", 2, "the array has no end"),
        ("[{},\n", 2, "the array has no end"),
        ("[{}]\n[{}]\n", 2, "the array ends before it. .* rename it .jsonl"),
        ("[{}] ]", 1, "the array ends before it"),
        ('[{},\n{"a": [1,\n2}]', 2, "Expecting ',' delimiter: line 3"),
        ("[{},\n" + "[" * 100_000, 2, "it is nested too deeply"),
        ("[{},\n " + "9" * 5000 + "]", 2, "too many digits"),
    ],
)
def test_arrays_are_read_strictly(tmp_path, text, line, why):
    with pytest.raises(DataError, match=rf"d\.json is not JSON from line {line} on: .*({why})"):
        rows_of(tmp_path, text)


@pytest.mark.parametrize(
    "line, why",
    [
        ("[" * 100_000, "it is nested too deeply"),
        ('{"a": ' * 50_000, "it is nested too deeply"),
        ('{"score_chosen": ' + "9" * 5000 + "}", "an integer has too many digits"),
        ("{", "Expecting property name"),
    ],
)
@pytest.mark.parametrize("name", ["d.json", "d.jsonl"])
def test_what_json_cannot_read_is_that_rows_problem(tmp_path, line, why, name):
    first, bad, last = rows_of(tmp_path, f"{LINE}\n{line}\n{LINE}\n", name)
    assert first == last == ROW
    with pytest.raises(RowProblem, match=f"^line 2: not JSON: {why}") as caught:
        parse_row(bad, 1)
    assert caught.value.reason == "invalid_json"


@pytest.mark.parametrize("indent", [None, 1])
def test_rows_under_a_key_are_told_how_to_get_out(tmp_path, indent):
    whole = {"version": "1", "the data": [ROW], "more": [ROW], "tags": ["a"]}
    with pytest.raises(DataError) as caught:
        rows_of(tmp_path, json.dumps(whole, indent=indent))
    assert str(caught.value) == (
        f"data: {tmp_path}/d.json is one object that holds rows under 'the data' and 'more'; "
        """give the list alone: jq '.["the data"]' """
        f"{shlex.quote(f'{tmp_path}/d.json')} > rows.json"
    )


def test_one_row_with_messages_holds_no_rows_under_a_key(tmp_path):
    turns = [{"role": "user", "content": "x"}]
    row = {"prompt": turns, "chosen": "a", "rejected": "b"}
    assert list(rows_of(tmp_path, json.dumps(row))) == [row]
    renamed = {"talk": turns, "yes": "a", "no": "b"}
    (tmp_path / "d.json").write_text(json.dumps(renamed))
    columns = {"prompt": "talk", "chosen": "yes", "rejected": "no"}
    assert list(load_rows(str(tmp_path / "d.json"), columns)) == [renamed]
    with pytest.raises(DataError, match="neither a JSON array nor one object a line: line 1"):
        rows_of(tmp_path, json.dumps(row, indent=1))
