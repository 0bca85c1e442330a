"""LLaMA-Factory's dataset_info.json: the data sets of a folder, where each lies and how its rows are read."""

import json
from dataclasses import dataclass
from pathlib import Path

from fastdpo.data.formats.layouts import Layout
from fastdpo.data.formats.turns import tags_of
from fastdpo.errors import DataError
from fastdpo.files.names import similar
from fastdpo.values import nearest

_FILE = "dataset_info.json"
_PLACES = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_MEDIA = ("videos", "audios")
_FORMATS = {  # by their formatting: the name of the format, and its own columns, ours -> theirs
    "alpaca": (
        "alpaca",
        {"instruction": "prompt", "input": "query", "output": "response", "history": "history"},
    ),
    "sharegpt": ("sharegpt", {"conversations": "messages"}),
    "openai": ("messages", {"messages": "messages"}),
}
_SHARED = {name: name for name in ("system", "tools", "chosen", "rejected", "kto_tag", "images")}
_DEFAULTS = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}


@dataclass(frozen=True)
class Listed:
    """One data set of a dataset_info.json."""

    path: Path | None  # a local file or folder, or
    hub: dict  # what load_dataset takes
    split: str
    layout: Layout


def data_sets(folder: Path) -> dict[str, dict]:
    """The data sets that the folder's dataset_info.json lists; none where it has no such file. (datasets
    writes a file of that name too, with something else in it.)"""
    path = folder / _FILE
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise DataError(f"data: cannot read {path}: {error}") from None
    entries = found.items() if isinstance(found, dict) else ()
    return {n: e for n, e in entries if isinstance(e, dict) and any(place in e for place in _PLACES)}


def listed(name: str) -> Listed | None:
    """The data set of FOLDER:NAME; None where FOLDER holds no dataset_info.json. Raises DataError."""
    folder, _, entry_name = name.rpartition(":")
    if not folder or not (known := data_sets(Path(folder).expanduser())):
        return None
    if entry_name not in known:
        close, names = nearest(entry_name, known), ", ".join(known)
        raise DataError(f"data: {folder}/{_FILE} has no {entry_name!r}. {close}It lists {names}")
    entry, where = known[entry_name], f"data: {folder}/{_FILE}: {entry_name}"
    layout, split = _layout(entry, where), entry.get("split") or "train"
    if entry.get("num_samples") is not None:
        way_out = f"give the rows to take as {name}#[:{entry['num_samples']}] and remove the key"
        raise DataError(f"{where}: num_samples is not read (it takes rows by chance); {way_out}")
    if "hf_hub_url" in entry:
        more = {"data_dir": entry.get("folder"), "revision": entry.get("revision")}
        more = {key: value for key, value in more.items() if value is not None}
        return Listed(None, {"path": entry["hf_hub_url"], "name": entry.get("subset")} | more, split, layout)
    if "file_name" not in entry:
        (place,) = (p for p in _PLACES if p in entry)
        way_out = "download it and give it as file_name, or use hf_hub_url"
        raise DataError(f"{where}: {place} is not read; {way_out}")
    path = Path(folder).expanduser() / entry["file_name"]
    if not path.exists():
        raise DataError(f"{where}: file_name {str(path)!r} does not exist{similar(path)}")
    return Listed(path, {}, split, layout)


def not_listed(name: str) -> str:
    """Where a FOLDER:NAME that is not found was looked for: `; /data is no folder`. Empty for other names."""
    if ":" not in name:
        return ""
    folder = Path(name.rpartition(":")[0]).expanduser()
    if folder.is_dir():
        return f"; {folder.absolute()} holds no dataset_info.json"
    return f"; {folder.absolute()} is no folder"


def _layout(entry: dict, where: str) -> Layout:
    formatting, theirs = entry.get("formatting", "alpaca"), entry.get("columns")
    if formatting not in _FORMATS:
        raise DataError(f"{where}: formatting {formatting!r} is not one of {', '.join(_FORMATS)}")
    theirs = _DEFAULTS if theirs is None else theirs
    if media := [name for name in _MEDIA if theirs.get(name)]:
        raise DataError(f"{where}: it has {' and '.join(media)}; sound and video are not read")
    ranking, kto = bool(entry.get("ranking")), bool(theirs.get("kto_tag"))
    if ranking == kto:
        has = "both ranking and" if kto else "neither ranking: true nor"
        way_out = "; keep one" if kto else ""
        what = f"{has} a kto_tag column{way_out} (these are what makes it preference data)"
        raise DataError(f"{where}: it has {what}")
    format, own = _FORMATS[formatting]
    if ranking:
        theirs = {"chosen": "chosen", "rejected": "rejected"} | theirs
    columns = {ours: theirs[name] for ours, name in (own | _SHARED).items() if theirs.get(name)}
    return Layout(format + ("_kto" if kto else ""), columns, {}, tags_of(entry.get("tags") or {}))
