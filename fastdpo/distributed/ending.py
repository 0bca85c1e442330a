"""How a run of several processes ends when one of them cannot go on: all end, and one says why."""

import contextlib
import time
from dataclasses import dataclass
from typing import Any

from fastdpo.errors import ConfigError, Stopped, TrainingError

SOON = 3  # seconds that the others let rank 0 speak first, of what all of them have met
ALL = 20  # seconds that they wait for it to write down why
# what gloo and nccl raise where the other end has gone
_GONE = ("connection closed", "connection reset", "broken pipe", "remote process exited")


class Elsewhere(SystemExit):
    """Another rank says why the run ends; the exit code is its own."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(code)
        self.message = message


@dataclass
class Ending:
    """What the ranks leave for one another in a key-value store, which outlives each of them."""

    store: Any = None  # None: this process is alone
    rank: int = 0
    size: int = 1

    def cause(self, error: BaseException) -> BaseException:
        """What this rank has to raise in place of `error`: that, where it is the first to tell; Elsewhere,
        where another one has told; and where it is only that another rank has gone, that in words."""
        if self.store is None or isinstance(error, Elsewhere):
            return error
        if self.rank:
            self._wait("why", SOON)
        mine = f"{self.rank} {exit_code(error)}"
        try:
            told = self.store.compare_set("who", "", mine).decode()
        except RuntimeError:  # the store has gone, with its node
            return error
        if told == mine:
            if isinstance(error, RuntimeError) and any(word in str(error).lower() for word in _GONE):
                error = TrainingError(
                    f"rank {self.rank} has lost another process of this run, which ended without a word: "
                    f"killed, perhaps, as the machine ran out of memory ({str(error).splitlines()[0]})"
                )
            self.store.set("why", str(error) or type(error).__name__)
            error.left_to_this_rank = True  # type: ignore[attr-defined]
            return error
        self._wait("why", SOON)
        message = self.store.get("why").decode() if self.store.check(["why"]) else ""
        return Elsewhere(int(told.split()[1]), message)

    def leave(self, cause: BaseException) -> None:
        """Before this process ends: whoever has nothing to say waits for rank 0, which writes the run's
        events; if it ended before, it would be told to end as well. Whoever has said why ends at once, for
        its end is what wakes those who wait for it."""
        if self.store is None:
            return
        if self.rank == 0:
            self.store.set("first has ended", "")
        elif isinstance(cause, Elsewhere):
            self._wait("first has ended", ALL)

    def _wait(self, key: str, seconds: float) -> None:
        until = time.monotonic() + seconds
        with contextlib.suppress(Exception):  # torch's own, where the store has gone
            while not self.store.check([key]) and time.monotonic() < until:
                time.sleep(0.02)


def exit_code(error: BaseException) -> int:
    """What the command ends with for such an error."""
    if isinstance(error, Stopped):
        return 128 + error.signal
    return 2 if isinstance(error, ConfigError) else 1
