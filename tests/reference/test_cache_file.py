"""Damaged cache files, and ones that cannot be used: never a wrong value, never silence."""

import io
import os
import random
import shutil
import sqlite3
import subprocess
import tarfile
from pathlib import Path

import pytest
import torch

from fastdpo.data.packing import in_row_order
from fastdpo.errors import ConfigError, TrainingError
from fastdpo.reference import cache as ref_cache
from fastdpo.reference import cache_file
from tests.reference.reference_runs import Counted, make_groups, packs_of


@pytest.fixture(scope="module")
def counted():
    torch.manual_seed(0)
    return Counted()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep/reference.sqlite"


@pytest.fixture(scope="module")
def truth(counted, tmp_path_factory):
    """(groups, a cache file filled with them, their values)."""
    path, groups = tmp_path_factory.mktemp("truth") / "reference.sqlite", make_groups(40)
    table, _ = counted.load(path, groups)
    return groups, path, table.of(groups)


def change(path, statement):
    database = sqlite3.connect(path, isolation_level=None)
    database.execute(statement)
    database.close()


def say_and_compare(path, groups, values):
    """Loads a damaged file: the values must be right, and whatever was computed anew was announced."""
    counted = Counted()
    try:
        table, said = counted.load(path, groups)
    except ConfigError as error:  # a flip in the header can make it a newer one
        assert "format" in str(error) or "written" in str(error)
        return "refused"
    assert torch.equal(table.of(groups), values)
    if counted.batches:
        assert "is damaged" in said, said
        again = Counted()
        assert torch.equal(again.load(path, groups)[0].of(groups), values) and again.batches == []
        return "moved" if "moved to" in said else "pack"
    return "harmless"


def test_a_flipped_bit_anywhere_never_changes_a_value(truth, tmp_path):
    groups, path, values = truth
    content, draw, outcomes = path.read_bytes(), random.Random(0), []
    for i in range(150):
        damaged = bytearray(content)
        offset = draw.randrange(100 if i % 5 == 0 else len(content))  # the header often
        damaged[offset] ^= 1 << draw.randrange(8)
        copy = tmp_path / f"{i}/reference.sqlite"
        copy.parent.mkdir()
        copy.write_bytes(damaged)
        outcomes.append(say_and_compare(copy, groups, values))
        shutil.rmtree(copy.parent)
    assert {"moved", "pack", "harmless"} <= set(outcomes)


def test_a_file_that_was_cut_is_told_and_replaced(truth, tmp_path):
    groups, path, values = truth
    size, draw = path.stat().st_size, random.Random(1)
    for i, length in enumerate([1, 50, 600, 4096, *(draw.randrange(size) for _ in range(15)), size - 1]):
        copy = shutil.copy(path, tmp_path / f"{i}.sqlite")
        os.truncate(copy, length)
        outcome = say_and_compare(copy, groups, values)
        assert outcome == "moved" or (outcome == "pack" and length > size - 4096)  # in the last page
        if outcome == "moved":
            (aside,) = tmp_path.glob(f"{i}.sqlite.damaged-*")
            assert aside.name.endswith("-1") and aside.stat().st_size == length


def test_each_damaged_file_is_kept(counted, path):
    for n in (1, 2):
        path.parent.mkdir(exist_ok=True)
        content = b"SQLite format 3\0 and then nonsense %d" % n
        path.write_bytes(content)
        _, said = counted.load(path, make_groups(2))
        aside = f"{path}.damaged-{n}"
        assert f"moved to {aside}" in said and Path(aside).read_bytes() == content


def test_what_is_no_database_is_left_alone(counted, path):
    path.parent.mkdir(exist_ok=True)
    path.write_text("somebody's notes")
    with pytest.raises(ConfigError, match="is no SQLite file, and is left alone"):
        counted.load(path, make_groups(2))
    assert path.read_text() == "somebody's notes" and [p.name for p in path.parent.iterdir()] == [path.name]


def load_damaged(path, groups):
    """(values, what was said); ConfigError passes, and must leave the file as it was."""
    before = path.read_bytes()
    try:
        table, said = Counted().load(path, groups)
    except ConfigError:
        assert path.read_bytes() == before
        raise
    if "moved to" in said:
        (aside,) = path.parent.glob(f"{path.name}.damaged-1")
        assert aside.read_bytes() == before and f"moved to {aside}" in said
    return table.of(groups), said


@pytest.mark.parametrize("zeros", [1, 16, 72, 100, 512, 4096])
def test_a_header_of_zeros_is_damage(truth, tmp_path, zeros):
    groups, path, values = truth
    copy = tmp_path / "named/by.hand"
    copy.parent.mkdir()
    copy.write_bytes(bytes(zeros) + path.read_bytes()[zeros:])
    found, said = load_damaged(copy, groups)
    assert torch.equal(found, values) and "is damaged (file is not a database): moved to" in said


@pytest.mark.parametrize("size", [5, 100, 40_960, 1 << 22])
def test_zeros_alone_are_ours_by_their_name(truth, tmp_path, size):
    groups, _, values = truth
    for name in ("sweep.sqlite", "sweep.sqlite3", "sweep.db"):
        path = tmp_path / name
        path.touch()
        os.truncate(path, size)  # sparse, as after a power cut
        found, said = load_damaged(path, groups)
        assert torch.equal(found, values) and "moved to" in said
    path = tmp_path / "disk.img"
    path.write_bytes(bytes(size))
    with pytest.raises(ConfigError, match="is no SQLite file, and is left alone"):
        load_damaged(path, groups)


def foreign(truth):
    """Files that may quote or hold ours, and are somebody's."""
    _, path, _ = truth
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        archive.add(path, "reference.sqlite")
        archive.add(cache_file.__file__, "cache_file.py")
    yield "backup.tar", buffer.getvalue()
    yield "source.py", Path(cache_file.__file__).read_bytes()
    yield "notes.sqlite", b"somebody's notes"
    yield "zeros_first.sqlite", bytes(5000) + b"somebody's numbers" * 1000
    yield "zeros_long.sqlite", bytes(1 << 21) + b"1"
    yield "other_magic.db", b"SQLite format 2\0" + bytes(9000)


def test_what_is_somebody_s_is_left_alone_unless_it_is_where_only_ours_is(truth, tmp_path):
    groups, _, values = truth
    for name, content in foreign(truth):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match="is no SQLite file, and is left alone"):
            load_damaged(tmp_path / name, groups)
        auto = cache_file.cache_path("auto")
        shutil.rmtree(auto.parent, ignore_errors=True)
        auto.parent.mkdir(parents=True)
        auto.write_bytes(content)
        found, said = load_damaged(auto, groups)
        assert torch.equal(found, values) and "moved to" in said
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(name for name, _ in foreign(truth))


def test_our_tables_under_another_program_s_header_are_damage(truth, tmp_path):
    groups, path, values = truth
    copy = Path(shutil.copy(path, tmp_path / "copy.bin"))
    change(copy, "PRAGMA application_id = 7")
    found, said = load_damaged(copy, groups)
    assert torch.equal(found, values) and "its header is not that of a reference cache" in said


def half_written(path):
    """(file, journal) of a cache that was killed in a commit, when part of it was in the file already."""
    database = sqlite3.connect(path, isolation_level=None)
    database.execute("PRAGMA cache_size = 2")
    database.execute("BEGIN IMMEDIATE")
    database.execute("DELETE FROM packs WHERE id % 2 = 0")
    database.executemany("INSERT INTO packs (keys) VALUES (randomblob(?))", [(900,)] * 30)
    database.execute("INSERT INTO namespaces VALUES (randomblob(16), '', ?)", ("x" * 900,))
    written = path.read_bytes(), Path(f"{path}-journal").read_bytes()
    database.execute("ROLLBACK")
    database.close()
    return written


def damaged(content, draw, kind):
    out = bytearray(content)
    at = draw.randrange(600 if draw.random() < 0.3 else len(out))  # the header often
    length = draw.choice([1, 16, 512, 4096])
    if kind == "flip":
        out[at] ^= 1 << draw.randrange(8)
    elif kind == "zeros":
        out[at : at + length] = bytes(len(out[at : at + length]))
    elif kind == "head":
        out[:length] = bytes(length)
    else:
        del out[at:]
    return bytes(out)


def test_damage_to_a_file_and_its_journal_never_changes_a_value(truth, tmp_path):
    groups, path, values = truth
    file, journal = half_written(Path(shutil.copy(path, tmp_path / "half.sqlite")))
    cases, draw = [(file, journal), (file, None), (file, b"")], random.Random(2)
    for kind in ("flip", "zeros", "head", "cut"):
        for _ in range(12):
            cases += [(damaged(file, draw, kind), journal), (file, damaged(journal, draw, kind))]
    outcomes = []
    for number, (file, journal) in enumerate(cases):
        copy = tmp_path / f"{number}/reference.bin"
        copy.parent.mkdir()
        copy.write_bytes(file)
        if journal is not None:
            Path(f"{copy}-journal").write_bytes(journal)
        counted = Counted()
        table, said = counted.load(copy, groups)
        assert torch.equal(table.of(groups), values)
        assert not counted.batches or "is damaged" in said or copy.stat().st_size == 0, said
        outcomes.append("moved" if "moved to" in said else "pack" if counted.batches else "harmless")
        shutil.rmtree(copy.parent)
    assert outcomes[0] == "harmless" and {"moved", "pack", "harmless"} == set(outcomes)


def test_a_damaged_pack_is_named_and_only_it_is_computed(truth, tmp_path, counted):
    groups, path, values = truth
    copy = shutil.copy(path, tmp_path / "copy.sqlite")
    change(copy, "UPDATE packs SET logps = zeroblob(length(logps)) WHERE id = 3")
    table, said = counted.load(copy, groups)
    third = packs_of(groups)[2]
    n = sum(len(groups[row].responses) for row in third)
    assert counted.batches == [third] and torch.equal(table.of(groups), values)
    assert f"{copy}: pack 3 is damaged: its {n} responses" in said
    assert "is damaged" not in counted.load(copy, groups)[1]


def test_a_pack_of_an_unknown_namespace_is_damage(truth, tmp_path, counted):
    groups, path, values = truth
    copy = shutil.copy(path, tmp_path / "copy.sqlite")
    change(copy, "UPDATE packs SET namespace = randomblob(16) WHERE id = 2")
    table, said = counted.load(copy, groups)
    assert counted.batches == [packs_of(groups)[1]] and torch.equal(table.of(groups), values)
    assert "pack 2 is damaged" in said and "pack 2" not in counted.load(copy, groups)[1]


def test_tables_that_changed_are_damage(truth, tmp_path, counted):
    groups, path, values = truth
    copy = shutil.copy(path, tmp_path / "copy.sqlite")
    change(copy, "ALTER TABLE fills ADD COLUMN more TEXT")
    table, said = counted.load(copy, groups)
    assert "its tables are not those" in said and f"moved to {copy}.damaged-1" in said
    assert torch.equal(table.of(groups), values) and len(counted.batches) == len(packs_of(groups))


def test_damage_while_a_fill_runs_loses_nothing_of_this_run(truth, path, monkeypatch):
    monkeypatch.setattr(ref_cache, "COMMIT_SECONDS", 0)
    groups, _, values = truth
    counted = Counted()

    def overwrite():
        if len(counted.batches) == 3:
            with open(path, "r+b") as file:
                file.write(b"x" * path.stat().st_size)

    table, said = counted.load(path, groups, check=overwrite)
    assert "moved to" in said and torch.equal(table.of(groups), values)
    again = Counted()
    assert torch.equal(again.load(path, groups)[0].of(groups), values)
    assert again.batches == packs_of(groups)[:3]  # the new file lacks only what the old one had


# Files that cannot be used


def test_a_newer_format_is_refused_and_left_alone(counted, path):
    counted.load(path, make_groups(2))
    change(path, f"PRAGMA user_version = {cache_file.VERSION + 1}")
    before = path.read_bytes()
    with pytest.raises(
        ConfigError, match=f"format {cache_file.VERSION + 1}.*format {cache_file.VERSION}.*Upgrade"
    ):
        counted.load(path, make_groups(2))
    assert path.read_bytes() == before and len(list(path.parent.iterdir())) == 1


def test_another_programs_database_is_refused_and_left_alone(counted, path):
    path.parent.mkdir()
    change(path, "CREATE TABLE packs (mine TEXT)")
    before = path.read_bytes()
    with pytest.raises(ConfigError, match=r"reference_cache: .*other SQLite database"):
        counted.load(path, make_groups(2))
    assert path.read_bytes() == before


def test_a_folder_and_a_path_through_a_file_are_refused(counted, tmp_path):
    with pytest.raises(ConfigError, match=r"reference_cache: .* is a folder; name a file"):
        counted.load(tmp_path, make_groups(2))
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"reference_cache: .*off"):
        counted.load(tmp_path / "file/reference.sqlite", make_groups(2))
    assert counted.batches == []


@pytest.fixture
def mounted(tmp_path):
    """mount(folder, options): a small tmpfs there, until the test ends."""
    folders = []

    def mount(folder, options):
        folder.mkdir(exist_ok=True)
        command = ["mount", "-t", "tmpfs", "-o", options, "tmpfs", str(folder)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            pytest.skip(f"this test mounts a tmpfs, which is not allowed here: {done.stderr.strip()}")
        folders.append(folder)
        return folder

    yield mount
    for folder in folders:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def test_a_read_only_cache_serves_what_it_has(counted, truth, mounted, tmp_path):
    groups, path, values = truth
    folder = mounted(tmp_path / "small", "size=4m")
    copy = shutil.copy(path, folder / "reference.sqlite")
    other = shutil.copy(path, folder / "damaged.sqlite")
    change(other, "UPDATE packs SET digest = zeroblob(16) WHERE id = 1")
    shutil.copy(path, folder / "cut.sqlite")
    os.truncate(folder / "cut.sqlite", 5000)
    subprocess.run(["mount", "-o", "remount,ro", str(folder)], check=True)
    table, _ = counted.load(copy, groups)
    assert counted.batches == [] and torch.equal(table.of(groups), values)
    for file, rows in ((copy, make_groups(41)), (other, groups), (folder / "new.sqlite", groups)):
        with pytest.raises(ConfigError, match=r"reference_cache: .*cannot be written.*reference_cache to"):
            counted.load(file, rows)
        assert counted.batches == []  # known before anything is computed
    later = groups[len(packs_of(groups)[0]) :]
    table, said = counted.load(other, later)  # the damaged pack is not among them
    assert "pack 1 is damaged" in said and torch.equal(table.of(later), values[-len(table.of(later)) :])
    with pytest.raises(ConfigError, match=r"is damaged .*cannot be moved aside"):
        counted.load(folder / "cut.sqlite", groups)


def test_a_full_disk_keeps_what_is_stored(counted, mounted, tmp_path, monkeypatch):
    monkeypatch.setattr(ref_cache, "COMMIT_SECONDS", 0)
    folder = mounted(tmp_path / "small", "size=64k")
    path, groups = folder / "reference.sqlite", make_groups(800)
    truth = counted.load(None, groups, max_tokens=1000)[0].of(groups)
    with pytest.raises(TrainingError, match=r"disk is full.*is kept.*make room"):
        counted.load(path, groups, max_tokens=1000)
    computed = len(counted.batches)
    subprocess.run(["mount", "-o", "remount,size=8m", str(folder)], check=True)
    table, said = counted.load(path, groups, max_tokens=1000)
    all_packs = len(in_row_order(groups, 1000))
    assert len(counted.batches) == all_packs - (computed - 1) < all_packs  # only the last one was lost
    assert torch.equal(table.of(groups), truth) and "is damaged" not in said


def test_a_locked_file_is_told(counted, path, monkeypatch):
    monkeypatch.setattr(cache_file, "BUSY_SECONDS", 0.1)
    counted.load(path, make_groups(2))
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    counted.load(path, make_groups(2))  # reading goes on beside a writer
    with pytest.raises(TrainingError, match=r"locked"):
        counted.load(path, make_groups(3))
    other.execute("ROLLBACK")
    counted.load(path, make_groups(3))
