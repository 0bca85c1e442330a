"""Files that are either the old ones or the new ones, whole, whenever the process or the machine dies."""

import contextlib
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path


def write_text(path: Path, text: str) -> None:
    """Replaces a file's content in one step."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")  # two processes may write one report
    try:
        part.write_text(text, encoding="utf-8")
        sync(part)
        os.replace(part, path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise
    sync(path.parent)


def add_lines(path: Path, *records: dict) -> None:
    """Adds lines of JSON; opened and closed at once, so that a killed process keeps what it wrote."""
    with path.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yields a temporary folder to fill, which then becomes `final`, whole, in place of what was there.

    A crash leaves `.NAME.part` or `.NAME.old` behind, for `recover`.
    """
    part, old = part_of(final), final.with_name(f".{final.name}.old")
    for leftover in (part, old):
        shutil.rmtree(leftover, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        yield part
        for path in part.rglob("*"):
            sync(path)
        sync(part)
        if final.exists():
            os.rename(final, old)
        os.rename(part, final)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise
    sync(final.parent)
    shutil.rmtree(old, ignore_errors=True)


def part_of(final: Path) -> Path:
    """The temporary folder of new_folder."""
    return final.with_name(f".{final.name}.part")


@contextlib.contextmanager
def held(folder: Path) -> Iterator[None]:
    """Holds a folder against a second process; BlockingIOError where one has it. The lock goes with the
    process, however it ends."""
    fd = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def recover(folder: Path) -> None:
    """Puts right what a crash in this module left in a folder: half-written things go, and what had been
    moved away for something that did not come is moved back."""
    for part in folder.glob(".*.part"):
        shutil.rmtree(part) if part.is_dir() else part.unlink()
    for old in folder.glob(".*.old"):
        final = folder / old.name[1:-4]
        shutil.rmtree(old) if final.exists() else os.rename(old, final)


def sync(path: Path) -> None:
    """Returns once a file's content, or a folder's list of names, is on the disk."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def file_digest(path: Path) -> str:
    """blake2b of a file's content, hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()


def json_digest(value) -> str:
    """blake2b of anything JSON-like, hex; sets become sorted lists, and what JSON does not know its str."""
    plain = lambda v: sorted(v) if isinstance(v, set | frozenset) else str(v)
    text = json.dumps(value, sort_keys=True, default=plain)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
