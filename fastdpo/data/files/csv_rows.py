"""Rows of a CSV file, each with its line. Text is text, also where it looks like a number or a null ("007",
"None"); only the columns whose meaning is a number or a truth value are read as one."""

import csv
import io
import re
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from fastdpo.data.files.encoding import decode, read_bytes
from fastdpo.data.report import RowProblem
from fastdpo.errors import DataError

_LONGEST_CELL = 2**31 - 1  # what a C long holds everywhere; Python's own limit is 128 KiB
_QUOTED = re.compile(r'(?<![^,\r\n])"[^"]*(?:""[^"]*)*"?')  # a cell's start, and its end where it has one


def read_csv(file: Path, numbers: Collection[str]) -> Iterator[tuple[object, int]]:
    """Each row and the line it starts on; a RowProblem for one with too few cells or too many. `numbers` are
    the columns of numbers and truth values. Raises DataError."""
    text = decode(read_bytes(file), file)
    before = csv.field_size_limit(_LONGEST_CELL)
    try:
        yield from _rows(text, file, numbers)
    finally:
        csv.field_size_limit(before)


def _rows(text: str, file: Path, numbers: Collection[str]) -> Iterator[tuple[object, int]]:
    reader, header, line = csv.reader(io.StringIO(text, newline=""), strict=True), None, 1
    try:
        for cells in reader:
            if cells and header is None:
                header = _checked(cells, file)
            elif cells and header:
                if len(cells) == len(header):
                    row = dict(zip(header, cells))
                    yield {n: _value(cell) if n in numbers else cell for n, cell in row.items()}, line
                else:
                    why = f"{len(cells)} cells, where the header has {len(header)}; quote cells with commas"
                    yield RowProblem("cell_count", f"line {line}", why), line
            line = reader.line_num + 1
    except csv.Error as error:
        opened = line + _opened("".join(io.StringIO(text, newline="").readlines()[line - 1 :]))
        way_out = (
            'Close it after its last word; a quote within a cell is written twice, as in "a ""word"" here"'
        )
        why = f"the quote that opens on line {opened} is not closed where its cell ends ({error})"
        raise DataError(f"data: {file}: {why}. {way_out}.") from None


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
