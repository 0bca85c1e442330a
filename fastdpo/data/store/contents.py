"""`fastdpo cache`: which data sets are stored as tokens, and removing some. A look changes nothing.

Age is that of the last use; of one that was never finished, of its newest file.
"""

import json
import re
import shutil
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rich.markup import escape
from rich.table import Table

from fastdpo.console.formatting import counted, gigabytes, printable
from fastdpo.data.store.folder import cache_folder
from fastdpo.errors import ConfigError, DataError

SHOWN = 8  # hex digits of an id
# What a data set's folder and the files in it are named: a folder that holds anything else is none.
_ID, _OURS = re.compile(r"[0-9a-f]{32}"), re.compile(r"about\.json|[\w.-]+\.(arrow|part)")


@dataclass(frozen=True)
class TokenSet:
    """A data set as some tokenizer makes tokens of it."""

    folder: Path
    told: dict[str, Any]  # of the file that is written when all is there; empty until then
    used: datetime
    bytes: int

    @property
    def id(self) -> str:
        return self.folder.name


def folder_of(where: Path | None) -> Path | None:
    """Where data sets are, of what `fastdpo cache` is given; None where it is given a file."""
    if where is None:
        return cache_folder("auto")
    return where if where.is_dir() else None


def show(folder: Path, console) -> None:
    """Prints what `fastdpo cache` shows of tokenised data sets."""
    found = stored(folder)
    if not found:
        _say(console, f"{folder}: nothing is stored yet")
        return
    _say(console, f"{folder}: {_counted(found)}, {gigabytes(sum(one.bytes for one in found))}")
    console.print(_table(found))


def chosen(folder: Path, age: timedelta | None, prefixes: list[str]) -> list[TokenSet]:
    """The data sets that are older and begin so; with both given, those of both. Raises ConfigError."""
    some, now = begin_so(stored(folder), prefixes, "--tokens"), datetime.now(UTC)
    return [one for one in some if age is None or now - one.used > age]


def prune(folder: Path, gone: list[TokenSet], dry_run: bool, console) -> None:
    """Removes these of the folder's data sets. Runs that read them go on: what they have opened stays there
    for them."""
    if gone:
        console.print(_table(gone))
    what, size = _counted(gone), gigabytes(sum(one.bytes for one in gone))
    if dry_run:
        _say(console, f"{folder}: {what} would go, {size}")
        return
    for one in gone:
        _remove(one.folder)
    _say(console, f"{folder}: {what} removed, {size} given back")


def stored(folder: Path) -> list[TokenSet]:
    """The one used last at the end."""
    names = sorted(folder.iterdir()) if folder.is_dir() else []
    found = [_read(name) for name in names if _ID.fullmatch(name.name) and name.is_dir()]
    return sorted(filter(None, found), key=lambda one: one.used)


def _read(folder: Path) -> TokenSet | None:
    """None for a folder that is none, or is removed meanwhile."""
    about = folder / "about.json"
    try:
        files = {file: file.stat() for file in folder.iterdir()}
        if not all(_OURS.fullmatch(file.name) for file in files):
            return None
        told = _told(about) if about in files else {}
        last = files.get(about) or max([folder.stat(), *files.values()], key=lambda stat: stat.st_mtime)
    except FileNotFoundError:
        return None
    used = datetime.fromtimestamp(last.st_mtime, UTC)
    return TokenSet(folder, told, used, sum(stat.st_size for stat in files.values()))


def _told(file: Path) -> dict[str, Any]:
    """Empty where it is damaged."""
    try:
        value = json.loads(file.read_bytes())
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _remove(folder: Path) -> None:
    try:
        (folder / "about.json").unlink(missing_ok=True)  # first: without it nothing is believed to be whole
        shutil.rmtree(folder)
    except FileNotFoundError:  # somebody else removes it too
        pass
    except OSError as error:
        text = f"cache prune: {folder} cannot be removed ({error.strerror}); is a run writing into it?"
        raise DataError(text) from None


def begin_so(found: list, prefixes: list[str], flag: str) -> list:
    """Those whose `id` begins with one of the prefixes; all, where there are none. Raises ConfigError for a
    prefix that is of none, or of several."""
    named = []
    for prefix in prefixes:
        fits = [one for one in found if prefix and one.id.startswith(prefix.lower())]
        if not fits:
            raise ConfigError(f"{flag}: no id begins with {prefix!r}. `fastdpo cache` shows them")
        if len(fits) > 1:
            ids = ", ".join(one.id[: max(SHOWN, len(prefix) + 4)] for one in fits)
            raise ConfigError(f"{flag}: several ids begin with {prefix!r} ({ids}): give more of it")
        named += fits
    return [one for one in found if one in named] if prefixes else found


def _table(found: list[TokenSet]) -> Table:
    table = Table(box=None, pad_edge=False)
    table.add_column("tokens", no_wrap=True)
    table.add_column("of", overflow="fold")
    for name in ("rows", "size"):
        table.add_column(name, justify="right", no_wrap=True)
    for name in ("made", "last used"):
        table.add_column(name, no_wrap=True)
    for one in found:
        told = one.told
        of = [str(told.get("source", "not finished")), f"by: {told.get('tokenizer', 'not recorded')}"]
        rows = f"{told['rows']:,}" if isinstance(told.get("rows"), int) else "?"
        made = _day(told.get("made"))
        cells = "\n".join(map(printable, of if told else of[:1])), rows, gigabytes(one.bytes), made
        table.add_row(one.id[:SHOWN], *map(escape, cells), _day(one.used.isoformat()))
    return table


def _day(time: Any) -> str:
    """Here; ? for what is none."""
    try:
        return f"{datetime.fromisoformat(time).astimezone():%Y-%m-%d}"
    except (TypeError, ValueError):
        return "?"


def _counted(found: list[TokenSet]) -> str:
    return counted(len(found), "tokenised data set")


def _say(console, text: str) -> None:
    console.print(escape(text), highlight=False, soft_wrap=True)
