"""A data set that misbehaves as it is told. Child processes import this file, too: no torch."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from fastdpo.data.report import RowProblem
from fastdpo.data.store.workers import Todo
from fastdpo.errors import DataError

_take = Todo.take


class Strange(Exception):
    """It cannot be pickled."""

    def __init__(self, one, two):
        super().__init__(f"{one} {two}")


def take_as_others(todo: Todo) -> int | None:
    """Todo.take, but nothing for the process whose data set it is while there are others: they make all."""
    others = any("_serve" in thread.name for thread in threading.enumerate())
    return None if others and threading.current_thread() is threading.main_thread() else _take(todo)


@dataclass
class Rows:
    """Its rows are texts, but for some that are dropped."""

    source: str
    size: int
    acts: dict[int, str] = field(default_factory=dict)  # row -> what happens when it is read
    layout = None

    def __len__(self) -> int:
        return self.size

    def range(self, start: int, stop: int) -> Iterator[dict]:
        for number in range(start, stop):
            act, _, more = self.acts.get(number, "").partition(" ")
            if act == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif act == "leave":
                os._exit(3)
            elif act == "data":
                raise DataError(f"data: row {number} cannot be read")
            elif act == "strange":
                raise Strange("row", number)
            elif act == "wait":  # until somebody opens the other end
                Path(more).read_bytes()
            elif act == "say":
                print("a library says something", flush=True)
            words = "good morning wor world old gold".split()
            said = " ".join(words[(number * n) % 6] for n in (1, 5, 7, 11))
            rejected = said if act == "same" else f"{said} gold {number}"
            yield {"prompt": f"{said} {number}", "chosen": f" {said} morning", "rejected": f" {rejected}"}

    def folder_of(self, number: int) -> None:
        return None

    def told(self, number: int, problem: RowProblem) -> str:
        return str(problem)

    def line(self, number: int) -> str:
        return ""


@dataclass
class Source:
    size: int = 20
    acts: dict[int, str] = field(default_factory=dict)
    spec: str = "rows.jsonl"
    key: str = "data"
    known: str | None = "rows that are always the same"
    changes: str = ""  # a file: where it is there, the data changed

    def identity(self) -> str | None:
        return self.known

    def rows(self) -> Rows:
        return Rows(self.spec, self.size, self.acts)

    def named(self):
        return contextlib.nullcontext()

    def check_unchanged(self) -> None:
        if self.changes and Path(self.changes).exists():
            raise DataError(f"data: {self.spec} changed while it was read; run again")
