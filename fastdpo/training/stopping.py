"""SIGINT and SIGTERM: finish the step, save, say so. A second one stops at once."""

import signal
import threading

from rich.console import Console

from fastdpo.errors import Stopped

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class Stopping:
    """Inside `with`, a signal sets `requested`, which the run looks at where it can stop and save.

    Before `saves` is set there is nothing to save, and after a first signal a second one means it:
    then Stopped is raised where the program stands.
    """

    def __init__(self, console: Console):
        self._console = console
        self.requested: signal.Signals | None = None
        self.saves = False

    def __enter__(self):
        self._before = {}
        if threading.current_thread() is threading.main_thread():  # elsewhere Python allows no handler
            self._before = {number: signal.signal(number, self._on_signal) for number in SIGNALS}
        return self

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def check(self) -> None:
        """Raises Stopped if a signal has come."""
        if self.requested is not None:
            raise Stopped(self.requested)

    def _on_signal(self, number, _frame):
        again, self.requested = self.requested is not None, signal.Signals(number)
        if again or not self.saves:
            raise Stopped(self.requested)
        self._console.print(
            f"[yellow]{self.requested.name}: stopping once this step is done and saved (again: at once)"
        )
