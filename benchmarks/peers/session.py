"""The worker's side of a benchmark: one order a line in, one answer a line out.

    from benchmarks.peers.session import serve
    if __name__ == "__main__":
        serve(train)        # train(job, session), see below

The answers go where stdout was, and stdout becomes stderr, so that no library can print into them.
Orders (benchmarks/workers.py sends them): {"do": "prepare", "job": {...}}, {"do": "steps", "n": 3},
{"do": "profile"}, {"do": "end"}. A worker that fails says why and exits, so that nothing of it is left.

`train` builds its model, calls session.ready(), and then for every step session.next_step() (which
waits for the order and starts the clock) and session.done(loss, also); next_step() is False at the end.
"""

import contextlib
import gc
import json
import os
import re
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

import torch

from benchmarks.peers.tracing import Trace
from benchmarks.process import resident, restart_peak


class Absent(Exception):
    """This contender cannot run here; the message says what is missing."""


class Session:
    """What a contender's `train` talks to."""

    def __init__(self, orders: TextIO, answers: TextIO):
        self.orders, self.answers = orders, answers
        self.left, self.steps, self.trace = 0, [], None

    @classmethod
    def on_stdio(cls) -> "Session":
        """Takes stdin and stdout for itself; print() and whatever else writes to stdout goes to stderr."""
        answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
        sys.stdout.flush()
        os.dup2(2, 1)
        return cls(sys.stdin, answers)

    def answer(self, **content) -> None:
        self.answers.write(json.dumps(content) + "\n")
        self.answers.flush()

    def receive(self) -> dict:
        """The next order; the end where the parent is gone."""
        line = self.orders.readline()
        return json.loads(line) if line else {"do": "quit"}

    def ready(self, **facts) -> None:
        """All is built: peaks count from here. `facts` go into the result."""
        settle()
        restart_peaks()
        self.answer(facts=facts, **memory())

    def next_step(self) -> bool:
        """Waits until a step is ordered and starts its clock; False when the training is to end."""
        if not self.left:
            if self.steps:
                self.answer(steps=self.steps, trace=self.trace and self.trace.summary(), **memory())
                self.steps, self.trace = [], None
            order = self.receive()
            if order["do"] not in ("steps", "profile"):
                return False
            self.left = order.get("n", 1)
            self.trace = Trace() if order["do"] == "profile" else None
        synchronize()
        if self.trace:
            self.trace.start()
        self.start = time.perf_counter()
        return True

    def done(self, loss: Callable[[], float], also: Callable[[float], dict] = lambda seconds: {}) -> None:
        """The step is over, with the optimizer's; `loss` is asked for when the clock has stopped, and what
        else is to be told of these seconds."""
        if self.trace:
            self.trace.stop()
        synchronize()
        seconds = time.perf_counter() - self.start
        self.steps.append({"seconds": seconds, "loss": float(loss()), **also(seconds)})
        self.left -= 1


class Ended(Exception):
    """Leaves a training loop that is not ours, when next_step() was False."""


def serve(train: Callable[[dict, Session], None]) -> None:
    """Answers orders until stdin ends. `train` is called once a prepared job."""
    session = Session.on_stdio()
    session.answer(hello=os.getpid())
    while (order := session.receive())["do"] != "quit":
        try:
            train(order["job"], session)
        except Ended:
            pass
        except Exception as error:
            traceback.print_exc()
            session.answer(failed=kind_of(error), why=reason(error))
            sys.exit(1)
        settle()
        session.answer(kept_bytes=torch.cuda.memory_allocated() + paged_bytes())


def kind_of(error: BaseException) -> str:
    """ "memory", "absent" or "error": of the exception, or of what it was raised from."""
    seen = error
    while seen is not None:
        if isinstance(seen, torch.OutOfMemoryError | MemoryError):
            return "memory"
        seen = seen.__cause__ or seen.__context__
    text = str(error)
    if "can't allocate memory" in text or "CUDA out of memory" in text:
        return "memory"
    return "absent" if isinstance(error, Absent | ImportError) else "error"


def reason(error: BaseException) -> str:
    """The first line of what an exception says, with its type."""
    lines = str(error).strip().splitlines() or ["?"]
    return str(error) if isinstance(error, Absent) else f"{type(error).__name__}: {lines[0][:200]}"


def synchronize() -> None:
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def settle() -> None:
    """Gives back what nothing refers to any more, so that the other workers can have it."""
    gc.collect()
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()


def restart_peaks() -> None:
    if not torch.cuda.is_initialized():
        restart_peak()
        return
    torch.cuda.reset_peak_memory_stats()
    with contextlib.suppress(OSError):  # some kernels cannot: the process's peak, which is not the GPU's,
        restart_peak()  # then counts from its start


def paged_bytes() -> int:
    """Of bitsandbytes' paged optimizer states: managed memory, which CUDA's allocator neither counts nor
    limits, and which bitsandbytes keeps until the process ends."""
    library = sys.modules.get("bitsandbytes.functional")
    paged = library.GlobalPageManager.get_instance().paged_tensors if library else []
    return sum(state.nbytes for state in paged)


def memory() -> dict:
    """peak_bytes: the most alive since ready() (CUDA allocator, or resident on a CPU); held_bytes: the most
    taken from the device for that; idle_bytes: what this worker keeps while it waits; free_bytes: what
    the device, or the machine, has left then; resident_peak_bytes: the process's, on a GPU too; paged_bytes:
    managed memory beside all these."""
    return _memory() | {"paged_bytes": paged_bytes()}


def _memory() -> dict:
    host = resident("VmHWM")
    if not torch.cuda.is_initialized():
        found = re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())
        out = {"peak_bytes": host, "held_bytes": host, "idle_bytes": resident("VmRSS")}
        return out | {"free_bytes": int(found[1]) * 1024, "resident_peak_bytes": host}
    out = {
        "peak_bytes": torch.cuda.max_memory_allocated(),
        "held_bytes": torch.cuda.max_memory_reserved(),
        "resident_peak_bytes": host,
    }
    torch.cuda.empty_cache()
    return out | {"idle_bytes": torch.cuda.memory_reserved(), "free_bytes": torch.cuda.mem_get_info()[0]}
