"""Reading rows from files, folders and the hub."""

import json
import os
import subprocess
import sys

import pytest
from datasets import Dataset, DatasetDict

from fastdpo.data.rows import RowProblem, parse_row
from fastdpo.data.sources import load_rows, sources_of
from fastdpo.errors import DataError
from fastdpo.files.names import Answer
from tests.data.shared_data import chat_row, ranked_row, text_row, write_lines
from tests.hub import running

TEXT, CHAT = text_row(), chat_row()
RANKED = ranked_row(("a", 2), ("b", 1))


def rows_of(count: int) -> list[dict]:
    return [{**TEXT, "chosen": f" Hi {i}!"} for i in range(count)]


def test_json_lines_need_not_have_one_type(tmp_path):
    spec = write_lines(tmp_path / "d.jsonl", [TEXT, "", CHAT, RANKED])
    rows = load_rows(spec)
    assert list(rows) == [TEXT, CHAT, RANKED]
    assert rows.line(1) == "line 3 of d.jsonl"


def test_a_line_separator_within_a_string_ends_no_line(tmp_path):
    row = {**TEXT, "chosen": "one\u2028two\x85three"}
    path = tmp_path / "d.jsonl"
    path.write_text(json.dumps(row, ensure_ascii=False) + "\n", encoding="utf-8")
    assert list(load_rows(str(path))) == [row]


def test_a_bad_line_keeps_its_number(tmp_path):
    rows = load_rows(write_lines(tmp_path / "d.jsonl", [TEXT, '{"prompt": ', TEXT]))
    assert len(rows) == 3
    with pytest.raises(RowProblem, match="line 2: not JSON") as caught:
        parse_row(rows[1], 1)
    assert caught.value.reason == "invalid_json"


def test_json_array(tmp_path):
    path = tmp_path / "d.json"
    path.write_text("\ufeff" + json.dumps([TEXT, CHAT], indent=1), encoding="utf-8")
    rows = load_rows(str(path))
    assert list(rows) == [TEXT, CHAT]
    assert rows.line(1) == "line 7 of d.json"


@pytest.mark.parametrize(
    "text, why",
    [
        ("[1, 2", "line 1 on: the array has no end"),
        ("[1,\n oops]", "line 2 on: Expecting value"),
        ("hello\nworld\n", "line 1: not JSON"),
    ],
)
def test_not_json(tmp_path, text, why):
    path = tmp_path / "d.json"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=rf"d\.json .*{why}"):
        load_rows(str(path))


@pytest.mark.parametrize("kind", ["csv", "parquet", "disk", "jsonl"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path, kind):
    # "None" and "NA" are words here: pandas would read them as missing
    expected = [*rows_of(3), {**TEXT, "chosen": "None", "rejected": "NA"}]
    path = tmp_path / ("folder" if kind == "disk" else f"d.{kind}")
    if kind == "jsonl":
        write_lines(path, expected)
    else:
        data = Dataset.from_list(expected)
        write = {"csv": data.to_csv, "parquet": data.to_parquet, "disk": data.save_to_disk}
        write[kind](path)
    assert list(load_rows(str(path))) == expected
    assert list(load_rows(f"{path}#train[1:3]")) == expected[1:3]
    assert load_rows(str(path))[2] == expected[2]


def test_splits_of_a_folder_come_from_file_names(tmp_path):
    write_lines(tmp_path / "pairs_train.jsonl", rows_of(10))
    write_lines(tmp_path / "pairs_test.jsonl", rows_of(4))
    (tmp_path / "README.md").write_text("about")
    assert list(load_rows(str(tmp_path))) == rows_of(10)
    rows = load_rows(f"{tmp_path}#train[:20%]+test[-1:]")
    assert list(rows) == [*rows_of(2), rows_of(4)[3]]
    assert rows.line(2) == "line 4 of pairs_test.jsonl"


def test_splits_of_a_saved_dict(tmp_path):
    splits = {"train": Dataset.from_list(rows_of(5)), "test": Dataset.from_list(rows_of(2))}
    DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert list(load_rows(f"{tmp_path}/saved#test")) == rows_of(2)
    assert list(load_rows(f"{tmp_path}/saved#test+train[4:]")) == [*rows_of(2), rows_of(5)[4]]


def test_split_that_is_not_there(tmp_path):
    spec = write_lines(tmp_path / "d.jsonl", rows_of(5)) + "#test"
    with pytest.raises(DataError, match=r"Unknown split .*train \(5 rows\)"):
        load_rows(spec)


@pytest.mark.parametrize("split", ["train[", "train[a:b]", "train[:x%]"])
def test_split_that_is_none(tmp_path, split):
    with pytest.raises(DataError, match="There is: train"):
        load_rows(write_lines(tmp_path / "d.jsonl", rows_of(5)) + "#" + split)


@pytest.mark.parametrize("spec", ["nowhere/d.jsonl", "/nowhere/at/all", "nowhere", ""])
def test_missing(spec):
    with pytest.raises(DataError, match=r"does not exist here. Give a \.jsonl"):
        load_rows(spec)


def test_a_missing_one_of_several_is_told_before_any_is_read(tmp_path):
    with pytest.raises(DataError, match=r"eval_data: '/nowhere/d\.csv' does not exist here"):
        sources_of([write_lines(tmp_path / "d.jsonl", ["no json"]), "/nowhere/d.csv"], None, "eval_data")


def test_empty(tmp_path):
    (tmp_path / "d.jsonl").write_text("\n")
    with pytest.raises(DataError, match="has no rows"):
        load_rows(str(tmp_path / "d.jsonl"))
    (tmp_path / "bare").mkdir()
    with pytest.raises(DataError, match="no data files"):
        load_rows(str(tmp_path / "bare"))


def test_unreadable(tmp_path):
    (tmp_path / "d.parquet").write_bytes(b"no parquet")
    with pytest.raises(DataError, match=r"d.parquet' cannot be loaded: .*\nCheck that the file") as caught:
        load_rows(str(tmp_path / "d.parquet"))
    assert caught.value.__suppress_context__
    Dataset.from_list([TEXT] * 1000).to_parquet(tmp_path / "d.parquet")
    raw = bytearray((tmp_path / "d.parquet").read_bytes())
    raw[4:200] = bytes(196)  # a page that was overwritten
    (tmp_path / "d.parquet").write_bytes(raw)
    with pytest.raises(DataError, match="cannot be loaded") as caught:
        load_rows(str(tmp_path / "d.parquet"))
    assert "while generating the dataset" not in str(caught.value)
    (tmp_path / "e.jsonl").mkdir()
    with pytest.raises(DataError, match=r"e\.jsonl' holds no data files"):
        load_rows(str(tmp_path / "e.jsonl"))
    (tmp_path / "d.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds \.txt\. Give a \.jsonl"):
        load_rows(str(tmp_path / "d.txt"))


@pytest.mark.parametrize(
    "name, kinds",
    [("b.jsonl.gz", r"\.gz, \.jsonl"), ("b.JSONL", r"\.JSONL, \.jsonl"), ("b.tsv", r"\.jsonl, \.tsv")],
)
def test_a_folder_is_not_read_in_part(tmp_path, name, kinds):
    write_lines(tmp_path / "a.jsonl", [TEXT])
    (tmp_path / "README.md").write_text("x")
    assert len(load_rows(str(tmp_path))) == 1
    (tmp_path / name).write_text("x")
    with pytest.raises(DataError, match=f"holds {kinds}. Give a"):
        load_rows(str(tmp_path))


def test_a_name_like_that_of_a_file(tmp_path):
    write_lines(tmp_path / "rows.jsonl", [TEXT])
    with pytest.raises(DataError, match=r"does not exist here; did you mean '.*/rows\.jsonl'\? Give a"):
        load_rows(f"{tmp_path}/row.jsonl")


ANSWERS = {  # of the hub -> what is said of the data set
    "not there": "'org/rows:config' cannot be loaded: it is neither a path here nor a dataset that the",
    "gated": "'org/rows:config' cannot be loaded: it is gated: ask for access at http://127.0.0.1:",
    "down": "'org/rows:config' is neither a path here nor in the cache of datasets, and the hub, http://127",
    None: "'org/rows:config' is neither a path here nor in the cache of datasets, and the hub, http://127",
}


@pytest.mark.parametrize("answer", ANSWERS)
def test_the_hub_is_asked_once(answer, tmp_path, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail("it tries again"))
    with running(monkeypatch, tmp_path) as hub, pytest.raises(DataError) as caught:
        hub.answer = answer
        load_rows("org/rows:config#test", key="eval_data")
    assert str(caught.value).startswith(f"eval_data: {ANSWERS[answer]}")
    assert hub.asked == ["HEAD /datasets/org/rows/resolve/main/README.md"]


@pytest.mark.parametrize("part, given", [("en", {"name": "en"}), ("data/rl", {"data_dir": "data/rl"})])
def test_a_part_of_a_data_set_of_the_hub(part, given, monkeypatch):
    asked = []
    monkeypatch.setattr("fastdpo.data.files.loaded.look_up", lambda *_: Answer(True, ""))
    rows = Dataset.from_list([TEXT])
    monkeypatch.setattr("datasets.load_dataset", lambda **options: asked.append(options) or rows)
    load_rows(f"org/rows:{part}")
    assert asked == [{"path": "org/rows", "split": "train"} | given]


def test_hub_name_without_network():
    code = "from fastdpo.data.sources import load_rows; load_rows('nobody/nothing:config#train[:10]')"
    env = {**os.environ, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300)
    where = "'nobody/nothing:config' is neither a path here nor in the cache of datasets"
    folder = f"{os.getcwd()}/nobody/nothing is no folder"  # it may be FOLDER:NAME
    said = f"DataError: data: {where}, and HF_HUB_OFFLINE is set; {folder}; check the name"
    assert said in done.stderr and done.returncode
    assert done.stderr.count("Traceback") == 1, done.stderr
