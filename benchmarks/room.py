"""Who may have how much of a GPU's memory."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

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


@contextmanager
def smaller_card(gigabytes: float, device: str) -> Iterator[None]:
    """Inside, this process holds all of a GPU but so much (10^9 bytes) and BESIDE. An allocator's limit does
    not count managed memory, which paged optimizer states live in: only where the device is full do they
    move to the host, as on a card of that size."""
    held = None
    if device == "cuda":
        free = torch.cuda.mem_get_info()[0]
        held = torch.empty(max(0, int(free - gigabytes * 1e9 - BESIDE)), dtype=torch.uint8, device="cuda")
    try:
        yield
    finally:
        del held
        if device == "cuda":
            torch.cuda.empty_cache()
