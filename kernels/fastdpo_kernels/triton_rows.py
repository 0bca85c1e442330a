"""Kernels over rows: the reference before the tiles, the sums after them. All fp32, in fixed order.

A row whose sum of E left the range is settled on the device: `gather` lists such rows, their tiles
leave a profile, `settle` moves the reference to their peak, and the tiles write their E again. With
no such row each of these kernels ends at once, so nobody has to ask.

Letters: M rows, D hidden, T tiles of the vocabulary.
"""

import triton
import triton.language as tl

from .triton_tile import BITS, LOWEST, PEAK, TOTAL, finished, product_of_pointers

# E of the target is exp(-40): E reaches down to tokens 47 nats less probable and, by LIMIT, up to 113
# nats more.
OFFSET = tl.constexpr(40.0)
# A sum past this makes a row out of range: its target is at -(40 + log 1e32) nats. The room up to 3e38
# is for the GEMMs on E, which sum it times weights.
LIMIT = tl.constexpr(1.0e32)


@triton.jit
def start_rows(
    x_ptr,  # [M, D]
    w_ptr,  # [V, D]
    bias_ptr,  # [V] or None
    target_ptr,  # i64[M]
    reference_ptr,  # f32[M], written: the target's logit + OFFSET, in bits
    target_logit_ptr,  # f32[M], written
    rest_ptr,  # f32[M], written: 0
    M, V, D, stride_x, stride_w, scale, softcap, BLOCK: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    """The target's logit is the diagonal of a tile of rows and the tokens they want. Tensor cores round
    otherwise than a dot product in fp32 does: this is the instruction and order of the other logits."""
    lane = tl.arange(0, BLOCK)
    rows = tl.program_id(0) * BLOCK + lane
    here = rows < M
    target = tl.load(target_ptr + rows, mask=here, other=-1)
    inside = (target >= 0) & (target < V)
    z = product_of_pointers(x_ptr, w_ptr, rows, target, here, inside, stride_x, stride_w, D, BK)
    z = tl.sum(tl.where(lane[:, None] == lane[None, :], z, 0.0), 1)
    if bias_ptr is not None:
        z += tl.load(bias_ptr + target, mask=inside, other=0.0).to(tl.float32)
    z, _ = finished(z, scale, softcap)
    z = tl.where(inside, z, float("nan"))  # nobody waits for the device to refuse a target
    tl.store(reference_ptr + rows, (z + OFFSET) * BITS, mask=here)
    tl.store(target_logit_ptr + rows, z, mask=here)
    tl.store(rest_ptr + rows, 0.0, mask=here)


@triton.jit
def merge_sums(
    partial_ptr,  # f32[slots, T, M]; slot SUM is the first
    rest_ptr,  # f32[M]: grows by the chunk's sum, where that stays in range
    out_of_range_ptr,  # i32[M], written
    M,
    T,
    BM: tl.constexpr,
    BT: tl.constexpr,
):
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    here = rows < M
    total = tl.load(rest_ptr + rows, mask=here, other=0.0)
    before = total
    for t0 in range(0, T, BT):
        t = (t0 + tl.arange(0, BT)).to(tl.int64)[:, None]
        total += tl.sum(tl.load(partial_ptr + t * M + rows, mask=(t < T) & here[None, :], other=0.0), 0)
    fits = total <= LIMIT  # false for NaN
    tl.store(rest_ptr + rows, tl.where(fits, total, before), mask=here)
    tl.store(out_of_range_ptr + rows, 1 - fits.to(tl.int32), mask=here)


@triton.jit
def gather(out_of_range_ptr, rows_ptr, count_ptr, M, BLOCK: tl.constexpr):
    """The numbers of the rows that are out of range, in order, and how many they are."""
    count = 0
    for m0 in range(0, M, BLOCK):
        rows = m0 + tl.arange(0, BLOCK)
        flag = tl.load(out_of_range_ptr + rows, mask=rows < M, other=0)
        tl.store(rows_ptr + count + tl.cumsum(flag, 0) - flag, rows, mask=flag != 0)
        count += tl.sum(flag, 0)
    tl.store(count_ptr, count)


@triton.jit
def settle(
    rows_ptr,  # i32[count]
    count_ptr,  # i32[1]
    partial_ptr,  # f32[slots, T, M]: the listed rows' PEAK and TOTAL, at 0 .. count - 1
    slot_stride,
    reference_ptr,  # f32[M]: raised to the chunk's peak
    rest_ptr,  # f32[M]: the sum so far, of the new reference
    shrink_ptr,  # f32[M], written for the listed rows: what the old reference's sums shrink by
    M,
    T,
    BM: tl.constexpr,
    BT: tl.constexpr,
):
    slot_stride = tl.cast(slot_stride, tl.int64)  # a slot's number times it passes 32 bits first
    count = tl.load(count_ptr)
    first = tl.program_id(0) * BM
    if first < count:
        position = first + tl.arange(0, BM)
        here = position < count
        rows = tl.load(rows_ptr + position, mask=here, other=0)
        before = tl.load(reference_ptr + rows, mask=here, other=0.0)
        peak = tl.where(before > LOWEST, before, LOWEST)
        for t0 in range(0, T, BT):
            t = (t0 + tl.arange(0, BT)).to(tl.int64)[:, None]
            spot = partial_ptr + t * M + position[None, :]
            inside = (t < T) & here[None, :]
            peaks = tl.load(spot + PEAK * slot_stride, mask=inside, other=LOWEST)
            peak = tl.maximum(peak, tl.max(peaks, 0))
        shrink = tl.exp2(before - peak)
        rest = tl.load(rest_ptr + rows, mask=here, other=0.0) * shrink
        for t0 in range(0, T, BT):
            t = (t0 + tl.arange(0, BT)).to(tl.int64)[:, None]
            spot = partial_ptr + t * M + position[None, :]
            inside = (t < T) & here[None, :]
            peaks = tl.load(spot + PEAK * slot_stride, mask=inside, other=LOWEST)
            totals = tl.load(spot + TOTAL * slot_stride, mask=inside, other=0.0)
            rest += tl.sum(totals * tl.exp2(peaks - peak[None, :]), 0)
        tl.store(reference_ptr + rows, peak, mask=here)
        tl.store(rest_ptr + rows, rest, mask=here)
        tl.store(shrink_ptr + rows, shrink, mask=here)


@triton.jit
def rescale(rows_ptr, count_ptr, shrink_ptr, sums_ptr, D, programs, BLOCK: tl.constexpr):
    """Brings the listed rows of sums f32[M, D] to their new reference."""
    for position in range(tl.program_id(0), tl.load(count_ptr), programs):
        row = tl.load(rows_ptr + position)
        shrink = tl.load(shrink_ptr + row)
        for k in range(0, D, BLOCK):
            inner = k + tl.arange(0, BLOCK)
            spot = sums_ptr + row.to(tl.int64) * D + inner
            old = tl.load(spot, mask=inner < D, other=0.0)
            # a sum that was infinite belonged to entries that are now 0 beside the new peak
            tl.store(spot, tl.where(shrink == 0, 0.0, old * shrink), mask=inner < D)
