"""Rows that are read where they are asked for: any of them, in any process, as long as their file stays what
it was; and what makes a data set another one."""

import json
import os
import pickle
import random
import shutil
import subprocess
import sys
from itertools import accumulate
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, DatasetDict

from fastdpo.data.files import file_rows
from fastdpo.data.report import RowProblem
from fastdpo.data.sources import Source, load_rows
from fastdpo.errors import DataError
from fastdpo.files.names import Answer
from tests.data.shared_data import pieces, text_row, write_lines  # noqa: F401

ROWS = [text_row(chosen=f" é {i}" + "\n" * (i % 3), rejected=" old" * (i % 5)) for i in range(40)]
KINDS = ["jsonl", "json", "csv", "parquet", "saved", "folder", "split", "listed"]


def written(folder: Path, kind: str, rows: list[dict] = ROWS) -> str:
    """The rows, as a source of this kind."""
    path, data = folder / f"d.{kind}", Dataset.from_list(rows)
    match kind:
        case "json":
            path.write_text(json.dumps(rows, indent=1))
        case "csv":
            data.to_csv(path)
        case "parquet":
            data.to_parquet(path)
        case "saved":
            DatasetDict({"train": data}).save_to_disk(path)
        case "folder":
            path.mkdir()
            write_lines(path / "a.jsonl", rows[:15])
            write_lines(path / "b.jsonl", rows[15:])
        case "split":
            other = written(folder, "parquet", [ROWS[0], *rows, ROWS[0]])
            return f"{other}#train[1:10]+train[10:-1]"
        case "listed":
            write_lines(folder / "d.jsonl", rows)
            columns = {"prompt": "prompt", "chosen": "chosen", "rejected": "rejected"}
            entry = {"file_name": "d.jsonl", "ranking": True, "columns": columns}
            (folder / "dataset_info.json").write_text(json.dumps({"d": entry}))
            return f"{folder}:d"
        case _:
            write_lines(path, ["", *rows])
    return str(path)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("kind", KINDS)
def test_any_range_is_read_alone(tmp_path, kind):
    rows = load_rows(written(tmp_path, kind))
    assert len(rows) == len(ROWS) and list(rows) == ROWS
    numbers = list(range(len(ROWS)))
    random.Random(0).shuffle(numbers)
    assert [rows[i] for i in numbers] == [ROWS[i] for i in numbers] and rows[-1] == ROWS[-1]
    for start, stop in ((30, 40), (0, 20), (14, 16), (9, 10), (7, 7)):
        assert list(rows.range(start, stop)) == ROWS[start:stop]
    with pytest.raises(IndexError):
        rows[len(ROWS)]


@pytest.mark.parametrize("kind", KINDS)
def test_another_process_reads_them_and_imports_no_torch(tmp_path, kind):
    """What it is given grows by the row's place alone."""
    pickled = pickle.dumps(load_rows(written(tmp_path, kind)))
    longer = [row | {"prompt": "long " * 200} for row in ROWS]
    (tmp_path / "long").mkdir()
    assert len(pickle.dumps(load_rows(written(tmp_path / "long", kind, longer)))) < len(pickled) + 100
    script = (
        "import json, pickle, sys; rows = pickle.load(sys.stdin.buffer); "
        "json.dump([*rows.range(20, 40), rows[3], rows.line(20), 'torch' in sys.modules], sys.stdout)"
    )
    done = subprocess.run([sys.executable, "-c", script], input=pickled, capture_output=True, check=True)
    *read, line, torch = json.loads(done.stdout)
    assert read == [*ROWS[20:], ROWS[3]] and not torch
    assert line == pickle.loads(pickled).line(20)


def test_a_row_is_read_when_it_is_asked_for(tmp_path, monkeypatch):
    spec, parsed = write_lines(tmp_path / "d.jsonl", ROWS), []
    from fastdpo.data.files import json_rows

    real = json_rows._line
    monkeypatch.setattr(
        json_rows, "_line", lambda raw, line, hint: parsed.append(line) or real(raw, line, hint)
    )
    rows = load_rows(spec)
    assert parsed == [1]  # to see that there is JSON
    assert list(rows.range(7, 9)) == ROWS[7:9] and parsed == [1, 8, 9]


def _replaced(path: Path) -> None:
    os.utime(write_lines(path.with_name("new"), [*ROWS[1:], ROWS[0]]), ns=(1, path.stat().st_mtime_ns))
    path.with_name("new").replace(path)


CHANGES = {
    "appended": lambda path: path.write_bytes(path.read_bytes() + path.read_bytes()),
    "cut": lambda path: path.write_bytes(path.read_bytes()[:-9]),
    "emptied": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
    "touched": lambda path: os.utime(path, ns=(1, 1)),
    "replaced": _replaced,
}


@pytest.mark.parametrize("how", CHANGES)
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv"])
def test_a_file_that_changes_while_it_is_read_is_told(tmp_path, kind, how):
    source = Source(written(tmp_path, kind), None, "eval_data")
    source.identity()
    rows = source.rows()
    first = rows.range(0, 3)
    assert next(first) == ROWS[0]
    source.check_unchanged()
    CHANGES[how](tmp_path / f"d.{kind}")
    why = "it is gone" if how == "gone" else "it was written to, or replaced"
    message = f"{tmp_path}/d.{kind} changed while it was read ({why}); let it be, and run again"
    for read in (lambda: rows[5], lambda: list(rows.range(30, 40)), lambda: list(rows)):
        with pytest.raises(DataError) as caught:
            read()
        assert str(caught.value) == f"data: {message}" and not isinstance(caught.value, RowProblem)
    for ask in (source.check_unchanged, source.rows):
        with pytest.raises(DataError) as caught:
            ask()
        assert str(caught.value) == f"eval_data: {message}"


def test_a_row_that_arrow_cannot_give_is_alone(tmp_path):
    """Whichever rows are taken out of it at once."""
    texts = [b"good" if i not in (3, 4) else b"caf\xe9" for i in range(9)]
    offsets = pa.array([0, *accumulate(map(len, texts))], pa.int32()).buffers()[1]
    prompts = pa.Array.from_buffers(pa.string(), 9, [None, offsets, pa.py_buffer(b"".join(texts))])
    pq.write_table(pa.table({"prompt": prompts}), tmp_path / "d.parquet")
    rows = load_rows(str(tmp_path / "d.parquet"))
    assert [isinstance(row, RowProblem) for row in rows] == [i in (3, 4) for i in range(9)]
    assert list(rows.range(5, 9)) == [{"prompt": "good"}] * 4


@pytest.mark.parametrize("kind", ["parquet", "saved"])
def test_arrow_that_changes_while_it_is_read_is_told(tmp_path, kind):
    source = Source(written(tmp_path, kind), None, "data")
    source.rows()
    source.check_unchanged()
    (file,) = (tmp_path / "d.saved").glob("train/*.arrow") if kind == "saved" else [tmp_path / "d.parquet"]
    os.utime(file, ns=(1, 1))
    with pytest.raises(DataError, match=f"data: {file} changed while it was read"):
        source.check_unchanged()


def identity(spec, data_format=None) -> str:
    found = Source(str(spec), data_format, "data").identity()
    assert found == Source(str(spec), data_format, "eval_data").identity()
    return found


@pytest.mark.parametrize("kind", KINDS)
def test_another_content_is_another_data_set_and_another_folder_is_not(tmp_path, kind):
    specs = []
    for name, rows in (("a", ROWS), ("b", ROWS), ("c", [ROWS[1], ROWS[0], *ROWS[2:]])):
        (tmp_path / name).mkdir()
        specs.append(written(tmp_path / name, kind, rows))
    if kind == "saved":  # its state.json has a digest that no two data sets share
        specs[1] = str(shutil.copytree(tmp_path / "a/d.saved", tmp_path / "b/copy"))
    one, same, other = map(identity, specs)
    assert one == same != other


def test_what_else_makes_another_data_set(tmp_path):
    spec = write_lines(tmp_path / "d.jsonl", ROWS)
    other_name = write_lines(tmp_path / "e.jsonl", ROWS)
    other_kind = write_lines(tmp_path / "d.json", ROWS)
    folder = tmp_path / "parts"
    folder.mkdir()
    found = [identity(spec), identity(other_name), identity(other_kind)]
    found += [identity(f"{spec}#{split}") for split in ("train[:3]", "train[:4]", "train[:3]+train[4:]")]
    formats = ("trl", "alpaca", {"prompt": "chosen"}, {"prompt": "rejected"})
    found += [identity(spec, data_format) for data_format in formats]
    for names in ("ab", "ba"):  # the same files in another order, and in other pieces
        for name, rows in zip(names, (ROWS[:9], ROWS[9:])):
            write_lines(folder / f"{name}.jsonl", rows)
        found.append(identity(folder))
    write_lines(folder / "a.jsonl", ROWS[:10])
    write_lines(folder / "b.jsonl", ROWS[10:])
    found.append(identity(folder))
    assert len(set(found)) == len(found)
    assert identity(f"{spec}#[:3]") == identity(f"{spec}#train[:3]")


def test_how_a_listed_data_set_is_read_is_part_of_it(tmp_path):
    spec, info = written(tmp_path, "listed"), tmp_path / "dataset_info.json"
    before, entry = identity(spec), json.loads(info.read_text())
    entry["d"]["columns"]["prompt"] = "rejected"
    info.write_text(json.dumps(entry))
    assert identity(spec) != before


def test_the_splits_that_are_not_read_are_no_part_of_it(tmp_path):
    write_lines(tmp_path / "d_train.jsonl", ROWS)
    write_lines(tmp_path / "d_test.jsonl", ROWS[:2])
    train, both = identity(f"{tmp_path}#train[:5]"), identity(f"{tmp_path}#train+test")
    write_lines(tmp_path / "d_test.jsonl", ROWS[:3])
    assert identity(f"{tmp_path}#train[:5]") == train and identity(f"{tmp_path}#train+test") != both


def test_files_are_told_by_what_they_hold_and_not_by_their_times(tmp_path):
    """datasets keeps the rows of a parquet file by its name and its time."""
    for rows in (ROWS, ROWS[::-1]):
        spec = written(tmp_path, "parquet", rows)
        os.utime(spec, ns=(10**18, 10**18))
        assert list(load_rows(spec)) == rows


def of_hub(monkeypatch, data) -> Source:
    monkeypatch.setattr("fastdpo.data.files.loaded.look_up", lambda *_: Answer(True, ""))
    monkeypatch.setattr("datasets.load_dataset", data if callable(data) else lambda **options: data)
    return Source("org/rows#train[:50%]", None, "data")


def test_a_data_set_of_the_hub_is_told_by_the_files_that_datasets_made_of_it(tmp_path, monkeypatch):
    folder = tmp_path / "org___rows/default/0.0.0/0123456789abcdef"
    Dataset.from_list(ROWS).save_to_disk(tmp_path / "x")
    folder.mkdir(parents=True)
    (arrow,) = (tmp_path / "x").glob("*.arrow")
    file = arrow.rename(folder / "rows-train.arrow")
    source = of_hub(monkeypatch, Dataset.from_file(str(file)))
    before = source.identity()
    assert before and before == source.identity() and list(source.rows()) == ROWS
    os.utime(file, ns=(1, 1))
    assert of_hub(monkeypatch, Dataset.from_file(str(file))).identity() != before
    with pytest.raises(DataError, match="changed while it was read"):
        source.check_unchanged()
    in_memory = of_hub(monkeypatch, Dataset.from_list(ROWS))
    assert in_memory.identity() is None and list(in_memory.rows()) == ROWS


@pytest.mark.parametrize(
    "error",
    [
        OSError("Not enough disk space. Needed: 812.30 GiB (download: 300 GiB, generated: 512.30 GiB"),
        OSError(28, "No space left on device", "/x/y.arrow"),
    ],
)
def test_a_data_set_that_the_disk_does_not_hold_says_what_it_needs(monkeypatch, error):
    def refuse(**options):
        raise error

    with pytest.raises(DataError) as caught:
        of_hub(monkeypatch, refuse).identity()
    needs, way_out = str(caught.value).split("\n")
    assert needs == f"data: 'org/rows#train[:50%]' cannot be loaded: OSError: {error}"
    assert way_out.startswith("datasets writes all of it, whatever the #split, below /")
    assert "Set HF_HOME to a folder on a disk with room for both" in way_out


def test_positions_of_long_files_are_those_of_their_lines(tmp_path, monkeypatch):
    """Whichever lines a piece ends in."""
    path, chance = tmp_path / "d.jsonl", random.Random(1)
    for size in (1, 7, 64, 1 << 20):
        monkeypatch.setattr("fastdpo.data.files.stamps.PIECE", size)
        text = "".join(chance.choice(["a", "bc ", " ", "\t\n", "\n", "\r\n", "é", "\v"]) for _ in range(300))
        path.write_bytes(raw := text.encode())
        starts, lines = file_rows.line_positions(path, 0)
        expected = [(line, found) for line, found in enumerate(raw.split(b"\n"), start=1) if found.strip()]
        assert lines.tolist() == [line for line, _ in expected] and starts[-1] == len(raw)
        got = [raw[start:].split(b"\n")[0] for start in starts[:-1].tolist()]
        assert got == [found for _, found in expected]
