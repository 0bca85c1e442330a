"""How well a run uses its machine, and how long it will still take."""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch


class Idle:
    """How long the device had nothing to do.

    On a GPU: the gaps between the work of microbatches and updates, by events at their borders, which are
    read once they have passed, so that nothing waits. Not seen are gaps inside of a microbatch or an update;
    small work between them counts as idle. On a CPU: the time that its threads did not run, as others had the
    cores or one thread worked alone.
    """

    def __init__(self):
        self.seconds = 0.0  # of a GPU's gaps
        self.on_gpu = torch.cuda.is_available()
        self._cpu = 0.0 if self.on_gpu else time.process_time()
        self._gaps: deque = deque()  # (end of one, start of the next)
        self._end = None

    def next(self) -> "Idle":
        """One that begins where this one is."""
        later = Idle()
        later._end = self._end
        return later

    @classmethod
    def restored(cls, seconds: float, idle: float) -> "Idle":
        """One of a window of so many seconds up to now, of which so many were idle."""
        one = cls()
        if one.on_gpu:
            one.seconds = idle
        else:
            one._cpu -= (seconds - idle) * torch.get_num_threads()
        return one

    @contextlib.contextmanager
    def busy(self, guard: contextlib.AbstractContextManager) -> Iterator[None]:
        """Around what the device is asked to do, and inside of it the guard."""
        start = _event() if self.on_gpu else None
        if self._end is not None:
            self._gaps.append((self._end, start))
        with guard:
            yield
        self._end = _event() if self.on_gpu else None

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """What happens inside is neither idle nor busy."""
        start, cpu = time.perf_counter(), time.process_time()
        yield
        if self.on_gpu:  # part of the gap that is open, if one is
            self.seconds -= 0.0 if self._end is None else time.perf_counter() - start
        else:
            self._cpu += time.process_time() - cpu

    def read(self) -> None:
        """Adds up what has passed. Call it now and then, or the events of a long window would pile up."""
        while self._gaps and self._gaps[0][1].query():
            end, start = self._gaps.popleft()
            self.seconds += end.elapsed_time(start) / 1e3

    def share(self, wall: float) -> float:
        """Of so many seconds."""
        self.read()
        idle = self.seconds
        if not self.on_gpu:
            idle = wall - (time.process_time() - self._cpu) / torch.get_num_threads()
        return min(max(idle / wall, 0.0), 1.0)


def _event():
    return torch.cuda.current_stream().record_event(torch.cuda.Event(enable_timing=True))


@dataclass
class Pace:
    """How long a stage still takes, from what this process has seen of it: steps, held-out passes and
    checkpoints, each where it has happened. The first step, which warms up, counts until there are others."""

    clock: Callable[[], float] = time.perf_counter
    first: float = 0.0  # seconds of the first step
    steps: int = -1  # after it
    seconds: float = 0.0
    last: dict[str, float] = field(default_factory=dict)  # of each other thing the last one's seconds
    _start: float = 0.0

    def begin(self) -> None:
        self._start = self.clock()

    def stepped(self) -> None:
        spent = self.clock() - self._start
        self.steps += 1
        if self.steps:
            self.seconds += spent
        else:
            self.first = spent

    @contextlib.contextmanager
    def of(self, what: str) -> Iterator[None]:
        start = self.clock()
        yield
        self.last[what] = self.clock() - start

    @property
    def step(self) -> float:
        """Seconds of a step, about."""
        return self.seconds / self.steps if self.steps else self.first

    def left(self, steps: int, **others: int) -> float:
        """Seconds of so many steps, and of so many of each other thing; after the first step."""
        return steps * self.step + sum(count * self.last.get(what, 0.0) for what, count in others.items())
