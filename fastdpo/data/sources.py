"""Where rows come from: a local file or folder, a hub data set, or a name in a dataset_info.json. They are
read where they are asked for."""

import contextlib
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import xxhash

from fastdpo.data.files.csv_rows import csv_rows
from fastdpo.data.files.file_rows import FileRows
from fastdpo.data.files.json_rows import json_rows
from fastdpo.data.files.loaded import hub_rows, parquet_rows, saved_rows
from fastdpo.data.files.stamps import Stamp, check_unchanged, pieces, stamp_of
from fastdpo.data.finding import Found, find
from fastdpo.data.formats.known import COLUMNS, NUMBERS
from fastdpo.data.formats.layouts import Layout
from fastdpo.data.one_row import problem_of
from fastdpo.data.report import RowProblem
from fastdpo.errors import DataError


class Part(Protocol):
    """Rows that lie together: of one file (FileRows), or of one datasets.Dataset (ArrowRows)."""

    def __len__(self) -> int: ...

    def taken(self, start: int, stop: int) -> "Part": ...

    def range(self, start: int, stop: int) -> Iterator[Any]:
        """Any exception is that of the row that would have come."""

    def line(self, number: int) -> str: ...


@dataclass(frozen=True)
class Rows:
    """A data set: rows in order, none of them in memory. It is light and can be pickled, so that other
    processes read ranges of it."""

    source: str
    parts: Sequence[Part]
    layout: Layout | None = None  # how to read them, where their columns are not to tell
    folder: Path | None = None  # where they lie; None of the hub's

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self.parts else 0

    def __getitem__(self, number: int) -> dict | RowProblem:
        """A RowProblem stands for a line that cannot be read."""
        part, at = self._place(range(len(self))[number])
        (row,) = part.range(at, at + 1)
        return row

    def __iter__(self) -> Iterator[dict | RowProblem]:
        return self.range(0, len(self))

    def range(self, start: int, stop: int) -> Iterator[dict | RowProblem]:
        """The rows from one number to another, also where one of a data set's rows cannot be read (an image
        that is none). Raises DataError where a file changed since its rows were found."""
        while start < stop:
            part, at = self._place(start)
            end = min(len(part), at + stop - start)
            start += end - at
            while at < end:
                try:
                    for row in part.range(at, end):
                        at += 1
                        yield row
                except Exception as error:
                    at += 1
                    yield problem_of(error)

    def folder_of(self, number: int) -> Path | None:
        """Where the paths that a row holds begin: the folder of its file."""
        part, _ = self._place(number)
        return part.file.parent if isinstance(part, FileRows) else self.folder

    def told(self, number: int, problem: RowProblem) -> str:
        """The row's problem behind its line, where it has one: `line 12 of FILE: FIELD: ...`."""
        line = self.line(number)
        text = problem.message if line and problem.field.startswith("line ") else str(problem)
        return f"{line}: {text}" if line else text

    def line(self, number: int) -> str:
        """`line 12 of FILE`, where the row has one."""
        part, at = self._place(number)
        return part.line(at)

    def _place(self, number: int) -> tuple[Part, int]:
        i = bisect_right(self._ends, number)
        return self.parts[i], number - (self._ends[i - 1] if i else 0)


@dataclass(frozen=True)
class Source:
    """A data set, read as far as it is asked for. What any of its functions finds, it finds once."""

    spec: str
    data_format: str | dict | None
    key: str

    def find(self) -> None:
        """Raises DataError where it is missing here, or no data; the hub is not asked."""
        with self.named():
            _ = self._found

    def identity(self) -> str | None:
        """A digest of what its rows are: the content and the base names of its files, which of the rows are
        meant, how they are read. None where that cannot be told. A data set of the hub is downloaded for it,
        and mapped. Raises DataError."""
        with self.named():
            if not self._stamps:
                return None
            found = self._found
            said = repr((found.kind, found.split, found.layout, self._content))
            return xxhash.xxh3_128_hexdigest(said.encode())

    @property
    def folder(self) -> Path | None:
        """Where it lies; None of the hub's."""
        return self._found.folder and self._found.folder.resolve()

    def rows(self) -> Rows:
        """Raises DataError."""
        with self.named():
            for file, stamp in self._stamps.items():
                check_unchanged(file, stamp)
            rows = Rows(self.spec, self._parts(), self._found.layout, self._found.folder)
            if not len(rows):
                raise DataError(f"data: {self.spec!r} has no rows.")
            return rows

    def check_unchanged(self) -> None:
        """Raises DataError where a file is not what it was when `identity` or `rows` was asked for first."""
        with self.named():
            for file, stamp in self._stamps.items():
                check_unchanged(file, stamp)

    @contextlib.contextmanager
    def named(self) -> Iterator[None]:
        """Inside, errors about `data` are about the config's key."""
        try:
            yield
        except DataError as error:
            raise DataError(f"{self.key}{str(error).removeprefix('data')}") from None

    @cached_property
    def _found(self) -> Found:
        return find(self.spec, self.data_format)

    @cached_property
    def _of_hub(self) -> Any:
        return hub_rows(self.spec, self._found.name, split=self._found.split, **self._found.hub)

    @cached_property
    def _stamps(self) -> dict[Path, Stamp]:
        of_hub = self._of_hub.files if self._found.kind == "hub" else []
        return {file: stamp_of(file) for some in [of_hub, *self._found.files.values()] for file in some}

    @cached_property
    def _content(self) -> str:
        """A digest of what the files hold, and of their names."""
        digest, folder = xxhash.xxh3_128(), Path(self._found.name)
        if self._found.kind == "hub":
            # the files lie in a folder of the data set, its config and the commit, and datasets never writes
            # to them again: when each was written says that it is the same, and nothing is read
            written = [(file.parts[-5:], stamp.size, stamp.modified) for file, stamp in self._stamps.items()]
            digest.update(repr(written).encode())
        for split, files in self._found.files.items():
            for file in files:
                name = file.relative_to(folder) if self._found.kind == "saved" else file.name
                digest.update(repr((split, str(name), self._stamps[file].size)).encode())
                for piece in pieces(file):
                    digest.update(piece)
        return digest.hexdigest()

    def _parts(self) -> Sequence[Part]:
        found = self._found
        splits: Mapping[str, Sequence[Part]]
        if found.kind == "hub":
            return [self._of_hub]
        if found.kind == "saved":
            splits = saved_rows(Path(found.name), self.spec)
        elif found.kind == "parquet":
            splits = parquet_rows(found.files, self._content, self.spec)
        else:
            splits = {name: [_read(file, found) for file in some] for name, some in found.files.items()}
        return _taken(splits, found.split, self.spec)


def sources_of(spec: str | list[str], data_format: str | dict | None, key: str) -> list[Source]:
    """A data set (see load_rows), or several. Raises DataError for one that is missing here."""
    sources = [Source(name, data_format, key) for name in ([spec] if isinstance(spec, str) else spec)]
    for source in sources:
        source.find()
    return sources


def load_rows(spec: str, data_format: str | dict | None = None, key: str = "data") -> Rows:
    """The rows of `PATH_OR_NAME[#SPLIT]`: SPLIT as in datasets (`train[:100]`; `[:100]` is of train, or of
    the split that a dataset_info.json says), or train. A name may be FOLDER:NAME, of FOLDER's
    dataset_info.json. `data_format` as in the config: how to read the rows.

    Raises DataError for a source that is missing, unreadable or empty; it begins with the config's key.
    """
    return Source(spec, data_format, key).rows()


class NumberedRows:
    """The rows of a data set, or of several, as they are given, by the numbers of their groups: one set's
    follow the other's. Each is read when it is asked for, and nothing before."""

    def __init__(self, spec: str | list[str], data_format: str | dict | None = None, key: str = "data"):
        self._how = spec, data_format, key

    @cached_property
    def _sets(self) -> list[tuple[Source, Rows]]:
        return [(source, source.rows()) for source in sources_of(*self._how)]

    @cached_property
    def _ends(self) -> list[int]:
        return list(accumulate(len(rows) for _, rows in self._sets))

    def __call__(self, number: int) -> dict | None:
        """None where it cannot be read as one; -1: the first row that can. Raises DataError."""
        if number < 0:
            some = (self(at) for at in range(self._ends[-1]))
            return next((row for row in some if row is not None), None)
        i = bisect_right(self._ends, number)
        (source, rows), at = self._sets[i], number - (self._ends[i - 1] if i else 0)
        with source.named():
            row = next(rows.range(at, at + 1))
        return row if isinstance(row, dict) else None


def _taken(splits: Mapping[str, Sequence[Part]], split: str, spec: str) -> Sequence[Part]:
    """The rows that a split instruction names."""
    if split in splits:
        return splits[split]
    from datasets import ReadInstruction

    sizes = {name: sum(map(len, parts)) for name, parts in splits.items()}
    have = ", ".join(f"{name} ({size} rows)" for name, size in sizes.items())
    try:
        instructions = ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise DataError(f"data: {spec!r}: {error} There is: {have}.") from None
    taken: list[Part] = []
    for one in instructions:
        number, wanted = 0, range(sizes[one.splitname])[one.from_ or 0 : one.to]
        for part in splits[one.splitname]:
            start, stop = max(wanted.start - number, 0), min(wanted.stop - number, len(part))
            taken += [part.taken(start, stop)] if start < stop else []
            number += len(part)
    if not taken and any(sizes.values()):
        raise DataError(f"data: {spec!r}: {split!r} takes none of the rows. There is: {have}.")
    return taken


def _read(file: Path, found: Found) -> FileRows:
    said = found.layout.columns if found.layout else {}
    names = said or {name: name for name in (*COLUMNS, *NUMBERS)}  # ours -> theirs
    if found.kind == "json":
        return json_rows(file, set(names.values()))
    return csv_rows(file, {theirs for ours, theirs in names.items() if ours in NUMBERS})
