"""Where a data set lies, and what of it is meant."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fastdpo.data.formats.dataset_info import data_sets, listed, not_listed
from fastdpo.data.formats.layouts import Layout, layout_of
from fastdpo.errors import DataError
from fastdpo.files.names import similar

_READERS = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}
_DATA = {*_READERS, ".ndjson", ".tsv", ".arrow"}  # what a folder's files hold rows in
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+/[\w.-]+)(:(?P<config>[\w./-]+))?")
_FORMS = "a .jsonl, .json, .csv or .parquet file, a folder, or a hub name org/name[:config]"


@dataclass(frozen=True)
class Found:
    """A data set that is there, or may be on the hub; it is not read yet."""

    kind: str  # json, csv, parquet: its files; saved: a folder of save_to_disk; hub
    name: str  # as it was looked up
    split: str
    layout: Layout | None = None  # how to read the rows, where their columns are not to tell
    files: dict[str, list[Path]] = field(default_factory=dict)  # by split; none of the hub
    hub: dict[str, Any] = field(default_factory=dict)  # what load_dataset takes

    @property
    def folder(self) -> Path | None:
        """The folder that it is, or lies in; None of the hub's."""
        path = Path(self.name)
        return None if self.kind == "hub" else path if path.is_dir() else path.parent


def find(spec: str, data_format: str | dict | None) -> Found:
    """See sources.load_rows. Raises DataError."""
    name, _, split = (spec, "", "") if Path(spec).exists() else spec.partition("#")
    path, layout = Path(name).expanduser(), layout_of(data_format)
    if name and path.exists():
        return _at(path, _whole(split), layout)
    if entry := listed(name):
        if layout is not None:
            way_out = "remove data_format, or give the file itself as data"
            raise DataError(f"data: {name!r}: its dataset_info.json says how to read the rows; {way_out}")
        split = _whole(split, entry.split)
        if entry.path is not None:
            return _at(entry.path, split, entry.layout)
        return Found("hub", entry.hub["path"], split, entry.layout, hub=entry.hub)
    if path.suffix in _READERS or not (hub := _HUB_NAME.fullmatch(name)):
        where = f"{not_listed(name)}." if ":" in name else similar(path) or "."
        raise DataError(f"data: {name!r} does not exist here{where} Give {_FORMS}.")
    config = hub["config"] or ""
    part = {"data_dir" if "/" in config else "name": config or None}  # no configuration's name has a /
    return Found("hub", name, _whole(split), layout, hub={"path": hub["name"]} | part)


def _whole(split: str, own: str = "train") -> str:
    """The split that is meant; nothing, or [:100] alone, is of the data set's own one."""
    return own + split if split[:1] in ("", "[") else split


def _at(path: Path, split: str, layout: Layout | None) -> Found:
    if path.is_dir() and any((path / f).exists() for f in ("state.json", "dataset_dict.json")):
        return Found("saved", str(path), split, layout, {"": _saved(path)})
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
    return Found(str(kind), str(path), split, layout, named)


def _saved(folder: Path) -> list[Path]:
    """The files that save_to_disk wrote, without those that datasets put there since; none where they are not
    as it writes them."""
    states = sorted(folder.glob("**/state.json"))
    try:
        parts = [state.parent / part["filename"] for state in states for part in _parts(state)]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    files = [folder / "dataset_dict.json", *states, *(s.with_name("dataset_info.json") for s in states)]
    files += parts
    return [file for file in files if file.exists()]


def _parts(state: Path) -> list[dict]:
    return json.loads(state.read_text(encoding="utf-8"))["_data_files"]


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
