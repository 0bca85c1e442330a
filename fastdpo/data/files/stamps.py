"""Files that are read piece by piece, and that must stay what they are meanwhile."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NamedTuple

from fastdpo.errors import DataError

PIECE = 1 << 22  # bytes


class Stamp(NamedTuple):
    """What a file's system tells of it."""

    size: int
    modified: int
    inode: int

    @classmethod
    def of(cls, file: Path | int) -> "Stamp":
        found = os.stat(file)
        return cls(found.st_size, found.st_mtime_ns, found.st_ino)


def stamp_of(file: Path) -> Stamp:
    """Raises DataError."""
    try:
        return Stamp.of(file)
    except OSError as error:
        raise _unreadable(file, error) from None


def check_unchanged(file: Path, stamp: Stamp) -> None:
    """Raises DataError where the file is not what it was."""
    if not file.exists():
        raise _changed(file, "it is gone")
    if stamp_of(file) != stamp:
        raise _changed(file, "it was written to, or replaced")


@contextlib.contextmanager
def reading(file: Path) -> Iterator[BinaryIO]:
    """The file, opened. Raises DataError, also for what fails inside."""
    try:
        with open(file, "rb") as opened:
            yield opened
    except OSError as error:
        raise _unreadable(file, error) from None


def pieces(file: Path, at: int = 0, size: int | None = None) -> Iterator[bytes]:
    """The file from a byte on. Raises DataError."""
    with reading(file) as opened:
        opened.seek(at)
        while piece := opened.read(size or PIECE):
            yield piece


def read_at(file: Path, stamp: Stamp, at: int, size: int) -> bytes:
    """These bytes, of a file that is what it was. Raises DataError."""
    if not file.exists():
        raise _changed(file, "it is gone")
    with reading(file) as opened:
        if Stamp.of(opened.fileno()) == stamp:
            opened.seek(at)
            raw = opened.read(size)
            if len(raw) == size:
                return raw
    raise _changed(file, "it was written to, or replaced")


def _changed(file: Path, what: str) -> DataError:
    return DataError(f"data: {file} changed while it was read ({what}); let it be, and run again")


def _unreadable(file: Path, error: OSError) -> DataError:
    return DataError(f"data: cannot read {file}: {error}")
