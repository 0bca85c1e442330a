"""JSON that goes over several lines, read value by value through a window on the file."""

import json
import re
from array import array
from collections import Counter
from pathlib import Path

import numpy as np

from fastdpo.data.files.encoding import text_pieces
from fastdpo.errors import DataError

FAULTS = (ValueError, RecursionError)  # not JSON, an integer of too many digits; nested too deeply
_SPACE = re.compile(r"[ \t\r\n]*")  # JSON's own
_MORE_SPACE = re.compile(r"\s*", re.ASCII)  # what may stand before an array, as bytes.strip has it


class _KeyTwice(ValueError):
    """Python would take the last of the values without a word."""


def _object(pairs: list[tuple[str, object]]) -> dict:
    found = dict(pairs)
    if len(found) < len(pairs):
        ((key, _),) = Counter(key for key, _ in pairs).most_common(1)
        raise _KeyTwice(f"the key {key!r} is there twice; remove one")
    return found


DECODER = json.JSONDecoder(object_pairs_hook=_object)


def reason(error: Exception, in_line: bool = False) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg} (character {error.colno})" if in_line else str(error)
    if isinstance(error, _KeyTwice):
        return str(error)
    nested = isinstance(error, RecursionError)
    return "it is nested too deeply" if nested else "an integer has too many digits"


class Window:
    """As much of a file's text as is needed, and a place in it."""

    def __init__(self, file: Path, at: int):
        self._pieces = text_pieces(file, at)
        self._text, self._at = "", 0
        self.byte, self.line = at, 1  # of the place
        self._chars = self._column = 0  # before the window: in all, and on the line where it begins

    def skip(self, space: re.Pattern[str] = _SPACE) -> str:
        """To what is no white space: its first character, nothing at the file's end."""
        while True:
            self._go(space.match(self._text, self._at).end())  # type: ignore[union-attr]
            if self._at < len(self._text) or not self._more():
                return self._text[self._at : self._at + 1]

    def step(self) -> None:
        """Over a character."""
        self._go(self._at + 1)

    def value(self, decoder: json.JSONDecoder = DECODER) -> object:
        """The value that begins here, and the place behind it. Raises one of FAULTS, whose places are those
        in the whole text."""
        while True:
            try:
                value, end = decoder.raw_decode(self._text, self._at)
                if len(self._text) - end >= 3 or not self._more():  # or it was 1 of 1.5, or of 1e-5
                    self._go(end)
                    return value
            except json.JSONDecodeError as error:
                # a value that the window ends in fails at its end, or where a string begins
                cut = error.pos > len(self._text) - 16 or error.msg.startswith("Unterminated string")
                if not cut or not self._more():
                    raise self._placed(error) from None

    def rest(self) -> None:
        """Raises DataError where what follows is not UTF-8."""
        for _ in self._pieces:
            pass

    def _go(self, at: int) -> None:
        passed = self._text[self._at : at]
        self.byte += len(passed) if passed.isascii() else len(passed.encode())
        self.line += passed.count("\n")
        self._at = at

    def _more(self) -> bool:
        """Whether the file goes on: then the window begins here, and has twice as much behind it or more."""
        if (piece := next(self._pieces, None)) is None:
            return False
        passed, more = self._text[: self._at], [piece]
        left = len(self._text) - self._at - len(piece)
        while left > 0 and (piece := next(self._pieces, "")):
            left -= len(piece)
            more.append(piece)
        self._chars += len(passed)
        newline = passed.rfind("\n")
        self._column = len(passed) - newline - 1 if newline >= 0 else self._column + len(passed)
        self._text, self._at = "".join([self._text[self._at :], *more]), 0
        return True

    def _placed(self, error: json.JSONDecodeError) -> json.JSONDecodeError:
        before = self.line - 1 - self._text.count("\n", 0, self._at)
        error.colno += self._column if error.lineno == 1 else 0
        error.lineno, error.pos = error.lineno + before, error.pos + self._chars
        error.args = (f"{error.msg}: line {error.lineno} column {error.colno} (char {error.pos})",)
        return error


def array_positions(file: Path, at: int) -> tuple[np.ndarray, np.ndarray]:
    """Where each item of a JSON array begins, behind them where the last one ends, and their lines. Raises
    DataError."""
    window = Window(file, at)
    try:
        return _positions(window, file)
    except DataError:
        window.rest()  # what is not UTF-8 is told before what is no JSON
        raise


def _positions(window: Window, file: Path) -> tuple[np.ndarray, np.ndarray]:
    starts, lines = array("q"), array("i")
    window.skip(_MORE_SPACE)
    window.step()
    more = window.skip() != "]"
    while more:
        line, first = window.line, window.skip()
        if first in (",", "]"):
            raise _not_json(
                file, line, "a comma too many, or an item missing, between two commas or before ]"
            )
        starts.append(window.byte)
        lines.append(line)
        try:
            window.value()
        except FAULTS as error:
            raise _not_json(file, line, reason(error) if first else "the array has no end") from None
        more = (behind := window.skip()) == ","
        if not more and behind != "]":
            raise _not_json(
                file, window.line, "a comma or ] is missing" if behind else "the array has no end"
            )
        if more:
            window.step()
            window.skip()
    starts.append(window.byte)
    window.step()
    if window.skip():
        why = "the array ends before it. Where each line of the file is a row, rename it .jsonl"
        raise _not_json(file, window.line, why)
    return np.array(starts, np.int64), np.array(lines, np.int32)


def _not_json(file: Path, line: int, why: str) -> DataError:
    return DataError(f"data: {file} is not JSON from line {line} on: {why}")
