"""Where rows come from: a local file or folder, a hub data set, or a name in a dataset_info.json."""

import contextlib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

from fastdpo.console.formatting import printable
from fastdpo.console.quiet import no_bars
from fastdpo.data.files.arrow_rows import ArrowRows
from fastdpo.data.files.csv_rows import read_csv
from fastdpo.data.files.json_rows import read_json
from fastdpo.data.formats.dataset_info import data_sets, listed, not_listed
from fastdpo.data.formats.known import COLUMNS, NUMBERS
from fastdpo.data.formats.layouts import Layout, layout_of
from fastdpo.data.one_row import problem_of
from fastdpo.data.report import RowProblem
from fastdpo.errors import DataError
from fastdpo.files.names import look_up, similar

_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_DATA = {*_READERS, ".ndjson", ".tsv", ".arrow"}  # what a folder's files hold rows in
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w./-]+))?")
_FORMS = "a .jsonl, .json, .csv or .parquet file, a folder, or a hub name org/name[:config]"


@dataclass(frozen=True)
class Rows:
    """A data set: rows in order, and for those of JSON and CSV the place each one came from."""

    source: str
    rows: Sequence[dict | RowProblem] | ArrowRows  # a RowProblem stands for a line that cannot be read
    lines: Sequence[tuple[str, int]] | None = None  # (file, line from 1)
    layout: Layout | None = None  # how to read them, where their columns are not to tell
    first: int = 0  # what the first row is numbered, behind those of other data sets

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, number: int) -> dict | RowProblem:
        return self.rows[number]

    def __iter__(self) -> Iterator[dict | RowProblem]:
        """Also where one of a data set's rows cannot be read (an image that is none)."""
        number, rows = 0, iter(self.rows)
        while number < len(self):
            try:
                row = next(rows)
            except Exception as error:
                row, rows = problem_of(error), (self.rows[i] for i in range(number + 1, len(self)))
            yield row
            number += 1

    def where(self, number: int) -> str:
        """`row 12 of SOURCE`, as it counts them, and its line where it has one."""
        line = self._line(number)
        return f"row {number - self.first} of {self.source}" + (f" ({line})" if line else "")

    def told(self, number: int, problem: RowProblem) -> str:
        """The row's problem behind its line, where it has one: `line 12 of FILE: FIELD: ...`."""
        line = self._line(number)
        text = problem.message if line and problem.field.startswith("line ") else str(problem)
        return f"{line}: {text}" if line else text

    def _line(self, number: int) -> str:
        if self.lines is None:
            return ""
        file, line = self.lines[number - self.first]
        return f"line {line} of {printable(file)}"


def load_sets(spec: str | list[str], data_format: str | dict | None = None, key: str = "data") -> list[Rows]:
    """A data set's rows (see load_rows), or those of several, numbered on from one to the next."""
    sets: list[Rows] = []
    for name in [spec] if isinstance(spec, str) else spec:
        first = sets[-1].first + len(sets[-1]) if sets else 0
        sets.append(replace(load_rows(name, data_format, key), first=first))
    return sets


def named(sets: list[Rows]) -> str:
    """`a.jsonl, b.jsonl (from row 100 on)`."""
    return ", ".join(
        f"{rows.source} (from row {rows.first} on)" if rows.first else rows.source for rows in sets
    )


def chunks(sets: list[Rows], size: int) -> Iterator[tuple[Rows, list[tuple[int, dict | RowProblem]]]]:
    """At most so many numbered rows at a time, of one data set."""
    for rows in sets:
        numbered = enumerate(rows, rows.first)
        while chunk := list(islice(numbered, size)):
            yield rows, chunk


def load_rows(spec: str, data_format: str | dict | None = None, key: str = "data") -> Rows:
    """The rows of `PATH_OR_NAME[#SPLIT]`: SPLIT as in datasets (`train[:100]`; `[:100]` is of train, or of
    the split that a dataset_info.json says), or train. A name may be FOLDER:NAME, of FOLDER's
    dataset_info.json. `data_format` as in the config: how to read the rows.

    Raises DataError for a source that is missing, unreadable or empty; it begins with the config's key.
    """
    try:
        return _load(spec, data_format)
    except DataError as error:
        raise DataError(f"{key}{str(error).removeprefix('data')}") from None


def _load(spec: str, data_format: str | dict | None) -> Rows:
    name, _, split = (spec, "", "") if Path(spec).exists() else spec.partition("#")
    path, layout = Path(name).expanduser(), layout_of(data_format)
    if name and path.exists():
        rows = _load_path(path, _whole(split), spec, layout)
    elif entry := listed(name):
        if layout is not None:
            way_out = "remove data_format, or give the file itself as data"
            raise DataError(f"data: {name!r}: its dataset_info.json says how to read the rows; {way_out}")
        layout, split = entry.layout, _whole(split, entry.split)
        if entry.path is not None:
            rows = _load_path(entry.path, split, spec, layout)
        else:
            rows = _from_hub(spec, entry.hub["path"], split=split, **entry.hub)
    elif path.suffix in _READERS or not (hub := _HUB_NAME.fullmatch(name)):
        where = f"{not_listed(name)}." if ":" in name else similar(path) or "."
        raise DataError(f"data: {name!r} does not exist here{where} Give {_FORMS}.")
    else:
        config = hub["config"] or ""
        part = {"data_dir" if "/" in config else "name": config or None}  # no configuration's name has a /
        rows = _from_hub(spec, name, split=_whole(split), path=hub["name"], **part)
    if not len(rows):
        raise DataError(f"data: {spec!r} has no rows.")
    return replace(rows, layout=layout)


def _whole(split: str, own: str = "train") -> str:
    """The split that is meant; nothing, or [:100] alone, is of the data set's own one."""
    return own + split if split[:1] in ("", "[") else split


def _from_hub(spec: str, looked_up: str, **options) -> Rows:
    answer = look_up(options["path"], "dataset", options.get("revision"))
    if answer.found is False:
        where = not_listed(looked_up) or similar(looked_up)
        raise DataError(f"data: {looked_up!r} cannot be loaded: it {answer.why}{where}")
    way_out = (
        f"{looked_up!r} is not a local path, so it was looked up on the Hugging Face hub. Check the "
        "name, :config and #split, and the network (or log-in); or download it and give a path"
    )
    if answer.found:
        return Rows(spec, ArrowRows(_with_datasets("load_dataset", spec, way_out, **options)))
    way_out = f"{looked_up!r} is not a local path, and only the cache of datasets can be read: {answer.why}"
    try:
        with _out_of_reach():
            return Rows(spec, ArrowRows(_with_datasets("load_dataset", spec, way_out, **options)))
    except DataError as error:
        if not isinstance(error.__context__, ConnectionError):
            raise
        where = f"{looked_up!r} is neither a path here nor in the cache of datasets, and {answer.why}"
        where += not_listed(looked_up)
        raise DataError(f"data: {where}; check the name, or download it and give a path") from None


@contextlib.contextmanager
def _out_of_reach() -> Iterator[None]:
    """Inside, datasets asks for nothing over the network: it would try for half a minute."""
    from datasets import config

    was, config.HF_HUB_OFFLINE = config.HF_HUB_OFFLINE, True
    try:
        yield
    finally:
        config.HF_HUB_OFFLINE = was


def _load_path(path: Path, split: str, spec: str, layout: Layout | None) -> Rows:
    if path.is_dir() and any((path / f).exists() for f in ("state.json", "dataset_dict.json")):
        data = _with_datasets("load_from_disk", spec, "Was it written by save_to_disk, and whole?", path)
        splits = data if isinstance(data, dict) else {str(data.split or "train"): data}
        return Rows(spec, ArrowRows(_take(splits, split, spec)))
    if path.is_dir() and (known := data_sets(path)):
        names = ", ".join(f"{path}:{name}" for name in known)
        raise DataError(f"data: {str(path)!r} has a dataset_info.json; name one of its data sets: {names}")
    files = {"train": [path]} if path.is_file() else _files_by_split(path)
    suffixes = {file.suffix for some in files.values() for file in some}
    kinds = {_READERS.get(suffix) for suffix in suffixes}
    if len(kinds) != 1 or None in kinds:
        found = ", ".join(sorted(suffixes)) or "no data files"
        raise DataError(f"data: {str(path)!r} holds {found}. Give {_FORMS}, of one kind.")
    (kind,) = kinds
    named = {name: some for name, some in files.items() if re.search(rf"\b{name}\b", split)} or files
    if kind != "parquet":
        taken = _take({name: _read(some, layout) for name, some in named.items()}, split, spec)
        return Rows(spec, [row for row, _ in taken], [place for _, place in taken])
    paths = {name: [str(file) for file in some] for name, some in named.items()}
    way_out = "Check that the file is what its name says"
    data = _with_datasets("load_dataset", spec, way_out, "parquet", data_files=paths)
    return Rows(spec, ArrowRows(_take(data, split, spec)))


def _files_by_split(folder: Path) -> dict[str, list[Path]]:
    """The data files of a folder by split, as datasets tells splits from file names."""
    from datasets.data_files import DataFilesDict, get_data_patterns

    try:
        found = DataFilesDict.from_patterns(get_data_patterns(str(folder)), base_path=str(folder))
    except FileNotFoundError:  # nothing there
        return {}
    files = {str(name): [Path(file) for file in some] for name, some in found.items()}
    known = {name: [f for f in some if _is_data(f)] for name, some in files.items()}
    return {name: some for name, some in known.items() if some}


def _is_data(file: Path) -> bool:
    """Also what is not read (.jsonl.gz, .tsv): a folder that holds it is refused, not read in part."""
    return any(suffix.lower() in _DATA for suffix in file.suffixes)


def _with_datasets(function: str, spec: str, way_out: str, *args, **options):
    """datasets and its builders raise anything; the user needs one line and what to do."""
    import datasets

    try:
        with no_bars():
            return getattr(datasets, function)(*args, **options)
    except Exception as error:
        if isinstance(error, datasets.exceptions.DatasetGenerationError) and error.__cause__:
            error = error.__cause__  # what says more than "An error occurred while generating the dataset"
        reason = (str(error).strip() or "no message").splitlines()[0]
        text = f"data: {spec!r} cannot be loaded: {type(error).__name__}: {reason}\n{way_out}."
        raise DataError(text) from None


def _take(splits: dict, split: str, spec: str):
    """The rows that a split instruction names, of lists or of datasets."""
    from datasets import Dataset, ReadInstruction, concatenate_datasets

    sizes = {str(name): len(rows) for name, rows in splits.items()}
    have = ", ".join(f"{name} ({size} rows)" for name, size in sizes.items())
    try:
        parts = ReadInstruction.from_spec(split).to_absolute(sizes)
    except (ValueError, AssertionError) as error:
        raise DataError(f"data: {spec!r}: {error} There is: {have}.") from None
    slices = [(splits[part.splitname], slice(part.from_ or 0, part.to)) for part in parts]
    slices = [(rows, part) for rows, part in slices if len(range(len(rows))[part])]
    if not slices and any(sizes.values()):
        raise DataError(f"data: {spec!r}: {split!r} takes none of the rows. There is: {have}.")
    if slices and all(isinstance(rows, Dataset) for rows, _ in slices):
        return concatenate_datasets([rows.select(range(len(rows))[part]) for rows, part in slices])
    return [row for rows, part in slices for row in rows[part]]


def _read(files: list[Path], layout: Layout | None) -> list[tuple[object, tuple[str, int]]]:
    """Each row of JSON or CSV files and its place."""
    said = layout.columns if layout else {}
    names = said or {name: name for name in (*COLUMNS, *NUMBERS)}  # ours -> theirs
    rows = []
    for file in files:
        if _READERS[file.suffix] == "json":
            read = read_json(file, set(names.values()))
        else:
            read = read_csv(file, {theirs for ours, theirs in names.items() if ours in NUMBERS})
        rows += [(row, (file.name, line)) for row, line in read]
    return rows
