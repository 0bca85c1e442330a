"""Log-probs by their keys: those that were added, of those that are wanted, out of a file."""

import os
import random
from pathlib import Path

import numpy as np
import pytest

from fastdpo.errors import TrainingError
from fastdpo.reference import values as module
from fastdpo.reference.values import Values, as_keys
from tests.reference.test_cache_file import mounted as mounted


def key(number: int) -> bytes:
    """Keys 0 to 9 begin alike, and so do the next ten."""
    return (number // 10).to_bytes(8) + (7 * number % 10).to_bytes(8)


def array(numbers) -> np.ndarray:
    return as_keys([key(number) for number in numbers])


def numbers_of(number: int) -> np.ndarray:
    return np.arange(1 + number % 5, dtype=np.float32) + number


def values_of(numbers, folder=None) -> Values:
    return Values(np.unique(array(numbers)), folder)


def add(values, numbers, anew=False, plus=0.0):
    some = [numbers_of(number) + np.float32(plus) for number in numbers]
    values.add(array(numbers), np.array([len(v) for v in some], np.int32), np.concatenate(some), anew)


def expected(numbers, plus=0.0):
    return np.concatenate([numbers_of(number) + np.float32(plus) for number in numbers])


@pytest.mark.parametrize("in_memory", [0, 100, 10**6])
def test_what_was_added_is_found_in_any_order(monkeypatch, in_memory):
    monkeypatch.setattr(module, "IN_MEMORY", in_memory)
    values, draw = values_of(range(60)), random.Random(0)
    order = draw.sample(range(60), 60)
    for start in range(0, 50, 7):
        add(values, order[start : start + 7])
    for n in (1, 2, 30, 56):
        some = draw.choices(order[:56], k=n)
        assert np.array_equal(values.of(array(some)), expected(some))
    in_a_row = order[3:40]  # read in one piece
    assert np.array_equal(values.of(array(in_a_row)), expected(in_a_row))
    assert values.count == 56 and values.known(array(range(60))).sum() == 56
    assert values.known(array(order[:56])).all() and not values.known(array(order[56:])).any()


def test_only_what_is_wanted_is_kept():
    values = values_of([3, 4, 15])
    add(values, [2, 3, 30, 4, 16])  # 2 and 16 begin as 3 and 15 do; 30 begins as no other
    assert values.known(array([2, 3, 30, 4, 16, 15])).tolist() == [False, True, False, True, False, False]
    assert values.count == 2 and np.array_equal(values.of(array([4, 3])), expected([4, 3]))
    assert values.of(array([3, 15])) is None and values.of(array([3, 2])) is None
    nothing = values_of([])
    add(nothing, [3])
    assert nothing.count == 0 and not nothing.known(array([3])).any() and not len(nothing.of(array([])))


def test_what_is_known_stays_unless_it_is_to_change():
    values = values_of(range(5))
    add(values, [0, 1, 2])
    add(values, [1, 2, 3], plus=0.5)
    assert np.array_equal(values.of(array(range(3))), expected(range(3)))
    assert np.array_equal(values.of(array([3])), expected([3], plus=0.5))
    add(values, [0, 1], anew=np.array([False, True]), plus=0.25)
    found = values.of(array([0, 1, 2]))
    assert np.array_equal(found, np.concatenate([expected([0]), expected([1], 0.25), expected([2])]))
    values.clear()
    assert values.count == 0 and not values.known(array(range(5))).any()


@pytest.mark.parametrize("anew", [False, True])
def test_the_first_of_several_at_once_is_kept(anew):
    values = values_of(range(5))
    add(values, [0])
    some = [numbers_of(number) + np.float32(plus) for plus in (1, 2) for number in (3, 99, 0)]
    lengths = np.array([len(v) for v in some], np.int32)
    values.add(array([3, 99, 0] * 2), lengths, np.concatenate(some), anew)
    np.testing.assert_array_equal(values.of(array([3])), expected([3], 1))
    np.testing.assert_array_equal(values.of(array([0])), expected([0], anew))
    assert values.count == 2


def test_found_numbers_may_be_changed():
    values = values_of([1])
    add(values, [1])
    values.of(array([1]))[:] = 0
    assert np.array_equal(values.of(array([1])), expected([1]))


@pytest.mark.parametrize("at_once", [1, 4, 4096])
def test_sums(at_once):
    values = values_of(range(30))
    add(values, range(30))
    some = [5, 3, 4, 29, 0, 5, 7]
    sums = values.sums(array(some), at_once)
    assert sums.dtype == np.float64 and sums.tolist() == [float(numbers_of(n).sum()) for n in some]
    assert not len(values.sums(array([])))


def open_files() -> list[str]:
    links = [Path("/proc/self/fd", name) for name in os.listdir("/proc/self/fd")]
    return [os.readlink(link) for link in links if link.is_symlink()]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="no /proc, which tells open files")
def test_the_numbers_are_in_a_file_without_a_name(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "IN_MEMORY", 4000)
    values, numbers = values_of(range(1000), tmp_path), list(range(1000))
    before = len(open_files())
    add(values, numbers[:100])
    assert len(open_files()) == before  # few stay in memory
    add(values, numbers[100:])
    (file,) = (name for name in open_files() if name.startswith(str(tmp_path)))
    assert file.endswith("(deleted)") and not list(tmp_path.iterdir())
    assert values._file.seek(0, os.SEEK_END) == 4 * len(expected(numbers))
    del values
    assert not [name for name in open_files() if name.startswith(str(tmp_path))]


def test_elsewhere_where_the_folder_cannot_be_written(tmp_path, monkeypatch):
    other = tmp_path / "other"
    other.mkdir()
    monkeypatch.setattr(module.tempfile, "tempdir", str(other))
    values = values_of([1], tmp_path / "not there")
    assert values._where == str(other) and values_of([1], tmp_path)._where == str(tmp_path)


@pytest.mark.parametrize("beside", [True, False], ids=["beside the cache", "in TMPDIR"])
def test_a_full_disk_is_told(mounted, tmp_path, monkeypatch, beside):
    monkeypatch.setattr(module, "IN_MEMORY", 4000)
    folder = mounted(tmp_path / "small", "size=64k")
    monkeypatch.setattr(module.tempfile, "tempdir", str(folder))
    numbers = list(range(30_000))
    values = values_of(numbers, folder if beside else None)
    add(values, numbers[:2000])
    way_out = "reference_cache to a file" if beside else "TMPDIR to a folder"
    with pytest.raises(TrainingError, match=rf"{folder} cannot be written .*No space left.*{way_out}"):
        add(values, numbers[2000:])
    assert values.count == 2000 and np.array_equal(values.of(array(numbers[:2000])), expected(numbers[:2000]))
