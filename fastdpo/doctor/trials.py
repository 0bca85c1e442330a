"""Checks in a child process: one that raises, hangs, crashes or is wrong costs its answer and no more."""

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from functools import partial
from multiprocessing import Pipe
from typing import Any

from fastdpo.doctor.measuring import Measured

START_SECONDS = 180  # to import torch and to reach the device
SECONDS = 90  # of a check, with the compilation of its kernels, some 25
KILLED_SECONDS = 10  # until a killed process is gone; one that waits for a driver may never be
HANG_SECONDS = 5  # for a hung one to say where
WHY_LENGTH = 200  # of a reason
TAIL_LINES = 12  # of what a failed child said
# How reasons begin that may be gone next time: the machine was busy, or is not well.
NO_ANSWER, NO_PROCESS = "no answer within", "no further process starts"


class NotStarted(Exception):
    """The first child could not even begin: nothing is known of any check."""


@dataclass(frozen=True)
class Outcome:
    """What became of a check.

    verdict  right; inexact (an error above what is allowed, or NaN); failed (raised, hung, died); not here;
             unknown (out of memory, which is no fault of a kernel: another process may have it)
    why      the reason, one line, where it is not right
    worst    the result that is nearest to its bound, or furthest above it
    detail   the end of what the child said on stderr, where it failed
    """

    verdict: str
    why: str = ""
    worst: Measured | None = None
    seconds: float = 0.0
    detail: str = ""


@dataclass(frozen=True)
class Answer:
    """Of a child: a value, or why the check is not for this machine, or why there is neither."""

    value: Any = None
    not_here: str | None = None
    failed: str | None = None
    detail: str = ""


class Children:
    """One child process for as long as nothing fails, and another one after that. Use it in `with`.

    device: as torch names it, "cpu" or "cuda:0".
    """

    def __init__(self, device: str):
        self.device = device
        self.started = 0  # processes, so far
        self._no_more = ""  # why no further one starts
        self._process: Any = None
        self._log: Any = None
        self._connection: Any = None

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self._stop()

    def ask(self, function: str, arguments: dict, seconds: float = SECONDS) -> Answer:
        """What "module:name" returns in the child. Raises NotStarted where no process ever started; a later
        one that does not is an Answer, so that what is known is not lost."""
        if self._process is None and not self._no_more:
            try:
                self._start()
            except NotStarted as error:
                if not self.started:
                    raise
                self._no_more = f"{NO_PROCESS}: {error}"
        if self._no_more:
            return Answer(failed=self._no_more, detail=self._tail())
        with contextlib.suppress(OSError):  # it is dead; why is told below
            self._connection.send((function, arguments, seconds))
        answer = self._answer(seconds)
        if answer.failed is None:
            return answer
        self._stop()
        return replace(answer, detail=self._tail())

    def _start(self) -> None:
        self._log = None
        # All that we can import it can, and -P: no file of the working directory stands for a module.
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        try:
            self._log = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")
            self._connection, its = Pipe()
            with its:
                self._process = subprocess.Popen(
                    [sys.executable, "-P", "-m", "fastdpo.doctor.child", self.device, str(its.fileno())],
                    env=os.environ | {"PYTHONPATH": paths},
                    pass_fds=[its.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=self._log,
                    stderr=self._log,
                    start_new_session=True,  # Ctrl-C is for us, and not a crash of a kernel
                )
        except OSError as error:
            raise NotStarted(str(error)) from None
        failed = self._answer(START_SECONDS).failed
        if failed is not None:
            self._stop()
            raise NotStarted(f"{failed}: {(self._tail() or 'it said nothing').splitlines()[-1]}")
        self.started += 1

    def _answer(self, seconds: float) -> Answer:
        """To the last order."""
        try:
            if self._connection.poll(seconds):
                return Answer(**self._connection.recv())
        except (EOFError, OSError):
            return Answer(failed=self._death())
        self._process.send_signal(signal.SIGUSR1)  # it writes down where it hangs, for the detail, and ends
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(HANG_SECONDS)
        return Answer(failed=f"{NO_ANSWER} {seconds:g} s")

    def _death(self) -> str:
        try:
            code = self._process.wait(KILLED_SECONDS)
        except subprocess.TimeoutExpired:
            return "it closed its output and went on"
        if code < 0:
            return f"the process died of {signal.Signals(-code).name}"
        return f"the process ended with exit code {code}"

    def _tail(self) -> str:
        if self._log is None:
            return ""
        self._log.seek(0)
        return "\n".join(self._log.read().splitlines()[-TAIL_LINES:])

    def _stop(self) -> None:
        if self._process is None:
            return
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(KILLED_SECONDS)
        self._connection.close()
        self._process = None


def try_check(children: Children, function: str, arguments: dict, seconds: float = SECONDS) -> Outcome:
    """Runs a check, a function that returns Measureds. Raises NotStarted."""
    start = time.monotonic()
    answer = children.ask(function, arguments, seconds)
    outcome = partial(Outcome, seconds=time.monotonic() - start, detail=answer.detail)
    if answer.not_here is not None:
        return outcome("not here", answer.not_here)
    if answer.failed is not None:
        verdict = "unknown" if "out of memory" in answer.failed.lower() else "failed"
        return outcome(verdict, answer.failed.strip().splitlines()[0][:WHY_LENGTH])
    try:
        results = [Measured(str(what), float(error), float(allowed)) for what, error, allowed in answer.value]
    except (TypeError, ValueError):
        return outcome("failed", f"the check returned {str(answer.value)[:100]}")
    if not results:
        return outcome("failed", "the check measured nothing")
    worst = max(results, key=lambda m: m.share)
    if worst.right:
        return outcome("right", worst=worst)
    return outcome("inexact", f"{worst.what}: {worst.error:.1e}, {worst.allowed:.1e} allowed", worst)
