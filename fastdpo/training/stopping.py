"""SIGINT and SIGTERM: finish the step, save, say so. A second one stops at once."""

import signal
import threading

from rich.console import Console

from fastdpo.distributed.world import ALONE, World
from fastdpo.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)


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
        again, self.heard = self.heard is not None, signal.Signals(number)
        if again or not self.saves:
            raise Stopped(self.heard)
        if self._world.size == 1:  # of several, torchrun ends those who wait for one that has ended
            self._say(self.heard)

    def _say(self, number: signal.Signals) -> None:
        self._said = True
        self._console.print(
            f"[yellow]{number.name}: stopping once this step is done and saved (again: at once)"
        )
