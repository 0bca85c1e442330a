"""Rows of a JSON file, each with its line: an array, or an object a line. Read with json, not Arrow: rows
need not have the same types, and an error can name the line."""

import io
import json
import re
import shlex
from collections import Counter
from collections.abc import Collection, Iterator
from pathlib import Path

from fastdpo.data.files.encoding import decode, read_bytes
from fastdpo.data.report import RowProblem
from fastdpo.errors import DataError

_FAULTS = (ValueError, RecursionError)  # not JSON, an integer of too many digits; nested too deeply
_SPACE = re.compile(r"[ \t\r\n]*")  # JSON's own; \s is more


def read_json(file: Path, columns: Collection[str]) -> Iterator[tuple[object, int]]:
    """Each row and its line; a RowProblem for a line that is no JSON. A .jsonl is read by line whatever it
    begins with, a .json that begins with [ is an array. `columns`: what a row may have. Raises DataError."""
    raw = read_bytes(file)
    if file.suffix == ".json":
        if re.match(rb"\s*\[", raw):
            return _array(decode(raw, file), file)
        _refuse_rows_under_a_key(raw, file, columns)
    return _lines(raw, file)


def _array(text: str, file: Path) -> Iterator[tuple[object, int]]:
    """A JSON array's items, each with the line it starts on."""
    skip = lambda at: _SPACE.match(text, at).end()  # type: ignore[union-attr]
    at, line, seen = skip(text.index("[") + 1), 1, 0
    more = text[at : at + 1] != "]"
    while more:
        line, seen = line + text.count("\n", seen, at), at
        if text[at : at + 1] in (",", "]"):
            raise _not_json(
                file, line, "a comma too many, or an item missing, between two commas or before ]"
            )
        try:
            row, at = _DECODER.raw_decode(text, at)
        except _FAULTS as error:
            why = "the array has no end" if at == len(text) else _reason(error)
            raise _not_json(file, line, why) from None
        yield row, line
        at = skip(at)
        more = text[at : at + 1] == ","
        if not more and text[at : at + 1] != "]":
            line += text.count("\n", seen, at)
            raise _not_json(
                file, line, "a comma or ] is missing" if at < len(text) else "the array has no end"
            )
        at = skip(at + 1) if more else at
    if skip(at + 1) < len(text):
        line = text.count("\n", 0, skip(at + 1)) + 1
        why = "the array ends before it. Where each line of the file is a row, rename it .jsonl"
        raise _not_json(file, line, why)


class _KeyTwice(ValueError):
    """Python would take the last of the values without a word."""


def _object(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise _KeyTwice(f"the key {key!r} is there twice; remove one")
    return found


_DECODER = json.JSONDecoder(object_pairs_hook=_object)


def _not_json(file: Path, line: int, why: str) -> DataError:
    return DataError(f"data: {file} is not JSON from line {line} on: {why}")


def _lines(raw: bytes, file: Path) -> Iterator[tuple[object, int]]:
    good, first, way_out = False, None, "a file that is one array is to be named .json"
    for line, content in enumerate(io.BytesIO(raw), start=1):
        if not content.strip():
            continue
        row: object
        hint = f"; {way_out}" if content.lstrip()[:1] == b"[" and file.suffix != ".json" else ""
        try:
            row, good = _DECODER.decode(content.decode("utf-8").rstrip("\r\n")), True
            if hint:
                row = RowProblem("wrong_type", f"line {line}", f"a row is an object, not a list{hint}")
        except UnicodeDecodeError as error:
            why = f"byte {content[error.start]:#x} is not UTF-8; correct it, or save the file as UTF-8"
            row = RowProblem("not_utf8", f"line {line}", why)
        except _FAULTS as error:
            why = f"not JSON: {_reason(error, in_line=True)}{hint}"
            row = RowProblem("invalid_json", f"line {line}", why)
        if isinstance(row, RowProblem):
            first = first or row
        yield row, line
    if first and not good:
        lines = f"Where a row goes over several lines: {_jq('-c .', file, 'rows.jsonl')}"
        if file.suffix == ".json":
            raise DataError(f"data: {file} is neither a JSON array nor one object a line: {first}. {lines}")
        raise DataError(f"data: {file} has no line that is JSON: {first}. {lines}; {way_out}")


def _reason(error: Exception, in_line: bool = False) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (character {error.colno})" if in_line else str(error)
    if isinstance(error, _KeyTwice):
        return str(error)
    nested = isinstance(error, RecursionError)
    return "it is nested too deeply" if nested else "an integer has too many digits"


def _jq(program: str, file: Path, to: str) -> str:
    return f"jq {program} {shlex.quote(str(file))} > {to}"


def _is_table(whole: dict) -> bool:
    """As pandas writes one: {column: {"0": ...}}, {"0": {column: ...}} or {columns, index, data}."""
    numbered = lambda value: isinstance(value, dict) and bool(value) and all(map(str.isdigit, value))
    parts = list(whole.values())
    by_row = numbered(whole) and all(isinstance(part, dict) for part in parts)
    by_column = bool(parts) and all(map(numbered, parts))
    return by_row or by_column or whole.keys() == {"columns", "index", "data"}


def _refuse_rows_under_a_key(raw: bytes, file: Path, columns: Collection[str]) -> None:
    """Raises DataError for a file that is one object and no row: {"data": [row, ...]}."""
    first, more = re.match(rb"\s*([^\n]*)\s*(\S?)", raw).groups()  # type: ignore[union-attr]
    try:
        if more:
            json.loads(first)
            return  # an object a line
    except _FAULTS:
        pass
    try:
        whole = json.loads(raw)
    except _FAULTS:
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
