"""A head in slices next to the whole one: cases, and ranks that are threads of one process."""

import threading
from dataclasses import replace

import torch
import torch.distributed as dist
from fastdpo_kernels import linear_logp
from torch.distributed import distributed_c10d

from .cases import NAMES, case, error, least_of

WAYS = {
    "forward": (),
    "frozen": ("hidden",),
    "keep": NAMES,
    "recompute": NAMES,
}  # what wants a gradient, by plan
PARTS = ("weight", "bias", "b")  # of the vocabulary; the other tensors are whole on every rank


def bounds_of(V, size, even=True):
    """Where each rank's slice starts, and V."""
    starts = [V // size * i if even else V * i * i // size**2 for i in range(size)]
    return [*starts, V]


def options_of(way):
    """A memory_budget that puts a head of any size, and so a slice of it, on that plan."""
    return dict(memory_budget=1 if way == "recompute" else 1 << 40)


def assert_a_slice_is_right(c, group, bounds, wanted=NAMES, stats=(), most=1e-6, vocab_start=None, **options):
    """One rank's results are those of the whole head in one process, and its gradients of its slice."""
    v0, v1 = bounds[group.rank() : group.rank() + 2]
    parts = {name: getattr(c, name) for name in PARTS}
    mine = replace(c, **{name: None if t is None else t[v0:v1].clone() for name, t in parts.items()})
    whole = c.run(linear_logp, wanted, stats, **options)
    got = mine.run(linear_logp, wanted, stats, process_group=group, vocab_start=vocab_start, **options)
    assert got.keys() == whole.keys()
    for name, value in whole.items():
        if value is None:
            assert got[name] is None, f"{name}: nobody asked for it"
            continue
        ours = torch.zeros_like(value)
        own = slice(v0, v1) if name.removeprefix("d_") in PARTS else slice(None)
        ours[own], rest = got[name], value.clone()
        rest[own] = 0
        off = error(ours, (value - rest).double(), max(value.abs().max().item(), least_of(name)))
        assert off <= most, f"{name}: {off:.2e} of its largest value"


def hard_case(M=9, V=60, D=20, **options):
    """Rows whose target is one of many, the surest, or hundreds of nats below tokens of any slice."""
    c = case(M, V, D, **options)
    c.hidden[1] *= 30
    c.hidden[2] *= 100
    c.hidden[3:5] *= 50
    z = c.to(torch.float64).hidden @ c.weight.T
    c.target[1], c.target[3], c.target[4] = z[1].argmax(), z[3].argmin(), z[4].argmin()
    return c.to(torch.float32)


class Threads:
    """Ranks that take turns: one runs until it waits for the others in a collective."""

    def __init__(self, size, monkeypatch):
        self.size, self.parts, self.calls = size, [None] * size, 0
        self.turn, self.all_here = threading.Lock(), threading.Barrier(size)
        monkeypatch.setattr(distributed_c10d, "_resolve_process_group", lambda name: Rank(int(name)))
        monkeypatch.setattr(dist, "all_reduce", self._all_reduce)

    def _wait(self):
        self.turn.release()
        try:
            self.all_here.wait(timeout=300)  # should one rank make fewer calls
        finally:
            self.turn.acquire()

    def _all_reduce(self, tensor, op=dist.ReduceOp.SUM, group=None):
        self.calls += group.rank() == 0
        self.parts[group.rank()] = tensor.clone()
        self._wait()
        every = torch.stack(self.parts)
        tensor.copy_(every.amax(0) if op == dist.ReduceOp.MAX else every.sum(0))
        self._wait()

    def run(self, work):
        """work(group) on every rank; raises what a rank raises."""
        failed = []

        def rank(number):
            with self.turn:
                try:
                    work(Rank(number))
                except BaseException as e:
                    failed.append(e)
                    self.all_here.abort()

        threads = [threading.Thread(target=rank, args=(number,)) for number in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for e in sorted(failed, key=lambda e: isinstance(e, threading.BrokenBarrierError)):
            raise e


class Rank:
    def __init__(self, number):
        self.number, self.group_name = number, str(number)

    def rank(self):
        return self.number
