"""Kernels over a chunk of fp32 logits that cuBLAS wrote: one program a row, what chunk.py's TorchChunk
does by a chain of elementwise operations.

Each of a program's lanes has its own online softmax over the columns it meets; they are merged at the
end, in fixed order. The columns past the chunk's end are -inf, and add nothing.

Letters: M rows, N columns of the chunk.
"""

import triton
import triton.language as tl

from .triton_tile import LOWEST, kernel


@triton.jit
def _logits(z_ptr, bias_ptr, cols, N, scale, softcap):
    """triton_tile.finished of z, by a division: float32 rows come here. Of columns past the end: -inf."""
    z = tl.load(z_ptr + cols, mask=cols < N, other=0.0)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + cols, mask=cols < N, other=0.0).to(tl.float32)
    t = z
    if scale is not None:
        z *= scale
    if softcap is not None:
        t = 2 / (tl.exp2(z) + 1) - 1
        z = t * -softcap
    return tl.where(cols < N, z, float("-inf")), t


@triton.jit
def _weighted(weight, value):
    # of weight 0 is what lies below a masked logit, where a value may overflow
    return tl.where(weight == 0, 0.0, weight * value)


@triton.jit
def _leave(
    z_ptr, bias_ptr, out_ptr, row, target, peak, factor, by_logit_ptr, N, scale, softcap, BLOCK: tl.constexpr
):  # fmt: skip
    """Writes dZ = E * (factor + by_logit * (z - peak)), or E by a factor of 1, of the row at z_ptr."""
    for n0 in range(0, N, BLOCK):
        cols = n0 + tl.arange(0, BLOCK)
        z, t = _logits(z_ptr, bias_ptr, cols, N, scale, softcap)
        by = factor
        if by_logit_ptr is not None:
            # E is 0 long before -1e4, and at -inf must stay so
            by = factor + tl.load(by_logit_ptr + row) * tl.maximum(z - peak, -1.0e4)
        e = tl.where(cols == target, 0.0, tl.exp(z - peak) * by)
        if softcap is not None:
            e *= 1 - t * t
        tl.store(out_ptr + cols, e.to(out_ptr.dtype.element_ty), mask=cols < N)


@kernel
def chunk_sums(
    z_ptr,  # f32[M, N]: the GEMM's product
    out_ptr,  # [M, N] or None: E, written, in z's place if it is z
    bias_ptr,  # [N] or None
    target_ptr,  # i64[M], in the whole vocabulary
    target_logit_ptr,  # f32[M], written where the target is in the chunk
    before_ptr,  # f32[M]: the peak so far
    peak_ptr,  # f32[M], written: the new one
    shrink_ptr,  # f32[M], written: exp(before - peak)
    rest_ptr,  # f32[M]: sum of E without the target; grows, as do the next three
    plogp_ptr,  # f32[M] or None: sum of E log E
    squares_ptr,  # f32[M] or None: sum of E^2
    logits_ptr,  # f32[M] or None: sum of all logits
    N, v0, stride_z, stride_out, scale, softcap, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The chunk starts at v0 of the vocabulary. STEP divides N."""
    N = N // STEP * STEP  # the same, but then the compiler knows, and loads and stores are wide
    row = tl.program_id(0).to(tl.int64)
    z_ptr += row * stride_z
    target = (tl.load(target_ptr + row) - v0).to(tl.int32)
    top = tl.full((BLOCK,), LOWEST, tl.float32)
    rest, plogp = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    squares, logits, own = tl.zeros_like(rest), tl.zeros_like(rest), tl.zeros_like(rest)
    for n0 in range(0, N, BLOCK):
        cols = n0 + tl.arange(0, BLOCK)
        z, _ = _logits(z_ptr, bias_ptr, cols, N, scale, softcap)
        if logits_ptr is not None:
            logits += tl.where(cols < N, z, 0.0)
        own = tl.where(cols == target, z, own)
        # either the lane's sums shrink or the new entry is below the peak: one exponential does for both
        rises = z > top
        gap = tl.where(rises, top - z, z - top)
        part = tl.exp(gap)
        less, e = tl.where(rises, part, 1.0), tl.where(cols == target, 0.0, tl.where(rises, 1.0, part))
        if plogp_ptr is not None:
            finite = tl.maximum(gap, LOWEST)  # 0 * -inf is NaN
            plogp = less * (plogp + tl.where(rises, finite, 0.0) * rest) + e * tl.where(rises, 0.0, finite)
        if squares_ptr is not None:
            squares = squares * less * less + e * e
        rest = rest * less + e
        top = tl.where(rises, z, top)
    before = tl.load(before_ptr + row)
    peak = tl.maximum(before, tl.max(top))
    shrink, weight = tl.exp(before - peak), tl.exp(top - peak)
    old = tl.load(rest_ptr + row)
    if plogp_ptr is not None:
        earlier = _weighted(shrink, tl.load(plogp_ptr + row) + (before - peak) * old)
        tl.store(plogp_ptr + row, earlier + tl.sum(_weighted(weight, plogp + (top - peak) * rest)))
    if squares_ptr is not None:
        earlier = tl.load(squares_ptr + row) * shrink * shrink
        tl.store(squares_ptr + row, earlier + tl.sum(squares * weight * weight))
    if logits_ptr is not None:
        tl.store(logits_ptr + row, tl.load(logits_ptr + row) + tl.sum(logits))
    tl.store(rest_ptr + row, old * shrink + tl.sum(rest * weight))
    tl.store(peak_ptr + row, peak)
    tl.store(shrink_ptr + row, shrink)
    tl.store(target_logit_ptr + row, tl.sum(own), mask=(target >= 0) & (target < N))
    if out_ptr is not None:  # the row was read a moment ago, and lies in cache
        out = out_ptr + row * stride_out
        _leave(z_ptr, bias_ptr, out, row, target, peak, 1.0, None, N, scale, softcap, BLOCK)


@kernel
def chunk_gradient(
    z_ptr,  # f32[M, N]: the GEMM's product
    out_ptr,  # [M, N], written: dZ, 0 at the target; in z's place if it is z
    bias_ptr,  # [N] or None
    target_ptr,  # i64[M], in the whole vocabulary
    peak_ptr,  # f32[M]
    factor_ptr,  # f32[M]
    by_logit_ptr,  # f32[M] or None: from a gradient through entropy
    N, v0, stride_z, stride_out, scale, softcap, STEP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    N = N // STEP * STEP
    row = tl.program_id(0).to(tl.int64)
    target = (tl.load(target_ptr + row) - v0).to(tl.int32)
    peak, factor = tl.load(peak_ptr + row), tl.load(factor_ptr + row)
    z, out = z_ptr + row * stride_z, out_ptr + row * stride_out
    _leave(z, bias_ptr, out, row, target, peak, factor, by_logit_ptr, N, scale, softcap, BLOCK)
