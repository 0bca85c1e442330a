"""Shards made side by side, by processes of our own (worker.py) that end with this one."""

import os
import pickle
import subprocess
import sys
import threading
from collections.abc import Iterable
from signal import SIGKILL, Signals
from typing import Any

from fastdpo.data.store.folder import Folder
from fastdpo.data.store.work import Made, Work
from fastdpo.errors import DataError


class NotReady(Exception):
    """Processes cannot do this work, which this one can."""


class Todo:
    """Numbers of shards that nobody makes yet."""

    def __init__(self, numbers: Iterable[int], folder: Folder | None):
        self._left, self._folder, self._lock = dict.fromkeys(numbers), folder, threading.Lock()

    def take(self) -> int | None:
        """The next one; what another run is making now comes last, and is there then. None: no more."""
        with self._lock:
            others = self._folder.claimed() if self._left and self._folder is not None else set()
            number = next((n for n in self._left if n not in others), next(iter(self._left), None))
            if number is not None:
                del self._left[number]
            return number


class Makers:
    """This process, where it has to wait for a shard, and others, each with a thread here that gives it one
    number after the other. Use it in `with`, which raises NotReady where the work cannot be handed over."""

    def __init__(self, work: Work, todo: Todo, count: int):
        """`count`: of the others, none at least."""
        self._work, self._todo, self._count = work, todo, count
        self._processes: list[subprocess.Popen] = []
        self._threads: list[threading.Thread] = []
        self._made: dict[int, Made | Exception] = {}
        self._broken: Exception | None = None
        self._news = threading.Condition()

    def __enter__(self):
        try:
            self._start()
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        for process in self._processes:
            process.kill()  # what it writes has no name yet, and goes with Folder.leave
        for process in self._processes:
            process.wait()
        for thread in self._threads:
            thread.join()
        for process in self._processes:
            _close(process)

    def result(self, number: int) -> Made:
        """Raises what was raised when it was made."""
        is_there = lambda: number in self._made or self._broken
        while not is_there() and (one := self._todo.take()) is not None:
            found: Made | Exception
            try:
                found = self._work.make(one)
            except Exception as error:  # raised when it is this one's turn
                found = error
            with self._news:
                self._made[one] = found
        with self._news:
            self._news.wait_for(is_there)
            made = self._made.pop(number, self._broken)
        if isinstance(made, Made):
            return made
        assert made is not None
        raise made

    def _start(self) -> None:
        if not self._count:
            return
        try:
            work = pickle.dumps(self._work)
        except Exception as error:  # of any tokenizer's attributes
            raise NotReady(f"its tokenizer cannot be handed to others ({error})") from None
        try:
            self._processes += (_process() for _ in range(self._count))
        except OSError as error:  # there may be no more of them
            raise NotReady(f"others cannot do it ({type(error).__name__}: {error})") from None
        for process in self._processes:
            _send(process, work)
        for process in self._processes:
            digest = _receive(process)
            if isinstance(digest, Exception):
                raise NotReady(f"others cannot do it ({type(digest).__name__}: {digest})")
            if digest != self._work.making.tokenizer_digest:
                raise NotReady("its tokenizer changes on the way to others")
        self._threads = [threading.Thread(target=self._serve, args=[one]) for one in self._processes]
        for thread in self._threads:
            thread.start()

    def _serve(self, process: subprocess.Popen) -> None:
        while (number := self._todo.take()) is not None:
            try:
                _send(process, pickle.dumps(number))
                made = _receive(process)
            except Exception as error:  # it is dead, and who waits for what it has not made must not wait on
                with self._news:
                    self._broken = self._broken or error
                    self._news.notify_all()
                return
            with self._news:
                self._made[number] = made
                self._news.notify_all()


def cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _process() -> subprocess.Popen:
    # All that we can import it can, and -P: no file of the working directory stands for a module.
    paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "fastdpo.data.store.worker"],
        env=os.environ | {"PYTHONPATH": paths, "TOKENIZERS_PARALLELISM": "false"},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,  # Ctrl-C is for us, and ends it too
    )


def _send(process: subprocess.Popen, pickled: bytes) -> None:
    assert process.stdin is not None
    try:
        process.stdin.write(pickled)
        process.stdin.flush()
    except OSError:
        raise _death(process) from None


def _receive(process: subprocess.Popen) -> Any:
    try:
        return pickle.load(process.stdout)  # type: ignore[arg-type]
    except (EOFError, OSError, pickle.UnpicklingError):
        raise _death(process) from None


def _death(process: subprocess.Popen) -> Exception:
    code = process.wait()
    if code >= 0:
        return DataError(f"a process that tokenises rows ended with exit code {code}; see what it said above")
    why = ", as the system does where memory runs out" if code == -SIGKILL else ""
    return DataError(
        f"a process that tokenises rows was ended by {Signals(-code).name}{why}. Run again: what was made is "
        "kept, unless data_cache is off. On Linux, taskset -c 0-3 in front of the command lets it start four "
        "of them at most"
    )


def _close(process: subprocess.Popen) -> None:
    for pipe in (process.stdin, process.stdout):
        assert pipe is not None
        try:
            pipe.close()
        except OSError:  # it was dead before all was sent
            pass
