"""Who may have how much of a GPU's memory."""

import threading
from contextlib import contextmanager

BESIDE = 1.5e9  # bytes of a process that its allocator does not count: the CUDA context, libraries


class Room:
    """Bytes of the device that are still free; take() waits for its turn."""

    def __init__(self, n_bytes: float):
        self.free, self.all, self.changed = n_bytes, n_bytes, threading.Condition()

    def take(self, n_bytes: float) -> float:
        """Waits until so much is free, or all, and takes it."""
        n_bytes = min(n_bytes, self.all)
        with self.changed:
            self.changed.wait_for(lambda: self.free >= n_bytes)
            self.free -= n_bytes
        return n_bytes

    @contextmanager
    def back(self, n_bytes: float):
        """Gives it back at the end."""
        try:
            yield
        finally:
            with self.changed:
                self.free += n_bytes
                self.changed.notify_all()
