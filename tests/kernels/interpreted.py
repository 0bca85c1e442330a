"""What the interpreter's tests share: small tiles on CPU tensors, with and without descriptors."""

import os

import numpy as np
import pytest
import torch
from fastdpo_kernels import linear_logp, reference, tiles

from .cases import case, error, least_of, plan_module

interpreted = os.environ.get("TRITON_INTERPRET") == "1"
SMALL = tiles.Tile(rows=64, columns=64, depth=16, group=2, warps=4, stages=1, descriptors=True)


def fma_rounded_twice(builder, x, y, z):
    """x * y + z of float32 as the interpreter before triton 3.9 has it: the product is rounded, too."""
    return handle(x.data * y.data + z.data, z)


def fma_rounded_once(builder, x, y, z):
    """As tl.fma is on every GPU. The product is exact in float64, and the sum is rounded there to 29 bits
    more than float32 keeps, which changes its own rounding once in about 2^29 times."""
    wide = x.data.astype(np.float64) * y.data + z.data
    return handle(wide.astype(z.data.dtype), z)


def handle(data, like):
    from triton.runtime.interpreter import TensorHandle

    return TensorHandle(data, like.dtype.scalar)


def use_fma(monkeypatch, function):
    from triton.runtime.interpreter import InterpreterBuilder

    monkeypatch.setattr(InterpreterBuilder, "create_fma", function)


def fma_loses() -> float:
    """What the interpreter's tl.fma(a, a, -a^2) is off by at a = 1 + 2^-12, where a^2 in float32 drops
    2^-24: an fma that rounds the product gives 0."""
    import triton
    import triton.language as tl

    @triton.jit
    def square(a_ptr):
        a = tl.load(a_ptr)
        tl.store(a_ptr, tl.fma(a, a, -(a * a)))

    a = torch.tensor([1 + 2.0**-12])
    square[(1,)](a)
    return abs(a.item() - 2.0**-24)


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Every call goes to Triton, where 130 tokens are two tiles and two columns. Where the interpreter
    rounds the product of an fma, which no GPU does, it is lent one that does not."""
    from fastdpo_kernels import launch

    if fma_loses():
        use_fma(monkeypatch, fma_rounded_once)
    monkeypatch.setattr(tiles, "tile", lambda device, dtype: SMALL)
    monkeypatch.setattr(launch, "processors", lambda device: 3)


@pytest.fixture
def many_chunks(monkeypatch):
    """Chunks of one tile, where a plan has chunks."""
    from fastdpo_kernels import triton_head

    monkeypatch.setattr(triton_head, "MERGED", 1)
    monkeypatch.setattr(plan_module, "NARROWEST", SMALL.columns)
    monkeypatch.setattr(plan_module, "CHUNK_BYTES", 1)


def poison(monkeypatch):
    """Memory that nobody has written is NaN, or a large integer."""

    def poisoned(real):
        def empty(*args, **kwargs):
            out = real(*args, **kwargs)
            return out.fill_(float("nan")) if out.dtype.is_floating_point else out.fill_(1 << 30)

        return empty

    monkeypatch.setattr(torch, "empty", poisoned(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poisoned(torch.empty_like))


def head_case(M=7, V=130, D=36, **options):
    """A case without LoRA (which takes torch); rows of 36 floats suit descriptors, of 33 do not."""
    return case(M, V, D, lora=False, **options)


def assert_right(c, wanted=(), stats=(), **options):
    """Every result in float32 is within 5e-6 of the truth, or twice as far as plain torch's. An exponent
    near 40 nats is rounded to 3e-6, which is what E allows itself; and a softcap's tanh to 2^-22
    (triton_tile.finished)."""
    c = c.to(torch.float32)
    assert c.a is None and c.weight.stride(1) == 1, "would take torch"
    truth = c.to(torch.float64).run(reference.linear_logp, wanted, stats)
    plain = c.run(reference.linear_logp, wanted, stats)
    got = c.run(linear_logp, wanted, stats, **options)
    allowed = 5e-6 + (c.softcap or 0) * 2**-22
    for name, value in truth.items():
        if value is None:
            assert got[name] is None, f"{name}: nobody asked for it"
        else:
            ours, theirs = (error(values[name], value, least_of(name)) for values in (got, plain))
            assert ours <= 2 * theirs + allowed, f"{name}: {ours:.2e}, plain torch {theirs:.2e}"
