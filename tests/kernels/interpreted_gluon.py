"""triton_gluon.py's kernel on a CPU, for Gluon has no interpreter: its own source, with stand-ins for what it
calls. The partitions take turns by chance; copies and products happen as late as they may, or at once."""

import random
import threading
from types import FunctionType, SimpleNamespace

import torch
from fastdpo_kernels import triton_gluon

FUNCTIONS = ("_load", "_product", "_half", "_store", "place", "e_tiles")


class Pointer:
    def __init__(self, tensor, at=0):
        self.tensor, self.at, self.dtype = tensor, at, SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, by):
        return Pointer(self.tensor, self.at + by)


class Barrier:
    """An mbarrier: phase `phase` ends when all have arrived and all expected bytes have come."""

    def __init__(self):
        self.phase, self.count, self.missing, self.bytes = 0, 1, 1, 0

    def come(self, arrivals, count_of_bytes):
        self.missing, self.bytes = self.missing - arrivals, self.bytes + count_of_bytes
        assert self.missing >= 0, "more arrivals than a phase has"
        if self.missing == 0 and self.bytes == 0:
            self.phase, self.missing = self.phase + 1, self.count


class Shared:
    def __init__(self, tensor):
        self.tensor = tensor

    def index(self, i):
        return Shared(self.tensor[i])

    def permute(self, order):
        return Shared(self.tensor.permute(order))

    def store(self, value):
        self.tensor.copy_(value)


class Machine:
    """One program. `later`: copies under way."""

    def __init__(self, program, seed):
        self.program, self.chance = program, random.Random(seed)
        self.later, self.stuck, self.error = [], 0, None
        self.turns, self.own = {}, threading.local()

    def switch(self):
        """Lets copies happen, and another partition go on."""
        while self.later and self.chance.random() < 0.5:
            self.later.pop(self.chance.randrange(len(self.later)))()
        me, other = threading.get_ident(), self.chance.choice(list(self.turns))
        if other != me:
            self.turns[other].release()
            self.turns[me].acquire()
        if self.error:
            raise RuntimeError("another partition failed")

    def until(self, ready):
        self.switch()
        while not ready():
            self.stuck += 1
            assert self.stuck < 5000, "deadlock"
            self.switch()
        self.stuck = 0

    def partitions(self, functions, *_):
        started = threading.Semaphore(0)

        def run(function, arguments):
            me = threading.get_ident()
            self.turns[me], self.own.pending, self.own.stores = threading.Semaphore(0), [], []
            started.release()
            self.turns[me].acquire()
            try:
                function(*arguments)
            except BaseException as error:
                self.error = self.error or error
            del self.turns[me]
            if self.turns:
                next(iter(self.turns.values())).release()

        threads = [threading.Thread(target=run, args=each, daemon=True) for each in functions]
        for thread in threads:
            thread.start()
            started.acquire()
        next(iter(self.turns.values())).release()
        for thread in threads:
            thread.join(60)
        if self.error:
            raise self.error
        assert not self.turns and not self.later

    # what the kernel calls

    def wait(self, barrier, phase):
        self.until(lambda: barrier.phase & 1 != phase)

    def load_tile(self, matrix, at, barrier, into):
        def copy():
            part = matrix[at[0] : at[0] + into.tensor.shape[0], at[1] : at[1] + into.tensor.shape[1]]
            into.tensor.zero_()[: part.shape[0], : part.shape[1]] = part
            barrier.come(0, -into.tensor.numel() * into.tensor.element_size())

        self.later.append(copy)

    def store_tile(self, out, at, staged):
        stores, mark = self.own.stores, object()

        def copy():
            part = out.matrix[at[0] : at[0] + staged.tensor.shape[0], at[1] : at[1] + staged.tensor.shape[1]]
            part.copy_(staged.tensor[: part.shape[0], : part.shape[1]])
            stores.remove(mark)

        stores.append(mark)
        self.later.append(copy)

    def store_wait(self, count):
        stores = self.own.stores
        self.until(lambda: len(stores) <= count)

    def product(self, x, w, z, is_async):
        assert is_async
        self.own.pending.append((x, w))
        return self.products(self.chance.choice((0, len(self.own.pending))), (z,))

    def products(self, left, deps):
        (z,), pending = deps, self.own.pending
        self.switch()
        while len(pending) > left:
            x, w = pending.pop(0)
            z = z + x.tensor.float() @ w.tensor.float()
        return z


def stand_ins(m):
    """The kernel's globals."""

    def load(spot, mask, other):
        index = torch.where(mask, spot.at, 0)
        return torch.where(mask, spot.tensor[index], other)

    def store(spot, value, mask):
        spot.tensor.view(-1)[spot.at[mask]] = value[mask]

    def allocate(dtype, shape, layout):
        if layout == "barrier":
            barriers = [Barrier() for _ in range(shape[0])]
            return SimpleNamespace(index=barriers.__getitem__)
        return Shared(torch.full(shape, float("nan"), dtype=dtype))

    def descriptor(spot, shape, strides, block, layout):
        matrix = spot.tensor.as_strided(shape, strides)
        return matrix if layout != "out" else SimpleNamespace(matrix=matrix, dtype=matrix.dtype)

    layouts = iter(("x", "w", "out"))
    gl = SimpleNamespace(
        program_id=lambda axis: m.program, assume=lambda so: None, cdiv=lambda a, b: -(-a // b),
        static_range=range, int32=torch.int32, int64=torch.int64, float32=torch.float32,
        arange=lambda a, b, layout: torch.arange(a, b), load=load, store=store, where=torch.where,
        cast=lambda value, dtype: value.to(dtype) if isinstance(value, torch.Tensor) else value,
        zeros=lambda shape, dtype, layout: torch.zeros(shape), exp2=torch.exp2, sum=torch.sum,
        fma=lambda a, b, c: a * b + c, split=lambda t: (t[..., 0], t[..., 1]),
        convert_layout=lambda value, layout: value, allocate_shared_memory=allocate,
        NVMMASharedLayout=SimpleNamespace(get_default_for=lambda shape, dtype: next(layouts)),
        NVMMADistributedLayout=lambda *a: None, SliceLayout=lambda *a: None, warp_specialize=m.partitions,
    )  # fmt: skip
    mbarrier = SimpleNamespace(
        MBarrierLayout=lambda: "barrier", wait=m.wait,
        init=lambda barrier, count: setattr(barrier, "count", count),
        expect=lambda barrier, size: barrier.come(1, size),
        arrive=lambda barrier, pred=True: barrier.come(1, 0) if pred else None,
    )  # fmt: skip
    tma = SimpleNamespace(make_tensor_descriptor=descriptor, store_wait=m.store_wait)
    names = dict(gl=gl, mbarrier=mbarrier, tma=tma, async_load=m.load_tile, async_store=m.store_tile)
    names |= dict(warpgroup_mma=m.product, warpgroup_mma_wait=m.products, fence_async_shared=lambda: None)
    names |= dict(BITS=triton_gluon.BITS.value, HALF_REGISTERS=240, LOAD_REGISTERS=24)
    for name in FUNCTIONS:
        names[name] = FunctionType(getattr(triton_gluon, name).fn.__code__, names)
    return names


def run(programs, seed, **arguments):
    """The kernel in all its programs; tensors for pointers."""
    pointers = {k: Pointer(v) if isinstance(v, torch.Tensor) else v for k, v in arguments.items()}
    for program in range(programs):
        stand_ins(Machine(program, seed))["e_tiles"](programs=programs, **pointers)
