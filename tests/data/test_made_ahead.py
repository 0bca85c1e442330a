"""Microbatches with images are made one ahead, in a thread; others when they are asked for."""

import threading
from dataclasses import replace

import pytest

from fastdpo.data.packing import Packing, pack
from fastdpo.errors import DataError
from fastdpo.preferences import Image
from tests.tiny import group


def parts(with_images):
    image = Image(b"", (1, 1), lambda: None)
    return [[replace(group(row, 4, [2, 3]), images=(image,) * with_images)] for row in range(4)]


def record(made, fails=None):
    def make(part):
        made.append((part[0].row, threading.current_thread() is threading.main_thread()))
        if part[0].row == fails:
            raise DataError(f"row {fails}: no image")
        return pack(part)

    return make


def test_text_is_packed_when_it_is_asked_for():
    made = []
    for number, batch in enumerate(Packing(parts(0), record(made))):
        assert batch.rows == (number,) and made == [(row, True) for row in range(number + 1)]


def test_images_are_made_one_ahead_in_order():
    made, seen = [], []
    for batch in Packing(parts(1), record(made), stands_in=True):
        seen.append((batch.rows, batch.stands_in))
        assert len(made) <= len(seen) + 1
    assert made == [(0, True), (1, False), (2, False), (3, False)]
    assert seen == [((0,), False), ((1,), False), ((2,), False), ((3,), True)]


def test_what_fails_there_is_raised_here_in_its_turn():
    made, seen = [], []
    with pytest.raises(DataError, match="row 2: no image"):
        for batch in Packing(parts(1), record(made, fails=2)):
            seen.append(batch.rows)
    assert seen == [(0,), (1,)]


def test_an_iteration_that_ends_early_leaves_no_thread():
    before = threading.active_count()
    batches = iter(Packing(parts(1), record([])))
    next(batches)
    batches.close()
    assert threading.active_count() == before
