"""`fastdpo cache` of tokenised data sets: what it shows is there, a look changes nothing, and what is pruned
is what was meant."""

import io
import json
import os
from datetime import datetime
from pathlib import Path

import pytest
from rich.console import Console

from fastdpo.cli import main
from fastdpo.data.load import load_groups
from fastdpo.data.store import making, work
from fastdpo.data.store.contents import stored
from fastdpo.data.store.folder import cache_folder
from tests.data.golden_rows import columns, digest
from tests.data.shared_data import WIDE, small_tokenizer, text_row, write_lines

SHARD = f"000000-{'0' * 32}.arrow"
ONE, TWO, HALF = "1a2b3c4d" * 4, "1a2bffff" * 4, "0123abcd" * 4


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")


def put(folder: Path, key: str, days: float, told: dict | None, size: int = 1000) -> None:
    """A data set last used so many days ago; without `told` one that was never finished."""
    (folder / key).mkdir(parents=True)
    files = {SHARD: b"x" * size} | ({"about.json": json.dumps(told).encode()} if told else {})
    for name, content in files.items():
        (folder / key / name).write_bytes(content)
    then = datetime.now().timestamp() - days * 86400
    for name in (SHARD, "about.json")[: len(files)]:
        os.utime(folder / key / name, (then, then))
    os.utime(folder / key, (then, then))


@pytest.fixture
def folder():
    told = {
        "rows": 1200,
        "source": "[red]train.jsonl\x1b",
        "tokenizer": "me/model",
        "made": "2026-03-09T07:05:00",
    }
    put(cache_folder("auto"), ONE, 10, told)
    put(cache_folder("auto"), TWO, 40, told | {"source": "more.jsonl"}, 2000)
    put(cache_folder("auto"), HALF, 60, None)
    return cache_folder("auto")


def said(capsys, *words: object) -> str:
    assert main(["cache", *map(str, words)]) == 0
    return capsys.readouterr().out


def there(folder: Path) -> set[str]:
    return {one.id for one in stored(folder)}


def contents(folder: Path) -> dict:
    return {path: (path.stat().st_size, path.stat().st_mtime_ns) for path in folder.rglob("*")}


def test_what_is_shown_is_there(folder, capsys):
    before = contents(folder)
    last = f"{datetime.fromtimestamp((folder / ONE / 'about.json').stat().st_mtime):%Y-%m-%d}"
    for shown in (said(capsys), said(capsys, folder)):
        assert f"{folder}: 3 tokenised data sets, 4." in shown
        half, two, one = (shown[shown.index(key[:8]) :] for key in (HALF, TWO, ONE))
        assert len(half) > len(two) > len(one)  # what was used last comes last
        for word in (r"[red]train.jsonl\x1b", "1,200", "2026-03-09", "by: me/model", last):
            assert word in one
        assert "more.jsonl" in two and "not finished" in half.splitlines()[0]
    assert contents(folder) == before
    assert "reference.sqlite: nothing is stored yet" in said(capsys)


def test_pruning_by_age_is_by_the_last_use(folder, capsys):
    os.utime(folder / TWO / SHARD)  # as a copy of it may be: no use
    assert "2 tokenised data sets would go, 3." in said(capsys, "prune", "--older_than", "30d", "--dry_run")
    assert there(folder) == {ONE, TWO, HALF}
    os.utime(folder / TWO / "about.json")  # as a run does
    assert "1 tokenised data set removed" in said(capsys, "prune", "--older_than", "30d")
    assert there(folder) == {ONE, TWO} and not (folder / HALF).exists()
    said(capsys, "prune", folder, "--older_than", "0h")
    assert not there(folder)


def test_pruning_by_id(folder, capsys):
    for prefix, why in (
        ("zz", "no id begins with 'zz'"),
        ("", "no id begins"),
        ("1a2b", "several ids begin with"),
    ):
        assert main(["cache", "prune", "--tokens", prefix]) == 2
        assert why in " ".join(capsys.readouterr().err.split())
    said(capsys, "prune", "--tokens", TWO[:8].upper(), "--older_than", "50d")  # those of both
    assert there(folder) == {ONE, TWO, HALF}
    assert "1 tokenised data set removed, 2." in said(capsys, "prune", "--tokens", TWO[:8])
    assert there(folder) == {ONE, HALF}


def test_each_store_is_pruned_by_its_own_ids(folder, capsys, tmp_path):
    assert "tokenised" not in said(capsys, "prune", "--namespace", "1a2b") and len(there(folder)) == 3
    assert "reference.sqlite" not in said(capsys, "prune", "--tokens", HALF[:8])
    (tmp_path / "file").touch()
    for words in ([folder, "--namespace", "1a"], [tmp_path / "file", "--tokens", "1a"]):
        assert main(["cache", "prune", *map(str, words)]) == 2
        assert "holds none of them; name what does" in " ".join(capsys.readouterr().err.split())


def test_nothing_else_is_looked_into(tmp_path, capsys):
    """A folder that is named by mistake loses nothing."""
    put(tmp_path, "photos", 99, None)
    put(tmp_path, ONE, 99, None)
    put(tmp_path, HALF, 99, None)
    (tmp_path / HALF / "model.safetensors").write_text("of another")
    (tmp_path / TWO).write_text("a file")
    assert "1 tokenised data set removed" in said(capsys, "prune", tmp_path, "--older_than", "0d")
    assert {path.name for path in tmp_path.iterdir()} == {"photos", TWO, HALF}
    assert len(list((tmp_path / HALF).iterdir())) == 2


def test_what_is_damaged_is_shown_as_not_finished(folder, capsys):
    for content in (b"\xff", b"[1]", b'{"rows": "many", "made": 7}', b"[" * 99_999):
        (folder / ONE / "about.json").write_bytes(content)
        assert "3 tokenised data sets" in said(capsys)


def test_runs_that_read_and_that_make_go_on(tmp_path, monkeypatch, capsys):
    """While one has half of its rows, all that it has read and written is removed."""
    rows = [text_row(chosen=f" Hi {i}!") for i in range(40)]
    spec, console = write_lines(tmp_path / "d.jsonl", rows), Console(file=io.StringIO(), width=500)
    monkeypatch.setattr(making, "SHARD_ROWS", 3)
    monkeypatch.setattr(making, "_FEW", 99)  # this process makes them
    load = lambda: load_groups(spec, small_tokenizer(), WIDE, strict=True, console=console)[0]
    tokens = lambda groups: [digest(some) for some in columns(list(groups)).values()]
    groups, make, calls = load(), work.shard_of, []
    expected = tokens(groups)
    assert "1 tokenised data set removed" in said(capsys, "prune", "--older_than", "0d")
    assert not there(cache_folder("auto")) and tokens(groups) == expected

    def remove_and_make(*args):
        calls.append(said(capsys, "prune", "--older_than", "0d") if len(calls) == 7 else "")
        return make(*args)

    monkeypatch.setattr(work, "shard_of", remove_and_make)
    assert tokens(load()) == expected
    assert "1 tokenised data set removed" in calls[7] and len(calls) == 14
    assert "so the tokenised rows are held in memory" in console.file.getvalue()
    assert tokens(load()) == expected and len(there(cache_folder("auto"))) == 1
