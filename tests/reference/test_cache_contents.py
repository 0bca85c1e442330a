"""`fastdpo cache`: what it shows is what is stored, a look changes nothing, and pruning harms no run."""

import json
import os
import shutil
import sqlite3
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
import torch
from rich.console import Console

from fastdpo.cli import main
from fastdpo.errors import ConfigError, TrainingError
from fastdpo.reference import cache as ref_cache
from fastdpo.reference import cache_file
from fastdpo.reference.cache_contents import prune, show
from fastdpo.values import as_age
from tests import tiny
from tests.reference.reference_runs import Counted, make_groups, packs_of
from tests.reference.test_cache_file import change
from tests.reference.test_cache_file import mounted as mounted
from tests.reference.test_fingerprint import learn, with_lora


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setenv("COLUMNS", "150")


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep/reference.sqlite"


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A cache of a model, and of it with an adapter: (path, their namespaces)."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("two") / "reference.sqlite"
    source = {"model": "me/model", "adapter": None, "stage": 0, "data": ["train.jsonl", "held_out.jsonl"]}
    one, _ = Counted().load(path, make_groups(40), source=source)
    source |= {"adapter": "runs/a/model", "data": ["[red]odd\x1b.jsonl"], "stage": 1}
    other, _ = Counted(learn(with_lora(tiny.policy()))).load(path, make_groups(80), source=source)
    return path, one.account["namespace"], other.account["namespace"]


@pytest.fixture
def copy(two, tmp_path):
    return Path(shutil.copy(two[0], tmp_path / "copy.sqlite"))


def console():
    return Console(record=True, file=open(os.devnull, "w"), width=150)


def shown(path):
    out = console()
    show(path, out)
    return out.export_text()


def pruned(path, *, older_than=None, namespaces=(), dry_run=False):
    out, age = console(), None if older_than is None else as_age("--older_than", older_than)
    prune(path, age, list(namespaces), dry_run, out)
    return out.export_text()


def age(path, days, namespace=None):
    """Makes the fills of a namespace (or all) so many days old."""
    then = (datetime.now(UTC) - timedelta(days=days)).isoformat(timespec="seconds")
    where = f" WHERE namespace = x'{namespace}'" if namespace else ""
    change(path, f"UPDATE fills SET started = '{then}'{where}")


def stored(path):
    database = sqlite3.connect(path)
    found = database.execute(
        "SELECT lower(hex(namespace)), count(*) FROM packs GROUP BY namespace"
    ).fetchall()
    database.close()
    return dict(found)


def test_what_is_shown_is_what_is_stored(two):
    path, one, other = two
    before = path.read_bytes()
    said = shown(path)
    assert f"{path}: 2 namespaces, " in said and " 0 bytes are free" in said
    first, second = (said[said.index(n[:8]) :] for n in (one, other))
    groups = make_groups(40)
    responses, tokens = sum(len(g.responses) for g in groups), sum(g.scored_tokens for g in groups)
    assert f"me/model, float32 {responses} {tokens:,}" in " ".join(first.split())
    assert "data: train.jsonl, held_out.jsonl" in first and "by: cpu (fastdpo" in first
    assert "me/model + adapter runs/a/model, after stage 1, float32" in second
    assert r"data: [red]odd\x1b.jsonl" in second
    assert f"{datetime.now():%Y-%m}" in first
    assert path.read_bytes() == before and [p.name for p in path.parent.iterdir()] == [path.name]


def test_what_older_files_lack_is_not_recorded(copy):
    database = sqlite3.connect(copy, isolation_level=None)
    for number, environment in database.execute("SELECT id, environment FROM fills").fetchall():
        old = json.loads(environment)
        for name in ("model", "adapter", "stage", "data"):
            old.pop(name)
        database.execute("UPDATE fills SET environment = ? WHERE id = ?", (json.dumps(old), number))
    database.close()
    said = shown(copy)
    assert said.count("model not recorded, float32") == said.count("data: not recorded") == 2


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE fills SET environment = x'ff00', started = 7",
        "UPDATE fills SET environment = '[1]', started = '2026-01-01T00:00:00'",
        "UPDATE namespaces SET parts = '{{'",
        "DELETE FROM namespaces",
        "UPDATE packs SET namespace = 'text', keys = NULL",
        "DELETE FROM fills",
    ],
)
def test_damaged_rows_are_shown_as_not_recorded(copy, two, statement):
    change(copy, statement)
    assert "namespaces, " in shown(copy)
    assert "0 namespaces, 0 responses would go" in pruned(copy, older_than="1d", dry_run=True)


def test_a_fill_says_what_it_is_of(tmp_path, capsys):
    model = tiny.save_model(tmp_path / "model")
    data, held = (tiny.write_jsonl(tmp_path / f"{n}.jsonl", tiny.rows(n)) for n in (12, 3))
    flags = ["--max_length", "64", "--dtype", "fp32", "--reference_cache", str(tmp_path / "file")]
    assert main(["ref", "--model", str(model), "--data", str(data), "--eval_data", str(held), *flags]) == 0
    capsys.readouterr()
    environment, *_ = sqlite3.connect(tmp_path / "file").execute("SELECT environment FROM fills").fetchone()
    recorded = json.loads(environment)
    assert recorded["model"] == str(model) and recorded["data"] == [str(data), str(held)]
    assert main(["cache", str(tmp_path / "file")]) == 0
    assert str(model)[:40] in capsys.readouterr().out


def test_from_python_the_model_s_own_name_is_recorded(path):
    counted = Counted()
    counted.policy.core.config.name_or_path = "me/its-own-name"
    counted.load(path, make_groups(2))
    said = shown(path)
    assert "me/its-own-name, float32" in said and "data: not recorded" in said


# Pruning


def test_pruning_by_age(copy, two):
    _, one, other = two
    age(copy, 29.9, one)
    age(copy, 31, other)
    untouched = copy.read_bytes()
    assert "1 namespace, " in pruned(copy, older_than="30d", dry_run=True) and copy.read_bytes() == untouched
    assert "0 namespaces, 0 responses removed, 0 bytes given back" in pruned(copy, older_than="32 days")
    said = pruned(copy, older_than="30d")
    assert other[:8] in said and one[:8] not in said and stored(copy).keys() == {one}
    given_back = len(untouched) - copy.stat().st_size
    assert given_back > 0 and f"{given_back / 1e3:.3g} kB given back" in said
    assert other[:8] not in shown(copy) and " 0 bytes are free" in shown(copy)
    pruned(copy, older_than="4w")
    assert stored(copy) == {} and f"{copy}: 0 namespaces" in shown(copy)


def test_a_namespace_is_as_old_as_its_last_fill(copy, two):
    _, one, _ = two
    age(copy, 90)
    Counted().load(copy, make_groups(41))  # one response more
    pruned(copy, older_than="1h")
    assert stored(copy).keys() == {one}


def test_pruning_by_namespace(copy, two):
    _, one, other = two
    before = stored(copy)
    with pytest.raises(ConfigError, match="no id begins with 'zz'"):
        pruned(copy, namespaces=[one[:6], "zz"])
    with pytest.raises(ConfigError, match="no id begins with ''"):
        pruned(copy, namespaces=[""])
    assert stored(copy) == before
    age(copy, 2, one)
    pruned(copy, namespaces=[one, other], older_than="1d")  # those of both
    assert stored(copy).keys() == {other}
    assert "1 namespace, " in pruned(copy, namespaces=[other[:8].upper(), other[:7]])
    assert stored(copy) == {}


def test_a_beginning_of_several_is_no_choice(copy, two):
    _, one, _ = two
    twin = one[:8] + "0" * 24
    change(copy, f"INSERT INTO namespaces VALUES (x'{twin}', '', '{{}}')")
    with pytest.raises(
        ConfigError, match=rf"several ids begin with '{one[:8]}' \(.*{twin[:12]}.*\): give more"
    ):
        pruned(copy, namespaces=[one[:8]])
    pruned(copy, namespaces=[twin[:10]])
    assert one in stored(copy)


@pytest.mark.parametrize("text", ["30", "soon", "-3d", "3m", "1.5d", "9999999d", "", "3 dwarfs"])
def test_what_is_no_age(copy, text):
    before = copy.read_bytes()
    with pytest.raises(ConfigError, match=r"--older_than: .* is not an age as in 12h, 30d or 2w"):
        pruned(copy, older_than=text)
    assert copy.read_bytes() == before


def test_ids_never_come_back(copy, two):
    """A run that goes on reads packs with higher ids than it has read."""
    (last,) = sqlite3.connect(copy).execute("SELECT max(id) FROM packs").fetchone()
    age(copy, 9)
    pruned(copy, older_than="1d")
    Counted().load(copy, make_groups(3))
    (first,) = sqlite3.connect(copy).execute("SELECT min(id) FROM packs").fetchone()
    assert first == last + 1


def test_a_run_that_fills_meanwhile_is_unharmed(path, monkeypatch):
    """Its connection stays open while another one removes all that it has stored, and shrinks the file."""
    monkeypatch.setattr(ref_cache, "COMMIT_SECONDS", 0)
    groups, counted = make_groups(40), Counted()
    values = counted.load(None, groups)[0].of(groups)

    def prune_twice():
        if len(counted.batches) in (3, 6):
            assert "1 namespace, " in pruned(path, namespaces=stored(path))
            assert stored(path) == {}

    table, said = counted.load(path, groups, check=prune_twice)
    assert torch.equal(table.of(groups), values) and "damaged" not in said
    assert "1 namespace, " in shown(path)
    again = Counted()
    table, said = again.load(path, groups)
    assert torch.equal(table.of(groups), values) and "damaged" not in said
    assert again.batches == packs_of(groups)[:6]  # what was removed, and nothing else


def test_a_run_that_has_read_is_unharmed(copy, two):
    """It found all and computes two rows more, when all that it found is gone."""
    groups, counted = make_groups(42), Counted()
    values = counted.load(None, groups)[0].of(groups)
    checked = []

    def remove():
        if not checked:
            checked.append(pruned(copy, namespaces=list(stored(copy))))

    table, said = counted.load(copy, groups, check=remove)
    assert checked and torch.equal(table.of(groups), values) and "damaged" not in said
    table, said = counted.load(copy, groups)
    assert torch.equal(table.of(groups), values) and "damaged" not in said


# Files that cannot be used


def test_a_file_that_is_not_there(tmp_path, capsys):
    auto = cache_file.cache_path("auto")
    for command in (["cache"], ["cache", "prune", "--older_than", "1d"]):
        assert main(command) == 0
        assert f"{auto}: nothing is stored yet" in " ".join(capsys.readouterr().out.split())
        assert main([*command[:2], str(tmp_path / "none"), *command[2:]]) == 2
        assert "there is no file" in capsys.readouterr().err
    assert not auto.exists() and list(tmp_path.iterdir()) == []
    (tmp_path / "empty").touch()
    assert "nothing is stored yet" in shown(tmp_path / "empty") and not (tmp_path / "empty").read_bytes()
    assert main(["cache", "prune"]) == 2 and "--older_than 30d" in capsys.readouterr().err


def others(content):
    yield b"notes", ConfigError, "is no SQLite file, and is left alone. Nothing was changed"
    yield bytes(100) + content[100:], TrainingError, r"is damaged \(file is not.*The next run moves it aside"
    yield content[:300], TrainingError, r"is damaged \(it is cut short\)"
    yield content[:9000], TrainingError, r"is damaged \(database disk image is malformed\)"


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize("act", [shown, lambda path: pruned(path, older_than="0d")])
def test_a_look_leaves_everything_as_it_is(two, tmp_path, number, act):
    content, error, words = list(others(two[0].read_bytes()))[number]
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(error, match=words):
        act(path)
    assert path.read_bytes() == content and [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("statement", ["CREATE TABLE mine (x)", "PRAGMA user_version = 9"])
def test_other_databases_are_refused(tmp_path, copy, statement):
    for path in (tmp_path / "other", copy):
        change(path, statement)
        before = path.read_bytes()
        for act in (shown, lambda path: pruned(path, older_than="0d")):
            with pytest.raises((ConfigError, TrainingError), match=r"Nothing was changed|newer fastdpo"):
                act(path)
        assert path.read_bytes() == before
    with pytest.raises(ConfigError, match="is a folder"):
        shown(tmp_path)


def test_a_read_only_file_is_shown(two, mounted, tmp_path):
    folder = mounted(tmp_path / "small", "size=4m")
    path = Path(shutil.copy(two[0], folder / "reference.sqlite"))
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    assert "2 namespaces" in shown(path)
    assert "2 namespaces, " in pruned(path, older_than="0d", dry_run=True)
    with pytest.raises(ConfigError, match=r"cannot be written.*Nothing was changed"):
        pruned(path, older_than="0d")


def test_a_full_disk_leaves_the_file_as_large(copy, two, mounted, tmp_path):
    _, one, other = two
    Counted().load(copy, make_groups(900, first=100), max_tokens=20_000)
    size = copy.stat().st_size
    folder = mounted(tmp_path / "small", f"size={size + 4096}")
    path = Path(shutil.copy(copy, folder / "reference.sqlite"))
    with pytest.raises(TrainingError, match=r"disk is full.*make room.*Nothing was changed"):
        pruned(path, namespaces=[other])
    assert stored(path).keys() == {one, other} and path.stat().st_size == size
    subprocess.run(["mount", "-o", f"remount,size={size + size // 3}", str(folder)], check=True)
    with pytest.raises(TrainingError, match=r"1 namespace, .* removed, but the file stays as large .*full"):
        pruned(path, namespaces=[other])
    assert stored(path).keys() == {one} and path.stat().st_size == size
    assert " 0 bytes are free" not in shown(path)
    subprocess.run(["mount", "-o", "remount,size=4m", str(folder)], check=True)
    assert "0 namespaces, 0 responses removed, 0 bytes" not in pruned(path, older_than="9w")
    assert path.stat().st_size < size and " 0 bytes are free" in shown(path)


def test_a_locked_file_is_told(copy, monkeypatch):
    monkeypatch.setattr(cache_file, "BUSY_SECONDS", 0.1)
    other = sqlite3.connect(copy, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    assert "2 namespaces" in shown(copy)  # beside one that writes
    with pytest.raises(TrainingError, match=r"locked.*Nothing was changed"):
        pruned(copy, older_than="0d")
    other.execute("ROLLBACK")
    assert "2 namespaces, " in pruned(copy, older_than="0d")
