"""A data set's shards in a folder of their own: <number>-<xxh3_128 of its content>.arrow each, and about.json
once all are there. Any number of processes may read and write it at once, and each may be killed: a shard
appears under its name whole, and what a crash of the machine tore has another hash than its name says.
"""

import contextlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xxhash import xxh3_128_hexdigest

from fastdpo.errors import ConfigError

_SHARD = re.compile(r"(\d+)-([0-9a-f]{32})\.arrow")
_PART = re.compile(r"(\d+)\.([0-9a-f]{16})\.part")
_FORGOTTEN = 3600  # seconds after which nobody writes a part any more


def cache_folder(data_cache: str) -> Path | None:
    """Where the config key `data_cache` puts all data sets; None for off. Raises ConfigError for a file."""
    if data_cache == "off":
        return None
    if data_cache != "auto":
        folder = Path(data_cache).expanduser()
        if folder.is_file():
            raise ConfigError(f"data_cache: {folder} is a file; name a folder")
        return folder
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path("~/.cache").expanduser()) / "fastdpo/tokens"


@dataclass(frozen=True)
class Folder:
    """One data set's. Errors of the file system are OSErrors, but where nothing hangs on them."""

    path: Path
    private: bool = True  # where it has to be made: for nobody else to read
    run: str = field(default_factory=lambda: secrets.token_hex(8))  # whose parts are ours

    def prepare(self) -> None:
        """Makes it, without what killed runs left half-written."""
        self.path.parent.mkdir(mode=0o700 if self.private else 0o777, parents=True, exist_ok=True)
        self.path.mkdir(exist_ok=True)
        for part, _, _ in self._parts():
            if _age(part) > _FORGOTTEN:
                _remove(part)

    def about(self) -> dict[str, Any] | None:
        """What `finish` was told, where it was."""
        try:
            found = json.loads((self.path / "about.json").read_bytes())
            return found if isinstance(found["rows"], int) and isinstance(found["shards"], int) else None
        except (OSError, ValueError, LookupError, TypeError):
            return None

    def finish(self, about: dict[str, Any]) -> None:
        part = self._part(0)
        with _or_nothing(part):
            part.write_text(json.dumps(about), encoding="utf-8")
            os.replace(part, self.path / "about.json")

    def touch(self) -> None:
        """Says when it was last used."""
        with contextlib.suppress(OSError):
            os.utime(self.path / "about.json")

    def shards(self) -> Iterator[tuple[Path, int, str]]:
        """(file, its number, its digest). Usually one a number: several where one is no longer good."""
        return self._named(_SHARD)

    def write(self, number: int, data) -> Path:
        """Anything with a buffer."""
        final = self.path / f"{number:06d}-{xxh3_128_hexdigest(data)}.arrow"
        part = self._part(number)
        with _or_nothing(part):
            part.write_bytes(data)
            os.replace(part, final)
        for file, of, _ in self.shards():
            if of == number and file != final:  # damaged, or of another clock
                _remove(file)
        return final

    def claim(self, number: int) -> None:
        """Tells other runs that this one is about to write it."""
        with contextlib.suppress(OSError):
            self._part(number).touch()

    def claimed(self) -> set[int]:
        """What other runs are about to write."""
        return {n for part, n, run in self._parts() if run != self.run and _age(part) < _FORGOTTEN}

    def leave(self) -> None:
        """Removes what this run began and did not end."""
        for part, _, run in self._parts():
            if run == self.run:
                _remove(part)

    def remove(self) -> None:
        """All of it."""
        shutil.rmtree(self.path, ignore_errors=True)

    def _part(self, number: int) -> Path:
        return self.path / f"{number:06d}.{self.run}.part"

    def _parts(self) -> Iterator[tuple[Path, int, str]]:
        return self._named(_PART)

    def _named(self, pattern: re.Pattern) -> Iterator[tuple[Path, int, str]]:
        try:
            names = sorted(os.listdir(self.path))
        except OSError:
            return
        for name in names:
            if found := pattern.fullmatch(name):
                yield self.path / name, int(found[1]), found[2]


@contextlib.contextmanager
def _or_nothing(part: Path) -> Iterator[None]:
    try:
        yield
    except BaseException:
        _remove(part)
        raise


def _remove(file: Path) -> None:
    with contextlib.suppress(OSError):
        file.unlink()


def _age(file: Path) -> float:
    """In seconds; 0 of one that is gone."""
    try:
        return time.time() - file.stat().st_mtime
    except OSError:
        return 0.0
