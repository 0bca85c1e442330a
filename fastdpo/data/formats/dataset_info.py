"""LLaMA-Factory's dataset_info.json: the data sets of a folder, where each lies and how its rows are read."""

import json
from dataclasses import dataclass
from pathlib import Path

from fastdpo.data.formats.layouts import Layout
from fastdpo.data.formats.turns import tags_of
from fastdpo.errors import DataError
from fastdpo.values import nearest

_FILE = "dataset_info.json"
_PLACES = ("file_name", "hf_hub_url", "ms_hub_url", "om_hub_url", "script_url", "cloud_file_name")
_MEDIA = ("images", "videos", "audios")
_COLUMNS = {  # ours -> theirs, of text; the last ones are in all formattings
    "alpaca": {"instruction": "prompt", "input": "query", "output": "response", "history": "history"},
    "sharegpt": {"conversations": "messages"},
    "openai": {"messages": "messages"},
}
_SHARED = ("system", "tools", "chosen", "rejected", "kto_tag")
_DEFAULTS = {"prompt": "instruction", "query": "input", "response": "output"}
_FORMATS = {"alpaca": "alpaca", "sharegpt": "sharegpt", "openai": "messages"}  # of formats.py


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
        names = ", ".join(known)
        close = nearest(entry_name, known)
        raise DataError(f"data: {folder}/{_FILE} has no {entry_name!r}. {close}It lists {names}")
    entry, where = known[entry_name], f"data: {folder}/{_FILE}: {entry_name}"
    layout = _layout(entry, where)
    if entry.get("num_samples") is not None:
        way_out = f"give the rows to take as {name}#train[:{entry['num_samples']}] and remove the key"
        raise DataError(f"{where}: num_samples is not read (it takes rows by chance); {way_out}")
    split = entry.get("split") or "train"
    if "hf_hub_url" in entry:
        hub = {"path": entry["hf_hub_url"], "name": entry.get("subset")}
        more = {"data_dir": entry.get("folder"), "revision": entry.get("revision")}
        return Listed(None, hub | {k: v for k, v in more.items() if v is not None}, split, layout)
    if "file_name" not in entry:
        (place,) = (p for p in _PLACES if p in entry)
        raise DataError(
            f"{where}: {place} is not read; download it and give it as file_name, or use hf_hub_url"
        )
    path = Path(folder).expanduser() / entry["file_name"]
    if not path.exists():
        raise DataError(f"{where}: file_name {str(path)!r} does not exist")
    return Listed(path, {}, split, layout)


def _layout(entry: dict, where: str) -> Layout:
    formatting, said = entry.get("formatting", "alpaca"), entry.get("columns")
    if formatting not in _FORMATS:
        raise DataError(f"{where}: formatting {formatting!r} is not one of {', '.join(_FORMATS)}")
    theirs = said if said is not None else _DEFAULTS | {"messages": "conversations"}
    if media := [name for name in _MEDIA if theirs.get(name)]:
        raise DataError(f"{where}: it has {' and '.join(media)}; fastdpo trains on text only")
    ranking, kto = bool(entry.get("ranking")), bool(theirs.get("kto_tag"))
    if ranking == kto:
        what = (
            "both ranking and a kto_tag column; keep one"
            if kto
            else "neither ranking: true nor a kto_tag column"
        )
        raise DataError(f"{where}: it has {what} (these are what makes it preference data)")
    names = _COLUMNS[formatting] | {name: name for name in _SHARED}
    if ranking:
        theirs = {"chosen": "chosen", "rejected": "rejected"} | theirs
    columns = {ours: theirs[name] for ours, name in names.items() if theirs.get(name)}
    return Layout(
        _FORMATS[formatting] + ("_kto" if kto else ""), columns, {}, tags_of(entry.get("tags") or {})
    )
