"""Kernels over rows: log-probs and statistics from the tiles' sums, and the target's part of gradients.

Letters: M rows, D hidden, T tiles of the vocabulary, N columns of a chunk.
"""

import triton
import triton.language as tl

from .triton_tile import BITS, LOGITS, LOWEST, NATS, PEAK, PLOGP, SQUARES, TOTAL, kernel


@triton.jit
def _log1p(x):
    # Kahan's: the rounding of 1 + x cancels
    u = 1 + x
    return tl.where(u == 1, x, tl.log(u) * (x / (u - 1)))


@kernel
def finish_rows(
    reference_ptr,  # f32[M]: r in bits
    rest_ptr,  # f32[M]: sum of E without the target
    target_logit_ptr,  # f32[M]
    total_ptr,  # f32[M], written: the whole sum
    logp_ptr,  # f32[M], written
    M, BLOCK: tl.constexpr,
):  # fmt: skip
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    here = rows < M
    rest = tl.load(rest_ptr + rows, mask=here, other=1.0)
    reference = tl.load(reference_ptr + rows, mask=here, other=0.0)
    gap = tl.fma(tl.load(target_logit_ptr + rows, mask=here, other=0.0), BITS, -reference)
    e_target = tl.exp2(gap)
    # where the target is more probable than not, log(1 + rest / e_target) keeps a small rest
    ratio = tl.where(rest <= e_target, rest, 0.0) / tl.where(e_target > 0, e_target, 1.0)
    # where all are 0 every logit is -inf, and the log-prob NaN
    sure = (rest <= e_target) & (e_target > 0)
    logp = tl.where(sure, -_log1p(ratio), gap * NATS - tl.log(rest + e_target))
    tl.store(total_ptr + rows, rest + e_target, mask=here)
    tl.store(logp_ptr + rows, logp, mask=here)


@kernel
def finish_stats(
    partial_ptr, slot_stride,  # f32[slots, T, M]
    target_logit_ptr,  # f32[M]
    entropy_ptr, squares_ptr, mean_ptr, top1_ptr,  # f32[M] or None each, written
    M, T, V, BM: tl.constexpr, BT: tl.constexpr,
):  # fmt: skip
    """Merges the tiles' profiles, each relative to its own peak, and puts the target back."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    here = rows < M
    slot_stride = tl.cast(slot_stride, tl.int64)  # a slot's number times it passes 32 bits first
    own = tl.load(target_logit_ptr + rows, mask=here, other=0.0)
    others = tl.full((BM,), LOWEST, tl.float32)
    for t0 in range(0, T, BT):
        t = (t0 + tl.arange(0, BT)).to(tl.int64)[:, None]
        spot = partial_ptr + PEAK * slot_stride + t * M + rows[None, :]
        peaks = tl.load(spot, mask=(t < T) & here[None, :], other=LOWEST)
        others = tl.maximum(others, tl.max(peaks, 0))
    peak = tl.maximum(others, own * BITS)
    gap = tl.fma(own, BITS, -peak)
    e_own = tl.exp2(gap)
    rest = tl.zeros((BM,), tl.float32)
    plogp = e_own * tl.maximum(gap, LOWEST) * NATS
    squares = e_own * e_own
    logits = tl.zeros((BM,), tl.float32)
    for t0 in range(0, T, BT):
        t = (t0 + tl.arange(0, BT)).to(tl.int64)[:, None]
        inside = (t < T) & here[None, :]
        spot = partial_ptr + t * M + rows[None, :]
        step = tl.load(spot + PEAK * slot_stride, mask=inside, other=LOWEST) - peak[None, :]
        shrink = tl.exp2(step)
        total = tl.load(spot + TOTAL * slot_stride, mask=inside, other=0.0)
        rest += tl.sum(total * shrink, 0)
        if entropy_ptr is not None:
            part = tl.load(spot + PLOGP * slot_stride, mask=inside, other=0.0) + step * NATS * total
            plogp += tl.sum(tl.where(shrink == 0, 0.0, shrink * part), 0)
        if squares_ptr is not None:
            part = tl.load(spot + SQUARES * slot_stride, mask=inside, other=0.0)
            squares += tl.sum(part * shrink * shrink, 0)
        if mean_ptr is not None:
            logits += tl.sum(tl.load(spot + LOGITS * slot_stride, mask=inside, other=0.0), 0)
    whole = rest + e_own
    if entropy_ptr is not None:
        tl.store(entropy_ptr + rows, tl.log(whole) - plogp / whole, mask=here)
    if squares_ptr is not None:
        tl.store(squares_ptr + rows, tl.log(squares) - 2 * tl.log(whole), mask=here)
    if mean_ptr is not None:
        tl.store(mean_ptr + rows, logits / V, mask=here)
    if top1_ptr is not None:
        tl.store(top1_ptr + rows, (own * BITS >= others).to(tl.float32), mask=here)


@kernel
def put_target(out_ptr, target_ptr, value_ptr, M, N, v0, stride_out, BLOCK: tl.constexpr):
    """out[m, target[m] - v0] = value[m] for the rows whose target lies in the chunk."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    col = tl.load(target_ptr + rows, mask=rows < M, other=-1) - v0
    value = tl.load(value_ptr + rows, mask=rows < M, other=0.0)
    spot = out_ptr + rows.to(tl.int64) * stride_out + col
    tl.store(spot, value.to(out_ptr.dtype.element_ty), mask=(rows < M) & (col >= 0) & (col < N))


@kernel
def hidden_gradient(
    sums_ptr,  # f32[M, D]: sum over v of dz or E times W_v
    w_ptr,  # [V, D]
    target_ptr,  # i64[M]
    factor_ptr,  # f32[M] or None (1): of the sums
    coefficient_ptr,  # f32[M]: of the target's row of W, what the sums lack of it
    out_ptr,  # [M, D], written
    V, D, stride_w, BLOCK: tl.constexpr,
):  # fmt: skip
    """out = factor * sums + coefficient * W[target]: adding the target in fp32, not through a rounded
    E, keeps what 1 - p leaves of a sure row."""
    row = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + row)
    coefficient = tl.load(coefficient_ptr + row)
    width = tl.where((target >= 0) & (target < V), D, 0)
    for k in range(0, D, BLOCK):
        inner = k + tl.arange(0, BLOCK)
        total = tl.load(sums_ptr + row * D + inner, mask=inner < D, other=0.0)
        if factor_ptr is not None:
            total *= tl.load(factor_ptr + row)
        w = tl.load(w_ptr + target * stride_w + inner, mask=inner < width, other=0.0).to(tl.float32)
        out = (total + coefficient * w).to(out_ptr.dtype.element_ty)
        tl.store(out_ptr + row * D + inner, out, mask=inner < D)
