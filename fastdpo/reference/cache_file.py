"""The SQLite file under the reference cache: where it is, opened, checked, moved aside where it is damaged.

A rollback journal, SQLite's default, works on network file systems and leaves no second file behind.
"""

import contextlib
import os
import sqlite3
from collections.abc import Callable
from pathlib import Path

from rich.markup import escape

from fastdpo.errors import ConfigError, TrainingError

VERSION = 1  # of the file format
BUSY_SECONDS = 60
WAY_OUT = "Set reference_cache to another file, or to off to compute the log-probs anew in every run"
_APPLICATION = 0x66647063  # "fdpc": how SQLite files of different programs are told apart
_MAGIC = b"SQLite format 3\0"
_SCHEMA = {
    "CREATE TABLE namespaces (id BLOB PRIMARY KEY, created TEXT, parts TEXT) WITHOUT ROWID",
    "CREATE TABLE fills (id INTEGER PRIMARY KEY AUTOINCREMENT, namespace BLOB, started TEXT, "
    "environment TEXT)",
    "CREATE TABLE packs (id INTEGER PRIMARY KEY AUTOINCREMENT, namespace BLOB, fill INTEGER, "
    "digest BLOB, keys BLOB, lengths BLOB, logps BLOB)",
}
# What only our files hold in their first pages: the schema, and how the parts of a namespace begin.
_SIGNS = (*(statement.encode() for statement in _SCHEMA), b'{"numerics": ')
_FIRST_PAGES = 1 << 16


def cache_path(reference_cache: str) -> Path | None:
    """The file that the config key `reference_cache` means; None for off."""
    if reference_cache == "off":
        return None
    if reference_cache != "auto":
        return Path(reference_cache).expanduser()
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path("~/.cache").expanduser()) / "fastdpo/reference.sqlite"


class _Damaged(Exception):
    """The file is not, or no longer, what was written."""


class CacheFile(contextlib.AbstractContextManager):
    """A cache file, opened when there is work on it, all of which goes through `run`. Use it in `with`.

    as_it_is: no file is made, and none moved aside; one that is damaged is a TrainingError.
    """

    def __init__(self, path: Path | None, console, *, as_it_is: bool = False):
        self.path, self._console, self._as_it_is = path, console, as_it_is
        self._way_out = "Nothing was changed" if as_it_is else WAY_OUT
        self._db: sqlite3.Connection | None = None

    def __exit__(self, *_):
        self.close()

    def run(self, work: Callable[[sqlite3.Connection], None]) -> None:
        """work(connection); where the file turns out to be damaged, again on a new one. No path, no work."""
        if self.path is None:
            return
        try:
            try:
                self._try(work)
            except _Damaged as damage:
                if self._as_it_is:
                    raise TrainingError(
                        f"reference_cache: {self.path} is damaged ({damage}). The next run moves it aside "
                        "and starts a new one. Nothing was changed"
                    ) from None
                self._move_aside(damage)
                self._try(work)
        except _Damaged as damage:
            raise TrainingError(f"reference_cache: {self.path}: {damage}. {WAY_OUT}") from None

    def close(self) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def say(self, message: str) -> None:
        self._console.print(f"[yellow]reference_cache: {escape(message)}", highlight=False, soft_wrap=True)

    def _try(self, work) -> None:
        assert self.path is not None
        try:
            if self._db is None:
                self._open()
            work(self._db)
        except sqlite3.Error as error:
            raise _explained(self.path, error, self._way_out) from None
        except UnicodeDecodeError:  # Python cannot even read SQLite's message, which quotes the file
            raise _Damaged("database disk image is malformed") from None
        except OSError as error:
            raise ConfigError(f"reference_cache: {self.path}: {error.strerror}. {self._way_out}") from None

    def _open(self) -> None:
        assert self.path is not None
        if self.path.is_dir():
            raise ConfigError(f"reference_cache: {self.path} is a folder; name a file in it")
        if not self._as_it_is:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        if not _may_be_ours(self.path):
            raise ConfigError(
                f"reference_cache: {self.path} is no SQLite file, and is left alone. {self._way_out}"
            )
        uri = f"{self.path.absolute().as_uri()}?mode={'rw' if self._as_it_is else 'rwc'}"
        db = sqlite3.connect(uri, uri=True, timeout=BUSY_SECONDS, isolation_level=None)
        db.text_factory = bytes  # damaged text must not stop a query
        file = os.stat(self.path)
        self._db, self._inode = db, file.st_ino
        try:
            if 0 < file.st_size < 512:
                raise _Damaged("it is cut short")  # SQLite would take it for an empty database
            if not self._as_it_is and not _schema(db):
                _create(db)
            self._check(db)
        except BaseException as error:
            self.close()
            if getattr(error, "sqlite_errorcode", None) == sqlite3.SQLITE_ERROR:
                raise _Damaged(str(error)) from None  # a header or schema that SQLite does not know
            raise

    def _check(self, db) -> None:
        (application,) = db.execute("PRAGMA application_id").fetchone()
        (version,) = db.execute("PRAGMA user_version").fetchone()
        if application != _APPLICATION:
            if _schema(db) == _SCHEMA:
                raise _Damaged("its header is not that of a reference cache")
            raise ConfigError(f"reference_cache: {self.path} is some other SQLite database. {self._way_out}")
        if version > VERSION:
            raise ConfigError(
                f"reference_cache: {self.path} has format {version}, of a newer fastdpo; this one knows "
                f"format {VERSION}. Upgrade fastdpo, or set reference_cache to another file"
            )
        if version < VERSION or _schema(db) != _SCHEMA:
            raise _Damaged("its tables are not those of a reference cache")

    def _move_aside(self, damage: _Damaged) -> None:
        assert self.path is not None
        self.close()
        if not self.path.exists() or os.stat(self.path).st_ino != self._inode:
            return  # another process has done so
        free = (n for n in range(1, 10**6) if not Path(f"{self.path}.damaged-{n}").exists())
        aside = f"{self.path}.damaged-{next(free)}"
        try:
            os.rename(self.path, aside)
            with contextlib.suppress(FileNotFoundError):  # it belongs to the damaged file, not to a new one
                os.rename(f"{self.path}-journal", f"{aside}-journal")
        except OSError as error:
            raise ConfigError(
                f"reference_cache: {self.path} is damaged ({damage}), and cannot be moved aside "
                f"({error.strerror}). {WAY_OUT}"
            ) from None
        self.say(f"{self.path} is damaged ({damage}): moved to {aside}; a new one is started")


@contextlib.contextmanager
def transaction(db: sqlite3.Connection):
    """All of it or none; the only writer meanwhile."""
    db.execute("BEGIN IMMEDIATE")
    try:
        yield
        db.execute("COMMIT")
    except BaseException:
        with contextlib.suppress(sqlite3.Error):  # SQLite has rolled back some errors itself
            db.execute("ROLLBACK")
        raise


def cannot_write(error: sqlite3.Error) -> bool:
    """Whether the file, or its folder, is read-only."""
    kinds = (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM)
    return getattr(error, "sqlite_errorcode", 0) & 0xFF in kinds


def _may_be_ours(path: Path) -> bool:
    """Whether a file is absent, or begins as ours do, cut or with room for one damaged place. One that begins
    with zeros, as a power cut may leave it, is ours by what follows; one of zeros alone by how it is named;
    and nobody keeps anything else where reference_cache: auto has its file."""
    try:
        with path.open("rb") as file:
            first = file.read(_FIRST_PAGES)
    except FileNotFoundError:
        return True
    ours = _APPLICATION.to_bytes(4, "big")
    if _MAGIC.startswith(first[:16]) or first[68:72] == ours or path == cache_path("auto"):
        return True
    if any(byte not in (0, magic) for byte, magic in zip(first, _MAGIC)):
        return False
    named_so = path.suffix in (".sqlite", ".sqlite3", ".db")
    return any(sign in first for sign in _SIGNS) or (named_so and _all_zeros(path))


def _all_zeros(path: Path) -> bool:
    with path.open("rb") as file:
        return not any(any(piece) for piece in iter(lambda: file.read(1 << 20), b""))


def _schema(db) -> set[str]:
    found = db.execute("SELECT CAST(sql AS BLOB) FROM sqlite_master WHERE name NOT LIKE 'sqlite_%'")
    return {str(sql or b"", errors="replace") for (sql,) in found}


def _create(db) -> None:
    with transaction(db):
        if _schema(db):  # another process has made them meanwhile
            return
        for statement in sorted(_SCHEMA):
            db.execute(statement)
        db.execute(f"PRAGMA application_id = {_APPLICATION}")
        db.execute(f"PRAGMA user_version = {VERSION}")


def _explained(path: Path, error: sqlite3.Error, way_out: str) -> Exception:
    """What an SQLite error means for a run, and the way out."""
    code = getattr(error, "sqlite_errorcode", sqlite3.SQLITE_ERROR)
    if code == sqlite3.SQLITE_READONLY_DBMOVED:
        return _Damaged("it was moved while in use")
    if code & 0xFF in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return _Damaged(str(error))
    if cannot_write(error):
        return ConfigError(f"reference_cache: {path}: cannot be written ({error}). {way_out}")
    if code & 0xFF == sqlite3.SQLITE_BUSY:
        return TrainingError(
            f"reference_cache: {path}: another process has kept it locked for {BUSY_SECONDS} s. Run again "
            f"(what is stored stays). {way_out}"
        )
    full = "the disk is full" if code & 0xFF == sqlite3.SQLITE_FULL else str(error)
    return TrainingError(
        f"reference_cache: {path}: {full}. What was stored before is kept, and found again: make room "
        f"and run again. {way_out}"
    )
