"""Rows of a CSV file, each with its line. Text is text, also where it looks like a number or a null ("007",
"None"); only the columns whose meaning is a number or a truth value are read as one."""

import contextlib
import csv
import io
import re
from array import array
from collections import Counter
from collections.abc import Collection, Iterator
from functools import partial
from pathlib import Path

import numpy as np

from fastdpo.data.files.encoding import check_text, text_start
from fastdpo.data.files.file_rows import FileRows
from fastdpo.data.files.stamps import reading, stamp_of
from fastdpo.data.report import RowProblem
from fastdpo.errors import DataError

_LONGEST_CELL = 2**31 - 1  # what a C long holds everywhere; Python's own limit is 128 KiB
_CLOSE_IT = 'Close it after its last word; a quote within a cell is written twice, as in "a ""word"" here"'
_QUOTED = re.compile(r'(?<![^,\r\n])"[^"]*(?:""[^"]*)*"?')  # a cell's start, and its end where it has one


def csv_rows(file: Path, numbers: Collection[str]) -> FileRows:
    """The rows of a file; a RowProblem for one with too few cells or too many. `numbers` are the columns of
    numbers and truth values. Raises DataError."""
    stamp, at = stamp_of(file), text_start(file)
    try:
        with _long_cells():
            header, starts, lines = _positions(file, at)
    except (DataError, UnicodeDecodeError):
        check_text(file)  # what is not UTF-8 is told before all else
        raise
    return FileRows(file, stamp, starts, lines, partial(_row, header=header, numbers=frozenset(numbers)))


def _positions(file: Path, at: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """(the header, where each row begins and behind them where the file ends, their lines)."""
    read: list[str] = []  # the lines of a row
    header: list[str] = []
    starts, lines, line = array("q"), array("i"), 1
    with reading(file) as opened:
        opened.seek(at)
        text = io.TextIOWrapper(opened, encoding="utf-8", newline="")

        def parts() -> Iterator[str]:
            for part in text:
                read.append(part)
                yield part

        reader = csv.reader(parts(), strict=True)
        try:
            for cells in reader:
                if cells and not header:
                    header = _checked(cells, file)
                elif cells:
                    starts.append(at)
                    lines.append(line)
                at += sum(len(part) if part.isascii() else len(part.encode()) for part in read)
                read.clear()
                line = reader.line_num + 1
        except csv.Error as error:
            opened_on = line + _opened("".join(read))
            why = f"the quote that opens on line {opened_on} is not closed where its cell ends ({error})"
            raise DataError(f"data: {file}: {why}. {_CLOSE_IT}.") from None
    starts.append(at)
    return header, np.array(starts, np.int64), np.array(lines, np.int32)


def _row(raw: bytes, line: int, header: list[str], numbers: Collection[str]) -> object:
    with _long_cells():
        cells = next(csv.reader(io.StringIO(raw.decode("utf-8"), newline=""), strict=True))
    if len(cells) == len(header):
        return {n: _value(cell) if n in numbers else cell for n, cell in zip(header, cells)}
    why = f"{len(cells)} cells, where the header has {len(header)}; quote cells with commas"
    return RowProblem("cell_count", f"line {line}", why)


@contextlib.contextmanager
def _long_cells() -> Iterator[None]:
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)


def _checked(header: list[str], file: Path) -> list[str]:
    """Raises DataError for a header that cannot be one."""
    if len(header) == 1 and (found := re.search("[;|\t]", header[0])):
        by = {";": "semicolons", "|": "bars", "\t": "tabs"}[found[0]]
        raise DataError(
            f"data: {file} is separated by {by}, not commas. Save it with commas between the cells."
        )
    if twice := [name for name, times in Counter(header).items() if times > 1]:
        raise DataError(f"data: {file} has several columns of the name {twice[0]!r}; rename all but one.")
    return header


def _value(cell: str) -> object:
    """The number or truth value that a cell spells, None for an empty one; other text as it is, which formats
    refuse."""
    word = cell.strip()
    if word.lower() in ("", "true", "false"):
        return {"": None, "true": True, "false": False}[word.lower()]
    for kind in (int, float):
        try:
            return cell if "_" in word else kind(word)  # Python's 1_000 is no CSV's
        except ValueError:
            pass
    return cell


def _opened(text: str) -> int:
    """How many lines before the first quoted cell that is not closed, or has text after its closing quote."""
    for cell in _QUOTED.finditer(text):
        if cell[0].count('"') % 2 or text[cell.end() : cell.end() + 1] not in ("", ",", "\r", "\n"):
            return len(io.StringIO(text[: cell.start()] + "x", newline="").readlines()) - 1
    return 0
