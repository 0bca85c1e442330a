"""`fastdpo cache`: how large the reference cache is, what is in it by model and data, and removing some.

A look makes no file, and moves none aside. Age is that of the last fill: a run that finds all of its values
writes nothing, so nothing tells when values were last used.
"""

import json
import sqlite3
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from fastdpo.console.formatting import counted, gigabytes, printable
from fastdpo.data.store.contents import SHOWN, begin_so
from fastdpo.data.store.digests import BYTES
from fastdpo.errors import ConfigError, TrainingError
from fastdpo.reference.cache_file import CacheFile, cache_path, transaction

_TABLES = {"packs": "namespace", "fills": "namespace", "namespaces": "id"}  # each by which column
_SIZES = (
    f"SELECT namespace, total(length(keys)) / {BYTES}, total(length(logps)) / 4, "
    "total(length(digest) + length(keys) + length(lengths) + length(logps)) "
    "FROM packs WHERE typeof(namespace) = 'blob' GROUP BY namespace"
)
_PARTS = "SELECT id, parts FROM namespaces WHERE typeof(id) = 'blob'"


@dataclass(frozen=True)
class Namespace:
    """One reference: a model in a dtype, and what is stored of it."""

    key: bytes
    parts: dict
    environments: list[dict]  # of its fills, oldest first
    filled: list[datetime]  # when these began
    responses: int = 0
    tokens: int = 0
    bytes: int = 0

    @property
    def id(self) -> str:
        return self.key.hex()


def show(file: Path | None, console) -> None:
    """Prints what `fastdpo cache` shows."""
    path = _existing(file, console)
    if path is None:
        return
    found: list[Namespace] = []
    free: list[int] = []

    def look(db) -> None:
        db.execute("BEGIN")  # all of it as it is at one moment
        found[:], free[:] = _read(db), [_free_bytes(db)]
        db.execute("COMMIT")

    with CacheFile(path, console, as_it_is=True) as cache:
        cache.run(look)
    size = f"{gigabytes(path.stat().st_size)}, of which {gigabytes(free[0])} are free"
    _say(console, f"{path}: {counted(len(found), 'namespace')}, {size}")
    if found:
        console.print(_table(found))


def prune(file: Path | None, age: timedelta | None, prefixes: list[str], dry_run: bool, console) -> None:
    """Removes the namespaces that are older and begin so; with both given, those of both."""
    path = _existing(file, console)
    if path is None:
        return
    gone: list[Namespace] = []

    def choose(db) -> None:
        gone[:] = _chosen(_read(db), age, prefixes)

    def remove(db) -> None:
        db.execute("PRAGMA secure_delete = OFF")  # overwriting what goes would take as much room again
        with transaction(db):  # nothing is filled between the look and the removal
            choose(db)
            for table, column in _TABLES.items():
                db.executemany(f"DELETE FROM {table} WHERE {column} = ?", [(n.key,) for n in gone])

    before = path.stat().st_size
    with CacheFile(path, console, as_it_is=True) as cache:
        cache.run(choose if dry_run else remove)
        if gone:
            console.print(_table(gone))
        what = f"{counted(len(gone), 'namespace')}, {counted(sum(n.responses for n in gone), 'response')}"
        if dry_run:
            _say(console, f"{path}: {what} would go, {gigabytes(sum(n.bytes for n in gone))}")
            return
        cache.run(lambda db: _shrink(db, path, what))
    after = path.stat().st_size
    _say(console, f"{path}: {what} removed, {gigabytes(before - after)} given back, {gigabytes(after)} left")


def _existing(file: Path | None, console) -> Path | None:
    """The file; None, and said, where nothing is stored yet. Raises ConfigError for one that was named and is
    not there."""
    path = cache_path("auto") if file is None else file.expanduser()
    assert path is not None
    there = path.exists()
    if file is not None and not there:
        raise ConfigError(f"cache: there is no file {path}")
    if there and (path.is_dir() or path.stat().st_size):
        return path
    _say(console, f"{path}: nothing is stored yet")
    return None


def _read(db) -> list[Namespace]:
    """Every namespace, the one filled last at the end. What is damaged counts as not recorded."""
    sizes = {key: map(int, numbers) for key, *numbers in db.execute(_SIZES)}
    parts = dict(db.execute(_PARTS))
    fills: dict[bytes, list] = {}
    for key, *fill in db.execute("SELECT namespace, started, environment FROM fills ORDER BY id"):
        fills.setdefault(key, []).append(fill)
    out = []
    for key in dict.fromkeys([*parts, *sizes]):
        environments = [_dict(environment) for _, environment in fills.get(key, ())]
        times = [time for started, _ in fills.get(key, ()) if (time := _time(started))]
        out.append(Namespace(key, _dict(parts.get(key)), environments, times, *sizes.get(key, ())))
    return sorted(out, key=_last)


def _last(namespace: Namespace) -> datetime:
    return max(namespace.filled, default=datetime.min.replace(tzinfo=UTC))


def _chosen(found: list[Namespace], age: timedelta | None, prefixes: list[str]) -> list[Namespace]:
    """Raises ConfigError for a prefix that is of none, or of several."""
    some, now = begin_so(found, prefixes, "--namespace"), datetime.now(UTC)
    return [n for n in some if age is None or (n.filled and now - _last(n) > age)]


def _shrink(db, path: Path, what: str) -> None:
    """Gives free pages back to the disk."""
    try:
        if _free_bytes(db):
            db.execute("VACUUM")
    except sqlite3.Error as error:
        raise TrainingError(
            f"reference_cache: {path}: {what} removed, but the file stays as large ({error}): writing it "
            "anew needs its size once more here, and in the folder for temporary files. The next fills use "
            "the room in it, and the next `fastdpo cache prune` tries again"
        ) from None


def _free_bytes(db) -> int:
    (pages,), (size,) = (db.execute(f"PRAGMA {name}").fetchone() for name in ("freelist_count", "page_size"))
    return pages * size


def _table(found: list[Namespace]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("namespace", no_wrap=True)
    table.add_column("of", overflow="fold")
    for name in ("responses", "tokens", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("filled", no_wrap=True)
    for n in found:
        of = escape("\n".join(map(printable, _words(n))))
        days = [f"{time.astimezone():%Y-%m-%d}" for time in sorted(n.filled)]
        filled = "\n".join(dict.fromkeys([*days[:1], *days[-1:]])) or "?"
        table.add_row(n.id[:SHOWN], of, f"{n.responses:,}", f"{n.tokens:,}", gigabytes(n.bytes), filled)
    return table


def _words(namespace: Namespace) -> list[str]:
    """Its model, its data, what computed it: a line each, of all its fills."""
    parts, fills = namespace.parts, namespace.environments
    models = _distinct(_model(fill, bool(parts.get("adapter"))) for fill in fills)
    dtype = str(parts.get("compute dtype", "?")) + (", quantised" if parts.get("quantization") else "")
    names = (str(name) for fill in fills for name in _list(fill.get("data")))
    return [
        f"{models or 'model not recorded'}, {dtype}",
        f"data: {_distinct(names) or 'not recorded'}",
        f"by: {_distinct(map(_computed_by, fills)) or 'not recorded'}",
    ]


def _model(fill: dict, adapted: bool) -> str:
    """NAME + adapter FOLDER, after stage 1; empty where no name was recorded."""
    name, adapter, stage = (fill.get(key) for key in ("model", "adapter", "stage"))
    if not name:
        return ""
    with_adapter = (f" + adapter {adapter}" if adapter else " with an adapter") if adapted else ""
    return f"{name}{with_adapter}" + (f", after stage {stage}" if stage else "")


def _computed_by(fill: dict) -> str:
    """cpu (fastdpo 0.1.0, torch 2.11.0)."""
    versions = _dict(fill.get("versions"))
    used = ", ".join(f"{name} {versions[name]}" for name in ("fastdpo", "torch") if name in versions)
    return f"{fill.get('device', '')} ({used})" if used else str(fill.get("device", ""))


def _distinct(texts: Iterable[str]) -> str:
    return ", ".join(dict.fromkeys(filter(None, texts)))


def _dict(value) -> dict:
    """A column's JSON, or what is in one; empty for anything else, as damage may leave it."""
    if isinstance(value, bytes):
        try:
            value = json.loads(value)
        except (ValueError, RecursionError):
            return {}
    return value if isinstance(value, dict) else {}


def _list(value) -> list:
    return value if isinstance(value, list) else []


def _time(started) -> datetime | None:
    """None for one that is damaged, which is then of no age."""
    try:
        time = datetime.fromisoformat(started.decode())
    except (ValueError, AttributeError):
        return None
    return time if time.tzinfo else None


def _say(console, text: str) -> None:
    console.print(escape(text), highlight=False, soft_wrap=True)
