"""`data` as a list: several data sets, read one after the other."""

import io
import json

import pytest
from rich.console import Console

import fastdpo
from fastdpo.config.keys import Config
from fastdpo.data.load import load_groups
from fastdpo.data.sources import NumberedRows
from fastdpo.errors import ConfigError, DataError
from tests.config.command_line import load_config
from tests.data.shared_data import WIDE, small_tokenizer, text_row, write_lines
from tests.tiny import rows as tiny_rows
from tests.tiny import save_model, write_jsonl

FIRST, SECOND = text_row(chosen="gold"), text_row(chosen="old")


@pytest.fixture
def two(tmp_path):
    return [
        write_lines(tmp_path / "a.jsonl", [FIRST, "{", SECOND]),
        write_lines(tmp_path / "b.jsonl", [SECOND, {"prompt": "x"}]),
    ]


def load(spec, **more):
    console = Console(file=io.StringIO(), width=200)
    return load_groups(spec, small_tokenizer(), WIDE, **dict(strict=False, console=console) | more)


def test_rows_are_numbered_on_and_each_is_accounted_for(two):
    groups, report = load(two)
    assert [group.row for group in groups] == [0, 2, 3]
    assert report.rows == 5 and report.source == f"{two[0]}, {two[1]} (from row 3 on)"
    assert report.dropped["invalid_json"].examples == [1]
    (dropped,) = (tally for name, tally in report.dropped.items() if name != "invalid_json")
    assert dropped.examples == [4] and "line 2 of b.jsonl" in dropped.message
    assert report.notes["duplicate_row"].examples == [3]  # of the other data set


def test_their_rows_by_number(two, tmp_path):
    rows = NumberedRows(two)
    assert [rows(number) for number in (3, 0, 1, 4, 2)] == [SECOND, FIRST, None, {"prompt": "x"}, SECOND]
    assert rows(-1) == FIRST
    begins = write_lines(tmp_path / "c.jsonl", ["{", "[1]", SECOND])
    assert NumberedRows(begins, {"prompt": "prompt"})(-1) == SECOND
    NumberedRows(str(tmp_path / "none.jsonl"))  # nothing is read before a row is asked for
    with pytest.raises(DataError, match=r"^data: .*none\.jsonl"):
        NumberedRows(str(tmp_path / "none.jsonl"))(0)


def test_an_error_names_the_row_as_its_own_data_set_counts(two, tmp_path):
    clean = write_lines(tmp_path / "clean.jsonl", [FIRST])
    with pytest.raises(DataError, match=r"^row 1 of .*b\.jsonl \(line 2 of b\.jsonl\)"):
        load([clean, two[1]], strict=True)
    with pytest.raises(DataError, match=r"^eval_data: '.*c\.jsonl' does not exist here"):
        load([clean, str(tmp_path / "c.jsonl")], key="eval_data")


def test_each_data_set_of_a_dataset_info_has_its_own_layout(tmp_path):
    intel = {"ask": "good?", "chosen": "gold", "rejected": "old"}
    write_lines(tmp_path / "one.jsonl", [intel])
    write_lines(tmp_path / "two.jsonl", [{"question": "good?", "chosen": "gold", "rejected": "wor"}])
    entry = lambda name, column: {"file_name": name, "ranking": True, "columns": {"prompt": column}}
    info = {"one": entry("one.jsonl", "ask"), "two": entry("two.jsonl", "question")}
    (tmp_path / "dataset_info.json").write_text(json.dumps(info))
    groups, report = load([f"{tmp_path}:one", f"{tmp_path}:two"])
    assert len(groups) == 2 and report.formats == {"alpaca": 2}
    assert groups[0].prompt.tolist() == groups[1].prompt.tolist()


def test_in_a_config():
    assert load_config(["--model", "m", "--data", "[a.jsonl, 'b#train[:9]']"]).data[1] == "b#train[:9]"
    for sets, wrong in ((["a", "a"], "named twice"), (["a", ""], "empty name"), ([], "data: missing")):
        with pytest.raises(ConfigError, match=wrong):
            Config(model="m", data=sets)
    with pytest.raises(ConfigError, match="eval_data: a data set is named twice"):
        Config(model="m", data="d", eval_data=["a", "a"])


def test_a_run_trains_on_all_of_them(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    model, rows = str(save_model(tmp_path / "model")), tiny_rows(6)
    names = [write_jsonl(tmp_path / "a.jsonl", rows[:4]), write_jsonl(tmp_path / "b.jsonl", rows[4:])]
    keys = dict(model=model, samples=0, batch_size=2, max_length=128, num_epochs=1, learning_rate=1e-3)
    run = fastdpo.train(keys, data=names, eval_data=names, output_dir=str(tmp_path / "run"))
    report = json.loads((run / "data_report.json").read_text())
    assert report["data"]["kept"]["rows"] == report["eval_data"]["kept"]["rows"] == 6
    text = (run / "model/README.md").read_text()
    assert "on `a.jsonl`, `b.jsonl`." in text and "datasets:" not in text
    inside = write_jsonl(run / "model/rows.jsonl", rows)
    with pytest.raises(ConfigError, match="the run would replace data"):
        fastdpo.train(keys, data=[names[0], inside], output_dir=str(run), overwrite=True)
