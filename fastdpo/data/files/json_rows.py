"""Rows of a JSON file, each with its line: an array, or an object a line. Read with json, not Arrow: rows
need not have the same types, and an error can name the line."""

import json
import shlex
from collections.abc import Collection
from functools import partial
from pathlib import Path

from fastdpo.data.files.encoding import text_start
from fastdpo.data.files.file_rows import FileRows, line_positions
from fastdpo.data.files.json_text import DECODER, FAULTS, Window, array_positions, reason
from fastdpo.data.files.stamps import pieces, stamp_of
from fastdpo.data.report import RowProblem
from fastdpo.errors import DataError

_NAME_IT = "a file that is one array is to be named .json"


def json_rows(file: Path, columns: Collection[str]) -> FileRows:
    """A file's rows; a RowProblem for a line that is no JSON. A .jsonl is read by line whatever it begins
    with, a .json that begins with [ is an array. `columns`: what a row may have. Raises DataError."""
    stamp, at, is_json = stamp_of(file), text_start(file), file.suffix == ".json"
    if is_json and _begins(file, at) == b"[":
        return FileRows(file, stamp, *array_positions(file, at), _item)
    rows = FileRows(file, stamp, *line_positions(file, at), partial(_line, hint="" if is_json else _NAME_IT))
    if is_json and len(rows):
        _refuse_rows_under_a_key(rows, columns)
    _refuse_without_json(rows)
    return rows


def _begins(file: Path, at: int) -> bytes:
    """The first byte that is no white space."""
    return next((piece.lstrip()[:1] for piece in pieces(file, at) if piece.strip()), b"")


def _item(raw: bytes, line: int) -> object:
    return DECODER.raw_decode(raw.decode("utf-8"))[0]


def _line(raw: bytes, line: int, hint: str) -> object:
    """`hint`: where the line begins with [, what to do if the file is meant as one array."""
    content = raw.partition(b"\n")[0]  # what follows are blank lines
    hint = f"; {hint}" if hint and content.lstrip()[:1] == b"[" else ""
    try:
        row: object = DECODER.decode(content.decode("utf-8").rstrip("\r"))
    except UnicodeDecodeError as error:
        why = f"byte {content[error.start]:#x} is not UTF-8; correct it, or save the file as UTF-8"
        return RowProblem("not_utf8", f"line {line}", why)
    except FAULTS as error:
        return RowProblem("invalid_json", f"line {line}", f"not JSON: {reason(error, in_line=True)}{hint}")
    return RowProblem("wrong_type", f"line {line}", f"a row is an object, not a list{hint}") if hint else row


def _refuse_without_json(rows: FileRows) -> None:
    """Raises DataError for a file without any line that is JSON; reads on to the first one that is."""
    first = None
    for row in rows.range(0, len(rows)):
        if not isinstance(row, RowProblem) or row.reason == "wrong_type":
            return
        first = first or row
    if first:
        file = rows.file
        lines = f"Where a row goes over several lines: {_jq('-c .', file, 'rows.jsonl')}"
        if file.suffix == ".json":
            raise DataError(f"data: {file} is neither a JSON array nor one object a line: {first}. {lines}")
        raise DataError(f"data: {file} has no line that is JSON: {first}. {lines}; {_NAME_IT}")


def _jq(program: str, file: Path, to: str) -> str:
    return f"jq {program} {shlex.quote(str(file))} > {to}"


def _is_table(whole: dict) -> bool:
    """As pandas writes one: {column: {"0": ...}}, {"0": {column: ...}} or {columns, index, data}."""
    numbered = lambda value: isinstance(value, dict) and bool(value) and all(map(str.isdigit, value))
    parts = list(whole.values())
    by_row = numbered(whole) and all(isinstance(part, dict) for part in parts)
    by_column = bool(parts) and all(map(numbered, parts))
    return by_row or by_column or whole.keys() == {"columns", "index", "data"}


def _refuse_rows_under_a_key(rows: FileRows, columns: Collection[str]) -> None:
    """Raises DataError for a file that is one object and no row: {"data": [row, ...]}."""
    file, window = rows.file, Window(rows.file, int(rows.starts[0]))
    try:
        window.skip()
        whole = window.value(json.JSONDecoder())
        if window.skip():
            return  # an object a line
    except (*FAULTS, DataError):
        return
    if not isinstance(whole, dict):
        return
    if _is_table(whole):
        raise DataError(
            f"data: {file} is one object that holds a table; write an object a row; with pandas, "
            'to_json(PATH, orient="records", lines=True)'
        )
    if not whole.keys().isdisjoint(columns):
        return
    is_rows = lambda value: isinstance(value, list) and all(isinstance(row, dict) for row in value)
    if keys := [key for key, value in whole.items() if is_rows(value)]:
        take = _jq(shlex.quote(f".[{json.dumps(keys[0])}]"), file, "rows.json")
        held = " and ".join(map(repr, keys))
        raise DataError(
            f"data: {file} is one object that holds rows under {held}; give the list alone: {take}"
        )
