"""SIGINT and SIGTERM: finish the step, save, say so. A second one stops at once."""

import signal
import threading
import time

from rich.console import Console

from fastdpo.distributed.world import ALONE, World
from fastdpo.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)
SAME = 5.0  # seconds in which a process of several may hear of one signal twice


class Stopping:
    """Inside `with`, a signal sets `heard`; the run asks `requested` where it can stop and save: all ranks of
    a world at the same place, and what one of them has heard holds for all.

    Before `saves` is set there is nothing to save, and after a first signal a second one means it:
    then Stopped is raised where the program stands.
    """

    def __init__(self, console: Console, world: World = ALONE):
        self._console, self._world = console, world
        self.heard: signal.Signals | None = None
        self.saves = self._said = False
        self._when = 0.0  # when it was heard

    def __enter__(self):
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handler
            self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def requested(self) -> signal.Signals | None:
        """The signal to stop by, the same on all ranks, who all have to ask."""
        number = int(self._world.max(self.heard or 0))
        if number and not self._said:
            self._say(signal.Signals(number))
        return signal.Signals(number) if number else None

    def check(self) -> None:
        """Raises Stopped if a signal has come; all ranks have to ask."""
        if number := self.requested():
            raise Stopped(number)

    def _on_signal(self, number, _frame):
        several, now = self._world.size > 1, time.monotonic()
        if several and self.heard == number and now - self._when < SAME:
            return  # a scheduler signals every process, and torchrun its own ones
        again, self.heard, self._when = self.heard is not None, signal.Signals(number), now
        if again or not self.saves:
            raise Stopped(self.heard)
        if not several or number == signal.SIGINT:  # SIGTERM is also torchrun's, once one process has ended
            self._say(self.heard)

    def _say(self, number: signal.Signals) -> None:
        self._said = True
        self._console.print(
            f"[yellow]{number.name}: stopping once this step is done and saved (again: at once)"
        )
