"""Rows of a file, each read where it is asked for: what is in memory is where they begin."""

from bisect import bisect_right
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from fastdpo.console.formatting import printable
from fastdpo.data.files import stamps
from fastdpo.data.files.stamps import Stamp, pieces

_BLANK = np.isin(np.arange(256), list(b" \t\n\r\v\f"))  # by byte


@dataclass(frozen=True, eq=False)
class FileRows:
    """Light and picklable: another process reads any of them."""

    file: Path
    stamp: Stamp  # of the file, when the rows were looked for
    starts: np.ndarray  # (rows + 1,) where each begins, in bytes; the last one is where the rows end
    lines: np.ndarray  # (rows,) from 1
    parse: Callable[[bytes, int], object]  # (what stands from one start to the next, its line) -> the row

    def __len__(self) -> int:
        return len(self.lines)

    def taken(self, start: int, stop: int) -> "FileRows":
        return replace(self, starts=self.starts[start : stop + 1], lines=self.lines[start:stop])

    def range(self, start: int, stop: int) -> Iterator[object]:
        """Raises DataError where the file is not what it was."""
        while start < stop:
            first = int(self.starts[start])
            end = bisect_right(self.starts, first + stamps.PIECE, start + 2, stop + 1) - 1
            raw = stamps.read_at(self.file, self.stamp, first, int(self.starts[end]) - first)
            bounds, lines = (self.starts[start : end + 1] - first).tolist(), self.lines[start:end].tolist()
            for here, there, line in zip(bounds, bounds[1:], lines):
                yield self.parse(raw[here:there], line)
            start = end

    def line(self, number: int) -> str:
        return f"line {self.lines[number]} of {printable(self.file.name)}"


def line_positions(file: Path, at: int) -> tuple[np.ndarray, np.ndarray]:
    """(`starts`, `lines`) of the lines that are not blank, from a byte on. Raises DataError."""
    starts, lines = [], []
    begin, line, blank = at, 1, True  # of the line that does not end yet
    for piece in pieces(file, at):
        view = np.frombuffer(piece, np.uint8)
        ends = np.flatnonzero(view == ord("\n"))
        first, last = (int(ends[0]), int(ends[-1])) if len(ends) else (len(piece), -1)
        blank = blank and _blank(piece[:first])
        if len(ends):
            kept = np.concatenate([[not blank], _filled(piece, view, ends[:-1] + 1, ends[1:])])
            starts.append(np.concatenate([[begin], ends[:-1] + 1 + at])[kept])
            lines.append(line + np.flatnonzero(kept))
            begin, line, blank = at + last + 1, line + len(ends), _blank(piece[last + 1 :])
        at += len(piece)
    if not blank:
        starts.append(np.array([begin]))
        lines.append(np.array([line]))
    starts.append(np.array([at]))
    return np.concatenate(starts).astype(np.int64), np.concatenate([*lines, []]).astype(np.int32)


def _filled(piece: bytes, view: np.ndarray, begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """Which of these lines are not blank."""
    filled = ~_BLANK[view[begins]]
    for i in np.flatnonzero(~filled).tolist():  # few begin with white space
        filled[i] = not _blank(piece[begins[i] : ends[i]])
    return filled


def _blank(text: bytes) -> bool:
    return not text or text.isspace()
