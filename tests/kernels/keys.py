"""What Triton compiles over training steps of changing sizes, on a CUDA device without a GPU."""

import random
from dataclasses import replace
from itertools import product
from unittest import mock

import torch
from fastdpo_kernels import launch, linear_dpo, linear_logp
from torch import Tensor

from benchmarks.head import aot
from tests.kernels.cases import STATS
from tests.training.fake_cuda import CUDA
from tests.training.fake_driver import fake_cuda

D = 64
# rows of the steps: Triton would know of a 1 and of multiples of 16, of sizes and of where slices start
SIZES = [16, 1, 10_000, *random.Random(0).sample(range(2, 10_000), 7)]
VOCABULARIES = 128_256, 32_080, 50_257  # whole tiles; a tail of whole loads; a tail
DTYPES = {"triton": torch.bfloat16, "cublas": torch.float16}
WAYS = "forward", "frozen", "keep", "recompute", "parts"


class Pointer:
    """What a key holds of a tensor. Memory that is allocated begins at whole lines."""

    def __init__(self, tensor: Tensor):
        self.dtype, self.start = tensor.dtype, tensor.storage_offset() * tensor.itemsize

    def data_ptr(self) -> int:
        return self.start


def key(spec: launch.Launch) -> tuple[str, str]:
    """(Which kernel of which tensors and constants; what Triton compiles by). It should be one for one."""
    stands_in = lambda value: Pointer(value) if isinstance(value, Tensor) else value
    arguments = {name: stands_in(value) for name, value in spec.arguments.items()}
    known = aot.known(replace(spec, arguments=arguments))
    numbers = {p.name for p in spec.kernel.params if not p.is_constexpr and arguments[p.name] is not None}
    called = {n: getattr(v, "dtype", "a number" if n in numbers else v) for n, v in arguments.items()}
    return repr((spec.kernel.__name__, called, spec.options)), repr(known)


def step(way: str, M: int, V: int, dtype: torch.dtype, options: dict, stats: tuple) -> None:
    """A step of M rows, forward and backward."""
    trained = {"forward": (False, False), "frozen": (True, False)}.get(way, (True, True))
    new = lambda *shape, grad: torch.empty(*shape, dtype=dtype, device=CUDA).requires_grad_(grad)
    hidden, weight = new(M, D, grad=trained[0]), new(V, D, grad=trained[1])
    target = torch.empty(M, dtype=torch.int64, device=CUDA)
    budget = {"keep": 200 * M * V, "recompute": M * V}.get(way)  # of 2 bytes an entry
    if way != "parts":
        out = linear_logp(hidden, weight, target, **options, stats=stats, memory_budget=budget)
        if trained[0]:
            (out[0] if stats else out).sum().backward()
        return
    cu, pairs = (torch.empty(*shape, dtype=torch.int64, device=CUDA) for shape in ((5,), (2, 2)))
    parts = dict(groups=[M // 3, M - M // 3], memory_budget=2 * M * V - 1)
    linear_dpo(hidden, weight, target, cu, pairs, **options, **parts)[0].backward()


def keys(backend: str, M: int, V: int) -> set[tuple[str, str]]:
    """Of a step of each kind."""
    found: list[launch.Launch] = []
    with fake_cuda() as device, device:
        with mock.patch.object(launch.Launch, "run", lambda self: found.append(self)):
            for way in WAYS:
                step(way, M, V, DTYPES[backend], {}, ())
            for way, stats in product(WAYS, ((), STATS) if V == VOCABULARIES[-1] else ()):
                step(way, M, V, DTYPES[backend], dict(softcap=30.0, scale=0.5), stats)
    return {key(spec) for spec in found}


def late(backend: str) -> tuple[list[str], list[str]]:
    """The names of the kernels that ran, and what is compiled again, or for the first time after the first
    step."""
    names, out = set(), []
    for V in VOCABULARIES if backend == "triton" else VOCABULARIES[1:]:  # its chunks are many
        first, *others = [keys(backend, M, V) for M in SIZES]
        names |= {name.split("'")[1] for name, _ in first}
        known = dict(first)
        out += [f"V {V}: {new}" for new in sorted(first.union(*others) - known.items())]
    return sorted(names), out
